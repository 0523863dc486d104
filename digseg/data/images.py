"""Training crops out of a corpus of images."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from digseg.data.corpus import Sample, ShardedCorpus
from digseg.data.latents import Latents
from digseg.data.transform_settings import TransformSettings
from digseg.data.transforms import training_crop


class Crop(NamedTuple):
    """A sample's key and what is trained on: ``image`` uint8 [3, C, C]; ``labels`` uint8 [C, C], slots of the query,
    255 ignored; ``latents`` float16 [c, h, w] of the image, None where they are not stored."""

    key: str
    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    latents: Latents | None


class SampleSource(Protocol):
    """Where the training crops of one corpus come from."""

    def crop(self, sample: int, epoch: int, label_map: npt.NDArray[np.uint8], rng: np.random.Generator) -> Crop:
        """What is trained on of a sample in an epoch: a pure function of the arguments and the generator's state.

        ``label_map`` turns the values of the mask into slots of a query.

        Raises:
            CorruptSampleError: the sample cannot be read or decoded.
        """


class ImageSource:
    """Reads, decodes and augments the samples of one corpus; ``cache`` keeps decoded ones for the next epoch."""

    def __init__(self, corpus: ShardedCorpus, settings: TransformSettings, cache: DecodedCache) -> None:
        self._corpus, self._settings, self._cache = corpus, settings, cache

    def crop(self, sample: int, epoch: int, label_map: npt.NDArray[np.uint8], rng: np.random.Generator) -> Crop:
        """A random crop of the sample; what the epoch is does not matter."""
        decoded = self._cache.read(self._corpus, sample, self._settings.longest_short_side)
        image, labels = training_crop(decoded.image, decoded.mask, label_map, self._settings, rng)
        return Crop(decoded.key, image, labels, None)


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

    def read(self, corpus: ShardedCorpus, place: int, min_short_side: int | None = None) -> Sample:
        """:meth:`ShardedCorpus.read`, or what it gave before."""
        sample = self._samples.get((corpus.name, place))
        if sample is None:
            sample = corpus.read(place, min_short_side)
            if sample.nbytes <= self._free_bytes:
                self._free_bytes -= sample.nbytes
                self._samples[corpus.name, place] = sample
        return sample
