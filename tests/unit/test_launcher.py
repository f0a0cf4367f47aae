"""The launcher's words: which machines, what accelerate is told, and the first cause out of many ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils.environment import str_to_bool

from flux_ft import cli
from flux_ft.errors import ConfigError, FluxFTError, StoppedByUser
from flux_ft.train import launch, run
from flux_ft.train.launch import (
    Failure,
    Machines,
    accelerate_config,
    cpu_is_forced,
    end_process,
    first_cause,
    is_lost_link,
    is_wanted,
)
from flux_ft.train.stops import LAUNCH_FOLDER

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
FOUR = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


class TestMachines:
    def test_this_one_alone(self) -> None:
        assert Machines.of_environment({}) == Machines(1, 0, "127.0.0.1", 0)
        assert Machines.of_environment({"NNODES": "1"}) == Machines(1, 0, "127.0.0.1", 0)

    def test_several(self) -> None:
        assert Machines.of_environment(FOUR) == Machines(4, 3, "10.0.0.1", 29500)

    @pytest.mark.parametrize(
        "wrong", [{"NODE_RANK": "4"}, {"NODE_RANK": "-1"}, {"NNODES": "0"}, {"NNODES": "x"}, {"MASTER_PORT": ""}]
    )
    def test_what_does_not_go_together_is_refused(self, wrong: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="NODE_RANK"):
            Machines.of_environment(FOUR | wrong)

    def test_what_is_missing_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="MASTER_ADDR"):
            Machines.of_environment({"NNODES": "2", "NODE_RANK": "0", "MASTER_PORT": "1"})


@pytest.mark.parametrize(
    ("gpus", "environment", "wanted"),
    [
        (None, {}, False), (1, {}, False), (4, {}, True), (1, FOUR, True), (None, FOUR, False),
        (4, {"RANK": "0", "LOCAL_WORLD_SIZE": "4"}, False), (4, {"RANK": "0", LAUNCH_FOLDER: "there"}, False),
        (None, {"RANK": "0"}, False),
    ],
)  # fmt: skip
def test_is_wanted_once(gpus: int | None, environment: dict[str, str], wanted: bool) -> None:
    assert is_wanted(gpus, environment) == wanted


@pytest.mark.parametrize("others", [{}, {"LOCAL_WORLD_SIZE": "4"}])
def test_gpus_that_another_launcher_did_not_start(others: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="`--gpus 2`: RANK is set"):
        is_wanted(2, {"RANK": "0"} | others)


@pytest.mark.parametrize(
    ("words", "ending"),
    [((), "the same command again with --resume"), (("--gpus", "2"), " run.yaml --gpus 2 --resume")],
)
def test_the_command_that_goes_on_under_another_launcher(
    words: tuple[str, ...], ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_config: object, command: str, **_options: object) -> None:
        raise StoppedByUser("stopped", hint=command)

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run, "train", stop)
    asked = SimpleNamespace(model="flux-tiny", model_parts=None)
    monkeypatch.setattr(cli, "_load", lambda *_: SimpleNamespace(config=asked))
    with pytest.raises(StoppedByUser) as stopped:
        cli.app(["train", "run.yaml", *words], standalone_mode=False)
    assert str(stopped.value.hint).endswith(ending)


@pytest.mark.parametrize("word", ["1", "TRUE", "yes", "on", "t", "y", "0", "false", "no", "off", "f", "n", ""])
def test_the_cpu_is_forced_in_accelerates_words(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", word)
    assert cpu_is_forced() == bool(word and str_to_bool(word))


def test_several_gpus_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        with pytest.raises(ConfigError, match="need Linux, or WSL"):
            launch.launch(2, ["train", "run.yaml"])


def test_processes_share_the_cores_that_the_job_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "usable_cpus", lambda: 6)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", told.append)
    launch._run_accelerate(tmp_path, 2, Machines(1, 0, "127.0.0.1", 0), ["train", "run.yaml"])
    assert told[0].num_cpu_threads_per_process == 3


@pytest.mark.skipif(os.name == "nt", reason="refused there before they are counted")
@pytest.mark.parametrize(("there", "words"), [(0, "no GPUs"), (1, "1 GPU that"), (3, "3 GPUs that")])
def test_more_gpus_than_there_are(there: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("NNODES", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: there)
    with pytest.raises(ConfigError) as refused:
        launch.launch(4, ["train", "run.yaml"])
    assert words in refused.value.message


class TestAccelerateConfigs:
    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
    def test_the_shipped_files_are_taken(self, path: Path) -> None:
        """An unknown key is refused by accelerate itself."""
        config = load_config_from_file(str(path))
        machines, gpus = (int(number) for number in path.stem.split("x"))
        assert isinstance(config, ClusterConfig)
        assert (config.num_machines, config.num_processes) == (machines, machines * gpus)
        assert config.distributed_type == "MULTI_GPU"
        assert config.mixed_precision is None  # the run file's matter

    def test_there_are_some(self) -> None:
        assert [path.name for path in sorted(CONFIGS.glob("*"))] == ["1x8.yaml", "4x8.yaml"]

    def test_ours_says_the_same(self, tmp_path: Path) -> None:
        ours = tmp_path / "ours.yaml"
        ours.write_text(yaml.safe_dump(accelerate_config(8, Machines(4, 3, "10.0.0.1", 29500))), encoding="utf-8")
        config, shipped = load_config_from_file(str(ours)), load_config_from_file(str(CONFIGS / "4x8.yaml"))
        names = ("num_machines", "num_processes", "distributed_type", "rdzv_backend", "same_network")
        assert [getattr(config, name) for name in names] == [getattr(shipped, name) for name in names]
        assert (config.machine_rank, config.main_process_ip) == (3, "10.0.0.1")


def failure(rank: int, at: float, message: str, code: int = 1, lost: bool = False) -> Failure:
    return Failure(rank, f"node-{rank // 8}", at, code, message, f"hint {rank}", lost)


class TestFirstCause:
    def cause(self, failures: list[Failure], exit_codes: dict[int, int], several: bool = False) -> FluxFTError:
        found = first_cause(failures, exit_codes, several)
        assert found is not None
        return found

    def test_nothing_went_wrong(self) -> None:
        assert first_cause([], {}, several=False) is None

    def test_the_first_that_failed_by_itself(self) -> None:
        failures = [failure(0, 1.0, "lost", lost=True), failure(2, 5.0, "late"), failure(1, 3.0, "early")]
        cause = self.cause(failures, {0: 1, 2: 1, 1: 1, 3: -15})
        assert (cause.message, cause.hint, cause.exit_code) == ("rank 1: early", "hint 1", 1)

    def test_several_machines_are_named(self) -> None:
        assert self.cause([failure(9, 1.0, "bad")], {9: 1}, several=True).message == "rank 9 on node-1: bad"

    def test_wrong_input_is_nobodys(self) -> None:
        cause = self.cause([failure(1, 1.0, "no such folder", 2)], {1: 2, 0: -15})
        assert (cause.message, cause.exit_code) == ("no such folder", 2)

    def test_a_killed_one_comes_before_those_that_lost_it(self) -> None:
        cause = self.cause([failure(0, 1.0, "lost", lost=True)], {2: -9, 0: 1, 1: -15, 3: -9})
        assert cause.message.startswith("the process of rank 2 was killed by signal 9, as the system does when memory")
        assert cause.exit_code == 1

    def test_one_that_said_nothing(self) -> None:
        assert "rank 1 ended with exit code 3" in self.cause([], {1: 3, 0: -15}).message

    def test_a_cause_on_another_machine(self) -> None:
        cause = self.cause([failure(0, 1.0, "closed by peer", lost=True)], {0: 1, 1: -15, 2: -9}, several=True)
        assert "on another machine" in cause.message
        assert "Rank 0: closed by peer" in cause.message

    def test_a_link_that_broke_by_itself(self) -> None:
        assert self.cause([failure(1, 1.0, "timed out", lost=True)], {1: 1}).message.endswith("processes: timed out")

    def test_a_lost_link_and_no_exit_codes(self) -> None:
        assert self.cause([failure(1, 1.0, "closed", lost=True)], {}, several=True).message.endswith("closed")

    def test_all_stopped(self) -> None:
        cause = self.cause([failure(rank, rank, "stopped after step 7", 130) for rank in range(2)], {})
        assert (cause.message, cause.hint, cause.exit_code) == ("stopped after step 7", "hint 0", 130)

    def test_a_save_that_failed_is_told_before_the_stop(self) -> None:
        assert self.cause([failure(1, 1.0, "stopped", 130), failure(0, 2.0, "disk full")], {0: 1}).exit_code == 1


class DistError(RuntimeError):
    """Named as torch names the root of its own."""


class DistNetworkError(DistError):
    pass


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc:525] Connection closed by peer [127.0.0.1]:5"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Read error"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (ConnectionResetError(104, "Connection reset by peer"), False),
        (RuntimeError("Data processing error: the store's server: connection reset by peer"), False),
        (DistNetworkError("the client has no answer"), True),
        (DistError("NCCL error: CUDA out of memory"), False),
        (RuntimeError("shapes do not fit"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("gloo"), False),
    ],
)
def test_what_only_follows_from_anothers_end(error: Exception, lost: bool) -> None:
    assert is_lost_link(error) == lost


class Left(BaseException):
    """In place of the process's end."""


