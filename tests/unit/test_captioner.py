"""The captioner, end to end, on models of the real classes with a few thousand random weights each."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from _captioners import CHAT_TEMPLATE, save_florence, save_qwen
from numpy.typing import NDArray
from PIL import Image

from flux_ft import log
from flux_ft.config import CaptionerConfig
from flux_ft.data import captioner as module
from flux_ft.data.archive import ZipSource
from flux_ft.data.captioner import (
    FLORENCE,
    INSTRUCTIONS,
    MOST_PIXELS,
    QWEN,
    Captioner,
    CaptionerUnavailable,
    choose_model,
    describe,
    load_captioner,
    polish,
    view_of,
)
from flux_ft.data.captions import Mode, place_trigger
from flux_ft.data.captions_file import CAPTIONS_FILE, read_captions
from flux_ft.data.folder import FolderSource
from flux_ft.errors import DataError
from flux_ft.types import Bucket, Decoding, Sample, Signals, Source, SourceFile

CPU = torch.device("cpu")
KINDS = ("florence2", "qwen3_vl", "qwen2_5_vl")
SIZES = ((40, 60), (64, 64), (30, 100), (64, 48), (100, 30), (50, 90), (3, 40))
"""Heights and widths; one of them could be taken for colours first."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of model, as `save_pretrained` writes it."""
    root = tmp_path_factory.mktemp("captioners")
    torch.manual_seed(0)
    save_florence(root / "florence2")
    save_qwen(root / "qwen3_vl", "qwen3_vl")
    save_qwen(root / "qwen2_5_vl", "qwen2_5_vl")
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def captioners(folders: dict[str, Path]) -> dict[str, Captioner]:
    return {kind: load_captioner(str(folder), "character", 16, CPU) for kind, folder in folders.items()}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What people are told."""
    lines: list[str] = []
    monkeypatch.setattr(log, "say", lines.append)
    monkeypatch.setattr(log, "warn", lines.append)
    return lines


def noise(sizes: Sequence[tuple[int, int]] = SIZES) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def sample(source: Source, name: str, pixels: NDArray[Any]) -> Sample:
    height, width = pixels.shape[:2]
    bucket = Bucket(width, height)
    return Sample(
        SourceFile(source, name),
        "",
        "trigger",
        width,
        height,
        f"pixels of {name}",
        (bucket,),
        Signals(0, 1, 0, 0),
        f"digest of {name}",
    )


def png(pixels: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    root = tmp_path / "pictures"
    found = []
    for index, pixels in enumerate(noise()):
        name = f"{'ab'[index % 2]}/{index}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(pixels))
        found.append((name, pixels))
    source = FolderSource(root, "pictures")
    return [sample(source, name, pixels) for name, pixels in found]


def rows(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / CAPTIONS_FILE).read_text(encoding="utf-8").splitlines()]


def test_auto_takes_the_large_model_where_there_is_room() -> None:
    auto = CaptionerConfig()
    assert choose_model(auto, 0) == choose_model(auto, 8_000_000_000) == FLORENCE
    assert choose_model(auto, 12_000_000_000) == QWEN
    assert choose_model(CaptionerConfig(model="a/b"), 12_000_000_000) == "a/b"


@pytest.mark.parametrize("kind", KINDS)
class TestModel:
    def test_a_batch_says_what_each_picture_alone_says(self, captioners: dict[str, Captioner], kind: str) -> None:
        pictures = noise()
        together = captioners[kind](pictures)
        assert together == [captioners[kind]([picture])[0] for picture in pictures]
        assert together == captioners[kind](pictures)
        assert len(set(together)) > 1, "the captions don't depend on the pictures"

    def test_pictures_reach_the_model(self, captioners: dict[str, Captioner], kind: str) -> None:
        one, two = (captioners[kind].inputs([picture])["pixel_values"] for picture in noise([(64, 64), (64, 64)]))
        assert one.shape == two.shape
        assert not torch.allclose(one, two)

    def test_inputs_are_those_of_transformers_own_processor(
        self, captioners: dict[str, Captioner], folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts = (captioners[kind]._pictures, transformers.AutoTokenizer.from_pretrained(folders[kind]))
        options = {"return_tensors": "pt", "input_data_format": "channels_last"}
        pictures = noise()
        if kind == "florence2":
            processor = transformers.Florence2Processor(*parts)
            theirs = processor(images=pictures, text=["<DETAILED_CAPTION>"] * len(pictures), **options)
        else:
            # Qwen's wants a video processor, which needs torchvision, and never uses it for pictures.
            monkeypatch.setattr(
                transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None, raising=True
            )
            own = {"qwen3_vl": transformers.Qwen3VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}[kind]
            processor = own(*parts, None, chat_template=CHAT_TEMPLATE)
            content = [{"type": "image"}, {"type": "text", "text": INSTRUCTIONS["character"]}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            theirs = processor(
                images=pictures, text=[prompt] * len(pictures), padding=True, padding_side="left", **options
            )
        ours = captioners[kind].inputs(pictures)
        assert {name for name in theirs if name != "token_type_ids"} == ours.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name

    def test_knows_an_answer_that_was_cut_short(
        self, folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        captioner = load_captioner(str(folders[kind]), "general", 2, CPU)
        monkeypatch.setattr(module, "polish", lambda _, cut_short: cut_short)
        assert captioner(noise(SIZES[:2])) == [True, True]
        captioner._settings.eos_token_id = list(range(400))
        assert captioner(noise(SIZES[:2])) == [False, False]

    def test_every_picture_gets_a_row_in_order(
        self, folders: dict[str, Path], kind: str, samples: list[Sample], tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        config = CaptionerConfig(model=str(folders[kind]), batch_size=3, max_tokens=12)
        assert describe(samples, config, "product", run) == len(samples)
        written = rows(run)
        assert [row["digest"] for row in written] == [one.content_digest for one in samples]
        assert [row["name"] for row in written] == [one.file.name for one in samples]
        assert {(row["model"], row["mode"]) for row in written} == {(config.model, "product")}
        assert all(row["caption"] for row in written)
        assert len({row["caption"] for row in written}) > 1
        assert describe(samples, config, "product", run) == 0
        assert rows(run) == written

    def test_loading_leaves_no_warning(
        self, folders: dict[str, Path], kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(transformers.utils.logging.get_logger(), "propagate", True)
        load_captioner(str(folders[kind]), "general", 8, CPU)(noise(SIZES[:2]))
        assert [record.getMessage() for record in caplog.records] == []


class TestPrompt:
    @pytest.mark.parametrize("mode", ["character", "product", "style", "general"])
    @pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl"])
    def test_the_modes_instruction_is_what_the_model_reads(
        self, folders: dict[str, Path], kind: str, mode: Mode
    ) -> None:
        captioner = load_captioner(str(folders[kind]), mode, 8, CPU)
        inputs = captioner.inputs(noise(SIZES[:2]))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            text = tokenizer.decode(ids[mask.bool()])
            picture = text.partition("<|vision_start|>")[2].partition("<|vision_end|>")[0]
            assert picture.replace("<|image_pad|>", "") == ""
            assert text.replace(picture, "") == (
                f"<|im_start|>user\n<|vision_start|><|vision_end|>{INSTRUCTIONS[mode]}<|im_end|>\n"
                "<|im_start|>assistant\n"
            )

    def test_modes_that_name_their_subject_ask_for_the_mark(self) -> None:
        assert {mode for mode, text in INSTRUCTIONS.items() if "[trigger]" in text} == {"character", "product"}

    def test_florence_is_given_its_task_in_every_mode(self, folders: dict[str, Path]) -> None:
        prompts = [load_captioner(str(folders["florence2"]), mode, 8, CPU)._prompt_ids for mode in INSTRUCTIONS]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folders["florence2"])
        text = "<image><s>Describe in detail what is shown in the image.</s>"
        assert {tokenizer.decode(ids) for ids in prompts} == {text}


class TestResume:
    def test_what_is_written_before_a_kill_is_not_done_again(
        self, folders: dict[str, Path], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = CaptionerConfig(model=str(folders["qwen3_vl"]), batch_size=2, max_tokens=8)
        straight, run = tmp_path / "straight", tmp_path / "run"
        describe(samples, config, "style", straight)

        reads: list[str] = []
        read = FolderSource.read

        def killed_at_the_fifth(self: FolderSource, name: str) -> bytes:
            reads.append(name)
            if len(reads) == 5:
                raise KeyboardInterrupt
            return read(self, name)

        monkeypatch.setattr(FolderSource, "read", killed_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            describe(samples, config, "style", run)
        assert rows(run) == rows(straight)[:4]
        with (run / CAPTIONS_FILE).open("ab") as file:
            file.write(b'{"digest": "digest of a/4.png", "name": "a/4.p')

        reads[:] = ["not the fifth"] * 5
        assert describe(samples, config, "style", run) == len(samples) - 4
        assert reads[5:] == [one.file.name for one in samples[4:]]
        assert rows(run) == rows(straight)

    def test_corrected_captions_stay(self, folders: dict[str, Path], samples: list[Sample], tmp_path: Path) -> None:
        config = CaptionerConfig(model=str(folders["florence2"]), max_tokens=8)
        describe(samples[:2], config, "general", tmp_path)
        file = tmp_path / CAPTIONS_FILE
        first = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
        corrected = [json.dumps({**first, "caption": "my own words"}), file.read_text(encoding="utf-8").splitlines()[1]]
        file.write_text("\n".join(corrected), encoding="utf-8")  # without a line end, as some editors leave it
        assert describe(samples[:3], config, "general", tmp_path) == 1
        captions = read_captions(tmp_path, config.model, "general")
        assert captions[samples[0].content_digest] == "my own words"
        assert captions.keys() == {one.content_digest for one in samples[:3]}

    def test_another_mode_is_described_anew(
        self, folders: dict[str, Path], samples: list[Sample], tmp_path: Path
    ) -> None:
        config = CaptionerConfig(model=str(folders["qwen3_vl"]), max_tokens=8)
        describe(samples[:2], config, "general", tmp_path)
        assert describe(samples[:2], config, "style", tmp_path) == 2
        assert len(read_captions(tmp_path, config.model, "general")) == 2

    def test_equal_pictures_are_described_once(
        self, folders: dict[str, Path], samples: list[Sample], tmp_path: Path
    ) -> None:
        config = CaptionerConfig(model=str(folders["florence2"]), max_tokens=8)
        twin = replace(samples[1], content_digest=samples[0].content_digest)
        # At the place of the first of them: a stream is read forwards.
        assert describe([samples[0], samples[2], twin], config, "general", tmp_path) == 2
        assert [row["name"] for row in rows(tmp_path)] == [samples[0].file.name, samples[2].file.name]


class TestMemory:
    @pytest.fixture
    def room_for(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
        """Lets batches of up to so many pictures fit; the list fills with the sizes that were tried."""

        def room(most: int) -> list[int]:
            tried: list[int] = []
            real = Captioner.__call__

            def limited(self: Captioner, pictures: Sequence[NDArray[np.uint8]]) -> list[str]:
                tried.append(len(pictures))
                if len(pictures) > most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
                return real(self, pictures)

            monkeypatch.setattr(Captioner, "__call__", limited)
            return tried

        return room

    def test_the_batch_is_halved_and_nothing_is_lost(
        self,
        folders: dict[str, Path],
        samples: list[Sample],
        tmp_path: Path,
        room_for: Callable[[int], list[int]],
        said: list[str],
    ) -> None:
        config = CaptionerConfig(model=str(folders["qwen3_vl"]), batch_size=6, max_tokens=8)
        describe(samples, config, "general", tmp_path / "straight")
        tried = room_for(1)
        assert describe(samples, config, "general", tmp_path / "run") == len(samples)
        assert tried == [6, 3] + [1] * len(samples)
        assert rows(tmp_path / "run") == rows(tmp_path / "straight")
        assert any("not enough memory to describe 6 pictures at once: going on with 3" in line for line in said)

    def test_no_room_for_one_picture_says_what_to_do(
        self, folders: dict[str, Path], samples: list[Sample], tmp_path: Path, room_for: Callable[[int], list[int]]
    ) -> None:
        room_for(0)
        with pytest.raises(DataError, match="not enough memory to describe even one picture") as caught:
            describe(samples, CaptionerConfig(model=str(folders["florence2"])), "general", tmp_path)
        assert "captioning: false" in (caught.value.hint or "")

    def test_any_other_failure_names_the_picture(
        self, folders: dict[str, Path], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: object) -> list[str]:
            raise RuntimeError("shapes do not match\nand so on")

        monkeypatch.setattr(Captioner, "__call__", fails)
        with pytest.raises(DataError, match=r"failed on pictures: a/0\.png: shapes do not match$"):
            describe(samples, CaptionerConfig(model=str(folders["florence2"])), "general", tmp_path)


class TestBesidePictures:
    @pytest.fixture
    def config(self, folders: dict[str, Path]) -> CaptionerConfig:
        return CaptionerConfig(model=str(folders["qwen3_vl"]), max_tokens=8, beside_pictures=True)

    def test_a_txt_lies_beside_each_picture(
        self, config: CaptionerConfig, samples: list[Sample], tmp_path: Path
    ) -> None:
        describe(samples, config, "general", tmp_path / "run")
        captions = read_captions(tmp_path / "run", config.model, "general")
        for one in samples:
            beside = (tmp_path / "pictures" / one.file.name).with_suffix(".txt")
            assert beside.read_text(encoding="utf-8") == captions[one.content_digest] + "\n"

    def test_only_when_asked(self, config: CaptionerConfig, samples: list[Sample], tmp_path: Path) -> None:
        describe(samples, config.model_copy(update={"beside_pictures": False}), "general", tmp_path / "run")
        assert not list(tmp_path.rglob("*.txt"))
        # Asked for later, what was described before is written.
        assert describe(samples, config, "general", tmp_path / "run") == 0
        assert len(list(tmp_path.rglob("*.txt"))) == len(samples)

    def test_no_file_is_overwritten(self, config: CaptionerConfig, samples: list[Sample], tmp_path: Path) -> None:
        mine = (tmp_path / "pictures" / samples[0].file.name).with_suffix(".txt")
        mine.write_text("mine")
        describe(samples[:2], config, "general", tmp_path / "run")
        assert mine.read_text() == "mine"
        assert (tmp_path / "pictures" / samples[1].file.name).with_suffix(".txt").is_file()

    def test_pictures_of_one_stem_get_none(
        self, config: CaptionerConfig, samples: list[Sample], tmp_path: Path, said: list[str]
    ) -> None:
        twin = tmp_path / "pictures" / "a" / "0.webp"
        Image.fromarray(noise()[1]).save(twin, lossless=True)
        other = replace(samples[1], file=SourceFile(samples[0].file.source, "a/0.webp"))
        # A source that is named twice is no second picture.
        describe([samples[0], other, samples[2], samples[2]], config, "general", tmp_path / "run")
        assert [found.name for found in tmp_path.rglob("*.txt")] == ["2.txt"]
        assert any("2 captions are in captions.jsonl alone: their pictures would share" in line for line in said)

    def test_the_hubs_cache_is_not_written_into(
        self, config: CaptionerConfig, samples: list[Sample], tmp_path: Path, said: list[str]
    ) -> None:
        cached = FolderSource(tmp_path / "pictures", "hf:ann/pictures")
        describe([replace(samples[0], file=SourceFile(cached, samples[0].file.name))], config, "general", tmp_path)
        assert not list(tmp_path.rglob("*.txt"))
        assert any("1 captions are in captions.jsonl alone: their pictures do not lie in" in line for line in said)

    def test_a_zip_is_not_written_into(self, config: CaptionerConfig, tmp_path: Path, said: list[str]) -> None:
        pixels = noise()[0]
        with zipfile.ZipFile(tmp_path / "cats.zip", "w") as archive:
            archive.writestr("cat.png", png(pixels))
        before = (tmp_path / "cats.zip").read_bytes()
        source = ZipSource(tmp_path / "cats.zip", "cats.zip")
        list(source.files())
        assert describe([sample(source, "cat.png", pixels)], config, "general", tmp_path / "run") == 1
        assert (tmp_path / "cats.zip").read_bytes() == before
        assert not list(tmp_path.rglob("*.txt"))
        assert any("1 captions are in captions.jsonl alone: their pictures do not lie" in line for line in said)


class TestWhatIsSeen:
    def test_transparent_parts_show_the_background(
        self, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pixels = np.zeros((20, 20, 4), np.uint8)
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.png").write_bytes(png(pixels))
        seen: list[NDArray[np.uint8]] = []
        monkeypatch.setattr(Captioner, "__call__", lambda _, pictures: [seen.append(one) or "x" for one in pictures])
        one = sample(FolderSource(tmp_path / "in", "in"), "a.png", pixels)
        decoding = Decoding(background=(10, 20, 30), alpha_is_mask=True)
        describe([one], CaptionerConfig(model=str(folders["florence2"])), "general", tmp_path, decoding=decoding)
        assert (seen[0] == (10, 20, 30)).all()

    @pytest.mark.parametrize(
        ("size", "bucket", "view"),
        [
            ((300, 200), (288, 192), (300, 200)),  # not enlarged, not cut
            ((3000, 2000), (64, 64), None),  # what is trained on, at a size where it can be made out
            ((4000, 3000), (1152, 864), None),
            ((10_000, 16), (10_000, 16), (320, 16)),
            ((1, 1), (16, 16), (1, 1)),
        ],
    )
    def test_size(self, size: tuple[int, int], bucket: tuple[int, int], view: tuple[int, int] | None) -> None:
        one = replace(
            sample(FolderSource(".", "."), "a", np.zeros((1, 1))),
            width_px=size[0], height_px=size[1], buckets=(Bucket(*bucket), Bucket(16, 16)),
        )  # fmt: skip
        found = view_of(one)
        if view is not None:
            assert found == Bucket(*view)
        else:
            assert MOST_PIXELS * 0.99 < found.width_px * found.height_px <= MOST_PIXELS
            assert found.width_px / found.height_px == pytest.approx(bucket[0] / bucket[1], rel=0.01)

    def test_a_picture_that_changed_is_named(
        self, folders: dict[str, Path], samples: list[Sample], tmp_path: Path
    ) -> None:
        (tmp_path / "pictures" / samples[1].file.name).write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"^pictures: b/1\.png: "):
            describe(samples, CaptionerConfig(model=str(folders["florence2"])), "general", tmp_path)


class TestPolish:
    @pytest.mark.parametrize(
        ("text", "caption"),
        [
            ("The image shows a cat on a wall.", "A cat on a wall."),
            ("In this image we can see a dog. There is grass.", "A dog. There is grass."),
            ("This is an image of two boats.", "Two boats."),
            ("A picture of [trigger] at dusk", "[trigger] at dusk"),
            ("A photo of a harbour.", "A photo of a harbour."),
            ("the picture depicts [trigger]", "[trigger]"),
            ('"A red door."', "A red door."),
            ("“A red door.”\n", "A red door."),
            ('"Open" on a door, and "Closed"', '"Open" on a door, and "Closed"'),
            ("  a\tred\n\ndoor ", "A red door"),
            ("The image is blurred.", "The image is blurred."),
            ("A cat looks at the image shows of a fair.", "A cat looks at the image shows of a fair."),
            ("'Tis a door and a 'sign", "'Tis a door and a 'sign"),
            ("", ""),
            ('""', ""),
            ("\x00\x07", ""),
        ],
    )
    def test_one_line_without_what_stands_around_it(self, text: str, caption: str) -> None:
        assert polish(text) == caption

    def test_an_unfinished_sentence_goes_if_another_is_there(self) -> None:
        assert polish("A cat. It sits on 3.5 m of wall. The dog is", cut_short=True) == (
            "A cat. It sits on 3.5 m of wall."
        )
        assert polish("A cat and a", cut_short=True) == "A cat and a"
        assert polish("A cat. The dog is") == "A cat. The dog is"

    def test_the_mark_becomes_the_trigger_and_is_added_where_it_is_missing(self) -> None:
        assert place_trigger(polish("The image shows [trigger] on a wall."), "TOK") == "TOK on a wall."
        assert place_trigger(polish("The image shows a cat."), "TOK") == "TOK, A cat."


def test_no_words_are_reported_and_not_asked_for_again(
    folders: dict[str, Path], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(Captioner, "__call__", lambda _, pictures: [""] * len(pictures))
    config = CaptionerConfig(model=str(folders["florence2"]), beside_pictures=True)
    assert describe(samples, config, "general", tmp_path) == len(samples)
    assert any(f"had no words for {len(samples)} of {len(samples)} pictures" in line for line in said)
    assert set(read_captions(tmp_path, config.model, "general").values()) == {""}
    assert describe(samples, config, "general", tmp_path) == 0
    assert not list(tmp_path.rglob("*.txt"))


class TestBrokenModels:
    def refused(self, source: str | Path) -> DataError:
        with pytest.raises(DataError) as caught:
            load_captioner(str(source), "general", 8, CPU)
        assert caught.value.message.startswith(f"captioner {source}: ")
        assert caught.value.hint
        return caught.value

    def copy(self, folder: Path, target: Path, without: str = "") -> Path:
        target.mkdir()
        for file in folder.iterdir():
            if file.name != without:
                (target / file.name).write_bytes(file.read_bytes())
        return target

    def test_no_such_folder(self) -> None:
        for source in ("./models/none", "C:\\models\\none", "florence"):
            assert "neither a folder nor a Hub id" in self.refused(source).message

    def test_a_kind_that_is_not_supported(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llava"}')
        message = self.refused(tmp_path).message
        assert "`llava`" in message
        assert all(kind in message for kind in KINDS)

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": ["florence2"]}', None])
    def test_no_config(self, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        self.refused(tmp_path)

    def test_code_from_a_repository_is_not_run(self, tmp_path: Path) -> None:
        config = {
            "model_type": "florence2",
            "auto_map": {"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"},
            "text_config": {"model_type": "florence2_language"},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "modeling_florence2.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
        error = self.refused(tmp_path)
        assert "first format" in error.message
        assert FLORENCE in (error.hint or "")
        assert not (tmp_path / "was-run").exists()

    @pytest.mark.parametrize("kind", KINDS)
    def test_files_that_are_missing_or_cut_off(self, folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
        for name in ("model.safetensors", "preprocessor_config.json", "tokenizer.json"):
            self.refused(self.copy(folders[kind], tmp_path / f"without-{name}", without=name))
            cut = self.copy(folders[kind], tmp_path / f"cut-{name}")
            (cut / name).write_bytes((cut / name).read_bytes()[:100])
            self.refused(cut)

    def test_missing_weights_are_not_made_up(self, folders: dict[str, Path], tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        folder = self.copy(folders["florence2"], tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        del tensors[min(tensors)]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        assert "lacks 1 tensors" in self.refused(folder).message

    def test_a_chat_template_without_a_place_for_pictures(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = self.copy(folders["qwen3_vl"], tmp_path / "model")
        (folder / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}")
        assert "no place for a picture" in self.refused(folder).message
        # The processor's own, as older models have it, goes before the tokenizer's.
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
        assert load_captioner(str(folder), "general", 8, CPU)(noise(SIZES[:1]))

    def test_a_model_that_thinks_aloud(self, folders: dict[str, Path], tmp_path: Path) -> None:
        folder = self.copy(folders["qwen3_vl"], tmp_path / "model")
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + "<think>\n")
        assert "Instruct" in (self.refused(folder).hint or "")


class TestHub:
    def test_a_named_model_that_cannot_be_fetched(
        self, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(DataError, match="captioner nobody/nothing: could not be fetched") as caught:
            describe(samples, CaptionerConfig(model="nobody/nothing"), "general", tmp_path / "run")
        assert not isinstance(caught.value, CaptionerUnavailable)
        assert "captioning: false" in (caught.value.hint or "")
        assert not (tmp_path / "run").exists()

    def fake_hub(self, monkeypatch: pytest.MonkeyPatch, free: int, **repositories: Path) -> None:
        def fetch(name: str, **_: object) -> str:
            key = {QWEN: "qwen", FLORENCE: "florence"}[name]
            if key not in repositories:
                raise OSError(f"offline, no {key}")
            return str(repositories[key])

        monkeypatch.setattr(module, "snapshot_download", fetch)
        monkeypatch.setattr(module, "_free_gpu_bytes", lambda _: free)

    def test_auto_says_so_when_nothing_can_be_had(
        self, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fake_hub(monkeypatch, free=20_000_000_000)
        with pytest.raises(CaptionerUnavailable) as caught:
            describe(samples, CaptionerConfig(), "general", tmp_path / "run")
        assert "offline, no qwen" in caught.value.message
        assert "offline, no florence" in caught.value.message
        assert not (tmp_path / "run").exists()

    def test_auto_goes_from_the_large_model_to_the_small_one(
        self,
        folders: dict[str, Path],
        samples: list[Sample],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        said: list[str],
    ) -> None:
        self.fake_hub(monkeypatch, free=20_000_000_000, florence=folders["florence2"])
        describe(samples, CaptionerConfig(max_tokens=8), "general", tmp_path)
        assert {row["model"] for row in rows(tmp_path)} == {FLORENCE}
        assert any("offline, no qwen" in line and f"{FLORENCE} is taken instead" in line for line in said)

    def test_auto_takes_the_large_model(
        self, folders: dict[str, Path], samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fake_hub(monkeypatch, 20_000_000_000, qwen=folders["qwen3_vl"], florence=folders["florence2"])
        describe(samples[:1], CaptionerConfig(max_tokens=8), "general", tmp_path)
        assert [row["model"] for row in rows(tmp_path)] == [QWEN]
        # Described by one model of `auto` stays described when there is less room.
        self.fake_hub(monkeypatch, 0)
        assert describe(samples[:1], CaptionerConfig(), "general", tmp_path) == 0
