"""Sharding and encoding into an object store, from a cluster whose machines know nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest
from corpus_files import noise_corpus
from kl_autoencoder import write_kl_autoencoder
from ray_head import start_head
from s3_server import BUCKET, start_s3
from small_world import write_squares

from data_prep.encode_latents import Settings, plan_latents, publish_latents
from data_prep.latent_job import make_latent_shard
from data_prep.shard import finish_split, plan_split
from data_prep.shard_job import make_shard
from digseg.config.schema import DataConfig, MixtureEntry
from digseg.data.corpus import ShardedCorpus
from digseg.data.lint import lint_shards
from digseg.data.storage import Storage
from digseg.errors import DigSegError
from digseg.model.autoencoder_source import autoencoder_of

REPOSITORY = Path(__file__).resolve().parents[2]
OUT = f"s3://{BUCKET}/corpora"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with start_s3() as environment:
        yield environment


@pytest.fixture
def garden(tmp_path: Path) -> Path:
    return noise_corpus(tmp_path / "garden", images=6)


@dataclass(frozen=True)
class Cluster:
    """A cluster whose machines know nothing of the object store, and the environment of who submits to it."""

    environment: dict[str, str]

    def run(self, job: str, *arguments: object) -> str:
        """What a job says."""
        done = subprocess.run(
            [sys.executable, f"data_prep/{job}.py", *map(str, arguments)],
            cwd=REPOSITORY,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def cluster(s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    with start_head(tmp_path_factory.mktemp("head"), bare) as head:
        known = {"RAY_ADDRESS": head.address, "PYTHONPATH": str(REPOSITORY)}
        yield Cluster({**bare, **head.environment, **known, **s3})


@pytest.mark.cluster
def test_shards_in_an_object_store_are_those_of_a_disk_and_are_mended_there(
    garden: Path, tmp_path: Path, cluster: Cluster
) -> None:
    job = ("shard", "--corpus", "folder", "--root", garden, "--split", "train", "--samples-per-shard", 2, "--out", OUT)
    assert "5 samples in 3 shards (3 written, 0 verified)" in cluster.run(*job)
    assert lint_shards(OUT).problems == []
    stored = _contents(OUT)
    assert stored == _contents(_sharded_alone(garden, tmp_path / "disk"))
    assert ShardedCorpus(OUT, "garden", "train").read(4).image.shape == (24, 32, 3)

    tar = "garden/train/garden-train-000001.tar"
    damaged = bytearray(stored[tar])
    damaged[700] ^= 1
    Storage(OUT).write(tar, bytes(damaged))
    assert any(tar in problem for problem in lint_shards(OUT).problems)
    assert "(1 written, 2 verified)" in cluster.run(*job)
    assert _contents(OUT) == stored


@pytest.mark.cluster
def test_latents_in_an_object_store_are_those_of_a_disk(tmp_path: Path, cluster: Cluster) -> None:
    images = f"s3://{BUCKET}/images"
    for root in (images, tmp_path / "images"):
        write_squares(root, "train", 5)
    write_kl_autoencoder(tmp_path / "sd")
    latents = f"s3://{BUCKET}/latents"
    settings = ("--model", tmp_path / "sd", "--resolution", 32, "--views", 2)
    written = cluster.run("encode_latents", "--data", images, *settings, "--out", latents)
    assert "5 samples x 2 views in 2 shards (2 written, 0 verified)" in written
    assert lint_shards(latents).problems == []
    assert _encoded_alone(tmp_path / "images", tmp_path / "sd", tmp_path / "latents") == 2
    assert _contents(latents) == _contents(tmp_path / "latents")
    assert _encoded_alone(images, tmp_path / "sd", latents) == 0


def test_object_store_that_cannot_be_written_is_a_clear_error(garden: Path, s3: dict[str, str]) -> None:
    with pytest.raises(DigSegError, match=r"^s3://nowhere/x cannot be written: .*bucket"):
        plan_split("folder", garden, "train", "s3://nowhere/x")
    with pytest.raises(DigSegError, match=r"^nonsense://x cannot be written: .*nonsense"):
        plan_split("folder", garden, "train", "nonsense://x")


def _sharded_alone(garden: Path, out: Path) -> Path:
    plan = plan_split("folder", garden, "train", out, samples_per_shard=2)
    finish_split(plan, [make_shard(job) for job in plan.jobs])
    return out


def _encoded_alone(images: str | Path, model: Path, out: str | Path) -> int:
    """Encode as the job of the test does, in this process; how many shards were written."""
    data = DataConfig(root=str(images), corpora=[MixtureEntry(name="squares")], crop_size=32, short_side=32)
    (plan,) = plan_latents(Settings(data, autoencoder_of(str(model)), str(out), views=2))
    results = [make_latent_shard(job) for job in plan.jobs]
    publish_latents(plan, results)
    return sum(result.written for result in results)


def _contents(root: str | Path) -> dict[str, bytes]:
    files, base = fsspec.core.url_to_fs(str(root))
    return {path.removeprefix(f"{base}/"): files.cat_file(path) for path in files.find(base)}
