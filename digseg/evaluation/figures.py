"""From tallies to the figures of a report: plain JSON values, None where a figure does not exist."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from digseg.data.format import Manifest
from digseg.evaluation.bootstrap import interval, resampled
from digseg.evaluation.boundary import contour_f1
from digseg.evaluation.calibration import Reliability
from digseg.evaluation.metrics import (
    PREDICTED,
    TRUTH,
    ConfusionMatrix,
    Counts,
    Figures,
    class_accuracy,
    class_dice,
    class_iou,
    frequency_weighted_iou,
    harmonic_mean,
    mean_accuracy,
    mean_dice,
    mean_iou,
    mean_of_known,
    pixel_accuracy,
)
from digseg.evaluation.tally import Tally

# Figures of a corpus that come with a confidence interval.
_RESAMPLED: Mapping[str, Callable[[Counts], Figures]] = {
    "miou": mean_iou,
    "pixel_accuracy": pixel_accuracy,
    "mean_accuracy": mean_accuracy,
    "frequency_weighted_iou": frequency_weighted_iou,
    "mean_dice": mean_dice,
}


def corpus_figures(manifest: Manifest, tally: Tally, trained_names: Collection[str]) -> dict[str, Any]:
    """The figures of a split.

    Args:
        trained_names: class names that the model was trained on; the others of the vocabulary are *unseen*.

    Returns:
        `miou`, `frequency_weighted_iou`, `mean_accuracy`, `pixel_accuracy`, `mean_dice`, `boundary_iou`,
        `boundary_f1`, `calibration_error`; `interval` of the first five ([low, high], 95 %); `classes` with the
        IoU and `per_class` with all figures of each class; `confusion` (rows: ground truth); `reliability`; and
        `seen_unseen` (mIoU of either part of the vocabulary and their harmonic mean) where both occur.
    """
    totals = _totals(tally)
    bands, contours = class_iou(tally.band), contour_f1(tally.contour)
    diagram = Reliability.of(tally.reliability)
    lowered = {name.lower() for name in trained_names}
    seen = np.array([name.lower() in lowered for name in manifest.vocabulary])
    return {
        "split": manifest.split,
        "domain": manifest.domain,
        "samples": tally.images.num_images,
        "digest": manifest.digest,
        **{name: _number(statistic(totals)) for name, statistic in _RESAMPLED.items()},
        "boundary_iou": _number(mean_of_known(bands)),
        "boundary_f1": _number(mean_of_known(contours)),
        "calibration_error": _number(diagram.expected_error()),
        "interval": {
            name: [_number(end) for end in interval(_draws(manifest.corpus, tally, statistic))]
            for name, statistic in _RESAMPLED.items()
        },
        "classes": dict(zip(manifest.vocabulary, map(_number, class_iou(totals)), strict=True)),
        "per_class": _per_class(manifest.vocabulary, totals, bands, contours, seen),
        "seen_unseen": _seen_unseen(class_iou(totals), seen),
        "confusion": tally.confusion.tolist(),
        "reliability": [
            {"share": _number(share), "accuracy": _number(accuracy), "confidence": _number(confidence)}
            for share, accuracy, confidence in zip(diagram.share, diagram.accuracy, diagram.confidence, strict=True)
        ],
    }


def class_figure(tally: Tally, number: int) -> float | None:
    """The IoU of one class."""
    return _number(class_iou(_totals(tally))[number])


def mean_figures(tallies: Mapping[str, Tally], corpora: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of the corpora's mIoU and its interval."""
    known = [corpus["miou"] for corpus in corpora.values() if corpus["miou"] is not None]
    return {
        "mean_iou": sum(known) / len(known) if known else None,
        "interval": [_number(end) for end in interval(mean_draws(tallies))],
    }


def compared(first: Mapping[str, Tally], second: Mapping[str, Tally]) -> dict[str, Any]:
    """mIoU of the second model minus that of the first, on each corpus and in the mean: `difference`, its
    `interval` (95 %, paired: both models get the same draws of images) and `better`, the share of draws in which the
    second is ahead (equal draws count half).

    Raises:
        ValueError: the models were not evaluated on the same images.
    """
    pairs = paired_differences(first, second)
    mean = sum(difference for difference, _ in pairs.values()) / len(pairs)
    return {
        "corpora": {name: _difference(*pair) for name, pair in pairs.items()},
        "mean": _difference(mean, mean_draws(second) - mean_draws(first)),
    }


def paired_differences(first: Mapping[str, Tally], second: Mapping[str, Tally]) -> dict[str, tuple[float, Figures]]:
    """For each corpus mIoU of the second model minus that of the first, and the same of resampled images.

    Raises:
        ValueError: the models were not evaluated on the same images.
    """
    if {name: tally.images.num_images for name, tally in first.items()} != {
        name: tally.images.num_images for name, tally in second.items()
    }:
        raise ValueError("the models were evaluated on different images")
    return {
        name: (
            float(mean_iou(_totals(second[name])) - mean_iou(_totals(tally))),
            _draws(name, second[name], mean_iou) - _draws(name, tally, mean_iou),
        )
        for name, tally in first.items()
    }


def mean_draws(tallies: Mapping[str, Tally]) -> Figures:
    """Resampled means of the corpora's mIoU."""
    draws = [_draws(name, tally, mean_iou) for name, tally in tallies.items()]
    return sum(draws[1:], draws[0]) / len(draws)


def _draws(name: str, tally: Tally, statistic: Callable[[Counts], Figures]) -> Figures:
    """Resampled figures of a split. The corpus' name is the seed, so that corpora are drawn independently of each
    other and every model gets the same draws."""
    seed = (zlib.crc32(name.partition("/")[0].encode()),)
    return resampled(tally.images, tally.num_classes, statistic, seed=seed)


def _difference(whole: float, draws: Figures) -> dict[str, Any]:
    better = float(np.mean(draws > 0) + np.mean(draws == 0) / 2)
    return {"difference": _number(whole), "interval": [_number(end) for end in interval(draws)], "better": better}


def _totals(tally: Tally) -> Counts:
    return ConfusionMatrix(tally.num_classes, tally.confusion).totals()


def _per_class(
    vocabulary: tuple[str, ...], totals: Counts, bands: Figures, contours: Figures, seen: np.ndarray[Any, Any]
) -> dict[str, dict[str, Any]]:
    columns = {
        "iou": class_iou(totals),
        "dice": class_dice(totals),
        "accuracy": class_accuracy(totals),
        "boundary_iou": bands,
        "boundary_f1": contours,
    }
    return {
        name: {
            **{column: _number(values[number]) for column, values in columns.items()},
            "pixels": int(totals[number, TRUTH]),
            "predicted_pixels": int(totals[number, PREDICTED]),
            "seen": bool(seen[number]),
        }
        for number, name in enumerate(vocabulary)
    }


def _seen_unseen(iou: Figures, seen: np.ndarray[Any, Any]) -> dict[str, float] | None:
    """mIoU of the names trained on, of those that were not, and their harmonic mean (Xian et al. 2019, equation 5);
    None unless classes of both kinds occur."""
    known, new = mean_of_known(iou[seen]), mean_of_known(iou[~seen])
    if np.isnan(known) or np.isnan(new):
        return None
    return {"seen": float(known), "unseen": float(new), "harmonic_mean": harmonic_mean(float(known), float(new))}


def _number(value: float | Figures) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number
