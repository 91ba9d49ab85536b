"""What a visitor sees when the relay refuses: a page for browsers, a problem document for programs.

Everything but the request id, the host and an optional detail is rendered once per code, so a refusal under attack costs
microseconds. A page is self-contained: no script, no external resource, styles allowed by their hash alone. Interpolated
text is escaped; header values are cleaned of what could end a header.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html as markup
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from portico.errors import ErrorSpec, catalogue

Headers = list[tuple[bytes, bytes]]
Reply = tuple[int, Headers, bytes]

MAX_DETAIL_CHARS = 500
_CODE = re.compile(r"`([^`]+)`")
_NOT_IN_A_URL = re.compile(rb"[^\x21-\x7e]")
RETRY_AFTER_SECONDS = {429: 1}

NODES = ("Visitor", "Relay", "Agent", "Local app")
NODE_NOTES = ("your browser", "the public edge", "the owner’s machine", "the service itself")

# `hop` in contracts/errors.toml → what the chain marks: an even number is a node, an odd one the link after it.
_MARKS = {
    "visitor": 0,
    "visitor → relay": 1,
    "relay": 2,
    "relay → agent": 3,
    "agent": 4,
    "agent → local target": 5,
    "local target": 6,
}
_ALL_REACHED = 7


@dataclass(frozen=True, slots=True)
class Advice:
    """What happened, in words for everyone; then what to do, for each of the two people who may read the page (what stands
    between backticks is shown as code)."""

    what: str
    visitor: str
    owner: str


_ADVICE = {
    "edge.bad_request": Advice(
        "the request was not valid HTTP, so the relay did not pass it on.",
        "Reload the page. If that does not help, the program that sent the request needs a correction.",
        "The relay forwards only what can be read in exactly one way.",
    ),
    "edge.head_too_large": Advice(
        "the request carries more headers than the relay accepts.",
        "Delete the cookies of this site, then reload.",
        "Keep cookies and other headers small; the relay’s limit is `max_head_bytes`.",
    ),
    "edge.body_timeout": Advice(
        "what you sent stopped in the middle.",
        "Check your connection, then send it again.",
        "There is nothing to do: your app saw an upload that broke off.",
    ),
    "edge.head_timeout": Advice(
        "the request did not arrive whole in time.",
        "Check your connection, then reload.",
        "There is nothing to do: the request never reached you.",
    ),
    "edge.host_unassigned": Advice(
        "no tunnel has this name.",
        "Check the address for a typing error, or ask whoever gave it to you.",
        "Start a tunnel with this name: `portico http PORT --subdomain NAME`",
    ),
    "edge.tunnel_offline": Advice(
        "the address is right, but nobody is serving it at the moment.",
        "Try again later, or tell the owner.",
        "Start the tunnel again on the machine that owns it. After a lost network the agent reconnects by itself.",
    ),
    "edge.concurrency_exceeded": Advice(
        "too many requests are under way at the same time.",
        "Wait a moment, then reload.",
        "The tunnel has as many requests in flight as its policy or plan allows. Look for slow responses in the local app.",
    ),
    "edge.quota_exceeded": Advice(
        "this address has had all the traffic that its owner’s plan allows in a month.",
        "Come back when the next month begins (UTC), or tell the owner.",
        "`portico usage` shows how much was used of what. Traffic goes on at once when the plan is changed.",
    ),
    "edge.tls_mode_mismatch": Advice(
        "this connection is not the right one for this address.",
        "Open the address with `https://` in a new tab. If that does not help, tell the owner.",
        "The tunnel takes TLS only, is passed through, or has no certificate for this name. With `plain_http: redirect` in its "
        "policy, visitors are sent to https.",
    ),
    "edge.https_redirect": Advice(
        "this address is served by https alone.",
        "Open it with `https://` in front.",
        "The tunnel’s policy says `plain_http: redirect`.",
    ),
    "edge.auth_required": Advice(
        "the owner has protected this address, so you have to sign in.",
        "Reload, then enter the user name and password that the owner gave you. Some addresses ask your browser for a "
        "certificate instead.",
        "The tunnel’s policy has `basic_auth` or `client_certificates`. Give visitors what it asks for, or take it out.",
    ),
    "edge.auth_invalid": Advice(
        "the user name or the password is not right.",
        "Reload and try again. If you lost the password, ask the owner.",
        "The users are in the tunnel’s policy, `basic_auth`. A password cannot be read there, but set anew; that works within "
        "two seconds.",
    ),
    "edge.auth_throttled": Advice(
        "too many passwords were tried from your network.",
        "Wait a minute, then reload.",
        "Passwords that were right before are not affected. The relay’s limit is `password_attempts_per_address`.",
    ),
    "edge.ip_denied": Advice(
        "the owner does not let your network address in.",
        "Connect from another network (a VPN may be expected), or ask the owner to allow your address.",
        "The first matching rule decides: `addresses` in the tunnel’s policy, or `--allow-cidr` and `--deny-cidr`.",
    ),
    "edge.rate_limited": Advice(
        "more requests came than this address takes in so short a time.",
        "Wait a moment, then reload.",
        "The limits are those of `rate_limits` in the tunnel’s policy, and of your plan.",
    ),
    "edge.proxy_header_invalid": Advice(
        "a proxy in front of this relay did not say who is visiting.",
        "Tell the operator of this site.",
        "Connections from networks in the relay’s `proxy_protocol_from` have to begin with a PROXY header.",
    ),
    "edge.too_many_connections": Advice(
        "your network address holds too many connections to this relay.",
        "Close other tabs of this site, wait a moment, then reload.",
        "The limit for one client address is the relay’s `connections_per_address`.",
    ),
    "edge.connection_idle": Advice(
        "nothing was sent in either direction for longer than the relay allows.",
        "Connect again. A program that stays connected for days should send a keep-alive now and then.",
        "The relay’s limit for TCP tunnels is `tcp_idle_timeout_seconds`.",
    ),
    "edge.agent_unreachable": Advice(
        "the connection to the owner’s machine was lost while it worked on your request.",
        "Reload in a few seconds; the connection comes back by itself.",
        "The agent lost its relay. Its terminal shows why, and when it is back.",
    ),
    "edge.target_refused": Advice(
        "the tunnel is up, but the app behind it is not running.",
        "Try again later, or tell the owner.",
        "Nothing answers at the local target. Start the app, or correct the port of the tunnel.",
    ),
    "edge.target_invalid": Advice(
        "the app behind the tunnel sent an answer that is not valid HTTP.",
        "Try again. If it happens again, tell the owner.",
        "The local app closed the connection or does not speak HTTP. Check whether it expects https: `portico http https://localhost:PORT`",
    ),
    "edge.target_timeout": Advice(
        "the app behind the tunnel took too long to answer.",
        "Try again later, or tell the owner.",
        "The local app took the request but did not answer within `first_byte_timeout_seconds`.",
    ),
    "edge.certificate_unavailable": Advice(
        "the owner of this domain wants it served with a valid certificate alone, and it has none now.",
        "Try again later, or tell the owner.",
        "`portico domains ls` says what keeps its certificate from being renewed; the policy `standard` serves without one.",
    ),
    "edge.domain_blocked": Advice(
        "the operator of this platform has blocked this domain.",
        "There is nothing that you can do here. If you know the owner, tell them.",
        "The log of your organization says why (`domain.block`). Only the operator ends the block: ask them.",
    ),
    "edge.domain_frozen": Advice(
        "its owner’s plan has no room for this domain, so it is not served at the moment.",
        "Try again later, or tell the owner.",
        "`portico domains ls` shows which domains are frozen. With a larger plan, or a domain less, it is served again at once.",
    ),
    "edge.account_suspended": Advice(
        "the account behind this address is suspended.",
        "Tell the owner, if you know them.",
        "The console says why the account is suspended, and how to appeal.",
    ),
    "edge.internal": Advice(
        "the relay met a fault of its own.",
        "Try again in a moment.",
        "Give the request id below to the operator of this relay; the reason is in its log.",
    ),
}

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f5f2;--card:#fff;--ink:#1c1b19;--soft:#6b6862;--line:#dedbd4;--ok:#2f7d5b;
--bad:#c2402a;--badbg:#fdf0ed;--code:#f1efea}
@media (prefers-color-scheme:dark){:root{--bg:#151618;--card:#1d1f22;--ink:#ecebe8;--soft:#a19e98;--line:#34373c;
--ok:#5cc296;--bad:#ff8a70;--badbg:#33211e;--code:#282b2f}}
*{box-sizing:border-box}
body{margin:0;min-height:100vh;display:flex;align-items:center;justify-content:center;padding:24px 16px;
background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{width:100%;max-width:680px;background:var(--card);border:1px solid var(--line);border-radius:16px;
padding:36px 40px 28px}
h1{font-size:27px;line-height:1.2;margin:6px 0 12px;letter-spacing:-.01em}
h2{font-size:14px;margin:0 0 4px}
p{margin:0 0 10px}
.status{margin:0;color:var(--bad);font-weight:600;font-size:15px;font-variant-numeric:tabular-nums}
.host{overflow-wrap:anywhere;font-weight:600}
.soft{color:var(--soft)}
.chain{list-style:none;display:flex;margin:28px 0 30px;padding:0}
.chain li{flex:1;position:relative;text-align:center;font-size:14px;font-weight:600;min-width:0}
.chain small{display:block;font-weight:400;font-size:12.5px;line-height:1.35;color:var(--soft)}
.dot{display:block;position:relative;z-index:1;width:18px;height:18px;margin:0 auto 10px;border-radius:50%;
background:var(--card);border:2px solid var(--line)}
.ok .dot{background:var(--ok);border-color:var(--ok)}
.bad .dot{background:var(--bad);border-color:var(--bad);box-shadow:0 0 0 5px var(--badbg)}
.link{position:absolute;top:8px;left:calc(50% + 14px);right:calc(-50% + 14px);height:2px;background:var(--line)}
.link.ok{background:var(--ok)}
.link.bad{background:repeating-linear-gradient(90deg,var(--bad) 0 6px,transparent 6px 11px)}
.link.bad::after{content:"\\00d7";position:absolute;left:50%;top:50%;width:22px;height:22px;margin:-11px;
border-radius:50%;background:var(--bad);color:var(--card);font:700 16px/21px system-ui,sans-serif}
.do{display:grid;grid-template-columns:1fr 1fr;gap:20px 28px;border-top:1px solid var(--line);padding-top:20px}
.do p{font-size:15px;color:var(--soft);margin:0}
.do section{min-width:0}
.do code{display:inline-block;max-width:100%}
.do pre code{display:inline}
footer{margin-top:24px;padding-top:16px;border-top:1px solid var(--line);font-size:13px;color:var(--soft);
display:flex;flex-wrap:wrap;gap:6px 20px}
code{font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace;background:var(--code);border-radius:5px;
padding:1px 6px;overflow-wrap:anywhere;color:var(--ink)}
pre{margin:10px 0 0;background:var(--code);border-radius:10px;padding:14px 16px;overflow-x:auto}
pre code{padding:0;background:none;font-size:14px}
@media (max-width:540px){main{padding:26px 20px 22px;border-radius:12px}h1{font-size:23px}
.do{grid-template-columns:1fr}
.chain{flex-direction:column;gap:26px;margin:22px 0 24px}
.chain li{display:grid;grid-template-columns:18px 1fr;column-gap:14px;text-align:left;align-items:center}
.dot{margin:0;grid-row:1/3}.chain small{grid-column:2}
.link{left:8px;right:auto;top:calc(50% + 14px);width:2px;height:calc(100% - 2px)}
.link.bad{background:repeating-linear-gradient(180deg,var(--bad) 0 5px,transparent 5px 9px)}
.link.bad::after{text-align:center}}
""".replace("\n", "")

