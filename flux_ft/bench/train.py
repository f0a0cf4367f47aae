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
import re
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
from torch.utils.flop_counter import FlopCounterMode

from flux_ft.adapters import lora
from flux_ft.bench import profiling, targets
from flux_ft.bench.plot import plot
from flux_ft.bench.sides import (
    NOT_HERE,
    OURS,
    OUT_OF_MEMORY,
    QUICKSTART,
    RANK,
    SIDES,
    Cell,
    Job,
    examples_of,
    family_of,
    run_config,
)
from flux_ft.errors import ConfigError
from flux_ft.files import write_whole
from flux_ft.types import TextCond

ORDER = ("A", OURS, "B", OURS, "A")
SWITCHES = ("speed.fused_lora=false", "speed.fused_attention=false", "speed.attention=native", "speed.compile=off")
ABLATION = (OURS, *(f"{OURS} {switch}" for switch in SWITCHES), OURS)
"""Ours, ours with each optimisation switched off, and ours again."""
FULL_CELLS = (
    "lora-512-b1-none", "lora-512-b4-none", "lora-1024-b1-none", "lora-1024-b1-selective", "lora-1024-b1-full",
    "lora-1024-b4-full", "full-1024-b1-full",
)  # fmt: skip
NARROW_CELLS = (
    "lora-64-b1-none", "lora-128-b4-full", "lora-256-b1-selective", "lora-64-b1-none-int8", "full-64-b1-full",
)  # fmt: skip
CHILD = "import flux_ft; flux_ft.quiet_libraries(); from flux_ft.bench import sides; sides.main()"
TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (2e-3, 0.05)}
"""Of the loss, and of the gradients' norm and distance, relative: by the base's dtype. In bfloat16 the peer's LoRA is
bfloat16 as well, and compiled blocks round less often."""


