"""bench.py in miniature: every section runs, its tables have their rows and its numbers are plausible."""
import math
import os
import subprocess
import sys

import pytest
import torch

import bench


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    monkeypatch.setattr(bench, "SMALL", True)


def rows_of(items):
    rows = [x for x in items if isinstance(x, dict)]
    assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))
    assert all(x > 0 for row in rows for name, x in row.items() if name.endswith(("ms", "tokens/s")) or " / " in name)
    assert not [x for x in items if isinstance(x, str) and "does not run" in x]
    return rows


def run(name):
    return rows_of(list(bench.items(bench.CPU[name][0])))


def test_loss_and_a_process_of_its_own():
    items = []
    assert not bench.run_section(["loss", "--small"], 100, items.append)
    whole, *sizes = rows_of(items)
    assert whole["hidden"] == "torch.float32" and whole["teacher"] and len(sizes) == 2
    if sys.platform == "linux":
        assert 0 < whole["chunked / plain memory"] < 1
        # at least the logits and their gradient
        assert whole["plain extra MB"] > 2 * 4 * 1024 * 8000 / 1e6


def test_optimizer():
    orthogonal, update = run("optimizer")
    assert orthogonal["X"] == "(3, 16, 32)" and update["banks"] > 5


def test_attention():
    assert [row["window"] for row in run("attention")] == [16, 32]


def test_compiled():
    assert [row["teacher"] for row in run("compiled")] == [False, True]


def test_step():
    rows = run("step")
    groups = {row["operation"]: row for row in rows if "operation" in row}
    assert {"attention", "batch preparation", "loss: products", "model: products", "optimizer: products",
            "Python between operations"} <= set(groups)
    for taught in ("teacher: False", "teacher: True"):
        shares = [float(row[taught].rstrip("%")) for row in groups.values()]
        assert sum(shares) == pytest.approx(100, abs=0.6)  # each is rounded to 0.1


def test_scaling():
    (row,) = rows_of(list(bench.scaling([(64, 32, 1, 1)])))
    assert row["it / first row"] == 1


@pytest.mark.slow
def test_scaling_over_processes():
    (row,) = rows_of(list(bench.scaling([(64, 32, 2, 1)])))
    assert row["processes x threads"] == "2 x 1"


def test_prior():
    fit, em, adamw = run("prior")
    assert fit["certified gap"] <= 1.1e-7 and em["certified gap"] < 2e-4
    for other in (em, adamw):  # within its own gap of the optimum
        assert -1e-6 < other["loss - fit_prior's"] <= other["certified gap"]


def test_output(tmp_path, capsys):
    output = bench.Output(tmp_path / "b.md")
    for item in ("# title", {"a": 1.23456, "b": math.nan}, {"a": 12345.6, "b": "x"}, "note", {"c": True}):
        output.add(item)
    text = (tmp_path / "b.md").read_text()
    assert "| a | b |\n|---|---|\n| 1.23 | - |\n| 12,346 | x |\n\nnote\n\n| c |\n|---|\n| True |\n" in text
    assert text == capsys.readouterr().out and (tmp_path / "b.json").exists()


@pytest.mark.slow
def test_a_section_that_fails():
    assert "nothing is not one of" in bench.run_section(["nothing"], 100, print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_one(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SMALL", False)
    assert bench.main(["--gpu"]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err == "bench.py: --gpu needs a GPU, and torch sees none here\n"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose run says more")
@pytest.mark.parametrize("name", bench.GPU)
def test_gpu_sections_under_the_interpreter(name):
    if name in ("loss", "products", "evaluation"):  # the others would only be slow there
        pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if name in ("loss", "products", "evaluation"):
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, bench.__file__, "--gpu", "--small", name], env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "does not run" not in done.stdout and "Error" not in done.stdout, done.stdout


def test_model():
    """The smallest step there is, not compiled: its parts, and the ten heaviest operations of two of them."""
    rows = run("model")
    parts = [row["part"] for row in rows if "part" in row]
    heaviest = [row for row in rows if "ten heaviest of" in row]
    assert parts == ["micro-batch", "with teacher", "update"] and len(heaviest) == 20
    assert sum("deviation" in row for row in rows) == 14
