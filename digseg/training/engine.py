"""The module behind DeepSpeed: forward, backward, step, and this rank's files. Nothing else imports it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.training.deepspeed_config import deepspeed_config
from digseg.training.loss_scale import LossScale
from digseg.training.shares import Share, whole_parameters
from digseg.training.world import World

if not torch.cuda.is_available():
    # Read by DeepSpeed when it is imported; without it, it warns on every CPU machine.
    os.environ["DS_ACCELERATOR"] = "cpu"
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed

_TAG = "deepspeed"  # sub-directory of a checkpoint that holds DeepSpeed's own files


class Engine:
    """Trains ``module``, whose ``forward(batch)`` gives a dictionary of scalars with the key ``loss``.

    ZeRO 0-3 in float32; lower precision is the module's own (autocast in its forward pass, with a loss scale
    here for float16). A step whose gradient is not finite changes no weight. Every method is collective: all
    ranks call it, equally often.

    Raises:
        DigSegError: ``training.deepspeed`` sets a derived key, or DeepSpeed refuses the result.
    """

    def __init__(self, module: nn.Module, config: Config, world: World) -> None:
        self._world = world
        self._stage = config.training.zero_stage
        self._clipping = config.training.gradient_clipping
        self._norm: Tensor | float = float("nan")
        world.join()
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        size = sum(parameter.numel() for parameter in trainable)
        settings = deepspeed_config(config, world.world_size, size, on_gpu=world.device.type == "cuda")
        self._optimizer = torch.optim.AdamW(
            trainable,
            lr=config.training.learning_rate,
            betas=config.training.adam_betas,
            weight_decay=config.training.weight_decay,
            fused=True,
        )
        fp16 = config.training.precision == "fp16"
        self._loss_scale = LossScale(trainable, world.device) if fp16 else None
        self._deepspeed = _initialised(module.to(world.device), self._optimizer, settings, config, world)

    def forward_backward(self, batch: Any) -> dict[str, Tensor]:
        """Run one micro-batch and accumulate its gradient; the losses, detached (no host sync)."""
        losses: dict[str, Tensor] = self._deepspeed(batch)
        loss = losses["loss"]
        self._deepspeed.backward(loss if self._loss_scale is None else self._loss_scale.scaled(loss))
        return {name: value.detach() for name, value in losses.items()}

    def step(self, learning_rate: float) -> None:
        """Count one micro-batch; after the last of a step, clip and update the weights."""
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        if boundary and self._stage == 0:
            self._norm = nn.utils.clip_grad_norm_(self._deepspeed.module.parameters(), self._clipping)
            # What the fused AdamW reads of torch.amp.GradScaler: where it is 1, nothing is updated.
            self._optimizer.found_inf = (~torch.isfinite(self._norm)).float()  # type: ignore[attr-defined]
        self._deepspeed.step()
        if boundary and self._stage > 0:
            self._norm = self._deepspeed.get_global_grad_norm()
        if boundary and self._loss_scale is not None:
            self._loss_scale.update(self._norm)

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping. Waits for the device."""
        return float(self._norm)

    def shares(self) -> dict[str, Share]:
        """The trainable parameters that this rank looks after, as views of the current weights."""
        parameters = {n: p for n, p in self._deepspeed.module.named_parameters() if p.requires_grad}
        if self._stage < 3:
            return whole_parameters(parameters, self._world.rank, self._world.world_size)
        return {name: _partition(parameter, self._world.rank) for name, parameter in parameters.items()}

    def save(self, directory: Path) -> None:
        """Write this rank's weights and optimizer state below ``directory``."""
        self._deepspeed.save_checkpoint(str(directory), tag=_TAG, save_latest=False)

    def load(self, directory: Path) -> None:
        """Restore what :meth:`save` wrote with the same world size and ZeRO stage."""
        path, _ = self._deepspeed.load_checkpoint(str(directory), tag=_TAG)
        if path is None:
            raise DigSegError(f"{directory / _TAG}: DeepSpeed finds no checkpoint there")

    def state_dict(self) -> dict[str, Any]:
        """What a run needs besides the files of :meth:`save`: the loss scale of float16."""
        return {} if self._loss_scale is None else {"loss_scale": self._loss_scale.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state_dict`."""
        if self._loss_scale is not None and "loss_scale" in state:
            self._loss_scale.load_state_dict(state["loss_scale"])

    def close(self) -> None:
        """Let go of hooks and buffers."""
        self._deepspeed.destroy()


def _initialised(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], config: Config, world: World
) -> Any:
    # The shared-memory collective is compiled on first use: half a minute, and a compiler is needed. The table
    # is set rather than changed: DeepSpeed fills it by running the compiler, which complains on stderr.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    # DeepSpeed's own calls, which newer PyTorch renames; once per process is still too often.
    warnings.filterwarnings("ignore", "`torch.distributed.(all_gather|reduce_scatter)", FutureWarning)
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)
    try:
        with warnings.catch_warnings():
            # It imports PyTorch's compiler, which uses what PyTorch deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(settings))
    except (ValueError, deepspeed.DeepSpeedConfigError) as error:
        if not config.training.deepspeed:
            raise
        raise DigSegError(f"training.deepspeed: refused by DeepSpeed: {' '.join(str(error).split())}") from error
    return engine


def _partition(parameter: Any, rank: int) -> Share:
    """What a rank holds of a parameter under ZeRO-3; the last ranks' pieces are padded, which is cut off."""
    piece: Tensor = parameter.ds_tensor.detach()
    offset = min(rank * piece.numel(), parameter.ds_numel)
    return Share(tuple(parameter.ds_shape), offset, piece[: parameter.ds_numel - offset])
