"""Tables of images and class names in, tables of masks out: what the registered pyfunc predicts."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from digseg.config import PredictionConfig, section_of_options
from digseg.errors import DigSegError
from digseg.evaluation.classes import parse_classes
from digseg.evaluation.images import decode_image, png_bytes
from digseg.evaluation.inference import Predictor


class TablePredictor:
    """Segments the images of a table, each into its own classes; see the head of `pyfunc_model.py` for the columns."""

    def __init__(self, model_dir: Path) -> None:
        self._predictor = Predictor.load(model_dir)

    def predict(self, table: pd.DataFrame, options: Mapping[str, Any]) -> pd.DataFrame:
        """One output row for each input row.

        Raises:
            DigSegError: an image that cannot be read, no class, or a class named twice, with its row; settings that
                make no sense.
        """
        predictor = self._predictor.with_settings(_settings(options["prediction"]))
        rows = [
            _predict_row(predictor, f"row {number}", row.image, row.classes, options)
            for number, row in enumerate(table.itertuples(index=False))
        ]
        return pd.DataFrame(rows)


def _predict_row(
    predictor: Predictor, where: str, image: bytes | str, classes: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    pixels = decode_image(_content(image, where), where)
    try:
        prediction = predictor.predict(pixels, parse_classes(classes), options["background"])
    except DigSegError as error:
        raise DigSegError(f"{where}: {error}") from None
    row = {"mask_png": _base64(png_bytes(prediction.mask)), "classes": list(prediction.classes)}
    if options["probabilities"]:
        buffer = io.BytesIO()
        np.save(buffer, prediction.probabilities.astype(np.float16))
        row["probabilities"] = _base64(buffer.getvalue())
    return row


def _settings(text: str) -> PredictionConfig:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DigSegError(f"parameter prediction is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DigSegError(f"parameter prediction: expected a JSON object, got {text}")
    return section_of_options(PredictionConfig, values)


def _content(image: bytes | str, where: str) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise DigSegError(f"{where}: image is neither the bytes of a file nor base64 of them") from None


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
