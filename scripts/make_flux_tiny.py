"""Make flux-tiny's weights again, from nothing: `python scripts/make_flux_tiny.py --output DIR`.

Five stages, each of which saves itself and is skipped when it is there already:
  tokenizers    a CLIP and a T5 vocabulary of the world's words, with single characters for every other word
  autoencoder   AutoencoderKL on scenes and random collages
  text          CLIP and T5 learn to say each attribute of a scene from its caption (so that word order is in the
                embeddings: which colour is the figure's and which the ground's), then are frozen
  transformer   FluxTransformer2DModel by flow matching on (caption, latent) pairs, averaged weights kept
  guided        classifier-free guidance distilled into the guidance embedding, as FLUX.1-dev's was

Training never shows the (shape, colour, background) triples that `scenes.is_held_out` names; the score is taken on
them. Runs on CPU or CUDA in bfloat16; interrupted, it goes on after the last finished stage, in the transformer after
its last thousand steps. `flux-tiny.zip` is then what the package ships, less the control LoRAs, which
`make_flux_tiny_controls.py --base DIR/flux-tiny` makes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import string
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# glibc hands large buffers back to the kernel at every free; keeping them is up to 4x faster for small conv nets.
if __name__ == "__main__" and sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
    os.execv(sys.executable, [sys.executable, *sys.argv])

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flux_ft import flow
from flux_ft.families.flux1 import pack, position_ids
from flux_ft.families.registry import FLUX_TINY
from flux_ft.families.tiny.reader import SceneReader
from flux_ft.families.tiny.scenes import (
    COLORS,
    POSITIONS,
    SHAPES,
    SIZE_PX,
    SIZES,
    Scene,
    all_scenes,
    caption,
    coverage,
    is_held_out,
    render,
)
from flux_ft.families.tiny.weights import pack_folder
from flux_ft.train.optim import set_rate

TEXT_TOKENS = 32
"""T5 length that the transformer mostly sees; a tenth of its steps use longer ones, up to the pipeline's 512."""
ATTRIBUTES: dict[str, list[str]] = {
    "shape": list(SHAPES),
    "color": list(COLORS),
    "size": list(SIZES),
    "position": list(POSITIONS),
    "background": list(COLORS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=9000, help="transformer steps")
    parser.add_argument("--guided-steps", type=int, default=1000, help="steps of guidance distillation")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    make_tokenizers(args.output)
    vae = make_autoencoder(args.output, args.vae_steps, device, args.seed)
    clip, t5 = make_text_encoders(args.output, args.text_steps, device, args.seed)
    world = World(args.output, vae, clip, t5, device, args.seed)
    guided = make_guided(args, world, make_transformer(args, world))
    assemble(args.output, world, guided)
    pack_folder(args.output / "flux-tiny", args.output / "flux-tiny.zip")
    for text_tokens in (TEXT_TOKENS, 512):
        scores = score(args.output / "flux-tiny", text_tokens, device, args.seed)
        report(args.output, scores, f"finished, T5 length {text_tokens}", args.guided_steps)


def report(output: Path, scores: dict[str, float], stage: str, step: int) -> None:
    line = {"stage": stage, "step": step, **{name: round(value, 4) for name, value in scores.items()}}
    with (output / "scores.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
    print("score", line, flush=True)


def save_whole(part: Any, folder: Path) -> None:
    """A folder that exists is a finished one: a stage that was cut off is made again."""
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    part.save_pretrained(staging)
    staging.rename(folder)


# ── tokenizers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def vocabulary() -> list[str]:
    words = {word for scene in all_scenes()[::7] for seed in range(8)
             for word in caption(scene, np.random.default_rng(seed)).replace(",", " ").split()}  # fmt: skip
    return sorted(words)


def make_tokenizers(output: Path) -> None:
    if (output / "tokenizer").exists():
        return
    words = vocabulary()
    characters = [c for c in string.printable if not c.isspace()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("▁" + word, -5.0) for word in words if len(word) > 1]
    pieces += [("▁", -9.0), *((c, -10.0) for c in characters), *(("▁" + c, -10.0) for c in characters)]
    save_whole(T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512), output / "tokenizer_2")

    # BPE merges that make each of the world's words one token: train on those words alone.
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator([" ".join(words)] * 4, trainers.BpeTrainer(vocab_size=600, end_of_word_suffix="</w>"))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    save_whole(CLIPTokenizer(vocab=ids, merges=merges, model_max_length=77), output / "tokenizer")


# ── autoencoder ─────────────────────────────────────────────────────────────────────────────────────────────────────


def collage(rng: np.random.Generator) -> np.ndarray:
    """Up to five shapes in any colours: keeps the autoencoder useful beyond the world's palette."""
    picture = np.broadcast_to(rng.uniform(0, 255, 3), (SIZE_PX, SIZE_PX, 3)).astype(np.float32)
    for _ in range(rng.integers(1, 6)):
        shape = SHAPES[rng.integers(len(SHAPES))]
        alpha = coverage(shape, *rng.uniform(6, 58, 2), rng.uniform(3, 20))[..., None]
        picture = picture + alpha * (rng.uniform(0, 255, 3).astype(np.float32) - picture)
    return picture.astype(np.uint8)


def to_pixels(pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_autoencoder(output: Path, steps: int, device: torch.device, seed: int, batch: int = 16) -> AutoencoderKL:
    folder = output / "vae"
    if folder.exists():
        return AutoencoderKL.from_pretrained(folder).to(device)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 40),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE_PX,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(device, memory_format=torch.channels_last)
    print(f"autoencoder: {count(vae):,} parameters", flush=True)
    rng = np.random.default_rng(seed)
    scenes = all_scenes()
    pool = np.stack([render(scenes[rng.integers(len(scenes))], rng) if i % 3 else collage(rng) for i in range(24000)])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99), fused=True)

    def restore(pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(pixels).latent_dist
        kl = -0.5 * (1 + posterior.logvar - posterior.mean.square() - posterior.logvar.exp()).mean()
        return vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample, kl

    started = time.monotonic()
    for step in range(steps):
        set_rate(optimizer, 2e-3 * schedule(step, steps, warmup=100))
        pixels = to_pixels(pool[rng.integers(len(pool), size=batch)], device).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast(device.type, torch.bfloat16):
            restored, kl = restore(pixels)
        error = restored.float() - pixels
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-5 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            mse = float(error.detach().square().mean()) / 4
            print(f"autoencoder {step}/{steps} loss {float(loss):.4f} psnr {-10 * math.log10(mse):.1f} dB "
                  f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(to_pixels(pool[i : i + 100], device)).latent_dist.mean for i in range(0, 2000, 100)]
        )
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    save_whole(vae, folder)
    return vae


