"""Sharding that is killed right before each of its file operations in turn, and then run again undisturbed.

    python killed_sharding.py CORPUS OUT

One process, no Ray: that makes the operations the same ones in the same order every time. Prints a JSON line for each
moment: the files below OUT and their digests, when the second run has ended.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy.fftpack  # noqa: F401 - ImageHash imports it when first used, which would be in every child
from corpus_files import digests

from data_prep.shard import finish_split, plan_split
from data_prep.shard_job import make_shard

SAMPLES_PER_SHARD = 12
CHANGING = ("open", "os.rename", "os.remove", "os.mkdir")


def shard(corpus: str, out: str) -> None:
    plan = plan_split("folder", corpus, "train", out, SAMPLES_PER_SHARD)
    finish_split(plan, [make_shard(job) for job in plan.jobs])


def in_a_child(work: Callable[[], None]) -> bool:
    """Whether ``work`` ended; False where its process was killed."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return status == 0


def kill_before(moment: int, out: str) -> None:
    """Kill this process right before its ``moment``-th operation that changes a file below ``out``."""
    operations = itertools.count(1)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGING or not str(arguments[0]).startswith(out):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if next(operations) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main(corpus: str, out: str) -> None:
    for moment in itertools.count(1):

        def disturbed(moment: int = moment) -> None:
            kill_before(moment, out)
            shard(corpus, out)

        ended = in_a_child(disturbed)
        if not ended:
            assert in_a_child(lambda: shard(corpus, out))
        print("\n" + json.dumps(digests(Path(out))), flush=True)
        if ended:
            return
        shutil.rmtree(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
