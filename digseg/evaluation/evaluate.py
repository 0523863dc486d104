"""A model on a sharded split: predictions streamed into one confusion matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from digseg.data.corpus import CorruptSampleError, ShardedCorpus
from digseg.errors import DigSegError, nearest
from digseg.evaluation.inference import Prediction
from digseg.evaluation.metrics import ConfusionMatrix


class Segments(Protocol):
    """Anything that predicts as `digseg.evaluation.inference.Predictor` does."""

    def predict(self, image: NDArray[np.uint8], classes: Sequence[str], background: bool = False) -> Prediction: ...


@dataclass(frozen=True)
class CorpusResult:
    """Figures of one split. IoU is None for a class that occurs neither in ground truth nor prediction; the
    mean leaves it out."""

    name: str
    split: str
    miou: float
    pixel_accuracy: float
    classes: dict[str, float | None]
    samples: int


def evaluate_corpus(
    predictor: Segments,
    corpus: ShardedCorpus,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
) -> CorpusResult:
    """Evaluate a split at its images' own resolution, every image queried with the whole vocabulary.

    Args:
        classes: other wordings of the vocabulary, in its order.
        limit: stop after so many samples (from the start).
    """
    samples = range(len(corpus) if limit is None else min(limit, len(corpus)))
    matrix = count_samples(predictor, corpus, samples, [classes or corpus.manifest.vocabulary])[0]
    return corpus_result(corpus, matrix, len(samples))


def count_samples(
    predictor: Segments,
    corpus: ShardedCorpus,
    samples: Iterable[int],
    wordings: Sequence[Sequence[str]],
) -> list[ConfusionMatrix]:
    """One confusion matrix for each wording of the vocabulary, over the given samples; each is read once.

    Raises:
        DigSegError: a wording that does not name every class of the vocabulary, or a damaged sample.
    """
    manifest = corpus.manifest
    for wording in wordings:
        if len(wording) != len(manifest.vocabulary):
            raise DigSegError(
                f"{manifest.corpus}/{manifest.split} has {len(manifest.vocabulary)} classes, but "
                f"{len(wording)} names were given for them: {', '.join(wording)}"
            )
    matrices = [ConfusionMatrix(len(wording), ignore_id=manifest.ignore_id) for wording in wordings]
    for index in samples:
        try:
            sample = corpus.read(index)
        except CorruptSampleError as error:
            raise DigSegError(f"{error}; run data_prep/shard.py again to mend it") from error
        for wording, matrix in zip(wordings, matrices, strict=True):
            matrix.update(sample.mask, predictor.predict(sample.image, wording).mask)
    return matrices


def corpus_result(corpus: ShardedCorpus, matrix: ConfusionMatrix, samples: int) -> CorpusResult:
    """The figures of a finished confusion matrix, under the corpus' own class names."""
    manifest = corpus.manifest
    iou = [None if np.isnan(value) else float(value) for value in matrix.iou()]
    return CorpusResult(
        name=manifest.corpus,
        split=manifest.split,
        miou=matrix.mean_iou(),
        pixel_accuracy=matrix.pixel_accuracy(),
        classes=dict(zip(manifest.vocabulary, iou, strict=True)),
        samples=samples,
    )


def renamed(vocabulary: Sequence[str], name: str, wording: str) -> list[str]:
    """The vocabulary with one class in another wording.

    Raises:
        DigSegError: the vocabulary has no such class, or already has the wording.
    """
    if name not in vocabulary:
        raise DigSegError(f"synonyms: there is no class {name!r}{nearest(name, vocabulary)}")
    if wording in vocabulary and wording != name:
        raise DigSegError(f"synonyms: {wording!r}, a wording of {name!r}, is itself a class of the corpus")
    return [wording if other == name else other for other in vocabulary]
