"""Makes the Python environment that quickstart.py and test.py run in.

    ensure_environment(extras) -> python     the venv's interpreter, with flux_ft installed at the pinned versions

The environment lies in `.venv` beside pyproject.toml, or where FLUX_FT_VENV points. Two small files in it are ours:

    flux_ft-made-this     written first: these scripts may throw the folder away and build it again
    flux_ft-stamp.json    written last: what was installed, so that the next start can skip pip altogether

Standard library only. Python 3.8 must be able to read and run this file as far as `require_python`, so that an old
Python gets one sentence, not a SyntaxError.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

OLDEST_PYTHON = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"

OWNER_FILE = "flux_ft-made-this"
STAMP_FILE = "flux_ft-stamp.json"
LOG_FILE = "flux_ft-pip.log"

STOPPED = 130
LOG_TAIL_LINES = 15
HEARTBEAT_S = 30.0
"""Where the output is not a terminal, a sign of life this often."""

INSTALL_FIRST = ("torch", "setuptools")
"""Installed alone, ahead of the rest: with its exact version named, pip takes a local build of torch where it is
offered one; setuptools then builds flux_ft itself, so that nothing outside the pins is downloaded for that."""


class SetupError(Exception):
    """The environment could not be made; the message says why and what to do."""


def require_python(version: tuple[int, ...]) -> None:
    """Refuse a Python that is too old for flux_ft."""
    if version[:2] < OLDEST_PYTHON:
        raise SetupError(
            "flux_ft needs Python {}.{} or newer, and this is Python {}.{} ({}).\n"
            "Start the script with a newer one, for example: python3.11 {}".format(
                *OLDEST_PYTHON, *version[:2], sys.executable, sys.argv[0]
            )
        )


def venv_folder(environ: dict[str, str] | os._Environ[str], root: Path = ROOT) -> Path:
    """FLUX_FT_VENV if it is set, else `.venv` in the repository."""
    chosen = environ.get("FLUX_FT_VENV", "").strip()
    return Path(chosen).expanduser().absolute() if chosen else root / ".venv"


def venv_python(folder: Path, os_name: str = os.name) -> Path:
    """The interpreter inside a venv."""
    return folder / "Scripts" / "python.exe" if os_name == "nt" else folder / "bin" / "python"


def pinned(constraints: str, package: str) -> str:
    """The requirement `package==version` out of the constraints text."""
    found = re.search(rf"^{re.escape(package)}==[^\s;]+", constraints, flags=re.MULTILINE)
    if found is None:
        raise SetupError(f"{CONSTRAINTS.name} has no pin for {package}.")
    return found.group()


def fingerprint(pyproject: bytes, constraints: bytes, version: tuple[int, ...], machine: str, root: Path) -> str:
    """A hash of all that decides what an installed environment holds, but for the extras."""
    facts = [pyproject, constraints, repr(tuple(version[:2])).encode(), machine.encode(), os.fsencode(root)]
    return hashlib.sha256(b"".join(hashlib.sha256(fact).digest() for fact in facts)).hexdigest()


def read_stamp(folder: Path) -> tuple[str, frozenset[str]]:
    """(fingerprint, extras) of a finished installation; ("", nothing) where there is none."""
    try:
        stamp = json.loads((folder / STAMP_FILE).read_text(encoding="utf-8"))
        return str(stamp["fingerprint"]), frozenset(str(extra) for extra in stamp["extras"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", frozenset()


def write_stamp(folder: Path, mark: str, extras: frozenset[str]) -> None:
    """Written whole or not at all."""
    part = folder / (STAMP_FILE + ".part")
    with open(part, "w", encoding="utf-8") as file:
        json.dump({"fingerprint": mark, "extras": sorted(extras)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / STAMP_FILE)


def editable_requirement(root: Path, extras: frozenset[str]) -> str:
    """The repository as pip names it: `folder` or `folder[a,b]`."""
    return f"{root}[{','.join(sorted(extras))}]" if extras else str(root)


def progress_words(line: str) -> str | None:
    """What a line of pip's output means for someone waiting; None for the lines that mean nothing to them."""
    line = line.strip()
    verb, _, rest = line.partition(" ")
    if verb == "Collecting":
        return "looking up " + re.split(r"[\s=<>!~;(]", rest, maxsplit=1)[0]
    if verb in ("Downloading", "Using", "Processing") and ".whl" in rest:
        size = re.search(r"\(([\d.]+ [kMG]?B)\)", rest)
        name = re.split(r"[\\/]", rest.split(".whl")[0])[-1].split(" ")[-1].split("-")[0]
        return f"getting {name}" + (f", {size.group(1)}" if size else "")
    if line.startswith("Installing collected packages:"):
        return f"unpacking {line.count(',') + 1} packages, which takes a while"
    if line.startswith(("Preparing editable", "Building editable")):
        return "building flux_ft"
    return None


