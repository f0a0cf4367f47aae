"""What `flux-ft extract`, `resize` and `merge` do: files in, files out, nothing overwritten, every result read back."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import save

from flux_ft import __version__, log
from flux_ft.adapters.checkpoint_files import Checkpoint, open_checkpoint, require_pair
from flux_ft.adapters.extract import LARGEST_RANK, ExtractionReport, Options, Work, extract, leftover_tensors, resize
from flux_ft.adapters.formats import (
    BLOCK_FORMATS,
    EXPORT_DTYPES,
    compare_adapters,
    read_adapter,
    verify_written,
    write_adapter,
)
from flux_ft.adapters.merge import MergeReport, merge
from flux_ft.adapters.metadata import EXPORT_KEY, Clock, ExportInfo, build_metadata, utc_now
from flux_ft.adapters.write_files import SHARD_BYTES, require_free, require_new
from flux_ft.errors import AdapterError, ConfigError, InputError, ModelError, StoppedByUser, first_line
from flux_ft.families.base import Variant
from flux_ft.families.registry import FLUX1_DEV, FLUX1_SCHNELL, FLUX_TINY, VARIANTS, find_variant
from flux_ft.files import require_writable, write_whole
from flux_ft.types import AdapterState, AppliedAdapter

_FLUX1_WIDTH = 3072
_PER_MODULE, _PER_FILE = 450, 8_000
"""Bytes of a kohya file's header, at most."""
_OF_TRAINING = (
    "modelspec.usage_hint", "ss_steps", "ss_max_train_steps", "ss_epoch", "ss_learning_rate", "ss_unet_lr",
    "ss_optimizer", "ss_num_train_images", "ss_training_started_at", "ss_training_finished_at", "ss_resolution",
    "ss_tag_frequency",
)  # fmt: skip


