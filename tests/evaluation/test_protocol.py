"""Which corpora a protocol evaluates, by what models say they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from shard_writing import noise_samples, write_split

from digseg.config import Protocol
from digseg.data.format import Manifest
from digseg.errors import DigSegError
from digseg.evaluation.evaluate import Question
from digseg.evaluation.protocol import ask
from launch.evaluate import PROTOCOLS, find_protocol


@dataclass
class Card:
    """What `ask` reads of a model's card."""

    names: Sequence[str]
    metadata: dict[str, Any] = field(default_factory=dict)


STREET = Card(("road", "car"), {"datasets": {"street/train": "ab"}})
FIELDS = Card(("crop", "weed", "road"), {"datasets": {"fields/train": "cd", "street/train": "ab"}})


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    root = tmp_path_factory.mktemp("shards")
    vocabularies = {"street": ("Road", "car"), "fields": ("crop", "weed"), "town": ("road", "fountain")}
    return [write_split(root, name, noise_samples(1, 2), names, "val") for name, names in vocabularies.items()]


@pytest.mark.parametrize(
    ("protocol", "cards", "expected"),
    [
        (Protocol(), [STREET], ["street", "fields", "town"]),
        (find_protocol("supervised"), [STREET], ["street"]),
        (find_protocol("supervised"), [STREET, FIELDS], ["street"]),
        (find_protocol("cross_domain"), [STREET], ["fields", "town"]),
        (find_protocol("cross_domain"), [STREET, FIELDS], ["town"]),
        (find_protocol("open_vocabulary"), [STREET], ["fields", "town"]),
        (find_protocol("open_vocabulary"), [FIELDS], ["street", "town"]),
        (find_protocol("open_vocabulary"), [STREET, FIELDS], ["town"]),
    ],
)
def test_corpora_are_chosen_by_what_all_models_were_trained_on(
    manifests: list[Manifest], protocol: Protocol, cards: list[Card], expected: list[str]
) -> None:
    asked = ask(protocol, manifests, cards)
    assert [split.manifest.corpus for split in asked] == expected
    assert all(split.questions == (Question(split.manifest.vocabulary),) for split in asked)


def test_synonyms_are_further_questions_with_the_full_vocabulary(manifests: list[Manifest]) -> None:
    protocol = Protocol(synonyms={"street": {"car": ["automobile", "banana"]}, "elsewhere": {"sky": ["heaven"]}})
    street, fields, _ = ask(protocol, manifests, [STREET], {"fields": {"crop": ["plant"]}}, oracle=True)
    assert [question.names for question in street.questions] == [
        ("Road", "car"),
        ("Road", "automobile"),
        ("Road", "banana"),
    ]
    assert fields.renamings == (("crop", "plant"),)
    assert all(question.oracle for question in street.questions)
    with pytest.raises(DigSegError, match=r"corpus 'felds' is not among those evaluated; did you mean 'fields'"):
        ask(Protocol(), manifests, [STREET], {"felds": {"crop": ["plant"]}})


def test_a_protocol_without_a_corpus_says_what_it_wanted(manifests: list[Manifest]) -> None:
    with pytest.raises(DigSegError, match=r"'cross domain'.*none of street/val .*a corpus never trained on"):
        ask(find_protocol("cross_domain"), manifests[:1], [STREET])
    with pytest.raises(DigSegError, match="does not say what it was trained on"):
        ask(find_protocol("supervised"), manifests, [Card(("road",))])


def test_protocols_are_found_by_name_or_file(tmp_path: Path) -> None:
    assert {find_protocol(path.stem).name for path in PROTOCOLS.glob("*.yaml")} == {
        "supervised",
        "open vocabulary",
        "cross domain",
        "synonyms",
    }
    own = tmp_path / "mine.yaml"
    own.write_text("name: mine\ncorpora: trained\n")
    assert find_protocol(str(own)) == Protocol(name="mine", corpora="trained")
    with pytest.raises(DigSegError, match="'superwised'; did you mean 'supervised'"):
        find_protocol("superwised")
    own.write_text("corpora: some\nunseen: true\n")
    with pytest.raises(DigSegError, match=r"(?s)mine.yaml.*corpora: got 'some'.*unseen: unknown key.*'unseen_classes'"):
        find_protocol(str(own))
