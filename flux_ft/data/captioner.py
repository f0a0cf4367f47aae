"""Descriptions of pictures that came without one, by a vision model that runs here.

The model says what is in the picture; where the trigger word goes is `captions.place_trigger`'s work. Code that a
model's repository brings along is never run: the kinds below are transformers' own classes. Their processors are not
used, because those of Qwen load a video part that needs torchvision; `Captioner.inputs` does the same for one prompt.

Shapes in names: B batch, L text tokens, H W pixels.
"""

from __future__ import annotations

import copy
import gc
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from torch import Tensor

from flux_ft import log
from flux_ft.config import HUB_PREFIX, CaptionerConfig
from flux_ft.data.captions import Mode, tidy
from flux_ft.data.captions_file import AUTO, CAPTIONS_FILE, CaptionRow, appending, read_captions
from flux_ft.data.folder import FolderSource
from flux_ft.data.images import load_picture
from flux_ft.errors import DataError, first_line
from flux_ft.files import write_whole
from flux_ft.types import Bucket, Decoding, Sample, Source

QWEN = "Qwen/Qwen3-VL-4B-Instruct"
"""Apache-2.0; 8.9 GB of weights in bfloat16."""
FLORENCE = "florence-community/Florence-2-base"
"""MIT; Microsoft's weights in the form that transformers reads without code from the repository; 0.5 GB in bfloat16."""
ROOM_FOR_QWEN = 12_000_000_000
"""Free GPU memory in bytes: the weights, and 3 GB for the pictures at hand."""
MOST_PIXELS = 600_000
"""Larger pictures are shown reduced: Qwen3-VL takes a token for each 1,024 pixels, and time grows with them."""
MOST_ASPECT = 20
"""Of longer pictures the middle is shown: Qwen's own limit is 200, and long before that nothing can be made out."""

FLORENCE_TASK = "Describe in detail what is shown in the image."
"""What Florence-2 was trained to take for its task <DETAILED_CAPTION>; it follows no other wording."""

_FORM = (
    "Answer with the description alone, as one or two plain sentences in English. Start with what is seen, never with "
    "words like 'The image shows'. Say only what can be seen."
)
_NAMED = "is called [trigger]; write [trigger], in brackets and exactly so, wherever it is mentioned"
INSTRUCTIONS: Mapping[Mode, str] = {
    "character": f"Describe this picture. Its main figure {_NAMED}. Say nothing of who or what that figure is: nothing "
    "of face, hair, skin, age, sex, species or build. Describe all the rest: clothes, pose, expression, what the "
    f"figure does, other people and things, the place, the light and the view. {_FORM}",
    "product": f"Describe this picture. Its main object {_NAMED}. Say nothing of that object itself: nothing of its "
    "kind, shape, colour, material, parts, brand or writing. Describe all the rest: where it stands or who holds it "
    f"and how, other things, the background, the light and the view. {_FORM}",
    "style": "Describe only what this picture is of: who and what is in it, what they do, and where. Say nothing of "
    "how it looks or was made: no medium, technique, brushwork, line, palette, mood, art movement or artist, and no "
    f"word such as photo, painting, drawing, render or illustration. {_FORM}",
    "general": "Describe this picture: who and what is in it, what they look like and do, the place, the light, the "
    f"view, and whether it is a photo, a painting or something else. {_FORM}",
}
"""What a model that takes instructions is asked. What a caption leaves out is what the trigger word comes to mean."""


class CaptionerUnavailable(DataError):
    """None of the models that `captioner.model: auto` stands for can be had here; plain captions are the way on."""


@dataclass(frozen=True)
class _Kind:
    model_class: str
    picture_class: str
    """The image processor that needs Pillow alone."""
    instructable: bool


