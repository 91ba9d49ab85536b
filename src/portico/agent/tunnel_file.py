"""Reading `portico.yml`: the document is composed, not loaded, so that every fault has its line and column.

    files ──compose──► nodes ──the table of tunnel_keys──► Declared tunnels and settings, or all faults at once

Several files are one: a later file's settings go before an earlier one's, and a tunnel of the same name replaces the
earlier one whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from portico.agent import tunnel_keys, tunnel_policy
from portico.agent.tls_files import TlsFiles
from portico.agent.tunnel_keys import Key
from portico.errors import Problem

_TAGS = "tag:yaml.org,2002:"
_SCALARS = frozenset(_TAGS + kind for kind in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value"))
#: Columns of a source line that are shown around a fault.
_SHOWN = 100
#: `<<` in what `<<` names, at most.
_MERGES = 8


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing that is wrong. ``line`` and ``column`` count from 1; 0: the file as a whole."""

    file: str
    line: int
    column: int
    message: str
    source: str = ""
    width: int = 1

    def where(self) -> str:
        """`file:line:column`."""
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    def text(self, color: bool = False) -> str:
        """`file:line:column: message`, then the line itself with a caret below."""
        bold, red, off = ("\x1b[1m", "\x1b[1;31m", "\x1b[0m") if color else ("", "", "")
        head = f"{bold}{self.where()}:{off} {self.message}"
        if not self.line:
            return head
        start = max(0, self.column - 1 - _SHOWN // 2)
        shown = "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in self.source[start : start + _SHOWN])
        pad = "".join("\t" if c == "\t" else " " for c in shown[: self.column - 1 - start])
        carets = "^" * max(1, min(self.width, len(shown) - len(pad)))
        return f"{head}\n{self.line:>5} | {shown}\n      | {pad}{red}{carets}{off}"

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {"file": self.file, "line": self.line, "column": self.column, "message": self.message}


@dataclass(slots=True)
class Declared:
    """One tunnel as a file has it: the values of its keys, and where it stands."""

    name: str
    values: dict[str, Any]
    file: str
    line: int


@dataclass(slots=True)
class Config:
    """What the files say together. ``settings`` are values by key; ``faults`` is empty when all of it can be used."""

    settings: dict[str, Any] = field(default_factory=dict)
    tunnels: dict[str, Declared] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    #: Files that the files name, and that are read with them.
    policy_files: list[Path] = field(default_factory=list)


def read(paths: Sequence[Path], limit: int) -> Config:
    """The files as one, each at most ``limit`` bytes. Raises nothing: what is wrong is in ``faults``, sorted."""
    config = Config()
    for path in paths:
        reader = _Reader(path)
        reader.run(limit)
        config.settings |= reader.settings
        config.tunnels |= reader.tunnels
        config.faults += reader.faults
        config.policy_files += reader.policy_files
    config.faults.sort()
    return config


class _Reader:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.tunnels: dict[str, Declared] = {}
        self.faults: list[Fault] = []
        self._lines: list[str] = []
        self.policy_files: list[Path] = []
        self._subdomains: dict[str, Declared] = {}

    # ── faults ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _fault(self, line: int, column: int, message: str, width: int = 1) -> None:
        source = self._lines[line - 1] if 0 < line <= len(self._lines) else ""
        fault = Fault(str(self.path), line, column, message, source, width)
        if fault not in self.faults:  # what is wrong in a merged map is so for each that merges it
            self.faults.append(fault)

    def _at(self, node: yaml.Node, message: str) -> None:
        start, end = node.start_mark, node.end_mark
        width = end.column - start.column if end.line == start.line else 1
        self._fault(start.line + 1, start.column + 1, message, max(1, width))

    # ── the document ──────────────────────────────────────────────────────────────────────────────────────────────
    def run(self, limit: int) -> None:
        text = self._text(limit)
        if text is None:
            return
        self._lines = text.splitlines()
        root = self._compose(text)
        if root is None:
            if not self.faults:
                self._fault(1, 1, f"the file is empty; it begins with version: {tunnel_keys.VERSION}")
            return
        if not isinstance(root, yaml.MappingNode):
            self._at(root, "the file must be a map of keys, such as version and tunnels")
            return
        found = self._keys(root, tunnel_keys.TOP, "top", "the file", root)
        tunnels = found.pop("tunnels", None)
        self.settings = self._values(found, tunnel_keys.TOP)
        if {"agent_key_env", "agent_key_file"} <= found.keys():
            self._at(found["agent_key_file"], "give agent_key_env or agent_key_file, not both")
        if tunnels is not None:
            self._read_tunnels(tunnels)

    def _text(self, limit: int) -> str | None:
        try:
            with self.path.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as err:
            self._fault(
                0, 0, "does not exist" if isinstance(err, FileNotFoundError) else f"cannot be read: {err.strerror}"
            )
            return None
        if len(data) > limit:
            self._fault(0, 0, f"is larger than {limit} bytes")
            return None
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as err:
            before = data[: err.start]
            self._fault(before.count(b"\n") + 1, err.start - before.rfind(b"\n"), "this byte is not UTF-8 text")
            return None

    def _compose(self, text: str) -> yaml.Node | None:
        try:
            return yaml.compose(text, yaml.SafeLoader)  # nodes, no objects
        except yaml.reader.ReaderError as err:
            before = text[: err.position]
            column = err.position - before.rfind("\n")
            self._fault(before.count("\n") + 1, column, "a control character has no place in this file")
        except yaml.MarkedYAMLError as err:
            mark = (err.context_mark if _is_bare(err) else None) or err.problem_mark or err.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
            self._fault(min(line, max(1, len(self._lines))), column, _syntax(err))
        except RecursionError:
            self._fault(1, 1, "the file is nested too deeply")
        return None

    def _read_tunnels(self, node: yaml.Node) -> None:
        if isinstance(node, yaml.SequenceNode):
            self._at(
                node, "tunnels is a map, not a list: write the name of each tunnel as a key, and its keys below it"
            )
            return
        if not isinstance(node, yaml.MappingNode):
            if node.tag != _TAGS + "null":
                self._at(node, "tunnels must be a map of names")
            return
        for name, key, value in self._pairs(node, "tunnel"):
            try:
                tunnel_keys.check_name(name)
            except ValueError as err:
                self._at(key, f"name of a tunnel: {err}")
            if not isinstance(value, yaml.MappingNode):
                self._at(value, f"tunnel {name!r} must be a map of keys, such as addr: 8000")
                continue
            table = tunnel_keys.keys_of(self._protocol(value))
            found = self._keys(value, table, "tunnel", f"tunnel {name!r}", key)
            declared = Declared(name, self._values(found, table), str(self.path), key.start_mark.line + 1)
            self._take_policy(declared, found, self._protocol(value))
            self.tunnels[name] = declared
            self._check_subdomain(declared, found.get("subdomain"))
            self._check_tls(declared.values, found)

    def _protocol(self, node: yaml.MappingNode) -> str:
        """What kind of tunnel it is: which keys it has depends on that. A fault in it is found later."""
        known = self._merged(node, 0)
        value = next((known[name][1].value for name in ("protocol", "proto", "type") if name in known), "http")
        return value if value in tunnel_keys.PROTOCOLS else "http"

    def _check_subdomain(self, declared: Declared, node: yaml.Node | None) -> None:
        subdomain = declared.values.get("subdomain")
        if subdomain is None or node is None:
            return
        first = self._subdomains.setdefault(subdomain, declared)
        if first is not declared:
            message = f"the subdomain {subdomain!r} is that of tunnel {first.name!r} (line {first.line}) already"
            self._at(node, message)

    def _take_policy(self, declared: Declared, found: dict[str, yaml.Node], protocol: str) -> None:
        """The keys of a policy become one value, ``policy``; with a fault there is none, and nothing runs."""

        def place(file: str, line: int, column: int, message: str, source: str) -> None:
            if not file:
                self._fault(line, column, message)
                return
            self.faults.append(Fault(file, line, column, message, source))

        if "policy_file" in declared.values:
            self.policy_files.append(declared.values["policy_file"])
        document = tunnel_policy.of_tunnel(declared.values, found, protocol, self._at, place)
        declared.values.pop("policy_file", None)
        if document is not None:
            declared.values["policy"] = document

    def _check_tls(self, values: dict[str, Any], found: dict[str, yaml.Node]) -> None:
        """Certificate and key are there together, and belong together."""
        for name, needs in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_alpn", "tls_cert")):
            if name in values and needs not in found:
                self._at(found[name], f"{name}: it needs {needs} beside it")
        if "tls_cert" in values and "tls_key" in values:
            try:
                TlsFiles(values["tls_cert"], values["tls_key"]).load()
            except Problem as problem:
                at = "tls_key" if problem.detail.startswith("tls_key") else "tls_cert"
                self._at(found[at], problem.detail.replace(" ", ": ", 1))

    # ── maps ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _pairs(self, node: yaml.MappingNode, what: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """The entries of a map, `<<` resolved; an entry of its own goes before a merged one."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._at(key, "a key must be plain text")
            elif key.tag == _TAGS + "merge":
                merged = self._merged(value, 0) | merged
            elif key.value in own:
                first = own[key.value][0].start_mark.line + 1
                self._at(key, f"the {what} {key.value!r} is there twice; first in line {first}")
            else:
                own[key.value] = (key, value)
        for name, (key, value) in (merged | own).items():
            yield name, key, value

    def _merged(self, node: yaml.Node, depth: int) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """What `<<: node` brings: the entries of one map, or of several, earlier ones first; own entries before merged ones."""
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode) or depth > _MERGES:
                self._at(source, "<< needs a map to merge, such as <<: *name")
                continue
            own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
            below: dict[str, tuple[yaml.Node, yaml.Node]] = {}
            for key, value in source.value:
                if isinstance(key, yaml.ScalarNode) and key.tag == _TAGS + "merge":
                    below = self._merged(value, depth + 1)
                elif isinstance(key, yaml.ScalarNode):
                    own.setdefault(key.value, (key, value))
            found = below | own | found
        return found

    def _keys(
        self, node: yaml.MappingNode, table: Sequence[Key], level: str, whole: str, where: yaml.Node
    ) -> dict[str, yaml.Node]:
        """The values of the keys that exist; the others are faults, and so are required ones that are not there."""
        known = {key.name: key for key in table}
        found: dict[str, yaml.Node] = {}
        meant: set[str | None] = set()
        for name, at, value in self._pairs(node, "key"):
            if name not in known:
                meant.add(ours := _meant(name, level, known))
                self._at(at, _unknown(name, level, known, ours))
            elif known[name].refusal:
                self._at(at, f"{name}: {known[name].refusal}")
            else:
                found[name] = value
        for key in table:
            if key.required and key.name not in found and key.name not in meant:  # one fault is enough
                self._at(
                    where, f"{whole} has no {key.name}{f'; write {key.name}: {key.example}' if key.example else ''}"
                )
        return found

    def _values(self, found: dict[str, yaml.Node], table: Sequence[Key]) -> dict[str, Any]:
        known = {key.name: key for key in table}
        values: dict[str, Any] = {}
        for name, node in found.items():
            try:
                values[name] = self._value(known[name], node)
            except ValueError as err:
                self._at(node, f"{name}: {err}")
        return values

    def _value(self, key: Key, node: yaml.Node) -> Any:
        if key.shape == "map":
            if not isinstance(node, yaml.MappingNode):
                raise ValueError("must be a map")
            return node
        if key.shape == "many":
            if isinstance(node, yaml.SequenceNode):
                return [self._one(key, inner) for inner in node.value]
            return [self._one(key, node)]
        return self._one(key, node)

    def _one(self, key: Key, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a map"
            raise ValueError(f"must be one value ({key.kind}), not {kind}")
        if node.tag not in _SCALARS:
            raise ValueError(f"the tag {node.tag} means nothing here")
        if node.tag == _TAGS + "null":
            raise ValueError(f"has no value ({key.kind})")
        if node.tag == _TAGS + "bool" and not key.kind.endswith("switch"):
            raise ValueError(f"YAML reads {node.value} as true or false; put it in quotes")
        # The text as it was typed: YAML would read 22:22 as a number of minutes, and 0123 as octal.
        return key.read(node.value, self.path.parent.absolute())


def _meant(name: str, level: str, known: dict[str, Key]) -> str | None:
    """The key that ``name`` probably stands for: what other tunnels call so, or one that is spelled like it."""
    if name in tunnel_keys.OTHER_NAMES[level]:
        return tunnel_keys.OTHER_NAMES[level][name]
    close = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1, 0.6)
    return close[0] if close else None


