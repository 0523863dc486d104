from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kl_autoencoder import write_kl_autoencoder

from digseg.config import AutoencoderConfig
from digseg.errors import DigSegError
from digseg.model.autoencoder import KLAutoencoder, ShuffleAutoencoder, build_autoencoder
from digseg.model.objective import one_hot
from digseg.model.palette import palette


def test_shuffle_is_lossless() -> None:
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    autoencoder = ShuffleAutoencoder(4)
    latents = autoencoder.encode(images)
    assert latents.shape == (2, autoencoder.channels, 4, 6)
    assert torch.equal(autoencoder.decode(latents), images)


def test_composed_latents_of_a_hard_mask_are_the_painted_masks_encoding() -> None:
    labels = torch.randint(0, 3, (2, 16, 16))
    colours = palette(3).expand(2, 3, 3)
    painted = colours[torch.arange(2)[:, None, None], labels].permute(0, 3, 1, 2)
    autoencoder = ShuffleAutoencoder(4)
    assert torch.allclose(autoencoder.compose(one_hot(labels, 3), colours), autoencoder.encode(painted))


def test_kl_loads_a_diffusers_directory_and_composes_flat_masks_to_their_encoding(tmp_path: Path) -> None:
    checkpoint = write_kl_autoencoder(tmp_path)
    autoencoder = build_autoencoder(AutoencoderConfig(type="kl", path=str(checkpoint / "vae")))
    assert isinstance(autoencoder, KLAutoencoder)
    assert (autoencoder.factor, autoencoder.channels) == (2, 4)
    colours = palette(2)[None]
    weights = torch.zeros(1, 2, 16, 16)
    weights[:, 1] = 1
    flat = autoencoder.encode(colours[:, 1, :, None, None].expand(1, 3, 16, 16))
    composed = autoencoder.compose(weights, colours)
    assert composed.shape == (1, 4, 8, 8)
    assert torch.allclose(composed[..., 4, 4], flat[..., 4, 4], atol=1e-4)
    assert autoencoder.decode(composed).shape == (1, 3, 16, 16)


def test_kl_encodes_the_palette_once_and_nothing_when_masks_are_composed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder = build_autoencoder(AutoencoderConfig(type="kl", path=str(write_kl_autoencoder(tmp_path))))
    rows = torch.tensor([[5, 0, 63], [1, 7, 7]])
    weights = torch.rand(2, 3, 8, 8).softmax(1).requires_grad_()
    with torch.inference_mode():
        first = autoencoder.compose(weights, palette()[rows])
    monkeypatch.setattr(autoencoder, "encode", None)
    again = autoencoder.compose(weights, palette()[rows])
    assert torch.equal(first, again)
    again.sum().backward()
    assert weights.grad is not None


def test_a_directory_without_a_vae_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"autoencoder.path .* neither vae/config.json nor config.json is"):
        build_autoencoder(AutoencoderConfig(type="kl", path=str(tmp_path)))
