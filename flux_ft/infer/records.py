"""How pictures are written, and how what they were drawn with is read back. Loads without torch.

    00007.png   the picture; inside it the recipe, with the names of files but not their folders, since it is handed on
    00007.json  the sidecar: the same recipe, and "paths", where the files were; written first, so that a picture that
                is there has one

A recipe, format 2, is one JSON object; `make_recipe` makes it:

    "format"            2
    "request"           the request's fields that are not null, less its pictures and LoRAs
    "adapters"          [{"file": name, "strength": number, "sha256": hex}], in the request's order
    "pictures"          {field: {"file": name or null for one in memory, "sha256": hex}}
    "model", "model_parts", "redux"  as given; of an absolute path the last part
    "control"           the control LoRA that the user named, {"file", "sha256"}; null otherwise
    "device", "dtype"   what it was drawn on
    "flux_ft", "torch", …   versions, and what else a repeat is compared by
    "pixels_sha256", "width_px", "height_px"  of the picture as it was drawn, before JPEG or WebP rounded it
    "picture"           in the sidecar alone: the picture's name
    "paths"             in the sidecar alone: {"model", "model_parts", "redux", "control", "adapters", "pictures"}, as
                        the user gave them

The first format had no "format" and no "pictures", and a request of prompt, seed, width_px, height_px, steps, guidance.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux_ft import log
from flux_ft.errors import ConfigError, InputError, plain
from flux_ft.files import write_whole
from flux_ft.infer.prompts import PICTURES, exists
from flux_ft.infer.tasks import Request, parse

FORMAT = 2
KEY = "flux_ft"
"""Of the PNG's text chunk."""
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
JPEG_QUALITY = WEBP_QUALITY = 95
LARGEST_RECIPE_BYTES = 10_000_000
MOST_SIBLINGS = 200
"""LoRAs beside a picture whose hashes are taken to find a renamed one."""
MANIFEST = "manifest.json"
"""Of a training's checkpoint, which is a folder; it holds the hashes of the rest."""
_EXIF_IFD, _USER_COMMENT, _IMAGE_DESCRIPTION = 0x8769, 0x9286, 0x010E
_ASCII = b"ASCII\0\0\0"
_LARGEST_EXIF = 65_000
_BROKEN = (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, struct.error)
"""What Pillow raises for damaged pictures and metadata."""

_MODELS = ("model", "model_parts", "redux")

Recipe = dict[str, Any]


# --- Making and writing. ---


def make_recipe(
    request: Request,
    model: str,
    parts: str | None,
    loras_sha: Sequence[str],
    pictures_sha: Mapping[str, str],
    device: str,
    dtype: str,
    versions: Mapping[str, str],
    *,
    control: Path | None = None,
    control_sha: str | None = None,
    redux: str | None = None,
) -> Recipe:
    """All that a picture can be repeated with, ready for JSON; see the module's docstring.

    `request` is the resolved one; `loras_sha` are in the order of its LoRAs, `pictures_sha` are by field.
    """
    fields = request.model_dump(mode="json", exclude_none=True, exclude={"loras", *request.pictures})
    files = {name: value if isinstance(value, Path) else None for name, value in request.pictures.items()}
    return {
        "format": FORMAT,
        "request": fields,
        "model": _handed_on(model),
        "model_parts": parts and _handed_on(parts),
        "redux": redux and _handed_on(redux),
        "control": control and {"file": control.name, "sha256": control_sha},
        "adapters": [
            {"file": lora.file.name, "strength": lora.strength, "sha256": sha}
            for lora, sha in zip(request.loras, loras_sha, strict=True)
        ],
        "pictures": {name: {"file": file and file.name, "sha256": pictures_sha[name]} for name, file in files.items()},
        "device": device,
        "dtype": dtype,
        **versions,
        "paths": {
            "model": model,
            "model_parts": parts,
            "redux": redux,
            "control": control and str(control),
            "adapters": [str(lora.file) for lora in request.loras],
            "pictures": {name: file and str(file) for name, file in files.items()},
        },
    }


