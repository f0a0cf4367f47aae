"""Whatever a LoRA file holds, it is read, or inspected, or refused in one message; never another exception, a warning,
a crash, or memory without a bound.

FLUX_FT_FUZZ says how many files (5000). They are read in child processes, so that what kills its process is seen as
such, with the seed of the file.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from _memory import peak_bytes
from fuzz.lora_files import Case, make_case

from flux_ft.errors import FluxFTError

CASES = int(os.environ.get("FLUX_FT_FUZZ", "5000"))
CASES_A_CHILD = 2500
GROWTH_BYTES = 200 * 2**20
"""How much a child may grow over what it holds after its first file."""
LONGEST_MESSAGE = 2000
TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}


def test_a_lora_file_is_read_or_refused_in_one_message() -> None:
    total: Counter[str] = Counter()
    for start in range(0, CASES, CASES_A_CHILD):
        stop = min(start + CASES_A_CHILD, CASES)
        code = f"from fuzz.test_lora_files import read_all; read_all({start}, {stop})"
        child = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
        assert child.returncode == 0, f"exit code {child.returncode}\n{child.stderr[-3000:]}"
        noise = [line for line in child.stderr.splitlines() if not line.startswith("make_case(")]
        assert not noise, f"said on the side: {noise[:5]}"
        summary = json.loads(child.stdout)
        assert summary["growth_bytes"] < GROWTH_BYTES, f"{summary['growth_bytes']:,} bytes in seeds {start} to {stop}"
        total += summary["outcomes"]
    assert total.total() == CASES
    assert CASES / 10 < total["read"] < CASES * 9 / 10, f"too few files that are good, or that are bad: {total}"


def check(case: Case, path: Path) -> str:
    """The outcome of one file; asserts all that must hold of it."""
    import torch

    from flux_ft import log
    from flux_ft.adapters.formats import read_adapter
    from flux_ft.adapters.inspect import inspect_file
    from flux_ft.errors import AdapterError

    path.write_bytes(case.data)
    said: list[str] = []
    log.warn = said.append
    refusal = told = None
    try:
        told = inspect_file(path)
        assert printable(told.for_people().replace("\n", " "))
        json.dumps(told.as_json(), allow_nan=False)
    except AdapterError as error:
        require_reason(error, path)
    try:
        state = read_adapter(path)
    except AdapterError as error:
        refusal = error
    assert all(printable(words) for words in said)
    if refusal is not None:
        require_reason(refusal, path)
        assert case.tricks, refusal.message
        return "refused" if told is None else "inspected"
    assert told is not None
    assert state.layers
    for layer in state.layers.values():
        assert torch.isfinite(layer.down_RI).all()
        assert torch.isfinite(layer.up_OR).all()
        assert layer.down_RI.shape[0] == layer.up_OR.shape[1]
    assert all(isinstance(text, str) for entry in state.metadata.items() for text in entry)
    return "read"


def require_reason(error: FluxFTError, path: Path) -> None:
    assert f"`{path}`" in error.message
    for text in (error.message, error.hint or ""):
        assert printable(text), ascii(text)
        assert 5 < len(text) < LONGEST_MESSAGE, text


def printable(text: str) -> bool:
    return text.isprintable()


def read_all(start: int, stop: int) -> None:
    """Read the files of the seeds from `start` up to `stop`; a crash leaves its seed as the last line of stderr."""
    warnings.simplefilter("error")
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cat.safetensors"
        before = 0
        for seed in range(start, stop):
            print(f"make_case(random.Random({seed}))", file=sys.stderr, flush=True)
            outcomes[check(make_case(random.Random(seed)), path)] += 1
            before = before or peak_bytes()
    print(json.dumps({"outcomes": outcomes, "growth_bytes": peak_bytes() - before}))
