"""One run from run file to LoRA: check, encode, train, export, prove, tell."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from PIL import Image

from flux_ft import __version__, log
from flux_ft.adapters import lora
from flux_ft.adapters.formats import EXPORT_DTYPES, verify_written, write_adapter
from flux_ft.adapters.metadata import ExportInfo, build_metadata
from flux_ft.config import RunConfig
from flux_ft.data.cache import verify_cache
from flux_ft.data.folder import hidden_reason
from flux_ft.data.report import write_report
from flux_ft.errors import ConfigError, StoppedByUser, StorageError
from flux_ft.families.base import Family
from flux_ft.families.quantize import tile_vae
from flux_ft.families.registry import open_family
from flux_ft.files import require_writable, write_whole
from flux_ft.infer.grid import data_url, save_png
from flux_ft.infer.runner import release_memory
from flux_ft.plan import Checked, check_run
from flux_ft.runfile import dump_run
from flux_ft.train import checkpoint, determinism, fitting
from flux_ft.train.attention import FACT as ATTENTION
from flux_ft.train.captions import with_captions
from flux_ft.train.card import ExtractionFacts, model_card, plot_losses
from flux_ft.train.fingerprint import BASE, ENCODED, accept_drift, layout, run_fingerprint
from flux_ft.train.fitting import Fitted, fit_run, out_of_memory
from flux_ft.train.full import extract_lora, prove_extraction, use_average
from flux_ft.train.loop import Acts, StepResult, Wish, due, keep_base_velocity, train_steps, validation_loss
from flux_ft.train.preview import has_previews, preview_grid, write_previews
from flux_ft.train.restore import restore
from flux_ft.train.resume import Keeper, decided_by_main, find_checkpoint, require_space
from flux_ft.train.saving import Saver
from flux_ft.train.setup import (
    TrainData,
    TrainState,
    draw_prior,
    largest_tokens,
    make_accelerator,
    prepare_data,
    prepare_model,
    share_of,
)
from flux_ft.train.sharded import gather
from flux_ft.train.stops import TimeLimit, stop_requests
from flux_ft.types import AdapterState, DatasetReport

FILE_SUFFIX = {"diffusers": "", "kohya": "-comfyui"}
TOLD = {
    "strict": "so a run that is stopped and resumed ends with the bits of one that is not",
    "fast": "so a resumed run has the same pictures and noise, and other last bits; `determinism: strict` has the same",
}


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind."""

    folder: Path
    loras: dict[str, Path]
    """By format."""
    worst_error: float
    """Largest relative error of a written ΔW against the trained one."""
    train_seconds: float
    """Spent in optimizer steps of this start of the run, previews and checkpoints left out."""
    steps: int
    loss: float
    """Mean over the last tenth of the steps."""
    extraction: ExtractionFacts | None = None
    """Of a full fine-tune: what its LoRA keeps of it."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        facts: dict[str, Any] = {
            "folder": str(self.folder),
            "loras": {name: str(path) for name, path in self.loras.items()},
            "steps": self.steps,
            "loss": self.loss,
            "train_seconds": round(self.train_seconds, 2),
            "worst_delta_weight_error": self.worst_error,
        }
        if self.extraction is None:
            return facts
        full, report = self.extraction.full_weights, self.extraction.report
        return facts | {
            "full_weights": None if full is None else str(full),
            "energy_kept": report.energy_kept,
            "proof": self.extraction.proof.as_json(),
        }


def train(
    config: RunConfig,
    resume: bool = False,
    command: str = "flux-ft train RUN.yaml --resume",
    *,
    allow_drift: bool = False,
    max_seconds: float = math.inf,
) -> TrainResult:
    """Carry out the run. `command` is what a user types to go on after a stop.

    `allow_drift` goes on from a checkpoint though settings, data or software have changed; `max_seconds` from now it
    is saved and stopped. Raises InputError before anything is written, NumbersError, StorageError, or StoppedByUser
    after saving.
    """
    determinism.prepare_environment()
    limit = TimeLimit(max_seconds)
    checked = check_run(config)
    accelerator = make_accelerator(config, config.output_dir)
    resume = claim_folder(
        config.output_dir, resume
    )  # in every process: one that waited for a refused one would die of it
    mode = determinism.resolve(config.determinism, accelerator.device.type)
    with determinism.applied(mode, accelerator.device), only_run(config.output_dir, accelerator.is_main_process):
        family = open_family(config.model, config.model_parts)
        fitted = fit_run(config, family, accelerator, max(one.width_px * one.height_px for one in checked.buckets))
        try:
            return _train(config, fitted, family, checked, accelerator, limit, mode, resume, allow_drift, command)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, fitted.config, family) from None


def _train(
    config: RunConfig,
    fitted: Fitted,
    family: Family,
    checked: Checked,
    accelerator: Accelerator,
    limit: TimeLimit,
    mode: determinism.Mode,
    resume: bool,
    allow_drift: bool,
    command: str,
) -> TrainResult:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    folder = config.output_dir
    if not resume:  # a run goes on with the captions that it began with
        with accelerator.main_process_first():
            checked = with_captions(config, checked, describes=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    report, world = checked.report, accelerator.num_processes
    around = determinism.circumstances(accelerator.device, world, mode) | layout(config)
    around |= fitting.circumstances(fitted.config)
    about = checkpoint.About(0, run_fingerprint(config, report, world), around)
    found: checkpoint.Saved | None = None
    if resume:
        found = decided_by_main(accelerator, lambda: find_checkpoint(folder, config))
    accept = partial(accept_drift, None if found is None else found.about, strict=mode == "strict", allow=allow_drift)
    about = decided_by_main(accelerator, lambda: accept(about))  # other processes may run on other cards
    log.say(f"determinism: {mode}, {TOLD[mode]}")
    for warning in report.warnings:
        log.warn(warning)
    if found is None and accelerator.is_main_process:
        tell_run(config, report)
    data = prepare_data(config, report, family, accelerator, folder / "cache")
    release_memory()
    began_with = None if found is None else found.about.circumstances.get(ATTENTION)
    tokens = largest_tokens(family, data.examples)
    state = prepare_model(fitted.config, family, accelerator, tokens=tokens, attention=began_with)
    about = decided_by_main(
        accelerator,
        lambda: accept(about, late={BASE: state.base_digest, ENCODED: data.examples.digest()}, chosen=state.kernels),
    )
    if found is not None and accelerator.is_main_process:  # now that nothing can refuse it any more
        tell_run(config, report)
    require_space(folder, state, config)
    prior = draw_prior(config, family, data, state)
    keep_base_velocity(state, family, config, prior, about.step)
    if found is not None:
        restore(state, found)
    preview_vae = family.load_vae(torch.device("cpu"), next(state.bare.parameters()).dtype) if data.preview else None
    if preview_vae is not None and fitted.previews_in_tiles:
        tile_vae(preview_vae)
    if config.logging.trackers:
        accelerator.init_trackers("flux_ft", init_kwargs={"wandb": {"name": config.slug, "dir": str(folder)}})
    saver = Saver(Keeper(state, config, about).job, saved_step=None if found is None else about.step)
    with stop_requests() as should_stop, saver, Recorder(folder, state, config) as recorder:

        def wish() -> Wish:
            again = saver.is_due_again()
            limit.note_save(saver.longest_s)
            if limit.is_up() or should_stop():
                return Wish.STOP
            return Wish.SAVE if again else Wish.GO_ON

        acts = Acts(
            log=recorder.step,
            validate=lambda step: _validate(state, family, config, data, recorder, step),
            preview=lambda step: _preview(state, family, data, preview_vae, folder, step, is_new=step > about.step),
            save=saver.save,
            wish=wish,
        )
        finished = train_steps(state, family, config, data, prior, acts)
        if finished and config.checkpoint.every is not None:
            try:
                saver.finish(state.step)
            except StorageError as error:
                log.warn(f"{error.message}. The run is at its end, so its files are written all the same")
        elif not finished:
            saver.finish(state.step)
    accelerator.wait_for_everyone()  # a launcher may end the others once the first process has gone
    if not finished:
        accelerator.end_training()
        raise StoppedByUser(f"stopped after step {state.step}; everything up to it is saved", hint=f"go on: {command}")
    return _finish(config, family, data, state, preview_vae, recorder.seconds, started)


def tell_run(config: RunConfig, report: DatasetReport) -> None:
    """Write the resolved settings and the report."""
    write_whole(config.output_dir / "run.yaml", dump_run(config).encode())
    write_report(report, config.output_dir, config.trigger_word)


def _finish(
    config: RunConfig,
    family: Family,
    data: TrainData,
    state: TrainState,
    preview_vae: torch.nn.Module | None,
    train_seconds: float,
    started: str,
) -> TrainResult:
    """Export, prove, tell."""
    accelerator, folder = state.accelerator, config.output_dir
    loras, worst, extraction = dict[str, Path](), 0.0, None
    whole = gather(state, family, config) if state.shards > 1 else state
    if whole is not None and accelerator.is_main_process:
        use_average(whole)
        if config.finetune_type == "lora":
            loras, worst = export(whole, config, family, data, lora.read_trained(whole.bare), started)
        else:
            adapter, about = extract_lora(whole, config)
            loras, worst = export(whole, config, family, data, adapter, started)
            extraction = prove_extraction(whole, config, family, data, preview_vae, about, loras)
    rows = read_metrics(folder)
    tail = [row["loss"] for row in rows if "loss" in row]
    tail = tail[-max(1, len(tail) // 10) :]
    result = TrainResult(folder, loras, worst, train_seconds, state.step, sum(tail) / max(1, len(tail)), extraction)
    if accelerator.is_main_process:
        finish_folder(config, family, data, result, rows, state.optimizer)
    accelerator.end_training()
    return result


@contextmanager
def only_run(folder: Path, is_main: bool) -> Iterator[None]:
    """Keeps other runs out of the run folder. Raises ConfigError when one is at work in it."""
    lock = FileLock(folder / ".lock")
    if is_main:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"`output: {folder}` is in use: another process trains in it", hint="wait for it, or end it"
            ) from None
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class CacheState:
    """What lies in a run's cache."""

    folder: Path
    entries: int
    size_bytes: int
    written: int = 0
    """Entries that were encoded just now."""
    damaged: tuple[str, ...] = ()
    """Entries that were removed because they were not whole; the next fill makes them anew."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "folder": str(self.folder), "damaged": list(self.damaged)}

    def for_people(self) -> str:
        """For people."""
        removed = f"; {len(self.damaged)} were damaged and are removed: " + ", ".join(self.damaged[:5])
        return (
            f"{self.folder}: {self.entries} entries, {self.size_bytes / 1e6:.1f} MB, {self.written} encoded just now"
            + (removed if self.damaged else "")
        )


def fill_cache(config: RunConfig) -> CacheState:
    """Encode all that a run will read, captions of a captioner included. Raises InputError, StorageError."""
    checked = check_run(config)
    folder = config.output_dir / "cache"
    require_writable(folder, "output")
    accelerator = make_accelerator(config, config.output_dir)
    family = open_family(config.model, config.model_parts)
    with accelerator.main_process_first():
        checked = with_captions(config, checked, describes=accelerator.is_main_process)
    before = {path.name for path in cache_files(folder)}
    prepare_data(config, checked.report, family, accelerator, folder)
    after = cache_files(folder)
    new = sum(path.name not in before for path in after)
    return CacheState(folder, len(after), sum(path.stat().st_size for path in after), new)


def check_cache(config: RunConfig) -> CacheState:
    """Read every entry of the run's cache and remove what is not whole. Raises InputError when there is no cache."""
    folder = config.output_dir / "cache"
    if not folder.is_dir():
        raise ConfigError(f"`output: {config.output_dir}` holds no cache", hint="fill it by `flux-ft cache RUN.yaml`")
    found = verify_cache(folder, remove=True)
    kept = cache_files(folder)
    damaged = tuple(path.relative_to(folder).as_posix() for path in found.damaged)
    return CacheState(folder, len(kept), sum(path.stat().st_size for path in kept), 0, damaged)


