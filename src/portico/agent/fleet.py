"""The tunnels of one process and what serves them: which are wanted, which run, and when one's time is up.

``apply`` brings the running session from what it was to what is wanted: new tunnels come, others go with their requests
in flight finished, and one whose target changed is served from the new one without going offline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portico.agent.client import Agent
from portico.agent.files import FileServer
from portico.agent.forward import Forwarder
from portico.agent.hints import HostHint
from portico.agent.tcp import TcpForwarder
from portico.agent.tunnel import Events, Tunnel
from portico.kit.clock import uptime
from portico.wire.policy_check import HOST_KEPT

if TYPE_CHECKING:
    from portico.agent.app import TunnelOptions

Served = Forwarder | FileServer | TcpForwarder
#: Seconds between two looks at forwarders that finish their last requests.
_RETIRED_LOOK_SECONDS = 0.5
#: Targets that are looked at at once.
_PROBES = 8


class Fleet:
    """See the module. Set ``agent`` before :meth:`run`."""

    def __init__(self, make: Callable[[TunnelOptions], Served], events: Events) -> None:
        self.agent: Agent | None = None
        self._make_served = make
        self.events = events
        self._options: list[TunnelOptions] = []
        self._served: dict[Tunnel, tuple[TunnelOptions, Served]] = {}
        self._first: list[Served] = []
        self._retired: set[Served] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._probing = asyncio.Semaphore(_PROBES)

    def _make(self, options: TunnelOptions) -> Served:
        served = self._make_served(options)
        host = options.spec.get("policy", {}).get("headers", {}).get("host", HOST_KEPT)
        if isinstance(served, Forwarder) and host == HOST_KEPT:
            served.host_hint = HostHint(options.target.place, self.events.warning)
        return served

    def begin(self, wanted: Sequence[TunnelOptions]) -> list[tuple[dict[str, Any], Served, str]]:
        """Forwarders of the first tunnels, as :class:`Agent` takes them."""
        self._options = list(wanted)
        self._first = [self._make(options) for options in wanted]
        return [(o.spec, f, o.target.url) for o, f in zip(self._options, self._first, strict=True)]

    async def run(self) -> None:
        """Warn of targets that are not there at the start, and end tunnels whose time is up, until cancelled."""
        assert self.agent is not None
        for tunnel, options, served in zip(self.agent.tunnels, self._options, self._first, strict=True):
            tunnel.ttl = options.ttl
            self._served[tunnel] = (options, served)
        waiting = asyncio.create_task(self._warn_at_start())
        try:
            while True:  # noqa: ASYNC110 - it is a clock that is looked at
                await asyncio.sleep(self._look())
        finally:
            waiting.cancel()

    def _look(self) -> float:
        """One look at the clock; seconds until the next."""
        assert self.agent is not None
        now, soonest = uptime(), 1.0
        for tunnel in list(self.agent.tunnels):
            if tunnel.ttl is None or tunnel.over or not tunnel.was_online:
                continue
            if tunnel.ends_at is None:
                tunnel.ends_at = now + tunnel.ttl
            if tunnel.ends_at <= now:
                self.agent.finish(tunnel)
                self._retire(tunnel)
            else:
                soonest = min(soonest, tunnel.ends_at - now)
        return soonest

    async def _warn_at_start(self) -> None:
        """Say at the start that a target is not there: the tunnel is online all the same."""
        assert self.agent is not None
        await self.agent.started.wait()
        first, self._first = self._first, []
        # Tunnels may share a target; each is looked at once, a few at a time.
        await asyncio.gather(*(self._warn(served) for served in {(s.target, type(s)): s for s in first}.values()))

    async def _warn(self, served: Served) -> None:
        async with self._probing:
            why = await served.probe()
        if why is not None:
            then = "are turned away" if isinstance(served, TcpForwarder) else "get 502"
            self.events.warning(f"{why} yet; visitors {then} until the app answers there")

    # ── change ────────────────────────────────────────────────────────────────────────────────────────────────────
    def apply(self, wanted: Mapping[str, TunnelOptions]) -> list[str]:
        """Make these the tunnels, by name; returns a line for each difference."""
        assert self.agent is not None
        done = []
        for tunnel, (options, _) in list(self._served.items()):
            new = wanted.get(tunnel.name)
            if new is None or (new != options and (tunnel.over or _another(new, options))):
                self.agent.remove(tunnel)
                self._retire(tunnel)
                del self._served[tunnel]
                if new is None:
                    done.append(f"removed {tunnel.name}")
            elif new != options:
                self._change(tunnel, options, new)
                done.append(f"changed {tunnel.name}")
        running = {tunnel.name for tunnel in self._served}
        for name, options in wanted.items():
            if name not in running:
                self._add(options)
                done.append(f"added {name}")
        return done

    def _add(self, options: TunnelOptions) -> None:
        assert self.agent is not None
        served = self._make(options)
        tunnel = self.agent.add(options.spec, served, options.target.url)
        tunnel.ttl = options.ttl
        self._served[tunnel] = (options, served)
        self._spawn(served)

    def _change(self, tunnel: Tunnel, old: TunnelOptions, new: TunnelOptions) -> None:
        assert self.agent is not None
        served = self._served[tunnel][1]
        if _serving(new) != _serving(old):
            self._retire(tunnel)
            served = self._make(new)
            self._spawn(served)
        if new.ttl != old.ttl and tunnel.ends_at is not None:
            begun = tunnel.ends_at - (old.ttl or 0)
            tunnel.ends_at = begun + new.ttl if new.ttl is not None else None
        tunnel.ttl = new.ttl
        self._served[tunnel] = (new, served)
        spec = new.spec
        if "policy" in old.spec and "policy" not in spec:
            spec = {**spec, "policy": {}}  # what the file said before no longer holds
        self.agent.change(tunnel, spec, served, new.target.url)

    def _spawn(self, served: Served) -> None:
        """Look whether the new target is there."""
        task = asyncio.get_running_loop().create_task(self._warn(served))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _retire(self, tunnel: Tunnel) -> None:
        """Its forwarder takes no new request; those in flight finish, however long they take."""
        served = self._served[tunnel][1]
        served.retire()
        self._retired.add(served)
        task = asyncio.get_running_loop().create_task(self._let_finish(served))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _let_finish(self, served: Served) -> None:
        while served.busy:  # noqa: ASYNC110 - the hot path sets no event
            await asyncio.sleep(_RETIRED_LOOK_SECONDS)
        self._retired.discard(served)

    async def abort(self) -> None:
        """Cut everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for served in {*self._first, *self._retired, *(s for _, s in self._served.values())}:
            await served.abort()


def _another(new: TunnelOptions, old: TunnelOptions) -> bool:
    """Whether it is no longer the same tunnel to the platform."""
    return bool(new.spec.get("protocol") != old.spec.get("protocol"))


def _serving(options: TunnelOptions) -> tuple[Any, ...]:
    """What a forwarder is made of."""
    return (
        options.target,
        options.tls_verify,
        options.proxy_protocol,
        options.tls,
        options.inspect,
    )
