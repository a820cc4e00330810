"""Shared by all tests: the repository and its scripts on sys.path, and --slow for the tests marked slow."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "records"), str(ROOT / "data")]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder for what is made once and read by many tests."""
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def logs(tmp_path):
    return tmp_path / "logs"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
