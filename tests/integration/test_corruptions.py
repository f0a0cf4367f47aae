"""Whatever happens to a byte of a checkpoint, it is seen, and the run goes on from the one before."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _verbs import run_here, write_run

from flux_ft.train.checkpoint import MANIFEST, find_fault, latest

CORRUPTIONS = 200
"""A kind of checkpoint; there are two."""
NEWEST, BEFORE = "step-000004", "step-000003"
SETTINGS: dict[str, dict[str, object]] = {
    "lora": {"finetune_type": "lora"},
    "full": {
        "finetune_type": "full",
        "full": {"train": [r".*\.attn\.to_[qk]\..*"]},
        "optim": {"ema_decay": 0.9, "ema_every": 2},
    },
}

Way = Callable[[random.Random, bytes, bytes], bytes]
"""What becomes of a file's bytes, given the same file of another step."""


def a_bit_flipped(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def a_byte_changed(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([(data[at] + rng.randrange(1, 256)) % 256]) + data[at + 1 :]


def cut_off(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def emptied(_: random.Random, __: bytes, ___: bytes) -> bytes:
    return b""


def bytes_appended(rng: random.Random, data: bytes, _: bytes) -> bytes:
    return data + rng.choice((b"\0", b"\n", b" ", rng.randbytes(rng.randrange(1, 5000))))


def a_block_of_zeros(rng: random.Random, data: bytes, _: bytes) -> bytes:
    first, size = rng.randrange(len(data)), rng.choice((1, 16, 512, 4096))
    end = min(len(data), first + size)
    return data[:first] + bytes(end - first) + data[end:]


def two_blocks_swapped(rng: random.Random, data: bytes, _: bytes) -> bytes:
    size = rng.choice((1, 16, 512, 4096)) if len(data) > 9000 else rng.randrange(1, 9)
    a, b = sorted((rng.randrange(len(data) // size), rng.randrange(len(data) // size)))
    blocks = [data[i * size : (i + 1) * size] for i in range(len(data) // size)]
    blocks[a], blocks[b] = blocks[b], blocks[a]
    return b"".join(blocks) + data[len(blocks) * size :]


def a_byte_lost(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + 1 :]


def a_byte_put_in(rng: random.Random, data: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(1), b" ", b"0")) + data[at:]


def of_another_step(_: random.Random, __: bytes, other: bytes) -> bytes:
    return other


WAYS: tuple[Way, ...] = (
    *(a_bit_flipped, a_byte_changed, cut_off, emptied, bytes_appended, a_block_of_zeros, two_blocks_swapped),
    *(a_byte_lost, a_byte_put_in, of_another_step),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Iterator[Callable[[str], Path]]:
    """The folder of a finished run of each kind, trained on a CPU in this process, with its run file beside it."""
    from accelerate.state import AcceleratorState

    from flux_ft.runfile import load_run
    from flux_ft.train.run import train

    made: dict[str, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")

        def run(kind: str) -> Path:
            if kind not in made:
                place = tmp_path_factory.mktemp(kind)
                shared = {"checkpoint": {"every": 1}, "export": {"formats": ["diffusers"]}, "iterations": 4}
                run_file = write_run(place / "run.yaml", scenes, **shared, **SETTINGS[kind])
                AcceleratorState._reset_state(reset_partial_state=True)
                train(load_run(run_file, [f"output={place / 'run'}"]).config)
                made[kind] = place / "run"
            return made[kind]

        yield run
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_every_corruption_is_recognised_and_the_one_before_is_taken(runs: Callable[[str], Path], kind: str) -> None:
    folder = runs(kind) / "checkpoints"
    newest, before = folder / NEWEST, folder / BEFORE
    files = sorted(path.name for path in newest.iterdir())
    assert files == sorted([MANIFEST, "optimizer.pt", "weights.safetensors"])
    assert find_fault(newest) is None
    rng, done, missed = random.Random(f"corruptions of {kind}"), Counter[tuple[str, str]](), []
    whole = {name: (newest / name).read_bytes() for name in files}
    other = {name: (before / name).read_bytes() for name in files}
    cases = [(way, name) for way in WAYS for name in files]
    for number in range(CORRUPTIONS):
        way, name = cases[number % len(cases)]
        damaged = whole[name]
        while damaged == whole[name]:  # zeros may have been zeros before
            damaged = way(rng, whole[name], other[name])
        (newest / name).write_bytes(damaged)
        fault = find_fault(newest)
        found, passed_over = latest(folder)
        (newest / name).write_bytes(whole[name])
        done[way.__name__, name] += 1
        if fault is None or name not in fault or found is None or found.path != before or len(passed_over) != 1:
            missed.append(f"{number}: {name} {way.__name__}: {fault}; {found and found.path.name}; {passed_over}")
    assert not missed, f"{len(missed)} of {CORRUPTIONS} not recognised: {missed[:5]}"
    assert len(done) == len(cases)
    found, passed_over = latest(folder)
    assert found is not None
    assert (found.path, passed_over) == (newest, [])


@pytest.mark.parametrize("name", [MANIFEST, "optimizer.pt", "weights.safetensors"])
def test_a_file_that_is_gone_is_recognised(runs: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    copy = tmp_path / NEWEST
    shutil.copytree(runs("lora") / "checkpoints" / NEWEST, copy)
    assert find_fault(copy) is None
    (copy / name).unlink()
    assert name in (find_fault(copy) or "")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("name", [MANIFEST, "weights.safetensors"])
def test_the_run_goes_on_from_the_one_before_to_the_same_bits(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    straight, copy = runs("lora"), tmp_path / "run"
    shutil.copytree(straight, copy)
    victim = copy / "checkpoints" / NEWEST / name
    data = victim.read_bytes()
    victim.write_bytes(a_bit_flipped(random.Random(3), data, b""))
    done = run_here(capsys, "train", copy / "run.yaml", f"output={copy}", "--resume")
    assert done.code == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if f"warning: {NEWEST} is not whole ({name} " in line]
    assert len(said) == 1, done.stderr
    assert "resumed from step 3" in done.stderr
    assert find_fault(copy / "checkpoints" / NEWEST) is None
    for path in (straight / "checkpoints" / NEWEST).iterdir():
        assert (copy / "checkpoints" / NEWEST / path.name).read_bytes() == path.read_bytes(), path.name
