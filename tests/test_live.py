"""What a run under way shows: curves in trackers, a profile; `runs`. The machines of
a first hour."""
import errno
import json
import os
import re
import shutil
import signal
import sys
import time

import pytest
import tiny
import torch
from forks import (
    CYCLE_ENDS, Fork, at_step, command, differences, disturbed, losses_of, planted, reference,
    result_of, resume, start, weights_of)
from tiny import edit_json, read_json, works

import train_q0 as q
from records import plot


class Wandb:
    """The wandb module: it keeps what it is given, and refuses steps that go back."""
    def __init__(self, file, breaks=False):
        self.file = file
        self.breaks = breaks

    def init(self, **options):
        assert options["config"]["width"] == 32
        self.keep({"id": options["id"]})
        self.step = max([0, *(entry.get("step", 0) + 1 for entry in self.kept())])
        return self

    def log(self, values, step):
        if self.breaks:
            raise ConnectionError("no route\nto the tracker")
        assert step >= self.step
        self.step = step
        self.keep({"step": step, **values})

    def finish(self):
        self.keep({"finish": True})

    def keep(self, entry):
        with open(self.file, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def kept(self):
        return [json.loads(line) for line in self.file.read_text().splitlines()]


def test_a_resumed_run_goes_on_with_its_curve(base, logs):
    """Killed between two states: what comes again is not sent again, and no number of the run is
    another one."""
    module = Wandb(logs.parent / "sent.jsonl")

    def plant():
        sys.modules["wandb"] = module

    def dies():
        plant()
        at_step(13)()

    start(base, logs, *CYCLE_ENDS, "--track", "wandb", plant=dies).dies()
    before = [entry["step"] for entry in module.kept() if "step" in entry]
    Fork(logs, "--resume", "x", "--track", "wandb", plant=plant).good()
    assert not disturbed(base, logs)
    sent = module.kept()
    first, second = [entry for entry in sent if "id" in entry]
    assert first == second
    train = [entry["train/loss"] for entry in sent if "train/loss" in entry]
    assert before and train == pytest.approx(losses_of(logs / "x"), abs=5.1e-6)
    curve = result_of(logs / "x")["curve"]
    losses = [entry["learned/val_loss"] for entry in sent if "learned/val_loss" in entry]
    assert losses == [entry["learned"] for entry in curve]
    assert sent[-1] == {"finish": True}
    assert sent[-2]["final/val_loss"] == curve[-1]["learned"]


def test_a_profile_and_a_tracker_that_fails(trained, logs, monkeypatch, capsys):
    """Of two steps. The run goes on, to the same numbers."""
    plain = trained("plain")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(logs.parent / "sent.jsonl", breaks=True))
    capsys.readouterr()
    run = trained("x", "--profile", "--track", "wandb")
    out, error = capsys.readouterr()
    assert error == "notice: --track wandb is off: ConnectionError: no route to the tracker\n"
    table = re.findall(r"^ +[\d.]+ +[\d.]+% +\d+  \S.*$", out, re.M)
    assert len(table) == 15 and "profile of 2 steps: " in out
    names = {event["name"] for event in read_json(run / "trace.json")["traceEvents"]}
    assert "aten::mm" in names
    assert not differences(plain, run, ["weights", "log"])


def test_runs(finished, interrupted, logs, capsys):
    """Their states, told by locks; folders that are no runs, or hostile, stop nothing."""
    shutil.copytree(finished, logs / "done")
    edit_json(logs / "done/run.json", time="2020-01-01T00:00:00")
    for name in ("running", "elsewhere", "silent"):
        shutil.copytree(interrupted, logs / name)
    held = q.Lock(logs / "running/state/0.lock")
    assert held.acquire()
    for name, age in (("elsewhere", 10), ("silent", 1000)):
        lock = logs / f"{name}/state/0.lock"
        lock.write_text("another machine")
        os.utime(lock, (time.time() - age,) * 2)
    (logs / "evil\x1b[2J").mkdir()
    out = works(capsys, "runs")
    held.release()
    header, first, *_ = lines = out.splitlines()
    assert "\x1b" not in out and len({len(line) for line in lines}) == 1
    loss = read_json(finished / "result.json")["final_val_loss"]
    assert first.split() == ["done", "2020-01-01", "00:00", "q0", "24", "4/4", "complete",
                             f"{loss:.5f}"]
    states = {line.split()[0]: line.split()[-2] for line in lines[1:]}
    assert states == {
        "done": "complete", "x": "stopped", "running": "running", "elsewhere": "running",
        "silent": "stopped", "evil?[2J": "broken"}
    learned = [e for e in plot.entries_of(interrupted)][-1]["learned"]
    assert re.search(rf"^x +\S+ \S+ +q0 +6 +2/3 +stopped +{learned:.5f}$", out, re.M)


def test_a_rank_of_no_launch_without_locks_or_a_compiler(base, logs):
    """It is the whole of a run, as any other; what lacks is said once."""
    def fails(*args):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

    def refuses(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    def plant():
        q.fcntl.flock = refuses
        q.Trainer.compile_blocks = lambda self: None
        planted(q.Trainer, "warm_up", 1, act=fails)()

    fork = Fork(logs, *command(base), "--compile", plant=plant, RANK=3).good()
    assert "notice: nothing is compiled: TorchDynamoException: no C++ compiler" in fork.err
    assert "compiled:False" in (logs / "x/log.txt").read_text()
    assert ".lock cannot be locked" in fork.err and "start no second launch" in fork.err
    assert weights_of(logs / "x") == weights_of(reference(base))


def test_the_script_alone(base, logs):
    """Without records/ it trains and goes on; a later launch that has them writes the result."""
    def plant():
        sys.modules["records"] = None

    def dies():
        plant()
        at_step(9)()

    start(base, logs, plant=dies).dies()
    fork = resume(logs, plant=plant).good()
    assert fork.went_on_from == {0: 5}
    assert "notice: without records/ a launch only trains: " in fork.err
    assert not (logs / "x/result.json").exists()
    assert "written to" in resume(logs).good().out
    assert not disturbed(base, logs, kinds=("weights", "result"))


def test_a_slow_run_does_not_hang(base, logs):
    """15 steps of 0.1 s."""
    step = q.Optimizer.step

    def slow(*args):
        time.sleep(0.1)
        step(*args)

    def plant():
        q.Optimizer.step = slow

    Fork(logs, *command(base, "--hang-minutes", 0.02), plant=plant).good()


def test_a_terminal_that_is_gone_loses_nothing(base, logs):
    """Its hangup saves and stops though nobody can be told."""
    def plant():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGHUP))()

    assert start(base, logs, plant=plant).wait() == 128 + signal.SIGHUP
    assert resume(logs).good().went_on_from == {0: 4}


def test_every_step_drops_other_units(tmp_path):
    """The seed of a micro-batch is of its trajectory, step and place."""
    cfg = tiny.small(dropout=0.5, batch_tokens=256)
    trainer, plan = tiny.trainer(tmp_path / "run", cfg)
    trainer.start_trajectory(plan[0])
    trainer.start_cycle(plan[0][0])
    seeds = []
    trainer.micro_batch[False] = lambda: seeds.append(torch.initial_seed())
    for step in range(2):
        trainer.forward_backward(plan[0][0])
        trainer.at.step += 1
    assert len(set(seeds)) == len(seeds) == 2 * (256 // 16 // cfg.micro_batch)
