"""How a run is fitted to a device: what is recomputed, how many blocks wait in host memory, how previews are decoded.

    Estimator + RunConfig + Room ─choose→ Choice, whose run file has values in place of `auto`

The ladder, fastest first; the first rung whose estimate is within what is free is taken:

    recompute none → selective → full → full, with as few streamed blocks as will do

They differ in rounding at the most: see `circumstances`. What changes a result by more, such as a smaller base or
smaller pictures, is told of, not chosen.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, get_args

from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import ValidationError

from flux_ft import log
from flux_ft.config import RunConfig
from flux_ft.errors import FluxFTError
from flux_ft.families.base import Family
from flux_ft.infer import fit
from flux_ft.train.estimate import Estimate, Estimator, gb
from flux_ft.train.held import base_storage
from flux_ft.train.recompute import Policy
from flux_ft.train.setup import streamed_blocks
from flux_ft.train.sharded import shards_wanted

POLICIES: tuple[Policy, ...] = get_args(Policy)
"""Of recompute, from the fastest to the one that keeps least."""
CLEARLY = 1.1
"""How far above what is free an estimate may be for the run to be tried all the same."""
WORTH_SAYING = 0.03
"""Share of a step's memory that a change must save to be told of."""
CAREFUL = 0.95
"""Of what is free, what an estimate may take for the rung to be chosen: no estimate is exact."""
STORED = {"int8": "0.4 %", "fp8": "1.6 %", "nf4": "6.1 %"}
"""How far the velocity of a base that is held so is off: of flux-tiny, by `families/quantize.py`."""


class Room(NamedTuple):
    """What there is to fit into, in bytes."""

    device: float
    host: float = math.inf
    streams: bool = True
    """Whether blocks can wait elsewhere: in one process, beside a device with memory of its own."""

    def holds(self, one: Estimate, share: float = 1) -> bool:
        """Whether what needs so much fits into this share of the device by the estimate."""
        return one.needs <= share * self.device and (not one.streamed or one.host_needs <= self.host)


class Fitted(NamedTuple):
    """What a run goes by."""

    config: RunConfig
    previews_in_tiles: bool = False
    """Whether previews are decoded in tiles, since there is no room for whole ones."""


@dataclass(frozen=True)
class Choice:
    """A rung of the ladder, with its neighbours."""

    config: RunConfig
    """With values for what is recomputed and streamed."""
    estimate: Estimate
    room: Room
    previews_in_tiles: bool
    faster: Estimate | None
    """The rung above, which does not fit."""
    frugal: Estimate | None
    """The rung below."""

    @property
    def fits(self) -> bool:
        """Whether this rung fits; if not, none does."""
        return self.room.holds(self.estimate)

    def for_people(self) -> str:
        """What was chosen, what it needs, and what its neighbours need."""
        parts = [
            f"{rung(self.estimate)} needs {gb(self.estimate.needs)} of {gb(self.room.device)} that are free",
            f"{rung(self.faster)}, which is faster, {gb(self.faster.needs)}" if self.faster else "",
            f"{rung(self.frugal)}, which is slower, {gb(self.frugal.needs)}" if self.frugal else "",
            "previews are decoded in tiles" if self.previews_in_tiles else "",
        ]
        return "; ".join(part for part in parts if part)


def rung(one: Estimate) -> str:
    """In words."""
    return f"recompute {one.recompute}" + (f" with {one.streamed} blocks streamed" if one.streamed else "")


def choose(estimator: Estimator, config: RunConfig, room: Room) -> Choice:
    """The fastest rung that fits, of those that the run file leaves open; where none fits, the last. ConfigError."""
    rungs, total = list(_resident(config)), len(estimator.family.blocks(estimator.outline))

    def streamed(count: int) -> RunConfig | None:
        may = room.streams and config.memory.stream_blocks == "auto" and config.memory.recompute in ("auto", "full")
        return changed(config, {"memory.recompute": "full", "memory.stream_blocks": count}) if may else None

    def fits(run: RunConfig | None) -> bool:
        return run is not None and room.holds(estimator.estimate(run), CAREFUL)

    def suits_device(run: RunConfig | None) -> bool:
        return run is not None and estimator.estimate(run).needs <= CAREFUL * room.device

    if (last := streamed(total)) is not None:
        rungs.append(last)
    at = next((place for place, run in enumerate(rungs) if fits(run)), len(rungs) - 1)
    if rungs[at] is last and suits_device(last):  # the fewest that do also take the least of host memory
        count = bisect_left(range(total), True, key=lambda count: suits_device(streamed(count)))
        if count < total and (fewest := streamed(count)) is not None:
            rungs.insert(at, fewest)
    here, *others = (estimator.estimate(rungs[place]) for place in (at, at - 1, at + 1) if 0 <= place < len(rungs))
    return Choice(
        rungs[at], here, room, previews_in_tiles=estimator.reserved(here.previews) > CAREFUL * room.device,
        faster=others[0] if at else None, frugal=others[-1] if at + 1 < len(rungs) else None,
    )  # fmt: skip


