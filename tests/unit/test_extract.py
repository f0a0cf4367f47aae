"""Extraction, resizing and merging, from files to files, on flux-tiny and smaller models."""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _checkpoints import is_matrix, model, planted, save_diffusers, save_original, to_diffusers
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_ft.adapters import extract as engine
from flux_ft.adapters.checkpoint_files import Checkpoint, Weight, from_tensors, open_checkpoint
from flux_ft.adapters.extract import Options, Work, extract, leftover_tensors, resize
from flux_ft.adapters.formats import (
    bfl_module,
    compare_adapters,
    delta_weight,
    read_adapter,
    read_tensors,
    to_kohya,
    write_adapter,
)
from flux_ft.adapters.jobs import extract_files, merge_file, open_model, resize_file
from flux_ft.adapters.merge import merge
from flux_ft.errors import AdapterError, ConfigError, FluxFTError, ModelError, StoppedByUser, StorageError
from flux_ft.families.registry import tiny_folder
from flux_ft.types import AdapterState, AppliedAdapter, LoraLayer

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
FP32 = torch.float32


def clock() -> datetime.datetime:
    return NOW


def tiny() -> dict[str, Tensor]:
    """flux-tiny in the original layout."""
    return {name: weight.read().grid for name, weight in open_checkpoint(tiny_folder()).weights.items()}


def matrices(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removesuffix(".weight"): tensor.float() for key, tensor in weights.items() if is_matrix(key)}


def deltas(state: AdapterState) -> dict[str, Tensor]:
    """ΔW by original module, formed whole."""
    tensors = to_kohya(state, FP32)
    return {
        key.removesuffix(".lora_up.weight"): up @ tensors[key.replace("_up", "_down")]
        for key, up in tensors.items()
        if key.endswith(".lora_up.weight")
    }


