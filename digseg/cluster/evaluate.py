"""Evaluation as Ray tasks: pieces of each shard are counted wherever there is room, and the counts are added."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import ray
import torch

from digseg.cluster.runtime import ray_session
from digseg.cluster.tasks import fan_out
from digseg.config import PredictionConfig, Protocol
from digseg.config.schema import ClusterConfig
from digseg.console import say
from digseg.data.corpus import ShardedCorpus
from digseg.data.format import Manifest
from digseg.errors import DigSegError
from digseg.evaluation.evaluate import Question, count_samples
from digseg.evaluation.figures import class_figure, corpus_figures, mean_figures
from digseg.evaluation.inference import Predictor
from digseg.evaluation.protocol import AskedSplit, ask
from digseg.evaluation.stored import StoredTallies
from digseg.evaluation.tally import Tally
from digseg.model.card import ModelCard, read_card
from digseg.registry.lineage import directory_digest, mapping_digest, source_digest

_PIECE = 16  # samples of a task, at most: all of one shard


@dataclass(frozen=True)
class Evaluation:
    """One model's evaluation: the figures (plain JSON values) and what they were made from."""

    result: dict[str, Any]
    tallies: dict[str, Tally]  # name of the corpus in `result` -> counts under the vocabulary's own wording
    splits: dict[str, AskedSplit]


def evaluate_models(
    model_dirs: Sequence[Path],
    data_root: str | Path,
    corpora: Sequence[tuple[str, str]],
    protocol: Protocol | None = None,
    synonyms: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    *,
    prediction: PredictionConfig | None = None,
    oracle: bool = False,
    kept: StoredTallies | None = None,
    cluster: ClusterConfig | None = None,
    num_gpus: float = 0,
) -> list[Evaluation]:
    """Evaluate exported models on splits of sharded corpora, at original resolution with full vocabularies.

    The counts are whole numbers added over all samples, so the result does not depend on the number of workers. The
    models' files travel through Ray's object store: only the shards must be reachable from every node.

    Args:
        corpora: (corpus, split) pairs, of which the protocol may leave some out.
        synonyms: wordings beside the protocol's: corpus -> class -> wordings; the corpus is evaluated again with that
            one class renamed.
        prediction: how the models are asked; the result says so.
        oracle: ask each image only for the classes that are in its ground truth; the result says so.
        kept: where counts are kept as they come; what is there already is not done again.
        num_gpus: share of a GPU that each task gets; 0 predicts on CPUs.

    Returns:
        For each model, as `result`: `{"protocol", "oracle", "prediction", "mean_iou", "interval", "corpora": {name:
        see digseg.evaluation.figures.corpus_figures}, "synonyms": {name: {class: {wording: IoU}}}}`. The name is
        `corpus/split` where several splits of one corpus are evaluated. `mean_iou` is the mean of the corpora's mIoU.

    Raises:
        DigSegError: nothing to evaluate, no such shards, damaged shards, no exported model in a directory, or a
            synonym of a class or corpus that is not there.
    """
    if not corpora:
        raise DigSegError("no corpus to evaluate was named")
    protocol, prediction = protocol or Protocol(), prediction or PredictionConfig()
    cards = [read_card(directory) for directory in model_dirs]
    manifests = [ShardedCorpus(data_root, name, split).manifest for name, split in corpora]
    splits = ask(protocol, manifests, cards, synonyms, oracle)
    models = [_Model(directory_digest(path), path) for path in model_dirs]
    pieces = list(_pieces(models, str(data_root), splits, prediction, num_gpus > 0))
    tallies = {
        place: Tally.joined((tally for _, tally in group), len(splits[place[1]].manifest.vocabulary))
        for place, group in groupby(
            _counted(pieces, kept, cluster, num_gpus), key=lambda piece_and_tally: piece_and_tally[0].place
        )
    }
    asked = {"protocol": protocol.name, "oracle": oracle, "prediction": prediction.model_dump(mode="json")}
    return [_evaluation(asked, splits, tallies, number, card) for number, card in enumerate(cards)]


@dataclass(frozen=True)
class _Model:
    """An exported model; models are the same if their files are."""

    digest: str
    directory: Path = field(compare=False)


@dataclass(frozen=True)
class _Piece:
    """What a task counts: samples [start, stop) of a split, all of one shard, under one question to one model."""

    place: tuple[int, int, int]  # number of the model, of the split, of the question
    model: _Model
    question: Question
    prediction: PredictionConfig
    root: str
    corpus: str
    split: str
    start: int
    stop: int
    shard_sha256: str
    on_gpu: bool

    def key(self, code: str) -> str:
        """The digest of everything that decides the tally; `code` is that of the source."""
        return mapping_digest(
            {
                "code": code,
                "model": self.model.digest,
                "corpus": self.corpus,  # decides the working size
                "shard": self.shard_sha256,
                "samples": [self.start, self.stop],
                "names": list(self.question.names),
                "oracle": self.question.oracle,
                "prediction": self.prediction.model_dump(mode="json"),
                "device": "cuda" if self.on_gpu else "cpu",
            }
        )


