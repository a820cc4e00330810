"""Commands that use finished runs, under attack: hostile folders, lost weights, two commands at
once. A mistake ends in one line, and destroys nothing."""
import base64
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import Fork, planted, weights_of
from tiny import (
    edit_json, fails, flip, make_data, predictions_of, random_documents, read_json, snapshot,
    with_file, works)

import train_q0 as q
from records import runs
from records.mixture import load_mixture


# Hostile folders, with hashes that match --------------------------------------------------------

def with_tokenizer(raw=None, **entry):
    """Damage: other ranks, or another entry of the manifest, with the hash made to match."""
    def damage(run):
        data = run / "data"
        if raw is not None:
            (data / "tokenizer.tiktoken").write_bytes(raw)
        sha256 = q.sha256_of(data / "tokenizer.tiktoken")
        known = read_json(data / "manifest.json")["tokenizer"]
        edit_json(data / "manifest.json", tokenizer={**known, "sha256": sha256, **entry})
    return damage


def link_to_zero(run):
    (run / "data/tokenizer.tiktoken").unlink()
    (run / "data/tokenizer.tiktoken").symlink_to("/dev/zero")


def other_member(run):
    shutil.rmtree(run / "members/1")
    shutil.copytree(run / "members/0", run / "members/1")


BYTES = [b"%s %d" % (base64.b64encode(bytes([i])), i) for i in range(256)]
TWICE = b"\n".join([*BYTES, b"YWI= 5"])
TOKENIZER = "tokenizer in .*data is missing or damaged: "


@pytest.mark.parametrize("damage, message", [
    (other_member, "member .*members/1 is missing or damaged: .*sha256"),
    (with_file("data/tokenizer.tiktoken", flip), TOKENIZER + ".*sha256 of tokenizer.tiktoken"),
    (with_tokenizer(TWICE), TOKENIZER + ".*ranks must be distinct"),
    (with_tokenizer(file=".."), TOKENIZER + ".*not the name of a regular file"),
    (link_to_zero, "tokenizer.tiktoken is a device or a pipe")])
def test_hostile_files(damage, message, copied, corpus, capsys):
    damage(copied)
    fails(capsys, message, "evaluate", copied, "--data", corpus / "val.bin")


def test_what_a_mixture_cannot_read(finished, copied, capsys):
    with pytest.raises(q.UserError, match="65 tokens are more than the 64 that members of"):
        load_mixture(finished).log_probs(torch.zeros(1, 65, dtype=torch.long))
    with_tokenizer(pattern=r"(?:(?=a)a|a|aa)*b")(copied)  # at which tiktoken panics
    fails(capsys, "cannot read that text: .*BacktrackLimitExceeded", "sample", copied, "--prompt",
          "a" * 100)
    edit_json(copied / "data/manifest.json", tokenizer=None)
    fails(capsys, "has no tokenizer", "sample", copied)
    path = copied / "members/2/config.json"
    config = read_json(path)["config"]
    edit_json(path, config={**config, "softcap": 9.0})
    (copied / "result.json").unlink()  # with the hash of that file
    mixed = replace(load_mixture(copied), members=[2, 3], weights=[0.5, 0.5])
    with pytest.raises(q.UserError, match=r"do not mix: .*\(300, 9.0, 64\), \(300, 15.0, 64\)"):
        mixed.models


def ten_million_members(run):
    result = (run / "result.json").read_text()
    entries = "{}," * 10 ** 6
    (run / "result.json").write_text(result.replace('"curve": [', '"curve": [' + entries))


@pytest.mark.parametrize("damage, message", [
    (with_file("result.json", lambda path: edit_json(path, final_val_loss=float("nan"))),
     "damaged: .*final_val_loss is nan"),
    (ten_million_members, "damaged: .* bytes are too many for the 4 members")])
def test_hostile_results(damage, message, finished, copied, logs, capsys):
    damage(copied)
    fails(capsys, message, "pool", finished, copied, "--name", "x")
    assert not list(logs.iterdir())


