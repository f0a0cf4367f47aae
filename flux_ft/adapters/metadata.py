"""The header of a LoRA file: what it says about itself, to whom. Loads without torch.

Three vocabularies, since readers know different ones: ModelSpec 1.0.1 (`modelspec.*`), kohya's (`ss_*`, `sshs_*`), and
one key of our own, `flux_ft.export`. All values are strings. No paths, captions, prompts or user names go in: people
share these files. Who reads what: docs/lora_files.md.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml

from flux_ft.errors import AdapterError, ConfigError

EXPORT_KEY = "flux_ft.export"
EXPORT_VERSION = 1
SCALE_RULE = "folded into up; alpha equals rank"

_BFL_FLUX1 = "https://github.com/black-forest-labs/flux"
_BFL_FLUX2 = "https://github.com/black-forest-labs/flux2"
ARCHITECTURES: dict[str, tuple[str, str]] = {
    # modelspec.architecture → (ss_base_model_version, modelspec.implementation). The spellings are those that model
    # managers compare with; a toy gets names of its own, so that no manager offers it for the 12B model.
    "flux-1-dev/lora": ("flux1", _BFL_FLUX1),
    "flux-1-schnell/lora": ("flux1", _BFL_FLUX1),
    "flux-1/lora": ("flux1", _BFL_FLUX1),
    "flux.2-dev/lora": ("flux2", _BFL_FLUX2),
    "flux.2-klein-4b/lora": ("flux2_klein_4b", _BFL_FLUX2),
    "flux.2-klein-9b/lora": ("flux2_klein_9b", _BFL_FLUX2),
    "flux-tiny/lora": ("flux_tiny", "flux_ft"),
}

_PRIVATE_KEYS = frozenset(
    ("data", "output", "author", "user", "prompt", "prompts", "negative_prompt", "caption", "captions", "token")
)


Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """What a file's dates are of."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class ExportInfo:
    """What one run knows about the file it exports."""

    title: str
    """The human name of the LoRA."""
    architecture: str
    """A key of ARCHITECTURES."""
    license: str
    """The licence of the base model, which binds the LoRA."""
    trigger_word: str
    """Empty when the run had none."""
    rank: int
    """The rank that was trained; write_adapter puts the rank on disk beside it."""
    steps: int
    seed: int
    learning_rate: float
    optimizer: str
    num_images: int
    resolution: str
    """"WxH" in pixels; two whole numbers, because readers parse it so."""
    started: str
    """ISO 8601, with the offset from UTC."""
    finished: str
    """ISO 8601, with the offset from UTC."""
    config_yaml: str
    """The resolved run file."""
    base_model: str
    """A variant's name, a Hub id or a path; only the last part of it is written."""
    tool_version: str
    batch_size: int = 1
    """Pictures per optimizer step."""
    thumbnail: str = ""
    """A small picture as a data URL; empty without one."""


def build_metadata(info: ExportInfo, *, flavour: str, modules: Iterable[str]) -> dict[str, str]:
    """The header entries of one file, less the hashes, which `finished_header` adds.

    `modules` are the diffusers paths that were trained. AdapterError: unknown architecture, or a resolution that is not
    "WxH". ConfigError: the config is not YAML.
    """
    if info.architecture not in ARCHITECTURES:
        raise AdapterError(f"unknown architecture `{info.architecture}`", hint=f"known: {', '.join(ARCHITECTURES)}")
    if not re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", info.resolution):
        raise AdapterError(f"resolution `{info.resolution}` is not like 1024x1024", hint="width x height in pixels")
    return _modelspec(info) | _kohya(info) | {EXPORT_KEY: _export_json(info, flavour, modules)}


def _modelspec(info: ExportInfo) -> dict[str, str]:
    """ModelSpec 1.0.1; "must" and "should" keys, and those of "can" that a reader shows."""
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": info.architecture,
        "implementation": ARCHITECTURES[info.architecture][1],
        "title": info.title,
        "resolution": info.resolution,
        "date": info.finished,
        "license": info.license,
        "description": f"Rank {info.rank} LoRA for {_base_name(info)}; {info.num_images} pictures, {info.steps} steps.",
        "tags": "lora, flux_ft",
    }
    if info.trigger_word:
        entries["trigger_phrase"] = info.trigger_word
        entries["usage_hint"] = f"Put {info.trigger_word} into the prompt; strength 1 is as trained."
    if info.thumbnail:
        entries["thumbnail"] = info.thumbnail
    return {f"modelspec.{key}": value for key, value in entries.items()}


