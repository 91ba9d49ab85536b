"""`portico admin`: what only the operator of an installation does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from portico import settings
from portico.cli import admin_cert_events, admin_domains, ledger, operators, output, queues, regions, settlements
from portico.cli.processes import ConfigOption, require_server_parts
from portico.errors import Problem

group = typer.Typer(help="For the operator of an installation.", no_args_is_help=True, rich_markup_mode=None)


@group.command()
def init(
    keys: Annotated[
        Path, typer.Option("--keys", metavar="DIR", help="Folder that the keys are written to, one file each.")
    ],
    relay: Annotated[
        list[str] | None,
        typer.Option("--relay", metavar="NAME", help="Make a key for this relay; again for more.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the first accounts and keys of an installation.

    The first operator (whose password is shown once), the first organization, an operator key, an agent key and a key for
    each relay. A key whose file is there and valid is kept, so that running it again, with more relays for instance, is safe;
    a relay whose file was removed gets a new key, and its old one is revoked. Run `portico migrate` before.
    """
    require_server_parts()
    chosen = settings.load(settings.ApiSettings, table="api", file=config)
    from sqlalchemy.exc import ProgrammingError

    from portico.control import bootstrap
    from portico.kit import loop

    wanted = [_relay_name(name) for name in relay or ()]
    paths = {name: keys / f"{name}.key" for name in ("operator", "agent", *wanted)}
    known = {name: _known(path) for name, path in paths.items()}
    relays = [name for name in wanted if not known[name]]
    held = {"operator_key": known["operator"], "agent_key": known["agent"]}
    try:
        made = loop.run(bootstrap.ensure_first(chosen, relays=relays, known=held))
    except ProgrammingError:
        detail = "the database has no schema, or one that is older than this version"
        raise Problem("service.unavailable", detail, hint="Run: portico migrate") from None
    fresh = {"operator": made.operator_key, "agent": made.agent_key, **made.relay_keys}
    _write(keys, {paths[name]: key for name, key in fresh.items() if key != known[name]})
    document: dict[str, Any] = {
        "organization_id": made.organization_id,
        "first_admin": {"email": made.first_admin.email, "password": made.first_admin.password}
        if made.first_admin
        else None,
        "files": {name: str(path) for name, path in paths.items()},
    }
    if as_json:
        output.print_json(document)
        return
    for name, path in paths.items():
        output.echo(f"{name:<12} {path}{'' if fresh.get(name, known[name]) != known[name] else '  (kept)'}")
    output.echo(f"organization {made.organization_id}")
    if made.first_admin is not None:
        output.echo(f"operator     {made.first_admin.email}  password {made.first_admin.password}")
        output.note("The password is shown this once. Keep it where you keep passwords.")


@group.command(name="erase-audit")
def erase_audit(
    user: Annotated[str, typer.Argument(metavar="USER", help="The person's id, usr_….", show_default=False)],
    config: ConfigOption = None,
) -> None:
    """Erase one person's addresses, e-mail and host names from every audit log.

    The acts, their numbers and hashes stay, and the logs still verify. It cannot be undone.
    """
    require_server_parts()
    chosen = settings.load(settings.ApiSettings, table="api", file=config)
    from portico.control.identity import erasure
    from portico.kit import loop

    count = loop.run(erasure.erase_from_audit(chosen, user))
    output.echo(f"erased in {count} {'row' if count == 1 else 'rows'}")


def _relay_name(name: str) -> str:
    if name in ("operator", "agent") or not name.replace("-", "").replace(".", "").isalnum() or name.startswith("."):
        raise Problem("config.invalid", f"--relay {name!r}: letters, digits, dots and hyphens, please")
    return name


def _known(path: Path) -> str | None:
    """The key that an earlier run wrote; raises ``config.invalid`` when it cannot be read."""
    return settings.secret_in_file("--keys", path).reveal() if path.exists() else None


def _write(folder: Path, keys: dict[Path, str]) -> None:
    """Each key in a file of mode 0600. One that cannot be written is lost: it is made anew by the next run."""
    from portico.embedded.secretfiles import write_private

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, key in keys.items():
            write_private(path, key + "\n")
    except OSError as err:
        raise Problem("config.invalid", f"--keys {folder} cannot be written: {err.strerror}") from None


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    group.add_typer(queues.group, name="queues")
    group.add_typer(regions.group, name="regions")
    group.add_typer(admin_domains.group, name="domains")
    group.add_typer(admin_cert_events.group, name="cert-events")
    group.add_typer(settlements.group, name="settlements")
    group.add_typer(ledger.group, name="ledger")
    operators.register(group)
    app.add_typer(group, name="admin")
