"""A program written from the published contract alone: names, bodies and states as other programs rely on them.

Nothing here imports Portico. Objects may have more members than are named here, never fewer.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import stat
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.system.platform import Up

RFC3339_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
PASSWORD = "a-Long-Enough-Password-7"
_numbers = itertools.count(1)


class Client:
    """The API with one credential, or none."""

    def __init__(self, api_url: str, credential: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {credential}"} if credential else {}
        self.http = httpx.Client(base_url=api_url, headers=headers, trust_env=False, timeout=10)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.request(method, path, json=body, headers=named)

    def ok(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        answer = self(method, path, body, **headers)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def refused(
        self, status: int, code: str, method: str, path: str, body: Any = None, **headers: str
    ) -> dict[str, Any]:
        answer = self(method, path, body, **headers)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        document: dict[str, Any] = answer.json()
        assert document["code"] == code
        assert document["detail"] and document["hint"] and document["request_id"]
        return document


@pytest.fixture(scope="module")
def connect(up: Up) -> Iterator[Any]:
    """``connect(credential)``: a client of the API."""
    made: list[Client] = []

    def make(credential: str | None = None) -> Client:
        made.append(Client(up.credentials["api_url"], credential))
        return made[-1]

    yield make
    for client in made:
        client.http.close()


@pytest.fixture(scope="module")
def registered(connect: Any) -> dict[str, Any]:
    """The answer to a registration."""
    body = {"email": f"contract{next(_numbers)}@example.test", "password": PASSWORD, "organization": "Contract"}
    return dict(connect().ok("POST", "/v1/auth/register", body))


@pytest.fixture(scope="module")
def owner(connect: Any, registered: dict[str, Any]) -> Client:
    found: Client = connect(registered["access_token"])
    return found


@pytest.fixture(scope="module")
def agent(connect: Any, owner: Client) -> Client:
    found: Client = connect(owner.ok("POST", "/v1/api-keys", {"kind": "agent", "name": "machine"})["key"])
    return found


@pytest.fixture(scope="module")
def stranger(connect: Any) -> Client:
    """The owner of another organization."""
    body = {"email": f"stranger{next(_numbers)}@example.test", "password": PASSWORD, "organization": "Other"}
    found: Client = connect(connect().ok("POST", "/v1/auth/register", body)["access_token"])
    return found


def claims(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and payload of a JWT."""
    header, payload, _ = token.split(".")
    decoded = [json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in (header, payload)]
    return decoded[0], decoded[1]


class TestRoot:
    def test_health_keys_and_description_have_no_prefix(self, connect: Any) -> None:
        api = connect()
        assert api("GET", "/healthz").status_code == 200
        assert api("GET", "/readyz").status_code == 200
        document = api.ok("GET", "/openapi.json")
        assert document["openapi"].startswith("3.1")
        for path in ("/v1/tunnels", "/v1/agent/sessions", "/v1/auth/register", "/v1/edge/stream"):
            assert path in document["paths"], path
        keys = api.ok("GET", "/.well-known/jwks.json")["keys"]
        assert keys and all(key["kty"] == "OKP" and key["crv"] == "Ed25519" and key["kid"] for key in keys)

    def test_what_is_not_there_is_a_problem(self, connect: Any) -> None:
        assert connect()("GET", "/v1/nothing").json()["code"]
        assert connect()("GET", "/v1/nothing").status_code == 404


class TestCredentialsFile:
    def test_names_what_scripts_need_and_is_private(self, up: Up) -> None:
        expected = {"api_url", "relay_url", "console_url", "operator_key", "organization_id", "agent_key"}
        assert expected <= up.credentials.keys()
        assert stat.S_IMODE((up.home / "credentials.json").stat().st_mode) == 0o600

    def test_its_keys_do_what_their_names_say(self, up: Up, connect: Any) -> None:
        assert "operator" in json.dumps(connect(up.credentials["operator_key"]).ok("GET", "/v1/whoami"))
        agent = connect(up.credentials["agent_key"])
        who = agent.ok("GET", "/v1/whoami")
        assert who["organization"]["id"] == up.credentials["organization_id"]
        session = agent.ok("POST", "/v1/agent/sessions", {"agent_id": "contract-first", "tunnels": []})
        assert session["edges"] and session["grants"] == []
        console = httpx.get(up.credentials["console_url"], trust_env=False, headers={"Accept": "text/html"})
        assert console.status_code == 200 and "text/html" in console.headers["content-type"]

    def test_the_relay_answers(self, up: Up) -> None:
        answer = httpx.get(up.credentials["relay_url"], headers={"Host": "nobody-here.localhost"}, trust_env=False)
        assert answer.status_code == 404
        assert answer.headers["portico-error"] == "edge.host_unassigned"


