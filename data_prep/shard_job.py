"""The work behind :mod:`data_prep.shard`: which sample goes to which shard, and making one shard (one Ray task)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_prep.corpora import BadSample, Corpus, SampleRef
from digseg.data.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Rejected,
    ShardEntry,
    Statistics,
    index_name,
    parse_header,
    shard_problems,
    split_path,
)
from digseg.data.hashes import hash_image
from digseg.data.order import mix64, permuted_index
from digseg.data.storage import Storage
from digseg.data.writer import EncodedSample, ShardWriter, encode_mask, encode_png, shard_entry

MIN_SAMPLES_PER_SHARD = 64
MAX_SAMPLES_PER_SHARD = 512


@dataclass(frozen=True)
class ShardJob:
    """One shard to make: everything a task needs, wherever it runs."""

    corpus: Corpus
    name: str
    split: str
    refs: tuple[SampleRef, ...]
    root: str
    shard: str
    expected: ShardEntry | None


@dataclass(frozen=True)
class ShardResult:
    """A shard that exists now, or (``entry`` None) one of which no sample was intact and nothing was written."""

    entry: ShardEntry | None
    statistics: Statistics | None
    rejected: tuple[Rejected, ...]
    written: bool


def plan_shards(keys: Sequence[str], seed: int, samples_per_shard: int | None = None) -> list[list[str]]:
    """Keys of each shard, sorted within it: a pure function of the set of keys, the seed and the size.

    Shards are random samples of the split of nearly equal size, so that a few of them stand for the whole. By
    default small corpora get one to four shards and large ones shards of 512 samples.
    """
    ordered = sorted(keys)
    size = samples_per_shard or min(MAX_SAMPLES_PER_SHARD, max(MIN_SAMPLES_PER_SHARD, -(-len(ordered) // 4)))
    num_shards = -(-len(ordered) // size)
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    for place, key in enumerate(ordered):
        shards[permuted_index(place, len(ordered), mix64(seed)) % num_shards].append(key)
    return shards


def make_shard(job: ShardJob) -> ShardResult:
    """Make a shard, or leave it as it is where it already holds these source files, intact.

    One sample is in memory at a time.

    Raises:
        DigSegError: the shard cannot be written, or what is there cannot be read.
    """
    storage = Storage(job.root)
    folder = split_path(job.name, job.split)
    present = present_shard(storage, folder, job.shard, job.expected, lambda: _source_sha256(job))
    if present is not None:
        return present

    source = _SourceDigest(job.corpus)
    statistics: list[Statistics] = []
    rejected: list[Rejected] = []
    samples = _encoded(job, source, statistics, rejected)
    first = next(samples, None)
    if first is None:
        return ShardResult(None, None, tuple(rejected), written=False)
    with storage.writing(f"{folder}/{job.shard}"):
        # A manifest never describes shards that are being replaced.
        storage.remove(f"{folder}/{MANIFEST_NAME}")
        with ShardWriter(storage, folder, job.shard) as writer:
            writer.add(first)
            for sample in samples:
                writer.add(sample)
            header, entry = writer.close(source.hexdigest(), Statistics.merged(statistics), rejected)
    return ShardResult(entry, header.statistics, header.rejected, written=True)


class _SourceDigest:
    """Grows to a digest over everything a shard is made from: label rules, keys, and the bytes of all source files."""

    def __init__(self, corpus: Corpus) -> None:
        self._digest = hashlib.sha256(f"{FORMAT_VERSION}{corpus.spec.model_dump_json()}".encode())
        self._file_digest = cache(_file_digest)  # the tiles of an image share its file

    def over(self, refs: Iterable[SampleRef]) -> Iterator[SampleRef]:
        """The same samples; each is added as it passes."""
        for ref in refs:
            self._digest.update(json.dumps([ref.key, ref.problem]).encode())
            for path in (ref.image, *_masks(ref)):
                self._digest.update(self._file_digest(path))
            yield ref

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    """What cannot be read counts as that."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b"missing"
    return hashlib.sha256(content).digest()


def present_shard(
    storage: Storage, folder: str, shard: str, expected: ShardEntry | None, source: Callable[[], str]
) -> ShardResult | None:
    """The result of an earlier run, if its files are what that run wrote (and what its manifest, where there is one,
    ``expected``) and were made from the same ``source``.

    Raises:
        DigSegError: they are there, but cannot be read.
    """
    with storage.reading():
        try:
            index = storage.read(f"{folder}/{index_name(shard)}")
        except FileNotFoundError:
            return None
        header = parse_header(index)
        if header is None or header.name != shard:
            return None
        entry = shard_entry(header, index)
        if expected not in (None, entry) or any(shard_problems(storage, folder, entry)):
            return None
    if header.source_sha256 != source():
        return None
    return ShardResult(entry, header.statistics, header.rejected, written=False)


def _source_sha256(job: ShardJob) -> str:
    source = _SourceDigest(job.corpus)
    for _ in source.over(job.refs):
        pass
    return source.hexdigest()


def _encoded(
    job: ShardJob, source: _SourceDigest, statistics: list[Statistics], rejected: list[Rejected]
) -> Iterator[EncodedSample]:
    """Intact samples of a job in order; ``source``, ``statistics`` and ``rejected`` grow as they are read."""
    num_classes = len(job.corpus.vocabulary)
    # Digested right before they are decoded, files come from the disk once.
    for ref, content in job.corpus.read_all(source.over(job.refs)):
        if isinstance(content, BadSample):
            rejected.append(_rejected(job.corpus.root, ref, str(content)))
            continue
        statistics.append(Statistics.of_mask(content.mask, num_classes))
        verbatim = content.image_bytes is not None
        height, width = content.mask.shape
        yield EncodedSample(
            key=ref.key,
            image=content.image_bytes if content.image_bytes is not None else encode_png(content.image),
            image_ext=content.image_ext if verbatim else "png",
            mask_png=encode_mask(content.mask, num_classes),
            meta={
                "key": ref.key,
                "corpus": job.name,
                "split": job.split,
                "height": height,
                "width": width,
                "source": _relative(ref.image, job.corpus.root),
            },
            hashes=hash_image(ref.key, content.image),
        )


def _rejected(root: Path, ref: SampleRef, reason: str) -> Rejected:
    return Rejected(
        key=ref.key,
        image=_relative(ref.image, root),
        masks=tuple(_relative(mask, root) for mask in _masks(ref)),
        reason=reason.replace(f"{root}/", ""),
    )


def _masks(ref: SampleRef) -> tuple[Path, ...]:
    return ref.mask if isinstance(ref.mask, tuple) else (ref.mask,)


def _relative(path: Path, root: Path) -> str:
    """Below the root, so that the bytes of a shard do not depend on where the corpus lies."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
