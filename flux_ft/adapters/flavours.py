"""LoRA files of every tool, read into one form: keys → modules → family → layers.

    1  each key alone        `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` → container, name, role
    2  names by the tables   `double_blocks_0_img_attn_qkv` → the modules that FLUX.1 and FLUX.2 mean by it
    3  the family            by names that only one has, else by shapes, by the header
    4  layers                fused modules split, strength taken from `.alpha` or from the header

The first pass knows nothing of the model; the second is its table (families/layout.py) and nothing else. What a LoRA
cannot hold is named in the state's notes; what would be misread is refused.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux_ft.adapters.fused import is_finite, rows_of, scale_of, split, split_rows
from flux_ft.errors import AdapterError
from flux_ft.families.layout import FLUX1, FLUX2, LAYOUTS, SWAPPED, Layout, Named, Size, block_of
from flux_ft.types import AdapterState, LoraLayer

READABLE = {  # flavour → what its keys look like, and who writes it
    "diffusers": "`transformer.<diffusers name>.lora_A.weight`: diffusers, SimpleTuner, ai-toolkit for FLUX.1",
    "kohya": "`lora_unet_<bfl name>.lora_down.weight`: sd-scripts, FluxGym, musubi-tuner, OneTrainer",
    "comfy": "`diffusion_model.<bfl name>.lora_A.weight`: ai-toolkit for FLUX.2, diffusion-pipe, ComfyUI",
    "bfl": "`<bfl name>.lora_A.weight`: BFL's control LoRAs, OneTrainer",
    "xlabs": "`double_blocks.0.processor.qkv_lora1.down.weight`: XLabs",
    "onetrainer": "`lora_transformer_<diffusers name>.lora_down.weight`: OneTrainer, earlier",
    "peft": "`base_model.model.<any name>.lora_A.weight`: peft itself, fal",
    "lycoris": "`lycoris_<any name>.lora_down.weight`: LyCORIS",
    "bare": "`<diffusers name>.lora_A.weight`, or `.lora_A.default.weight`: DiffSynth, diffusers' save_lora_adapter",
}
SUPPORTED = "supported: LoRAs for FLUX.1 and FLUX.2 in the layouts " + ", ".join(READABLE)

_CONTAINERS = {  # how keys begin → flavour; bare names are told apart by the names themselves
    "base_model.model.diffusion_model.": "peft",
    "base_model.model.transformer.": "peft",
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfy",
    "diffusion_model.": "comfy",
    "transformer.": "diffusers",
    "lora_unet_": "kohya",
    "lora_transformer_": "onetrainer",
    "lycoris_": "lycoris",
}
_TEXT = re.compile(r"(lora_te\d?_|text_encoder(_\d)?\.|text_encoders\.|(base_model\.model\.)?text_model\.)")
_PAIRS = {  # ending of the down matrix → of its up matrix
    ".lora_A.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
    ".lora_down.weight": ".lora_up.weight",
    ".down.weight": ".up.weight",
}
_HEADER_ENDINGS = (".lora_A.weight", ".lora_A.default.weight")
"""Those whose strength may stand in the header."""
_ROLES = {
    **dict.fromkeys(_PAIRS, "down"),
    **dict.fromkeys(_PAIRS.values(), "up"),
    ".alpha": "alpha",
    **dict.fromkeys((".lora_B.bias", ".lora_B.default.bias", ".lora_up.bias"), "bias"),
    **dict.fromkeys((".diff", ".diff_b", ".set_weight", ".reshape_weight", ".w_norm", ".b_norm"), "whole"),
}
_DORA = re.compile(r".*\.(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)")
_LYCORIS = re.compile(r".*\.(lokr|hada|oft|boft|glora)_\w+(\.weight)?|.*\.lora_mid\.weight|.*\.(a1|a2|b1|b2)\.weight")
_KINDS = {"lokr": "LoKr", "hada": "LoHa", "oft": "OFT", "boft": "BOFT", "glora": "GLoRA"}
_XLABS = {  # (block list, name) → (the original's name, how many of its parts)
    ("double_blocks", "qkv_lora1"): ("img_attn.qkv", 3),
    ("double_blocks", "qkv_lora2"): ("txt_attn.qkv", 3),
    ("double_blocks", "proj_lora1"): ("img_attn.proj", 1),
    ("double_blocks", "proj_lora2"): ("txt_attn.proj", 1),
    ("single_blocks", "qkv_lora"): ("linear1", 3),
    ("single_blocks", "proj_lora"): ("linear2", 1),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AGAIN = "export it again"


# --- 1: each key alone. ---


class Key(NamedTuple):
    """A key, taken apart."""

    key: str
    container: str
    """How it begins; empty for bare names."""
    name: str
    """The module's name in the file, or the norm's."""
    role: str
    """down, up, alpha, bias; "norm" for one that is replaced; "whole" for what no factors hold; "text"."""


def parse_key(key: str) -> Key:
    """AdapterError for a kind of adapter that is not read, and for what is no adapter's key."""
    if _TEXT.match(key):
        return Key(key, "", key, "text")
    container = next((one for one in _CONTAINERS if key.startswith(one)), "")
    rest = key.removeprefix(container)
    ending = next((one for one in _ROLES if rest.endswith(one)), None)
    if ending is not None and (_ROLES[ending] == "whole" or _find(rest.removesuffix(ending))):
        return Key(key, container, rest.removesuffix(ending), _ROLES[ending])
    if ending is not None:
        raise AdapterError(f"key `{key}` changes no linear of FLUX.1 or FLUX.2", hint="is it for another model?")
    if any(layout.find_norm(rest) for layout in LAYOUTS.values()):
        return Key(key, container, rest, "norm")
    if _DORA.fullmatch(key):
        raise AdapterError(
            f"key `{key}` is of a DoRA, whose change depends on the base's weights and is of full rank",
            hint="merge it into its base with the tool that made it, then `flux-ft extract` a LoRA from the two",
        )
    if match := _LYCORIS.fullmatch(key):
        kind = _KINDS.get(match[1] or "", "LyCORIS adapter other than a LoRA")
        raise AdapterError(
            f"key `{key}` is of a {kind}, whose change is no product of two factors of low rank",
            hint="it cannot be converted as it is: merge it into its base with the tool that made it, "
            "then `flux-ft extract` a LoRA from the two",
        )
    raise AdapterError(f"key `{key}` is of no supported LoRA flavour", hint=SUPPORTED)


