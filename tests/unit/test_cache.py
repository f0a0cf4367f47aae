"""The cache: what is there is reused, what changed is made again, and nothing torn is ever read."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from PIL import Image

from flux_ft.data import cache as cache_module
from flux_ft.data.cache import (
    Examples,
    Memory,
    cache_latents,
    cache_texts,
    latent_path,
    load_examples,
    load_text,
    mask_on_grid,
    read_entry,
    text_path,
    verify_cache,
)
from flux_ft.data.images import load_mask, load_picture
from flux_ft.data.share import ALONE, Share
from flux_ft.errors import DataError, NonFiniteError, StorageError
from flux_ft.types import Bucket, Decoding, FoundFile, PlacedSample, Sample, Signals, SourceFile, TextCond

PLAIN = Decoding()
SIGNALS = Signals(0, 1.0, 0.0, 0.0)


@dataclass(eq=False)
class MemorySource:
    """Files in memory, and the order in which they were read."""

    held: dict[str, bytes]
    label: str = "memory"
    identity: str = "memory"
    reads: list[str] = field(default_factory=list)

    def files(self):
        return (FoundFile(name) for name in self.held)

    def read(self, name):
        self.reads.append(name)
        if name not in self.held:
            raise DataError("is gone")
        return self.held[name]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def picture(index, width=32, height=32, channels=3):
    return np.random.default_rng(index).integers(0, 256, (height, width, channels), dtype=np.uint8)


def digest_of(source, name, bucket, mask=None, decoding=PLAIN):
    """As ingest finds it."""
    pixels = load_picture(source.held[name], bucket, decoding)
    if mask is not None:
        pixels = replace(pixels, mask_HW=load_mask(source.held[mask.name], (bucket.width_px, bucket.height_px), bucket))
    return pixels.digest


def sample(source, name, caption, *buckets, decoding=PLAIN, **changed):
    digest = changed.pop("digest", None) or digest_of(source, name, buckets[0], changed.get("mask"), decoding)
    return Sample(
        SourceFile(source, name), caption, "txt", buckets[0].width_px, buckets[0].height_px,
        digest=digest, buckets=buckets, signals=SIGNALS, content_digest=name, **changed,
    )  # fmt: skip


def place(*samples):
    return [PlacedSample(one, bucket) for one in samples for bucket in one.buckets]


class Encoders:
    """Counts how often it is opened and what it is asked."""

    def __init__(self):
        self.opened, self.shapes, self.captions = 0, [], []

    def image(self):
        self.opened += 1

        def encode(pixels_B3HW):
            assert pixels_B3HW.dtype == torch.float32
            self.shapes.append(tuple(pixels_B3HW.shape))
            mean = torch.nn.functional.avg_pool2d(pixels_B3HW, 8)
            return mean, mean.abs() / 10

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
def source():
    sizes = [(32, 32)] * 6 + [(64, 32)] * 2
    return MemorySource({f"{i}.png": png(picture(i, *size)) for i, size in enumerate(sizes)})


@pytest.fixture
def placed(source):
    sizes = [Bucket(32, 32)] * 6 + [Bucket(64, 32)] * 2
    return place(*(sample(source, f"{i}.png", "a" * (i % 3 + 1), size) for i, size in enumerate(sizes)))


def fill(placed, folder, encoders, image_print="vae", text_print="t5", decoding=PLAIN, share=ALONE):
    captions = [one.sample.caption for one in placed]
    return (
        cache_latents(placed, decoding, folder, image_print, encoders.image, share),
        cache_texts(captions, folder, text_print, encoders.text, share),
    )


def load(placed, folder, **options):
    return load_examples(placed, PLAIN, folder, "vae", "t5", **options)


def by_name(examples):
    return {example.name: example for example in examples}


def pooled(pixels_HW3):
    pixels = torch.tensor(pixels_HW3).permute(2, 0, 1).double() / 255 * 2 - 1
    return torch.nn.functional.avg_pool2d(pixels[None], 8)[0]


# --- Filling. ---


def test_examples_are_what_the_encoders_said(placed, tmp_path, encoders):
    assert fill(placed, tmp_path / "cache", encoders) == (8, 3)
    examples = by_name(load(placed, tmp_path / "cache"))
    for index, one in enumerate(placed):
        example = examples[f"{index}.png"]
        expected = pooled(picture(index, one.bucket.width_px, one.bucket.height_px))
        torch.testing.assert_close(example.mean_CHW.double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(example.std_CHW, example.mean_CHW.abs() / 10, rtol=0, atol=0)
        assert (example.bucket, example.digest) == (one.bucket, one.sample.digest)
        assert example.weight_HW is None
        assert example.loss_weight == 1.0
        (text,) = example.texts
        length = float(len(one.sample.caption))
        assert torch.equal(text.embeds_BLD, torch.full((1, 5, 3), length))
        assert torch.equal(text.pooled_BP, torch.full((1, 2), length))


def test_pictures_are_read_and_encoded_one_by_one_in_order(placed, source, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    assert source.reads == [f"{index}.png" for index in range(8)]
    assert encoders.shapes == [(1, 3, 32, 32)] * 6 + [(1, 3, 32, 64)] * 2


def test_captions_are_encoded_once_each_and_alone(tmp_path, encoders):
    cache_texts(["b", "a", "b", " a ", "c"], tmp_path, "t5", encoders.text)
    assert encoders.captions == [["b"], ["a"], ["c"]]


def test_a_picture_of_several_sizes_is_read_once(source, tmp_path, encoders):
    sizes = [Bucket(32, 32), Bucket(16, 16), Bucket(8, 8)]
    placed = place(*(sample(source, f"{i}.png", "a", *sizes) for i in range(6)))
    assert fill(placed, tmp_path, encoders) == (18, 1)
    assert source.reads == [f"{i}.png" for i in range(6)]
    assert [shape[2:] for shape in encoders.shapes] == [(32, 32), (16, 16), (8, 8)] * 6


def test_equal_pictures_are_encoded_once(source, tmp_path, encoders):
    source.held["copy.png"] = source.held["0.png"]
    one = sample(source, "0.png", "a", Bucket(32, 32))
    copy = sample(source, "copy.png", "b", Bucket(32, 32), digest=one.digest)
    assert fill(place(one, copy), tmp_path, encoders) == (1, 2)
    assert source.reads == ["0.png"]
    first, second = load(place(one, copy), tmp_path)
    assert torch.equal(first.mean_CHW, second.mean_CHW)


def test_a_full_cache_opens_no_encoder_and_reads_no_picture(placed, source, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    assert encoders.opened == 2
    source.reads.clear()
    assert fill(placed, tmp_path, encoders) == (0, 0)
    assert encoders.opened == 2
    assert source.reads == []


def test_only_what_changed_is_encoded_again(placed, source, tmp_path, encoders):
    def changed(**values):
        return [replace(placed[0], sample=replace(placed[0].sample, **values)), *placed[1:]]

    fill(placed, tmp_path, encoders)
    assert fill(changed(caption="new"), tmp_path, encoders) == (0, 1)
    elsewhere = MemorySource({"new.png": png(picture(99))})
    new = sample(elsewhere, "new.png", placed[0].sample.caption, Bucket(32, 32))
    assert fill([*place(new), *placed[1:]], tmp_path, encoders) == (1, 0)
    assert fill([replace(placed[0], bucket=Bucket(16, 16)), *placed[1:]], tmp_path, encoders) == (1, 0)
    elsewhere = MemorySource({})
    moved = [replace(one, sample=replace(one.sample, file=SourceFile(elsewhere, "x.png"))) for one in placed]
    assert fill(moved, tmp_path, encoders) == (0, 0)
    assert fill(placed, tmp_path, encoders, decoding=Decoding(background=(0, 0, 0))) == (8, 0)
    assert fill(placed, tmp_path, encoders, image_print="other") == (8, 0)
    assert fill(placed, tmp_path, encoders, text_print="other") == (0, 3)


def test_a_picture_that_changed_since_it_was_scanned_is_refused(placed, source, tmp_path, encoders):
    source.held["3.png"] = png(picture(99))
    with pytest.raises(DataError, match=r"3\.png: it has changed"):
        fill(placed, tmp_path, encoders)
    assert len(list((tmp_path / "latents").iterdir())) == 3


def test_a_changed_picture_does_not_slip_in_at_a_size_that_is_added_later(source, tmp_path, encoders):
    one = sample(source, "6.png", "a", Bucket(64, 32), Bucket(32, 16))
    fill(place(one)[:1], tmp_path, encoders)
    source.held["6.png"] = png(picture(99, 64, 32))
    with pytest.raises(DataError, match=r"6\.png: it has changed") as caught:
        fill(place(one), tmp_path, encoders)
    assert "start again" in caught.value.hint
    assert len(list((tmp_path / "latents").iterdir())) == 1


def test_extra_captions_can_be_loaded_and_the_empty_one_too(tmp_path, encoders):
    assert cache_texts(["", "a  cat", "a cat"], tmp_path, "t5", encoders.text) == 2
    assert load_text("", tmp_path, "t5").pooled_BP.tolist() == [[0.0, 0.0]]
    assert load_text("a\ncat", tmp_path, "t5").pooled_BP.tolist() == [[5.0, 5.0]]
    with pytest.raises(StorageError):
        load_text("", tmp_path, "clip")


def test_bfloat16_stays_bfloat16(placed, tmp_path):
    cache_latents(placed, PLAIN, tmp_path, "vae", lambda: lambda pixels: (pixels.bfloat16(), pixels.bfloat16() ** 2))
    entry = read_entry(latent_path(tmp_path, placed[0], PLAIN, "vae"))
    assert {tensor.dtype for tensor in entry.values()} == {torch.bfloat16}


def test_numbers_that_are_not_finite_are_never_stored(placed, tmp_path):
    with pytest.raises(NonFiniteError, match=r"0\.png") as caught:
        cache_latents(placed[:1], PLAIN, tmp_path, "vae", lambda: lambda pixels: (pixels, pixels / 0))
    assert caught.value.hint
    assert not latent_path(tmp_path, placed[0], PLAIN, "vae").exists()


@pytest.mark.parametrize("change", ["gone", "bad"])
def test_a_picture_that_went_bad_is_named(placed, source, tmp_path, encoders, change):
    source.held.pop("3.png") if change == "gone" else source.held.update({"3.png": b"gone bad"})
    with pytest.raises(DataError, match=r"memory: 3\.png"):
        cache_latents(placed, PLAIN, tmp_path, "vae", encoders.image)


def test_a_disk_without_room_is_refused_before_the_first_entry(placed, tmp_path, encoders, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    # Mean and spread of 6 latents of 3·4·4 and 2 of 3·4·8 float32: 3840 bytes.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3839))
    with pytest.raises(StorageError, match="free") as caught:
        cache_latents(placed, PLAIN, tmp_path / "cache", "vae", encoders.image)
    assert caught.value.hint
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3840))
    assert cache_latents(placed, PLAIN, tmp_path / "cache", "vae", encoders.image) == 8


# --- Several processes, for which threads stand in. ---


def in_processes(count, work, **barrier):
    """`work(share)` in each, side by side."""
    meeting = threading.Barrier(count, timeout=30, **barrier)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [Share(index, count, meeting.wait) for index in range(count)]))


def written(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("count", [2, 3, 12])
def test_several_fill_a_cache_as_one_does(placed, source, tmp_path, encoders, count):
    fill(placed, tmp_path / "one", encoders)
    source.reads.clear()
    each, seen = [Encoders() for _ in range(count)], []

    def work(share):
        return fill(placed, tmp_path / "many", each[share.index], share=share)

    done = in_processes(count, work, action=lambda: seen.append(len(written(tmp_path / "many"))))
    assert seen == [0, 8, 8, 11]  # all have listed what is missing before any writes, and wait for the last
    assert written(tmp_path / "many") == written(tmp_path / "one")
    for shares, total in zip(zip(*done, strict=True), (8, 3), strict=True):
        assert sum(shares) == total
        assert max(shares) - min(shares) <= 1
    assert sorted(source.reads) == [f"{index}.png" for index in range(8)]
    assert [one.opened for one in each] == [bool(images) + bool(texts) for images, texts in done]
    assert in_processes(count, work) == [(0, 0)] * count


def test_all_sizes_of_a_picture_are_one_processs_work(source, tmp_path):
    placed = place(*(sample(source, f"{i}.png", "a", Bucket(32, 32), Bucket(16, 16)) for i in range(5)))
    each = [Encoders(), Encoders()]
    in_processes(2, lambda share: cache_latents(placed, PLAIN, tmp_path, "vae", each[share.index].image, share))
    assert sorted(source.reads) == [f"{index}.png" for index in range(5)]
    assert [len(one.shapes) for one in each] == [6, 4]


def test_room_that_others_have_filled_is_not_missed(placed, tmp_path, encoders, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    free = {True: 0, False: 3840}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[bool(written(tmp_path))]))

    def work(share):
        def open_late():
            while share.index and not written(tmp_path):
                time.sleep(0.001)
            return encoders.image()

        return cache_latents(placed, PLAIN, tmp_path, "vae", open_late, share)

    assert in_processes(2, work) == [4, 4]


def test_a_full_disk_while_writing_is_told(placed, tmp_path, encoders, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        cache_latents(placed, PLAIN, tmp_path / "cache", "vae", encoders.image)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# --- Masks. ---


def half_white(width, height):
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


@pytest.fixture
def masked(source):
    """Two pictures, the second with a mask of its own that is white on the left."""
    source.held["1_mask.png"] = png(half_white(32, 32))
    plain = sample(source, "0.png", "a", Bucket(32, 32), Bucket(16, 16))
    weighted = sample(
        source, "1.png", "a", Bucket(32, 32), Bucket(16, 16), mask=SourceFile(source, "1_mask.png"), masked=True
    )
    return place(plain, weighted)


def test_a_mask_goes_through_the_cache(masked, source, tmp_path, encoders):
    fill(masked, tmp_path, encoders)
    assert source.reads == ["0.png", "1.png", "1_mask.png"]
    assert fill(masked, tmp_path, encoders) == (0, 0)
    for unmasked_weight in (0.0, 0.25, 1.0):
        examples = [one for one in load(masked, tmp_path, unmasked_weight=unmasked_weight) if one.name == "1.png"]
        assert [one.weight_HW.shape for one in examples] == [(2, 2), (4, 4)]
        for example in examples:
            assert float(example.weight_HW.mean()) == pytest.approx(1, abs=1e-6)
        left, right = examples[1].weight_HW.chunk(2, dim=1)
        torch.testing.assert_close(right, left * unmasked_weight)
    assert all(one.weight_HW is None for one in load(masked, tmp_path) if one.name == "0.png")


def test_transparency_can_be_the_mask(tmp_path, encoders):
    pixels = picture(0, channels=4)
    pixels[:, :, 3] = half_white(32, 32)
    source = MemorySource({"0.png": png(pixels)})
    decoding = Decoding(alpha_is_mask=True)
    placed = place(sample(source, "0.png", "a", Bucket(32, 32), masked=True, decoding=decoding))
    fill(placed, tmp_path, encoders, decoding=decoding)
    entry = read_entry(latent_path(tmp_path, placed[0], decoding, "vae"))
    assert torch.equal(entry["mask_HW"], torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4))
    torch.testing.assert_close(entry["mean_CHW"].double(), pooled(pixels[:, :, :3]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (2, 4)])
def test_a_mask_is_averaged_over_each_place_of_the_grid(grid):
    mask = picture(3)[:, :, 0]
    rows, columns = 32 // grid[0], 32 // grid[1]
    found = mask_on_grid(mask, grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            cell = mask[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            assert float(found[row, column]) == pytest.approx(float(cell.mean()) / 255, abs=1e-6)
    assert torch.equal(mask_on_grid(np.full((32, 32), 255, np.uint8), grid), torch.ones(grid))


def test_a_mask_that_is_black_everywhere_is_named(masked, source, tmp_path, encoders):
    source.held["1_mask.png"] = png(np.zeros((32, 32), np.uint8))
    with pytest.raises(DataError, match=r"1_mask\.png: the mask is black everywhere"):
        cache_latents(masked, PLAIN, tmp_path, "vae", encoders.image)


# --- Examples. ---


def test_nothing_but_content_decides_the_order(placed, source, tmp_path, encoders):
    other = MemorySource({f"z/{9 - int(name[0])}.png": data for name, data in source.held.items()}, "other", "other")
    renamed = [
        replace(one, sample=replace(one.sample, file=SourceFile(other, f"z/{9 - int(one.sample.file.name[0])}.png")))
        for one in reversed(placed)
    ]
    fill(placed, tmp_path / "a", encoders)
    fill(renamed, tmp_path / "b", encoders)
    ours, theirs = load(placed, tmp_path / "a"), load(renamed, tmp_path / "b")
    assert [one.name for one in ours] != [one.name for one in theirs]
    assert [replace(row, name="", latent=row.latent.name, texts=()) for row in ours.rows] == [
        replace(row, name="", latent=row.latent.name, texts=()) for row in theirs.rows
    ]
    for one, another in zip(ours, theirs, strict=True):
        assert torch.equal(one.mean_CHW, another.mean_CHW)
        assert torch.equal(one.texts[0].embeds_BLD, another.texts[0].embeds_BLD)


def test_other_orders_of_a_caption_follow_it(placed, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    cache_texts(["longer", "longest"], tmp_path, "t5", encoders.text)
    examples = by_name(load(placed, tmp_path, orders={"a": ("a", "longer", "longest")}))
    assert [float(text.pooled_BP[0, 0]) for text in examples["0.png"].texts] == [1, 6, 7]
    assert [float(text.pooled_BP[0, 0]) for text in examples["1.png"].texts] == [2]


def test_the_spread_is_left_out_where_the_mean_is_wanted(placed, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    assert all(example.std_CHW is None for example in load(placed, tmp_path, resample=False))


def test_examples_can_be_chosen_and_repeated(placed, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    examples = load(placed, tmp_path)
    names = [row.name for row in examples.rows]
    some = examples.select([2, 2, 0])
    assert [one.name for one in some] == [names[2], names[2], names[0]]
    assert (len(some), some.pictures, examples.pictures) == (3, 2, 8)
    assert [one.name for one in examples[1:3]] == names[1:3]
    assert examples[-1].name == names[-1]


def test_memory_holds_the_latest_entries_up_to_its_limit(placed, tmp_path, encoders, monkeypatch):
    fill(placed, tmp_path, encoders)
    paths = [latent_path(tmp_path, one, PLAIN, "vae") for one in placed[:4]]
    size = sum(tensor.nbytes for tensor in read_entry(paths[0]).values())
    reads = []
    monkeypatch.setattr(cache_module, "read_entry", lambda path: reads.append(paths.index(path)) or read_entry(path))
    memory = Memory(3 * size)
    for index in (0, 1, 2, 0, 3, 0, 2, 1, 3):
        memory.read(paths[index])
    assert reads == [0, 1, 2, 3, 1, 3]
    nothing = Memory(0)
    assert torch.equal(nothing.read(paths[0])["mean_CHW"], memory.read(paths[0])["mean_CHW"])


def test_memory_counts_an_entry_once_that_two_threads_read_at_once(placed, tmp_path, encoders, monkeypatch):
    fill(placed, tmp_path, encoders)
    paths = [latent_path(tmp_path, one, PLAIN, "vae") for one in placed[:2]]
    meeting, reads = threading.Barrier(2, timeout=30), []

    def read(path):
        reads.append(path)
        if len(reads) <= 2:
            meeting.wait()
        return read_entry(path)

    monkeypatch.setattr(cache_module, "read_entry", read)
    memory = Memory(2 * sum(tensor.nbytes for tensor in read_entry(paths[0]).values()))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(memory.read, [paths[0]] * 2)
    assert torch.equal(first["mean_CHW"], second["mean_CHW"])
    for path in (paths[1], *paths):
        memory.read(path)
    assert reads == [paths[0], paths[0], paths[1]]


def test_examples_beyond_memory_are_read_again_and_the_same(placed, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    held = load(placed, tmp_path)
    lean = Examples(held.rows, memory=Memory(0))
    for _ in range(2):
        for one, another in zip(held, lean, strict=True):
            assert torch.equal(one.mean_CHW, another.mean_CHW)
            assert torch.equal(one.std_CHW, another.std_CHW)


# --- Damage. ---


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_cut_entry_is_refused_by_the_reader_and_made_again(placed, tmp_path, encoders, damage):
    fill(placed, tmp_path, encoders)
    whole = [one.mean_CHW for one in load(placed, tmp_path)]
    for path in (latent_path(tmp_path, placed[0], PLAIN, "vae"), text_path(tmp_path, "a", "t5")):
        path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
        with pytest.raises(StorageError, match="missing or damaged"):
            read_entry(path)
    assert fill(placed, tmp_path, encoders) == (1, 1)
    assert all(torch.equal(a, b.mean_CHW) for a, b in zip(whole, load(placed, tmp_path), strict=True))


def test_any_flipped_byte_is_seen(placed, tmp_path, encoders):
    """Every byte of an entry in turn, but those of the header whose change leaves all that is read the same."""
    fill(placed[:1], tmp_path, encoders)
    path = latent_path(tmp_path, placed[0], PLAIN, "vae")
    whole, entry = path.read_bytes(), read_entry(path)
    start = 8 + int.from_bytes(whole[:8], "little")
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            found = read_entry(path)
        except StorageError:
            continue
        assert position < start
        assert found.keys() == entry.keys()
        assert all(torch.equal(found[name], entry[name]) for name in entry)


def test_an_entry_of_another_time_without_a_hash_is_made_again(placed, tmp_path, encoders):
    from safetensors.torch import save_file

    fill(placed, tmp_path, encoders)
    path = latent_path(tmp_path, placed[0], PLAIN, "vae")
    save_file(read_entry(path), path)
    with pytest.raises(StorageError):
        read_entry(path)
    assert fill(placed, tmp_path, encoders) == (1, 0)


@pytest.mark.parametrize("metadata", [None, {}, {"sha256": "0"}])
def test_an_entry_with_a_damaged_header_is_found_and_made_again(placed, tmp_path, encoders, metadata):
    fill(placed, tmp_path, encoders)
    path = latent_path(tmp_path, placed[0], PLAIN, "vae")
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8:length]), "__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[length:])
    assert verify_cache(tmp_path, remove=True).damaged == (path,)
    assert fill(placed, tmp_path, encoders) == (1, 0)


def test_what_cannot_be_deleted_is_told(placed, tmp_path):
    path = latent_path(tmp_path, placed[0], PLAIN, "vae")
    path.mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot delete") as caught:
        verify_cache(tmp_path, remove=True)
    assert caught.value.hint


def test_verifying_finds_damaged_entries_and_stray_halves(placed, tmp_path, encoders):
    fill(placed, tmp_path, encoders)
    clean = verify_cache(tmp_path)
    assert (clean.checked, clean.damaged, clean.stray) == (11, (), ())
    path = latent_path(tmp_path, placed[2], PLAIN, "vae")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    half = path.with_name(f".{path.name}.123-abc.partial")
    half.write_bytes(data[:50])
    young = verify_cache(tmp_path, remove=True, now=lambda: half.stat().st_mtime + 3000)
    assert (young.checked, young.damaged, young.stray) == (11, (path,), ())
    assert half.exists()
    assert not path.exists()
    assert fill(placed, tmp_path, encoders) == (1, 0)
    seen = verify_cache(tmp_path, now=lambda: time.time() + 4000)
    assert (seen.stray, seen.removed) == ((half,), False)
    assert half.exists()
    assert verify_cache(tmp_path, remove=True, now=lambda: time.time() + 4000).stray == (half,)
    assert not half.exists()
    assert verify_cache(tmp_path / "nowhere").checked == 0


def test_nothing_is_left_behind_but_whole_entries(placed, tmp_path, encoders):
    fill(placed, tmp_path / "cache", encoders)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 11
    assert all(path.suffix == ".safetensors" for path in files)
    header = files[0].read_bytes()
    assert "sha256" in json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]


def keep_filling(placed, folder):
    """What a writer process does until it is killed: fill the cache, wipe an entry, fill it again."""
    torch.set_num_threads(1)
    encoders, rng = Encoders(), np.random.default_rng(os.getpid())
    while True:
        fill(placed, folder, encoders)
        latent_path(folder, placed[rng.integers(len(placed))], PLAIN, "vae").unlink(missing_ok=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its writers by fork, to be quick")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_racing_and_killed_writers_leave_no_torn_entry(placed, tmp_path, encoders):
    context = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    wholes = 0
    for _ in range(6):
        writers = [context.Process(target=keep_filling, args=(placed, tmp_path)) for _ in range(3)]
        for writer in writers:
            writer.start()
        time.sleep(0.1 + rng.random() * 0.2)
        assert all(writer.is_alive() for writer in writers)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
        for writer in writers:
            writer.join()
        found = verify_cache(tmp_path)
        assert found.damaged == ()
        wholes += found.checked
    assert wholes > 20
    verify_cache(tmp_path, remove=True, now=lambda: time.time() + 4000)
    fill(placed, tmp_path, encoders)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 11
    assert len(list(load(placed, tmp_path))) == 8
