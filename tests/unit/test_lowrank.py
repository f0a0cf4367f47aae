"""The numerics of extraction against exact float64 SVDs, on shapes of FLUX.1: scaled down always, real on request.

Shapes in names: O out features, I in features, R rank.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flux_ft.adapters.lowrank import (
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

WIDTH, REAL_WIDTH = 192, 3072
UNITS = [(1, 1), (3, 1), (4, 1), (1, 4), (6, 1), (7, 1), (1, 5)]
"""Every block linear of FLUX.1, in units of its width: proj, qkv and the singles' modulation, mlp.0, mlp.2, the
doubles' modulation, linear1, linear2."""
SHAPES = [(out * WIDTH, into * WIDTH) for out, into in UNITS]
REAL_SHAPES = [(out * REAL_WIDTH, into * REAL_WIDTH) for out, into in UNITS]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_rank(shape: tuple[int, int], rank: int, seed: int = 1) -> Tensor:
    """Entries of about 1."""
    up = torch.randn(shape[0], rank, generator=rng(seed))
    return up @ torch.randn(rank, shape[1], generator=rng(seed + 1)) / rank**0.5


def with_spectrum(shape: tuple[int, int], values: Tensor, seed: int = 3) -> Tensor:
    """A float64 matrix with these singular values."""
    count = len(values)
    left = torch.linalg.qr(torch.randn(shape[0], count, generator=rng(seed), dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(shape[1], count, generator=rng(seed + 1), dtype=torch.float64))[0]
    return (left * values) @ right.T


def relative_residual(delta_OI: Tensor, down_RI: Tensor, up_OR: Tensor) -> float:
    """In float64, formed as a whole."""
    gap = delta_OI.double() - up_OR.double() @ down_RI.double()
    return float(torch.linalg.norm(gap) / torch.linalg.norm(delta_OI.double()))


def decompose(delta_OI: Tensor, rank: int, exact: bool) -> Factors:
    return exact_low_rank(delta_OI, rank) if exact else low_rank(delta_OI, rank, generator=rng(9))


class TestLowRank:
    @pytest.mark.parametrize("exact", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_a_change_of_rank_r_comes_back_at_rank_r(self, shape: tuple[int, int], exact: bool) -> None:
        delta = of_rank(shape, 16)
        found = decompose(delta, 16, exact)
        assert found.down_RI.shape == (16, shape[1])
        assert found.up_OR.shape == (shape[0], 16)
        assert relative_residual(delta, found.down_RI, found.up_OR) < 1e-5

    @pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_no_loss_at_any_size_of_the_change(self, size: float, dtype: torch.dtype) -> None:
        """A heavy-tailed change, whose largest factors a clamp would cut."""
        delta = size * with_spectrum(SHAPES[0], torch.logspace(0, -3, 16, dtype=torch.float64)).float()
        delta[:3] *= 30
        found = low_rank(delta, 16, generator=rng())
        down, up = rounded(delta, found.down_RI, dtype)
        assert relative_residual(delta, down, up) < (1e-5 if dtype is torch.float32 else 4e-3)

    @pytest.mark.parametrize("spectrum", ["power law", "exponential", "low rank and noise", "flat noise"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_at_lower_rank_the_error_is_near_the_least(self, shape: tuple[int, int], spectrum: str) -> None:
        count, rank = min(shape), 16
        index = torch.arange(1, count + 1, dtype=torch.float64)
        if spectrum == "power law":
            delta = with_spectrum(shape, index**-0.7)
        elif spectrum == "exponential":
            delta = with_spectrum(shape, torch.exp(-index / 12))
        else:
            noise = torch.randn(shape, generator=rng(5), dtype=torch.float64)
            delta = noise + (3 * of_rank(shape, 8).double() if spectrum == "low rank and noise" else 0)
        values = torch.linalg.svdvals(delta)
        least = float(values[rank:].square().sum().sqrt() / torch.linalg.norm(delta))
        found = low_rank(delta.float(), rank, generator=rng(9))
        assert least <= relative_residual(delta, found.down_RI, found.up_OR) * (1 + 1e-6)
        assert relative_residual(delta, found.down_RI, found.up_OR) <= 1.01 * least

    def test_singular_values(self) -> None:
        delta = with_spectrum(SHAPES[3], torch.logspace(0, -4, 24, dtype=torch.float64)).float()
        expected = torch.logspace(0, -4, 24, dtype=torch.float64)
        for exact in (False, True):
            found = decompose(delta, 24, exact)
            torch.testing.assert_close(found.singular_values_R.double(), expected, rtol=1e-3, atol=1e-6)

    @pytest.mark.parametrize("exact", [False, True])
    def test_balanced(self, exact: bool) -> None:
        found = decompose(of_rank(SHAPES[2], 16), 8, exact)
        torch.testing.assert_close(found.down_RI.norm(dim=1).square(), found.singular_values_R, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.up_OR.norm(dim=0).square(), found.singular_values_R, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("exact", [False, True])
    def test_no_more_directions_than_there_are(self, exact: bool) -> None:
        assert len(decompose(of_rank(SHAPES[0], 3), 32, exact).singular_values_R) == 3
        assert decompose(torch.zeros(64, 48), 8, exact).up_OR.shape == (64, 0)
        assert decompose(torch.ones(5, 4), 256, exact).down_RI.shape == (1, 4)

    def test_one_seed_gives_one_result(self) -> None:
        delta = of_rank(SHAPES[1], 64)
        first, second = (low_rank(delta, 8, generator=rng(4)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(low_rank(delta, 8, generator=rng(5)).down_RI, first.down_RI)

    def test_power_iterations_help(self) -> None:
        delta = torch.randn(SHAPES[0], generator=rng(5))
        errors = [
            relative_residual(delta, found.down_RI, found.up_OR)
            for power in (0, 1, 2, 4)
            if (found := low_rank(delta, 16, generator=rng(), power_iterations=power, oversample=4))
        ]
        assert errors == sorted(errors, reverse=True)


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_the_correction_is_never_worse(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        for seed in range(3):
            delta = of_rank(shape, 16, seed=10 * seed) + 0.1 * torch.randn(shape, generator=rng(seed))
            found = low_rank(delta, 16, generator=rng(seed))
            down, up = rounded(delta, found.down_RI, dtype)
            assert down.dtype == up.dtype == dtype
            plain = squared_residual(delta, found.down_RI.to(dtype), found.up_OR.to(dtype))
            assert squared_residual(delta, down, up) <= plain

    def test_it_mends_what_rounding_down_spoils(self) -> None:
        """Before `up` is rounded, nothing is lost to a rounded `down` of full row space."""
        delta = torch.randn(400, 24, generator=rng())
        found = exact_low_rank(delta, 24)
        down = found.down_RI.bfloat16()
        _, up = rounded(delta, down.float(), torch.float32)
        assert relative_residual(delta, down, up) < 1e-5
        assert relative_residual(delta, down, found.up_OR) > 1e-3

    def test_rows_that_did_not_change_stay_exactly_zero(self) -> None:
        delta = of_rank(SHAPES[1], 4)
        delta[100:200] = 0
        found = low_rank(delta, 4, generator=rng())
        assert not rounded(delta, found.down_RI, torch.bfloat16)[1][100:200].any()

    def test_factors_below_the_type(self) -> None:
        delta = of_rank((64, 48), 4) * 1e-20
        found = low_rank(delta, 4, generator=rng())
        down, up = rounded(delta, found.down_RI, torch.float16)
        assert torch.isfinite(down).all()
        assert torch.isfinite(up).all()

    @pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6])
    def test_the_residual_is_exact(self, share: float) -> None:
        found = exact_low_rank(of_rank(SHAPES[6], 8), 8)
        delta = (found.up_OR.double() @ found.down_RI.double()) + share * torch.randn(
            SHAPES[6], generator=rng(), dtype=torch.float64
        )
        delta = delta.float()
        got = math.sqrt(squared_residual(delta, found.down_RI, found.up_OR) / squared_norm(delta))
        expected = relative_residual(delta, found.down_RI, found.up_OR)
        assert got == pytest.approx(expected, rel=1e-4 if share > 1e-5 else 0.1)

    def test_norms_of_large_matrices(self) -> None:
        values = torch.full((3000, 2000), 0.1)
        assert squared_norm(values) == pytest.approx(float(values.double().square().sum()), rel=1e-6)


NOISY = {torch.bfloat16: 0.02, torch.float16: 0.02, torch.float8_e4m3fn: 2.0, torch.float8_e5m2: 2.0}


class TestNoise:
    @pytest.mark.parametrize("dtype", NOISY, ids=str)
    def test_the_power_of_rounding(self, dtype: torch.dtype) -> None:
        exact = NOISY[dtype] * torch.randn(400, 300, generator=rng())
        grid = exact.to(dtype)
        squares = (grid.float() - exact).square()
        rows, columns = rounding_power(grid, dtype)
        coarse = (
            dtype.itemsize == 1
        )  # a value just below a power of two is rounded up to it, and then shows larger steps
        assert float(rows.sum()) == pytest.approx(float(squares.sum()), rel=0.2 if coarse else 0.03)
        torch.testing.assert_close(rows, squares.sum(1).double(), rtol=0.8, atol=0)
        torch.testing.assert_close(columns, squares.sum(0).double(), rtol=0.8, atol=0)
        assert float(columns.sum()) == pytest.approx(float(rows.sum()))

    def test_scales_count(self) -> None:
        exact = 0.02 * torch.randn(300, 200, generator=rng()) * torch.logspace(-2, 2, 300)[:, None]
        scale = exact.abs().amax(1, keepdim=True) / 448
        grid = (exact / scale).to(torch.float8_e4m3fn)
        squares = (grid.float() * scale - exact).square()
        rows, _ = rounding_power(grid, torch.float8_e4m3fn, scale)
        torch.testing.assert_close(rows, squares.sum(1).double(), rtol=0.8, atol=0)
        assert float(rows.log().mean().exp()) == pytest.approx(float(squares.sum(1).log().mean().exp()), rel=0.2)

    def test_powers_of_two(self) -> None:
        values = torch.tensor([[1.0, 1.5, -2.0, 0.75, 0.0, -1e-3]])
        expected = torch.tensor([1.0, 1.0, 2.0, 0.5, 0.0, 2**-10]).double()
        for dtype in (torch.float32, torch.bfloat16):
            _, columns = rounding_power(values.to(dtype), dtype)
            torch.testing.assert_close(columns, (expected * torch.finfo(dtype).eps) ** 2 / 12, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("uneven", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_nothing_but_noise_lies_below_the_edge(self, shape: tuple[int, int], uneven: bool) -> None:
        """And, where all entries are alike, not far below it."""
        weights = 0.02 * torch.randn(shape, generator=rng())
        if uneven:
            weights *= torch.logspace(-1, 1, shape[0])[:, None]
        noise = weights.bfloat16().float() - weights
        top = float(torch.linalg.matrix_norm(noise, 2))
        found = noise_of(*rounding_power(weights.bfloat16(), torch.bfloat16))
        assert top < found.edge
        assert uneven or found.edge < 1.45 * top
        assert found.energy == pytest.approx(squared_norm(noise), rel=0.05)

    @pytest.mark.parametrize(
        ("size", "rounds"),
        [(2e-5, "tuned"), (5e-5, "tuned"), (2e-4, "tuned"), (1e-3, "tuned"), (2e-4, "both"), (1e-3, "both")],
    )
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_the_true_rank_is_found_under_bf16(self, shape: tuple[int, int], size: float, rounds: str) -> None:
        rank = 8
        exact = 0.02 * torch.randn(shape, generator=rng(1))
        base = exact.bfloat16()
        start = base.float() if rounds == "tuned" else exact
        tuned = (start + size * of_rank(shape, rank)).bfloat16()
        delta = tuned.float() - base.float()
        (rows, columns), (more, further) = (rounding_power(one, torch.bfloat16) for one in (base, tuned))
        expected = noise_of(rows + more, columns + further)
        values = low_rank(delta, 40, generator=rng(2)).singular_values_R.tolist()
        found, noise = rank_above(values, squared_norm(delta), expected, shape)
        assert found == rank
        actual = squared_norm(delta - size * of_rank(shape, rank))
        if size > 1e-4:  # a smaller change is below half a step of most weights, so that its error is part of it
            assert noise.energy == pytest.approx(actual, rel=0.15)

    def test_without_rounding_all_that_is_there_is_kept(self) -> None:
        delta = of_rank(SHAPES[0], 12)
        values = exact_low_rank(delta, 40).singular_values_R.tolist()
        assert rank_above(values, squared_norm(delta), Noise(1e-12, 1e-9), SHAPES[0])[0] == 12
        assert rank_above([], 0.0, Noise(0.0, 0.0), (4, 4))[0] == 0

    def test_noise_alone_has_no_rank(self) -> None:
        weights = 0.02 * torch.randn(SHAPES[0], generator=rng())
        delta = weights.bfloat16().float() - weights
        noise = noise_of(*rounding_power(weights.bfloat16(), torch.bfloat16))
        values = exact_low_rank(delta, 40).singular_values_R.tolist()
        assert rank_above(values, squared_norm(delta), noise, SHAPES[0])[0] == 0


def choices(spectra: dict[str, list[float]], costs: dict[str, int]) -> list[tuple[int, float]]:
    """(cost, kept) of every possible choice of ranks."""
    found = []
    for ranks in itertools.product(*(range(len(values) + 1) for values in spectra.values())):
        cost = sum(rank * costs[name] for rank, name in zip(ranks, spectra, strict=True))
        kept = sum(sum(v**2 for v in values[:rank]) for rank, values in zip(ranks, spectra.values(), strict=True))
        found.append((cost, kept))
    return found


class TestSpread:
    @pytest.mark.parametrize("seed", range(20))
    def test_no_other_choice_of_that_cost_keeps_more(self, seed: int) -> None:
        generator = rng(seed)
        spectra = {
            name: sorted(torch.rand(4, generator=generator).tolist(), reverse=True) for name in ("a", "b", "c", "d")
        }
        costs = {name: int(torch.randint(1, 9, (), generator=generator)) for name in spectra}
        everything = choices(spectra, costs)
        total = max(kept for _, kept in everything)

        def measured(ranks: dict[str, int]) -> tuple[int, float]:
            kept = sum(sum(value**2 for value in spectra[name][:rank]) for name, rank in ranks.items())
            return sum(rank * costs[name] for name, rank in ranks.items()), kept

        for budget in (0, 5, 17, 40, 1000):
            cost, kept = measured(spread(spectra, costs, budget=budget))
            assert cost <= budget
            assert kept >= max(other for price, other in everything if price <= cost) - 1e-9
            assert budget < 1000 or kept == pytest.approx(total)
        for energy in (0.1, 0.5, 0.9, 1.0):
            cost, kept = measured(spread(spectra, costs, energy=energy * total))
            assert kept >= energy * total - 1e-9
            # The last direction may be larger than what was missing; without it the energy is not reached.
            assert all(price > cost - max(costs.values()) for price, other in everything if other > kept - 1e-9)

    def test_equal_costs_are_the_best_choice_of_all(self) -> None:
        spectra = {name: sorted(torch.rand(5, generator=rng(7)).tolist(), reverse=True) for name in "abc"}
        for budget in range(16):
            ranks = spread(spectra, dict.fromkeys("abc", 1), budget=budget)
            kept = sum(sum(value**2 for value in spectra[name][:rank]) for name, rank in ranks.items())
            assert kept == pytest.approx(max(k for c, k in choices(spectra, dict.fromkeys("abc", 1)) if c <= budget))

    def test_nothing_to_spread(self) -> None:
        assert spread({"a": []}, {"a": 3}, energy=1.0) == {"a": 0}


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("FLUX_FT_FULL") != "1", reason="takes minutes; set FLUX_FT_FULL=1")
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
class TestRealShapes:
    """The same at FLUX.1's own sizes."""

    @pytest.fixture(autouse=True)
    def all_cores(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)
        yield
        torch.set_num_threads(before)

    def test_a_change_of_rank_r_comes_back_at_rank_r(self, shape: tuple[int, int]) -> None:
        delta = 1e-4 * of_rank(shape, 32)
        found = low_rank(delta, 32, generator=rng(9))
        assert math.sqrt(squared_residual(delta, found.down_RI, found.up_OR) / squared_norm(delta)) < 1e-5
        down, up = rounded(delta, found.down_RI, torch.float32)
        assert math.sqrt(squared_residual(delta, down, up) / squared_norm(delta)) < 1e-5

    @pytest.mark.parametrize("noise", [0.0, 0.3, 30.0])
    def test_at_lower_rank_the_error_is_near_the_least(self, shape: tuple[int, int], noise: float) -> None:
        up = torch.randn(shape[0], 512, generator=rng(1)) * torch.arange(1, 513) ** -0.7
        delta = up @ torch.randn(512, shape[1], generator=rng(2)) / 2
        delta += noise * torch.randn(shape, generator=rng(3))
        squares = torch.linalg.svdvals(delta if shape[0] > shape[1] else delta.T).double().square()
        for rank in (16, 32, 128):
            least = math.sqrt(float(squares[rank:].sum() / squares.sum()))
            found = low_rank(delta, rank, generator=rng(9))
            assert math.sqrt(squared_residual(delta, found.down_RI, found.up_OR) / squared_norm(delta)) <= 1.01 * least

    @pytest.mark.parametrize("size", [2e-5, 1e-4])
    def test_the_true_rank_is_found_under_bf16(self, shape: tuple[int, int], size: float) -> None:
        base = (0.02 * torch.randn(shape, generator=rng(1))).bfloat16()
        tuned = (base + size * of_rank(shape, 32)).bfloat16()
        delta = tuned.float() - base
        (rows, columns), (more, further) = (rounding_power(one, torch.bfloat16) for one in (base, tuned))
        values = low_rank(delta, 64, generator=rng(2)).singular_values_R.tolist()
        assert rank_above(values, squared_norm(delta), noise_of(rows + more, columns + further), shape)[0] == 32
