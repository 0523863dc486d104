"""The model card of a registered version: what it is, what it was trained on, what it is good for; in Markdown, which
MLflow's page shows as the version's description."""

from __future__ import annotations

from collections.abc import Sequence

from digseg.data.format import Manifest
from digseg.model.card import ModelCard

_LENGTH = 5000  # of a description, in the databases that MLflow supports


def model_card(card: ModelCard, trained_on: Sequence[Manifest]) -> str:
    """The text.

    Args:
        trained_on: the splits trained on.
    """
    facts = card.metadata
    corpora = [
        f"| {manifest.corpus} | {manifest.split} | {manifest.domain.replace('_', ' ')} | {manifest.samples} "
        f"| {manifest.licence.replace('|', '/')} |"
        for manifest in trained_on
    ]
    return "\n".join(
        [
            "Segments an image into the classes that are named to it: every pixel gets one of the names.",
            "",
            "## Training data",
            "| corpus | split | domain | images | licence |",
            "|---|---|---|---|---|",
            *corpora,
            "",
            "## Model",
            f"- {facts.get('step', '?')} steps, seed {facts.get('seed', '?')}, DigSeg {card.digseg_version}",
            f"- works at {card.short_side} px (shorter side), with at most {card.max_classes} classes in a pass",
            f"- class names are read by the text encoder {card.text_fingerprint}",
            "",
            "## Use and limits",
            "- Input and output are in the signature; the tags say where the version comes from.",
            "- The tags `miou.CORPUS` are of the last evaluation of each corpus, `mean_iou` is their mean. On images "
            "unlike its training data, and for names unlike those it knows, the model can be much worse.",
            "- The licences of the training data may restrict what the model may be used for.",
            "",
            "## Class names trained on",
            ", ".join(card.names),
        ]
    )[:_LENGTH]
