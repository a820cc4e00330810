"""records/bench.py in miniature: its sections run, their tables have their rows and their numbers
are plausible."""
import math
import os
import subprocess
import sys

import pytest
import torch

from records import bench

NEED_TRITON = ("loss", "products", "evaluation")  # the others would only be slow under it


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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose run says more")
@pytest.mark.parametrize("name", bench.GPU)
def test_gpu_sections_under_the_interpreter(name):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if name in NEED_TRITON:
        pytest.importorskip("triton")
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, bench.__file__, "--gpu", "--small", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "does not run" not in done.stdout and "Error" not in done.stdout, done.stdout
