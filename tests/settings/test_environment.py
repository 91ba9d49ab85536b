"""What the environment says about terminals and proxies."""

from __future__ import annotations

import io

import pytest

from portico import settings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestColor:
    @pytest.mark.parametrize(
        ("environ", "terminal", "wanted"),
        [
            ({"TERM": "xterm"}, True, True),
            ({"TERM": "xterm"}, False, False),
            ({"TERM": "dumb"}, True, False),
            ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
            ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
            ({"FORCE_COLOR": "1"}, False, True),
            ({"CLICOLOR_FORCE": "1"}, False, True),
            ({"FORCE_COLOR": "3", "TERM": "dumb"}, False, True),
            ({"FORCE_COLOR": "0"}, False, False),
            ({"FORCE_COLOR": ""}, False, False),
            ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
            ({"TERM": "xterm", "CLICOLOR": "0"}, True, False),
            ({}, True, True),
        ],
    )
    def test_who_decides(self, environ: dict[str, str], terminal: bool, wanted: bool) -> None:
        assert settings.color_wanted(Terminal() if terminal else io.StringIO(), environ) is wanted

    @pytest.mark.parametrize(
        ("term", "terminals", "wanted"),
        [
            ("xterm", (True, True), True),
            ("xterm", (True, False), False),
            ("dumb", (True, True), False),
            ("", (True, True), True),
        ],
    )
    def test_a_screen_that_redraws_itself(self, term: str, terminals: tuple[bool, ...], wanted: bool) -> None:
        streams = [Terminal() if is_terminal else io.StringIO() for is_terminal in terminals]
        assert settings.screen_wanted(*streams, environ={"TERM": term}) is wanted


class TestProxyEnvironment:
    def test_names_in_either_case(self) -> None:
        environ = {"HTTPS_PROXY": "a", "https_proxy": "b", "NO_PROXY": "c", "http_proxy": "", "ALL_PROXY": "d"}
        assert settings.proxy_environment(environ) == {"https_proxy": "b", "all_proxy": "d", "no_proxy": "c"}

    def test_a_header_of_a_visitor_is_no_proxy(self) -> None:
        """CGI hands the header `Proxy:` on as HTTP_PROXY."""
        assert settings.proxy_environment({"HTTP_PROXY": "evil", "REQUEST_METHOD": "GET"}) == {}
