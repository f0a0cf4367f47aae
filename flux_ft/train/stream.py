"""Weights of some blocks live in host memory and visit the device in a ring of two, for models larger than a card.

A pre-hook of each streamed block calls its weights in and the next block's after them, so that these travel while this
one computes: downwards inside the backward pass, where the block is run again, else upwards. So a step of L blocks that
are trained copies L − 2 in for the forward pass, as many for the backward, and L out; frozen ones are never copied out.

What the caller sees to: each streamed block is run again in the backward pass, alone (`torch.utils.checkpoint` around
one block, no policy of what to keep), since autograd would else read a slot that another block has taken; weights are
moved inside the backward pass, in post-accumulate hooks; all computing is on one stream; and `flush` comes first where
weights are read or written by name. While they are away, trained or not, they are one NaN each, stretched to their
shape and on the device. The device matters: a parameter that changes it between two forward passes gets a second
AccumulateGrad node, and the sum of two losses would then move it twice.

The engine runs the nodes of later operations first and AccumulateGrad before all, so when a block is run again for the
backward, every node and hook of the blocks after it has been queued. That makes three streams enough: compute, `in`
(host to device) and `out` (device to host), which use the two directions of the bus at once. Who waits for whom:

    in, out wait for compute   before an exchange: the block that leaves may still be read, or be moved by its update
    in waits for out           chunk by chunk: a slot is overwritten once its old weights are home; and a block that is
                               fetched again comes after its own way home
    compute waits for in       at the visit: the weights have arrived
    the host waits for in      in `flush`, before weights are read or written by name; `in` waits for `out`

Host memory needs no more: a changed block was computed with, hence had arrived, before `out` could write over its home.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from flux_ft.errors import FluxFTError

CHUNK_BYTES = 32 * 2**20
"""Of a block on its way home while another takes its place: small beside a block, large beside what a copy costs."""
ALIGN_BYTES = 256
"""At which the weights of a block start, as in memory that the device's allocator gives out."""


