"""The shard format: names of files and members, the manifest, the index, and how both are verified.

    <root>/<corpus>/<split>/manifest.json
                            <corpus>-<split>-000000.tar   KEY.image.jpg|png, KEY.mask.png, KEY.json
                            <corpus>-<split>-000000.idx   a line on the shard, then one a sample (JSON)
                            <corpus>-<split>-000000.hashes  a line a sample (JSON): what finds duplicate images
                            rejected.jsonl                source samples that were left out, and why

The tar is plain WebDataset. Masks hold contiguous ids of the manifest's vocabulary; 255 (65535 in the
16-bit masks of vocabularies above 255 classes) is ignored everywhere. Where the manifest has ``latents``, samples are
views of samples (:mod:`digseg.data.latents`), and each has its latents beside it as KEY.latent.npy.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from digseg.data.latents import LatentRecipe
from digseg.data.storage import Storage
from digseg.errors import DigSegError, nearest

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
MASK_MEMBER = "mask.png"
LATENT_MEMBER = "latent.npy"
META_MEMBER = "json"
IMAGE_MEMBERS = ("image.jpg", "image.png")
MAX_8BIT_CLASSES = 255


def ignore_id(num_classes: int) -> int:
    """The mask value that is never a class: 255, or 65535 where ids need 16 bits."""
    return 255 if num_classes <= MAX_8BIT_CLASSES else 65535


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardEntry(_Record):
    """What the manifest knows of one shard; ``sha256`` and ``bytes`` are of the tar."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    hashes_sha256: str

    def digests(self) -> dict[str, str]:
        """The sha256 of each file of the shard by the file's name, the tar first."""
        return {
            self.name: self.sha256,
            index_name(self.name): self.index_sha256,
            hashes_name(self.name): self.hashes_sha256,
        }


class Rejected(_Record):
    """A source sample that did not make it into the shards. Paths are relative to the corpus' root."""

    key: str
    image: str
    masks: tuple[str, ...]
    reason: str


class ImageHashes(_Record):
    """A line of a hashes file: the sample's key and what finds the same or nearly the same image elsewhere.

    ``pixels_sha256`` is over width, height and RGB pixels, whatever file they came from. ``phash`` is the 64-bit
    perceptual hash as 16 hexadecimal digits; None for a flat image, one of nearly one colour, which has none.
    """

    key: str
    pixels_sha256: str
    phash: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None


class Statistics(_Record):
    """Counts over all masks and images of a shard or split. Lists run over the vocabulary."""

    class_pixels: tuple[int, ...]
    class_images: tuple[int, ...]
    ignore_pixels: int
    min_height: int
    max_height: int
    min_width: int
    max_width: int

    @classmethod
    def of_mask(cls, mask: npt.NDArray[np.integer[Any]], num_classes: int) -> Statistics:
        """Statistics of a single sample by its mask [H, W]."""
        counts = np.bincount(mask.reshape(-1), minlength=num_classes)
        height, width = mask.shape
        return cls(
            class_pixels=tuple(counts[:num_classes].tolist()),
            class_images=tuple((counts[:num_classes] > 0).astype(int).tolist()),
            ignore_pixels=int(counts[num_classes:].sum()),
            min_height=height,
            max_height=height,
            min_width=width,
            max_width=width,
        )

    @classmethod
    def merged(cls, parts: Sequence[Statistics]) -> Statistics:
        """Statistics of all parts together; there must be at least one."""
        return cls(
            class_pixels=tuple(map(sum, zip(*(p.class_pixels for p in parts), strict=True))),
            class_images=tuple(map(sum, zip(*(p.class_images for p in parts), strict=True))),
            ignore_pixels=sum(p.ignore_pixels for p in parts),
            min_height=min(p.min_height for p in parts),
            max_height=max(p.max_height for p in parts),
            min_width=min(p.min_width for p in parts),
            max_width=max(p.max_width for p in parts),
        )


class ShardHeader(_Record):
    """The first line of an idx file: all that the manifest will say of the shard, so that a job that was cut short
    can go on where it stopped.

    ``source_sha256`` is over the source files and label rules that the shard was made from, ``hashes_sha256`` over
    the hashes file, ``entries_sha256`` over the lines below this one.
    """

    format_version: int
    name: str
    samples: int
    bytes: int
    sha256: str
    source_sha256: str
    hashes_sha256: str
    entries_sha256: str
    statistics: Statistics
    rejected: tuple[Rejected, ...]


