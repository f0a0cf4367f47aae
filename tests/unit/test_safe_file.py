"""Headers of safetensors files: what holds together is read exactly, everything else is refused by name."""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ft.adapters import safe_file
from flux_ft.adapters.safe_file import DTYPES, LARGEST_HEADER, LARGEST_TABLE, Entry, SafeFile, open_safely
from flux_ft.errors import AdapterError

TWO = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "I8", "shape": [], "data_offsets": [8, 9]},
}
"""Two tensors of nine bytes."""


def packed(header: Any, data: bytes = bytes(9), length: int | None = None) -> bytes:
    """A file of a header, given as JSON or as it lies, and data; `length` lies about the header's."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def with_entry(**fields: Any) -> dict[str, Any]:
    """TWO with the fields of `a` replaced."""
    return TWO | {"a": TWO["a"] | fields}


def one(dtype: str, shape: list[int], span: list[int]) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": span}}


def opened(tmp_path: Path, content: bytes, name: str = "cat.safetensors") -> SafeFile:
    (tmp_path / name).write_bytes(content)
    return open_safely(tmp_path / name)


# --- What is read. ---


def test_tensors_of_every_dtype_are_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {}
    for name, dtype in DTYPES.items():
        bits = torch.arange(24, dtype=torch.uint8).repeat(dtype.itemsize)
        tensors[f"lora.{name}"] = (bits % 2 == 0) if dtype is torch.bool else bits.view(dtype).reshape(2, 3, 4)
    save_file(tensors, tmp_path / "cat.safetensors", {"format": "pt", "modelspec.title": "Kätzchen\n2"})
    file = open_safely(tmp_path / "cat.safetensors")
    assert file.metadata == {"format": "pt", "modelspec.title": "Kätzchen\n2"}
    assert file.entries.keys() == tensors.keys()
    assert file.data_bytes == sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    everything = file.read_all()
    for key, tensor in tensors.items():
        for read in (file.read(key), everything[key]):
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(read.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_entries_say_where_each_tensor_lies(tmp_path: Path) -> None:
    content = packed(TWO, bytes(range(9)))
    file = opened(tmp_path, content)
    assert file.entries == {"a": Entry("F32", (2,), 0, 8), "b": Entry("I8", (), 8, 9)}
    assert content[file.data_start :] == bytes(range(9))
    assert file.read("b").item() == 8


def test_entries_come_in_the_order_of_the_data(tmp_path: Path) -> None:
    file = opened(tmp_path, packed(dict(reversed(TWO.items()))))
    assert list(file.entries) == ["a", "b"]


def test_data_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F64", "shape": [1], "data_offsets": [1, 9]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (7 - len(raw) % 2)
    file = opened(tmp_path, packed(raw, b"\1" + torch.tensor([0.1], dtype=torch.float64).numpy().tobytes()))
    assert file.read("b").tolist() == [0.1]


def test_bytes_other_than_0_and_1_make_sound_booleans(tmp_path: Path) -> None:
    read = opened(tmp_path, packed(one("BOOL", [3], [0, 3]), b"\0\7\xff")).read("a")
    assert read.view(torch.uint8).tolist() == [0, 1, 1]


def test_a_header_of_the_length_that_begins_a_pickle_is_read(tmp_path: Path) -> None:
    header = json.dumps(TWO).encode().ljust(0x0280)
    content = packed(header)
    assert content[:2] == b"\x80\2"
    assert opened(tmp_path, content).entries.keys() == {"a", "b"}


def test_what_is_read_can_be_written_to_without_changing_the_file(tmp_path: Path) -> None:
    content = packed(TWO)
    file = opened(tmp_path, content)
    file.read("a").fill_(1.0)
    assert file.path.read_bytes() == content
    assert file.read("a").tolist() == [0.0, 0.0]


def test_a_file_without_tensors_or_metadata_is_a_file(tmp_path: Path) -> None:
    file = opened(tmp_path, packed({}, b""))
    assert (file.entries, file.metadata, file.data_bytes, file.read_all()) == ({}, {}, 0, {})


def test_opening_a_large_file_reads_its_header_alone(tmp_path: Path) -> None:
    size = 2**33
    header = packed(one("F32", [2**31], [0, size]), b"")
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)  # a hole, where the file system has holes
    tracemalloc.start()
    try:
        assert open_safely(tmp_path / "large.safetensors").entries["a"].shape == (2**31,)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


# --- What is refused. ---

HEADERS: dict[str, tuple[Any, str]] = {
    # name → (header, what the message says). Where safetensors' own reader takes it, see LOOSER.
    "an entry twice": (b'{"a":{"dtype":"I8","shape":[9],"data_offsets":[0,9]},"a":{}}', "'a' is in the header twice"),
    "a field twice": (
        b'{"a":{"dtype":"I8","dtype":"I8","shape":[9],"data_offsets":[0,9]}}',
        "'dtype' is in the header twice",
    ),
    "a metadata entry twice": (b'{"__metadata__":{"x":"1","x":"2"}}', "'x' is in the header twice"),
    "an unknown dtype": (with_entry(dtype="F31"), "`a` has dtype 'F31'"),
    "a dtype that is no string": (with_entry(dtype=[1]), "`a` has dtype a list"),
    "no dtype": ({"a": {"shape": [9], "data_offsets": [0, 9]}}, "`a` has dtype missing"),
    "no shape": ({"a": {"dtype": "I8", "data_offsets": [0, 9]}}, "`a` has a bad `shape`"),
    "no offsets": ({"a": {"dtype": "I8", "shape": [9]}}, "`a` has a bad `data_offsets`"),
    "a negative side": (with_entry(shape=[-1, -2]), "`a` has a bad `shape`"),
    "a fractional side": (with_entry(shape=[2.0]), "`a` has a bad `shape`"),
    "a side that is true": (with_entry(shape=[2, True]), "`a` has a bad `shape`"),
    "an empty tensor": (with_entry(shape=[0, 3], data_offsets=[0, 0]), r"`a` has shape \[0, 3\], which holds nothing"),
    "nine dimensions": (with_entry(shape=[2] + [1] * 8), "`a` has 9 dimensions"),
    "a size that differs from the span": (with_entry(shape=[3]), r"`a` of shape \[3\] in F32 takes 12 bytes.* span 8"),
    "more elements than any file holds": (with_entry(shape=[10**999, 10**999]), "takes more than 10\\^20 bytes"),
    "one offset": (with_entry(data_offsets=[8]), r"`a` has data_offsets \[8\]"),
    "offsets backwards": (with_entry(data_offsets=[8, 0]), r"`a` has data_offsets \[8, 0\]"),
    "an overlap": (TWO | {"b": {"dtype": "I8", "shape": [2], "data_offsets": [7, 9]}}, "`b` overlaps `a`"),
    "two in one place": (dict.fromkeys("ab", one("I8", [9], [0, 9])["a"]), "`b` overlaps `a`"),
    "a hole": (TWO | {"a": one("I8", [7], [0, 7])["a"]}, "bytes 7 to 8 of the data are of no tensor"),
    "a hole at the start": (one("I8", [8], [1, 9]), "bytes 0 to 1 of the data are of no tensor"),
    "bytes after the last tensor": (one("I8", [4], [0, 4]), "5 bytes at its end are of no tensor"),
    "an end outside the file": (one("I8", [10], [0, 10]), "`a` ends at byte 10 of the data, which has 9"),
    "an entry that is a list": ({"a": [1, 2]}, "`a` is a list, expected dtype, shape and data_offsets"),
    "metadata that is a list": (TWO | {"__metadata__": ["x"]}, "`__metadata__` is a list"),
    "metadata that is null": (TWO | {"__metadata__": None}, "`__metadata__` is missing or null"),
    "a number in the metadata": (TWO | {"__metadata__": {"ss_steps": 3}}, "'ss_steps' is a number, expected a string"),
    "an object in the metadata": (TWO | {"__metadata__": {"x": {}}}, "'x' is an object, expected a string"),
    "half a character in the metadata": (b'{"__metadata__":{"x":"\\ud800"}}', "'x' is not Unicode"),
    "a key of control characters": ({"a\x1b[2J": TWO["a"]}, r"a tensor is named 'a\\x1b\[2J'"),
    "an endless key": ({"a" * 501: TWO["a"]}, "and so on"),
    "a nameless tensor": ({"": TWO["a"]}, "a tensor is named ''"),
    "no JSON": (b'{"a":', "not JSON at character 5"),
    "more than one object": (b"{}{}", "not JSON at character 2"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, "its header is not JSON"),
    "endless digits": (b'{"a":' + b"9" * 10_000 + b"}", "its header is not JSON"),
    "Latin-1": (b'{"caf\xe9":1}', "not UTF-8"),
    "a million small things": (b'{"a":[' + b"[]," * 10**6 + b"1]}", "lists more than a LoRA can have"),
}
LOOSER = {
    "an empty tensor",
    "nine dimensions",
    "metadata that is null",
    "a key of control characters",
    "an endless key",
    "a nameless tensor",
}
"""What the format allows, or does not speak of, and no LoRA has."""


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_header_is_refused_by_name(case: str, tmp_path: Path) -> None:
    header, words = HEADERS[case]
    with pytest.raises(AdapterError, match=words) as caught:
        opened(tmp_path, packed(header))
    assert f"`{tmp_path / 'cat.safetensors'}`" in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500
    assert caught.value.hint


@pytest.mark.parametrize("case", sorted(HEADERS.keys() - LOOSER))
def test_what_is_refused_is_refused_by_others_too(case: str, tmp_path: Path) -> None:
    """Nothing that a user loads elsewhere is turned away: safetensors' own reader refuses the same headers."""
    (tmp_path / "cat.safetensors").write_bytes(packed(HEADERS[case][0]))
    with pytest.raises(Exception, match=r".") as caught:
        load_file(tmp_path / "cat.safetensors")
    assert "SafetensorError" in type(caught.value).__name__


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", b"x")
    return out.getvalue()


