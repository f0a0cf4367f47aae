"""Encoded pictures and captions on disk, one small file each, found by what is in them and never by file name.

    folder/latents/<key>.safetensors    latent_CHW               key: file digest, bucket, image fingerprint, version
    folder/text/<key>.safetensors       embeds_LD, pooled_P      key: caption, text fingerprint, version

A fingerprint names all else that the result depends on: the encoder's weights, its dtype and its settings. Encoders
are handed in as functions that open them; each is opened only when an entry is missing, and is gone on return.

Shapes in names: B batch, C latent channels, H W grid (pixels or latent), L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from flux_ft import log
from flux_ft.data.captions import tidy
from flux_ft.data.images import load_rgb
from flux_ft.errors import NonFiniteError, StorageError
from flux_ft.files import write_whole
from flux_ft.types import Bucket, CachedExample, PlacedSample, TextCond

ImageEncoder = Callable[[Tensor], Tensor]
"""pixels_B3HW float32 in [-1, 1] to normalised latents_BCHW."""
TextEncoder = Callable[[list[str]], TextCond]

CACHE_VERSION = 1
"""Raise it when the same picture and encoder would give other numbers: every entry is then made anew."""
IMAGE_BATCH = 4
TEXT_BATCH = 8

_LATENT_NAMES = {"latent_CHW"}
_TEXT_NAMES = {"embeds_LD", "pooled_P"}


def latent_path(folder: Path, placed: PlacedSample, fingerprint: str) -> Path:
    """Where the latent of this picture at this size lies."""
    bucket = placed.bucket
    key = _key("latent", placed.sample.digest, f"{bucket.width_px}x{bucket.height_px}", fingerprint)
    return folder / "latents" / f"{key}.safetensors"


def text_path(folder: Path, caption: str, fingerprint: str) -> Path:
    """Where the embeddings of this caption lie. Captions that differ in spacing alone share them."""
    return folder / "text" / f"{_key('text', tidy(caption), fingerprint)}.safetensors"


def cache_latents(
    placed: Sequence[PlacedSample], folder: Path, fingerprint: str, open_encoder: Callable[[], ImageEncoder]
) -> int:
    """Encode the pictures that are not in the cache yet; returns how many files were written.

    A damaged entry counts as missing. Raises DataError for a picture that cannot be read, NonFiniteError for a latent
    that is not finite, StorageError when the disk is full.
    """
    wanted = {latent_path(folder, one, fingerprint): one for one in placed}
    missing = {path: one for path, one in wanted.items() if not _is_whole(path, _LATENT_NAMES)}
    if not missing:
        return 0
    encode = open_encoder()
    written = 0
    with log.progress("encode pictures", len(missing)) as bar:
        for paths in _batches_of_one_bucket(missing):
            batch = [missing[path] for path in paths]
            with torch.no_grad():
                latents_BCHW = encode(torch.stack([_load_pixels(one) for one in batch])).detach().cpu()
            assert len(latents_BCHW) == len(batch), "the encoder returned another number of latents"
            entries = [{"latent_CHW": latent_CHW} for latent_CHW in latents_BCHW]
            if not written:
                _check_free_space(folder, _bytes(entries) / _pixels(batch) * _pixels(missing.values()))
            for path, one, entry in zip(paths, batch, entries, strict=True):
                _store(path, entry, f"the latent of `{one.sample.path}`")
            written += len(batch)
            bar.advance(len(batch))
    return written


def cache_texts(
    captions: Iterable[str], folder: Path, fingerprint: str, open_encoder: Callable[[], TextEncoder]
) -> int:
    """Encode the captions (and preview prompts, and "") that are not in the cache yet; returns how many were written.

    Raises NonFiniteError and StorageError as `cache_latents` does.
    """
    wanted = {text_path(folder, caption, fingerprint): tidy(caption) for caption in captions}
    missing = [(path, caption) for path, caption in wanted.items() if not _is_whole(path, _TEXT_NAMES)]
    if not missing:
        return 0
    encode = open_encoder()
    with log.progress("encode captions", len(missing)) as bar:
        for start in range(0, len(missing), TEXT_BATCH):
            batch = missing[start : start + TEXT_BATCH]
            with torch.no_grad():
                text = encode([caption for _, caption in batch])
            assert len(text.embeds_BLD) == len(text.pooled_BP) == len(batch), "another number of captions came back"
            pairs = zip(text.embeds_BLD.detach().cpu(), text.pooled_BP.detach().cpu(), strict=True)
            entries = [{"embeds_LD": embeds_LD, "pooled_P": pooled_P} for embeds_LD, pooled_P in pairs]
            if not start:
                _check_free_space(folder, _bytes(entries) / len(batch) * len(missing))
            for (path, caption), entry in zip(batch, entries, strict=True):
                _store(path, entry, f'the text embedding of "{caption}"')
            bar.advance(len(batch))
    return len(missing)


def load_text(caption: str, folder: Path, fingerprint: str) -> TextCond:
    """The cached embeddings of one caption, B = 1. Raises StorageError when they are missing or damaged."""
    entry = _load(text_path(folder, caption, fingerprint))
    return TextCond(embeds_BLD=entry["embeds_LD"][None], pooled_BP=entry["pooled_P"][None])


def load_examples(
    placed: Sequence[PlacedSample], folder: Path, image_fingerprint: str, text_fingerprint: str
) -> list[CachedExample]:
    """All examples into memory, in the order of `placed`; equal captions share one embedding.

    Names are paths relative to the pictures' common folder. Raises StorageError for a missing or damaged entry.
    """
    captions = {one.sample.caption for one in placed}
    texts = {caption: load_text(caption, folder, text_fingerprint) for caption in captions}
    return [
        CachedExample(
            name=name,
            bucket=one.bucket,
            latent_CHW=_load(latent_path(folder, one, image_fingerprint))["latent_CHW"],
            text=texts[one.sample.caption],
        )
        for one, name in zip(placed, _names(placed), strict=True)
    ]


def _key(*parts: str) -> str:
    # Lengths go in as well, so that no two lists of parts run together to the same text.
    text = "".join(f"{len(part)}:{part};" for part in (str(CACHE_VERSION), *parts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _is_whole(path: Path, names: set[str]) -> bool:
    """Whether the entry has these tensors at full length; the header is read, the numbers are not."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == names
    except (OSError, SafetensorError):
        return False


