"""`portico audit verify`: check an export of an audit log, without trust in who keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico.cli import output
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.control.audit.chain import Entry, Walk

group = typer.Typer(help="The audit log of an organization.", no_args_is_help=True, rich_markup_mode=None)

#: Bytes of one line of an export, and of a file of checkpoints.
MAX_LINE = 1024 * 1024
MAX_CHECKPOINTS = 64 * 1024 * 1024


@group.command()
def verify(
    export: Annotated[
        Path, typer.Argument(metavar="EXPORT", help="A file of GET /v1/audit/export.", show_default=False)
    ],
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoints",
            metavar="FILE",
            help="Kept answers of GET /v1/audit/checkpoints; again for more.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check that an audit log is what was written.

    Nothing is asked of the platform: numbers and hashes must fit, and every checkpoint that was kept elsewhere
    must agree. Exit code 1 when something is wrong.
    """  # fmt: skip
    signed = [claims for path in checkpoints or () for claims in _checkpoints(path)]
    outcome = _offline(export, signed)
    if as_json:
        output.print_json(outcome)
    elif outcome["fault"] is None:
        last = outcome["last"]
        output.echo(f"valid        {outcome['chain']}")
        output.echo(f"rows         {outcome['checked']} checked, up to number {last['seq']}")
        output.echo(f"hash         {last['hash']}")
        output.echo(f"checkpoints  {outcome['checkpoints']} agree")
        if outcome["from"] > 1:
            output.note(f"The export begins at number {outcome['from']}; the rest was checked against its hash.")
        if not signed:
            output.note("Without --checkpoints nobody can tell whether the end was cut off or all was hashed anew.")
    if (fault := outcome["fault"]) is not None:
        raise Problem("audit.broken", f"number {fault['seq']}: {fault['kind']}: {fault['detail']}")


def _checkpoints(path: Path) -> list[dict[str, Any]]:
    """The claims of every checkpoint in a file, signatures checked with the keys beside them."""
    from portico.control.audit.checkpoint_tokens import read
    from portico.kit import jwt

    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_CHECKPOINTS))
        known = jwt.KeySet.from_jwks({"keys": document["keys"]})
        return [read(row["token"], known) for row in document["data"]]
    except OSError as err:
        raise Problem("config.invalid", f"--checkpoints {path}: {err.strerror}") from None
    except jwt.InvalidToken as err:
        raise Problem("audit.broken", f"{path}: a checkpoint does not verify: {err}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Problem("config.invalid", f"--checkpoints {path} is not an answer of GET /v1/audit/checkpoints") from None


def _entries(path: Path) -> Iterator[Entry]:
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise ValueError
                yield found
    except OSError as err:
        raise Problem("config.invalid", f"{path}: {err.strerror}") from None
    except (ValueError, RecursionError):
        raise Problem("config.invalid", f"{path} is not an export in JSON Lines") from None


def _offline(path: Path, signed: list[dict[str, Any]]) -> dict[str, Any]:
    from portico.control.audit import chain as chains
    from portico.control.audit.checkpoint_tokens import fault_of

    wanted = {claims["seq"] for claims in signed}
    hashes: dict[int, str] = {}
    first = 1
    walk: Walk | None = None
    for entry in _entries(path):
        if walk is None:
            walk, unread = chains.begin(entry)
            first = walk.seq + 1 if unread else walk.seq
        else:
            unread = True
        if unread and walk.fault is None:
            walk.feed([entry])
        if walk.fault is not None:
            break
        if walk.seq in wanted:
            hashes[walk.seq] = entry["hash"]
    if walk is None:
        walk = chains.Walk(signed[0]["chain"] if signed else "", 0, chains.ZERO)
    if walk.fault is None:
        walk.fault = _disagreement(walk, signed, hashes, fault_of)
    return _outcome(walk, signed, first)


def _disagreement(walk: Walk, signed: list[dict[str, Any]], hashes: dict[int, str], fault_of: Any) -> Any:
    from portico.control.audit.chain import Fault

    for claims in sorted(signed, key=lambda claims: int(claims["seq"])):
        if claims["chain"] != walk.chain:
            return Fault(claims["seq"], "chain", f"a checkpoint is of {claims['chain']}, the log of {walk.chain}")
        if (fault := fault_of(claims, hashes, walk.seq)) is not None:
            return fault
    return None


def _outcome(walk: Walk, signed: list[dict[str, Any]], first: int) -> dict[str, Any]:
    fault = walk.fault
    return {
        "chain": walk.chain,
        "valid": fault is None,
        "from": first,
        "checked": walk.checked,
        "last": {"seq": walk.seq, "hash": walk.last.hex()},
        "checkpoints": len(signed),
        "fault": None if fault is None else {"seq": fault.seq, "kind": fault.kind, "detail": fault.detail},
    }


def register(app: typer.Typer) -> None:
    """Add this file's commands."""

    @group.callback()
    def audit() -> None: ...

    app.add_typer(group, name="audit")
