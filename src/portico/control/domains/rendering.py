"""A domain as the API shows it: its states, and each record that its owner sets with what was found there."""

from __future__ import annotations

from typing import Any

from portico.control.domains import records
from portico.control.domains.names import NameRules
from portico.settings import ApiSettings

_CERTIFICATE = (
    "status", "serial", "fingerprint", "issuer", "not_before", "not_after", "renews_at", "error_code", "error_detail",
    "failures", "retry_at", "source", "regions_active", "regions_total", "held_at",
)  # fmt: skip


class Rendering:
    """Documents of domains."""

    def __init__(self, settings: ApiSettings, rules: NameRules) -> None:
        self._settings = settings
        self._rules = rules

    def document(self, row: Any) -> dict[str, Any]:
        """The whole of it."""
        name = self._rules.known(row.name)
        wanted = records.wanted(self._settings, row, name)
        return {
            "id": row.id,
            "name": row.name,
            "display_name": name.display,
            "wildcard": name.wildcard,
            "apex": name.apex,
            "hostname_status": row.hostname_status,
            "tls_mode": row.tls_mode,
            "failure_policy": row.failure_policy,
            "tunnel": row.tunnel_id,
            "frozen": row.frozen,
            "records": [records.shown(record, row.dns_findings) for record in wanted],
            "dns_error": row.dns_error,
            "verified_at": row.verified_at,
            "checked_at": row.checked_at,
            "next_check_at": row.next_check_at,
            "certificate": {key: getattr(row, f"cert_{key}") for key in _CERTIFICATE},
            "created_at": row.created_at,
            "updated_at": row.updated_at,
        }
