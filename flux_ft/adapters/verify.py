"""Whether a LoRA file acts as it should: loaded by the installed diffusers, and by our reader, and compared.

    file ─read_adapter────────────────────────────→ ΔW as we read it   ┐
    file ─load_lora_weights on zero weights─ peft → ΔW as diffusers does ┴→ missing, extra, error, fitted scale

The model has all its blocks, but each weight is one zero, seen as a matrix, so the 12B one takes no memory. ΔW is never
formed: diffusers' factors are taken from peft's layers, with the scale that peft applies to them.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.loaders import Flux2LoraLoaderMixin, FluxLoraLoaderMixin
from peft.tuners.lora import LoraLayer as PeftLoraLayer
from torch import nn

from flux_ft.adapters.compare import EXACT, ModuleDifference, finite, module_differences, rounding_name
from flux_ft.adapters.flavours import read_tensors
from flux_ft.adapters.formats import read_adapter
from flux_ft.adapters.recognise import Contents, Family, known_size, read_contents, width_of
from flux_ft.adapters.tools import DIFFUSERS, Answer, Verdict, layout_of, verdicts
from flux_ft.errors import AdapterError, first_line, plain, some_of
from flux_ft.families.layout import LAYOUTS, block_of
from flux_ft.types import AdapterState, LoraLayer

SAME_SCALE = 1e-3
"""How far from 1 rounding can move the fitted scale of a module."""
MOST_BLOCKS, LARGEST_MATRIX = 200, 2**31
"""Diffusers counts up to the last block, and makes room for any shape, whatever a file asks for."""
_BLOCK_NUMBER = re.compile(r"blocks[._](\d+)")
_SHOWN = 12
_KOHYA_WIDTH = 3072
_LOADING = (
    ValueError, KeyError, RuntimeError, AssertionError, AttributeError, TypeError, IndexError, NotImplementedError,
    OSError, ImportError,
)  # fmt: skip
"""What diffusers and peft let through when a file is not as they expect."""


@dataclass(frozen=True)
class Verification:
    """What diffusers makes of a file, and what other tools will."""

    path: Path
    family: Family
    layout: str
    """As the table of tools has it."""
    diffusers: str
    """Its version, and peft's."""
    reader_error: str | None
    """Why our own reader does not take the file."""
    loader_error: str | None
    """Why diffusers does not, or why it could not be asked."""
    untried: bool
    """Whether diffusers could not be asked at all."""
    notes: tuple[str, ...]
    """What our reader says of the file: parts that are not compared are among it."""
    warnings: tuple[str, ...]
    """What diffusers said while it loaded."""
    against: str | None
    """The file whose ΔW was the measure, where that is another one."""
    modules: tuple[ModuleDifference, ...]
    """a is the measure, b is what diffusers has."""
    tools: tuple[Verdict, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """Modules that diffusers did not load."""
        return tuple(one.path for one in self.modules if one.products and one.products.aa and not one.products.bb)

    @property
    def extra(self) -> tuple[str, ...]:
        """Modules that it changes though they should not be."""
        return tuple(one.path for one in self.modules if one.products and one.products.bb and not one.products.aa)

    @property
    def wrong(self) -> tuple[ModuleDifference, ...]:
        """Modules that are there, with another ΔW than rounding explains."""
        return tuple(one for one in self.modules if _is_wrong(one))

    @property
    def worst_error(self) -> float:
        """Largest relative error in ΔW; inf for an extra module or another shape."""
        errors = [one.products.error if one.products else float("inf") for one in self.modules]
        return max(errors, default=0.0)

    @property
    def scales(self) -> tuple[float, float] | None:
        """Least and largest fitted scale of a module that was loaded."""
        loaded = [one.products for one in self.modules if one.products and one.products.aa and one.products.bb]
        scales = [one.scale for one in loaded if one.scale is not None]
        return (min(scales), max(scales)) if scales else None

    @property
    def ok(self) -> bool:
        """Whether diffusers loads every module, with the strength that it should have."""
        quiet = not (self.reader_error or self.loader_error or self.missing or self.extra or self.wrong)
        return quiet and bool(self.modules)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "family": self.family,
            "layout": self.layout,
            "diffusers": self.diffusers,
            "reader_error": self.reader_error,
            "loader_error": self.loader_error,
            "untried": self.untried,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "against": self.against,
            "worst_error": finite(self.worst_error),
            "scales": None if self.scales is None else [finite(scale) for scale in self.scales],
            "missing": list(self.missing),
            "extra": list(self.extra),
            "wrong": [one.path for one in self.wrong],
            "modules": [one.as_json() for one in self.modules],
            "tools": [one.as_json() for one in self.tools],
        }

    def for_people(self) -> str:
        """The verdict, what is wrong, and the table of tools."""
        title = LAYOUTS[self.family].title if self.family in LAYOUTS else "unknown model"
        lines = [f"{self.path.name}: {title}, layout {self.layout}", self._verdict()]
        for what, paths in (("missing", self.missing), ("extra", self.extra)):
            if paths:
                lines.append(f"{what}: {some_of(paths)}")
        for one in self.wrong[:_SHOWN]:
            if one.products is None:
                lines.append(f"another shape: {one.path}")
            else:
                lines.append(f"error {one.products.error:.1e}, scale {one.products.scale:.4g}: {one.path}")
        if len(self.wrong) > _SHOWN:
            lines.append(f"and {len(self.wrong) - _SHOWN} more")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"diffusers says: {message}" for message in self.warnings]
        if self.tools:
            lines += ["", *(_tool_line(one) for one in self.tools)]
        return "\n".join(map(plain, lines))

    def _verdict(self) -> str:
        if self.reader_error:
            return f"flux_ft cannot read it: {self.reader_error}"
        if self.loader_error:
            return f"{'not tried with' if self.untried else 'fails in'} diffusers {self.diffusers}: {self.loader_error}"
        measure = f"as {self.against} has them" if self.against else "as they are in the file"
        if self.ok:
            error = "exactly" if self.worst_error <= EXACT else f"up to rounding in {rounding_name(self.worst_error)}"
            return (
                f"ok: diffusers {self.diffusers} loads all {len(self.modules)} modules {measure}, {error} "
                f"(error at most {self.worst_error:.1g}, {_scales(self.scales)})"
            )
        loaded = len(self.modules) - len(self.missing) - len(self.extra)
        return (
            f"wrong: of {len(self.modules) - len(self.extra)} modules diffusers {self.diffusers} loads {loaded}, "
            f"{loaded - len(self.wrong)} of them {measure} ({_scales(self.scales)})"
        )


