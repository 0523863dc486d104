"""Images read in parts against the same images read whole by Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from numpy.typing import NDArray
from PIL import Image

from digseg.errors import DigSegError
from digseg.evaluation.images import read_image
from digseg.evaluation.pixels import ArrayPixels, FilePixels, write_mask


@pytest.fixture(scope="module")
def colours() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (90, 130, 4), dtype=np.uint8)


def _written(folder: Path, colours: NDArray[np.uint8], kind: str) -> Path:
    path = folder / f"{kind}.{'jpg' if kind in ('jpeg', 'cmyk', 'turned') else 'tif' if kind == 'tiled' else 'png'}"
    rgb = Image.fromarray(colours[..., :3])
    if kind == "tiled":
        tifffile.imwrite(path, colours[..., :3], tile=(32, 48), photometric="rgb", compression="zlib")
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees to see it upright
        rgb.save(path, exif=exif, quality=95)
    elif kind == "16-bit":
        Image.fromarray(colours[..., 0].astype(np.uint16) * 30 + 7).save(path)
    elif kind == "16-bit with alpha":
        grey = np.ascontiguousarray(colours[..., :2].astype(np.uint16) * 250)
        image = pyvips.Image.new_from_memory(grey.data, grey.shape[1], grey.shape[0], 2, "ushort")
        image.copy(interpretation="grey16").pngsave(str(path))
    elif kind == "palette":
        rgb.quantize(32).save(path)
    else:
        modes = {"rgb": "RGB", "jpeg": "RGB", "grey": "L", "grey with alpha": "LA", "bits": "1", "cmyk": "CMYK"}
        image = Image.fromarray(colours) if kind == "rgba" else rgb.convert(modes[kind])
        image.save(path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "rgb",
        "jpeg",
        "tiled",
        "turned",
        "rgba",
        "grey",
        "grey with alpha",
        "16-bit",
        "16-bit with alpha",
        "palette",
        "bits",
        "cmyk",
    ],
)
def test_parts_are_those_of_the_whole_image(tmp_path: Path, colours: NDArray[np.uint8], kind: str) -> None:
    path = _written(tmp_path, colours, kind)
    whole, pixels = read_image(path), FilePixels(path)
    assert (pixels.height, pixels.width, 3) == whole.shape
    assert whole.std() > 20
    for top, left, height, width in ((0, 0, 90, 90), (31, 40, 33, 17), (pixels.height - 1, pixels.width - 1, 1, 1)):
        part = pixels.read(top, left, height, width)
        np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])


def test_sixteen_bit_colours_keep_their_upper_bits(tmp_path: Path) -> None:
    colours = np.array([[[0, 256, 65535], [4096, 32768, 511]]], np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb")
    assert FilePixels(tmp_path / "a.tif").read(0, 0, 1, 2).tolist() == [[[0, 1, 255], [16, 128, 1]]]


def test_thumbnails_keep_the_shape_and_the_mean(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 600).astype(np.uint8)[None, :, None], (400, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    for pixels in (FilePixels(tmp_path / "ramp.png"), ArrayPixels(ramp)):
        small = pixels.thumbnail(150)
        assert small.shape == (100, 150, 3)
        assert abs(small.mean() - ramp.mean()) < 1
        assert pixels.thumbnail(1000).shape == ramp.shape


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_mask_is_written_with_its_bits(tmp_path: Path, kind: type[np.uint8 | np.uint16]) -> None:
    mask = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (33, 21), dtype=kind)
    write_mask(mask, tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as written:
        assert written.mode == ("L" if kind is np.uint8 else "I;16")
        np.testing.assert_array_equal(np.array(written), mask)


def test_what_cannot_be_read_is_named(tmp_path: Path, colours: NDArray[np.uint8]) -> None:
    with pytest.raises(DigSegError, match=r"gone.png: no such file"):
        FilePixels(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DigSegError, match=r"text.png: not an image that can be read in parts"):
        FilePixels(tmp_path / "text.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(_written(tmp_path, colours, "rgb").read_bytes()[:9000])
    with pytest.raises(DigSegError, match=r"cut.png: damaged image"):
        FilePixels(cut).read(0, 0, 90, 130)
    with pytest.raises(DigSegError, match=r"cut.png: damaged image"):
        FilePixels(cut).thumbnail(50)
    tifffile.imwrite(tmp_path / "bands.tif", np.zeros((8, 8, 7), np.uint8), photometric="minisblack", planarconfig=1)
    with pytest.raises(DigSegError, match=r"bands.tif: 7 bands of .*; give an image of grey, RGB or CMYK"):
        FilePixels(tmp_path / "bands.tif")
    for number in (np.nan, np.inf, -np.inf):
        path, values = tmp_path / f"measured {number}.tif", np.ones((8, 8), np.float32)
        values[3, 4] = number
        tifffile.imwrite(path, values, photometric="minisblack")
        for read in (FilePixels, read_image):
            with pytest.raises(DigSegError, match=r"\.tif: damaged image \(some of its pixels are no finite"):
                read(path)
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((8, 8, 3), np.float32), photometric="rgb")
    with pytest.raises(DigSegError, match=r"float.tif: colours of type float; give 8 or 16 bits"):
        FilePixels(tmp_path / "float.tif")
