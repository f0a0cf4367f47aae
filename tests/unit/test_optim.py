"""Learning-rate schedules in closed form, and the optimizer table."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flux_ft.config import OptimConfig, ScheduleConfig
from flux_ft.train.optim import OPTIMIZERS, SCHEDULES, rate_factor, set_rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_shapes_without_warmup(schedule, expected):
    assert [rate_factor(schedule, step, 4, 0) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_evenly_and_is_followed_by_the_peak(schedule):
    factors = [rate_factor(schedule, step, 12, 4) for step in range(12)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1.0
    assert factors[0] > 0
    assert factors[4:] == pytest.approx([rate_factor(schedule, step, 8, 0) for step in range(8)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_all_warmup(schedule):
    assert [rate_factor(schedule, step, 3, 3) for step in range(3)] == pytest.approx([0.25, 0.5, 0.75])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_learns(schedule):
    assert rate_factor(schedule, 0, 1, 0) == 1.0


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 2000), st.data())
def test_factors_stay_above_zero_and_at_most_one(schedule, steps, data):
    warmup = data.draw(st.integers(0, steps))
    step = data.draw(st.integers(0, steps - 1))
    assert 0 < rate_factor(schedule, step, steps, warmup) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_never_rises_after_the_peak(schedule):
    factors = [rate_factor(schedule, step, 50, 7) for step in range(7, 50)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_step_alone_decides(schedule):
    """A resumed run asks for later steps first and gets what a straight one got."""
    straight = [rate_factor(schedule, step, 20, 5) for step in range(20)]
    resumed = [rate_factor(schedule, step, 20, 5) for step in reversed(range(20))]
    assert straight == resumed[::-1]


def test_every_setting_has_its_row():
    assert set(SCHEDULES) == set(ScheduleConfig.model_json_schema()["properties"]["name"]["enum"])
    assert OptimConfig().name in OPTIMIZERS


def test_set_rate_reaches_every_group():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [one]} for one in weights], lr=1.0)
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_adamw_takes_its_settings_and_steps_as_published():
    optim = OptimConfig(weight_decay=0.1, betas=(0.8, 0.95))
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = OPTIMIZERS["adamw"]([weight], 0.01, optim)
    mean, square, value = torch.zeros(2), torch.zeros(2), weight.detach().clone()
    for step, gradient in enumerate((torch.tensor([0.5, -2.0]), torch.tensor([0.1, 1.0])), start=1):
        weight.grad = gradient.clone()
        optimizer.step()
        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
        value = value * (1 - 0.01 * 0.1)
        value = value - 0.01 * (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), value, rtol=1e-6, atol=1e-7)