def _batches_of_one_bucket(missing: dict[Path, PlacedSample]) -> Iterator[list[Path]]:
    """Up to IMAGE_BATCH paths of equal bucket at a time, buckets from small to large."""

    def bucket_of(path: Path) -> Bucket:
        return missing[path].bucket

    for _, group in groupby(sorted(missing, key=bucket_of), key=bucket_of):
        paths = list(group)
        yield from (paths[start : start + IMAGE_BATCH] for start in range(0, len(paths), IMAGE_BATCH))


def _load_pixels(one: PlacedSample) -> Tensor:
    """pixels_3HW, float32 in [-1, 1]."""
    pixels_HW3 = torch.from_numpy(load_rgb(one.sample.path, one.bucket).astype(np.float32))
    return pixels_HW3.permute(2, 0, 1) / 127.5 - 1


def _store(path: Path, entry: dict[str, Tensor], what: str) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in entry.values()):
        raise NonFiniteError(f"{what} is not finite", hint="encode in bfloat16 or float32, not float16")
    # A row of a batch shares the batch's memory, and safetensors would refuse it.
    write_whole(path, save({name: tensor.clone().contiguous() for name, tensor in entry.items()}))


def _load(path: Path) -> dict[str, Tensor]:
    try:
        entry: dict[str, Tensor] = load(path.read_bytes())
        return entry
    except (OSError, SafetensorError) as error:
        raise StorageError(f"the cache entry `{path}` is missing or damaged", hint="fill the cache again") from error


def _check_free_space(folder: Path, needed: float) -> None:
    """Refuse before the first byte what would not fit; `needed` in bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(f"cannot write to `{folder}`: {error.strerror}", hint="choose another folder") from error
    if needed > free:
        raise StorageError(
            f"the cache needs {needed / 1e9:.2f} GB more in `{folder}` and {free / 1e9:.2f} GB are free",
            hint="free space there, or choose another folder",
        )


def _bytes(entries: Iterable[dict[str, Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for entry in entries for tensor in entry.values())


def _pixels(placed: Iterable[PlacedSample]) -> int:
    return sum(one.bucket.width_px * one.bucket.height_px for one in placed)


def _names(placed: Sequence[PlacedSample]) -> list[str]:
    paths = [one.sample.path for one in placed]
    common = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return [path.relative_to(common).as_posix() for path in paths]
