"""Resume: a run that is stopped, killed or handed to other processes goes on as if nothing had happened. CPU only.

Runs are forks of the process that runs the tests, which has imported torch: a run then takes half a second. A fork may
plant something first, such as its own SIGKILL at the n-th call of a function. One thread throughout, so that sums have
one order. `pytest -s` shows the table of kills; --slow kills more often.
"""
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import train_q0 as q0
from test_distributed import make_shards

ROOT = Path(q0.__file__).resolve().parent
# three cycles of eight steps, two micro-batches each; dropout, a teacher from the second cycle, noise at boundaries, and
# members that are the mean of a cycle's last seven steps, so that nearly every state holds an unfinished one
RUN = ("--layers 1 --width 32 --head-dim 16 --mlp-hidden 64 --seq-len 32 --batch-tokens 512 --micro-batch 8 --epochs 6 "
       "--train-tokens 2000 --cycles 3 --distill-after 1 --lr-matrix 0.04 --lr-head 0.01 --weight-decay 1.3 --dropout 0.1 "
       "--precision float32 --device cpu --log-every 1 --average 0.8").split()
EVERY_STEP, CYCLE_ENDS = ("--save-minutes", "0"), ("--save-minutes", "1000")  # when the state is saved


# ----------------------------------------------------------------------------------------------------------------------
# Runs in forks

@functools.cache
def warm():
    """Import what torch imports only when it is first needed (two seconds), so that no fork does."""
    with torch.device("meta"):
        q0.GPT(q0.resolve(q0.Config())[0], 300)


class Fork:
    """train_q0.main(argv) in a fork, with runs under `logs`; `plant()` is called first. Use `wait` for its status."""

    def __init__(self, logs, *argv, plant=None, call=None, **env):
        warm()
        logs.mkdir(parents=True, exist_ok=True)
        out = logs.parent / "out"
        out.mkdir(exist_ok=True)
        self.files = [out / f"{len(list(out.iterdir())) // 2:03}.{kind}" for kind in ("out", "err")]
        for file in self.files:
            file.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        self.code, self.pid = None, os.fork()
        if self.pid:
            return
        code = 1
        try:
            for fd, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), fd)
            sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
            os.environ.update({k: str(v) for k, v in env.items()})
            torch.set_num_threads(1)
            q0.LOGS = logs
            q0.draw_curve = lambda *args: None  # takes longer than the run
            if plant:
                plant()
            code = (call or (lambda: q0.main([str(a) for a in argv])))() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def kill(self, number=signal.SIGKILL):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, limit=60):
        """The exit status, negative where a signal ended it; after `limit` seconds the fork is killed."""
        end = time.monotonic() + limit
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        if self.poll() is None:
            self.kill()
            while self.poll() is None:
                time.sleep(0.005)
            raise AssertionError(f"no end after {limit} s: {self.text}")
        return self.code

    @property
    def out(self):
        return self.files[0].read_text(errors="replace")

    @property
    def err(self):
        return self.files[1].read_text(errors="replace")

    @property
    def text(self):
        return self.out + self.err

    def good(self, limit=60):
        """Wait for success; returns self."""
        assert self.wait(limit) == 0, self.text
        return self

    def fails(self, pattern, code=2, limit=60):
        """Wait for one clear line, and nothing else on standard error but notices; returns the line."""
        assert self.wait(limit) == code, (self.code, self.text)
        lines = [line for line in self.err.splitlines() if not line.startswith("notice: ")]
        assert len(lines) == 1 and lines[0].startswith("train_q0.py: error: "), self.err
        assert re.search(pattern, lines[0]), lines[0]
        return lines[0]

    @property
    def from_step(self):
        """{trajectory: step that it went on from, or "done"}"""
        line = next((x for x in self.out.splitlines() if x.startswith("resuming ")), "")
        return {int(j): int(step) if step else "done" for j, step in re.findall(
            r"trajectory (\d+) (?:is done|at step (\d+))", line)}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ranks(logs, *argv, plants=(None, None), **env):
    """Two forks with the environment that torchrun sets."""
    port = free_port()
    return [Fork(logs, *argv, plant=plant, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=port, **env) for rank, plant in enumerate(plants)]


