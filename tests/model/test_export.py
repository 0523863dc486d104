from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_world import VOCABULARY, export_random_model, small_config

from digseg.errors import DigSegError
from digseg.model import build_segmenter
from digseg.model.card import read_card
from digseg.model.export import load_model, save_model


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export_random_model(tmp_path / "model", small_config(tmp_path))


def test_a_loaded_model_has_the_exported_weights_and_card(exported: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    model = load_model(exported)
    loaded = model.segmenter.state_dict()
    for name, tensor in build_segmenter(config).state_dict().items():
        assert torch.equal(tensor, loaded[name]) or name == "pathway.text_mean", name
    assert loaded["pathway.text_mean"].abs().max() > 0
    assert model.card.names == tuple(sorted(VOCABULARY))
    assert model.card.short_side == config.data.short_side
    assert model.card.metadata == {"step": 0}
    assert not model.segmenter.training


def test_only_an_empty_folder_or_an_exported_model_is_replaced(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(exported)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_model(folder, model)
    (folder / "README.md").write_text("an earlier page")
    save_model(folder, model)
    assert (folder / "README.md").read_bytes() == (exported / "README.md").read_bytes()
    monkeypatch.chdir(folder)
    for replaced in (folder, Path()):
        with pytest.raises(DigSegError, match="folder is the current folder or holds it"):
            save_model(replaced, model)
    (folder / "digseg.json").unlink()
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    for kept in (folder, Path(), tmp_path, Path(".."), tmp_path / "file"):
        with pytest.raises(DigSegError, match="holds something that is no exported model; name a new or empty folder"):
            save_model(kept, model)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_unet_is_a_plain_diffusers_directory(exported: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(exported / "unet", use_safetensors=True)
    assert unet.config.in_channels == 96


def test_damage_is_named(exported: Path) -> None:
    pathway = exported / "pathway" / "diffusion_pytorch_model.safetensors"
    whole = pathway.read_bytes()
    pathway.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DigSegError, match=r"pathway: damaged weights"):
        load_model(exported)
    pathway.unlink()
    with pytest.raises(DigSegError, match=r"pathway holds no weights \(diffusion_pytorch_model.safetensors\)"):
        load_model(exported)


def test_weights_that_are_not_finite_are_refused(exported: Path) -> None:
    pathway = exported / "pathway" / "diffusion_pytorch_model.safetensors"
    state = load_file(pathway)
    state["scales.0.gate"] = torch.tensor([float("nan")])
    save_file(state, pathway)
    with pytest.raises(DigSegError, match=r"scales.0.gate is not finite"):
        load_model(exported)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 99, "model format 99, this version reads 2"),
        ("text_fingerprint", "minilm:0", "trained with text encoder minilm:0"),
        ("names", None, "not a readable model card"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(exported: Path, key: str, value: object, message: str) -> None:
    card = exported / "digseg.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), key: value}))
    with pytest.raises(DigSegError, match=message):
        load_model(exported)


@pytest.mark.parametrize(("part", "key", "value"), [("pathway", "dim", 24), ("unet", "block_out_channels", [32, 32])])
def test_weights_of_another_architecture_are_refused(exported: Path, part: str, key: str, value: object) -> None:
    config = exported / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(DigSegError, match=rf"{part}: weights of another architecture than config.json says"):
        load_model(exported)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"not an exported model \(it has no digseg.json\)"):
        read_card(tmp_path)
