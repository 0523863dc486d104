"""One function over many items as Ray tasks."""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ray

from digseg.console import progress

Item = TypeVar("Item")
Result = TypeVar("Result")

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20
_LARGEST_HEAP_BLOCK = 32 << 20  # the most that glibc takes


def fan_out(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    description: str,
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
    unit: str = "",
    size: Callable[[Item], int] = lambda _: 1,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Result]:
    """Results of ``function`` over ``items``, in the items' order, with progress shown in ``size`` of them.

    ``environment`` holds variables that the tasks need whatever machine they run on. It becomes part of their
    runtime environment, which whoever may look at the cluster can read.

    Needs a Ray session (:func:`digseg.cluster.runtime.ray_session`). No more than twice as many tasks as the
    cluster has room for are in flight, so that a million items do not fill its queues. A task whose worker dies is
    tried again by Ray; one that raises ends the work: the others are cancelled and its exception is raised here as
    it was, the remote traceback being its cause.
    """
    # Ray takes plain functions only, and would make an actor of a class.
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(lambda item: _run(function, item))
    if environment:
        remote = remote.options(runtime_env={"env_vars": dict(environment)})
    limit = 2 * _room(num_cpus, num_gpus)
    waiting = deque(items)
    in_flight: deque[tuple[int, Any]] = deque()
    with progress(description, total=sum(map(size, items)), unit=unit) as bar:
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < limit:
                    item = waiting.popleft()
                    in_flight.append((size(item), remote.remote(item)))
                done, reference = in_flight.popleft()
                result: Result = _get(reference)
                bar.advance(done)
                yield result
        finally:
            for _, reference in in_flight:
                ray.cancel(reference)


def _run(function: Callable[[Item], Result], item: Item) -> Result:
    _keep_freed_memory()
    return function(item)


@functools.cache
def _keep_freed_memory() -> None:
    """Have this process keep what it frees for its next allocation, once.

    By default glibc gives an image's buffers back to the system as they are freed and faults every page in again
    for the next image, which costs milliseconds an image.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK)


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception):
            raise cause from error
        raise


def _room(num_cpus: float, num_gpus: float) -> int:
    """How many such tasks the cluster runs at once."""
    resources = ray.cluster_resources()
    room = [resources.get("CPU", 1) / num_cpus] if num_cpus else []
    if num_gpus:
        room.append(resources.get("GPU", 0) / num_gpus)
    return max(1, int(min(room, default=1)))
