"""The cache of remote shards, over a real S3 server."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from s3_server import BUCKET, start_s3
from shard_writing import data_config, noise_samples, write_split

from digseg.data.cache import ShardCache
from digseg.data.corpus import ShardedCorpus
from digseg.data.format import ShardEntry
from digseg.data.training_data import TrainingData
from digseg.errors import DigSegError

ROOT = f"s3://{BUCKET}/corpora"
SAMPLES = noise_samples(24, 3, size=(90, 120))
VOCABULARY = ("sand", "rock", "moss")


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """A server that holds six shards of four samples."""
    with start_s3() as environment:
        write_split(ROOT, "shore", SAMPLES, VOCABULARY)
        yield environment


@pytest.fixture
def shard_bytes(s3: dict[str, str]) -> int:
    return max(shard.bytes for shard in ShardedCorpus(ROOT, "shore", "train").manifest.shards)


def opened(cache: ShardCache, root: str = ROOT) -> ShardedCorpus:
    return ShardedCorpus(root, "shore", "train", cache=cache)


def names(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.directory.iterdir() if path.name != ".lock"}


def test_fetched_shards_are_read_here_and_others_there(tmp_path: Path, s3: dict[str, str]) -> None:
    root = f"s3://{BUCKET}/vanishing"
    write_split(root, "shore", SAMPLES, VOCABULARY)
    corpus = opened(ShardCache(tmp_path, 10**9), root)
    assert corpus.fetch(1)
    corpus.key(0), corpus.key(4)  # the indexes
    fsspec.filesystem("s3").rm([f"{root}/shore/train/{shard.name}" for shard in corpus.manifest.shards])
    for number in range(4, 8):
        np.testing.assert_array_equal(corpus.read(number).image, SAMPLES[f"k{number:03d}"][0])
    with pytest.raises(DigSegError, match="is gone"):
        corpus.read(0)


def test_least_recently_read_shards_make_room(tmp_path: Path, shard_bytes: int) -> None:
    cache = ShardCache(tmp_path, 3 * shard_bytes)
    corpus = opened(cache)
    tars = [f"{shard.sha256}.tar" for shard in corpus.manifest.shards]
    assert all(corpus.fetch(shard) for shard in range(3))
    corpus.read(1)  # of shard 0
    assert corpus.fetch(3)
    assert names(cache) == {tars[0], tars[2], tars[3]}
    assert corpus.fetch(2)  # is there, and counts as read
    assert corpus.fetch(1)
    assert names(cache) == {tars[1], tars[2], tars[3]}


def test_shard_with_other_bytes_is_not_kept(
    tmp_path: Path, s3: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    root = f"s3://{BUCKET}/torn"
    write_split(root, "shore", SAMPLES, VOCABULARY)
    path = f"{root}/shore/train/shore-train-000002.tar"
    store = fsspec.filesystem("s3")
    content = bytearray(store.cat_file(path))
    content[2000] ^= 0xFF
    store.pipe_file(path, bytes(content))
    cache = ShardCache(tmp_path, 10**9)
    corpus = opened(cache, root)
    with caplog.at_level(logging.WARNING):
        assert not corpus.fetch(2)
        assert not corpus.fetch(2)
    assert names(cache) == set()
    assert [record.getMessage() for record in caplog.records if record.name == "digseg.data.cache"] == [
        f"not kept in data.cache_dir, read sample by sample instead: {path} has another sha256 than the manifest says"
    ]
    assert corpus.read(9).key == "k009"


def test_shard_that_rots_in_the_cache_is_dropped_and_read_from_the_store(tmp_path: Path, s3: dict[str, str]) -> None:
    cache = ShardCache(tmp_path, 10**9)
    corpus = opened(cache)
    corpus.fetch(0)
    (tar,) = cache.directory.glob("*.tar")
    content = bytearray(tar.read_bytes())
    content[corpus.stored(1).entry.start + 600] ^= 0xFF
    tar.write_bytes(content)
    np.testing.assert_array_equal(corpus.read(1).image, SAMPLES["k001"][0])
    assert names(cache) == set()


def test_shard_larger_than_the_cache_is_read_by_ranges(
    tmp_path: Path, shard_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = opened(ShardCache(tmp_path, shard_bytes // 2))
    with caplog.at_level(logging.WARNING):
        assert not corpus.fetch(0)
    assert "bytes, data.cache_bytes is" in caplog.text
    np.testing.assert_array_equal(corpus.read(1).image, SAMPLES["k001"][0])


@pytest.mark.cluster
def test_processes_that_race_get_right_samples_within_the_bound(
    tmp_path: Path, s3: dict[str, str], shard_bytes: int
) -> None:
    run_users("race", tmp_path, 3 * shard_bytes, s3)
    check_content(tmp_path)


@pytest.mark.cluster
def test_killed_processes_leave_nothing_wrong_and_nothing_in_the_way(
    tmp_path: Path, s3: dict[str, str], shard_bytes: int
) -> None:
    left_half_done = int(run_users("kill", tmp_path, 4 * shard_bytes, s3))
    assert left_half_done > 0
    check_content(tmp_path)
    corpus = opened(ShardCache(tmp_path, 4 * shard_bytes))
    assert all(corpus.fetch(shard) for shard in range(6))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_full_disk_says_what_to_do_and_leaves_nothing(tmp_path: Path, s3: dict[str, str], shard_bytes: int) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * shard_bytes}", "tmpfs", tmp_path]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        cache = ShardCache(tmp_path, 10**9)
        corpus = opened(cache)
        corpus.fetch(0)
        with pytest.raises(DigSegError, match=r"data\.cache_dir .* cannot take s3://.*: No space left on device; make"):
            [corpus.fetch(shard) for shard in range(1, 6)]
        assert all(name.endswith(".tar") for name in names(cache))
        check_content(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_unusable_folder_is_named(tmp_path: Path, s3: dict[str, str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DigSegError, match=r"data\.cache_dir .*/file cannot take s3://"):
        opened(ShardCache(tmp_path / "file", 10**9)).fetch(0)


ENTRY = ShardEntry(name="shard.tar", samples=1, bytes=4, sha256="f" * 64, index_sha256="", hashes_sha256="")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may act for another user")
def test_shard_that_another_user_fetched_is_read() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / f"{ENTRY.sha256}.tar").write_bytes(b"data")
        os.seteuid(65534)
        try:
            assert ShardCache(folder, 10).read_range(ENTRY, 1, 3) == b"at"
        finally:
            os.seteuid(0)


def test_shard_whose_file_opens_but_cannot_be_read_is_left_to_the_store(tmp_path: Path) -> None:
    (tmp_path / f"{ENTRY.sha256}.tar").mkdir()
    assert ShardCache(tmp_path, 10).read_range(ENTRY, 1, 3) is None


def test_shards_of_this_window_come_before_those_of_the_next_as_far_as_they_fit(
    tmp_path: Path, s3: dict[str, str], shard_bytes: int
) -> None:
    def ahead(position: int, cache_bytes: int) -> list[int]:
        run = data_config(ROOT, [{"name": "shore"}], shuffle_window=2, cache_dir=str(tmp_path), cache_bytes=cache_bytes)
        return [shard for _, shard in TrainingData(run.data, seed=0).shards_ahead(position)]

    run = data_config(ROOT, [{"name": "shore"}], shuffle_window=2)
    data = TrainingData(run.data, seed=0)
    read = [int(data.sample(position).key[-3:]) // 4 for position in range(16)]
    assert ahead(0, 10**9) == [*dict.fromkeys(ahead(0, 10**9))]
    assert set(ahead(0, 10**9)[:2]) == set(read[:8])
    assert set(ahead(0, 10**9)[2:]) == set(read[8:])
    assert ahead(7, 10**9) == ahead(0, 10**9)
    assert ahead(8, 10**9)[:2] == ahead(0, 10**9)[2:]
    assert ahead(0, 3 * shard_bytes) == ahead(0, 10**9)[:3]


@pytest.mark.cluster
def test_training_from_a_store_through_the_cache_gives_the_batches_of_local_shards(
    tmp_path: Path, s3: dict[str, str]
) -> None:
    write_split(tmp_path / "local", "shore", SAMPLES, VOCABULARY)
    program = """