_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest())
_CSP = (
    b"default-src 'none'; style-src 'sha256-%b'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    % _STYLE_HASH
)
_HTML_HEADERS: Headers = [
    (b"Content-Type", b"text/html; charset=utf-8"),
    (b"Content-Security-Policy", _CSP),
    (b"Referrer-Policy", b"no-referrer"),
    (b"X-Robots-Tag", b"noindex"),
]
_JSON_HEADERS: Headers = [(b"Content-Type", b"application/problem+json")]
_EVERY_HEADERS: Headers = [(b"X-Content-Type-Options", b"nosniff"), (b"Cache-Control", b"no-store")]


def refusal(
    code: str,
    *,
    request_id: str,
    html: bool,
    detail: str | None = None,
    host: str | None = None,
    extra: Sequence[tuple[bytes, bytes]] = (),
) -> Reply:
    """Status, headers (``Content-Length`` among them) and body of a refusal with a code of the catalogue.

    ``detail`` is one sentence about this occurrence and ``host`` the name that was asked for; both may come from outside.
    ``extra``: what the status calls for beside the code's own headers, see :func:`challenge`, :func:`location` and
    :func:`retry_after`. For ``HEAD`` the caller leaves the body out and keeps the headers.
    """
    page = _page(code, html)
    fill = _fill_html if html else _fill_json
    body = fill(page, request_id, host, None if detail is None else detail[:MAX_DETAIL_CHARS])
    own = page.headers
    if extra:
        named = {name for name, _ in extra}
        own = [*(field for field in own if field[0] not in named), *extra]
    headers = [
        *own,
        (b"X-Request-Id", _header_value(request_id)),
        (b"Content-Length", str(len(body)).encode()),
    ]
    return page.status, headers, body


