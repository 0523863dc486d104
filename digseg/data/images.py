"""Training crops out of a corpus of images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from digseg.data.corpus import Sample, ShardedCorpus
from digseg.data.transforms import TransformSettings, training_crop


class Crop(NamedTuple):
    """A sample's key and what is trained on: ``image`` float32 [3, C, C] in [-1, 1]; ``labels`` uint8 [C, C],
    slots of the query, 255 ignored."""

    key: str
    image: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]


class ImageSource:
    """Reads, decodes and augments the samples of one corpus; ``cache`` keeps decoded ones for the next epoch."""

    def __init__(self, corpus: ShardedCorpus, settings: TransformSettings, cache: DecodedCache) -> None:
        self._corpus, self._settings, self._cache = corpus, settings, cache

    def crop(self, place: int, label_map: npt.NDArray[np.uint8], rng: np.random.Generator) -> Crop:
        """A random crop of sample ``place``: a pure function of the arguments and the generator's state.

        ``label_map`` turns the values of the mask into slots of a query.

        Raises:
            CorruptSampleError: the sample cannot be read or decoded.
        """
        cached = (self._corpus.name, place)
        sample = self._cache.get(cached)
        if sample is None:
            sample = self._corpus.read(place, self._settings.longest_short_side)
            self._cache.put(cached, sample)
        image, labels = training_crop(sample.image, sample.mask, label_map, self._settings, rng)
        return Crop(sample.key, image, labels)


class DecodedCache:
    """Decoded samples of this process, up to ``max_bytes``: the first that come stay.

    Every epoch reads each sample once, so that evicting the least recent would evict what is needed soonest.
    """

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = self._max_bytes = max_bytes
        self._samples: dict[tuple[str, int], Sample] = {}

    def __reduce__(self) -> tuple[type[DecodedCache], tuple[int]]:
        # A loader process fills its own.
        return DecodedCache, (self._max_bytes,)

    def get(self, place: tuple[str, int]) -> Sample | None:
        return self._samples.get(place)

    def put(self, place: tuple[str, int], sample: Sample) -> None:
        size = sample.image.nbytes + sample.mask.nbytes
        if size <= self._free_bytes:
            self._free_bytes -= size
            self._samples[place] = sample
