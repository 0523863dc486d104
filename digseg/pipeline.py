"""An exported model as a diffusers pipeline; needs torch, diffusers and transformers, and nothing of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from digseg.config import PredictionConfig
from digseg.errors import DigSegError
from digseg.evaluation.classes import ClassQuery
from digseg.evaluation.images import read_image, rgb_pixels
from digseg.evaluation.inference import Prediction, Predictor
from digseg.model.export import LoadedModel, load_model, save_model


class DiGSegPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Segments images into classes that are named in words.

    ::

        pipeline = DiGSegPipeline.from_pretrained("outputs/runs/demo/model")
        prediction = pipeline("street.jpg", ["background", "road", "car"])

    Predictions are those of :class:`digseg.evaluation.inference.Predictor`, in float32 on the pipeline's device.
    """

    _optional_components = ("vae", "text_encoder", "tokenizer")

    def __init__(
        self,
        unet: Any,
        pathway: Any,
        scheduler: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        model: LoadedModel | None = None,
    ) -> None:
        super().__init__()
        if model is None:
            raise DigSegError("a DiGSegPipeline is made by DiGSegPipeline.from_pretrained(FOLDER)")
        self.register_modules(
            unet=unet,
            pathway=pathway,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self._model = model
        self._predictor: Predictor | None = None  # the last one: it keeps the embeddings of the names it was asked

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path) -> DiGSegPipeline:
        """The pipeline of an exported model's directory.

        Raises:
            DigSegError: see :func:`digseg.model.export.load_model`.
        """
        model = load_model(Path(pretrained_model_name_or_path))
        return cls(**model.components, model=model)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the model again, as training wrote it.

        Raises:
            DigSegError: the folder is there, and neither empty nor an exported model.
        """
        save_model(Path(save_directory), self._model)

    def __call__(
        self,
        image: str | Path | Image.Image | NDArray[np.uint8],
        classes: Sequence[str | ClassQuery],
        background: bool = False,
        settings: PredictionConfig | None = None,
    ) -> Prediction:
        """Segment an image into ``classes``.

        Args:
            image: a file, a PIL image, or RGB pixels uint8 ``[H, W, 3]``.
            classes: names in any wording; a :class:`ClassQuery` has synonyms.
            background: put a ``background`` class first if none of the names is it.
            settings: how the model is asked (passes, templates, windows, ...).

        Raises:
            DigSegError: an image or names that cannot be used, see :meth:`Predictor.predict`; or the pipeline was
                moved to another type than float32.
        """
        if self.dtype != torch.float32:
            raise DigSegError(f"this pipeline predicts in float32, but was moved to {self.dtype}; load the model again")
        if isinstance(image, str | Path):
            pixels = read_image(Path(image))
        elif isinstance(image, Image.Image):
            pixels = rgb_pixels(image)
        else:
            pixels = image
        return self._asked(settings or PredictionConfig()).predict(pixels, classes, background)

    def _asked(self, settings: PredictionConfig) -> Predictor:
        last, device = self._predictor, self.device
        if last is None or last.device != device or last.settings != settings:
            self._predictor = last = Predictor(self._model, str(device), settings)
        return last
