"""Which tools honour a LoRA file: a table by layout and tool, and what in a file changes an answer.

Found by running each tool's own loader on zero weights and comparing the change of every module, or, where marked so,
by reading its source. A cell holds for files with block linears alone and with their strength in the tensors; the rules
below it speak of everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from flux_ft.adapters.recognise import Contents, Family, RawModule, header_strength

Answer = Literal["ok", "partial", "wrong", "nothing", "unknown"]
"""Every module as it is; some modules; another strength; not loaded, with or without a word; nobody looked."""
Layout = Literal[
    "kohya", "diffusers", "diffusers with alpha", "comfy", "comfy with alpha", "comfy down/up",
    "comfy, diffusers names", "bare diffusers", "bare original", "wrapped", "onetrainer", "xlabs", "control",
    "dora", "lokr", "unknown",
]  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """A program that loads LoRAs, and which version of it was looked at."""

    name: str
    version: str
    tried: bool = True
    """Its loader was run; otherwise its source was read."""


DIFFUSERS, COMFY = Tool("diffusers", "0.42.1"), Tool("ComfyUI", "0.19.3")
FORGE, SD_SCRIPTS = Tool("Forge", "2025-06-26"), Tool("sd-scripts", "2026-02-16")
INVOKE, NUNCHAKU = Tool("InvokeAI", "2026-08-19"), Tool("nunchaku", "2025-12-30")
SD_CPP = Tool("stable-diffusion.cpp", "2026-08-19", tried=False)
MFLUX = Tool("mflux", "mid-2026", tried=False)
DRAW_THINGS = Tool("draw-things", "2026-08-06", tried=False)
TOOLS: dict[Family, tuple[Tool, ...]] = {
    "flux1": (DIFFUSERS, COMFY, FORGE, SD_SCRIPTS, INVOKE, NUNCHAKU, SD_CPP, MFLUX, DRAW_THINGS),
    "flux2": (DIFFUSERS, COMFY),
    "unknown": (),
}


@dataclass(frozen=True)
class Verdict:
    """What one tool makes of a file."""

    tool: Tool
    answer: Answer
    why: str = ""
    tried: bool = True

    @property
    def evidence(self) -> str:
        """How we know."""
        return f"{'tried with' if self.tried else 'read from the source of'} {self.tool.version}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "tool": self.tool.name,
            "version": self.tool.version,
            "answer": self.answer,
            "why": self.why,
            "tried": self.tried,
        }


_OK, _UNKNOWN = ("ok", ""), ("unknown", "nobody looked")
_SILENT = ("nothing", "loads nothing, with a line in the log at most")
_REFUSED = ("nothing", "the file is not recognised")
_FULL_SET = ("partial", "only a file that has every module of every block")
Cell = tuple[str, str] | tuple[str, str, Literal["read"]]


def _row(names: tuple[Tool, ...], *cells: Cell) -> dict[str, Cell]:
    return {tool.name: cell for tool, cell in zip(names, cells, strict=True)}


_SIX = (DIFFUSERS, COMFY, FORGE, SD_SCRIPTS, INVOKE, NUNCHAKU)
_TWO = (DIFFUSERS, COMFY)
_WITH_SWITCH: Cell = ("ok", "with its option --diffusers")
_LOADER_ERROR: Cell = ("nothing", "its loader stops with an error")
_TABLE: dict[Family, dict[Layout, dict[str, Cell]]] = {
    "flux1": {
        "kohya": _row(_SIX, _OK, _OK, _OK, _OK, _OK, _OK)
        | {SD_CPP.name: ("ok", "builds of 2026 on"), DRAW_THINGS.name: _OK}
        | {MFLUX.name: ("ok", "from mid-2026 on; earlier it cut shared factors")},
        "diffusers": _row(_SIX, _OK, _OK, _OK, _WITH_SWITCH, _OK, _OK)
        | {SD_CPP.name: ("ok", "builds of 2026 on"), MFLUX.name: _OK},
        "diffusers with alpha": _row(
            _SIX, _OK, _OK, _OK, ("ok", "by merging; its convert_flux_lora ignores alpha"), _REFUSED, _OK
        ),
        "comfy": _row(_SIX, ("nothing", "loads nothing, with a warning"), _OK, _OK, _WITH_SWITCH, _OK, _SILENT),
        "comfy with alpha": _row(
            _SIX, ("nothing", "loads nothing, with a warning"), _OK, _OK, _WITH_SWITCH, _LOADER_ERROR, _SILENT
        ),
        "comfy down/up": _row(_SIX, _OK, _OK, _OK, _OK, _LOADER_ERROR, _OK),
        "comfy, diffusers names": _row(_SIX, _SILENT, _SILENT, _SILENT, _LOADER_ERROR, _REFUSED, _SILENT),
        "bare diffusers": _row(_SIX, _SILENT, _OK, _SILENT, _LOADER_ERROR, _REFUSED, _SILENT),
        "bare original": _row(_SIX, _SILENT, _SILENT, _SILENT, _WITH_SWITCH, _REFUSED, _SILENT),
        "wrapped": _row(_SIX, _FULL_SET, _SILENT, _SILENT, _SILENT, _OK, _SILENT),
        "onetrainer": _row(
            _SIX, ("partial", "attention alone; else a KeyError"), _OK, _OK, _SILENT,
            ("partial", "attention alone; else an error"), _OK,
        ),
        "xlabs": _row(
            _SIX, _OK, ("partial", "only the full set", "read"), _SILENT, _SILENT,
            ("unknown", "recognised; its conversion was not run"), _OK,
        ),
        "control": _row(
            _SIX, ("wrong", "only a complete file, and its final adaLN is spoilt: the halves of A are swapped too"),
            ("partial", "only the full set with img_in", "read"), ("partial", "only the full set with img_in", "read"),
            ("partial", "block linears; biases and norms are ignored"), ("ok", "as a control LoRA", "read"), _FULL_SET,
        ),
        "dora": _row(
            _SIX, ("wrong", "the magnitudes are dropped, with a warning", "read"), ("ok", "", "read"),
            ("ok", "", "read"), ("wrong", "the magnitudes are ignored", "read"), ("ok", "", "read"),
            ("wrong", "the magnitudes are ignored", "read"),
        ),
    },
    "flux2": {
        "kohya": _row(_TWO, ("ok", "0.38 on"), _OK),
        "diffusers": _row(_TWO, _OK, ("ok", "early 2026 on")),
        "diffusers with alpha": _row(_TWO, ("nothing", "ValueError"), _OK),
        "comfy": _row(_TWO, ("ok", "0.37 on"), _OK),
        "comfy with alpha": _row(_TWO, ("nothing", "ValueError"), _OK),
        "comfy down/up": _row(_TWO, _SILENT, _OK),
        "wrapped": _row(_TWO, _OK, _SILENT),
        "bare diffusers": _row(_TWO, _SILENT, _OK),
        "bare original": _row(_TWO, _SILENT, _SILENT),
        "comfy, diffusers names": _row(_TWO, ("ok", "block linears alone; else a ValueError"), _SILENT),
        "onetrainer": _row(_TWO, _SILENT, _UNKNOWN),
        "lokr": _row(_TWO, ("ok", "", "read"), _UNKNOWN),
    },
}  # fmt: skip


def layout_of(contents: Contents) -> Layout:
    """Which row of the table a file belongs to, as the tools tell layouts apart."""
    modules = contents.image_modules
    if contents.holding("lokr", "loha"):
        return "lokr"
    if contents.holding("dora"):
        return "dora"
    if any("processor" in one.name for one in modules):
        return "xlabs"
    pairs = [one for one in modules if "down" in one.parts]
    if not pairs:
        return "unknown"
    first = pairs[0]
    old_suffix = first.parts["down"].key.endswith(".lora_down.weight")
    naming = next((one.naming for one in pairs if one.naming != "unknown"), "unknown")
    if first.prefix == "lora_unet_":
        return "kohya" if naming == "original" else "unknown"
    if first.prefix == "lora_transformer_":
        return "onetrainer"
    if first.prefix.startswith("base_model.model."):
        return "wrapped"
    alpha = " with alpha" if contents.holding("alpha") else ""
    if first.prefix == "transformer.":
        return _with(naming == "diffusers" and not old_suffix, f"diffusers{alpha}")
    if first.prefix.endswith("diffusion_model."):
        if naming == "diffusers":
            return "comfy, diffusers names"
        return "comfy down/up" if old_suffix else _with(True, f"comfy{alpha}")
    if naming == "original":
        return "control" if contents.holding("norm") else "bare original"
    return "bare diffusers" if naming == "diffusers" else "unknown"


def _with(fits: bool, layout: str) -> Layout:
    return layout if fits else "unknown"  # type: ignore[return-value]


# --- What in a file changes an answer. ---


@dataclass(frozen=True)
class _File:
    """What the rules look at."""

    contents: Contents
    family: Family
    layout: Layout

    @property
    def pairs(self) -> list[RawModule]:
        return [one for one in self.contents.image_modules if "down" in one.parts]

    @property
    def outside(self) -> list[str]:
        """Modules outside the blocks."""
        return [one.name for one in self.pairs if one.block is None]

    @property
    def misses_qkv_parts(self) -> bool:
        """Whether some block has a part of q, k, v and not all, in diffusers' names."""
        names = {one.name.replace(".", "_") for one in self.pairs}
        groups = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
        return any(
            any(name.endswith(part) for part in group)
            and not all(name[: -len(part)] + other in names for part in group if name.endswith(part) for other in group)
            for name in names
            for group in groups
        )

    @property
    def has_block_zero(self) -> bool:
        """As InvokeAI wants it of a diffusers file."""
        names = {one.bare for one in self.pairs}
        wanted = ("transformer_blocks.0.attn.add_q_proj", "single_transformer_blocks.0.attn.to_q")
        return all(name in names for name in wanted)

    def touches(self, *leaves: str) -> bool:
        names = [one.bare.replace(".", "_") for one in self.pairs if one.block is None]
        return any(name.startswith(leaf) for leaf in leaves for name in names)


