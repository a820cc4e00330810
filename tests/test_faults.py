"""Faults and hostile files: one clear line, nothing harmed, and the run goes on. CPU only."""
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
from forks import (
    CYCLE_ENDS, EVERY_STEP, Fork, at_step, command, disturbed, planted, ranks, reference, resume,
    shards, start, states_of, weights_of)
from safetensors.numpy import save_file
from tiny import edit_json, fails, flip, read_json, shorten, with_file

import train_q0 as q
from records.population import load_member, load_predictions

NEWEST = "state/0-000000011"  # of `interrupted`
BEFORE = "state/0-000000010"
JSON = f"{NEWEST}.json"
TENSORS = f"{NEWEST}.safetensors"


def goes_on(base, logs):
    """--resume completes, with the numbers of a run that met no fault."""
    fork = resume(logs).good()
    assert not disturbed(base, logs)
    return fork


def raising(error):
    def act():
        raise error
    return act


# Disks -------------------------------------------------------------------------------------------

def limit(size):
    """Stands in for a full disk: a write beyond it is an OSError. Tests may run as root, so
    permissions would stop nothing."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


NO_SPACE = raising(OSError(errno.ENOSPC, "No space left on device"))
DISK = {  # what is written when the disk is full: what is planted
    "state": planted(q.Run, "save_state", 8, act=limit(50_000)),
    "member": planted(q, "save_member", 2, act=limit(10_000)),
    "log": at_step(8, limit(50_000)),
    "result": planted(os, "replace", 1, act=NO_SPACE, where=r"result\.json$")}


@pytest.mark.parametrize("case", DISK)
def test_disk_full(case, base, logs):
    start(base, logs, *EVERY_STEP, plant=DISK[case]).fails("File too large|No space left")
    assert not list(logs.rglob("*.tmp")) and not (logs / "x/result.json").exists()
    for name, (_, tensors) in states_of(logs / "x").items():  # all that are left are whole
        assert q.sha256_of(logs / f"x/state/{name}.safetensors") == tensors
    assert goes_on(base, logs).went_on_from or case == "result"


# Damaged, older and swapped files ----------------------------------------------------------------

def swap(*names):
    def damage(run):
        one, two = (run / name for name in names)
        one.rename(run / "aside")
        two.rename(one)
        (run / "aside").rename(two)
    return damage


def sealed(body):
    """A state's JSON as a program would write it."""
    return json.dumps({"body": body, "sha256": q.digest(body)})


def state_with(*names, **changes):
    """Edit the body of states' JSON."""
    def damage(run):
        for name in names:
            body = read_json(run / f"{name}.json")["body"]
            for key, value in changes.items():
                body[key] = {**body[key], **value} if isinstance(value, dict) else value
            (run / f"{name}.json").write_text(sealed(body))
    return damage


def load_state(run, killed):
    """(Progress, file of its tensors) of the newest whole state in `run`, a copy of `killed`."""
    identity = read_json(killed / JSON)["body"]["identity"]
    return q.Run(run, identity, [], {}).load_state(0)


DAMAGED_STATES = {  # what is done to the newest state
    "JSON truncated": with_file(JSON, shorten, -9),
    "JSON of another hash": with_file(JSON, functools.partial(edit_json, sha256="0" * 64)),
    "tensors flipped": with_file(TENSORS, flip),
    "tensors missing": with_file(TENSORS, Path.unlink),
    "of another trajectory": state_with(NEWEST, at={"trajectory": 1}),
    "of another run": state_with(NEWEST, identity={"seed": 5})}


@pytest.mark.parametrize("case", DAMAGED_STATES)
def test_damaged_state(case, interrupted, killed, capsys):
    """The one before is used, and said so."""
    DAMAGED_STATES[case](interrupted)
    at, tensors = load_state(interrupted, killed)
    assert at.step == 10 and tensors.stem == Path(BEFORE).name
    assert re.fullmatch(f"notice: .*{JSON} is missing or damaged.*\n", capsys.readouterr().err)


def test_a_run_whose_states_are_damaged(base, interrupted, logs):
    """It goes on from the one before; where none is whole, as the line says, from the start."""
    copy = shutil.copytree(logs, logs.with_name("copy"))
    shorten(interrupted / JSON, -9)
    goes_on(base, logs)
    shutil.rmtree(logs)
    copy.rename(logs)
    swap(TENSORS, f"{BEFORE}.safetensors")(interrupted)
    resume(logs).fails("no other state of trajectory 0 .*: start a new run, or delete .*state/0-")
    for file in (interrupted / "state").glob("0-*"):
        file.unlink()
    assert goes_on(base, logs).went_on_from == {}


