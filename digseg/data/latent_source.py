"""Training on stored latents: views of samples that were drawn and encoded beforehand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from digseg.data.corpus import ShardedCorpus
from digseg.data.images import Crop, DecodedCache
from digseg.data.latents import LatentRecipe, view_of
from digseg.errors import DigSegError


class LatentSource:
    """Reads the views of the samples of one corpus; ``seed`` names the order in which a sample shows its views.

    Raises:
        DigSegError: the corpus holds images, not latents.
    """

    def __init__(self, corpus: ShardedCorpus, seed: int, cache: DecodedCache) -> None:
        if corpus.manifest.latents is None:
            raise DigSegError(
                f"data.latents holds the images of {corpus.name}, not their latents; encode them into a folder of "
                "their own with data_prep/encode_latents.py"
            )
        self.recipe: LatentRecipe = corpus.manifest.latents
        self._corpus, self._seed, self._cache = corpus, seed, cache

    def crop(self, sample: int, epoch: int, label_map: npt.NDArray[np.uint8], rng: np.random.Generator) -> Crop:
        """The view that a sample shows in an epoch; all chance is in how it was drawn, so ``rng`` is not used.

        Raises:
            CorruptSampleError: the view cannot be read or decoded.
        """
        views = self.recipe.views
        place = sample * views + view_of(epoch, sample, views, self._seed)
        view = self._cache.read(self._corpus, place)
        return Crop(view.key, view.image.transpose(2, 0, 1), label_map[view.mask], view.latents)