KINDS: Mapping[str, _Kind] = {
    "florence2": _Kind("Florence2ForConditionalGeneration", "CLIPImageProcessorPil", False),
    "qwen3_vl": _Kind("Qwen3VLForConditionalGeneration", "Qwen2VLImageProcessorPil", True),
    "qwen2_5_vl": _Kind("Qwen2_5_VLForConditionalGeneration", "Qwen2VLImageProcessorPil", True),
}
"""By `model_type` in a model's config.json."""


def choose_model(config: CaptionerConfig, free_gpu_bytes: int) -> str:
    """The Hub id or folder to describe pictures with, at this much free GPU memory (0 without a GPU)."""
    if config.model != AUTO:
        return config.model
    return QWEN if free_gpu_bytes >= ROOM_FOR_QWEN else FLORENCE


def describe(
    samples: Sequence[Sample],
    config: CaptionerConfig,
    mode: Mode,
    folder: Path,
    device: torch.device | str | None = None,
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
) -> int:
    """Write captions for those of `samples` that have none in the run folder's captions.jsonl; returns how many.

    Each is kept as soon as its batch is done, so a second call after a kill does only the rest. The most likely words
    are taken and none drawn. `device` None is the first GPU, or the CPU; `decoding` gives the colour behind transparent
    parts. The model is gone on return. Raises CaptionerUnavailable; DataError for a picture or a model that cannot be
    read, or when memory does not do for one picture; StorageError.
    """
    known = read_captions(folder, config.model, mode)
    first: dict[str, Sample] = {}
    for one in samples:
        if one.content_digest not in known:
            first.setdefault(one.content_digest, one)
    waiting = list(first.values())  # in the samples' order: a stream is read forwards
    if waiting:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        captioner = _open(config, mode, device)
        log.say(f"describing {len(waiting)} pictures with {captioner.name} on {device.type}")
        empty = 0
        with appending(folder) as append, log.progress("describe pictures", len(waiting)) as bar:
            for batch, captions in _described(captioner, waiting, config.batch_size, decoding):
                for sample, caption in zip(batch, captions, strict=True):
                    append(CaptionRow(sample.content_digest, sample.file.name, caption, captioner.name, mode))
                    empty += not caption
                bar.advance(len(batch))
        if empty:
            log.warn(
                f"{captioner.name} had no words for {empty} of {len(waiting)} pictures: they get the plain caption"
            )
        del captioner
        _free(device)
    if config.beside_pictures:
        _write_beside(samples, read_captions(folder, config.model, mode))
    return len(waiting)


