"""The options of commands that predict: the classes, and one for each field of `digseg.config.PredictionConfig`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from digseg.config import PredictionConfig, section_of_options

if TYPE_CHECKING:  # takes a moment to import
    from digseg.evaluation.classes import ClassQuery

MODEL_HELP = "models:/NAME@ALIAS, models:/NAME/VERSION or a directory"


def add_class_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the classes to a command."""
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument("--classes", help='names, perhaps with synonyms: "road=street|lane, car, sky"')
    classes.add_argument("--classes-file", type=Path, metavar="FILE", help="YAML or JSON, such as an earlier legend")
    parser.add_argument("--background", action="store_true", help="add a class for everything not named")


def asked_classes(options: argparse.Namespace) -> tuple[ClassQuery, ...]:
    """The classes that were named.

    Raises:
        DigSegError: none, an empty or repeated name, or a file that cannot be read.
    """
    from digseg.evaluation.classes import check_classes, parse_classes, read_classes

    given = read_classes(options.classes_file) if options.classes_file else parse_classes(options.classes)
    return check_classes(given, options.background)


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the model is asked to a command."""
    group = parser.add_argument_group("how the model is asked")
    group.add_argument(
        "--short-side", type=int, metavar="PX", help="size that images are segmented at (default: the model's)"
    )
    group.add_argument(
        "--classes-per-pass",
        type=int,
        metavar="N",
        help="classes asked in one pass beside the background; 1: each alone (default: as many as fit)",
    )
    group.add_argument(
        "--template",
        dest="templates",
        action="append",
        metavar="TEXT",
        help='wording of a class, such as "a photo of a {}"; may be repeated, which averages (default: "{}")',
    )
    group.add_argument(
        "--window", type=int, metavar="PX", help="cut images into overlapping windows of this side (default: not cut)"
    )
    group.add_argument("--overlap", type=float, metavar="SHARE", help="share of a window's side (default: 0.25)")
    sampled = "of a model trained with the multi-step objective: "
    group.add_argument("--steps", type=int, metavar="N", help=f"{sampled}DDIM steps, 1 to 50 (default: 10)")
    group.add_argument("--seed", type=int, metavar="N", help=f"{sampled}seed of the noise (default: 0)")
    group.add_argument("--ensemble", type=int, metavar="N", help=f"{sampled}masks that are averaged (default: 1)")


def prediction_settings(options: argparse.Namespace) -> PredictionConfig:
    """What was given.

    Raises:
        DigSegError: a value that makes no sense.
    """
    given = {name: getattr(options, name) for name in PredictionConfig.model_fields}
    return section_of_options(PredictionConfig, given)
