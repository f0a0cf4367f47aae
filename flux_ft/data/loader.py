"""Which examples make up the batch of each optimizer step: pure functions of the seed and the step.

A global batch is the batch_size × accumulate × world examples of one optimizer step, all from one bucket. Nothing is
remembered between steps, so a resumed run and any number of workers see the same batches. Steps count from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import TypeVar

import torch
from torch import Tensor

from flux_ft.data.parallel import ordered_map
from flux_ft.flow import draw_noise, keyed_generator
from flux_ft.types import Batch, Bucket, CachedExample, TextCond

T = TypeVar("T")


def bucket_schedule(sizes: Sequence[int], steps: int) -> list[int]:
    """The bucket of each step, as an index into `sizes`, the number of pictures in each bucket.

    The bucket furthest behind its share is drawn, the first of equals. After every `sum(sizes)` steps the draws are in
    exact proportion, and no bucket is ever a whole draw ahead. A longer schedule begins with the shorter one.
    """
    total = sum(sizes)
    assert total > 0, "no pictures"
    drawn = [0] * len(sizes)
    schedule = []
    for step in range(1, steps + 1):
        deficits = [step * size - count * total for size, count in zip(sizes, drawn, strict=True)]
        chosen = deficits.index(max(deficits))
        drawn[chosen] += 1
        schedule.append(chosen)
    return schedule


def endless_order(members: Sequence[int], seed: int, bucket: Bucket, start: int, count: int) -> list[int]:
    """Positions `start` to `start + count` of the endless stream of shuffles of `members`.

    Each pass through the stream holds every member once, in an order keyed by (seed, bucket, pass).
    """
    size = len(members)
    order: list[int] = []
    for epoch in range(start // size, (start + count - 1) // size + 1):
        generator = keyed_generator(seed, "order", f"{bucket.width_px}x{bucket.height_px}", epoch)
        order += (members[position] for position in torch.randperm(size, generator=generator).tolist())
    skip = start % size
    return order[skip : skip + count]


class BatchPlan:
    """The global batches of a whole run, laid out beforehand; `indices` asks for one.

    Every bucket is drawn in proportion to its pictures, and within a bucket every picture is seen equally often, give
    or take one: what is left of one pass begins the next batch, so nothing is lost to remainders.
    """

    def __init__(self, buckets: Sequence[Bucket], global_batch: int, steps: int, seed: int) -> None:
        """`buckets` holds the bucket of each example, `global_batch` the examples per optimizer step."""
        assert buckets, "no examples"
        assert global_batch > 0, "a batch holds at least one example"
        self.global_batch, self.steps, self.seed = global_batch, steps, seed
        members: dict[Bucket, list[int]] = {bucket: [] for bucket in sorted(set(buckets))}
        for index, bucket in enumerate(buckets):
            members[bucket].append(index)
        self._buckets, self._members = list(members), list(members.values())
        drawn = [0] * len(self._buckets)
        self._draws: list[tuple[int, int]] = []
        """Per step: the bucket, and how often it was drawn before."""
        for which in bucket_schedule([len(members) for members in self._members], steps):
            self._draws.append((which, drawn[which]))
            drawn[which] += 1

    def indices(self, step: int) -> list[int]:
        """The examples of optimizer step `step` (0 to steps - 1), by slot in the global batch."""
        assert 0 <= step < self.steps, f"step {step} is outside the plan of {self.steps}"
        which, draw = self._draws[step]
        start = draw * self.global_batch
        return endless_order(self._members[which], self.seed, self._buckets[which], start, self.global_batch)


TextChoice = Callable[[CachedExample, int], TextCond]
"""Which text of an example is taken in a slot."""


def as_written(example: CachedExample, slot: int) -> TextCond:
    """The caption itself."""
    return example.texts[0]


def draw_text(
    example: CachedExample, slot: int, *, seed: int, step: int, dropout: float, blank: TextCond | None
) -> TextCond:
    """One of the orders of the example's tags, each as likely as any, or `blank` in a share `dropout` of all cases.

    Keyed by (seed, step, slot); without a `blank`, the encoding of the empty caption, nothing is dropped.
    """
    if (
        blank is not None
        and float(torch.rand((), generator=keyed_generator(seed, "caption dropout", step, slot))) < dropout
    ):
        return blank
    if len(example.texts) == 1:
        return example.texts[0]
    return example.texts[
        int(torch.randint(len(example.texts), (), generator=keyed_generator(seed, "tags", step, slot)))
    ]


def collate(
    examples: Sequence[CachedExample], indices: Sequence[int], slots: Sequence[int], choose: TextChoice = as_written
) -> Batch:
    """The examples at `indices` as one batch; `slots` are their positions in the global batch."""
    assert len(indices) == len(slots) > 0, "one slot for each example"
    chosen = [examples[index] for index in indices]
    texts = [choose(example, slot) for example, slot in zip(chosen, slots, strict=True)]
    stds = [example.std_CHW for example in chosen if example.std_CHW is not None]
    assert len({example.bucket for example in chosen}) == 1, "a batch holds one bucket"
    assert len({text.embeds_BLD.shape for text in texts}) == 1, "captions of one length"
    assert len(stds) in (0, len(chosen)), "spreads for all or none"
    return Batch(
        mean_BCHW=torch.stack([example.mean_CHW for example in chosen]),
        std_BCHW=torch.stack(stds) if stds else None,
        text=TextCond(
            embeds_BLD=torch.cat([text.embeds_BLD for text in texts]),
            pooled_BP=torch.cat([text.pooled_BP for text in texts]),
        ),
        slots=tuple(slots),
        names=tuple(example.name for example in chosen),
        weight_BHW=_stacked_weights(chosen),
        loss_weight_B=_loss_weights(chosen),
    )


def _stacked_weights(chosen: Sequence[CachedExample]) -> Tensor | None:
    if all(example.weight_HW is None for example in chosen):
        return None
    even_HW = torch.ones(chosen[0].mean_CHW.shape[-2:])
    return torch.stack([even_HW if example.weight_HW is None else example.weight_HW for example in chosen])


def _loss_weights(chosen: Sequence[CachedExample]) -> Tensor | None:
    weights = [example.loss_weight for example in chosen]
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights)


def resampled(batch: Batch, seed: int, step: int) -> Batch:
    """The batch with each latent drawn from its distribution, in place of the mean: mean + std · noise, float32.

    Noise keyed by (seed, "latent", step, slot). A batch without spreads stays as it is.
    """
    if batch.std_BCHW is None:
        return batch
    shape = tuple(batch.std_BCHW.shape[1:])
    draws = [draw_noise(shape, keyed_generator(seed, "latent", step, slot)) for slot in batch.slots]
    return replace(
        batch, mean_BCHW=batch.mean_BCHW.float() + batch.std_BCHW.float() * torch.stack(draws), std_BCHW=None
    )


def made_ahead(make: Callable[[int], T], steps: Iterable[int], workers: int) -> Generator[T, None, None]:
    """`make(step)` for each step, in order; up to `workers` of them are made in threads while an earlier one is used.

    Without workers each is made when it is asked for. An error in making one comes out in its place, as itself. No
    thread is left when the generator has ended or is closed.
    """
    yield from ordered_map(make, steps, workers, window=workers + 1) if workers else map(make, steps)


def pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory, which a GPU reads while it computes."""
    return _with_tensors(batch, Tensor.pin_memory)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; a pinned one gets to a GPU while that computes."""
    return _with_tensors(batch, lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))


def _with_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    def changed(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else change(tensor)

    return replace(
        batch,
        mean_BCHW=change(batch.mean_BCHW),
        std_BCHW=changed(batch.std_BCHW),
        text=TextCond(change(batch.text.embeds_BLD), change(batch.text.pooled_BP)),
        weight_BHW=changed(batch.weight_BHW),
        loss_weight_B=changed(batch.loss_weight_B),
    )


def split_holdout(keys: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, held out) positions of `keys`, which are the examples' digests.

    Each key decides for itself with probability `fraction`, so pictures that are added later do not move the others.
    A fraction of 0 holds out none; otherwise at least one is held out where there are two, and one always trains.
    """
    assert 0 <= fraction < 1, "a fraction in [0, 1)"
    if fraction == 0 or len(set(keys)) < 2:
        return list(range(len(keys))), []
    chance = {key: _chance(seed, key) for key in keys}
    by_chance = sorted(chance, key=lambda key: (chance[key], key))
    # The lowest is always held out and the highest never, which keeps both sides from being empty.
    held_out = {key for key in by_chance[1:-1] if chance[key] < fraction} | {by_chance[0]}
    train = [position for position, key in enumerate(keys) if key not in held_out]
    return train, [position for position, key in enumerate(keys) if key in held_out]


def _chance(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on the seed and the key alone."""
    digest = blake2b(f"{seed}/holdout/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
