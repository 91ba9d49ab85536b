"""Requests and answers that two readers could take in two ways, as bytes.

In requests ``%HOST%`` is the tunnel's host, ``%N%`` the number of the try. Behind each comes a victim's request on the same
connection. What is in ``smuggled`` must never reach a target as a request, nor a visitor as an answer.
"""

from __future__ import annotations

H = b"Host: %HOST%\r\n"
INNER = b"GET /smuggled-%N% HTTP/1.1\r\nHost: %HOST%\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def post(fields: bytes, body: bytes = b"0\r\n\r\n" + INNER, method: bytes = b"POST") -> bytes:
    return b"%b /try-%%N%% HTTP/1.1\r\n" % method + H + fields + b"\r\n" + body


def sized(fields: bytes, body: bytes = INNER, method: bytes = b"GET") -> bytes:
    """A body of its honest length, which is a request by its looks; ``%L%`` is that length."""
    return post(b"Content-Length: %L%\r\n" + fields, body, method)


def chunks(body: bytes) -> bytes:
    return post(CHUNKED, body)


def line(text: bytes) -> bytes:
    return text + b"\r\n" + H + b"\r\n"


CODINGS = {
    "x": b"Transfer-Encoding: xchunked",
    "space before the colon": b"Transfer-Encoding : chunked",
    "tab before the colon": b"Transfer-Encoding\t: chunked",
    "vertical tab": b"Transfer-Encoding:\x0bchunked",
    "vertical tab in the name": b"Transfer-Encoding\x0b: chunked",
    "form feed behind": b"Transfer-Encoding: chunked\x0c",
    "NUL behind": b"Transfer-Encoding: chunked\x00",
    "NUL in the name": b"Transfer\x00-Encoding: chunked",
    "no-break space": b"Transfer-Encoding: \xa0chunked",
    "no-break space in the name": b"Transfer-Encoding\xa0: chunked",
    "an octet before the name": b"\xffTransfer-Encoding: chunked",
    "a space before the name": b" Transfer-Encoding: chunked",
    "a fold in the value": b"Transfer-Encoding:\r\n chunked",
    "a fold behind another": b"X-A: 1\r\n Transfer-Encoding: chunked",
    "a bare LF before": b"X-A: 1\nTransfer-Encoding: chunked",
    "a bare CR before": b"X-A: 1\rTransfer-Encoding: chunked",
    "a bare LF in the name": b"Transfer-Encoding\n: chunked",
    "a bare CR in the value": b"Transfer-Encoding: chun\rked",
    "CR CR LF": b"Transfer-Encoding: chunked\r",
    "identity": b"Transfer-Encoding: identity",
    "identity first": b"Transfer-Encoding: identity, chunked",
    "identity last": b"Transfer-Encoding: chunked, identity",
    "twice in a list": b"Transfer-Encoding: chunked, chunked",
    "twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "twice, one unknown": b"Transfer-Encoding: chunked\r\nTransfer-encoding: x",
    "twice, one empty": b"Transfer-Encoding:\r\nTransfer-Encoding: chunked",
    "gzip": b"Transfer-Encoding: gzip, chunked",
    "quoted": b'Transfer-Encoding: "chunked"',
    "single quotes": b"Transfer-Encoding: 'chunked'",
    "a parameter": b"Transfer-Encoding: chunked;q=1",
    "a comma before": b"Transfer-Encoding: ,chunked",
    "a comma behind": b"Transfer-Encoding: chunked,",
    "empty": b"Transfer-Encoding:",
    "brackets in the name": b"Transfer-Encoding[]: chunked",
}
LENGTHS = {
    "two": b"Content-Length: 5\r\nContent-Length: 6",
    "two that are equal": b"Content-Length: 5\r\nContent-Length: 5",
    "two spellings": b"Content-Length: 5\r\ncontent-length: 0",
    "a list": b"Content-Length: 5, 5",
    "a list of two": b"Content-Length: 5,6",
    "a comma behind": b"Content-Length: 5,",
    "plus": b"Content-Length: +5",
    "minus": b"Content-Length: -5",
    "minus nothing": b"Content-Length: -0",
    "hexadecimal": b"Content-Length: 0x5",
    "a letter": b"Content-Length: 5a",
    "a fraction": b"Content-Length: 5.0",
    "an exponent": b"Content-Length: 1e1",
    "an underscore": b"Content-Length: 1_0",
    "two numbers": b"Content-Length: 5 6",
    "digits of another script": b"Content-Length: \xef\xbc\x95",
    "empty": b"Content-Length:",
    "quoted": b'Content-Length: "5"',
    "over 63 bits": b"Content-Length: 9223372036854775813",
    "over 64 bits": b"Content-Length: 18446744073709551621",
    "over 128 bits": b"Content-Length: 340282366920938463463374607431768211461",
    "a fold": b"Content-Length:\r\n 5",
    "vertical tab": b"Content-Length: \x0b5",
    "NUL": b"Content-Length: 5\x00",
    "space before the colon": b"Content-Length : 5",
    "vertical tab in the name": b"Content-Length\x0b: 5",
    "a bare LF before": b"X-A: 1\nContent-Length: 5",
}
CHUNKS = {
    "over 64 bits": b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "over 128 bits": b"1" + b"0" * 32 + b"5\r\nhello\r\n0\r\n\r\n",
    "minus": b"-5\r\nhello\r\n0\r\n\r\n",
    "plus": b"+5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "a space before": b" 5\r\nhello\r\n0\r\n\r\n",
    "an underscore": b"0_5\r\nhello\r\n0\r\n\r\n",
    "a letter that is no digit": b"5g\r\nhello\r\n0\r\n\r\n",
    "empty": b"\r\nhello\r\n0\r\n\r\n",
    "a bare LF": b"5\nhello\r\n0\r\n\r\n",
    "a bare CR": b"5\rXhello\r\n0\r\n\r\n",
    "a bare LF in an extension": b"5;a\nhello\r\n0\r\n\r\n" + INNER,
    "a bare CR in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "NUL in an extension": b"5;a\x00\r\nhello\r\n0\r\n\r\n",
    "no CR behind the data": b"5\r\nhello\n0\r\n\r\n",
    "no LF behind the data": b"5\r\nhello\r0\r\n\r\n",
    "nothing behind the data": b"5\r\nhello0\r\n\r\n",
    "too much data": b"5\r\nhello there\r\n0\r\n\r\n",
    "two octets in place of CRLF": b"5\r\nhelloXX0\r\n\r\n" + INNER,
    "an LF at the end": b"5\r\nhello\r\n0\n\r\n" + INNER,
    "a bare LF ends it": b"5\r\nhello\r\n0\r\n\n" + INNER,
    "a trailer with a bare LF": b"0\r\nX-A: 1\nX-B: 2\r\n\r\n" + INNER,
    "a trailer with a length": b"0\r\nContent-Length: 44\r\n\r\n" + INNER,
    "a trailer with a coding": b"0\r\nTransfer-Encoding: chunked\r\n\r\n" + INNER,
    "a trailer with a fold": b"0\r\nX-A: 1\r\n 2\r\n\r\n",
    "a trailer without a colon": b"0\r\nGET /smuggled-%N% HTTP/1.1\r\n\r\n",
    "a trailer with a space": b"0\r\nX A: 1\r\n\r\n",
}
FIELDS = {
    "a bare LF": b"X-A: 1\nX-B: 2\r\n",
    "a bare CR": b"X-A: 1\rX-B: 2\r\n",
    "CR CR LF": b"X-A: 1\r\r\n",
    "NUL": b"X-A: a\x00b\r\n",
    "a fold": b"X-A: 1\r\n 2\r\n",
    "a fold of a tab": b"X-A: 1\r\n\t2\r\n",
    "a space before the colon": b"X-A : 1\r\n",
    "a space before the name": b" X-A: 1\r\n",
    "no colon": b"X-A\r\n",
    "no name": b": 1\r\n",
    "a request for a line": b"GET /smuggled-%N% HTTP/1.1\r\n",
    "parentheses in the name": b"X(A): 1\r\n",
    "a slash in the name": b"X/A: 1\r\n",
    "an at sign in the name": b"X@A: 1\r\n",
    "octets in the name": b"X\xc3\xa4: 1\r\n",
    "a control character": b"X-A: a\x01b\r\n",
    "DEL": b"X-A: a\x7fb\r\n",
    "a second host": b"Host: %HOST%\r\n",
    "another second host": b"host: other.localhost\r\n",
    "a host with a space before the colon": b"Host : other.localhost\r\n",
    "a fold behind Host": b" other.localhost\r\n",
}
LINES = {
    "HTTP/0.9": b"GET /smuggled-%N%\r\n",
    "HTTP/0.9 with a version": line(b"GET /try-%N% HTTP/0.9"),
    "HTTP/2.0": line(b"GET /try-%N% HTTP/2.0"),
    "HTTP/1.2": line(b"GET /try-%N% HTTP/1.2"),
    "HTTP/1.10": line(b"GET /try-%N% HTTP/1.10"),
    "HTTP/01.1": line(b"GET /try-%N% HTTP/01.1"),
    "http/1.1": line(b"GET /try-%N% http/1.1"),
    "no version": line(b"GET /try-%N%"),
    "a tab for a space": line(b"GET\t/try-%N% HTTP/1.1"),
    "a space in the target": line(b"GET /try-%N% /smuggled HTTP/1.1"),
    "a tab in the target": line(b"GET /try-%N%\t/smuggled HTTP/1.1"),
    "a space at the end": line(b"GET /try-%N% HTTP/1.1 "),
    "a space before": line(b" GET /try-%N% HTTP/1.1"),
    "a bare LF": b"GET /try-%N% HTTP/1.1\n" + H + b"\r\n",
    "a bare CR": b"GET /try-%N% HTTP/1.1\r" + H + b"\r\n",
    "bare LFs alone": b"GET /try-%N% HTTP/1.1\nHost: %HOST%\n\n",
    "a raw CRLF in the path": line(b"GET /try-%N%\r\nX: HTTP/1.1"),
    "a split path": b"GET /try-%N% HTTP/1.1\r\nHost: %HOST%\r\nX-A: 1\r\n\rGET /smuggled-%N% HTTP/1.1\r\nHost: %HOST%\r\n\r\n",
    "NUL in the path": line(b"GET /try-%N%\x00 HTTP/1.1"),
    "no Host": b"GET /try-%N% HTTP/1.1\r\nX-A: 1\r\n\r\n",
    "an empty Host": b"GET /try-%N% HTTP/1.1\r\nHost:\r\n\r\n",
    "Host with a path": b"GET /try-%N% HTTP/1.1\r\nHost: %HOST%/a\r\n\r\n",
    "Host with a user": b"GET /try-%N% HTTP/1.1\r\nHost: a@%HOST%\r\n\r\n",
    "Host with two names": b"GET /try-%N% HTTP/1.1\r\nHost: %HOST%, other.localhost\r\n\r\n",
    "Host with two ports": b"GET /try-%N% HTTP/1.1\r\nHost: %HOST%:1\r\n\r\n",
    "Host with a tab inside": b"GET /try-%N% HTTP/1.1\r\nHost: %HOST%\tx\r\n\r\n",
    "absolute-form for another host": line(b"GET http://other.localhost/try-%N% HTTP/1.1"),
    "absolute-form with a user": line(b"GET http://a@%HOST%/try-%N% HTTP/1.1"),
    "absolute-form of another scheme": line(b"GET ftp://%HOST%/try-%N% HTTP/1.1"),
    "absolute-form without a host": line(b"GET http:///try-%N% HTTP/1.1"),
    "authority-form": line(b"GET %HOST% HTTP/1.1"),
    "CONNECT": line(b"CONNECT %HOST% HTTP/1.1"),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "a method nobody knows": line(b"SMUG /try-%N% HTTP/1.1"),
    "a method with a NUL": line(b"GET\x00 /try-%N% HTTP/1.1"),
    "a record of TLS": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
}