def good(forks):
    for fork in forks:
        fork.good()
    return forks


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, n, act=die, where="", after=False):
    """Plant `act` before (or after) the n-th call of owner.name whose last path argument, if any, holds `where`."""
    real, calls = getattr(owner, name), []

    def planted(*args, **kwargs):
        paths = [str(a) for a in args if isinstance(a, (str, Path))]
        if re.search(where, paths[-1] if paths else ""):
            calls.append(1)
            if len(calls) == n and not after:
                act()
        result = real(*args, **kwargs)
        if len(calls) == n and after:
            calls.append(1)
            act()
        return result
    setattr(owner, name, planted)


def planted(*args, **kwargs):
    """at_call, later."""
    return functools.partial(at_call, *args, **kwargs)


def half_written(where, n):
    """Plant the end of the machine in the middle of a write: the temporary file holds half of its bytes."""
    def plant():
        real, calls = os.replace, []

        def replace(source, target):
            if re.search(where, str(target)):
                calls.append(1)
                if len(calls) == n:
                    os.truncate(source, os.path.getsize(source) // 2)
                    die()
            real(source, target)
        os.replace = replace
    return plant


@functools.cache
def reference(base, *more):
    """An uninterrupted run in one process, with settings `more`."""
    return finish(base / f"reference{abs(hash(more))}", base, *more)


def finish(place, base, *more, **how):
    """Train run x from start to end under `place`; its folder."""
    Fork(place / "logs", *RUN, "--data", make_shards(base), "--run", "x", *more, **how).good()
    return place / "logs/x"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "resume"


@pytest.fixture(scope="session")
def argv(base):
    return [*RUN, "--data", make_shards(base), "--run", "x"]


@pytest.fixture
def logs(tmp_path):
    return tmp_path / "logs"


def command_die_once(*argv):
    """As a script, under torchrun: the last rank kills itself in its fourth step, the first time."""
    q0.LOGS, mark = Path(os.environ["TEST_LOGS"]), Path(os.environ["TEST_LOGS"], "died")
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and not mark.exists():
        at_call(q0.Optimizer, "step", 4, act=lambda: (mark.touch(), die()))
    q0.draw_curve = lambda *args: None
    return q0.main(list(argv))


if __name__ == "__main__":
    sys.exit(command_die_once(*sys.argv[1:]))


# ----------------------------------------------------------------------------------------------------------------------
# Runs compared

TIMES = ("tok/s", "eta", "ready", "tflops", "train_time", "peak_memory")
TIMED = re.compile(rf" ?\b(?:{'|'.join(TIMES)}):\S+")
# of the header: when and how the run was started, settings that change no number, and where it ran
HEADER = re.compile(r'^ *"(?:time|command|processes|save_minutes|keep_members|hang_minutes|skip_nonfinite)": .*\n'
                    r"|^\w+: \S+ \(.*\)\n", re.M)  # the latter: what was derived, which a resumed run need not do


def log_of(run, name="log.txt"):
    """The log but for times, without the source text that it starts with."""
    text = (run / name).read_text(encoding="utf-8")
    assert text.startswith(q0.SOURCE) and "\0" not in text
    return HEADER.sub("", TIMED.sub("", text.removeprefix(q0.SOURCE)))


def metrics_of(run, name="metrics.jsonl"):
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES}
            for line in (run / name).read_text(encoding="utf-8").splitlines()]


def result_of(run):
    timed = ("seconds", "per_second", "memory_mb", "command", "time", "machine", "config")
    return {k: v for k, v in json.loads((run / "result.json").read_text()).items() if not k.endswith(timed)}


def files_of(run, *kinds):
    """{relative path: bytes} of members (weights and configuration) and predictions."""
    found = {str(p.relative_to(run)): p.read_bytes() for kind in kinds or ("members", "predictions")
             for p in (run / kind).rglob("*") if p.is_file() and not p.name.endswith(".tmp")}
    assert found
    return found


def weights_of(run):
    """{relative path: bytes} of members and predictions without configurations, which hold settings of the machine."""
    return {name: raw for name, raw in files_of(run).items() if name.endswith(".safetensors")}


