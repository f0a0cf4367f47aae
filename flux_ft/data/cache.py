"""Encoded pictures and captions on disk, one file each, found by what is in them and never by file name.

    folder/latents/<key>.safetensors    mean_CHW, std_CHW; mask_HW where the loss is weighted
                                        key: the picture's digest, bucket, crop, decoding, fingerprint, version
    folder/text/<key>.safetensors       embeds_LD, pooled_P
                                        key: caption, fingerprint, version

A fingerprint names all else that the result depends on: the encoder's weights, its dtype and its settings. Encoders
are handed in as functions that open them; each is opened only when an entry is missing, and is gone on return. Pictures
and captions are encoded one at a time, since a batch would let its other members into the last bits of an entry; at
1 MP, or 512 tokens, one already fills a GPU. Every entry carries a SHA-256 of its numbers, which is checked whenever
they are read.

Several processes fill a cache together: all list what is missing before any writes, each encodes its share, and none
goes on before all have written.

With FLUX.1 a picture takes 2 bytes a pixel (16 channels at an eighth of either side, float32, twice), 2.1 MB at 1 MP,
and a caption 4.2 MB (512 tokens of 4,096 numbers, bfloat16).

Shapes in names: B batch, C latent channels, H W grid (pixels or latent), L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from flux_ft import flow, log
from flux_ft.data.captions import tidy
from flux_ft.data.images import load_mask, load_picture
from flux_ft.data.index import default_index_path
from flux_ft.data.parallel import ordered_map, usable_cpus
from flux_ft.data.share import ALONE, Share
from flux_ft.errors import DataError, NonFiniteError, StorageError
from flux_ft.files import write_whole
from flux_ft.types import Bucket, CachedExample, Decoding, PlacedSample, Sample, SourceFile, TextCond

ImageEncoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""pixels_B3HW float32 in [-1, 1] to mean and standard deviation of the normalised latents, both (B, C, H, W)."""
TextEncoder = Callable[[list[str]], TextCond]

CACHE_VERSION = 2
"""Raise it when the same picture and encoder would give other numbers: every entry is then made anew."""
MEMORY_BYTES = 2 * 2**30
"""What examples keep of the cache in memory."""
STRAY_AFTER_S = 3600
"""A half-written file of this age has lost its writer."""

_CROP = "centre"
_LATENT_NAMES = {"mean_CHW", "std_CHW"}
_TEXT_NAMES = {"embeds_LD", "pooled_P"}

Entry = dict[str, Tensor]


# --- where entries lie ----------------------------------------------------------------------------------------------


def latent_path(folder: Path, placed: PlacedSample, decoding: Decoding, fingerprint: str) -> Path:
    """Where the latent of this picture at this size lies."""
    bucket = placed.bucket
    size = f"{bucket.width_px}x{bucket.height_px}"
    background = "#" + bytes(decoding.background).hex()
    weighted = "weighted" if placed.sample.masked else "even"
    key = _key(
        "latent", placed.sample.digest, size, _CROP, background, str(decoding.alpha_is_mask), weighted, fingerprint
    )
    return folder / "latents" / f"{key}.safetensors"


def text_path(folder: Path, caption: str, fingerprint: str) -> Path:
    """Where the embeddings of this caption lie. Captions that differ in spacing alone share them."""
    return folder / "text" / f"{_key('text', tidy(caption), fingerprint)}.safetensors"


def _key(*parts: str) -> str:
    # Lengths go in as well, so that no two lists of parts run together to the same text.
    text = "".join(f"{len(part)}:{part};" for part in (str(CACHE_VERSION), *parts))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- filling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """The bytes of one picture, and which entries are to be made of them."""

    sample: Sample
    wanted: tuple[tuple[Path, Bucket], ...]
    data: bytes
    mask: bytes | None


