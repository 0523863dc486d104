"""Training batches: step s of any world consumes global positions [s*B, (s+1)*B), rank r its contiguous slice.

What lies at a position is a pure function (:mod:`digseg.data.training_data`) and no worker has a state, so a run
resumes from its step alone, with any number of ranks or loader processes.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from digseg.config.schema import Config
from digseg.data.ahead import ShardFetcher
from digseg.data.latents import Latents
from digseg.data.queries import class_weights
from digseg.data.training_data import TrainingData
from digseg.data.transforms import as_pixels
from digseg.errors import DigSegError

_ELSEWHERE = torch.empty(0, dtype=torch.uint8)
_SMALL = ("query_ids", "colour_ids", "class_weights", "positions")


@dataclass
class Batch:
    """B samples; K is the largest number of slots among their queries.

    images [B, 3, H, W] and labels [B, H, W] (slot in the row's query, 255 = ignored) are uint8, a quarter and an eighth
    of what would else go from process to process and to a GPU; :meth:`to` makes them float32 in [-1, 1] and int64;
    query_ids int64 [B, K] into the table of texts, -1 where padded; colour_ids int64 [B, K] into the palette, 0 where
    padded; class_weights float32 [B, K], 1 where padded or foreign; positions int64 [B], always on the CPU; latents
    float16 [B, C, h, w] of the images, None where they are not stored; keys are ``corpus/split/key``; corrupt says of
    samples that could not be read and were replaced (by such a key) why.
    """

    images: torch.Tensor
    labels: torch.Tensor
    query_ids: torch.Tensor
    colour_ids: torch.Tensor
    class_weights: torch.Tensor
    positions: torch.Tensor
    latents: torch.Tensor | None
    keys: list[str]
    corrupt: dict[str, str]

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        # A tensor that goes to another process costs a file of shared memory: too much for a few numbers.
        return {name: value.numpy() if name in _SMALL else value for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({n: torch.from_numpy(value) if n in _SMALL else value for n, value in state.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with all that the model reads on ``device``, in the types that it computes with."""
        # A copy from memory that is not pinned waits for all that the device has still to do.
        pinned = non_blocking and torch.device(device).type == "cuda"
        moved = {
            name: (value.pin_memory() if pinned else value).to(device, non_blocking=non_blocking)
            for name in ("images", "labels", "query_ids", "colour_ids", "class_weights", "latents")
            if (value := getattr(self, name)) is not None
        }
        if self.images.dtype == torch.uint8:
            moved["images"] = as_pixels(moved["images"])
        moved["labels"] = moved["labels"].long()
        return dataclasses.replace(self, **moved)

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive micro-batches of ``size`` samples, for accumulation; the last may be smaller."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(
                **{field.name: _cut(getattr(self, field.name), part) for field in dataclasses.fields(self)[:-1]},
                corrupt=self.corrupt if start == 0 else {},
            )


def _cut(values: Any, part: slice) -> Any:
    return None if values is None else values[part]


def training_batches(
    data: TrainingData, config: Config, rank: int, world_size: int, start_step: int, steps: int
) -> Iterator[Batch]:
    """The batches of steps [start_step, start_step + steps) of one rank, each of global_batch_size / world_size.

    They are made ahead of need, by ``data.workers`` processes or a thread.

    Raises:
        DigSegError: the world does not divide the batch; and, in place of a batch, samples of it cannot be had.
    """
    positions = StepPositions(config.training.global_batch_size, rank, world_size, start_step, steps)
    batches = _by_processes(data, config, positions) if config.data.workers else _by_a_thread(data, config, positions)
    return batches if config.data.cache_dir is None else _with_shards(batches, data, positions)


def _with_shards(batches: Iterator[Batch], data: TrainingData, positions: StepPositions) -> Iterator[Batch]:
    """The same batches, while shards are fetched ahead of them."""
    with ShardFetcher(data) as fetcher:
        for first, *_ in positions:
            fetcher.advance(first)
            yield next(batches)


def _by_a_thread(data: TrainingData, config: Config, positions: StepPositions) -> Iterator[Batch]:
    """The batches, up to ``data.prefetch`` of them made in advance."""
    size = config.data.crop_size

    def make() -> Iterator[Batch]:
        for share in positions:
            images = torch.empty((len(share), 3, size, size), dtype=torch.uint8)
            yield _batch(data, config, share, images, images.new_empty((len(share), size, size)))

    thread, made = ThreadPoolExecutor(1, "batches"), make()
    try:
        coming = deque(thread.submit(next, made, None) for _ in range(config.data.prefetch))
        while (batch := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, made, None))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)


def _by_processes(data: TrainingData, config: Config, positions: StepPositions) -> Iterator[Batch]:
    """The batches, of which each process makes up to ``data.prefetch`` in advance."""
    workers, prefetch = config.data.workers, config.data.prefetch
    # One more than are under way: a batch is taken out before the next is asked for.
    pixels = SharedPixels(workers * prefetch + 1, positions.share, config.data.crop_size)
    loader = DataLoader(
        _Batches(data, config, positions, pixels),
        batch_size=None,
        sampler=positions,
        num_workers=workers,
        prefetch_factor=prefetch,
        multiprocessing_context=_worker_processes(),
        # Without a generator of its own the loader would draw from torch's global one.
        generator=torch.Generator(),
    )
    for step, batch in enumerate(loader, positions.start_step):
        if isinstance(batch, DigSegError):
            raise batch
        batch.images, batch.labels = (part.clone() for part in pixels.of(step))
        yield batch


