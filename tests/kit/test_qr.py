"""The QR code is read back by a decoder that shares no code with what made it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import zxingcpp

from portico.kit.qr import COLORS, QUIET, qr_lines, qr_svg

URLS = [
    "http://web.localhost:7080",
    "https://a-rather-long-name-x7k2.tunnels.example.com",
    "http://" + "a" * 63 + ".x.io",
]
#: What a scanner sees of each character, upper and lower half: 1 is ink.
INK = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
SCALE = 4


def photographed(lines: list[str], *, ink_is_dark: bool) -> memoryview:
    """The terminal's picture: grey values, ``SCALE`` pixels a module; ink is the colour of the text."""
    rows: list[bytes] = []
    for line in lines:
        for half in (0, 1):
            row = b"".join((b"\x00" if INK[c][half] == ink_is_dark else b"\xff") * SCALE for c in line)
            rows += [row] * SCALE
    return memoryview(b"".join(rows)).cast("B", (len(rows), len(rows[0])))


def decoded(picture: memoryview) -> list[str]:
    return [
        found.text for found in zxingcpp.read_barcodes(picture, formats=zxingcpp.BarcodeFormat.QRCode, try_invert=False)
    ]


@pytest.mark.parametrize("url", URLS)
class TestDecodes:
    def test_in_colour_on_any_terminal(self, url: str) -> None:
        lines = qr_lines(url, color=True)
        assert all(line.startswith(COLORS[0]) and line.endswith(COLORS[1]) for line in lines)
        bare = [line.removeprefix(COLORS[0]).removesuffix(COLORS[1]) for line in lines]
        assert decoded(photographed(bare, ink_is_dark=True)) == [url]

    def test_without_colour_on_a_dark_terminal(self, url: str) -> None:
        lines = qr_lines(url, color=False)
        assert not any("\x1b" in line for line in lines)
        assert decoded(photographed(lines, ink_is_dark=False)) == [url]

    def test_its_quiet_zone_and_size(self, url: str) -> None:
        lines = qr_lines(url, color=False)
        assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 80
        assert all(line[:QUIET] == line[-QUIET:] == "█" * QUIET for line in lines)
        assert lines[0] == lines[1] == "█" * len(lines[0])


def test_on_a_page() -> None:
    uri = "otpauth://totp/Portico:ann%40example.com?secret=JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP&issuer=Portico"
    svg = ElementTree.fromstring(qr_svg(uri, 'For "ann" & co'))
    size = int(svg.attrib["viewBox"].split()[2])
    picture = [[255] * size for _ in range(size)]
    for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", svg[1].attrib["d"]):
        for column in range(int(x), int(x) + int(width)):
            picture[int(y)][column] = 0
    rows = [bytes(value for value in row for _ in range(SCALE)) for row in picture for _ in range(SCALE)]
    assert decoded(memoryview(b"".join(rows)).cast("B", (len(rows), len(rows[0])))) == [uri]
    assert svg.attrib["aria-label"] == 'For "ann" & co'
    assert svg[0].attrib["fill"] == "#fff"


def test_a_usual_url_fits_an_ordinary_terminal() -> None:
    assert len(qr_lines(URLS[0], color=False)) <= 18