def child_environment(environ: dict[str, str] | os._Environ[str], defaults: dict[str, str]) -> dict[str, str]:
    """The environment for a child process: the user's own settings win over our defaults."""
    settings = dict(defaults)
    if sys.platform == "linux":
        # glibc maps every large tensor afresh and hands it back to the kernel when it is freed; the page faults cost
        # small conv nets on the CPU three quarters of their time. Keep such memory in the heap instead.
        settings.setdefault("MALLOC_MMAP_MAX_", "0")
        settings.setdefault("MALLOC_TRIM_THRESHOLD_", "17179869184")
    return {**settings, **environ}


def run_child(command: list[str], environ: dict[str, str]) -> int:
    """The exit code of a command that shares our terminal; 130 after Ctrl-C.

    Ctrl-C reaches the child as well: it is given all the time it needs to save its work, and a second Ctrl-C is its
    business, not ours.
    """
    with subprocess.Popen(command, env=environ) as child:
        stopped = False
        while True:
            try:
                code = child.wait()
            except KeyboardInterrupt:
                stopped = True
                continue
            if stopped or code == -signal.SIGINT:
                return STOPPED
            return 128 - code if code < 0 else code  # ended by a signal: what a shell would report


def ensure_environment(extras: frozenset[str] = frozenset()) -> Path:
    """The interpreter of a venv that holds flux_ft with these extras; does nothing where that is there already.

    Prints to stderr, and ends the program with one message where the environment cannot be made.
    """
    try:
        require_python(sys.version_info[:3])
        folder = venv_folder(os.environ)
        pyproject, constraints = (ROOT / "pyproject.toml").read_bytes(), CONSTRAINTS.read_bytes()
        machine = f"{sys.platform}-{platform.machine()}"
        mark = fingerprint(pyproject, constraints, sys.version_info[:3], machine, ROOT)
        python = venv_python(folder)
        stamped_mark, stamped_extras = read_stamp(folder)
        if not (stamped_mark == mark and extras <= stamped_extras and python.exists()):
            extras |= stamped_extras  # quickstart after test keeps the tools that test needs
            (folder / STAMP_FILE).unlink(missing_ok=True)
            _make_venv(folder, python)
            _install(folder, python, constraints.decode("utf-8"), extras)
            write_stamp(folder, mark, extras)
        return python
    except KeyboardInterrupt:
        _say("\nstopped; the next start goes on from here")
        sys.exit(STOPPED)
    except SetupError as error:
        _say(f"error: {error}")
        sys.exit(1)
    except OSError as error:
        _say(f"error: the environment could not be made: {error}")
        sys.exit(1)


