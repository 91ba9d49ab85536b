"""The sign-in of this machine: ``credentials.json`` in the config folder, mode 0600 in a folder of mode 0700."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from portico.errors import Problem
from portico.settings import AgentSettings, Secret

FILE = "credentials.json"
DEFAULT_SERVER = "http://127.0.0.1:7000"


@dataclass(frozen=True, slots=True)
class Credentials:
    """One API and the agent key for it."""

    server: str
    agent_key: Secret
    account: str = ""
    #: Whether the key was made for this machine by its own sign-in; a key that somebody pasted belongs to others too.
    own_key: bool = False


def read(folder: Path) -> Credentials | None:
    """What ``portico login`` stored, or ``None``; raises ``config.invalid`` for a file that is not its own."""
    path = folder / FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        own_key = body.get("own_key") is True
        return Credentials(str(body["server"]), Secret(str(body["agent_key"])), str(body.get("account", "")), own_key)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise Problem("config.invalid", f"{path} cannot be read ({err.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise Problem("config.invalid", f"{path} is damaged", hint="Sign in again with: portico login") from None


def write(folder: Path, credentials: Credentials) -> Path:
    """Store whole or not at all; nobody else can read it at any moment."""
    path = folder / FILE
    body = {
        "server": credentials.server,
        "agent_key": credentials.agent_key.reveal(),
        "account": credentials.account,
        "own_key": credentials.own_key,
    }
    temporary = folder / f".{FILE}.{secrets.token_hex(4)}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(body, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as err:
        raise Problem("config.invalid", f"{path} cannot be written ({err.strerror})") from None
    return path


def remove(folder: Path) -> bool:
    """Forget the sign-in; whether there was one."""
    try:
        (folder / FILE).unlink()
    except FileNotFoundError:
        return False
    return True


def current(settings: AgentSettings) -> Credentials:
    """The sign-in to use: settings (command line, environment, file) before the stored one; raises ``auth.not_logged_in``.

    A stored key is never sent to another server than its own.
    """
    from portico.agent.api import server_url

    if settings.agent_key:
        stored = None if settings.server else read(settings.config_dir)
        server = settings.server or (stored.server if stored is not None else DEFAULT_SERVER)
        return Credentials(server_url(server), settings.agent_key)
    stored = read(settings.config_dir)
    if stored is None:
        raise Problem("auth.not_logged_in", "this machine is not signed in")
    if settings.server and server_url(settings.server) != server_url(stored.server):
        raise Problem(
            "auth.not_logged_in",
            f"this machine is signed in to {stored.server}, not to {server_url(settings.server)}",
            hint=f"Sign in there with: portico login --server {settings.server}",
        )
    return Credentials(server_url(stored.server), stored.agent_key, stored.account)
