"""Bad input, each kind tried: one clear message with a way out, the right exit code, nothing that was there is lost."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from _verbs import Done, assert_refused, hashes, run_here, run_verb, trained_steps, write_run
from PIL import Image
from safetensors.torch import load_file, save, save_file

from flux_ft.data import cache
from flux_ft.train.run import claim_folder

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def run_file(tmp_path: Path, scenes: Path) -> Path:
    return write_run(tmp_path / "run.yaml", scenes, output=str(tmp_path / "out"))


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def both(capsys: pytest.CaptureFixture[str], cwd: Path, *words: object) -> list[Done]:
    """`check` in a child process, `train` in this one: the same mistake is told by both."""
    return [run_verb("check", *words, cwd=cwd), run_here(capsys, "train", *words)]


class TestPictures:
    def refused(self, capsys: pytest.CaptureFixture[str], run_file: Path, data: Path, *words: str) -> None:
        for done in both(capsys, run_file.parent, run_file, f"data={data}"):
            assert_refused(done, *words)
        assert not (run_file.parent / "out").exists()

    def test_missing_folder(self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path) -> None:
        self.refused(capsys, run_file, tmp_path / "nowhere", "nowhere", "no such file or folder")

    def test_no_pictures(self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        (empty / "a.txt").write_text("a caption alone")
        self.refused(capsys, run_file, empty, "empty", "holds no usable picture")

    def test_only_a_broken_jpeg(self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path) -> None:
        folder = tmp_path / "broken"
        broken_jpeg(folder / "torn.jpg")
        self.refused(capsys, run_file, folder, "torn.jpg", "damaged")

    def test_a_file_where_a_folder_is_expected(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, scenes: Path
    ) -> None:
        self.refused(capsys, run_file, scenes / "00.png", "00.png", "not a folder")

    @pytest.mark.parametrize("path", ["x" * 5000, "a\\0b", "hf:someone/pictures", "pictures.zip"])
    def test_odd_paths(self, capsys: pytest.CaptureFixture[str], run_file: Path, path: str) -> None:
        done = run_here(capsys, "check", run_file, f'data="{path}"')
        assert done.code in (1, 2)
        assert_refused(done, code=done.code)

    def test_a_broken_jpeg_among_good_ones_is_reported_and_skipped(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, scenes: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(scenes, tmp_path / "mixed")
        broken_jpeg(folder / "torn.jpg")
        done = run_verb("check", run_file, f"data={folder}", "--json", cwd=tmp_path)
        assert done.code == 0, done.stderr
        counts = done.json["data"]["counts"]
        assert (counts["files"], counts["pictures"], counts["captions"], counts["skipped"]) == (13, 6, 6, 1)
        (skipped,) = [file for file in done.json["data"]["files"] if file["status"] == "skipped"]
        assert skipped["path"] == "torn.jpg"
        assert "damaged" in skipped["reason"]
        trained = run_here(capsys, "train", run_file, f"data={folder}", "iterations=1")
        assert trained.code == 0, trained.stderr
        assert "torn.jpg" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def broken_jpeg(path: Path) -> None:
    """A JPEG cut off in the middle of its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((200, 200), 80).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:4000])


