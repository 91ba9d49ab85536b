"""From a subdomain to its public host and URL, and to the row that relays hold."""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import urlsplit

from portico.settings import ApiSettings


class Columns(Protocol):
    """A row of ``tunnels`` by column name: a mapping of SQLAlchemy's, or a record of asyncpg's."""

    def __getitem__(self, name: str, /) -> Any: ...


class Addresses:
    """Public names of this installation."""

    def __init__(self, settings: ApiSettings) -> None:
        parts = urlsplit(settings.public_url)
        self._scheme = parts.scheme
        self._port = f":{parts.port}" if parts.port is not None else ""
        self._base = settings.base_domain.lower().strip(".")

    def host(self, subdomain: str) -> str:
        """The host, lower-case and without port."""
        return f"{subdomain}.{self._base}"

    def url(self, subdomain: str) -> str:
        """The URL as a visitor types it."""
        return f"{self._scheme}://{subdomain}.{self._base}{self._port}"

    def edge_row(self, row: Columns) -> dict[str, Any]:
        """A tunnel as relays hold it (``contracts/edge-stream.schema.json``)."""
        subdomain = row["subdomain"]
        return {
            "id": row["id"],
            "organization": row["organization_id"],
            "hosts": [self.host(subdomain)] if subdomain else [],
            "state": row["state"],
            "generation": row["generation"],
        }