@dataclass(frozen=True)
class _Decoded:
    """One picture at one size, on its way to the encoder."""

    path: Path
    sample: Sample
    bucket: Bucket
    rgb_HW3: NDArray[np.uint8]
    mask_HW: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Made:
    """One entry, ready to be written."""

    path: Path
    entry: Entry
    what: str
    """In words."""
    part: float
    """About how much of all that is missing it is."""


def cache_latents(
    placed: Sequence[PlacedSample],
    decoding: Decoding,
    folder: Path,
    fingerprint: str,
    open_encoder: Callable[[], ImageEncoder],
    share: Share = ALONE,
) -> int:
    """Encode the pictures that are not in the cache yet; returns how many entries this process wrote.

    Each picture is read once, in the order of `placed`, and decoded by threads while others are encoded. A damaged
    entry counts as missing. Every process has to call this. Raises DataError for a picture or mask that cannot be read
    or weighs nothing, NonFiniteError for a latent that is not finite, StorageError when the disk is full.
    """
    wanted: dict[Path, PlacedSample] = {}
    for one in placed:
        wanted.setdefault(latent_path(folder, one, decoding, fingerprint), one)
    missing = {path: one for path, one in wanted.items() if not _is_whole(path, _latent_names(one.sample))}
    pictures = [tuple(sizes) for _, sizes in groupby(missing.items(), key=_file_of)]
    own = dict(chain.from_iterable(share.of(pictures)))
    pixels = sum(_pixels(one.bucket) for one in missing.values())

    def make() -> Iterator[_Made]:
        encode, threads = open_encoder(), usable_cpus()
        decoded = ordered_map(lambda read: _decode(read, decoding), _readings(own), threads, 2 * threads)
        for one in chain.from_iterable(decoded):
            part = _pixels(one.bucket) / pixels
            yield _Made(one.path, _encode(encode, one), f"the latent of `{one.sample.file}`", part)

    return _fill(folder, "encode pictures", len(own), make, share)


def cache_texts(
    captions: Iterable[str],
    folder: Path,
    fingerprint: str,
    open_encoder: Callable[[], TextEncoder],
    share: Share = ALONE,
) -> int:
    """Encode the captions (and preview prompts, and "") that are not in the cache yet; returns how many of them this
    process wrote.

    Every process has to call this. Raises NonFiniteError and StorageError as `cache_latents` does.
    """
    wanted = {text_path(folder, caption, fingerprint): tidy(caption) for caption in captions}
    missing = [(path, text) for path, text in wanted.items() if not _is_whole(path, _TEXT_NAMES)]
    own = share.of(missing)

    def make() -> Iterator[_Made]:
        encode = open_encoder()
        for path, caption in own:
            with torch.no_grad():
                text = encode([caption])
            assert len(text.embeds_BLD) == len(text.pooled_BP) == 1, "another number of captions came back"
            entry = {"embeds_LD": text.embeds_BLD[0].detach().cpu(), "pooled_P": text.pooled_BP[0].detach().cpu()}
            yield _Made(path, entry, f'the text embedding of "{caption}"', 1 / len(missing))

    return _fill(folder, "encode captions", len(own), make, share)


def _fill(folder: Path, work: str, count: int, make: Callable[[], Iterator[_Made]], share: Share) -> int:
    """Write the `count` entries that are this process's share; `make` is called only if there are any."""
    free = _free_space(folder)
    share.wait()
    with log.progress(share.named(work), count) as bar:
        for one in make() if count else ():
            if not bar.done:
                _require_space(folder, _bytes(one.entry) / one.part, free)
            _store(one.path, one.entry, one.what)
            bar.advance()
    share.wait()
    return count


def _file_of(item: tuple[Path, PlacedSample]) -> SourceFile:
    return item[1].sample.file


def _readings(missing: Mapping[Path, PlacedSample]) -> Iterator[_Read]:
    """Each picture's bytes once, with all its sizes: a stream can only go forwards."""
    for _, group in groupby(missing.items(), key=_file_of):
        wanted = [(path, one.bucket, one.sample) for path, one in group]
        sample = wanted[0][2]
        try:
            data = sample.file.read()
            mask = sample.mask.read() if sample.mask else None
        except DataError as error:
            raise DataError(
                error.message, hint=error.hint or "leave the pictures in their place, and start again"
            ) from None
        yield _Read(sample, tuple((path, bucket) for path, bucket, _ in wanted), data, mask)


