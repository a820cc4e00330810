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


def test_output_and_a_process_of_its_own(tmp_path, capsys):
    output = bench.Output(tmp_path / "b.md")
    assert bench.run_section(["prior", "--small"], 100, output.add) == ""
    fit, em, adamw = rows_of(output.items)
    assert fit["certified gap"] <= 1.1e-7 and em["certified gap"] < 2e-4
    for other in (em, adamw):  # within its own gap of the optimum
        assert -1e-6 < other["loss - fit_prior's"] <= other["certified gap"]
    text = (tmp_path / "b.md").read_text()
    assert "|---|---|" in text and text == capsys.readouterr().out
