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

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from digseg.registry.intact import ARTIFACT, check_package


class DigSegModel(PythonModel):  # type: ignore[misc]
    """Segments the images of a table, each into its own classes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the exported directory, if it and the code beside it are what was registered.

        Raises:
            DigSegError: a file that is not, by its name.
        """
        model_dir = Path(context.artifacts[ARTIFACT])
        check_package(model_dir.parents[1])

        from digseg.registry.table import TablePredictor  # code that is only now known to be the registered one

        self._predictor = TablePredictor(model_dir)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One output row for each input row; see the head of this file.

        Raises:
            DigSegError: an image that cannot be read, no class, or a class named twice, with its row; settings that
                make no sense.
        """
        options = {"background": False, "probabilities": False, "prediction": "{}", **(params or {})}
        return self._predictor.predict(model_input, options)


mlflow.models.set_model(DigSegModel())
