"""The typed schema of a run: every key of a YAML file under ``configs/`` is a field here.

A key that is not here is refused (:func:`digseg.config.load.load_config` names the nearest one). Units
stand in the names (``_s``, ``_px``, ``_mb``) or in the comment beside the field.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from digseg.config.model import ModelConfig
from digseg.config.section import Location, NonNegative, Positive, Section, Template, Unit
from digseg.errors import nearest

BACKGROUND = "background"  # the class of what is none of the others


class RunConfig(Section):
    """What a run is called and where it lives; the directory of a run is ``storage/name``."""

    name: str = "demo"
    seed: NonNegative = 0
    storage: Location = "outputs/runs"

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError("use letters, digits, '.', '_' and '-' (it names the run's directory)")
        return name


class ClusterConfig(Section):
    """Who runs the training: Ray Train (``ray``) or this process alone (``local``)."""

    backend: Literal["ray", "local"] = "ray"
    # training processes; [min, max]: as many as there is room for, more or fewer as machines come and go
    workers: Positive | tuple[Positive, Positive] = 2
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    address: str | None = None  # of a running cluster; None: the one this process is in, else a local one
    resize_interval_s: Annotated[float, Field(gt=0)] = 60.0  # how often a range of workers is fitted to the room
    max_failures: NonNegative = 3  # restarts of the worker group after a worker or node is lost
    # A process that does not answer, or come to what all do together, for so long is lost; more than a save takes.
    hang_timeout_s: Annotated[float, Field(gt=0)] = 600.0

    @model_validator(mode="after")
    def _range_is_one(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"workers: got [{self.min_workers}, {self.max_workers}]; the first must not exceed the second"
            )
        return self

    @property
    def min_workers(self) -> int:
        """The fewest training processes under Ray."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most training processes under Ray."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def world_size(self) -> int:
        """Number of training processes, if there is room for all."""
        return self.max_workers if self.backend == "ray" else 1


class SampleCorporaConfig(Section):
    """The corpora that the project draws itself."""

    images_per_domain: Annotated[int, Field(ge=5)] = 240
    seed: NonNegative = 0
    size: Annotated[int, Field(ge=64)] = 192  # px


class PrepareCorpus(Section):
    """One corpus on disk: the adapter that reads it, its folder below ``prepare.root``, and its splits."""

    corpus: str
    dir: str
    splits: Annotated[list[str], Field(min_length=1)]


class PrepareConfig(Section):
    """Corpora on disk that are turned into shards when the shards are absent."""

    root: Location | None = None
    sample_corpora: SampleCorporaConfig | None = None  # drawn into ``root`` first
    corpora: list[PrepareCorpus] = []


class CorpusSplit(Section):
    """A split of a sharded corpus."""

    name: str
    split: str = "train"


class MixtureEntry(CorpusSplit):
    """A split that is trained on."""

    weight: Annotated[float, Field(gt=0)] | None = None  # share of the mixture, relative to the others'; None: 1
    short_side: Positive | None = None  # px; None: data.short_side. Also the size its images are evaluated at


class QueriesConfig(Section):
    """How the set of class names asked of a training sample is drawn."""

    # Query dropout: a sample's query is a random part of its corpus' vocabulary, the rest of it becomes background
    sub_vocabulary_p: Unit = 0.25
    foreign_p: Unit = 0.4  # a sub-vocabulary also asks for classes of other domains, which are absent
    foreground_p: Unit = 0.8  # a sub-vocabulary of a one-foreground corpus keeps that class
    max_foreign: Positive = 3
    max_classes: Annotated[int, Field(ge=2)] = 64  # slots of one query
    palette_size: Annotated[int, Field(ge=2, le=64)] = 64
    # false: in the order of the vocabulary, as prediction gives them: a class of a corpus then mostly has the same
    random_colours: bool = True
    # Wordings, so that classes are known by more than their names: corpus -> class -> other words for it
    synonyms: dict[str, dict[str, Annotated[list[str], Field(min_length=1)]]] = {}
    synonym_p: Unit = 0.5  # a class that has synonyms is asked for by one of them
    templates: list[Template] = []  # texts around a name, such as "a photo of a {}"
    template_p: Unit = 0.5  # all names of a query are put into one of the templates

    @model_validator(mode="after")
    def _wordings_are_told_apart(self) -> Self:
        for corpus, classes in self.synonyms.items():
            owner: dict[str, str] = {}
            for name, wordings in classes.items():
                for wording in wordings:
                    if not wording.strip():
                        raise ValueError(f"synonyms: {corpus}: {name!r} has an empty wording; remove it")
                    if wording.lower() in owner:
                        raise ValueError(
                            f"synonyms: {corpus}: {wording!r} is given for {owner[wording.lower()]!r} and again for "
                            f"{name!r}; give each wording once"
                        )
                    owner[wording.lower()] = name
        return self

    @model_validator(mode="after")
    def _fits_palette(self) -> Self:
        if self.max_classes > self.palette_size:
            raise ValueError(
                f"max_classes ({self.max_classes}) exceeds palette_size ({self.palette_size}): "
                "every class of a query needs a colour of its own"
            )
        return self