def _resident(config: RunConfig) -> Iterator[RunConfig]:
    """The rungs with no streamed blocks, or as many as the run file says."""
    count = 0 if config.memory.stream_blocks == "auto" else config.memory.stream_blocks
    for policy in POLICIES if config.memory.recompute == "auto" else (config.memory.recompute,):
        if (run := changed(config, {"memory.recompute": policy, "memory.stream_blocks": count})) is not None:
            yield run


def fit_run(config: RunConfig, family: Family, accelerator: Accelerator, most_px: int | None = None) -> Fitted:
    """The run, fitted to what is free now, before anything is loaded; in every process alike.

    Says what was chosen. `most_px` is the area of its largest picture, where that is known. A model so small that
    nothing has to be chosen recomputes nothing, and nothing is said; and the choice is left to `prepare_model` where
    memory cannot be asked, or where a full fine-tune is cut into shards, for which there is no estimate. Raises
    FluxFTError where nothing fits by far and the run file leaves the choice open.
    """
    device, world = accelerator.device, accelerator.num_processes
    estimator = Estimator(family, "cpu" if device.type == "cpu" else "cuda", most_px)
    if estimator.size < fit.TRIVIAL_PARAMS or shards_wanted(config, world) > 1:
        return Fitted(config)
    machine = fit.machine_of(device)
    asked = [machine.free_bytes]
    free = [one for one in (gather_object(asked) if world > 1 else asked) if one is not None]
    if len(free) < world:
        return Fitted(config)
    least = min(free) / (world if device.type == "cpu" else 1)  # host memory is asked for by each, and shared by all
    room = Room(least, machine.host_bytes or math.inf, streams=device.type == "cuda" and world == 1)
    choice = choose(estimator, config, room)
    log.say(f"memory: {choice.for_people()}")
    if not choice.fits:
        _refuse_or_warn(estimator, config, choice)
    return Fitted(choice.config, choice.previews_in_tiles)


def circumstances(config: RunConfig) -> dict[str, str]:
    """What of the choice, and of `speed`, moves last bits, for a run that goes on from a checkpoint; nothing for most.

    Weights that read the same input are multiplied as one, unless they are streamed (`setup.fuse`). Recompute moves
    none, but where blocks are compiled, which `strict` runs on a GPU do not do.
    """
    apart = config.finetune_type == "lora" and config.speed.fused_lora and streamed_blocks(config) > 0
    fused = {name: str(getattr(config.speed, name)).lower() for name in ("fused_lora", "fused_attention")}
    switches = {f"speed.{name}": value for name, value in fused.items() if value == "false"}
    return switches | ({"memory.stream_blocks": "some blocks"} if apart else {})


def _refuse_or_warn(estimator: Estimator, config: RunConfig, choice: Choice) -> None:
    room, needs = choice.room, choice.estimate.needs
    lacking = "what is free" if needs > room.device else f"host memory has room for, {gb(room.host)}"
    told = [f"`{one}` would need {gb(one.estimate.needs)}" for one in islice(fitting(estimator, config, room), 3)]
    hint = "; ".join([*told, "or end other programs that use it"])
    is_open = "auto" in (config.memory.recompute, config.memory.stream_blocks)
    if is_open and needs > CLEARLY * room.device:
        raise FluxFTError(
            f"this run needs {gb(needs)} of the device's memory at the least, by the estimate, and {gb(room.device)} "
            "are free",
            hint=f"{hint}; to try all the same, set `memory.recompute: {choice.estimate.recompute}` and "
            f"`memory.stream_blocks: {choice.estimate.streamed}`",
        )
    log.warn(f"by the estimate that is more than {lacking}, and may end for lack of memory: {hint}")


# --- What else could be done, and what it costs. ---


