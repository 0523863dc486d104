"""Switches that save memory or time leave the numbers as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config
from diffusion_checkpoint import write_checkpoint
from pydantic import ValidationError
from small_world import small_config
from two_tones import two_tone_batch

from digseg.config import AutoencoderConfig, Config
from digseg.errors import DigSegError
from digseg.model import build_segmenter
from digseg.model.autoencoder import build_autoencoder
from digseg.model.switches import apply_switches
from digseg.model.training_module import SegmenterLoss


def test_activation_checkpointing_gives_the_same_gradients_with_less_in_memory(tmp_path: Path) -> None:
    plain, saved_plain = _loss_and_gradients(_module(tmp_path))
    recomputed, saved = _loss_and_gradients(_module(tmp_path, activation_checkpointing=True))
    for name, value in plain.items():
        assert torch.equal(value, recomputed[name]), name
    assert saved < 0.7 * saved_plain


def test_channels_last_is_the_layout_of_the_unet_and_changes_the_sums_order_alone(tmp_path: Path) -> None:
    module = _module(tmp_path, channels_last=True)
    layouts = []
    for layer in (module.segmenter.unet.conv_in, module.segmenter.unet.down_blocks[0].resnets[0].conv2):
        layer.register_forward_hook(
            lambda _layer, _inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    other, _ = _loss_and_gradients(module)
    assert layouts == [True, True]
    _check_close(_loss_and_gradients(_module(tmp_path))[0], other, tolerance=1e-4)


# PyTorch's compiler uses what PyTorch deprecates.
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_compute_alike_under_the_same_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _module(tmp_path)
    expected, _ = _loss_and_gradients(plain)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    module = _module(tmp_path, compile=True, activation_checkpointing=True)
    assert module.state_dict().keys() == plain.state_dict().keys()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    with torch._inductor.config.patch(compile_threads=1):
        compiled, _ = _loss_and_gradients(module)
    assert counters["unique_graphs"] > before
    _check_close(expected, compiled, tolerance=1e-4)


def test_compiling_without_a_compiler_or_anything_to_compile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(DigSegError, match=r"no C\+\+ compiler 'no-such-compiler' here; install g\+\+"):
        _module(tmp_path, compile=True)
    segmenter = build_segmenter(_config(tmp_path))
    segmenter.unet.mid_block = segmenter.unet.down_blocks = segmenter.unet.up_blocks = torch.nn.ModuleList()
    with pytest.raises(DigSegError, match="this U-Net has no attention layer"):
        apply_switches(segmenter, _config(tmp_path, compile=True).training)
    with pytest.raises(ValidationError, match="compile needs zero_stage 0, 1 or 2"):
        _config(tmp_path, compile=True, zero_stage=3)


def test_low_precision_keeps_losses_weights_and_gradients_in_float32(tmp_path: Path) -> None:
    module = _module(tmp_path, precision="bf16")
    types = {}
    module.segmenter.unet.conv_out.register_forward_hook(lambda _m, _i, output: types.update(unet=output.dtype))
    module.segmenter.pathway.head.register_forward_hook(lambda _m, _i, output: types.update(scores=output.dtype))
    lowered, _ = _loss_and_gradients(module)
    assert types == {"unet": torch.bfloat16, "scores": torch.float32}
    assert {value.dtype for value in lowered.values()} == {torch.float32}
    expected, _ = _loss_and_gradients(_module(tmp_path))
    assert torch.allclose(lowered["loss"], expected["loss"], rtol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_norms_stay_in_float32_on_a_gpu(tmp_path: Path) -> None:
    module = _module(tmp_path, precision="bf16").to("cuda")
    types = set()
    for layer in module.modules():
        if isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm):
            layer.register_forward_hook(lambda _m, _i, output: types.add(output.dtype))
    batch = two_tone_batch(torch.Generator().manual_seed(1))
    for name in ("images", "labels", "query_ids", "colour_ids", "class_weights"):
        setattr(batch, name, getattr(batch, name).cuda())
    module(batch)
    assert types == {torch.float32}


def test_slicing_encodes_alike_and_tiling_up_to_the_size_of_a_tile(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def autoencoder(**switches: bool) -> Any:
        return build_autoencoder(AutoencoderConfig(type="kl", path=str(tmp_path), **switches))

    plain, sliced, tiled = autoencoder(), autoencoder(slicing=True), autoencoder(tiling=True)
    sizes = []
    sliced.vae.encoder.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    expected = plain.encode(images)
    assert torch.allclose(sliced.encode(images), expected, atol=1e-5)
    assert sizes == [1, 1, 1]
    assert torch.allclose(sliced.decode(expected), plain.decode(expected), atol=1e-5)
    assert torch.equal(tiled.encode(images), expected)
    # Above it, latents are others, and stored ones must say so.
    assert sliced.identity == plain.identity
    assert tiled.identity == {**plain.identity, "tiles": "768 px"}


def test_an_autoencoder_without_weights_has_nothing_to_slice() -> None:
    with pytest.raises(ValidationError, match="slicing and tiling are for type kl"):
        AutoencoderConfig(slicing=True)


def _config(folder: Path, **training: Any) -> Config:
    return small_config(folder, training={"steps": 1, "precision": "fp32", **training})


def _module(folder: Path, **training: Any) -> SegmenterLoss:
    config = _config(folder, **training)
    segmenter = build_segmenter(config)
    apply_switches(segmenter, config.training)
    return SegmenterLoss(segmenter, config, torch.randn(2, 384, generator=torch.Generator().manual_seed(0)))


def _loss_and_gradients(module: SegmenterLoss) -> tuple[dict[str, torch.Tensor], int]:
    """Losses and gradients by name, and the bytes that the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = module(two_tone_batch(torch.Generator().manual_seed(1)))
    losses["loss"].backward()
    gradients = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    return {**{name: value.detach() for name, value in losses.items()}, **gradients}, sum(kept.values())


def _check_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=tolerance, atol=tolerance), name