def _xlabs(name: str) -> tuple[str, int] | None:
    """`double_blocks.0.processor.qkv_lora1` → (`double_blocks.0.img_attn.qkv`, 3)."""
    match = re.fullmatch(r"(\w+)\.(\d+)\.processor\.(\w+)", name)
    found = _XLABS.get((match[1], match[3])) if match else None
    return (f"{match[1]}.{match[2]}.{found[0]}", found[1]) if match and found else None


def _find(name: str) -> dict[str, Named]:
    """What each family means by a module's name."""
    if xlabs := _xlabs(name):
        named = FLUX1.find(xlabs[0])
        return {FLUX1.name: named._replace(paths=named.paths[: xlabs[1]])} if named else {}
    return {layout.name: named for layout in LAYOUTS.values() if (named := layout.find(name))}


def parse_keys(keys: Iterable[str]) -> list[Key]:
    """All keys, sorted. AdapterError as `parse_key`; for a file with no LoRA in it; for two flavours in one file."""
    parsed = [parse_key(key) for key in sorted(keys)]
    if not parsed:
        raise AdapterError("no tensors in the file", hint=SUPPORTED)
    ours = [one for one in parsed if one.role not in ("text", "whole")]
    if not any(one.role == "down" for one in ours):
        kinds = {"text": "text encoders", "whole": "whole weights"}
        what = next((f"only parts for {kinds[one.role]}" for one in parsed if one.role in kinds), "no LoRA")
        raise AdapterError(f"holds {what}: `{(ours or parsed)[0].key}`", hint="flux_ft adapts the transformer alone")
    for one in ours:
        if one.container != ours[0].container:
            raise AdapterError(
                f"key `{one.key}` is of another flavour than `{ours[0].key}`", hint="take the LoRAs apart first"
            )
    return parsed