@dataclass
class TrainBench:
    """What has been measured so far."""

    full: bool
    model: str
    order: tuple[str, ...]
    settings: tuple[str, ...]
    began: str
    tflop: dict[str, float | None]
    """The model's own operations in one step of each cell, nothing counted twice: what MFU is reckoned by. None of the
    quickstart's."""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    rates: list[dict[str, float]] = field(default_factory=list)
    """The machine's own, measured at the start of each turn."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Each cell in each turn: the `seconds` of its timed steps, `cpu_s` of one by the process's own clock, `first_s`,
    `peak_gb`, on a CPU `operations` of a step, the first step's `loss` and how far that (`loss_apart`) and its
    gradients (`distance`) are from the first ones of the same problem, relative, None where there is nothing to compare
    with; or `why_not`."""
    refused: dict[str, str] = field(default_factory=dict)
    """Cells in which two sides did not compute the same: by how much they differed."""

    @property
    def ok(self) -> bool:
        """Whether all sides computed the same and came to their end; what a machine cannot do is no fault."""
        return not self.refused and all(
            run.get("why_not", OUT_OF_MEMORY).startswith((OUT_OF_MEMORY, NOT_HERE)) for run in self.runs
        )

    @property
    def goals(self) -> list[dict[str, Any]]:
        """The targets of the cells that were measured, at full size on the card that they are meant for."""
        meant = self.full and "H100" in self.device
        return targets.judged(self.rows()) if meant else []

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"rows": self.rows(), "goals": self.goals}

    def rows(self) -> list[dict[str, Any]]:
        """Each cell on each side, all its turns together."""
        return [
            self._row(cell, side, runs)
            for cell in self.tflop
            for side in sorted(dict.fromkeys(self.order), key=lambda side: list(SIDES).index(side.split()[0]))
            if (runs := [run for run in self.runs if (run["cell"], run["side"]) == (cell, side)])
        ]

    def _row(self, cell: str, side: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        turns = [run["seconds"] for run in runs if "seconds" in run]
        row: dict[str, Any] = {"cell": cell, "side": side}
        if not turns:
            return row | {"why_not": runs[-1]["why_not"]}
        own = [run for run in self.runs if (run["cell"], run["side"]) == (cell, OURS)]
        ours = [second for run in own for second in run.get("seconds", ())]
        low, middle, high = (float(one) for one in np.quantile(np.concatenate(turns), (0.1, 0.5, 0.9)))
        tflop, rate = self.tflop[cell], statistics.median(rate["matmul_tflops"] for rate in self.rates)
        limit = tflop and tflop / rate
        middles = [statistics.median(turn) for turn in turns]
        return row | {
            "seconds": middle,
            "p10": low,
            "p90": high,
            "turns_apart": max(middles) / min(middles) - 1 if len(turns) > 1 else None,
            "ours_is_faster": middle / statistics.median(ours) if ours else None,
            "limit_s": limit,
            "mfu": limit and limit / middle,
            "peak_gb": max((run["peak_gb"] for run in runs if run.get("peak_gb")), default=None),
            "planned_gb": next((gb for run in runs if (gb := run.get("facts", {}).get("planned_gb"))), None),
            "cpu_s": min((run["cpu_s"] for run in runs if "cpu_s" in run), default=None),
            "operations": next((run["operations"] for run in runs if "operations" in run), None),
            "loss_apart": next((run["loss_apart"] for run in runs if "loss_apart" in run), None),
            "distance": max((run["distance"] for run in runs if run.get("distance") is not None), default=None),
            "first_s": [run["first_s"] for run in runs if "first_s" in run],
        }

    def for_people(self) -> str:
        """The table."""
        wide = max(map(len, self.tflop), default=0), max(map(len, self.order), default=0)
        lines = [
            f"{self.model}, LoRA rank {RANK} on all linears of the blocks, on {self.device}; "
            + ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            f"this machine's own: a square product {self._rate('matmul_tflops')} TFLOP/s, "
            f"a copy {self._rate('copy_gbps')} GB/s",
            f"{'cell':<{wide[0]}}  {'side':<{wide[1]}}     s/step     10 to 90 %  ours is faster  turns apart  "
            "s at limit    MFU  peak GB (planned)  first s    CPU s  operations",
        ]
        for row in self.rows():
            line = f"{row['cell']:<{wide[0]}}  {row['side']:<{wide[1]}}"
            if "seconds" not in row:
                lines.append(f"{line}    {row['why_not']}")
                continue
            apart = "" if row["turns_apart"] is None else f"{row['turns_apart']:.1%}"
            ratio = "" if row["ours_is_faster"] is None or row["side"] == OURS else f"{row['ours_is_faster']:.2f} ×"
            peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
            peak += "" if row["planned_gb"] is None else f" ({row['planned_gb']:.2f})"
            limit = f"{row['limit_s']:10.4f}  {row['mfu']:5.1%}" if row["mfu"] else " " * 17
            lines.append(
                f"{line} {row['seconds']:10.4f}  {row['p10']:.4f} – {row['p90']:.4f}  {ratio:>13}  {apart:>11}  "
                f"{limit}  {peak:>17}  {row['first_s'][0]:7.1f}"
                + (f"  {row['cpu_s']:.4f}  {row['operations']:10d}" if row["operations"] else "")
                + (self._apart(row) if Cell.parse(row["cell"]).rounds_more else "")
            )
        compared = [run for run in self.runs if "distance" in run and not Cell.parse(run["cell"]).rounds_more]
        if len(compared) > len({Cell.parse(run["cell"]).problem for run in compared}):  # the first of each is itself
            farthest = max(run["distance"] for run in compared)
            lines.append(f"first steps' gradients are at most {farthest:.1e} from the first side's, relative")
        lines += targets.for_people(self.goals)
        return "\n".join([*lines, *(f"{cell} has no times: {why}" for cell, why in self.refused.items())])

    @staticmethod
    def _apart(row: Mapping[str, Any]) -> str:
        far = row["loss_apart"]
        if far is None:
            return "  compared with nothing"
        return f"  off the plain base's: loss {far:.1e}, gradients {row['distance']:.1e}"

    def _rate(self, name: str) -> str:
        found = [rate[name] for rate in self.rates]
        return f"{min(found):.3g} to {max(found):.3g}" if found else "unknown"


def bench_train(
    full: bool = False,
    cells: Sequence[str] = (),
    output: Path = Path("bench-train"),
    *,
    steps: int = 10,
    order: Sequence[str] = ORDER,
    settings: Sequence[str] = (),
    profile: bool = False,
    seeds: Mapping[str, int] | None = None,
) -> TrainBench:
    """Measure `cells` (FULL_CELLS or NARROW_CELLS if none are given) on the sides in this order, `steps` timed steps.

    "targets" stands for all cells that have one, at an eighth of their sides if not `full`. Writes train.json and
    train.png into `output`, and with `profile` where ours spends its time. `settings` are our run's, as `key=value`;
    `seeds` gives sides other noise, which must be found out. Raises ConfigError.
    """
    names = cells or (FULL_CELLS if full else NARROW_CELLS)
    parsed = {name: Cell.parse(name) for named in names for name in _meant_by(named, full)}
    if full and not torch.cuda.is_available():
        raise ConfigError("`--full` needs a CUDA card", hint="leave it out to measure narrow blocks here")
    for side in order or ("",):
        if side.split()[:1] != [OURS] and side not in SIDES:
            raise ConfigError(
                f"`--order {','.join(order)}`: `{side}` is no side",
                hint="write A, B, ours or `ours key=value`, such as A,ours,B,ours,A",
            )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"`--output {output}` is a file", hint="name a folder")
    jobs = []
    for side in order:
        own = tuple(name for name, cell in parsed.items() if side.startswith(OURS) or not cell.is_ours_alone)
        jobs.append(Job(side, own, full, steps, (seeds or {}).get(side, 0), tuple(settings), profile))
    with TemporaryDirectory() as folder:  # wrong settings are told before anything starts
        for job in jobs:
            for name in job.cells:
                run_config(job, parsed[name], Path(folder))
    output.mkdir(parents=True, exist_ok=True)
    found = TrainBench(
        full=full, model="FLUX.1-dev's size, random weights" if full else "FLUX.1's classes, narrow, random weights",
        order=tuple(order), settings=tuple(settings),
        began=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tflop={name: None if cell.kind == QUICKSTART else model_flops(full, cell.kind, cell.side_px) * cell.batch / 1e12
               for name, cell in parsed.items()},
    )  # fmt: skip
    first: dict[tuple[str, int, int], Mapping[str, Any]] = {}
    for turn, job in enumerate(jobs):
        for run in _run_side(job, found, first) if job.cells else ():
            _write_profile(output, job.side, run)
            found.runs.append({"side": job.side, "turn": turn} | run)
            found.runs = [run for run in found.runs if run["cell"] not in found.refused]
            write_whole(output / "train.json", (json.dumps(found.as_json(), indent=1) + "\n").encode())
    plot(found).savefig(output / "train.png", dpi=150)
    return found


