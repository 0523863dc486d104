"""Training batches out of stored latents: which view, what comes with it, and what is refused."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_writing import write_latents
from shard_writing import data_config, noise_samples, write_split

from digseg.config import Config
from digseg.data.corpus import ShardedCorpus
from digseg.data.loader import Batch, training_batches
from digseg.data.training_data import TrainingData
from digseg.data.transforms import as_pixels
from digseg.errors import DigSegError
from digseg.model.autoencoder import ShuffleAutoencoder

VIEWS, SHORE, CELLS = 3, 10, 7


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in ``shards``, three views of each in ``latents``."""
    root = tmp_path_factory.mktemp("latents")
    write_split(root / "shards", "shore", noise_samples(SHORE, 3), ("sand", "rock", "moss"))
    write_split(root / "shards", "cells", noise_samples(CELLS, 2, seed=1), ("background", "nucleus"), domain="medical")
    write_latents(config(root, latents=None), root / "latents", VIEWS)
    return root


def config(root: Path, number: int = 2, **data: object) -> Config:
    values = {"latents": str(root / "latents"), **data}
    corpora = [{"name": "shore", "weight": 2}, {"name": "cells"}]
    return data_config(root / "shards", corpora[:number], **values)


def batches(config: Config, rank: int = 0, world_size: int = 1, start: int = 0, steps: int = 5) -> list[Batch]:
    return list(training_batches(TrainingData(config.data, seed=3), config, rank, world_size, start, steps))


def rows(batches: list[Batch]) -> list[tuple[object, ...]]:
    found = []
    for batch in batches:
        assert batch.latents is not None
        arrays = (batch.images, batch.labels, batch.latents)
        for row, key in enumerate(batch.keys):
            found.append((key, int(batch.positions[row]), *(array[row].numpy().tobytes() for array in arrays)))
    return found


def test_latents_pixels_and_labels_are_those_of_one_view(root: Path) -> None:
    corpora = {name: ShardedCorpus(root / "latents", name, "train") for name in ("shore", "cells")}
    views = {
        f"{corpus.name}/{sample.key}": sample
        for corpus in corpora.values()
        for sample in map(corpus.read, range(len(corpus)))
    }
    data = TrainingData(config(root).data, seed=3)
    for position in range(40):
        sample = data.sample(position)
        view = views[sample.key]
        assert sample.latents is not None
        assert sample.latents.dtype == np.float16
        np.testing.assert_array_equal(sample.latents, view.latents)
        np.testing.assert_array_equal(sample.image, view.image.transpose(2, 0, 1))
        encoded = ShuffleAutoencoder(4).encode(as_pixels(torch.from_numpy(sample.image))[None])[0]
        np.testing.assert_allclose(sample.latents, encoded.numpy(), atol=5e-4)
        np.testing.assert_array_equal(sample.labels, sample.query.label_map[view.mask])


def test_every_sample_comes_once_an_epoch_and_each_of_its_views_once_in_as_many_epochs(root: Path) -> None:
    data = TrainingData(config(root, number=1).data, seed=3)
    seen: dict[str, list[str]] = defaultdict(list)
    for epoch in range(2 * VIEWS):
        keys = [data.sample(epoch * SHORE + place).key for place in range(SHORE)]
        for key in keys:
            name, _, view = key.rpartition("-v")
            seen[name].append(view)
        assert {len(views) for views in seen.values()} == {epoch + 1}
        assert len(seen) == SHORE
    for views in seen.values():
        assert sorted(views[:VIEWS]) == sorted(views[VIEWS:]) == ["0", "1", "2"]
    assert len({tuple(views) for views in seen.values()}) > 1


def test_number_of_samples_is_that_of_the_images(root: Path) -> None:
    assert TrainingData(config(root).data, seed=3).order.mixture.sizes == (SHORE, CELLS)


@pytest.mark.parametrize("start", [1, 3])
def test_resuming_at_any_step_gives_the_batches_of_an_undisturbed_run(root: Path, start: int) -> None:
    assert rows(batches(config(root), start=start, steps=5 - start)) == rows(batches(config(root))[start:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_batches_are_the_same_for_every_world_size(root: Path, world_size: int) -> None:
    ranks = [batches(config(root), rank, world_size) for rank in range(world_size)]
    together = [row for step in zip(*ranks, strict=True) for row in rows(list(step))]
    assert together == rows(batches(config(root)))


@pytest.mark.cluster
def test_loader_processes_and_the_cache_change_nothing(root: Path) -> None:
    plain = rows(batches(config(root)))
    assert rows(batches(config(root, workers=2))) == plain
    assert rows(batches(config(root, decoded_cache_mb=1))) == plain


def test_remote_latents_give_the_batches_of_local_ones(root: Path) -> None:
    write_latents(config(root, latents=None), "memory://latents/here", VIEWS)
    assert rows(batches(config(root, latents="memory://latents/here"))) == rows(batches(config(root)))


def test_batch_is_split_and_moved_with_its_latents(root: Path) -> None:
    batch = batches(config(root), steps=1)[0]
    assert batch.latents is not None
    parts = [part.latents for part in batch.split(3)]
    assert torch.equal(torch.cat([part for part in parts if part is not None]), batch.latents)
    assert batch.to("cpu").latents is not None
    pixels = batches(config(root, latents=None), steps=1)[0]
    assert pixels.latents is None
    assert next(pixels.split(3)).to("cpu").latents is None


def test_damaged_view_is_replaced_and_counted(root: Path, tmp_path: Path) -> None:
    write_latents(config(root, latents=None), tmp_path / "latents", VIEWS)
    victim = tmp_path / "latents/shore/train/shore-train-000000.tar"
    content = bytearray(victim.read_bytes())
    content[3000] ^= 1
    victim.write_bytes(content)
    found = batches(config(root, latents=str(tmp_path / "latents")), steps=15)
    corrupt = {key for batch in found for key in batch.corrupt}
    assert len(corrupt) == 1
    assert not corrupt & {key for batch in found for key in batch.keys}


def test_roots_that_are_mistaken_for_each_other_are_refused(root: Path) -> None:
    with pytest.raises(DigSegError, match=r"data\.latents .*holds the images of shore/train, not their latents"):
        TrainingData(config(root, latents=str(root / "shards")).data, seed=0)
    swapped = config(root, latents=None).data.model_copy(update={"root": str(root / "latents")})
    with pytest.raises(DigSegError, match=r"data\.root .* holds latents of shore/train; name it data\.latents"):
        TrainingData(swapped, seed=0)


def test_latents_of_this_run_are_accepted_and_the_part_that_differs_is_named(root: Path) -> None:
    identity = ShuffleAutoencoder(4).identity
    TrainingData(config(root).data, seed=0).check_autoencoder(identity)
    refused = {
        r"autoencoder factor \(latents 4, run 2\)": (config(root), ShuffleAutoencoder(2).identity),
        r"resolution, data\.crop_size \(latents 32, run 64\)": (config(root, crop_size=64), identity),
        r"data\.flip \(latents True, run False\); set the keys": (config(root, flip=False), identity),
    }
    for message, (changed, autoencoder) in refused.items():
        with pytest.raises(DigSegError, match=f"shore/train was encoded for another run.*{message}"):
            TrainingData(changed.data, seed=0).check_autoencoder(autoencoder)
