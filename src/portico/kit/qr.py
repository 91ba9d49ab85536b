"""A text as a QR code, with the quiet zone that scanners need: in a terminal (two modules a character) or on a page."""

from __future__ import annotations

import html
import itertools

import segno

#: Light modules around the code, as the standard asks for.
QUIET = 4
#: Black on white, whatever the terminal's own colours are.
COLORS = ("\x1b[38;5;16;48;5;231m", "\x1b[0m")
_BLOCKS = {(0, 0): " ", (1, 0): "▀", (0, 1): "▄", (1, 1): "█"}


def _matrix(text: str) -> list[list[int]]:
    """Rows of modules, 1 is dark."""
    return [list(row) for row in segno.make_qr(text, error="l", boost_error=False).matrix_iter(border=QUIET)]


def qr_svg(text: str, title: str) -> str:
    """The code as an SVG element for a page, black on white whatever the page's colours; ``title`` is plain words."""
    matrix = _matrix(text)
    size = len(matrix)
    runs = []
    for y, row in enumerate(matrix):
        x = 0
        for dark, group in itertools.groupby(row):
            width = len(list(group))
            if dark:
                runs.append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    return (
        f'<svg class="qr" viewBox="0 0 {size} {size}" role="img" aria-label="{html.escape(title)}"'
        f' shape-rendering="crispEdges"><rect width="{size}" height="{size}" fill="#fff"/>'
        f'<path fill="#000" d="{"".join(runs)}"/></svg>'
    )


def qr_rows(text: str, *, inverse: bool) -> list[str]:
    """The rows of the code, all of one width.

    To be written black on white; ``inverse``: for a terminal without colours, light modules as blocks of its own light
    text on its dark background.
    """
    matrix = _matrix(text)
    if len(matrix) % 2:
        matrix.append([0] * len(matrix[0]))
    flip = 1 if inverse else 0
    pairs = zip(matrix[::2], matrix[1::2], strict=True)
    return ["".join(_BLOCKS[top ^ flip, low ^ flip] for top, low in zip(*pair, strict=True)) for pair in pairs]


def qr_lines(text: str, *, color: bool) -> list[str]:
    """The same, ready to be written to a terminal."""
    rows = qr_rows(text, inverse=not color)
    return [f"{COLORS[0]}{row}{COLORS[1]}" for row in rows] if color else rows