def states_of(run):
    """{name: (position, hash of weights and moments)} of the resume states; seconds and log sizes are times."""
    found = {}
    for file in (run / "state").glob("*.json"):
        body = json.loads(file.read_text())["body"]
        at = {k: v for k, v in body["at"].items() if k not in ("train_seconds", "eval_seconds", "log")}
        found[file.stem] = at, body["tensors"]
    assert found
    return found


def compare(one, two):
    """What differs between two finished runs; empty where they are bit-identical but for times."""
    checks = {"weights and predictions": weights_of, "log": log_of, "metrics": metrics_of, "result": result_of,
              "state": states_of}
    return [name for name, of in checks.items() if of(one) != of(two)]


def steps_of(run, *names):
    """[(trajectory, step within the run)] of all logged steps."""
    return [(e["traj"], e["step"][0]) for name in names or ("metrics.jsonl",) for e in metrics_of(run, name)
            if e["event"] == "step"]


def test_the_reference_is_worth_comparing(base):
    """It learns, it is taught, and `compare` sees one changed bit of each kind."""
    run = reference(base)
    assert len(steps_of(run)) == len(set(steps_of(run))) == 24
    result = result_of(run)
    assert result["curve"][-1]["learned"] < result["curve"][0]["loss"] - 0.1
    assert [p["distilled"] for p in result["curve"]] == [0, 1, 1]
    assert compare(run, run) == []
    assert sorted(states_of(run)) == ["0-000000024", "0-000000024-done"]
    for name, kind in (("members/1/model.safetensors", "weights and predictions"), ("log.txt", "log"),
                       ("predictions/2.safetensors", "weights and predictions"), ("metrics.jsonl", "metrics")):
        copy = shutil.copytree(run, run.with_name("copy"), dirs_exist_ok=True)
        raw = bytearray((copy / name).read_bytes())
        where = {"log": b" loss:", "metrics": b'"loss": '}.get(kind)
        raw[raw.rindex(where) + len(where) + 2 if where else -5] ^= 1
        (copy / name).write_bytes(raw)
        assert compare(run, copy) == [kind], name


# ----------------------------------------------------------------------------------------------------------------------
# Kill -9: at chosen moments, from inside, and at random ones, from outside

MOMENTS = {  # what happens there: (saves, what is planted)
    "before the first state": (CYCLE_ENDS, planted(q0.Optimizer, "step", 5)),
    "in a step, states at cycle ends": (CYCLE_ENDS, planted(q0.Optimizer, "step", 13)),
    "in a step, a state every step": (EVERY_STEP, planted(q0.Optimizer, "step", 19)),
    "between step and save": (EVERY_STEP, planted(q0, "save_state", 7)),
    "state's tensors half-written": (EVERY_STEP, half_written(r"state/.*\.safetensors$", 12)),
    "state's tensors written, not synced": (EVERY_STEP, planted(os, "fsync", 20)),
    "state's tensors renamed, JSON missing": (EVERY_STEP, planted(os, "replace", 10, where=r"state/.*\.safetensors$",
                                                                   after=True)),
    "state's JSON half-written": (EVERY_STEP, half_written(r"state/.*\.json$", 9)),
    "state's JSON renamed, oldest not deleted": (EVERY_STEP, planted(os, "replace", 11, where=r"state/.*\.json$",
                                                                      after=True)),
    "first state half-written": (CYCLE_ENDS, half_written(r"state/.*\.safetensors$", 1)),
    "state saved, before the member": (CYCLE_ENDS, planted(q0, "save_member", 2)),
    "member half-written": (CYCLE_ENDS, half_written(r"members/1/model\.safetensors$", 1)),
    "member's configuration half-written": (EVERY_STEP, half_written(r"members/2/config\.json$", 1)),
    "evaluation on held-out text": (EVERY_STEP, planted(q0, "true_token_probs", 3)),
    "evaluation on validation text": (CYCLE_ENDS, planted(q0, "true_token_probs", 6)),
    "predictions half-written": (CYCLE_ENDS, half_written(r"predictions/1\.", 1)),
    "prior fit": (CYCLE_ENDS, planted(q0, "fit_prior", 2)),
    "prior fitted and logged, next cycle": (CYCLE_ENDS, planted(q0.Optimizer, "step", 17)),
    "done, not yet saved": (EVERY_STEP, half_written("-done.json$", 1)),
    "table of the result": (EVERY_STEP, planted(q0, "population_table", 1)),
    "result half-written": (CYCLE_ENDS, half_written(r"result\.json$", 1)),
}
IN_CI = ("before the first state", "in a step, a state every step", "state's tensors half-written",
         "state's tensors renamed, JSON missing", "state's JSON half-written", "member half-written",
         "evaluation on validation text", "prior fit", "result half-written")
