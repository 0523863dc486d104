"""A tiny world for tests: shards of painted squares, an exported model with random weights, and its
registration."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from shard_writing import write_split

from digseg.config import Config
from digseg.data.format import Manifest
from digseg.model import build_segmenter
from digseg.model.export import LoadedModel, export_model, model_card
from digseg.model.text import build_text_table, load_text_encoder
from digseg.registry.models import ModelRef
from digseg.registry.package import register_model
from digseg.registry.store import tracking_uri
from digseg.registry.tracking import MlflowRun

VOCABULARY = ("background", "square", "round hole")


@dataclass(frozen=True)
class World:
    """A finished run: shards squares/train and squares/val, an exported model, registered twice in a SQLite
    store (`challenger` is version 1, `champion` version 2)."""

    config: Config
    model_dir: Path
    tracking_uri: str
    run_id: str
    model: ModelRef

    @property
    def shards(self) -> Path:
        return Path(self.config.data.root)


@cache
def small_world(folder: Path) -> World:
    """The world of this test session, made by whoever asks first. It is shared: do not change it."""
    config = small_config(folder)
    train = write_squares(folder / "shards", "train", 6)
    write_squares(folder / "shards", "val", 11, seed=1)
    run = MlflowRun(config)
    run.start(config.model_dump(mode="json"), {"squares/train": train.digest})
    run.finish("finished")
    model_dir = export_random_model(folder / "runs" / "small" / "model", config)
    register_model(model_dir, config, run_id=run.run_id, alias="challenger")
    model = register_model(model_dir, config, run_id=run.run_id, alias="champion")
    return World(config, model_dir, tracking_uri(config), run.run_id, model)


def small_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A run below `folder` with a very small model and the split squares/train."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "small", "storage": str(folder / "runs")},
        "data": {
            "root": str(folder / "shards"),
            "corpora": [{"name": "squares"}],
            "crop_size": 32,
            "short_side": 48,
            "queries": {"max_classes": 8, "palette_size": 8},
        },
        "model": {
            "unet": {
                "block_out_channels": [16, 32],
                "attention": [False, True],
                "cross_attention_dim": 32,
                "norm_num_groups": 16,
            },
            "pathway": {"dim": 16, "head_dim": 5},
        },
        "training": {"steps": 2},
        "tracking": {"uri": f"sqlite:///{folder}/runs/mlflow.db"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Config.model_validate(values)


def write_squares(root: Path, split: str, number: int, corpus: str = "squares", seed: int = 0) -> Manifest:
    """Shards of noisy pictures of a bright square with a dark hole, in several sizes; the top rows are
    ignored."""
    random = np.random.default_rng(seed)
    samples = {f"{split}-{index:03d}": _square(random) for index in range(number)}
    return write_split(root, corpus, samples, VOCABULARY, split)


def export_random_model(directory: Path, config: Config, names: Sequence[str] = VOCABULARY) -> Path:
    """An exported model as training leaves it, with the weights that it starts from."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    encoder = load_text_encoder(config.model)
    table = build_text_table(sorted(names), encoder)
    segmenter = build_segmenter(config, encoder)
    segmenter.pathway.text_mean.copy_(table.mean)
    model = LoadedModel(segmenter, model_card(config, table, encoder.fingerprint, {"step": 0}), encoder)
    return export_model(directory, model, segmenter.state_dict())


def picture_bytes(height: int = 50, width: int = 70, file_format: str = "PNG", seed: int = 0) -> bytes:
    """The bytes of an image file of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=file_format)
    return buffer.getvalue()


def _square(random: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    height, width = (int(side) for side in random.integers(40, 72, size=2))
    mask = np.zeros((height, width), np.uint8)
    top, left = (int(place) for place in random.integers(4, 12, size=2))
    mask[top : top + 24, left : left + 24] = 1
    mask[top + 8 : top + 16, left + 8 : left + 16] = 2
    brightness = np.array([60, 200, 20])[mask]
    image = brightness[..., None] + random.normal(0, 12, (height, width, 3))
    mask[:2] = 255
    return image.clip(0, 255).astype(np.uint8), mask
