"""Which operating-system account runs the embedded servers, and whether it can reach their files.

PostgreSQL refuses to run as root, and a network-facing store should not. As root the servers therefore run as an
unprivileged account that already exists; nothing here ever creates one, or changes the mode of somebody's folder.
"""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portico.errors import Problem

#: In this order: one made for Portico, one made for PostgreSQL, and the one that every system has.
CANDIDATES = ("portico", "postgres", "nobody")


@dataclass(frozen=True, slots=True)
class Account:
    """An account that a server runs as instead of root."""

    name: str
    uid: int
    gid: int

    @property
    def popen(self) -> dict[str, Any]:
        """The arguments of :class:`subprocess.Popen` that switch to it, without any supplementary group."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def server_account(data: Path, *, euid: int | None = None) -> Account | None:
    """The account for the servers: ``None`` (our own) unless we are root.

    An existing data folder keeps its owner, because PostgreSQL refuses a folder of another account; so a
    ``postgres`` account that appears later does not make the cluster of ``nobody`` unusable.
    """
    if (os.geteuid() if euid is None else euid) != 0:
        return None
    if (owner := _owner(data)) not in (None, 0):
        return _by_uid(owner, data)
    for name in CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise Problem("up.no_account", f"as root, none of the accounts {', '.join(CANDIDATES)} exists to run PostgreSQL as")


def _owner(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except OSError:
        return None


def _by_uid(uid: int | None, data: Path) -> Account:
    try:
        entry = pwd.getpwuid(uid or 0)
    except KeyError:
        raise Problem(
            "up.no_account", f"{data} belongs to user id {uid}, which has no account on this machine"
        ) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def own_name() -> str:
    """The name of the account that this process runs as; PostgreSQL's peer check sees exactly this name."""
    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        raise Problem("up.no_account", f"user id {uid} has no account on this machine") from None


def barrier(path: Path, account: Account | None, *, read: bool = False) -> Path | None:
    """The first folder on the way to ``path`` that ``account`` may not pass, or ``None`` when it can reach it.

    With ``read`` the last folder must be readable too. Only mode bits are looked at: an access list that grants more
    is not seen, which errs on the side of a copy or a clear refusal.
    """
    if account is None:
        return None
    resolved = path.resolve()
    for folder in [*reversed(resolved.parents), resolved]:
        need = 0o5 if read and folder == resolved else 0o1
        if not _allows(folder, account, need):
            return folder
    return None


def _allows(folder: Path, account: Account, need: int) -> bool:
    try:
        info = folder.stat()
    except FileNotFoundError:
        return True  # will be made with a fitting mode
    if info.st_uid == account.uid:
        shift = 6
    elif info.st_gid == account.gid:
        shift = 3
    else:
        shift = 0
    return (stat.S_IMODE(info.st_mode) >> shift) & need == need
