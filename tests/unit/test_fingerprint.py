"""What may change between a stop and a resume, and what is said when it does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flux_ft.config import RunConfig
from flux_ft.errors import ConfigError
from flux_ft.train.checkpoint import About
from flux_ft.train.digest import weights_digest
from flux_ft.train.fingerprint import NEEDED, accept_drift, differences, run_fingerprint
from flux_ft.types import DatasetReport

SAVED = About(
    40, {"seed": 3, "lora_rank": 16, "base model": "aa", "encoded pictures and captions": "bb"}, {"torch version": "2"}
)
NOW = About(0, {"seed": 3, "lora_rank": 16}, {"torch version": "2"})
LATE = {"base model": "aa", "encoded pictures and captions": "bb"}


def accept(
    now: About = NOW,
    strict: bool = True,
    allow: bool = False,
    late: dict[str, Any] | None = None,
    chosen: dict[str, Any] | None = None,
    saved: About = SAVED,
) -> About:
    return accept_drift(saved, now, strict=strict, allow=allow, late=late, chosen=chosen)


def refused(**given: Any) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        accept(**given)
    return caught.value.message, caught.value.hint or ""


def test_nothing_changed() -> None:
    first = accept()
    both = accept(first, late=LATE)
    assert both == replace(SAVED, drift=[])


def test_a_new_run_tells_what_it_is() -> None:
    first = accept_drift(None, NOW, strict=True, allow=False)
    assert accept_drift(None, first, strict=True, allow=False, late=LATE) == About(
        0, NOW.fingerprint | LATE, NOW.circumstances
    )


def test_every_changed_setting_is_named_with_both_values() -> None:
    now = replace(NOW, fingerprint={"seed": 4, "lora_rank": 16, "prior.weight": 2.0})
    message, hint = refused(now=now, strict=False)
    assert "`prior.weight` was None, is now 2.0; `seed` was 3, is now 4" in message
    assert "lora_rank" not in message
    assert "--allow-drift" in hint


def test_kernels_are_compared_once_they_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    saved = replace(SAVED, circumstances={**SAVED.circumstances, "attention kernel": "flash"})
    first = accept(saved=saved)
    same = accept(first, saved=saved, late=LATE, chosen={"attention kernel": "flash"})
    assert same.circumstances == saved.circumstances
    changed: dict[str, Any] = {"saved": saved, "late": LATE, "chosen": {"attention kernel": "native"}}
    message, _ = refused(now=first, **changed)
    assert "`attention kernel` was 'flash', is now 'native'" in message
    message, _ = refused(now=first, saved=saved, late=LATE)
    assert "`attention kernel` was 'flash', is now None" in message
    assert capsys.readouterr().err == ""
    assert accept(first, strict=False, **changed).circumstances["attention kernel"] == "native"
    assert "`attention kernel` was 'flash', is now 'native'" in capsys.readouterr().err


def test_with_leave_it_goes_on_and_the_next_checkpoints_tell(capsys: pytest.CaptureFixture[str]) -> None:
    now = replace(NOW, fingerprint={**NOW.fingerprint, "seed": 4}, circumstances={"torch version": "3"})
    first = accept(now, allow=True)
    both = accept(first, allow=True, late=LATE | {"base model": "cc"})
    assert both.step == 40
    assert both.fingerprint == {**SAVED.fingerprint, "seed": 4, "base model": "cc"}
    assert both.drift == [
        "after step 40: `seed` was 3, is now 4",
        "after step 40: `torch version` was '2', is now '3'",
        "after step 40: `base model` was 'aa', is now 'cc'",
    ]
    told = capsys.readouterr().err
    assert "changed since step 40: `seed` was 3, is now 4" in told
    assert "base model" in told
    later = accept_drift(replace(both, step=60), now, strict=True, allow=False)
    assert later.drift == both.drift


def test_other_software_stops_a_strict_run_and_a_fast_one_is_warned(capsys: pytest.CaptureFixture[str]) -> None:
    now = replace(NOW, circumstances={"torch version": "3"})
    message, hint = refused(now=now)
    assert "`torch version` was '2', is now '3'" in message
    assert "--allow-drift" in hint
    assert accept(now, strict=False).drift == ["after step 40: `torch version` was '2', is now '3'"]
    assert "torch version" in capsys.readouterr().err


def test_another_base_or_other_latents_stop_any_run() -> None:
    for key in LATE:
        message, _ = refused(late=LATE | {key: "zz"}, strict=False)
        assert f"`{key}` was" in message


def test_what_a_checkpoint_cannot_do_without_is_refused_with_any_leave() -> None:
    assert "lora_rank" in NEEDED
    now = replace(NOW, fingerprint={"seed": 4, "lora_rank": 8})
    message, hint = refused(now=now, allow=True)
    assert "`lora_rank` was 16, is now 8" in message
    assert "seed" not in message
    assert "--allow-drift" not in hint


def test_differences_keep_the_order_of_keys() -> None:
    assert list(differences({"b": 1, "a": 1, "same": None}, {"a": 2, "c": 3})) == ["a", "b", "c"]


def test_every_needed_key_is_in_the_fingerprint_of_some_run() -> None:
    """A setting that is renamed must not be forgotten here."""
    report = DatasetReport.__new__(DatasetReport)
    object.__setattr__(report, "samples", ())
    facts = run_fingerprint(RunConfig.model_validate({"data": "pics"}), report, 1)
    assert facts.keys() >= NEEDED


# --- Digest of weights. ---


def weights() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(7, 9, generator=rng), "b": torch.randn(4, 6, generator=rng).bfloat16(),
        "odd": torch.randn(3, generator=rng).bfloat16(), "none": torch.zeros(0), "one": torch.ones(()),
    }  # fmt: skip


def test_the_digest_is_of_numbers_and_not_of_how_they_lie() -> None:
    told = weights_digest(weights().items())
    assert told == weights_digest(reversed(weights().items()))
    strided = {name: one.T.contiguous().T if one.ndim == 2 else one for name, one in weights().items()}
    assert told == weights_digest(strided.items())
    parts = weights_digest(weights().items())
    assert told == parts


@pytest.mark.parametrize("name", ["a", "b", "odd", "one"])
def test_every_bit_counts(name: str) -> None:
    told = weights_digest(weights().items())
    for bit in range(weights()[name].nbytes * 8):
        changed = weights()
        octets = changed[name].view(-1).view(torch.uint8)
        octets[bit // 8] ^= 1 << bit % 8
        assert weights_digest(changed.items()) != told


def test_order_shape_dtype_and_names_count(monkeypatch: pytest.MonkeyPatch) -> None:
    told = weights_digest(weights().items())
    first = weights()["a"]
    for other in (first.flip(0), first.T, first.reshape(9, 7), first.view(torch.int32)):
        assert weights_digest((weights() | {"a": other}).items()) != told
    renamed = weights()
    renamed["c"] = renamed.pop("a")
    assert weights_digest(renamed.items()) != told
    monkeypatch.setattr("flux_ft.train.digest._CPU_CHUNK", 5)
    assert weights_digest(weights().items()) == told
