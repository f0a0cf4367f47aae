"""Where a step's time goes: kinds by name, sums that follow from the spans, and a real step on the CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flux_ft.bench.profiling import _covered, for_people, kind_of, profiled, summed


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k128_sm80", "attention"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_add_mm_mul_3", "elementwise and norms"),
        ("triton_tem_fused_addmm_2", "matrix products"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4, AdamW>>", "optimizer"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "unpacking of weights"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "elementwise and norms"),
        ("aten::addmm", "matrix products"),
        ("aten::addmm_", "matrix products"),
        ("aten::_scaled_mm", "matrix products"),
        ("aten::add_", "elementwise and norms"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_sums() -> None:
    spans = [("mm", "matrix products", 0.3), ("mm", "matrix products", 0.1), ("add", "elementwise and norms", 0.1)]
    found = summed(spans, 0.4, 2, 0.5, "waiting")
    assert found["step_s"] == 0.5
    kinds = {row["kind"]: (row["seconds"], row["share"], row["calls"]) for row in found["kinds"]}
    assert kinds["matrix products"] == pytest.approx((0.2, 0.4, 1))
    assert kinds["elementwise and norms"] == pytest.approx((0.05, 0.1, 0.5))
    assert kinds["waiting"] == pytest.approx((0.3, 0.6, 0))
    assert [row["name"] for row in found["top"]] == ["mm", "add"]
    assert _covered([(3, 4), (0, 2), (1, 1.5), (1, 2.5)]) == 3.5


def test_a_step_on_the_cpu() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 128))
    optimizer, x = torch.optim.AdamW(model.parameters()), torch.randn(1, 1, 256, 128)

    def step(times: list[int]) -> None:
        torch.autograd.backward(F.scaled_dot_product_attention(model(x), x, x).square().mean())
        optimizer.step()
        times.append(1)

    done: list[int] = []
    found = profiled(partial(step, done), 2, torch.device("cpu"), 0.0)
    assert len(done) == 2
    shares = {row["kind"]: row["share"] for row in found["kinds"]}
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[kind] for kind in ("matrix products", "attention", "optimizer", "elementwise and norms")) > 0
    calls = {row["name"]: row["calls"] for row in found["top"] if row["kind"] == "matrix products"}
    assert calls["aten::addmm"] == 2
    assert "outside torch's operations" in for_people(found)
