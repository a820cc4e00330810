"""Faults and hostile files: one clear line, nothing harmed, and the run goes on. CPU only."""
import errno
import functools
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from forks import (
    CYCLE_ENDS, EVERY_STEP, Fork, at_step, command, disturbed, planted, reference, resume, shards,
    start, states_of, weights_of)
from tiny import edit_json, fails, flip, read_json, with_file

import train_q0 as q
from records.population import load_member

NEWEST = "state/0-000000011"  # of `interrupted`
BEFORE = "state/0-000000010"
JSON = f"{NEWEST}.json"


def goes_on(base, logs):
    """--resume completes, with the numbers of a run that met no fault."""
    fork = resume(logs).good()
    assert not disturbed(base, logs)
    return fork


def raising(error):
    def act():
        raise error
    return act


def limit(size):
    """Stands in for a full disk: a write beyond it is an OSError. Tests may run as root, so
    permissions would stop nothing."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


NO_SPACE = raising(OSError(errno.ENOSPC, "No space left on device"))
DISK = {  # what is written when the disk is full: what is planted
    "state": planted(q.Run, "save_state", 8, act=limit(50_000)),
    "log": at_step(8, limit(50_000)),
    "result": planted(os, "replace", 1, act=NO_SPACE, where=r"result\.json$")}


@pytest.mark.parametrize("case", DISK)
def test_disk_full(case, base, logs):
    start(base, logs, *EVERY_STEP, plant=DISK[case]).fails("File too large|No space left")
    assert not list(logs.rglob("*.tmp")) and not (logs / "x/result.json").exists()
    for name, (_, tensors) in states_of(logs / "x").items():  # all that are left are whole
        assert q.sha256_of(logs / f"x/state/{name}.safetensors") == tensors
    assert goes_on(base, logs).went_on_from or case == "result"


def swap(*names):
    def damage(run):
        one, two = (run / name for name in names)
        one.rename(run / "aside")
        two.rename(one)
        (run / "aside").rename(two)
    return damage


def state_with(*names, **changes):
    """Edit the body of states' JSON."""
    def damage(run):
        for name in names:
            body = read_json(run / f"{name}.json")["body"]
            for key, value in changes.items():
                body[key] = {**body[key], **value} if isinstance(value, dict) else value
            sealed = {"body": body, "sha256": q.digest(body)}
            (run / f"{name}.json").write_text(json.dumps(sealed))
    return damage


DAMAGED_STATES = {  # what is done to the newest state
    "JSON of another hash": with_file(JSON, functools.partial(edit_json, sha256="0" * 64)),
    "tensors flipped": with_file(f"{NEWEST}.safetensors", flip),
    "of another trajectory": state_with(NEWEST, at={"trajectory": 1}),
    "of another run": state_with(NEWEST, identity={"seed": 5})}


@pytest.mark.parametrize("case", DAMAGED_STATES)
def test_damaged_state(case, interrupted, killed, capsys):
    """The one before is used, and said so."""
    identity = read_json(killed / JSON)["body"]["identity"]
    DAMAGED_STATES[case](interrupted)
    at, tensors = q.Run(interrupted, identity, [], {}).load_state(0)
    assert at.step == 10 and tensors.stem == Path(BEFORE).name
    assert re.fullmatch(f"notice: .*{JSON} is missing or damaged.*\n", capsys.readouterr().err)


def test_no_state_is_whole(base, interrupted, logs):
    """One line says what to do, and then the run goes on from the start."""
    state_with(NEWEST, BEFORE, format=1)(interrupted)
    resume(logs).fails("of format 1, this script reads 3: use the train_q0.py at the head of its")
    state_with(NEWEST, BEFORE, format=3)(interrupted)
    swap(f"{NEWEST}.safetensors", f"{BEFORE}.safetensors")(interrupted)
    resume(logs).fails("no other state of trajectory 0 .*: start a new run, or delete .*state/0-")
    for file in (interrupted / "state").glob("0-*"):
        file.unlink()
    assert goes_on(base, logs).went_on_from == {}


@pytest.mark.parametrize("one, two, pattern", [
    ("members/0", "members/1", "members/1 is .*damaged.*sha256"),  # member 1 taught
    ("predictions/0.safetensors", "predictions/1.safetensors", "ions/0.*sha256")])
def test_swapped_files(one, two, pattern, base, interrupted, logs, capsys):
    """Refused in one line; swapped back, the run goes on."""
    swap(one, two)(interrupted)
    fails(capsys, pattern, "--resume", "x")
    swap(one, two)(interrupted)
    resume(logs).good()
    assert weights_of(interrupted) == weights_of(reference(base))


