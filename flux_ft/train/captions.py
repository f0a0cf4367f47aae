"""Captions for pictures that came without: the captioner's part of a run, and the verb `caption`."""

from __future__ import annotations

from dataclasses import dataclass

from flux_ft import log
from flux_ft.config import RunConfig
from flux_ft.data.captioner import CaptionerUnavailable, describe
from flux_ft.errors import ConfigError
from flux_ft.infer.runner import release_memory
from flux_ft.plan import Checked, captioner_follows, check_run, uncaptioned


@dataclass(frozen=True)
class Captioned:
    """What `caption` did."""

    checked: Checked
    """The run as it is with the new captions."""
    written: int


def caption_run(config: RunConfig, device: str | None = None) -> Captioned:
    """Describe every picture of the run that has no words yet, into the run folder's captions.jsonl.

    Raises InputError; DataError too when no captioner can be had.
    """
    checked = check_run(config)
    if not config.captioning:
        raise ConfigError("`captioning` is false, so there is nothing to caption", hint="set `captioning: true`")
    if not captioner_follows(config, checked.variant):
        raise ConfigError(
            f"{checked.variant.name} knows the words of its own world alone, so a captioner is of no use to it",
            hint="write a .txt beside each picture; or name a `captioner.model` to have one all the same",
        )
    todo = uncaptioned(config, checked.variant, checked.report)
    if not todo:
        return Captioned(checked, 0)
    written = describe(todo, config.captioner, config.mode, config.output_dir, device, checked.report.decoding)
    release_memory()
    return Captioned(check_run(config), written)


def with_captions(config: RunConfig, checked: Checked, *, describes: bool = True) -> Checked:
    """The same run with what the captioner says, before training; as it is, with a warning, where none can be had.

    Of several processes one `describes`, first; the others take what it wrote, so that all train on the same words.

    Raises DataError when a captioner that the run file names can't be used.
    """
    todo = uncaptioned(config, checked.variant, checked.report)
    if not todo:
        return checked
    if not describes:
        return check_run(config)
    try:
        describe(todo, config.captioner, config.mode, config.output_dir, decoding=checked.report.decoding)
    except CaptionerUnavailable as unavailable:
        log.warn(unavailable.message + (f" ({unavailable.hint})" if unavailable.hint else ""))
        return checked
    release_memory()
    return check_run(config)
