"""Settings of payment providers, subscriptions, reports and the books."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from portico.settings.secrets import Secret


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class BillingSettings:
    """Whom money comes through, what they tell us, and what is told of it."""

    __slots__ = ()

    # == Payment providers
    # Whether real money moves: keys and addresses for tests are refused then, and live ones otherwise.
    billing_livemode: bool = False
    # Stripe's secret key (`sk_…`, or a restricted one, `rk_…`); without it Stripe is not used.
    stripe_secret_key: Secret | None = None
    # Secret with which Stripe signs what it sends to us (`whsec_…`, taken as it is).
    stripe_webhook_secret: Secret | None = None
    # The one before, while what was signed with it may still come.
    stripe_webhook_secret_old: Secret | None = None
    # Our account at Stripe (`acct_…`).
    stripe_account: str = ""
    # Prices at Stripe: PLAN=price_…, comma separated.
    stripe_prices: tuple[str, ...] = ()
    # Where Stripe's API is.
    stripe_api_url: str = "https://api.stripe.com"
    # Razorpay's key id (`rzp_…`); without it Razorpay is not used.
    razorpay_key_id: str = ""
    # Secret that goes with it.
    razorpay_key_secret: Secret | None = None
    # Secret with which Razorpay signs what it sends to us; another one than the key's.
    razorpay_webhook_secret: Secret | None = None
    # The one before: Razorpay goes on with it for what it sends again.
    razorpay_webhook_secret_old: Secret | None = None
    # Our account at Razorpay (`acc_…`), as its events name it.
    razorpay_account: str = ""
    # Plans at Razorpay: PLAN=plan_…, comma separated.
    razorpay_plans: tuple[str, ...] = ()
    # Periods after which a subscription at Razorpay ends by itself: it has none without end.
    razorpay_periods: int = 120
    # Seconds for which a page to pay at Razorpay is good.
    razorpay_checkout_seconds: int = 86_400
    # Where Razorpay's API is.
    razorpay_api_url: str = "https://api.razorpay.com"
    # PayPal's client id; without it PayPal is not used.
    paypal_client_id: str = ""
    # Secret that goes with it.
    paypal_client_secret: Secret | None = None
    # Id of our webhook at PayPal, which is part of what PayPal signs.
    paypal_webhook_id: str = ""
    # Our account at PayPal (the merchant id).
    paypal_account: str = ""
    # Plans at PayPal: PLAN=P-…, comma separated.
    paypal_plans: tuple[str, ...] = ()
    # Where PayPal's API is; https://api-m.sandbox.paypal.com is the one for tests.
    paypal_api_url: str = "https://api-m.paypal.com"
    # Hosts from which certificates of PayPal's signatures are fetched, and nowhere else.
    paypal_cert_hosts: tuple[str, ...] = ("api.paypal.com", "api.sandbox.paypal.com")
    # Certificate authorities (PEM) that vouch for those certificates; empty: those of the system.
    paypal_cert_ca_file: Path | None = None
    # Certificate authorities (PEM) that vouch for providers' APIs; empty: those of the system.
    billing_ca_file: Path | None = None
    # Seconds for a provider to accept a connection.
    billing_connect_seconds: float = 5.0
    # Seconds for a provider to answer one request.
    billing_timeout_seconds: float = 20.0
    # Seconds for one call, requests that are made again included; below the lease of a job.
    billing_call_seconds: float = 25.0
    # Times that a request is made again which got no answer, or one that says "later"; under the same idempotency key.
    billing_retries: int = 3
    # Seconds below which the pause before the first of them is drawn; the bound doubles with each.
    billing_retry_min_seconds: float = 0.5
    # The greatest such bound in seconds, and the longest Retry-After that is waited for within a call.
    billing_retry_max_seconds: float = 5.0
    # Bytes of an answer of a provider.
    billing_answer_max_bytes: int = 8_388_608
    # Connections to one provider that a process keeps at most.
    billing_connections: int = 16
    # Calls in a row without an answer after which a provider is left alone.
    billing_circuit_failures: int = 5
    # Seconds for which it is, before one call tries again.
    billing_circuit_seconds: float = 30.0
    # Objects of a page of a provider's list.
    billing_list_page: int = 100
    # Pages of one list that are read at most; a longer one is an error, so that nothing is left out in silence.
    billing_list_pages: int = 1000

    # == Webhooks of payment providers
    # Bytes of one event.
    billing_webhook_max_bytes: int = 262_144
    # Seconds by which the time of an event may be ahead of ours, and that of Stripe's signature behind it.
    billing_webhook_tolerance_seconds: float = 300.0
    # Seconds for which PayPal may go on with a delivery: it tries for three days.
    paypal_webhook_age_seconds: float = 345_600.0
    # Seconds after which an event of Razorpay's is too old: it tries for a day, and people send events again for seven.
    razorpay_webhook_age_seconds: float = 691_200.0
    # Events that one transaction stores at most; while it commits, the next ones gather.
    billing_webhook_group: int = 256
    # Events that wait in one process for their transaction; more are refused for a moment.
    billing_webhook_backlog: int = 4096
    # Events from one network that wait for PayPal's certificate; more are refused for a minute.
    billing_webhook_unproven_per_network: int = 100
    # The same of all networks together.
    billing_webhook_unproven: int = 5000
    # Seconds between two looks of a process for certificates that another one has fetched.
    billing_webhook_certificate_refresh_seconds: float = 1.0
    # Seconds between two records of what was refused why.
    billing_webhook_activity_seconds: float = 1.0
    # Events that one call replays, or says that it would.
    billing_webhook_replay_max: int = 1000
    # Seconds that events are kept; what they led to stays.
    billing_webhook_keep_seconds: int = 34_560_000
    # Seconds that their bodies are kept, sealed; an event without its body cannot be replayed.
    billing_webhook_body_keep_seconds: int = 7_776_000
    # Seconds that it is shown what was stored and turned out to be nobody's.
    billing_webhook_disowned_keep_seconds: int = 86_400
    # Seconds for which an event waits for what it is about (whose it is, its payment); then it is dead, until it is replayed.
    billing_waiting_seconds: float = 604_800.0
    # Seconds before now at which a scheduled comparison with a provider's list ends: what is younger may be on its way.
    billing_reconcile_grace_seconds: float = 300.0
    # Seconds by which it begins before the end of the last one.
    billing_reconcile_overlap_seconds: float = 3600.0
    # Seconds that the first one looks back.
    billing_reconcile_first_seconds: float = 259_200.0

    # == Subscriptions and dunning
    # What use beyond a plan costs: PLAN:LIMIT=CURRENCY:MINOR:PER, as pro:bytes_per_month=EUR:50:1073741824; comma separated.
    overage_prices: tuple[str, ...] = ()
    # Seconds after the end of a month at which its use is priced; what relays report later is charged with the next month.
    overage_lag_seconds: float = 3600.0
    # Minor units of one charge for use above which it waits for an operator instead of being charged by itself.
    overage_review_minor: int = 100_000
    # Days within which the next invoice of a subscription has to come for a charge to wait for it.
    overage_wait_days: float = 40.0
    # Days after a first failed payment on which a notice is sent: the first one of all, then one with each attempt.
    dunning_notice_days: tuple[float, ...] = (0.0, 1.0, 3.0, 7.0)
    # Days after it from which an organization gets no more tunnels, and a slow pace.
    dunning_restrict_days: float = 10.0
    # That pace, in requests a second of all its tunnels together.
    dunning_requests_per_second: int = 5
    # Days after it from which it is on the default plan.
    dunning_suspend_days: float = 14.0
    # Days after it after which what is owed is written off.
    dunning_write_off_days: float = 30.0
    # Days for which a provider's own attempts are waited for before anything is taken away.
    dunning_patience_days: float = 21.0
    # Whether a subscription is ended of which a payment was disputed and lost: the money is gone, and the next one would be.
    dispute_ends_subscription: bool = True
    # Days after a payment for which members can have it given back; operators always can.
    refund_days: float = 14.0
    # Seconds before the end of a period at which we end a subscription whose provider cannot end it with the period.
    billing_cancel_lead_seconds: float = 3600.0

    # == Reports and settlement
    # Reports of money that an organization, and the installation itself, may ask for in a day; schedules come on top.
    reports_per_day: int = 50
    # Schedules of reports that an organization, and the installation itself, may have.
    report_schedules_max: int = 20
    # Days that a report is kept.
    report_days: float = 7.0
    # Bytes of one report.
    report_max_bytes: int = 4_294_967_296
    # Seconds for one report to be read.
    report_seconds: float = 600.0
    # Bytes of a report up to which a webhook brings it itself; of a larger one it brings the link alone.
    report_inline_max_bytes: int = 1_048_576
    # Object store that operators' reports can go to, as s3://BUCKET/PREFIX; empty: none.
    report_store_url: str = ""
    # Its endpoint, where that is not Amazon's.
    report_store_endpoint: str = ""
    # Its region.
    report_store_region: str = "us-east-1"
    # Id of the access key for it; none: what the machine has.
    report_store_key: str | None = None
    # Secret that goes with it.
    report_store_secret: Secret | None = None
    # Seconds for one report to be stored there.
    report_store_timeout_seconds: float = 120.0
    # Seconds by which the timestamp of a settlement receipt may be off, both ways.
    settlement_tolerance_seconds: int = 300
    # Bytes of one settlement receipt, and of one import.
    settlement_receipt_max_bytes: int = 33_554_432
    # Seconds for which refusals of one sink or report, for one reason, share a row of the audit log.
    settlement_refusal_audit_seconds: float = 60.0
    # Days after the end of its period in which an event that comes late opens a settlement again.
    settlement_watch_days: float = 120.0

    # == Finance
    # Rows of a hash chain that one request of GET /v1/admin/ledger/verify checks (rounded up to whole batches).
    ledger_verify_rows: int = 10_000
    # Days that one request for revenue covers at most.
    revenue_days: int = 366
    # TrueType font for invoices as PDF, which is embedded; empty: one that knows the letters of Western Europe alone.
    invoice_font_file: Path | None = None
