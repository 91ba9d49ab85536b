"""The local app of `portico demo`: a page and a JSON endpoint that show what arrived through the tunnel."""

from __future__ import annotations

import asyncio
import html
import json
import time
from urllib.parse import parse_qs, urlsplit

HEAD_MAX_BYTES = 64 * 1024
IDLE_SECONDS = 75.0

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Hello through Portico</title>
<style>
  :root {{ color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #e4e7ec; --card: #fff; --ground: #f5f6f8;
    --accent: #3b5bdb; }}
  @media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6e9ef; --soft: #98a2b3; --line: #2b3442; --card: #171d27;
    --ground: #0f141b; --accent: #8ea6ff; }} }}
  body {{ margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }}
  main {{ max-width: 44rem; margin: 8vh auto; padding: 0 1.25rem; }}
  h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }}
  p {{ color: var(--soft); margin: 0 0 1.6rem; }}
  .way {{ display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: 0 0 1.6rem; font-size: .92rem; }}
  .way span {{ border: 1px solid var(--line); background: var(--card); border-radius: 999px; padding: .25rem .8rem; }}
  .way span:last-child {{ border-color: var(--accent); color: var(--accent); }}
  .way i {{ color: var(--soft); font-style: normal; }}
  section {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow-x: auto; }}
  h2 {{ font-size: .8rem; text-transform: uppercase; letter-spacing: .06em; color: var(--soft); margin: 0; padding: .9rem 1.1rem;
    border-bottom: 1px solid var(--line); }}
  table {{ border-collapse: collapse; width: 100%; font: .86rem/1.5 ui-monospace, monospace; }}
  td {{ padding: .35rem 1.1rem; vertical-align: top; overflow-wrap: anywhere; }}
  td:first-child {{ color: var(--soft); white-space: nowrap; width: 1%; }}
  footer {{ margin-top: 1.4rem; font-size: .9rem; color: var(--soft); }}
  a {{ color: var(--accent); }} code {{ font-family: ui-monospace, monospace; }}
</style></head><body><main>
<h1>It works: this page came through the tunnel.</h1>
<p>Your browser asked a public address. The answer was made by a small app that listens on this machine alone.</p>
<div class="way"><span>your browser</span><i>→</i><span>relay</span><i>→</i><span>agent</span><i>→</i>
<span>this app, port {port}</span></div>
<section><h2>What the app received</h2><table>{rows}</table></section>
<footer>The same as JSON: <a href="/api/hello">/api/hello</a>. Now put your own app here: <code>portico http 8000</code></footer>
</main></body></html>
"""


class SampleApp:
    """A tiny HTTP/1.1 server on 127.0.0.1 (a free port); ``requests`` counts what it answered."""

    def __init__(self) -> None:
        self.port = 0
        self.requests = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=HEAD_MAX_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                async with asyncio.timeout(IDLE_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                method, target, headers = _parse(head)
                await reader.readexactly(int(headers.get("content-length", "0")))
                status, kind, body = self._answer(method, target, headers)
                writer.write(_head(status, kind, len(body)) + (b"" if method == "HEAD" else body))
                await writer.drain()
                if headers.get("connection", "").lower() == "close":
                    break
        except (OSError, EOFError, TimeoutError, ValueError, asyncio.LimitOverrunError):
            pass  # gone, idle, or not HTTP: it is a sample
        finally:
            writer.close()

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> tuple[str, str, bytes]:
        self.requests += 1
        url = urlsplit(target)
        if url.path == "/api/hello":
            said = {
                "message": "Hello through the tunnel",
                "nonce": parse_qs(url.query).get("nonce", [""])[0],
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request": {"method": method, "target": target, "headers": headers},
            }
            return "200 OK", "application/json", json.dumps(said, indent=2).encode() + b"\n"
        if url.path == "/":
            seen = [("request", f"{method} {target}"), *sorted(headers.items())]
            rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in seen)
            return "200 OK", "text/html; charset=utf-8", _PAGE.format(port=self.port, rows=rows).encode()
        return "404 Not Found", "text/plain; charset=utf-8", b"The sample app has / and /api/hello.\n"


def _parse(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.split(":", 1) for line in lines if line)
    return method, target, {name.strip().lower(): value.strip() for name, value in pairs}


def _head(status: str, kind: str, length: int) -> bytes:
    lines = (
        f"HTTP/1.1 {status}",
        f"Content-Type: {kind}",
        f"Content-Length: {length}",
        "Cache-Control: no-store",
        "",
        "",
    )
    return "\r\n".join(lines).encode()
