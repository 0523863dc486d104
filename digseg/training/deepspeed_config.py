"""The DeepSpeed JSON of a run: derived from its configuration, with a pass-through for experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from digseg.config import Config
from digseg.errors import DigSegError

# What DigSeg derives, and the key of the configuration to set instead.
_DERIVED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "zero_optimization.stage": "training.zero_stage",
    "zero_optimization.offload_optimizer.device": "training.offload_optimizer",
    "optimizer": "training.learning_rate, training.adam_betas and training.weight_decay",
    "scheduler": "training.warmup_steps and training.final_learning_rate_ratio",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "torch_autocast": "training.precision",
    "amp": "training.precision",
}


def deepspeed_config(config: Config, world_size: int, num_parameters: int, on_gpu: bool = False) -> dict[str, Any]:
    """The JSON that DeepSpeed is started with.

    The engine keeps float32 weights and knows nothing of bf16 and fp16: the module runs its forward pass
    under autocast, which keeps all ZeRO stages numerically equal.

    Raises:
        DigSegError: ``training.deepspeed`` sets what DigSeg derives.
    """
    training = config.training
    micro_batch_size, accumulation = micro_batches(config, world_size)
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # Stage 0 does not report the gradient's norm, so the engine clips there itself.
        "gradient_clipping": training.gradient_clipping if training.zero_stage else 0.0,
        "zero_optimization": {
            "stage": training.zero_stage,
            # DeepSpeed allocates a whole bucket (2 GB by default) even for a small model.
            "reduce_bucket_size": min(num_parameters, 500_000_000),
            # Copying each gradient into one buffer keeps GPU memory in one piece; a CPU only pays for the copies.
            "contiguous_gradients": on_gpu,
        },
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if training.offload_optimizer:
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    _refuse_derived(training.deepspeed)
    return _merged(derived, training.deepspeed)


def micro_batches(config: Config, world_size: int) -> tuple[int, int]:
    """Micro-batch size per process and the number of micro-batches per step.

    The micro-batch is the largest that ``training.micro_batch_size`` allows and that divides a process' part,
    whichever of the run's world sizes it is: the objective averages over the labelled pixels of a micro-batch, so
    its value would else depend on the number of processes.

    Raises:
        DigSegError: ``world_size`` processes cannot share the global batch.
    """
    training = config.training
    total = training.global_batch_size
    if total % world_size:
        raise DigSegError(
            f"training.global_batch_size: {total} samples cannot be divided over {world_size} processes; "
            f"numbers of processes that can: {', '.join(map(str, _divisors(total)))}"
        )
    common = math.gcd(*(total // size for size in (world_size, *config.world_sizes)))
    most = training.micro_batch_size or common
    micro_batch_size = max(divisor for divisor in _divisors(common) if divisor <= most)
    return micro_batch_size, total // world_size // micro_batch_size


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _refuse_derived(expert: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in expert.items():
        path = prefix + key
        if path in _DERIVED:
            raise DigSegError(f"training.deepspeed.{path}: derived by DigSeg; set {_DERIVED[path]} instead")
        if isinstance(value, Mapping):
            _refuse_derived(value, f"{path}.")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else copy.deepcopy(value)
    return merged
