"""Settings of a run: measured budgets, no budget that leaves what was tuned, flags one by one."""
import dataclasses
import math

import pytest
import torch
from tiny import resolved

import train_q0 as q

POPULATIONS = sorted(q.POPULATIONS)


def row_of(cfg):
    """Of the rows of its population: from how many epochs on its settings are chosen."""
    _, _, rows = q.POPULATIONS[cfg.population]
    tuned = tuple(getattr(cfg, name) for name in q.COLUMNS)
    return next((epochs for epochs, row in rows.items() if row == tuned), None)


@pytest.mark.parametrize("population, changes, shape", [
    ("q0", dict(epochs=32), (2, 4, 4, 16)),
    ("q0", dict(epochs=128), (4, 8, 4, 32)),
    ("snapshots", dict(epochs=64), (2, 8, 4, 32)),
    ("ensemble", dict(epochs=128), (16, 1, 8, 6)),
    ("chain", dict(epochs=128), (1, 16, 8, 6)),
    # a trajectory for every 32 epochs of the budget that given cycles do not take up
    ("q0", dict(epochs=256, cycles=2), (4, 2, 32, 32)),
    ("q0", dict(preset="small", epochs=16), (1, 8, 2, None)),
    ("q0", dict(preset="q0", epochs=960), (5, 96, 2, None))])
def test_measured_budgets(population, changes, shape):
    cfg = resolved(population=population, **changes)
    each = cfg.epochs // (cfg.trajectories * cfg.cycles)
    assert (cfg.trajectories, cfg.cycles, each, row_of(cfg)) == shape
    assert (cfg.boundary, cfg.distill_weight) == q.POPULATIONS[population][:2]


@pytest.mark.parametrize("population, from_epochs, lengths, rows", [
    ("q0", 6, range(3, 6), {1, 16, 32}),
    ("chain", 12, range(6, 11), {6})])
def test_no_budget_leaves_the_members_that_were_tuned(population, from_epochs, lengths, rows):
    """Measured with cycles of 4 epochs and members of 8; what is chosen for them holds at every
    budget."""
    found = set()
    for epochs in range(from_epochs, 131, 3):
        cfg = resolved(population=population, epochs=epochs)
        plan = q.plan_cycles(cfg, 10_000)
        given = [c.epochs for cycles in zip(*plan) for c in cycles]
        assert sum(given) == epochs
        assert given == sorted(given, reverse=True)  # a rest goes to the first
        assert given[0] <= given[-1] + 1 and {given[0], given[-1]} <= set(lengths)
        found.add(row_of(cfg))
    assert found == rows


FOLLOW = {  # settings that are derived from another one
    "seq_len": {"short_window"},
    "batch_tokens": {"edge_batch_tokens"},
    "teacher": {"distill_weight"},
    "device": {"precision", "compile", "graphs"}}
OTHER = dict(  # a value that is neither the default nor what is derived
    seq_len=128, batch_tokens=4096, edge_batch_tokens=4096, micro_batch=4, train_tokens=0,
    data="x", teacher="x", windows="SL", dropout=0.3, lr_floor=0.5, average=0.5,
    distill_weight=0.3, head_dim=32, width=256)
ALLOCATION = {"preset", "population", "epochs", "trajectories", "cycles"}


def another(f, value):
    """A value of field `f` that is not `value`."""
    if f.name in OTHER:
        return OTHER[f.name]
    if f.metadata["choices"]:
        return next(c for c in f.metadata["choices"] if c not in ("auto", value))
    if f.type.startswith("bool"):
        return not value
    return 2 * value if value else 1


@pytest.mark.parametrize("population", POPULATIONS)
def test_a_flag_changes_no_other_setting(population, monkeypatch):
    """As on a GPU; what is derived has a reason, and what is given has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg, why = q.resolve(q.Config(population=population, epochs=32))
    assert (cfg.device, cfg.precision, cfg.compile, cfg.graphs) == ("cuda", "bfloat16", True, True)
    assert q.resolve(cfg) == (cfg, {})  # a run that goes on
    plain = dataclasses.asdict(cfg)
    for f in dataclasses.fields(cfg):
        if f.name in ALLOCATION:
            continue
        value = another(f, plain[f.name])
        given = q.Config(**{"population": population, "epochs": 32, f.name: value})
        mine, reasons = q.resolve(given)
        mine = dataclasses.asdict(mine)
        changed = {name for name in plain if plain[name] != mine[name]}
        assert mine[f.name] == value and f.name not in reasons
        assert changed - {f.name} <= FOLLOW.get(f.name, set())
        assert set(why) - set(reasons) <= {f.name}


@pytest.mark.parametrize("words", ["--preset small", "--preset=small"])
def test_help_shows_the_defaults_of_a_preset(words, capsys):
    with pytest.raises(SystemExit):
        q.main([*words.split(), "--help"])
    assert "transformer blocks [12]\n" in capsys.readouterr().out


@pytest.mark.parametrize("changes, message", [
    (dict(epochs=7, cycles=2, trajectories=4), "give --epochs 8, or fewer of them"),
    (dict(width=96), "multiple of --head-dim"),
    (dict(batch_tokens=5000), "--batch-tokens 5000 is not a multiple"),
    (dict(windows="SX"), "--windows"),
    (dict(device="cuda"), "no GPU"),
    (dict(device="mps"), "no GPU of Apple's"),
    (dict(lr_matrix=math.nan), "--lr-matrix nan is out of range"),
    (dict(population="q1"), "--population q1 is not one of: q0, snapshots")])
def test_refusals(changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(q.UserError, match=message) as refusal:
        resolved(**changes)
    assert "\n" not in str(refusal.value)