class TestEndOfAProcess:
    @pytest.fixture
    def end(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
        """Ends rank 1; gives the exit code and what was told."""

        def leave(code: int) -> None:
            raise Left(code)

        monkeypatch.setattr(os, "_exit", leave)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        monkeypatch.delenv(LAUNCH_FOLDER, raising=False)

        def end(error: FluxFTError, **options: Any) -> tuple[int, list[str]]:
            said: list[str] = []
            with pytest.raises((Left, SystemExit)) as left:
                end_process(error, lambda one, who: said.append(who + one.message), **options)
            return int(left.value.args[0]), said

        return end

    def test_launched_it_leaves_word_and_says_nothing(
        self, end: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
        assert end(ConfigError("bad", hint="better")) == (2, [])
        (left,) = launch._read_failures(tmp_path)
        assert (left.rank, left.host, left.exit_code) == (1, socket.gethostname(), 2)
        assert (left.message, left.hint, left.lost_others) == ("bad", "better", False)

    def test_launched_a_stop_is_no_failure(
        self, end: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
        assert end(StoppedByUser("stopped")) == (0, [])
        assert first_cause(launch._read_failures(tmp_path), {}, several=False).exit_code == 130  # type: ignore[union-attr]

    def test_it_speaks_where_word_cannot_be_left(
        self, end: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path / "file"))
        assert end(FluxFTError("bad")) == (1, ["rank 1: bad"])

    def test_under_another_launcher(
        self, end: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert end(FluxFTError("bad")) == (1, ["rank 1: bad"])
        assert end(StoppedByUser("stopped")) == (130, [])
        assert end(FluxFTError("closed"), lost_others=True) == (1, [])
        assert capsys.readouterr().err == "rank 1: ended because another process did (closed)\n"
        monkeypatch.setenv("RANK", "0")
        assert end(StoppedByUser("stopped")) == (130, ["stopped"])
