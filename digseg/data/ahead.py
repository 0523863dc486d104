"""Fetching remote shards into the local cache before training asks for their samples."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

from digseg.data.training_data import TrainingData

_log = logging.getLogger(__name__)

_PAUSE_S = 0.2  # between two looks at what is needed


class ShardFetcher:
    """A thread that keeps the shards of the windows that training is in, and of the next ones, in the cache.

    Use as a context manager. The ranks of a node each have one; what one of them is fetching the others leave to it.
    """

    def __init__(self, data: TrainingData) -> None:
        self._data, self._position = data, 0
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="shards", daemon=True)

    def advance(self, position: int) -> None:
        """Say that training has come to a global position.

        Raises:
            DigSegError: the cache's folder is not usable or its disk is full.
        """
        self._position = position
        if self._error is not None:
            raise self._error
        if self._thread.ident is None:
            self._thread.start()

    def __enter__(self) -> ShardFetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._fetch()
                self._closed.wait(_PAUSE_S)
        except BaseException as error:
            self._error = error

    def _fetch(self) -> None:
        for corpus, shard in self._data.shards_ahead(self._position):
            if self._closed.is_set():
                return
            try:
                corpus.fetch(shard)
            except OSError as error:
                # Who reads a sample of it finds out whether this lasts.
                _log.warning("shard %d of %s was not fetched ahead: %s", shard, corpus.name, error)