def error(state: AdapterState, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> float:
    """‖Δ − ΔW‖ / ‖Δ‖ over all block matrices."""
    got, first, second = deltas(state), matrices(base), matrices(tuned)
    lost, total = 0.0, 0.0
    for name in first:
        delta = second[name] - first[name]
        lost += float((delta - got.get("lora_unet_" + name.replace(".", "_"), torch.zeros(()))).square().sum())
        total += float(delta.square().sum())
    return math.sqrt(lost / total)


def checkpoints(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> tuple[Checkpoint, Checkpoint]:
    return from_tensors(base, "base"), from_tensors(tuned, "tuned")


class TestExtract:
    @pytest.mark.parametrize("exact", [False, True])
    def test_a_planted_change_comes_back(self, exact: bool) -> None:
        base = tiny()
        tuned = planted(base, 4)
        state, report = extract(*checkpoints(base, tuned), Options(rank=4, dtype=FP32, exact=exact))
        assert error(state, base, tuned) < 1e-5
        assert report.energy_kept == pytest.approx(1, abs=1e-9)
        assert max(layer.residual for layer in report.layers) < 1e-5
        assert {layer.rank for layer in report.layers} == {4}
        assert len(state.layers) == 2 * 14 + 4 * 6

    @pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
    def test_at_any_size(self, size: float) -> None:
        base = {key: torch.zeros_like(tensor) for key, tensor in model().items()}
        tuned = planted(base, 2, size)
        state, report = extract(*checkpoints(base, tuned), Options(rank=2))
        assert error(state, base, tuned) < 5e-3
        assert math.sqrt(1 - report.energy_kept) == pytest.approx(error(state, base, tuned), rel=1e-2)

    def test_what_is_reported_is_true_of_the_factors(self) -> None:
        base = tiny()
        tuned = planted(base, 24)
        state, report = extract(*checkpoints(base, tuned), Options(rank=8))
        got, first, second = deltas(state), matrices(base), matrices(tuned)
        for layer in report.layers:
            delta = (second[layer.name] - first[layer.name]).double()
            gap = delta - got["lora_unet_" + layer.name.replace(".", "_")].double()
            assert layer.change == pytest.approx(float(delta.norm()), rel=1e-6)
            assert layer.residual == pytest.approx(float(gap.norm() / delta.norm()), rel=1e-4)
            assert layer.shape == tuple(delta.shape)
        assert math.sqrt(1 - report.energy_kept) == pytest.approx(error(state, base, tuned), rel=1e-4)

    def test_kohya_keeps_the_rank(self) -> None:
        base = model()
        state, _ = extract(*checkpoints(base, planted(base, 3)), Options(rank=3))
        ranks = {key: len(tensor) for key, tensor in to_kohya(state, torch.bfloat16).items() if "down" in key}
        assert set(ranks.values()) == {3}

    def test_every_layout_gives_the_same_lora(self, tmp_path: Path) -> None:
        base = model(dtype=torch.bfloat16)
        tuned = {key: tensor.bfloat16() for key, tensor in planted(base, 4).items()}
        a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        files = [
            (save_original(a, base), save_original(b, tuned, "diffusion_model.")),
            (save_diffusers(tmp_path / "c", base, 3), save_diffusers(tmp_path / "d" / "transformer", tuned).parent),
            (a, tmp_path / "d"),
        ]  # fmt: skip
        found = [extract(open_checkpoint(a), open_checkpoint(b), Options(rank=2))[0] for a, b in files]
        for other in found[1:]:
            assert other.layers.keys() == found[0].layers.keys()
            for path, layer in other.layers.items():
                assert torch.equal(layer.down_RI, found[0].layers[path].down_RI)
                assert torch.equal(layer.up_OR, found[0].layers[path].up_OR)

    def test_scaled_fp8_against_the_same_numbers_in_fp32(self) -> None:
        weights, tuned = model(), planted(model(), 2, size=5e-2)
        fp8, plain = {}, {}
        for key, tensor in tuned.items():
            scale = tensor.abs().max() / 448
            fp8[key] = (tensor / scale).to(torch.float8_e4m3fn) if is_matrix(key) else tensor
            plain[key] = fp8[key].float() * scale if is_matrix(key) else tensor
            if is_matrix(key):
                fp8[key.removesuffix("weight") + "scale_weight"] = scale
        first, report = extract(*checkpoints(weights, fp8), Options(rank=2))
        second, _ = extract(*checkpoints(weights, plain), Options(rank=2))
        assert max(compare_adapters(first, second).values()) < 1e-6
        assert any("tuned: float8_e4m3fn weights were dequantised" in note for note in report.notes)

    def test_only_what_changed_is_in_it(self) -> None:
        base = to_diffusers(model())
        tuned = {key: tensor.clone() for key, tensor in base.items()}
        changed = ["transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.proj_mlp"]
        for path in changed:
            tuned[f"{path}.weight"] += 0.01
        state, report = extract(*checkpoints(base, tuned), Options(rank=4))
        assert sorted(state.layers) == sorted(changed)
        assert sum(layer.rank > 0 for layer in report.layers) == 2
        assert report.left_out_shares == {}

    def test_the_order_of_the_work_does_not_matter(self) -> None:
        base = tiny()
        tuned = planted(base, 8)
        whole, _ = extract(*checkpoints(base, tuned), Options(rank=4))
        some = {key for key in tuned if not key.startswith("double_blocks.0.")}
        part, _ = extract(*checkpoints(base, {k: tuned[k] if k in some else base[k] for k in tuned}), Options(rank=4))
        assert part.layers
        for path, layer in part.layers.items():
            assert torch.equal(layer.up_OR, whole.layers[path].up_OR)

    def test_another_seed_is_another_sketch(self) -> None:
        base = tiny()
        tuned = {key: tensor + 1e-3 * torch.randn(tensor.shape) for key, tensor in base.items()}
        a, b = (extract(*checkpoints(base, tuned), Options(rank=4, dtype=FP32, seed=seed))[0] for seed in (0, 1))
        assert max(compare_adapters(a, b).values()) > 1e-6

    @pytest.mark.parametrize("where", ["base", "tuned"])
    def test_nan(self, where: str) -> None:
        base, tuned = model(), planted(model(), 1)
        (base if where == "base" else tuned)["single_blocks.0.linear2.weight"][3, 3] = math.nan
        with pytest.raises(ModelError, match=r"`single_blocks\.0\.linear2` of tuned.* NaN"):
            extract(*checkpoints(base, tuned), Options())

    def test_nothing_changed(self) -> None:
        with pytest.raises(AdapterError, match="tuned is equal to base"):
            extract(*checkpoints(model(), model()), Options())
        with pytest.raises(AdapterError, match="tuned is equal to base"):
            extract(*checkpoints(model(), model()), Options(rank=None, energy=0.9))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"rank": 0}, {"rank": 5000}, {"rank": None}, {"energy": 0.9}, {"rank": None, "energy": 1.5},
            {"rank": None, "energy": 0.0}, {"rank": None, "budget_bytes": 0}, {"rank": "auto", "budget_bytes": 9},
            {"rank": None, "energy": math.nan}, {"dtype": torch.float64},
        ],
    )  # fmt: skip
    def test_wrong_options(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(AdapterError):
            Options(**wrong)


class TestRanks:
    def test_auto_finds_the_rank_under_bf16(self) -> None:
        base = tiny()
        tuned = {key: tensor.bfloat16() for key, tensor in planted(base, 5, 2e-3).items()}
        _, report = extract(*checkpoints(base, tuned), Options(rank="auto"))
        assert {layer.rank for layer in report.layers} == {5}
        assert all(0 < layer.noise_share < 0.1 for layer in report.layers)

    def test_auto_from_masters_in_fp32(self) -> None:
        """A base in bf16 is where they started: its rounding is not noise, so a far smaller change is found."""
        base = tiny()
        tuned = planted(base, 5, 1e-6)
        state, report = extract(*checkpoints(base, tuned), Options(rank="auto"))
        assert {layer.rank for layer in report.layers} == {5}
        assert error(state, base, tuned) < 0.1

    def test_auto_looks_further_while_all_that_it_sees_is_signal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "_FIRST_LOOK", 4)
        base = tiny()
        _, report = extract(*checkpoints(base, planted(base, 13)), Options(rank="auto"))
        assert {layer.rank for layer in report.layers} == {13}

    def test_auto_where_there_is_noise_alone(self) -> None:
        rng = torch.Generator().manual_seed(0)
        exact = {key: tensor * (1 + 0.01 * torch.randn(tensor.shape, generator=rng)) for key, tensor in tiny().items()}
        rounded = {key: tensor.bfloat16() for key, tensor in exact.items()}
        with pytest.raises(AdapterError, match="by rounding noise alone"):
            extract(*checkpoints(exact, rounded), Options(rank="auto"))

    def test_energy(self) -> None:
        base = tiny()
        tuned = planted(base, 16)
        sizes = []
        for energy in (0.3, 0.6, 0.9, 0.99):
            state, report = extract(*checkpoints(base, tuned), Options(rank=None, energy=energy, dtype=FP32))
            assert energy <= report.energy_kept < energy + 0.01
            sizes.append(sum(layer.rank * sum(layer.shape) for layer in report.layers))
            assert error(state, base, tuned) == pytest.approx(math.sqrt(1 - report.energy_kept), rel=1e-3)
        assert sizes == sorted(sizes)

    def test_energy_counts_what_is_not_noise(self) -> None:
        base = tiny()
        tuned = {key: tensor.bfloat16() for key, tensor in planted(base, 4, 3e-4).items()}
        _, report = extract(*checkpoints(base, tuned), Options(rank=None, energy=0.9))
        assert report.noise_share > 0.03
        assert max(layer.rank for layer in report.layers) <= 4
        assert report.notes == ()

    def test_energy_out_of_reach_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine, "LARGEST_RANK", 4)
        base = tiny()
        state, report = extract(*checkpoints(base, planted(base, 8)), Options(rank=None, energy=0.99))
        assert "an energy of 0.99 is out of reach" in report.notes[0]
        assert f"hold {report.energy_kept:.3f}" in report.notes[0]
        assert {layer.rank for layer in state.layers.values()} == {4}

    def test_one_energy_for_all_beats_one_rank_for_all(self) -> None:
        """Where changes differ in rank, the same size holds more of them."""
        base = tiny()
        tuned = planted(base, 2)
        for key, tensor in planted(base, 30).items():
            if "img_mlp" in key and is_matrix(key):
                tuned[key] = tensor
        _, fixed = extract(*checkpoints(base, tuned), Options(rank=8))
        size = sum(8 * sum(layer.shape) * 2 for layer in fixed.layers)
        _, spread = extract(*checkpoints(base, tuned), Options(rank=None, budget_bytes=size))
        assert spread.energy_kept > fixed.energy_kept

    def test_a_budget_too_small(self) -> None:
        with pytest.raises(AdapterError, match="too small for a single direction"):
            extract(*checkpoints(model(), planted(model(), 2)), Options(rank=None, budget_bytes=20))


