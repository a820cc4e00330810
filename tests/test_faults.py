"""Faults and hostile files: one clear line, nothing harmed, and --resume goes on with the same numbers. CPU only."""
import ast
import contextlib
import errno
import functools
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.numpy import load_file, save_file

import train_q0 as q0
from test_distributed import make_shards
from test_resume import (CYCLE_ENDS, EVERY_STEP, RUN, Fork, at_call, compare, metrics_of, planted, ranks, reference,
                         result_of, weights_of)
from test_resume import argv, base, logs  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def stopped(base, argv):
    """A run that was killed in its step 19, with a state every step; copy it."""
    logs = base / "faults/logs"
    assert Fork(logs, *argv, *EVERY_STEP, plant=planted(q0.Optimizer, "step", 19)).wait() == -signal.SIGKILL
    return logs / "x"


@pytest.fixture
def run(stopped, logs):
    return shutil.copytree(stopped, logs / "x")


def goes_on(logs, base, *more):
    """--resume completes, with the numbers of a run that met no fault."""
    fork = Fork(logs, "--resume", "x", *more).good()
    assert compare(reference(base), logs / "x") == []
    return fork


# ----------------------------------------------------------------------------------------------------------------------
# Disks

def limit_files(size):
    """Stands in for a full disk: Python ignores SIGXFSZ, so a write beyond it is an OSError. Tests may run as root, so
    permissions would stop nothing."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def denied():
    raise PermissionError(errno.EACCES, "Permission denied")


# when the disk is full or refuses: (what is planted, what the line says)
DISK = {
    "state": (planted(q0, "save_state", 10, act=lambda: limit_files(100_000)), "File too large|No space"),
    "state, synced": (planted(os, "fsync", 30, act=no_space), "No space left on device"),
    "state, renamed": (planted(os, "replace", 15, act=denied, where="/state/"), "Permission denied"),
    "member": (planted(q0, "save_member", 2, act=lambda: limit_files(20_000)), "File too large|No space"),
    "member, synced": (planted(q0, "save_member", 2, act=lambda: at_call(os, "fsync", 1, act=no_space)), "No space"),
    "predictions": (planted(q0, "true_token_probs", 4, after=True, act=lambda: limit_files(4_000)),
                    "File too large|No space"),
    "log": (planted(q0.Optimizer, "step", 12, after=True, act=lambda: limit_files(50_000)), "File too large|No space"),
    "result": (planted(os, "replace", 1, act=no_space, where=r"result\.json$"), "No space left on device"),
}


@pytest.mark.parametrize("case", DISK)
def test_disk_full(case, base, argv, logs):
    plant, pattern = DISK[case]
    Fork(logs, *argv, *EVERY_STEP, plant=plant).fails(pattern)
    assert not list(logs.rglob("*.tmp")) and not (logs / "x/result.json").exists()
    for file in (logs / "x/state").glob("*.json"):  # all that are left are whole
        saved = json.loads(file.read_text())["body"]
        assert q0.sha256_of(file.with_suffix(".safetensors")) == saved["tensors"]
    assert goes_on(logs, base).from_step


def in_the_way(name):
    """A file where a folder is expected, or the other way round."""
    def damage(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.mkdir() if "." in name else path.write_text("")
    return damage


@pytest.mark.parametrize("name", ["state", "members", "predictions", "log.txt", "metrics.jsonl", "run.json"])
def test_something_in_the_way(name, run, logs):
    in_the_way(name)(run)
    Fork(logs, "--resume", "x").fails(re.escape(f"x/{name}"))


@pytest.mark.parametrize("name", ["mkdir", "open"])
def test_unwritable_run_directory(name, argv, logs):
    """As a folder of another user is, or a disk that is mounted read-only."""
    plant = planted(Path, "mkdir", 1, act=denied) if name == "mkdir" else planted(
        os, "replace", 1, act=denied, where="run.json")
    Fork(logs, *argv, plant=plant).fails("Permission denied")
    assert not (logs / "x/run.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Damaged and swapped files

NEWEST, BEFORE = "0-000000018", "0-000000017"


def edit(name, change):
    def damage(run):
        for file in [name] if isinstance(name, str) else name:
            (run / file).write_bytes(change(bytearray((run / file).read_bytes())))
    return damage


def flip(raw, at=-9):
    raw[at] ^= 1
    return raw


def swap(one, two):
    def damage(run):
        a, b = (run / one).read_bytes(), (run / two).read_bytes()
        (run / one).write_bytes(b)
        (run / two).write_bytes(a)
    return damage


def state_with(path, **changes):
    """A kind of damage: edit the body of a state's JSON and seal it again, as a program would."""
    def damage(run):
        file = run / path
        body = json.loads(file.read_text())["body"]
        for key, value in changes.items():
            body[key] = {**body[key], **value} if isinstance(value, dict) else value
        file.write_text(json.dumps({"body": body, "sha256": q0.digest(body)}))
    return damage


