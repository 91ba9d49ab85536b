"""`portico dev-ca`: the authority behind the HTTPS of `portico up`, and how to trust it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portico import settings
from portico.cli import output
from portico.cli.platform import DataOption
from portico.cli.processes import ConfigOption
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.embedded.devca import DevelopmentCa

group = typer.Typer(
    help="The authority behind the HTTPS of `portico up`: trust it, and browsers and curl do.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DomainOption = Annotated[
    str | None,
    typer.Option("--base-domain", metavar="NAME", help="The platform's base domain [localhost].", show_default=False),
]


def _chosen(data: Path | None, base_domain: str | None, config: Path | None) -> tuple[Path, str]:
    overrides = {"data_dir": data, "base_domain": base_domain}
    chosen = settings.load(settings.PlatformSettings, table="platform", file=config, overrides=overrides)
    return chosen.data_dir or settings.default_data_dir(), chosen.base_domain


@group.command()
def install(
    data: DataOption = None,
    base_domain: DomainOption = None,
    system: Annotated[
        bool, typer.Option("--system", help="Add it to this machine's list of authorities (as root; asks first).")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the certificate (PEM) and nothing else.")] = False,
    config: ConfigOption = None,
) -> None:
    """Say where the certificate is and how to trust it; make it, if there is none.

    Without --system nothing outside the data folder is changed. The authority can vouch for the base domain, for names below it
    and for this machine's loopback addresses; programs refuse it for anything else.
    """
    from portico.embedded import devca

    home, domain = _chosen(data, base_domain, config)
    if home.exists() and home.stat().st_uid != os.geteuid():
        # What we made there its owner's platform could not read; what is there can be trusted all the same.
        ca = devca.existing(home.resolve(), domain)
    else:
        try:
            home.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        except OSError as err:
            raise Problem("up.data_unusable", f"cannot make the data folder {home}: {err.strerror}") from None
        ca = devca.ensure(home.resolve(), domain)
    if show:
        output.echo(ca.certificate.read_text(encoding="ascii").rstrip())
    elif system:
        _into_system(ca, domain, yes)
    else:
        output.echo(_advice(ca, domain))


def _into_system(ca: DevelopmentCa, domain: str, yes: bool) -> None:
    from portico.embedded import devca

    store = devca.system_store()
    if store is None:
        raise Problem(
            "config.invalid", "this system has no list of authorities that is known here; see without --system"
        )
    if os.geteuid() != 0:
        hint = f"Run: sudo cp {ca.certificate} {store.file(domain)} && sudo {' '.join(store.command)}"
        raise Problem("config.invalid", "only root can change this machine's list of authorities", hint=hint)
    if not yes:
        if not sys.stdin.isatty():
            raise Problem("config.invalid", "nobody to ask; add --yes to trust the authority on this machine")
        output.note(f"{ca.certificate}\nSHA-256 {_spaced(ca.fingerprint)}")
        if not typer.confirm(f"Trust it on this machine, for {domain} and names below it?", err=True):
            raise typer.Exit(output.FAILED)
    path = devca.trust(store, ca, domain)
    output.echo(
        f"Trusted as {path}. Browsers with a list of their own (Firefox, Chromium) need it too: portico dev-ca install"
    )


@group.command()
def uninstall(base_domain: DomainOption = None, config: ConfigOption = None) -> None:
    """Take it out of this machine's list of authorities (as root)."""
    from portico.embedded import devca

    _, domain = _chosen(None, base_domain, config)
    devca.folder(Path(), domain)
    store = devca.system_store()
    if store is None or not devca.distrust(store, domain):
        output.echo("It was not in this machine's list of authorities.")
    else:
        output.echo("It is out of this machine's list of authorities.")


def _spaced(fingerprint: str) -> str:
    """As browsers show it."""
    return ":".join(fingerprint[at : at + 2].upper() for at in range(0, len(fingerprint), 2))


def _advice(ca: DevelopmentCa, domain: str) -> str:
    path = ca.certificate
    rows = [
        ("one command", [f"curl --cacert {path} https://NAME.{domain}:7443/"]),
        ("Python", [f"SSL_CERT_FILE={path}", f"REQUESTS_CA_BUNDLE={path}"]),
        ("Node.js", [f"NODE_EXTRA_CA_CERTS={path}"]),
        (
            "Linux",
            [
                f"sudo portico dev-ca install --system --data {path.parents[2]}   or by hand:",
                f"sudo cp {path} /usr/local/share/ca-certificates/portico-dev-ca-{domain}.crt && sudo update-ca-certificates",
                f"sudo trust anchor {path}   (Fedora, RHEL, Arch)",
            ],
        ),
        (
            "Chromium",
            [
                "on Linux it has a list of its own (certutil is in libnss3-tools):",
                f"certutil -d sql:$HOME/.pki/nssdb -A -t C,, -n 'Portico dev CA {domain}' -i {path}",
            ],
        ),
        ("Firefox", ["Settings > Privacy & Security > View Certificates > Authorities > Import, for websites"]),
        (
            "macOS",
            [f"sudo security add-trusted-cert -d -r trustRoot -k /Library/Keychains/System.keychain {path}"],
        ),
        ("Windows", [f"certutil -addstore -user Root {path.name}   (copy the file there first)"]),
    ]
    lines = [
        f"{'Made a' if ca.made else 'The'} development authority for {domain}, names below it, and loopback addresses:",
        "",
        f"  file         {path}",
        f"  SHA-256      {_spaced(ca.fingerprint)}",
        f"  until        {ca.until}",
        "",
        "Trust it where you need it:",
        "",
    ]
    for name, hows in rows:
        lines += [f"  {name if not number else '':<13}{how}" for number, how in enumerate(hows)]
    lines += ["", "`portico up` serves HTTPS with certificates that it signs. It vouches for nothing else."]
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="dev-ca")
