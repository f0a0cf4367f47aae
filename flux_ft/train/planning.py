"""What `flux-ft plan` tells of a run before it is started, and of the same run with other settings and priorities."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import torch

from flux_ft.config import RunConfig
from flux_ft.errors import ModelError
from flux_ft.families.base import Family
from flux_ft.families.registry import open_family
from flux_ft.infer import fit
from flux_ft.train.estimate import Estimate, Estimator, gb
from flux_ft.train.fitting import Alternative, Choice, Room, alternatives, changed, choose
from flux_ft.train.launch import cpu_is_forced
from flux_ft.train.optim import LARGE_PARAMETERS

H100_RATE = 798e12
"""FLOP/s of an H100 in a bf16 8192³ matrix product, for times where there is no GPU to measure."""
FP8_GAIN = 2
"""How much faster a matrix product in 8 bits is at the most than one in bf16, by what GPUs are rated."""
CARDS_GB = (8, 12, 16, 24, 32, 48, 80, 141)
"""Memory of usual cards, in units of 2³⁰ bytes."""
CARD_SHARE = 0.98
"""Of a card's memory that is free when nothing runs on it: assumed, by what drivers keep of 24 and 80 GB cards."""


def card_room(card_gb: int) -> Room:
    """What is free on a card of this size when nothing runs on it, with as much host memory as will be needed."""
    return Room(card_gb * 2**30 * CARD_SHARE)


@dataclass(frozen=True)
class Way:
    """The run with another priority, or on another card."""

    name: str
    sides_px: tuple[int, ...]
    recompute: str
    streamed: int
    needs: float
    """Bytes of the device."""
    fits: bool
    flops: float
    """Of an optimizer step, the mean over all sizes."""

    def told(self, config: RunConfig, rate: float) -> str:
        """A row for people: sizes, memory and time."""
        sizes = ", ".join(f"{side}²" for side in self.sides_px)
        seconds = self.flops / rate
        streamed = f", {self.streamed} streamed" if self.streamed else ""
        return (
            f"{self.name:<15} {sizes:<18} {gb(self.needs):>10} {'' if self.fits else '(too much) '}"
            f"recompute {self.recompute}{streamed}; a step at least {_duration(seconds)}, "
            f"the run {_duration(seconds * config.iterations)}"
        )


@dataclass(frozen=True)
class Plan:
    """What `flux-ft plan` tells."""

    config: RunConfig
    model: str
    weights: int
    device: str
    """Its name; empty where there is no such device here."""
    free: float | None
    """Bytes of it; None where it cannot be asked."""
    free_disk: float
    sides_px: list[int]
    estimate: Estimate
    choice: str
    """What `train` would choose here, in words; empty where what is free is not known."""
    others: list[Alternative]
    priorities: list[Way]
    cards: list[Way]
    """What `train` would choose on usual cards, where there is none here."""
    flops: float
    """Of an optimizer step, the mean over all sizes."""
    rate: float
    """FLOP/s of a large matrix product."""
    rate_is_measured: bool

    @property
    def least_seconds(self) -> float:
        """Of all steps, if nothing but matrix products and attention took time, at the rate of the fastest."""
        return self.flops * self.config.iterations / self.rate

    @property
    def card_gb(self) -> int | None:
        """The smallest usual card that this fits; None if there is none."""
        return next((one for one in CARDS_GB if self.estimate.needs <= card_room(one).device), None)

    @property
    def fits(self) -> bool | None:
        """Whether what is free is enough; None where that is not known."""
        return None if self.free is None else self.estimate.needs <= self.free

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        own = {one.name: getattr(self, one.name) for one in fields(self)[1:]}  # all but the run file
        others = [{"settings": one.settings, "needs": one.estimate.needs, "flops": one.flops} for one in self.others]
        facts = {"fits": self.fits, "card_gb": self.card_gb, "least_seconds": self.least_seconds}
        ways = {name: [asdict(one) for one in getattr(self, name)] for name in ("priorities", "cards")}
        return own | facts | ways | {"estimate": self.estimate.as_json(), "others": others}

    def for_people(self) -> str:
        """For people."""
        config, now = self.config, self.estimate
        auto = {name: " (auto)" if value == "auto" else "" for name, value in
                (("recompute", config.memory.recompute), ("optimizer", config.optim.name),
                 ("streamed", config.memory.stream_blocks))}  # fmt: skip
        what = f"LoRA rank {config.lora_rank}" if config.finetune_type == "lora" else "full fine-tune"
        kind = "GPU" if now.overhead else "memory"
        sizes = ", ".join(f"{side}²" for side in self.sides_px)
        lines = [
            f"run       {self.model}, {self.weights:,} weights; {what}; sizes {sizes} pixels, "
            f"batch {config.optim.batch_size}",
            f"chosen    recompute {now.recompute}{auto['recompute']}, {now.optimizer}{auto['optimizer']}, "
            f"{now.streamed} blocks streamed{auto['streamed']}, base {config.memory.base_precision}",
            *([f"          {self.choice}"] if self.choice else []),
            f"{kind:<9} at {self.sides_px[0]}², at the highest moment of a step:",
            *(f"          {gb(size):>9}  {part}" for part, size in now.device.items() if size),
            f"          {gb(now.training):>9}  in all",
            *([f"          {gb(now.previews):>9}  while a preview is drawn; in tiles {gb(now.previews_in_tiles)}"]
              if now.previews else []),
            f"          {gb(now.encoding):>9}  while captions are encoded, before the model comes; "
            f"by blocks that visit the device in turn {gb(now.encoding_streamed)}",
            *([f"          {gb(now.overhead):>9}  for allocator and libraries: assumed, not measured"]
              if now.overhead else []),
            f"          {gb(now.needs):>9}  needed: the highest of these" + (", in pieces where that helps, and that"
                                                                            if now.overhead else ""),
            *_listed("host", now.host),
            *_listed("disk", now.disk, f"; {gb(self.free_disk)} are free" + (
                "" if sum(now.disk.values()) <= self.free_disk else ": too little")),
            f"time      {_flops(self.flops)} a step{' on average' if len(self.sides_px) > 1 else ''}: "
            f"{config.iterations:,} steps take at least {_duration(self.least_seconds)} at {_flops(self.rate)}/s, "
            + ("what a matrix product reached here just now" if self.rate_is_measured else
               "an H100's in a matrix product") + (", twice for 8 bits" if config.speed.fp8_compute else ""),
            "          (no step reaches that; loading, encoding and previews come on top)",
            f"{'else':<9} {'needs':>9}  fits  what it costs",
            *(f"          {gb(one.estimate.needs):>9}  {self._mark(one.estimate.needs):<4}  {one}"
              + (f": {one.costs()}" if one.costs() else "") for one in self.others),
            *self._ways("priority", self.priorities),
            *self._ways("cards", self.cards),
            self._verdict(),
        ]  # fmt: skip
        return "\n".join(lines)

    def _ways(self, title: str, ways: list[Way]) -> list[str]:
        return [f"{title if not place else '':<9} {way.told(self.config, self.rate)}" for place, way in enumerate(ways)]

    def _mark(self, needs: float) -> str:
        return "?" if self.free is None else "yes" if needs <= self.free else "no"

    def _verdict(self) -> str:
        needs = gb(self.estimate.needs)
        if self.free is None:
            card = f"a card of {self.card_gb} GB" if self.card_gb else "more than any single card has"
            return f"there is no GPU here: this needs {needs}, so {card}"
        if self.fits:
            return f"fits {self.device}: needs {needs} of {gb(self.free)} that are free"
        fitting = next((one for one in self.others if one.estimate.needs <= self.free), None)
        return f"does not fit {self.device}: needs {needs}, {gb(self.free)} are free; " + (
            f"`{fitting}` would fit with {gb(fitting.estimate.needs)}" if fitting else "no change above would fit"
        )


