"""What the frozen reference is about: its model, text, runs, and formulas that give its inputs.

Nothing here depends on train_q0.py, so that recording and test start from the same numbers.
A tensor is called by the name it had when it was recorded (`blocks.3.attn.qkv`, `mtp_block.down`);
`noise` and `summary` are functions of that name.
"""
import hashlib
import json
import math
import random
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
CORE = HERE / "core.npz"  # model, loss, optimizer and noise
RUNS = HERE / "runs.npz"  # whole runs

# --------------------------------------------------------------------------------------------------
# The model: every feature at once; one head of three is local, two are for induction

VOCAB = 100  # padded to 128
MODEL = dict(
    preset="tiny", device="cpu", precision="float32", compile=False, attention="plain",
    layers=6, width=48, head_dim=16, mlp_hidden=64, seq_len=16, batch_tokens=64, micro_batch=4,
    windows="SSSL", short_window=5, unet=True, x0_mix=True, value_embeds=True, attn_gates=True,
    head_mixing=True, smear=True, induction=True, loop_first=3, loop_last=4, loop_passes=3,
    mtp_weight=0.3, dropout=0.2, softcap=5.0,
    distill_weight=0.45, distill_temperature=1.2,
    lr_matrix=0.02, lr_embed=0.03, lr_head=0.01, weight_decay=0.8, grad_clip=1.0)
DROPOUT_SEED = 7
STUDENT, TEACHER = ("frozen", 0), ("frozen", 1)  # keys of initial weights and of what is added
LR_STEPS = (1.0, 0.4)  # multipliers of lr of two optimizer steps without decay
DECAY_STEP = (0.5, 0.7)  # multipliers of lr and decay of a step with it
FIRST_FACTOR = 4  # the norm of the first step's gradient is 4, so that clipping shows
PERTURB_SCALE, PERTURB_KEY = 0.25, (3, 1, 2)

STIRRED = ("gate", "value_gate", "mixing", "resid_scale", "x0_scale", "skip_scale", "smear")
HEAD_FACTOR = 200  # logits of order 1


def rng_of(*key):
    """The generator of a key; numpy promises that the stream of a RandomState never changes."""
    text = " ".join(map(str, key))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def noise(shape, *key):
    """Standard normal numbers, float32, a pure function of `key` and `shape`."""
    return rng_of(*key).standard_normal(shape).astype(np.float32)


def stirred(weights, key):
    """Initial weights {name: float32 array}, moved to where gradients tell something."""
    found = dict(weights)
    for name, weight in weights.items():
        kind = name.rsplit(".", 1)[-1]
        if kind == "head":
            found[name] = HEAD_FACTOR * weight
        elif kind in STIRRED:
            draw = noise(weight.shape, "stir", *key, name)
            found[name] = weight + np.float32(0.3) * draw
    return found


def random_tokens():
    """Token sequences [4, seq_len + 1], int64."""
    return rng_of("tokens").randint(VOCAB, size=(4, MODEL["seq_len"] + 1))


def step_gradients(gradients):
    """Gradients of two optimizer steps: those given, so large that they are clipped, and random
    ones of half their size when clipped."""
    first = {}
    second = {}
    for name, gradient in gradients.items():
        first[name] = FIRST_FACTOR * gradient
        size = np.sqrt(np.square(first[name], dtype=np.float64).mean())
        factor = np.float32(0.5 / FIRST_FACTOR * float(size))
        second[name] = factor * noise(gradient.shape, "gradient", name)
    return first, second


# --------------------------------------------------------------------------------------------------
# Tensors in few numbers

PROJECTIONS = 8


def summary(name, tensor):
    """float64 [10] that hold a tensor: mean, standard deviation, 8 projections on directions that
    are random, given `name`. An error changes each by about its root mean square, wherever it is.
    """
    flat = np.asarray(tensor, dtype=np.float64).reshape(-1)
    directions = rng_of("project", name).standard_normal((PROJECTIONS, flat.size))
    projections = directions @ flat / math.sqrt(flat.size)
    return np.array([flat.mean(), flat.std(), *projections])


def summaries(tensors):
    """[tensors, 10], rows in their order."""
    rows = [summary(name, tensor) for name, tensor in tensors.items()]
    return np.stack(rows)


