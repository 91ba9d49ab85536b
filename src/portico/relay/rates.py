"""Rates: token buckets per tunnel, per client of a tunnel, and per organization.

    policy (tunnel_rate, client_rate), grant (org_requests, org_burst) ──Rates.of──► TunnelRates on the tunnel, or None
    decide.py asks ``check(address, now)``; who accepts the request calls ``take(address, now)``

A bucket holds ``burst`` tokens, is full at first and gains ``requests`` every ``seconds``. It is kept as the one moment at which
it will be full again (as in ITU-T I.371, GCRA): nothing has to run for it to fill, and what is full needs no memory. ``now`` is
the loop's time at this very request, not the coarse time of deadlines.

A tunnel is live on one relay, its owner, which keeps the buckets of tunnel and organization; a request that came in by another
relay meets them there (``address`` is ``None`` then). Clients are counted by the relay that they come in by.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from portico.kit.networks import network

if TYPE_CHECKING:
    from portico.relay.shared_rates import SharedRates
    from portico.settings import RelaySettings
    from portico.wire.grants import GrantClaims
    from portico.wire.policy import Rate

#: Waits below this many seconds are rounding.
_NOTHING: Final = 1e-9
#: The least recently seen clients that are looked at for one that needs no memory, when a new one finds the table full.
_LOOKS: Final = 8
#: Buckets that the clients share for whom there is no room in a table.
_SHARED: Final = 256


class Limits(Protocol):
    """What a policy says of rates."""

    @property
    def tunnel_rate(self) -> Rate | None: ...
    @property
    def client_rate(self) -> Rate | None: ...


class Governed(Protocol):
    """A tunnel under a policy, live here or on a peer."""

    @property
    def policy(self) -> Limits: ...


class Allowance(Protocol):
    """What a :class:`Bucket` is to its users, wherever its tokens come from."""

    def wait(self, now: float) -> float:
        """Seconds until there is a token, 0 when there is one. Changes nothing."""

    def take(self, now: float) -> None:
        """A token is used, there or not."""

    def change(self, per_second: float, burst: int, now: float) -> None:
        """Another rate from now on."""

    def idle(self, now: float) -> bool:
        """Whether a new one would be the same."""


class Bucket:
    """One bucket; ``each`` seconds bring a token."""

    __slots__ = ("__weakref__", "burst", "each", "full_at")

    def __init__(self, per_second: float, burst: int) -> None:
        self.each = 1.0 / per_second
        self.burst = burst
        self.full_at = 0.0

    def wait(self, now: float) -> float:
        wait = self.full_at - (self.burst - 1) * self.each - now
        return wait if wait > _NOTHING else 0.0

    def take(self, now: float) -> None:
        self.full_at = max(self.full_at, now) + self.each

    def change(self, per_second: float, burst: int, now: float) -> None:
        """What was used stays used, as far as the new size goes."""
        missing = min(max(self.full_at - now, 0.0) / self.each, burst)
        self.each, self.burst = 1.0 / per_second, burst
        self.full_at = now + missing * self.each

    def idle(self, now: float) -> bool:
        return self.full_at <= now


class Room:
    """How many more clients all tables of a process may remember."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left


