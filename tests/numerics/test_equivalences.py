"""Two ways to one place must meet: batches and accumulation, stop and resume, cache, recompute, previews, merging.

All on flux-tiny in float32 on the CPU. "Exact" is bit by bit; elsewhere the tolerance says why it is not zero.
Shapes in names: B batch, C latent channels, H W latent grid, R rank, O out features, I in features.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _runs import (
    CPU,
    FP32,
    PRIOR,
    Run,
    Settings,
    assert_same_bits,
    gap,
    random_adapter,
    tensors_of,
)
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor, nn

from flux_ft import flow
from flux_ft.adapters import lora
from flux_ft.adapters.attached import attach_states
from flux_ft.adapters.formats import delta_weight, read_adapter, write_adapter
from flux_ft.config import RunConfig
from flux_ft.data.cache import cache_latents, cache_texts, load_examples
from flux_ft.data.images import load_picture
from flux_ft.data.loader import BatchPlan, collate, resampled
from flux_ft.data.share import Share
from flux_ft.errors import StoppedByUser, StorageError
from flux_ft.families.base import Family
from flux_ft.families.registry import tiny_folder
from flux_ft.infer.sampler import initial_noise
from flux_ft.plan import check_run
from flux_ft.train import loop
from flux_ft.train import run as run_module
from flux_ft.train.loop import StepResult, Wish, prior_drift
from flux_ft.train.preview import write_previews
from flux_ft.train.run import read_metrics, train
from flux_ft.train.setup import (
    TrainState,
    data_digest,
)
from flux_ft.types import AdapterState, Batch, LoraLayer, TextCond

pytestmark = pytest.mark.usefixtures("on_cpu", "quick_collection")


def in_float64(run: Run) -> Run:
    run.state.bare.double()
    return run


def deltas(run: Run) -> dict[str, Tensor]:
    return {path: delta_weight(layer) for path, layer in lora.read_trained(run.state.bare).layers.items()}


# --- Batches. ---


@pytest.mark.parametrize("split", [(1, 4), (2, 2)])
@pytest.mark.parametrize("all_on", [False, True])
def test_accumulated_gradients_are_the_batchs(
    start: Callable[..., Run],
    gradients: list[dict[str, Tensor]],
    split: tuple[int, int],
    everything: dict[str, Any],
    all_on: bool,
) -> None:
    """Sums of the same products in another order, in float64 so that the order's rounding does not show."""
    settings = {"iterations": 1, **(everything if all_on else {})}
    whole = in_float64(start(**settings, optim={"batch_size": 4, "max_grad_norm": None}).stir()).train()
    size, accumulate = split
    parts = start(**settings, optim={"batch_size": size, "accumulate": accumulate, "max_grad_norm": None})
    in_float64(parts.stir()).train()
    assert gap(gradients[0], gradients[1]) < 1e-6
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    assert parts.results[0].grad_norm == pytest.approx(whole.results[0].grad_norm, rel=1e-6)
    assert parts.results[0].sigma == pytest.approx(whole.results[0].sigma, rel=1e-6)


def test_accumulated_training_is_the_batchs(start: Callable[..., Run]) -> None:
    """What three steps change in ΔW. AdamW divides each gradient by its own size, so where a gradient is nearly zero
    its rounding error becomes a step of ordinary length; those few elements are what 1e-3 of the change allows for."""
    whole = start(iterations=3, optim={"batch_size": 4, "accumulate": 1}).stir()
    before = deltas(whole)
    whole.train()
    parts = start(iterations=3, optim={"batch_size": 1, "accumulate": 4}).stir().train()
    other = start(iterations=3, optim={"batch_size": 4}, seed=4).stir().train()
    changes = [{path: delta - before[path] for path, delta in deltas(run).items()} for run in (whole, parts, other)]
    assert gap(changes[0], changes[1]) < 1e-3
    assert gap(changes[0], changes[2]) > 0.1
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


