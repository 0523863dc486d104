"""The registered model as MLflow loads it (a pyfunc logged *from code*: this file is the model).

    model = mlflow.pyfunc.load_model("models:/digseg@champion")
    table = model.predict(
        pandas.DataFrame({"image": [Path("street.jpg").read_bytes()], "classes": ["road, car, sky"]}),
        params={"background": True},
    )

Input columns
    image    the bytes of a PNG or JPEG file; in JSON (MLflow's scoring server) the same bytes in base64
    classes  class names, separated by commas
Parameters
    background     put a "background" class first if none of the names is it (default false)
    probabilities  give the probabilities too (default false)
Output columns
    mask_png       base64 of an 8-bit PNG of the image's size: indexes into `classes`
    classes        the class names, in the order of the mask's ids
    probabilities  only if asked for: base64 of a float16 .npy file [K, H, W]
"""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from digseg.errors import DigSegError
from digseg.evaluation.classes import split_classes
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
            DigSegError: an image that cannot be read, no class, or a class named twice, with its row.
        """
        options = {"background": False, "probabilities": False, **(params or {})}
        rows = [
            self._predict_row(f"row {number}", row.image, row.classes, options)
            for number, row in enumerate(model_input.itertuples(index=False))
        ]
        return pd.DataFrame(rows)

    def _predict_row(self, where: str, image: bytes | str, classes: str, options: dict[str, Any]) -> dict[str, Any]:
        pixels = decode_image(_content(image, where), where)
        try:
            prediction = self._predictor.predict(pixels, split_classes(classes), options["background"])
        except DigSegError as error:
            raise DigSegError(f"{where}: {error}") from None
        row = {"mask_png": _base64(png_bytes(prediction.mask)), "classes": list(prediction.classes)}
        if options["probabilities"]:
            buffer = io.BytesIO()
            np.save(buffer, prediction.probabilities.astype(np.float16))
            row["probabilities"] = _base64(buffer.getvalue())
        return row


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
