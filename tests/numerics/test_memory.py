"""What must not be in memory when training starts."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextModel, T5EncoderModel

from flux_ft.config import RunConfig
from flux_ft.train import run

ENCODERS = (T5EncoderModel, CLIPTextModel, AutoencoderKL)


class Reached(Exception):
    """The loop was about to start."""


def alive(others: set[int]) -> set[str]:
    return {type(one).__name__ for one in gc.get_objects() if type(one) in ENCODERS and id(one) not in others}


def test_encoders_come_one_after_the_other_and_are_gone_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is opened once, whatever texts there are, and T5 and CLIP are gone when the autoencoder comes."""
    gc.collect()
    others = {id(one) for one in gc.get_objects() if type(one) in ENCODERS}
    opened: list[str] = []
    beside: dict[str, set[str]] = {}
    for cls in ENCODERS:
        original = cls.from_pretrained.__func__  # type: ignore[attr-defined]

        def counting(kind: type, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            opened.append(kind.__name__)
            beside[kind.__name__] = alive(others)
            return _original(kind, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(counting))

    def look(*_: object) -> bool:
        assert alive(others) == set()
        raise Reached

    monkeypatch.setattr(run, "train_steps", look)
    for number in range(2):
        Image.new("RGB", (64, 64), (40 * number, 90, 120)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"TOK, circle, {number}")
    settings = {
        "model": "flux-tiny", "data": {"path": str(tmp_path), "caption_dropout": 0.1, "tag_orders": 2},
        "output": str(tmp_path / "run"), "finetune_type": "lora", "preview": {"every": None},
    }  # fmt: skip
    with pytest.raises(Reached):
        run.train(RunConfig.model_validate(settings))
    assert sorted(opened) == ["AutoencoderKL", "CLIPTextModel", "T5EncoderModel"]
    assert opened[-1] == "AutoencoderKL"
    assert beside["AutoencoderKL"] == set()
