"""Settings of a run: measured budgets, no budget that leaves what was tuned, flags one by one."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

import train_q0 as q

POPULATIONS = sorted(q.POPULATIONS)
PRESETS = sorted(q.PRESETS)
TUNED = ("lr_matrix", "weight_decay", "wd_start", "wd_end", "dropout", "average")
counts = strategies.none() | strategies.integers(1, 6)


def config(preset="tiny", **changes):
    return q.Config(**{**q.PRESETS[preset], "preset": preset, **changes})


def resolved(preset="tiny", **changes):
    return q.resolve(config(preset, **changes))[0]


def counts_of(cfg):
    return cfg.trajectories, cfg.cycles, cfg.epochs // (cfg.trajectories * cfg.cycles)


def tuned_of(cfg):
    return tuple(getattr(cfg, name) for name in TUNED)


def lengths_of(cfg):
    """Epochs of all members, in the order in which a rest is given out."""
    plan = q.plan_cycles(cfg, 10_000)
    return [c.epochs for cycles in zip(*plan) for c in cycles]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ------------------------------------------------------------------------------------------------
# Recipes

PLAIN = (0.03, 0.8, 1.2, 0.096, 0, 0)
LESS_DECAY = (0.03, 0.53, 1.2, 0.096, 0.1, 0)
OF_8 = (0.04, 1.2, 1.2, 0.096, 0, 0.25)
OF_16 = (0.04, 0.8, 0.7, 1.0, 0.1, 0.25)


@pytest.mark.parametrize("epochs, trajectories, cycles, each, tuned", [
    (4, 1, 1, 4, PLAIN),
    (8, 1, 2, 4, PLAIN),
    (16, 1, 4, 4, PLAIN),
    (24, 1, 6, 4, PLAIN),
    (32, 1, 8, 4, LESS_DECAY),
    (64, 2, 8, 4, LESS_DECAY),
    (128, 4, 8, 4, LESS_DECAY)])
@pytest.mark.parametrize("population, boundary, weight", [
    ("q0", "perturb", 0.45), ("snapshots", "continue", 0)])
def test_measured_budgets_of_cycles(
        population, boundary, weight, epochs, trajectories, cycles, each, tuned):
    cfg = resolved(population=population, epochs=epochs)
    assert counts_of(cfg) == (trajectories, cycles, each)
    assert tuned_of(cfg) == tuned
    assert cfg.boundary == boundary
    assert cfg.distill_weight == weight
    assert cfg.distill_after == 2


@pytest.mark.parametrize("epochs, members, each, tuned", [
    (8, 2, 4, PLAIN),
    (16, 2, 8, OF_8),
    (32, 4, 8, OF_8),
    (64, 8, 8, OF_8),
    (128, 16, 8, OF_8)])
def test_measured_budgets_of_members_that_start_afresh(epochs, members, each, tuned):
    ensemble = resolved(population="ensemble", epochs=epochs)
    chain = resolved(population="chain", epochs=epochs)
    assert counts_of(ensemble) == (members, 1, each)
    assert counts_of(chain) == (1, members, each)
    assert tuned_of(ensemble) == tuned_of(chain) == tuned
    assert (ensemble.boundary, ensemble.distill_weight) == ("fresh", 0)
    assert (chain.boundary, chain.distill_weight, chain.distill_after) == ("fresh", 0.45, 1)


@pytest.mark.parametrize("epochs, tuned", [
    (5, PLAIN),
    (8, OF_8),
    (16, OF_16),
    (32, OF_16),
    (64, OF_16),
    (128, OF_16)])
def test_measured_budgets_of_a_single_model(epochs, tuned):
    cfg = resolved(population="single", epochs=epochs)
    assert counts_of(cfg) == (1, 1, epochs)
    assert tuned_of(cfg) == tuned
    assert (cfg.boundary, cfg.distill_weight) == ("fresh", 0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("population", POPULATIONS)
def test_every_budget_is_spent_and_evenly(preset, population):
    for epochs in range(1, 131):
        cfg = resolved(preset, population=population, epochs=epochs)
        lengths = lengths_of(cfg)
        assert sum(lengths) == epochs
        assert lengths == sorted(lengths, reverse=True)  # a rest goes to the first
        assert lengths[0] - lengths[-1] <= 1


@pytest.mark.parametrize("population", ["ensemble", "chain"])
def test_no_budget_leaves_the_members_that_were_tuned(population):
    """Measured with members of 8 epochs: what is chosen for them holds at every budget."""
    for epochs in range(12, 131):
        cfg = resolved(population=population, epochs=epochs)
        lengths = lengths_of(cfg)
        assert 6 <= min(lengths)
        assert max(lengths) <= 10
        assert tuned_of(cfg) == OF_8


@pytest.mark.parametrize("population", ["q0", "snapshots"])
def test_no_budget_leaves_the_cycles_that_were_tuned(population):
    """Measured with cycles of 4 epochs, from two cycles on."""
    for epochs in range(6, 131):
        cfg = resolved(population=population, epochs=epochs)
        lengths = lengths_of(cfg)
        assert 3 <= min(lengths)
        assert max(lengths) <= 5
        assert tuned_of(cfg) == (LESS_DECAY if epochs >= 32 else PLAIN)
        if cfg.cycles > 2:
            assert cfg.distill_after == 2


@pytest.mark.parametrize("population", POPULATIONS)
def test_one_epoch_more_is_one_step_at_most(population):
    """No number of members or length of a member jumps, but where a trajectory is added."""
    before = resolved(population=population, epochs=12)
    for epochs in range(13, 131):
        cfg = resolved(population=population, epochs=epochs)
        members = cfg.trajectories * cfg.cycles
        if cfg.trajectories == before.trajectories or population == "ensemble":
            assert 0 <= members - before.trajectories * before.cycles <= cfg.trajectories
        before = cfg


def test_larger_models_keep_the_published_cycles():
    for preset in ("small", "q0"):
        for epochs in range(6, 131):
            cfg = resolved(preset, epochs=epochs)
            assert counts_of(cfg) == (1, epochs // 2, 2)
        chain = resolved(preset, epochs=64, population="chain")
        assert counts_of(chain) == (1, 4, 16)
        assert (chain.distill_after, chain.average) == (1, 0)
    for epochs in range(16, 131):
        assert resolved("q0", epochs=epochs).distill_after == 8
    assert resolved("small").distill_after == 4  # half of its default budget


def test_the_published_run_is_a_budget():
    cfg = resolved("q0", epochs=960)
    assert counts_of(cfg) == (5, 96, 2)
    assert cfg.distill_after == 8
    assert resolved("q0", epochs=256).trajectories == 1


def test_trajectories_leave_room_for_what_is_given():
    """One for every 32 epochs of the budget that given cycles do not take up."""
    def shape(**changes):
        return counts_of(resolved(**changes))

    assert shape(epochs=63) == (1, 16, 3)
    assert shape(epochs=64, cycles=16) == (1, 16, 4)
    assert shape(epochs=64, trajectories=1) == (1, 16, 4)
    assert shape(epochs=128, trajectories=2) == (2, 16, 4)
    assert shape(epochs=256, cycles=2) == (4, 2, 32)
    assert shape(epochs=64, population="chain", trajectories=2) == (2, 4, 8)


@settings(max_examples=300, deadline=None)
@given(
    preset=strategies.sampled_from(PRESETS),
    population=strategies.sampled_from(POPULATIONS),
    epochs=strategies.integers(1, 140),
    trajectories=counts,
    cycles=counts)
def test_what_is_given_is_kept_or_refused(preset, population, epochs, trajectories, cycles):
    asked = dict(trajectories=trajectories, cycles=cycles)
    asked = {name: value for name, value in asked.items() if value}
    cheapest = math.prod(asked.values())
    try:
        cfg = resolved(preset, population=population, epochs=epochs, **asked)
    except q.UserError as e:
        assert "or fewer of them" in str(e) and "\n" not in str(e)
        assert epochs < cheapest
        return
    assert cheapest <= epochs
    assert all(getattr(cfg, name) == value for name, value in asked.items())
    assert sum(lengths_of(cfg)) == epochs
    assert min(lengths_of(cfg)) >= 1
    assert q.resolve(cfg) == (cfg, {})  # a run that goes on


# ------------------------------------------------------------------------------------------------
# What is given changes nothing else

FOLLOW = {  # settings that are derived from another one
    "seq_len": {"short_window"},
    "batch_tokens": {"edge_batch_tokens"},
    "teacher": {"distill_weight"},
    "device": {"precision", "compile", "graphs"}}
OTHER = dict(  # a value that is neither the default nor what is derived
    seq_len=128,
    batch_tokens=4096,
    edge_batch_tokens=4096,
    micro_batch=4,
    train_tokens=0,
    data="x",
    teacher="x",
    windows="SL",
    dropout=0.3,
    lr_floor=0.5,
    average=0.5,
    distill_weight=0.3,
    head_dim=32,
    width=256)
ALLOCATION = {"preset", "population", "epochs", "trajectories", "cycles"}
SETTINGS = [f for f in dataclasses.fields(q.Config) if f.name not in ALLOCATION]
NAMES = [f.name for f in SETTINGS]


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
@pytest.mark.parametrize("f", SETTINGS, ids=NAMES)
def test_a_flag_changes_no_other_setting(f, population, gpu):
    for epochs in (8, 32):
        base = dict(population=population, epochs=epochs)
        plain = dataclasses.asdict(resolved(**base))
        value = another(f, plain[f.name])
        mine = dataclasses.asdict(resolved(**{**base, f.name: value}))
        changed = {name for name in plain if plain[name] != mine[name]}
        assert mine[f.name] == value
        assert changed - {f.name} <= FOLLOW.get(f.name, set())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("population", POPULATIONS)
def test_what_is_derived_has_a_reason(preset, population):
    """In every population and preset: a reason for each, and none for what was given."""
    given_ = config(preset, population=population, epochs=32)
    cfg, why = q.resolve(given_)
    open_ = {"attention", "teacher", "teacher_k", "keep_members"}  # later, or nothing
    for f in dataclasses.fields(cfg):
        derived = getattr(given_, f.name) in (None, "auto") and f.name not in open_
        assert (f.name in why) == derived
        if derived:
            assert getattr(cfg, f.name) not in (None, "auto")
            assert why[f.name] and "\n" not in why[f.name]
        else:
            assert getattr(cfg, f.name) == getattr(given_, f.name)
    assert q.resolve(cfg) == (cfg, {})


# ------------------------------------------------------------------------------------------------
# Presets and the machine

def multipliers(steps, start, end):
    """Of lr and of decay in a cycle, both [steps]."""
    floor = q.Config.lr_floor
    lr = np.array([q.lr_multiplier(s, steps, floor) for s in range(steps)])
    wd = np.array([q.wd_multiplier(x, floor, start, end) for x in lr])
    return lr, wd


def decay_of_a_cycle(preset):
    """Sum of lr * decay of matrices over a middle cycle, 100M tokens an epoch."""
    cfg = resolved(preset, epochs=32)
    cycle = q.plan_cycles(cfg, 100_000_000)[0][8]
    lr, wd = multipliers(cycle.steps, cfg.wd_start, cfg.wd_end)
    assert (np.diff(lr * wd) < 0).all()
    return cfg.lr_matrix * cfg.weight_decay * (lr * wd).sum()


def test_a_cycle_of_the_larger_presets_decays_as_published():
    """2.2 in the middle cycles of 381 steps, where `small` makes 1,526."""
    published = decay_of_a_cycle("q0")
    assert published == pytest.approx(2.16, abs=0.01)
    assert decay_of_a_cycle("small") == pytest.approx(published, rel=0.001)


def test_both_shapes_of_tiny_decay_as_much():
    lr, proportional = multipliers(292, 1.2, 0.096)
    rising = multipliers(292, 0.7, 1.0)[1]
    assert (lr * proportional).sum() == pytest.approx((lr * rising).sum(), rel=0.01)
    assert proportional == pytest.approx(1.2 * lr)


def test_on_a_gpu(gpu):
    tiny = resolved()
    assert (tiny.device, tiny.precision, tiny.compile, tiny.graphs) == (
        "cuda", "bfloat16", True, True)
    assert not resolved("q0").graphs  # it is not bound by launches
    assert resolved("q0").compile
    mine = resolved("q0", compile=False, graphs=True, precision="float32")
    assert (mine.compile, mine.graphs, mine.precision) == (False, True, "float32")
    cpu = resolved(device="cpu")
    assert (cpu.device, cpu.compile, cpu.graphs) == ("cpu", False, False)


# ------------------------------------------------------------------------------------------------
# Mistakes and help

@pytest.mark.parametrize("changes, message", [
    (dict(epochs=1, trajectories=2), "--epochs 1 are fewer.*2 trajectories.*give --epochs 2"),
    (dict(epochs=7, cycles=2, trajectories=4), "give --epochs 8, or fewer of them"),
    (dict(width=96), "multiple of --head-dim"),
    (dict(head_dim=128), "--induction needs a second head"),
    (dict(batch_tokens=5000), "--batch-tokens 5000 is not a multiple"),
    (dict(edge_batch_tokens=5000), "--edge-batch-tokens 5000 is not a multiple"),
    (dict(windows="SX"), "--windows"),
    (dict(windows=""), "--windows"),
    (dict(loop_passes=2, loop_first=2, loop_last=4), "--loop-last 4 is not a range"),
    (dict(loop_passes=2, loop_first=2, loop_last=1), "--loop-first 2"),
    (dict(device="cuda"), "no GPU"),
    (dict(epochs=0), "--epochs 0 is out of range: 1 to"),
    (dict(lr_floor=1.5), "--lr-floor 1.5 is out of range: 0 to 1"),
    (dict(lr_matrix=math.nan), "--lr-matrix nan is out of range"),
    (dict(lr_matrix=-1.0), "--lr-matrix -1.0 is out of range"),
    (dict(softcap=1001.0), "--softcap 1001.0 is out of range: 0 to 1000"),
    (dict(epochs=True), "--epochs True is not of type int"),
    (dict(epochs="8"), "--epochs '8' is not of type int"),
    (dict(unet=1), "--unet 1 is not of type bool"),
    (dict(population="q1"), "--population q1 is not one of: q0, snapshots")])
def test_refusals(changes, message, no_gpu):
    with pytest.raises(q.UserError, match=message) as refusal:
        resolved(**changes)
    assert "\n" not in str(refusal.value)


def test_zero_means_off():
    off = dict.fromkeys(("softcap", "grad_clip", "dropout", "average", "distill_weight"), 0.0)
    cfg = resolved(**off)
    for name in off:
        assert getattr(cfg, name) == 0
    assert resolved(softcap=1000.0).softcap == 1000


def test_help_shows_every_flag_in_its_group(capsys):
    with pytest.raises(SystemExit):
        q.main(["--help"])
    text = capsys.readouterr().out.split("\noptions:\n")[1]
    at = 0
    names = [f.name for f in dataclasses.fields(q.Config)]
    for name in names:  # in their order, each first one under its title
        if name in q.GROUPS:
            at = text.index(f"\n{q.GROUPS[name]}:\n", at)
        at = text.index(f"\n  {q.flag(name)}", at)
    machine = names[names.index("device"):]
    assert set(machine) - set(q.MACHINE) == {"precision"}  # which is of the method
