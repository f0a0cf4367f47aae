"""FLUX.1's blocks in fewer operations: what comes out, and every gradient, is what diffusers and peft compute."""

from contextlib import nullcontext

import pytest
import torch
from _random_flux import NARROW
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from flux_ft.adapters import adapted, lora
from flux_ft.families import blocks
from flux_ft.families.flux1 import position_ids
from flux_ft.families.quantize import hold
from flux_ft.train.recompute import apply_recompute

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
TARGETS = {
    "blocks": lambda path: True,
    "attention": lambda path: ".attn." in path,
    "some": lambda path: path.endswith(("to_q", "add_v_proj", "proj_mlp")),
    "none": lambda path: False,
}
RANK = 4
BATCH, ROWS, COLUMNS, TEXT = 2, 3, 4, 5


def made(
    fused, dtype=torch.float32, targets="blocks", policy="none", alpha=3.0, storage=None, join=True, up=True, **shape
):
    """A narrow FLUX.1 in training with a LoRA that has values, as ours runs it or as diffusers and peft do."""
    torch.manual_seed(0)
    model = (
        FluxTransformer2DModel(**NARROW | shape, in_channels=16, guidance_embeds=True).to(dtype).requires_grad_(False)
    )
    chosen = [
        name
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and name.startswith(BLOCKS) and TARGETS[targets](name)
    ]
    if storage:
        hold(model, [*model.transformer_blocks, *model.single_transformer_blocks], storage, torch.device("cpu"), dtype)
    if chosen:
        linear = adapted.TrainedLinear if fused else None
        parameters = lora.attach_new(model, chosen, RANK, alpha, 0.0, 0, linear)
        with torch.no_grad():
            for parameter in parameters[1::2] if up else ():
                parameter.normal_(std=0.3)
    if fused:
        blocks.fuse(model, adapted.together)
        adapted.prepare(model, blocks.same_input(model), dtype, join, in_place=policy != "selective")
    apply_recompute(model, policy)
    return model.train()


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(BATCH, ROWS * COLUMNS, 16).to(dtype),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 32).to(dtype),
        "pooled_projections": torch.randn(BATCH, 24).to(dtype),
        "timestep": torch.rand(BATCH).to(dtype),
        "guidance": torch.ones(BATCH),
        "img_ids": position_ids(ROWS, COLUMNS, torch.device("cpu")),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def predicted(model, dtype=torch.float32):
    with torch.autocast("cpu", torch.bfloat16) if dtype is torch.bfloat16 else nullcontext():
        return model(**inputs(dtype))[0]


def found(model, dtype=torch.float32):
    """The prediction, and the gradient of every trained parameter by name, from one pass forwards and backwards."""
    out = predicted(model, dtype)
    (
        out.to(torch.promote_types(out.dtype, torch.float32)) * torch.linspace(-1, 1, out.numel()).view(out.shape)
    ).sum().backward()
    return {"": out.detach(), **{name: one.grad for name, one in model.named_parameters() if one.grad is not None}}


def error(got, exact):
    """Of all numbers together, relative, the worst of names."""
    assert got.keys() == exact.keys()
    return max(float((got[name].double() - one.double()).norm() / one.norm()) for name, one in exact.items())


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("targets", ["blocks", "attention", "some"])
def test_a_lora_gets_the_gradients_that_peft_and_diffusers_give(targets, policy):
    ours = made(True, targets=targets, policy=policy)
    exact = found(made(False, targets=targets))
    assert len(exact) > 1
    assert error(found(ours), exact) < 1e-5
    assert error({"": predicted(ours).detach()}, {"": exact[""]}) < 1e-6