cut = lambda raw: raw[:len(raw) // 2]
JSON, TENSORS = f"state/{NEWEST}.json", f"state/{NEWEST}.safetensors"
DAMAGED_STATES = {  # name: what is done to the newest state
    "JSON truncated": edit(JSON, cut), "JSON empty": edit(JSON, lambda raw: b""), "JSON flipped": edit(JSON, flip),
    "JSON a list": edit(JSON, lambda raw: b"[]"),
    "position edited": edit(JSON, lambda raw: raw.replace(b'"step": 18', b'"step": 17')),
    "tensors truncated": edit(TENSORS, cut), "tensors flipped": edit(TENSORS, flip),
    "tensors empty": edit(TENSORS, lambda raw: b""), "tensors missing": lambda run: (run / TENSORS).unlink(),
    "tensors of another step": lambda run: shutil.copy(run / f"state/{BEFORE}.safetensors", run / TENSORS),
    "tensors swapped with the step before": swap(TENSORS, f"state/{BEFORE}.safetensors"),
    "of another trajectory": state_with(JSON, at={"trajectory": 1}),
    "of another run": state_with(JSON, identity={"seed": 5}),
}
SWAPPED_BOTH = ("tensors swapped with the step before",)  # which damages the step before too


@pytest.mark.parametrize("case", DAMAGED_STATES)
def test_damaged_state(case, base, run, logs):
    """The one before is used, and said so."""
    DAMAGED_STATES[case](run)
    if case in SWAPPED_BOTH:
        Fork(logs, "--resume", "x").fails("no state of trajectory 0 in .* is whole: start a new run, or delete")
        return
    fork = goes_on(logs, base)
    assert fork.from_step == {0: 17}
    notices = re.findall(rf"^notice: state .*{NEWEST}.*: going back to the one before$", fork.err, re.M)
    assert len(notices) == 1, fork.err


def test_older_state_under_a_newer_name(base, run, logs):
    """It is whole and of this run: the numbers are the same."""
    for kind in ("json", "safetensors"):
        shutil.copy(run / f"state/{BEFORE}.{kind}", run / f"state/{NEWEST}.{kind}")
    assert goes_on(logs, base).from_step == {0: 17}


def test_no_state_is_whole(base, run, logs):
    edit([JSON, f"state/{BEFORE}.json"], cut)(run)
    fork = Fork(logs, "--resume", "x")
    fork.fails("no state of trajectory 0 in .* is whole: start a new run, or delete .*state/0-")
    assert fork.err.count("notice: state") == 2
    for file in (run / "state").glob("0-*"):  # as the line says
        file.unlink()
    assert goes_on(logs, base).from_step == {}


def other_corpus(run):
    """Another text, prepared with the same names, where the run's was."""
    shards = run.parents[1] / "shards"
    shutil.rmtree(shards)
    shutil.copytree(make_shards(run.parents[1] / "other", 1), shards)


DAMAGED_FILES = {  # name: (what is done, what the line says); the run was taught by member 1 and knows both predictions
    "member truncated": (edit("members/1/model.safetensors", cut), "member .*members/1 is missing or damaged"),
    "member flipped": (edit("members/1/model.safetensors", flip), "member .*members/1 is missing or damaged.*sha256"),
    "member swapped": (swap("members/0/model.safetensors", "members/1/model.safetensors"), "members/1 .*sha256"),
    "member swapped whole": (lambda run: [swap(f"members/0/{f}", f"members/1/{f}")(run) for f in (
        "model.safetensors", "config.json")], "member .*members/1 is missing or damaged.*sha256"),
    "member's configuration cut": (edit("members/1/config.json", cut), "member .*members/1 is missing or damaged"),
    "predictions truncated": (edit("predictions/0.safetensors", cut), "predictions .*/0.safetensors is missing"),
    "predictions flipped": (edit("predictions/1.safetensors", flip), "predictions .*/1.safetensors is missing"),
    "predictions swapped": (swap("predictions/0.safetensors", "predictions/1.safetensors"), "predictions/0.*sha256"),
    "predictions missing": (lambda run: (run / "predictions/0.safetensors").unlink(), "/0.safetensors is missing"),
    "shard truncated": (edit("../../shards/train.bin", cut), "shard .*train.bin is missing or damaged.*too many or"),
    "shard flipped": (edit("../../shards/heldout.bin", flip), "shard .*heldout.bin is missing or damaged.*sha256"),
    "shards swapped": (swap("../../shards/dev.bin", "../../shards/val.bin"), "shard .*dev.bin is missing or damaged"),
    "another corpus": (other_corpus, "no state of trajectory 0 in .* is whole"),
}


@pytest.fixture(scope="module")
def movable(base, tmp_path_factory):
    """As `stopped`, with shards of its own beside it, at a path relative to the working directory."""
    place = tmp_path_factory.mktemp("movable")
    shutil.copytree(make_shards(base), place / "shards")
    plant = lambda: (os.chdir(place), at_call(q0.Optimizer, "step", 19))
    assert Fork(place / "logs", *RUN, "--data", "shards", "--run", "x", *EVERY_STEP, plant=plant).wait() < 0
    return place


@pytest.mark.parametrize("case", DAMAGED_FILES)
def test_damaged_file(case, movable, tmp_path):
    """Refused in one line; mended, the run goes on with the same numbers (checked once, which covers the order)."""
    place = shutil.copytree(movable, tmp_path / "place")
    damage, pattern = DAMAGED_FILES[case]
    damage(place / "logs/x")
    Fork(place / "logs", "--resume", "x", plant=lambda: os.chdir(place)).fails(pattern)
    if case == "member swapped whole":
        damage(place / "logs/x")  # swapped back
        Fork(place / "logs", "--resume", "x", plant=lambda: os.chdir(place)).good()
        assert len(weights_of(place / "logs/x")) == 6


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite

def poison(step, kind, micro_batch=1):
    """Plant a loss or gradient that is not finite, in micro-batch `micro_batch` of `step` (of two a step), and check
    that this step's update changes neither weights nor moments while that of the next does."""
    bad = {"nan": float("nan"), "inf": float("inf")}[kind.split()[0]]

    def plant():
        real_loss, real_step, calls = q0.training_loss, q0.Optimizer.step, []

        def loss_of(model, *args):
            loss, ce = real_loss(model, *args)
            calls.append(1)
            if len(calls) - 1 == 2 * (step - 1) + micro_batch:
                if kind.endswith("loss"):
                    return loss * bad, ce * bad
                loss.register_hook(lambda gradient: gradient * bad)
            return loss, ce

        def held(optimizer):
            kept = {name: x.clone() for name, x in optimizer.state().items() if name not in ("steps", "skipped")}
            return {**kept, **{n: p.detach().clone() for _, ps, *_ in optimizer.groups for n, p in enumerate(ps)}}

        def step_of(optimizer, *args):
            before = held(optimizer)
            real_step(optimizer, *args)
            after = held(optimizer)
            same = [torch.equal(before[k], after[k]) for k in before]
            if len(calls) == 2 * step:
                assert all(same), "the update was not left out"
                print("left out", flush=True)
            else:
                assert not any(same), "an update is missing"
        q0.training_loss, q0.Optimizer.step = loss_of, step_of
    return plant


@pytest.mark.parametrize("kind", ["nan loss", "inf loss", "nan gradient"])
def test_not_finite(kind, base, argv, logs):
    """Stopped at the next logged line, with the place; then --skip-nonfinite goes on from the last good state."""
    fork = Fork(logs, *argv, *CYCLE_ENDS, "--log-every", "5", plant=poison(12, kind))
    line = fork.fails("lower --lr-matrix, try --precision float32, or --resume it with --skip-nonfinite")
    if kind.endswith("loss"):
        assert "the loss is not finite at step 12 of trajectory 0, micro-batch 1; 1 updates were left out" in line
    else:
        assert "a gradient is not finite at or before step 15 of trajectory 0; 1 updates were left out" in line
    assert "the last saved state is of step 8" in line and fork.out.count("left out") == 1
    assert "\nstep:15/24" in fork.out and "\nstep:20/24" not in fork.out
    if kind == "nan loss":
        goes_on_from = Fork(logs, "--resume", "x", "--skip-nonfinite", "--log-every", "1").good().from_step
        assert goes_on_from == {0: 8} and weights_of(logs / "x") == weights_of(reference(base))
        assert json.loads((logs / "x/result.json").read_text())["skipped_updates"] == 0


def test_skip_not_finite(base, argv, logs):
    """Counted, logged, told in the result; killed after it and resumed, the count goes on. The rest of the run equals
    one that met the same fault and was not killed."""
    whole = logs.parent / "whole/logs"
    Fork(whole, *argv, *EVERY_STEP, "--skip-nonfinite", plant=poison(12, "nan loss", 0)).good()
    plant = lambda: (poison(12, "nan loss", 0)(), at_call(q0.Optimizer, "step", 19))
    assert Fork(logs, *argv, *EVERY_STEP, "--skip-nonfinite", plant=plant).wait() == -signal.SIGKILL
    Fork(logs, "--resume", "x").good()
    assert compare(whole / "x", logs / "x") == []
    skipped = [m for m in metrics_of(logs / "x") if m["event"] == "skipped"]
    assert len(skipped) == 1 and skipped[0]["updates"] == 1
    assert skipped[0]["reason"] == "the loss is not finite at step 12 of trajectory 0, micro-batch 0"
    assert result_of(logs / "x")["skipped_updates"] == 1
    assert weights_of(logs / "x") != weights_of(reference(base))
    assert all(np.isfinite(p).all() for f in (logs / "x/predictions").iterdir() for p in load_file(f).values())


def test_skipped_updates_of_earlier_cycles(argv, logs):
    """A fresh start has a new optimizer; the count goes on, and what one cycle left out is not told again in the next."""
    Fork(logs, *argv, "--boundary", "fresh", "--log-every", "1", "--skip-nonfinite", plant=poison(12, "nan loss", 0)).good()
    skipped = [m for m in metrics_of(logs / "x") if m["event"] == "skipped"]
    assert [m["updates"] for m in skipped] == [1] and result_of(logs / "x")["skipped_updates"] == 1


def test_not_finite_and_saved_before_it_is_noticed(argv, logs):
    """The state of a step between the fault and the logged line knows of it: the run that goes on counts it."""
    fork = Fork(logs, *argv, *EVERY_STEP, "--log-every", "5", plant=poison(12, "nan loss"))
    assert "step 12 of trajectory 0, micro-batch 1; 1 updates were left out; the last saved state is of step 14" in (
        fork.fails("skip-nonfinite"))
    Fork(logs, "--resume", "x").fails("1 updates were left out; the last saved state is of step 14")
    assert Fork(logs, "--resume", "x", "--skip-nonfinite").good().from_step == {0: 14}
    assert result_of(logs / "x")["skipped_updates"] == 1


def test_not_finite_in_every_step(argv, logs):
    """With --skip-nonfinite too, every update is left out: the weights stay those of the start."""
    def plant():
        real = q0.training_loss
        q0.training_loss = lambda *args: tuple(x * float("nan") for x in real(*args))
    fork = Fork(logs, *argv, "--skip-nonfinite", plant=plant).good()
    assert result_of(logs / "x")["skipped_updates"] == 24, fork.text


# ----------------------------------------------------------------------------------------------------------------------
# Memory, hanging, two of a kind

def fail_with(error):
    def act():
        raise error
    return act


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried to "
                 "allocate 99 bytes."), MemoryError()], ids=["cuda", "cpu", "python"])