def challenge(realm: str) -> tuple[bytes, bytes]:
    """The field that makes a browser ask for a user name and a password (RFC 7617, 2 and 2.1)."""
    text = _header_value(realm).replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    return b"WWW-Authenticate", b'Basic realm="%b", charset="UTF-8"' % text


def location(host: bytes, port: int, target: bytes) -> tuple[bytes, bytes]:
    """Where a request that came by plain HTTP belongs; ``host`` normalised, ``target`` in origin form, as they were parsed."""
    authority = host if port == 443 else b"%b:%d" % (host, port)
    path = _NOT_IN_A_URL.sub(lambda found: b"%%%02X" % found[0][0], target) if target[:1] == b"/" else b"/"
    return b"Location", b"https://" + authority + path


def retry_after(seconds: float) -> tuple[bytes, bytes]:
    """When to try again: whole seconds, at least one."""
    return b"Retry-After", b"%d" % max(1, math.ceil(seconds))


def landing(base_domain: str, *, html: bool) -> Reply:
    """What the base domain itself answers: that this is a relay, and how to get a tunnel. Says nothing of its inside."""
    body = _landing_html(base_domain) if html else _landing_text(base_domain)
    kind: Headers = _HTML_HEADERS if html else [(b"Content-Type", b"text/plain; charset=utf-8")]
    headers = [*kind, *_EVERY_HEADERS, (b"Content-Length", str(len(body)).encode())]
    return 200, headers, body


