"""Events on their way out, as files: what was seen is on disk before anything is sent, and leaves it when it was taken.

    FOLDER/0000000017.json   {"event", "body"}, mode 0600        FOLDER/known.json   what was told already
    FOLDER/refused/…         what the other side will never take

A restart goes on where the process was ended. An event keeps its id and its body in every attempt, so one whose answer was
lost is known on the other side.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portico.agent.cert_emitter import Known


class Spool:
    """One process has one folder. Raises ``OSError`` when it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "refused").mkdir(mode=0o700, exist_ok=True)

    def known(self) -> Known:
        """What was told already."""
        path = self.folder / "known.json"
        return Known(**json.loads(path.read_text())) if path.exists() else Known()

    def add(self, events: Sequence[tuple[int, str, bytes]], known: Known) -> None:
        """Keep events (number, id, body), then what is known with them: a crash in between tells of something twice, never of
        nothing."""
        for number, event, body in events:
            self._write(self.folder / f"{number:010}.json", {"event": event, "body": body.decode()})
        self._write(self.folder / "known.json", dataclasses.asdict(known))

    def waiting(self) -> list[Path]:
        """What is to be sent, the oldest first."""
        return sorted(path for path in self.folder.glob("[0-9]*.json"))

    @staticmethod
    def read(path: Path) -> tuple[str, bytes]:
        """The id and the body of an event."""
        document = json.loads(path.read_text())
        return document["event"], document["body"].encode()

    def taken(self, path: Path) -> None:
        """It is stored on the other side."""
        path.unlink(missing_ok=True)

    def refused(self, path: Path) -> None:
        """It will never be taken; a person may look at it."""
        path.replace(self.folder / "refused" / path.name)

    def _write(self, path: Path, document: Any) -> None:
        partial = path.with_suffix(".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - the descriptor has its mode already
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
