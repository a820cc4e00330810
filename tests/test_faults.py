"""Faults and hostile files: one clear line, nothing harmed, and the run goes on. CPU only."""
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.numpy import load_file, save_file

import train_q0 as q
from records import population
from forks import (
    CYCLE_ENDS, EVERY_STEP, RUN, Fork, at_call, at_step, command, differences, disturbed,
    metrics_of, planted, ranks, reference, result_of, resume, shards, start, states_of,
    weights_of)

NEWEST = "state/0-000000011"
BEFORE = "state/0-000000010"


@pytest.fixture(scope="module")
def stopped(base):
    """A run that was killed in its step 12, with a state after every step; copy it."""
    logs = base / "stopped/logs"
    start(base, logs, *EVERY_STEP, plant=at_step(12)).dies()
    return logs / "x"


@pytest.fixture
def run(stopped, logs):
    return shutil.copytree(stopped, logs / "x")


def goes_on(base, logs):
    """--resume completes, with the numbers of a run that met no fault."""
    fork = resume(logs).good()
    assert not disturbed(base, logs)
    return fork


# Disks

def limit_files(size):
    """Stands in for a full disk: a write beyond it is an OSError. Tests may run as root, so
    permissions would stop nothing."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


def denied():
    raise PermissionError(errno.EACCES, "Permission denied")


def limit(size):
    return functools.partial(limit_files, size)


def no_space_at_next_sync():
    at_call(os, "fsync", 1, act=no_space)


DISK = {  # what is written when the disk is full or refuses: what is planted
    "state": planted(q.Run, "save_state", 8, act=limit(50_000)),
    "state, synced": planted(os, "fsync", 20, act=no_space),
    "state, renamed": planted(os, "replace", 15, act=denied, where="/state/"),
    "member": planted(q, "save_member", 2, act=limit(10_000)),
    "member, synced": planted(q, "save_member", 2, act=no_space_at_next_sync),
    "predictions": planted(q, "true_token_probs", 4, after=True, act=limit(500)),
    "log": at_step(8, limit(50_000)),
    "result": planted(os, "replace", 1, act=no_space, where=r"result\.json$")}


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.slow) if "sync" in case else case for case in DISK])
def test_disk_full(case, base, logs):
    fork = start(base, logs, *EVERY_STEP, plant=DISK[case])
    fork.fails("File too large|No space left|Permission denied")
    assert not list(logs.rglob("*.tmp")) and not (logs / "x/result.json").exists()
    for name, (_, tensors) in states_of(logs / "x").items():  # all that are left are whole
        assert q.sha256_of(logs / f"x/state/{name}.safetensors") == tensors
    assert goes_on(base, logs).went_on_from


@pytest.mark.parametrize("name", [
    "state", "members", "predictions", "log.txt", "metrics.jsonl", "run.json"])
def test_something_in_the_way(name, run, logs):
    """A file where a folder is expected, or the other way round."""
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("")
    else:
        path.unlink()
        path.mkdir()
    resume(logs).fails(re.escape(f"x/{name}"))


@pytest.mark.parametrize("plant", [
    planted(Path, "mkdir", 1, act=denied),
    planted(os, "replace", 1, act=denied, where="run.json")], ids=["mkdir", "write"])
def test_unwritable_folder(plant, base, logs):
    """As another user's is, or a disk that is mounted read-only."""
    start(base, logs, plant=plant).fails("Permission denied")
    assert not (logs / "x/run.json").exists()


# Damaged, older and swapped files

def edit(name, change):
    def damage(run):
        (run / name).write_bytes(change((run / name).read_bytes()))
    return damage


def cut(raw):
    return raw[:len(raw) // 2]


def flip(raw):
    return raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]


def empty(raw):
    return b""


def a_list(raw):
    return b"[]"


def earlier(raw):
    return raw.replace(b'"step": 11', b'"step": 10')


def remove(name):
    def damage(run):
        (run / name).unlink()
    return damage


def swap(one, two):
    def damage(run):
        kept = (run / one).read_bytes()
        shutil.copy(run / two, run / one)
        (run / two).write_bytes(kept)
    return damage


def overwrite(name, source):
    def damage(run):
        shutil.copy(run / source, run / name)
    return damage