class Clients:
    """The buckets of one tunnel's clients (of IPv6: of their /64), the least recently seen first.

    Bounded: a new client takes the place of one whose bucket is full, which is none the worse for it. A table in which none
    is full takes nobody in, and who comes then shares one of :data:`_SHARED` buckets: many addresses neither wash the bucket
    of one away nor open another without end.
    """

    __slots__ = ("_burst", "_each", "_full_at", "_most", "_overflow", "_room")

    def __init__(self, rate: Rate, most: int, room: Room) -> None:
        self._most, self._room = most, room
        self._full_at: dict[str, float] = {}
        self._overflow: dict[int, float] = {}
        self._each, self._burst = rate.seconds / rate.requests, rate.burst

    def __len__(self) -> int:
        return len(self._full_at)

    def change(self, rate: Rate, now: float) -> None:
        """As :meth:`Bucket.change`, for all of them."""
        before, self._each, self._burst = self._each, rate.seconds / rate.requests, rate.burst
        if self._each != before:
            for table in (cast(dict[object, float], self._full_at), cast(dict[object, float], self._overflow)):
                for key, full_at in table.items():
                    table[key] = now + max(full_at - now, 0.0) / before * self._each

    def _known(self, key: str, now: float) -> float:
        """When the bucket of a client is full again, in the past if it is."""
        at = self._full_at.get(key)
        if at is None:
            at = self._overflow.get(hash(key) % _SHARED, 0.0) if self._overflow else 0.0
        return min(at, now + self._burst * self._each)  # with an earlier burst it may have been farther

    def wait(self, address: str, now: float) -> float:
        wait = self._known(network(address), now) - (self._burst - 1) * self._each - now
        return wait if wait > _NOTHING else 0.0

    def take(self, address: str, now: float) -> None:
        key = network(address)
        full_at = max(self._known(key, now), now) + self._each
        if self._full_at.pop(key, None) is not None or self._make_room(now):
            self._full_at[key] = full_at
        else:
            self._overflow[hash(key) % _SHARED] = full_at

    def give_back(self, address: str) -> None:
        """A token that :meth:`take` took was not used."""
        key = network(address)
        if key in self._full_at:
            self._full_at[key] -= self._each
        elif (shared := hash(key) % _SHARED) in self._overflow:
            self._overflow[shared] -= self._each

    def _make_room(self, now: float) -> bool:
        """Whether a new client may be remembered, perhaps instead of one that need not be."""
        table = self._full_at
        if len(table) < self._most and self._room.left > 0:
            self._room.left -= 1
            return True
        for _ in range(min(_LOOKS, len(table))):
            key = next(iter(table))
            full_at = table.pop(key)
            if full_at <= now:
                return True
            table[key] = full_at  # to the back: others are looked at next time
        return False

    def prune(self, now: float) -> None:
        """Forget the full ones."""
        before = len(self._full_at)
        self._full_at = {key: full_at for key, full_at in self._full_at.items() if full_at > now}
        self._overflow = {key: full_at for key, full_at in self._overflow.items() if full_at > now}
        self._room.left += before - len(self._full_at)

    def clear(self) -> None:
        self._room.left += len(self._full_at)
        self._full_at.clear()
        self._overflow.clear()


class TunnelRates:
    """The rates that hold for the requests of one tunnel."""

    __slots__ = ("__weakref__", "clients", "home", "organization", "tunnel")

    def __init__(self, home: TunnelRates | None = None) -> None:
        """``home``: whose clients are counted, for as long as this is in use."""
        self.home = home
        self.organization: Allowance | None = None
        self.tunnel: Bucket | None = None
        self.clients: Clients | None = home.clients if home is not None else None

    def check(self, address: str | None, now: float) -> float:
        """Seconds until a request from ``address`` may pass, 0 for at once. Changes nothing. ``None``: its client was counted
        by the relay that it came in by."""
        wait = self.tunnel.wait(now) if self.tunnel is not None else 0.0
        if self.clients is not None and address is not None:
            wait = max(wait, self.clients.wait(address, now))
        if self.organization is not None:
            wait = max(wait, self.organization.wait(now))
        return wait

    def take(self, address: str | None, now: float) -> None:
        """A request from ``address`` was accepted."""
        if self.tunnel is not None:
            self.tunnel.take(now)
        if self.clients is not None and address is not None:
            self.clients.take(address, now)
        if self.organization is not None:
            self.organization.take(now)

    def idle(self, now: float) -> bool:
        """Whether a new one would be the same; clients of whom that is true are forgotten."""
        if self.clients is not None:
            self.clients.prune(now)
        return (self.tunnel is None or self.tunnel.idle(now)) and not self.clients


