"""Pictures of every mode and format, whole, damaged and lying: a pure function of the generator that is handed in."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image, ImageCms, features

PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
JPEG_MODES = ("L", "RGB", "CMYK")
WEBP_MODES = ("RGB", "RGBA")
SIDES = (0, 1, 15, 16, 17, 40, 64, 97, 4_000, 9_000, 16_383, 65_535, 10**6, 2**31 - 1)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SOI, PNG_START = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"

Chunk = tuple[bytes, bytes]


def make_image(rng: random.Random) -> bytes:
    """The bytes of one file: about a quarter of them are whole pictures."""
    data = whole(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        data = rng.choice((flip, cut, splice, surgery, surgery, surgery, surgery, polyglot))(data, rng)
    return data


def whole(rng: random.Random) -> bytes:
    """A valid picture of some mode in some format, perhaps of several frames, with some metadata."""
    kinds = ["PNG", "PNG", "JPEG", "JPEG", "WEBP", "GIF"] + ["AVIF"] * features.check("avif")
    kind = rng.choice(kinds)
    mode = rng.choice({"PNG": PNG_MODES, "JPEG": JPEG_MODES}.get(kind, WEBP_MODES))
    size = (rng.choice((1, 16, 33, 64, 97, 300)), rng.choice((1, 16, 31, 64, 111, 200)))
    pictures = [pixels(size, mode, rng) for _ in range(rng.choice((1, 1, 1, 3)))]
    options: dict[str, object] = {}
    if rng.random() < 0.4:
        options["exif"] = exif(rng)
    if rng.random() < 0.4 and mode != "1":
        options["icc_profile"] = profile(rng)
    if kind == "PNG" and rng.random() < 0.3:
        options["transparency"] = {"P": 0, "L": 7, "I;16": 700, "RGB": (1, 2, 3)}.get(mode, b"")
        options = {name: value for name, value in options.items() if value != b""}
    if kind == "JPEG":
        options |= {"quality": rng.randint(1, 100), "progressive": rng.random() < 0.4}
        if rng.random() < 0.3:
            options["restart_marker_blocks"] = rng.randint(1, 9)
        if len(pictures) > 1 and rng.random() < 0.5:
            kind = "MPO"
    if kind == "WEBP":
        options["lossless"] = rng.random() < 0.5
    if kind == "AVIF":
        options = {"speed": 10}
    if kind != "JPEG" and len(pictures) > 1:
        options |= {"save_all": True, "append_images": pictures[1:]}
    file = io.BytesIO()
    pictures[0].save(file, kind, **options)
    return file.getvalue()


def pixels(size: tuple[int, int], mode: str, rng: random.Random) -> Image.Image:
    few = Image.frombytes("RGBA", (4, 4), rng.randbytes(64)).resize(size)
    if mode == "I;16":
        return Image.frombytes("I;16", size, rng.randbytes(2 * size[0] * size[1]))
    return few.convert("RGB").convert(mode) if mode in ("CMYK", "P", "1") else few.convert(mode)


def exif(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return b"Exif\0\0" + rng.randbytes(40)
    tags = Image.Exif()
    tags[0x0112] = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 0, 9))
    return tags.tobytes() if rng.random() < 0.5 else flip(tags.tobytes(), rng)


def profile(rng: random.Random) -> bytes:
    data = PROFILE.replace(b"\0s\0R\0G\0B", b"\0x\0R\0G\0B")
    return rng.choice((data, PROFILE, flip(data, rng), cut(data, rng), rng.randbytes(300), b"x"))


def flip(data: bytes, rng: random.Random) -> bytes:
    """Some bits are others."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 50)) if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return data[: rng.randrange(len(data) + 1)]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A piece is missing, twice there, noise, or all alike."""
    start = rng.randrange(len(data) + 1)
    stop = start + rng.choice((1, 4, 12, 100, 1000))
    piece = rng.choice((b"", data[start:stop] * 2, rng.randbytes(stop - start), b"\0" * 64, b"\xff" * 64))
    return data[:start] + piece + data[stop:]