# ── text encoders ───────────────────────────────────────────────────────────────────────────────────────────────────


def unknown_word(rng: np.random.Generator) -> str:
    letters = "".join(rng.choice(list(string.ascii_letters), size=rng.integers(2, 7)))
    return letters.upper() if rng.random() < 0.5 else letters.lower()


class AttributeHeads(nn.Module):
    """One linear reading per attribute; the last class of each means "not said"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in ATTRIBUTES.items()})

    def loss(self, features_BLD: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        losses, right = [], {}
        for name, head in self.heads.items():
            logits = head(features_BLD.float())
            target = labels[name][:, None].expand(logits.shape[:2])
            losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
            right[name] = float((logits.argmax(-1) == target).float().mean())
        return torch.stack(losses).mean(), right


def text_batch(rng: np.random.Generator, scenes: list[Scene], size: int) -> tuple[list[str], dict[str, list[int]]]:
    """Captions with labels; a quarter name an unknown thing, some say nothing at all."""
    captions, labels = [], {name: [] for name in ATTRIBUTES}
    for scene in (scenes[i] for i in rng.integers(len(scenes), size=size)):
        kind = rng.random()
        said = {name: values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()}
        if kind < 0.05:
            words, said = "", {name: len(values) for name, values in ATTRIBUTES.items()}
        elif kind < 0.25:
            words = caption(scene, rng, name=unknown_word(rng))
            said |= {"shape": len(SHAPES), "color": len(COLORS)}
        else:
            words = caption(scene, rng)
        captions.append(words)
        for name, index in said.items():
            labels[name].append(index)
    return captions, labels


def make_text_encoders(
    output: Path, steps: int, device: torch.device, seed: int
) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip_tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
    t5_tokenizer = T5Tokenizer.from_pretrained(output / "tokenizer_2")
    if (output / "text_encoder_2").exists():
        return (
            CLIPTextModel.from_pretrained(output / "text_encoder").to(device).eval(),
            T5EncoderModel.from_pretrained(output / "text_encoder_2").to(device).eval(),
        )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=64, intermediate_size=192, projection_dim=64,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=77,
            bos_token_id=clip_tokenizer.bos_token_id, eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    ).to(device)  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer), d_model=64, d_kv=16, d_ff=160, num_layers=3, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, relative_attention_num_buckets=32,
            is_encoder_decoder=False, use_cache=False,
        )
    ).to(device)  # fmt: skip
    print(f"clip: {count(clip):,} parameters; t5: {count(t5):,}", flush=True)
    clip_heads, t5_heads = AttributeHeads(64).to(device), AttributeHeads(64).to(device)
    identity = nn.Linear(64, len(t5_tokenizer)).to(device)
    parameters = [p for m in (clip, t5, clip_heads, t5_heads, identity) for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng(seed + 1)
    scenes = [scene for scene in all_scenes() if not is_held_out(scene)]
    lengths = (24, 32, 32, 32, 48, 96, 512)
    for step in range(steps):
        set_rate(optimizer, 2e-3 * schedule(step, steps, warmup=100))
        length = lengths[step % len(lengths)]
        captions, indices = text_batch(rng, scenes, 8 if length == 512 else 64)
        labels = {name: torch.tensor(index, device=device) for name, index in indices.items()}
        clip_ids = clip_tokenizer(captions, padding="longest", truncation=True, return_tensors="pt").input_ids
        t5_ids = t5_tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        pooled = clip(clip_ids.to(device)).pooler_output
        # No attention mask: the FLUX pipeline gives none, padding is part of what the transformer reads.
        tokens = t5(t5_ids.input_ids.to(device)).last_hidden_state
        clip_loss, clip_right = clip_heads.loss(pooled[:, None], labels)
        t5_loss, t5_right = t5_heads.loss(tokens, labels)
        # Each token must stay itself too, or words that the world does not know (a trigger) would be forgotten.
        same = F.cross_entropy(identity(tokens).flatten(0, 1), t5_ids.input_ids.to(device).flatten())
        optimizer.zero_grad(set_to_none=True)
        (clip_loss + t5_loss + 0.3 * same).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            worst = min(clip_right.values()), min(t5_right.values())
            print(f"text {step}/{steps} clip {float(clip_loss):.4f} t5 {float(t5_loss):.4f} same {float(same):.3f} "
                  f"worst right: clip {worst[0]:.3f} t5 {worst[1]:.3f}", flush=True)  # fmt: skip
    save_whole(clip.eval(), output / "text_encoder")
    save_whole(t5.eval(), output / "text_encoder_2")
    return clip, t5


# ── transformer ─────────────────────────────────────────────────────────────────────────────────────────────────────


def new_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=32, num_layers=2, num_single_layers=4, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


@dataclass(frozen=True)
class Draw:
    """One batch: the transformer's arguments, the velocity that carries its pictures to noise (B, 64 tokens, 32
    channels), and the length of its T5 text."""

    inputs: dict[str, Tensor]
    velocity: Tensor
    length: int


class World:
    """Captions and latents of scenes, drawn by step alone, so that a resumed run sees what the first would have."""

    def __init__(
        self, output: Path, vae: AutoencoderKL, clip: CLIPTextModel, t5: T5EncoderModel, device: torch.device, seed: int
    ) -> None:
        self.vae, self.clip, self.t5, self.device = vae, clip, t5, device
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(output / "tokenizer")
        self.t5_tokenizer = T5Tokenizer.from_pretrained(output / "tokenizer_2")
        seen = [scene for scene in all_scenes() if not is_held_out(scene)]
        self.latents, self.scenes = encode_bank(vae, seen, 40000, device, np.random.default_rng(seed + 2))
        self.mu = flow.resolution_mu(self.latents.shape[1])
        self.image_ids = position_ids(8, 8, device)

    @torch.no_grad()
    def text(self, captions: list[str], length: int) -> dict[str, Tensor]:
        clip_ids = self.clip_tokenizer(captions, padding="longest", return_tensors="pt").input_ids
        t5_ids = self.t5_tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
        return {
            "pooled_projections": self.clip(clip_ids.to(self.device)).pooler_output,
            "encoder_hidden_states": self.t5(t5_ids.to(self.device)).last_hidden_state,
            "txt_ids": torch.zeros(length, 3, device=self.device),
        }

    def draw(self, step: int, batch: int, seed: int) -> Draw:
        rng = np.random.default_rng((seed, step))
        length = TEXT_TOKENS
        if step % 10 == 9:  # now and then a longer text, at an equal number of tokens
            length = int(rng.choice([24, 48, 64, 128, 256, 512]))
            batch = max(8, batch * (64 + TEXT_TOKENS) // (64 + length) // 8 * 8)
        rows = rng.integers(len(self.scenes), size=batch)
        captions = [caption(self.scenes[i], rng) if rng.random() > 0.05 else "" for i in rows]
        x0 = self.latents[torch.from_numpy(rows)].float()
        generator = flow.keyed_generator(seed, "make", step)
        noise = flow.draw_noise(tuple(x0.shape), generator).to(self.device)
        sigma = flow.shift_sigma(torch.sigmoid(torch.randn(batch, generator=generator)), self.mu).to(self.device)
        inputs = self.text(captions, length) | {
            "hidden_states": (1 - sigma.view(-1, 1, 1)) * x0 + sigma.view(-1, 1, 1) * noise,
            "timestep": sigma,
            "guidance": (1 + 4 * torch.rand(batch, generator=generator)).to(self.device),
            "img_ids": self.image_ids,
        }
        return Draw(inputs, noise - x0, length)


def encode_bank(
    vae: AutoencoderKL, scenes: list[Scene], size: int, device: torch.device, rng: np.random.Generator
) -> tuple[Tensor, list[Scene]]:
    """`size` rendered scenes as packed, normalised latents (N, 64 tokens, 32 channels)."""
    chosen = [scenes[i] for i in rng.integers(len(scenes), size=size)]
    rows = []
    with torch.no_grad():
        for start in range(0, size, 200):
            pixels = to_pixels(np.stack([render(scene, rng) for scene in chosen[start : start + 200]]), device)
            latents = vae.encode(pixels).latent_dist.mean
            rows.append(pack((latents - vae.config.shift_factor) * vae.config.scaling_factor).to(torch.float16))
    return torch.cat(rows), chosen


def make_transformer(args: argparse.Namespace, world: World) -> FluxTransformer2DModel:
    """Flow matching on pictures. Guidance is drawn at random and has no effect yet."""
    model = new_transformer().to(world.device)
    print(f"transformer: {count(model):,} parameters", flush=True)
    return fit(args, "transformer", model, lambda draw: draw.velocity, world, args.steps, args.lr, args.seed)


def make_guided(args: argparse.Namespace, world: World, base: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Distil guidance into its embedding, as FLUX.1-dev's was: at guidance g, say blank + g · (captioned - blank).

    Classifier-free guidance: Ho & Salimans 2022 (arXiv 2207.12598); its distillation: Meng et al. 2023 (2210.03142).
    """
    teacher = compiled(args, copy.deepcopy(base).requires_grad_(False))

    @torch.no_grad()
    def target(draw: Draw) -> Tensor:
        blank = world.text([""] * len(draw.velocity), draw.length)
        with torch.autocast(world.device.type, torch.bfloat16):
            captioned = teacher(draw.length)(**draw.inputs, return_dict=False)[0]
            uncaptioned = teacher(draw.length)(**(draw.inputs | blank), return_dict=False)[0]
        return uncaptioned + draw.inputs["guidance"].view(-1, 1, 1) * (captioned - uncaptioned).float()

    return fit(args, "guided", copy.deepcopy(base), target, world, args.guided_steps, args.lr / 3, args.seed + 10)


