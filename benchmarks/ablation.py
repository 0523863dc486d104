"""What each part of the method is worth: mIoU without it, at equal steps, beside a plain U-Net that is told the corpus.

Every variant is ``configs/demo_real.yaml`` (without its smallest corpus) with a few settings changed, trained in
one process on one thread from each of the seeds, and evaluated on all held-out images at original resolution. The full
recipe is then asked for every foreground class in other wordings and, as a control, under a nonsense name; and for
parts of the vocabularies among names of other corpora, in sets that training never drew.

Finished runs are kept in ``--out``: the same command again takes what is there and goes on with the rest. The first
seed of all variants comes before the second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from baselines import plain_unet
from numpy.typing import NDArray
from shared import ROOT, add_json, configured, report

from digseg.config import Config, PredictionConfig
from digseg.config.schema import BACKGROUND
from digseg.console import say
from digseg.data.corpus import ShardedCorpus
from digseg.data.queries import query_vocabulary
from digseg.data.wordings import class_names
from digseg.errors import DigSegError, run_main
from digseg.evaluation.evaluate import renamed
from digseg.evaluation.inference import Predictor
from digseg.evaluation.metrics import ConfusionMatrix, Figures
from digseg.training.files import write_whole
from digseg.training.trainer import Trainer
from digseg.training.world import World
from launch.preparation import ensure_shards

FULL = "full recipe"


@dataclass(frozen=True)
class Variant:
    """Settings that differ from the full recipe's, and how the model is asked."""

    settings: Mapping[str, object] = field(default_factory=dict)
    asked: PredictionConfig = field(default_factory=PredictionConfig)
    plain: bool = False  # the baseline


VARIANTS = {
    FULL: Variant(),
    "plain U-Net": Variant(plain_unet.SETTINGS, plain=True),
    "plain U-Net, tuned": Variant(plain_unet.TUNED, plain=True),
    "no pathway": Variant({"model.pathway.enabled": "false"}),
    "no pathway, mask alone": Variant({"model.pathway.enabled": "false", "objective.class_score": 0}),
    "no feedback": Variant({"model.pathway.feedback": "false"}),
    # At neither scale: what is left is the loss of the painted mask.
    "no class-score loss": Variant({"objective.class_score": 0, "objective.feedback": 0}),
    "fixed colours": Variant({"data.queries.random_colours": "false"}),
    "multi-step": Variant({"objective.type": "multi_step"}),
    # Every query is one class and the background. As many of them as in the full recipe ask for an absent class.
    "per-class binary": Variant(
        {"data.queries.max_classes": 2, "data.queries.sub_vocabulary_p": 1, "data.queries.foreground_p": 0.95},
        PredictionConfig(classes_per_pass=1),
    ),
}

CONTROL = "banana"
WORDINGS = {
    "camvid": {
        "sky": ["the sky", "clouds"],
        "building": ["house", "office block"],
        "pole": ["lamp post", "column"],
        "road": ["street", "carriageway"],
        "pavement": ["sidewalk", "footpath"],
        "tree": ["trees", "vegetation"],
        "traffic sign": ["road sign", "street sign"],
        "fence": ["railing", "barrier"],
        "car": ["automobile", "vehicle"],
        "pedestrian": ["person", "someone walking"],
        "bicyclist": ["cyclist", "bike rider"],
    },
    "dsb2018": {"cell nucleus": ["nuclei", "nucleus of a cell"]},
    "isic2017_lesion": {"skin lesion": ["melanoma", "mole"]},
    "isbi_em_membrane": {
        "cell membrane": ["membrane", "cell boundary"],
        "cell interior": ["cytoplasm", "inside of a cell"],
    },
    "fair_kampala_buildings": {"building": ["house", "rooftop"]},
    "cwfid": {"soil": ["earth", "ground"], "crop": ["crop plant", "carrot"], "weed": ["weeds", "unwanted plant"]},
}
LEFT_OUT = "loveda_mini"  # its nine training images are no measure
FOREIGN = 4  # names of other corpora in a part of a vocabulary: one more than training ever adds
PARTS = 6  # of each vocabulary, at most


