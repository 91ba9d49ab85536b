"""Finance events, the double-entry ledger, its seals, recognition of deferred revenue, and what is derived from them.

New tables: code before this step does not know them. What is written once is guarded twice: a trigger refuses UPDATE, DELETE
and TRUNCATE to everybody, superusers among them, and the privileges are taken from the role that owns the tables. So no
foreign key leads to these tables: checking it would need the privilege to lock their rows.
"""

from __future__ import annotations

from alembic import op

revision = "0027"
down_revision = "0026"

TABLES = """
CREATE TABLE ledger_chains (
    chain text NOT NULL,
    log text NOT NULL CONSTRAINT ledger_chains_log_check CHECK (log IN ('events', 'ledger')),
    seq bigint NOT NULL,
    hash bytea NOT NULL,
    CONSTRAINT ledger_chains_pkey PRIMARY KEY (chain, log)
);
CREATE TABLE billing_finance_events (
    id text CONSTRAINT billing_finance_events_pkey PRIMARY KEY,
    chain text NOT NULL,
    seq bigint NOT NULL,
    hash bytea NOT NULL,
    recorded_at timestamptz NOT NULL,
    provider text NOT NULL,
    account text NOT NULL,
    livemode boolean NOT NULL,
    event_id text NOT NULL,
    event_type text NOT NULL,
    api_version text,
    kind text NOT NULL,
    occurred_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL,
    raw_sha256 bytea NOT NULL,
    effect_key text NOT NULL,
    organization_id text,
    customer_ref text,
    subscription_ref text,
    invoice_ref text,
    payment_ref text,
    refund_ref text,
    dispute_ref text,
    payout_ref text,
    checkout_ref text,
    status text,
    plan_ref text,
    cancel_at_period_end boolean,
    amount_minor bigint,
    tax_minor bigint,
    fee_minor bigint,
    net_minor bigint,
    currency text CONSTRAINT billing_finance_events_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    period_start timestamptz,
    period_end timestamptz,
    attempt integer,
    next_attempt_at timestamptz,
    is_final_attempt boolean,
    failure_code text,
    object_version bigint NOT NULL,
    invoice_number text,
    lines jsonb NOT NULL,
    CONSTRAINT billing_finance_events_chain_seq_key UNIQUE (chain, seq),
    CONSTRAINT billing_finance_events_effect_key UNIQUE (provider, account, livemode, effect_key)
);
CREATE INDEX billing_finance_events_organization_id_id_ix ON billing_finance_events (organization_id, id);
CREATE INDEX billing_finance_events_invoice_ref_ix ON billing_finance_events (invoice_ref);
CREATE INDEX billing_finance_events_refund_ref_ix ON billing_finance_events (refund_ref);
CREATE INDEX billing_finance_events_payout_ref_ix ON billing_finance_events (payout_ref);
CREATE TABLE ledger_transactions (
    id text CONSTRAINT ledger_transactions_pkey PRIMARY KEY,
    number bigint GENERATED ALWAYS AS IDENTITY,
    chain text NOT NULL,
    seq bigint NOT NULL,
    hash bytea NOT NULL,
    key text NOT NULL,
    kind text NOT NULL,
    organization_id text,
    booked_on date NOT NULL,
    occurred_at timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL,
    provider text,
    provider_account text,
    subscription_ref text,
    invoice_ref text,
    payment_ref text,
    plan_ref text,
    source text,
    reverses text,
    note text,
    posting_count smallint NOT NULL CONSTRAINT ledger_transactions_posting_count_check CHECK (posting_count >= 2),
    CONSTRAINT ledger_transactions_number_key UNIQUE (number),
    CONSTRAINT ledger_transactions_chain_seq_key UNIQUE (chain, seq),
    CONSTRAINT ledger_transactions_key_key UNIQUE (key),
    CONSTRAINT ledger_transactions_reverses_key UNIQUE (reverses)
);
CREATE INDEX ledger_transactions_organization_id_number_ix ON ledger_transactions (organization_id, number);
CREATE INDEX ledger_transactions_booked_on_ix ON ledger_transactions (booked_on);
CREATE INDEX ledger_transactions_invoice_ref_ix ON ledger_transactions (invoice_ref);
CREATE INDEX ledger_transactions_payment_ref_ix ON ledger_transactions (payment_ref);
CREATE TABLE ledger_postings (
    transaction_id text NOT NULL,
    position smallint NOT NULL,
    organization_id text,
    account text NOT NULL,
    currency text NOT NULL CONSTRAINT ledger_postings_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    amount_minor bigint NOT NULL CONSTRAINT ledger_postings_amount_minor_check
        CHECK (amount_minor <> 0 AND abs(amount_minor) < 9007199254740992),
    provider text,
    invoice_ref text,
    booked_on date NOT NULL,
    CONSTRAINT ledger_postings_pkey PRIMARY KEY (transaction_id, position)
);
CREATE INDEX ledger_postings_account_ix ON ledger_postings (account, currency, provider);
CREATE INDEX ledger_postings_organization_id_ix ON ledger_postings (organization_id, account, currency);
CREATE INDEX ledger_postings_booked_on_ix ON ledger_postings (booked_on);
CREATE INDEX ledger_postings_invoice_ref_ix ON ledger_postings (invoice_ref) WHERE invoice_ref IS NOT NULL;
CREATE TABLE ledger_seals (
    ends_on date CONSTRAINT ledger_seals_pkey PRIMARY KEY,
    starts_on date NOT NULL,
    transactions bigint NOT NULL,
    digest bytea NOT NULL,
    totals jsonb NOT NULL,
    previous bytea NOT NULL,
    hash bytea NOT NULL,
    sealed_by text NOT NULL,
    sealed_at timestamptz NOT NULL,
    CONSTRAINT ledger_seals_days_check CHECK (starts_on < ends_on)
);
CREATE TABLE ledger_recognition (
    id text CONSTRAINT ledger_recognition_pkey PRIMARY KEY,
    source text NOT NULL,
    invoice_ref text NOT NULL,
    line integer NOT NULL,
    organization_id text,
    provider text NOT NULL,
    subscription_ref text,
    plan_ref text,
    currency text NOT NULL,
    total_minor bigint NOT NULL,
    starts_at timestamptz NOT NULL,
    ends_at timestamptz NOT NULL,
    next_on date NOT NULL,
    recognized_minor bigint NOT NULL,
    done boolean NOT NULL,
    CONSTRAINT ledger_recognition_line_key UNIQUE (source, invoice_ref, line),
    CONSTRAINT ledger_recognition_period_check CHECK (starts_at <= ends_at),
    CONSTRAINT ledger_recognition_recognized_check CHECK (NOT done OR recognized_minor IN (0, total_minor))
);
CREATE INDEX ledger_recognition_due_ix ON ledger_recognition (next_on) WHERE NOT done;
CREATE TABLE revenue_daily (
    day date NOT NULL,
    organization_id text NOT NULL,
    plan_ref text NOT NULL,
    currency text NOT NULL,
    gross_minor bigint NOT NULL,
    refund_minor bigint NOT NULL,
    tax_minor bigint NOT NULL,
    fee_minor bigint NOT NULL,
    net_minor bigint NOT NULL,
    recognized_minor bigint NOT NULL,
    deferred_minor bigint NOT NULL,
    CONSTRAINT revenue_daily_pkey PRIMARY KEY (day, organization_id, plan_ref, currency)
);
CREATE INDEX revenue_daily_organization_id_day_ix ON revenue_daily (organization_id, day);
CREATE TABLE revenue_progress (
    id smallint CONSTRAINT revenue_progress_pkey PRIMARY KEY,
    number bigint NOT NULL
);
INSERT INTO revenue_progress (id, number) VALUES (1, 0);
CREATE TABLE mrr_movements (
    id text CONSTRAINT mrr_movements_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    subscription_id text NOT NULL,
    currency text NOT NULL,
    moved_on date NOT NULL,
    kind text NOT NULL CONSTRAINT mrr_movements_kind_check
        CHECK (kind IN ('new', 'expansion', 'contraction', 'churn', 'reactivation')),
    delta_minor bigint NOT NULL CONSTRAINT mrr_movements_delta_minor_check CHECK (delta_minor <> 0),
    total_minor bigint NOT NULL,
    plan text,
    cause text NOT NULL,
    recorded_at timestamptz NOT NULL,
    CONSTRAINT mrr_movements_cause_key UNIQUE (subscription_id, currency, cause)
);
CREATE INDEX mrr_movements_organization_id_ix ON mrr_movements (organization_id, currency, id);
CREATE INDEX mrr_movements_moved_on_ix ON mrr_movements (moved_on)
"""

