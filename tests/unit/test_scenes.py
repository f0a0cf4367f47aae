"""The procedural world of flux-tiny: drawing, captions, the held-out eighth, and reading pictures back."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_ft.families.tiny.reader import SceneReader
from flux_ft.families.tiny.scenes import (
    COLORS,
    POSITIONS,
    SHAPES,
    SIZE_PX,
    SIZES,
    Part,
    Scene,
    all_scenes,
    caption,
    coverage,
    is_held_out,
    render,
    render_emblem,
)

EMBLEM = (
    Part("circle", (0, 150, 150)),
    Part("cross", (255, 120, 180), radius=0.8),
    Part("diamond", (60, 30, 10), radius=0.35),
)
FIELDS = {"shape", "color", "size", "position", "background"}


@pytest.fixture(scope="module")
def reader():
    return SceneReader()


@pytest.fixture(scope="module")
def emblem_reader():
    return SceneReader(EMBLEM)


def sample(count, seed=0):
    rng = np.random.default_rng(seed)
    scenes = all_scenes()
    return [scenes[i] for i in rng.choice(len(scenes), count, replace=False)]


# --- The world. ---


def test_all_scenes_are_different_and_visible():
    scenes = all_scenes()
    assert (
        len(scenes) == len(set(scenes)) == len(SHAPES) * len(COLORS) * (len(COLORS) - 1) * len(SIZES) * len(POSITIONS)
    )
    assert all(scene.color != scene.background for scene in scenes)
    assert scenes == all_scenes()


def test_an_eighth_is_held_out_and_covers_every_word():
    scenes = all_scenes()
    held_out = [scene for scene in scenes if is_held_out(scene)]
    assert len(held_out) * 8 == len(scenes)
    for field, words in (
        ("shape", SHAPES), ("color", COLORS), ("background", COLORS), ("size", SIZES), ("position", POSITIONS),
    ):  # fmt: skip
        counts = Counter(getattr(scene, field) for scene in held_out)
        assert set(counts) == set(words), field
        assert max(counts.values()) <= 2 * min(counts.values()), field


def test_size_and_position_do_not_decide_what_is_held_out():
    groups = Counter((s.shape, s.color, s.background) for s in all_scenes() if is_held_out(s))
    assert set(groups.values()) == {len(SIZES) * len(POSITIONS)}


def test_pairs_of_held_out_words_are_all_seen_in_training():
    """What is new in a held-out scene is the combination of three; each pair of them was shown."""
    seen = [scene for scene in all_scenes() if not is_held_out(scene)]
    for pair in (("shape", "color"), ("shape", "background"), ("color", "background")):
        want = {tuple(getattr(scene, field) for field in pair) for scene in all_scenes()}
        assert {tuple(getattr(scene, field) for field in pair) for scene in seen} == want


def test_renders_repeat_and_jitter_moves_them():
    for scene in sample(20):
        plain = render(scene)
        assert plain.shape == (SIZE_PX, SIZE_PX, 3)
        assert plain.dtype == np.uint8
        assert np.array_equal(plain, render(scene))
        moved = render(scene, np.random.default_rng(1))
        assert np.array_equal(moved, render(scene, np.random.default_rng(1)))
        assert not np.array_equal(moved, plain)


def test_a_figure_has_its_colour_at_its_place():
    for shape in ("circle", "square", "diamond", "cross", "star", "heart"):
        for position, (x, y) in POSITIONS.items():
            picture = render(Scene(shape, "red", "small", position, "blue"))
            assert tuple(picture[y, x]) == COLORS["red"]
            assert tuple(picture[0, 0]) == COLORS["blue"]
    ring = render(Scene("ring", "red", "large", "center", "blue"))
    assert tuple(ring[32, 32]) == COLORS["blue"]


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_grows_with_radius_and_stays_inside(shape):
    small, large = (coverage(shape, 32, 32, radius) for radius in SIZES.values())
    for mask in (small, large):
        assert mask.shape == (SIZE_PX, SIZE_PX)
        assert mask.min() == 0
        assert mask.max() == 1
    assert large.sum() > 1.5 * small.sum()
    assert not large[:12].any()
    assert not large[:, -12:].any()


def test_shapes_differ_from_each_other():
    masks = {shape: coverage(shape, 32, 32, SIZES["small"]) for shape in SHAPES}
    for one in SHAPES:
        for other in SHAPES:
            if one < other:
                assert np.abs(masks[one] - masks[other]).sum() > 20, (one, other)


# --- Captions. ---


@given(st.sampled_from(all_scenes()), st.integers(0, 2**32 - 1))
def test_captions_say_all_five_words_in_every_pattern(scene, seed):
    text = caption(scene, np.random.default_rng(seed))
    assert all(word in text for word in dataclasses.astuple(scene)), text
    assert "  " not in text
    assert not any(f" a {vowel}" in f" {text}" for vowel in ("orange ", "emblem"))


def test_captions_come_in_several_patterns_and_the_plain_one_repeats():
    scene = Scene("star", "orange", "small", "top left", "white")
    made = {caption(scene, np.random.default_rng(seed)) for seed in range(60)}
    assert len(made) == 8
    assert caption(scene) == "a small orange star in the top left on a white background"
    assert (
        caption(Scene("ring", "red", "large", "left", "orange"))
        == "a large red ring on the left on an orange background"
    )


def test_a_name_stands_in_for_colour_and_shape():
    scene = Scene("star", "orange", "small", "top left", "white")
    for seed in range(40):
        text = caption(scene, np.random.default_rng(seed), name="TOK")
        assert "TOK" in text
        assert "orange" not in text
        assert "star" not in text
        assert all(word in text for word in ("small", "top left", "white"))


def test_different_scenes_have_different_plain_captions():
    texts = {caption(scene) for scene in all_scenes()}
    assert len(texts) == len(all_scenes())


# --- Reading. ---


def test_clean_jittered_renders_are_read_right(reader):
    scenes = sample(320, seed=3)
    right = 0
    for number, scene in enumerate(scenes):
        hits = reader.read(render(scene, np.random.default_rng(number))).matches(scene)
        assert set(hits) == FIELDS
        right += all(hits.values())
    assert right / len(scenes) >= 0.99


def test_every_word_is_read_unjittered(reader):
    for shape in SHAPES:
        for index, (position, size) in enumerate((p, s) for p in POSITIONS for s in SIZES):
            color = list(COLORS)[index % 8]
            scene = Scene(shape, color, size, position, list(COLORS)[(index + 3) % 8])
            assert all(reader.read(render(scene)).matches(scene).values()), scene


def test_slightly_noisy_and_blurred_renders_are_still_read(reader):
    rng = np.random.default_rng(0)
    scenes = sample(60, seed=4)
    right = 0
    for scene in scenes:
        picture = render(scene, rng).astype(float)
        picture = (picture + np.roll(picture, 1, 0) + np.roll(picture, 1, 1)) / 3 + rng.normal(0, 6, picture.shape)
        right += all(reader.read(picture.clip(0, 255).astype(np.uint8)).matches(scene).values())
    assert right / len(scenes) >= 0.9


def blank(rgb):
    return np.full((SIZE_PX, SIZE_PX, 3), rgb, np.uint8)


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8)


def gradient(seed):
    """Like a photograph: light from one side, soft blobs, some grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX] / SIZE_PX
    picture = np.stack([80 + 120 * x + 40 * rng.random() * y, 60 + 150 * y, 200 - 130 * x * y], axis=2)
    for _ in range(5):
        cx, cy, width = rng.random(3)
        picture += 60 * rng.normal(size=3) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (0.02 + 0.1 * width))[..., None]
    return (picture + rng.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)