class TestAccounts:
    def test_register_login_refresh_logout(self, connect: Any) -> None:
        api = connect()
        email = f"flow{next(_numbers)}@example.test"
        made = api.ok("POST", "/v1/auth/register", {"email": email, "password": PASSWORD, "organization": "Flow"})
        assert {"user", "organization", "access_token", "refresh_token"} <= made.keys()
        assert made["user"]["email"] == email and made["organization"]["name"] == "Flow"
        tokens = api.ok("POST", "/v1/auth/login", {"email": email, "password": PASSWORD})
        assert connect(tokens["access_token"]).ok("GET", "/v1/whoami")["user"]["email"] == email
        newer = api.ok("POST", "/v1/auth/refresh", {"refresh_token": tokens["refresh_token"]})
        assert newer["refresh_token"] != tokens["refresh_token"]
        signed_in = connect(newer["access_token"])
        assert signed_in("POST", "/v1/auth/logout").is_success
        assert signed_in("GET", "/v1/whoami").status_code == 401
        assert api("POST", "/v1/auth/refresh", {"refresh_token": newer["refresh_token"]}).status_code == 401

    def test_a_refresh_token_that_comes_back_ends_the_session(self, connect: Any) -> None:
        api = connect()
        body = {"email": f"reuse{next(_numbers)}@example.test", "password": PASSWORD, "organization": "Reuse"}
        made = api.ok("POST", "/v1/auth/register", body)
        newer = api.ok("POST", "/v1/auth/refresh", {"refresh_token": made["refresh_token"]})
        assert api("POST", "/v1/auth/refresh", {"refresh_token": made["refresh_token"]}).status_code == 401
        assert connect(newer["access_token"])("GET", "/v1/whoami").status_code == 401

    def test_wrong_passwords_and_no_credential(self, connect: Any, registered: dict[str, Any]) -> None:
        body = {"email": registered["user"]["email"], "password": "not-the-Password-1"}
        assert connect()("POST", "/v1/auth/login", body).status_code == 401
        assert connect()("GET", "/v1/whoami").status_code == 401

    def test_device_flow(self, connect: Any, owner: Client) -> None:
        api = connect()
        started = api.ok("POST", "/v1/auth/device", {})
        ask = {"device_code": started["device_code"]}
        assert api("POST", "/v1/auth/device/token", ask).status_code == 400
        owner.ok("POST", "/v1/auth/device/approve", {"user_code": started["user_code"]})
        key = api.ok("POST", "/v1/auth/device/token", ask)["agent_key"]
        assert connect(key).ok("GET", "/v1/whoami")["organization"]["name"] == "Contract"
        assert api("POST", "/v1/auth/device/token", ask).status_code == 400, "once"

    def test_sessions_can_be_listed_and_ended(self, connect: Any, registered: dict[str, Any], owner: Client) -> None:
        body = {"email": registered["user"]["email"], "password": PASSWORD}
        other = connect(connect().ok("POST", "/v1/auth/login", body)["access_token"])
        mine = other.ok("GET", "/v1/whoami")["session"]
        assert mine in [row["id"] for row in owner.ok("GET", "/v1/auth/sessions")["data"]]
        assert owner("DELETE", f"/v1/auth/sessions/{mine}").is_success
        assert other("GET", "/v1/whoami").status_code == 401


