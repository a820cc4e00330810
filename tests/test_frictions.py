"""The mistakes and machines of a first hour: leftovers of a launcher, signals, closed outputs,
other people's permissions, lost files."""
import errno
import os
import signal
import sys
import time

import torch
from forks import Fork, at_call, at_step, command, disturbed, reference, resume, start, weights_of

import tiny
import train_q0 as q


def test_leftovers_of_torchrun(monkeypatch, capsys):
    """Other processes that do not come."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in dict(RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    assert q.main(["--device", "cpu", "--batch-tokens", "4096"]) == 2
    waits, error = capsys.readouterr().err.splitlines()
    assert waits == "rank 0 waits for 1 more processes: unset WORLD_SIZE if you meant one"
    assert "the other 1 processes are not there: " in error


def test_a_rank_of_no_launch_without_locks_or_a_compiler(base, logs):
    """It is the whole of a run, as any other; what lacks is said once."""
    def fails(*args):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

    def refuses(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    def plant():
        q.fcntl.flock = refuses
        q.Trainer.compile_blocks = lambda self: None
        at_call(q.Trainer, "warm_up", 1, act=fails)

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


def test_neither_slow_nor_suspended_is_hanging(base, logs):
    """15 steps of 0.1 s, and Ctrl-Z for longer than a step may take."""
    step = q.Optimizer.step

    def slow(*args):
        time.sleep(0.1)
        step(*args)

    def plant():
        q.Optimizer.step = slow
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGTSTP))()

    fork = Fork(logs, *command(base, "--hang-minutes", 0.02), plant=plant)
    while not os.waitid(os.P_PID, fork.pid, os.WSTOPPED | os.WNOHANG):
        time.sleep(0.01)
    time.sleep(1.5)
    os.kill(fork.pid, signal.SIGCONT)
    fork.good()


def test_a_terminal_that_is_gone_loses_nothing(base, logs):
    """Its hangup saves and stops though nobody can be told. What the run lost of its data comes
    again; in state/ it deletes its own files alone."""
    def plant():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGHUP))()

    assert start(base, logs, plant=plant).wait() == 128 + signal.SIGHUP
    manifest = logs / "x/data/manifest.json"
    text = manifest.read_bytes()
    manifest.unlink()
    others = [logs / "x/state" / name for name in ("0-notes.txt", "0-1.json")]
    for file in others:
        file.touch()
    assert resume(logs).good().went_on_from == {0: 4}
    assert manifest.read_bytes() == text
    assert all(file.exists() for file in others)


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
