"""The proof of an extraction: what is measured, on which pictures, and how it is told. On flux-tiny."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flux_ft import flow
from flux_ft.adapters import lora
from flux_ft.adapters.checkpoint_files import from_tensors
from flux_ft.adapters.extract import Options, extract
from flux_ft.data.cache import ExampleRow, Examples
from flux_ft.families.base import Family
from flux_ft.train.loop import TRAIN_GUIDANCE, VALIDATION_SIGMAS
from flux_ft.train.preview import PreviewPlan, draw_previews, has_previews, write_previews
from flux_ft.train.prove import (
    EXAMPLES_AT_MOST,
    Proof,
    Target,
    comparison_grid,
    predictions,
    proof_examples,
    prove,
    targets,
)
from flux_ft.types import Bucket, CachedExample, TextCond

CPU, FP32 = torch.device("cpu"), torch.float32
SEED = 3


@pytest.fixture(scope="module")
def base(tiny_family: Family) -> nn.Module:
    return tiny_family.load_denoiser(CPU, FP32)


@pytest.fixture(scope="module")
def full(base: nn.Module) -> nn.Module:
    """The base with a change in every weight, of full rank; inside the blocks some directions are larger."""
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            rng = flow.keyed_generator(0, "change", name)
            change = 0.02 * torch.randn(weight.shape, generator=rng)
            if weight.ndim == 2 and "_blocks." in name:
                up = torch.randn(weight.shape[0], 40, generator=rng) * 0.85 ** torch.arange(40)
                change += up @ torch.randn(40, weight.shape[1], generator=rng)
            weight += 0.05 * weight.abs().mean() * change
    return tuned


def text_of(denoiser: Any, rng: torch.Generator) -> TextCond:
    config = denoiser.config
    embeds = torch.randn(1, 32, config.joint_attention_dim, generator=rng)
    return TextCond(embeds, torch.randn(1, config.pooled_projection_dim, generator=rng))


@pytest.fixture(scope="module")
def examples(base: nn.Module) -> list[CachedExample]:
    """Three pictures of two sizes."""
    found = []
    for number, (height, width) in enumerate([(8, 8), (8, 6), (8, 8)]):
        rng = flow.keyed_generator(1, "example", number)
        mean = torch.randn(8, height, width, generator=rng)
        texts = (text_of(base, rng), text_of(base, rng))
        found.append(CachedExample(f"{number}.png", Bucket(8 * width, 8 * height), mean, None, texts, f"d{number}"))
    return found


@dataclass
class Predicted:
    base: list[Tensor]
    full: list[Tensor]
    targets: list[Target]


@pytest.fixture(scope="module")
def predicted(tiny_family: Family, base: nn.Module, full: nn.Module, examples: list[CachedExample]) -> Predicted:
    return Predicted(
        predictions(tiny_family, base, examples, SEED, CPU),
        predictions(tiny_family, full, examples, SEED, CPU),
        targets(examples, SEED),
    )


class TestExtractedLora:
    def test_it_comes_nearer_to_the_full_model_as_its_rank_grows(
        self,
        tiny_family: Family,
        base: nn.Module,
        full: nn.Module,
        examples: list[CachedExample],
        predicted: Predicted,
    ) -> None:
        proofs = []
        for rank in (4, 32):
            state, report = extract(
                from_tensors(base.state_dict(), "base"),
                from_tensors(full.state_dict(), "tuned"),
                Options(rank=rank, dtype=FP32),
            )
            merged = copy.deepcopy(base)
            lora.merge_state(merged, state, 1.0)
            found = predictions(tiny_family, merged, examples, SEED, CPU)
            proofs.append(prove(predicted.base, found, predicted.full, predicted.targets, held_out=True))
            assert report.left_out_shares  # there is something that no LoRA can make good
        small, large = proofs
        assert 0 < large.relative_error < 0.5 * small.relative_error < 0.5
        for sigma in VALIDATION_SIGMAS:
            assert large.relative_error_by_sigma[str(sigma)] < small.relative_error_by_sigma[str(sigma)]
        gaps = [abs(proof.loss["lora"] - proof.loss["full"]) for proof in proofs]
        assert gaps[1] < gaps[0]

    def test_the_full_model_itself_is_at_0_and_the_base_at_1(self, predicted: Predicted) -> None:
        for lora_velocities, error, twin in ((predicted.full, 0.0, "full"), (predicted.base, 1.0, "base")):
            proof = prove(predicted.base, lora_velocities, predicted.full, predicted.targets, held_out=True)
            assert proof.relative_error == error
            assert set(proof.relative_error_by_sigma.values()) == {error}
            assert proof.loss["lora"] == proof.loss[twin]
            assert proof.loss["base"] != proof.loss["full"]
            assert proof.examples == 3


class TestPredictions:
    def test_each_is_the_velocity_at_its_example_and_sigma(
        self, tiny_family: Family, base: nn.Module, examples: list[CachedExample], predicted: Predicted
    ) -> None:
        assert len(predicted.base) == len(examples) * len(VALIDATION_SIGMAS)
        found = iter(predicted.base)
        for example in examples:
            noise = flow.draw_noise(tuple(example.mean_CHW.shape), flow.keyed_generator(SEED, "proof", example.digest))
            for sigma in VALIDATION_SIGMAS:
                z = (1 - sigma) * example.mean_CHW + sigma * noise
                with torch.no_grad():
                    expected = tiny_family.predict_velocity(
                        base, z[None], torch.tensor([sigma]), example.texts[0], TRAIN_GUIDANCE
                    )
                velocity = next(found)
                assert velocity.shape == example.mean_CHW.shape
                torch.testing.assert_close(velocity, expected[0], rtol=1e-5, atol=1e-5)

    def test_the_target_carries_the_mean_to_the_same_noise(self, examples: list[CachedExample]) -> None:
        for example, target in zip(examples, targets(examples, SEED), strict=True):
            noise = flow.draw_noise(tuple(example.mean_CHW.shape), flow.keyed_generator(SEED, "proof", example.digest))
            assert torch.equal(example.mean_CHW + target.velocity_CHW, example.mean_CHW + (noise - example.mean_CHW))

    def test_noise_follows_seed_and_picture_and_not_the_order(
        self, tiny_family: Family, base: nn.Module, examples: list[CachedExample], predicted: Predicted
    ) -> None:
        one = predictions(tiny_family, base, examples[2:], SEED, CPU)
        assert all(torch.equal(a, b) for a, b in zip(one, predicted.base[-5:], strict=True))
        renamed = [replace(examples[2], digest="another")]
        for others, seed in ((renamed, SEED), (examples[2:], SEED + 1)):
            other = predictions(tiny_family, base, others, seed, CPU)
            assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            assert not torch.equal(targets(others, seed)[0].velocity_CHW, targets(examples[2:], SEED)[0].velocity_CHW)

    def test_only_the_asked_sigmas(self, tiny_family: Family, base: nn.Module, examples: list[CachedExample]) -> None:
        every = predictions(tiny_family, base, examples[:1], SEED, CPU)
        chosen = predictions(tiny_family, base, examples[:1], SEED, CPU, VALIDATION_SIGMAS[1::2])
        assert len(chosen) == 2
        assert all(torch.equal(a, b) for a, b in zip(chosen, every[1::2], strict=True))

    def test_the_model_is_asked_in_its_quiet_mode_and_gets_its_own_back(
        self, tiny_family: Family, base: nn.Module, examples: list[CachedExample]
    ) -> None:
        model = copy.deepcopy(base).train().requires_grad_(True)
        seen: list[tuple[bool, bool]] = []
        model.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
        found = predictions(tiny_family, model, examples[:1], SEED, CPU, (0.5,))
        assert seen == [(False, False)]
        assert model.training
        assert not found[0].requires_grad
        assert not predictions(tiny_family, model.eval(), examples[:1], SEED, CPU, (0.5,))[0].requires_grad
        assert not model.training

    def test_a_failure_leaves_the_mode_as_it_was(
        self, tiny_family: Family, base: nn.Module, examples: list[CachedExample]
    ) -> None:
        model = copy.deepcopy(base).train()

        def fail(*_: object) -> None:
            raise RuntimeError("out of memory")

        model.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            predictions(tiny_family, model, examples[:1], SEED, CPU)
        assert model.training

    def test_a_bf16_model_answers_in_float32(
        self, tiny_family: Family, examples: list[CachedExample], predicted: Predicted
    ) -> None:
        model = tiny_family.load_denoiser(CPU, torch.bfloat16)
        found = predictions(tiny_family, model, examples[:1], SEED, CPU, VALIDATION_SIGMAS[:1])
        assert found[0].dtype is FP32
        torch.testing.assert_close(found[0], predicted.base[0], rtol=0.1, atol=0.1)


class TestProof:
    def test_distances_are_those_of_the_definition(self) -> None:
        zero, one = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
        wanted = [Target(2 * one, None)]
        proof = prove([zero], [0.75 * one], [one], wanted, held_out=True, sigmas=(0.5,))
        assert proof.relative_error == 0.25
        assert proof.relative_error_by_sigma == {"0.5": 0.25}
        assert proof.loss == {"base": 4.0, "lora": 1.25**2, "full": 1.0}

    def test_each_sigma_has_its_own(self) -> None:
        zero, one = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
        wanted = [Target(zero, None), Target(zero, None)]
        proof = prove([zero] * 4, [one, zero] * 2, [one] * 4, wanted, held_out=True, sigmas=(0.1, 0.9))
        assert proof.relative_error_by_sigma == {"0.1": 0.0, "0.9": 1.0}
        assert proof.relative_error == pytest.approx(math.sqrt(0.5))
        assert proof.examples == 2

    def test_the_loss_counts_what_the_mask_counts(self) -> None:
        zero, right_half = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
        right_half[:, :, 2:] = 1
        weight = torch.tensor([2.0, 2.0, 0.0, 0.0]).expand(2, 4)
        proof = prove([zero], [zero], [right_half], [Target(right_half, weight)], held_out=True, sigmas=(0.5,))
        assert proof.loss == {"base": 0.0, "lora": 0.0, "full": 0.0}
        assert proof.relative_error == 1.0

    def test_predictions_of_other_examples_are_refused(self) -> None:
        zero = torch.zeros(2, 3, 4)
        with pytest.raises(ValueError, match="zip"):
            prove([zero] * 2, [zero] * 2, [zero] * 3, [Target(zero, None)], held_out=True, sigmas=(0.1, 0.9))
        with pytest.raises(ValueError, match="zip"):
            prove([zero] * 2, [zero] * 2, [zero] * 2, [Target(zero, None)], held_out=True, sigmas=(0.5,))


def told(**changed: Any) -> Proof:
    values: dict[str, Any] = {
        "examples": 4, "held_out": True, "loss": {"base": 0.5, "lora": 0.41, "full": 0.4},
        "relative_error": 0.123, "relative_error_by_sigma": {"0.1": 0.2, "0.9": 0.05},
    }  # fmt: skip
    return Proof(**(values | changed))


class TestTelling:
    def test_people_see_losses_and_distance(self) -> None:
        text = told().for_people()
        assert len(text.splitlines()) == 2
        for words in ("4 held-out", "base 0.5000", "LoRA 0.4100", "full model 0.4000", "12.3 %", "20.0 % at sigma 0.1"):
            assert words in text

    def test_training_pictures_are_called_so(self) -> None:
        text = told(held_out=False).for_people()
        assert len(text.splitlines()) == 3
        assert "4 training examples" in text
        assert "held-out" not in text
        assert "nothing was held out" in text
        assert "never saw" in text

    def test_json_holds_everything(self) -> None:
        assert json.loads(json.dumps(told().as_json(), allow_nan=False)) == {
            "examples": 4,
            "held_out": True,
            "loss": {"base": 0.5, "lora": 0.41, "full": 0.4},
            "relative_error": 0.123,
            "relative_error_by_sigma": {"0.1": 0.2, "0.9": 0.05},
        }

    def test_a_full_model_that_predicts_what_the_base_does_is_no_error_of_zero(self) -> None:
        zero, one = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
        proof = prove([zero], [one], [zero], [Target(zero, None)], held_out=True, sigmas=(0.5,))
        assert math.isnan(proof.relative_error)
        assert "nothing for a LoRA to come near to" in proof.for_people()
        found = json.loads(json.dumps(proof.as_json(), allow_nan=False))
        assert found["relative_error"] is None
        assert found["relative_error_by_sigma"] == {"0.5": None}

    def test_a_broken_model_is_told(self) -> None:
        zero, broken = torch.zeros(2, 3, 4), torch.full((2, 3, 4), torch.nan)
        proof = prove([zero], [zero], [broken], [Target(zero, None)], held_out=True, sigmas=(0.5,))
        assert "not finite" in proof.for_people()
        assert json.loads(json.dumps(proof.as_json(), allow_nan=False))["loss"]["full"] is None


class Rows(Examples):
    """Examples of which only the rows are asked for."""

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def select(self, positions: Any) -> Any:
        return Rows([self.rows[position] for position in positions])


def row(digest: str, side: int, copy: int = 1) -> ExampleRow:
    return ExampleRow(f"{digest}.png", Bucket(side, side), digest, Path("l"), (Path("t"),), copy, 1.0)


class TestChoice:
    def test_held_out_pictures_come_before_training_pictures(self) -> None:
        chosen, held_out = proof_examples(Rows([row("a", 64)]), Rows([row("b", 64)]))
        assert held_out
        assert [one.digest for one in chosen] == ["b"]

    def test_training_pictures_stand_in_where_nothing_was_held_out(self) -> None:
        chosen, held_out = proof_examples(Rows([row("a", 64)]), Rows([]))
        assert not held_out
        assert [one.digest for one in chosen] == ["a"]

    def test_every_picture_comes_at_its_largest_size_before_any_comes_twice(self) -> None:
        rows = Rows([row(digest, side) for digest in "abc" for side in (512, 768, 1024)])
        sizes = [(one.digest, one.bucket.width_px) for one in proof_examples(rows, Rows([]), at_most=5)[0]]
        assert sorted(sizes[:3]) == [("a", 1024), ("b", 1024), ("c", 1024)]
        assert {side for _, side in sizes[3:]} == {768}

    def test_a_repeated_picture_counts_once(self) -> None:
        rows = Rows([row("a", 64)] * 5 + [row("b", 64)])
        assert [one.digest for one in proof_examples(rows, Rows([]))[0]] == ["a", "b"]

    def test_sixteen_are_enough(self) -> None:
        rows = Rows([row(f"{number:02d}", 64) for number in range(40)])
        assert len(proof_examples(rows, Rows([]))[0]) == EXAMPLES_AT_MOST == 16


@pytest.fixture
def plan(base: nn.Module) -> PreviewPlan:
    conds = tuple(text_of(base, flow.keyed_generator(2, number)) for number in range(3))
    return PreviewPlan(("one", "two", "three"), conds, 5, 64, 64, 2, 2.0)


class TestPictures:
    def test_a_row_a_prompt_a_column_a_model(self) -> None:
        colours = {name: (40 * number, 0, 255) for number, name in enumerate(("base", "lora", "full"), start=1)}
        pictures = {
            name: [Image.new("RGB", (64, 64), (red, 100 * row, blue)) for row in range(2)]
            for name, (red, _, blue) in colours.items()
        }
        sheet = np.asarray(comparison_grid(["one", "two"], pictures["base"], pictures["lora"], pictures["full"]))
        places = {
            (row, name): np.argwhere((sheet == (red, 100 * row, blue)).all(2)).mean(0)
            for name, (red, _, blue) in colours.items()
            for row in range(2)
        }
        for row in range(2):
            columns = [places[row, name][1] for name in ("base", "lora", "full")]
            assert columns == sorted(columns)
            assert columns[2] - columns[0] >= 2 * 128
        assert places[0, "base"][0] + 128 <= places[1, "base"][0]

    def test_previews_are_written_as_they_are_drawn(
        self, tiny_family: Family, base: nn.Module, plan: PreviewPlan, tmp_path: Path
    ) -> None:
        vae = tiny_family.load_vae(CPU, FP32)
        drawn = list(draw_previews(plan, tiny_family, base, vae))
        paths = write_previews(plan, tiny_family, base, vae, tmp_path, 7)
        assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
            f"step-000007/{i:02d}.png" for i in range(3)
        ]
        assert len({image.tobytes() for image in drawn}) == 3
        for image, path in zip(drawn, paths, strict=True):
            with Image.open(path) as written:
                assert written.tobytes() == image.tobytes()
        assert json.loads((tmp_path / "step-000007" / "prompts.json").read_text()) == ["one", "two", "three"]

    def test_drawing_that_is_given_up_leaves_the_model_as_it_was(
        self, tiny_family: Family, base: nn.Module, plan: PreviewPlan
    ) -> None:
        model = copy.deepcopy(base).train()
        calls: list[bool] = []
        model.register_forward_pre_hook(lambda module, _: calls.append(module.training))
        images = draw_previews(plan, tiny_family, model, tiny_family.load_vae(CPU, FP32))
        assert model.training  # nothing is drawn before it is asked for
        next(images)
        assert calls == [False] * plan.steps
        assert not model.training
        images.close()
        assert model.training

    def test_what_the_disk_refuses_is_told_and_left_out(
        self,
        tiny_family: Family,
        base: nn.Module,
        plan: PreviewPlan,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Training goes on, the model is as it was, and nothing takes half of the previews for whole ones."""
        model = copy.deepcopy(base).train()
        (tmp_path / "step-000001" / "00.png").mkdir(parents=True)
        written = write_previews(plan, tiny_family, model, tiny_family.load_vae(CPU, FP32), tmp_path, 1)
        assert [path.name for path in written] == [f"{index:02d}.png" for index in range(1, len(plan.conds))]
        assert capsys.readouterr().err.count("the preview is left out") == 1
        assert not has_previews(tmp_path, 1, plan)
        assert model.training
