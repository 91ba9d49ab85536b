"""Options that make a policy, `--print-policy`, and `portico policy …`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.agent.api_server import problem
from tests.cli.commands import Cli, only_line

WRITTEN = "concurrency: 20\nbasic_auth:\n  users:\n    - {name: alice, password: open sesame}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yml"
    path.write_text(WRITTEN)
    return path


class TestOptions:
    async def test_print_policy_shows_all_and_asks_nobody(self, cli: Cli, file: Path) -> None:
        done = await cli.run(
            "http", "8000", "--policy-file", str(file), "--cidr-allow", "10.0.0.0/8", "--deny-cidr", "10.1.0.0/16",
            "--host-header=rewrite", "--https-only", "--response-header-add", "X-A: b", "--print-policy",
            PORTICO_BASIC_AUTH="bob:hunter2",
        )  # fmt: skip
        assert (done.code, done.err) == (0, "") and "hunter2" not in done.out and "sesame" not in done.out
        assert yaml.safe_load(done.out) == {
            "version": 1,
            "concurrency": 20,
            "basic_auth": {"users": [{"name": name, "password": "********"} for name in ("alice", "bob")]},
            "addresses": {"rules": [{"deny": "10.1.0.0/16"}, {"allow": "10.0.0.0/8"}]},
            "headers": {"host": "rewrite", "response": {"add": [{"name": "X-A", "value": "b"}]}},
            "plain_http": "refuse",
        }
        assert cli.api.calls == []

    async def test_what_is_typed_goes_before_the_environment(self, cli: Cli) -> None:
        done = await cli.run(
            "http", "8000", "--basic-auth", "typed:x", "--print-policy", "--json", PORTICO_BASIC_AUTH="env:y"
        )
        assert [user["name"] for user in json.loads(done.out)["basic_auth"]["users"]] == ["typed"]

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            (("http", "8000", "--allow-cidr", "10.0.0.1/8"), "--allow-cidr: '10.0.0.1/8' has bits set"),
            (("http", "8000", "--basic-auth", "secret"), "--basic-auth: must be NAME:PASSWORD"),
            (("http", "8000", "--request-header-add", "Host: a"), "--request-header-add: Host"),
            (("http", "8000", "--https-only", "--https-redirect"), "--https-only or --https-redirect"),
            (("http", "8000", "--policy-file", "FILE", "--basic-auth", "alice:x"), "leave out --basic-auth"),
            (("tcp", "22", "--policy-file", "FILE"), "policy.basic_auth: a tcp tunnel cannot enforce it"),
            (("tls", "443", "--policy-file", "FILE"), "policy.basic_auth: a tls tunnel cannot enforce it"),
        ],
    )
    async def test_faults(self, cli: Cli, file: Path, args: tuple[str, ...], named: str) -> None:
        done = await cli.run(*(str(file) if arg == "FILE" else arg for arg in args))
        assert done.code == 2 and named in only_line(done.err) and "(config.invalid)" in done.err
        assert "'secret'" not in done.err

    async def test_the_environment_would_protect_nothing_in_a_file(self, cli: Cli, tmp_path: Path) -> None:
        file = tmp_path / "portico.yml"
        file.write_text("version: 1\ntunnels:\n  web: {addr: 8000}\n")
        done = await cli.run("start", "--all", "--config", str(file), PORTICO_BASIC_AUTH="a:b")
        assert done.code == 2 and "PORTICO_BASIC_AUTH" in only_line(done.err)


class TestCheck:
    async def test_a_good_one(self, cli: Cli, file: Path) -> None:
        done = await cli.run("policy", "check", str(file))
        assert done.code == 0 and done.out == f"{file}: no faults. It says: basic auth (1 user), 20 at once\n"

    async def test_faults_with_their_places(self, cli: Cli) -> None:
        text = "addresses:\n  rules:\n    - allow: 10.0.0.1/8\nconcurency: 5\n"
        done = await cli.run("policy", "check", "-", stdin=text)
        assert done.code == 2 and done.out == ""
        lines = done.err.splitlines()
        assert lines[0].startswith("-:3:7: addresses.rules[0].allow: '10.0.0.1/8' has bits set beyond its prefix")
        assert lines[1:3] == ["    3 |     - allow: 10.0.0.1/8", "      |       ^"]
        assert lines[3] == "-:4:1: concurency: unknown key; do you mean concurrency?"
        assert lines[-1].startswith("portico: the policy has 2 faults.")

    async def test_for_a_protocol_and_for_programs(self, cli: Cli, file: Path) -> None:
        done = await cli.run("policy", "check", str(file), "--protocol", "tcp", "--json")
        found = json.loads(done.out)
        assert done.code == 2 and not found["valid"]
        assert [(f["line"], f["column"], f["path"]) for f in found["faults"]] == [(2, 1, "basic_auth")]


class TestOfATunnel:
    @pytest.fixture
    def row(self, cli: Cli) -> dict[str, Any]:
        cli.signed_in()
        users = [{"name": "alice"}]
        row = {"id": "tun_1", "name": "web", "policy": {"basic_auth": {"users": users}}, "policy_version": 4}
        cli.api.routes["GET /v1/tunnels?limit=100"] = lambda body: (200, {"data": [row], "next_cursor": None})
        return row

    async def test_show(self, cli: Cli, row: dict[str, Any]) -> None:
        done = await cli.run("policy", "show", "web")
        assert done.code == 0, done.err
        assert yaml.safe_load(done.out) == {"version": 1, **row["policy"]} and "version 4" in done.err

    async def test_set_sends_the_text(self, cli: Cli, row: dict[str, Any], file: Path) -> None:
        cli.api.routes["PATCH /v1/tunnels/tun_1"] = lambda body: (200, {**row, "policy_version": 5})
        done = await cli.run("policy", "set", "web", str(file), "--if-version", "4")
        assert (done.code, done.out) == (0, "web: basic auth (1 user) (version 5)\n"), done.err
        assert cli.api.calls[-1][2] == {"policy": WRITTEN, "policy_version": 4}

    async def test_set_shows_what_the_api_found_in_the_file(
        self, cli: Cli, row: dict[str, Any], tmp_path: Path
    ) -> None:
        file = tmp_path / "users.yml"
        file.write_text("basic_auth:\n  users:\n    - name: bob\n")
        status, answer = problem(400, "tunnel.policy_invalid")
        answer["errors"] = [{"path": "basic_auth.users[0]", "line": 3, "column": 7, "detail": "needs a password"}]
        cli.api.routes["PATCH /v1/tunnels/tun_1"] = lambda body: (status, answer)
        done = await cli.run("policy", "set", "web", str(file))
        assert done.code == 2 and done.err.startswith(f"{file}:3:7: basic_auth.users[0]: needs a password\n")


async def test_the_commands_of_the_guide_work(cli: Cli, tmp_path: Path) -> None:
    """Those of docs/how-to/protect-a-tunnel.md that start a tunnel, by what policy they make; and its file has no fault."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "protect-a-tunnel.md").read_text(encoding="utf-8")
    (tmp_path / "policy.yml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    ran, env = 0, {}
    for line in "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["export"]:
            env = dict([words[1].split("=", 1)])
        if words[:1] != ["portico"] or "team-ca.pem" in words or words[1:3] in (["policy", "show"], ["policy", "set"]):
            continue  # these ask the API, as above
        args = [str(tmp_path / word) if word == "policy.yml" else word for word in words[1:]]
        show = [] if args[0] == "policy" or "--print-policy" in args else ["--print-policy"]
        done = await cli.run(*args, *show, **({} if args[0] == "tcp" else env))
        assert (done.code, done.err) == (0, ""), line
        assert args[0] == "policy" or len(yaml.safe_load(done.out)) > 1, line
        ran += 1
    assert ran == 9