@dataclass(frozen=True)
class Extracted:
    """What an extraction left behind."""

    output: Path
    report_file: Path
    leftovers_file: Path | None
    report: ExtractionReport
    size_bytes: int
    worst_error: float
    """Largest relative error of a written ΔW against the one in memory."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "output": str(self.output),
            "report": str(self.report_file),
            "leftovers": None if self.leftovers_file is None else str(self.leftovers_file),
            "size_bytes": self.size_bytes,
            "worst_delta_weight_error": self.worst_error,
            **self.report.as_json(),
        }

    def for_people(self) -> str:
        """For people."""
        return f"wrote {self.output} ({self.size_bytes / 1e6:.1f} MB)\n{self.report.for_people()}"


def open_model(model: str) -> tuple[Checkpoint, Variant]:
    """The transformer of a variant's name, a folder, a file or a Hub id, and its variant.

    What is on the Hub is fetched into its cache. Raises ModelError.
    """
    path = Path(model).expanduser()
    if model not in VARIANTS and path.exists():
        checkpoint = open_checkpoint(path)
        return checkpoint, _variant_of(checkpoint)
    variant, source = find_variant(model)
    checkpoint = open_checkpoint(Path(source) if Path(source).exists() else _fetched(source))
    # A Hub snapshot's folder is named by its commit, which tells people nothing.
    return dataclasses.replace(checkpoint, label=variant.name.rpartition("/")[2]), variant


def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["transformer/*.json", "transformer/*.safetensors"]))
    except Exception as error:  # the Hub's client lets through its transport's own, whose classes change
        raise ModelError(
            f"{source}: could not be fetched from the Hub: {first_line(error)}",
            hint=f"accept the licence at https://huggingface.co/{source}, run `hf auth login`, and try again; "
            "or download it and give the path",
        ) from error


def _variant_of(checkpoint: Checkpoint) -> Variant:
    known = (FLUX1_DEV if checkpoint.guided else FLUX1_SCHNELL) if checkpoint.width == _FLUX1_WIDTH else FLUX_TINY
    return dataclasses.replace(known, license="see the model's own")


def extract_files(
    base: str,
    tuned: str,
    rank: int | Literal["auto"] | None,
    output: Path,
    *,
    format: str = "kohya",
    dtype: str = "bf16",
    energy: float | None = None,
    budget_mb: float | None = None,
    exact: bool = False,
    device: str | None = None,
    leftovers: bool = False,
    seed: int = 0,
    now: Clock = utc_now,
) -> Extracted:
    """Write the LoRA of `tuned` − `base` to `output`, the report beside it, and what no LoRA holds if asked for.

    `base` and `tuned`: a variant's name, a folder, a .safetensors file or a Hub id. Exactly one of `rank`, `energy` (0
    to 1) and `budget_mb` (10⁶ bytes, of a kohya file) is given. Killed, it goes on when it is called again as before;
    what is finished lies in a hidden folder beside `output` meanwhile. Raises InputError, StorageError.
    """
    started = now()
    _require_output(output, format, dtype)
    if budget_mb is not None and format != "kohya":
        raise ConfigError(
            "a budget is spent unevenly, and a diffusers file is padded to its largest rank", hint="use kohya"
        )
    (first, variant), (second, _) = open_model(base), open_model(tuned)
    require_pair(first, second)
    budget = None if budget_mb is None else int(budget_mb * 1e6) - len(first.matrices) * _PER_MODULE - _PER_FILE
    if budget is not None and budget <= 0:
        raise ConfigError(f"a budget of {budget_mb} MB does not hold the file's header", hint="16-bit rank 16: 153 MB")
    options = Options(rank=rank, budget_bytes=budget, energy=energy, dtype=EXPORT_DTYPES[dtype], exact=exact, seed=seed)
    place = _device(device)
    fingerprint = _fingerprint(first, second, options, place)
    folder = output.with_name(f".{output.name}.work")
    report_file = output.with_name(f"{output.stem}.extraction.json")
    leftovers_file = output.with_name(f"{output.stem}.leftovers.safetensors") if leftovers else None
    if not Work.matches(folder, fingerprint):  # else these are our own, of a start that was killed at its end
        require_new(output, report_file, *([leftovers_file] if leftovers_file else []))
    require_writable(output.parent, "output")
    size = _largest_size(first, options)
    require_free(output.parent, 2 * size + (_leftover_size(first, options) if leftovers else 0))
    work = Work(folder, fingerprint)
    try:
        state, report = extract(first, second, options, device=place, work=work)
    except KeyboardInterrupt:
        raise StoppedByUser(
            f"stopped; finished matrices are kept in {folder}", hint="go on by the same command; or remove that folder"
        ) from None
    except InputError:  # it would be the same the next time
        work.remove()
        raise
    metadata = _metadata(output.stem, variant, report, state, format, (started, now()))
    write_adapter(output, state, format, options.dtype, metadata)
    worst = verify_written(output, state, options.dtype)
    if leftovers_file:
        tensors = leftover_tensors(first, second, options.dtype)
        write_whole(leftovers_file, save(tensors, {"format": "pt"}), mode=0o644)
    write_whole(report_file, json.dumps(report.as_json(), indent=2).encode())
    work.remove()
    return Extracted(output, report_file, leftovers_file, report, output.stat().st_size, worst)


def _device(name: str | None) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cpu" and not (
        device.type == "cuda" and has_gpu and (device.index or 0) < torch.cuda.device_count()
    ):
        raise ConfigError(f"device `{name}` is not on this machine", hint="cpu, cuda, or cuda:0, cuda:1 …")
    return device


def _require_output(output: Path, format: str, dtype: str) -> None:
    if output.suffix != ".safetensors":
        raise ConfigError(f"`{output}` does not end in .safetensors", hint="LoRA files are written as .safetensors")
    if format not in BLOCK_FORMATS or dtype not in EXPORT_DTYPES:
        raise ConfigError(
            f"cannot write format `{format}` as `{dtype}`",
            hint=f"formats: {', '.join(BLOCK_FORMATS)}; dtypes: {', '.join(EXPORT_DTYPES)}",
        )


def _fingerprint(base: Checkpoint, tuned: Checkpoint, options: Options, device: torch.device) -> str:
    """What finished pieces depend on. Files are told by name, size and time of change."""
    files = [
        [str(file.resolve()), (about := file.stat()).st_size, about.st_mtime_ns]
        for one in (base, tuned)
        for file in one.files
    ]
    facts = {"files": files, "options": options.as_json(), "device": device.type, "version": __version__}
    return json.dumps(facts, sort_keys=True)


def _largest_size(base: Checkpoint, options: Options) -> int:
    """Bytes of the factors, or the most that they can take."""
    if options.budget_bytes is not None:
        return options.budget_bytes
    rank = options.rank if isinstance(options.rank, int) else LARGEST_RANK
    shapes = [base.weights[f"{name}.weight"].shape for name in base.matrices]
    return sum(min(rank, *shape) * sum(shape) for shape in shapes) * options.dtype.itemsize


def _leftover_size(base: Checkpoint, options: Options) -> int:
    matrices = {f"{name}.weight" for name in base.matrices}
    return sum(
        torch.Size(one.shape).numel() * options.dtype.itemsize
        for name, one in base.weights.items()
        if name not in matrices
    )


def _metadata(
    title: str,
    variant: Variant,
    report: ExtractionReport,
    state: AdapterState,
    format: str,
    times: tuple[datetime.datetime, datetime.datetime],
) -> dict[str, str]:
    """The header entries that are true of an extracted LoRA: those of a training run are left out."""
    options = report.options.as_json()
    info = ExportInfo(
        title=title,
        architecture=variant.architecture,
        license=variant.license,
        trigger_word="",
        rank=max(one.rank for one in report.layers),
        steps=0,
        seed=report.options.seed,
        learning_rate=0.0,
        optimizer="",
        num_images=0,
        resolution=f"{variant.sample_size_px}x{variant.sample_size_px}",
        started=times[0].isoformat(timespec="seconds"),
        finished=times[1].isoformat(timespec="seconds"),
        config_yaml=yaml.safe_dump({"extraction": options}),
        base_model=report.base,
        tool_version=__version__,
    )
    entries = build_metadata(info, flavour=format, modules=state.layers)
    kept = {key: value for key, value in entries.items() if key not in _OF_TRAINING}
    return kept | {
        "modelspec.description": f"LoRA extracted from {report.tuned} against {report.base}; "
        f"{100 * report.energy_kept:.1f} % of the squared change is kept."
    }


@dataclass(frozen=True)
class Resized:
    """What a resize left behind."""

    output: Path
    ranks: tuple[int, int]
    """Largest rank of a module before and after."""
    worst_loss: float
    """Largest ‖ΔW − ΔW'‖ / ‖ΔW‖ of a diffusers module; modules that were dropped count as 1."""
    size_bytes: int

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "output": str(self.output),
            "rank_before": self.ranks[0],
            "rank_after": self.ranks[1],
            "worst_loss": self.worst_loss,
            "size_bytes": self.size_bytes,
        }


