"""Making a model as sure as it is right: one temperature for all of its scores.

The calibrated probabilities are softmax(log p / T), of the probabilities p at an image's own size (Guo et al. 2017,
arXiv 1706.04599, section 4.2). A temperature above 1 makes a model less sure; the most probable class stays what it is.
T is that of the least negative log-likelihood over labelled pixels of images that the model was not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from digseg.data.corpus import Sample, ShardedCorpus
from digseg.errors import DigSegError
from digseg.evaluation.calibration import Reliability, reliability_counts
from digseg.evaluation.inference import Predictor
from digseg.model.card import write_card
from digseg.model.export import load_model

_BOUNDS = (0.05, 20.0)
_FLOOR = 1e-12  # least probability, so that its logarithm is finite
_IGNORE = -1


@dataclass(frozen=True)
class ScoredPixels:
    """Some labelled pixels of one corpus: log-probabilities ``[N, K]`` and class numbers ``[N]``."""

    log_probabilities: NDArray[np.float64]
    labels: NDArray[np.int64]

    def negative_log_likelihood(self, temperature: float) -> float:
        """Mean over the pixels."""
        scores = log_softmax(self.log_probabilities / temperature, axis=1)
        return float(-np.take_along_axis(scores, self.labels[:, None], axis=1).mean())

    def expected_error(self, temperature: float) -> float:
        """Expected calibration error, see `digseg.evaluation.calibration`."""
        probabilities = np.exp(log_softmax(self.log_probabilities / temperature, axis=1))
        said, sure = probabilities.argmax(1), probabilities.max(1).astype(np.float32)
        return Reliability.of(reliability_counts(self.labels, said, sure, _IGNORE)).expected_error()


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does on images that it was not fitted on: means over the corpora, (before, after)."""

    temperature: float
    negative_log_likelihood: tuple[float, float]
    calibration_error: tuple[float, float]
    images: int  # fitted on
    corpora: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, for the model's card."""
        return {
            "temperature": self.temperature,
            "negative_log_likelihood": list(self.negative_log_likelihood),
            "calibration_error": list(self.calibration_error),
            "images": self.images,
            "corpora": list(self.corpora),
        }


def fit_temperature(corpora: Sequence[ScoredPixels]) -> float:
    """The temperature of the least mean negative log-likelihood; corpora count alike, whatever their pixels.

    The likelihood has one maximum in 1 / T, so a bounded search over log T finds it.
    """

    def loss(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        return float(np.mean([pixels.negative_log_likelihood(temperature) for pixels in corpora]))

    found = minimize_scalar(loss, bounds=np.log(_BOUNDS), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


def score_pixels(
    predictor: Predictor, samples: Sequence[Sample], names: Sequence[str], ignore_id: int, per_image: int
) -> ScoredPixels:
    """Up to `per_image` labelled pixels of each sample, drawn evenly, under the vocabulary `names`."""
    scores, labels = [np.empty((0, len(names)))], [np.empty(0, np.int64)]
    for sample in samples:
        labelled = np.flatnonzero(sample.mask != ignore_id)
        chosen = labelled[np.linspace(0, len(labelled) - 1, min(per_image, len(labelled))).round().astype(np.int64)]
        probabilities = predictor.predict(sample.image, names).probabilities.reshape(len(names), -1)[:, chosen]
        scores.append(np.log(np.maximum(probabilities.T.astype(np.float64), _FLOOR)))
        labels.append(sample.mask.ravel()[chosen].astype(np.int64))
    return ScoredPixels(np.concatenate(scores), np.concatenate(labels))


def calibrate(
    predictor: Predictor, corpora: Sequence[ShardedCorpus], images: int = 16, per_image: int = 4000
) -> Calibration:
    """Fit the temperature of a model that has none, on every other one of `images` evenly spaced images of each corpus;
    the rest say what it does. A corpus of a single image serves both ways.

    Raises:
        DigSegError: nothing is labelled in them.
    """
    fitted, measured, used = [], [], 0
    for corpus in corpora:
        manifest = corpus.manifest
        samples = list(corpus.evenly(images))
        asked = predictor.for_corpus(manifest.corpus)
        halves = [samples[::2], samples[1::2] or samples]
        first, second = (
            score_pixels(asked, half, manifest.vocabulary, manifest.ignore_id, per_image) for half in halves
        )
        if not (len(first.labels) and len(second.labels)):
            raise DigSegError(f"{manifest.corpus}/{manifest.split}: no labelled pixel to calibrate on")
        fitted.append(first)
        measured.append(second)
        used += len(halves[0])
    temperature = fit_temperature(fitted)
    before_and_after = (1.0, temperature)
    likelihoods = [np.mean([part.negative_log_likelihood(t) for part in measured]) for t in before_and_after]
    errors = [np.mean([part.expected_error(t) for part in measured]) for t in before_and_after]
    return Calibration(
        temperature=temperature,
        negative_log_likelihood=(float(likelihoods[0]), float(likelihoods[1])),
        calibration_error=(float(errors[0]), float(errors[1])),
        images=used,
        corpora=tuple(corpus.manifest.corpus for corpus in corpora),
    )


def calibrate_model(directory: Path, corpora: Sequence[ShardedCorpus]) -> Calibration:
    """Fit the temperature of an exported model and write it into its card, in place of an earlier one.

    Raises:
        DigSegError: no exported model, no corpus, damaged shards, or no labelled pixel.
    """
    if not corpora:
        raise DigSegError("no corpus to calibrate on was named")
    model = load_model(directory)
    plain = replace(model, card=replace(model.card, temperature=1.0))
    found = calibrate(Predictor(plain), corpora)
    metadata = {**model.card.metadata, "calibration": found.as_json()}
    write_card(directory, replace(model.card, temperature=found.temperature, metadata=metadata))
    return found
