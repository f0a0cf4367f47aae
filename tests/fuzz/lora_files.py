"""LoRA files of several layouts, whole and with everything that can be wrong with one: a pure function of the seed."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

WIDTH, MOST_RANK = 8, 5
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
FLOATS = ("F16", "BF16", "F32")

ORIGINAL = {  # module → (out, in) in units of the width
    "double_blocks.0.img_attn.qkv": (3, 1), "double_blocks.0.txt_attn.qkv": (3, 1),
    "double_blocks.1.img_attn.proj": (1, 1), "double_blocks.0.img_mlp.0": (4, 1), "double_blocks.0.txt_mlp.2": (1, 4),
    "double_blocks.0.img_mod.lin": (6, 1), "single_blocks.0.linear1": (7, 1), "single_blocks.11.linear1": (7, 1),
    "single_blocks.0.linear2": (1, 5), "single_blocks.0.modulation.lin": (3, 1),
}  # fmt: skip
DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": (1, 1), "transformer_blocks.0.attn.to_k": (1, 1),
    "transformer_blocks.0.attn.add_v_proj": (1, 1), "transformer_blocks.1.attn.to_out.0": (1, 1),
    "transformer_blocks.0.ff.net.0.proj": (4, 1), "transformer_blocks.0.ff_context.net.2": (1, 4),
    "transformer_blocks.0.norm1.linear": (6, 1), "single_transformer_blocks.0.attn.to_q": (1, 1),
    "single_transformer_blocks.11.proj_mlp": (4, 1), "single_transformer_blocks.0.proj_out": (1, 5),
    "single_transformer_blocks.0.norm.linear": (3, 1),
}  # fmt: skip
ORIGINAL_2 = {  # FLUX.2
    "double_blocks.0.img_attn.qkv": (3, 1), "double_blocks.4.txt_mlp.0": (6, 1), "double_blocks.0.img_mlp.2": (1, 3),
    "single_blocks.0.linear1": (9, 1), "single_blocks.19.linear2": (1, 4), "double_blocks.0.txt_attn.proj": (1, 1),
}  # fmt: skip
DIFFUSERS_2 = {
    "transformer_blocks.0.attn.to_q": (1, 1), "transformer_blocks.0.attn.add_k_proj": (1, 1),
    "transformer_blocks.0.ff.linear_in": (6, 1), "transformer_blocks.4.ff_context.linear_out": (1, 3),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (9, 1), "single_transformer_blocks.19.attn.to_out": (1, 4),
}  # fmt: skip
XLABS = {
    "double_blocks.0.processor.qkv_lora1": (3, 1), "double_blocks.0.processor.proj_lora2": (1, 1),
    "single_blocks.0.processor.qkv_lora": (3, 1), "single_blocks.0.processor.proj_lora": (1, 1),
}  # fmt: skip
TEXT = [f"lora_te1_text_model_encoder_layers_0_self_attn_{part}_proj" for part in ("q", "k", "v", "out")]
AB, DOWN_UP = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
DEFAULT, SHORT = (".lora_A.default.weight", ".lora_B.default.weight"), (".down.weight", ".up.weight")
LAYOUTS: dict[str, tuple[str, dict[str, tuple[int, int]], tuple[str, str], str]] = {
    # name → (prefix, modules, ends of down and up, where alphas are: always, never, any)
    "kohya": ("lora_unet_", ORIGINAL, DOWN_UP, "always"),
    "kohya, FLUX.2": ("lora_unet_", ORIGINAL_2, DOWN_UP, "always"),
    "diffusers": ("transformer.", DIFFUSERS, AB, "any"),
    "diffusers, FLUX.2": ("transformer.", DIFFUSERS_2, AB, "never"),
    "comfy": ("diffusion_model.", ORIGINAL, AB, "any"),
    "comfy, FLUX.2": ("diffusion_model.", ORIGINAL_2, AB, "never"),
    "comfy down/up": ("diffusion_model.", ORIGINAL, DOWN_UP, "always"),
    "PEFT": ("base_model.model.", ORIGINAL, AB, "never"),
    "OneTrainer": ("lora_transformer_", DIFFUSERS, DOWN_UP, "always"),
    "XLabs": ("", XLABS, SHORT, "never"),
    "bare": ("", DIFFUSERS, AB, "never"),
    "bare, default": ("", DIFFUSERS, DEFAULT, "never"),
}
FOREIGN_KEYS = (
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "lora_unet_double_blocks_0_img_mlp_0.dora_scale",
    "lora_unet_double_blocks_0_img_mlp_0.lokr_w1", "lora_unet_double_blocks_0_img_mlp_0.hada_w1_a", "emb_params",
    "transformer.x_embedder.lora_A.weight", "diffusion_model.img_in.diff", "lora_unet_single_blocks_0_linear1.alpha",
    "double_blocks.0.processor.qkv_lora1.down.weight", "diffusion_model.final_layer.linear.lora_B.weight",
    "transformer..lora_A.weight", "transformer.transformer_blocks.0.attn.to_q.lora_B.bias", "lora_unet_.alpha",
    ".alpha", "transformer_blocks.99999999999999999999.attn.to_q.lora_A.weight", "alpha", "__metadata__", "",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight", "a\0b", "x" * 3000, "\ud800", "猫.alpha",
    "\x1b[31m.lora_A.weight", "bundle_emb.x",
)  # fmt: skip
ODD_NUMBERS = (
    0, 1, 2, 3, 7, 8, 24, 2**31, 2**53, 2**63, 2**64, 10**30, 10**4000, -1, 0.5, 1e308, True, None, "8", [], {},
)  # fmt: skip
ODD_METADATA: tuple[Any, ...] = (
    {}, [], None, "x", {"ss_steps": 3}, {"a": None}, {"a": {"b": {}}}, {"format": "pt"}, {"x": "\ud800"}, {"": ""},
    {"lora_adapter_metadata": "{"}, {"lora_adapter_metadata": "[]"}, {"lora_adapter_metadata": "[" * 9999},
    {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 8}'},
    {"lora_adapter_metadata": '{"transformer.r": [], "transformer.rank_pattern": 7}'},
    {"lora_adapter_metadata": '{"transformer.alpha_pattern": {"a": 1e999}}'},
    {"ss_network_alpha": "x", "ss_network_dim": "-1", "ss_network_args": "{"}, {"modelspec.title": "\x1b[2J" * 99},
    {"flux_ft.export": "[1"}, {"ss_tag_frequency": "[]"}, {"modelspec.architecture": "flux-1-dev/lora"},
    {"ss_network_module": "lycoris.kohya"}, {str(n): "x" * n for n in range(200)},
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor as it will lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Case:
    """A file, what was done to it, and its layout."""

    data: bytes
    tricks: tuple[str, ...]
    layout: str


def make_case(rng: random.Random) -> Case:
    """One file; every fourth or so is as a tool writes it."""
    layout = rng.choice(("kohya", "kohya", "diffusers", "diffusers", *LAYOUTS))
    tensors, metadata = good_tensors(rng, layout), {"format": "pt", "modelspec.title": "cat"}
    tricks: list[str] = []
    if rng.random() < 0.15:
        tricks.append("other_parts")
        tensors = other_parts(rng, tensors, layout)
    count = rng.choice((0, 1, 1, 1, 2, 3))
    levels = [
        rng.choice((TENSOR_TRICKS, TENSOR_TRICKS, HEADER_TRICKS, HEADER_TRICKS, BYTE_TRICKS)) for _ in range(count)
    ]
    for _ in range(levels.count(TENSOR_TRICKS)):
        change = rng.choice(TENSOR_TRICKS)
        tricks.append(change.__name__)
        tensors = change(rng, tensors) if tensors else tensors
    header, body = laid_out(tensors, metadata)
    for _ in range(levels.count(HEADER_TRICKS)):
        edit = rng.choice(HEADER_TRICKS)
        tricks.append(edit.__name__)
        header = edit(rng, header)
    data = written(header, body)
    for _ in range(levels.count(BYTE_TRICKS)):
        damage = rng.choice(BYTE_TRICKS)
        tricks.append(damage.__name__)
        data = damage(rng, data)
    return Case(data, tuple(tricks), layout)


# --- good files ----------------------------------------------------------------------------------------------------


def good_tensors(rng: random.Random, layout: str) -> dict[str, Stored]:
    prefix, modules, (down, up), alphas = LAYOUTS[layout]
    dtype = rng.choice(FLOATS)
    tensors = {}
    for module in rng.sample(sorted(modules), rng.randint(1, min(5, len(modules)))):
        out, into = (side * WIDTH for side in modules[module])
        rank = rng.randint(1, MOST_RANK)
        name = prefix + (module.replace(".", "_") if prefix.startswith("lora_") else module)
        tensors[name + down] = numbers(rng, dtype, (rank, into))
        tensors[name + up] = numbers(rng, dtype, (out, rank))
        if alphas == "always" or (alphas == "any" and rng.random() < 0.3):
            tensors[name + ".alpha"] = Stored("F32", (), struct.pack("<f", rng.choice((1, 2.5, rank, 16))))
    return tensors


def other_parts(rng: random.Random, tensors: dict[str, Stored], layout: str) -> dict[str, Stored]:
    """What some tools add: text encoders, biases, replaced norms, DoRA's scales, LoKr and LoHa instead of factors."""
    prefix = LAYOUTS[layout][0]
    name = sorted(tensors, key=repr)[0].rpartition(".lora_")[0]
    block = f"{prefix}double_blocks_0_img_attn" if prefix.startswith("lora_") else f"{prefix}double_blocks.0.img_attn"
    sides = {
        "text": {f"{module}{end}": (2, WIDTH)[:: 1 if end == DOWN_UP[0] else -1] for module in TEXT for end in DOWN_UP},
        "bias": {f"{name}.lora_B.bias": (3 * WIDTH,)},
        "norm": {f"{block}.norm.query_norm.scale": (WIDTH,), f"{block}.norm.key_norm.scale": (WIDTH,)},
        "DoRA": {f"{name}.dora_scale": (1, WIDTH), f"{name}.lora_magnitude_vector.weight": (WIDTH,)},
        "LoKr": {f"{block}.proj.lokr_w1": (2, 2), f"{block}.proj.lokr_w2": (4, 4), f"{block}.proj.alpha": ()},
        "LoHa": {f"{block}.proj.hada_w{n}_{ab}": (8, 8) for n in (1, 2) for ab in "ab"},
        "diff": {f"{block}.proj.diff": (WIDTH, WIDTH), f"{block}.proj.diff_b": (WIDTH,)},
    }[rng.choice(("text", "text", "bias", "norm", "DoRA", "LoKr", "LoHa", "diff"))]
    return {**tensors, **{key: numbers(rng, "F32", shape) for key, shape in sides.items()}}


