"""Which settings each process of a deployment reads; what a deployment may and must give it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path

from portico import settings

ROOT = Path(__file__).resolve().parents[2]

#: Of each command: the settings classes that its process loads.
CLASSES: dict[str, tuple[type, ...]] = {
    "api": (settings.ApiSettings,),
    "relay": (settings.RelaySettings,),
    "worker": (settings.WorkerSettings, settings.ApiSettings),
    "migrate": (settings.MigrateSettings,),
    "admin": (settings.ApiSettings,),
}


def keys(command: str) -> set[str]:
    return {field.name for cls in CLASSES[command] for field in dataclasses.fields(cls)}


def secrets(command: str) -> set[str]:
    """Those that are secrets."""
    return {
        key for cls in CLASSES[command] for key, kind in typing.get_type_hints(cls).items() if settings.is_secret(kind)
    }


def required(command: str) -> set[str]:
    """Those without which it does not start."""
    return {
        field.name
        for cls in CLASSES[command]
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }


def check_variables(command: str, names: Iterable[str]) -> None:
    """Every variable is a setting of that process, and no secret stands in the open."""
    hidden = secrets(command)
    allowed = {f"PORTICO_{key.upper()}" for key in keys(command) - hidden} | {
        f"PORTICO_{key.upper()}_FILE" for key in hidden
    }
    unknown = set(names) - allowed
    assert not unknown, f"{command} does not take {', '.join(sorted(unknown))}"


def default(command: str, key: str) -> object:
    """What a setting is when nothing sets it."""
    return next(field.default for cls in CLASSES[command] for field in dataclasses.fields(cls) if field.name == key)
