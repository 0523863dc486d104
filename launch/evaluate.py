"""Evaluate registered (or exported) models on sharded corpora, as Ray tasks.

    python launch/evaluate.py --model models:/digseg@challenger --data outputs/demo/shards

Prints the figures of each corpus with 95 % intervals and the IoU of each class, compares further models with the first,
and logs each evaluation as a child of the MLflow run that trained the model. Counts are kept as they come: started
again, it does only what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from digseg.cli_prediction import add_prediction_options, prediction_settings
from digseg.config import Config, Protocol, base_directory, load_config, load_section
from digseg.config.schema import ClusterConfig
from digseg.console import say
from digseg.errors import DigSegError, nearest, run_main
from digseg.evaluation.protocol import choose_splits

if TYPE_CHECKING:  # takes seconds to import
    from digseg.cluster.evaluate import Evaluation
    from digseg.evaluation.temperature import Calibration
    from digseg.registry.models import ModelRef

PROTOCOLS = Path(__file__).resolve().parent.parent / "configs" / "protocols"
KEPT = "outputs/evaluations"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    config = load_config(options.config, options.overrides) if options.config else None
    if options.overrides and config is None:
        raise DigSegError(f"{options.overrides[0]!r} overrides a configuration, but none was given (--config)")
    root = options.data or (config.data.root if config else None)
    if root is None:
        raise DigSegError("--data is missing: the folder of the shards (or a --config that names it as data.root)")
    for option, path in (("--out", options.out), ("--report", options.report)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise DigSegError(f"{option} {path}: give the name of a file in a folder that exists")
    prediction = prediction_settings(options)
    protocol = find_protocol(options.protocol)
    corpora = choose_splits(root, options.split, options.corpora)
    synonyms = _synonyms(options.synonyms, config, corpora)

    # Ray and MLflow take seconds to import: a command that is wrong should say so at once.
    from digseg.cluster.evaluate import evaluate_models
    from digseg.evaluation.figures import compared
    from digseg.evaluation.stored import StoredTallies
    from digseg.registry.models import resolve
    from digseg.registry.store import default_tracking_uri, tracking_uri

    store = options.tracking_uri or (tracking_uri(config) if config else default_tracking_uri())
    models = [resolve(uri, store) for uri in options.model]
    if options.calibrate:
        _calibrate(models, root, corpora)
    evaluations = evaluate_models(
        [directory for directory, _ in models],
        root,
        corpora,
        protocol,
        synonyms,
        prediction=prediction,
        oracle=options.oracle,
        kept=StoredTallies(base_directory() / options.kept),
        cluster=config.cluster if config else ClusterConfig(workers=1),
        num_gpus=options.num_gpus,
    )
    results = [
        {"model": reference.as_json(), "data": str(root), **evaluation.result}
        for (_, reference), evaluation in zip(models, evaluations, strict=True)
    ]
    first = evaluations[0].tallies
    comparisons = [
        {"first": results[0]["model"]["uri"], "second": result["model"]["uri"], **compared(first, evaluation.tallies)}
        for result, evaluation in zip(results[1:], evaluations[1:], strict=True)
    ]
    for result in results:
        print_report(result)
    for comparison in comparisons:
        print_comparison(comparison)
    if options.out is not None:
        _write(options.out, json.dumps({"evaluations": results, "comparisons": comparisons}, indent=2) + "\n")
    _report(options, models, evaluations, results, comparisons)


def _calibrate(models: Sequence[tuple[Path, ModelRef]], root: str, corpora: Sequence[tuple[str, str]]) -> None:
    """Fit the temperature of each model and write it into its folder, before anything is registered."""
    from digseg.data.corpus import ShardedCorpus
    from digseg.evaluation.temperature import calibrate_model

    registered = [reference.uri for _, reference in models if reference.version is not None]
    if registered:
        raise DigSegError(
            f"--calibrate: {registered[0]} is registered, and a version does not change; calibrate the folder of a "
            "run's model before it is registered"
        )
    for directory, _ in models:
        print_calibration(calibrate_model(directory, [ShardedCorpus(root, name, split) for name, split in corpora]))


def _report(
    options: argparse.Namespace,
    models: Sequence[tuple[Path, ModelRef]],
    evaluations: Sequence[Evaluation],
    results: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
) -> None:
    """Write the page, and keep it with the figures in the MLflow stores that the models are in."""
    from digseg.evaluation.inference import Predictor
    from digseg.evaluation.report import ReportedModel, report_page
    from digseg.registry.models import tag_evaluation
    from digseg.registry.tracking import log_evaluation

    logged = [
        (reference, result)
        for (_, reference), result in zip(models, results, strict=True)
        if reference.run_id is not None and reference.tracking_uri is not None and not options.no_log
    ]
    if options.report is None and not logged:
        return
    reported = [
        ReportedModel(Predictor.load(directory, settings=prediction_settings(options)), result, evaluation.tallies)
        for (directory, _), result, evaluation in zip(models, results, evaluations, strict=True)
    ]
    page = report_page(reported, evaluations[0].splits, comparisons, results[0]["data"])
    if options.report is not None:
        _write(options.report, page)
    for reference, result in logged:
        child = log_evaluation(str(reference.tracking_uri), str(reference.run_id), result, {"report.html": page})
        if not result["oracle"]:
            tag_evaluation(reference, result)
        say(f"logged to MLflow run {child}, a child of {reference.run_id}, in {reference.tracking_uri}")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    say(f"written: {path}")


def find_protocol(name: str | None) -> Protocol:
    """The protocol of a file, or of a name in `configs/protocols`; all corpora without a name.

    Raises:
        DigSegError: no such protocol, or a file that is not one.
    """
    if name is None:
        return Protocol()
    known = {path.stem: path for path in PROTOCOLS.glob("*.yaml")}
    if name not in known and not Path(name).is_file():
        raise DigSegError(f"--protocol: no file and no protocol {name!r}{nearest(name, known)}")
    return load_section(known.get(name, Path(name)), Protocol)


def print_report(result: Mapping[str, Any]) -> None:
    """Tables of an evaluation: a line for each corpus, then each class, then other wordings."""
    console = Console()
    oracle = " (ORACLE: told which classes each image holds)" if result["oracle"] else ""
    title = f"{result['model']['uri']}: mean IoU {_figure(result['mean_iou'])} {_ends(result['interval'])}{oracle}"
    headlines = _table(title, ("corpus", "split"), _HEADLINES)
    more = _table("Overlap, outlines and calibration", ("corpus",), _MORE)
    classes = _table("IoU of each class", ("corpus", "class"), ("IoU",))
    classes.add_column("")
    for name, corpus in result["corpora"].items():
        headlines.add_row(name, corpus["split"], *(read(corpus) for read in _HEADLINES.values()))
        more.add_row(name, *(_figure(corpus[figure]) for figure in _MORE.values()))
        for number, (label, iou) in enumerate(corpus["classes"].items()):
            last = number == len(corpus["classes"]) - 1
            bar = "#" * round(20 * (iou or 0))
            classes.add_row(name if number == 0 else "", label, _figure(iou), bar, end_section=last)
    for table in (headlines, more, classes):
        console.print(table)
    unseen = {name: corpus["seen_unseen"] for name, corpus in result["corpora"].items() if corpus["seen_unseen"]}
    if unseen:
        table = _table("mIoU of class names trained on, and not", ("corpus",), ("seen", "unseen", "harmonic mean"))
        for name, figures in unseen.items():
            table.add_row(name, *(_figure(figures[kind]) for kind in ("seen", "unseen", "harmonic_mean")))
        console.print(table)
    if result["synonyms"]:
        wordings = _table("IoU under other wordings", ("corpus", "class", "asked as"), ("IoU",))
        for name, labels in result["synonyms"].items():
            for label, others in labels.items():
                wordings.add_row(name, label, label, _figure(result["corpora"][name]["classes"][label]))
                for wording, iou in others.items():
                    wordings.add_row("", "", wording, _figure(iou))
        console.print(wordings)


def print_calibration(found: Calibration) -> None:
    """What the temperature does on images that it was not fitted on."""
    error, likelihood = found.calibration_error, found.negative_log_likelihood
    say(
        f"temperature {found.temperature:.3f}, fitted on {found.images} images; on others, calibration error "
        f"{error[0]:.3f} -> {error[1]:.3f}, negative log-likelihood {likelihood[0]:.3f} -> {likelihood[1]:.3f}"
    )


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """The differences of two models, corpus by corpus."""
    title = f"mIoU of {comparison['second']} minus that of {comparison['first']}"
    table = _table(title, ("corpus",), ("difference", "95 % interval", "better in"))
    for name, row in {**comparison["corpora"], "mean": comparison["mean"]}.items():
        difference = "-" if row["difference"] is None else f"{row['difference']:+.3f}"
        table.add_row(name, difference, _ends(row["interval"], sign="+"), f"{row['better']:.0%} of draws")
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--model",
        required=True,
        action="append",
        help="models:/NAME@ALIAS, models:/NAME/VERSION or a directory; may be repeated, to compare with the first",
    )
    parser.add_argument("--data", help="the folder (or URL) of the shards; default: data.root of --config")
    parser.add_argument("--split", help="evaluate this split (default: every split but train)")
    parser.add_argument("--protocol", help="a file, or a name in configs/protocols (default: all corpora)")
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
    parser.add_argument(
        "--oracle", action="store_true", help="tell the model which classes each image holds; the result says so"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--report", type=Path, help="write the report as one HTML page (MLflow gets it in any case)")
    parser.add_argument("--kept", default=KEPT, metavar="DIR", help=f"where counts are kept (default: {KEPT})")
    parser.add_argument("--no-log", action="store_true", help="do not log to the model's MLflow run")
    parser.add_argument("--num-gpus", type=float, default=0, help="share of a GPU for each task (default: CPUs)")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first fit the temperature of the models on some of the images, and write it into their folders",
    )
    add_prediction_options(parser)
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


# Columns of the tables of corpora, which fit a terminal of 80 columns: title -> text or key of the corpus' figures.
_HEADLINES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "images": lambda corpus: str(corpus["samples"]),
    "mIoU": lambda corpus: _figure(corpus["miou"]),
    "95 % interval": lambda corpus: _ends(corpus["interval"]["miou"]),
    "pixel\nacc.": lambda corpus: _figure(corpus["pixel_accuracy"]),
    "mean\nacc.": lambda corpus: _figure(corpus["mean_accuracy"]),
}
_MORE: Mapping[str, str] = {
    "frequency-\nweighted IoU": "frequency_weighted_iou",
    "Dice": "mean_dice",
    "boundary\nIoU": "boundary_iou",
    "boundary\nF1": "boundary_f1",
    "calibration\nerror": "calibration_error",
}


def _table(title: str, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """A table that breaks texts where it has to, and never a number."""
    table = Table(title=title, title_justify="left")
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ends(interval: Sequence[float | None], sign: str = "") -> str:
    return "[" + ", ".join("-" if end is None else f"{end:{sign}.3f}" for end in interval) + "]"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    run_main(main)
