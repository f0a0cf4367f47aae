"""Shared work: everything is done once, and every process has as many turns."""

from hypothesis import given
from hypothesis import strategies as st

from flux_ft.data.share import ALONE, Share


@given(items=st.integers(0, 40), count=st.integers(1, 9))
def test_everything_is_done_once_in_as_many_turns(items, count):
    processes = [Share(index, count) for index in range(count)]
    assert sorted(item for one in processes for item in one.of(range(items))) == list(range(items))
    turns = [one.turns(items) for one in processes]
    assert len({len(own) for own in turns}) == 1
    assert all(0 <= position < items for own in turns for position, _ in own)
    for one, own in zip(processes, turns, strict=True):
        assert [position for position, counts in own if counts] == list(one.of(range(items)))


def test_known_turns():
    assert ALONE.turns(3) == [(0, True), (1, True), (2, True)]
    assert [Share(index, 2).turns(3) for index in range(2)] == [[(0, True), (2, True)], [(1, True), (2, False)]]
    assert [Share(index, 3).turns(1) for index in range(3)] == [[(0, True)], [(0, False)], [(0, False)]]


def test_a_bar_says_whose_share_it_shows():
    assert ALONE.named("encode") == "encode"
    assert Share(0, 4).named("encode") == "encode, the share of process 1 of 4"