def test_out_of_memory(error, base, argv, logs):
    fork = Fork(logs, *argv, *EVERY_STEP, plant=planted(q0, "training_loss", 20, act=fail_with(error)))
    line = fork.fails(r"rank 0 is out of memory: halve --micro-batch \(plan shows")
    assert str(error)[:40] in line
    if isinstance(error, MemoryError):
        assert goes_on(logs, base).from_step == {0: 9}


def test_other_errors_are_not_hidden(argv, logs):
    fork = Fork(logs, *argv, plant=planted(q0, "training_loss", 20, act=fail_with(RuntimeError("planted"))))
    assert fork.wait() == 1 and fork.err.startswith("rank 0 failed:\n") and "RuntimeError: planted" in fork.err


def hang():
    time.sleep(60)


def test_a_hanging_rank(argv, logs):
    """0.05 minutes later it ends and shows where each of its threads is; the other rank ends too."""
    mark = time.monotonic()
    first, second = ranks(logs, *argv, "--hang-minutes", "0.05", plants=(
        None, planted(q0, "training_loss", 9, act=hang)))
    assert second.wait(20) == 1 and first.wait(20) not in (0, None)
    assert time.monotonic() - mark < 30
    assert "Timeout (0:00:03)!" in second.err and re.search(r'File .*, line \d+ in hang\n', second.err)
    assert second.err.count("Thread 0x") >= 2 and " in train\n" in second.err  # main, and the one that watches
    assert not (logs / "x/result.json").exists()


