"""`doctor --gpu`: passes repeated and compared bit by bit, on the CPU with narrow shapes; and what it says of them."""

import itertools
import json

import pytest
import torch

from flux_ft import cli, doctor
from flux_ft.bench import repeat
from flux_ft.bench.repeat import Probe, Row, Sizes, Tally, check_repeats, measure
from flux_ft.train.determinism import same_bits

CPU = torch.device("cpu")
NARROW = Sizes(
    attention=((1, 2, 40, 16), (4, 2, 24, 16)),
    linears=((40, 32, 48), (40, 4, 32)),
    blocks={
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
        "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
    },
    latent_side=8,
    text_tokens=8,
)  # fmt: skip


def probe(compute, **options):
    return Probe("a pass", lambda: compute, **options)


class TestNarrowShapes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_everything_repeats_on_a_cpu(self, dtype):
        rows = {row.what: row for row in check_repeats(CPU, dtype, NARROW, repeats=4)}
        assert len(rows) == 2 * (1 + len(repeat.KERNELS)) + 2 + 1
        assert all(row.ok for row in rows.values())
        for what, row in rows.items():
            if row.needed or "math" in what:
                assert {mode: tally.compared for mode, tally in row.tallies.items()} == {"strict": 3, "fast": 3}
                assert "repeats exactly" in row.for_people()
        assert rows["attention, cuDNN, 1 × 40 tokens, 2 heads × 16"].for_people() == "not offered here"
        assert rows["attention, cuDNN, 1 × 40 tokens, 2 heads × 16"].tallies.keys() == {"fast"}

    def test_attention_that_differs_by_a_bit_is_found_in_every_pass_that_has_it(self, monkeypatch):
        true, calls = torch.nn.functional.scaled_dot_product_attention, itertools.count()

        def unsteady(*arguments, **options):
            out = true(*arguments, **options)
            return out * (1 + 2**-20) if next(calls) % 3 == 2 else out  # in both modes

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", unsteady)
        rows = check_repeats(CPU, torch.float32, NARROW, repeats=6)
        wrong = {row.what.split(",")[0] for row in rows if not row.ok}
        assert wrong == {"attention", "FLUX.1"}
        assert all(row.ok for row in rows if row.what.startswith("linear"))

    def test_full_shapes_are_those_of_flux(self):
        full = repeat.FLUX_SIZES
        assert full.attention == ((1, 24, 4608, 128), (4, 24, 1536, 128))
        assert {(inputs, outputs) for _, inputs, outputs in full.linears} >= {(3072, 12288), (12288, 3072)}


