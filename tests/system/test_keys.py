"""Keys as people and their programs handle them: by the command line."""

from __future__ import annotations

import json

import pytest

from portico.cli.output import FAILED, REFUSED, USAGE
from tests.system.platform import Account, Up

pytestmark = [pytest.mark.system, pytest.mark.realtime]


def test_by_the_command_line(up: Up, account: Account) -> None:
    agent_key = account.agent_key
    refused = up.command(account, "keys", "list")
    assert refused.returncode == REFUSED and "auth.forbidden" in refused.stderr
    made = account.call("POST", "/api-keys", {"kind": "api", "name": "manager"})
    account.agent_key = made["key"]
    try:
        done = up.command(account, "keys", "create", "build server", "--allow-cidr", "127.0.0.0/8", "--expires", "90d")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("tnl_agt_") and len(done.stdout.split()) == 1
        key_id = done.stderr.split()[0]
        assert "build server, from 127.0.0.0/8, until " in done.stderr
        rows = {row["id"]: row for row in json.loads(up.command(account, "keys", "list", "--json").stdout)["data"]}
        assert rows[key_id]["allowed_cidrs"] == ["127.0.0.0/8"]
        shown = up.command(account, "keys", "list").stdout
        assert "127.0.0.0/8" in shown and "LAST USED" in shown and done.stdout.strip() not in shown
        rotated = json.loads(up.command(account, "keys", "rotate", key_id, "--overlap", "1h", "--json").stdout)
        assert rotated["allowed_cidrs"] == ["127.0.0.0/8"] and rotated["id"] != key_id
        gone = up.command(account, "keys", "revoke", key_id)
        assert (gone.returncode, gone.stdout) == (0, f"revoked {key_id}\n")
        again = up.command(account, "keys", "revoke", key_id)
        assert again.returncode == FAILED and "request.not_found" in again.stderr
        report = up.command(account, "keys", "posture")
        assert report.returncode == FAILED, "the manager's own key is severe"
        assert "broad_scopes" in report.stdout and "manager" in report.stdout
        assert report.stdout.splitlines()[-1].startswith("3 keys; findings: ")
        for wrong in (["create", "x", "--kind", "operator"], ["create", "x", "--expires", "soon"], ["revoke", "../x"]):
            assert up.command(account, "keys", *wrong).returncode == USAGE, wrong
    finally:
        account.agent_key = agent_key
