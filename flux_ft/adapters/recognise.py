"""What a LoRA file is, told by its keys, shapes and header alone: the model, the layout, the kind of adapter.

Nothing is refused here, so that what cannot be read can still be named. Reading for use is `formats.read_adapter`.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from flux_ft.adapters.flavours import recognise
from flux_ft.adapters.safe_file import SafeFile, open_safely
from flux_ft.errors import AdapterError
from flux_ft.families.layout import LAYOUTS, Named, Size

Family = Literal["flux1", "flux2", "unknown"]
"""A name of LAYOUTS, or "unknown"."""
Naming = Literal["original", "diffusers", "unknown"]


def known_size(family: str, width: int | None) -> Size | None:
    """The published model of that width; None for one that is none of them."""
    sizes = LAYOUTS[family].sizes if family in LAYOUTS else ()
    return next((one for one in sizes if one.width == width), None)


# --- Keys. ---

Role = Literal["down", "up", "alpha", "bias", "dora", "lokr", "loha", "oft", "full", "norm", "other"]
_ROLES: tuple[tuple[str, Role], ...] = (
    (r"\.lora_down\.weight", "down"),
    (r"\.lora_up\.weight", "up"),
    (r"\.lora_A(?:\.\w+)?\.weight", "down"),
    (r"\.lora_B(?:\.\w+)?\.weight", "up"),
    (r"\.lora\.down\.weight|\.down\.weight", "down"),
    (r"\.lora\.up\.weight|\.up\.weight", "up"),
    (r"\.alpha", "alpha"),
    (r"\.lora_[AB](?:\.\w+)?\.bias|\.diff_b", "bias"),
    (r"\.dora_scale|\.lora_magnitude_vector(?:\.\w+)*", "dora"),
    (r"\.lokr_\w+", "lokr"),
    (r"\.hada_\w+", "loha"),
    (r"\.b?oft_\w+(?:\.weight)?|\.rescale", "oft"),
    (r"(?:query_norm|key_norm)\.(?:scale|weight)|norm_(?:added_)?[qk]\.weight", "norm"),
    (r"\.diff|\.set_weight|\.reshape_weight", "full"),
)
_ROLE = tuple((re.compile(rf"(.*?)(?:{pattern})"), role) for pattern, role in _ROLES)
_TEXT_ENCODER = re.compile(r"lora_te[0-9]?_|text_encoders?[._0-9]|lora_prior_te|te[0-9]?\.")
_XLABS = re.compile(r"(?:double|single)_blocks\.\d+\.processor\.")
_PREFIXES = (
    "lora_unet_", "lora_transformer_", "lycoris_", "base_model.model.diffusion_model.", "base_model.model.transformer.",
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.",
)  # fmt: skip
_BLOCK = re.compile(
    r"(single_transformer_blocks|single_blocks|transformer_blocks|double_blocks)[._]([0-9]{1,4})[._](.+)"
)


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it."""


@dataclass(frozen=True)
class RawModule:
    """What the file holds for one module, under the file's own name for it."""

    name: str
    parts: Mapping[Role, Entry]
    others: tuple[Entry, ...] = ()
    """Further tensors of a role that is taken."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """(O, I) of the matrix that a plain LoRA pair changes."""
        down, up = self.parts.get("down"), self.parts.get("up")
        if down is None or up is None or len(down.shape) < 2 or len(up.shape) < 2:
            return None
        return up.shape[0], down.shape[1]

    @property
    def rank(self) -> int | None:
        """None where there is no pair, or its factors do not fit together."""
        down, up = self.parts.get("down"), self.parts.get("up")
        if down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
            return None
        return down.shape[0]

    @property
    def prefix(self) -> str:
        """What comes before the module's name in the model: `lora_unet_`, `transformer.` …; empty for bare names."""
        return next((one for one in _PREFIXES if self.name.startswith(one)), "")

    @property
    def bare(self) -> str:
        """The name without prefix."""
        return self.name.removeprefix(self.prefix)

    def named(self, family: str) -> Named | None:
        """The module of that family which the name means; None if there is none."""
        return LAYOUTS[family].find(self.bare) if family in LAYOUTS else None

    @property
    def block(self) -> tuple[Literal["double", "single"], int] | None:
        """Stream and number; None for a module outside the blocks."""
        match = _BLOCK.match(self.bare)
        return (("single" if match[1].startswith("single") else "double"), int(match[2])) if match else None

    @property
    def kind(self) -> str:
        """The bare name with * for the block's number; the model's own spelling where it is known."""
        named = next((found for family in LAYOUTS if (found := self.named(family))), None)
        bare = self.bare if named is None else (named.original if named.fused else named.paths[0])
        match = _BLOCK.match(bare)
        return f"{match[1]}.*.{match[3]}" if match else bare

    @property
    def naming(self) -> Naming:
        """Whose name it is."""
        named = next((found for family in LAYOUTS if (found := self.named(family))), None)
        if named:
            return "original" if named.fused else "diffusers"
        match = _BLOCK.match(self.bare)
        return "unknown" if match is None else ("diffusers" if "transformer" in match[1] else "original")

    @property
    def is_text_encoder(self) -> bool:
        return bool(_TEXT_ENCODER.match(self.name))