def test_a_hanging_evaluation(argv, logs):
    fork = Fork(logs, *argv, "--hang-minutes", "0.02", plant=planted(q0, "true_token_probs", 2, act=hang))
    assert fork.wait(20) == 1 and " in hang\n" in fork.err and "Timeout (0:00:01" in fork.err


def test_a_slow_run_does_not_hang(argv, logs):
    """Steps of 0.1 s are no hang of 0.6 s, however many they are."""
    def plant():
        real = q0.Optimizer.step
        q0.Optimizer.step = lambda *args: (time.sleep(0.1), real(*args))
    mark = time.monotonic()
    Fork(logs, *argv, "--hang-minutes", "0.02", plant=plant).good()
    assert time.monotonic() - mark > 2


def test_two_processes_with_one_run(base, argv, logs):
    """The second is told so; it neither stops the first nor cuts its log."""
    def wait():
        (logs / "waits").touch()
        while not (logs / "go on").exists():
            time.sleep(0.01)
    first = Fork(logs, *argv, *EVERY_STEP, plant=planted(q0.Optimizer, "step", 15, act=wait))
    while not (logs / "waits").exists():
        assert first.poll() is None
        time.sleep(0.01)
    before = {p: p.read_bytes() for p in (logs / "x").rglob("*") if p.is_file()}
    Fork(logs, "--resume", "x").fails("x is in use: another process trains this run")
    Fork(logs, *argv).fails("run directory .* exists")
    assert before == {p: p.read_bytes() for p in (logs / "x").rglob("*") if p.is_file()}
    (logs / "go on").touch()
    first.good()
    assert compare(reference(base), logs / "x") == []


