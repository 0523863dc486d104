"""Prediction with an exported model: any image size, any class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from digseg.errors import DigSegError
from digseg.model import SegmenterOutput
from digseg.model.export import LoadedModel, ModelCard, load_model

BACKGROUND = "background"


@dataclass(frozen=True, slots=True)
class Prediction:
    """The segmentation of one image at its own resolution."""

    mask: NDArray[np.uint8]  # [H, W], index into classes
    probabilities: NDArray[np.float32]  # [K, H, W], sum to 1 over K
    classes: tuple[str, ...]


class Predictor:
    """Segments images with a loaded model; deterministic."""

    def __init__(self, model: LoadedModel, device: str = "cpu") -> None:
        self._model = model
        self._device = torch.device(device)
        self._segmenter = model.segmenter.to(self._device)
        self._embedded: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Predictor:
        """Load an exported model directory."""
        return cls(load_model(directory), device)

    @property
    def card(self) -> ModelCard:
        """What the model says of itself."""
        return self._model.card

    def predict(self, image: NDArray[np.uint8], classes: Sequence[str], background: bool = False) -> Prediction:
        """Segment ``image [H, W, 3]`` (RGB) into ``classes``.

        Args:
            image: uint8 RGB of any size.
            classes: names in any wording.
            background: put a ``background`` class first if none of the names is it.

        Raises:
            DigSegError: no class, an empty or repeated name, more than a pass can hold, or not an RGB image.
        """
        names = check_classes(classes, background, self.card.max_classes)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise DigSegError(f"expected an RGB image, uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        probabilities = self._probabilities(image, names)
        return Prediction(
            mask=probabilities.argmax(0).to(torch.uint8).cpu().numpy(),
            probabilities=probabilities.cpu().numpy(),
            classes=names,
        )

    @torch.inference_mode()
    def _probabilities(self, image: NDArray[np.uint8], names: tuple[str, ...]) -> Tensor:
        height, width = image.shape[:2]
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(self._device)
        pixels = pixels.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1.0
        scaled = F.interpolate(
            pixels, self._working_size(height, width), mode="bilinear", antialias=True, align_corners=False
        )
        logits = self._logits(scaled, names)
        # Back to the image's own grid before the arg max: labels cannot be interpolated, scores can.
        posterior = F.interpolate(logits.softmax(1), (height, width), mode="bilinear", align_corners=False)
        return posterior[0]

    def _working_size(self, height: int, width: int) -> tuple[int, int]:
        scale = self.card.short_side / min(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _logits(self, pixels: Tensor, names: tuple[str, ...]) -> Tensor:
        height, width = pixels.shape[-2:]
        multiple = self._segmenter.size_multiple
        padded = F.pad(pixels, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        text = self._embed(names).unsqueeze(0)
        mask = torch.ones(1, len(names), dtype=torch.bool, device=self._device)
        colours = self._model.colours(len(names)).to(self._device).unsqueeze(0)
        output: SegmenterOutput = self._segmenter(padded, text, mask, colours)
        return output.logits[..., :height, :width]

    def _embed(self, names: tuple[str, ...]) -> Tensor:
        if names not in self._embedded:
            self._embedded[names] = self._model.embed(names).to(self._device)
        return self._embedded[names]


def check_classes(classes: Sequence[str], background: bool, max_classes: int) -> tuple[str, ...]:
    """The cleaned class names of a query.

    Raises:
        DigSegError: as :meth:`Predictor.predict` says.
    """
    names = tuple(" ".join(name.split()) for name in classes)
    if not names:
        raise DigSegError('no classes given; name at least one, e.g. --classes "road, car, sky"')
    if "" in names:
        raise DigSegError(f"class {names.index('') + 1} of {len(names)} is an empty name; remove it")
    lowered = [name.lower() for name in names]
    repeated = sorted({name for name in lowered if lowered.count(name) > 1})
    if repeated:
        raise DigSegError(f"class names given twice: {', '.join(repeated)}; name each class once")
    if background and BACKGROUND not in lowered:
        names = (BACKGROUND, *names)
    if len(names) > max_classes:
        raise DigSegError(f"{len(names)} classes, but one query of this model holds {max_classes}; ask for fewer")
    return names
