"""Sharding into an object store, from a cluster whose machines know nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from corpus_files import noise_corpus
from ray_head import start_head
from s3_server import BUCKET, start_s3

from data_prep.shard import finish_split, plan_split
from data_prep.shard_job import make_shard
from digseg.data.corpus import ShardedCorpus
from digseg.data.lint import lint_shards
from digseg.data.storage import Storage
from digseg.errors import DigSegError

REPOSITORY = Path(__file__).resolve().parents[2]
OUT = f"s3://{BUCKET}/corpora"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with start_s3() as environment:
        yield environment


@pytest.fixture
def garden(tmp_path: Path) -> Path:
    return noise_corpus(tmp_path / "garden", images=6)


@pytest.mark.cluster
def test_shards_in_an_object_store_are_those_of_a_disk_and_are_mended_there(
    garden: Path, tmp_path: Path, s3: dict[str, str]
) -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    job = [sys.executable, "data_prep/shard.py", "--corpus", "folder", "--root", str(garden), "--split", "train"]
    job += ["--samples-per-shard", "2", "--out", OUT]
    with start_head(tmp_path, bare) as head:
        environment = {**bare, **head.environment, "RAY_ADDRESS": head.address, "PYTHONPATH": str(REPOSITORY), **s3}

        def run() -> str:
            done = subprocess.run(
                job, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "5 samples in 3 shards (3 written, 0 verified)" in run()
        assert lint_shards(OUT).problems == []
        stored = _contents(OUT)
        assert stored == _contents(_sharded_alone(garden, tmp_path / "disk"))
        assert ShardedCorpus(OUT, "garden", "train").read(4).image.shape == (24, 32, 3)

        tar = "garden/train/garden-train-000001.tar"
        damaged = bytearray(stored[tar])
        damaged[700] ^= 1
        Storage(OUT).write(tar, bytes(damaged))
        assert any(tar in problem for problem in lint_shards(OUT).problems)
        assert "(1 written, 2 verified)" in run()
        assert _contents(OUT) == stored


def test_object_store_that_cannot_be_written_is_a_clear_error(garden: Path, s3: dict[str, str]) -> None:
    with pytest.raises(DigSegError, match=r"^s3://nowhere/x cannot be written: .*bucket"):
        plan_split("folder", garden, "train", "s3://nowhere/x")
    with pytest.raises(DigSegError, match=r"^nonsense://x cannot be written: .*nonsense"):
        plan_split("folder", garden, "train", "nonsense://x")


def _sharded_alone(garden: Path, out: Path) -> Path:
    plan = plan_split("folder", garden, "train", out, samples_per_shard=2)
    finish_split(plan, [make_shard(job) for job in plan.jobs])
    return out


def _contents(root: str | Path) -> dict[str, bytes]:
    files, base = fsspec.core.url_to_fs(str(root))
    return {path.removeprefix(f"{base}/"): files.cat_file(path) for path in files.find(base)}
