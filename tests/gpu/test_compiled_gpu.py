"""Attention's trial, compiled blocks, graphs, the compiled update: `pytest tests/gpu/test_compiled_gpu.py -s`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from flux_ft.adapters import adapted, lora
from flux_ft.config import OptimConfig, RunConfig
from flux_ft.families import blocks
from flux_ft.train.attention import KERNELS, STRICT, choose_attention, offered, try_kernels
from flux_ft.train.compiled import prepare_compile, prepare_update
from flux_ft.train.determinism import Mode, applied, prepare_environment
from flux_ft.train.optim import OPTIMIZERS, Updates
from flux_ft.train.recompute import Policy, apply_recompute

FLUX = (1, 512 + 4096, 24, 128)
BF16 = torch.bfloat16


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA card")
    prepare_environment()
    torch.compiler.reset()
    return torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fast", "strict"])
def test_attention_at_the_shape_of_flux(gpu: torch.device, mode: Mode) -> None:
    with applied(mode, gpu):
        names = STRICT if mode == "strict" else tuple(KERNELS)
        trials = try_kernels({name: offered()[name] for name in names}, FLUX, gpu, BF16, mode)
        print(
            json.dumps({"device": torch.cuda.get_device_name(gpu), **{name: vars(one) for name, one in trials.items()}})
        )
        assert not trials["native"].refused
        assert choose_attention("auto", FLUX, gpu, BF16, mode) in names


def make(gpu: torch.device, full: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(num_layers=2, num_single_layers=3, num_attention_heads=4, guidance_embeds=True)
    model = model.to(gpu, BF16).train().requires_grad_(full)
    if not full:
        paths = [path for path, one in model.named_modules() if isinstance(one, nn.Linear) and "blocks" in path]
        lora.attach_new(model, paths, 8, 8.0, 0.0, 0, adapted.TrainedLinear)
        blocks.fuse(model, adapted.together)
        adapted.prepare(model, blocks.same_input(model), BF16, join=True, in_place=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.02)
    return model  # type: ignore[no-any-return]


def gradients(model: nn.Module, side: int, step: int = 0) -> list[Tensor]:
    """Output and gradients of one pass, as training makes it."""
    generator = torch.Generator("cuda").manual_seed(100 * side + step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=BF16)

    rows = torch.cartesian_prod(torch.zeros(1), torch.arange(side * 1.0), torch.arange(side * 1.0)).cuda()
    with torch.autocast("cuda", BF16):
        out = model(
            hidden_states=draw(1, side**2, 64), encoder_hidden_states=draw(1, 128, 4096),
            pooled_projections=draw(1, 768), timestep=torch.full((1,), 0.5, device="cuda", dtype=BF16),
            guidance=torch.ones(1, device="cuda"), img_ids=rows, txt_ids=torch.zeros(128, 3, device="cuda"),
            return_dict=False,
        )[0]  # fmt: skip
    out.float().square().mean().backward()
    found = [out.detach().float(), *(one.grad.float() for one in model.parameters() if one.grad is not None)]
    model.zero_grad()
    return [one.clone() for one in found]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("choice", "policy"),
    [("blocks", "none"), ("blocks", "selective"), ("blocks", "full"), ("graphs", "none"), ("graphs", "selective")],
)
def test_on_is_off(gpu: torch.device, choice: str, policy: Policy) -> None:
    model = make(gpu)
    apply_recompute(model, policy)
    passes = [(24, 0), (24, 1), (24, 2), (32, 3), (24, 4), (40, 5)]
    expected = [gradients(model, *one) for one in passes]
    config = RunConfig.model_validate({"data": ".", "finetune_type": "lora", "speed": {"compile": choice}})
    assert prepare_compile(model, config, policy, gpu, "fast") == {"compiled": choice}
    for one, wanted in zip(passes, expected, strict=True):
        found = gradients(model, *one)
        gap = sum(float((a - b).square().sum()) for a, b in zip(wanted, found, strict=True)) ** 0.5
        size = sum(float(a.square().sum()) for a in wanted) ** 0.5
        print(json.dumps({"choice": choice, "policy": policy, "pass": one, "relative error": gap / size}))
        assert gap <= 5e-2 * size


@pytest.mark.gpu
def test_the_compiled_update_in_the_backward_pass(gpu: torch.device) -> None:
    """The backward pass has threads of its own on a GPU, in which what was compiled must be found."""
    config = RunConfig.model_validate({"data": ".", "finetune_type": "full", "speed": {"compile": "blocks"}})
    update, ends = prepare_update(config, "adafactor", 10**10, gpu, "fast"), []
    assert update is not None
    for one in (None, update):
        model = make(gpu, full=True)
        trained = dict(model.named_parameters())
        updates = Updates(
            trained,
            lambda some: OPTIMIZERS["adafactor"].make(some, 1e-4, OptimConfig()),
            fused_backward=True,
            update=one,
        )
        for step in range(3):
            updates.begin(step, 1e-4)
            gradients(model, 16, step)
            updates.finish()
        ends.append(torch.cat([parameter.detach().float().flatten() for parameter in trained.values()]))
    start = torch.cat([one.detach().float().flatten() for one in make(gpu, full=True).parameters()])
    moved, apart = (float((one - ends[0]).norm()) for one in (start, ends[1]))
    print(json.dumps({"moved": moved, "apart": apart}))
    assert apart < 0.2 * moved