@dataclass(frozen=True)
class Run:
    """One variant from one seed; it travels to the process that trains it."""

    variant: str
    seed: int
    steps: int
    crop: int  # px
    out: Path
    corpora: Path | None

    @property
    def measured(self) -> Path:
        """The file that keeps its mIoU."""
        return self.out / "measured" / f"{self.name}.json"

    @property
    def answered(self) -> Path:
        """The file that keeps its answers to other wordings and parts of vocabularies."""
        return self.out / "answered" / f"{self.name}.json"

    @property
    def name(self) -> str:
        """Of the run's directory and of its result."""
        return f"{self.variant.lower().replace(',', '').replace(' ', '-')}-{self.crop}-{self.steps}-{self.seed}"

    def config(self) -> Config:
        """The whole configuration of the run."""
        settings = {
            "run.name": self.name,
            "run.storage": self.out / "runs",
            "run.seed": self.seed,
            "cluster.backend": "local",
            "data.root": self.out / "shards",
            "data.decoded_cache_mb": 512,
            "data.crop_size": self.crop,
            "data.short_side": 2 * self.crop,
            "training.steps": self.steps,
            "training.checkpoint_every": 250,
            "training.keep_checkpoints": 1,
            "training.ema.decay": 0.995,
            "training.threads": 1,
            "tracking.enabled": "false",
            **VARIANTS[self.variant].settings,
        }
        if self.corpora:
            return configured({"prepare.root": self.corpora, **_real(self.crop), **settings}, "demo_real.yaml")
        return configured({"prepare.root": self.out / "corpora", **_DRAWN, **settings})


def _real(crop: int) -> dict[str, object]:
    """The samples of demo_real.yaml without :data:`LEFT_OUT`. Working sizes are as many crops as there."""
    demo = configured({}, "demo_real.yaml")
    trained = [entry.model_dump() for entry in demo.data.corpora if entry.name != LEFT_OUT]
    for entry in trained:
        entry["short_side"] = entry["short_side"] and entry["short_side"] * crop // demo.data.crop_size
    evaluated = [entry.model_dump() for entry in demo.evaluation.corpora if entry.name != LEFT_OUT]
    return {
        "data.corpora": json.dumps(trained),
        "evaluation.corpora": json.dumps(evaluated),
        "evaluation.synonyms": "{}",
    }


