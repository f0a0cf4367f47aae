"""Redux: to the bit what diffusers' own pipeline makes of a picture, a prompt and the same weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import FluxPriorReduxPipeline
from diffusers.pipelines.flux import ReduxImageEncoder
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from flux_ft.errors import ModelError
from flux_ft.families import redux as room
from flux_ft.families.base import Family
from flux_ft.families.flux1 import TextStack
from flux_ft.families.redux import load_redux, redux_at_hand, redux_tokens, with_redux
from flux_ft.types import TextCond

CPU = torch.device("cpu")
PROMPT = "a small red circle in the top left on a blue background"


def save_redux(folder: Path, width: int, redux_dim: int = 24) -> None:
    """Random weights of the real classes, laid out as the published model is."""
    torch.manual_seed(5)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    SiglipVisionModel(config).save_pretrained(folder / "image_encoder")
    ReduxImageEncoder(redux_dim, width).save_pretrained(folder / "image_embedder")
    size = {"height": 32, "width": 32}
    SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder / "feature_extractor"
    )


@pytest.fixture(scope="module")
def stack(tiny_family: Family) -> TextStack:
    loaded = tiny_family.load_text(CPU, torch.float32)
    assert isinstance(loaded, TextStack)
    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, stack: TextStack) -> Path:
    folder = tmp_path_factory.mktemp("redux")
    save_redux(folder, stack.t5.config.d_model)
    return folder


def picture(mode: str = "RGB", size: tuple[int, int] = (57, 41)) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_diffusers_pipeline_to_the_bit(
    tiny_family: Family, folder: Path, mode: str, dtype: torch.dtype
) -> None:
    stack = tiny_family.load_text(CPU, dtype)
    pipeline = FluxPriorReduxPipeline(
        image_encoder=SiglipVisionModel.from_pretrained(folder / "image_encoder", dtype=dtype).eval(),
        feature_extractor=SiglipImageProcessorPil.from_pretrained(folder / "feature_extractor"),
        image_embedder=ReduxImageEncoder.from_pretrained(folder / "image_embedder", torch_dtype=dtype).eval(),
        text_encoder=stack.clip,
        tokenizer=stack.clip_tokenizer,
        text_encoder_2=stack.t5,
        tokenizer_2=stack.t5_tokenizer,
    )
    expected = pipeline(picture(mode), prompt=PROMPT)

    # The pipeline's prompts are always 512 tokens long.
    variant = dataclasses.replace(tiny_family.variant, max_text_tokens=512)
    family = dataclasses.replace(tiny_family, variant=variant)  # type: ignore[type-var]
    redux = load_redux(str(folder), CPU, dtype)
    text = with_redux(family.encode_text(stack, [PROMPT]), redux_tokens(redux, picture(mode)))
    assert torch.equal(text.embeds_BLD, expected.prompt_embeds)
    assert torch.equal(text.pooled_BP, expected.pooled_prompt_embeds)
    assert text.embeds_BLD.dtype == dtype


class TestStrength:
    @pytest.fixture
    def text(self) -> TextCond:
        draw = torch.Generator().manual_seed(0)
        return TextCond(torch.randn(2, 5, 6, generator=draw), torch.randn(2, 3, generator=draw))

    def test_none_is_the_text_itself(self, text: TextCond) -> None:
        assert with_redux(text, torch.ones(1, 4, 6), 0.0) is text

    @pytest.mark.parametrize("strength", [0.25, 1.0])
    def test_multiplies_the_pictures_tokens_of_each_text_alone(self, text: TextCond, strength: float) -> None:
        tokens = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(1))
        both = with_redux(text, tokens, strength)
        assert torch.equal(both.embeds_BLD[:, :5], text.embeds_BLD)
        assert torch.equal(both.embeds_BLD[:, 5:], (tokens * strength).repeat(2, 1, 1))
        assert both.pooled_BP is text.pooled_BP

    def test_tokens_take_the_texts_dtype(self, text: TextCond) -> None:
        assert with_redux(text, torch.ones(1, 4, 6, dtype=torch.bfloat16)).embeds_BLD.dtype == torch.float32

    def test_another_models_redux_is_refused(self, text: TextCond) -> None:
        with pytest.raises(ModelError, match="tokens of 4096 numbers, the model's text encoder of 6"):
            with_redux(text, torch.ones(1, 4, 4096))


class TestLoading:
    def test_is_frozen_and_says_another_thing_of_another_picture(self, folder: Path) -> None:
        redux = load_redux(str(folder))
        assert not any(one.requires_grad for part in (redux.encoder, redux.embedder) for one in part.parameters())
        tokens = redux_tokens(redux, picture())
        assert tokens.shape[:2] == (1, 16)
        assert not torch.equal(tokens, redux_tokens(redux, picture(size=(41, 57))))

    @pytest.mark.parametrize("part", ["feature_extractor", "image_encoder", "image_embedder"])
    def test_a_missing_part_is_named(self, folder: Path, tmp_path: Path, part: str) -> None:
        broken = shutil.copytree(folder, tmp_path / "broken")
        assert redux_at_hand(str(broken))
        shutil.rmtree(broken / part)
        assert not redux_at_hand(str(broken))
        with pytest.raises(ModelError, match=f"`{part}` could not be loaded") as caught:
            load_redux(str(broken))
        assert "FLUX.1-Redux-dev" in str(caught.value.hint)

    def test_parts_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        save_redux(tmp_path, 8, redux_dim=16)
        with pytest.raises(ModelError, match="24 wide, `image_embedder` takes 16"):
            load_redux(str(tmp_path))

    def test_what_cannot_be_fetched_says_how_to_get_it(self) -> None:
        with pytest.raises(ModelError, match="nobody/no-redux: `feature_extractor` could not be fetched") as caught:
            load_redux("nobody/no-redux")
        assert "accept the licence" in str(caught.value.hint)


class TestAtHand:
    @pytest.mark.parametrize("source", ["nobody/no-redux", "./nowhere", "not a name", "a/b/c", ""])
    def test_what_is_nowhere_is_not(self, source: str) -> None:
        assert not redux_at_hand(source)

    def test_the_hubs_cache_counts_when_all_files_are_there(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The cache as the Hub's client lays it out, and read by it."""
        cache = tmp_path / "cache" / "models--someone--redux"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("0" * 40)
        snapshot = shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        assert redux_at_hand("someone/redux")
        (snapshot / "image_embedder" / "diffusion_pytorch_model.safetensors").unlink()
        assert not redux_at_hand("someone/redux")

    def test_the_published_model_is_meant_unless_another_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = set()
        monkeypatch.setattr(room, "try_to_load_from_cache", lambda source, name: asked.add(source))
        assert not redux_at_hand()
        assert asked == {"black-forest-labs/FLUX.1-Redux-dev"}
