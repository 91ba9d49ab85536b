"""YAML or JSON text as a plain value, with the line and column of everything in it.

    load(text) ──► value, marks {path: place}, faults [(path, message)]

Paths are those of :mod:`portico.wire.policy_check`: ``addresses.rules[2].allow``. The document is composed, never loaded:
no tag makes an object, an alias is refused (few bytes of them stand for gigabytes), a key that is there twice is a fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from portico.kit.paths import item, member

MAX_DEPTH = 20
MAX_NODES = 10_000

_TAGS = "tag:yaml.org,2002:"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where the wheel has it
_TIGHT = re.compile(r"\.[^.\[\]]*\Z|\[\d+\]\Z")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands; both count from 1."""

    line: int
    column: int


Marks = Mapping[str, Place]


class Unreadable(ValueError):
    """Text that is neither YAML nor JSON; ``place`` is where reading ended."""

    def __init__(self, message: str, place: Place) -> None:
        self.place = place
        super().__init__(message)


@dataclass(slots=True)
class Marked:
    """A value and where its parts stand."""

    value: Any = None
    marks: dict[str, Place] = field(default_factory=dict)
    faults: list[tuple[str, str]] = field(default_factory=list)


def load(text: str) -> Marked:
    """The value of ``text`` (nothing: an empty map). Raises :class:`Unreadable`."""
    found = Marked(value={})
    faults: list[tuple[str, str]] = []
    whole = _json(text, faults)
    try:
        root = _compose(text)
    except Unreadable:
        if whole is None:
            raise
        return Marked(whole, faults=faults)  # YAML has no "\ud83d\ude00": such a text is read, without marks
    if root is not None:
        found.value = _Reading(found).value(root, "")
    if whole is not None:
        found.value = whole
    return found


def of_node(node: yaml.Node) -> Marked:
    """The value of a node of a larger document, whose author may use aliases; they are bounded here."""
    found = Marked()
    found.value = _Reading(found).value(node, "")
    return found


def nearest(marks: Marks, path: str) -> Place | None:
    """Where ``path`` stands, or the innermost thing around it that does."""
    while path and path not in marks:
        shorter = _TIGHT.sub("", path)
        path = shorter if shorter != path else ""
    return marks.get(path)


def _json(text: str, faults: list[tuple[str, str]]) -> Any:
    """What the text is as JSON, ``None`` if it is none; keys that are there twice are put in ``faults``, without their path."""
    if text.lstrip()[:1] != "{":
        return None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        clean = dict(pairs)
        if len(clean) < len(pairs):
            names = [name for name, _ in pairs]
            faults.extend(("", f"the key {name[:80]!a} is there twice") for name in clean if names.count(name) > 1)
        return clean

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None


def _compose(text: str) -> yaml.Node | None:
    if text.lstrip()[:1] == "{":
        text = text.replace("\t", " ")  # JSON may be indented by tabs, YAML not
    try:
        _measure(text)
        return yaml.compose(text, _LOADER)
    except UnicodeEncodeError:
        raise Unreadable("half a character (a lone surrogate) is no text", Place(1, 1)) from None
    except yaml.reader.ReaderError as err:
        before = text[: err.position]
        place = Place(before.count("\n") + 1, err.position - before.rfind("\n"))
        raise Unreadable("a control character has no place here", place) from None
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        place = Place(mark.line + 1, mark.column + 1) if mark is not None else Place(1, 1)
        lines = text.split("\n")
        if place.line > len(lines):  # the end of a text that does not end its last line
            place = Place(len(lines), len(lines[-1]) + 1)
        raise Unreadable(f"not YAML: {err.problem or err.context or 'unreadable'}", place) from None


def _measure(text: str) -> None:
    """Raises :class:`Unreadable` for what composing must not meet: the C composer recurses, and deep text ends the process."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise Unreadable("an alias (*name) has no place here; write it out", _place(event))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise Unreadable(f"nested deeper than {MAX_DEPTH} levels", _place(event))


class _Reading:
    """Makes plain values of nodes and notes where they stand."""

    def __init__(self, found: Marked) -> None:
        self._found = found
        self._depth = self._nodes = 0
        self._plain = yaml.SafeLoader("")

    def value(self, node: yaml.Node, path: str) -> Any:
        self._found.marks.setdefault(path, _place(node))
        self._nodes += 1
        if self._nodes > MAX_NODES or self._depth >= MAX_DEPTH:
            if not self._found.faults:
                self._refuse(path, "is nested too deeply, or holds too much")
            return None
        self._depth += 1
        try:
            return self._any(node, path)
        finally:
            self._depth -= 1

    def _any(self, node: yaml.Node, path: str) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(inner, item(path, index)) for index, inner in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        clean: dict[str, Any] = {}
        for key, inner in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _TAGS + "merge":
                self._refuse(path, "a key must be plain text")
                continue
            at = member(path, key.value)
            if key.value in clean:
                self._refuse(at, f"is there twice; first in line {self._found.marks[at].line}")
            self._found.marks[at] = _place(key)
            clean[key.value] = self.value(inner, at)
        return clean

    def _scalar(self, node: yaml.ScalarNode, path: str) -> Any:
        if node.tag == _TAGS + "timestamp":
            return node.value  # text to everybody who has no type for times
        try:
            return self._plain.construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError):  # `!!bool maybe` and `!!int ''` are look-ups to the library
            return self._refuse(path, "has a tag or a value that means nothing here")

    def _refuse(self, path: str, message: str) -> None:
        self._found.faults.append((path, message))


def _place(node: Any) -> Place:
    """Of a node or an event."""
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)
