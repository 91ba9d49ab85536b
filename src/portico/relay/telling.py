"""Tells agents what happens to their tunnels at the edge: what was refused there, which they could not know otherwise.

    Counters (incremented per request) ──once a second, where something changed──► COUNTS ─► agent
    a refusal for a tunnel that is live on a peer ──COUNTS on the peer link──► its owner's Counters ─► its agent

Only to those who said in their HELLO that they take it. A thousand tunnels to which nothing happened cost a thousand
comparisons a second.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Final

from portico.errors import catalogue
from portico.relay.meter import Counters
from portico.wire import frames as f
from portico.wire.counts import MAX_CODES, Counts

if TYPE_CHECKING:
    from portico.relay.agent_connection import LiveTunnel
    from portico.relay.peers import Peers, RemoteTunnel
    from portico.relay.sessions import Agents

#: Seconds between two looks, and tunnels that are looked at before others get their turn.
TELL_SECONDS: Final = 1.0
SLICE: Final = 500
#: What agents see themselves: refusals of this hop are no news to them.
_OF_TARGET: Final = "agent → local target"


class Told:
    """What the other side of one bind has been told, as the counters were then."""

    __slots__ = ("bytes_in", "bytes_out", "connections", "errors", "open", "refusals", "refused", "requests")

    def __init__(self, counters: Counters) -> None:
        """From now on: what was before is not told."""
        self._take(counters, 0)
        self.refused = dict(counters.refused or ())

    def _take(self, now: Counters, inflight: int) -> None:
        self.requests, self.connections, self.errors = now.requests, now.connections, now.errors
        self.bytes_in, self.bytes_out, self.refusals, self.open = now.bytes_in, now.bytes_out, now.refusals, inflight

    def news(self, now: Counters, inflight: int) -> Counts | None:
        """What to tell; ``None`` when nothing changed. It counts as told."""
        if (
            self.bytes_out == now.bytes_out
            and self.refusals == now.refusals
            and self.open == inflight
            and self.requests == now.requests
            and self.bytes_in == now.bytes_in
            and self.connections == now.connections
            and self.errors == now.errors
        ):
            return None
        counts = Counts(
            now.requests - self.requests,
            now.connections - self.connections,
            now.bytes_in - self.bytes_in,
            now.bytes_out - self.bytes_out,
            now.errors - self.errors,
            inflight,
            self._refused(now),
        )
        self._take(now, inflight)
        return counts

    def _refused(self, now: Counters) -> dict[str, int]:
        if self.refusals == now.refusals or now.refused is None:
            return {}
        new: dict[str, int] = {}
        for code, count in now.refused.items():
            if (more := count - self.refused.get(code, 0)) and len(new) < MAX_CODES:
                new[code] = more
                self.refused[code] = count
        return new


class Teller:
    """Looks at every tunnel once a second while :meth:`run` runs, and a last time when one goes."""

    def __init__(self, agents: Agents, peers: Peers) -> None:
        self._agents, self._peers = agents, peers
        agents.on_dropped.append(self.tell)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            remote = [tunnel for link in self._peers.inbound for tunnel in link.tunnels.values()]
            await self._all(list(self._agents.by_tunnel.values()), remote)

    async def _all(self, live: list[LiveTunnel], remote: list[RemoteTunnel]) -> None:
        for start in range(0, len(live), SLICE):
            for tunnel in live[start : start + SLICE]:
                self.tell(tunnel)
            await asyncio.sleep(0)
        for start in range(0, len(remote), SLICE):
            for other in remote[start : start + SLICE]:
                self._tell_owner(other)
            await asyncio.sleep(0)

    def tell(self, live: LiveTunnel) -> None:
        """Tell the agent what is new of one tunnel."""
        session = live.session
        if session.counts and not session.closed and (news := live.told.news(live.counters, live.inflight)) is not None:
            session.control(f.COUNTS, live.bind, **news.body())

    def _tell_owner(self, remote: RemoteTunnel) -> None:
        """Tell the relay that holds a tunnel what was refused here; the rest it counts itself."""
        session, counters = remote.session, remote.counters
        if remote.told.refusals == counters.refusals or not session.counts or session.closed:
            return
        news = remote.told.news(counters, 0)
        if news is not None and news.refused:
            session.control(f.COUNTS, remote.bind, **Counts(refused=news.refused).body())


def heard(counters: Counters, counts: Counts) -> None:
    """A peer refused visitors of a tunnel that is live here."""
    for code, count in counts.refused.items():
        counters.refuse(code, count)


@functools.cache
def is_news(code: str) -> bool:
    """Whether an agent would not know of a refusal by itself."""
    spec = catalogue().get(code)
    return spec is None or spec.hop != _OF_TARGET
