"""Public ports of TCP tunnels: leased in the database to one tunnel at a time, for as long as the tunnel exists.

    free ──lease──► leased ──the tunnel is deleted──► quarantine ──► free

A lease takes one row of ``tcp_ports`` with SKIP LOCKED: any number of simultaneous creations get different ports, and none
waits for another, so that none can deadlock. Within the quarantine a port goes back to its last organization alone, and
only when it asks for it: who still connects to a deleted tunnel must not reach a stranger.
"""

from __future__ import annotations

from portico.control.tunnels import store
from portico.errors import Problem
from portico.kit.db import Tx
from portico.kit.sockets import port_range
from portico.settings import ApiSettings


class Ports:
    """The range of this installation. Raises ``config.invalid`` when the setting is no range."""

    def __init__(self, settings: ApiSettings) -> None:
        self.range = port_range(settings.tcp_ports, "tcp_ports") if settings.tcp_ports else range(0)
        self._quarantine = settings.tcp_port_quarantine_seconds

    @property
    def offered(self) -> bool:
        """Whether this installation has TCP tunnels at all."""
        return bool(self.range)

    async def prepare(self, tx: Tx) -> None:
        """Make the rows of the range, so that the first tunnels do not have to."""
        await store.add_ports(tx, self.range)

    def check(self, port: int) -> None:
        """Raises ``tunnel.port_invalid`` for a port that no tunnel can have."""
        if port not in self.range:
            span = f"{self.range.start} to {self.range.stop - 1}"
            raise Problem("tunnel.port_invalid", f"port {port} is not one of this platform's TCP ports ({span})")

    async def lease(self, tx: Tx, organization: str, wanted: int | None) -> int:
        """A port for a tunnel, ``wanted`` or any.

        Raises ``tunnel.port_invalid``, ``tunnel.port_taken`` or ``tunnel.ports_exhausted``.
        """
        if wanted is not None:
            self.check(wanted)
        port = await self._take(tx, organization, wanted)
        if port is None and await store.add_ports(tx, self.range):  # the range is new, or wider than it was
            port = await self._take(tx, organization, wanted)
        if port is not None:
            return port
        if wanted is not None:
            raise Problem("tunnel.port_taken", f"port {wanted} is taken")
        raise Problem("tunnel.ports_exhausted", f"none of the {len(self.range)} TCP ports of this platform is free")

    async def _take(self, tx: Tx, organization: str, wanted: int | None) -> int | None:
        if wanted is not None:
            return await store.lease_port(tx, organization, wanted, self._quarantine)
        return await store.lease_any_port(tx, organization, self.range, self._quarantine)
