"""Pictures from every kind of source through the real verbs: what is told, what is cached, what is trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _captioners import save_florence
from _verbs import (
    SCENES,
    Done,
    assert_refused,
    has_checkpoint,
    hashes,
    run_here,
    run_verb,
    start_verb,
    trained_steps,
    wait_until,
    write_run,
    write_scenes,
)
from PIL import Image

from flux_ft.config import RunConfig
from flux_ft.data.loader import BatchPlan
from flux_ft.families.registry import open_family
from flux_ft.plan import check_run
from flux_ft.train.run import cache_files
from flux_ft.train.setup import TrainData, make_accelerator, prepare_data

Settings = Callable[..., RunConfig]


def as_zip(folder: Path, path: Path, inside: str = "") -> Path:
    """The folder's files as a ZIP in the shape that Finder gives it: one enclosing folder, resource forks beside."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{inside}{file.relative_to(folder).as_posix()}")
        if inside:
            archive.writestr("__MACOSX/._00.png", b"\x00\x05\x16\x07")
            archive.writestr(f"{inside}.DS_Store", b"Bud1")
    return path


def as_parquet(folder: Path, path: Path) -> Path:
    """The folder's pictures as the Hub stores them: bytes in a struct, a caption column, rows in another order."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.glob("*.png"), reverse=True)
    table = pyarrow.table(
        {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "text": [file.with_suffix(".txt").read_text(encoding="utf-8") for file in files],
        }
    )
    pyarrow.parquet.write_table(table, path)
    return path


def as_imagefolder(folder: Path, path: Path) -> Path:
    """The folder's pictures under other names, with their captions in metadata.jsonl."""
    path.mkdir()
    rows = []
    for index, file in enumerate(sorted(folder.glob("*.png"))):
        shutil.copy(file, path / f"photo {9 - index}.png")
        rows.append({"file_name": f"photo {9 - index}.png", "prompt": file.with_suffix(".txt").read_text("utf-8")})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def prepared(config: RunConfig) -> TrainData:
    """Encoded as a run would."""
    family = open_family(config.model)
    accelerator = make_accelerator(config, config.output_dir)
    return prepare_data(config, check_run(config).report, family, accelerator, config.output_dir / "cache")


