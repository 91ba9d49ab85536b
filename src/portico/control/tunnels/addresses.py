"""From a tunnel to its public host, port and URL, and to the row that relays hold."""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import urlsplit

from portico.settings import ApiSettings

#: What relays are told of a tunnel that is held: visitors learn of a suspension, and of a deletion no more than of a stop.
_STATES = {"suspended": "suspended", "deleting": "stopped"}


class Columns(Protocol):
    """A row of ``tunnels`` by column name: a mapping of SQLAlchemy's, or a record of asyncpg's."""

    def __getitem__(self, name: str, /) -> Any: ...


class Addresses:
    """Public names of this installation."""

    def __init__(self, settings: ApiSettings) -> None:
        parts = urlsplit(settings.public_url)
        self._scheme = parts.scheme
        self._port = f":{parts.port}" if parts.port is not None else ""
        self._tls_port = settings.public_https_port or ((parts.port or 443) if parts.scheme == "https" else 7443)
        self._base = settings.base_domain.lower().strip(".")
        tcp_host = settings.tcp_url_host or self._base
        self._tcp_host = f"[{tcp_host}]" if ":" in tcp_host else tcp_host

    def host(self, subdomain: str) -> str:
        """The host, lower-case and without port."""
        return f"{subdomain}.{self._base}"

    def url(self, row: Columns) -> str:
        """The URL of a tunnel as a visitor types it."""
        if row["protocol"] == "tcp":
            return f"tcp://{self._tcp_host}:{row['port']}"
        if row["protocol"] == "tls":
            return f"tls://{self.host(row['subdomain'])}:{self._tls_port}"
        return f"{self._scheme}://{row['subdomain']}.{self._base}{self._port}"

    def hosts(self, row: Columns) -> list[str]:
        """The public hosts of a tunnel; a TCP tunnel has a port instead."""
        return [self.host(row["subdomain"])] if row["subdomain"] else []

    def grant_hosts(self, row: Columns) -> list[dict[str, str]]:
        """The hosts as a grant names them, each with who ends TLS for it."""
        mode = "passthrough" if row["protocol"] == "tls" else "terminate"
        return [{"host": host, "tls": mode} for host in self.hosts(row)]

    def edge_row(self, row: Columns) -> dict[str, Any]:
        """A tunnel as relays hold it (``contracts/edge-stream.schema.json``)."""
        found = {
            "id": row["id"],
            "organization": row["organization_id"],
            "protocol": row["protocol"],
            "hosts": self.hosts(row),
            "state": _STATES.get(row["held"], row["state"] if row["frozen"] is None else "frozen"),
            "generation": row["generation"],
            "policy": row["policy"],
            "policy_hash": row["policy_hash"],
            "policy_version": row["policy_version"],
        }
        if row["port"] is not None:
            found["port"] = row["port"]
        return found