@functools.lru_cache(maxsize=512)
def prefers_html(accept: bytes) -> bool:
    """Whether an ``Accept`` value (RFC 9110, 12.5.1) names HTML, at least as eagerly as it takes JSON.

    The most specific range decides for each. ``*/*`` names nothing: on its own it is a program's, and gets JSON.
    """
    ranges: dict[str, float] = {}
    for part in accept.decode("latin-1").lower().split(",")[:32]:
        name, *parameters = (piece.strip() for piece in part.split(";"))
        ranges[name] = max(ranges.get(name, 0.0), _quality(parameters))
    some = ranges.get("application/*", ranges.get("*/*", 0.0))
    json_taken = max(ranges.get(name, some) for name in ("application/problem+json", "application/json"))
    html_taken = max(ranges.get("text/html", ranges.get("text/*", 0.0)), ranges.get("application/xhtml+xml", 0.0))
    return html_taken > 0 and html_taken >= json_taken


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return min(1.0, max(0.0, float(parameter[2:])))
            except ValueError:
                return 0.0
    return 1.0


@dataclass(frozen=True, slots=True)
class _Page:
    """One code, rendered up to the places that differ: ``parts`` stand around what is filled in."""

    status: int
    headers: Headers
    parts: tuple[bytes, ...]
    title: bytes  # JSON, for a problem without detail
    what: str


@functools.cache
def _page(code: str, html: bool) -> _Page:
    spec = catalogue()[code]
    headers = [*(_HTML_HEADERS if html else _JSON_HEADERS), *_EVERY_HEADERS, (b"Portico-Error", code.encode())]
    if spec.status in RETRY_AFTER_SECONDS:
        headers.append((b"Retry-After", str(RETRY_AFTER_SECONDS[spec.status]).encode()))
    words = advice(code)
    parts = _html_parts(spec, words) if html else _json_parts(spec)
    return _Page(spec.status, headers, parts, json.dumps(spec.title).encode(), words.what)


def advice(code: str) -> Advice:
    """The words for a code; the catalogue's where it has none of its own."""
    spec = catalogue()[code]
    return _ADVICE.get(code) or Advice(spec.title + ".", "Try again in a moment.", spec.hint)


def _json_parts(spec: ErrorSpec) -> tuple[bytes, ...]:
    """Around detail and request id, each of which is filled in as JSON."""
    members = {
        "type": f"urn:portico:error:{spec.code}",
        "title": spec.title,
        "status": spec.status,
        "code": spec.code,
        "hint": spec.hint,
        "retryable": spec.retryable,
    }
    if spec.hop is not None:
        members["hop"] = spec.hop
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":"))
    return text[:-1].encode() + b',"detail":', b',"request_id":'


