"""The whole path in one command: corpora, shards, training, registry, evaluation, promotion, prediction.

``python launch/demo.py`` runs it on the sample corpora that the project draws itself;
``python launch/demo.py --corpora DIR`` on real ones. The model becomes champion as with ``digseg promote``: the first
one at once, a later one if it passes the gate. Ends with a table of results, a picture, and
``outputs/demo/summary.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from digseg.cli_models import promote
from digseg.cluster.evaluate import evaluate_models
from digseg.cluster.runtime import ray_session
from digseg.config import Config, CorpusSplit, Gate, base_directory, load_config, load_section
from digseg.console import say
from digseg.data.corpus import ShardedCorpus
from digseg.data.format import present_manifests
from digseg.errors import DigSegError, run_main
from digseg.evaluation.inference import Predictor
from digseg.evaluation.picture import PictureRow, prediction_grid
from digseg.evaluation.report import ReportedModel, report_page
from digseg.evaluation.stored import StoredTallies
from digseg.evaluation.temperature import calibrate_model
from digseg.registry.models import ModelRef, list_versions, resolve, set_alias, tag_evaluation
from digseg.registry.package import register_model
from digseg.registry.store import tracking_uri
from digseg.registry.tracking import MlflowRun, log_evaluation
from digseg.training.run import TrainingResult, finished_result
from launch.evaluate import KEPT, print_calibration, print_report
from launch.preparation import ensure_shards
from launch.train import run_backend

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GATE = CONFIGS / "gates" / "default.yaml"
CHALLENGER, CHAMPION = "challenger", "champion"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--corpora", help="folder that holds the corpora which the config's prepare section names")
    parser.add_argument("--config", help="default: configs/demo.yaml, with --corpora configs/demo_real.yaml")
    parser.add_argument("--out", default="outputs/demo", help="where summary.json and the picture go")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    options = parser.parse_args(arguments)
    overrides = list(options.overrides)
    if options.corpora:
        if not Path(options.corpora).is_dir():
            raise DigSegError(f"--corpora {options.corpora}: no such folder")
        overrides += [f"prepare.root={Path(options.corpora).resolve()}", "prepare.sample_corpora=null"]
    default = CONFIGS / ("demo_real.yaml" if options.corpora else "demo.yaml")
    run_demo(load_config(options.config or default, overrides), base_directory() / options.out)


def run_demo(config: Config, out: Path) -> dict[str, Any]:
    """Run every stage and return the summary, which is also written to ``out/summary.json``."""
    if not config.tracking.enabled:
        raise DigSegError("tracking.enabled is false: the demo registers its model, so it needs tracking")
    if not config.evaluation.corpora:
        raise DigSegError("evaluation.corpora is empty: name a corpus and a split that decide over the champion")
    seconds: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)
    kept = StoredTallies(base_directory() / KEPT)
    with ray_session(config.cluster):
        seconds |= ensure_shards(config)
        already_trained = finished_result(config) is not None
        with _timed(seconds, "training"):
            result = run_backend(config)
        run = MlflowRun(config)
        if not already_trained:
            with _timed(seconds, "calibration"):
                _calibrate(config, Path(result.model_dir))
        with _timed(seconds, "registration"):
            model = _registered(config, result, run, anew=not already_trained)
        with _timed(seconds, "evaluation"):
            evaluation, pages = _evaluated(config, model, kept)
            log_evaluation(tracking_uri(config), run.run_id, evaluation, pages)
            tag_evaluation(model, evaluation)
        with _timed(seconds, "promotion"):
            alias = _promoted(config, model, kept)
    with _timed(seconds, "prediction"):
        picture = _picture(config, alias, out / "predictions.png")
    run.log_images([picture])
    summary = _summary(config, seconds, result, run.run_id, model, alias, evaluation, picture)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _report(summary, out)
    return summary


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def _calibrate(config: Config, model_dir: Path) -> None:
    """Fit the model's temperature on part of the images that it will be evaluated on."""
    corpora = [ShardedCorpus(config.data.root, entry.name, entry.split) for entry in config.evaluation.corpora]
    print_calibration(calibrate_model(model_dir, corpora))


def _registered(config: Config, result: TrainingResult, run: MlflowRun, anew: bool) -> ModelRef:
    """The run's model as a registered version, the challenger; one is registered already if the run was finished."""
    if not anew:
        uri = tracking_uri(config)
        for row in list_versions(uri):
            if row.run_id == run.run_id and row.name == config.tracking.registered_model:
                set_alias(row.name, row.version, CHALLENGER, uri)
                return ModelRef(row.name, row.version, CHALLENGER, row.run_id, uri)
    return register_model(
        Path(result.model_dir),
        config,
        run_id=run.run_id,
        checkpoint_dir=Path(result.checkpoint_dir),
        alias=CHALLENGER,
    )


