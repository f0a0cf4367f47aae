"""All that is checked before a change goes in: style, format, types, tests.

    python3 scripts/test.py [arguments for pytest]

Makes the environment on the first start. Every check runs, even after one has failed; pytest comes last, and where all
is well its closing line is the last line printed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from _environment import ROOT, STOPPED, child_environment, ensure_environment, run_child

MOST_PROCESSES = 4
"""Each takes up to 4 GB."""
QUICK_CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
}


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def check(name: str, command: list[str], environ: dict[str, str]) -> bool:
    """Run one check, print one line; and what it said, if it failed."""
    started = time.monotonic()
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        print(done.stdout.rstrip())
    verdict = "passed" if done.returncode == 0 else f"FAILED (exit code {done.returncode})"
    print(f"{name:<12} {verdict}, {time.monotonic() - started:.1f} s", flush=True)
    return done.returncode == 0


def main() -> int:
    """0 if all is well, pytest's exit code if pytest failed, else 1."""
    python = str(ensure_environment(frozenset({"dev"})))
    os.chdir(ROOT)
    # One process a core with one thread each: most tests are too small for several threads. Files stay whole, since
    # what their tests share is made once.
    defaults = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environ = child_environment(os.environ, defaults)
    try:
        failed = [name for name, args in QUICK_CHECKS.items() if not check(name, [python, "-m", *args], environ)]
    except KeyboardInterrupt:
        return STOPPED
    processes = ["-n", str(min(MOST_PROCESSES, available_cores())), "--dist", "loadfile", "--no-loadscope-reorder"]
    code = run_child([python, "-m", "pytest", *processes, *sys.argv[1:]], environ)
    if code == STOPPED:
        return STOPPED
    if code != 0:
        failed.append("pytest")
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return code or (1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
