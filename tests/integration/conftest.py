"""Fixtures of the integration tests: real verbs on flux-tiny."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from _verbs import write_scenes

from flux_ft.types import AdapterState, LoraLayer


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "trained: judges pictures, so it needs flux-tiny's trained weights")


@pytest.fixture(autouse=True)
def _stay_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures with captions. Do not write into it."""
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="session")
def make_lora() -> Callable[..., Path]:
    """Writes a LoRA with random weights that fits flux-tiny; `width` other than None makes one that does not."""
    import torch
    from torch import nn

    from flux_ft.adapters.formats import write_adapter
    from flux_ft.families.registry import open_family

    family = open_family("flux-tiny")
    denoiser = family.load_denoiser(torch.device("cpu"), torch.float32)
    shapes: dict[str, tuple[int, int]] = {}
    for path in family.lora_targets(denoiser):
        module = denoiser.get_submodule(path)
        assert isinstance(module, nn.Linear)
        shapes[path] = (module.out_features, module.in_features)

    def make(path: Path, seed: int = 0, width: int | None = None, format: str = "diffusers") -> Path:
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for name, (rows, columns) in shapes.items():
            columns = width or columns
            down = torch.randn(4, columns, generator=generator) / columns**0.5
            layers[name] = LoraLayer(down, torch.randn(rows, 4, generator=generator) / 4, 4.0)
        write_adapter(path, AdapterState(layers), format, torch.float32, {})
        return path

    return make
