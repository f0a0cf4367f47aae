"""What is chosen for which card, that the estimate is kept to, and that its constants are what the libraries do."""

from __future__ import annotations

import itertools
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flux_ft.errors import ConfigError, FluxFTError, InputError
from flux_ft.families.base import Family
from flux_ft.families.flux1 import Flux1
from flux_ft.families.registry import FLUX1_DEV, open_family
from flux_ft.infer.fit import (
    ACTIVATIONS,
    DECODING,
    FLUX1_SIZES,
    STREAMED_BLOCKS,
    Fit,
    FitWishes,
    Machine,
    choose_fit,
    host_bytes,
    machine_of,
    model_sizes,
)

MP = (1024, 1024)
HOST = 64 * 10**9


def card(gib: float, host: int | None = HOST, **more: Any) -> Machine:
    """A card of so many GiB, of which a desktop takes 3 %."""
    return Machine("cuda", int(gib * 2**30 * 0.97), host, **more)


def choose(machine: Machine, picture: tuple[int, int] = MP, wishes: FitWishes | None = None, **more: Any) -> Fit:
    return choose_fit(FLUX1_SIZES, picture, machine, wishes or FitWishes(), **more)


def rung(fit: Fit) -> tuple[str, bool, bool]:
    return fit.storage, fit.stream, fit.vae_tiling