class TestRunFile:
    def told(self, capsys: pytest.CaptureFixture[str], run_file: Path, line: str, *words: str) -> None:
        """`line` is added to the run file; the message names the file and that line."""
        text = run_file.read_text(encoding="utf-8")
        run_file.write_text(f"{text}{line}\n", encoding="utf-8")
        where = f"{run_file}:{text.count(chr(10)) + 1}"
        for done in both(capsys, run_file.parent, run_file):
            assert_refused(done, where, *words)
        assert not (run_file.parent / "out").exists()

    def test_misspelt_key(self, capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
        self.told(capsys, run_file, "iteratoins: 100", "`iteratoins`", "`iterations`")

    def test_misspelt_key_in_a_section(self, capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
        self.told(capsys, run_file, "optim: {batchsize: 2}", "`optim.batchsize`", "batch_size")

    def test_wrong_type(self, capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
        self.told(capsys, run_file, "seed: many", "`seed`", "many", "whole number")

    def test_yaml_1_1_boolean(self, capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
        self.told(capsys, run_file, "allow_distilled: no", "`allow_distilled`", "write `allow_distilled: false`")

    def test_broken_yaml(self, capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
        self.told(capsys, run_file, "lora: {alpha: 1", "not valid YAML")

    def test_contradiction_names_both_keys(self, capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
        self.told(capsys, run_file, "schedule: {warmup_steps: 50}", "`schedule.warmup_steps`", "`iterations`")

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("model=flux-tinny", ["flux-tinny", "did you mean `flux-tiny`?"]),
            ("model=flux1-schnell", ["flux1-schnell", "step-distilled", "allow_distilled"]),
            ("finetune_type=fll", ["`finetune_type`", "did you mean `full`?"]),
            ("optim.name=lion", ["`optim.name`", "`adamw`", "`adafactor`"]),
            ("memory.recompute=true", ["`memory.recompute`", "`selective`"]),
            ("preview.width=65", ["`preview.width`", "65", "64"]),
            ("lora_rank=0", ["`lora_rank`", "from 1 to 256"]),
            ("learning_rate=fast", ["`learning_rate`", "fast"]),
            ("lora_rank", ["`lora_rank` is not an override", "key=value"]),
            ("=4", ["is not an override"]),
            ("optim=5", ["`optim`", "section"]),
            ("lr=1e-4", ["`lr`", "learning_rate"]),
            ('output="a\\0b"', []),
        ],
    )
    def test_one_setting(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, override: str, words: list[str]
    ) -> None:
        assert_refused(run_here(capsys, "train", run_file, override), *words)
        assert not (run_file.parent / "out").exists()

    @pytest.mark.parametrize("kind", ["missing", "folder", "empty", "binary", "huge"])
    def test_no_run_file_at_all(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
        path = tmp_path / "given.yaml"
        if kind == "folder":
            path.mkdir()
        elif kind != "missing":
            path.write_bytes({"empty": b"", "binary": b"\x89PNG\r\n\x1a\n\xff", "huge": b"# x\n" * 400_000}[kind])
        assert_refused(run_here(capsys, "check", path), "given.yaml")

    def test_garbage_never_ends_in_a_traceback(self, scenes: Path, tmp_path: Path) -> None:
        """200 random changes to a good run file: each loads, or is refused with a message."""
        from flux_ft.errors import InputError
        from flux_ft.plan import check_run
        from flux_ft.runfile import load_run

        settings = {"optim": {"batch_size": 2, "betas": [0.9, 0.99]}, "lora": {"targets": [".*attn.*"]}}
        comment = "words that a change may hit without harm, " * 10
        run_file = write_run(tmp_path / "good.yaml", scenes, finetune_comment=comment, **settings)
        good = b"# a remark " * 20 + b"\n" + run_file.read_bytes()
        rng = random.Random(0)
        path = tmp_path / "changed.yaml"
        outcomes = {"loaded": 0, "refused": 0}
        for number in range(200):
            path.write_bytes(mutated(good, rng))
            try:
                check_run(load_run(path).config)
                outcomes["loaded"] += 1
            except InputError:
                outcomes["refused"] += 1
            except Exception as error:  # noqa: BLE001
                pytest.fail(f"change {number}: {type(error).__name__}: {error}\n{path.read_bytes()!r}")
        assert min(outcomes.values()) > 10, outcomes


SPLINTERS = [
    b":", b"\t", b"- ", b"{", b"}", b"[", b"]", b"'", b'"', b"\x00", b"\xff", b"&a ", b"*a", b"!!python/name:os ",
    b"|\n", b"%", b"@", b"null", b"~", b".nan", b".inf", b"-1", b"1e999", b"0x1F", b"2024-01-01", b"<<: ", b"---\n",
    b"...\n", b"\n", b"? ", b"[" * 300, b"9" * 200, "é😀".encode(), b"\\ud800", b"model: x\n", b"lora: 3\n", b"  ",
]  # fmt: skip


def mutated(good: bytes, rng: random.Random) -> bytes:
    """One or two small changes: bytes flipped or cut, lines doubled, moved or dropped, splinters of YAML put in."""
    text = bytearray(good)
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(text))
        lines = bytes(text).splitlines(keepends=True)
        match rng.randrange(6):
            case 0:
                text[place] = rng.randrange(256)
            case 1:
                del text[place : place + rng.randint(1, 12)]
            case 2:
                text[place:place] = rng.choice(SPLINTERS)
            case 3:
                lines.insert(rng.randrange(len(lines)), rng.choice(lines))
                text = bytearray(b"".join(lines))
            case 4:
                rng.shuffle(lines)
                text = bytearray(b"".join(lines))
            case 5:
                key, colon, _ = lines[rng.randrange(len(lines))].partition(b":")
                text += key + colon + b" " + rng.choice(SPLINTERS) + b"\n"
        if not text:
            text = bytearray(b"x")
    return bytes(text)


class TestModel:
    def test_checkpoint_of_another_shape(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path
    ) -> None:
        from diffusers import FluxTransformer2DModel

        from flux_ft.families.registry import tiny_folder

        config = FluxTransformer2DModel.load_config(tiny_folder(), subfolder="transformer")
        other = FluxTransformer2DModel.from_config({**config, "num_layers": 1, "num_attention_heads": 2})
        checkpoint = tmp_path / "other.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in other.state_dict().items()}, checkpoint)
        words = (f"model={checkpoint}", f"model_parts={tiny_folder()}")
        assert_refused(run_here(capsys, "train", run_file, *words), "other.safetensors", "does not fit", "model_parts")
        done = run_here(
            capsys, "generate", "--model", checkpoint, "--model-parts", tiny_folder(), "--prompt", "x", "--output", "p"
        )
        assert_refused(done, "does not fit")
        # What the refused start left is no run: the same folder is free for the next one.
        assert run_here(capsys, "train", run_file, "iterations=1").code == 0

    @pytest.mark.parametrize("content", [b"", b"this is no checkpoint", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]"])
    def test_not_a_safetensors(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path, content: bytes
    ) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        for done in both(capsys, tmp_path, run_file, f"model={path}"):
            assert_refused(done, "model.safetensors", "safetensors")
        assert not (tmp_path / "out").exists()

    def test_a_safetensors_of_something_else(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path
    ) -> None:
        from flux_ft.families.registry import tiny_folder

        path = tmp_path / "model.safetensors"
        save_file({"unet.conv.guidance": torch.zeros(3)}, path)
        words = (f"model={path}", f"model_parts={tiny_folder()}")
        assert_refused(run_here(capsys, "train", run_file, *words), "no FLUX.1 transformer inside")

    def test_a_folder_of_something_else(self, capsys: pytest.CaptureFixture[str], run_file: Path, scenes: Path) -> None:
        assert_refused(run_here(capsys, "train", run_file, f"model={scenes}"), "not a FLUX.1 model")


class TestDisk:
    def test_output_that_cannot_be_written(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path
    ) -> None:
        if hasattr(os, "geteuid") and os.geteuid() != 0:
            locked = tmp_path / "locked"
            locked.mkdir(mode=0o555)
            output = locked / "out"
        else:
            (tmp_path / "locked").write_text("a file where a folder would have to be")
            output = tmp_path / "locked" / "out"
        assert_refused(run_here(capsys, "train", run_file, f"output={output}"), "locked", "cannot be written", code=1)
        done = run_here(capsys, "generate", "--model", "flux-tiny", "--prompt", "x", "--steps", 1, "--output", output)
        assert_refused(done, "locked", code=1)

    def test_output_is_a_file(self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("something of mine")
        assert_refused(run_here(capsys, "train", run_file), "is a file")
        assert (tmp_path / "out").read_text() == "something of mine"

    def test_output_holds_something_else(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "letter.txt").write_text("something of mine")
        assert_refused(run_here(capsys, "train", run_file), "holds something already")
        assert set(hashes(tmp_path / "out")) == {"letter.txt"}

    def test_output_that_holds_no_run_is_not_said_to_be_resumable(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "captions.jsonl~").touch()
        done = run_here(capsys, "train", run_file)
        assert_refused(done, "holds something already", "choose another folder")
        assert "--resume" not in done.stderr

    @pytest.mark.parametrize("junk", [".DS_Store", "Thumbs.db", ".run.yaml.17-ab12.partial"])
    def test_what_a_kill_or_a_file_manager_leaves_does_not_count(
        self, run_file: Path, tmp_path: Path, junk: str
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / junk).touch()
        (tmp_path / "out" / "metrics.jsonl").write_bytes(b"\xff\0")
        claim_folder(tmp_path / "out", resume=False)

    def test_no_space_is_told_before_the_first_step(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
        assert_refused(run_here(capsys, "train", run_file), "out", "free", code=1)
        assert trained_steps(tmp_path / "out") == []
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert run_here(capsys, "train", run_file, "iterations=1").code == 0

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes to run into")
    def test_the_disk_refuses_a_checkpoint(self, run_file: Path, tmp_path: Path) -> None:
        """A real failure of write(), by a limit on file sizes: small files fit, a checkpoint of rank 32 does not.

        The run goes on to its end, where the LoRA does not fit either.
        """
        import resource

        limit = 1_500_000
        words = ("train", run_file, "lora_rank=32", "iterations=3", "checkpoint.every=2")
        done = run_verb(
            *words, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        assert_refused(done, "step-000002", "could not be written", "tries again", "cannot write `", code=1)
        assert trained_steps(tmp_path / "out") == [1, 2, 3]
        assert list((tmp_path / "out" / "checkpoints").iterdir()) == []

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="only some systems have a disk that is always full")
    def test_the_disk_refuses_a_line_of_metrics(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flux_ft import log

        inner = log.MetricsFile.__init__

        def on_a_full_disk(self: log.MetricsFile, *given: Any) -> None:
            inner(self, *given)
            self._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115

        monkeypatch.setattr(log.MetricsFile, "__init__", on_a_full_disk)
        done = run_here(capsys, "train", run_file)
        assert done.code == 0, done.stderr
        assert done.stderr.count("No space left on device") == 1
        assert "lines of `" in done.stderr
        assert list((tmp_path / "out").glob("*.safetensors"))


class TestResume:
    @pytest.mark.parametrize("is_there", [True, False])
    def test_nothing_begun_yet(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path, is_there: bool
    ) -> None:
        """A cluster gives the same command again, however early a job was stopped."""
        if is_there:
            (tmp_path / "out").mkdir()
        done = run_here(capsys, "train", run_file, "--resume", "iterations=1")
        assert done.code == 0, done.stderr
        assert "holds no run to resume; starting from step 0" in done.stderr

    def test_a_folder_of_something_else(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("chapter one")
        assert_refused(run_here(capsys, "train", run_file, "--resume"), "holds no run to resume")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


class TestMemory:
    def test_a_full_card_is_told_with_what_would_need_less(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. Much more text.")

        monkeypatch.setattr("flux_ft.train.run.train_steps", full)
        done = run_here(capsys, "train", run_file, "optim.batch_size=2")
        assert_refused(done, "CUDA out of memory; by the estimate this run needs", "optim.batch_size=1", code=1)


class TestNotFinite:
    def test_poisoned_latent_stops_before_the_update(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        assert run_here(capsys, "train", run_file, "iterations=1").code == 0
        shutil.copytree(out / "cache", tmp_path / "poisoned" / "cache")
        for path in (tmp_path / "poisoned" / "cache" / "latents").iterdir():
            entry = cache.read_entry(path)
            entry["mean_CHW"][0, 0, 0] = float("nan")
            path.write_bytes(save(entry, metadata={"sha256": cache._sha256(entry)}))
        before = hashes(out)
        done = run_here(capsys, "train", run_file, f"output={tmp_path / 'poisoned'}", "optim.batch_size=2")
        assert_refused(done, "step 1", "nothing of that step is saved", code=1)
        named = done.stderr.split("Pictures: ")[1].splitlines()[0].split(", ")
        assert len(named) == 2
        assert set(named) <= {f"{index:02d}.png" for index in range(6)}
        assert trained_steps(tmp_path / "poisoned") == []
        assert not list((tmp_path / "poisoned").glob("*.safetensors"))
        assert hashes(out) == before

    def test_too_large_a_learning_rate_leaves_a_sound_checkpoint(
        self, capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path
    ) -> None:
        words = ("learning_rate=1e36", "optim.weight_decay=0", "iterations=5", "checkpoint.every=1")
        done = run_here(capsys, "train", run_file, *words)
        assert_refused(done, "not a finite number", "nothing of that step is saved", "learning_rate", code=1)
        last = trained_steps(tmp_path / "out")[-1]
        tensors = load_file(tmp_path / "out" / "checkpoints" / f"step-{last:06d}" / "weights.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
        assert f"step {last + 1}" in done.stderr


class TestGenerate:
    @pytest.fixture
    def draw(self, capsys: pytest.CaptureFixture[str]) -> object:
        def drawn(*words: object) -> Done:
            fixed = ("generate", "--model", "flux-tiny", "--prompt", "a red circle", "--steps", 1, "--output", "p")
            return run_here(capsys, *fixed, *words)

        return drawn

    @pytest.mark.parametrize("content", [None, b"", b"garbage", b"\x02\0\0\0\0\0\0\0{}", b"PK\x03\x04 a pickle"])
    def test_bad_lora_file(self, draw, tmp_path: Path, content: bytes | None) -> None:  # type: ignore[no-untyped-def]
        path = tmp_path / "mine.safetensors"
        if content is not None:
            path.write_bytes(content)
        assert_refused(draw("--lora", path), "mine.safetensors")
        assert not (tmp_path / "p").exists()

    @pytest.mark.parametrize("strength", ["strong", "", "1,5", "nan", "inf"])
    def test_bad_strength(self, draw, make_lora, tmp_path: Path, strength: str) -> None:  # type: ignore[no-untyped-def]
        path = make_lora(tmp_path / "mine.safetensors")
        assert_refused(draw("--lora", f"{path}:{strength}"), "is not a strength", "FILE:0.8")

    def test_lora_of_another_model(self, draw, make_lora, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        path = make_lora(tmp_path / "wide.safetensors", width=256)
        assert_refused(draw("--lora", path), "transformer_blocks.0", "another size")

    @pytest.mark.parametrize(
        ("words", "told"), [(("--width", 65), ("64", "72")), (("--height", 1), ("`height`", "at least 16"))]
    )
    def test_size_off_the_grid(self, draw, words: tuple[object, ...], told: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
        assert_refused(draw(*words), *told)

    def test_device_that_is_not_here(self, draw) -> None:  # type: ignore[no-untyped-def]
        assert_refused(draw("--device", "nonsense"), "--device nonsense", "doctor")


class TestCommandLine:
    @pytest.mark.parametrize(
        "words",
        [
            ["tarin", "run.yaml"], ["train"], ["train", "run.yaml", "--resum"], ["generate"], ["check", "--jsn", "x"],
            ["generate", "--prompt", "x", "--steps", "0"], ["generate", "--prompt", "x", "--seed", "one"],
            ["quickstart", "--iterations", "0"],
        ],
    )  # fmt: skip
    def test_usage_errors(self, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
        done = run_here(capsys, *words)
        assert done.code == 2
        assert done.stdout == ""
        assert "error:" in done.stderr.lower()
        assert "--help" in done.stderr
        assert "Traceback" not in done.stderr

    def test_no_verb_shows_the_help(self, tmp_path: Path) -> None:
        done = run_verb(cwd=tmp_path)
        assert done.code == 2
        assert "Usage:" in done.stdout + done.stderr
        assert "quickstart" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