class Captioner:
    """A model with its instruction, ready to describe pictures. `load_captioner` makes one."""

    def __init__(self, name: str, path: Path, mode: Mode, max_tokens: int, device: torch.device) -> None:
        self.name, self.device = name, device
        kind = _kind(path)
        self._model, self._pictures, self._tokenizer = _loaded(path, kind, device)
        self._image_id = int(self._model.config.image_token_id)
        self._prompt_ids = self._prompt(path, INSTRUCTIONS[mode] if kind.instructable else None)
        # Set on the model, because `generate` fills what its argument leaves out from there.
        self._settings = _greedy(self._model.generation_config, self._tokenizer.pad_token_id, max_tokens)
        self._model.generation_config = self._settings

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> list[str]:
        """One caption each; the pictures are sRGB of shape (H, W, 3) and may differ in size."""
        inputs = {name: value.to(self.device) for name, value in self.inputs(pictures).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        ids_BL = self._model.generate(**inputs).cpu()
        # What comes back starts with the prompt, or with the decoder's start mark where the prompt went to an encoder.
        start = 1 if self._model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        ends = self._settings.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        said = [row[start:].tolist() for row in ids_BL]
        texts = self._tokenizer.batch_decode(said, skip_special_tokens=True)
        return [polish(text, cut_short=not ends & set(ids)) for text, ids in zip(texts, said, strict=True)]

    def inputs(self, pictures: Sequence[NDArray[np.uint8]]) -> dict[str, Tensor]:
        """What the model is given: the prompt, with as many tokens for a picture as it takes, padded on the left."""
        batch = dict(self._pictures(images=list(pictures), input_data_format="channels_last", return_tensors="pt"))
        if "image_grid_thw" in batch:
            counts = (batch["image_grid_thw"].prod(-1) // self._pictures.merge_size**2).tolist()
        else:
            counts = [self._pictures.image_seq_length] * len(pictures)
        at = self._prompt_ids.index(self._image_id)
        before, after = self._prompt_ids[:at], self._prompt_ids[at + 1 :]
        rows = [[*before, *[self._image_id] * count, *after] for count in counts]
        length = max(map(len, rows))
        # On the left, so that each row goes on where its prompt ends.
        pad = self._tokenizer.pad_token_id
        batch["input_ids"] = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        batch["attention_mask"] = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        if "image_grid_thw" in batch:
            batch["mm_token_type_ids"] = (batch["input_ids"] == self._image_id).int()
        return batch

    def _prompt(self, path: Path, instruction: str | None) -> list[int]:
        """The prompt's tokens, with the picture's token standing once."""
        if instruction is None:
            picture = self._tokenizer.convert_ids_to_tokens(self._image_id)
            text = f"{picture}{self._tokenizer.bos_token}{FLORENCE_TASK}{self._tokenizer.eos_token}"
        else:
            content = [{"type": "image"}, {"type": "text", "text": instruction}]
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=_processors_template(path),
                tokenize=False,
                add_generation_prompt=True,
            )
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids.count(self._image_id) != 1:
            raise DataError("its chat template has no place for a picture", hint=_WAY_OUT)
        if text.rstrip().endswith("<think>"):
            raise DataError(
                "it thinks aloud before it answers, and that would become the caption",
                hint="take the Instruct model of the same name",
            )
        return ids


def load_captioner(source: str, mode: Mode, max_tokens: int, device: torch.device) -> Captioner:
    """The captioner in a folder or at a Hub id; what is not in the Hub's cache is fetched.

    Raises DataError when it can't be fetched, is of no supported kind, is broken, or does not fit into memory.
    """
    try:
        return Captioner(source, _fetched(source), mode, max_tokens, device)
    except DataError as error:
        raise DataError(f"captioner {source}: {error.message}", hint=error.hint) from error
    except Exception as error:  # a folder can be broken in any way, and each of its parts has errors of its own
        reason = "there is not enough memory for it" if _out_of_memory(error) else first_line(error)
        raise DataError(f"captioner {source}: cannot be loaded: {reason}", hint=_WAY_OUT) from error


def polish(text: str, *, cut_short: bool = False) -> str:
    """A model's answer as a caption: one line, without quotes around it or "The image shows" in front.

    With `cut_short` also without its unfinished last sentence, if there is another.
    """
    text = tidy(text)
    for opening, closing in ('""', "''", "“”"):
        inside = text[1:-1]
        if len(text) > 1 and text[0] == opening and text[-1] == closing and not {opening, closing} & set(inside):
            text = inside.strip()
    if cut_short and (whole := _SENTENCES.match(text)):
        text = whole[0]
    text = _PREAMBLE.sub("", text, count=1)
    return text[:1].upper() + text[1:]


_PICTURE = r"(?:image|picture|photo(?:graph)?)"
_PREAMBLE = re.compile(
    rf"\A(?:(?:in|on) (?:this|the) {_PICTURE},? (?:we (?:can )?see|you can see|there (?:is|are))"
    rf"|(?:this|the) {_PICTURE} (?:shows|depicts|displays|features|captures|presents|is of)"
    r"|(?:this is )?(?:a|an|the) (?:image|picture) of) ",  # "a photo of" says something
    re.IGNORECASE,
)
_SENTENCES = re.compile(r".*[.!?](?=\s)")


def view_of(sample: Sample) -> Bucket:
    """The size that a picture is shown to the captioner at, in pixels: never enlarged, the part that is trained on."""
    bucket = sample.buckets[0]
    aspect = min(max(bucket.width_px / bucket.height_px, 1 / MOST_ASPECT), MOST_ASPECT)
    width = min(sample.width_px, sample.height_px * aspect)
    height = min(sample.height_px, sample.width_px / aspect)
    scale = min(1.0, sqrt(MOST_PIXELS / (width * height)))
    return Bucket(max(1, int(width * scale)), max(1, int(height * scale)))


_NO_MODEL = "write the captions as .txt beside the pictures; or set `captioning: false`"
_WAY_OUT = f"set `captioner.model` to {FLORENCE} or to a folder with another model; or {_NO_MODEL}"
_FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]


