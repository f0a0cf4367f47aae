"""What a LoRA file says about itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux_ft.adapters.formats import read_adapter, write_adapter
from flux_ft.adapters.metadata import ARCHITECTURES, EXPORT_KEY, ExportInfo, build_metadata, public_config
from flux_ft.errors import AdapterError, ConfigError
from flux_ft.types import AdapterState, LoraLayer

CONFIG = """
model: /models/private/flux
data: /mnt/jane/pictures
output: runs/my-cat
finetune_comment: my cat
trigger_word: TOK
iterations: 300
preview: {every: 50, prompts: [jane smiles, 'jane/two']}
lora: {alpha: 16, targets: [attn, 'D:\\data\\jane']}
captioning: true
learning_rate: null
"""
INFO = ExportInfo(
    title="My cat",
    architecture="flux-1-dev/lora",
    license="flux-1-dev-non-commercial-license",
    trigger_word="TOK",
    rank=16,
    steps=300,
    seed=7,
    learning_rate=1e-4,
    optimizer="adamw8bit",
    num_images=20,
    resolution="1024x768",
    started="2026-01-02T03:04:05+00:00",
    finished="2026-01-02T04:04:05+00:00",
    config_yaml=CONFIG,
    base_model="/mnt/jane/FLUX.1-dev",
    tool_version="0.1.0",
    batch_size=2,
)
MODULES = ["transformer_blocks.0.attn.to_q", "transformer_blocks.11.attn.to_q", "single_transformer_blocks.3.proj_out"]


def test_all_entries() -> None:
    got = build_metadata(INFO, flavour="kohya", modules=MODULES)
    export = json.loads(got.pop(EXPORT_KEY))
    assert got == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": "My cat",
        "modelspec.resolution": "1024x768",
        "modelspec.date": "2026-01-02T04:04:05+00:00",
        "modelspec.license": "flux-1-dev-non-commercial-license",
        "modelspec.description": "Rank 16 LoRA for FLUX.1-dev; 20 pictures, 300 steps.",
        "modelspec.tags": "lora, flux_ft",
        "modelspec.trigger_phrase": "TOK",
        "modelspec.usage_hint": "Put TOK into the prompt; strength 1 is as trained.",
        "ss_output_name": "My cat",
        "ss_base_model_version": "flux1",
        "ss_sd_model_name": "FLUX.1-dev",
        "ss_v2": "False",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": "16",
        "ss_network_alpha": "16",
        "ss_network_args": "{}",
        "ss_steps": "300",
        "ss_max_train_steps": "300",
        "ss_epoch": "30",
        "ss_resolution": "(1024, 768)",
        "ss_seed": "7",
        "ss_learning_rate": "0.0001",
        "ss_unet_lr": "0.0001",
        "ss_optimizer": "adamw8bit",
        "ss_num_train_images": "20",
        "ss_training_started_at": "1767323045.0",
        "ss_training_finished_at": "1767326645.0",
        "ss_tag_frequency": '{"1_TOK": {"TOK": 1}}',
    }
    assert export == {
        "format_version": 1,
        "flavour": "kohya",
        "scale": "folded into up; alpha equals rank",
        "rank": 16,
        "targets": {"single_transformer_blocks.*.proj_out": 1, "transformer_blocks.*.attn.to_q": 2},
        "tool_version": "0.1.0",
        "config": {
            "finetune_comment": "my cat",
            "trigger_word": "TOK",
            "iterations": 300,
            "preview": {"every": 50},
            "lora": {"alpha": 16, "targets": ["attn"]},
            "captioning": True,
            "learning_rate": None,
        },
    }


@pytest.mark.parametrize("flavour", ["kohya", "diffusers"])
def test_nothing_private_and_nothing_that_changes_strength(flavour: str) -> None:
    got = build_metadata(INFO, flavour=flavour, modules=MODULES)
    assert all(isinstance(value, str) for value in got.values())
    assert "lora_adapter_metadata" not in got
    assert not any(word in json.dumps(got) for word in ("jane", "/home", "runs/", "Users", "/models"))


def test_no_trigger_word() -> None:
    got = build_metadata(replace(INFO, trigger_word=""), flavour="kohya", modules=MODULES)
    assert got["ss_tag_frequency"] == "{}"
    assert not {"modelspec.trigger_phrase", "modelspec.usage_hint"} & got.keys()


def test_trigger_words_keep_their_script() -> None:
    got = build_metadata(replace(INFO, trigger_word="猫"), flavour="kohya", modules=MODULES)
    assert json.loads(got["ss_tag_frequency"]) == {"1_猫": {"猫": 1}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str) -> None:
    got = build_metadata(replace(INFO, architecture=architecture), flavour="kohya", modules=MODULES)
    assert got["modelspec.architecture"] == architecture
    assert (got["ss_base_model_version"] == "flux1") == architecture.startswith("flux-1")


@pytest.mark.parametrize("base", ["black-forest-labs/FLUX.1-dev", "FLUX.1-dev", "C:\\x\\FLUX.1-dev", "/a/FLUX.1-dev/"])
def test_base_model_is_a_name(base: str) -> None:
    got = build_metadata(replace(INFO, base_model=base), flavour="kohya", modules=MODULES)
    assert got["ss_sd_model_name"] == "FLUX.1-dev"


@pytest.mark.parametrize("resolution", ["1024", "1024 x 768", "0x5", "1024x768\n", "wide"])
def test_bad_resolution(resolution: str) -> None:
    with pytest.raises(AdapterError, match="resolution"):
        build_metadata(replace(INFO, resolution=resolution), flavour="kohya", modules=MODULES)


def test_bad_architecture_and_config() -> None:
    with pytest.raises(AdapterError, match="sd-xl") as caught:
        build_metadata(replace(INFO, architecture="sd-xl"), flavour="kohya", modules=MODULES)
    assert "flux-1-dev/lora" in str(caught.value.hint)
    with pytest.raises(ConfigError):
        build_metadata(replace(INFO, config_yaml="a: ["), flavour="kohya", modules=MODULES)


def test_public_config_drops_places_at_any_depth() -> None:
    given = {"a": {"b": [{"c": "x/y", "d": 1}, "~/z", "ok"]}, "data": [1], "sub": {"prompts": ["hi"], "on": False}}
    assert public_config(given) == {"a": {"b": [{"d": 1}, "ok"]}, "sub": {"on": False}}


def test_the_file_tells_its_own_rank(tmp_path: Path) -> None:
    """Fusing q and k of rank 16 gives 32 on disk, which is what a reader of `ss_network_dim` needs to know."""
    layers = {
        f"transformer_blocks.0.attn.to_{part}": LoraLayer(torch.randn(16, 8), torch.randn(8, 16), 8.0) for part in "qk"
    }
    metadata = build_metadata(INFO, flavour="kohya", modules=layers)
    write_adapter(tmp_path / "a", AdapterState(layers), "kohya", torch.bfloat16, metadata)
    got = read_adapter(tmp_path / "a").metadata
    assert got["ss_network_dim"] == got["ss_network_alpha"] == "32"
    assert json.loads(got[EXPORT_KEY])["rank"] == 16
    assert metadata.keys() <= got.keys()


def test_loads_without_torch() -> None:
    code = "import sys, flux_ft.adapters.metadata; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_thumbnail_goes_in_where_there_is_one() -> None:
    url = "data:image/jpeg;base64,AAAA"
    with_one, without = (
        build_metadata(info, flavour="kohya", modules=MODULES) for info in (replace(INFO, thumbnail=url), INFO)
    )
    assert with_one == without | {"modelspec.thumbnail": url}
