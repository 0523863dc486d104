"""Image files in, masks out: what `digseg predict` does."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from digseg.console import ProgressHandle, progress
from digseg.errors import DigSegError
from digseg.evaluation.classes import ClassQuery, ids_type
from digseg.evaluation.colours import class_colours
from digseg.evaluation.images import read_image
from digseg.evaluation.picture import overlay
from digseg.evaluation.pixels import ArrayPixels, FilePixels, Pixels, write_mask

if TYPE_CHECKING:  # heavy, and not needed to check files
    from digseg.evaluation.inference import Predictor
    from digseg.registry.models import ModelRef

_OVERLAY_SIDE = 2000  # px, of the longer side: larger images are shown smaller


def check_files(images: Sequence[Path], out: Path, windowed: bool = False) -> None:
    """Refuse what cannot succeed before anything is loaded or written; decodes every image to its end, unless it will
    be read window by window.

    Raises:
        DigSegError: no image, one that cannot be read, two whose results would have the same name, or an output
            folder that cannot be made.
    """
    _check_names(images, out)
    for path in images:
        open_pixels(path, windowed)


def _check_names(images: Sequence[Path], out: Path) -> None:
    if not images:
        raise DigSegError("no image given; name at least one file")
    stems = Counter(path.stem for path in images)
    for stem, count in stems.items():
        if count > 1:
            same = ", ".join(str(path) for path in images if path.stem == stem)
            raise DigSegError(f"{same}: results would share the name {stem!r}; predict them into separate folders")
    if out.exists() and not out.is_dir():
        raise DigSegError(f"--out {out} is a file; name a folder")


def open_pixels(path: Path, windowed: bool) -> Pixels:
    """The pixels of an image file: decoded whole, or piece by piece if it is ``windowed``."""
    return FilePixels(path) if windowed else ArrayPixels(read_image(path))


def predict_files(
    predictor: Predictor,
    model: ModelRef,
    images: Sequence[Path],
    classes: Sequence[ClassQuery],
    out: Path,
) -> list[Path]:
    """Segment image files into `out`: for each one, named by its stem,

    `STEM.mask.png`     8-bit ids (16-bit above 255 classes), of the image's size
    `STEM.legend.json`  id, name, synonyms, colour and share of each class, and the model that said so
    `STEM.overlay.png`  the image tinted with the classes' colours

    The files appear together at the end: an error leaves none behind.

    Returns:
        The written files.

    Raises:
        DigSegError: as `check_files` and `Predictor.predict` say.
    """
    windowed = predictor.settings.window is not None
    _check_names(images, out)
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".digseg-", dir=out))
    except OSError as error:
        raise DigSegError(f"--out {out} cannot be written: {error.strerror or error}") from None
    try:
        with progress("predicting", total=len(images), unit="images") as bar:
            for path in images:
                _predict_file(predictor, model, path, open_pixels(path, windowed), classes, work, bar)
                bar.advance()
        return [file.replace(out / file.name) for file in sorted(work.iterdir())]
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def _predict_file(
    predictor: Predictor,
    model: ModelRef,
    path: Path,
    pixels: Pixels,
    classes: Sequence[ClassQuery],
    folder: Path,
    bar: ProgressHandle,
) -> None:
    names = [query.name for query in classes]

    def tell(share: float) -> None:
        bar.note(f"{share:.0%} of {path.name}")
        bar.advance(0)  # shows the note

    with tempfile.TemporaryFile(dir=folder) as file:
        # On disk: the mask of a large image need not fit into memory.
        shape, kind = (pixels.height, pixels.width), ids_type(len(classes))
        mask: NDArray[np.uint8 | np.uint16] = np.memmap(file, kind, "w+", shape=shape)
        predictor.predict_mask(pixels, classes, mask, tell)
        write_mask(mask, folder / f"{path.stem}.mask.png")
        described = legend(path, mask, classes, model)
        (folder / f"{path.stem}.legend.json").write_text(json.dumps(described, indent=2) + "\n")
        small = pixels.thumbnail(_OVERLAY_SIDE)
        overlay(small, _nearest(mask, *small.shape[:2]), names).save(folder / f"{path.stem}.overlay.png")


def _nearest(mask: NDArray[np.uint8 | np.uint16], height: int, width: int) -> NDArray[np.uint8 | np.uint16]:
    """The mask at another size: of each pixel the value at its middle."""
    rows, columns = (
        ((np.arange(small) + 0.5) * full / small).astype(np.int64)
        for small, full in zip((height, width), mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def legend(
    path: Path, mask: NDArray[np.uint8 | np.uint16], classes: Sequence[ClassQuery], model: ModelRef
) -> dict[str, Any]:
    """What the ids of a mask mean, as plain JSON values."""
    height, width = mask.shape
    pixels = np.zeros(len(classes), np.int64)
    for row in mask:  # counting makes 64-bit numbers of all that it is given
        pixels += np.bincount(row, minlength=len(classes))
    colours = class_colours([query.name for query in classes])
    return {
        "image": path.name,
        "mask": f"{path.stem}.mask.png",
        "height": height,
        "width": width,
        "classes": [
            {
                "id": number,
                "name": query.name,
                "synonyms": list(query.synonyms),
                "colour": "#{:02x}{:02x}{:02x}".format(*colours[number]),
                "pixels": int(pixels[number]),
                "share": round(int(pixels[number]) / (height * width), 6),
            }
            for number, query in enumerate(classes)
        ],
        "model": model.as_json(),
    }