def poison(step):
    """Plant a gradient that is not finite in the second micro-batch of `step` (of two a step)."""
    real = q.training_loss
    calls = []

    def loss_of(*args):
        loss, ce = real(*args)
        calls.append(1)
        if len(calls) == 2 * step:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss, ce

    def plant():
        q.training_loss = loss_of
    return plant


@pytest.mark.parametrize("saves, told, step", [
    (CYCLE_ENDS, "at or before step 10 of trajectory 0; .* is of step 5: lower --lr-m", 5),
    (EVERY_STEP, "at or before step 7 .*; the last saved state is of step 6", 6)])
def test_not_finite(saves, told, step, base, logs):
    """Noticed at the next logged line or save; then it goes on from the last good state."""
    argv = command(base, *saves, "--log-every", "5")
    Fork(logs, *argv, plant=poison(7)).fails("the loss or a gradient is not finite " + told)
    assert resume(logs, "--log-every", "1").good().went_on_from == {0: step}
    assert weights_of(logs / "x") == weights_of(reference(base))


CPU = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 99 bytes."


def test_out_of_memory_and_bugs(base, logs, monkeypatch, capsys):
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU), MemoryError()):
        monkeypatch.setattr(q, "command_train", lambda argv: raising(error)())
        fails(capsys, "rank 0 is out of memory: halve --micro-batch.*" + re.escape(str(error)[:18]))
    monkeypatch.undo()
    plant = planted(q, "training_loss", 20, act=raising(RuntimeError("planted")))
    fork = start(base, logs, plant=plant)
    assert fork.wait() == 1
    assert re.search("^rank 0 failed:\nTraceback.*RuntimeError: planted", fork.err, re.S)


ROOM = 200 * 2 ** 20  # bytes that a reader may allocate beyond what the process has
NAMES = ("../val.bin", "/etc/hosts", "sub/val.bin", "", "val.bin\0", "./val.bin")
CLAIMS = {  # of a member's config.json
    "width": 2 ** 20, "layers": 10 ** 6, "head_dim": 48, "loop_passes": 10 ** 9, "windows": "SQ"}


def test_a_member_of_another_model(interrupted, monkeypatch):
    """The line says which weights are missing and unexpected."""
    table = q.parameter_table

    def edited(*args):
        rows = table(*args)
        rows["up"] = rows.pop("gate_up")
        return rows

    monkeypatch.setattr(q, "parameter_table", edited)
    told = r"missing .*'up', \(1, 2, 64, 32\).*unexpected .*'gate_up', \(1, 2, 64, 32\)"
    with pytest.raises(q.UserError, match=told):
        load_member(interrupted / "members/1")
    edit_json(interrupted / "members/1/config.json", format=1)
    with pytest.raises(q.UserError, match="of format 1, this script reads 3: use"):
        load_member(interrupted / "members/1")


def hostile_manifest(tmp, base, run):
    """(file, what reads it, texts of it): shards beside their folder, whole and of the right hash,
    are not read."""
    folder = shutil.copytree(shards(base / "shards"), tmp / "in/shards")
    shutil.copytree(folder, folder / "sub")
    shutil.copy(folder / "val.bin", tmp / "in")
    file = folder / "manifest.json"
    good = file.read_bytes()
    bad = [good.replace(b'"val.bin"', json.dumps(name).encode()) for name in NAMES]
    return file, lambda: q.load_corpus(folder, 32, 1300), bad


def hostile_member(tmp, base, run):
    folder = shutil.copytree(run / "members/1", tmp / "m")
    file = folder / "config.json"
    good = read_json(file)
    bad = [json.dumps({**good, "vocab_size": 2 ** 31 - 1}).encode()]
    for key, value in CLAIMS.items():
        bad.append(json.dumps({**good, "config": {**good["config"], key: value}}).encode())
    return file, lambda: load_member(folder), bad


@pytest.mark.parametrize("target", [hostile_manifest, hostile_member])
def test_hostile_files(target, base, killed, logs, tmp_path):
    """Refused in a line; nothing is allocated that a header merely claims. In a fork: address space
    counts, so what is larger than ROOM is refused whether or not it would be touched."""
    file, read, bad = target(tmp_path, base, killed)

    def act():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
        for raw in bad:
            file.write_bytes(raw)
            with pytest.raises(q.UserError) as refusal:
                read()
            assert not re.search("allocat|MemoryError|\n", str(refusal.value))

    Fork(logs, call=act).good(300)
