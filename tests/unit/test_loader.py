"""The loader: batches follow from the seed and the step alone, and no picture is lost."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flux_ft.data.loader import BatchPlan, bucket_schedule, collate, endless_order, split_holdout
from flux_ft.types import Bucket, CachedExample, TextCond

WIDE, TALL, SQUARE = Bucket(64, 32), Bucket(32, 64), Bucket(48, 48)
BUCKETS = [SQUARE] * 7 + [WIDE] * 3 + [TALL] * 1


def test_a_known_schedule():
    assert bucket_schedule([2, 1], 6) == [0, 1, 0, 0, 1, 0]
    assert bucket_schedule([5], 3) == [0, 0, 0]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any), st.integers(1, 200))
def test_buckets_are_drawn_in_proportion(sizes, steps):
    total = sum(sizes)
    schedule = bucket_schedule(sizes, steps)
    assert bucket_schedule(sizes, steps + 5)[:steps] == schedule
    drawn = Counter(schedule)
    for bucket, size in enumerate(sizes):
        assert drawn[bucket] * total < steps * size + total  # never a whole draw ahead of its share
    whole = Counter(bucket_schedule(sizes, 2 * total))
    assert [whole[bucket] for bucket in range(len(sizes))] == [2 * size for size in sizes]


@pytest.mark.parametrize("global_batch", [1, 2, 3, 4, 7, 16])
def test_every_picture_of_a_bucket_is_seen_equally_often(global_batch):
    plan = BatchPlan(BUCKETS, global_batch, steps=45, seed=3)
    seen = Counter()
    for step in range(45):
        indices = plan.indices(step)
        assert len(indices) == global_batch
        assert len({BUCKETS[index] for index in indices}) == 1
        seen.update(indices)
        for bucket in {SQUARE, WIDE, TALL}:
            counts = [seen[index] for index, which in enumerate(BUCKETS) if which == bucket]
            assert max(counts) - min(counts) <= 1
    assert set(seen) == set(range(len(BUCKETS)))


def test_a_step_needs_no_history():
    plan = BatchPlan(BUCKETS, 4, steps=30, seed=0)
    straight = [plan.indices(step) for step in range(30)]
    assert [BatchPlan(BUCKETS, 4, steps=100, seed=0).indices(step) for step in reversed(range(30))] == straight[::-1]
    assert [BatchPlan(BUCKETS, 4, steps=30, seed=1).indices(step) for step in range(30)] != straight


def test_a_larger_batch_takes_the_same_stream_in_larger_pieces():
    stream = endless_order(range(7), 0, WIDE, 0, 100)
    assert [endless_order(range(7), 0, WIDE, start, 5) for start in range(0, 100, 5)] == [
        stream[start : start + 5] for start in range(0, 100, 5)
    ]
    assert all(sorted(stream[start : start + 7]) == list(range(7)) for start in range(0, 98, 7))
    assert stream[:7] != stream[7:14]


def example(name, bucket=WIDE, tokens=5):
    value = float(name)
    return CachedExample(
        name,
        bucket,
        torch.full((4, 2, 3), value),
        TextCond(torch.full((1, tokens, 6), value), torch.full((1, 2), value)),
    )


def test_collate_keeps_the_order_and_the_slots():
    batch = collate([example(str(index)) for index in range(5)], [3, 0, 3], [4, 5, 6])
    assert batch.latents_BCHW[:, 0, 0, 0].tolist() == [3, 0, 3]
    assert batch.text.embeds_BLD.shape == (3, 5, 6)
    assert batch.text.pooled_BP[:, 0].tolist() == [3, 0, 3]
    assert batch.slots == (4, 5, 6)
    assert batch.names == ("3", "0", "3")


def test_collate_refuses_what_cannot_be_one_batch():
    with pytest.raises(AssertionError, match="one bucket"):
        collate([example("0"), example("1", TALL)], [0, 1], [0, 1])
    with pytest.raises(AssertionError, match="one length"):
        collate([example("0"), example("1", tokens=4)], [0, 1], [0, 1])
    with pytest.raises(AssertionError, match="one slot"):
        collate([example("0")], [0], [0, 1])


def test_adding_pictures_does_not_move_the_others():
    keys = [f"digest{index}" for index in range(200)]
    train, held_out = split_holdout(keys, 0.2, seed=0)
    assert sorted(train + held_out) == list(range(200))
    assert 20 <= len(held_out) <= 60
    more = ["added0", *keys, "added1"]
    _, held_out_of_more = split_holdout(more, 0.2, seed=0)
    assert {more[index] for index in held_out_of_more} & set(keys) == {keys[index] for index in held_out}
    assert split_holdout(keys, 0.2, seed=1)[1] != held_out


def test_neither_side_of_the_split_is_empty():
    assert split_holdout(["a", "b", "c"], 0, seed=0) == ([0, 1, 2], [])
    assert split_holdout(["a"], 0.9, seed=0) == ([0], [])
    for seed in range(20):
        for fraction in (0.001, 0.999):
            train, held_out = split_holdout(["a", "b", "c"], fraction, seed)
            assert len(train) >= 1
            assert len(held_out) >= 1


def test_equal_pictures_fall_on_the_same_side():
    train, held_out = split_holdout(["a", "b", "a", "b"], 0.5, seed=0)
    assert sorted([train, held_out]) == [[0, 2], [1, 3]]
