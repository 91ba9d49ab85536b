"""PostgreSQL and Redis as an operator has them: over TCP, with TLS and passwords, each from the system's own packages.

The programs of the wheels are built without TLS. These run in temporary folders, as an account that is not root.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from portico.embedded.accounts import Account, server_account
from portico.embedded.spawn import spawn
from tests.authority import Authority


def _account() -> Account | None:
    return server_account(Path("/nonexistent"))


def _own(account: Account | None, *paths: Path) -> None:
    for path in paths:
        if account is not None:
            os.chown(path, account.uid, account.gid)


class Server:
    """One server process that can be killed and started again on its port."""

    def __init__(self, name: str, argv: Sequence[str | Path], home: Path, account: Account | None) -> None:
        self._argv, self._home, self._account = argv, home, account
        self.log = home / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            os.chmod(self.log, 0o600)
            self.process = spawn(self._argv, account=self._account, cwd=self._home, output=log.fileno())

    def kill(self) -> None:
        """At once, with everything that it forked."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def until(self, works: Sequence[str | Path], env: dict[str, str], limit: float = 30.0) -> None:
        """Until a command succeeds."""
        deadline = time.monotonic() + limit
        while True:
            done = subprocess.run([str(part) for part in works], env=env, capture_output=True, text=True)
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, f"{done.stderr}\n{self.log.read_text()[-2000:]}"
            time.sleep(0.1)


class Postgres(Server):
    """``url`` is for Portico; connections without TLS are rejected, passwords are checked by SCRAM."""

    def __init__(self, home: Path, port: int, authority: Authority) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        if not found:
            pytest.skip("needs a PostgreSQL with TLS: apt-get install postgresql")
        programs, account = found[-1].parent, _account()
        self.password = secrets.token_urlsafe(18)
        self._port, self._ca, self._psql = port, authority.ca, programs / "psql"
        home.mkdir()
        cert, key = authority.issue("postgres", "localhost", "127.0.0.1")
        cert, key = (Path(shutil.copy2(path, home)) for path in (cert, key))
        word, data = home / "password", home / "data"
        word.touch(0o600)
        word.write_text(self.password)
        rules = home / "pg_hba.conf"
        rules.write_text("hostssl all all 127.0.0.1/32 scram-sha-256\nhostssl all all ::1/128 scram-sha-256\n")
        _own(account, home, cert, key, word, rules)
        subprocess.run(
            [
                *(programs / "initdb", "-D", data, "-U", "portico", "-E", "UTF8", "--locale=C", "--no-sync"),
                *("-A", "scram-sha-256", f"--pwfile={word}"),
            ],
            check=True,
            capture_output=True,
            cwd=home,
            **(account.popen if account else {}),
        )
        word.unlink()
        options = {
            "ssl": "on", "ssl_cert_file": cert, "ssl_key_file": key, "hba_file": rules, "port": port,
            "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off",
        }  # fmt: skip
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        super().__init__("postgres", [programs / "postgres", "-D", data, *flags], home, account)

    def url(self, ca: Path | None = None, host: str = "localhost") -> str:
        at = f"portico:{self.password}@{host}:{self._port}/postgres"
        return f"postgresql://{at}?sslmode=verify-full&sslrootcert={ca or self._ca}"

    def start(self) -> None:
        super().start()
        self.until([self._psql, self.url(), "-c", "SELECT 1"], {"PATH": os.environ["PATH"]})


class Redis(Server):
    """Listens for TLS alone, and asks for a password."""

    def __init__(self, home: Path, port: int, authority: Authority) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            pytest.skip("needs a Redis or Valkey with TLS: apt-get install redis-server")
        account = _account()
        self.password = secrets.token_urlsafe(18)
        self._port, self._ca = port, authority.ca
        home.mkdir()
        cert, key = authority.issue("redis", "localhost", "127.0.0.1")
        cert, key, ca = (Path(shutil.copy2(path, home)) for path in (cert, key, authority.ca))
        config = home / "redis.conf"
        config.touch(0o600)
        config.write_text(
            f"port 0\ntls-port {port}\nbind 127.0.0.1\ntls-cert-file {cert}\ntls-key-file {key}\ntls-ca-cert-file {ca}\n"
            f'tls-auth-clients no\nsave ""\nappendonly no\nrequirepass {self.password}\ndir {home}\n'
        )
        _own(account, home, cert, key, ca, config)
        super().__init__("redis", [program, config], home, account)

    def url(self, ca: Path | None = None) -> str:
        return f"rediss://default:{self.password}@localhost:{self._port}/0?ssl_ca_certs={ca or self._ca}"

    def start(self) -> None:
        super().start()
        asked = ["redis-cli", "--tls", "--cacert", self._ca, "-h", "localhost", "-p", str(self._port), "PING"]
        self.until(asked, {"PATH": os.environ["PATH"], "REDISCLI_AUTH": self.password})