def numbers(rng: random.Random, dtype: str, shape: tuple[int, ...]) -> Stored:
    """Values between -1 and 1 in a float dtype; any bits in another one."""
    count = math.prod(shape)
    if dtype not in ("F16", "BF16", "F32", "F64"):
        return Stored(dtype, shape, rng.randbytes(count * SIZES[dtype]))
    values = [rng.uniform(-1, 1) for _ in range(count)]
    if dtype == "BF16":
        return Stored(dtype, shape, b"".join(struct.pack("<f", value)[2:] for value in values))
    return Stored(dtype, shape, struct.pack(f"<{count}{ {'F16': 'e', 'F32': 'f', 'F64': 'd'}[dtype] }", *values))


def laid_out(tensors: dict[str, Stored], metadata: Any) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {"__metadata__": metadata}
    body = b""
    for key, one in tensors.items():
        span = [len(body), len(body) + len(one.data)]
        header[key] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": span}
        body += one.data
    return header, body


class Pairs(list[tuple[str, Any]]):
    """An object that may have a key twice."""


def written(header: Any, body: bytes) -> bytes:
    raw = as_json(header).encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + body


def as_json(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{as_json(item)}" for key, item in value) + "}"
    if isinstance(value, dict):
        return as_json(Pairs((str(key), item) for key, item in value.items()))
    return json.dumps(value)


