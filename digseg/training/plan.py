"""What a run will need and how long it will take, before anything is started: sizes, memory, speed, storage.

Everything comes from the configuration and the shapes of the model; no weights are loaded and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from digseg.config import Config, TrainingConfig
from digseg.data.format import Manifest, present_manifests
from digseg.data.queries import largest_query
from digseg.errors import DigSegError, nearest
from digseg.model.autoencoder import KLAutoencoder
from digseg.training.deepspeed_config import deepspeed_config, micro_batches
from digseg.training.flops import COUNTED_IMAGES, counted_batch, image_flops, loss_shapes
from digseg.training.gpus import GPUS, Gpu

_FLOAT = 4  # bytes
# Of a tensor saved for the backward pass in float32, under autocast to 16 bits: inputs of products are saved as 16
# bits, those of norms and activations between them stay float32.
_LOWERED = 0.75
# What DeepSpeed collects at a time by itself, in entries: gradients that stage 0 reduces, and the parameters that
# ZeRO-3 keeps gathered.
_REDUCE_BUCKET, _LIVE_PARAMETERS = 500_000_000, 1_000_000_000
CONTEXT_BYTES = 1.5 * 2**30  # CUDA's own, its libraries' and NCCL's, about


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process, on its device, at the fullest moment of a step."""

    weights: float
    gradients: float
    optimizer: float  # Adam's moments and the float32 weights that it updates
    average: float
    buffers: float  # what ZeRO collects to reduce and to gather
    frozen: float
    activations: float

    @property
    def total(self) -> float:
        return float(sum(asdict(self).values()))


@dataclass(frozen=True, slots=True)
class Plan:
    """What :func:`make_plan` found. Bytes, seconds, floating-point operations."""

    gpu: Gpu
    num_gpus: int
    mfu: float
    peak_flops: float  # of one GPU, in the run's precision
    trainable_parameters: int
    frozen_parameters: int
    micro_batch_size: int
    micro_batches: int
    forward_flops: int  # of one image
    training_flops: int  # of one image, forward and backward
    step_flops: int
    memory: dict[int, Memory]  # by ZeRO stage
    zero_stage: int
    offloaded_bytes: float  # of a process, in the CPU's memory
    steps: int
    global_batch_size: int
    images: int | None  # of all corpora; None: the shards are not there yet
    checkpoint_bytes: float
    kept_checkpoints: int
    latent_bytes: float | None  # of one view of every image
    deepspeed: dict[str, Any]
    warnings: list[str]

    @property
    def images_per_second(self) -> float:
        """At the stated MFU."""
        return self.mfu * self.num_gpus * self.peak_flops / self.training_flops

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return self.steps * self.global_batch_size / self.images_per_second

    def as_json(self) -> dict[str, Any]:
        """Plain values, what follows from others included."""
        memory = {f"zero{stage}": {**asdict(part), "total": part.total} for stage, part in self.memory.items()}
        derived = {"images_per_second": self.images_per_second, "days": self.seconds / 86_400}
        return {**asdict(self), "memory": memory, **derived}


