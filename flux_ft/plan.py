"""The run as it will be, before anything is loaded: what `train` starts from and `check` tells. Loads without torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from flux_ft.config import RunConfig
from flux_ft.data.ingest import ingest
from flux_ft.data.report import report_json
from flux_ft.errors import ConfigError, ModelError
from flux_ft.families.base import Variant
from flux_ft.families.registry import find_variant
from flux_ft.types import DatasetReport


@dataclass(frozen=True)
class Checked:
    """A run that would start, and its data report."""

    config: RunConfig
    variant: Variant
    report: DatasetReport

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "ok": True,
            "model": self.variant.name,
            "output": str(self.config.output_dir),
            "pictures_per_step": self.pictures_per_step,
            "times_each_picture_is_seen": round(self.times_seen, 2),
            "buckets": {f"{b.width_px}x{b.height_px}": count for b, count in self.buckets.items()},
            "data": report_json(self.report),
        }

    def for_people(self) -> str:
        """For people."""
        report, config = self.report, self.config
        lines = [
            f"model     {self.variant.name}: {self.variant.summary or self.variant.source}",
            f"pictures  {len(report.placed)} used, {len(report.skipped)} skipped",
            *(f"          skipped {one.path}: {one.reason}" for one in report.skipped[:10]),
            *([f"          and {len(report.skipped) - 10} more"] if len(report.skipped) > 10 else []),
            *(f"warning   {text}" for text in report.warnings),
            "buckets   " + ", ".join(f"{b.width_px}×{b.height_px}: {n}" for b, n in self.buckets.items()),
            *(f"caption   {one.sample.path.name}: {one.sample.caption}" for one in report.placed[:3]),
            f"training  LoRA rank {config.lora_rank}, {config.iterations} steps of {self.pictures_per_step} pictures "
            f"(each is seen {self.times_seen:.1f} times), learning rate {config.resolved_learning_rate:g}",
            f"output    {config.output_dir}",
            "ok",
        ]
        return "\n".join(lines)

    @property
    def pictures_per_step(self) -> int:
        return self.config.optim.batch_size * self.config.optim.accumulate

    @property
    def times_seen(self) -> float:
        return self.config.iterations * self.pictures_per_step / len(self.report.placed)

    @property
    def buckets(self) -> dict[Any, int]:
        """Pictures in each bucket, the fullest first."""
        return dict(Counter(one.bucket for one in self.report.placed).most_common())


def check_run(config: RunConfig) -> Checked:
    """All of a run that can be checked without loading a model. Raises InputError; reads pictures, writes nothing."""
    variant, _ = find_variant(config.model, config.model_parts)
    if config.finetune_type == "full":
        raise ConfigError(
            "`finetune_type: full` is not built yet; this version trains LoRAs",
            hint="set `finetune_type: lora`",
        )
    if variant.distilled and not config.allow_distilled:
        raise ModelError(
            f"`model: {config.model}` is step-distilled: training it undoes the distillation",
            hint="train on flux1-dev and use the LoRA on both, or set `allow_distilled: true`",
        )
    for tracker in config.logging.trackers:
        if find_spec(tracker) is None:
            raise ConfigError(
                f"`logging.trackers` names {tracker}, which is not installed",
                hint=f"pip install 'flux_ft[{tracker}]', or leave it out",
            )
    for name in ("width", "height"):
        side = getattr(config.preview, name)
        if side is not None and side % variant.pixel_multiple:
            raise ConfigError(
                f"`preview.{name}` is {side} px; {variant.name} draws multiples of {variant.pixel_multiple} px",
                hint=f"use {max(1, round(side / variant.pixel_multiple)) * variant.pixel_multiple}",
            )
    cap = min(config.data.max_pixels or variant.max_pixels, variant.max_pixels)
    report = ingest(config.data.path, config.trigger_word, config.mode, cap, variant.pixel_multiple)
    return Checked(config, variant, replace(report, warnings=(*report.warnings, *_without_effect(config, variant))))


def _without_effect(config: RunConfig, variant: Variant) -> list[str]:
    """Settings that change nothing because of what the model is."""
    found = []
    if config.data.max_pixels is not None and config.data.max_pixels > variant.max_pixels:
        found.append(f"`data.max_pixels` has no effect above {variant.name}'s {variant.max_pixels:,}")
    if config.preview.guidance is not None and not variant.guidance_embedded:
        found.append(f"`preview.guidance` has no effect: {variant.name} has no guidance embedding")
    return found
