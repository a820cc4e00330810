"""What the frozen reference is about: its text and its runs.

Nothing here depends on train_q0.py, so that recording and test start from the same numbers.
"""
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

RUNS = Path(__file__).resolve().parent / "runs.npz"

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
    "short_bfloat16": f"{TINY} --train-tokens 8000 --precision bfloat16"}


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
