"""Kills a training at random moments, again and again, and shows that what comes out does not depend on it.

    python3 scripts/kill_test.py [--kills 50] [--run RUN.yaml] [--output DIR] …

Each combination of settings is trained once straight. Then the same run is killed (SIGKILL; on Windows terminated),
resumed, killed again, until all its kills are spent, and brought to its end. The final checkpoint, every exported
weight, the losses of all steps and the previews must be those of the straight run, bit for bit; no output may hold a
traceback, and nothing but a whole checkpoint may be resumed from. Exit code 1 when anything differs.

`--mutant` trains with randomness that does not follow from (seed, step, slot): then differences must be found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from _environment import ROOT, STOPPED, child_environment, ensure_environment, run_child, venv_folder

OWN = ["-m", "flux_ft"]
EMA = ["optim.ema_decay=0.9", "optim.ema_every=3"]
MUTANT = """
import itertools, torch
from flux_ft import flow
drawn = itertools.count()
flow.keyed_generator = lambda seed, *key: torch.Generator().manual_seed(next(drawn))
from flux_ft.cli import main
main()
"""
MOMENTS = {"saving": 5, "step": 2, "preview": 1, "start-up": 1, "export": 1}
"""When to kill, and how often each against the others; a random delay is added, as long as what then goes on."""
CACHING_SHARE = 0.3
"""Of runs that are killed the first time while pictures and captions are being encoded."""
POLL_S = 0.002
STARTS_AT_MOST = 3
"""Of runs that ended before any kill came: such a run is too short for this."""


class StoppedError(Exception):
    """Ctrl-C: every thread ends its child and itself."""


@dataclass(frozen=True)
class Combination:
    """Settings that are tried together."""

    name: str
    run_file: Path
    words: tuple[str, ...] = ()
    """What follows the run file on the command line, but for its output."""


@dataclass
class Pace:
    """How long things take, of the straight run, in seconds."""

    start: float
    """Until the first step is done."""
    step: float
    save: float
    export: float


@dataclass
class Tally:
    """What has happened to a combination."""

    combination: str
    moments: dict[str, int] = field(default_factory=dict)
    """Kills, by the moment that was waited for."""
    amid_saves: int = 0
    """Kills that left a half-written checkpoint."""
    half_removed: int = 0
    """Older checkpoints that a kill left while they were being removed."""
    torn: int = 0
    """Checkpoint folders, newer than any whole one, that were not whole after a kill."""
    passed_over: int = 0
    """Times that a resumed run said that it does not use such a one."""
    resumed_at: list[int] = field(default_factory=list)
    runs: int = 0
    """That were killed and brought to their end."""
    identical: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.moments.values())


class Child:
    """`flux-ft train`, running, and its run folder."""

    def __init__(self, settings: Settings, one: Combination, folder: Path) -> None:
        # Before run.yaml is there nothing has begun, and --resume would say so.
        resume = ["--resume"] if (folder / "run.yaml").is_file() else []
        self.folder, self.newest_before = folder, newest_checkpoint(folder)
        self._began, self._stopping = time.time(), settings.stopping
        self._output = folder.with_suffix(".txt")
        command = [sys.executable, *settings.entry, "train", str(one.run_file), *one.words, f"output={folder}", *resume]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=settings.environ)

    @property
    def output(self) -> str:
        return self._output.read_text("utf-8", "replace")

    def watch(self, condition: Callable[[], bool]) -> int | None:
        """Wait until `condition`; the exit code when the child has ended before."""
        while (code := self._process.poll()) is None and not condition():
            if self._stopping.wait(POLL_S):
                raise StoppedError
        return code

    def kill(self) -> None:
        """At once, with all that it has started."""
        import psutil

        if self._process.poll() is None:
            for process in (*psutil.Process(self._process.pid).children(recursive=True), self._process):
                process.kill()
        self._process.wait()

    def has_reached(self, moment: str, iterations: int, own_steps: int) -> bool:
        """Whether this child, not one before it, has come to a moment; `own_steps` are done or saved by it."""
        if moment == "start-up":
            return True
        if moment == "caching":
            return any(self._is_new(path) for path in self.folder.glob("cache/*/*"))
        if moment == "preview":
            return any(self._is_new(path) for path in self.folder.glob("previews/step-*"))
        if moment == "saving":
            partial = self.folder.glob("checkpoints/step-??????.partial")
            return any(self._is_new(path) and step_of(path) >= self.newest_before + own_steps for path in partial)
        metrics = self.folder / "metrics.jsonl"
        wanted = iterations if moment == "export" else self.newest_before + own_steps
        return self._is_new(metrics) and max(losses(self.folder), default=0) >= wanted

    def _is_new(self, path: Path) -> bool:
        try:
            return path.stat().st_mtime > self._began
        except OSError:
            return False


@dataclass(frozen=True)
class Settings:
    """What all children have in common."""

    environ: dict[str, str]
    entry: Sequence[str] = tuple(OWN)
    stopping: threading.Event = field(default_factory=threading.Event)


@contextmanager
def child(settings: Settings, one: Combination, folder: Path) -> Iterator[Child]:
    """A child that does not outlive the block."""
    running = Child(settings, one, folder)
    try:
        yield running
    finally:
        running.kill()


def try_combination(
    one: Combination, settings: Settings, kills: int, seed: int, folder: Path, tick: Callable[[], None]
) -> Tally:
    """One straight run, and killed ones until `kills` are spent. `tick`: the first run is done, a kill, or all."""
    tally, rng = Tally(one.name), random.Random(f"{seed} {one.name}")
    straight = folder / "straight"
    folder.mkdir(parents=True)
    pace, iterations = run_straight(one, settings, straight, tally)
    tick()
    idle = 0
    while not tally.faults and tally.kills < kills and idle < STARTS_AT_MOST:
        tally.runs += 1
        broken, before = folder / f"killed-{tally.runs}", tally.kills
        for moment in [*draw_moments(rng, kills - tally.kills), None]:
            ended = run_until(one, settings, broken, moment, rng, pace, iterations, tally)
            if not ended:
                tick()
            if ended or tally.faults:
                break
        idle = 0 if tally.kills > before else idle + 1
        if not tally.faults:
            found = differences(straight, broken)
            tally.identical += not found
            tally.faults += [f"{broken}: {one}" for one in found]
    if idle == STARTS_AT_MOST:
        tally.faults.append("the run ends before a kill can come: give it more `iterations`")
    tick()
    return tally


def draw_moments(rng: random.Random, kills: int) -> list[str]:
    """When one run is to be killed: in caching, which comes once, at first or never, and in the export at last."""
    drawn = rng.choices(list(MOMENTS), list(MOMENTS.values()), k=kills)
    if rng.random() < CACHING_SHARE:
        drawn[:1] = ["caching"] * min(1, kills)
    return sorted(drawn, key=lambda moment: (moment != "caching", moment == "export"))


def run_straight(one: Combination, settings: Settings, folder: Path, tally: Tally) -> tuple[Pace, int]:
    """The run that all others are compared with; its pace and its steps."""
    started, rows, saves = time.monotonic(), list[float](), dict[str, list[float]]()

    def look() -> bool:
        now = time.monotonic()
        for path in folder.glob("checkpoints/step-??????.partial"):
            saves.setdefault(path.name, []).append(now)
        if len(losses(folder)) > len(rows):
            rows.append(now)
        return False

    with child(settings, one, folder) as running:
        judge(running, running.watch(look), tally)
    ended, seen = time.monotonic(), [max(times) - min(times) for times in saves.values()] or [0.0]
    if not rows:
        return Pace(0, 0, 0, 0), 0
    step = (rows[-1] - rows[0]) / max(1, len(rows) - 1)
    return Pace(rows[0] - started, step, max(seen) + POLL_S, ended - rows[-1]), max(losses(folder), default=0)


def run_until(
    one: Combination,
    settings: Settings,
    folder: Path,
    moment: str | None,
    rng: random.Random,
    pace: Pace,
    iterations: int,
    tally: Tally,
) -> bool:
    """Start or resume the run and kill it at `moment`; None lets it go on. Whether it has ended by itself."""
    span = {"start-up": pace.start, "saving": pace.save, "export": pace.export}.get(moment or "", pace.step)
    delay, own_steps = rng.uniform(0, span), rng.choice((1, 1, 2))
    with child(settings, one, folder) as running:
        code = running.watch(lambda: bool(moment) and running.has_reached(moment or "", iterations, own_steps))
        if code is None:
            due = time.monotonic() + delay
            code = running.watch(lambda: time.monotonic() >= due)
        running.kill()
    judge(running, code, tally)
    if code is None:
        tally.moments[str(moment)] = tally.moments.get(str(moment), 0) + 1
        note_kill(folder, tally)
    return code is not None


def note_kill(folder: Path, tally: Tally) -> None:
    """Look at what a kill left."""
    from flux_ft.train.checkpoint import find_fault

    tally.amid_saves += any(folder.glob("checkpoints/step-??????.partial"))
    torn = [path for path in folder.glob("checkpoints/step-??????") if find_fault(path) is not None]
    newer = sum(step_of(path) > newest_checkpoint(folder) for path in torn)
    tally.torn += newer
    tally.half_removed += len(torn) - newer


def judge(running: Child, code: int | None, tally: Tally) -> None:
    """Whether a child, killed (None) or ended with `code`, has spoken as it should."""
    output, place = running.output, running.folder
    if "Traceback" in output:
        tally.faults.append(f"{place}: a traceback:\n{output[-3000:]}")
    elif code:
        tally.faults.append(f"{place}: ended with exit code {code}:\n{output[-3000:]}")
    tally.passed_over += output.count(" is not whole (")
    for step in map(int, re.findall(r"^resumed from step (\d+)", output, re.MULTILINE)):
        tally.resumed_at.append(step)
        if step != running.newest_before:
            tally.faults.append(
                f"{place}: resumed from step {step}, but the newest whole checkpoint was {running.newest_before}"
            )
    if running.newest_before and "starting from step 0" in output:
        tally.faults.append(f"{place}: began anew, though there is a checkpoint of step {running.newest_before}")


def differences(straight: Path, broken: Path) -> list[str]:
    """In what two finished runs differ, a sentence each."""
    found = [
        f"{MANIFEST_WORDS.get(key, key)}: {was!r} straight, {now!r} killed"
        for key, was, now in compare(final_manifest(straight), final_manifest(broken))
    ]
    found += [f"exported weight {key} differs" for key, _, _ in compare(exported(straight), exported(broken))]
    found += [
        f"step {key}: loss {was} straight, {now} killed" for key, was, now in compare(losses(straight), losses(broken))
    ]
    return found + [f"preview {key} differs" for key, _, _ in compare(previews(straight), previews(broken))]


MANIFEST_WORDS = {"files": "the final checkpoint's files"}


def compare(first: dict[Any, Any], second: dict[Any, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """(key, value, other value) wherever two mappings differ."""
    for key in [*first, *(key for key in second if key not in first)]:
        if first.get(key) != second.get(key):
            yield key, first.get(key), second.get(key)


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest whole one; 0 without any."""
    from flux_ft.train.checkpoint import latest

    found, _ = latest(folder / "checkpoints")
    return 0 if found is None else found.about.step


