"""A model on samples of a split: predictions at original resolution, streamed into tallies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from digseg.data.corpus import Sample, ShardedCorpus
from digseg.errors import DigSegError, nearest
from digseg.evaluation.tally import Tally

if TYPE_CHECKING:  # takes seconds to import
    from digseg.evaluation.inference import Prediction


class Segments(Protocol):
    """Anything that predicts as `digseg.evaluation.inference.Predictor` does."""

    def predict(self, image: NDArray[np.uint8], classes: Sequence[str], background: bool = False) -> Prediction: ...


@dataclass(frozen=True)
class Question:
    """What is asked of the images of a split: all names of its vocabulary, in its order, in some wording.

    An `oracle` tells the model more than anybody could know: only the names of classes that the ground truth of the
    image at hand holds. Its figures are no measure of a model, only of what choosing the classes costs it.
    """

    names: tuple[str, ...]
    oracle: bool = False


def count_samples(predictor: Segments, corpus: ShardedCorpus, samples: Iterable[int], question: Question) -> Tally:
    """The tally of the given samples, in their order.

    Raises:
        DigSegError: a wording that does not name every class of the vocabulary, or a damaged sample.
    """
    manifest = corpus.manifest
    num_classes = len(manifest.vocabulary)
    if len(question.names) != num_classes:
        raise DigSegError(
            f"{manifest.corpus}/{manifest.split} has {num_classes} classes, but "
            f"{len(question.names)} names were given for them: {', '.join(question.names)}"
        )
    return Tally.joined(
        (
            Tally.of_image(sample.mask, *answer(predictor, sample, question), num_classes, manifest.ignore_id)
            for sample in map(corpus.must_read, samples)
        ),
        num_classes,
    )


def answer(predictor: Segments, sample: Sample, question: Question) -> tuple[NDArray[np.integer], NDArray[np.float32]]:
    """The predicted class ids [H, W] of a sample and their probabilities [H, W]."""
    if not question.oracle:
        prediction = predictor.predict(sample.image, question.names)
        return prediction.mask, prediction.probabilities.max(axis=0)
    present = np.flatnonzero(np.bincount(sample.mask.ravel(), minlength=len(question.names))[: len(question.names)])
    if not present.size:  # nothing is labelled, so nothing will be counted
        return np.zeros_like(sample.mask), np.zeros(sample.mask.shape, np.float32)
    prediction = predictor.predict(sample.image, [question.names[number] for number in present])
    return present[prediction.mask], prediction.probabilities.max(axis=0)


def renamed(vocabulary: Sequence[str], name: str, wording: str) -> tuple[str, ...]:
    """The vocabulary with one class in another wording.

    Raises:
        DigSegError: the vocabulary has no such class, or already has the wording.
    """
    if name not in vocabulary:
        raise DigSegError(f"synonyms: there is no class {name!r}{nearest(name, vocabulary)}")
    if wording in vocabulary and wording != name:
        raise DigSegError(f"synonyms: {wording!r}, a wording of {name!r}, is itself a class of the corpus")
    return tuple(wording if other == name else other for other in vocabulary)
