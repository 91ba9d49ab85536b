"""Certificates in files: pairs that the operator named, and folders of pairs; read again when they change.

A new file that cannot be served with never replaces what is served: it is logged with its reason, once, and read again when it
changes. Between the two writes of a renewal certificate and key do not fit; the next look finds both.
"""

from __future__ import annotations

import datetime as dt
import logging
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from portico.errors import Problem
from portico.relay.certificates import Certificate, CertificateInvalid, CertificateStore, read
from portico.settings import Secret, check_private

log = logging.getLogger("portico.relay.certificates")

#: Days before its end in which a certificate is worth a word when it is read.
ENDS_SOON: Final = dt.timedelta(days=14)
#: Bytes of a file: a chain of a dozen certificates has some 30,000.
MAX_FILE: Final = 1 << 20
#: How others name a certificate and its key in one folder (certbot, Kubernetes).
_KNOWN_PAIRS: Final = (("fullchain.pem", "privkey.pem"), ("tls.crt", "tls.key"))
_CERTIFICATE_SUFFIXES: Final = (".crt", ".cer", ".pem")

Mark = tuple[tuple[int, int, int], ...]


class Pair(NamedTuple):
    """A file with a certificate and its chain, and the one with its key (the same, when one file has both).

    ``named``: the operator wrote its name, so that it has to be there at the start.
    """

    chain: Path
    key: Path
    named: bool

    def __str__(self) -> str:
        return str(self.chain) if self.chain == self.key else f"{self.chain} with {self.key}"


def pairs(items: Iterable[str]) -> list[Pair]:
    """The pairs of the setting ``tls_certificates``: ``CERT:KEY``, a file with both, or a folder of them."""
    found: dict[Pair, None] = {}
    for item in items:
        chain, _, key = item.partition(":")
        path = Path(chain).expanduser()
        if key:
            found[Pair(path, Path(key).expanduser(), named=True)] = None
        elif path.is_dir():
            found |= dict.fromkeys(_in_folder(path))
        else:
            found[Pair(path, path, named=True)] = None
    return list(found)


def _in_folder(folder: Path) -> Iterator[Pair]:
    """The pairs of a folder and of the folders in it."""
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))):
        files = {path.name: path for path in sorted(place.iterdir()) if not path.name.startswith(".")}
        known = [(chain, key) for chain, key in _KNOWN_PAIRS if chain in files and key in files]
        if known:  # certbot keeps parts of the chain beside it
            yield from (Pair(files[chain], files[key], named=False) for chain, key in known)
            continue
        for path in files.values():
            if path.suffix in _CERTIFICATE_SUFFIXES and not path.stem.endswith("-key"):
                key = files.get(f"{path.stem}.key") or files.get(f"{path.stem}-key.pem") or path
                yield Pair(path, key, named=False)


class Look(NamedTuple):
    """What a look at the files found, by pair: what is new and good, and why another is not served; ``there``: all of them."""

    good: dict[Pair, tuple[Mark, Certificate]]
    bad: dict[Pair, tuple[Mark | None, str]]
    there: frozenset[Pair]


class CertificateFiles:
    """The source of certificates in files. :meth:`look` reads, in any thread; :meth:`take` puts it to use, on the loop."""

    name = "files"

    def __init__(self, items: tuple[str, ...], passphrase: Secret | None) -> None:
        self._items = items
        self._passphrase = passphrase.reveal().encode() if passphrase is not None else None
        self._held: dict[Pair, tuple[Mark, Certificate]] = {}
        self._refused: dict[Pair, tuple[Mark | None, str]] = {}
        self._gone: frozenset[Pair] = frozenset()

    def fill(self, store: CertificateStore) -> None:
        """The first look. Raises ``config.invalid`` for a pair that was named and cannot be served with."""
        found = self.look()
        for pair, (_, why) in found.bad.items():
            if pair.named:
                raise Problem("config.invalid", f"setting tls_certificates: {pair}: {why}", key="tls_certificates")
        self.take(found, store)

    def look(self) -> Look:
        """Read what changed since :meth:`take`."""
        good: dict[Pair, tuple[Mark, Certificate]] = {}
        bad: dict[Pair, tuple[Mark | None, str]] = {}
        try:
            there = pairs(self._items)
        except OSError as err:
            log.error("a folder of certificates cannot be read", extra={"f": {"why": str(err)}})
            there = list(self._held)
        for pair in there:
            mark: Mark | None = None
            try:
                mark = _mark(pair)
                held = self._held.get(pair)
                if held is None or held[0] != mark:
                    good[pair] = (mark, self._read(pair, held[1] if held is not None else None))
            except CertificateInvalid as err:
                bad[pair] = (mark, str(err))
            except Problem as problem:
                bad[pair] = (mark, problem.detail)
            except OSError as err:
                bad[pair] = (None, f"it cannot be read: {err.strerror}")
        return Look(good, bad, frozenset(there))

    def _read(self, pair: Pair, before: Certificate | None) -> Certificate:
        check_private("the key", pair.key, stat.S_IMODE(pair.key.stat().st_mode))
        chain, key = (_bytes(path) for path in (pair.chain, pair.key))
        made = read(chain, key, self._passphrase)
        now = dt.datetime.now(dt.UTC)
        if made.not_after <= now and before is not None and before.not_after > now:
            raise CertificateInvalid(f"it ended at {made.not_after:%Y-%m-%d %H:%M} UTC")
        return made

    def take(self, found: Look, store: CertificateStore) -> None:
        """Serve what is new and good, and say what is not. A file that is gone for two looks is served no more."""
        for pair, refusal in found.bad.items():
            if self._refused.get(pair) != refusal:
                kept = "the one before goes on" if pair in self._held else "it is not served"
                fields = {"file": pair, "why": refusal[1], "now": kept}
                log.error("a certificate file is no good", extra={"f": fields})
        self._refused = found.bad
        gone = frozenset(self._held) - found.there
        left = gone & self._gone
        self._gone = gone - left
        if not found.good and not left:
            return
        self._held = {pair: held for pair, held in self._held.items() if pair not in left} | found.good
        for pair, (_, certificate) in found.good.items():
            _say(pair, certificate)
        store.replace(self.name, [certificate for _, certificate in self._held.values()])


def _mark(pair: Pair) -> Mark:
    """Something that differs when a file was changed or replaced."""
    infos = [path.stat() for path in (pair.chain, pair.key)]
    return tuple((info.st_mtime_ns, info.st_ino, info.st_size) for info in infos)


def _bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise CertificateInvalid(f"{path} is too large")
    return data


def _say(pair: Pair, certificate: Certificate) -> None:
    left = certificate.not_after - dt.datetime.now(dt.UTC)
    names = sorted(name.decode() for name in (*certificate.names, *(b"*." + parent for parent in certificate.parents)))
    fields = {"file": pair, "names": ",".join(names[:10]), "until": certificate.not_after.date()}
    if left < dt.timedelta():
        log.error("serving a certificate that has ended", extra={"f": fields})
    elif left < ENDS_SOON:
        log.warning("serving a certificate whose end is near", extra={"f": fields})
    else:
        log.info("serving a certificate", extra={"f": fields})
