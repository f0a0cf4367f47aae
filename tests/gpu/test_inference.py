"""Drawing at FLUX.1-dev's full size with random weights: seconds a picture, and memory against its estimate.

`pytest tests/gpu/test_inference.py -s` on a machine with a CUDA card of 40 GB or more prints the figures. Without one,
the same code runs on the CPU with a few narrow blocks, so that it cannot rot.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from _random_flux import NARROW

from flux_ft.adapters.attached import attach_states
from flux_ft.bench.infer import RandomFlux1, bench_infer
from flux_ft.errors import ConfigError
from flux_ft.families.base import Family
from flux_ft.families.flux1 import Flux1
from flux_ft.families.quantize import restream
from flux_ft.families.registry import FLUX1_DEV
from flux_ft.infer.fit import FRAGMENTATION, WORKSPACE_BYTES, machine_of
from flux_ft.types import AdapterState, LoraLayer, TextCond

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_bench_runs_with_random_weights() -> None:
    small = replace(FLUX1_DEV, sample_size_px=64, max_text_tokens=8)
    shape = NARROW | {"num_attention_heads": 4}  # 4-bit blocks are of 64 weights
    found = bench_infer(
        steps=2, repeats=1, compiled=False, device="cpu",
        family=RandomFlux1(small, "random", "random", tuple(shape.items())),
    )  # fmt: skip
    rows = {row.what: row for row in found.rows}
    assert {"diffusers", "fp32", "diffusers again", "int8", "fp8", "fp32 streamed"} <= rows.keys()
    assert rows["fp32"].differs == rows["fp32 streamed"].differs == rows["diffusers again"].differs == 0
    assert rows["int8"].weights_gb < rows["fp32"].weights_gb
    assert all(name in found.for_people() for name in rows)
    assert json.loads(json.dumps(found.as_json()))["steps"] == 2


def test_full_size_is_refused_without_a_large_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(ConfigError, match="CUDA card"):
        bench_infer(full=True)


@pytest.mark.gpu
@cuda
def test_full_size_stays_within_the_estimate() -> None:
    """1024², 28 steps; the targets are 6.6 s eager and 4.4 s compiled on an H100, told and not held."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs a card of 40 GB")
    found = bench_infer(full=True, repeats=2)
    print(json.dumps(found.as_json()))
    print(found.for_people())
    for row in found.rows:
        assert row.peak_gb is not None
        assert row.predicted_gb is not None
        assert row.peak_gb <= row.predicted_gb * FRAGMENTATION + WORKSPACE_BYTES / 1e9, row


def velocity(family: Family, denoiser: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    device, dtype = torch.device("cuda"), torch.bfloat16
    z = torch.randn(1, *family.latent_shape(64, 64), generator=rng).to(device, dtype)
    text = TextCond(*(torch.randn(size, generator=rng).mul(0.3).to(device, dtype) for size in ((1, 32, 64), (1, 64))))
    with torch.no_grad():
        return family.predict_velocity(denoiser, z, torch.tensor([0.7], device=device), text, 2.0).float()


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("storage", ["bf16", "int8", "fp8", "nf4"])
def test_held_and_streamed_weights_on_the_card(tiny_family: Family, storage: Any) -> None:
    assert isinstance(tiny_family, Flux1)
    device, dtype = torch.device("cuda"), torch.bfloat16
    plain = tiny_family.load_denoiser(device, dtype)
    wanted = velocity(tiny_family, plain)
    held: Any = tiny_family.load_denoiser(device, dtype, storage)
    assert held.compute_device == device
    found = velocity(tiny_family, held)
    assert (found - wanted).norm() / wanted.norm() < 0.06
    if storage == "nf4":
        return
    streamed = tiny_family.load_denoiser(device, dtype, storage, stream=True)
    assert next(streamed.parameters()).device.type == "cpu"
    state = AdapterState(
        {path: LoraLayer(torch.full((2, 128), 0.02), torch.full((128, 2), 0.02), 2.0)
         for path in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.3.attn.to_k")}
    )  # fmt: skip
    for strength in (0.0, 1.0, 0.5):
        for denoiser in (held, streamed):
            attach_states(denoiser, [(f"at {strength}", state, strength)])
        restream(streamed)
        for _ in range(3):  # the first pass finds the order, later ones fetch ahead
            assert torch.equal(velocity(tiny_family, streamed), velocity(tiny_family, held))


@pytest.mark.gpu
@cuda
def test_what_is_free_is_asked_of_the_card() -> None:
    machine = machine_of(torch.device("cuda"))
    assert machine.free_bytes is not None
    assert 0 < machine.free_bytes <= torch.cuda.get_device_properties(0).total_memory