LADDER = [
    ("bf16", False, False), ("bf16", False, True), ("int8", False, False), ("int8", False, True),
    ("nf4", False, False), ("nf4", False, True),
    ("bf16", True, False), ("bf16", True, True), ("int8", True, False), ("int8", True, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("gib", "expected", "encoders", "alone"),
    [
        (3, ("int8", True, False), "offload", False),
        (6, ("bf16", True, False), "offload", False),
        (8, ("nf4", False, True), "offload", False),
        (12, ("nf4", False, False), "offload", True),
        (16, ("int8", False, False), "offload", True),
        (24, ("int8", False, False), "offload", True),
        (48, ("bf16", False, False), "device", True),
        (80, ("bf16", False, False), "device", True),
    ],
)
def test_flux1_at_one_megapixel(gib: int, expected: tuple[str, bool, bool], encoders: str, alone: bool) -> None:
    fit = choose(card(gib))
    assert rung(fit) == expected
    assert (fit.encoders, fit.encoders_alone) == (encoders, alone)
    assert fit.peak_bytes < fit.needs_bytes <= card(gib).free_bytes
    assert f"{fit.storage} weights" in fit.for_people()
    assert json.dumps(fit.as_json())


def test_more_memory_is_never_worse() -> None:
    for picture, loras in itertools.product((MP, (2048, 2048), (512, 512)), (0, 65_000_000)):
        fits = [choose(card(gib), picture, lora_params=loras) for gib in range(6, 82, 2)]
        places = [LADDER.index(rung(fit)) for fit in fits]
        assert places == sorted(places, reverse=True)
        assert places[0] > places[-1]


def test_more_of_anything_needs_more() -> None:
    least = choose(card(80), (512, 512)).needs_bytes
    for fit in (
        choose(card(80), (512, 1024)),
        choose(card(80), (512, 512), batch=16),
        choose(card(80), (512, 512), shown_px=4 * 2**20),
        choose(card(80), (512, 512), lora_params=65_000_000),
    ):
        assert fit.needs_bytes > least


def test_texts_are_encoded_where_there_is_room() -> None:
    small, middle, large = (choose(card(gib)) for gib in (8, 16, 80))
    assert [fit.encode_on_device(False) for fit in (small, middle, large)] == [False, True, True]
    assert [fit.encode_on_device(True) for fit in (small, middle, large)] == [False, False, True]


class TestWishes:
    @pytest.mark.parametrize("storage", ["fp32", "bf16", "int8", "fp8", "nf4"])
    @pytest.mark.parametrize("gib", [4, 24, 80])
    def test_a_storage_is_taken_on_any_card(self, storage: Any, gib: int) -> None:
        fit = choose(card(gib), wishes=FitWishes(storage))
        assert fit.storage == storage
        assert fit.needs_bytes <= card(gib).free_bytes or "as asked" in fit.for_people()

    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("tiling", [True, False])
    def test_the_rest_is_chosen_around_them(self, stream: bool, tiling: bool) -> None:
        for gib in (4, 16, 80):
            fit = choose(card(gib), wishes=FitWishes(stream=stream, vae_tiling=tiling, compile=True))
            assert (fit.stream, fit.vae_tiling, fit.compile) == (stream, tiling, True)

    def test_a_storage_that_is_too_large_is_streamed(self) -> None:
        assert rung(choose(card(12), wishes=FitWishes("bf16"))) == ("bf16", True, False)

    def test_what_does_not_work_is_refused(self) -> None:
        without = card(24, missing={"nf4": "bitsandbytes is not installed"})
        with pytest.raises(ConfigError, match="nf4` cannot be had: bitsandbytes is not installed"):
            choose(without, wishes=FitWishes("nf4"))
        with pytest.raises(ConfigError, match="cannot be streamed"):
            choose(card(24), wishes=FitWishes("nf4", stream=True))

    def test_what_does_not_work_is_passed_over_and_told(self) -> None:
        fit = choose(card(12, missing={"nf4": "bitsandbytes is not installed"}))
        assert rung(fit) == ("bf16", True, False)
        assert "no nf4: bitsandbytes is not installed" in fit.for_people()


class TestLimits:
    def test_weights_wait_in_host_memory_only_if_it_holds_them(self) -> None:
        assert rung(choose(card(6, host=32 * 10**9))) == ("bf16", True, False)
        assert rung(choose(card(6, host=16 * 10**9))) == ("int8", True, False)
        with pytest.raises(FluxFTError, match="need about") as caught:
            choose(card(6, host=8 * 10**9))
        assert "host memory" in str(caught.value.hint)

    def test_nothing_fits(self) -> None:
        with pytest.raises(FluxFTError, match="4096×4096 pixels need about") as caught:
            choose(card(2), (4096, 4096), batch=4)
        assert not isinstance(caught.value, InputError)
        assert "fewer at a time" in caught.value.hint
        assert "2048×2048" in caught.value.hint

    def test_unknown_memory_takes_the_best(self) -> None:
        fit = choose(Machine("mps", None))
        assert rung(fit) == ("bf16", False, False)
        assert "cannot be asked" in fit.for_people()

    def test_memory_that_is_not_the_devices_own_is_not_streamed_to(self) -> None:
        with pytest.raises(FluxFTError):
            choose(Machine("mps", 4 * 10**9, HOST))


class TestCPU:
    def test_computes_in_fp32(self) -> None:
        full, small = (choose(Machine("cpu", free * 10**9)) for free in (128, 32))
        assert (rung(full), full.encoders, full.compute("cpu")) == (("fp32", False, False), "device", "fp32")
        assert (small.storage, small.compute("cpu"), small.compute("cuda")) == ("int8", "fp32", "bf16")

    def test_says_nothing_of_flux_tiny_unless_asked(self, tiny_family: Family) -> None:
        sizes, machine = model_sizes(tiny_family), machine_of(torch.device("cpu"))
        plain = choose_fit(sizes, (64, 64), machine)
        assert (rung(plain), plain.for_people()) == (("fp32", False, False), "")
        assert "int8 weights" in choose_fit(sizes, (64, 64), machine, FitWishes("int8")).for_people()


class TestSizes:
    def test_of_a_folder_are_those_of_the_loaded_model(self, tiny_family: Family) -> None:
        cpu, dtype = torch.device("cpu"), torch.float32
        denoiser, sizes = tiny_family.load_denoiser(cpu, dtype), model_sizes(tiny_family)
        blocks = tiny_family.blocks(denoiser).values()
        matrices = [one.numel() for block in blocks for one in block.parameters() if one.ndim == 2]
        stack = tiny_family.load_text(cpu, dtype)

        def count(*modules: torch.nn.Module) -> int:
            return sum(one.numel() for module in modules for one in module.parameters())

        assert (sizes.denoiser, sizes.vae) == (count(denoiser), count(tiny_family.load_vae(cpu, dtype)))
        assert sizes.encoders == pytest.approx(count(stack.clip, stack.t5), rel=0.01)
        assert (sizes.held, sizes.largest_matrix) == (sum(matrices), max(matrices))
        assert sizes.largest_block == max(count(block) for block in blocks)
        assert (sizes.width, sizes.token_px, sizes.text_tokens) == (128, 8, 32)

    def test_of_one_file_are_the_transformers(self, tmp_path: Path, tiny_family: Family) -> None:
        state = tiny_family.load_denoiser(torch.device("cpu"), torch.float32).state_dict()
        save_file(state, tmp_path / "one.safetensors")
        found = model_sizes(open_family(str(tmp_path / "one.safetensors"), "flux-tiny"))
        assert found == model_sizes(tiny_family)

    def test_of_what_is_not_here_are_flux1s(self) -> None:
        assert model_sizes(Flux1(FLUX1_DEV, "some/where", "some/where")) == FLUX1_SIZES
        with torch.device("meta"):
            full = FluxTransformer2DModel(guidance_embeds=True)
        assert sum(one.numel() for one in full.parameters()) == FLUX1_SIZES.denoiser

    def test_shards_are_counted_once(self, tmp_path: Path) -> None:
        folder = tmp_path / "transformer"
        folder.mkdir()
        save_file({"transformer_blocks.0.ff.weight": torch.zeros(3, 4)}, folder / "a-1.safetensors")
        save_file({"x_embedder.weight": torch.zeros(5, 2)}, folder / "a-2.safetensors")
        save_file({"x_embedder.weight": torch.zeros(5, 2)}, folder / "a.fp16.safetensors")
        index = {"weight_map": {"transformer_blocks.0.ff.weight": "a-1.safetensors",
                                "x_embedder.weight": "a-2.safetensors"}}  # fmt: skip
        (folder / "a.safetensors.index.json").write_text(json.dumps(index))
        sizes = model_sizes(Flux1(FLUX1_DEV, str(tmp_path), str(tmp_path)))
        assert (sizes.denoiser, sizes.held, sizes.width) == (22, 12, 5)
        assert sizes.encoders == FLUX1_SIZES.encoders


def test_a_container_lowers_host_memory(tmp_path: Path) -> None:
    assert host_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert host_bytes(tmp_path) == 4000 * 1024
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.current").write_text("1000\n")
    for limit, expected in (("max\n", 4000 * 1024), ("3000\n", 2000), ("500\n", 0)):
        (cgroup / "memory.max").write_text(limit)
        assert host_bytes(tmp_path) == expected


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_of(model: torch.nn.Module, *args: Any, **kwargs: Any) -> int:
    with LiveBytes() as counted, torch.no_grad():
        counted.live |= {one.untyped_storage()._cdata: 0 for one in model.parameters()}
        model(*args, **kwargs)
    return counted.peak


def test_the_constants_are_those_of_the_libraries() -> None:
    """On tensors without contents, at full width; a few per cent below what is counted on would be too little."""
    dtype = torch.bfloat16
    with FakeTensorMode(), torch.device("cpu"):
        torch.set_default_dtype(dtype)
        try:
            denoiser = FluxTransformer2DModel(guidance_embeds=True, num_layers=1, num_single_layers=2)
            vae = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16,
            )  # fmt: skip
        finally:
            torch.set_default_dtype(torch.float32)
        tokens, text = 4096, 512
        drawing = peak_of(
            denoiser, torch.zeros(1, tokens, 64, dtype=dtype), torch.zeros(1, text, 4096, dtype=dtype),
            torch.zeros(1, 768, dtype=dtype), torch.zeros(1, dtype=dtype), torch.zeros(tokens, 3),
            torch.zeros(text, 3), torch.zeros(1),
        )  # fmt: skip
        decoding = peak_of(vae.decoder, torch.zeros(1, 16, 64, 64, dtype=dtype))
    assert 0.95 < drawing / dtype.itemsize / (tokens + text) / 3072 / ACTIVATIONS < 1.01
    assert 0.7 < decoding / dtype.itemsize / 512**2 / 128 / DECODING < 0.8