def make_plan(config: Config, text_dim: int, gpu: str = "h100", mfu: float = 0.4) -> Plan:
    """Plan a run on the most processes that ``cluster.workers`` allows, one GPU each.

    Args:
        text_dim: entries of a class name's embedding.
        gpu: a key of :data:`digseg.training.gpus.GPUS`.
        mfu: model FLOPs utilisation: the share of the peak that the model's own operations reach.

    Raises:
        DigSegError: no such GPU, an MFU that is none, or a checkpoint to start from that is not described anywhere.
    """
    if gpu not in GPUS:
        raise DigSegError(f"--plan-gpu: no figures of {gpu!r}{nearest(gpu, GPUS)}")
    if not 0 < mfu <= 1:
        raise DigSegError(f"--plan-mfu: got {mfu:g}; the share of the peak that is reached is above 0 and at most 1")
    training, world_size = config.training, config.world_sizes[-1]
    manifests, why_unknown = _manifests(config)
    num_classes = largest_query(config.data.queries, manifests)
    model = _model_sizes(config, text_dim, num_classes)
    flops = image_flops(config, text_dim, num_classes)
    micro_batch_size, num_micro_batches = micro_batches(config, world_size)
    stages = range(4 if config.model.lora is None else 3)
    memory = {stage: _memory(config, model, stage, world_size, on_gpu=True) for stage in stages}
    images = sum(manifest.samples for manifest in manifests) if manifests else None
    plan = Plan(
        gpu=GPUS[gpu],
        num_gpus=world_size,
        mfu=mfu,
        peak_flops=GPUS[gpu].tf32_flops if training.precision == "fp32" else GPUS[gpu].bf16_flops,
        trainable_parameters=model.trainable,
        frozen_parameters=model.frozen,
        micro_batch_size=micro_batch_size,
        micro_batches=num_micro_batches,
        forward_flops=flops.forward,
        training_flops=flops.training,
        step_flops=flops.training * training.global_batch_size,
        memory=memory,
        zero_stage=training.zero_stage,
        offloaded_bytes=3 * _FLOAT * model.trainable / world_size if training.offload_optimizer else 0.0,
        steps=training.steps,
        global_batch_size=training.global_batch_size,
        images=images,
        checkpoint_bytes=checkpoint_bytes(config, model.trainable),
        kept_checkpoints=_kept_checkpoints(training),
        latent_bytes=images * model.latent_bytes if images is not None and _encodes(config) else None,
        deepspeed=deepspeed_config(config, world_size, model.trainable, on_gpu=True),
        warnings=[],
    )
    plan.warnings.extend(_warnings(config, plan))
    if not manifests:
        plan.warnings.append(f"{why_unknown}: epochs and the storage of latents are unknown")
    return plan


def memory_of_step(config: Config, text_dim: int, num_classes: int, on_gpu: bool) -> Memory:
    """The memory of one process of the run as it is configured, on the most processes that it may have."""
    model = _model_sizes(config, text_dim, num_classes)
    return _memory(config, model, config.training.zero_stage, config.world_sizes[-1], on_gpu)


def checkpoint_bytes(config: Config, num_parameters: int) -> float:
    """Of one checkpoint: weights, Adam's moments, ZeRO's float32 weights beside the module's, the average."""
    of_the_module = 1 if config.training.zero_stage < 3 else 0
    of_zero = 1 if config.training.zero_stage else 0
    # Without averaging the weights themselves are written in its place.
    return _FLOAT * num_parameters * (of_the_module + of_zero + 2 + 1)


def _kept_checkpoints(training: TrainingConfig) -> int:
    """The most that are there at the end of a run."""
    of_steps = training.steps // training.keep_every if training.keep_every else 0
    best = training.keep_best if training.validation.every is not None else 0
    return training.keep_checkpoints + of_steps + best


@dataclass(frozen=True, slots=True)
class _ModelSizes:
    trainable: int
    frozen: int  # of the autoencoder, and of a U-Net with adapters
    saved_bytes: int  # for the backward pass of one image, in float32
    latent_bytes: int  # of one image: float16


