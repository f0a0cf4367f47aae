"""A picture of what the training bench found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from flux_ft.bench.train import TrainBench

COLOURS = {"A": "#aab4c0", "B": "#5b7083", "ours": "#d1495b"}
NAMES = {"A": "A: the peer's example", "B": "B: the peer, tuned"}
WITHOUT = ("#e3a857", "#7fa87a", "#6f9fc4", "#a58bbf")
"""Of ours with something switched off."""
LIMIT: dict[str, Any] = {"color": "#222222", "linewidth": 1, "linestyle": (0, (4, 2))}
TARGET: dict[str, Any] = {"color": "#5aa469", "alpha": 0.3, "linewidth": 0, "zorder": 0}


def plot(found: TrainBench) -> Figure:
    """Seconds a step of each cell, a panel each: a bar for each side with its spread from the 10th to the 90th
    percentile, a line for what the machine's own rate of matrix products allows, and the target where there is one."""
    rows = [row for row in found.rows() if "seconds" in row]
    goals = found.goals
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows))
    further = iter(WITHOUT * (1 + len(sides) // len(WITHOUT)))
    colours = {side: COLOURS.get(side) or next(further) for side in sides}
    lines = max(1, -(-len(cells) // 4))
    columns = max(1, -(-len(cells) // lines))
    figure = Figure(figsize=(1.2 + 2.6 * columns, 1.5 + 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(cells) :]:
        panel.set_visible(False)
    for cell, axes in zip(cells, panels, strict=False):
        _panel(axes, cell, [row for row in rows if row["cell"] == cell], colours)
        for goal in goals:
            if (goal["cell"], goal["figure"]) == (cell, "seconds"):
                axes.axhspan(goal["excellent"], goal["must"], **TARGET)
                axes.set_ylim(top=max(axes.get_ylim()[1], 1.05 * goal["must"]))
    for index in range(0, len(cells), columns):
        panels[index].set_ylabel("seconds a step: median, 10 to 90 %", fontsize=8)
    marks: list[Artist] = [Patch(color=colour, label=NAMES.get(side, side)) for side, colour in colours.items()]
    marks += [Patch(**TARGET, label="target, from excellent to must")] if goals else []
    marks.append(Line2D([], [], **LIMIT, label="the model's operations at this machine's own rate"))
    figure.legend(handles=marks, loc="outside lower center", ncols=min(2, columns), frameon=False, fontsize=8)
    figure.suptitle(f"{found.model}, on {found.device}", fontsize=10)
    return figure


def _panel(axes: Any, cell: str, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    for place, row in enumerate(rows):
        middle = row["seconds"]
        spread = [[middle - row["p10"]], [row["p90"] - middle]]
        bar = axes.bar(
            place, middle, 0.72, yerr=spread, color=colours[row["side"]],
            error_kw={"ecolor": "#555555", "elinewidth": 0.8, "capsize": 2},
        )  # fmt: skip
        axes.bar_label(bar, [f"{middle:#.3g}"], fontsize=7, padding=2)
    if rows[0]["limit_s"]:
        axes.axhline(rows[0]["limit_s"], **LIMIT)
    centre, half = (len(rows) - 1) / 2, max(2, len(rows) - 1) / 2 + 0.7  # a lone bar is no wider
    axes.set_xlim(centre - half, centre + half)
    axes.set_ylim(0, 1.15 * max(row["p90"] for row in rows))
    axes.set_xticks([])
    axes.set_title(cell, fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
