"""`doctor --bundle`: secrets, places and wording of many forms are planted everywhere; none may be in the ZIP."""

import getpass
import io
import json
import platform
import re
import zipfile
from pathlib import Path

import pytest
import yaml

from flux_ft import bundle, cli
from flux_ft.bundle import clean, setting, write_bundle
from flux_ft.config import RunConfig
from flux_ft.doctor import Finding
from flux_ft.errors import ConfigError
from flux_ft.files import seal
from flux_ft.runfile import dump_run
from flux_ft.train.run import train

HEX40 = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {
    "hub token": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "short hub token": "hf_" + "x1y2z3",
    "wandb key": HEX40,
    "new wandb key": "wandb_v1_" + "Q9".join("abcdefgh"),
    "cloud key": "AKIA" + "IOSFODNN7EXAMPLE1234",
    "api key": "sk-" + "proj-Zz9-Yy8-Xx7",
    "git token": "ghp_" + "0aB1cD2eF3gH4iJ5kL6m",
    "json web token": "eyJ" + "hbGciOi.eyJzdWIi.SflKxwRJ",
    "uuid": "3f2504e0-4f89-11d3-9a0c-0305e82c3301",
    "password": "password: " + "hunter2please",
    "bearer": "Authorization: Bearer " + "opensesame",
    "url": "https://ann:" + "s3cretpw@hooks.example.org/T000/B000?key=zzzzz",
    "bucket": "s3://" + "anns-private-bucket/pictures",
    "mail": "ann.smith@" + "example.org",
    "webhook": "webhook_secret=" + "whsec9987",
}
PLACES = {
    "posix": "/home/" + "annsmith/My Pictures/birthday party/cat one.png",
    "mac": "/Users" + "/annsmith/Desktop/gift",
    "root": "/mnt" + "/nas42/annsmith",
    "windows": "C:" + "\\Users\\Ann Smith\\Pictures\\cat.png",
    "windows forward": "D:/" + "annsmith/secret project/x.png",
    "share": "\\\\" + "fileserver7\\annsmith\\x",
    "tilde": "~annsmith" + "/wedding",
    "relative": "../annsmith" + "/wedding",
    "file url": "file:///" + "home/annsmith/x",
    "quoted": "`/srv/" + "annsmith data/x.png` cannot be read",
}
WORDS = {
    "prompt": "a photo of bellatrix under the old willow tree",
    "trigger": "bellatrix",
    "comment": "wedding of Ann and Zoë",
    "caption": "bellatrix blowing out candles",
    "name": "grandma-dolores.png",
}
PIECES = (
    "AbCdEfGh", "x1y2z3", HEX40, "Q9b", "IOSFODNN", "Zz9", "0aB1cD2e", "SflKxwRJ", "3f2504e0", "hunter2", "opensesame",
    "s3cretpw", "hooks.example", "bucket", "ann.smith", "whsec", "annsmith", "Ann Smith", "birthday", "nas42",
    "fileserver7", "secret project", "cat one", "bellatrix", "willow", "wedding", "Zoë", "candles", "dolores",
    "columnofann", "smithbox",
)  # fmt: skip
"""What none of the above may leave behind, in any case."""

PLANTED = [*SECRETS.values(), *PLACES.values()]


def text_of(file):
    """Every byte of every file and name inside, and the archive's own bytes, as one text in lower case."""
    with zipfile.ZipFile(file) as archive:
        parts = [name.encode() + b"\n" + archive.read(name) for name in archive.namelist()]
    raw = [*parts, file.read_bytes()]
    texts = [part.decode("utf-8", "replace") for part in raw]
    unescaped = [re.sub(r"\\(?:u([0-9a-f]{4})|(\W))", lambda m: m[2] or chr(int(m[1], 16)), text) for text in texts]
    return "\n".join([*texts, *unescaped]).lower()


def inside(file, name):
    with zipfile.ZipFile(file) as archive:
        return archive.read(name).decode()


