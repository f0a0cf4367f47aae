"""scripts/_environment.py: what can be tested without installing anything."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flux_ft_scripts_environment", SCRIPTS / "_environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


env = load()
FACTS: dict[str, Any] = {
    "pyproject": b"[project]",
    "constraints": b"torch==2.13.0\n",
    "version": (3, 11, 7),
    "machine": "linux-x86_64",
    "root": Path("repo"),
}


def bare_venv(folder: Path) -> Path:
    venv.EnvBuilder(symlinks=sys.platform != "win32", with_pip=False).create(folder)
    return folder


@pytest.mark.parametrize("name", ["_environment.py", "quickstart.py", "test.py"])
def test_an_old_python_can_read_the_scripts(name: str) -> None:
    source = (SCRIPTS / name).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))
    # Python 3.11 reads a `with` in parentheses under any feature_version; Python 3.8 does not.
    assert not re.search(r"^\s*with \($", source, flags=re.MULTILINE)


class TestPythonVersion:
    @pytest.mark.parametrize("version", [(3, 11, 0), (3, 13, 1), (4, 0, 0)])
    def test_new_enough(self, version: tuple[int, ...]) -> None:
        env.require_python(version)

    @pytest.mark.parametrize("version", [(2, 7, 18), (3, 8, 18), (3, 10, 99)])
    def test_too_old(self, version: tuple[int, ...]) -> None:
        with pytest.raises(env.SetupError, match=rf"needs Python 3\.11.*this is Python {version[0]}\.{version[1]} "):
            env.require_python(version)


class TestPlaces:
    def test_python_inside_a_venv(self) -> None:
        assert env.venv_python(Path("a b"), "posix") == Path("a b/bin/python")
        assert env.venv_python(Path("a b"), "nt") == Path("a b/Scripts/python.exe")

    def test_default_folder(self, tmp_path: Path) -> None:
        assert env.venv_folder({}, tmp_path) == tmp_path / ".venv"
        assert env.venv_folder({"FLUX_FT_VENV": " "}, tmp_path) == tmp_path / ".venv"

    def test_chosen_folder(self, tmp_path: Path) -> None:
        assert env.venv_folder({"FLUX_FT_VENV": str(tmp_path / "my env")}, Path("repo")) == tmp_path / "my env"
        assert env.venv_folder({"FLUX_FT_VENV": "elsewhere"}, Path("repo")) == Path.cwd() / "elsewhere"


class TestStamp:
    def test_round_trip(self, tmp_path: Path) -> None:
        env.write_stamp(tmp_path, "abc", frozenset({"dev", "wandb"}))
        assert env.read_stamp(tmp_path) == ("abc", frozenset({"dev", "wandb"}))
        assert [path.name for path in tmp_path.iterdir()] == [env.STAMP_FILE]

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", '{"fingerprint": "abc"}', '{"fingerprint": "a", "extras": 3}']
    )
    def test_a_damaged_stamp_is_no_stamp(self, tmp_path: Path, text: str) -> None:
        (tmp_path / env.STAMP_FILE).write_text(text, encoding="utf-8")
        assert env.read_stamp(tmp_path) == ("", frozenset())

    def test_no_stamp(self, tmp_path: Path) -> None:
        assert env.read_stamp(tmp_path / "nowhere") == ("", frozenset())

    @pytest.mark.parametrize(
        "change",
        [
            {"pyproject": b"[project] "},
            {"constraints": b"torch==2.14.0\n"},
            {"version": (3, 12, 7)},
            {"machine": "darwin-arm64"},
            {"root": Path("elsewhere")},
            {"pyproject": b"[project]t", "constraints": b"orch==2.13.0\n"},
        ],
        ids=lambda change: "+".join(change),
    )
    def test_fingerprint_follows_every_fact(self, change: dict[str, Any]) -> None:
        assert env.fingerprint(**{**FACTS, **change}) != env.fingerprint(**FACTS)

    def test_fingerprint_ignores_the_patch_release(self) -> None:
        assert env.fingerprint(**{**FACTS, "version": (3, 11, 9)}) == env.fingerprint(**FACTS)


class TestEnsure:
    """`ensure_environment` with pip replaced: what it does, and what it leaves undone."""

    @pytest.fixture
    def installs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
        calls: list[frozenset[str]] = []

        def install(folder: Path, python: Path, constraints: str, extras: frozenset[str]) -> None:
            assert not (folder / env.STAMP_FILE).exists()
            calls.append(extras)

        monkeypatch.setenv("FLUX_FT_VENV", str(bare_venv(tmp_path / "my env")))
        monkeypatch.setattr(env, "_make_venv", lambda folder, python: None)
        monkeypatch.setattr(env, "_install", install)
        return calls

    def test_second_start_installs_nothing(self, tmp_path: Path, installs: list[frozenset[str]]) -> None:
        assert env.ensure_environment() == env.venv_python(tmp_path / "my env")
        env.ensure_environment()
        assert installs == [frozenset()]

    def test_extras_add_up(self, installs: list[frozenset[str]]) -> None:
        dev = frozenset({"dev"})
        env.ensure_environment()
        env.ensure_environment(dev)
        env.ensure_environment()
        env.ensure_environment(dev)
        assert installs == [frozenset(), dev]

    def test_new_pins_keep_the_extras(
        self, tmp_path: Path, installs: list[frozenset[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dev = frozenset({"dev"})
        env.ensure_environment(dev)
        newer = tmp_path / "constraints.txt"
        newer.write_text("torch==99\n", encoding="utf-8")
        monkeypatch.setattr(env, "CONSTRAINTS", newer)
        env.ensure_environment()
        assert installs == [dev, dev]

    def test_a_venv_without_its_python_is_not_taken_as_ready(
        self, tmp_path: Path, installs: list[frozenset[str]]
    ) -> None:
        env.ensure_environment()
        env.venv_python(tmp_path / "my env").unlink()
        env.ensure_environment()
        assert len(installs) == 2

    @pytest.mark.parametrize(
        ("trouble", "code"), [(KeyboardInterrupt(), 130), (env.SetupError("no network"), 1), (OSError("disk full"), 1)]
    )
    def test_a_broken_install_leaves_no_stamp(
        self,
        tmp_path: Path,
        installs: list[frozenset[str]],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        trouble: BaseException,
        code: int,
    ) -> None:
        def fail(*_: object) -> None:
            raise trouble

        env.ensure_environment()
        monkeypatch.setattr(env, "_install", fail)
        with pytest.raises(SystemExit) as stopped:
            env.ensure_environment(frozenset({"dev"}))
        assert stopped.value.code == code
        assert env.read_stamp(tmp_path / "my env") == ("", frozenset())
        said = capsys.readouterr().err
        assert str(trouble) in said
        assert "Traceback" not in said


class TestClearing:
    def test_an_empty_folder_is_fine(self, tmp_path: Path) -> None:
        env._clear(tmp_path)
        env._clear(tmp_path / "nowhere")
        assert tmp_path.is_dir()

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").touch()
        with pytest.raises(env.SetupError, match="FLUX_FT_VENV"):
            env._clear(tmp_path)
        assert (tmp_path / "thesis.txt").exists()

    def test_somebody_elses_working_venv_is_left_alone(self, tmp_path: Path) -> None:
        with pytest.raises(env.SetupError, match="leave it alone"):
            env._clear(bare_venv(tmp_path / "theirs"))

    def test_an_unfinished_one_of_ours_goes(self, tmp_path: Path) -> None:
        (tmp_path / "ours").mkdir()
        (tmp_path / "ours" / env.OWNER_FILE).touch()
        env._clear(tmp_path / "ours")
        assert not (tmp_path / "ours").exists()

    def test_a_venv_whose_python_is_gone_goes(self, tmp_path: Path) -> None:
        broken = bare_venv(tmp_path / "broken")
        env.venv_python(broken).unlink()
        env._clear(broken)
        assert not broken.exists()


class TestChildren:
    def test_exit_code_and_settings_pass_through(self) -> None:
        environ = env.child_environment({**env.os.environ, "A": "user"}, {"A": "ours", "B": "ours"})
        assert environ["A"] == "user"
        assert environ["B"] == "ours"
        code = "import os, sys; sys.exit(7 if os.environ['B'] == 'ours' else 1)"
        assert env.run_child([sys.executable, "-c", code], environ) == 7

    @pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
    def test_a_stopped_child_is_130(self) -> None:
        code = "import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)"
        assert env.run_child([sys.executable, "-c", code], dict(env.os.environ)) == 130

    def test_malloc_settings_are_linux_only_and_the_users_to_change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(env.sys, "platform", "linux")
        assert env.child_environment({}, {})["MALLOC_MMAP_MAX_"] == "0"
        assert env.child_environment({"MALLOC_MMAP_MAX_": "9"}, {})["MALLOC_MMAP_MAX_"] == "9"
        monkeypatch.setattr(env.sys, "platform", "darwin")
        assert env.child_environment({}, {}) == {}


class TestPip:
    def test_requirement_names(self) -> None:
        root = Path("my folder")
        assert env.editable_requirement(root, frozenset()) == "my folder"
        assert env.editable_requirement(root, frozenset({"wandb", "dev"})) == "my folder[dev,wandb]"

    def test_pins(self) -> None:
        text = "torchao==1\ntorch==2.13.0; platform_system != 'Plan9'\n"
        assert env.pinned(text, "torch") == "torch==2.13.0"
        with pytest.raises(env.SetupError, match="no pin for numpy"):
            env.pinned(text, "numpy")

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("Collecting numpy>=1.26 (from flux_ft)", "looking up numpy"),
            ("Collecting torch==2.13.0", "looking up torch"),
            ("  Downloading torch-2.13.0-cp311-none-any.whl (812.3 MB)", "getting torch, 812.3 MB"),
            ("Using cached pillow-13.0.0-cp311-none-any.whl.metadata (9.1 kB)", "getting pillow, 9.1 kB"),
            ("Installing collected packages: a, b, c", "unpacking 3 packages, which takes a while"),
            ("  Preparing editable metadata (pyproject.toml): started", "building flux_ft"),
            ("Requirement already satisfied: torch", None),
            ("", None),
        ],
    )
    def test_progress(self, line: str, words: str | None) -> None:
        assert env.progress_words(line) == words


PINS = [line for line in env.CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
PINNED_NAMES = [line.partition("==")[0] for line in PINS]


class TestConstraints:
    def test_every_line_is_one_exact_public_version(self) -> None:
        assert [
            line for line in PINS if not re.fullmatch(r'[a-z0-9.-]+==[\w.]+(; platform_system .= "\w+")?', line)
        ] == []

    def test_sorted_and_unique(self) -> None:
        assert sorted(set(PINNED_NAMES)) == PINNED_NAMES

    def test_all_that_pyproject_asks_for_is_pinned(self) -> None:
        project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"], *env.INSTALL_FIRST]
        names = {re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", line)[0].lower()) for line in wanted}
        assert names - set(PINNED_NAMES) == set()
