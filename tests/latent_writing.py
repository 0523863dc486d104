"""Latents of shards, made in this process without Ray."""

from __future__ import annotations

from pathlib import Path

from data_prep.encode_latents import Settings, plan_latents, publish_latents
from data_prep.latent_job import make_latent_shard
from digseg.config import Config
from digseg.data.format import Manifest


def write_latents(config: Config, out: str | Path, views: int = 1, seed: int = 0) -> list[Manifest]:
    """The latents of what a run trains on, by its own autoencoder and settings, below ``out``."""
    settings = Settings(config.data, config.model.autoencoder, str(out), views, seed)
    return [publish_latents(split, [make_latent_shard(job) for job in split.jobs]) for split in plan_latents(settings)]