def _open(config: CaptionerConfig, mode: Mode, device: torch.device) -> Captioner:
    chosen = choose_model(config, _free_gpu_bytes(device))
    if config.model != AUTO:
        return load_captioner(chosen, mode, config.max_tokens, device)
    problems: list[str] = []
    for model in dict.fromkeys((chosen, FLORENCE)):
        try:
            captioner = load_captioner(model, mode, config.max_tokens, device)
        except DataError as error:
            problems.append(error.message)
            _free(device)
        else:
            for problem in problems:
                log.warn(f"{problem}; {model} is taken instead")
            return captioner
    raise CaptionerUnavailable("; ".join(problems), hint=f"give a folder as `captioner.model`; or {_NO_MODEL}")


def _fetched(source: str) -> Path:
    """The folder with the model's files, from the Hub's cache or the Hub if `source` is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise DataError("neither a folder nor a Hub id, which reads owner/name", hint=_WAY_OUT)
    try:
        return Path(snapshot_download(source, allow_patterns=_FILES))
    except Exception as error:  # the Hub's client lets through its transport's own, whose classes change
        raise DataError(
            f"could not be fetched: {first_line(error)}",
            hint="check the name and the network; or fetch it elsewhere with `hf download` and give the folder as "
            f"`captioner.model`; or {_NO_MODEL}",
        ) from error


def _kind(path: Path) -> _Kind:
    """Which kind of model it is, by its config.json."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"has no readable config.json: {error}", hint=_WAY_OUT) from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str) or model_type not in KINDS:
        raise DataError(f"is a `{model_type}`; those that can be used are {', '.join(KINDS)}", hint=_WAY_OUT)
    text = config.get("text_config")
    if isinstance(text, dict) and text.get("model_type") == "florence2_language":
        raise DataError(
            "is in Florence-2's first format, which needs the repository's code to be run",
            hint=f"take the same weights in the current format, such as {FLORENCE}",
        )
    return KINDS[model_type]


def _loaded(path: Path, kind: _Kind, device: torch.device) -> tuple[Any, Any, Any]:
    """(model, image processor, tokenizer). Raises DataError without the model's name, and whatever else goes wrong."""
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **here)
    pictures = getattr(transformers, kind.picture_class).from_pretrained(path, **here)
    model, info = getattr(transformers, kind.model_class).from_pretrained(
        path,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        use_safetensors=True,  # a pickled file can run code
        output_loading_info=True,
        **here,
    )
    if missing := sorted(info["missing_keys"]):  # transformers would make the missing weights up
        raise DataError(f"lacks {len(missing)} tensors; first: {missing[0]}", hint="download it again")
    # transformers makes an empty tokenizer where the vocabulary is missing.
    if len(tokenizer) <= model.config.image_token_id or tokenizer.pad_token_id is None:
        raise DataError("its tokenizer's files are missing or are another model's", hint="download it again")
    return model.eval().to(device), pictures, tokenizer


def _processors_template(path: Path) -> str | None:
    """The chat template of older models, which may have one of its own for text alone in the tokenizer's files."""
    file = path / "chat_template.json"
    return json.loads(file.read_text(encoding="utf-8"))["chat_template"] if file.is_file() else None