KILLS = []  # rows of the table: moment, step it went on from, what differs


def resume_and_compare(moment, logs, one, *more):
    fork = Fork(logs, "--resume", "x", *more).good()
    differ = compare(one, logs / "x")
    KILLS.append((moment, fork.from_step.get(0, "the start"), ", ".join(differ) or "identical"))
    assert not differ, (moment, fork.text)
    return fork


@pytest.fixture(scope="module", autouse=True)
def table_of_kills():
    yield
    if KILLS:
        print(f"\n{'moment of the kill':<46} {'went on from step':<18} compared with no kill")
        for moment, step, differ in KILLS:
            print(f"{moment:<46} {step!s:<18} {differ}")


@pytest.mark.parametrize("moment", [m if m in IN_CI else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS])
def test_killed_at_a_chosen_moment(moment, base, argv, logs):
    saves, plant = MOMENTS[moment]
    assert Fork(logs, *argv, *saves, plant=plant).wait() == -signal.SIGKILL  # or the moment never came
    assert not (logs / "x/result.json").exists()
    resume_and_compare(moment, logs, reference(base))


def test_killed_at_random_moments(base, argv, tmp_path, request):
    """From outside, at a random share of the time that such a run takes; the run that goes on is killed too."""
    rng, kills = random.Random(time.time_ns()), 20 if request.config.getoption("--slow") else 3
    mark = time.monotonic()
    finish(tmp_path / "timed", base, *EVERY_STEP)
    takes, done = time.monotonic() - mark, 0
    for attempt in range(3 * kills):
        logs = tmp_path / f"{attempt}/logs"
        fork, moments = Fork(logs, *argv, *EVERY_STEP), []
        for share in (rng.uniform(0.05, 0.95), rng.uniform(0.05, 0.6)):
            time.sleep(share * takes)
            fork.kill()
            if fork.wait() != -signal.SIGKILL:
                break
            moments.append(f"{share:.2f}")
            if not (logs / "x/run.json").exists():  # nothing is written yet: the user starts again
                shutil.rmtree(logs / "x", ignore_errors=True)
                fork = Fork(logs, *argv, *EVERY_STEP)
            else:
                fork = Fork(logs, "--resume", "x")
        fork.wait()
        if moments:
            resume_and_compare(f"random: {' and '.join(moments)} of a run's time", logs, reference(base)) if not (
                logs / "x/result.json").exists() else KILLS.append((
                    f"random: {' and '.join(moments)} of a run's time", fork.from_step.get(0, "the start"),
                    ", ".join(compare(reference(base), logs / "x")) or "identical"))
            assert KILLS[-1][2] == "identical", KILLS[-1]
            done += len(moments)
        if done >= kills:
            return
    raise AssertionError(f"only {done} of {kills} kills came in time")


def test_a_kill_leaves_no_rubbish(base, argv, logs):
    """Each is as large as a state: at full scale 20 GB a kill."""
    for n, where in enumerate((r"state/.*\.safetensors$", r"state/.*\.json$", "members/0")):
        assert Fork(logs, *(["--resume", "x"] if n else argv), *EVERY_STEP,
                    plant=half_written(where, 3 - n)).wait() == -signal.SIGKILL
    Fork(logs, "--resume", "x", *CYCLE_ENDS).good()
    assert not list((logs / "x").rglob("*.tmp"))
    states = list((logs / "x/state").iterdir())
    assert {f.stem for f in states if f.suffix == ".json"} == {f.stem for f in states}


# ----------------------------------------------------------------------------------------------------------------------
# When a state is saved, and what is in it