def choose_streamed(total: int, count: int) -> list[int]:
    """Which `count` of `total` blocks to stream: first, last and evenly between.

    Nothing is fetched between the last two on the way up and the first two on the way down, so the ends lose nothing,
    and the distances between become as long as they can be. Raises ValueError unless 0 ≤ count ≤ total.
    """
    if not 0 <= count <= total:
        raise ValueError(f"cannot stream {count} of {total} blocks")
    return [place * (total - 1) // max(1, count - 1) for place in range(count)]


class BlockStream:
    """Weights of some blocks live in host memory and visit the device in a ring of two."""

    def __init__(self, blocks: Sequence[nn.Module], streamed: Sequence[int], device: torch.device) -> None:
        """Move the weights of `streamed`, indices into `blocks` in order of execution, to host memory.

        Factors of a LoRA stay where they are, and so do buffers and the other blocks: these are the caller's to move.
        Raises FluxFTError when the host memory cannot be pinned.
        """
        self._copies = _CudaCopies(device) if device.type == "cuda" else _Copies()
        self._blocks: list[_Block] = []
        for place, index in enumerate(sorted(set(streamed))):
            self._blocks.append(_Block(blocks[index], device))
            blocks[index].register_forward_pre_hook(partial(self._before_forward, place))
        largest = max((block.home.numel() for block in self._blocks), default=0)
        self._slots = [_Slot(self._copies.make_slot(largest)) for _ in self._blocks[:2]]
        self._held = {parameter for block in self._blocks for parameter in block.parameters}

    @property
    def streamed(self) -> int:
        """How many blocks are streamed."""
        return len(self._blocks)

    @property
    def host_bytes(self) -> int:
        """Of host memory that the weights take."""
        return sum(block.home.numel() for block in self._blocks)

    @property
    def slot_bytes(self) -> int:
        """Of device memory that the ring takes, both slots together."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is one of the streamed parameters."""
        return tensor in self._held

    def flush(self) -> None:
        """Bring every changed weight home and wait for it: each streamed parameter's data is its host tensor then.

        It may be read and written until the next pass. Not between a forward pass and its backward.
        """
        for slot in self._slots:
            if (home := self._leave(slot)) is not None:
                self._copies.exchange(slot.buffer, home, None)
        self._copies.finish()
        for block in self._blocks:
            block.bind(block.home)

    def _before_forward(self, place: int, *_: object) -> None:
        backward = torch._C._current_graph_task_id() != -1
        if torch.is_grad_enabled() and not backward and not _is_checkpointed():
            raise RuntimeError(
                "a streamed block was run with gradients but outside torch.utils.checkpoint: its backward would read "
                "the weights of another block. Turn full recompute on, or gradients off"
            )
        following = self._following(place, backward)
        slot = self._load(place, keep=following)
        self._copies.await_arrival(slot.arrival)
        block = self._blocks[place]
        block.bind(slot.buffer)
        slot.changed |= backward and block.is_trained
        if following is not None:
            self._load(following, keep=place)

    def _following(self, place: int, backward: bool) -> int | None:
        """Who comes next, as far as is known: after the top a backward pass or, without gradients, another forward."""
        if backward:
            return place - 1 if place else None
        if place + 1 < len(self._blocks):
            return place + 1
        return None if torch.is_grad_enabled() else 0

    def _load(self, place: int, keep: int | None) -> _Slot:
        """The slot with this block, in which it may still have to arrive. It does not take the place of `keep`."""
        for slot in self._slots:
            if slot.place == place:
                return slot
        slot = next(slot for slot in self._slots if keep is None or slot.place != keep)
        home = self._leave(slot)
        slot.arrival = self._copies.exchange(slot.buffer, home, self._blocks[place].home)
        slot.place = place
        return slot

    def _leave(self, slot: _Slot) -> Tensor | None:
        """Empty a slot. Returns where its bytes have to go, or None when nothing has changed."""
        if slot.place is None:
            return None
        block, changed = self._blocks[slot.place], slot.changed
        block.unbind()
        slot.place, slot.changed = None, False
        return block.home if changed else None


class _Block:
    """The streamed parameters of a block, one after the other in a buffer of bytes."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        named = module.named_parameters()
        self.parameters = [parameter for name, parameter in named if not _is_lora(name)]
        sizes = [parameter.numel() * parameter.element_size() for parameter in self.parameters]
        self._spans: list[tuple[int, int]] = []
        end = 0
        for size in sizes:
            start = -(-end // ALIGN_BYTES) * ALIGN_BYTES
            end = start + size
            self._spans.append((start, end))
        self._away = [
            torch.full((), math.nan, device=device).to(parameter.dtype).expand(parameter.shape)
            for parameter in self.parameters
        ]
        self.home = _host_buffer(end, device)
        for parameter, view in zip(self.parameters, self._views(self.home), strict=True):
            view.copy_(parameter.data)
            parameter.data = view  # at once, so that the weights are in memory twice for one block only

    @property
    def is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters)

    def bind(self, buffer: Tensor) -> None:
        """Let the parameters be what lies in `buffer`."""
        for parameter, view in zip(self.parameters, self._views(buffer), strict=True):
            parameter.data = view

    def unbind(self) -> None:
        for parameter, away in zip(self.parameters, self._away, strict=True):
            parameter.data = away

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start:end].view(parameter.dtype).view(parameter.shape)
            for parameter, (start, end) in zip(self.parameters, self._spans, strict=True)
        ]


@dataclass(eq=False)
class _Slot:
    """Room for one block on the device."""

    buffer: Tensor
    place: int | None = None
    arrival: Any = None
    changed: bool = False
    """It was run for a backward pass that may have moved its weights, and is not home since."""


class _Copies:
    """Copies that are done when they return. The order in which they are asked for is all that a device has to keep."""

    def make_slot(self, size: int) -> Tensor:
        """A buffer of `size` bytes on the device."""
        return torch.empty(size, dtype=torch.uint8)

    def exchange(self, slot: Tensor, outgoing: Tensor | None, incoming: Tensor | None) -> Any:
        """Bring a slot's bytes home to `outgoing`, and those of `incoming` in; returns what `await_arrival` takes."""
        self.follow_compute()
        arrival = None
        for out, into in zip_longest(_chunks(outgoing, slot), _chunks(incoming, slot)):
            if out is not None:
                self.bring_home(*out)
            if into is not None:
                arrival = self.bring_in(*into)
        return arrival

    def follow_compute(self) -> None:
        """What is copied from now on comes after what is computed up to now."""

    def bring_home(self, home: Tensor, slot: Tensor) -> None:
        """Copy to the host, before anything that is brought in from now on."""
        home.copy_(slot)

    def bring_in(self, home: Tensor, slot: Tensor) -> Any:
        """Copy to the device; returns a mark of its end."""
        slot.copy_(home)

    def await_arrival(self, arrival: Any) -> None:
        """What is computed from now on comes after this mark."""

    def finish(self) -> None:
        """Wait until every copy is done."""


class _CudaCopies(_Copies):
    """Copies on two streams of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in, self._out = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def make_slot(self, size: int) -> Tensor:
        slot = torch.empty(size, dtype=torch.uint8, device=self._device)
        for stream in (self._in, self._out):
            slot.record_stream(stream)  # when freed, it is not given away under a copy on its way
        return slot

    def follow_compute(self) -> None:
        for stream in (self._in, self._out):
            stream.wait_stream(self._compute())

    def bring_home(self, home: Tensor, slot: Tensor) -> None:
        self._copy(self._out, home, slot)
        self._in.wait_stream(self._out)

    def bring_in(self, home: Tensor, slot: Tensor) -> Any:
        self._copy(self._in, slot, home)
        return self._in.record_event()

    def await_arrival(self, arrival: Any) -> None:
        self._compute().wait_event(arrival)

    def finish(self) -> None:
        self._in.synchronize()  # which waits for `out`

    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)


def _chunks(home: Tensor | None, slot: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = 0 if home is None else home.numel()
    for start in range(0, size, CHUNK_BYTES):
        assert home is not None
        part = slice(start, min(start + CHUNK_BYTES, size))
        yield home[part], slot[part]


def _host_buffer(size: int, device: torch.device) -> Tensor:
    """`size` bytes of host memory, pinned where the device is a GPU.

    Whole pages by cudaHostRegister: torch's own pinned memory comes in powers of two, 60 to 90 % more for FLUX.1's.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    pages = -(-size // mmap.PAGESIZE) + 1
    memory = torch.empty(pages * mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    buffer = memory[start : start + size]
    error = int(_cudart().cudaHostRegister(buffer.data_ptr(), (pages - 1) * mmap.PAGESIZE, 0))
    if error:
        raise FluxFTError(
            f"{size / 1e9:.1f} GB of host memory for a streamed block cannot be pinned (CUDA error {error})",
            hint="lower `memory.stream_blocks`, or free host memory",
        )
    weakref.finalize(buffer, _unpin, memory, buffer.data_ptr(), device).atexit = False
    return buffer


def _unpin(memory: Tensor, pointer: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be on its way; until here `memory` is not freed
    _cudart().cudaHostUnregister(pointer)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _is_lora(name: str) -> bool:
    """Whether a parameter belongs to a LoRA, by the names that peft gives: small, and not moved inside the backward."""
    return any(part.startswith("lora_") for part in name.split("."))


def _is_checkpointed() -> bool:
    """Whether saved tensors are taken over by hooks, as torch.utils.checkpoint does; True where torch cannot tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # since torch 2.8
    return top is None or top(True) is not None
