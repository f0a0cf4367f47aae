"""Full fine-tunes over several processes (FSDP2, gloo): what one process does, resumed by any number, put together.

Two starts of processes, each asked much, since a start takes longer than most of the questions; see `_sharded`.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import _sharded
import pytest
import torch
from _runs import assert_same_bits, gap
from _sharded import CLIPPED, IN_PART, KAHAN, begin, facts, parts
from safetensors.torch import save_file

from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError
from flux_ft.train.resume import snapshot
from flux_ft.train.sharded import shards_wanted

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo between local processes is tested on Linux")
ROOT = Path(__file__).resolve().parents[2]
CHILD_SECONDS = 600
WHOLE = {"saved-1": CLIPPED, "saved-1-kahan": KAHAN}
"""Checkpoints of one process, by folder, each with the settings of its run."""
STEPS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A folder with the settings of all runs here, and with the checkpoints of one process."""
    folder = tmp_path_factory.mktemp("sharded")
    values = {
        "model": "flux-tiny", "data": {"path": str(pictures)}, "output": str(folder / "run"), "trigger_word": "",
        "finetune_comment": "sharded", "finetune_type": "full", "lora_rank": 4, "iterations": 3, "seed": 3,
        "learning_rate": 1e-4, "optim": {}, "memory": {"fused_backward": False}, "preview": {"every": None},
        "checkpoint": {"every": None}, "export": {"dtype": "fp32"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    for name, settings in WHOLE.items():
        taken = snapshot(begin(folder, **settings).train().state)
        (folder / name).mkdir()
        save_file(taken.weights, folder / name / "weights.safetensors")
        torch.save(taken.optimizer, folder / name / "optimizer.pt")
    return folder


def start(job: str, processes: int, folder: Path) -> list[dict[str, Any]]:
    """What each of so many processes has found."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port), _sharded.__file__, job, str(folder)]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{job}-{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def two(place: Path) -> list[dict[str, Any]]:
    return start("two", 2, place)


@pytest.fixture(scope="module")
def four(place: Path, two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """They read what the two have saved."""
    return start("four", 4, place)


def assert_as_alone(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert found["norms"] == pytest.approx(alone["norms"], rel=1e-6)
    assert gap(alone["weights"], found["weights"]) < 1e-6
    assert gap(alone["average"], found["average"]) < 1e-6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_do_what_one_does(place: Path, two: list[dict[str, Any]], accumulate: int) -> None:
    settings = {**CLIPPED["optim"], "accumulate": accumulate}
    alone = facts(begin(place, iterations=STEPS, optim=settings).train())
    clipped = sum(norm > settings["max_grad_norm"] for norm in alone["norms"])
    assert len(alone["losses"]) == STEPS
    assert clipped > STEPS / 2
    for found in two:
        assert_as_alone(found[f"accumulate {accumulate}"], alone)


def test_each_process_holds_half_of_every_weight(two: list[dict[str, Any]]) -> None:
    assert {share for found in two for share in found["rows"].values()} == {0.5}


def test_each_process_loads_its_text_encoders(two: list[dict[str, Any]]) -> None:
    """accelerate's way to load a model once would have transformers leave them empty in all processes but one."""
    assert [found["text encoders"] for found in two] == [{"cpu"}] * 2


def test_recompute_changes_no_bit(two: list[dict[str, Any]]) -> None:
    for found in two:
        for policy in ("full", "selective"):
            assert_same_bits(found["recompute none"]["weights"], found[f"recompute {policy}"]["weights"])
            assert found["recompute none"]["losses"] == found[f"recompute {policy}"]["losses"]


@pytest.mark.parametrize("name", IN_PART)
def test_two_processes_do_what_one_does_in_part_and_in_pairs(place: Path, two: list[dict[str, Any]], name: str) -> None:
    """With frozen weights among the trained ones; and with two forward passes before each backward."""
    alone = facts(begin(place, **_sharded.SHORT, **CLIPPED, **IN_PART[name]).train())
    assert_as_alone(two[0][name], alone)
    assert (len(alone["weights"]) < len(two[0]["recompute none"]["weights"])) == (name == "attention alone")


def test_bf16_weights_move_and_repeat(place: Path, two: list[dict[str, Any]]) -> None:
    """By chance at every process's rows, keyed by the rows' place, so again the same."""
    base = _sharded.weights(begin(place, **_sharded.BF16_RUN))
    for found in two:
        assert_same_bits(found["stochastic"]["weights"], found["again"]["weights"])
        matrices = {name: one for name, one in found["stochastic"]["weights"].items() if one.ndim == 2}
        assert min(float((one != base[name]).float().mean()) for name, one in matrices.items()) > 0.1


def test_bf16_predicts_to_the_bit_what_an_uncut_model_predicts(two: list[dict[str, Any]]) -> None:
    """Times, positions and rotations stay float32 on their way into the blocks."""
    assert all(found["bf16 alike"] for found in two)


# --- Checkpoints. ---


def test_a_copy_is_written_while_training_goes_on(two: list[dict[str, Any]]) -> None:
    assert all(found["copy is of then"] for found in two)


def test_the_same_processes_go_on_to_the_bit(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert len(found["read"]) == len(found["gone on"]) > 500
        assert all(found["read"].values())
        assert all(found["gone on"].values())


def test_one_process_reads_what_two_have_saved(place: Path, two: list[dict[str, Any]]) -> None:
    assert_same_bits(torch.load(place / "saved-2.pt"), parts(begin(place, resume="saved-2", **KAHAN)))


@pytest.mark.parametrize("nodes", [1, 2])
def test_four_processes_read_what_two_have_saved(place: Path, four: list[dict[str, Any]], nodes: int) -> None:
    for found in four:
        assert_same_bits(torch.load(place / "saved-2.pt"), found[f"{nodes} nodes read"])


@pytest.mark.parametrize("nodes", [1, 2])
def test_one_process_reads_what_four_have_saved(place: Path, four: list[dict[str, Any]], nodes: int) -> None:
    run = begin(place, resume=f"saved-4-{nodes}", **CLIPPED)
    assert_same_bits(torch.load(place / f"saved-4-{nodes}.pt"), _sharded.weights(run))


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_read_what_one_has_saved(place: Path, two: list[dict[str, Any]], name: str) -> None:
    again = begin(place, **WHOLE[name]).train()
    for found in two:
        assert_same_bits(parts(again), found[name])


def test_a_write_that_fails_is_told_in_every_process(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "StorageError" in found["no space"]
        assert "could not write its shard" in found["no space"]


def test_a_save_that_fails_in_one_process_is_tried_again_by_all(two: list[dict[str, Any]]) -> None:
    assert [found["full disk"] for found in two] == [(True, 3, ["step-000003"])] * 2


def test_another_optimizer_is_refused(place: Path, two: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="made by adamw, this run's optimizer is adafactor"):
        begin(place, resume="saved-2", **KAHAN | {"optim": {**KAHAN["optim"], "name": "adafactor"}})
    assert all("whole matrices" in found["another optimizer"] for found in two)


def test_a_table_of_contents_that_would_run_code_is_refused(place: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ConfigError, match="not what a checkpoint writes"):
        begin(place, resume=str(tmp_path))
    assert pickle.loads(pickle.dumps(Trap())) is None
    assert (tmp_path / "sprung").exists()  # so the trap is one


def test_8_bit_state_is_read_by_as_many_processes_alone(two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    pytest.importorskip("bitsandbytes")
    for found in two:
        assert all(found["8-bit read"].values())
        assert any("#" in key for key in found["8-bit read"])
    for found in four:
        assert "cut for 2 processes to a node, and this run has 4" in found["8-bit"]


# --- The end of a run. ---


def test_the_main_process_alone_puts_the_model_together(two: list[dict[str, Any]]) -> None:
    main, other = two
    assert (main["gathered by"], other["gathered by"]) == (True, False)
    assert [found["left"] for found in two] == [0, 0]
    assert torch.equal(main["before"], main["after"])
    assert len(main["precise"]) == len(main["average"]) > 100
    assert all(main["precise"].values())
    assert all(main["average"].values())
    assert main["extracted"] > 0


# --- Several nodes. ---


@pytest.mark.parametrize("nodes", [1, 2])
def test_four_processes_do_what_one_does(place: Path, four: list[dict[str, Any]], nodes: int) -> None:
    alone = facts(begin(place, **CLIPPED).train())
    for found in four:
        assert_as_alone(found[f"{nodes} nodes"], alone)


def test_nodes_are_replicas_of_each_other(four: list[dict[str, Any]]) -> None:
    assert [found["1 nodes, places"] for found in four] == [(0,), (1,), (2,), (3,)]
    assert [found["2 nodes, places"] for found in four] == [(0,), (1,), (0,), (1,)]
    own = [found["2 nodes, own"] for found in four]
    assert_same_bits(own[0], own[2])
    assert_same_bits(own[1], own[3])
    assert all(not torch.equal(one, own[1][name]) for name, one in own[0].items() if one.ndim == 2)


def test_a_process_without_rows_of_a_weight_takes_part(four: list[dict[str, Any]]) -> None:
    for found in four:
        assert max(found["row by row"].values()) < 1e-6


def test_rows_are_rounded_by_chances_of_their_own(four: list[dict[str, Any]]) -> None:
    rows = [found["like rows"] for found in four]
    for number, row in enumerate(rows):
        assert 0 < float((row != 1).float().mean()) < 1
        assert not any(torch.equal(row, other) for other in rows[:number])


@pytest.mark.parametrize(
    ("world", "local", "nodes", "shards"),
    [(8, 8, 1, 8), (32, 8, 4, 8), (4, 1, 4, 4), (12, 8, 2, 12), (12, 4, 2, 12), (2, 2, 1, 2), (1, 1, 1, 1)],
    ids=["a node", "four nodes", "a GPU a node", "uneven, the larger", "uneven, the smaller", "two", "one"],
)
def test_weights_are_cut_within_nodes_that_are_alike(
    place: Path, monkeypatch: pytest.MonkeyPatch, world: int, local: int, nodes: int, shards: int
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    config = RunConfig.model_validate_json((place / "config.json").read_text())
    assert shards_wanted(config, world) == shards
    lora = config.model_copy(update={"finetune_type": "lora"})
    assert shards_wanted(lora, world) == 1
