"""What a bug report needs of a machine and a run, as a ZIP to send to strangers: no secrets, places or wording.

Nothing is searched for secrets and then trusted: what goes in is chosen, kind by kind. Settings keep numbers, switches
and the words that the schema knows, any other text is told by its length; file names are those that we give ourselves;
sentences end where a path begins. Loads without torch.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import io
import json
import os
import platform
import re
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from flux_ft import __version__
from flux_ft.config import setting_schemas
from flux_ft.doctor import LIBRARIES, Finding
from flux_ft.errors import ConfigError
from flux_ft.files import write_whole
from flux_ft.runfile import LARGEST_FILE_BYTES, CoreDumper, CoreLoader

FIRST_ROWS, LAST_ROWS = 50, 500
"""Of metrics.jsonl."""
MOST_FILES = 2000
"""In the list of a run folder's files."""
PACKAGES = (
    *LIBRARIES, "numpy", "huggingface_hub", "tokenizers", "datasets", "pyarrow", "pydantic", "triton", "torchao",
    "xformers", "flash-attn", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip
CONTENTS = {
    "findings.txt": "what doctor found, for people",
    "findings.json": "the same for programs",
    "versions.json": "versions of flux_ft, Python, the system and the libraries that flux_ft works with",
    "run/run.yaml": "the run's settings; texts (prompts, trigger word, names, paths) are replaced by their length",
    "run/metrics.jsonl": f"the first {FIRST_ROWS} and the last {LAST_ROWS} rows of figures",
    "run/report.json": "how many files were used, and how many left out for which reason; no names, no captions",
    "run/files.txt": "sizes of the run's files; names that are not flux_ft's own are replaced",
    "run/checkpoints/": "each checkpoint's manifest: step, settings, versions, sizes, SHA-256; no weights",
}
LEFT_OUT = (
    "Not inside: pictures, captions, prompts, weights, environment variables, tokens, paths, user and host names. "
    "Look through it before you send it: it is a plain ZIP of text files."
)

Files = dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """What was written."""

    file: Path
    contents: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"file": str(self.file), "contents": list(self.contents)}

    def for_people(self) -> str:
        """What is inside, and what is not."""
        return f"wrote {self.file}, for a bug report:\n{_listing(self.contents)}\n{LEFT_OUT}"


def write_bundle(file: Path, findings: Sequence[Finding], run: Path | None = None) -> Bundle:
    """Write the ZIP; of a run folder too if one is given. Raises ConfigError, StorageError."""
    if file.exists():
        raise ConfigError(f"`--bundle {file}` exists already", hint="give another name; nothing is overwritten")
    if run is not None and not run.is_dir():
        raise ConfigError(f"{run}: no such run folder", hint="give the folder that `output` names, or leave it out")
    inside = _machine(findings) | ({} if run is None else dict(_run_files(run)))
    told = f"Written by flux-ft doctor --bundle (flux_ft {__version__}).\n\n{_listing(inside)}\n\n{LEFT_OUT}\n"
    write_whole(file, _zipped({"README.txt": told} | inside))
    return Bundle(file, tuple(inside))


def _listing(names: Sequence[str] | Files) -> str:
    return "\n".join(
        f"  {name:<18} {what}" for name, what in CONTENTS.items() if any(one.startswith(name) for one in names)
    )