def flavour_of(parsed: Iterable[Key]) -> str:
    """A key of READABLE."""
    first = next(one for one in parsed if one.role in ("down", "up"))
    if _xlabs(first.name):
        return "xlabs"
    if first.container:
        return _CONTAINERS[first.container]
    return "bfl" if any(named.fused for named in _find(first.name).values()) else "bare"


def block_keys(keys: Iterable[str], layout: str) -> list[list[str]]:
    """A file's keys, those of one block together, and of one module outside; so all parts of a fused one are."""
    groups: dict[object, list[str]] = {}
    for one in parse_keys(keys):
        norm = LAYOUTS[layout].find_norm(one.name)
        named = _find(one.name).get(layout)
        original = norm[0] if norm else named.original if named else one.name
        groups.setdefault(block_of(original) or original, []).append(one.key)
    return list(groups.values())


def detect_format(keys: Iterable[str]) -> str:
    """The flavour's name, a key of READABLE. AdapterError names the first key that is of none, or of another."""
    return flavour_of(parse_keys(keys))


# --- 2: modules. ---


@dataclass
class _Module:
    """One module as the file has it."""

    name: str
    """With its container, for messages."""
    named: dict[str, Named]
    keys: dict[str, str] = field(default_factory=dict)
    """By role."""
    ending: str = ""
    """Of its down matrix."""
    xlabs: bool = False


def _pair_up(parsed: Iterable[Key]) -> list[_Module]:
    """AdapterError when a module has a role twice, or lacks a partner."""
    modules: dict[str, _Module] = {}
    for one in parsed:
        if one.role in ("text", "whole", "norm"):
            continue
        made = _Module(one.container + one.name, _find(one.name), xlabs=_xlabs(one.name) is not None)
        module = modules.setdefault(one.name, made)
        if one.role in module.keys:
            raise AdapterError(f"`{module.keys[one.role]}` and `{one.key}` are the same", hint=_AGAIN)
        module.keys[one.role] = one.key
    for module in modules.values():
        _require_pair(module)
    return list(modules.values())


def _require_pair(module: _Module) -> None:
    ups = {up: down for down, up in _PAIRS.items()}
    for role, partner, endings in (("down", "up", _PAIRS), ("up", "down", ups)):
        if role in module.keys:
            ending = module.keys[role].removeprefix(module.name)
            if partner not in module.keys:
                raise AdapterError(f"`{module.name}{endings[ending]}` is missing", hint=_AGAIN)
            module.ending = ending if role == "down" else module.ending
    if "down" not in module.keys:
        raise AdapterError(f"`{module.name}` has `{min(module.keys.values())}` and no factors", hint=_AGAIN)


def _checked(key: str, tensor: Tensor) -> Tensor:
    known = (*_FLOATS, torch.int64) if key.endswith(".alpha") else _FLOATS  # kohya's extractor writes int64 alphas
    if tensor.dtype not in known or not is_finite(tensor):
        what = "NaN or infinity" if tensor.dtype in known else f"{tensor.dtype}"
        raise AdapterError(f"`{key}` holds {what}", hint="expected finite fp16, bf16, fp32 or fp64 values")
    return tensor


def _layer(module: _Module, tensors: Mapping[str, Tensor]) -> LoraLayer:
    roles = {role: _checked(key, tensors[key]) for role, key in module.keys.items()}
    down_RI, up_OR, alpha = roles["down"], roles["up"], roles.get("alpha")
    down, up = tuple(down_RI.shape), tuple(up_OR.shape)
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or 0 in (*down, *up):
        raise AdapterError(f"`{module.name}` has factors {down} and {up}", hint="expected (rank, in) and (out, rank)")
    if alpha is not None and alpha.numel() != 1:
        raise AdapterError(f"`{module.name}.alpha` has shape {tuple(alpha.shape)}", hint="expected one number")
    bias = roles.get("bias")
    if bias is not None and tuple(bias.shape) != up[:1]:
        raise AdapterError(f"`{module.keys['bias']}` has shape {tuple(bias.shape)}", hint=f"expected ({up[0]},)")
    return LoraLayer(down_RI, up_OR, float(down[0] if alpha is None else alpha.item()))


# --- 3: the family. ---