def final_manifest(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint, which must be whole, says of itself: every file's digest, settings, drift."""
    from flux_ft.train.checkpoint import latest

    found, _ = latest(folder / "checkpoints")
    if found is None:
        return {}
    return {**asdict(found.about), "files": json.loads((found.path / "manifest.json").read_bytes())["files"]}


def exported(folder: Path) -> dict[str, str]:
    """Every exported weight's shape, dtype and digest. Headers are left out: they tell the time."""
    import torch
    from safetensors import safe_open

    inner = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    files = [folder / path for path in inner if path.parts[0] not in ("cache", "checkpoints")]
    weights: dict[str, str] = {}
    for path in sorted(files):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                tensor = file.get_tensor(key).contiguous()
                digest = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()
                weights[f"{path.relative_to(folder)} {key}"] = f"{tuple(tensor.shape)} {tensor.dtype} {digest}"
    return weights


def losses(folder: Path) -> dict[int, list[tuple[float, float]]]:
    """Loss and gradient norm of every step, as often as they are told."""
    try:
        lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    except OSError:
        return {}
    told: dict[int, list[tuple[float, float]]] = {}
    for row in (json.loads(line) for line in lines if line.endswith("\n")):
        if "loss" in row:
            told.setdefault(row["step"], []).append((row["loss"], row["grad_norm"]))
    return told


def previews(folder: Path) -> dict[str, bytes]:
    """Every file of the previews."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("previews/**/*"))
        if path.is_file()
    }


def step_of(path: Path) -> int:
    """Of a checkpoint's folder, whole or not."""
    return int(path.name.split(".")[0].removeprefix("step-"))


def tiny_runs(
    folder: Path, kinds: Sequence[str], workers: Sequence[int], accumulate: Sequence[int], iterations: int
) -> list[Combination]:
    """flux-tiny with every combination of these; its pictures are made here."""
    import yaml

    from flux_ft.quickstart import TRIGGER, write_pictures

    write_pictures(folder / "pictures", seed=0)
    run_file = folder / "run.yaml"
    settings = {
        "model": "flux-tiny",
        "data": str(folder / "pictures"),
        "finetune_comment": "kill test",
        "trigger_word": TRIGGER,
        "lora_rank": 4,
        "iterations": iterations,
        "learning_rate": 1e-3,
        "preview": {"every": 4, "steps": 2, "prompts": [f"a large {TRIGGER} in the center on a blue background"]},
        "checkpoint": {"every": 1},
        "export": {"dtype": "fp32"},
    }
    run_file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return [tiny_run(run_file, kind, threads, parts) for kind, threads, parts in product(kinds, workers, accumulate)]


def tiny_run(run_file: Path, kind: str, workers: int, accumulate: int) -> Combination:
    """Two pictures a step, however they are divided; a full fine-tune with its average beside it."""
    words = [f"finetune_type={kind}", *(EMA if kind == "full" else []), f"data.workers={workers}"]
    words += [f"optim.accumulate={accumulate}", f"optim.batch_size={2 // accumulate}"]
    return Combination(f"{kind}, {workers} workers, accumulate {accumulate}", run_file, tuple(words))


def try_all(
    combinations: Sequence[Combination], settings: Settings, kills: int, seed: int, folder: Path, at_once: int
) -> list[Tally]:
    """Try every combination, `kills` divided among them, `at_once` at the same time."""
    from flux_ft import log

    share = [kills // len(combinations) + (i < kills % len(combinations)) for i in range(len(combinations))]
    lock = threading.Lock()
    with log.progress("kill test", kills + 2 * len(combinations)) as bar, ThreadPoolExecutor(at_once) as pool:

        def tick() -> None:
            with lock:
                bar.advance()

        try:
            pending = [
                pool.submit(try_combination, one, settings, count, seed, folder / f"{i:02d}", tick)
                for i, (one, count) in enumerate(zip(combinations, share, strict=True))
            ]
            return [one.result() for one in pending]
        except BaseException:
            settings.stopping.set()
            pool.shutdown(cancel_futures=True)
            raise


def table(tallies: Sequence[Tally]) -> str:
    """For people."""
    width = max(len(one.combination) for one in tallies)
    heads = ["kills", "amid a save", "half removed", "torn", "passed over", "identical"]
    lines = [f"{'combination':<{width}}  {'  '.join(heads)}"]
    for one in tallies:
        counts = [one.kills, one.amid_saves, one.half_removed, one.torn, one.passed_over]
        told = "  ".join(f"{count:{len(head)}}" for count, head in zip(counts, heads, strict=False))
        lines.append(f"{one.combination:<{width}}  {told}  {one.identical} of {one.runs}")
    moments = {name: sum(one.moments.get(name, 0) for one in tallies) for name in ("caching", *MOMENTS)}
    told = ", ".join(f"{name} {count}" for name, count in moments.items() if count)
    faults = [f"FAULT  {one.combination}: {fault}" for one in tallies for fault in one.faults]
    return "\n".join([*lines, f"{sum(moments.values())} kills: {told}", *faults])


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all (default: %(default)s)")
    parser.add_argument("--run", type=Path, help="a run file of yours in place of flux-tiny; its output is not touched")
    parser.add_argument("--kind", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="values of data.workers")
    parser.add_argument("--accumulate", nargs="+", type=int, choices=[1, 2], default=[1, 2])
    parser.add_argument("--iterations", type=int, default=12, help="steps of a flux-tiny run (default: %(default)s)")
    parser.add_argument("--gpus", type=int, help="processes of a run, a GPU each")
    parser.add_argument("--at-once", type=int, default=2, help="runs at the same time (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a new folder for all runs (default: one that is removed again)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: %(default)s)")
    parser.add_argument("--mutant", action="store_true", help="train with randomness that is not keyed")
    parser.add_argument("--json", action="store_true", help="the table as one JSON object")
    return parser.parse_args(words)


def environment(tiny: bool) -> dict[str, str]:
    """Of the children: flux_ft of this repository, and for `tiny` models one thread, which is quickest."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    defaults = {"PYTHONIOENCODING": "utf-8", **({"OMP_NUM_THREADS": "1"} if tiny else {})}
    return {**child_environment(os.environ, defaults), "PYTHONPATH": os.pathsep.join(paths)}


def kill_test(words: Sequence[str]) -> int:
    """0 when every killed run ended as the straight one; in an interpreter that has flux_ft."""
    asked = arguments(words)
    folder = Path(tempfile.mkdtemp(prefix="flux_ft-kills-")) if asked.output is None else asked.output.absolute()
    if asked.output is not None:
        folder.mkdir(parents=True, exist_ok=False)
    settings = Settings(environment(tiny=asked.run is None), ["-c", MUTANT] if asked.mutant else OWN)
    if asked.run:
        combinations = [Combination(asked.run.name, asked.run.absolute())]
    else:
        combinations = tiny_runs(folder, asked.kind, asked.workers, asked.accumulate, asked.iterations)
    extra = ("determinism=strict", "logging.trackers=[]", *(["--gpus", str(asked.gpus)] if asked.gpus else []))
    combinations = [Combination(one.name, one.run_file, (*one.words, *extra)) for one in combinations]
    print(f"seed {asked.seed}; everything lies in {folder}", file=sys.stderr, flush=True)
    tallies = try_all(combinations, settings, asked.kills, asked.seed, folder, asked.at_once)
    well = all(not one.faults and one.identical == one.runs for one in tallies)
    if asked.json:
        print(json.dumps({"identical": well, "seed": asked.seed, "combinations": [asdict(one) for one in tallies]}))
    else:
        print(table(tallies))
    if well and asked.output is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if well else 1


def main() -> int:
    """The exit code; makes the environment first."""
    python = ensure_environment()
    if Path(sys.prefix).resolve() == venv_folder(os.environ).resolve():
        try:
            return kill_test(sys.argv[1:])
        except KeyboardInterrupt:
            return STOPPED
    return run_child([str(python), str(Path(__file__).resolve()), *sys.argv[1:]], child_environment(os.environ, {}))


if __name__ == "__main__":
    sys.exit(main())
