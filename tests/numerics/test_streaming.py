"""Streaming moves weights and changes no number: outputs, gradients and updates are the plain model's, bit by bit.

On FLUX.1's transformer of seven narrow blocks with random weights, and on flux-tiny; on a GPU too where there is one.
What only a GPU does, copying beside the computing, is checked by a race detector on streams that keep vector clocks.
"""

from __future__ import annotations

import copy
import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_ft.adapters import lora
from flux_ft.errors import FluxFTError
from flux_ft.families.base import Family
from flux_ft.flow import keyed_generator
from flux_ft.train import stream as streaming
from flux_ft.train.stream import BlockStream, choose_streamed

NUM_DOUBLE, NUM_SINGLE = 3, 4
NUM_BLOCKS = NUM_DOUBLE + NUM_SINGLE
SHAPE = {"num_layers": NUM_DOUBLE, "num_single_layers": NUM_SINGLE, "attention_head_dim": 16, "num_attention_heads": 2,
         "in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
         "guidance_embeds": True}  # fmt: skip
SOME, ALL = (0, 2, 3, 6), tuple(range(NUM_BLOCKS))
CHOICES = [(3,), (1, 5), (2, 3, 4), SOME, ALL]
RATE = 0.05
DTYPES = [torch.float32, torch.bfloat16]
chosen = pytest.mark.parametrize("streamed", CHOICES, ids=str)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with sdpa_kernel(SDPBackend.MATH):  # the others may add up in any order
        yield torch.device(request.param)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each block takes many, and of another number than its neighbour."""
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 10_000)


# --- A model, and what is done with it. ---


def make_model(device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    model = FluxTransformer2DModel(**SHAPE)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=keyed_generator(0, name))
        weight = drawn * 0.1 + (1.0 if "norm_" in name and parameter.ndim == 1 else 0.0)
        parameter.data = weight.to(device, dtype)
    model.enable_gradient_checkpointing()
    return model


def blocks_of(model: Any) -> list[nn.Module]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def make_stream(model: Any, streamed: Sequence[int], device: torch.device) -> BlockStream:
    """As a caller does it: from a model on the host, of which the rest goes to the device."""
    model.cpu()
    stream = BlockStream(blocks_of(model), streamed, device)
    for tensor in (*model.parameters(), *model.buffers()):
        if not stream.holds(tensor):
            tensor.data = tensor.data.to(device)
    return stream


def twins(
    device: torch.device, streamed: Sequence[int], dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, BlockStream]:
    """A plain model, an equal one that is streamed, and its stream."""
    plain, other = make_model(device, dtype), make_model(device, dtype)
    return plain, other, make_stream(other, streamed, device)


def predict(model: Any, seed: int) -> Tensor:
    device, dtype = model.x_embedder.weight.device, model.x_embedder.weight.dtype

    def draw(name: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=keyed_generator(seed, name)).to(device, dtype)

    ids = torch.tensor([[0, row, column] for row in range(3) for column in range(4)], dtype=torch.float32)
    out: Tensor = model(
        hidden_states=draw("picture", 2, 12, model.config.in_channels),
        encoder_hidden_states=draw("text", 2, 5, model.config.joint_attention_dim),
        pooled_projections=draw("pooled", 2, model.config.pooled_projection_dim),
        timestep=torch.tensor([0.3, 0.8], device=device, dtype=dtype),
        guidance=torch.ones(2, device=device, dtype=dtype),
        img_ids=ids.to(device), txt_ids=torch.zeros(5, 3, device=device), return_dict=False,
    )[0]  # fmt: skip
    return out


def loss_of(model: Any, seed: int) -> Tensor:
    return predict(model, seed).float().square().mean()


def preview(model: Any, seed: int) -> Tensor:
    with torch.no_grad():
        return predict(model, seed)


def move(parameter: Tensor) -> None:
    """A step of gradient descent in place."""
    assert parameter.grad is not None
    parameter.data.sub_(RATE * parameter.grad)
    parameter.grad = None


def move_widened(parameter: Tensor) -> None:
    """The same in float32 and back, as optimizers do it that would lose a step in bfloat16."""
    weight, gradient = parameter.data, parameter.grad
    assert gradient is not None
    parameter.grad = None
    parameter.data = weight.float()
    parameter.data.sub_(RATE * gradient.float())
    wide, parameter.data = parameter.data, weight
    weight.copy_(wide)


def fuse(model: nn.Module, update: Callable[[Tensor], None] = move) -> None:
    """Move each weight in the backward pass, as soon as its gradient is there."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(update)


