"""The work behind :mod:`data_prep.encode_latents`: making the latents of one shard (one Ray task)."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.shard_job import ShardResult, present_shard
from digseg.config import AutoencoderConfig
from digseg.data.corpus import ShardedCorpus
from digseg.data.format import FORMAT_VERSION, MANIFEST_NAME, Manifest, ShardEntry, Statistics, split_path
from digseg.data.hashes import hash_image
from digseg.data.latents import LatentRecipe, pack_latents
from digseg.data.storage import Storage
from digseg.data.transforms import as_pixels
from digseg.data.views import View, draw_views
from digseg.data.writer import EncodedSample, ShardWriter, encode_mask, encode_png
from digseg.errors import DigSegError
from digseg.model.autoencoder import Autoencoder, build_autoencoder


@dataclass(frozen=True)
class LatentJob:
    """The latents of one shard to make: everything a task needs, wherever it runs.

    ``data`` is the root of the images' shards, ``root`` that of the latents, ``batch_size`` how many views are encoded
    at once.
    """

    data: str
    source: Manifest
    number: int
    root: str
    recipe: LatentRecipe
    autoencoder: AutoencoderConfig
    batch_size: int
    expected: ShardEntry | None
    on_gpu: bool = False

    @property
    def folder(self) -> str:
        return split_path(self.source.corpus, self.source.split)

    @property
    def shard(self) -> ShardEntry:
        """The shard of images; that of the latents has the same name, and holds the same samples in the same order."""
        return self.source.shards[self.number]

    @property
    def source_sha256(self) -> str:
        """Over everything the latents are made from: the images' shard, the recipe, and what the manifest says."""
        parts = (FORMAT_VERSION, self.recipe.model_dump_json(), self.folder, self.source.ignore_id, self.shard.sha256)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_latent_shard(job: LatentJob) -> ShardResult:
    """Encode a shard, or leave its latents as they are where they are intact and made of the same images and recipe.

    Raises:
        DigSegError: the images are damaged, this machine has another autoencoder, its latents are not finite, or they
            cannot be written.
    """
    storage = Storage(job.root)
    present = present_shard(storage, job.folder, job.shard.name, job.expected, lambda: job.source_sha256)
    if present is not None:
        return present
    autoencoder = _autoencoder(job.autoencoder.model_dump_json(), repr(job.recipe.autoencoder))
    if autoencoder.identity != job.recipe.autoencoder:
        raise DigSegError(f"{job.autoencoder.path}: not the autoencoder that the job was started with")
    statistics: list[Statistics] = []
    views = _views(job, statistics)
    with storage.writing(f"{job.folder}/{job.shard.name}"):
        # A manifest never describes shards that are being replaced.
        storage.remove(f"{job.folder}/{MANIFEST_NAME}")
        with ShardWriter(storage, job.folder, job.shard.name) as writer:
            while batch := list(itertools.islice(views, job.batch_size)):
                for sample in _encoded(batch, autoencoder, job):
                    writer.add(sample)
            header, entry = writer.close(job.source_sha256, Statistics.merged(statistics), ())
    return ShardResult(entry, header.statistics, (), written=True)


def _views(job: LatentJob, statistics: list[Statistics]) -> Iterator[View]:
    """The views of all samples of the shard in order; ``statistics`` grows by each."""
    corpus = ShardedCorpus(job.data, job.source.corpus, job.source.split)
    if corpus.manifest.digest != job.source.digest:
        raise DigSegError(f"{job.data}/{job.folder} changed while it was encoded; start again")
    first = sum(shard.samples for shard in job.source.shards[: job.number])
    for index in range(first, first + job.shard.samples):
        sample = corpus.must_read(index, job.recipe.transform.longest_short_side)
        name = f"{job.folder}/{sample.key}"
        for view in draw_views(name, sample.image, sample.mask, job.source.ignore_id, job.recipe):
            statistics.append(Statistics.of_mask(view.mask, len(job.source.vocabulary)))
            yield view


def _encoded(views: Sequence[View], autoencoder: Autoencoder, job: LatentJob) -> Iterator[EncodedSample]:
    levels = torch.from_numpy(np.stack([view.image for view in views])).permute(0, 3, 1, 2).contiguous()
    images = as_pixels(levels.to("cuda" if job.on_gpu else "cpu"))
    with torch.inference_mode():
        latents = autoencoder.encode(images).float().cpu().numpy()
    for view, latent in zip(views, latents, strict=True):
        try:
            packed = pack_latents(latent)
        except ValueError as error:
            raise DigSegError(f"view {view.key!r} of {job.folder}: {error}; this autoencoder cannot be used") from None
        yield EncodedSample(
            key=view.key,
            image=encode_png(view.image),
            image_ext="png",
            mask_png=encode_mask(view.mask, len(job.source.vocabulary)),
            meta={"key": view.key, "corpus": job.source.corpus, "split": job.source.split},
            hashes=hash_image(view.key, view.image),
            latents=packed,
        )


@functools.lru_cache(maxsize=1)
def _autoencoder(config: str, _identity: str) -> Autoencoder:
    """The autoencoder of a configuration, loaded once a process: the next task of this worker finds it here.

    Of another identity it is loaded anew: its files were replaced.
    """
    # Of several algorithms the same one every time, so that the same images give the same bytes.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return build_autoencoder(AutoencoderConfig.model_validate_json(config))
