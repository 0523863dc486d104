"""Processes that use one cache, for the tests: ``python cache_users.py race|kill ROOT CACHE BYTES``."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from digseg.data.cache import ShardCache
from digseg.data.corpus import ShardedCorpus

PROCESSES, TURNS, KILLS = 4, 40, 10


def race(corpus: ShardedCorpus, cache: ShardCache) -> None:
    """Processes fetch and read at random while this one watches the bound."""
    expected = [corpus.read(number).image.tobytes() for number in range(len(corpus))]
    children = [_forked(_fetch_and_read, corpus, expected, seed) for seed in range(PROCESSES)]
    while children:
        assert _bytes_of(cache) <= cache.max_bytes, "over the bound"
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0, f"a process ended with {status}"
                children.remove(child)
        time.sleep(0.001)


def kill(corpus: ShardedCorpus, cache: ShardCache) -> None:
    """Processes are killed while they fetch; most of them in the middle of a shard."""
    parts = 0
    for round_number in range(KILLS):
        child = _forked(_fetch_and_read, corpus, None, round_number)
        time.sleep(random.Random(round_number).uniform(0.05, 0.3))
        while not any(cache.directory.glob("*.part")) and os.waitpid(child, os.WNOHANG)[0] == 0:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        parts += len(list(cache.directory.glob("*.part")))
        assert _bytes_of(cache) <= cache.max_bytes, "over the bound"
    print(parts)


def _forked(function: object, *arguments: object) -> int:
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)  # type: ignore[operator]
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def _fetch_and_read(corpus: ShardedCorpus, expected: list[bytes] | None, seed: int) -> None:
    """Fetch shards at random, for ever where nothing is ``expected`` of the samples."""
    draws = random.Random(seed)
    turn = 0
    while expected is None or turn < TURNS:
        turn += 1
        corpus.fetch(draws.randrange(len(corpus.manifest.shards)))
        if expected is not None:
            number = draws.randrange(len(corpus))
            assert corpus.read(number).image.tobytes() == expected[number], f"sample {number} is another"


def _bytes_of(cache: ShardCache) -> int:
    total = 0
    for path in cache.directory.iterdir() if cache.directory.exists() else []:
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


if __name__ == "__main__":
    task, root, directory, max_bytes = sys.argv[1:]
    used = ShardCache(Path(directory), int(max_bytes))
    opened = ShardedCorpus(root, "shore", "train", cache=used)
    {"race": race, "kill": kill}[task](opened, used)
