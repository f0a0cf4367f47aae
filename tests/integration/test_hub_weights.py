"""A transformer of a Hub id through the real client library, from a Hub on the loopback and then without any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from _fake_hub import Repo, serve
from diffusers import FluxTransformer2DModel

from flux_ft.families.registry import open_family, tiny_folder
from flux_ft.train.digest import weights_digest

CHILD = """
import json, sys, torch
from flux_ft.errors import ModelError
from flux_ft.families.flux1 import Flux1
from flux_ft.families.registry import VARIANTS
from flux_ft.train.digest import weights_digest
for source in sys.argv[1:]:
    try:
        denoiser = Flux1(VARIANTS["flux-tiny"], source, source).load_denoiser(torch.device("cpu"), torch.float32)
        print(json.dumps([weights_digest(denoiser.named_parameters()), denoiser.config["_name_or_path"]]))
    except ModelError as error:
        print(json.dumps([error.message, error.hint]))
"""


def load(env: dict[str, str], *sources: str) -> list[list[str]]:
    env = env | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", CHILD, *sources], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_only_what_the_index_names_is_fetched_and_once(tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(tiny_folder(), subfolder="transformer", torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    shards = {f"transformer/{path.name}": path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    whole = {f"transformer/{path.name}": path.read_bytes() for path in (tiny_folder() / "transformer").iterdir()}
    other = {
        "transformer/diffusion_pytorch_model.fp16.safetensors": b"x",
        "transformer/diffusion_pytorch_model.bin": b"x",
    }
    lost = {name: data for name, data in shards.items() if "00002" not in name}
    assert len(shards) > 4
    repos = {
        "ann/shards": Repo({"main": shards | other}), "ann/whole": Repo({"main": whole | other}),
        "ann/lost": Repo({"main": lost}), "ann/gated": Repo({"main": whole}, gated=True),
    }  # fmt: skip
    digest = weights_digest(
        open_family("flux-tiny").load_denoiser(torch.device("cpu"), torch.float32).named_parameters()
    )
    with serve(repos) as hub:
        env = hub.env(tmp_path / "home", HF_HUB_DISABLE_PROGRESS_BARS="1")
        first, again, one, no_shard, gated, nowhere = load(
            env, "ann/shards", "ann/shards", "ann/whole", "ann/lost", "ann/gated", "ann/nowhere"
        )
        read = [request for request in hub.requests if "GET /ann/" in request and "/resolve/" in request]
        hub.requests.clear()
        offline = load(env | {"HF_HUB_OFFLINE": "1"}, "ann/shards", "ann/nowhere")
        assert not hub.requests
    assert first == again == offline[0] == [digest, "ann/shards"]
    assert one == [digest, "ann/whole"]
    for name, files in (("ann/shards", shards), ("ann/whole", whole)):
        got = [request.split("/", 5)[5] for request in read if name in request]
        assert sorted(got) == sorted(files)
    assert "ann/nowhere: `transformer` could not be fetched from the Hub" in offline[1][0]
    assert "lacks diffusion_pytorch_model-00002" in no_shard[0]
    for (message, hint), name in ((gated, "ann/gated"), (nowhere, "ann/nowhere")):
        assert f"{name}: `transformer` could not be fetched from the Hub" in message
        assert f"https://huggingface.co/{name}" in hint