Rule = Callable[[_File], Mapping[str, tuple[Answer, str]]]


def _extras(file: _File) -> Mapping[str, tuple[Answer, str]]:
    count = len(file.outside)
    if not count:
        return {}
    dropped = f"drops the {count} modules outside the blocks"
    if (file.family, file.layout) == ("flux1", "kohya"):
        return {
            "diffusers": ("partial", f"{dropped}, without a word"),
            "InvokeAI": ("nothing", "does not recognise a file with modules outside the blocks"),
            "nunchaku": ("partial", dropped),
        }
    if (file.family, file.layout) == ("flux1", "diffusers"):
        found: dict[str, tuple[Answer, str]] = {"sd-scripts": ("partial", dropped)}
        if file.touches("norm_out"):
            found["InvokeAI"] = ("nothing", "stops at norm_out")
            found["stable-diffusion.cpp"] = ("wrong", "does not swap the halves of norm_out")
        return found
    if (file.family, file.layout) == ("flux2", "kohya"):
        lost = file.touches("guidance_in", "double_stream", "single_stream", "final_layer_adaLN")
        return {"diffusers": ("partial", "drops guidance, modulations and final adaLN")} if lost else {}
    if (file.family, file.layout) == ("flux2", "diffusers"):
        lost = file.touches("time_guidance_embed", "double_stream", "single_stream")
        return {"ComfyUI": ("partial", "does not know time_guidance_embed and the shared modulations")} if lost else {}
    if (file.family, file.layout) == ("flux2", "comfy") and file.touches("final_layer_adaLN"):
        return {"diffusers": ("wrong", "does not swap the halves of the final adaLN")}
    return {}


