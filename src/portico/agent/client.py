"""The agent: keeps its tunnels online, whatever happens to relays and API (``Agent.run``).

    API ──session, grants──► connect ──HELLO, BIND──► online ──lost──► back-off ──► connect …
     ▲                          ▲                       │
     └── refresh before expiry  └──── GOAWAY: the replacement first, the old one finishes

It gives up only when the credential is refused or when every tunnel has ended. While the API is away the agent goes on
with the tokens it has, expired or not: the relay decides by its grace. Tunnels come and go in the live session
(``add``, ``change``, ``remove``, ``finish``) without a word to the others.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import secrets
import socket
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from portico.agent.api import VERSION, Api, SessionInfo
from portico.agent.link import Link, Serves
from portico.agent.tunnel import Events, Tunnel, asked_of, public_url
from portico.errors import Problem
from portico.settings import AgentSettings
from portico.wire.counts import Counts

log = logging.getLogger("portico.agent")

#: The platform's last words on a tunnel.
TUNNEL_OVER = frozenset(("tunnel.stopped", "tunnel.deleted", "tunnel.suspended", "tunnel.frozen", "tunnel.not_found"))
#: What a new grant heals.
GRANT_OLD = frozenset(("tunnel.grant_expired", "tunnel.grant_stale", "tunnel.grant_invalid"))
#: What a new session token heals.
TOKEN_OLD = frozenset(("session.token_expired", "session.token_invalid", "session.not_found", "session.ended"))
#: A connection that lasted this many seconds starts the back-off from its beginning.
STEADY_SECONDS = 5.0
#: Attempts in a row that found no relay before the API is asked for others: about three seconds.
RENEW_FROM = 4
#: Longest wait that a relay may ask for.
HINT_MAX_SECONDS = 300.0


def credential_refused(problem: Problem) -> bool:
    """Whether trying again is pointless until a person signs in."""
    return problem.code == "session.revoked" or (problem.code.startswith("auth.") and problem.status in (401, 403))


def tunnel_refused(problem: Problem) -> bool:
    """Whether the API refused what one tunnel asks for, which says nothing about the others."""
    return problem.code.startswith(("tunnel.", "quota.")) or problem.code == "request.invalid"


class Agent:
    """See the module. ``run`` returns when it was stopped; it raises the problem that ended it."""

    def __init__(
        self,
        settings: AgentSettings,
        api: Api,
        tunnels: Sequence[tuple[dict[str, Any], Serves, str]],
        events: Events | None = None,
    ) -> None:
        self.settings = settings
        self.api = api
        self.events = events or Events()
        self.agent_id = "agt-" + secrets.token_hex(12)
        self._binds = itertools.count(1)
        self.tunnels: list[Tunnel] = []
        self._by_bind: dict[int, Tunnel] = {}
        for spec, serves, shown in tunnels:
            self._enlist(Tunnel(spec, serves, shown, next(self._binds)))
        self.info: SessionInfo | None = None
        self.link: Link | None = None
        self.old_links: set[Link] = set()
        self.state = "connecting"
        self._connects = 0
        self._stale_token = False
        self._fatal: Problem | None = None
        self._hint = 0.0
        #: Set when the first tunnel is online.
        self.started = asyncio.Event()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._refresh_now = asyncio.Event()
        self._asking = asyncio.Lock()
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────────
    async def run(self) -> None:
        """Be online until :meth:`stop`; raises what ended it otherwise (``api.unreachable`` only at the first start)."""
        first = await self._first_session()
        if first is None:
            self._say("ended", "")
            return
        self._adopt(first)
        refreshing = asyncio.create_task(self._keep_fresh())
        try:
            await self._stay_connected()
        finally:
            refreshing.cancel()
            await asyncio.gather(refreshing, return_exceptions=True)
            for timer in self._timers:
                timer.cancel()
            await self._leave()
        if self._fatal is not None:
            raise self._fatal

    def stop(self) -> None:
        """End cleanly: what is in flight finishes, within the drain limit."""
        self._stopping.set()
        self._changed.set()

    def _live(self) -> list[Tunnel]:
        return [t for t in self.tunnels if not t.over]

    def _opening(self, tunnels: Sequence[Tunnel]) -> dict[str, Any]:
        return {
            "agent_id": self.agent_id,
            "hostname": socket.gethostname()[:255],
            "version": VERSION,
            "region": self.settings.region or None,
            "tunnels": [asked_of(tunnel) for tunnel in tunnels],
        }

    async def _first_session(self) -> SessionInfo | None:
        """The session to begin with; ``None`` when we were stopped before there was one.

        A platform that has just started may not have heard of a relay yet: that is waited for. All else is said at once.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self.settings.first_relay_seconds
        attempt = 0
        while not self._over():
            try:
                return await self._open_session()
            except Problem as problem:
                if problem.code != "edge.no_relay" or loop.time() >= until:
                    raise
                if attempt == 2:  # it is not over in a moment
                    self._say("connecting", problem.detail)
            await self._pause(min(attempt, 3))
            attempt += 1
        return None

    async def _open_session(self, limit: float | None = None) -> SessionInfo:
        """A session with all tunnels; when the API refuses one of several, a session with the others."""
        live = self._live()
        asked = [(tunnel, tunnel.spec) for tunnel in live]
        try:
            info = await self.api.open_session(self._opening(live), limit)
        except Problem as problem:
            if len(live) < 2 or not tunnel_refused(problem):
                raise
            return await self._open_one_by_one(live, limit)
        for tunnel, spec in asked:
            tunnel.agreed = spec
        return info

    async def _open_one_by_one(self, live: list[Tunnel], limit: float | None) -> SessionInfo:
        """Which tunnel was refused the answer does not say for certain: ask for each."""
        info = await self.api.open_session(self._opening(()), limit)
        grants = []
        for number, tunnel in enumerate(live):
            spec = tunnel.spec
            try:
                grants.append(await self.api.add_tunnel(info.session, asked_of(tunnel)))
                tunnel.agreed = spec
            except Problem as problem:
                if tunnel_refused(problem):
                    self._tunnel_over(tunnel, problem)
                    continue
                if self.info is None or credential_refused(problem):
                    raise
                for rest in live[number:]:  # the API went away in the middle: the session comes first
                    self._spawn(self._admit(rest))
                break
        return replace(info, grants=tuple(grants))

    def _adopt(self, info: SessionInfo) -> None:
        """Take a session answer over: its token, and its grants by name (at first by position, where a name was made up)."""
        by_name = {grant.name: grant for grant in info.grants}
        for index, tunnel in enumerate(self._live()):
            grant = by_name.get(tunnel.name) if tunnel.name else None
            if grant is None and tunnel.grant is None and not tunnel.name and index < len(info.grants):
                grant = info.grants[index]
            if grant is not None:
                tunnel.grant = grant
                tunnel.url = public_url(tunnel.spec, grant.url)
            elif tunnel.grant is None and tunnel.name and tunnel.agreed is None:
                self._spawn(self._admit(tunnel))  # it was added while this answer was on its way
        self.info = info
        self._stale_token = False

    async def _leave(self) -> None:
        """Give the tunnels back, let requests finish, end the session (best effort)."""
        links = self._links()
        await asyncio.gather(*(link.finish(self.settings.drain_seconds) for link in links))
        for link in links:
            link.close("the agent stopped")
        for task in self._tasks:
            task.cancel()
        if self.info is not None and (self._fatal is None or not credential_refused(self._fatal)):
            try:
                await self.api.close_session(self.info.session, self.settings.goodbye_timeout_seconds)
            except Problem as problem:
                log.debug("session end was not reported: %s", problem)
        self._say("ended", "")

    def _say(self, state: str, detail: str) -> None:
        if state != "online" or self.state != "online":
            self.state = state
            self.events.connection(state, detail)

    def _end(self, problem: Problem) -> None:
        """Give up: nothing that the agent can do would help."""
        if self._fatal is None:
            self._fatal = problem
        self._changed.set()

    def _over(self) -> bool:
        return self._stopping.is_set() or self._fatal is not None

    # ── connection ────────────────────────────────────────────────────────────────────────────────────────────────
    async def _stay_connected(self) -> None:
        attempt = 0
        while not self._over():
            try:
                await self._connect(attempt)
            except Problem as problem:
                if credential_refused(problem):
                    self._end(problem)
                    return
                self._say("reconnecting" if self._was_online else "connecting", problem.detail)
                await self._pause(attempt)
                attempt += 1
                continue
            link = self.link
            assert link is not None
            while not (self._over() or link.lost or link.leaving):
                await self._changed.wait()
                self._changed.clear()
            lasted = asyncio.get_running_loop().time() - link.opened_at
            if lasted >= STEADY_SECONDS:
                attempt = 0
            if not self._over():
                await self._pause(attempt)
                attempt += 1

    @property
    def _was_online(self) -> bool:
        return any(tunnel.was_online for tunnel in self.tunnels)

    async def _pause(self, attempt: int) -> None:
        """Full jitter, from ``reconnect_first_seconds`` doubling to ``reconnect_max_seconds``; a relay's hint comes first."""
        delay = min(self._hint, HINT_MAX_SECONDS) + self._jitter(attempt)
        self._hint = 0.0
        try:
            await asyncio.wait_for(self._stopping.wait(), delay)
        except TimeoutError:
            pass

    def _jitter(self, attempt: int) -> float:
        limits = self.settings
        ceiling = min(limits.reconnect_max_seconds, limits.reconnect_first_seconds * 2 ** min(max(attempt, 0), 20))
        return random.uniform(0, ceiling)  # noqa: S311 - jitter, no secret

    async def _connect(self, attempt: int = 0) -> None:
        """Open and bind one new link; raises the last problem when no relay takes us. ``attempt`` counts those before."""
        assert self.info is not None
        if self._stale_token or self.info.expires_at <= time.time():
            await self._renew(patient=self._stale_token)
        problem: Problem | None = None
        for url in self._edges():
            link = Link(self, self.settings, url, self._next_connect())
            try:
                await link.open(self.info.token)
            except Problem as err:
                if credential_refused(err):
                    raise
                problem = err
                log.debug("relay refused or unreachable: %s", err)
                if err.code in TOKEN_OLD:
                    self._stale_token = True
                continue
            self._use(link)
            return
        if not self._stale_token and attempt >= RENEW_FROM:
            # The relays that we know are gone for a while: perhaps the platform has others by now. Not at once: a relay that
            # is being restarted has many agents, and their questions would keep the API from everything else.
            await self._renew(patient=False)
        raise problem or Problem("edge.no_relay")

    def _edges(self) -> list[str]:
        """The relays in the API's order, the one that was just lost or asked us to leave last.

        A relay that died may still accept connections (its supervisor holds the socket) and answer only once it is back.
        """
        assert self.info is not None
        last = self.link.url if self.link is not None and (self.link.leaving or self.link.lost) else None
        return sorted(self.info.edges, key=lambda url: url == last)

    def _next_connect(self) -> int:
        self._connects += 1
        return self._connects

    async def _renew(self, patient: bool) -> None:
        """Ask the API for a current session; when it is away, what we have must do: relays take old tokens then.

        ``patient``: a relay refused what we have, so nothing but an answer helps. Else an API that hangs may not cost
        the reconnect its time.
        """
        limit = None if patient else self.settings.renew_timeout_seconds
        try:
            self._adopt(await self._open_session(limit))
        except Problem as problem:
            if credential_refused(problem):
                raise
            log.debug("no new session: %s", problem)

    def _use(self, link: Link) -> None:
        """Make ``link`` the current one and bind everything on it; an older link finishes what it has."""
        old, self.link = self.link, link
        if old is not None and not old.lost:
            self.old_links.add(old)
        for tunnel in self._live():
            if old is not None and old.sent_away and tunnel.spec.get("protocol") == "tcp":
                old.release(tunnel.bind)
            self._bind(link, tunnel)

    def _bind(self, link: Link, tunnel: Tunnel) -> None:
        if tunnel.grant is not None:
            link.bound[tunnel.bind] = tunnel.serves
            link.bind(tunnel.bind, tunnel.grant.grant)

    async def _retire(self, old: Link) -> None:
        """The replacement is bound: let the old link finish, then close it. A relay that drains closes it itself, when the
        visitors that are still connected to it have what they asked for."""
        await old.finish(self.settings.drain_seconds, moved=True)
        if old.sent_away:
            await old.until_lost()
        old.close("replaced")

    # ── freshness ─────────────────────────────────────────────────────────────────────────────────────────────────
    async def _keep_fresh(self) -> None:
        """Refresh token and grants before they expire; while the API is away keep trying and keep the session up."""
        failures = 0
        while True:
            assert self.info is not None
            if failures:
                wait = random.uniform(0, min(self.settings.refresh_retry_max_seconds, 2.0**failures))  # noqa: S311 - jitter, no secret
            else:
                wait = self.info.refresh_after * random.uniform(0.85, 1.0)  # noqa: S311 - jitter, no secret
            try:
                await asyncio.wait_for(self._refresh_now.wait(), wait)
            except TimeoutError:
                pass
            self._refresh_now.clear()
            try:
                await self._refresh()
                failures = 0
            except Problem as problem:
                if credential_refused(problem):
                    self._end(problem)
                    return
                failures += 1
                self.events.warning(f"could not refresh the session, trying again: {problem.detail}")

    async def _refresh(self) -> None:
        assert self.info is not None
        before = self.info.session
        try:
            info = await self.api.refresh_session(before, self.agent_id)
        except Problem as problem:
            if problem.code not in TOKEN_OLD:
                raise
            info = await self._open_session()
        self._adopt(info)
        link = self.link
        if link is None or link.lost:
            return
        if info.session != before:
            link.leaving = True  # another session needs a connection of its own
            self._changed.set()
            return
        link.auth(info.token)
        for tunnel in self._live():
            self._bind(link, tunnel)

    # ── tunnels that come and go ──────────────────────────────────────────────────────────────────────────────────
    def _enlist(self, tunnel: Tunnel) -> Tunnel:
        self.tunnels.append(tunnel)
        self._by_bind[tunnel.bind] = tunnel
        return tunnel

    def add(self, spec: dict[str, Any], serves: Serves, target: str) -> Tunnel:
        """One more tunnel in the running session."""
        tunnel = self._enlist(Tunnel(spec, serves, target, next(self._binds)))
        self._spawn(self._admit(tunnel))
        return tunnel

    def change(self, tunnel: Tunnel, spec: dict[str, Any], serves: Serves, target: str) -> None:
        """Serve a tunnel otherwise: requests from now on by ``serves``; its URL stays online, or changes if ``spec`` says so."""
        declared, moved = (spec, target) != (tunnel.spec, tunnel.target), target != tunnel.target
        tunnel.spec, tunnel.serves, tunnel.target = spec, serves, target
        for link in self._links():
            if tunnel.bind in link.bound:
                link.bound[tunnel.bind] = serves
        if declared:
            self._spawn(self._admit(tunnel))
        if moved:
            self.events.tunnel(tunnel)

    def remove(self, tunnel: Tunnel) -> None:
        """Take a tunnel out of the session; its requests in flight finish."""
        self._give_back(tunnel, "removed")
        self.tunnels.remove(tunnel)
        del self._by_bind[tunnel.bind]
        self.events.tunnel(tunnel)

    def finish(self, tunnel: Tunnel) -> None:
        """A tunnel's time is up. With the last one the agent ends."""
        self._give_back(tunnel, "ended")
        self.events.tunnel(tunnel)
        self._end_with_the_last()

    def _give_back(self, tunnel: Tunnel, state: str) -> None:
        was_over, tunnel.state = tunnel.over, state
        if was_over:
            return
        tunnel.problem = None
        for link in self._links():
            if tunnel.bind in link.bound:
                link.unbind(tunnel.bind)
                # Requests that cross the UNBIND are still answered; after that nothing may keep the forwarder alive.
                self._later(self.settings.drain_seconds, lambda link=link: link.bound.pop(tunnel.bind, None))
        if self.info is not None and tunnel.grant is not None:
            self._spawn(self._withdraw(self.info.session, tunnel.grant.tunnel))

    async def _withdraw(self, session: str, tunnel_id: str) -> None:
        try:
            await self.api.remove_tunnel(session, tunnel_id)
        except Problem as problem:  # the next session that is opened does not name it
            log.debug("the end of a tunnel was not reported: %s", problem)

    async def _admit(self, tunnel: Tunnel) -> None:
        """Ask for a tunnel's grant, and bind it; while the API is away, again and again."""
        attempt = 0
        asked, asked_spec = asked_of(tunnel), tunnel.spec
        while self.info is not None and not self._over():
            try:
                async with self._asking:  # one after the other: an older wish may not arrive after a newer one
                    if tunnel.over or asked != asked_of(tunnel):
                        return
                    grant = await self.api.add_tunnel(self.info.session, asked)
            except Problem as problem:
                if credential_refused(problem):
                    self._end(problem)
                    return
                if tunnel_refused(problem):
                    self._refused_live(tunnel, problem)
                    return
                if problem.code in TOKEN_OLD:
                    self._refresh_now.set()  # the session that is opened then names this tunnel too
                    return
                if attempt == 0:
                    self.events.warning(f"{tunnel.name} waits for the API: {problem.detail}")
                await asyncio.sleep(self._jitter(attempt))
                attempt += 1
                continue
            if tunnel not in self._live():  # it was removed meanwhile
                await self._withdraw(self.info.session, grant.tunnel)
                return
            tunnel.grant, tunnel.agreed = grant, asked_spec
            if self.link is not None and not self.link.lost:
                self._bind(self.link, tunnel)
            return

    def _refused_live(self, tunnel: Tunnel, problem: Problem) -> None:
        """The API refused a tunnel that was added, or the change of one that runs: that one stays what the relays know."""
        if tunnel.grant is None:
            self._tunnel_over(tunnel, problem)
        else:
            if tunnel.agreed is not None:
                tunnel.spec = tunnel.agreed  # else the next session would be refused for it, and the tunnel end
            self.events.warning(f"{tunnel.name}: the change was refused: {problem.detail}")

    def _links(self) -> list[Link]:
        return [link for link in {self.link, *self.old_links} if link is not None and not link.lost]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ── what a link reports ───────────────────────────────────────────────────────────────────────────────────────
    def link_bound(self, link: Link, bind: int, url: str) -> None:
        tunnel = self._by_bind.get(bind)
        if tunnel is None or tunnel.over:
            link.unbind(bind)
            return
        if link is not self.link:
            return
        url = public_url(tunnel.spec, url)
        renewed = tunnel.link is link and tunnel.state == "online" and url in ("", tunnel.url)
        tunnel.link, tunnel.url = link, url or tunnel.url
        tunnel.attempt, tunnel.problem, tunnel.was_online = 0, None, True
        if not renewed:
            tunnel.edge.open = 0
            tunnel.state = "online"
            self.events.tunnel(tunnel)
            self.started.set()
        if all(t.state == "online" or t.over for t in self.tunnels):
            if self.state != "online":
                self._say("online", "")
            for old in self.old_links:
                self._spawn(self._retire(old))
            self.old_links.clear()

    def link_refused(self, link: Link, bind: int, problem: Problem, retryable: bool) -> None:
        tunnel = self._by_bind.get(bind)
        if tunnel is None or link is not self.link or tunnel.over:
            return
        if problem.code in TUNNEL_OVER:
            self._tunnel_over(tunnel, problem)
        elif problem.code in GRANT_OLD or problem.code in TOKEN_OLD:
            self._try_again(tunnel, problem, refresh=True)
        elif not tunnel.was_online and (problem.code == "tunnel.in_use" or not retryable):
            self._tunnel_over(tunnel, problem)
        else:
            self._try_again(tunnel, problem, refresh=False)

    def link_counts(self, link: Link, bind: int, counts: Counts) -> None:
        tunnel = self._by_bind.get(bind)
        if tunnel is not None:
            if link is not tunnel.link:  # an old connection, which finishes what it has
                counts.open = tunnel.edge.open
            tunnel.edge.add(counts)

    def link_unbound(self, link: Link, bind: int, problem: Problem) -> None:
        tunnel = self._by_bind.get(bind)
        if tunnel is None or tunnel.over or link is not self.link:
            return
        if problem.code in TUNNEL_OVER:
            self._tunnel_over(tunnel, problem)
        else:
            self._try_again(tunnel, problem, refresh=problem.code in GRANT_OLD)

    def _tunnel_over(self, tunnel: Tunnel, problem: Problem) -> None:
        tunnel.state, tunnel.problem = "ended", problem
        self.events.tunnel(tunnel)
        self._end_with_the_last()

    def _end_with_the_last(self) -> None:
        """Every tunnel has ended: so does the agent, with the last refusal if there was one."""
        if not self.tunnels or self._live():
            return
        problems = [t.problem for t in self.tunnels if t.problem is not None]
        if problems:
            self._end(problems[-1])
        else:
            self.stop()

    def _try_again(self, tunnel: Tunnel, problem: Problem, refresh: bool) -> None:
        tunnel.state, tunnel.problem = "offline", problem
        self.events.tunnel(tunnel)
        delay = self._jitter(tunnel.attempt)
        tunnel.attempt += 1
        self._later(delay, self._refresh_now.set if refresh else lambda: self._rebind(tunnel))

    def _rebind(self, tunnel: Tunnel) -> None:
        link = self.link
        if link is not None and not link.lost and tunnel.state == "offline":
            self._bind(link, tunnel)

    def _later(self, delay: float, call: Any) -> None:
        def run() -> None:
            self._timers.discard(timer)
            call()

        timer = asyncio.get_running_loop().call_later(delay, run)
        self._timers.add(timer)

    def link_goaway(self, link: Link, problem: Problem, retry_after: float) -> None:
        if link is self.link:
            self._hint = retry_after
            self.events.warning(f"{problem.detail}; opening a new connection first")
            self._changed.set()

    def link_lost(self, link: Link, problem: Problem) -> None:
        self.old_links.discard(link)
        if link is not self.link:
            return
        if credential_refused(problem):
            self._end(problem)
        elif problem.code in TOKEN_OLD or problem.code == "session.superseded":
            self._stale_token = True
        elif problem.code == "wire.version_unsupported":
            self._end(problem)
        if not self._over():
            for tunnel in self.tunnels:
                if tunnel.state == "online":
                    tunnel.state = "offline"
                    tunnel.problem = problem
                    tunnel.edge.open = 0
                    self.events.tunnel(tunnel)
            self._say("reconnecting", problem.detail)
        self._changed.set()
