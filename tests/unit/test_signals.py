"""Quality signals: what is weak is told with numbers, and what is meant so is left alone."""

import io
import random
import time
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from flux_ft.data.signals import BLURRED_BELOW, advice, measure, picture_warnings, same_scene
from flux_ft.families.tiny.scenes import all_scenes, render
from flux_ft.types import Bucket, Sample, Signals, SourceFile

SIZE = (640, 480)


def photograph(seed, size=SIZE):
    """Shapes with soft shading and fine texture, as light falls on things."""
    draw = np.random.default_rng(seed)
    picture = Image.new("RGB", size, tuple(int(level) for level in draw.integers(40, 200, 3)))
    pen = ImageDraw.Draw(picture)
    for _ in range(40):
        x, y, radius = (int(value) for value in draw.uniform((0, 0, 10), (*size, 90)))
        ink = tuple(int(level) for level in draw.integers(20, 235, 3))
        shape = pen.ellipse if draw.random() < 0.5 else pen.rectangle
        shape((x - radius, y - radius, x + radius, y + radius), fill=ink)
    texture = draw.normal(0, 4, (size[1], size[0], 1))
    light = np.linspace(0.7, 1.1, size[0])[None, :, None]
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.5)), float) * light + texture
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def blurred(picture, radius):
    return picture.filter(ImageFilter.GaussianBlur(radius))


def moved(picture, pixels):
    rows = np.asarray(picture, float)
    sums = np.cumsum(np.pad(rows, ((0, 0), (pixels, 0), (0, 0))), axis=1)
    return Image.fromarray(((sums[:, pixels:] - sums[:, :-pixels]) / pixels)[:, pixels:].astype(np.uint8))


def noisy(picture, levels):
    pixels = np.asarray(picture) + np.random.default_rng(0).normal(0, levels, (*picture.size[::-1], 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(picture, quality):
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality)
    return Image.open(file).convert("RGB")


def exposed(picture, stops):
    light = (np.asarray(picture) / 255) ** 2.2 * 2.0**stops
    return Image.fromarray((np.clip(light, 0, 1) ** (1 / 2.2) * 255).astype(np.uint8))


def sharpness(picture):
    return measure(np.asarray(picture)).sharpness


def phash(picture):
    return measure(np.asarray(picture)).phash


def warnings(picture):
    width, height = picture.size
    return picture_warnings(measure(np.asarray(picture)), width, height, width * height)


@pytest.mark.parametrize("seed", range(4))
def test_a_sharp_picture_is_sharp_whatever_its_contrast_size_and_compression(seed):
    picture = photograph(seed)
    faint = Image.fromarray((np.asarray(picture) * 0.3 + 90).astype(np.uint8))
    for same in (picture, faint, picture.reduce(2), jpeg(picture, 60), noisy(picture, 4), photograph(seed, (120, 90))):
        assert sharpness(same) > BLURRED_BELOW


@pytest.mark.parametrize("seed", range(4))
def test_a_blurred_picture_is_called_blurred(seed):
    picture = photograph(seed)
    for weak in (
        blurred(picture, 2.5),
        blurred(picture, 6),
        noisy(blurred(picture, 3), 1.5),
        jpeg(blurred(picture, 4), 85),
        moved(picture, 11),
        moved(picture.rotate(90, expand=True), 11).rotate(-90, expand=True),
        picture.reduce(5).resize(picture.size, Image.Resampling.BICUBIC),
    ):
        assert warnings(weak) == ("looks blurred",)


def test_sharpness_falls_with_blur():
    picture = photograph(0)
    falling = [sharpness(blurred(picture, radius)) for radius in (0, 1, 2, 3, 4)]
    assert falling == sorted(falling, reverse=True)


def test_a_sharp_subject_before_a_soft_background_is_not_blurred():
    picture = photograph(0)
    portrait = blurred(picture, 6)
    box = (220, 120, 420, 360)
    portrait.paste(picture.crop(box), box)
    assert warnings(portrait) == ()


def test_the_toy_world_gives_no_warning():
    scenes = random.Random(0).sample(all_scenes(), 100)
    assert [found for scene in scenes if (found := warnings(Image.fromarray(render(scene))))] == []


def drawing(background, ink):
    picture = Image.new("RGB", SIZE, background)
    ImageDraw.Draw(picture).ellipse((250, 170, 390, 310), fill=ink)
    return picture


@pytest.mark.parametrize(
    ("background", "ink"), [("white", "red"), ("white", "black"), ("black", "white"), ("black", "orange")]
)
def test_a_thing_before_plain_white_or_black_is_fine(background, ink):
    assert warnings(drawing(background, ink)) == ()


def test_an_overexposed_picture_is_told_with_its_share():
    sky = np.asarray(photograph(0)).copy()
    sky[:250, 40:600] = 255
    signals = measure(sky)
    assert signals.bright == pytest.approx(250 * 560 / (640 * 480), abs=0.03)
    assert warnings(Image.fromarray(sky)) == (
        f"{100 * signals.bright:.0f} % of it is blown out to white (fine if that is a backdrop)",
    )


def test_an_underexposed_picture_is_told_with_its_share():
    (told,) = warnings(exposed(photograph(0), -9))
    assert told.endswith(" % of it is almost black")


@pytest.mark.parametrize(("color", "share"), [("white", "bright"), ("black", "dark")])
def test_a_picture_of_nothing_is_told(color, share):
    empty = Image.new("RGB", SIZE, color)
    assert getattr(measure(np.asarray(empty)), share) == 1.0
    assert warnings(empty)[0].startswith("100 % of it is ")


def test_small_is_said_with_both_numbers():
    fine = Signals(phash=1, sharpness=1.0, dark=0.0, bright=0.0)
    assert picture_warnings(fine, 300, 200, 1024 * 1024) == (
        "small: 300 × 200 px, less than a quarter of the 1,048,576 px that is trained on",
    )
    assert picture_warnings(fine, 512, 512, 1024 * 1024) == ()


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (7, 7), (8, 8), (8, 900), (33, 31), (16, 4096)])
def test_every_size_can_be_measured(size):
    for picture in (Image.new("RGB", size, "gray"), photograph(0).resize(size)):
        signals = measure(np.asarray(picture))
        assert 0 <= signals.sharpness <= 1
        assert 0 <= signals.phash < 2**64
        assert 0 <= signals.dark + signals.bright <= 1