# ----------------------------------------------------------------------------------------------------------------------
# Hostile files: nothing is run, nothing is allocated that a header merely claims

def test_nothing_is_unpickled():
    tree, source = ast.parse(q0.SOURCE), q0.SOURCE
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))
             for a in n.names} | {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "safetensors" in names and not names & {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        called = ast.unparse(call.func)
        assert called not in ("eval", "exec", "np.fromregex"), ast.unparse(call)
        if called in ("torch.load", "np.load", "numpy.load"):
            safe = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert safe.get("weights_only") == "True" or safe.get("allow_pickle") == "False", ast.unparse(call)
    assert "allow_pickle=True" not in source and "weights_only=False" not in source


def test_sockets_are_not_needed(base, argv, logs):
    """A run of one process makes no connection and looks up no name."""
    def plant():
        def blocked(*args, **kwargs):
            raise AssertionError("a socket was used")
        for owner, names in ((socket.socket, ("connect", "connect_ex", "bind", "sendto")), (socket, ("getaddrinfo",
                             "create_connection", "gethostbyname"))):
            for name in names:
                setattr(owner, name, blocked)
        real = socket.socket.__init__
        socket.socket.__init__ = lambda self, *args, **kwargs: blocked() if real else None
    Fork(logs, *argv, plant=plant).good()
    assert compare(reference(base), logs / "x") == []


ROOM = 200 * 2 ** 20  # bytes that a reader may allocate beyond what the process has


def guarded(logs, act, seconds=60):
    """Call `act` in a fork, which gets an end; what it raises fails the test."""
    def call():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        act()
    fork = Fork(logs, call=call)
    assert fork.wait(seconds + 5) == 0, fork.err[-3000:]
    return fork


def check(read, seconds=1.5):
    """A clear UserError (returned as text) or a correct read (None), within `seconds`, of which a small file takes a
    hundredth; nothing else. Only in a fork: there is ROOM for allocations. Address space counts, so one that is larger
    is refused whether or not it would be touched, and a UserError that tells of it is a failure too."""
    def late(*args):
        raise TimeoutError("the reader hangs")
    signal.signal(signal.SIGALRM, late)
    room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + ROOM
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (room, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        read()
        return None
    except q0.UserError as e:
        told = str(e)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert told and "\n" not in told and len(told) < 1000, told
    assert not re.search("allocat|MemoryError|hangs", told), told
    return told


def shard(header, body=b""):
    return np.asarray(header, dtype="<i8").astype("<i4").tobytes() + body


def header(count, *first):
    found = np.zeros(256, dtype=np.int64)
    found[:3] = (*(first or (q0.SHARD_MAGIC, q0.SHARD_VERSION)), count)
    return found


@pytest.mark.parametrize("count, size", [(2 ** 31 - 1, 0), (2 ** 31 - 1, 64), (-1, 0), (-512, 0), (2 ** 30, 2 ** 20)])
def test_a_shard_that_claims_too_much(count, size, logs, tmp_path):
    (tmp_path / "x.bin").write_bytes(shard(header(count), bytes(size)))

    def act():
        assert "too many or too few" in check(lambda: q0.read_shard(tmp_path / "x.bin", 300))
    guarded(logs, act)


@pytest.fixture(scope="module")
def member(stopped):
    return stopped / "members/1"


def reconfigured(member, to, **changes):
    """A copy of a member whose configuration claims something else, its hashes in order."""
    shutil.copytree(member, to, dirs_exist_ok=True)
    about = json.loads((to / "config.json").read_text())
    for key, value in changes.items():
        place = about if key in about else about["config"]
        assert key in place
        place[key] = value
    (to / "config.json").write_text(json.dumps(about))
    return to


CLAIMS = {  # of a member's config.json
    "width": 2 ** 20, "vocab_size": 2 ** 31 - 1, "mlp_hidden": 2 ** 40, "head_dim": 64, "layers": 10 ** 6,
    "seq_len": 2 ** 16, "loop_passes": 10 ** 9}


@pytest.mark.parametrize("key", CLAIMS)
def test_a_member_that_claims_too_much(key, member, logs, tmp_path):
    folder = reconfigured(member, tmp_path / "m", **{key: CLAIMS[key]})

    def act():
        assert "is missing or damaged" in check(lambda: q0.load_member(folder))
    guarded(logs, act, 10)


def test_the_guard_sees_an_allocation_and_a_hang(logs):
    # 2 GB: other tests of this process may have left some hundred MB that malloc keeps
    for name, read in (("memory", lambda: torch.zeros(2 ** 29)), ("hang", lambda: time.sleep(5)),
                       ("told", lambda: (_ for _ in ()).throw(q0.UserError("RuntimeError: can't allocate memory")))):
        with pytest.raises(AssertionError):
            guarded(logs, lambda: check(read, 0.3))


@pytest.mark.parametrize("name", ["../val.bin", "/etc/hosts", "sub/val.bin", "..", ".", "", "val.bin\0", "./val.bin"])
def test_paths_of_a_manifest_stay_in_their_folder(name, base, tmp_path):
    """A shard beside the folder, whole and of the right hash, is not read."""
    folder = shutil.copytree(make_shards(base), tmp_path / "in/shards")
    for to in ("in", "in/shards/sub"):
        (tmp_path / to).mkdir(exist_ok=True)
        shutil.copy(folder / "val.bin", tmp_path / to)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"]["files"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(q0.UserError):
        q0.load_corpus(folder, 32, 2000)


def test_paths_of_a_state_stay_in_their_folder(run, logs, tmp_path):
    curve = json.loads((run / JSON).read_text())["body"]["at"]["curve"]
    shutil.copy(run / "predictions/0.safetensors", tmp_path / "7.safetensors")
    curve[0]["member"] = "../../../7"
    state_with(JSON, at={"curve": curve})(run)
    fork = Fork(logs, "--resume", "x")
    assert fork.wait(60) == 0 and re.search("notice: state .* is missing or damaged.*going back", fork.err)


STATES = {"no log": {"log": []}, "log a word": {"log": "x"}, "step a word": {"step": "x"},
          "curve a word": {"curve": "ab"},
          "an entry without predictions": {"curve": [{"member": 0}]}, "cycle beyond the last": {"cycle": 99},
          "log sizes negative": {"log": ["log.txt", -1, -1]}, "step negative": {"step": -5}}


@pytest.mark.parametrize("case", STATES)
def test_a_sealed_state_that_makes_no_sense(case, run, logs):
    for name in (NEWEST, BEFORE):
        state_with(f"state/{name}.json", at=STATES[case])(run)
    fork = Fork(logs, "--resume", "x")
    assert fork.wait(20) == 2 and "Traceback" not in fork.err, fork.err[-300:]


SETTINGS = {"a word": {"layers": "x"}, "a fraction": {"layers": 1.5}, "missing": {"lr_matrix": None},
            "unknown": {"q": 1}, "too many": {"epochs": 0}}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_a_run_that_make_no_sense(case, run, logs):
    about = json.loads((run / "run.json").read_text())
    for key, value in SETTINGS[case].items():
        about["config"].update({key: value}) if value is not None else about["config"].pop(key)
    (run / "run.json").write_text(json.dumps(about))
    Fork(logs, "--resume", "x", "--lr-matrix", "0.04").fails("")


# ----------------------------------------------------------------------------------------------------------------------
# Hypothesis: files made from good ones by any change

numbers = st.one_of(st.integers(-2, 70), st.sampled_from([
    2 ** 16, 2 ** 20, 10 ** 6, 2 ** 31 - 1, 2 ** 31, 2 ** 63, 10 ** 30, -2 ** 31, 0.5, -1.0, 1e308, float("inf"),
    float("nan")]))
words = st.one_of(st.text(max_size=8), st.sampled_from([
    "", ".", "..", "../x", "/etc/hosts", "val.bin", "\0", "0" * 64]))
values = st.recursive(st.one_of(st.none(), st.booleans(), numbers, words), lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)), max_leaves=6)


def places(value, path=()):
    """Paths to every part of a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(value, path, to):
    if not path:
        return to
    value = json.loads(json.dumps(value)) if isinstance(value, (dict, list)) else value
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if to is DROP:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return value


DROP = object()


def edits(value):
    """One to three changes of a JSON value."""
    def again(value, n):
        one = st.tuples(st.sampled_from(list(places(value))), st.one_of(values, st.just(DROP))).map(
            lambda change: changed(value, *change) if change[0] or change[1] is not DROP else {})
        return one if n == 1 else one.flatmap(lambda v: again(v, n - 1) if isinstance(v, (dict, list)) else st.just(v))
    return st.integers(1, 3).flatmap(lambda n: again(value, n))


def bytes_of(raw):
    """Changes of a file's bytes: cut, longer, some bytes other."""
    other = st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=4).map(
        lambda changes: functools.reduce(lambda r, c: r[:c[0]] + bytes([c[1]]) + r[c[0] + 1:], changes, raw))
    shorter, longer = st.integers(0, len(raw)).map(lambda n: raw[:n]), st.binary(max_size=40).map(lambda b: raw + b)
    return st.one_of(other, shorter, longer)


