"""`portico audit verify`: check an audit log, without trust in who keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico.cli import output
from portico.cli.account import ServerOption, with_api
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.api import Api
    from portico.control.audit.chain import Entry, Fault, Walk
    from portico.kit.jwt import KeySet

group = typer.Typer(help="The audit log of an organization.", no_args_is_help=True, rich_markup_mode=None)

#: Bytes of one line of an export, and of a file of checkpoints.
MAX_LINE = 1024 * 1024
MAX_CHECKPOINTS = 64 * 1024 * 1024


KeysOption = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        metavar="FILE",
        help="Public keys (JWKS) kept earlier: checkpoints must be signed by one of them, not by what is sent along.",
        show_default=False,
    ),
]


@group.command()
def verify(
    export: Annotated[
        Path | None,
        typer.Argument(
            metavar="[EXPORT]",
            help="A file of GET /v1/audit/export; without one the platform is asked.",
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoints",
            metavar="PATH",
            help="Kept answers of GET /v1/audit/checkpoints, or a folder of them; again for more.",
            show_default=False,
        ),
    ] = None,
    keys: KeysOption = None,
    installation: Annotated[
        bool,
        typer.Option(
            "--installation", help="The log of the installation, with the operator key, not an organization's."
        ),
    ] = False,
    server: ServerOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that an audit log is what was written.

    With EXPORT nothing is asked of the platform: numbers and hashes must fit, and every checkpoint that was kept elsewhere
    must agree. Without it, the platform checks its log, everything is exported and computed again here, and
    its checkpoints and yours are compared; that needs a key with audit:read (in PORTICO_AGENT_KEY). Exit code 1 when
    something is wrong.
    """  # fmt: skip
    pinned = _pinned(keys)
    kept = _Kept()
    for path in checkpoints or ():
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            kept.add(_document(file, "--checkpoints"), pinned, str(file))
    if export is not None:
        outcome = _walked(_entries(export), kept)
    else:
        outcome = with_api(server, lambda api: _online(api, "admin/audit" if installation else "audit", kept, pinned))
    if as_json:
        output.print_json(outcome)
    elif outcome["fault"] is None:
        _show(outcome, kept)
    if (fault := outcome["fault"]) is not None:
        raise Problem("audit.broken", f"number {fault['seq']}: {fault['kind']}: {fault['detail']}")


def _show(outcome: dict[str, Any], kept: _Kept) -> None:
    last = outcome["last"]
    output.echo(f"valid        {outcome['chain']}")
    output.echo(f"rows         {outcome['checked']} checked, up to number {last['seq']}")
    output.echo(f"hash         {last['hash']}")
    output.echo(f"checkpoints  {outcome['checkpoints']} agree")
    if outcome["from"] > 1:
        what = "retention deleted the rest, and signed that" if outcome["anchored"] else "the rest was not looked at"
        output.note(f"The log begins at number {outcome['from']}; {what}.")
    if not kept.given:
        output.note("Without --checkpoints nobody can tell whether the end was cut off or all was hashed anew.")


@dataclass
class _Kept:
    """Signed statements about a log, signatures checked."""

    signed: list[dict[str, Any]] = field(default_factory=list)
    anchors: list[dict[str, Any]] = field(default_factory=list)
    given: int = 0  # of those, how many the user kept

    def add(self, document: dict[str, Any], pinned: KeySet | None, source: str, *, theirs: bool = False) -> None:
        """Take the statements of an answer of GET /v1/audit/checkpoints; by ``pinned`` keys, or those that came with it."""
        from portico.control.audit.checkpoint_tokens import ANCHOR_TYP, read
        from portico.kit import jwt

        try:
            known = pinned if pinned is not None else jwt.KeySet.from_jwks({"keys": document["keys"]})
            self.signed += (found := [read(row["token"], known) for row in document["data"]])
            self.given += 0 if theirs else len(found)
            if document.get("anchor") is not None:
                self.anchors.append(read(document["anchor"]["token"], known, ANCHOR_TYP))
        except jwt.InvalidToken as err:
            by = " by a key of --keys" if pinned is not None else ""
            raise Problem("audit.broken", f"{source}: a checkpoint does not verify{by}: {err}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            what = f"{source} is not an answer of GET /v1/audit/checkpoints"
            raise Problem("api.unexpected" if theirs else "config.invalid", what) from None


def _pinned(path: Path | None) -> KeySet | None:
    from portico.kit import jwt

    if path is None:
        return None
    document = _document(path, "--keys")
    try:
        return jwt.KeySet.from_jwks({"keys": document["keys"]})
    except (ValueError, KeyError, TypeError):
        raise Problem("config.invalid", f"--keys {path} holds no public keys (JWKS)") from None


def _document(path: Path, option: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_CHECKPOINTS))
    except OSError as err:
        raise Problem("config.invalid", f"{option} {path}: {err.strerror}") from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise Problem("config.invalid", f"{option} {path} is not a JSON object")
    return document


