"""The loader: batches follow from the seed and the step alone, and no picture is lost."""

import threading
from collections import Counter
from contextlib import closing
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flux_ft import flow
from flux_ft.data.loader import (
    BatchPlan,
    bucket_schedule,
    collate,
    draw_text,
    endless_order,
    made_ahead,
    on_device,
    pinned,
    resampled,
    split_holdout,
)
from flux_ft.errors import StorageError
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


def text(value, tokens=5):
    return TextCond(torch.full((1, tokens, 6), float(value)), torch.full((1, 2), float(value)))


def example(name, bucket=WIDE, tokens=5, **changed):
    value = float(name)
    mean, std = torch.full((4, 2, 3), value), torch.full((4, 2, 3), value / 10 + 0.5)
    return CachedExample(
        name, bucket, mean, changed.pop("std_CHW", std), changed.pop("texts", (text(value, tokens),)), **changed
    )


def test_collate_keeps_the_order_and_the_slots():
    batch = collate([example(str(index)) for index in range(5)], [3, 0, 3], [4, 5, 6])
    assert batch.mean_BCHW[:, 0, 0, 0].tolist() == [3, 0, 3]
    assert batch.std_BCHW[:, 0, 0, 0].tolist() == pytest.approx([0.8, 0.5, 0.8])
    assert batch.text.embeds_BLD.shape == (3, 5, 6)
    assert batch.text.pooled_BP[:, 0].tolist() == [3, 0, 3]
    assert batch.slots == (4, 5, 6)
    assert batch.names == ("3", "0", "3")
    assert batch.weight_BHW is None
    assert batch.loss_weight_B is None


def test_collate_refuses_what_cannot_be_one_batch():
    with pytest.raises(AssertionError, match="one bucket"):
        collate([example("0"), example("1", TALL)], [0, 1], [0, 1])
    with pytest.raises(AssertionError, match="one length"):
        collate([example("0"), example("1", tokens=4)], [0, 1], [0, 1])
    with pytest.raises(AssertionError, match="one slot"):
        collate([example("0")], [0], [0, 1])
    with pytest.raises(AssertionError, match="all or none"):
        collate([example("0"), example("1", std_CHW=None)], [0, 1], [0, 1])


def test_collate_puts_weights_together():
    mask = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    batch = collate([example("0", weight_HW=mask), example("1", loss_weight=0.5)], [1, 0], [0, 1])
    assert torch.equal(batch.weight_BHW, torch.stack([torch.ones(2, 3), mask]))
    assert batch.loss_weight_B.tolist() == [0.5, 1.0]


def test_a_text_is_chosen_by_example_and_slot():
    examples = [example(str(index)) for index in range(3)]
    batch = collate(examples, [2, 1], [7, 8], lambda one, slot: text(10 * slot + int(one.name)))
    assert batch.text.pooled_BP[:, 0].tolist() == [72, 81]


class TestDrawText:
    orders = example("0", texts=tuple(text(value) for value in range(4)))
    blank = text(-1)

    def values(self, one=orders, steps=range(400), slot=0, **given):
        options = {"seed": 3, "dropout": 0.0, "blank": None} | given
        return [float(draw_text(one, slot, step=step, **options).pooled_BP[0, 0]) for step in steps]

    def test_without_orders_and_dropout_it_is_the_caption(self):
        assert set(self.values(example("5"))) == {5.0}
        assert set(self.values(example("5"), dropout=0.9)) == {5.0}  # nothing to put in its place

    def test_every_order_is_as_likely(self):
        counts = Counter(self.values())
        assert set(counts) == {0, 1, 2, 3}
        assert max(counts.values()) < 140

    def test_captions_are_dropped_in_the_share_that_was_asked_for(self):
        dropped = self.values(example("5"), dropout=0.25, blank=self.blank).count(-1)
        assert 70 <= dropped <= 130
        assert self.values(dropout=0.0, blank=self.blank) == self.values()

    def test_dropout_leaves_the_orders_of_the_others_alone(self):
        pairs = zip(self.values(), self.values(dropout=0.5, blank=self.blank), strict=True)
        assert all(dropped in (-1, kept) for kept, dropped in pairs)

    def test_a_draw_depends_on_seed_step_and_slot_alone(self):
        given = {"dropout": 0.3, "blank": self.blank}
        straight = self.values(steps=range(50), **given)
        torch.manual_seed(1)
        assert self.values(steps=range(25, 50), **given) == straight[25:]
        assert self.values(steps=range(50), seed=4, **given) != straight
        assert self.values(steps=range(50), slot=1, **given) != straight


