"""Settings of a run: measured budgets, no budget that leaves what was tuned, flags one by one."""
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings, strategies
from tiny import resolved

import tiny
import train_q0 as q

POPULATIONS = sorted(q.POPULATIONS)
PRESETS = sorted(q.PRESETS)
counts = strategies.none() | strategies.integers(1, 6)


def lengths_of(cfg):
    """Epochs of all members, in the order in which a rest is given out."""
    plan = q.plan_cycles(cfg, 10_000)
    return [c.epochs for cycles in zip(*plan) for c in cycles]


def shape_of(cfg):
    """(trajectories, cycles, epochs a member, row of the recipe, cycles before distillation)"""
    each = cfg.epochs // (cfg.trajectories * cfg.cycles)
    return cfg.trajectories, cfg.cycles, each, row_of(cfg), cfg.distill_after


def row_of(cfg):
    """Of q.AFRESH or q.RESTARTED: from how many epochs on its settings are chosen."""
    _, _, rows = q.POPULATIONS[cfg.population]
    tuned = tuple(getattr(cfg, name) for name in q.COLUMNS)
    return next(epochs for epochs, row in rows.items() if row == tuned)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# Recipes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("population, changes, shape", [
    ("q0", dict(epochs=16), (1, 4, 4, 1, 2)),
    ("q0", dict(epochs=128), (4, 8, 4, 32, 2)),
    ("snapshots", dict(epochs=64), (2, 8, 4, 32, 2)),
    ("ensemble", dict(epochs=8), (2, 1, 4, 1, 2)),
    ("ensemble", dict(epochs=128), (16, 1, 8, 6, 1)),
    ("chain", dict(epochs=128), (1, 16, 8, 6, 1)),
    ("single", dict(epochs=5), (1, 1, 5, 1, 2)),
    ("single", dict(epochs=8), (1, 1, 8, 6, 1)),
    ("single", dict(epochs=128), (1, 1, 128, 12, 1)),
    # a trajectory for every 32 epochs of the budget that given cycles do not take up
    ("q0", dict(epochs=63), (1, 16, 3, 32, 2)),
    ("q0", dict(epochs=256, cycles=2), (4, 2, 32, 32, 1)),
    ("chain", dict(epochs=64, trajectories=2), (2, 4, 8, 6, 1))])
def test_measured_budgets(population, changes, shape):
    cfg = resolved(population=population, **changes)
    assert shape_of(cfg) == shape
    assert (cfg.boundary, cfg.distill_weight) == q.POPULATIONS[population][:2]


@pytest.mark.parametrize("preset, epochs, shape", [
    ("small", 16, (1, 8, 2, 4)),
    ("q0", 131, (1, 65, 2, 8)),
    ("q0", 960, (5, 96, 2, 8))])
def test_larger_models_keep_the_published_cycles(preset, epochs, shape):
    cfg = resolved(preset, epochs=epochs)
    each = epochs // (cfg.trajectories * cfg.cycles)
    assert (cfg.trajectories, cfg.cycles, each, cfg.distill_after) == shape


@pytest.mark.parametrize("population, from_epochs, shortest, longest, rows", [
    ("q0", 6, 3, 5, {1, 32}),
    ("snapshots", 6, 3, 5, {1, 32}),
    ("ensemble", 12, 6, 10, {6}),
    ("chain", 12, 6, 10, {6})])
def test_no_budget_leaves_the_members_that_were_tuned(
        population, from_epochs, shortest, longest, rows):
    """Measured with cycles of 4 epochs and members of 8; what is chosen for them holds at every
    budget."""
    found = set()
    for epochs in range(from_epochs, 131):
        cfg = resolved(population=population, epochs=epochs)
        lengths = lengths_of(cfg)
        assert sum(lengths) == epochs
        assert lengths == sorted(lengths, reverse=True)  # a rest goes to the first
        assert shortest <= lengths[-1] and lengths[0] <= min(longest, lengths[-1] + 1)
        found.add(row_of(cfg))
    assert found == rows


@settings(max_examples=100, deadline=None)
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


