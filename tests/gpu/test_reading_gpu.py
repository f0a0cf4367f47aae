"""Weights on their way to a GPU: no bit changes, no copy overtakes another, and nothing but the next weight is there.

`pytest tests/gpu/test_reading_gpu.py -s` prints GB/s beside what torch does by itself with the same file.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flux_ft.families import reading
from flux_ft.families.base import Family
from flux_ft.families.reading import Carrier, mapped

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_every_bit_arrives_in_many_stages(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(reading, "STAGE_BYTES", 2**16)
    carrier, rng = Carrier(device), torch.Generator().manual_seed(0)
    sent = [torch.randint(0, 2**31, (count,), generator=rng, dtype=torch.int32) for count in (1, 99, 2**14, 3_000_001)]
    for _ in range(20):
        arrived = [carrier.carry(one) for one in sent]
        assert all(torch.equal(there.cpu(), one) for there, one in zip(arrived, sent, strict=True))
    wide = torch.randn(1000, 3000, generator=rng)
    assert torch.equal(carrier.carry(wide.t(), BF16).cpu(), wide.t().to(BF16))


@pytest.mark.parametrize("storage", [None, "bf16", "int8", "fp8"])
def test_the_model_is_the_one_that_a_cpu_loads(tiny_family: Family, device: torch.device, storage: Any) -> None:
    here, there = (tiny_family.load_denoiser(place, BF16, storage).state_dict() for place in (CPU, device))
    assert list(here) == list(there)
    for name, tensor in there.items():
        assert tensor.device == device
        assert tensor.dtype == here[name].dtype
        if storage in (None, "bf16"):
            assert torch.equal(tensor.cpu(), here[name])
        else:  # a GPU may divide differently in the last place
            torch.testing.assert_close(tensor.cpu().float(), here[name].float(), rtol=0.07, atol=1.001)


def test_a_file_is_read_as_fast_as_torch_does_and_one_weight_is_there_besides(
    tmp_path: Path, device: torch.device
) -> None:
    count, size = 40, 3072 * 12288
    save_file({f"{i}": torch.full((size,), float(i), dtype=FP32) for i in range(count)}, tmp_path / "some.safetensors")
    for name in ("torch", "staged", "torch", "staged"):
        tensors, carrier, arrived = mapped([tmp_path / "some.safetensors"]), Carrier(device), []
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for tensor in tensors.values():
            arrived.append(carrier.carry(tensor, BF16) if name == "staged" else tensor.to(device).to(BF16))
        torch.cuda.synchronize()
        rate = count * size * 4 / (time.perf_counter() - began) / 1e9
        print(f"{name}: {rate:.1f} GB/s")
        held = sum(one.nbytes for one in arrived)
        assert torch.cuda.max_memory_allocated() - before <= held + 4 * size + 2**20
        assert all(int(one[-1]) == i for i, one in zip(map(int, tensors), arrived, strict=True))