def polyglot(data: bytes, rng: random.Random) -> bytes:
    """Two files in one."""
    other = rng.choice((whole(rng), b"PK\3\4" + rng.randbytes(40), b"<html><script>", b"\0" * 3000, b"%PDF-1.7\n"))
    return rng.choice((data + other, other + data, data[: len(data) // 2] + other, data[:8] + other[8:]))


def surgery(data: bytes, rng: random.Random) -> bytes:
    """The format's own structure, with checksums right, and content that is not."""
    if data.startswith(PNG_START):
        return operate_on_png(data, rng)
    if data.startswith(SOI):
        return operate_on_jpeg(data, rng)
    if data.startswith(b"RIFF"):
        return operate_on_webp(data, rng)
    return splice(data, rng)


def operate_on_png(data: bytes, rng: random.Random) -> bytes:
    chunks, at = [], 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        chunks.append((name, data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return data
    lies: list[Callable[[], Chunk]] = [
        lambda: (b"IHDR", struct.pack(">II", rng.choice(SIDES), rng.choice(SIDES)) + chunks[0][1][8:]),
        lambda: (b"IHDR", chunks[0][1][:8] + bytes((rng.choice((1, 2, 3, 8, 16)), rng.randrange(8), 0, 0, 1))),
        lambda: (b"tEXt", b"key\0" + b"x" * rng.choice((10, 10**6))),
        lambda: (b"zTXt", b"key\0\0" + zlib.compress(b"\0" * 2 * 10**6)),
        lambda: (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<tiff:Orientation>6" * 10**5)),
        lambda: (b"iCCP", b"name\0\0" + rng.choice((rng.randbytes(50), zlib.compress(bytes(10**7))))),
        lambda: (b"iCCP", b"name\0\0" + zlib.compress(profile(rng))),
        lambda: (b"eXIf", exif(rng)[6:]),
        lambda: (b"tRNS", rng.randbytes(rng.choice((0, 1, 2, 5, 6, 300)))),
        lambda: (b"PLTE", rng.randbytes(rng.choice((0, 1, 3, 5, 768, 900)))),
        lambda: (b"acTL", struct.pack(">II", rng.choice((0, 1, 3, 2**31)), 0)),
        lambda: (b"fcTL", struct.pack(">IIIIIHHBB", 0, *(rng.choice(SIDES) for _ in range(4)), 1, 10, 0, 0)),
        lambda: (b"fdAT", struct.pack(">I", rng.randrange(3)) + rng.randbytes(30)),
        lambda: (b"IDAT", zlib.compress(bytes(rng.choice((0, 10, 10**7))))),
        lambda: (b"IEND", b""),
        lambda: (rng.randbytes(4), rng.randbytes(20)),
    ]  # fmt: skip
    chunk, where = rng.choice(lies)(), rng.randrange(len(chunks))
    if rng.random() < 0.5:
        same = [index for index, (name, _) in enumerate(chunks) if name == chunk[0]]
        chunks[same[0] if same else where] = chunk
    else:
        chunks.insert(max(1, where), chunk)
    written = b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return PNG_START + written


def operate_on_jpeg(data: bytes, rng: random.Random) -> bytes:
    pieces, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        length = struct.unpack_from(">H", data, at + 2)[0]
        pieces.append(data[at : at + 2 + length])
        at += 2 + length
    scans = data[at:]
    if not pieces:
        return data

    def segment(marker: int, content: bytes) -> bytes:
        return bytes((0xFF, marker)) + struct.pack(">H", min(65_535, len(content) + 2)) + content

    frame = next((index for index, piece in enumerate(pieces) if 0xC0 <= piece[1] <= 0xC2), 0)
    where = rng.randrange(len(pieces))
    match rng.randrange(9):
        case 0:  # another size
            lie = struct.pack(">HH", rng.choice(SIDES) & 0xFFFF, rng.choice(SIDES) & 0xFFFF)
            pieces[frame] = pieces[frame][:5] + lie + pieces[frame][9:]
        case 1:  # another process, precision or number of components
            changed = bytearray(pieces[frame])
            changed[rng.choice((1, 4, 9, 11, 12) if len(changed) > 12 else (1, 4))] = rng.choice(
                (0, 1, 3, 4, 8, 12, 0xC1, 0xC2, 0xC9)
            )
            pieces[frame] = bytes(changed)
        case 2:
            pieces[where] = flip(pieces[where], rng)
        case 3:
            del pieces[where]
        case 4:
            pieces.insert(where, pieces[rng.randrange(len(pieces))])
        case 5:
            pieces.insert(where, segment(0xDD, struct.pack(">H", rng.choice((0, 1, 7, 65_535)))))
        case 6:
            pieces.insert(0, segment(0xE1, exif(rng)))
        case 7:
            part = struct.pack("BB", rng.randrange(3), rng.randrange(3))
            pieces.insert(0, segment(0xE2, b"ICC_PROFILE\0" + part + profile(rng)))
        case 8:
            scans = scans[:-2] * rng.choice((2, 50, 400)) + scans[-2:]
    return SOI + b"".join(pieces) + scans


def operate_on_webp(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2 or len(data) < 20:
        return data[:4] + struct.pack("<I", rng.choice((0, 10, 2**31, 2**32 - 1))) + data[8:]
    sides = [(rng.choice(SIDES[1:]) - 1) & 0xFFFFFF for _ in range(2)]
    canvas = b"".join(side.to_bytes(3, "little") for side in sides)
    if data[12:16] == b"VP8X":
        return data[:20] + bytes((rng.randrange(64),)) + data[21:24] + canvas + data[30:]
    extended = b"VP8X" + struct.pack("<I", 10) + bytes((rng.randrange(64), 0, 0, 0)) + canvas
    return data[:4] + struct.pack("<I", len(data) + 10) + b"WEBP" + extended + data[12:]