# What is given changes nothing else --------------------------------------------------------------

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
def test_a_flag_changes_no_other_setting(population, gpu):
    """Its value may be 0, which is none."""
    plain = dataclasses.asdict(resolved(population=population, epochs=32))
    for f in SETTINGS:
        values = {another(f, plain[f.name])}
        if f.name in ("softcap", "grad_clip", "dropout", "average", "distill_weight"):
            values.add(0.0)
        for value in values:
            given_ = {"population": population, "epochs": 32, f.name: value}
            mine = dataclasses.asdict(resolved(**given_))
            changed = {name for name in plain if plain[name] != mine[name]}
            assert mine[f.name] == value
            assert changed - {f.name} <= FOLLOW.get(f.name, set())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("population", POPULATIONS)
def test_what_is_derived_has_a_reason(preset, population):
    """In every population and preset: a reason for each, and none for what was given."""
    settings = {**q.PRESETS[preset], "preset": preset, "population": population, "epochs": 32}
    given_ = q.Config(**settings)
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


def test_on_a_gpu(gpu):
    cfg = resolved()
    assert (cfg.device, cfg.precision) == ("cuda", "bfloat16")
    assert cfg.compile and cfg.graphs
    assert not resolved("q0").graphs  # it is not bound by launches
    cpu = resolved(device="cpu")
    assert (cpu.device, cpu.compile, cpu.graphs) == ("cpu", False, False)


def test_on_a_mac(no_gpu, monkeypatch, tmp_path):
    """What can be said of --device mps without one: no CUDA, no compiler, float32, sdpa."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(q.UserError, match="--device mps, but torch sees no GPU of Apple's"):
        resolved(device="mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolved().device == "cpu"  # it has to be asked for
    cfg, why, _ = q.parse_config(["--device", "mps"])
    assert (cfg.preset, cfg.precision, cfg.compile, cfg.graphs) == ("tiny", "float32", False, False)
    assert q.attention_names(cfg, "mps", cfg.seq_len) == ["sdpa"]
    assert not q.use_triton("mps")
    with q.set_up_world(cfg) as world:
        assert world.device == torch.device("mps")
    seeds = []
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    trainer, plan = tiny.trainer(tmp_path / "run", tiny.small(dropout=0.5))
    trainer.start_trajectory(plan[0])
    trainer.start_cycle(plan[0][0])
    trainer.world = dataclasses.replace(trainer.world, device=torch.device("mps"))
    trainer.forward_backward(plan[0][0])
    assert len(set(seeds)) == len(seeds) > 1


# Mistakes and help -------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    (dict(epochs=1, trajectories=2), "--epochs 1 are fewer.*2 trajectories.*give --epochs 2"),
    (dict(epochs=7, cycles=2, trajectories=4), "give --epochs 8, or fewer of them"),
    (dict(width=96), "multiple of --head-dim"),
    (dict(head_dim=128), "--induction needs a second head"),
    (dict(batch_tokens=5000), "--batch-tokens 5000 is not a multiple"),
    (dict(windows="SX"), "--windows"),
    (dict(loop_passes=2, loop_first=2, loop_last=4), "--loop-last 4 is not a range"),
    (dict(device="cuda"), "no GPU"),
    (dict(epochs=0), "--epochs 0 is out of range: 1 to"),
    (dict(lr_matrix=math.nan), "--lr-matrix nan is out of range"),
    (dict(softcap=1001.0), "--softcap 1001.0 is out of range: 0 to 1000"),
    (dict(epochs=True), "--epochs True is not of type int"),
    (dict(windows=None), "None is not of type"),
    (dict(unet=1), "--unet 1 is not of type bool"),
    (dict(population="q1"), "--population q1 is not one of: q0, snapshots")])
def test_refusals(changes, message, no_gpu):
    with pytest.raises(q.UserError, match=message) as refusal:
        resolved(**changes)
    assert "\n" not in str(refusal.value)


def test_help(capsys):
    """Every flag, with the default of the preset."""
    with pytest.raises(SystemExit):
        q.main(["--preset", "q0", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "transformer blocks [30]" in words and "ends in one member [derived: 32]" in words
    for f in dataclasses.fields(q.Config):
        assert f" {q.flag(f.name)}" in words


def test_a_resumed_run_may_change_what_is_of_the_machine():
    names = [f.name for f in dataclasses.fields(q.Config)]
    machine = names[names.index("device"):]
    assert set(machine) - set(q.MACHINE) == {"precision"}  # which is of the method
