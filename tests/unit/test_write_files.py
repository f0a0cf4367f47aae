"""Whole transformers as one file: the same weights by every reader, written one by one, or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _checkpoints import model, save_diffusers, save_original, shapes, to_diffusers
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flux_ft import log
from flux_ft.adapters import write_files
from flux_ft.adapters.checkpoint_files import Checkpoint, Weight, from_tensors, open_checkpoint
from flux_ft.adapters.write_files import Entry, file_pieces, single_file_size, write_single_file
from flux_ft.errors import ModelError, StorageError
from flux_ft.families.base import Family
from flux_ft.families.registry import open_family, tiny_folder

CPU, FP32 = torch.device("cpu"), torch.float32


class TestOneFile:
    def test_flux_tiny_comes_back_bit_by_bit_as_a_model(self, tmp_path: Path, tiny_family: Family) -> None:
        path = tmp_path / "full.safetensors"
        size = write_single_file(open_checkpoint(tiny_folder()), path, FP32)
        assert size == path.stat().st_size
        before = tiny_family.load_denoiser(CPU, FP32).state_dict()
        after = open_family(str(path), "flux-tiny").load_denoiser(CPU, FP32).state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)

    def test_its_keys_are_those_of_the_original_layout(self, tmp_path: Path) -> None:
        path = tmp_path / "full.safetensors"
        write_single_file(from_tensors(to_diffusers(model()), "m"), path, FP32)
        with safe_open(path, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert found == shapes()

    def test_weights_in_memory_and_in_files_of_either_layout_give_the_same_bytes(self, tmp_path: Path) -> None:
        weights = model()
        sources = {
            "memory": from_tensors(weights, "m"),
            "diffusers-memory": from_tensors(to_diffusers(weights), "m"),
            "file": open_checkpoint(save_original(tmp_path / "m.safetensors", weights, "model.diffusion_model.")),
            "shards": open_checkpoint(save_diffusers(tmp_path / "m", weights, 3)),
        }
        for name, source in sources.items():
            write_single_file(source, tmp_path / f"{name}.safetensors", FP32)
        written = {(tmp_path / f"{name}.safetensors").read_bytes() for name in sources}
        assert len(written) == 1
        found = load_file(tmp_path / "memory.safetensors")
        assert all(torch.equal(found[key], weights[key]) for key in weights)

    def test_diffusers_own_converter_reads_it(self, tmp_path: Path) -> None:
        # Its widths are fixed to 3072 rows, and columns pass through, so two columns are enough and small.
        rng = torch.Generator().manual_seed(0)
        rows = {key: (shape[0] * 192, *([2] if len(shape) == 2 else [])) for key, shape in shapes(1, 1).items()}
        theirs = to_diffusers({key: torch.randn(shape, generator=rng) for key, shape in rows.items()})
        path = tmp_path / "full.safetensors"
        write_single_file(from_tensors(theirs, "m"), path, FP32)
        found = convert_flux_transformer_checkpoint_to_diffusers(load_file(path))
        assert found.keys() == theirs.keys()
        assert all(torch.equal(found[key], theirs[key]) for key in theirs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_other_types_are_rounded_once(self, tmp_path: Path, dtype: torch.dtype) -> None:
        weights = model()
        path = tmp_path / "full.safetensors"
        write_single_file(from_tensors(weights, "m"), path, dtype)
        found = load_file(path)
        assert all(torch.equal(found[key], tensor.to(dtype)) for key, tensor in weights.items())

    def test_fp8_weights_are_written_with_their_scale(self, tmp_path: Path) -> None:
        weights, key = model(), "single_blocks.0.linear2.weight"
        weights[key] = weights[key].to(torch.float8_e4m3fn)
        extra = {"single_blocks.0.linear2.scale_weight": torch.tensor(3.0)}
        source = save_original(tmp_path / "fp8.safetensors", weights, **extra)
        write_single_file(open_checkpoint(source), tmp_path / "full.safetensors", FP32)
        found = load_file(tmp_path / "full.safetensors")
        assert found.keys() == weights.keys()
        assert torch.equal(found[key], weights[key].float() * 3)

    def test_the_header_holds_what_was_given(self, tmp_path: Path) -> None:
        path = tmp_path / "full.safetensors"
        write_single_file(from_tensors(model(), "m"), path, FP32, {"modelspec.title": "Моя кошка"})
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "modelspec.title": "Моя кошка"}

    @pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
    def test_others_may_read_it_whatever_the_umask(self, tmp_path: Path) -> None:
        path = tmp_path / "full.safetensors"
        before = os.umask(0o077)
        try:
            write_single_file(from_tensors(model(), "m"), path, FP32)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644

    def test_its_size_is_known_beforehand(self, tmp_path: Path) -> None:
        source, path = from_tensors(model(), "m"), tmp_path / "full.safetensors"
        for dtype in (FP32, torch.bfloat16):
            size = write_single_file(source, path, dtype)
            assert 0 < size - single_file_size(source, dtype) < 150 * len(source.weights)


class TestManner:
    def test_progress_counts_every_tensor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bars = []

        class Bar(log.Bar):
            def __enter__(self) -> Bar:
                bars.append(self)
                super().__enter__()
                return self

        monkeypatch.setattr(log, "Bar", Bar)
        write_single_file(from_tensors(model(), "m"), tmp_path / "mine-full.safetensors", FP32)
        (bar,) = bars
        assert bar.done == bar.total == len(shapes())
        assert "mine-full.safetensors" in bar.title

    def test_each_weight_is_read_only_when_the_one_before_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[str] = []
        read_when_written: list[int] = []

        def counted(weight: Weight) -> Weight:
            (part,) = weight.parts
            return replace(weight, parts=(replace(part, read=lambda: (read.append(weight.name), part.read())[1]),))

        def write_whole(path: Path, pieces: Iterable[bytes], mode: int) -> None:
            for piece in pieces:
                read_when_written.append(len(read))
                assert piece
            path.touch()

        whole = from_tensors(model(), "m")
        source = replace(whole, weights={name: counted(weight) for name, weight in whole.weights.items()})
        monkeypatch.setattr(write_files, "write_whole", write_whole)
        write_single_file(source, tmp_path / "full.safetensors", FP32)
        assert read_when_written == list(range(len(shapes()) + 1))  # the header comes before the first

    def test_an_earlier_file_is_replaced_by_a_whole_one_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "full.safetensors"
        path.write_text("earlier")
        with pytest.raises(ModelError, match="is gone"):
            write_single_file(failing(from_tensors(model(), "m")), path, FP32)
        assert path.read_text() == "earlier"
        assert [one.name for one in tmp_path.iterdir()] == [path.name]
        write_single_file(from_tensors(model(), "m"), path, FP32)
        assert load_file(path).keys() == shapes().keys()

    def test_a_full_disk_is_told_before_anything_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(StorageError, match="are needed"):
            write_single_file(failing(from_tensors(model(), "m")), tmp_path / "full.safetensors", FP32)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("value", "dtype", "message"),
        [
            (float("nan"), FP32, r"`img_in\.weight` of mine holds NaN or infinity"),
            (float("inf"), torch.bfloat16, r"`img_in\.weight` of mine holds NaN or infinity"),
            (1e5, torch.float16, r"`img_in\.weight` of mine holds numbers too large for F16"),
        ],
    )
    def test_what_is_not_a_number_is_not_written(
        self, tmp_path: Path, value: float, dtype: torch.dtype, message: str
    ) -> None:
        weights = model()
        weights["img_in.weight"][0, 0] = value
        with pytest.raises(ModelError, match=message):
            write_single_file(from_tensors(weights, "mine"), tmp_path / "full.safetensors", dtype)
        assert not list(tmp_path.iterdir())


def failing(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, whose last weight cannot be read."""

    def read() -> Tensor:
        raise ModelError("it is gone")

    name, weight = list(checkpoint.weights.items())[-1]
    broken = replace(weight, parts=tuple(replace(part, read=read) for part in weight.parts))
    return replace(checkpoint, weights=checkpoint.weights | {name: broken})


def test_pieces_that_are_not_those_announced_are_refused() -> None:
    entries = [Entry("a", "F32", (2,)), Entry("b", "BF16", (3,))]
    with pytest.raises(AssertionError, match="b"):
        list(file_pieces(entries, [torch.zeros(2), torch.zeros(3)]))
    with pytest.raises(ValueError, match="shorter"):
        list(file_pieces(entries, [torch.zeros(2)]))


def test_a_type_without_a_size_is_refused() -> None:
    with pytest.raises(ModelError, match="`x` is of type F4, which cannot be copied"):
        _ = Entry("x", "F4", (2,)).size
