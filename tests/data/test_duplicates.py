"""Finding the same image twice: against brute force, and by what happens to pictures."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter
from shard_writing import write_split

from digseg.cli import main
from digseg.data.duplicates import DuplicateFinder, Duplicates, near_pairs
from digseg.data.format import ImageHashes, hashes_name, load_manifest, parse_hashes
from digseg.data.hashes import hash_image
from digseg.data.lint import lint_shards
from digseg.errors import DigSegError

VOCABULARY = ("sand", "sea")
Image8 = npt.NDArray[np.uint8]


def _photo(seed: int, size: tuple[int, int] = (96, 128)) -> Image8:
    """Smooth random blobs with some grain: like no other seed's."""
    random = np.random.default_rng(seed)
    blobs = np.stack([gaussian_filter(random.normal(size=size), 9) for _ in range(3)], axis=2)
    levels = 128 + blobs / blobs.std() * 40 + random.normal(size=blobs.shape) * 4
    return levels.clip(0, 255).astype(np.uint8)


def _as_jpeg(image: Image8, quality: int = 70) -> Image8:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def _resized(image: Image8, width: int, height: int) -> Image8:
    return np.asarray(Image.fromarray(image).resize((width, height)))


def _found(**splits: dict[str, Image8]) -> Duplicates:
    finder = DuplicateFinder()
    for split, images in splits.items():
        finder.add(f"shore/{split}", [hash_image(key, image) for key, image in images.items()])
    return finder.find()


def _write(root: Path, corpus: str, split: str, images: dict[str, Image8]) -> None:
    samples = {key: (image, np.zeros(image.shape[:2], np.uint8)) for key, image in images.items()}
    write_split(root, corpus, samples, VOCABULARY, split=split, samples_per_shard=2)


@given(st.data(), st.integers(0, 8))
def test_near_pairs_are_those_that_comparing_all_with_all_finds(data: st.DataObject, near_bits: int) -> None:
    word = st.integers(0, 2**64 - 1)
    seeds = data.draw(st.lists(word, min_size=1, max_size=8))
    flips = st.sets(st.integers(0, 63), max_size=near_bits + 2)
    spread = [seed ^ sum(1 << bit for bit in data.draw(flips)) for seed in seeds for _ in range(4)]
    values = np.unique(np.array([*seeds, *spread], dtype=np.uint64))
    expected = [
        [left, right]
        for left, right in itertools.combinations(range(len(values)), 2)
        if (int(values[left]) ^ int(values[right])).bit_count() <= near_bits
    ]
    assert near_pairs(values, near_bits).tolist() == expected


def test_every_way_to_differ_in_a_few_bits_is_found() -> None:
    near_bits = 4
    random = np.random.default_rng(0)
    for bits in range(1, near_bits + 1):
        for _ in range(300):
            value = int(random.integers(0, 2**64, dtype=np.uint64))
            other = value ^ sum(1 << int(bit) for bit in random.choice(64, bits, replace=False))
            values = np.array(sorted([value, other]), dtype=np.uint64)
            assert near_pairs(values, near_bits).tolist() == [[0, 1]]


def test_a_million_hashes_are_not_compared_with_each_other() -> None:
    """All with all would be 5 * 10^11 comparisons: hours, not the seconds that this test may take."""
    values = np.unique(np.random.default_rng(0).integers(0, 2**64, 1_000_000, dtype=np.uint64))
    planted = values[:500] ^ np.uint64((1 << 3) | (1 << 20) | (1 << 40) | (1 << 63))
    values = np.unique(np.concatenate([values, planted]))
    pairs = near_pairs(values, 4)
    assert len(pairs) >= 500
    assert (np.bitwise_count(values[pairs[:, 0]] ^ values[pairs[:, 1]]) <= 4).all()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda image: image.copy(), True),
        (_as_jpeg, False),
        (lambda image: _resized(image, 64, 48), False),
        (lambda image: np.clip(image.astype(int) + 12, 0, 255).astype(np.uint8), False),
    ],
)
def test_copies_across_splits_are_leaks(change: object, same: bool) -> None:
    assert callable(change)
    photo = _photo(0)
    others = {f"other{seed}": _photo(seed) for seed in range(1, 20)}
    found = _found(train={**others, "original": photo}, val={"other": _photo(99), "copy": change(photo)})
    (group,) = found.groups
    assert group.leaks
    assert group.same == same
    assert [(member.split, member.number, member.key) for member in group.pair] == [
        ("shore/train", 19, "original"),
        ("shore/val", 1, "copy"),
    ]


def test_pixels_count_and_not_the_size_that_has_as_many() -> None:
    image = _photo(0)
    assert hash_image("a", image).pixels_sha256 != hash_image("a", image.reshape(128, 96, 3)).pixels_sha256


