"""Prediction with an exported model: any image size, any class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from digseg.config import ObjectiveConfig, PredictionConfig
from digseg.config.schema import BACKGROUND
from digseg.errors import DigSegError
from digseg.evaluation.classes import ClassQuery, background_of, check_classes, ids_type
from digseg.evaluation.passes import ANCHOR, Pass, merge_passes, plan_passes
from digseg.evaluation.pixels import ArrayPixels, Pixels
from digseg.evaluation.windows import blended
from digseg.model import SegmenterOutput
from digseg.model.attention import use_attention
from digseg.model.card import ModelCard
from digseg.model.export import LoadedModel, load_model
from digseg.model.sampling import Sampling, sample_logits

_PASSES_AT_ONCE = 8  # at most, through the U-Net; fewer where they have many classes
_SAMPLING_STEPS = 10  # of a model of the multi-step objective, unless the settings say
_MAX_ASPECT = 16  # an image longer than this many times its short side is brought to that many times the working size


@dataclass(frozen=True, slots=True)
class Prediction:
    """The segmentation of one image at its own resolution."""

    mask: NDArray[np.uint8 | np.uint16]  # [H, W], index into classes; 16 bits above 255 classes
    probabilities: NDArray[np.float32]  # [K, H, W], sum to 1 over K; calibrated if the model was
    classes: tuple[str, ...]


class Predictor:
    """Segments images with a loaded model; deterministic."""

    def __init__(self, model: LoadedModel, device: str = "cpu", settings: PredictionConfig | None = None) -> None:
        """Raises:
        DigSegError: settings that the model cannot follow.
        """
        self._model = model
        self._settings = settings or PredictionConfig()
        self._short_side = self._settings.short_side or model.card.short_side
        if (self._settings.classes_per_pass or 1) >= model.card.max_classes:
            raise DigSegError(
                f"classes_per_pass is {self._settings.classes_per_pass}, but a pass of this model holds "
                f"{model.card.max_classes} classes, the background included; use {model.card.max_classes - 1} or fewer"
            )
        self._sampling = _sampling(self._settings, model.card.objective)
        self._device = torch.device(device)
        self._segmenter = model.segmenter.to(self._device)
        use_attention(self._segmenter.unet, "auto", self._device)
        self._embedded: dict[tuple[tuple[str, ...], ...], Tensor] = {}

    @classmethod
    def load(cls, directory: Path, device: str = "cpu", settings: PredictionConfig | None = None) -> Predictor:
        """Load an exported model directory."""
        return cls(load_model(directory), device, settings)

    def for_corpus(self, name: str) -> Predictor:
        """The same model at the working size that it was trained with on a corpus, unless the settings name one."""
        side = self._settings.short_side or self.card.corpus_short_sides.get(name)
        return self.with_settings(self._settings.model_copy(update={"short_side": side}))

    def with_settings(self, settings: PredictionConfig) -> Predictor:
        """The same model, asked in another way."""
        return Predictor(self._model, str(self._device), settings)

    @property
    def settings(self) -> PredictionConfig:
        """How the model is asked."""
        return self._settings

    @property
    def sampling(self) -> Sampling | None:
        """How masks are sampled; None: the model answers in one deterministic step."""
        return self._sampling

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device

    @property
    def card(self) -> ModelCard:
        """What the model says of itself."""
        return self._model.card

    def predict(
        self, image: NDArray[np.uint8], classes: Sequence[str | ClassQuery], background: bool = False
    ) -> Prediction:
        """Segment ``image [H, W, 3]`` (RGB) into ``classes``.

        Args:
            image: uint8 RGB of any size.
            classes: names in any wording, any number of them.
            background: put a ``background`` class first if none of the names is it.

        Raises:
            DigSegError: no class, an empty or repeated name, or not an RGB image.
        """
        queries = check_classes(classes, background)
        pixels = ArrayPixels(image)
        mask = np.empty(image.shape[:2], ids_type(len(queries)))
        probabilities = np.empty((len(queries), *image.shape[:2]), np.float32)
        for place, slab in self._slabs(pixels, queries):
            mask[place] = _ids(slab)
            probabilities[:, *place] = tempered(slab, self.card.temperature).cpu().numpy()
        return Prediction(mask, probabilities, tuple(query.name for query in queries))

    def predict_mask(
        self,
        pixels: Pixels,
        classes: Sequence[str | ClassQuery],
        mask: NDArray[np.uint8 | np.uint16],
        tell: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Segment an image of any size, window by window, into ``mask [H, W]``, which may be a file mapped to memory.

        The mask is that of :meth:`predict`. Its type is that of :func:`digseg.evaluation.classes.ids_type`.

        Args:
            tell: called after each window with the share of the image that is done.

        Raises:
            DigSegError: as :meth:`predict` says, or a damaged image.
        """
        queries = check_classes(classes)
        done = 0
        for place, slab in self._slabs(pixels, queries):
            mask[place] = _ids(slab)
            done += slab[0].numel()
            tell(done / mask.size)

    def passes(self, queries: Sequence[ClassQuery]) -> tuple[Pass, ...]:
        """The passes that an image takes through the U-Net for these classes."""
        settings, background = self._settings, background_of(queries)
        return plan_passes(len(queries), background, self.card.max_classes, settings.classes_per_pass)

    @torch.inference_mode()
    def round_trip(self, mask: NDArray[np.integer], num_classes: int) -> NDArray[np.int64]:
        """What is left of a perfect mask [H, W] (every pixel a class) after the way to the model's working size,
        through its autoencoder as a painted picture, and back."""
        height, width = mask.shape
        ids = torch.from_numpy(mask.astype(np.int64)).to(self._device)
        areas = F.interpolate(_one_hot(ids, num_classes), self._working_size(height, width), mode="area")
        small = areas.argmax(1)[0]
        decoded = torch.zeros_like(small)
        for asked in plan_passes(num_classes, None, self.card.max_classes, self._settings.classes_per_pass):
            numbers = torch.tensor(asked, device=self._device)
            slots = torch.zeros(num_classes, dtype=torch.long, device=self._device)  # what is not asked: the anchor
            slots[numbers[numbers != ANCHOR]] = torch.arange(len(asked), device=self._device)[numbers != ANCHOR]
            said = numbers[self._repainted(slots[small], len(asked))]
            decoded = torch.where(said == ANCHOR, decoded, said)
        posterior = F.interpolate(_one_hot(decoded, num_classes), (height, width), mode="bilinear", align_corners=False)
        return posterior.argmax(1)[0].cpu().numpy()

    def _repainted(self, slots: Tensor, num_slots: int) -> Tensor:
        """Slots [H, W] of a pass after their way through the autoencoder as a painted picture."""
        height, width = slots.shape
        multiple = self._segmenter.size_multiple
        colours = self._model.colours(num_slots).to(self._device)
        painted = colours[slots].permute(2, 0, 1).unsqueeze(0)
        padded = F.pad(painted, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        autoencoder = self._segmenter.autoencoder
        decoded = autoencoder.decode(autoencoder.encode(padded))[0, :, :height, :width]
        return torch.cdist(decoded.flatten(1).T, colours).argmin(1).reshape(slots.shape)

    def _slabs(self, pixels: Pixels, queries: tuple[ClassQuery, ...]) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """The image in rectangles (rows, columns) with their probabilities ``[K, h, w]``."""

        def answer(top: int, left: int, height: int, width: int) -> Tensor:
            return self._probabilities(pixels.read(top, left, height, width), queries)

        window = self._settings.window or max(pixels.height, pixels.width)
        for top, left, slab in blended(pixels.height, pixels.width, window, self._settings.overlap, answer):
            yield (slice(top, top + slab.shape[1]), slice(left, left + slab.shape[2])), slab

    @torch.inference_mode()
    def _probabilities(self, image: NDArray[np.uint8], queries: tuple[ClassQuery, ...]) -> Tensor:
        """Of one window, taken as an image of its own: ``[K, H, W]``."""
        height, width = image.shape[:2]
        pixels = torch.from_numpy(np.require(image, requirements=("C", "W"))).to(self._device)
        pixels = pixels.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1.0
        scaled = F.interpolate(
            pixels, self._working_size(height, width), mode="bilinear", antialias=True, align_corners=False
        )
        posterior = self._logits(scaled, queries).softmax(0).unsqueeze(0)
        # Back to the image's own grid before the arg max: labels cannot be interpolated, scores can.
        return F.interpolate(posterior, (height, width), mode="bilinear", align_corners=False)[0]

    def _working_size(self, height: int, width: int) -> tuple[int, int]:
        scale = self._short_side * min(1 / min(height, width), _MAX_ASPECT / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _logits(self, pixels: Tensor, queries: tuple[ClassQuery, ...]) -> Tensor:
        """``pixels [1, 3, H, W]`` -> float32 logits ``[K, H, W]``, from as many passes as the classes need."""
        height, width = pixels.shape[-2:]
        multiple = self._segmenter.size_multiple
        padded = F.pad(pixels, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        latents = self._segmenter.autoencoder.encode(padded)
        passes = self.passes(queries)
        scores: list[Tensor] = []
        at_once = min(_PASSES_AT_ONCE, max(1, self.card.max_classes // len(passes[0])))
        for first in range(0, len(passes), at_once):
            batch = passes[first : first + at_once]
            logits = self._pass_logits(padded, latents, batch, queries)[..., :height, :width]
            scores += [logits[number, : len(asked)] for number, asked in enumerate(batch)]
        return merge_passes(scores, passes, len(queries))

    def _pass_logits(
        self, pixels: Tensor, latents: Tensor, passes: Sequence[Pass], queries: tuple[ClassQuery, ...]
    ) -> Tensor:
        """Logits ``[P, K, H, W]`` of P passes over one image, K the slots of the largest."""
        anchor = ClassQuery(BACKGROUND)
        asked = [[anchor if number == ANCHOR else queries[number] for number in numbers] for numbers in passes]
        text = pad_sequence([self._embed(classes) for classes in asked], batch_first=True)
        num_passes, slots = text.shape[:2]
        sizes = torch.tensor([len(classes) for classes in asked], device=self._device)
        inputs = {
            "images": pixels.expand(num_passes, -1, -1, -1),
            "text": text,
            "mask": torch.arange(slots, device=self._device) < sizes[:, None],
            "colours": self._model.colours(slots).to(self._device).expand(num_passes, -1, -1),
            "latents": latents.expand(num_passes, -1, -1, -1),
        }
        if self._sampling is not None:
            return sample_logits(self._segmenter, **inputs, how=self._sampling)
        output: SegmenterOutput = self._segmenter(**inputs)
        return output.logits

    def _embed(self, queries: Sequence[ClassQuery]) -> Tensor:
        templates = self._settings.templates
        classes = tuple(
            tuple(template.replace("{}", wording) for wording in query.wordings for template in templates)
            for query in queries
        )
        if classes not in self._embedded:
            self._embedded[classes] = self._model.embed(classes).to(self._device)
        return self._embedded[classes]


def _sampling(settings: PredictionConfig, objective: ObjectiveConfig) -> Sampling | None:
    """How masks are sampled; None: the model answers in one deterministic step."""
    if objective.type == "multi_step":
        steps = settings.steps or _SAMPLING_STEPS
        return Sampling(objective.diffusion, steps, settings.seed, settings.ensemble)
    if (settings.steps or 1) > 1 or settings.ensemble > 1 or settings.seed:
        raise DigSegError(
            "steps, seed and ensemble are for models of the multi-step objective (objective.type: multi_step); this "
            "one answers in one deterministic step"
        )
    return None


def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    """``softmax(log p / T)`` over the first dimension; see :mod:`digseg.evaluation.temperature`."""
    if temperature == 1.0:
        return probabilities
    smallest = torch.finfo(probabilities.dtype).tiny
    return (probabilities.clamp_min(smallest).log() / temperature).softmax(0)


def _ids(probabilities: Tensor) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = probabilities.argmax(0).cpu().numpy()
    return ids


def _one_hot(ids: Tensor, num_classes: int) -> Tensor:
    """float32 [1, K, H, W] of ids [H, W]."""
    return F.one_hot(ids, num_classes).permute(2, 0, 1).unsqueeze(0).float()