class Manifest(_Record):
    """A sharded split of a corpus. ``digest`` names its content: it changes with any byte of any file of it.

    ``rejected`` counts the lines of rejected.jsonl.
    """

    format_version: int
    corpus: str
    domain: str
    split: str
    licence: str
    vocabulary: tuple[str, ...]
    may_contain: tuple[str, ...]
    ignore_id: int
    samples: int
    rejected: int
    rejected_sha256: str
    shards: tuple[ShardEntry, ...]
    statistics: Statistics
    latents: LatentRecipe | None = None
    digest: str = ""

    @property
    def job(self) -> str:
        """The program that makes such shards, and mends them."""
        return "data_prep/shard.py" if self.latents is None else "data_prep/encode_latents.py"

    def with_digest(self) -> Manifest:
        """The same manifest carrying sha256 over the canonical JSON of everything but the digest itself."""
        content = self.model_dump(mode="json", exclude={"digest"})
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        return self.model_copy(update={"digest": hashlib.sha256(canonical).hexdigest()})

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def split_path(corpus: str, split: str) -> str:
    """The folder of a split below the shards' root."""
    return f"{corpus}/{split}"


def shard_name(corpus: str, split: str, number: int) -> str:
    return f"{corpus}-{split}-{number:06d}.tar"


def index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".idx"


def hashes_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".hashes"


def is_shard_file(name: str) -> bool:
    """Whether a file's name is one of a shard: its tar, index or hashes."""
    return name.endswith((".tar", ".idx", ".hashes"))


def load_manifest(root: str | Path, corpus: str, split: str) -> Manifest:
    """The manifest of a split, its digest checked.

    Raises:
        DigSegError: there are no such shards (with the command that makes them), or the manifest is damaged or
            cannot be read.
    """
    storage = Storage(root)
    path = f"{split_path(corpus, split)}/{MANIFEST_NAME}"
    try:
        content = storage.read(path)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(storage, corpus, split) from None
    except OSError as error:
        raise DigSegError(f"{storage.url(path)} cannot be read: {error}") from error
    return parse_manifest(content, storage.url(path))


def list_manifests(root: str | Path) -> list[Manifest]:
    """Manifests of all splits of all corpora below a root, sorted by corpus and split.

    Raises:
        DigSegError: nothing is there, or a manifest is damaged or cannot be read.
    """
    storage = Storage(root)
    with storage.reading():
        return _manifests_of(storage, split_folders(storage))


def present_manifests(root: str | Path) -> list[Manifest]:
    """:func:`list_manifests`, but none where nothing has been sharded yet.

    Raises:
        DigSegError: a manifest is damaged or cannot be read.
    """
    storage = Storage(root)
    with storage.reading():
        return _manifests_of(storage, _folders_with_manifest(storage))


def _manifests_of(storage: Storage, folders: Sequence[str]) -> list[Manifest]:
    paths = [f"{folder}/{MANIFEST_NAME}" for folder in folders]
    return [parse_manifest(storage.read(path), storage.url(path)) for path in paths]


def inner_folders(storage: Storage) -> list[str]:
    """The folders two levels below a root, where splits lie, sorted."""
    return [split_path(corpus, split) for corpus in storage.folders() for split in storage.folders(corpus)]


def split_folders(storage: Storage) -> list[str]:
    """Folders below a root that hold a manifest, sorted.

    Raises:
        DigSegError: there is none.
    """
    found = _folders_with_manifest(storage)
    if not found:
        raise DigSegError(f"no shards below {storage.root} (no */*/{MANIFEST_NAME}); {_HOW_TO_MAKE}")
    return found


