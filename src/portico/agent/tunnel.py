"""A tunnel as the agent keeps it, and what the agent tells of it to its screen or log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from portico.agent.api import Grant
from portico.agent.link import Link, Serves
from portico.errors import Problem
from portico.wire.counts import Counts


@dataclass(slots=True, eq=False)
class Tunnel:
    """One tunnel of this agent. ``state``: ``starting``, ``online``, ``offline`` (trying), ``ended``, ``removed``.

    ``ended`` with a ``problem``: the platform's word; without: its own time was up (``ttl`` seconds from its first
    moment online; ``ends_at`` on the clock of :func:`portico.kit.clock.uptime`).
    """

    spec: dict[str, Any]
    serves: Serves
    target: str
    bind: int
    grant: Grant | None = None
    url: str = ""
    state: str = "starting"
    was_online: bool = False
    problem: Problem | None = None
    attempt: int = 0
    link: Link | None = None
    ttl: float | None = None
    ends_at: float | None = None
    #: What relays told of it: requests and refusals at the edge, since this agent began.
    edge: Counts = field(default_factory=Counts)
    #: The spec that the API took last.
    agreed: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        return self.state in ("ended", "removed")

    @property
    def name(self) -> str:
        return self.grant.name if self.grant is not None else str(self.spec.get("name") or "")


def public_url(spec: dict[str, Any], url: str) -> str:
    """The URL that is shown: by the domain of the user's own that the tunnel was asked to serve, where there is one."""
    domain = spec.get("domain")
    if not domain or not url:
        return url
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port is not None else ""
    return f"{parts.scheme}://{str(domain).strip().rstrip('.').lower()}{port}"


def asked_of(tunnel: Tunnel) -> dict[str, Any]:
    """What the API is asked for."""
    spec = {"protocol": "http", **tunnel.spec, "target": tunnel.target}
    if tunnel.grant is not None:
        spec["name"] = tunnel.grant.name  # the name that was made up stays
    return spec


class Events:
    """What an agent tells its screen or log; every method may be overridden."""

    def connection(self, state: str, detail: str) -> None:
        """The session's state: ``connecting``, ``online``, ``reconnecting``, ``ended``."""

    def tunnel(self, tunnel: Tunnel) -> None:
        """A tunnel changed its state, or (still ``online``) its target or address."""

    def warning(self, text: str) -> None:
        """Something that a person may want to act on; the agent goes on."""

    def note(self, text: str) -> None:
        """Something that went as a person wanted it."""