def saves(logs, argv, *more):
    """Steps at which a run saves a state."""
    def plant():
        real = q0.save_state

        def spy(folder, at, *args):
            print(f"saved:{at.step}{'-done' * at.done}", flush=True)
            real(folder, at, *args)
        q0.save_state = spy
    fork = Fork(logs, *argv, *more, plant=plant).good()
    return re.findall(r"^saved:(\S+)", fork.out, re.M)


def test_saved_at_cycle_ends_and_on_a_timer(argv, tmp_path):
    ends = ["8", "16", "24", "24-done"]
    assert saves(tmp_path / "a/logs", argv, *CYCLE_ENDS) == ends
    assert saves(tmp_path / "b/logs", argv, *EVERY_STEP) == [*map(str, range(1, 25)), "24-done"]
    timed = saves(tmp_path / "c/logs", argv, "--save-minutes", 0.05 / 60)  # a step takes 10 ms, on a busy machine 50
    assert set(ends) <= set(timed) and 4 < len(timed) <= 25, timed


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal(number, code, base, argv, logs):
    """It saves the step under way, though nothing else would have."""
    before = signal.signal(number, signal.SIG_DFL)  # tests in the background ignore SIGINT, and the run would too
    fork = Fork(logs, *argv, *CYCLE_ENDS, plant=planted(q0.Optimizer, "step", 11, act=lambda: os.kill(
        os.getpid(), number)))
    signal.signal(number, before)
    assert fork.wait() == code, fork.text
    assert "Traceback" not in fork.err and "stopped; its state is saved: go on with --resume" in fork.err
    assert sorted(p.name for p in (logs / "x/state").glob("*.json")) == ["0-000000008.json", "0-000000011.json"]
    again = resume_and_compare(f"{signal.Signals(number).name} (not a kill)", logs, reference(base))
    assert again.from_step == {0: 11}


def test_a_second_signal_stops_at_once(argv, logs):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    fork = Fork(logs, *argv, plant=planted(q0.Optimizer, "step", 11, act=twice))
    assert fork.wait() == -signal.SIGTERM and "once more to stop at once" in fork.err


def test_what_a_state_holds(base, argv, logs):
    """Weights and moments by the parameter's name, whole; the position; hashes and kernels of what it goes with."""
    Fork(logs, *argv, *CYCLE_ENDS, plant=planted(q0.Optimizer, "step", 20)).wait()
    saved = json.loads((logs / "x/state/0-000000016.json").read_text())["body"]
    tensors = load_file(logs / "x/state/0-000000016.safetensors")
    cfg = q0.resolve(q0.Config(**json.loads((logs / "x/run.json").read_text())["config"]))[0]
    for name, p in q0.GPT(cfg, 300).named_parameters():
        assert tensors[f"model.{name}"].shape == tensors[f"mean.{name}"].shape == p.shape
        assert np.abs(tensors[f"first.{name}"]).max() > 0
        assert tensors[f"first.{name}"].size == p.numel() and (tensors[f"second.{name}"] >= 0).all()
    assert tensors["steps"] == 16
    at = saved["at"]
    assert (at["step"], at["sequences"], at["in_cycle"], at["cycle"]) == (16, 16 * 16, 8, 1)
    assert [p["member"] for p in at["curve"]] == [0]
    assert at["log"][0] == "log.txt" and at["log"][1] < (logs / "x/log.txt").stat().st_size
    log = (logs / "x/log.txt").read_bytes()[:at["log"][1]].decode()
    assert log.splitlines()[-1].startswith("step:16/24 ") and log.endswith("\n")
    assert saved["identity"]["lr_matrix"] == 0.04 and "save_minutes" not in saved["identity"]
    assert len(saved["identity"]["train.bin"]) == 64


def test_a_finished_run_is_left_alone(base, logs):
    run = shutil.copytree(reference(base), logs / "x")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    fork = Fork(logs, "--resume", "x").good()
    assert "x is complete" in fork.out
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_resume_by_path_and_of_nothing(base, argv, logs, tmp_path):
    Fork(logs, *argv, plant=planted(q0.Optimizer, "step", 10)).wait()
    moved = shutil.move(logs / "x", tmp_path / "moved")
    Fork(logs, "--resume", moved).good()
    assert compare(reference(base), Path(moved)) == []
    Fork(logs, "--resume", "x").fails("no run x under")
    (logs / "y").mkdir()
    Fork(logs, "--resume", "y").fails(r"y/run\.json is missing or damaged.*cannot go on")
    (logs / "y/mine").write_text("")
    Fork(logs, *argv[:-1], "y").fails("run directory .*y exists: give another --run name, or --resume y")


