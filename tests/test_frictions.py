"""The mistakes and machines of a first hour: leftovers of a launcher, misspelt words, signals,
closed outputs, other people's permissions, lost files."""
import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch

import tiny
import train_q0 as q
from forks import Fork, at_step, command, reference, resume, start, weights_of
from tiny import fails

SCRIPT = [sys.executable, q.ROOT / "train_q0.py"]


def process(*argv, **env):
    return subprocess.Popen(
        [*map(str, SCRIPT), *map(str, argv)], text=True, env={**os.environ, **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# Leftovers of torchrun --------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", ["", "two", "-1"])
def test_a_variable_that_is_no_number(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    fails(capsys, f"environment variable {name} is '{value}', not a number: unset it")


@pytest.mark.parametrize("rank, size", [("3", "1"), ("5", "2"), ("0", "0")])
def test_a_rank_that_is_not_of_the_launch(rank, size, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr(q.time, "sleep", lambda seconds: None)
    told = f"environment variable RANK is {rank}, but WORLD_SIZE is {size}: unset both"
    fails(capsys, told, "--device", "cpu")


@pytest.mark.parametrize("argv, said", [
    (["--resume", ""], "run.json is missing or damaged"),
    (["--run", ""], "--run  must be a plain name"),
    (["--cycles", "1000000000"], "--cycles 1000000000 is out of range")])
def test_what_a_script_passes_by_mistake(argv, said, corpus, logs, capsys):
    fails(capsys, said, "--data", corpus, *argv)


def test_no_address_to_meet_at(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert q.main(["--device", "cpu", "--batch-tokens", "4096"]) == 2
    waits, error = capsys.readouterr().err.splitlines()
    assert waits == "rank 0 waits for 1 more processes: unset WORLD_SIZE if you meant one"
    assert re.search("the other 1 processes are not there: .*MASTER_ADDR", error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_waits_for_other_processes_hears_a_signal(number):
    before = signal.signal(number, signal.SIG_DFL)  # a shell's background jobs ignore SIGINT
    try:
        run = process("--device", "cpu", "--batch-tokens", 4096, RANK="0", WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    finally:
        signal.signal(number, before)
    assert run.stderr.readline().startswith("rank 0 waits for 1 more processes")
    time.sleep(0.5)
    run.send_signal(number)
    assert run.wait(20) == -number


def test_the_others_do_not_come(monkeypatch, capsys):
    for name, value in dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT="9").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(q, "JOIN_TIME", q.datetime.timedelta(seconds=1))
    monkeypatch.setattr(q.time, "sleep", lambda seconds: None)
    assert q.main(["--device", "cpu", "--batch-tokens", "4096"]) == 2
    assert "rank 1: the other 1 processes are not there: " in capsys.readouterr().err


# Words ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, said", [
    (["plna"], "unknown command plna: did you mean plan?"),
    (["list"], "unknown command list: give flags to train, or one of plan, "),
    (["--epoch", "3"], "unknown argument --epoch: did you mean --epochs?"),
    (["--lr", "0.1"], "unknown argument --lr: see --help"),
    (["--wandb"], "unknown argument --wandb: see --help")])
def test_only_a_near_miss_gets_a_suggestion(argv, said, capsys):
    fails(capsys, re.escape(said), *argv)


def test_a_run_that_is_not_there_names_the_newest(logs, capsys):
    for age, name in enumerate(["b", "a", "d", "c"]):
        folder = logs / name
        folder.mkdir(parents=True)
        os.utime(folder, (0, 1000 - age))
    fails(capsys, "no run x under .*; there is b; there is a; there is d$", "select", "x")


def test_help_shows_the_defaults_of_the_preset(capsys):
    shown = {}
    for preset in ("tiny", "q0"):
        with pytest.raises(SystemExit):
            q.main(["--population", "q0", "--preset", preset, "--help"])
        shown[preset] = " ".join(capsys.readouterr().out.split())
    assert "transformer blocks [4]" in shown["tiny"] and "transformer blocks [30]" in shown["q0"]
    for preset, derived in (("tiny", 4), ("q0", 32)):
        assert f"ends in one member [derived: {derived}]" in shown[preset]
        assert "whose weights are kept; without it all [None]" in shown[preset]


# Names and files --------------------------------------------------------------------------------

def test_names_of_one_second_differ(logs, monkeypatch):
    class Clock(q.datetime.datetime):
        @classmethod
        def now(cls):
            return times.pop(0)

    times = [q.datetime.datetime(2026, 1, 1, 0, 0, second) for second in (1, 1, 1, 2)]
    monkeypatch.setattr(q.datetime, "datetime", Clock)
    monkeypatch.setattr(q.time, "sleep", lambda seconds: None)
    assert q.new_name() == "2026-01-01_00-00-01"
    assert q.new_name() == "2026-01-01_00-00-02"


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_others_can_read_what_the_umask_lets_them(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        q.write_atomically(tmp_path / "x", lambda tmp: q.save_tensors({}, tmp))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


def test_runs_elsewhere(tmp_path):
    run = process("select", "x", Q0_LOGS=str(tmp_path))
    assert run.wait(60) == 2
    assert f"no run x under {tmp_path}" in run.stderr.read()


def test_what_a_run_lost_of_its_data_is_copied_again(base, logs):
    start(base, logs, plant=at_step(3)).dies()
    manifest = logs / "x/data/manifest.json"
    text = manifest.read_bytes()
    manifest.unlink()
    resume(logs).good()
    assert manifest.read_bytes() == text


def test_only_states_of_its_own_are_deleted(base, logs):
    start(base, logs, plant=at_step(3)).dies()
    others = [logs / "x/state" / name for name in ("0-notes.txt", "0-1.json", "0-copy.safetensors")]
    for file in others:
        file.touch()
    resume(logs).good()
    assert all(file.exists() for file in others)


def test_a_changed_configuration_of_a_member_is_seen(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "copy")
    path = run / "members/0/config.json"
    about = json.loads(path.read_text())
    about["config"]["softcap"] = 20.0
    path.write_text(json.dumps(about))
    fails(capsys, "member .*0 is missing or damaged: .*sha256 of config.json", "evaluate", run,
          "--data", run.parent)


# Signals and outputs ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_warning_saves_and_stops(name, base, logs):
    """A closed terminal, and what a cluster sends before it kills."""
    number = getattr(signal, name)

    def plant():
        signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored
        at_step(4, lambda: os.kill(os.getpid(), number))()

    fork = start(base, logs, plant=plant)
    assert fork.wait() == 128 + number
    assert resume(logs).good().went_on_from == {0: 4}


def test_time_spent_suspended_does_not_count(base, logs):
    """Ctrl-Z for longer than a step may hang."""
    def plant():
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGTSTP))()

    fork = Fork(logs, *command(base, "--hang-minutes", 0.02), plant=plant)
    while not os.waitid(os.P_PID, fork.pid, os.WSTOPPED | os.WNOHANG):
        time.sleep(0.01)
    time.sleep(2.5)
    os.kill(fork.pid, signal.SIGCONT)
    fork.good()


@pytest.mark.parametrize("output", ["closed", "none"])
def test_a_terminal_that_is_gone_loses_nothing(output, base, logs):
    """Its hangup saves and stops though nobody can be told."""
    def plant():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        if output == "none":
            sys.stderr = sys.__stderr__ = None
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGHUP))()

    assert start(base, logs, plant=plant).wait() == 128 + signal.SIGHUP
    assert resume(logs).good().went_on_from == {0: 4}


def test_a_closed_standard_output_does_not_end_a_run(base, logs):
    """As of `train_q0.py | head -1`; a full disk raises likewise."""
    def plant():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)

    start(base, logs, plant=plant).good()
    assert (logs / "x/result.json").exists()