def _meant_by(name: str, full: bool) -> Sequence[str]:
    if name != "targets":
        return (name,)
    return targets.TARGET_CELLS if full else [re.sub(r"512|1024", _eighth, cell) for cell in targets.TARGET_CELLS]


def _eighth(number: re.Match[str]) -> str:
    return str(int(number[0]) // 8)


def _write_profile(output: Path, side: str, run: dict[str, Any]) -> None:
    if (found := run.pop("profile", None)) is not None:
        name = re.sub(r"[^\w.=-]+", "-", f"profile-{run['cell']}-{side}")
        write_whole(output / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode())
        write_whole(output / f"{name}.txt", profiling.for_people(found).encode())


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


def _run_side(
    job: Job, found: TrainBench, first: dict[tuple[str, int, int], Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What a child says, cell by cell; `first` holds what was first computed of a problem. A child that dies is told
    of."""
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
                    measured = {"loss": probe["loss"]} | _held_against(first, cell, probe, job.side, found.refused)
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


def _held_against(
    first: dict[tuple[str, int, int], Mapping[str, Any]],
    name: str,
    probe: Mapping[str, Any],
    side: str,
    refused: dict[str, str],
) -> dict[str, float | None]:
    """How far a cell's first step is from the first one of its problem; too far is refused, but of coarser bases."""
    cell = Cell.parse(name)
    if cell.rounds_more and cell.problem not in first:
        return {"loss_apart": None, "distance": None}
    other = first.setdefault(cell.problem, probe)
    distance, why = compare(side, probe, other)
    if why and not cell.rounds_more:
        refused.setdefault(name, why)
    return {"loss_apart": abs(probe["loss"] - other["loss"]) / abs(other["loss"] or math.nan), "distance": distance}


def _tell(stdin: IO[str], line: str) -> None:
    stdin.write(line + "\n")
    stdin.flush()