def two_shapes(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.choice(SHAPES, 2, replace=False)
    left = render(Scene(str(first), "red", "large", "left", "white"))
    right = render(Scene(str(second), "blue", "large", "right", "white"))
    return np.concatenate([left[:, :32], right[:, 32:]], axis=1)


@pytest.mark.parametrize("rgb", [*COLORS.values(), (128, 128, 128)])
def test_a_blank_picture_shows_nothing(reader, emblem_reader, rgb):
    assert reader.read(blank(rgb)).shape is None
    assert emblem_reader.read(blank(rgb)).shape is None


@pytest.mark.parametrize("make", [noise, gradient, two_shapes])
def test_what_is_no_scene_is_read_as_none(reader, emblem_reader, make):
    for seed in range(8):
        reading = reader.read(make(seed))
        assert (reading.shape, reading.color, reading.size, reading.position) == (None,) * 4, (seed, reading)
        assert emblem_reader.read(make(seed)).shape is None


def test_a_reading_of_nothing_matches_no_scene(reader):
    assert not any(hit for field, hit in reader.read(noise(0)).matches(sample(1)[0]).items() if field != "background")


def test_the_emblem_is_recognised_in_its_place(reader, emblem_reader):
    rng = np.random.default_rng(2)
    plain = 0
    for number, position in enumerate(POSITIONS):
        for background in (list(COLORS)[number % 8], list(COLORS)[(number + 3) % 8]):
            rgb = COLORS[background]
            offset = (float(rng.uniform(-2, 2)), float(rng.uniform(-2, 2)))
            picture = render_emblem(EMBLEM, "large", position, rgb, offset)
            reading = emblem_reader.read(picture)
            assert (reading.shape, reading.size, reading.position, reading.background) == (
                "emblem", "large", position, background,
            )  # fmt: skip
            plain += reader.read(picture).shape == "emblem"
    assert plain == 0


def test_a_reader_that_knows_the_emblem_still_reads_shapes(emblem_reader):
    scenes = sample(30, seed=6)
    readings = [emblem_reader.read(render(scene, np.random.default_rng(i))) for i, scene in enumerate(scenes)]
    assert not any(reading.shape == "emblem" for reading in readings)
    assert sum(all(r.matches(s).values()) for r, s in zip(readings, scenes, strict=True)) >= 29


def test_a_picture_of_another_size_is_refused(reader):
    with pytest.raises(ValueError, match="64"):
        reader.read(np.zeros((32, 64, 3), np.uint8))