def _greedy(settings: Any, pad_token_id: int, max_tokens: int) -> Any:
    """The model's own generation settings, less those that draw or search; what stops it repeating itself stays."""
    settings = copy.deepcopy(settings)
    settings.update(
        do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1, early_stopping=None,
        max_new_tokens=max_tokens, max_length=None, pad_token_id=pad_token_id,
    )  # fmt: skip
    return settings


def _described(
    captioner: Captioner, samples: Sequence[Sample], batch_size: int, decoding: Decoding
) -> Iterator[tuple[Sequence[Sample], list[str]]]:
    """Batches with their captions. Where memory does not do, the batch is halved, and stays so."""
    ahead = iter(samples)
    loaded: list[tuple[Sample, NDArray[np.uint8]]] = []
    while True:
        loaded += [(one, _load(one, decoding)) for one in islice(ahead, max(0, batch_size - len(loaded)))]
        if not loaded:
            return
        batch, pictures = zip(*loaded[:batch_size], strict=True)
        try:
            captions = captioner(pictures)
        except Exception as error:  # whatever somebody else's model does with somebody's pictures
            if not _out_of_memory(error):
                raise DataError(
                    f"captioner {captioner.name}: failed on {batch[0].file}: {first_line(error)}", hint=_WAY_OUT
                ) from error
            captions = []
        if captions:
            yield batch, captions
            del loaded[:batch_size]
        elif len(batch) == 1:
            raise DataError(
                f"captioner {captioner.name}: there is not enough memory to describe even one picture",
                hint=f"end what else uses the GPU; or {_WAY_OUT}",
            )
        else:  # outside the handler, where the error no longer holds on to the failed batch's memory
            batch_size = len(batch) // 2
            _free(captioner.device)
            log.warn(f"not enough memory to describe {len(batch)} pictures at once: going on with {batch_size}")


def _load(sample: Sample, decoding: Decoding) -> NDArray[np.uint8]:
    try:
        # What is transparent is not to be described, even where its colours are trained on.
        seen = Decoding(background=decoding.background)
        return load_picture(sample.file.read(), view_of(sample), seen).rgb_HW3
    except DataError as error:
        raise DataError(f"{sample.file}: {error.message}", hint=error.hint) from None


def _write_beside(samples: Sequence[Sample], captions: Mapping[str, str]) -> None:
    """Each caption as a .txt beside its picture, where there is none yet and the picture lies in a folder."""
    described = [one for one in samples if captions.get(one.content_digest)]
    in_folders = [one for one in described if _lies_in_folder(one.file.source)]
    pictures = {Path(one.file.source.identity, one.file.name): captions[one.content_digest] for one in in_folders}
    sharing = Counter(picture.with_suffix(".txt") for picture in pictures)
    written = 0
    for picture, caption in pictures.items():
        target = picture.with_suffix(".txt")
        # Of two pictures that share a stem, either's caption would be taken for the other's too.
        if sharing[target] == 1 and not target.exists():
            write_whole(target, (caption + "\n").encode())
            written += 1
    if written:
        log.say(f"wrote {written} captions beside their pictures")
    if elsewhere := len(described) - len(in_folders):
        log.warn(f"{elsewhere} captions are in {CAPTIONS_FILE} alone: their pictures do not lie in a folder of files")
    if shared := sum(count for count in sharing.values() if count > 1):
        log.warn(f"{shared} captions are in {CAPTIONS_FILE} alone: their pictures would share one .txt")


def _lies_in_folder(source: Source) -> bool:
    """Pictures on the Hub are read as a folder as well, but that one is the Hub's cache."""
    return isinstance(source, FolderSource) and not source.label.startswith(HUB_PREFIX)


def _out_of_memory(error: BaseException) -> bool:
    said = str(error).lower()  # only CUDA has a class of its own for it
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    )


def _free_gpu_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