def test_noise_of_a_slot_does_not_depend_on_the_split(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def note(state: TrainState, family: Family, batch: Batch, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
        drawn[batch.slots] = noise_BCHW, sigma_B
        return torch.zeros(len(sigma_B))

    monkeypatch.setattr(loop, "flow_loss", note)
    run = start()
    squares = [i for i, one in enumerate(run.data.examples) if one.bucket.width_px == 64]
    for slots in ((0, 1, 2, 3), (2,), (3, 1), (7,)):
        batch = loop.collate(run.data.examples, [squares[slot % 3] for slot in slots], slots)
        torch.manual_seed(len(slots))
        loop.batch_loss(run.state, run.family, run.config, batch)
    noise, sigma = drawn[0, 1, 2, 3]
    for slots in ((2,), (3, 1)):
        for row, slot in enumerate(slots):
            assert torch.equal(drawn[slots][0][row], noise[slot])
            assert torch.equal(drawn[slots][1][row], sigma[slot])
    assert len({float(one) for one in (*sigma, *drawn[7,][1])}) == 5
    run.state.step = 1
    batch = loop.collate(run.data.examples, squares[:1], [2])
    loop.batch_loss(run.state, run.family, run.config, batch)
    assert not torch.equal(drawn[2,][0][0], noise[2])


# --- Encoding. ---


def test_cached_is_uncached(tiny_family: Family, run_settings: Settings, tmp_path: Path) -> None:
    """Exact against the same calls of the encoders; 1e-6 against one picture or caption at a time."""
    report = check_run(run_settings(tmp_path)).report
    vae, stack = tiny_family.load_vae(CPU, FP32), tiny_family.load_text(CPU, FP32)
    latents: dict[bytes, tuple[Tensor, Tensor]] = {}
    texts: dict[str, tuple[Tensor, Tensor]] = {}

    def encode_image(pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        made = tiny_family.encode_image(vae, pixels_B3HW)
        latents.update({one.numpy().tobytes(): pair for one, *pair in zip(pixels_B3HW, *made, strict=True)})
        return made

    def encode_text(captions: list[str]) -> TextCond:
        made = tiny_family.encode_text(stack, captions)
        texts.update(zip(captions, zip(made.embeds_BLD, made.pooled_BP, strict=True), strict=True))
        return made

    cache_texts([sample.caption for sample in report.samples], tmp_path, "t", lambda: encode_text)
    cache_latents(report.placed, report.decoding, tmp_path, "i", lambda: encode_image)
    examples = load_examples(report.placed, report.decoding, tmp_path, "i", "t")
    placed = {(one.sample.file.name, one.bucket): one for one in report.placed}
    assert len(examples) == len(placed)
    for index, example in enumerate(examples):
        sample = placed[example.name, example.bucket].sample
        rgb = load_picture(sample.file.read(), example.bucket, report.decoding).rgb_HW3
        pixels = torch.from_numpy(rgb.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        mean, std = latents[pixels.numpy().tobytes()]
        embeds, pooled = texts[sample.caption]
        assert torch.equal(example.mean_CHW, mean)
        assert example.std_CHW is not None
        assert torch.equal(example.std_CHW, std)
        assert torch.equal(example.texts[0].embeds_BLD[0], embeds)
        assert torch.equal(example.texts[0].pooled_BP[0], pooled)
        alone, text = tiny_family.encode_image(vae, pixels[None]), tiny_family.encode_text(stack, [sample.caption])
        torch.testing.assert_close(example.mean_CHW, alone[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(example.std_CHW, alone[1][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(example.texts[0].embeds_BLD, text.embeds_BLD, rtol=1e-5, atol=1e-6)
        # What a step trains on is what sampling the encoder's distribution by the same noise gives.
        drawn = resampled(collate(examples, [index], [4]), 3, 7).mean_BCHW[0]
        noise = flow.draw_noise(tuple(mean.shape), flow.keyed_generator(3, "latent", 7, 4))
        raw = vae.encode(pixels[None]).latent_dist
        expected = (raw.mean + raw.std * noise - vae.config.shift_factor) * vae.config.scaling_factor
        torch.testing.assert_close(drawn, expected[0], rtol=1e-5, atol=1e-5)


def test_training_from_a_full_cache_is_training_from_an_empty_one(
    tiny_family: Family, run_settings: Settings, tmp_path: Path
) -> None:
    config = run_settings(tmp_path)
    first = Run(tiny_family, config, tmp_path / "cache").train()
    again = Run(tiny_family, config, tmp_path / "cache").train()
    assert_same_bits(first.weights, again.weights)
    assert first.losses == again.losses


def test_preview_prompts_do_not_change_the_training_texts(
    tiny_family: Family, run_settings: Settings, tmp_path: Path
) -> None:
    """Exact: a prompt that shares a batch with captions in the text encoder could move them by a rounding error."""
    quiet = Run(tiny_family, run_settings(tmp_path), tmp_path / "a").data.examples
    prompts = ["a small white ring", "blue", "a very small thing"]
    drawing = run_settings(tmp_path, preview={"every": 1, "prompts": prompts})
    shown = Run(tiny_family, drawing, tmp_path / "b").data.examples
    for one, other in zip(quiet, shown, strict=True):
        assert torch.equal(one.texts[0].embeds_BLD, other.texts[0].embeds_BLD)
        assert torch.equal(one.texts[0].pooled_BP, other.texts[0].pooled_BP)
        assert torch.equal(one.mean_CHW, other.mean_CHW)


# --- What is trained on. ---


def batches(run: Run, steps: int) -> list[Batch]:
    rows, size = run.data.examples.rows, run.config.optim.batch_size
    plan = BatchPlan([row.bucket for row in rows], size, steps, run.config.seed)
    return [collate(run.data.examples, plan.indices(step), range(size)) for step in range(steps)]


def test_the_same_pictures_under_other_names_are_the_same_run(
    start: Callable[..., Run], pictures: Path, tmp_path: Path
) -> None:
    """Exact: the order of names, which is all that differs, decides nothing. Held-out pictures and losses too."""
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(sorted(pictures.glob("*.png"), reverse=True)):
        shutil.copy(path, renamed / f"picture {number}.png")
        shutil.copy(path.with_suffix(".txt"), renamed / f"picture {number}.txt")
    settings: dict[str, Any] = {"validation": {"fraction": 0.2}}
    first, second = start(**settings), start(**settings, data={"path": str(renamed)})
    assert [one.names for one in batches(first, 6)] != [one.names for one in batches(second, 6)]
    for one, other in zip(batches(first, 6), batches(second, 6), strict=True):
        assert torch.equal(one.mean_BCHW, other.mean_BCHW)
        assert torch.equal(one.text.embeds_BLD, other.text.embeds_BLD)
    assert data_digest(first.data.report) == data_digest(second.data.report)
    assert [row.digest for row in first.data.held_out.rows] == [row.digest for row in second.data.held_out.rows]
    measured = [loop.validation_loss(run.state, run.family, run.config, run.data.held_out) for run in (first, second)]
    assert measured[0] == measured[1]
    assert_same_bits(first.train().weights, second.train().weights)
    assert first.losses == second.losses


def test_repeats_and_weights_of_a_source_are_kept(start: Callable[..., Run], everything: dict[str, Any]) -> None:
    run = start(**everything, optim={"batch_size": 5})
    assert run.data.examples.pictures == 10
    seen = Counter(name for batch in batches(run, 6) for name in batch.names)  # 30 of 5 + 2 · 5: twice through
    assert seen == {f"{number}.png": 2 if number % 2 == 0 else 4 for number in range(10)}
    for batch in batches(run, 6):
        assert batch.loss_weight_B is not None
        assert batch.loss_weight_B.tolist() == [1.0 if int(name[0]) % 2 == 0 else 0.5 for name in batch.names]


def test_held_out_pictures_come_once_and_are_never_trained(
    start: Callable[..., Run], everything: dict[str, Any]
) -> None:
    run = start(**everything, validation={"fraction": 0.4})
    trained, held_out = ([row.digest for row in each.rows] for each in (run.data.examples, run.data.held_out))
    assert len(set(trained)) + len(set(held_out)) == 10
    assert len(held_out) == len(set(held_out)) > 1
    assert not set(trained) & set(held_out)


def test_a_sources_weight_scales_its_loss(start: Callable[..., Run], everything: dict[str, Any]) -> None:
    run = start(**everything)
    batch = collate(run.data.examples, range(4), range(4))
    weighted, sigma = loop.batch_loss(run.state, run.family, run.config, batch)
    plain, _ = loop.batch_loss(run.state, run.family, run.config, replace(batch, loss_weight_B=None))
    assert len(sigma) == 4
    torch.testing.assert_close(weighted, plain * torch.tensor([row.loss_weight for row in run.data.examples.rows[:4]]))


def test_masks_weight_the_loss(start: Callable[..., Run], everything: dict[str, Any]) -> None:
    """Against a loop over places, from the mask in the file; an all-white mask is no mask, to the bit."""
    run = start(**everything)
    rows = run.data.examples.rows
    index = next(index for index, row in enumerate(rows) if row.name == "3.png")
    batch = collate(run.data.examples, [index], [0])
    noise, sigma = loop.keyed_draws(run.state, run.family, run.config, batch, run.state.step)
    found = loop.flow_loss(run.state, run.family, batch, noise, sigma)
    predicted = loop.predict(run.state, run.family, batch, noise, sigma).detach()
    error = (predicted - (noise - batch.mean_BCHW)).square()
    _, channels, height, width = error.shape
    path = Path(run.config.data.sources[0].path) / "3_mask.png"
    pixels = np.asarray(Image.open(path)).astype(float) / 255
    step = 64 // height
    weights = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            weights[y, x] = 0.1 + 0.9 * pixels[y * step : (y + 1) * step, x * step : (x + 1) * step].mean()
    total = 0.0
    for y in range(height):
        for x in range(width):
            for channel in range(channels):
                total += weights[y, x] / weights.mean() * float(error[0, channel, y, x])
    assert float(found) == pytest.approx(total / (channels * height * width), rel=1e-5)
    plain, white = replace(batch, weight_BHW=None), replace(batch, weight_BHW=torch.ones(1, height, width))
    losses = [loop.flow_loss(run.state, run.family, one, noise, sigma) for one in (plain, white, batch)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_texts_are_drawn_anew_at_each_step(
    start: Callable[..., Run], everything: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(**everything, iterations=30, optim={"batch_size": 4})
    assert run.data.blank is not None
    drawn: list[Batch] = []

    def note(state: TrainState, family: Family, config: RunConfig, batch: Batch) -> tuple[Tensor, Tensor]:
        drawn.append(batch)
        weight = next(iter(run.state.trained.values()))
        return (weight.sum() * 0).expand(4), torch.zeros(4)

    monkeypatch.setattr(loop, "batch_loss", note)
    run.train()
    rows = {row.name: index for index, row in enumerate(run.data.examples.rows)}
    chosen = []
    for batch in drawn:
        for slot, name in enumerate(batch.names):
            texts = [*run.data.examples[rows[name]].texts, run.data.blank]
            chosen += [
                which for which, text in enumerate(texts) if torch.equal(text.pooled_BP[0], batch.text.pooled_BP[slot])
            ]
    assert len(chosen) == 120
    counts = Counter(chosen)
    assert set(counts) == {0, 1, 2, 3}
    assert 18 <= counts[3] <= 54  # three in ten of 120
    assert min(counts.values()) >= 12


def test_latents_are_drawn_anew_at_each_step_and_the_mean_is_measured(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[bool, list[Tensor]] = {True: [], False: []}
    for resample in used:
        run = start(data={"resample_latents": resample}, validation={"fraction": 0.2})
        inner = loop.flow_loss
        with monkeypatch.context() as patched:

            def note(state: TrainState, family: Family, batch: Batch, *rest: Tensor) -> Tensor:
                used[resample].append(batch.mean_BCHW)  # noqa: B023 (called within this turn)
                return inner(state, family, batch, *rest)  # noqa: B023

            patched.setattr(loop, "flow_loss", note)
            run.train()
            count = len(used[resample])
            loop.validation_loss(run.state, run.family, run.config, run.data.held_out)
            measured = used[resample][count:]
            assert torch.equal(measured[0][0], run.data.held_out[0].mean_CHW)
        means = [one.mean_CHW for one in run.data.examples]
        trained = [row for batch in used[resample][:count] for row in batch]
        exact = [any(row.shape == mean.shape and torch.equal(row, mean) for mean in means) for row in trained]
        assert exact == [not resample] * len(trained)


# --- Batches made ahead. ---


def test_workers_change_nothing(start: Callable[..., Run], everything: dict[str, Any]) -> None:
    """Exact: batches follow from the step, whoever makes them and when."""
    runs = []
    for workers in (0, 1, 2, 8):
        settings = {**everything, "data": everything["data"] | {"workers": workers}}
        runs.append(start(**settings, iterations=5, lora={"dropout": 0.2}, optim={"accumulate": 2}).train())
    assert len(runs[0].losses) == 5
    for run in runs[1:]:
        assert run.losses == runs[0].losses
        assert_same_bits(run.weights, runs[0].weights)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_damaged_entry_ends_the_run_at_the_step_that_needs_it(
    tiny_family: Family, run_settings: Settings, tmp_path: Path, workers: int
) -> None:
    config = run_settings(tmp_path, iterations=20, data={"workers": workers}, optim={"batch_size": 1})
    run = Run(tiny_family, config, tmp_path / "cache")
    rows = run.data.examples.rows
    plan = BatchPlan([row.bucket for row in rows], 1, 20, config.seed)
    (index,) = plan.indices(6)
    rows[index].latent.write_bytes(b"damaged")
    before = set(threading.enumerate())
    with pytest.raises(StorageError, match=rows[index].latent.name):
        run.train()
    assert len(run.results) == 6
    assert set(threading.enumerate()) <= before


# --- What must not touch the training. ---


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_recompute_changes_nothing(start: Callable[..., Run], gradients: list[dict[str, Tensor]], policy: str) -> None:
    """Exact: the same operations on the same numbers, done twice."""
    kept = start(iterations=3).stir().train()
    again = start(iterations=3, memory={"recompute": policy}).stir()
    assert again.state.bare.is_gradient_checkpointing
    again.train()
    assert not kept.state.bare.is_gradient_checkpointing
    assert all(gap(one, other) < 1e-6 for one, other in zip(gradients[:3], gradients[3:], strict=True))
    assert_same_bits(kept.weights, again.weights)


def test_previews_change_nothing(start: Callable[..., Run], tmp_path: Path) -> None:
    preview = {"every": 1, "prompts": ["a red circle", "a star"], "steps": 1}
    settings: dict[str, Any] = {"iterations": 3, "lora": {"dropout": 0.2}}
    plain = start(**settings).train()
    drawn = start(**settings, preview=preview)
    vae = drawn.family.load_vae(CPU, FP32)
    assert drawn.data.preview is not None
    plan = drawn.data.preview
    pictures: list[Path] = []

    def draw(step: int) -> None:
        pictures.extend(write_previews(plan, drawn.family, drawn.state.bare, vae, tmp_path / "p", step))

    drawn.train(preview=draw)
    assert len(pictures) == 2 * 4
    assert all(path.is_file() for path in pictures)
    assert drawn.state.bare.training
    assert plain.losses == drawn.losses
    assert_same_bits(plain.weights, drawn.weights)


def test_previews_shared_out_are_the_same_pictures(start: Callable[..., Run], tmp_path: Path) -> None:
    """As many forward passes in every process, and the prompts when all pictures are there."""
    run = start(preview={"every": 1, "prompts": ["a red circle", "a star", "a blue ring"], "steps": 1}).stir()
    vae, plan = run.family.load_vae(CPU, FP32), run.data.preview
    assert plan is not None
    alone = write_previews(plan, run.family, run.state.bare, vae, tmp_path / "alone", 0)
    calls: list[int] = []
    run.state.bare.register_forward_pre_hook(lambda *_: calls.append(process))
    events: list[str] = []

    def wait() -> None:
        events.append(f"{process} waits, prompts {(tmp_path / 'shared/step-000000/prompts.json').exists()}")

    drawn = []
    for process in (1, 0):
        share = Share(process, 2, wait)
        drawn += write_previews(plan, run.family, run.state.bare, vae, tmp_path / "shared", 0, share)
    assert [path.name for path in drawn] == ["01.png", "00.png", "02.png"]
    assert events == ["1 waits, prompts False", "0 waits, prompts False"]
    assert calls.count(0) == calls.count(1) == 2
    for path in (*alone, alone[0].with_name("prompts.json")):
        assert (tmp_path / "shared" / "step-000000" / path.name).read_bytes() == path.read_bytes()


def test_who_stops_does_not_wait_for_pictures(start: Callable[..., Run], tmp_path: Path) -> None:
    """What was due at that step is drawn and measured when the run goes on."""
    settings: dict[str, Any] = {"iterations": 4, "validation": {"fraction": 0.2, "every": 2}, "preview": {"every": 1}}
    done: list[tuple[str, int]] = []
    noted: dict[str, Any] = {
        "preview": lambda step: done.append(("preview", step)),
        "validate": lambda step: done.append(("validate", step)),
    }
    run = start(**settings)
    saving = {"save": lambda at, _: run.save(tmp_path, at)}
    run.train(**noted, **saving, wish=lambda: Wish.STOP if run.state.step == 2 else Wish.GO_ON)
    assert done == [("preview", 0), ("validate", 0), ("preview", 1)]
    done.clear()
    start(tmp_path, **settings).train(**noted)
    assert done == [("preview", 2), ("validate", 2), ("preview", 3), ("validate", 4), ("preview", 4)]


def test_the_first_preview_is_the_base_model_and_the_last_is_not(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(preview={"every": 1, "prompts": ["a red circle"], "steps": 2})
    vae, plan = run.family.load_vae(CPU, FP32), run.data.preview
    assert plan is not None
    base = run.family.load_denoiser(CPU, FP32)

    def draw(denoiser: nn.Module, folder: str) -> bytes:
        where = tmp_path / folder
        return write_previews(plan, run.family, denoiser, vae, where, 0)[0].read_bytes()

    assert draw(run.state.bare, "start") == draw(base, "base")
    run.stir()
    assert draw(run.state.bare, "later") != draw(base, "base")


def test_validation_changes_nothing(start: Callable[..., Run]) -> None:
    """The same pictures are held out; only how often they are measured differs."""
    settings: dict[str, Any] = {"iterations": 3, "lora": {"dropout": 0.2}}
    rarely = start(**settings, validation={"fraction": 0.1, "every": 1000}).train()
    often = start(**settings, validation={"fraction": 0.1, "every": 1})
    assert often.data.held_out
    rows: list[dict[str, float]] = []

    def measure(step: int) -> None:
        rows.append(loop.validation_loss(often.state, often.family, often.config, often.data.held_out))

    often.train(validate=measure)
    assert len(rows) == 4
    assert rows[0] != rows[-1]
    assert often.state.denoiser.training
    assert_same_bits(rarely.weights, often.weights)
    again = loop.validation_loss(often.state, often.family, often.config, often.data.held_out)
    assert again == rows[-1]
    assert all(np.isfinite(value) for value in again.values())


def test_logging_changes_nothing(start: Callable[..., Run]) -> None:
    """Whatever a tracker does to the global random state."""
    plain = start(lora={"dropout": 0.2}).train()
    loud = start(lora={"dropout": 0.2})

    def log(result: StepResult) -> None:
        loud.results.append(result)
        torch.manual_seed(result.step)
        torch.rand(result.step * 7)
        np.random.seed(result.step)
        random.seed(result.step)

    loud.train(log=log)
    assert plain.losses == loud.losses
    assert_same_bits(plain.weights, loud.weights)


# --- Again, and going on. ---


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_twice_is_the_same(start: Callable[..., Run], dropout: float) -> None:
    torch.manual_seed(1)
    first = start(lora={"dropout": dropout}).train()
    torch.manual_seed(2)
    second = start(lora={"dropout": dropout}).train()
    assert first.losses == second.losses
    assert_same_bits(first.weights, second.weights)


def test_dropout_acts(start: Callable[..., Run]) -> None:
    without, with_it = (start(lora={"dropout": share}).stir().train() for share in (0.0, 0.3))
    assert without.losses[0] != with_it.losses[0]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_is_straight(
    start: Callable[..., Run], tmp_path: Path, dropout: float, everything: dict[str, Any]
) -> None:
    """Six steps at once, or three, a checkpoint on disk, and three more with everything loaded anew. Exact."""
    settings: dict[str, Any] = {
        "iterations": 6, "lora": {"dropout": dropout}, "schedule": {"name": "cosine", "warmup_steps": 2},
        "prior": PRIOR, **(everything if dropout else {}),
    }  # fmt: skip
    straight = start(**settings).train()

    first = start(**settings).train_until(3, tmp_path)
    torch.manual_seed(99)
    second = start(**settings, resume=tmp_path)
    assert second.state.step == 3
    assert_same_bits(first.weights, second.weights)
    second.train()
    assert [*first.losses, *second.losses] == straight.losses
    assert_same_bits(straight.weights, second.weights)
    assert_same_bits(*(tensors_of(run.state.updates.state_dict()) for run in (straight, second)))


def test_a_stopped_and_resumed_run_leaves_what_a_straight_one_leaves(
    run_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of `train`: files on disk, metrics without gap or double, and a damaged newest checkpoint."""
    settings: dict[str, Any] = {
        "iterations": 6, "preview": {"every": 3, "steps": 1, "prompts": ["a star"]}, "checkpoint": {"every": 2},
        "validation": {"fraction": 0.2, "every": 2}, "export": {"dtype": "fp32", "formats": ["diffusers"]},
    }  # fmt: skip
    straight = train(run_settings(tmp_path / "straight", **settings))
    config = run_settings(tmp_path / "stopped", **settings)
    asked: list[int] = []

    @contextmanager
    def stop_after_five() -> Iterator[Callable[[], bool]]:
        yield lambda: asked.append(1) is None and len(asked) == 5

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "stop_requests", stop_after_five)
        with pytest.raises(StoppedByUser):
            train(config)
    newest = config.output_dir / "checkpoints" / "step-000005"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-7])
    resumed = train(config, resume=True)

    rows, expected = read_metrics(resumed.folder), read_metrics(straight.folder)
    timings = {"step_s", "examples_per_s", "peak_gib"}
    strip = [[{k: v for k, v in row.items() if k not in timings} for row in each] for each in (rows, expected)]
    assert strip[0] == strip[1]
    ours, theirs = (read_adapter(result.loras["diffusers"]).layers for result in (resumed, straight))
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert torch.equal(ours[path].down_RI, theirs[path].down_RI)
        assert torch.equal(ours[path].up_OR, theirs[path].up_OR)
    for name in ("step-000000", "step-000003", "step-000006"):
        pictures = [result.folder / "previews" / name / "00.png" for result in (resumed, straight)]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


# --- LoRA arithmetic. ---


@pytest.fixture(scope="module")
def two_adapters(tiny_family: Family) -> tuple[AdapterState, AdapterState]:
    """Two random LoRAs of other ranks, alphas and modules; alpha is not the rank."""
    denoiser = tiny_family.load_denoiser(CPU, FP32)
    targets = tiny_family.lora_targets(denoiser)

    def blank(paths: list[str], rank: int) -> AdapterState:
        shapes = {path: denoiser.get_submodule(path).weight.shape for path in paths}
        return AdapterState(
            {path: LoraLayer(torch.zeros(rank, i), torch.zeros(o, rank), 1.0) for path, (o, i) in shapes.items()}
        )

    first = random_adapter(blank(targets, 4), 1, alpha=6.0)
    second = random_adapter(blank([path for path in targets if ".attn." in path], 3), 2, alpha=1.5)
    return first, second


@pytest.fixture(scope="module")
def probe(tiny_family: Family) -> Callable[[nn.Module], Tensor]:
    """The velocity of a denoiser on a fixed input."""
    stack = tiny_family.load_text(CPU, FP32)
    text = tiny_family.encode_text(stack, ["a large red circle on a blue background", "TOK"])
    z, sigma = initial_noise(tiny_family.latent_shape(64, 64), [0, 1]), torch.tensor([0.8, 0.3])

    @torch.no_grad()
    def velocity(denoiser: nn.Module) -> Tensor:
        return tiny_family.predict_velocity(denoiser, z, sigma, text, 2.0)

    return velocity


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("strength", [1.0, 0.35, -0.5])
def test_merged_is_attached(
    tiny_family: Family, two_adapters: tuple[AdapterState, ...], probe: Callable[[nn.Module], Tensor], strength: float
) -> None:
    base, attached, merged = (tiny_family.load_denoiser(CPU, FP32) for _ in range(3))
    attach_states(attached, [("one", two_adapters[0], strength)])
    lora.merge_state(merged, two_adapters[0], strength)
    assert relative(probe(merged), probe(base)) > 1e-3
    assert relative(probe(attached), probe(merged)) < 1e-5


def test_two_attached_are_the_sum_of_two_merges(
    tiny_family: Family, two_adapters: tuple[AdapterState, ...], probe: Callable[[nn.Module], Tensor]
) -> None:
    attached, merged = (tiny_family.load_denoiser(CPU, FP32) for _ in range(2))
    given = [("one", two_adapters[0], 0.8), ("two", two_adapters[1], -0.6)]
    attach_states(attached, given)
    for name, state, strength in given:
        lora.merge_state(merged, state, strength, name)
    one_only = tiny_family.load_denoiser(CPU, FP32)
    lora.merge_state(one_only, two_adapters[0], 0.8)
    assert relative(probe(one_only), probe(merged)) > 1e-4
    assert relative(probe(attached), probe(merged)) < 1e-5


def test_strength_zero_is_the_base(
    tiny_family: Family, two_adapters: tuple[AdapterState, ...], probe: Callable[[nn.Module], Tensor]
) -> None:
    base, attached, merged = (tiny_family.load_denoiser(CPU, FP32) for _ in range(3))
    attach_states(attached, [("one", two_adapters[0], 0.0), ("two", two_adapters[1], 0.0)])
    lora.merge_state(merged, two_adapters[0], 0.0)
    assert torch.equal(probe(attached), probe(base))
    assert torch.equal(probe(merged), probe(base))


def test_no_adapters_is_the_base(tiny_family: Family, probe: Callable[[nn.Module], Tensor]) -> None:
    base, attached = (tiny_family.load_denoiser(CPU, FP32) for _ in range(2))
    attach_states(attached, [])
    assert torch.equal(probe(attached), probe(base))


def test_a_fresh_lora_is_the_base(
    tiny_family: Family, start: Callable[..., Run], probe: Callable[[nn.Module], Tensor]
) -> None:
    run = start(lora={"alpha": 9.0})
    run.state.bare.eval()
    assert torch.equal(probe(run.state.bare), probe(tiny_family.load_denoiser(CPU, FP32)))


def test_alpha_scales_as_strength_does(
    tiny_family: Family, two_adapters: tuple[AdapterState, ...], probe: Callable[[nn.Module], Tensor]
) -> None:
    doubled = AdapterState({path: replace(one, alpha=2 * one.alpha) for path, one in two_adapters[0].layers.items()})
    by_alpha, by_strength = (tiny_family.load_denoiser(CPU, FP32) for _ in range(2))
    attach_states(by_alpha, [("one", doubled, 0.5)])
    attach_states(by_strength, [("one", two_adapters[0], 1.0)])
    assert torch.equal(probe(by_alpha), probe(by_strength))


def test_trained_read_off_and_attached_anew_is_the_trained_model(
    tiny_family: Family, start: Callable[..., Run], probe: Callable[[nn.Module], Tensor]
) -> None:
    run = start(lora={"alpha": 7.0}).stir().train()
    run.state.bare.eval()
    again = tiny_family.load_denoiser(CPU, FP32)
    attach_states(again, [("one", lora.read_trained(run.state.bare), 1.0)])
    assert torch.equal(probe(again), probe(run.state.bare))


def test_diffusers_draws_with_our_file_as_we_do(
    tiny_family: Family, two_adapters: tuple[AdapterState, ...], probe: Callable[[nn.Module], Tensor], tmp_path: Path
) -> None:
    """The velocity of FluxPipeline with the exported LoRA loaded, at float32, within 1e-5."""
    for number, adapter in enumerate(two_adapters):
        path = tmp_path / f"{number}.safetensors"
        write_adapter(path, adapter, "diffusers", FP32, {})
        pipe = FluxPipeline.from_pretrained(tiny_folder(), torch_dtype=FP32)
        pipe.load_lora_weights(path)
        ours = tiny_family.load_denoiser(CPU, FP32)
        attach_states(ours, [("one", read_adapter(path), 1.0)])
        direct = tiny_family.load_denoiser(CPU, FP32)
        attach_states(direct, [("one", adapter, 1.0)])
        assert relative(probe(pipe.transformer), probe(ours)) < 1e-5
        assert relative(probe(direct), probe(ours)) < 1e-5
        pipe.set_adapters(pipe.get_list_adapters()["transformer"], [0.4])
        weaker = tiny_family.load_denoiser(CPU, FP32)
        attach_states(weaker, [("one", adapter, 0.4)])
        assert relative(probe(pipe.transformer), probe(weaker)) < 1e-5


# --- Prior preservation. ---


def test_a_prior_without_weight_changes_nothing(start: Callable[..., Run]) -> None:
    plain = start(iterations=2).train()
    unweighted = start(iterations=2, prior=PRIOR | {"weight": 0.0}).train()
    assert_same_bits(plain.weights, unweighted.weights)
    assert unweighted.results[0].prior_loss is None


def test_a_prior_that_is_seldom_looked_at_weighs_as_much_more(start: Callable[..., Run]) -> None:
    seldom = start(iterations=3, prior=PRIOR | {"every": 2, "weight": 0.5}).stir().train()
    assert [one.prior_loss is None for one in seldom.results] == [False, True, False]
    first, twice = (
        start(iterations=1, prior=PRIOR | prior).stir().train() for prior in ({"every": 3}, {"weight": 3.0})
    )
    assert_same_bits(first.weights, twice.weights)


def test_drift_is_nothing_at_first_and_the_distance_to_the_base_later(start: Callable[..., Run]) -> None:
    run = start(prior=PRIOR)
    assert prior_drift(run.state, run.family, run.config, run.prior, [0, 1]).tolist() == [0.0, 0.0]
    base = start(prior=PRIOR)
    run.stir()
    drift = prior_drift(run.state, run.family, run.config, run.prior, [0, 1, 2])
    assert drift.min() > 0
    for slot in range(3):
        generator = flow.keyed_generator(run.config.seed, "prior", 0, slot)
        batch = collate(run.prior, [int(torch.randint(2, (), generator=generator))], [slot])
        noise, sigma = loop.keyed_draws(run.state, run.family, run.config, batch, 0, "prior noise")
        ours, theirs = (loop.predict(one.state, run.family, batch, noise, sigma) for one in (run, base))
        torch.testing.assert_close(drift[slot], (ours - theirs).square().mean(), rtol=1e-4, atol=1e-7)


def test_a_prior_holds_its_prompts_in_place(start: Callable[..., Run]) -> None:
    moved = {}
    for weight in (0.01, 10.0):
        run = start(iterations=12, learning_rate=3e-3, prior=PRIOR | {"weight": weight}).train()
        run.state.step = 0  # the same noise for both
        moved[weight] = float(prior_drift(run.state, run.family, run.config, run.prior, range(8)).mean())
    assert moved[10.0] < 0.5 * moved[0.01]
