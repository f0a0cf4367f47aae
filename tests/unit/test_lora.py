"""LoRA on a model: which linears, how they start, what is read off, and what does not fit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from flux_ft.adapters import lora
from flux_ft.adapters.attached import attach_states
from flux_ft.errors import AdapterError, ConfigError
from flux_ft.types import AdapterState, LoraLayer

LINEARS = [
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.2",
    "transformer_blocks.1.attn.to_q",
    "transformer_blocks.10.attn.to_q",
    "single_transformer_blocks.0.attn.to_q",
    "single_transformer_blocks.0.proj_out",
]
ATTENTION = [path for path in LINEARS if ".attn." in path]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(width, width), "to_k": nn.Linear(width, width)})
        self.ff = nn.Linear(width, 4 * width)


class Model(nn.Module):
    """Names as in FLUX.1, including a path that ends another one's, and a block number that begins another's."""

    def __init__(self, width=8):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(width) for _ in range(11)])
        self.single_transformer_blocks = nn.ModuleList([Block(width)])
        self.requires_grad_(False)


ALL = [name for name, module in Model().named_modules() if isinstance(module, nn.Linear)]
Q0 = "transformer_blocks.0.attn.to_q"


def attached(targets=ALL, rank=2, alpha=3.0, seed=0, dropout=0.0):
    model = Model()
    return model, lora.attach_new(model, targets, rank, alpha, dropout, seed)


def random_state(paths, rank=2, alpha=3.0):
    sizes = dict(Model().named_modules())
    layers = {}
    for path in paths:
        out, into = sizes[path].weight.shape
        layers[path] = LoraLayer(torch.randn(rank, into), torch.randn(out, rank), alpha)
    return AdapterState(layers)


# --- Choosing. ---


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("blocks", LINEARS),
        ("attention", ATTENTION),
        ([r".*\.to_q"], [path for path in LINEARS if path.endswith("to_q")]),
        ([r"transformer_blocks\.1\..*"], ["transformer_blocks.1.attn.to_q"]),
        ([r"single_.*", r".*proj_out"], LINEARS[-2:]),
        (("single_.*", r"transformer_blocks\.0\.norm1\.linear"), [LINEARS[0], *LINEARS[-2:]]),
    ],
)
def test_targets_keep_the_models_order(targets, chosen):
    assert lora.choose_targets(LINEARS, targets) == chosen


@pytest.mark.parametrize("pattern", ["to_q", "attn", "transformer_blocks.2.*", "x_embedder"])
def test_a_pattern_that_matches_nothing_is_refused(pattern):
    with pytest.raises(ConfigError) as caught:
        lora.choose_targets(LINEARS, [r".*\.to_q", pattern])
    assert repr(pattern) in caught.value.message
    assert "lora.targets" in caught.value.message
    assert "whole path" in caught.value.hint


def test_a_broken_pattern_is_refused():
    with pytest.raises(ConfigError, match="not a regular expression"):
        lora.choose_targets(LINEARS, ["("])


@pytest.mark.parametrize("pattern", ["to_q", "("])
def test_a_pattern_for_something_else_is_refused_by_its_own_setting(pattern):
    with pytest.raises(ConfigError) as caught:
        lora.choose_targets(LINEARS, [pattern], "full.train", "weights of the model")
    assert caught.value.message.startswith(f"`full.train`: {pattern!r}")
    assert "lora" not in caught.value.message
    assert pattern == "(" or f"{len(LINEARS)} weights of the model" in caught.value.message


# --- Attaching. ---


def test_exactly_the_targets_are_trained():
    model, parameters = attached([Q0, "single_transformer_blocks.0.ff"])
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert len(parameters) == len(trained) == 4
    assert {name.split(".lora_")[0] for name in trained} == {Q0, "single_transformer_blocks.0.ff"}
    assert {id(one) for one in parameters} == {id(one) for one in model.parameters() if one.requires_grad}


def test_a_path_that_ends_or_begins_another_is_not_confused():
    for path in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff"):
        model, _ = attached([path])
        assert list(lora.read_trained(model).layers) == [path]


def test_a_new_lora_changes_nothing_and_is_float32():
    torch.manual_seed(0)
    model = Model().bfloat16()
    x = torch.randn(3, 8).bfloat16()
    before = model.transformer_blocks[0].ff(x)
    parameters = lora.attach_new(model, ALL, 2, 3.0, 0.0, 0)
    assert torch.equal(model.transformer_blocks[0].ff(x), before)
    assert {one.dtype for one in parameters} == {torch.float32}
    assert all(not one.any() for one in parameters[1::2])
    assert all(one.any() for one in parameters[::2])


def gradients(layer, x, policy_dtype=None):
    """The result of an adapted linear and its gradients, by name."""
    layer.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=policy_dtype is torch.bfloat16):
        out = layer(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    factors = {name: one.grad for name, one in layer.named_parameters() if one.grad is not None}
    return {"out": out.detach(), "x": x.grad, **factors}


def trained_and_pefts(monkeypatch, bias=True, **options):
    """One adapted linear with values in both factors, as it is trained and as peft computes it."""
    torch.manual_seed(0)
    model, parameters = attached([Q0], rank=4, **options)
    layer = model.transformer_blocks[0].attn["to_q"]
    if not bias:
        layer.base_layer.bias = None
    with torch.no_grad():
        parameters[1].normal_()
    x = torch.randn(2, 5, 8)

    def both(dtype=None, x=x):
        peft = type(layer).__mro__[1]
        ours = gradients(layer, x, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(type(layer), "forward", peft.forward)
            return ours, gradients(layer, x, dtype)

    return layer, both


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", [4.0, 3.0])
def test_a_trained_linear_computes_what_pefts_does(monkeypatch, alpha, bias):
    layer, both = trained_and_pefts(monkeypatch, bias, alpha=alpha)
    ours, theirs = both()
    assert type(layer) is lora.TrainedLinear
    assert len(ours) == 4
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        torch.testing.assert_close(one, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_trained_linear_is_as_exact_in_bf16_as_pefts(monkeypatch):
    layer, both = trained_and_pefts(monkeypatch)
    layer.base_layer.bfloat16()
    x = torch.randn(2, 5, 8).bfloat16()
    ours, theirs = both(torch.bfloat16, x)
    layer.base_layer.float()
    exact = both(x=x.float())[0]
    assert ours["out"].dtype is ours["x"].dtype is torch.bfloat16
    for name, one in exact.items():
        error, pefts = ((got[name].float() - one).norm() / one.norm() for got in (ours, theirs))
        assert error < max(1.2 * pefts, 2**-8)
        assert name in ("out", "x") or ours[name].dtype is torch.float32


@pytest.mark.parametrize("how", ["thawed", "disabled", "dropout"])
def test_what_is_no_plain_lora_on_a_frozen_linear_is_left_to_peft(monkeypatch, how):
    layer, both = trained_and_pefts(monkeypatch, dropout=0.5 if how == "dropout" else 0.0)
    layer.eval()  # no draws
    if how == "thawed":
        layer.base_layer.requires_grad_(True)
    layer.enable_adapters(how != "disabled")
    ours, theirs = both()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(one, theirs[name]) for name, one in ours.items())
    assert ("base_layer.weight" in ours) is (how == "thawed")


def test_down_is_uniform_within_its_bound():
    model = Model(width=64)
    lora.attach_new(model, ALL, 32, 32.0, 0.0, 0)
    down = lora.read_trained(model).layers[Q0].down_RI
    bound = 1 / 64**0.5
    assert float(down.abs().max()) <= bound
    assert float(down.abs().max()) > 0.98 * bound
    assert float(down.mean()) == pytest.approx(0, abs=0.05 * bound)
    assert float(down.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_a_modules_start_depends_on_seed_and_path_alone():
    torch.manual_seed(1)
    everything = lora.read_trained(attached(ALL)[0]).layers
    torch.manual_seed(2)
    alone = lora.read_trained(attached([Q0])[0]).layers
    backwards = lora.read_trained(attached(ALL[::-1])[0]).layers
    assert torch.equal(everything[Q0].down_RI, alone[Q0].down_RI)
    assert all(torch.equal(everything[path].down_RI, backwards[path].down_RI) for path in ALL)
    other_seed = lora.read_trained(attached(ALL, seed=1)[0]).layers
    assert not torch.equal(everything[Q0].down_RI, other_seed[Q0].down_RI)
    same_shape = [path for path in ALL if path.endswith("to_q")]
    assert len({float(everything[path].down_RI[0, 0]) for path in same_shape}) == len(same_shape)


def test_attaching_leaves_the_global_state_alone():
    """peft draws nothing either, since its own initialisation is off … or it would move dropout's draws."""
    lora_layers = lora.read_trained(attached()[0]).layers
    torch.manual_seed(4)
    again = lora.read_trained(attached()[0]).layers
    assert all(torch.equal(lora_layers[path].down_RI, again[path].down_RI) for path in ALL)


