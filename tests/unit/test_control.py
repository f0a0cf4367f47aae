"""Control maps: edges as OpenCV finds them, near is white, and bad files are named."""

from __future__ import annotations

import subprocess
import sys
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessorPil

from flux_ft.errors import ConfigError, DataError, InputError, ModelError
from flux_ft.families.tiny.scenes import COLORS, POSITIONS, SHAPES, SIZES, Scene, coverage, render
from flux_ft.infer.control import DepthEstimator, as_rgb, canny, preprocess_file, read_picture, tiny_canny, tiny_depth

ROOT = Path(__file__).resolve().parents[2]


def picture(width: int = 37, height: int = 23) -> Image.Image:
    """Smooth colours, and a rectangle of another."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 10, 90), (width // 4, height // 4, width // 2, height // 2))
    return image


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Depth Anything of the real classes with random weights, saved as the published ones are."""
    folder = tmp_path_factory.mktemp("depth")
    save_depth(folder)
    return folder


def save_depth(folder: Path, **options: object) -> None:
    torch.manual_seed(3)
    backbone = Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False, initializer_range=0.4,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=24, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        head_hidden_size=8, initializer_range=0.3, **options,
    )  # fmt: skip
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip


class TestCanny:
    @pytest.mark.parametrize("size", [(64, 48), (37, 23), (1, 1), (1, 9), (50, 1)])
    @pytest.mark.parametrize("thresholds", [(50, 200), (20, 60), (0, 0)])
    def test_is_opencvs_of_the_colours(self, size: tuple[int, int], thresholds: tuple[int, int]) -> None:
        image = picture(*size)
        edges = canny(image, *thresholds)
        assert (edges.mode, edges.size) == ("RGB", size)
        expected = cv2.Canny(np.array(image), *thresholds)
        assert all(np.array_equal(np.array(edges)[..., channel], expected) for channel in range(3))
        assert set(np.unique(expected)) <= {0, 255}

    def test_thresholds_are_50_and_200_unless_given(self) -> None:
        image = picture(64, 48)
        assert canny(image) == canny(image, 50, 200) != canny(image, 20, 60)

    def test_two_colours_of_one_brightness_have_an_edge(self) -> None:
        image = Image.new("RGB", (20, 20), (214, 40, 40))
        image.paste((40, 129, 40), (10, 0, 20, 20))
        assert not np.ptp(np.asarray(image.convert("L")))
        assert np.asarray(canny(image)).any()

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
    def test_any_mode_is_as_its_rgb(self, mode: str) -> None:
        image = picture().convert(mode)
        assert canny(image) == canny(image.convert("RGB"))

    def test_colours_under_transparent_parts_have_no_edges(self) -> None:
        image = picture().convert("RGBA")
        image.putalpha(0)
        assert not np.asarray(canny(image)).any()

    @pytest.mark.parametrize("thresholds", [(200, 50), (-1, 50)])
    def test_thresholds_out_of_order_are_refused(self, thresholds: tuple[int, int]) -> None:
        with pytest.raises(ConfigError, match="thresholds are"):
            canny(picture(), *thresholds)

    def test_without_opencv_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cv2", None)
        with pytest.raises(InputError) as caught:
            canny(picture())
        assert "pip install opencv-python-headless" in str(caught.value.hint)


class TestRgb:
    def test_sixteen_bits_are_scaled_not_clipped(self) -> None:
        values = np.array([[0, 257 * 100, 65535]], np.uint16)
        assert np.asarray(as_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 100, 255]

    def test_is_turned_upright(self) -> None:
        image = picture()
        image.getexif()[0x0112] = 6
        assert as_rgb(image) == picture().transpose(Image.Transpose.ROTATE_270)

    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
    def test_a_file_is_read_as_it_is_in_memory(self, tmp_path: Path, mode: str) -> None:
        image = picture().convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(tmp_path / "a.png")
        read, known = np.asarray(read_picture(tmp_path / "a.png"), int), np.asarray(as_rgb(image), int)
        assert np.abs(read - known).max() <= (1 if mode == "RGBA" else 0)  # two roundings of one blend


