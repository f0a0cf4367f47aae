"""Learning-rate schedules in closed form, the optimizer table, rounding to bf16, fused updates and the average.

bf16 keeps 8 bits of a number: between 2^e and 2^(e+1) its values lie 2^(e-7) apart. Most weights here are between 1 and
2, so 2^-7 apart, and are moved by about 1e-5, four hundred times less than half of that.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flux_ft.config import FullConfig, OptimConfig, ScheduleConfig
from flux_ft.errors import ConfigError
from flux_ft.flow import keyed_generator
from flux_ft.train.checkpoint import About, save
from flux_ft.train.optim import (
    LARGE_PARAMETERS,
    OPTIMIZERS,
    ROUNDINGS,
    SCHEDULES,
    Average,
    Updates,
    rate_factor,
    resolve_optimizer,
    set_rate,
    stochastic_round,
)
from flux_ft.train.restore import read_into
from flux_ft.train.resume import snapshot
from flux_ft.train.setup import TrainState

FP32, BF16 = torch.float32, torch.bfloat16
NEEDS = {name: row.requires for name, row in OPTIMIZERS.items()}


def optimizer_named(name: str, rate: float = 1e-5, **settings: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """A factory as `Updates` takes it; skips the test where the optimizer's package is not installed."""
    if NEEDS[name] is not None:
        pytest.importorskip(NEEDS[name])
    return lambda parameters: OPTIMIZERS[name].make(parameters, rate, OptimConfig(**settings))


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
    assert {"auto", *OPTIMIZERS} == set(OptimConfig.model_json_schema()["properties"]["name"]["enum"])
    assert set(ROUNDINGS) == set(FullConfig.model_json_schema()["properties"]["rounding"]["enum"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_is_named_is_taken_whatever_the_size(name):
    assert {resolve_optimizer(name, trained) for trained in (1, 10**12)} == {name}


def test_auto_is_adamw_until_its_state_would_not_fit_a_card():
    assert resolve_optimizer("auto", LARGE_PARAMETERS - 1) == "adamw"
    assert resolve_optimizer("auto", LARGE_PARAMETERS) == "adafactor"


def test_shards_are_moved_by_an_optimizer_that_takes_rows():
    assert resolve_optimizer("auto", 10**12, shards=2) == "adamw"
    for name, row in OPTIMIZERS.items():
        if row.takes_rows:
            assert resolve_optimizer(name, 10**12, shards=2) == name
    with pytest.raises(ConfigError, match=r"`optim.name: adafactor` factorises whole matrices") as refused:
        resolve_optimizer("adafactor", 1, shards=2)
    assert "adamw or adamw8bit" in str(refused.value.hint)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_knows_which_optimizers_take_rows(name):
    """The halves of a matrix, each moved alone, against the matrix at once; 8 bits come in blocks of 256 numbers."""
    rows, columns = 64, 256
    gradient = torch.randn(rows, columns, generator=keyed_generator(0, "gradient"))
    gradient *= torch.linspace(0.1, 2, rows)[:, None]
    weights = [nn.Parameter(torch.ones(count, columns)) for count in (rows, rows // 2, rows // 2)]
    for weight, part in zip(weights, (gradient, gradient[: rows // 2], gradient[rows // 2 :]), strict=True):
        weight.grad = part.clone()
        optimizer_named(name, rate=0.1)([weight]).step()
    same = torch.equal(weights[0].data, torch.cat([one.data for one in weights[1:]]))
    assert same == OPTIMIZERS[name].takes_rows


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_states_size_is_as_the_table_says(name):
    """Of a matrix of FLUX.1's width in one direction; single numbers beside it do not count."""
    weight = nn.Parameter(torch.ones(3072, 96))
    optimizer = optimizer_named(name)([weight])
    weight.grad = torch.randn(weight.shape, generator=keyed_generator(0, "gradient"))
    optimizer.step()
    state = optimizer.state[weight]
    tables = {key for key, value in state.items() if torch.is_tensor(value) and key.startswith("qmap")}  # are shared
    held = sum(value.nbytes for key, value in state.items() if torch.is_tensor(value) and key not in tables)
    assert held / weight.numel() == pytest.approx(OPTIMIZERS[name].state_bytes, rel=0.03, abs=0.05)


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.takes_rows])
def test_the_table_knows_which_state_is_in_blocks(name):
    """All other state is of the weight's shape, or a single number, so that shards can be cut anew."""
    weight = nn.Parameter(torch.ones(128, 256))
    updates = Updates({"weight": weight}, optimizer_named(name))
    weight.grad = torch.ones_like(weight)
    updates.finish()
    state = [value for value in updates.optimizer_state("weight").values() if torch.is_tensor(value)]
    alike = all(value.ndim == 0 or value.shape == weight.shape for value in state)
    assert len(state) > 1
    assert alike != OPTIMIZERS[name].in_blocks


def test_set_rate_reaches_every_group():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [one]} for one in weights], lr=1.0)
    set_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_adamw_takes_its_settings_and_steps_as_published():
    optim = OptimConfig(weight_decay=0.1, betas=(0.8, 0.95))
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = OPTIMIZERS["adamw"].make([weight], 0.01, optim)
    mean, square, value = torch.zeros(2), torch.zeros(2), weight.detach().clone()
    for step, gradient in enumerate((torch.tensor([0.5, -2.0]), torch.tensor([0.1, 1.0])), start=1):
        weight.grad = gradient.clone()
        optimizer.step()
        mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
        value = value * (1 - 0.01 * 0.1)
        value = value - 0.01 * (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_rate_and_weight_decay(name):
    """With a gradient of zero, what is left of a step is decay: the weights shrink by rate times decay, and no more."""
    weight = nn.Parameter(torch.full((64, 96), 2.0))
    optimizer = optimizer_named(name, rate=0.01, weight_decay=0.1)([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((64, 96), 2.0 * (1 - 0.001)), rtol=1e-6, atol=0)


# --- Stochastic rounding. ---


def every_bf16() -> Tensor:
    """All 65,536 patterns of bf16 but those that are no number."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)
    return patterns[~patterns.isnan()]


def neighbours(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 values towards zero and away from it, as float32."""
    near = wide.view(torch.int32).bitwise_and(-(1 << 16))
    return near.view(FP32), (near + (1 << 16)).view(FP32)


def test_what_bf16_holds_stays_to_the_bit_infinities_and_both_zeros_too():
    exact = every_bf16()
    assert exact.isinf().sum() == 2
    for seed in range(5):
        rounded = stochastic_round(exact.float(), keyed_generator(seed))
        assert rounded.dtype is BF16
        assert torch.equal(rounded.view(torch.int16), exact.view(torch.int16))


def test_rounding_goes_to_one_of_the_two_neighbours_and_to_both():
    generator = keyed_generator(0, "numbers")
    bits = torch.randint(-(1 << 31), 1 << 31, (20_000,), generator=generator).to(torch.int32).view(FP32)
    wide = bits[bits.isfinite() & (bits != neighbours(bits)[0])]
    near, far = neighbours(wide)
    rounded = stochastic_round(wide, keyed_generator(1)).float()
    assert ((rounded == near) | (rounded == far)).all()
    assert 0.45 < float((rounded == far).float().mean()) < 0.55  # of numbers whose lower halves are uniform
    assert len(wide) > 19_000


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [1 / 65536, 0.001, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("near", [1.0, 1.9921875, 0.02, 3e-38, 1.1754944e-38, 2.0**-127, 0.0, 1e30])
def test_the_mean_of_many_roundings_is_the_number(near, share, sign):
    """Within five standard errors of the mean of N draws, √((far − x)(x − near) / N). Some are subnormal."""
    near_bits = torch.tensor(sign * near).bfloat16().float().view(torch.int32)
    x = (near_bits + round(share * 65536)).view(FP32)
    draws = 200_000
    rounded = stochastic_round(x.expand(draws).clone(), keyed_generator(7, str(near), str(share), sign)).double()
    low, high = (float(one) for one in neighbours(x))
    error = math.sqrt(abs(high - float(x)) * abs(float(x) - low) / draws)
    assert error > 0
    assert abs(float(rounded.mean()) - float(x)) < 5 * error


def test_the_generator_alone_decides():
    wide = torch.randn(1000, generator=keyed_generator(0))
    torch.manual_seed(1)
    first = stochastic_round(wide, keyed_generator(5))
    torch.manual_seed(2)
    assert torch.equal(first, stochastic_round(wide, keyed_generator(5)))
    assert not torch.equal(first, stochastic_round(wide, keyed_generator(6)))


def test_rounding_leaves_its_input_alone():
    wide = torch.randn(100, generator=keyed_generator(0))
    before = wide.clone()
    stochastic_round(wide, keyed_generator(1))
    assert torch.equal(wide, before)


# --- Steps far below half a unit in bf16's last place. ---

STEPS, RATE = 200, 1e-5
SHAPE = (128, 256)


def first_weights(size: float) -> Tensor:
    """Between `size` and 1.4 times that, and exact in bf16."""
    return (size * (1 + 0.4 * torch.rand(SHAPE, generator=keyed_generator(0, "weights")))).bfloat16().float()


def gradient_of(step: int) -> Tensor:
    """Mostly positive, so that weights wander one way; exact in bf16, and of the step alone, not of the weights."""
    return (1 + torch.randn(SHAPE, generator=keyed_generator(0, "gradient", step))).bfloat16().float()


def moved(name: str, dtype: torch.dtype, rounding: str, size: float, rate: float = RATE) -> tuple[Tensor, Tensor]:
    """The weights after STEPS steps, and the same as precisely as they are known."""
    weight = nn.Parameter(first_weights(size).to(dtype))
    updates = Updates({"w": weight}, optimizer_named(name, weight_decay=0.0), rounding=rounding, seed=3)
    for step in range(STEPS):
        updates.begin(step, rate)
        weight.grad = gradient_of(step).to(dtype)
        updates.finish()
    return weight.detach(), updates.precise("w")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_plain_bf16_stands_still(name):
    """The optimizer on bf16 weights as its package has it: after 200 steps not one of 32,768 weights has moved."""
    weight = nn.Parameter(first_weights(1.0).bfloat16())
    optimizer = optimizer_named(name, rate=RATE, weight_decay=0.0)([weight])
    for step in range(STEPS):
        weight.grad = gradient_of(step).bfloat16()
        optimizer.step()
    assert torch.equal(weight.detach().float(), first_weights(1.0))
    change = moved(name, FP32, "stochastic", 1.0)[0] - first_weights(1.0)
    assert float(change.abs().min()) > 20 * RATE


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stochastic_rounding_follows_float32_in_the_mean(name):
    """Each step of length d adds a variance of at most 2^-7 · d to a weight; five standard errors of the mean."""
    wide = moved(name, FP32, "stochastic", 1.0)[0].double()
    weight, precise = moved(name, BF16, "stochastic", 1.0)
    assert precise.dtype is BF16
    change = float((wide - first_weights(1.0)).mean())
    path = 1.5 * abs(change)  # more than a weight has gone, there and back
    error = math.sqrt(2**-7 * path / wide.numel())
    assert 5 * error < 0.1 * abs(change)
    assert abs(float((weight.double() - wide).mean())) < 5 * error


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_remainder_follows_float32_weight_by_weight(name):
    """A weight of 0.02, as FLUX.1's are, lies in [2^-6, 2^-5): a bf16 remainder knows it to 2^-22, up or down, at each
    step. That is 2 % of what the steps together have moved, if all went one way, and in practice much less."""
    wide, (weight, precise) = moved(name, FP32, "kahan", 0.02)[0], moved(name, BF16, "kahan", 0.02)
    difference, change = (precise - wide).abs(), (wide - first_weights(0.02)).abs()
    assert float(difference.max()) < STEPS * 2**-22
    assert float(difference.square().mean().sqrt()) < 0.002 * float(change.square().mean().sqrt())
    assert float((weight.float() - wide).abs().max()) <= 2**-14 + STEPS * 2**-22  # half a unit of bf16


@pytest.mark.parametrize("rate", [1e-5, 1e-6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_remainder_keeps_large_weights_moving(name, rate):
    """Near 1 a remainder knows a weight to 2^-16 at most, which is more than a step: rounded to nearest, steps
    would be lost again. By chance, the mean follows, and single weights to a tenth."""
    wide, precise = moved(name, FP32, "kahan", 1.0, rate)[0], moved(name, BF16, "kahan", 1.0, rate)[1]
    change = wide - first_weights(1.0)
    assert float((precise - wide).mean().abs()) < 0.01 * float(change.mean().abs())
    assert float((precise - wide).square().mean().sqrt()) < 0.1 * float(change.square().mean().sqrt())


@given(st.integers(-20, 20), st.floats(1, 2, exclude_max=True, width=32), st.sampled_from([1, -1]), st.integers(0, 99))
def test_weight_and_remainder_together_have_sixteen_bits(exponent, mantissa, sign, seed):
    """What lies in [2^e, 2^(e+1)) is kept to 2^(e-16), and what the two can hold is kept as it is."""
    wide = torch.tensor([sign * mantissa * 2.0**exponent])
    weight, extra = torch.zeros(1, dtype=BF16), torch.zeros(1, dtype=BF16)
    kahan = ROUNDINGS["kahan"]
    kahan.narrow(wide, weight, extra, keyed_generator(seed))
    assert torch.equal(weight, wide.bfloat16())
    together = weight.double() + extra.double()
    assert abs(float(together - wide.double())) < 2.0 ** (exponent - 16)
    again, remainder = torch.zeros_like(weight), torch.zeros_like(extra)
    kahan.narrow(kahan.widen(weight, extra), again, remainder, keyed_generator(seed, "again"))
    assert torch.equal(again.double() + remainder.double(), together)


@pytest.mark.parametrize("size", [1.0, 0.02])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_float32_copy_is_float32_to_the_bit(name, size):
    wide, (weight, precise) = moved(name, FP32, "master", size)[0], moved(name, BF16, "master", size)
    assert precise.dtype is FP32
    assert torch.equal(precise, wide)
    assert torch.equal(weight, wide.bfloat16())


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_each_weight_can_be_put_into_other_updates(name, dtype):
    """As sharded checkpoints do, weight by weight; the next step is then the same to the bit."""

    def step(updates: Updates, weights: dict[str, nn.Parameter], number: int) -> None:
        updates.begin(number, RATE)
        for one in weights.values():
            one.grad = gradient_of(number).to(dtype)
        updates.finish()

    weights = {key: nn.Parameter(first_weights(1.0).to(dtype)) for key in "ab"}
    updates = Updates(weights, optimizer_named(name), rounding="kahan", seed=3)
    step(updates, weights, 0)
    copies = {key: nn.Parameter(one.detach().clone()) for key, one in weights.items()}
    others = Updates(copies, optimizer_named(name), rounding="kahan", seed=3)
    assert others.optimizer_state("a") == {}
    for key in weights:
        state = updates.optimizer_state(key)
        others.set_optimizer_state(key, {k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()})
        if dtype is BF16:
            others.extra(key).copy_(updates.extra(key))
    step(updates, weights, 1)
    step(others, copies, 1)
    for key, one in weights.items():
        assert torch.equal(one, copies[key])
        assert torch.equal(updates.precise(key), others.precise(key))


def test_float32_weights_are_not_rounded_at_all():
    weights = {rounding: moved("adamw", FP32, rounding, 1.0)[0] for rounding in ROUNDINGS}
    assert all(torch.equal(one, weights["master"]) for one in weights.values())
    assert not torch.equal(weights["master"].bfloat16().float(), weights["master"])


def test_chances_are_keyed_by_seed_step_and_name():
    """The same weights and gradients under two names, at two steps, with two seeds: other chances each time."""

    def rounded(name: str, step: int, seed: int) -> Tensor:
        weight = nn.Parameter(first_weights(1.0).bfloat16())
        updates = Updates({name: weight}, lambda given: torch.optim.SGD(given, lr=0.003), seed=seed)
        updates.begin(step, 0.003)
        weight.grad = torch.ones_like(weight)
        updates.finish()
        return weight.detach()

    first = rounded("a", 0, 0)
    torch.manual_seed(1)
    assert torch.equal(first, rounded("a", 0, 0))
    for other in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1)):
        assert 0.1 < float((first != rounded(*other)).float().mean()) < 0.9


# --- Updates. ---

SHAPES = {"matrix": (96, 64), "wide": (8, 3), "bias": (5,), "scale": ()}
"""The first is large enough for eight bits of state; Adafactor factors the first two."""


def parameters(dtype: torch.dtype, requires: bool = True) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.randn(shape, generator=keyed_generator(1, name)).to(dtype), requires_grad=requires)
        for name, shape in SHAPES.items()
    }


def gradients(step: int) -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=keyed_generator(2, name, step)).bfloat16().float()
        for name, shape in SHAPES.items()
    }


def backward(trained: dict[str, nn.Parameter], step: int) -> None:
    """A loss that is linear in the weights, so that the gradients are `gradients(step)`, exactly."""
    wanted = gradients(step)
    torch.stack([(one * wanted[name].to(one.dtype)).sum().float() for name, one in trained.items()]).sum().backward()


def steps(trained: dict[str, nn.Parameter], updates: Updates, first: int, last: int, rate: float = 1e-3) -> None:
    for step in range(first, last):
        updates.begin(step, rate)
        backward(trained, step)
        updates.finish()


def state_of(optimizer: str, trained: dict[str, nn.Parameter], updates: Updates) -> TrainState:
    unused: Any = None
    return TrainState(unused, unused, unused, trained, updates, optimizer)


def written_and_read(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint has it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


def tensors_of(tree: Any, path: str = "") -> dict[str, Tensor]:
    if torch.is_tensor(tree):
        return {path: tree}
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {name: tensor for key, one in inner for name, tensor in tensors_of(one, f"{path}/{key}").items()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(FP32, "stochastic"), *((BF16, rounding) for rounding in ROUNDINGS)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_saved_and_loaded_goes_on_to_the_bit(name, dtype, rounding, fused, tmp_path):
    make = optimizer_named(name, rate=1e-3)
    straight = parameters(dtype)
    updates = Updates(straight, make, rounding=rounding, fused_backward=fused, seed=4)
    steps(straight, updates, 0, 6)

    first = parameters(dtype)
    halfway = Updates(first, make, rounding=rounding, fused_backward=fused, seed=4)
    steps(first, halfway, 0, 3)
    path = save(tmp_path, About(3, {}), snapshot(state_of(name, first, halfway)), keep=2)
    second = parameters(dtype)
    resumed = Updates(second, make, rounding=rounding, fused_backward=fused, seed=4)
    read_into(path, state_of(name, second, resumed))
    assert {parameter.dtype for parameter in second.values()} == {dtype}
    steps(second, resumed, 3, 6)
    assert not torch.equal(second["matrix"], first["matrix"])

    ours, theirs = tensors_of(resumed.state_dict()), tensors_of(updates.state_dict())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(one, theirs[key]) for key, one in ours.items())
    assert {one.dtype for key, one in ours.items() if key.startswith("/state")} <= {FP32, torch.uint8}
    for parameter_name in SHAPES:
        assert torch.equal(second[parameter_name], straight[parameter_name])
        assert torch.equal(resumed.precise(parameter_name), updates.precise(parameter_name))


def test_eight_bits_of_state_are_kept_where_there_is_enough_to_keep():
    trained = parameters(BF16)
    updates = Updates(trained, optimizer_named("adamw8bit"))
    steps(trained, updates, 0, 1)
    kept = {
        name: {key: value.dtype for key, value in one.items() if key.startswith("state")}
        for name, one in updates.state_dict()["state"].items()
    }
    assert set(kept["matrix"].values()) == {torch.uint8}
    assert set(kept["bias"].values()) == {FP32}


def test_state_of_other_parameters_is_refused(tmp_path):
    def kahan():
        trained = parameters(BF16)
        return state_of("adamw", trained, Updates(trained, optimizer_named("adamw"), rounding="kahan"))

    saved = snapshot(kahan())
    del saved.optimizer["updates"]["extra"]["bias"]
    with pytest.raises(ConfigError, match="extra/bias"):
        read_into(save(tmp_path, About(3, {}), saved, keep=2), kahan())


@pytest.mark.parametrize(("dtype", "rounding"), [(FP32, "stochastic"), *((BF16, rounding) for rounding in ROUNDINGS)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moved_in_the_backward_pass_is_moved_after_it(name, dtype, rounding):
    after, inside = parameters(dtype), parameters(dtype)
    plain = Updates(after, optimizer_named(name), rounding=rounding)
    fused = Updates(inside, optimizer_named(name), rounding=rounding, fused_backward=True)
    steps(after, plain, 0, 3)
    steps(inside, fused, 0, 3)
    for parameter_name, one in parameters(dtype).items():
        assert torch.equal(inside[parameter_name], after[parameter_name])
        assert not torch.equal(fused.precise(parameter_name), one)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_fused_backward_leaves_no_gradients_and_a_plain_one_drops_them_at_the_end(dtype):
    trained = parameters(dtype)
    before = {name: one.detach().clone() for name, one in trained.items()}
    fused = Updates(trained, optimizer_named("adamw", rate=0.1), fused_backward=True)
    fused.begin(0, 0.1)
    backward(trained, 0)
    assert all(one.grad is None for one in trained.values())
    assert not any(torch.equal(one, before[name]) for name, one in trained.items())
    moved_ones = {name: one.detach().clone() for name, one in trained.items()}
    fused.finish()
    assert all(torch.equal(one, moved_ones[name]) for name, one in trained.items())

    plain = Updates(others := parameters(dtype), optimizer_named("adamw", rate=0.1))
    plain.begin(0, 0.1)
    backward(others, 0)
    assert all(one.grad is not None for one in others.values())
    assert all(torch.equal(one, before[name]) for name, one in others.items())
    plain.finish()
    assert all(one.grad is None for one in others.values())


def test_each_gradient_is_gone_before_the_next_is_there():
    """The point of it: of a chain of layers, never more than one gradient exists."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    trained = dict(layers.named_parameters())
    alive: list[int] = []
    for one in trained.values():  # called before the hooks of Updates
        one.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.grad is not None for other in trained.values()))
        )
    updates = Updates(trained, optimizer_named("adamw"), fused_backward=True)
    updates.begin(0, 1e-3)
    layers(torch.randn(2, 6)).square().sum().backward()
    assert alive == [1] * 10


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_fused_backward_clips_each_gradient_alone_and_knows_the_norm_of_all(dtype):
    """SGD at a rate of 1 moves each weight by what is left of its gradient."""
    wanted = gradients(0)
    norms = {name: float(one.norm()) for name, one in wanted.items()}
    limit = sorted(norms.values())[1] * 1.5
    trained = parameters(dtype)
    before = {name: one.detach().clone() for name, one in trained.items()}
    sgd = Updates(
        trained, lambda given: torch.optim.SGD(given, lr=1.0), rounding="master", fused_backward=True, max_norm=limit
    )
    sgd.begin(0, 1.0)
    backward(trained, 0)
    assert float(sgd.norm()) == pytest.approx(math.sqrt(sum(norm**2 for norm in norms.values())), rel=1e-5)
    clipped = 0
    for name in SHAPES:
        left = before[name].float() - sgd.precise(name).float()
        kept = min(1.0, limit / norms[name])
        clipped += kept < 1
        torch.testing.assert_close(left, kept * wanted[name], rtol=1e-2 if dtype is BF16 else 1e-4, atol=1e-6)
        assert float(left.norm()) <= limit * (1.01 if dtype is BF16 else 1 + 1e-5)
    assert clipped == 2


def test_the_norm_is_of_one_backward_pass():
    trained = parameters(FP32)
    updates = Updates(trained, optimizer_named("adamw"), fused_backward=True)
    steps(trained, updates, 0, 2)
    expected = math.sqrt(sum(float(one.square().sum()) for one in gradients(1).values()))
    assert float(updates.norm()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("fused", [False, True])
def test_what_the_loss_does_not_reach_stays(dtype, fused):
    trained = parameters(dtype)
    updates = Updates(trained, optimizer_named("adamw", weight_decay=0.1), fused_backward=fused)
    before = {name: one.detach().clone() for name, one in trained.items()}
    updates.begin(0, 0.1)
    trained["bias"].sum().backward()
    updates.finish()
    changed = [name for name, one in trained.items() if not torch.equal(one, before[name])]
    assert changed == ["bias"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_each_step_has_its_own_rate(dtype, fused):
    trained = parameters(dtype)
    before = {name: one.detach().clone() for name, one in trained.items()}
    make = optimizer_named("adamw", rate=1.0, weight_decay=0.0)
    updates = Updates(trained, make, rounding="master", fused_backward=fused)
    for step, rate in enumerate((0.25, 0.0)):
        updates.begin(step, rate)
        backward(trained, 0)
        updates.finish()
    for name, one in gradients(0).items():  # the first step of AdamW is the rate, in the direction of the gradient
        torch.testing.assert_close(
            before[name].float() - updates.precise(name).float(), 0.25 * one.sign(), rtol=1e-4, atol=1e-4
        )


def test_only_what_is_kept_beside_a_weight_is_more_precise_than_it():
    told = {
        (dtype, rounding): Updates(parameters(dtype), optimizer_named("adamw"), rounding=rounding).is_precise("matrix")
        for dtype in (FP32, BF16)
        for rounding in ROUNDINGS
    }
    assert {key for key, precise in told.items() if precise} == {(BF16, "kahan"), (BF16, "master")}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_kept_beside_a_weight_has_the_size_of_the_table(rounding):
    weight = nn.Parameter(torch.ones(10, 10, dtype=BF16))
    updates = Updates({"w": weight}, optimizer_named("adamw"), rounding=rounding)
    held = sum(one.nbytes for one in tensors_of(updates.state_dict()["extra"]).values())
    assert held == 100 * ROUNDINGS[rounding].extra_bytes


# --- The average. ---


def walk(step: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=keyed_generator(5, name, step)) for name, shape in SHAPES.items()}


def averaged(decay: float, every: int, last: int) -> tuple[Average, dict[str, Tensor]]:
    """An average over `last` steps, and the same by a plain loop in float64."""
    average = Average(parameters(FP32), decay, every)
    expected = {name: one.detach().double() for name, one in parameters(FP32).items()}
    for step in range(1, last + 1):
        if average.due(step):
            weights = walk(step)
            average.update(step, weights.__getitem__)
            kept = min(decay, (1 + step) / (10 + step)) ** every
            expected = {name: kept * one + (1 - kept) * weights[name].double() for name, one in expected.items()}
    return average, expected


@pytest.mark.parametrize(("decay", "every"), [(0.9, 1), (0.999, 1), (0.99, 10), (0.5, 3)])
def test_the_average_is_a_plain_loops(decay, every):
    average, expected = averaged(decay, every, 40)
    for name, one in average.weights.items():
        torch.testing.assert_close(one.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_average_takes_in_every_so_many_steps():
    average = Average(parameters(FP32), 0.9, 4)
    assert [step for step in range(1, 13) if average.due(step)] == [4, 8, 12]


def test_the_average_is_not_held_to_the_first_weights():
    """Of a hundred steps at a decay of 0.9999, the first weights would be 99 %; warmed up, less than a hundred-
    thousandth: (1 + n) / (10 + n) over n from 1 to 100, multiplied."""
    weight = {"w": nn.Parameter(torch.ones(()))}
    average = Average(weight, 0.9999, 1)
    for step in range(1, 101):
        average.update(step, lambda _: torch.zeros(()))
    left = math.prod((1 + step) / (10 + step) for step in range(1, 101))
    assert left < 1e-5
    assert float(average.weights["w"]) == pytest.approx(left, rel=1e-4)


def test_past_its_warm_up_the_average_forgets_at_its_decay():
    average = Average({"w": nn.Parameter(torch.ones(()))}, 0.9, 2)
    average.update(1000, lambda _: torch.zeros(()))
    assert float(average.weights["w"]) == pytest.approx(0.9**2)


def test_the_average_begins_as_a_float32_copy_that_training_does_not_reach():
    for dtype in (FP32, BF16):
        trained = parameters(dtype)
        average = Average(trained, 0.9, 1)
        before = {name: one.detach().float().clone() for name, one in trained.items()}
        steps(trained, Updates(trained, optimizer_named("adamw", rate=0.1)), 0, 1, rate=0.1)
        for name, one in average.weights.items():
            assert one.dtype is FP32
            assert one.device.type == "cpu"
            assert not one.requires_grad
            assert torch.equal(one, before[name])


def test_the_average_reads_weights_as_precisely_as_they_are_known():
    trained = {"w": nn.Parameter(torch.ones(8, dtype=BF16))}
    updates = Updates(trained, lambda given: torch.optim.SGD(given, lr=1e-4), rounding="master")
    average = Average(trained, 0.5, 1)
    updates.begin(0, 1e-4)
    trained["w"].grad = torch.ones_like(trained["w"])
    updates.finish()
    average.update(10**6, updates.precise)
    assert torch.equal(trained["w"].detach(), torch.ones(8, dtype=BF16))
    torch.testing.assert_close(average.weights["w"], torch.full((8,), 1 - 0.5e-4), rtol=0, atol=1e-7)


def test_an_average_goes_on_from_its_weights_to_the_bit():
    straight = averaged(0.99, 2, 20)[0]
    halfway, _ = averaged(0.99, 2, 10)
    resumed = Average(parameters(FP32), 0.99, 2)
    resumed.weights.update(written_and_read(dict(halfway.weights)))
    for step in range(11, 21):
        if resumed.due(step):
            resumed.update(step, walk(step).__getitem__)
    assert all(torch.equal(one, straight.weights[name]) for name, one in resumed.weights.items())
