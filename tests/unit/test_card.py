"""The model card: of a LoRA run to the letter, and what a full fine-tune adds to it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from flux_ft.adapters.checkpoint_files import open_checkpoint
from flux_ft.adapters.extract import ExtractionReport, LayerReport, Options
from flux_ft.adapters.write_files import write_single_file
from flux_ft.config import RunConfig
from flux_ft.families.registry import FLUX1_DEV, FLUX_TINY, tiny_folder
from flux_ft.train.card import ExtractionFacts, model_card
from flux_ft.train.prove import Proof

LORAS = {"kohya": Path("x/my-cat-comfyui.safetensors"), "diffusers": Path("x/my-cat.safetensors")}
HUB_CARD = """---
library_name: diffusers
tags: [flux, lora, text-to-image, flux_ft]
base_model: black-forest-labs/FLUX.1-dev
instance_prompt: "TOK"
---

# My cat

A LoRA for black-forest-labs/FLUX.1-dev, trained on 12 pictures, 2 more held out for 300 steps.

Trigger word: `TOK`

## Pictures

Same prompts and seeds, before training (base) and along it:

![previews](previews.png)

## Files

| file | for |
|---|---|
| `my-cat-comfyui.safetensors` | ComfyUI, Forge, InvokeAI, sd-scripts |
| `my-cat.safetensors` | diffusers, and tools that read PEFT keys |

## Use

```python
import torch
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("my-cat-comfyui.safetensors")
pipe("a photo of TOK", guidance_scale=3.5).images[0]
```

## Training

![loss](loss.png)

| setting | value |
|---|---|
| rank | 16 |
| steps | 300 |
| learning rate | 0.0001, constant |
| optimizer | adamw |
| batch | 2 |
| seed | 7 |
| loss, last tenth | 0.1235 |
| licence of the base | FLUX.1 [dev] Non-Commercial License |

Every setting is in `run.yaml`; what became of each picture is in `report.html`.
"""
TINY_CARD = """---
library_name: diffusers
tags: [flux, lora, text-to-image, flux_ft]
---

# My cat

A LoRA for flux-tiny, trained on 12 pictures for 300 steps.

## Files

| file | for |
|---|---|
| `my-cat-comfyui.safetensors` | kohya keys; other tools know FLUX.1 alone |
| `my-cat.safetensors` | diffusers, and tools that read PEFT keys |

## Use

```python
from flux_ft import Runner, TextToImage

runner = Runner("flux-tiny", ["my-cat-comfyui.safetensors"])
runner.draw([TextToImage(prompt="…")])[0].show()
```

## Training

![loss](loss.png)

| setting | value |
|---|---|
| rank | 16 |
| steps | 300 |
| learning rate | 0.0001, constant |
| optimizer | adamw |
| batch | 2 |
| seed | 7 |
| loss, last tenth | 0.1235 |
| licence of the base | Apache-2.0 |

Every setting is in `run.yaml`; what became of each picture is in `report.html`.
"""


def run_config(**changed: Any) -> RunConfig:
    values: dict[str, Any] = {
        "data": {"path": "cats"}, "finetune_comment": "My cat", "trigger_word": "TOK", "finetune_type": "lora",
        "lora_rank": 16, "iterations": 300, "seed": 7, "optim": {"name": "adamw", "batch_size": 2},
    }  # fmt: skip
    return RunConfig.model_validate(values | changed)


class Pictures(SimpleNamespace):
    """As many examples as pictures."""

    def __len__(self) -> int:
        return int(self.pictures)


def data(held_out: int) -> Any:
    return SimpleNamespace(examples=Pictures(pictures=12), held_out=Pictures(pictures=held_out))


def facts(
    rank: Any = 16, left_out: dict[str, float] | None = None, proof: dict[str, Any] | None = None, **changed: Any
) -> ExtractionFacts:
    """Two matrices of equal change, of which 80 and 100 % are kept, and half a per cent of noise."""
    layers = tuple(
        LayerReport(f"single_blocks.{number}.linear2", (8, 8), 4 + number, 1.0, residual, 0.1, 0.005)
        for number, residual in enumerate((math.sqrt(0.2), 0.0))
    )
    options = Options(rank=rank) if rank is not None else Options(rank=None, energy=0.9)
    left = {"norms": 0.06, "biases": 0.02, "img_in": 0.0} if left_out is None else left_out
    report = ExtractionReport("flux1-dev", "the fine-tuned model", layers, left, options, "cpu")
    found: dict[str, Any] = {
        "examples": 4, "held_out": True, "loss": {"base": 0.5, "lora": 0.41, "full": 0.4},
        "relative_error": 0.123, "relative_error_by_sigma": {"0.1": 0.2, "0.9": 0.05},
    }  # fmt: skip
    values: dict[str, Any] = {"full_weights": None, "has_comparison": False} | changed
    return ExtractionFacts(report, Proof(**(found | (proof or {}))), **values)


def full_card(extraction: ExtractionFacts, variant: Any = FLUX1_DEV, has_previews: bool = True) -> str:
    config = run_config(finetune_type="full")
    return model_card(config, variant, data(2), LORAS, 300, 0.12345, has_previews, extraction, "adafactor")


def table(card: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, its rule left out."""
    section = card.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [row for row in rows if set("".join(row)) - {"-"}]