def assert_same_weights(plain: nn.Module, streamed: nn.Module) -> None:
    ours = streamed.state_dict()
    odd = [name for name, weight in plain.state_dict().items() if not torch.equal(weight.cpu(), ours[name].cpu())]
    assert not odd, f"{len(odd)} weights differ, first {odd[0]}"


class Counted(streaming._Copies):
    """Which homes were read and written."""

    def __init__(self) -> None:
        self.fetched: Counter[int] = Counter()
        self.written: Counter[int] = Counter()

    def exchange(self, slot: Tensor, outgoing: Tensor | None, incoming: Tensor | None) -> Any:
        for count, home in ((self.fetched, incoming), (self.written, outgoing)):
            if home is not None:
                count[home.data_ptr()] += 1
        return super().exchange(slot, outgoing, incoming)

    def take(self) -> tuple[list[int], list[int]]:
        """How often each home was read, and written, since the last call."""
        taken = sorted(self.fetched.values()), sorted(self.written.values())
        self.fetched.clear()
        self.written.clear()
        return taken


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The copies of the next stream on the CPU."""
    copies = Counted()
    monkeypatch.setattr(streaming, "_Copies", lambda: copies)
    return copies


CPU = torch.device("cpu")

# --- The same numbers. ---


@chosen
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_without_gradients_are_those_of_the_plain_model(
    device: torch.device, streamed: tuple[int, ...], dtype: torch.dtype
) -> None:
    plain, model, _ = twins(device, streamed, dtype)
    for seed in range(3):
        assert torch.equal(preview(model, seed), preview(plain, seed))
    with torch.inference_mode():
        assert torch.equal(predict(model, 3), predict(plain, 3))
    assert torch.equal(preview(model, 4), preview(plain, 4))


@chosen
def test_gradients_are_those_of_the_model_without_recompute(device: torch.device, streamed: tuple[int, ...]) -> None:
    plain, model, _ = twins(device, streamed)
    plain.disable_gradient_checkpointing()
    ours: dict[str, Tensor] = {}

    def take(name: str, parameter: Tensor) -> None:
        ours[name], parameter.grad = parameter.grad, None

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(partial(take, name))
    for seed in range(2):
        plain.zero_grad()
        for one in (plain, model):
            loss_of(one, seed).backward()
        odd = [name for name, one in plain.named_parameters() if not torch.equal(one.grad, ours[name])]
        assert not odd


@chosen
@pytest.mark.parametrize(("update", "dtype"), [(move, torch.float32), (move_widened, torch.bfloat16)])
def test_steps_with_previews_between_end_at_the_plain_model(
    device: torch.device, streamed: tuple[int, ...], update: Callable[[Tensor], None], dtype: torch.dtype
) -> None:
    plain, model, stream = twins(device, streamed, dtype)
    start = copy.deepcopy(plain.state_dict())
    for one in (plain, model):
        fuse(one, update)
    for seed in range(4):
        losses = [loss_of(one, seed) for one in (plain, model)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        if seed != 1:
            assert torch.equal(preview(model, seed), preview(plain, seed))
        if seed == 2:
            stream.flush()
    stream.flush()
    assert_same_weights(plain, model)
    matrices = {name: weight for name, weight in plain.state_dict().items() if weight.ndim == 2}
    assert not any(torch.equal(start[name], weight) for name, weight in matrices.items())


@chosen
def test_two_forward_passes_before_one_backward_move_each_weight_once(
    device: torch.device, streamed: tuple[int, ...]
) -> None:
    """Prior preservation; with a pass without gradients between the two, as there."""
    plain, model, stream = twins(device, streamed)
    moves: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: moves.update([name]))
    for one in (plain, model):
        fuse(one)
    for seed in range(2):
        for one in (plain, model):
            first = loss_of(one, seed)
            target = preview(one, seed + 10)
            drift = (predict(one, seed + 20) - target).square().mean()
            (first + drift).backward()
        assert set(moves.values()) == {seed + 1}
    stream.flush()
    assert_same_weights(plain, model)


def test_a_frozen_share_of_the_weights_stays_frozen(device: torch.device) -> None:
    plain, model, stream = twins(device, ALL)
    for one in (plain, model):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("attn" in name)
        fuse(one)
        for seed in range(3):
            loss_of(one, seed).backward()
    stream.flush()
    assert_same_weights(plain, model)


def test_a_block_is_done_in_the_backward_before_the_one_below_is_run_again(device: torch.device) -> None:
    """All its updates are made, also where two losses were added up: that is when its slot may be taken."""
    _, model, _ = twins(device, ALL)
    current: list[int] = []
    moved: list[tuple[int, int]] = []
    for index, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(lambda *_, index=index: current.append(index))
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: moved.append((index, current[-1])))
    fuse(model)
    (loss_of(model, 0) + loss_of(model, 1)).backward()
    assert len(moved) == sum(1 for block in blocks_of(model) for _ in block.parameters())
    assert all(own == running for own, running in moved)


# --- LoRA. ---


def attach(model: Any, targets: Sequence[str]) -> list[nn.Parameter]:
    parameters = lora.attach_new(model.requires_grad_(False), targets, rank=4, alpha=4.0, dropout=0.0, seed=1)
    for number, parameter in enumerate(parameters):  # while up is zero, down has no gradient
        parameter.data.add_(torch.randn(parameter.shape, generator=keyed_generator(2, number)) * 0.1)
    return parameters


@pytest.mark.parametrize("attached_first", [True, False])
def test_a_lora_learns_the_same_and_its_base_is_never_copied_back(
    tiny_family: Family, counted: Counted, attached_first: bool
) -> None:
    plain, model = (tiny_family.load_denoiser(CPU, torch.float32) for _ in range(2))
    names = list(tiny_family.blocks(plain))
    targets = tiny_family.lora_targets(plain)
    if attached_first:
        trained = attach(model, targets)
    stream = BlockStream(list(tiny_family.blocks(model).values()), range(len(names)), CPU)
    if not attached_first:
        trained = attach(model, targets)
    assert not any(stream.holds(parameter) for parameter in trained)
    homes = {name: parameter.data for name, parameter in model.named_parameters() if stream.holds(parameter)}
    before = {name: home.clone() for name, home in homes.items()}
    models = {"plain": (plain, attach(plain, targets)), "streamed": (model, trained)}
    model.enable_gradient_checkpointing()
    gradients: dict[str, list[Tensor]] = {}
    for seed in range(3):
        for which, (one, parameters) in models.items():
            loss_of(one, seed).backward()
            preview(one, seed)
            gradients[which] = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                move(parameter)
        assert all(torch.equal(*pair) for pair in zip(*gradients.values(), strict=True))
        assert all(bool(gradient.any()) for gradient in gradients["plain"])
    stream.flush()
    fetched, written = counted.take()
    assert len(fetched) == len(names)
    assert written == []
    assert all(torch.equal(homes[name], before[name]) for name in homes)
    assert_same_weights(plain, model)


# --- What is where, and what is copied. ---


@chosen
def test_a_training_step_fetches_all_blocks_but_two_in_each_direction(
    counted: Counted, streamed: tuple[int, ...]
) -> None:
    model = make_model(CPU)
    stream = make_stream(model, streamed, CPU)
    fuse(model)
    count = len(streamed)
    loss_of(model, 0).backward()
    fetched, _ = counted.take()
    assert sum(fetched) == count + max(0, count - 2)
    for seed in range(1, 3):
        loss_of(model, seed).backward()
        fetched, written = counted.take()
        assert sum(fetched) == 2 * max(0, count - 2)
        assert written == [1] * min(count, 2 * max(0, count - 2))
    stream.flush()
    assert counted.take() == ([], [1] * min(2, count))


@chosen
def test_passes_without_gradients_fetch_each_block_once_and_write_none(
    counted: Counted, streamed: tuple[int, ...]
) -> None:
    model = make_model(CPU)
    make_stream(model, streamed, CPU)
    preview(model, 0)
    counted.take()
    for seed in range(1, 3):
        preview(model, seed)
        assert counted.take() == ([1] * (len(streamed) if len(streamed) > 2 else 0), [])


@pytest.mark.parametrize("streamed", [(5, 1, 4), SOME, ALL], ids=str)
def test_each_block_is_called_in_before_its_turn(monkeypatch: pytest.MonkeyPatch, streamed: tuple[int, ...]) -> None:
    """Except where it cannot be known who is next: at the first pass, and where training and previews take turns."""
    log: list[tuple[str, int]] = []

    class Logged(streaming._Copies):
        def exchange(self, slot: Tensor, outgoing: Tensor | None, incoming: Tensor | None) -> Any:
            if incoming is not None:
                log.append(("fetch", incoming.data_ptr()))
            return super().exchange(slot, outgoing, incoming)

    monkeypatch.setattr(streaming, "_Copies", Logged)
    model = make_model(CPU)
    make_stream(model, streamed, CPU)
    fuse(model)
    for index in streamed:
        block = blocks_of(model)[index]
        home = next(block.parameters()).data_ptr()
        block.register_forward_pre_hook(lambda *_, home=home: log.append(("visit", home)))

    def late() -> int:
        """Fetches of the block whose turn it is."""
        assert "fetch" in dict(log)
        turns = [[home for what, home in log[place:] if what == "visit"][:1] for place in range(len(log))]
        count = sum(what == "fetch" and [home] == turn for (what, home), turn in zip(log, turns, strict=True))
        log.clear()
        return count

    loss_of(model, 0).backward()
    assert late() == 1
    loss_of(model, 1).backward()
    loss_of(model, 2).backward()
    assert late() == 0
    preview(model, 0)
    log.clear()
    preview(model, 1)
    preview(model, 2)
    assert late() == 0


def test_two_blocks_are_in_memory_and_what_is_away_is_nan_on_the_device(device: torch.device) -> None:
    """One number is kept of each parameter that is away, and it is there for every dtype."""
    model = make_model(device)
    for parameter in model.transformer_blocks[1].parameters():
        parameter.data = parameter.data.bfloat16().float()
    stream = make_stream(model, ALL, device)
    largest = max(sum(p.numel() for p in block.parameters()) for block in blocks_of(model)) * 4
    assert 2 * largest <= stream.slot_bytes < 2 * largest * 1.1
    assert stream.host_bytes >= 4 * sum(p.numel() for block in blocks_of(model) for p in block.parameters())
    assert stream.streamed == NUM_BLOCKS
    preview(model, 0)
    present = []
    for block in blocks_of(model):
        for parameter in block.parameters():
            assert parameter.device.type == device.type
        weights = [parameter for parameter in block.parameters() if parameter.ndim == 2]
        away = [parameter.untyped_storage().nbytes() < 100 for parameter in weights]
        assert all(away) or not any(away)
        assert all(bool(parameter.isnan().all()) for parameter in weights) == all(away)
        present.append(not any(away))
    assert sum(present) <= 2


def test_blocks_of_mixed_dtypes_are_streamed(device: torch.device) -> None:
    models = [make_model(device, torch.bfloat16) for _ in range(2)]
    for model in models:
        for block in model.single_transformer_blocks:
            block.norm.linear.bias.data = block.norm.linear.bias.data.double()
            block.norm.linear.register_forward_pre_hook(lambda layer, args: (args[0].double(),))
            block.norm.linear.weight.data = block.norm.linear.weight.data.double()
            block.norm.linear.register_forward_hook(lambda layer, args, out: out.bfloat16())
        fuse(model)
    stream = make_stream(models[1], ALL, device)
    for seed in range(3):
        for model in models:
            loss_of(model, seed).backward()
    held = [
        parameter.data
        for parameter in models[1].parameters()
        if stream.holds(parameter) and not parameter.isnan().any()
    ]
    assert held
    assert not any(weight.storage_offset() * weight.element_size() % 256 for weight in held)
    stream.flush()
    assert_same_weights(*models)


def test_weights_written_after_a_flush_are_used_by_the_next_pass(device: torch.device) -> None:
    """As when a checkpoint is read, or the average takes the place of the last weights."""
    plain, model, stream = twins(device, ALL)
    preview(model, 0)
    stream.flush()
    for one in (plain, model):
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=keyed_generator(7, name)) * 0.1)
    assert torch.equal(preview(model, 1), preview(plain, 1))


def test_flushing_twice_or_before_any_pass_changes_nothing(device: torch.device) -> None:
    plain, model, stream = twins(device, SOME)
    stream.flush()
    assert_same_weights(plain, model)
    for one in (plain, model):
        fuse(one)
        loss_of(one, 0).backward()
    stream.flush()
    stream.flush()
    assert_same_weights(plain, model)


# --- What goes wrong. ---


class Broken(Exception):
    """Raised in the middle of a pass."""


@chosen
@pytest.mark.parametrize("at", [0, 3, 6])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_forward_pass_that_broke_off_leaves_no_trace(
    device: torch.device, streamed: tuple[int, ...], at: int, gradients: bool
) -> None:
    plain, model, stream = twins(device, streamed)
    for one in (plain, model):
        fuse(one)
        loss_of(one, 0).backward()

    def fail(*_: object) -> None:
        raise Broken

    handle = blocks_of(model)[at].register_forward_hook(fail)
    with pytest.raises(Broken), torch.set_grad_enabled(gradients):
        predict(model, 1)
    handle.remove()
    for one in (plain, model):
        loss_of(one, 2).backward()
    stream.flush()
    assert_same_weights(plain, model)


def test_a_backward_pass_that_broke_off_keeps_the_updates_it_made(device: torch.device) -> None:
    plain, model, stream = twins(device, ALL)

    def fail(*_: object) -> None:
        raise Broken

    for one in (plain, model):
        fuse(one)
        weight = one.transformer_blocks[1].attn.to_q.weight
        handle = weight.register_post_accumulate_grad_hook(fail)
        with pytest.raises(Broken):
            loss_of(one, 0).backward()
        handle.remove()
        loss_of(one, 1).backward()
    stream.flush()
    assert_same_weights(plain, model)


def test_a_pass_that_keeps_views_of_a_slot_is_refused(device: torch.device) -> None:
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this torch does not tell")
    _, model, _ = twins(device, SOME)
    model.disable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="full recompute"):
        predict(model, 0)


# --- Pinned memory. ---

GPU = torch.device("cuda")


class FakeRuntime:
    """Of CUDA's runtime, what pins memory; `error` is what it returns."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.pinned = error, dict[int, int]()

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.pinned[pointer] = size
        return self.error

    def cudaHostUnregister(self, pointer: int) -> None:
        del self.pinned[pointer]