def test_without_a_compiler_a_run_is_eager(base, logs):
    """Also with a temporary folder that a compiler cannot use."""
    def plant():
        torch._inductor.config.cpp.cxx = ("no such compiler",)

    folder = logs.parent / "cache"
    fork = Fork(logs, *command(base), "--compile", plant=plant, TORCHINDUCTOR_CACHE_DIR=folder)
    fork.good()
    assert re.search("^notice: nothing is compiled: .*No working C.. compiler", fork.err, re.M)
    assert "compiled:False" in (logs / "x/log.txt").read_text()
    assert weights_of(logs / "x") == weights_of(reference(base))


@pytest.mark.parametrize("name", ["loop_first", "windows", "smear"])
def test_null_is_no_value_of_a_setting_that_is_not_derived(name):
    with pytest.raises(q.UserError, match="None is not of type"):
        q.Config(**{name: None})


def test_every_step_drops_other_units(base, tmp_path):
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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks(number, base, logs):
    """Said once a lock; the run is made all the same, and a second launch finds it complete."""
    def plant():
        def refuses(*args):
            raise OSError(number, os.strerror(number))
        q.fcntl.flock = refuses

    fork = start(base, logs, plant=plant).good()
    assert re.search("^notice: .*lock cannot be locked .*: start no second launch", fork.err, re.M)
    assert "x is complete" in start(base, logs, plant=plant).good().out