import hashlib, sys, time
from pathlib import Path
from shard_writing import data_config
from digseg.data.loader import training_batches
from digseg.data.training_data import TrainingData

def digest(root, workers, **data):
    run = data_config(root, [{"name": "shore"}], workers=workers, shuffle_window=2, **data)
    found = hashlib.sha256()
    for batch in training_batches(TrainingData(run.data, seed=3), run, 0, 1, 0, 9):
        found.update(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes() + str(batch.keys).encode())
        time.sleep(0.1)
    return found.hexdigest()

if __name__ == "__main__":
    remote, local, cache = sys.argv[1:]
    for workers in (0, 2):
        folder = Path(cache) / str(workers)
        assert digest(remote, workers, cache_dir=str(folder)) == digest(local, 0)
        assert len(list(folder.glob("*.tar"))) == 6
"""
    script = tmp_path / "train.py"
    script.write_text(program)
    run_python(s3, str(script), ROOT, str(tmp_path / "local"), str(tmp_path / "cache"))


def run_users(task: str, directory: Path, max_bytes: int, environment: dict[str, str]) -> str:
    return run_python(environment, "-m", "cache_users", task, ROOT, str(directory), str(max_bytes))


def run_python(environment: dict[str, str], *arguments: str) -> str:
    """A process of its own: loader processes and forks then inherit nothing of this one's threads and clients."""
    here = Path(__file__).resolve()
    path = os.pathsep.join(map(str, (here.parents[2], here.parents[1], here.parent)))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def check_content(directory: Path) -> None:
    """Every shard has the bytes that its name promises."""
    for tar in directory.glob("*.tar"):
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == tar.stem