def test_the_end_of_a_trajectory_is_damaged(base, logs):
    """Its member is made again from the state before."""
    start(base, logs, plant=planted(os, "replace", 1, where=r"result\.json$")).dies()
    (logs / "x/state/0-000000015_done.json").write_text("{}")
    goes_on(base, logs)


def test_formats_of_an_older_script(interrupted, logs, capsys):
    """One line says so, of states, of members, and of settings that are no more."""
    state_with(NEWEST, BEFORE, format=1)(interrupted)
    resume(logs).fails("of format 1, this script reads 3: use the train_q0.py at the head of its")
    edit_json(interrupted / "members/1/config.json", format=1)
    with pytest.raises(q.UserError, match="^member .*/1 .* of format 1, this script reads 3: use"):
        load_member(interrupted / "members/1")
    config = read_json(interrupted / "run.json")["config"]
    for changes, told in (({"rotary_base": 10_000}, "rotary_base"), ({"layers": "x"}, "--layers")):
        edit_json(interrupted / "run.json", config={**config, **changes})
        fails(capsys, f"run.json is missing or damaged: .*{told}", "--resume", "x")


def test_a_member_of_another_model(killed, monkeypatch):
    """The line says which weights are missing and unexpected; a bug in an edit is a traceback."""
    table = q.parameter_table

    def edited(*args):
        rows = table(*args)
        rows["up"] = rows.pop("gate_up")
        return rows

    monkeypatch.setattr(q, "parameter_table", edited)
    told = r"missing .*'up', \(1, 2, 64, 32\).*unexpected .*'gate_up', \(1, 2, 64, 32\)"
    with pytest.raises(q.UserError, match=told):
        load_member(killed / "members/1")
    monkeypatch.setattr(q, "parameter_table", raising(TypeError))
    with pytest.raises(TypeError):
        load_member(killed / "members/1")


PREDICTIONS = "predictions/0.safetensors"
DAMAGED_FILES = {  # what is done, what the line says; member 1 taught, both predictions are known
    "member": (with_file("members/1/model.safetensors", flip), "members/1 is .*damaged.*sha256"),
    "member swapped": (swap("members/0", "members/1"), "members/1 is .*damaged.*sha256"),
    "predictions swapped": (swap(PREDICTIONS, "predictions/1.safetensors"), "ions/0.*sha256"),
    "predictions missing": (with_file(PREDICTIONS, Path.unlink), f"{PREDICTIONS} is missing")}


@pytest.mark.parametrize("case", DAMAGED_FILES)
def test_damaged_file(case, base, interrupted, logs, capsys):
    """Refused in one line; mended, the run goes on."""
    damage, pattern = DAMAGED_FILES[case]
    damage(interrupted)
    fails(capsys, pattern, "--resume", "x")
    if case == "member swapped":
        damage(interrupted)  # swapped back
        goes_on(base, logs)


def test_another_corpus_of_the_same_name(tmp_path, logs, capsys):
    """Other text, the same files in other splits, other ends of documents."""
    start(tmp_path, logs, plant=at_step(12)).dies()
    path = tmp_path / "shards/manifest.json"
    splits = read_json(path)["splits"]
    train_on_val = {"files": splits["train"]["files"] + splits["val"]["files"]}
    for change, differs in (
            ({"splits": {**splits, "train": train_on_val}}, "train:"), ({"eot": 1}, "eot:")):
        edit_json(path, **change)
        fails(capsys, f"x exists and differs in {differs}", "--resume", "x")
        edit_json(path, splits=splits)
    shutil.rmtree(tmp_path / "shards")
    shards(tmp_path / "shards", 7)
    fails(capsys, "x exists and differs in train, heldout, dev, val:", "--resume", "x")


# Numbers that are not finite ---------------------------------------------------------------------

def poison(step, kind, micro_batch=1):
    """Plant a loss or gradient that is not finite in a micro-batch of `step` (of two a step)."""
    bad = float(kind.split()[0])
    real = q.training_loss
    calls = []

    def loss_of(*args):
        loss, ce = real(*args)
        calls.append(1)
        if len(calls) == 2 * (step - 1) + micro_batch + 1:
            if kind.endswith("loss"):
                return loss * bad, ce * bad
            loss.register_hook(lambda gradient: gradient * bad)
        return loss, ce

    def plant():
        q.training_loss = loss_of
    return plant


def test_not_finite(base, logs):
    """Stopped at the next logged line, with the place; then it goes on from the last good state."""
    argv = command(base, *CYCLE_ENDS, "--log-every", "5")
    fork = Fork(logs, *argv, plant=poison(7, "nan gradient"))
    fork.fails("the loss or a gradient is not finite at or before step 10 of trajectory 0; "
               ".* is of step 5: lower --lr-m")
    assert "\nstep:10/15" in fork.out
    again = resume(logs, "--log-every", "1").good()
    assert again.went_on_from == {0: 5}
    assert weights_of(logs / "x") == weights_of(reference(base))