def test_a_streamed_model_keeps_few_blocks_on_the_card() -> None:
    plain, streamed = (choose(card(80), wishes=FitWishes("bf16", stream=one)) for one in (False, True))
    larger = replace(FLUX1_SIZES, largest_block=FLUX1_SIZES.largest_block + 10**6)
    more = choose_fit(larger, MP, card(80), FitWishes("bf16", stream=True))
    assert streamed.peak_bytes < plain.peak_bytes / 5
    assert more.peak_bytes - streamed.peak_bytes in (0, STREAMED_BLOCKS * 2 * 10**6)


def test_tiles_bound_what_drawing_takes_and_not_what_decoding_takes() -> None:
    """Ultra's model sees tiles of 1 MP of a picture of 4 MP."""
    machine, wishes = Machine("cuda", 10**12, 10**12), FitWishes(vae_tiling=False)

    def peak(side: int, tile_px: int | None = None, sizes: Any = FLUX1_SIZES) -> int:
        return choose_fit(sizes, (side, side), machine, wishes, tile_px=tile_px).peak_bytes

    no_vae = replace(FLUX1_SIZES, vae_channels=0)
    assert peak(2048, 1024**2, no_vae) == peak(1024, None, no_vae) < peak(2048, None, no_vae)
    assert peak(2048, 1024**2) == peak(2048, 1)  # decoding is what takes most
