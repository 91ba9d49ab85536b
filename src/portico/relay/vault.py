"""Certificates of custom domains at a relay: asked for, opened, held ready, and switched to when the stream says so.

    edge stream: domain → active, staged ──► asked for by id ──► checked and opened (sealed.py) ──► held ──ack staged──►
                 the next change: active ────────────────────────────────────────► CertificateStore ──ack active──►

The switch is one step of the loop, made when the change is applied: what was held ready takes the place of what served. Until
then, and whenever something is refused (a forged manifest, another region's key, a lower version than was served), what served
goes on.

What is held is kept on disk as it came, sealed, one file per domain (``certificates/DOMAIN.json``) with the newest version that
was served. So a relay that starts without a control plane serves what it served, and takes no older version for good. Of a
domain that was removed that number alone is kept, for as long as what was served could be served again: who writes the stream
must not get an older version taken by removing the domain first.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from portico.errors import Problem
from portico.kit import envelope, keyfiles
from portico.kit.jwt import InvalidKey
from portico.relay import statefiles
from portico.relay.certificates import VAULT, CertificateStore
from portico.relay.control_link import Backoff, LinkLost, post, why
from portico.relay.edge_rows import CertificateRef, CertificateRow, SnapshotInvalid, parse_json
from portico.relay.sealed import Held, Trust, Unusable, parse
from portico.relay.snapshot import Change, Snapshot
from portico.settings import RelaySettings

log = logging.getLogger(__name__)

FOLDER: Final = "certificates"
FORMAT: Final = 1
#: Acknowledgements in one message.
ACKS_MAX: Final = 500
#: Times that a version which the control plane does not give is asked for before it is refused.
TRIES: Final = 5
REASON_CHARS: Final = 300
#: Seconds before a copy is written again that the disk did not take.
SAVE_AGAIN_SECONDS: Final = 5.0
NO_KEY: Final = "this relay has no key of its region (region_key_files) or trusts no signer (certificate_signers)"
_FILE = re.compile(r"^[A-Za-z0-9_-]{1,128}\.json$")
_NETWORK = (LinkLost, SnapshotInvalid, httpx.HTTPError, OSError, TimeoutError)


@dataclass(slots=True)
class Domain:
    """What is held of a domain. ``floor``: the newest version that was served here; a lower one never is again. ``ends``: when
    the last certificate that was served here does, unix seconds."""

    floor: int = 0
    ends: int = 0
    serving: Held | None = None
    ready: Held | None = None
    #: By id: why a version is refused.
    refused: dict[str, str] = field(default_factory=dict)
    tries: int = 0

    def held(self, ref: CertificateRef) -> Held | None:
        """What is held that the stream means: the same version with the same contents."""
        return next((one for one in (self.serving, self.ready) if one is not None and one.ref == ref), None)


def trust_of(settings: RelaySettings) -> Trust | None:
    """What the settings let this relay open; ``None`` without a region's key. Raises ``config.invalid``."""
    if not settings.region_key_files:
        return None
    keys = keyfiles.region_keys("region_key_files", settings.region_key_files)
    try:
        signers = envelope.signers(settings.certificate_signers)
    except InvalidKey as err:
        raise Problem("config.invalid", f"setting certificate_signers: {err}", key="certificate_signers") from None
    return Trust(settings.region, signers, keys) if len(signers) else None


