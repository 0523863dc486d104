"""Evaluation as Ray tasks: chunks of each split are counted wherever there is room, and the counts are
added."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from digseg.cluster.runtime import ray_session
from digseg.cluster.tasks import fan_out
from digseg.config.schema import ClusterConfig
from digseg.data.corpus import ShardedCorpus
from digseg.errors import DigSegError, nearest
from digseg.evaluation.evaluate import corpus_result, count_samples, renamed
from digseg.evaluation.inference import Predictor
from digseg.evaluation.metrics import ConfusionMatrix
from digseg.model.export import read_card
from digseg.registry.lineage import directory_digest

_CHUNK = 8  # samples of a task


def evaluate_model(
    model_dir: Path,
    data_root: str | Path,
    corpora: Sequence[tuple[str, str]],
    synonyms: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    *,
    cluster: ClusterConfig | None = None,
    num_gpus: float = 0,
) -> dict[str, Any]:
    """Evaluate an exported model on splits of sharded corpora, at original resolution with full vocabularies.

    The counts are whole numbers added over all samples, so the result does not depend on the number of
    workers. The model's files travel through Ray's object store: only the shards must be reachable from every
    node.

    Args:
        corpora: (corpus, split) pairs.
        synonyms: corpus -> class -> wordings; the corpus is evaluated again with that one class renamed.
        num_gpus: share of a GPU that each task gets; 0 predicts on CPUs.

    Returns:
        `{"mean_iou", "corpora": {name: {"split", "miou", "pixel_accuracy", "samples", "digest", "classes":
        {class: IoU}}}, "synonyms": {name: {class: {wording: IoU}}}}`. The name is `corpus/split` where
        several splits of one corpus are evaluated. IoU is None for a class in neither ground truth nor
        prediction; `mean_iou` is the mean of the corpora's mIoU.

    Raises:
        DigSegError: nothing to evaluate, no such shards, damaged shards, no exported model in `model_dir`, or
        a
            synonym of a class or corpus that is not there.
    """
    if not corpora:
        raise DigSegError("no corpus to evaluate was named")
    read_card(model_dir)
    splits = [_Split.opened(str(data_root), name, split, synonyms or {}) for name, split in corpora]
    _check_synonyms(synonyms or {}, splits)
    with ray_session(cluster):
        model = _Model(directory_digest(model_dir), ray.put(_packed(model_dir)))
        chunks = [
            _Chunk(model, number, split.root, split.corpus, split.split, start, split.wordings, num_gpus > 0)
            for number, split in enumerate(splits)
            for start in range(0, split.samples, _CHUNK)
        ]
        totals = [[ConfusionMatrix(split.num_classes) for _ in split.wordings] for split in splits]
        counted = fan_out(_count, chunks, "evaluating", num_gpus=num_gpus, unit=f"chunks of {_CHUNK} images")
        for chunk, matrices in zip(chunks, counted, strict=True):
            for total, counts in zip(totals[chunk.number], matrices, strict=True):
                total.merge(ConfusionMatrix(total.num_classes, counts))
    return _report(splits, totals)


@dataclass(frozen=True)
class _Split:
    root: str
    corpus: str
    split: str
    samples: int
    vocabulary: tuple[str, ...]
    digest: str
    # The vocabulary as it is, then once for each renamed class: ((class, wording), names).
    renamings: tuple[tuple[str, str], ...]

    @classmethod
    def opened(cls, root: str, name: str, split: str, synonyms: Mapping[str, Mapping[str, Sequence[str]]]) -> _Split:
        corpus = ShardedCorpus(root, name, split)
        wordings = synonyms.get(name, {})
        return cls(
            root=root,
            corpus=name,
            split=split,
            samples=len(corpus),
            vocabulary=corpus.manifest.vocabulary,
            digest=corpus.manifest.digest,
            renamings=tuple((label, wording) for label, others in wordings.items() for wording in others),
        )

    @property
    def num_classes(self) -> int:
        return len(self.vocabulary)

    @property
    def wordings(self) -> tuple[tuple[str, ...], ...]:
        others = (tuple(renamed(self.vocabulary, label, wording)) for label, wording in self.renamings)
        return (self.vocabulary, *others)


@dataclass(frozen=True)
class _Model:
    """The files of a model in the object store; models are the same if their files are."""

    digest: str
    files: Any = field(compare=False)


@dataclass(frozen=True)
class _Chunk:
    """What one task counts: samples from `start` on, under each wording."""

    model: _Model
    number: int
    root: str
    corpus: str
    split: str
    start: int
    wordings: tuple[tuple[str, ...], ...]
    on_gpu: bool


def _count(chunk: _Chunk) -> list[NDArray[np.int64]]:
    predictor = _predictor(chunk.model, "cuda" if chunk.on_gpu and torch.cuda.is_available() else "cpu")
    corpus = ShardedCorpus(chunk.root, chunk.corpus, chunk.split)
    samples = range(chunk.start, min(chunk.start + _CHUNK, len(corpus)))
    return [
        matrix.counts
        for matrix in count_samples(predictor.for_corpus(corpus.manifest.corpus), corpus, samples, chunk.wordings)
    ]


@lru_cache(maxsize=1)
def _predictor(model: _Model, device: str) -> Predictor:
    """The model, loaded once by a worker process, however many evaluations it serves."""
    with tempfile.TemporaryDirectory(prefix="digseg-model-") as folder:
        for name, content in ray.get(model.files).items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return Predictor.load(Path(folder), device)


def _packed(model_dir: Path) -> dict[str, bytes]:
    files = sorted(path for path in model_dir.rglob("*") if path.is_file())
    return {path.relative_to(model_dir).as_posix(): path.read_bytes() for path in files}


def _check_synonyms(synonyms: Mapping[str, Mapping[str, Sequence[str]]], splits: Sequence[_Split]) -> None:
    names = {split.corpus for split in splits}
    for corpus in synonyms:
        if corpus not in names:
            raise DigSegError(f"synonyms: corpus {corpus!r} is not among those evaluated{nearest(corpus, names)}")
    for split in splits:
        _ = split.wordings  # raises for a class that is not there


def _report(splits: Sequence[_Split], totals: Sequence[Sequence[ConfusionMatrix]]) -> dict[str, Any]:
    corpora: dict[str, Any] = {}
    synonyms: dict[str, dict[str, dict[str, float | None]]] = {}
    several = len({split.corpus for split in splits}) < len(splits)
    for split, (matrix, *renamed_matrices) in zip(splits, totals, strict=True):
        name = f"{split.corpus}/{split.split}" if several else split.corpus
        result = corpus_result(ShardedCorpus(split.root, split.corpus, split.split), matrix, split.samples)
        corpora[name] = {
            "split": split.split,
            "miou": result.miou,
            "pixel_accuracy": result.pixel_accuracy,
            "samples": split.samples,
            "digest": split.digest,
            "classes": result.classes,
        }
        for (label, wording), other in zip(split.renamings, renamed_matrices, strict=True):
            iou = other.iou()[split.vocabulary.index(label)]
            wordings = synonyms.setdefault(name, {}).setdefault(label, {})
            wordings[wording] = None if np.isnan(iou) else float(iou)
    mean = float(np.mean([corpus["miou"] for corpus in corpora.values()]))
    return {"mean_iou": mean, "corpora": corpora, "synonyms": synonyms}
