"""A run as its user meets it: what it writes, what decides its numbers, mistakes of the user."""
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import approx
from safetensors.torch import load_file
from tiny import (
    fails, flip, loss_of, predictions_of, read_json, sequences_of, shorten, works)

import train_q0 as q

LINE = "=" * 100 + "\n"


def table_of(text):
    """The lines of the result's table in an output."""
    found, = re.findall(r"^   k .*^prior gap:.*?$", text, re.M | re.S)
    return found.splitlines()


def member_of(folder, i):
    return load_file(folder / f"members/{i}/model.safetensors")


def test_artifacts(run, corpus):
    from matplotlib.image import imread
    folder, _ = run
    assert not list(folder.rglob("*.tmp"))
    found = predictions_of(folder)
    assert found.keys() == {"heldout", "val"}
    for split, p in found.items():
        assert p.shape == (4, 64 * len(sequences_of(corpus, split, 64)))
    for i in range(4):
        about = read_json(folder / f"members/{i}/config.json")
        assert (about["config"]["width"], about["vocab_size"]) == (64, 300)
        assert about["distilled"] == int(i > 0)
        member = member_of(folder, i)
        assert {weight.dtype for weight in member.values()} == {torch.bfloat16}
        assert member["embed"].shape == (320, 64)
    assert imread(folder / "curve.png")[..., :3].std() > 0.01  # it is not blank


def test_log(run, repo, corpus):
    """Source, settings, data, what was derived and why; then an event a line."""
    folder, stdout = run
    log = (folder / "log.txt").read_text(encoding="utf-8")
    source = (repo / "train_q0.py").read_text(encoding="utf-8")
    assert log.startswith(source + LINE)
    header, events = log.removeprefix(source + LINE).split(LINE)
    about, end = json.JSONDecoder().raw_decode(header)
    assert about["machine"]["torch"] == torch.__version__
    assert about["config"]["train_tokens"] == 4000
    for name, split in read_json(corpus / "manifest.json")["splits"].items():
        assert about["data"][name] == split["files"]
    assert header[end:].strip() in stdout
    table = table_of(events)
    assert table == table_of(stdout)
    lines = [line for line in events.splitlines() if line not in table]
    for line in lines:
        words = line.removeprefix("ensemble ").removeprefix("kernels ").split(" ")
        assert all(":" in word for word in words), line
    final = dict(word.split(":", 1) for word in lines[-1].split(" "))
    result = read_json(folder / "result.json")
    for key, shown in final.items():  # losses to 5 decimals, other numbers to 4 digits
        exact = dict(abs=5.1e-6) if key.endswith("loss") else dict(rel=5.1e-4)
        assert float(shown) == approx(result[key], **exact), key


def test_losses_from_cached_predictions(finished):
    """Those in the result, from the predictions and the prior's weights alone."""
    found = predictions_of(finished)
    result = read_json(finished / "result.json")
    weights = np.array(result["table"]["weights"])
    assert weights.sum() == approx(1, abs=1e-12)
    assert np.sort(weights)[-2] > 0.05 and weights.min() >= 0
    uniform = np.full(4, 0.25)
    assert loss_of(weights @ found["heldout"]) <= loss_of(uniform @ found["heldout"]) - 0.01
    assert result["final_val_loss"] == approx(loss_of(weights @ found["val"]), abs=1e-6)
    assert result["uniform_val_loss"] == approx(loss_of(uniform @ found["val"]), abs=1e-6)
    for entry, p in zip(result["curve"], found["val"], strict=True):
        assert entry["loss"] == approx(loss_of(p), abs=1e-6)


def test_select(run, monkeypatch, capsys):
    """The run's table again, without a forward pass; and the members of a budget."""
    folder, stdout = run
    monkeypatch.setattr(q, "LOGS", folder.parent)
    monkeypatch.setattr(q.GPT, "forward", None)
    assert table_of(works(capsys, "select", "first")) == table_of(stdout)
    _, _, of_2, *_ = [line.split() for line in table_of(stdout)]
    *_, last = works(capsys, "select", folder, "--k", 2).splitlines()
    weights = re.findall(r"weight:(\S+)", last)
    assert last.startswith(f"k:2 val_loss:{of_2[3]} ") and len(weights) == 2
    assert sum(map(float, weights)) == approx(1, abs=1.1e-4)  # four decimals
    fails(capsys, "--k 0 must be at least 1", "select", "first", "--k", "0")


@pytest.mark.parametrize("population, trajectories, distilled", [
    ("ensemble", 2, [0, 0]),
    ("chain", 1, [0, 1]),
    ("snapshots", 1, [0, 0]),
    ("q0", 1, [0, 1, 1, 1])])