# --- what is done to the tensors: the file stays a whole one ---------------------------------------------------------

TensorTrick = Callable[[random.Random, dict[str, Stored]], dict[str, Stored]]


def _one(change: Callable[[random.Random, Stored], Stored], name: str) -> TensorTrick:
    def trick(rng: random.Random, tensors: dict[str, Stored]) -> dict[str, Stored]:
        key = rng.choice(sorted(tensors, key=repr))
        return {**tensors, key: change(rng, tensors[key])}

    trick.__name__ = name
    return trick


def _not_finite(rng: random.Random, one: Stored) -> Stored:
    bits = {
        "F16": (b"\0\x7c", b"\1\x7e"),
        "BF16": (b"\x80\x7f", b"\xff\xff"),
        "F32": (b"\0\0\x80\x7f", b"\1\0\xc0\xff"),
    }
    if one.dtype not in bits:
        return one
    size = SIZES[one.dtype]
    at = size * rng.randrange(len(one.data) // size)
    return replace(one, data=one.data[:at] + rng.choice(bits[one.dtype]) + one.data[at + size :])


def _zeros(rng: random.Random, one: Stored) -> Stored:
    return replace(one, data=bytes(len(one.data)))


def _huge_values(rng: random.Random, one: Stored) -> Stored:
    return replace(one, data=(b"\xff\x7b" * len(one.data))[: len(one.data)])


def _dtype(rng: random.Random, one: Stored) -> Stored:
    return numbers(rng, rng.choice(sorted(SIZES)), one.shape)


def _sides(rng: random.Random, one: Stored) -> Stored:
    sides = rng.choice(
        ((), (1,), (3,), (1, 1), (2, 3), (3, WIDTH), (WIDTH, 3), (7 * WIDTH, 2), (1, 1, 1), (2, 8, 1, 1))
    )
    return numbers(rng, one.dtype, rng.choice((sides, one.shape[::-1], (*one.shape, 1), (*one.shape, 1, 1))))


def _rank(rng: random.Random, one: Stored) -> Stored:
    return numbers(rng, one.dtype, tuple(max(1, side + rng.choice((-1, 0, 1))) for side in one.shape))


def _lost(rng: random.Random, tensors: dict[str, Stored]) -> dict[str, Stored]:
    gone = rng.choice(sorted(tensors, key=repr))
    return {key: one for key, one in tensors.items() if key != gone} or tensors


def _added(rng: random.Random, tensors: dict[str, Stored]) -> dict[str, Stored]:
    return {**tensors, rng.choice(FOREIGN_KEYS): numbers(rng, "F32", rng.choice(((), (3, WIDTH), (WIDTH, 3))))}


def _renamed(rng: random.Random, tensors: dict[str, Stored]) -> dict[str, Stored]:
    old = rng.choice(sorted(tensors, key=repr))
    at = rng.randint(0, len(old))
    parts = (
        ("lora_A", "lora_B"),
        ("lora_down", "lora_up"),
        ("blocks", "block"),
        (".0.", ".00."),
        (".weight", ""),
        ("_0_", "_x_"),
    )
    spoilt = (old[:at] + rng.choice("._x9é ") + old[at:], old[:at] + old[at + 1 :])
    new = rng.choice((*spoilt, *(old.replace(*pair) for pair in parts)))
    return {new if key == old else key: one for key, one in tensors.items()}


def _alpha(rng: random.Random, tensors: dict[str, Stored]) -> dict[str, Stored]:
    key = rng.choice(sorted(tensors, key=repr)).rpartition(".lora_")[0] + ".alpha"
    shape = rng.choice(((), (1,), (2,), (1, 1), (3, 3)))
    return {**tensors, key: numbers(rng, rng.choice(sorted(SIZES)), shape)}


def _mixed(rng: random.Random, tensors: dict[str, Stored]) -> dict[str, Stored]:
    return {**tensors, **good_tensors(rng, rng.choice(sorted(LAYOUTS)))}


def _none(rng: random.Random, tensors: dict[str, Stored]) -> dict[str, Stored]:
    return {} if rng.random() < 0.3 else tensors


TENSOR_TRICKS: tuple[TensorTrick, ...] = (
    _one(_not_finite, "not_finite"), _one(_zeros, "zeros"), _one(_huge_values, "huge_values"), _one(_dtype, "dtype"),
    _one(_sides, "sides"), _one(_rank, "rank"), _lost, _added, _renamed, _alpha, _alpha, _mixed, _none,
)  # fmt: skip


# --- what is done to the header: JSON that lies ----------------------------------------------------------------------

HeaderTrick = Callable[[random.Random, Any], Any]


def _items(header: Any) -> Pairs:
    return Pairs(
        header if isinstance(header, Pairs) else header.items() if isinstance(header, dict) else [("a", header)]
    )


def _field(rng: random.Random, header: Any) -> Any:
    """One field of one entry gets another value, goes, or comes twice."""
    items = _items(header)
    if not items:
        return header
    at = rng.randrange(len(items))
    key, entry = items[at]
    if not isinstance(entry, dict) or key == "__metadata__":
        return header
    name = rng.choice(("dtype", "shape", "data_offsets"))
    old = entry.get(name)
    choices: list[Any] = [rng.choice(ODD_NUMBERS), rng.choice((*SIZES, "F4", "C64", "f32", "float32", ""))]
    if isinstance(old, list):
        bent = [rng.choice((number, rng.choice(ODD_NUMBERS))) for number in old]
        choices += [bent, bent, old[::-1], [*old, 1], old[1:], [0] * 10_000, [old]]
        if all(isinstance(number, int) for number in old):
            choices += [[number + rng.choice((-4, -1, 0, 1, 4)) for number in old]] * 2
    fields = Pairs((field, rng.choice(choices) if field == name else value) for field, value in entry.items())
    if rng.random() < 0.1:
        fields = Pairs(fields + fields[:1])
    if rng.random() < 0.1:
        fields = Pairs(fields[1:])
    return Pairs([*items[:at], (key, fields), *items[at + 1 :]])


def _key(rng: random.Random, header: Any) -> Any:
    items = _items(header)
    if not items:
        return header
    at, new = rng.randrange(len(items)), rng.choice((*FOREIGN_KEYS, items[-1][0]))
    return Pairs([*items[:at], (new, items[at][1]), *items[at + 1 :]])


def _twice(rng: random.Random, header: Any) -> Any:
    items = _items(header)
    return Pairs([*items, rng.choice(items)]) if items else header


def _entry(rng: random.Random, header: Any) -> Any:
    return Pairs([*_items(header), (rng.choice(FOREIGN_KEYS), rng.choice(ODD_NUMBERS))])


def _metadata(rng: random.Random, header: Any) -> Any:
    return Pairs(
        [("__metadata__", rng.choice(ODD_METADATA)), *(one for one in _items(header) if one[0] != "__metadata__")]
    )


def _nested(rng: random.Random, header: Any) -> Any:
    value: Any = 1
    for _ in range(rng.choice((3, 90, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return Pairs([*_items(header), (rng.choice(("a", "__metadata__")), value)])


def _shuffled(rng: random.Random, header: Any) -> Any:
    items = _items(header)
    rng.shuffle(items)
    return items


HEADER_TRICKS: tuple[HeaderTrick, ...] = (
    _field,
    _field,
    _field,
    _key,
    _twice,
    _entry,
    _metadata,
    _metadata,
    _nested,
    _shuffled,
)


# --- and to the bytes ------------------------------------------------------------------------------------------------

ByteTrick = Callable[[random.Random, bytes], bytes]


def _flipped(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 30)) if out else 0):
        out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def _flipped_header(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    if len(out) > 8:
        end = min(len(out), 8 + int.from_bytes(out[:8], "little"))
        out[rng.randrange(8, max(9, end))] = rng.choice((*b'"{}[],:0987\\ \x00\xff', rng.randrange(256)))
    return bytes(out)


def _truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _extended(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", b"\n", rng.randbytes(100), bytes(70_000), data))


def _cut_out(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randint(1, 100) :]


def _pasted(rng: random.Random, data: bytes) -> bytes:
    at, start = rng.randint(0, len(data)), rng.randint(0, len(data))
    return data[:at] + data[start : start + rng.randint(1, 300)] + data[at:]


def _length(rng: random.Random, data: bytes) -> bytes:
    true = int.from_bytes(data[:8], "little")
    lie = rng.choice((0, 1, 2, true - 1, true + 1, true + 8, len(data) - 8, len(data), 10**8, 2**31, 2**63, 2**64 - 1))
    return max(0, lie).to_bytes(8, "little") + data[8:]


def _other_file(rng: random.Random, data: bytes) -> bytes:
    return rng.choice(
        (
            b"",
            b"PK\3\4" + data,
            b"\x80\2}q\0.",
            b"GGUF" + data,
            b"<html>",
            b"\0" * 64,
            b"{}",
            rng.randbytes(200),
            data[8:],
        )
    )


BYTE_TRICKS: tuple[ByteTrick, ...] = (
    _flipped, _flipped, _flipped_header, _flipped_header, _truncated, _extended, _cut_out, _pasted, _length,
    _other_file,
)  # fmt: skip
