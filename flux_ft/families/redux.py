"""FLUX.1 Redux: a picture as words. SigLIP's states of it, projected to T5's width, follow the prompt's own.

Shapes in names: B batch, L text tokens, N picture tokens (729 of SigLIP at 384 px), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux import ReduxImageEncoder
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor, nn
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from flux_ft.errors import ModelError
from flux_ft.families.hub import is_hub_id, load_part
from flux_ft.types import TextCond

REDUX = "black-forest-labs/FLUX.1-Redux-dev"
"""For FLUX.1-dev and schnell; gated, and under dev's own licence."""
_FILES = (
    "feature_extractor/preprocessor_config.json",
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "image_embedder/config.json",
    "image_embedder/diffusion_pytorch_model.safetensors",
)
_EXPECTED = f"{REDUX}, or a folder laid out like it: feature_extractor/, image_encoder/, image_embedder/"


@dataclass(frozen=True)
class Redux:
    """What turns a picture into tokens; in evaluation mode, frozen."""

    processor: Any
    encoder: nn.Module
    embedder: nn.Module


def redux_at_hand(source: str = REDUX) -> bool:
    """Whether `load_redux` will find it here, in a folder or in the Hub's cache; nothing is fetched."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return all((folder / name).is_file() for name in _FILES)
    return is_hub_id(source) and all(isinstance(try_to_load_from_cache(source, name), str) for name in _FILES)


def load_redux(source: str = REDUX, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Redux:
    """Redux of a folder or a Hub id, fetched if it is not at hand; `device` None is the CPU. Raises ModelError."""
    # Pillow's processor, the one that the diffusers pipeline has where torchvision is not installed.
    processor = load_part(SiglipImageProcessorPil, source, "feature_extractor", _EXPECTED)
    encoder = load_part(SiglipVisionModel, source, "image_encoder", _EXPECTED, dtype)
    embedder = load_part(ReduxImageEncoder, source, "image_embedder", _EXPECTED, dtype)
    width, wanted = encoder.config.hidden_size, embedder.config.redux_dim
    if width != wanted:
        raise ModelError(f"{source}: `image_encoder` is {width} wide, `image_embedder` takes {wanted}", hint=_EXPECTED)
    models = (model.to(device or "cpu").eval().requires_grad_(False) for model in (encoder, embedder))
    return Redux(processor, *models)


@torch.no_grad()
def redux_tokens(redux: Redux, image: Image.Image) -> Tensor:
    """The picture, squeezed to SigLIP's square, as tokens (1, N, D), D being T5's width."""
    weight = next(redux.encoder.parameters())
    pixels = redux.processor.preprocess(images=image, do_resize=True, do_convert_rgb=True, return_tensors="pt")
    states_1ND = redux.encoder(pixels["pixel_values"].to(weight.device, weight.dtype)).last_hidden_state
    tokens_1ND: Tensor = redux.embedder(states_1ND).image_embeds
    return tokens_1ND


def with_redux(text: TextCond, tokens_1ND: Tensor, strength: float = 1.0) -> TextCond:
    """The texts with the picture's tokens after each, multiplied by `strength`.

    1 is FluxPriorReduxPipeline with its scales at 1. 0 leaves them out, which is the text to the bit; as zeros they
    would still be attended to. Raises ModelError when the tokens are of another width than T5's states.
    """
    width, wanted = tokens_1ND.shape[-1], text.embeds_BLD.shape[-1]
    if width != wanted:
        raise ModelError(
            f"this Redux makes tokens of {width} numbers, the model's text encoder of {wanted}",
            hint="take the Redux that was made for this model",
        )
    if strength == 0:
        return text
    shown_1ND = (tokens_1ND * strength).to(text.embeds_BLD)
    shown_BND = shown_1ND.expand(len(text.embeds_BLD), -1, -1)
    return TextCond(torch.cat([text.embeds_BLD, shown_BND], dim=1), text.pooled_BP)