def state_with(*names, **changes):
    """Edit the body of states' JSON and seal it again, as a program would."""
    def damage(run):
        for name in names:
            file = run / f"{name}.json"
            body = json.loads(file.read_text())["body"]
            for key, value in changes.items():
                old = body[key]
                body[key] = {**old, **value} if isinstance(value, dict) else value
            file.write_text(json.dumps({"body": body, "sha256": q.digest(body)}))
    return damage


JSON = f"{NEWEST}.json"
TENSORS = f"{NEWEST}.safetensors"
DAMAGED_STATES = {  # what is done to the newest state
    "JSON truncated": edit(JSON, cut), "JSON empty": edit(JSON, empty),
    "JSON flipped": edit(JSON, flip), "JSON a list": edit(JSON, a_list),
    "position edited": edit(JSON, earlier),
    "tensors truncated": edit(TENSORS, cut), "tensors flipped": edit(TENSORS, flip),
    "tensors missing": remove(TENSORS),
    "tensors of another step": overwrite(TENSORS, f"{BEFORE}.safetensors"),
    "of another trajectory": state_with(NEWEST, at={"trajectory": 1}),
    "of another run": state_with(NEWEST, identity={"seed": 5})}


def load_state(run, stopped):
    """(Progress, file of its tensors) of the newest whole state in `run`, a copy of `stopped`."""
    identity = json.loads((stopped / JSON).read_text())["body"]["identity"]
    return q.Run(run, identity, [], "").load_state(0)


@pytest.mark.parametrize("case", DAMAGED_STATES)
def test_damaged_state(case, run, stopped, capsys):
    """The one before is used, and said so."""
    DAMAGED_STATES[case](run)
    at, tensors = load_state(run, stopped)
    assert at.step == 10 and tensors.stem == Path(BEFORE).name
    assert re.fullmatch(f"notice: state .*{JSON} is missing or damaged: .*: going back to the one "
                        "before\n", capsys.readouterr().err)


@pytest.mark.parametrize("damage", [edit(JSON, cut), remove(JSON)], ids=["damaged", "missing"])
def test_a_run_whose_state_is(damage, base, run, logs):
    damage(run)
    goes_on(base, logs)


def test_no_state_is_whole(base, run, logs):
    swap(TENSORS, f"{BEFORE}.safetensors")(run)
    fork = resume(logs)
    fork.fails("a sha256 does not match; no other state of trajectory 0 .*: start a new run, or "
               "delete .*state/0-")
    for file in (run / "state").glob("0-*"):  # as the line says
        file.unlink()
    assert goes_on(base, logs).went_on_from == {}


def test_the_end_of_a_trajectory_is_damaged(base, logs):
    """Its member is made again from the state before."""
    start(base, logs, plant=planted(population, "population_table", 1)).dies()
    (logs / "x/state/0-000000015-done.json").write_text("{}")
    goes_on(base, logs)


def test_formats_of_an_older_script(base, run, logs):
    """One line says so, of states, of members, and of settings that are no more."""
    state_with(NEWEST, BEFORE, format=1)(run)
    older = "it is of format 1, this script reads 2: use the train_q0.py at the head of its run"
    resume(logs).fails(older)
    about = json.loads((run / "members/1/config.json").read_text())
    del about["format"]  # as members had it then
    (run / "members/1/config.json").write_text(json.dumps(about))
    with pytest.raises(q.UserError, match="^member .*/1 is of format 1, this script reads 2: use"):
        q.load_member(run / "members/1")
    about = json.loads((run / "run.json").read_text())
    about["config"]["rotary_base"] = 10000
    (run / "run.json").write_text(json.dumps(about))
    resume(logs).fails("run.json .* other settings .*: use the train_q0.py at the")


def test_a_member_of_another_model(stopped, monkeypatch):
    """The line says which weights, of what shapes, are missing and unexpected."""
    table = q.parameter_table

    def edited(*args):
        rows = table(*args)
        rows["up"] = rows.pop("gate_up")
        return rows
    monkeypatch.setattr(q, "parameter_table", edited)
    with pytest.raises(q.UserError) as e:
        q.load_member(stopped / "members/1")
    assert re.search(r"another model: missing \[\('up', \(1, 2, 64, 32\)\)\], unexpected "
                     r"\[\('gate_up', \(1, 2, 64, 32\)\)\]: use the train_q0.py at", str(e.value))
    assert "damaged" not in str(e.value)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError])
