"""A mail server that keeps what it got, and misbehaves on request (RFC 5321, as much of it as a sender needs).

    async with MailServer() as server:
        server.plan("RCPT", "450 4.2.1 try later")      # the next RCPT is answered so, later ones as usual
        server.plan("DATA", HANG)
        …
        server.got[0].content

What can be planned for a command: an answer of one's own, ``HANG`` (never an answer), ``RESET`` (the connection is reset),
``CUT`` (in the middle of the answer), ``TAKE_AND_RESET`` (for the end of a text, ``.``: the mail is kept, and its answer
never comes).
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar, Final

from portico.simulators.loopback import Loopback
from portico.simulators.webhooks import reset

HANG: Final = "hang"
RESET: Final = "reset"
CUT: Final = "cut"
TAKE_AND_RESET: Final = "take and reset"
_USUAL: Final = {
    "": "220 mail.test ready", "EHLO": "250-mail.test\r\n250 8BITMIME", "HELO": "250 mail.test", "MAIL": "250 2.1.0 ok",
    "RCPT": "250 2.1.5 ok", "DATA": "354 go on", ".": "250 2.0.0 queued", "RSET": "250 2.0.0 ok", "NOOP": "250 2.0.0 ok",
    "QUIT": "221 2.0.0 bye",
}  # fmt: skip
_LINE_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class Letter:
    """A mail that was handed over."""

    sender: str
    recipients: tuple[str, ...]
    content: bytes


@dataclass(slots=True)
class _Talk:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sender: str = ""
    recipients: list[str] = field(default_factory=list)


class MailServer(Loopback):
    """Listens on 127.0.0.1 while it is entered, on ``port``. With a ``context`` it speaks TLS from the start."""

    broken: ClassVar = (asyncio.IncompleteReadError, ValueError)

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(context)
        self.got: list[Letter] = []
        self._plans: dict[str, deque[str]] = {}

    def plan(self, command: str, *answers: str) -> None:
        """How the next commands of this name fare; ``""`` is the greeting, ``.`` the end of a text."""
        self._plans.setdefault(command, deque()).extend(answers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(_Talk(reader, writer))

    async def _serve(self, talk: _Talk) -> None:
        going = await self._answer(talk, "")
        while going:
            line = (await talk.reader.readuntil(b"\r\n")).decode("utf-8", "replace").strip()
            command = line[:4].upper()
            if command not in _USUAL:
                await _say(talk, "502 5.5.1 no such command")
                continue
            if command == "MAIL":
                talk.sender, talk.recipients = _address(line), []
            going = await self._answer(talk, command) and command != "QUIT"
            if command == "RCPT" and going:
                talk.recipients.append(_address(line))

    async def _answer(self, talk: _Talk, command: str, letter: Letter | None = None) -> bool:
        """Answer as planned, else as usual; whether the talk goes on."""
        plans = self._plans.get(command)
        answer = plans.popleft() if plans else _USUAL[command]
        if letter is not None and (answer.startswith("2") or answer == TAKE_AND_RESET):
            self.got.append(letter)
        if answer == HANG:
            await asyncio.Event().wait()
        if answer in (RESET, TAKE_AND_RESET):
            reset(talk.writer)
            return False
        if answer == CUT:
            talk.writer.write(b"25")
            await talk.writer.drain()
            reset(talk.writer)
            return False
        await _say(talk, answer)
        if command == "DATA" and answer.startswith("354"):
            content = await talk.reader.readuntil(b"\r\n.\r\n")
            return await self._answer(talk, ".", Letter(talk.sender, tuple(talk.recipients), content[:-3]))
        return not answer.startswith(("421", "554 5.3.2"))


async def _say(talk: _Talk, text: str) -> None:
    talk.writer.write(f"{text}\r\n".encode())
    await talk.writer.drain()


def _address(line: str) -> str:
    return line.partition("<")[2].partition(">")[0]