def _folders_with_manifest(storage: Storage) -> list[str]:
    return [folder for folder in inner_folders(storage) if storage.size(f"{folder}/{MANIFEST_NAME}") is not None]


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Read and check a manifest's bytes; ``where`` names the file in errors."""
    try:
        version = json.loads(content).get("format_version")
        if version != FORMAT_VERSION:
            raise DigSegError(
                f"{where}: format_version is {version!r}, this program reads {FORMAT_VERSION}; "
                "make the shards again with data_prep/shard.py"
            )
        manifest = Manifest.model_validate_json(content)
    except (ValidationError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DigSegError(f"{where} is damaged ({_reason(error)}); make the shards again") from error
    if manifest.with_digest().digest != manifest.digest:
        raise DigSegError(f"{where} was changed by hand: its digest does not match; make the shards again")
    return manifest


class IndexEntry(NamedTuple):
    """Where a sample lies in its shard. ``crc32`` is over bytes [start, end), tar headers included."""

    key: str
    members: dict[str, tuple[int, int]]
    start: int
    end: int
    crc32: int

    @property
    def image_member(self) -> str:
        return next(member for member in IMAGE_MEMBERS if member in self.members)

    def cut(self, member: str, sample_bytes: bytes) -> bytes:
        """A member's content out of the bytes [start, end) of the sample."""
        offset, size = self.members[member]
        return sample_bytes[offset - self.start : offset - self.start + size]

    def to_line(self) -> str:
        members = {name: list(place) for name, place in self.members.items()}
        record = {
            "key": self.key,
            "start": self.start,
            "end": self.end,
            "crc32": self.crc32,
            "members": members,
        }
        return json.dumps(record, separators=(",", ":")) + "\n"


def parse_header(content: bytes) -> ShardHeader | None:
    """The header of an idx file's bytes, or None where it does not fit the lines below it."""
    first, _, entries = content.partition(b"\n")
    try:
        header = ShardHeader.model_validate_json(first)
    except ValidationError:
        return None
    return header if hashlib.sha256(entries).hexdigest() == header.entries_sha256 else None


def parse_index(content: bytes, where: str) -> list[IndexEntry]:
    """The entries of an idx file; ``where`` names it in errors."""
    try:
        return [_entry(record) for record in json.loads(b"[%b]" % b",".join(content.splitlines()[1:]))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DigSegError(f"{where} is damaged ({_reason(error)}); make the shards again") from error


def _entry(record: dict[str, Any]) -> IndexEntry:
    """An index line's entry. Raises ValueError, KeyError, TypeError or AttributeError where it is none."""
    key, start, end, crc32 = record["key"], record["start"], record["end"], record["crc32"]
    members = {name: (offset, size) for name, (offset, size) in record["members"].items()}
    if not isinstance(key, str):
        raise ValueError(f"key is {key!r}, not a string")
    if set(map(type, itertools.chain((start, end, crc32), *members.values()))) != {int}:
        raise ValueError(f"places of sample {key!r} are not all whole numbers")
    for offset, size in ((start, end - start), *members.values()):
        if not 0 <= start <= offset <= offset + size <= end:
            raise ValueError(f"members of sample {key!r} do not lie in bytes {start} to {end}")
    return IndexEntry(key, members, start, end, crc32)


def parse_hashes(content: bytes, where: str) -> list[ImageHashes]:
    """The lines of a hashes file, as the samples lie in the tar; ``where`` names it in errors."""
    try:
        return [ImageHashes.model_validate_json(line) for line in content.splitlines()]
    except ValidationError as error:
        raise DigSegError(f"{where} is damaged ({_reason(error)}); make the shards again") from error


def shard_problems(storage: Storage, folder: str, shard: ShardEntry) -> Iterator[str]:
    """How a shard's files differ from what the manifest says of them: missing, other size or sha256."""
    for name, digest in shard.digests().items():
        path = f"{folder}/{name}"
        size = storage.size(path)
        if size is None:
            yield f"{storage.url(path)} is missing"
        elif name == shard.name and size != shard.bytes:
            yield f"{storage.url(path)} has {size} bytes, the manifest says {shard.bytes}"
        elif sha256_of(storage, path, size) != digest:
            yield f"{storage.url(path)} has another sha256 than the manifest says"


def sha256_of(storage: Storage, path: str, size: int, block: int = 8 << 20) -> str:
    """sha256 of a file of ``size`` bytes, read a block at a time."""
    digest = hashlib.sha256()
    for start in range(0, size, block):
        digest.update(storage.read_range(path, start, min(start + block, size)))
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0]


_HOW_TO_MAKE = "make them with: python data_prep/shard.py --corpus NAME --root DIR --split SPLIT --out ROOT"


def _missing(storage: Storage, corpus: str, split: str) -> DigSegError:
    hint = nearest(f"{corpus}/{split}", inner_folders(storage))
    return DigSegError(f"no shards of corpus {corpus!r}, split {split!r}, below {storage.root}{hint}; {_HOW_TO_MAKE}")