@pytest.mark.parametrize("place", ["parameter_table", "empty_member", "plain_attention"])
def test_a_bug_is_not_called_damage(place, error, stopped, monkeypatch):
    """A user who edits the model sees where it fails."""
    def broken(*args):
        raise error("a bug")
    monkeypatch.setattr(q, place, broken)
    with pytest.raises(error, match="a bug"):
        q.load_member(stopped / "members/1")


def swap_member(run):
    for name in ("model.safetensors", "config.json"):
        swap(f"members/0/{name}", f"members/1/{name}")(run)


def other_corpus(run):
    """Another text, prepared with the same names, where the run's was."""
    shutil.rmtree(run / "../../shards")
    shards(run.parents[1] / "shards", 7)


def in_manifest(change):
    """Of the data, whose files stay as they are."""
    def damage(run):
        path = run / "../../shards/manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))
    return damage


def train_on_val(manifest):
    splits = manifest["splits"]
    splits["train"]["files"] += splits["val"]["files"]


MEMBER = "members/1/model.safetensors"
SHARDS = "../../shards"
DAMAGED_FILES = {  # what is done, what the line says; member 1 taught, both predictions are known
    "member truncated": (edit(MEMBER, cut), "members/1 is missing or damaged"),
    "member flipped": (edit(MEMBER, flip), "members/1 is missing or damaged.*sha256"),
    "member swapped": (swap_member, "members/1 is missing or damaged.*sha256"),
    "configuration cut": (edit("members/1/config.json", cut), "members/1 is missing or damaged"),
    "predictions cut": (edit("predictions/0.safetensors", cut), "predictions .*/0.* is missing or"),
    "predictions swapped": (swap("predictions/0.safetensors", "predictions/1.safetensors"),
                            "predictions/0.*sha256"),
    "predictions missing": (remove("predictions/0.safetensors"), "/0.safetensors is missing"),
    "shard truncated": (edit(f"{SHARDS}/train.bin", cut), "train.bin is missing or.*too many or"),
    "shard flipped": (edit(f"{SHARDS}/heldout.bin", flip), "heldout.bin is missing or.*sha256"),
    "shards swapped": (swap(f"{SHARDS}/dev.bin", f"{SHARDS}/val.bin"), "dev.bin is missing or"),
    "another corpus": (other_corpus, "x exists and differs in train, heldout, dev, val:"),
    "trained on val, too": (in_manifest(train_on_val), "x exists and differs in train:"),
    "other ends of text": (in_manifest(lambda m: m.update(eot=1)), "x exists and differs in eot:")}


@pytest.fixture(scope="module")
def movable(base):
    """As `stopped`, with shards of its own beside it, at a path relative to the working folder."""
    place = base / "movable"
    shards(place / "shards")

    def plant():
        os.chdir(place)
        at_step(12)()
    argv = [*RUN, "--data", "shards", "--run", "x", *EVERY_STEP]
    Fork(place / "logs", *argv, plant=plant).dies()
    return place


@pytest.mark.parametrize("case", DAMAGED_FILES)
def test_damaged_file(case, movable, tmp_path):
    """Refused in one line; mended, the run goes on."""
    place = shutil.copytree(movable, tmp_path / "place")
    damage, pattern = DAMAGED_FILES[case]
    damage(place / "logs/x")
    enter = functools.partial(os.chdir, place)
    Fork(place / "logs", "--resume", "x", plant=enter).fails(pattern)
    if case == "member swapped":
        damage(place / "logs/x")  # swapped back
        Fork(place / "logs", "--resume", "x", plant=enter).good()
        assert len(weights_of(place / "logs/x")) == 6


# Numbers that are not finite

