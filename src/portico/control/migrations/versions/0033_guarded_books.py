"""The database itself keeps chains whole, seals in a row and numbers without gaps; and indexes of lists and comparisons.

Whatever is refused from here on is something that no code ever did: rows that do not follow the end of their chain, postings that
count for another day than their transaction, a seal that does not follow the last, a number that no document has. So it is safe
for the code before it.
"""

from __future__ import annotations

from alembic import op

revision = "0033"
down_revision = "0032"

INDEXES = (
    "CREATE INDEX billing_finance_events_account_occurred_at_ix "
    "ON billing_finance_events (provider, account, livemode, occurred_at)",
    "CREATE INDEX billing_finance_events_kind_ix ON billing_finance_events (kind, id)",
    "CREATE INDEX billing_finance_events_subscription_ref_ix ON billing_finance_events (subscription_ref) "
    "WHERE kind IN ('invoice.issued', 'invoice.credited')",
    "CREATE INDEX ledger_transactions_kind_ix ON ledger_transactions (kind, number)",
)

FUNCTIONS = (
    # A transaction is whole: all of its postings, no other, of its day and organization, and zero in every currency.
    """
CREATE OR REPLACE FUNCTION ledger_balanced() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    asked text;
    own record;
    found record;
BEGIN
    IF TG_TABLE_NAME = 'ledger_transactions' THEN
        asked := NEW.id;
    ELSE
        asked := NEW.transaction_id;
    END IF;
    SELECT posting_count, booked_on, organization_id INTO own FROM ledger_transactions WHERE id = asked;
    SELECT coalesce(sum(c.parts), 0) AS parts, bool_or(c.strays) AS strays,
        min(c.currency || ' ' || c.total) FILTER (WHERE c.total <> 0) AS off INTO found
    FROM (
        SELECT p.currency, count(*) AS parts, sum(p.amount_minor) AS total,
            bool_or(p.booked_on <> own.booked_on OR p.organization_id IS DISTINCT FROM own.organization_id) AS strays
        FROM ledger_postings p WHERE p.transaction_id = asked GROUP BY p.currency
    ) AS c;
    IF own.posting_count IS NULL OR own.posting_count <> found.parts THEN
        RAISE EXCEPTION 'transaction % has % postings, not %', asked, found.parts, coalesce(own.posting_count, 0)
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'ledger_balanced';
    END IF;
    IF found.off IS NOT NULL THEN
        RAISE EXCEPTION 'transaction % is off by %', asked, found.off
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'ledger_balanced';
    END IF;
    IF found.strays THEN
        RAISE EXCEPTION 'a posting of % is of another day or organization', asked
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'ledger_balanced';
    END IF;
    RETURN NULL;
END $$
""",
    # Nothing comes into a sealed period, neither beside the seal: whoever writes waits for it, as ledger.post does.
    """
CREATE OR REPLACE FUNCTION ledger_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(8101820099023168615);
    IF NEW.booked_on < (SELECT max(ends_on) FROM ledger_seals) THEN
        RAISE EXCEPTION 'the period of % is sealed', NEW.booked_on
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'ledger_open';
    END IF;
    RETURN NEW;
END $$
""",
    # A row stands right behind the end of its own chain …
    """
CREATE FUNCTION ledger_follows() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    ends_at bigint;
BEGIN
    SELECT c.seq INTO ends_at FROM ledger_chains c WHERE c.chain = NEW.chain
        AND c.log = CASE TG_TABLE_NAME WHEN 'ledger_transactions' THEN 'ledger' ELSE 'events' END;
    IF NEW.chain <> coalesce(NEW.organization_id, 'platform') OR ends_at IS NULL OR NEW.seq <> ends_at + 1 THEN
        RAISE EXCEPTION 'number % does not follow the end of chain %', NEW.seq, NEW.chain
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'ledger_follows';
    END IF;
    RETURN NEW;
END $$
""",
    # … and at the commit it is the end, or another one stands behind it.
    """
CREATE FUNCTION ledger_linked() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM ledger_chains c WHERE c.chain = NEW.chain AND c.seq >= NEW.seq
            AND c.log = CASE TG_TABLE_NAME WHEN 'ledger_transactions' THEN 'ledger' ELSE 'events' END
    ) THEN
        RAISE EXCEPTION 'chain % ends before its number %', NEW.chain, NEW.seq
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'ledger_linked';
    END IF;
    RETURN NULL;
END $$
""",
    # The end of a chain moves on by one, to a row that is there.
    """
CREATE OR REPLACE FUNCTION ledger_chains_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.seq = 0 AND NEW.hash = decode(repeat('00', 32), 'hex') THEN
            RETURN NEW;
        END IF;
    ELSIF TG_OP = 'UPDATE' AND NEW.chain = OLD.chain AND NEW.log = OLD.log AND NEW.seq = OLD.seq + 1 THEN
        IF NEW.log = 'ledger' AND EXISTS (
            SELECT FROM ledger_transactions t WHERE t.chain = NEW.chain AND t.seq = NEW.seq AND t.hash = NEW.hash
        ) THEN
            RETURN NEW;
        END IF;
        IF NEW.log = 'events' AND EXISTS (
            SELECT FROM billing_finance_events e WHERE e.chain = NEW.chain AND e.seq = NEW.seq AND e.hash = NEW.hash
        ) THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'the end of a chain only moves on' USING ERRCODE = 'insufficient_privilege';
END $$
""",
    # A seal follows the last one, and is about days that were over when it was made.
    """
CREATE FUNCTION ledger_seals_guard() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    newest record;
BEGIN
    SELECT ends_on, hash INTO newest FROM ledger_seals ORDER BY ends_on DESC LIMIT 1;
    IF NEW.ends_on > (NEW.sealed_at AT TIME ZONE 'UTC')::date
        OR (FOUND AND (NEW.starts_on <> newest.ends_on OR NEW.previous <> newest.hash))
    THEN
        RAISE EXCEPTION 'a seal follows the last, and closes what is over' USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END $$
""",
    # What is to be recognized was fixed when it was invoiced; how far that is moves on.
    """
CREATE FUNCTION ledger_recognition_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.next_on >= OLD.next_on AND NOT (OLD.done AND NOT NEW.done)
        AND (to_jsonb(NEW) - ARRAY['next_on', 'recognized_minor', 'done'])
          = (to_jsonb(OLD) - ARRAY['next_on', 'recognized_minor', 'done'])
    THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'what is to be recognized does not change' USING ERRCODE = 'insufficient_privilege';
END $$
""",
    # At the commit, the number that a series came to is that of a document …
    """
CREATE FUNCTION billing_number_used() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.series = 'invoice' AND EXISTS (
        SELECT FROM billing_invoices i WHERE i.entity_id = NEW.entity_id AND i.year = NEW.year AND i.sequence = NEW.last
    ) THEN
        RETURN NULL;
    END IF;
    IF NEW.series = 'credit_note' AND EXISTS (
        SELECT FROM billing_credit_notes n WHERE n.entity_id = NEW.entity_id AND n.year = NEW.year AND n.sequence = NEW.last
    ) THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'numbers have no gaps: nothing has number % of %', NEW.last, NEW.year
        USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'billing_number_used';
END $$
""",
    # … and no document has a number that was not drawn.
    """
CREATE FUNCTION billing_number_drawn() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.number IS NOT NULL AND NOT EXISTS (
        SELECT FROM billing_number_series s WHERE s.entity_id = NEW.entity_id AND s.year = NEW.year
            AND s.series = CASE TG_TABLE_NAME WHEN 'billing_invoices' THEN 'invoice' ELSE 'credit_note' END
            AND NEW.sequence BETWEEN 1 AND s.last
    ) THEN
        RAISE EXCEPTION 'number % was not drawn', NEW.number
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'billing_number_drawn';
    END IF;
    RETURN NULL;
END $$
""",
)

