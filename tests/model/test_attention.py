from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from digseg.config import ModelConfig
from digseg.errors import DigSegError
from digseg.model.attention import aligned_keys, attention_kernels, use_attention
from digseg.model.denoiser import build_unet

CPU = torch.device("cpu")


class _Operators(TorchDispatchMode):
    """Names of the operators that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.names.add(str(operator))
        return operator(*arguments, **(options or {}))


@pytest.fixture
def unet() -> Any:
    torch.manual_seed(0)
    settings = {
        "block_out_channels": [16, 32], "attention": [True, True], "cross_attention_dim": 16, "norm_num_groups": 8,
    }  # fmt: skip
    return build_unet(ModelConfig.model_validate({"unet": settings}), latent_channels=2)


def test_kernels_really_differ_and_agree_in_outputs_and_gradients(unet: Any) -> None:
    results = {}
    for kernel in ("math", "sdpa"):
        assert str(use_attention(unet, kernel, CPU)) == f"{kernel} (asked for)"
        assert attention_kernels(unet) == [kernel]
        with _Operators() as operators:
            results[kernel] = _output_and_gradients(unet, CPU)
        fused = any("scaled_dot_product" in name for name in operators.names)
        assert fused == (kernel == "sdpa"), kernel
    _check_agreement(results, tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kernel", ["sdpa", "xformers"])
@pytest.mark.parametrize("num_classes", [1, 3, 8, 11])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-3), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_kernels_agree_on_a_gpu(
    unet: Any, kernel: str, num_classes: int, dtype: torch.dtype | None, tolerance: float
) -> None:
    if kernel == "xformers":
        pytest.importorskip("xformers")
    cuda = torch.device("cuda")
    results = {}
    for name in ("math", kernel):
        use_attention(unet.to(cuda), name, cuda)
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            results[name] = _output_and_gradients(unet, cuda, num_classes)
    _check_agreement(results, tolerance)


@pytest.mark.parametrize("num_classes", [1, 3, 8, 11])
def test_keys_that_are_padded_for_xformers_change_nothing(unet: Any, num_classes: int) -> None:
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    random = torch.Generator().manual_seed(0)
    states = torch.randn(2, 5, layer.query_dim, generator=random)
    tokens = torch.randn(2, num_classes, 16, generator=random, requires_grad=True)
    bias = torch.zeros(2, 1, num_classes)
    bias[1, 0, 1:] = -10000.0  # as the U-Net makes it of a query of one class
    padded, padded_bias = aligned_keys(tokens, bias, torch.float32)
    assert padded.shape[1] == padded_bias.shape[2] == (8 if num_classes <= 8 else 16)
    results = {}
    for name, keys, added in (("plain", tokens, bias), ("padded", padded, padded_bias)):
        attended = layer(states, encoder_hidden_states=keys, attention_mask=added)
        results[name] = [attended, *torch.autograd.grad(attended.square().mean(), [tokens, *layer.parameters()])]
    _check_agreement(results, tolerance=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        added = aligned_keys(tokens, bias, dtype)[1]
        assert added.dtype == dtype
        weights = added.float().softmax(2)
        assert weights.isfinite().all()
        assert (weights[:, :, num_classes:] == 0).all()


def test_auto_says_what_it_takes_and_why(unet: Any) -> None:
    kernel = use_attention(unet, "auto", CPU)
    assert kernel.name == "math"
    assert "faster" in kernel.reason
    assert attention_kernels(unet) == ["math"]


def test_xformers_is_refused_where_it_cannot_run(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = attention_kernels(unet)
    with pytest.raises(DigSegError, match=r"model.attention: xformers has no kernel for cpu; set .* auto"):
        use_attention(unet, "xformers", CPU)
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(DigSegError, match=r"xformers is not installed; run `pip install 'digseg\[gpu\]'`"):
        use_attention(unet, "xformers", torch.device("cuda"))
    assert attention_kernels(unet) == before


def test_processors_that_are_not_installed_do_not_pass_as_if_they_were(unet: Any) -> None:
    unet.set_attn_processor = lambda processor: None
    with pytest.raises(RuntimeError, match=r"math was installed, but \['sdpa'\] are in use"):
        use_attention(unet, "math", CPU)


def _output_and_gradients(unet: Any, device: torch.device, num_classes: int = 3) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=random).to(device)
    tokens = torch.randn(2, num_classes, 16, generator=random).to(device)
    mask = torch.arange(num_classes) < torch.tensor([[num_classes], [max(1, num_classes - 1)]])
    mask = mask.to(device)
    unet.zero_grad()
    output = unet(sample, 999, tokens, encoder_attention_mask=mask).sample
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in unet.parameters())]


def _check_agreement(results: dict[str, list[torch.Tensor]], tolerance: float) -> None:
    first, second = results.values()
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)