def poison(step, kind, micro_batch=1):
    """Plant a loss or gradient that is not finite in a micro-batch of `step` (of two a step). After
    every step it is printed how many tensors of weights and moments changed."""
    bad = float(kind.split()[0])
    real_loss = q.training_loss
    real_step = q.Optimizer.step
    calls = []

    def loss_of(*args):
        loss, ce = real_loss(*args)
        calls.append(1)
        if len(calls) == 2 * (step - 1) + micro_batch + 1:
            if kind.endswith("loss"):
                return loss * bad, ce * bad
            loss.register_hook(lambda gradient: gradient * bad)
        return loss, ce

    def held(optimizer):
        tensors = {**optimizer.state(), **optimizer.masters}
        return {n: x.clone() for n, x in tensors.items() if n not in ("steps", "skipped")}

    def step_of(optimizer, *args):
        before = held(optimizer)
        real_step(optimizer, *args)
        changed = sum(not torch.equal(x, before[n]) for n, x in held(optimizer).items())
        print(f"changed:{changed}/{len(before)}", flush=True)

    def plant():
        q.training_loss = loss_of
        q.Optimizer.step = step_of
    return plant


def left_out(fork):
    """Steps, counted from 1, after which nothing had changed; after the others everything had."""
    steps = re.findall(r"^changed:(\d+)/(\d+)$", fork.out, re.M)
    assert all(changed in ("0", whole) for changed, whole in steps)
    return [i for i, (changed, _) in enumerate(steps, 1) if changed == "0"]


@pytest.mark.parametrize("kind", ["nan loss", "inf loss", "nan gradient"])
def test_not_finite(kind, base, logs):
    """Stopped at the next logged line, with the place; then it goes on from the last good state."""
    argv = command(base, *CYCLE_ENDS, "--log-every", "5")
    fork = Fork(logs, *argv, plant=poison(7, kind))
    what = "the loss is not finite at step 7, micro-batch 1"
    if kind == "nan gradient":
        what = "a gradient is not finite at or before step 10"
    fork.fails(f"{what} of trajectory 0; 1 updates were left out; the last saved state is of step "
               "5: lower --lr-matrix, .* or --resume it with --skip-nonfinite")
    assert left_out(fork) == [7]
    assert "\nstep:10/15" in fork.out
    if kind == "nan loss":
        again = resume(logs, "--skip-nonfinite", "--log-every", "1").good()
        assert again.went_on_from == {0: 5}
        assert weights_of(logs / "x") == weights_of(reference(base))
        assert result_of(logs / "x")["skipped_updates"] == 0


def test_skip_not_finite(base, logs, tmp_path):
    """Counted, logged, told in the result. Killed after it and resumed, the count goes on."""
    argv = command(base, *EVERY_STEP, "--skip-nonfinite")
    whole = tmp_path / "whole/logs"
    Fork(whole, *argv, plant=poison(7, "nan loss", 0)).good()

    def plant():
        poison(7, "nan loss", 0)()
        at_step(12)()
    Fork(logs, *argv, plant=plant).dies()
    resume(logs).good()
    assert differences(whole / "x", logs / "x") == []
    (skipped,) = [event for event in metrics_of(logs / "x") if event["event"] == "skipped"]
    assert skipped["updates"] == result_of(logs / "x")["skipped_updates"] == 1
    assert skipped["reason"] == "the loss is not finite at step 7, micro-batch 0 of trajectory 0"
    assert weights_of(logs / "x") != weights_of(reference(base))
    for file in (logs / "x/predictions").iterdir():
        assert all(np.isfinite(p).all() for p in load_file(file).values())


def test_a_fresh_cycle_keeps_the_count(base, logs):
    """What one cycle left out is not told again in the next."""
    argv = command(base, "--boundary", "fresh", "--skip-nonfinite")
    Fork(logs, *argv, plant=poison(7, "nan loss", 0)).good()
    skipped = [event for event in metrics_of(logs / "x") if event["event"] == "skipped"]
    assert [event["updates"] for event in skipped] == [1]
    assert result_of(logs / "x")["skipped_updates"] == 1


def test_saved_before_it_is_noticed(base, logs):
    """States between the fault and the logged line know of it: the run that goes on counts it."""
    argv = command(base, *EVERY_STEP, "--log-every", "5")
    told = "1 updates were left out; the last saved state is of step 9"
    Fork(logs, *argv, plant=poison(7, "nan loss")).fails(f"at step 7, micro-batch 1 .*; {told}")
    resume(logs).fails(told)
    again = resume(logs, "--skip-nonfinite").good()
    assert again.went_on_from == {0: 9}
    assert result_of(logs / "x")["skipped_updates"] == 1


