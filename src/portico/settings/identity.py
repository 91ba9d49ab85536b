"""Settings of people, their organizations and keys, and of the audit log."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class IdentitySettings:
    """Accounts, sign-in, organizations, keys; and how long it is known who did what."""

    __slots__ = ()

    # == Identity
    # Whether anybody may register; an operator can always make accounts.
    registration_open: bool = True
    # Whether people must verify their e-mail address before they may do more than look around: no keys, so no tunnels.
    require_verified_email: bool = False
    # Whom people of a suspended organization are told to ask: an address or a link. Empty: nobody is named.
    operator_contact: str = ""
    # Seconds after a platform operator's last proof of who they are in which they may do what is dangerous.
    operator_step_up_seconds: int = 900
    # Minutes for which an owner can let operators into the organization at most, with one consent.
    support_access_max_minutes: int = 10_080
    # Live consents to support access that one organization has at most.
    support_consents_per_organization: int = 10
    # Seconds that a token of support access lives at most; never longer than the consent.
    support_session_seconds: int = 3600
    # Seconds in which a first code confirms an authenticator app's key; a key that was shown before is made anew.
    totp_setup_seconds: int = 1800
    # Seconds in which a second operator confirms that a person's second factors are taken away.
    mfa_reset_seconds: int = 86_400
    # What this installation is called in authenticator apps and passkey prompts.
    service_name: str = "Portico"
    # Life of the link in a mail that verifies an address.
    email_verification_seconds: int = 259_200
    # Life of the link in a mail that sets a new password.
    password_reset_seconds: int = 3600
    # Mails of one kind (verification, reset, change of address) that one account or address gets in one window.
    account_mails_per_window: int = 5
    # Seconds of that window.
    account_mail_window_seconds: int = 3600
    # Forgotten passwords that one network may ask about in one window of sign-ins.
    resets_per_address: int = 30
    # Seconds between the password and the second step of a sign-in.
    second_step_seconds: int = 300
    # Wrong codes of one person's authenticator app from one network, in one window of sign-ins.
    code_failures_per_pair: int = 5
    # Wrong codes of one person's authenticator app in a day, from all networks that are new to the account, and from each other.
    code_failures_per_day: int = 30
    # Seconds for an authenticator to answer.
    passkey_challenge_seconds: int = 300
    # Passkeys that a person may have.
    passkeys_per_person: int = 20
    # Life of an access token in seconds.
    access_token_seconds: int = 900
    # Seconds that an unused refresh token lives; each use starts it anew.
    refresh_token_seconds: int = 2_592_000
    # Seconds after which a sign-in session ends however often it was refreshed.
    sign_in_max_seconds: int = 7_776_000
    # Seconds without a page after which a browser is signed out; each page starts them anew.
    browser_idle_seconds: int = 604_800
    # Seconds after which a browser is signed out however often it was used.
    browser_max_seconds: int = 2_592_000
    # Seconds between two writes of when a browser session was last used.
    browser_touch_seconds: int = 60
    # Seconds of clock difference tolerated in tokens, both ways.
    token_leeway_seconds: float = 60.0
    # Characters of the shortest password.
    password_min_length: int = 10
    # Characters of the longest password: a hash of megabytes would cost what a hundred cost.
    password_max_length: int = 256
    # Password hashes computed at once; each takes a core and 19 MiB for a moment.
    password_hash_concurrency: int = 2
    # Password hashes that may wait for their turn; more are refused.
    password_hash_waiting: int = 64
    # Failed sign-ins to one account from one address, in one window.
    sign_in_failures_per_pair: int = 10
    # Failed sign-ins to one account from anywhere, in one window.
    sign_in_failures_per_account: int = 100
    # Failed sign-ins from one address to any account, in one window.
    sign_in_failures_per_address: int = 100
    # Seconds of that window.
    sign_in_failure_window_seconds: int = 900
    # Seconds after a proof of who somebody is in which it counts as recent, for acts that ask for one.
    step_up_seconds: int = 900
    # Wrong passwords in one session, when it asks for a proof or changes the password, in one window of sign-ins.
    step_up_failures: int = 10
    # Accounts registered from one address in one window.
    registrations_per_address: int = 100
    # Life of a device code in seconds; also the window of the two limits below.
    device_code_seconds: int = 600
    # Seconds between two polls of a waiting device.
    device_poll_seconds: int = 5
    # Wrong user codes that one person may enter in one window.
    device_code_guesses: int = 10
    # Device codes that one address may have open in one window.
    device_codes_per_address: int = 60
    # Plan of a new organization, of those that GET /v1/admin/plans has; `unlimited` leaves the ceilings of these settings alone.
    default_plan: str = "unlimited"
    # Keys that an organization may have at once, whatever its plan.
    max_keys_per_organization: int = 1000
    # Networks that one key may be limited to.
    key_max_cidrs: int = 64
    # Days that an invitation to an organization is good.
    invitation_days: float = 7.0
    # Invitations that an organization may have open at once.
    max_open_invitations_per_organization: int = 200
    # Invitations that an organization may mail in an hour.
    invitations_per_organization: int = 100
    # Invitations that an organization may mail to one address in a day; all organizations together, four times as many.
    invitation_mails_per_address: int = 5
    # Days that invitations are kept after they were accepted, revoked or expired.
    invitation_keep_days: float = 90.0
    # Folder of files that are made for people (exports of organizations), the same for API and workers; none: there are none.
    objects_dir: Path | None = None
    # Exports that an organization may make in a day.
    exports_per_day: int = 5
    # Days that an export can be downloaded.
    export_days: float = 3.0
    # Bytes of lines in one export.
    export_max_bytes: int = 4_294_967_296
    # Organizations that one person may own.
    organizations_per_person: int = 10
    # Days of grace between asking for an organization's deletion and the deletion, in which it can be taken back.
    organization_deletion_days: float = 14.0
    # Roles of its own that an organization may have, whatever its plan.
    max_roles_per_organization: int = 50
    # Public keys of a secret scanner with GitHub's partner protocol, whose reports revoke leaked keys, as an address such as
    # https://api.github.com/meta/public_keys/secret_scanning; empty: only keys of the file below are believed.
    secret_scanning_keys_url: str = ""
    # The same document as a file, for installations that cannot fetch it; read at the start.
    secret_scanning_keys_file: Path | None = None
    # Seconds that fetched keys are used before they are fetched again; during an outage of that address they are for a day.
    secret_scanning_keys_seconds: int = 3600
    # Matches in one report.
    secret_scanning_max_matches: int = 1000
    # Seconds that a signing key signs before the next takes over.
    signing_key_seconds: int = 2_592_000
    # Seconds that a new key is published before it may sign.
    signing_key_publish_seconds: int = 3600
    # Seconds that a retired key stays published; must exceed the longest token life plus the relays' outage grace.
    signing_key_retired_seconds: int = 180_000
    # Seconds that a process trusts its copy of the signing keys.
    signing_key_cache_seconds: float = 15.0

    # == Audit
    # Days that audit rows are kept; 0: for ever. The hash of the last row deleted is kept as anchor.
    audit_retention_days: int = 400
    # Rows that one call of GET /v1/audit/verify checks at most; it tells where to go on.
    audit_verify_rows: int = 5000
    # Rows that GET /v1/audit/export reads at a time.
    audit_export_rows: int = 500
