"""Turn a split of a corpus into WebDataset shards with index and manifest, as Ray tasks.

    python data_prep/shard.py --corpus camvid --root DIR --split train --out ROOT

The same sources give the same bytes. Running it again verifies what is there and makes only what is missing, damaged
or made from files that have changed since. A sample that cannot be used goes to rejected.jsonl with its reason.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.corpora import Corpus, SampleRef, load_corpus
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
    index_name,
    parse_manifest,
    shard_name,
    split_path,
)
from digseg.data.storage import Storage
from digseg.errors import DigSegError, run_main

SHOWN_REASONS = 5


def shard_corpus(
    corpus: str,
    root: str | Path,
    split: str,
    out: str | Path,
    samples_per_shard: int | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Manifest:
    """Shard ``split`` of the corpus ``corpus`` below ``root`` into ``out/<name>/<split>``.

    ``out`` is a folder or fsspec URL, ``name`` defaults to the corpus' own, ``seed`` names the assignment of samples
    to shards.

    Raises:
        DigSegError: unknown corpus or split, missing root, empty split, no intact sample, or an ``out`` that cannot be
            written; nothing is written then.
    """
    # Ray takes a second to import: a job that is wrong should say so at once.
    from digseg.cluster.runtime import ray_session
    from digseg.cluster.tasks import fan_out

    source = load_corpus(corpus, root)
    name = _checked_name(name or source.name)
    refs = source.list(split)
    if all(ref.problem for ref in refs):
        raise _nothing_intact(source, split, [str(ref.problem) for ref in refs])
    storage = Storage(out)
    _check_writable(storage)
    before = _earlier_manifest(storage, name, split)
    jobs = _jobs(source, name, split, refs, storage, before, samples_per_shard, seed)

    with ray_session():
        results = list(fan_out(make_shard, jobs, f"sharding {name}/{split}", unit="shards"))
    rejected = sorted((r for result in results for r in result.rejected), key=lambda r: r.key)
    if not any(result.entry for result in results):
        raise _nothing_intact(source, split, [r.reason for r in rejected])
    manifest = _manifest(source, name, split, results, len(rejected))
    _publish(storage, manifest, rejected)
    _report(storage, manifest, results, rejected)
    return manifest


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
    shard_corpus(
        options.corpus,
        options.root,
        options.split,
        options.out,
        options.samples_per_shard,
        options.name,
        options.seed,
    )


def _jobs(
    corpus: Corpus,
    name: str,
    split: str,
    refs: Sequence[SampleRef],
    storage: Storage,
    before: Manifest | None,
    samples_per_shard: int | None,
    seed: int,
) -> list[ShardJob]:
    by_key = {ref.key: ref for ref in refs}
    if len(by_key) != len(refs) or any(re.search(r"[./]", key) for key in by_key):
        raise DigSegError(f"corpus {corpus.name}: sample keys must be unique and free of '.' and '/'")
    known = {entry.name: entry for entry in before.shards} if before else {}
    return [
        ShardJob(
            corpus=corpus,
            name=name,
            split=split,
            refs=tuple(by_key[key] for key in keys),
            root=storage.root,
            shard=(shard := shard_name(name, split, number)),
            expected=known.get(shard),
        )
        for number, keys in enumerate(plan_shards(list(by_key), seed, samples_per_shard))
    ]


def _manifest(corpus: Corpus, name: str, split: str, results: Sequence[ShardResult], num_rejected: int) -> Manifest:
    entries = tuple(result.entry for result in results if result.entry)
    return Manifest(
        format_version=FORMAT_VERSION,
        corpus=name,
        domain=corpus.domain,
        split=split,
        licence=corpus.licence,
        vocabulary=corpus.vocabulary,
        may_contain=corpus.may_contain,
        ignore_id=ignore_id(len(corpus.vocabulary)),
        samples=sum(entry.samples for entry in entries),
        rejected=num_rejected,
        shards=entries,
        statistics=Statistics.merged([result.statistics for result in results if result.statistics]),
    ).with_digest()


def _publish(storage: Storage, manifest: Manifest, rejected: Sequence[Rejected]) -> None:
    """Write rejected.jsonl, then the manifest, last; then remove shards of earlier plans."""
    folder = split_path(manifest.corpus, manifest.split)
    lines = "".join(record.model_dump_json() + "\n" for record in rejected)
    storage.write(f"{folder}/{REJECTED_NAME}", lines.encode())
    storage.write(f"{folder}/{MANIFEST_NAME}", manifest.to_json())
    known = {name for entry in manifest.shards for name in (entry.name, index_name(entry.name))}
    for file in storage.files(folder):
        if file.endswith((".tar", ".idx")) and file not in known:
            storage.remove(f"{folder}/{file}")


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


def _earlier_manifest(storage: Storage, name: str, split: str) -> Manifest | None:
    path = f"{split_path(name, split)}/{MANIFEST_NAME}"
    try:
        return parse_manifest(storage.read(path), storage.url(path))
    except FileNotFoundError:
        return None
    except DigSegError:
        # Damaged: every shard is then judged by its own index, and a sound manifest is written.
        return None


def _check_writable(storage: Storage) -> None:
    if not storage.is_local:
        return
    folder = Path(storage.root)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise DigSegError(f"--out {storage.root} cannot be written: {existing} is not a folder this user may write")


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
