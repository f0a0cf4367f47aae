"""The estimator of FLUX.1-dev's full size on a GPU, one for all tests, since it remembers what it has measured."""

from __future__ import annotations

from functools import cache

from _random_flux import FULL_SIZE

from flux_ft.train.estimate import Estimator


@cache
def full_size() -> Estimator:
    return Estimator(FULL_SIZE, "cuda")
