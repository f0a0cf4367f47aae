"""What a LoRA file is and what is odd about it, as far as it can be told without the model.

    header ─recognise→ model, layout, modules ─one module at a time→ ‖ΔW‖, NaN, zeros ─→ Inspection: facts, oddities

‖ΔW‖ comes from the Gram matrices of the factors, ΔW itself is never formed, and one module is in memory at a time. Any
file that is a whole safetensors file can be looked at, also one that cannot be read as a LoRA.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flux_ft.adapters.compare import at_least_zero, finite
from flux_ft.adapters.flavours import detect_format, read_tensors
from flux_ft.adapters.metadata import EXPORT_KEY
from flux_ft.adapters.recognise import (
    Contents,
    Family,
    RawModule,
    Role,
    header_strength,
    known_size,
    read_contents,
    width_of,
)
from flux_ft.adapters.safe_file import SafeFile
from flux_ft.adapters.tools import Verdict, layout_of, verdicts
from flux_ft.errors import AdapterError, StorageError, plain, some_of
from flux_ft.families.layout import LAYOUTS

FAR_ABOVE = 200
"""Times the median ‖ΔW‖: so strong a single module is rarely meant."""
MANY_SUBNORMALS = 0.05
"""Share of a factor's numbers that fp16 holds with fewer digits than its own, from which on it is told."""
_SAME = 1e-6
_BAR = 24
_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
_WHOLE_UP_TO = {"BF16": 256, "F16": 2048}
"""Up to here every whole number is exact in that type."""
_HASHED_AT_ONCE = 2**22
_KINDS: tuple[tuple[Role, str], ...] = (
    ("dora", "DoRA"), ("lokr", "LoKr"), ("loha", "LoHa"), ("oft", "OFT"), ("down", "LoRA"), ("up", "LoRA"),
    ("full", "full difference"), ("bias", "bias"), ("norm", "norm"), ("alpha", "LoRA"), ("other", "other"),
)  # fmt: skip

AlphaRule = Literal["none", "rank", "constant", "mixed"]
"""No alpha, so a scale of 1; alpha equals the rank; one other scale everywhere; scales that differ."""


@dataclass(frozen=True)
class ModuleLook:
    """One module, under the file's own name."""

    name: str
    kind: str
    """The name with * for the block's number."""
    block: tuple[Literal["double", "single"], int] | None
    what: str
    """LoRA, DoRA, LoKr, LoHa, OFT, full difference, bias, norm."""
    text_encoder: bool
    shape: tuple[int, int] | None
    rank: int | None
    alpha: float | None
    norm: float | None
    """‖ΔW‖ at strength 1, of the LoRA pair alone; None where there is none, or it holds NaN or infinity."""
    nonfinite: bool
    subnormal: float
    """Largest share of a factor's numbers that are fp16 subnormals."""

    @property
    def scale(self) -> float | None:
        """alpha / rank; 1 without alpha."""
        return None if self.rank is None else (1.0 if self.alpha is None else self.alpha / self.rank)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "name": self.name,
            "what": self.what,
            "shape": None if self.shape is None else list(self.shape),
            "rank": self.rank,
            "alpha": finite(self.alpha),
            "norm": finite(self.norm),
        }


@dataclass(frozen=True)
class Target:
    """A kind of linear, and the blocks where it is adapted."""

    kind: str
    blocks: tuple[int, ...]
    missing: tuple[int, ...]
    """Blocks of the model where it is not; of the blocks that the file touches, if the model's size is not known."""