def test_a_megapixel_is_measured_fast():
    pixels = np.asarray(photograph(0, (1024, 1024)))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        measure(pixels)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.05  # measured: 9 ms


@pytest.mark.parametrize("seed", range(4))
def test_one_scene_is_known_again(seed):
    picture = photograph(seed)
    width, height = picture.size
    others = (
        jpeg(picture, 40),
        picture.reduce(3),
        picture.crop((width // 50, height // 50, width - width // 50, height - height // 50)),
        exposed(picture, 0.5),
        exposed(picture, -1),
        blurred(picture, 2),
        picture.resize((512, 512)),
    )
    assert same_scene([phash(picture), *map(phash, others)]) == [tuple(range(8))]


def test_different_scenes_are_told_apart():
    assert same_scene([phash(photograph(seed)) for seed in range(60)]) == []


def test_pictures_without_structure_are_no_scene():
    colors = ("white", "black", "red", (128, 128, 128))
    flat = [phash(Image.new("RGB", SIZE, color)) for color in colors]
    flat += [phash(noisy(Image.new("RGB", SIZE, color), 3)) for color in colors]
    assert flat == [0] * 8
    assert same_scene(flat) == []


def test_one_thing_in_other_colors_is_another_scene():
    assert same_scene([phash(drawing(*colors)) for colors in (("tan", "navy"), ("green", "yellow"))]) == []


def test_groups_are_around_their_first_and_no_chain():
    steps = [(1 << count) - 1 << 20 for count in range(1, 40)]
    assert same_scene(steps, 4) == [tuple(range(start, min(start + 5, 39))) for start in range(0, 39, 5)]


def test_groups_are_those_of_the_plain_definition():
    draw = random.Random(0)
    centers = [draw.getrandbits(64) for _ in range(40)]
    hashes = [0, *centers]
    hashes += [
        draw.choice(centers) ^ sum(1 << bit for bit in draw.sample(range(64), draw.randint(0, 12))) for _ in range(600)
    ]
    draw.shuffle(hashes)
    left, expected = [index for index, value in enumerate(hashes) if value], []
    while left:
        group = tuple(index for index in left if (hashes[left[0]] ^ hashes[index]).bit_count() <= 8)
        left = [index for index in left if index not in group]
        if len(group) > 1:
            expected.append(group)
    assert same_scene(hashes) == expected


def test_few_hashes_make_no_group():
    assert same_scene([]) == same_scene([0]) == same_scene([7]) == []
    assert same_scene([2**64 - 1, 5, 2**64 - 1]) == [(0, 2)]


def test_twenty_thousand_hashes_are_grouped_fast():
    draw = random.Random(0)
    hashes = [draw.getrandbits(64) for _ in range(10_000)]
    started = time.perf_counter()
    assert len(same_scene(hashes * 2, 4)) == 10_000
    assert same_scene([5] * 20_000) == [tuple(range(20_000))]
    assert time.perf_counter() - started < 5  # measured: 0.5 s


@dataclass(frozen=True)
class Folder:
    label: str = "pictures"
    identity: str = "/pictures"

    def files(self):
        return iter(())

    def read(self, name):
        return b""


def sample(name, digest=None, source=None, **settings):
    return Sample(
        **{
            "file": SourceFile(source or Folder(), name),
            "caption": f"TOK, {name}",
            "caption_source": "txt",
            "content_digest": name,
            "width_px": 64,
            "height_px": 64,
            "digest": digest or name,
            "buckets": (Bucket(64, 64),),
            "signals": Signals(1, 1.0, 0.0, 0.0),
            **settings,
        }
    )


def samples(count, **settings):
    return [sample(f"{number}.jpg", **settings) for number in range(count)]


def test_nothing_is_said_of_good_pictures():
    assert advice([], []) == []
    assert advice(samples(5), []) == []


def test_few_pictures_are_told():
    (one,) = advice(samples(1), [])
    assert one.startswith("1 picture is few: add more")
    (four,) = advice(samples(4), [])
    assert four.startswith("4 pictures are few: add more")


def test_the_same_scene_is_told_with_names():
    (line,) = advice(samples(20), [(1, 2), tuple(range(4, 11))])
    assert line.startswith(
        "7 of 20 pictures show the same scene (4.jpg, 5.jpg, 6.jpg, 7.jpg, 8.jpg and 2 more); "
        "1 more scene comes more than once: keep the best"
    )


def test_exact_copies_are_told_once_and_not_as_a_scene():
    pictures = [sample("a.jpg", "same"), sample("b.png", "same"), *samples(6)]
    (line,) = advice(pictures, [(0, 1)])
    assert line.startswith("the same picture is there 2 times (a.jpg, b.png): keep one")


def test_names_say_their_source_where_there_are_several():
    pictures = [sample("a.jpg", "same"), sample("a.jpg", "same", source=Folder("others")), *samples(6)]
    (line,) = advice(pictures, [])
    assert "(pictures: a.jpg, others: a.jpg)" in line


@pytest.mark.parametrize(
    ("warning", "words"), [("small: 9 × 9 px, less", "are small"), ("looks blurred", "look blurred")]
)
def test_a_weakness_of_many_is_told_of_the_run(warning, words):
    weak = [sample(f"weak{number}.jpg", warnings=(warning,)) for number in range(2)]
    (line,) = advice([*samples(6), *weak], [])
    assert line.startswith(f"2 of 8 pictures {words} (weak0.jpg, weak1.jpg): ")
    assert advice([*samples(7), *weak], []) == []


def test_one_caption_for_all_is_told_unless_it_is_the_bare_trigger():
    (line,) = advice(samples(6, caption="TOK"), [])
    assert line.startswith("all 6 pictures have the same caption: ")
    assert advice(samples(6, caption="TOK", caption_source="trigger"), []) == []
