import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from digseg.data.decoding import decode_image, decode_mask

Y, X = np.mgrid[:361, :483]
PIXELS = np.stack([X * 255 // 483, Y * 255 // 361, X * Y % 256], axis=-1).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_pil(content: bytes) -> NDArray[np.uint8]:
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize(
    "content",
    [
        *(
            pytest.param(encoded(PICTURE, "JPEG", subsampling=s, progressive=p), id=f"jpeg-{s}-{p}")
            for s in (0, 1, 2)
            for p in (False, True)
        ),
        pytest.param(encoded(PICTURE.convert("L"), "JPEG"), id="jpeg-grey"),
        pytest.param(encoded(PICTURE.convert("CMYK"), "JPEG"), id="jpeg-cmyk"),
        pytest.param(encoded(PICTURE, "JPEG", keep_rgb=True), id="jpeg-rgb"),
        *(
            pytest.param(encoded(PICTURE.convert(mode), "PNG"), id=f"png-{mode}")
            for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "I;16")
        ),
    ],
)
def test_every_kind_of_image_gives_the_pixels_of_pil(content: bytes) -> None:
    decoded = decode_image(content)
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, by_pil(content))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_reduced_decoding_keeps_the_short_side_and_the_picture(kind: str) -> None:
    smooth = Image.fromarray(np.stack([X * 255 // 483, Y * 255 // 361, (X + Y) * 255 // 844], axis=-1).astype(np.uint8))
    content = encoded(smooth, kind)
    for short_side in (45, 90, 130, 180):
        reduced = decode_image(content, short_side)
        assert short_side <= min(reduced.shape[:2]) < 2 * short_side
        again = np.asarray(Image.fromarray(reduced).resize(PICTURE.size, Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(again - np.asarray(smooth)).mean() < 2
    assert decode_image(content, 181).shape == (361, 483, 3)


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (PIXELS[..., 0], np.uint8),
        (PIXELS[..., 0].astype(np.uint16) * 257, np.uint16),
    ],
)
def test_masks_come_back_as_they_were_written(mask: NDArray[Any], kind: type) -> None:
    decoded = decode_mask(encoded(Image.fromarray(mask), "PNG"))
    assert decoded.dtype == kind
    np.testing.assert_array_equal(decoded, mask)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_torn_files_are_refused(kind: str) -> None:
    content = encoded(PICTURE, kind)
    for torn in (content[: len(content) // 2], b"", b"not an image"):
        with pytest.raises(OSError, match=r"truncated|cannot identify"):
            decode_image(torn)