def _decode(read: _Read, decoding: Decoding) -> list[_Decoded]:
    sample, decoded = read.sample, []
    paths = {bucket: path for path, bucket in read.wanted}
    # The largest size tells whether the picture is still the one that was looked at, wanted or not.
    for bucket in dict.fromkeys((sample.buckets[0], *paths)):
        file = sample.file
        try:
            pixels = load_picture(read.data, bucket, decoding)
            if sample.mask and read.mask is not None:
                file = sample.mask
                mask_HW = load_mask(read.mask, (sample.width_px, sample.height_px), bucket)
                pixels = replace(pixels, mask_HW=mask_HW)
            if pixels.mask_HW is not None and not pixels.mask_HW.any():
                raise DataError("the mask is black everywhere, so nothing of the picture would be learned")
            if bucket == sample.buckets[0] and pixels.digest != sample.digest:
                again = f"start again; if it comes back, delete the scan index, `{default_index_path()}`"
                raise DataError("it has changed since it was looked at", hint=again)
        except DataError as error:
            raise DataError(f"{file}: {error.message}", hint=error.hint) from None
        if bucket in paths:
            decoded.append(_Decoded(paths[bucket], sample, bucket, pixels.rgb_HW3, pixels.mask_HW))
    return decoded


@torch.no_grad()
def _encode(encode: ImageEncoder, one: _Decoded) -> Entry:
    pixels_1HW3 = torch.from_numpy(one.rgb_HW3)[None]
    mean_1CHW, std_1CHW = encode(pixels_1HW3.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1)
    assert len(mean_1CHW) == len(std_1CHW) == 1, "the encoder returned another number of latents"
    entry = {"mean_CHW": mean_1CHW[0].cpu(), "std_CHW": std_1CHW[0].cpu()}
    if one.mask_HW is not None:
        entry["mask_HW"] = mask_on_grid(one.mask_HW, (mean_1CHW.shape[-2], mean_1CHW.shape[-1]))
    return entry


def mask_on_grid(mask_HW: NDArray[np.uint8], grid: tuple[int, int]) -> Tensor:
    """The mask, 0 to 255 at the picture's size, as the mean over each place of the latent grid (rows, columns).

    float32 in 0 to 1; exactly 1 where all of it is white.
    """
    mask_1HW = torch.from_numpy(mask_HW).float()[None] / 255
    return torch.nn.functional.adaptive_avg_pool2d(mask_1HW, grid)[0]


# --- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleRow:
    """One picture at one size with its caption: what is known without reading its numbers, and where they lie."""

    name: str
    bucket: Bucket
    digest: str
    latent: Path
    texts: tuple[Path, ...]
    """The caption's embeddings, then those of the other orders of its tags."""
    repeats: int
    loss_weight: float