# Where there are none, the corpora that the project draws show that the script works, and nothing else.
_DRAWN = {
    "prepare.sample_corpora.images_per_domain": 20,
    "prepare.sample_corpora.size": 64,
    "evaluation.held_out": "[]",
    "training.validation.every": "null",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ablation", help="where finished runs are kept")
    parser.add_argument("--corpora", type=Path, default=ROOT.parent / "shared" / "data", help="folder of real samples")
    parser.add_argument("--steps", type=int, default=600, help="of training, 8 crops each")
    parser.add_argument("--crop", type=int, default=128, help="px; the working sizes of the corpora follow it")
    parser.add_argument("--seeds", type=int, default=2, help="so many, from 0 on")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--kept", action="store_true", help="train nothing: the figures of the runs that are finished")
    add_json(parser)
    options = parser.parse_args(arguments)
    corpora = options.corpora.resolve() if (options.corpora / "camvid").is_dir() else None
    runs = [
        Run(variant, seed, options.steps, options.crop, options.out.resolve(), corpora)
        for seed in range(options.seeds)
        for variant in options.variants
    ]
    asked = [run for run in runs if run.variant == FULL]
    if not options.kept:
        ensure_shards(runs[0].config())
        with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
            _wait(pool.submit(_measure, run) for run in runs if not run.measured.exists())
            # Of models that are trained by now: two processes must not train one run.
            _wait(pool.submit(_ask, run) for run in asked if not run.answered.exists())
    measured = {run: json.loads(run.measured.read_text()) for run in runs if run.measured.exists()}
    answered = {run: json.loads(run.answered.read_text()) for run in asked if run.answered.exists()}
    if not measured:
        raise DigSegError(
            f"no run of {options.steps} steps with crops of {options.crop} px is finished in {options.out}"
        )
    _show(measured, answered)
    figures = {
        "steps": options.steps,
        "crop": options.crop,
        "runs": [{"variant": run.variant, "seed": run.seed, **found} for run, found in measured.items()],
        "questions": [{"seed": run.seed, **found} for run, found in answered.items()],
    }
    report(figures, options.json)


def _wait(tasks: Iterable[Future[None]]) -> None:
    """Until all have ended, or one has failed."""
    for task in list(tasks):
        task.result()


def _measure(run: Run) -> None:
    """Train and evaluate; keeps mIoU by corpus, and the seconds that it took."""
    config = run.config()
    began = time.monotonic()
    variant = VARIANTS[run.variant]
    model = plain_unet.trained(config) if variant.plain else _trained(config, variant.asked)
    trained = time.monotonic()
    miou = {}
    for corpus in _evaluated(config):
        name, vocabulary = corpus.manifest.corpus, corpus.manifest.vocabulary
        miou[name] = _counted(model.for_corpus(name), corpus, vocabulary).mean_iou()
    say(f"{run.name}: mIoU {statistics.mean(miou.values()):.3f} after {trained - began:.0f} s")
    _keep(run.measured, {"miou": miou, "training_s": trained - began, "evaluation_s": time.monotonic() - trained})


def _ask(run: Run) -> None:
    """Ask the full recipe, trained before, for other wordings and for parts of the vocabularies; keeps the answers."""
    config = run.config()
    predictor = _trained(config, PredictionConfig())
    corpora = _evaluated(config)
    answers: dict[str, dict[str, Any]] = {}
    for corpus in corpora:
        asked = predictor.for_corpus(corpus.manifest.corpus)
        own = _counted(asked, corpus, corpus.manifest.vocabulary).iou()
        answers[corpus.manifest.corpus] = {
            "wordings": _wordings(asked, corpus, own),
            "parts": _parts(asked, corpus, own, _drawn_parts(corpus, corpora)),
        }
    _keep(run.answered, answers)


def _keep(file: Path, figures: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(figures) + "\n")


def _trained(config: Config, asked: PredictionConfig) -> Predictor:
    result = Trainer(config, World()).train()
    return Predictor.load(Path(result.model_dir), settings=asked)


def _evaluated(config: Config) -> list[ShardedCorpus]:
    return [ShardedCorpus(config.data.root, entry.name, entry.split) for entry in config.evaluation.corpora]


def _counted(
    predictor: Predictor, corpus: ShardedCorpus, names: Sequence[str], wording: Sequence[str] | None = None
) -> ConfusionMatrix:
    """Counts of all images, asked for ``names``, or for another wording of them. One more class, the last, is all that
    the vocabulary has not."""
    vocabulary = corpus.manifest.vocabulary
    number = np.array([vocabulary.index(name) if name in vocabulary else len(vocabulary) for name in names])
    matrix = ConfusionMatrix(len(vocabulary) + 1, ignore_id=corpus.manifest.ignore_id)
    for sample in map(corpus.must_read, range(len(corpus))):
        matrix.update(sample.mask, number[predictor.predict(sample.image, wording or names).mask])
    return matrix


def _wordings(predictor: Predictor, corpus: ShardedCorpus, own: Figures) -> dict[str, dict[str, float]]:
    """IoU of each foreground class under its own name, in other wordings, and under the control, the rest of the
    vocabulary as it is."""
    vocabulary = corpus.manifest.vocabulary
    found: dict[str, dict[str, float]] = {}
    for number, label in enumerate(vocabulary):
        if label == BACKGROUND:
            continue
        found[label] = {label: float(own[number])}
        for wording in (*WORDINGS.get(corpus.manifest.corpus, {}).get(label, []), CONTROL):
            matrix = _counted(predictor, corpus, vocabulary, renamed(vocabulary, label, wording))
            found[label][wording] = float(matrix.iou()[number])
    return found


def _parts(
    predictor: Predictor, corpus: ShardedCorpus, own: Figures, parts: Sequence[tuple[list[str], list[str]]]
) -> list[dict[str, Any]]:
    """mIoU of the classes of each part, asked among its foreign names; and of the same ones in the whole vocabulary."""
    vocabulary = corpus.manifest.vocabulary
    found = []
    for part, foreign in parts:
        iou = _counted(predictor, corpus, (BACKGROUND, *part, *foreign)).iou()
        numbers = [vocabulary.index(label) for label in part]
        figures = {"miou": float(np.mean(iou[numbers])), "miou_whole": float(np.mean(own[numbers]))}
        found.append({"classes": part, "foreign": foreign, **figures})
    return found


def _drawn_parts(corpus: ShardedCorpus, corpora: Sequence[ShardedCorpus]) -> list[tuple[list[str], list[str]]]:
    """Parts of a vocabulary's foreground, strict ones where it has several classes, each with foreign names: more than
    training ever adds to a query, so that none of these sets was trained on."""
    manifests = [one.manifest for one in corpora]
    names = class_names(manifests)
    vocabulary = query_vocabulary(corpus.manifest, manifests, names, {})
    rng = np.random.default_rng(0)
    parts: dict[tuple[int, ...], NDArray[np.int64]] = {}
    for _ in range(10 * PARTS):
        foreground = vocabulary.foreground
        size = int(rng.integers(1, max(2, len(foreground))))
        part = tuple(sorted(rng.choice(foreground, size, replace=False).tolist()))
        foreign = rng.choice(vocabulary.foreign_name_ids, min(FOREIGN, len(vocabulary.foreign_name_ids)), replace=False)
        if len(parts) < PARTS:
            parts.setdefault(part, foreign)
    own = corpus.manifest.vocabulary
    return [([own[number] for number in part], [names[one] for one in foreign]) for part, foreign in parts.items()]


def _show(measured: Mapping[Run, Mapping[str, Any]], answered: Mapping[Run, Mapping[str, Any]]) -> None:
    """The tables."""
    corpora = list(next(iter(measured.values()))["miou"])
    say(f"mIoU{'':18}" + "".join(f"{name[:11]:>12}" for name in [*corpora, "mean"]) + "   seeds")
    for variant in dict.fromkeys(run.variant for run in measured):
        seeds = [found["miou"] for run, found in measured.items() if run.variant == variant]
        columns = [statistics.mean(miou[name] for miou in seeds) for name in corpora]
        means = ", ".join(f"{100 * statistics.mean(miou.values()):.1f}" for miou in seeds)
        say(f"{variant:22}{_percent([*columns, statistics.mean(columns)])}   {means}")
    if not answered:
        return
    say(f"\n{FULL}: IoU of a class under its own name, in other wordings, and as {CONTROL}")
    for name, label in _classes(answered):
        wordings = [found[name]["wordings"][label] for found in answered.values()]
        columns = {one: statistics.mean(asked[one] for asked in wordings) for one in wordings[0]}
        say(f"{name:24}" + ", ".join(f"{wording} {100 * iou:.1f}" for wording, iou in columns.items()))
    say(f"\n{FULL}: mIoU of the classes of a part among foreign names, and in the whole vocabulary")
    for name in corpora:
        parts = [part for found in answered.values() for part in found[name]["parts"]]
        columns = [statistics.mean(part[figure] for part in parts) for figure in ("miou", "miou_whole")]
        say(f"{name:24}{_percent(columns)}   ({len(parts)} queries)")


def _classes(answered: Mapping[Run, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The corpora and their foreground classes."""
    found = next(iter(answered.values()))
    return [(name, label) for name, answers in found.items() for label in answers["wordings"]]


def _percent(values: Sequence[float]) -> str:
    return "".join(f"{100 * value:12.1f}" for value in values)


if __name__ == "__main__":
    run_main(main)
