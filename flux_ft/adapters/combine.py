"""Several LoRAs in one file: Σ strength · ΔW, exact with their ranks added up, or reduced to a rank by SVD.

    up₁ · s₁ │ up₂ · s₂ │ …   side by side, (O, ΣR)       s = strength · alpha / rank
    down₁ ╱ down₂ ╱ …         one below another, (ΣR, I)   ΔW is never formed

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_ft import __version__
from flux_ft.adapters.compare import EXACT, ModuleDifference, Products, finite, module_differences, norm
from flux_ft.adapters.extract import resize
from flux_ft.adapters.formats import BLOCK_FORMATS, EXPORT_DTYPES, read_adapter, verify_written, write_adapter
from flux_ft.adapters.fused import FusedModule, fuse, scaled_up, split
from flux_ft.adapters.inspect import trigger_words
from flux_ft.adapters.metadata import ARCHITECTURES, EXPORT_KEY, EXPORT_VERSION, SCALE_RULE, Clock, utc_now
from flux_ft.adapters.recognise import known_size, width_of
from flux_ft.adapters.write_files import require_new
from flux_ft.errors import AdapterError, ConfigError
from flux_ft.families.layout import LAYOUTS
from flux_ft.files import require_writable
from flux_ft.types import AdapterState, AppliedAdapter, LoraLayer

LARGEST_RANK = 4096
CANCELLED = 0.3
"""A sum smaller than this share of its parts loses digits when their factors are rounded as they are."""
_SPLIT_FORMATS = ("diffusers",)
"""Those whose modules are diffusers'; all others have the original's, fused ones."""


@dataclass(frozen=True)
class Combined:
    """What a combination left behind."""

    output: Path
    parts: tuple[tuple[str, float], ...]
    """Name and strength of each LoRA."""
    format: str
    dtype: str
    modules: int
    """In diffusers' count."""
    rank: int
    """The largest of a module."""
    sum_rank: int
    """What it is without a reduction."""
    error: float
    """‖ΔW − ΣΔW‖ / ‖ΣΔW‖ over all modules, by the reduction alone; 0 where there was none."""
    worst_error: float
    """The same of the worst module."""
    rounding_error: float
    """Largest relative error of a written ΔW against the one in memory."""
    size_bytes: int

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "output": str(self.output),
            "parts": [{"name": name, "strength": strength} for name, strength in self.parts],
            "format": self.format,
            "dtype": self.dtype,
            "modules": self.modules,
            "rank": self.rank,
            "sum_rank": self.sum_rank,
            "error": finite(self.error),
            "worst_error": finite(self.worst_error),
            "rounding_error": finite(self.rounding_error),
            "size_bytes": self.size_bytes,
        }

    def for_people(self) -> str:
        """For people."""
        sources = " + ".join(f"{strength:g} × {name}" for name, strength in self.parts)
        reduced = (
            f"rank {self.rank}, exact but for rounding to {self.dtype} ({self.rounding_error:.1e})"
            if not self.error
            else f"reduced from rank {self.sum_rank} to {self.rank}: relative error {self.error:.2g} in all, "
            f"{self.worst_error:.2g} in the worst module"
        )
        return (
            f"wrote {self.output} ({self.size_bytes / 1e6:.1f} MB, {self.format}): {sources}\n"
            f"{self.modules} modules, {reduced}"
        )


