"""A LoRA out of the difference of two checkpoints, matrix by matrix; and smaller LoRAs out of larger ones.

    base, tuned ─difference→ Δ (O, I) ─low_rank→ directions ─rank rule→ factors ─rounded→ AdapterState
                                └─ what no LoRA holds (norms, biases, embedders, final layer): its share is reported

Peak memory follows the largest matrix, not the model. Each matrix draws its sketch from a generator keyed by its own
name, and what is finished can be kept in a work folder; so a resumed extraction gives the same bits.

Shapes in names: R rank, O out features, I in features.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flux_ft import __version__, log
from flux_ft.adapters.checkpoint_files import Checkpoint, Values, Weight, is_block_linear, require_pair
from flux_ft.adapters.formats import EXPORT_DTYPES, fuse, unfuse
from flux_ft.adapters.lowrank import (
    OVERSAMPLE,
    POWER_ITERATIONS,
    Factors,
    Noise,
    exact_low_rank,
    low_rank,
    noise_of,
    rank_above,
    rounded,
    rounding_power,
    spread,
    squared_norm,
    squared_residual,
)
from flux_ft.data.parallel import ordered_map
from flux_ft.errors import AdapterError, ModelError, StorageError
from flux_ft.files import write_whole
from flux_ft.flow import keyed_generator
from flux_ft.types import AdapterState, LoraLayer

LARGEST_RANK = 256
"""Of any matrix, where the rank is not given."""
_FIRST_LOOK = 64
_NOTHING = Factors(torch.empty(0, 0), torch.empty(0, 0), torch.empty(0))
_DTYPES = {dtype: name for name, dtype in EXPORT_DTYPES.items()}


@dataclass(frozen=True)
class Options:
    """How a change becomes a LoRA."""

    rank: int | Literal["auto"] | None = 32
    """Of every matrix; "auto": what rises above each matrix's noise; None where `budget_bytes` or `energy` decides."""
    budget_bytes: int | None = None
    """What the factors of all matrices may take, spent where it keeps most."""
    energy: float | None = None
    """Share, 0 to 1, to be kept of all that is not noise, with as few numbers as possible."""
    dtype: torch.dtype = torch.bfloat16
    """Of the factors: bf16, fp16 or fp32."""
    exact: bool = False
    """Whole SVDs in place of sketches."""
    seed: int = 0
    oversample: int = OVERSAMPLE
    power_iterations: int = POWER_ITERATIONS

    def __post_init__(self) -> None:
        given = [one for one in (self.rank, self.budget_bytes, self.energy) if one is not None]
        if len(given) != 1:
            raise AdapterError("a rank, a budget or an energy decides the size", hint="give exactly one of the three")
        if isinstance(self.rank, int) and not 1 <= self.rank <= 4096:
            raise AdapterError(f"rank {self.rank} is not between 1 and 4096", hint="16 or 32 is usual")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdapterError(f"energy {self.energy} is not above 0 and at most 1", hint="0.9 keeps 90 %")
        if self.budget_bytes is not None and self.budget_bytes <= 0:
            raise AdapterError(f"a budget of {self.budget_bytes} bytes holds nothing", hint="16-bit rank 16: 153 MB")
        if self.dtype not in _DTYPES:
            raise AdapterError(f"a LoRA cannot be written as {self.dtype}", hint="bf16, fp16 or fp32")

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"dtype": _DTYPES[self.dtype]}


@dataclass(frozen=True)
class LayerReport:
    """What became of one matrix."""

    name: str
    """In the original layout."""
    shape: tuple[int, int]
    """(O, I)."""
    rank: int
    change: float
    """‖Δ‖, Frobenius."""
    residual: float
    """‖Δ − up @ down‖ / ‖Δ‖, of the factors as they are written; 0 where nothing changed."""
    noise_edge: float
    """Singular values up to here can be the work of rounding."""
    noise_share: float
    """Of ‖Δ‖², what rounding explains: at most, where the given rank is less than what rises above the noise."""

    @property
    def energy_kept(self) -> float:
        return 1 - self.residual**2


