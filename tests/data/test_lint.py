"""`digseg shards lint`: intact shards pass, and every kind of damage is named."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from latent_writing import write_latents
from shard_writing import data_config, noise_samples, write_split

from digseg.cli import main
from digseg.data.format import REJECTED_NAME, Manifest, Rejected, hashes_name, parse_index
from digseg.data.lint import lint_shards
from digseg.errors import DigSegError, run_main

VOCABULARY = ("sand", "sea", "sky")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path, "shore", noise_samples(10, 3), VOCABULARY)
    write_split(tmp_path, "shore", noise_samples(3, 3, seed=1), VOCABULARY, split="val")
    return tmp_path


def _file(root: Path, kind: str, number: int = 0) -> Path:
    return sorted((root / "shore/train").glob(f"*.{kind}"))[number]


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def _edited(root: Path, **changes: object) -> None:
    """The manifest with other values and a digest that fits them."""
    path = root / "shore/train/manifest.json"
    manifest = Manifest.model_validate_json(path.read_bytes())
    path.write_bytes(manifest.model_copy(update=changes).with_digest().to_json())


def test_intact_shards_pass(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shards", "lint", str(root)])
    assert "13 samples in 4 shards of 2 splits: intact" in capsys.readouterr().out


def test_wide_vocabularies_pass(tmp_path: Path) -> None:
    write_split(tmp_path, "many", noise_samples(4, 300), [f"class {number}" for number in range(300)])
    assert lint_shards(tmp_path).problems == []


class VanishingStore(MemoryFileSystem):
    """Lists what it has, and reads no file whose name ends in ``lost``."""

    protocol = "vanishing"
    lost = ""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if self.lost and path.endswith(self.lost):
            raise ConnectionError("the store is gone")
        content: bytes = super().cat_file(path, start, end, **options)
        return content


@pytest.mark.parametrize("lost", ["manifest.json", ".tar", ".idx", ".hashes", "rejected.jsonl"])
def test_store_that_goes_away_after_its_listing_is_said_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    fsspec.register_implementation("vanishing", VanishingStore, clobber=True)
    monkeypatch.setattr("digseg.data.corpus._RETRY_WAITS_S", (0.0,))
    root = "vanishing://lint/there"
    write_split(root, "shore", noise_samples(4, 3), VOCABULARY)
    monkeypatch.setattr(VanishingStore, "lost", lost)
    for command in (["lint", root], ["show", root, "--out", str(tmp_path / "page.html")]):
        with pytest.raises(SystemExit) as stopped:
            run_main(partial(main, ["shards", *command]))
        assert stopped.value.code == 2
        assert re.search(r"error: .*cannot be read: .*the store is gone", capsys.readouterr().err)


def test_remote_shards_pass() -> None:
    write_split("memory://lint/here", "shore", noise_samples(4, 3), VOCABULARY)
    assert (lint_shards("memory://lint/here").samples, lint_shards("memory://lint/here").problems) == (4, [])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda root: _flip(_file(root, "tar"), 1500),
            ["another sha256", "sample 'k000' in ", "its bytes are not what was written"],
        ),
        (lambda root: _file(root, "tar").write_bytes(_file(root, "tar").read_bytes()[:9000]), ["has 9000 bytes"]),
        (lambda root: _file(root, "tar", 1).unlink(), ["000001.tar is missing"]),
        (lambda root: _file(root, "idx", 1).unlink(), ["000001.idx is missing"]),
        (lambda root: _file(root, "hashes", 1).unlink(), ["000001.hashes is missing"]),
        (lambda root: (root / "shore/train/rejected.jsonl").unlink(), ["rejected.jsonl is missing"]),
        (lambda root: _flip(_file(root, "idx"), -3), ["another sha256"]),
        (
            lambda root: _file(root, "idx").write_bytes(
                _file(root, "idx").read_bytes().replace(b"mask.png", b"mask.gif")
            ),
            ["its first line does not fit", "sample 'k000' in ", "its index line lacks a member"],
        ),
        (lambda root: _flip(root / "shore/train/manifest.json", 20), ["manifest.json"]),
        (
            lambda root: (root / "shore/train/shore-train-000009.tar").write_bytes(b"old"),
            ["000009.tar is not in the manifest"],
        ),
        (lambda root: (root / "shore/train").rename(root / "shore/test"), ["describes shore/train, not the folder"]),
        (lambda root: _edited(root, vocabulary=VOCABULARY[:2]), ["ids outside the vocabulary of 2 classes: 2"]),
    ],
)
def test_damage_is_named_and_ends_with_code_1(
    root: Path, damage: Callable[[Path], object], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(root)
    with pytest.raises(SystemExit) as stopped:
        main(["shards", "lint", str(root)])
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert all(part in printed for part in said), printed
    assert "problems; run data_prep/shard.py again" in printed


@pytest.mark.parametrize("kind", ["*.tar", "*.idx", "*.hashes", "manifest.json", "rejected.jsonl"])
@pytest.mark.parametrize("place", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_one_changed_byte_in_any_file_is_found(
    root: Path, kind: str, place: float, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Rejected(key="k99", image="a.png", masks=("b.png",), reason="no mask").model_dump_json().encode() + b"\n"
    (root / "shore/train" / REJECTED_NAME).write_bytes(lines)
    _edited(root, rejected=1, rejected_sha256=hashlib.sha256(lines).hexdigest())
    main(["shards", "lint", str(root)])
    victim = sorted((root / "shore/train").glob(kind))[-1]
    _flip(victim, round(place * (victim.stat().st_size - 1)))
    with pytest.raises(SystemExit) as stopped:
        main(["shards", "lint", str(root)])
    assert stopped.value.code == 1
    assert str(victim) in capsys.readouterr().out


def test_shards_without_a_manifest_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = root / "shore/val/manifest.json"
    manifest.unlink()
    (root / "shore/notes").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["shards", "lint", str(root)])
    assert stopped.value.code == 1
    assert lint_shards(root).problems == [f"{manifest} is missing"]


def test_any_digit_of_an_index_line_may_be_wrong(latents: Path) -> None:
    index = latents / "shore/train/shore-train-000000.idx"
    content = index.read_bytes()
    first = content.index(b"\n") + 1
    digits = [at for at in range(first, content.index(b"\n", first)) if content[at : at + 1].isdigit()]
    for number, at in enumerate(digits):
        digit = b".e90-"[number % 5 :][:1]
        index.write_bytes(content[:at] + digit + content[at + 1 :])
        problems = lint_shards(latents).problems
        assert (content[at : at + 1] == digit) == (not problems)
        assert not problems or any("000000." in problem for problem in problems)


def test_a_manifest_holds_no_byte_but_what_was_written(root: Path) -> None:
    path = root / "shore/train/manifest.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r", 1))
    (problem,) = lint_shards(root).problems
    assert f"{path} was changed by hand" in problem


@pytest.mark.parametrize("start", [2.0, -1, "0", 20, 8])
def test_index_line_that_points_outside_its_sample_is_damage(start: object) -> None:
    line = json.dumps({"key": "a", "start": start, "end": 12, "crc32": 1, "members": {"json": [6, 6]}})
    with pytest.raises(DigSegError, match=r"shore\.idx is damaged"):
        parse_index(f"header\n{line}\n".encode(), "shore.idx")


def test_hashes_of_other_samples_are_named(root: Path) -> None:
    train = root / "shore/train"
    manifest = Manifest.model_validate_json((train / "manifest.json").read_bytes())
    first, second, third = manifest.shards
    content = (train / hashes_name(second.name)).read_bytes()
    (train / hashes_name(first.name)).write_bytes(content)
    _edited(root, shards=(first.model_copy(update={"hashes_sha256": second.hashes_sha256}), second, third))
    problems = lint_shards(root).problems
    assert any("000000.hashes is not of the samples that the index lists" in problem for problem in problems)


def test_statistics_are_counted_again(root: Path) -> None:
    manifest = Manifest.model_validate_json((root / "shore/train/manifest.json").read_bytes())
    pixels = manifest.statistics.class_pixels
    wrong = manifest.statistics.model_copy(update={"class_pixels": (pixels[0] + 1, *pixels[1:])})
    _edited(root, statistics=wrong)
    (problem,) = lint_shards(root).problems
    assert "its statistics are not those of the masks" in problem


def test_mask_of_another_size_and_a_key_twice_are_named(tmp_path: Path) -> None:
    samples = noise_samples(2, 3)
    image, mask = samples["k001"]
    samples["k001"] = (image, np.ascontiguousarray(mask[:-1]))
    write_split(tmp_path, "shore", samples, VOCABULARY, samples_per_shard=1)
    (problem,) = lint_shards(tmp_path).problems
    assert "sample 'k001' in " in problem
    assert "the mask has (56, 39) pixels, the image (56, 40)" in problem

    folder = tmp_path / "shore/train"
    manifest = json.loads((folder / "manifest.json").read_text())
    first, second = manifest["shards"]
    for kind in ("tar", "idx", "hashes"):
        (folder / second["name"]).with_suffix(f".{kind}").write_bytes(
            (folder / first["name"]).with_suffix(f".{kind}").read_bytes()
        )
    twice = [
        problem for problem in lint_shards(tmp_path).problems if "another sample of the split has this key" in problem
    ]
    assert len(twice) == 1
    assert "sample 'k000' in " in twice[0]


def test_no_shards_at_all_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(DigSegError, match=r"no shards below .*make them with"):
        lint_shards(tmp_path)


@pytest.fixture
def latents(root: Path) -> Path:
    """Two views of each sample of shore/train, 32 px, by the shuffle autoencoder of factor 4."""
    write_latents(data_config(root, [{"name": "shore"}]), root / "latents", views=2)
    return root / "latents"


def test_intact_latents_pass(latents: Path) -> None:
    report = lint_shards(latents)
    assert (report.samples, report.problems) == (20, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_shape": (4, 8, 8)}, "its latents are [48, 8, 8], the manifest says [4, 8, 8]"),
        ({"views": 3}, "view 2 of a sample should lie here"),
        ({"transform": {"crop_size": 64}}, "the view has 32 x 32 pixels, the manifest says 64"),
    ],
)
def test_latents_that_are_not_what_the_manifest_says_are_named(
    latents: Path, changes: dict[str, Any], said: str
) -> None:
    path = latents / "shore/train/manifest.json"
    manifest = Manifest.model_validate_json(path.read_bytes())
    assert manifest.latents is not None
    recipe = manifest.latents.model_dump()
    changes = {key: {**recipe[key], **value} if key == "transform" else value for key, value in changes.items()}
    wrong = Manifest.model_validate({**manifest.model_dump(), "latents": {**recipe, **changes}})
    path.write_bytes(wrong.with_digest().to_json())
    assert any(said in problem for problem in lint_shards(latents).problems)


def test_images_in_a_manifest_of_latents_are_named(root: Path, latents: Path) -> None:
    recipe = Manifest.model_validate_json((latents / "shore/train/manifest.json").read_bytes()).latents
    _edited(root, latents=recipe)
    assert any("sample 'k000' in" in p and "it has no latents" in p for p in lint_shards(root).problems)