class DataConfig(Section):
    """Shards, their mixture, and how a sample becomes a training crop."""

    root: Location = "outputs/shards"
    latents: Location | None = None  # latents of these shards' images (data_prep/encode_latents.py): trains on them
    corpora: Annotated[list[MixtureEntry], Field(min_length=1)]
    # Instead of weights: a corpus of n samples weighs n^(1/temperature); 1 mixes by size, a large one evenly.
    temperature: Annotated[float, Field(gt=0)] | None = None
    # Samples are shuffled through so many shards at a time: fewer are faster to fetch, more mix better.
    shuffle_window: Positive = 16  # shards
    crop_size: Positive = 128  # px
    short_side: Positive = 256  # px; images are resized so that their shorter side has this length ...
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 1.5)  # ... times this
    flip: bool = True
    colour_jitter: Unit = 0.2
    workers: NonNegative = 0  # DataLoader processes per rank; 0 reads in a thread of the training process
    prefetch: Positive = 2  # batches ahead, per DataLoader process or of the thread
    decoded_cache_mb: NonNegative = 0  # per process
    cache_dir: Location | None = None  # whole shards of a remote root are kept here, for all processes of a node ...
    cache_bytes: Positive = (
        100 * 10**9
    )  # ... so many bytes of them; twice what data.shuffle_window shards have, or more
    max_corrupt: NonNegative = 100  # samples that may be unreadable before the run stops
    queries: QueriesConfig = QueriesConfig()

    @model_validator(mode="after")
    def _sane(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: got {list(self.scale)}; the first bound must not exceed the second")
        shards = self.latents or self.root
        if self.cache_dir is not None and "://" not in shards:
            raise ValueError(
                f"cache_dir is {self.cache_dir}, but {shards} is no URL: a cache is for shards that are not on a file "
                "system of this machine (s3://...); drop cache_dir"
            )
        seen = set()
        for corpus in self.corpora:
            if (corpus.name, corpus.split) in seen:
                raise ValueError(
                    f"corpora: {corpus.name}/{corpus.split} is listed twice; give it one entry with the weights added"
                )
            if self.temperature is not None and corpus.weight is not None:
                raise ValueError(
                    f"temperature is {self.temperature:g} and {corpus.name}/{corpus.split} has weight "
                    f"{corpus.weight:g}: a mixture follows one or the other; drop temperature or all weights"
                )
            seen.add((corpus.name, corpus.split))
        names = {corpus.name for corpus in self.corpora}
        for name in self.queries.synonyms:
            if name not in names:
                raise ValueError(f"queries.synonyms: {name!r} is not among the corpora{nearest(name, names)}")
        return self


class DiffusionConfig(Section):
    """The noise process of the multi-step objective; betas, and what the U-Net predicts, are its checkpoint's."""

    zero_terminal_snr: bool = True  # the last timestep is pure noise
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None  # 5 is usual; None: no min-SNR weighting
    multi_resolution_noise: Unit = 0.0  # strength at the last timestep, annealed to 0 at the first; Marigold: 0.9


class ObjectiveConfig(Section):
    """What is trained, and the weights of the loss's parts and of rare classes."""

    # one_step: the mask in one deterministic pass; multi_step: denoising at all timesteps, sampled with DDIM
    type: Literal["one_step", "multi_step"] = "one_step"
    diffusion: DiffusionConfig = DiffusionConfig()  # of multi_step
    class_score: Annotated[float, Field(ge=0)] = 1.0
    feedback: Annotated[float, Field(ge=0)] = 0.5
    reconstruction: Annotated[float, Field(ge=0)] = 0.2
    dice: Annotated[float, Field(ge=0)] = 0.0
    balance_exponent: Unit = 0.5  # e of w_c = f_c^-e / sum_j f_j^(1-e)
    balance_max: Annotated[float, Field(ge=1)] = 5.0

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        if self.class_score == 0 and self.reconstruction == 0 and self.dice == 0:
            raise ValueError("class_score, reconstruction and dice are all 0: nothing would be learned")
        if self.type == "one_step" and self.diffusion != DiffusionConfig():
            raise ValueError("diffusion is of the multi-step objective: set type: multi_step, or drop it")
        return self


class EmaConfig(Section):
    """Exponential moving average of the weights; the average is what is evaluated and exported."""

    enabled: bool = True
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999


class GuardConfig(Section):
    """When a step is left out, and when the run goes back; non-finite losses and gradients always are."""

    spike_ratio: Annotated[float, Field(gt=1)] = 5.0  # a loss above this many times its running mean is left out ...
    settle_steps: NonNegative = 50  # ... after this many good steps
    bad_steps: Positive = 3  # of one logging interval that send the run back to a checkpoint from before them
    max_rollbacks: NonNegative = 3  # in the life of a process, before the run ends


class ValidationConfig(Section):
    """mIoU of the averaged weights on a few samples of ``evaluation.corpora`` while the run goes on."""

    every: Positive | None = None  # steps, and after the last one; None: never
    samples: Positive = 32  # of each corpus, the same every time: run.seed draws them
    pictures: NonNegative = 2  # so many of them are drawn, as image, ground truth and prediction


class ProfileConfig(Section):
    """Traces of the operators of single steps, in ``profile/`` of the run's directory."""

    steps: list[Positive] = []  # the first is 1


class TrainingConfig(Section):
    """The optimisation."""

    steps: Positive
    global_batch_size: Positive = 8
    micro_batch_size: Positive | None = None  # at most this many samples at a time in a process; the rest accumulates
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    warmup_steps: NonNegative = 40
    final_learning_rate_ratio: Unit = 0.01
    gradient_clipping: Annotated[float, Field(gt=0)] = 1.0
    # auto: bf16 where the device computes in it. Weights stay float32; fp16 adds a dynamic loss scale
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False  # keep the optimizer's state in the CPU's memory; ZeRO 1 to 3
    activation_checkpointing: bool = False  # compute the U-Net's activations again in the backward pass, to save memory
    channels_last: bool = False  # lay the U-Net's activations out as NHWC, which tensor cores prefer
    compile: bool = False  # the U-Net's transformer blocks by torch.compile, which needs a compiler; ZeRO 0 to 2
    ema: EmaConfig = EmaConfig()
    checkpoint_every: Positive = 200  # steps
    keep_checkpoints: Positive = 2  # the newest so many
    keep_every: Positive | None = None  # steps; checkpoints at multiples of this are kept for good
    keep_best: NonNegative = 1  # so many with the highest val/miou, of those saved at a step that was validated
    export: Literal["last", "best"] = "last"  # the checkpoint whose model the run exports at its end
    guard: GuardConfig = GuardConfig()
    validation: ValidationConfig = ValidationConfig()
    profile: ProfileConfig = ProfileConfig()
    log_every: Positive = 10  # steps
    log_samples: bool = False  # note the samples of each step in the run's directory, one file a process
    threads: Positive | None = None  # torch threads per process; None: the node's cores / its processes
    deepspeed: dict[str, Any] = {}  # merged into the derived DeepSpeed JSON

    @model_validator(mode="after")
    def _best_is_known(self) -> Self:
        if self.export == "best" and self.validation.every is None:
            raise ValueError("export is best, but nothing is validated: set validation.every")
        return self

    @model_validator(mode="after")
    def _compiled_weights_are_whole(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError("compile needs zero_stage 0, 1 or 2: stage 3 gathers a layer's weights when it is called")
        return self

    @model_validator(mode="after")
    def _offload_has_a_stage(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3: stage 0 keeps everything on the device")
        return self


class EvaluationConfig(Section):
    """What is evaluated after training."""

    corpora: list[CorpusSplit] = []
    held_out: list[CorpusSplit] = []  # corpora never trained on
    # corpus -> class -> other wordings: the full vocabulary with that one class renamed
    synonyms: dict[str, dict[str, list[str]]] = {}
    pictures_per_corpus: Positive = 4


class TrackingConfig(Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = None  # None: $MLFLOW_TRACKING_URI, else SQLite in run.storage
    experiment: str = "digseg"
    registered_model: str = "digseg"


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()
    prepare: PrepareConfig = PrepareConfig()
    data: DataConfig
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Numbers of training processes within ``cluster.workers`` that share the global batch evenly, ascending."""
        least = min(self.cluster.min_workers, self.cluster.world_size)
        sizes = range(least, self.cluster.world_size + 1)
        return tuple(size for size in sizes if self.training.global_batch_size % size == 0)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.world_sizes:
            total, cluster = self.training.global_batch_size, self.cluster
            sizes = [n for n in range(1, total + 1) if total % n == 0]
            raise ValueError(
                f"training.global_batch_size ({total}) does not divide over {cluster.workers} workers "
                f"(cluster.workers); possible numbers of workers: {sizes}"
            )
        if self.training.validation.every is not None and not self.evaluation.corpora:
            raise ValueError(
                f"training.validation.every is {self.training.validation.every}, but evaluation.corpora is empty: name "
                "the corpora and splits to validate on"
            )
        if self.model.lora is not None and self.training.zero_stage == 3:
            raise ValueError(
                "training.zero_stage is 3, which is not supported with model.lora (adapters do not go on to the same "
                "weights there); set it to 0, 1 or 2"
            )
        if self.model.autoencoder.type == "shuffle":
            multiple = self.model.autoencoder.factor * 2 ** (len(self.model.unet.block_out_channels) - 1)
            if self.data.crop_size % multiple:
                raise ValueError(
                    f"data.crop_size ({self.data.crop_size}) must be a multiple of {multiple} "
                    "(model.autoencoder.factor x 2 per U-Net level below the first)"
                )
        return self
