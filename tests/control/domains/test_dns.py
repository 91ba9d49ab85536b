"""Resolvers that lie, sleep, disagree and run in circles; and CAA as RFC 8659 reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from portico.control.domains import caa
from portico.control.domains.dns import SYSTEM, Answer, Looks, Server, servers, verdict
from portico.errors import Problem
from portico.kit.sealing import new_master_key
from portico.settings import ApiSettings, Secret
from tests.dnsserver import DnsServer


def looks_at(*resolvers: DnsServer, seconds: float = 10.0) -> Looks:
    addresses = tuple(each.address for each in resolvers)
    return Looks(
        ApiSettings(
            database_url=Secret("postgresql://none"), master_key=Secret(new_master_key()), dns_resolvers=addresses,
            dns_timeout_seconds=seconds,
        )
    )  # fmt: skip


@pytest.fixture
async def one() -> AsyncIterator[DnsServer]:
    async with DnsServer() as made:
        yield made


@pytest.fixture
async def three() -> AsyncIterator[tuple[DnsServer, DnsServer, DnsServer]]:
    async with DnsServer() as first, DnsServer() as second, DnsServer(lazy=True) as third:
        yield first, second, third


def is_x(answer: Answer) -> bool:
    return "x" in answer.values


class TestAnswers:
    async def test_what_is_there(self, one: DnsServer) -> None:
        one.put("a.example", "TXT", "one", "two")
        one.put("a.example", "A", "192.0.2.1")
        one.put("c.example", "CAA", '0 issue "ca.example; x=y"', '128 Tbs "z"')
        looks = looks_at(one)
        assert await looks.ask("a.example", "TXT") == [Answer("found", ("one", "two"))]
        assert await looks.ask("A.Example", "A") == [Answer("found", ("192.0.2.1",))]
        assert await looks.ask("c.example", "CAA") == [Answer("found", ("0 issue ca.example; x=y", "128 tbs z"))]
        assert await looks.ask("a.example", "AAAA") == [Answer("nodata")]
        assert await looks.ask("example", "A") == [Answer("nodata")]  # there is something below
        assert await looks.ask("none.example", "A") == [Answer("nxdomain")]

    async def test_a_long_text_is_one_text(self, one: DnsServer) -> None:
        one.put("a.example", "TXT", 'y" "z')  # two strings of one record
        assert (await looks_at(one).ask("a.example", "TXT"))[0].values == ("yz",)

    async def test_what_cannot_be_stored_or_shown_is_replaced(self, one: DnsServer) -> None:
        one.put("a.example", "TXT", r"a\000b\027[2Jc")
        assert (await looks_at(one).ask("a.example", "TXT"))[0].values == ("a\ufffdb\ufffd[2Jc",)

    @pytest.mark.parametrize("lazy", [False, True])
    async def test_aliases_are_followed(self, lazy: bool) -> None:
        async with DnsServer(lazy=lazy) as one:
            one.put("a.example", "CNAME", "b.example.")
            one.put("b.example", "CNAME", "C.example.")
            one.put("c.example", "A", "192.0.2.1")
            one.put("d.example", "CNAME", "nowhere.invalid.")
            looks = looks_at(one)
            chain = ("b.example", "c.example")
            assert await looks.ask("a.example", "A") == [Answer("found", ("192.0.2.1",), chain)]
            assert await looks.ask("a.example", "TXT") == [Answer("nodata", (), chain)]
            assert await looks.ask("a.example", "CNAME") == [Answer("found", ("b.example",))]
            assert await looks.ask("d.example", "A") == [Answer("nxdomain", (), ("nowhere.invalid",))]

    @pytest.mark.parametrize("lazy", [False, True])
    async def test_circles_and_endless_chains_end(self, lazy: bool) -> None:
        async with DnsServer(lazy=lazy) as one:
            one.put("a.example", "CNAME", "b.example.")
            one.put("b.example", "CNAME", "a.example.")
            one.put("self.example", "CNAME", "self.example.")
            for number in range(30):
                one.put(f"n{number}.example", "CNAME", f"n{number + 1}.example.")
            looks = looks_at(one)
            for name in ("a.example", "self.example", "n0.example"):
                (answer,) = await looks.ask(name, "A")
                assert answer.status == "loop", name
            assert sum(one.asked.values()) < 40

    async def test_an_answer_too_long_for_udp_comes_by_tcp(self, one: DnsServer) -> None:
        one.mode = "cut"
        one.put("a.example", "TXT", "x")
        assert await looks_at(one).ask("a.example", "TXT") == [Answer("found", ("x",))]
        assert one.by_tcp == 1

    async def test_guessed_answers_are_passed_over(self, one: DnsServer) -> None:
        one.mode = "forge"
        one.put("a.example", "TXT", "x")
        assert await looks_at(one).ask("a.example", "TXT") == [Answer("found", ("x",))]

    @pytest.mark.parametrize(
        ("mode", "why"),
        [("silent", "time"), ("garbage", "time"), ("servfail", "SERVFAIL"), ("refused", "REFUSED")],
    )
    async def test_no_answer_is_no_answer(self, one: DnsServer, mode: str, why: str) -> None:
        one.put("a.example", "TXT", "x")
        one.mode = mode
        (answer,) = await looks_at(one, seconds=0.4).ask("a.example", "TXT")
        assert (answer.status, answer.sure) == ("failed", False)
        assert why in answer.why

    async def test_a_lost_packet_is_sent_again(self, one: DnsServer) -> None:
        one.put("a.example", "TXT", "x")
        one.mode = "silent"
        asking = asyncio.create_task(looks_at(one, seconds=6.0).ask("a.example", "TXT"))
        async with asyncio.timeout(30):
            while not one.asked:
                await asyncio.sleep(0.01)
        one.mode = "good"
        assert await asking == [Answer("found", ("x",))]


class TestTogether:
    async def test_a_liar_alone_decides_nothing(self, three: tuple[DnsServer, DnsServer, DnsServer]) -> None:
        three[0].put("a.example", "TXT", "x")
        assert verdict(await looks_at(*three).ask("a.example", "TXT"), is_x) == "no"
        three[1].put("a.example", "TXT", "x")
        assert verdict(await looks_at(*three).ask("a.example", "TXT"), is_x) == "yes"

    async def test_a_slow_one_holds_nobody_up(self, three: tuple[DnsServer, DnsServer, DnsServer]) -> None:
        for each in three[:2]:
            each.put("a.example", "TXT", "x")
        three[2].mode = "silent"
        assert verdict(await looks_at(*three, seconds=1.0).ask("a.example", "TXT"), is_x) == "yes"

    async def test_silence_says_neither_yes_nor_no(self, three: tuple[DnsServer, DnsServer, DnsServer]) -> None:
        three[0].put("a.example", "TXT", "x")
        three[1].mode = three[2].mode = "servfail"
        assert verdict(await looks_at(*three).ask("a.example", "TXT"), is_x) == "unknown"
        three[0].put("a.example", "TXT")
        assert verdict(await looks_at(*three).ask("a.example", "TXT"), is_x) == "unknown"

    async def test_two_must_agree(self, three: tuple[DnsServer, DnsServer, DnsServer]) -> None:
        three[0].put("a.example", "TXT", "x")
        assert verdict(await looks_at(*three[:2]).ask("a.example", "TXT"), is_x) == "unknown"

    def test_nobody_says_nothing(self) -> None:
        assert verdict([], is_x) == "unknown"


def test_what_the_setting_may_be() -> None:
    assert servers(["1.1.1.1", "127.0.0.1:5353", "2606::1", "[2606::1]:5353", "1.1.1.1"]) == (
        Server("1.1.1.1", 53), Server("127.0.0.1", 5353), Server("2606::1", 53), Server("2606::1", 5353),
    )  # fmt: skip
    assert all(server.port == 53 for server in servers([SYSTEM]))
    for wrong in ("dns.example", "1.1.1.1:0", "1.1.1.1:x", "[::1]:70000", ""):
        with pytest.raises(Problem) as refused:
            servers([wrong])
        assert refused.value.code == "config.invalid"
    with pytest.raises(Problem):
        servers([])


class TestCaa:
    @pytest.mark.parametrize(
        ("records", "plain", "wild"),
        [
            ([], True, True),
            (['0 issue "ca.example"'], True, True),
            (['0 issue "CA.Example.; accounturi=x"'], True, True),
            (['0 issue "other.example"'], False, False),
            (['0 issue ";"'], False, False),
            (['0 issue "ca.example"', '0 issuewild ";"'], True, False),
            (['0 issue ";"', '0 issuewild "ca.example"'], False, True),
            (['0 issuewild "other.example"'], True, False),
            (['0 iodef "mailto:x@example.com"'], True, True),
            (['128 tbs "unknown"', '0 issue "ca.example"'], False, False),
            (['0 tbs "unknown"', '0 issue "ca.example"'], True, True),
        ],
    )
    async def test_records(self, one: DnsServer, records: list[str], plain: bool, wild: bool) -> None:
        one.put("example.com", "A", "192.0.2.1")
        one.put("example.com", "CAA", *records)
        looks = looks_at(one)
        assert (await caa.policy(looks, "example.com")).permits(["ca.example"], wildcard=False) is plain
        assert (await caa.policy(looks, "*.example.com")).permits(["ca.example"], wildcard=True) is wild

    async def test_the_closest_name_above_counts(self, one: DnsServer) -> None:
        one.put("example.com", "CAA", '0 issue "ca.example"')
        one.put("b.example.com", "CAA", '0 issue "other.example"')
        one.put("a.b.example.com", "A", "192.0.2.1")
        found = await caa.policy(looks_at(one), "a.b.example.com")
        assert found.owner == "b.example.com"
        assert not found.permits(["ca.example"], wildcard=False)
        assert (await caa.policy(looks_at(one), "c.example.com")).owner == "example.com"
        assert (await caa.policy(looks_at(one), "other.net")).owner is None
        assert ("com", "CAA") not in one.asked  # example.com had some
        assert one.asked[("net", "CAA")] == 1

    async def test_an_alias_is_read_where_it_leads(self, one: DnsServer) -> None:
        one.put("www.example.com", "CNAME", "edge.example.net.")
        one.put("edge.example.net", "CAA", '0 issue "other.example"')
        found = await caa.policy(looks_at(one), "www.example.com")
        assert (found.owner, found.permits(["ca.example"], wildcard=False)) == ("www.example.com", False)

    async def test_what_cannot_be_known_permits_nobody(self, one: DnsServer) -> None:
        one.mode = "servfail"
        found = await caa.policy(looks_at(one), "www.example.com")
        assert not found.known
        assert not found.permits(["ca.example"], wildcard=False)
