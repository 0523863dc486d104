"""The registered model as MLflow loads it (a pyfunc logged *from code*: this file is the model).

    model = mlflow.pyfunc.load_model("models:/digseg@champion")
    table = model.predict(
        pandas.DataFrame({"image": [Path("street.jpg").read_bytes()], "classes": ["road, car, sky"]}),
        params={"background": True},
    )

Input columns
    image    the bytes of a PNG or JPEG file; in JSON (MLflow's scoring server) the same bytes in base64
    classes  class names, separated by commas, perhaps with synonyms: "road=street|lane, car"
Parameters
    background     put a "background" class first if none of the names is it (default false)
    probabilities  give the probabilities too (default false)
    prediction     JSON of other settings, such as {"classes_per_pass": 1}; see `digseg.config.PredictionConfig`
Output columns
    mask_png       base64 of a PNG of the image's size: indexes into `classes`; 8 bits, 16 above 255 classes
    classes        the class names, in the order of the mask's ids
    probabilities  only if asked for: base64 of a float16 .npy file [K, H, W]
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from digseg.config import PredictionConfig, section_of_options
from digseg.errors import DigSegError
from digseg.evaluation.classes import parse_classes
from digseg.evaluation.images import decode_image, png_bytes
from digseg.evaluation.inference import Predictor
from digseg.registry.models import ARTIFACT


class DigSegModel(PythonModel):  # type: ignore[misc]
    """Segments the images of a table, each into its own classes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the exported directory that was registered."""
        self._predictor = Predictor.load(Path(context.artifacts[ARTIFACT]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One output row for each input row; see the head of this file.

        Raises:
            DigSegError: an image that cannot be read, no class, or a class named twice, with its row; settings that
                make no sense.
        """
        options = {"background": False, "probabilities": False, "prediction": "{}", **(params or {})}
        predictor = self._predictor.with_settings(_settings(options["prediction"]))
        rows = [
            self._predict_row(predictor, f"row {number}", row.image, row.classes, options)
            for number, row in enumerate(model_input.itertuples(index=False))
        ]
        return pd.DataFrame(rows)

    @staticmethod
    def _predict_row(
        predictor: Predictor, where: str, image: bytes | str, classes: str, options: dict[str, Any]
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


mlflow.models.set_model(DigSegModel())