@pytest.mark.parametrize("size", [1, mmap.PAGESIZE, 100_000])
def test_host_memory_is_pinned_by_the_page_and_let_go_with_its_buffer(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(streaming, "_cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    buffer = streaming._host_buffer(size, GPU)
    buffer.fill_(7)
    assert buffer.numel() == size
    ((pointer, pinned),) = runtime.pinned.items()
    assert pointer == buffer.data_ptr()
    assert pointer % mmap.PAGESIZE == 0 == pinned % mmap.PAGESIZE
    assert size <= pinned < size + mmap.PAGESIZE
    del buffer
    assert runtime.pinned == {}


def test_host_memory_that_cannot_be_pinned_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_cudart", lambda: FakeRuntime(error=2))
    with pytest.raises(FluxFTError, match="cannot be pinned") as caught:
        streaming._host_buffer(1000, GPU)
    assert "memory.stream_blocks" in str(caught.value.hint)


# --- Which blocks. ---


@pytest.mark.parametrize("total", [1, 2, 7, 57])
def test_streamed_blocks_are_spread_evenly_from_the_first_to_the_last(total: int) -> None:
    assert choose_streamed(total, 0) == []
    for count in range(1, total + 1):
        places = choose_streamed(total, count)
        assert len(set(places)) == count
        assert places[0] == 0
        gaps = {after - before for before, after in pairwise(places)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert count == 1 or places[-1] == total - 1


@pytest.mark.parametrize("count", [-1, 8])
def test_more_blocks_than_there_are_cannot_be_streamed(count: int) -> None:
    with pytest.raises(ValueError, match="of 7 blocks"):
        choose_streamed(7, count)


# --- Who waits for whom: what runs on a GPU, on streams that only keep clocks. ---

Event = tuple[str, dict[str, int]]


class Clock:
    """A CUDA stream, or the host, as a vector clock: what it has seen of the others."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self.world = name, world
        self.seen: dict[str, int] = {name: 0}

    def record_event(self) -> Event:
        return self.name, dict(self.seen)

    def wait_event(self, event: Event) -> None:
        name, seen = event
        if (self.name, name) != self.world.without:
            self.seen |= {key: max(time, self.seen.get(key, 0)) for key, time in seen.items()}

    def wait_stream(self, other: Clock) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.world.host.wait_event(self.record_event())


class World:
    """All clocks and all accesses to memory; one wait, given as (who, for whom), can be left out."""

    def __init__(self, without: tuple[str, str] | None) -> None:
        self.without = without
        self.host, self.compute, self.into, self.out = (Clock(name, self) for name in ("host", "compute", "in", "out"))
        self.accesses: dict[tuple[int, int], list[tuple[str, int, bool]]] = {}
        self.races: set[tuple[str, str]] = set()

    def touch(self, clock: Clock, tensor: Tensor, write: bool) -> None:
        """Note an access, and any earlier one that it does not follow and of which either writes."""
        if clock is not self.host:
            clock.wait_event(self.host.record_event())  # it is asked for by the host
        clock.seen[clock.name] += 1
        begin = tensor.storage_offset() * tensor.element_size()
        end = begin + tensor.numel() * tensor.element_size()
        for piece in range(begin // 100, -(-end // 100)):
            earlier = self.accesses.setdefault((tensor.untyped_storage().data_ptr(), piece), [])
            for name, time, wrote in earlier:
                if (wrote or write) and clock.seen.get(name, 0) < time:
                    self.races.add((clock.name, name))
            if write:
                earlier.clear()  # who follows this one follows them, or has been noted
            earlier.append((clock.name, clock.seen[clock.name], write))


class OnClocks(streaming._CudaCopies):
    """What runs on a GPU, less the GPU."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._in, self._out = world.into, world.out  # type: ignore[assignment]

    def make_slot(self, size: int) -> Tensor:
        return torch.full((size,), 255, dtype=torch.uint8)

    def _compute(self) -> Any:
        return self._world.compute

    def _copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        self._world.touch(stream, source, write=False)
        self._world.touch(stream, target, write=True)
        target.copy_(source)


def races(
    monkeypatch: pytest.MonkeyPatch, streamed: Sequence[int], without: tuple[str, str] | None
) -> set[tuple[str, str]]:
    """Train, draw, flush and write the weights, twice; return between whom there were races, as (later, earlier)."""
    world = World(without)
    monkeypatch.setattr(streaming, "_Copies", lambda: OnClocks(world))
    plain, model, stream = twins(CPU, streamed)

    def access(clock: Clock, write: bool, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            world.touch(clock, parameter.data, write)

    for index in streamed:
        held = list(blocks_of(model)[index].parameters())
        blocks_of(model)[index].register_forward_pre_hook(lambda *_, held=held: access(world.compute, False, held))
        for parameter in held:
            parameter.register_post_accumulate_grad_hook(lambda one: access(world.compute, True, [one]))
    for one in (plain, model):
        fuse(one)
    held = [parameter for parameter in model.parameters() if stream.holds(parameter)]
    for _ in range(2):
        for seed in range(3):
            for one in (plain, model):
                loss_of(one, seed).backward()
        stream.flush()
        access(world.host, True, held)
        for seed in range(2):
            assert torch.equal(preview(model, seed), preview(plain, seed))
        stream.flush()
        access(world.host, True, held)
    assert_same_weights(plain, model)
    return world.races


@chosen
def test_no_copy_races_with_the_computing_or_the_host(
    monkeypatch: pytest.MonkeyPatch, streamed: tuple[int, ...]
) -> None:
    assert races(monkeypatch, streamed, without=None) == set()


@pytest.mark.parametrize(
    "without",
    [("in", "compute"), ("out", "compute"), ("in", "out"), ("compute", "in"), ("host", "in")],
    ids=lambda pair: " waits for ".join(pair),
)
def test_no_wait_is_superfluous(monkeypatch: pytest.MonkeyPatch, without: tuple[str, str]) -> None:
    """And the detector sees a race when there is one."""
    assert races(monkeypatch, ALL, without)
