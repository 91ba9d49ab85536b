"""Policies at the relay: what rules mean, what they do to heads, and that a change reaches what is live."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portico.relay import policy
from portico.relay.server import Relay
from portico.wire import frames as f
from portico.wire.policy import Addresses, AddressRule, HeaderRules
from tests.relay.doubles import KEY, Client, ScriptedAgent, grant, port, row, session_token
from tests.relay.known import GET, forget, learn, whole

GET_A = b"GET /a HTTP/1.1\r\nHost: web.localhost\r\n\r\n"


def addresses(*rules: tuple[str, str], otherwise: bool = False) -> policy.AddressSet:
    """``("allow", "10.0.0.0/8")`` and so on."""
    return policy.AddressSet(
        Addresses(tuple(AddressRule(verb == "allow", ipaddress.ip_network(net)) for verb, net in rules), otherwise)
    )


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "allowed"),
        [
            ("10.1.2.3", True),
            ("10.9.9.9", False),
            ("11.0.0.1", False),
            ("::ffff:10.1.2.3", True),
            ("2001:db8::1", True),
            ("2001:db9::1", False),
            ("::ffff:11.0.0.1", False),
            ("fe80::1%eth0", True),
            ("", False),
            ("unix", False),
        ],
    )
    def test_the_first_match_decides(self, address: str, allowed: bool) -> None:
        rules = addresses(
            *[("deny", "10.9.0.0/16"), ("allow", "10.0.0.0/8"), ("allow", "2001:db8::/32"), ("allow", "fe80::/10")],
            *[("deny", "2001:db8::/32"), ("deny", "10.0.0.0/8")],
        )
        assert rules.allow(address) is allowed
        assert rules.allow(address) is allowed, "the remembered answer is the same"

    @pytest.mark.parametrize("otherwise", [False, True])
    def test_what_no_rule_names(self, otherwise: bool) -> None:
        rules = addresses(("deny", "10.0.0.0/8"), otherwise=otherwise)
        assert rules.allow("192.0.2.1") is otherwise
        assert rules.allow("10.0.0.1") is False
        assert rules.allow("not an address") is False, "what is not an address is let in by nothing"

    @given(
        st.lists(st.tuples(st.booleans(), st.ip_addresses(), st.integers(0, 128)), max_size=8),
        st.ip_addresses(),
        st.booleans(),
    )
    def test_as_the_standard_library_has_it(self, raw: list[Any], address: Any, otherwise: bool) -> None:
        rules = tuple(
            AddressRule(allow, ipaddress.ip_network((ip, bits * ip.max_prefixlen // 128), strict=False))
            for allow, ip, bits in raw
        )
        plain = getattr(address, "ipv4_mapped", None) or address
        expected = next((rule.allow for rule in rules if plain in rule.network), otherwise)
        assert policy.AddressSet(Addresses(rules, otherwise)).allow(str(address)) is expected

    def test_many_addresses_fill_no_memory(self) -> None:
        rules = addresses(("allow", "10.0.0.0/8"))
        for number in range(3 * policy.MAX_ADDRESSES):
            assert rules.allow(str(ipaddress.ip_address(0x0A000000 + number)))
        assert len(rules._known) <= policy.MAX_ADDRESSES


class TestEdits:
    def test_removed_in_any_spelling_added_at_the_end_the_rest_in_order(self) -> None:
        edit = policy.Edits(HeaderRules(frozenset(("x-a",)), (("X-B", "1"), ("X-B", "2"))))
        fields = [b"X-B", b"0", b"x-A", b"1", b"Host", b"h", b"X-C", b"1", b"X-a", b"2", b"X-C", b"2"]
        assert edit(fields) == [*(b"X-B", b"0", b"Host", b"h", b"X-C", b"1", b"X-C", b"2", b"X-B", b"1", b"X-B", b"2")]
        assert fields[2] == b"x-A", "what it is given stays as it is"

    @pytest.mark.parametrize(("host", "expected"), [(None, [b"Host", b"h"]), (b"", []), (b"app", [b"Host", b"app"])])
    def test_host(self, host: bytes | None, expected: list[bytes]) -> None:
        assert policy.Edits(HeaderRules(frozenset(), ()), host=host)([b"Host", b"h"]) == expected

    def test_nothing_to_do_is_false(self) -> None:
        assert not policy.Edits(HeaderRules(frozenset(), ()))


def test_equal_documents_are_compiled_once() -> None:
    document = {"headers": {"request": {"remove": ["X-A"]}}}
    first = policy.compiled(document)
    assert policy.compiled(dict(document)) is first
    assert policy.compiled({}) is policy.OPEN
    assert policy.compiled({"concurrency": 3}) is not first


@pytest.fixture
async def online(relay: Relay) -> Any:
    """Connects an agent whose tunnel has the given policy."""
    agents: list[ScriptedAgent] = []

    async def connect(document: dict[str, Any], version: int = 0) -> ScriptedAgent:
        agent = await ScriptedAgent().connect(port(relay, 0), session_token())
        agents.append(agent)
        return await agent.online(grant(policy=document, policy_version=version))

    yield connect
    for agent in agents:
        agent.close()


RULES = {
    "request": {"remove": ["X-Debug"], "add": [{"name": "X-Env", "value": "test"}]},
    "response": {"remove": ["Server"], "add": [{"name": "X-Frame-Options", "value": "DENY"}]},
}


def change(relay: Relay, document: dict[str, Any], version: int) -> None:
    """The edge stream brings a new policy."""
    assert relay.snapshot.version is not None
    delta = {"kind": "tunnel", "tunnel": row("web", policy=document, policy_version=version)}
    relay.snapshot.apply({"type": "delta", "version": relay.snapshot.version + 1, "changes": [delta]})


class TestHeads:
    async def test_both_ways_and_each_time_the_same(self, online: Any, visit: Any) -> None:
        """The first requests are parsed, the later ones known."""
        forget()
        agent = await online({"headers": RULES})
        agent.on_stream = lambda s: whole(s, fields=(b"Server", b"old", b"X-Kept", b"1"))
        client: Client = await visit()
        heard = []
        for _ in range(5):
            client.send(b"GET /a HTTP/1.1\r\nHost: web.localhost\r\nX-Debug: 1\r\nX-Kept: 1\r\n\r\n")
            status, fields, body = await client.response()
            assert (status, body) == (200, b"hello")
            assert b"server" not in fields
            assert (fields[b"x-frame-options"], fields[b"x-kept"]) == ([b"DENY"], [b"1"])
            request = agent.streams[-1]
            heard.append([name for name, _ in request.fields])
            assert request.get(b"x-debug") == []
            assert (request.get(b"x-env"), request.get(b"x-kept")) == ([b"test"], [b"1"])
        assert heard.count(heard[0]) == 5

    async def test_what_is_removed_does_not_come_in_trailers_or_interim_answers(self, online: Any, visit: Any) -> None:
        agent = await online({"headers": RULES})

        def answer(s: Any) -> None:
            s.stream.send_interim(103, [b"Early Hints", b"Server", b"old", b"Link", b"</a>"])
            s.stream.send_response(200, [b"OK", b"Server", b"old"], end=False)
            s.stream.send_end([b"Server", b"old", b"X-Sum", b"1"])

        agent.on_stream = answer
        client: Client = await visit(
            b"POST /a HTTP/1.1\r\nHost: web.localhost\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\nConnection: TE\r\n\r\n"
            b"1\r\na\r\n0\r\nx-debug: 1\r\nX-Kept: 1\r\n\r\n"
        )
        interim, head = await client.read_head(), await client.read_head()
        last = await client.read_head()
        assert (b"Server" not in interim) and (b"Link: </a>" in interim) and b"X-Frame-Options" not in interim
        assert (b"Server" not in head) and b"X-Frame-Options: DENY" in head
        assert last == b"0\r\nX-Sum: 1\r\n\r\n"
        await agent.until(agent.streams[0].ended.is_set)
        assert agent.streams[0].trailers == [b"X-Kept", b"1"]

    @pytest.mark.parametrize(
        ("rule", "expected"), [("preserve", [b"web.localhost"]), ("rewrite", []), ("app", [b"app"])]
    )
    async def test_host(self, online: Any, visit: Any, rule: str, expected: list[bytes]) -> None:
        """``rewrite`` leaves the field out: the agent knows its target's name."""
        forget()
        agent = await online({"headers": {"host": rule}} if rule != "preserve" else {})
        client: Client = await visit()
        for _ in range(4):
            client.send(GET_A)
            assert (await client.response())[0] == 200
            assert agent.streams[-1].get(b"host") == expected
            assert agent.streams[-1].get(b"x-forwarded-host") == [b"web.localhost"]

    async def test_a_policy_is_not_mixed_with_another_in_what_is_remembered(
        self, relay: Relay, online: Any, visit: Any
    ) -> None:
        forget()
        agent = await online({})
        agent.on_stream = lambda s: whole(s, fields=(b"Server", b"old"))
        client: Client = await visit()
        await learn(client)
        for version, document in ((1, {"headers": RULES}), (2, {}), (3, {"headers": RULES})):
            change(relay, document, version)
            for _ in range(4):
                client.send(GET)
                _, fields, _ = await client.response()
                assert (b"server" in fields) is (not document)
                assert (b"x-frame-options" in fields) is bool(document)
                assert bool(agent.streams[-1].get(b"x-env")) is bool(document)


