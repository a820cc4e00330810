"""Several processes and several launches of one run: the numbers of one. CPU only."""
import functools
import os
import re
import signal
import time

import pytest
from safetensors.torch import load_file
from tiny import user

import train_q0 as q
from forks import (
    EVERY_STEP, RUN, TWO, Fork, all_good, at_step, command, die, disturbed, losses_of, ranks,
    reference, resume, shards, wait_for)

# Every feature of the model; one step a cycle, so that three steps see the noise of two boundaries
# and a teacher. Little weight decay: it acts where update and weight have one sign, so an update
# that rounds to the other side of 0 changes a weight by lr * decay of it
STEPS = (
    "--seq-len 16 --batch-tokens 256 --micro-batch 4 --epochs 3 --train-tokens 270 --average 0 "
    "--distill-after 2 --grad-clip 0.05 --weight-decay 0.05 --save-minutes 0").split()
EVERYTHING = (
    "--layers 3 --width 64 --mlp-hidden 96 --windows SL --unet --x0-mix --attn-gates --head-mixing "
    "--loop-first 1 --loop-last 1 --loop-passes 2 --mtp-weight 0.3").split()
HALF = ("--precision", "bfloat16")  # with copies of the weights; emulated here, so of one layer


def state_after_three_steps(base, size, *more):
    place = base / f"steps{Fork.count}"

    def elsewhere():
        q.LOGS = place / "other/logs"  # as on another node
    plants = {rank: elsewhere for rank in range(1, size)}
    all_good(ranks(size, place / "logs", *command(base, *STEPS, *more), plants=plants))
    assert not (place / "other").exists()  # rank 0 writes all files
    return load_file(place / "logs/x/state/0-000000003.safetensors")


@pytest.mark.parametrize("size, more, tolerance", [
    (4, EVERYTHING, 1e-4), (2, HALF, 0.1)], ids=["4", "bfloat16"])
def test_any_number_of_processes(size, more, tolerance, base):
    """Weights and moments, and their names and shapes in the state."""
    wanted = state_after_three_steps(base, 1, *more)
    found = state_after_three_steps(base, size, *more)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


def test_torchrun(base, logs):
    """As the README starts it; torchrun has a --run of its own."""
    argv = command(base)
    argv[argv.index("--run")] = "--name"
    launcher = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = user(q.ROOT, *launcher, "train_q0.py", *argv, Q0_LOGS=str(logs))
    assert done.returncode == 0, done.stderr
    assert not disturbed(base, logs, size=2)


def test_from_one_process_to_two_and_back(base, logs):
    """Three processes' worth of turns on one run: one, two, one."""
    argv = command(base, *EVERY_STEP)
    Fork(logs, *argv, plant=at_step(5)).dies()
    stop = at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    two = ranks(2, logs, *argv, plants={1: stop})
    assert [fork.wait() for fork in two] == [128, 143]  # told to one, all stop at one step
    assert two[0].went_on_from == {0: 4} and not two[1].out
    last = resume(logs).good()
    assert last.went_on_from == {0: 8}
    assert "'processes': 2}, now" in last.out
    # sums in another order gave 1e-6; another seed gives 1e-2
    assert losses_of(logs / "x") == pytest.approx(losses_of(reference(base)), abs=1e-3)


def test_a_hanging_rank_ends_the_others(base, logs):
    """0.05 minutes later it shows where its threads are; started again, the run is as if nothing
    was."""
    def hang():
        time.sleep(60)

    plants = {1: at_step(8, hang)}
    argv = command(base, *EVERY_STEP, "--hang-minutes", "0.05")
    first, second = ranks(2, logs, *argv, plants=plants)
    assert second.wait(20) == 1 and first.wait(20) not in (0, None)
    assert "Timeout (0:00:03)!" in second.err
    assert re.search(r"line \d+ in hang\n", second.err)
    all_good(ranks(2, logs, "--resume", "x"))
    assert not disturbed(base, logs, size=2)


@pytest.mark.parametrize("own, folder, told", [
    (["--lr-matrix", "0.03"], "one", "lr_matrix: 0.03, not 0.04"),
    ([], "two", "train: .*sha256.*, not .*sha256.*")])
def test_ranks_that_differ(own, folder, told, tmp_path):
    """In a flag, or in the text: one line that names the difference, and nothing written."""
    for seed, name in enumerate(("one", "two")):
        shards(tmp_path / name / "shards", seed)
    plants = {0: functools.partial(os.chdir, tmp_path / "one"),
              1: functools.partial(os.chdir, tmp_path / folder)}
    argv = [*RUN, "--data", "shards", "--run", "x"]
    first, second = ranks(2, tmp_path / "logs", *argv, own={1: own}, plants=plants)
    first.fails(f"rank 1 differs from rank 0 in {told}; start every process with")
    second.fails("rank 1 differs")
    assert not (tmp_path / "logs/x").exists()


def test_micro_batches_that_do_not_divide():
    cfg = q.Config(batch_tokens=2048 * 12, edge_batch_tokens=2048 * 8)
    with pytest.raises(q.UserError, match="3 processes: use .* divides 4 "):
        q.check_divides(cfg, 3)


def hold(logs, name, then=None):
    """Plant: before its 8th step a launch says so and waits to be let on."""
    def act():
        (logs / f"{name} waits").touch()
        wait_for(logs / f"{name} goes on")
        if then:
            then()
    return at_step(8, act)


@pytest.mark.parametrize("killed", [False, True])
def test_two_launches(killed, base, logs):
    """One may be killed in the middle of its trajectory; the other takes over. All as one launch
    that trains both in turn."""
    run = logs / "x"
    argv = command(base, *TWO, *EVERY_STEP)
    forks = {}
    for name in ("first", "second"):
        then = die if killed and name == "second" else None
        forks[name] = Fork(logs, *argv, plant=hold(logs, name, then))
        wait_for(logs / f"{name} waits")
    third = Fork(logs, *argv).good()
    assert re.search("\nother launches train x: the last to finish writes the result", third.out)
    Fork(logs, *argv, "--lr-head", "0.02").fails("x exists and differs in lr_head: give another")
    assert not (run / "result.json").exists()
    for name in ("second", "first"):
        (logs / f"{name} goes on").touch()
        if killed and name == "second":
            forks[name].dies()
        else:
            forks[name].good()
    assert Fork(logs, *argv).good().out == f"x is complete: {run}\n"
    # states tell who knew which member when
    assert not disturbed(base, logs, *TWO, kinds=("weights", "log", "result"))
    assert not list(run.glob("*_trajectory*"))
    locks = [q.Lock(path) for path in run.glob("state/*.lock")]
    assert len(locks) >= 2
    for lock in locks:
        assert lock.path.read_text() == "" and lock.acquire()
        lock.release()


def test_a_lock(tmp_path):
    path = tmp_path / "0.lock"

    def hold_and_die():
        assert q.Lock(path).acquire()
        die()
    Fork(tmp_path / "logs", call=hold_and_die).dies()
    assert path.read_text() == q.platform.node()
    assert q.Lock(path).acquire()
    # of another machine: its text and its time tell, where the system's locks do not reach
    path.write_text("another machine")
    silent = time.time() - q.SILENT_SECONDS - 1
    os.utime(path, (silent, silent))
    q.Lock(path).renew()  # as its holder does at every step
    assert not q.Lock(path).acquire()
    os.utime(path, (silent, silent))
    assert q.Lock(path).acquire()