class TestLeftOut:
    def tuned(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        tuned = planted(base, 1)
        tuned["double_blocks.0.img_attn.norm.query_norm.scale"] += 0.1
        tuned["double_blocks.1.img_mlp.0.bias"] += 0.1
        tuned["img_in.weight"] += 0.1
        tuned["final_layer.adaLN_modulation.1.weight"][0] += 0.1
        return tuned

    def test_shares(self) -> None:
        base = model()
        tuned = self.tuned(base)
        _, report = extract(*checkpoints(base, tuned), Options(rank=1))
        kinds = {"norms": 4, "biases": 64, "img_in": 16 * 4, "final_layer": 16}  # entries, each changed by 0.1
        in_blocks = sum(float((tuned[key] - base[key]).square().sum()) for key in base if is_matrix(key))
        total = in_blocks + 0.01 * sum(kinds.values())
        assert report.left_out_shares == pytest.approx({kind: 0.01 * n / total for kind, n in kinds.items()}, rel=1e-4)
        assert next(iter(report.left_out_shares)) in ("biases", "img_in")
        assert report.as_json()["left_out_share"] == pytest.approx(1 - in_blocks / total, rel=1e-4)

    @pytest.mark.parametrize("diffusers", [False, True])
    def test_patches(self, diffusers: bool) -> None:
        base = model()
        tuned = self.tuned(base)
        pair = (to_diffusers(base), to_diffusers(tuned)) if diffusers else (base, tuned)
        found = leftover_tensors(*checkpoints(*pair), FP32)
        norm = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"
        final = "final_layer.adaLN_modulation.1.weight"
        assert sorted(found) == [
            f"{norm}.diff",
            f"{norm}.scale.diff",
            "diffusion_model.double_blocks.1.img_mlp.0.diff_b",
            "diffusion_model.final_layer.adaLN_modulation.1.diff",
            "diffusion_model.img_in.diff",
        ]
        torch.testing.assert_close(found["diffusion_model.img_in.diff"], torch.full((16, 4), 0.1))
        # The original's order of rows, whatever the file's.
        expected = tuned[final] - base[final]
        torch.testing.assert_close(found["diffusion_model.final_layer.adaLN_modulation.1.diff"], expected)


class Kill(Exception):
    pass


class TestResume:
    @pytest.mark.parametrize("how", [{"rank": 4}, {"rank": "auto"}, {"rank": None, "energy": 0.8}])
    def test_killed_and_resumed_is_the_same_to_the_byte(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
    ) -> None:
        base = tiny()
        noisy = {key: tensor + 1e-4 * torch.randn(tensor.shape) for key, tensor in planted(base, 6).items()}
        tuned = str(save_original(tmp_path / "tuned.safetensors", noisy))
        straight = extract_files("flux-tiny", tuned, output=tmp_path / "a" / "lora.safetensors", now=clock, **how)
        output = tmp_path / "b" / "lora.safetensors"
        reads: list[str] = []
        original = Weight.read

        def dying(weight: Weight) -> Any:
            reads.append(weight.name)
            if len(reads) == 31:
                raise Kill
            return original(weight)

        with monkeypatch.context() as patch:
            patch.setattr(Weight, "read", dying)
            with pytest.raises(Kill):
                extract_files("flux-tiny", tuned, output=output, now=clock, **how)
        left = sorted((output.parent / ".lora.safetensors.work").glob("*.safetensors"))
        assert 10 < len(left) < 20
        assert not output.exists()
        left[0].write_bytes(left[0].read_bytes()[:-3])  # a damaged piece is made anew
        reads.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Weight, "read", lambda weight: (reads.append(weight.name), original(weight))[1])
            resumed = extract_files("flux-tiny", tuned, output=output, now=clock, **how)
        piece = left[-1].stem.split("-", 1)[1] + ".weight"
        assert reads.count(piece) == (0 if how["rank"] else 2)
        for name in ("lora.safetensors", "lora.extraction.json"):
            assert (output.parent / name).read_bytes() == (straight.output.parent / name).read_bytes()
        assert resumed.report == straight.report
        assert sorted(path.name for path in output.parent.iterdir()) == ["lora.extraction.json", "lora.safetensors"]

    def test_a_real_kill(self, tmp_path: Path) -> None:
        base = tiny()
        save_original(tmp_path / "tuned.safetensors", planted(base, 6))
        code = (
            "import os, sys; from pathlib import Path; from flux_ft.adapters import extract, jobs\n"
            "put, done = extract.Work.put, []\n"
            "def dying(self, name, piece):\n"
            "    put(self, name, piece); done.append(name)\n"
            "    if len(done) == int(sys.argv[2]): os._exit(9)\n"
            "extract.Work.put = dying\n"
            "here = Path(sys.argv[1])\n"
            "jobs.extract_files('flux-tiny', str(here / 'tuned.safetensors'), 4, here / 'x.safetensors')\n"
            "print(len(done))"
        )
        for limit, status in (("7", 9), ("99", 0)):
            done = subprocess.run([sys.executable, "-c", code, str(tmp_path), limit], cwd=ROOT, capture_output=True)
            assert done.returncode == status, done.stderr
        assert int(done.stdout) == 32 - 7
        assert read_adapter(tmp_path / "x.safetensors").layers
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "tuned.safetensors", "x.extraction.json", "x.safetensors",
        ]  # fmt: skip

    def test_other_options_start_anew(self, tmp_path: Path) -> None:
        folder = tmp_path / "work"
        work = Work(folder, "a")
        work.put("x", engine.Done({"v": torch.ones(2)}, {"n": 0.1}))
        again = Work(folder, "a").get("x")
        assert again is not None
        assert again.facts == {"n": 0.1}
        assert torch.equal(again.tensors["v"], torch.ones(2))
        assert Work(folder, "b").get("x") is None

    def test_a_folder_that_is_not_ours_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(StorageError, match="not ours"):
            Work(tmp_path, "a")
        assert (tmp_path / "thesis.txt").read_text() == "mine"

    def test_ctrl_c(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tuned = str(save_original(tmp_path / "tuned.safetensors", planted(tiny(), 2)))

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(engine, "low_rank", stop)
        with pytest.raises(StoppedByUser, match="are kept in"):
            extract_files("flux-tiny", tuned, 4, tmp_path / "x.safetensors")


class TestFiles:
    @pytest.fixture
    def tuned(self, tmp_path: Path) -> str:
        return str(save_diffusers(tmp_path / "моя модель" / "transformer", planted(tiny(), 6), 2).parent)

    @pytest.mark.parametrize("format", ["kohya", "diffusers"])
    def test_a_file_that_tools_can_read(self, tmp_path: Path, tuned: str, format: str) -> None:
        output = tmp_path / "out" / "lora.safetensors"
        done = extract_files("flux-tiny", tuned, 6, output, format=format, dtype="fp16", now=clock)
        assert done.worst_error < 1e-6
        assert done.size_bytes == output.stat().st_size
        state = read_adapter(output)
        assert state.metadata["modelspec.architecture"] == "flux-tiny/lora"
        assert state.metadata["ss_network_dim"] == "6"
        assert "flux-tiny" in state.metadata["modelspec.description"]
        assert not {key for key in state.metadata if key.startswith("ss_learning") or key == "ss_steps"}
        report = json.loads((tmp_path / "out" / "lora.extraction.json").read_text())
        assert report == json.loads(json.dumps(done.report.as_json()))
        assert (report["base"], report["tuned"]) == ("flux-tiny", "моя модель")
        assert report["energy_kept"] > 0.99999
        assert "энергия" not in done.for_people()
        for text in (json.dumps(report), json.dumps(state.metadata)):
            assert str(tmp_path) not in text

    def test_diffusers_loads_it(self, tmp_path: Path, tuned: str) -> None:
        extract_files("flux-tiny", tuned, 6, tmp_path / "lora.safetensors", dtype="fp32")
        merged = tmp_path / "merged"
        merge_file("flux-tiny", [AppliedAdapter(tmp_path / "lora.safetensors")], merged, dtype="fp32")
        denoiser = FluxTransformer2DModel.from_pretrained(merged).state_dict()
        wanted = to_diffusers(planted(tiny(), 6))
        assert denoiser.keys() == wanted.keys()
        for key, tensor in denoiser.items():
            torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=1e-6)

    def test_leftovers(self, tmp_path: Path) -> None:
        weights = planted(model(), 2)
        weights["img_in.bias"] += 1
        base = save_original(tmp_path / "base.safetensors", model())
        tuned = save_original(tmp_path / "tuned.safetensors", weights)
        done = extract_files(str(base), str(tuned), 2, tmp_path / "x.safetensors", leftovers=True)
        assert done.leftovers_file is not None
        assert list(load_file(done.leftovers_file)) == ["diffusion_model.img_in.diff_b"]
        assert done.report.left_out_shares.keys() == {"img_in"}

    @pytest.mark.parametrize("budget_mb", [0.06, 0.1, 0.3])
    def test_a_budget_is_kept(self, tmp_path: Path, tuned: str, budget_mb: float) -> None:
        done = extract_files("flux-tiny", tuned, None, tmp_path / "x.safetensors", budget_mb=budget_mb)
        assert 0.6 * budget_mb * 1e6 < done.size_bytes <= budget_mb * 1e6

    def test_a_budget_is_for_kohya(self, tmp_path: Path, tuned: str) -> None:
        with pytest.raises(ConfigError, match="padded to its largest rank"):
            extract_files("flux-tiny", tuned, None, tmp_path / "x.safetensors", budget_mb=1, format="diffusers")
        with pytest.raises(ConfigError, match="does not hold the file's header"):
            extract_files("flux-tiny", tuned, None, tmp_path / "x.safetensors", budget_mb=0.01)

    def test_nothing_is_overwritten(self, tmp_path: Path, tuned: str) -> None:
        for name in ("x.safetensors", "x.extraction.json"):
            (tmp_path / name).write_text("mine")
            with pytest.raises(ConfigError, match=f"{name}` exists already"):
                extract_files("flux-tiny", tuned, 4, tmp_path / "x.safetensors")
            assert (tmp_path / name).read_text() == "mine"
            (tmp_path / name).unlink()

    def test_a_full_disk_is_told_before_work(self, tmp_path: Path, tuned: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(StorageError, match="are needed"):
            extract_files("flux-tiny", tuned, 4, tmp_path / "x.safetensors")
        with pytest.raises(StorageError, match="are needed"):
            merge(open_checkpoint(tiny_folder()), [], tmp_path / "merged")
        assert [path.name for path in tmp_path.iterdir()] == ["моя модель"]

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"tuned": "flux-tiny"}, ModelError, "same file"),
            ({"tuned": "flux-tinny"}, ModelError, "not a known variant"),
            ({"tuned": "gone.safetensors"}, ModelError, "no such file"),
            ({"output": Path("x.bin")}, ConfigError, "does not end in .safetensors"),
            ({"format": "xlabs"}, ConfigError, "format `xlabs`"),
            ({"dtype": "int8"}, ConfigError, "as `int8`"),
            ({"device": "toaster"}, ConfigError, "`toaster` is not on this machine"),
            ({"rank": None}, AdapterError, "decides the size"),
            ({"rank": 0}, AdapterError, "rank 0"),
        ],
    )
    def test_bad_input(
        self, tmp_path: Path, tuned: str, arguments: dict[str, Any], kind: type[FluxFTError], message: str
    ) -> None:
        given = {"tuned": tuned, "rank": 4, "output": tmp_path / "x.safetensors"} | arguments
        with pytest.raises(kind, match=message):
            extract_files("flux-tiny", **given)
        assert [path.name for path in tmp_path.iterdir()] == ["моя модель"]

    @pytest.mark.parametrize("change", [0.0, math.nan])
    def test_nothing_to_extract_leaves_nothing(self, tmp_path: Path, change: float) -> None:
        base = save_original(tmp_path / "base.safetensors", model())
        weights = model()
        weights["single_blocks.0.linear2.weight"] += change
        tuned = save_original(tmp_path / "tuned.safetensors", weights)
        with pytest.raises(FluxFTError, match=r"is equal to base|NaN"):
            extract_files(str(base), str(tuned), 4, tmp_path / "x.safetensors")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]

    def test_matrices_that_did_not_change(self, tmp_path: Path) -> None:
        weights = model()
        weights["single_blocks.0.linear2.weight"] += 1
        base = save_original(tmp_path / "base.safetensors", model())
        tuned = save_original(tmp_path / "tuned.safetensors", weights)
        done = extract_files(str(base), str(tuned), None, tmp_path / "x.safetensors", energy=0.9)
        assert list(read_adapter(done.output).layers) == ["single_transformer_blocks.0.proj_out"]

    def test_a_hub_id_that_is_not_in_the_cache(self) -> None:
        with pytest.raises(ModelError, match="could not be fetched from the Hub"):
            open_model("nobody/nothing-of-this-name")


