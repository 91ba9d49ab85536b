"""Invoices, credit notes, their numbers and tax records, who sells, and what customers say about themselves.

New tables: code before this step does not know them. What an invoice says cannot change once it has its number, and neither it
nor its number goes away; tax records are written once.
"""

from __future__ import annotations

from alembic import op

revision = "0032"
down_revision = "0031"

TABLES = """
CREATE TABLE billing_entities (
    id text CONSTRAINT billing_entities_pkey PRIMARY KEY,
    name text NOT NULL,
    address text NOT NULL,
    country text,
    tax_id text,
    email text,
    footer text NOT NULL,
    invoice_prefix text NOT NULL,
    credit_note_prefix text NOT NULL,
    rounding text NOT NULL CONSTRAINT billing_entities_rounding_check CHECK (rounding IN ('half_up', 'half_even', 'down')),
    rates jsonb NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO billing_entities (id, name, address, footer, invoice_prefix, credit_note_prefix, rounding, rates)
    VALUES ('default', 'Portico', '', '', 'INV', 'CRN', 'half_up', '{}');
CREATE TABLE billing_profiles (
    organization_id text CONSTRAINT billing_profiles_pkey PRIMARY KEY,
    name text NOT NULL,
    address text NOT NULL,
    country text,
    email text,
    tax_ids jsonb NOT NULL,
    exempt boolean NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE billing_number_series (
    entity_id text NOT NULL,
    series text NOT NULL CONSTRAINT billing_number_series_series_check CHECK (series IN ('invoice', 'credit_note')),
    year smallint NOT NULL,
    last bigint NOT NULL,
    CONSTRAINT billing_number_series_pkey PRIMARY KEY (entity_id, series, year)
);
CREATE TABLE billing_invoices (
    id text CONSTRAINT billing_invoices_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    provider text NOT NULL,
    account text NOT NULL,
    livemode boolean NOT NULL,
    provider_ref text NOT NULL,
    provider_number text,
    subscription_ref text,
    plan_ref text,
    status text NOT NULL CONSTRAINT billing_invoices_status_check
        CHECK (status IN ('pending', 'open', 'paid', 'void', 'uncollectible')),
    entity_id text,
    year smallint,
    sequence bigint,
    number text,
    currency text CONSTRAINT billing_invoices_currency_check CHECK (currency ~ '^[A-Z]{3}$'),
    net_minor bigint NOT NULL DEFAULT 0,
    tax_minor bigint NOT NULL DEFAULT 0,
    gross_minor bigint NOT NULL DEFAULT 0,
    paid_minor bigint NOT NULL DEFAULT 0,
    credited_minor bigint NOT NULL DEFAULT 0,
    credited_tax_minor bigint NOT NULL DEFAULT 0,
    lines jsonb NOT NULL DEFAULT '[]',
    seller jsonb,
    customer jsonb,
    period_start timestamptz,
    period_end timestamptz,
    issued_at timestamptz,
    paid_at timestamptz,
    voided_at timestamptz,
    uncollectible_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_invoices_provider_ref_key UNIQUE (provider, account, livemode, provider_ref),
    CONSTRAINT billing_invoices_number_key UNIQUE (entity_id, number),
    CONSTRAINT billing_invoices_sequence_key UNIQUE (entity_id, year, sequence),
    CONSTRAINT billing_invoices_numbered_check CHECK ((number IS NULL) = (issued_at IS NULL)),
    CONSTRAINT billing_invoices_gross_check CHECK (gross_minor = net_minor + tax_minor)
);
CREATE INDEX billing_invoices_organization_id_id_ix ON billing_invoices (organization_id, id);
CREATE TABLE billing_credit_notes (
    id text CONSTRAINT billing_credit_notes_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    provider text NOT NULL,
    account text NOT NULL,
    livemode boolean NOT NULL,
    refund_ref text NOT NULL,
    invoice_id text,
    status text NOT NULL CONSTRAINT billing_credit_notes_status_check CHECK (status IN ('pending', 'issued', 'void')),
    entity_id text,
    year smallint,
    sequence bigint,
    number text,
    currency text,
    net_minor bigint NOT NULL DEFAULT 0,
    tax_minor bigint NOT NULL DEFAULT 0,
    gross_minor bigint NOT NULL DEFAULT 0,
    issued_at timestamptz,
    voided_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT billing_credit_notes_refund_ref_key UNIQUE (provider, account, livemode, refund_ref),
    CONSTRAINT billing_credit_notes_number_key UNIQUE (entity_id, number),
    CONSTRAINT billing_credit_notes_sequence_key UNIQUE (entity_id, year, sequence),
    CONSTRAINT billing_credit_notes_numbered_check CHECK ((number IS NULL) = (issued_at IS NULL))
);
CREATE INDEX billing_credit_notes_organization_id_ix ON billing_credit_notes (organization_id, id);
CREATE INDEX billing_credit_notes_invoice_id_ix ON billing_credit_notes (invoice_id);
CREATE TABLE billing_tax_records (
    id text CONSTRAINT billing_tax_records_pkey PRIMARY KEY,
    organization_id text NOT NULL,
    invoice_id text NOT NULL,
    credit_note_id text,
    line integer NOT NULL,
    jurisdiction text NOT NULL,
    treatment text NOT NULL CONSTRAINT billing_tax_records_treatment_check
        CHECK (treatment IN ('standard', 'reverse_charge', 'exempt', 'zero', 'out_of_scope')),
    rate_bp integer NOT NULL,
    currency text NOT NULL,
    base_minor bigint NOT NULL,
    tax_minor bigint NOT NULL,
    difference_minor bigint NOT NULL,
    customer_tax_id text,
    evidence jsonb NOT NULL,
    rounding text NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX billing_tax_records_invoice_id_ix ON billing_tax_records (invoice_id);
CREATE INDEX billing_tax_records_organization_id_ix ON billing_tax_records (organization_id, id)
"""

