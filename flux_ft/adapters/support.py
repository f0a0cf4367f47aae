"""Which parts of a LoRA which tools drop, by the layout that it is written in: a table in code, also in the docs.

Found by running the tools' own loaders on zero weights and comparing every module's change; versions and method stand
in docs/lora_files.md. Parts that are not in the table are honoured by every tool that was tried with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flux_ft.adapters.fused import layout_of
from flux_ft.errors import AdapterError, some_of
from flux_ft.families.layout import LAYOUTS, SWAPPED, Layout
from flux_ft.types import AdapterState

BLOCKS, MODULATION, BIASES, NORMS = "linears in blocks", "shared modulations", "added biases", "replaced norms"
FORMATS = ("kohya", "diffusers", "comfy", "bfl")
"""The layouts that are written."""
BLOCK_FORMATS = ("kohya", "diffusers", "comfy")
"""Those that hold any LoRA of the linears inside the blocks; `bfl` holds complete control LoRAs alone."""
UNIVERSAL = "kohya"
"""The layout that all tools read alike; what one of them drops is refused there, and warned about elsewhere."""

_SILENT, _NO_FILE, _NO_NAME = "drops it without a word", "does not recognise the file", "does not know its name"
_NO_EXTRAS = "no file of this layout holds it"
_FLUX1_KOHYA = {"diffusers": _SILENT, "nunchaku": _SILENT, "InvokeAI": _NO_FILE}
_OUTSIDE = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in")
_FINAL, _ADALN = "final_layer.linear", SWAPPED

DROPPED_BY: dict[tuple[str, str], dict[str, dict[str, str]]] = {
    # (family, layout on disk) → part → tool → what it does with them; an empty tool is the layout itself
    ("flux1", "kohya"): {
        **{part: _FLUX1_KOHYA for part in _OUTSIDE},
        _FINAL: {"diffusers": _SILENT, "nunchaku": _SILENT, "InvokeAI": "skips it"},
        _ADALN: _FLUX1_KOHYA,
        BIASES: {"": _NO_EXTRAS},
        NORMS: {"": _NO_EXTRAS},
    },
    ("flux1", "diffusers"): {
        **{part: {"sd-scripts": "drops it"} for part in _OUTSIDE},
        **{part: {"sd-scripts": "drops it", "nunchaku": "does not support it"} for part in ("img_in", "txt_in")},
        _FINAL: {"sd-scripts": "drops it"},
        _ADALN: {
            "sd-scripts": "drops it", "InvokeAI": "refuses the file",
            "stable-diffusion.cpp": "does not swap the halves: another effect",
        },
        BIASES: {"": _NO_EXTRAS},
        NORMS: {"": _NO_EXTRAS},
    },
    ("flux1", "comfy"): {
        BLOCKS: {"diffusers": "loads nothing, with a warning", "nunchaku": "loads nothing"},
        BIASES: {"": _NO_EXTRAS},
        NORMS: {"": _NO_EXTRAS},
    },
    ("flux1", "bfl"): {
        _ADALN: {"diffusers": "swaps the halves of down's ranks too: another effect"},
        BIASES: {"sd-scripts": "ignores it"},
        NORMS: {"sd-scripts": "ignores it"},
    },
    ("flux2", "kohya"): {
        **{part: {"diffusers": "drops it with a warning"} for part in ("guidance_in", MODULATION, _ADALN)},
        BIASES: {"": _NO_EXTRAS},
        NORMS: {"": _NO_EXTRAS},
    },
    ("flux2", "diffusers"): {
        **{part: {"ComfyUI": _NO_NAME} for part in ("time_in", "guidance_in", MODULATION)},
        BIASES: {"": _NO_EXTRAS},
        NORMS: {"": _NO_EXTRAS},
    },
    ("flux2", "comfy"): {
        _ADALN: {"diffusers": "does not swap the halves: another effect"},
        BIASES: {"": _NO_EXTRAS},
        NORMS: {"": _NO_EXTRAS},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """One part of a LoRA that some tools do not honour in a layout."""

    part: str
    names: tuple[str, ...]
    """The modules or parameters, by diffusers' names."""
    tools: Mapping[str, str]
    """Tool → what it does; an empty name stands for the layout itself."""
    refused: bool

    def __str__(self) -> str:
        what = "; ".join(f"{tool} {does}" if tool else does for tool, does in self.tools.items())
        return f"{self.part} ({some_of(self.names, 2)}): {what}"


