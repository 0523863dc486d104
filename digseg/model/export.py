"""The exported model: a directory in the layout of a diffusers pipeline, written whole or not at all.

::

    model_index.json             the components, as diffusers lists them
    digseg.json, README.md       what the model is (see digseg.model.card)
    unet/                        diffusers UNet2DConditionModel (config.json, *.safetensors)
    pathway/                     query encoder, aligned scales, head, mean of the text embeddings
    scheduler/                   the noise schedule
    vae/                         where the autoencoder has weights
    text_encoder/, tokenizer/    where the text encoder is no installed package
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

from digseg import __version__
from digseg.config import Config
from digseg.errors import DigSegError
from digseg.model.autoencoder import Autoencoder, KLAutoencoder, build_autoencoder
from digseg.model.card import FORMAT_VERSION, ModelCard, is_export, read_card, write_card
from digseg.model.palette import palette
from digseg.model.pathway import Pathway
from digseg.model.pretrained import SCHEDULER, UNET, VAE, Part, load_scheduler, load_unet, load_vae
from digseg.model.pretrained import load_model as load_part
from digseg.model.segmenter import Segmenter
from digseg.model.text import CLIPText, TextEncoder, TextTable, load_text_encoder, standardise

PATHWAY = Part("pathway", "diffusion_pytorch_model")
_INDEX = "model_index.json"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An exported model, ready to predict."""

    segmenter: Segmenter
    card: ModelCard
    text_encoder: TextEncoder

    def embed(self, classes: Sequence[Sequence[str]]) -> Tensor:
        """Standardised embeddings ``[K, D]`` of K classes, each in one or more wordings, whose directions are averaged.

        Radford et al. 2021, "Learning transferable visual models from natural language supervision", section 3.1.4.
        """
        raw = self.text_encoder.encode([wording for wordings in classes for wording in wordings])
        parts = torch.split(raw, [len(wordings) for wordings in classes])
        return standardise(
            torch.stack([F.normalize(part.mean(0), dim=0) for part in parts]), self.segmenter.pathway.text_mean.cpu()
        )

    def colours(self, num_classes: int) -> Tensor:
        """The first colours of the palette, ``[K, 3]``."""
        return palette(self.card.palette_size)[:num_classes]

    @property
    def components(self) -> dict[str, Any]:
        """All that has files in an export, by its folder; None where this model has no such part."""
        autoencoder = self.segmenter.autoencoder
        return {
            UNET.folder: self.segmenter.unet,
            PATHWAY.folder: self.segmenter.pathway,
            SCHEDULER.folder: self.segmenter.scheduler,
            VAE.folder: autoencoder.vae if isinstance(autoencoder, KLAutoencoder) else None,
            "text_encoder": None,
            "tokenizer": None,
            **self.text_encoder.modules,
        }


def export_model(directory: Path, model: LoadedModel, weights: Mapping[str, Tensor]) -> Path:
    """Write a model that is being trained, with all that prediction needs; replaces ``directory``.

    Args:
        model: its segmenter's own weights are not read (they may be partitioned).
        weights: of the segmenter, by the names of its parameters and buffers, on the CPU.

    Raises:
        DigSegError: as :func:`save_model` says.
    """
    segmenter = Segmenter(
        _with_weights(model.segmenter.unet, weights, "unet."),
        _with_weights(model.segmenter.pathway, weights, "pathway."),
        model.segmenter.autoencoder,
        model.segmenter.scheduler,
    )
    return save_model(directory, replace(model, segmenter=segmenter))


def save_model(directory: Path, model: LoadedModel) -> Path:
    """Write a model; replaces ``directory``, by rename: a reader never sees half of it.

    Raises:
        DigSegError: ``directory`` is there, and neither empty nor an exported model, or it cannot be replaced.
    """
    target = directory.resolve()
    _check_replaceable(target)
    temporary, earlier = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    index: dict[str, Any] = {"_class_name": "DiGSegPipeline", "_diffusers_version": diffusers.__version__}
    for name, component in model.components.items():
        index[name] = [None, None] if component is None else _library_and_class(component)
        if component is not None:
            component.save_pretrained(temporary / name)
    (temporary / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_card(temporary, model.card)
    # Moved first: a removal that is cut off would leave what is no exported model, and is never replaced.
    if target.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        target.rename(earlier)
    temporary.rename(target)
    shutil.rmtree(earlier, ignore_errors=True)
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
        objective=config.objective,
    )


def load_model(directory: Path) -> LoadedModel:
    """Load an exported model for inference.

    Raises:
        DigSegError: a missing or damaged file, weights of another architecture or not finite, or another
            text encoder than the one it was trained with.
    """
    card, source = read_card(directory), str(directory)
    text_encoder = _text_encoder(directory, card)
    if text_encoder.fingerprint != card.text_fingerprint:
        raise DigSegError(
            f"{directory}: trained with text encoder {card.text_fingerprint}, but {text_encoder.fingerprint} is "
            "installed; class names would be misread"
        )
    pathway = load_part(Pathway, directory / PATHWAY.folder, PATHWAY, source)
    unet, scheduler = load_unet(source, source), load_scheduler(source, source)
    segmenter = Segmenter(unet, pathway, _autoencoder(directory, card), scheduler)
    segmenter.eval().requires_grad_(False)
    return LoadedModel(segmenter, card, text_encoder)


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir() or (not is_export(directory) and any(directory.iterdir())):
        raise DigSegError(f"{directory} holds something that is no exported model; name a new or empty folder")
    if Path.cwd().is_relative_to(directory):
        raise DigSegError(f"{directory} is the current folder or holds it, and would be replaced; name another folder")


def _autoencoder(directory: Path, card: ModelCard) -> Autoencoder:
    trained_with = card.model.autoencoder
    if trained_with.type == "shuffle":
        return build_autoencoder(trained_with)
    return KLAutoencoder(load_vae(str(directory), str(directory)), trained_with.slicing, trained_with.tiling)


def _text_encoder(directory: Path, card: ModelCard) -> TextEncoder:
    if card.model.text.type == "minilm":
        return load_text_encoder(card.model)
    return CLIPText.load(str(directory), str(directory))


def _with_weights(model: Any, weights: Mapping[str, Tensor], prefix: str) -> Any:
    """A model of the same configuration with those of ``weights`` whose names begin with ``prefix``, not copied."""
    with torch.device("meta"):
        empty = type(model).from_config(model.config)
    own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    empty.load_state_dict(own, assign=True)
    return empty


def _library_and_class(component: Any) -> list[str]:
    """Where diffusers finds the class of a component: its library, or its module where that is this project."""
    module = type(component).__module__
    library = module.partition(".")[0]
    return [module if library == "digseg" else library, type(component).__name__]
