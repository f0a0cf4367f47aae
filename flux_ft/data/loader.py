"""Which examples make up the batch of each optimizer step: pure functions of the seed and the step.

A global batch is the batch_size × accumulate × world examples of one optimizer step, all from one bucket. Nothing is
remembered between steps, so a resumed run and any number of workers see the same batches. Steps count from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch

from flux_ft.flow import keyed_generator
from flux_ft.types import Batch, Bucket, CachedExample, TextCond


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
        self._buckets = sorted(set(buckets))
        self._members = [[index for index, bucket in enumerate(buckets) if bucket == which] for which in self._buckets]
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


def collate(examples: Sequence[CachedExample], indices: Sequence[int], slots: Sequence[int]) -> Batch:
    """The examples at `indices` as one batch; `slots` are their positions in the global batch."""
    assert len(indices) == len(slots) > 0, "one slot for each example"
    chosen = [examples[index] for index in indices]
    assert len({example.bucket for example in chosen}) == 1, "a batch holds one bucket"
    assert len({example.text.embeds_BLD.shape for example in chosen}) == 1, "captions of one length"
    return Batch(
        latents_BCHW=torch.stack([example.latent_CHW for example in chosen]),
        text=TextCond(
            embeds_BLD=torch.cat([example.text.embeds_BLD for example in chosen]),
            pooled_BP=torch.cat([example.text.pooled_BP for example in chosen]),
        ),
        slots=tuple(slots),
        names=tuple(example.name for example in chosen),
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