def save_picture(image: Image.Image, path: Path, recipe: Mapping[str, Any]) -> Recipe:
    """Write the sidecar and then the picture, each whole or not at all; the sidecar's recipe is returned.

    The suffix says the format: .png as drawn; .jpg at quality 95 without chroma subsampling, .webp at
    quality 95, which is lossy. All are sRGB and carry no profile. Raises ConfigError for another suffix, StorageError.
    """
    # Bytes alone: what an opened picture carries along, profile and EXIF, must not go into this one.
    clean = Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())
    told = {**recipe, "pixels_sha256": pixels_sha256(clean), "width_px": clean.width, "height_px": clean.height}
    data = _encoded(clean, path, {name: value for name, value in told.items() if name != "paths"})
    paths = {"paths": told.pop("paths")} if "paths" in told else {}
    told |= {"picture": path.name, **paths}
    write_whole(sidecar(path), json.dumps(told, indent=1, ensure_ascii=True).encode())
    write_whole(path, data)
    return told


def sidecar(path: Path) -> Path:
    """Where a picture's sidecar lies."""
    return path.with_suffix(".json")


def require_suffix(suffix: str) -> None:
    """Raise ConfigError unless pictures are written with this suffix."""
    if suffix.lower() not in SUFFIXES:
        raise ConfigError(f"pictures are not written as `{suffix}`", hint="one of " + ", ".join(SUFFIXES))


