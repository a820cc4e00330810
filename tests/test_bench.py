"""records/bench.py in miniature: every section runs, its tables have their rows and its numbers are
plausible."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from records import bench

NEED_TRITON = ("loss", "products", "evaluation")  # the others would only be slow under it
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose run says more")


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    monkeypatch.setattr(bench, "SMALL", True)


def rows_of(items):
    """The rows among them, plausible; every version ran."""
    rows = []
    for item in items:
        assert "does not run" not in item
        if isinstance(item, dict):
            rows.append(item)
    for row in rows:
        for name, x in row.items():
            assert not isinstance(x, float) or math.isfinite(x)
            if name.endswith(("ms", "tokens/s")) or " / " in name:
                assert x > 0
    return rows


def run(name):
    return rows_of(bench.items(bench.CPU[name].function))


def test_loss_and_a_process_of_its_own():
    items = []
    assert bench.run_section(["loss", "--small"], 100, items.append) == ""
    whole, *_ = rows_of(items)
    if sys.platform == "linux":
        assert 0 < whole["chunked / plain memory"] < 1
        # at least the logits and their gradient
        assert whole["plain extra MB"] > 2 * 4 * 1024 * 8000 / 1e6


@pytest.mark.parametrize("name, column, values", [
    ("optimizer", "banks", [9]),
    ("attention", "window", [16, 32]),
    ("text", "samples", [1, 2] * 2),
    ("compiled", "teacher", [False, True]),
    ("model", "part", ["micro-batch", "with teacher", "update"])])
def test_section(name, column, values):
    assert [row[column] for row in run(name) if column in row] == values


def test_step():
    groups = [row for row in run("step") if "operation" in row]
    for taught in ("teacher: False", "teacher: True"):
        shares = [float(row[taught].rstrip("%")) for row in groups]
        assert sum(shares) == pytest.approx(100, abs=0.6)  # each is rounded to 0.1


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_scaling(processes):
    row, = rows_of(bench.scaling([bench.Shape(64, 32, processes, 1)]))
    assert row["it / first row"] == 1 and row["processes x threads"] == f"{processes} x 1"


def test_prior():
    fit, em, adamw = run("prior")
    assert fit["certified gap"] <= 1.1e-7 and em["certified gap"] < 2e-4
    for other in (em, adamw):  # within its own gap of the optimum
        assert -1e-6 < other["loss - fit_prior's"] <= other["certified gap"]


def test_output(tmp_path, capsys):
    output = bench.Output(tmp_path / "b.md")
    items = ["# title", {"a": 1.23456, "b": math.nan}, {"a": 12345.6, "b": "x"}, "note"]
    for item in items:
        output.add(item)
    text = (tmp_path / "b.md").read_text()
    assert "| a | b |\n|---|---|\n| 1.23 | - |\n| 12,346 | x |\n\nnote\n" in text
    assert text == capsys.readouterr().out
    assert len(json.loads((tmp_path / "b.json").read_text())) == 4


def test_mistakes(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--gpu"]) == 2
    assert capsys.readouterr().err == "bench.py: --gpu needs a GPU, and torch sees none here\n"


@pytest.mark.slow
@no_gpu
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
