"""flux-tiny's ZIP: unpacked once, whole, by any number of processes; mended when damaged; packed the same each time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from itertools import zip_longest
from pathlib import Path

import pytest

from flux_ft.errors import ModelError
from flux_ft.families.registry import find_variant
from flux_ft.families.tiny import weights
from flux_ft.families.tiny.weights import ARCHIVE, MTIME_S, pack_folder, tiny_folder
from flux_ft.files import CACHE_VARIABLE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the cache folder was not good enough."""
    monkeypatch.setattr(weights, "_temporary_folder", lambda: pytest.fail("fell back to a temporary folder"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def archived() -> dict[str, bytes]:
    with zipfile.ZipFile(ARCHIVE) as file:
        read = {entry.filename: (entry.comment, file.read(entry)) for entry in file.infolist()}
    return {name: interleaved(data) if comment == weights.HALVES else data for name, (comment, data) in read.items()}


def interleaved(halves: bytes) -> bytes:
    """One byte of the first half, one of the second, and so on."""
    even = -(-len(halves) // 2)
    pairs = zip_longest(halves[:even], halves[even:])
    return bytes(byte for pair in pairs for byte in pair if byte is not None)


def test_every_file_is_unpacked_as_it_was_packed_and_nothing_else_is_left(cache: Path) -> None:
    folder = tiny_folder()
    assert folder.parent == cache
    assert list(cache.iterdir()) == [folder]
    assert contents(folder) == archived()
    assert {"model_index.json", "transformer/diffusion_pytorch_model.safetensors"} <= archived().keys()
    assert find_variant("flux-tiny")[1] == str(folder)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8])
def test_weights_of_any_length_are_packed_and_unpacked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.safetensors").write_bytes(bytes(range(size)))
    (tmp_path / "a" / "model.json").write_bytes(bytes(range(size)))
    pack_folder(tmp_path / "a", tmp_path / "x.zip")
    monkeypatch.setattr(weights, "ARCHIVE", tmp_path / "x.zip")
    weights._contents.cache_clear()
    try:
        assert contents(tiny_folder()) == {"b/x.safetensors": bytes(range(size)), "model.json": bytes(range(size))}
    finally:
        weights._contents.cache_clear()


def test_the_folder_is_named_after_the_archive_so_that_new_weights_get_a_new_one(cache: Path) -> None:
    assert tiny_folder().name == f"flux-tiny-{hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()[:16]}"


def test_times_are_the_same_each_time_so_that_caches_stay_valid(cache: Path) -> None:
    assert {path.stat().st_mtime for path in tiny_folder().rglob("*") if path.is_file()} == {MTIME_S}


def test_a_second_call_touches_nothing(cache: Path) -> None:
    def stamps() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_ino, path.stat().st_ctime_ns) for path in tiny_folder().rglob("*")}

    assert stamps() == stamps()


@pytest.mark.usefixtures("no_temporary_folder")
def test_processes_that_start_together_get_one_whole_folder(cache: Path) -> None:
    code = "from flux_ft.families.tiny.weights import *; f = tiny_folder(); print(f, len([p for p in f.rglob('*.*')]))"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        for _ in range(6)
    ]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert said == {f"{tiny_folder()} {len(archived())}\n"}
    assert list(cache.iterdir()) == [tiny_folder()]
    assert contents(tiny_folder()) == archived()


@pytest.mark.usefixtures("no_temporary_folder")
def test_what_a_killed_process_left_beside_is_not_taken_for_the_weights(cache: Path) -> None:
    folder = tiny_folder()
    folder.rename(cache / f".{folder.name}.1-0.partial")
    assert contents(tiny_folder()) == archived()


@pytest.mark.usefixtures("no_temporary_folder")
@pytest.mark.parametrize("damage", ["missing file", "missing folder", "cut short", "grown", "emptied"])
def test_a_damaged_folder_is_mended(cache: Path, damage: str) -> None:
    folder = tiny_folder()
    victim = folder / "vae" / "diffusion_pytorch_model.safetensors"
    if damage == "missing folder":
        (folder / "vae").rename(cache.parent / "away")
    elif damage == "missing file":
        victim.unlink()
    elif damage == "emptied":
        for path in folder.rglob("*.*"):
            path.unlink()
    else:
        data = victim.read_bytes()
        victim.write_bytes(data[:1000] if damage == "cut short" else data + b"x")
    assert tiny_folder() == folder
    assert contents(folder) == archived()
    assert victim.stat().st_mtime == MTIME_S
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize("why", ["a file where the folder should be", "a file where the weights should be"])
def test_without_a_cache_folder_the_weights_are_in_a_temporary_one(cache: Path, why: str) -> None:
    if why.endswith("folder should be"):
        cache.write_text("")
    else:
        path = tiny_folder()
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
        path.write_text("")
    folder = tiny_folder()
    assert cache not in folder.parents
    assert contents(folder) == archived()
    assert tiny_folder() == folder


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_folder_without_permission_is_not_used(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    assert cache not in tiny_folder().parents


def test_the_temporary_folder_goes_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = "from flux_ft.families.tiny.weights import tiny_folder; print(tiny_folder())"
    environment = os.environ | {CACHE_VARIABLE: str(tmp_path / "file"), "TMPDIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, check=True)
    assert said.stdout.startswith(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_packing_depends_on_names_and_bytes_alone(cache: Path, tmp_path: Path) -> None:
    pack_folder(tiny_folder(), tmp_path / "one.zip")
    copy = tmp_path / "copy"
    for name, data in reversed(archived().items()):  # other times, and another order of making
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    pack_folder(copy, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as one, zipfile.ZipFile(ARCHIVE) as shipped:
        facts = [
            [(e.filename, e.date_time, e.CRC, e.compress_type) for e in file.infolist()] for file in (one, shipped)
        ]
    assert facts[0] == facts[1] == sorted(facts[0])


@pytest.mark.parametrize("broken", ["missing", "not a ZIP", "flipped bytes"])
def test_a_broken_installation_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, broken: str
) -> None:
    if broken != "missing":
        data = ARCHIVE.read_bytes()
        data = data[:200_000] + bytes(1000) + data[201_000:] if broken == "flipped bytes" else b"not a ZIP"
        (tmp_path / "flux-tiny.zip").write_bytes(data)
    monkeypatch.setattr(weights, "ARCHIVE", tmp_path / "flux-tiny.zip")
    weights._contents.cache_clear()
    try:
        with pytest.raises(ModelError) as caught:
            tiny_folder()
    finally:
        weights._contents.cache_clear()
    assert "flux-tiny.zip" in caught.value.message
    assert "install" in str(caught.value.hint)
