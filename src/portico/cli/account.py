"""`portico login`, `logout`, `whoami`: the sign-in of this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from portico import settings
from portico.cli import output
from portico.errors import Problem

if TYPE_CHECKING:
    from portico.agent.api import Api
    from portico.agent.credentials import Credentials

ServerOption = Annotated[
    str | None,
    typer.Option("--server", help="Address of the API [the one of the sign-in].", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ProxyOption = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        metavar="URL",
        help="Proxy to the platform: http://, socks5:// or socks5h://[user:password@]host:port; none for no proxy. Better in "
        "PORTICO_PROXY_URL, where ps does not show the password [HTTPS_PROXY, ALL_PROXY].",
        show_default=False,
    ),
]


#: What a proxy says for a moment; a sign-in that waits for a person goes on.
PROXY_PASSING = ("proxy.unreachable", "proxy.timeout", "proxy.target_unreachable")


def signed_in(server: str | None) -> tuple[settings.AgentSettings, Credentials]:
    """Settings and credentials of this machine; raises ``auth.not_logged_in``."""
    from portico.agent import credentials

    config = settings.agent_settings({"server": server})
    return config, credentials.current(config)


def with_api(server: str | None, work: Any) -> Any:
    """Run ``await work(api)`` with a client for the current sign-in."""
    from portico.agent.api import Api
    from portico.kit import loop

    config, found = signed_in(server)

    async def main() -> Any:
        api = Api(found.server, found.agent_key, config)
        try:
            return await work(api)
        finally:
            await api.aclose()

    return loop.run(main())


def login(
    server: ServerOption = None,
    token: Annotated[
        str | None,
        typer.Option("--token", help="An agent key; - reads it from standard input.", show_default=False),
    ] = None,
    proxy: ProxyOption = None,
) -> None:
    """Sign this machine in, by browser or with an agent key."""
    from portico.agent import credentials
    from portico.agent.api import server_url
    from portico.kit import loop

    config = settings.agent_settings({"server": server, "proxy_url": proxy})
    stored = None if config.server else credentials.read(config.config_dir)
    address = server_url(config.server or (stored.server if stored is not None else credentials.DEFAULT_SERVER))
    if token == "-":  # noqa: S105 - a dash, not a secret
        token = sys.stdin.readline()
    elif token is None and config.agent_key:
        token = config.agent_key.reveal()
    found = loop.run(_login(config, address, token.strip() if token is not None else None))
    path = credentials.write(config.config_dir, found)
    output.echo(f"Signed in to {found.server} as {found.account}. The key is in {path}.")


async def _login(config: settings.AgentSettings, server: str, token: str | None) -> Credentials:
    from portico.agent.api import Api
    from portico.agent.credentials import Credentials
    from portico.kit.ids import check_token
    from portico.settings import Secret

    own_key = token is None
    if token is None:
        api = Api(server, None, config)
        try:
            token = await _by_device(api)
        finally:
            await api.aclose()
    kind = check_token(token)
    if kind == "opr":
        raise Problem(
            "auth.key_invalid",
            "this is an operator key, which serves no tunnels",
            hint="Give an agent key (tnl_agt_…), such as agent_key in credentials.json.",
        )
    if kind not in ("agt", "sk"):
        raise Problem(
            "auth.key_invalid",
            "this is not a whole agent key",
            hint="Copy the key again, from tnl_agt_ to its last character.",
        )
    api = Api(server, Secret(token), config)
    try:
        return Credentials(server, Secret(token), account_name(await api.call("GET", "whoami")), own_key)
    finally:
        await api.aclose()


def account_name(who: dict[str, Any]) -> str:
    """E-mail and organization of a ``/whoami`` answer, as far as there are."""
    names = [(who.get("user") or {}).get("email"), (who.get("organization") or {}).get("name")]
    return " · ".join(name for name in names if name) or str(who.get("kind", "unknown"))


async def _by_device(api: Api) -> str:
    """The device flow of RFC 8628; the key, once a person approved."""
    import asyncio
    import socket

    started = await api.call("POST", "auth/device", {"hostname": socket.gethostname()[:100] or "unnamed device"})
    try:
        url = str(started.get("verification_uri_complete") or started["verification_uri"])
        code, device = str(started["user_code"]), str(started["device_code"])
        interval = max(1.0, float(started.get("interval", 5)))
    except (KeyError, ValueError) as err:
        raise Problem("api.unexpected", f"the sign-in lacks {err}") from None
    output.echo(f"Open {url}\nand check that it shows the code {code}")
    open_browser(url)
    while True:
        await asyncio.sleep(interval)
        try:
            return str((await api.call("POST", "auth/device/token", {"device_code": device}))["agent_key"])
        except Problem as problem:
            if problem.code == "device.slow_down":
                interval += 5
            elif problem.code not in ("device.authorization_pending", "api.unreachable", *PROXY_PASSING):
                raise


def open_browser(url: str) -> None:
    """Open the page where there is a browser with a window; a text browser would take the terminal away."""
    import webbrowser

    if not sys.stdout.isatty() or not url.startswith(("http://", "https://")):
        return
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if type(browser) is not webbrowser.GenericBrowser:
        browser.open(url)


def logout() -> None:
    """Forget the sign-in of this machine.

    A key that the browser sign-in made for this machine is revoked; one that was given with --token stays valid.
    """
    from portico.agent import credentials
    from portico.agent.api import Api
    from portico.kit import loop

    config = settings.agent_settings()
    stored = credentials.read(config.config_dir)
    if stored is None:
        output.echo("This machine was not signed in.")
        return

    async def revoke() -> None:
        api = Api(stored.server, stored.agent_key, config)
        try:
            await api.call("POST", "auth/logout")
        finally:
            await api.aclose()

    if stored.own_key:
        try:
            loop.run(revoke())
        except Problem as problem:
            if problem.status != 401:
                output.note(f"portico: the key was not revoked at {stored.server}: {problem.detail}")
    credentials.remove(config.config_dir)
    kept = "" if stored.own_key else " The key itself stays valid; revoke it in the console or by the API."
    output.echo(f"Signed out of {stored.server}.{kept}")


def whoami(server: ServerOption = None, json: JsonOption = False) -> None:
    """Show who this machine is signed in as."""

    async def ask(api: Api) -> tuple[str, dict[str, Any]]:
        return api.server, await api.call("GET", "whoami")

    address, who = with_api(server, ask)
    if json:
        output.print_json({"server": address, **who})
        return
    organization = who.get("organization") or {}
    rows = [
        ("server", address),
        ("user", (who.get("user") or {}).get("email")),
        ("organization", organization.get("name")),
        ("plan", organization.get("plan")),
        ("key", (who.get("key") or {}).get("prefix")),
    ]
    for name, value in rows:
        if value:
            output.echo(f"{name:<13} {value}")


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(login)
    app.command()(logout)
    app.command()(whoami)