class TestKeys:
    @pytest.mark.parametrize(
        "body",
        [
            {"kind": "agent", "name": "laptop"},
            {"kind": "api", "name": "ci", "scopes": ["tunnels:read"], "expires_at": "2099-01-01T00:00:00Z"},
        ],
    )
    def test_made_once_listed_without_text_rotated_revoked(
        self, connect: Any, owner: Client, body: dict[str, Any]
    ) -> None:
        made = owner.ok("POST", "/v1/api-keys", body)
        assert {"id", "key"} <= made.keys()
        assert connect(made["key"]).ok("GET", "/v1/whoami")["organization"]["name"] == "Contract"
        listed = owner.ok("GET", "/v1/api-keys")
        assert made["id"] in [row["id"] for row in listed["data"]] and made["key"] not in json.dumps(listed)
        newer = owner.ok("POST", f"/v1/api-keys/{made['id']}/rotate")
        assert connect(made["key"])("GET", "/v1/whoami").status_code == 401
        assert connect(newer["key"])("GET", "/v1/whoami").status_code == 200
        assert owner("DELETE", f"/v1/api-keys/{newer['id']}").is_success
        assert connect(newer["key"])("GET", "/v1/whoami").status_code == 401

    def test_scopes_bind(self, connect: Any, owner: Client) -> None:
        reader = connect(
            owner.ok("POST", "/v1/api-keys", {"kind": "api", "name": "r", "scopes": ["tunnels:read"]})["key"]
        )
        assert reader("GET", "/v1/tunnels").status_code == 200
        assert reader("POST", "/v1/tunnels", {"name": "no", "protocol": "http"}).status_code == 403


class TestTunnels:
    def test_a_life(self, owner: Client) -> None:
        made = owner.ok("POST", "/v1/tunnels", {"name": "life", "protocol": "http", "subdomain": "contract-life"})
        assert {"id", "name", "url", "state"} <= made.keys()
        assert made["name"] == "life" and made["state"] == "offline" and "//contract-life." in made["url"]
        assert all(RFC3339_UTC.fullmatch(made[name]) for name in ("created_at", "updated_at"))
        path = f"/v1/tunnels/{made['id']}"
        assert owner.ok("GET", path)["id"] == made["id"]
        assert owner.ok("PATCH", path, {"subdomain": "contract-moved"})["url"] != made["url"]
        assert owner.ok("POST", f"{path}/stop")["state"] == "stopped"
        events = owner.ok("GET", f"{path}/events")
        assert {"data", "next_cursor"} == events.keys() and len(events["data"]) >= 3
        assert all(RFC3339_UTC.fullmatch(event["at"]) for event in events["data"])
        assert owner("DELETE", path).is_success
        owner.refused(404, "tunnel.not_found", "GET", path)
        again = owner.ok("POST", "/v1/tunnels", {"name": "life", "protocol": "http", "subdomain": "contract-moved"})
        assert again["id"] != made["id"], "both names are free again"

    def test_only_the_name_and_protocol_are_needed(self, owner: Client) -> None:
        assert owner.ok("POST", "/v1/tunnels", {"name": "plain", "protocol": "http"})["url"]
        owner.refused(409, "tunnel.name_taken", "POST", "/v1/tunnels", {"name": "plain", "protocol": "http"})
        owner.refused(422, "request.invalid", "POST", "/v1/tunnels", {"name": 5, "protocol": "http"})
        nothing = {"name": "with-members", "protocol": "http", "subdomain": None, "domain": None, "policy": {}}
        assert owner.ok("POST", "/v1/tunnels", nothing)["name"] == "with-members"

    def test_lists_page_by_cursor(self, owner: Client) -> None:
        wanted = {owner.ok("POST", "/v1/tunnels", {"name": f"page-{n}", "protocol": "http"})["id"] for n in range(5)}
        found: list[str] = []
        cursor = ""
        while cursor is not None:
            page = owner.ok("GET", f"/v1/tunnels?limit=2{'&cursor=' + cursor if cursor else ''}")
            assert page.keys() == {"data", "next_cursor"} and len(page["data"]) <= 2
            found += [row["id"] for row in page["data"]]
            cursor = page["next_cursor"]
        assert len(found) == len(set(found)) and wanted <= set(found)

    def test_a_write_that_is_repeated_is_carried_out_once(self, owner: Client) -> None:
        body = {"name": "once", "protocol": "http"}
        first = owner.ok("POST", "/v1/tunnels", body, Idempotency_Key="contract-1")
        assert owner.ok("POST", "/v1/tunnels", body, Idempotency_Key="contract-1") == first
        other = {"name": "another", "protocol": "http"}
        assert owner("POST", "/v1/tunnels", other, Idempotency_Key="contract-1").status_code == 422

    def test_another_tenants_ids_answer_404(self, owner: Client, stranger: Client) -> None:
        made = owner.ok("POST", "/v1/tunnels", {"name": "mine", "protocol": "http"})
        key = owner.ok("POST", "/v1/api-keys", {"kind": "agent", "name": "mine"})
        for method, path, body in (
            ("GET", f"/v1/tunnels/{made['id']}", None),
            ("PATCH", f"/v1/tunnels/{made['id']}", {"name": "yours"}),
            ("DELETE", f"/v1/tunnels/{made['id']}", None),
            ("POST", f"/v1/tunnels/{made['id']}/stop", None),
            ("GET", f"/v1/tunnels/{made['id']}/events", None),
            ("DELETE", f"/v1/api-keys/{key['id']}", None),
            ("POST", f"/v1/api-keys/{key['id']}/rotate", None),
        ):
            assert stranger(method, path, body).status_code == 404, (method, path)
        assert owner.ok("GET", f"/v1/tunnels/{made['id']}") == made
        assert made["id"] not in json.dumps(stranger.ok("GET", "/v1/tunnels"))


