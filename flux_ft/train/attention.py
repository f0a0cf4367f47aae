"""Attention kernels: each is tried on a run's own sizes at its start, and the fastest that is right is taken.

What a kernel is good for differs by card, driver and library, and some have returned wrong gradients on new cards; a
test of a second tells.

Shapes in names: B pictures, N tokens, H heads, E features of a head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch import Tensor, nn

from flux_ft import log
from flux_ft.errors import ConfigError, first_line
from flux_ft.train.determinism import Mode, same_bits

KERNELS = {
    "native": "native", "cudnn": "_native_cudnn", "flash": "_native_flash", "efficient": "_native_efficient",
    "flash3": "_flash_3",
}  # fmt: skip
"""As `speed.attention` names them, with diffusers' names. "native" is what torch takes by itself."""
STRICT = ("native", "flash", "efficient")
"""Those that have a backward pass whose sums have one order."""
PASSES = {"fast": 6, "strict": 12}
"""Forwards and backwards for each kernel; the first is not timed."""
LARGEST_ERROR = {torch.float32: 1e-3}
"""Of output and gradients against float32, relative and in the mean square; other dtypes have OTHERS_ERROR."""
OTHERS_ERROR = 2e-2
ROWS = 1024
"""Queries whose scores against all keys are in memory at once, in float32."""
FACT = "attention kernel"
Shape = tuple[int, int, int, int]
"""(B, N, H, E)."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From query, key and value (B, N, H, E) to the output (B, N, H, E)."""


@dataclass(frozen=True)
class Trial:
    """One kernel, tried."""

    seconds: float = 0.0
    """Of a pass forwards and backwards: the shortest."""
    refused: str = ""
    """Why it cannot be taken."""
    wrong: bool = False
    """It ran, and its numbers are not to be trusted."""


def offered() -> dict[str, Attend]:
    """All KERNELS, as diffusers' models call them."""
    return {
        name: partial(dispatch_attention_fn, backend=AttentionBackendName(theirs)) for name, theirs in KERNELS.items()
    }


def choose_attention(
    setting: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    mode: Mode = "fast",
    recorded: str | None = None,
    kernels: Mapping[str, Attend] | None = None,
) -> str:
    """Which kernel a run takes, by `speed.attention` and a trial, which is told in a line.

    Of "auto" that is what the run began with, if that is `recorded` and still good, else the fastest. Raises
    ConfigError for a named one that cannot be taken here.
    """
    kernels = kernels or offered()
    if setting == "auto":
        names = [name for name in kernels if mode == "fast" or name in STRICT]
        trials = try_kernels({name: kernels[name] for name in [recorded] if name in names}, shape, device, dtype, mode)
        if not _good(trials):
            trials = try_kernels({name: kernels[name] for name in names}, shape, device, dtype, mode)
    else:
        trials = {setting: Trial(refused="its backward pass has no form that repeats, as `determinism: strict` asks")}
        if mode == "fast" or setting in STRICT:
            trials = try_kernels({setting: kernels[setting]}, shape, device, dtype, mode)
    for name, trial in trials.items():
        if trial.wrong and setting == "auto":
            log.warn(f"attention: {name} is left out: {trial.refused}")
    found = _good(trials)
    if not found:
        raise ConfigError(
            f"`speed.attention: {setting}` cannot be used here: "
            + "; ".join(f"{name}: {trial.refused}" for name, trial in trials.items()),
            hint="set `speed.attention` to native, or to another kernel" + " or auto" * (setting != "auto"),
        )
    best = min(found, key=found.__getitem__)
    others = [f"{name} {seconds * 1e3:.3g} ms" for name, seconds in found.items() if name != best]
    log.say(
        f"attention: {best}, {found[best] * 1e3:.3g} ms forwards and backwards for {shape[0]} × {shape[1]:,} tokens"
        + (f" ({', '.join(others)})" if others else "")
    )
    return best