_AT_COMMIT = "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION"

TRIGGERS = (
    "DROP TRIGGER ledger_chains_guard ON ledger_chains",
    "CREATE TRIGGER ledger_chains_guard BEFORE INSERT OR UPDATE OR DELETE ON ledger_chains "
    "FOR EACH ROW EXECUTE FUNCTION ledger_chains_guard()",
    *(
        statement
        for table in ("billing_finance_events", "ledger_transactions")
        for statement in (
            f"CREATE TRIGGER ledger_follows BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION ledger_follows()",
            f"CREATE CONSTRAINT TRIGGER ledger_linked AFTER INSERT ON {table} {_AT_COMMIT} ledger_linked()",
        )
    ),
    "CREATE TRIGGER ledger_seals_guard BEFORE INSERT ON ledger_seals FOR EACH ROW EXECUTE FUNCTION ledger_seals_guard()",
    "CREATE TRIGGER ledger_recognition_guard BEFORE UPDATE OR DELETE ON ledger_recognition "
    "FOR EACH ROW EXECUTE FUNCTION ledger_recognition_guard()",
    "CREATE TRIGGER ledger_recognition_guard_truncate BEFORE TRUNCATE ON ledger_recognition "
    "FOR EACH STATEMENT EXECUTE FUNCTION finance_written_once()",
    "CREATE CONSTRAINT TRIGGER billing_number_used AFTER INSERT OR UPDATE ON billing_number_series "
    f"{_AT_COMMIT} billing_number_used()",
    *(
        f"CREATE CONSTRAINT TRIGGER billing_number_drawn AFTER INSERT OR UPDATE OF number ON {table} "
        f"{_AT_COMMIT} billing_number_drawn()"
        for table in ("billing_invoices", "billing_credit_notes")
    ),
)


def upgrade() -> None:
    """Add the indexes and the guards."""
    for statement in (*INDEXES, *FUNCTIONS, *TRIGGERS):
        op.execute(statement)