# ----------------------------------------------------------------------------------------------------------------------
# Settings, logs, members that change between

@pytest.fixture(scope="module")
def stopped(base):
    """A run that was killed in its step 19, with a state every step; copy it."""
    logs = base / "stopped/logs"
    assert Fork(logs, *RUN, "--data", make_shards(base), "--run", "x", *EVERY_STEP,
                plant=planted(q0.Optimizer, "step", 19)).wait() == -signal.SIGKILL
    return logs / "x"


def test_changed_settings(base, stopped, logs):
    """Those of the method are refused, all that differ in one line; those of the machine may change."""
    shutil.copytree(stopped, logs / "x")
    before = (logs / "x/log.txt").read_bytes()
    line = Fork(logs, "--resume", "x", "--lr-matrix", "0.03", "--seed", "7", "--no-unet", "--epochs", "6",
                "--precision", "bfloat16", "--log-every", "2").fails("x has settings of its own: leave out ")
    differ = line.split("leave out ")[1].split(", ")
    assert sorted(differ) == sorted(["--lr-matrix 0.03 (not 0.04)", "--seed 7 (not 0)",
                                     "--precision bfloat16 (not float32)"])
    assert (logs / "x/log.txt").read_bytes() == before
    again = Fork(logs, "--resume", "x", "--save-minutes", "1000", "--hang-minutes", "1", "--keep-members", "9",
                 "--lr-matrix", "0.04", "--attention", "plain").good()
    assert again.from_step == {0: 18}
    assert "notice: step 18 was reached with {'attention': 'matmul'" in again.out
    assert "now {'attention': 'plain'" in again.out and "rounding differs" in again.out
    losses = lambda run: [e["loss"] for e in metrics_of(run) if e["event"] == "step"]
    # attention computed in another order: float32 rounding, grown over six steps
    assert losses(logs / "x") == pytest.approx(losses(reference(base)), abs=1e-3)


def test_log_every_may_change(base, stopped, logs):
    """And the log goes on where the state left it."""
    shutil.copytree(stopped, logs / "x")
    with open(logs / "x/log.txt", "a") as log, open(logs / "x/metrics.jsonl", "a") as metrics:
        log.write("step:19/24 what was logged after the state\nhalf a li")
        metrics.write('{"event": "st')
    Fork(logs, "--resume", "x", "--log-every", "3").good()
    assert [step for _, step in steps_of(logs / "x")] == [*range(1, 19), 21, 24]
    assert "half a li" not in log_of(logs / "x") and weights_of(logs / "x") == weights_of(reference(base))


def test_a_log_shorter_than_the_state_says(stopped, logs):
    """After a power loss: states are synced, the log is not. The numbers are fine, and no zero bytes are wanted."""
    shutil.copytree(stopped, logs / "x")
    os.truncate(logs / "x/log.txt", (logs / "x/log.txt").stat().st_size - 500)
    Fork(logs, "--resume", "x").good()
    assert b"\0" not in (logs / "x/log.txt").read_bytes()


def test_keep_members(base, argv, logs):
    """Weights of the newest alone, predictions of all: `select` and the result are as ever."""
    Fork(logs, *argv, "--keep-members", "1").good()
    one, two = reference(base), logs / "x"
    assert [i for i in range(3) if (two / f"members/{i}/model.safetensors").exists()] == [2]
    assert all((two / f"members/{i}/config.json").exists() for i in range(3))
    assert files_of(one, "predictions") == files_of(two, "predictions") and result_of(one) == result_of(two)
    shown = [Fork(folder.parent, "select", "x", "--k", "2").good().out for folder in (one, two)]
    assert shown[0] == shown[1] and re.search(r"^k:[12] val_loss:", shown[0], re.M)  # 1 where no second one helps


@pytest.mark.parametrize("keep, damage", [
    (1, False), (1, True), (2, False), (2, True), (3, True)])
