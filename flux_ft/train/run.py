"""One run from run file to LoRA: check, encode, train, export, prove, tell."""

from __future__ import annotations

import datetime
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flux_ft import __version__, log
from flux_ft.adapters import lora
from flux_ft.adapters.formats import EXPORT_DTYPES, verify_written, write_adapter
from flux_ft.adapters.metadata import ExportInfo, build_metadata
from flux_ft.config import DataConfig, RunConfig
from flux_ft.data.cache import verify_cache
from flux_ft.data.folder import hidden_reason
from flux_ft.data.report import write_report
from flux_ft.errors import ConfigError, StoppedByUser, StorageError
from flux_ft.families.base import Family
from flux_ft.families.registry import open_family
from flux_ft.files import require_writable, write_whole
from flux_ft.infer.grid import data_url, save_png
from flux_ft.infer.runner import release_memory
from flux_ft.plan import check_run
from flux_ft.runfile import dump_run
from flux_ft.train import checkpoint
from flux_ft.train.captions import with_captions
from flux_ft.train.card import ExtractionFacts, model_card, plot_losses
from flux_ft.train.full import extract_lora, prove_extraction, use_average
from flux_ft.train.loop import Acts, StepResult, keep_base_velocity, train_steps, validation_loss
from flux_ft.train.optim import OPTIMIZERS, ROUNDINGS
from flux_ft.train.preview import preview_grid, write_previews
from flux_ft.train.setup import (
    TrainData,
    TrainState,
    data_digest,
    draw_prior,
    fuses_backward,
    make_accelerator,
    prepare_data,
    prepare_model,
)
from flux_ft.types import AdapterState, DatasetReport

FILE_SUFFIX = {"diffusers": "", "kohya": "-comfyui"}
DATA_IN_LOOP = {"unmasked_weight", "caption_dropout", "tag_orders", "resample_latents"}
"""What of `data` acts in each step; all else acts on the pictures, whose digest tells it."""
FREE_TO_CHANGE = {
    *("output", "finetune_comment", "preview", "validation.every", "checkpoint", "export", "logging", "captioning"),
    *("webhook_url", "webhook_secret", "captioner", "priority"),
    *(f"memory.{name}" for name in ("recompute", "fused_backward", "stream_blocks")),
    *(f"data.{name}" for name in DataConfig.model_fields if name not in DATA_IN_LOOP),
    *("iterations", "learning_rate", "optim.batch_size", "optim.accumulate"),
}
"""Settings that may change between a stop and a resume. What matters of the last row is told by `run_fingerprint`; the
pictures may move, since their digest tells them."""


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


