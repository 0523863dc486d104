"""Classes as users write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from digseg.errors import DigSegError
from digseg.evaluation.classes import ClassQuery, check_classes, parse_classes, read_classes


def test_synonyms_follow_the_name() -> None:
    assert parse_classes(" road = street|country  lane, car ") == [
        ClassQuery("road", ("street", "country lane")),
        ClassQuery("car"),
    ]
    assert parse_classes("  ") == []


def test_a_file_of_classes_is_read_and_so_is_a_legend(tmp_path: Path) -> None:
    expected = [ClassQuery("car"), ClassQuery("road", ("street",))]
    written = tmp_path / "classes.yaml"
    written.write_text("classes:\n  - car\n  - {name: road, synonyms: [street]}\n")
    assert read_classes(written) == expected
    legend = tmp_path / "legend.json"
    entries = [{"id": n, "name": q.name, "synonyms": list(q.synonyms), "share": 0.5} for n, q in enumerate(expected)]
    legend.write_text(json.dumps({"image": "a.png", "classes": entries}))
    assert read_classes(legend) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("car", "expected a list under the key 'classes'"),
        ("classes: car", "expected a list under the key 'classes'"),
        ("classes: [car, 3]", "entry 2: expected a name"),
        ("classes: [{name: car, synonyms: auto}]", "entry 1: expected a name"),
        ("classes: [", "neither YAML nor JSON"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(content)
    with pytest.raises(DigSegError, match=message):
        read_classes(path)


def test_background_is_added_once() -> None:
    assert [query.name for query in check_classes(["road"], background=True)] == ["background", "road"]
    assert [query.name for query in check_classes(["road", "Background"], background=True)] == ["road", "Background"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("", "no classes given"),
        ("road,,car", "class 2 of 3 is an empty name"),
        ("road=street|, car", "class 'road' has an empty synonym"),
        ("road, car, Road", "given twice: road"),
        ("road=street, lane=Street", "given twice: street"),
    ],
)
def test_what_cannot_be_asked_is_refused(classes: str, message: str) -> None:
    with pytest.raises(DigSegError, match=message):
        check_classes(parse_classes(classes))


def test_more_classes_than_ids_are_refused() -> None:
    with pytest.raises(DigSegError, match="65536 classes, but a mask has ids for 65535"):
        check_classes([f"kind {number}" for number in range(65536)])
