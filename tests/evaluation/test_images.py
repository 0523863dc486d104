"""Image files as users have them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from digseg.errors import DigSegError
from digseg.evaluation.images import decode_image, png_bytes, read_image


def _file(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    pixels = np.full((7, 9, 3), 255, np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    decoded = decode_image(_file(image, "TIFF" if mode == "CMYK" else "PNG"), "x")
    assert decoded.shape == (7, 9, 3)
    assert decoded.dtype == np.uint8
    assert (decoded == 255).all()


def test_sixteen_bit_greyscale_keeps_its_range() -> None:
    ramp = np.linspace(0, 40000, 64).astype(np.uint16).reshape(8, 8)
    decoded = decode_image(_file(Image.fromarray(ramp)), "x")
    np.testing.assert_allclose(decoded[..., 0], ramp / 40000 * 255, atol=1)


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: the picture is upright after a turn to the right
    decoded = decode_image(_file(image, exif=exif), "x")
    np.testing.assert_array_equal(decoded, np.rot90(pixels, -1))


def test_unreadable_files_are_named_with_their_reason(tmp_path: Path) -> None:
    whole = _file(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), "JPEG")
    for name, content, reason in (
        ("text.png", b"not a picture", "not an image"),
        ("cut.jpg", whole[: len(whole) // 2], "damaged image"),
        ("empty.png", b"", "not an image"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DigSegError, match=rf"{name}.*{reason}"):
            read_image(tmp_path / name)
    with pytest.raises(DigSegError, match=r"cannot read image .*missing\.png: No such file"):
        read_image(tmp_path / "missing.png")


def test_an_image_of_too_many_pixels_is_sent_to_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DigSegError, match=r"big: too large to be decoded whole .*; use digseg predict --window"):
        decode_image(_file(Image.new("RGB", (20, 20)), "PNG"), "big")


def test_a_mask_survives_its_png() -> None:
    mask = np.random.default_rng(0).integers(0, 255, (11, 13)).astype(np.uint8)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(png_bytes(mask)))), mask)
