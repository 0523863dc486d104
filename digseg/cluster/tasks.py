"""One function over many items as Ray tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from digseg.console import progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def fan_out(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    description: str,
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
    unit: str = "",
) -> Iterator[Result]:
    """Results of ``function`` over ``items``, in the items' order, with progress shown.

    Needs a Ray session (:func:`digseg.cluster.runtime.ray_session`). No more than twice as many tasks as the
    cluster has room for are in flight, so that a million items do not fill its queues. A task whose worker dies is
    tried again by Ray; one that raises ends the work: the others are cancelled and its exception is raised here as
    it was, the remote traceback being its cause.
    """
    # Ray takes plain functions only, and would make an actor of a class.
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(lambda item: function(item))
    limit = 2 * _room(num_cpus, num_gpus)
    waiting = deque(items)
    in_flight: deque[Any] = deque()
    with progress(description, total=len(items), unit=unit) as bar:
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < limit:
                    in_flight.append(remote.remote(waiting.popleft()))
                result: Result = _get(in_flight.popleft())
                bar.advance()
                yield result
        finally:
            for reference in in_flight:
                ray.cancel(reference)


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