def test_not_finite_is_never_saved(base, logs):
    """A save between the fault and the logged line notices it."""
    argv = command(base, *EVERY_STEP, "--log-every", "5")
    told = "before step 7 .*; the last saved state is of step 6"
    Fork(logs, *argv, plant=poison(7, "nan loss")).fails(told)
    assert resume(logs).good().went_on_from == {0: 6}


# Memory, bugs, hanging ---------------------------------------------------------------------------

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 99 bytes."


def test_out_of_memory(monkeypatch, capsys):
    for error in (torch.OutOfMemoryError(CUDA), RuntimeError(CPU), MemoryError()):
        monkeypatch.setattr(q, "command_train", lambda argv: raising(error)())
        fails(capsys, "rank 0 is out of memory: halve --micro-batch.*" + re.escape(str(error)[:40]))


def test_other_errors_are_not_hidden(base, logs):
    plant = planted(q, "training_loss", 20, act=raising(RuntimeError("planted")))
    fork = start(base, logs, plant=plant)
    assert fork.wait() == 1
    assert re.search("^rank 0 failed:\nTraceback.*RuntimeError: planted", fork.err, re.S)


def test_a_hanging_rank(base, logs):
    """0.05 minutes later it ends and shows where its threads are; the other rank ends too."""
    def hang():
        time.sleep(60)

    plants = {1: planted(q, "training_loss", 9, act=hang)}
    argv = command(base, "--hang-minutes", "0.05")
    first, second = ranks(2, logs, *argv, plants=plants)
    assert second.wait(20) == 1 and first.wait(20) not in (0, None)
    assert "Timeout (0:00:03)!" in second.err
    assert re.search(r"line \d+ in hang\n", second.err) and " in train\n" in second.err


# Hostile files: nothing is run, nothing is allocated that a header merely claims -----------------

