"""Files of secrets in the data folder: mode 0600 from their first byte, whole or not at all."""

from __future__ import annotations

import base64
import json
import os
import secrets
from pathlib import Path
from typing import Any

from portico.embedded.postgres import fsync_folder
from portico.errors import Problem

CREDENTIALS = "credentials.json"
MASTER_KEY = "master.key"


def write_private(path: Path, text: str) -> None:
    """Replace ``path`` atomically and durably; nobody else can read it at any moment."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_folder(path.parent)


def master_key(home: Path) -> str:
    """The platform's own key for stored secrets (32 random bytes, base64url), made at the first start."""
    path = home / MASTER_KEY
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        key = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
        write_private(path, key + "\n")
        return key
    except (OSError, ValueError) as err:
        raise Problem("up.data_unusable", f"cannot read {path}: {err}") from None


def read_credentials(home: Path) -> dict[str, Any]:
    """What ``credentials.json`` holds; empty when there is none or it is damaged (it is then written anew)."""
    try:
        found = json.loads((home / CREDENTIALS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_credentials(home: Path, values: dict[str, Any]) -> Path:
    """Write ``credentials.json``; returns its path."""
    path = home / CREDENTIALS
    write_private(path, json.dumps(values, indent=2) + "\n")
    return path