@dataclass(frozen=True)
class Hashes:
    """Recomputed from the file, and whether the header agrees; None where it does not say."""

    data_sha256: str
    """Of the bytes after the header: what model managers call AutoV3 is its first 12 digits."""
    file_sha256: str
    """Of the whole file: AutoV2 is its first 10 digits."""
    sshs_model_hash: bool | None
    modelspec: bool | None


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    path: Path
    size_bytes: int
    family: Family
    flavour: str
    """As our readers name it; the table of tools' name for it where they do not read it."""
    architecture: str | None
    """As the header says, or by the model's size."""
    reader_error: str | None
    """Why it cannot be read as a LoRA."""
    notes: tuple[str, ...]
    """What our reader says of it."""
    dtypes: Mapping[str, int]
    """Of the factors: safetensors' name, number of tensors."""
    modules: tuple[ModuleLook, ...]
    targets: tuple[Target, ...]
    absent: tuple[str, ...]
    """Kinds of block linears that are adapted nowhere."""
    alpha_rule: AlphaRule
    alpha_text: str
    trigger_words: tuple[str, ...]
    base_model: str | None
    licence: str | None
    title: str | None
    hashes: Hashes
    tools: tuple[Verdict, ...]
    suspicious: tuple[str, ...]
    """In sentences, the worst first."""

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Rank to number of modules."""
        return dict(sorted(Counter(one.rank for one in self.modules if one.rank is not None).items()))

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖ of all modules together, less text encoders."""
        return math.hypot(*(one.norm for one in self.modules if one.norm is not None and not one.text_encoder))

    @cached_property
    def block_norms(self) -> dict[tuple[Literal["double", "single"], int], float]:
        """‖ΔW‖ of all that is adapted in a block."""
        found: dict[tuple[Literal["double", "single"], int], float] = {}
        for one in self.modules:
            if one.block is not None and one.norm is not None:
                found[one.block] = math.hypot(found.get(one.block, 0.0), one.norm)
        return dict(sorted(found.items()))

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "family": self.family,
            "flavour": self.flavour,
            "architecture": self.architecture,
            "readable": self.reader_error is None,
            "reader_error": self.reader_error,
            "notes": list(self.notes),
            "dtypes": dict(self.dtypes),
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "alpha_rule": self.alpha_rule,
            "alpha": self.alpha_text,
            "targets": [
                {"kind": one.kind, "blocks": list(one.blocks), "missing": list(one.missing)} for one in self.targets
            ],
            "absent": list(self.absent),
            "norm": finite(self.norm),
            "block_norms": {f"{stream}.{index}": finite(norm) for (stream, index), norm in self.block_norms.items()},
            "title": self.title,
            "trigger_words": list(self.trigger_words),
            "base_model": self.base_model,
            "licence": self.licence,
            "data_sha256": self.hashes.data_sha256,
            "file_sha256": self.hashes.file_sha256,
            "sshs_model_hash_right": self.hashes.sshs_model_hash,
            "modelspec_hash_right": self.hashes.modelspec,
            "tools": [one.as_json() for one in self.tools],
            "suspicious": list(self.suspicious),
            "modules": [one.as_json() for one in self.modules],
        }

    def for_people(self) -> str:
        """A page of text."""
        title = LAYOUTS[self.family].title if self.family in LAYOUTS else "unknown model"
        dtypes = ", ".join(f"{name.lower()}" for name in self.dtypes) or "no factors"
        lines = [f"{self.path.name}: {title} LoRA, {self.flavour}, {dtypes}, {self.size_bytes / 1e6:.1f} MB"]
        if self.reader_error:
            lines.append(f"cannot be read as a LoRA: {self.reader_error}")
        rows = (
            ("title", self.title),
            ("model", self.architecture),
            ("base", self.base_model),
            ("licence", self.licence),
            ("trigger", ", ".join(self.trigger_words) or None),
            ("rank", ", ".join(f"{rank} ({count} modules)" for rank, count in self.ranks.items()) or None),
            ("strength", self.alpha_text),
            ("hashes", self._hashes()),
            ("AutoV3", self.hashes.data_sha256[:12]),
        )
        lines += [f"{name:<9} {value}" for name, value in rows if value]
        lines += [*self._targets(), *self._chart()]
        lines += [f"note: {note}" for note in self.notes]
        short = [one for one in self.tools if one.answer in ("partial", "wrong", "nothing")]
        if short:
            lines.append("not honoured in full by:")
            lines += [f"  {one.tool.name:<21} {one.why or one.answer} ({one.evidence})" for one in short]
        lines += ["suspicious:", *(f"  - {sentence}" for sentence in self.suspicious)] if self.suspicious else []
        return "\n".join(map(plain, lines))

    def _hashes(self) -> str:
        words = {None: "not given", True: "right", False: "WRONG"}
        return f"sshs_model_hash {words[self.hashes.sshs_model_hash]}, modelspec {words[self.hashes.modelspec]}"

    def _targets(self) -> list[str]:
        adapted = [one for one in self.modules if one.what != "norm"]
        lines = [f"targets   {len(adapted)} modules"] if adapted else []
        width = max((len(one.kind) for one in self.targets), default=0)
        for one in self.targets:
            gaps = f"; not in {_ranges(one.missing)}" if one.missing else ""
            where = f"blocks {_ranges(one.blocks)}{gaps}" if one.blocks else ""
            lines.append(f"  {one.kind:<{width}}  {where}".rstrip())
        return lines + ([f"  adapted nowhere: {', '.join(self.absent)}"] if self.absent else [])

    def _chart(self) -> list[str]:
        norms = self.block_norms
        largest = max(norms.values(), default=0.0)
        if not largest:
            return []
        lines = [f"‖ΔW‖ {self.norm:.4g} in all; of each block:"]
        for (stream, index), value in norms.items():
            bar = "█" * round(_BAR * value / largest) if math.isfinite(value) else ""
            lines.append(f"  {stream} {index:>2}  {bar:<{_BAR}}  {value:.3g}")
        return lines


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 → 0–2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def inspect_file(path: Path) -> Inspection:
    """All that can be told of a LoRA file. Raises AdapterError when it is no safetensors file; nothing else is raised
    for what is wrong with it, but told in the result."""
    contents = read_contents(path)
    notes, reader_error, flavour = _readable(contents)
    family = contents.family
    modules = tuple(_looks(contents))
    hashes = _hashes(contents.file)
    rule, text = _alpha_rule(modules)
    size = known_size(family, width_of(contents.shapes))
    architecture = contents.metadata.get("modelspec.architecture") or (size.architecture if size else None)
    targets = _targets_of(contents, family)
    tools = verdicts(contents, family)
    return Inspection(
        path, path.stat().st_size, family, flavour or layout_of(contents), architecture, reader_error, notes,
        _dtypes(contents), modules, targets, _absent(targets, family), rule, text,
        trigger_words=trigger_words(contents.metadata),
        base_model=_base_model(contents.metadata),
        licence=contents.metadata.get("modelspec.license"),
        title=contents.metadata.get("modelspec.title") or contents.metadata.get("ss_output_name"),
        hashes=hashes,
        tools=tools,
        suspicious=tuple(_suspicions(contents, modules, rule, text, hashes)),
    )  # fmt: skip