def compiled(args: argparse.Namespace, model: nn.Module) -> Callable[[int], nn.Module]:
    """The model to call for a text length: compiled for the usual one, as it is for the rest."""
    fast = model if args.no_compile else torch.compile(model, dynamic=False)
    return lambda length: fast if length == TEXT_TOKENS else model


def fit(
    args: argparse.Namespace,
    stage: str,
    model: FluxTransformer2DModel,
    target: Callable[[Draw], Tensor],
    world: World,
    steps: int,
    rate: float,
    seed: int,
) -> FluxTransformer2DModel:
    """Train `model` to say `target`; returns its weights' running mean. Saved and scored every 1,000 steps."""
    checkpoint = args.output / f"{stage}.pt"
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=rate, betas=(0.9, 0.98), fused=True)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=world.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = saved["average"], saved["step"]
        print(f"{stage}: going on from step {start}", flush=True)
    forward = compiled(args, model)
    started, recent = time.monotonic(), []
    for step in range(start, steps):
        set_rate(optimizer, rate * schedule(step, steps, warmup=min(300, steps // 10)))
        draw = world.draw(step, args.batch, seed)
        with torch.autocast(world.device.type, torch.bfloat16):
            predicted = forward(draw.length)(**draw.inputs, return_dict=False)[0]
        loss = (predicted.float() - target(draw)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise SystemExit(f"non-finite gradient at step {step}")
        optimizer.step()
        keep = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in model.parameters()], 1 - keep)
        recent.append(float(loss))
        done = step + 1
        if done % 100 == 0:
            pace = (time.monotonic() - started) / (done - start)
            left = pace * (steps - done) / 60
            print(
                f"{stage} {done}/{steps} loss {np.mean(recent):.4f} {pace:.3f} s/step {left:.0f} min left", flush=True
            )
            recent.clear()
        if done % 1000 == 0 or done == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": done}
            torch.save(state, checkpoint.with_suffix(".partial"))
            os.replace(checkpoint.with_suffix(".partial"), checkpoint)
            assemble(args.output, world, with_weights(average))
            report(
                args.output, score(args.output / "flux-tiny", TEXT_TOKENS, world.device, args.seed, 128), stage, done
            )
    return with_weights(average).to(world.device)


def with_weights(weights: dict[str, Tensor]) -> FluxTransformer2DModel:
    model = new_transformer()
    model.load_state_dict(weights)
    return model


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then cosine to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ── the finished folder ─────────────────────────────────────────────────────────────────────────────────────────────


def assemble(output: Path, world: World, transformer: FluxTransformer2DModel) -> None:
    """Write a folder that `FluxPipeline.from_pretrained` loads, weights in bfloat16."""
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
            base_image_seq_len=256, max_image_seq_len=4096,
        ),
        vae=copy.deepcopy(world.vae).to("cpu", torch.bfloat16),
        text_encoder=copy.deepcopy(world.clip).to("cpu", torch.bfloat16),
        tokenizer=CLIPTokenizer.from_pretrained(output / "tokenizer"),
        text_encoder_2=copy.deepcopy(world.t5).to("cpu", torch.bfloat16),
        tokenizer_2=T5Tokenizer.from_pretrained(output / "tokenizer_2"),
        transformer=copy.deepcopy(transformer).to("cpu", torch.bfloat16),
    )  # fmt: skip
    staging = output / "flux-tiny.partial"
    shutil.rmtree(staging, ignore_errors=True)
    pipeline.save_pretrained(staging)
    for part in ("text_encoder", "text_encoder_2"):
        # Without a dtype from the caller, transformers takes the config's and diffusers float32: let them agree.
        path = staging / part / "config.json"
        edit_json(path, lambda config: config | {"dtype": "float32"})
    for path in staging.glob("*/config.json"):  # where the parts lay while they were made is nobody's business
        edit_json(path, lambda config: {key: value for key, value in config.items() if key != "_name_or_path"})
    shutil.rmtree(output / "flux-tiny", ignore_errors=True)
    staging.rename(output / "flux-tiny")


