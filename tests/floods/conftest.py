"""A failed flood shows what the processes said last."""

from __future__ import annotations

from tests.system.conftest import show_ends

pytest_runtest_makereport = show_ends(__file__)
