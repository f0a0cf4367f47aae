"""LoRA on a denoiser: attaching by peft, reading off, merging.

Shapes in names: B batch and tokens, R rank, O out features, I in features.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from torch import Tensor, nn

from flux_ft import flow
from flux_ft.adapters.adapted import TRAINED as TRAINED
from flux_ft.adapters.adapted import TrainedLinear
from flux_ft.errors import AdapterError, ConfigError
from flux_ft.types import AdapterState, LoraLayer

ATTENTION = r".*\.attn\..*"


def choose_targets(
    names: Sequence[str],
    targets: str | Sequence[str],
    setting: str = "lora.targets",
    what: str = "linears inside the blocks",
) -> list[str]:
    """Those of `names` that are trained: "blocks" is all, "attention" the attention's, else regexes.

    `setting` and `what` are for the ConfigError when a regular expression is broken or matches nothing.
    """
    if targets == "blocks":
        return list(names)
    patterns = [ATTENTION] if targets == "attention" else list(targets)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            matched = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ConfigError(f"`{setting}`: {pattern!r} is not a regular expression: {error}") from error
        if not matched:
            raise ConfigError(
                f"`{setting}`: {pattern!r} matches none of the {len(names)} {what}",
                hint=f"the whole path must match, for example {re.escape(names[0])!r} or '.*attn.*'",
            )
        chosen |= matched
    return [name for name in names if name in chosen]


def attach_new(
    denoiser: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    linear: type[PeftLinear] | None = TrainedLinear,
) -> list[nn.Parameter]:
    """Attach a LoRA that changes nothing yet (up = 0), in float32, and return its parameters.

    Each down matrix is drawn for its own path, so the same module starts alike whatever else is adapted; the bound is
    peft's own, Kaiming uniform with a = sqrt(5), which is 1 / sqrt(in features). `linear` is what peft makes of each,
    None its own.
    """
    ranks, alphas = dict.fromkeys(targets, rank), dict.fromkeys(targets, alpha)
    inject(denoiser, TRAINED, ranks, alphas, dropout, linear=linear)
    parameters = []
    for path, layer in layers_of(denoiser, TRAINED):
        down, up = layer.lora_A[TRAINED], layer.lora_B[TRAINED]
        down.to(torch.float32)
        up.to(torch.float32)
        bound = 1 / math.sqrt(down.weight.shape[1])
        with torch.no_grad():
            drawn = torch.rand(down.weight.shape, generator=flow.keyed_generator(seed, "lora", path))
            down.weight.copy_((2 * drawn - 1) * bound)
            up.weight.zero_()
        parameters += [down.weight, up.weight]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def merge_state(denoiser: nn.Module, state: AdapterState, strength: float, name: str = "LoRA") -> None:
    """Add strength · ΔW to the weights in place; the sum is taken in float32. Raises AdapterError if it misfits."""
    check_fit(denoiser, state, name)
    for path, layer in state.layers.items():
        linear = cast(nn.Linear, denoiser.get_submodule(path))
        if type(linear) is not nn.Linear:
            raise AdapterError(f"{name}: `{path}` is a {type(linear).__name__}, into which nothing can be merged")
        weight = linear.weight
        delta_OI = layer.up_OR.float() @ layer.down_RI.float() * (strength * layer.alpha / layer.rank)
        with torch.no_grad():
            weight.copy_((weight.float() + delta_OI.to(weight.device)).to(weight.dtype))


@contextmanager
def detached(denoiser: nn.Module) -> Iterator[None]:
    """Within, the denoiser is the base model: no LoRA acts."""
    layers = [module for module in denoiser.modules() if isinstance(module, PeftLoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def read_trained(denoiser: nn.Module) -> AdapterState:
    """The LoRA that training attached, on the CPU in float32. The tensors are copies."""
    layers = {}
    for path, layer in layers_of(denoiser, TRAINED):
        down = layer.lora_A[TRAINED].weight.detach().float().cpu().clone()
        up = layer.lora_B[TRAINED].weight.detach().float().cpu().clone()
        layers[path] = LoraLayer(down_RI=down, up_OR=up, alpha=float(layer.lora_alpha[TRAINED]))
    return AdapterState(layers)


def check_fit(denoiser: nn.Module, state: AdapterState, name: str) -> None:
    """Raise AdapterError, naming the first module that differs, unless every layer has a linear of its shape."""
    # Features, not shapes: the weights of quantised linears are packed.
    linears = {path: module for path, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    for path, layer in state.layers.items():
        path_in_model = path if path in linears else f"{path}.base_layer"
        if path_in_model not in linears:
            raise AdapterError(
                f"{name}: adapts `{path}`, which this model does not have",
                hint="the LoRA was made for another model; see its `modelspec.architecture`",
            )
        linear = linears[path_in_model]
        want = (linear.out_features, linear.in_features)
        got = (layer.up_OR.shape[0], layer.down_RI.shape[1])
        if want != got:
            raise AdapterError(
                f"{name}: `{path}` changes a {got[0]}×{got[1]} matrix, this model's is {want[0]}×{want[1]}",
                hint="the LoRA was made for a model of another size",
            )


def inject(
    denoiser: nn.Module,
    name: str,
    ranks: dict[str, int],
    alphas: dict[str, float],
    dropout: float = 0.0,
    bias: bool = False,
    linear: type[PeftLinear] | None = None,
) -> None:
    """Put an empty LoRA on the modules that `ranks` names; with `bias`, one that adds to biases too.

    `linear` is what peft makes of a linear, in place of its own.
    """
    config = LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(alphas.values())),
        # Whole paths: peft takes a pattern or a list's entry for the end of a path too, and `proj_out` ends others.
        rank_pattern={f"^{re.escape(path)}": rank for path, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(path)}": alpha for path, alpha in alphas.items()},
        lora_dropout=dropout,
        lora_bias=bias,
        target_modules="|".join(map(re.escape, ranks)),
        init_lora_weights=False,
    )
    if linear is not None:
        config._register_custom_module({nn.Linear: linear})
    with warnings.catch_warnings():  # several LoRAs on one model are meant
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, denoiser, adapter_name=name)
    attached = {path for path, _ in layers_of(denoiser, name)}
    assert attached == set(ranks), (
        f"peft adapted {len(attached)} modules, not {len(ranks)}: {min(attached ^ set(ranks))}"
    )


def layers_of(denoiser: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """The modules that carry the LoRA `name`, by path."""
    for path, module in denoiser.named_modules():
        if isinstance(module, PeftLoraLayer) and name in module.lora_A:
            yield path, module


def write(
    linear: nn.Linear, value: Tensor, device: torch.device, dtype: torch.dtype, bias: Tensor | None = None
) -> None:
    """Set a factor; a bias that it has and that is not given becomes zero."""
    linear.to(device, dtype)
    with torch.no_grad():
        linear.weight.copy_(value)
        if linear.bias is not None:
            linear.bias.zero_() if bias is None else linear.bias.copy_(bias)
    linear.requires_grad_(False)
