"""records/bench.py in miniature: sections run, and their numbers are plausible."""
import math

import pytest

from records import bench


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    monkeypatch.setattr(bench, "SMALL", True)


def rows_of(items):
    """The rows among them, plausible; every version ran."""
    rows = [item for item in items if isinstance(item, dict)]
    assert not any("does not run" in item for item in items)
    for row in rows:
        for name, x in row.items():
            assert not isinstance(x, float) or math.isfinite(x)
            if name.endswith(("ms", "tokens/s")) or " / " in name:
                assert x > 0
    return rows


@pytest.mark.parametrize("name, column, values", [
    ("optimizer", "banks", [9]),
    ("attention", "window", [16, 32]),
    ("compiled", "teacher", [False, True]),
    ("model", "part", ["micro-batch", "with teacher", "update"])])
def test_section(name, column, values):
    rows = rows_of(bench.items(bench.CPU[name].function))
    assert [row[column] for row in rows if column in row] == values