@pytest.fixture
def finished_run(tmp_path):
    """A run folder with something private at every place that holds text."""
    run = tmp_path / "annsmith wedding run"
    config = RunConfig.model_validate(
        {
            "model": PLACES["posix"], "model_parts": "annsmith/columnofann", "output": PLACES["windows"],
            "finetune_comment": WORDS["comment"], "trigger_word": WORDS["trigger"], "iterations": 77,
            "data": {"sources": [{"path": place} for place in PLACES.values()], "caption_column": "columnofann"},
            "captioner": {"model": "annsmith/wedding-captioner"}, "lora": {"targets": ["annsmith.*"]},
            "prior": {"prompts": [WORDS["prompt"]]}, "preview": {"prompts": [WORDS["prompt"], *SECRETS.values()]},
        }
    )  # fmt: skip
    run.mkdir()
    extra = {"webhook_secret": SECRETS["webhook"], "annsmith": {SECRETS["hub token"]: [*PLANTED]}, "note": [*PLANTED]}
    (run / "run.yaml").write_text(
        f"# {SECRETS['url']}\n" + dump_run(config) + yaml.safe_dump(extra, allow_unicode=True), encoding="utf-8"
    )
    rows = [{"step": step, "loss": 0.5, "sigma": float("nan")} for step in range(1, 701)]
    rows[600] |= {"note": PLANTED, "prompt": WORDS["prompt"] + PLACES["posix"], SECRETS["hub token"]: 1}
    del rows[600]["prompt"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + PLACES["posix"] + "\n")
    entry = {"source": PLACES["posix"], "caption": WORDS["caption"], "warnings": PLANTED, "reason": None}
    reasons = [
        f"{WORDS['name']} wins", "its caption `bellatrix's cake.txt` is not UTF-8 text", "damaged: 'willow' isn't it",
        *(f"cannot be read: {place}" for place in PLACES.values()), "not a regular file", "not a regular file",
    ]  # fmt: skip
    skipped = [
        entry | {"path": f"candles-{i}.png", "status": "skipped", "reason": one} for i, one in enumerate(reasons)
    ]
    report = {
        "sources": list(PLACES.values()), "warnings": PLANTED, "counts": {"files": 9, "used": 3},
        "files": [
            entry | {"path": f"birthday/{WORDS['name']}", "status": "used"},
            *skipped,
        ],
    }  # fmt: skip
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    for step in (50, 100):
        body = {
            "step": step,
            "fingerprint": {
                "trigger_word": WORDS["trigger"], "prior.prompts": [WORDS["prompt"]], "model": PLACES["windows"],
                "lora_rank": 16, "optim.name": "adamw", "learning rate": 1e-4, "digest of all pictures": "0f" * 8,
                "something new": PLANTED,
            },
            "circumstances": {"torch version": "2.13.0", "CPU threads": 4, "odd": " ".join(PLANTED)},
            "drift": [
                f"after step 5: `trigger_word` was '{WORDS['trigger']}', is now 'x'",
                "after step 5: `torch version` was '2.12.0', is now '2.13.0'", *PLANTED, WORDS["prompt"],
            ],
            "files": {
                "weights.safetensors": {"size": 5, "sha256": "ab" * 32}, "annsmith.pt": {"size": 6, "sha256": ""},
            },
        }  # fmt: skip
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(seal(body))
    (run / "checkpoints" / "step-annsmith").mkdir()
    (run / "checkpoints" / "step-annsmith" / "manifest.json").write_text(PLACES["posix"])
    for name in ("annsmith-comfyui.safetensors", "cache/latents/annsmith.safetensors", "wandb/annsmith.log"):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(WORDS["prompt"])
    return run


def test_nothing_private_is_in_any_byte(tmp_path, finished_run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS["hub token"])
    monkeypatch.setenv("COMPUTERNAME", "smithbox")
    monkeypatch.setattr(bundle, "_names", bundle._names.__wrapped__)
    findings = [
        Finding("gpu", True, " ".join(PLANTED), {"what": PLACES["posix"], "nested": [PLANTED]}),
        *(Finding("found", False, f"trouble with {one}") for one in PLANTED),
        Finding("machine", True, "it is called smithbox.local, and SMITHBOX by some"),
    ]
    file = tmp_path / "report.zip"
    write_bundle(file, findings, finished_run)
    text = text_of(file)
    assert "could not be read" not in text
    assert [piece for piece in (*PIECES, *SECRETS.values(), *PLACES.values()) if piece.lower() in text] == []
    assert str(tmp_path).lower() not in text