class TestAgentSessions:
    def test_tokens_grants_and_edges(self, up: Up, connect: Any, agent: Client, registered: dict[str, Any]) -> None:
        wanted = [{"name": "s-web", "protocol": "http"}, {"protocol": "http", "subdomain": "contract-sub"}]
        session = agent.ok("POST", "/v1/agent/sessions", {"agent_id": "contract-agent-1", "tunnels": wanted})
        assert {"session", "token", "expires_at", "edges", "grants"} <= session.keys()
        assert session["edges"] and all(re.match(r"wss?://", url) for url in session["edges"])
        assert RFC3339_UTC.fullmatch(session["expires_at"])
        assert [sorted({"tunnel", "name", "url", "grant"} - grant.keys()) for grant in session["grants"]] == [[], []]
        assert session["grants"][0]["name"] == "s-web" and "//contract-sub." in session["grants"][1]["url"]
        kids = {key["kid"] for key in connect().ok("GET", "/.well-known/jwks.json")["keys"]}
        for token in (session["token"], *(grant["grant"] for grant in session["grants"])):
            header, payload = claims(token)
            assert header["alg"] == "EdDSA" and header["kid"] in kids
            assert len(token) <= 4096
            assert payload["exp"] - payload["iat"] <= 900
            assert registered["organization"]["id"] in payload.values()
            assert connect(token)("GET", "/v1/whoami").status_code == 401, "for relays alone"

    def test_refresh_add_remove(self, agent: Client) -> None:
        opened = agent.ok(
            "POST", "/v1/agent/sessions", {"agent_id": "contract-agent-2", "tunnels": [{"protocol": "http"}]}
        )
        path = f"/v1/agent/sessions/{opened['session']}"
        added = agent.ok("POST", f"{path}/tunnels", {"name": "s-more", "protocol": "http"})
        assert added["grants"][0]["name"] == "s-more"
        refreshed = agent.ok("POST", f"{path}/refresh", {"agent_id": "contract-agent-2"})
        assert refreshed["session"] == opened["session"] and len(refreshed["grants"]) == 2
        assert agent("DELETE", f"{path}/tunnels/{added['grants'][0]['tunnel']}").is_success
        assert len(agent.ok("POST", f"{path}/refresh", {"agent_id": "contract-agent-2"})["grants"]) == 1

    def test_the_same_instance_has_the_same_session_and_url(self, agent: Client) -> None:
        body = {"agent_id": "contract-agent-3", "tunnels": [{"name": "s-same", "protocol": "http"}]}
        first, second = (agent.ok("POST", "/v1/agent/sessions", body) for _ in range(2))
        assert first["session"] == second["session"]
        assert first["grants"][0]["url"] == second["grants"][0]["url"]

    def test_edge_endpoints_are_for_relays(self, up: Up, agent: Client, owner: Client, connect: Any) -> None:
        for client in (agent, owner, connect(up.credentials["operator_key"]), connect()):
            assert client("GET", "/v1/edge/stream").status_code == 401
            for path in ("heartbeat", "acks", "usage"):
                assert client("POST", f"/v1/edge/{path}", {}).status_code == 401


class TestAudit:
    def test_acts_are_listed(self, owner: Client) -> None:
        page = owner.ok("GET", "/v1/audit?limit=100")
        assert page.keys() == {"data", "next_cursor"} and page["data"]
        assert all(RFC3339_UTC.fullmatch(row["at"]) for row in page["data"])