def test_keep_members_and_resume(keep, damage, base, argv, logs):
    """Killed after the last evaluation: the newest state is that of the last cycle's end, or of the one before where
    that is damaged."""
    more = ("--keep-members", keep, *CYCLE_ENDS)
    assert Fork(logs, *argv, *more, plant=half_written("-done.safetensors$", 1)).wait() == -signal.SIGKILL
    assert sorted(p.stem for p in (logs / "x/state").glob("*.json")) == ["0-000000016", "0-000000024"]
    if damage:
        (logs / "x/state/0-000000024.json").write_text("{}")
    again = Fork(logs, "--resume", "x").good()
    assert again.from_step == {0: 16 if damage else 24}
    assert files_of(logs / "x", "predictions") == files_of(reference(base), "predictions")


# ----------------------------------------------------------------------------------------------------------------------
# Several processes: one rank is killed, then all start again, as many as before or not

TWO = ("--trajectories", "2", "--epochs", "12")  # 24 steps each
LOGS_OF_TWO = ("metrics.jsonl", "metrics_trajectory1.jsonl")


def killed(logs, argv, plant, *more):
    """Two ranks of which one kills itself where `plant` says; the other is then killed, as torchrun does."""
    first, second = ranks(logs, *argv, *EVERY_STEP, *more, plants=(None, plant))
    assert second.wait() == -signal.SIGKILL, second.text
    time.sleep(0.1)
    first.kill()
    assert first.wait() != 0
    assert not (logs / "x/result.json").exists()
    return logs / "x"


@pytest.fixture(scope="module")
def shared(base, argv):
    """Two ranks that share a trajectory, one of them killed; copy it."""
    return killed(base / "shared/logs", argv, planted(q0.Optimizer, "step", 13))


@pytest.fixture(scope="module")
def apart(base, argv):
    """Two ranks with a trajectory each, one of them killed after it logged a step that no state holds; copy it."""
    return killed(base / "apart/logs", argv, planted(q0, "save_state", 13), *TWO)


def close_to(one, two):
    """As runs on other numbers of processes are, see test_shared_trajectory in test_distributed.py."""
    a, b = result_of(one), result_of(two)
    assert [p["learned"] for p in b["curve"]] == pytest.approx([p["learned"] for p in a["curve"]], abs=1e-3)
    losses = [[e["loss"] for e in metrics_of(run) if e["event"] == "step"] for run in (one, two)]
    assert len(losses[0]) == 24 and losses[1] == pytest.approx(losses[0], abs=1e-3)
    for file in (one / "predictions").iterdir():
        for split, p in load_file(file).items():
            assert np.abs(load_file(two / "predictions" / file.name)[split] - p).mean() < 1e-4


def test_two_ranks_on_one_trajectory(base, shared, argv, logs, tmp_path):
    """Resumed by the command that torchrun repeats: bit for bit the run that nobody killed."""
    whole = ranks(tmp_path / "whole/logs", *argv)
    shutil.copytree(shared, logs / "x")
    first, _ = good(ranks(logs, *argv, TORCHELASTIC_RESTART_COUNT=1))
    good(whole)
    assert first.from_step[0] in (11, 12)  # the survivor may have been killed before it saved the twelfth
    differ = compare(tmp_path / "whole/logs/x", logs / "x")
    KILLS.append(("one of two ranks on a trajectory", first.from_step[0], ", ".join(differ) or "identical"))
    assert not differ
    close_to(reference(base), logs / "x")


def test_from_two_ranks_to_one(base, shared, logs):
    shutil.copytree(shared, logs / "x")
    fork = Fork(logs, "--resume", "x").good()
    assert fork.from_step[0] in (11, 12)
    close_to(reference(base), logs / "x")


def test_from_one_rank_to_two(base, stopped, logs):
    shutil.copytree(stopped, logs / "x")
    first, second = good(ranks(logs, "--resume", "x"))
    assert first.from_step == {0: 18} and "resuming" not in second.out
    close_to(reference(base), logs / "x")


