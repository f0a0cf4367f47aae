"""Datasets on this machine: parquet files, saved datasets and folders, whole and streamed. The Hub is in
tests/integration/test_hub_fetch.py."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flux_ft.config import SourceConfig
from flux_ft.data.hub import Columns, Reach, StreamSource, TableSource, open_dataset
from flux_ft.errors import DataError, StorageError
from flux_ft.types import Source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path / "hf" / "downloads")


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def jpeg(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


PICTURES = [jpeg(seed) for seed in range(7)]
FEATURES = datasets.Features(
    {"image": datasets.Image(), "text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["cat", "dog"])}
)


CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def cats(pictures: list[bytes] = PICTURES) -> datasets.Dataset:
    rows = {
        "image": [{"bytes": data, "path": f"shots/cat {row}.jpg"} for row, data in enumerate(pictures)],
        "text": [f"a cat, {row}" for row in range(len(pictures))],
        "kind": [row % 2 for row in range(len(pictures))],
    }
    return datasets.Dataset.from_dict(rows, features=FEATURES)


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def parquet(folder: Path) -> Path:
    cats().to_parquet(folder / "cats [1] é.parquet")
    return folder / "cats [1] é.parquet"


def shards(folder: Path) -> Path:
    (folder / "shards").mkdir()
    cats().select(range(4)).to_parquet(folder / "shards" / "train-00000-of-00002.parquet")
    cats().select(range(4, 7)).to_parquet(folder / "shards" / "train-00001-of-00002.parquet")
    cats(PICTURES[:1]).to_parquet(folder / "shards" / "test-00000-of-00001.parquet")
    return folder / "shards"


def saved(folder: Path) -> Path:
    cats().save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    datasets.DatasetDict({"train": cats(), "test": cats(PICTURES[:1])}).save_to_disk(folder / "splits")
    return folder / "splits"


def imagefolder(folder: Path) -> Path:
    root = folder / "pictures"
    root.mkdir()
    for row, data in enumerate(PICTURES):
        (root / f"cat {row}.jpg").write_bytes(data)
    lines = [json.dumps({"file_name": f"cat {row}.jpg", "text": f"a cat, {row}"}) for row in range(len(PICTURES))]
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def open_at(path: Path, **settings: Any) -> Source:
    return open_dataset(SourceConfig(path=str(path), **settings))


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(open_at(path, **settings).files())
    return f"{caught.value.message} | {caught.value.hint}"


class TestEveryForm:
    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    @pytest.mark.parametrize("make", [parquet, shards, saved, saved_splits, imagefolder])
    def test_rows_keep_order_bytes_and_captions(self, make: Any, streaming: bool, tmp_path: Path) -> None:
        source = open_at(make(tmp_path), streaming=streaming)
        found = list(source.files())
        assert [one.name for one in found] == [f"{row:06d} cat {row}.jpg" for row in range(7)]
        assert [one.caption for one in found] == [f"a cat, {row}" for row in range(7)]
        assert [source.read(one.name) for one in found] == PICTURES
        assert list(source.files()) == found
        assert all(one.skip is None for one in found)

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    def test_splits_and_limits(self, streaming: bool, tmp_path: Path) -> None:
        path = shards(tmp_path)
        test = open_at(path, split="test", streaming=streaming)
        few = open_at(path, limit=5, streaming=streaming)
        many = open_at(path, limit=500, streaming=streaming)
        assert [len(list(source.files())) for source in (test, few, many)] == [1, 5, 7]

    def test_only_a_stream_carries_bytes_and_has_no_stamps(self, tmp_path: Path) -> None:
        path = parquet(tmp_path)
        whole, stream = list(open_at(path).files()), list(open_at(path, streaming=True).files())
        assert all(one.data is None and one.stamp for one in whole)
        assert [one.data for one in stream] == PICTURES
        assert all(one.stamp is None for one in stream)

    def test_streaming_copies_nothing(self, tmp_path: Path) -> None:
        source = open_at(parquet(tmp_path), streaming=True)
        list(source.files())
        assert not [path for path in (tmp_path / "hf").rglob("*") if path.stat().st_size > 100]

    def test_is_silent_but_for_the_copy(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        datasets.enable_progress_bars()
        path = parquet(tmp_path)
        capfd.readouterr()
        open_at(path)
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert "copying it into the cache" in captured.err
        list(open_at(path).files())
        assert capfd.readouterr() == ("", "")

    def test_loads_without_the_libraries(self) -> None:
        code = (
            "import sys, flux_ft.data.hub;"
            "print(*{'datasets', 'pyarrow', 'torch', 'huggingface_hub'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == []


class TestStamps:
    def test_another_file_has_other_stamps_and_the_same_file_the_same(self, tmp_path: Path) -> None:
        path = tmp_path / "cats.parquet"
        cats().to_parquet(path)
        first = [one.stamp for one in open_at(path).files()]
        assert [one.stamp for one in open_at(path).files()] == first
        assert len(set(first)) == len(first)
        cats(PICTURES[::-1]).to_parquet(path)
        source = open_at(path)
        assert {one.stamp for one in source.files()}.isdisjoint(first)
        assert source.read("000000") == PICTURES[-1]

    def test_a_limit_does_not_change_them(self, tmp_path: Path) -> None:
        path = saved(tmp_path)
        assert list(open_at(path, limit=3).files()) == list(open_at(path).files())[:3]

    def test_a_dataset_that_is_saved_anew(self, tmp_path: Path) -> None:
        first = {one.stamp for one in open_at(saved(tmp_path)).files()}
        cats(PICTURES[::-1]).save_to_disk(tmp_path / "saved")
        assert first.isdisjoint(one.stamp for one in open_at(tmp_path / "saved").files())

    def test_an_arrow_file_that_is_written_over(self, tmp_path: Path) -> None:
        first = {one.stamp for one in open_at(saved(tmp_path)).files()}
        [arrow] = (tmp_path / "saved").glob("*.arrow")
        arrow.write_bytes(arrow.read_bytes().replace(PICTURES[0], PICTURES[0][::-1]))
        os.utime(arrow, ns=(0, 0))
        source = open_at(tmp_path / "saved")
        assert source.read("000000") == PICTURES[0][::-1]
        assert first.isdisjoint(one.stamp for one in source.files())

    def test_a_changed_file_that_a_row_points_to(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(PICTURES[0])
        path = write(tmp_path / "rows.parquet", image=pa.array([{"path": "a.jpg"}] * 2, CELL))
        source = open_at(path)
        first = [one.stamp for one in source.files()]
        (tmp_path / "a.jpg").write_bytes(PICTURES[1])
        os.utime(tmp_path / "a.jpg", ns=(0, 0))
        assert {one.stamp for one in source.files()}.isdisjoint(first)
        assert source.read("000001 a.jpg") == PICTURES[1]

    def test_identities_tell_places_splits_and_columns_apart(self, tmp_path: Path) -> None:
        path = write(tmp_path / "two.parquet", a=PICTURES, b=PICTURES[::-1])
        sources = [
            open_at(path, image_column="a"),
            open_at(path, image_column="b"),
            open_at(path, image_column="a", split="test"),
            open_at(shards(tmp_path)),
        ]
        assert len({source.identity for source in sources}) == 4
        assert [source.label.removeprefix(str(path)) for source in sources[:3]] == [
            " (column a)", " (column b)", " (split test, column a)",
        ]  # fmt: skip
        assert all(str(tmp_path) in source.identity for source in sources)


class TestStream:
    @pytest.fixture
    def passes(self) -> list[int]:
        return []

    def stream(self, passes: list[int], rows: int = 40) -> StreamSource:
        class Rows:
            def __iter__(self) -> Iterator[dict[str, Any]]:
                passes.append(0)
                for row in range(rows):
                    passes[-1] += 1
                    yield {"image": b"%d" % row}

        return StreamSource("set", "id", Rows(), Columns("image", None), Reach(()))  # type: ignore[arg-type]

    def test_forwards_is_one_pass(self, passes: list[int]) -> None:
        source = self.stream(passes)
        assert [source.read(f"{row:06d}") for row in range(0, 40, 3)] == [b"%d" % row for row in range(0, 40, 3)]
        assert passes == [40]

    def test_recent_rows_are_kept_and_older_ones_start_over(self, passes: list[int]) -> None:
        source = self.stream(passes)
        assert [source.read(f"{row:06d}") for row in (20, 5, 19, 20)] == [b"20", b"5", b"19", b"20"]
        assert passes == [21]
        assert [source.read(f"{row:06d}") for row in (4, 5, 30)] == [b"4", b"5", b"30"]
        assert passes == [21, 31]

    def test_listing_and_reading_do_not_disturb_each_other(self, passes: list[int]) -> None:
        source = self.stream(passes)
        assert [source.read(one.name) == one.data for one in source.files()] == [True] * 40
        assert (len(passes), sum(passes)) == (2, 80)

    def test_a_row_that_is_gone(self, passes: list[int]) -> None:
        source = self.stream(passes, rows=3)
        with pytest.raises(DataError, match="no such row"):
            source.read("000003")
        assert source.read("000001") == b"1"


class TestColumns:
    @pytest.mark.parametrize(
        "column",
        [
            pa.array(PICTURES, pa.binary()),
            pa.array(PICTURES, pa.large_binary()),
            pa.array([{"bytes": data} for data in PICTURES]),
            pa.array([{"path": None, "bytes": data, "size": 3} for data in PICTURES]),
        ],
        ids=["binary", "large", "bytes", "struct"],
    )
    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    def test_pictures_in_any_column_of_bytes(self, column: pa.Array, streaming: bool, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", id=list(range(7)), pixels=column, prompt=["p"] * 7)
        source = open_at(path, streaming=streaming)
        found = list(source.files())
        assert [source.read(one.name) for one in found] == PICTURES
        assert [one.name for one in found] == [f"{row:06d}" for row in range(7)]
        assert {one.caption for one in found} == {"p"}

    def test_several_need_a_choice(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", a=PICTURES, b=PICTURES, text=["t"] * 7)
        message = refusal(path)
        assert "several columns with pictures: `a`, `b`" in message
        assert "`image_column: a`" in message
        assert open_at(path, image_column="b").read("000000") == PICTURES[0]

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    def test_addresses_are_not_fetched(self, streaming: bool, tmp_path: Path) -> None:
        path = write(tmp_path / "x.parquet", url=["https://example.com/a.jpg"], text=["t"])
        message = refusal(path, streaming=streaming)
        assert "no column with pictures; its columns are `url`, `text`" in message
        assert "addresses and pixel arrays are not read" in message
        assert "does not hold encoded pictures" in refusal(path, image_column="url", streaming=streaming)

    def test_missing_columns_are_listed(self, tmp_path: Path) -> None:
        path = parquet(tmp_path)
        assert "no column `img`, which `image_column` names; its columns are `image`, `text`, `kind`" in refusal(
            path, image_column="img"
        )
        assert "no column `words`, which `caption_column` names" in refusal(path, caption_column="words")

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    def test_captions(self, streaming: bool, tmp_path: Path) -> None:
        def captions(path: Path, **settings: Any) -> list[str | None]:
            return [one.caption for one in open_at(path, streaming=streaming, **settings).files()]

        two = PICTURES[:2]
        # `text` comes before `caption`, but not when it is no text.
        assert captions(write(tmp_path / "a.parquet", i=two, caption=["c", "d"], text=["t", None])) == ["t", None]
        assert captions(write(tmp_path / "b.parquet", i=two, text=[1, 2], prompt=["p", " "])) == ["p", None]
        assert captions(write(tmp_path / "c.parquet", i=two, caption=[["", "first", "x"], []])) == ["first", None]
        assert captions(write(tmp_path / "d.parquet", i=two, words=["a", "b"])) == [None, None]
        assert captions(tmp_path / "d.parquet", caption_column="words") == ["a", "b"]
        assert captions(parquet(tmp_path), caption_column="kind")[:3] == ["cat", "dog", "cat"]

    def test_a_caption_column_without_text(self, tmp_path: Path) -> None:
        assert "`n` of" in refusal(write(tmp_path / "x.parquet", i=PICTURES, n=list(range(7))), caption_column="n")

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    def test_rows_without_a_picture_are_said(self, streaming: bool, tmp_path: Path) -> None:
        cells = pa.array([{"bytes": PICTURES[0]}, None, {}], CELL)
        source = open_at(write(tmp_path / "x.parquet", image=cells), streaming=streaming)
        found = list(source.files())
        assert [one.skip for one in found] == [None, "row without a picture", "row without a picture"]
        with pytest.raises(DataError, match="row without a picture"):
            source.read(found[1].name)


class TestReach:
    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        (tmp_path / "secret.jpg").write_bytes(PICTURES[0])
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "in.jpg").write_bytes(PICTURES[1])
        return tmp_path / "secret.jpg"

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    def test_rows_name_no_file_outside(self, streaming: bool, secret: Path) -> None:
        with zipfile.ZipFile(secret.with_suffix(".zip"), "w") as archive:
            archive.writestr("a.jpg", PICTURES[0])
        hostile = [
            str(secret), "../secret.jpg", f"file://{secret}", f"local://{secret}", "https://127.0.0.1:1/a.jpg",
            "hf://datasets/ann/private@main/a.jpg", f"zip://a.jpg::{secret.with_suffix('.zip')}",
            f"{secret}::{secret.parent / 'set' / 'in.jpg'}", "a\0b.jpg", "x" * 5000, "..", "", "~/secret.jpg",
        ]  # fmt: skip
        rows = pa.array([{"path": path} for path in hostile], CELL)
        source = open_at(write(secret.parent / "set" / "x.parquet", image=rows), streaming=streaming)
        found = list(source.files())
        assert len(found) == len(hostile)
        assert all("/" not in one.name and "\\" not in one.name and one.name.isprintable() for one in found)
        assert all(one.data is None for one in found)
        for one in found:
            with pytest.raises(DataError):
                source.read(one.name)

    def test_a_link_does_not_lead_outside(self, secret: Path) -> None:
        link = secret.parent / "set" / "link.jpg"
        try:
            link.symlink_to(secret)
        except OSError:
            pytest.skip("no links here")
        reach = Reach(((secret.parent / "set").resolve(),))
        with pytest.raises(DataError, match="not in the dataset"):
            reach.read({"path": "link.jpg", "bytes": None})
        assert reach.read({"path": "in.jpg", "bytes": None}) == PICTURES[1]

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        with pytest.raises(DataError, match="not in the dataset"):
            Reach((tmp_path.resolve(),)).read({"path": "pipe.jpg", "bytes": None})

    def test_a_zip_is_read_in_place_and_not_without_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("cats/a.jpg", PICTURES[0])
            archive.writestr("bomb", bytes(2**20))
        monkeypatch.setattr("flux_ft.data.hub.MAX_FILE_BYTES", 2**19)
        reach = Reach((tmp_path.resolve(),))
        assert reach.read({"path": f"zip://cats/a.jpg::{tmp_path / 'a.zip'}", "bytes": None}) == PICTURES[0]
        with pytest.raises(DataError, match="larger than"):
            reach.read({"path": f"zip://bomb::{tmp_path / 'a.zip'}", "bytes": None})


class TestRefusals:
    def test_splits_are_listed(self, tmp_path: Path) -> None:
        for path in (shards(tmp_path), saved_splits(tmp_path)):
            message = refusal(path, split="nope")
            assert "no split `nope`" in message
            assert "`train`" in message
            assert "`test`" in message

    def test_parts_of_splits(self, tmp_path: Path) -> None:
        path = shards(tmp_path)
        assert len(list(open_at(path, split="train[:2]+test").files())) == 3
        assert "let `limit` take its first rows" in refusal(path, split="train[:2]", streaming=True)
        assert "let `limit` take its first rows" in refusal(path, split="train[oops]")

    @pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
    @pytest.mark.parametrize("damage", ["cut", "empty", "other", "flipped"])
    def test_broken_parquet(self, damage: str, streaming: bool, tmp_path: Path) -> None:
        good = parquet(tmp_path).read_bytes()
        middle = len(good) // 3
        (tmp_path / "bad.parquet").write_bytes(
            {
                "cut": good[: len(good) // 2],
                "empty": b"",
                "other": PICTURES[0],
                "flipped": good[:middle] + bytes(255 - byte for byte in good[middle : 2 * middle]) + good[2 * middle :],
            }[damage]
        )
        try:
            source = open_at(tmp_path / "bad.parquet", streaming=streaming)
            read = [source.read(one.name) for one in source.files() if one.skip is None]
        except DataError as error:
            assert "bad.parquet" in error.message  # noqa: PT017 - bytes flipped inside a picture are no error here
        else:
            assert damage == "flipped"
            assert read != PICTURES

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
        with pytest.raises(StorageError, match="no room on the disk") as caught:
            open_at(parquet(tmp_path))
        assert "HF_HOME" in (caught.value.hint or "")

    def test_a_damaged_arrow_file(self, tmp_path: Path) -> None:
        path = saved(tmp_path)
        [arrow] = path.glob("*.arrow")
        data = arrow.read_bytes()
        offsets = np.cumsum([0, *map(len, PICTURES)]).astype("<i4").tobytes()
        assert offsets in data
        arrow.write_bytes(data.replace(offsets, offsets[:-4] + b"\xff\xff\xff\x7f"))
        assert "cannot be read on" in refusal(path)

    def test_a_folder_that_is_no_dataset(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert "holds no files that can be read as a dataset" in refusal(tmp_path / "empty")
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "state.json").write_text("{}")
        assert "cannot be read as a dataset" in refusal(tmp_path / "half")
        assert "no such file or folder" in refusal(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        "path", ["hf:", "hf:cats", "hf:ann/", "hf:ann/cats/more", "hf:a b/c", "hf:ann/cats@", "hf:ann/cats:"]
    )
    def test_names_of_datasets(self, path: str) -> None:
        with pytest.raises(DataError, match="does not name a dataset on the Hub") as caught:
            open_dataset(SourceConfig(path=path))
        assert "hf:owner/name" in (caught.value.hint or "")

    def test_no_such_row(self, tmp_path: Path) -> None:
        source = open_at(parquet(tmp_path))
        assert isinstance(source, TableSource)
        for name in ("000007", "cat", "", "-1", "९"):
            with pytest.raises(DataError, match="no such row"):
                source.read(name)


def test_twenty_thousand_rows_are_listed_without_holding_their_pictures(tmp_path: Path) -> None:
    """All in one group of rows, as pandas writes a file: 100 MB, of which a few rows at once are in memory."""
    path = tmp_path / "big.parquet"
    cells = pa.array([np.random.default_rng(0).bytes(5_000)] * 20_000)
    table = pa.table({"image": cells, "text": ["a cat"] * 20_000})
    pq.write_table(table, path, row_group_size=20_000, use_dictionary=False, compression="none")
    assert path.stat().st_size > 100e6
    code = (
        "import sys, pyarrow\n"
        "from flux_ft.config import SourceConfig\n"
        "from flux_ft.data.hub import open_dataset\n"
        "source = open_dataset(SourceConfig(path=sys.argv[1], streaming=sys.argv[2] == 'True'))\n"
        "print(sum(1 for one in source.files() if one.skip is None), pyarrow.default_memory_pool().max_memory())\n"
    )
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "hf"), "USE_TORCH": "0"}
    for streaming in (False, True):
        command = [sys.executable, "-c", code, str(path), str(streaming)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows, peak = map(int, done.stdout.split())
        assert (rows, peak < 30e6) == (20_000, True), peak