def _fill_json(page: _Page, request_id: str, host: str | None, detail: str | None) -> bytes:
    before, middle = page.parts
    said = json.dumps(detail).encode() if detail else page.title
    tail = b"}\n" if host is None else b',"host":' + json.dumps(host).encode() + b"}\n"
    return b"".join((before, said, middle, json.dumps(request_id).encode(), tail))


def _fill_html(page: _Page, request_id: str, host: str | None, detail: str | None) -> bytes:
    before, middle, after = page.parts
    if host is None:
        about = _escape(page.what[:1].upper() + page.what[1:])
    else:
        about = b'<span class="host">' + _escape(host) + b"</span>: " + _escape(page.what)
    if detail:
        about += b'</p><p class="soft">' + _escape(detail)
    return b"".join((before, about, middle, _escape(request_id), after))


def _escape(text: str) -> bytes:
    return markup.escape("".join(c if c.isprintable() else "�" for c in text)).encode("utf-8", "replace")


def _header_value(text: str) -> bytes:
    return "".join(c for c in text if c.isascii() and c.isprintable()).encode()


_SLOT = "\x00"  # cannot occur in catalogue text; stands where something is filled in


def _html_parts(spec: ErrorSpec, advice: Advice) -> tuple[bytes, ...]:
    """Around the sentence on what happened and the request id."""
    text = (
        f"{_head(f'{spec.status} {spec.title}')}"
        f'<p class="status">{spec.status}</p><h1>{markup.escape(spec.title)}</h1>'
        f"<p>{_SLOT}</p>{_chain(spec)}"
        f'<div class="do"><section><h2>If you are visiting</h2><p>{_words(advice.visitor)}</p></section>'
        f"<section><h2>If this is your tunnel</h2><p>{_words(advice.owner)}</p></section></div>"
        f"<footer><span>Code <code>{spec.code}</code></span><span>Request <code>{_SLOT}</code></span></footer>"
        "</main></body></html>"
    )
    return tuple(part.encode() for part in text.split(_SLOT))


def _words(text: str) -> str:
    """Escaped text, with what stands between backticks as code."""
    return _CODE.sub(r"<code>\1</code>", markup.escape(text))


def _head(title: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{markup.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
    )


def _chain(spec: ErrorSpec) -> str:
    """Visitor → relay → agent → local app: what was reached in green, where it ended in red, the rest open."""
    mark = _MARKS.get(spec.hop or "")
    if mark is None:
        return ""
    said = "it failed here" if spec.status >= 500 else "it ended here"
    items = [_node(index, mark, said) for index in range(len(NODES))]
    return f'<ol class="chain" aria-label="Ended at: {markup.escape(spec.hop or "")}">{"".join(items)}</ol>'


def _node(index: int, mark: int, said: str = "") -> str:
    state = _state(2 * index, mark)
    link = f'<span class="link {_state(2 * index + 1, mark)}"></span>' if index < len(NODES) - 1 else ""
    note = said if state == "bad" else NODE_NOTES[index]
    return f'<li class="{state}">{link}<span class="dot"></span>{NODES[index]}<small>{note}</small></li>'


def _state(position: int, mark: int) -> str:
    return "ok" if position < mark else "bad" if position == mark else "open"


def _landing_html(base_domain: str) -> bytes:
    domain = markup.escape(base_domain)
    chain = "".join(_node(index, _ALL_REACHED) for index in range(len(NODES)))
    return (
        f"{_head('Portico')}<h1>This is a Portico relay</h1>"
        f"<p>It gives an app that runs on somebody’s own machine a public address below <code>{domain}</code>. "
        f'At this address itself there is no app.</p><ol class="chain" aria-label="How it works">{chain}</ol>'
        '<div class="do"><section><h2>If someone gave you an address</h2>'
        f"<p>It has a name in front: <code>NAME.{domain}</code>. Check that yours is complete, or ask whoever gave it to you. "
        "What you find there belongs to the owner of that name.</p></section>"
        "<section><h2>If you want an address</h2>"
        "<p>Sign in once with the server that your operator named, then start a tunnel to the port of your app:</p>"
        "<pre><code>portico login --server URL\nportico http 8000</code></pre></section></div></main></body></html>"
    ).encode()


def _landing_text(base_domain: str) -> bytes:
    return (
        f"This is a Portico relay: it gives local apps a public address below {base_domain}.\n"
        "At this address itself there is no app. To get one:\n\n"
        "  portico login --server URL     (the server that your operator named)\n"
        "  portico http 8000              (prints the address of your tunnel)\n"
    ).encode()
