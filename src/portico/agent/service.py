"""The agent as a service of the operating system: systemd on Linux, launchd on macOS.

    manager = manager_for(system=False)     # raises background.unsupported
    manager.check()                         # raises background.no_manager where it does not run
    manager.install(service); manager.stop(name); manager.status(name); manager.uninstall(name)

Every step can be repeated: what is already as it should be is left alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from portico.agent.service_files import Service, launchd_plist, systemd_unit
from portico.errors import Problem

COMMAND_TIMEOUT_SECONDS = 60.0

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run_command(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program of the system to its end; one that is missing or hangs is a failure like others."""
    try:
        return subprocess.run(  # noqa: S603 - fixed programs, no shell
            argv, capture_output=True, text=True, errors="replace", timeout=COMMAND_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        return subprocess.CompletedProcess(argv, 127, "", str(err))


class Systemd:
    """``root`` is where the file system begins, for tests."""

    TITLE = "systemd"

    def __init__(self, *, system: bool, home: Path, root: Path = Path("/"), run: Run = run_command) -> None:
        self.system, self._root, self._run = system, root, run
        self._units = root / "etc/systemd/system" if system else home / ".config/systemd/user"

    def path(self, name: str) -> Path:
        return self._units / f"{name}.service"

    def render(self, service: Service) -> bytes:
        return systemd_unit(service, self.version()).encode()

    def version(self) -> int | None:
        """Of the systemd here; ``None`` without one."""
        words = self._run(["systemctl", "--version"]).stdout.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else None

    def check(self) -> None:
        """Raise ``background.no_manager`` unless this systemd runs (sd_booted(3)), and takes commands for this user."""
        if not (self._root / "run/systemd/system").is_dir():
            raise Problem("background.no_manager", "systemd does not run on this machine")
        if not self.system and self._systemctl("show-environment").returncode != 0:
            hint = "Sign in to the machine itself (ssh, not su or sudo), or make it a service of the machine: sudo … --system"
            raise Problem("background.no_manager", "systemd takes no commands for this user here", hint=hint)

    def install(self, service: Service, *, new_key: bool = False) -> bool:
        """Write the unit, start it now and at every boot; whether anything of it was new (``new_key``: its key is)."""
        changed = write_if_changed(self.path(service.name), self.render(service))
        if changed:
            self._must("daemon-reload")
        self._must("enable", service.name)
        self._must("restart" if changed or new_key else "start", service.name)
        return changed or new_key

    def act(self, verb: str, name: str) -> None:
        """``start``, ``stop`` or ``restart``."""
        self._installed(name)
        self._must(verb, name)

    def status(self, name: str) -> tuple[str, str]:
        """The state in a word, and what systemd says of it."""
        self._installed(name)
        state = self._systemctl("is-active", name).stdout.strip() or "unknown"
        return state, self._systemctl("status", "--no-pager", "--lines=10", name).stdout

    def uninstall(self, name: str) -> bool:
        """Stop it and remove the unit; whether there was one."""
        path = self.path(name)
        if not path.exists():
            return False
        self._must("disable", "--now", name)
        path.unlink()
        self._must("daemon-reload")
        return True

    def logs(self, name: str) -> str:
        """How to read its log."""
        return f"journalctl {'' if self.system else '--user '}-fu {name}"

    def advice(self) -> str:
        """What a person may have to do besides."""
        return "" if self.system else "It runs while you are signed in. To let it run always: loginctl enable-linger"

    def _installed(self, name: str) -> None:
        if not self.path(name).exists():
            raise Problem("background.not_installed", f"there is no {self.path(name)}")

    def _systemctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self._run(["systemctl", *([] if self.system else ["--user"]), *args])

    def _must(self, *args: str) -> None:
        done = self._systemctl(*args)
        if done.returncode != 0:
            raise _failed("systemctl " + ("" if self.system else "--user ") + " ".join(args), done)


class Launchd:
    """macOS. ``root`` is where the file system begins, for tests."""

    TITLE = "launchd"

    def __init__(self, *, system: bool, home: Path, root: Path = Path("/"), run: Run = run_command) -> None:
        self.system, self._run = system, run
        library = (root if system else home) / "Library"
        self._files = library / ("LaunchDaemons" if system else "LaunchAgents")
        self._logs = library / "Logs"
        self._domain = "system" if system else f"gui/{os.getuid()}"

    def path(self, name: str) -> Path:
        return self._files / f"{name}.plist"

    def render(self, service: Service) -> bytes:
        return launchd_plist(service, self._logs)

    def check(self) -> None:
        """Raise ``background.no_manager`` where there is no launchctl."""
        if self._run(["launchctl", "version"]).returncode != 0:
            raise Problem("background.no_manager", "launchctl does not run here")

    def install(self, service: Service, *, new_key: bool = False) -> bool:
        """Write the property list and load it; whether anything of it was new (``new_key``: its key is)."""
        path = self.path(service.name)
        changed = write_if_changed(path, self.render(service)) or new_key
        if changed and self._loaded(service.name):
            self._must("bootout", self._target(service.name))
        if not self._loaded(service.name):
            self._must("bootstrap", self._domain, str(path))
        return changed

    def act(self, verb: str, name: str) -> None:
        """``start``, ``stop`` or ``restart``. A service that launchd keeps alive stops by being unloaded."""
        self._installed(name)
        if verb == "stop":
            if self._loaded(name):
                self._must("bootout", self._target(name))
        elif not self._loaded(name):
            self._must("bootstrap", self._domain, str(self.path(name)))
        else:
            self._must("kickstart", *(["-k"] if verb == "restart" else []), self._target(name))

    def status(self, name: str) -> tuple[str, str]:
        """The state in a word, and what launchd says of it."""
        self._installed(name)
        done = self._run(["launchctl", "print", self._target(name)])
        return ("active" if "state = running" in done.stdout else "inactive"), done.stdout

    def uninstall(self, name: str) -> bool:
        """Stop it and remove the file; whether there was one."""
        path = self.path(name)
        if not path.exists():
            return False
        if self._loaded(name):
            self._must("bootout", self._target(name))
        path.unlink()
        return True

    def logs(self, name: str) -> str:
        """How to read its log."""
        return f"tail -f {self._logs / name}.log"

    def advice(self) -> str:
        """Nothing more is to be done."""
        return ""

    def _target(self, name: str) -> str:
        return f"{self._domain}/{name}"

    def _loaded(self, name: str) -> bool:
        return self._run(["launchctl", "print", self._target(name)]).returncode == 0

    def _installed(self, name: str) -> None:
        if not self.path(name).exists():
            raise Problem("background.not_installed", f"there is no {self.path(name)}")

    def _must(self, *args: str) -> None:
        done = self._run(["launchctl", *args])
        if done.returncode != 0:
            raise _failed("launchctl " + " ".join(args), done)


def _failed(command: str, done: subprocess.CompletedProcess[str]) -> Problem:
    said = " ".join((done.stderr or done.stdout).split())[:300] or f"exit code {done.returncode}"
    return Problem("background.failed", f"{command}: {said}")


def manager_for(system: bool, platform: str = sys.platform) -> Systemd | Launchd:
    """The service manager of this operating system; raises ``background.unsupported``."""
    if platform == "linux":
        return Systemd(system=system, home=Path.home())
    if platform == "darwin":
        return Launchd(system=system, home=Path.home())
    raise Problem("background.unsupported", f"services are not supported on {platform}")


def write_if_changed(path: Path, data: bytes, mode: int = 0o644) -> bool:
    """Whole or not at all, and readable as ``mode`` says; whether it was something new. Raises ``background.failed``."""
    try:
        if path.is_file() and path.read_bytes() == data:
            path.chmod(mode)
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as err:
        raise Problem("background.failed", f"{path} cannot be written: {err.strerror}") from None
    return True


def program() -> tuple[str, ...]:
    """The command line of this very installation: the script beside its interpreter, else the module."""
    script = Path(sys.executable).with_name("portico")
    if script.is_file() and shutil.which(str(script)):
        return (str(script),)
    return (sys.executable, "-P", "-m", "portico.cli")


def blocked(path: Path) -> Path | None:
    """The first folder or file on the way to ``path`` that an account without rights of its own cannot pass or read."""
    whole = path.resolve()
    for place in [*reversed(whole.parents), whole]:
        need = 0o4 if place == whole else 0o1
        if not place.exists() or place.stat().st_mode & need != need:
            return place
    return None
