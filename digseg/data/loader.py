"""Training batches: the sample at a global position is a pure function of (seed, position).

Step s of any world consumes positions [s*B, (s+1)*B), rank r its contiguous slice of them. Nothing is
shuffled in a buffer and no worker has a state, so a run resumes from its step alone, with any number of
ranks or loader processes.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerContext

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from digseg.config.schema import Config, DataConfig
from digseg.data.corpus import CorruptSampleError, Sample, ShardedCorpus
from digseg.data.mixture import Mixture
from digseg.data.order import mix64, permuted_index
from digseg.data.queries import (
    Query,
    class_frequencies,
    class_weights,
    draw_query,
    name_table,
    query_vocabulary,
)
from digseg.data.transforms import TransformSettings, training_crop
from digseg.errors import DigSegError

_log = logging.getLogger(__name__)

# Independent random streams of one position: the query must not change with the image's size.
_ORDER, _QUERY, _CROP = range(3)


@dataclass(frozen=True)
class TrainingSample:
    """``image`` float32 [3, C, C] in [-1, 1]; ``labels`` uint8 [C, C], slots of the query, 255 ignored.

    ``corrupt`` names the samples that were due here but could not be read.
    """

    position: int
    key: str
    image: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    query: Query
    corrupt: tuple[str, ...]


@dataclass
class Batch:
    """B samples; K is the largest number of slots among their queries.

    images float32 [B, 3, H, W] in [-1, 1]; labels int64 [B, H, W], slot in the row's query, 255 = ignored;
    query_ids int64 [B, K] into the table of names, -1 where padded; colour_ids int64 [B, K] into the
    palette, 0 where padded; class_weights float32 [B, K], 1 where padded or foreign; positions int64 [B],
    always on the CPU; keys are ``corpus/split/key``; corrupt names samples that could not be read and were
    replaced.
    """

    images: torch.Tensor
    labels: torch.Tensor
    query_ids: torch.Tensor
    colour_ids: torch.Tensor
    class_weights: torch.Tensor
    positions: torch.Tensor
    keys: list[str]
    corrupt: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with all that the model reads on ``device``."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("images", "labels", "query_ids", "colour_ids", "class_weights")
        }
        return dataclasses.replace(self, **moved)

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive micro-batches of ``size`` samples, for accumulation; the last may be smaller."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(
                **{field.name: getattr(self, field.name)[part] for field in dataclasses.fields(self)[:-1]},
                corrupt=self.corrupt if start == 0 else [],
            )


class TrainingData:
    """The mixture of sharded corpora that a run trains on.

    Raises:
        DigSegError: shards are missing or damaged.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._corpora = [ShardedCorpus(config.root, entry.name, entry.split) for entry in config.corpora]
        self.manifests = tuple(corpus.manifest for corpus in self._corpora)
        self.names = name_table(self.manifests)
        self.class_frequency = tuple(class_frequencies(manifest) for manifest in self.manifests)
        self.mixture = Mixture(
            [len(corpus) for corpus in self._corpora], [entry.weight for entry in config.corpora], seed
        )
        self._vocabularies = [query_vocabulary(m, self.manifests, self.names) for m in self.manifests]
        self._transforms = [
            TransformSettings.of(config, entry, manifest.domain)
            for entry, manifest in zip(config.corpora, self.manifests, strict=True)
        ]
        self._cache = DecodedCache(config.decoded_cache_mb << 20)

    def sample(self, position: int) -> TrainingSample:
        """The sample at a global position: the same whoever asks, whenever.

        A sample that cannot be read is replaced by the next of its epoch's order.

        Raises:
            DigSegError: more than ``data.max_corrupt`` samples in a row cannot be read, or none of the
                corpus.
        """
        number, epoch, index = self.mixture.locate(position)
        sample, corrupt = self._read(number, epoch, index)
        query = draw_query(
            self._vocabularies[number],
            self.class_frequency[number],
            self._config.queries,
            self._rng(position, _QUERY),
        )
        image, labels = training_crop(
            sample.image, sample.mask, query.label_map, self._transforms[number], self._rng(position, _CROP)
        )
        return TrainingSample(position, self._name(number, sample.key), image, labels, query, corrupt)

    def _read(self, number: int, epoch: int, index: int) -> tuple[Sample, tuple[str, ...]]:
        corpus = self._corpora[number]
        order_seed = mix64(self._seed, _ORDER, number, epoch)
        corrupt: list[str] = []
        for attempt in range(min(len(corpus), self._config.max_corrupt + 1)):
            place = permuted_index((index + attempt) % len(corpus), len(corpus), order_seed)
            try:
                return self._decoded(number, place), tuple(corrupt)
            except CorruptSampleError as error:
                _log.debug("replacing %s", error)
                corrupt.append(f"{self._name(number, error.key)}: {error}")
        raise DigSegError(
            f"{len(corrupt)} samples in a row cannot be read, the last was {corrupt[-1]}; "
            "run data_prep/shard.py again to mend the shards"
        )

    def _decoded(self, number: int, place: int) -> Sample:
        sample = self._cache.get((number, place))
        if sample is None:
            sample = self._corpora[number].read(place, self._transforms[number].longest_short_side)
            self._cache.put((number, place), sample)
        return sample

    def _name(self, number: int, key: str) -> str:
        manifest = self.manifests[number]
        return f"{manifest.corpus}/{manifest.split}/{key}"

    def _rng(self, position: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, position, stream])


