"""Columns that most tables have, and moments as SQL says them.

What a column is here is what the migrations made it: a change is a migration of every table that has it.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa


def time(name: str, *, required: bool = False) -> sa.Column[Any]:
    """A moment, with its zone."""
    return sa.Column(name, sa.DateTime(timezone=True), nullable=not required)


def now(name: str) -> sa.Column[Any]:
    """A moment that is the transaction's unless the row says otherwise; never null."""
    return sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())


def created() -> sa.Column[Any]:
    """When the row was made."""
    return now("created_at")


def seconds(value: float) -> sa.ColumnElement[Any]:
    """An interval."""
    return sa.func.make_interval(0, 0, 0, 0, 0, 0, float(value))


def ago(value: float) -> sa.ColumnElement[Any]:
    """The moment that many seconds before the transaction's."""
    return sa.func.now() - seconds(value)
