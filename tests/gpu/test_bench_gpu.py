"""What of the training bench needs a card: peaks beside the plan, a cap on memory, and kernels by kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flux_ft.bench.train import bench_train

CELLS = ("lora-256-b1-auto", "lora-256-b1-full-int8", "full-256-b1-full", "full-256-b1-full-1gb")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_cells_on_a_card(tmp_path: Path) -> None:
    found = bench_train(cells=CELLS, output=tmp_path, steps=3, order=["A", "ours"], profile=True)
    assert found.ok, found.for_people()
    ours = {row["cell"]: row for row in found.rows() if row["side"] == "ours"}
    assert ours.keys() == set(CELLS)
    assert all(row["peak_gb"] > 0 and row["planned_gb"] > 0 for row in ours.values())
    assert ours["full-256-b1-full-1gb"]["peak_gb"] < 1
    profile = json.loads((tmp_path / "profile-lora-256-b1-auto-ours.json").read_text())
    shares = {row["kind"]: row["share"] for row in profile["kinds"]}
    assert min(shares[kind] for kind in ("matrix products", "attention", "elementwise and norms")) > 0
    assert shares["no kernel runs"] < 1
