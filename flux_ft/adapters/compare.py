"""What two LoRAs do differently: their ΔW module by module, without ever forming one, and their headers.

⟨ΔWa, ΔWb⟩ = Σ (UaᵀUb) ∘ (VaVbᵀ), the Frobenius inner product, from the factors' Gram matrices in float64. Three such
numbers give norms, relative error, cosine and the scale that fits best. Cancellation leaves a floor near 1e-8.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from flux_ft.adapters.formats import EXPORT_DTYPES, TOLERANCE, read_adapter
from flux_ft.errors import plain, some_of
from flux_ft.types import AdapterState, LoraLayer

EXACT = 1e-6
"""Relative error in ΔW up to which two LoRAs are the same: what float32 arithmetic leaves."""
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_SHOWN = 12


def at_least_zero(value: float) -> float:
    """Without what cancellation leaves below zero; NaN stays, where max() would make it zero."""
    return 0.0 if value < 0 else value


class Products(NamedTuple):
    """⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ of two weight changes, or sums of them over modules."""

    aa: float
    ab: float
    bb: float

    @property
    def gap(self) -> float:
        """‖a − b‖²."""
        return at_least_zero(self.aa - 2 * self.ab + self.bb)

    @property
    def error(self) -> float:
        """‖a − b‖ / ‖a‖; 0 where both are zero, inf where only a is."""
        return math.sqrt(self.gap / self.aa) if self.aa else (math.inf if self.bb else 0.0)

    @property
    def cosine(self) -> float | None:
        """None where one is zero."""
        size = math.sqrt(self.aa) * math.sqrt(self.bb)
        return max(-1.0, min(1.0, self.ab / size)) if size else None

    @property
    def scale(self) -> float | None:
        """The s for which s · a is nearest to b; None where a is zero."""
        return self.ab / self.aa if self.aa else None

    def error_at(self, scale: float) -> float:
        """‖b − scale · a‖ / ‖scale · a‖."""
        scaled = Products(scale**2 * self.aa, scale * self.ab, self.bb)
        return scaled.error


def products(a: LoraLayer | None, b: LoraLayer | None) -> Products | None:
    """The three products of one module; an absent layer is ΔW = 0. None where the two have different shapes."""
    layers = [one for one in (a, b) if one is not None]
    if len({(one.up_OR.shape[0], one.down_RI.shape[1]) for one in layers}) > 1:
        return None
    if not layers:
        return Products(0.0, 0.0, 0.0)
    up_OR = torch.cat([one.up_OR.detach().cpu().double() * (one.alpha / one.rank) for one in layers], 1)
    down_RI = torch.cat([one.down_RI.detach().cpu().double() for one in layers])
    both_RR = (up_OR.T @ up_OR) * (down_RI @ down_RI.T)
    rank = 0 if a is None else a.rank
    return Products(
        at_least_zero(float(both_RR[:rank, :rank].sum())),
        float(both_RR[:rank, rank:].sum()),
        at_least_zero(float(both_RR[rank:, rank:].sum())),
    )


def norm(layer: LoraLayer) -> float:
    """‖ΔW‖, Frobenius."""
    return math.sqrt((products(layer, None) or Products(0.0, 0.0, 0.0)).aa)


@dataclass(frozen=True)
class ModuleDifference:
    """One module of two LoRAs; what one of them does not have counts as ΔW = 0."""

    path: str
    """Of diffusers."""
    products: Products | None
    """None where the two have different shapes."""

    def as_json(self) -> dict[str, Any]:
        """For programs; null where a number is undefined."""
        if self.products is None:
            return {"path": self.path, "error": None, "cosine": None, "scale": None, "norm_a": None, "norm_b": None}
        return {
            "path": self.path,
            "error": finite(self.products.error),
            "cosine": finite(self.products.cosine),
            "scale": finite(self.products.scale),
            "norm_a": finite(math.sqrt(self.products.aa)),
            "norm_b": finite(math.sqrt(self.products.bb)),
        }


def finite(value: float | None) -> float | None:
    """`value`, or None where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def module_differences(a: AdapterState, b: AdapterState) -> tuple[ModuleDifference, ...]:
    """All modules of either, sorted by path."""
    paths = sorted(a.layers.keys() | b.layers.keys())
    return tuple(ModuleDifference(path, products(a.layers.get(path), b.layers.get(path))) for path in paths)


@dataclass(frozen=True)
class HeaderDifference:
    """A header entry that the two do not share; None where one has no such entry."""

    key: str
    a: str | None
    b: str | None


Kind = Literal["same", "rounding", "scaled", "different"]