def test_changed_processes_are_stated(stopped, shared, logs, tmp_path):
    shutil.copytree(shared, logs / "x")
    fork = Fork(logs, "--resume", "x").good()
    log = (logs / "x/log.txt").read_text().removeprefix(q0.SOURCE)
    assert re.search(r"notice: step \d+ was .*'processes': 2}, now .*'processes': 1}", log) and "'processes'" in fork.out


def test_two_trajectories_on_two_ranks(base, apart, logs):
    """Bit for bit as on one process, and each rank's log goes on where its state left it."""
    shutil.copytree(apart, logs / "x")
    first, _ = good(ranks(logs, "--resume", "x"))
    one, two = reference(base, *TWO), logs / "x"
    same = weights_of(one) == weights_of(two) and result_of(one) == result_of(two)
    KILLS.append(("one of two ranks, a trajectory each", first.from_step, "identical" if same else "not identical"))
    assert same
    assert steps_of(two) == [(0, i) for i in range(1, 25)]
    assert steps_of(two, "metrics_trajectory1.jsonl") == [(1, i) for i in range(1, 25)]
    assert "\0" not in (two / "log_trajectory1.txt").read_text()


def once_each(run):
    """Every step of both trajectories is logged once, in whatever file."""
    names = [name for name in LOGS_OF_TWO if (run / name).exists()]
    steps = sorted((e["traj"], e["epoch"]) for name in names for e in metrics_of(run, name) if e["event"] == "step")
    assert len(steps) == len(set(steps)) == 48, len(steps)


def resumed_with(processes, run, logs):
    shutil.copytree(run, logs / "x")
    good(ranks(logs, "--resume", "x") if processes == 2 else [Fork(logs, "--resume", "x")])
    return logs / "x"


@pytest.fixture(scope="module")
def apart_then_one(apart, base):
    return resumed_with(1, apart, base / "apart-then-one/logs")


@pytest.fixture(scope="module")
def one_then_apart(argv, base):
    """One process, killed in the second of two trajectories, then two processes."""
    logs = base / "one-of-two/logs"
    assert Fork(logs, *argv, *TWO, *EVERY_STEP, plant=planted(q0.Optimizer, "step", 30)).wait() == -signal.SIGKILL
    return resumed_with(2, logs / "x", base / "one-then-apart/logs")


@pytest.mark.parametrize("how", ["apart_then_one", "one_then_apart"])
def test_trajectories_move_to_other_processes(how, base, request):
    """Bit for bit: each trajectory is trained by one rank before and after."""
    one, two = reference(base, *TWO), request.getfixturevalue(how)
    assert weights_of(one) == weights_of(two) and result_of(one) == result_of(two)


@pytest.mark.parametrize("how", ["apart_then_one", "one_then_apart"])
def test_logs_of_trajectories_that_move(how, request):
    once_each(request.getfixturevalue(how))


def test_restart_before_anything_is_written(base, argv, logs):
    Fork(logs, *argv, TORCHELASTIC_RESTART_COUNT=1).good()
    assert compare(reference(base), logs / "x") == []


@pytest.mark.parametrize("processes, resumed", [
    (1, False), *(pytest.param(2, resumed, marks=pytest.mark.slow) for resumed in (False, True))])
def test_torchrun_restarts(processes, resumed, base, stopped, tmp_path):
    """torchrun itself: a rank dies once, and the same command goes on by itself."""
    logs = tmp_path / "logs"
    logs.mkdir()
    argv = [*RUN, "--data", make_shards(base), "--name", "x", *EVERY_STEP]
    if resumed:
        shutil.copytree(stopped, logs / "x")
        argv = ["--resume", "x"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                "--max-restarts=1", __file__]
    env.update(PYTHONPATH=str(ROOT), TEST_LOGS=str(logs), OMP_NUM_THREADS="1")
    run = subprocess.Popen([*torchrun, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=env)
    try:
        out, error = run.communicate(timeout=90)
    finally:
        if run.poll() is None:
            run.terminate()  # which it passes on to its ranks; after 30 s it kills them
            run.communicate(timeout=60)
    assert run.returncode == 0 and "resuming x: trajectory 0 at step" in out, error
    assert (logs / "died").exists()
    if processes == 1:
        assert compare(reference(base), logs / "x") == []
    else:
        close_to(reference(base), logs / "x")
