"""Tables of the ways in: links by mail, authenticator apps, recovery codes, passkeys. Read and written by ``account_store.py``.

A person is a row of ``users``; every way in is a row of its own that points at it, and none of them has to be there. What
another provider says about a person (OIDC, SAML, SCIM) will be such a row too: docs/explanation/security-model.md.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from portico.kit import columns
from portico.kit.db import metadata


def _user(*, primary_key: bool = False, required: bool = True) -> sa.Column[object]:
    return sa.Column(
        "user_id",
        sa.Text,
        sa.ForeignKey("users.id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=not required,
        index=not primary_key,
    )


# Secrets with one use: what a mail carries, and what stands between the first and the second step of a sign-in.
account_tokens = sa.Table(
    "account_tokens",
    metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("purpose", sa.Text, nullable=False),
    # Null only inside the part of a transaction that is undone, where an unknown address costs what a known one costs.
    _user(required=False),
    # The address that the token was made for: worth nothing once the person has another.
    sa.Column("email", sa.Text, nullable=False),
    columns.created(),
    columns.time("expires_at", required=True),
    columns.time("used_at"),
    sa.CheckConstraint("purpose IN ('verify', 'reset', 'change', 'sign_in')", name="purpose"),
    sa.Index(None, "expires_at"),
)

# The key that a person's authenticator app shares with us (RFC 6238); unconfirmed until a code has shown that it does.
totp_keys = sa.Table(
    "totp_keys",
    metadata,
    _user(primary_key=True),
    sa.Column("sealed_secret", sa.LargeBinary, nullable=False),
    # The last time step whose code was accepted: neither it nor an earlier one is accepted again.
    sa.Column("last_step", sa.BigInteger, nullable=False, server_default="0"),
    columns.created(),
    columns.time("confirmed_at"),
)

recovery_codes = sa.Table(
    "recovery_codes",
    metadata,
    _user(primary_key=True),
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    columns.created(),
    columns.time("used_at"),
)

passkeys = sa.Table(
    "passkeys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    _user(),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("credential_id", sa.LargeBinary, nullable=False, unique=True),
    # COSE key (RFC 9052).
    sa.Column("public_key", sa.LargeBinary, nullable=False),
    sa.Column("sign_count", sa.BigInteger, nullable=False),
    sa.Column("transports", ARRAY(sa.Text), nullable=False, server_default="{}"),
    sa.Column("aaguid", sa.Text, nullable=False),
    # Whether the authenticator keeps copies elsewhere (synchronized passkeys).
    sa.Column("backed_up", sa.Boolean, nullable=False),
    columns.created(),
    columns.time("last_used_at"),
)

passkey_challenges = sa.Table(
    "passkey_challenges",
    metadata,
    sa.Column("challenge", sa.LargeBinary, primary_key=True),
    sa.Column("purpose", sa.Text, nullable=False),
    # Whose challenge it is: a sign-in session, or the first step of a sign-in; null for a sign-in without a name.
    sa.Column("bound_to", sa.Text),
    _user(required=False),
    columns.time("expires_at", required=True),
    sa.CheckConstraint("purpose IN ('register', 'sign_in', 'second_step', 'step_up')", name="purpose"),
    sa.Index(None, "expires_at"),
)