@pytest.mark.usefixtures("on_cpu")
class TestOneSetInFiveShapes:
    """The same pictures as folder, ZIP, dataset …: the same cache keys and the same batches."""

    @pytest.fixture(scope="class")
    def shapes(self, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        place = tmp_path_factory.mktemp("shapes")
        datasets = pytest.importorskip("datasets")
        parquet = as_parquet(scenes, place / "set.parquet")
        saved = place / "saved"
        datasets.Dataset.from_parquet(str(parquet), cache_dir=str(place / "hub")).save_to_disk(str(saved))
        return {
            "folder": str(scenes),
            "zip": str(as_zip(scenes, place / "flat.zip")),
            "zip with a folder": str(as_zip(scenes, place / "nested.zip", inside="my pictures/")),
            "imagefolder": str(as_imagefolder(scenes, place / "imagefolder")),
            "parquet": str(parquet),
            "saved dataset": str(saved),
        }

    def test_same_keys_and_batches(self, shapes: dict[str, str], run_settings: Settings, tmp_path: Path) -> None:
        keys: dict[str, list[str]] = {}
        batches: dict[str, list[list[str]]] = {}
        for name, source in shapes.items():
            config = run_settings(
                tmp_path / name.replace(" ", "-"), data={"path": source}, iterations=20, trigger_word="TOK"
            )
            data = prepared(config)
            keys[name] = [
                path.relative_to(config.output_dir).as_posix() for path in cache_files(config.output_dir / "cache")
            ]
            plan = BatchPlan([row.bucket for row in data.examples.rows], 2, config.iterations, config.seed)
            batches[name] = [[data.examples[i].digest for i in plan.indices(step)] for step in range(20)]
        assert len(keys["folder"]) == 2 * len(SCENES)
        assert all(found == keys["folder"] for found in keys.values()), keys
        assert all(found == batches["folder"] for found in batches.values())

    def test_a_streamed_dataset_is_the_same_set(
        self, shapes: dict[str, str], run_settings: Settings, tmp_path: Path
    ) -> None:
        whole = prepared(run_settings(tmp_path / "whole", data={"path": shapes["parquet"]}))
        stream = {"path": shapes["parquet"], "streaming": True}
        streamed = prepared(run_settings(tmp_path / "stream", data=stream))
        assert [one.digest for one in streamed.examples] == [one.digest for one in whole.examples]
        some = prepared(run_settings(tmp_path / "some", data={**stream, "limit": 2}))
        assert len(some.examples) == 2


class TestReport:
    def test_check_writes_it_where_asked_and_nowhere_else(self, scenes: Path, tmp_path: Path) -> None:
        run_file = write_run(tmp_path / "run.yaml", scenes)
        done = run_verb("check", run_file, "--report", "told", "--json", cwd=tmp_path)
        assert done.code == 0, done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "told"]
        told = json.loads((tmp_path / "told" / "report.json").read_text(encoding="utf-8"))
        assert told == done.json["data"]
        counts = told["counts"]
        assert (counts["files"], counts["used"], counts["pictures"], counts["captions"]) == (12, 12, 6, 6)
        page = (tmp_path / "told" / "report.html").read_text(encoding="utf-8")
        assert page.count("data:image/jpeg;base64,") == 6
        assert "<mark>TOK</mark>" in page

    def test_token_counts_are_those_of_the_model(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data = write_scenes(tmp_path / "data", SCENES[:2])
        (data / "00.txt").write_text("a large red circle " * 20)
        done = run_here(capsys, "check", write_run(tmp_path / "run.yaml", data), "--json")
        first = next(one for one in done.json["data"]["files"] if one["path"] == "00.png")
        assert first["tokens"]["clip"]["limit"] == 77
        assert first["tokens"]["t5"]["tokens"] > first["tokens"]["t5"]["limit"] == 32
        assert any("T5 tokens" in text for text in first["warnings"])


class TestCacheVerb:
    def test_fills_once_and_mends(self, scenes: Path, tmp_path: Path) -> None:
        run_file = write_run(tmp_path / "run.yaml", scenes, output="out")
        first = run_verb("cache", run_file, "--json", cwd=tmp_path)
        assert first.code == 0, first.stderr
        assert (first.json["entries"], first.json["written"]) == (12, 12)
        before = hashes(tmp_path / "out")
        again = run_verb("cache", run_file, "--json", cwd=tmp_path)
        assert again.json["written"] == 0
        assert hashes(tmp_path / "out") == before

        entry = next((tmp_path / "out" / "cache" / "latents").glob("*.safetensors"))
        torn = bytearray(entry.read_bytes())
        torn[-3] ^= 1
        entry.write_bytes(torn)
        verified = run_verb("cache", run_file, "--verify", "--json", cwd=tmp_path)
        assert verified.json["damaged"] == [f"latents/{entry.name}"]
        assert not entry.exists()
        assert run_verb("cache", run_file, "--json", cwd=tmp_path).json["written"] == 1
        assert hashes(tmp_path / "out") == before
        trained = run_verb("train", run_file, "--json", cwd=tmp_path)
        assert trained.code == 0, trained.stderr

    def test_only_what_changed_is_encoded_again(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], on_cpu: None
    ) -> None:
        data = write_scenes(tmp_path / "data")
        run_file = write_run(tmp_path / "run.yaml", data, output=str(tmp_path / "out"))
        written = lambda *words: run_here(capsys, "cache", run_file, *words, "--json").json["written"]  # noqa: E731
        assert written() == 12
        (data / "00.txt").write_text("another [trigger]")
        assert written() == 1
        os.rename(data / "01.png", data / "renamed.png")
        os.rename(data / "01.txt", data / "renamed.txt")
        assert written() == 0
        Image.fromarray(np.roll(np.asarray(Image.open(data / "02.png")), 3, axis=1)).save(data / "02.png")
        assert written() == 1
        Image.new("L", (64, 64), 128).save(data / "03_mask.png")
        assert written() == 1
        assert written("data.resolutions=[64, 48]") == 6
        assert written("data.caption_dropout=0.5") == 1

    def test_verify_without_a_cache(self, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run_file = write_run(tmp_path / "run.yaml", scenes, output=str(tmp_path / "nothing"))
        assert_refused(run_here(capsys, "cache", run_file, "--verify"), "holds no cache")


class TestCaptions:
    """The captioner through the verbs; its weights are random, so it talks nonsense, but its own for each picture."""

    @pytest.fixture(scope="class")
    def captioner(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        import torch

        folder = tmp_path_factory.mktemp("florence")
        torch.manual_seed(0)
        save_florence(folder)
        return folder

    @pytest.fixture
    def run_file(self, captioner: Path, tmp_path: Path) -> Path:
        data = write_scenes(tmp_path / "data")
        for index in range(4):
            (data / f"{index:02d}.txt").unlink()
        settings = {"captioning": True, "captioner": {"model": str(captioner), "max_tokens": 8}, "output": "out"}
        return write_run(tmp_path / "run.yaml", data, **settings)

    def test_seen_and_corrected_before_training(self, run_file: Path, tmp_path: Path) -> None:
        before = run_verb("check", run_file, "--json", cwd=tmp_path)
        assert before.json["to_be_captioned"] == 4
        done = run_verb("caption", run_file, "--json", cwd=tmp_path)
        assert done.code == 0, done.stderr
        assert done.json["written"] == 4
        said = tmp_path / "out" / "captions.jsonl"
        rows = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
        assert [row["name"] for row in rows] == [f"{index:02d}.png" for index in range(4)]
        rows[1]["caption"] = "a [trigger] that I corrected"
        said.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

        assert run_verb("caption", run_file, "--json", cwd=tmp_path).json["written"] == 0
        trained = run_verb("train", run_file, "--json", cwd=tmp_path)
        assert trained.code == 0, trained.stderr
        told = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        captions = {one["path"]: (one["caption"], one["caption_source"]) for one in told["files"] if one["caption"]}
        assert captions["01.png"] == ("a TOK that I corrected", "captioner")
        assert captions["04.png"][1] == "txt"
        assert all(captions[f"{index:02d}.png"][0].startswith("TOK") for index in (0, 2, 3))

    def test_training_asks_it_by_itself(self, run_file: Path, tmp_path: Path) -> None:
        done = run_verb("train", run_file, cwd=tmp_path)
        assert done.code == 0, done.stderr
        assert len((tmp_path / "out" / "captions.jsonl").read_text(encoding="utf-8").splitlines()) == 4

    def test_one_that_cannot_be_had_is_one_message(
        self, run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ("captioner.model=owner/nowhere", f"output={tmp_path / 'other'}")
        assert_refused(run_here(capsys, "caption", run_file, *words), "owner/nowhere")
        assert_refused(run_here(capsys, "caption", run_file, "captioning=false", words[1]), "`captioning` is false")
        assert_refused(run_here(capsys, "caption", run_file, "captioner.model=auto", words[1]), "flux-tiny")


EVERYTHING: dict[str, Any] = {
    "resolutions": [64, 48],
    "caption_dropout": 0.3,
    "tag_orders": 3,
    "unmasked_weight": 0.1,
}


def rich_sources(place: Path) -> dict[str, Any]:
    """Two sources with masks, tags, repeats and a weight, and every option of the loop switched on."""
    first = write_scenes(place / "first", SCENES[:4])
    Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32))).save(first / "00_mask.png")
    (first / "01.txt").write_text("red, large, [trigger], blue background", encoding="utf-8")
    second = as_zip(write_scenes(place / "unzipped", SCENES[4:]), place / "second.zip", inside="x/")
    return {"sources": [{"path": str(first), "repeats": 2}, {"path": str(second), "weight": 0.5}], **EVERYTHING}