def test_latents_are_drawn_around_their_means():
    batch = collate([example("1"), example("4")], [0, 1, 0], [0, 1, 2])
    draws = torch.stack([resampled(batch, 0, step).mean_BCHW for step in range(400)])
    torch.testing.assert_close(draws.mean((0, 2, 3, 4)), torch.tensor([1.0, 4.0, 1.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std((0, 2, 3, 4)), torch.tensor([0.6, 0.9, 0.6]), atol=0.05, rtol=0)
    assert not torch.equal(draws[:, 0], draws[:, 2])


def test_a_latents_draw_is_keyed_by_step_and_slot():
    whole = resampled(collate([example("1")] * 4, [0, 1, 2, 3], [0, 1, 2, 3]), 5, 9)
    part = resampled(collate([example("1")] * 4, [2, 1], [2, 1]), 5, 9)
    assert torch.equal(part.mean_BCHW, whole.mean_BCHW[[2, 1]])
    noise = flow.draw_noise((4, 2, 3), flow.keyed_generator(5, "latent", 9, 2))
    torch.testing.assert_close(whole.mean_BCHW[2], 1 + 0.6 * noise)
    assert whole.std_BCHW is None
    assert resampled(whole, 5, 9) is whole


class TestMadeAhead:
    @pytest.mark.parametrize("workers", [0, 1, 2, 8])
    def test_batches_are_the_same_for_any_number_of_workers(self, workers):
        examples = [example(str(index)) for index in range(7)]
        plan = BatchPlan([WIDE] * 7, 3, steps=20, seed=2)

        def make(step):
            return resampled(collate(examples, plan.indices(step), range(3)), 2, step)

        made = list(made_ahead(make, range(5, 20), workers))
        assert len(made) == 15
        for step, batch in enumerate(made, 5):
            assert torch.equal(batch.mean_BCHW, make(step).mean_BCHW)
            assert batch.names == make(step).names

    @pytest.mark.parametrize("workers", [0, 1, 4])
    def test_no_more_are_begun_than_there_are_workers(self, workers):
        begun = []
        for done, _ in enumerate(made_ahead(begun.append, range(30), workers), 1):
            assert len(begun) <= done + workers
        assert sorted(begun) == list(range(30))

    def test_they_are_made_in_threads_unless_there_are_no_workers(self):
        def where(step):
            return threading.current_thread()

        here = threading.current_thread()
        assert set(made_ahead(where, range(9), 0)) == {here}
        assert here not in set(made_ahead(where, range(9), 2))

    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_an_error_comes_out_at_its_step_as_itself(self, workers):
        wrong, got = StorageError("damaged"), []

        def make(step):
            if step == 4:
                raise wrong
            return step

        before = set(threading.enumerate())
        with pytest.raises(StorageError) as caught:
            got.extend(made_ahead(make, range(9), workers))
        assert caught.value is wrong
        assert got == [0, 1, 2, 3]
        assert set(threading.enumerate()) <= before

    def test_no_thread_is_left_by_a_run_that_ends_early(self):
        before = set(threading.enumerate())
        with closing(made_ahead(lambda step: step, range(100), 3)) as batches:
            assert [next(batches) for _ in range(5)] == [0, 1, 2, 3, 4]
            assert not set(threading.enumerate()) <= before
        assert set(threading.enumerate()) <= before


def tensors_of(batch):
    held = [getattr(batch, each.name) for each in fields(batch)] + [batch.text.embeds_BLD, batch.text.pooled_BP]
    return [one for one in held if torch.is_tensor(one)]


def test_all_of_a_batch_is_moved():
    mask = torch.ones(2, 3)
    full = collate([example("0", weight_HW=mask), example("1", loss_weight=0.5)], [1, 0], [0, 1])
    for batch, count in ((full, 6), (collate([example("0", std_CHW=None)], [0], [0]), 3)):
        moved = on_device(batch, torch.device("meta"))
        assert len(tensors_of(batch)) == count
        assert [one.shape for one in tensors_of(moved)] == [one.shape for one in tensors_of(batch)]
        assert all(one.is_meta for one in tensors_of(moved))
        assert (moved.slots, moved.names) == (batch.slots, batch.names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_pinned_batch_is_the_same():
    batch = collate([example("0"), example("1", loss_weight=0.5)], [1, 0], [0, 1])
    ready = pinned(batch)
    assert all(one.is_pinned() for one in tensors_of(ready))
    there = on_device(ready, torch.device("cuda"))
    assert all(torch.equal(one.cpu(), was) for one, was in zip(tensors_of(there), tensors_of(batch), strict=True))


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
