"""Whether `portico up` asks for verified addresses."""

from __future__ import annotations

import pytest

from portico import settings
from portico.embedded.platform import verification
from portico.settings import ApiSettings


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"PORTICO_SMTP_URL": "smtp://mail.example.com"}, True),
        ({"PORTICO_SMTP_URL": "smtp://mail.example.com", "PORTICO_REQUIRE_VERIFIED_EMAIL": "false"}, False),
        ({"PORTICO_REQUIRE_VERIFIED_EMAIL": "true"}, True),
    ],
)
def test_where_mail_goes_out_unless_set_otherwise(environ: dict[str, str], wanted: bool) -> None:
    child = {f"PORTICO_{key.upper()}": value for key, value in verification(environ).items()}
    needed = {"PORTICO_DATABASE_URL": "postgresql://x/y", "PORTICO_MASTER_KEY": "x"}
    assert settings.load(ApiSettings, environ=child | needed).require_verified_email is wanted