#: 400 (or 431), and the end of the connection; nothing whole reaches the target.
REFUSED: dict[str, bytes] = {
    "CL.TE": post(b"Content-Length: 6\r\n" + CHUNKED, b"0\r\n\r\n" + INNER),
    "TE.CL": post(CHUNKED + b"Content-Length: 4\r\n", b"2e\r\n" + INNER + b"\r\n0\r\n\r\n"),
    "CL.TE with a length of 0": post(b"Content-Length: 0\r\n" + CHUNKED),
    "CL.TE in GET": post(b"Content-Length: 6\r\n" + CHUNKED, method=b"GET"),
    "TE in HTTP/1.0": post(CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    **{f"coding: {name}": post(text + b"\r\n") for name, text in CODINGS.items()},
    **{f"coding and length: {name}": post(b"Content-Length: 5\r\n" + text + b"\r\n") for name, text in CODINGS.items()},
    **{f"length: {name}": post(text + b"\r\n", b"hello" + INNER) for name, text in LENGTHS.items()},
    **{f"field: {name}": post(text, b"", b"GET") for name, text in FIELDS.items()},
    **{f"line: {name}": text for name, text in LINES.items()},
}
#: The same, but the head is good: the target may have seen the beginning, and sees that it is not whole.
BROKEN: dict[str, bytes] = {f"chunk: {name}": chunks(text) for name, text in CHUNKS.items()}
#: A body that never ends: what is behind belongs to it.
ENDLESS: dict[str, bytes] = {
    "a chunk of the largest size": chunks(b"ffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
    "a length of 18 digits": post(b"Content-Length: 999999999999999999\r\n", INNER),
}

#: One request and no more: name → (bytes, its body as the target must see it).
PASS: dict[str, tuple[bytes, bytes]] = {
    "0.CL": (sized(b""), INNER),
    "0.CL with OPTIONS": (sized(b"", method=b"OPTIONS"), INNER),
    "0.CL with HEAD": (sized(b"", method=b"HEAD"), INNER),
    "0.CL with DELETE": (sized(b"", method=b"DELETE"), INNER),
    "Expect that nobody understands": (sized(b"Expect: 100-Continue, x\r\n"), INNER),
    "Expect in other spellings": (sized(b"eXPECT: 100-CONTINUE\r\n"), INNER),
    "Connection names the length": (sized(b"Connection: content-length\r\n"), INNER),
    "Connection names the host": (sized(b"Connection: host, keep-alive\r\n"), INNER),
    "Connection names the coding": (
        post(b"Connection: transfer-encoding\r\n" + CHUNKED, b"5\r\nhello\r\n0\r\n\r\n"),
        b"hello",
    ),
    "Connection names what is Portico's": (sized(b"Connection: x-forwarded-for, x-request-id, forwarded\r\n"), INNER),
    "Upgrade with a body": (sized(b"Connection: Upgrade\r\nUpgrade: websocket\r\n"), INNER),
    "Upgrade with chunks": (
        post(b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + CHUNKED, b"5\r\nhello\r\n0\r\n\r\n"),
        b"hello",
    ),
    "Upgrade by Proxy-Connection": (post(b"Proxy-Connection: upgrade\r\nUpgrade: websocket\r\n", b"", b"GET"), b""),
    "Upgrade by Proxy-Connection, with a body": (sized(b"Proxy-Connection: upgrade\r\nUpgrade: websocket\r\n"), INNER),
    "Upgrade that nobody names": (sized(b"Upgrade: websocket\r\n"), INNER),
    "h2c": (
        post(
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
            b"",
            b"GET",
        ),
        b"",
    ),
    "h2c with a body": (sized(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"), INNER),
    "a coding in capitals": (post(b"Transfer-Encoding: CHUNKED\r\n", b"5\r\nhello\r\n0\r\n\r\n"), b"hello"),
    "a coding behind a tab": (post(b"Transfer-Encoding:\tchunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"), b"hello"),
    "a coding with an underscore": (post(b"Transfer_Encoding: chunked\r\nContent-Length: 5\r\n", b"hello"), b"hello"),
    "a length with an underscore": (post(b"Content_Length: 0\r\nContent-Length: 5\r\n", b"hello"), b"hello"),
    "a length with zeros before": (post(b"Content-Length: 0005\r\n", b"hello"), b"hello"),
    "chunk sizes with zeros before": (chunks(b"000000005\r\nhello\r\n000\r\n\r\n"), b"hello"),
    "chunk sizes in both cases": (chunks(b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n"), b"0123456789" * 2),
    "extensions": (chunks(b'5;a=b;c="d;e"\r\nhello\r\n0;f\r\n\r\n'), b"hello"),
    "a request in a chunk": (chunks(b"%X%\r\n" + INNER + b"\r\n0\r\n\r\n"), INNER),
    "a request in the trailers": (chunks(b"0\r\nX-A: GET /smuggled-%N% HTTP/1.1\r\n\r\n"), b""),
    "a path of escapes": (line(b"GET /try-%N%%0d%0aHost:%20x%0d%0a%0d%0aGET%20/smuggled%00 HTTP/1.1"), b""),
    "a query with a request": (line(b"GET /try-%N%?HTTP/1.1%0D%0A&a=HTTP/1.1 HTTP/1.1"), b""),
    "absolute-form": (line(b"GET http://%HOST%/try-%N% HTTP/1.1"), b""),
    "two spaces in the line": (line(b"GET  /try-%N% HTTP/1.1"), b""),
    "an X-HTTP-Method-Override": (post(b"X-HTTP-Method-Override: DELETE\r\n", b"", b"GET"), b""),
}

SMUGGLED = b"HTTP/1.1 200 Smuggled\r\nContent-Length: 8\r\n\r\nsmuggled"


def answer(fields: bytes, body: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 " + status + b"\r\n" + fields + b"\r\n" + body


#: Answers of a target: name → (bytes, method of the request that they answer).
ANSWERS: dict[str, tuple[bytes, bytes]] = {
    "length and coding": (answer(b"Content-Length: 5\r\n" + CHUNKED, b"0\r\n\r\n" + SMUGGLED), b"GET"),
    "coding and length": (answer(CHUNKED + b"Content-Length: 5\r\n", b"0\r\n\r\n" + SMUGGLED), b"GET"),
    "two lengths": (answer(b"Content-Length: 0\r\nContent-Length: 69\r\n", SMUGGLED), b"GET"),
    "two equal lengths": (answer(b"Content-Length: 2\r\nContent-Length: 2\r\n", b"ok"), b"GET"),
    "a list of lengths": (answer(b"Content-Length: 0, 69\r\n", SMUGGLED), b"GET"),
    "a negative length": (answer(b"Content-Length: -1\r\n", SMUGGLED), b"GET"),
    "a length over 64 bits": (answer(b"Content-Length: 18446744073709551616\r\n", SMUGGLED), b"GET"),
    "a length of plus": (answer(b"Content-Length: +2\r\n", b"ok"), b"GET"),
    "a coding that is not chunked": (answer(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n" + SMUGGLED), b"GET"),
    "a coding twice": (answer(CHUNKED + CHUNKED, b"0\r\n\r\n" + SMUGGLED), b"GET"),
    "chunked, then identity": (
        answer(b"Transfer-Encoding: chunked, identity\r\n", b"0\r\n\r\n" + SMUGGLED),
        b"GET",
    ),
    "a vertical tab before chunked": (answer(b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n" + SMUGGLED), b"GET"),
    "a space before the colon": (answer(b"Content-Length : 0\r\n", SMUGGLED), b"GET"),
    "more than its length": (answer(b"Content-Length: 0\r\n", SMUGGLED), b"GET"),
    "two answers": (answer(b"Content-Length: 2\r\n", b"ok" + SMUGGLED), b"GET"),
    "less than its length": (answer(b"Content-Length: 50\r\n", b"ok"), b"GET"),
    "another answer behind chunks": (answer(CHUNKED, b"2\r\nok\r\n0\r\n\r\n" + SMUGGLED), b"GET"),
    "chunks that break off": (answer(CHUNKED, b"2\r\nok\r\n"), b"GET"),
    "a chunk size that overflows": (answer(CHUNKED, b"10000000000000002\r\nok\r\n0\r\n\r\n"), b"GET"),
    "a bare LF in an extension": (answer(CHUNKED, b"2;a\nok\r\n0\r\n\r\n" + SMUGGLED), b"GET"),
    "a length in the trailers": (answer(CHUNKED, b"2\r\nok\r\n0\r\nContent-Length: 9\r\n\r\n"), b"GET"),
    "Portico-Error in the trailers": (answer(CHUNKED, b"2\r\nok\r\n0\r\nPortico-Error: edge.x\r\n\r\n"), b"GET"),
    "a coding in 100": (
        answer(CHUNKED, b"", b"100 Continue") + b"0\r\n\r\n" + answer(b"Content-Length: 2\r\n", b"ok"),
        b"GET",
    ),
    "a length in 103": (answer(b"Content-Length: 69\r\n", b"", b"103 Hints") + SMUGGLED, b"GET"),
    "204 with a length": (answer(b"Content-Length: 69\r\n", SMUGGLED, b"204 No Content"), b"GET"),
    "204 with chunks": (answer(CHUNKED, b"5\r\nhello\r\n0\r\n\r\n", b"204 No Content"), b"GET"),
    "304 with a body": (answer(b"Content-Length: 69\r\n", SMUGGLED, b"304 Not Modified"), b"GET"),
    "HEAD with a body": (answer(b"Content-Length: 69\r\n", SMUGGLED), b"HEAD"),
    "HEAD with chunks": (answer(CHUNKED, b"5\r\nhello\r\n0\r\n\r\n"), b"HEAD"),
    "101 that nobody asked for": (
        answer(b"Connection: Upgrade\r\nUpgrade: websocket\r\n", SMUGGLED, b"101 Switching"),
        b"GET",
    ),
    "101 without Upgrade": (answer(b"", SMUGGLED, b"101 Switching"), b"GET"),
    "a bare LF in a value": (answer(b"X-A: 1\nSet-Cookie: a=b\r\nContent-Length: 2\r\n", b"ok"), b"GET"),
    "a bare CR in a value": (answer(b"X-A: 1\rSet-Cookie: a=b\r\nContent-Length: 2\r\n", b"ok"), b"GET"),
    "NUL in a value": (answer(b"X-A: 1\x00\r\nContent-Length: 2\r\n", b"ok"), b"GET"),
    "a fold": (answer(b"X-A: 1\r\n Content-Length: 0\r\nContent-Length: 2\r\n", b"ok"), b"GET"),
    "a CR in the reason": (answer(b"Content-Length: 2\r\n", b"ok", b"200 O\rK"), b"GET"),
    "an LF in the reason": (answer(b"Content-Length: 2\r\n", b"ok", b"200 O\nX-A: 1"), b"GET"),
    "a control character in the reason": (answer(b"Content-Length: 2\r\n", b"ok", b"200 O\x01K"), b"GET"),
    "a status of two digits": (answer(b"Content-Length: 2\r\n", b"ok", b"20 OK"), b"GET"),
    "a status of four digits": (answer(b"Content-Length: 2\r\n", b"ok", b"2000 OK"), b"GET"),
    "status 099": (answer(b"Content-Length: 2\r\n", b"ok", b"099 OK"), b"GET"),
    "status 999": (answer(b"Content-Length: 2\r\n", b"ok", b"999 OK"), b"GET"),
    "HTTP/2.0": (b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"GET"),
    "HTTP/0.9": (b"<html>smuggled</html>", b"GET"),
    "HTTP/1.0 with a coding": (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"GET"),
    "a head without an end": (b"HTTP/1.1 200 OK\r\nX-A: 1\r\n", b"GET"),
    "an oversized value": (answer(b"X-A: " + b"v" * 70_000 + b"\r\nContent-Length: 2\r\n", b"ok"), b"GET"),
    "an oversized name": (answer(b"X" * 300 + b": 1\r\nContent-Length: 2\r\n", b"ok"), b"GET"),
    "too many fields": (answer(b"X-A: 1\r\n" * 300 + b"Content-Length: 2\r\n", b"ok"), b"GET"),
    "an error of ours": (answer(b"Portico-Error: edge.tunnel_offline\r\nContent-Length: 2\r\n", b"ok"), b"GET"),
    "many interim answers": (
        answer(b"X-A: 1\r\n", b"", b"103 Hints") * 500 + answer(b"Content-Length: 2\r\n", b"ok"),
        b"GET",
    ),
    "interim answers without an end": (answer(b"X-A: 1\r\n", b"", b"103 Hints") * 5, b"GET"),
}
#: Those whose end is missing: the visitor's connection ends before it, too.
BREAK_OFF = frozenset(
    (
        *("less than its length", "chunks that break off", "a chunk size that overflows"),
        *("a bare LF in an extension", "a length in the trailers"),
    )
)