class TestTrainingOnAllOfIt:
    @pytest.fixture(scope="class")
    def straight(self, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
        place = tmp_path_factory.mktemp("rich")
        settings = {"output": "straight", "iterations": 12, "optim": {"batch_size": 2}}
        write_run(place / "run.yaml", rich_sources(place), **settings)
        done = run_verb("train", place / "run.yaml", cwd=place)
        assert done.code == 0, done.stderr
        return place, {path.name: path.read_bytes() for path in (place / "straight").glob("*.safetensors")}  # type: ignore[misc]

    def test_it_reports_and_trains(self, straight: tuple[Path, dict[str, str]]) -> None:
        place, files = straight
        assert len(files) == 2
        told = json.loads((place / "straight" / "report.json").read_text(encoding="utf-8"))
        counts = told["counts"]
        assert (counts["pictures"], counts["masks"], counts["captions"]) == (6, 1, 6)
        assert counts["ignored"] == 2
        assert counts["used"] + counts["skipped"] == counts["files"] == len(told["files"])

    @pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
    def test_killed_and_resumed_it_is_the_same_to_the_bit(self, straight: tuple[Path, dict[str, str]]) -> None:
        place, files = straight
        words = ("train", place / "run.yaml", "output=killed", "checkpoint.every=2")
        child = start_verb(*words, cwd=place)
        folder = place / "killed"
        wait_until(lambda: len(trained_steps(folder)) >= 5 and has_checkpoint(folder), child, "step 5 and a checkpoint")
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]
        child.stderr.close()  # type: ignore[union-attr]
        done: Done = run_verb(*words, "--resume", cwd=place)
        assert done.code == 0, done.stderr
        import torch
        from safetensors.torch import load

        for path in folder.glob("*.safetensors"):
            resumed, whole = load(path.read_bytes()), load(files[path.name])  # type: ignore[arg-type]
            assert resumed.keys() == whole.keys()
            assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 torn"), ["set.zip"]),
        (lambda path: zipfile.ZipFile(path, "w").writestr("../../evil.png", b"x"), ["set.zip", "../../evil.png"]),
        (lambda path: zipfile.ZipFile(path, "w").close(), ["set.zip", "empty"]),
    ],
)
def test_a_bad_archive_is_one_message(
    make: Callable[[Path], Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "set.zip")
    before = sorted(tmp_path.parent.rglob("*"))
    run_file = write_run(tmp_path / "run.yaml", "set.zip")
    assert_refused(run_here(capsys, "check", run_file), *words)
    assert sorted(tmp_path.parent.rglob("*")) == sorted([*before, run_file])


def test_a_bad_picture_inside_an_archive_is_named(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = as_zip(scenes, tmp_path / "set.zip", inside="pics/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("pics/torn.jpg", b"\xff\xd8\xff\xe0 torn")
    run_file = write_run(tmp_path / "run.yaml", "set.zip")
    done = run_here(capsys, "check", run_file, "--json")
    assert [one["path"] for one in done.json["data"]["files"] if one["reason"] and "torn" in one["path"]] == [
        "torn.jpg"
    ]
    assert_refused(run_here(capsys, "check", run_file, "data.on_bad=stop"), "set.zip: torn.jpg", "on_bad: skip")
