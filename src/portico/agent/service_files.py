"""What `portico service install` writes: a systemd unit, or a launchd property list. Pure: text out, nothing touched.

The service runs `portico start --all --config FILE`, is started again whenever it ends (ever more slowly where systemd can), and
may do what a tunnel needs and no more. A credential that the unit does not find in the sign-in of its account comes from a
file of its own: nothing secret stands in a unit, which every user may read.
"""

from __future__ import annotations

import plistlib
import re
from dataclasses import dataclass, field
from pathlib import Path

#: Exit codes after which another start helps nobody: a fault in the file or a setting, and a credential that was refused.
FINAL_EXITS = (2, 3)
#: The first systemd that waits longer after each failure (RestartSteps).
BACKOFF_SINCE = 254
RESTART_SECONDS, RESTART_MAX_SECONDS, RESTART_STEPS = 1, 60, 8
#: Where pauses cannot grow.
RESTART_FLAT_SECONDS = 5
#: Longer than the agent's own limits for its end (drain_seconds, goodbye_timeout_seconds).
STOP_SECONDS = 20

# What needs no privilege, and so works for the units of a user, too.
_HARDENED = (
    "NoNewPrivileges=yes",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallErrorNumber=EPERM",
    "UMask=0077",
)
_HARDENED_SYSTEM = (
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "ProtectSystem=strict",
    "ProtectHome=read-only",
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
    "PrivateDevices=yes",
    "PrivateTmp=yes",
    "RemoveIPC=yes",
)


@dataclass(frozen=True, slots=True)
class Service:
    """What is to run. ``system``: for the machine, else for one user; ``environment`` holds no secret."""

    name: str
    argv: tuple[str, ...]
    config: Path
    system: bool
    environment: dict[str, str] = field(default_factory=dict)
    #: File that holds the agent key; none: the sign-in of the account that the service runs as.
    key_file: Path | None = None
    #: Account of a system service; none: one that exists while it runs.
    account: str | None = None


def systemd_unit(service: Service, version: int | None = None) -> str:
    """The unit, for systemd ``version`` (none: the newest)."""
    lines = [
        "# Written by `portico service install`; it is replaced by the next one.",
        "[Unit]",
        f"Description=Portico tunnels of {_escape(str(service.config))}",
    ]
    if service.system:
        lines += ["Wants=network-online.target", "After=network-online.target"]
    lines += ["StartLimitIntervalSec=0", "", "[Service]", "Type=exec"]
    lines += [
        f"ExecStart={' '.join(_word(part).replace('$', '$$') for part in service.argv)}",
        "ExecReload=/bin/kill -HUP $MAINPID",
    ]
    lines += _restart(version)
    lines += [f"TimeoutStopSec={STOP_SECONDS}", "KillMode=mixed", "StandardOutput=journal", "StandardError=journal"]
    lines += [f"SyslogIdentifier={service.name}"]
    lines += [f"Environment={_word(f'{name}={value}')}" for name, value in _environment(service).items()]
    lines += _account(service)
    lines += ["", "# What a tunnel needs, and no more.", *_HARDENED, *(_HARDENED_SYSTEM if service.system else ())]
    return "\n".join([*lines, "", "[Install]", f"WantedBy={_target(service)}", ""])


def _target(service: Service) -> str:
    return "multi-user.target" if service.system else "default.target"


def _restart(version: int | None) -> list[str]:
    final = " ".join(str(code) for code in FINAL_EXITS)
    lines = ["Restart=always", f"RestartPreventExitStatus={final}"]
    if version is not None and version < BACKOFF_SINCE:
        return [*lines, f"RestartSec={RESTART_FLAT_SECONDS}"]
    return [
        *lines,
        f"RestartSec={RESTART_SECONDS}",
        f"RestartSteps={RESTART_STEPS}",
        f"RestartMaxDelaySec={RESTART_MAX_SECONDS}",
    ]


def _environment(service: Service) -> dict[str, str]:
    found = dict(sorted(service.environment.items()))
    if service.key_file is not None and not service.system:
        found["PORTICO_AGENT_KEY_FILE"] = str(service.key_file)
    return found


def _account(service: Service) -> list[str]:
    """A system service reads its key as a credential: systemd opens the file, the account need not."""
    if not service.system:
        return []
    lines = [f"User={service.account}"] if service.account else ["DynamicUser=yes"]
    if service.key_file is not None:
        lines.append(f"LoadCredential=agent_key:{_escape(str(service.key_file))}")
    if not service.account:
        # An account without a home: its own files are in the state folder.
        lines += [f"StateDirectory={service.name}", f"Environment=HOME=%S/{service.name}"]
    return lines


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _word(text: str) -> str:
    """One word of a command line or of ``Environment=``: quoted, no specifier in it (systemd.syntax). In a command line ``$``
    is to be doubled besides, in ``Environment=`` it stands for itself."""
    text = _escape(text).replace("\\", "\\\\").replace('"', '\\"')
    return text if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", text) else f'"{text}"'


def launchd_plist(service: Service, logs: Path) -> bytes:
    """The property list of a launch agent (of a user) or launch daemon; launchd itself slows down a program that dies fast."""
    environment = dict(service.environment)
    if service.key_file is not None:
        environment["PORTICO_AGENT_KEY_FILE"] = str(service.key_file)
    body: dict[str, object] = {
        "Label": service.name,
        "ProgramArguments": list(service.argv),
        "EnvironmentVariables": environment,
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": STOP_SECONDS,
        "ProcessType": "Background",
        "Umask": 0o077,
        "StandardOutPath": str(logs / f"{service.name}.log"),
        "StandardErrorPath": str(logs / f"{service.name}.log"),
        "WorkingDirectory": "/",
    }
    if service.system and service.account:
        body["UserName"] = service.account
    return plistlib.dumps(body, sort_keys=False)
