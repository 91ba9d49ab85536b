"""Look for bytes where they must not be: in files, and in the memory of processes.

    python -m tests.system.search TEXT PID…|PATH…      says where TEXT was found; exits 1 when it was

Memory is what ``gcore`` dumps, every mapping of it, searched as a file; where gdb is not installed, or may not look, it is
read by ``/proc/PID/mem``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

CHUNK = 1 << 24


def in_stream(read: Iterator[bytes], needles: Iterable[bytes]) -> set[bytes]:
    """Which of the needles a stream of chunks holds, also across their borders."""
    wanted, found, kept = list(needles), set[bytes](), b""
    margin = max(len(needle) for needle in wanted) - 1
    for chunk in read:
        data = kept + chunk
        found |= {needle for needle in wanted if needle in data}
        kept = data[-margin:] if margin else b""
    return found


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def in_files(root: Path, needles: Iterable[bytes], leave: Iterable[Path] = ()) -> dict[Path, set[bytes]]:
    """Files below ``root`` that hold any of the needles, without those in ``leave``."""
    wanted, left = list(needles), set(leave)
    paths = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    found = {}
    for path in paths:
        if path in left:
            continue
        try:
            if hits := in_stream(_chunks(path), wanted):
                found[path] = hits
        except FileNotFoundError:
            continue  # it went meanwhile
    return found


def _memory(pid: int) -> Iterator[bytes]:
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            span, mode, *rest = line.split(maxsplit=5)
            if "r" not in mode or (rest and rest[-1] in ("[vvar]", "[vsyscall]")):
                continue
            start, end = (int(edge, 16) for edge in span.split("-"))
            for at in range(start, end, CHUNK):
                try:
                    memory.seek(at)
                    yield memory.read(min(CHUNK, end - at))
                except (OSError, ValueError, OverflowError):
                    break  # a hole, or a page that the kernel does not show


def in_memory(pid: int, needles: Iterable[bytes]) -> set[bytes]:
    """Which of the needles a process has in its memory.

    Raises ``ProcessLookupError`` or ``FileNotFoundError`` for one that ended.
    """
    wanted = list(needles)
    gcore = shutil.which("gcore")
    if gcore is not None:
        with tempfile.TemporaryDirectory() as folder:
            argv = [gcore, "-a", "-o", f"{folder}/core", str(pid)]
            subprocess.run(argv, check=False, capture_output=True, timeout=300)
            if dumps := list(Path(folder).iterdir()):
                return in_stream(_chunks(dumps[0]), wanted)
    return in_stream(_memory(pid), wanted)


def main(text: str, places: list[str]) -> int:
    needles, found = [text.encode()], False
    for place in places:
        hits = bool(in_memory(int(place), needles)) if place.isdigit() else bool(in_files(Path(place), needles))
        found |= hits
        print(f"{place}: {'FOUND' if hits else 'not found'}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