def _readable(contents: Contents) -> tuple[tuple[str, ...], str | None, str | None]:
    """What our reader notes, why it refuses, and its name for the flavour."""
    file, flavour = contents.file, None
    try:
        flavour = detect_format(file.entries)
        return read_tensors(file.read_all(), file.metadata).notes, None, flavour
    except AdapterError as error:
        return (), error.message, flavour


# --- Module by module. ---


def _looks(contents: Contents) -> Iterator[ModuleLook]:
    for module in contents.modules:
        tensors = {role: contents.file.read(entry.key) for role, entry in module.parts.items()}
        yield _look(module, tensors)


def _look(module: RawModule, tensors: Mapping[Role, Tensor]) -> ModuleLook:
    values = {role: _as_numbers(tensor) for role, tensor in tensors.items()}
    nonfinite = not all(bool(torch.isfinite(one).all()) for one in values.values())
    alpha = float(values["alpha"].flatten()[0]) if "alpha" in values and values["alpha"].numel() == 1 else None
    size = None
    if module.rank is not None and not nonfinite:
        scale = 1.0 if alpha is None else alpha / module.rank
        size = abs(scale) * _pair_norm(values["up"], values["down"])
    halves = [tensors[role] for role in ("up", "down") if role in tensors and tensors[role].dtype is torch.float16]
    return ModuleLook(
        module.name,
        module.kind,
        module.block,
        what=next(what for role, what in _KINDS if role in module.parts),
        text_encoder=module.is_text_encoder,
        shape=module.shape,
        rank=module.rank,
        alpha=alpha,
        norm=size,
        nonfinite=nonfinite,
        subnormal=max((_subnormal_share(one) for one in halves), default=0.0),
    )


def _as_numbers(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float16, torch.bfloat16, torch.float64) else tensor.float()