def try_kernels(
    kernels: Mapping[str, Attend], shape: Shape, device: torch.device, dtype: torch.dtype, mode: Mode = "fast"
) -> dict[str, Trial]:
    """Each kernel forwards and backwards on random numbers, timed, and compared with float32.

    Compared are one head of the first picture and one of the last. In strict mode all passes must give the same bits.
    Raises ConfigError for one after whose failure the device does nothing more in this process.
    """
    generator = torch.Generator(device).manual_seed(0)
    numbers = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)]
    places = [(0, 0), (shape[0] - 1, shape[2] - 1)]
    expected = {place: exact_attention(*(one[place[0], :, place[1]] for one in numbers)) for place in places}

    def attempt(name: str, attend: Attend) -> Trial:
        seconds, first = [], None
        try:
            for _ in range(PASSES[mode]):
                took, found = timed(partial(_forwards_and_backwards, attend, *numbers), device)
                if first is None:
                    first = found
                    continue
                seconds.append(took)
                if mode == "strict" and not all(map(same_bits, first, found)):
                    return Trial(refused="its bits are not the same each time", wrong=True)
        except Exception as error:  # noqa: BLE001 (each that is not for this machine says so in its own way)
            _require_sane(device, name, error)
            return Trial(refused=first_line(error))
        assert first is not None
        pairs = [
            (one, other[picture, :, head].float())
            for (picture, head), exact in expected.items()
            for one, other in zip(exact, first, strict=True)
        ]
        apart = max(float((one - other).norm() / one.norm()) for one, other in pairs)
        limit = LARGEST_ERROR.get(dtype, OTHERS_ERROR)
        if not apart <= limit:  # nor NaN
            return Trial(refused=f"its numbers are {apart:.1%} off, {limit:.1%} are allowed", wrong=True)
        return Trial(min(seconds))

    return {name: attempt(name, attend) for name, attend in kernels.items()}


def exact_attention(query_NE: Tensor, key_NE: Tensor, value_NE: Tensor, grad_NE: Tensor) -> tuple[Tensor, ...]:
    """Output of one head, and the gradients of query, key and value for an output gradient; in float32, all (N, E).

    softmax(Q Kᵀ / √E) V and its derivatives written out, some rows of Q at a time.
    """
    query_NE, key_NE, value_NE, grad_NE = (one.float() for one in (query_NE, key_NE, value_NE, grad_NE))
    scale = query_NE.shape[1] ** -0.5
    key_grad_NE, value_grad_NE = torch.zeros_like(key_NE), torch.zeros_like(value_NE)
    outs, query_grads = [], []
    for query, grad in zip(torch.split(query_NE, ROWS), torch.split(grad_NE, ROWS), strict=True):
        shares = (scale * query @ key_NE.t()).softmax(dim=1)
        outs.append(shares @ value_NE)
        slopes = grad @ value_NE.t()
        slopes = scale * shares * (slopes - (slopes * shares).sum(dim=1, keepdim=True))
        query_grads.append(slopes @ key_NE)
        key_grad_NE += slopes.t() @ query
        value_grad_NE += shares.t() @ grad
    return torch.cat(outs), torch.cat(query_grads), key_grad_NE, value_grad_NE


def set_attention(denoiser: nn.Module, name: str) -> None:
    """Let a diffusers model attend by this one of KERNELS, in previews too.

    As its `set_attention_backend` does, which besides would change it for every other model of the process.
    """
    for module in denoiser.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName(KERNELS[name])


def prepare_attention(
    denoiser: nn.Module,
    setting: str,
    pictures: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    mode: Mode,
    recorded: str | None = None,
) -> dict[str, str]:
    """Choose a run's kernel and set it; returns what is to be recorded of that, nothing where nothing was chosen.

    `pictures` of `tokens` are the largest batch. Raises ConfigError for a kernel that cannot be taken here.
    """
    if device.type != "cuda":
        if setting not in ("auto", "native"):
            raise ConfigError(
                f"`speed.attention: {setting}` needs a GPU of the CUDA or ROCm kind, and this run is on {device.type}",
                hint="leave `speed.attention` out, or set it to native",
            )
        return {}
    if setting == "auto" and DIFFUSERS_ATTN_BACKEND != "native":  # chosen by the user's environment
        return {}
    shape: Any = denoiser.config
    sizes = pictures, tokens, shape.num_attention_heads, shape.attention_head_dim
    name = choose_attention(setting, sizes, device, dtype, mode, recorded)
    (name,) = broadcast_object_list([name])  # the first process's: times may differ
    set_attention(denoiser, name)
    return {FACT: name}


def timed(act: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How long something takes, the device's share included, and what it returns."""
    _wait_for(device)
    began = time.perf_counter()
    found = act()
    _wait_for(device)
    return time.perf_counter() - began, found


def _good(trials: Mapping[str, Trial]) -> dict[str, float]:
    return {name: trial.seconds for name, trial in trials.items() if not trial.refused}


@torch.enable_grad()
def _forwards_and_backwards(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    inputs = [one.detach().requires_grad_() for one in (query, key, value)]
    out = attend(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad))


def _require_sane(device: torch.device, name: str, error: Exception) -> None:
    try:
        _wait_for(device)
    except Exception as again:  # noqa: BLE001
        raise ConfigError(
            f"the attention kernel {name} fails in a way after which this process can use the GPU no more: "
            f"{first_line(again)}",
            hint="start again with `speed.attention: native`, or another that is not this one",
        ) from error


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