def _scales(scales: tuple[float, float] | None) -> str:
    if scales is None:
        return "nothing to fit a scale to"
    least, largest = (f"{value:.3f}" for value in scales)
    return f"fitted scale {least}" + ("" if least == largest else f" to {largest}")


def _tool_line(verdict: Verdict) -> str:
    if verdict.answer == "unknown":
        return f"  {verdict.tool.name:<21} ?        {verdict.why}"
    why = f"  {verdict.why}" if verdict.why else ""
    return f"  {verdict.tool.name:<21} {verdict.answer:<8} {verdict.evidence}{why}"


def _is_wrong(one: ModuleDifference) -> bool:
    if one.products is None:
        return True
    if not (one.products.aa and one.products.bb):
        return False
    off = abs((one.products.scale or 0.0) - 1)
    return rounding_name(one.products.error) is None or off > SAME_SCALE


def verify_file(path: Path, against: Path | None = None) -> Verification:
    """Load `path` through the installed diffusers and compare its ΔW with what our reader finds, module by module.

    `against`: a file whose ΔW is the measure instead, as after a conversion. Raises AdapterError when `path` is no
    safetensors file, or `against` is no LoRA that we can read; all else is in the result.
    """
    contents = read_contents(path)
    reference = None if against is None else read_adapter(against)
    ours, reader_error = _ours(contents)
    family: Family = cast(Family, ours.layout) if ours else contents.family
    result = Verification(
        path, family, layout_of(contents), f"{version('diffusers')} (peft {version('peft')})", reader_error,
        loader_error=None, untried=False, notes=ours.notes if ours else (), warnings=(),
        against=against.name if against else None, modules=(), tools=verdicts(contents, family),
    )  # fmt: skip
    if (hindrance := _hindrance(contents, family, ours)) is not None:
        return replace(result, loader_error=hindrance, untried=True)
    try:
        theirs, messages = _through_diffusers(path, family, ours, contents.shapes)
    except _LOADING as error:
        message = f"{type(error).__name__}: {first_line(error)}"[:160]
        return replace(result, loader_error=message, tools=_with_trial(result.tools, "nothing", message))
    measure = reference or ours
    if measure is None:
        return replace(result, warnings=messages)
    modules = tuple(
        one
        for one in module_differences(measure, theirs)
        # diffusers gives untrained parts of a fused matrix factors of zero; that is no module more.
        if one.path in measure.layers or not one.products or one.products.bb
    )
    result = replace(result, warnings=messages, modules=modules)
    return result if against else replace(result, tools=_with_trial(result.tools, *_answer(result)))


