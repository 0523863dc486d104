"""Whole remote shards in a local folder: bounded, checked against the manifest, shared by the processes of a node.

::

    <directory>/<sha256>.tar    a shard, by the sha256 that its manifest says
                <sha256>.part   a shard that is being fetched, at its full size from the start, locked by its fetcher
                .lock           held while room is made

The kernel frees the locks of a process that dies; what it left is removed when room is needed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from digseg.data.format import ShardEntry
from digseg.data.storage import Storage
from digseg.errors import DigSegError

_log = logging.getLogger(__name__)

_BLOCK = 8 << 20  # bytes a request


class ShardCache:
    """Shards below ``directory``, never more than ``max_bytes`` of them; the least recently read make room.

    Any number of threads and processes may use one directory at the same time.
    """

    def __init__(self, directory: str | Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = Path(directory), max_bytes
        self._refused: set[str] = set()

    def holds(self, shard: ShardEntry) -> bool:
        """Whether the shard is there."""
        return self._tar(shard).exists()

    def read_range(self, shard: ShardEntry, start: int, end: int) -> bytes | None:
        """Bytes [start, end) of a shard, None where it is not there or its disk fails."""
        try:
            descriptor = os.open(self._tar(shard), os.O_RDONLY)
        except OSError:  # whatever it is: fetch() tells, and the shard is there to be read elsewhere
            return None
        try:
            with suppress(OSError):  # another user's file
                os.utime(descriptor)
            return os.pread(descriptor, end - start, start)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def drop(self, shard: ShardEntry) -> None:
        """Remove a shard that turned out to be damaged."""
        _log.warning("%s is damaged and removed", self._tar(shard))
        self._tar(shard).unlink(missing_ok=True)

    def fetch(self, storage: Storage, path: str, shard: ShardEntry) -> bool:
        """Bring the shard ``path`` of ``storage`` here, unless it is; whether it is here now.

        It is not where another process is at it, where the shards that are being fetched leave no room, where it is
        larger than the whole cache, and where its bytes are not those that the manifest says. It is then to be read
        sample by sample, each with a checksum of its own.

        Raises:
            DigSegError: the directory cannot be written, or its disk is full.
            OSError: the shard cannot be read.
        """
        if self._touched(shard):
            return True
        if shard.sha256 in self._refused:
            return False
        where = storage.url(path)
        if shard.bytes > self.max_bytes:
            self._refuse(shard, f"{where} has {shard.bytes} bytes, data.cache_bytes is {self.max_bytes}")
            return False
        with self._disk(where, shard.bytes):
            self.directory.mkdir(parents=True, exist_ok=True)
            file = _claimed(self._part(shard))
        if file is None:
            return False
        try:
            # Another process may have finished it just before.
            if not self.holds(shard) and self._filled(file, storage, path, shard):
                with self._alone():
                    self._part(shard).replace(self._tar(shard))
            else:
                self._part(shard).unlink()
            return self.holds(shard)
        except BaseException:
            self._part(shard).unlink()
            raise
        finally:
            os.close(file)

    def _filled(self, file: int, storage: Storage, path: str, shard: ShardEntry) -> bool:
        """Write the shard to ``file``; whether there was room and its bytes are what they should be."""
        where = storage.url(path)
        with self._disk(where, shard.bytes):
            if not self._reserve(file, shard.bytes):
                return False
        digest = hashlib.sha256()
        for start in range(0, shard.bytes, _BLOCK):
            block = storage.read_range(path, start, min(start + _BLOCK, shard.bytes))
            digest.update(block)
            with self._disk(where, shard.bytes):
                if os.pwrite(file, block, start) != len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if digest.hexdigest() != shard.sha256:
            self._refuse(shard, f"{where} has another sha256 than the manifest says")
            return False
        return True

    def _reserve(self, file: int, size: int) -> bool:
        """Give ``file`` its size on the disk, once enough others were removed; whether there was enough to remove."""
        with self._alone():
            os.ftruncate(file, 0)
            _remove_abandoned(self.directory)
            found = dict(_sizes(self.directory))
            excess = sum(found.values()) + size - self.max_bytes
            shards = [path for path in found if path.suffix == ".tar"]
            for path in sorted(shards, key=_last_read):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= found[path]
            if excess <= 0:
                os.posix_fallocate(file, 0, size)
            return excess <= 0

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other process make room, or give a shard its name, at the same time."""
        with (self.directory / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _touched(self, shard: ShardEntry) -> bool:
        """Whether the shard is there; it then counts as just read."""
        try:
            os.utime(self._tar(shard))
        except OSError:
            return False
        return True

    def _refuse(self, shard: ShardEntry, reason: str) -> None:
        _log.warning("not kept in data.cache_dir, read sample by sample instead: %s", reason)
        self._refused.add(shard.sha256)

    @contextmanager
    def _disk(self, where: str, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DigSegError(
                f"data.cache_dir {self.directory} cannot take {where} ({size} bytes): {error.strerror}; make room "
                "there, lower data.cache_bytes, or choose another data.cache_dir"
            ) from error

    def _tar(self, shard: ShardEntry) -> Path:
        return self.directory / f"{shard.sha256}.tar"

    def _part(self, shard: ShardEntry) -> Path:
        return self.directory / f"{shard.sha256}.part"


def _claimed(part: Path) -> int | None:
    """``part`` opened, made where it is not there, and locked; None where somebody else has it."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its former owner may have renamed or removed it before the lock was ours.
        if part.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes left half fetched."""
    for part in directory.glob("*.part"):
        descriptor = _claimed(part)
        if descriptor is not None:
            part.unlink()
            os.close(descriptor)


def _sizes(directory: Path) -> Iterator[tuple[Path, int]]:
    """All that counts; a damaged shard may be removed meanwhile."""
    for path in directory.iterdir():
        if path.suffix in (".tar", ".part"):
            with suppress(FileNotFoundError):
                yield path, path.stat().st_size


def _last_read(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