async def _online(api: Api, base: str, kept: _Kept, pinned: KeySet | None) -> dict[str, Any]:
    """What the platform says of its own log, and what its export says to us; the second decides."""
    said = await _said(api, base)
    await _add_all(api, base, kept, pinned)  # before the rows: then none is younger than they are
    walker = _Walker(kept)
    async for line in api.lines(f"{base}/export"):
        walker.take(_entry(line, f"the export of {api.server}"))
    outcome = walker.end()
    if outcome["fault"] is None and said["fault"] is not None:
        outcome |= {"valid": False, "fault": said["fault"]}
    last, head = outcome["last"]["seq"], said["head"]["seq"]
    if outcome["fault"] is None and last < head:  # the export was begun later, so it can only be longer
        detail = f"the platform's log ends at {head}, its export at {last}"
        outcome |= {"valid": False, "fault": {"seq": last + 1, "kind": "missing", "detail": detail}}
    return outcome


async def _said(api: Api, base: str) -> dict[str, Any]:
    """GET …/verify, piece by piece to its end or its first fault."""
    following: int | None = None
    while True:
        said = await api.call("GET", f"{base}/verify" + (f"?from={following}" if following else ""))
        following = said["next"]
        if following is None:
            return said


async def _add_all(api: Api, base: str, kept: _Kept, pinned: KeySet | None) -> None:
    """Every checkpoint that the platform has."""
    cursor: str | None = None
    while True:
        document = await api.call("GET", f"{base}/checkpoints?limit=100" + (f"&cursor={cursor}" if cursor else ""))
        kept.add(document, pinned, api.server, theirs=True)
        cursor = document["next_cursor"]
        if not cursor:
            return


def _entries(path: Path) -> Iterator[Entry]:
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                yield _entry(line, str(path))
    except OSError as err:
        raise Problem("config.invalid", f"{path}: {err.strerror}") from None


def _entry(line: bytes, source: str) -> Entry:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Problem("config.invalid", f"{source} is not an export in JSON Lines")
    return found


def _walked(entries: Iterable[Entry], kept: _Kept) -> dict[str, Any]:
    walker = _Walker(kept)
    for entry in entries:
        walker.take(entry)
        if walker.broken:
            break
    return walker.end()


class _Walker:
    """Walks along an export, whatever its length, and then compares what was signed."""

    def __init__(self, kept: _Kept) -> None:
        self._kept = kept
        self._walk: Walk | None = None
        self._first = 1
        self._before: str | None = None  # the hash that the first entry stands on
        self._wanted = {claims["seq"] for claims in kept.signed}
        self._hashes: dict[int, str] = {}

    @property
    def broken(self) -> bool:
        return self._walk is not None and self._walk.fault is not None

    def take(self, entry: Entry) -> None:
        """The next entry."""
        from portico.control.audit import chain as chains

        unread = True
        if self._walk is None:
            self._walk, unread = chains.begin(entry)
            self._first = self._walk.seq + 1 if unread else self._walk.seq
            self._before = self._walk.last.hex() if unread else None
        if unread and self._walk.fault is None:
            self._walk.feed([entry])
        if self._walk.fault is None and self._walk.seq in self._wanted:
            self._hashes[self._walk.seq] = entry["hash"]

    def end(self) -> dict[str, Any]:
        """What was found."""
        from portico.control.audit import chain as chains

        signed = self._kept.signed
        walk = self._walk
        if walk is None:
            walk = chains.Walk(signed[0]["chain"] if signed else "", 0, chains.ZERO)
        if walk.fault is None:
            walk.fault = self._disagreement(walk) or self._unanchored(walk)
        anchored = any(claims["seq"] == self._first - 1 for claims in self._kept.anchors)
        return _outcome(walk, len(signed), self._first, anchored=anchored)

    def _disagreement(self, walk: Walk) -> Fault | None:
        from portico.control.audit.chain import Fault
        from portico.control.audit.checkpoint_tokens import fault_of

        for claims in sorted(self._kept.signed, key=lambda claims: int(claims["seq"])):
            if claims["chain"] != walk.chain:
                return Fault(claims["seq"], "chain", f"a checkpoint is of {claims['chain']}, the log of {walk.chain}")
            if (fault := fault_of(claims, self._hashes, walk.seq)) is not None:
                return fault
        return None

    def _unanchored(self, walk: Walk) -> Fault | None:
        """A log that begins later than retention says, or on another hash, lacks rows that nobody was to delete."""
        from portico.control.audit.chain import Fault

        for claims in self._kept.anchors:
            if claims["chain"] != walk.chain:
                return Fault(claims["seq"], "anchor", f"retention signed for {claims['chain']}")
            if claims["seq"] == self._first - 1 and self._before not in (None, claims["hash"]):
                return Fault(claims["seq"], "anchor", "retention signed another hash than the first row stands on")
        return None


def _outcome(walk: Walk, checkpoints: int, first: int, *, anchored: bool) -> dict[str, Any]:
    fault = walk.fault
    return {
        "chain": walk.chain,
        "valid": fault is None,
        "from": first,
        "anchored": anchored,
        "checked": walk.checked,
        "last": {"seq": walk.seq, "hash": walk.last.hex()},
        "checkpoints": checkpoints,
        "fault": None if fault is None else {"seq": fault.seq, "kind": fault.kind, "detail": fault.detail},
    }


def register(app: typer.Typer) -> None:
    """Add this file's commands."""

    @group.callback()
    def audit() -> None: ...

    app.add_typer(group, name="audit")
