"""Evaluation protocols: which corpora a model is asked about, and in which words.

Whatever the protocol, every image is asked for the whole vocabulary of its corpus.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from digseg.config.section import Section


class Protocol(Section):
    """A file of ``configs/protocols/``. What a model was trained on, it says itself (its card)."""

    name: str = "all"
    # Corpora that the models were trained on, that they never saw, or both.
    corpora: Literal["any", "trained", "untrained"] = "any"
    # Only corpora with classes whose names were never trained on; the others answer nothing about open vocabularies.
    unseen_classes: bool = False
    # corpus -> class -> other wordings: the full vocabulary once more with that one class renamed
    synonyms: dict[str, dict[str, list[str]]] = Field(default={})