def _pieces(
    models: Sequence[_Model], root: str, splits: Sequence[AskedSplit], prediction: PredictionConfig, on_gpu: bool
) -> Iterator[_Piece]:
    """In the order of models first: a worker then changes its model as seldom as possible."""
    for model_number, model in enumerate(models):
        for split_number, asked in enumerate(splits):
            for question_number, question in enumerate(asked.questions):
                for start, stop, sha256 in _ranges(asked.manifest):
                    yield _Piece(
                        place=(model_number, split_number, question_number),
                        model=model,
                        question=question,
                        prediction=prediction,
                        root=root,
                        corpus=asked.manifest.corpus,
                        split=asked.manifest.split,
                        start=start,
                        stop=stop,
                        shard_sha256=sha256,
                        on_gpu=on_gpu,
                    )


def _ranges(manifest: Manifest) -> Iterator[tuple[int, int, str]]:
    """(start, stop, sha256 of the shard) of the pieces of a split."""
    first = 0
    for shard in manifest.shards:
        for start in range(first, first + shard.samples, _PIECE):
            yield start, min(start + _PIECE, first + shard.samples), shard.sha256
        first += shard.samples


def _counted(
    pieces: Sequence[_Piece], kept: StoredTallies | None, cluster: ClusterConfig | None, num_gpus: float
) -> Iterator[tuple[_Piece, Tally]]:
    """Each piece, in order, with its tally: the kept one, or that of a task, which is kept as soon as it comes."""
    code = source_digest("data", "evaluation", "model")
    keys = {piece: piece.key(code) for piece in pieces}
    missing = [piece for piece in pieces if kept is None or kept.get(keys[piece]) is None]
    if len(missing) < len(pieces):
        say(f"{len(pieces) - len(missing)} of {len(pieces)} pieces were counted before")
    new = zip(missing, _run(missing, cluster, num_gpus) if missing else (), strict=True)
    waited_for = next(new, None)
    for piece in pieces:
        if waited_for is not None and waited_for[0] is piece:
            tally = waited_for[1]
            if kept is not None:
                kept.put(keys[piece], tally)
            waited_for = next(new, None)
        else:
            assert kept is not None  # otherwise it would be among the missing ones
            before = kept.get(keys[piece])
            if before is None:
                raise DigSegError(f"{kept.folder}: results were removed while they were in use; start again")
            tally = before
        yield piece, tally


def _run(pieces: Sequence[_Piece], cluster: ClusterConfig | None, num_gpus: float) -> Iterator[Tally]:
    """The tallies of the pieces, in order, from tasks."""
    with ray_session(cluster):
        models = {piece.model for piece in pieces}
        files = {model: _Files(model.digest, ray.put(_packed(model.directory))) for model in models}
        tasks = [(piece, files[piece.model]) for piece in pieces]
        yield from fan_out(_count, tasks, "evaluating", num_gpus=num_gpus, unit="pieces")


@dataclass(frozen=True)
class _Files:
    """A model's files in the object store, the same if their digest is."""

    digest: str
    reference: Any = field(compare=False)


def _count(task: tuple[_Piece, _Files]) -> Tally:
    piece, files = task
    predictor = _predictor(files, "cuda" if piece.on_gpu and torch.cuda.is_available() else "cpu")
    corpus = ShardedCorpus(piece.root, piece.corpus, piece.split)
    samples = range(piece.start, piece.stop)
    asked = predictor.with_settings(piece.prediction).for_corpus(piece.corpus)
    return count_samples(asked, corpus, samples, piece.question)


@lru_cache(maxsize=1)
def _predictor(files: _Files, device: str) -> Predictor:
    """The model, loaded once by a worker process, however many pieces it counts."""
    with tempfile.TemporaryDirectory(prefix="digseg-model-") as folder:
        for name, content in ray.get(files.reference).items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return Predictor.load(Path(folder), device)


def _packed(model_dir: Path) -> dict[str, bytes]:
    files = sorted(path for path in model_dir.rglob("*") if path.is_file())
    return {path.relative_to(model_dir).as_posix(): path.read_bytes() for path in files}


def _evaluation(
    asked: Mapping[str, Any],
    splits: Sequence[AskedSplit],
    tallies: Mapping[tuple[int, int, int], Tally],
    model_number: int,
    card: ModelCard,
) -> Evaluation:
    several = len({split.manifest.corpus for split in splits}) < len(splits)
    named = {split.name if several else split.manifest.corpus: split for split in splits}
    plain: dict[str, Tally] = {}
    corpora: dict[str, dict[str, Any]] = {}
    synonyms: dict[str, dict[str, dict[str, float | None]]] = {}
    for split_number, (name, split) in enumerate(named.items()):
        plain[name] = tallies[model_number, split_number, 0]
        corpora[name] = corpus_figures(split.manifest, plain[name], card.names)
        for question_number, (label, wording) in enumerate(split.renamings, start=1):
            tally, number = tallies[model_number, split_number, question_number], split.manifest.vocabulary.index(label)
            synonyms.setdefault(name, {}).setdefault(label, {})[wording] = class_figure(tally, number)
    result = {**asked, **mean_figures(plain, corpora)}
    return Evaluation({**result, "corpora": corpora, "synonyms": synonyms}, plain, named)