def cache_files(folder: Path) -> list[Path]:
    """The entries of a cache."""
    return sorted(folder.glob("*/*.safetensors"))


def claim_folder(folder: Path, resume: bool) -> bool:
    """Make sure that `folder` can be written and holds no earlier run, or one to `resume`; returns whether it does.

    Where nothing was begun yet, `resume` begins: a cluster gives the same command again, however early a job was
    stopped. Raises ConfigError, StorageError.
    """
    if resume and (folder / "run.yaml").is_file():
        return True
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`output: {folder}` is a file", hint="choose another folder")
    if folder.is_dir() and not only_the_cache(folder):
        if resume:
            raise ConfigError(f"`output: {folder}` holds no run to resume", hint="look whether it is the right folder")
        another = "choose another folder, for example by `output=runs/another`"
        raise ConfigError(
            f"`output: {folder}` holds something already",
            hint=f"go on with it by --resume, or {another}" if (folder / "run.yaml").is_file() else another,
        )
    require_writable(folder, "output")
    if resume:
        log.warn(f"`output: {folder}` holds no run to resume; starting from step 0")
    return False


def only_the_cache(folder: Path) -> bool:
    """Whether an earlier start got no further than its first step, so that nothing can be lost.

    Too little memory shows in the first step: the mended run must be able to start again. Hidden files do not count: a
    kill leaves half-written ones, and file managers put down theirs.
    """
    names = {path.name for path in folder.iterdir() if hidden_reason(path.name) is None}
    if not names <= {"cache", "captions.jsonl", "run.yaml", "report.json", "report.html", "metrics.jsonl", "previews"}:
        return False
    metrics, previews = folder / "metrics.jsonl", folder / "previews"
    steps_done = metrics.is_file() and b'"loss"' in metrics.read_bytes()
    return not steps_done and {path.name for path in previews.glob("*")} <= {"step-000000"}


