"""Run files as a fuzzer writes them: all settings with good values, and then what people, editors and attackers do."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from flux_ft.config import setting_keys, setting_schemas

ODD_TEXTS = (
    *("", " ", "no", "on", "null", "~", "1e-4", "007", "1:30", "0x1F", ".nan", "-.inf", "true", "<<", "=", "#ffffff"),
    *("caf\u00e9", "cafe\u0301", "猫", "😀", "\u202egnp.tac", "\u200b", "\u2028", "a\x85b", "a\r\nb", "\ufeff"),
    *("\ufffe", "\x1b[31m", "\0", "\x07", "\ud800", "../..", "C:\\pictures", "~", "~root/x", "hf:", "hf:a/b@c"),
    *("/dev/null", "a" * 3000, "(a*)*", "(", "(" * 2000, "a{1,4294967295}", "%s", "{0}", "${HOME}", "`rm`"),
    *("data.path", "- a", "a: b", "[a", "!!int 3", "&a", "*a"),
)
ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, 10**99, 10**4000, 1e308, 1e-320, -0.0, 0.1, float("inf"), float("nan"), 1048576)
ODD_KEYS = ("rank", "lr", "__proto__", "__class__", "data.path", "sources", "", "1", "webhook_secret", "every", "<<")
TOKENS = (
    *("&a ", "*a", "<<: *a", "!!python/object/apply:os.system [id]", "!!binary ", "!x ", "!!set ", "!!int "),
    *("!!bool ", "!!float ", "!!null ", "!!str ", "!<tag:x> ", "!!map ", "!!seq "),
    *("? ", "- ", ": ", ":", "| ", ">-\n", "---\n", "...\n", "%YAML 9.9\n", "%TAG ! x:\n", "\t", "\n", "\r", "\n    "),
    *("{", "}", "[", "]", ",", "'", '"', '"\\U00110000"', '"\\ud83d"', '"\\x00"', '"\\q"', "@", "`", "null", "#", " #"),
    *("[" * 400, "{a: " * 150, "- " * 600, "9" * 500, "0x" + "f" * 300, "1e999999", "a: 1\na: 2\n", "data:\n", "\x85"),
    *("x" * 2000 + ": 1\n", "\ufeff", "\x1b[2J"),
)


def make_run_file(rng: random.Random) -> bytes:
    """One run file: every fourth is as it should be, the others have up to six things wrong with them."""
    settings = _settings(rng)
    mutations = 0 if rng.random() < 0.25 else rng.randint(1, 6)
    levels = [rng.choice((_bend, _bend, _scramble, _flip)) for _ in range(mutations)]
    for _ in range(levels.count(_bend)):
        settings = _bend(rng, settings)
    text = _written(rng, settings)
    for _ in range(levels.count(_scramble)):
        text = _scramble(rng, text)
    data = text.encode("utf-8", "surrogatepass")
    for _ in range(levels.count(_flip)):
        data = _flip(rng, data)
    return data


def make_overrides(rng: random.Random) -> list[str]:
    """What may follow a run file on the command line; mostly nothing."""
    keys = (
        *setting_keys(),
        "data",
        "lora",
        "data.sources[0]",
        "data.sources[0].repeats",
        "data.sources[7].path",
        *ODD_KEYS,
    )
    values = (*map(str, ODD_NUMBERS[:6]), *ODD_TEXTS, *TOKENS, "[a.zip, {path: b, repeats: 2}]", "{path: c}")
    count = rng.choice((0, 0, 0, 1, 2))
    return [f"{rng.choice(keys)}{rng.choice('====+')}{rng.choice(values)}" for _ in range(count)]


# --- good values -------------------------------------------------------------------------------------------------


def _settings(rng: random.Random) -> Any:
    """Some of all settings with values that their schemas allow, as a tree."""
    share = rng.choice((0.05, 0.2, 0.6))
    tree: dict[str, Any] = {}
    for key in setting_keys():
        if key != "data.path" and rng.random() < share:
            section, _, leaf = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[leaf] = _value(rng, setting_schemas()[key])
    data = tree.setdefault("data", {})
    if not data and rng.random() < 0.5:
        return tree | {"data": _text(rng)}
    if not data.get("sources") or rng.random() < 0.5:
        data["path"] = _text(rng)
    order = list(tree)
    rng.shuffle(order)
    return {name: tree[name] for name in order}


def _value(rng: random.Random, schema: Mapping[str, Any]) -> Any:
    if "anyOf" in schema:
        return _value(rng, rng.choice(schema["anyOf"]))
    if "$ref" in schema:
        keys = [key for key in setting_schemas() if key.startswith("data.sources[].")]
        return {
            key.rpartition(".")[2]: _value(rng, setting_schemas()[key])
            for key in keys
            if key.endswith("path") or rng.random() < 0.3
        }
    if "prefixItems" in schema:
        return [_value(rng, item) for item in schema["prefixItems"]]
    if "enum" in schema or "const" in schema:
        return rng.choice(schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        items = [_value(rng, schema["items"]) for _ in range(rng.randint(schema.get("minItems", 0), 4))]
        return list(dict.fromkeys(items)) if all(isinstance(item, int) for item in items) else items
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    high = schema.get("maximum", schema.get("exclusiveMaximum", low + 10 ** rng.randint(0, 6)))
    simple: dict[str, Callable[[], Any]] = {
        "null": lambda: None,
        "boolean": lambda: rng.random() < 0.5,
        "integer": lambda: rng.randint(low, high),
        "number": lambda: rng.choice((high / 2, low + (high - low) * (0.01 + 0.98 * rng.random()))),
        "string": lambda: f"#{rng.randrange(256**3):06x}" if "pattern" in schema else _text(rng),
    }
    return simple[schema["type"]]()


def _text(rng: random.Random) -> str:
    letters = rng.choice((string.ascii_letters, string.printable.strip(), "äß猫😀 ,;'\"", string.digits))
    return "".join(rng.choices(letters, k=rng.randint(1, 12))).replace("\\", "/")


def _written(rng: random.Random, tree: Any) -> str:
    try:
        if rng.random() < 0.25:
            return json.dumps(tree, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
        return yaml.safe_dump(
            tree,
            default_flow_style=rng.choice((None, False, False, True)),
            allow_unicode=rng.random() < 0.5,
            sort_keys=False,
            width=rng.choice((20, 80, 10**6)),
        )
    except (ValueError, TypeError):  # a number of too many digits
        return repr(tree) if rng.random() < 0.5 else "data: x\nseed: " + "9" * 5000


# --- and what is done to them ------------------------------------------------------------------------------------


def _bend(rng: random.Random, tree: Any) -> Any:
    """The tree with one place changed, anywhere."""
    if rng.random() < 0.25 or not isinstance(tree, dict | list) or not tree:
        return _bent(rng, tree)
    if isinstance(tree, list):
        index = rng.randrange(len(tree))
        return [*tree[:index], _bend(rng, tree[index]), *tree[index + 1 :]]
    name = rng.choice(list(tree))
    return {key: _bend(rng, value) if key == name else value for key, value in tree.items()}


def _bent(rng: random.Random, value: Any) -> Any:
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(ODD_TEXTS)
    if kind == 1:
        return rng.choice(ODD_NUMBERS)
    if kind == 2:
        return rng.choice(
            (None, True, [], {}, [None], [[]], {"": None}, [value], [value, value], {"path": value}, str(value))
        )
    if kind == 3:
        for _ in range(rng.choice((3, 30, 90))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    if isinstance(value, dict) and kind == 4 and value:
        gone = rng.choice(list(value))
        return {key: inner for key, inner in value.items() if key != gone}
    if isinstance(value, dict):
        key = rng.choice(ODD_KEYS if kind == 5 else [*map(_misspelt(rng), value), "x"])
        return value | {key: rng.choice((1, None, "x", [], {}))}
    if isinstance(value, list):
        return value * rng.choice((0, 2, 50)) + [rng.choice((None, 1, "x", [], {}))]
    return value if value is None else str(value) + rng.choice(ODD_TEXTS)


def _misspelt(rng: random.Random) -> Callable[[Any], str]:
    def misspelt(name: Any) -> str:
        letters = list(str(name)) or ["x"]
        rng.shuffle(letters) if rng.random() < 0.2 else letters.pop(rng.randrange(len(letters)))
        return "".join(letters)

    return misspelt


def _scramble(rng: random.Random, text: str) -> str:
    """The text with a token put in, or with lines moved, doubled, indented or lost."""
    kind = rng.randrange(6)
    if kind < 3:
        at = rng.randint(0, len(text))
        return text[:at] + rng.choice(TOKENS) + text[at:]
    lines = text.split("\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind == 3:
        lines.insert(one, lines[other])
    elif kind == 4:
        lines[one] = rng.choice((" ", "  ", "\t", "- ", "")) + lines[one].lstrip()
    else:
        del lines[one]
    return "\n".join(lines)


def _flip(rng: random.Random, data: bytes) -> bytes:
    """The bytes with some of them changed, cut off, or in another encoding."""
    at = rng.randint(0, len(data))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data.decode("utf-8", "replace").encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    if kind == 2:
        return (
            data[:at]
            + rng.choice((b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\x1b", rng.randbytes(8)))
            + data[at:]
        )
    if kind == 3:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    return data[:at] + data[at:][: rng.randint(0, 9)] * rng.choice((2, 100)) + data[at:]