def _model_sizes(config: Config, text_dim: int, num_classes: int) -> _ModelSizes:
    """By a forward pass on tensors that have no memory; the images' latents are given."""
    loss = loss_shapes(config, text_dim, num_classes)
    autoencoder = loss.segmenter.autoencoder
    stored = config.model_copy(update={"data": config.data.model_copy(update={"latents": "given"})})
    # Fake tensors of a CPU: the meta device would save attention's products, which no fused kernel does.
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss.to_empty(device="cpu")
        batch = counted_batch(stored, autoencoder, num_classes)
        own = {parameter.untyped_storage()._cdata for parameter in loss.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss(batch)
    encoding = autoencoder.vae.parameters() if isinstance(autoencoder, KLAutoencoder) else ()
    trainable = sum(parameter.numel() for parameter in loss.parameters() if parameter.requires_grad)
    cells = config.data.crop_size // autoencoder.factor
    return _ModelSizes(
        trainable=trainable,
        frozen=sum(parameter.numel() for parameter in (*loss.parameters(), *encoding)) - trainable,
        saved_bytes=sum(storage.nbytes() for storage in saved.values()) // COUNTED_IMAGES,
        latent_bytes=2 * autoencoder.channels * cells * cells,
    )


def _memory(config: Config, model: _ModelSizes, stage: int, world_size: int, on_gpu: bool) -> Memory:
    training, size = config.training, _FLOAT * model.trainable
    micro_batch_size, num_micro_batches = micro_batches(config, world_size)
    part = size / world_size
    lowered = training.precision != "fp32" and on_gpu
    activations = micro_batch_size * model.saved_bytes * (_LOWERED if lowered else 1)
    gradients = size if stage < 2 else part
    if num_micro_batches == 1:
        # The backward pass makes gradients as it frees activations; both are there only where gradients accumulate.
        activations = max(activations - gradients, 0.0)
    optimizer = 2 * size if stage == 0 else 3 * part
    zero = deepspeed_config(config, world_size, model.trainable, on_gpu)["zero_optimization"]
    buffers = 0.0  # stage 0 on the CPU reduces gradients where they are
    if on_gpu or stage in (1, 2) or (stage == 3 and world_size > 1):  # as one rank of stage 3 reduces nothing
        buffers = _FLOAT * (zero["reduce_bucket_size"] if stage else min(model.trainable, _REDUCE_BUCKET))
    if stage == 3:
        buffers += _FLOAT * min(model.trainable, zero.get("stage3_max_live_parameters", _LIVE_PARAMETERS))
    return Memory(
        weights=size if stage < 3 else part,
        gradients=gradients,
        optimizer=0.0 if training.offload_optimizer and stage else optimizer,
        average=part if training.ema.enabled else 0.0,
        buffers=buffers,
        frozen=_FLOAT * model.frozen,
        activations=activations,
    )


def _encodes(config: Config) -> bool:
    """Whether an autoencoder with weights makes the latents."""
    return config.model.autoencoder.type == "kl"


def _warnings(config: Config, plan: Plan) -> Iterator[str]:
    room = plan.gpu.memory_bytes - CONTEXT_BYTES
    needed = plan.memory[plan.zero_stage].total
    if needed > room:
        fitting = [str(stage) for stage, memory in plan.memory.items() if memory.total <= room]
        remedy = f"training.zero_stage={fitting[0]} fits" if fitting else "no ZeRO stage does"
        yield (
            f"does not fit: ZeRO stage {plan.zero_stage} needs {needed / 1e9:.0f} GB of {room / 1e9:.0f} GB; {remedy}; "
            "a smaller training.micro_batch_size needs less for activations"
        )
    cluster = config.cluster
    if cluster.backend == "ray" and len(config.world_sizes) <= cluster.max_workers - cluster.min_workers:
        yield (
            f"cluster.workers: of {cluster.min_workers} to {cluster.max_workers}, only "
            f"{', '.join(map(str, config.world_sizes))} divide training.global_batch_size ({plan.global_batch_size}); "
            "others stand idle"
        )
    if _encodes(config) and config.data.latents is None:
        yield "no data.latents: every step encodes its images, which encode_latents.py can do once (docs/latents.md)"


def _manifests(config: Config) -> tuple[Sequence[Manifest], str]:
    """Of the splits that are trained on; none where one of them is missing or cannot be read here, and why."""
    try:
        found = {(manifest.corpus, manifest.split): manifest for manifest in present_manifests(config.data.root)}
    except DigSegError as error:
        return [], str(error)
    wanted = [(entry.name, entry.split) for entry in config.data.corpora]
    if not all(name in found for name in wanted):
        return [], f"no shards yet in {config.data.root}"
    return [found[name] for name in wanted], ""
