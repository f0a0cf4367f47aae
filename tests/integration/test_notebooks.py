"""The notebooks run from top to bottom, define nothing and are stored without outputs."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from _verbs import ROOT, child_env
from PIL import Image

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
class TestAsStored:
    def test_is_valid(self, path: Path) -> None:
        nbformat.validate(nbformat.read(path, as_version=4))

    def test_defines_nothing(self, path: Path) -> None:
        for cell in code_cells(nbformat.read(path, as_version=4)):
            found = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, DEFINITIONS)]
            assert not found, cell.source

    def test_stores_no_outputs(self, path: Path) -> None:
        for cell in code_cells(nbformat.read(path, as_version=4)):
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Runs a notebook with four training steps; gives its cells' outputs."""
    from nbclient import NotebookClient

    for name, value in child_env().items():
        monkeypatch.setenv(name, value)

    def outputs_of(name: str) -> list[Any]:
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        first = code_cells(notebook)[0]
        first.source, changed = re.subn(r"^iterations = \d+", "iterations = 4", first.source, flags=re.MULTILINE)
        assert changed == 1
        fewer = "import flux_ft.quickstart\n\nflux_ft.quickstart.NUM_PROMPTS = 8"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(fewer))
        place = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
        assert [path.name for path in tmp_path.iterdir()] == ["runs"]
        outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        return outputs

    return outputs_of


def num_pictures(outputs: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_quickstart_notebook_runs(run: Callable[[str], list[Any]], tmp_path: Path) -> None:
    outputs = run("01_quickstart.ipynb")
    assert num_pictures(outputs) == 2
    assert any("| of 64 prompts |" in output.get("data", {}).get("text/markdown", "") for output in outputs)
    with Image.open(tmp_path / "runs" / "notebook" / "before_after.png") as grid:
        grid.load()


@pytest.mark.slow
def test_your_own_lora_notebook_runs(run: Callable[[str], list[Any]], tmp_path: Path) -> None:
    outputs = run("02_your_own_lora.ipynb")
    assert num_pictures(outputs) == 6
    assert any("the same to the pixel" in output.get("text", "") for output in outputs)
    assert (tmp_path / "runs" / "drawing" / "sweep" / "sheet.html").is_file()