def recognise(
    shapes: Mapping[str, tuple[int, int]], metadata: Mapping[str, str], named: Mapping[str, Mapping[str, Named]]
) -> Layout:
    """The family of modules whose (O, I) are `shapes`, and which mean `named` in each family.

    By names that only one has; else by shapes; else by the sizes of the published models; else by what the header says;
    else FLUX.1. AdapterError when some names are of one family and some of the other.
    """
    owners: dict[str, str] = {}
    for name, meanings in named.items():
        if len(meanings) == 1:
            owners.setdefault(next(iter(meanings)), name)
    if len(owners) > 1:
        one, other = (f"`{owners[layout.name]}` is of {layout.title}" for layout in LAYOUTS.values())
        raise AdapterError(f"{one}, {other}: a LoRA is for one of them", hint="take the LoRAs apart first")
    if owners:
        return LAYOUTS[next(iter(owners))]
    for name, (out, into) in shapes.items():
        fitting = [layout for layout in LAYOUTS.values() if _fits(layout, named[name][layout.name], out, into)]
        if len(fitting) == 1:
            return fitting[0]
    known = [
        layout
        for layout in LAYOUTS.values()
        if fitting_sizes(layout, {named[name][layout.name].original: shape for name, shape in shapes.items()})
    ]
    return known[0] if len(known) == 1 else _of_header(metadata) or FLUX1


def _fits(layout: Layout, named: Named, out: int, into: int) -> bool:
    """Whether an original's shape is in the family's proportions; so is what is outside the blocks, or a part."""
    units = layout.units(named.original)
    return units is None or not named.fused or out * units[1] == into * units[0]


def _of_header(metadata: Mapping[str, str]) -> Layout | None:
    for entry in ("modelspec.architecture", "ss_base_model_version", "modelspec.implementation"):
        words = re.sub(r"[^a-z0-9]", "", metadata.get(entry, "").lower())
        if "flux2" in words or "klein" in words:
            return FLUX2
        if "flux1" in words or "fluxtiny" in words:
            return FLUX1
    return None


def fitting_sizes(layout: Layout, shapes: Mapping[str, tuple[int, int]]) -> tuple[Size, ...]:
    """The published models that a LoRA may be for; `shapes` are (O, I) by the original's names, of all or some parts.

    By the width, the numbers of blocks and the width of text tokens.
    """
    return tuple(size for size in layout.sizes if all(_could_be(size, layout, name, shapes[name]) for name in shapes))


def _could_be(size: Size, layout: Layout, name: str, shape: tuple[int, int]) -> bool:
    block, units = block_of(name), layout.units(name)
    if block is None or units is None:
        return name != "txt_in" or shape == (size.width, size.text)
    count = size.double if block[0] == layout.double.original else size.single
    return block[1] < count and shape[1] == units[1] * size.width


def sizes_of(state: AdapterState) -> tuple[Size, ...]:
    """The published models that a LoRA may be for; none for a model of another size."""
    layout = LAYOUTS[state.layout]
    shapes = {}
    for path, layer in state.layers.items():
        if place := layout.place(path):
            shapes[place[0]] = (layer.up_OR.shape[0], layer.down_RI.shape[1])
    return fitting_sizes(layout, shapes) if shapes else ()


# --- 4: layers. ---


def read_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, layout: str | None = None
) -> AdapterState:
    """The LoRA in a file's tensors and header entries, whatever its flavour and family.

    A module without `.alpha` has the strength that the header's `lora_adapter_metadata` gives it, as diffusers reads
    it; 1 where there is none. Ranks at the end that are all zero are padding, and are taken off. `layout` is the
    family's where it is known. AdapterError names the first key that does not fit.
    """
    metadata = dict(metadata or {})
    parsed = parse_keys(tensors)
    modules = _pair_up(parsed)
    family = LAYOUTS[layout] if layout else _family(modules, tensors, metadata)
    # No tool means the header for files of another ending; diffusers applies it to them nevertheless.
    header = HeaderStrength.read(metadata) if any(one.ending in _HEADER_ENDINGS for one in modules) else None
    layers: dict[str, LoraLayer] = {}
    extras: dict[str, Tensor] = {}
    asked = 0
    for module in modules:
        layer = _layer(module, tensors)
        parts = _parts(module, layer, family)
        for path in parts.keys() & layers.keys():
            raise AdapterError(f"`{module.name}` changes `{path}`, which another key does too", hint=_AGAIN)
        if header and module.ending in _HEADER_ENDINGS:
            asked += "alpha" not in module.keys and any(header.scale(path) != 1 for path in parts)
            given = None if "alpha" not in module.keys else scale_of(layer)
            parts = {path: header.applied(path, part, layer.rank, given) for path, part in parts.items()}
        layers |= parts
        if "bias" in module.keys:
            extras |= _biases(module, layer, parts, tensors[module.keys["bias"]], family)
    for one in parsed:
        if one.role == "norm" and (norm := family.find_norm(one.name)):
            extras[norm[1]] = _checked(one.key, tensors[one.key])
    notes = _notes(parsed, extras, header if asked else None)
    return AdapterState(layers, metadata, family.name, extras, notes)


