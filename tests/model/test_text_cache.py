from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from digseg.model.text import build_text_table
from digseg.model.text_cache import cached_embeddings


class _Letters:
    """An encoder that counts how often it is asked; the vector of a name are its first letters' codes."""

    dim = 2
    modules: dict[str, Any]

    def __init__(self, fingerprint: str = "letters:1") -> None:
        self.fingerprint = fingerprint
        self.modules = {}
        self.asked = 0

    def encode(self, names: Sequence[str]) -> torch.Tensor:
        self.asked += 1
        return torch.tensor([[float(ord(letter)) for letter in name[:2]] for name in names])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIGSEG_CACHE", str(tmp_path / "cache"))


def test_a_vocabulary_is_encoded_once_for_all_that_have_the_same_weights() -> None:
    first, second = _Letters(), _Letters()
    expected = first.encode(["road", "car"])
    for encoder in (first, second):
        assert torch.equal(cached_embeddings(["road", "car"], encoder), expected)
    assert (first.asked, second.asked) == (2, 0)
    assert torch.equal(build_text_table(["road", "car"], second).mean, expected.mean(0))
    assert second.asked == 0


def test_other_names_another_order_and_other_weights_are_encoded_anew() -> None:
    encoder = _Letters()
    cached_embeddings(["road", "car"], encoder)
    assert torch.equal(cached_embeddings(["car", "road"], encoder), encoder.encode(["car", "road"]))
    cached_embeddings(["road", "cat"], encoder)
    other = _Letters("letters:2")
    cached_embeddings(["road", "car"], other)
    assert (encoder.asked, other.asked) == (4, 1)


def test_damage_is_made_good_and_a_place_that_cannot_be_written_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = _Letters()
    cached_embeddings(["road"], encoder)
    (file,) = (tmp_path / "cache" / "text").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    expected = _Letters().encode(["road"])
    assert torch.equal(cached_embeddings(["road"], encoder), expected)
    assert torch.equal(cached_embeddings(["road"], encoder), expected)
    assert encoder.asked == 2
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("DIGSEG_CACHE", str(tmp_path / "occupied"))
    assert torch.equal(cached_embeddings(["road"], encoder), expected)
    assert encoder.asked == 3
