"""Strict mode: which flags are set and put back, what a run's bits depend on, and that flux-tiny trains in it."""

import getpass
import hashlib
import json
import os
import platform
from pathlib import Path

import pytest
import torch

from flux_ft.errors import ConfigError
from flux_ft.train import determinism
from flux_ft.train.determinism import applied, circumstances, resolve
from flux_ft.train.run import train

CPU = torch.device("cpu")


def flags():
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "benchmark": torch.backends.cudnn.benchmark,
        "convolutions": torch.backends.cudnn.deterministic,
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }


STRICT = {
    "algorithms": True, "warns": False, "fill": False, "benchmark": False, "convolutions": True,
    "cudnn attention": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "device", "mode"),
    [("auto", "cpu", "strict"), ("auto", "cuda", "fast"), ("auto", "mps", "fast"), ("strict", "cuda", "strict"),
     ("fast", "cpu", "fast")],
)  # fmt: skip
def test_auto_is_strict_where_that_costs_nothing(setting, device, mode):
    assert resolve(setting, device) == mode


class TestFlags:
    def test_strict_sets_them_all_and_puts_them_back(self):
        before = flags()
        assert before != STRICT
        with applied("strict", CPU):
            assert flags() == STRICT
            with applied("fast", CPU):
                assert flags() == STRICT
        assert flags() == before

    def test_they_are_put_back_after_a_failure(self):
        before = flags()
        with pytest.raises(KeyboardInterrupt), applied("strict", CPU):
            raise KeyboardInterrupt
        assert flags() == before

    def test_what_the_user_chose_stays(self):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        try:
            with applied("strict", CPU):
                assert flags() == STRICT
            assert flags()["warns"]
            assert flags()["benchmark"]
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = False

    def test_strict_refuses_an_operation_without_a_fixed_order(self):
        def add():
            return torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))

        with applied("fast", CPU):
            add()
        with applied("strict", CPU), pytest.raises(RuntimeError, match="deterministic"):
            add()


class TestCublas:
    @pytest.mark.parametrize("mode", ["strict", "fast"])
    def test_its_variable_is_there_in_both_modes(self, monkeypatch, mode):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        with applied(mode, CPU):
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    def test_the_users_own_value_stays(self, monkeypatch):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        with applied("strict", CPU):
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"

    def test_torch_refusing_a_product_is_one_message(self, monkeypatch):
        """As it does on a GPU that computed before the variable was set; there is none here, so it is acted."""
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
        monkeypatch.setattr(determinism.torch, "ones", lambda *size, device: CPU)

        def refuse(_):
            raise RuntimeError("you must set an environment variable …: CUBLAS_WORKSPACE_CONFIG=:4096:8 or …")

        with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:8 .* it is ':0:0'") as caught:
            determinism._require_cublas(torch.device("cuda"), refuse)
        assert "determinism: fast" in caught.value.hint
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        with pytest.raises(ConfigError, match="it came too late"):
            determinism._require_cublas(torch.device("cuda"), refuse)

        def break_down(_):
            raise RuntimeError("out of order")

        with pytest.raises(RuntimeError, match="out of order"):
            determinism._require_cublas(torch.device("cuda"), break_down)


def test_attention_from_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr(determinism, "DIFFUSERS_ATTN_BACKEND", "sage")
    before = flags()
    with pytest.raises(ConfigError, match="DIFFUSERS_ATTN_BACKEND is 'sage'"), applied("strict", CPU):
        pass
    assert flags() == before
    with applied("fast", CPU):
        pass


class TestCircumstances:
    def test_they_tell_versions_machine_and_flags(self):
        with applied("strict", CPU):
            facts = circumstances(CPU, 2, "strict")
        assert facts["torch version"].startswith(torch.__version__.partition("+")[0])
        assert {"flux_ft version", "accelerate version", "peft version", "diffusers version"} <= facts.keys()
        assert facts["Python version"].count(".") == 1
        assert facts["CPU threads"] == torch.get_num_threads()
        assert facts["CPU instructions"] == torch.backends.cpu.get_cpu_capability()
        assert facts["CPU model"]
        assert facts["processes"] == 2
        assert (facts["determinism"], facts["deterministic algorithms"]) == ("strict", "on")
        assert facts["attention kernels allowed"] == "flash, efficient, math"
        assert json.loads(json.dumps(facts)) == facts

    def test_they_repeat_and_tell_modes_and_threads_apart(self, monkeypatch):
        with applied("strict", CPU):
            strict, again = (circumstances(CPU, 1, "strict") for _ in range(2))
        with applied("fast", CPU):
            fast = circumstances(CPU, 1, "fast")
        assert strict == again
        assert {key for key in strict if strict[key] != fast[key]} == {
            "determinism", "deterministic algorithms", "attention kernels allowed",
        }  # fmt: skip
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        assert circumstances(CPU, 1, "fast") == fast | {"CPU threads": 77}

    def test_a_setting_that_changes_products_is_told(self):
        before = circumstances(CPU, 1, "fast")
        torch.set_float32_matmul_precision("high")
        try:
            assert circumstances(CPU, 1, "fast")["matrix products"] != before["matrix products"]
        finally:
            torch.set_float32_matmul_precision("highest")

    def test_they_hold_nothing_private(self):
        words = " ".join(f"{key} {value}" for key, value in circumstances(CPU, 1, "fast").items()).split()
        for private in (platform.node(), getpass.getuser(), str(Path.home()), str(Path.cwd())):
            assert private not in words

    def test_a_cpu_without_a_name_is_told_by_its_kind(self, tmp_path, monkeypatch):
        monkeypatch.setattr(platform, "system", lambda: "Linux")
        file = tmp_path / "cpuinfo"
        assert determinism._cpu_model(file) == (platform.processor() or platform.machine())
        file.write_text("processor\t: 0\nmodel name\t: Some CPU: 9000\n")
        assert determinism._cpu_model(file) == "Some CPU: 9000"


TOUCHING_EVERYTHING = {
    "iterations": 4,
    "data": {"caption_dropout": 0.3, "resample_latents": True},
    "optim": {"batch_size": 2, "ema_decay": 0.9, "ema_every": 1},
    "validation": {"every": 2, "fraction": 0.2},
    "preview": {"every": 4, "prompts": ["a red circle"], "steps": 2},
    "checkpoint": {"every": 4},
    "prior": {"prompts": ["a blue square"]},
}


@pytest.mark.parametrize(
    "settings",
    [
        {"finetune_type": "lora", "lora": {"dropout": 0.1}, "memory": {"recompute": "selective"}},
        {"finetune_type": "full", "memory": {"recompute": "full"}},
    ],
    ids=["lora", "full"],
)
def test_flux_tiny_trains_in_strict_mode_and_repeats(run_settings, tmp_path, on_cpu, settings):
    """No operation of the loop, of validation, previews, averages or priors is refused."""
    digests = []
    for name in ("one", "two"):
        config = run_settings(tmp_path, **TOUCHING_EVERYTHING, **settings, output=str(tmp_path / name))
        with applied("strict", CPU):
            train(config)
        weights = next((tmp_path / name).glob("checkpoints/step-000004/weights.safetensors"))
        digests.append(hashlib.sha256(weights.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