def dump(value):
    return json.dumps(value).encode()


class Target:
    """A kind of file: where it lies, files made from a good one, and what reads it."""

    def __init__(self, file, made, read):
        self.file, self.made, self.read = file, made, read


def shard_target(tmp):
    tokens = np.arange(40, dtype="<u2").tobytes()
    first = st.one_of(st.just((q0.SHARD_MAGIC, q0.SHARD_VERSION)), st.tuples(*[st.integers(-2 ** 31, 2 ** 31 - 1)] * 2))
    counts = st.one_of(st.just(40), st.integers(-2 ** 31, 2 ** 31 - 1), st.sampled_from([0, 1, 39, 2 ** 31 - 1]))
    made = st.one_of(st.builds(lambda f, n, body: shard(header(n, *f), body), first, counts, st.one_of(
        st.just(tokens), st.binary(max_size=90))), bytes_of(shard(header(40), tokens)))

    def read():
        found = q0.read_shard(tmp / "x.bin", 300)
        raw = (tmp / "x.bin").read_bytes()
        assert found.dtype == np.uint16 and found.tobytes() == raw[1024:] and (found < 300).all()
    return Target(tmp / "x.bin", made, read)


def manifest_target(tmp, shards):
    shutil.copytree(shards, tmp / "shards")
    good = json.loads((tmp / "shards/manifest.json").read_text())

    def read():
        corpus = q0.load_corpus(tmp / "shards", 32, 2000)
        for split, tokens in corpus.splits.items():
            whole = b"".join((tmp / "shards" / f"{s}.bin").read_bytes()[1024:] for s in q0.SPLITS)
            assert tokens[-20:].tobytes() in whole and (tokens < corpus.vocab_size).all()

    return Target(tmp / "shards/manifest.json", st.one_of(edits(good).map(dump), bytes_of(dump(good))), read)


