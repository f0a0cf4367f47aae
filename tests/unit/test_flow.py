"""Flow matching: closed forms, ends, and draws that depend on their key alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flux_ft import flow


def test_a_key_gives_one_noise_whatever_came_before():
    first = flow.draw_noise((4, 8, 8), flow.keyed_generator(3, 10, 2))
    torch.manual_seed(123)
    torch.rand(100)
    again = flow.draw_noise((4, 8, 8), flow.keyed_generator(3, 10, 2))
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"


def test_drawing_leaves_the_global_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    flow.draw_sigma(flow.keyed_generator(1, 2), 0.5)
    flow.draw_noise((2, 2), flow.keyed_generator(1, 2))
    assert torch.equal(torch.rand(3), expected)


def test_keys_do_not_run_together():
    keys = [
        (0,),
        (1,),
        (0, 1),
        (1, 0),
        (0, 1, 2),
        (0, 12),
        (0, 1, "2x"),
        (0, "lora", "a"),
        (0, "lora", "b"),
        (2**63 - 1, 1),
    ]
    draws = {float(torch.rand((), generator=flow.keyed_generator(*key), dtype=torch.float64)) for key in keys}
    assert len(draws) == len(keys)


def test_noise_is_standard_normal():
    noise = torch.stack([flow.draw_noise((16, 16), flow.keyed_generator(0, 0, slot)) for slot in range(200)])
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    neighbours = (noise[:-1] * noise[1:]).mean()
    assert float(neighbours) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.15])
def test_sigmas_are_logit_normal_around_the_shift(mu):
    sigmas = torch.stack([flow.draw_sigma(flow.keyed_generator(1, step, 0), mu) for step in range(4000)])
    assert sigmas.dtype == torch.float32
    assert 0 < float(sigmas.min()) < float(sigmas.max()) < 1
    logits = torch.logit(sigmas.double())
    # The shift moves the logit by mu and keeps its spread: e^mu·s / (1 + (e^mu − 1)·s) has logit(s) + mu.
    assert float(logits.mean()) == pytest.approx(mu, abs=0.06)
    assert float(logits.std()) == pytest.approx(1, abs=0.05)


@given(st.floats(0, 1), st.floats(-2, 3))
def test_shift_is_the_written_formula(sigma, mu):
    shifted = float(flow.shift_sigma(torch.tensor(sigma, dtype=torch.float64), mu))
    expected = 0.0 if sigma == 0 else math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)
    assert shifted == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert 0 <= shifted <= 1


@given(st.floats(0.001, 0.999), st.floats(-2, 3), st.floats(-2, 3))
def test_shifts_add_up(sigma, first, second):
    value = torch.tensor(sigma, dtype=torch.float64)
    twice = flow.shift_sigma(flow.shift_sigma(value, first), second)
    assert float(twice) == pytest.approx(float(flow.shift_sigma(value, first + second)), rel=1e-9)


def test_no_shift_changes_nothing():
    sigmas = torch.linspace(0, 1, 11)
    torch.testing.assert_close(flow.shift_sigma(sigmas, 0.0), sigmas, rtol=1e-7, atol=0)


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (2176, 0.825)])
def test_resolution_mu_is_a_line_through_two_points(tokens, mu):
    assert flow.resolution_mu(tokens) == pytest.approx(mu)


@given(st.integers(1, 60), st.floats(0, 1.2))
def test_sampling_sigmas_fall_from_one_to_zero(steps, mu):
    sigmas = flow.sampling_sigmas(steps, mu)
    assert len(sigmas) == steps + 1
    assert sigmas.dtype == torch.float32
    assert float(sigmas[0]) == 1
    assert float(sigmas[-1]) == 0
    assert (sigmas[1:] < sigmas[:-1]).all()


def test_unshifted_sampling_sigmas_are_even():
    torch.testing.assert_close(flow.sampling_sigmas(4, 0.0), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_interpolation_ends_and_slope():
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(flow.interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(flow.interpolate(x0, noise, torch.ones(3)), noise)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    z = flow.interpolate(x0, noise, sigma)
    for row in range(3):
        torch.testing.assert_close(z[row], (1 - sigma[row]) * x0[row] + sigma[row] * noise[row])
    # Walking the velocity from z back by sigma gives x0.
    back = z - sigma.view(-1, 1, 1, 1) * flow.velocity_target(x0, noise)
    torch.testing.assert_close(back, x0, rtol=1e-5, atol=1e-6)


def test_loss_is_one_float32_mean_for_each_row():
    target = torch.zeros(2, 1, 2, 2)
    predicted = torch.stack([torch.full((1, 2, 2), 2.0), torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])])
    loss = flow.velocity_loss(predicted.bfloat16(), target.bfloat16())
    assert loss.tolist() == [4.0, 2.5]
    assert loss.dtype == torch.float32


def test_a_weighted_loss_is_the_mean_over_channels_and_places():
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    weight = torch.rand(2, 4, 5, generator=generator)
    found = flow.velocity_loss(predicted, target, weight)
    for row in range(2):
        total = 0.0
        for channel in range(3):
            for y in range(4):
                for x in range(5):
                    error = float(predicted[row, channel, y, x]) - float(target[row, channel, y, x])
                    total += float(weight[row, y, x]) * error**2
        assert float(found[row]) == pytest.approx(total / 60, rel=1e-5)
    assert torch.equal(
        flow.velocity_loss(predicted, target, torch.ones(2, 4, 5)), flow.velocity_loss(predicted, target)
    )


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6).filter(lambda mask: max(mask) > 1e-3), st.floats(0, 1))
def test_mask_weights_are_the_written_formula(mask, unmasked):
    found = flow.mask_weights(torch.tensor(mask).view(2, 3), unmasked)
    raw = [unmasked + (1 - unmasked) * value for value in torch.tensor(mask).tolist()]
    expected = [value / (sum(raw) / 6) for value in raw]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.dtype == torch.float32
    assert float(found.double().mean()) == pytest.approx(1, abs=1e-6)


@given(st.floats(0, 1))
def test_an_all_white_mask_is_no_mask(unmasked):
    assert torch.equal(flow.mask_weights(torch.ones(7, 9), unmasked), torch.ones(7, 9))