def make_plan(config: RunConfig, family: Family | None = None) -> Plan:
    """The plan for this machine, or where it has no GPU and the model asks for one, for such a machine.

    Reads no pictures and no weights. Raises InputError.
    """
    family = family or open_family(config.model, config.model_parts)
    if family.variant.image_input != "none":
        raise ModelError(f"`model: {config.model}` takes pictures besides text, and such models are not trained yet")
    estimator = Estimator(family, "cuda")
    forced = cpu_is_forced()
    here = torch.cuda.is_available() and not forced
    if not here and (forced or estimator.size < LARGE_PARAMETERS):
        estimator = Estimator(family, "cpu")
    device = torch.device(estimator.device_type)
    is_here = here or device.type == "cpu"
    machine = fit.machine_of(device) if is_here else None
    room = None
    if machine is not None and machine.free_bytes is not None:
        room = Room(machine.free_bytes, machine.host_bytes or math.inf, streams=here)
    choice = choose(estimator, config, room) if room else None
    run = choice.config if choice else config
    folder = config.output_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    cards = [] if is_here else [
        _way(f"{card} GB", estimator, config, choose(estimator, config, card_room(card))) for card in CARDS_GB[:-1]
    ]  # fmt: skip
    return Plan(
        config=config, model=family.variant.name, weights=estimator.size,
        device=torch.cuda.get_device_name(device) if here else "this CPU" if is_here else "",
        free=room.device if room else None,
        free_disk=shutil.disk_usage(existing).free, sides_px=estimator.sides(config),
        estimate=estimator.estimate(run), choice=choice.for_people() if choice else "",
        others=list(alternatives(estimator, run)), priorities=_priorities(estimator, config, room), cards=cards,
        flops=estimator.flops(run),
        rate=(matmul_rate(device) if is_here else H100_RATE) * (FP8_GAIN if config.speed.fp8_compute else 1),
        rate_is_measured=is_here,
    )  # fmt: skip


def _priorities(estimator: Estimator, config: RunConfig, room: Room | None) -> list[Way]:
    """The run with each priority, its own marked; none where it would change nothing."""
    if config.data.resolutions is not None or len(estimator.family.variant.training_sides_px) == 1:
        return []
    ways = []
    for name in get_args(RunConfig.model_fields["priority"].annotation):
        run = changed(config, {"priority": name})
        assert run is not None
        told = name + (" (run's)" if name == config.priority else "")
        ways.append(_way(told, estimator, run, choose(estimator, run, room) if room else None))
    return ways


def _way(name: str, estimator: Estimator, config: RunConfig, choice: Choice | None) -> Way:
    run = choice.config if choice else config
    now = estimator.estimate(run)
    sides = tuple(estimator.sides(run))
    fits = choice is None or choice.fits
    return Way(name, sides, now.recompute, now.streamed, now.needs, fits, estimator.flops(run))


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product: the best of five, in bf16 on a GPU and float32 on a CPU."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    one, best = torch.randn(side, side, device=device, dtype=dtype), math.inf
    for _ in range(5):
        began = time.perf_counter()
        _ = one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _flops(count: float) -> str:
    return f"{count / 1e12:.1f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 60 else (
        f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"
    )  # fmt: skip


def _listed(name: str, parts: Mapping[str, float], after: str = "") -> list[str]:
    told = ", ".join(f"{gb(size)} {part}" for part, size in parts.items() if size)
    return [f"{name:<9} {told}{after}"]
