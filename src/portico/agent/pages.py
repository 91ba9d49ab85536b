"""The local page as HTML: complete without JavaScript (a list, and a page for each request), a live view with it."""

from __future__ import annotations

import html
import json
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from portico.kit.har import MASK, SECRET_FIELDS

_STATIC = Path(__file__).parent / "static"
_SHARED = Path(__file__).parent.parent / "kit" / "static"
_FILES = {
    "tokens.css": (_SHARED / "tokens.css", "text/css; charset=utf-8"),
    "inspector.css": (_STATIC / "inspector.css", "text/css; charset=utf-8"),
    "icon.svg": (_SHARED / "icon.svg", "image/svg+xml"),
    "inspector.js": (_STATIC / "inspector.js", "text/javascript; charset=utf-8"),
}
#: Text of a body that the plain page shows; the live page and the body's own address have all that is kept.
_PLAIN_TEXT = 20_000


@cache
def _frame() -> Template:
    return Template((_STATIC / "inspector.html").read_text(encoding="utf-8"))


@cache
def static(name: str) -> tuple[str, bytes] | None:
    """Type and bytes of a file of the page."""
    found = _FILES.get(name)
    return None if found is None else (found[1], found[0].read_bytes())


def _e(value: Any) -> str:
    return html.escape(str(value))


def index(status: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The page with the newest requests in it."""
    tunnels = "".join(
        f'<li>{_link(t["public_url"]) or _e(t["name"])} <span class="to">→ {_e(t["config"]["addr"])}</span></li>'
        for t in status["tunnels"]
    )
    url = next((t["public_url"] for t in status["tunnels"] if t["public_url"].startswith("http")), "URL")
    return _frame().substitute(
        _common(status) | {"tunnels": tunnels, "rows": "".join(map(_row, rows)), "main": "", "layout": ""},
        empty="hidden" if rows else "",
        **{"try": f"curl {_e(url)}/"},
    )


def _link(url: str) -> str:
    """A link to a public address; one of TCP is no link."""
    if not url.startswith(("http://", "https://")):
        return _e(url)
    return f'<a href="{_e(url)}" target="_blank" rel="noreferrer">{_e(url)}</a>'


def _common(status: dict[str, Any]) -> dict[str, str]:
    return {"state": _e(status["status"])}


def _row(row: dict[str, Any]) -> str:
    tone = f"s{row['status'] // 100}" if row["status"] else "s0"
    took = "running" if row["state"] == "running" else f"{row['duration_ms']:.1f} ms"
    return (
        f'<tr data-id="{_e(row["id"])}"><td><span class="code {tone}">{row["status"] or "…"}</span></td>'
        f'<td class="method">{_e(row["method"])}</td>'
        f'<td class="path"><a href="/requests/{_e(row["id"])}">{_e(row["path"])}</a></td>'
        f'<td class="n took">{took}</td><td class="n at">{_e(row["started_at"][11:19])}</td></tr>'
    )


def plain(status: dict[str, Any], document: dict[str, Any]) -> str:
    """One request as a page of its own."""
    request, response = document["request"], document["response"]
    parts = [
        f"<h1>{_e(document['method'])} {_e(document['path'])}</h1>",
        f"<p>{document['status'] or document['state']} · {document['duration_ms']:.1f} ms · {_e(document['started_at'])}",
        f" · {_e(document['tunnel'])} → {_e(document['target'])}</p>",
        f'<p class="notice bad">{_e(document["failure"])}</p>' if "failure" in document else "",
        _message("Request", request, document["id"], "request"),
        _message("Response", response, document["id"], "response") if response is not None else "",
        '<p><a href="/">All requests</a></p>',
    ]
    main = f"<article>{''.join(parts)}</article>"
    return _frame().substitute(
        _common(status) | {"tunnels": "", "rows": "", "main": main, "layout": "plainpage"},
        empty="hidden",
        **{"try": ""},
    )


def _message(title: str, message: dict[str, Any], ident: str, side: str) -> str:
    rows = "".join(
        f"<tr><th>{_e(name)}</th><td>{_e(MASK if name.lower() in SECRET_FIELDS else value)}</td></tr>"
        for name, value in message["headers"]
    )
    body = message["body"]
    shown = ""
    if body["kept"]:
        words = _pretty(body)[:_PLAIN_TEXT] if "text" in body else f"{body['bytes']} bytes that are no text"
        link = f'<a href="/api/requests/{_e(ident)}/body/{side}">{body["kept"]} of {body["bytes"]} bytes</a>'
        shown = f"<pre>{_e(words)}</pre><p>{link}</p>"
    return f'<h2>{title}</h2><table class="fields">{rows}</table>{shown}'


def _pretty(body: dict[str, Any]) -> str:
    words: str = body["text"]
    if body["kind"] == "json" and not body["truncated"]:
        try:
            return json.dumps(json.loads(words), indent=2, ensure_ascii=False)
        except (ValueError, RecursionError):
            return words
    return words
