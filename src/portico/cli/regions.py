"""`portico admin regions`: the keys that certificates of custom domains are sealed for, and files with new ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico.cli import output
from portico.cli.database import DataOption, with_database
from portico.cli.processes import ConfigOption
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.kit.db import Database

group = typer.Typer(
    help="Regions: for whom private keys of certificates are sealed.",
    rich_markup_mode=None,
    invoke_without_command=True,
)
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RegionArgument = Annotated[str, typer.Argument(metavar="REGION", help="As its relays announce it.", show_default=False)]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Must not be there yet.", show_default=False)]


@group.callback()
def listing(
    context: typer.Context, data: DataOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Regions, their keys and their relays.

    Needs the database's address as the API does, or --data.
    """
    if context.invoked_subcommand is not None:
        context.obj = (data, config)
        return

    async def act(db: Database) -> list[dict[str, Any]]:
        from portico.control.domains import regions

        async with db.read() as reader:
            return await regions.listing(reader, _lease())

    found = with_database(data, config, act)
    if as_json:
        for region in found:
            for key in region["keys"]:
                key["created_at"] = key["created_at"].isoformat()
        output.print_json(found)
        return
    rows: list[tuple[str, str, str, str]] = []
    for region in found:
        relays = ", ".join(region["relays"]) or "-"
        keys = region["keys"] or [{"key_id": "no key: takes no part", "missing": "-"}]
        rows += [(region["region"], key["key_id"], str(key["missing"]), relays) for key in keys]
    output.table(("region", "key", "missing", "relays"), rows, empty="There are none.")


@group.command(name="new-key")
def new_key(path: FileArgument, as_json: JsonOption = False) -> None:
    """Write a new private key for a region's relays (0600), and print its public half.

    The file goes to the relays (region_key_files), the public half to `portico admin regions add`.
    """
    from portico.kit import keyfiles

    _write(path, keyfiles.new_region_key())
    name, public = keyfiles.region_keys("FILE", (path,)).newest
    _show({"file": str(path), "key_id": name, "public_key": _text(public.public_bytes_raw())}, as_json)


@group.command(name="new-worker-key")
def new_worker_key(path: FileArgument, as_json: JsonOption = False) -> None:
    """Write new keys for the certificate worker (0600), and print what relays must trust.

    The file goes to every certificate worker (certificate_key_file), the signer to every relay (certificate_signers).
    """
    from portico.kit import keyfiles

    _write(path, keyfiles.new_worker_keys())
    _show({"file": str(path), "signer": keyfiles.worker_keys("FILE", path).public}, as_json)


# A public half may begin with a hyphen: keys of other makers, and of earlier versions of `new-key`.
@group.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
def add(context: typer.Context, region: RegionArgument, public_key: str, as_json: JsonOption = False) -> None:
    """Register the public key of a region, PUBLIC_KEY as `new-key` printed it.

    The certificate worker wraps every certificate for it within seconds.
    """

    async def act(db: Database) -> dict[str, Any]:
        from portico.control.domains import regions
        from portico.control.identity import operators

        async with db.transaction() as tx:
            return await regions.add_key(tx, operators.INSTALLATION, region, public_key)

    if not region.replace("-", "").isalnum() or region != region.lower() or len(region) > 32:
        raise Problem("config.invalid", f"REGION {region!r}: lower-case letters, digits and hyphens, please")
    data, config = context.obj
    found = with_database(data, config, act)
    _show({"region": region, "key_id": found["key_id"], "missing": found["missing"]}, as_json)


@group.command(name="rm")
def remove(context: typer.Context, region: RegionArgument, key_id: str) -> None:
    """Take a key of a region out of use, once another one has every certificate."""

    async def act(db: Database) -> None:
        from portico.control.domains import regions
        from portico.control.identity import operators

        async with db.transaction() as tx:
            await regions.remove_key(tx, operators.INSTALLATION, region, key_id, _lease())

    data, config = context.obj
    with_database(data, config, act)
    output.echo(f"{output.printable(region)} does not use {output.printable(key_id)} any more")


def _lease() -> float:
    """Seconds since its last heartbeat for which a relay is healthy: what the setting is unless it was changed."""
    import dataclasses

    from portico.settings import ApiSettings

    return float(next(str(one.default) for one in dataclasses.fields(ApiSettings) if one.name == "relay_lease_seconds"))


def _text(raw: bytes) -> str:
    import base64

    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _write(path: Path, text: str) -> None:
    from portico.embedded.secretfiles import write_private

    if path.exists():
        raise Problem("config.invalid", f"{path} is there already; a key that is in use is not overwritten")
    try:
        write_private(path, text)
    except OSError as err:
        raise Problem("config.invalid", f"{path} cannot be written: {err.strerror}") from None


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(values)
        return
    for name, value in values.items():
        output.echo(f"{name:<11} {value}")
