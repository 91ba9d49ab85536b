"""Requests that a trusted proxy passes on: each may be another client's, by the forwarding fields (``client_address.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from portico.relay import client_address, heads
from portico.relay.http1 import Visitor

if TYPE_CHECKING:
    from portico.relay.exchange import Exchange


class ProxiedVisitor(Visitor):
    """A trusted proxy's connection. It has no short way: what is known by its bytes there is decided on for one client."""

    def _ask(self, line: bytes, known: heads.KnownHead) -> bool:
        return False

    def _learn(self, exchange: Exchange, line: bytes, section: bytes) -> None:
        """Nothing: hardly two of its heads are alike."""

    def _exchange(self) -> Exchange | None:
        fields = self.fields
        exchange = super()._exchange()
        if exchange is not None:
            exchange.told = client_address.read(fields, self.address, self.server.trusted)
        return exchange
