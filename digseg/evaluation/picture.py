"""Pictures for people: the grid of image, ground truth and prediction, and the overlay of one prediction."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from digseg.evaluation.colours import IGNORE_COLOURS, Colour, class_colours, paint
from digseg.evaluation.metrics import IGNORE_ID, ConfusionMatrix

# Layout in pixels, of a canvas meant for high-density screens.
_TILE = 300
_GAP = 8
_SAMPLE_GAP = 40
_MARGIN = 56
_LEGEND_WIDTH = 330
_LEGEND_GAP = 36
_CAPTION = 40
_HEADER = 84
_SECTION_GAP = 44
_SWATCH = 26
_LEGEND_LINE = 40

_PAPER: Colour = (255, 255, 255)
_INK: Colour = (24, 28, 36)
_MUTED: Colour = (110, 117, 130)
_RULE: Colour = (222, 225, 230)


class PictureRow(NamedTuple):
    """One sample: its corpus' title, image uint8 [H, W, 3], ground truth and prediction as ids [H, W] of
    `vocabulary` (255 in the ground truth: ignored)."""

    title: str
    image: NDArray[np.uint8]
    truth: NDArray[np.integer]
    prediction: NDArray[np.integer]
    vocabulary: Sequence[str]


def prediction_grid(
    rows: Sequence[PictureRow],
    path: Path,
    *,
    title: str = "Image, ground truth and prediction",
    subtitle: str = "",
    samples_per_line: int = 2,
) -> None:
    """Write the picture of all samples to `path` (PNG): a section for each run of rows with the same title,
    in it `samples_per_line` triples a line, and beside it the legend of the classes that occur in it.

    Raises:
        ValueError: when there is no row.
    """
    if not rows:
        raise ValueError("no rows to draw")
    sections = [_Section(name, list(group)) for name, group in groupby(rows, key=lambda row: row.title)]
    samples_per_line = min(samples_per_line, max(len(section.rows) for section in sections))
    grid_width = samples_per_line * (3 * _TILE + 2 * _GAP) + (samples_per_line - 1) * _SAMPLE_GAP
    width = 2 * _MARGIN + grid_width + _LEGEND_GAP + _LEGEND_WIDTH
    top = _MARGIN + (130 if subtitle else 88)
    height = top + sum(section.height(samples_per_line) + _SECTION_GAP for section in sections)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), title, font=_font(46, bold=True), fill=_INK)
    if subtitle:
        draw.text((_MARGIN, _MARGIN + 66), subtitle, font=_font(27), fill=_MUTED)
    for section in sections:
        draw.line([(_MARGIN, top), (width - _MARGIN, top)], fill=_RULE, width=2)
        _draw_section(canvas, section, top, samples_per_line, _MARGIN + grid_width + _LEGEND_GAP)
        top += section.height(samples_per_line) + _SECTION_GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG", optimize=True)


def overlay(
    image: NDArray[np.uint8], mask: NDArray[np.integer], classes: Sequence[str], opacity: float = 0.55
) -> Image.Image:
    """The image [H, W, 3] tinted with the colours of the mask's classes [H, W], and a legend below it.

    The legend names each class with its share of the image; a class that takes no pixel is muted.
    """
    scale = max(1, round(900 / max(image.shape[:2])))
    tinted = np.float32(1 - opacity) * image + np.float32(opacity) * paint(mask, classes, ignore_id=-1)
    picture = Image.fromarray(tinted.round().astype(np.uint8))
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    shares = np.bincount(mask.ravel(), minlength=len(classes))[: len(classes)] / mask.size
    labels = [f"{name}  {share:.1%}" for name, share in zip(classes, shares, strict=True)]
    size = max(15, round(picture.width / 42))
    font, line, pad = _font(size), round(size * 1.9), size
    column = max(size * 2 + round(font.getlength(label)) for label in labels) + 2 * pad
    columns = max(1, (picture.width - pad) // column)
    lines = -(-len(labels) // columns)
    canvas = Image.new("RGB", (max(picture.width, column + pad), picture.height + lines * line + pad), _PAPER)
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for position, (label, colour) in enumerate(zip(labels, class_colours(classes), strict=True)):
        x = pad + (position % columns) * column
        y = picture.height + pad // 2 + (position // columns) * line
        _swatch(draw, x, y + line // 2, size, colour)
        fill = _INK if shares[position] > 0 else _MUTED
        draw.text((x + round(size * 1.7), y + line // 2), label, font=font, fill=fill, anchor="lm")
    return canvas


@dataclass(frozen=True)
class _Section:
    title: str
    rows: list[PictureRow]

    @property
    def tile_height(self) -> int:
        """Height of the section's tiles, from the median aspect ratio of its images (pixels)."""
        aspect = float(np.median([row.image.shape[0] / row.image.shape[1] for row in self.rows]))
        return round(_TILE * min(1.4, max(0.5, aspect)))

    @property
    def legend(self) -> list[tuple[str, Colour | None]]:
        """Name and colour of the classes that occur in the section; None stands for ignored pixels."""
        vocabulary = self.rows[0].vocabulary
        present = set[int]()
        for row in self.rows:
            present.update(np.unique(row.truth).tolist(), np.unique(row.prediction).tolist())
        colours = class_colours(vocabulary)
        entries: list[tuple[str, Colour | None]] = [
            (name, colours[index]) for index, name in enumerate(vocabulary) if index in present
        ]
        return [*entries, ("not labelled", None)] if IGNORE_ID in present else entries

    def height(self, samples_per_line: int) -> int:
        lines = -(-len(self.rows) // samples_per_line)
        tiles = lines * (self.tile_height + _CAPTION) + (lines - 1) * _GAP
        return _HEADER + max(tiles, len(self.legend) * _LEGEND_LINE)


def _draw_section(canvas: Image.Image, section: _Section, top: int, samples_per_line: int, legend_left: int) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, top + 20), section.title, font=_font(32, bold=True), fill=_INK)
    box = (_TILE, section.tile_height)
    for number, row in enumerate(section.rows):
        line, column = divmod(number, samples_per_line)
        left = _MARGIN + column * (3 * _TILE + 2 * _GAP + _SAMPLE_GAP)
        y = top + _HEADER + line * (box[1] + _CAPTION + _GAP)
        pictures = (row.image, paint(row.truth, row.vocabulary), paint(row.prediction, row.vocabulary))
        matrix = ConfusionMatrix(len(row.vocabulary))
        matrix.update(row.truth, row.prediction)
        captions = ("image", "ground truth", f"prediction   mIoU {matrix.mean_iou():.2f}")
        for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            x = left + place * (_TILE + _GAP)
            canvas.paste(_fit(picture, box), (x, y))
            draw.text((x + 1, y + box[1] + 6), caption, font=_font(21), fill=_MUTED)
    for position, (name, colour) in enumerate(section.legend):
        y = top + _HEADER + position * _LEGEND_LINE + _SWATCH // 2
        _swatch(draw, legend_left, y, _SWATCH, colour)
        text = _shortened(name, _font(24), _LEGEND_WIDTH - 2 * _SWATCH)
        fill = _MUTED if colour is None else _INK
        draw.text((legend_left + round(_SWATCH * 1.6), y), text, font=_font(24), fill=fill, anchor="lm")


