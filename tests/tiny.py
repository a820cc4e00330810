"""What several test files need: settings, models, corpora in memory and on the disk, commands."""
import copy
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import prepare
import pytest
import torch
from safetensors.numpy import load_file

import train_q0 as q
from records import plot

ROOT = Path(q.__file__).resolve().parent
# a fraction of a second; one micro-batch a step
MINI = (
    "--layers 1 --width 32 --head-dim 16 --mlp-hidden 32 --seq-len 32 --batch-tokens 512 "
    "--micro-batch 16 --train-tokens 1000 --epochs 8 --distill-after 1 --lr-head 0.01 "
    "--precision float32 --device cpu --log-every 1").split()
# seconds; members close enough that the prior mixes several, so its optimum is inside
SEVERAL = (
    "--layers 1 --width 64 --head-dim 32 --mlp-hidden 128 --seq-len 64 --batch-tokens 1024 "
    "--micro-batch 16 --train-tokens 4000 --epochs 24 --cycles 4 --distill-after 1 "
    "--distill-weight 0.1 --lr-matrix 0.04 --lr-head 0.01 "
    "--precision float32 --device cpu --log-every 1").split()
VOCABULARY = 300  # no multiple of 64: the head is padded to 320
END = 299  # <|endoftext|>
VOCAB = 100  # padded to 128
SMALL = dict(
    layers=6, width=64, head_dim=16, mlp_hidden=96, seq_len=16, batch_tokens=64, micro_batch=2,
    dropout=0.0, precision="float32", device="cpu")
FEATURES = dict(
    windows="SSSL", unet=True, x0_mix=True, value_embeds=True, attn_gates=True, head_mixing=True,
    loop_first=3, loop_last=4, loop_passes=3, mtp_weight=0.3, smear=True, induction=True)
NEUTRAL = (  # banks that start as if they were not there
    "attn_gate", "value_gate", "mixing", "resid_scale", "x0_scale", "skip_scale", "smear")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=seeded(seed))


def off(found, wanted):
    """The largest difference, as a share of the largest value wanted."""
    error = (found.double() - wanted.double()).abs().max()
    return (error / wanted.abs().max()).item()


def resolved(preset="tiny", **changes):
    settings = {**q.PRESETS[preset], "preset": preset, **changes}
    cfg, _ = q.resolve(q.Config(**settings))
    return cfg


def small(**changes):
    """Settings of a small model of all features."""
    return resolved(**{**SMALL, **FEATURES, **changes})


def initialised(cfg, vocab_size, *key):
    model = q.GPT(cfg, vocab_size)
    q.init_weights(model.table, dict(model.named_parameters()), *key)
    return model


def build(key=0, stir=True, **changes):
    """Such a model. `stir` moves what starts neutral, and makes logits of order 1."""
    model = initialised(small(**changes), VOCAB, key)
    generator = seeded(key + 1)
    for name, weight in model.named_parameters():
        if stir and name in NEUTRAL:
            weight.data.add_(0.3 * torch.randn(weight.shape, generator=generator))
        elif stir and name == "head":
            weight.data.mul_(200)
    return model.train()


def in_float64(model):
    """A float64 copy; its rotary angles still have float32's error."""
    model = copy.deepcopy(model).double()
    model.dtype = torch.float64
    return model


