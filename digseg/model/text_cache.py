"""Embeddings of a vocabulary on disk, found by what they are made of: the encoder's weights and the names."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from digseg.model.text import TextEncoder


def cache_directory() -> Path:
    """``$DIGSEG_CACHE``, else ``digseg`` in the user's cache directory."""
    if chosen := os.environ.get("DIGSEG_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "digseg"


def cached_embeddings(names: Sequence[str], encoder: TextEncoder) -> Tensor:
    """What ``encoder.encode(names)`` gives, float32 ``[len(names), dim]``; encoded once for all runs of a user.

    A file that is damaged is made anew, and one that cannot be written is done without.
    """
    key = hashlib.sha256(json.dumps([encoder.fingerprint, *names]).encode()).hexdigest()
    file = cache_directory() / "text" / f"{key}.safetensors"
    found = _read(file, (len(names), encoder.dim))
    if found is not None:
        return found
    embeddings = encoder.encode(names)
    _write(file, embeddings)
    return embeddings


def _read(file: Path, shape: tuple[int, int]) -> Tensor | None:
    try:
        embeddings = load_file(file)["embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    return embeddings if embeddings.shape == shape and bool(torch.isfinite(embeddings).all()) else None


def _write(file: Path, embeddings: Tensor) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": embeddings.contiguous()}, partial)
        partial.replace(file)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            partial.unlink()
