"""Several processes, on one machine or many: accelerate's launcher is called, and its end told in one message.

It and the processes that it starts speak by a folder (see `stops`), in which a process that fails leaves word of it:
the first cause is what the user has to see, not what the others then met. Loads without torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from flux_ft import log
from flux_ft.data.parallel import usable_cpus
from flux_ft.errors import ConfigError, FluxFTError, StoppedByUser, StorageError, first_line
from flux_ft.files import write_whole
from flux_ft.train.stops import (
    LAUNCH_FOLDER,
    LISTENS,
    STOP_FILE,
    STOPPING,
    StopSignal,
    is_orphaned,
    launch_folder,
    on_signals,
)

FAILED = "failed-"
GRACE_S = 1
"""What shall end at once gets so long before it is killed."""
LINKS = re.compile(r"\bgloo\b|\bpair\.cc\b|nccl|c10d|processgroup|tcpstore", re.I)
"""How torch's links between processes name themselves in their errors. Words like "reset by peer" are anybody's."""
GO_ON = "--resume goes on from the newest whole checkpoint"
KILLED = {9: "as the system does when memory runs out", 7: "as when shared memory runs out"}


@dataclass(frozen=True)
class Machines:
    """How many machines work on the run, which of them this is, and where the first one is met."""

    count: int
    rank: int
    address: str
    port: int
    """0 = any free one."""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Machines:
        """As NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say; this machine alone without NNODES.

        Raises ConfigError.
        """
        if environment.get("NNODES", "1") == "1":
            return cls(1, 0, "127.0.0.1", 0)
        try:
            count, rank, port = (int(environment[name]) for name in ("NNODES", "NODE_RANK", "MASTER_PORT"))
            if count < 1 or not 0 <= rank < count:
                raise ValueError
            return cls(count, rank, environment["MASTER_ADDR"], port)
        except (KeyError, ValueError):
            raise ConfigError(
                "NNODES is set in the environment, and NODE_RANK, MASTER_ADDR and MASTER_PORT do not go with it",
                hint="set NODE_RANK from 0 to NNODES - 1 on each machine, and the first one's address and a free port "
                "of it on all; or leave NNODES out for one machine",
            ) from None


@dataclass(frozen=True)
class Failure:
    """Why one process ended."""

    rank: int
    host: str
    time: float
    exit_code: int
    message: str
    hint: str | None
    lost_others: bool
    """Only because another process had ended."""


def is_one_of_several() -> bool:
    """Whether this process works on a run together with others, whoever started them."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_wanted(gpus: int | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `--gpus` asks for several processes that nobody has started yet.

    Raises ConfigError where another launcher is said to have started them, and not so many.
    """
    if gpus is None:
        return False
    if "RANK" not in environment:
        return gpus > 1 or environment.get("NNODES", "1") != "1"
    there = environment.get("LOCAL_WORLD_SIZE")
    if LAUNCH_FOLDER not in environment and there != str(gpus):
        started = f"that started {there} on this machine" if there else "though LOCAL_WORLD_SIZE is not"
        raise ConfigError(
            f"`--gpus {gpus}`: RANK is set in the environment, as by a launcher of processes, {started}",
            hint="leave out --gpus, or unset RANK",
        )
    return False


def cpu_is_forced() -> bool:
    """Whether ACCELERATE_USE_CPU says so, in the words that accelerate takes for yes."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "on", "t", "true", "y", "yes")


def launch(gpus: int, arguments: Sequence[str]) -> None:
    """Run `flux_ft ARGUMENTS` in `gpus` processes on this machine, and so on each of the `Machines`.

    Returns when all have done their work. Raises ConfigError when there are not so many GPUs; StoppedByUser when all
    have saved after a first signal; KeyboardInterrupt when there came a second one; and the first cause as FluxFTError
    when a process failed.
    """
    machines = Machines.of_environment()
    _require_gpus(gpus)
    with tempfile.TemporaryDirectory(prefix="flux_ft-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with _stops_passed_on(folder):
            exit_codes = _run_accelerate(folder, gpus, machines, arguments)
        cause = first_cause(_read_failures(folder), exit_codes, machines.count > 1)
    if cause is not None:
        raise cause


def first_cause(failures: Sequence[Failure], exit_codes: Mapping[int, int], several: bool) -> FluxFTError | None:
    """What ended the run, out of what its processes said and their exit codes by rank, the first to end first.

    None when nothing did. `several` machines are told apart by name.
    """
    said = sorted(failures, key=lambda one: one.time)
    faults = [one for one in said if one.exit_code != StoppedByUser.exit_code and not one.lost_others]
    lost = [one for one in said if one.lost_others]
    silent = [(rank, code) for rank, code in exit_codes.items() if rank not in {one.rank for one in said}]
    if faults:
        return _told(faults[0], several)
    if lost and several and next(iter(exit_codes), None) in {one.rank for one in lost}:
        message = f"a process on another machine ended first; its lines say why. Rank {lost[0].rank}: {lost[0].message}"
        return FluxFTError(message, hint=GO_ON)
    if silent:
        rank, code = silent[0]
        why = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code} and said nothing"
        more = f", {KILLED[-code]}" if -code in KILLED else ""
        return FluxFTError(
            f"the process of rank {rank} {why}{more}", hint=f"see its lines above, and the system's log; {GO_ON}"
        )
    if lost:
        return FluxFTError(f"rank {lost[0].rank} lost the other processes: {lost[0].message}", hint=GO_ON)
    return _told(said[0], several) if said else None