class TestLoraRun:
    def test_card_of_a_model_on_the_hub(self) -> None:
        assert model_card(run_config(), FLUX1_DEV, data(2), LORAS, 300, 0.12345, True) == HUB_CARD

    def test_card_of_the_builtin_model(self) -> None:
        config = run_config(trigger_word="")
        assert model_card(config, FLUX_TINY, data(0), LORAS, 300, 0.12345, False) == TINY_CARD

    def test_the_optimizer_in_use_stands_for_auto(self) -> None:
        config = run_config(optim={"name": "auto", "batch_size": 2})
        assert model_card(config, FLUX1_DEV, data(2), LORAS, 300, 0.12345, True, optimizer="adamw") == HUB_CARD


class TestFullRun:
    def test_it_says_how_the_lora_was_made(self) -> None:
        card = full_card(facts())
        assert (
            "A LoRA for black-forest-labs/FLUX.1-dev, fully fine-tuned, then extracted at rank 16: trained on 12 "
            "pictures, 2 more held out for 300 steps.\n"
        ) in card
        assert ["optimizer", "adafactor"] in table(card, "Training")
        assert ["learning rate", "1e-05, constant"] in table(card, "Training")

    @pytest.mark.parametrize("rank", ["auto", None])
    def test_ranks_that_differ_are_a_range(self, rank: str | None) -> None:
        assert "extracted at rank 4 to 5:" in full_card(facts(rank))

    def test_losses_and_distances_stand_side_by_side(self) -> None:
        rows = table(full_card(facts()), "LoRA and full model")
        assert rows[0] == ["", "base", "LoRA", "full model"]
        assert rows[1] == ["loss", "0.5000", "0.4100", "0.4000"]
        assert rows[2][1:] == ["100 %", "12.3 %", "0 %"]
        assert len(rows) == 3

    def test_energy_kept_noise_and_what_no_lora_holds(self) -> None:
        card = full_card(facts())
        assert "(0.5 % of it is rounding noise), the LoRA keeps 90.0 %." in card
        assert "No LoRA holds 3.8 % of the model's whole change: norms 2.9 %, biases 0.96 %." in card
        assert "`extraction.json`" in card
        assert "No LoRA holds" not in full_card(facts(left_out={"norms": 0.0}))

    def test_training_pictures_are_called_so(self) -> None:
        assert "on 4 examples that were held out" in full_card(facts())
        card = full_card(facts(proof={"held_out": False}))
        assert "on 4 training examples" in card
        assert "nothing was held out" in card
        assert "that were held out" not in card

    def test_no_distance_where_there_is_none(self) -> None:
        rows = table(full_card(facts(proof={"relative_error": math.nan})), "LoRA and full model")
        assert rows[2][1:] == ["100 %", "–", "0 %"]

    @pytest.mark.parametrize("has_previews", [False, True])
    @pytest.mark.parametrize("has_comparison", [False, True])
    def test_pictures_that_are_there_are_shown(self, has_previews: bool, has_comparison: bool) -> None:
        card = full_card(facts(has_comparison=has_comparison), has_previews=has_previews)
        shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card)
        assert shown == ["previews.png"] * has_previews + ["comparison.png"] * has_comparison + ["loss.png"]
        assert ("## Pictures" in card) == (has_previews or has_comparison)

    def test_front_matter_is_that_of_a_lora(self) -> None:
        front = yaml.safe_load(full_card(facts()).split("---\n")[1])
        assert front == yaml.safe_load(HUB_CARD.split("---\n")[1])

    def test_full_weights_are_named_only_where_they_were_kept(self) -> None:
        assert len(table(full_card(facts()), "Files")) == 3
        card = full_card(facts(full_weights=Path("x/my-cat-full.safetensors")))
        name, use = table(card, "Files")[3]
        assert name == "`my-cat-full.safetensors`"
        assert "models/diffusion_models" in use
        _, code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        compile(code, "README.md", "exec")
        assert "FluxTransformer2DModel.from_single_file(" in code
        assert '"my-cat-full.safetensors", config="black-forest-labs/FLUX.1-dev", subfolder="transformer"' in code
        assert "x/" not in card.replace("black-forest-labs/", "")

    def test_python_for_the_full_weights_works(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "my-cat-full.safetensors"
        write_single_file(open_checkpoint(tiny_folder()), path, torch.bfloat16)
        extraction = facts(full_weights=path)
        _, code = re.findall(r"```python\n(.*?)```", full_card(extraction, FLUX_TINY), re.DOTALL)
        shown: list[Image.Image] = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(Image.Image, "show", lambda image: shown.append(image))
        exec(compile(code, "README.md", "exec"), {})
        assert [image.size for image in shown] == [(64, 64)]

    def test_a_local_base_is_named_without_its_path(self) -> None:
        variant = replace(FLUX1_DEV, name="my-base", source="/somewhere/my-base")
        card = full_card(facts(full_weights=Path("x/my-cat-full.safetensors")), variant)
        assert "/somewhere" not in card
        assert 'config="my-base"' in card