def random_state(rank: int, shared: bool, seed: int = 0) -> AdapterState:
    """All linears of a small model; q, k and v share their `down` if asked."""
    rng = torch.Generator().manual_seed(seed)
    layers, downs = {}, dict[str, Tensor]()
    for key, tensor in to_diffusers(model()).items():
        place = bfl_module(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if place is None:
            continue
        down = torch.randn(rank, tensor.shape[1], generator=rng)
        down = downs.setdefault(place[0], down) if shared else down
        layers[key.removesuffix(".weight")] = LoraLayer(down, torch.randn(tensor.shape[0], rank, generator=rng), 2.0)
    return AdapterState(layers, {"note": "kept"})


class TestResize:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    def test_it_is_the_best_of_that_rank(self, fused: bool, shared: bool) -> None:
        state = random_state(4, shared)
        smaller = resize(state, rank=3, fused=fused)
        before = deltas(state) if fused else {path: delta_weight(one) for path, one in state.layers.items()}
        after = deltas(smaller) if fused else {path: delta_weight(one) for path, one in smaller.layers.items()}
        assert before.keys() == after.keys()
        for name, delta in before.items():
            least = torch.linalg.svdvals(delta.double())[3:].norm()
            got = torch.linalg.norm((delta - after[name]).double())
            assert float(got) == pytest.approx(float(least), rel=1e-3, abs=1e-4)
        assert smaller.metadata == state.metadata
        tensors = to_kohya(smaller, FP32)
        assert not fused or {len(one) for key, one in tensors.items() if "down" in key} == {3}

    def test_at_its_own_rank_it_is_the_same(self) -> None:
        state = random_state(3, shared=False)
        assert max(compare_adapters(state, resize(state, rank=3, fused=False)).values()) < 1e-5
        assert max(compare_adapters(state, resize(state, rank=12)).values()) < 1e-5

    @pytest.mark.parametrize("fused", [False, True])
    def test_energy(self, fused: bool) -> None:
        state = random_state(6, shared=True)
        for energy in (0.5, 0.9, 1.0):
            smaller = resize(state, energy=energy, fused=fused)
            before, after = deltas(state), deltas(smaller)
            total = sum(float(delta.square().sum()) for delta in before.values())
            lost = sum(float((before[name] - after.get(name, 0)).square().sum()) for name in before)
            assert energy <= 1 - lost / total + 1e-6
            assert 1 - lost / total < energy + 0.05

    @pytest.mark.parametrize("wrong", [{}, {"rank": 0}, {"rank": 2, "energy": 0.5}, {"energy": 0}, {"energy": 1.2}])
    def test_wrong_sizes(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(AdapterError):
            resize(random_state(2, shared=True), **wrong)

    def test_a_lora_that_does_nothing(self) -> None:
        layers = random_state(2, shared=True).layers
        empty = {path: LoraLayer(one.down_RI, torch.zeros_like(one.up_OR), 2.0) for path, one in layers.items()}
        with pytest.raises(AdapterError, match="changes nothing"):
            resize(AdapterState(empty), rank=1)

    def test_files(self, tmp_path: Path) -> None:
        path, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        header = {"modelspec.title": "cat", "modelspec.description": "A cat.", "ss_network_dim": "4"}
        write_adapter(path, random_state(4, shared=True), "kohya", FP32, header | {"flux_ft.export": '{"rank": 4}'})
        done = resize_file(path, output, rank=2)
        found = read_adapter(output)
        assert done.ranks == (4, 2)
        assert 0 < done.worst_loss < 1
        assert done.size_bytes == output.stat().st_size < path.stat().st_size
        assert found.metadata["modelspec.description"] == "A cat. Resized to rank 2."
        assert found.metadata["ss_network_dim"] == "2"
        assert json.loads(found.metadata["flux_ft.export"])["rank"] == 2
        with pytest.raises(ConfigError, match="exists already"):
            resize_file(path, output, rank=2)
        with pytest.raises(AdapterError, match="does not exist"):
            resize_file(tmp_path / "gone.safetensors", tmp_path / "c.safetensors", rank=2)


class TestMerge:
    def lora(self, tmp_path: Path, base: dict[str, Tensor], tuned: dict[str, Tensor], rank: int) -> Path:
        state, _ = extract(*checkpoints(base, tuned), Options(rank=rank, dtype=FP32))
        path = tmp_path / "lora.safetensors"
        write_adapter(path, state, "kohya", FP32, {})
        return path

    @pytest.mark.parametrize("shards", [1, 3])
    def test_base_and_extracted_lora_are_the_tuned_model(self, tmp_path: Path, shards: int) -> None:
        base = model()
        tuned = planted(base, 3)
        lora = self.lora(tmp_path, base, tuned, 3)
        folder = save_diffusers(tmp_path / "base", base, shards)
        done = merge_file(str(folder), [AppliedAdapter(lora)], tmp_path / "out", shard_bytes=20_000)
        assert len(done.files) > 2
        assert all(file.stat().st_size < 25_000 for file in done.files)
        assert done.changed == 2 * 14 + 2 * 6
        found = open_checkpoint(tmp_path / "out")
        for name, weight in found.weights.items():
            torch.testing.assert_close(weight.read().grid, tuned[name], rtol=0, atol=1e-6)
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    def test_a_single_file_keeps_its_keys(self, tmp_path: Path, prefix: str) -> None:
        base = model(dtype=torch.bfloat16)
        tuned = planted(base, 2)
        lora = self.lora(tmp_path, base, tuned, 2)
        extra = {"vae.steps": torch.tensor(7), "vae.w": torch.ones(3)} if prefix else {}
        path = save_original(tmp_path / "base.safetensors", base, prefix, **extra)
        merge_file(str(path), [AppliedAdapter(lora, 0.5)], tmp_path / "out.safetensors")
        found, before = load_file(tmp_path / "out.safetensors"), load_file(path)
        assert found.keys() == before.keys()
        for key, tensor in found.items():
            assert tensor.dtype == before[key].dtype
            if is_matrix(key):
                name = key.removeprefix(prefix)
                middle = (base[name].float() + tuned[name]) / 2
                torch.testing.assert_close(tensor.float(), middle, rtol=2**-8, atol=1e-6)
                assert not torch.equal(tensor, before[key])
            else:
                assert torch.equal(tensor, before[key])
        with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_several_at_once(self, tmp_path: Path) -> None:
        base = model()
        loras = [("a", random_state(2, True, 1), 0.5), ("b", random_state(3, False, 2), -1.5)]
        merge(from_tensors(base, "base"), loras, tmp_path / "out.safetensors")
        expected = to_diffusers(base)
        for _, state, strength in loras:
            for path, layer in state.layers.items():
                expected[f"{path}.weight"] += strength * delta_weight(layer)
        found = to_diffusers(load_file(tmp_path / "out.safetensors"))
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("original", [False, True])
    def test_the_weight_whose_halves_swap(self, tmp_path: Path, original: bool) -> None:
        path = "norm_out.linear"
        tensors = {
            f"transformer.{path}.lora_A.weight": torch.randn(2, 16),
            f"transformer.{path}.lora_B.weight": torch.randn(32, 2),
        }
        state = read_tensors(tensors)
        weights = model() if original else to_diffusers(model())
        merge(from_tensors(weights, "base"), [("x", state, 1.0)], tmp_path / "out.safetensors")
        found = load_file(tmp_path / "out.safetensors")
        found = to_diffusers(found) if original else found
        expected = to_diffusers(model())[f"{path}.weight"] + delta_weight(state.layers[path])
        torch.testing.assert_close(found[f"{path}.weight"], expected)

    def test_fp8_becomes_bf16(self, tmp_path: Path) -> None:
        weights = model()
        key = "single_blocks.0.linear2"
        scale = torch.tensor(2.0)
        weights[f"{key}.weight"] = weights[f"{key}.weight"].to(torch.float8_e4m3fn)
        path = save_original(tmp_path / "base.safetensors", weights, **{f"{key}.scale_weight": scale})
        merge(open_checkpoint(path), [], tmp_path / "out.safetensors")
        found = load_file(tmp_path / "out.safetensors")
        assert found[f"{key}.weight"].dtype == torch.bfloat16
        assert torch.equal(found[f"{key}.weight"].float(), weights[f"{key}.weight"].float() * 2)
        assert f"{key}.scale_weight" not in found

    def test_untouched_weights_keep_their_bits(self, tmp_path: Path) -> None:
        merge(open_checkpoint(tiny_folder()), [], tmp_path / "out")
        before = tiny_folder() / "transformer" / "diffusion_pytorch_model.safetensors"
        after = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
        first, second = load_file(before), load_file(after)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert (tmp_path / "out" / "config.json").read_bytes() == before.with_name("config.json").read_bytes()

    def test_a_lora_of_another_model(self, tmp_path: Path) -> None:
        layers = {"transformer_blocks.0.attn.to_q": LoraLayer(torch.ones(1, 17), torch.ones(17, 1), 1.0)}
        with pytest.raises(AdapterError, match=r"x: changes `transformer_blocks\.0\.attn\.to_q` of 17×17.*16×16"):
            merge(from_tensors(model(), "base"), [("x", AdapterState(layers), 1.0)], tmp_path / "o.safetensors")
        layers = {"transformer_blocks.9.attn.to_q": layers["transformer_blocks.0.attn.to_q"]}
        with pytest.raises(AdapterError, match="is not there"):
            merge(from_tensors(model(), "base"), [("x", AdapterState(layers), 1.0)], tmp_path / "o.safetensors")
        with pytest.raises(AdapterError, match="strength nan"):
            merge(from_tensors(model(), "base"), [("x", AdapterState({}), math.nan)], tmp_path / "o.safetensors")
        assert not list(tmp_path.iterdir())

    def test_a_failure_leaves_nothing(self, tmp_path: Path) -> None:
        folder = save_diffusers(tmp_path / "base", model(), 2)
        base = open_checkpoint(folder)
        (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ModelError, match="cannot be read any more"):
            merge(base, [], tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["base"]

    def test_bad_input(self, tmp_path: Path) -> None:
        write_adapter(tmp_path / "l.safetensors", random_state(1, True), "kohya", FP32, {})
        lora = [AppliedAdapter(tmp_path / "l.safetensors")]
        path = save_original(tmp_path / "base.safetensors", model())
        folder = save_diffusers(tmp_path / "base", model())
        with pytest.raises(AdapterError, match="no LoRA"):
            merge_file(str(path), [], tmp_path / "o.safetensors")
        with pytest.raises(ConfigError, match="does not end in"):
            merge_file(str(path), lora, tmp_path / "o")
        with pytest.raises(ConfigError, match="ends in"):
            merge_file(str(folder), lora, tmp_path / "o.safetensors")
        with pytest.raises(ConfigError, match="as `int4`"):
            merge_file(str(path), lora, tmp_path / "o.safetensors", dtype="int4")
        with pytest.raises(ConfigError, match="exists already"):
            merge_file(str(path), lora, path)
        save_file({"x": torch.zeros(2)}, tmp_path / "y.safetensors")
        with pytest.raises(AdapterError, match="no supported LoRA flavour"):
            merge_file(str(path), [AppliedAdapter(tmp_path / "y.safetensors")], tmp_path / "o.safetensors")
