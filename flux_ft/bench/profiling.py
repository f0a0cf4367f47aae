"""Where a step's time goes, by kind of work: on a GPU its kernels and when none runs, on a CPU torch's operations.

step_s   a step, by the clock
kinds    seconds, share and calls of each kind, the waiting last; shares make 1, or more where streams overlap
top      the operations or kernels that take longest
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS = (
    ("optimizer", r"multi_tensor|\badam|adafactor|fusedadam|_foreach_"),
    ("elementwise and norms", r"^triton_(poi|red|per)"),  # named after all that they fuse, so asked before the others
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|cublas|wgmma|xmma|triton_tem|triton_mm|"
     r"::(add|b|_scaled_|_int_)?mm_?\b|::linear|::baddbmm|::mkldnn_linear"),
    ("unpacking of weights", r"dequantize|kdequant"),
    ("copies", r"memcpy|memset|copy|::cat\b|catarray|::clone|::contiguous"),
)  # fmt: skip
"""The first whose pattern is found in a kernel's or operation's name, any case."""
REST = "elementwise and norms"
WAITING = {"cuda": "no kernel runs", "cpu": "outside torch's operations"}
TOP = 25

Span = tuple[str, str, float]
"""Name, kind and length in seconds."""


def kind_of(name: str) -> str:
    """The kind of work that a kernel or an operation does, by its name."""
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), REST)


def profiled(step: Callable[[], object], steps: int, device: torch.device, step_s: float) -> dict[str, Any]:
    """Where the time of `step` goes, over `steps` calls. `step_s` is what one takes without being watched.

    On a GPU shares are of `step_s`, since kernels last as long when watched and the launching of them does not; on a
    CPU they are of the watched steps.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    began = time.perf_counter()
    with profile(activities=activities) as watched:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
        watched_s = (time.perf_counter() - began) / steps
    place = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [one for one in watched.events() or () if one.device_type == place and _is_work(one, on_gpu)]
    if on_gpu:
        spans = [(one.name, kind_of(one.name), one.time_range.elapsed_us() / 1e6) for one in events]
        busy = _covered([(one.time_range.start / 1e6, one.time_range.end / 1e6) for one in events])
        return summed(spans, busy, steps, step_s, WAITING["cuda"])
    spans = [(one.name, _kind_on_cpu(one), one.self_cpu_time_total / 1e6) for one in events]
    return summed(spans, sum(span[2] for span in spans), steps, watched_s, WAITING["cpu"])


def _is_work(event: Any, on_gpu: bool) -> bool:
    if on_gpu:
        return not getattr(event, "is_user_annotation", False)
    return "::" in event.name and not event.name.startswith(("autograd::", "torch::"))


def _kind_on_cpu(event: Any) -> str:
    kind, parent = kind_of(event.name), event.cpu_parent
    while parent is not None:
        kind = "optimizer" if parent.name.startswith("Optimizer.step") else kind
        parent = parent.cpu_parent
    return kind


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans from start to end."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summed(spans: Iterable[Span], busy_s: float, steps: int, step_s: float, waiting: str) -> dict[str, Any]:
    """The spans of some steps by kind and by name. In `busy_s` of them something ran, the rest is `waiting`."""
    kinds, names = defaultdict[str, list[float]](list), defaultdict[tuple[str, str], list[float]](list)
    for name, kind, length in spans:
        kinds[kind].append(length)
        names[kind, name].append(length)
    whole = max(step_s, busy_s / steps)
    lengths = sorted(((kind, sum(each), len(each)) for kind, each in kinds.items()), key=lambda one: -one[1])
    lengths.append((waiting, whole * steps - busy_s, 0))
    rows = [
        {"kind": kind, "seconds": length / steps, "share": length / steps / whole, "calls": count / steps}
        for kind, length, count in lengths
    ]
    longest = sorted(names.items(), key=lambda one: -sum(one[1]))[:TOP]
    top = [
        {"name": name, "kind": kind, "seconds": sum(each) / steps, "calls": len(each) / steps}
        for (kind, name), each in longest
    ]
    return {"step_s": whole, "kinds": rows, "top": top}


def for_people(found: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [f"a step takes {found['step_s'] * 1e3:.2f} ms", f"{'kind':<28}{'ms':>10}{'share':>9}{'calls':>10}"]
    for row in found["kinds"]:
        lines.append(f"{row['kind']:<28}{row['seconds'] * 1e3:10.3f}{row['share']:9.1%}{row['calls']:10.0f}")
    lines += ["", f"{'ms':>10}{'calls':>8}  {'kind':<24}name"]
    for row in found["top"]:
        lines.append(f"{row['seconds'] * 1e3:10.3f}{row['calls']:8.0f}  {row['kind']:<24}{row['name'][:100]}")
    return "\n".join(lines) + "\n"
