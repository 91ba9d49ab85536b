"""Children of a run end with it, and say why they did not start."""

from __future__ import annotations

import os
import sys

import pytest

from bench.__main__ import parse
from bench.processes import NotStarted, Run, environment


def test_everything_ends_with_the_run_also_after_an_error() -> None:
    with pytest.raises(KeyError), Run() as run:
        child = run.start("sleeper", [sys.executable, "-c", "import time; time.sleep(60)"])
        folder = run.folder
        raise KeyError
    assert child.process.poll() is not None
    assert not folder.exists()


def test_a_program_that_does_not_start_says_its_last_words() -> None:
    with Run() as run:
        child = run.start("broken", [sys.executable, "-c", "raise SystemExit('no such port')"])
        with pytest.raises(NotStarted, match=r"broken ended \(exit 1\) before its port: no such port"):
            child.wait_for(lambda: False, 10, "its port")


def test_children_do_not_inherit_portico_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTICO_SERVER", "http://elsewhere")
    env = environment(log_level="WARNING")
    assert "PORTICO_SERVER" not in env and env["PORTICO_LOG_LEVEL"] == "WARNING" and env["PATH"] == os.environ["PATH"]


def test_options_take_known_names_in_our_order() -> None:
    options = parse(["--quick", "--only", "close,small-get", "--candidates", "rathole,portico", "--repeats", "7"])
    assert (options.only, options.candidates) == (["small-get", "close"], ["portico", "rathole"])
    assert (options.repeats, options.seconds) == (7, 3.0)


@pytest.mark.parametrize(
    "wrong", [["--only", "nothing"], ["--candidates", "x"], ["--repeats", "0"], ["--seconds", "-1"]]
)
def test_unknown_names_and_empty_runs_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parse(wrong)
    assert refused.value.code == 2
