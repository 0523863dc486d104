"""Corpora to shards, as a configuration's ``prepare`` section says, where the shards are absent."""

from __future__ import annotations

import time
from pathlib import Path

from digseg.config import Config
from digseg.data.format import present_manifests
from digseg.errors import DigSegError


def ensure_shards(config: Config) -> dict[str, float]:
    """Draw the sample corpora and write the shards that ``config.prepare`` names and ``config.data.root`` lacks.

    Returns:
        Seconds per stage: ``corpora`` and ``shards``, 0 where nothing was to do.

    Raises:
        DigSegError: shards are missing and ``prepare.root`` does not say where the corpora lie.
    """
    seconds = {"corpora": 0.0, "shards": 0.0}
    present = {(manifest.corpus, manifest.split) for manifest in present_manifests(config.data.root)}
    missing = [
        (entry, split)
        for entry in config.prepare.corpora
        for split in entry.splits
        if (entry.corpus, split) not in present
    ]
    if not missing:
        return seconds
    if config.prepare.root is None:
        names = ", ".join(f"{entry.corpus}/{split}" for entry, split in missing)
        raise DigSegError(
            f"{config.data.root} has no shards of {names}, and prepare.root does not say where the corpora lie; "
            "set prepare.root=DIR (python launch/demo.py: --corpora DIR)"
        )
    # Only where there is work to do: a run in one process with its shards at hand needs no Ray.
    from data_prep.sample_corpora import draw_sample_corpora
    from data_prep.shard import plan_split, shard_corpus
    from digseg.cluster.runtime import ray_session

    root = Path(config.prepare.root)
    start = time.monotonic()
    if (sample := config.prepare.sample_corpora) is not None:
        draw_sample_corpora(root, sample.images_per_domain, sample.seed, sample.size)
    drawn = time.monotonic()
    with ray_session(config.cluster):
        for entry, split in missing:
            shard_corpus(plan_split(entry.corpus, root / entry.dir, split, config.data.root))
    return {"corpora": drawn - start, "shards": time.monotonic() - drawn}