def combine_files(
    loras: Sequence[AppliedAdapter],
    output: Path,
    rank: int | None = None,
    *,
    format: str = "kohya",
    dtype: str = "bf16",
    title: str | None = None,
    now: Clock = utc_now,
) -> Combined:
    """Write one LoRA that acts as all of `loras` together, each at its strength, and read it back.

    `rank`: the largest rank of a module of that format, by SVD; None adds the ranks up, which is exact. `title`: the
    output's name if None. Raises AdapterError when one cannot be read or they are for different models, ConfigError for
    settings that cannot be, StorageError.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"`{output}` does not end in .safetensors", hint="LoRA files are written as .safetensors")
    if format not in BLOCK_FORMATS or dtype not in EXPORT_DTYPES:
        known = f"formats: {', '.join(BLOCK_FORMATS)}; dtypes: {', '.join(EXPORT_DTYPES)}"
        raise ConfigError(f"cannot write format `{format}` as `{dtype}`", hint=known)
    if rank is not None and not 1 <= rank <= LARGEST_RANK:
        raise ConfigError(f"rank {rank} is not between 1 and {LARGEST_RANK}", hint="16 or 32 is usual")
    require_new(output)
    require_writable(output.parent, "output")
    states = [(one.path.stem, read_adapter(one.path), one.strength) for one in loras]
    found = combined(states, rank, fused=format not in _SPLIT_FORMATS)
    metadata = merged_metadata(states, found.state, format, title or output.stem, found.rank, now())
    write_adapter(output, found.state, format, EXPORT_DTYPES[dtype], metadata)
    rounding = verify_written(output, found.state, EXPORT_DTYPES[dtype])
    return Combined(
        output, tuple((name, strength) for name, _, strength in states), format, dtype, len(found.state.layers),
        found.rank, found.sum_rank, found.error, found.worst_error, rounding, output.stat().st_size,
    )  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """Σ strength · ΔW in memory; its ranks are those of the matrices that were asked for, fused or split."""

    state: AdapterState
    rank: int
    sum_rank: int
    error: float
    worst_error: float


def combined(states: Sequence[tuple[str, AdapterState, float]], rank: int | None = None, *, fused: bool = True) -> Sum:
    """The sum of (name, LoRA, strength), in float32, without header entries; matrix by matrix.

    `fused` matrices are the original's, where q, k and v are one: where a LoRA has one `down` for them, all of the sum
    share one too, so that ranks stay small. Otherwise each diffusers linear has its own. AdapterError when there is
    nothing to combine, when they do not fit, or cancel each other out.
    """
    _require_combinable(states)
    acting = [(state, strength) for _, state, strength in states if strength]
    layers: dict[str, LoraLayer] = {}
    losses: list[ModuleDifference] = []
    ranks, sum_ranks = [0], [0]
    for whole in _matrices(acting, fused):
        kept, left = _without_cancelled(whole, acting)
        if not kept.layers:
            continue
        sum_rank = _largest_rank(kept, fused)
        most = min(rank or sum_rank, sum_rank)
        # Factors much larger than their product would drown it when they are rounded.
        final = _reduced(kept, most, fused) if most < sum_rank or left < CANCELLED else kept
        losses += [] if most == sum_rank else module_differences(kept, final)
        layers |= final.layers
        ranks.append(_largest_rank(final, fused))
        sum_ranks.append(sum_rank)
    if not layers:
        raise AdapterError("the LoRAs cancel each other out: nothing is left", hint="check the strengths")
    state = AdapterState(dict(sorted(layers.items())), layout=acting[0][0].layout)
    # A matrix of full rank already is part of what the error is relative to.
    reduced = {one.path for one in losses}
    sizes = [norm(layer) ** 2 for path, layer in state.layers.items() if losses and path not in reduced]
    error, worst = _loss([one.products for one in losses if one.products is not None], math.fsum(sizes))
    return Sum(state, max(ranks), max(sum_ranks), error, worst)


def _matrices(acting: Sequence[tuple[AdapterState, float]], fused: bool) -> Iterator[AdapterState]:
    """The exact sum, one original matrix (or one diffusers linear) at a time."""
    layout = LAYOUTS[acting[0][0].layout]
    if not fused:
        for path in dict.fromkeys(path for state, _ in acting for path in state.layers):
            yield AdapterState({path: _summed(path, acting)}, layout=layout.name)
        return
    views = [(fuse(state), strength) for state, strength in acting]
    for name in dict.fromkeys(name for view, _ in views for name in view):
        parts = [(view[name], strength) for view, strength in views if name in view]
        if any(part.shared and len(part.parts) > 1 for part, _ in parts):
            pairs = [(part.down().float(), part.up() * strength) for part, strength in parts]
            layers = split(name, _side_by_side(pairs), layout)
        else:
            positions = sorted({position for part, _ in parts for position in part.parts})
            paths = [layout.parts(name)[position] for position in positions]
            layers = {path: _summed(path, acting) for path in paths}
        yield AdapterState(layers, layout=layout.name)


def _summed(path: str, acting: Sequence[tuple[AdapterState, float]]) -> LoraLayer:
    found = [(state.layers[path], strength) for state, strength in acting if path in state.layers]
    return _side_by_side([(one.down_RI.detach().float(), scaled_up(one) * strength) for one, strength in found])


def _side_by_side(pairs: Sequence[tuple[Tensor, Tensor]]) -> LoraLayer:
    """(down_RI, up_OR) of scale 1, summed."""
    down_RI, up_OR = torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], 1)
    return LoraLayer(down_RI, up_OR, float(len(down_RI)))


def _without_cancelled(whole: AdapterState, acting: Sequence[tuple[AdapterState, float]]) -> tuple[AdapterState, float]:
    """`whole` less what cancels out, and how large the rest is at least: ‖Σ‖ in shares of √Σ‖·‖²."""
    left = {}
    for path, layer in whole.layers.items():
        size = math.hypot(*(s * norm(one.layers[path]) for one, s in acting if path in one.layers))
        left[path] = norm(layer) / size if size else 1.0
    kept = {path: layer for path, layer in whole.layers.items() if left[path] > EXACT}
    return replace(whole, layers=kept), min((left[path] for path in kept), default=1.0)


def _reduced(state: AdapterState, rank: int, fused: bool) -> AdapterState:
    """By SVD, in balanced factors; untrained modules, which have no directions, keep some of theirs."""
    if any(layer.up_OR.any() and layer.down_RI.any() for layer in state.layers.values()):
        return resize(state, rank=rank, fused=fused)
    cut = {path: LoraLayer(one.down_RI[:1], one.up_OR[:, :1], 1.0) for path, one in state.layers.items()}
    return replace(state, layers=cut)


def _require_combinable(states: Sequence[tuple[str, AdapterState, float]]) -> None:
    for name, state, strength in states:
        if not math.isfinite(strength):
            raise AdapterError(f"{name}: strength {strength} is not a number", hint="1 is as trained")
        if state.extras:
            raise AdapterError(
                f"{name}: replaces norms or adds to biases (`{next(iter(state.extras))}`), which cannot be summed",
                hint="it is a control LoRA: load it beside the others",
            )
    if not any(strength and state.layers for _, state, strength in states):
        raise AdapterError("nothing to combine", hint="give at least one LoRA, at a strength other than 0")
    first_name, first, _ = states[0]
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, state, _ in states:
        if state.layout != first.layout:
            titles = [LAYOUTS[one.layout].title for one in (first, state)]
            raise AdapterError(
                f"{first_name} is for {titles[0]}, {name} for {titles[1]}", hint="combine LoRAs of one model"
            )
        for path, layer in state.layers.items():
            shape = (layer.up_OR.shape[0], layer.down_RI.shape[1])
            other, wanted = shapes.setdefault(path, (name, shape))
            if shape != wanted:
                raise AdapterError(
                    f"`{path}` is {shape[0]}×{shape[1]} in {name}, {wanted[0]}×{wanted[1]} in {other}",
                    hint="they were made for models of different sizes",
                )


def _largest_rank(state: AdapterState, fused: bool) -> int:
    modules: Iterable[LoraLayer | FusedModule] = fuse(state).values() if fused else state.layers.values()
    return max(one.rank for one in modules)


def _loss(found: Sequence[Products], others: float) -> tuple[float, float]:
    """(error over all modules, error of the worst), relative. `others`: ‖ΔW‖² of the modules that are exact."""
    total = math.fsum([others, *(one.aa for one in found)])
    # A part without any change gets a trace of one where it shares a fused matrix with others: no relative error there.
    worst = max((one.error for one in found if one.aa), default=0.0)
    return math.sqrt(math.fsum(one.gap for one in found) / total) if total else 0.0, worst


# --- The header. ---


def merged_metadata(
    states: Sequence[tuple[str, AdapterState, float]],
    result: AdapterState,
    format: str,
    title: str,
    rank: int,
    date: datetime.datetime,
) -> dict[str, str]:
    """What is true of the sum: its parts' titles, trigger words, base and licence; nothing of how they were trained."""
    headers = [state.metadata for _, state, _ in states]
    names = [
        _clean(header.get("modelspec.title") or name) for (name, _, _), header in zip(states, headers, strict=True)
    ]
    strengths = [strength for _, _, strength in states]
    architecture = _architecture(headers, result)
    words = list(dict.fromkeys(word for header in headers for word in trigger_words(header)))
    base_version, implementation = ARCHITECTURES[architecture]
    sum_of = " + ".join(f"{strength:g} × {name}" for strength, name in zip(strengths, names, strict=True))
    tags = ["lora", "flux_ft", *(tag for header in headers for tag in _listed(header.get("modelspec.tags", "")))]
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.resolution": _common(headers, "modelspec.resolution"),
        "modelspec.date": date.isoformat(timespec="seconds"),
        "modelspec.license": "; ".join(_all(headers, "modelspec.license")),
        "modelspec.author": ", ".join(_all(headers, "modelspec.author")),
        "modelspec.description": f"{len(states)} LoRAs in one: {sum_of}.",
        "modelspec.tags": ", ".join(dict.fromkeys(tags)),
        "modelspec.merged_from": ", ".join(names),
        "modelspec.trigger_phrase": ", ".join(words),
        "modelspec.usage_hint": f"Put {' or '.join(words)} into the prompt." if words else "",
        "ss_output_name": title,
        "ss_base_model_version": base_version,
        "ss_sd_model_name": _clean(_common(headers, "ss_sd_model_name")),
        "ss_v2": "False",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_network_args": "{}",
        # All in the first folder, which is where managers look for trigger words.
        "ss_tag_frequency": json.dumps({f"1_{words[0]}": dict.fromkeys(words, 1)} if words else {}, ensure_ascii=False),
        EXPORT_KEY: _export_json(result, format, rank, list(zip(names, strengths, strict=True))),
    }
    return {key: value for key, value in entries.items() if value}


