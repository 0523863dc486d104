"""The exported model: a diffusers-style directory of safetensors and JSON, written whole or not at all.

::

    digseg.json                  what the model is: configuration, text statistics, vocabulary, lineage
    unet/                        diffusers UNet2DConditionModel (config.json, *.safetensors)
    pathway/model.safetensors    query encoder, feedback, head, mean of the text embeddings
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from digseg import __version__
from digseg.config import Config, ModelConfig
from digseg.errors import DigSegError
from digseg.model.autoencoder import build_autoencoder
from digseg.model.denoiser import build_unet
from digseg.model.palette import palette
from digseg.model.segmenter import Segmenter
from digseg.model.text import TextEncoder, TextTable, load_text_encoder, standardise

FORMAT_VERSION = 1
_CARD = "digseg.json"
_UNET = "unet/diffusion_pytorch_model.safetensors"
_PATHWAY = "pathway/model.safetensors"
_TEXT_MEAN = "text_mean"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What an exported model says of itself."""

    format_version: int
    digseg_version: str
    model: ModelConfig
    text_fingerprint: str
    names: tuple[str, ...]  # class names it was trained on
    short_side: int  # px: the size that images are brought to ...
    corpus_short_sides: dict[str, int]  # ... unless they are of a corpus that was trained at another
    palette_size: int
    max_classes: int  # per pass
    metadata: dict[str, Any]  # lineage: run, step, data digests, ...
    temperature: float = 1.0  # of its probabilities, see digseg.evaluation.temperature


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An exported model, ready to predict."""

    segmenter: Segmenter
    card: ModelCard
    text_encoder: TextEncoder
    text_mean: Tensor  # float32 [D]

    def embed(self, classes: Sequence[Sequence[str]]) -> Tensor:
        """Standardised embeddings ``[K, D]`` of K classes, each in one or more wordings, whose directions are averaged.

        Radford et al. 2021, "Learning transferable visual models from natural language supervision", section 3.1.4.
        """
        raw = self.text_encoder.encode([wording for wordings in classes for wording in wordings])
        parts = torch.split(raw, [len(wordings) for wordings in classes])
        return standardise(torch.stack([F.normalize(part.mean(0), dim=0) for part in parts]), self.text_mean)

    def colours(self, num_classes: int) -> Tensor:
        """The first colours of the palette, ``[K, 3]``."""
        return palette(self.card.palette_size)[:num_classes]


def export_model(
    directory: Path,
    state: Mapping[str, Tensor],
    config: Config,
    table: TextTable,
    text_fingerprint: str,
    metadata: Mapping[str, Any],
) -> Path:
    """Write the weights ``state`` (of a :class:`Segmenter`) with all that prediction needs; replaces ``directory``.

    The model appears by rename: a reader never sees half of it.
    """
    temporary = directory.with_name(f".{directory.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "pathway").mkdir(parents=True)
    unet = build_unet(config.model.unet, build_autoencoder(config.model.autoencoder).channels)
    unet.load_state_dict({k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")})
    unet.save_pretrained(temporary / "unet", safe_serialization=True)
    rest = {k: v.detach().cpu().contiguous() for k, v in state.items() if not k.startswith("unet.")}
    save_file({**rest, _TEXT_MEAN: table.mean.contiguous()}, temporary / _PATHWAY)
    write_card(temporary, model_card(config, table, text_fingerprint, metadata))
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    return directory


def model_card(config: Config, table: TextTable, text_fingerprint: str, metadata: Mapping[str, Any]) -> ModelCard:
    """What a model of this run says of itself."""
    return ModelCard(
        format_version=FORMAT_VERSION,
        digseg_version=__version__,
        model=config.model,
        text_fingerprint=text_fingerprint,
        names=table.names,
        short_side=config.data.short_side,
        corpus_short_sides={e.name: e.short_side for e in config.data.corpora if e.short_side is not None},
        palette_size=config.data.queries.palette_size,
        max_classes=config.data.queries.max_classes,
        metadata=dict(metadata),
    )


def is_export(directory: Path) -> bool:
    """Whether ``directory`` holds an exported model."""
    return (directory / _CARD).is_file()


def read_card(directory: Path) -> ModelCard:
    """The card of an exported model.

    Raises:
        DigSegError: ``directory`` holds no exported model, or one of another format.
    """
    path = directory / _CARD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise DigSegError(f"{path}: model format {version}, this version reads {FORMAT_VERSION}; export it anew")
        return ModelCard(
            **{
                **values,
                "model": ModelConfig.model_validate(values["model"]),
                "names": tuple(values["names"]),
            }
        )
    except FileNotFoundError:
        raise DigSegError(f"{directory}: not an exported model (it has no {_CARD})") from None
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise DigSegError(f"{path}: not a readable model card ({error}); export the model anew") from None


def write_card(directory: Path, card: ModelCard) -> None:
    """Write the card beside the weights of a model; one that is there is replaced whole."""
    values = {**asdict(card), "model": card.model.model_dump(mode="json")}
    partial = directory / f".{_CARD}.tmp"
    partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(directory / _CARD)


def load_model(directory: Path) -> LoadedModel:
    """Load an exported model for inference.

    Raises:
        DigSegError: a missing or damaged file, weights of another architecture or not finite, or another
            text encoder than the one it was trained with.
    """
    card = read_card(directory)
    text_encoder = load_text_encoder(card.model.text)
    if text_encoder.fingerprint != card.text_fingerprint:
        raise DigSegError(
            f"{directory}: trained with text encoder {card.text_fingerprint}, but {text_encoder.fingerprint} is "
            "installed; class names would be misread"
        )
    segmenter = Segmenter(card.model, text_encoder.dim, build_autoencoder(card.model.autoencoder))
    state = {f"unet.{k}": v for k, v in _read_weights(directory / _UNET).items()}
    state |= _read_weights(directory / _PATHWAY)
    text_mean = state.pop(_TEXT_MEAN, None)
    if text_mean is None or any(not bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise DigSegError(f"{directory}: the weights are incomplete or not finite; export the model anew")
    try:
        segmenter.load_state_dict(state)
    except RuntimeError as error:
        raise DigSegError(f"{directory}: weights of another architecture than {_CARD} says: {error}") from None
    segmenter.eval().requires_grad_(False)
    return LoadedModel(segmenter, card, text_encoder, text_mean)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise DigSegError(f"{path}: missing; the exported model is incomplete") from None
    except (OSError, SafetensorError) as error:
        raise DigSegError(f"{path}: damaged weights ({error}); export the model anew") from None
