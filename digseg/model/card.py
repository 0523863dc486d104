"""The card of an exported model: what it is, for programs (digseg.json) and for people (README.md)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from digseg.config import ModelConfig, ObjectiveConfig
from digseg.config.section import is_hub_id
from digseg.errors import DigSegError

FORMAT_VERSION = 2
_CARD = "digseg.json"
_README = "README.md"


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
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)  # that it was trained with
    temperature: float = 1.0  # of its probabilities, see digseg.evaluation.temperature


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
                "objective": ObjectiveConfig.model_validate(values.get("objective", {})),
                "names": tuple(values["names"]),
            }
        )
    except FileNotFoundError:
        raise DigSegError(f"{directory}: not an exported model (it has no {_CARD})") from None
    except (OSError, json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise DigSegError(f"{path}: not a readable model card ({error}); export the model anew") from None


def write_card(directory: Path, card: ModelCard) -> None:
    """Write the card beside the weights of a model; one that is there is replaced whole."""
    values = {
        **asdict(card),
        "model": card.model.model_dump(mode="json"),
        "objective": card.objective.model_dump(mode="json"),
    }
    texts = {_CARD: json.dumps(values, indent=2, sort_keys=True) + "\n", _README: _readme(card)}
    for name, text in texts.items():
        partial = directory / f".{name}.tmp"
        partial.write_text(text, encoding="utf-8")
        partial.replace(directory / name)


def _readme(card: ModelCard) -> str:
    """The page of a model, in the layout of the Hugging Face hub."""
    facts = {key: value for key, value in card.metadata.items() if not isinstance(value, dict)}
    datasets = card.metadata.get("datasets", {})
    base = card.model.pretrained
    lora = "" if card.model.lora is None else f", with LoRA of rank {card.model.lora.rank} merged into its weights"
    how = "in one step" if card.objective.type == "one_step" else "in a few denoising steps"
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "pipeline_tag: image-segmentation",
            *([f"base_model: {base}"] if base is not None and is_hub_id(base) else []),
            "---",
            f"# {card.metadata.get('run', 'DigSeg')}",
            "",
            f"Segments an image into classes that are named in words, {how} of a diffusion U-Net.",
            "",
            "```python",
            "from digseg.pipeline import DiGSegPipeline",
            "",
            'pipeline = DiGSegPipeline.from_pretrained("FOLDER")',
            f'result = pipeline("image.jpg", {list(card.names[:3])!r})',
            "```",
            "",
            "## Training",
            "",
            f"- U-Net: {'from scratch' if base is None else f'fine-tuned from {base}{lora}'}",
            f"- autoencoder: {card.model.autoencoder.type}; text encoder: {card.text_fingerprint}",
            f"- shorter side of an image: {card.short_side} px",
            *(f"- {key.replace('_', ' ')}: {value}" for key, value in sorted(facts.items())),
            "",
            "| corpus | manifest |",
            "|---|---|",
            *(f"| {name} | {digest} |" for name, digest in sorted(datasets.items())),
            "",
            "## Classes",
            "",
            f"Trained on these names: {', '.join(card.names)}.",
            "Other names are read through the text encoder, without a promise that their objects are found.",
            "",
        ]
    )
