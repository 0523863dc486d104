"""The ablation's baseline: a plain U-Net with one 1 x 1 head for each corpus. It is told the corpus and reads no text.

Its U-Net, its sub-pixel convolution and its refinement at full resolution are those of the segmenter, and so are the
balanced cross-entropy, the samples with their augmentation, the optimizer, the schedule and the average of the weights.
Instead of class names, the U-Net cross-attends to one learned token of the corpus, and the head scores a class by a
learned vector of its own: a new corpus takes a new token and a new head, and training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from digseg.config import Config
from digseg.console import progress
from digseg.data.loader import Batch, training_batches
from digseg.data.training_data import TrainingData
from digseg.errors import DigSegError
from digseg.evaluation.inference import Predictor
from digseg.model.attention import use_attention
from digseg.model.autoencoder import build_autoencoder
from digseg.model.denoiser import build_scheduler, build_unet
from digseg.model.export import LoadedModel, model_card
from digseg.model.pathway import Pathway
from digseg.model.segmenter import Segmenter
from digseg.model.text import TextTable
from digseg.model.training_module import SegmenterLoss
from digseg.training.ema import WeightAverage
from digseg.training.engine import Engine
from digseg.training.run import RunDirectory
from digseg.training.schedule import learning_rate
from digseg.training.shares import gather_shares
from digseg.training.world import World

# Without text there is nothing to feed back, no colour to paint, and no part of a vocabulary to ask for.
SETTINGS = {"objective.feedback": 0, "objective.reconstruction": 0, "data.queries.sub_vocabulary_p": 0}
# The same with what helps the segmenter and needs no text: heads at its coarser scales, which are supervised as there,
# and filters that are as long as its queries to begin with.
TUNED = {**SETTINGS, "objective.feedback": 0.5}


class ClassRows:
    """The classes of all corpora in one table: each class of each corpus has a row of its own.

    A row takes the place of a class name's embedding: as a unit vector.
    """

    def __init__(self, vocabularies: Mapping[str, Sequence[str]]) -> None:
        self.corpora = list(vocabularies)
        self.names = [(corpus, name) for corpus, names in vocabularies.items() for name in names]
        self.corpus_of = torch.tensor([self.corpora.index(corpus) for corpus, _ in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def row(self, corpus: str, name: str) -> int:
        """The row of a class of a corpus; -1 if it has no such class."""
        return self.names.index((corpus, name)) if (corpus, name) in self.names else -1


class _ToldCorpus:
    """Stands where a model has its text encoder: names are classes of this corpus and mean nothing else."""

    fingerprint = "none: told the corpus"

    def __init__(self, rows: ClassRows, corpus: str) -> None:
        self.dim, self.modules = len(rows), dict[str, Any]()
        self._rows, self._corpus = rows, corpus

    def encode(self, names: Sequence[str]) -> Tensor:
        rows = [self._rows.row(self._corpus, name) for name in names]
        if -1 in rows:
            raise DigSegError(f"the baseline knows no class {names[rows.index(-1)]!r} of {self._corpus}")
        return torch.eye(self.dim)[rows]


class _CorpusToken(nn.Module):
    """The token of the corpus that a query's classes are of, once for each of them, which attention takes as one."""

    def __init__(self, rows: ClassRows, token_dim: int) -> None:
        super().__init__()
        self.register_buffer("corpus_of", rows.corpus_of, persistent=False)
        self.tokens = nn.Embedding(len(rows.corpora), token_dim)

    def forward(self, text: Tensor, colours: Tensor) -> Tensor:
        """Unit vectors ``text [B, K, R]`` -> ``[B, K, T]``."""
        tokens: Tensor = self.tokens(self.corpus_of[text.argmax(-1)])
        return tokens


class _Rows(nn.Module):
    """Unit vectors back to row numbers."""

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """``text [B, K, R]`` -> int64 ``[B, K]``."""
        return text.argmax(-1)


