"""Audit rows form a hash chain for each organization; they cannot be changed, only erased of personal data.

Safe for the code before: it inserts rows without a number, which the next writer of the organization, or the worker,
adds to the chain. So are rows that are there already: a large table is not held for as long as that takes.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"

STATEMENTS = """
CREATE TABLE audit_chains (
    chain text CONSTRAINT audit_chains_pkey PRIMARY KEY,
    seq bigint NOT NULL,
    hash bytea NOT NULL,
    anchor_seq bigint NOT NULL,
    anchor_hash bytea NOT NULL
);
CREATE TABLE audit_checkpoints (
    chain text NOT NULL,
    seq bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    kid text NOT NULL,
    token text NOT NULL,
    CONSTRAINT audit_checkpoints_pkey PRIMARY KEY (chain, seq)
);
CREATE TABLE audit_checkpoint_keys (
    kid text CONSTRAINT audit_checkpoint_keys_pkey PRIMARY KEY,
    public_x bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE audit_events
    ADD COLUMN chain text,
    ADD COLUMN seq bigint,
    ADD COLUMN hash bytea,
    ADD COLUMN commitments jsonb,
    ADD COLUMN personal jsonb,
    ADD COLUMN salt bytea,
    ADD COLUMN erased_at timestamptz,
    ADD CONSTRAINT audit_events_chain_seq_key UNIQUE (chain, seq);
CREATE INDEX audit_events_unchained_ix ON audit_events (coalesce(organization_id, 'installation'), id) WHERE seq IS NULL
"""

# One statement each: a function's body has semicolons.
GUARDS = (
    """
CREATE FUNCTION audit_events_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        RAISE EXCEPTION 'audit rows are not deleted' USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF TG_OP = 'DELETE' THEN
        -- Retention: only what lies at or before the anchor, which keeps the hash that the rest stands on.
        IF OLD.seq IS NOT NULL AND EXISTS (
            SELECT 1 FROM audit_chains c WHERE c.chain = OLD.chain AND c.anchor_seq >= OLD.seq
        ) THEN
            RETURN OLD;
        END IF;
        RAISE EXCEPTION 'audit rows are not deleted' USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF OLD.seq IS NULL THEN
        IF NEW.seq IS NOT NULL AND
           (NEW.id, NEW.organization_id, NEW.actor_kind, NEW.actor_id, NEW.action, NEW.target, NEW.outcome, NEW.request_id)
           IS NOT DISTINCT FROM
           (OLD.id, OLD.organization_id, OLD.actor_kind, OLD.actor_id, OLD.action, OLD.target, OLD.outcome, OLD.request_id)
        THEN
            RETURN NEW;  -- on its way into the chain
        END IF;
        RAISE EXCEPTION 'audit rows are not changed' USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF (NEW.id, NEW.organization_id, NEW.at, NEW.actor_kind, NEW.actor_id, NEW.action, NEW.target, NEW.outcome,
        NEW.details, NEW.request_id, NEW.chain, NEW.seq, NEW.hash, NEW.commitments)
       IS NOT DISTINCT FROM
       (OLD.id, OLD.organization_id, OLD.at, OLD.actor_kind, OLD.actor_id, OLD.action, OLD.target, OLD.outcome,
        OLD.details, OLD.request_id, OLD.chain, OLD.seq, OLD.hash, OLD.commitments)
       AND NEW.address IS NULL AND NEW.personal IS NULL AND NEW.salt IS NULL AND NEW.erased_at IS NOT NULL THEN
        RETURN NEW;  -- the erasure of personal data
    END IF;
    RAISE EXCEPTION 'audit rows are not changed' USING ERRCODE = 'insufficient_privilege';
END $$
""",
    """
CREATE TRIGGER audit_events_guard BEFORE UPDATE OR DELETE ON audit_events
    FOR EACH ROW EXECUTE FUNCTION audit_events_guard()
""",
    """
CREATE TRIGGER audit_events_guard_truncate BEFORE TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION audit_events_guard()
""",
)


def upgrade() -> None:
    for statement in STATEMENTS.split(";\n"):
        op.execute(statement)
    for statement in GUARDS:
        op.execute(statement)
