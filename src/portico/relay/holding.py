"""Requests that wait for a tunnel that is expected back in a moment, instead of a refusal.

    relay restarted ─► agents are on their way ─┐
    agent's connection broke ─► it reconnects ──┴─► the host is *expected* ─► requests wait ─► bound: they go on
                                                                                └─► ``hold_seconds``: refused after all

A tunnel that was given back (Ctrl-C, stop, delete) is not expected. Nothing of a waiting request was forwarded, and nothing
more is read from its visitor. For as long after its return a tunnel *catches up*: what came meanwhile (some of it in the
listening queue) may be more than it takes at once, and waits for room. All of it is off the path of a request to a live
tunnel with room.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from portico.relay.agent_connection import LiveTunnel
    from portico.relay.peers import Peers
    from portico.relay.sessions import Agents
    from portico.relay.snapshot import Snapshot
    from portico.settings import RelaySettings

#: Seconds until requests that found no room in the returned tunnel ask again: more may wait than may be in flight.
PACE_SECONDS: Final = 0.02


class Waiting(Protocol):
    """A request, or a connection that is passed through."""

    @property
    def host(self) -> bytes: ...
    def go_on(self) -> None:
        """The wait is over: ask again."""


class Holding:
    """The waiting requests of a process, by host and in order."""

    def __init__(self, settings: RelaySettings, snapshot: Snapshot, agents: Agents, peers: Peers) -> None:
        self._settings, self._snapshot, self._agents, self._peers = settings, snapshot, agents, peers
        self._loop = asyncio.get_running_loop()
        self._settled_at = self._loop.time() + settings.hold_seconds
        self._catching_up: dict[bytes, float] = {}
        self._stood_still = (
            0.0  # until when (loop time) all tunnels catch up with what came while this process stood still
        )
        self._pacing: set[bytes] = set()
        self._waiting: dict[bytes, deque[Waiting]] = {}
        self._timers: dict[bytes, asyncio.TimerHandle] = {}
        self.count = 0
        agents.on_bound.append(self._bound)
        peers.on_bound.append(self._back)

    @property
    def full(self) -> bool:
        """Whether as many requests wait as may, here and in the lines of tunnels (``line.py``)."""
        return self.count >= self._settings.hold_max_requests

    def take(self, waiting: Waiting, code: str) -> bool:
        """Whether the request, which would be refused with ``code``, waits now; it hears ``go_on`` when its
        tunnel is there (and has room) or the time is up."""
        # Hosts below a wildcard wait together, as it is the wildcard whose tunnel comes back.
        host = self._snapshot.above(waiting.host) or waiting.host
        full = code != "edge.tunnel_offline"
        if full:
            until = max(self._catching_up.get(host, 0.0), self._stood_still)
        else:
            until = max(self._agents.returning.get(host, 0.0), self._settled_at)
        if until <= self._loop.time() or self.full:
            return False
        if not full and not self._active(host):
            return False
        self._waiting.setdefault(host, deque()).append(waiting)
        self.count += 1
        if host not in self._timers:
            self._timers[host] = self._loop.call_at(until, self._give_up, host)
        if full:
            self._pace(host)
        return True

    def stood_still(self) -> None:
        """This process did nothing for a while (a busy or sleeping machine): what came meanwhile comes at once, now."""
        self._stood_still = self._loop.time() + self._settings.hold_seconds

    def _active(self, host: bytes) -> bool:
        row = self._snapshot.tunnel_for_host(host.decode("ascii", "replace"))
        return row is not None and row.active

    def _bound(self, live: LiveTunnel) -> None:
        self._back(live.hosts)

    def _back(self, hosts: tuple[bytes, ...]) -> None:
        """Their tunnels are live, here or on a peer: as many requests go on as there is room for, the rest as room comes
        free."""
        now = self._loop.time()
        for host in hosts:
            expected = self._agents.returning.pop(host, 0.0) > now or self._settled_at > now
            if expected:
                self._catching_up[host] = now + self._settings.hold_seconds
                self._loop.call_later(self._settings.hold_seconds, self._caught_up, host)
            if host in self._waiting:
                self._loop.call_soon(self._go_on, host)

    def _caught_up(self, host: bytes) -> None:
        if self._catching_up.get(host, 0.0) <= self._loop.time():
            self._catching_up.pop(host, None)

    def _go_on(self, host: bytes) -> None:
        self._pacing.discard(host)
        waiting = self._waiting.get(host)
        if waiting is None:
            return
        tunnel = self._agents.by_host.get(host) or self._peers.by_host.get(host)
        # Half of the room at a time: newcomers take some of it, and a peer's owner may have less than it seems from here.
        room = -(-(tunnel.concurrency - tunnel.inflight) // 2) if tunnel is not None else 0
        while waiting and tunnel is not None and room > 0 and tunnel.inflight < tunnel.concurrency:
            self.count -= 1
            room -= 1
            waiting.popleft().go_on()
        if not waiting:
            self._forget(host)
        elif tunnel is not None:
            until = self._catching_up.get(host, 0.0)
            if (timer := self._timers.get(host)) is not None and timer.when() < until:
                timer.cancel()  # the tunnel is there: what waits is now waiting for room
                self._timers[host] = self._loop.call_at(until, self._give_up, host)
            self._pace(host)

    def _pace(self, host: bytes) -> None:
        if host not in self._pacing:
            self._pacing.add(host)
            self._loop.call_later(PACE_SECONDS, self._go_on, host)

    def _give_up(self, host: bytes) -> None:
        """The time is up: whatever the decision is now, it stands."""
        del self._timers[host]
        waiting = self._waiting.pop(host, None)
        while waiting:
            self.count -= 1
            waiting.popleft().go_on()

    def _forget(self, host: bytes) -> None:
        self._waiting.pop(host, None)
        if (timer := self._timers.pop(host, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        """Nobody is waited for any more."""
        for host in list(self._timers):
            self._timers[host].cancel()
            self._give_up(host)
