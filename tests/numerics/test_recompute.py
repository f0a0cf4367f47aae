"""Recompute policies: the same bits, less memory, and no matrix product computed twice by "selective".

Shapes in names: B batch, C latent channels, H W latent grid, N packed tokens, L text tokens, D width.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_ft import flow
from flux_ft.adapters import lora
from flux_ft.families.base import Family
from flux_ft.train.recompute import WIDEST_KEPT, Policy, apply_recompute, keeps
from flux_ft.types import TextCond

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
POLICIES: tuple[Policy, ...] = ("none", "selective", "full")
RECOMPUTING: tuple[Policy, ...] = ("selective", "full")
RANK = 4
aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


def load(family: Family, kind: str, dtype: torch.dtype = FP32, dropout: float = 0.0) -> Any:
    """flux-tiny with all weights trained ("full") or a LoRA on every linear of the blocks, both ends with values."""
    denoiser = family.load_denoiser(CPU, dtype)
    if kind == "full":
        return denoiser.requires_grad_(True)
    parameters = lora.attach_new(denoiser, family.lora_targets(denoiser), RANK, RANK, dropout, seed=0)
    with torch.no_grad():
        for index, up in enumerate(parameters[1::2]):
            up.copy_(0.05 * torch.randn(up.shape, generator=flow.keyed_generator(0, "up", index)))
    return denoiser.train()


def make_run(family: Family, denoiser: Any, dtype: torch.dtype = FP32, batch: int = 2) -> Callable[[], Tensor]:
    """A function of the weights alone: the loss of one fixed batch."""
    config, generator = denoiser.config, flow.keyed_generator(0, "batch")

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    z_BCHW = draw(*family.latent_shape(64, 64)).to(dtype)
    target_BCHW = draw(*z_BCHW.shape[1:])
    sigma_B = torch.rand(batch, generator=generator)
    embeds_BLD = draw(family.variant.max_text_tokens, config.joint_attention_dim).to(dtype)
    text = TextCond(embeds_BLD, draw(config.pooled_projection_dim).to(dtype))

    def run() -> Tensor:
        velocity_BCHW = family.predict_velocity(denoiser, z_BCHW, sigma_B, text, 1.0)
        return flow.velocity_loss(velocity_BCHW, target_BCHW).mean()

    return run


def trained(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in denoiser.named_parameters() if p.requires_grad}


def loss_and_gradients(denoiser: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    denoiser.zero_grad(set_to_none=True)
    loss = run()
    loss.backward()
    gradients = {name: p.grad for name, p in trained(denoiser).items() if p.grad is not None and p.grad.any()}
    assert gradients.keys() == trained(denoiser).keys()
    denoiser.zero_grad(set_to_none=True)  # the next backward would add to these
    return {"loss": loss.detach(), **gradients}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def blocks_of(denoiser: Any) -> list[nn.Module]:
    return [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made within and that are still alive, whoever holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and (key := one.untyped_storage()._cdata) not in given | self.alive.keys():
                self.alive[key] = one.untyped_storage().nbytes()
                weakref.finalize(one.untyped_storage(), self.alive.pop, key)
        return out


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """What is alive between forward and backward."""
    with LiveBytes() as live:
        loss = run()
    kept = sum(live.alive.values())
    assert loss.requires_grad
    return kept


class Heavy(TorchDispatchMode):
    """Counts the matrix products and attentions really computed: by name, inner size K and columns N."""

    def __init__(self) -> None:
        super().__init__()
        self.done: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.done[(func.name(), *args[2 if func is aten.addmm.default else 1].shape[-2:])] += 1
        elif "attention" in func.name():
            self.done[(func.name(),)] += 1
        return func(*args, **(kwargs or {}))


def heavy_of_a_step(run: Callable[[], Tensor]) -> Counter[tuple[Any, ...]]:
    with Heavy() as heavy:
        run().backward()
    return heavy.done


def heavy_of_the_blocks(denoiser: nn.Module, run: Callable[[], Tensor]) -> Counter[tuple[Any, ...]]:
    """Of one forward."""
    total: Counter[tuple[Any, ...]] = Counter()
    modes: list[Heavy] = []

    def enter(*_: Any) -> None:
        modes.append(Heavy())
        modes[-1].__enter__()

    def leave(*_: Any) -> None:
        modes[-1].__exit__(None, None, None)
        total.update(modes.pop().done)

    handles = [block.register_forward_pre_hook(enter) for block in blocks_of(denoiser)]
    handles += [block.register_forward_hook(leave) for block in blocks_of(denoiser)]
    run()  # with gradients: without them a LoRA is computed by other operations
    for handle in handles:
        handle.remove()
    return total


# --- The same numbers. ---


@pytest.mark.parametrize("policy", RECOMPUTING)
@pytest.mark.parametrize("arithmetic", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_loss_and_gradients_are_the_same_bits(tiny_family: Family, kind: str, arithmetic: str, policy: Policy) -> None:
    dtype = BF16 if arithmetic == "bf16" else FP32
    denoiser = load(tiny_family, kind, dtype)
    run = make_run(tiny_family, denoiser, dtype)

    def cast_run() -> Tensor:
        with torch.autocast("cpu", BF16, enabled=arithmetic == "autocast"):
            return run()

    kept = loss_and_gradients(denoiser, cast_run)
    apply_recompute(denoiser, policy)
    assert_same_bits(kept, loss_and_gradients(denoiser, cast_run))


@pytest.mark.parametrize("policy", RECOMPUTING)
def test_dropout_is_drawn_alike_in_both_runs_of_a_block(tiny_family: Family, policy: Policy) -> None:
    denoiser = load(tiny_family, "lora", dropout=0.3)
    run = make_run(tiny_family, denoiser)

    def seeded(seed: int) -> Callable[[], Tensor]:
        def run_seeded() -> Tensor:
            torch.manual_seed(seed)
            return run()

        return run_seeded

    with torch.random.fork_rng():
        kept, other = (loss_and_gradients(denoiser, seeded(seed)) for seed in (1, 2))
        apply_recompute(denoiser, policy)
        assert_same_bits(kept, loss_and_gradients(denoiser, seeded(1)))
    assert not torch.equal(kept["loss"], other["loss"])


@pytest.mark.parametrize("policy", RECOMPUTING)
def test_another_family_gets_the_same_bits(policy: Policy) -> None:
    """FLUX.2's classes, random weights: linears without bias, modulation outside the blocks, gated activations."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Flux2Transformer2DModel(
            in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        )  # fmt: skip
        tokens_BND, text_BLD = torch.randn(2, 6, 8), torch.randn(2, 5, 24)

    def run() -> Tensor:
        velocity = denoiser(
            hidden_states=tokens_BND, encoder_hidden_states=text_BLD, timestep=torch.tensor([0.2, 0.7]),
            guidance=torch.ones(2), img_ids=torch.ones(6, 4), txt_ids=torch.zeros(5, 4), return_dict=False,
        )[0]  # fmt: skip
        return velocity.square().mean()

    apply_recompute(denoiser, "none")
    kept, heavy = loss_and_gradients(denoiser, run), heavy_of_a_step(run)
    apply_recompute(denoiser, policy)
    assert_same_bits(kept, loss_and_gradients(denoiser, run))
    again = heavy_of_a_step(run) - heavy
    assert again == (heavy_of_the_blocks(denoiser, run) if policy == "full" else Counter())


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_updated_during_the_backward_end_as_those_updated_after_it(tiny_family: Family, policy: Policy) -> None:
    """Three steps: a block that was recomputed from weights already moved would go elsewhere."""
    after, during = load(tiny_family, "full"), load(tiny_family, "full")
    rate = 0.1

    def update(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data = parameter.data - rate * parameter.grad
        parameter.grad = None

    start = {name: p.detach().clone() for name, p in trained(after).items()}
    apply_recompute(during, policy)
    for parameter in during.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    run_after, run_during = make_run(tiny_family, after), make_run(tiny_family, during)
    for _ in range(3):
        run_after().backward()
        for parameter in after.parameters():
            update(parameter)
        run_during().backward()
    assert not any(torch.equal(start[name], p) for name, p in trained(after).items())
    assert_same_bits(trained(after), trained(during))  # type: ignore[arg-type]


@contextmanager
def streamed(denoiser: nn.Module) -> Iterator[Counter[int]]:
    """Within, a block has weights only from its pre-hook on until its forward ends; counts how often each was fed."""
    fed: Counter[int] = Counter()
    home = {p: p.data for block in blocks_of(denoiser) for p in block.parameters()}
    handles = []

    def feed(block: nn.Module, _: Any) -> None:
        fed[blocks_of(denoiser).index(block)] += 1
        for p in block.parameters():
            p.data = home[p].clone()

    def starve(block: nn.Module, *_: Any) -> None:
        for p in block.parameters():
            p.data = torch.empty(0)

    for block in blocks_of(denoiser):
        starve(block)
        handles += [block.register_forward_pre_hook(feed), block.register_forward_hook(starve)]
    yield fed
    for handle in handles:
        handle.remove()
    for p, data in home.items():
        p.data = data


def test_full_calls_pre_hooks_again_so_streamed_blocks_have_their_weights(tiny_family: Family) -> None:
    denoiser = load(tiny_family, "full")
    run = make_run(tiny_family, denoiser)
    kept = loss_and_gradients(denoiser, run)
    apply_recompute(denoiser, "full")
    with streamed(denoiser) as fed:
        again = loss_and_gradients(denoiser, run)
    assert fed == dict.fromkeys(range(len(blocks_of(denoiser))), 2)
    assert_same_bits(kept, again)


# --- What it takes. ---


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_full_keeps_less_than_selective_and_selective_less_than_none(
    tiny_family: Family, kind: str, arithmetic: str
) -> None:
    dtype = BF16 if arithmetic == "bf16" else FP32
    denoiser = load(tiny_family, kind, dtype)
    run = make_run(tiny_family, denoiser, dtype)
    kept = {}
    for policy in POLICIES:
        apply_recompute(denoiser, policy)
        kept[policy] = kept_bytes(run)
    assert 3 * kept["full"] < kept["selective"] < 0.75 * kept["none"]


def test_selective_keeps_the_results_of_linears_and_attention_beyond_full_and_nothing_else(
    tiny_family: Family,
) -> None:
    denoiser = load(tiny_family, "full")
    run = make_run(tiny_family, denoiser)
    results: Counter[str] = Counter()

    def note(module: Any, _: Any, out: Any) -> None:
        parts = out if isinstance(out, tuple) else (out,)
        if isinstance(module, nn.Linear):
            results["linears"] += out.nbytes
        else:  # attention hands on linears of its own result; each head adds a log-sum-exp a token, in float32
            tokens = sum(one.shape[0] * one.shape[1] for one in parts)
            results["attention"] += tokens * (module.inner_dim + module.heads) * FP32.itemsize

    modules = [module for block in blocks_of(denoiser) for module in block.modules()]
    watched = [one for one in modules if isinstance(one, nn.Linear) or type(one).__name__ == "FluxAttention"]
    handles = [one.register_forward_hook(note) for one in watched]
    run()
    for handle in handles:
        handle.remove()
    apply_recompute(denoiser, "full")
    least = kept_bytes(run)
    apply_recompute(denoiser, "selective")
    assert kept_bytes(run) - least == results.total()


def test_full_keeps_the_inputs_of_the_blocks(tiny_family: Family) -> None:
    """One more single block adds the one tensor that it hands on, image and text tokens together."""
    denoiser = load(tiny_family, "full")
    run = make_run(tiny_family, denoiser)
    apply_recompute(denoiser, "full")
    more = kept_bytes(run)
    del denoiser.single_transformer_blocks[-1]
    batch, (_, height, width) = 2, tiny_family.latent_shape(64, 64)
    tokens = tiny_family.variant.max_text_tokens + height * width // 4
    assert more - kept_bytes(run) == batch * tokens * denoiser.inner_dim * FP32.itemsize


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_selective_repeats_no_matrix_product_nor_attention_and_full_a_forward_of_the_blocks(
    tiny_family: Family, kind: str, arithmetic: str
) -> None:
    """But for a LoRA's up products, whose results are as large as the base layers' and soon made."""
    dtype = BF16 if arithmetic == "bf16" else FP32
    denoiser = load(tiny_family, kind, dtype)
    run = make_run(tiny_family, denoiser, dtype)
    blocks = heavy_of_the_blocks(denoiser, run)
    ups = Counter({key: count for key, count in blocks.items() if key[1:2] == (RANK,)})
    assert (ups.total() > 0) == (kind == "lora")
    done = {}
    for policy in POLICIES:
        apply_recompute(denoiser, policy)
        done[policy] = heavy_of_a_step(run)
    assert done["selective"] - done["none"] == ups
    assert done["full"] - done["none"] == blocks
    assert blocks.total() >= 2 * len(blocks_of(denoiser))


def test_a_policy_replaces_the_one_before(tiny_family: Family) -> None:
    denoiser = load(tiny_family, "full")
    run = make_run(tiny_family, denoiser)
    first: dict[str, tuple[Any, ...]] = {}
    for policy in ("none", "full", "none", "selective", "full", "selective", "none"):
        apply_recompute(denoiser, policy)
        assert denoiser.is_gradient_checkpointing == (policy != "none")
        found = kept_bytes(run), heavy_of_a_step(run)
        assert first.setdefault(policy, found) == found
    assert len({found[0] for found in first.values()}) == len(first)


# --- What "selective" keeps. ---


@pytest.mark.parametrize("columns", [64, 64 * WIDEST_KEPT, 64 * WIDEST_KEPT + 1])
def test_a_product_is_kept_up_to_a_width(columns: int) -> None:
    left, right, bias = torch.empty(2, 5, 64), torch.empty(2, 64, columns), torch.empty(columns)
    wanted = columns <= 64 * WIDEST_KEPT
    assert keeps(aten.mm.default, (left[0], right[0])) == wanted
    assert keeps(aten.addmm.default, (bias, left[0], right[0])) == wanted
    assert keeps(aten.bmm.default, (left, right)) == wanted
    assert keeps(aten.baddbmm.default, (bias, left, right)) == wanted


def test_every_attention_kernel_of_this_torch_is_kept_and_nothing_elementwise() -> None:
    kernels = [
        getattr(aten, name).default
        for backend in ("flash", "efficient", "cudnn")
        if hasattr(aten, name := f"_scaled_dot_product_{backend}_attention")
    ]
    assert len(kernels) >= 3
    assert all(keeps(one, ()) for one in (*kernels, aten._scaled_dot_product_flash_attention_for_cpu.default))
    light = (aten.gelu, aten.native_layer_norm, aten.cat, aten._to_copy, aten.clone, aten.view, aten.silu)
    assert not any(keeps(one.default, ()) for one in light)
