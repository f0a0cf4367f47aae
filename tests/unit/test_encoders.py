"""Text encoders whose blocks wait in host memory say what whole ones say, and take no more than is told."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_ft.families.base import Family
from flux_ft.infer import fit
from flux_ft.train import encoders

CPU = torch.device("cpu")
CAPTIONS = ["a red circle", "a large blue cross on the left of a white background"]


def test_encoders_in_turn_say_the_same_bits(tiny_family: Family) -> None:
    whole = tiny_family.load_text(CPU, torch.float32)
    in_turn = encoders.stream_encoders(tiny_family, CPU, torch.float32)
    for caption in CAPTIONS:  # the second finds the first block on its way already
        one, other = (tiny_family.encode_text(stack, [caption]) for stack in (whole, in_turn))
        assert torch.equal(one.embeds_BLD, other.embeds_BLD)
        assert torch.equal(one.pooled_BP, other.pooled_BP)
    away = [bool(next(block.parameters()).isnan().all()) for block in in_turn.t5.encoder.block]
    assert sum(not gone for gone in away) == 1 < len(away)  # the last; the first is on its way, and not yet in place


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_encoders_in_turn_say_the_same_bits(tiny_family: Family) -> None:
    cuda, texts = torch.device("cuda"), []
    for load in (tiny_family.load_text, partial(encoders.stream_encoders, tiny_family)):
        stack = load(cuda, torch.bfloat16)
        texts.append([tiny_family.encode_text(stack, [caption]) for caption in CAPTIONS])
    for one, other in zip(*texts, strict=True):
        assert torch.equal(one.embeds_BLD, other.embeds_BLD)
        assert torch.equal(one.pooled_BP, other.pooled_BP)


def test_two_blocks_of_t5_and_what_lies_outside_are_what_is_told() -> None:
    """Counted on transformers' own classes at FLUX.1's size."""
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        t5 = T5EncoderModel(T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64,
                                     feed_forward_proj="gated-gelu"))  # fmt: skip
    blocks = [sum(one.numel() for one in block.parameters()) for block in t5.encoder.block]
    total = sum(one.numel() for model in (clip, t5) for one in model.parameters())
    assert total == fit.FLUX1_SIZES.encoders
    assert (total - sum(blocks) + 2 * max(blocks)) / total == pytest.approx(encoders.IN_TURN, rel=0.01)


@pytest.mark.parametrize(("free", "in_turn"), [(8e9, True), (12.6e9, False)])
def test_a_card_that_cannot_hold_them_has_them_in_turn(
    free: float, in_turn: bool, tiny_family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(fit, "machine_of", lambda device: fit.Machine("cuda", int(free)))
    monkeypatch.setattr(fit, "model_sizes", lambda family: fit.FLUX1_SIZES)
    monkeypatch.setattr(encoders, "stream_encoders", lambda *given: asked.append("in turn"))
    monkeypatch.setattr(type(tiny_family), "load_text", lambda *given: asked.append("whole"))
    encoders.load_encoders(tiny_family, torch.device("cuda"), torch.bfloat16)
    assert asked == ["in turn" if in_turn else "whole"]
