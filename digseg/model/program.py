"""A one-step model as one program of ``torch.export``: a file that PyTorch alone loads and runs.

It maps ``(images, text, mask)`` to probabilities, see :class:`OneStep`. The shapes are fixed when it is exported; the
class names are not, since their embeddings are an input. Beside the program the file holds ``digseg.json``: the shapes,
how an image becomes its input, and the embeddings of the classes that were named at export.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digseg import __version__
from digseg.errors import DigSegError
from digseg.model.attention import use_attention
from digseg.model.autoencoder import KLAutoencoder
from digseg.model.export import LoadedModel

SUFFIX = ".pt2"
FACTS = "digseg.json"
_FORMAT_VERSION = 1
_TOLERANCE = 1e-4  # of a probability, in float32


@dataclass(frozen=True, slots=True)
class ProgramShape:
    """The sizes that a program is made for."""

    height: int  # px, a multiple of the model's Segmenter.size_multiple
    width: int
    slots: int  # most classes of a query
    batch: int = 1  # images at a time


class OneStep(nn.Module):
    """All that a prediction computes between an image at working size and its probabilities."""

    colours: Tensor

    def __init__(self, model: LoadedModel, slots: int) -> None:
        super().__init__()
        self.segmenter = model.segmenter
        if isinstance(model.segmenter.autoencoder, KLAutoencoder):
            self.vae = model.segmenter.autoencoder.vae  # here, its weights are the program's
        self.register_buffer("colours", model.colours(slots).clone())  # a view would take the palette with it

    def forward(self, images: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """Probabilities float32 ``[B, K, H, W]`` that sum to 1 over K; those of empty slots are 0.

        Args:
            images: ``[B, 3, H, W]``, RGB in [-1, 1].
            text: standardised class-name embeddings ``[B, K, D]``.
            mask: bool ``[B, K]``, True where a slot holds a class.
        """
        colours = self.colours.expand(len(images), -1, -1)
        probabilities: Tensor = self.segmenter(images, text, mask, colours).logits.softmax(1)
        return probabilities


def export_program(file: Path, model: LoadedModel, classes: Sequence[Sequence[str]], shape: ProgramShape) -> float:
    """Write ``model``, on the CPU, as a program; ``file`` appears when it was read back and gives what the model gives.

    Args:
        file: its name ends with :data:`SUFFIX`.
        classes: the wordings of each class whose embedding goes with the program; the first is its name.

    Returns:
        The largest difference of a probability between the file's program and the model.

    Raises:
        DigSegError: a model of the multi-step objective, a shape that the model cannot take, a file that cannot be
            written, or a program that computes something else than the model.
    """
    _check(model, classes, shape)
    module = OneStep(model, shape.slots).eval()
    embeddings = model.embed(classes)
    inputs = _inputs(embeddings, shape)
    partial = file.with_name(f".{file.stem}.{os.getpid()}{SUFFIX}")
    with torch.no_grad():
        # Before the program is traced: what the model computes once and keeps is a constant of it.
        use_attention(model.segmenter.unet, "auto", torch.device("cpu"))
        expected = module(*inputs)
        use_attention(model.segmenter.unet, "sdpa", torch.device("cpu"))  # one operator, fast on every device
        program = torch.export.export(module, inputs)
    facts = json.dumps(_facts(model, classes, embeddings, shape), indent=1)
    try:
        torch.export.save(program, partial, extra_files={FACTS: facts})
        difference = float((torch.export.load(partial).module()(*inputs) - expected).abs().max())
        if not difference <= _TOLERANCE:  # nor is it a number
            raise DigSegError(
                f"{file} was not written: the exported program's probabilities differ by up to {difference:.2g} from "
                f"the model's, more than the {_TOLERANCE:g} of rounding; predict with the model itself"
            )
        partial.replace(file)
    except OSError as error:
        raise DigSegError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return difference


def _check(model: LoadedModel, classes: Sequence[Sequence[str]], shape: ProgramShape) -> None:
    if model.card.objective.type != "one_step":
        raise DigSegError(
            "this model has the multi-step objective and samples its masks in a loop; only a model of the one-step "
            "objective (objective.type: one_step) is one program"
        )
    multiple = model.segmenter.size_multiple
    for name, side in (("height", shape.height), ("width", shape.width)):
        if side < 1 or side % multiple:
            raise DigSegError(
                f"the {name} of {side} px is no multiple of {multiple}, which is a cell of the U-Net's coarsest level; "
                f"the next one is {max(1, -(-side // multiple)) * multiple}"
            )
    if shape.batch < 1:
        raise DigSegError(f"a batch of {shape.batch} images holds none; give 1 or more")
    if not len(classes) <= shape.slots <= model.card.max_classes:
        raise DigSegError(
            f"a program with {shape.slots} slots for {len(classes)} classes: a slot for each is needed, and a pass of "
            f"this model holds at most {model.card.max_classes}"
        )


def _inputs(embeddings: Tensor, shape: ProgramShape) -> tuple[Tensor, Tensor, Tensor]:
    """Noise for images, and the classes in the first slots."""
    num_classes, dim = embeddings.shape
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(shape.batch, 3, shape.height, shape.width, generator=generator) * 2 - 1
    text = torch.zeros(shape.batch, shape.slots, dim)
    text[:, :num_classes] = embeddings
    mask = (torch.arange(shape.slots) < num_classes).repeat(shape.batch, 1)
    return images, text, mask


def _facts(
    model: LoadedModel, classes: Sequence[Sequence[str]], embeddings: Tensor, shape: ProgramShape
) -> dict[str, Any]:
    """What a caller has to know, as plain JSON values."""
    batch, slots, height, width = shape.batch, shape.slots, shape.height, shape.width
    return {
        "format_version": _FORMAT_VERSION,
        "digseg_version": __version__,
        "torch_version": torch.__version__,
        "inputs": {
            "images": {
                "shape": [batch, 3, height, width],
                "dtype": "float32",
                "content": "RGB pixels / 127.5 - 1; the image resized, and padded by repeating its border",
            },
            "text": {"shape": [batch, slots, embeddings.shape[1]], "dtype": "float32", "content": "rows of embeddings"},
            "mask": {"shape": [batch, slots], "dtype": "bool", "content": "true where a slot of text holds a class"},
        },
        "output": {
            "shape": [batch, slots, height, width],
            "dtype": "float32",
            "content": "probabilities at temperature 1; resize them to the image before the arg max over the slots",
        },
        "size_multiple": model.segmenter.size_multiple,
        "short_side": model.card.short_side,
        "temperature": model.card.temperature,
        "classes": [{"name": wordings[0], "synonyms": list(wordings[1:])} for wordings in classes],
        "embeddings": embeddings.tolist(),
        "text_fingerprint": model.card.text_fingerprint,
        "model": model.card.metadata,
    }
