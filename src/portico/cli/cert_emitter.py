"""`portico-cert-emitter`: tells a platform what cert-manager, or certmagic, does with certificates.

    kubectl get certificaterequests,certificates,orders,challenges -A --watch -o json | portico-cert-emitter \\
        --server https://api.example.com --source src_… --cluster eu-1 --environment production \\
        --key-file key --spool /var/lib/portico-cert-emitter

It ends when its input does, after at most ``--drain`` seconds for what waits: 0 when everything was taken, 75 when something
stays in the spool for the next start, 1 when it cannot work at all.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import httpx

from portico.agent import cert_emitter
from portico.agent.cert_spool import Spool
from portico.errors import Problem
from portico.kit import http_signatures
from portico.kit.http_signatures import Target
from portico.kit.signed_requests import SigningKey, headers
from portico.settings import check_private

PATH = "/v1/domains/cert-events"
#: What no further attempt changes: the id is another event's, the body too large or not one.
FINAL = (409, 413, 422)
RETRY_SECONDS, RETRY_MAX_SECONDS, TIMEOUT_SECONDS = 1.0, 300.0, 20.0
IDLE_SECONDS = 60.0
READ_BYTES = 65_536
#: Of a certificate with its chain.
MAX_CHAIN_BYTES = 262_144


class Sender:
    """Sends what is in the spool, in order, until it is told to stop."""

    def __init__(self, spool: Spool, args: argparse.Namespace, key: SigningKey, client: httpx.Client) -> None:
        self._spool, self._args, self._key, self._client = spool, args, key, client
        self.stop, self.more = threading.Event(), threading.Event()
        self._failures = 0

    def run(self) -> None:
        """Until ``stop``."""
        while not self.stop.is_set():
            if pause := self.round():
                self.stop.wait(pause)
            else:
                self.more.wait(IDLE_SECONDS)
                self.more.clear()

    def round(self) -> float:
        """Send what waits; the seconds until it is worth another try, 0 when nothing is left."""
        for path in self._spool.waiting():
            if self.stop.is_set():
                return 0.0
            status, why = self._post(path)
            if 200 <= status < 300:
                self._spool.taken(path)
            elif status in FINAL:
                say(f"{path.name} is refused for good: {why}")
                self._spool.refused(path)
            else:
                self._failures += 1
                bound = min(RETRY_MAX_SECONDS, RETRY_SECONDS * 2.0 ** min(self._failures, 20))
                pause = random.uniform(0, bound)  # noqa: S311 - jitter, no secret
                say(f"{path.name} is not taken yet ({why}); again in {pause:.1f} s")
                return pause
            self._failures = 0
        return 0.0

    def _post(self, path: Path) -> tuple[int, str]:
        """The status of the answer, 0 without one, and what it says."""
        event, body = self._spool.read(path)
        args, parts = self._args, urlsplit(self._args.server)
        target = Target("POST", http_signatures.authority(parts.netloc), PATH)
        fields = headers(args.codec, self._key, args.source, args.cluster, event, int(time.time()), target, body)
        try:
            answer = self._client.post(args.server.rstrip("/") + PATH, content=body, headers=fields)
        except httpx.HTTPError as err:
            return 0, type(err).__name__
        return answer.status_code, f"HTTP {answer.status_code} {answer.text[:200]}"


def feed(stream: BinaryIO, spool: Spool, args: argparse.Namespace, told: Callable[[], None]) -> None:
    """Read a feed to its end; what is new goes into the spool. Raises ``ValueError`` for what is no feed."""
    known, rest = spool.known(), ""

    def chains(path: str) -> str | None:
        return chain_in(args.storage, path)

    reader = getattr(stream, "read1", stream.read)
    while chunk := reader(READ_BYTES):
        found, rest = cert_emitter.documents(rest + chunk.decode("utf-8", "replace"))
        events = []
        for document in found:
            for happening in cert_emitter.read(document, known, chains):
                known.sequence += 1
                event, now = f"cev_{secrets.token_hex(13)}", datetime.now(UTC).isoformat()
                body = cert_emitter.body(
                    happening, event, args.source, args.cluster, args.environment, known.sequence, now
                )
                events.append((known.sequence, event, body))
        if events:
            spool.add(events, known)
            told()
    if rest.strip():
        say("the feed ended in the middle of a document")


def chain_in(storage: Path | None, path: str) -> str | None:
    """A chain in certmagic's storage, which has private keys beside: nothing else is read, and nothing outside of it."""
    if storage is None or not path.endswith(".crt"):
        return None
    try:
        found = (storage / path).resolve(strict=True)
        if (
            not found.is_relative_to(storage.resolve())
            or found.suffix != ".crt"
            or found.stat().st_size > MAX_CHAIN_BYTES
        ):
            return None
        return found.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None


def say(text: str) -> None:
    """To people, on stderr."""
    sys.stderr.write(f"portico-cert-emitter: {text}\n")
    sys.stderr.flush()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="portico-cert-emitter",
        description="Tells a platform what happens to certificates: signed events, kept on disk until they are taken.",
    )  # fmt: skip
    found.add_argument("feed", nargs="?", default="-", help="a file with the feed; -: standard input")
    found.add_argument("--server", required=True, help="the platform's API, as https://api.example.com")
    found.add_argument("--source", required=True, help="the source's id, src_…")
    found.add_argument("--cluster", required=True, help="one of the source's clusters")
    found.add_argument("--environment", required=True, help="the source's environment")
    found.add_argument(
        "--key-file", type=Path, required=True, help="a file with whsec_… or whsk_…, for its owner alone"
    )
    found.add_argument("--key-id", default="key", help="the key's id; needed with --codec http")
    found.add_argument("--codec", choices=("standard", "compact", "http"), default="standard")
    found.add_argument("--spool", type=Path, required=True, help="a folder for what is not taken yet")
    found.add_argument(
        "--storage", type=Path, help="certmagic's storage, for serial numbers: of its files the *.crt alone are read"
    )
    found.add_argument("--drain", type=float, default=30.0, help="seconds to send what waits after the feed's end")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    args = parser().parse_args(argv)
    try:
        check_private("the key file", args.key_file, args.key_file.stat().st_mode)
        key = SigningKey.of(args.key_id, args.key_file.read_text().strip())
        spool = Spool(args.spool)
        stream = sys.stdin.buffer if args.feed == "-" else Path(args.feed).open("rb")  # noqa: SIM115 - read to the end of the process
    except (OSError, ValueError, Problem) as err:
        say(str(err))
        return 1
    with httpx.Client(timeout=TIMEOUT_SECONDS) as client:
        sender = Sender(spool, args, key, client)
        thread = threading.Thread(target=sender.run, daemon=True)
        thread.start()
        try:
            feed(stream, spool, args, sender.more.set)
        except (OSError, ValueError) as err:
            say(str(err))
            return 1
        finally:
            until = time.monotonic() + args.drain
            while spool.waiting() and time.monotonic() < until:
                time.sleep(0.05)
            sender.stop.set()
            sender.more.set()
            thread.join(TIMEOUT_SECONDS + 1)
    left = len(spool.waiting())
    if left:
        say(f"{left} events stay in {spool.folder} for the next start")
    return 75 if left else 0


if __name__ == "__main__":
    sys.exit(main())
