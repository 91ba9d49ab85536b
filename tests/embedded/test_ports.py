"""The range of ports that is kept for TCP tunnels."""

from __future__ import annotations

import pytest

from portico.embedded.ports import check_range
from portico.errors import Problem


@pytest.mark.parametrize(("text", "count"), [("7100-7199", 100), ("1-65535", 65535), ("9000-9000", 1)])
def test_ranges(text: str, count: int) -> None:
    assert len(check_range(text, set())) == count


@pytest.mark.parametrize(
    "text", ["", "7100", "7100-", "-7199", "7199-7100", "0-10", "1-65536", "a-b", "7100-7199-7200", "7100:7199"]
)
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(Problem) as caught:
        check_range(text, set())
    assert caught.value.code == "config.invalid" and "tcp_ports" in caught.value.detail


def test_another_listener_within() -> None:
    with pytest.raises(Problem, match="7150"):
        check_range("7100-7199", {7000, 7150})
