"""Writing one shard with reproducible bytes: the same samples give the same tar and index everywhere."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from digseg.data.format import (
    FORMAT_VERSION,
    LATENT_MEMBER,
    MASK_MEMBER,
    MAX_8BIT_CLASSES,
    META_MEMBER,
    ImageHashes,
    IndexEntry,
    Rejected,
    ShardEntry,
    ShardHeader,
    Statistics,
    hashes_name,
    index_name,
)
from digseg.data.storage import Storage


@dataclass(frozen=True)
class EncodedSample:
    """A sample as it lies in the tar, and the hashes of its image. ``image_ext`` is ``jpg`` or ``png``; ``latents`` are
    the bytes of an npy file."""

    key: str
    image: bytes
    image_ext: str
    mask_png: bytes
    meta: Mapping[str, Any]
    hashes: ImageHashes
    latents: bytes | None = None


class ShardWriter:
    """Writes a tar under a temporary name, a sample at a time; it gets its real name, and its index and hashes
    appear, when :meth:`close` succeeds.

    Use as a context manager: an exception leaves nothing behind.
    """

    def __init__(self, storage: Storage, folder: str, name: str) -> None:
        self._storage, self._folder, self._name = storage, folder, name
        self._scratch = storage.scratch(f"{folder}/{name}")
        self._file: IO[bytes] = self._scratch.open("wb")
        self._digest = hashlib.sha256()
        self._offset = 0
        self._lines: list[str] = []
        self._hashes: list[str] = []

    def add(self, sample: EncodedSample) -> None:
        """Append a sample; its members lie side by side, so that it can be read back in one piece."""
        contents = {
            f"image.{sample.image_ext}": sample.image,
            MASK_MEMBER: sample.mask_png,
            META_MEMBER: json.dumps(dict(sample.meta), sort_keys=True).encode(),
        }
        if sample.latents is not None:
            contents[LATENT_MEMBER] = sample.latents
        start, checksum = self._offset, 0
        members: dict[str, tuple[int, int]] = {}
        for member, content in contents.items():
            header = _tar_header(f"{sample.key}.{member}", len(content))
            members[member] = (self._offset + len(header), len(content))
            checksum = zlib.crc32(self._write(header + content + _padding(len(content))), checksum)
        entry = IndexEntry(sample.key, members, start, self._offset, checksum)
        self._lines.append(entry.to_line())
        self._hashes.append(sample.hashes.model_dump_json() + "\n")

    def close(
        self, source_sha256: str, statistics: Statistics, rejected: Sequence[Rejected]
    ) -> tuple[ShardHeader, ShardEntry]:
        """Finish and publish the three files, the tar last: one with its real name has its index and hashes."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._offset % tarfile.RECORDSIZE))
        self._file.close()
        entries, hashes = "".join(self._lines).encode(), "".join(self._hashes).encode()
        header = ShardHeader(
            format_version=FORMAT_VERSION,
            name=self._name,
            samples=len(self._lines),
            bytes=self._offset,
            sha256=self._digest.hexdigest(),
            source_sha256=source_sha256,
            hashes_sha256=hashlib.sha256(hashes).hexdigest(),
            entries_sha256=hashlib.sha256(entries).hexdigest(),
            statistics=statistics,
            rejected=tuple(rejected),
        )
        index = header.model_dump_json().encode() + b"\n" + entries
        self._storage.write(f"{self._folder}/{hashes_name(self._name)}", hashes)
        self._storage.write(f"{self._folder}/{index_name(self._name)}", index)
        self._storage.publish(self._scratch, f"{self._folder}/{self._name}")
        return header, shard_entry(header, index)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # which writes what is still buffered, and fails where the disk is full
        finally:
            self._scratch.unlink(missing_ok=True)

    def _write(self, content: bytes) -> bytes:
        self._file.write(content)
        self._digest.update(content)
        self._offset += len(content)
        return content


def shard_entry(header: ShardHeader, index: bytes) -> ShardEntry:
    """What the manifest says of a shard, by the header and the bytes of its idx file."""
    return ShardEntry(
        name=header.name,
        samples=header.samples,
        bytes=header.bytes,
        sha256=header.sha256,
        index_sha256=hashlib.sha256(index).hexdigest(),
        hashes_sha256=header.hashes_sha256,
    )


def encode_png(image: npt.NDArray[np.uint8]) -> bytes:
    """PNG bytes of [H, W, 3] uint8."""
    return _png(image, compress_level=6)


def encode_mask(mask: npt.NDArray[np.integer[Any]], num_classes: int) -> bytes:
    """PNG bytes of a mask [H, W] of ids, 8-bit up to 255 classes and 16-bit above.

    Run lengths suit regions of one id: for a third of the time the file is smaller than zlib's default makes it.
    """
    ids = mask.astype(np.uint8 if num_classes <= MAX_8BIT_CLASSES else np.uint16)
    return _png(ids, compress_level=3, compress_type=zlib.Z_RLE)


def _png(array: npt.NDArray[Any], **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def _tar_header(name: str, size: int) -> bytes:
    """A header that depends on name and size alone: no time, no owner, fixed mode."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(format=tarfile.PAX_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)