@dataclass(frozen=True)
class Difference:
    """Two LoRA files side by side."""

    a: str
    b: str
    kind: Kind
    verdict: str
    """In words."""
    total: Products
    """Summed over all modules that both can be compared in."""
    modules: tuple[ModuleDifference, ...]
    only_a: tuple[str, ...]
    """Modules that b has not, or where it changes nothing."""
    only_b: tuple[str, ...]
    header: tuple[HeaderDifference, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "a": self.a,
            "b": self.b,
            "kind": self.kind,
            "verdict": self.verdict,
            "error": finite(self.total.error),
            "cosine": finite(self.total.cosine),
            "scale": finite(self.total.scale),
            "norm_a": finite(math.sqrt(self.total.aa)),
            "norm_b": finite(math.sqrt(self.total.bb)),
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "modules": [one.as_json() for one in self.modules],
            "header": {one.key: {"a": one.a, "b": one.b} for one in self.header},
        }

    def for_people(self) -> str:
        """The verdict, the modules that differ most, and the header entries that differ."""
        lines = [f"a = {self.a}", f"b = {self.b}", self.verdict]
        if self.kind == "different":
            lines += _worst_modules(self.modules)
        for name, other, paths in (("a", "b", self.only_a), ("b", "a", self.only_b)):
            if paths:
                lines.append(f"{len(paths)} modules change something in {name} alone, not in {other}: {some_of(paths)}")
        if self.header:
            lines.append(f"header: {len(self.header)} entries differ")
            lines += [f"  {one.key}: {_short(one.a)} → {_short(one.b)}" for one in self.header[:_SHOWN]]
            if len(self.header) > _SHOWN:
                lines.append(f"  and {len(self.header) - _SHOWN} more")
        return "\n".join(map(plain, lines))


def _worst_modules(modules: Iterable[ModuleDifference]) -> list[str]:
    both = [one for one in modules if one.products is not None and one.products.aa and one.products.bb]
    worst = sorted(both, key=lambda one: -one.products.error if one.products else 0.0)[:_SHOWN]
    rows = [
        f"  {one.products.error:9.2e}  {one.products.cosine:7.4f}  {one.products.scale:7.4f}  {one.path}"
        for one in worst
        if one.products is not None
    ]
    return ["    error   cosine    scale  module, worst first", *rows] if rows else []


def _short(value: str | None) -> str:
    return "–" if value is None else (value if len(value) <= 60 else f"{value[:57]}…")


def diff_files(a: Path, b: Path) -> Difference:
    """What two LoRA files of any flavours do differently. Raises AdapterError if one cannot be read."""
    first, second = read_adapter(a), read_adapter(b)
    names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
    return diff_states(first, second, names)


def diff_states(a: AdapterState, b: AdapterState, names: tuple[str, str] = ("a", "b")) -> Difference:
    """As `diff_files`, for LoRAs in memory."""
    modules = module_differences(a, b)
    fitting = [one.products for one in modules if one.products is not None]
    total = Products(*(math.fsum(values) for values in zip(*fitting, strict=True))) if fitting else Products(0, 0, 0)
    kind, verdict = _verdict(modules, total)
    return Difference(
        *names, kind, verdict, total, modules,
        only_a=tuple(one.path for one in modules if one.products and one.products.aa and not one.products.bb),
        only_b=tuple(one.path for one in modules if one.products and one.products.bb and not one.products.aa),
        header=header_differences(a.metadata, b.metadata),
    )  # fmt: skip


def header_differences(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[HeaderDifference, ...]:
    """Entries that differ, sorted by key. Hashes are left out: they say no more than the weights do."""
    keys = sorted((a.keys() | b.keys()) - set(HASHES))
    return tuple(HeaderDifference(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key))


def rounding_name(error: float) -> str | None:
    """The finest type whose rounding of both factors explains this relative error in ΔW; None: not even bf16's does."""
    explained = {TOLERANCE[dtype]: name for name, dtype in EXPORT_DTYPES.items() if error <= TOLERANCE[dtype]}
    return explained[min(explained)] if explained else None


def _verdict(modules: tuple[ModuleDifference, ...], total: Products) -> tuple[Kind, str]:
    misfits = [one.path for one in modules if one.products is None]
    if misfits:
        return "different", f"different: the shapes differ, so they belong to different models: {some_of(misfits)}"
    if not (total.aa and total.bb):
        silent = [name for name, size in (("a", total.aa), ("b", total.bb)) if not size]
        both = len(silent) == 2
        return ("same", "the same: neither changes anything") if both else (
            "different", f"different: {silent[0]} changes nothing",
        )  # fmt: skip
    acting = [one.products for one in modules if one.products and (one.products.aa or one.products.bb)]
    worst = max(one.error for one in acting)
    if worst <= EXACT:
        return "same", "the same LoRA"
    scale = total.scale or 0.0
    at_scale = max(one.error_at(scale) for one in acting) if scale else math.inf
    rounding = rounding_name(at_scale)
    # One scale for all modules that explains nearly all of the error: rounding cannot do that.
    if rounding and at_scale <= worst / 5:
        exact = at_scale <= EXACT
        return "scaled", f"b is {scale:.4g} × a" if exact else f"b is {scale:.3g} × a, up to rounding in {rounding}"
    rounding = rounding_name(worst)
    if rounding:
        return "rounding", f"the same up to rounding in {rounding} (relative error at most {worst:.1e})"
    changed = sum(one.error > TOLERANCE[torch.bfloat16] for one in acting)
    sizes = f"cosine {total.cosine:.4f}, relative error {total.error:.3g}, fitted scale {scale:.4g}"
    return "different", f"different: {changed} of {len(acting)} modules differ; {sizes}"
