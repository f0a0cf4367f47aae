"""A whole job: `flux-ft train` in a process of its own, from its start to the LoRA's file, twice.

The second start finds what the first has compiled and is ended at its first step. The model is FLUX.1's parts with
random weights, in a folder that is read as any other is, so that reading it counts; it has just been written, so it
lies in the page cache. The pictures are made up, as JPEG files.

    start ─ imports, pictures, encoders, model, first step ─ first_step_s ─ steps ─ export, proof ─ total_s
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_ft.bench import targets
from flux_ft.bench.data import made_up
from flux_ft.bench.extract import peak_rss_mb
from flux_ft.bench.infer import FLUX1_VAE, noise
from flux_ft.bench.sides import NARROW
from flux_ft.errors import ConfigError, FluxFTError
from flux_ft.families.tiny.weights import tiny_folder
from flux_ft.files import write_whole
from flux_ft.infer.runner import release_memory
from flux_ft.log import metrics_rows
from flux_ft.runfile import load_run

RANK = 32
MEGAPIXELS = 1.2
"""Of the made-up pictures: a little above 1 MP, to which they are brought."""
LOOK_EVERY_S = 0.02
Sizes = dict[str, dict[str, Any]]
FULL: Sizes = {
    "transformer": {},
    "vae": FLUX1_VAE,
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                     "projection_dim": 768},
    "text_encoder_2": {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24},
}  # fmt: skip
"""FLUX.1-dev's parts, but for the words that the encoders know: the tokenizers are flux-tiny's."""
SMALL: Sizes = {
    "transformer": NARROW,
    "vae": FLUX1_VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "sample_size": 64},
    "text_encoder": {"hidden_size": NARROW["pooled_projection_dim"]},
    "text_encoder_2": {"d_model": NARROW["joint_attention_dim"]},
}


def bench_job(
    full: bool = False,
    output: Path = Path("bench-job"),
    *,
    model: str | None = None,
    iterations: int = 300,
    pictures: int = 20,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the job in `output`, a new or empty folder; returns what is also written to job.json.

    `model` is one to train in place of random weights, at FLUX.1-dev's size if `full` and else small. `settings` are
    the run's, as `key=value`. Raises ConfigError, and FluxFTError where the run fails.
    """
    if full and not torch.cuda.is_available():
        raise ConfigError("`--full` needs a CUDA card", hint="leave it out to measure a small model here")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"`--output {output}` holds something already", hint="choose another folder")
    output = output.resolve()
    run = {
        "model": model or "random", "data": str(output / "pictures"), "finetune_type": "lora", "lora_rank": RANK,
        "iterations": iterations, "captioning": False, "preview": {"every": None},
    }  # fmt: skip
    with TemporaryDirectory() as folder:  # wrong settings are told before anything is written
        _write_run(Path(folder), run)
        load_run(Path(folder) / "run.yaml", settings)
    output.mkdir(parents=True, exist_ok=True)
    write_pictures(output / "pictures", pictures)
    with TemporaryDirectory(dir=output, prefix="model-") as folder:
        _write_run(output, run | {"model": model or folder})
        began = time.perf_counter()
        if model is None:
            write_model(Path(folder), FULL if full else SMALL)
        writing_s = time.perf_counter() - began
        cold = _start(output, "cold", settings)
        host_mb = peak_rss_mb(of_children=True)
        again = _start(output, "again", settings, until_first_step=True)
    on_gpu = torch.cuda.is_available()
    figures: dict[str, Any] = {
        "model": model or ("FLUX.1-dev's size, random weights" if full else "FLUX.1's classes, small, random weights"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")},
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "iterations": iterations, "pictures": pictures, "rank": RANK, "settings": list(settings),
        "writing_model_s": None if model else writing_s,
        **cold, "first_step_again_s": again["first_step_s"], "host_peak_gb": host_mb and host_mb / 1e3,
    }  # fmt: skip
    meant = full and "H100" in figures["device"] and (iterations, pictures) == (300, 20)
    figures["goals"] = targets.judged([], figures["total_s"]) if meant else []
    write_whole(output / "job.json", (json.dumps(figures, indent=1) + "\n").encode())
    return figures


def summary_for_people(figures: dict[str, Any]) -> str:
    """What `bench_job` found, in a few lines."""
    peak, host = figures["peak_gb"], figures["host_peak_gb"]
    lines = [
        f"{figures['model']}, on {figures['device']}: {figures['iterations']} steps of rank {figures['rank']} on "
        f"{figures['pictures']} pictures",
        f"start to first step      {figures['first_step_s']:8.1f} s",
        f"the same, started again  {figures['first_step_again_s']:8.1f} s",
        f"a step, median           {figures['step_s']:8.4f} s",
        f"first step to last       {figures['steps_s']:8.1f} s",
        f"last step to LoRA file   {figures['export_s']:8.1f} s",
        f"all                      {figures['total_s']:8.1f} s",
        f"peak                     {'' if peak is None else f'{peak:8.2f} GB of the GPU, '}"
        f"{'' if host is None else f'{host:.2f} GB of host memory, files that are mapped among it'}",
    ]
    return "\n".join([*lines, *targets.for_people(figures["goals"])])


def _write_run(folder: Path, run: dict[str, Any]) -> None:
    write_whole(folder / "run.yaml", (json.dumps(run, indent=1) + "\n").encode())


def write_pictures(folder: Path, count: int) -> None:
    """Clouds of colours, with a caption each."""
    folder.mkdir(parents=True)
    for index, content in enumerate(made_up(MEGAPIXELS * 1e6, count)):
        (folder / f"{index:03d}.jpg").write_bytes(content)
        (folder / f"{index:03d}.txt").write_text(f"TOK, a cloud of colours, number {index}\n", encoding="utf-8")


def write_model(folder: Path, sizes: Sizes) -> None:
    """A FLUX.1 model in the diffusers layout with random weights, drawn on a GPU if there is one; bf16 there."""
    tiny = tiny_folder()
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(tiny / part, folder / part)
    shutil.copy(tiny / "model_index.json", folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    makers: dict[str, Any] = {
        "transformer": lambda size: FluxTransformer2DModel(guidance_embeds=True, **size),
        "vae": lambda size: AutoencoderKL(**size),
        "text_encoder": lambda size: CLIPTextModel(CLIPTextConfig.from_pretrained(tiny / "text_encoder", **size)),
        "text_encoder_2": lambda size: T5EncoderModel(T5Config.from_pretrained(tiny / "text_encoder_2", **size)),
    }
    for part, make in makers.items():
        with torch.device("meta"):
            made: Any = make(sizes[part])
        made = noise(made, device, dtype)
        if part.startswith("text"):
            made.tie_weights()
        made.save_pretrained(folder / part)
        del made
        release_memory()


def _start(output: Path, name: str, settings: Sequence[str], until_first_step: bool = False) -> dict[str, Any]:
    """One start of the run: its times in seconds since then. What it says, with the time of each line, is NAME.log."""
    folder, stamps = output / name, list[float]()
    command = [sys.executable, "-m", "flux_ft", "train", str(output / "run.yaml"), *settings, f"output={folder}"]
    compiled = output / "compiled"
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(compiled), "TRITON_CACHE_DIR": str(compiled / "triton")}
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | kept, encoding="utf-8",
        errors="replace",
    ) as child:  # fmt: skip
        assert child.stderr is not None
        listener = threading.Thread(target=_stamp, args=(child.stderr, output / f"{name}.log", began))
        listener.start()
        try:
            while child.poll() is None and not (until_first_step and stamps):
                time.sleep(LOOK_EVERY_S)
                done = sum("loss" in row for _, row in metrics_rows(folder / "metrics.jsonl"))
                stamps += [time.perf_counter() - began] * (done - len(stamps))
        finally:
            child.kill()
        code = child.wait()
        total = time.perf_counter() - began
        listener.join()
    if not stamps or (code and not until_first_step):
        words = (output / f"{name}.log").read_text(encoding="utf-8").splitlines() or [""]
        _, _, why = next((line for line in words if " error: " in line), words[-1]).rpartition("  ")
        raise FluxFTError(f"the job ended with code {code}: {why}", hint=f"all that it said is in {name}.log")
    rows = [row for _, row in metrics_rows(folder / "metrics.jsonl") if "loss" in row]
    return {
        "first_step_s": stamps[0], "steps_s": stamps[-1] - stamps[0], "export_s": total - stamps[-1], "total_s": total,
        "step_s": statistics.median([row["step_s"] for row in rows[1:]] or [rows[0]["step_s"]]),
        "peak_gb": max((row["peak_gib"] * 2**30 / 1e9 for row in rows if "peak_gib" in row), default=None),
    }  # fmt: skip


def _stamp(lines: IO[str], path: Path, began: float) -> None:
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(f"{time.perf_counter() - began:8.2f}  {line}")
            file.flush()
