"""`portico dev-ca`: what people read, and what it does not do without being asked."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

PORTICO = [sys.executable, "-P", "-m", "portico.cli"]


def run(*args: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PORTICO_")}
    env |= {"NO_COLOR": "1"} | ({"PATH": path} if path is not None else {})
    return subprocess.run(
        [*PORTICO, "dev-ca", *args], capture_output=True, text=True, timeout=60, env=env, stdin=subprocess.DEVNULL
    )


def test_install_says_where_it_is_and_how_to_trust_it(tmp_path: Path) -> None:
    first, again = (run("install", "--data", str(tmp_path / "data")) for _ in range(2))
    file = tmp_path / "data" / "dev-ca" / "localhost" / "ca.pem"
    assert first.returncode == again.returncode == 0
    assert "Made a development authority for localhost" in first.stdout
    assert "The development authority for localhost" in again.stdout
    for word in (
        str(file),
        "SHA-256",
        "curl --cacert",
        "update-ca-certificates",
        "certutil",
        "Firefox",
        "macOS",
        "Windows",
    ):
        assert word in again.stdout
    der = ssl.PEM_cert_to_DER_cert(file.read_text())
    import hashlib

    shown = again.stdout.replace(":", "").lower()
    assert hashlib.sha256(der).hexdigest() in shown


def test_print_prints_the_certificate_alone(tmp_path: Path) -> None:
    told = run("install", "--data", str(tmp_path), "--base-domain", "tunnels.example.com", "--print")
    assert told.returncode == 0 and told.stderr == ""
    assert told.stdout == (tmp_path / "dev-ca" / "tunnels.example.com" / "ca.pem").read_text()
    ssl.create_default_context(cadata=told.stdout)


def test_system_asks_first(tmp_path: Path) -> None:
    """Nothing is changed without a person or --yes; and on a system without such a list there is nothing to change."""
    told = run("install", "--data", str(tmp_path), "--system")
    assert told.returncode == 2 and told.stdout == ""
    assert any(text in told.stderr for text in ("add --yes", "only root", "no list of authorities"))
    told = run("install", "--data", str(tmp_path), "--system", "--yes", path=str(tmp_path))
    assert told.returncode == 2 and "no list of authorities" in told.stderr
    told = run("uninstall", path=str(tmp_path))
    assert told.returncode == 0 and "was not in" in told.stdout


@pytest.mark.parametrize("domain", ["../x", "a b"])
def test_a_domain_that_is_none(tmp_path: Path, domain: str) -> None:
    told = run("install", "--data", str(tmp_path), "--base-domain", domain)
    assert told.returncode == 2 and "no host name" in told.stderr and "Traceback" not in told.stderr
    assert not (tmp_path / "dev-ca").exists()