def test_the_plants_would_be_found(tmp_path):
    """Else the test above could not fail."""
    file = tmp_path / "open.zip"
    file.write_bytes(bundle._zipped({"x.json": json.dumps([PLANTED, list(WORDS.values()), "columnofann smithbox"])}))
    text = text_of(file)
    assert [piece for piece in PIECES if piece.lower() not in text] == []


def test_what_helps_is_kept(tmp_path, finished_run):
    file = tmp_path / "report.zip"
    told = write_bundle(file, [Finding("cpu", True, "4 threads on 8 cores")], finished_run)
    assert inside(file, "findings.txt") == "ok      cpu: 4 threads on 8 cores\n"
    assert json.loads(inside(file, "versions.json"))["torch"]
    settings = yaml.safe_load(inside(file, "run/run.yaml"))
    assert (settings["iterations"], settings["optim"]["name"], settings["mode"]) == (77, "auto", "general")
    assert settings["trigger_word"] == f"<{len(WORDS['trigger'])} characters>"
    assert settings["prior"]["prompts"] == [f"<{len(WORDS['prompt'])} characters>"]
    rows = [json.loads(line) for line in inside(file, "run/metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows[:50]] == list(range(1, 51))
    assert rows[50] == {"rows left out": 151}
    assert [row["step"] for row in rows[51:-1]] == list(range(202, 701))
    assert rows[-1] == "not JSON"
    report = json.loads(inside(file, "run/report.json"))
    assert report["counts"] == {"files": 9, "used": 3}
    assert report["reasons"]["not a regular file"] == 2
    assert report["reasons"]["<file> wins"] == 1
    assert report["reasons"]["its caption <text> is not UTF-8 text"] == 1
    manifest = json.loads(inside(file, "run/checkpoints/step-000100/manifest.json"))
    assert manifest["step"] == 100
    assert manifest["fingerprint"]["optim.name"] == "adamw"
    assert manifest["fingerprint"]["digest of all pictures"] == "0f" * 8
    assert manifest["circumstances"]["torch version"] == "2.13.0"
    assert manifest["drift"][:2] == [
        "after step 5: `trigger_word` changed", "after step 5: `torch version` was '2.12.0', is now '2.13.0'",
    ]  # fmt: skip
    assert manifest["files"]["weights.safetensors"] == {"size": 5, "sha256": "ab" * 32}
    assert len(manifest["digest"]) == 64
    files = inside(file, "run/files.txt")
    assert "<name>-comfyui.safetensors" in files
    assert "cache/ (1 files)" in files
    assert set(told.contents) | {"README.txt"} == set(zipfile.ZipFile(file).namelist())


def test_a_real_run(tmp_path, run_settings, on_cpu):
    """Nothing of what `train` writes is unreadable to it, and no path of it is told."""
    run = tmp_path / "run"
    train(
        run_settings(tmp_path, checkpoint={"every": 2}, preview={"every": 3, "prompts": ["a red circle"], "steps": 1})
    )
    file = tmp_path / "a.zip"
    told = write_bundle(file, [], run)
    assert {"run/run.yaml", "run/metrics.jsonl", "run/report.json", "run/files.txt"} <= set(told.contents)
    assert "run/checkpoints/step-000003/manifest.json" in told.contents
    text = text_of(file)
    assert "could not be read" not in text
    assert "a red circle" not in text
    assert "<secret>" not in text
    assert str(tmp_path).lower() not in text
    assert json.loads(inside(file, "run/checkpoints/step-000003/manifest.json"))["step"] == 3
    assert len(json.loads(inside(file, "run/report.json"))["counts"]) > 5


class TestReading:
    @pytest.mark.parametrize(
        "content", ["a: [", "a: &x [1]\nb: *x\n", "- 1\n" * 60_000, "[" * 2000, "5", "", "? [a]\n: 1"]
    )
    @pytest.mark.parametrize(
        "name", ["run.yaml", "report.json", "metrics.jsonl", "checkpoints/step-000001/manifest.json"]
    )
    def test_a_broken_file_costs_itself_alone(self, tmp_path, name, content):
        run = tmp_path / "run"
        path = run / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
        file = tmp_path / "a.zip"
        assert f"run/{name}" in write_bundle(file, [], run).contents
        assert inside(file, f"run/{name}")

    def test_an_empty_run_folder(self, tmp_path):
        (tmp_path / "run").mkdir()
        assert "run/files.txt" in write_bundle(tmp_path / "a.zip", [], tmp_path / "run").contents

    def test_the_same_makes_the_same_bytes(self, tmp_path, finished_run):
        for name in ("a.zip", "b.zip"):
            write_bundle(tmp_path / name, [], finished_run)
        assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("4.2 GiB free, bfloat16 yes", "4.2 GiB free, bfloat16 yes"),
        ("differs in 17/29 repeats", "differs in 17/29 repeats"),
        ("1 × 4,608 tokens, 24 heads × 128", "1 × 4,608 tokens, 24 heads × 128"),
        ("Linux-5.15.167.4-microsoft-standard-WSL2-x86_64-with-glibc2.35",) * 2,
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel(R) Xeon(R) CPU @ 2.20GHz"),
        ("allow_bf16_reduced_precision_reduction True",) * 2,
        ("allow_bf16_reduced_precision_reduction2", "<secret>"),
        ("_scaled_dot_product_efficient_attention_backward is not deterministic",) * 2,
        ("its weights are in " + PLACES["posix"], "its weights are in <path>"),
        ("see " + PLACES["tilde"] + "\nand go on", "see <path>\nand go on"),
        ("get it from " + SECRETS["url"] + " soon", "get it from <url> soon"),
    ],
)
def test_sentences(text, cleaned, monkeypatch):
    monkeypatch.setattr(bundle, "_names", lambda: None)
    assert clean(text) == cleaned