class DecodedCache:
    """Decoded samples of this process, up to ``max_bytes``: the first that come stay.

    Every epoch reads each sample once, so that evicting the least recent would evict what is needed soonest.
    """

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = self._max_bytes = max_bytes
        self._samples: dict[tuple[int, int], Sample] = {}

    def __reduce__(self) -> tuple[type[DecodedCache], tuple[int]]:
        # A loader process fills its own.
        return DecodedCache, (self._max_bytes,)

    def get(self, place: tuple[int, int]) -> Sample | None:
        return self._samples.get(place)

    def put(self, place: tuple[int, int], sample: Sample) -> None:
        size = sample.image.nbytes + sample.mask.nbytes
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._samples[place] = sample


def training_batches(
    data: TrainingData, config: Config, rank: int, world_size: int, start_step: int, steps: int
) -> Iterator[Batch]:
    """The batches of steps [start_step, start_step + steps) of one rank, each of global_batch_size /
    world_size.

    Raises:
        DigSegError: the world does not divide the batch, or more than ``data.max_corrupt`` samples are
            unreadable.
    """
    positions = StepPositions(config.training.global_batch_size, rank, world_size, start_step, steps)
    corrupt: set[str] = set()
    for batch in _loader(data, config, positions):
        for reason in batch.corrupt:
            if reason not in corrupt:
                _log.warning("unreadable and replaced: %s", reason)
        corrupt.update(batch.corrupt)
        if len(corrupt) > config.data.max_corrupt:
            raise DigSegError(
                f"{len(corrupt)} samples could not be read (data.max_corrupt is "
                f"{config.data.max_corrupt}), the last: {batch.corrupt[-1]}; mend the shards with "
                "data_prep/shard.py or raise data.max_corrupt"
            )
        yield batch


@dataclass(frozen=True)
class StepPositions:
    """For each step from ``start_step`` on, the global positions of one rank's slice of the batch."""

    global_batch_size: int
    rank: int
    world_size: int
    start_step: int
    steps: int

    def __post_init__(self) -> None:
        if self.global_batch_size % self.world_size:
            raise DigSegError(
                f"training.global_batch_size is {self.global_batch_size}, which {self.world_size} ranks "
                "cannot share evenly"
            )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        share = self.global_batch_size // self.world_size
        for step in range(self.start_step, self.start_step + self.steps):
            first = step * self.global_batch_size + self.rank * share
            yield list(range(first, first + share))


class _Positions(Dataset[TrainingSample]):
    """Global positions as a map-style dataset."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __getitem__(self, position: int) -> TrainingSample:
        return self._data.sample(position)


def _loader(data: TrainingData, config: Config, positions: StepPositions) -> DataLoader[TrainingSample]:
    workers = config.data.workers
    return DataLoader(
        _Positions(data),
        batch_sampler=positions,
        collate_fn=partial(collate, exponent=config.objective.balance_exponent, maximum=config.objective.balance_max),
        num_workers=workers,
        prefetch_factor=config.data.prefetch if workers else None,
        multiprocessing_context=_worker_processes() if workers else None,
        # Without a generator of its own the loader would draw from torch's global one.
        generator=torch.Generator(),
    )


def _worker_processes() -> ForkServerContext:
    """How loader processes start: forking a process with threads (gloo, Ray, object stores) can deadlock."""
    context = multiprocessing.get_context("forkserver")
    # The server imports torch once and all workers are forked from it.
    context.set_forkserver_preload([__name__])
    return context


def collate(samples: Sequence[TrainingSample], exponent: float, maximum: float) -> Batch:
    """Samples to a batch, the queries padded to the longest; for the weights see :func:`class_weights`."""
    size, slots = len(samples), max(len(sample.query.name_ids) for sample in samples)
    query_ids = np.full((size, slots), -1, dtype=np.int64)
    colour_ids = np.zeros((size, slots), dtype=np.int64)
    weights = np.ones((size, slots), dtype=np.float32)
    for row, sample in enumerate(samples):
        used = len(sample.query.name_ids)
        query_ids[row, :used] = sample.query.name_ids
        colour_ids[row, :used] = sample.query.colour_ids
        weights[row, :used] = class_weights(sample.query.frequencies, exponent, maximum)
    return Batch(
        images=torch.from_numpy(np.stack([sample.image for sample in samples])),
        labels=torch.from_numpy(np.stack([sample.labels for sample in samples]).astype(np.int64)),
        query_ids=torch.from_numpy(query_ids),
        colour_ids=torch.from_numpy(colour_ids),
        class_weights=torch.from_numpy(weights),
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        keys=[sample.key for sample in samples],
        corrupt=[reason for sample in samples for reason in sample.corrupt],
    )