def _header_alpha(file: _File) -> Mapping[str, tuple[Answer, str]]:
    strength = header_strength(file.contents.metadata)
    if strength is None:
        return {}
    if file.layout == "diffusers with alpha" and file.family == "flux1":
        return {"diffusers": ("nothing", "ValueError: alpha in the tensors and in the header")}
    if strength.is_one:
        return {}
    if file.layout in ("kohya", "comfy down/up"):
        return {"diffusers": ("wrong", "scales by the header's alpha once more")}
    if file.layout == "diffusers":
        others = [tool.name for tool in TOOLS[file.family] if tool is not DIFFUSERS]
        return dict.fromkeys(others, ("wrong", "the strength is in the header alone, where it does not look"))
    return {}


def _integer_alpha(file: _File) -> Mapping[str, tuple[Answer, str]]:
    integers = [one for one in file.contents.holding("alpha") if one.parts["alpha"].dtype.startswith(("I", "U"))]
    if file.layout == "diffusers with alpha" and integers:
        return {"diffusers": ("nothing", "ValueError: alpha is a whole number")}
    return {}


def _text_encoders(file: _File) -> Mapping[str, tuple[Answer, str]]:
    names = [one.name for one in file.contents.modules if one.is_text_encoder]
    if not names:
        return {}
    t5 = any(name.startswith("lora_te3") for name in names)
    found: dict[str, tuple[Answer, str]] = {"nunchaku": ("partial", "leaves out the text encoders")}
    if t5:
        found["InvokeAI"] = ("nothing", "does not recognise a file with lora_te3")
        found["diffusers"] = ("partial", "drops the T5 encoder's modules")
    if file.layout.startswith("diffusers"):
        found["InvokeAI"] = ("nothing", "does not recognise a file with text encoders")
    return found