def chain(number, seed=0):
    """Documents of 31 tokens below 100, each begun by a 0; three may follow each token, so a loss
    can fall."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(number):
        text = [0]
        word = int(rng.integers(1, 100))
        for step in rng.integers(3, size=30):
            text.append(word)
            word = 1 + (3 * word + int(step)) % 99
        documents.append(np.array(text, dtype=np.uint16))
    return documents


def corpus():
    """A Corpus of such documents."""
    splits = {}
    for seed, split in enumerate(q.SPLITS):
        splits[split] = np.concatenate(chain(24 if split == "train" else 6, seed))
    return q.Corpus("chain", VOCAB, splits, {}, tuple(chain(24)), SMALL["seq_len"])


def trainer(folder, cfg):
    """(Trainer of one process on the corpus above, its plan)."""
    for part in ("state", "predictions"):
        (folder / part).mkdir(parents=True)
    data = corpus()
    plan = q.plan_cycles(cfg, data.train_sequences * cfg.seq_len)
    run = q.Run(folder, q.method_settings(cfg), sum(plan, []), {})
    return q.Trainer(cfg, data, q.World(), run), plan


def train(folder, cfg):
    """Train a run in this process. Returns its Trainer."""
    found, plan = trainer(folder, cfg)
    q.train(found, plan)
    return found


def plain_loss(hidden, head, targets, softcap, teacher=(), weight=0.0, temperature=1.0):
    """(loss, cross-entropy) of whole logits. hidden [N, D], head [V, D], targets [N] (-1: ignored);
    teacher is the mixture of [(share, hidden [N, D'], head [V, D']), ...]."""
    def capped(h, w):
        z = h @ w.T
        return softcap * torch.tanh(z / softcap) if softcap else z
    logits = capped(hidden, head)
    ce = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1)
    if not teacher:
        return ce, ce
    p = sum(share * torch.softmax(capped(h, w), dim=-1) for share, h, w in teacher)
    log_p = torch.log_softmax(p.log() / temperature, dim=-1)
    log_q = torch.log_softmax(logits / temperature, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[targets >= 0].mean()
    return (1 - weight) * ce + weight * temperature ** 2 * kl, ce


WORDS = ("ash birch cedar elm fir oak pine rowan willow yew walks sees under over the a green tall "
         "old río 夜 12 naïve don't").split()


def random_documents(number, seed=0, words=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) + f".\n{i} end" for i in range(number)]


def learnable_documents(number, words=60):
    """Of 80 made-up words; each is mostly followed by one of four, so much can be learned."""
    rng = random.Random(0)
    syllables = itertools.product("bdklmprst", "aeiou", "lnrs", "aeo")
    known = rng.sample(["".join(s) for s in syllables], 80)
    after = {word: rng.sample(known, 4) for word in known}
    documents = []
    for _ in range(number):
        text = [rng.choice(known)]
        while len(text) < words:
            likely, = rng.choices(after[text[-1]], (8, 4, 2, 1))
            text.append(likely if rng.random() < 0.9 else rng.choice(known))
        documents.append(" ".join(text))
    return documents


def write_jsonl(path, documents):
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_data(folder, documents, val=15_000, dev=15_000, heldout=5000):
    """A data folder with a tokenizer of its own."""
    source = write_jsonl(folder.with_suffix(".jsonl"), documents)
    sizes = ["--val-bytes", val, "--dev-bytes", dev, "--heldout-bytes", heldout]
    argv = ["text", "--input", source, "--out", folder, "--tokenizer", "train", "--vocab",
            VOCABULARY, *sizes]
    assert prepare.main([str(a) for a in argv]) == 0
    return folder


def shard_bytes(tokens):
    header = [20240520, 1, len(tokens)] + [0] * 253
    return np.array(header, "<i4").tobytes() + np.array(tokens, "<u2").tobytes()


def read_shard(path):
    return np.fromfile(path, dtype="<u2", offset=1024).astype(np.int64)


def read_documents(folder, split, encoding):
    tokens = read_shard(folder / f"{split}.bin").tolist()
    starts = [i for i, token in enumerate(tokens) if token == encoding.eot_token]
    ends = [*starts[1:], len(tokens)]
    return [encoding.decode(tokens[a + 1:b]) for a, b in zip(starts, ends)]


def snapshot(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def user(cwd, *argv, **env):
    """Run a command as a user would; `python` is the one that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **env}
    argv = [str(a) for a in argv]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


def clone(to):
    """A copy of the repository without data and runs."""
    def left_out(folder, names):
        found = [n for n in names if n.startswith(".") or n in ("logs", "__pycache__")]
        if Path(folder) == ROOT / "data":
            found += [n for n in names if (ROOT / "data" / n).is_dir()]
        return found
    return shutil.copytree(ROOT, to, ignore=left_out)


def works(capsys, *argv):
    """What a command of train_q0.py prints."""
    capsys.readouterr()
    status = q.main([str(a) for a in argv])
    out, error = capsys.readouterr()
    assert status == 0, error
    return out


def run_in(logs, *argv):
    """train_q0.main(argv) with runs under `logs`, for what many tests read; no curve is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q, "LOGS", logs)
        patch.setattr(plot, "draw_curve", lambda path, *_: path.write_bytes(b"a picture"))
        assert q.main([str(a) for a in argv]) == 0


def fails(capsys, pattern, *argv):
    """A mistake: exit status 2 and one line, which `pattern` matches."""
    capsys.readouterr()
    status = q.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.endswith("\n"), (status, error)
    assert error.startswith("train_q0.py: error: ")
    assert re.search(pattern, error), error


def flip(path, at=-101):
    """Change one bit."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def shorten(path, size):
    """Keep so many bytes; negative: lose so many."""
    path.write_bytes(path.read_bytes()[:size])


def with_file(name, damage, *given):
    """Damage to a file of a folder."""
    return lambda folder: damage(folder / name, *given)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**read_json(path), **changes}))


def predictions_of(run):
    """{split: float32 [members, tokens]}, read anew."""
    number = len(list((run / "predictions").iterdir()))
    members = [load_file(run / f"predictions/{i}.safetensors") for i in range(number)]
    return {split: np.stack([m[split] for m in members]) for split in members[0]}


def loss_of(p):
    return -np.log(p).mean()


def sequences_of(data, split, seq_len):
    """[n, seq_len + 1] consecutive pieces of a split, tail dropped, read anew."""
    tokens = read_shard(data / f"{split}.bin")
    n = len(tokens) // (seq_len + 1)
    return tokens[:n * (seq_len + 1)].reshape(n, seq_len + 1)
