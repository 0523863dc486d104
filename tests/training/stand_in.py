"""A small module with the interface that the engine trains, and the plain loop it is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from digseg.config import TrainingConfig
from digseg.model.training_module import lowered_precision
from digseg.training.schedule import learning_rate

STEPS = 6
BATCH = 8
CLIPPING = 20.0  # some steps clip, some do not
NO_CLIPPING = 1e9


class StandIn(nn.Module):
    """A convolution, a norm and a linear layer with sizes that no world size divides."""

    def __init__(self, precision: str = "fp32") -> None:
        super().__init__()
        self.precision = precision
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 5, 3), nn.GELU(), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(180, 7)
            )

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        with lowered_precision(self.precision, images.device):
            error = self.layers(images).float() - targets
        return {"loss": error.square().mean(), "absolute": error.detach().abs().mean()}


def batches() -> list[tuple[Tensor, Tensor]]:
    """The global batch of every step."""
    random = torch.Generator().manual_seed(4)
    return [
        (torch.randn(BATCH, 3, 8, 8, generator=random), 5 * torch.randn(BATCH, 7, generator=random))
        for _ in range(STEPS)
    ]


def plain_loop(config: TrainingConfig) -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, gradient norms, weights and averaged weights of plain PyTorch in one process.

    float16 runs under PyTorch's own gradient scaler.
    """
    module = StandIn(config.precision)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=1.0, betas=config.adam_betas, weight_decay=config.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler("cpu", enabled=config.precision == "fp16")
    average = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    losses, norms = [], []
    for step, batch in enumerate(batches()):
        loss = module(batch)["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clipping)))
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        decay = min(config.ema.decay, (1 + step) / (10 + step))
        for name, weight in module.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * weight.detach()
    return losses, norms, dict(module.named_parameters()), average


def training_section(stage: int, **more: Any) -> dict[str, Any]:
    """Settings under which gradients are clipped at some steps, not at others."""
    return {
        "steps": STEPS,
        "global_batch_size": BATCH,
        "learning_rate": 0.01,
        "warmup_steps": 2,
        "gradient_clipping": CLIPPING,
        "weight_decay": 0.1,
        "precision": "fp32",
        "zero_stage": stage,
        "ema": {"decay": 0.5},
        **more,
    }
