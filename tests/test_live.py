"""What a run under way shows: a status line, curves in trackers, curve.png, a profile; `runs`."""
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
import time
from types import SimpleNamespace

import pytest
from forks import (
    CYCLE_ENDS, Fork, at_step, differences, disturbed, losses_of, result_of, start, steps_of)
from tiny import edit_json, fails, read_json, works

import train_q0 as q
from records import live, plot


# Status line ------------------------------------------------------------------------------------

def resize(terminal, columns):
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def screen(text):
    """Lines of a terminal that understands \\r and \\n."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part):]
        lines.append(shown.rstrip())
    return lines


@pytest.mark.parametrize("wide, narrow", [(100, 30), (0, 0), (2, 1)])
def test_status_line(wide, narrow, tmp_path, monkeypatch):
    """The newest step stays in the last line, cut to the width; all else goes above it, and the log
    has every line."""
    terminal, other_end = pty.openpty()
    for name in ("stdout", "stderr"):
        stream = open(os.dup(other_end), "w", buffering=1, encoding="utf-8")
        monkeypatch.setattr(sys, name, stream)
    resize(terminal, wide)
    *_, status = live.begin(q.Config(data="x"), {}, SimpleNamespace(track=None, profile=False))
    stream = sys.stdout
    status.start(None)
    log = q.Log(tmp_path / "log.txt", 0, [status])
    step = dict(traj=0, cycle=(1, 2), loss=3.25, eta="0:01:00")
    for i in range(1, 5):
        log.event(step=(i, 4), **step, **{"tok/s": 48_000})
        if i == 2:
            q.say("notice: it is late", "stderr")
            log.event(member=0, val_loss=3.5)
            resize(terminal, narrow)
    status.close()
    assert sys.stdout is stream
    q.say("the end")
    text = ""
    while not text.endswith("the end\r\n"):
        text += os.read(terminal, 10_000).decode()
    assert screen(text) == ["notice: it is late", "member:0 val_loss:3.50000", "the end", ""]
    if wide == 100:
        frames = [frame.rstrip() for frame in re.findall("\r(step[^\r\n]*)", text)]
        line = r"step:\d/4 loss:3.25000 eta:0:01:00 traj:0 cycle:1/2 tok/s:48000 +\d+%\|.*\|"
        assert re.fullmatch(line, frames[0]) and len(frames[0]) == 99
        assert frames[-1] == "step:4/4 loss:3.25000 eta:0:01:00"[:29]
    texts = (tmp_path / "log.txt").read_text().splitlines()
    assert [text.split(":")[0] for text in texts] == ["step", "step", "member", "step", "step"]
    os.close(terminal)
    os.close(other_end)


# Trackers ---------------------------------------------------------------------------------------

class Wandb:
    """Stands in for the wandb module: it keeps what it is given, and refuses steps that go back."""
    def __init__(self, file, breaks=False):
        self.file = file
        self.breaks = breaks

    def init(self, **options):
        self.keep({name: str(value) for name, value in options.items() if name != "config"})
        assert "loss_cap" not in options["config"] and options["config"]["width"] == 32
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


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_with_its_curve(kind, base, logs):
    """Killed between two states: what comes again is not sent again, and no number of the run is
    another one."""
    module = Wandb(logs.parent / "sent.jsonl")

    def plant():
        sys.modules[kind] = module

    def dies():
        plant()
        at_step(13)()

    start(base, logs, *CYCLE_ENDS, "--track", kind, plant=dies).dies()
    before = [entry["step"] for entry in module.kept() if "step" in entry]
    Fork(logs, "--resume", "x", "--track", kind, plant=plant).good()
    assert not disturbed(base, logs)
    sent = module.kept()
    first, second = [entry for entry in sent if "resume" in entry]
    assert first == second and first["resume"] == "allow"
    assert first["name" if kind == "trackio" else "id"]
    train = [entry["train/loss"] for entry in sent if "train/loss" in entry]
    assert before and train == pytest.approx(losses_of(logs / "x"), abs=5.1e-6)
    curve = result_of(logs / "x")["curve"]
    for name, key in (("member", "loss"), ("uniform", "uniform"), ("learned", "learned")):
        losses = [entry[f"{name}/val_loss"] for entry in sent if f"{name}/val_loss" in entry]
        assert losses == [entry[key] for entry in curve]
    assert sent[-1] == {"finish": True}
    assert sent[-2]["final/val_loss"] == curve[-1]["learned"]


def test_trajectories_are_curves_of_their_own(trained, monkeypatch, tmp_path):
    module = Wandb(tmp_path / "sent.jsonl")
    monkeypatch.setitem(sys.modules, "wandb", module)
    trained("two", "--trajectories", 2, "--cycles", 2, "--track", "wandb")
    names = [entry["name"] for entry in module.kept() if "name" in entry]
    assert names == ["two 0", "two 1"]
    assert len({entry["id"] for entry in module.kept() if "id" in entry}) == 2


def test_a_tracker_that_fails_is_off(base, logs):
    def plant():
        sys.modules["wandb"] = Wandb(logs.parent / "sent.jsonl", breaks=True)

    fork = start(base, logs, "--track", "wandb", plant=plant).good()
    told = "notice: --track wandb is off: ConnectionError: no route to the tracker\n"
    assert fork.err.count("notice") == 1 and told in fork.err
    assert not disturbed(base, logs)


def test_a_tracker_that_is_not_there(flags, logs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    fails(capsys, "--track trackio needs its library: pip install trackio ", *flags, "--track",
          "trackio")
    assert not logs.exists()


def test_tensorboard(trained):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trained("x", "--track", "tensorboard", "--cycles", 2)
    found = reader.EventAccumulator(str(run / "tensorboard/0")).Reload()
    shown = {point.step: point.value for point in found.Scalars("train/loss")}
    assert shown == pytest.approx(dict(steps_of(run)), abs=5.1e-6)
    learned = [point.value for point in found.Scalars("learned/val_loss")]
    assert learned == pytest.approx([e["learned"] for e in read_json(run / "result.json")["curve"]])


# Curve and profile ------------------------------------------------------------------------------

def test_curve_is_drawn_where_it_costs_little(finished, monkeypatch):
    """The clock goes on by 120 seconds a reading: drawing after 240 s may not take 120."""
    now = iter(range(0, 10_000, 120))
    monkeypatch.setattr(live.time, "perf_counter", lambda: next(now))
    drawn = []
    monkeypatch.setattr(plot, "draw_curve", lambda path, *args: drawn.append(path))
    curve = live.Curve()
    cfg = SimpleNamespace(report="val")
    curve.start(SimpleNamespace(run=SimpleNamespace(folder=finished), cfg=cfg))
    for _ in range(5):
        curve.event(member=3)
        curve.event("ensemble", prior="uniform")
        curve.event("ensemble", prior="learned")
    assert drawn == [finished / "curve.png"]


def test_profile(trained, capsys, base):
    """Of two steps; the run goes on, to the same numbers."""
    plain = trained("plain")
    run = trained("x", "--profile")
    out = capsys.readouterr().out
    table = re.findall(r"^ +[\d.]+ +[\d.]+% +\d+  \S.*$", out, re.M)
    assert len(table) == 15 and "profile of 2 steps: " in out
    names = {event["name"] for event in read_json(run / "trace.json")["traceEvents"]}
    assert "aten::mm" in names
    assert not differences(plain, run, ["weights", "log"])


# runs -------------------------------------------------------------------------------------------

BROKEN = ("pipes", "empty", "pipe", "endless", "evil?[2J", "huge")


def test_runs(finished, interrupted, logs, capsys):
    """Their states, told by locks; folders that are no runs, or hostile, stop nothing."""
    shutil.copytree(finished, logs / "done")
    for name in ("running", "elsewhere", "silent", "pipes"):
        shutil.copytree(interrupted, logs / name)
    held = q.Lock(logs / "running/state/0.lock")
    assert held.acquire()
    for name, age in (("elsewhere", 10), ("silent", 1000)):
        lock = logs / f"{name}/state/0.lock"
        lock.write_text("another machine")
        os.utime(lock, (time.time() - age,) * 2)
    os.mkfifo(logs / "pipes/log_trajectory1.txt")
    for name in ("empty", "pipe", "endless", "evil\x1b[2J", "huge"):
        (logs / name).mkdir()
    os.mkfifo(logs / "pipe/run.json")
    (logs / "endless/run.json").symlink_to("/dev/zero")
    for name, changes in (("evil\x1b[2J", dict(population="\x1b[2J")), ("huge", dict(epochs=1e99))):
        about = read_json(interrupted / "run.json")
        (logs / name / "run.json").write_text(
            json.dumps({**about, "config": {**about["config"], **changes}}))
    (logs / "notes.txt").touch()
    edit_json(logs / "done/run.json", time="2020-01-01T00:00:00")
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
        "silent": "stopped", **dict.fromkeys(BROKEN, "broken")}
    learned = [e for e in plot.entries_of(interrupted)][-1]["learned"]
    assert re.search(rf"^x +\S+ \S+ +q0 +6 +2/3 +stopped +{learned:.5f}$", out, re.M)
