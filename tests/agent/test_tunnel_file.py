"""`portico.yml`: what it may say, and every fault with its place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from portico.agent import tunnel_keys
from portico.agent.durations import parse_duration, shown_duration
from portico.agent.follow import tunnel_options
from portico.agent.target import parse_target
from portico.agent.tls_files import TlsFiles
from portico.agent.tunnel_file import Config, Fault, read
from portico.control.tunnels import names
from tests.agent.certificates import certificate

LIMIT = 1 << 20


def parsed(folder: Path, *texts: str) -> Config:
    """The files with these texts as one."""
    paths = []
    for number, text in enumerate(texts):
        path = folder / f"{number}.yml"
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return read(paths, LIMIT)


def faults(folder: Path, text: str) -> list[tuple[int, int, str]]:
    return [(f.line, f.column, f.message) for f in parsed(folder, text).faults]


def tunnel(folder: Path, *lines: str) -> list[tuple[int, int, str]]:
    """The faults of a file with one tunnel whose keys begin in line 4."""
    return faults(folder, "version: 1\ntunnels:\n  web:\n" + "".join(f"    {line}\n" for line in lines))


class TestValues:
    def test_everything(self, tmp_path: Path) -> None:
        config = parsed(
            tmp_path,
            """
            version: 1
            server: https://portico.example.com
            agent_key_file: ./key
            region: eu
            log_level: warning
            proxy_url: socks5h://10.0.0.1:1080
            tunnels:
              web: {addr: 8000}
              shop:
                addr: "https://10.0.0.1:8443"
                protocol: http
                subdomain: my-shop
                host_header: rewrite
                target_tls_verify: no
                inspect: false
                ttl: 1h30m
            """,
        )
        assert config.faults == []
        assert config.settings == {
            "version": 1, "server": "https://portico.example.com", "agent_key_file": tmp_path / "key", "region": "eu",
            "log_level": "WARNING", "proxy_url": "socks5h://10.0.0.1:1080",
        }  # fmt: skip
        assert list(config.tunnels) == ["web", "shop"]
        options = tunnel_options(config.tunnels["shop"])
        assert options.spec == {
            "name": "shop", "protocol": "http", "subdomain": "my-shop", "policy": {"headers": {"host": "rewrite"}},
        }  # fmt: skip
        assert options.target.url == "https://10.0.0.1:8443"
        assert (options.tls_verify, options.ttl) == (False, 5400.0)
        assert tunnel_options(config.tunnels["web"]).spec == {"name": "web", "protocol": "http"}

    def test_the_policy_of_its_keys(self, tmp_path: Path) -> None:
        (tmp_path / "more.yml").write_text("concurrency: 5\nbasic_auth: {users: [{name: file, password: p}]}\n")
        config = parsed(
            tmp_path,
            """
            version: 1
            tunnels:
              short: {addr: 1, basic_auth: "a:12:34", allow_cidr: [10.0.0.0/8, "::1"], deny_cidr: 10.1.0.0/16}
              inline:
                addr: 2
                host_header: rewrite
                policy:
                  concurrency: 7
              file: {addr: 3, policy_file: ./more.yml, basic_auth: [b:p]}
              ssh: {addr: 22, protocol: tcp, deny_cidr: 10.0.0.0/8}
              plain: {addr: 4}
            """,
        )
        assert config.faults == [] and config.policy_files == [tmp_path / "more.yml"]
        specs = {name: tunnel_options(declared).spec.get("policy") for name, declared in config.tunnels.items()}
        rules = [{"deny": "10.1.0.0/16"}, {"allow": "10.0.0.0/8"}, {"allow": "::1/128"}]
        assert specs == {
            "short": {"basic_auth": {"users": [{"name": "a", "password": "12:34"}]}, "addresses": {"rules": rules}},
            "inline": {"concurrency": 7, "headers": {"host": "rewrite"}},
            "file": {
                "concurrency": 5,
                "basic_auth": {"users": [{"name": "file", "password": "p"}, {"name": "b", "password": "p"}]},
            },
            "ssh": {"addresses": {"rules": [{"deny": "10.0.0.0/8"}]}},
            "plain": None,
        }

    def test_faults_of_policies_have_their_places(self, tmp_path: Path) -> None:
        (tmp_path / "more.yml").write_text("# a comment\nconcurrency: 0\n")
        config = parsed(
            tmp_path,
            """
            version: 1
            tunnels:
              a: {addr: 1, allow_cidr: [10.0.0.0/8, 10.0.0.1/8]}
              b:
                addr: 2
                policy:
                  addresses:
                    rules:
                      - allow: nowhere
              c: {addr: 3, policy_file: more.yml}
              d: {addr: 4, policy_file: none.yml, policy: {}}
              e: {addr: 5, policy: {plain_http: refuse}, host_header: "a b"}
              f: {addr: 22, protocol: tcp, policy: {plain_http: refuse}}
              g: {addr: 22, protocol: tcp, basic_auth: a:b}
              h: {addr: 1, basic_auth: a:b, policy: {basic_auth: {users: [{name: a, password: c}]}}}
            """,
        )
        own = str(tmp_path / "0.yml")
        found = [(Path(f.file).name, f.line, f.column, f.message) for f in config.faults]
        assert ("more.yml", 2, 1, "concurrency: must be a whole number from 1 to 100000, not 0") in found
        assert [(line, message[:34]) for name, line, _, message in found if name == Path(own).name] == [
            (4, "allow_cidr: '10.0.0.1/8' has bits "), (10, "policy.addresses.rules[0].allow: 'n"[:34]),
            (12, f"policy_file: {tmp_path}"[:34]), (12, "policy_file: give policy or policy"),
            (13, "host_header: 'a b' is not a host n"), (14, "plain_http: a tcp tunnel cannot enf"[:34]),
            (15, "basic_auth: only a tunnel with pro"), (16, "the policy has the user a already;"),
        ]  # fmt: skip

    def test_tcp(self, tmp_path: Path) -> None:
        text = "version: 1\ntunnels:\n  ssh: {protocol: tcp, addr: 22, remote_port: 7105, proxy_protocol: 2}\n"
        config = parsed(tmp_path, text)
        assert config.faults == []
        options = tunnel_options(config.tunnels["ssh"])
        assert options.spec == {"name": "ssh", "protocol": "tcp", "remote_port": 7105}
        assert (options.target.url, options.proxy_protocol) == ("tcp://localhost:22", 2)

    def test_a_domain_of_ones_own(self, tmp_path: Path) -> None:
        tunnels = "  shop: {addr: 8000, domain: www.example.com.}\n  all: {addr: 1, domain: '*.bücher.example'}\n"
        config = parsed(tmp_path, f"version: 1\ntunnels:\n{tunnels}")
        assert config.faults == []
        assert [tunnel_options(config.tunnels[name]).spec["domain"] for name in ("shop", "all")] == [
            "www.example.com", "*.bücher.example",
        ]  # fmt: skip
        for wrong in ("www", "https://www.example.com", "a b.example.com", "you@example.com"):
            faults = parsed(tmp_path, f"version: 1\ntunnels:\n  a: {{addr: 1, domain: '{wrong}'}}\n").faults
            assert [f"{wrong!r} is not a domain" in fault.message for fault in faults] == [True]
        faults = parsed(
            tmp_path, "version: 1\ntunnels:\n  a: {protocol: tcp, addr: 1, domain: www.example.com}\n"
        ).faults
        assert "only a tunnel with protocol: http or tls has it" in faults[0].message

    def test_tls(self, tmp_path: Path) -> None:
        both = certificate(tmp_path, "localhost")[1]
        text = (
            "version: 1\ntunnels:\n  through: {protocol: tls, addr: 8443, subdomain: vault, proxy_protocol: 2}\n"
            f"  ended: {{protocol: tls, addr: 8000, tls_cert: ./{both.name}, tls_key: {both}, tls_alpn: 'h2, http/1.1'}}\n"
        )
        config = parsed(tmp_path, text)
        assert config.faults == []
        through, ended = (tunnel_options(config.tunnels[name]) for name in ("through", "ended"))
        assert through.spec == {"name": "through", "protocol": "tls", "subdomain": "vault"}
        assert (through.target.url, through.tls, through.proxy_protocol) == ("tls://localhost:8443", None, 2)
        assert (ended.target.url, ended.tls) == ("tcp://localhost:8000", TlsFiles(both, both, ("h2", "http/1.1")))

    @pytest.mark.parametrize(
        ("lines", "where", "says"),
        [
            (["tls_cert: both.pem"], (6, 15), "tls_cert: it needs tls_key beside it"),
            (["tls_key: both.pem"], (6, 14), "tls_key: it needs tls_cert beside it"),
            (["tls_alpn: h2"], (6, 15), "tls_alpn: it needs tls_cert beside it"),
            (["tls_cert: no.pem", "tls_key: both.pem"], (6, 15), "tls_cert: "),
            (["tls_cert: both.pem", "tls_key: empty.pem"], (7, 14), "empty.pem holds no private key"),
            (["tls_cert: both.pem", "tls_key: other.pem"], (7, 14), "is not the key of the certificate"),
        ],
    )
    def test_certificates_are_looked_at(
        self, tmp_path: Path, lines: list[str], where: tuple[int, int], says: str
    ) -> None:
        certificate(tmp_path, "localhost")[1].rename(tmp_path / "both.pem")
        certificate(tmp_path, "localhost")[1].rename(tmp_path / "other.pem")
        (tmp_path / "empty.pem").touch()
        found = tunnel(tmp_path, "addr: 8443", "protocol: tls", *lines)
        assert len(found) == 1 and found[0][:2] == where and says in found[0][2], found

    def test_the_local_page_can_be_switched_off(self, tmp_path: Path) -> None:
        config = parsed(tmp_path, "version: 1\nweb_addr: false\ntunnels:\n  a: {addr: 1}\n")
        assert (config.faults, config.settings["web_addr"]) == ([], "false")

    @pytest.mark.parametrize("key", [*tunnel_keys.TOP, *tunnel_keys.TUNNEL], ids=lambda key: key.name)
    def test_the_example_of_every_key_is_a_good_one(self, tmp_path: Path, key: tunnel_keys.Key) -> None:
        if key.refusal or not key.example:
            return
        entries = {"addr": "8000"} | ({"protocol": key.only[0]} if key.only else {})
        if key.name.startswith("tls_"):
            both = certificate(tmp_path, "localhost")[1]
            entries |= {"tls_cert": str(both), "tls_key": str(both)}
            for name in ("fullchain.pem", "privkey.pem"):
                shutil.copy(both, tmp_path / name)
        (tmp_path / "policy.yml").write_text("concurrency: 20\n")
        top = "version: 1\n" if key.name != "version" else ""
        if key in tunnel_keys.TOP:
            top += f"{key.name}: {key.example}\n"
        else:
            entries[key.name] = key.example
        text = top + "tunnels:\n  a:\n" + "".join(f"    {name}: {value}\n" for name, value in entries.items())
        assert faults(tmp_path, text) == []

    def test_the_example(self) -> None:
        config = read([Path(__file__).parents[2] / "examples" / "portico.yml"], LIMIT)
        assert config.faults == []
        kinds = {name: tunnel_options(t).target.kind for name, t in config.tunnels.items()}
        assert kinds == {"app": "tcp", "notes": "file", "shell": "tcp"}

    def test_numbers_are_taken_as_typed(self, tmp_path: Path) -> None:
        """YAML 1.1 reads 22:22 as 1342 and 010 as 8."""
        config = parsed(
            tmp_path, "version: 1\ntunnels:\n  a:\n    addr: 22:22\n  b:\n    addr: 1000\n    subdomain: 010\n"
        )
        assert config.tunnels["a"].values["addr"].place == "22:22" and config.tunnels["b"].values["subdomain"] == "010"

    def test_relative_paths_are_below_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "site").mkdir()
        monkeypatch.chdir("/")
        config = parsed(tmp_path, "version: 1\ntunnels:\n  a:\n    addr: file:./site\n  b:\n    addr: unix:./a.sock\n")
        assert config.tunnels["a"].values["addr"].url == f"file://{tmp_path}/site"
        assert config.tunnels["b"].values["addr"].url == f"unix:{tmp_path}/a.sock"

    def test_anchors_and_merge_keys(self, tmp_path: Path) -> None:
        text = "version: 1\ntunnels:\n  a: &a\n    addr: 1\n    ttl: 5m\n  b:\n    <<: *a\n    addr: 2\n"
        config = parsed(tmp_path, text)
        assert config.faults == [] and config.tunnels["b"].values == {"addr": parse_target("2"), "ttl": 300.0}
        config = parsed(
            tmp_path, text.replace("b:", "b: &b") + "  c: {<<: *b, ttl: 1m}\n  d: {<<: [*b, *a], subdomain: d}\n"
        )
        assert config.faults == [] and config.tunnels["c"].values == {"addr": parse_target("2"), "ttl": 60.0}
        assert config.tunnels["d"].values == {"addr": parse_target("2"), "ttl": 300.0, "subdomain": "d"}

    def test_later_files_go_before_earlier_ones(self, tmp_path: Path) -> None:
        one = "version: 1\nregion: eu\nlog_level: INFO\ntunnels:\n  a:\n    addr: 1\n    ttl: 5m\n  b:\n    addr: 2\n"
        two = "version: 1\nregion: us\ntunnels:\n  a:\n    addr: 3\n"
        config = parsed(tmp_path, one, two)
        assert (config.settings["region"], config.settings["log_level"]) == ("us", "INFO")
        assert {name: t.values for name, t in config.tunnels.items()} == {
            "a": {"addr": parse_target("3")},
            "b": {"addr": parse_target("2")},
        }

    @pytest.mark.parametrize(
        ("text", "seconds"), [("90s", 90), ("15m", 900), ("1h30m", 5400), ("2d", 172_800), ("1d2h3m4s", 93_784)]
    )
    def test_durations(self, text: str, seconds: float) -> None:
        assert parse_duration(text) == seconds
        assert parse_duration(shown_duration(seconds)) <= seconds

    @pytest.mark.parametrize("text", ["", "15", "0s", "m", "-1m", "1.5h", "1m1h", "999999999d", "1m\n"])
    def test_not_durations(self, text: str) -> None:
        with pytest.raises(ValueError):
            parse_duration(text)

    @pytest.mark.parametrize("name", ["a", "a-b", "0", "a" * 63, "", "-a", "a-", "A", "a_b", "a" * 64, "ä", "a\n"])
    def test_names_are_those_of_the_api(self, name: str) -> None:
        def taken(check: Any) -> bool:
            try:
                check(name)
            except Exception:
                return False
            return True

        assert taken(tunnel_keys.check_name) == taken(names.check_name)


class TestFaults:
    def test_all_at_once_in_order(self, tmp_path: Path) -> None:
        text = "version: 2\nservr: x\ntunnels:\n  Web:\n    subdomian: x\n  web:\n    addr: 99999\n"
        assert [(line, column) for line, column, _ in faults(tmp_path, text)] == [
            (1, 10),
            (2, 1),
            (4, 3),
            (4, 3),
            (5, 5),
            (7, 11),
        ]

    @pytest.mark.parametrize(
        ("text", "line", "column", "says"),
        [
            ("", 1, 1, "the file is empty"),
            ("# nothing\n", 1, 1, "the file is empty"),
            ("- 1\n", 1, 1, "must be a map"),
            ("version: 1\n", 1, 1, "the file has no tunnels"),
            ("tunnels: {}\n", 1, 1, "the file has no version; write version: 1"),
            ("version: 3\ntunnels: {}\n", 1, 10, "versions 2 and 3 are ngrok's"),
            ("version: [1]\ntunnels: {}\n", 1, 10, "must be one value (1), not a list"),
            ("version: 1\ntunnels:\n  - name: web\n", 3, 3, "a map, not a list"),
            ("version: 1\ntunnels: 5\n", 2, 10, "must be a map of names"),
            ("version: 1\ntunnels:\n  web: 8000\n", 3, 8, "must be a map of keys, such as addr: 8000"),
            ("version: 1\ntunnels:\n  web:\n", 3, 7, "must be a map of keys"),
            ("version: 1\ntunnels:\n  web: {ttl: 5m}\n", 3, 3, "tunnel 'web' has no addr; write addr: 8000"),
            ("version: 1\ntunnels: {}\ntunnels: {}\n", 3, 1, "the key 'tunnels' is there twice; first in line 2"),
            ("version: 1\ntunnels:\n  a: {addr: 1}\n  a: {addr: 2}\n", 4, 3, "the tunnel 'a' is there twice; first in line 3"),
            ("version: 1\ntunnels:\n\tweb:\n", 3, 1, "a tab cannot indent YAML"),
            ("version: 1\ntunnels:\n  web:\n    addr: a: b\n", 4, 12, "check the indentation"),
            ("version: 1\ntunnels:\n  a: {addr: 1}\n  web\nregion: x\n", 4, 3, "a key needs a colon"),
            ("version: 1\ntunnels: {web: [}\n", 2, 17, "this is not YAML"),
            ("version: 1\n---\nversion: 1\n", 2, 1, "not YAML"),
            ("version: 1\nregion: \x07\ntunnels: {}\n", 2, 9, "a control character"),
            ("version: 1\nregion: !!python/object:os.system x\ntunnels: {}\n", 2, 9, "means nothing here"),
            ("version: 1\n? [a]\n: b\ntunnels: {}\n", 2, 3, "a key must be plain text"),
            ("version: 1\ntunnels:\n  a:\n    addr: 1\n    ? [a]\n    : b\n", 5, 7, "a key must be plain text"),
            ("version: 1\ntunnels:\n  a: &a\n    ? [a]\n    : b\n    addr: 1\n  b: {<<: *a}\n", 4, 7, "a key must be plain text"),
            ("version: 1\ntunnels:\n  a:\n    addr: 1\n    <<: 5\n", 5, 9, "<< needs a map"),
            ("version: 1\nagent_key_env: A\nagent_key_file: b\ntunnels: {}\n", 3, 17, "not both"),
            ("version: 1\nagent_key_env: a b\ntunnels: {}\n", 2, 16, "not the name of an environment variable"),
            ("version: 1\nagent_key: tnl_agt_x\ntunnels: {}\n", 2, 1, "does not belong into a file"),
            ("version: 1\nproxy_url: socks5://u:p@h:1\ntunnels: {}\n", 2, 12, "put the URL into PORTICO_PROXY_URL"),
            ("version: 1\nproxy_url: gopher://h:1\ntunnels: {}\n", 2, 12, "proxy_url"),
            ("version: 1\nlog_level: LOUD\ntunnels: {}\n", 2, 12, "not one of DEBUG"),
            ("version: 1\nserver: 'http://'\ntunnels: {}\n", 2, 9, "not the address of an API"),
        ],
    )  # fmt: skip
    def test_the_document(self, tmp_path: Path, text: str, line: int, column: int, says: str) -> None:
        found = faults(tmp_path, text)
        assert found and found[0][:2] == (line, column) and says in found[0][2], found

    @pytest.mark.parametrize(
        ("line", "column", "says"),
        [
            ("addr: 99999", 11, "addr: '99999': the port must be 1 to 65535"),
            ("addr: http://x/path", 11, "a path in the target is not supported"),
            ("addr: [8000]", 11, "must be one value (TARGET), not a list"),
            ("addr:", 10, "has no value"),
            ("addr: ''", 11, "addr:"),
            ("remote_port: 7100", 5, "remote_port: only a tunnel with protocol: tcp has it"),
            ("protocol: udp", 15, "udp tunnels do not exist yet"),
            ("tls_cert: ./x.pem", 5, "tls_cert: only a tunnel with protocol: tls has it"),
            ("proxy_protocol: 2", 5, "proxy_protocol: only a tunnel with protocol: tcp or tls has it"),
            ("protocol: gopher", 15, "'gopher' is not a protocol"),
            ("subdomain: on", 16, "YAML reads on as true or false; put it in quotes"),
            ("subdomain: My_Shop", 16, "'My_Shop' is not 1 to 63 lower-case letters"),
            ("host_header: 'a b'", 18, "'a b' is not a host name"),
            ("inspect: maybe", 14, "'maybe' is not true or false"),
            ("ttl: 15", 10, "write it with units"),
        ],
    )
    def test_values(self, tmp_path: Path, line: str, column: int, says: str) -> None:
        first = ["addr: 8000"] if not line.startswith("addr") else []
        found = tunnel(tmp_path, *first, line)
        assert len(found) == 1 and found[0][:2] == (4 + len(first), column) and says in found[0][2], found

    @pytest.mark.parametrize("key", [key for key in tunnel_keys.TUNNEL if key.refusal], ids=lambda key: key.name)
    def test_what_does_not_exist_yet_is_refused(self, tmp_path: Path, key: tunnel_keys.Key) -> None:
        assert tunnel(tmp_path, "addr: 8000", f"{key.name}: x") == [(5, 5, f"{key.name}: {key.refusal}")]

    @pytest.mark.parametrize(
        ("level", "theirs", "ours"),
        [(level, theirs, ours) for level, table in tunnel_keys.OTHER_NAMES.items() for theirs, ours in table.items()],
    )
    def test_names_of_other_tunnels_are_told_ours(self, tmp_path: Path, level: str, theirs: str, ours: str) -> None:
        if level == "top":
            found = faults(tmp_path, f"version: 1\n{theirs}: x\ntunnels: {{}}\n")
            table = tunnel_keys.TOP
        else:
            found = [(line - 3, *rest) for line, *rest in tunnel(tmp_path, "addr: 8000", f"{theirs}: x")]
            table = tunnel_keys.TUNNEL
        key = next(key for key in table if key.name == ours)
        expected = (
            f"unknown key {theirs!r}: {key.refusal}"
            if key.refusal
            else f"unknown key {theirs!r}; did you mean {ours!r}?"
        )
        assert [f[-1] for f in found] == [expected]

    def test_a_key_that_is_like_none_gets_the_list(self, tmp_path: Path) -> None:
        ((_, _, message),) = tunnel(tmp_path, "addr: 8000", "zzz: 1")
        assert message.startswith("unknown key 'zzz'; there are: protocol, addr, subdomain")

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("subdomain: x", "subdomain: only a tunnel with protocol: http or tls has it"),
            ("remote_port: 70000", "'70000' is not a number from 1 to 65535"),
            ("proxy_protocol: 3", "'3' is not a number from 1 to 2"),
        ],
    )
    def test_values_of_tcp(self, tmp_path: Path, line: str, says: str) -> None:
        ((row, _, message),) = tunnel(tmp_path, "protocol: tcp", "addr: 22", line)
        assert row == 6 and says in message

    def test_a_target_that_tcp_cannot_have(self, tmp_path: Path) -> None:
        ((row, column, _),) = tunnel(tmp_path, "addr: file:///", "protocol: tcp")
        assert (row, column) == (4, 11)

    def test_the_protocol_may_be_merged(self, tmp_path: Path) -> None:
        text = "version: 1\ntunnels:\n  a: &a {protocol: tcp, addr: 22}\n  b: {<<: *a, remote_port: 7100}\n"
        assert faults(tmp_path, text) == []

    def test_ngroks_agent_map(self, tmp_path: Path) -> None:
        found = faults(tmp_path, "version: 3\nagent:\n  authtoken: x\nendpoints:\n  - name: web\n")
        assert [f[0] for f in found] == [1, 2, 4]
        assert "its keys stand at the top" in found[1][2] and "did you mean 'tunnels'?" in found[2][2]

    def test_a_subdomain_twice(self, tmp_path: Path) -> None:
        text = "version: 1\ntunnels:\n  a: {addr: 1, subdomain: x}\n  b: {addr: 2, subdomain: x}\n"
        assert faults(tmp_path, text) == [(4, 27, "the subdomain 'x' is that of tunnel 'a' (line 3) already")]

    def test_a_fault_in_a_merged_map_is_said_once(self, tmp_path: Path) -> None:
        text = "version: 1\ntunnels:\n  a: &a {addr: 1, tll: 1m}\n  b: {<<: *a}\n  c: {<<: *a}\n"
        assert faults(tmp_path, text) == [(3, 19, "unknown key 'tll'; did you mean 'ttl'?")]

    def test_endless_documents(self, tmp_path: Path) -> None:
        assert faults(tmp_path, "[" * 100_000)[0][2] == "the file is nested too deeply"
        endless = "version: 1\ntunnels:\n  a: &a\n    addr: 1\n    <<: *a\n"
        assert "<< needs a map" in faults(tmp_path, endless)[0][2]

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "x.yml").write_bytes(b"version: 1\nregion: \xff\n")
        (fault,) = read([tmp_path / "x.yml"], LIMIT).faults
        assert (fault.line, fault.column) == (2, 9) and "not UTF-8" in fault.message

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        (tmp_path / "big.yml").write_bytes(b"#" * 11)
        messages = [f.text() for f in read([tmp_path / "none.yml", tmp_path / "big.yml", tmp_path], 10).faults]
        assert sorted(messages) == sorted(
            [
                f"{tmp_path}/none.yml: does not exist",
                f"{tmp_path}/big.yml: is larger than 10 bytes",
                f"{tmp_path}: cannot be read: Is a directory",
            ]
        )


#: What files are made of, to be put together wrongly.
PIECES = """version: 1|version:|tunnels:|  web:|  web: {|}|    addr: 8000|    addr: [1, {a: *x}]|    <<: *a|  b: &a {addr: 1}|-
'|"|    protocol: tcp|    subdomain: on|    ttl: 1h|!!binary|&x *x|---|...|ä: ö|agent:|    protocol: [http]|    <<: [*a, 5]
%YAML 9.9|    ? [x]|    : 1|    = : 1|  ? {a: b}|    ~: 1|    addr: =""".replace("\n", "|").split("|")
PIECES += ["\t", "\x00", "\u2028", "|", "    ? [x]\n    : 1"]


class TestAnyText:
    @given(st.booleans(), st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12))
    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    def test_faults_and_never_a_traceback(self, tmp_path: Path, begun: bool, lines: list[str]) -> None:
        lines = ["version: 1", "tunnels:", "  a: &a", *lines] if begun else lines
        (tmp_path / "x.yml").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        config = read([tmp_path / "x.yml"], LIMIT)
        for fault in config.faults:
            assert fault.line >= 1 and fault.column >= 1
            fault.text()
        if not config.faults:
            for declared in config.tunnels.values():
                tunnel_options(declared)


class TestShown:
    def test_the_line_and_a_caret(self, tmp_path: Path) -> None:
        config = parsed(tmp_path, "version: 1\ntunnels:\n  web:\n    addr: 99999\n")
        assert config.faults[0].text() == (
            f"{tmp_path}/0.yml:4:11: addr: '99999': the port must be 1 to 65535\n"
            "    4 |     addr: 99999\n"
            "      |           ^^^^^"
        )

    def test_a_long_line_with_tabs_and_control_characters(self) -> None:
        fault = Fault("f", 1, 300, "no", "\tx" * 150 + "\x1b[2J", 900)
        _, shown, marks = fault.text().splitlines()
        assert "\x1b" not in shown and len(shown) <= 108
        assert set(marks[8:].rstrip("^")) <= {"\t", " "}

    def test_colours_only_where_wanted(self) -> None:
        fault = Fault("f", 1, 1, "no", "x")
        assert "\x1b" in fault.text(color=True) and "\x1b" not in fault.text()
