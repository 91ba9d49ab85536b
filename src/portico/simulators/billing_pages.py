"""The pages that a buyer sees at a payment provider's simulator: a hosted checkout, and a word when it is over.

One page, without scripts, light or dark as the browser has it; it says on its face that no money moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from starlette.responses import HTMLResponse

_STYLE: Final = """
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --text: #16181d; --soft: #575d69; --line: #d9dde4;
  --accent: ACCENT; --on: #fff; --warn-back: #fff3d6; --warn: #6b4700; --bad-back: #fde4e4; --bad: #8f1d1d }
@media (prefers-color-scheme: dark) { :root { --back: #101216; --card: #1a1d23; --text: #eceef2; --soft: #a3aab8;
  --line: #333842; --warn-back: #3a2d0c; --warn: #ffd98a; --bad-back: #431a1a; --bad: #ffb4b4 } }
* { box-sizing: border-box }
body { margin: 0; min-height: 100vh; display: grid; grid-template-columns: minmax(0, 1fr); place-items: center;
  padding: 24px 16px; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { width: 100%; max-width: 440px; background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 28px }
.sim { margin: 0 0 20px; padding: 8px 12px; border-radius: 8px; background: var(--warn-back); color: var(--warn);
font-size: 14px }
.bad { margin: 0 0 20px; padding: 8px 12px; border-radius: 8px; background: var(--bad-back); color: var(--bad) }
h1 { margin: 0; font-size: 16px; font-weight: 500; color: var(--soft) }
.price { margin: 2px 0 0; font-size: 34px; font-weight: 650; letter-spacing: -.02em }
.price small { font-size: 16px; font-weight: 400; color: var(--soft); letter-spacing: 0 }
.who { margin: 4px 0 22px; color: var(--soft); overflow-wrap: anywhere }
fieldset { border: 0; margin: 0 0 22px; padding: 0 }
legend { padding: 0; margin-bottom: 8px; font-weight: 600 }
label { display: flex; gap: 10px; padding: 11px 12px; border: 1px solid var(--line); cursor: pointer }
label:first-of-type { border-radius: 9px 9px 0 0 }
label:last-of-type { border-radius: 0 0 9px 9px }
label + label { border-top: 0 }
label:has(:checked) { outline: 2px solid var(--accent); outline-offset: -1px }
label code { font-size: 14px }
label small { display: block; color: var(--soft) }
input { margin: 5px 0 0; accent-color: var(--accent) }
button { width: 100%; padding: 13px; border: 0; border-radius: 9px; font: inherit; font-weight: 600; cursor: pointer;
  background: var(--accent); color: var(--on) }
button.plain { margin-top: 8px; background: none; color: var(--soft); font-weight: 400; text-decoration: underline }
button:focus-visible, a:focus-visible { outline: 3px solid var(--text); outline-offset: 2px }
a { color: inherit }
"""
_WIDE: Final = """
main { max-width: 900px }
h2 { margin: 28px 0 8px; font-size: 18px }
.now { margin: 2px 0 12px; font-size: 24px; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto }
table { width: 100%; border-collapse: collapse; font-size: 14px }
th, td { padding: 7px 10px 7px 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
th { color: var(--soft); font-weight: 500 }
button { width: auto; margin: 0 6px 6px 0; padding: 8px 14px; font-size: 14px }
td form { display: flex; gap: 6px }
td button { margin: 0; padding: 3px 9px; font-size: 13px }
"""
_BOARD: Final = """<h1>The time here</h1><p class="now">{now}</p>
<form method="post">{moves}<button name="act" value="payout">Pay out</button></form>
<h2>Subscriptions</h2><div class="scroll">{held}</div>
<h2>Webhooks, the last ones</h2><div class="scroll">{sent}</div>
"""
_MOVES: Final = ((1, "One day on"), (7, "One week on"), (31, "One month on"))
_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>{style}</style></head>
<body><main><p class="sim" role="note">{provider} simulator: no money moves, no card is asked for.</p>{body}</main></body></html>
"""
_CHECKOUT: Final = """{problem}<h1>{what}</h1>
<p class="price">{price} <small>per {interval}</small></p><p class="who">{who}</p>
<form method="post"><fieldset><legend>Pay with</legend>{cards}</fieldset>
<button name="act" value="pay">{verb}</button><button class="plain" name="act" value="cancel" formnovalidate>Cancel
and go back</button>
</form>
"""
_HEADERS: Final = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # No form-action: browsers hold the redirect after a form to it, and the way back leads to another origin.
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; frame-ancestors 'none'",
}
_CARDS: Final = (
    ("good", "4242 4242 4242 4242", "Pays, now and at every renewal"),
    ("fails_later", "4000 0000 0000 0341", "Pays now, is declined at every renewal"),
    ("declines", "4000 0000 0000 0002", "Is declined"),
)


@dataclass(frozen=True, slots=True)
class Look:
    """The name on the page, its colour (white text on it must be readable), and what its button says."""

    provider: str
    accent: str
    verb: str = "Subscribe"


def checkout(look: Look, what: str, price: str, interval: str, who: str, problem: str = "") -> HTMLResponse:
    """The page with the price and the cards. ``problem``: why the last try failed."""
    body = _CHECKOUT.format(
        problem=f'<p class="bad" role="alert">{escape(problem)}</p>' if problem else "",
        what=escape(what),
        price=escape(price),
        interval=escape(interval),
        who=escape(who),
        cards=_cards("good"),
        verb=escape(look.verb),
    )
    return _page(look, what, body, 402 if problem else 200)


def settings(look: Look, title: str, who: str, card: str) -> HTMLResponse:
    """The page on which a customer chooses another card."""
    body = (
        f'<h1>{escape(title)}</h1><p class="who">{escape(who)}</p><form method="post"><fieldset><legend>Pay with</legend>'
        f'{_cards(card)}</fieldset><button name="act" value="pay">Save</button>'
        '<button class="plain" name="act" value="cancel">Go back</button></form>'
    )
    return _page(look, title, body, 200)


def _cards(chosen: str) -> str:
    return "".join(
        f'<label><input type="radio" name="card" value="{value}"{" checked" if value == chosen else ""}>'
        f"<span><code>{number}</code><small>{about}</small></span></label>"
        for value, number, about in _CARDS
    )


@dataclass(frozen=True, slots=True)
class Held:
    """A subscription on the board."""

    ref: str
    plan: str
    status: str
    until: str


def board(look: Look, now: str, held: Sequence[Held], sent: Sequence[tuple[str, str, str]]) -> HTMLResponse:
    """Everything at a glance, with what can be done: the clock, cards, payouts. ``sent``: event, attempt, answer."""
    moves = "".join(f'<button name="act" value="{days}">{label}</button>' for days, label in _MOVES)
    rows = "".join(
        f"<tr><td><code>{escape(row.ref)}</code></td><td>{escape(row.plan)}</td><td>{escape(row.status)}</td>"
        f'<td>{escape(row.until)}</td><td><form method="post"><input type="hidden" name="ref" value="{escape(row.ref)}">'
        '<button name="act" value="good">pays</button><button name="act" value="declines">declines</button></form></td></tr>'
        for row in held
    )
    last = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in sent)
    body = _BOARD.format(
        now=escape(now),
        moves=moves,
        held=f"<table><thead><tr><th>Id<th>Plan<th>Status<th>Until<th>Card</tr></thead>{rows}</table>"
        if rows
        else "<p>None yet.</p>",
        sent=f"<table><thead><tr><th>Event<th>Attempt<th>Answer</tr></thead>{last}</table>"
        if last
        else "<p>None yet.</p>",
    )
    return _page(look, "Board", body, 200, wide=True)


def word(look: Look, title: str, text: str, status: int = 200) -> HTMLResponse:
    """A page that only says something."""
    return _page(look, title, f"<h1>{escape(title)}</h1><p>{escape(text)}</p>", status)


def _page(look: Look, title: str, body: str, status: int, wide: bool = False) -> HTMLResponse:
    style = _STYLE.replace("ACCENT", look.accent) + (_WIDE if wide else "")
    text = _PAGE.format(
        title=escape(f"{title} – {look.provider} simulator"), style=style, provider=look.provider, body=body
    )
    return HTMLResponse(text, status, _HEADERS)
