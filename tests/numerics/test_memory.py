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


def test_encoders_are_gone_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    others = {id(one) for one in gc.get_objects() if isinstance(one, ENCODERS)}
    opened: list[str] = []
    for cls in ENCODERS:
        original = cls.from_pretrained.__func__  # type: ignore[attr-defined]

        def counting(kind: type, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            opened.append(kind.__name__)
            return _original(kind, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(counting))

    def look(*_: object) -> bool:
        left = [type(one).__name__ for one in gc.get_objects() if isinstance(one, ENCODERS) and id(one) not in others]
        assert left == []
        raise Reached

    monkeypatch.setattr(run, "train_steps", look)
    for number in range(2):
        Image.new("RGB", (64, 64), (40 * number, 90, 120)).save(tmp_path / f"{number}.png")
    settings = {"model": "flux-tiny", "data": str(tmp_path), "output": str(tmp_path / "run"), "finetune_type": "lora"}
    with pytest.raises(Reached):
        run.train(RunConfig.model_validate(settings | {"preview": {"every": None}}))
    assert sorted(opened) == ["AutoencoderKL", "CLIPTextModel", "T5EncoderModel"]
