"""The cache: what is there is reused, what changed is made again, and nothing torn is ever read."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ft.data.cache import cache_latents, cache_texts, latent_path, load_examples, load_text, text_path
from flux_ft.data.images import load_rgb
from flux_ft.data.ingest import ingest
from flux_ft.errors import DataError, NonFiniteError, StorageError
from flux_ft.types import Bucket, TextCond


class Encoders:
    """Counts how often it is opened and what it is asked."""

    def __init__(self):
        self.opened, self.shapes, self.captions = 0, [], []

    def image(self):
        self.opened += 1

        def encode(pixels_B3HW):
            assert pixels_B3HW.dtype == torch.float32
            self.shapes.append(tuple(pixels_B3HW.shape))
            return torch.nn.functional.avg_pool2d(pixels_B3HW, 8)

        return encode

    def text(self):
        self.opened += 1

        def encode(captions):
            self.captions.append(list(captions))
            lengths = torch.tensor([float(len(caption)) for caption in captions])
            return TextCond(lengths[:, None, None].expand(-1, 5, 3), lengths[:, None].expand(-1, 2))

        return encode


@pytest.fixture
def encoders():
    return Encoders()


@pytest.fixture
def placed(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    sizes = [(32, 32)] * 6 + [(64, 32)] * 2
    for index, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = folder / ("sub" if index % 2 else ".") / f"{index}.png"
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text("a" * (index % 3 + 1))
    return ingest(folder, "", "general", 1_048_576, 16).placed


def fill(placed, folder, encoders, image_print="vae", text_print="t5"):
    captions = [one.sample.caption for one in placed]
    return (
        cache_latents(placed, folder, image_print, encoders.image),
        cache_texts(captions, folder, text_print, encoders.text),
    )


def test_examples_come_back_in_order_with_what_the_encoders_said(placed, tmp_path, encoders):
    assert fill(placed, tmp_path / "cache", encoders) == (8, 3)
    examples = load_examples(placed, tmp_path / "cache", "vae", "t5")
    assert [example.name for example in examples] == [
        "0.png", "2.png", "4.png", "6.png", "sub/1.png", "sub/3.png", "sub/5.png", "sub/7.png",
    ]  # fmt: skip
    for example, one in zip(examples, placed, strict=True):
        pixels = torch.tensor(load_rgb(one.sample.path, one.bucket)).permute(2, 0, 1).double() / 255 * 2 - 1
        expected = torch.nn.functional.avg_pool2d(pixels[None], 8)[0]
        torch.testing.assert_close(example.latent_CHW.double(), expected, rtol=0, atol=1e-6)
        assert example.bucket == one.bucket
        length = float(len(one.sample.caption))
        assert torch.equal(example.text.embeds_BLD, torch.full((1, 5, 3), length))
        assert torch.equal(example.text.pooled_BP, torch.full((1, 2), length))


def test_pictures_are_batched_by_bucket_and_captions_once_each(placed, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    assert encoders.shapes == [(4, 3, 32, 32), (2, 3, 32, 32), (2, 3, 32, 64)]
    assert [sorted(batch) for batch in encoders.captions] == [["a", "aa", "aaa"]]
    cache_texts([f"p{index}" for index in range(11)], tmp_path, "t5", encoders.text)
    assert [len(batch) for batch in encoders.captions] == [3, 8, 3]


def test_a_full_cache_opens_no_encoder(placed, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    assert encoders.opened == 2
    assert fill(placed, tmp_path, encoders) == (0, 0)
    assert encoders.opened == 2


def test_only_what_changed_is_encoded_again(placed, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    captioned = [replace(placed[0], sample=replace(placed[0].sample, caption="new")), *placed[1:]]
    assert fill(captioned, tmp_path, encoders) == (0, 1)
    redrawn = [replace(placed[0], sample=replace(placed[0].sample, digest="another")), *placed[1:]]
    assert fill(redrawn, tmp_path, encoders) == (1, 0)
    resized = [replace(placed[0], bucket=Bucket(16, 16)), *placed[1:]]
    assert fill(resized, tmp_path, encoders) == (1, 0)
    moved = [replace(one, sample=replace(one.sample, path=one.sample.path.with_name("x.png"))) for one in placed]
    assert fill(moved, tmp_path, encoders) == (0, 0)
    assert fill(placed, tmp_path, encoders, image_print="other") == (8, 0)
    assert fill(placed, tmp_path, encoders, text_print="other") == (0, 3)


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_entry_is_refused_by_the_reader_and_made_again(placed, tmp_path, encoders, damage):
    fill(placed, tmp_path, encoders)
    whole = load_examples(placed, tmp_path, "vae", "t5")
    for path in (latent_path(tmp_path, placed[0], "vae"), text_path(tmp_path, placed[0].sample.caption, "t5")):
        path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
    with pytest.raises(StorageError, match="missing or damaged"):
        load_examples(placed, tmp_path, "vae", "t5")
    assert fill(placed, tmp_path, encoders) == (1, 1)
    again = load_examples(placed, tmp_path, "vae", "t5")
    assert all(torch.equal(a.latent_CHW, b.latent_CHW) for a, b in zip(whole, again, strict=True))


def test_extra_captions_can_be_loaded_and_the_empty_one_too(tmp_path, encoders):
    assert cache_texts(["", "a  cat", "a cat"], tmp_path, "t5", encoders.text) == 2
    assert load_text("", tmp_path, "t5").pooled_BP.tolist() == [[0.0, 0.0]]
    assert load_text("a\ncat", tmp_path, "t5").pooled_BP.tolist() == [[5.0, 5.0]]
    with pytest.raises(StorageError):
        load_text("", tmp_path, "clip")


def test_bfloat16_stays_bfloat16(placed, tmp_path, encoders):
    cache_texts(["a", "aa", "aaa"], tmp_path, "t5", encoders.text)
    cache_latents(placed, tmp_path, "vae", lambda: lambda pixels: pixels.bfloat16())
    example = load_examples(placed, tmp_path, "vae", "t5")[0]
    assert example.latent_CHW.dtype == torch.bfloat16


def test_nothing_is_left_behind_but_whole_entries(placed, tmp_path, encoders):
    fill(placed, tmp_path / "cache", encoders)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 11
    assert all(path.suffix == ".safetensors" for path in files)


def test_numbers_that_are_not_finite_are_never_stored(placed, tmp_path):
    with pytest.raises(NonFiniteError, match=r"0\.png") as caught:
        cache_latents(placed[:1], tmp_path, "vae", lambda: lambda pixels: pixels * float("nan"))
    assert caught.value.hint
    assert not latent_path(tmp_path, placed[0], "vae").exists()


def test_a_picture_that_went_bad_is_named(placed, tmp_path, encoders):
    placed[0].sample.path.write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"0\.png"):
        cache_latents(placed, tmp_path, "vae", encoders.image)


def test_a_disk_without_room_is_refused_before_the_first_entry(placed, tmp_path, encoders, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    # 6 latents of 3·4·4 and 2 of 3·4·8 float32: 1920 bytes.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1919))
    with pytest.raises(StorageError, match="free") as caught:
        cache_latents(placed, tmp_path / "cache", "vae", encoders.image)
    assert caught.value.hint
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1920))
    assert cache_latents(placed, tmp_path / "cache", "vae", encoders.image) == 8


def test_a_full_disk_while_writing_is_told(placed, tmp_path, encoders, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        cache_latents(placed, tmp_path / "cache", "vae", encoders.image)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
