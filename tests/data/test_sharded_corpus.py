import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from shard_writing import noise_samples, write_split

from digseg.data.corpus import CorruptSampleError, ShardedCorpus
from digseg.data.format import index_name, list_manifests, load_manifest, parse_index
from digseg.errors import DigSegError

SAMPLES = noise_samples(10, num_classes=3)
VOCABULARY = ("sand", "rock", "moss")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path, "shore", SAMPLES, VOCABULARY)
    return tmp_path


def shards(root: Path) -> list[Path]:
    return sorted((root / "shore" / "train").glob("*.tar"))


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def test_samples_come_back_as_they_were_written(root: Path) -> None:
    corpus = ShardedCorpus(root, "shore", "train")
    assert len(corpus) == 10
    for number, (key, (image, mask)) in enumerate(SAMPLES.items()):
        sample = corpus.read(number)
        assert sample.key == corpus.key(number) == key == sample.meta["key"]
        np.testing.assert_array_equal(sample.image, image)
        np.testing.assert_array_equal(sample.mask, mask)


def test_evenly_spaced_samples(root: Path) -> None:
    corpus = ShardedCorpus(root, "shore", "train")
    for count, keys in ((3, ["k000", "k003", "k006"]), (1, ["k000"]), (0, []), (99, list(SAMPLES))):
        assert [sample.key for sample in corpus.evenly(count)] == keys


def test_index_points_at_exactly_what_tarfile_reads(root: Path) -> None:
    for shard in shards(root):
        index = shard.with_name(index_name(shard.name))
        content = shard.read_bytes()
        by_index = {
            f"{entry.key}.{member}": content[offset : offset + size]
            for entry in parse_index(index.read_bytes(), str(index))
            for member, (offset, size) in entry.members.items()
        }
        with tarfile.open(shard) as tar:
            by_tarfile = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert by_index == by_tarfile


def test_sample_is_one_ranged_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = ShardedCorpus(root, "shore", "train")
    corpus.read(0)
    reads: list[tuple[str, int, int]] = []
    read_range = type(corpus._storage).read_range

    def recorded(self: object, path: str, start: int, end: int) -> bytes:
        reads.append((path, start, end))
        return read_range(self, path, start, end)  # type: ignore[arg-type]

    monkeypatch.setattr(type(corpus._storage), "read_range", recorded)
    corpus.read(1)
    assert len(reads) == 1


def test_only_so_many_indexes_stay_in_memory(root: Path) -> None:
    corpus = ShardedCorpus(root, "shore", "train", open_indexes=2)
    assert [corpus.key(number) for number in (9, 0, 5, 9, 1)] == ["k009", "k000", "k005", "k009", "k001"]
    assert list(corpus._indexes) == [2, 0]


def test_manifest_counts_what_the_masks_hold(root: Path) -> None:
    manifest = load_manifest(root, "shore", "train")
    masks = np.concatenate([mask.reshape(-1) for _, mask in SAMPLES.values()])
    assert manifest.statistics.class_pixels == tuple((masks == class_id).sum() for class_id in range(3))
    assert manifest.statistics.class_images == (10, 10, 10)
    assert manifest.statistics.ignore_pixels == (masks == 255).sum()
    assert (manifest.statistics.min_height, manifest.statistics.max_width) == (40, 56)
    for entry, shard in zip(manifest.shards, shards(root), strict=True):
        assert entry.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
        assert entry.bytes == shard.stat().st_size


