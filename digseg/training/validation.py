"""How good the averaged weights are while training goes on: mIoU on a few fixed samples, and pictures of some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from digseg.config import Config
from digseg.config.schema import ValidationConfig
from digseg.data.corpus import CorruptSampleError, Sample, ShardedCorpus
from digseg.evaluation.classes import ids_type
from digseg.evaluation.inference import Predictor
from digseg.evaluation.metrics import ConfusionMatrix
from digseg.evaluation.picture import PictureRow
from digseg.evaluation.pixels import ArrayPixels
from digseg.model.export import LoadedModel
from digseg.model.segmenter import segmenter_shapes
from digseg.model.text import TextEncoder
from digseg.training.world import World

_STREAM = 4  # of the run's seed


@dataclass(frozen=True, slots=True)
class Validated:
    """``figures`` are the same on every rank: ``val/miou``, the mean over corpora, and ``val/miou/<corpus>``; a corpus
    without a labelled pixel has none. ``rows`` are rank 0's, to be drawn. ``unreadable`` says of samples that this
    rank left out why, by key."""

    figures: dict[str, float]
    rows: Sequence[PictureRow]
    unreadable: Mapping[str, str]


class Validation:
    """Predicts the fixed samples of ``evaluation.corpora`` as an evaluation does. Collective.

    Each rank takes every N-th sample, one at a time, and whole numbers are summed: with the same weights the figures
    are the same in every world. Weights are held only while :meth:`run` runs.

    Args:
        model: what is validated; its weights do not count.

    Raises:
        DigSegError: shards are missing or damaged.
    """

    def __init__(self, config: Config, world: World, model: LoadedModel) -> None:
        self._world = world
        self._splits = _splits(config)
        trained = model.segmenter
        segmenter = segmenter_shapes(config.model, model.text_encoder.dim, trained.autoencoder, trained.scheduler)
        segmenter.eval().requires_grad_(False)
        self._model = replace(model, segmenter=segmenter, text_encoder=_RememberedNames(model.text_encoder))

    def run(self, weights: Mapping[str, Tensor]) -> Validated:
        """Validate a segmenter's ``weights`` (its whole state, on every rank)."""
        segmenter = self._model.segmenter
        segmenter.load_state_dict(weights, assign=True)
        predictor = Predictor(self._model, str(self._world.device))
        unreadable: dict[str, str] = {}
        matrices, rows = [], []
        for split in self._splits:
            matrix, drawn = self._counted(split, predictor.for_corpus(split.corpus.manifest.corpus), unreadable)
            matrices.append(matrix)
            rows += drawn
        segmenter.to("meta")
        figures = {f"val/miou/{s.name}": m.mean_iou() for s, m in zip(self._splits, matrices, strict=True)}
        known = {name: figure for name, figure in figures.items() if not np.isnan(figure)}
        mean = {"val/miou": sum(known.values()) / len(known)} if known else {}
        return Validated({**mean, **known}, rows, unreadable)

    def _counted(
        self, split: _Split, predictor: Predictor, unreadable: dict[str, str]
    ) -> tuple[ConfusionMatrix, list[PictureRow]]:
        """The counts of all ranks, and the rows to draw in their order."""
        manifest = split.corpus.manifest
        matrix = ConfusionMatrix(len(manifest.vocabulary), ignore_id=manifest.ignore_id)
        own: dict[int, PictureRow] = {}
        for place, sample in self._part(split, unreadable):
            prediction = np.empty(sample.mask.shape, ids_type(len(manifest.vocabulary)))
            predictor.predict_mask(ArrayPixels(sample.image), manifest.vocabulary, prediction)
            matrix.update(sample.mask, prediction)
            if place < split.pictures:
                own[place] = PictureRow(split.name, sample.image, sample.mask, prediction, manifest.vocabulary)
        counts = self._world.sum(torch.from_numpy(matrix.counts).to(self._world.device)).cpu().numpy()
        rows = {place: row for part in self._world.gather(own) for place, row in part.items()}
        return ConfusionMatrix(matrix.num_classes, counts), [rows[place] for place in sorted(rows)]

    def _part(self, split: _Split, unreadable: dict[str, str]) -> Iterator[tuple[int, Sample]]:
        """This rank's samples, with their places in the split's list."""
        for place in range(self._world.rank, len(split.samples), self._world.world_size):
            try:
                yield place, split.corpus.read(split.samples[place])
            except CorruptSampleError as error:
                unreadable[f"{split.corpus.name}/{error.key}"] = str(error)


@dataclass(frozen=True, slots=True)
class _Split:
    """What is validated of a split; ``name`` is that of its corpus where only one split of it is."""

    name: str
    corpus: ShardedCorpus
    samples: list[int]
    pictures: int


def _splits(config: Config) -> list[_Split]:
    asked, settings = config.evaluation.corpora, config.training.validation
    several = len({entry.name for entry in asked}) < len(asked)
    splits = []
    for entry in asked:
        corpus = ShardedCorpus(config.data.root, entry.name, entry.split)
        name = corpus.name if several else entry.name
        samples = _fixed(len(corpus), settings, config.run.seed)
        splits.append(_Split(name, corpus, samples, settings.pictures))
    return splits


def _fixed(size: int, settings: ValidationConfig, seed: int) -> list[int]:
    """Numbers of the samples to validate on, of ``size``, in a random order."""
    order = np.random.default_rng([seed, _STREAM]).permutation(size)
    return [int(number) for number in order[: settings.samples]]


class _RememberedNames:
    """The embeddings that an encoder gave, so that each name is encoded once a run."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.dim, self.fingerprint, self.modules = encoder.dim, encoder.fingerprint, encoder.modules
        self._encoder = encoder
        self._embeddings: dict[str, Tensor] = {}

    def encode(self, names: Sequence[str]) -> Tensor:
        new = [name for name in dict.fromkeys(names) if name not in self._embeddings]
        if new:
            self._embeddings.update(zip(new, self._encoder.encode(new), strict=True))
        return torch.stack([self._embeddings[name] for name in names])