class Examples(Sequence[CachedExample]):
    """Examples by position; the numbers of one are read when it is asked for, and kept while memory allows."""

    def __init__(
        self,
        rows: Sequence[ExampleRow],
        *,
        unmasked_weight: float = 0.0,
        resample: bool = True,
        memory: Memory | None = None,
    ) -> None:
        """`unmasked_weight` is the weight of what a mask leaves black; `resample` says whether spreads are wanted."""
        self.rows = tuple(rows)
        self._unmasked_weight, self._resample = unmasked_weight, resample
        self._memory = memory or Memory(MEMORY_BYTES)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> CachedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> CachedExample | Examples:
        """Raises StorageError for an entry that is missing or damaged."""
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        row = self.rows[index]
        entry = self._memory.read(row.latent)
        mask_HW = entry.get("mask_HW")
        return CachedExample(
            name=row.name,
            bucket=row.bucket,
            mean_CHW=entry["mean_CHW"],
            std_CHW=entry["std_CHW"] if self._resample else None,
            texts=_Texts(row.texts, self._memory),
            digest=row.digest,
            weight_HW=None if mask_HW is None else flow.mask_weights(mask_HW, self._unmasked_weight),
            loss_weight=row.loss_weight,
        )

    def select(self, positions: Iterable[int]) -> Examples:
        """The examples at `positions`, as often as they are named; they share this one's memory."""
        return Examples(
            [self.rows[position] for position in positions],
            unmasked_weight=self._unmasked_weight,
            resample=self._resample,
            memory=self._memory,
        )

    def digest(self) -> str:
        """Tells what is encoded apart: a few letters of SHA-256 over those of all entries, in the order of the rows.

        Raises StorageError for an entry that is missing or damaged.
        """
        paths = dict.fromkeys(path for row in self.rows for path in (row.latent, *row.texts))
        return hashlib.sha256("\n".join(map(_noted_sha256, paths)).encode()).hexdigest()[:16]

    @property
    def pictures(self) -> int:
        """How many different pictures there are, whatever their sizes and repeats."""
        return len({row.digest for row in self.rows})


class _Texts(Sequence[TextCond]):
    """The encodings of one example, of which a step reads the one it draws."""

    def __init__(self, paths: Sequence[Path], memory: Memory) -> None:
        self._paths, self._memory = paths, memory

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return _as_text(self._memory.read(self._paths[index]))


