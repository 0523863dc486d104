"""Encode the images of sharded corpora with an autoencoder, as Ray tasks, so that training needs it for no image.

    python data_prep/encode_latents.py --data ROOT --model PATH_OR_ID --resolution 512 --out ROOT2

Of every sample several views are drawn as training would draw them and stored with their own class ids. The same
images, autoencoder and settings give the same bytes on the same kind of machine. Running it again verifies what is
there and makes only what is missing, damaged or made otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from data_prep.shard import earlier_manifest, publish
from data_prep.shard_job import ShardResult
from digseg.config import AutoencoderConfig, load_config
from digseg.config.schema import DataConfig, MixtureEntry
from digseg.console import say
from digseg.data.format import Manifest, Statistics, list_manifests, load_manifest, split_path
from digseg.data.latents import LatentRecipe
from digseg.data.storage import Storage
from digseg.data.transform_settings import TransformSettings
from digseg.errors import DigSegError, run_main

if TYPE_CHECKING:
    from data_prep.latent_job import LatentJob

PIXEL_BYTES = 1.5
"""Of a view's PNG files a pixel, about: photographs take 1 to 2, masks next to nothing."""


@dataclass(frozen=True)
class Settings:
    """What a job is to make. ``data`` names the images' root, the splits, and how a view is drawn of a sample."""

    data: DataConfig
    autoencoder: AutoencoderConfig
    out: str
    views: int = 4
    seed: int = 0
    batch_size: int = 8
    num_gpus: float | None = None


def encode_latents(settings: Settings) -> list[Manifest]:
    """Encode all splits of ``settings.data.corpora``; the manifests of the latents.

    Raises:
        DigSegError: missing or unsuitable shards, autoencoder or settings, or an ``out`` that cannot be written or is
            too small; nothing is written then.
    """
    plan = plan_latents(settings)

    # Ray takes a second to import: a job that is wrong should say so at once.
    from data_prep.latent_job import make_latent_shard
    from digseg.cluster.runtime import free_gpus, ray_session
    from digseg.cluster.tasks import fan_out

    with ray_session():
        num_gpus = min(1.0, free_gpus()) if settings.num_gpus is None else settings.num_gpus
        jobs = [replace(job, on_gpu=num_gpus > 0) for split in plan for job in split.jobs]
        where = f"{num_gpus:g} GPU a task" if num_gpus else "CPUs"
        say(f"{sum(s.source.samples for s in plan)} samples x {settings.views} views, encoded on {where}")
        results = fan_out(
            make_latent_shard,
            jobs,
            "encoding",
            num_gpus=num_gpus,
            unit="views",
            size=lambda job: job.shard.samples * job.recipe.views,
            environment={**Storage(settings.data.root).environment(), **Storage(settings.out).environment()},
        )
        numbers = [number for number, split in enumerate(plan) for _ in split.jobs]
        # A split is complete, and readable, as soon as its last shard is.
        return [
            publish_latents(plan[number], [result for _, result in made])
            for number, made in groupby(zip(numbers, results, strict=True), key=itemgetter(0))
        ]


@dataclass(frozen=True)
class LatentPlan:
    """A split to encode: the manifest of its images, that of an earlier run, and a job for each shard."""

    source: Manifest
    recipe: LatentRecipe
    before: Manifest | None
    jobs: tuple[LatentJob, ...]


def plan_latents(settings: Settings) -> list[LatentPlan]:
    """What there is to do, everything checked that can be before it is begun.

    Raises:
        DigSegError: see :func:`encode_latents`.
    """
    sources = _sources(settings)
    storage = Storage(settings.out)
    storage.check_writable()
    recipes = _recipes(settings, sources)
    before = [_earlier_latents(storage, source) for source in sources]
    _check_space(storage, sources, recipes)
    return [
        LatentPlan(source, recipe, known, _jobs(settings, storage, source, recipe, known))
        for source, recipe, known in zip(sources, recipes, before, strict=True)
    ]


def publish_latents(split: LatentPlan, results: Sequence[ShardResult]) -> Manifest:
    """Write the manifest of a split whose shards are all made, and say so."""
    entries = tuple(result.entry for result in results if result.entry)
    manifest = split.source.model_copy(
        update={
            "samples": sum(entry.samples for entry in entries),
            "rejected": 0,
            "rejected_sha256": hashlib.sha256(b"").hexdigest(),
            "shards": entries,
            "statistics": Statistics.merged([result.statistics for result in results if result.statistics]),
            "latents": split.recipe,
        }
    ).with_digest()
    publish(Storage(split.jobs[0].root), manifest, b"", split.before)
    written = sum(result.written for result in results)
    say(
        f"{split.jobs[0].folder}: {split.source.samples} samples x {split.recipe.views} views in {len(entries)} shards "
        f"({written} written, {len(entries) - written} verified), digest {manifest.digest[:12]}"
    )
    return manifest


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", help="the folder (or URL) of the images' shards; default: data.root of --config")
    parser.add_argument(
        "--model",
        help="whose autoencoder: an exported model, a diffusers directory or a hub id; default: that of --config",
    )
    parser.add_argument("--resolution", type=int, help="pixels a side of a view; default: data.crop_size of --config")
    parser.add_argument("--out", required=True, help="where the latents go: a folder or a URL such as s3://bucket/x")
    parser.add_argument("--config", help="a run's YAML: its splits, its scale, crop, flip and colour settings")
    parser.add_argument("--split", default="train", help="without --config: of all corpora this split")
    parser.add_argument("--views", type=int, default=4, help="augmented draws of each sample (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--batch", type=int, default=8, help="views encoded at once (default: 8)")
    parser.add_argument("--num-gpus", type=float, help="share of a GPU for each task (default: one where one is free)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of --config")
    encode_latents(_settings(parser.parse_args(arguments)))