# --- Reading and writing. ---


def test_what_the_factors_hold_is_read():
    model, parameters = attached(rank=2, alpha=3.0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape))
    back = lora.read_trained(model)
    assert list(back.layers) == ALL
    named = dict(model.named_parameters())
    for path, layer in back.layers.items():
        assert torch.equal(layer.down_RI, named[f"{path}.lora_A.trained.weight"])
        assert torch.equal(layer.up_OR, named[f"{path}.lora_B.trained.weight"])
        assert layer.alpha == 3.0


def test_what_is_read_is_a_copy():
    model, parameters = attached([Q0])
    state = lora.read_trained(model)
    before = state.layers[Q0].down_RI.clone()
    with torch.no_grad():
        parameters[0].add_(1)
    assert torch.equal(state.layers[Q0].down_RI, before)


# --- Finished LoRAs. ---


def test_attached_adds_its_delta():
    model, x = Model(), torch.randn(4, 8)
    before = model.transformer_blocks[0].attn["to_q"](x)
    state = random_state([Q0])
    layer = state.layers[Q0]
    attach_states(model, [("one", state, 0.5)])
    delta = 0.5 * layer.alpha / layer.rank * layer.up_OR @ layer.down_RI
    torch.testing.assert_close(model.transformer_blocks[0].attn["to_q"](x), before + x @ delta.T, rtol=1e-5, atol=1e-5)
    assert not any(one.requires_grad for one in model.parameters())


