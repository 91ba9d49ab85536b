"""`portico tls`: what it refuses before it asks anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from portico.cli import main, output
from tests.agent.certificates import certificate


@pytest.fixture
def both(tmp_path: Path) -> str:
    """A file with a certificate and its key."""
    return str(certificate(tmp_path, "localhost")[1])


def refused(capsys: pytest.CaptureFixture[str], *typed: str) -> str:
    """The line of a refusal, which is one of usage."""
    with pytest.raises(SystemExit) as ended:
        main.main(["tls", *typed])
    told = capsys.readouterr()
    assert ended.value.code == output.USAGE and told.out == "", told
    return told.err


def test_options_that_go_together(capsys: pytest.CaptureFixture[str], both: str) -> None:
    assert "--tls-key is missing" in refused(capsys, "8000", "--tls-cert", both)
    assert "--tls-cert is missing" in refused(capsys, "8000", "--tls-key", both)
    assert "--tls-alpn needs --tls-cert" in refused(capsys, "8443", "--tls-alpn", "h2")
    wrong = refused(capsys, "8000", "--tls-cert", both, "--tls-key", both, "--tls-alpn", "h2 http/1.1")
    assert "--tls-alpn 'h2 http/1.1' is not the name of a protocol" in wrong


def test_files_are_looked_at_first(capsys: pytest.CaptureFixture[str], both: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.pem"
    secret.write_text("-----BEGIN PRIVATE KEY-----\nVerySecretIndeed\n-----END PRIVATE KEY-----\n")
    told = refused(capsys, "8000", "--tls-cert", both, "--tls-key", str(secret))
    assert "holds no private key in PEM form" in told and "VerySecret" not in told
    assert "cannot be read" in refused(capsys, "8000", "--tls-cert", str(tmp_path / "no.pem"), "--tls-key", both)


@pytest.mark.parametrize("target", ["https://localhost:8443", "file:///srv", "vault"])
def test_targets(capsys: pytest.CaptureFixture[str], target: str) -> None:
    told = refused(capsys, target)
    assert f"target '{target}'" in told and "tls://host:port" in told