def _settings(options: argparse.Namespace) -> Settings:
    for name, least in (("views", 1), ("seed", 0), ("batch", 1), ("resolution", 1), ("num_gpus", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise DigSegError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    # torch and diffusers take seconds to import: what the command line lacks should be said at once.
    data = _data(options)
    if options.model:
        from digseg.model.autoencoder_source import autoencoder_of

        autoencoder = autoencoder_of(options.model)
    else:
        autoencoder = load_config(options.config, options.overrides).model.autoencoder
    return Settings(data, autoencoder, options.out, options.views, options.seed, options.batch, options.num_gpus)


def _data(options: argparse.Namespace) -> DataConfig:
    """The data section: that of --config, or all corpora below --data with the settings that a run has by default."""
    if options.config:
        data = load_config(options.config, options.overrides).data
        changes = {"root": options.data, "crop_size": options.resolution}
        return data.model_copy(update={name: value for name, value in changes.items() if value is not None})
    if options.overrides:
        raise DigSegError(f"{options.overrides[0]!r} overrides a configuration, but none was given (--config)")
    for name in ("data", "model", "resolution"):
        if getattr(options, name) is None:
            raise DigSegError(f"--{name} is missing (or give a --config that says it)")
    manifests = list_manifests(options.data)
    chosen = [MixtureEntry(name=m.corpus, split=m.split) for m in manifests if m.split == options.split]
    if not chosen:
        found = ", ".join(split_path(m.corpus, m.split) for m in manifests)
        raise DigSegError(f"--split {options.split!r}: there is none below {options.data}, but {found}")
    size = options.resolution
    return DataConfig(root=options.data, corpora=chosen, crop_size=size, short_side=size)


def _sources(settings: Settings) -> list[Manifest]:
    data = settings.data
    sources = [load_manifest(data.root, entry.name, entry.split) for entry in data.corpora]
    for source in sources:
        if source.latents is not None:
            raise DigSegError(
                f"--data {data.root} holds latents of {split_path(source.corpus, source.split)}, not images; "
                "give the root of the shards that data_prep/shard.py wrote"
            )
    return sources


def _recipes(settings: Settings, sources: Sequence[Manifest]) -> list[LatentRecipe]:
    from digseg.model.autoencoder import build_autoencoder

    autoencoder, size = build_autoencoder(settings.autoencoder), settings.data.crop_size
    if size % autoencoder.factor:
        raise DigSegError(
            f"--resolution is {size}; the autoencoder turns {autoencoder.factor} x {autoencoder.factor} pixels into "
            f"one latent, so it must be a multiple of {autoencoder.factor}"
        )
    return [
        LatentRecipe(
            autoencoder=autoencoder.identity,
            latent_shape=(autoencoder.channels, size // autoencoder.factor, size // autoencoder.factor),
            transform=TransformSettings.of(settings.data, entry, source.domain),
            views=settings.views,
            seed=settings.seed,
        )
        for entry, source in zip(settings.data.corpora, sources, strict=True)
    ]


def _earlier_latents(storage: Storage, source: Manifest) -> Manifest | None:
    before = earlier_manifest(storage, source.corpus, source.split)
    if before is not None and before.latents is None:
        folder = split_path(source.corpus, source.split)
        raise DigSegError(f"--out {storage.root} holds the images of {folder}; choose a folder of its own for latents")
    return before


def _check_space(storage: Storage, sources: Sequence[Manifest], recipes: Sequence[LatentRecipe]) -> None:
    """Refuse what a local disk cannot hold, before hours are spent on it."""
    free = storage.free_bytes()
    if free is None:
        return
    needed = 0
    for source, recipe in zip(sources, recipes, strict=True):
        view = recipe.latent_bytes + PIXEL_BYTES * recipe.resolution**2
        needed += int(source.samples * recipe.views * view)
        folder = split_path(source.corpus, source.split)
        needed -= sum(storage.size(f"{folder}/{name}") or 0 for name in storage.files(folder))
    if needed > free:
        raise DigSegError(
            f"--out {storage.root}: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; free some, "
            "choose another place, or ask for fewer --views"
        )


def _jobs(
    settings: Settings, storage: Storage, source: Manifest, recipe: LatentRecipe, before: Manifest | None
) -> tuple[LatentJob, ...]:
    from data_prep.latent_job import LatentJob

    known = {entry.name: entry for entry in before.shards} if before else {}
    return tuple(
        LatentJob(
            data=Storage(settings.data.root).root,
            source=source,
            number=number,
            root=storage.root,
            recipe=recipe,
            autoencoder=settings.autoencoder,
            batch_size=settings.batch_size,
            expected=known.get(entry.name),
        )
        for number, entry in enumerate(source.shards)
    )


if __name__ == "__main__":
    run_main(main)
