"""The report of an evaluation as one HTML page: tables with intervals, classes, confusions, calibration, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from digseg import __version__
from digseg.console import progress
from digseg.data.corpus import Sample, ShardedCorpus
from digseg.evaluation.colours import class_colours, paint
from digseg.evaluation.evaluate import Question, answer
from digseg.evaluation.inference import Predictor
from digseg.evaluation.metrics import ConfusionMatrix, mean_iou
from digseg.evaluation.page import data_uri, render
from digseg.evaluation.protocol import AskedSplit
from digseg.evaluation.tally import Tally
from digseg.model.card import ModelCard
from digseg.model.sampling import Sampling

_TILE_PX = 360  # longer side of an example
_CEILING_SAMPLES = 16
_MATRIX_CLASSES = 24  # above this many, the greatest confusions are listed instead
_LISTED_CONFUSIONS = 20


@dataclass(frozen=True)
class ReportedModel:
    """A model with its evaluation; `result` has `model` and `data` beside what `evaluate_models` gives."""

    predictor: Predictor
    result: Mapping[str, Any]
    tallies: Mapping[str, Tally]


def report_page(
    models: Sequence[ReportedModel],
    splits: Mapping[str, AskedSplit],
    comparisons: Sequence[Mapping[str, Any]],
    data_root: str,
) -> str:
    """HTML that refers to nothing outside itself.

    Of each model and corpus the images with the highest, the median and the lowest mIoU are predicted once more and
    shown; the ceiling is what the model's working size and autoencoder leave of a perfect mask.

    Args:
        splits: the name of each corpus in the results -> the split.
        comparisons: of the models after the first with it, see `digseg.evaluation.figures.compared`.
    """
    with progress("drawing the report", len(models) * len(splits), unit="corpora") as bar:
        corpora = []
        for name, split in splits.items():
            corpus = ShardedCorpus(data_root, split.manifest.corpus, split.manifest.split)
            views = []
            for model in models:
                views.append(_model_view(model, name, corpus, split.questions[0]))
                bar.advance()
            corpora.append(_corpus_view(name, split, views))
    return render(
        "report.html.j2",
        models=[_facts(model) for model in models],
        corpora=corpora,
        comparisons=[_comparison(comparison) for comparison in comparisons],
        protocol=models[0].result["protocol"],
        oracle=models[0].result["oracle"],
        images=sum(split.manifest.samples for split in splits.values()),
        data_root=data_root,
        version=__version__,
    )


def mask_ceiling(predictor: Predictor, corpus: ShardedCorpus, samples: int = _CEILING_SAMPLES) -> float:
    """mIoU of perfect masks after the way through the model's working size and its autoencoder and back, over some
    evenly spaced samples: what no prediction of the model can exceed by much."""
    manifest = corpus.manifest
    matrix = ConfusionMatrix(len(manifest.vocabulary), ignore_id=manifest.ignore_id)
    for sample in corpus.evenly(samples):
        known = np.where(sample.mask == manifest.ignore_id, 0, sample.mask)
        matrix.update(sample.mask, predictor.round_trip(known, len(manifest.vocabulary)))
    return matrix.mean_iou()


def _facts(model: ReportedModel) -> dict[str, Any]:
    card, settings, result = model.predictor.card, model.predictor.settings, model.result
    return {
        "uri": result["model"]["uri"],
        "mean_iou": result["mean_iou"],
        "interval": result["interval"],
        "facts": {
            "version": result["model"]["uri"],
            "files": f"sha256 {result['model']['sha256']}",
            "MLflow run": result["model"]["run_id"] or "-",
            "training steps": card.metadata.get("step", "-"),
            "seed": card.metadata.get("seed", "-"),
            "trained on": ", ".join(card.metadata.get("datasets", {})) or "-",
            "denoising steps": _steps(model.predictor.sampling),
            "temperature": f"{card.temperature:.3g}",
            "working size": _working_size(card, settings.short_side),
            "prompt templates": "; ".join(settings.templates) + " ({} is the class name)",
            "classes of a pass": settings.classes_per_pass or f"up to {card.max_classes}",
            "windows": f"{settings.window} px, overlap {settings.overlap:.0%}" if settings.window else "none",
            "text encoder": card.text_fingerprint,
            "classes trained on": ", ".join(card.names),
        },
    }


def _steps(how: Sampling | None) -> str:
    if how is None:
        return "1 (one pass at the final timestep)"
    drawn = f"mean of {how.ensemble} draws, seeds from {how.seed} on" if how.ensemble > 1 else f"seed {how.seed}"
    return f"{how.steps} (DDIM, {drawn})"


def _working_size(card: ModelCard, chosen: int | None) -> str:
    by_corpus = {} if chosen else card.corpus_short_sides
    named = [
        f"{chosen or card.short_side} px, shorter side",
        *(f"{name} {side} px" for name, side in by_corpus.items()),
    ]
    return "; ".join(named)


def _model_view(model: ReportedModel, name: str, corpus: ShardedCorpus, question: Question) -> dict[str, Any]:
    predictor, tally = model.predictor.for_corpus(corpus.manifest.corpus), model.tallies[name]
    figures = model.result["corpora"][name]
    return {
        "uri": model.result["model"]["uri"],
        "figures": figures,
        "ceiling": mask_ceiling(predictor, corpus),
        "synonyms": model.result["synonyms"].get(name, {}),
        "confusion": _confusion(tally.confusion, corpus.manifest.vocabulary),
        "bins": [bin_ for bin_ in figures["reliability"] if bin_["accuracy"] is not None],
        "examples": [
            _example(title, score, corpus.must_read(number), predictor, question, corpus)
            for title, number, score in _extremes(tally)
        ],
    }


def _corpus_view(name: str, split: AskedSplit, views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    manifest = split.manifest
    colours = [f"rgb({red}, {green}, {blue})" for red, green, blue in class_colours(manifest.vocabulary)]
    return {
        "name": name,
        "split": manifest.split,
        "domain": manifest.domain.replace("_", " "),
        "samples": manifest.samples,
        "digest": manifest.digest,
        "licence": manifest.licence,
        "classes": list(zip(manifest.vocabulary, colours, strict=True)),
        "models": views,
    }


def _comparison(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """With the ends of each interval on an axis that holds all of them (percent of its width, 50 is no difference)."""
    rows = {**comparison["corpora"], "mean": comparison["mean"]}
    ends = [abs(end) for row in rows.values() for end in row["interval"] if end is not None]
    reach = max([*ends, 0.01])
    places = {
        name: [50 + 50 * (value or 0) / reach for value in (row["interval"][0], row["difference"], row["interval"][1])]
        for name, row in rows.items()
    }
    return {**comparison, "rows": rows, "places": places, "reach": reach}


def _confusion(counts: NDArray[np.int64], vocabulary: Sequence[str]) -> dict[str, Any]:
    """Shares of each true class, as a matrix, or as a list of the greatest confusions of large vocabularies."""
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    if len(vocabulary) <= _MATRIX_CLASSES:
        return {"matrix": shares.tolist(), "listed": None}
    wrong = shares * (1 - np.eye(len(vocabulary)))
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:_LISTED_CONFUSIONS]
    places = [divmod(int(place), len(vocabulary)) for place in order]
    listed = [(vocabulary[true], vocabulary[taken], float(wrong[true, taken])) for true, taken in places]
    return {"matrix": None, "listed": [row for row in listed if row[2] > 0]}


def _extremes(tally: Tally) -> list[tuple[str, int, float]]:
    """(title, number, mIoU) of the images with the highest, the median and the lowest mIoU; of images without a
    labelled pixel none."""
    scores = tally.images.per_image(tally.num_classes, mean_iou)
    known = np.flatnonzero(~np.isnan(scores))
    order = known[np.argsort(scores[known], kind="stable")][::-1]
    chosen = {"best": 0, "median": len(order) // 2, "worst": len(order) - 1} if len(order) else {}
    return [(title, int(order[place]), float(scores[order[place]])) for title, place in chosen.items()]


def _example(
    title: str, score: float, sample: Sample, predictor: Predictor, question: Question, corpus: ShardedCorpus
) -> dict[str, Any]:
    manifest = corpus.manifest
    mask, _ = answer(predictor, sample, question)
    height, width = sample.mask.shape
    # Painted small: every pixel of the tile is one of the mask, so that no colour is mixed.
    step = max(1, -(-max(height, width) // _TILE_PX))
    truth, predicted = (
        paint(ids[::step, ::step], manifest.vocabulary, manifest.ignore_id) for ids in (sample.mask, mask)
    )
    small = sample.image[::step, ::step]
    overlay = (0.45 * small + 0.55 * predicted).round().astype(np.uint8)
    present = {*np.unique(sample.mask).tolist(), *np.unique(mask).tolist()}
    return {
        "title": title,
        "score": score,
        "key": sample.key,
        "size": f"{width} x {height}",
        "present": sorted(present - {manifest.ignore_id}),
        "ignored": manifest.ignore_id in present,
        "image": data_uri(sample.image, "JPEG", _TILE_PX),
        "truth": data_uri(truth, "PNG", _TILE_PX),
        "prediction": data_uri(predicted, "PNG", _TILE_PX),
        "overlay": data_uri(overlay, "JPEG", _TILE_PX),
    }