def _ours(contents: Contents) -> tuple[AdapterState | None, str | None]:
    try:
        return read_tensors(contents.file.read_all(), contents.metadata), None
    except AdapterError as error:
        return None, error.message


def _hindrance(contents: Contents, family: Family, state: AdapterState | None) -> str | None:
    """Why diffusers cannot be asked."""
    if family == "unknown":
        return "the file's modules are of no model that we know"
    if contents.file.path.suffix != ".safetensors":
        return "it reads files by the name of .safetensors alone"
    if any(int(number) >= MOST_BLOCKS for key in contents.file.entries for number in _BLOCK_NUMBER.findall(key)):
        return f"the file names blocks beyond the {MOST_BLOCKS}th, which no model has"
    if any(math.prod(shape) > LARGEST_MATRIX for shape in contents.shapes.values()):
        return "the file changes matrices larger than any model has"
    if any(bool((contents.file.read(one.parts["alpha"].key).float() < 0).any()) for one in contents.holding("alpha")):
        return "alpha is negative, at which its converter never comes to an end"
    width = width_of(contents.shapes)
    linear1 = any(re.search(r"single_blocks[._]\d+[._]linear1$", one.name) for one in contents.modules)
    if family == "flux1" and width != _KOHYA_WIDTH and linear1 and layout_of(contents) in ("kohya", "comfy down/up"):
        return (
            f"its converter has the row counts of the 12B model built in, and this LoRA is {width} wide; "
            "the same LoRA in the diffusers layout can be verified"
        )
    return None


def _answer(result: Verification) -> tuple[Answer, str]:
    """The trial in the words of the table of tools."""
    if result.ok:
        return "ok", ""
    if result.missing and len(result.missing) == len([one for one in result.modules if one.path not in result.extra]):
        return "nothing", "loads nothing"
    if result.wrong or result.extra:
        return "wrong", _scales(result.scales)
    return "partial", f"does not load {len(result.missing)} of {len(result.modules)} modules"


def _with_trial(tools: tuple[Verdict, ...], answer: Answer, why: str) -> tuple[Verdict, ...]:
    """The table with what the installed diffusers has just shown in place of what an earlier one did."""
    here = replace(DIFFUSERS, version=version("diffusers"))
    return tuple(Verdict(here, answer, why) if one.tool == DIFFUSERS else one for one in tools)


# --- diffusers. ---


class _Pipeline:
    """As much of a pipeline as the loading of a LoRA asks for."""

    text_encoder = None
    hf_device_map = None

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.components = {"transformer": transformer}

    @classmethod
    def load_lora_into_text_encoder(cls, *_: Any, **__: Any) -> None:
        """Text encoders are not compared."""


class _Flux1(_Pipeline, FluxLoraLoaderMixin):  # type: ignore[misc]
    pass


class _Flux2(_Pipeline, Flux2LoraLoaderMixin):  # type: ignore[misc]
    pass