class Memory:
    """Entries as they were read, least recently used ones dropped beyond `limit` bytes. For several threads at once."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._entries: OrderedDict[Path, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path) -> Entry:
        """Raises StorageError for an entry that is missing or damaged."""
        with self._lock:
            if path in self._entries:
                self._entries.move_to_end(path)
                return self._entries[path]
        entry = read_entry(path)  # without the lock: threads read side by side
        with self._lock:
            if path not in self._entries:
                self._entries[path] = entry
                self._held += _bytes(entry)
            while self._held > self._limit:
                self._held -= _bytes(self._entries.popitem(last=False)[1])
        return entry


def load_examples(
    placed: Sequence[PlacedSample],
    decoding: Decoding,
    folder: Path,
    image_fingerprint: str,
    text_fingerprint: str,
    *,
    orders: Mapping[str, Sequence[str]] | None = None,
    unmasked_weight: float = 0.0,
    resample: bool = True,
) -> Examples:
    """One example for each of `placed`, in an order that follows from contents alone, whatever the files are called.

    `orders` gives, for a caption, itself and the other orders of its tags. Nothing is read yet.
    """
    rows = [
        ExampleRow(
            name=one.sample.file.name,
            bucket=one.bucket,
            digest=one.sample.digest,
            latent=latent_path(folder, one, decoding, image_fingerprint),
            texts=tuple(
                text_path(folder, text, text_fingerprint)
                for text in (orders or {}).get(one.sample.caption, (one.sample.caption,))
            ),
            repeats=one.sample.repeats,
            loss_weight=one.sample.weight,
        )
        for one in placed
    ]
    rows.sort(key=lambda row: (row.digest, row.bucket, row.texts[0].name, row.repeats, row.loss_weight))
    return Examples(rows, unmasked_weight=unmasked_weight, resample=resample)


def load_text(caption: str, folder: Path, fingerprint: str) -> TextCond:
    """The cached embeddings of one caption, B = 1, at the length that the encoder padded it to.

    The padding is kept, since FLUX.1 attends to it and so is conditioned by it: a shorter entry would be another
    condition. Raises StorageError when the entry is missing or damaged.
    """
    return _as_text(read_entry(text_path(folder, caption, fingerprint)))


def _as_text(entry: Entry) -> TextCond:
    return TextCond(embeds_BLD=entry["embeds_LD"][None], pooled_BP=entry["pooled_P"][None])


# --- one entry ------------------------------------------------------------------------------------------------------


def read_entry(path: Path) -> Entry:
    """The tensors of one entry, by name. Raises StorageError unless they are those that were written."""
    try:
        data = path.read_bytes()
        entry: Entry = load(data)
        if _noted_sha256(path) == _sha256(entry):
            return entry
    except (OSError, SafetensorError):
        pass
    raise _damaged(path)


def _noted_sha256(path: Path) -> str:
    """What an entry's header says of its numbers. Raises StorageError."""
    # safetensors gives out metadata only with a file that stays mapped, which on Windows nobody could replace.
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return str(header["__metadata__"]["sha256"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        raise _damaged(path) from None


def _damaged(path: Path) -> StorageError:
    return StorageError(
        f"the cache entry `{path}` is missing or damaged",
        hint="check the cache by `flux-ft cache RUN.yaml --verify`, then start again: what is missing is made anew",
    )


def _store(path: Path, entry: Entry, what: str) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in entry.values()):
        raise NonFiniteError(f"{what} is not finite", hint="encode in bfloat16 or float32, not float16")
    # What is a view of a larger tensor safetensors would refuse.
    own = {name: tensor.clone().contiguous() for name, tensor in entry.items()}
    write_whole(path, save(own, metadata={"sha256": _sha256(own)}))


def _sha256(entry: Entry) -> str:
    """Over names, dtypes, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(entry.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_whole(path: Path, names: set[str]) -> bool:
    """Whether the entry has these tensors at full length; the header is read, the numbers are not."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == names and "sha256" in (file.metadata() or {})
    except (OSError, SafetensorError, RuntimeError):  # the last: it went away between the library's two openings
        return False


def _latent_names(sample: Sample) -> set[str]:
    return _LATENT_NAMES | ({"mask_HW"} if sample.masked else set())


def _free_space(folder: Path) -> int:
    """In bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(f"cannot write to `{folder}`: {error.strerror}", hint="choose another folder") from error


def _require_space(folder: Path, needed: float, free: float) -> None:
    """Refuse before the first byte what would not fit into what was `free` before any process wrote, in bytes."""
    if needed > free:
        raise StorageError(
            f"the cache needs {needed / 1e9:.2f} GB more in `{folder}` and {free / 1e9:.2f} GB are free",
            hint="free space there, or choose another folder",
        )


def _bytes(entry: Entry) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in entry.values())


def _pixels(bucket: Bucket) -> int:
    return bucket.width_px * bucket.height_px


# --- verifying ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerifyResult:
    """What `verify_cache` found."""

    checked: int
    """Entries that were read."""
    damaged: tuple[Path, ...]
    stray: tuple[Path, ...]
    """Half-written files whose writer was killed."""
    removed: bool
    """Whether damaged and stray ones are gone."""


def verify_cache(folder: Path, *, remove: bool = False, now: Callable[[], float] = time.time) -> VerifyResult:
    """Read every entry of the cache and recompute its SHA-256; with `remove`, delete what is damaged or stray.

    A half-written file may belong to a writer at work until it is `STRAY_AFTER_S` old; `now` gives the time in seconds
    since the epoch. Raises StorageError when something cannot be deleted.
    """
    entries = [path for kind in ("latents", "text") for path in sorted((folder / kind).glob("*.safetensors"))]
    halves = [path for kind in ("latents", "text") for path in sorted((folder / kind).glob(".*.partial"))]
    damaged = []
    with log.progress("verify the cache", len(entries)) as bar:
        for path in entries:
            try:
                read_entry(path)
            except StorageError:
                damaged.append(path)
            bar.advance()
    stray = [path for path in halves if _age(path, now()) > STRAY_AFTER_S]
    if remove:
        for path in (*damaged, *stray):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(
                    f"cannot delete `{path}`: {error.strerror or error}", hint="delete it by hand, and start again"
                ) from error
    return VerifyResult(len(entries), tuple(damaged), tuple(stray), remove)


def _age(path: Path, now: float) -> float:
    """In seconds; 0 for a file that is gone by now."""
    try:
        return now - path.stat().st_mtime
    except OSError:
        return 0.0
