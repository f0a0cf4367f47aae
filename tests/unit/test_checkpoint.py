"""Checkpoints: whole or not used, and an earlier one is there as long as it is needed."""

import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flux_ft.errors import StorageError
from flux_ft.train import checkpoint
from flux_ft.train.checkpoint import MANIFEST, About, Saved, State, find_fault, latest

FILES = ("weights.safetensors", "optimizer.pt", MANIFEST)


def about(step: int) -> About:
    return About(step, {"seed": 3, "lora.targets": ["a", "b"], "x": None}, {"CPU threads": 4}, ["after step 1: `x` …"])


def save(folder: Path, state: tuple[About, State], keep: int) -> Path:
    return checkpoint.save(folder, *state, keep)


def made(step: int, seed: int = 0) -> tuple[About, State]:
    rng = torch.Generator().manual_seed(seed + step)
    weight = torch.nn.Parameter(torch.randn(3, 5, generator=rng))
    optimizer = torch.optim.AdamW([weight], lr=1e-3 * (step + 1), betas=(0.9, 0.95))
    for _ in range(2):
        weight.grad = torch.randn(3, 5, generator=rng)
        optimizer.step()
    down = torch.randn(4, 6, generator=rng)
    weights = {
        "transformer_blocks.0.attn.to_q.lora_A.trained.weight": down,
        "transformer_blocks.0.attn.to_q.lora_B.trained.weight": torch.randn(4, 8, generator=rng).T.contiguous(),
        "transformer_blocks.0.attn.norm_q.weight": torch.randn(5, generator=rng).bfloat16(),
        "proj_out.bias": torch.randn(2, 3, generator=rng)[1],  # a view, as training may hand it over
    }
    state = {
        "updates": {
            "optimizers": {"a": optimizer.state_dict()},
            "extra": {"a": torch.randn(7, generator=rng).bfloat16(), "b": torch.arange(256, dtype=torch.uint8)},
        },
        "average": {"a": torch.randn(3, 2, generator=rng)},
    }
    return about(step), State(weights, state)


def assert_same(found: Saved, expected: tuple[About, State]) -> None:
    assert found.about == expected[0]
    assert_same_tree(load_file(found.path / "weights.safetensors"), expected[1].weights)
    assert_same_tree(torch.load(found.path / "optimizer.pt", weights_only=True), expected[1].optimizer)


def assert_same_tree(one: object, other: object) -> None:
    """Dictionaries, lists, tensors of one dtype and numbers, all the way down."""
    assert type(one) is type(other)
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_tree(one[key], other[key])
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same_tree(first, second)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def newest(folder: Path) -> Saved:
    found, _ = latest(folder)
    assert found is not None
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_loaded_is_saved(tmp_path: Path) -> None:
    path = save(tmp_path, made(7), keep=2)
    assert path == tmp_path / "step-000007"
    assert names(path) == sorted(FILES)
    found, passed_over = latest(tmp_path)
    assert found is not None
    assert passed_over == []
    assert_same(found, made(7))


def test_a_checkpoint_of_an_older_kind_is_passed_over_with_a_sentence(tmp_path: Path) -> None:
    """One that holds a LoRA alone, as they were before whole models could be trained."""
    path = save(tmp_path, made(7), keep=2)
    (path / "weights.safetensors").rename(path / "lora.safetensors")
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["lora.safetensors"] = manifest["files"].pop("weights.safetensors")
    (path / MANIFEST).write_text(json.dumps(manifest))
    found, passed_over = latest(tmp_path)
    assert found is None
    assert len(passed_over) == 1
    assert "step-000007" in passed_over[0]


def test_nothing_there(tmp_path: Path) -> None:
    assert latest(tmp_path) == (None, [])
    assert latest(tmp_path / "absent") == (None, [])


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 10, 100, 1000):
        save(tmp_path, made(step), keep=2)
    assert names(tmp_path) == ["step-000100", "step-001000"]
    assert newest(tmp_path).about.step == 1000


@pytest.mark.parametrize("keep", [1, 3])
def test_keep(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save(tmp_path, made(step), keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in range(6 - keep, 6)]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, made(4), keep=2)
    save(tmp_path, made(4, seed=50), keep=2)
    assert names(tmp_path) == ["step-000004"]
    assert_same(newest(tmp_path), made(4, seed=50))