def pixels_sha256(image: Image.Image) -> str:
    """Of size and RGB bytes, whatever file they come from."""
    digest = hashlib.sha256(f"{image.width}x{image.height} RGB\n".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()


def input_sha256(path: Path) -> str:
    """Of a file; of a training's checkpoint, its manifest's. Raises InputError."""
    try:
        with (path / MANIFEST if path.is_dir() else path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise InputError(
            f"`{path}` cannot be read: {reason}", hint="give the path of a file that you may read"
        ) from error


def _handed_on(path: str) -> str:
    """Of an absolute path, which tells of its machine and user, the last part."""
    return Path(path).name if Path(path).expanduser().is_absolute() else path


def _encoded(image: Image.Image, path: Path, recipe: Mapping[str, Any]) -> bytes:
    require_suffix(path.suffix)
    text = json.dumps(recipe, ensure_ascii=True)
    words = str(recipe.get("request", {}).get("prompt", "")).encode("ascii", "backslashreplace").decode()
    buffer = BytesIO()
    kind = SUFFIXES[path.suffix.lower()]
    if kind == "PNG":
        info = PngInfo()
        info.add_text(KEY, text)
        info.add_text("Description", words)
        image.save(buffer, format=kind, pnginfo=info)
        return buffer.getvalue()
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + text.encode("ascii")
    if len(text) + len(words) < _LARGEST_EXIF:
        exif[_IMAGE_DESCRIPTION] = words
    data = exif.tobytes()
    if kind == "WEBP":
        image.save(buffer, format=kind, quality=WEBP_QUALITY, method=4, exif=data)
        return buffer.getvalue()
    if len(data) > _LARGEST_EXIF:
        log.warn(f"{path.name}: its recipe is too long for a JPEG; it is in {sidecar(path).name} alone")
        data = b""
    image.save(buffer, format=kind, quality=JPEG_QUALITY, subsampling=0, exif=data)
    return buffer.getvalue()


# --- Reading. ---


def read_recipe(path: Path) -> Recipe:
    """The recipe of a picture, or of a sidecar. A picture's own sidecar beside it, where it is, tells the paths too.

    Either format. Raises InputError when there is none, or when it is damaged.
    """
    if path.suffix.lower() == ".json":
        return _sidecar_recipe(path)
    inside, reason = _recipe_inside(path)
    beside = None
    if sidecar(path).is_file():
        try:
            beside = _sidecar_recipe(sidecar(path))
        except InputError:
            if inside is None:
                raise
    if beside is not None and beside.get("picture") == path.name:
        same = inside is None or inside.get("pixels_sha256") == beside.get("pixels_sha256")
        if same:
            return beside
    if inside is None:
        raise InputError(
            f"`{path}` does not say how it was drawn{reason}",
            hint=f"was it saved again by another program? its sidecar, {sidecar(path).name}, works too",
        )
    return inside


def _recipe_inside(path: Path) -> tuple[Recipe | None, str]:
    """What the picture holds, or None and, in words, why."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as picture:
            if picture.format == "PNG":
                text = picture.info.get(KEY)
            else:
                comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
                text = _ascii(comment) if comment is not None else None
    except FileNotFoundError:
        raise InputError(
            f"`{path}` does not exist", hint="give a picture of `flux-ft generate`, or its .json"
        ) from None
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise InputError(
            f"`{path}` cannot be read as PNG, JPEG or WebP: {plain(str(error), 200)}",
            hint=f"give the picture as it was written, or its sidecar, {sidecar(path).name}",
        ) from error
    if text is None:
        return None, ""
    try:
        return _checked(json.loads(str(text)), path), ""
    except (ValueError, RecursionError):
        return None, ": what it holds in the place of its recipe is something else, or damaged"


def _ascii(comment: Any) -> str:
    data = comment if isinstance(comment, bytes) else str(comment).encode()
    return data.removeprefix(_ASCII).rstrip(b"\0 ").decode("ascii", "replace")


def _sidecar_recipe(path: Path) -> Recipe:
    try:
        if path.stat().st_size > LARGEST_RECIPE_BYTES:
            raise ValueError(f"it is larger than {LARGEST_RECIPE_BYTES / 1e6:.0f} MB")
        return _checked(json.loads(path.read_text(encoding="utf-8-sig")), path)
    except FileNotFoundError:
        raise InputError(
            f"`{path}` does not exist", hint="give a picture of `flux-ft generate`, or its .json"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"`{path}` is not a picture's sidecar: {plain(str(error), 200)}",
            hint="give a picture of `flux-ft generate`, or the .json beside it",
        ) from error


def _is_strength(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e6


def _checked(value: Any, path: Path) -> Recipe:
    """ValueError unless all that is read later is of its kind; InputError for a format of the future."""
    if not isinstance(value, dict) or not isinstance(value.get("request"), dict):
        raise ValueError("it holds no request")
    if not _is_strength(value["request"].get("finetune_strength", 1.0)):
        raise ValueError("its strength is no number")
    number = value.get("format", 1)
    if not isinstance(number, int) or number < 1:
        raise ValueError("its format is no number")
    if number > FORMAT:
        raise InputError(
            f"`{path}` was written by a newer flux_ft (recipe format {number}; this one reads up to {FORMAT})",
            hint="update flux_ft",
        )
    adapters, pictures, paths = value.get("adapters", []), value.get("pictures", {}), value.get("paths", {})
    if not isinstance(adapters, list) or not isinstance(pictures, dict) or not isinstance(paths, dict):
        raise ValueError("its adapters, pictures or paths are damaged")
    given = paths.get("adapters", []), paths.get("pictures", {})
    if not isinstance(given[0], list) or not isinstance(given[1], dict) or len(given[0]) not in (0, len(adapters)):
        raise ValueError("its paths are damaged")
    names = [*given[0], *given[1].values(), *(paths.get(name) for name in (*_MODELS, "control"))]
    control = [value["control"]] if value.get("control") is not None else []
    for one in [*adapters, *pictures.values(), *control]:
        if not isinstance(one, dict) or not _is_strength(one.get("strength", 1.0)):
            raise ValueError("its adapters or pictures are damaged")
        names += [one.get("file"), one.get("sha256")]
    names += [value.get(name) for name in (*_MODELS, "pixels_sha256", "picture")]
    if not all(name is None or (isinstance(name, str) and "\0" not in name) for name in names):
        raise ValueError("a name in it is no text")
    return value


# --- From a recipe to the request. ---


@dataclass(frozen=True)
class Inputs:
    """What became of the pictures and LoRAs that a recipe names."""

    files: dict[str, Path]
    """Where each is now: by the picture's field, or "loras.0", "loras.1", …, "control"."""
    problems: tuple[str, ...]
    """A sentence for each that is missing or is not what it was."""


def check_inputs(recipe: Mapping[str, Any], base_folder: Path, others: Sequence[Path] = ()) -> Inputs:
    """Finds every input again, by its hash: at its recorded path, in `base_folder`, or among `others`.

    `base_folder` is the recipe's; its LoRAs are looked through too, since one may have another name now.
    """
    hashes: dict[Path, str] = {}

    def is_it(path: Path, sha256: str | None) -> bool:
        try:
            if not path.is_file() and not (path / MANIFEST).is_file():
                return False
            if path not in hashes:
                hashes[path] = input_sha256(path)
        except (OSError, ValueError, InputError):
            return False
        return hashes[path] == sha256

    siblings = sorted(base_folder.glob("*.safetensors"))[:MOST_SIBLINGS]
    files, problems = dict[str, Path](), list[str]()
    for key, name, given, sha256 in _inputs(recipe):
        if name is None:
            problems.append(f"`{key}` was a picture in memory, of which no file is known")
            continue
        # Foreign files tell names; no folder of theirs is followed.
        near = [base_folder / Path(name).name]
        placed = [Path(given), base_folder / given] if given else []
        more = siblings if key.startswith("loras.") or key == "control" else []
        found = next((path for path in [*others, *placed, *near, *more] if is_it(path, sha256)), None)
        if found is not None:
            files[key] = found
        elif changed := next((path for path in [*placed, *near] if exists(path)), None):
            problems.append(f"`{key}`: {plain(str(changed))} is not the file that was used; its SHA-256 differs")
        else:
            problems.append(f"`{key}`: {plain(given or name)} is missing")
    return Inputs(files, tuple(problems))


def _inputs(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None, str | None]]:
    """(key, name, path as given, SHA-256) of each picture and LoRA."""
    paths = recipe.get("paths", {})
    for field, one in recipe.get("pictures", {}).items():
        yield field, one.get("file"), paths.get("pictures", {}).get(field), one.get("sha256")
    given = paths.get("adapters") or [None] * len(recipe.get("adapters", []))
    for index, (one, path) in enumerate(zip(recipe.get("adapters", []), given, strict=True)):
        yield f"loras.{index}", one.get("file"), path, one.get("sha256")
    if control := recipe.get("control"):
        yield "control", control.get("file"), paths.get("control"), control.get("sha256")


def require_inputs(recipe: Mapping[str, Any], base_folder: Path, others: Sequence[Path] = ()) -> dict[str, Path]:
    """`check_inputs`, with everything found. Raises InputError that names all that is not."""
    found = check_inputs(recipe, base_folder, others)
    if found.problems:
        raise InputError(
            "the picture cannot be repeated: " + "; ".join(found.problems),
            hint=f"put the files into {base_folder}, or give them again on the command line",
        )
    return found.files


def recipe_request(recipe: Mapping[str, Any], files: Mapping[str, Path] | None = None) -> Request:
    """The request again; `files` are those of `check_inputs`, else names stand as they are. Raises ConfigError."""
    places = files or {}
    fields = {name: value for name, value in recipe["request"].items() if name not in PICTURES}
    if "format" not in recipe:
        fields |= {side: fields.pop(f"{side}_px") for side in ("width", "height") if f"{side}_px" in fields}
    for key, name, _, _ in _inputs(recipe):
        if key in PICTURES and (key in places or name is not None):
            fields[key] = places.get(key, Path(name or ""))
    adapters = recipe.get("adapters", [])
    fields["loras"] = [
        {"file": places.get(f"loras.{index}", Path(one.get("file") or "")), "strength": one.get("strength", 1.0)}
        for index, one in enumerate(adapters)
    ]
    if not isinstance(fields.get("task", ""), str):
        raise ConfigError("the recipe's `task` is no text")
    return parse(fields, "the recipe")


def runner_settings(recipe: Mapping[str, Any], files: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """`model`, `parts`, `control` and `redux` for a Runner, as the user gave them where that is known.

    `files` are those of `check_inputs`. Raises InputError when no model is named.
    """
    paths = recipe.get("paths", {})
    model, parts, redux = (paths.get(name) or recipe.get(name) for name in _MODELS)
    if not model:
        raise InputError("the recipe names no model", hint="give one: --model")
    return {"model": model, "parts": parts, "control": (files or {}).get("control"), "redux": redux}


def tell_repeat(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[bool | None, str]:
    """Whether the repeated picture is the same to the pixel (None: the old one does not say), and that in words."""
    if not old.get("pixels_sha256"):
        return None, "the recipe has no digest of the first picture to compare with"
    if old["pixels_sha256"] == new["pixels_sha256"]:
        return True, "the same to the pixel"
    leave_out = {"format", "request", "adapters", "pictures", "control", "paths", "picture", "pixels_sha256"}
    names = [name for name in old if name in new and name not in leave_out and old[name] != new[name]]
    changed = ", ".join(f"{name} {plain(str(old[name]), 60)} → {new[name]}" for name in names)
    return False, "not the same to the pixel" + (f"; what changed: {changed}" if changed else "")


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """Equal for pictures that are drawn from the same, wherever the files lie and whatever draws them."""
    told = {
        "request": recipe["request"],
        "model": [recipe.get(name) for name in _MODELS],
        "control": (recipe.get("control") or {}).get("sha256"),
        "loras": [[one.get("sha256"), one.get("strength")] for one in recipe.get("adapters", [])],
        "pictures": {name: one.get("sha256") for name, one in recipe.get("pictures", {}).items()},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
