"""What must be the same for a resumed run to end with the bits of one that was never stopped, and what is done if not.

Settings and data decide what is learned; circumstances (machine, software, processes) only about the last bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flux_ft import log
from flux_ft.config import DataConfig, RunConfig
from flux_ft.errors import ConfigError
from flux_ft.train import attention, compiled
from flux_ft.train.checkpoint import About
from flux_ft.train.setup import data_digest, fuses_backward
from flux_ft.types import DatasetReport

DATA_IN_LOOP = {"unmasked_weight", "caption_dropout", "tag_orders", "resample_latents"}
"""What of `data` acts in each step; all else acts on the pictures, whose digest tells it."""
FREE_TO_CHANGE = {
    *("output", "finetune_comment", "preview", "validation.every", "checkpoint", "export", "logging", "captioning"),
    *("webhook_url", "webhook_secret", "captioner", "priority", "determinism"),
    *(f"memory.{name}" for name in ("recompute", "fused_backward", "stream_blocks")),
    *(f"speed.{name}" for name in ("fused_lora", "fused_attention", "attention", "compile")),
    *(f"data.{name}" for name in DataConfig.model_fields if name not in DATA_IN_LOOP),
    *("iterations", "learning_rate", "optim.batch_size", "optim.accumulate", "optim.name"),
}
"""Settings that may change between a stop and a resume. What matters of the last row is told by `run_fingerprint` and
`layout`, and `restore` compares what `optim.name: auto` stands for; the pictures may move, since their digest tells
them."""
NEEDED = {
    *("finetune_type", "lora_rank", "lora.targets", "full.train", "full.rounding", "optim.ema_decay"),
}
"""Without these a checkpoint's numbers fit nothing."""
BASE, ENCODED = "base model", "encoded pictures and captions"
LATE = {BASE, ENCODED}
"""Facts that are known once models and data are loaded."""
CHOSEN = {attention.FACT, compiled.FACT, compiled.UPDATE_FACT}
"""Circumstances that are known then."""


def run_fingerprint(config: RunConfig, report: DatasetReport, world: int) -> dict[str, Any]:
    """Settings by dotted key, and what follows from several; `world` is the number of processes."""
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


def layout(config: RunConfig) -> dict[str, Any]:
    """How a step's pictures are divided, which moves sums by a rounding error."""
    return {"pictures per forward pass": config.optim.batch_size, "forward passes per step": config.optim.accumulate}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """A sentence for each key whose value is another one now; a key that is missing counts as None."""
    return {
        key: f"`{key}` was {saved.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    }


def accept_drift(
    saved: About | None,
    now: About,
    *,
    strict: bool,
    allow: bool,
    late: Mapping[str, Any] | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> About:
    """What a run's next checkpoints tell, from what the one that it goes on from told, if there is one.

    Changed settings and data are refused, and in strict mode changed circumstances too, unless `allow`; else they are
    warned of. `late` are facts, and `chosen` circumstances, that are known once models and data are loaded, in a second
    call with what the first gave. Raises ConfigError that names every change.
    """
    full = replace(
        now,
        fingerprint={**now.fingerprint, **(late or {})},
        circumstances={**now.circumstances, **(chosen or {})},
    )
    if saved is None:
        return full
    if late is None:
        settings = differences(_without(saved.fingerprint, LATE), now.fingerprint)
        around = differences(_without(saved.circumstances, CHOSEN), now.circumstances)
    else:
        settings = differences({key: saved.fingerprint.get(key) for key in late}, late)
        around = differences({key: saved.circumstances.get(key) for key in CHOSEN}, chosen or {})
    unfit = {key: settings[key] for key in settings.keys() & NEEDED}
    refused = unfit | ({} if allow else settings | (around if strict else {}))
    if refused:
        put_back = "put it back as it was, or start a new run with another `output`"
        raise ConfigError(
            "the run cannot go on from its checkpoint, because something changed: "
            + "; ".join(refused[key] for key in sorted(refused)),
            hint=put_back
            if unfit
            else f"{put_back}; --allow-drift goes on all the same, and the result is not that of an unbroken run",
        )
    changed = [*settings.values(), *around.values()]
    if changed:
        log.warn(f"changed since step {saved.step}: {'; '.join(changed)}; the result is not that of an unbroken run")
    earlier = saved.drift if late is None else now.drift
    return replace(full, step=saved.step, drift=[*earlier, *(f"after step {saved.step}: {one}" for one in changed)])


def _without(facts: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in keys}