def _export_json(result: AdapterState, format: str, rank: int, parts: Sequence[tuple[str, float]]) -> str:
    kinds = Counter(re.sub(r"\.[0-9]+\.", ".*.", path, count=1) for path in result.layers)
    export = {
        "format_version": EXPORT_VERSION,
        "flavour": format,
        "scale": SCALE_RULE,
        "rank": rank,
        "targets": dict(sorted(kinds.items())),
        "tool_version": __version__,
        "combined": [{"title": name, "strength": strength} for name, strength in parts],
    }
    return json.dumps(export, ensure_ascii=False)


def _architecture(headers: Sequence[Mapping[str, str]], result: AdapterState) -> str:
    """What all files say, else the model of that size."""
    said = {header.get("modelspec.architecture", "").lower() for header in headers}
    one = said.pop() if len(said) == 1 else ""
    if one in ARCHITECTURES:
        return one
    shapes = {path: (layer.up_OR.shape[0], layer.down_RI.shape[1]) for path, layer in result.layers.items()}
    size = known_size(result.layout, width_of(shapes))
    return size.architecture if size else LAYOUTS[result.layout].sizes[0].architecture


def _all(headers: Sequence[Mapping[str, str]], key: str) -> list[str]:
    return list(dict.fromkeys(header[key] for header in headers if header.get(key)))


def _common(headers: Sequence[Mapping[str, str]], key: str) -> str:
    """The value that all share; empty where they do not."""
    values = {header.get(key, "") for header in headers}
    return values.pop() if len(values) == 1 else ""


def _clean(name: str) -> str:
    """Without folders, which would tell where it lay, and without commas, which part lists."""
    return re.sub(r"[\s,]+", " ", re.split(r"[\\/]", name.rstrip("\\/"))[-1]).strip()


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",") if one.strip()]