@dataclass(frozen=True)
class Alternative:
    """The same run with other settings."""

    settings: dict[str, Any]
    """By dotted name, as on the command line."""
    estimate: Estimate
    flops: float
    """A picture, as a share of the run's own."""

    def __str__(self) -> str:
        return " ".join(f"{name}={_as_word(value)}" for name, value in self.settings.items())

    def costs(self) -> str:
        """In operations, over the bus and in precision, in words."""
        change = f"{self.flops - 1:+.0%} operations a picture" if abs(self.flops - 1) > 0.005 else ""
        bus = f"{gb(self.estimate.traffic)} a step over the bus" if self.estimate.traffic else ""
        stored = STORED.get(self.settings.get("memory.base_precision", ""), "")
        off = f"the velocity is {stored} off on flux-tiny" if stored else ""
        return "; ".join(one for one in (change, bus, off) if one)


def _as_word(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)


def alternatives(estimator: Estimator, config: RunConfig) -> Iterator[Alternative]:
    """Other recompute policies, batches, optimizers, streamed blocks, bases and sizes.

    What a result feels least comes first. Those that contradict the run's other settings are left out.
    """
    now = estimator.estimate(config)
    for settings in _options(estimator, config, now):
        other = changed(config, settings)
        if other is not None:
            sizes_change = "data.resolutions" in settings
            before, after = (
                estimator.flops(run) if sizes_change else estimator.estimate(run).flops for run in (config, other)
            )
            share = after * _pictures(config) / (before * _pictures(other))
            yield Alternative(settings, estimator.estimate(other), share)


def fitting(estimator: Estimator, config: RunConfig, room: Room) -> Iterator[Alternative]:
    """What changes the result, or how it is come by, and would then fit, as far down the ladder as need be."""
    for settings in (*_smaller_bases(config), *_one_at_a_time(config), *_smaller_sizes(estimator, config)):
        other = changed(config, settings)
        if other is not None and (choice := choose(estimator, other, room)).fits:
            yield Alternative(settings, choice.estimate, 1)


def _pictures(config: RunConfig) -> int:
    return config.optim.batch_size * config.optim.accumulate


def _options(estimator: Estimator, config: RunConfig, now: Estimate) -> Iterator[dict[str, Any]]:
    yield from _one_at_a_time(config)
    yield from ({"memory.recompute": one} for one in POLICIES if one != now.recompute)
    if config.finetune_type == "full":
        yield from ({"optim.name": one} for one in ("adamw", "adamw8bit", "adafactor") if one != now.optimizer)
    total = len(estimator.family.blocks(estimator.outline))
    for count in (total // 2, total):
        if count != now.streamed:
            yield {"memory.stream_blocks": count, "memory.recompute": "full"}
    yield from _smaller_bases(config)
    yield from ({"optim.batch_size": one} for one in (2, 4) if one != config.optim.batch_size)
    yield from _smaller_sizes(estimator, config)


def _one_at_a_time(config: RunConfig) -> list[dict[str, Any]]:
    batch = config.optim.batch_size
    return [{"optim.batch_size": 1, "optim.accumulate": batch * config.optim.accumulate}] if batch > 1 else []


def _smaller_bases(config: RunConfig) -> list[dict[str, Any]]:
    held = base_storage(config)
    smaller = () if config.finetune_type == "full" or held == "nf4" else ("nf4",) if held else ("int8", "nf4")
    return [{"memory.base_precision": one} for one in smaller]


def _smaller_sizes(estimator: Estimator, config: RunConfig) -> list[dict[str, Any]]:
    largest = estimator.sides(config)[0]
    smaller = [side for side in estimator.family.variant.training_sides_px if side < largest]
    return [{"data.resolutions": smaller}] if smaller else []


def changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig | None:
    """The run with other settings, by dotted name; None where they contradict others."""
    tree = config.model_dump()
    for name, value in settings.items():
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[key] = value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError:
        return None


def savings(estimator: Estimator, config: RunConfig, most: int = 3) -> str:
    """The first changes that save a step memory worth the while, each with what it saves and costs, in a sentence."""
    now = estimator.estimate(config).training
    saved = ((one, now - one.estimate.training) for one in alternatives(estimator, config))
    worth = ((one, size) for one, size in saved if size > WORTH_SAYING * now)
    told = (f"`{one}` saves {gb(size)}" + (f" ({one.costs()})" if one.costs() else "") for one, size in worth)
    return "; ".join(islice(told, most))


def out_of_memory(error: BaseException, config: RunConfig, family: Family) -> FluxFTError:
    """What to tell of a GPU whose memory a run has filled: what to change, and what that saves by the estimate."""
    estimator = Estimator(family, "cuda")
    told = savings(estimator, config)
    return FluxFTError(
        f"the GPU's memory is full: {str(error).split('. ')[0]}; "
        f"by the estimate this run needs {gb(estimator.estimate(config).needs)}",
        hint=(f"{told}; or " if told else "") + "end other programs that use the GPU",
    )
