"""Resume: a run that is stopped, killed or moved goes on as if nothing had happened. CPU only.

A fork may plant something first, such as its own SIGKILL at the n-th call of a function.
"""
import os
import re
import shutil
import signal

import pytest

import train_q0 as q
from forks import (
    CYCLE_ENDS, EVERY_STEP, TWO, Fork, at_step, command, die, differences, disturbed, log_of,
    losses_of, planted, reference, result_of, resume, start, states_of, weights_of)
from tiny import fails, flip, snapshot


def half_written(where):
    """Plant the end of the machine in the middle of a write: the temporary file has half its
    bytes."""
    def plant():
        real = os.replace

        def replace(source, target):
            if re.search(where, str(target)):
                os.truncate(source, os.path.getsize(source) // 2)
                die()
            real(source, target)
        os.replace = replace
    return plant


def test_the_reference_is_worth_comparing(base):
    """It learns, it is taught, and a changed bit is seen."""
    run = reference(base)
    curve = result_of(run)["curve"]
    assert curve[-1]["learned"] < curve[0]["loss"] - 0.1
    assert [entry["distilled"] for entry in curve] == [0, 1, 1]
    copy = shutil.copytree(run, run.with_name("copy"))
    flip(copy / "predictions/2.safetensors")
    assert differences(run, copy) == ["weights"]


MOMENTS = {  # what happens there: (saves, what is planted, the step that it goes on from)
    "before the first state": (CYCLE_ENDS, at_step(4), None),
    "tensors written, JSON not": (
        EVERY_STEP, planted(os, "replace", 7, where=r"state/.*\.json$"), 6),
    "JSON of a state": (EVERY_STEP, half_written("state/0-000000009.json"), 8),
    "a member": (CYCLE_ENDS, half_written("members/1/model.safetensors"), 10),
    "evaluation": (CYCLE_ENDS, planted(q, "true_token_probs", 6), 15)}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(moment, base, logs):
    saves, plant, step = MOMENTS[moment]
    start(base, logs, *saves, plant=plant).dies()
    assert not (logs / "x/result.json").exists()
    fork = resume(logs).good()
    assert not disturbed(base, logs), fork.out
    assert not list((logs / "x").rglob("*.tmp"))  # each is as large as a state
    tensors = {file.stem for file in logs.glob("x/state/*.safetensors")}
    assert tensors == states_of(logs / "x").keys()
    if step:
        assert fork.went_on_from == {0: step}


def test_killed_with_two_trajectories(base, logs):
    """In the second, then after their logs were joined: --run goes on, too."""
    argv = command(base, *TWO)
    Fork(logs, *argv, plant=at_step(15 + 9)).dies()
    again = Fork(logs, *argv, plant=half_written("result.json")).dies()
    assert again.went_on_from == {1: 5}
    Fork(logs, *argv).good()
    assert not disturbed(base, logs, *TWO)


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
    assert resume(logs).good().went_on_from == {0: 7}
    assert not disturbed(base, logs)


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
    fails(capsys, r"x exists and differs in the script \(--allow-edited", "--resume", "x")
    assert snapshot(interrupted) == before
    assert resume(logs, "--allow-edited").good().went_on_from == {0: 11}
    monkeypatch.undo()
    assert "\nnotice: from here on the script is another one (--allow-" in log_of(interrupted)
    assert losses_of(interrupted) == losses_of(reference(base))


def test_keep_members(base, logs):
    """Weights of the newest alone, predictions of all. Killed after the last evaluation, and the
    newest state is damaged: the one before needs an older member."""
    plant = half_written("_done.safetensors")
    start(base, logs, "--keep-members", "1", plant=plant).dies()
    assert sorted(states_of(logs / "x")) == ["0-000000010", "0-000000015"]
    (logs / "x/state/0-000000015.json").write_text("{}")
    resume(logs).good()
    kept = sorted(file.parent.name for file in logs.glob("x/members/*/model.safetensors"))
    assert kept == ["2"]
    assert result_of(logs / "x") == result_of(reference(base))
    found = weights_of(logs / "x")
    assert len(found) == 3 + 1 and found.items() <= weights_of(reference(base)).items()