def _pair_norm(up_OR: Tensor, down_RI: Tensor) -> float:
    """‖up @ down‖ by ⟨UᵀU, VVᵀ⟩ in float64."""
    up, down = up_OR.double(), down_RI.double()
    return math.sqrt(at_least_zero(float(((up.T @ up) * (down @ down.T)).sum())))


def _subnormal_share(values: Tensor) -> float:
    sizes = values.abs()
    return float(((sizes > 0) & (sizes < _SMALLEST_NORMAL)).sum()) / max(1, values.numel())


def _dtypes(contents: Contents) -> dict[str, int]:
    counts = Counter(
        entry.dtype for module in contents.modules for role, entry in module.parts.items() if role != "alpha"
    )
    return dict(counts.most_common())


def _targets_of(contents: Contents, family: Family) -> tuple[Target, ...]:
    blocks: dict[str, set[int]] = {}
    streams: dict[str, str] = {}
    for one in contents.image_modules:
        if "norm" in one.parts:
            continue
        found = blocks.setdefault(one.kind, set())
        if one.block is not None:
            streams[one.kind] = one.block[0]
            found.add(one.block[1])
    size = known_size(family, width_of(contents.shapes))
    touched = {
        stream: max((max(blocks[kind]) for kind, name in streams.items() if name == stream), default=-1) + 1
        for stream in ("double", "single")
    }
    counts = {"double": size.double, "single": size.single} if size else touched
    return tuple(
        Target(
            kind,
            tuple(sorted(found)),
            tuple(sorted(set(range(counts[streams[kind]])) - found)) if kind in streams else (),
        )
        for kind, found in sorted(blocks.items())
    )


def _absent(targets: Sequence[Target], family: Family) -> tuple[str, ...]:
    """In the spelling of the file: the original's, or diffusers'."""
    if family not in LAYOUTS or not targets:
        return ()
    kinds = {one.kind for one in targets}
    absent = []
    for stream in LAYOUTS[family].streams:
        original = [f"{stream.original}.*.{leaf}" for leaf in stream.linears]
        diffusers = [f"{stream.diffusers}.*.{part}" for parts in stream.linears.values() for part in parts]
        spelt = original if any(kind.startswith(("double_blocks", "single_blocks")) for kind in kinds) else diffusers
        absent += [kind for kind in spelt if kind not in kinds]
    return tuple(absent)


def _alpha_rule(modules: Sequence[ModuleLook]) -> tuple[AlphaRule, str]:
    pairs = [one for one in modules if one.rank is not None]
    given = [one for one in pairs if one.alpha is not None and math.isfinite(one.alpha)]
    scales = sorted({round(one.scale, 6) for one in pairs if one.scale is not None and math.isfinite(one.scale)})
    if not given:
        return "none", "no alpha, so a scale of 1"
    if len(scales) == 1 and len(given) == len(pairs):
        if abs(scales[0] - 1) <= _SAME:
            return "rank", "alpha equals the rank"
        return "constant", f"alpha / rank is {scales[0]:g} everywhere"
    alphas = {one.alpha for one in given}
    some = "" if len(given) == len(pairs) else f"alpha in {len(given)} of {len(pairs)} modules; "
    one_alpha = f"alpha is {given[0].alpha:g} at every rank; " if len(alphas) == 1 and len(scales) > 1 else ""
    spread = f"{scales[0]:g} to {scales[-1]:g}" if len(scales) > 1 else f"{scales[0]:g}"
    return ("mixed" if len(scales) > 1 else "constant"), f"{some}{one_alpha}alpha / rank is {spread}"


# --- The header. ---


def _hashes(file: SafeFile) -> Hashes:
    whole, data = hashlib.sha256(), hashlib.sha256()
    try:
        with file.path.open("rb") as opened:
            whole.update(opened.read(file.data_start))
            while chunk := opened.read(_HASHED_AT_ONCE):
                whole.update(chunk)
                data.update(chunk)
    except OSError as error:
        raise StorageError(f"`{file.path}` cannot be read: {error}", hint="try again") from error
    digest = data.hexdigest()

    def agrees(key: str) -> bool | None:
        return file.metadata[key].lower().removeprefix("0x") == digest if key in file.metadata else None

    return Hashes(digest, whole.hexdigest(), agrees("sshs_model_hash"), agrees("modelspec.hash_sha256"))


