"""Values of a settings class: from overrides over the environment over a file over its defaults, each converted and checked."""

from __future__ import annotations

import dataclasses
import os
import stat
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from portico.errors import Problem
from portico.settings.secrets import (
    Secret,
    check_private,
    environment_secret,
    holds_secret,
    is_secret,
    refusal,
    secret_from,
)

T = TypeVar("T")


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
        if not raw:
            raise refusal(key, "is empty")
        return raw if isinstance(raw, Secret) else Secret(str(raw))
    if kind is Path:
        return Path(raw).expanduser()
    if kind is bool:
        if isinstance(raw, bool):
            return raw
        if isinstance(raw, str) and raw.lower() in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return raw.lower() in ("1", "true", "yes", "on")
        raise refusal(key, f"{raw!r} is not true or false")
    if kind in (int, float):
        if isinstance(raw, bool):
            raise refusal(key, f"{raw!r} is not a number")
        try:
            return kind(raw)
        except (TypeError, ValueError):
            raise refusal(key, f"{raw!r} is not a number") from None
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


def _table_values(
    cls: type, hints: Mapping[str, Any], file: Path, table: str, environ: Mapping[str, str]
) -> dict[str, Any]:
    """The converted values of one table; raises ``config.invalid``."""
    keys = {f.name for f in dataclasses.fields(cls)}
    secret = {key for key in keys if is_secret(hints[key])}
    found = read_table(file, table)
    for key in found:
        if key not in keys and not (key.endswith("_file") and key.removesuffix("_file") in secret):
            raise refusal(key, f"unknown key in [{table}] of {file}; known keys: {', '.join(sorted(keys))}")
    values = {key: _convert(key, raw, hints[key]) for key, raw in found.items() if key in keys}
    for key in secret & found.keys():
        if holds_secret(str(found[key])):
            check_private(f"setting {key}", file, stat.S_IMODE(file.stat().st_mode), environ)
    for key in secret:
        if named := found.get(f"{key}_file"):
            sources = {key: found.get(key), f"{key}_file": file.parent / Path(str(named)).expanduser()}
            values[key] = secret_from(sources, environ)
    return values


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
        values = _table_values(cls, hints, file, table, environ)
    for key in fields:
        name = f"PORTICO_{key.upper()}"
        raw = environment_secret(key, environ) if is_secret(hints[key]) else environ.get(name)
        if raw is not None:
            values[key] = _convert(name, raw, hints[key])
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
        name = f"PORTICO_{missing[0].upper()}"
        more = f", or {name}_FILE to a file that holds it" if is_secret(hints[missing[0]]) else ""
        raise refusal(missing[0], f"is required; set {name}{more}")
    return cls(**values)
