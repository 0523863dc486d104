from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusion_checkpoint import SCHEDULERS, UNETS, narrow_unet, write_checkpoint
from safetensors.torch import load_file, save_file
from small_world import small_config

from digseg.config import Config, ModelConfig
from digseg.errors import DigSegError
from digseg.model import build_segmenter
from digseg.model.autoencoder import build_autoencoder
from digseg.model.denoiser import build_scheduler, build_unet, grow_conv_in
from digseg.model.palette import palette
from digseg.model.text import CLIPText, load_text_encoder

UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sd") / "2.1")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.mark.parametrize("version", ["1.5", "2.0-base", "2.1"])
def test_a_grown_unet_on_image_and_mask_equals_the_base_on_their_mean(version: str, tmp_path: Path) -> None:
    base = narrow_unet(version).eval()
    base.save_pretrained(tmp_path / "unet")
    grown = build_unet(_model(tmp_path), latent_channels=4).eval()
    _check_growth(base, grown, size=16)
    said, expected = (json.loads(unet.to_json_string()) for unet in (grown, narrow_unet(version)))
    assert said == {**expected, "in_channels": 8}


@pytest.mark.slow
def test_the_full_sd2_unet_grows_too(tmp_path: Path) -> None:
    with torch.device("meta"):
        base: Any = UNet2DConditionModel(**UNETS["2.1"])
    base.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in base.parameters():
            # Of the scale that training leaves behind; drawing 866 million normal numbers would take longest.
            parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    assert sum(parameter.numel() for parameter in base.parameters()) == 865_910_724
    assert len(base.state_dict()) == 686
    image, noise, tokens = _inputs(base, size=8)
    with torch.no_grad():
        expected = base.eval()((image + noise) / 2, 999, tokens).sample
    base.save_pretrained(tmp_path / "unet")
    del base
    grown = build_unet(_model(tmp_path), latent_channels=4).eval()
    with torch.no_grad():
        result = grown(torch.cat([image, noise], 1), 999, tokens).sample
    assert torch.allclose(result, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_segmenter_on_closed_gates_runs_the_base_unet(checkpoint: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, checkpoint, pathway={"scales": 3})
    segmenter = build_segmenter(config).eval()
    assert [scale.gate.item() for scale in segmenter.pathway.scales] == [0.0, 0.0, 0.0]
    assert segmenter.size_multiple == 64
    base = narrow_unet("2.1").eval()
    images, text = torch.rand(1, 3, 64, 128) * 2 - 1, torch.randn(1, 2, 16)
    mask, colours = torch.ones(1, 2, dtype=torch.bool), palette()[:2][None]
    with torch.no_grad():
        output = segmenter(images, text, mask, colours)
        latents = segmenter.autoencoder.encode(images)
        residual = base(latents / 2, 999, segmenter.pathway.tokens(text, colours)).sample
    assert output.logits.shape == (1, 2, 64, 128)
    # Decoder blocks: 1/4, 1/2 and the whole of the latents' resolution.
    assert [tuple(logits.shape[2:]) for logits in output.feedback_logits] == [(2, 4), (4, 8), (8, 16)]
    posterior = segmenter.autoencoder.compose(output.logits.softmax(1), colours)
    assert torch.allclose(output.mask_latents, posterior + residual, atol=1e-5)


def test_every_part_of_a_checkpoint_is_its_own(checkpoint: Path) -> None:
    config = _model(checkpoint)
    assert build_autoencoder(config.autoencoder).factor == 8
    encoder = load_text_encoder(config)
    assert isinstance(encoder, CLIPText)
    assert encoder.dim == 16
    unet = build_unet(config, 4)
    expected = load_file(checkpoint / UNET_WEIGHTS)
    for name, weight in unet.state_dict().items():
        assert name == "conv_in.weight" or torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("version", sorted(SCHEDULERS))
def test_the_base_schedule_is_inherited(version: str, tmp_path: Path) -> None:
    base = SCHEDULERS[version]
    base.save_pretrained(tmp_path / "scheduler")
    scheduler = build_scheduler(_model(tmp_path))
    assert torch.equal(scheduler.alphas_cumprod, base.alphas_cumprod)
    for name in ("num_train_timesteps", "prediction_type", "steps_offset", "set_alpha_to_one"):
        assert scheduler.config[name] == base.config[name]
    assert scheduler.config.prediction_type == ("v_prediction" if version == "2.1" else "epsilon")


def test_an_autoencoder_with_the_old_names_of_attention_loads(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    expected = build_autoencoder(_model(copy).autoencoder).identity
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(weights)
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in state.items()}
    save_file(state, weights)
    assert build_autoencoder(_model(copy).autoencoder).identity == expected


def test_a_hub_id_is_looked_up_in_the_hubs_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--sd"
    shutil.copytree(checkpoint, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    config = ModelConfig.model_validate({"pretrained": "owner/sd"})
    assert build_unet(config, 4).config.cross_attention_dim == 16
    assert load_text_encoder(config).dim == 16
    with pytest.raises(DigSegError, match=r"'owner/other' .*cannot be fetched from the Hugging Face hub .*hf download"):
        build_unet(ModelConfig.model_validate({"pretrained": "owner/other"}), 4)


def test_pickled_weights_are_refused_unless_asked_for(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, safe_serialization=False)
    refused = r"only pickled weights \(diffusion_pytorch_model.bin\), .*model.pickled_weights=true"
    with pytest.raises(DigSegError, match=refused):
        build_unet(_model(tmp_path), 4)
    with pytest.raises(DigSegError, match=refused):
        build_autoencoder(_model(tmp_path).autoencoder)
    allowed = _model(tmp_path, pickled_weights=True)
    weight = build_unet(allowed, 4).conv_out.weight
    assert torch.equal(weight, narrow_unet("2.1").conv_out.weight)
    assert build_autoencoder(allowed.autoencoder, pickled=True).factor == 8


def test_a_missing_checkpoint_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"model.pretrained '.*nowhere': there is no such folder; .*sd2-community/"):
        build_unet(_model(tmp_path / "nowhere"), 4)
    with pytest.raises(DigSegError, match=r"neither unet/config.json nor config.json is there"):
        build_unet(_model(tmp_path), 4)


def test_damage_is_named(copy: Path) -> None:
    weights = copy / UNET_WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DigSegError, match=r"unet: damaged weights"):
        build_unet(_model(copy), 4)
    weights.unlink()
    with pytest.raises(DigSegError, match=r"unet holds no weights \(diffusion_pytorch_model.safetensors\); give"):
        build_unet(_model(copy), 4)


