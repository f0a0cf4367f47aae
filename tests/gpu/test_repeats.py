"""Whether a CUDA card computes the same bits each time, at FLUX.1's shapes: `pytest tests/gpu/test_repeats.py -s`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from flux_ft.bench.repeat import check_repeats
from flux_ft.train.determinism import CUBLAS_VARIABLE, applied, circumstances, prepare_environment

TOO_LATE = """
import torch
from flux_ft.errors import ConfigError
from flux_ft.train.determinism import applied
one = torch.ones(8, 8, device="cuda")
one @ one
try:
    with applied("strict", one.device):
        print("went in")
except ConfigError as error:
    print(error.message)
"""


def require_card(size: float) -> torch.device:
    """Skip without a CUDA card of so many bytes."""
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < size:
        pytest.skip(f"needs a CUDA card of {size / 1e9:.0f} GB or more")
    prepare_environment()
    return torch.device("cuda", 0)


@pytest.mark.gpu
def test_strict_mode_repeats_at_full_size() -> None:
    device = require_card(20e9)
    rows = check_repeats(device)
    about = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    print(json.dumps({**about, "rows": [row.as_json() for row in rows]}))
    assert [row.for_people() for row in rows if not row.ok] == []
    assert all(tally.compared == 29 for row in rows if row.needed for tally in row.tallies.values())


@pytest.mark.gpu
def test_circumstances_of_a_gpu() -> None:
    device = require_card(1e9)
    with applied("strict", device):
        facts = circumstances(device, 1, "strict")
    print(json.dumps(facts))
    assert facts["GPU"] == torch.cuda.get_device_name(device)
    assert facts["GPU driver version"] != "unknown"
    assert (facts["cuDNN deterministic"], facts[CUBLAS_VARIABLE]) == ("on", os.environ[CUBLAS_VARIABLE])
    assert "CPU model" not in facts


@pytest.mark.gpu
@pytest.mark.parametrize(("value", "told"), [(None, CUBLAS_VARIABLE), (":4096:8", "went in")])
def test_strict_after_a_product_without_the_variable_is_refused(value: str | None, told: str) -> None:
    """In a process of its own, since cuBLAS reads it once."""
    require_card(1e9)
    environment = {name: setting for name, setting in os.environ.items() if name != CUBLAS_VARIABLE}
    environment |= {CUBLAS_VARIABLE: value} if value else {}
    done = subprocess.run([sys.executable, "-c", TOO_LATE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
