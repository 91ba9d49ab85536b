"""A running `portico start` follows its files: what they say becomes what runs, and a broken file changes nothing.

Files are looked at by their times, sizes and inodes (an editor that renames a new file over the old one is seen too) and
read once they have been the same for two looks, so that a file that is still being written is not taken for a shorter one.
SIGHUP reads them at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portico.agent.app import TunnelOptions
from portico.agent.tls_files import TlsFiles
from portico.agent.tunnel_file import Config, Declared, read
from portico.settings import AgentSettings

if TYPE_CHECKING:
    from portico.agent.fleet import Fleet


def tunnel_options(declared: Declared) -> TunnelOptions:
    """A tunnel of a file as the agent takes it."""
    values = declared.values
    spec: dict[str, Any] = {"name": declared.name, "protocol": values.get("protocol", "http")}
    spec |= {key: values[key] for key in ("subdomain", "domain", "remote_port", "policy") if key in values}
    tls, target = None, values["addr"]
    if "tls_cert" in values:
        tls = TlsFiles(values["tls_cert"], values["tls_key"], values.get("tls_alpn", ()))
        target = replace(target, tls=False)
    return TunnelOptions(
        target,
        spec,
        tls_verify=values.get("target_tls_verify"),
        ttl=values.get("ttl"),
        proxy_protocol=values.get("proxy_protocol", 0),
        tls=tls,
        inspect=values.get("inspect", True),
    )


Mark = tuple[tuple[int, int, int] | None, ...]


class FileSource:
    """The tunnels of some files: those of ``names``, or all."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str] | None, limit: int) -> None:
        self.paths = list(paths)
        self.names = names
        #: The mark of what was read last.
        self.seen: Mark = ()
        self._limit = limit
        self._named: list[Path] = []  # policy files

    def read(self) -> Config:
        """What the files say now; faults are in it."""
        self.seen = self.mark()
        config = read(self.paths, self._limit)
        if config.policy_files != self._named:
            self._named = config.policy_files
            self.seen = (*self.seen[: len(self.paths)], *map(_mark, self._named))
        return config

    def wanted(self, config: Config) -> dict[str, TunnelOptions]:
        """The tunnels to run, by name, in the files' order."""
        chosen = config.tunnels if self.names is None else [name for name in self.names if name in config.tunnels]
        return {name: tunnel_options(config.tunnels[name]) for name in chosen}

    def mark(self) -> Mark:
        """Something that differs when a file was changed or replaced."""
        return tuple(_mark(path) for path in (*self.paths, *self._named))


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return (info.st_mtime_ns, info.st_ino, info.st_size)


class Follower:
    """Keeps a fleet at what its source says, from what ``first`` read."""

    def __init__(self, source: FileSource, first: Config, fleet: Fleet, settings: AgentSettings) -> None:
        self._source = source
        self._fleet = fleet
        self._seconds = settings.config_poll_seconds
        self._settings_then: Mapping[str, Any] = first.settings
        self._hung_up = asyncio.Event()
        self._terminal = _has_terminal()

    def hang_up(self) -> bool:
        """SIGHUP: read the files; ``False`` when it came because the terminal went away."""
        if self._terminal and not _has_terminal():
            return False
        self._hung_up.set()
        return True

    async def run(self) -> None:
        """Follow until cancelled."""
        before = self._source.seen
        while True:
            try:
                await asyncio.wait_for(self._hung_up.wait(), self._seconds)
            except TimeoutError:
                pass
            mark = self._source.mark()
            asked = self._hung_up.is_set()
            if asked or (mark != self._source.seen and mark == before):
                self._hung_up.clear()
                await self._reload(asked)
            before = mark

    async def _reload(self, asked: bool) -> None:
        events = self._fleet.events
        config = await asyncio.to_thread(self._source.read)
        if config.faults:
            first, more = config.faults[0], len(config.faults) - 1
            rest = f" (and {more} more: portico config check)" if more else ""
            events.warning(f"{first.where()}: {first.message}{rest}; the tunnels stay as they were")
            return
        differ = {**config.settings, **self._settings_then}.keys()
        changed = sorted(key for key in differ if config.settings.get(key) != self._settings_then.get(key))
        if changed:
            events.warning(f"{', '.join(changed)} changed in the file: that needs a restart")
        done = self._fleet.apply(self._source.wanted(config))
        names = " and ".join(path.name for path in self._source.paths)
        if done:
            events.note(f"{names}: {', '.join(done)}")
        elif asked or not changed:
            events.note(f"{names}: read again, nothing changed")


def _has_terminal() -> bool:
    """Whether this process has a terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