def test_weights_that_are_not_finite_are_refused(copy: Path) -> None:
    state = load_file(copy / UNET_WEIGHTS)
    state["mid_block.resnets.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, copy / UNET_WEIGHTS)
    with pytest.raises(DigSegError, match=r"the weight mid_block.resnets.0.conv1.weight is not finite"):
        build_unet(_model(copy), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, r"describes a AutoencoderKL, not a UNet2DConditionModel; give"),
        ({"cross_attention_dim": 8}, r"weights of another architecture than config.json says"),
        ({"layers_per_block": 3}, r"weights of another architecture .*resnets.2"),
    ],
)
def test_a_unet_that_is_none_or_another_is_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(DigSegError, match=message):
        build_unet(_model(copy), 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 9}, r"9 inputs and 4 outputs, .* \(not one for inpainting"),
        ({"class_embed_type": "timestep"}, r"inputs that segmentation does not have \(class_embed_type 'timestep'\)"),
    ],
)
def test_a_unet_with_further_inputs_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    unet: Any = UNet2DConditionModel(**{**dict(narrow_unet("2.1").config), **settings})
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(DigSegError, match=message):
        build_unet(_model(tmp_path), 4)


def test_an_autoencoder_of_another_kind_is_refused(copy: Path) -> None:
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "VQModel"}))
    with pytest.raises(DigSegError, match=f"describes a VQModel, not a {AutoencoderKL.__name__}"):
        build_autoencoder(_model(copy).autoencoder)


def test_more_scales_than_the_unet_has_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"model.pathway.scales is 4, but the U-Net has 4 levels"):
        build_segmenter(_config(tmp_path, checkpoint, pathway={"scales": 4}))


def _model(directory: Path, **settings: Any) -> ModelConfig:
    return ModelConfig.model_validate({"pretrained": str(directory), **settings})


def _config(folder: Path, checkpoint: Path, **settings: Any) -> Config:
    config = small_config(folder)
    return config.model_copy(update={"model": _model(checkpoint, **settings)})


def _inputs(unet: Any, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, 1, 4, size, size, generator=random)
    return image, noise, torch.randn(1, 3, unet.config.cross_attention_dim, generator=random)


def _check_growth(base: Any, grown: Any, size: int) -> None:
    image, noise, tokens = _inputs(base, size)
    with torch.no_grad():
        expected = base((image + noise) / 2, 500, tokens).sample
        result = grown(torch.cat([image, noise], 1), 500, tokens).sample
        grow_conv_in(base)
        again = base(torch.cat([image, noise], 1), 500, tokens).sample
    assert torch.allclose(result, expected, atol=1e-5)
    assert torch.equal(again, result)
