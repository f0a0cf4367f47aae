"""Finished LoRAs on a denoiser: many at a time, any of them acting, each as strongly as wanted.

Control LoRAs (BFL's for depth and canny, flux-tiny's) bring three things more: factors for an input layer that takes
more channels than the model has, what is added to biases, and norms that are replaced.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from torch import Tensor, nn

from flux_ft.adapters import lora
from flux_ft.errors import AdapterError
from flux_ft.types import AdapterState

INPUT = "x_embedder"
"""The layer that takes the latents, and beside them what else a model is shown."""


class Attachments:
    """The LoRAs on one denoiser. None acts until `activate` names it."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._norms: dict[str, dict[str, Tensor]] = {}
        self._original_norms: dict[str, Tensor] = {}
        first = getattr(denoiser, INPUT, None)
        self._inputs: dict[int, nn.Module] = {first.in_features: first} if first is not None else {}
        self._own_width = next(iter(self._inputs), 0)
        self._widths: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """What is attached, in that order."""
        return tuple(self._widths)

    def attach(
        self,
        name: str,
        state: AdapterState,
        *,
        width: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        label: str | None = None,
    ) -> None:
        """Put a LoRA on, on `device` or where the weights are that it acts on. AdapterError if it misfits.

        `label` is what messages call it, if not `name`.

        Factors for the input layer belong to one width of it: the LoRA's own, or `width` features if that is more;
        those beyond the LoRA's own it leaves alone.
        """
        self.activate({})
        layer = state.layers.get(INPUT)
        wanted = max(self._own_width, width or 0, layer.down_RI.shape[1] if layer else 0)
        if self._inputs:
            self._show_input(wanted)
        if layer is not None:
            state = replace(state, layers=state.layers | {INPUT: _padded(layer, wanted)})
        lora.check_fit(self._denoiser, state, label or name)
        biases, norms = _extras(self._denoiser, state, label or name)
        lora.inject(
            self._denoiser, name,
            {path: one.rank for path, one in state.layers.items()},
            {path: one.alpha for path, one in state.layers.items()},
            bias=bool(biases),
        )  # fmt: skip
        for path, module in lora.layers_of(self._denoiser, name):
            place = device or module.get_base_layer().weight.device
            lora.write(module.lora_A[name], state.layers[path].down_RI, place, dtype)
            lora.write(module.lora_B[name], state.layers[path].up_OR, place, dtype, biases.get(path))
        if self._inputs:
            self._inputs[wanted] = self._denoiser.get_submodule(INPUT)
        self._norms[name] = norms
        for path in norms:
            self._original_norms.setdefault(path, self._denoiser.get_parameter(path).detach().clone())
        self._widths[name] = wanted if layer is not None else self._own_width
        self.activate({})

    def detach(self, name: str) -> None:
        """Take a LoRA off."""
        self.activate({})
        for module in self._peft_modules():
            if name in module.lora_A:
                module.delete_adapter(name)
        del self._norms[name], self._widths[name]

    def activate(self, strengths: Mapping[str, float]) -> None:
        """Let just these act, in this order, each by its strength; one of strength 0 is as good as absent."""
        acting = {name: strength for name, strength in strengths.items() if strength != 0}
        for module in self._peft_modules():
            here = [name for name in acting if name in module.lora_A]
            module.set_adapter(here)
            for name in here:
                module.scaling[name] = module.lora_alpha[name] * acting[name] / module.r[name]
            module.requires_grad_(False)  # peft makes active adapters trainable
        if self._inputs:
            self._show_input(max([self._own_width, *(self._widths[name] for name in acting)]))
        with torch.no_grad():
            for path, original in self._original_norms.items():
                norm = self._denoiser.get_parameter(path)
                norm.copy_(original)
                for name, strength in acting.items():
                    if (new := self._norms[name].get(path)) is not None:
                        new = new.to(norm)
                        norm.copy_(new if strength == 1 else norm + strength * (new - original))

    def _show_input(self, width: int) -> None:
        """Give the model its input layer of `width` features; the further ones of a new one are zero."""
        if width not in self._inputs:
            own = self._inputs[self._own_width]
            linear = own.get_base_layer() if isinstance(own, PeftLoraLayer) else own
            self._inputs[width] = widened(cast(nn.Linear, linear), width)
        setattr(self._denoiser, INPUT, self._inputs[width])

    def _peft_modules(self) -> list[Any]:
        hidden = [module for module in self._inputs.values() if isinstance(module, PeftLoraLayer)]
        shown = [module for module in self._denoiser.modules() if isinstance(module, PeftLoraLayer)]
        return [*shown, *(module for module in hidden if all(module is not one for one in shown))]


def attach_states(
    denoiser: nn.Module, adapters: Sequence[tuple[str, AdapterState, float]], device: torch.device | None = None
) -> Attachments:
    """Attach finished LoRAs, each (name, state, strength), all active at once. Raises AdapterError if one misfits."""
    attachments = Attachments(denoiser)
    for name, state, _ in adapters:
        attachments.attach(name, state, device=device)
    attachments.activate({name: strength for name, _, strength in adapters})
    return attachments


def widened(linear: nn.Linear, in_features: int) -> nn.Linear:
    """A linear that takes more features and ignores those beyond the old ones; its bias is the same parameter."""
    weight = linear.weight
    wide = nn.Linear(in_features, linear.out_features, bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : linear.in_features] = weight
    wide.bias = linear.bias
    return wide.requires_grad_(False)


def _padded(layer: Any, width: int) -> Any:
    missing = width - layer.down_RI.shape[1]
    return replace(layer, down_RI=nn.functional.pad(layer.down_RI, (0, missing))) if missing > 0 else layer


def _extras(denoiser: nn.Module, state: AdapterState, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is added to the biases of adapted modules, by module; norms that are replaced, by parameter."""
    biases, norms = {}, {}
    shapes = {path: parameter.shape for path, parameter in denoiser.named_parameters()}
    for path, value in state.extras.items():
        module, _, kind = path.rpartition(".")
        if kind == "bias" and module in state.layers:
            biases[module] = value
        elif kind == "weight" and shapes.get(path) == value.shape and value.ndim == 1:
            norms[path] = value
        else:
            raise AdapterError(
                f"{name}: changes `{path}`, which cannot be put on this model",
                hint="the LoRA was made for another model; `flux-ft inspect` says which",
            )
    return biases, norms
