"""Settings of background work (`portico worker`). A worker reads those of the API beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from portico.settings.process import ProcessSettings
from portico.settings.secrets import Secret


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class WorkerPlace:
    """What the process stands on, and its queues."""

    __slots__ = ()

    # PostgreSQL, as for the API.
    database_url: Secret
    # Connections that one worker process holds at most, beside the one on which it is told of new jobs.
    database_pool_size: int = 8
    # Seconds for jobs at work to end when the process stops; then they are cancelled and left to another process.
    shutdown_seconds: float = 5.0

    # == Queues
    # Seconds between two looks for jobs of a kind when nobody tells of new ones.
    tick_seconds: float = 1.0
    # Jobs of one kind that one process works on at once.
    queue_concurrency: int = 4
    # Seconds that a job belongs to a process without being renewed: how long the job of a process that died
    # waits. The same in every worker process.
    queue_lease_seconds: float = 30.0
    # Seconds that one attempt at a job may take; then it is cancelled and counts as failed.
    queue_timeout_seconds: float = 300.0
    # Attempts at a job, the first included; after the last that fails it is dead.
    queue_max_attempts: int = 10
    # Seconds below which the pause after a first failure is drawn; the bound doubles with each.
    retry_min_seconds: float = 1.0
    # Longest pause in seconds between two attempts at a job.
    retry_max_seconds: float = 300.0
    # Seconds between two counts of every queue, for the metrics.
    queue_count_seconds: float = 15.0


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class WorkerHousekeeping:
    """What is sent, what is proved, and what is cleared away."""

    __slots__ = ()

    # == Messages
    # Folder that mail is written to while there is no smtp_url, for development; none: such mail is dead.
    outbox_dir: Path | None = None
    # Pauses in seconds after the first, the second… failed attempt at a message of the outbox; up to a tenth is added. After one
    # attempt more than there are pauses it is dead. These are those of Standard Webhooks: 75 hours and a half in all.
    delivery_retry_seconds: tuple[float, ...] = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
    # Messages that one process delivers at once, of each way out (mail, webhooks, Slack); at most half are one organization's.
    delivery_concurrency: int = 16
    # Messages that one process delivers to one receiver at once.
    destination_concurrency: int = 4
    # Seconds that a message is remembered that was delivered or is dead, and its idempotency key with it.
    outbox_keep_seconds: float = 2_592_000.0
    # Seconds between two removals of such messages.
    clear_outbox_seconds: float = 3600.0

    # == Audit
    # Seconds between two looks for audit rows that were written without a place in their chain (`agent_session.open`).
    chain_audit_seconds: float = 5.0
    # Seconds between two signed checkpoints of the audit chains that have grown.
    checkpoint_audit_seconds: float = 3600.0
    # Folder that signed checkpoints of the audit chains are written to as well, one file each, never written again: better
    # one where this platform cannot change files (a mount that only takes new ones). Empty: none.
    checkpoint_folder: Path | None = None
    # Seconds between two looks for checkpoints that are not in that folder yet.
    store_checkpoints_seconds: float = 60.0
    # Seconds between two removals of audit rows past their retention.
    trim_audit_seconds: float = 3600.0

    # == Tunnels and organizations
    # Seconds between two removals of ended sessions, old history and old rows of the edge change table.
    clear_tunnels_seconds: float = 60.0
    # Seconds between two removals of remembered answers of idempotent requests.
    expire_requests_seconds: float = 300.0
    # Seconds between two looks for organizations whose days of grace are over.
    delete_organizations_seconds: float = 300.0
    # Seconds between two removals of exports that are over.
    sweep_exports_seconds: float = 3600.0


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class WorkerDomains:
    """Custom domains and their certificates."""

    __slots__ = ()

    # == Domains
    # Seconds between two looks for domains whose DNS is to be looked at; how often each is, docs/how-to/custom-domains.md says.
    check_domains_seconds: float = 5.0
    # Seconds between two removals of domains that were lost long ago.
    purge_domains_seconds: float = 3600.0

    # == Certificates
    # Keys of the certificate worker (PEM, one Ed25519 and one X25519, mode 0600): by them private keys are sealed for relays, and
    # for nobody else. The same file for every process of this worker; without one certificates of custom domains are not stored.
    certificate_key_file: Path | None = None
    # Ids of the regions' keys (`rk_…`) that it wraps for, whatever else is registered; empty: all that are.
    certificate_region_keys: tuple[str, ...] = ()
    # Where visitors of each region arrive, as REGION=HOST:PORT: what is served there for custom domains is looked at by TLS;
    # empty: nothing is.
    certificate_probe_targets: tuple[str, ...] = ()
    # CA bundle that visitors are taken to trust, for certificates of a private CA; empty means the public ones.
    certificate_probe_ca_file: Path | None = None
    # Seconds between two such looks at everything.
    certificate_probe_seconds: float = 300.0
    # Seconds for one handshake of it.
    certificate_probe_timeout_seconds: float = 10.0
    # Handshakes of it at once.
    certificate_probe_concurrency: int = 16
    # Domains of it whose results are written together.
    certificate_probe_batch: int = 200
    # Seconds after a switch before a domain is looked at.
    certificate_probe_settled_seconds: float = 60.0
    # Seconds between two looks at whether regions have all certificates; relays' acknowledgements are acted on at once.
    settle_certificates_seconds: float = 3.0
    # Seconds between two looks for certificates that are not wrapped for a key of a region yet.
    rewrap_certificates_seconds: float = 15.0
    # Orders of certificates that one process has in hand at once; at most half are one organization's.
    order_concurrency: int = 16
    # Attempts at an order of a certificate.
    order_max_attempts: int = 12
    # Seconds that one of them may take.
    order_timeout_seconds: float = 900.0
    # Seconds below which the pause after a first failed attempt is drawn; the bound doubles with each.
    order_retry_seconds: float = 2.0
    # The greatest such bound in seconds; and the longest that an order waits for a CA in one go.
    order_retry_max_seconds: float = 3600.0
    # Seconds between two looks for domains whose certificate is due.
    sweep_certificates_seconds: float = 10.0
    # Seconds between two rounds of questions when to renew certificates (each is asked about every acme_ari_seconds).
    ask_renewals_seconds: float = 30.0
    # Seconds between two removals of old orders.
    tidy_certificates_seconds: float = 3600.0

    # == Certificate events
    # Attempts at a certificate event, the first included; after the last that fails it is dead, until it is replayed.
    cert_event_attempts: int = 8
    # Seconds below which the pause after a first failure is drawn; the bound doubles with each.
    cert_event_retry_seconds: float = 5.0
    # The greatest such bound in seconds.
    cert_event_retry_max_seconds: float = 900.0
    # Seconds between two removals of certificate events past their time.
    clear_cert_events_seconds: float = 3600.0
    # Seconds between two looks for dead certificate events that are replayed by themselves.
    cert_auto_replay_seconds: float = 60.0
    # Events that one such look replays at most; 0: none are.
    cert_auto_replay_limit: int = 50
    # Seconds for which an event lies dead before that.
    cert_auto_replay_cooldown_seconds: float = 900.0
    # Times that one event is replayed by itself.
    cert_auto_replay_times: int = 3
    # Seconds after which an event is too old for that.
    cert_auto_replay_age_seconds: float = 604_800.0
    # Seconds between two looks for certificate incidents that only the clock changes.
    cert_watch_seconds: float = 60.0


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class WorkerBilling:
    """What payment providers tell, and what follows from it."""

    __slots__ = ()

    # == Events of payment providers
    # Events of payment providers that one process applies at once; of one provider half as many.
    billing_webhook_concurrency: int = 8
    # Attempts at such an event, the first included; after the last that fails it is dead, until it is replayed.
    billing_webhook_attempts: int = 8
    # Seconds below which the pause after a first failure is drawn; the bound doubles with each.
    billing_webhook_retry_seconds: float = 5.0
    # The greatest such bound in seconds.
    billing_webhook_retry_max_seconds: float = 900.0
    # Seconds between two looks at how fast and how surely events become effects.
    billing_webhook_watch_seconds: float = 60.0
    # Seconds that such a look goes back.
    billing_webhook_slo_window_seconds: float = 3600.0
    # Failed and dead events of a provider with which its objective is broken.
    billing_webhook_slo_failures: int = 10
    # Seconds after which an event that still waits breaks it.
    billing_webhook_slo_stale_seconds: float = 300.0
    # Seconds from receipt to effect, of 95 in 100 events, above which it is broken.
    billing_webhook_slo_p95_seconds: float = 60.0
    # Events that are replayed by themselves when it is broken; 0: none are.
    billing_webhook_auto_replay_limit: int = 50
    # Seconds between two such replays of one provider's events.
    billing_webhook_auto_replay_cooldown_seconds: float = 300.0
    # Times that one event is replayed by itself.
    billing_webhook_auto_replay_times: int = 3
    # Seconds after which an event is too old for that.
    billing_webhook_auto_replay_age_seconds: float = 604_800.0
    # Seconds between two comparisons with the list of each payment provider.
    billing_reconcile_seconds: float = 900.0
    # Seconds that one of them may take; after an outage of days there is much to list.
    billing_reconcile_timeout_seconds: float = 3600.0
    # Seconds between two removals of providers' events and bodies past their time.
    clear_billing_webhooks_seconds: float = 3600.0

    # == Dunning, reports and the ledger
    # Seconds between two looks for dunning cases whose next day has come.
    dunning_seconds: float = 60.0
    # Seconds between two looks for months whose use beyond plans is to be charged.
    overage_seconds: float = 900.0
    # Attempts at making a report.
    report_attempts: int = 5
    # Seconds that one of them may take.
    report_timeout_seconds: float = 900.0
    # Seconds between two looks for schedules of reports whose period has ended.
    report_schedules_seconds: float = 60.0
    # Seconds between two removals of reports that have expired.
    sweep_reports_seconds: float = 300.0
    # Attempts at comparing a settlement receipt.
    settlement_attempts: int = 8
    # Seconds between two looks for events that came late to a settlement.
    watch_settlements_seconds: float = 300.0
    # Seconds between two looks for deferred revenue of days that are over.
    recognize_revenue_seconds: float = 300.0
    # Schedules of deferred revenue that are read at once.
    recognize_revenue_batch: int = 500
    # Seconds between two sums of revenue by day.
    sum_up_revenue_seconds: float = 300.0
    # Seconds between two looks whether the ledger's last month can be sealed.
    seal_ledger_seconds: float = 3600.0
    # Days after a month's end on which it is sealed; what is heard of it later is booked in the next.
    seal_ledger_after_days: int = 10
    # Seconds between two looks at all of the books: every hash, every seal, every guard of the database.
    verify_ledger_seconds: float = 21_600.0
    # Seconds that one such look may take.
    verify_ledger_timeout_seconds: float = 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerSettings(ProcessSettings, WorkerBilling, WorkerDomains, WorkerHousekeeping, WorkerPlace):
    """One process of background work."""
