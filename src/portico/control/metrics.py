"""The API's metrics: what its middleware counts, the declarations, and where each value is read from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from portico.kit.metrics import REQUEST_SECONDS, Histogram, Metric, Sample

STATUSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")


class Tally:
    """Plain numbers of one API process, incremented by the middleware."""

    def __init__(self) -> None:
        self.statuses = [0] * len(STATUSES)
        self.seconds = Histogram(REQUEST_SECONDS)
        self.in_flight = 0

    def answered(self, status: int, seconds: float) -> None:
        """An answer began, ``seconds`` after its request."""
        self.statuses[status // 100 - 1] += 1
        self.seconds.observe(seconds)


REQUESTS = Metric("portico_api_requests_total", "counter", "Requests answered, by class of the status.", ("status",))
SECONDS = Metric("portico_api_answer_seconds", "histogram", "From a request's head to the head of its answer.")
IN_FLIGHT = Metric("portico_api_requests_in_flight", "gauge", "Requests under way, edge streams among them.")
EDGE_STREAMS = Metric("portico_api_edge_streams", "gauge", "Relays that follow the edge state at this process.")
POOL = Metric("portico_api_database_connections", "gauge", "Connections of the pool.", ("state",))
HASHES = Metric("portico_api_password_hashes_waiting", "gauge", "Password hashes under way or waiting for their turn.")
REDIS = Metric("portico_api_redis_up", "gauge", "0 while Redis is left alone after a failure, and without one.")

CERT_EVENTS = Metric(
    "portico_api_cert_events_total", "counter",
    "Certificate events that were known to be from their source, by what became of them.", ("outcome",),
)  # fmt: skip
CERT_REFUSED = Metric(
    "portico_api_cert_events_refused_total", "counter",
    "Certificate events that were not, by the first check that failed; their senders are all told the same.", ("code",),
)  # fmt: skip

WEBHOOKS = Metric(
    "portico_api_billing_webhooks_total", "counter",
    "Events of payment providers that were believed, or wait for a certificate, by what became of them.",
    ("provider", "outcome"),
)  # fmt: skip
WEBHOOKS_REFUSED = Metric(
    "portico_api_billing_webhooks_refused_total", "counter",
    "Events of payment providers that were not, and those of another account or mode, by why.", ("provider", "code"),
)  # fmt: skip

DECLARED: tuple[Metric, ...] = (
    REQUESTS, SECONDS, IN_FLIGHT, EDGE_STREAMS, POOL, HASHES, REDIS, CERT_EVENTS, CERT_REFUSED, WEBHOOKS, WEBHOOKS_REFUSED,
)  # fmt: skip


def read(state: Any) -> Iterator[Sample]:
    """The values of this moment; ``state`` is that of the app (``control/app.py``)."""
    tally: Tally = state.tally
    for status, count in zip(STATUSES, tally.statuses, strict=True):
        yield REQUESTS, (status,), count
    yield SECONDS, (), tally.seconds
    yield IN_FLIGHT, (), tally.in_flight
    yield EDGE_STREAMS, (), state.edge_hub.streams
    in_use, idle = state.db.connections()
    yield POOL, ("in_use",), in_use
    yield POOL, ("idle",), idle
    yield HASHES, (), state.passwords.waiting
    yield REDIS, (), float(state.redis is not None and state.redis.available)
    intake = state.cert_ingest.intake
    for outcome, count in intake.outcomes.items():
        yield CERT_EVENTS, (outcome,), count
    for code, count in intake.refusals.items():
        yield CERT_REFUSED, (code,), count
    webhooks = state.billing_webhooks.intake
    for names, count in webhooks.outcomes.items():
        yield WEBHOOKS, names, count
    for names, count in webhooks.refusals.items():
        yield WEBHOOKS_REFUSED, names, count
