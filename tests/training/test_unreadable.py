"""The count of unreadable samples, in one process and in two."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from ranks import run_ranks
from shard_writing import damage_samples, data_config, noise_samples, write_split

from digseg.data.loader import training_batches
from digseg.data.training_data import TrainingData
from digseg.errors import DigSegError
from digseg.training.unreadable import UnreadableSamples
from digseg.training.world import World

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty samples, of which ten cannot be read."""
    root = tmp_path_factory.mktemp("damaged")
    write_split(root, "shore", noise_samples(40, 3), ("sand", "rock", "moss"), samples_per_shard=10)
    damage_samples(root, "shore", range(0, 40, 4))
    return root


def test_samples_are_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    unreadable = UnreadableSamples(World(), limit=3)
    with caplog.at_level(logging.WARNING):
        unreadable.add({"a": "a is torn"})
        unreadable.add({"a": "a is torn", "b": "b is torn"})
        assert unreadable.share() == 2
        unreadable.add({"a": "a is torn"})
        assert unreadable.share() == 2
    assert [record.getMessage() for record in caplog.records] == [
        "unreadable and replaced: a is torn",
        "unreadable and replaced: b is torn",
    ]


def test_run_that_goes_on_counts_from_where_it_was() -> None:
    before = UnreadableSamples(World(), limit=1)
    before.add({"a": "a is torn"})
    before.share()
    after = UnreadableSamples(World(), limit=1, known=before.keys)
    after.add({"a": "a is torn"})
    assert after.share() == 1
    after.add({"b": "b is torn"})
    with pytest.raises(
        DigSegError,
        match=r"2 samples could not be read \(data\.max_corrupt is 1\), the last: b is torn; make the shards again",
    ):
        after.share()


@pytest.mark.cluster
def test_two_ranks_count_alike_and_stop_together_where_one_would(root: Path, tmp_path: Path) -> None:
    alone = _counts(root, World())
    run_ranks(_count_rank, 2, tmp_path, root, tmp_path)
    assert "samples could not be read (data.max_corrupt is 8)" in alone[-1]
    assert 2 < len(alone) < STEPS
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == alone


def _count_rank(world: World, root: Path, folder: Path) -> None:
    (folder / str(world.rank)).write_text(json.dumps(_counts(root, world)))


def _counts(root: Path, world: World) -> list[str]:
    """The count after each step, and the error that ended the run."""
    run = data_config(root, [{"name": "shore"}], max_corrupt=8)
    data = TrainingData(run.data, seed=1)
    unreadable = UnreadableSamples(world, run.data.max_corrupt)
    counts = []
    for batch in training_batches(data, run, world.rank, world.world_size, 0, STEPS):
        unreadable.add(batch.corrupt)
        try:
            counts.append(str(unreadable.share()))
        except DigSegError as error:
            return [*counts, str(error)]
    return counts
