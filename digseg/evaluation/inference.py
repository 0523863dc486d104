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
from digseg.evaluation.classes import check_classes
from digseg.model import SegmenterOutput
from digseg.model.export import LoadedModel, ModelCard, load_model


@dataclass(frozen=True, slots=True)
class Prediction:
    """The segmentation of one image at its own resolution."""

    mask: NDArray[np.uint8]  # [H, W], index into classes
    probabilities: NDArray[np.float32]  # [K, H, W], sum to 1 over K
    classes: tuple[str, ...]


class Predictor:
    """Segments images with a loaded model; deterministic."""

    def __init__(self, model: LoadedModel, device: str = "cpu", short_side: int | None = None) -> None:
        """Args:
        short_side: length in pixels that the shorter side of an image is brought to; None: the model's own.
        """
        self._model = model
        self._short_side = short_side or model.card.short_side
        self._device = torch.device(device)
        self._segmenter = model.segmenter.to(self._device)
        self._embedded: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def load(cls, directory: Path, device: str = "cpu", short_side: int | None = None) -> Predictor:
        """Load an exported model directory."""
        return cls(load_model(directory), device, short_side)

    def for_corpus(self, name: str) -> Predictor:
        """The same model at the working size that it was trained with on a corpus; its default elsewhere."""
        return Predictor(self._model, str(self._device), self.card.corpus_short_sides.get(name))

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
    def round_trip(self, mask: NDArray[np.integer], num_classes: int) -> NDArray[np.int64]:
        """What is left of a perfect mask [H, W] (every pixel a class) after the way to the model's working size,
        through its autoencoder as a painted picture, and back."""
        height, width = mask.shape
        ids = torch.from_numpy(mask.astype(np.int64)).to(self._device)
        areas = F.interpolate(_one_hot(ids, num_classes), self._working_size(height, width), mode="area")
        small = areas.argmax(1)[0]
        multiple = self._segmenter.size_multiple
        colours = self._model.colours(num_classes).to(self._device)
        painted = colours[small].permute(2, 0, 1).unsqueeze(0)
        padded = F.pad(painted, (0, -small.shape[1] % multiple, 0, -small.shape[0] % multiple), mode="replicate")
        autoencoder = self._segmenter.autoencoder
        decoded = autoencoder.decode(autoencoder.encode(padded))[0, :, : small.shape[0], : small.shape[1]]
        nearest = torch.cdist(decoded.flatten(1).T, colours).argmin(1).reshape(small.shape)
        posterior = F.interpolate(_one_hot(nearest, num_classes), (height, width), mode="bilinear", align_corners=False)
        return posterior.argmax(1)[0].cpu().numpy()

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
        scale = self._short_side / min(height, width)
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


def _one_hot(ids: Tensor, num_classes: int) -> Tensor:
    """float32 [1, K, H, W] of ids [H, W]."""
    return F.one_hot(ids, num_classes).permute(2, 0, 1).unsqueeze(0).float()
