"""Fixtures of all files here, and the mark of tests that take minutes: `pytest -m slow`."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from helpers import arrays, runs, seeded, small_net, small_root  # noqa: E402, F401


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run with -m slow")


def pytest_runtest_setup(item):
    if item.get_closest_marker("slow") and "slow" not in item.config.getoption("-m"):
        pytest.skip("slow: pytest -m slow")
