"""What happens while the certificate of a domain fails.

    standard   retried by itself; relays serve what they have, an expired certificate too, and plain HTTP as the tunnel's policy
               says
    strict     retried by itself; relays serve the domain by HTTPS alone, and only while its certificate is good
    hold       a failure stops everything that would happen by itself: no order, no renewal, no change of what is served, until
               somebody releases it (``retry`` of the certificate, or another policy). Relays go on as under ``standard``

``cert_held_at`` says since when a domain is held. Whoever would start something for a domain by itself asks ``may_try`` first;
whoever records how a certificate is, adds the columns of ``recorded``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any


def may_try(row: Any) -> bool:
    """Whether something may be tried for the domain's certificate that nobody asked for."""
    return row.cert_held_at is None


def recorded(row: Any, failures: int, now: datetime) -> dict[str, Any]:
    """Columns to write with a new count of failures that no success has answered: held from the first one on under ``hold``, and
    no longer when there is none."""
    if failures == 0:
        return {"cert_held_at": None}
    if row.failure_policy == "hold" and failures > row.cert_failures and row.cert_held_at is None:
        return {"cert_held_at": now}
    return {}


def left(row: Any) -> dict[str, Any]:
    """Columns to write when the domain's owner releases it, by another policy or by asking for another try."""
    return {"cert_held_at": None} if row.cert_held_at is not None else {}
