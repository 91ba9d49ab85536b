"""The folders of a Portico home (`--data`): who owns which, where the sockets are, what is copied.

    HOME/                root or the user; 0711 as root (the servers' account passes through), else 0700
      credentials.json   0600
      conf/              what the servers read and may not change (pg_hba.conf, pg_ident.conf)
      dist/              copies of server programs, only when their install folder cannot be reached
      logs/              server logs
      run/               locks and sockets
      pg/, valkey/       owned by the servers' account

As root nothing is ever opened for writing inside a folder of the servers' account: a symbolic link planted there would
otherwise turn into a write by root.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from portico.embedded.accounts import Account, barrier
from portico.errors import Problem

#: ``sun_path`` holds 108 bytes with its final NUL; a longer path is refused by ``bind``.
SOCKET_PATH_MAX_BYTES = 107


def make_home(home: Path, account: Account | None) -> Path:
    """Make the home folder and its fixed children; refuses one that we cannot write or ``account`` cannot reach.

    Raises ``up.data_unusable`` with one line that names the folder at fault.
    """
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        home.mkdir(mode=mode, parents=True, exist_ok=True)
        home = home.resolve()
        blocked = barrier(home, account)
        if blocked is not None and account is not None:
            raise Problem(
                "up.data_unusable",
                f"{account.name}, the account that runs the database for root, cannot reach {home} (at {blocked})",
            )
        for name in ("conf", "logs", "run"):
            own_folder(home / name, mode)
    except OSError as err:
        raise Problem(
            "up.data_unusable", f"cannot use the data folder {home}: {err.strerror}: {err.filename}"
        ) from None
    if not os.access(home, os.W_OK | os.X_OK):
        raise Problem("up.data_unusable", f"cannot write to the data folder {home}")
    return home


def own_folder(path: Path, mode: int) -> Path:
    """A folder of our own with exactly ``mode``, whatever the umask."""
    path.mkdir(exist_ok=True)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)
    return path


def server_folder(path: Path, account: Account | None, mode: int = 0o700) -> Path:
    """A folder that belongs to the servers' account. Its parent must be ours, so that nobody can swap it meanwhile."""
    own_folder(path, mode)
    if account is not None and path.stat().st_uid != account.uid:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)
    return path


class SocketFolder:
    """The folder of one server's Unix socket: under ``HOME/run`` when the path is short enough, else a private one
    under the run or temp folder, whose path is stored so that other processes and the next start find it."""

    def __init__(self, home: Path, name: str, file_name: str) -> None:
        self._preferred = home / "run" / name
        self._stored = home / "run" / f"{name}.path"
        self._file_name = file_name

    @property
    def path(self) -> Path:
        """Where the socket's folder is (or would be, before :meth:`make`)."""
        try:
            return Path(self._stored.read_text(encoding="utf-8").strip())
        except OSError:
            return self._preferred

    def make(self, account: Account | None) -> Path:
        """Make sure that the folder exists and is the server's alone. Raises ``up.data_unusable``."""
        if self._fits(self._preferred):
            self._stored.unlink(missing_ok=True)
            return server_folder(self._preferred, account)
        owner = os.geteuid() if account is None else account.uid
        if self._stored.exists() and _is_private(self.path, owner):
            return self.path
        for base in _short_bases():
            if barrier(base, account) is None and self._fits(base / "portico-00000000"):
                folder = Path(tempfile.mkdtemp(prefix="portico-", dir=base))
                if account is not None:
                    os.chown(folder, account.uid, account.gid)
                self._stored.write_text(f"{folder}\n", encoding="utf-8")
                return folder
        raise Problem(
            "up.data_unusable", f"no folder for sockets is short enough ({SOCKET_PATH_MAX_BYTES} bytes at most)"
        )

    def remove(self) -> None:
        """Remove the folder, when its server has removed its socket, and what is stored about it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._stored.unlink(missing_ok=True)

    def _fits(self, folder: Path) -> bool:
        return len(os.fsencode(folder / self._file_name)) <= SOCKET_PATH_MAX_BYTES


def _short_bases() -> list[Path]:
    # Not XDG_RUNTIME_DIR: it is emptied when the user's last session ends, under a server that still runs.
    bases = [Path("/run")] if os.geteuid() == 0 else []
    return [base for base in (*bases, Path(tempfile.gettempdir()), Path("/tmp")) if os.access(base, os.W_OK)]  # noqa: S108 - mkdtemp inside


def _is_private(folder: Path, owner: int) -> bool:
    """A stored folder may have been removed and made again by somebody else: only a private one of ours is reused."""
    try:
        info = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == owner and stat.S_IMODE(info.st_mode) == 0o700


def temp_home(prefix: str = "portico-home-") -> Path:
    """A new, empty home under the temp folder that the servers' account can reach, also as root."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
    return folder


def copy_once(sources: list[Path], target: Path) -> Path:
    """Copy program files side by side into ``target`` (all or nothing, once); for installs that cannot be reached."""
    if not target.exists():
        own_folder(target.parent, 0o711)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        try:
            for source in sources:
                _copy(source, partial / source.name)
            partial.chmod(0o755)
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            if not target.exists():
                raise
    return target


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(
            source, target, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a", "pkgconfig", "*.py")
        )
    else:
        shutil.copy2(source, target)
        target.chmod(0o755)
