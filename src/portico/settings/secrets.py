"""Secrets: a type that prints masked, and the files that they come from.

A secret NAME can come from a file of its own: ``PORTICO_NAME_FILE`` in the environment, ``name_file`` in ``portico.toml``,
or a systemd credential called ``name``. Two sources of one layer are refused, and so is a file that others may read.
"""

from __future__ import annotations

import os
import stat
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from portico.errors import Problem


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


def refusal(key: str, what: str) -> Problem:
    """What refuses the value of one setting."""
    return Problem("config.invalid", f"setting {key}: {what}", key=key)


#: Bytes of a file that holds one secret; a private key of any kind fits.
SECRET_FILE_MAX_BYTES = 65_536
#: Where container engines mount secrets: its modes are theirs, and nobody else is in there.
_CONTAINER_SECRETS = Path("/run/secrets")


def is_secret(kind: Any) -> bool:
    """Whether a setting of this type (`Secret`, `Secret | None`) can come from a file."""
    return kind is Secret or Secret in typing.get_args(kind)


def mounted_secret(path: Path, environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``path`` lies where a container engine or systemd mounts secrets: its mode is theirs to choose."""
    environ = os.environ if environ is None else environ
    folders = [_CONTAINER_SECRETS, *(Path(text) for text in [environ.get("CREDENTIALS_DIRECTORY")] if text)]
    return any(folder in path.absolute().parents for folder in folders)


def check_private(what: str, path: Path, mode: int, environ: Mapping[str, str] | None = None) -> None:
    """Raise ``config.invalid`` when others than owner and group may read or write ``path`` (a group is set on purpose)."""
    environ = os.environ if environ is None else environ
    if not hasattr(os, "geteuid"):  # elsewhere modes say nothing
        return
    if mode & 0o006 and not mounted_secret(path, environ):
        kind = "read" if mode & 0o004 else "written"
        advice = f"Run: chmod 600 {path} (or 640, for a group). If others had access, replace the secret too."
        raise Problem("config.invalid", f"{what}: {path} can be {kind} by every user", hint=advice)


def secret_in_file(what: str, path: Path, environ: Mapping[str, str] | None = None) -> Secret:
    """The secret that ``path`` holds alone, without the newline at its end; ``what`` names the setting in refusals.

    Raises ``config.invalid`` when it cannot be read, is empty, is too long, or can be read by every user of the machine.
    """
    path = path.expanduser()
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(SECRET_FILE_MAX_BYTES + 1)
        text = data.decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as err:
        why = getattr(err, "strerror", None) or "it is not text"
        raise Problem("config.invalid", f"{what}: {path} cannot be read: {why}") from None
    check_private(what, path, mode, environ)
    if not text.strip() or "\0" in text:
        raise Problem("config.invalid", f"{what}: {path} is empty")
    if len(data) > SECRET_FILE_MAX_BYTES:
        raise Problem("config.invalid", f"{what}: {path} is longer than {SECRET_FILE_MAX_BYTES} bytes")
    return Secret(text)


def secret_file_variables(*classes: type) -> set[str]:
    """The variables that name files of secrets of these settings classes."""
    return {
        f"PORTICO_{key.upper()}_FILE"
        for cls in classes
        for key, kind in typing.get_type_hints(cls).items()
        if is_secret(kind)
    }


def secret_from(sources: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
    """The secret of the only source that is given (a text, or a path to it); ``None`` without one."""
    given = {name: value for name, value in sources.items() if value not in (None, "")}
    if len(given) > 1:
        raise refusal(next(iter(given)), f"is given twice: {' and '.join(given)}; keep one")
    for name, value in given.items():
        return secret_in_file(f"setting {name}", value, environ) if isinstance(value, Path) else value
    return "" if "" in sources.values() else None


def environment_secret(key: str, environ: Mapping[str, str]) -> Any:
    """The secret that the environment gives for a setting: its variable, a file that one names, or a credential of systemd."""
    name = f"PORTICO_{key.upper()}"
    sources: dict[str, Any] = {name: environ.get(name)}
    if file := environ.get(f"{name}_FILE"):
        sources[f"{name}_FILE"] = Path(file)
    if folder := environ.get("CREDENTIALS_DIRECTORY"):
        credential = Path(folder) / key
        sources[f"the credential {key}"] = credential if credential.is_file() else None
    return secret_from(sources, environ)


def holds_secret(text: str) -> bool:
    """Whether a value that may be secret is one: a URL without a password is not."""
    try:
        url = urlsplit(text)
        return not (url.scheme and (url.netloc or url.path.startswith("/"))) or url.password is not None
    except ValueError:
        return True