def test_nothing_is_unpickled():
    names = set(re.findall(r"^\s*(?:from|import) (\w+)", q.SOURCE, re.M))
    assert "safetensors" in names
    assert not names & {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    assert not re.search(r"(?<![\w.])(eval|exec|torch\.load|np\.load|np\.fromregex)\(", q.SOURCE)


def test_sockets_are_not_needed(base, logs):
    """A run of one process makes no connection and looks up no name."""
    def plant():
        for owner, name in ((socket.socket, "__init__"), (socket, "getaddrinfo"),
                            (socket, "create_connection"), (socket, "gethostbyname")):
            setattr(owner, name, lambda *args, **kwargs: raising(AssertionError("a socket"))())

    start(base, logs, plant=plant).good()


ROOM = 200 * 2 ** 20  # bytes that a reader may allocate beyond what the process has


def check(read):
    """Whether `read` refuses in one line (a UserError); else what it reads is right. Only in a
    fork: address space counts, so what is larger than ROOM is refused whether or not it would be
    touched, and a UserError that tells of that is a failure too. A small file takes a hundredth of
    the time that it may."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, 1.5)  # SIGALRM ends the fork
    try:
        read()
        return False
    except q.UserError as e:
        told = str(e)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert told and "\n" not in told and len(told) < 1500, told
    assert not re.search("allocat|MemoryError", told), told
    return True


SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d[\d.e+-]*|true|false|null')
HOSTILE = ("true", "-1", "0.5", "2147483648", "1" + 30 * "0", "Infinity", "NaN", '"../x"', "{}",
           "[[]]")


def dump(value):
    return json.dumps(value).encode()


def edited(value):
    """Texts of a JSON value, each name, word and number changed to each of these."""
    text = json.dumps(value)
    spans = [match.span() for match in SCALAR.finditer(text)]
    return [(text[:a] + to + text[b:]).encode() for a, b in spans for to in HOSTILE]


def mangled(raw):
    """A file cut, with more at its end, with a byte that is another."""
    found = [raw[:size] for size in (0, 1, 8, 9, len(raw) // 2, len(raw) - 1)]
    step = 2 * (len(raw) // 100) + 1  # odd, so that both bytes of numbers are hit
    for at in range(0, len(raw), step):
        found.append(raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1:])
    return [*found, raw + b"\0"]


# A target is (file, what reads it, files made from a good one, some that must be refused)

def shard(count, body=b""):
    header = np.zeros(256, dtype="<i4")
    header[:3] = q.SHARD_MAGIC, q.SHARD_VERSION, count
    return header.tobytes() + body


def shard_target(tmp, base, run):
    file = tmp / "x.bin"
    tokens = np.arange(40, dtype="<u2").tobytes()
    bad = [shard(2 ** 31 - 1), shard(-1), shard(2 ** 30, bytes(2 ** 20))]

    def read():
        found = q.read_shard(file, 300)
        assert found.dtype == np.uint16 and found.tobytes() == file.read_bytes()[1024:]
        assert (found < 300).all()
    return file, read, mangled(shard(40, tokens)), bad


def manifest_target(tmp, base, run):
    """Shards beside their folder, whole and of the right hash, are not read."""
    folder = shutil.copytree(shards(base / "shards"), tmp / "in/shards")
    shutil.copytree(folder, folder / "sub")
    shutil.copy(folder / "val.bin", tmp / "in")
    file = folder / "manifest.json"
    good = read_json(file)
    bad = []
    for name in ("../val.bin", "/etc/hosts", "sub/val.bin", "..", "", "val.bin\0", "./val.bin"):
        bad.append(dump(good).replace(b'"val.bin"', dump(name)))

    def read():
        corpus = q.load_corpus(folder, 32, 1300)
        whole = b"".join((folder / f"{s}.bin").read_bytes()[1024:] for s in q.SPLITS)
        for tokens in corpus.splits.values():
            assert tokens[-20:].tobytes() in whole and (tokens < corpus.vocab_size).all()
    return file, read, [*edited(good), *mangled(dump(good))], bad


CLAIMS = {  # of a member's config.json
    "width": 2 ** 20, "layers": 10 ** 6, "head_dim": 48, "loop_passes": 10 ** 9, "windows": "SQ"}


def member_target(tmp, base, run):
    folder = shutil.copytree(run / "members/1", tmp / "m")
    file = folder / "config.json"
    good = read_json(file)
    bad = [dump({**good, "config": {**good["config"], key: x}}) for key, x in CLAIMS.items()]
    bad += [dump({**good, "vocab_size": n}) for n in (2 ** 31 - 1, float("inf"))]

    def read():
        model = load_member(folder)
        saved = q.load_tensor_file(folder / "model.safetensors")
        assert all(torch.equal(p, saved[n].to(p.dtype)) for n, p in model.named_parameters())
    return file, read, [*edited(good), *mangled(dump(good))], bad


def state_target(tmp, base, run):
    shutil.copytree(run / "state", tmp / "state")
    for file in tmp.glob(f"{BEFORE}*"):
        file.unlink()
    file = tmp / JSON
    good = read_json(file)["body"]

    def read():
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            at, tensors = load_state(tmp, run)
        body = read_json(file)["body"]
        assert body["identity"] == good["identity"]
        assert at.trajectory == 0 and tensors.exists()
        found = {key: vars(at)[key] for key in body["at"]}
        assert dump(found) == dump(body["at"])  # as text: NaN does not equal itself
    made = []
    for text in edited(good):
        with contextlib.suppress(ValueError):
            made.append(sealed(json.loads(text)).encode())
    return file, read, [*made, *mangled(sealed(good).encode())], []


def predictions_target(tmp, base, run):
    folder = tmp / "r/predictions"
    folder.mkdir(parents=True)
    p = np.random.default_rng(0).uniform(0.1, 1, 50).astype(np.float32)
    for i in range(2):
        save_file({"heldout": p, "val": p}, folder / f"{i}.safetensors")
    file = folder / "1.safetensors"
    raw = file.read_bytes()
    size, = struct.unpack("<Q", raw[:8])
    rest = raw[8:]

    headers = edited(json.loads(rest[:size]))
    made = [struct.pack("<Q", len(text)) + text + rest[size:] for text in headers]
    numbers = (0.0, -0.1, 1.1, float("nan"))
    bad = [raw[:-200] + np.full(50, x, dtype=np.float32).tobytes() for x in numbers]
    bad += [struct.pack("<Q", n) + rest for n in (2 ** 63, 2 ** 32, size - 1, size + 1)]

    def read():
        for x in load_predictions(tmp / "r").values():
            assert x.shape == (2, x.shape[1]) and x.dtype == np.float32
            assert (x > 0).all() and (x <= 1).all()
    return file, read, [*made, *mangled(raw)], bad


TARGETS = {"shard": shard_target, "predictions": predictions_target, "manifest": manifest_target,
           "member": member_target, "state": state_target}


@pytest.mark.parametrize("kind", TARGETS)
def test_hostile_files(kind, base, killed, logs, tmp_path):
    """Refused in a line, or read correctly."""
    file, read, made, bad = TARGETS[kind](tmp_path, base, killed)

    def act():
        for raw in bad:
            file.write_bytes(raw)
            assert check(read), raw
        refused = 0
        for raw in made:
            file.write_bytes(raw)
            refused += check(read)
        assert refused > 5

    Fork(logs, call=act).good(300)
