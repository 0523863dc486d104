"""The pictures: what is drawn where, read back from the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from digseg.evaluation.colours import class_colours
from digseg.evaluation.picture import PictureRow, overlay, prediction_grid

CLASSES = ("road", "car")


def _row(title: str, seed: int = 0, shape: tuple[int, int] = (60, 80)) -> PictureRow:
    random = np.random.default_rng(seed)
    image = random.integers(0, 50, (*shape, 3), dtype=np.uint8)
    truth = np.zeros(shape, np.uint8)
    truth[:, shape[1] // 2 :] = 1
    return PictureRow(title, image, truth, np.zeros(shape, np.uint8), CLASSES)


def _share(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(axis=-1).sum())


def test_truth_and_prediction_are_drawn_in_the_colours_of_the_legend(tmp_path: Path) -> None:
    path = tmp_path / "new" / "grid.png"
    prediction_grid([_row("streets")], path, title="A title", subtitle="and more")
    picture = np.array(Image.open(path))
    road, car = class_colours(CLASSES)
    tile = 300 * 225  # pixels of a tile of an image with this aspect ratio
    # Half the truth and all of the prediction are road; half the truth is car, which the legend names too.
    assert _share(picture, road) == pytest.approx(1.5 * tile, rel=0.02)
    assert _share(picture, car) == pytest.approx(0.5 * tile, rel=0.03)


def test_more_corpora_make_the_picture_taller_and_more_samples_fill_lines(tmp_path: Path) -> None:
    def size(rows: list[PictureRow]) -> tuple[int, int]:
        prediction_grid(rows, tmp_path / "grid.png")
        with Image.open(tmp_path / "grid.png") as picture:
            return picture.size

    one = size([_row("streets")])
    pair = size([_row("streets"), _row("streets", 1)])
    three = size([_row("streets"), _row("streets", 1), _row("streets", 2)])
    both = size([_row("streets"), _row("streets", 1), _row("cells", 2, (64, 64))])
    assert pair[0] > one[0]
    assert pair[1] == one[1]
    assert three[1] > pair[1]
    assert both[1] > pair[1]


def test_images_of_any_shape_fit_their_tile(tmp_path: Path) -> None:
    rows = [_row("mixed", 0, (40, 200)), _row("mixed", 1, (300, 30)), _row("mixed", 2, (5, 5))]
    prediction_grid(rows, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        prediction_grid([], tmp_path / "grid.png")


def test_overlay_keeps_the_image_visible_and_adds_a_legend_below() -> None:
    row = _row("streets", shape=(600, 900))
    drawn = np.array(overlay(row.image, row.truth, CLASSES, opacity=0.5))
    assert drawn.shape[1] == 900
    assert drawn.shape[0] > 600
    road, car = np.array(class_colours(CLASSES))
    np.testing.assert_allclose(drawn[:600, :450], (row.image[:, :450] + road) / 2, atol=1)
    np.testing.assert_allclose(drawn[:600, 450:], (row.image[:, 450:] + car) / 2, atol=1)
    assert _share(drawn[600:], tuple(car)) > 100