def test_copies_within_a_split_are_no_leak() -> None:
    found = _found(train={"a": _photo(0), "b": _photo(0)}, val={"c": _photo(1)})
    assert found.leaks == ()
    assert [member.key for member in found.groups[0].members] == ["a", "b"]


def test_many_copies_are_one_group_with_its_closest_pair_across_splits() -> None:
    photo = _photo(0)
    near = {f"near{quality}": _as_jpeg(photo, quality) for quality in range(50, 90)}
    found = _found(train={**near, "original": photo}, val={"jpeg": _as_jpeg(photo, 90), "copy": photo})
    (group,) = found.groups
    assert len(group.members) == 43
    assert group.same
    assert {member.key for member in group.pair} == {"original", "copy"}


def test_group_that_only_its_middle_connects_names_a_pair_that_is_near() -> None:
    def line(key: str, value: int) -> ImageHashes:
        return ImageHashes(key=key, pixels_sha256=f"{value:064x}", phash=f"{value:016x}")

    finder = DuplicateFinder()
    finder.add("a/train", [line("left", 0b0), line("middle", 0b111)])
    finder.add("b/train", [line("right", 0b1111111), line("far", 2**60 - 1)])
    (group,) = finder.find().groups
    assert [member.key for member in group.members] == ["left", "middle", "right"]
    assert ([member.key for member in group.pair], group.distance) == (["middle", "right"], 4)


def test_flat_images_are_counted_and_not_compared() -> None:
    random = np.random.default_rng(0)
    blank = np.full((64, 64, 3), 200, np.uint8)
    speckled = (blank + random.integers(-3, 4, blank.shape)).astype(np.uint8)
    found = _found(train={"a": blank, "b": speckled}, val={"c": blank, "d": _photo(1)})
    assert (found.images, found.flat, found.groups) == (4, 2 + 1, ())


def test_leaks_are_told_and_fail_only_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, "shore", "train", {f"k{seed}": _photo(seed) for seed in range(5)})
    _write(tmp_path, "coast", "val", {"x": _photo(7), "y": _as_jpeg(_photo(3))})
    main(["shards", "lint", str(tmp_path)])
    told = capsys.readouterr().out
    assert "leak: y of coast/val and k3 of shore/train (nearly the same image: " in told
    assert "7 images compared: 1 leaks across splits or corpora, 0 groups" in told
    with pytest.raises(SystemExit) as stopped:
        main(["shards", "lint", str(tmp_path), "--strict"])
    assert stopped.value.code == 1


def test_all_groups_are_listed_with_their_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = _photo(3)
    _write(tmp_path, "shore", "train", {**{f"k{seed}": _photo(seed) for seed in range(5)}, "again": _photo(1)})
    _write(tmp_path, "coast", "val", {"x": _photo(7), "y": _as_jpeg(photo), "z": _as_jpeg(photo, 95)})
    main(["shards", "lint", str(tmp_path), "--duplicates", str(tmp_path / "groups.jsonl")])
    assert "1 leaks across splits or corpora, 1 groups" in capsys.readouterr().out
    near, exact = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert (near["kind"], near["leak"], exact["kind"], exact["distance"], exact["leak"]) == (
        "near",
        True,
        "exact",
        0,
        False,
    )
    assert 0 <= near["distance"] <= 4
    named = [(member["corpus"], member["split"], member["key"]) for member in near["members"]]
    assert sorted(named) == [("coast", "val", "y"), ("coast", "val", "z"), ("shore", "train", "k3")]
    assert {named[0][0], named[1][0]} == {"coast", "shore"}  # the closest pair of those that leak
    assert [member["key"] for member in exact["members"]] == ["k1", "again"]


@pytest.mark.parametrize("file", [".", "nowhere/groups.jsonl", "/dev/full"])
def test_list_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, "shore", "train", {"a": _photo(0), "b": _photo(0)})
    with pytest.raises(DigSegError, match=rf"--duplicates {re.escape(file)}"):
        main(["shards", "lint", str(tmp_path), "--duplicates", file])


def test_no_leaks_pass_strictly(tmp_path: Path) -> None:
    _write(tmp_path, "shore", "train", {"a": _photo(0)})
    _write(tmp_path, "shore", "val", {"b": _photo(1)})
    main(["shards", "lint", str(tmp_path), "--strict"])


def test_hashes_beside_the_shards_are_those_of_the_stored_images(tmp_path: Path) -> None:
    images = {f"k{seed}": _photo(seed) for seed in range(3)}
    _write(tmp_path, "shore", "train", images)
    shards = load_manifest(tmp_path, "shore", "train").shards
    files = [tmp_path / "shore/train" / hashes_name(shard.name) for shard in shards]
    lines = [line for file in files for line in parse_hashes(file.read_bytes(), str(file))]
    assert lines == [hash_image(key, image) for key, image in images.items()]
    assert lint_shards(tmp_path).duplicates.images == 3