class Vault:
    """One per relay. :meth:`load` before anything is served, then :meth:`run`. Raises ``config.invalid`` for key files that are
    no good."""

    def __init__(
        self,
        settings: RelaySettings,
        snapshot: Snapshot,
        store: CertificateStore,
        *,
        http: httpx.AsyncClient,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._snapshot, self._store, self._http = settings, snapshot, store, http
        self._wall = wall
        self.trust = trust_of(settings)
        self._folder = settings.state_dir / FOLDER
        self._domains: dict[str, Domain] = {}
        #: Domains whose row has to be looked at, in order of arrival.
        self._dirty: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._acks: dict[str, dict[str, Any]] = {}
        self._ack_wake = asyncio.Event()
        self._unsaved: set[str] = set()
        self._save_wake = asyncio.Event()
        self._said: set[str] = set()
        self._behind_since: float | None = None
        snapshot.on_change(self._changed)

    # -- what others ask

    def __len__(self) -> int:
        """Domains that are served here."""
        return sum(domain.serving is not None for domain in self._domains.values())

    @property
    def refusals(self) -> int:
        """Versions that the stream names and this relay refuses."""
        rows = self._snapshot.certificates
        return sum(len(domain.refused) for id, domain in self._domains.items() if id in rows)

    def counts(self) -> dict[str, int]:
        """Domains by how they are, for metrics."""
        rows = self._snapshot.certificates
        return {
            "served": len(self),
            "staged": sum(domain.ready is not None for domain in self._domains.values()),
            "refused": self.refusals,
            "behind": sum(self._lacks_active(rows.get(id)) for id in self._dirty),
        }

    def behind(self) -> bool:
        """Whether a version should serve that is not here yet, and may still come."""
        return any(self._lacks_active(self._snapshot.certificates.get(id)) for id in self._dirty)

    def _lacks_active(self, row: CertificateRow | None) -> bool:
        if row is None or row.active is None:
            return False
        domain = self._domains.get(row.domain)
        return domain is None or (domain.held(row.active) is None and row.active.id not in domain.refused)

    def ready(self) -> bool:
        """Whether visitors should come here: a relay that was away catches up first, though not for ever."""
        if not self.behind():
            self._behind_since = None
            return True
        now = time.monotonic()
        if self._behind_since is None:
            self._behind_since = now
        return now - self._behind_since > self._settings.certificate_catch_up_seconds

    async def caught_up(self, connected: Callable[[], bool], lost: Callable[[], bool]) -> None:
        """Return when everything that should serve here does, or cannot for now: at a start, before visitors are let in."""
        if self.trust is None:
            return
        deadline = time.monotonic() + self._settings.certificate_catch_up_seconds
        while time.monotonic() < deadline and not lost():
            if connected() and not self.behind():
                return
            await asyncio.sleep(0.01)
        if self.behind():
            log.warning("serving before every certificate is here", extra={"f": {"domains": len(self._dirty)}})

    # -- the stream

    def _changed(self, change: Change) -> None:
        if change.kind != "certificate":
            return
        row = self._snapshot.certificates.get(change.id)
        if row is None:
            self._forget(change.id)
        elif self.trust is None:
            self._refuse_all(row)
        else:
            self._follow(row)

    def _forget(self, id: str) -> None:
        domain = self._domains.pop(id, None)
        self._dirty.pop(id, None)
        if domain is not None and domain.serving is not None:
            self._store.drop(VAULT, domain.serving.certificate.fingerprint)
        if domain is not None and domain.floor:
            self._domains[id] = Domain(domain.floor, domain.ends)
        self._unsaved.add(id)
        self._wake.set()

    def _refuse_all(self, row: CertificateRow) -> None:
        for ref in (row.active, row.staged):
            if ref is not None:
                self._ack(ref, "failed", NO_KEY)
        if NO_KEY not in self._said:
            self._said.add(NO_KEY)
            log.error("certificates of custom domains cannot be opened here", extra={"f": {"why": NO_KEY}})

    def _follow(self, row: CertificateRow) -> None:
        """Switch if what should serve is held; ask for the rest. Called in the step in which the stream's change is applied."""
        domain = self._domains.setdefault(row.domain, Domain())
        wanted = {ref.id for ref in (row.active, row.staged) if ref is not None}
        domain.refused = {}  # said anew: there may be another wrap now
        domain.tries = 0
        if domain.ready is not None and domain.ready.id not in wanted:
            domain.ready = None
            self._unsaved.add(row.domain)
        if row.active is not None:
            self._activate(domain, row, row.active)
        if row.staged is not None and self._admissible(domain, row.staged, staged=True):
            self._hold_ready(domain, row.staged)
        if self._lacks(row):
            self._dirty[row.domain] = None
        else:
            self._dirty.pop(row.domain, None)
        self._wake.set()

    def _activate(self, domain: Domain, row: CertificateRow, ref: CertificateRef) -> None:
        if not self._admissible(domain, ref, staged=False):
            return
        held = domain.held(ref)
        if held is None:
            return
        if held is not domain.serving:
            before, domain.serving, domain.ready, domain.floor = domain.serving, held, None, held.version
            domain.ends = max(domain.ends, int(held.certificate.not_after.timestamp()))
            self._store.put(VAULT, held.certificate)
            if before is not None:
                self._store.drop(VAULT, before.certificate.fingerprint)
            self._unsaved.add(row.domain)
            fields = {"host": row.hostname, "version": held.version, "until": held.certificate.not_after.date()}
            log.info("serving a custom domain with another certificate", extra={"f": fields})
        self._ack(ref, "active")

    def _admissible(self, domain: Domain, ref: CertificateRef, *, staged: bool) -> bool:
        """Whether a version is no step back. The number is a fencing token: it only rises, and stands for one certificate."""
        serving = domain.serving
        if ref.version > domain.floor or (not staged and serving is not None and serving.ref == ref):
            return True
        if ref.version == domain.floor and serving is None and not staged:  # it was served before its copy was damaged
            return True
        self._refuse(
            domain,
            ref,
            f"version {ref.version} would be a step back behind {domain.floor}, which was served",
            domain.floor,
        )
        return False

    def _hold_ready(self, domain: Domain, ref: CertificateRef) -> None:
        if domain.ready is not None and domain.ready.ref == ref:
            self._ack(ref, "staged")

    def _refuse(self, domain: Domain, ref: CertificateRef, reason: str, floor: int | None = None) -> None:
        domain.refused[ref.id] = reason
        self._ack(ref, "failed", reason, floor)
        log.error(
            "a certificate is refused", extra={"f": {"certificate": ref.id, "version": ref.version, "why": reason}}
        )

    def _lacks(self, row: CertificateRow) -> list[CertificateRef]:
        """Versions of a row that are neither held nor refused, what should serve first."""
        domain = self._domains[row.domain]
        refs = [ref for ref in (row.active, row.staged) if ref is not None]
        return [ref for ref in refs if domain.held(ref) is None and ref.id not in domain.refused]

    # -- asking for what is lacking

    async def run(self) -> None:
        """Ask, acknowledge and save until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ask_loop())
            group.create_task(self._ack_loop())
            group.create_task(self._save_loop())

    async def _ask_loop(self) -> None:
        backoff = self._backoff()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while wanted := self._next():
                    await self._ask(wanted)
                    backoff.reset()
                self._said.discard("ask")
            except _NETWORK as err:
                self._say("ask", "certificates cannot be asked for", why(err))
                await asyncio.sleep(backoff.next())
                self._wake.set()
            except Exception:
                log.exception("fault in asking for certificates")
                await asyncio.sleep(self._settings.certificate_backoff_max_seconds)
                self._wake.set()
            self._save_wake.set()

    def _backoff(self) -> Backoff:
        return Backoff(self._settings.edge_backoff_min_seconds, self._settings.certificate_backoff_max_seconds)

    def _say(self, what: str, text: str, reason: str) -> None:
        """Once per outage."""
        if what not in self._said:
            self._said.add(what)
            log.warning(text, extra={"f": {"why": reason}})

    def _next(self) -> list[tuple[str, CertificateRef]]:
        """Versions to ask for now, each with its domain; domains that lack nothing are dirty no more."""
        found: list[tuple[str, CertificateRef]] = []
        for id in list(self._dirty):
            row = self._snapshot.certificates.get(id)
            lacks = self._lacks(row) if row is not None else []
            if not lacks:
                del self._dirty[id]
            found += [(id, ref) for ref in lacks]
            if len(found) >= self._settings.certificate_fetch_rows:
                break
        return found[: self._settings.certificate_fetch_rows]

    async def _ask(self, wanted: list[tuple[str, CertificateRef]]) -> None:
        limits = self._settings
        refs = [ref for _, ref in wanted]
        body = {"region": limits.region, "certificates": [ref.id for ref in refs]}
        request = self._http.build_request("POST", "/certificates", json=body)
        answer = await post(
            self._http, request, limits.certificate_fetch_timeout_seconds, limits.certificate_fetch_max_bytes
        )
        given = _bundles(parse_json(answer))
        opened = await statefiles.in_thread(self._open_all, [given[ref.id] for ref in refs if ref.id in given], True)
        for id, ref in wanted:
            self._take(id, ref, opened.get(ref.id, "the control plane does not have it"))
        if missing := [ref for ref in refs if ref.id not in given]:
            raise LinkLost(f"{len(missing)} certificates are not there")

    def _open_all(self, values: Iterable[Any], load: bool) -> dict[str, Held | str]:
        """In a thread: each opened, or why it cannot be used; by id."""
        assert self.trust is not None
        now = dt.datetime.fromtimestamp(self._wall(), dt.UTC)
        found: dict[str, Held | str] = {}
        for value in values:
            id = str(value.get("certificate")) if isinstance(value, dict) else ""
            try:
                found[id] = self.trust.hold(parse(value), now=now, load=load)
            except Unusable as err:
                found[id] = str(err)
        return found

    def _take(self, id: str, ref: CertificateRef, found: Held | str) -> None:
        """On the loop: what was opened goes where the row of its domain says by now."""
        row = self._snapshot.certificates.get(id)
        if row is None or ref not in (row.active, row.staged):
            return
        domain = self._domains.setdefault(id, Domain())
        if domain.held(ref) is not None or ref.id in domain.refused:
            return
        reason = found if isinstance(found, str) else _mismatch(found, row, ref)
        if isinstance(found, Held) and reason is None:
            self._put(domain, row, ref, found)
        elif isinstance(found, str) and found == "the control plane does not have it" and domain.tries < TRIES:
            domain.tries += 1
        else:
            self._refuse(domain, ref, reason or "it cannot be used")

    def _put(self, domain: Domain, row: CertificateRow, ref: CertificateRef, found: Held) -> None:
        if not self._admissible(domain, ref, staged=ref != row.active):
            return
        domain.ready = found
        self._unsaved.add(row.domain)
        if ref == row.active:
            self._activate(domain, row, ref)
        else:
            self._ack(ref, "staged")

    # -- acknowledging

    def tell_again(self) -> None:
        """The stream is up anew: say of everything how it stands, for a control plane that may have lost what it was told."""
        for row in self._snapshot.certificates.values():
            domain = self._domains.get(row.domain)
            for ref, state in ((row.active, "active"), (row.staged, "staged")):
                if domain is not None and ref is not None and domain.held(ref) is not None:
                    self._ack(ref, state)

    def _ack(self, ref: CertificateRef, state: str, reason: str | None = None, floor: int | None = None) -> None:
        said: dict[str, Any] = {"certificate": ref.id, "fingerprint": ref.fingerprint, "state": state}
        if reason is not None:
            said["reason"] = reason[:REASON_CHARS]
        if floor is not None:
            said["floor"] = floor
        self._acks[ref.id] = said
        self._ack_wake.set()

    async def _ack_loop(self) -> None:
        backoff = self._backoff()
        while True:
            await self._ack_wake.wait()
            self._ack_wake.clear()
            try:
                while self._acks:
                    await self._send_acks()
                    backoff.reset()
                self._said.discard("ack")
            except _NETWORK as err:
                self._say("ack", "certificates cannot be acknowledged", why(err))
                await asyncio.sleep(backoff.next())
                self._ack_wake.set()

    async def _send_acks(self) -> None:
        sent = dict(list(self._acks.items())[:ACKS_MAX])
        body = {
            "relay": self._settings.relay_name,
            "version": self._snapshot.version or 0,
            "certificates": list(sent.values()),
        }
        request = self._http.build_request("POST", "/acks", json=body)
        await post(self._http, request, self._settings.certificate_fetch_timeout_seconds)
        for id, said in sent.items():
            if self._acks.get(id) is said:
                del self._acks[id]

    # -- the copy on disk

    async def load(self) -> int:
        """Take up what was held when this relay ended; how many domains are served by it. Before :meth:`run`, after the edge
        state was loaded. A damaged copy is left out and said; what it held is asked for anew."""
        if self.trust is None or not self._folder.is_dir():
            return 0
        for id, domain in (await statefiles.in_thread(self._read_all)).items():
            self._domains[id] = domain
            if domain.serving is not None:
                self._store.put(VAULT, domain.serving.certificate)
        for row in list(self._snapshot.certificates.values()):
            self._follow(row)
        return len(self)

    def _read_all(self) -> dict[str, Domain]:
        found: dict[str, Domain] = {}
        for path in sorted(self._folder.iterdir()):
            if not _FILE.match(path.name):
                continue
            try:
                if (domain := self._read(path)) is None:
                    path.unlink()
                else:
                    found[path.stem] = domain
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
                fields = {"file": path, "why": str(err) or type(err).__name__}
                log.error("a kept certificate cannot be used", extra={"f": fields})
        return found

    def _read(self, path: Path) -> Domain | None:
        """``None`` for what is left of a domain that was removed, once nothing of it could be served any more."""
        kept = parse_json(path.read_bytes())
        if not isinstance(kept, dict) or kept.get("format") != FORMAT or kept.get("source") != self._settings.api_url:
            raise ValueError("it is of another control plane, or of another format")
        domain = Domain(int(kept["floor"]), int(kept.get("ends", 0)))
        if kept["serving"] is kept["ready"] is None and 0 < domain.ends < self._wall():
            return None
        for name in ("serving", "ready"):
            if kept[name] is not None:
                opened = self._recalled(path.stem, kept[name])
                if isinstance(opened, str):
                    log.error("a kept certificate cannot be used", extra={"f": {"file": path, "why": opened}})
                elif opened.bundle.domain == path.stem:
                    setattr(domain, name, opened)
        if domain.serving is not None:
            domain.floor = max(domain.floor, domain.serving.version)
            domain.ends = max(domain.ends, int(domain.serving.certificate.not_after.timestamp()))
        return domain

    def _recalled(self, id: str, value: Any) -> Held | str:
        """By this relay's own mark; without it, as what comes over the network, and marked with the next write."""
        assert self.trust is not None
        recalled = self.trust.recall(value, now=dt.datetime.fromtimestamp(self._wall(), dt.UTC))
        if recalled is not None:
            return recalled
        found = next(iter(self._open_all([value], False).values()))
        if isinstance(found, Held):
            self._unsaved.add(id)
        return found

    async def _save_loop(self) -> None:
        """Beside the questions: thousands of files take their time."""
        while True:
            await self._save_wake.wait()
            self._save_wake.clear()
            await self._save()

    async def _save(self) -> None:
        """Write what changed, in a thread. A disk that is full loses the copy, never what is served."""
        while self._unsaved:
            ids = [self._unsaved.pop() for _ in range(min(len(self._unsaved), 100))]
            texts = {id: self._encode(self._domains[id]) if id in self._domains else None for id in ids}
            try:
                await statefiles.in_thread(self._write_all, texts)
            except OSError as err:
                self._unsaved.update(ids)
                self._say("save", "certificates cannot be kept on disk", str(err))
                asyncio.get_running_loop().call_later(SAVE_AGAIN_SECONDS, self._wake.set)
                return
            self._said.discard("save")

    def _encode(self, domain: Domain) -> bytes:
        def bundle(held: Held | None) -> dict[str, Any] | None:
            return None if held is None or self.trust is None else self.trust.keep(held)

        kept = {
            "format": FORMAT,
            "source": self._settings.api_url,
            "floor": domain.floor,
            "ends": domain.ends,
            "serving": bundle(domain.serving),
            "ready": bundle(domain.ready),
        }
        return json.dumps(kept, separators=(",", ":")).encode()

    def _write_all(self, texts: dict[str, bytes | None]) -> None:
        statefiles.ensure_dir(self._folder)
        for id, text in texts.items():
            path = self._folder / f"{id}.json"
            if not _FILE.match(path.name):
                continue  # no id of ours: it is served from memory
            if text is None:
                path.unlink(missing_ok=True)
            else:
                statefiles.replace(path, text)


def _bundles(answer: Any) -> dict[str, Any]:
    """By id, unchecked. Raises ``SnapshotInvalid`` for what is no answer."""
    rows = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise SnapshotInvalid("the answer holds no certificates")
    return {
        row["certificate"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("certificate"), str)
    }


def _mismatch(found: Held, row: CertificateRow, ref: CertificateRef) -> str | None:
    """Why what was opened is not what the stream speaks of."""
    if found.ref != ref:
        return "the stream names another version or fingerprint than the manifest"
    if found.bundle.domain != row.domain:
        return "the manifest is of another domain"
    if found.hostname != row.hostname:
        return "the stream names another host name than the manifest"
    return None