def _make_venv(folder: Path, python: Path) -> None:
    """Leave a venv with a working pip in `folder`; one that is there is kept if it works or can be mended."""
    if _works(python, "import pip"):
        return
    if _works(python, "import ensurepip; ensurepip.bootstrap(upgrade=True)") and _works(python, "import pip"):
        return
    _clear(folder)
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError as missing:
        raise SetupError(
            f"this Python ({sys.executable}) lacks the module {missing.name!r}, which makes virtual environments.\n"
            f"On Debian and Ubuntu: sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        ) from None
    _say(f"making a virtual environment in {_short(folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNER_FILE).write_text("Made by the scripts of flux_ft; they may build it again.\n", encoding="utf-8")
    try:
        venv.EnvBuilder(symlinks=os.name != "nt", with_pip=True).create(folder)
    except subprocess.CalledProcessError as error:
        raise SetupError(f"the virtual environment in {folder} could not be made: {error}") from None
    if not _works(python, "import pip"):
        raise SetupError(f"the virtual environment in {folder} was made, but its Python does not run.")


def _clear(folder: Path) -> None:
    """Remove an environment that is broken or belongs to another Python; never a folder that holds anything else."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    ours = (folder / OWNER_FILE).exists()
    broken = (folder / "pyvenv.cfg").exists() and not _succeeds([str(venv_python(folder)), "-c", ""])
    if not (ours or broken):
        raise SetupError(
            f"{folder} is not an environment that these scripts made, so they leave it alone.\n"
            "Move it away, or set FLUX_FT_VENV to the folder that the environment shall have."
        )
    _say(f"removing the environment in {_short(folder)}: it is unfinished, broken or made for another Python")
    shutil.rmtree(folder)


def _works(python: Path, code: str) -> bool:
    """Whether this interpreter runs, has our own version, and can do `code`."""
    version = f"import sys; assert sys.version_info[:2] == {tuple(sys.version_info[:2])!r}, sys.version_info; "
    return python.exists() and _succeeds([str(python), "-c", version + code])


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def _install(folder: Path, python: Path, constraints: str, extras: frozenset[str]) -> None:
    pip = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    pip += ["--constraint", str(CONSTRAINTS)]
    log_path = folder / LOG_FILE
    with open(log_path, "w", encoding="utf-8") as log:
        _say(f"installing PyTorch into {_short(folder)} (first time only, about 3 minutes)")
        code = _pip(pip + [pinned(constraints, package) for package in INSTALL_FIRST], log)
        if code == 0:
            _say("installing flux_ft and its libraries (first time only, about 2 minutes)")
            code = _pip([*pip, "--no-build-isolation", "--editable", editable_requirement(ROOT, extras)], log)
    if code != 0:
        tail = "\n".join(log_path.read_text(encoding="utf-8").splitlines()[-LOG_TAIL_LINES:])
        raise SetupError(
            f"pip could not install the packages (exit code {code}). Its last lines:\n\n{tail}\n\n"
            f"The whole log: {log_path}\nCheck the network and the space on the disk, then start this script again."
        )


def _pip(command: list[str], log: TextIO) -> int:
    """Run pip and return its exit code; its output goes to the log, and what it is doing to the terminal."""
    environ = {**os.environ, "PIP_USER": "0", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    environ.pop("PIP_TARGET", None)
    live = sys.stderr.isatty()
    started = shown = time.monotonic()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environ, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT) as pip:
        assert pip.stdout is not None
        try:
            for raw in pip.stdout:
                line = raw.decode("utf-8", errors="replace").rstrip()
                log.write(line + "\n")
                words, now = progress_words(line), time.monotonic()
                if words and live:
                    _rewrite(f"  {now - started:4.0f} s  {words}")
                elif words and (now - shown >= HEARTBEAT_S or words.startswith("unpacking")):
                    _say(f"  {now - started:4.0f} s  {words}")
                    shown = now
        except BaseException:
            pip.terminate()
            raise
    if live:
        _rewrite("")
        print("\r", end="", file=sys.stderr, flush=True)
    return pip.returncode


def _rewrite(text: str) -> None:
    """Put `text` in the place of the terminal's current line."""
    width = shutil.get_terminal_size().columns - 1
    print("\r" + text[:width].ljust(width), end="", file=sys.stderr, flush=True)


def _short(path: Path) -> str:
    """The path as seen from the repository, where it lies inside it."""
    try:
        return str(path.relative_to(ROOT))
    except ValueError:
        return str(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
