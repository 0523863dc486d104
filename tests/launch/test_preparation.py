from __future__ import annotations

from pathlib import Path

import pytest
from small_world import small_config, write_squares

from digseg.data.format import present_manifests
from digseg.errors import DigSegError
from digseg.training.plan import make_plan
from launch.preparation import ensure_shards


def test_nothing_is_done_where_the_shards_are(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 4)
    config = small_config(tmp_path, prepare={"corpora": [{"corpus": "squares", "dir": "x", "splits": ["train"]}]})
    assert ensure_shards(config) == {"corpora": 0.0, "shards": 0.0}
    assert [manifest.corpus for manifest in present_manifests(config.data.root)] == ["squares"]


def test_missing_shards_without_a_folder_of_corpora_say_what_to_set(tmp_path: Path) -> None:
    config = small_config(tmp_path, prepare={"corpora": [{"corpus": "camvid", "dir": "camvid", "splits": ["train"]}]})
    assert present_manifests(config.data.root) == []
    with pytest.raises(DigSegError, match=r"no shards of camvid/train, and prepare.root does not say"):
        ensure_shards(config)


def test_a_damaged_manifest_is_not_taken_for_missing(tmp_path: Path) -> None:
    write_squares(tmp_path / "shards", "train", 4)
    manifest = tmp_path / "shards" / "squares" / "train" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples": 4', '"samples": 5'))
    config = small_config(tmp_path)
    with pytest.raises(DigSegError, match=r"manifest\.json"):
        present_manifests(config.data.root)
    with pytest.raises(DigSegError, match=r"manifest\.json"):
        ensure_shards(config)
    # A plan, which may be made where the shards cannot be read, says so.
    assert [warning for warning in make_plan(config, 384).warnings if "manifest.json" in warning]
