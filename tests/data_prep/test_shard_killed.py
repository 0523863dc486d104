"""kill -9 in the middle of sharding: running it again ends with the bytes of a job that nobody disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from corpus_files import digests, noise_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = 24
KILLS = 10
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_corpus(tmp_path_factory.mktemp("killed") / "garden", SAMPLES, height=48, width=64)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(REPOSITORY)}


def test_kill_before_any_file_operation_leaves_what_the_next_run_completes(garden: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_sharding.py")), str(garden), str(tmp_path / "out")],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    *disturbed, undisturbed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    # Two shards of three files, two lists: each is opened under another name and renamed at least.
    assert len(undisturbed) == 8
    assert len(disturbed) > 2 * 8
    assert [files for files in disturbed if files != undisturbed] == []


@pytest.mark.timeout(1800)
@pytest.mark.cluster
def test_job_killed_ten_times_ends_with_the_bytes_of_an_undisturbed_one(garden: Path, tmp_path: Path) -> None:
    job = [sys.executable, "data_prep/shard.py", "--corpus", "folder", "--root", str(garden), "--split", "train"]
    job += ["--samples-per-shard", "1", "--out"]
    subprocess.run([*job, str(tmp_path / "calm")], cwd=REPOSITORY, env=environment(), check=True)
    calm = digests(tmp_path / "calm")
    # So few that the last of the jobs still has work to do when it is killed.
    moments = random.Random(0)
    for _ in range(KILLS):
        while not _killed_after(moments.randint(1, len(calm) // (2 * KILLS)), job, tmp_path / "out"):
            # A busy machine may not let the test see the files in time: the job is to be killed at its work.
            shutil.rmtree(tmp_path / "out")
    subprocess.run([*job, str(tmp_path / "out")], cwd=REPOSITORY, env=environment(), check=True)
    assert digests(tmp_path / "out") == calm


def _killed_after(new_files: int, job: list[str], out: Path) -> bool:
    """Run the job and kill -9 it and all processes of its Ray session once it has written ``new_files`` files.

    False where it ended before it was killed.
    """
    before = _count(out)
    running = subprocess.Popen(
        [*job, str(out)], cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    whole = psutil.Process(running.pid)
    deadline = time.monotonic() + TIMEOUT_S
    while running.poll() is None and _count(out) < before + new_files:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    if running.poll() is not None:
        assert running.returncode == 0
        return False
    processes = [whole, *whole.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ended with its parent
            process.send_signal(signal.SIGKILL)
    ended = running.wait()
    psutil.wait_procs(processes)
    assert ended == 0 or (ended == -signal.SIGKILL and len(processes) > 2)
    return ended != 0


def _count(out: Path) -> int:
    return sum(path.is_file() for path in out.rglob("*"))
