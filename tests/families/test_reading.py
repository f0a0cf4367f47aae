"""Weights come from files of every kind as diffusers itself reads them, to the bit, and no model is in memory twice."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from test_contract import to_original
from torch import Tensor, nn

from flux_ft.errors import ModelError
from flux_ft.families import ahead, reading
from flux_ft.families.flux1 import Flux1
from flux_ft.families.quantize import StoredLinear, store
from flux_ft.families.reading import Carrier
from flux_ft.families.registry import open_family, tiny_folder

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
FILE = "diffusion_pytorch_model.safetensors"
SOURCES = ("folder", "shards", "float32 shards", "original", "diffusers", "float16 original")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """flux-tiny in every kind of file."""
    place = tmp_path_factory.mktemp("sources")
    weights = load_file(tiny_folder() / "transformer" / FILE)
    for name, dtype in (("shards", BF16), ("float32 shards", FP32)):
        shutil.copytree(tiny_folder(), place / name, ignore=shutil.ignore_patterns("transformer"))
        model = FluxTransformer2DModel.from_pretrained(tiny_folder(), subfolder="transformer", torch_dtype=dtype)
        model.save_pretrained(place / name / "transformer", max_shard_size="1MB")
        assert len(list((place / name / "transformer").glob("*.safetensors"))) > 2
    shutil.copytree(tiny_folder(), place / "folder")
    save_file(weights, place / "diffusers.safetensors")
    save_file(to_original(weights), place / "original.safetensors")
    save_file({key: one.half() for key, one in to_original(weights).items()}, place / "float16 original.safetensors")
    found = {name: place / name for name in SOURCES}
    return {name: path if path.is_dir() else path.with_suffix(".safetensors") for name, path in found.items()}


def open_source(path: Path) -> Flux1:
    family = open_family(str(path), None if path.is_dir() else "flux-tiny")
    assert isinstance(family, Flux1)
    return family


def by_diffusers(source: Path, dtype: torch.dtype) -> Any:
    """What diffusers' own loader makes of the folder, or of the one that the file was made from."""
    folder = source if source.is_dir() else tiny_folder()
    model = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)
    return model.eval().requires_grad_(False)