def _kohya(info: ExportInfo) -> dict[str, str]:
    """The `ss_*` entries in kohya's spelling: str() of Python values, nested values as JSON, times as Unix seconds."""
    width, height = info.resolution.split("x")
    # Managers take the trained words from the first folder, whose name is repeats_word; any further entry would be
    # shown as one more trigger word.
    tags = {f"1_{info.trigger_word}": {info.trigger_word: 1}} if info.trigger_word else {}
    entries: dict[str, Any] = {
        "output_name": info.title,
        "base_model_version": ARCHITECTURES[info.architecture][0],
        "sd_model_name": _base_name(info),
        "v2": False,
        "network_module": "networks.lora_flux",
        "network_dim": info.rank,
        "network_alpha": info.rank,
        "network_args": json.dumps({}),
        "steps": info.steps,
        "max_train_steps": info.steps,
        "epoch": -(-info.steps * info.batch_size // max(1, info.num_images)),
        "resolution": f"({width}, {height})",
        "seed": info.seed,
        "learning_rate": info.learning_rate,
        "unet_lr": info.learning_rate,
        "optimizer": info.optimizer,
        "num_train_images": info.num_images,
        "training_started_at": datetime.fromisoformat(info.started).timestamp(),
        "training_finished_at": datetime.fromisoformat(info.finished).timestamp(),
        "tag_frequency": json.dumps(tags, ensure_ascii=False),
    }
    return {f"ss_{key}": str(value) for key, value in entries.items()}


def _export_json(info: ExportInfo, flavour: str, modules: Iterable[str]) -> str:
    """Our own entry: enough to know what the file is, and to run it again with other pictures."""
    try:
        config = yaml.safe_load(info.config_yaml)
    except yaml.YAMLError as error:
        raise ConfigError(f"the resolved config is not YAML: {error}", hint="please report this") from error
    export = {
        "format_version": EXPORT_VERSION,
        "flavour": flavour,
        "scale": SCALE_RULE,
        "rank": info.rank,
        "targets": dict(sorted(Counter(re.sub(r"\.[0-9]+\.", ".*.", path, count=1) for path in modules).items())),
        "tool_version": info.tool_version,
        "config": public_config(config),
    }
    return json.dumps(export, ensure_ascii=False)


def public_config(value: Any) -> Any:
    """A config without what is private: entries that hold pictures, places or wording, and any string with a slash.

    A Hub id goes with the paths, since `owner/name` may as well be a folder; the base model has its own entry.
    """
    if isinstance(value, dict):
        kept = {str(key): item for key, item in value.items() if key not in _PRIVATE_KEYS and not _is_path(item)}
        return {key: public_config(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [public_config(item) for item in value if not _is_path(item)]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value or value.startswith("~"))


def _base_name(info: ExportInfo) -> str:
    return re.split(r"[\\/]", info.base_model.rstrip("\\/"))[-1]


def finished_header(
    table: Mapping[str, Mapping[str, object]], metadata: Mapping[str, str], rank: int, digest: str
) -> bytes:
    """The beginning of a safetensors file, up to its data: length, JSON, padding.

    `table` is where each tensor lies, in the data's order, `digest` the SHA-256 of all the data, which goes into the
    header, `rank` the largest rank on disk, which `ss_network_dim` and `ss_network_alpha` are set to where given. The
    hash is taken over the bytes as they lie, because writers order tensors by alignment first and by name second.
    Sources: the safetensors format, ModelSpec 1.0.1 (`0x` + hash), kohya's `sshs_model_hash` (bare). AdapterError when
    a value is not a string.
    """
    wrong = [key for key, value in metadata.items() if not isinstance(value, str)]
    if wrong:
        raise AdapterError(f"metadata entry `{wrong[0]}` is not a string", hint="safetensors headers hold strings")
    entries = {"format": "pt", **metadata, "modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    entries |= {key: str(rank) for key in ("ss_network_dim", "ss_network_alpha") if key in metadata}
    # The strength is in the tensors now; diffusers would apply a header that came along from another file once more.
    entries.pop("lora_adapter_metadata", None)
    entries.pop("sshs_legacy_hash", None)  # of the former header and data
    header = json.dumps({"__metadata__": dict(sorted(entries.items())), **table}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format wants the data to begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header