class Rates:
    """All buckets of a process. They outlive the tunnel's connection and its policy, so that neither a reconnect nor an edit
    fills them; what is full and in nobody's use is forgotten (:meth:`prune`)."""

    def __init__(self, settings: RelaySettings, clock: Callable[[], float], shared: SharedRates | None = None) -> None:
        """``clock``: the loop's time. ``shared``: where relays share the rates of organizations."""
        self._clock, self._shared = clock, shared
        self._clients_per_tunnel = settings.rate_clients_per_tunnel
        self._room = Room(settings.rate_clients_max)
        self._tunnels: dict[str, TunnelRates] = {}
        self._organizations: dict[str, Allowance] = {}

    def __len__(self) -> int:
        return len(self._tunnels) + len(self._organizations)

    def of(self, tunnel: Governed) -> TunnelRates | None:
        """The rates of a tunnel under its present policy and grant, ``None`` without any. To be asked again when either
        changed, and to be kept meanwhile. Of a peer's tunnel only clients are counted here."""
        client = tunnel.policy.client_rate
        grant: GrantClaims | None = getattr(tunnel, "grant", None)  # a peer's tunnel has none here
        if grant is None:
            # Clients alone, in an object of its own: the tunnel may be live here, too, while it moves.
            home = self._with_clients(cast(Any, tunnel).tunnel, client) if client is not None else None
            return TunnelRates(home) if home is not None else None
        limits = cast(Any, tunnel).limits()
        return self.make(grant.tun, tunnel.policy.tunnel_rate, client, grant.org, limits)

    def make(
        self,
        tunnel: str,
        rate: Rate | None,
        client_rate: Rate | None,
        organization: str = "",
        limits: Mapping[str, int] | None = None,
    ) -> TunnelRates | None:
        """As :meth:`of`, from what a tunnel and its plan say: ids, rates, and ``org_requests`` (per second) with
        ``org_burst`` (absent or 0: of a second)."""
        per_second = (limits or {}).get("org_requests", 0)
        if rate is None and client_rate is None and not per_second:
            return None
        found = self._with_clients(tunnel, client_rate)
        found.organization = None
        if limits is not None and per_second:
            found.organization = self._organization(organization, per_second, limits.get("org_burst") or per_second)
        if rate is None:
            found.tunnel = None
        elif found.tunnel is None:
            found.tunnel = Bucket(rate.requests / rate.seconds, rate.burst)
        else:
            found.tunnel.change(rate.requests / rate.seconds, rate.burst, self._clock())
        return found

    def _with_clients(self, tunnel: str, client_rate: Rate | None) -> TunnelRates:
        """The rates of a tunnel, with this one for its clients."""
        found = self._tunnels.setdefault(tunnel, TunnelRates())
        if client_rate is None:
            if found.clients is not None:
                found.clients.clear()
            found.clients = None
        elif found.clients is None:
            found.clients = Clients(client_rate, self._clients_per_tunnel, self._room)
        else:
            found.clients.change(client_rate, self._clock())
        return found

    def _organization(self, id: str, per_second: int, burst: int) -> Allowance:
        found = self._organizations.get(id)
        if found is None:
            shared = self._shared
            found = Bucket(per_second, burst) if shared is None else shared.lease(id, per_second, burst)
            self._organizations[id] = found
        else:
            found.change(per_second, burst, self._clock())
        return found

    def prune(self) -> None:
        """Forget what is as new and nobody holds: tunnels that went, then organizations without a tunnel."""
        now = self._clock()
        _forget(self._tunnels, now)
        _forget(self._organizations, now)


def _forget(table: dict[str, TunnelRates] | dict[str, Allowance], now: float) -> None:
    for key in [key for key, held in table.items() if held.idle(now)]:
        held = table.pop(key)
        still = weakref.ref(held)
        del held
        if (used := still()) is not None:  # by a live tunnel
            table[key] = used  # type: ignore[assignment]