@dataclass(frozen=True)
class StepPositions:
    """For each step from ``start_step`` on, the global positions of one rank's slice of the batch."""

    global_batch_size: int
    rank: int
    world_size: int
    start_step: int
    steps: int

    def __post_init__(self) -> None:
        if self.global_batch_size % self.world_size:
            raise DigSegError(
                f"training.global_batch_size is {self.global_batch_size}, which {self.world_size} ranks "
                "cannot share evenly"
            )

    @property
    def share(self) -> int:
        """Samples of a step that are this rank's."""
        return self.global_batch_size // self.world_size

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.start_step + self.steps):
            first = step * self.global_batch_size + self.rank * self.share
            yield list(range(first, first + self.share))

    def step_of(self, position: int) -> int:
        """The step that consumes a position."""
        return position // self.global_batch_size


class SharedPixels:
    """Memory that loader processes share with this one, for the pixels of ``slots`` batches of ``size`` samples.

    It is written again and again: to make and send new memory for every batch, as torch's own collation does, takes a
    tenth of a loader process' time.

    Raises:
        DigSegError: there is not so much shared memory.
    """

    def __init__(self, slots: int, size: int, crop_size: int) -> None:
        self._size = size
        shape = slots, 4 * size, crop_size, crop_size
        try:
            planes = torch.empty(shape, dtype=torch.uint8)
            self._planes: torch.Tensor = planes.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise DigSegError(
                f"batches made ahead take {math.prod(shape)} bytes of shared memory (/dev/shm), which cannot be had "
                f"({str(error).splitlines()[0]}); lower data.workers or data.prefetch, or give the container more"
            ) from error

    def of(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, 3, C, C] and labels [B, C, C] of a step, to be written or read."""
        planes = self._planes[step % len(self._planes)]
        return planes[: 3 * self._size].view(self._size, 3, *planes.shape[1:]), planes[3 * self._size :]


class _Batches(Dataset[Batch | DigSegError]):
    """The batch of a list of positions, but for its pixels, which are in ``pixels``.

    An error is what lies there: raised in a loader process, it would arrive with a traceback in its text.
    """

    def __init__(self, data: TrainingData, config: Config, positions: StepPositions, pixels: SharedPixels) -> None:
        self._data, self._config, self._positions, self._pixels = data, config, positions, pixels

    def __getitem__(self, positions: Sequence[int]) -> Batch | DigSegError:
        images, labels = self._pixels.of(self._positions.step_of(positions[0]))
        try:
            batch = _batch(self._data, self._config, positions, images, labels)
        except DigSegError as error:
            return error
        return dataclasses.replace(batch, images=_ELSEWHERE, labels=_ELSEWHERE)


def _worker_processes() -> ForkServerContext:
    """How loader processes start: forking a process with threads (gloo, Ray, object stores) can deadlock."""
    context = multiprocessing.get_context("forkserver")
    # The server imports torch once and all workers are forked from it.
    context.set_forkserver_preload([__name__])
    return context


def _batch(
    data: TrainingData, config: Config, positions: Sequence[int], images: torch.Tensor, labels: torch.Tensor
) -> Batch:
    """The batch of some positions, its pixels written to ``images`` [B, 3, C, C] and ``labels`` [B, C, C].

    The queries are padded to the longest; for the weights see :func:`class_weights`.
    """
    samples = data.samples(positions)
    for place, sample in enumerate(samples):
        images.numpy()[place], labels.numpy()[place] = sample.image, sample.labels
    exponent, maximum = config.objective.balance_exponent, config.objective.balance_max
    size, slots = len(samples), max(len(sample.query.text_ids) for sample in samples)
    query_ids = np.full((size, slots), -1, dtype=np.int64)
    colour_ids = np.zeros((size, slots), dtype=np.int64)
    weights = np.ones((size, slots), dtype=np.float32)
    for row, sample in enumerate(samples):
        used = len(sample.query.text_ids)
        query_ids[row, :used] = sample.query.text_ids
        colour_ids[row, :used] = sample.query.colour_ids
        weights[row, :used] = class_weights(sample.query.frequencies, exponent, maximum)
    return Batch(
        images=images,
        labels=labels,
        query_ids=torch.from_numpy(query_ids),
        colour_ids=torch.from_numpy(colour_ids),
        class_weights=torch.from_numpy(weights),
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        latents=_stacked([sample.latents for sample in samples]),
        keys=[sample.key for sample in samples],
        corrupt={key: reason for sample in samples for key, reason in sample.corrupt.items()},
    )


def _stacked(latents: Sequence[Latents | None]) -> torch.Tensor | None:
    """Float16 [B, C, h, w]; a run stores them for all samples or for none."""
    stored = [array for array in latents if array is not None]
    return torch.from_numpy(np.stack(stored)) if stored else None