def _family(modules: Iterable[_Module], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Layout:
    shapes = {module.name: _shape(module, tensors) for module in modules}
    return recognise(shapes, metadata, {module.name: module.named for module in modules})


def _shape(module: _Module, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    up, down = tensors[module.keys["up"]].shape, tensors[module.keys["down"]].shape
    return (up[0], down[1]) if len(up) == 2 and len(down) == 2 else (0, 0)


def _parts(module: _Module, layer: LoraLayer, layout: Layout) -> dict[str, LoraLayer]:
    named = module.named[layout.name]
    if not named.fused:
        return {named.paths[0]: without_padding(layer)}
    if module.xlabs and len(named.paths) < len(layout.parts(named.original)):
        out, width = layer.up_OR.shape[0], layer.down_RI.shape[1]
        if out != 3 * width:
            raise AdapterError(f"`{module.name}` has shape ({out}, {width})", hint="expected q, k and v of one width")
        return split_rows(named.paths, (width,) * 3, layer)
    return split(named.original, layer, layout, module.name)


def _biases(
    module: _Module, layer: LoraLayer, parts: Mapping[str, LoraLayer], bias_O: Tensor, layout: Layout
) -> dict[str, Tensor]:
    """What is added to the biases at strength 1, by diffusers parameter."""
    named = module.named[layout.name]
    rows = rows_of(named.original, len(bias_O), layer.down_RI.shape[1], layout) if named.fused else (len(bias_O),)
    if named.fused and named.original == SWAPPED:
        bias_O = bias_O.roll(len(bias_O) // 2)
    found = {}
    for path, piece in zip(named.paths, torch.split(bias_O, list(rows[: len(named.paths)])), strict=True):
        scale = scale_of(parts.get(path, layer))
        found[f"{path}.bias"] = piece if scale == 1 else piece.float() * scale
    return found


def without_padding(layer: LoraLayer) -> LoraLayer:
    """The same ΔW without the trailing ranks whose `down` row and `up` column are both exactly zero."""
    if layer.down_RI[-1].any() or layer.up_OR[:, -1].any():
        return layer
    used = torch.nonzero((layer.down_RI != 0).any(1) | (layer.up_OR != 0).any(0))
    rank = int(used[-1]) + 1 if len(used) else 1
    return LoraLayer(layer.down_RI[:rank], layer.up_OR[:, :rank], layer.alpha * rank / layer.rank)


def _notes(parsed: Iterable[Key], extras: Mapping[str, Tensor], header: HeaderStrength | None) -> tuple[str, ...]:
    def those(role: str) -> list[str]:
        return [one.key for one in parsed if one.role == role]

    notes = []
    if text := those("text"):
        notes.append(f"{len(text)} tensors for text encoders are left out (`{text[0]}`): flux_ft has no use for them")
    if whole := those("whole"):
        notes.append(
            f"{len(whole)} tensors that change whole weights are left out (`{whole[0]}`): a LoRA holds products of two "
            "factors; so this LoRA does less than its file"
        )
    biases = [name for name in extras if name.endswith(".bias")]
    if biases:
        notes.append(f"{len(biases)} added biases are kept for `bfl` files alone (`{biases[0]}`)")
    norms = [name for name in extras if not name.endswith(".bias")]
    if norms:
        notes.append(f"{len(norms)} replaced norms are kept for `bfl` files alone (`{norms[0]}`)")
    if header:
        notes.append(
            "its strength is in the header entry `lora_adapter_metadata` alone, where diffusers looks and other tools "
            "do not; converting it mends that"
        )
    return tuple(notes)


# --- The strength in the header. ---


@dataclass(frozen=True)
class HeaderStrength:
    """diffusers' header entry `lora_adapter_metadata`: a peft configuration, which gives modules their strength."""

    rank: float
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    rslora: bool
    """Whether alpha is divided by the rank's square root (arXiv 2312.03732)."""

    @staticmethod
    def read(metadata: Mapping[str, str]) -> HeaderStrength | None:
        """None where the header has no such entry. AdapterError when it makes no sense."""
        if "lora_adapter_metadata" not in metadata:
            return None
        try:
            entry = json.loads(metadata["lora_adapter_metadata"])
            prefixed = {key: value for key, value in entry.items() if key.startswith("transformer.")}
            # diffusers' pipelines write the prefix, its models' own `save_lora_adapter` does not.
            fields = {key.removeprefix("transformer."): value for key, value in (prefixed or entry).items()}
            made = HeaderStrength(
                rank=_rank(fields.get("r", 8)),  # what peft takes where it is not said
                alpha=_number(fields.get("lora_alpha", 8)),
                ranks={_plain(key): _rank(value) for key, value in (fields.get("rank_pattern") or {}).items()},
                alphas={_plain(key): _number(value) for key, value in (fields.get("alpha_pattern") or {}).items()},
                rslora=bool(fields.get("use_rslora")),
            )
        except (ValueError, AttributeError, TypeError, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"header entry `lora_adapter_metadata` is no JSON of a LoRA's configuration: {error}",
                hint="the file is damaged; export it again",
            ) from None
        if fields.get("use_dora"):
            raise AdapterError(
                "header entry `lora_adapter_metadata` says that this is a DoRA",
                hint="merge it into its base with the tool that made it, then `flux-ft extract` a LoRA from the two",
            )
        return made

    def rank_of(self, path: str) -> float:
        return _first_match(self.ranks, path, self.rank)

    def scale(self, path: str) -> float:
        """What peft multiplies the module's `up @ down` by."""
        rank, alpha = self.rank_of(path), _first_match(self.alphas, path, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def applied(self, path: str, layer: LoraLayer, rank: int, given: float | None) -> LoraLayer:
        """The layer at the header's strength; `rank` is that of its tensors, `given` their own strength.

        AdapterError when the two speak against each other.
        """
        scale = self.scale(path)
        if given is not None:
            if not math.isclose(given, scale, rel_tol=1e-6):
                raise AdapterError(
                    f"`{path}` is scaled by {given:g} in the tensors and by {scale:g} in the header entry "
                    "`lora_adapter_metadata`",
                    hint="diffusers refuses such files, other tools follow the tensors: remove one of the two",
                )
            return layer
        if scale != 1 and self.rank_of(path) != rank:
            raise AdapterError(
                f"`{path}` has rank {rank}, but {self.rank_of(path):g} in the header entry `lora_adapter_metadata`, "
                "which gives its strength",
                hint="export it again from the tool that wrote it",
            )
        return replace(layer, alpha=scale * layer.rank)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    return float(value)


def _rank(value: Any) -> float:
    if _number(value) < 1 or value != int(value):
        raise ValueError(f"{value} is no rank")
    return float(value)


def _plain(pattern: str) -> str:
    """A peft pattern as the module's name, with ^ in front where it must be the whole one.

    peft takes patterns as regular expressions; those of a stranger's file are not run. All that is written in practice
    are names.
    """
    name = pattern.removesuffix("$")
    plain = re.sub(r"\\(.)", r"\1", name)
    if not re.fullmatch(r"\^?[\w.]+", plain):
        raise ValueError(f"{pattern[:60]!r} is no module's name")
    return plain


def _first_match(patterns: Mapping[str, float], path: str, otherwise: float) -> float:
    """By the first pattern that is the path or its end, as peft has it."""
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if path == name or (pattern == name and path.endswith(f".{name}")):
            return value
    return otherwise
