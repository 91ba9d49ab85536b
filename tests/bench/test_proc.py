"""What is read off /proc, against fixed texts and against processes that really burn time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.proc import MIB, CpuReading, Watch, cpu, parse_stat_ticks, parse_status_bytes, resident, tree

STAT = "4242 (a (strange) name) S 17 4242 4242 0 -1 4194560 900 0 0 0 {utime} {stime} 0 0 20 0 1 0 100 1000 200 1 1"


def test_ticks_are_read_past_a_name_with_spaces_and_parentheses() -> None:
    assert parse_stat_ticks(STAT.format(utime=120, stime=34)) == 154


def test_a_status_field_is_in_bytes_and_a_missing_one_is_said() -> None:
    text = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n"
    assert parse_status_bytes(text, "VmRSS") == MIB
    assert parse_status_bytes(text, "VmHWM") == 2 * MIB
    with pytest.raises(ValueError, match="VmSwap"):
        parse_status_bytes(text, "VmSwap")


def test_nanoseconds_count_new_threads_whole() -> None:
    assert CpuReading({1: 500}, 1.0).until(CpuReading({1: 2_000_000_500, 2: 1_000_000_000}, 9.0)) == 3.0


def test_ticks_count_when_a_thread_ended() -> None:
    assert CpuReading({1: 500, 2: 900}, 1.0).until(CpuReading({1: 700}, 1.5)) == 0.5


def test_a_kernel_without_schedstat_gives_ticks(tmp_path: Path) -> None:
    (tmp_path / "7" / "task" / "7").mkdir(parents=True)
    for folder in (tmp_path / "7", tmp_path / "7" / "task" / "7"):
        (folder / "stat").write_text(STAT.format(utime=50, stime=50))
    found = cpu(7, tmp_path)
    assert found == CpuReading({}, 100 / os.sysconf("SC_CLK_TCK"))


def test_a_watch_sees_the_cpu_and_the_memory_of_another_process() -> None:
    burn = "import sys, time\nsys.stdin.readline()\nend = time.process_time() + 0.4\nx = bytearray(64 << 20)\n"
    burn += "while time.process_time() < end: pass\nprint('done', flush=True)\nsys.stdin.readline()\n"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        time.sleep(0.2)
        idle = resident(child.pid)
        with Watch({"it": [child.pid]}) as watch:
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
        child.stdin.close()
    assert 0.35 < watch.cpu["it"] < 0.8
    assert 60 * MIB < watch.peak["it"] - idle < 80 * MIB


def test_a_tree_has_children_of_children() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        deadline = time.monotonic() + 10
        while len(tree(child.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(tree(child.pid)) == 2
        assert set(tree(child.pid)) < set(tree(os.getpid()))
        child.stdin.close()