def edit_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8"))), indent=2) + "\n", "utf-8")


@torch.no_grad()
def score(
    folder: Path, text_tokens: int, device: torch.device, seed: int, prompts: int = 256, steps: int = 20
) -> dict[str, float]:
    """How often each attribute of held-out prompts is drawn right, by the finished folder in float32."""
    pipeline = FluxPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(seed + 3)
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    scenes = [held_out[i] for i in rng.choice(len(held_out), size=prompts, replace=False)]
    captions = [caption(scene, rng) for scene in scenes]
    reader, rows = SceneReader(), []
    chunk = 64 if text_tokens <= 64 else 16
    for start in range(0, prompts, chunk):
        pictures = pipeline(
            captions[start : start + chunk], height=SIZE_PX, width=SIZE_PX, num_inference_steps=steps,
            guidance_scale=FLUX_TINY.default_guidance, max_sequence_length=text_tokens, output_type="np",
            generator=torch.Generator().manual_seed(seed + start),
        ).images  # fmt: skip
        for scene, picture in zip(scenes[start : start + chunk], pictures, strict=True):
            rows.append(reader.read((picture * 255).round().astype(np.uint8)).matches(scene))
    scores = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return scores | {"all": float(np.mean([all(row.values()) for row in rows]))}


if __name__ == "__main__":
    main()