def resize_file(
    lora: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    format: str = "kohya",
    dtype: str = "bf16",
) -> Resized:
    """Write a LoRA with fewer directions, which keeps its header entries; `rank` and `energy` as in `resize`.

    Raises AdapterError, ConfigError, StorageError.
    """
    _require_output(output, format, dtype)
    require_new(output)
    state = read_adapter(lora)
    smaller = resize(state, rank=rank, energy=energy, fused=format == "kohya")
    before = max(layer.rank for layer in state.layers.values())
    after = max(layer.rank for layer in smaller.layers.values())
    write_adapter(output, smaller, format, EXPORT_DTYPES[dtype], _resized_metadata(state.metadata, after, format))
    verify_written(output, smaller, EXPORT_DTYPES[dtype])
    losses = compare_adapters(state, smaller)
    return Resized(output, (before, after), max(losses.values()), output.stat().st_size)


def _resized_metadata(metadata: Mapping[str, str], rank: int, format: str) -> dict[str, str]:
    entries = dict(metadata)
    try:
        ours = json.loads(entries[EXPORT_KEY]) | {"rank": rank, "flavour": format}
        entries[EXPORT_KEY] = json.dumps(ours, ensure_ascii=False)
    except (KeyError, ValueError, TypeError):
        entries.pop(EXPORT_KEY, None)
    description = entries.get("modelspec.description")
    return entries | ({"modelspec.description": f"{description} Resized to rank {rank}."} if description else {})


def merge_file(
    base: str,
    loras: Sequence[AppliedAdapter],
    output: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> MergeReport:
    """Write `base` with the LoRAs merged in; see `merge`. A folder gives a folder, a file a file.

    Raises AdapterError, ModelError, StorageError, ConfigError.
    """
    if not loras:
        raise AdapterError("no LoRA to merge", hint="give at least one")
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise ConfigError(f"cannot write as `{dtype}`", hint=f"dtypes: {', '.join(EXPORT_DTYPES)}")
    checkpoint, _ = open_model(base)
    if checkpoint.config is None and output.suffix != ".safetensors":
        raise ConfigError(f"`{output}` does not end in .safetensors", hint=f"{base} is a file, and gives a file")
    if checkpoint.config is not None and output.suffix == ".safetensors":
        raise ConfigError(f"`{output}` ends in .safetensors", hint=f"{base} is a folder, and gives a folder")
    adapters = [(one.path.name, read_adapter(one.path), one.strength) for one in loras]
    for note in checkpoint.notes:
        log.say(f"{checkpoint.label}: {note}")
    return merge(
        checkpoint, adapters, output, dtype=None if dtype is None else EXPORT_DTYPES[dtype], shard_bytes=shard_bytes
    )