def part_of(name: str, layout: Layout) -> str:
    """The part that an original's module belongs to: a row of the table."""
    if layout.units(name):
        return BLOCKS
    if "_stream_modulation" in name:
        return MODULATION
    return name if name.startswith("final_layer.") else name.split(".")[0]


def losses(state: AdapterState, format: str) -> tuple[Loss, ...]:
    """What of `state` some tool would not honour in a file of this layout."""
    layout, table = layout_of(state), DROPPED_BY.get((state.layout, format), {})
    parts: dict[str, list[str]] = {}
    for path in state.layers:
        if place := layout.place(path):
            parts.setdefault(part_of(place[0], layout), []).append(path)
    for name in state.extras:
        parts.setdefault(BIASES if name.endswith(".bias") else NORMS, []).append(name)
    return tuple(
        Loss(part, tuple(names), table[part], format == UNIVERSAL or "" in table[part])
        for part, names in parts.items()
        if part in table
    )


def require_writable(state: AdapterState, format: str) -> tuple[Loss, ...]:
    """What is to be warned about. AdapterError when a file of this layout would not have the LoRA's effect."""
    found = losses(state, format)
    refused = [str(loss) for loss in found if loss.refused]
    if refused:
        title = layout_of(state).title
        raise AdapterError(
            f"a {format} file for {title} would not act as the LoRA does: {'; '.join(refused)}",
            hint="write another format, or only the linears inside the blocks",
        )
    return found


def only_blocks(state: AdapterState) -> AdapterState:
    """The LoRA without what lies outside the blocks, and without extras; its notes say what was left out.

    AdapterError when nothing would be left.
    """
    layout = layout_of(state)

    def inside(path: str) -> bool:
        place = layout.place(path)
        return bool(place and layout.units(place[0]))

    kept = {path: layer for path, layer in state.layers.items() if inside(path)}
    if not kept:
        raise AdapterError("the LoRA has nothing inside the blocks", hint="convert it whole, to comfy or diffusers")
    left = [path for path in state.layers if path not in kept] + list(state.extras)
    notes = (*state.notes, f"{len(left)} parts outside the blocks are left out: {some_of(left)}") if left else ()
    return replace(state, layers=kept, extras={}, notes=notes or state.notes)


def support_table() -> str:
    """The table for the docs, in markdown: for each family, its parts and what becomes of them in each layout."""
    return "\n\n".join(f"**{layout.title}**\n\n{_table(layout)}" for layout in LAYOUTS.values())


def _table(layout: Layout) -> str:
    outside = dict.fromkeys(part_of(name, layout) for name in layout.outside)
    formats = [format for format in FORMATS if (layout.name, format) in DROPPED_BY]
    lines = ["| part | " + " | ".join(formats) + " |", "|---" * (len(formats) + 1) + "|"]
    for part in (BLOCKS, *outside, BIASES, NORMS):
        cells = [_cell(DROPPED_BY[layout.name, format], part, format) for format in formats]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(table: Mapping[str, Mapping[str, str]], part: str, format: str) -> str:
    tools = table.get(part, {})
    if not tools and format == "bfl":
        return "in complete control LoRAs"
    if not tools:
        return f"as {BLOCKS}" if BLOCKS in table else "all tools"
    if "" in tools:
        return "refused"
    by_effect: dict[str, list[str]] = {}
    for tool, does in tools.items():
        by_effect.setdefault(does, []).append(tool)
    words = "; ".join(f"{', '.join(names)}: {does}" for does, names in by_effect.items())
    return f"refused ({words})" if format == UNIVERSAL else words
