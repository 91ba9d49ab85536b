"""Settings: frozen values per process, from the command line over the environment over a file over defaults.

A settings class is a frozen dataclass; its field names are the keys of its table in ``portico.toml`` and, upper-cased
behind ``PORTICO_``, its environment variables. An unknown key in the file, or a value of the wrong type, refuses with the
key's name. No module but this one reads the environment.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from portico.errors import Problem

T = TypeVar("T")


class Secret:
    """A value that prints masked. ``reveal()`` is the only way to the text."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


def _refuse(key: str, what: str) -> Problem:
    return Problem("config.invalid", f"setting {key}: {what}", key=key)


def _convert(key: str, raw: Any, kind: Any) -> Any:
    """``raw`` (a string from the environment, or a TOML value) as ``kind``; raises ``config.invalid``."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        options = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if raw is None or raw == "" else _convert(key, raw, options[0])
    if origin is tuple:
        items = [part.strip() for part in raw.split(",") if part.strip()] if isinstance(raw, str) else list(raw)
        return tuple(_convert(key, item, typing.get_args(kind)[0]) for item in items)
    if kind is Secret:
        return raw if isinstance(raw, Secret) else Secret(str(raw))
    if kind is Path:
        return Path(raw).expanduser()
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, str) and raw.lower() in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return raw.lower() in ("1", "true", "yes", "on")
        raise _refuse(key, f"{raw!r} is not true or false")
    if kind in (int, float):
        if isinstance(raw, bool):
            raise _refuse(key, f"{raw!r} is not a number")
        try:
            return kind(raw)
        except (TypeError, ValueError):
            raise _refuse(key, f"{raw!r} is not a number") from None
    if kind is str:
        return str(raw)
    raise TypeError(f"setting {key} has an unsupported type {kind!r}")


def read_table(path: Path, table: str) -> dict[str, Any]:
    """One table of a ``portico.toml``; raises ``config.invalid`` with the parser's line when it is not TOML."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem("config.invalid", f"settings file {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise Problem("config.invalid", f"settings file {path}: {err}") from None
    found = document.get(table, {})
    if not isinstance(found, dict):
        raise Problem("config.invalid", f"settings file {path}: [{table}] is not a table")
    return found


def load(
    cls: type[T],
    *,
    table: str | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> T:
    """An instance of the frozen dataclass ``cls``: overrides that are not ``None``, then environment, file, defaults.

    Raises ``config.invalid`` for an unknown key, a wrong type, or a missing value without default.
    """
    environ = os.environ if environ is None else environ
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    if file is not None and table is not None:
        for key, raw in read_table(file, table).items():
            if key not in fields:
                raise _refuse(key, f"unknown key in [{table}] of {file}; known keys: {', '.join(sorted(fields))}")
            values[key] = _convert(key, raw, hints[key])
    for key in fields:
        if (raw := environ.get(f"PORTICO_{key.upper()}")) is not None:
            values[key] = _convert(f"PORTICO_{key.upper()}", raw, hints[key])
    for key, raw in (overrides or {}).items():
        if key not in fields:
            raise TypeError(f"{cls.__name__} has no setting {key!r}")
        if raw is not None:
            values[key] = _convert(key, raw, hints[key])
    missing = [
        key
        for key, f in fields.items()
        if key not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise _refuse(missing[0], f"is required; set PORTICO_{missing[0].upper()}")
    return cls(**values)
