"""What `portico up` tells a person once it is ready."""

from __future__ import annotations

from portico.embedded import secretfiles
from portico.embedded.platform import Platform
from portico.kit.paint import Paint


def key_text(platform: Platform, show: bool) -> str:
    """The agent key, for a person at a terminal; where output is kept in a file, its place."""
    return str(platform.credentials["agent_key"]) if show else "KEY (agent_key in credentials.json)"


def summary(platform: Platform, paint: Paint, show_key: bool) -> str:
    """Addresses, the first admin (once), where the credentials are, what to try next."""
    c = platform.credentials
    domain = platform.settings.base_domain
    main = platform.relay(1)
    rows = [
        ("Public URLs", paint.link(f"http://NAME.{domain}:{main.http}")),
        ("", paint.link(f"https://NAME.{domain}:{main.https}")),
    ]
    rows += [
        ("Its CA", f"{platform.dev_ca} {paint.dim('(portico dev-ca install: how to trust it)')}"),
        ("TCP tunnels", f"{domain}, ports {platform.settings.tcp_ports}"),
        ("API, console", paint.link(c["api_url"])),
        ("Agents", c["control_url"]),
        ("Data", str(platform.home)),
        ("Mail", "by the server of PORTICO_SMTP_URL" if platform.sends_mail else f"{platform.outbox} (as files)"),
        ("Credentials", f"{platform.home / secretfiles.CREDENTIALS} {paint.dim('(only you can read it)')}"),
    ]
    rows += [
        (
            "Payments" if name == "stripe" else "",
            f"{paint.link(url)} {paint.dim(f'({name}, simulated: no money moves)')}",
        )
        for name, url in platform.simulators.items()
    ]
    lines = ["", paint.bold("Portico is ready."), "", *(f"  {name:<13} {value}" for name, value in rows), ""]
    if platform.first_admin:
        lines += [
            paint.bold("  First admin (shown only now)"),
            *(f"    {key:<11} {value}" for key, value in platform.first_admin.items()),
            "",
        ]
    web = f"http://web.{domain}:{platform.relay(1).http}"
    lines += [
        paint.bold("  Try next, in another terminal"),
        f"    portico login --server {c['api_url']} --token {key_text(platform, show_key)}",
        f"    portico http 8000 --name web      {paint.dim(f'# your app on port 8000, at {web}')}",
        "",
        paint.dim("  Ctrl-C ends everything."),
        "",
    ]
    return "\n".join(lines)