def _zipped(files: Files) -> bytes:
    """The same files make the same bytes: no times, no owner."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text.encode("utf-8", "replace"))
    return buffer.getvalue()


# --- Words that may be private. ---

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S*")
_SECRETS = re.compile(
    r"hf_\w+|\b(?:sk|pk|rk|glpat|xox[a-z])-[\w-]+|\b(?:gh[a-z]|github_pat|wandb_v\d+)_\w+|\beyJ[\w.-]+"
    r"|\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"
    r"|\b(?=\w*\d)(?!allow_bf16_reduced_precision_reduction\b)\w{24,}"
    r"|(?i:bearer|token|secret|password|passwd|credentials?|api[ _-]?key)\w*[\s\"']*[:= ][\s\"']*\S+"
)
_ADDRESS = re.compile(r"\S+@\S+")
_PATH = re.compile(r"(?<!\S)(?!\d+/\d+(?:\s|$))(?:\S*[\\/]|[\"'`(]*~\w).*")
_QUOTED = re.compile(r"`.*`|\".*\"|(?<!\w)'.*'|\S+\.[A-Za-z]\w{1,4}\b")
_DIGEST = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}")
_OWN_NAME = re.compile(
    r"run\.yaml|metrics\.jsonl|report\.(?:json|html)|README\.md|extraction\.json|captions\.jsonl|prompts\.json"
    r"|(?:loss|comparison|previews)\.png|\.lock|previews|checkpoints|cache|step-\d{6}(?:\.partial)?|\d\d\.png"
    r"|manifest\.json|weights\.safetensors|optimizer\.pt|\.metadata|__\d+_\d+\.distcp"
)
_ENDING = re.compile(r"(?:-comfyui|-full)?(?:\.(?:safetensors|jsonl?|ya?ml|png|jpg|txt|md|html|pt|partial|lock))?$")


@cache
def _names() -> re.Pattern[str] | None:
    """The user's and the machine's names, as whole words."""
    variables = ("USER", "USERNAME", "LOGNAME", "HOSTNAME", "COMPUTERNAME", "USERDOMAIN")
    found = {platform.node(), *(os.environ.get(name, "") for name in variables)}
    for ask in (getpass.getuser, lambda: Path.home().name):
        try:
            found.add(ask())
        except (OSError, KeyError, ImportError, RuntimeError):  # a user without an entry in the system's list
            continue
    found |= {name.partition(".")[0] for name in found}
    words = sorted((name for name in found if len(name) > 1), key=len, reverse=True)
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, words))})(?![^\W_])", re.I) if words else None


def clean(text: str) -> str:
    """A sentence of ours without secrets, addresses and names; each line ends where a path begins."""
    text = _ADDRESS.sub("<address>", _SECRETS.sub("<secret>", _URL.sub("<url>", text)))
    text = _PATH.sub("<path>", text)
    names = _names()
    return names.sub("<name>", text) if names else text


def _length(text: str) -> str:
    return f"<{len(text)} characters>"


def _cleaned(value: Any) -> Any:
    """Figures and sentences of ours, nested as they come."""
    if isinstance(value, dict):
        return {clean(str(key)): _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float) else clean(str(value))


def setting(key: str, value: Any) -> Any:
    """A setting of a run file by its dotted key: a text stays only where it is a word of the schema, or a digest."""
    if isinstance(value, dict):
        return {_known_key(key, name): setting(_joined(key, name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [setting(key + "[]" if isinstance(inner, dict) else key, inner) for inner in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return text if text in _words(key) or (key not in setting_schemas() and _DIGEST.fullmatch(text)) else _length(text)


def _joined(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _known_key(key: str, name: object) -> str:
    full = _joined(key, name)
    known = any(one == full or one.startswith(f"{full}.") for one in setting_schemas())
    return str(name) if known else "<a key that no run file has>"


@cache
def _words(key: str) -> frozenset[str]:
    """What the schema lists as values of this setting; of a model, the names that everybody has."""
    if key in ("model", "model_parts"):
        from flux_ft.families.registry import VARIANTS

        return frozenset(name for variant in VARIANTS.values() for name in (variant.name, variant.source))
    found: set[str] = set()

    def collect(part: Any) -> None:
        if isinstance(part, dict):
            found.update(one for one in (*part.get("enum", ()), part.get("const")) if isinstance(one, str))
            for name in ("anyOf", "items", "prefixItems"):
                collect(part.get(name))
        elif isinstance(part, list):
            for one in part:
                collect(one)

    collect(setting_schemas().get(key))
    return frozenset(found)


# --- What goes in. ---


def _machine(findings: Sequence[Finding]) -> Files:
    versions = {"flux_ft": __version__, "python": platform.python_version(), "platform": clean(platform.platform())}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "findings.txt": "".join(clean(one.for_people()) + "\n" for one in findings),
        "findings.json": _json([_cleaned(one.as_json()) for one in findings]),
        "versions.json": _json(versions),
    }


def _run_files(run: Path) -> Iterator[tuple[str, str]]:
    """What there is of a run folder; what cannot be read is told as such."""
    parts: dict[str, Callable[[Path], str]] = {
        "run.yaml": _settings, "metrics.jsonl": _metrics, "report.json": _report,
    }  # fmt: skip
    manifests = [
        path.relative_to(run).as_posix()
        for path in sorted(run.glob("checkpoints/step-*/manifest.json"))
        if _OWN_NAME.fullmatch(path.parent.name)
    ]
    for name in (*parts, *manifests):
        if (run / name).is_file():
            try:
                yield f"run/{name}", parts.get(name, _manifest)(run / name)
            except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError) as error:
                yield f"run/{name}", f"could not be read: {type(error).__name__}\n"
    yield "run/files.txt", _file_list(run)


def _settings(path: Path) -> str:
    if path.stat().st_size > LARGEST_FILE_BYTES:
        raise ValueError
    content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=CoreLoader)  # safe, and without aliases
    return yaml.dump(setting("", content), Dumper=CoreDumper, sort_keys=False, allow_unicode=True)


def _metrics(path: Path) -> str:
    first: list[bytes] = []
    last: deque[bytes] = deque(maxlen=LAST_ROWS)
    count = 0
    with path.open("rb") as file:
        for line in file:
            count += 1
            (first if len(first) < FIRST_ROWS else last).append(line)
    left_out = count - len(first) - len(last)
    gap = [json.dumps({"rows left out": left_out})] if left_out else []
    return "\n".join([*map(_row, first), *gap, *map(_row, last)]) + "\n"


def _row(line: bytes) -> str:
    try:
        return json.dumps(_cleaned(json.loads(line)))
    except (ValueError, RecursionError):
        return '"not JSON"'


def _report(path: Path) -> str:
    report = json.loads(path.read_bytes())
    reasons = Counter(str(one["reason"]) for one in report["files"] if one["status"] == "skipped")
    # A shorter name may as well be a word of the reason.
    names = {name for one in report["files"] if len(name := str(one["path"]).rpartition("/")[2]) > 3}
    told: Counter[str] = Counter()
    for reason, count in reasons.items():
        for name in sorted(names, key=len, reverse=True):
            reason = reason.replace(name, "<file>")
        told[_QUOTED.sub("<text>", reason)] += count
    return _json(_cleaned({"counts": report["counts"], "reasons": dict(told.most_common())}))


def _manifest(path: Path) -> str:
    found = json.loads(path.read_bytes())
    around = _cleaned(found.get("circumstances", {}))
    files = {
        _shown(name): {"size": int(about["size"]), "sha256": _digest(about["sha256"])}
        for name, about in found["files"].items()
    }
    return _json(
        {
            "step": int(found["step"]),
            "fingerprint": {clean(key): setting(key, value) for key, value in found["fingerprint"].items()},
            "circumstances": around,
            "drift": [_drift(str(one), around) for one in found.get("drift", ())],
            "files": files,
            "digest": _digest(found.get("digest")),
        }
    )


def _drift(sentence: str, circumstances: Any) -> str:
    """Which setting or circumstance changed; from what to what only of a circumstance, which holds nothing private."""
    told = re.match(r"(after step \d+: )`([^`]*)` was ", sentence)
    if told is None:
        return _length(sentence)
    return clean(sentence) if told[2] in circumstances else f"{told[1]}`{clean(told[2])}` changed"


def _digest(value: Any) -> str | None:
    return value if isinstance(value, str) and _DIGEST.fullmatch(value) else None


def _file_list(run: Path) -> str:
    """Size in bytes and name; a cache's thousands as one line. Links are not followed."""
    lines, cached, cached_bytes = [], 0, 0
    for folder, folders, names in os.walk(run):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            try:
                size = path.lstat().st_size
            except OSError:
                continue
            parts = path.relative_to(run).parts
            if parts[0] == "cache":
                cached, cached_bytes = cached + 1, cached_bytes + size
            else:
                lines.append(f"{size:>14} {'/'.join(map(_shown, parts))}")
    more = [f"and {len(lines) - MOST_FILES} more"] if len(lines) > MOST_FILES else []
    entries = [f"{cached_bytes:>14} cache/ ({cached} files)"] if cached else []
    return "\n".join([*lines[:MOST_FILES], *more, *entries]) + "\n"


def _shown(name: str) -> str:
    """A file's own name if flux_ft gave it; else only its ending."""
    ending = _ENDING.search(name)
    return name if _OWN_NAME.fullmatch(name) else f"<name>{ending[0] if ending else ''}"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