class _Heads(nn.Module):
    """The 1 x 1 convolutions of all corpora, of which a row is the filter of one class.

    ``length`` is that of a filter to begin with; None: as PyTorch starts a convolution.
    """

    def __init__(self, rows: ClassRows, channels: int, length: float | None) -> None:
        super().__init__()
        self.filters = nn.Linear(channels, len(rows))
        if length is not None:
            with torch.no_grad():
                self.filters.weight.copy_(length * F.normalize(self.filters.weight, dim=1))

    def forward(self, features: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """``features [B, C, H, W]``, ``rows [B, K]`` -> float32 logits ``[B, K, H, W]``."""
        weight, bias = self.filters.weight[rows], self.filters.bias[rows]
        scores = torch.einsum("bchw,bkc->bkhw", features, weight.to(features.dtype)).float() + bias[..., None, None]
        masked: Tensor = scores.masked_fill(~mask[:, :, None, None], -1e4)
        return masked


def plain_unet(config: Config, rows: ClassRows) -> Segmenter:
    """A new baseline, in the place of a segmenter; its U-Net starts with the weights of the segmenter's.

    ``objective.feedback`` tells :data:`TUNED` from :data:`SETTINGS`.
    """
    autoencoder, settings = build_autoencoder(config.model.autoencoder), config.model.pathway
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        unet = build_unet(config.model, autoencoder.channels)
        token_dim = int(unet.config.cross_attention_dim)
        tuned = config.objective.feedback > 0
        length = math.exp(settings.query_scale) if tuned else None
        pathway: Pathway = Pathway(
            text_dim=len(rows),
            token_dim=token_dim,
            channels=list(unet.config.block_out_channels)[: settings.scales + 1 if tuned else 1],
            factor=autoencoder.factor,
            groups=int(unet.config.norm_num_groups),
            enabled=True,
            feedback=False,
            dim=settings.dim,
            head_dim=settings.head_dim,
            query_layers=0,
            query_scale=settings.query_scale,
            gate=0.0,
        )
        pathway.tokens, pathway.queries = _CorpusToken(rows, token_dim), _Rows()
        pathway.head.align = _Heads(rows, settings.head_dim + 3, length)
        for scale in pathway.scales:
            scale.align = _Heads(rows, settings.dim, length)
    return Segmenter(unet, pathway, autoencoder, build_scheduler(config.model))


class _PlainLoss(SegmenterLoss):
    """The segmenter's loss on rows instead of names."""

    row_of: Tensor  # int64 [corpora, names]

    def __init__(self, segmenter: Segmenter, config: Config, rows: ClassRows, names: Sequence[str]) -> None:
        super().__init__(segmenter, config, torch.eye(len(rows)))
        self._corpora = rows.corpora
        table = torch.tensor([[rows.row(corpus, name) for name in names] for corpus in rows.corpora])
        self.register_buffer("row_of", table, persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        corpora = torch.tensor([self._corpora.index(key.partition("/")[0]) for key in batch.keys])
        asked = self.row_of[corpora].gather(1, batch.query_ids.clamp(min=0))
        return super().forward(replace(batch, query_ids=asked.masked_fill(batch.query_ids < 0, -1)))


class PlainModel:
    """A trained baseline, which predicts as any model once it is told the corpus."""

    def __init__(self, config: Config, segmenter: Segmenter, rows: ClassRows) -> None:
        self._segmenter, self._rows = segmenter.eval().requires_grad_(False), rows
        table = TextTable(tuple(name for _, name in rows.names), torch.eye(len(rows)), torch.zeros(len(rows)))
        self._card = model_card(config, table, _ToldCorpus.fingerprint, {})

    def for_corpus(self, name: str) -> Predictor:
        """The predictor of a corpus."""
        model = LoadedModel(self._segmenter, self._card, _ToldCorpus(self._rows, name))
        return Predictor(model).for_corpus(name)


def trained(config: Config) -> PlainModel:
    """Train a baseline as ``config`` says, with :data:`SETTINGS` or :data:`TUNED`; or take the weights of the run that
    did so before.

    Unlike the trainer's runs, one that is interrupted begins anew.
    """
    data = TrainingData(config.data, config.run.seed)
    rows = ClassRows({manifest.corpus: manifest.vocabulary for manifest in data.manifests})
    segmenter = plain_unet(config, rows)
    weights = RunDirectory(config).path / "weights.pt"
    if not weights.exists():
        state = _trained(config, data, segmenter, rows)
        weights.parent.mkdir(parents=True, exist_ok=True)
        partial = weights.with_suffix(".tmp")
        torch.save(state, partial)
        partial.replace(weights)
    segmenter.load_state_dict(torch.load(weights, weights_only=True))
    return PlainModel(config, segmenter, rows)


def _trained(config: Config, data: TrainingData, segmenter: Segmenter, rows: ClassRows) -> dict[str, Tensor]:
    """The state of the segmenter, its weights averaged."""
    world = World()
    torch.set_num_threads(config.training.threads or torch.get_num_threads())
    use_attention(segmenter.unet, config.model.attention, world.device)
    engine = Engine(_PlainLoss(segmenter, config, rows, data.names), config, world)
    average = WeightAverage(engine.shares(), config.training.ema.decay)
    for step, batch in enumerate(_batches(config, data)):
        engine.forward_backward(batch.to(world.device))
        engine.step(learning_rate(step, config.training))
        average.update(engine.shares())
    engine.close()
    averaged = gather_shares(average.shares, world)
    return segmenter.state_dict() | {name.removeprefix("segmenter."): value for name, value in averaged.items()}


def _batches(config: Config, data: TrainingData) -> Iterator[Batch]:
    with progress(config.run.name, config.training.steps, "steps", 0, shown=True) as bar:
        for batch in training_batches(data, config, 0, 1, 0, config.training.steps):
            yield batch
            bar.advance()
