"""The requests that are sent directly and through tunnels, as bytes. ``%HOST%`` is the tunnel's host with its port."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

#: Wait for an interim answer; wait for a whole answer; look no further afterwards, since the request is not whole.
INTERIM, ANSWER, LEAVE = object(), object(), object()
MIB = 1024 * 1024


@dataclass(frozen=True)
class Case:
    """``script``: bytes to send, seconds to wait, or INTERIM, ANSWER, LEAVE. ``answers``: a method for each final answer.

    ``framing``: whether the answers' framing must be of the same kind, too.
    """

    name: str
    target: str
    script: tuple[object, ...]
    answers: tuple[str, ...] = ("GET",)
    framing: bool = True


def head(line: str, *fields: bytes | str, host: str = "%HOST%") -> bytes:
    """A request head; a field may be text or bytes."""
    if " HTTP/" not in line:
        line += " HTTP/1.1"
    lines = [line.encode("latin-1"), b"Host: " + host.encode()]
    lines += [field if isinstance(field, bytes) else field.encode() for field in fields]
    return b"\r\n".join((*lines, b"", b""))


def sized(line: str, body: bytes, *fields: bytes | str) -> bytes:
    return head(line, *fields, f"Content-Length: {len(body)}") + body


def chunked(line: str, *chunks: bytes, fields: tuple[bytes | str, ...] = (), trailers: bytes = b"") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head(line, *fields, "Transfer-Encoding: chunked") + body + b"0\r\n" + trailers + b"\r\n"


def bin_case(name: str, *script: object, answers: tuple[str, ...] = ("GET",), framing: bool = True) -> Case:
    return Case(name, "httpbin", script, answers, framing)


def echo_case(name: str, *script: object, answers: tuple[str, ...] = ("GET",), framing: bool = True) -> Case:
    return Case(name, "echo", script, answers, framing)


FORM = b"name=caf%C3%A9&empty=&name=twice"
PATTERN = bytes(range(256)) * 4096
ODD_METHODS = (
    *("PROPFIND", "PROPPATCH", "MKCOL", "COPY", "MOVE", "LOCK", "UNLOCK", "SEARCH", "REPORT", "MERGE", "PURGE"),
    *("M-SEARCH", "NOTIFY", "SUBSCRIBE", "LINK", "UNLINK", "TRACE"),
)

HTTPBIN = [
    # ── methods ──
    bin_case("GET with a query", head("GET /get?a=1&a=2&b=%20c+d&e")),
    bin_case("HEAD", head("HEAD /html"), answers=("HEAD",)),
    bin_case("HEAD of a stream", head("HEAD /stream/3"), answers=("HEAD",)),
    bin_case("HEAD then GET on one connection", head("HEAD /html"), ANSWER, head("GET /html"), answers=("HEAD", "GET")),
    bin_case("POST a form", sized("POST /post", FORM, "Content-Type: application/x-www-form-urlencoded")),
    bin_case("POST of nothing", head("POST /post", "Content-Length: 0")),
    bin_case("POST JSON", sized("POST /anything", b'{"a": [1, 2]}', "Content-Type: application/json")),
    bin_case("PUT bytes", sized("PUT /put", bytes(range(256)), "Content-Type: application/octet-stream")),
    bin_case("PATCH", sized("PATCH /patch", b"[]", "Content-Type: application/json-patch+json")),
    bin_case("DELETE", head("DELETE /delete?x=y")),
    bin_case("DELETE with a body", sized("DELETE /delete", b"why not")),
    bin_case("GET with a body", sized("GET /anything", b"odd, but legal")),
    bin_case(
        "OPTIONS of another origin",
        head("OPTIONS /anything", "Origin: https://a.example", "Access-Control-Request-Headers: x-a, x-b"),
    ),
    bin_case("OPTIONS *", head("OPTIONS *")),
    bin_case("a method that is not allowed", head("POST /get", "Content-Length: 0")),
    # ── encodings ──
    bin_case("gzip", head("GET /gzip", "Accept-Encoding: gzip")),
    bin_case("deflate", head("GET /deflate", "Accept-Encoding: deflate, gzip;q=0.5")),
    bin_case("brotli, which it has not", head("GET /brotli", "Accept-Encoding: br")),
    bin_case("a compressed request", sized("POST /anything", zlib.compress(FORM), "Content-Encoding: deflate")),
    bin_case("UTF-8", head("GET /encoding/utf8")),
    bin_case("an image", head("GET /image", "Accept: image/webp,image/png;q=0.5,*/*;q=0.1")),
    bin_case("no acceptable image", head("GET /image", "Accept: application/nothing")),
    # ── ranges, caches ──
    bin_case("a range", head("GET /range/2048", "Range: bytes=10-99")),
    bin_case("the end of a range", head("GET /range/2048", "Range: bytes=-100")),
    bin_case("many ranges", head("GET /range/2048", "Range: bytes=0-9,20-29")),
    bin_case("a range that cannot be", head("GET /range/2048", "Range: bytes=5000-6000")),
    bin_case("a range that is none", head("GET /range/2048", "Range: bytes=9-3")),
    bin_case("a range with If-Range", head("GET /range/2048", "Range: bytes=0-1", 'If-Range: "other"')),
    bin_case("304 by ETag", head("GET /etag/abc", 'If-None-Match: "abc"')),
    bin_case("412 by ETag", head("GET /etag/abc", 'If-Match: "other"')),
    bin_case("304 by date", head("GET /cache", "If-Modified-Since: Thu, 01 Jan 2026 00:00:00 GMT")),
    bin_case("Cache-Control", head("GET /cache/60")),
    # ── redirects, cookies, credentials ──
    bin_case("a relative redirect", head("GET /relative-redirect/2")),
    bin_case("an absolute redirect", head("GET /absolute-redirect/2", "X-Forwarded-Proto: %SCHEME%")),
    bin_case("a redirect to elsewhere", head("GET /redirect-to?url=https://a.example/%3Fb&status_code=307")),
    bin_case("cookies", head("GET /cookies", "Cookie: a=1; b=2")),
    bin_case("two Cookie fields", head("GET /cookies", "Cookie: a=1", "Accept: */*", "Cookie: b=2")),
    bin_case("a cookie set", head("GET /cookies/set?a=1")),
    bin_case("several Set-Cookie", head("GET /response-headers?Set-Cookie=a%3D1&Set-Cookie=b%3D2&Set-Cookie=c%3D3")),
    bin_case("a cookie that ends", head("GET /cookies/delete?a", "Cookie: a=1; b=2")),
    bin_case("401", head("GET /basic-auth/user/secret")),
    bin_case("credentials of the target", head("GET /basic-auth/user/secret", "Authorization: Basic dXNlcjpzZWNyZXQ=")),
    bin_case("a bearer token", head("GET /bearer", "Authorization: Bearer abc.def")),
    # ── statuses ──
    *(
        bin_case(f"status {status}", head(f"GET /status/{status}"))
        for status in (201, 204, 205, 300, 304, 402, 418, 451, 500, 503, 599)
    ),
    bin_case("repeated fields of the answer", head("GET /response-headers?X-A=1&x-b=2&X-A=3&Set-Cookie=c%3D1")),
    # ── streams ──
    bin_case("lines", head("GET /stream/5")),
    bin_case("chunks", head("GET /stream-bytes/5000?seed=1&chunk_size=100")),
    bin_case("drip", head("GET /drip?duration=0.2s&numbytes=5&delay=0.1s")),
    bin_case("drip with a status", head("GET /drip?duration=0.1s&numbytes=3&code=500&delay=0s")),
    bin_case("a delay", head("GET /delay/0.1")),
    bin_case("trailers of the answer", head("GET /trailers?X-Sum=42&X-Last=b", "TE: trailers")),
    bin_case("a large answer", head("GET /range/4000000")),
    bin_case("links", head("GET /links/20/3")),
    # ── uploads ──
    bin_case("a chunked upload", chunked("POST /anything", b"one", b"two" * 1000, b"3")),
    bin_case(
        "a chunked upload with extensions",
        head("POST /anything", "Transfer-Encoding: chunked"),
        b'3;a=b;c="d"\r\nabc\r\n0\r\n\r\n',
    ),
    bin_case("a large upload", sized("POST /anything", PATTERN * 2)),
    bin_case("a large chunked upload", chunked("PUT /put", *[PATTERN[:65_000]] * 40)),
    bin_case("a body in pieces", head("POST /post", "Content-Length: 6"), 0.05, b"abc", 0.05, b"def"),
    bin_case("100-continue", head("POST /post", "Expect: 100-continue", "Content-Length: 4"), INTERIM, b"body"),
    bin_case(
        "100-continue, chunked",
        head("PUT /put", "Expect: 100-continue", "Transfer-Encoding: chunked"),
        INTERIM,
        b"4\r\nbody\r\n0\r\n\r\n",
    ),
    bin_case(
        "a multipart form",
        sized(
            "POST /post",
            b'--x\r\nContent-Disposition: form-data; name="f"; filename="a.txt"\r\n\r\nfile\r\n--x--\r\n',
            "Content-Type: multipart/form-data; boundary=x",
        ),
    ),
    # ── targets ──
    bin_case("absolute-form", head("GET http://%HOST%/get?x=1")),
    bin_case("two slashes", head("GET //get")),
    bin_case("dots", head("GET /a/../get?b=/../c")),
    bin_case("encoded dots and slashes", head("GET /anything/%2e%2e/%2Fa%2fb/%25")),
    bin_case("an escaped NUL", head("GET /anything/a%00b%0d%0aX:%201")),
    bin_case("a query of odd characters", head("GET /anything?a=<>\"{}|^`[]'();,@!$*~&&=&;b")),
    bin_case("a path of odd characters", head("GET /anything/~:@!$&'()*+,;=a|b")),
    # ── connections ──
    bin_case("Connection: close", head("GET /get", "Connection: close")),
    bin_case("HTTP/1.0", head("GET /get HTTP/1.0"), framing=False),
    bin_case(
        "HTTP/1.0 and keep-alive",
        head("GET /get HTTP/1.0", "Connection: keep-alive"),
        ANSWER,
        head("GET /html HTTP/1.0"),
        answers=("GET", "GET"),
        framing=False,
    ),
    bin_case("HTTP/1.0 and a stream", head("GET /stream/3 HTTP/1.0", "Connection: keep-alive"), framing=False),
    bin_case("HTTP/1.0 and POST", sized("POST /post HTTP/1.0", FORM), framing=False),
    bin_case("pipelined", *[head(f"GET /anything/{n}") for n in range(5)], answers=("GET",) * 5),
    bin_case(
        "pipelined with bodies",
        sized("POST /anything/1", b"one")
        + chunked("PUT /anything/2", b"two")
        + head("HEAD /html")
        + head("GET /status/204")
        + head("GET /anything/5"),
        answers=("POST", "PUT", "HEAD", "GET", "GET"),
    ),
    bin_case(
        "a head in pieces", b"GET /get HT", 0.03, b"TP/1.1\r\nHos", 0.03, b"t: %HOST%\r\nX-A: 1\r", 0.03, b"\n\r\n"
    ),
    bin_case(
        "the same twice",
        head("GET /get", "X-Same: 1"),
        ANSWER,
        head("GET /get", "X-Same: 1"),
        ANSWER,
        head("GET /get", "X-Same: 1"),
        ANSWER,
        head("GET /anything", "X-Same: 1"),
        answers=("GET",) * 4,
    ),
]

ECHO = [
    *(echo_case(method, head(f"{method} /method", "X-A: 1"), answers=(method,)) for method in ODD_METHODS),
    echo_case(
        "spelling, order and repetition",
        head(
            "GET /", "x-lower: 1", "X-UPPER: 2", "x-Mixed-CASE: 3", "X-UPPER: 4", "Accept: a", "x-upper: 5", "ACCEPT: b"
        ),
    ),
    echo_case("empty values", head("GET /", "X-A:", "X-B: ", "Accept:", "X-C:\t")),
    echo_case(
        "white space around values", head("GET /", "X-A:  two", "X-B:\ttab", "X-C: in  side\tit", "X-D: end \t ")
    ),
    echo_case("no space behind the colon", head("GET /", "X-A:1", "Accept:*/*")),
    echo_case("octets above ASCII", head("GET /", b"X-A: caf\xc3\xa9", b"X-B: \xe9\xff\x80")),
    echo_case("odd characters in a name", head("GET /", "x!#$%&'*+-.^_`|~9: 1", "_: 2", "1: 3")),
    echo_case("odd characters in a value", head("GET /", 'X-A: "quoted \\" , ; =" (comment) <>[]{}@\\')),
    echo_case("a long value", head("GET /", "X-Long: " + "v" * 40_000, "X-After: 1")),
    echo_case("a long name", head("GET /", "X" * 256 + ": 1")),
    echo_case("many fields", head("GET /", *(f"X-{n % 7}: {n}" for n in range(180)))),
    echo_case("a long target", head("GET /" + "a/" * 8000 + "?" + "b=c&" * 2000)),
    echo_case("many cookies", head("GET /", *(f"Cookie: c{n}={n}" for n in range(40)))),
    echo_case("Host with a port and capitals", head("GET /", host="ECHO.localhost:8443")),
    echo_case("Host not first", b"GET / HTTP/1.1\r\nX-A: 1\r\nhOST: %HOST%\r\nX-B: 2\r\n\r\n"),
    echo_case("absolute-form", head("GET http://%HOST%/a?b")),
    echo_case("absolute-form of https", head("GET https://%HOST%")),
    echo_case("encoded path", head("GET //a//b/./..//%2e%2E/%00%0D%0A%zz%?%&?#".removesuffix("#"))),
    echo_case(
        "fields of a connection",
        head(
            "GET /",
            "Connection: X-Hop, keep-alive, x-other",
            "X-Hop: 1",
            "X-Stay: 2",
            "X-OTHER: 3",
            "Keep-Alive: timeout=5",
            "Proxy-Connection: keep-alive",
            "TE: trailers, deflate",
        ),
    ),
    echo_case("Connection may not name these", head("GET /", "Connection: Cookie, Host", "Cookie: a=1")),
    echo_case(
        "a visitor's own forwarding fields",
        head(
            "GET /",
            "X-Forwarded-For: 6.6.6.6",
            "Forwarded: for=6.6.6.6",
            "X-Forwarded-Host: a",
            "X-Request-Id: mine",
            "Via: 1.1 a",
        ),
    ),
    echo_case("credentials of a proxy", head("GET /", "Proxy-Authorization: Basic YTpi", "Authorization: Basic YTpi")),
    echo_case("an upgrade that nobody answers", head("GET /", "Connection: Upgrade", "Upgrade: x-nothing/1", "X-A: 1")),
    echo_case(
        "h2c is not asked for",
        head(
            "GET /", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"
        ),
    ),
    echo_case("GET of length 0", head("GET /", "Content-Length: 0")),
    echo_case("POST without a length", head("POST /", "X-A: 1"), answers=("POST",)),
    echo_case("a body of a MiB", sized("POST /", PATTERN), answers=("POST",)),
    echo_case(
        "trailers of the request",
        chunked("POST /", b"abc", trailers=b"X-Sum: 1\r\nx-sum: 2\r\nX-Empty:\r\n", fields=("Trailer: X-Sum",)),
        answers=("POST",),
    ),
    echo_case(
        "trailers that may not be",
        chunked(
            "POST /",
            b"abc",
            trailers=b"X-Sum: 1\r\nHost: evil\r\nAuthorization: x\r\nX-Forwarded-For: 6.6.6.6\r\nExpect: 100-continue\r\n",
        ),
        answers=("POST",),
    ),
    echo_case("an empty chunked body", chunked("POST /"), answers=("POST",)),
    echo_case("early hints", head("GET /hints")),
    echo_case(
        "early hints and 100",
        head("PUT /expect", "Expect: 100-continue", "Content-Length: 2"),
        INTERIM,
        b"ok",
        answers=("PUT",),
    ),
    echo_case("417", head("PUT /", "Expect: 100-continue", "Content-Length: 2"), LEAVE, answers=("PUT",)),
    echo_case("a target of HTTP/1.0", head("GET /old"), framing=False),
    echo_case("HTTP/1.0", head("GET / HTTP/1.0", "X-A: 1"), framing=False),
    echo_case(
        "HTTP/1.0 and keep-alive",
        head("GET / HTTP/1.0", "Connection: keep-alive"),
        ANSWER,
        sized("POST / HTTP/1.0", b"abc", "connection: keep-alive"),
        answers=("GET", "POST"),
        framing=False,
    ),
    echo_case(
        "pipelined",
        sized("POST /1", b"one") + head("GET /2") + chunked("PUT /3", b"three"),
        answers=("POST", "GET", "PUT"),
    ),
    echo_case("the same again and again", *[head("GET /a", "Accept: */*"), ANSWER] * 4, answers=("GET",) * 4),
    echo_case(
        "the same on other paths",
        *[part for n in range(5) for part in (head(f"GET /a/{n}?{n}", "Accept: */*"), ANSWER)],
        answers=("GET",) * 5,
    ),
]


def raw_answer(name: str, answer: bytes, method: str = "GET", framing: bool = True) -> Case:
    """The target answers with exactly these bytes and closes."""
    return Case(name, "echo", (head(f"{method} /raw/{answer.hex()}"),), (method,), framing)


RAW = [
    raw_answer(
        "spelling, order and repetition of an answer",
        b"HTTP/1.1 200 OK\r\nx-lower: 1\r\nX-UPPER: 2\r\nSet-Cookie: a=1\r\nx-lower: 3\r\n"
        b"Content-Length: 2\r\nset-cookie: b=2\r\n\r\nok",
    ),
    raw_answer("no reason", b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok"),
    raw_answer("a reason of octets", b"HTTP/1.1 299 caf\xe9 au lait\r\nContent-Length: 0\r\n\r\n"),
    raw_answer("until the end", b"HTTP/1.1 200 OK\r\nX-A: 1\r\n\r\n" + b"until the end" * 1000, framing=False),
    raw_answer("an empty body until the end", b"HTTP/1.1 200 OK\r\n\r\n", framing=False),
    raw_answer(
        "chunks with extensions", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\n\r\n"
    ),
    raw_answer(
        "trailers",
        b"HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nx-sum: 2\r\n\r\n",
    ),
    raw_answer(
        "two interim answers",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        b"HTTP/1.1 103 Early\r\nlink: </b>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
    ),
    raw_answer("304 with a length", b'HTTP/1.1 304 Not Modified\r\nETag: "a"\r\nContent-Length: 1234\r\n\r\n'),
    raw_answer("HEAD with a length", b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n", "HEAD"),
    raw_answer("HEAD with a coding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HEAD"),
    raw_answer("205 with a length of 0", b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n"),
    raw_answer("a long field", b"HTTP/1.1 200 OK\r\nX-Long: " + b"v" * 12_000 + b"\r\nContent-Length: 0\r\n\r\n"),
    raw_answer(
        "many fields",
        b"HTTP/1.1 200 OK\r\n"
        + b"".join(b"X-%d: %d\r\n" % (n % 5, n) for n in range(200))
        + b"Content-Length: 0\r\n\r\n",
    ),
    raw_answer(
        "empty values and octets",
        b"HTTP/1.1 200 OK\r\nX-A:\r\nX-B: \r\nX-C: \xff\xe9\r\nX-D:no space\r\nContent-Length: 0\r\n\r\n",
    ),
    raw_answer(
        "fields of a connection",
        b"HTTP/1.1 200 OK\r\nConnection: X-Hop, close\r\nX-Hop: 1\r\nKeep-Alive: timeout=1\r\nX-Stay: 2\r\n"
        b"Content-Length: 0\r\n\r\n",
    ),
]

ALL = [*HTTPBIN, *ECHO, *RAW]

#: Requests that a target may take, and Portico refuses: name → request.
REFUSED = {
    "octets above ASCII in the path": head("GET /caf\xe9"),
    "octets above ASCII in the query": head("GET /?q=caf\xc3\xa9"),
    "a method that is not registered": head("BREW /"),
    "a method in lower case": head("get /"),
    "a coding in HTTP/1.0": chunked("POST / HTTP/1.0", b"abc"),
    "a coding beside chunked": head("POST /", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "the same length twice": head("POST /", "Content-Length: 2", "Content-Length: 2") + b"ok",
    "a line that is folded": head("GET /", "X-A: 1\r\n 2"),
    "a length in the trailers": chunked("POST /", b"abc", trailers=b"Content-Length: 5\r\n"),
    "a coding in the trailers": chunked("POST /", b"abc", trailers=b"Transfer-Encoding: chunked\r\n"),
    "CONNECT": head("CONNECT %HOST%"),
}