def member_target(tmp, member):
    shutil.copytree(member, tmp / "m")
    good = json.loads((tmp / "m/config.json").read_text())
    config = st.builds(lambda key, value: changed(good, ("config", key), value),
                       st.sampled_from(sorted(good["config"])), st.one_of(numbers, values))

    def read():
        model = q0.load_member(tmp / "m")
        saved = q0.load_tensor_file(tmp / "m/model.safetensors")
        assert all(torch.equal(p, saved[n].to(p.dtype)) for n, p in model.named_parameters())

    made = st.one_of(config.map(dump), edits(good).map(dump), bytes_of(dump(good)))
    return Target(tmp / "m/config.json", made, read)


def state_target(tmp, run):
    shutil.copytree(run / "state", tmp / "state")
    for file in (tmp / "state").glob(f"{BEFORE}*"):
        file.unlink()
    file = tmp / f"state/{NEWEST}.json"
    good = json.loads(file.read_text())
    identity = good["body"]["identity"]
    sealed = edits(good["body"]).map(lambda body: {"body": body, "sha256": q0.digest(body)})

    def read():
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            at, tensors = q0.load_state(tmp / "state", 0, identity)
        saved = json.loads(file.read_text())["body"]
        assert saved["identity"] == identity and at.trajectory == 0 and tensors.exists()
        assert dump({k: vars(at)[k] for k in saved["at"]}) == dump(saved["at"])  # as text: NaN does not equal itself
    return Target(file, st.one_of(edits(good).map(dump), sealed.map(dump), bytes_of(dump(good))), read)


