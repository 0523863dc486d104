"""The training loop: train -> train_step -> forward_backward."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from digseg.config import Config
from digseg.console import ProgressHandle, progress, say
from digseg.data.loader import Batch, training_batches
from digseg.data.queries import largest_query
from digseg.data.training_data import TrainingData
from digseg.errors import DigSegError
from digseg.evaluation.picture import prediction_grid
from digseg.model.attention import use_attention
from digseg.training.checkpoint import Checkpoint, CheckpointStore
from digseg.training.deepspeed_config import micro_batches
from digseg.training.engine import Engine
from digseg.training.guard import BadStep, SkippedSteps, TooManyBadStepsError
from digseg.training.ledger import Ledger
from digseg.training.locks import training_alone
from digseg.training.logging import MetricsFile, NullLogger, RunLogger, read_metrics
from digseg.training.preemption import RunStoppedError, StopAgreement
from digseg.training.profiling import StepProfiler
from digseg.training.run import (
    RunDirectory,
    TrainingResult,
    check_continues,
    check_layout,
    check_same_base,
    check_same_data,
    finished_result,
    summarise,
)
from digseg.training.sample_log import SampleLog
from digseg.training.saving import BackgroundSaver
from digseg.training.schedule import learning_rate
from digseg.training.shares import gather_shares
from digseg.training.state import TrainingState, saved_weights
from digseg.training.throughput import Throughput
from digseg.training.trained_model import TrainedModel
from digseg.training.unreadable import UnreadableSamples
from digseg.training.validation import Validation
from digseg.training.world import World


class Trainer:
    """One process of a training run. All ranks build one and call :meth:`train`.

    The run's directory is ``run.storage/run.name``; a run that was interrupted there goes on from its newest
    intact checkpoint. Nothing in here draws random numbers: data and initial weights are functions of the
    seed, so the same configuration gives the same losses, interrupted or not.

    Args:
        logger: takes the figures of rank 0; unused on other ranks.
        show_progress: whether rank 0 shows a progress bar (a driver may do that itself).
    """

    def __init__(
        self, config: Config, world: World, logger: RunLogger | None = None, show_progress: bool = True
    ) -> None:
        self.config = config
        self.world = world
        self.logger = logger if logger is not None and world.is_main else NullLogger()
        self.directory = RunDirectory(config)
        self._show_progress = show_progress and world.is_main
        self._metrics_file = MetricsFile(self.directory.metrics)
        self._micro_batch_size, self._num_micro_batches = micro_batches(config, world.world_size)
        self._ledger = Ledger(self.directory.ledger, self.directory.submitted_at())
        self._furthest = 0  # steps that the progress bar has shown

    def train(self) -> TrainingResult:
        """Take all steps that are left, export the model, and return the run's result.

        Raises:
            DigSegError: shards or settings do not allow it, the run of this name was another one, or losses
                are not finite or leap up however often the run goes back.
            RunStoppedError: a rank was given a notice (digseg.training.preemption); the run is saved.
        """
        finished = finished_result(self.config)
        if finished is not None:
            self._say(f"run {self.config.run.name!r} is finished: all {finished.steps} steps are taken")
            return finished
        with training_alone(self.config) if self.world.is_main else nullcontext():
            return self._train()

    def _train(self) -> TrainingResult:
        self._set_up()
        step = self._resume()
        self._enter("start_up")
        shown = progress("training", self.config.training.steps, "steps", step, shown=self._show_progress)
        with self._logged_run(), shown as bar, self._saver:
            while not self._is_last(step):
                try:
                    step = self._train_from(step, bar)
                except TooManyBadStepsError as bad:
                    step = self._go_back(bad.steps)
            result = self._conclude()
        self.engine.close()
        return result

    def _train_from(self, step: int, bar: ProgressHandle) -> int:
        """Take the steps from ``step`` on; how many the run has taken then."""
        config = self.config.training
        for batch, data_wait_s in self._timed_batches(step):
            self._stop.ask()
            if step not in self._skipped:
                if self._samples is not None:
                    self._samples.add(step, batch.keys)
                with self._profiler.step(step + 1):
                    losses = self.train_step(batch, step)
                self._state.window.add(losses, self.engine.was_bad(), data_wait_s)
                self._unreadable.add(batch.corrupt)
            self._ledger.wait(data_wait_s)
            step += 1
            if step == 1 or step % config.log_every == 0 or self._validates(step) or self._is_last(step):
                self._log(step, bar)
            if step > self._furthest:
                self._furthest = step
                bar.advance()
            notice = self._stop.answer()
            if step % config.checkpoint_every == 0 or self._is_last(step) or notice:
                self._save(step)
            if notice and not self._is_last(step):
                self._saver.wait()
                self._enter("checkpoint")
                raise RunStoppedError(notice, self.config.run.name, step)
        return step

    def train_step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Take optimizer step ``step`` (0-based) with this rank's samples; the mean losses, on the device."""
        rate = learning_rate(step, self.config.training)
        losses: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(batch.split(self._micro_batch_size), 1):
            for name, loss in self.forward_backward(micro_batch).items():
                part = loss / self._num_micro_batches
                losses[name] = losses[name] + part if name in losses else part
            last = number == self._num_micro_batches
            self.engine.step(rate, self._state.guard.judge(losses["loss"]) if last else None)
        self._state.guard.note(step, batch.keys, self.engine.was_bad())
        if self._state.average is not None:
            self._state.average.update(self.engine.shares())
        return losses

    def forward_backward(self, micro_batch: Batch) -> dict[str, Tensor]:
        """Accumulate the gradient of one micro-batch; its losses, on the device."""
        return self.engine.forward_backward(micro_batch.to(self.world.device, non_blocking=True))

    def _set_up(self) -> None:
        config, world = self.config, self.world
        threads = config.training.threads or max(1, _num_cores() // world.local_world_size)
        torch.set_num_threads(threads)
        self.data = TrainingData(config.data, config.run.seed)
        self._model = TrainedModel(config, self.data.names)
        self._frozen_sha256 = self._model.frozen_sha256()
        segmenter = self._model.segmenter
        if config.data.crop_size % segmenter.size_multiple:
            raise DigSegError(
                f"data.crop_size ({config.data.crop_size}) must be a multiple of {segmenter.size_multiple}, which is a "
                "cell of the U-Net's coarsest level"
            )
        self.data.check_autoencoder(segmenter.autoencoder.identity)
        attention = use_attention(segmenter.unet, config.model.attention, world.device)
        self._say(f"attention: {attention}")
        self._facts = {"device": world.device_name, "attention_kernel": attention.name}
        self._throughput = self._measured() if world.is_main else None
        self.engine = Engine(self._model.with_loss(), config, world)
        self._state = TrainingState(self.engine, config.training, world)
        self._profiler = StepProfiler(config.training.profile.steps, self.directory.profile, world)
        self._stop = StopAgreement(world)
        self._unreadable = UnreadableSamples(world, config.data.max_corrupt)
        if world.is_main:
            self.directory.write_config(config)
        kept = config.training.keep_checkpoints, config.training.keep_every, config.training.keep_best
        # Of a world of its own: it saves while training makes other collective calls.
        self._store = CheckpointStore(self.directory.checkpoints, world.apart(), *kept)
        self._validation: Validation | None = None
        if config.training.validation.every is not None:
            self._validation = Validation(config, world, self._model.as_loaded())
        self._saver = BackgroundSaver(self._store)
        world.limit_waits(config.cluster.hang_timeout_s)
        self._restored: Checkpoint | None = None
        self._tags: dict[str, str] = {}
        self._validated: dict[int, dict[str, float]] = {}  # figures of the last validation, by its step
        self._samples = self._new_sample_log()
        self._skipped = SkippedSteps(self.directory.skipped, writes=world.is_main)
        self._rollbacks = 0

    def _new_sample_log(self) -> SampleLog | None:
        return SampleLog(self.directory.samples, self.world) if self.config.training.log_samples else None

    def _measured(self) -> Throughput:
        """What the model computes and the device can, which also become facts of the run."""
        slots = largest_query(self.config.data.queries, self.data.manifests)
        found = Throughput(self.config, self._model.text_dim, slots, self.world.device, self.world.world_size)
        self._facts["gflops_per_image"] = f"{found.image_flops.training / 1e9:.3f}"
        self._facts["peak_tflops"] = f"{found.peak_flops / 1e12:.3f}"
        self._facts["peak_source"] = found.peak_source
        return found

    def _resume(self) -> int:
        """Restore the newest intact checkpoint; the number of steps already taken."""
        checkpoint = self._store.newest_intact()
        step = 0
        if checkpoint is not None:
            check_continues(checkpoint.state, self.config)
            check_same_data(checkpoint.state, self._dataset_digests(), self.config)
            check_layout(checkpoint.state, self.config)
            check_same_base(checkpoint.state, self._frozen_sha256, self.config)
            step = self._restore(checkpoint)
            self._say(f"run {self.config.run.name!r} goes on after step {step}")
        else:
            self._forget_after(0)
        self._furthest = step
        self._ledger.lose(checkpoint.state.get("ledger", {}) if checkpoint is not None else {})
        return step

    def _restore(self, checkpoint: Checkpoint) -> int:
        self._restored = checkpoint
        self._state.restore(checkpoint, self._store)
        known = checkpoint.state.get("unreadable", [])
        self._unreadable = UnreadableSamples(self.world, self.config.data.max_corrupt, known)
        self._forget_after(checkpoint.step)
        return checkpoint.step

    def _forget_after(self, step: int) -> None:
        """Drop what the run noted of later steps, which it will take again."""
        self._skipped.cut_after(step)
        if self.world.is_main:
            self._metrics_file.cut_after(step)

    def _go_back(self, bad: Sequence[BadStep]) -> int:
        """Restore the newest checkpoint from before bad steps, which are passed over from now on; its step."""
        first, last = bad[0].step, bad[-1].step
        self._tell(bad)
        self._saver.wait()
        checkpoint = self._store.newest_intact(until=first)
        allowed = self.config.training.guard.max_rollbacks
        if checkpoint is None or self._rollbacks >= allowed:
            why = (
                "there is no checkpoint from before"
                if checkpoint is None
                else f"going back {allowed} times was in vain"
            )
            raise DigSegError(
                f"the loss or the gradient of {len(bad)} steps from {first + 1} to {last + 1} is not finite or has "
                f"leapt up, and {why}; lower training.learning_rate (now "
                f"{self.config.training.learning_rate:g}), lengthen training.warmup_steps, or look at the samples, "
                f"of which the first is {bad[0].keys[0]}"
            )
        self._rollbacks += 1
        self._ledger.lap("productive")
        self._ledger.lose(checkpoint.state.get("ledger", {}))
        self._skipped.pass_over(bad)
        step = self._restore(checkpoint)
        self._samples = self._new_sample_log()  # the steps that are taken again are another attempt
        self._store.remove_after(step)
        self._say(f"going back to step {step}; steps {first + 1} to {last + 1} will be passed over")
        self._enter("start_up")
        return step

    def _save(self, step: int) -> None:
        """Begin a checkpoint: training goes on when its state is copied."""
        began = time.perf_counter()
        self._enter("productive")
        self._unreadable.share()
        state = {
            "zero_stage": self.config.training.zero_stage,
            "config": self.config.model_dump(mode="json"),
            "datasets": self._dataset_digests(),
            "frozen_sha256": self._frozen_sha256,
            "unreadable": self._unreadable.keys,
            "ledger": self._ledger.kept(),
            "validation": self._validated.get(step, {}),
        }
        self._saver.start(step, self._state.snapshot(), state)
        self._state.window.leave_out(time.perf_counter() - began)
        self._enter("checkpoint")

    def _enter(self, category: str) -> None:
        """Count the time since the last entry in the ledger."""
        self._ledger.lap(category)
        if self.world.is_main:
            self._ledger.write()

    def _log(self, step: int, bar: ProgressHandle) -> None:
        """Close the window and record its figures. The only host sync of the loop.

        Raises:
            TooManyBadStepsError: see :meth:`digseg.training.guard.Guard.close`.
        """
        self._saver.check()
        self._tell(self._state.guard.close())
        self._tell_tags()
        if self._state.window.is_empty:  # all its steps are passed over
            return
        figures = self._state.window.close(self.world, self.config.training.global_batch_size)
        figures["learning_rate"] = learning_rate(step - 1, self.config.training)
        figures["gradient_norm"] = self.engine.gradient_norm()
        figures["unreadable_samples"] = self._unreadable.share()
        figures["skipped_steps"] = self._skipped.count(step)
        if self._throughput is not None:
            figures |= self._throughput.figures(figures["images_per_second"])
        self._enter("productive")
        if self._validates(step):
            figures |= self._validate(step)
        if not self._is_last(step):  # the last step's are those of the end of the run
            figures |= self._ledger.figures()
        if self.world.is_main:
            self._metrics_file.append(step, figures)
            self.logger.metrics(step, figures)
        bar.note(f"loss {figures['loss']:.4f}")

    def _validates(self, step: int) -> bool:
        every = self.config.training.validation.every
        return every is not None and (step % every == 0 or self._is_last(step))

    def _validate(self, step: int) -> dict[str, float]:
        """mIoU on the samples for validation, ``val/miou`` and of each corpus; pictures go to the run's directory."""
        assert self._validation is not None
        began = time.perf_counter()
        weights = gather_shares(self._state.weights(), self.world)
        found = self._validation.run(self._model.state(weights))
        self._unreadable.add(found.unreadable)
        if self.world.is_main and found.rows:
            title = f"{self.config.run.name} after {step} steps"
            prediction_grid(found.rows, self.directory.validation / f"step-{step:08d}.png", title=title)
            self.logger.pictures(self.directory.validation)
        self._state.window.leave_out(time.perf_counter() - began)
        self._enter("validation")
        self._validated = {step: found.figures}
        return found.figures

    def _tell_tags(self) -> None:
        """Tag the run with its best checkpoint and the steps it skipped, if they are others than before."""
        tags = self.directory.tags() if self.world.is_main else {}
        if tags != self._tags:
            self._tags = tags
            self.logger.tags(tags)

    def _tell(self, bad: Sequence[BadStep]) -> None:
        self._skipped.leave_out(bad)
        for one in bad:
            self._say(
                f"step {one.step + 1} was left out, its loss or gradient being not finite or a spike; its samples: "
                f"{', '.join(one.keys)}"
            )

    def _conclude(self) -> TrainingResult:
        """Export the weights of the last checkpoint, or the best, and write the result."""
        checkpoint = self._saver.wait() or self._restored
        assert checkpoint is not None
        self._tell_tags()
        best = self._store.best_intact() if self.config.training.export == "best" else None
        exported = best or checkpoint
        self._enter("checkpoint")
        if self.world.is_main:
            self._export(exported)
            self._enter("export")
            figures = self._ledger.figures()
            self._metrics_file.complete(figures)
            self.logger.metrics(checkpoint.step, figures)
            first, last, rate = summarise(self.directory.metrics)
            result = TrainingResult(
                steps=checkpoint.step,
                first_loss=first,
                last_loss=last,
                images_per_second=rate,
                checkpoint_dir=str(exported.path),
                model_dir=str(self.directory.model),
                world_size=self.world.world_size,
                zero_stage=self.config.training.zero_stage,
                attention_kernel=self._facts["attention_kernel"],
            )
            self.directory.write_result(result)
        self.world.barrier()
        finished = self.directory.result()
        assert finished is not None
        return finished

    def _export(self, checkpoint: Checkpoint) -> None:
        metadata = {
            "run": self.config.run.name,
            "seed": self.config.run.seed,
            "step": checkpoint.step,
            "checkpoint": str(checkpoint.path),
            "checkpoint_digest": checkpoint.digest,
            "averaged_weights": self._state.average is not None,
            "datasets": self._dataset_digests(),
            "world_size": self.world.world_size,
            "zero_stage": self.config.training.zero_stage,
        }
        self._model.export(self.directory.model, saved_weights(checkpoint), metadata)

    def _dataset_digests(self) -> dict[str, str]:
        return {f"{m.corpus}/{m.split}": m.digest for m in self.data.manifests}

    def _timed_batches(self, start: int) -> Iterator[tuple[Batch, float]]:
        """The batches of the steps that are left, each with the seconds it was waited for."""
        batches = training_batches(
            self.data,
            self.config,
            self.world.rank,
            self.world.world_size,
            start,
            max(0, self.config.training.steps - start),
        )
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch, time.perf_counter() - began

    @contextmanager
    def _logged_run(self) -> Iterator[None]:
        self.logger.start(self.config.model_dump(mode="json"), self._dataset_digests(), self._facts)
        try:
            # A process that was killed may not have delivered its last figures; the file has them.
            for figures in read_metrics(self.directory.metrics) if self.world.is_main else []:
                self.logger.metrics(figures.pop("step"), figures)
            if self.world.is_main and self.directory.validation.is_dir():
                self.logger.pictures(self.directory.validation)
            self._tell_tags()
            yield
        except RunStoppedError as stopped:
            self._say(str(stopped))
            self.logger.finish("stopped")
            raise
        except BaseException:
            self.logger.finish("failed")
            raise
        self.logger.finish("finished")

    def _is_last(self, step: int) -> bool:
        # A run may go on with fewer steps than it has taken.
        return step >= self.config.training.steps

    def _say(self, text: str) -> None:
        if self.world.is_main:
            say(text)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
