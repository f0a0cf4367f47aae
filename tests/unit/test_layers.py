"""The plan of the house, held by tests: who may import whom, what loads without torch, what lies in the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "flux_ft"

RANKS = {
    "": -1,  # flux_ft/__init__.py: the version and nothing else
    **dict.fromkeys(("errors", "types", "log", "files"), 0),
    **dict.fromkeys(("config", "runfile", "flow"), 1),
    **dict.fromkeys(("data", "families"), 2),
    **dict.fromkeys(("adapters", "plan"), 3),
    "infer": 4,
    "train": 5,
    **dict.fromkeys(("cli", "server", "bench", "bundle", "quickstart", "doctor", "__main__"), 6),
}
"""Every room, and its layer: imports point down, or sideways within a layer where SIBLINGS_APART does not forbid it."""

SIBLINGS_APART = {("data", "families"), ("families", "data"), ("flow", "config"), ("flow", "runfile")}

LIBRARY_HOMES = {
    "accelerate": ("flux_ft.train",),
    "bitsandbytes": ("flux_ft.train.optim", "flux_ft.families.quantize"),
    "peft": ("flux_ft.adapters",),
}
"""A library that only these modules, or modules inside these packages, may import."""

HEAVY = ("torch", "diffusers", "transformers")

LIGHT_MODULES = ("config", "errors", "types", "families.base", "cli")
"""Modules that load without HEAVY, so that `flux-ft --help` answers at once."""

TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "flux_ft", "configs", "scripts", "tests", "notebooks", "docs"}

MAX_FILE_BYTES = 5 * 2**20
MAX_REPOSITORY_BYTES = 8 * 2**20

HOME_PATH = re.compile(r"(?<![\w.~-])/(?:home|Users|root)/\w|\b[A-Za-z]:\\{1,2}Users\\", flags=re.ASCII)


class Import(NamedTuple):
    """One imported name, spelt in full: `flux_ft.data.cache`, or `flux_ft.data.cache.fill`."""

    name: str
    line: int
    at_load: bool
    """False inside a function: it runs when called, not when the module loads."""


def imports_of(source: str, module: str, *, is_package: bool = False) -> list[Import]:
    """All imports of a module, those inside functions too; less those that only a type checker reads."""
    found: list[Import] = []
    here = module.split(".") if is_package else module.split(".")[:-1]

    def visit(node: ast.AST, at_load: bool) -> None:
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for statement in node.orelse:
                    visit(statement, at_load)
                return
            case ast.Import():
                found.extend(Import(alias.name, node.lineno, at_load) for alias in node.names)
            case ast.ImportFrom():
                base = here[: len(here) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                found.extend(Import(f"{origin}.{alias.name}", node.lineno, at_load) for alias in node.names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found.append(Import(name, node.lineno, at_load))
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                at_load = False
        for child in ast.iter_child_nodes(node):
            visit(child, at_load)

    visit(ast.parse(source), True)
    return found


@cache
def modules() -> dict[str, Path]:
    """Every module of the package with its file."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> list[Import]:
    path = modules()[module]
    return imports_of(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")


def room(module: str) -> str:
    """`flux_ft.data.cache` lies in `data`; `flux_ft` itself in ``."""
    return module.split(".")[1] if "." in module else ""


def target(name: str) -> str | None:
    """The module of ours that an import loads; None for somebody else's."""
    if name.split(".")[0] != PACKAGE:
        return None
    while name not in modules() and "." in name:
        name = name.rpartition(".")[0]
    return name


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def own_imports() -> Iterator[tuple[str, str, Import]]:
    """(importing module, imported module, the import) for all imports within the package."""
    for module in modules():
        for found in imports(module):
            if (goal := target(found.name)) is not None:
                yield module, goal, found


def where(module: str, found: Import) -> str:
    return f"{modules()[module].relative_to(ROOT).as_posix()}:{found.line} imports {found.name}"


def tracked_files() -> list[Path]:
    """What git knows of and the working tree holds."""
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listing.decode("utf-8").split("\0") if name and (path := ROOT / name).is_file()]


