"""The run as it will be, before anything is loaded: what `train` starts from and `check` tells. Loads without torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from flux_ft.config import CaptionerConfig, RunConfig
from flux_ft.data.captions_file import AUTO, read_captions
from flux_ft.data.index import ScanIndex, default_index_path
from flux_ft.data.ingest import Rules, Wording, ingest
from flux_ft.data.report import report_json
from flux_ft.errors import ConfigError, ModelError
from flux_ft.families.base import Variant
from flux_ft.families.registry import find_variant, parts_source
from flux_ft.families.tokens import caption_counter
from flux_ft.types import Bucket, DatasetReport, Decoding, Sample


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
            "to_be_captioned": self.to_be_captioned,
            "data": report_json(self.report),
        }

    def for_people(self) -> str:
        """For people."""
        report, config = self.report, self.config
        skipped = [one for one in report.skipped if not one.ignored]
        n, per_step, shown = len(report.samples), self.pictures_per_step, self._captions_shown()
        seen = (
            f"each is seen {self.times_seen:.1f} times"
            if self.times_seen >= 1
            else f"at most {config.iterations * per_step:,} of the {n:,} are seen"
        )
        sizes = [f"{b.width_px}×{b.height_px}: {count:,}" for b, count in self.buckets.items()]
        lines = [
            f"model     {self.variant.name}: {self.variant.summary or self.variant.source}",
            f"pictures  {n:,} used, {len(skipped):,} file{'' if len(skipped) == 1 else 's'} skipped",
            *_at_most([f"          skipped {one.file.name}: {one.reason}" for one in skipped]),
            *_at_most([f"          {note}" for note in _notes(report.samples)]),
            *(f"warning   {text}" for text in report.warnings),
            f"sizes     {', '.join(sizes[:SIZES_AT_MOST])}"
            + (f" and {len(sizes) - SIZES_AT_MOST} more" if len(sizes) > SIZES_AT_MOST else ""),
            *(f"caption   {one.file.name}: {_cut(one.caption)}" for one in shown),
            f"training  {self.trained}, {config.iterations:,} steps of "
            f"{per_step} picture{'' if per_step == 1 else 's'} ({seen}), "
            f"learning rate {config.resolved_learning_rate:g}",
            f"output    {config.output_dir}",
            "ok",
        ]  # fmt: skip
        return "\n".join(lines)

    @property
    def trained(self) -> str:
        """What is trained, in words."""
        rank = self.config.lora_rank
        if self.config.finetune_type == "lora":
            return f"LoRA rank {rank}"
        part = self.config.full.train
        which = (
            "all weights" if part == "all" else "some weights" if isinstance(part, tuple) else f"weights of the {part}"
        )
        return f"{which}, then a LoRA of rank {rank} extracted"

    def _captions_shown(self) -> list[Sample]:
        """A few pictures whose captions differ, without those that are still to be described."""
        later = captioner_follows(self.config, self.variant)
        firsts: dict[str, Sample] = {}
        for sample in self.report.samples:
            if not (later and sample.caption_source == "trigger"):
                firsts.setdefault(sample.caption, sample)
        return list(firsts.values())[:CAPTIONS_AT_MOST]

    @property
    def pictures_per_step(self) -> int:
        return self.config.optim.batch_size * self.config.optim.accumulate

    @property
    def times_seen(self) -> float:
        per_pass = sum(sample.repeats for sample in self.report.samples)
        return self.config.iterations * self.pictures_per_step / per_pass

    @property
    def buckets(self) -> dict[Bucket, int]:
        """Pictures in each bucket, the fullest first; a picture counts at every size it is trained at."""
        return dict(Counter(one.bucket for one in self.report.placed).most_common())

    @property
    def to_be_captioned(self) -> int:
        """Pictures that the captioner has still to describe."""
        return len(uncaptioned(self.config, self.variant, self.report))


LINES_AT_MOST = 10
SIZES_AT_MOST = 6
CAPTIONS_AT_MOST = 3
CAPTION_CHARS = 160


def _cut(caption: str) -> str:
    return caption if len(caption) <= CAPTION_CHARS else f"{caption[:CAPTION_CHARS]} …"


def _at_most(lines: list[str]) -> list[str]:
    more = len(lines) - LINES_AT_MOST
    told = f"          and {more:,} more; `--report DIR` shows all of them"
    return [*lines[:LINES_AT_MOST], *([told] if more > 0 else [])]


def _notes(samples: Sequence[Sample]) -> list[str]:
    """What is to be known of single pictures; past a few, of each kind the first and how many there are like it."""
    notes = [(sample.file.name, text) for sample in samples for text in sample.warnings]
    if len(notes) <= LINES_AT_MOST:
        return [f"{name}: {text}" for name, text in notes]
    kinds: dict[str, list[str]] = {}
    for name, text in notes:
        kind = "the same picture" if text.startswith("the same picture") else re.sub(r"[\d.,]+", "", text)
        kinds.setdefault(kind, []).append(f"{name}: {text}")
    return [first + (f" (and {len(others):,} more like it)" if others else "") for first, *others in kinds.values()]


def captioner_follows(config: RunConfig, variant: Variant) -> bool:
    """Whether pictures without words are to be described: captioning is on, and of use or asked for by name."""
    return config.captioning and (variant.free_captions or config.captioner.model != AUTO)


def uncaptioned(config: RunConfig, variant: Variant, report: DatasetReport) -> list[Sample]:
    """The pictures that a captioner would describe."""
    if not captioner_follows(config, variant):
        return []
    return [sample for sample in report.samples if sample.caption_source == "trigger"]


def training_areas(config: RunConfig, variant: Variant) -> tuple[int, ...]:
    """Largest picture areas in pixels, one for each size that pictures are trained at, largest first.

    `priority: quality` trains every size that the model was made for, `high_res_only` the largest alone, `speed` the
    smaller ones; `data.resolutions` and `data.max_pixels` have the last word.
    """
    sides = variant.training_sides_px
    by_priority = {"quality": sides, "high_res_only": sides[:1], "speed": sides[1:] or sides}
    wanted = config.data.resolutions or by_priority[config.priority]
    cap = min(config.data.max_pixels or variant.max_pixels, variant.max_pixels)
    return tuple(sorted({min(side * side, cap) for side in wanted}, reverse=True))


def ingest_rules(config: RunConfig, variant: Variant) -> Rules:
    """How this run turns files into pixels."""
    red, green, blue = bytes.fromhex(config.data.background.removeprefix("#"))
    decoding = Decoding(background=(red, green, blue), alpha_is_mask=config.data.alpha == "mask")
    return Rules(training_areas(config, variant), variant.pixel_multiple, decoding)


def check_run(config: RunConfig) -> Checked:
    """All of a run that can be checked without loading a model. Raises InputError; reads pictures, writes nothing."""
    variant, _ = find_variant(config.model, config.model_parts)
    if variant.distilled and not config.allow_distilled:
        raise ModelError(
            f"`model: {config.model}` is step-distilled: training it undoes the distillation",
            hint="train on flux1-dev and use the LoRA on both, or set `allow_distilled: true`",
        )
    if variant.image_input != "none":
        raise ModelError(
            f"`model: {config.model}` takes pictures besides text, and such models are not trained yet",
            hint="train on flux1-dev: its LoRAs act on Fill, Canny and Depth models too",
        )
    if config.optim.name.endswith("8bit") and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"`optim.name: {config.optim.name}` needs bitsandbytes, which is not installed",
            hint="pip install bitsandbytes, or use `adafactor`, whose state is smaller still",
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
    for side in config.data.resolutions or ():
        if side < variant.pixel_multiple:
            raise ConfigError(
                f"`data.resolutions` names {side} px; {variant.name} draws nothing below {variant.pixel_multiple} px",
                hint="sides of a square in pixels, as in `resolutions: [1024, 512]`",
            )
    wording = Wording(
        config.trigger_word,
        config.mode,
        read_captions(config.output_dir, config.captioner.model, config.mode) if config.captioning else {},
        caption_counter(variant, parts_source(config.model, config.model_parts)),
        captioner_follows=captioner_follows(config, variant),
    )
    with ScanIndex(default_index_path()) as index:
        report = ingest(config.data, ingest_rules(config, variant), wording, index)
    return Checked(config, variant, replace(report, warnings=(*report.warnings, *_without_effect(config, variant))))


def _without_effect(config: RunConfig, variant: Variant) -> list[str]:
    """Settings that change nothing because of what the model is."""
    found = []
    if config.data.max_pixels is not None and config.data.max_pixels > variant.max_pixels:
        found.append(f"`data.max_pixels` has no effect above {variant.name}'s {variant.max_pixels:,}")
    larger = [side for side in config.data.resolutions or () if side * side > variant.max_pixels]
    if larger:
        found.append(f"`data.resolutions`: {max(larger)} is cut to {variant.name}'s {variant.max_pixels:,} pixels")
    if config.priority != "quality" and len(variant.training_sides_px) == 1:
        found.append(f"`priority` has no effect: {variant.name} has one training size")
    if config.captioning and not captioner_follows(config, variant) and config.captioner != CaptionerConfig():
        found.append(
            f"`captioner` has no effect: {variant.name} knows the words of its own world alone; name a "
            "`captioner.model` to have one all the same"
        )
    if config.preview.guidance is not None and not variant.guidance_embedded:
        found.append(f"`preview.guidance` has no effect: {variant.name} has no guidance embedding")
    return found