class Recorder:
    """metrics.jsonl, the progress bar and the trackers. Only the main process writes."""

    def __init__(self, folder: Path, state: TrainState, config: RunConfig) -> None:
        self._state, self._main = state, state.accelerator.is_main_process
        self._bar = log.Bar("train", config.iterations) if self._main else None
        # What is measured at this step is measured again: the run may have been killed before it was.
        again = state.step == config.iterations or due(state.step, config.validation.every)
        self._metrics = (
            log.MetricsFile(
                folder / "metrics.jsonl",
                state.step,
                lambda row: not (again and row["step"] == state.step and "validation_loss" in row),
            )
            if self._main
            else None
        )
        self._smooth: float | None = None
        self.seconds = 0.0
        """Spent in optimizer steps so far."""

    def __enter__(self) -> Recorder:
        if self._bar:
            self._bar.__enter__()
            self._bar.skip(self._state.step)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.__exit__(*error)
        if self._metrics:
            self._metrics.close()

    def step(self, result: StepResult) -> None:
        """Record one step."""
        self.seconds += result.seconds
        row = {
            "step": result.step, "loss": result.loss, "grad_norm": result.grad_norm, "sigma": result.sigma,
            "learning_rate": result.learning_rate, "step_s": round(result.seconds, 4),
            "examples_per_s": round(result.examples / max(1e-9, result.seconds), 3),
        }  # fmt: skip
        if result.prior_loss is not None:
            row["prior_loss"] = result.prior_loss
        if result.left_out:
            row["left_out"] = True
        if torch.cuda.is_available():
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.write(row)
        self._smooth = result.loss if self._smooth is None else 0.95 * self._smooth + 0.05 * result.loss
        if self._bar:
            self._bar.advance(1, note=f"loss {self._smooth:.4f}")

    def write(self, row: dict[str, Any]) -> None:
        """Record any numbers, with their "step"."""
        if self._metrics:
            self._metrics.write(row)
        self._state.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])


