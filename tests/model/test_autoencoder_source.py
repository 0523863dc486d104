from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from kl_autoencoder import write_kl_autoencoder
from safetensors.torch import load_file, save_file
from small_world import export_random_model, small_config

from digseg.config import AutoencoderConfig
from digseg.errors import DigSegError
from digseg.model.autoencoder import build_autoencoder
from digseg.model.autoencoder_source import autoencoder_of


def test_diffusers_directory_and_its_vae_folder_are_the_same_autoencoder(tmp_path: Path) -> None:
    checkpoint = write_kl_autoencoder(tmp_path / "sd")
    expected = AutoencoderConfig(type="kl", path=str(checkpoint / "vae"))
    assert autoencoder_of(str(checkpoint)) == expected
    assert autoencoder_of(str(checkpoint / "vae")) == expected


def test_exported_model_names_its_autoencoder(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    assert autoencoder_of(str(export_random_model(tmp_path / "model", config))) == config.model.autoencoder


def test_hub_id_is_looked_up_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--sd"
    write_kl_autoencoder(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    found = autoencoder_of("owner/sd")
    assert found.path == str(repository / "snapshots" / revision / "vae")
    with pytest.raises(DigSegError, match="cannot be fetched from the Hugging Face hub"):
        autoencoder_of("owner/other")


@pytest.mark.parametrize("model", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_missing_folder_is_named(model: str) -> None:
    with pytest.raises(DigSegError, match="no such folder; give a diffusers directory"):
        autoencoder_of(model)


def test_folder_without_an_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"neither vae/config.json nor config.json"):
        autoencoder_of(str(tmp_path))


def test_identity_changes_with_the_encoders_weights_and_scale_but_not_with_the_place_or_the_decoder(
    tmp_path: Path,
) -> None:
    def identity(checkpoint: Path) -> dict[str, str]:
        return build_autoencoder(autoencoder_of(str(checkpoint))).identity

    first = write_kl_autoencoder(tmp_path / "first")
    names = set(identity(first))
    assert names == {"type", "factor", "scaling factor", "architecture", "weights"}
    assert identity(first) == identity(Path(shutil.copytree(first, tmp_path / "copy")))
    changed = {
        "weights": write_kl_autoencoder(tmp_path / "weights", seed=1),
        "scaling factor": write_kl_autoencoder(tmp_path / "scale", scaling_factor=0.13025),
    }
    for part, checkpoint in changed.items():
        assert {name for name in names if identity(checkpoint)[name] != identity(first)[name]} == {part}

    weights = first / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    before = identity(first)
    save_file({name: w + 1 if name.startswith("decoder.") else w for name, w in state.items()}, weights)
    assert identity(first) == before
