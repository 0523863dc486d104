"""One small view of a folder of files, local or behind any fsspec URL (``s3://``, ``gs://``, ``memory://``)."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from digseg.errors import DigSegError

TEMPORARY_SUFFIX = ".part"
"""How the names end of files that are being written; one that was cut short leaves such a file behind."""

_SETTINGS = ("AWS_", "FSSPEC_", "GOOGLE_", "GCSFS_", "STORAGE_EMULATOR_HOST", "AZURE_")
"""How the names begin of environment variables that remote file systems read endpoint and credentials from."""


class Storage:
    """A root folder. Paths below it are relative and use ``/``.

    Local files are read with ``os.pread``. A remote file system is opened on first use in each process,
    because its connections do not survive a fork or a pickle.
    """

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        self.is_local = "://" not in text or text.startswith("file://")
        self.root = str(Path(text.removeprefix("file://")).absolute()) if self.is_local else text.rstrip("/")
        self._remote: Any = None
        self._remote_pid = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_remote": None, "_remote_pid": -1}

    def url(self, path: str) -> str:
        """The full name of a file below the root, for messages and for opening it elsewhere."""
        return f"{self.root}/{path}" if path else self.root

    def environment(self) -> dict[str, str]:
        """The variables of this process' environment that another needs to open a remote root; none of a local one."""
        if self.is_local:
            return {}
        return {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS)}

    def check_writable(self) -> None:
        """Write an empty file and remove it again; a local root need not exist yet and is not made.

        Raises:
            DigSegError: the root is no place where files can be written, with the reason.
        """
        try:
            if self.is_local:
                with tempfile.TemporaryFile(dir=self._existing()):
                    return
            probe = self.url(f".write-check-{uuid.uuid4().hex[:12]}")
            with self._remotely() as remote:
                remote.pipe_file(probe, b"")
                remote.rm_file(probe)
        except (OSError, DigSegError) as error:
            raise DigSegError(f"{self.root} cannot be written: {error}") from error

    def free_bytes(self) -> int | None:
        """What the disk of a local root still holds; None for a remote one."""
        return shutil.disk_usage(self._existing()).free if self.is_local else None

    def _existing(self) -> Path:
        """The folder of a local root, or the nearest one above it that exists."""
        folder = Path(self.root)
        return next(path for path in (folder, *folder.parents) if path.exists())

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        if self.is_local:
            return Path(self.url(path)).read_bytes()
        with self._remotely() as remote:
            return bytes(remote.cat_file(self.url(path)))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file in one request; fewer where the file ends before."""
        if not self.is_local:
            with self._remotely() as remote:
                return bytes(remote.cat_file(self.url(path), start=start, end=end))
        descriptor = os.open(self.url(path), os.O_RDONLY)
        try:
            return os.pread(descriptor, end - start, start)
        finally:
            os.close(descriptor)

    def size(self, path: str) -> int | None:
        """Bytes of a file, or None where there is no such file."""
        try:
            if self.is_local:
                return Path(self.url(path)).stat().st_size
            with self._remotely() as remote:
                return int(remote.size(self.url(path)))
        except FileNotFoundError:
            return None

    def folders(self, path: str = "") -> list[str]:
        """Sorted names of the folders directly below ``path``; empty where there is none."""
        return self._list(path, "directory")

    def files(self, path: str = "") -> list[str]:
        """Sorted names of the files directly below ``path``; empty where there is none."""
        return self._list(path, "file")

    def _list(self, path: str, kind: str) -> list[str]:
        if self.is_local:
            folder = Path(self.url(path))
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
            return [entry.name for entry in entries if entry.is_dir() == (kind == "directory")]
        try:
            with self._remotely() as remote:
                listing = remote.ls(self.url(path), detail=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DigSegError(f"{self.url(path)} cannot be listed: {error}") from error
        return sorted(Path(entry["name"]).name for entry in listing if entry["type"] == kind)

    def remove(self, path: str) -> None:
        """Remove a file if it is there."""
        if self.is_local:
            Path(self.url(path)).unlink(missing_ok=True)
            return
        with self._remotely() as remote:
            if remote.exists(self.url(path)):
                remote.rm_file(self.url(path))

    def write(self, path: str, content: bytes) -> None:
        """Publish a file whole: by rename locally, by a single put on an object store."""
        if self.is_local:
            target = Path(self.url(path))
            temporary = self._temporary(target)
            try:
                temporary.write_bytes(content)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            return
        with self._remotely() as remote:
            remote.pipe_file(self.url(path), content)

    def publish(self, source: Path, path: str) -> None:
        """Move a finished local file to ``path``: nobody ever sees a part of it. ``source`` is gone after."""
        if not self.is_local:
            with self._remotely() as remote:
                remote.put_file(str(source), self.url(path))
            source.unlink()
            return
        target = Path(self.url(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)

    def scratch(self, path: str) -> Path:
        """A new local name to build ``path`` under before :meth:`publish`; on its disk if that is local."""
        if self.is_local:
            return self._temporary(Path(self.url(path)))
        return self._temporary(Path(tempfile.gettempdir()) / Path(path).name)

    @staticmethod
    def _temporary(target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{TEMPORARY_SUFFIX}")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A block that a file which cannot be read ends with a clear error.

        Raises:
            DigSegError: for any OSError.
        """
        with _refused(f"{self.root} cannot be read", "; try again once it can"):
            yield

    @contextmanager
    def writing(self, path: str) -> Iterator[None]:
        """A block that ends with a clear error where ``path`` cannot be written.

        Raises:
            DigSegError: for any OSError.
        """
        with _refused(f"cannot write {self.url(path)}"):
            yield

    @contextmanager
    def _remotely(self) -> Iterator[Any]:
        """The remote file system. Every one has errors of its own: those that are no OSError are raised as one."""
        try:
            yield self._fs()
        except (OSError, DigSegError):
            raise
        except Exception as error:
            raise OSError(errno.EIO, str(error)) from error

    def _fs(self) -> Any:
        if self._remote_pid != os.getpid():
            try:
                self._remote, _ = fsspec.core.url_to_fs(self.root)
            except (ImportError, ValueError) as error:
                raise DigSegError(f"cannot open {self.root}: {error}") from error
            self._remote_pid = os.getpid()
        return self._remote


@contextmanager
def _refused(what: str, advice: str = "") -> Iterator[None]:
    """What the operating system or an object store refuses, as an error that says ``what`` and gives ``advice``."""
    try:
        yield
    except OSError as error:
        raise DigSegError(f"{what}: {error}{advice}") from error