class TestReadingImports:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("import torch.nn as nn", ["torch.nn"]),
            ("from flux_ft import errors, types", ["flux_ft.errors", "flux_ft.types"]),
            ("from . import cache", ["flux_ft.data.cache"]),
            ("from .cache import fill", ["flux_ft.data.cache.fill"]),
            ("from ..flow import loss", ["flux_ft.flow.loss"]),
            ("def f():\n    import peft", ["peft"]),
            ("class A:\n    async def f(self):\n        from peft import LoraConfig", ["peft.LoraConfig"]),
            ("try:\n    import a\nexcept ImportError:\n    import b", ["a", "b"]),
            ("import importlib\nimportlib.import_module('torch')", ["importlib", "torch"]),
            ("if TYPE_CHECKING:\n    import torch", []),
            ("if typing.TYPE_CHECKING:\n    import torch\nelse:\n    import a", ["a"]),
            ("if not TYPE_CHECKING:\n    import a", ["a"]),
        ],
    )
    def test_finds_every_form(self, source: str, expected: list[str]) -> None:
        assert [found.name for found in imports_of(source, "flux_ft.data.loader")] == expected

    def test_relative_to_a_package(self) -> None:
        assert (
            imports_of("from .cache import fill", "flux_ft.data", is_package=True)[0].name == "flux_ft.data.cache.fill"
        )

    def test_knows_what_runs_at_load(self) -> None:
        found = imports_of("import a\ndef f():\n    import b\nclass C:\n    import c", "flux_ft.flow")
        assert [(one.name, one.at_load) for one in found] == [("a", True), ("b", False), ("c", True)]


def test_every_room_has_a_layer() -> None:
    unknown = sorted({room(module) for module in modules()} - RANKS.keys())
    assert not unknown, f"new in {PACKAGE}/: {', '.join(unknown)}. Give it a layer in RANKS in {Path(__file__).name}."


def test_imports_point_down() -> None:
    wrong = []
    for module, goal, found in own_imports():
        here, there = room(module), room(goal)
        if here != there and (RANKS.get(there, 0) > RANKS.get(here, 0) or (here, there) in SIBLINGS_APART):
            wrong.append(where(module, found))
    assert not wrong, "imports that point up or sideways:\n" + "\n".join(wrong)


def test_nothing_imports_the_command_line() -> None:
    wrong = [
        where(module, found)
        for module, goal, found in own_imports()
        if room(goal) in ("cli", "__main__") and room(module) not in ("cli", "__main__")
    ]
    assert not wrong, "only __main__ imports cli:\n" + "\n".join(wrong)


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for module, goal, _ in own_imports():
        if goal != module:
            graph[module].add(goal)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("modules that import each other: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("library", LIBRARY_HOMES)
def test_library_stays_at_home(library: str) -> None:
    homes = LIBRARY_HOMES[library]
    wrong = [
        where(module, found)
        for module in modules()
        for found in imports(module)
        if inside(found.name, library) and not any(inside(module, home) for home in homes)
    ]
    assert not wrong, f"{library} is imported in {' and '.join(homes)} only:\n" + "\n".join(wrong)


def test_server_never_loads_torch() -> None:
    """Not by an import of its own anywhere, and not through anything of ours that it loads."""
    queue = [(module, found) for module in modules() if room(module) == "server" for found in imports(module)]
    seen: set[str] = set()
    wrong = []
    while queue:
        module, found = queue.pop()
        if any(inside(found.name, library) for library in (*HEAVY, "peft", "accelerate", "bitsandbytes")):
            wrong.append(where(module, found))
        goal = target(found.name)
        packages = [] if goal is None else [goal[:end] for end, c in enumerate(goal) if c == "."]
        for loaded in (*packages, *([] if goal is None else [goal])):
            if loaded not in seen:
                seen.add(loaded)
                queue += [(loaded, deeper) for deeper in imports(loaded) if deeper.at_load]
    assert not wrong, "the server reads files and starts verbs; these load torch:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", [name for name in LIGHT_MODULES if f"{PACKAGE}.{name}" in modules()])
def test_loads_without_torch(name: str) -> None:
    code = f"import sys, {PACKAGE}.{name}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_top_level_is_tidy() -> None:
    names = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert sorted(name for name in names - TOP_LEVEL if not name.startswith(".")) == []


def test_repository_is_small() -> None:
    sizes = {path: path.stat().st_size for path in tracked_files()}
    assert [path.relative_to(ROOT).as_posix() for path, size in sizes.items() if size > MAX_FILE_BYTES] == []
    assert sum(sizes.values()) < MAX_REPOSITORY_BYTES


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /" + "home/ann/pictures", True),
        ('"/' + 'Users/ann"', True),
        ("C:" + "\\Users\\ann", True),
        ("~/pictures and /data/pictures", False),
        ("https://example.com/" + "home/page", False),
    ],
)
def test_home_paths_are_recognised(text: str, found: bool) -> None:
    assert bool(HOME_PATH.search(text)) == found


def test_no_file_names_somebodys_home() -> None:
    wrong = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        name = path.relative_to(ROOT).as_posix()
        wrong += [f"{name}:{number}" for number, line in enumerate(lines, start=1) if HOME_PATH.search(line)]
    assert not wrong, "absolute paths into a home folder:\n" + "\n".join(wrong)