def predictions_target(tmp):
    folder, rng = tmp / "r/predictions", np.random.default_rng(0)
    folder.mkdir(parents=True)
    p = {s: rng.uniform(0.1, 1, 50).astype(np.float32) for s in ("heldout", "val")}
    for i in range(2):
        save_file(p, folder / f"{i}.safetensors")
    raw = (folder / "1.safetensors").read_bytes()
    n, = struct.unpack("<Q", raw[:8])
    about, body = json.loads(raw[8:8 + n]), raw[8 + n:]
    built = lambda text, size, body: struct.pack("<Q", size) + text + body
    made = st.one_of(
        edits(about).map(lambda a: built(dump(a), len(dump(a)), body)), bytes_of(raw),
        st.builds(lambda size: built(raw[8:8 + n], size, body), st.one_of(
            st.integers(0, 2 ** 64 - 1), st.sampled_from([2 ** 63, 2 ** 32, n - 1, n + 1]))),
        st.lists(st.floats(width=32), min_size=50, max_size=50).map(
            lambda x: raw[:-200] + np.array(x, dtype=np.float32).tobytes()))

    def read():
        found = q0.load_predictions(tmp / "r")
        assert found.keys() == p.keys() or len(found) == 2
        assert all(x.shape == (2, x.shape[1]) and x.dtype == np.float32 and (x > 0).all() and (x <= 1).all()
                   for x in found.values())
    return Target(folder / "1.safetensors", made, read)


TARGETS = {"shard": lambda tmp, base, run: shard_target(tmp),
           "predictions": lambda tmp, base, run: predictions_target(tmp),
           "manifest": lambda tmp, base, run: manifest_target(tmp, make_shards(base)),
           "member": lambda tmp, base, run: member_target(tmp, run / "members/1"),
           "state": lambda tmp, base, run: state_target(tmp, run)}


@pytest.mark.parametrize("kind", TARGETS)
def test_fuzz(kind, base, stopped, logs, tmp_path, request):
    """60 files of each kind, 400 by --slow: read correctly or refused in a line."""
    target, told = TARGETS[kind](tmp_path, base, stopped), []
    count = 400 if request.config.getoption("--slow") else 60

    @settings(max_examples=count, derandomize=count == 60, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(target.made)
    def fuzz(raw):
        target.file.write_bytes(raw)
        told.append(check(target.read) is not None)

    def act():
        fuzz()
        print(f"{kind}: {len(told)} files, {sum(told)} refused")
        assert len(told) >= count and 0.1 < sum(told) / len(told)
    print(guarded(logs, act, 300).out, end="")


@pytest.mark.parametrize("kind, key", [("manifest", "vocab_size"), ("member", "vocab_size")])
def test_infinite_numbers(kind, key, base, stopped, logs, tmp_path):
    target = TARGETS[kind](tmp_path, base, stopped)
    target.file.write_bytes(dump(changed(json.loads(target.file.read_text()), (key,), float("inf"))))

    def act():
        assert check(target.read)
    guarded(logs, act)
