"""Whatever a target answers, what the agent makes of it fits onto the wire or is refused as the target's fault."""

from __future__ import annotations

import pytest

from portico.agent.heads import HeadError, RequestWriter, ResponseHead, trailer_fields
from portico.wire import frames as f


class TestResponseHead:
    @pytest.mark.parametrize("reason", [b"O\0K", b"O\x07K", b"O\nK", b"\x7f"])
    def test_a_reason_with_control_characters(self, reason: bytes) -> None:
        with pytest.raises(HeadError, match="reason"):
            ResponseHead(reason, [], 200)

    def test_a_head_that_no_frame_carries(self) -> None:
        with pytest.raises(HeadError, match="over"):
            ResponseHead(b"", [b"X", b"v" * f.MAX_PAYLOAD], 200)
        with pytest.raises(HeadError, match="256"):
            ResponseHead(b"", [b"X", b"v"] * 257, 200)
        with pytest.raises(HeadError, match="256"):
            ResponseHead(b"", [b"X" * 257, b"v"], 200)

    def test_the_largest_heads_pass_the_codec(self) -> None:
        wide = ResponseHead(b"OK", [b"X", b"v"] * 256, 200)
        long = ResponseHead(b"", [b"X", b"v" * (f.MAX_PAYLOAD - 6)], 200)
        for head in (wide, long):
            assert f.decode_response(f.encode_response(200, head.fields)) == (200, head.fields)

    def test_white_space_around_values_is_taken_off(self) -> None:
        assert ResponseHead(b"", [b"X", b"a \t", b"Y", b"b"], 200).fields == [b"", b"X", b"a", b"Y", b"b"]


class TestTrailers:
    def test_trailers_that_no_frame_carries(self) -> None:
        with pytest.raises(HeadError, match="over"):
            trailer_fields([b"X", b"v" * 40_000, b"Y", b"v" * 40_000])
        with pytest.raises(HeadError, match="256"):
            trailer_fields([b"X", b"v"] * 257)

    def test_the_largest_trailers_pass_the_codec(self) -> None:
        fields = trailer_fields([b"X", b"v" * (f.MAX_PAYLOAD - 7)])
        assert f.decode_trailers(f.encode_trailers(fields)) == fields


def test_long_sequences_of_names_are_not_remembered() -> None:
    """Visitors choose the names of a request: a table of such heads would be what a stranger makes of our memory."""
    writer = RequestWriter(b"localhost")
    for _ in range(2):
        out, left = writer.write([b"GET", b"/", b"Host", b"a", b"X" * 200, b"v", *[b"Y" * 250, b"v"] * 20], f.F_END)
        assert out.startswith(b"GET / HTTP/1.1\r\nHost: a\r\n")
        assert left == 0
    assert not writer._plans
    writer.write([b"GET", b"/", b"Host", b"a"], f.F_END)
    assert len(writer._plans) == 1
