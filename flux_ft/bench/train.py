"""Seconds a training step: ours beside diffusers + peft + accelerate, as its example has it and as a careful user does.

Each side is a process of its own (`bench.sides`), in the order A, ours, B, ours, A, so that drift shows. Before a side
is timed, loss and LoRA gradients of its first step are held against the first side's; where they differ, the cell gets
no times. All is written to train.json after every cell of every side.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from flux_ft.adapters import lora
from flux_ft.bench.sides import OUT_OF_MEMORY, RANK, SIDES, Cell, Job, examples_of, family_of, run_config
from flux_ft.errors import ConfigError
from flux_ft.files import write_whole
from flux_ft.types import TextCond

ORDER = ("A", "ours", "B", "ours", "A")
FULL_CELLS = (
    "lora-512-b1-none", "lora-512-b4-none", "lora-1024-b1-none", "lora-1024-b1-selective", "lora-1024-b1-full",
    "lora-1024-b4-full", "full-1024-b1-full",
)  # fmt: skip
NARROW_CELLS = ("lora-64-b1-none", "lora-128-b4-full", "lora-256-b1-selective", "full-64-b1-full")
CHILD = "import flux_ft; flux_ft.quiet_libraries(); from flux_ft.bench import sides; sides.main()"
TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (2e-3, 0.05)}
"""Of the loss, and of the gradients' norm and distance, relative: by the base's dtype. In bfloat16 the peer's LoRA is
bfloat16 as well, and compiled blocks round less often."""


@dataclass
class TrainBench:
    """What has been measured so far."""

    model: str
    order: tuple[str, ...]
    settings: tuple[str, ...]
    began: str
    tflop: dict[str, float]
    """The model's own operations in one step of each cell, nothing counted twice: what MFU is reckoned by."""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    rates: list[dict[str, float]] = field(default_factory=list)
    """The machine's own, measured at the start of each turn."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Each cell in each turn: the `seconds` of its timed steps, `first_s`, `peak_gb`, the first step's `loss` and its
    gradients' `distance` from the first side's; or `why_not`."""
    refused: dict[str, str] = field(default_factory=dict)
    """Cells in which two sides did not compute the same: by how much they differed."""

    @property
    def ok(self) -> bool:
        """Whether all sides computed the same and came to their end; what is too large for a card is no fault."""
        return not self.refused and all(run.get("why_not") in (None, OUT_OF_MEMORY) for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"rows": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """Each cell on each side, all its turns together."""
        return [
            self._row(cell, side, runs)
            for cell in self.tflop
            for side in SIDES
            if (runs := [run for run in self.runs if (run["cell"], run["side"]) == (cell, side)])
        ]

    def _row(self, cell: str, side: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        turns = [run["seconds"] for run in runs if "seconds" in run]
        row: dict[str, Any] = {"cell": cell, "side": side}
        if not turns:
            return row | {"why_not": runs[-1]["why_not"]}
        own = [run for run in self.runs if (run["cell"], run["side"]) == (cell, "ours")]
        ours = [second for run in own for second in run.get("seconds", ())]
        low, middle, high = (float(one) for one in np.quantile(np.concatenate(turns), (0.1, 0.5, 0.9)))
        middles = [statistics.median(turn) for turn in turns]
        return row | {
            "seconds": middle,
            "p10": low,
            "p90": high,
            "turns_apart": max(middles) / min(middles) - 1 if len(turns) > 1 else None,
            "ours_is_faster": middle / statistics.median(ours) if ours else None,
            "mfu": self.tflop[cell] / middle / statistics.median(rate["matmul_tflops"] for rate in self.rates),
            "peak_gb": max((run["peak_gb"] for run in runs if run.get("peak_gb")), default=None),
            "first_s": [run["first_s"] for run in runs if "first_s" in run],
        }

    def for_people(self) -> str:
        """The table."""
        lines = [
            f"{self.model}, LoRA rank {RANK} on all linears of the blocks, on {self.device}; "
            + ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            "this machine's own: " + ", ".join(map(self._rate, ("matmul_tflops", "copy_gbps"))),
            f"{'cell':<24} side      s/step     10 to 90 %  ours is faster  turns apart     MFU  peak GB  first s",
        ]
        for row in self.rows():
            line = f"{row['cell']:<24} {row['side']:<5}"
            if "seconds" not in row:
                lines.append(f"{line}    {row['why_not']}")
                continue
            apart = "" if row["turns_apart"] is None else f"{row['turns_apart']:.1%}"
            ratio = "" if row["ours_is_faster"] is None or row["side"] == "ours" else f"{row['ours_is_faster']:.2f} ×"
            peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
            lines.append(
                f"{line} {row['seconds']:10.4f}   {row['p10']:.4f}–{row['p90']:.4f}  {ratio:>14}  "
                f"{apart:>11}  {row['mfu']:6.1%}  {peak:>7}  {row['first_s'][0]:7.1f}"
            )
        farthest = max((run.get("distance", 0.0) for run in self.runs), default=0.0)
        lines.append(f"first steps' gradients are at most {farthest:.1e} from the first side's, relative")
        return "\n".join([*lines, *(f"{cell} has no times: {why}" for cell, why in self.refused.items())])

    def _rate(self, name: str) -> str:
        found = [rate[name] for rate in self.rates]
        return f"{name} {min(found):.3g} to {max(found):.3g}" if found else f"{name} unknown"


def bench_train(
    full: bool = False,
    cells: Sequence[str] = (),
    output: Path = Path("bench-train"),
    *,
    steps: int = 10,
    order: Sequence[str] = ORDER,
    settings: Sequence[str] = (),
    seeds: Mapping[str, int] | None = None,
) -> TrainBench:
    """Measure `cells` (FULL_CELLS or NARROW_CELLS if none are given) on the sides in this order, `steps` timed steps.

    Writes train.json and train.png into `output`. `settings` are our run's, as `key=value`; `seeds` gives sides other
    noise, which must be found out. Raises ConfigError.
    """
    parsed = {name: Cell.parse(name) for name in cells or (FULL_CELLS if full else NARROW_CELLS)}
    if full and not torch.cuda.is_available():
        raise ConfigError("`--full` needs a CUDA card", hint="leave it out to measure narrow blocks here")
    if not order or not set(order) <= SIDES.keys():
        raise ConfigError(f"`--order {','.join(order)}` names no side", hint="such as A,ours,B,ours,A")
    jobs = []
    for side in order:  # the peer's full fine-tune, AdamW on all weights, takes over 95 GB
        names = tuple(name for name, cell in parsed.items() if side == "ours" or cell.kind == "lora")
        jobs.append(Job(side, names, full, steps, (seeds or {}).get(side, 0), tuple(settings)))
    with TemporaryDirectory() as folder:  # wrong settings are told before anything starts
        for cell in parsed.values():
            run_config(jobs[0], cell, Path(folder))
    output.mkdir(parents=True, exist_ok=True)
    found = TrainBench(
        model="FLUX.1-dev's size, random weights" if full else "FLUX.1's classes, narrow, random weights",
        order=tuple(order), settings=tuple(settings),
        began=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tflop={name: model_flops(full, cell.kind, cell.side_px) * cell.batch / 1e12 for name, cell in parsed.items()},
    )  # fmt: skip
    first: dict[str, Mapping[str, Any]] = {}
    for turn, job in enumerate(jobs):
        for run in _run_side(job, found, first) if job.cells else ():
            found.runs.append({"side": job.side, "turn": turn} | run)
            found.runs = [run for run in found.runs if run["cell"] not in found.refused]
            write_whole(output / "train.json", (json.dumps(found.as_json(), indent=1) + "\n").encode())
    plot(found).savefig(output / "train.png", dpi=120)
    return found


@functools.cache
def model_flops(full: bool, kind: str, side_px: int) -> int:
    """Floating-point operations of a step with one picture, forwards and backwards, counted on the meta device.

    Matrix products and attention, nothing twice; attention's backward counts as two of its forward.
    """
    family, meta = family_of(full), torch.device("meta")
    with meta:
        denoiser = FluxTransformer2DModel(guidance_embeds=True, **dict(family.shape))
    if kind == "lora":
        ranks = dict.fromkeys(family.lora_targets(denoiser), RANK)
        lora.inject(denoiser, lora.TRAINED, ranks, {path: float(rank) for path, rank in ranks.items()})
    blocks = tuple(family.blocks(denoiser))
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(name.startswith(blocks) if kind == "full" else f".{lora.TRAINED}." in name)
    example = examples_of(family, Cell(kind, side_px, 1, "none"))[0]
    text = TextCond(example.texts[0].embeds_BLD.to(meta), example.texts[0].pooled_BP.to(meta))
    with FlopCounterMode(display=False) as counter:
        latents, sigma = example.mean_CHW[None].to(meta), torch.empty(1, device=meta)
        velocity = family.predict_velocity(denoiser, latents, sigma, text, 1.0)
        torch.autograd.backward(velocity.float().square().mean())
    return int(counter.get_total_flops())


def compare(side: str, probe: Mapping[str, Any], first: Mapping[str, Any]) -> tuple[float, str]:
    """How far the gradients are from the first side's, relative; and in words why a side is refused, "" if it is not.

    What is missing or not a number is infinitely far.
    """
    own, other = probe["gradients"], first["gradients"]
    apart, length = math.inf, sum(value**2 for values in other.values() for value in values)
    if own.keys() == other.keys():
        apart = sum((a - b) ** 2 for place in own for a, b in zip(own[place], other[place], strict=True))
    found = [abs(probe[key] - first[key]) / abs(first[key] or math.nan) for key in ("loss", "norm")]
    found.append(math.sqrt(apart / (length or math.nan)) if own or other else 0.0)
    loss, norm, distance = (one if math.isfinite(one) else math.inf for one in found)
    of_loss, of_gradients = TOLERANCES[probe["dtype"]]
    if loss <= of_loss and max(norm, distance) <= of_gradients:
        return distance, ""
    return distance, (
        f"side {side} does not compute what the first side does; its first step's loss differs by {loss:.1e} "
        f"({of_loss:.0e} is allowed), its gradients' norm by {norm:.1e} and they themselves by {distance:.1e} "
        f"({of_gradients:.0e})"
    )


def plot(found: TrainBench) -> Figure:
    """Seconds a step of each cell, a bar for each side, with the spread from the 10th to the 90th percentile."""
    rows = [row for row in found.rows() if "seconds" in row]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    figure = Figure(figsize=(2 + 1.6 * len(cells), 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (side, colour) in enumerate({"A": "#9aa5b1", "B": "#5b7083", "ours": "#d1495b"}.items()):
        own = [row for row in rows if row["side"] == side]
        middles = [row["seconds"] for row in own]
        spread = [[row["seconds"] - row["p10"] for row in own], [row["p90"] - row["seconds"] for row in own]]
        places = [cells.index(row["cell"]) + 0.27 * (index - 1) for row in own]
        bars = axes.bar(places, middles, 0.25, yerr=spread, color=colour, label=side)
        axes.bar_label(bars, [f"{middle:.3g}" for middle in middles], fontsize=7)
    axes.set_xticks(range(len(cells)), [cell.replace("-", "\n", 1) for cell in cells], fontsize=8)
    axes.set_ylabel("seconds a step, median")
    axes.set_title(f"{found.model}, on {found.device}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _run_side(job: Job, found: TrainBench, first: dict[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What a child says, cell by cell; `first` holds what the first side computed. A child that dies is told of."""
    command, pipe = [sys.executable, "-c", CHILD], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8") as child:
        assert child.stdin is not None
        assert child.stdout is not None
        left, measured = list(job.cells), dict[str, Any]()
        try:
            _tell(child.stdin, json.dumps(asdict(job)))
            for message in map(json.loads, child.stdout):
                if "rates" in message:
                    found.device, found.versions = message["device"], message["versions"]
                    found.rates.append(message["rates"])
                elif "probe" in message:
                    cell, probe = message["cell"], message["probe"]
                    distance, why = compare(job.side, probe, first.setdefault(cell, probe))
                    if why:
                        found.refused.setdefault(cell, why)
                    measured = {"loss": probe["loss"], "distance": distance}
                    _tell(child.stdin, "leave out" if cell in found.refused else "go")
                else:
                    left.remove(message["cell"])
                    yield {"cell": message["cell"]} | measured | message["run"]
                    measured = {}
        except BrokenPipeError:
            pass  # its end is told below
        except BaseException:
            child.kill()
            raise
        code = child.wait()
    for cell in left:
        yield {"cell": cell, "why_not": f"ended with code {code}; its own words are above"}


def _tell(stdin: IO[str], line: str) -> None:
    stdin.write(line + "\n")
    stdin.flush()