def test_writing_twice_gives_the_same_bytes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("again")
    write_split(other, "shore", SAMPLES, VOCABULARY)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert len(files) == 11
    assert all((root / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_digest_changes_with_any_sample(root: Path, tmp_path: Path) -> None:
    changed = {**SAMPLES, "k003": (SAMPLES["k003"][0], SAMPLES["k004"][1])}
    before = load_manifest(root, "shore", "train").digest
    assert write_split(tmp_path / "other", "shore", changed, VOCABULARY).digest != before


def test_webdataset_reads_the_shards_without_this_project(root: Path) -> None:
    program = """
import io, json, sys
import numpy as np
import webdataset as wds
from PIL import Image
dataset = wds.WebDataset(sys.argv[1:], shardshuffle=False)
for sample in dataset:
    mask = np.asarray(Image.open(io.BytesIO(sample["mask.png"])))
    image = np.asarray(Image.open(io.BytesIO(sample["image.png"])))
    assert json.loads(sample["json"])["key"] == sample["__key__"].split("/")[-1]
    print(sample["__key__"].split("/")[-1], image.shape, int(mask.astype(int).sum()))
assert not any(name.split(".")[0] in ("digseg", "data_prep") for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, *map(str, shards(root))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = [f"{key} {image.shape} {mask.astype(int).sum()}" for key, (image, mask) in SAMPLES.items()]
    assert done.stdout.splitlines() == expected


def test_sixteen_bit_masks_hold_more_than_255_classes(tmp_path: Path) -> None:
    vocabulary = tuple(f"species {number}" for number in range(300))
    samples = noise_samples(3, num_classes=300)
    manifest = write_split(tmp_path, "garden", samples, vocabulary)
    assert manifest.ignore_id == 65535
    corpus = ShardedCorpus(tmp_path, "garden", "train")
    for number, (_, mask) in enumerate(samples.values()):
        read = corpus.read(number).mask
        assert read.dtype == np.uint16
        np.testing.assert_array_equal(read, mask)
        assert mask.max() == 65535


def test_flipped_byte_is_found_by_verification_and_at_reading(root: Path) -> None:
    corpus = ShardedCorpus(root, "shore", "train")
    corpus.verify()
    flip_byte(shards(root)[1], 2000)
    with pytest.raises(DigSegError, match=r"000001\.tar has another sha256"):
        corpus.verify()
    with pytest.raises(CorruptSampleError, match=r"'k004'.*crc32 differs"):
        corpus.read(4)
    assert corpus.read(5).key == "k005"


def test_every_flipped_byte_of_a_sample_is_noticed(root: Path) -> None:
    shard = shards(root)[0]
    corpus = ShardedCorpus(root, "shore", "train")
    sound = shard.read_bytes()
    end = parse_index((root / "shore/train" / index_name(shard.name)).read_bytes(), "index")[0].end
    for offset in range(0, end, 397):
        flip_byte(shard, offset)
        with pytest.raises(CorruptSampleError, match="k000"):
            corpus.read(0)
        shard.write_bytes(sound)


def test_damaged_index_is_found_by_verification(root: Path) -> None:
    flip_byte(root / "shore/train" / index_name(shards(root)[0].name), 700)
    with pytest.raises(DigSegError, match=r"000000\.idx has another sha256"):
        ShardedCorpus(root, "shore", "train").verify()


def test_cut_off_shard_is_refused_when_opened(root: Path) -> None:
    shard = shards(root)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DigSegError, match=r"000000\.tar has \d+ bytes instead of \d+"):
        ShardedCorpus(root, "shore", "train")


def test_missing_shard_is_refused_when_opened(root: Path) -> None:
    shards(root)[2].unlink()
    with pytest.raises(DigSegError, match=r"000002\.tar is missing"):
        ShardedCorpus(root, "shore", "train")


def test_missing_corpus_names_the_nearest_and_the_command(root: Path) -> None:
    with pytest.raises(DigSegError, match=r"did you mean 'shore/train'.*data_prep/shard\.py"):
        load_manifest(root, "shor", "train")


def test_empty_root_says_how_to_make_shards(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"no shards below .*data_prep/shard\.py"):
        list_manifests(tmp_path / "nothing")


def test_manifest_changed_by_hand_is_refused(root: Path) -> None:
    path = root / "shore/train/manifest.json"
    content = json.loads(path.read_bytes())
    content["vocabulary"][0] = "gravel"
    path.write_text(json.dumps(content))
    with pytest.raises(DigSegError, match="changed by hand"):
        load_manifest(root, "shore", "train")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 2}'])
def test_damaged_manifest_is_refused(root: Path, content: str) -> None:
    (root / "shore/train/manifest.json").write_text(content)
    with pytest.raises(DigSegError, match="is damaged"):
        load_manifest(root, "shore", "train")


def test_manifest_of_another_format_version_is_refused(root: Path) -> None:
    path = root / "shore/train/manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(DigSegError, match="format_version is 3"):
        load_manifest(root, "shore", "train")


def test_all_splits_below_a_root_are_listed(root: Path) -> None:
    write_split(root, "shore", noise_samples(2, 3), VOCABULARY, split="val")
    write_split(root, "attic", noise_samples(2, 3), VOCABULARY)
    listed = [(manifest.corpus, manifest.split) for manifest in list_manifests(root)]
    assert listed == [("attic", "train"), ("shore", "train"), ("shore", "val")]


def test_shards_behind_an_fsspec_url_read_alike(root: Path) -> None:
    remote = fsspec.filesystem("memory")
    for path in (root / "shore/train").iterdir():
        remote.pipe_file(f"/bucket/shore/train/{path.name}", path.read_bytes())
    corpus = ShardedCorpus("memory://bucket", "shore", "train")
    corpus.verify()
    assert [m.corpus for m in list_manifests("memory://bucket")] == ["shore"]
    np.testing.assert_array_equal(corpus.read(7).mask, SAMPLES["k007"][1])
    with pytest.raises(DigSegError, match="no shards of corpus 'sea'"):
        load_manifest("memory://bucket", "sea", "train")


def test_index_outside_the_corpus_is_refused(root: Path) -> None:
    with pytest.raises(IndexError):
        ShardedCorpus(root, "shore", "train").read(10)


def test_index_and_tar_of_another_shard_are_refused(root: Path) -> None:
    first, second = shards(root)[:2]
    for path, other in ((first, second), (first.with_suffix(".idx"), second.with_suffix(".idx"))):
        path.write_bytes(other.read_bytes())
    corpus = ShardedCorpus(root, "shore", "train")
    with pytest.raises(DigSegError, match=r"000000\.idx is not what the manifest says; run data_prep/shard\.py again"):
        corpus.read(0)
    assert corpus.read(4).key == "k004"


def test_index_that_cannot_be_read_is_named(root: Path) -> None:
    index = shards(root)[0].with_suffix(".idx")
    index.unlink()
    index.mkdir()
    with pytest.raises(DigSegError, match=r"000000\.idx cannot be read: .*directory"):
        ShardedCorpus(root, "shore", "train").read(0)


@pytest.mark.parametrize(("failures", "read"), [(2, True), (3, False)])
def test_read_that_fails_is_tried_again_and_is_no_damage(
    root: Path, monkeypatch: pytest.MonkeyPatch, failures: int, read: bool
) -> None:
    monkeypatch.setattr("digseg.data.corpus._RETRY_WAITS_S", (0.0, 0.0))
    left = [OSError(errno.EIO, "Input/output error")] * failures
    pread = os.pread

    def failing(descriptor: int, size: int, offset: int) -> bytes:
        if left:
            raise left.pop()
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    corpus = ShardedCorpus(root, "shore", "train")
    if read:
        assert corpus.read(4).key == "k004"
    else:
        with pytest.raises(DigSegError, match=r"'k004' in .*000001\.tar cannot be read: .*Input/output error"):
            corpus.read(4)


def test_shard_that_vanishes_is_named_with_what_makes_it_again(root: Path) -> None:
    corpus = ShardedCorpus(root, "shore", "train")
    shards(root)[1].unlink()
    with pytest.raises(DigSegError, match=r"000001\.tar is gone; run data_prep/shard\.py again"):
        corpus.read(4)


def test_store_that_nobody_serves_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:  # bound, but nobody listens
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bound.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "somebody")
        s3 = fsspec.get_filesystem_class("s3")
        s3.clear_instance_cache()
        try:
            with pytest.raises(DigSegError, match=r"s3://away/shore/train/manifest\.json cannot be read: .*endpoint"):
                ShardedCorpus("s3://away", "shore", "train")
        finally:
            s3.clear_instance_cache()
