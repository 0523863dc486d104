"""Turn a split of a corpus into WebDataset shards with index and manifest, as Ray tasks.

    python data_prep/shard.py --corpus camvid --root DIR --split train --out ROOT

The same sources give the same bytes. Running it again verifies what is there and makes only what is missing, damaged
or made from files that have changed since. A sample that cannot be used goes to rejected.jsonl with its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpora import Corpus, load_corpus
from data_prep.shard_job import ShardJob, ShardResult, make_shard, plan_shards
from digseg.console import say
from digseg.data.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    REJECTED_NAME,
    Manifest,
    Rejected,
    Statistics,
    ignore_id,
    is_shard_file,
    parse_manifest,
    shard_name,
    split_path,
)
from digseg.data.storage import TEMPORARY_SUFFIX, Storage
from digseg.errors import DigSegError, run_main

SHOWN_REASONS = 5


@dataclass(frozen=True)
class SplitPlan:
    """What sharding a split comes to; ``before`` is the manifest of an earlier run."""

    corpus: Corpus
    name: str
    split: str
    storage: Storage
    before: Manifest | None
    jobs: tuple[ShardJob, ...]

    @property
    def folder(self) -> str:
        return split_path(self.name, self.split)


def shard_corpus(plan: SplitPlan) -> Manifest:
    """Shard a split as it was planned. Only one job at a time may write a split.

    Raises:
        DigSegError: no sample is intact, or a file cannot be written.
    """
    # Ray takes a second to import: a job that is wrong should say so at once.
    from digseg.cluster.runtime import ray_session
    from digseg.cluster.tasks import fan_out

    with ray_session():
        results = fan_out(
            make_shard,
            plan.jobs,
            f"sharding {plan.folder}",
            unit="samples",
            size=lambda job: len(job.refs),
            environment=plan.storage.environment(),
        )
        return finish_split(plan, list(results))


def plan_split(
    corpus: str,
    root: str | Path,
    split: str,
    out: str | Path,
    samples_per_shard: int | None = None,
    name: str | None = None,
    seed: int = 0,
) -> SplitPlan:
    """How to shard ``split`` of the corpus ``corpus`` below ``root`` into ``out/<name>/<split>``; nothing is written.

    ``out`` is a folder or fsspec URL, ``name`` defaults to the corpus' own, ``seed`` names the assignment of samples
    to shards.

    Raises:
        DigSegError: unknown corpus or split, missing root, empty split, no intact sample, or an ``out`` that cannot be
            written.
    """
    source = load_corpus(corpus, root)
    name = _checked_name(name or source.name)
    refs = source.list(split)
    if all(ref.problem for ref in refs):
        raise _nothing_intact(source, split, [str(ref.problem) for ref in refs])
    by_key = {ref.key: ref for ref in refs}
    if len(by_key) != len(refs) or any(re.search(r"[./]", key) for key in by_key):
        raise DigSegError(f"corpus {source.name}: sample keys must be unique and free of '.' and '/'")
    storage = Storage(out)
    storage.check_writable()
    before = earlier_manifest(storage, name, split)
    known = {entry.name: entry for entry in before.shards} if before else {}
    jobs = tuple(
        ShardJob(
            corpus=source,
            name=name,
            split=split,
            refs=tuple(by_key[key] for key in keys),
            root=storage.root,
            shard=(shard := shard_name(name, split, number)),
            expected=known.get(shard),
        )
        for number, keys in enumerate(plan_shards(list(by_key), seed, samples_per_shard))
    )
    return SplitPlan(source, name, split, storage, before, jobs)


def finish_split(plan: SplitPlan, results: Sequence[ShardResult]) -> Manifest:
    """Describe what the jobs of a plan made, and say so."""
    rejected = sorted((r for result in results for r in result.rejected), key=lambda r: r.key)
    if not any(result.entry for result in results):
        raise _nothing_intact(plan.corpus, plan.split, [r.reason for r in rejected])
    lines = "".join(record.model_dump_json() + "\n" for record in rejected).encode()
    manifest = _manifest(plan, results, len(rejected), hashlib.sha256(lines).hexdigest())
    publish(plan.storage, manifest, lines, plan.before)
    _report(plan.storage, manifest, results, rejected)
    return manifest


def earlier_manifest(storage: Storage, name: str, split: str) -> Manifest | None:
    """The manifest that an earlier run left, if it is sound.

    Raises:
        DigSegError: it is there, but cannot be read.
    """
    path = f"{split_path(name, split)}/{MANIFEST_NAME}"
    with storage.reading():
        try:
            return parse_manifest(storage.read(path), storage.url(path))
        except FileNotFoundError:
            return None
        except DigSegError:
            # Damaged: every shard is then judged by its own index, and a sound manifest is written.
            return None


def publish(storage: Storage, manifest: Manifest, rejected: bytes, before: Manifest | None) -> None:
    """Write rejected.jsonl, then the manifest, last; remove what is left of earlier plans and of jobs that were killed.

    Raises:
        DigSegError: the shards are not seen from here, or a file cannot be written or removed.
    """
    folder = split_path(manifest.corpus, manifest.split)
    with storage.reading():
        _check_shared(storage, folder, manifest)
    with storage.writing(folder):
        if before != manifest:
            storage.remove(f"{folder}/{MANIFEST_NAME}")
        storage.write(f"{folder}/{REJECTED_NAME}", rejected)
        storage.write(f"{folder}/{MANIFEST_NAME}", manifest.to_json())
        known = {name for entry in manifest.shards for name in entry.digests()}
        for file in storage.files(folder):
            if file.endswith(TEMPORARY_SUFFIX) or (is_shard_file(file) and file not in known):
                storage.remove(f"{folder}/{file}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--corpus", required=True, help="a name of configs/corpora, or 'folder'")
    parser.add_argument("--root", required=True, help="the folder that holds the corpus")
    parser.add_argument("--split", required=True, help="such as train or val")
    parser.add_argument("--out", required=True, help="where the shards go: a folder or a URL such as s3://bucket/x")
    parser.add_argument("--name", help="what the sharded corpus is called (default: the corpus' own name)")
    parser.add_argument("--samples-per-shard", type=int, help="default: 1 to 4 shards, of 512 samples at most")
    parser.add_argument("--seed", type=int, default=0, help="of the assignment of samples to shards")
    options = parser.parse_args(arguments)
    if options.samples_per_shard is not None and options.samples_per_shard < 1:
        raise DigSegError(f"--samples-per-shard is {options.samples_per_shard}; it must be at least 1")
    plan = plan_split(
        options.corpus,
        options.root,
        options.split,
        options.out,
        options.samples_per_shard,
        options.name,
        options.seed,
    )
    shard_corpus(plan)


def _manifest(plan: SplitPlan, results: Sequence[ShardResult], num_rejected: int, rejected_sha256: str) -> Manifest:
    corpus, entries = plan.corpus, tuple(result.entry for result in results if result.entry)
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=plan.name,
        domain=corpus.domain,
        split=plan.split,
        licence=corpus.licence,
        vocabulary=corpus.vocabulary,
        may_contain=corpus.may_contain,
        ignore_id=ignore_id(len(corpus.vocabulary)),
        samples=sum(entry.samples for entry in entries),
        rejected=num_rejected,
        rejected_sha256=rejected_sha256,
        shards=entries,
        statistics=Statistics.merged([result.statistics for result in results if result.statistics]),
    ).with_digest()


def _check_shared(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Whether what the tasks wrote is seen from here: a local folder of another machine would not be."""
    absent = [shard.name for shard in manifest.shards if storage.size(f"{folder}/{shard.name}") != shard.bytes]
    if absent:
        raise DigSegError(
            f"{len(absent)} of {len(manifest.shards)} shards, such as {absent[0]}, were written but are not in "
            f"{storage.url(folder)}: on a cluster, --out must be a folder that all machines share, or a URL"
        )


def _report(storage: Storage, manifest: Manifest, results: Sequence[ShardResult], rejected: Sequence[Rejected]) -> None:
    written = sum(result.written for result in results)
    say(
        f"{manifest.corpus}/{manifest.split}: {manifest.samples} samples in {len(manifest.shards)} shards "
        f"({written} written, {len(manifest.shards) - written} verified), digest {manifest.digest[:12]}"
    )
    if rejected:
        where = storage.url(f"{split_path(manifest.corpus, manifest.split)}/{REJECTED_NAME}")
        say(f"  {len(rejected)} samples rejected, see {where}")
        for record in rejected[:SHOWN_REASONS]:
            say(f"  {record.key}: {record.reason}")


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise DigSegError(f"name {name!r}: use letters, digits, '_' and '-' (it names folders and shards)")
    return name


def _nothing_intact(corpus: Corpus, split: str, reasons: Sequence[str]) -> DigSegError:
    shown = "; ".join(list(dict.fromkeys(reasons))[:SHOWN_REASONS])
    return DigSegError(
        f"corpus {corpus.name}, split {split!r} below {corpus.root}: none of {len(reasons)} samples can be "
        f"used: {shown}"
    )


if __name__ == "__main__":
    run_main(main)
