"""The module behind DeepSpeed: forward, backward, step, and this rank's files. Nothing else imports it."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from digseg.config import Config
from digseg.errors import DigSegError
from digseg.training.deepspeed_config import deepspeed_config
from digseg.training.loss_scale import LossScale
from digseg.training.saving import host_copy
from digseg.training.shares import Share, whole_parameters
from digseg.training.world import World

if not torch.cuda.is_available():
    # Read by DeepSpeed when it is imported; without it, it warns on every CPU machine.
    os.environ["DS_ACCELERATOR"] = "cpu"
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
_LINEAR = nn.functional.linear  # PyTorch's; ZeRO-3 puts one in its place that rounds otherwise, in the whole process
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
        self._offloaded = config.training.offload_optimizer
        self._norm: Tensor | float = float("nan")
        self._no = self._bad = torch.tensor(False, device=world.device)
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

    def step(self, learning_rate: float, skip: Tensor | None = None) -> None:
        """Count one micro-batch; after the last of a step, clip and update the weights.

        Where ``skip`` (a boolean scalar on the device, the same on all ranks) is true, no weight changes.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()
            return
        unwanted = skip = self._no if skip is None else skip
        if self._stage == 0:
            self._norm = nn.utils.clip_grad_norm_(self._deepspeed.module.parameters(), self._clipping)
            skip = skip | ~torch.isfinite(self._norm)
        # What the fused AdamW reads of torch.amp.GradScaler: where it is 1, nothing is updated. An optimizer on the
        # CPU would not wait for the device to write it.
        found_inf = skip.float().cpu() if self._offloaded else skip.float()
        self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self._deepspeed.step()
        if self._stage > 0:  # which leave out a step themselves if its gradient is not finite
            self._norm = self._deepspeed.get_global_grad_norm()
        overflow = ~torch.isfinite(torch.as_tensor(self._norm, device=self._world.device))
        if self._loss_scale is not None:
            overflow = overflow & ~self._loss_scale.may_fall()
            self._loss_scale.update(self._norm)
        self._bad = unwanted | overflow

    def was_bad(self) -> Tensor:
        """Whether the last step was left out for its loss or gradient: a boolean scalar on the device.

        One that overflowed under a loss scale of float16 that may fall changes no weight either, but is not bad:
        the scale starts high and finds its place so.
        """
        return self._bad

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient, before clipping. Waits for the device."""
        return float(self._norm)

    def shares(self) -> dict[str, Share]:
        """The trainable parameters that this rank looks after, as views of the current weights."""
        parameters = {n: p for n, p in self._deepspeed.module.named_parameters() if p.requires_grad}
        if self._stage < 3:
            return whole_parameters(parameters, self._world.rank, self._world.world_size)
        return {name: _partition(parameter, self._world.rank) for name, parameter in parameters.items()}

    def snapshot(self) -> dict[str, Any]:
        """What DeepSpeed saves of this rank's weights and optimizer state, file by file, in the CPU's memory."""
        writer = self._deepspeed.checkpoint_engine
        # Scripts that DeepSpeed puts beside its files go with the folder.
        with tempfile.TemporaryDirectory() as folder:
            collector = self._deepspeed.checkpoint_engine = _Collector(Path(folder))
            try:
                self._deepspeed.save_checkpoint(folder, tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
            finally:
                self._deepspeed.checkpoint_engine = writer
        return collector.files

    def load(self, directory: Path) -> None:
        """Restore what :meth:`snapshot` gave, with the same world size and ZeRO stage."""
        path, _ = self._deepspeed.load_checkpoint(str(directory), tag=_TAG, custom_load_fn=_load_trained)
        if path is None:
            raise DigSegError(f"{directory / _TAG}: DeepSpeed finds no checkpoint there")

    def load_converted(self, directory: Path) -> None:
        """Restore what :func:`convert` made of another world size or ZeRO stage, both stages 1 to 3.

        Every rank reads the parameters one by one and keeps its part. (DeepSpeed's own way in refuses worlds whose
        padding differs from the saved one's.)
        """
        names = {parameter: name for name, parameter in self._deepspeed.module.named_parameters()}
        pieces = _pieces_of_stage_3 if self._stage == 3 else _pieces_of_stages_1_and_2
        for flat, offset, parameter, piece in pieces(self._deepspeed.optimizer, self._world.rank):
            folder = directory / "zero" / names[parameter]
            state = self._state_of(flat)
            for key, target in (("fp32", flat), *((key, state[key]) for key in _MOMENTS)):
                values = piece(_universal(folder / f"{key}.pt"))
                target.data[offset : offset + values.numel()].copy_(values)
            self._set_weight(parameter, piece, _universal(folder / "fp32.pt"))
        if self._stage == 3:
            # Small parameters stay whole on every rank.
            kept = self._deepspeed.optimizer.persistent_parameters
            if kept:
                kept[0].partition(kept)
                kept[0].all_gather(kept)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs besides the files of :meth:`snapshot`: Adam's count of steps, the loss scale of float16."""
        counts = [float(state["step"]) for state in self._optimizer.state.values()]
        state: dict[str, Any] = {"optimizer_steps": max(counts, default=0.0)}
        return state if self._loss_scale is None else {**state, "loss_scale": self._loss_scale.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state_dict`, after the files were loaded."""
        for moments in self._optimizer.state.values():
            moments["step"].fill_(state["optimizer_steps"])
        if self._loss_scale is not None and "loss_scale" in state:
            self._loss_scale.load_state_dict(state["loss_scale"])

    def close(self) -> None:
        """Let go of hooks and buffers, and leave PyTorch as it was."""
        self._deepspeed.destroy()
        nn.functional.linear = _LINEAR

    def _state_of(self, flat: Tensor) -> dict[str, Tensor]:
        """Adam's state of a flat parameter, made where no step was taken yet."""
        state: dict[str, Tensor] = self._optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {key: torch.zeros_like(flat) for key in _MOMENTS}
        return state

    def _set_weight(self, parameter: Any, piece: Callable[[Tensor], Tensor], whole: Tensor) -> None:
        if self._stage == 3:
            parameter.ds_tensor.data.copy_(piece(whole))
        else:
            parameter.data.copy_(whole.view_as(parameter))


class _Collector(CheckpointEngine):  # type: ignore[misc]
    """Keeps what DeepSpeed would write below a folder: name in it -> a copy in the CPU's memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self.files: dict[str, Any] = {}

    def create(self, info: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).relative_to(self._folder).as_posix()] = host_copy(state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("it only saves")

    def commit(self, info: Any) -> bool:
        return True


def convert(directory: Path, target: Path) -> None:
    """Turn what :meth:`Engine.snapshot` gave, with a ZeRO stage from 1 to 3, into whole parameters below ``target``.

    ``target/zero/<parameter>/`` holds the weights and both moments of Adam: DeepSpeed's universal format.

    Raises:
        DigSegError: DeepSpeed cannot read the checkpoint.
    """
    options = argparse.Namespace(
        input_folder=str(directory / _TAG),
        output_folder=str(target),
        # One process: the caller has threads, and a fork of it may hang.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    talk = io.StringIO()
    try:
        with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
            ds_to_universal.main(options)
    except (AssertionError, RuntimeError, KeyError, ValueError) as error:
        raise DigSegError(f"{directory}: DeepSpeed cannot convert the checkpoint: {error}") from error


# A piece of a parameter: its place in a flat tensor of this rank, and how to cut it out of the whole.
_Piece = tuple[Tensor, int, nn.Parameter, "Callable[[Tensor], Tensor]"]


def _pieces_of_stages_1_and_2(optimizer: Any, rank: int) -> Iterator[_Piece]:
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank's; but its weight is everybody's
                yield flat, 0, parameter, partial(_cut, start=0, size=0)
                continue
            own, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield flat, place.start, parameter, partial(_cut, start=own.start, size=own.numel)


def _pieces_of_stage_3(optimizer: Any, rank: int) -> Iterator[_Piece]:
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            yield flat, offset, parameter, partial(_cut, start=rank * size, size=size)
            offset += size


def _cut(whole: Tensor, start: int, size: int) -> Tensor:
    """``size`` entries from ``start`` on, with zeros where the last rank's part is padded."""
    part = whole[start : start + size]
    return nn.functional.pad(part, (0, size - part.numel()))


def _universal(file: Path) -> Tensor:
    content = torch.load(file, mmap=True, weights_only=True)
    tensor: Tensor = content["param"] if isinstance(content, dict) else content
    return tensor.reshape(-1)


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


def _load_trained(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    """Load a state into a module whose frozen weights it lacks (named as DeepSpeed names its arguments)."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    frozen = {name for name, parameter in dst.named_parameters() if not parameter.requires_grad}
    wrong = sorted({*unexpected, *set(missing).difference(frozen)})
    if wrong:
        raise DigSegError(f"the checkpoint is of another module: {len(wrong)} weights do not fit, first {wrong[0]}")


def _partition(parameter: Any, rank: int) -> Share:
    """What a rank holds of a parameter under ZeRO-3; the last ranks' pieces are padded, which is cut off."""
    piece: Tensor = parameter.ds_tensor.detach()
    offset = min(rank * piece.numel(), parameter.ds_numel)
    return Share(tuple(parameter.ds_shape), offset, piece[: parameter.ds_numel - offset])
