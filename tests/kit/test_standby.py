"""A process that waits for its turn: told to go on, or left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from portico.kit import standby

WAIT = (
    "import sys; from pathlib import Path; from portico.kit import standby\n"
    "waited = standby.wait(int(sys.argv[1]), 'portico-part')\n"
    "print(waited, Path('/proc/self/comm').read_text().strip())"
)


def start() -> tuple[subprocess.Popen[str], int]:
    theirs, ours = os.pipe()
    argv = [sys.executable, "-c", WAIT, str(theirs)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=[theirs])
    os.close(theirs)
    return process, ours


def test_who_is_told_goes_on_under_its_own_name() -> None:
    process, ours = start()
    os.write(ours, standby.GO)
    os.close(ours)
    said, _ = process.communicate(timeout=60)
    assert (said.split(), process.returncode) == (["True", "portico-part"], 0)


def test_who_is_left_alone_ends_without_a_word() -> None:
    process, ours = start()
    os.close(ours)
    said, _ = process.communicate(timeout=60)
    assert (said, process.returncode) == ("", 0)


def test_without_a_descriptor_nobody_waits() -> None:
    mine = Path("/proc/self/comm").read_text()
    assert standby.wait(None, "portico-part") is False
    assert Path("/proc/self/comm").read_text() == mine
