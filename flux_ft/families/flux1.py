"""FLUX.1 (dev, Krea, schnell) and flux-tiny, which is the same classes at toy size.

Shapes in names: B batch, C latent channels, H W latent grid, N packed tokens, L text tokens, D width, P pooled width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from flux_ft import flow, log
from flux_ft.errors import ModelError, first_line, some_of
from flux_ft.families import layout, quantize
from flux_ft.families.ahead import read_ahead
from flux_ft.families.base import ImageInput, Variant
from flux_ft.families.hub import find_weights, load_part
from flux_ft.families.reading import Carrier, fill, mapped
from flux_ft.families.tokens import CLIP_TOKENS
from flux_ft.types import ImageCond, TextCond


@dataclass(frozen=True)
class TextStack:
    """FLUX.1's two text encoders with their tokenizers."""

    clip_tokenizer: Any
    clip: nn.Module
    t5_tokenizer: Any
    t5: nn.Module


@dataclass(frozen=True)
class Flux1:
    """A FLUX.1 model: `source` is a diffusers folder, a Hub id, or a transformer in one file of the original layout.

    With a single file, tokenizers, encoders and autoencoder come from `parts`, a folder or a Hub id.
    """

    variant: Variant
    source: str
    parts: str

    @property
    def encoders_identity(self) -> str:
        """Sizes and times of the local files too: weights may change under the same path."""
        folder = Path(self.parts)
        facts = [
            f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}:{path.stat().st_mtime_ns}"
            for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            for path in sorted((folder / name).glob("*"))
            if path.is_file()
        ]
        return "|".join([self.variant.family, self.parts, str(self.variant.max_text_tokens), *facts])

    def load_text(self, device: torch.device, dtype: torch.dtype) -> TextStack:
        """Both encoders, in evaluation mode. Raises ModelError when a part is missing."""
        carrier = Carrier(device)
        clip = carrier.bring_all(_load(CLIPTextModel, self.parts, "text_encoder", dtype=dtype)).eval()
        t5 = carrier.bring_all(_load(T5EncoderModel, self.parts, "text_encoder_2", dtype=dtype)).eval()
        return TextStack(
            clip_tokenizer=_load_tokenizer(CLIPTokenizer, self.parts, "tokenizer", clip.config.vocab_size),
            clip=clip,
            t5_tokenizer=_load_tokenizer(T5TokenizerFast, self.parts, "tokenizer_2", t5.config.vocab_size),
            t5=t5,
        )

    def text_encoders(self, stack: TextStack) -> list[tuple[nn.Module, list[nn.Module]]]:
        """CLIP, which is small and stays as a whole, and T5 with its blocks."""
        return [(stack.clip, []), (stack.t5, list(cast(Any, stack.t5).encoder.block))]

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The autoencoder, in evaluation mode, frozen."""
        vae = _load(AutoencoderKL, self.parts, "vae", dtype=dtype)
        return cast(nn.Module, Carrier(device).bring_all(vae).eval().requires_grad_(False))

    def load_denoiser(
        self,
        device: torch.device,
        dtype: torch.dtype,
        storage: quantize.Storage | None = None,
        stream: bool = False,
        home: torch.device | None = None,
    ) -> nn.Module:
        """The transformer, frozen, held as `quantize.hold` says. Raises ModelError when the checkpoint does not fit.

        Its weights are read one at a time, on their way; on a CPU, those of the right dtype stay pages of their file.
        """
        if self.source.endswith(".safetensors"):
            denoiser = _transformer_from_file(Path(self.source), self.parts)
        else:
            denoiser = _transformer_from_folder(self.source, dtype)
        self._require_fit(denoiser.config)
        return quantize.hold(denoiser, self.blocks(denoiser).values(), storage, device, dtype, stream, home)

    def _require_fit(self, config: Any) -> None:
        channels = self.input_features(self.variant.image_input)
        if config.in_channels != channels:
            raise ModelError(
                f"{self.source}: takes {config.in_channels} channels a token, {self.variant.name} takes {channels}",
                hint="name the model it is: flux1-dev, flux1-fill, flux1-canny, flux1-depth or flux1-kontext; "
                "or give it as a folder in the diffusers layout, which says so itself",
            )
        if bool(config.guidance_embeds) != self.variant.guidance_embedded:
            raise ModelError(
                f"{self.source}: has no guidance embedding, as step-distilled models have none",
                hint="train on flux1-dev; or download this one, give the folder, and set `allow_distilled: true`",
            )

    @torch.no_grad()
    def encode_text(self, stack: TextStack, captions: list[str]) -> TextCond:
        """T5's states (B, L, D), L = the variant's text length, and CLIP's pooled vector (B, P).

        Like the diffusers pipeline, padding is attended to: FLUX.1 was trained so.
        """
        device = next(stack.clip.parameters()).device
        clip_ids = stack.clip_tokenizer(
            captions, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        t5_ids = stack.t5_tokenizer(
            captions, padding="max_length", max_length=self.variant.max_text_tokens, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        return TextCond(
            embeds_BLD=stack.t5(t5_ids.to(device)).last_hidden_state,
            pooled_BP=stack.clip(clip_ids.to(device)).pooler_output,
        )

    @torch.no_grad()
    def encode_image(self, vae: Any, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] to mean and standard deviation of the normalised latents (B, C, H, W), float32."""
        weight = next(vae.parameters())
        posterior = vae.encode(pixels_B3HW.to(weight.device, weight.dtype)).latent_dist
        mean_BCHW, std_BCHW = posterior.mean.float(), (posterior.logvar.float() / 2).exp()
        scale = vae.config.scaling_factor
        return (mean_BCHW - vae.config.shift_factor) * scale, std_BCHW * scale

    @torch.no_grad()
    def sample_image(self, vae: Any, pixels_B3HW: Tensor, generator: torch.Generator | None) -> Tensor:
        """Pixels in [-1, 1] to one draw of their normalised latents (B, C, H, W), float32, as diffusers draws it.

        Without a generator the likeliest, which is what Kontext was trained with.
        """
        weight = next(vae.parameters())
        posterior = vae.encode(pixels_B3HW.to(weight.device, weight.dtype)).latent_dist
        raw = posterior.mode() if generator is None else posterior.sample(generator)
        return cast(Tensor, ((raw - vae.config.shift_factor) * vae.config.scaling_factor).float())

    @torch.no_grad()
    def decode_latents(self, vae: Any, latents_BCHW: Tensor) -> Tensor:
        """Normalised latents to pixels_B3HW, float32 in [-1, 1]."""
        weight = next(vae.parameters())
        raw = latents_BCHW / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(raw.to(weight.device, weight.dtype), return_dict=False)[0]
        return cast(Tensor, pixels.float().clamp(-1, 1))

    def latent_shape(self, width_px: int, height_px: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of a picture of this size."""
        return self.variant.latent_channels, height_px // self.vae_scale, width_px // self.vae_scale

    @property
    def vae_scale(self) -> int:
        """Pixels along a side that become one latent; the grid packs 2×2 latents into a token."""
        return self.variant.pixel_multiple // 2

    def input_features(self, image_input: ImageInput) -> int:
        """Features of the input layer of a model that takes such pictures; a token is 2×2 latents."""
        latents = self.variant.latent_channels
        further = {"control": latents, "fill": latents + self.vae_scale**2}.get(image_input, 0)
        return 4 * (latents + further)

    def shift_mu(self, latent_height: int, latent_width: int) -> float:
        """The sigma shift of inference at this size."""
        return flow.resolution_mu(latent_height * latent_width // 4) if self.variant.shifted else 0.0

    def predict_velocity(
        self,
        denoiser: nn.Module,
        z_BCHW: Tensor,
        sigma_B: Tensor,
        text: TextCond,
        guidance: float,
        image: ImageCond | None = None,
    ) -> Tensor:
        """One pass of the transformer: velocity_BCHW at `sigma_B` in [0, 1], in z's dtype."""
        batch, _, height, width = z_BCHW.shape
        shown = image or ImageCond()
        inputs_BCHW = z_BCHW
        if shown.channels_BCHW is not None:
            inputs_BCHW = torch.cat([z_BCHW, shown.channels_BCHW.to(z_BCHW)], dim=1)
        tokens_BND, ids_N3 = pack(inputs_BCHW), position_ids(height // 2, width // 2, z_BCHW.device)
        count = tokens_BND.shape[1]
        if shown.reference_BCHW is not None:
            reference_BCHW = shown.reference_BCHW.to(z_BCHW)
            rows, columns = (side // 2 for side in reference_BCHW.shape[2:])
            tokens_BND = torch.cat([tokens_BND, pack(reference_BCHW)], dim=1)
            ids_N3 = torch.cat([ids_N3, position_ids(rows, columns, z_BCHW.device, plane=1)])
        velocity_BND = denoiser(
            hidden_states=tokens_BND,
            timestep=sigma_B.to(z_BCHW.dtype),
            guidance=torch.full((batch,), guidance, device=z_BCHW.device) if self.variant.guidance_embedded else None,
            pooled_projections=text.pooled_BP,
            encoder_hidden_states=text.embeds_BLD,
            txt_ids=torch.zeros(text.embeds_BLD.shape[1], 3, device=z_BCHW.device),
            img_ids=ids_N3,
            return_dict=False,
        )[0]
        return unpack(velocity_BND[:, :count], height, width)

    def blocks(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The double blocks, then the single ones."""
        return {
            f"{name}.{index}": block
            for name in ("transformer_blocks", "single_transformer_blocks")
            for index, block in enumerate(cast(nn.ModuleList, denoiser.get_submodule(name)))
        }

    def lora_targets(self, denoiser: nn.Module) -> list[str]:
        """Every linear inside a block, by module path, in the model's own order."""
        return [
            f"{path}.{name}"
            for path, block in self.blocks(denoiser).items()
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]


def pack(latents_BCHW: Tensor) -> Tensor:
    """Each 2×2 patch of latents becomes one token (B, N = H·W/4, 4·C), channels outermost."""
    batch, channels, height, width = latents_BCHW.shape
    patches = latents_BCHW.view(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens_BND: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `pack` for a latent grid of `height` × `width`."""
    batch, _, dim = tokens_BND.shape
    patches = tokens_BND.view(batch, height // 2, width // 2, dim // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, dim // 4, height, width)


def position_ids(rows: int, columns: int, device: torch.device, plane: int = 0) -> Tensor:
    """(rows·columns, 3): the plane, the row and the column of each token; a picture shown to Kontext is plane 1."""
    axes = [torch.arange(count, device=device, dtype=torch.float32) for count in (rows, columns)]
    row, column = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(row, plane), row, column], dim=-1).reshape(-1, 3)


_WHOLE = "a whole FLUX.1 model in the diffusers layout, as `hf download` writes it"


def _load(cls: Any, source: str, subfolder: str, dtype: torch.dtype | None = None) -> Any:
    return load_part(cls, source, subfolder, _WHOLE, dtype)


def _load_tokenizer(cls: Any, source: str, subfolder: str, vocab_size: int) -> Any:
    """transformers makes an empty tokenizer where the vocabulary is missing, so its size is held to the encoder's."""
    tokenizer = _load(cls, source, subfolder)
    if len(tokenizer) < 0.9 * vocab_size:  # T5's encoder has a few rows more than its tokenizer has words
        raise ModelError(
            f"{source}: `{subfolder}` knows {len(tokenizer):,} tokens, its encoder {vocab_size:,}; files are missing",
            hint="download it again",
        )
    return tokenizer


def _outline(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config)


def _transformer_from_folder(source: str, dtype: torch.dtype) -> Any:
    """The transformer of a folder or a Hub id, with mapped weights."""
    label, hint = f"{source}: `transformer`", f"give {_WHOLE}; if it is one, download it again"
    folder, files = find_weights(source, "transformer", _WHOLE)
    read_ahead(files)
    try:
        config = dict(FluxTransformer2DModel.load_config(folder))
        denoiser = _outline(config)
    except Exception as error:
        raise ModelError(f"{label} could not be loaded: {first_line(error)}", hint=f"give {_WHOLE}") from error
    if config.get("quantization_config"):  # diffusers reads what its quantisers have written
        return _load(FluxTransformer2DModel, source, "transformer", dtype=dtype)
    denoiser.register_to_config(_name_or_path=source)
    tensors, wanted = mapped(files), denoiser.state_dict().keys()
    if unused := sorted(tensors.keys() - wanted):
        log.warn(f"{label}: {len(unused)} tensors are of no use: {some_of(unused, 1)}")
    kept = {name: tensor for name, tensor in tensors.items() if name in wanted}
    fill(denoiser, kept, f"{label} does not fit its config.json", hint)
    return denoiser


def _transformer_from_file(path: Path, parts: str) -> Any:
    """The transformer that `parts` describes with the mapped weights of one file, exactly or not at all."""
    read_ahead([path])
    tensors = read_single_file(path)
    try:
        config = dict(FluxTransformer2DModel.load_config(parts, subfolder="transformer"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{parts}: `transformer/config.json`, which says how {path.name} is built, could not be read",
            hint="give as `model_parts` a variant's name, a folder or a Hub id that you can reach",
        ) from error
    denoiser = _outline(config | {"guidance_embeds": any("guidance_embedder" in key for key in tensors)})
    fill(
        denoiser, tensors, f"{path}: does not fit {parts}",
        "give as `model_parts` the folder or Hub id of the model that this checkpoint was made from",
    )  # fmt: skip
    return denoiser


def read_single_file(path: Path) -> dict[str, Tensor]:
    """A transformer's mapped weights of one safetensors file, in diffusers' names. Raises ModelError for others."""
    tensors = mapped([path])
    if any(tensor.dtype.itemsize == 1 for tensor in tensors.values()):
        raise ModelError(f"{path}: holds 8-bit weights", hint="train from the bf16 or fp16 file of the same model")
    if not layout.is_original(tensors):
        if any(key.startswith("transformer_blocks.0.attn.to_q") for key in tensors):
            return tensors
        raise ModelError(
            f"{path}: no FLUX.1 transformer inside; its first tensor is {min(tensors, default='nothing')}",
            hint="expected a transformer in the original layout (double_blocks…, single_blocks…) or in diffusers'",
        )
    try:
        return layout.to_diffusers(tensors)
    except KeyError as error:
        raise ModelError(f"{path}: has a tensor that FLUX.1 does not: {error}") from error
    except (ValueError, IndexError, RuntimeError) as error:
        raise ModelError(f"{path}: has a tensor of a shape that FLUX.1 does not: {error}") from error