class TestChanges:
    async def test_holds_for_the_next_request_of_an_open_connection(
        self, relay: Relay, online: Any, visit: Any
    ) -> None:
        forget()
        await online({})
        client: Client = await visit()
        await learn(client)
        change(relay, {"addresses": {"rules": [{"deny": "127.0.0.0/8"}]}}, 1)
        client.send(GET)
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (403, [b"edge.ip_denied"])
        change(relay, {}, 2)
        client.send(GET)
        assert (await client.response())[0] == 200

    async def test_what_is_in_flight_finishes_under_the_old_one(self, relay: Relay, online: Any, visit: Any) -> None:
        agent = await online({})
        agent.on_stream = lambda s: None
        client: Client = await visit(GET_A)
        await agent.until(lambda: agent.streams)
        change(relay, {"addresses": {"rules": [{"deny": "127.0.0.0/8"}]}, "headers": RULES}, 1)
        agent.streams[0].answer(fields=(b"Server", b"old"), body=b"late")
        status, fields, body = await client.response()
        assert (status, body, fields[b"server"]) == (200, b"late", [b"old"])
        assert not agent.unbound, "nothing was unbound for it"

    async def test_one_that_cannot_be_read_never_replaces_one_that_could(
        self, relay: Relay, online: Any, visit: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        await online({"addresses": {"rules": [{"deny": "127.0.0.0/8"}]}}, 1)
        change(relay, {"version": 2, "open": True}, 2)
        client: Client = await visit(GET_A)
        assert (await client.response())[0] == 403
        assert "cannot be read" in caplog.text

    async def test_an_older_one_never_replaces_a_newer_one(self, relay: Relay, online: Any, visit: Any) -> None:
        """The grant may be older than the edge state, or newer."""
        change(relay, {"addresses": {"rules": [{"deny": "127.0.0.0/8"}]}}, 5)
        agent = await online({}, 4)
        client: Client = await visit(GET_A)
        assert (await client.response())[0] == 403
        change(relay, {}, 3)
        client.send(GET_A)
        assert (await client.response())[0] == 403
        agent.bind(grant(policy={}, policy_version=6))
        await agent.until(lambda: relay.agents.by_tunnel["tun_web"].policy_version == 6)
        client.send(GET_A)
        assert (await client.response())[0] == 200

    async def test_a_tunnel_whose_policy_nobody_can_read_is_not_served(self, relay: Relay) -> None:
        agent = await ScriptedAgent().connect(port(relay, 0), session_token())
        agent.bind(grant(policy={"version": 2}))
        await agent.until(lambda: agent.refused)
        assert agent.refused[1][0] == "tunnel.policy_invalid"
        agent.close()

    async def test_the_older_readable_one_serves_at_a_bind(self, relay: Relay, online: Any, visit: Any) -> None:
        change(relay, {"version": 2}, 9)
        await online({"addresses": {"rules": [{"deny": "127.0.0.0/8"}]}}, 8)
        client: Client = await visit(GET_A)
        assert (await client.response())[0] == 403

    async def test_concurrency_is_the_lower_of_plan_and_policy(self, relay: Relay, online: Any, visit: Any) -> None:
        agent = await online({"concurrency": 1})
        agent.on_stream = lambda s: None
        first, second = await visit(GET_A), await visit()
        await agent.until(lambda: agent.streams)
        second.send(GET_A)
        assert (await second.response())[0] == 429
        change(relay, {"concurrency": 1000}, 1)
        assert relay.agents.by_tunnel["tun_web"].concurrency == 100
        second.send(GET_A)
        await agent.until(lambda: len(agent.streams) == 2)
        for stream in agent.streams:
            stream.answer()
        assert (await first.response())[0] == (await second.response())[0] == 200


class TestPlainHttp:
    @pytest.mark.parametrize("known", [False, True])
    async def test_refused(self, relay: Relay, online: Any, visit: Any, known: bool) -> None:
        forget()
        await online({})
        client: Client = await visit()
        if known:
            await learn(client)
        change(relay, {"plain_http": "refuse"}, 1)
        client.send(GET)
        status, fields, _ = await client.response()
        assert (status, fields[b"portico-error"]) == (421, [b"edge.tls_mode_mismatch"])

    async def test_redirected_with_path_and_query(self, relay: Relay, online: Any, visit: Any) -> None:
        await online({"plain_http": "redirect"})
        client: Client = await visit(b"POST /a?b=c HTTP/1.1\r\nHost: WEB.localhost:80\r\nContent-Length: 0\r\n\r\n")
        status, fields, _ = await client.response()
        https = relay.settings.https_port
        assert (status, fields[b"portico-error"]) == (308, [b"edge.https_redirect"])
        assert fields[b"location"] == [b"https://web.localhost:%d/a?b=c" % https]


async def test_a_host_that_became_a_passthrough_tunnel(relay: Relay, online: Any, visit: Any) -> None:
    """What was found good for the tunnel before says nothing of the one that has its host now."""
    forget()
    agent = await online({})
    client: Client = await visit()
    await learn(client)
    agent.session.control(f.UNBIND, 1, code="tunnel.removed", detail="")
    await agent.until(lambda: not relay.agents.by_tunnel)
    await agent.online(grant(tunnel="tun_through", protocol="tls"), bind=2)
    client.send(GET)
    status, fields, _ = await client.response()
    assert (status, fields[b"portico-error"]) == (421, [b"edge.tls_mode_mismatch"])


async def test_a_suspended_owner(relay: Relay, visit: Any) -> None:
    relay.snapshot.apply(
        {
            "type": "snapshot",
            "version": 5,
            "state": {"keys": [KEY.public_jwk()], "tunnels": [row("web", "suspended", 3)], "ended": []},
        }
    )
    client: Client = await visit(GET_A)
    status, fields, _ = await client.response()
    assert (status, fields[b"portico-error"]) == (403, [b"edge.account_suspended"])
    await asyncio.sleep(0)