def _json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """From where managers look: ModelSpec, the first folder of kohya's tags, and our own entry; a few at most."""
    words = [metadata.get("modelspec.trigger_phrase", ""), metadata.get("trained_words", "")]
    folders = _json_object(metadata, "ss_tag_frequency")
    first: Any = next(iter(folders.values()), {})
    if isinstance(first, dict):
        counts = {str(word): count for word, count in first.items() if isinstance(count, int)}
        words += sorted(counts, key=lambda word: -counts[word])[:3]
    config = _json_object(metadata, EXPORT_KEY).get("config")
    if isinstance(config, dict):
        words.append(str(config.get("trigger_word") or ""))
    return tuple(dict.fromkeys(word.strip() for word in words if word.strip()))


def _base_model(metadata: Mapping[str, str]) -> str | None:
    said = [metadata.get(key) for key in ("ss_sd_model_name", "ss_base_model_version")]
    return ", ".join(dict.fromkeys(word for word in said if word)) or None


# --- What is odd. ---


def _suspicions(
    contents: Contents, modules: Sequence[ModuleLook], rule: AlphaRule, alpha_text: str, hashes: Hashes
) -> Iterator[str]:
    yield from _broken(contents, modules)
    yield from _no_effect(modules)
    yield from _strength(contents, modules, rule, alpha_text)
    yield from _precision(contents, modules)
    yield from _left_out(contents)
    if hashes.sshs_model_hash is False or hashes.modelspec is False:
        yield "The hash in the header is not that of the weights: they were changed afterwards, or it was copied along."
    yield from _private(contents.metadata)


def _broken(contents: Contents, modules: Sequence[ModuleLook]) -> Iterator[str]:
    broken = [one.name for one in modules if one.nonfinite]
    if broken:
        yield f"{len(broken)} of {len(modules)} modules hold NaN or infinity: {some_of(broken, 3)}."
    for what, shown in Counter(one.what for one in modules if one.what in ("DoRA", "LoKr", "LoHa", "OFT")).items():
        yield f"{shown} modules are {what}, not plain LoRA; the norms shown leave that out."
    lonely = [one.name for one in contents.modules if ("down" in one.parts) != ("up" in one.parts)]
    if lonely:
        yield f"{len(lonely)} modules have one factor without the other: {some_of(lonely, 3)}."
    misfits = [
        one.name for one in contents.modules if {"down", "up"} <= one.parts.keys() and one.rank is None
    ]  # fmt: skip
    if misfits:
        yield f"{len(misfits)} modules have factors that do not fit together: {some_of(misfits, 3)}."
    twice = [entry.key for one in contents.modules for entry in one.others]
    if twice:
        yield f"{len(twice)} tensors are there a second time under another spelling: {some_of(twice, 3)}."
    if contents.unsorted:
        yield f"{len(contents.unsorted)} tensors are of no LoRA: {some_of([one.key for one in contents.unsorted], 3)}."
    if not any(one.rank is not None for one in modules):
        yield "There is no pair of LoRA factors in the file."


def _no_effect(modules: Sequence[ModuleLook]) -> Iterator[str]:
    measured = [one for one in modules if one.norm is not None]
    silent = [one.name for one in measured if one.norm == 0]
    if silent and len(silent) == len(measured):
        yield "ΔW is zero in all modules: the LoRA changes nothing. It may be from the first step of a run."
    elif silent:
        yield f"ΔW is zero in {len(silent)} of {len(measured)} modules: {some_of(silent, 3)}."
    sizes = [one.norm for one in measured if one.norm]
    median = statistics.median(sizes) if sizes else 0.0
    for one in measured:
        if one.norm and one.norm > FAR_ABOVE * median:
            yield f"`{one.name}` has {one.norm / median:,.0f} times the median ‖ΔW‖."