def test_attached_to_bf16_weights_it_is_float32_and_lies_where_it_is_told():
    model = Model().bfloat16()
    attach_states(model, [("one", random_state([Q0]), 1.0)], torch.device("meta"))
    factors = {name: one for name, one in model.named_parameters() if ".lora_" in name}
    assert {one.device.type for one in factors.values()} == {"meta"}
    assert {one.dtype for one in factors.values()} == {torch.float32}
    assert len(factors) == 2


def test_mixed_ranks_and_alphas_in_one_lora():
    model, x = Model(), torch.randn(4, 8)
    paths = [Q0, "transformer_blocks.0.attn.to_k", "transformer_blocks.10.attn.to_q"]
    layers = {}
    for number, path in enumerate(paths, start=1):
        layers |= random_state([path], rank=number, alpha=2.0 * number + 1).layers
    base = {path: model.get_submodule(path)(x) for path in paths}
    attach_states(model, [("one", AdapterState(layers), 1.0)])
    for path in paths:
        layer = layers[path]
        expected = base[path] + x @ (layer.alpha / layer.rank * layer.up_OR @ layer.down_RI).T
        torch.testing.assert_close(model.get_submodule(path)(x), expected, rtol=1e-5, atol=1e-5)


def test_merging_keeps_the_dtype_and_sums_in_float32():
    model = Model().bfloat16()
    weight = model.get_submodule(Q0).weight.clone()
    state = random_state([Q0])
    layer = state.layers[Q0]
    lora.merge_state(model, state, 0.01)
    expected = weight.float() + 0.01 * layer.alpha / layer.rank * layer.up_OR @ layer.down_RI
    merged = model.get_submodule(Q0).weight
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.float(), expected, rtol=2**-8, atol=1e-6)


def test_a_lora_for_another_model_is_refused_before_anything_changes():
    good = random_state([Q0])
    foreign = AdapterState(good.layers | {"transformer_blocks.11.attn.to_q": good.layers[Q0]})
    layer = good.layers[Q0]
    wide = AdapterState({Q0: replace(layer, down_RI=torch.zeros(2, 9))})
    for state, words in ((foreign, "transformer_blocks.11.attn.to_q"), (wide, "8×9")):
        model = Model()
        before = model.get_submodule(Q0).weight.clone()
        with pytest.raises(AdapterError) as caught:
            lora.merge_state(model, state, 1.0, "mine.safetensors")
        assert "mine.safetensors" in caught.value.message
        assert words in caught.value.message
        assert torch.equal(model.get_submodule(Q0).weight, before)
        with pytest.raises(AdapterError, match=r"mine\.safetensors"):
            attach_states(model, [("mine.safetensors", state, 1.0)])


def test_a_module_that_is_no_linear_does_not_fit():
    layer = LoraLayer(torch.zeros(1, 8), torch.zeros(8, 1), 1.0)
    with pytest.raises(AdapterError, match="does not have"):
        lora.check_fit(Model(), AdapterState({"transformer_blocks.0.attn": layer}), "x")


def test_a_module_whose_name_ends_another_is_adapted_alone():
    model = Model()
    model.proj_out = nn.Linear(8, 8)
    deep = "transformer_blocks.0.proj_out"
    model.transformer_blocks[0].proj_out = nn.Linear(8, 8)
    layers = {
        path: LoraLayer(torch.ones(rank, 8), torch.ones(8, rank), alpha)
        for path, rank, alpha in (("proj_out", 3, 6.0), (deep, 2, 1.0))
    }
    x_BI = torch.ones(1, 8)
    before = [model.get_submodule(path)(x_BI) for path in layers]
    attach_states(model, [("one", AdapterState(layers), 1.0)])
    added = [model.get_submodule(path)(x_BI) - old for path, old in zip(layers, before, strict=True)]
    assert [float(one.mean()) for one in added] == pytest.approx([8 * 3 * 2.0, 8 * 2 * 0.5])
    assert sum(hasattr(module, "lora_A") for module in model.modules()) == 2
