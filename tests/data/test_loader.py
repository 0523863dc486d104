import itertools
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_writing import damage_samples, data_config, noise_samples, write_split

from digseg.config import Config
from digseg.data.loader import Batch, SharedPixels, training_batches
from digseg.data.queries import class_weights
from digseg.data.training_data import TrainingData, TrainingSample
from digseg.errors import DigSegError

SHORE = ("sand", "rock", "moss")
CELLS = ("background", "nucleus")
WORDINGS = {"synonyms": {"shore": {"moss": ["lichen"]}, "cells": {"nucleus": ["cell core"]}}, "templates": ["some {}"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_split(root, "shore", noise_samples(10, 3), SHORE)
    write_split(root, "cells", noise_samples(7, 2, seed=1, size=(30, 30)), CELLS, domain="medical")
    return root


def config(root: Path, batch: int = 8, **data: object) -> Config:
    return data_config(root, [{"name": "shore", "weight": 2}, {"name": "cells"}], batch, **data)


_TEXTS = 4


def batches(config: Config, rank: int = 0, world_size: int = 1, start: int = 0, steps: int = 4) -> list[Batch]:
    return list(training_batches(TrainingData(config.data, seed=3), config, rank, world_size, start, steps))


def rows(batch: Batch) -> list[tuple[Any, ...]]:
    """Everything of each sample but the padding, which depends on its neighbours; texts are at ``_TEXTS``."""
    used = (batch.query_ids >= 0).sum(dim=1)
    return [
        (
            batch.keys[row],
            int(batch.positions[row]),
            batch.images[row].numpy().tobytes(),
            batch.labels[row].numpy().tobytes(),
            tuple(batch.query_ids[row, : used[row]].tolist()),
            tuple(batch.colour_ids[row, : used[row]].tolist()),
            tuple(batch.class_weights[row, : used[row]].tolist()),
        )
        for row in range(len(batch))
    ]


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> list[tuple[Any, ...]]:
    """What 16 steps of one process see: several epochs of both corpora, in all wordings."""
    found = order_of(root, [Stretch(16, 1)])
    asked = {text for row in found for text in row[_TEXTS]}
    assert asked == set(range(2 * len(TrainingData(config(root, queries=WORDINGS).data, seed=3).names)))
    return found


def test_batch_has_the_promised_shapes_and_ranges(root: Path) -> None:
    data = TrainingData(config(root).data, seed=3)
    assert data.names == ("background", "moss", "nucleus", "rock", "sand")
    for batch in batches(config(root)):
        slots = batch.query_ids.shape[1]
        assert batch.images.shape == (8, 3, 32, 32)
        assert batch.labels.shape == (8, 32, 32)
        assert batch.images.dtype == batch.labels.dtype == torch.uint8
        assert batch.colour_ids.shape == batch.class_weights.shape == (8, slots)
        assert batch.query_ids.max() < len(data.names)
        padded = batch.query_ids < 0
        assert (batch.colour_ids[padded] == 0).all()
        assert (batch.class_weights[padded] == 1).all()
        for row in range(8):
            labels = batch.labels[row]
            assert set(labels.unique().tolist()) <= {*range(int((batch.query_ids[row] >= 0).sum())), 255}


@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_are_the_same_for_every_world_size(root: Path, world_size: int) -> None:
    alone = [row for batch in batches(config(root)) for row in rows(batch)]
    ranks = [batches(config(root), rank, world_size) for rank in range(world_size)]
    together = [row for step in zip(*ranks, strict=True) for batch in step for row in rows(batch)]
    assert together == alone


@dataclass(frozen=True)
class Stretch:
    """Steps that a run takes before it is interrupted, with a number of ranks and of loader processes for each."""

    steps: int
    ranks: int
    workers: int = 0


def order_of(root: Path, stretches: Sequence[Stretch]) -> list[tuple[Any, ...]]:
    """All that is trained on, in order, by a run that starts anew for every stretch, with nothing but its step."""
    found, step = [], 0
    for stretch in stretches:
        run = config(root, workers=stretch.workers, batch=12, queries=WORDINGS)
        ranks = [batches(run, rank, stretch.ranks, step, stretch.steps) for rank in range(stretch.ranks)]
        found += [row for parts in zip(*ranks, strict=True) for batch in parts for row in rows(batch)]
        step += stretch.steps
    return found


@settings(max_examples=12)
@given(stretches=st.lists(st.builds(Stretch, st.integers(0, 4), st.sampled_from([1, 2, 3, 4])), min_size=2, max_size=4))
def test_interrupted_run_sees_the_samples_of_an_undisturbed_one_in_order(
    undisturbed: list[tuple[Any, ...]], root: Path, stretches: list[Stretch]
) -> None:
    found = order_of(root, stretches)
    assert found == undisturbed[: len(found)]


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_number_of_loader_processes_changes_nothing_over_two_resumes(
    undisturbed: list[tuple[Any, ...]], root: Path
) -> None:
    found = order_of(root, [Stretch(1, 1), Stretch(3, 1, workers=1), Stretch(2, 2), Stretch(6, 1, workers=4)])
    assert found == undisturbed[: len(found)]


def test_batches_are_made_ahead_while_the_step_computes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    asked_for: list[Future[Any]] = []
    samples, submit = TrainingData.samples, ThreadPoolExecutor.submit

    def submitted(*arguments: Any) -> Future[Any]:
        asked_for.append(submit(*arguments))
        return asked_for[-1]

    def recorded(data: TrainingData, positions: Sequence[int]) -> list[TrainingSample]:
        made.extend(positions)
        return samples(data, positions)

    monkeypatch.setattr(TrainingData, "samples", recorded)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submitted)
    run = config(root, prefetch=3)
    iterator = training_batches(TrainingData(run.data, seed=3), run, 0, 1, 0, 9)
    next(iterator)
    assert len(asked_for) == 4  # the batch that was taken and three more
    assert not wait(asked_for, timeout=20).not_done
    assert made == list(range(32))
    assert sum(1 for _ in iterator) == 8


def test_batches_that_nobody_wants_any_more_end_their_thread(root: Path) -> None:
    before = threading.active_count()
    run = config(root)
    iterator = training_batches(TrainingData(run.data, seed=3), run, 0, 1, 0, 9)
    next(iterator)
    assert threading.active_count() == before + 1
    del iterator
    assert threading.active_count() == before


@pytest.mark.cluster
@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_the_thread_or_a_process_reaches_who_waits_for_the_batch(tmp_path: Path, workers: int) -> None:
    run = data_config(damaged_root(tmp_path, 10), [{"name": "shore"}], workers=workers)
    with pytest.raises(DigSegError, match="10 samples in a row cannot be read") as caught:
        batches(run)
    assert "Traceback" not in str(caught.value)


@pytest.mark.cluster
def test_pixels_that_were_taken_stay_while_loader_processes_go_on(root: Path) -> None:
    run = config(root, workers=1, prefetch=1)
    iterator = training_batches(TrainingData(run.data, seed=3), run, 0, 1, 0, 8)
    first = next(iterator)
    taken = rows(first)
    assert [rows(batch) for batch in iterator] == [rows(batch) for batch in batches(config(root), start=1, steps=7)]
    assert rows(first) == taken == rows(batches(config(root), steps=1)[0])


def test_too_little_shared_memory_is_said() -> None:
    with pytest.raises(DigSegError, match=r"bytes of shared memory .* lower data.workers or data.prefetch"):
        SharedPixels(slots=10**6, size=10**3, crop_size=512)


def test_cache_changes_nothing(root: Path) -> None:
    plain = [rows(batch) for batch in batches(config(root))]
    assert [rows(batch) for batch in batches(config(root, decoded_cache_mb=1))] == plain


def test_steps_consume_consecutive_positions(root: Path) -> None:
    seen = torch.cat([batch.positions for batch in batches(config(root), start=2, steps=3)])
    assert seen.tolist() == list(range(16, 40))


def test_seed_changes_order_and_crops(root: Path) -> None:
    one, other = (TrainingData(config(root).data, seed) for seed in (1, 2))
    assert [one.sample(p).key for p in range(20)] != [other.sample(p).key for p in range(20)]


def test_epoch_visits_each_sample_once_and_the_next_in_another_order(root: Path) -> None:
    data = TrainingData(data_config(root, [{"name": "shore"}]).data, seed=0)
    keys = [data.sample(position).key for position in range(20)]
    assert len(set(keys[:10])) == len(set(keys[10:])) == 10
    assert keys[:10] != keys[10:]
    assert all(key.startswith("shore/train/k") for key in keys)


def test_mixture_weights_decide_the_share_of_each_corpus(root: Path) -> None:
    data = TrainingData(config(root).data, seed=0)
    keys = [data.sample(position).key for position in range(90)]
    assert abs(sum(key.startswith("shore") for key in keys) - 60) <= 2


def test_temperature_takes_the_place_of_weights(root: Path) -> None:
    run = data_config(root, [{"name": "shore"}, {"name": "cells"}], temperature=1.0)
    data = TrainingData(run.data, seed=0)
    keys = [data.sample(position).key for position in range(data.order.mixture.period)]
    assert sum(key.startswith("shore") for key in keys) * 17 == 10 * len(keys)


def test_window_decides_how_many_shards_are_touched_at_a_time(root: Path) -> None:
    run = data_config(root, [{"name": "shore"}], shuffle_window=1)
    data = TrainingData(run.data, seed=0)
    numbers = [int(data.sample(position).key[-3:]) // 4 for position in range(10)]
    assert sorted(numbers) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert len([1 for one, other in itertools.pairwise(numbers) if one != other]) == 2


def test_loading_leaves_the_global_random_state_alone(root: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    batches(config(root), steps=1)
    assert torch.equal(torch.rand(1), expected)


def test_weights_are_those_of_the_slot_frequencies(root: Path) -> None:
    run = config(root)
    data = TrainingData(run.data, seed=3)
    batch = batches(run, steps=1)[0]
    for row, position in enumerate(batch.positions.tolist()):
        expected = class_weights(data.sample(position).query.frequencies, 0.5, 5.0)
        np.testing.assert_array_equal(batch.class_weights[row, : len(expected)].numpy(), expected)


def test_micro_batches_join_to_the_batch(root: Path) -> None:
    batch = batches(config(root), steps=1)[0]
    parts = list(batch.split(3))
    assert [len(part) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert [key for part in parts for key in part.keys] == batch.keys


def test_batch_moves_to_a_device(root: Path) -> None:
    batch = batches(config(root), steps=1)[0]
    ready = batch.to("cpu")
    assert ready.labels.dtype == torch.int64
    assert torch.equal(ready.labels, batch.labels)
    torch.testing.assert_close(ready.images, batch.images / 127.5 - 1)
    assert torch.equal(ready.to("cpu").images, ready.images)
    moved = batch.to("meta")
    assert moved.images.device.type == moved.labels.device.type == moved.query_ids.device.type == "meta"
    assert moved.positions.device.type == "cpu"


def test_data_travels_to_other_processes_without_its_cache(root: Path) -> None:
    data = TrainingData(config(root, decoded_cache_mb=8).data, seed=0)
    data.sample(0)
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 100_000
    np.testing.assert_array_equal(copy.sample(0).image, data.sample(0).image)


def test_world_that_does_not_divide_the_batch_is_refused(root: Path) -> None:
    with pytest.raises(DigSegError, match="3 ranks cannot share evenly"):
        batches(config(root), world_size=3)


def damaged_root(folder: Path, damaged: int) -> Path:
    """Ten samples of which the first `damaged` are corrupt."""
    write_split(folder, "shore", noise_samples(10, 3), SHORE, samples_per_shard=10)
    damage_samples(folder, "shore", range(damaged))
    return folder


def test_corrupt_samples_are_replaced_alike_everywhere_and_named(tmp_path: Path) -> None:
    run = data_config(damaged_root(tmp_path, 2), [{"name": "shore"}])
    met = batches(run)
    alone = [row for batch in met for row in rows(batch)]
    assert len(alone) == 32
    assert not any(str(row[0]).endswith(("k000", "k001")) for row in alone)
    reasons = {key: reason for batch in met for key, reason in batch.corrupt.items()}
    assert reasons.keys() == {"shore/train/k000", "shore/train/k001"}
    assert "'k001'" in reasons["shore/train/k001"]
    assert "crc32 differs" in reasons["shore/train/k001"]
    ranks = [batches(run, rank, 2) for rank in range(2)]
    assert [row for step in zip(*ranks, strict=True) for batch in step for row in rows(batch)] == alone


def test_replacement_is_the_next_sample_of_the_epoch(tmp_path: Path) -> None:
    run = data_config(damaged_root(tmp_path / "damaged", 1), [{"name": "shore"}]).data
    whole = data_config(damaged_root(tmp_path / "whole", 0), [{"name": "shore"}]).data
    due = [TrainingData(whole, seed=0).sample(position).key for position in range(10)]
    came = [TrainingData(run, seed=0).sample(position).key for position in range(10)]
    hole = due.index("shore/train/k000")
    assert came == [*due[:hole], due[(hole + 1) % 10], *due[hole + 1 :]]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match="no shards of corpus 'shore', split 'train'"):
        TrainingData(data_config(tmp_path, [{"name": "shore"}]).data, seed=0)
