"""Identity's tables. Used by identity's own stores alone."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from portico.kit import columns, queue
from portico.kit.db import metadata

# Every version of every plan; a row is never changed.
plans = sa.Table(
    "plans",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("listed", sa.Boolean, nullable=False),
    sa.Column("hard_cap", sa.Boolean, nullable=False),
    sa.Column("limits", JSONB, nullable=False),
    sa.Column("features", ARRAY(sa.Text), nullable=False),
    columns.created(),
)

organizations = sa.Table(
    "organizations",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    # The version of a plan that it keeps until somebody moves it; a new one is on the installation's default_plan.
    sa.Column("plan", sa.Text, nullable=False, server_default="unlimited"),
    sa.Column("plan_version", sa.Integer, nullable=False, server_default="1"),
    # What relays were told of it, and how often that changed (tunnels/standing.py).
    sa.Column("edge_version", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("edge_state", JSONB),
    columns.created(),
    columns.time("suspended_at"),
    # What its people are told.
    sa.Column("suspended_reason", sa.Text),
    # Set while its deletion is under way: asked for, and to be carried out from then on.
    columns.time("deletion_requested_at"),
    columns.time("delete_after"),
    sa.Index("organizations_delete_after_ix", "delete_after", postgresql_where=sa.text("delete_after IS NOT NULL")),
    sa.ForeignKeyConstraint(["plan", "plan_version"], ["plans.id", "plans.version"], name="organizations_plan_fkey"),
    sa.Index("organizations_edge_version_ix", "edge_version", postgresql_where=sa.text("edge_version > 0")),
)

# What an organization has differently from its plan: a limit (null: none), a feature or the hard cap (0 or 1).
plan_overrides = sa.Table(
    "plan_overrides",
    metadata,
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    # Who set it: an operator, or dunning, which restricts who does not pay; of one name dunning's holds.
    sa.Column("source", sa.Text, primary_key=True, server_default="operator"),
    sa.Column("value", sa.BigInteger),
    columns.time("expires_at"),
    columns.created(),
    sa.CheckConstraint("source IN ('operator', 'dunning')", name="source"),
    sa.Index("plan_overrides_expires_at_ix", "expires_at", postgresql_where=sa.text("expires_at IS NOT NULL")),
)

users = sa.Table(
    "users",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Lower-cased and NFC: one address, one account.
    sa.Column("email", sa.Text, nullable=False, unique=True),
    # When somebody showed that mail to the address reaches them; null: not yet.
    columns.time("email_verified_at"),
    # One way in of several (passkeys; later identities of other providers): null for who has no password.
    sa.Column("password_hash", sa.Text),
    # For code older than `operator_grants` alone, which follows this: true while a grant without expiry lives.
    sa.Column("platform_operator", sa.Boolean, nullable=False, server_default=sa.false()),
    columns.created(),
    columns.time("disabled_at"),
)

members = sa.Table(
    "members",
    metadata,
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, index=True),
    sa.Column("role", sa.Text, nullable=False),
    columns.created(),
    # When the person last signed in to it or switched to it: the next sign-in begins there.
    columns.time("last_used_at"),
)

# Platform operators: one live grant a person, given on the machine of the installation and nowhere else. Rows stay.
operator_grants = sa.Table(
    "operator_grants",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("granted_by", sa.Text, nullable=False),
    columns.now("granted_at"),
    sa.Column("reason", sa.Text),
    columns.time("expires_at"),
    columns.time("revoked_at"),
    sa.Column("revoked_by", sa.Text),
    sa.Index("operator_grants_one_live", "user_id", unique=True, postgresql_where=sa.text("revoked_at IS NULL")),
)

# That an owner lets operators in, and what operators began under it.
support_consents = sa.Table(
    "support_consents",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), nullable=False),
    sa.Column("scope", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("given_by", sa.Text, nullable=False),
    columns.created(),
    columns.time("expires_at", required=True),
    columns.time("withdrawn_at"),
    sa.Column("withdrawn_by", sa.Text),
    sa.CheckConstraint("scope IN ('read', 'write')", name="scope"),
    sa.Index("support_consents_organization_id_id_ix", "organization_id", "id"),
)
support_sessions = sa.Table(
    "support_sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column(
        "consent_id", sa.Text, sa.ForeignKey("support_consents.id", ondelete="CASCADE"), nullable=False, index=True
    ),
    sa.Column("organization_id", sa.Text, nullable=False),
    sa.Column("operator_id", sa.Text, nullable=False),
    # In which the operator began it, and with which it ends. No foreign key: old sign-in sessions are deleted.
    sa.Column("sign_in_session", sa.Text, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("reason", sa.Text, nullable=False),
    columns.created(),
    columns.time("expires_at", required=True),
    columns.time("ended_at"),
)

# One operator asks that a person's second factors be taken away, another one confirms.
mfa_resets = sa.Table(
    "mfa_resets",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("requested_by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    columns.created(),
    columns.time("expires_at", required=True),
    sa.Column("confirmed_by", sa.Text),
    columns.time("confirmed_at"),
    columns.time("withdrawn_at"),
)

# The roles that an organization made for itself; ``members.role`` is the name of a built-in role, or the id of one of these.
roles = sa.Table(
    "roles",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("permissions", ARRAY(sa.Text), nullable=False),
    columns.created(),
    columns.time("updated_at", required=True),
    sa.Index("roles_organization_id_name_ix", "organization_id", sa.text("lower(name)"), unique=True),
)

# An invitation to one address. It stands while it is neither accepted nor revoked, and until it expires.
invitations = sa.Table(
    "invitations",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), nullable=False),
    sa.Column("email", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    # Who invites, and must still be able to when it is accepted.
    sa.Column("invited_by", sa.Text, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    # Of the token in the newest mail.
    sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("sends", sa.Integer, nullable=False, server_default="1"),
    columns.created(),
    columns.time("sent_at", required=True),
    columns.time("expires_at", required=True),
    columns.time("accepted_at"),
    sa.Column("accepted_by", sa.Text, sa.ForeignKey("users.id", ondelete="SET NULL"), index=True),
    columns.time("revoked_at"),
    sa.Index(
        "invitations_one_open", "organization_id", "email", unique=True,
        postgresql_where=sa.text("accepted_at IS NULL AND revoked_at IS NULL"),
    ),
    sa.Index("invitations_organization_id_id_ix", "organization_id", "id"),
    sa.Index("invitations_expires_at_ix", "expires_at"),
)  # fmt: skip

# An export of everything an organization has; the row is the job that makes it.
organization_exports = sa.Table(
    "organization_exports",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), nullable=False),
    sa.Column("requested_by", sa.Text, nullable=False),
    columns.created(),
    # Of the finished file; null before.
    sa.Column("file", sa.Text),
    sa.Column("bytes", sa.BigInteger),
    sa.Column("sha256", sa.LargeBinary),
    columns.time("expires_at"),
    *queue.columns(),
    *queue.rules("organization_exports"),
    sa.Index("organization_exports_organization_id_id_ix", "organization_id", "id"),
)

# A sign-in session is the family of its refresh tokens: it ends as one.
sign_in_sessions = sa.Table(
    "sign_in_sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id", ondelete="CASCADE"), nullable=False, index=True),
    # The one that its next access token is for; null for a person who belongs to none.
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), index=True),
    sa.Column("user_agent", sa.Text),
    sa.Column("address", sa.Text),
    # When the person last proved who they are, and by what, in order: pwd, otp, recovery, passkey.
    columns.now("authenticated_at"),
    sa.Column("methods", ARRAY(sa.Text), nullable=False, server_default="{}"),
    columns.created(),
    columns.time("last_used_at", required=True),
    columns.time("expires_at", required=True),
    columns.time("ended_at"),
    sa.Column("end_reason", sa.Text),
    # SHA-256 of the cookie, of a session that lives in a browser (it has no tokens).
    sa.Column("cookie_digest", sa.LargeBinary, unique=True),
)

refresh_tokens = sa.Table(
    "refresh_tokens",
    metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column(
        "session_id", sa.Text, sa.ForeignKey("sign_in_sessions.id", ondelete="CASCADE"), nullable=False, index=True
    ),
    columns.created(),
    columns.time("expires_at", required=True),
    columns.time("used_at"),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    # Null for the operator key alone.
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), index=True),
    # Who made it; null once that person is gone.
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id", ondelete="SET NULL"), index=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("prefix", sa.Text, nullable=False),
    sa.Column("scopes", ARRAY(sa.Text), nullable=False),
    columns.created(),
    columns.time("expires_at"),
    columns.time("last_used_at"),
    columns.time("revoked_at"),
    sa.Column("rotated_from", sa.Text),
    # Networks that it may be used from (kit.networks.canonical); none: from anywhere.
    sa.Column("allowed_cidrs", ARRAY(sa.Text), nullable=False, server_default="{}"),
    sa.Column("last_used_address", sa.Text),
    # Null, or why somebody else than its people ended it: "leaked".
    sa.Column("revoked_reason", sa.Text),
    sa.CheckConstraint("kind IN ('agent', 'api', 'operator')", name="kind"),
    sa.CheckConstraint("(organization_id IS NULL) = (kind = 'operator')", name="organization"),
)

device_codes = sa.Table(
    "device_codes",
    metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("user_code", sa.Text, nullable=False, unique=True),
    sa.Column("hostname", sa.Text, nullable=False),
    sa.Column("address", sa.Text),
    sa.Column("state", sa.Text, nullable=False, server_default="pending"),
    sa.Column("interval_seconds", sa.Integer, nullable=False),
    columns.created(),
    columns.time("expires_at", required=True),
    columns.time("last_polled_at"),
    sa.Column("user_id", sa.Text, sa.ForeignKey("users.id", ondelete="CASCADE"), index=True),
    sa.Column("organization_id", sa.Text, sa.ForeignKey("organizations.id", ondelete="CASCADE"), index=True),
    sa.CheckConstraint("state IN ('pending', 'approved', 'denied', 'used')", name="state"),
    sa.Index(None, "expires_at"),
)

signing_keys = sa.Table(
    "signing_keys",
    metadata,
    sa.Column("kid", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("public_x", sa.LargeBinary, nullable=False),
    # Sealed under the master key; erased when the key retires.
    sa.Column("sealed_seed", sa.LargeBinary),
    columns.created(),
    columns.time("activated_at"),
    columns.time("retired_at"),
    sa.CheckConstraint("state IN ('next', 'active', 'retired')", name="state"),
    sa.Index("signing_keys_one_next_key", "state", unique=True, postgresql_where=sa.text("state = 'next'")),
    sa.Index("signing_keys_one_active_key", "state", unique=True, postgresql_where=sa.text("state = 'active'")),
)

throttles = sa.Table(
    "throttles",
    metadata,
    # SHA-256 of what is counted: an attempted address or e-mail is not kept in clear.
    sa.Column("bucket", sa.LargeBinary, primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
    columns.time("window_ends_at", required=True),
    sa.Index(None, "window_ends_at"),
)
