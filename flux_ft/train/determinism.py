"""Strict and fast: what makes a run repeat bit for bit on one machine, and what its bits depend on besides.

Strict takes the kernels whose sums have one order, which torch chooses by `use_deterministic_algorithms`, and does
without cuDNN's attention, whose backward pass has none such. Fast takes whatever torch takes by itself.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND

from flux_ft import __version__
from flux_ft.errors import ConfigError

Mode = Literal["strict", "fast"]

LIBRARIES = ("torch", "accelerate", "peft", "diffusers", "transformers", "bitsandbytes", "triton")
CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACE = ":4096:8"
"""32 MiB in a form that keeps cuBLAS from sharing work differently from call to call."""
CPU_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""Each makes the CPU's libraries take other instructions, which round otherwise."""


def resolve(setting: str, device_type: str) -> Mode:
    """The run file's `determinism` on this kind of device: `auto` is strict where that costs next to nothing."""
    if setting == "auto":
        return "strict" if device_type == "cpu" else "fast"
    return cast(Mode, setting)


def prepare_environment() -> None:
    """Set what cuBLAS reads once, at the first matrix product of the process on a GPU; a user's own setting stays.

    In both modes, since a strict run may follow a fast one in the same process.
    """
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)


@contextmanager
def applied(mode: Mode, device: torch.device) -> Iterator[None]:
    """Work in this mode; afterwards, whatever happened, torch is as it was. Fast changes nothing.

    Raises ConfigError where strict is out of reach: the GPU was used before `prepare_environment`, or diffusers was
    told to take attention from elsewhere.
    """
    prepare_environment()
    before = {name: read() for name, (read, _) in _FLAGS.items()}
    try:
        if mode == "strict":
            _require_torch_attention(DIFFUSERS_ATTN_BACKEND)
            _set(_STRICT)
            _require_cublas(device)
        yield
    finally:
        _set(before)


def _set_deterministic(enabled_and_warns: tuple[bool, bool]) -> None:
    enabled, warns = enabled_and_warns
    torch.use_deterministic_algorithms(enabled, warn_only=warns)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


_cuda: Any = torch.backends.cuda  # its functions have no types, nor those of the next
_cudnn: Any = torch.backends.cudnn
_FLAGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "algorithms": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    # It fills what is about to be written anyway; that finds mistakes, and takes time.
    "fill": _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),
    "benchmark": _attribute(torch.backends.cudnn, "benchmark"),
    "convolutions": _attribute(torch.backends.cudnn, "deterministic"),
    "cudnn attention": (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
}  # fmt: skip
_STRICT = {
    "algorithms": (True, False), "fill": False, "benchmark": False, "convolutions": True, "cudnn attention": False,
}  # fmt: skip


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        _FLAGS[name][1](value)


def _require_torch_attention(backend: str) -> None:
    if backend != "native":
        raise ConfigError(
            f"`determinism: strict` works with torch's attention alone, and DIFFUSERS_ATTN_BACKEND is {backend!r}",
            hint="remove it from the environment and start again, or train with `determinism: fast`",
        )


def _require_cublas(device: torch.device, multiply: Callable[[torch.Tensor], Any] = lambda one: one @ one) -> None:
    """Raise ConfigError unless torch lets cuBLAS work in strict mode; torch tells by refusing a product."""
    if device.type != "cuda":
        return
    try:
        multiply(torch.ones(2, 2, device=device))
    except RuntimeError as error:
        if CUBLAS_VARIABLE not in str(error):
            raise
        value = os.environ.get(CUBLAS_VARIABLE)
        raise ConfigError(
            f"`determinism: strict` needs {CUBLAS_VARIABLE}={CUBLAS_WORKSPACE} in the environment before the GPU first "
            f"computes, and {'it came too late' if value == CUBLAS_WORKSPACE else f'it is {value!r}'}",
            hint="set it and start again, or train with `determinism: fast`",
        ) from error


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits: NaN equals itself, 0 is not -0."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(whole), other.contiguous().view(whole))


def circumstances(device: torch.device, processes: int, mode: Mode) -> dict[str, str | int]:
    """What a run's last bits depend on besides its settings and data, for people to read and for runs to compare.

    To be asked for inside `applied`, so that the flags are those in force. It holds nothing that tells machines of one
    make apart.
    """
    facts: dict[str, str | int] = {
        "flux_ft version": __version__,
        **{f"{name} version": version for name in LIBRARIES if (version := _version(name))},
        "Python version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "platform": f"{platform.system()} {platform.machine()}",
        # The noise is drawn on the CPU, on whatever device the rest is done.
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in CPU_VARIABLES if os.environ.get(name)},
        "processes": processes,
        "determinism": mode,
        "deterministic algorithms": "on" if torch.are_deterministic_algorithms_enabled() else "off",
        "attention kernels allowed": ", ".join(_attention_kernels()),
        "diffusers attention": DIFFUSERS_ATTN_BACKEND,
        "matrix products": _product_precision(),
    }
    if platform.system() == "Darwin":  # the system's own library multiplies matrices there
        facts["macOS version"] = platform.mac_ver()[0]
    if device.type == "cpu":
        facts |= {"CPU model": _cpu_model(), "CPU threads": torch.get_num_threads()}
    elif device.type == "cuda":
        facts |= _cuda_facts(device, processes)
    return facts


def _cuda_facts(device: torch.device, processes: int) -> dict[str, str | int]:
    facts: dict[str, str | int] = {
        "GPU": torch.cuda.get_device_name(device),
        "CUDA version": torch.version.cuda or torch.version.hip or "unknown",
        "cuDNN version": _cudnn.version() or "none",
        "GPU driver version": _driver_version(),
        "cuDNN benchmark": "on" if torch.backends.cudnn.benchmark else "off",
        "cuDNN deterministic": "on" if torch.backends.cudnn.deterministic else "off",
        CUBLAS_VARIABLE: os.environ.get(CUBLAS_VARIABLE, "none"),
    }
    if processes > 1 and torch.distributed.is_nccl_available():
        facts["NCCL version"] = ".".join(map(str, cast(Any, torch.cuda.nccl).version()))
    return facts


def _attention_kernels() -> list[str]:
    allowed = {
        "flash": _cuda.flash_sdp_enabled(),
        "efficient": _cuda.mem_efficient_sdp_enabled(),
        "math": _cuda.math_sdp_enabled(),
        "cuDNN": _cuda.cudnn_sdp_enabled(),
    }
    return [name for name, is_allowed in allowed.items() if is_allowed]


def _product_precision() -> str:
    """Torch refuses to tell by one interface what was set by its other one, so both are asked."""
    told = []
    for name in ("allow_tf32", "fp32_precision", "allow_bf16_reduced_precision_reduction"):
        try:
            told.append(f"{name} {getattr(_cuda.matmul, name)}")
        except (RuntimeError, AttributeError):
            continue
    return ", ".join(told)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if platform.system() == "Darwin":
        return _told_by("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _driver_version() -> str:
    told = _told_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return told.splitlines()[0].strip() if told else "unknown"


def _told_by(*command: str) -> str:
    """What a program prints; nothing where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
