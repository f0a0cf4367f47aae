"""The contact sheet: every picture, what it was drawn from, and nothing that runs or loads from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from flux_ft.infer.records import make_recipe, save_picture
from flux_ft.infer.sheet import read_shown, sheet_html, write_sheet
from flux_ft.infer.tasks import Lora, Request, TextToImage, Ultra

EVIL = "<script>alert(1)</script> \"onload='x' &amp; \u202egnp.exe\x1b[2J </details> $title ${policy} 日本"
URLS = {"href", "src", "action", "srcset", "poster", "data", "formaction", "background", "xlink:href"}


class Page(HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def cards(self) -> list[dict[str, str | None]]:
        return self.named("article")


def save(folder: Path, name: str, request: Request, size: tuple[int, int] = (64, 48)) -> Path:
    recipe = make_recipe(
        request,
        "flux-tiny",
        None,
        ["0" * 64] * len(request.loras),
        {},
        "cpu",
        "float32",
        {"flux_ft": "1", "torch": "2"},
    )
    save_picture(Image.new("RGB", size), folder / name, recipe)
    return folder / name


def sheet(folder: Path) -> tuple[Page, str]:
    html = write_sheet(folder).read_text("utf-8")
    return Page(html), html


def test_every_picture_is_linked_once_in_order_with_its_size(tmp_path: Path) -> None:
    for number, suffix in enumerate((".png", ".jpg", ".webp")):
        save(tmp_path, f"{number:05d}{suffix}", TextToImage(seed=number), (64, 48 + 16 * number))
    Image.new("RGB", (9, 9)).save(tmp_path / "grid-00000.png")
    page, _ = sheet(tmp_path)
    images = [one for one in page.named("img") if "src" in one]
    assert [one["src"] for one in images] == ["./00000.png", "./00001.jpg", "./00002.webp"]
    assert [(one["width"], one["height"], one["loading"]) for one in images] == [
        ("64", str(48 + 16 * number), "lazy") for number in range(3)
    ]
    assert "./grid-00000.png" in [one["href"] for one in page.named("a")]
    assert "3 pictures · 3 seeds" in page.text


def test_a_card_tells_what_repeats_it(tmp_path: Path) -> None:
    loras = (Lora(file=Path("/somewhere/cat.safetensors"), strength=0.8), Lora(file=Path("dog.safetensors")))
    request = TextToImage(
        prompt="a cat", negative_prompt="blur", true_cfg=2.5, seed=7, steps=20, loras=loras, finetune_strength=0.5
    )
    save(tmp_path, "00000.png", request)
    page, html = sheet(tmp_path)
    for words in ("a cat", "blur", "2.5", "seed 7 · cat × 0.4 · dog × 0.5", "64 × 48 px", "flux-tiny", "cpu float32"):
        assert words in page.text
    assert "flux-ft generate --repeat 00000.png" in page.text
    assert "somewhere" not in html


def test_pictures_are_filed_under_what_differs(tmp_path: Path) -> None:
    lora = Lora(file=Path("a.safetensors"))
    requests: list[Request] = [
        TextToImage(prompt=prompt, seed=seed, loras=(lora,), finetune_strength=strength)
        for prompt in ("b", "a") for strength in (1.0, 0.5) for seed in (10, 9)
    ]  # fmt: skip
    for number, request in enumerate(requests):
        save(tmp_path, f"{number:05d}.png", request)
    page, html = sheet(tmp_path)
    menus = [one["name"] for one in page.named("select") if "name" in one]
    assert menus == ["prompt", "strength", "seed"]  # one LoRA and one task leave nothing to choose
    menu_of = {name: html.partition(f'name="{name}"')[2].partition("</select")[0] for name in menus}
    options = {name: re.findall(r'value="(\d+)">([^<]*)<', menu) for name, menu in menu_of.items()}
    assert options["prompt"] == [("0", "b"), ("1", "a")]
    assert options["strength"] == [("0", "0.5"), ("1", "1")]
    assert options["seed"] == [("0", "9"), ("1", "10")]
    for card, request in zip(page.cards, requests, strict=True):
        found = [dict(options[name])[str(card[f"data-{name}"])] for name in menus]
        assert found == [request.prompt, f"{request.finetune_strength:g}", str(request.seed)]


def test_hostile_text_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "out <img src=x> $policy"
    for number in range(2):
        lora = Lora(file=Path(f'"><script>{number}.safetensors'))
        save(folder, f"{number:05d}.png", TextToImage(prompt=f"{EVIL}{number}", loras=(lora,)))
    name = "a'\"><script>#?%41 .png"
    html = sheet_html([read_shown(save(folder, name, TextToImage(prompt=EVIL)), folder)], EVIL, [name])
    for text in (write_sheet(folder).read_text("utf-8"), html):
        page = Page(text)
        assert len(page.named("script")) == 1
        assert "<script>alert(1)</script>" in page.text
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]
    assert {unquote(str(one["href"])) for one in Page(html).named("a")} == {f"./{name}"}


def test_nothing_is_loaded_from_elsewhere_and_only_its_own_script_runs(tmp_path: Path) -> None:
    save(tmp_path, "00000.png", Ultra(prompt="https://example.com/x.png", raw=True))
    page, html = sheet(tmp_path)
    urls = [value for _, attrs in page.tags for key, value in attrs.items() if key in URLS]
    assert urls
    assert all(str(url).startswith("./") for url in urls)
    assert not re.search(r"url\(|@import|fetch\(|import\(|innerHTML", html)
    (policy,) = [one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'; img-src 'self' file:;")


def test_pictures_without_a_recipe_are_shown_and_broken_ones_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "00000.png")
    (tmp_path / "00001.png").write_bytes(b"torn")
    page, _ = sheet(tmp_path)
    assert len(page.cards) == 1
    assert "does not say how it was drawn" in page.text
    assert "left out of sheet.html" in capsys.readouterr().err.replace("\n", " ")


def test_an_empty_folder_and_one_chosen_picture_below_it(tmp_path: Path) -> None:
    assert sheet(tmp_path)[0].cards == []
    path = save(tmp_path, "sub/00000.png", TextToImage())
    page = Page(write_sheet(tmp_path, [path], title="chosen").read_text("utf-8"))
    assert [one["src"] for one in page.named("img") if "src" in one] == ["./sub/00000.png"]
    assert "chosen" in page.text