class TestDepth:
    @pytest.mark.parametrize("size", [(37, 23), (112, 56), (1, 1), (3, 21)])
    def test_is_the_models_own_depth_from_black_to_white(self, depth_folder: Path, size: tuple[int, int]) -> None:
        estimate, image = DepthEstimator(str(depth_folder), torch.device("cpu")), picture(*size)
        depth = estimate(image)
        assert (depth.mode, depth.size) == ("RGB", size)
        model = DepthAnythingForDepthEstimation.from_pretrained(depth_folder).eval()
        pixels = DPTImageProcessorPil.from_pretrained(depth_folder)(images=image, return_tensors="pt").pixel_values
        with torch.no_grad():
            found = model(pixel_values=pixels).predicted_depth
        assert float(found.max() - found.min()) > 0.1  # of random weights: not dead
        found = torch.nn.functional.interpolate(found[None], size[::-1], mode="bicubic", antialias=True)[0, 0]
        level = (found - found.min()) / (found.max() - found.min()).clamp(min=1e-6)
        assert np.array_equal(np.asarray(depth)[..., 0], (level * 255).round().numpy())
        if size[0] > 1:
            assert depth.getextrema() == ((0, 255),) * 3

    @pytest.mark.parametrize(("kind", "left_is_near"), [("relative", False), ("metric", True)])
    def test_near_is_white(self, tmp_path: Path, kind: str, left_is_near: bool) -> None:
        """Relative models give 1 / distance and metric ones distance; here both grow to the right."""
        save_depth(tmp_path, depth_estimation_type=kind, max_depth=20)
        estimate = DepthEstimator(str(tmp_path), torch.device("cpu"))
        grows = torch.linspace(1, 5, 56).expand(1, 56, 56)
        estimate._model.forward = lambda pixel_values: type("Out", (), {"predicted_depth": grows})
        row = np.asarray(estimate(picture(40, 40)))[20, :, 0].astype(int)
        assert (row[0], row[-1]) == ((255, 0) if left_is_near else (0, 255))
        assert (np.diff(row) <= 0).all() if left_is_near else (np.diff(row) >= 0).all()

    def test_a_picture_without_any_depth_is_black(self, depth_folder: Path) -> None:
        estimate = DepthEstimator(str(depth_folder), torch.device("cpu"))
        estimate._model.forward = lambda pixel_values: type("Out", (), {"predicted_depth": torch.full((1, 8, 8), 3.0)})
        assert estimate(picture()).getextrema() == ((0, 0),) * 3
        estimate._model.forward = lambda pixel_values: type(
            "Out", (), {"predicted_depth": torch.full((1, 8, 8), torch.inf)}
        )
        with pytest.raises(ModelError, match="no numbers"):
            estimate(picture())

    def test_a_picture_too_long_is_refused(self, depth_folder: Path) -> None:
        estimate = DepthEstimator(str(depth_folder), torch.device("cpu"))
        with pytest.raises(DataError, match="90 × 10 px is longer than 8 : 1"):
            estimate(picture(90, 10))

    @pytest.mark.parametrize("source", ["./nowhere", "gigantic", "a/b/c"])
    def test_no_folder_and_no_hub_id(self, source: str) -> None:
        with pytest.raises(ModelError, match="neither a folder nor a Hub id") as caught:
            DepthEstimator(source)
        assert "small, base, large" in str(caught.value.hint)

    def test_what_cannot_be_fetched_is_named(self) -> None:
        with pytest.raises(ModelError, match="nobody/no-such-depth could not be fetched") as caught:
            DepthEstimator("nobody/no-such-depth")
        assert "hf auth login" in str(caught.value.hint)

    def test_broken_folders_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="could not be loaded"):
            DepthEstimator(str(tmp_path))
        save_depth(tmp_path)
        weights = tmp_path / "model.safetensors"
        tensors = load_file(weights)
        tensors.pop("head.conv1.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks 1 tensors; first: head\.conv1\.weight"):
            DepthEstimator(str(tmp_path))
        weights.rename(tmp_path / "pytorch_model.bin")
        with pytest.raises(ModelError, match="could not be loaded"):
            DepthEstimator(str(tmp_path))


