"""Resume: a run that is stopped, killed or moved goes on as if nothing had happened. CPU only.

A fork may plant something first, such as its own SIGKILL at the n-th call of a function.
"""
import functools
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import main as torchrun

import records.plot
import train_q0 as q
from forks import (
    CYCLE_ENDS, EVERY_STEP, TWO, Fork, at_call, at_step, command, die, differences, disturbed,
    log_of, losses_of, planted, reference, result_of, resume, start, states_of,
    steps_of, weights_of)
from tiny import fails, flip, snapshot


def half_written(where, n):
    """Plant the end of the machine in the middle of a write: the temporary file has half its
    bytes."""
    def plant():
        real = os.replace
        calls = []

        def replace(source, target):
            if re.search(where, str(target)):
                calls.append(target)
                if len(calls) == n:
                    os.truncate(source, os.path.getsize(source) // 2)
                    die()
            real(source, target)
        os.replace = replace
    return plant


def resumed(base, logs, *more):
    """--resume it to its end, which is that of a run that nothing disturbed; returns the fork."""
    fork = resume(logs, *more).good()
    assert not disturbed(base, logs), fork.out
    assert not list((logs / "x").rglob("*.tmp"))  # each is as large as a state
    tensors = {file.stem for file in logs.glob("x/state/*.safetensors")}
    assert tensors == states_of(logs / "x").keys()
    return fork


def test_the_reference_is_worth_comparing(base):
    """It learns, it is taught, and one changed bit of each kind is seen."""
    run = reference(base)
    curve = result_of(run)["curve"]
    assert curve[-1]["learned"] < curve[0]["loss"] - 0.1
    assert [entry["distilled"] for entry in curve] == [0, 1, 1]
    assert sorted(states_of(run)) == ["0-000000015", "0-000000015_done"]
    for name, kind in (("predictions/2.safetensors", "weights"), ("log.txt", "log")):
        copy = shutil.copytree(run, run.with_name("copy"), dirs_exist_ok=True)
        at = (copy / name).read_bytes().rfind(b"_loss") + 10  # a digit, or a byte of the head
        flip(copy / name, at)
        assert differences(run, copy) == [kind], name


# Kill -9: at chosen moments, from inside, and at random ones, from outside

MOMENTS = {  # what happens there: (saves, what is planted, the step that it goes on from)
    "before the first state": (CYCLE_ENDS, at_step(4), None),
    "in a step": (EVERY_STEP, at_step(12), 11),
    "tensors written, JSON not": (
        EVERY_STEP, planted(os, "replace", 7, where=r"state/.*\.safetensors$", after=True), 6),
    "JSON of a state": (EVERY_STEP, half_written(r"state/.*\.json$", 9), 8),
    "a member": (CYCLE_ENDS, half_written(r"members/1/model\.safetensors$", 1), 10),
    "evaluation": (CYCLE_ENDS, planted(q, "true_token_probs", 6), 15),
    "the result": (CYCLE_ENDS, half_written(r"result\.json$", 1), None)}
SLOW = {
    "tensors of a state": (EVERY_STEP, half_written(r"state/.*\.safetensors$", 12), 11),
    "fit of the prior": (CYCLE_ENDS, planted(q, "fit_prior", 2), 10),
    "tensors written, not synced": (EVERY_STEP, planted(os, "fsync", 20), None),
    "predictions": (CYCLE_ENDS, half_written(r"predictions/1\.", 1), 10),
    "done, not yet saved": (EVERY_STEP, half_written("_done.json$", 1), 15)}
RARE = [pytest.param(moment, marks=pytest.mark.slow) for moment in SLOW]


@pytest.mark.parametrize("moment", [*MOMENTS, *RARE])
def test_killed_at(moment, base, logs):
    saves, plant, step = {**MOMENTS, **SLOW}[moment]
    start(base, logs, *saves, plant=plant).dies()
    assert not (logs / "x/result.json").exists()
    fork = resumed(base, logs)
    if step:
        assert fork.went_on_from == {0: step}


def test_killed_with_two_trajectories(base, logs):
    """In the second, then after their logs were joined: --run goes on, too."""
    argv = command(base, *TWO)
    Fork(logs, *argv, plant=at_step(15 + 9)).dies()
    again = Fork(logs, *argv, plant=half_written(r"result\.json$", 1)).dies()
    assert again.went_on_from == {1: 5}
    Fork(logs, *argv).good()
    assert not disturbed(base, logs, *TWO)


def test_killed_at_random(base, tmp_path, request):
    """From outside; the run that goes on is killed too."""
    rng = random.Random(time.time_ns())
    argv = command(base, *EVERY_STEP)
    for attempt in range(20 if request.config.getoption("--slow") else 1):
        logs = tmp_path / f"{attempt}/logs"
        for _ in range(2):  # --run goes on where there is a run
            fork = Fork(logs, *argv)
            time.sleep(rng.uniform(0.1, 1))  # a run takes a second
            fork.kill()
            assert fork.wait() in (-signal.SIGKILL, 0)
        Fork(logs, *argv).good()
        assert not disturbed(base, logs)


# When a state is saved, and what is in it

def test_saved_at_cycle_ends_and_on_a_timer(base, tmp_path):
    def plant():
        real = q.Run.save_state

        def save(run, at, tensors):
            print(f"\nsaved:{at.step}", flush=True)
            real(run, at, tensors)
        q.Run.save_state = save

    def saves(minutes):
        argv = command(base, "--save-minutes", minutes)
        fork = Fork(tmp_path / str(minutes) / "logs", *argv, plant=plant).good()
        return [int(step) for step in re.findall(r"^saved:(\d+)", fork.out, re.M)]

    ends = [5, 10, 15, 15]  # done
    assert saves(1000) == ends
    assert saves(0) == [*range(1, 16), 15]
    assert set(ends) < set(saves(0.02 / 60))  # a step takes 10 ms, on a busy machine 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_signal(number, base, logs):
    """It saves the step under way, though nothing else would have."""
    def plant():
        signal.signal(number, signal.SIG_DFL)  # tests in the background ignore SIGINT
        at_step(7, lambda: os.kill(os.getpid(), number))()
    fork = start(base, logs, *CYCLE_ENDS, plant=plant)
    assert fork.wait() == 128 + number, fork.err
    assert fork.err.splitlines() == [
        "stopping after this step; once more to stop at once",
        "stopped; its state is saved: go on with --resume and the run's name"]
    assert sorted(states_of(logs / "x")) == ["0-000000005", "0-000000007"]
    assert resumed(base, logs).went_on_from == {0: 7}


def test_a_second_signal_stops_at_once(base, logs):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    plant = at_step(7, twice)
    start(base, logs, *CYCLE_ENDS, plant=plant).dies(signal.SIGTERM)
    assert sorted(states_of(logs / "x")) == ["0-000000005"]


# Runs that go on elsewhere, or with other settings

def test_resume_by_path_and_of_nothing(base, killed, logs, tmp_path, capsys):
    moved = shutil.copytree(killed, tmp_path / "moved")
    Fork(logs, "--resume", moved).good()
    assert differences(reference(base), moved) == []
    fails(capsys, "no run x under", "--resume", "x")
    (logs / "y").mkdir()
    fails(capsys, r"y/run\.json is missing or damaged.*start a new run", "--resume", "y")


def test_changed_settings(base, interrupted, logs):
    """Those of the method are refused, all in one line; those of the machine may change."""
    before = snapshot(interrupted)
    resume(logs, "--lr-matrix", "0.03", "--no-unet", "--precision", "bfloat16").fails(
        "x exists and differs in lr_matrix, precision: give another --run name, or the settings")
    assert snapshot(interrupted) == before
    again = resume(logs, "--keep-members", "9", "--lr-matrix", "0.04", "--attention", "plain")
    assert again.good().went_on_from == {0: 11}
    assert re.search("notice: step 11 was reached with .*, now .*'plain'.*: rounding", again.out)
    # attention computed in another order: rounding of float32, grown over four steps
    losses = losses_of(reference(base))
    assert losses_of(interrupted) == pytest.approx(losses, abs=1e-3)


def test_edited_script(base, interrupted, logs, monkeypatch, capsys):
    """Refused; where it is allowed the log says so."""
    before = snapshot(interrupted)
    monkeypatch.setattr(q, "SOURCE", q.SOURCE + "# edited\n")
    told = r"x exists and differs in the script \(--allow-edited goes on; .*script it began with"
    fails(capsys, told, "--resume", "x")
    assert snapshot(interrupted) == before
    assert resume(logs, "--allow-edited").good().went_on_from == {0: 11}
    monkeypatch.undo()
    assert "\nnotice: from here on the script is another one (--allow-" in log_of(interrupted)
    assert losses_of(interrupted) == losses_of(reference(base))
    assert "x is complete" in resume(logs).good().out


@pytest.mark.parametrize("longer", [True, False])
def test_the_log_goes_on_where_the_state_left_it(longer, base, interrupted, logs):
    """What was logged after it comes again, and --log-every may change; of a log that lost its end
    in a power loss no zero bytes are wanted."""
    if not longer:
        log = interrupted / "log.txt"
        os.truncate(log, log.stat().st_size - 500)
        resume(logs).good()
        assert b"\0" not in log.read_bytes()
        return
    with open(interrupted / "log.txt", "a") as file:
        file.write("what was logged after the state\nhalf a li")
    resume(logs, "--log-every", "2").good()
    assert [step for step, _ in steps_of(interrupted)] == [*range(1, 13), 14, 15]
    assert "half a li" not in log_of(interrupted)
    assert weights_of(interrupted) == weights_of(reference(base))


def test_keep_members(base, logs):
    """Weights of the newest alone, predictions of all. Killed after the last evaluation, and the
    newest state is damaged: the one before needs an older member."""
    plant = half_written("_done.safetensors$", 1)
    start(base, logs, "--keep-members", "1", plant=plant).dies()
    assert sorted(states_of(logs / "x")) == ["0-000000010", "0-000000015"]
    (logs / "x/state/0-000000015.json").write_text("{}")
    resume(logs).good()
    kept = sorted(file.parent.name for file in logs.glob("x/members/*/model.safetensors"))
    assert kept == ["2"]
    assert result_of(logs / "x") == result_of(reference(base))
    found = weights_of(logs / "x")
    assert len(found) == 3 + 1 and found.items() <= weights_of(reference(base)).items()


# torchrun

def die_once(*argv):
    """As a script: the last rank kills itself in its fourth step, the first time."""
    q.LOGS = Path(os.environ["TEST_LOGS"])
    records.plot.draw_curve = lambda *args: None
    mark = q.LOGS / "died"
    last = int(os.environ["WORLD_SIZE"]) - 1

    def act():
        mark.touch()
        die()
    if int(os.environ["RANK"]) == last and not mark.exists():
        at_call(q.Optimizer, "step", 4, act=act)
    return q.main(list(argv))


@pytest.mark.parametrize("processes", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_torchrun_restarts(processes, base, logs):
    """A rank is killed; torchrun ends the other, starts both again, and the run goes on."""
    argv = command(base, *EVERY_STEP)
    argv[argv.index("--run")] = "--name"  # torchrun would take --run for an option of its own
    launch = ["--standalone", "--max-restarts=1", f"--nproc_per_node={processes}", __file__]
    call = functools.partial(torchrun, [*launch, *map(str, argv)])
    paths = os.pathsep.join([str(q.ROOT), str(q.ROOT / "data")])
    fork = Fork(logs, call=call, TEST_LOGS=logs, PYTHONPATH=paths).good(150)
    assert fork.went_on_from == {0: 3}
    assert (logs / "died").exists()
    assert not disturbed(base, logs, size=processes)


if __name__ == "__main__":
    sys.exit(die_once(*sys.argv[1:]))