def _strength(
    contents: Contents, modules: Sequence[ModuleLook], rule: AlphaRule, alpha_text: str
) -> Iterator[str]:  # fmt: skip
    if rule == "mixed":
        yield f"The scales of the modules differ: {alpha_text}."
    negative = [one.name for one in modules if one.alpha is not None and one.alpha < 0]
    if negative:
        yield (
            f"alpha is negative in {len(negative)} modules ({some_of(negative, 2)}): they act the other way round, and "
            "diffusers never finishes loading such a kohya file."
        )
    strength, layout = header_strength(contents.metadata), layout_of(contents)
    if strength is not None and layout in ("kohya", "comfy down/up"):
        effect = "" if strength.is_one else ", which diffusers applies on top of the tensors' own: scaled twice"
        yield f"A {layout} file with `lora_adapter_metadata` in its header ({strength.text}){effect}."
    elif strength is not None and contents.holding("alpha"):
        yield (
            f"Alpha is in the tensors and in the header's `lora_adapter_metadata` ({strength.text}); "
            "diffusers refuses such a file."
        )
    elif strength is not None and not strength.is_one:
        yield (
            f"The strength is in the header's `lora_adapter_metadata` alone ({strength.text}); "
            "only diffusers looks there, all other tools use a scale of 1."
        )
    whole = [one for one in contents.holding("alpha") if one.parts["alpha"].dtype.startswith(("I", "U"))]
    if whole and layout.startswith("diffusers"):
        yield f"alpha is stored as a whole number ({whole[0].parts['alpha'].dtype}), which diffusers refuses."


def _precision(contents: Contents, modules: Sequence[ModuleLook]) -> Iterator[str]:
    stored = {one.name: one.parts["alpha"].dtype for one in contents.holding("alpha")}
    coarse = [
        one for one in modules if one.alpha and abs(one.alpha) > _WHOLE_UP_TO.get(stored.get(one.name, ""), math.inf)
    ]
    if coarse:
        dtype = stored[coarse[0].name]
        yield (
            f"alpha is stored as {dtype.lower()}, which holds whole numbers exactly up to {_WHOLE_UP_TO[dtype]} only; "
            f"{len(coarse)} modules have a larger one, so their strength can be off."
        )
    flat = [one.name for one in modules if one.subnormal > MANY_SUBNORMALS]
    if flat:
        share = max(one.subnormal for one in modules)
        yield (
            f"{len(flat)} modules have factors with fp16 subnormals, up to {100 * share:.0f} % of the numbers: "
            "they have lost digits."
        )


def _left_out(contents: Contents) -> Iterator[str]:
    outside = [one.bare for one in contents.image_modules if one.block is None and "down" in one.parts]
    if outside:
        yield f"{len(outside)} modules are outside the blocks, which some tools drop or refuse: {some_of(outside, 4)}."
    encoders = [one.name for one in contents.modules if one.is_text_encoder]
    if encoders:
        yield f"{len(encoders)} modules are of text encoders, which some tools drop or refuse."
    whole = contents.holding("full", "bias", "norm")
    if whole:
        yield f"{len(whole)} modules have biases, norms or full differences, which most tools drop."


_ABSOLUTE = re.compile(
    r"(?<![\w.:/~>-])(?:/(?:[\w.@~+-]+/)+[\w.@~+ -]*|[A-Za-z]:[\\/]+[\w.@~+-][^\"',;]*|~[\\/]\w[^\"',;]*)"
)
_MAIL = re.compile(r"[\w.+-]+@[\w-]+\.[a-zA-Z]{2,}")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,})")
_PICTURES = ("modelspec.thumbnail", "thumbnail", "ssmd_cover_images")
_WORDING = re.compile(r"(?:^|[._])(?:sample_)?(?:prompts?|captions?|negative_prompt)$")
_MANY_TAGS = 5


def _private(metadata: Mapping[str, str]) -> Iterator[str]:
    for key, value in sorted(metadata.items()):
        if key in _PICTURES:
            continue
        for pattern, what in (
            (_TOKEN, "what looks like an access token"),
            (_ABSOLUTE, "a path"),
            (_MAIL, "a mail address"),
        ):
            if match := pattern.search(value):
                shown = "" if pattern is _TOKEN else f": {match[0][:80].strip()}"
                yield f"The header's `{key}` holds {what}{shown}."
                break
        else:
            if _WORDING.search(key) and value.strip("[]{} "):
                yield f"The header's `{key}` holds wording from the training or its previews."
    folders: Iterable[Any] = _json_object(metadata, "ss_tag_frequency").values()
    tags = sum(len(one) for one in folders if isinstance(one, dict))
    if tags > _MANY_TAGS:
        yield f"The header's `ss_tag_frequency` lists {tags:,} words of the training captions."