def same(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert [name for name, _ in found.named_buffers()] == [name for name, _ in wanted.named_buffers()]
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert not any(module.training for module in found.modules())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_file_gives_what_diffusers_reads(sources: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    if name.startswith("float16"):  # flux-tiny's weights are bf16, and some are too small for fp16
        wanted = by_diffusers(tiny_folder(), FP32).half().to(dtype)
        return same(open_source(sources[name]).load_denoiser(CPU, dtype), wanted)
    found, wanted = open_source(sources[name]).load_denoiser(CPU, dtype), by_diffusers(sources[name], dtype)
    same(found, wanted)
    told, theirs = (dict(model.config) for model in (found, wanted))  # type: ignore[call-overload]
    origins = told.pop("_name_or_path", None), str(theirs.pop("_name_or_path"))
    assert told == theirs
    assert origins[0] == (origins[1] if sources[name].is_dir() else None)


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("storage", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["folder", "float32 shards", "original"])
def test_grids_are_those_of_the_weights_that_diffusers_reads(
    sources: dict[str, Path], name: str, storage: Any, stream: bool
) -> None:
    family, plain = open_source(sources[name]), by_diffusers(sources[name], BF16)
    held = family.load_denoiser(CPU, BF16, storage, stream)
    grids = {path: one for path, one in held.named_modules() if isinstance(one, StoredLinear)}
    assert list(grids) == family.lora_targets(plain)
    for path, one in grids.items():
        linear = plain.get_submodule(path)
        grid_OI, scale_O = store(linear.weight.data, storage)
        assert torch.equal(one.weight.data.view(torch.uint8), grid_OI.view(torch.uint8))
        assert torch.equal(one.scale_O, scale_O)
        assert torch.equal(one.bias, linear.bias)
    outside = {key: one for key, one in held.named_parameters() if key.rpartition(".")[0] not in grids}
    assert all(torch.equal(one, plain.get_parameter(key)) for key, one in outside.items())


@pytest.mark.parametrize("name", ["folder", "shards", "original"])
def test_streamed_and_four_bit_weights_are_those_of_the_folder(sources: dict[str, Path], name: str) -> None:
    family, first = open_source(sources[name]), open_family("flux-tiny")
    same(family.load_denoiser(CPU, BF16, stream=True), by_diffusers(sources[name], BF16))
    assert isinstance(first, Flux1)
    four, like = (one.load_denoiser(CPU, BF16, "nf4").state_dict() for one in (family, first))
    assert four.keys() == like.keys()
    assert any(tensor.dtype == torch.uint8 for tensor in four.values())
    assert all(torch.equal(tensor, like[key]) for key, tensor in four.items())


def test_weights_that_need_no_cast_stay_pages_of_the_file(sources: dict[str, Path]) -> None:
    if sys.platform != "linux":
        pytest.skip("no list of a process's maps here")
    held = open_source(sources["shards"]).load_denoiser(CPU, BF16)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "shards/transformer" in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for name, parameter in held.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in spans), name


def test_a_model_that_is_trained_leaves_its_file_alone(sources: dict[str, Path]) -> None:
    files = sorted((sources["shards"] / "transformer").glob("*.safetensors"))
    before = [path.read_bytes() for path in files]
    held = open_source(sources["shards"]).load_denoiser(CPU, BF16)
    with torch.no_grad():
        for parameter in held.parameters():
            parameter.add_(1)
    assert [path.read_bytes() for path in files] == before
    same(open_source(sources["shards"]).load_denoiser(CPU, BF16), by_diffusers(sources["shards"], BF16))


# --- Memory. ---

SLACK_BYTES = 10e6
CHILD = """
import re, sys, torch
from pathlib import Path
from flux_ft.families.reading import Carrier
from flux_ft.families.registry import open_family
import diffusers.hooks, diffusers.models.transformers.transformer_flux

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

seen, carry = [], Carrier.carry
def watched(self, *given):
    result = carry(self, *given)
    seen.append(held())
    return result
Carrier.carry = watched
open_family("flux-tiny").load_denoiser(torch.device("cpu"), torch.float32, "int8")  # what is made once is not counted
for folder in sys.argv[1:]:
    for storage in (None, "int8"):
        seen.clear()
        before = held()
        model = open_family(folder).load_denoiser(torch.device("cpu"), torch.bfloat16, storage)
        print(max(seen) - before, held() - before, sum(one.nbytes for one in model.parameters()))
        del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells memory of a process's own from pages of files")
def test_no_weight_is_in_memory_twice(tmp_path: Path) -> None:
    config = dict(FluxTransformer2DModel.load_config(tiny_folder(), subfolder="transformer"))
    wide = {"num_attention_heads": 12, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24), "num_single_layers": 2}
    with torch.device("meta"):
        shapes = {key: one.shape for key, one in FluxTransformer2DModel.from_config(config | wide).state_dict().items()}
    for name, dtype in (("bf16", BF16), ("fp32", FP32)):
        shutil.copytree(tiny_folder(), tmp_path / name)
        weights = {key: torch.full(shape, 0.5, dtype=dtype) for key, shape in shapes.items()}
        save_file(weights, tmp_path / name / "transformer" / FILE)
        (tmp_path / name / "transformer" / "config.json").write_text(json.dumps(config | wide))
    count, largest = sum(map(math.prod, shapes.values())), max(map(math.prod, shapes.values()))
    assert count > 40e6  # so that a copy stands out

    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # which may keep it all
    env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "bf16"), str(tmp_path / "fp32")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    # Pages of the bf16 file, then int8, bf16 and int8 of its own; one weight in float32 may be there besides.
    for (peak, after, held), own in zip(seen, (0, count, 2 * count, count), strict=True):
        assert held == pytest.approx(own or 2 * count, rel=0.1)
        assert after < 1.1 * own + SLACK_BYTES, seen
        assert peak < 1.1 * own + 4 * largest + SLACK_BYTES, seen


# --- Copies to a GPU, with other memory in its place. ---


class Mark:
    """A copy's end, as a CUDA event marks it; a copy has not happened before its mark is waited for."""

    log: list[str]

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.open = log, name, False

    def synchronize(self) -> None:
        self.log.append(f"wait {self.name}" if self.open else f"free {self.name}")
        self.open = False

    def record(self, stream: object) -> None:
        assert not self.open, "a stage was filled again under a copy"
        self.log.append(f"copy {self.name}")
        self.open = True


def staging(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> Carrier:
    """One that copies to the CPU as to a GPU, 16 bytes at once."""
    monkeypatch.setattr(reading, "STAGE_BYTES", 16)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    carrier = Carrier(CPU)
    carrier._stages = [(torch.empty(16, dtype=torch.uint8), Mark(log, name)) for name in "ab"]  # type: ignore[misc]
    return carrier


@pytest.mark.parametrize("size", [1, 7, 8, 9, 40])
def test_stages_take_turns_and_none_is_filled_under_a_copy(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    log: list[str] = []
    carrier = staging(monkeypatch, log)
    tensor = torch.randn(size, 3, generator=torch.Generator().manual_seed(0)).to(BF16)
    first = carrier.carry(tensor)
    assert torch.equal(first, tensor)
    assert first.data_ptr() != tensor.data_ptr()
    parts = -(-size * 6 // 16)
    turns = "ab" * parts
    wanted = [f"{'free' if turn < 2 else 'wait'} {turns[turn]}" for turn in range(parts)]
    assert log[::2] == wanted
    assert log[1::2] == [f"copy {turns[turn]}" for turn in range(parts)]
    second = carrier.carry(tensor.t(), FP32)
    assert torch.equal(second, tensor.t().float())
    assert carrier.carry(torch.empty(0, 3)).shape == (0, 3)


def test_a_model_keeps_its_dtypes_and_what_its_layers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(BF16), nn.BatchNorm1d(2))
    model[1].bias = model[0].bias
    wanted = {name: one.clone() for name, one in model.state_dict().items()}
    assert staging(monkeypatch, []).bring_all(model) is model
    assert model[1].bias is model[0].bias
    for name, one in model.state_dict().items():
        assert one.dtype == wanted[name].dtype
        assert torch.equal(one, wanted[name])


def test_a_carrier_leaves_alone_what_is_there_already() -> None:
    tensor, carrier = torch.randn(3), Carrier(CPU)
    assert carrier.carry(tensor) is tensor
    assert carrier.carry(tensor, FP32) is tensor
    module = nn.BatchNorm1d(3)
    carrier.bring(module, BF16)
    assert {name: one.dtype for name, one in module.state_dict().items()} == {
        "weight": BF16, "bias": BF16, "running_mean": BF16, "running_var": BF16, "num_batches_tracked": torch.int64,
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="no such advice here")
def test_all_of_a_file_is_advised_in_small_pieces(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: pieces.append((start, size)))
    ahead._advise([tmp_path / "nowhere", sources["original"]])
    ends = [start + size for start, size in pieces]
    assert [start for start, _ in pieces] == [0, *ends[:-1]]
    assert ends[-1] >= sources["original"].stat().st_size > ends[-2]
    assert max(size for _, size in pieces) <= 128 * 2**10
    monkeypatch.undo()
    ahead._advise([sources["original"]])


def test_a_model_is_read_ahead_where_it_is_at_hand_and_fits(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(ahead, "read_ahead", lambda files: asked.append({file.name for file in files}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shards = {path.name for path in (sources["shards"] / "transformer").glob("*.safetensors")}
    for source, files in (
        (str(tiny_folder()), {FILE}), (str(sources["shards"]), shards),
        (str(sources["original"]), {"original.safetensors"}), ("ann/nowhere", set()), ("nonsense", set()),
    ):  # fmt: skip
        ahead.read_model_ahead(source, 2**40)
        assert asked.pop() == files
    for room in (1000, None):
        ahead.read_model_ahead(str(tiny_folder()), room)
        assert not asked
    for source in ("ann/no--where", "ann/nowhere.git", "ann/" + 100 * "a"):
        ahead.read_model_ahead(source, 2**40)
        assert not asked
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / f"{FILE}.index.json").write_text("no index")
    ahead.read_model_ahead(str(tmp_path), 2**40)
    assert not asked


# --- What is refused. ---


def refusal(folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        open_source(folder).load_denoiser(CPU, FP32)
    assert str(folder) in caught.value.message
    return caught.value


@pytest.fixture
def shards(sources: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(sources["shards"], tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the shard with flux-tiny's first layer."""
    index = json.loads((folder / "transformer" / f"{FILE}.index.json").read_text())["weight_map"]
    path = folder / "transformer" / index["x_embedder.weight"]
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not pages of what is overwritten
    how(weights)
    save_file(weights, path)


def test_a_missing_shard_is_named(shards: Path) -> None:
    path = sorted((shards / "transformer").glob("*.safetensors"))[1]
    path.unlink()
    assert f"lacks {path.name}" in refusal(shards).message


def test_a_truncated_shard_is_named(shards: Path) -> None:
    path = sorted((shards / "transformer").glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert path.name in refusal(shards).message


def test_a_file_that_is_too_large_to_be_mapped_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 23802932552 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr(reading, "safe_open", refuse)
    error = refusal(shards)
    assert "cannot be mapped: unable to mmap" in error.message
    assert "add swap" in str(error.hint)


def test_tensors_that_do_not_fit_are_named(shards: Path) -> None:
    change(shards, lambda weights: weights.update({"x_embedder.weight": torch.zeros(128, 3)}))
    assert "x_embedder.weight is (128, 3), expected (128, 32)" in refusal(shards).message
    change(shards, lambda weights: weights.update({"x_embedder.weight": torch.zeros(128, 32, dtype=torch.int32)}))
    assert "x_embedder.weight is torch.int32" in refusal(shards).message
    change(shards, lambda weights: weights.pop("x_embedder.weight"))
    assert "x_embedder.weight is missing, expected (128, 32)" in refusal(shards).message


def test_tensors_of_no_use_are_told_and_left(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(shards, lambda weights: weights.update({"extra.weight": torch.zeros(2)}))
    same(open_source(shards).load_denoiser(CPU, BF16), by_diffusers(tiny_folder(), BF16))
    assert "1 tensors are of no use: extra.weight" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\x00"])
def test_a_broken_index_is_named(shards: Path, content: str) -> None:
    path = shards / "transformer" / f"{FILE}.index.json"
    path.write_text(content)
    assert path.name in refusal(shards).message


def test_a_broken_config_is_named(shards: Path) -> None:
    path = shards / "transformer" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"num_layers": "two"}))
    assert "`transformer` could not be loaded" in refusal(shards).message
    path.write_text(json.dumps(settings | {"quantization_config": {"quant_method": "unheard of"}}))
    assert "`transformer` could not be loaded" in refusal(shards).message
