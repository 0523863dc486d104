from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_world import VOCABULARY, export_random_model, small_config

from digseg.errors import DigSegError
from digseg.model import build_segmenter
from digseg.model.export import load_model, read_card


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export_random_model(tmp_path / "model", small_config(tmp_path))


def test_a_loaded_model_has_the_exported_weights_and_card(exported: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    model = load_model(exported)
    for name, tensor in build_segmenter(config).state_dict().items():
        assert torch.equal(tensor, model.segmenter.state_dict()[name]), name
    assert model.card.names == tuple(sorted(VOCABULARY))
    assert model.card.short_side == config.data.short_side
    assert model.card.metadata == {"step": 0}
    assert not model.segmenter.training


def test_the_unet_is_a_plain_diffusers_directory(exported: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(exported / "unet", use_safetensors=True)
    assert unet.config.in_channels == 96


def test_damage_is_named(exported: Path) -> None:
    pathway = exported / "pathway" / "model.safetensors"
    whole = pathway.read_bytes()
    pathway.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DigSegError, match=r"pathway/model.safetensors: damaged weights"):
        load_model(exported)
    pathway.unlink()
    with pytest.raises(DigSegError, match=r"pathway/model.safetensors: missing"):
        load_model(exported)


def test_weights_that_are_not_finite_are_refused(exported: Path) -> None:
    pathway = exported / "pathway" / "model.safetensors"
    state = load_file(pathway)
    state["feedback.gate"] = torch.tensor(float("nan"))
    save_file(state, pathway)
    with pytest.raises(DigSegError, match="not finite"):
        load_model(exported)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 99, "model format 99, this version reads 1"),
        ("text_fingerprint", "minilm:0", "trained with text encoder minilm:0"),
        ("names", None, "not a readable model card"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(exported: Path, key: str, value: object, message: str) -> None:
    card = exported / "digseg.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), key: value}))
    with pytest.raises(DigSegError, match=message):
        load_model(exported)


def test_weights_of_another_architecture_are_refused(exported: Path) -> None:
    card = exported / "digseg.json"
    values = json.loads(card.read_text())
    values["model"]["pathway"]["dim"] = 24
    card.write_text(json.dumps(values))
    with pytest.raises(DigSegError, match=r"weights of another architecture"):
        load_model(exported)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"not an exported model \(it has no digseg.json\)"):
        read_card(tmp_path)