def in_half(tensor):
    """(float16 array, power of two): a tensor in half the bytes, to 1/2,048 of each number."""
    scale = 2.0 ** math.frexp(float(np.abs(tensor).max()))[1]
    return (tensor / scale).astype(np.float16), scale


def from_half(half, scale):
    return half.astype(np.float32) * np.float32(scale)


# --------------------------------------------------------------------------------------------------
# The text of the short runs, and the runs

TEXT_VOCAB = 500  # no multiple of 64: padded to 512
TEXT_SPLITS = {"train": 24_000, "heldout": 3000, "dev": 1000, "val": 3000}
SHOWN = 200  # probabilities kept of each member and split


def made_text(rng, size):
    """`size` made-up tokens: each has a few likely successors; every 60th or so ends a document."""
    eot = TEXT_VOCAB - 1
    previous = eot
    tokens = []
    while len(tokens) < size:
        tokens.append(previous)
        choice = rng.random()
        if choice < 1 / 60:
            previous = eot
        elif choice < 0.8:
            previous = (previous * 37 + 11 * int(6 * choice * choice)) % eot
        else:
            previous = int(eot * rng.random())
    return np.array(tokens, dtype="<u2")


def write_text(folder):
    """Write the made-up text as a corpus of shards; the same bytes on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, size in TEXT_SPLITS.items():
        tokens = made_text(random.Random(split), size)  # random() of a seeded Random never changes
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(tokens)
        shard = header.tobytes() + tokens.tobytes()
        (folder / f"{split}.bin").write_bytes(shard)
        file = {"name": f"{split}.bin", "sha256": hashlib.sha256(shard).hexdigest()}
        splits[split] = {"files": [file], "tokens": len(tokens)}
    manifest = {"format": 1, "name": "made", "tokenizer": None, "splits": splits,
                "vocab_size": TEXT_VOCAB, "eot": TEXT_VOCAB - 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


RECIPE = "--trajectories 1 --lr-matrix 0.03 --weight-decay 0.8 --wd-start 1.2 --wd-end 0.096"
SMALL_Q0 = (  # every feature, three members taught by the one before
    f"{RECIPE} --layers 3 --width 48 --head-dim 16 --mlp-hidden 64 --seq-len 32 "
    "--batch-tokens 512 --micro-batch 8 --train-tokens 6000 --epochs 4 --cycles 4 "
    "--distill-after 1 --distill-weight 0.45 --dropout 0.1 --average 0.25 --windows SL "
    "--short-window 16 --unet --x0-mix --attn-gates --head-mixing --mtp-weight 0.3 "
    "--loop-first 1 --loop-last 1 --loop-passes 2")
TINY = f"{RECIPE} --epochs 4 --cycles 1 --dropout 0 --average 0"
RUN_FLAGS = {
    "small_float32": f"{SMALL_Q0} --precision float32",
    "small_bfloat16": f"{SMALL_Q0} --precision bfloat16",
    "short_float32": f"{TINY} --train-tokens 8000 --precision float32",
    "short_bfloat16": f"{TINY} --train-tokens 8000 --precision bfloat16",
    "tiny_float32": f"{TINY} --precision float32",
    "tiny_bfloat16": f"{TINY} --precision bfloat16"}


def on_default_corpus(name):
    """Whether a run reads data/wiki; the others read the made-up text."""
    return name.startswith("tiny")


def flags_of(name, data):
    """Arguments of one of the runs, on the corpus in the folder `data`."""
    fixed = f"--run {name} --preset tiny --device cpu --no-compile --attention plain --log-every 1"
    return [*fixed.split(), *RUN_FLAGS[name].split(), "--data", str(data)]


def outcome(folder):
    """{name: float64 array} of a finished run: training losses, losses of members and mixtures, and
    the first 200 probabilities of each member on each split."""
    log = (folder / "log.txt").read_text(encoding="utf-8")
    found = {"train": re.findall(r"^step:.* loss:(\S+)", log, re.M)}
    curve = json.loads((folder / "result.json").read_text())["curve"]
    for kind in ("loss", "uniform", "learned"):
        found[kind] = [entry[kind] for entry in curve]
    for entry in curve:
        member = entry["member"]
        predictions = load_file(folder / f"predictions/{member}.safetensors")
        for split, p in predictions.items():
            found[f"p.{split}.{member}"] = p[:SHOWN]
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}