FILES: dict[str, tuple[str, bytes, str, str]] = {
    # name → (file name, content, what the message says, what the hint says)
    "a new pickle": ("cat.pt", archive(), "is a ZIP, as torch.save writes", "can run code"),
    "an old pickle": ("cat.safetensors", pickle.dumps({"a": 1}), "is a pickled file", "can run code"),
    "a pickle by its name": ("cat.ckpt", b"\0" * 99, "is a pickled file", "can run code"),
    "GGUF": ("cat.safetensors", b"GGUF" + bytes(99), "GGUF file of quantised weights", "safetensors"),
    "an LFS pointer": (
        "cat.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "pointer of Git LFS",
        "git lfs pull",
    ),
    "a web page": ("cat.safetensors", b"\n<!DOCTYPE html><html>", "is a web page", "login"),
    "nothing": ("cat.safetensors", b"", "is empty", "download"),
    "four bytes": ("cat.safetensors", b"\1\0\0\0", "is not a .safetensors file", "download"),
    "text": ("cat.safetensors", b"error: not found", "is not a .safetensors file", "download"),
    "a header that is a list": ("cat.safetensors", packed(b"[]"), "is not a .safetensors file", "download"),
    "a file shorter than its header": (
        "cat.safetensors",
        packed(TWO, length=500),
        "too few for its header of 500",
        "cut short",
    ),
    "a file cut inside its data": (
        "cat.safetensors",
        packed(TWO)[:-3],
        "`a` ends at byte 8 of the data, which has 6",
        "cut short",
    ),
    "a header beyond the limit": (
        "cat.safetensors",
        packed(TWO, length=LARGEST_HEADER + 1),
        "claims a header of 33,554,433 bytes",
        "download",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_other_files_are_named_for_what_they_are(case: str, tmp_path: Path) -> None:
    name, content, words, hint = FILES[case]
    with pytest.raises(AdapterError, match=words) as caught:
        opened(tmp_path, content, name)
    assert hint in str(caught.value.hint)


def test_places_without_a_file_are_refused(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "none.safetensors", "does not exist"),
        (tmp_path, "is a folder, not a LoRA file"),
        (tmp_path / "nul\0byte", "cannot be read"),
        (tmp_path / ("a" * 999), "cannot be read"),
    ):
        with pytest.raises(AdapterError, match=words) as caught:
            open_safely(path)
        assert caught.value.hint


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused: list[str] = []

    def open_it() -> None:
        try:
            open_safely(tmp_path / "pipe")
        except AdapterError as error:
            refused.append(error.message)

    thread = threading.Thread(target=open_it, daemon=True)
    thread.start()
    thread.join(20)
    assert [message.endswith("is no ordinary file") for message in refused] == [True]


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cat.safetensors").write_bytes(packed(TWO))

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(AdapterError, match="cannot be read: Permission denied"):
        open_safely(tmp_path / "cat.safetensors")


@pytest.mark.parametrize("change", ["replaced", "cut", "removed"])
def test_a_file_that_changes_after_opening_is_not_read_as_if_it_had_not(change: str, tmp_path: Path) -> None:
    file = opened(tmp_path, packed(TWO))
    if change == "replaced":
        (tmp_path / "new").write_bytes(packed(TWO))
        (tmp_path / "new").replace(file.path)
    elif change == "cut":
        os.truncate(file.path, file.data_start + 3)
    else:
        file.path.unlink()
    for read in (lambda: file.read("a"), file.read_all):
        with pytest.raises(AdapterError, match=r"cat\.safetensors.*(changed|cannot be read)"):
            read()


def test_a_file_cut_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = opened(tmp_path, packed(TWO))
    os.truncate(file.path, file.data_start + 3)
    monkeypatch.setattr(safe_file, "_stamp", lambda about: file.stamp)
    with pytest.raises(AdapterError, match="ends inside `a`"):
        file.read("a")


def test_a_tensor_that_memory_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = opened(tmp_path, packed(TWO))

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate …")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(AdapterError, match=r"cat\.safetensors.*allocate"):
        file.read("a")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":"' + b"x" * (LARGEST_HEADER - 10) + b'"}',
        b'{"__metadata__":{"x":"' + "猫".encode() * (LARGEST_HEADER // 3 - 20) + b'"}}',
        b'{"__metadata__":{"x":"' + b"x" * (LARGEST_HEADER - 40) + "🐈".encode() + b'"}}',
        b'{"a":[' + b"[]," * (LARGEST_TABLE // 3 - 10) + b"1]}",
        b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(LARGEST_TABLE // 2 - 20)) + b"}}",
        b'{"a":' + b'"\\""' * 10**6,
        b'{"a":"' + b'\\"' * 10**7,
        b"{" + b" " * (LARGEST_HEADER - 2) + b"}",
    ],
    ids=[
        "a long string",
        "a long text",
        "one wide character",
        "lists",
        "metadata",
        "quotes",
        "an open string",
        "blanks",
    ],
)
def test_the_worst_headers_take_bounded_memory(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "cat.safetensors").write_bytes(packed(raw, b""))
    tracemalloc.start()
    try:
        open_safely(tmp_path / "cat.safetensors")
    except AdapterError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 400 * 2**20, f"{peak / 2**20:.0f} MiB"