GUARDS = (
    """
CREATE FUNCTION billing_numbered_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF OLD.number IS NULL THEN
            RETURN OLD;
        END IF;
    ELSIF OLD.number IS NULL THEN
        RETURN NEW;
    ELSIF (to_jsonb(NEW) - ARRAY['status', 'paid_minor', 'paid_at', 'credited_minor', 'credited_tax_minor', 'voided_at',
                                 'uncollectible_at'])
        = (to_jsonb(OLD) - ARRAY['status', 'paid_minor', 'paid_at', 'credited_minor', 'credited_tax_minor', 'voided_at',
                                 'uncollectible_at']) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'what % has a number does not change', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END $$
""",
    # Numbers have no gaps: a series starts at 1 and moves on by one.
    """
CREATE FUNCTION billing_number_series_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (TG_OP = 'INSERT' AND NEW.last = 1) OR (
        TG_OP = 'UPDATE' AND NEW.last = OLD.last + 1
        AND (NEW.entity_id, NEW.series, NEW.year) = (OLD.entity_id, OLD.series, OLD.year)
    ) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'numbers have no gaps' USING ERRCODE = 'insufficient_privilege';
END $$
""",
    "CREATE TRIGGER billing_number_series_guard BEFORE INSERT OR UPDATE OR DELETE ON billing_number_series "
    "FOR EACH ROW EXECUTE FUNCTION billing_number_series_guard()",
    "CREATE TRIGGER written_once BEFORE UPDATE OR DELETE ON billing_tax_records "
    "FOR EACH ROW EXECUTE FUNCTION finance_written_once()",
    "REVOKE UPDATE, DELETE, TRUNCATE ON billing_tax_records FROM PUBLIC, CURRENT_USER",
)


def upgrade() -> None:
    """Add the tables and what guards them."""
    for statement in TABLES.split(";\n"):
        op.execute(statement)
    for statement in GUARDS:
        op.execute(statement)
    for table in ("billing_invoices", "billing_credit_notes"):
        op.execute(
            f"CREATE TRIGGER billing_numbered_guard BEFORE UPDATE OR DELETE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION billing_numbered_guard()"
        )
    for table in ("billing_invoices", "billing_credit_notes", "billing_number_series", "billing_tax_records"):
        op.execute(
            f"CREATE TRIGGER written_once_truncate BEFORE TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION finance_written_once()"
        )
