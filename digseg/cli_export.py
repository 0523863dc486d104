"""The command `digseg export`: a model as a program that needs nothing but PyTorch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from digseg.cli_files import check_file
from digseg.cli_models import TRACKING_URI_HELP
from digseg.cli_prediction import MODEL_HELP, add_class_options, asked_classes
from digseg.console import say
from digseg.errors import DigSegError


def add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`digseg export`."""
    parser = commands.add_parser(
        "export",
        help="write a model of the one-step objective as a program of torch.export",
        description="Writes one file that PyTorch alone loads and runs, after comparing what it computes with the "
        "model. It takes images of one size; the embeddings of its class names are an input.",
    )
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    add_class_options(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the program; its name ends with .pt2")
    parser.add_argument("--size", metavar="HxW", help="px of its images (default: a square of the working size)")
    parser.add_argument(
        "--slots", type=int, metavar="N", help="most classes of a query (default: as many as are named)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    parser.add_argument("--tracking-uri", help=TRACKING_URI_HELP)
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    classes = asked_classes(options)
    size = None if options.size is None else _parsed_size(options.size)
    if options.out.suffix != ".pt2":
        raise DigSegError(f"--out {options.out}: the name of a program of torch.export ends with .pt2")
    check_file("--out", options.out)

    from digseg.registry.models import resolve

    directory, reference = resolve(options.model, options.tracking_uri)

    from digseg.model.export import load_model
    from digseg.model.program import ProgramShape, export_program

    model = load_model(directory)
    if size is None:
        multiple = model.segmenter.size_multiple
        side = -(-model.card.short_side // multiple) * multiple
        size = side, side
    slots = len(classes) if options.slots is None else options.slots
    shape = ProgramShape(*size, slots, options.batch)
    difference = export_program(options.out, model, [query.wordings for query in classes], shape)
    say(
        f"{reference.uri}: {options.out} takes {shape.batch} x 3 x {shape.height} x {shape.width} px and up to "
        f"{shape.slots} classes; its probabilities differ from the model's by {difference:.1e} at most"
    )


def _parsed_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise DigSegError(f"--size {text!r}: give height and width in pixels, such as 256x384")
    return int(match[1]), int(match[2])