@dataclass(frozen=True)
class Contents:
    """A safetensors file's keys and header, sorted into modules. No tensor has been read."""

    file: SafeFile
    modules: tuple[RawModule, ...]
    """Sorted by name."""
    unsorted: tuple[Entry, ...]
    """Tensors that belong to no adapter that we know."""

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.file.metadata

    @property
    def image_modules(self) -> tuple[RawModule, ...]:
        """Less those of text encoders."""
        return tuple(one for one in self.modules if not one.is_text_encoder)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(O, I) of every plain LoRA pair, by its name without prefix."""
        return {one.bare: one.shape for one in self.image_modules if one.shape}

    @property
    def family(self) -> Family:
        return family_of(self.shapes, self.metadata)

    def holding(self, *roles: Role) -> tuple[RawModule, ...]:
        """Modules with a tensor of one of these roles."""
        return tuple(one for one in self.modules if any(role in one.parts for role in roles))


def read_contents(path: Path) -> Contents:
    """The keys and the header of a file. Raises AdapterError when it is no safetensors file that holds together."""
    file = open_safely(path)
    modules: dict[str, dict[Role, Entry]] = {}
    others: dict[str, list[Entry]] = {}
    unsorted = []
    for key in sorted(file.entries):
        entry, found = Entry(key, file.entries[key].shape, file.entries[key].dtype), role_of(key)
        if found is None:
            unsorted.append(entry)
        elif found[1] in modules.setdefault(found[0], {}):
            others.setdefault(found[0], []).append(entry)
        else:
            modules[found[0]][found[1]] = entry
    sorted_modules = (RawModule(name, parts, tuple(others.get(name, ()))) for name, parts in sorted(modules.items()))
    return Contents(file, tuple(sorted_modules), tuple(unsorted))


def role_of(key: str) -> tuple[str, Role] | None:
    """`lora_unet_single_blocks_0_linear1.alpha` → (`lora_unet_single_blocks_0_linear1`, "alpha")."""
    for pattern, role in _ROLE:
        match = pattern.fullmatch(key)
        if match and match[1]:
            return (key if role == "norm" else match[1]), role
    return None


# --- The model. ---

_BY_INPUT = re.compile(r"final_layer\.|.*_modulation")
"""Modules outside the blocks whose input is as wide as the model; of the others, the output is."""


def width_of(shapes: Mapping[str, tuple[int, int]]) -> int | None:
    """The hidden width, as most modules have it. `shapes` are (O, I) by a name of either layout, without prefix."""
    found = [width for name, (out, into) in shapes.items() if (width := _width(name, out, into))]
    return max(set(found), key=found.count) if found else None


def _width(name: str, out: int, into: int) -> int | None:
    for layout in LAYOUTS.values():
        if named := layout.find(name):
            units = layout.units(named.original)
            if units is None:
                return into if _BY_INPUT.match(named.original) else out
            if not named.fused or out * units[1] == into * units[0]:
                return into // units[1]
    return None


def family_of(shapes: Mapping[str, tuple[int, int]], metadata: Mapping[str, str]) -> Family:
    """The family whose modules these are; unknown if they are of both. `shapes` as in `width_of`."""
    meanings = {name: {one.name: named for one in LAYOUTS.values() if (named := one.find(name))} for name in shapes}
    known = {name: found for name, found in meanings.items() if found}
    if not known:
        return "flux1" if any(_XLABS.match(name) for name in shapes) else "unknown"
    try:
        return cast(Family, recognise({name: shapes[name] for name in known}, metadata, known).name)
    except AdapterError:
        return "unknown"


# --- What the header says of the strength. ---


@dataclass(frozen=True)
class StatedStrength:
    """The entry `lora_adapter_metadata`, as far as it changes the strength."""

    text: str
    """What it asks for, in words."""
    is_one: bool
    """Whether that is a scale of 1 for every module."""


def header_strength(metadata: Mapping[str, str]) -> StatedStrength | None:
    """None where the header has no such entry."""
    raw = metadata.get("lora_adapter_metadata")
    if raw is None:
        return None
    try:
        fields: dict[str, Any] = {key.removeprefix("transformer."): value for key, value in json.loads(raw).items()}
    except (ValueError, AttributeError, RecursionError):
        return StatedStrength("which is no JSON object", False)
    alpha, rank = fields.get("lora_alpha"), fields.get("r")
    patterns = [fields.get(name) or {} for name in ("alpha_pattern", "rank_pattern")]
    rslora = bool(fields.get("use_rslora"))
    plain = (alpha is None or rank is None or alpha == rank) and patterns[0] == patterns[1] and not rslora
    words = f"alpha {alpha} at rank {rank}" + (", rsLoRA" if rslora else "")
    return StatedStrength(words + ("" if patterns[0] == patterns[1] else ", and patterns by module"), plain)
