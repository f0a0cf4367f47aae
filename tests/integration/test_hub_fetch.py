"""`hf:owner/name` through the real client libraries, from a Hub on the loopback and then without any.

The libraries read their environment when they are imported, so each reading is a child process.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from _fake_hub import FakeHub, Repo, serve
from PIL import Image

CHILD = """
import hashlib, json, sys
from flux_ft.config import SourceConfig
from flux_ft.data.hub import open_dataset
from flux_ft.errors import DataError
for settings in json.loads(sys.argv[1]):
    config = SourceConfig(**settings)
    try:
        source = open_dataset(config)
        rows = [[one.name, one.caption, hashlib.sha256(source.read(one.name)).hexdigest()] for one in source.files()]
        print(json.dumps({"kind": type(source).__name__, "identity": source.identity, "rows": rows}))
    except DataError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
"""
Answer = dict[str, Any]


def jpeg(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


PICTURES = [jpeg(seed) for seed in range(4)]


def parquet(folder: Path, pictures: list[bytes]) -> bytes:
    rows = {
        "image": [{"bytes": data, "path": f"cat {row}.jpg"} for row, data in enumerate(pictures)],
        "text": [f"a cat, {row}" for row in range(len(pictures))],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    return (folder / "rows.parquet").read_bytes()


def hashes(rows: list[list[str]]) -> list[str]:
    return [row[2] for row in rows]


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Repo]:
    folder = tmp_path_factory.mktemp("rows")
    four, two = parquet(folder, PICTURES), parquet(folder, PICTURES[:2])
    subsets = "configs:\n- config_name: big\n  data_files: big/*\n- config_name: small\n  data_files: small/*\n"
    one = b"---\nconfigs:\n- config_name: plain\n  data_files: '*.parquet'\n---\n"
    files = {f"cat [{row}].jpg": data for row, data in enumerate(PICTURES)}
    return {
        "ann/cats": Repo(
            {
                "main": {"data/train-00000-of-00001.parquet": four, "data/test-00000-of-00001.parquet": two},
                "v1": {"data/train-00000-of-00001.parquet": two},
            }
        ),
        "ann/subsets": Repo(
            {"main": {"README.md": f"---\n{subsets}---\n".encode(), "big/a.parquet": four, "small/a.parquet": two}}
        ),
        "ann/plain": Repo({"main": {"README.md": one, "a.parquet": four}, "v1": {"README.md": one, "a.parquet": two}}),
        "ann/pictures": Repo({"main": files | {f"cat [{row}].txt": b"a cat" for row in range(4)}}),
        "ann/splits": Repo({"main": {f"train/{name}": data for name, data in files.items()} | {"test/a.png": b""}}),
        "ann/gated": Repo({"main": {"data/train-00000-of-00001.parquet": four}}, gated=True),
        "ann/program": Repo({"main": {"program.py": b"raise SystemExit('it ran')"}}),
        "ann/broken": Repo({"main": {"data/train-00000-of-00001.parquet": four[:-100]}}),
    }


@pytest.fixture(scope="module")
def hub(repos: dict[str, Repo]) -> Iterator[FakeHub]:
    with serve(repos) as hub:
        yield hub


def read(env: dict[str, str], *settings: str | dict[str, Any]) -> tuple[list[Answer], str]:
    """What a child process says of each source, and what it wrote to stderr."""
    configs = [{"path": one} if isinstance(one, str) else one for one in settings]
    command = [sys.executable, "-c", CHILD, json.dumps(configs)]
    # Wherever the test runs from, the child reads this package.
    env = env | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture
def online(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """Each test has a cache of its own."""
    hub.requests.clear()
    return hub.env(tmp_path / "home", USE_TORCH="0")


@pytest.fixture
def offline(online: dict[str, str]) -> dict[str, str]:
    return online | {"HF_HUB_OFFLINE": "1"}


def test_fetched_once_then_read_from_the_cache(
    online: dict[str, str], offline: dict[str, str], hub: FakeHub, repos: dict[str, Repo]
) -> None:
    [first], told = read(online, "hf:ann/cats")
    assert [row[:2] for row in first["rows"]] == [[f"{row:06d} cat {row}.jpg", f"a cat, {row}"] for row in range(4)]
    assert repos["ann/cats"].commit("main") in first["identity"]
    assert (told.count("\n"), "copying" in told) == (1, True)
    hub.requests.clear()
    assert read(online, "hf:ann/cats") == ([first], "")
    assert not [request for request in hub.requests if "parquet" in request]
    hub.requests.clear()
    answers, told = read(offline, "hf:ann/cats", {"path": "hf:ann/cats", "streaming": True})
    assert answers[0] == first
    assert answers[1]["rows"] == first["rows"]
    assert (told, hub.requests) == ("", [])


def test_a_folder_of_the_same_name_is_not_taken_for_it(
    online: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ann" / "cats").mkdir(parents=True)
    (tmp_path / "ann" / "cats" / "x.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    [answer], _ = read(online, "hf:ann/cats")
    assert len(answer["rows"]) == 4


def test_revisions_are_told_apart_offline_too(
    online: dict[str, str], offline: dict[str, str], repos: dict[str, Repo]
) -> None:
    commit = repos["ann/cats"].commit("v1")
    paths = ["hf:ann/cats", "hf:ann/cats@v1", f"hf:ann/cats@{commit}", "hf:ann/cats@v2"]
    (main, tagged, pinned, unknown), _ = read(online, *paths)
    assert (len(main["rows"]), len(tagged["rows"])) == (4, 2)
    assert pinned["rows"] == tagged["rows"]
    assert "no such revision" in unknown["error"]
    (*same, unknown), _ = read(offline, *paths)
    assert same == [main, tagged, pinned]
    assert "cannot be fetched" in unknown["error"]


def test_streaming_prepares_nothing(online: dict[str, str], tmp_path: Path) -> None:
    [streamed], _ = read(online, {"path": "hf:ann/cats", "streaming": True})
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".arrow", ".parquet")]
    [whole], _ = read(online, "hf:ann/cats")
    assert streamed["rows"] == whole["rows"]
    assert list(tmp_path.rglob("*.arrow"))


def test_a_new_commit_is_seen(online: dict[str, str], repos: dict[str, Repo], tmp_path: Path) -> None:
    [first], _ = read(online, "hf:ann/cats")
    branch = repos["ann/cats"].branches["main"]
    before = dict(branch)
    try:
        branch["data/train-00000-of-00001.parquet"] = parquet(tmp_path, PICTURES[::-1])
        [second], _ = read(online, "hf:ann/cats")
    finally:
        branch.update(before)
    assert hashes(second["rows"]) == hashes(first["rows"])[::-1]
    assert second["identity"] != first["identity"]


def test_subsets(online: dict[str, str], offline: dict[str, str]) -> None:
    (unnamed, unknown, small, big), _ = read(
        online, "hf:ann/subsets", "hf:ann/subsets:none", "hf:ann/subsets:small", "hf:ann/subsets@main:big"
    )
    assert "it has `big`, `small`" in unnamed["error"]
    assert "it has `big`, `small`" in unknown["error"]
    assert (len(small["rows"]), len(big["rows"])) == (2, 4)
    (unnamed, unknown, *same), _ = read(
        offline, "hf:ann/subsets", "hf:ann/subsets:none", "hf:ann/subsets:small", "hf:ann/subsets:big"
    )
    assert "one of its subsets" in unnamed["error"]
    assert "not in the cache" in unknown["error"]
    assert same == [small, big]


def test_the_only_subset_needs_no_name_offline_either(online: dict[str, str], offline: dict[str, str]) -> None:
    (new, old), _ = read(online, "hf:ann/plain", "hf:ann/plain@v1")
    assert (len(new["rows"]), len(old["rows"])) == (4, 2)
    assert new["identity"].endswith(":plain train image")
    answers, told = read(offline, "hf:ann/plain", "hf:ann/plain@v1")
    assert answers == [new, old]
    assert "subset `plain` is in the cache" in told


def test_pictures_as_files_are_a_folder(online: dict[str, str], offline: dict[str, str], hub: FakeHub) -> None:
    names = sorted(f"cat [{row}].{ending}" for row in range(4) for ending in ("jpg", "txt"))
    answers, told = read(online, "hf:ann/pictures", "hf:ann/splits")
    assert [answer["kind"] for answer in answers] == ["FolderSource"] * 2
    assert [row[0] for row in answers[0]["rows"]] == names
    assert [row[0] for row in answers[1]["rows"]] == [f"cat [{row}].jpg" for row in range(4)]
    assert hashes(answers[1]["rows"]) == hashes(answers[0]["rows"][::2])
    assert "hf:ann/pictures: fetching 8 files" in told
    assert not [request for request in hub.requests if "test/a.png" in request]
    assert read(online, "hf:ann/pictures", "hf:ann/splits") == (answers, "")
    assert read(offline, "hf:ann/pictures", "hf:ann/splits") == (answers, "")


FAILURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "absent": ({"path": "hf:ann/none"}, "no such dataset on the Hub, or it is private", "hf auth login"),
    "name": ({"path": "hf:ann/--"}, "no such dataset on the Hub", "owner and name"),
    "gated": ({"path": "hf:ann/gated"}, "is gated", "hf auth login"),
    "program": ({"path": "hf:ann/program"}, "programs of others are not run", "refs/convert/parquet"),
    "broken": ({"path": "hf:ann/broken"}, "cannot be read as a dataset", "damaged"),
    "broken stream": ({"path": "hf:ann/broken", "streaming": True}, "cannot be read as a dataset", "damaged"),
    "split": ({"path": "hf:ann/cats", "split": "nope"}, "no split `nope`; it has `train`, `test`", "split: train"),
}


def test_each_failure_is_one_message(online: dict[str, str], offline: dict[str, str], hub: FakeHub) -> None:
    answers, told = read(online, *(settings for settings, _, _ in FAILURES.values()))
    for (name, (_, message, hint)), answer in zip(FAILURES.items(), answers, strict=True):
        assert message in answer["error"], name
        assert hint in answer["hint"], name
    assert "Traceback" not in told
    assert not [request for request in hub.requests if request.startswith("GET /datasets/ann/cats")]
    [answer], _ = read(offline, "hf:ann/cats")
    assert "cannot be fetched from the Hub, and it is not in the cache" in answer["error"]
    assert "HF_HUB_OFFLINE" in answer["hint"]


def test_a_hub_that_is_gone(repos: dict[str, Repo], tmp_path: Path) -> None:
    """Not told to be offline: the connection is refused."""
    with serve(repos) as hub:
        env = hub.env(tmp_path, USE_TORCH="0")
        fetched, _ = read(env, "hf:ann/cats", "hf:ann/pictures")
    (*again, other), _ = read(env, "hf:ann/cats", "hf:ann/pictures", "hf:ann/splits")
    assert again == fetched
    assert "cannot be fetched from the Hub, and it is not in the cache" in other["error"]
