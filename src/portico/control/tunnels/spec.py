"""A tunnel as an agent asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from portico.control.tunnels import policy


@dataclass(frozen=True, slots=True)
class TunnelSpec:
    """One tunnel as an agent asks for it. ``policy`` None keeps what the tunnel has."""

    protocol: str
    name: str | None = None
    subdomain: str | None = None
    target: str | None = None
    policy: policy.Wanted | None = None
    remote_port: int | None = None
    domain: str | None = None
