"""The command `digseg`: what a user runs on their own machine. Cluster jobs are in `launch/`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from digseg import __version__
from digseg.cli_export import add_export
from digseg.cli_files import check_file, write_file
from digseg.cli_models import TRACKING_URI_HELP, add_models, add_promote
from digseg.cli_prediction import (
    MODEL_HELP,
    add_class_options,
    add_prediction_options,
    asked_classes,
    prediction_settings,
)
from digseg.console import say
from digseg.errors import DigSegError, run_main

if TYPE_CHECKING:
    from digseg.data.duplicates import Duplicates

_SHOWN_LEAKS = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Subcommands import what they need themselves: `digseg --help` answers at once."""
    parser = argparse.ArgumentParser(prog="digseg", description="Text-conditioned segmentation of any domain.")
    parser.add_argument("--version", action="version", version=f"digseg {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_predict(commands)
    add_export(commands)
    add_models(commands)
    add_promote(commands)
    _add_shards(commands)
    options = parser.parse_args(arguments)
    options.run(options)


def entry() -> None:
    """The console script."""
    run_main(main)


def _add_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "predict",
        help="segment images into the classes you name",
        description="Writes STEM.mask.png (ids), STEM.legend.json and STEM.overlay.png for each image.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_class_options(parser)
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    parser.add_argument("--tracking-uri", help=TRACKING_URI_HELP)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    add_prediction_options(parser)
    parser.set_defaults(run=_predict)


def _add_shards(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("shards", help="look at sharded corpora")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    lint = actions.add_parser(
        "lint",
        help="verify shards; exit code 1 and a list where some are damaged",
        description="Verifies checksums, indexes, images, masks and statistics of all shards below ROOT, and lists "
        "leaks: the same or nearly the same image in several splits or corpora.",
    )
    lint.add_argument("root", metavar="ROOT", help="a folder, or a URL such as s3://bucket/shards")
    lint.add_argument("--strict", action="store_true", help="exit code 1 for leaks too")
    lint.add_argument(
        "--duplicates", type=Path, metavar="FILE", help="write every group of duplicates, a line of JSON each"
    )
    lint.set_defaults(run=_lint_shards)
    show = actions.add_parser(
        "show",
        help="write one HTML page of samples, masks and classes",
        description="Writes a page of its own, with samples, masks, class shares, domain and licence of every split, "
        "and the images that leak between them.",
    )
    show.add_argument("root", metavar="ROOT", help="a folder, or a URL such as s3://bucket/shards")
    show.add_argument("--out", required=True, type=Path, help="the HTML file")
    show.add_argument("--samples", type=int, default=12, metavar="N", help="samples shown of a split (default: 12)")
    show.set_defaults(run=_show_shards)


def _predict(options: argparse.Namespace) -> None:
    from digseg.serving.predictor import check_files, predict_files

    classes = asked_classes(options)
    settings = prediction_settings(options)
    check_files(options.images, options.out, windowed=settings.window is not None)

    # Cheapest first: what the user got wrong is said before torch, diffusers and MLflow are loaded.
    from digseg.registry.models import resolve

    directory, reference = resolve(options.model, options.tracking_uri)

    from digseg.evaluation.inference import Predictor

    predictor = Predictor.load(directory, _device(options.device), settings)
    files = predict_files(predictor, reference, options.images, classes, options.out)
    say(f"{reference.uri}: {len(options.images)} images segmented, {len(files)} files in {options.out}")


def _device(name: str) -> str:
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise DigSegError(f"--device {name!r} cannot be used: {reason}") from None
    return name


def _lint_shards(options: argparse.Namespace) -> None:
    if options.duplicates:
        check_file("--duplicates", options.duplicates)

    from digseg.data.lint import lint_shards

    report = lint_shards(options.root)
    if options.duplicates:
        write_file("--duplicates", options.duplicates, "".join(g.to_line() for g in report.duplicates.groups))
    for problem in report.problems:
        say(problem)
    _say_duplicates(report.duplicates)
    looked_at = f"{report.samples} samples in {report.shards} shards of {report.splits} splits"
    if report.problems:
        say(
            f"{looked_at}: {len(report.problems)} problems; run data_prep/shard.py again to mend them (latents: "
            "data_prep/encode_latents.py)"
        )
        raise SystemExit(1)
    say(f"{looked_at}: intact")
    if options.strict and report.duplicates.leaks:
        raise SystemExit(1)


def _say_duplicates(duplicates: Duplicates) -> None:
    leaks = duplicates.leaks
    for group in leaks[:_SHOWN_LEAKS]:
        say(f"leak: {group}")
    if len(leaks) > _SHOWN_LEAKS:
        say(f"and {len(leaks) - _SHOWN_LEAKS} more leaks")
    flat = f"; {duplicates.flat} flat images were not compared" if duplicates.flat else ""
    say(
        f"{duplicates.images} images compared: {len(leaks)} leaks across splits or corpora, "
        f"{len(duplicates.groups) - len(leaks)} groups of the same or nearly the same image within a split{flat}"
    )


def _show_shards(options: argparse.Namespace) -> None:
    if options.samples < 1:
        raise DigSegError(f"--samples is {options.samples}; it must be at least 1")
    check_file("--out", options.out)

    from digseg.evaluation.shard_page import shard_page

    write_file("--out", options.out, shard_page(options.root, options.samples))
    say(f"open {options.out} in a browser")


if __name__ == "__main__":
    entry()
