"""The mistakes and machines of a first hour: leftovers of a launcher, signals, closed outputs,
other people's permissions, lost files."""
import errno
import os
import re
import signal
import stat
import sys
import time

import pytest
import torch

import tiny
import train_q0 as q
from forks import Fork, at_step, command, disturbed, reference, resume, start, weights_of
from tiny import fails

# Leftovers of torchrun --------------------------------------------------------------------------

@pytest.mark.parametrize("env, said", [
    (dict(RANK="two"), "environment variable RANK is 'two', not a number: unset it"),
    (dict(WORLD_SIZE="-1"), "environment variable WORLD_SIZE is '-1', not a number: unset it")])
def test_variables_that_are_not_of_a_launch(env, said, monkeypatch, capsys):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(q.time, "sleep", lambda seconds: None)
    fails(capsys, said, "--device", "cpu")


def test_a_rank_of_no_launch(base, logs):
    """One process is the whole of it, whatever its rank is said to be."""
    Fork(logs, *command(base), RANK=3).good()
    assert weights_of(logs / "x") == weights_of(reference(base))


@pytest.mark.parametrize("rank, more, said", [
    (0, {}, "the other 1 processes are not there: .*MASTER_ADDR"),
    (1, dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="9"), "rank 1: the other 1 processes are not")])
def test_the_others_do_not_come(rank, more, said, monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in dict(RANK=rank, WORLD_SIZE=2, **more).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(q, "JOIN_TIME", q.datetime.timedelta(seconds=1))
    monkeypatch.setattr(q.time, "sleep", lambda seconds: None)
    assert q.main(["--device", "cpu", "--batch-tokens", "4096"]) == 2
    waits, error = capsys.readouterr().err.splitlines()
    assert waits == f"rank {rank} waits for 1 more processes: unset WORLD_SIZE if you meant one"
    assert re.search(said, error)


def test_who_waits_for_other_processes_hears_a_signal(logs):
    def plant():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it

    fork = Fork(logs, "--device", "cpu", "--batch-tokens", 4096, plant=plant, RANK=0,
                WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    while "rank 0 waits for 1 more processes" not in fork.err:
        time.sleep(0.01)
    time.sleep(0.5)
    fork.kill(signal.SIGINT)
    fork.dies(signal.SIGINT)


# Names and files --------------------------------------------------------------------------------

def test_names(base, logs, capsys):
    """A run without a name is called by the time; one that is not there is told where to look."""
    argv = command(base)
    at = argv.index("--run")
    del argv[at:at + 2]
    Fork(logs, *argv, plant=at_step(1)).dies()
    name, = [folder.name for folder in logs.iterdir()]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}", name)
    fails(capsys, "no run x under .*: the command `runs` lists what there is$", "select", "x")


def test_others_can_read_what_the_umask_lets_them(tmp_path):
    for mask, mode in ((0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            q.write_atomically(tmp_path / "x", lambda tmp: q.save_tensors({}, tmp))
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


def test_files_lost_and_files_of_others(base, logs):
    """What a run lost of its data is copied again; in state/ it deletes its own files alone."""
    start(base, logs, plant=at_step(3)).dies()
    manifest = logs / "x/data/manifest.json"
    text = manifest.read_bytes()
    manifest.unlink()
    others = [logs / "x/state" / name for name in ("0-notes.txt", "0-1.json", "0-copy.safetensors")]
    for file in others:
        file.touch()
    resume(logs).good()
    assert manifest.read_bytes() == text
    assert all(file.exists() for file in others)


def test_the_script_alone(base, logs):
    """Without records/ beside it it trains and goes on; a later launch that has them writes the
    result."""
    def plant():
        sys.modules["records"] = None

    def dies():
        plant()
        at_step(9)()

    start(base, logs, plant=dies).dies()
    fork = resume(logs, plant=plant).good()
    assert "resuming trajectory 0 at step 5" in fork.out
    assert "notice: without records/ a launch only trains: " in fork.err
    assert not (logs / "x/result.json").exists()
    assert "written to" in resume(logs).good().out
    assert not disturbed(base, logs, kinds=("weights", "result", "states"))


# Signals and outputs ----------------------------------------------------------------------------

def test_neither_slow_nor_suspended_is_hanging(base, logs):
    """15 steps of 0.1 s, and Ctrl-Z for longer than a step may take."""
    def plant():
        real = q.Optimizer.step

        def slow(*args):
            time.sleep(0.1)
            real(*args)
        q.Optimizer.step = slow
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGTSTP))()

    fork = Fork(logs, *command(base, "--hang-minutes", 0.02), plant=plant)
    while not os.waitid(os.P_PID, fork.pid, os.WSTOPPED | os.WNOHANG):
        time.sleep(0.01)
    time.sleep(1.5)
    os.kill(fork.pid, signal.SIGCONT)
    fork.good()


@pytest.mark.parametrize("output", ["closed", "none"])
def test_a_terminal_that_is_gone_loses_nothing(output, base, logs):
    """Its hangup saves and stops though nobody can be told."""
    def plant():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        if output == "none":
            sys.stderr = sys.__stderr__ = None
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGHUP))()

    assert start(base, logs, plant=plant).wait() == 128 + signal.SIGHUP
    assert resume(logs).good().went_on_from == {0: 4}


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


def test_a_file_system_without_locks(base, logs):
    """Said once a lock; the run is made all the same, and a second launch finds it complete."""
    def plant():
        def refuses(*args):
            raise OSError(errno.ENOLCK, "No locks available")
        q.fcntl.flock = refuses

    fork = start(base, logs, plant=plant).good()
    assert re.search("^notice: .*lock cannot be locked .*: start no second launch", fork.err, re.M)
    assert weights_of(logs / "x") == weights_of(reference(base))
    assert "x is complete" in start(base, logs, plant=plant).good().out
