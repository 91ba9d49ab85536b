"""Settings of custom domains, their certificates, and what certificate authorities report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from portico.settings.secrets import Secret


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class DomainSettings:
    """Whose a domain is, where its certificate comes from, and what becomes of it."""

    __slots__ = ()

    # == Domains
    # Domains that an organization may have, whatever its plan.
    domains_per_organization: int = 1000
    # Domains that may lead to one tunnel.
    domains_per_tunnel: int = 100
    # Name of the public edge that customers' CNAME records point to; empty: `edge` below base_domain. It must resolve to relays.
    domain_cname: str = ""
    # Addresses of the public edge, for domains at which no CNAME may stand; empty: those that domain_cname resolves to.
    domain_addresses: tuple[str, ...] = ()
    # Zone in which DNS-01 challenges are answered for domains that delegate `_acme-challenge`; empty: delegation is not offered.
    challenge_zone: str = ""
    # Resolvers that are asked whether a domain is its owner's, and points here: addresses, ADDRESS:PORT, or `system` for those of
    # the machine. More than half of them must agree, so that one that lies or is slow decides nothing.
    dns_resolvers: tuple[str, ...] = ("1.1.1.1", "8.8.8.8", "9.9.9.9")
    # Seconds for one resolver to answer one question, with all aliases.
    dns_timeout_seconds: float = 4.0
    # Questions that one process has on their way at once.
    dns_concurrency: int = 128
    # Seconds between two looks at the DNS of a domain with which everything is right.
    domain_recheck_seconds: float = 21_600.0
    # Seconds to the next look at a domain about which resolvers did not answer, or do not agree yet; doubled each time.
    domain_unsure_seconds: float = 5.0
    # Seconds within which a second `verify` of a domain gets the answer of the first.
    domain_verify_pause_seconds: float = 5.0
    # Days of failing looks after which a domain is given up: a claim is looked at no longer, a domain in use has `moved`.
    domain_failing_days: float = 7.0
    # Days that a domain which has moved is kept, in case that it comes back; then it is deleted.
    domain_moved_days: float = 7.0
    # Days that a domain which was lost is shown to who had it.
    domain_deleted_days: float = 30.0
    # A list of public suffixes (publicsuffix.org) instead of the one that is installed with the server.
    public_suffix_file: Path | None = None

    # == Certificates by ACME
    # Whether the terms of the certificate authority (CA) are agreed to: no certificate is ordered before.
    acme_agree_terms: bool = False
    # Directory of the CA that certificates come from.
    acme_directory: str = "https://acme-v02.api.letsencrypt.org/directory"
    # Directory of that CA's staging, where a name is tried again after a failure before the CA's limits are spent on it; empty:
    # there is none, but for Let's Encrypt, whose own is used.
    acme_staging_directory: str = ""
    # Directories of CAs that are asked, in this order, when the one before them cannot or will not issue.
    acme_fallback_directories: tuple[str, ...] = ()
    # Mail addresses that CAs may write to.
    acme_contacts: tuple[str, ...] = ()
    # External accounts that CAs demand: HOST=KEY_ID:HMAC_KEY, comma separated; HOST is that of the directory.
    acme_external_accounts: Secret | None = None
    # Certificate profiles: HOST=PROFILE, comma separated; a CA that is not named gives its default one.
    acme_profiles: tuple[str, ...] = ()
    # Authorities that a CA's own address is trusted by; empty: the system's.
    acme_ca_file: Path | None = None
    # How names are proved, best first: http-01, tls-alpn-01, dns-01. Wildcards are always proved by dns-01.
    acme_challenges: tuple[str, ...] = ("http-01", "tls-alpn-01", "dns-01")
    # Port on which CAs look for http-01; another one than 80 only with a CA of one's own.
    acme_http_port: int = 80
    # Port on which CAs look for tls-alpn-01; another one than 443 only with a CA of one's own.
    acme_tls_port: int = 443
    # Seconds for a CA to answer a request.
    acme_timeout_seconds: float = 30.0
    # Bytes of an answer of a CA.
    acme_answer_max_bytes: int = 1_048_576
    # Times that a request is made anew, since its nonce was refused.
    acme_nonce_retries: int = 10
    # Seconds between two looks at how a validation or an order stands, when the CA does not say.
    acme_poll_seconds: float = 1.0
    # Seconds between two such looks at most, whatever the CA says.
    acme_poll_max_seconds: float = 20.0
    # Seconds for a CA to validate a name, or to issue.
    acme_patience_seconds: float = 180.0
    # Seconds for every healthy relay to have a challenge before an attempt is given back.
    acme_relays_seconds: float = 30.0
    # Seconds that relays answer a challenge at most.
    acme_challenge_seconds: float = 3600.0
    # Seconds of one look, before an order, whether a challenge can be reached.
    acme_reach_seconds: float = 10.0
    # Pauses in seconds before such a look is made again, which found something wrong, until that counts.
    acme_reach_again_seconds: tuple[float, ...] = (1, 5)
    # Certificates that are being ordered at once, by all workers; organizations take turns.
    acme_open_orders: int = 200
    # Names of one look for what is due.
    acme_sweep_names: int = 1000
    # Seconds between two questions when to renew a certificate (ARI), a tenth more or less.
    acme_ari_seconds: float = 36_000.0
    # Such questions of one round.
    acme_ari_names: int = 500
    # Share of its lifetime that a certificate has left when it is renewed, where its CA does not say when.
    acme_renew_share: float = 0.3333
    # The same share of a certificate that lives for less than acme_short_days.
    acme_renew_share_short: float = 0.5
    # Days of life below which a certificate is a short one.
    acme_short_days: float = 10.0
    # Pauses in seconds after the first, the second… failure in a row, a tenth more or less; the last one holds for all later.
    acme_retry_seconds: tuple[float, ...] = (60, 600, 6000, 86_400)
    # The same where nothing was asked of a CA, since the name does not lead here.
    acme_unready_seconds: tuple[float, ...] = (60, 120, 300, 600, 1800, 3600)
    # Seconds between two orders of a name that people ask for by `retry`.
    acme_retry_pause_seconds: float = 60.0
    # Failures of a CA in a row after which the next one is asked.
    acme_fallback_after: int = 2
    # Seconds for which an order waits for a CA that wants to be left alone (Retry-After), when there is another one to ask.
    acme_wait_seconds: float = 900.0
    # Orders of an account that a CA allows in 3 hours: a bucket that fills evenly, as the next three; all are Let's Encrypt's.
    acme_budget_orders: int = 300
    # Certificates of a registered domain that a CA allows in 7 days.
    acme_budget_domain: int = 50
    # Certificates of the same names that a CA allows in 7 days.
    acme_budget_names: int = 5
    # Failed validations of a name that a CA allows in an hour.
    acme_budget_failures: int = 5
    # Days that orders which are over are kept.
    acme_keep_days: int = 90
    # Who writes TXT records for dns-01: rfc2136, exec; empty: nobody, and dns-01 is not used.
    acme_dns: str = ""
    # Zones besides challenge_zone in which that may write, for names of one's own that delegate nothing.
    acme_dns_zones: tuple[str, ...] = ()
    # Server of the zone that takes updates by RFC 2136: ADDRESS or ADDRESS:PORT.
    acme_dns_server: str = ""
    # Name of the key that signs updates (TSIG).
    acme_dns_key_name: str = ""
    # That key, in base64; none: updates are not signed.
    acme_dns_key: Secret | None = None
    # Its algorithm.
    acme_dns_key_algorithm: str = "hmac-sha256"
    # Program that is run for exec, without a shell, as: PROGRAM present|cleanup NAME VALUE.
    acme_dns_program: Path | None = None
    # Seconds that the server or the program may take.
    acme_dns_seconds: float = 60.0
    # Seconds until resolvers must see a record that was written.
    acme_dns_seen_seconds: float = 120.0
    # Seconds that resolvers may keep a TXT record.
    acme_dns_ttl: int = 60

    # == Certificate events
    # Bytes of one event.
    cert_event_max_bytes: int = 65_536
    # Seconds by which an event's time may be off, both ways.
    cert_event_tolerance_seconds: float = 300.0
    # Seconds after which every event is refused that is not known to be from its source, whatever was wrong with it.
    cert_refusal_seconds: float = 0.05
    # Events that one transaction stores at most; while it commits, the next ones gather.
    cert_event_group: int = 256
    # Events that wait in one process for their transaction; more are refused for a moment.
    cert_event_backlog: int = 4096
    # Seconds between two records of what was counted of each source: what came, and what was refused why.
    cert_activity_seconds: float = 1.0
    # Sources of certificate events in all.
    cert_sources_max: int = 500
    # Seconds for which a process trusts its list of sources where it refuses; what it stores is checked anew.
    cert_source_refresh_seconds: float = 1.0
    # Seconds for which the keys of a source before a new one are good, when nobody says otherwise.
    cert_source_grace_seconds: int = 86_400
    # Seconds that events are kept; what they led to stays.
    cert_event_keep_seconds: int = 34_560_000
    # Events that one call replays, or says that it would.
    cert_replay_max: int = 1000
    # Seconds after its end in which a certificate incident that comes back is the same one.
    cert_incident_reopen_seconds: float = 86_400.0
    # Seconds in which people are not told again of an incident that comes back, unless it is worse.
    cert_incident_cooldown_seconds: float = 1800.0
    # Share of a certificate's life by which its renewal may be late before that is a warning.
    cert_sla_warning_share: float = 0.05
    # Share of a certificate's life by which its renewal may be late before the objective is missed.
    cert_sla_breach_share: float = 0.10
    # Address of the operator's automation, which is told of certificate incidents; empty: none is.
    cert_runbook_url: str | None = None
    # Secret (`whsec_` and base64 of 24 to 64 bytes) with which what it is told is signed.
    cert_runbook_secret: Secret | None = None