def test_not_finite_in_every_step(base, logs):
    def plant():
        real = q.training_loss
        q.training_loss = lambda *args: tuple(x * float("nan") for x in real(*args))
    start(base, logs, "--skip-nonfinite", plant=plant).good()
    assert result_of(logs / "x")["skipped_updates"] == 15


# Memory, bugs, hanging

def raising(error):
    def act():
        raise error
    return act


CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 99 bytes."


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError(CUDA), RuntimeError(CPU), MemoryError()], ids=["cuda", "cpu", "python"])
def test_out_of_memory(error, monkeypatch, capsys):
    def train(argv):
        raise error
    monkeypatch.setattr(q, "command_train", train)
    assert q.main([]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(error)[:40] in line
    assert "error: rank 0 is out of memory: halve --micro-batch (plan shows" in line


def test_out_of_memory_in_a_run(base, logs):
    plant = planted(q, "training_loss", 20, act=raising(MemoryError()))
    start(base, logs, *EVERY_STEP, plant=plant).fails("out of memory")
    assert goes_on(base, logs).went_on_from == {0: 9}


def test_other_errors_are_not_hidden(base, logs):
    plant = planted(q, "training_loss", 20, act=raising(RuntimeError("planted")))
    fork = start(base, logs, plant=plant)
    assert fork.wait() == 1
    assert re.search("^rank 0 failed:\nTraceback.*RuntimeError: planted", fork.err, re.S)


def hang():
    time.sleep(60)


def test_a_hanging_rank(base, logs):
    """0.05 minutes later it ends and shows where its threads are; the other rank ends too."""
    plants = {1: planted(q, "training_loss", 9, act=hang)}
    argv = command(base, "--hang-minutes", "0.05")
    first, second = ranks(2, logs, *argv, plants=plants)
    assert second.wait(20) == 1 and first.wait(20) not in (0, None)
    assert "Timeout (0:00:03)!" in second.err
    assert re.search(r"line \d+ in hang\n", second.err) and " in train\n" in second.err
    assert not (logs / "x/result.json").exists()


def test_a_hanging_evaluation(base, logs):
    plant = planted(q, "true_token_probs", 2, act=hang)
    fork = start(base, logs, "--hang-minutes", "0.02", plant=plant)
    assert fork.wait(20) == 1
    assert " in hang\n" in fork.err and "Timeout (0:00:01" in fork.err


def test_a_slow_run_does_not_hang(base, logs):
    """Steps of 0.1 s are no hang of 1.2 s, however many they are."""
    def plant():
        real = q.Optimizer.step

        def slow(*args):
            time.sleep(0.1)
            real(*args)
        q.Optimizer.step = slow
    start(base, logs, "--hang-minutes", "0.02", plant=plant).good()


# Hostile files: nothing is run, nothing is allocated that a header merely claims

def test_nothing_is_unpickled():
    tree = ast.parse(q.SOURCE)
    nodes = list(ast.walk(tree))
    names = {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    for n in nodes:
        if isinstance(n, ast.Import):
            names |= {alias.name.split(".")[0] for alias in n.names}
    assert "safetensors" in names
    assert not names & {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    called = {ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)}
    assert not called & {"eval", "exec", "torch.load", "np.load", "np.fromregex"}


def test_sockets_are_not_needed(base, logs):
    """A run of one process makes no connection and looks up no name."""
    def plant():
        def blocked(*args, **kwargs):
            raise AssertionError("a socket was used")
        socket.socket.__init__ = blocked
        for name in ("getaddrinfo", "create_connection", "gethostbyname"):
            setattr(socket, name, blocked)
    start(base, logs, plant=plant).good()


ROOM = 200 * 2 ** 20  # bytes that a reader may allocate beyond what the process has


def guarded(logs, act, seconds=60):
    """Call `act` in a fork, which gets an end; what it raises fails the test."""
    def call():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        act()
    return Fork(logs, call=call).good(seconds + 5)


def check(read, seconds=1.5):
    """A clear UserError (returned as text) or a correct read (None), within `seconds`, of which a
    small file takes a hundredth. Only in a fork: there is ROOM for allocations. Address space
    counts, so one that is larger is refused whether or not it would be touched, and a UserError
    that tells of it is a failure too."""
    def late(*args):
        raise TimeoutError("the reader hangs")
    signal.signal(signal.SIGALRM, late)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        read()
        return None
    except q.UserError as e:
        told = str(e)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert told and "\n" not in told and len(told) < 1500, told
    assert not re.search("allocat|MemoryError|hangs", told), told
    return told


def zeros():
    torch.zeros(2 ** 29)  # 2 GB: some hundred MB may be left from other tests


def tell():
    raise q.UserError("RuntimeError: can't allocate memory")


@pytest.mark.parametrize("read", [zeros, hang, tell])
def test_the_guard_sees(read, logs):
    with pytest.raises(AssertionError):
        guarded(logs, functools.partial(check, read, 0.3))


def shard(count, body=b"", first=(q.SHARD_MAGIC, q.SHARD_VERSION)):
    header = np.zeros(256, dtype=np.int64)
    header[:3] = (*first, count)
    return header.astype("<i4").tobytes() + body


@pytest.mark.parametrize("count, size", [
    (2 ** 31 - 1, 0), (2 ** 31 - 1, 64), (-1, 0), (-512, 0), (2 ** 30, 2 ** 20)])
def test_a_shard_that_claims_too_much(count, size, logs, tmp_path):
    file = tmp_path / "x.bin"
    file.write_bytes(shard(count, bytes(size)))

    def act():
        assert "too many or too few" in check(lambda: q.read_shard(file, 300))
    guarded(logs, act)


def reconfigured(member, to, key, value):
    """A copy of a member whose configuration claims something else, its hashes in order."""
    shutil.copytree(member, to)
    about = json.loads((to / "config.json").read_text())
    place = about if key in about else about["config"]
    assert key in place
    place[key] = value
    (to / "config.json").write_text(json.dumps(about))
    return to


CLAIMS = {  # of a member's config.json
    "width": 2 ** 20, "vocab_size": 2 ** 31 - 1, "mlp_hidden": 2 ** 40, "layers": 10 ** 6,
    "head_dim": 48, "loop_passes": 10 ** 9, "windows": "SQ"}


@pytest.mark.parametrize("key", CLAIMS)
def test_a_member_that_claims_too_much(key, stopped, logs, tmp_path):
    folder = reconfigured(stopped / "members/1", tmp_path / "m", key, CLAIMS[key])

    def act():
        told = check(lambda: q.load_member(folder))
        assert re.search("is missing or damaged|another model", told)
    guarded(logs, act, 10)


@pytest.mark.parametrize("name", [
    "../val.bin", "/etc/hosts", "sub/val.bin", "..", ".", "", "val.bin\0", "./val.bin"])
def test_paths_of_a_manifest_stay_in_their_folder(name, base, tmp_path):
    """A shard beside the folder, whole and of the right hash, is not read."""
    folder = shutil.copytree(shards(base / "shards"), tmp_path / "in/shards")
    (folder / "sub").mkdir()
    for to in (tmp_path / "in", folder / "sub"):
        shutil.copy(folder / "val.bin", to)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"]["files"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(q.UserError):
        q.load_corpus(folder, 32, 1300)


def test_paths_of_a_state_stay_in_their_folder(run, stopped, tmp_path):
    curve = json.loads((run / JSON).read_text())["body"]["at"]["curve"]
    shutil.copy(run / "predictions/0.safetensors", tmp_path / "7.safetensors")
    curve[0]["member"] = "../../../7"
    state_with(NEWEST, at={"curve": curve})(run)
    at, _ = load_state(run, stopped)
    assert at.step == 10


SENSELESS = {
    "no log": {"log": []}, "log a word": {"log": "x"}, "step a word": {"step": "x"},
    "curve a word": {"curve": "ab"}, "an entry without hashes": {"curve": [{"member": 0}]},
    "cycle beyond the last": {"cycle": 99}, "log sizes negative": {"log": [-1, -1]},
    "step negative": {"step": -5}, "unknown": {"x": 1}}


@pytest.mark.parametrize("case", SENSELESS)
def test_a_sealed_state_that_makes_no_sense(case, run, stopped):
    state_with(NEWEST, BEFORE, at=SENSELESS[case])(run)
    with pytest.raises(q.UserError, match="is missing or damaged.*no other state of trajectory 0"):
        load_state(run, stopped)


SETTINGS = {
    "a word": ("layers", "x"), "a fraction": ("layers", 1.5), "missing": ("lr_matrix", None),
    "too few": ("epochs", 0)}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_a_run_that_make_no_sense(case, stopped, tmp_path, capsys):
    run = shutil.copytree(stopped, tmp_path / "x")
    about = json.loads((run / "run.json").read_text())
    key, value = SETTINGS[case]
    about["config"][key] = value
    if value is None:
        del about["config"][key]
    (run / "run.json").write_text(json.dumps(about))
    assert q.main(["--resume", str(run), "--lr-matrix", "0.04"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("train_q0.py: error: ") and line.count("\n") == 1


# Hypothesis: files made from good ones by any change

numbers = st.one_of(st.integers(-2, 70), st.sampled_from([
    2 ** 16, 2 ** 20, 10 ** 6, 2 ** 31 - 1, 2 ** 31, 2 ** 63, 10 ** 30, -2 ** 31, 0.5, -1.0, 1e308,
    float("inf"), float("nan")]))
words = st.one_of(st.text(max_size=8), st.sampled_from([
    "", ".", "..", "../x", "/etc/hosts", "val.bin", "\0", "0" * 64]))


def nested(inner):
    return st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3))


values = st.recursive(st.one_of(st.none(), st.booleans(), numbers, words), nested, max_leaves=6)
DROP = object()


def places(value, path=()):
    """Paths to every part of a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(value, path, to):
    """`value` with another one at `path`, or without what is there."""
    if not path:
        return {} if to is DROP else to
    whole = json.loads(json.dumps(value))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if to is DROP:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return whole


@st.composite
def edits(draw, value):
    """One to three changes of a JSON value."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        value = changed(value, path, draw(st.one_of(values, st.just(DROP))))
    return value


@st.composite
def mangled(draw, raw):
    """Changes of a file's bytes: cut, longer, some bytes other."""
    kind = draw(st.sampled_from(["cut", "longer", "other"]))
    if kind == "cut":
        return raw[:draw(st.integers(0, len(raw)))]
    if kind == "longer":
        return raw + draw(st.binary(max_size=40))
    found = bytearray(raw)
    for _ in range(draw(st.integers(0, 4))):
        found[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(found)


def dump(value):
    return json.dumps(value).encode()


@dataclass
class Target:
    """A kind of file: where it lies, files made from a good one, and what reads it."""
    file: Path
    made: object
    read: object


def shard_target(tmp, base, run):
    file = tmp / "x.bin"
    tokens = np.arange(40, dtype="<u2").tobytes()
    number = st.integers(-2 ** 31, 2 ** 31 - 1)
    first = st.one_of(st.just((q.SHARD_MAGIC, q.SHARD_VERSION)), st.tuples(number, number))
    counts = st.one_of(st.just(40), number, st.sampled_from([0, 1, 39, 2 ** 31 - 1]))
    bodies = st.one_of(st.just(tokens), st.binary(max_size=90))
    made = st.one_of(st.builds(shard, counts, bodies, first), mangled(shard(40, tokens)))

    def read():
        found = q.read_shard(file, 300)
        assert found.dtype == np.uint16 and found.tobytes() == file.read_bytes()[1024:]
        assert (found < 300).all()
    return Target(file, made, read)


def manifest_target(tmp, base, run):
    folder = shutil.copytree(shards(base / "shards"), tmp / "shards")
    file = folder / "manifest.json"
    good = json.loads(file.read_text())

    def read():
        corpus = q.load_corpus(folder, 32, 1300)
        whole = b"".join((folder / f"{s}.bin").read_bytes()[1024:] for s in q.SPLITS)
        for tokens in corpus.splits.values():
            assert tokens[-20:].tobytes() in whole and (tokens < corpus.vocab_size).all()
    return Target(file, st.one_of(edits(good).map(dump), mangled(dump(good))), read)


def member_target(tmp, base, run):
    folder = shutil.copytree(run / "members/1", tmp / "m")
    good = json.loads((folder / "config.json").read_text())

    def setting(key, value):
        return dump(changed(good, ("config", key), value))
    keys = st.sampled_from(sorted(good["config"]))
    made = st.one_of(st.builds(setting, keys, st.one_of(numbers, values)),
                     edits(good).map(dump), mangled(dump(good)))

    def read():
        model = q.load_member(folder)
        saved = q.load_tensor_file(folder / "model.safetensors")
        assert all(torch.equal(p, saved[n].to(p.dtype)) for n, p in model.named_parameters())
    return Target(folder / "config.json", made, read)


def state_target(tmp, base, run):
    shutil.copytree(run / "state", tmp / "state")
    for file in tmp.glob(f"{BEFORE}*"):
        file.unlink()
    file = tmp / JSON
    good = json.loads(file.read_text())

    def seal(body):
        return dump({"body": body, "sha256": q.digest(body)})
    made = st.one_of(edits(good).map(dump), edits(good["body"]).map(seal), mangled(dump(good)))

    def read():
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            at, tensors = load_state(tmp, run)
        body = json.loads(file.read_text())["body"]
        assert body["identity"] == good["body"]["identity"]
        assert at.trajectory == 0 and tensors.exists()
        found = {key: vars(at)[key] for key in body["at"]}
        assert dump(found) == dump(body["at"])  # as text: NaN does not equal itself
    return Target(file, made, read)


def predictions_target(tmp, base, run):
    folder = tmp / "r/predictions"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    p = {s: rng.uniform(0.1, 1, 50).astype(np.float32) for s in ("heldout", "val")}
    for i in range(2):
        save_file(p, folder / f"{i}.safetensors")
    raw = (folder / "1.safetensors").read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header, body = raw[8:8 + n], raw[8 + n:]

    def with_header(about):
        text = dump(about)
        return struct.pack("<Q", len(text)) + text + body

    def with_size(size):
        return struct.pack("<Q", size) + header + body

    def with_numbers(found):
        return raw[:-200] + np.array(found, dtype=np.float32).tobytes()
    odd = st.sampled_from([2 ** 63, 2 ** 32, n - 1, n + 1])
    sizes = st.one_of(odd, st.integers(0, 2 ** 64 - 1))
    floats = st.lists(st.floats(width=32), min_size=50, max_size=50)
    made = st.one_of(edits(json.loads(header)).map(with_header), mangled(raw),
                     sizes.map(with_size), floats.map(with_numbers))

    def read():
        for x in population.load_predictions(tmp / "r").values():
            assert x.shape == (2, x.shape[1]) and x.dtype == np.float32
            assert (x > 0).all() and (x <= 1).all()
    return Target(folder / "1.safetensors", made, read)


TARGETS = {"shard": shard_target, "predictions": predictions_target, "manifest": manifest_target,
           "member": member_target, "state": state_target}


@pytest.mark.parametrize("kind", TARGETS)
def test_fuzz(kind, base, stopped, logs, tmp_path, request):
    """60 files of each kind, 400 by --slow: read correctly or refused in a line."""
    target = TARGETS[kind](tmp_path, base, stopped)
    slow = request.config.getoption("--slow")
    count = 400 if slow else 60
    told = []

    @settings(max_examples=count, derandomize=not slow, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(target.made)
    def fuzz(raw):
        target.file.write_bytes(raw)
        told.append(check(target.read) is not None)

    def act():
        fuzz()
        assert len(told) >= count and 0.1 < sum(told) / len(told)
    guarded(logs, act, 300)


@pytest.mark.parametrize("kind", ["manifest", "member"])
def test_infinite_numbers(kind, base, stopped, logs, tmp_path):
    target = TARGETS[kind](tmp_path, base, stopped)
    good = json.loads(target.file.read_text())
    target.file.write_bytes(dump(changed(good, ("vocab_size",), float("inf"))))

    def act():
        assert check(target.read)
    guarded(logs, act)
