"""The training sample at a global position: a pure function of (seed, position).

Nothing is shuffled in a buffer and nothing has a state, so it does not matter who asks for a position, when, or
after which other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from digseg.config.schema import DataConfig
from digseg.data.cache import ShardCache
from digseg.data.corpus import CorruptSampleError, ShardedCorpus
from digseg.data.images import DecodedCache, ImageSource, SampleSource
from digseg.data.latent_source import LatentSource
from digseg.data.latents import LATENTS_CODE, Latents
from digseg.data.mixture import GlobalOrder, Place, temperature_weights
from digseg.data.order import WindowedOrder, mix64
from digseg.data.queries import Query, class_frequencies, draw_query, query_vocabulary
from digseg.data.transform_settings import TransformSettings
from digseg.data.wordings import check_synonyms, name_table
from digseg.errors import DigSegError

# Independent random streams of one position: the query must not change with the image's size.
_QUERY, _CROP = 1, 2
_VIEW = 3  # stream of the run's seed


@dataclass(frozen=True)
class TrainingSample:
    """``image`` uint8 [3, C, C]; ``labels`` uint8 [C, C], slots of the query, 255 ignored; ``latents`` float16
    [c, h, w] of the image, None where they are not stored.

    ``corrupt`` says of the samples that were due here but could not be read why.
    """

    position: int
    key: str
    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    latents: Latents | None
    query: Query
    corrupt: dict[str, str]


class _Drawn(NamedTuple):
    """What chance decides of a position: the query, whose sample it is, and the state that its crop is drawn from."""

    position: int
    query: Query
    place: Place
    rng: np.random.Generator


class TrainingData:
    """The mixture of sharded corpora that a run trains on.

    Raises:
        DigSegError: shards are missing or damaged, or synonyms are of classes that they do not have.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        window = config.shuffle_window
        root = config.latents or config.root
        shards = None if config.cache_dir is None else ShardCache(config.cache_dir, config.cache_bytes)
        self._corpora = [
            # A window may touch twice its number of shards, and a reader is in two windows at a time.
            ShardedCorpus(root, entry.name, entry.split, open_indexes=4 * window, cache=shards)
            for entry in config.corpora
        ]
        self.manifests = tuple(corpus.manifest for corpus in self._corpora)
        synonyms = config.queries.synonyms
        check_synonyms(synonyms, self.manifests)
        self.names = name_table(self.manifests, synonyms)
        self.class_frequency = tuple(class_frequencies(manifest) for manifest in self.manifests)
        orders = [corpus.shuffled(window) for corpus in self._corpora]
        self.order = GlobalOrder(orders, _weights(config, orders), seed)
        self._vocabularies = [query_vocabulary(m, self.manifests, self.names, synonyms) for m in self.manifests]
        self._transforms = [
            TransformSettings.of(config, entry, manifest.domain)
            for entry, manifest in zip(config.corpora, self.manifests, strict=True)
        ]
        self._sources = self._opened()

    def sample(self, position: int) -> TrainingSample:
        """The sample at a global position: the same whoever asks, whenever.

        A sample that cannot be read is replaced by the next of its epoch's order.

        Raises:
            DigSegError: more than ``data.max_corrupt`` samples in a row cannot be read, or none of the
                corpus.
        """
        return self._read(self._draw(position))

    def samples(self, positions: Sequence[int]) -> list[TrainingSample]:
        """:meth:`sample` of each position, in a tenth less of the time that is not decoding.

        All are drawn before any is read: between two decoders, code that is in no cache takes twice as long.
        """
        return [self._read(drawn) for drawn in [self._draw(position) for position in positions]]

    def _draw(self, position: int) -> _Drawn:
        number = self.order.corpus_at(position)
        query = draw_query(
            self._vocabularies[number],
            self.class_frequency[number],
            self._config.queries,
            self._rng(position, _QUERY),
        )
        return _Drawn(position, query, self.order.locate(position), self._rng(position, _CROP))

    def _read(self, drawn: _Drawn) -> TrainingSample:
        position, query, place, rng = drawn
        corpus, source = self._corpora[place.corpus], self._sources[place.corpus]
        corrupt: dict[str, str] = {}
        for attempt in range(1, min(self.order.mixture.sizes[place.corpus], self._config.max_corrupt + 1) + 1):
            try:
                crop = source.crop(place.sample, place.epoch, query.label_map, rng)
            except CorruptSampleError as error:
                corrupt[f"{corpus.name}/{error.key}"] = str(error)
                place, rng = self.order.locate(position, attempt), self._rng(position, _CROP)
            else:
                return TrainingSample(
                    position,
                    f"{corpus.name}/{crop.key}",
                    crop.image,
                    crop.labels,
                    crop.latents,
                    query,
                    corrupt,
                )
        raise DigSegError(
            f"{len(corrupt)} samples in a row cannot be read, the last was {list(corrupt.values())[-1]}; "
            f"run {corpus.manifest.job} again to mend the shards"
        )

    def shards_ahead(self, position: int) -> Iterator[tuple[ShardedCorpus, int]]:
        """The shards that are read at a global position, then those of the next windows: so many as fit
        ``data.cache_bytes``."""
        free_bytes = self._config.cache_bytes
        windows = [self.order.windows_from(position, number) for number in range(len(self._corpora))]
        for _ in range(2):
            for corpus, following in zip(self._corpora, windows, strict=True):
                for shard in dict.fromkeys(s for block in next(following).blocks for s in corpus.shards_of(block)):
                    free_bytes -= corpus.manifest.shards[shard].bytes
                    if free_bytes < 0:
                        return
                    yield corpus, shard

    def check_autoencoder(self, identity: Mapping[str, str]) -> None:
        """Whether stored latents are what this autoencoder, at these settings, would make of the images.

        Raises:
            DigSegError: they are not, with each part that differs.
        """
        for corpus, transform in zip(self._corpora, self._transforms, strict=True):
            latents = corpus.manifest.latents
            if latents is None:
                continue
            run = latents.model_copy(
                update={"code": LATENTS_CODE, "autoencoder": dict(identity), "transform": transform}
            )
            if differences := latents.differences(run):
                raise DigSegError(
                    f"data.latents {self._config.latents}: {corpus.name} was encoded for another run than this one, "
                    f"they differ in {', '.join(differences)}; set the keys as the latents have them, or encode anew "
                    "with data_prep/encode_latents.py --config"
                )

    def _opened(self) -> list[SampleSource]:
        cache = DecodedCache(self._config.decoded_cache_mb << 20)
        if self._config.latents is not None:
            return [
                LatentSource(corpus, mix64(self._seed, _VIEW, number), cache)
                for number, corpus in enumerate(self._corpora)
            ]
        for corpus in self._corpora:
            if corpus.manifest.latents is not None:
                raise DigSegError(f"data.root {self._config.root} holds latents of {corpus.name}; name it data.latents")
        return [
            ImageSource(corpus, transform, cache)
            for corpus, transform in zip(self._corpora, self._transforms, strict=True)
        ]

    def _rng(self, position: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, position, stream])


def _weights(config: DataConfig, corpora: Sequence[WindowedOrder]) -> list[float]:
    if config.temperature is not None:
        return temperature_weights([corpus.samples for corpus in corpora], config.temperature)
    return [1.0 if entry.weight is None else entry.weight for entry in config.corpora]