def end_process(error: FluxFTError, tell: Callable[[FluxFTError, str], None], lost_others: bool = False) -> NoReturn:
    """End one of several processes: leave word for `launch`, or tell it here where another launcher started us.

    Without waiting for what others hold up: a process that has failed must be seen to have ended.
    """
    folder, rank, code = launch_folder(), int(os.environ["RANK"]), error.exit_code
    stopped = code == StoppedByUser.exit_code
    failure = Failure(rank, socket.gethostname(), time.time(), code, error.message, error.hint, lost_others)
    if folder is not None and not is_orphaned() and _is_left(failure, folder):
        code = 0 if stopped else code  # else the first to end would have the others killed
    elif lost_others:
        print(f"rank {rank}: ended because another process did ({error.message})", file=sys.stderr)
    elif not stopped or rank == 0:
        tell(error, "" if stopped else f"rank {rank}: ")
    if stopped:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost_link(error: Exception) -> bool:
    """Whether one of several processes failed only because another one had ended: torch's errors of the link.

    They are a RuntimeError or of torch's own kinds; an OSError is of some other connection, or of a disk.
    """
    is_link = any(cls.__name__ == "DistError" for cls in type(error).__mro__) or (
        isinstance(error, RuntimeError) and LINKS.search(str(error)) is not None
    )
    return is_link and "out of memory" not in str(error).lower()


@contextmanager
def _stops_passed_on(folder: Path) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM becomes a wish that all processes see; a later one, or one before or after training,
    a KeyboardInterrupt here, at which accelerate's launcher ends the processes."""
    stop, ending = StopSignal(), False

    def heard() -> None:
        nonlocal ending
        if ending:  # the processes get GRACE_S, and no third signal may leave them behind
            return
        try:
            if not stop.hear():
                return
            if not any(folder.glob(f"{LISTENS}*")):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            ending = True
            raise
        (folder / STOP_FILE).touch()
        log.say(STOPPING)

    with on_signals(heard):
        yield


def _run_accelerate(folder: Path, gpus: int, machines: Machines, arguments: Sequence[str]) -> dict[int, int]:
    """The exit codes of the processes that failed, by rank, the first to end first; a signal is a negative one."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    config = folder / "accelerate.yaml"
    config.write_text(yaml.safe_dump(accelerate_config(gpus, machines)), encoding="utf-8")
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cpus() // gpus))
    words = ["--config_file", str(config), "--num_cpu_threads_per_process", threads, "--log_dir", str(folder)]
    parsed = launch_command_parser().parse_args([*words, "-m", "flux_ft", *arguments])
    # Signals come to us, and what accelerate ends it shall end soon. A torch too old to know these names passes signals
    # on by itself, and gives the processes half a minute to save.
    parsed.signals_to_handle, parsed.shutdown_timeout = "SIGABRT", GRACE_S
    quiet = logging.getLogger("torch.distributed.elastic")  # its tables would bury what we have to say
    quiet.propagate = False
    quiet.addHandler(logging.NullHandler())
    try:
        with patch_environment(**{LAUNCH_FOLDER: str(folder)}):
            launch_command(parsed)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:
        if not _read_failures(folder):
            raise KeyboardInterrupt from error
    except (RendezvousError, OSError, RuntimeError, ValueError) as error:
        raise FluxFTError(
            f"the processes could not be started: {first_line(error)}",
            hint="of several machines: NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT must fit on all of them, and the "
            "port must be free and reachable",
        ) from error
    return {}


def accelerate_config(gpus: int, machines: Machines) -> dict[str, object]:
    """What a file for `accelerate launch` says of such a start; all else of it is the run file's matter."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "mixed_precision": "no",
        "num_machines": machines.count,
        "machine_rank": machines.rank,
        "num_processes": gpus * machines.count,
        "main_process_ip": machines.address,
        "main_process_port": machines.port,
        "rdzv_backend": "static",
        "same_network": True,
    }


def _require_gpus(gpus: int) -> None:
    """Raise ConfigError unless this machine has so many that can work together, or the run is for its CPU."""
    if cpu_is_forced():
        return
    if os.name == "nt":
        raise ConfigError(
            f"`--gpus {gpus}`: several GPUs need Linux, or WSL: torch has no NCCL on Windows",
            hint="leave out --gpus to train on one",
        )
    import torch

    there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if gpus > there:
        raise ConfigError(
            f"`--gpus {gpus}`: this machine has {there or 'no'} GPU{'s' if there != 1 else ''} that torch can use",
            hint=f"--gpus {there}, or fewer"
            if there
            else "`flux-ft doctor` says more; without --gpus, the CPU is used",
        )


def _is_left(failure: Failure, folder: Path) -> bool:
    """Leave word of a failure, unless the disk is full."""
    try:
        write_whole(folder / f"{FAILED}{failure.rank}.json", json.dumps(asdict(failure)).encode())
    except StorageError:
        return False
    return True


def _read_failures(folder: Path) -> list[Failure]:
    return [Failure(**json.loads(path.read_bytes())) for path in sorted(folder.glob(f"{FAILED}*.json"))]


def _told(failure: Failure, several: bool) -> FluxFTError:
    """The failure as it ended its process. Wrong input is wrong for every rank, so none is named."""
    where = f"rank {failure.rank} on {failure.host}" if several else f"rank {failure.rank}"
    named = f"{where}: {failure.message}" if failure.exit_code == FluxFTError.exit_code else failure.message
    error = FluxFTError(named, hint=failure.hint)
    error.exit_code = failure.exit_code
    return error
