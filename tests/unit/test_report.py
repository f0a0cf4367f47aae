"""The report: every file once, counts that add up, one page that needs nothing else."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_ft.data.ingest import ingest
from flux_ft.data.report import report_json, write_report
from flux_ft.errors import StorageError
from flux_ft.files import write_whole


@pytest.fixture
def report(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for seed, name in enumerate(["sub/a.png", "<b>&.png"]):
        pixels = np.random.default_rng(seed).integers(0, 256, (100, 200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "sub/a.txt").write_text('a "cat" <script>alert(1)</script> é')
    (folder / "bad.jpg").write_text("no picture")
    return ingest(folder, "TOK", "general", 1_048_576, 64)


def test_the_json_tells_every_file_once(report):
    told = report_json(report)
    assert told["counts"] == {"files": 3, "used": 2, "skipped": 1}
    assert [entry["path"] for entry in told["files"]] == ["<b>&.png", "bad.jpg", "sub/a.png"]
    assert told["files"][2] == {
        "path": "sub/a.png",
        "source": report.source,
        "status": "used",
        "reason": None,
        "width_px": 200,
        "height_px": 100,
        "bucket": [192, 64],
        "crop_loss": 0.333333,
        "caption": 'TOK, a "cat" <script>alert(1)</script> é',
        "caption_source": "txt",
        "warnings": [],
    }
    assert told["files"][1]["status"] == "skipped"
    assert told["files"][1]["reason"].startswith("not a JPEG")
    assert told["files"][1]["bucket"] is None
    assert all(entry.keys() == told["files"][0].keys() for entry in told["files"])


def test_both_files_are_written_and_nothing_else(report, tmp_path):
    folder = tmp_path / "run" / "new"
    json_path, html_path = write_report(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    assert json.loads(json_path.read_text("utf-8")) == report_json(report)
    page = html_path.read_text("utf-8")
    assert page.count('<img src="data:image/jpeg;base64,') == 2
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;&amp;.png" in page
    assert "200 × 100 → 192 × 64 px" in page
    assert "33.3% cropped" in page
    assert re.search(r"<ul class=skipped><li><code>bad\.jpg</code> not a JPEG", page)
    assert not re.search(r"(src|href)=.?https?:", page)
    assert str(tmp_path / "pictures") + "/" not in page


def test_a_picture_that_went_away_costs_only_its_thumbnail(report, tmp_path):
    report.placed[0].sample.path.unlink()
    page = write_report(report, tmp_path / "run")[1].read_text("utf-8")
    assert page.count("<img ") == 1
    assert page.count("<figure>") == 2


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        write_whole(path, b"new")
    assert caught.value.hint
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_checking_pictures_does_not_load_torch():
    code = "import sys, flux_ft.data.ingest, flux_ft.data.report; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
