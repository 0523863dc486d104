"""The segmenter of a run beside its engine: how it begins, and what becomes of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from digseg.config import Config
from digseg.model.export import LoadedModel, export_model, model_card
from digseg.model.lora import merged
from digseg.model.segmenter import build_segmenter
from digseg.model.switches import apply_switches
from digseg.model.text import build_text_table, load_text_encoder
from digseg.model.training_module import SegmenterLoss
from digseg.model.weights import sha256_of

_SEGMENTER = "segmenter."  # prefix of the segmenter's parameters in SegmenterLoss


class TrainedModel:
    """A new segmenter, the text table of the ``names`` that it is trained on, and its way out of the engine."""

    def __init__(self, config: Config, names: Sequence[str]) -> None:
        self._config = config
        self._encoder = load_text_encoder(config.model)
        self._table = build_text_table(names, self._encoder, config.data.queries.templates)
        self.segmenter = build_segmenter(config, self._encoder)
        self.segmenter.pathway.text_mean.copy_(self._table.mean)
        apply_switches(self.segmenter, config.training)
        self._buffers = {name: buffer.clone() for name, buffer in _persistent_buffers(self.segmenter)}
        frozen = {name for name, weight in self.segmenter.named_parameters() if not weight.requires_grad}
        self._frozen = {name: weight for name, weight in self.segmenter.state_dict().items() if name in frozen}

    @property
    def text_dim(self) -> int:
        """Entries of a class name's embedding."""
        return self._encoder.dim

    def frozen_sha256(self) -> str | None:
        """Of the weights that adapters are trained on; None where all weights are trained."""
        return sha256_of(self._frozen) if self._frozen else None

    def with_loss(self) -> SegmenterLoss:
        """The module that an engine trains."""
        return SegmenterLoss(self.segmenter, self._config, self._table.embeddings)

    def as_loaded(self, metadata: Mapping[str, Any] = MappingProxyType({})) -> LoadedModel:
        """The model as if it came from an export; its weights are the engine's."""
        card = model_card(self._config, self._table, self._encoder.fingerprint, metadata)
        return LoadedModel(self.segmenter, card, self._encoder)

    def state(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The segmenter's whole state with these trained ``weights``, named as the engine's module names them.

        Adapters are merged into the weights that they are on: the state is that of a segmenter without any.
        """
        trained = {name.removeprefix(_SEGMENTER): weight for name, weight in weights.items()}
        whole, lora = trained | self._buffers | self._frozen, self._config.model.lora
        return whole if lora is None else merged(whole, lora.scale)

    def export(self, directory: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write the model with these weights (on the CPU) into ``directory``."""
        export_model(directory, self.as_loaded(metadata), self.state(weights))


def _persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(module.named_parameters())
    return ((name, value) for name, value in module.state_dict().items() if name not in parameters)
