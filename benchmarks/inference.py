"""All classes in one query pass against one pass per class: speed and mIoU, and the passes that ADE20K-150 takes.

Two passes, each with half of the classes, show what merging passes costs.

The corpus is CamVid's sample (11 classes) where ``--corpora`` has it, else the drawn street scenes. Without
``--model``, two models are trained on it for equal steps: one on queries of the whole vocabulary and of parts of it, as
the demo does, and one on queries of a single class, which is the per-class method at its best. Both methods then run
through the same code on the same images, alternately; the latents of an image are encoded once, and the passes of the
per-class method go through the U-Net eight at a time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from shared import ROOT, add_json, configured, report

from digseg.config import Config, PredictionConfig
from digseg.console import say
from digseg.data.corpus import Sample, ShardedCorpus
from digseg.errors import run_main
from digseg.evaluation.classes import check_classes
from digseg.evaluation.evaluate import Question, count_samples
from digseg.evaluation.inference import Predictor
from digseg.evaluation.metrics import ConfusionMatrix
from digseg.registry.models import resolve
from digseg.training.trainer import Trainer
from digseg.training.world import World
from launch.preparation import ensure_shards

PER_CLASS = PredictionConfig(classes_per_pass=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", help="a model's URI or folder (default: train one)")
    parser.add_argument("--per-class-model", help="another one for the per-class method (default: trained, or --model)")
    parser.add_argument("--corpora", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real samples")
    parser.add_argument("--steps", type=int, default=600, help="of training, 8 crops each")
    parser.add_argument("--samples", type=int, default=36, help="images that mIoU is measured on, at most")
    parser.add_argument("--timed", type=int, default=4, help="images that are timed")
    parser.add_argument("--repeats", type=int, default=7, help="of the timing")
    add_json(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="inference-") as folder:
        figures = _measure(Path(folder), options)
    report(figures, options.json)


def _measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    config = _config(folder, options)
    ensure_shards(config)
    if options.model:
        together = Predictor.load(resolve(options.model)[0])
        alone = Predictor.load(resolve(options.per_class_model or options.model)[0], settings=PER_CLASS)
    else:
        together = Predictor.load(_trained(config, "together", config.data.queries.max_classes))
        # A class and the background.
        alone = Predictor.load(_trained(config, "alone", 2))
    (entry,) = config.evaluation.corpora
    corpus = ShardedCorpus(config.data.root, entry.name, entry.split)
    names = corpus.manifest.vocabulary
    halved = together.with_settings(PredictionConfig(classes_per_pass=-(-len(names) // 2)))
    models = {"one pass": together, "two passes": halved, "one per class": alone}
    methods = {name: model.for_corpus(entry.name) for name, model in models.items()}
    say(f"{entry.name}/{entry.split}, {len(names)} classes")

    samples = [corpus.must_read(number) for number in range(min(options.timed, len(corpus)))]
    seconds = _seconds(methods, samples, names, options.repeats)
    ratios = [slow / fast for fast, slow in zip(seconds["one pass"], seconds["one per class"], strict=True)]
    chosen = range(min(options.samples, len(corpus)))
    matrices = {
        name: ConfusionMatrix(len(names), count_samples(predictor, corpus, chosen, Question(names)).confusion)
        for name, predictor in methods.items()
    }
    scores = {name: matrix.mean_iou() for name, matrix in matrices.items()}
    say("                 seconds an image    mIoU")
    for name, times in seconds.items():
        say(f"{name:14} {statistics.median(times):8.4f} ({min(times):.4f}-{max(times):.4f}) {scores[name]:7.3f}")
    say(f"one pass is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f}-{max(ratios):.2f})")
    passes = _ade20k_passes(together)
    say(f"ADE20K's 150 classes take {passes} passes an image")
    return {
        "corpus": entry.name,
        "classes": len(names),
        "speedup_one_pass_vs_per_class": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "miou_one_pass": scores["one pass"],
        "miou_two_passes": scores["two passes"],
        "miou_per_class": scores["one per class"],
        "ade20k_150_passes_per_image": passes,
    }


def _config(folder: Path, options: argparse.Namespace) -> Config:
    """The demo's settings for one street corpus."""
    settings = {
        "run.storage": folder / "runs",
        "data.root": folder / "shards",
        "training.steps": options.steps,
        "training.checkpoint_every": options.steps,
        "cluster.backend": "local",
        "tracking.enabled": "false",
    }
    if (options.corpora / "camvid").is_dir():
        settings |= {
            "prepare.root": options.corpora.resolve(),
            "prepare.corpora": "[{corpus: camvid, dir: camvid, splits: [train, test]}]",
            "data.corpora": "[{name: camvid, short_side: 160}]",
            "evaluation.corpora": "[{name: camvid, split: test}]",
            "evaluation.synonyms": "{}",
        }
        file = "demo_real.yaml"
    else:
        settings |= {
            "prepare.root": folder / "corpora",
            "prepare.corpora": "[{corpus: sample_driving, dir: driving, splits: [train, val]}]",
            "data.corpora": "[{name: sample_driving}]",
            "evaluation.corpora": "[{name: sample_driving, split: val}]",
            "evaluation.held_out": "[]",
        }
        file = "demo.yaml"
    return configured(settings, file)


def _trained(config: Config, name: str, max_classes: int) -> Path:
    """The exported model of a run whose queries hold so many classes."""
    queries = config.data.queries.model_copy(update={"max_classes": max_classes})
    data = config.data.model_copy(update={"queries": queries})
    run = config.run.model_copy(update={"name": name})
    start = time.monotonic()
    result = Trainer(config.model_copy(update={"data": data, "run": run}), World()).train()
    say(f"{name}: {result.steps} steps in {time.monotonic() - start:.0f} s, loss {result.last_loss:.3f} at the end")
    return Path(result.model_dir)


def _seconds(
    methods: dict[str, Predictor], samples: Sequence[Sample], names: Sequence[str], repeats: int
) -> dict[str, list[float]]:
    """Seconds an image of each method in each repeat, after one that is not counted (it embeds the names)."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, predictor in methods.items():
            start = time.perf_counter()
            for sample in samples:
                predictor.predict(sample.image, names)
            if repeat:
                seconds[name].append((time.perf_counter() - start) / len(samples))
    return seconds


def _ade20k_passes(predictor: Predictor) -> int:
    """Passes through the U-Net that an image asked for the classes of ADE20K takes."""
    description = yaml.safe_load((ROOT / "configs" / "corpora" / "ade20k.yaml").read_text(encoding="utf-8"))
    return len(predictor.passes(check_classes(list(description["label"]["values"].values()))))


if __name__ == "__main__":
    run_main(main)