def test_names_of_user_and_machine_go_as_whole_words(monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "box7.example")
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    monkeypatch.setattr(bundle, "_names", bundle._names.__wrapped__)
    assert clean("Ann's box7 and BOX7.EXAMPLE, as planned, ann_x") == "<name>'s <name> and <name>, as planned, <name>_x"


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("model", "flux1-dev", True), ("model", "ann/model", False), ("mode", "style", True),
        ("trigger_word", "style", False), ("logging.trackers", ["wandb"], True), ("lora.targets", "blocks", True),
        ("lora.targets", ["to_ann"], False), ("webhook_secret", "0f" * 32, False), ("nobody.knows", "style", False),
        ("optim.betas", [0.9, 0.99], True), ("preview.prompts", ["auto"], False),
    ],
)  # fmt: skip
def test_a_text_is_kept_only_as_a_word_of_the_schema(key, value, kept):
    assert (setting(key, value) == value) == kept


class TestVerb:
    def test_it_tells_what_is_inside(self, tmp_path, finished_run, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        cli.app(["doctor", str(finished_run), "--bundle", "a.zip"], standalone_mode=False)
        told = capsys.readouterr().out
        for name in ("findings.txt", "run/run.yaml", "run/metrics.jsonl", "run/checkpoints/"):
            assert f"  {name}" in told
        assert "Not inside: pictures, captions, prompts" in told
        readme = inside(tmp_path / "a.zip", "README.txt")
        assert all(line in readme for line in told.splitlines() if line.startswith("  "))

    def test_without_a_run_nothing_of_runs_is_told(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        cli.app(["doctor", "--bundle", "a.zip", "--json"], standalone_mode=False)
        data = json.loads(capsys.readouterr().out)
        assert data["bundle"] == {"file": "a.zip", "contents": ["findings.txt", "findings.json", "versions.json"]}
        assert "run/" not in inside(tmp_path / "a.zip", "README.txt")
        assert zipfile.ZipFile(io.BytesIO((tmp_path / "a.zip").read_bytes())).testzip() is None

    def test_nothing_is_overwritten(self, tmp_path):
        file = tmp_path / "a.zip"
        file.write_bytes(b"mine")
        with pytest.raises(ConfigError, match="exists already"):
            write_bundle(file, [])
        assert file.read_bytes() == b"mine"

    def test_a_run_folder_has_to_be_there_and_wants_a_bundle(self, tmp_path):
        with pytest.raises(ConfigError, match="no such run folder"):
            write_bundle(tmp_path / "a.zip", [], Path("nowhere"))
        with pytest.raises(ConfigError, match="read for a bundle only"):
            cli.app(["doctor", str(tmp_path)], standalone_mode=False)
        assert list(tmp_path.iterdir()) == []