WRITTEN_ONCE = ("billing_finance_events", "ledger_transactions", "ledger_postings", "ledger_seals", "mrr_movements")

# One statement each: a function's body has semicolons.
GUARDS = (
    """
CREATE FUNCTION finance_written_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rows of % are written once', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END $$
""",
    # The end of a chain only moves on.
    """
CREATE FUNCTION ledger_chains_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.chain = OLD.chain AND NEW.log = OLD.log AND NEW.seq > OLD.seq THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'the end of a chain only moves on' USING ERRCODE = 'insufficient_privilege';
END $$
""",
    "CREATE TRIGGER ledger_chains_guard BEFORE UPDATE OR DELETE ON ledger_chains "
    "FOR EACH ROW EXECUTE FUNCTION ledger_chains_guard()",
    "CREATE TRIGGER ledger_chains_guard_truncate BEFORE TRUNCATE ON ledger_chains "
    "FOR EACH STATEMENT EXECUTE FUNCTION finance_written_once()",
    # Whether a transaction is whole: all of its postings, no other, and zero in every currency. Asked at the commit.
    """
CREATE FUNCTION ledger_balanced() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    asked text;
    wanted bigint;
    found bigint;
    off text;
BEGIN
    IF TG_TABLE_NAME = 'ledger_transactions' THEN
        asked := NEW.id;
    ELSE
        asked := NEW.transaction_id;
    END IF;
    SELECT posting_count INTO wanted FROM ledger_transactions WHERE id = asked;
    SELECT count(*) INTO found FROM ledger_postings WHERE transaction_id = asked;
    IF wanted IS NULL OR wanted <> found THEN
        RAISE EXCEPTION 'transaction % has % postings, not %', asked, found, coalesce(wanted, 0)
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'ledger_balanced';
    END IF;
    SELECT currency || ' ' || sum(amount_minor) INTO off FROM ledger_postings WHERE transaction_id = asked
    GROUP BY currency HAVING sum(amount_minor) <> 0 LIMIT 1;
    IF off IS NOT NULL THEN
        RAISE EXCEPTION 'transaction % is off by %', asked, off
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'ledger_balanced';
    END IF;
    RETURN NULL;
END $$
""",
    "CREATE CONSTRAINT TRIGGER ledger_balanced AFTER INSERT ON ledger_transactions "
    "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION ledger_balanced()",
    "CREATE CONSTRAINT TRIGGER ledger_balanced AFTER INSERT ON ledger_postings "
    "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION ledger_balanced()",
    """
CREATE FUNCTION ledger_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.booked_on < (SELECT max(ends_on) FROM ledger_seals) THEN
        RAISE EXCEPTION 'the period of % is sealed', NEW.booked_on
            USING ERRCODE = 'integrity_constraint_violation', CONSTRAINT = 'ledger_open';
    END IF;
    RETURN NEW;
END $$
""",
    "CREATE TRIGGER ledger_open BEFORE INSERT ON ledger_transactions FOR EACH ROW EXECUTE FUNCTION ledger_open()",
    "CREATE TRIGGER ledger_open BEFORE INSERT ON ledger_postings FOR EACH ROW EXECUTE FUNCTION ledger_open()",
)


def upgrade() -> None:
    """Add the tables and what guards them."""
    for statement in TABLES.split(";\n"):
        op.execute(statement)
    for statement in GUARDS:
        op.execute(statement)
    for table in WRITTEN_ONCE:
        op.execute(
            f"CREATE TRIGGER written_once BEFORE UPDATE OR DELETE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION finance_written_once()"
        )
        op.execute(
            f"CREATE TRIGGER written_once_truncate BEFORE TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION finance_written_once()"
        )
        op.execute(f"REVOKE UPDATE, DELETE, TRUNCATE ON {table} FROM PUBLIC, CURRENT_USER")