def _fit(picture: NDArray[np.uint8], box: tuple[int, int]) -> Image.Image:
    """The picture scaled into the box (width, height), on a light ground where it does not fill it."""
    image = Image.fromarray(picture)
    scale = min(box[0] / image.width, box[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Enlarged pixels stay sharp, so that coarse masks are not flattered.
    scaled = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
    tile = Image.new("RGB", box, (246, 247, 249))
    tile.paste(scaled, ((box[0] - size[0]) // 2, (box[1] - size[1]) // 2))
    return tile


def _swatch(draw: ImageDraw.ImageDraw, left: int, middle: int, size: int, colour: Colour | None) -> None:
    corner = (left, middle - size // 2, left + size, middle - size // 2 + size)
    draw.rounded_rectangle(corner, radius=size // 5, fill=IGNORE_COLOURS[1] if colour is None else colour)
    if colour is None:
        for offset in range(size // 4, size, size // 4):
            draw.line([(left, corner[1] + offset), (left + offset, corner[1])], fill=IGNORE_COLOURS[0], width=2)
            draw.line([(left + offset, corner[3]), (corner[2], corner[1] + offset)], fill=IGNORE_COLOURS[0], width=2)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans as matplotlib ships it (it covers Latin, Greek and Cyrillic names); without matplotlib
    Pillow's own font, which is ASCII only."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        file = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name
        if file.is_file():
            return ImageFont.truetype(str(file), size)
    return ImageFont.load_default(size)
