"""A ledger of what certificate authorities (CAs) allow, kept here so that none of it is spent in vain.

Each limit is a bucket: it holds so many tokens, fills evenly, and an act takes one. They are limits of CAs (Let's Encrypt
publishes its as buckets), counted over all workers in PostgreSQL. An act takes from all its buckets or from none. Renewals inside
of the window that a CA suggests are exempt from its limits (RFC 9773; Let's Encrypt's rules), and take nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from portico.kit.db import HasConnection, Tx, metadata
from portico.settings import ApiSettings

budget = sa.Table(
    "acme_budget",
    metadata,
    sa.Column("directory", sa.Text, primary_key=True),
    sa.Column("bucket", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("tokens", sa.Double, nullable=False),
    sa.Column("at", sa.DateTime(timezone=True), nullable=False),
)

_HOUR: Final = 3600.0
_WEEK: Final = 168 * _HOUR
#: A staging allows at least this many times as much.
STAGING_FACTOR: Final = 5

# What a bucket has by now; a clock that was set back takes nothing away.
_TAKE: Final = """
INSERT INTO acme_budget AS b (directory, bucket, key, tokens, at) VALUES ($1, $2, $3, $4::float8 - 1, clock_timestamp())
ON CONFLICT (directory, bucket, key) DO UPDATE SET at = clock_timestamp(), tokens =
    least($4::float8, b.tokens + greatest(0, extract(epoch FROM clock_timestamp() - b.at)) / $5::float8) - 1
WHERE least($4::float8, b.tokens + greatest(0, extract(epoch FROM clock_timestamp() - b.at)) / $5::float8) >= 1
RETURNING tokens
"""
_WAIT: Final = """
SELECT (greatest(0, 1 - least($4::float8,
    b.tokens + greatest(0, extract(epoch FROM clock_timestamp() - b.at)) / $5::float8)) * $5::float8)::float8
FROM acme_budget AS b WHERE directory = $1 AND bucket = $2 AND key = $3
"""
_TRIM: Final = "DELETE FROM acme_budget WHERE at < now() - interval '8 days'"


@dataclass(frozen=True, slots=True, order=True)
class Claim:
    """One token of a bucket. ``seconds``: in which one comes back."""

    bucket: str
    key: str
    capacity: float
    seconds: float

    def parameters(self, directory: str) -> tuple[Any, ...]:
        return directory, self.bucket, self.key, float(self.capacity), self.seconds


class Spent(Exception):
    """A bucket is empty. ``seconds``: until there is a token."""

    def __init__(self, claim: Claim, seconds: float) -> None:
        super().__init__(f"the budget {claim.bucket} is spent for {seconds:.0f} s")
        self.claim = claim
        self.seconds = seconds


def of_order(settings: ApiSettings, names: Sequence[str], registrable: str, *, staging: bool) -> list[Claim]:
    """What an order takes."""
    if staging:
        return [_claim("orders", "", settings.acme_budget_orders * STAGING_FACTOR, 3 * _HOUR)]
    return [
        _claim("orders", "", settings.acme_budget_orders, 3 * _HOUR),
        _claim("domain", registrable, settings.acme_budget_domain, _WEEK),
        _claim("names", ",".join(sorted(names)), settings.acme_budget_names, _WEEK),
    ]


def of_failure(settings: ApiSettings, name: str, *, staging: bool) -> Claim:
    """What a failed validation takes; who has none left may not try."""
    return _claim("failures", name, settings.acme_budget_failures * (STAGING_FACTOR if staging else 1), _HOUR)


def _claim(bucket: str, key: str, capacity: int, window: float) -> Claim:
    return Claim(bucket, key, capacity, window / max(1, capacity))


async def take(tx: Tx, directory: str, claims: Sequence[Claim]) -> None:
    """Take from all, or from none: raises :class:`Spent`. Buckets are locked until ``tx`` ends, always in the same order."""
    async with tx.savepoint():
        for claim in sorted(claims):
            if await tx.raw.fetchval(_TAKE, *claim.parameters(directory)) is None:
                raise Spent(claim, await wait(tx, directory, [claim]))


async def wait(reader: HasConnection, directory: str, claims: Sequence[Claim]) -> float:
    """Seconds until all have a token; 0 when they do."""
    waits = [await reader.raw.fetchval(_WAIT, *claim.parameters(directory)) or 0.0 for claim in claims]
    return max(waits, default=0.0)


async def trim(tx: Tx) -> None:
    """Forget buckets that are full again."""
    await tx.raw.execute(_TRIM)


async def note(tx: Tx, directory: str, claim: Claim) -> None:
    """What was spent without asking: the bucket may be empty already."""
    try:
        await take(tx, directory, [claim])
    except Spent:
        pass
