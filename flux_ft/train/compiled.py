"""Compiled blocks: each kind is compiled once and serves all blocks of its kind, in the passes that train.

What is drawn and measured goes through the blocks as they are: it takes other shapes, and would be compiled for itself.

A compiler decides by itself what of a block it keeps for the backward. With "none" it keeps what is quickest; with
"selective" it recomputes whatever is no matrix product and no attention, as `recompute` does, but within its kernels;
with "full" the compiled block is run again. Graphs of the blocks broken in pieces are not accepted, so nothing is left
uncompiled in silence.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, MutableMapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from flux_ft import log
from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError, first_line
from flux_ft.files import cache_folder
from flux_ft.train.attention import timed
from flux_ft.train.determinism import Mode
from flux_ft.train.fused_update import FusedUpdate, draw_noise
from flux_ft.train.optim import LARGE_PARAMETERS
from flux_ft.train.recompute import CHECKPOINTS, Policy

WORTHWHILE_STEPS = 100
"""Compiling takes a minute or two; it gains tenths of a second a step for models of LARGE_PARAMETERS."""
LARGEST_ERROR = {torch.float32: 1e-3}
"""Of a compiled block against the same uncompiled: relative, in the mean square; other dtypes have OTHERS_ERROR."""
OTHERS_ERROR = 5e-2
FACT, UPDATE_FACT = "compiled", "compiled update"


class CompiledBlocks:
    """What diffusers calls in place of a block in training, as `blocks(block, *inputs)`.

    A kind of block that comes with new shapes is tried first, forwards and backwards, against the block as it is; what
    fails or is wrong raises ConfigError where compiling is `required`, and else ends it for this run, aloud.
    """

    def __init__(
        self, policy: Policy, *, graphs: bool = False, required: bool = False, backend: str | Callable[..., Any] = ""
    ) -> None:
        """`graphs` replays the blocks as CUDA graphs. `backend` is another compiler than torch's inductor."""
        self._policy, self._graphs, self._required = policy, graphs, required
        self._recompute = CHECKPOINTS.get(policy)
        # Dropout takes the draws that it takes uncompiled.
        chosen = {"options": {"fallback_random": True, "triton.cudagraphs": graphs}}
        self._compile: Callable[..., Any] = partial(
            torch.compile, fullgraph=True, **({"backend": backend} if backend else chosen)
        )
        self._compiled: dict[type[nn.Module], Callable[..., Any]] = {}
        self._tried: set[tuple[Any, ...]] = set()
        self._held_still: set[nn.Module] = set()
        self.given_up = False

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        if not self.given_up:
            if self._graphs and block not in self._held_still:
                self._held_still.add(block)
                hold_still(block)
            inputs = _alike(inputs)
            kind = type(block), *(one.shape for one in inputs if isinstance(one, Tensor))
            if kind not in self._tried:
                self._tried.add(kind)
                self._try(block, inputs)
        if self.given_up:
            return block(*inputs) if self._recompute is None else self._recompute(block, *inputs)
        return self._run(block, *inputs)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        kind = type(block)
        if kind not in self._compiled:
            self._compiled[kind] = self._compile(kind.forward)
        if self._policy == "full":
            return checkpoint(self._compiled[kind], block, *inputs, use_reentrant=False)
        return self._compiled[kind](block, *inputs)

    def _try(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Compile for these shapes, or give up."""
        device = next(block.parameters()).device
        try:
            with _keeping_little(self._policy == "selective"):
                seconds, found = timed(partial(_forwards_and_backwards, self._run, block, inputs), device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (a compiler fails in many ways)
            self._give_up(_gist(error), error)
            return
        expected = _forwards_and_backwards(type(block).forward, block, inputs)
        limit = LARGEST_ERROR.get(expected[0][0].dtype, OTHERS_ERROR)
        apart = max(_apart(one, other) for one, other in zip(expected, found, strict=True))
        if not apart <= limit:  # nor NaN
            self._give_up(f"a compiled {type(block).__name__} is {apart:.1%} off, {limit:.1%} are allowed")
        elif seconds > 1:
            log.say(f"compiled {type(block).__name__} in {seconds:.0f} s")

    def _give_up(self, reason: str, error: Exception | None = None) -> None:
        _tell("the blocks are", reason, self._required, error)
        self.given_up = True
        self._compiled.clear()


def prepare_compile(
    denoiser: nn.Module,
    config: RunConfig,
    policy: Policy,
    device: torch.device,
    mode: Mode,
    *,
    streams: bool = False,
    processes: int = 1,
    shards: int = 1,
) -> dict[str, str]:
    """Compile a run's blocks if `speed.compile` says so, which happens in the first step.

    Returns what is to be recorded of that: nothing for blocks as they are. Raises ConfigError for what was asked for
    and cannot be done.
    """
    setting = config.speed.compile
    if setting == "off":
        return {}
    reason = why_not(config, policy, device, mode, streams=streams, shards=shards)
    if setting != "auto" and reason:
        raise ConfigError(
            f"`speed.compile: {setting}` cannot be done here: {reason}", hint="leave it out, or set it to off"
        )
    size = sum(parameter.numel() for parameter in denoiser.parameters())
    if setting == "auto" and (reason or not is_worthwhile(config.iterations, size, device, processes)):
        return {}
    keep_compiled()
    torch.compiler.reset()  # what an earlier run of this process compiled may keep more or less than this one shall
    graphs = setting == "graphs"
    if graphs:
        denoiser.register_forward_pre_hook(_begin_graphs)
    told: Any = denoiser
    told.enable_gradient_checkpointing(CompiledBlocks(policy, graphs=graphs, required=setting != "auto"))
    log.say("the blocks are compiled in the first step: a minute or two, and less the next time")
    return {FACT: "graphs" if graphs else "blocks"}


def prepare_update(
    config: RunConfig, optimizer: str, size: int, device: torch.device, mode: Mode, backend: str = "inductor"
) -> FusedUpdate | None:
    """Compile the update of a full fine-tune's bf16 weights by Adafactor, and try it; None where it stays as it is.

    Streamed blocks are no hindrance. Raises ConfigError where `speed.compile` asks for it and it fails.
    """
    setting, is_asked = config.speed.compile, config.speed.compile not in ("auto", "off")
    fits = config.finetune_type == "full" and optimizer == "adafactor" and config.full.rounding == "stochastic"
    worthwhile = is_asked or (setting == "auto" and is_worthwhile(config.iterations, size, device, 1))
    if not fits or not worthwhile or _lacks_order(device, mode) or _lacks_compiler(device):
        return None
    keep_compiled()
    try:
        update = FusedUpdate(backend)
        for shape in ((48, 64), (48,)):
            moved = [_moved_once(one, shape, device) for one in (FusedUpdate(None), update)]
            if not (apart := _apart(moved[:1], moved[1:])) <= OTHERS_ERROR:
                raise RuntimeError(f"a compiled update is {apart:.1%} off")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001
        _tell("the optimizer's update is", _gist(error), is_asked, error)
        return None
    return update


def _moved_once(update: FusedUpdate, shape: tuple[int, ...], device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    weight, gradient = torch.randn((2, *shape), generator=generator, device=device).bfloat16().unbind()
    weight = weight.clone()
    group = {"lr": 0.1, "decay_rate": -0.8, "weight_decay": 0.0}
    update({}, group, weight, gradient.clone(), draw_noise(weight, generator))
    return weight


def why_not(
    config: RunConfig, policy: Policy, device: torch.device, mode: Mode, *, streams: bool = False, shards: int = 1
) -> str | None:
    """Why a run's blocks cannot be compiled, or replayed as graphs if that is wished; None where they can."""
    if streams or shards > 1:
        return f"blocks that {'are streamed' if streams else 'are cut into shards'} are put together between their runs"
    if reason := _lacks_order(device, mode):
        return reason
    if config.speed.compile == "graphs":
        if device.type != "cuda":
            return f"CUDA graphs need a GPU, and this run is on {device.type}"
        if config.optim.accumulate > 1 or (config.prior.weight and config.prior.prompts):
            return "a graph's results last until the next pass, and `optim.accumulate` and `prior` add several up"
        if policy == "full":
            return "`memory.recompute: full` runs blocks out of their order; graphs go with none and selective"
    return None if device.type == "mps" else _lacks_compiler(device)


def is_worthwhile(iterations: int, size: int, device: torch.device, processes: int) -> bool:
    """Whether compiling gains more than it takes, by all that is known beforehand."""
    return device.type == "cuda" and processes == 1 and size >= LARGE_PARAMETERS and iterations >= WORTHWHILE_STEPS


def keep_compiled(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let inductor and Triton keep what they compile in our cache, so that the next run starts soon.

    A folder that the user has set stays; so does torch's own, in the system's temporary files, where we have none.
    """
    folder = cache_folder(environment)
    if folder is None:
        return
    try:
        (folder / "compiled").mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
    environment.setdefault("TRITON_CACHE_DIR", str(folder / "compiled" / "triton"))


def _tell(what: str, reason: str, is_asked: bool, error: Exception | None) -> None:
    """Say that something is not compiled, or raise ConfigError where that was asked for."""
    if is_asked:
        raise ConfigError(
            f"`speed.compile` does not work here: {reason}", hint="leave it out of the run file, or set it to off"
        ) from error
    log.warn(f"{what} not compiled, so training is slower: {reason}")


def _gist(error: Exception) -> str:
    return first_line(getattr(error, "inner_exception", error))  # which dynamo wraps


def _lacks_order(device: torch.device, mode: Mode) -> str | None:
    if device.type != "cuda" or mode == "fast":
        return None
    return "the compiler chooses kernels by their time, and `determinism: strict` is to have the same bits each time"


def _lacks_compiler(device: torch.device) -> str | None:
    if device.type == "cuda" and find_spec("triton") is None:
        return "the package triton is not installed"
    names = [os.environ.get("CC" if device.type == "cuda" else "CXX", ""), "cc", "gcc", "g++", "clang", "cl"]
    if sys.platform != "win32" and not any(shutil.which(name) for name in names if name):
        return "there is no C compiler, which the kernels' starters are built by"
    return None


def _begin_graphs(*_: Any) -> None:
    if torch.is_grad_enabled():  # without, no block is replayed
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def hold_still(block: nn.Module) -> None:
    """Tell CUDA graphs that a LoRA's groups keep their tensors where they lie; else each replay would copy them."""
    for module in block.modules():
        for group in (vars(module).get("group"), vars(module).get("joined")):
            rows = getattr(group, "rows", None)
            for one in (*getattr(group, "casts", ()), getattr(group, "bias_O", None), *(rows.tensors if rows else ())):
                if one is not None:
                    torch._dynamo.mark_static_address(one, guard=False)


def _keeping_little(is_wished: bool) -> Any:
    """What is compiled within keeps no more for the backward than products and attention, if that is wished."""
    import torch._functorch.config as settings

    return settings.patch(aggressive_recomputation=is_wished)


def _alike(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of one block like those of any other of its kind, so that one compilation serves all.

    The first two are what goes through the blocks. A LoRA's first block gets them without history, and the single
    blocks as rows of the last one's result. A gradient that nobody takes costs less than another compilation.
    """
    return (*map(_stream, inputs[:2]), *inputs[2:])


def _stream(one: Any) -> Any:
    if not isinstance(one, Tensor):
        return one
    rows = one.flatten(0, 1).view(one.shape)  # without a copy of a single picture, whose strides are then a whole's
    return rows if rows.requires_grad else rows.detach().requires_grad_()


@torch.enable_grad()
def _forwards_and_backwards(call: Callable[..., Any], block: nn.Module, inputs: tuple[Any, ...]) -> list[list[Tensor]]:
    """A block's outputs; the gradients of its inputs; those of its parameters. The outputs are their own gradients."""
    own = tree_map_only(Tensor, lambda one: one.detach().requires_grad_(one.requires_grad), inputs)
    sources = [one for one in tree_leaves(own) if isinstance(one, Tensor) and one.requires_grad]
    trained = [one for one in block.parameters() if one.requires_grad]
    with torch.random.fork_rng([] if sources[0].device.type == "cpu" else [sources[0].device]):
        torch.manual_seed(0)
        outs = [one for one in tree_leaves(call(block, *own)) if isinstance(one, Tensor) and one.requires_grad]
        found = torch.autograd.grad(outs, [*sources, *trained], [one.detach() for one in outs], allow_unused=True)
    some = [torch.zeros(()) if one is None else one for one in found]
    return [[one.detach() for one in outs], some[: len(sources)], some[len(sources) :]]


def _apart(expected: list[Tensor], found: list[Tensor]) -> float:
    """The relative error of several tensors taken as one vector."""
    if not expected:
        return 0.0
    gaps = [float((one.float() - other.float()).norm()) for one, other in zip(expected, found, strict=True)]
    size = math.hypot(*(float(one.float().norm()) for one in expected))
    return math.hypot(*gaps) / size if size else math.hypot(*gaps)