def _unknown(name: str, level: str, known: dict[str, Key], meant: str | None) -> str:
    """What to say to a key that does not exist."""
    if level == "top" and name in tunnel_keys.UNNEST:
        return f"unknown key {name!r}: {tunnel_keys.UNNEST[name]}"
    if meant is None:
        names = ", ".join(key.name for key in known.values() if not key.refusal)
        return f"unknown key {name[:60]!r}; there are: {names}"
    if known[meant].refusal and not known[meant].only:
        return f"unknown key {name[:60]!r}: {known[meant].refusal}"
    return f"unknown key {name[:60]!r}; did you mean {meant!r}?"


def _is_bare(err: yaml.MarkedYAMLError) -> bool:
    """Text that stands where a key must stand; the parser notices it only in the next line."""
    return str(err.problem).startswith("could not find expected ':'")


def _syntax(err: yaml.MarkedYAMLError) -> str:
    problem = str(err.problem or err.context or "this is not YAML")
    if "'\\t'" in problem:
        return "a tab cannot indent YAML; use spaces"
    if problem.startswith("mapping values are not allowed"):
        return (
            "no key is expected here: check the indentation and the line before, or put a value with a colon in quotes"
        )
    if _is_bare(err):
        return "a key needs a colon and a space behind it"
    return f"this is not YAML: {problem}"
