"""A LoRA on a base of 8 bits a weight over two processes: gloo cannot send such numbers, and need not."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch
from _verbs import child_env, hashes, metrics, run_verb, write_run, write_scenes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="gloo between local processes is tested on Linux"),
]


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    two = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port))
    env = child_env() | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    settings = {
        "memory": {"base_precision": "fp8"}, "iterations": 4, "schedule": {"warmup_steps": 4},
        "preview": {"every": 1000, "steps": 1, "prompts": ["a red circle", "a star"]}, "checkpoint": {"every": None},
    }  # fmt: skip
    run_file = write_run(tmp_path / "run.yaml", write_scenes(tmp_path / "data"), **settings)
    for name, launcher, batch in (("alone", (), 2), ("together", two, 1)):
        words = ("train", run_file, f"output={name}", f"optim.batch_size={batch}")
        done = run_verb(*words, cwd=tmp_path, launcher=launcher, env=env)
        assert done.code == 0, done.stderr
    alone, together = (
        [row["loss"] for row in metrics(tmp_path / name) if "loss" in row] for name in ("alone", "together")
    )
    assert len(alone) == 4
    assert together == pytest.approx(alone, rel=1e-5)  # gradients are summed in another order
    first = [hashes(tmp_path / name / "previews" / "step-000000") for name in ("alone", "together")]
    assert first[0] == first[1]
