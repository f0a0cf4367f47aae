"""Low-rank factors of a weight change: spectra, the noise floor, ranks, rounding. Pure functions, on any device.

Shapes in names: O out features, I in features, R rank, K columns of a sketch (rank and oversampling).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLE = 16
POWER_ITERATIONS = 3
"""Enough for an error within 1 % of the least up to rank 128, even where all directions weigh about the same."""
_BLOCK_ROWS = 512
"""Of the passes that make temporary copies."""
_SMALLEST = 8 * torch.finfo(torch.float32).eps
"""Singular values below this share of the largest are what float32 arithmetic leaves of zero."""


class Factors(NamedTuple):
    """ΔW ≈ up @ down; the root of each singular value is in both."""

    down_RI: Tensor
    up_OR: Tensor
    singular_values_R: Tensor


class Noise(NamedTuple):
    """What rounding puts into a change."""

    energy: float
    """Expected sum of its squares."""
    edge: float
    """Singular values up to this one can be its doing."""


def low_rank(
    delta_OI: Tensor,
    rank: int,
    *,
    generator: torch.Generator,
    oversample: int = OVERSAMPLE,
    power_iterations: int = POWER_ITERATIONS,
) -> Factors:
    """The best `rank` directions of a float32 matrix, by a randomised SVD; fewer where the matrix has no more.

    Subspace iteration from a random start, orthonormalised after every product (Halko, Martinsson and Tropp 2011, arXiv
    0909.4061, algorithm 4.4), on the input side: 2 · `power_iterations` + 1 passes over the matrix. `generator` is on
    the CPU. A sketch as wide as the matrix saves nothing; `exact_low_rank` is used then.
    """
    width = min(delta_OI.shape)
    sketch = min(rank + oversample, width)
    if sketch == width:
        return exact_low_rank(delta_OI, rank)
    start_IK = torch.randn(delta_OI.shape[1], sketch, generator=generator)
    basis_IK = start_IK.to(delta_OI.device)
    for _ in range(power_iterations):
        basis_IK = _orthonormal(delta_OI.T @ _orthonormal(delta_OI @ basis_IK))
    basis_IK = basis_IK if power_iterations else _orthonormal(basis_IK)
    image_OK = delta_OI @ basis_IK
    values_K, turn_KK = _gram_eigen(image_OK)
    kept = _count_nonzero(values_K, rank)
    values_R, turn_KR = values_K[:kept], turn_KK[:, :kept]
    root_R = values_R.sqrt()
    down_RI = (basis_IK.double() @ turn_KR * root_R).T
    up_OR = image_OK.double() @ turn_KR / root_R
    return Factors(down_RI.float().contiguous(), up_OR.float(), values_R.float())


def exact_low_rank(delta_OI: Tensor, rank: int) -> Factors:
    """As `low_rank`, by a thin SVD of the whole matrix (LAPACK's, in float32)."""
    wide = delta_OI.shape[0] < delta_OI.shape[1]  # LAPACK takes tall matrices several times faster
    left, values, right = torch.linalg.svd(delta_OI.T if wide else delta_OI, full_matrices=False)
    left, right = (right.T, left.T) if wide else (left, right)
    kept = _count_nonzero(values, rank)
    root_R = values[:kept].sqrt()
    return Factors((right[:kept] * root_R[:, None]).contiguous(), left[:, :kept] * root_R, values[:kept])


def _count_nonzero(values: Tensor, rank: int) -> int:
    return int((values[:rank] > _SMALLEST * values[:1]).sum())


def _gram_eigen(tall_OK: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (descending) and right singular vectors of a tall float32 matrix, in float64.

    From its Gram matrix: in float64 that is as accurate as float32 data are, and it is one product and a small
    eigenproblem where Householder's QR takes many times as long as the passes over the matrix itself.
    """
    tall = tall_OK.double()
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    return squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)


def _orthonormal(tall_OK: Tensor) -> Tensor:
    """An orthonormal basis of the columns; directions that float32 cannot tell from rounding are left out."""
    values, vectors = _gram_eigen(tall_OK)
    used = max(1, int((values > _SMALLEST * values[:1]).sum()))
    scaled = vectors[:, :used] / values[:used].clamp_min(torch.finfo(torch.float32).tiny)
    return (tall_OK.double() @ scaled).float()


def squared_norm(values: Tensor) -> float:
    """Sum of squares: rows in float32, their sum in float64, since one float32 sum over a matrix is off by percents."""
    return float(torch.linalg.vector_norm(values, dim=-1).double().square().sum())


def squared_residual(delta_OI: Tensor, down_RI: Tensor, up_OR: Tensor) -> float:
    """‖Δ − up @ down‖², formed block by block: by the norms alone it would drown in cancellation when it is small."""
    down = down_RI.float()
    blocks = zip(torch.split(delta_OI, _BLOCK_ROWS), torch.split(up_OR, _BLOCK_ROWS), strict=True)
    return sum(squared_norm(torch.addmm(block, up.float(), down, alpha=-1)) for block, up in blocks)


def rounded(delta_OI: Tensor, down_RI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(down_RI, up_OR) in `dtype`: `down` is rounded first, `up` is what then fits Δ best (least squares), rounded.

    What rounding `down` has spoilt is mended as far as its row space allows; rounding `up` then adds its own error.
    """
    down = down_RI.to(dtype)
    used = down.double()
    inverse_RR = torch.linalg.pinv(used @ used.T, hermitian=True)
    up_OR = (delta_OI @ down.float().T).double() @ inverse_RR
    return down, up_OR.to(dtype)


# --- The noise floor. ---


def rounding_power(grid_OI: Tensor, dtype: torch.dtype, scale_O1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Expected squares of the error that rounding to `dtype` made in these values: sums over rows (O), columns (I).

    Values come rounded to the nearest number of `dtype`, times `scale_O1` where given. An error is then uniform over a
    step, step² / 12 in the mean, and a step is eps · 2^exponent.
    """
    about = torch.finfo(dtype)
    ones_I = torch.ones(grid_OI.shape[1], device=grid_OI.device)
    rows, columns_I = [], torch.zeros_like(ones_I, dtype=torch.float64)
    for start in range(0, grid_OI.shape[0], _BLOCK_ROWS):
        block = grid_OI[start : start + _BLOCK_ROWS]
        powers = _power_of_two(block)
        if about.smallest_normal > torch.finfo(torch.bfloat16).smallest_normal:  # fp16, fp8: subnormals do occur
            powers = powers.clamp_min_(about.smallest_normal)
        if scale_O1 is not None:
            powers = powers.mul_(scale_O1[start : start + _BLOCK_ROWS])
        squares = powers.square_()
        rows.append(squares @ ones_I)
        columns_I += ones_I.new_ones(len(block)) @ squares
    factor = about.eps**2 / 12
    return torch.cat(rows).double() * factor, columns_I * factor


def _power_of_two(values: Tensor) -> Tensor:
    """2^exponent of each value, float32; 0 for 0. The exponent's bits alone are that number."""
    if values.dtype is torch.bfloat16:
        return values.view(torch.int16).bitwise_and(0x7F80).view(torch.bfloat16).float()
    return values.float().view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)


def noise_of(row_power_O: Tensor, column_power_I: Tensor) -> Noise:
    """The noise whose entries have these expected squares, summed over rows and over columns.

    Where all entries are alike, the largest singular value of such a matrix is sigma (√O + √I), the edge of Marchenko
    and Pastur; where they are not, the root of the heaviest row and that of the heaviest column take their places
    (Bandeira and van Handel 2016, arXiv 1408.6185). A direction just above that edge is still mostly noise; it is worth
    keeping from the optimal hard threshold on, which lies up to 1.41 times higher (Gavish and Donoho 2014, arXiv
    1305.5870, eq. 11).
    """
    aspect = min(len(row_power_O), len(column_power_I)) / max(len(row_power_O), len(column_power_I))
    optimal = math.sqrt(2 * (aspect + 1) + 8 * aspect / (aspect + 1 + math.sqrt(aspect**2 + 14 * aspect + 1)))
    bulk = math.sqrt(float(row_power_O.max())) + math.sqrt(float(column_power_I.max()))
    return Noise(float(row_power_O.sum()), bulk * optimal / (1 + math.sqrt(aspect)))


def rank_above(values: Sequence[float], energy: float, noise: Noise, shape: tuple[int, int]) -> tuple[int, Noise]:
    """How many of the leading singular values `values` (descending) rise above the noise, and the noise as it is.

    `energy` is the whole matrix's sum of squares. The expected noise is an upper bound: a base that was not rounded
    adds none, and a change below half a step leaves no trace. There cannot be more of it than what is left when the
    directions above it are taken out, so it is scaled down to that, until nothing changes.
    """
    rank, actual = -1, noise
    while (above := sum(value > actual.edge for value in values)) > rank:
        rank = above
        left = max(energy - sum(value**2 for value in values[:rank]), 1e-6 * energy)
        freedom = max(1, (shape[0] - rank) * (shape[1] - rank)) / (shape[0] * shape[1])
        share = min(1.0, left / (freedom * noise.energy)) if noise.energy else 0.0
        actual = Noise(noise.energy * share, noise.edge * math.sqrt(share))
    return rank, actual


# --- Ranks under one budget. ---


def spread(
    spectra: Mapping[str, Sequence[float]],
    costs: Mapping[str, int],
    *,
    budget: float = math.inf,
    energy: float = math.inf,
) -> dict[str, int]:
    """Ranks for all matrices: directions are taken by what they keep per number stored, s² / cost, dearest last.

    Stops at the first that `budget` (in units of cost) does not hold, or once `energy` (a sum of s²) is kept. As
    spectra fall, no other choice of that cost keeps more.
    """
    offers = sorted(
        (-(value**2) / costs[name], name, index)
        for name, values in spectra.items()
        for index, value in enumerate(values)
    )
    ranks = dict.fromkeys(spectra, 0)
    spent, kept = 0, 0.0
    for gain, name, _ in offers:
        if kept >= energy or spent + costs[name] > budget:
            break
        ranks[name] += 1
        spent += costs[name]
        kept -= gain * costs[name]
    return ranks
