"""The three ways of preparing a corpus that ``benchmarks/data_prep.py`` compares, each a program of its own.

    python sides.py job|loop|ray_data CORPUS

They are here, and not there, because that file is called like the package that they use.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_prep.corpora import BadSample, Corpus, SampleRef, load_corpus
from digseg.console import say
from digseg.data.format import Statistics
from digseg.data.hashes import hash_image
from digseg.data.writer import encode_mask

SAMPLES_PER_SHARD = 50


def run_job(root: Path) -> None:
    """The job, in a Ray session that has its workers."""
    from data_prep.shard import plan_split, shard_corpus

    with _warm_ray_session(), tempfile.TemporaryDirectory() as out, _timed():
        shard_corpus(plan_split("folder", root, "train", out, SAMPLES_PER_SHARD))


def run_loop(root: Path) -> None:
    """One process, sample after sample."""
    import webdataset

    _warm_up(0)
    with tempfile.TemporaryDirectory() as out, _timed():
        corpus = load_corpus("folder", root)
        counts: list[Statistics] = []
        with webdataset.ShardWriter(f"{out}/train-%06d.tar", maxcount=SAMPLES_PER_SHARD, verbose=0) as sink:
            for sample in _prepared(corpus, corpus.list("train"), counts):
                sink.write(sample)
        Statistics.merged(counts)
        _digest_tars(out)


def run_ray_data(root: Path) -> None:
    """Ray's own data sets."""
    import ray

    with _warm_ray_session(), tempfile.TemporaryDirectory() as out:
        ray.data.DataContext.get_current().enable_progress_bars = False
        ray.data.range(4).materialize()
        with _timed():
            corpus = load_corpus("folder", root)
            refs = corpus.list("train")

            def prepared(row: dict[str, int]) -> dict[str, object]:
                return next(_prepared(corpus, [refs[row["item"]]], []))

            shards = -(-len(refs) // SAMPLES_PER_SHARD)
            numbers = ray.data.from_items(list(range(len(refs))), override_num_blocks=shards)
            numbers.map(prepared).write_webdataset(out, encoder=None)
            _digest_tars(out)


SIDES: dict[str, Callable[[Path], None]] = {"job": run_job, "loop": run_loop, "ray_data": run_ray_data}


def _prepared(corpus: Corpus, refs: Iterable[SampleRef], counts: list[Statistics]) -> Iterator[dict[str, object]]:
    """Samples as WebDataset's writers take them; the job's :func:`data_prep.shard_job.make_shard` does this work."""
    for ref, content in corpus.read_all(refs):
        assert not isinstance(content, BadSample)
        assert isinstance(ref.mask, Path)
        counts.append(Statistics.of_mask(content.mask, len(corpus.vocabulary)))
        hashes = hash_image(ref.key, content.image).model_dump()
        sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (ref.image, ref.mask)]
        yield {
            "__key__": ref.key,
            f"image.{content.image_ext}": content.image_bytes,
            "mask.png": encode_mask(content.mask, len(corpus.vocabulary)),
            "json": json.dumps({**hashes, "sources": sources}).encode(),
        }


def _digest_tars(folder: str) -> None:
    for path in Path(folder).rglob("*.tar"):
        hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _warm_ray_session() -> Iterator[None]:
    from digseg.cluster.runtime import ray_session
    from digseg.cluster.tasks import fan_out

    with ray_session():
        list(fan_out(_warm_up, range(8 * (os.cpu_count() or 1)), "starting workers"))
        yield


def _warm_up(_: int) -> None:
    """Import what a sample needs, libraries' own late imports included."""
    import data_prep.shard_job  # noqa: F401

    hash_image("", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    time.sleep(0.05)  # so that no worker is through with all of it before the next has started


@contextmanager
def _timed() -> Iterator[None]:
    """Print how long the block took, as the line that the benchmark reads."""
    start = time.perf_counter()
    yield
    say(f"seconds {time.perf_counter() - start}")


if __name__ == "__main__":
    SIDES[sys.argv[1]](Path(sys.argv[2]))