def _gaps(file: _File) -> Mapping[str, tuple[Answer, str]]:
    if file.family != "flux1" or not file.layout.startswith("diffusers"):
        return {}
    found: dict[str, tuple[Answer, str]] = {}
    if file.misses_qkv_parts:
        found["InvokeAI"] = ("nothing", "does not recognise a file that lacks some of q, k and v in a block")
        found["stable-diffusion.cpp"] = ("partial", "stops at the first part of q, k, v that is missing")
    elif not file.has_block_zero:
        found["InvokeAI"] = ("nothing", "recognises a file by the attention of double block 0 and single block 0")
    return found


def _last_blocks(file: _File) -> Mapping[str, tuple[Answer, str]]:
    if (file.family, file.layout) != ("flux1", "kohya"):
        return {}
    names = {one.name for one in file.pairs}
    if names & {"lora_unet_double_blocks_18_img_attn_qkv", "lora_unet_single_blocks_37_linear1"}:
        return {}
    return {"draw-things": ("nothing", "recognises the model by double block 18 or single block 37")}


def _mixed_ranks(file: _File) -> Mapping[str, tuple[Answer, str]]:
    if not file.layout.startswith("diffusers") or len({one.rank for one in file.pairs}) < 2:
        return {}
    return {"diffusers": ("ok", "from August 2026 on; earlier releases scale mixed ranks wrongly")}


_RULES: tuple[Rule, ...] = (
    _mixed_ranks, _last_blocks, _gaps, _extras, _text_encoders, _integer_alpha, _header_alpha,
)  # fmt: skip
_SEVERITY: dict[Answer, int] = {"ok": 0, "unknown": 1, "partial": 2, "wrong": 3, "nothing": 4}


def verdicts(contents: Contents, family: Family) -> tuple[Verdict, ...]:
    """What each tool makes of a file; none for a family that we do not know."""
    return tuple(_verdicts(_File(contents, family, layout_of(contents))))


def _verdicts(file: _File) -> Iterator[Verdict]:
    row = _TABLE.get(file.family, {}).get(file.layout, {})
    changes = [rule(file) for rule in _RULES]
    for tool in TOOLS[file.family]:
        verdict = _cell(tool, row.get(tool.name, _UNKNOWN))
        for change in changes:
            answer, why = change.get(tool.name, ("ok", ""))
            if why and verdict.answer != "unknown" and _SEVERITY[answer] >= _SEVERITY[verdict.answer]:
                verdict = replace(verdict, answer=answer, why=why)
        yield verdict


def _cell(tool: Tool, cell: Cell) -> Verdict:
    answer, why, *read = cell
    return Verdict(tool, answer, why, tool.tried and not read)  # type: ignore[arg-type]


def as_markdown(family: Family) -> str:
    """The table for the docs: a row for each layout, a column for each tool."""
    tools = TOOLS[family]
    lines = ["| layout | " + " | ".join(f"{tool.name} {tool.version}" for tool in tools) + " |"]
    lines.append("|---" * (len(tools) + 1) + "|")
    for layout, row in _TABLE[family].items():
        cells = [_cell(tool, row.get(tool.name, _UNKNOWN)) for tool in tools]
        lines.append(f"| {layout} | " + " | ".join(_in_words(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _in_words(verdict: Verdict) -> str:
    if verdict.answer == "unknown":
        return "?"
    words = verdict.answer + (f": {verdict.why}" if verdict.why else "")
    return words if verdict.tried else f"{words} (read)"