def _through_diffusers(
    path: Path, family: Family, state: AdapterState | None, shapes: Mapping[str, tuple[int, int]]
) -> tuple[AdapterState, tuple[str, ...]]:
    """What diffusers loads, and its warnings. Raises one of _LOADING."""
    size = _Size.of(family, state, shapes)
    model = zero_model(size)
    pipeline = (_Flux2 if family == "flux2" else _Flux1)(model)
    with _captured() as messages, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on how it is called
        pipeline.load_lora_weights(path.absolute().parent, weight_name=path.name, local_files_only=True)
    return read_back(model, family), tuple(dict.fromkeys(first_line(RuntimeError(one)) for one in messages))


@dataclass(frozen=True)
class _Size:
    """The model that a file is for."""

    family: Family
    width: int
    double: int
    single: int
    text: int
    inputs: int
    outputs: int
    pooled: int
    guided: bool

    @classmethod
    def of(cls, family: Family, state: AdapterState | None, shapes: Mapping[str, tuple[int, int]]) -> _Size:
        """The published model of that width, or one that has the blocks and the embedders which the file touches."""
        layers = state.layers if state else {}
        width = width_of(shapes) or LAYOUTS[family].sizes[0].width
        known = known_size(family, width)
        places = [place for name in (*layers, *shapes) if (place := block_of(name))]

        def count(stream: str) -> int:
            return 1 + max(
                (index for kind, index in places if kind.startswith("single") == (stream == "single")), default=0
            )

        def inputs(path: str, usual: int) -> int:
            return layers[path].down_RI.shape[1] if path in layers else usual

        channels = 128 if family == "flux2" else 64
        touched = inputs("x_embedder", channels)
        last = layers.get("proj_out")
        return cls(
            family, width,
            known.double if known else count("double"),
            known.single if known else count("single"),
            inputs("context_embedder", known.text if known else 64),
            # A control LoRA's wider first layer is what diffusers makes of the base's; so it is left to do that.
            min(touched, channels) if known else touched,
            last.up_OR.shape[0] if last else channels,
            inputs("time_text_embed.text_embedder.linear_1", 768),
            guided=known is None or "klein" not in known.architecture,
        )  # fmt: skip


def zero_model(size: _Size) -> nn.Module:
    """diffusers' transformer of that size with zero weights. Matrices are views of one number, and take no memory."""
    head = 128 if size.width % 128 == 0 else size.width
    config: dict[str, Any] = {
        "num_layers": size.double,
        "num_single_layers": size.single,
        "attention_head_dim": head,
        "num_attention_heads": size.width // head,
        "in_channels": size.inputs,
        "out_channels": size.outputs,
        "joint_attention_dim": size.text,
        "guidance_embeds": size.guided,
    }
    with torch.device("meta"):
        if size.family == "flux2":
            model = Flux2Transformer2DModel.from_config(config)
        else:
            model = FluxTransformer2DModel.from_config(config | {"pooled_projection_dim": size.pooled})
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Norms are overwritten by control LoRAs, which a view of one number does not allow.
            value = torch.zeros(()).expand(parameter.shape) if parameter.ndim > 1 else torch.zeros(parameter.shape)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return cast(nn.Module, model)


def read_back(model: nn.Module, family: str) -> AdapterState:
    """The ΔW that peft's layers add, as factors."""
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, PeftLoraLayer):
            for name in module.active_adapters:
                if name in module.lora_A:
                    down_RI, up_OR = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
                    layers[path] = LoraLayer(down_RI, up_OR, float(module.scaling[name]) * down_RI.shape[0])
    return AdapterState(layers, layout=family)


@contextmanager
def _captured() -> Iterator[list[str]]:
    """Within, warnings of diffusers go into the list, and nowhere else."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and "NoneType" not in record.getMessage():
                messages.append(record.getMessage())

    logger = logging.getLogger("diffusers")
    handlers, logger.handlers = logger.handlers, [Collector()]
    try:
        yield messages
    finally:
        logger.handlers = handlers