def test_populations(population, trajectories, distilled, trained, monkeypatch):
    """Members; a cycle's first weights against the member before; what the teacher does."""
    starts = []
    differs = []  # the loss from the cross-entropy
    training_loss = q.training_loss

    def spied(model, teacher, cfg, tokens):
        loss, ce = training_loss(model, teacher, cfg, tokens)
        starts.append(model.down.detach().clone())
        differs.append(not torch.equal(loss, ce))
        assert differs[-1] == bool(teacher)
        return loss, ce

    monkeypatch.setattr(q, "training_loss", spied)
    flags = ["--cycles", 4] if population == "q0" else []  # else as many as the budget gives
    folder = trained("x", "--population", population, "--average", 0, *flags)
    curve = read_json(folder / "result.json")["curve"]
    assert [entry["distilled"] for entry in curve] == distilled
    assert curve[-1]["epochs"] == 8
    assert curve[-1]["traj"] == trajectories - 1
    steps = len(starts) // len(distilled)
    assert differs == [bool(d) for d in distilled for _ in range(steps)]
    for i in range(1, len(distilled)):
        before = member_of(folder, i - 1)["down"].float()
        moved = float((starts[i * steps] - before).std() / before.std())
        if population == "snapshots":
            assert moved < 2 ** -8  # the member is rounded
        elif population == "q0":  # the draws give their deviation to 2%
            noise = 0.15 + 0.10 * math.cos(math.pi * (i - 1) / 2)
            assert moved == approx(noise, rel=0.1)
        else:
            both = torch.stack([starts[i * steps].flatten(), before.flatten()])
            assert both.corrcoef()[0, 1].abs() < 0.15


def test_a_member_is_the_mean_over_the_end_of_its_cycle(trained, monkeypatch):
    """Worked out anew from the weights after each step."""
    after = []
    step = q.Optimizer.step

    def spied(self, *args):
        step(self, *args)
        after.append({name: w.double() for name, w in self.masters.items()})

    monkeypatch.setattr(q.Optimizer, "step", spied)
    folder = trained("x", "--cycles", 2, "--epochs", 12, "--average", 0.25)
    steps = len(after) // 2
    count = math.ceil(0.25 * steps)
    for i in range(2):
        end = (i + 1) * steps
        for name, weight in member_of(folder, i).items():
            mean = sum(w[name] for w in after[end - count:end]) / count
            # rounded to bf16's 8 bits, one of which sums in another order may move
            torch.testing.assert_close(weight.double(), mean, rtol=2 ** -8, atol=1e-8)


@pytest.mark.parametrize("argv, pattern", [
    (["--epoch", "3"], "unknown argument --epoch: did you mean --epochs?"),
    (["--data", "nowhere"], "nowhere/manifest.json.*prepare the data"),
    (["--train-tokens", "9999999"], "--train-tokens 9999999 is more than the"),
    (["--seq-len", "1500", "--batch-tokens", "1500", "--micro-batch", "1"],
     "split .* fewer than 1501: lower --seq-len"),
    (["--run", "a/b"], "--run a/b must be a plain name"),
    # at 2,048 tokens a cycle is one step long: no loss sees what that step did to the weights
    (["--lr-embed", "1e37", "--batch-tokens", "2048"], "lower --lr")])
def test_bad_arguments(argv, pattern, flags, logs, capsys):
    fails(capsys, pattern, *flags, *argv)
    assert "1e37" in argv or not list(logs.glob("*"))


@pytest.mark.parametrize("damage, pattern", [
    (Path.unlink, "val.bin is missing or.*No such file.*prepare"),
    (lambda path: shorten(path, -2), "val.bin is .*not a whole one"),
    (flip, "val.bin is .*damaged.*sha256")])
def test_bad_data(damage, pattern, corpus, flags, logs, tmp_path, capsys):
    folder = shutil.copytree(corpus, tmp_path / "shards")
    damage(folder / "val.bin")
    fails(capsys, pattern, *flags, "--data", folder)
    assert not list(logs.glob("*"))


def test_bad_predictions(finished, logs, capsys):
    folder = logs / "r/predictions"
    shutil.copytree(finished / "predictions", folder)
    shutil.copy(finished / "result.json", logs / "r")
    flip(folder / "2.safetensors")
    fails(capsys, "2.safetensors is missing or damaged: .*sha256", "select", "r")
    (folder / "3.safetensors").unlink()
    fails(capsys, "3 members, its result has 4", "select", "r")
