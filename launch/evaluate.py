"""Evaluate a registered (or exported) model on sharded corpora, as Ray tasks.

    python launch/evaluate.py --model models:/digseg@challenger --data outputs/demo/shards

Prints mIoU, pixel accuracy and the IoU of each class, and logs them to the MLflow run that trained the model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from digseg.config import Config, load_config
from digseg.config.schema import ClusterConfig
from digseg.console import say
from digseg.data.format import list_manifests
from digseg.errors import DigSegError, nearest, run_main


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    config = load_config(options.config, options.overrides) if options.config else None
    if options.overrides and config is None:
        raise DigSegError(f"{options.overrides[0]!r} overrides a configuration, but none was given (--config)")
    root = options.data or (config.data.root if config else None)
    if root is None:
        raise DigSegError("--data is missing: the folder of the shards (or a --config that names it as data.root)")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise DigSegError(f"--out {options.out}: there is no folder {options.out.absolute().parent}")
    corpora = choose_splits(root, options.split, options.corpora)
    synonyms = _synonyms(options.synonyms, config, corpora)

    # Ray and MLflow take seconds to import: a command that is wrong should say so at once.
    from digseg.cluster.evaluate import evaluate_model
    from digseg.registry.models import resolve, set_alias, tag_evaluation
    from digseg.registry.store import default_tracking_uri, tracking_uri
    from digseg.registry.tracking import log_evaluation

    store = options.tracking_uri or (tracking_uri(config) if config else default_tracking_uri())
    directory, reference = resolve(options.model, store)
    if options.set_alias and reference.version is None:
        raise DigSegError(f"--set-alias: {options.model} is a directory; only registered models have aliases")
    cluster = config.cluster if config else ClusterConfig(workers=1)
    result = evaluate_model(directory, root, corpora, synonyms, cluster=cluster, num_gpus=options.num_gpus)
    result = {"model": {**reference.as_json(), "uri": reference.uri}, "data": str(root), **result}

    print_report(result)
    if options.out is not None:
        partial = options.out.with_name(f".{options.out.name}.tmp")
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(options.out)
        say(f"written: {options.out}")
    if reference.run_id is not None and reference.tracking_uri is not None and not options.no_log:
        log_evaluation(reference.tracking_uri, reference.run_id, result)
        tag_evaluation(reference, result)
        say(f"logged to MLflow run {reference.run_id} in {reference.tracking_uri}")
    if options.set_alias and reference.version is not None:
        set_alias(reference.name, reference.version, options.set_alias, reference.tracking_uri)
        say(f"models:/{reference.name}@{options.set_alias} is version {reference.version} now")


def choose_splits(root: str, split: str | None = None, corpora: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(corpus, split) pairs below a shards' root: those of `split`, else all that are not for training; only
    `corpora` if any are named.

    Raises:
        DigSegError: nothing is left, or a corpus that is not there.
    """
    manifests = list_manifests(root)
    names = sorted({manifest.corpus for manifest in manifests})
    for name in corpora:
        if name not in names:
            raise DigSegError(f"--corpora: no shards of {name!r} below {root}{nearest(name, names)}")
    chosen = [
        (manifest.corpus, manifest.split)
        for manifest in manifests
        if (manifest.split == split if split else manifest.split != "train")
        and (not corpora or manifest.corpus in corpora)
    ]
    if not chosen:
        found = ", ".join(f"{manifest.corpus}/{manifest.split}" for manifest in manifests)
        wanted = f"split {split!r}" if split else "split for evaluation (all are 'train'; name one with --split)"
        raise DigSegError(f"no {wanted} below {root}; there are: {found}")
    return chosen


def print_report(result: Mapping[str, Any]) -> None:
    """Tables of an evaluation: a line for each corpus, then each class, then other wordings."""
    console = Console()
    summary = Table(title=f"{result['model']['uri']}: mean IoU {result['mean_iou']:.3f}", title_justify="left")
    for column in ("corpus", "split"):
        summary.add_column(column)
    for column in ("images", "mIoU", "pixel accuracy"):
        summary.add_column(column, justify="right")
    classes = Table(title="IoU of each class", title_justify="left")
    classes.add_column("corpus")
    classes.add_column("class")
    classes.add_column("IoU", justify="right")
    classes.add_column("")
    for name, corpus in result["corpora"].items():
        figures = (_figure(corpus["miou"]), _figure(corpus["pixel_accuracy"]))
        summary.add_row(name, corpus["split"], str(corpus["samples"]), *figures)
        for number, (label, iou) in enumerate(corpus["classes"].items()):
            last = number == len(corpus["classes"]) - 1
            bar = "#" * round(20 * (iou or 0))
            classes.add_row(name if number == 0 else "", label, _figure(iou), bar, end_section=last)
    console.print(summary)
    console.print(classes)
    if result["synonyms"]:
        wordings = Table(title="IoU under other wordings", title_justify="left")
        for column in ("corpus", "class", "asked as"):
            wordings.add_column(column)
        wordings.add_column("IoU", justify="right")
        for name, labels in result["synonyms"].items():
            for label, others in labels.items():
                wordings.add_row(name, label, label, _figure(result["corpora"][name]["classes"][label]))
                for wording, iou in others.items():
                    wordings.add_row("", "", wording, _figure(iou))
        console.print(wordings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="models:/NAME@ALIAS, models:/NAME/VERSION or a directory")
    parser.add_argument("--data", help="the folder (or URL) of the shards; default: data.root of --config")
    parser.add_argument("--split", help="evaluate this split (default: every split but train)")
    parser.add_argument("--corpora", type=_names, default=[], help="only these, separated by commas")
    parser.add_argument("--config", help="a run's YAML: its cluster, tracking, shards and synonyms")
    parser.add_argument("--tracking-uri", help="MLflow store (default: $MLFLOW_TRACKING_URI, else the local one)")
    parser.add_argument(
        "--synonyms",
        action="append",
        default=[],
        metavar="CORPUS:CLASS=WORDING,...",
        help="also ask for a class in other words, such as 'camvid:car=automobile,vehicle'; may be repeated",
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--set-alias", metavar="NAME", help="let this alias mean the evaluated version afterwards")
    parser.add_argument("--no-log", action="store_true", help="do not log to the model's MLflow run")
    parser.add_argument("--num-gpus", type=float, default=0, help="share of a GPU for each task (default: CPUs)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of --config")
    return parser


def _synonyms(
    given: Sequence[str], config: Config | None, corpora: Sequence[tuple[str, str]]
) -> dict[str, dict[str, list[str]]]:
    """What the command line says; without it, what the configuration says about the corpora evaluated."""
    if not given:
        chosen = {name for name, _ in corpora}
        known = config.evaluation.synonyms if config else {}
        return {name: dict(classes) for name, classes in known.items() if name in chosen}
    synonyms: dict[str, dict[str, list[str]]] = {}
    for text in given:
        corpus, colon, rest = text.partition(":")
        label, equals, wordings = rest.partition("=")
        if not (colon and equals and corpus.strip() and label.strip() and _names(wordings)):
            raise DigSegError(f"--synonyms {text!r} is not understood; write CORPUS:CLASS=WORDING,WORDING")
        synonyms.setdefault(corpus.strip(), {}).setdefault(label.strip(), []).extend(_names(wordings))
    return synonyms


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    run_main(main)