def train(config: RunConfig, resume: bool = False, command: str = "flux-ft train RUN.yaml --resume") -> TrainResult:
    """Carry out the run. `command` is what a user types to go on after a stop.

    Raises InputError before anything is written, NonFiniteError, StorageError, or StoppedByUser after saving.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    checked = check_run(config)
    folder = config.output_dir
    family = open_family(config.model, config.model_parts)
    accelerator = make_accelerator(config, folder)
    claim_folder(folder, resume)  # in every process: one that waited for a refused one would die of it
    if not resume:  # a run goes on with the captions that it began with
        with accelerator.main_process_first():
            checked = with_captions(config, checked, describes=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    report = checked.report
    fingerprint = run_fingerprint(config, report, accelerator.num_processes)
    found: checkpoint.Checkpoint | None = None
    if resume:
        found = find_checkpoint(folder, fingerprint, config)
    if accelerator.is_main_process:
        write_whole(folder / "run.yaml", dump_run(config).encode())
        write_report(report, folder, config.trigger_word)
        for warning in report.warnings:
            log.warn(warning)
    data = prepare_data(config, report, family, accelerator, folder / "cache")
    release_memory()
    state = prepare_model(config, family, accelerator)
    require_space(folder, state, config)
    prior = draw_prior(config, family, data, state)
    keep_base_velocity(state, family, config, prior, found.step if found else 0)
    if found is not None:
        restore(state, found)
    preview_vae = family.load_vae(torch.device("cpu"), next(state.bare.parameters()).dtype) if data.preview else None
    if config.logging.trackers:
        accelerator.init_trackers("flux_ft", init_kwargs={"wandb": {"name": config.slug, "dir": str(folder)}})
    with stop_requests() as should_stop, Recorder(folder, state, config) as recorder:
        acts = Acts(
            log=recorder.step,
            validate=lambda step: _validate(state, family, config, data, recorder, step),
            preview=lambda step: _preview(state, family, data, preview_vae, folder, step),
            save=lambda step: _save(state, config, folder, step, fingerprint),
            should_stop=should_stop,
        )
        finished = train_steps(state, family, config, data, prior, acts)
    if not finished:
        accelerator.end_training()
        raise StoppedByUser(f"stopped after step {state.step}; everything up to it is saved", hint=f"go on: {command}")
    accelerator.wait_for_everyone()
    loras, worst, extraction = dict[str, Path](), 0.0, None
    if accelerator.is_main_process:
        use_average(state)
        if config.finetune_type == "lora":
            loras, worst = export(state, config, family, data, lora.read_trained(state.bare), started)
        else:
            adapter, about = extract_lora(state, config)
            loras, worst = export(state, config, family, data, adapter, started)
            extraction = prove_extraction(state, config, family, data, preview_vae, about, loras)
    rows = read_metrics(folder)
    tail = [row["loss"] for row in rows if "loss" in row]
    tail = tail[-max(1, len(tail) // 10) :]
    result = TrainResult(folder, loras, worst, recorder.seconds, state.step, sum(tail) / max(1, len(tail)), extraction)
    if accelerator.is_main_process:
        finish_folder(config, family, data, result, rows, state.optimizer)
    accelerator.end_training()
    return result


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


def claim_folder(folder: Path, resume: bool) -> None:
    """Make sure that `folder` can be written and holds no earlier run. Raises ConfigError, StorageError."""
    if resume:
        if not (folder / "run.yaml").is_file():
            raise ConfigError(f"`output: {folder}` holds no run to resume", hint="leave out --resume to start one")
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`output: {folder}` is a file", hint="choose another folder")
    if folder.is_dir() and not only_the_cache(folder):
        another = "choose another folder, for example by `output=runs/another`"
        raise ConfigError(
            f"`output: {folder}` holds something already",
            hint=f"go on with it by --resume, or {another}" if (folder / "run.yaml").is_file() else another,
        )
    require_writable(folder, "output")


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


def require_space(folder: Path, state: TrainState, config: RunConfig) -> None:
    """Raise StorageError unless checkpoints, exports and pictures will fit; say the need where it is not small."""
    one, exports = checkpoint_bytes(state, config), export_bytes(state, config)
    saved = 0 if config.checkpoint.every is None else one * (config.checkpoint.keep + 1)
    need = saved + exports + 20_000_000
    free = shutil.disk_usage(folder).free
    told = (
        f"{need / 1e9:.2f} GB, of which checkpoints {saved / 1e9:.2f} GB ({config.checkpoint.keep} kept, one more "
        f"being written) and exported files {exports / 1e9:.2f} GB"
    )
    if free < need:
        raise StorageError(
            f"{folder}: {free / 1e9:.2f} GB are free, this run needs about {told}",
            hint="free some disk space, choose another `output`, or lower `checkpoint.keep`"
            + (", or set `export.keep_full: false`" if config.export.keep_full else ""),
        )
    if config.finetune_type == "full":
        log.say(f"disk: this run needs about {told}; {free / 1e9:.2f} GB are free")


def checkpoint_bytes(state: TrainState, config: RunConfig) -> float:
    """About the size of one checkpoint."""
    count = sum(parameter.numel() for parameter in state.trained.values())
    stored = sum(parameter.nbytes for parameter in state.trained.values())
    narrow = sum(parameter.numel() for parameter in state.trained.values() if parameter.dtype is torch.bfloat16)
    averaged = 0 if state.average is None else 4 * count
    return (
        stored + count * OPTIMIZERS[state.optimizer].state_bytes + narrow * ROUNDINGS[config.full.rounding].extra_bytes
        + averaged
    )  # fmt: skip


def export_bytes(state: TrainState, config: RunConfig) -> float:
    """About the size of all files that are exported."""
    itemsize = EXPORT_DTYPES[config.export.dtype].itemsize
    if config.finetune_type == "lora":
        count = sum(parameter.numel() for parameter in state.trained.values())
        return count * itemsize * 2.6  # both files; fused block-diagonally, the kohya file holds 1.6 times the numbers
    everything = list(state.bare.named_parameters())
    lora_count = sum(config.lora_rank * sum(p.shape) for _, p in everything if p.ndim == 2)
    full = sum(p.numel() for _, p in everything) if config.export.keep_full else 0
    return (2 * lora_count + full) * itemsize


def run_fingerprint(config: RunConfig, report: DatasetReport, world: int) -> dict[str, Any]:
    """What must not change between a stop and a resume: settings by dotted key, and what follows from several."""
    facts: dict[str, Any] = {
        "weights moved in the backward pass": fuses_backward(config, world),
        "digest of all pictures, captions, repeats and weights": data_digest(report)[:16],
        "learning rate": config.resolved_learning_rate,
        "pictures per step": config.optim.batch_size * config.optim.accumulate * world,
    }
    if config.schedule.name != "constant":  # then the rate of every step depends on how many there are
        facts["iterations"] = config.iterations
    for key, value in json.loads(config.model_dump_json(exclude=FREE_TO_CHANGE & set(RunConfig.model_fields))).items():
        settings = (
            {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        )
        facts |= {name: setting for name, setting in settings.items() if name not in FREE_TO_CHANGE}
    return facts


def find_checkpoint(folder: Path, fingerprint: dict[str, Any], config: RunConfig) -> checkpoint.Checkpoint | None:
    """The run folder's newest whole checkpoint, or None, which is said.

    Raises ConfigError when it belongs to another run, or when there is none and a finished LoRA would be lost.
    """
    found, passed_over = checkpoint.latest(folder / "checkpoints")
    for sentence in passed_over:
        log.warn(sentence)
    if found is None:
        if any(folder.glob("*.safetensors")):
            raise ConfigError(
                f"`output: {folder}` holds a finished LoRA and no checkpoint to go on from",
                hint="choose another `output`",
            )
        log.warn(f"no whole checkpoint in {folder}; starting from step 0")
        return None
    checkpoint.require_same(found.fingerprint, fingerprint)
    if found.step > config.iterations:
        raise ConfigError(
            f"`iterations` is {config.iterations}, but the run in {folder} is at step {found.step} already",
            hint=f"set `iterations` to {found.step} or more, or choose another `output`",
        )
    return found


def restore(state: TrainState, found: checkpoint.Checkpoint) -> None:
    """Bring `state` to where the checkpoint was made. Raises ConfigError when it is of other weights."""
    shapes = {name: tuple(parameter.shape) for name, parameter in state.trained.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in found.weights.items()}
    if shapes != saved:
        odd = min(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
        raise ConfigError(
            f"the checkpoint of step {found.step} holds other weights than this run trains; first: `{odd}` is "
            f"{saved.get(odd, 'missing')}, expected {shapes.get(odd, 'no such weight')}",
            hint="resume with the `model`, `lora` and `full` settings that it was made with",
        )
    state.settle()
    with torch.no_grad():
        for name, parameter in state.trained.items():
            parameter.copy_(found.weights[name])
    state.updates.load_state_dict(found.optimizer["updates"])
    if state.average is not None:
        state.average.weights.update(found.optimizer["average"])
    state.step = found.step
    log.say(f"resumed from step {found.step}")


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that says whether to stop: Ctrl-C or SIGTERM asks once; a second Ctrl-C ends at once, unsaved."""
    asked: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        log.say("stopping after this step; press Ctrl-C again to stop at once without saving")

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in kept:
            signal.signal(number, on_signal)
    except ValueError:  # not in the main thread: a notebook's executor, a server; there is no Ctrl-C to catch
        kept = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class Recorder:
    """metrics.jsonl, the progress bar and the trackers. Only the main process writes."""

    def __init__(self, folder: Path, state: TrainState, config: RunConfig) -> None:
        self._state, self._main = state, state.accelerator.is_main_process
        self._bar = log.Bar("train", config.iterations) if self._main else None
        self._metrics = log.MetricsFile(folder / "metrics.jsonl", state.step) if self._main else None
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
    state: TrainState, family: Family, data: TrainData, vae: torch.nn.Module | None, folder: Path, step: int
) -> None:
    if data.preview is not None and vae is not None and state.accelerator.is_main_process:
        write_previews(
            data.preview, family, state.bare, vae, folder / "previews", step
        )  # fmt: skip


def _save(state: TrainState, config: RunConfig, folder: Path, step: int, fingerprint: dict[str, Any]) -> None:
    if not state.accelerator.is_main_process:
        return
    state.settle()
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in state.trained.items()}
    optimizer = {"updates": state.updates.state_dict()}
    if state.average is not None:
        optimizer["average"] = state.average.weights
    made = checkpoint.Checkpoint(step, weights, optimizer, fingerprint)
    checkpoint.save(folder / "checkpoints", made, config.checkpoint.keep)


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
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


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
