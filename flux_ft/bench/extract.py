"""How fast a LoRA is taken out of FLUX.1's matrices, beside exact SVDs of the same matrices in the same run.

There is one matrix of each shape, made up: weights of standard deviation 0.02 in bf16, and a change whose singular
values fall off as a power law, so that rounding adds its noise as in a real pair. Times of the whole model follow from
how often each shape occurs; that is an extrapolation, and the figures say so.

Shapes in names: O out features, I in features, K directions of the change.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flux_ft.adapters.checkpoint_files import Checkpoint, Weight, stored_in
from flux_ft.adapters.extract import ExtractionReport, Options, difference, extract
from flux_ft.flow import keyed_generator

WIDTH = 3072
KINDS: dict[str, tuple[int, int, int]] = {
    "double_blocks.0.img_attn.proj": (1, 1, 2 * 19),
    "double_blocks.0.img_attn.qkv": (3, 1, 2 * 19 + 38),  # and the modulation of single blocks
    "double_blocks.0.img_mlp.0": (4, 1, 2 * 19),
    "double_blocks.0.img_mlp.2": (1, 4, 2 * 19),
    "double_blocks.0.img_mod.lin": (6, 1, 2 * 19),
    "single_blocks.0.linear1": (7, 1, 38),
    "single_blocks.0.linear2": (1, 5, 38),
}
"""A module of each shape: O and I in units of the width, and how many of that shape FLUX.1 has."""
_DIRECTIONS = 256

Clock = Callable[[], float]


def bench_extraction(
    rank: int = 32, width: int = WIDTH, device: torch.device | None = None, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Ours on every shape, then exact SVDs, then ours again; ours reads the two files, the SVD finds Δ in memory.

    `peak_rss_mb` is the process's after the first of the three, libraries and all; None where it cannot be asked. Files
    of 1.1 GB are written to the temporary folder, so reading comes from the page cache.
    """
    if rank < 1 or width < 16:
        raise ValueError("rank is at least 1, width at least 16")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(rank=rank)
    with tempfile.TemporaryDirectory() as folder:
        pairs = {name: _pair(Path(folder), name, width) for name in KINDS}
        first = {name: _ours(pair, options, device, clock) for name, pair in pairs.items()}
        peak = peak_rss_mb()
        exact = {name: _exact(name, pair, rank, device, clock) for name, pair in pairs.items()}
        again = {name: _ours(pair, options, device, clock) for name, pair in pairs.items()}
    rows: list[dict[str, Any]] = []
    for name, (out, into, count) in KINDS.items():
        seconds = [first[name][0], again[name][0]]
        report = first[name][1].layers[0]
        rows.append(
            {
                "module": name,
                "shape": [out * width, into * width],
                "count": count,
                "ours_s": [round(one, 4) for one in seconds],
                "exact_s": round(exact[name][0], 4),
                "ratio": round(exact[name][0] / statistics.mean(seconds), 2),
                "energy_kept": report.energy_kept,
                "error_over_least": report.residual / exact[name][1],
            }
        )
    ours_s = sum(row["count"] * statistics.mean(row["ours_s"]) for row in rows)
    exact_s = sum(row["count"] * row["exact_s"] for row in rows)
    return {
        "rank": rank,
        "width": width,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "kinds": rows,
        "whole_model": {
            "extrapolated": True,
            "matrices": sum(row["count"] for row in rows),
            "entries": sum(row["count"] * row["shape"][0] * row["shape"][1] for row in rows),
            "ours_s": round(ours_s, 1),
            "exact_s": round(exact_s, 1),
            "ratio": round(exact_s / ours_s, 2),
        },
        "peak_rss_mb": peak,
    }


def summary_for_people(figures: dict[str, Any]) -> str:
    """What `bench_extraction` found, in a few lines."""
    whole = figures["whole_model"]
    lines = [
        f"rank {figures['rank']} on {figures['device']}, {figures['threads']} threads",
        "shape           count  ours s (twice)   exact s   ratio  error / least",
    ]
    for row in figures["kinds"]:
        shape = "×".join(map(str, row["shape"]))
        ours = " ".join(f"{one:.2f}" for one in row["ours_s"])
        lines.append(
            f"{shape:<14} {row['count']:6d}  {ours:>14}  {row['exact_s']:8.2f}  {row['ratio']:6.1f}  "
            f"{row['error_over_least']:13.4f}"
        )
    lines.append(
        f"extrapolated to {whole['matrices']} matrices ({whole['entries'] / 1e9:.2f} billion weights): "
        f"{whole['ours_s'] / 60:.1f} min, exact {whole['exact_s'] / 60:.1f} min, {whole['ratio']:.1f} times as long"
    )
    if figures["peak_rss_mb"] is not None:
        lines.append(f"peak memory of this process while ours ran: {figures['peak_rss_mb']:,} MB")
    return "\n".join(lines)


def peak_rss_mb(of_children: bool = False) -> int | None:
    """The most memory that this process, or any that it has started and that has ended, held so far, in 10⁶ bytes.

    None on Windows.
    """
    try:
        import resource
    except ImportError:
        return None
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * unit // 1_000_000


def _pair(folder: Path, name: str, width: int) -> tuple[Checkpoint, Checkpoint]:
    out, into, _ = KINDS[name]
    shape = (out * width, into * width)
    rng = keyed_generator(0, "bench", name)
    directions = min(_DIRECTIONS, width)
    base_OI = torch.randn(shape, generator=rng).mul_(0.02).bfloat16()
    up_OK = torch.randn(shape[0], directions, generator=rng) * torch.arange(1, directions + 1) ** -0.7
    change_OI = up_OK @ torch.randn(directions, shape[1], generator=rng)
    change_OI *= 2e-4 / change_OI[0].std()
    tuned_OI = change_OI.add_(base_OI).bfloat16()
    made = []
    for label, weight in (("base", base_OI), ("tuned", tuned_OI)):
        path = folder / f"{label}-{name}.safetensors"
        save_file({f"{name}.weight": weight}, path)
        weights = {one.key: Weight(one.key, (one,)) for one in stored_in(path)}
        made.append(Checkpoint(label, weights, original=True, files=(path,)))
    return made[0], made[1]


def _ours(
    pair: tuple[Checkpoint, Checkpoint], options: Options, device: torch.device, clock: Clock
) -> tuple[float, ExtractionReport]:
    began = clock()
    _, report = extract(*pair, options, device=device)
    return clock() - began, report


def _exact(
    name: str, pair: tuple[Checkpoint, Checkpoint], rank: int, device: torch.device, clock: Clock
) -> tuple[float, float]:
    """Seconds of a thin SVD, and the least relative error that any matrix of this rank has."""
    base, tuned = (one.weights[f"{name}.weight"].read().to(device) for one in pair)
    delta_OI = difference(base, tuned)
    began = clock()
    # Tall, which is the faster way for LAPACK: three times for the wide shapes.
    _, values, _ = torch.linalg.svd(delta_OI if len(delta_OI) >= delta_OI.shape[1] else delta_OI.T, full_matrices=False)
    values = values.cpu()  # waits for the device
    seconds = clock() - began
    squares = values.double().square()
    return seconds, float((squares[rank:].sum() / squares.sum()).sqrt())
