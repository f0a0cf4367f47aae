"""Buckets: the cap is exact for every aspect, nothing is enlarged, and little is cropped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ft.data.buckets import bucket_for, crop_box, crop_loss
from flux_ft.errors import DataError
from flux_ft.types import Bucket

MEGAPIXEL = 1_048_576
sides = st.integers(16, 100_000) | st.integers(16, 400)
grids = st.sampled_from([8, 16, 32, 64])
caps = st.sampled_from([64 * 64, 512 * 512, MEGAPIXEL])


@given(sides, sides, caps, grids)
def test_within_the_cap_on_the_grid_and_never_enlarged(width, height, cap, multiple):
    if min(width, height) < multiple:
        return
    bucket = bucket_for(width, height, cap, multiple)
    assert bucket.width_px * bucket.height_px <= cap
    assert bucket.width_px % multiple == 0
    assert bucket.height_px % multiple == 0
    assert multiple <= bucket.width_px <= width
    assert multiple <= bucket.height_px <= height


@given(sides, sides, caps, grids)
def test_the_crop_is_less_than_one_grid_cell_of_the_shorter_side(width, height, cap, multiple):
    shrink = min(1.0, (cap / (width * height)) ** 0.5)
    shorter = min(width, height) * shrink
    if shorter < multiple + 1:
        return
    bucket = bucket_for(width, height, cap, multiple)
    assert 0 <= crop_loss(width, height, bucket) < multiple / shorter
    # Large as well as little cropped: no smaller than the ideal with both sides rounded down.
    area = bucket.width_px * bucket.height_px
    assert area > (width * shrink - multiple) * (height * shrink - multiple) - 1e-3


@given(sides, sides, caps, grids)
def test_turning_the_picture_turns_the_crop(width, height, cap, multiple):
    if min(width, height) < multiple:
        return
    upright, turned = bucket_for(width, height, cap, multiple), bucket_for(height, width, cap, multiple)
    assert crop_loss(width, height, upright) == pytest.approx(crop_loss(height, width, turned))
    assert upright.width_px * upright.height_px == turned.width_px * turned.height_px


@pytest.mark.parametrize(
    ("width", "height", "cap", "multiple", "expected"),
    [
        (1024, 1024, MEGAPIXEL, 16, Bucket(1024, 1024)),
        (4000, 4000, MEGAPIXEL, 16, Bucket(1024, 1024)),
        (4096, 1024, MEGAPIXEL, 16, Bucket(2048, 512)),
        (1025, 1024, MEGAPIXEL, 16, Bucket(1024, 1024)),
        (640, 480, MEGAPIXEL, 16, Bucket(640, 480)),
        (100, 90, MEGAPIXEL, 16, Bucket(96, 80)),
        (16, 16, MEGAPIXEL, 16, Bucket(16, 16)),
        (100_000, 16, MEGAPIXEL, 16, Bucket(65_536, 16)),
        (300, 300, 64 * 64, 64, Bucket(64, 64)),
    ],
)
def test_known_sizes(width, height, cap, multiple, expected):
    assert bucket_for(width, height, cap, multiple) == expected


def test_a_picture_smaller_than_the_grid_names_the_smallest_side():
    with pytest.raises(DataError, match="180 × 9 px; 16 px is the smallest side"):
        bucket_for(180, 9, MEGAPIXEL, 16)


@given(sides, sides, grids)
def test_the_crop_box_is_centred_inside_and_has_the_buckets_aspect(width, height, multiple):
    if min(width, height) < multiple:
        return
    bucket = bucket_for(width, height, MEGAPIXEL, multiple)
    left, top, right, bottom = crop_box(width, height, bucket)
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height
    assert left == pytest.approx(width - right, abs=1e-6)
    assert top == pytest.approx(height - bottom, abs=1e-6)
    assert (right - left) / (bottom - top) == pytest.approx(bucket.width_px / bucket.height_px)
    kept = (right - left) * (bottom - top) / (width * height)
    assert 1 - kept == pytest.approx(crop_loss(width, height, bucket), abs=1e-9)


def test_crop_loss_of_known_sizes():
    assert crop_loss(200, 100, Bucket(64, 64)) == 0.5
    assert crop_loss(100, 200, Bucket(32, 64)) == 0.0