def _evaluated(config: Config, model: ModelRef, kept: StoredTallies) -> tuple[dict[str, Any], dict[str, str]]:
    """Results on the corpora trained on, and under ``held_out`` on those that were not; and the page of each."""
    wanted = config.evaluation
    result, page = _measured(config, model, wanted.corpora, wanted.synonyms, kept)
    if not wanted.held_out:
        return {**result, "held_out": {}}, {"report.html": page}
    held_out, second_page = _measured(config, model, wanted.held_out, {}, kept)
    pages = {"report.html": page, "report_held_out.html": second_page}
    return {**result, "held_out": held_out["corpora"]}, pages


def _measured(
    config: Config,
    model: ModelRef,
    entries: Sequence[CorpusSplit],
    synonyms: Mapping[str, Mapping[str, Sequence[str]]],
    kept: StoredTallies,
) -> tuple[dict[str, Any], str]:
    """Results on some splits, and their page."""
    directory, reference = resolve(model.uri, tracking_uri(config))
    root = config.data.root
    splits = [(entry.name, entry.split) for entry in entries]
    (evaluation,) = evaluate_models([directory], root, splits, synonyms=synonyms, kept=kept)
    result = {"model": reference.as_json(), "data": root, **evaluation.result}
    reported = ReportedModel(Predictor.load(directory), result, evaluation.tallies)
    return result, report_page([reported], evaluation.splits, [], root)


def _promoted(config: Config, model: ModelRef, kept: StoredTallies) -> str:
    """Let the model be champion if it passes the gate on the corpora evaluated; the alias that it has then."""
    entries = [*config.evaluation.corpora, *config.evaluation.held_out]
    splits = {entry.split for entry in entries}
    on_these = {
        "data": config.data.root,
        "corpora": [entry.name for entry in entries],
        "split": splits.pop() if len(splits) == 1 else None,
    }
    gate = load_section(GATE, Gate).model_copy(update=on_these)
    passed = promote(model.name, str(model.version), CHAMPION, gate, kept, tracking_uri=tracking_uri(config))
    return CHAMPION if passed else CHALLENGER


def _picture(config: Config, alias: str, path: Path) -> Path:
    """Image, ground truth and prediction of the model, loaded from the registry by its alias."""
    directory, model = resolve(f"models:/{config.tracking.registered_model}@{alias}", tracking_uri(config))
    predictor = Predictor.load(directory)
    entries = [*config.evaluation.corpora, *config.evaluation.held_out]
    rows = [row for entry in entries for row in _rows(config, entry, predictor)]
    prediction_grid(rows, path, title="DigSeg: one model, every corpus", subtitle=f"{model.uri}, unseen images")
    return path


def _rows(config: Config, entry: CorpusSplit, predictor: Predictor) -> Iterator[PictureRow]:
    corpus = ShardedCorpus(config.data.root, entry.name, entry.split)
    vocabulary = corpus.manifest.vocabulary
    asked = predictor.for_corpus(entry.name)
    title = f"{entry.name} ({corpus.manifest.domain.replace('_', ' ')})"
    for sample in corpus.evenly(config.evaluation.pictures_per_corpus):
        mask = asked.predict(sample.image, vocabulary).mask
        yield PictureRow(title, sample.image, sample.mask, mask, vocabulary)


def _summary(
    config: Config,
    seconds: Mapping[str, float],
    result: TrainingResult,
    run_id: str,
    model: ModelRef,
    alias: str,
    evaluation: Mapping[str, Any],
    picture: Path,
) -> dict[str, Any]:
    shards: dict[str, dict[str, Any]] = {}
    for manifest in present_manifests(config.data.root):
        splits = shards.setdefault(manifest.corpus, {})
        splits[manifest.split] = {"samples": manifest.samples, "digest": manifest.digest}
    return {
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "shards": shards,
        "train": {
            "run_id": run_id,
            "world_size": result.world_size,
            "zero_stage": result.zero_stage,
            "steps": result.steps,
            "images_per_second": result.images_per_second,
            "first_loss": result.first_loss,
            "last_loss": result.last_loss,
        },
        "model": {
            "name": model.name,
            "version": model.version,
            "alias": alias,
            "tracking_uri": tracking_uri(config),
        },
        "evaluation": evaluation,
        "picture": str(picture),
    }


def _report(summary: Mapping[str, Any], out: Path) -> None:
    train, model, evaluation = summary["train"], summary["model"], summary["evaluation"]
    uri = f"models:/{model['name']}@{model['alias']}"
    print_report({**evaluation, "model": {"uri": uri}})
    for name, row in evaluation["held_out"].items():
        classes = ", ".join(f"{label} {iou:.3f}" for label, iou in row["classes"].items() if iou is not None)
        say(f"{name} (never trained on, nor its class names): mIoU {row['miou']:.3f} ({classes})")
    say(f"training: {train['steps']} steps on {train['world_size']} workers, {train['images_per_second']:.1f} images/s")
    say(f"model:    {uri} (version {model['version']})")
    say(f"picture:  {summary['picture']}")
    say(f"summary:  {out / 'summary.json'}")
    store = model["tracking_uri"]
    say(f"MLflow:   {store if store.startswith('http') else f'.venv/bin/mlflow ui --backend-store-uri {store}'}")
    say(f"seconds:  {', '.join(f'{stage} {value:.0f}' for stage, value in summary['seconds'].items())}")


if __name__ == "__main__":
    run_main(main)
