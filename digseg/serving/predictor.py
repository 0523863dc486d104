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

from digseg.console import progress
from digseg.errors import DigSegError
from digseg.evaluation.colours import class_colours
from digseg.evaluation.images import png_bytes, read_image
from digseg.evaluation.picture import overlay

if TYPE_CHECKING:  # heavy, and not needed to check files
    from digseg.evaluation.inference import Prediction, Predictor
    from digseg.registry.models import ModelRef


def check_files(images: Sequence[Path], out: Path) -> None:
    """Refuse what cannot succeed before anything is loaded or written; decodes every image to its end.

    Raises:
        DigSegError: no image, one that cannot be read, two whose results would have the same name, or an
        output
            folder that cannot be made.
    """
    if not images:
        raise DigSegError("no image given; name at least one file")
    stems = Counter(path.stem for path in images)
    for stem, count in stems.items():
        if count > 1:
            same = ", ".join(str(path) for path in images if path.stem == stem)
            raise DigSegError(f"{same}: results would share the name {stem!r}; predict them into separate folders")
    if out.exists() and not out.is_dir():
        raise DigSegError(f"--out {out} is a file; name a folder")
    for path in images:
        read_image(path)


def predict_files(
    predictor: Predictor,
    model: ModelRef,
    images: Sequence[Path],
    classes: Sequence[str],
    out: Path,
    background: bool = False,
) -> list[Path]:
    """Segment image files into `out`: for each one, named by its stem,

    `STEM.mask.png`     8-bit ids, of the image's size
    `STEM.legend.json`  id, name, colour and share of each class, and the model that said so
    `STEM.overlay.png`  the image tinted with the classes' colours

    The files appear together at the end: an error leaves none behind.

    Returns:
        The written files.

    Raises:
        DigSegError: as `check_files` and `Predictor.predict` say.
    """
    check_files(images, out)
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".digseg-", dir=out))
    except OSError as error:
        raise DigSegError(f"--out {out} cannot be written: {error.strerror or error}") from None
    try:
        with progress("predicting", total=len(images), unit="images") as bar:
            for path in images:
                image = read_image(path)
                prediction = predictor.predict(image, classes, background)
                (work / f"{path.stem}.mask.png").write_bytes(png_bytes(prediction.mask))
                described = legend(path, prediction, model)
                (work / f"{path.stem}.legend.json").write_text(json.dumps(described, indent=2) + "\n")
                overlay(image, prediction.mask, prediction.classes).save(work / f"{path.stem}.overlay.png")
                bar.advance()
        return [file.replace(out / file.name) for file in sorted(work.iterdir())]
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def legend(path: Path, prediction: Prediction, model: ModelRef) -> dict[str, Any]:
    """What the ids of a mask mean, as plain JSON values."""
    height, width = prediction.mask.shape
    pixels = np.bincount(prediction.mask.ravel(), minlength=len(prediction.classes))
    colours = class_colours(prediction.classes)
    return {
        "image": path.name,
        "mask": f"{path.stem}.mask.png",
        "height": height,
        "width": width,
        "classes": [
            {
                "id": number,
                "name": name,
                "colour": "#{:02x}{:02x}{:02x}".format(*colours[number]),
                "pixels": int(pixels[number]),
                "share": round(int(pixels[number]) / (height * width), 6),
            }
            for number, name in enumerate(prediction.classes)
        ],
        "model": model.as_json(),
    }