class TestTinyDepth:
    @pytest.mark.parametrize(("color", "background"), list(permutations(COLORS, 2)))
    def test_is_the_figures_coverage(self, color: str, background: str) -> None:
        rng = np.random.default_rng(0)
        for index, (shape, size) in enumerate((shape, size) for shape in SHAPES for size in SIZES):
            position = list(POSITIONS)[index % 9]
            exact = tiny_depth(Image.fromarray(render(Scene(shape, color, size, position, background))))
            x, y = POSITIONS[position]
            mask = coverage(shape, x, y, SIZES[size])
            assert np.abs(np.asarray(exact)[..., 0] / 255 - mask).max() < 0.03
            noisy = render(Scene(shape, color, size, position, background)) + rng.normal(0, 5, (64, 64, 3))
            level = np.asarray(tiny_depth(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))[..., 0] / 255
            assert np.corrcoef(level.ravel(), mask.ravel())[0, 1] > 0.95
            sure = np.abs(mask - 0.5) > 0.1  # half covered, a pixel may fall either way
            figure, known = (level > 0.5) & sure, (mask > 0.5) & sure
            assert (figure & known).sum() / (figure | known).sum() > 0.95

    def test_no_figure_is_all_ground(self) -> None:
        noise = np.random.default_rng(0).normal(90, 8, (64, 64, 3)).clip(0, 255).astype(np.uint8)
        for image in (Image.fromarray(noise), Image.new("RGB", (1, 1), "red"), Image.new("RGB", (64, 64), "white")):
            assert tiny_depth(image).getextrema() == ((0, 0),) * 3
            assert tiny_depth(image).size == image.size


class TestFiles:
    @pytest.mark.parametrize("name", ["edges.png", "edges.webp"])
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_canny_writes_the_exact_map(self, tmp_path: Path, name: str, mode: str) -> None:
        source = tmp_path / "in.jpg"
        picture(65, 43).convert(mode).save(source, quality=95)
        done = preprocess_file("canny", source, tmp_path / "new" / name, low=30, high=90)
        with Image.open(done.output) as written:
            assert written.convert("RGB").tobytes() == canny(read_picture(source), 30, 90).tobytes()
        shown = done.as_json()
        assert (shown["width"], shown["height"], shown["low"], shown["high"]) == (65, 43, 30, 90)
        assert shown["mean"] == pytest.approx(np.asarray(canny(read_picture(source), 30, 90)).mean() / 255)
        assert "% of the pixels" in done.for_people()

    def test_no_edge_is_said(self, tmp_path: Path) -> None:
        Image.new("RGB", (9, 9)).save(tmp_path / "in.png")
        assert "lower --low" in preprocess_file("canny", tmp_path / "in.png", tmp_path / "out.png").for_people()

    def test_depth_writes_the_exact_map(self, tmp_path: Path, depth_folder: Path) -> None:
        picture().save(tmp_path / "in.png")
        cpu = torch.device("cpu")
        source, output = tmp_path / "in.png", tmp_path / "out.png"
        done = preprocess_file("depth", source, output, model=str(depth_folder), device=cpu)
        with Image.open(output) as written:
            assert written.tobytes() == DepthEstimator(str(depth_folder), cpu)(picture()).tobytes()
        assert done.as_json()["model"] == str(depth_folder)

    @pytest.mark.parametrize(
        ("content", "words"),
        [(b"", "empty"), (b"hello", "not a JPEG"), (b"\x89PNG\r\n\x1a\n123", "damaged"), (None, "No such file")],
    )
    def test_an_unreadable_picture_is_named(self, tmp_path: Path, content: bytes | None, words: str) -> None:
        source = tmp_path / "bad.png"
        if content is not None:
            source.write_bytes(content)
        with pytest.raises(DataError, match=rf"bad\.png: .*{words}"):
            preprocess_file("canny", source, tmp_path / "out.png")
        assert not (tmp_path / "out.png").exists()

    def test_nothing_is_overwritten_and_jpeg_is_refused(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "in.png")
        (tmp_path / "out.png").write_bytes(b"mine")
        with pytest.raises(ConfigError, match="exists already"):
            preprocess_file("canny", tmp_path / "in.png", tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes() == b"mine"
        with pytest.raises(ConfigError, match=r"does not end in \.png"):
            preprocess_file("canny", tmp_path / "in.png", tmp_path / "out.jpg")


def test_loads_without_torch_or_opencv() -> None:
    code = "import sys, flux_ft.infer.control; print(*sorted({'torch', 'transformers', 'cv2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_tiny_cannys_lines_are_cannys_and_a_pixel_wider_on_each_side() -> None:
    square = Image.new("RGB", (40, 40), "navy")
    square.paste((255, 255, 0), (10, 10, 30, 30))
    thin, wide = (np.asarray(edges(square).convert("L")) > 0 for edges in (canny, tiny_canny))
    grown = np.zeros_like(thin)
    for y, x in zip(*np.nonzero(thin), strict=True):
        grown[y - 1 : y + 2, x - 1 : x + 2] = True
    assert thin.any()
    assert np.array_equal(wide, grown)
