"""What the environment says besides settings: folders, colours, proxies, systemd's sockets."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping
from pathlib import Path

from portico.errors import Problem
from portico.settings.secrets import Secret


def _user_folder(variable: str, default: str, name: str, environ: Mapping[str, str] | None) -> Path:
    environ = os.environ if environ is None else environ
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib") / name
    base = environ.get(variable, "")
    return (Path(base) if base.startswith("/") else Path.home() / default) / name


def default_data_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The data folder of `portico up` when none is named."""
    return _user_folder("XDG_DATA_HOME", ".local/share", "portico", environ)


def default_demo_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The data folder of `portico demo` when none is named."""
    return _user_folder("XDG_STATE_HOME", ".local/state", "portico-demo", environ)


def default_state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where the command line keeps what it writes about its own faults."""
    base = (os.environ if environ is None else environ).get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "portico"


def color_wanted(stream: typing.IO[str], environ: Mapping[str, str] | None = None) -> bool:
    """Colours only on a terminal that can, for people who have not said no (https://no-color.org).

    FORCE_COLOR and CLICOLOR_FORCE ask for them elsewhere too, in a CI log for instance; NO_COLOR is stronger than both.
    """
    environ = os.environ if environ is None else environ
    if environ.get("NO_COLOR"):
        return False
    if any(environ.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return stream.isatty() and environ.get("TERM") != "dumb" and environ.get("CLICOLOR") != "0"


def screen_wanted(*streams: typing.IO[str], environ: Mapping[str, str] | None = None) -> bool:
    """A screen that redraws itself: only where all streams are a terminal that can move its cursor."""
    environ = os.environ if environ is None else environ
    return all(stream.isatty() for stream in streams) and environ.get("TERM", "dumb") != "dumb"


def proxy_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that programs share about proxies, by lower-case name; the lower-case spelling wins, as in curl.

    HTTP_PROXY in capitals is left out where a web server could have set it from a visitor's header (CGI).
    """
    environ = os.environ if environ is None else environ
    found: dict[str, str] = {}
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        value = environ.get(name) or environ.get(name.upper(), "")
        if name == "http_proxy" and "REQUEST_METHOD" in environ:
            value = environ.get(name, "")
        if value:
            found[name] = value
    return found


def activated_sockets(environ: Mapping[str, str] | None = None, pid: int | None = None) -> str:
    """The sockets that systemd holds for this process (sd_listen_fds(3)), as ``listen_fds`` names them; empty without any.

    Raises ``config.invalid`` when they have no names (``FileDescriptorName=`` in the socket unit).
    """
    environ = os.environ if environ is None else environ
    if environ.get("LISTEN_PID") != str(os.getpid() if pid is None else pid):
        return ""  # they were for a parent of ours
    count = int(environ.get("LISTEN_FDS", "0"))
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    if len(names) != count or not all(names) or "unknown" in names:
        detail = "the sockets of systemd have no names: FileDescriptorName= is public, https, control or api"
        raise Problem("config.invalid", detail)
    return ",".join(f"{name}={number}" for number, name in enumerate(names, 3))


def debug_enabled(environ: Mapping[str, str] | None = None) -> bool:
    """PORTICO_DEBUG=1: an unexpected error shows its traceback."""
    return (os.environ if environ is None else environ).get("PORTICO_DEBUG", "") not in ("", "0")


def secret_from_environment(name: str) -> Secret:
    """The secret in a variable that a person named; raises ``config.invalid`` when it is not set."""
    if value := os.environ.get(name, "").strip():
        return Secret(value)
    raise Problem("config.invalid", f"the environment variable {name} is not set")