# What is missing --------------------------------------------------------------------------------

def test_another_tokenizer(finished, base, flags, capsys):
    foreign = make_data(base / "foreign", random_documents(1400, seed=3))  # of as many entries
    said = "has another tokenizer than the data of .*first"
    fails(capsys, said, "evaluate", finished, "--data", foreign / "val.bin")
    sizes = ["--seq-len", "64", "--micro-batch", "8"]
    teacher = ["--population", "single", "--teacher", finished]
    fails(capsys, said, *flags, *sizes, *teacher, "--data", foreign)


def test_members_without_weights(copied, corpus, capsys):
    """The prior is fitted to the others; every command says so and goes on."""
    for i in (0, 2):
        (copied / f"members/{i}/model.safetensors").unlink()
    mixed = load_mixture(copied)
    assert "copied has no weights of members 0, 2 (--keep-" in capsys.readouterr().err
    weights, _ = q.fit_prior(predictions_of(copied)["heldout"][[1, 3]])
    found = dict(zip(mixed.members, mixed.weights))
    for i, weight in zip((1, 3), weights):
        assert found.get(i, 0) == pytest.approx(weight, abs=1e-5)
    out = works(capsys, "evaluate", copied, "--data", corpus / "heldout.bin")
    names = [line[:27].strip() for line in out.splitlines()[2:4]]
    assert names == ["member 1", "member 3"] and "uniform, all 2" in out


def test_trajectories_side_by_side(copied, capsys):
    """Members 2 and 3 are yet to come; nothing says to move what is there."""
    folder = copied / "predictions"
    for old, new in ((3, 5), (2, 4)):
        (folder / f"{old}.safetensors").rename(folder / f"{new}.safetensors")
    advice = "not of member 2: the run is not complete: "
    fails(capsys, advice + "copy predictions/2.safetensors from", "select", copied)
    (copied / "result.json").unlink()
    fails(capsys, advice + "member 2 of another trajectory is yet to come: wait", "select", copied)


# Two at once ------------------------------------------------------------------------------------

def test_several_at_once(finished, tmp_path):
    """Each makes a whole run of a name of its own."""
    logs = tmp_path / "logs"
    argv = [["pool"], ["pool"], ["average", "--last", "1"], ["average", "--last", "1"]]
    for fork in [Fork(logs, *command, finished) for command in argv]:
        fork.good()
    made = {name: weights_of(logs / name) for name in os.listdir(logs)}
    assert sorted(made) == ["first_mean", "first_mean2", "first_pool", "first_pool2"]
    assert made["first_mean"] == made["first_mean2"]
    assert made["first_pool"] == made["first_pool2"]
    assert made["first_pool"].keys() == weights_of(finished).keys()


def test_a_name_that_is_taken_meanwhile(finished, logs, monkeypatch, capsys):
    finish = runs.finish

    def late(*args):
        (logs / "x").mkdir()
        (logs / "x/precious").touch()
        finish(*args)

    monkeypatch.setattr(runs, "finish", late)
    fails(capsys, "x exists: give another --name", "pool", finished, "--name", "x")
    assert [path.name for path in logs.rglob("*")] == ["x", "precious"]


def test_what_a_kill_left_goes_and_nothing_else(finished, tmp_path):
    logs = tmp_path / "logs"
    Fork(logs, "pool", finished, plant=planted(runs, "finish", 1)).dies()
    left, = logs.iterdir()
    assert runs.MAKING.fullmatch(left.name)
    kept = shutil.copytree(finished, logs / "first_pool.tmp")
    run = shutil.copytree(finished, logs / left.name.replace(left.name[-15:-7], "abcdefgh"))
    before = snapshot(kept)
    Fork(logs, "pool", finished).good()
    assert not left.exists()
    assert snapshot(kept) == snapshot(run) == before
    assert (logs / "first_pool/result.json").exists()
