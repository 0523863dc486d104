import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from shard_writing import data_config

from digseg.data.transform_settings import TransformSettings
from digseg.data.transforms import training_crop

SETTINGS = TransformSettings(crop_size=32, short_side=40, scale=(1.0, 1.0), flip=False, upright=True, colour_jitter=0.0)
IDENTITY = np.arange(256, dtype=np.uint8)


def crop(
    image: NDArray[np.uint8], mask: NDArray[Any], settings: TransformSettings, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return training_crop(image, mask, IDENTITY, settings, np.random.default_rng(seed))


def coded(height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image whose grey level is its mask value, in coarse blocks."""
    blocks = np.random.default_rng(0).integers(0, 8, (height // 8 + 1, width // 8 + 1))
    mask = np.kron(blocks, np.ones((8, 8), int))[:height, :width].astype(np.uint8)
    return np.repeat((mask * 30)[..., None], 3, axis=2), mask


sizes = st.tuples(st.integers(8, 90), st.integers(8, 90))


@given(
    size=sizes,
    seed=st.integers(0, 2**32),
    short_side=st.integers(8, 90),
    flip=st.booleans(),
    upright=st.booleans(),
    jitter=st.sampled_from([0.0, 0.4]),
)
def test_crop_has_its_size_range_and_only_values_of_the_mask(
    size: tuple[int, int], seed: int, short_side: int, flip: bool, upright: bool, jitter: float
) -> None:
    image, mask = coded(*size)
    settings = TransformSettings(32, short_side, (0.5, 1.5), flip, upright, jitter)
    pixels, labels = crop(image, mask, settings, seed)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == labels.dtype == np.uint8
    assert labels.shape == (32, 32)
    # Nearest: no label that is not in the mask, but for the padding.
    assert set(np.unique(labels)) <= {*np.unique(mask), 255}


@given(size=sizes, seed=st.integers(0, 2**32), flip=st.booleans(), upright=st.booleans())
def test_image_and_labels_stay_aligned_under_every_transform(
    size: tuple[int, int], seed: int, flip: bool, upright: bool
) -> None:
    image, mask = coded(*size)
    # Enlarging up to twice: bilinear ramps at the blocks' borders are then two pixels wide.
    settings = TransformSettings(64, min(size), (1.0, 2.0), flip, upright, 0.0)
    pixels, labels = crop(image, mask, settings, seed)
    shown = pixels[0] / 30
    windows = np.lib.stride_tricks.sliding_window_view(labels, (5, 5))
    flat = (windows == windows[..., :1, :1]).all(axis=(2, 3)) & (windows[..., 0, 0] != 255)
    centre = np.s_[2:-2, 2:-2]
    np.testing.assert_allclose(shown[centre][flat], labels[centre][flat], atol=0.05)


def test_small_image_is_padded_with_grey_and_ignored_labels() -> None:
    image = np.full((16, 20, 3), 255, np.uint8)
    mask = np.full((16, 20), 3, np.uint8)
    pixels, labels = crop(image, mask, replace(SETTINGS, short_side=16))
    assert (labels == 3).sum() == 16 * 20
    assert (labels == 255).sum() == 32 * 32 - 16 * 20
    assert (pixels[:, labels == 255] == 128).all()
    assert (pixels[:, labels == 3] == 255).all()


def test_ignored_pixels_stay_ignored() -> None:
    image, mask = coded(40, 40)
    mask[:] = 255
    _, labels = crop(image, mask, replace(SETTINGS, flip=True, upright=False))
    assert (labels == 255).all()


def test_sixteen_bit_masks_go_through_the_label_map() -> None:
    mask = np.full((40, 40), 299, np.uint16)
    mask[20:] = 65535
    label_map = np.full(65536, 255, np.uint8)
    label_map[299] = 7
    _, labels = training_crop(
        np.zeros((40, 40, 3), np.uint8), mask, label_map, replace(SETTINGS, crop_size=40), np.random.default_rng(0)
    )
    assert (labels[:20] == 7).all()
    assert (labels[20:] == 255).all()


class FixedDraws:
    """A generator whose next offsets are given, and whose scale is 1."""

    def __init__(self, offsets: tuple[float, float]) -> None:
        self._offsets = list(offsets)

    def uniform(self, low: float, high: float) -> float:
        return 1.0

    def integers(self, low: int, high: int) -> int:
        return low + int(self._offsets.pop(0) * (high - low))


@given(size=sizes, short_side=st.integers(32, 120), offsets=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)))
def test_crop_is_a_part_of_the_image_resized(
    size: tuple[int, int], short_side: int, offsets: tuple[float, float]
) -> None:
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = random.integers(0, 9, size, dtype=np.uint8)
    # In whole numbers: `resized` pixels show the whole side, so 32 of them show 32 * side / resized.
    resized = [round(side * short_side / min(size)) for side in size]
    top, left = (
        int(offset * (side - -(-32 * side // length) + 1))
        for offset, side, length in zip(offsets, size, resized, strict=True)
    )
    # A part that would be stretched by less than a pixel is taken as it is.
    steps = [
        (1, 1) if -(-32 * side // length) == 32 else (side, length) for side, length in zip(size, resized, strict=True)
    ]
    box = (0, 0, 32 * steps[1][0] / steps[1][1], 32 * steps[0][0] / steps[0][1])
    part = image[top : top + math.ceil(box[3]), left : left + math.ceil(box[2])]
    expected = np.asarray(Image.fromarray(part).resize((32, 32), Image.Resampling.BILINEAR, box=box))

    draws: Any = FixedDraws(offsets)
    pixels, labels = training_crop(image, mask, IDENTITY, replace(SETTINGS, short_side=short_side), draws)

    shown = pixels.transpose(1, 2, 0).astype(int)
    # Both round to whole levels after each of two passes.
    assert np.abs(shown - expected).max() <= 2
    # The source pixel that holds a target's centre, or either one if it lies on their border.
    rows, columns = (
        (2 * start * length + (2 * np.arange(32) + 1) * side, 2 * length)
        for start, (side, length) in zip((top, left), steps, strict=True)
    )
    allowed = [mask[np.ix_((rows[0] - y) // rows[1], (columns[0] - x) // columns[1])] for y in (0, 1) for x in (0, 1)]
    assert np.logical_or.reduce([labels == candidate for candidate in allowed]).all()


def test_colour_jitter_is_brightness_after_contrast_after_saturation() -> None:
    image = np.random.default_rng(2).integers(90, 160, (32, 32, 3), dtype=np.uint8)
    settings = replace(SETTINGS, short_side=32, colour_jitter=0.2)
    pixels, _ = crop(image, image[..., 0], settings, seed=4)
    draws = np.random.default_rng(4)
    draws.uniform(1, 1), draws.integers(0, 1), draws.integers(0, 1)
    brightness, contrast, saturation = draws.uniform(0.8, 1.2, size=3)
    grey = image @ [0.299, 0.587, 0.114]
    saturated = grey[..., None] + saturation * (image - grey[..., None])
    contrasted = grey.mean() + contrast * (saturated - grey.mean())
    np.testing.assert_allclose(pixels.transpose(1, 2, 0), brightness * contrasted, atol=0.501)


def test_upright_views_are_only_mirrored_and_others_take_all_eight_poses() -> None:
    image, mask = coded(32, 32)
    mask = (np.arange(32 * 32) % 251).reshape(32, 32).astype(np.uint8)

    def poses(upright: bool) -> set[bytes]:
        settings = replace(SETTINGS, short_side=32, flip=True, upright=upright)
        return {crop(image, mask, settings, seed)[1].tobytes() for seed in range(100)}

    assert poses(upright=True) == {mask.tobytes(), np.ascontiguousarray(mask[:, ::-1]).tobytes()}
    turns = {np.ascontiguousarray(np.rot90(m, k)).tobytes() for m in (mask, mask[:, ::-1]) for k in range(4)}
    assert len(turns) == 8
    assert poses(upright=False) == turns


def test_colour_jitter_changes_colours_and_never_labels() -> None:
    image, mask = coded(64, 64)
    plain = crop(image, mask, SETTINGS, seed=5)
    jittered = crop(image, mask, replace(SETTINGS, colour_jitter=0.5), seed=5)
    assert not np.array_equal(plain[0], jittered[0])
    np.testing.assert_array_equal(plain[1], jittered[1])


def test_brightness_scales_grey_images() -> None:
    image = np.full((40, 40, 3), 100, np.uint8)
    settings = replace(SETTINGS, colour_jitter=0.2)
    levels = {int(crop(image, image[..., 0], settings, seed)[0][0, 0, 0]) for seed in range(200)}
    assert 80 <= min(levels) < 84
    assert 116 < max(levels) <= 120


def test_padding_takes_no_part_in_the_contrast() -> None:
    image = np.full((16, 20, 3), 100, np.uint8)
    mask = np.zeros((16, 20), np.uint8)
    pixels, labels = crop(image, mask, replace(SETTINGS, short_side=16, colour_jitter=0.5), seed=1)
    draws = np.random.default_rng(1)
    draws.uniform(1, 1), draws.integers(0, 17), draws.integers(0, 13)
    assert set(pixels[:, labels == 0].flat) == {round(100 * draws.uniform(0.5, 1.5, size=3)[0])}
    assert set(pixels[:, labels == 255].flat) == {128}


@pytest.mark.parametrize(("domain", "upright"), [("natural", True), ("medical", False), ("remote_sensing", False)])
def test_only_natural_scenes_have_an_up(domain: str, upright: bool) -> None:
    config = data_config("/nowhere", [{"name": "any"}]).data
    assert TransformSettings.of(config, config.corpora[0], domain).upright is upright


def test_a_corpus_may_have_a_size_of_its_own() -> None:
    config = data_config("/nowhere", [{"name": "a"}, {"name": "b", "short_side": 100}], short_side=60).data
    sizes = [TransformSettings.of(config, entry, "medical").short_side for entry in config.corpora]
    assert sizes == [60, 100]