class TestMeasure:
    def test_a_pass_that_does_not_repeat_is_counted(self):
        calls = itertools.count()

        def compute():
            number = next(calls)
            return torch.ones(3), torch.tensor([1.0, 2.0 + (0.25 if number == 3 else 0.5 if number == 7 else 0.0)])

        tally = measure(probe(compute, modes=("strict",)), CPU, 10).tallies["strict"]
        assert (tally.compared, tally.differing, tally.largest) == (9, 2, 0.5)
        assert "differs in 2 of 9 (by up to 0.5)" in tally.for_people()

    def test_only_strict_mode_is_held_to_it(self):
        calls = itertools.count()

        def compute():
            repeats = torch.are_deterministic_algorithms_enabled()
            return (torch.tensor(0.0 if repeats else float(next(calls))),)

        row = measure(probe(compute), CPU, 5)
        assert row.ok
        assert (row.tallies["strict"].differing, row.tallies["fast"].differing) == (0, 4)
        assert not measure(probe(lambda: (torch.rand(4),)), CPU, 3).ok

    def test_modes_take_turns_and_the_price_is_of_the_same_run(self):
        modes, now = [], itertools.count()
        seconds = {True: 3.0, False: 2.0}
        at = [0.0]

        def compute():
            modes.append(torch.are_deterministic_algorithms_enabled())
            at[0] += seconds[modes[-1]] + (100.0 if next(now) < 2 else 0.0)  # the first of each mode warms up
            return (torch.zeros(1),)

        row = measure(probe(compute), CPU, 4, clock=lambda: at[0])
        assert modes == [True, False] * 4
        assert (row.tallies["strict"].seconds, row.tallies["fast"].seconds, row.price) == (3.0, 2.0, 1.5)
        assert "strict takes 1.50 times as long" in row.for_people()
        assert not torch.are_deterministic_algorithms_enabled()

    @pytest.mark.parametrize(("needed", "ok"), [(True, False), (False, True)])
    def test_a_pass_that_torch_refuses(self, needed, ok):
        def compute():
            if torch.are_deterministic_algorithms_enabled():
                raise RuntimeError("it has no deterministic implementation\nand more")
            return (torch.zeros(1),)

        row = measure(probe(compute, needed=needed), CPU, 3)
        assert row.ok == ok
        assert row.price is None
        assert "strict does not run: it has no deterministic implementation; fast repeats exactly" in row.for_people()

    def test_too_little_memory_is_no_fault_of_the_kernels(self):
        def make():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

        row = measure(Probe("large", make), CPU, 3)
        assert row.ok
        assert "too little free memory" in row.for_people()

    def test_a_mistake_is_not_taken_for_a_refusal(self):
        def make():
            raise TypeError("ours")

        with pytest.raises(TypeError, match="ours"):
            measure(Probe("wrong", make), CPU, 3)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1.0, 1.0, True), (float("nan"), float("nan"), True), (0.0, -0.0, False), (1.0, 1.0 + 2**-23, False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_compared_not_values(one, other, same, dtype):
    assert same_bits(torch.tensor([one], dtype=dtype), torch.tensor([other], dtype=dtype)) == same


class TestVerb:
    def test_without_gpu_it_is_a_problem(self, monkeypatch, capsys):
        monkeypatch.setattr(doctor, "_gpus", lambda: [])
        assert cli.app(["doctor", "--gpu", "--json"], standalone_mode=False) == 1
        findings = {one["name"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
        assert findings["gpu"]["ok"] is False
        assert "no GPU" in findings["gpu"]["detail"]

    def test_each_pass_is_a_line_and_figures(self, monkeypatch, capsys):
        rows = [
            Row("fine", {"strict": Tally(29, 0, 0.0, 0.004), "fast": Tally(29, 3, 0.5, 0.002)}),
            Row("broken", {"strict": Tally(29, 1, 0.25, 0.004)}),
        ]
        monkeypatch.setattr(doctor, "_gpus", lambda: [CPU])
        monkeypatch.setattr(repeat, "check_repeats", lambda device: rows)
        monkeypatch.setattr(doctor, "examine", lambda: [])
        assert cli.app(["doctor", "--gpu"], standalone_mode=False) == 1
        assert capsys.readouterr().out.splitlines() == [
            "ok      cpu: fine: strict repeats exactly, 4 ms; fast differs in 3 of 29 (by up to 0.5), 2 ms; "
            "strict takes 2.00 times as long",
            "PROBLEM cpu: broken: strict differs in 1 of 29 (by up to 0.25), 4 ms",
        ]
        assert cli.app(["doctor", "--gpu", "--json"], standalone_mode=False) == 1
        figures = json.loads(capsys.readouterr().out)["findings"][0]["figures"]
        assert (figures["strict_to_fast"], figures["fast"]["differing"]) == (2.0, 3)

    def test_findings_of_a_real_check(self):
        findings = doctor.repeat_findings(CPU, dtype=torch.float32, sizes=NARROW, repeats=2)
        assert all(one.ok and one.name.startswith("cpu: ") for one in findings)
        assert json.loads(json.dumps([one.as_json() for one in findings]))

    def test_plain_findings_have_no_figures(self):
        assert doctor.Finding("disk", True, "enough").as_json() == {"name": "disk", "ok": True, "detail": "enough"}
