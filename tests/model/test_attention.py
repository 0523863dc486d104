from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from digseg.config import ModelConfig
from digseg.errors import DigSegError
from digseg.model.attention import attention_kernels, use_attention
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
def test_kernels_agree_on_a_gpu(unet: Any, kernel: str) -> None:
    if kernel == "xformers":
        pytest.importorskip("xformers")
    cuda = torch.device("cuda")
    results = {}
    for name in ("math", kernel):
        use_attention(unet.to(cuda), name, cuda)
        results[name] = _output_and_gradients(unet, cuda)
    _check_agreement(results, tolerance=1e-3)


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


def _output_and_gradients(unet: Any, device: torch.device) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=random).to(device)
    tokens = torch.randn(2, 3, 16, generator=random).to(device)
    mask = torch.tensor([[True, True, True], [True, True, False]], device=device)
    unet.zero_grad()
    output = unet(sample, 999, tokens, encoder_attention_mask=mask).sample
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad.clone() for parameter in unet.parameters())]


def _check_agreement(results: dict[str, list[torch.Tensor]], tolerance: float) -> None:
    first, second = results.values()
    for one, other in zip(first, second, strict=True):
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)