@pytest.mark.parametrize("storage", [None, "int8", "fp8"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_in_bf16_it_is_no_further_from_float32_than_peft_and_diffusers_are(policy, storage):
    ours = found(made(True, torch.bfloat16, policy=policy, storage=storage), torch.bfloat16)
    theirs = found(made(False, torch.bfloat16, storage=storage), torch.bfloat16)
    exact = made(False, torch.bfloat16, storage=storage).float()
    for name, module in exact.named_modules():
        assert name or module.train()
    exact = found(exact)
    assert {one.dtype for name, one in ours.items() if name} == {torch.float32}

    def distance(got):
        return torch.stack([(got[name].float() - one).norm() / one.norm() for name, one in exact.items()])

    assert distance(ours).mean() < 1.05 * distance(theirs).mean()
    assert distance(ours)[0] < 1.1 * distance(theirs)[0]


@pytest.mark.parametrize("policy", ["none", "full"])
def test_the_models_own_weights_get_the_gradients_that_diffusers_gives(policy):
    ours, theirs = (made(fused, targets="none", policy=policy).requires_grad_(True) for fused in (True, False))
    exact = found(theirs)
    assert any(name.endswith("norm_added_q.weight") for name in exact)
    assert len(exact) == 1 + len(list(theirs.parameters()))
    assert error(found(ours), exact) < 1e-5


@pytest.mark.parametrize("how", ["eval", "eval, no gradients"])
def test_what_is_drawn_and_measured_has_the_bits_of_diffusers_and_peft(how):
    with torch.no_grad() if how != "eval" else nullcontext():
        pair = [predicted(made(fused).eval().requires_grad_(False)) for fused in (True, False)]
        assert how == "eval" or torch.equal(*pair)
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [None, "int8"])
def test_a_lora_that_changes_nothing_yet_gives_the_bits_of_the_base_in_training(storage, dtype):
    model = made(True, dtype, storage=storage, up=False)
    with torch.no_grad(), lora.detached(model):
        base = predicted(model, dtype)
    assert torch.equal(predicted(model, dtype), base)


def test_dropout_is_left_to_peft():
    model = made(True)
    linears = [model.get_submodule(f"transformer_blocks.0.attn.to_{name}") for name in "qkv"]
    for linear in linears:
        linear.lora_dropout[lora.TRAINED] = nn.Dropout(0.5)
    x = torch.randn(BATCH, 7, 32)
    drawn = []
    for run in (adapted.together, blocks.each):
        torch.manual_seed(2)
        drawn.append(run(linears, x))
    assert all(map(torch.equal, *drawn))
    assert not torch.equal(adapted.together(linears, x)[0], drawn[0][0])


# --- Weights in one storage. ---


def test_joined_weights_are_in_memory_once_and_keep_their_names_and_values():
    plain, joined = made(False), made(True)
    assert list(joined.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in joined.state_dict().items())
    storages = [
        {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in model.parameters()}
        for model in (plain, joined)
    ]
    assert sum(storages[0].values()) == sum(storages[1].values())
    assert len(storages[1]) < len(storages[0])
    weight = joined.single_transformer_blocks[0].attn.to_k.base_layer.weight
    before = predicted(joined).detach()
    with torch.no_grad():
        weight.mul_(2)
    assert not torch.equal(predicted(joined), before)


def test_a_weight_that_was_moved_or_cast_is_not_read_where_it_was():
    model, plain = made(True), made(False)
    first = model.transformer_blocks[0].attn.to_q
    rows = first.joined.rows
    assert model.to(torch.device("cpu"), torch.float32) is model
    assert first.joined.rows is rows
    model.double()
    assert not any(one.joined.rows for one in model.modules() if isinstance(one, adapted.TrainedLinear) and one.joined)
    assert error(found(model, torch.float64), found(plain.double(), torch.float64)) < 1e-6


def test_weights_that_travel_are_not_joined():
    model = made(True, join=False)
    own = [one.untyped_storage().nbytes() == one.nbytes for one in model.parameters()]
    assert all(own)
    assert error(found(model), found(made(False))) < 1e-5


# --- Factors cast once a pass. ---


def move_in_place(parameter):
    parameter.mul_(1.5)


def move_unseen(parameter):
    """As an optimizer's own kernel does: autograd's count of changes stays."""
    version = parameter._version
    parameter.data.mul_(1.5)
    assert parameter._version == version


def replace(parameter):
    parameter.data = parameter.data * 1.5


@pytest.mark.parametrize("move", [move_in_place, move_unseen, replace])
def test_a_factor_that_moved_is_cast_anew(move):
    both = [made(fused, torch.bfloat16) for fused in (True, False)]
    before = found(both[0], torch.bfloat16)[""]
    for model in both:
        model.zero_grad()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    move(parameter)
    ours, theirs = (found(model, torch.bfloat16)[""].float() for model in both)
    assert (ours - theirs).norm() < 0.1 * (ours - before.float()).norm()
    fresh = made(True, torch.bfloat16)
    fresh.load_state_dict(both[0].state_dict())
    assert torch.equal(found(fresh, torch.bfloat16)[""], ours.to(torch.bfloat16))


def test_two_passes_may_come_before_a_backward():
    model = made(True, torch.bfloat16, policy="full")
    once = found(model, torch.bfloat16)
    model.zero_grad()
    sum(predicted(model, torch.bfloat16).float().mul(weight).sum() for weight in (0.0, 1.0)).backward()
    model.zero_grad()
    again = found(model, torch.bfloat16)
    assert all(torch.equal(one, again[name]) for name, one in once.items())


def test_float32_needs_no_copies():
    model = made(True)
    found(model)
    groups = [one.group or one.joined for one in model.modules() if isinstance(one, adapted.TrainedLinear)]
    assert not any(group.casts for group in groups if group)
    assert not model._forward_pre_hooks


# --- Parts. ---


def test_norm_and_rotary_embedding_are_diffusers():
    torch.manual_seed(0)
    tables = FluxTransformer2DModel(**NARROW).pos_embed(position_ids(3, 5, torch.device("cpu"), plane=2))
    norm = nn.RMSNorm(16, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(2, 15, 3, 16, requires_grad=True)
    grad = torch.randn(x.shape)
    expected = apply_rotary_emb(norm(x), tables, sequence_dim=1)
    gradients = torch.autograd.grad(expected, [x, norm.weight], grad)
    ours = blocks.norm_and_rotate(x, norm.weight, *tables, 1e-6)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(ours, [x, norm.weight], grad), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["norm_and_rotate", "norm_and_modulate", "scale_and_add"])
def test_each_parts_gradient_is_that_of_its_function(name):
    torch.manual_seed(0)
    vectors, tokens = [torch.randn(2, 1, 8).double() for _ in range(2)], torch.randn(2, 3, 8).double()
    angles = torch.randn(3, 2).double().repeat_interleave(2, dim=1)
    given = {
        "norm_and_rotate": (torch.randn(2, 3, 2, 4).double(), torch.randn(3, 4).double(), angles.cos(), angles.sin()),
        "norm_and_modulate": (tokens, *vectors),
        "scale_and_add": (tokens, vectors[0], torch.randn(2, 3, 8).double()),
    }[name]
    wanted = 2 if name == "norm_and_rotate" else 3
    given = [one.requires_grad_(place < wanted) for place, one in enumerate(given)]
    eps = [] if name == "scale_and_add" else [1e-3]
    assert torch.autograd.gradcheck(getattr(blocks, name), (*given, *eps))


def test_tables_are_made_once_for_each_size():
    model = made(True)
    first, other = (
        torch.cat([torch.zeros(5, 3), position_ids(*size, torch.device("cpu"))]) for size in ((3, 4), (4, 3))
    )
    tables = model.pos_embed(first)
    assert model.pos_embed(first.clone()) is tables
    assert not torch.equal(model.pos_embed(other)[0], tables[0])
    expected = FluxTransformer2DModel(**NARROW).pos_embed(other)
    assert all(map(torch.equal, model.pos_embed(other), expected))
    for count in range(2 * blocks.TABLES_KEPT):
        model.pos_embed(position_ids(1, count + 1, torch.device("cpu")))
    assert len(model.pos_embed.known) == blocks.TABLES_KEPT


def test_a_compiler_can_follow_each_block_and_takes_all_of_a_kind_for_one():
    torch._dynamo.reset()
    deep = {"num_layers": 3, "num_single_layers": 3}
    model, eager = (made(True, torch.bfloat16, **deep) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert error(found(model, torch.bfloat16), found(eager, torch.bfloat16)) < 2e-2
    # The first block's input needs no gradient, and that of the first single block lies otherwise: so with diffusers.
    assert counter.frame_count == 4
