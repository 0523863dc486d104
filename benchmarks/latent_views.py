"""What training on stored views costs in quality, against images augmented anew at every step.

Small sample corpora are drawn, and the model of ``configs/demo.yaml``, made narrower, is trained on them for equal
steps: on images, and on the latents of 1, 2, 4 and 8 stored views of each, with two seeds (of weights, order, queries
and views). Figures are mIoU on the validation splits, the mean over the corpora.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shared import add_json, configured, report

from data_prep.encode_latents import Settings, encode_latents
from digseg.cluster.evaluate import evaluate_models
from digseg.cluster.runtime import ray_session
from digseg.config import Config
from digseg.console import say
from digseg.data.format import load_manifest
from digseg.errors import run_main
from digseg.training.trainer import Trainer
from digseg.training.world import World
from launch.preparation import ensure_shards


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, default=20, help="images a domain; a fifth of them is for validation")
    parser.add_argument("--steps", type=int, default=200, help="of 8 images each")
    parser.add_argument("--crop", type=int, default=64, help="pixels a side of what is trained on")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    add_json(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="latent-views-") as folder, ray_session():
        figures = _measure(Path(folder), options)
    report(figures, options.json)


def _measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    base = _config(folder, options)
    ensure_shards(base)
    arms = [0, *options.views]  # 0: images
    runs = [(views, seed) for seed in options.seeds for views in arms]
    models = [_trained(base, folder, views, seed) for views, seed in runs]
    corpora = [(entry.name, entry.split) for entry in base.evaluation.corpora]
    evaluations = evaluate_models(models, base.data.root, corpora, cluster=base.cluster)
    scores = {run: float(done.result["mean_iou"]) for run, done in zip(runs, evaluations, strict=True)}

    images = sum(load_manifest(base.data.root, entry.name, entry.split).samples for entry in base.data.corpora)
    epochs = options.steps * base.training.global_batch_size / images
    say(f"{images} images of {len(base.data.corpora)} corpora, {options.steps} steps, about {epochs:.0f} epochs")
    say("mIoU                  mean   " + "   ".join(f"seed {seed}" for seed in options.seeds))
    means: dict[str, float] = {}
    for views in arms:
        name = f"{views} stored views" if views else "images, augmented"
        found = [scores[views, seed] for seed in options.seeds]
        means[name] = statistics.mean(found)
        say(f"{name:20} {means[name]:6.3f}   " + "   ".join(f"{score:6.3f}" for score in found))
    return {
        "images": images,
        "steps": options.steps,
        "miou": {str(views) if views else "images": [scores[views, seed] for seed in options.seeds] for views in arms},
    }


def _config(folder: Path, options: argparse.Namespace) -> Config:
    size = options.crop * 3 // 2
    settings = {
        "run.storage": folder / "runs",
        "prepare.root": folder / "corpora",
        "prepare.sample_corpora.images_per_domain": options.images,
        "prepare.sample_corpora.size": size,
        "data.root": folder / "shards",
        "data.crop_size": options.crop,
        "data.short_side": size,
        "model.unet.block_out_channels": [16, 32, 48, 64],
        "model.unet.norm_num_groups": 16,
        "training.steps": options.steps,
        "training.checkpoint_every": options.steps,
        "cluster.backend": "local",
        "tracking.enabled": "false",
    }
    return configured(settings)


def _trained(base: Config, folder: Path, views: int, seed: int) -> Path:
    """The exported model of one run."""
    data = base.data
    if views:
        out = folder / f"latents-{views}-{seed}"
        encode_latents(Settings(data, base.model.autoencoder, str(out), views, seed))
        data = data.model_copy(update={"latents": str(out)})
    run = base.run.model_copy(update={"name": f"views-{views}-seed-{seed}", "seed": seed})
    result = Trainer(base.model_copy(update={"data": data, "run": run}), World()).train()
    say(f"{run.name}: loss {result.last_loss:.3f} at the end")
    return Path(result.model_dir)


if __name__ == "__main__":
    run_main(main)