@dataclass(frozen=True)
class ExtractionReport:
    """What a LoRA holds of a change, and what it cannot hold. Names of files and folders only, no paths."""

    base: str
    tuned: str
    layers: tuple[LayerReport, ...]
    left_out: dict[str, float]
    """Squared change of what no LoRA holds, by kind."""
    options: Options
    device: str
    notes: tuple[str, ...] = ()

    @property
    def energy_kept(self) -> float:
        """Of the squared change of the matrices that a LoRA can change."""
        total = math.fsum(one.change**2 for one in self.layers)
        return math.fsum(one.change**2 * one.energy_kept for one in self.layers) / total if total else 0.0

    @property
    def noise_share(self) -> float:
        """Of the same, what rounding explains: it is no loss if that is not kept."""
        total = math.fsum(one.change**2 for one in self.layers)
        return math.fsum(one.change**2 * one.noise_share for one in self.layers) / total if total else 0.0

    @property
    def left_out_shares(self) -> dict[str, float]:
        """Of the whole squared change, by kind, largest first; kinds that did not change are not in it."""
        total = math.fsum([*(one.change**2 for one in self.layers), *self.left_out.values()])
        largest_first = sorted(self.left_out.items(), key=lambda item: -item[1])
        return {kind: energy / total for kind, energy in largest_first if energy}

    def as_json(self) -> dict[str, Any]:
        """extraction.json."""
        shares = self.left_out_shares
        return {
            "base": self.base,
            "tuned": self.tuned,
            "energy_kept": self.energy_kept,
            "relative_error": math.sqrt(max(0.0, 1 - self.energy_kept)),
            "noise_share": self.noise_share,
            "left_out_share": math.fsum(shares.values()),
            "left_out": shares,
            "ranks": {str(rank): count for rank, count in sorted(Counter(one.rank for one in self.layers).items())},
            "notes": list(self.notes),
            "options": self.options.as_json(),
            "device": self.device,
            "versions": {"flux_ft": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "layers": [
                {**asdict(one), "shape": list(one.shape), "energy_kept": one.energy_kept} for one in self.layers
            ],
        }

    def for_people(self) -> str:
        """A few lines."""
        ranks = [one.rank for one in self.layers if one.rank]
        lines = [
            f"{len(ranks)} of {len(self.layers)} matrices, rank {min(ranks)} to {max(ranks)}; "
            f"{100 * self.energy_kept:.1f} % of their squared change is kept, "
            f"{100 * self.noise_share:.1f} % of it is rounding noise"
        ]
        shares = self.left_out_shares
        if shares:
            parts = ", ".join(f"{kind} {100 * share:.2g} %" for kind, share in shares.items())
            lines.append(f"left out, as no LoRA holds it: {100 * math.fsum(shares.values()):.2g} % ({parts})")
        return "\n".join([*lines, *self.notes])


# --- Work that outlives a kill. ---


class Done(NamedTuple):
    """One finished piece: tensors, and numbers about them."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Work:
    """Finished pieces by name, in a folder; in memory without one. A folder of other inputs is emptied first."""

    def __init__(self, folder: Path | None = None, fingerprint: str = "") -> None:
        self._folder, self._pieces = folder, dict[str, Done]()
        if folder is None:
            return
        mark = folder / "fingerprint.json"
        if folder.exists() and not (mark.is_file() and mark.read_bytes() == fingerprint.encode()):
            if folder.is_symlink() or not folder.is_dir() or (any(folder.iterdir()) and not mark.is_file()):
                raise StorageError(f"`{folder}` is in the way: it is not ours", hint="move it away")
            shutil.rmtree(folder)
        write_whole(mark, fingerprint.encode())

    @staticmethod
    def matches(folder: Path, fingerprint: str) -> bool:
        """Whether `folder` holds pieces of these inputs."""
        mark = folder / "fingerprint.json"
        return mark.is_file() and mark.read_bytes() == fingerprint.encode()

    def get(self, name: str) -> Done | None:
        """A finished piece; None if there is none or it is damaged."""
        if self._folder is None:
            return self._pieces.get(name)
        path = self._folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
                return Done(tensors, json.loads((file.metadata() or {})["facts"]))
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def put(self, name: str, done: Done) -> None:
        """Keep a piece. Raises StorageError."""
        if self._folder is None:
            self._pieces[name] = done
        else:
            tensors = {key: tensor.contiguous() for key, tensor in done.tensors.items()}
            write_whole(self._folder / f"{name}.safetensors", save(tensors, {"facts": json.dumps(done.facts)}))

    def remove(self) -> None:
        """All pieces, once the result stands."""
        self._pieces.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


# --- Extraction. ---


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    options: Options,
    *,
    device: torch.device | None = None,
    work: Work | None = None,
) -> tuple[AdapterState, ExtractionReport]:
    """The LoRA whose ΔW is nearest to `tuned` − `base`, and the report on it.

    Parts of one fused matrix share one `down`, so the kohya file has the rank that was chosen. `device`: a GPU where
    there is one, unless given. Raises ModelError when the two do not match or hold no numbers, AdapterError when there
    is nothing to extract.
    """
    require_pair(base, tuned)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = work or Work()
    plans = _plan_ranks(base, tuned, options, device, work)
    found: dict[str, LoraLayer] = {}
    layers = []
    for name, done in _each(
        "extract", "factors", base, tuned, device, work, lambda pair: _factors(pair, plans, options)
    ):
        layers.append(LayerReport(name=name, **done.facts | {"shape": tuple(done.facts["shape"])}))
        if done.tensors:
            down_RI, up_OR = done.tensors["down"], done.tensors["up"]
            found[name] = LoraLayer(down_RI, up_OR, float(len(down_RI)))
    if not found:
        changed = any(one.change for one in layers)
        raise AdapterError(
            f"nothing to extract: {tuned.label} "
            + (f"differs from {base.label} by rounding noise alone" if changed else f"is equal to {base.label}")
            + " in all linears inside the blocks",
            hint="give a rank to extract what there is" if changed else "give the fine-tuned checkpoint as `tuned`",
        )
    notes = [f"{one.label}: {note}" for one in (base, tuned) for note in one.notes]
    if options.energy is not None and (short := _short_of(layers, options)):
        notes.append(short)
    report = ExtractionReport(
        base.label, tuned.label, tuple(layers), _left_out(base, tuned), options, device.type, tuple(notes)
    )
    return AdapterState(unfuse(found)), report


class _Pair(NamedTuple):
    """One matrix of both checkpoints, on the device that computes."""

    name: str
    delta_OI: Tensor
    energy: float
    noise: Noise


def _each(
    title: str,
    kind: str,
    base: Checkpoint,
    tuned: Checkpoint,
    device: torch.device,
    work: Work,
    compute: Callable[[_Pair], Done],
) -> Iterator[tuple[str, Done]]:
    """`compute` for every block matrix that `work` does not hold yet; the next pair is read meanwhile."""
    names = base.matrices
    missing = [name for name in names if work.get(f"{kind}-{name}") is None]
    pairs = ordered_map(lambda name: _read_pair(base, tuned, f"{name}.weight"), missing, workers=1, window=2)
    with log.progress(title, len(names)) as bar:
        bar.skip(len(names) - len(missing))
        for name, read in zip(missing, pairs, strict=True):
            work.put(f"{kind}-{name}", compute(_pair(name, read, tuned.label, device)))
            bar.advance()
    for name in names:
        done = work.get(f"{kind}-{name}")
        if done is None:
            raise StorageError(f"the piece `{kind}-{name}` is gone from the work folder", hint="start again")
        yield name, done


def _read_pair(base: Checkpoint, tuned: Checkpoint, name: str) -> tuple[Values, Values]:
    return base.weights[name].read(), tuned.weights[name].read()


def _pair(name: str, read: tuple[Values, Values], label: str, device: torch.device) -> _Pair:
    base, tuned = (one.to(device) for one in read)
    delta_OI = difference(base, tuned)
    energy = squared_norm(delta_OI)
    if not math.isfinite(energy):
        raise ModelError(f"`{name}` of {label}, or of its base, holds NaN or infinity", hint="the training diverged")
    return _Pair(name, delta_OI, energy, rounding_noise(base, tuned))


def difference(base: Values, tuned: Values) -> Tensor:
    """tuned − base in float32."""
    return tuned.float().sub_(base.grid if base.scale is None and base.dtype.itemsize > 1 else base.float())


def rounding_noise(base: Values, tuned: Values) -> Noise:
    """What storing both has put into their difference.

    A base that is coarser than what was tuned from it was not rounded afterwards: masters in fp32 started at its very
    numbers. With 8 bits it was.
    """
    rows_O, columns_I = rounding_power(*tuned)
    coarser = torch.finfo(base.dtype).eps > torch.finfo(tuned.dtype).eps
    if not coarser or base.dtype.itemsize == 1:
        more_O, more_I = rounding_power(*base)
        rows_O, columns_I = rows_O + more_O, columns_I + more_I
    return noise_of(rows_O, columns_I)


def _decompose(pair: _Pair, rank: int, options: Options) -> Factors:
    if options.exact:
        return exact_low_rank(pair.delta_OI, rank)
    return low_rank(
        pair.delta_OI, rank,
        generator=keyed_generator(options.seed, "extract", pair.name),
        oversample=options.oversample, power_iterations=options.power_iterations,
    )  # fmt: skip


def _above_noise(pair: _Pair, options: Options) -> tuple[Factors, Noise]:
    """The directions that rise above the noise, at most LARGEST_RANK; looks further as long as all that it sees do."""
    look = LARGEST_RANK if options.exact else min(_FIRST_LOOK, LARGEST_RANK)
    shape = (pair.delta_OI.shape[0], pair.delta_OI.shape[1])
    while True:
        found = _decompose(pair, look, options)
        rank, noise = rank_above(found.singular_values_R.tolist(), pair.energy, pair.noise, shape)
        if rank < look or look >= LARGEST_RANK:
            kept = Factors(found.down_RI[:rank], found.up_OR[:, :rank], found.singular_values_R[:rank])
            return kept, noise
        look *= 2


class _Plan(NamedTuple):
    """What is known of a matrix before its factors are made."""

    rank: int
    noise: Noise | None


def _plan_ranks(
    base: Checkpoint, tuned: Checkpoint, options: Options, device: torch.device, work: Work
) -> dict[str, _Plan] | None:
    """The rank of each matrix, where one look at it alone does not tell: None for "auto"."""
    if options.rank == "auto":
        return None
    if options.rank is not None:
        return dict.fromkeys(base.matrices, _Plan(options.rank, None))
    spectra: dict[str, list[float]] = {}
    noises: dict[str, Noise] = {}
    signal = 0.0
    for name, done in _each("spectra", "spectrum", base, tuned, device, work, lambda pair: _spectrum(pair, options)):
        spectra[name] = done.tensors["values"].tolist()
        noises[name] = Noise(*done.facts["noise"])
        signal += max(0.0, done.facts["energy"] - noises[name].energy)
    costs = {name: sum(base.weights[f"{name}.weight"].shape) * options.dtype.itemsize for name in spectra}
    if options.energy is not None:
        ranks = spread(spectra, costs, energy=options.energy * signal)
    else:
        ranks = spread(spectra, costs, budget=options.budget_bytes or 0)
        if any(spectra.values()) and not any(ranks.values()):
            raise AdapterError(
                f"a budget of {options.budget_bytes} bytes is too small for a single direction of a matrix",
                hint=f"give at least {max(costs.values())} bytes",
            )
    return {name: _Plan(rank, noises[name]) for name, rank in ranks.items()}


def _spectrum(pair: _Pair, options: Options) -> Done:
    found, noise = _above_noise(pair, options)
    return Done({"values": found.singular_values_R.cpu()}, {"energy": pair.energy, "noise": list(noise)})


def _factors(pair: _Pair, plans: Mapping[str, _Plan] | None, options: Options) -> Done:
    if plans is None:
        found, noise = _above_noise(pair, options)
    else:
        rank, known = plans[pair.name]
        found = _decompose(pair, rank, options) if rank else _NOTHING
        shape = (pair.delta_OI.shape[0], pair.delta_OI.shape[1])
        noise = known or rank_above(found.singular_values_R.tolist(), pair.energy, pair.noise, shape)[1]
    rank, residual, tensors = len(found.singular_values_R), float(pair.energy > 0), {}
    if rank:
        down, up = rounded(pair.delta_OI, found.down_RI, options.dtype)
        residual = math.sqrt(squared_residual(pair.delta_OI, down, up) / pair.energy)
        tensors = {"down": down.cpu(), "up": up.cpu()}
    facts = {
        "shape": list(pair.delta_OI.shape),
        "rank": rank,
        "change": math.sqrt(pair.energy),
        "residual": residual,
        "noise_edge": noise.edge,
        "noise_share": min(1.0, noise.energy / pair.energy) if pair.energy else 0.0,
    }
    return Done(tensors, facts)


def _short_of(layers: list[LayerReport], options: Options) -> str | None:
    assert options.energy is not None
    signal = math.fsum(one.change**2 * (1 - one.noise_share) for one in layers)
    kept = math.fsum(one.change**2 * one.energy_kept for one in layers)
    if not signal or kept >= options.energy * signal * (1 - 1e-3):
        return None
    return (
        f"an energy of {options.energy:g} is out of reach: the directions above the noise, at most {LARGEST_RANK} a "
        f"matrix, hold {kept / signal:.3f}"
    )


# --- What no LoRA holds. ---


def _kind(name: str) -> str:
    if not name.startswith(("double_blocks.", "single_blocks.")):
        return name.split(".")[0]
    return "biases" if name.endswith(".bias") else "norms"


def _others(base: Checkpoint, tuned: Checkpoint) -> Iterator[tuple[Weight, Tensor]]:
    """Every tensor but the block matrices, with its change in float32."""
    for name, weight in base.weights.items():
        if not is_block_linear(name):
            delta = difference(weight.read(), tuned.weights[name].read())
            if not torch.isfinite(delta).all():
                raise ModelError(f"`{name}` of {tuned.label}, or of its base, holds NaN or infinity")
            yield weight, delta


def _left_out(base: Checkpoint, tuned: Checkpoint) -> dict[str, float]:
    shares: dict[str, float] = {}
    for weight, delta in _others(base, tuned):
        kind = _kind(weight.name)
        shares[kind] = shares.get(kind, 0.0) + squared_norm(delta)
    return shares


def leftover_tensors(base: Checkpoint, tuned: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """What no LoRA holds, as ComfyUI's generic patches: `diffusion_model.<module>.diff`, and `.diff_b` for biases.

    Tensors that did not change are left out. The scale of a norm is written under both names that ComfyUI has had for
    it; it takes the one that its model has, and says so of the other. No other tool reads such a file in full.
    """
    require_pair(base, tuned)
    tensors = {}
    for weight, delta in _others(base, tuned):
        if not delta.any():
            continue
        module, _, kind = weight.name.rpartition(".")
        key, value = f"diffusion_model.{module}", delta.to(dtype).cpu()
        if kind == "bias":
            tensors[f"{key}.diff_b"] = value
        else:
            tensors[f"{key}.diff"] = value
            if kind == "scale":
                tensors[f"{key}.scale.diff"] = value.clone()
    return tensors


# --- LoRA to smaller LoRA. ---


def resize(
    state: AdapterState, *, rank: int | None = None, energy: float | None = None, fused: bool = True
) -> AdapterState:
    """The same LoRA with fewer directions: at most `rank` a matrix, or as few as keep `energy` (0 to 1) of all ‖ΔW‖².

    `fused` matrices are those of the kohya layout, where q, k and v are one; otherwise each diffusers linear has its
    own rank. ΔW is never formed: both factors are orthogonalised, and the small core between them has the same singular
    values. AdapterError unless exactly one of `rank` and `energy` is given, or when nothing would be left.
    """
    if (rank is None) == (energy is None):
        raise AdapterError("a rank or an energy decides the size", hint="give exactly one of the two")
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1):
        raise AdapterError(f"cannot resize to {rank or energy}", hint="a rank is at least 1, an energy 0 to 1")
    layers = {name: one.layer() for name, one in fuse(state).items()} if fused else state.layers
    found = {name: _core(layer) for name, layer in layers.items()}
    if energy is None:
        ranks = dict.fromkeys(found, rank or 0)
    else:
        spectra = {name: one.singular_values_R.tolist() for name, one in found.items()}
        total = math.fsum(value**2 for values in spectra.values() for value in values)
        costs = {name: len(one.up_OR) + one.down_RI.shape[1] for name, one in found.items()}
        ranks = spread(spectra, costs, energy=energy * total)
    smaller = {
        name: LoraLayer(one.down_RI[:kept].contiguous(), one.up_OR[:, :kept].contiguous(), float(kept))
        for name, one in found.items()
        if (kept := min(ranks[name], len(one.singular_values_R)))
    }
    if not smaller:
        raise AdapterError("nothing is left: the LoRA changes nothing", hint="is it from the first step of a run?")
    return replace(state, layers=unfuse(smaller, state.layout) if fused else smaller)


def _core(layer: LoraLayer) -> Factors:
    """All directions of a layer's ΔW, balanced, in float32; none where it is zero."""
    up_OR = layer.up_OR.double() * (layer.alpha / layer.rank)
    left_OR, first_RR = torch.linalg.qr(up_OR)
    right_IR, second_RR = torch.linalg.qr(layer.down_RI.double().T)
    turn, values, back = torch.linalg.svd(first_RR @ second_RR.T, full_matrices=False)
    kept = int((values > 1e-7 * values[:1]).sum())
    root = values[:kept].sqrt()
    down_RI = (right_IR @ back[:kept].T * root).T
    return Factors(down_RI.float(), (left_OR @ turn[:, :kept] * root).float(), values[:kept].float())
