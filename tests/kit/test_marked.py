"""YAML and JSON with marks: values as the text has them, places of everything, nothing that makes objects or ends the process."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from portico.kit import marked
from portico.kit.marked import Place

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_-", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(params=["CSafeLoader", "SafeLoader"])
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both parsers: wheels without libyaml have the second alone."""
    monkeypatch.setattr(marked, "_LOADER", getattr(yaml, request.param))


@pytest.mark.usefixtures("loader")
class TestLoad:
    def test_places(self) -> None:
        found = marked.load("a: 1\nb:\n  - {c: x}\n  - d\n")
        assert found.value == {"a": 1, "b": [{"c": "x"}, "d"]} and found.faults == []
        assert found.marks == {
            "": Place(1, 1), "a": Place(1, 1), "b": Place(2, 1), "b[0]": Place(3, 5), "b[0].c": Place(3, 6), "b[1]": Place(4, 5),
        }  # fmt: skip

    def test_nearest(self) -> None:
        marks = marked.load("a:\n  b: [1]\n").marks
        assert marked.nearest(marks, "a.b[7].c") == Place(2, 3)
        assert marked.nearest(marks, "x.y") == Place(1, 1) and marked.nearest({}, "x.y") is None

    @pytest.mark.parametrize("text", ["", "  \n", "# a comment\n", "---\n"])
    def test_nothing_is_an_empty_map(self, text: str) -> None:
        assert marked.load(text).value in ({}, None)

    @pytest.mark.parametrize(
        ("text", "line", "column"),
        [
            ("a: 'x", 1, 6), ("a: b: c", 1, 5), ("a: [1, 2\nb: 3", 2, 2), ("\tk: 1", 1, 1), ("a\x07: 1", 1, 2),
            ("a: &x 1\nb: *x", 2, 4), ("[" * 30_000, 1, 21), ("{" * 30_000, 1, 21), ("- " * 5000, 1, 41),
            ("a: 1\n---\nb: 2", 2, 1), ("a: \ud800", 1, 1),
        ],
    )  # fmt: skip
    def test_unreadable(self, text: str, line: int, column: int) -> None:
        with pytest.raises(marked.Unreadable) as caught:
            marked.load(text)
        if text[0] != "a" or "\ud800" not in text:  # the two parsers find half a character in different places
            assert caught.value.place == Place(line, column)

    @pytest.mark.parametrize(
        ("text", "path"),
        [
            ("a: 1\na: 2", "a"), ("a: !!python/object:os.system x", "a"), ("? [a]\n: 1", ""), ("<<: {a: 1}", ""),
            ("a: " + "9" * 5000, "a"), ('{"a": 1, "a": 2}', "a"),
        ],
    )  # fmt: skip
    def test_faults(self, text: str, path: str) -> None:
        assert [at for at, _ in marked.load(text).faults] == [path]

    @pytest.mark.parametrize(
        "text", ["!!bool maybe", "!!int ''", "!!int _", "!!float ''", "!!float _", "!!binary ä", "!!x 1"]
    )
    def test_tags_whose_value_is_none_of_theirs(self, text: str) -> None:
        found = marked.load(f"concurrency: {text}")
        assert found.faults == [("concurrency", "has a tag or a value that means nothing here")]

    def test_a_key_twice_where_only_json_can_be_read(self) -> None:
        found = marked.load(r'{"a": {"b": 1, "b": 2}, "c": "\ud83d\ude00"}')
        ((_, message),) = found.faults  # the slow parser reads it as YAML, too, and has a path
        assert "is there twice" in message

    def test_a_date_is_text(self) -> None:
        assert marked.load("a: 2001-01-01").value == {"a": "2001-01-01"}

    def test_json_with_tabs_and_two_halves_of_a_character(self) -> None:
        found = marked.load('{\n\t"a": "\\/",\n\t"b": [1]}')
        assert found.value == {"a": "/", "b": [1]} and found.marks["b[0]"] == Place(3, 8)
        assert marked.load('{"a": "\\ud83d\\ude00"}').value == {"a": "\U0001f600"}

    @given(st.dictionaries(st.text("abc_-", min_size=1), JSON, max_size=4))
    def test_json_is_read_as_json(self, document: dict[str, Any]) -> None:
        for text in (json.dumps(document), json.dumps(document, indent="\t", ensure_ascii=False)):
            assert marked.load(text).value == document

    @given(st.text(max_size=60))
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        try:
            marked.load(text)
        except marked.Unreadable as err:
            assert err.place.line >= 1 and err.place.column >= 1