def _validate(
    state: TrainState, family: Family, config: RunConfig, data: TrainData, recorder: Recorder, step: int
) -> None:
    if data.held_out and config.validation.every is not None:
        recorder.write({"step": step, **validation_loss(state, family, config, data.held_out)})


def _preview(
    state: TrainState,
    family: Family,
    data: TrainData,
    vae: torch.nn.Module | None,
    folder: Path,
    step: int,
    is_new: bool,
) -> None:
    plan, previews = data.preview, folder / "previews"
    if plan is not None and vae is not None and (is_new or not has_previews(previews, step, plan)):
        write_previews(plan, family, state.bare, vae, previews, step, share_of(state.accelerator))


def export(
    state: TrainState, config: RunConfig, family: Family, data: TrainData, adapter: AdapterState, started: str
) -> tuple[dict[str, Path], float]:
    """Write the LoRA in every wished format, read each back and compare. Returns the files and the worst error."""
    folder = config.output_dir
    sizes = [one.bucket for one in data.report.placed]
    largest = max(sizes, key=lambda bucket: bucket.width_px * bucket.height_px)
    info = ExportInfo(
        title=config.finetune_comment or config.slug,
        architecture=family.variant.architecture,
        license=family.variant.license,
        trigger_word=config.trigger_word,
        rank=config.lora_rank,
        steps=state.step,
        seed=config.seed,
        learning_rate=config.resolved_learning_rate,
        optimizer=state.optimizer,
        num_images=data.examples.pictures,
        resolution=f"{largest.width_px}x{largest.height_px}",
        started=started,
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config_yaml=dump_run(config),
        base_model=family.variant.name,
        tool_version=__version__,
        batch_size=config.optim.batch_size * config.optim.accumulate * state.accelerator.num_processes,
        thumbnail=thumbnail(folder / "previews", state.step),
    )
    dtype = EXPORT_DTYPES[config.export.dtype]
    written: dict[str, Path] = {}
    worst = 0.0
    for name in config.export.formats:
        path = folder / f"{config.slug}{FILE_SUFFIX[name]}.safetensors"
        write_adapter(path, adapter, name, dtype, build_metadata(info, flavour=name, modules=adapter.layers))
        error = verify_written(path, adapter, dtype)
        log.say(f"wrote {path} ({name}, {path.stat().st_size / 1e6:.1f} MB); read back, ΔW within {error:.1e}")
        written[name], worst = path, max(worst, error)
    return written, worst


def thumbnail(previews: Path, step: int) -> str:
    """The first preview after `step` steps, small, for the header; nothing where none was drawn."""
    path = previews / f"step-{step:06d}" / "00.png"
    if not path.is_file():
        return ""
    with Image.open(path) as picture:
        return data_url(picture)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [row for _, row in log.metrics_rows(folder / "metrics.jsonl")]


def finish_folder(
    config: RunConfig,
    family: Family,
    data: TrainData,
    result: TrainResult,
    rows: list[dict[str, Any]],
    optimizer: str,
) -> None:
    """Loss plot, grid of previews and model card."""
    started = time.monotonic()
    plot_losses(rows, result.folder / "loss.png")
    grid: Image.Image | None = None
    if data.preview is not None:
        grid = preview_grid(result.folder / "previews", data.preview.prompts)
        if grid is not None:
            save_png(grid, result.folder / "previews.png")
    card = model_card(
        config,
        family.variant,
        data,
        result.loras,
        result.steps,
        result.loss,
        grid is not None,
        result.extraction,
        optimizer,
    )
    write_whole(result.folder / "README.md", card.encode())
    log.say(f"wrote {result.folder / 'README.md'} and its pictures in {time.monotonic() - started:.1f} s")
