"""What a step on one H100 of 80 GB should take, at FLUX.1-dev's shapes, rank 16 on all linears of the blocks, in bf16.

Elsewhere these figures say nothing: there, each row's share of the machine's own rate does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

Figure = Literal["seconds", "peak_gb", "times A", "times B", "times uncapped", "job_s"]
"""What is judged: a step; its peak memory; how many times faster than a peer; how many times a step of the same cell
without a cap; a whole job."""
JOB = "job"
UNCAPPED = "full-1024-b1-full"


@dataclass(frozen=True)
class Goal:
    """A figure that is excellent, and one that must be reached."""

    cell: str
    figure: Figure
    excellent: float
    must: float

    @property
    def less_is_better(self) -> bool:
        return self.figure not in ("times A", "times B")


GOALS = (
    Goal("lora-1024-b1-auto", "seconds", 0.33, 0.40),
    Goal("lora-1024-b1-full", "seconds", 0.45, 0.56),
    Goal("lora-1024-b1-full", "peak_gb", 28.5, 28.5),
    Goal("lora-1024-b4-full", "seconds", 1.80, 2.2),
    Goal("lora-512-b1-auto", "seconds", 0.092, 0.14),
    Goal("lora-512-b4-auto", "seconds", 0.34, 0.42),
    Goal("lora-1024-b1-auto-fp8compute", "seconds", 0.26, 0.33),
    Goal("lora-512-b1-full-nf4", "peak_gb", 8.0, 8.5),
    Goal(UNCAPPED, "seconds", 0.55, 0.70),
    Goal(UNCAPPED, "peak_gb", 29.0, 29.0),
    Goal(f"{UNCAPPED}-24gb", "times uncapped", 1.3, 2.0),
    Goal("lora-1024-b1-auto", "times A", 3.0, 2.0),
    Goal("lora-1024-b1-auto", "times B", 1.25, 1.05),
    Goal(JOB, "job_s", 130.0, 180.0),
)
TARGET_CELLS = tuple(dict.fromkeys(goal.cell for goal in GOALS if goal.cell != JOB))


def judged(rows: Sequence[Mapping[str, Any]], job_s: float | None = None) -> list[dict[str, Any]]:
    """Each goal whose cell is among `rows`, with what was measured, None if it was not, and "excellent", "must" or
    "missed"."""
    ours = {row["cell"]: row for row in rows if row["side"] == "ours"}
    found = []
    for goal in GOALS:
        if goal.cell not in ours and not (goal.cell == JOB and job_s is not None):
            continue
        value = job_s if goal.figure == "job_s" else _measured(goal, ours, rows)
        verdict = None if value is None else _verdict(goal, value)
        found.append(asdict(goal) | {"measured": value, "verdict": verdict})
    return found


def _measured(goal: Goal, ours: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    row = ours[goal.cell]
    if goal.figure in ("seconds", "peak_gb"):
        return cast(float | None, row.get(goal.figure))
    if goal.figure == "times uncapped":
        uncapped = ours.get(UNCAPPED, {}).get("seconds")
        return row["seconds"] / uncapped if uncapped and "seconds" in row else None
    peer = goal.figure.removeprefix("times ")
    return next((one.get("ours_is_faster") for one in rows if (one["cell"], one["side"]) == (goal.cell, peer)), None)


def _verdict(goal: Goal, value: float) -> str:
    sign = 1 if goal.less_is_better else -1
    reached = [name for name in ("excellent", "must") if sign * value <= sign * getattr(goal, name)]
    return reached[0] if reached else "missed"


def for_people(goals: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each."""
    return [
        f"target {goal['cell']:<28} {goal['figure']:<14} excellent {goal['excellent']:g}, must {goal['must']:g}: "
        + ("not measured" if goal["measured"] is None else f"{goal['measured']:.4g}, {goal['verdict']}")
        for goal in goals
    ]
