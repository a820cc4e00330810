"""Recipes: the page is the table of what was measured; `plan --k` recommends from it."""
import shlex

import pytest
from tiny import fails, works

import train_q0 as q
from records import recipes


def test_the_page_holds_the_table_of_recipes_json():
    text = recipes.PAGE.read_text(encoding="utf-8")
    assert recipes.page(text) == text


@pytest.mark.parametrize("epochs, k, population", [
    (16, 1, "chain"),
    (32, 2, "chain"),
    (32, None, "q0"),
    (64, 4, "chain+q0"),
    (128, None, "q0")])
def test_measured_budgets(epochs, k, population):
    best, loss, of_q0 = recipes.recommend(epochs, k)
    assert best == population
    assert loss.source == "measured"
    rows = recipes.measured()
    everyone = [recipes.loss_of(rows[name], epochs, k) for name in rows]
    assert loss.value <= min(x.value for x in everyone if x) + recipes.NOISE
    assert best == "q0" or of_q0.value > loss.value + recipes.NOISE


def test_between_and_beyond():
    rows = {16: {1: [4.0, 5], 2: [3.8, 5]}, 64: {1: [3.8, 5], 4: [3.4, 5]}}
    assert recipes.loss_of(rows, 32, 1) == recipes.Loss(pytest.approx(3.9), "interpolated")
    assert recipes.loss_of(rows, 64, 2) == recipes.Loss(pytest.approx(3.6), "interpolated")
    assert recipes.loss_of(rows, 16, 8) == recipes.Loss(3.8, "measured")  # it has two members
    assert recipes.loss_of(rows, 256, None).source.startswith("as at 64 epochs")
    assert recipes.loss_of(rows, 8, 1) is None


@pytest.mark.parametrize("epochs, k", [
    (32, 2),
    (64, 4),
    (64, None)])
def test_the_commands_are_commands(epochs, k):
    population, _, _ = recipes.recommend(epochs, k)
    spent = 0
    for line in recipes.commands(population, epochs, k):
        python, script, *argv = shlex.split(line)
        assert (python, script) == ("python", "train_q0.py")
        if argv[0].startswith("--"):
            cfg, _, args = q.parse_config(argv, {"--run": {}})
            assert args.run
            spent += cfg.epochs
        else:
            q.find_command(argv[0])
    assert spent == epochs


def test_plan_recommends(capsys):
    out = works(capsys, "plan", "--epochs", 64, "--k", 2)
    assert "for 64 epochs and the best 2 members: chain+q0, loss 3.7356 (measured), q0" in out
    assert "python train_q0.py --epochs 32 --population chain --run A" in out
    for wrong in ("--k 0", "--gpus 0", "--mfu -1", "--memory nan"):
        fails(capsys, f"{wrong.split()[0]}: .* is out of range", "plan", *wrong.split())
