from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from digseg.data.latents import (
    LATENTS_CODE,
    LatentRecipe,
    pack_latents,
    unpack_latents,
    view_of,
)
from digseg.data.transform_settings import TransformSettings
from digseg.data.transforms import as_pixels
from digseg.data.views import draw_views

PLAIN = TransformSettings(crop_size=16, short_side=24, scale=(1.0, 1.0), flip=True, upright=False, colour_jitter=0.0)
RECIPE = LatentRecipe(
    autoencoder={"type": "kl", "weights": "a" * 64, "scaling factor": "0.18215"},
    latent_shape=(4, 8, 8),
    transform=PLAIN,
    views=4,
    seed=0,
)


def with_transform(**changes: Any) -> LatentRecipe:
    return RECIPE.model_copy(update={"transform": replace(PLAIN, **changes)})


def striped(height: int = 24, width: int = 36, ids: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """An image whose grey value is 40 times the class id of its pixel, and that mask."""
    mask = np.random.default_rng(0).integers(0, ids, (height, width)).astype(np.uint8)
    return np.repeat((40 * mask)[..., None], 3, axis=2), mask


def test_pixels_and_class_ids_of_a_view_stay_together() -> None:
    image, mask = striped()
    views = list(draw_views("a/train/k", image, mask, 255, RECIPE))
    assert [view.key for view in views] == ["k-v0", "k-v1", "k-v2", "k-v3"]
    for view in views:
        assert view.image.shape == (16, 16, 3)
        np.testing.assert_array_equal(view.image, np.repeat(40 * view.mask[..., None], 3, axis=2))
    assert len({view.mask.tobytes() for view in views}) == 4


def test_padding_of_a_view_is_ignored() -> None:
    image, mask = striped(8, 8)
    for ignored, kind in ((255, np.uint8), (65535, np.uint16)):
        recipe = with_transform(short_side=8)
        ids = mask.astype(kind) + (300 if ignored > 255 else 0)
        view = next(draw_views("a/train/k", image, ids, ignored, recipe))
        assert view.mask.dtype == kind
        assert (view.mask == ignored).sum() == 16 * 16 - 8 * 8
        assert sorted(view.mask[view.mask != ignored]) == sorted(ids.reshape(-1))


def test_view_depends_on_the_sample_the_seed_and_its_number_alone() -> None:
    image, mask = striped()
    recipe = with_transform(scale=(0.5, 1.5), colour_jitter=0.3)

    def pixels(name: str, recipe: LatentRecipe) -> list[bytes]:
        return [view.image.tobytes() for view in draw_views(name, image, mask, 255, recipe)]

    first = pixels("a/train/k", recipe)
    assert pixels("a/train/k", recipe.model_copy(update={"views": 2})) == first[:2]
    others = [
        *pixels("a/train/l", recipe),
        *pixels("b/train/k", recipe),
        *pixels("a/train/k", recipe.model_copy(update={"seed": 1})),
    ]
    assert len({*first, *others}) == 16


def test_bytes_of_a_view_are_the_pixels_that_training_would_see() -> None:
    image, _ = striped()
    pixels = as_pixels(torch.from_numpy(image.transpose(2, 0, 1))).numpy()
    assert (pixels.min(), pixels.dtype, pixels.shape) == (-1, np.float32, (3, 24, 36))
    np.testing.assert_array_equal(np.rint((pixels + 1) * 127.5), image.transpose(2, 0, 1))


def test_same_samples_and_settings_give_the_views_of_this_code_version() -> None:
    # Other views under the same version would be trained on as if they were these: raise LATENTS_CODE with the digest.
    image = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    mask = np.random.default_rng(2).integers(0, 4, (30, 40)).astype(np.uint8)
    digest = hashlib.sha256()
    for view in draw_views("a/train/k", image, mask, 255, with_transform(scale=(0.4, 1.6))):
        digest.update(view.image.tobytes() + view.mask.tobytes())
    assert (LATENTS_CODE, digest.hexdigest()[:16]) == (2, "787c1befe548db3c")


@given(st.integers(0, 50), st.integers(0, 10**9), st.integers(1, 12), st.integers(0, 2**64 - 1))
def test_every_round_of_epochs_shows_each_view_once(round_number: int, sample: int, views: int, seed: int) -> None:
    epochs = range(round_number * views, (round_number + 1) * views)
    assert sorted(view_of(epoch, sample, views, seed) for epoch in epochs) == list(range(views))


def test_samples_show_their_views_in_orders_of_their_own() -> None:
    orders = {tuple(view_of(epoch, sample, 4, seed=0) for epoch in range(4)) for sample in range(200)}
    assert len(orders) > 15  # of 24


def test_packed_latents_come_back() -> None:
    latents = np.random.default_rng(0).normal(0, 3, (4, 5, 6)).astype(np.float32)
    back = unpack_latents(pack_latents(latents))
    np.testing.assert_array_equal(back, latents.astype(np.float16))
    assert pack_latents(latents) == pack_latents(latents)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_latents_that_float16_cannot_hold_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite in float16"):
        pack_latents(np.full((4, 2, 2), value, np.float32))


@pytest.mark.parametrize("array", [np.zeros((2, 2), np.float16), np.zeros((4, 2, 2), np.float64)])
def test_bytes_of_something_else_are_no_latents(array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    with pytest.raises(ValueError, match="not float16"):
        unpack_latents(buffer.getvalue())
    with pytest.raises(ValueError):
        unpack_latents(b"no npy file")


DIFFERENT: dict[str, tuple[Callable[[LatentRecipe], LatentRecipe], str]] = {
    "weights": (
        lambda r: r.model_copy(update={"autoencoder": {**r.autoencoder, "weights": "b" * 64}}),
        "autoencoder weights (latents aaaaaaaaaaaa, run bbbbbbbbbbbb)",
    ),
    "kind": (
        lambda r: r.model_copy(update={"autoencoder": {"type": "shuffle"}}),
        "autoencoder type (latents kl, run shuffle)",
    ),
    "scaling": (
        lambda r: r.model_copy(update={"autoencoder": {**r.autoencoder, "scaling factor": "1.0"}}),
        "autoencoder scaling factor (latents 0.18215, run 1.0)",
    ),
    "resolution": (lambda r: with_transform(crop_size=32), "resolution, data.crop_size (latents 16, run 32)"),
    "short side": (lambda r: with_transform(short_side=30), "data.short_side (latents 24, run 30)"),
    "scale": (lambda r: with_transform(scale=(0.5, 2.0)), "data.scale (latents (1.0, 1.0), run (0.5, 2.0))"),
    "flip": (lambda r: with_transform(flip=False), "data.flip (latents True, run False)"),
    "colour": (lambda r: with_transform(colour_jitter=0.1), "data.colour_jitter (latents 0.0, run 0.1)"),
    "code": (lambda r: r.model_copy(update={"code": 0}), f"code version (latents {LATENTS_CODE}, run 0)"),
}


@pytest.mark.parametrize("part", DIFFERENT)
def test_each_part_that_differs_is_named_with_both_values(part: str) -> None:
    change, message = DIFFERENT[part]
    assert message in RECIPE.differences(change(RECIPE))


def test_number_and_seed_of_views_may_differ_from_the_runs() -> None:
    assert RECIPE.differences(RECIPE.model_copy(update={"views": 1, "seed": 5})) == []
    assert LatentRecipe.model_validate_json(RECIPE.model_dump_json()) == RECIPE