# --- Torn. ---


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))  # what some file systems leave after a power cut


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n{")


DAMAGE = (truncate, empty, zeros, lengthen, Path.unlink)


@pytest.mark.parametrize("damage", [*DAMAGE, flip], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES[:2])
def test_a_torn_file_is_passed_over_with_a_sentence(tmp_path: Path, name: str, damage) -> None:
    for step in (5, 10):
        save(tmp_path, made(step), keep=2)
    damage(tmp_path / "step-000010" / name)
    found, passed_over = latest(tmp_path)
    assert found is not None
    assert_same(found, made(5))
    assert len(passed_over) == 1
    assert "step-000010" in passed_over[0]
    assert name in passed_over[0]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_torn_manifest_is_passed_over_with_a_sentence(tmp_path: Path, damage) -> None:
    for step in (5, 10):
        save(tmp_path, made(step), keep=2)
    damage(tmp_path / "step-000010" / MANIFEST)
    found, passed_over = latest(tmp_path)
    assert found is not None
    assert found.about.step == 5
    assert len(passed_over) == 1
    assert MANIFEST in passed_over[0]


@pytest.mark.parametrize(
    "content",
    [
        "{}", "[]", "null", "3", '"files"', '{"files": []}', '{"files": {}}', '{"files": {"x": {"size": 1}}}',
        '{"step": 10, "fingerprint": {}, "files": {}}', '{"step": 10, "fingerprint": {}, "files": {"optimizer.pt": 3}}',
    ],
)  # fmt: skip
def test_a_manifest_that_says_something_else_is_passed_over(tmp_path: Path, content: str) -> None:
    for step in (5, 10):
        save(tmp_path, made(step), keep=2)
    (tmp_path / "step-000010" / MANIFEST).write_text(content)
    assert newest(tmp_path).about.step == 5


@pytest.mark.parametrize("key", ["step", "fingerprint", "files"])
def test_a_manifest_that_lacks_a_key_is_passed_over(tmp_path: Path, key: str) -> None:
    for step in (5, 10):
        save(tmp_path, made(step), keep=2)
    path = tmp_path / "step-000010" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    assert newest(tmp_path).about.step == 5


def test_a_renamed_checkpoint_is_not_another_step(tmp_path: Path) -> None:
    save(tmp_path, made(5), keep=2)
    shutil.copytree(tmp_path / "step-000005", tmp_path / "step-000010")
    assert newest(tmp_path).about.step == 5
    assert find_fault(tmp_path / "step-000010") is not None


def test_an_unfinished_one_is_not_looked_at(tmp_path: Path) -> None:
    save(tmp_path, made(5), keep=2)
    shutil.copytree(tmp_path / "step-000005", tmp_path / "step-000010.partial")
    found, passed_over = latest(tmp_path)
    assert found is not None
    assert found.about.step == 5
    assert passed_over == []
    save(tmp_path, made(10), keep=2)
    assert names(tmp_path) == ["step-000005", "step-000010"]


def test_all_torn(tmp_path: Path) -> None:
    for step in (5, 10):
        (save(tmp_path, made(step), keep=2) / "optimizer.pt").unlink()
    found, passed_over = latest(tmp_path)
    assert found is None
    assert [sentence.split()[0] for sentence in passed_over] == ["step-000010", "step-000005"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_torn_one_never_pushes_out_the_one_just_saved(tmp_path: Path, keep: int) -> None:
    """After a resume from step 2, torn checkpoints of steps 8 and 9 still lie there."""
    for step in (2, 8, 9):
        save(tmp_path, made(step), keep=3)
    for step in (8, 9):
        empty(tmp_path / f"step-{step:06d}" / "weights.safetensors")
    assert newest(tmp_path).about.step == 2
    save(tmp_path, made(4), keep)
    assert newest(tmp_path).about.step == 4
    save(tmp_path, made(6), keep)
    assert newest(tmp_path).about.step == 6
    whole = [path for path in tmp_path.iterdir() if find_fault(path) is None]
    assert len(whole) == keep


# --- A full disk. ---


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("save_file", SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        ("sync", OSError(errno.ENOSPC, "No space left on device")),
    ],
    ids=["os", "safetensors", "torch", "fsync"],
)
def test_a_full_disk_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    save(tmp_path, made(5), keep=1)

    def full(*_: object, **__: object) -> None:
        raise error

    if where == "torch.save":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(StorageError) as caught:
        save(tmp_path, made(10), keep=1)
    assert "step-000010" in caught.value.message
    assert "--resume" in (caught.value.hint or "")
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000005"]
    assert_same(newest(tmp_path), made(5))
    save(tmp_path, made(10), keep=1)
    assert newest(tmp_path).about.step == 10


def test_a_file_that_may_not_grow_is_a_storage_error(tmp_path: Path) -> None:
    """The real thing, as the operating system says it: files may hold 500 bytes here."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    save(tmp_path, made(5), keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        with pytest.raises(StorageError):
            save(tmp_path, made(10), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_same(newest(tmp_path), made(5))


def test_torn_ones_do_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    """Gone on from step 10 past a torn step 13: after the next save two whole ones are there."""
    for step in (10, 13):
        save(tmp_path, made(step), keep=2)
    torn = tmp_path / "step-000013"
    empty(torn / "optimizer.pt")
    checkpoint.save(tmp_path, *made(15), 2, [torn])
    assert names(tmp_path) == ["step-000010", "step-000015"]


# --- Sealed. ---


def test_what_the_manifest_tells_is_sealed(tmp_path: Path) -> None:
    """A setting that is changed by hand, or by a bad bit, must not pass for the one that the run was made with."""
    for step in (5, 10):
        save(tmp_path, made(step), keep=2)
    path = tmp_path / "step-000010" / MANIFEST
    path.write_bytes(path.read_bytes().replace(b'"seed": 3', b'"seed": 4'))
    assert newest(tmp_path).about.step == 5


def test_what_a_kill_left_half_written_goes_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "step-000002.partial").mkdir()
    (tmp_path / "step-000002.partial" / "weights.safetensors").write_bytes(b"half")
    save(tmp_path, made(5), keep=2)
    assert names(tmp_path) == ["step-000005"]


def test_too_little_space_is_seen_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, made(5), keep=2)
    usage = shutil.disk_usage(tmp_path)
    need = made(10)[1].nbytes + checkpoint.SPARE_BYTES
    for free in (need - 1, need):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if free == need:
            save(tmp_path, made(10), keep=2)
            continue
        monkeypatch.setattr(checkpoint, "save_file", lambda *_: pytest.fail("written all the same"))
        with pytest.raises(StorageError, match="MB are free"):
            save(tmp_path, made(10), keep=2)
        assert names(tmp_path) == ["step-000005"]
        monkeypatch.undo()


def test_size_of_a_state() -> None:
    inner = [torch.zeros(5, dtype=torch.bfloat16), {"y": torch.zeros(7)}]
    state = State({"a": torch.zeros(3, 2)}, {"x": inner, "n": 3})
    assert state.nbytes == 24 + 10 + 28
