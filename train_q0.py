# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy>=2.0,<3",
#     "tiktoken>=0.9",
#     "huggingface-hub>=0.30",
#     "safetensors>=0.5",
#     "matplotlib>=3.9",
# ]
# ///
"""q0: hyper-epoch pretraining in one file.

Text runs out before compute does, and one model stops gaining after about 16 epochs over it. q0
spends the same epochs on a population: a cyclic schedule of learning rate and weight decay collects
snapshots, each snapshot teaches the next, and a prior fitted on held-out text mixes their
predictions. Method: arXiv 2606.03938.

    python train_q0.py                                    laptop: default corpus, preset tiny
    python train_q0.py --preset small                     one GPU; before: data/prepare.py fineweb
    torchrun --nproc_per_node=8 train_q0.py --preset q0   one node, 8 GPUs
    python train_q0.py --resume RUN                       go on with a run that was stopped
    python train_q0.py runs                               what there is under logs/, and its state
    python train_q0.py plan --preset q0 --epochs 256      what a run would do, without running it
    python train_q0.py select RUN --k 4                   fit the prior again, from predictions
    python train_q0.py evaluate RUN --data SHARD          score members and mixtures, or --tasks
    python train_q0.py sample RUN --prompt "The"          text from the mixture, token by token
    python train_q0.py average RUN                        one model: mean weights of newest members
    python train_q0.py pool RUN RUN                       one population of several runs
    python train_q0.py count RUN                          add members that count n-grams
    python train_q0.py push RUN USER/NAME                 to the hub; hf:USER/NAME is a RUN then
    python train_q0.py export RUN --k 4 --out FOLDER      one Hugging Face model: the mixture
    python train_q0.py compare RUN RUN                    settings, losses and curves side by side

Copied elsewhere this file trains, logs, saves and resumes; results, curves and the commands need
records/ beside it. Top to bottom: config, data, model, loss, optimizer, schedule, prior, training
loop; then members and resume state, processes, log, commands.
"""
from __future__ import annotations

from pathlib import Path
SOURCE = Path(__file__).read_text(encoding="utf-8")  # first: the log must hold the text that ran

import argparse
import base64
import contextlib
import ctypes
import datetime
import difflib
import faulthandler
import functools
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace

try:
    import fcntl
except ImportError:  # Windows: launches do not see each other
    fcntl = None
# OpenMP threads that wait shall sleep: spinning, they take the cores from all other processes.
# Torch reads this when it loads; the import changes nothing else, and the user's setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensor_file, save_file as save_tensors
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None
INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # on a CPU, in tests

ROOT = Path(__file__).resolve().parent
LOGS = Path(os.environ.get("Q0_LOGS", ROOT / "logs"))  # elsewhere where the checkout is read-only
WARM_UP_MINUTES = 30  # before compiling counts as hanging
JOIN_TIME = datetime.timedelta(minutes=5)  # for all processes of a launch to join


class UserError(Exception):
    """A mistake that the user can fix. One line: what is wrong, where, and what to do."""


def one_line(e):
    """What an exception says."""
    named = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
    text = getattr(e, "strerror", None) or named
    return " ".join(text.split())[:200]


@contextlib.contextmanager
def reading(what, advice=""):
    """Turn what a missing, damaged or hostile file raises when it is read into a UserError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, UserError,
            SafetensorError, RecursionError) as e:
        raise UserError(f"{what} is missing or damaged: {one_line(e)}{advice}") from None


# Config: a knob is one line here; its flag, its check and its help text are made from that line ---
# What nobody ablates has no flag: the log of a run holds the script that ran.
ROTARY_BASE = 10_000
MOMENTUM = 0.95  # Muon's, Nesterov
LR_RESID = 0.00025  # peak lr of residual and skip scalars
LR_X0 = 0.025  # peak lr of x0 scalars
LR_MIXING = 0.02  # peak lr of head mixing and smear
LAUNCH_BOUND = 50e6  # parameters in blocks; graphs gain 2.3 times at 12.6M, nothing at 85M

def knob(default, why, low=0, high=1e37, choices=""):
    """A Config field: its default, what it is, inclusive bounds of a number, the words allowed."""
    rule = dict(why=why, low=low, high=high, choices=choices.split())
    return field(default=default, metadata=rule)

@dataclass(frozen=True)
class Config:
    """All settings of a run. The defaults are those of preset `tiny`; `resolve` replaces None and
    "auto" by what follows from the others."""
    preset: str = knob(
        "tiny", "settings and data; on a GPU the largest that fits", choices="tiny small q0")
    population: str = knob("q0", "kind of population", choices="q0 snapshots chain ensemble single")
    epochs: int = knob(16, "budget: epochs over the training text, all members together", low=1)
    trajectories: int | None = knob(
        None, "independent runs; they differ by seed alone", low=1, high=10_000)
    cycles: int | None = knob(
        None, "cycles per trajectory; each ends in one member", low=1, high=10_000)
    boundary: str | None = knob(
        None, "weights at a cycle's start", choices="perturb continue fresh")
    average: float | None = knob(
        None, "share of a cycle, its end, over which a member is averaged", high=1)
    distill_weight: float | None = knob(None, "weight a of the teacher in the loss", high=1)
    distill_after: int | None = knob(
        None, "cycles of a trajectory before distillation starts", low=1)
    distill_temperature: float = knob(
        1.2, "temperature of teacher and student in the KL term", low=0.01)
    teacher: str | None = knob(
        None, "a run whose whole population teaches, with its prior, from the first cycle on")
    teacher_k: int | None = knob(
        None, "best members of --teacher that teach; without it all that have weight", low=1)
    noise_first: float = knob(
        0.25, "noise at the first boundary, in standard deviations of the tensor")
    noise_last: float = knob(0.05, "noise at the last boundary")
    seed: int = knob(0, "initial weights, order, dropout and noise follow from it")
    # data
    data: str = knob("data/wiki", "folder of token shards with a manifest.json")
    train_tokens: int = knob(
        150_000, "whole training documents up to about this many tokens; 0: all of them")
    split_tokens: float | None = knob(
        None, "share of the training tokens that become two shorter ones, drawn anew each epoch, "
        "in the first half of a trajectory's epochs, rounded down", high=1)
    seq_len: int = knob(256, "tokens predicted per sequence", low=8, high=2 ** 15)
    batch_tokens: int = knob(
        2048, "tokens per step, in the middle half of the cycles", low=1)
    edge_batch_tokens: int | None = knob(
        None, "tokens per step in the first and last quarter of the cycles", low=1)
    micro_batch: int = knob(8, "sequences per forward pass", low=1)
    report: str = knob(
        "val", "split to report on; choose between settings on dev", choices="val dev")
    # model
    layers: int = knob(4, "transformer blocks", low=1, high=1000)
    width: int = knob(128, "channels of the residual stream", low=32)
    head_dim: int = knob(64, "channels per attention head", low=16)
    mlp_hidden: int | None = knob(384, "channels inside the SwiGLU", low=1)
    softcap: float = knob(15.0, "logits are softcap * tanh(z / softcap); 0: no cap", high=1000)
    dropout: float | None = knob(None, "on the output of both branches of a block", high=0.9)
    windows: str = knob(
        "L", "attention windows by layer, repeated: S short, L all; the last layer is L")
    short_window: int | None = knob(
        None, "tokens that a short window spans, the own one included", low=1)
    unet: bool = knob(False, "learned skips from layer i to layer n-1-i")
    x0_mix: bool = knob(False, "learned mix of stream and embedding before every block")
    value_embeds: bool = knob(
        True, "gated projection of the embedding added to the values of every second layer")
    attn_gates: bool = knob(False, "input-dependent output gate per attention head")
    head_mixing: bool = knob(False, "learned mixing of the heads of q, k and v")
    smear: bool = knob(True, "adds a learned share of the previous token's embedding to each")
    induction: bool = knob(
        True, "half of the heads start out looking for what followed the same token before")
    loop_first: int = knob(0, "first looped layer")
    loop_last: int = knob(0, "last looped layer")
    loop_passes: int = knob(1, "how often the looped layers run in all", low=1, high=100)
    mtp_weight: float = knob(
        0.0, "weight of the loss on the token after next; 0 builds no block for it")
    # optimizer
    lr_matrix: float | None = knob(None, "peak lr of Muon: every matrix inside the blocks")
    lr_embed: float = knob(0.0375, "peak lr of the embedding")
    lr_head: float = knob(0.02, "peak lr of the head")
    weight_decay: float | None = knob(
        None, "of matrices, embedding and head; times lr and the multiplier of the step")
    lr_floor: float = knob(0.08, "lr multiplier that the cycle falls to", high=1)
    wd_start: float | None = knob(None, "decay multiplier at a cycle's start")
    wd_end: float | None = knob(None, "decay multiplier at a cycle's end")
    grad_clip: float = knob(1.0, "largest global gradient norm; 0: no clipping")
    # machine
    device: str = knob("auto", "auto takes the GPU where there is one", choices="auto cpu cuda mps")
    precision: str = knob(
        "auto", "of matrix products; weights are float32", choices="auto bfloat16 float32")
    compile: bool | None = knob(None, "torch.compile: on a GPU")
    graphs: bool | None = knob(
        None, "replay CUDA graphs: of models that are launch bound, on a GPU")
    recompute: bool = knob(
        False, "recompute looped layers in the backward pass: less memory, more time")
    attention: str = knob("auto", "auto: the fastest", choices="auto flex sdpa plain")
    save_minutes: float = knob(
        10, "between saves of the state that --resume goes on from; also at cycle ends")
    keep_members: int | None = knob(
        None, "newest members of a trajectory whose weights are kept; without it all", low=1)
    hang_minutes: float = knob(
        15, "a step that takes longer ends the run and shows where it hangs; 0: never")
    log_every: int = knob(10, "steps between logged lines (each one waits for the device)", low=1)

    def __post_init__(self):
        for f in fields(self):
            check_value(f, getattr(self, f.name))

GROUPS = {  # of --help: the first field of each
    "preset": "population", "data": "data", "layers": "model", "lr_matrix": "optimizer",
    "device": "machine"}
# settings that a resumed run may change: they change speed or rounding, not the method
MACHINE = ("device compile graphs recompute attention save_minutes keep_members hang_minutes "
           "log_every").split()

def check_value(f, value):
    """Raise UserError where `value` is not of the type, the choices or the range of field `f`."""
    if value is None and "None" in f.type:
        return
    said = f"{flag(f.name)} {value}"
    rule = f.metadata
    kind = f.type.split(" ")[0]
    given = type(value).__name__
    if given != kind and (given, kind) != ("int", "float"):
        raise UserError(f"{flag(f.name)} {value!r} is not of type {f.type}")
    if rule["choices"] and value not in rule["choices"]:
        raise UserError(f"{said} is not one of: {', '.join(rule['choices'])}")
    if type(value) in (int, float) and not rule["low"] <= value <= rule["high"]:  # nor is NaN
        raise UserError(f"{said} is out of range: {rule['low']} to {rule['high']:g}")

def flag(name):
    return "--" + name.replace("_", "-")

def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

def method_settings(cfg):
    return {k: v for k, v in asdict(cfg).items() if k not in MACHINE}

PUBLISHED = dict(  # the 1.87B run, in batches of 524,288 tokens: lr x decay of a cycle sum to 2.2
    data="data/fineweb", train_tokens=0, mlp_hidden=None, lr_matrix=0.01, lr_head=0.0005,
    weight_decay=1.3, wd_start=0.7, wd_end=1.0, dropout=0.1, average=0.0, split_tokens=0.0,
    smear=False, induction=False)
PRESETS = {
    "tiny": {},
    "small": dict(
        PUBLISHED, seq_len=1024, batch_tokens=131_072, micro_batch=16, layers=12, width=768,
        value_embeds=False,
        weight_decay=0.325,  # a quarter, as a cycle has four times the steps: the same sum
        lr_head=0.0013),  # as 1 / width, which no run has tested
    "q0": dict(
        PUBLISHED, epochs=64, seq_len=2048, batch_tokens=524_288, edge_batch_tokens=393_216,
        micro_batch=4, layers=30, width=2048, head_dim=128, windows="SSSL", short_window=1025,
        unet=True, x0_mix=True, attn_gates=True, head_mixing=True, loop_first=15, loop_last=24,
        loop_passes=5, mtp_weight=0.3)}
NEEDS = {"q0": 78, "small": 9, "tiny": 0}  # GB of a GPU's memory: `plan`, with 5% to spare

# Recipes: of `tiny` measured (records/tuning/2026-11-26_equal_effort.md and, for PERTURBED from 16
# epochs on, 2026-11-28_split_tokens.md), of `q0` published
LENGTHS = {  # in epochs: a trajectory; in all, from which on q0 has two of them or more; a cycle; a
    # member from scratch; until distillation starts
    "tiny": dict(trajectory=32, pair=32, cycle=4, member=8, untaught=8),
    "small": dict(trajectory=192, pair=384, cycle=2, member=16, untaught=8),
    "q0": dict(trajectory=192, pair=384, cycle=2, member=16, untaught=16)}
# rows of COLUMNS, each from so many epochs on
COLUMNS = "lr_matrix", "weight_decay", "wd_start", "wd_end", "dropout", "average", "split_tokens"
AFRESH = {  # epochs of a member; measured up to 5, 8 and 16
    1: (0.03, 0.8, 1.2, 0.096, 0.0, 0.0, 0.0),  # decay falls with lr
    6: (0.04, 1.2, 1.2, 0.096, 0.0, 0.25, 0.0),
    12: (0.04, 0.8, 0.7, 1.0, 0.1, 0.25, 0.0)}  # decay rises while lr falls, as published
CONTINUED = {  # epochs of a trajectory
    1: (0.03, 0.8, 1.2, 0.096, 0.0, 0.0, 0.0),
    32: (0.03, 0.53, 1.2, 0.096, 0.1, 0.0, 0.0)}
PERTURBED = CONTINUED | {16: (0.03, 0.8, 1.2, 0.096, 0.0, 0.0, 0.05)}
POPULATIONS = {  # weights at a cycle's start, weight of the teacher, settings
    "single": ("fresh", 0.0, AFRESH),
    "ensemble": ("fresh", 0.0, AFRESH),
    "chain": ("fresh", 0.45, AFRESH),
    "snapshots": ("continue", 0.0, CONTINUED),
    "q0": ("perturb", 0.45, PERTURBED)}

def derive_budget(cfg):
    """Yield (field, value, reason): the trajectories and cycles that the epochs pay for. Where one
    is given, the other gets the rest. Raises UserError as `resolve` does."""
    length = LENGTHS[cfg.preset]
    restarts = POPULATIONS[cfg.population][0] != "fresh"
    J = cfg.trajectories or 1
    C = cfg.cycles or 1
    each = max(1, cfg.epochs // (J * C))
    if restarts and not cfg.trajectories:
        pair = cfg.population == "q0" and not cfg.cycles and cfg.epochs >= length["pair"]
        fewest = 2 if pair else 1
        J = max(fewest, each // length["trajectory"])
        each //= J
    member = length["cycle" if restarts else "member"]
    many = 1  # below 6 epochs one member is better than two
    if each >= 6:
        many = max(2, math.ceil(each / member - 0.5))  # the nearest number
    if cfg.population == "ensemble":
        J = cfg.trajectories or many
    elif cfg.population != "single":
        C = cfg.cycles or many
    if cfg.epochs < J * C:
        raise UserError(f"--epochs {cfg.epochs} are fewer than one for each of {J} trajectories x "
                        f"{C} cycles: give --epochs {J * C}, or fewer of them")
    reason = f"population {cfg.population}, {cfg.epochs} epochs"
    yield "trajectories", J, reason
    yield "cycles", C, reason

def derive_recipe(cfg):
    """What was tuned, or published, for the population."""
    boundary, weight, rows = POPULATIONS[cfg.population]
    yield "boundary", boundary, f"population {cfg.population}"
    if cfg.teacher:
        yield "distill_weight", 0.45, "--teacher is given"
    yield "distill_weight", weight, f"population {cfg.population}"
    members = cfg.trajectories * cfg.cycles
    untaught = LENGTHS[cfg.preset]["untaught"]
    after = 1 if cfg.population == "chain" else max(1, round(untaught * members / cfg.epochs))
    yield "distill_after", after, f"{untaught} epochs before the first teacher, in a chain a member"
    each = cfg.epochs // (members if rows is AFRESH else cfg.trajectories)
    row = rows[max(n for n in rows if n <= each)]
    for name, value in zip(COLUMNS, row):
        yield name, value, f"{cfg.population}, {each} epochs from fresh weights on"

def derive_sizes(cfg):
    """What follows from other sizes; the device."""
    yield "edge_batch_tokens", cfg.batch_tokens, "same as --batch-tokens"
    yield "short_window", cfg.seq_len // 2, "half of --seq-len"
    hidden = 256 * math.ceil(8 * cfg.width / 3 / 256)
    yield "mlp_hidden", hidden, "8/3 of the width, rounded up to 256"
    if torch.cuda.is_available():
        yield "device", "cuda", "a GPU is present"
    elif cfg.device == "cuda":
        raise UserError("--device cuda, but torch sees no GPU: install a CUDA build of torch or "
                        "use --device cpu")
    elif cfg.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps, but torch sees no GPU of Apple's: use --device cpu")
    yield "device", "cpu", "no GPU"

def derive_machine(cfg):
    """What suits the device and the model."""
    gpu = cfg.device == "cuda"
    if gpu or torch.cpu._is_avx512_bf16_supported():
        yield "precision", "bfloat16", "supported here"
    yield "precision", "float32", "no bfloat16 instructions here: slower"
    yield "compile", gpu, "a GPU is in use" if gpu else "on a CPU it gains 2 to 6%"
    parameters = cfg.layers * cfg.width * (4 * cfg.width + 3 * cfg.mlp_hidden)
    small = gpu and parameters < LAUNCH_BOUND
    yield "graphs", small, f"only on a GPU, below {LAUNCH_BOUND:.3g} parameters in blocks"

def check_model(cfg):
    """Raise UserError where sizes do not fit together."""
    if cfg.width % cfg.head_dim or cfg.head_dim % 2:
        raise UserError(f"--width {cfg.width} is not a multiple of --head-dim {cfg.head_dim} "
                        f"(which must be even)")
    if cfg.induction and cfg.width == cfg.head_dim:
        raise UserError("--induction needs a second head: lower --head-dim or give --no-induction")
    unit = cfg.seq_len * cfg.micro_batch
    for name in ("batch_tokens", "edge_batch_tokens"):
        if getattr(cfg, name) % unit:
            raise UserError(f"{flag(name)} {getattr(cfg, name)} is not a multiple of "
                            f"--seq-len x --micro-batch = {unit}")
    if not cfg.windows or set(cfg.windows) - set("SL"):
        raise UserError(f"--windows {cfg.windows!r} must be a pattern of S and L, such as SSSL")
    if cfg.loop_passes > 1 and not cfg.loop_first <= cfg.loop_last < cfg.layers:
        raise UserError(f"--loop-first {cfg.loop_first} to --loop-last {cfg.loop_last} is not a "
                        f"range of the {cfg.layers} layers")

def resolve(cfg):
    """Fill every None and "auto" of `cfg`; a group of settings sees what those before it gave.
    Returns (Config, {field: reason}). Raises UserError where settings contradict."""
    why = {}
    for derive in (derive_budget, derive_recipe, derive_sizes, derive_machine):
        for name, value, reason in derive(cfg):
            if getattr(cfg, name) in (None, "auto"):
                cfg = replace(cfg, **{name: value})
                why[name] = reason
    check_model(cfg)
    return cfg, why

# Data -------------------------------------------------------------------------------------------
# Shards of uint16 tokens, split by whole documents.

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 256  # int32 numbers: magic, version, count of tokens, zeros
SPLITS = ("train", "heldout", "dev", "val")


def seed_of(*key):
    """A 63-bit seed, a pure function of `key`. All randomness comes from here: none is stored."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def read_shard(path, vocab_size, sha256=None):
    """Tokens of one shard, uint16 [n]. Raises UserError for a missing, damaged or foreign file."""
    with reading(f"shard {path}", "; prepare the data again (python data/prepare.py)"):
        words = np.memmap(path, dtype="<u2", mode="r")  # its size is known before it is read
        tokens = words[2 * SHARD_HEADER:]
        header = words[:2 * SHARD_HEADER].view("<i4")[:3].tolist()
        if header != [SHARD_MAGIC, SHARD_VERSION, len(tokens)]:
            raise ValueError(f"it is not a token shard, or not a whole one: it begins {header}, "
                             f"{len(tokens)} tokens follow")
        check_sha256(path, sha256)
        if len(tokens) and tokens.max() >= vocab_size:
            raise ValueError(f"it holds token {tokens.max()}, beyond the vocabulary of "
                             f"{vocab_size}")
        return np.array(tokens)


def cut(tokens, seq_len):
    """[n, seq_len + 1]: consecutive sequences that do not overlap; the tail is dropped."""
    n = len(tokens) // (seq_len + 1)
    return tokens[:n * (seq_len + 1)].reshape(n, seq_len + 1)


def halves_of(folder, vocab_size):
    """(int32 [vocab_size, 2], sha256 of the tokenizer): of each token of a corpus' BPE two that
    spell the same bytes, those learned first; -1 for single bytes and special tokens. Raises
    UserError where the file is missing or not the corpus' own."""
    halves = np.full((vocab_size, 2), -1, dtype=np.int32)
    path = folder / "tokenizer.tiktoken"
    with reading(path, "; prepare the data again, or give --split-tokens 0"):
        sha256 = load_json(folder / "manifest.json")["tokenizer"]["sha256"]
        check_sha256(path, sha256)
        words = path.read_bytes().split()[::2]
        ranks = {base64.b64decode(word): rank for rank, word in enumerate(words)}
        for token, rank in ranks.items():
            cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
            pairs = [(ranks[a], ranks[b]) for a, b in cuts if a in ranks and b in ranks]
            halves[rank] = min(pairs, key=max, default=-1)
    return halves, sha256


def split_tokens(text, halves, share, rng):
    """The same bytes in more tokens: of those that have halves, a random share becomes these."""
    pieces = halves[text]
    whole = (pieces[:, 0] < 0) | (rng.random(len(text)) >= share)
    pieces[whole] = -1
    pieces[whole, 0] = text[whole]
    return pieces[pieces >= 0]


@dataclass(frozen=True, eq=False)
class Corpus:
    """The four splits as token arrays, and the documents of the training part."""
    name: str
    vocab_size: int
    splits: dict  # split -> uint16 [n]
    hashes: dict  # split -> its files in order, with sha256; the end-of-text token
    documents: tuple  # of uint16 arrays: the training documents in file order
    seq_len: int
    split: float = 0.0  # share of the tokens that training splits
    split_epochs: int = 0  # in so many first epochs of a trajectory
    halves: np.ndarray | None = None  # of each token: what it is split into

    @functools.cached_property
    def train_sequences(self):
        """Sequences of seq_len + 1 tokens in one epoch, the same every epoch."""
        return sum(len(d) for d in self.documents) // (self.seq_len + 1)

    def eval_sequences(self, split):
        """[n, seq_len + 1], in file order."""
        return cut(self.splits[split], self.seq_len)

    @functools.lru_cache(maxsize=2)  # two: a batch may straddle the end of an epoch
    def epoch(self, seed, trajectory, epoch):
        """[train_sequences, seq_len + 1]: documents shuffled, joined, cut; sequences shuffled.
        Split tokens make the text longer: another part of it is left out each time."""
        rng = np.random.default_rng(seed_of("order", seed, trajectory, epoch))
        order = rng.permutation(len(self.documents))
        text = np.concatenate([self.documents[i] for i in order])
        if epoch < self.split_epochs:
            text = split_tokens(text, self.halves, self.split, rng)
        sequences = cut(text, self.seq_len)
        return sequences[rng.permutation(len(sequences))[:self.train_sequences]]

    def batch(self, seed, trajectory, first, count):
        """Sequences first .. first+count-1 of a trajectory's endless stream of epochs, int64."""
        n = self.train_sequences
        rows = [self.epoch(seed, trajectory, i // n)[i % n] for i in range(first, first + count)]
        return np.stack(rows).astype(np.int64)


def load_corpus(folder, seq_len, train_tokens):
    """Read and check a corpus. Raises UserError for what is missing, damaged or too small."""
    advice = ("; prepare the data first (python data/prepare.py fineweb, or wiki for --preset "
              "tiny)")
    with reading(folder / "manifest.json", advice):
        manifest = load_json(folder / "manifest.json")
        vocab_size = int(manifest["vocab_size"])
        eot = int(manifest["eot"])
        name = str(manifest["name"])
        files = {s: manifest["splits"][s]["files"] for s in SPLITS}
        for f in sum(files.values(), []):
            if not isinstance(f["sha256"], str) or Path(f["name"]).name != f["name"]:
                raise ValueError("a split must list plain names of files beside it, with hashes")
        if not all(files.values()):
            raise ValueError("every split must list files")
    splits = {}
    for s in SPLITS:
        shards = [read_shard(folder / f["name"], vocab_size, f["sha256"]) for f in files[s]]
        splits[s] = np.concatenate(shards)
    train = splits["train"]
    if train_tokens > len(train):
        raise UserError(f"--train-tokens {train_tokens} is more than the {len(train)} training "
                        f"tokens of {folder}")
    documents = [d for d in np.split(train, np.flatnonzero(train == eot)) if len(d)]
    if train_tokens:  # whole documents, up to and including the one that reaches the target
        ends = np.cumsum([len(d) for d in documents])
        documents = documents[:np.searchsorted(ends, train_tokens) + 1]
        splits["train"] = np.concatenate(documents)
    for s, text in splits.items():
        if len(text) < seq_len + 1:
            raise UserError(f"split {s} of {folder} has {len(text)} tokens, fewer than "
                            f"{seq_len + 1}: lower --seq-len")
    hashes = {"eot": eot, **files}
    return Corpus(name, vocab_size, splits, hashes, tuple(documents), seq_len)


# Model ------------------------------------------------------------------------------------------
# Shapes: B batch, T sequence, H heads, K head channels, D width, M channels inside the MLP,
# V vocabulary (embedding and head have V rounded up to 64 rows), n layers.

ATTN_GATE_CHANNELS = 12
VALUE_GATE_CHANNELS = 32


@dataclass(frozen=True)
class Row:
    """A bank of weights: one tensor of a kind for each block that has it, or one tensor in all."""
    tensor: str  # its name; with the block's it seeds initial values and noise
    shape: tuple  # of one tensor
    start: object  # start(tensor, generator) fills it with initial values
    rule: str = "adamw"  # muon updates matrices, adamw single weights: Optimizer.update_bank
    lr: float = 0.0  # at its peak
    decay: float = 0.0
    betas: tuple = (0.8, 0.95)  # of adamw
    blocks: tuple = ()  # names of the blocks that have it; (): it exists once
    used: bool = True  # whether the configuration has it
    product: bool = False  # whether activations are multiplied with it: in --precision, and FLOPs

    @property
    def bank_shape(self):
        return (len(self.blocks), *self.shape) if self.blocks else self.shape

    def tensors(self, bank):
        """[(name, tensor), ...] that make up `bank`."""
        if not self.blocks:
            return [(self.tensor, bank)]
        return [(f"{block}.{self.tensor}", bank[i]) for i, block in enumerate(self.blocks)]


def normal(std):
    return lambda tensor, generator: tensor.normal_(0, std, generator=generator)


def uniform(bound):
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def constant(value):
    return lambda tensor, generator: tensor.fill_(value)


def identity(tensor, generator):
    tensor.copy_(torch.eye(tensor.size(-1)))


def uniform_with_induction(bound, first):
    """As uniform, but from row `first` on keys start as queries: a token finds its like."""
    def start(tensor, generator):
        tensor.uniform_(-bound, bound, generator=generator)
        tensor[1, first:] = tensor[0, first:]
    return start


def block_names(cfg):
    """Names of all blocks in the order of the banks; the multi-token block is the last."""
    names = [f"blocks.{i}" for i in range(cfg.layers)]
    if cfg.mtp_weight:
        names.append("mtp_block")
    return tuple(names)


def parameter_table(cfg, vocab_size):
    """{name: Row} of all weights. Initial values, optimizer, FLOPs and files follow from it. A new
    weight: a row here, then `w[name]` in `block` (rows with `blocks`) or `self.name` in
    `GPT.forward`; those of adamw are float32 there. Renaming a tensor changes its initial values.
    """
    n, D, M = cfg.layers, cfg.width, cfg.mlp_hidden
    H = D // cfg.head_dim
    padded = 64 * math.ceil(vocab_size / 64)
    blocks = block_names(cfg)
    wd = cfg.weight_decay
    matrix = dict(rule="muon", product=True, lr=cfg.lr_matrix, decay=wd)
    every = dict(matrix, blocks=blocks)
    # value embeddings: every second layer, the last one included
    value = dict(matrix, blocks=blocks[(n - 1) % 2:n:2], used=cfg.value_embeds)
    fan_in = uniform(math.sqrt(3 / D))
    residual = normal(D ** -0.5)
    qkv_start = uniform_with_induction(math.sqrt(3 / D), local_heads(cfg) * cfg.head_dim)
    has_skips = cfg.unet and n > 1
    rows = {
        "embed": Row("embed", (padded, D), normal(1.0), lr=cfg.lr_embed, decay=wd),
        "head": Row("head", (padded, D), normal(0.001), lr=cfg.lr_head, decay=wd),
        "qkv": Row("attn.qkv", (3, D, D), qkv_start, **every),
        "out": Row("attn.out", (D, D), residual, **every),
        "gate_up": Row("gate_up", (2, M, D), fan_in, **every),
        "down": Row("down", (D, M), residual, **every),
        "value": Row("attn.value", (D, D), fan_in, **value),
        "value_gate": Row("attn.value_gate", (H, VALUE_GATE_CHANNELS), constant(0), **value),
        "attn_gate": Row("attn.gate", (H, ATTN_GATE_CHANNELS), constant(0), **every,
                         used=cfg.attn_gates),
        "mixing": Row("attn.mixing", (3, H, H), identity, lr=LR_MIXING, blocks=blocks,
                      used=cfg.head_mixing),
        "resid_scale": Row("resid_scale", (n,), constant(1), lr=LR_RESID, used=cfg.x0_mix),
        "x0_scale": Row("x0_scale", (n,), constant(0.1), lr=LR_X0, betas=(0.96, 0.95),
                        used=cfg.x0_mix),
        "skip_scale": Row("skip_scale", (n // 2,), constant(1), lr=LR_RESID, used=has_skips),
        "mtp_proj": Row("mtp_proj", (D, 2 * D), fan_in, **matrix, used=cfg.mtp_weight > 0),
        "smear": Row("smear", (D,), constant(0), lr=LR_MIXING, used=cfg.smear),
    }
    return {name: row for name, row in rows.items() if row.used}


def draw(function, table, weights, *key):
    """Call function(row, tensor, generator) for every tensor of the banks `weights`, {name: float32
    tensor}. What a generator draws is a pure function of `key` and the tensor's name. In threads:
    one core takes 24 s for the noise of `q0`."""
    def drawn(row, name, tensor):
        generator = torch.Generator().manual_seed(seed_of(*key, name))
        with torch.no_grad():
            function(row, tensor, generator)
    with ThreadPoolExecutor() as pool:
        started = [pool.submit(drawn, row, *named) for bank, row in table.items()
                   for named in row.tensors(weights[bank])]
        for one in started:
            one.result()


def init_weights(table, weights, *key):
    """Fill the banks, to the same values on any device."""
    def fill(row, tensor, generator):
        start = torch.empty(tensor.shape)
        row.start(start, generator)
        tensor.copy_(start)
    draw(fill, table, weights, "init", *key)


def perturb(table, weights, scale, *key):
    """Add noise to every tensor of more than one weight, in `scale` of its own standard deviation
    (of a stack each matrix's)."""
    def add_noise(row, tensor, generator):
        dims = tuple(range(tensor.ndim))[-2:]
        if math.prod(tensor.shape[-2:]) > 1:
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            tensor.add_(noise * tensor.std(dim=dims, keepdim=True) * scale)
    draw(add_noise, table, weights, "noise", *key)


def local_heads(cfg):
    """Heads that see positions; the others are for induction."""
    heads = cfg.width // cfg.head_dim
    return heads // 2 if cfg.induction else heads


def layer_windows(cfg):
    """Attention window of each layer in tokens, the own one included."""
    spans = {"S": min(cfg.short_window, cfg.seq_len), "L": cfg.seq_len}
    pattern = (cfg.windows * cfg.layers)[:cfg.layers - 1] + "L"
    return [spans[w] for w in pattern]


def layer_order(cfg):
    """Indices of the blocks in the order they run, replays of looped layers included."""
    order = list(range(cfg.layers))
    looped = slice(cfg.loop_first, cfg.loop_last + 1)
    order[looped] *= cfg.loop_passes
    return order


class RMSNorm(torch.autograd.Function):
    """x over its root mean square. It keeps its output, which the next layer keeps anyway, and not
    its input."""
    @staticmethod
    def forward(ctx, x):
        y, scale = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, None)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, d):
        y, scale = ctx.saved_tensors
        wide = d.to(scale.dtype)
        along = (wide * y).mean(-1, keepdim=True)
        return (scale * (wide - y * along)).to(d.dtype)


norm = RMSNorm.apply


def shifted(x):
    """x [B, T, ...] of the token before; zeros first."""
    return F.pad(x[:, :-1], (0, 0) * (x.ndim - 2) + (1, 0))


def rotate(x, cos, sin):
    """Rotary position embedding of x [B, T, H, K]; cos, sin [T, 1, K/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def attention(x, w, cos, sin, attend, cfg, shift):
    """x [B, T, D] normed, w {bank: tensor of this block} -> [B, T, D]. `attend` is a kernel of the
    layer's window, `shift` gives what belongs to the token before."""
    B, T, D = x.shape
    heads = (B, T, D // cfg.head_dim, cfg.head_dim)
    q, k, v = F.linear(x, w["qkv"].flatten(0, 1)).view(B, T, 3, *heads[2:]).unbind(2)
    if "value" in w:
        gate = 2 * torch.sigmoid(F.linear(x[..., :VALUE_GATE_CHANNELS], w["value_gate"]))
        v = v + gate.unsqueeze(-1) * w["value"].view(heads)
    else:
        v = v.contiguous()  # copied: a view would keep all of q, k and v in memory
    local = local_heads(cfg)
    turned_q = rotate(q[:, :, :local], cos, sin)
    turned_k = rotate(k[:, :, :local], cos, sin)
    if cfg.induction:  # keys of the token before, not rotated, so found by content
        turned_q = torch.cat((turned_q, q[:, :, local:]), dim=2)
        turned_k = torch.cat((turned_k, shift(k[:, :, local:])), dim=2)
    # turned before the norm, which turning does not change: only normed ones are kept
    heads_first = (t.transpose(1, 2) for t in (norm(turned_q), norm(turned_k), v))
    y = attend(*heads_first).transpose(1, 2)
    if "attn_gate" in w:
        y = y * torch.sigmoid(F.linear(x[..., :ATTN_GATE_CHANNELS], w["attn_gate"])).unsqueeze(-1)
    return F.linear(y.reshape(B, T, D), w["out"])


def block(x, w, cos, sin, attend, cfg, training, shift=shifted):
    """One transformer block on x [B, T, D]; this is what torch.compile sees, whatever the depth."""
    y = attention(norm(x), w, cos, sin, attend, cfg, shift)
    x = x + F.dropout(y, cfg.dropout, training)
    gate, up = F.linear(norm(x), w["gate_up"].flatten(0, 1)).chunk(2, dim=-1)
    y = F.linear(F.silu(gate) * up, w["down"])
    return x + F.dropout(y, cfg.dropout, training)


def blend(x, x0, skip, skip_scale, resid_scale, x0_scale):
    """What enters a block: the stream, an earlier layer's output (or None), the embedding."""
    if skip is not None:
        x = x + skip_scale.to(x.dtype) * skip
    if resid_scale is not None:
        x = resid_scale.to(x.dtype) * x + x0_scale.to(x.dtype) * x0
    return x


def mix_heads(qkv, mixing):
    """qkv [n, 3, D, D] with the heads of q, k and v mixed by mixing [n, 3, H, H]. Mixing rows of a
    projection is mixing heads of its output; done once, all passes of a looped layer share it."""
    heads = qkv.view(*mixing.shape[:-1], -1)
    return (mixing.to(qkv.dtype) @ heads).view(qkv.shape)


class GPT(nn.Module):
    """Maps tokens to normed hidden states; the head is applied inside the loss, in chunks. Weights
    are banks of `parameter_table`, in any floating dtype; products are in --precision."""
    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.cfg = cfg
        self.vocab_size = vocab_size
        self.dtype = getattr(torch, cfg.precision)
        self.table = parameter_table(cfg, vocab_size)
        for name, row in self.table.items():
            self.register_parameter(name, nn.Parameter(torch.empty(row.bank_shape)))
        frequency = ROTARY_BASE ** -(torch.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        angle = torch.arange(cfg.seq_len)[:, None, None] * frequency
        self.register_buffer("cos", angle.cos().to(self.dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(self.dtype), persistent=False)
        self.attend = attention_by_window(sdpa_attention, cfg, "cpu")  # works everywhere
        # others take their place: compiled ones in training, cached ones in records/generate.py
        self.block = block
        self.blend = blend
        self.shifted = shifted

    def layers(self, x0):
        """[{bank: tensor}] of each block, the multi-token block's last. Under "value" a block gets
        the product of its weights with the embedding x0 [B, T, D]: all passes of a loop share it.
        """
        found = {name: {} for name in block_names(self.cfg)}
        for name, row in self.table.items():
            if row.blocks and name != "mixing":
                bank = getattr(self, name)
                if name == "qkv" and self.cfg.head_mixing:
                    bank = mix_heads(bank, self.mixing)
                tensors = bank.unbind()
                if name == "value":
                    tensors = F.linear(x0, bank.flatten(0, 1)).chunk(len(bank), dim=-1)
                for of, tensor in zip(row.blocks, tensors):
                    found[of][name] = tensor
        return list(found.values())

    def run_block(self, i, x, w, T, window):
        """Block with the weights `w`; with --recompute the backward pass runs looped layers, or all
        where none is, a second time."""
        cfg = self.cfg
        looped = cfg.loop_passes == 1 or cfg.loop_first <= i <= cfg.loop_last
        inputs = (x, w, self.cos[:T], self.sin[:T], self.attend[window], cfg, self.training)
        if cfg.recompute and looped and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self.block, *inputs, use_reentrant=False)
        return self.block(*inputs)

    def forward(self, tokens, targets=None):
        """tokens [B, T] -> (hidden [B, T, D], ahead): with `targets`, the next tokens, ahead is the
        multi-token block's hidden [B, T, D], else None."""
        cfg = self.cfg
        n = cfg.layers
        T = tokens.size(1)
        resid = self.resid_scale.unbind() if cfg.x0_mix else [None] * n
        mixed = self.x0_scale.unbind() if cfg.x0_mix else [None] * n
        skips = [None] * n
        if "skip_scale" in self.table:  # the second half of the U-Net
            skips[n - n // 2:] = self.skip_scale.unbind()
        predicts_two = targets is not None and cfg.mtp_weight > 0
        if predicts_two:
            tokens = torch.cat((tokens, targets[:, -1:]), dim=1)  # one lookup for both
        embedded = norm(F.embedding(tokens, self.embed).to(self.dtype))
        x = embedded[:, :T]
        if cfg.smear:
            x = norm(x + self.smear.to(x.dtype) * self.shifted(x))
        x0 = x.view_as(x)  # a view: torch.compile compiles anew where two arguments are one tensor
        layers = self.layers(x0)
        windows = layer_windows(cfg)
        outputs = {}
        for i in layer_order(cfg):
            skip = outputs[n - 1 - i] if skips[i] is not None else None
            if skip is not None or cfg.x0_mix:
                x = self.blend(x, x0, skip, skips[i], resid[i], mixed[i])
            x = self.run_block(i, x, layers[i], T, windows[i])
            outputs[i] = x.view_as(x)  # a view, as above
        x = norm(x)
        if not predicts_two:
            return x, None
        ahead = F.linear(torch.cat((x, embedded[:, 1:]), dim=-1), self.mtp_proj)
        return x, norm(self.run_block(n, ahead, layers[n], T, cfg.seq_len))


# Attention kernels: each is a factory, kernel(cfg, device, window) -> attend(q, k, v), for causal
# attention over the last `window` tokens, [B, H, T, K] each, T up to --seq-len.

def visible(T, window, device):
    """[T, T], True where a query sees a key."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - window)


def plain_attention(cfg, device, window):
    """Attention as one reads it; the other kernels must agree. In bf16 on a CPU it is faster than
    SDPA, up to 1,024 tokens."""
    def attend(q, k, v):
        hidden = ~visible(q.size(2), window, q.device)
        scores = (q * q.size(-1) ** -0.5 @ k.mT).masked_fill(hidden, -math.inf)
        return scores.softmax(-1) @ v
    return attend


def sdpa_attention(cfg, device, window):
    """torch's scaled_dot_product_attention. A short window needs a mask, made for each call: kept,
    it would take T^2 bytes."""
    short = window < cfg.seq_len

    def attend(q, k, v):
        mask = visible(q.size(2), window, q.device) if short else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not short)
    return attend


def flex_attention(cfg, device, window):
    """torch's FlexAttention, which skips what lies outside the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, query, key):
        return (query >= key) & (query - key < window)
    mask = create_block_mask(seen, None, None, cfg.seq_len, cfg.seq_len, device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask)


ATTENTION = {"flex": flex_attention, "sdpa": sdpa_attention, "plain": plain_attention}


def attention_by_window(kernel, cfg, device):
    """{window: attend} of one kernel for all windows of the model."""
    return {w: kernel(cfg, device, w) for w in set(layer_windows(cfg))}


def check_attention(attend, cfg, device, window):
    """Compare a forward and backward pass with plain_attention. Raises ArithmeticError."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4, 1, 2, cfg.seq_len, cfg.head_dim, generator=generator)
    draws = draws.to(device, getattr(torch, cfg.precision))
    passes = []
    for function, drawn in ((attend, draws), (plain_attention(cfg, device, window), draws.float())):
        inputs = [x.requires_grad_() for x in drawn[:3].unbind()]
        out = function(*inputs)
        passes.append([out, *torch.autograd.grad(out, inputs, drawn[3])])
    for found, wanted in zip(*passes):  # bf16 keeps 8 bits: up to 1%; a wrong window is off by 50%
        assert_close(found, wanted, 0.05)


def assert_close(found, wanted, tolerance):
    """Raise ArithmeticError where tensors differ by more than a share of the wanted one's norm."""
    if not (found.float() - wanted).norm() <= tolerance * wanted.norm():  # NaN neither
        raise ArithmeticError("it disagrees with its plain reference")


def attention_names(cfg, device_type, window):
    """Kernels to try, the fastest first, as measured (records/tuning)."""
    if cfg.attention != "auto":
        return [cfg.attention]
    if device_type != "cuda":
        short = cfg.precision == "bfloat16" and cfg.seq_len <= 1024
        return ["plain", "sdpa"] if short else ["sdpa"]
    return ["sdpa"] if window >= cfg.seq_len else ["flex", "sdpa"]


def choose_attention(cfg, device):
    """(names, {window: attend}): for each window --attention, or the fastest kernel that works.
    Says loudly what it falls back from. Raises UserError where none works."""
    names = set()
    attends = {}
    for window in sorted(set(layer_windows(cfg))):
        for name in attention_names(cfg, device.type, window):
            try:
                attends[window] = ATTENTION[name](cfg, device, window)
                check_attention(attends[window], cfg, device, window)
                names.add(name)
                break
            except Exception as e:  # a kernel that does not fit the machine may fail in any way
                problem = f"attention kernel {name} does not work: {one_line(e)}"
                say(f"notice: {problem}; trying the next", "stderr")
        else:
            raise UserError(f"{problem}; give another --attention")
    return "+".join(sorted(names)), attends


# Loss -------------------------------------------------------------------------------------------
# (1 - a)(CE + m CE of the token after next) + a T^2 KL(teacher || student), on soft-capped logits,
# never all logits at once. `training_loss`, at the end, is what the training loop calls.

CHUNK_LOGITS = 2 ** 24  # each chunk adds to the gradient of the whole head: few are faster
PIECE_LOGITS = 2 ** 19  # of these in float32 at a time, near the caches, where there is no kernel
GPU_CHUNK_LOGITS = 2 ** 28  # with the kernel, in place: 512 MB in bf16, as much for a teacher
KERNEL_CAP = 30  # the kernel keeps no running maximum: e^30 V is far from overflow
LOSS_BLOCK = 2048  # logits at a time: 8 in each of 256 threads load as 16 bytes; no spills


if triton is not None:
    @triton.jit
    def capped_block(z, cols, V, width, softcap):
        # masking from V on would forbid loads of 16 bytes
        x = tl.load(z + cols, mask=cols < width, other=0.0).to(tl.float32)
        x = softcap * (2 * tl.sigmoid(x * (2 / softcap)) - 1)
        return tl.where(cols < V, x, float("-inf"))

    @triton.jit
    def loss_kernel(z, teacher, targets, scales, out, V, width, softcap, weight, T,
                    TEACHER: tl.constexpr, BLOCK: tl.constexpr):
        """One row: (loss, cross-entropy) to `out`; its gradient replaces z. Columns from V on are
        padding."""
        row = tl.program_id(0).to(tl.int64)
        z += row * width
        teacher += row * width
        cold = 1 / T
        target = tl.maximum(tl.load(targets + row), 0)  # an ignored row has scale 0
        # now: below, other threads overwrite it
        x_target = capped_block(z, target, V, width, softcap)
        sum_1 = tl.zeros([BLOCK], tl.float32)  # of exp(x): q
        sum_T = sum_1  # of exp(x / T): q^(T)
        sum_p = sum_1  # of exp(y / T): p, the teacher's
        dot = sum_1  # of p (y - x) / T
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = capped_block(z, cols, V, width, softcap)
            sum_1 += tl.exp(x)
            if TEACHER:
                sum_T += tl.exp(x * cold)
                y = capped_block(teacher, cols, V, width, softcap)
                p = tl.exp(y * cold)
                sum_p += p
                dot += tl.where(cols < V, p * (y - x) * cold, 0.0)
        log_1 = tl.log(tl.sum(sum_1, 0))
        ce = log_1 - x_target
        loss = ce
        if TEACHER:
            log_T = tl.log(tl.sum(sum_T, 0))
            log_p = tl.log(tl.sum(sum_p, 0))
            kl = tl.sum(dot, 0) / tl.sum(sum_p, 0) - log_p + log_T
            loss = (1 - weight) * ce + weight * T * T * kl
        tl.store(out + 2 * row, loss)
        tl.store(out + 2 * row + 1, ce)
        scale = tl.load(scales + row)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = capped_block(z, cols, V, width, softcap)
            d = tl.exp(x - log_1) - tl.where(cols == target, 1.0, 0.0)
            if TEACHER:
                y = capped_block(teacher, cols, V, width, softcap)
                soft = tl.exp(x * cold - log_T) - tl.exp(y * cold - log_p)
                d = (1 - weight) * d + weight * T * soft
            d *= 1 - x * x * (1 / (softcap * softcap))
            d = tl.where(cols < V, d * scale, 0.0)
            tl.store(z + cols, d.to(z.dtype.element_ty), mask=cols < width)


def rows_loss_in_triton(z, teacher_z, V, target, scale, softcap, weight, temperature):
    """As rows_loss_in_torch, for logits under a cap: their exp overflows nowhere."""
    out = torch.empty(len(z), 2, device=z.device)
    teacher = z if teacher_z is None else teacher_z
    loss_kernel[len(z),](z, teacher, target, scale, out, V, z.size(1), softcap, weight, temperature,
                         TEACHER=teacher_z is not None, BLOCK=LOSS_BLOCK, num_warps=8)
    return *out.mul_(scale[:, None]).sum(0), z


def check_kernel(device_type):
    """Run the Triton kernel once. Raises ArithmeticError where it disagrees with torch."""
    generator = torch.Generator().manual_seed(0)
    z, teacher_z = torch.randn(2, 4, 128, generator=generator).to(device_type)
    target = torch.arange(4, device=device_type)
    scale = torch.full((4,), 0.25, device=device_type)
    arguments = (100, target, scale, 15.0, 0.5, 1.2)
    found = rows_loss_in_triton(z.clone(), teacher_z.clone(), *arguments)
    for ours, wanted in zip(found, rows_loss_in_torch(z, teacher_z, *arguments)):
        assert_close(ours, wanted, 1e-4)  # rounding of float32


@functools.cache
def use_triton(device_type):
    """Whether losses there go through the Triton kernel: on a GPU where it proves itself in a trial
    run, or on a CPU under Triton's interpreter (tests). Says where a GPU goes without."""
    if device_type != "cuda" and not INTERPRETED:
        return False
    try:
        if triton is None:
            raise ImportError("triton is not installed (pip install triton)")
        check_kernel(device_type)
    except Exception as e:  # a toolchain that does not fit the machine may fail in any way
        say(f"notice: the loss goes without its Triton kernel and is slower: {one_line(e)}",
            "stderr")
        return False
    return True


def loss_in_triton(device_type, softcap, temperature):
    """Whether a loss under this cap goes through the kernel."""
    return 0 < softcap <= KERNEL_CAP * min(1, temperature) and use_triton(device_type)


def soft_capped(z, softcap):
    """softcap * tanh(z / softcap) in float32, of raw logits z, up to a constant that no softmax
    sees; softcap 0: z."""
    z = z.float()
    if not softcap:
        return z
    return (z * (2 / softcap)).sigmoid() * (2 * softcap)  # faster than tanh


def rows_loss_in_torch(z, teacher_z, V, target, scale, softcap, weight, temperature):
    """(loss, cross-entropy, gradient by z) from raw logits z [R, >= V] and a teacher's or None;
    columns V.. are padding, and z is overwritten. target [R], scale [R] float32 (share of the mean;
    0: ignored, target -1). By hand: autograd takes 1.2 to 1.5 times as long."""
    total = 0.0
    ce_total = 0.0
    rows = max(1, PIECE_LOGITS // z.size(1))
    for i in range(0, len(z), rows):
        part = slice(i, i + rows)
        share = scale[part, None]
        true = target[part, None].clamp_min(0)
        x = soft_capped(z[part, :V], softcap)
        log_q = x.log_softmax(-1)
        loss = ce = -(log_q.gather(1, true) * share).sum()
        d = log_q.exp_()  # gradient by x: q - one-hot
        d.scatter_add_(1, true, torch.full_like(share, -1))
        if teacher_z is not None:  # mixed with q^(T) - p^(T)
            log_p = (soft_capped(teacher_z[part, :V], softcap) / temperature).log_softmax(-1)
            log_q = (x / temperature).log_softmax(-1)
            p = log_p.exp()
            kl = torch.linalg.vecdot(p, log_p.sub_(log_q)) @ share[:, 0]
            loss = (1 - weight) * ce + weight * temperature ** 2 * kl
            d.mul_(1 - weight).add_(log_q.exp_().sub_(p), alpha=weight * temperature)
        if softcap:  # slope of x by z: x (2c - x) / c^2
            d.mul_(x).mul_((2 * softcap - x).div_(softcap ** 2))
        z[part, :V] = d.mul_(share)
        total += loss
        ce_total += ce
    z[:, V:] = 0
    return total, ce_total, z


def mixed_probs(logits, shares, softcap):
    """sum_i share_i softmax_i, float32 [R, V], of members' raw logits, taken one at a time."""
    return sum(share * torch.softmax(soft_capped(z, softcap), dim=-1)
               for share, z in zip(shares, logits))


def teacher_logits(teacher, rows, V, softcap):
    """Raw logits [R, >= V] of a teacher at `rows`. For several, those whose soft-capped values have
    the mixture as softmax: its log spans at most 2 softcap, as each member's does, so it fits under
    the cap once it is centered."""
    logits = (F.linear(hidden[rows], head) for _, hidden, head in teacher)
    if len(teacher) == 1:
        return next(logits)
    shares = [share for share, _, _ in teacher]
    y = mixed_probs((z[:, :V] for z in logits), shares, softcap)
    y.clamp_(min=1e-38).log_()  # of 0 it would make the KL term NaN
    if softcap:
        y -= (y.amax(-1, keepdim=True) + y.amin(-1, keepdim=True)) / 2
        y.div_(softcap).clamp_(-1 + 1e-6, 1 - 1e-6).atanh_().mul_(softcap)
    return F.pad(y, (0, len(teacher[0][2]) - V))


class ChunkedLoss(torch.autograd.Function):
    """The loss in chunks of rows, of the first V rows of the heads; the others are padding.
    Gradients are formed in the forward pass, while a chunk's logits are at hand."""
    @staticmethod
    def forward(ctx, hidden, head, V, targets, softcap, teacher=(), weight=0.0, temperature=1.0):
        valid = targets >= 0
        scale = valid / valid.sum()  # [N]: mean over the targets that count
        d_hidden = torch.empty_like(hidden)
        d_head = None
        total = 0.0
        ce_total = 0.0
        rows_loss = rows_loss_in_torch
        chunk = CHUNK_LOGITS
        if loss_in_triton(head.device.type, softcap, temperature):
            rows_loss = rows_loss_in_triton
            chunk = GPU_CHUNK_LOGITS
        rows = max(1, chunk // len(head))
        for i in range(0, len(hidden), rows):
            part = slice(i, i + rows)
            loss, ce, d = rows_loss(  # logits have no name here: they are freed as it returns
                F.linear(hidden[part], head),
                teacher_logits(teacher, part, V, softcap) if teacher else None,
                V, targets[part], scale[part], softcap, weight, temperature)
            d_hidden[part] = d @ head
            product = d.T @ hidden[part]
            d_head = product if d_head is None else d_head.float().add_(product)
            total += loss
            ce_total += ce
        ctx.save_for_backward(d_hidden, d_head.to(head.dtype))
        ctx.mark_non_differentiable(ce_total)
        return total, ce_total

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * d_loss, d_head * d_loss, *[None] * 6


def training_loss(model, teacher, cfg, tokens):
    """tokens [B, T+1], teacher [(share, model), ...] -> (loss, cross-entropy) in nats per token:
    (1 - a)(CE + m MTP) + a T^2 KL; a is 0 without a teacher."""
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    weight = cfg.distill_weight if teacher else 0.0
    with torch.no_grad():
        taught = [(share, t(inputs)[0].flatten(0, 1), t.head) for share, t in teacher]
    hidden, ahead = model(inputs, targets)
    V = model.vocab_size
    loss, ce = ChunkedLoss.apply(hidden.flatten(0, 1), model.head, V, targets.flatten(),
                                 cfg.softcap, taught, weight, cfg.distill_temperature)
    if ahead is not None:
        after_next = F.pad(targets[:, 1:], (0, 1), value=-1)  # the last position has none
        mtp, _ = ChunkedLoss.apply(ahead.flatten(0, 1), model.head, V, after_next.flatten(),
                                   cfg.softcap)
        loss = loss + (1 - weight) * cfg.mtp_weight * mtp
    return loss, ce


@torch.no_grad()
def true_token_probs(model, sequences, batch, world):
    """p(true token) of sequences [n, T+1] in file order, float32 [n * T]; ranks share the work."""
    n = len(sequences)
    head = model.head.float()
    probs = torch.zeros(n, sequences.shape[1] - 1, device=world.device)
    for i in range(batch * world.rank, n, batch * world.size):
        part = np.arange(i, i + batch).clip(max=n - 1)  # one shape, compiled once
        tokens = torch.from_numpy(sequences[part].astype(np.int64)).to(world.device)
        hidden, _ = model(tokens[:, :-1])
        for h, sequence, p in zip(hidden, tokens, probs[i:i + batch]):  # one, to save memory
            logits = soft_capped(F.linear(h.float(), head)[:, :model.vocab_size], model.cfg.softcap)
            p.copy_(torch.exp(-F.cross_entropy(logits, sequence[1:], reduction="none")))
    world.all_reduce(probs)
    return probs.flatten().cpu().numpy()


# Optimizer --------------------------------------------------------------------------------------
# Muon for matrices, AdamW for the rest, a bank at a time.

POLAR_EXPRESS = (  # (a, b, c) of X <- aX + (bA + cA^2)X, A = XX^T; arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def polar_express(X):
    """The nearest semi-orthogonal matrix to each of X [n, rows <= cols], of norms just below 1."""
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        # in place on 1 * A: else baddbmm copies A itself, a memcpy in the middle of a CUDA graph
        B = (1 * A).baddbmm_(A, A, beta=b, alpha=c)
        X = (1 * X).baddbmm_(B, X, beta=a)
    return X


def muon_momentum(grad, first, clip, dtype):
    """What Muon orthogonalizes, in `dtype` and with rows <= cols, from grad [n, rows, cols]; moves
    `first`."""
    grad = grad * clip
    update = grad.lerp(first.lerp_(grad, 1 - MOMENTUM), MOMENTUM)  # Nesterov
    update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-20)  # rows (MuonEq-R)
    X = update.to(dtype)
    X = X / (1.02 * X.float().norm(dim=(-2, -1), keepdim=True) + 1e-6).to(dtype)
    return X.mT.contiguous() if X.size(-2) > X.size(-1) else X


def muon_update(weight, X, second, lr, wd):
    """Move weight [n, rows, cols] by the orthogonal X, divided by the root of its second moment by
    row or column (NorMuon) and rescaled to keep its norm; cautious weight decay."""
    rows, cols = weight.shape[-2:]
    update = (X.mT if rows > cols else X).float()
    dim = -1 if rows >= cols else -2
    second.lerp_(update.square().mean(dim=dim, keepdim=True), 0.05)
    scaled = update * second.clamp_min(1e-10).rsqrt()
    before = update.norm(dim=(-2, -1), keepdim=True)
    after = scaled.norm(dim=(-2, -1), keepdim=True)
    update = scaled * (before / after.clamp_min(1e-10))
    decay = weight * (update * weight > 0)
    weight.sub_(lr * (wd * decay + update))


def adamw_update(weight, grad, first, second, lr, wd, clip, steps, b1, b2):
    """Move weight [n] and its moments. All that changes from step to step is a 0-D tensor, so that
    one compiled version, or one CUDA graph, serves every step."""
    grad = grad * clip
    first.lerp_(grad, 1 - b1)
    second.lerp_(grad.square(), 1 - b2)
    root = (second / (1 - b2 ** steps)).sqrt_().add_(1e-10)
    weight.sub_(lr * (wd * weight + first / (1 - b1 ** steps) / root))


class Bank:
    """A bank of weights in training: float32 master, gradient and moments. Its units, matrices for
    Muon and single weights for AdamW, are padded to a multiple of the ranks; each owns a slice."""
    def __init__(self, weight, row, dtype, world):
        self.row = row
        self.weight = weight  # the model's, which forward passes read
        unit = weight.shape[-2:] if row.rule == "muon" else ()
        self.units = weight.numel() // math.prod(unit)
        padded = world.size * math.ceil(self.units / world.size)
        self.master_units = torch.zeros(padded, *unit, device=weight.device)
        self.grad_units = torch.zeros_like(self.master_units)
        self.master = self.master_units[:self.units].view(weight.shape)
        self.grad = self.grad_units[:self.units].view(weight.shape)
        self.own = world.shard(self.master_units)
        self.first = torch.zeros_like(self.own)
        self.second = torch.zeros_like(self.own)
        self.lr = row.lr
        # vectors are small, and of the embedding some rows are read: the model has the masters
        self.copied = dtype != torch.float32 and (row.product or row.tensor == "head")
        if row.rule == "muon":
            rows, cols = unit
            by_row_or_column = self.own[..., :1] if rows >= cols else self.own[:, :1]
            self.second = torch.zeros_like(by_row_or_column)
            self.lr *= math.sqrt(max(1, rows / cols))
        self.slices = {"model": self.own, "first": self.first, "second": self.second}


class Optimizer:
    """Owns float32 masters of a model's banks and updates them. The model keeps a working copy of
    its matrices in the precision of products, made once a step; all else it reads is the master. A
    rank receives the summed gradient of its slice of each bank, updates it, and the slices are
    gathered. The masters begin as zeros: fill them, then `refresh`."""
    def __init__(self, model, cfg, world):
        self.cfg = cfg
        self.world = world
        self.dtype = model.dtype
        self.banks = {}
        for name, weight in model.named_parameters():
            if name not in model.table:
                raise UserError(f"weight {name} has no row in parameter_table: give it one, which "
                                "says how it starts and what updates it")
            bank = Bank(weight, model.table[name], self.dtype, world)
            weight.data = bank.master.to(self.dtype) if bank.copied else bank.master
            self.banks[name] = bank
        self.masters = {name: bank.master for name, bank in self.banks.items()}
        zero = torch.zeros((), device=world.device)
        self.steps = zero.clone()
        self.broken = zero.clone()  # steps of a gradient that was not finite
        self.lr_mult = zero.clone()
        self.wd_mult = zero.clone()
        self.muon_momentum = muon_momentum
        self.muon_update = muon_update
        self.adamw_update = adamw_update
        self.update = self.run_update  # or a CUDA graph of it

    def compile(self):
        """Fuse what is not a product. Sizes stay open: banks share what is compiled."""
        # betas are constants: as inputs, torch 2.13's cache on the disk takes one bank's for all
        torch._dynamo.config.specialize_float = True
        for rule in (muon_momentum, muon_update, adamw_update):
            setattr(self, rule.__name__, torch.compile(rule, dynamic=True))

    @torch.no_grad()
    def refresh(self):
        """Make the model's working copies anew, after its masters changed."""
        for bank in self.banks.values():
            if bank.copied:
                bank.weight.copy_(bank.master)

    @torch.no_grad()
    def add_gradients(self):
        """Add a micro-batch's gradients, all passes of looped layers, to the float32 gradients."""
        for name, bank in self.banks.items():
            if bank.weight.grad is None:
                raise UserError(f"weight {name} has no gradient: the forward pass does not use it")
            bank.grad.add_(bank.weight.grad)
            bank.weight.grad = None

    @torch.no_grad()
    def reset(self):
        """Forget moments, gradients and steps."""
        self.steps.zero_()
        self.broken.zero_()
        for bank in self.banks.values():
            for tensor in (bank.grad_units, bank.first, bank.second):
                tensor.zero_()

    def step(self, lr_mult, wd_mult):
        """Sum the gradients over the ranks, clip them, update every weight; gradients end as 0."""
        self.lr_mult.fill_(lr_mult)
        self.wd_mult.fill_(wd_mult)
        self.update()

    @torch.no_grad()
    def run_update(self):
        banks = self.banks.values()
        grads = [self.world.reduce_scatter(bank.grad_units) for bank in banks]
        square = sum(torch.linalg.vector_norm(grad) ** 2 for grad in grads)
        self.world.all_reduce(square)
        largest = self.cfg.grad_clip or math.inf
        clip = (largest / (square.sqrt() + 1e-6)).clamp(max=1.0)
        self.steps += 1
        self.broken += ~square.isfinite()
        for bank, grad in zip(banks, grads):
            self.update_bank(bank, grad, clip)
            self.world.all_gather(bank.own, bank.master_units)
            bank.grad_units.zero_()
        self.refresh()

    def update_bank(self, bank, grad, clip):
        """Update this rank's slice of a bank by its gradient [units, ...]."""
        lr = bank.lr * self.lr_mult
        wd = bank.row.decay * self.wd_mult
        if bank.row.rule == "adamw":
            self.adamw_update(bank.own, grad, bank.first, bank.second, lr, wd, clip, self.steps,
                              *bank.row.betas)
        else:
            X = self.muon_momentum(grad, bank.first, clip, self.dtype)
            self.muon_update(bank.own, polar_express(X), bank.second, lr, wd)

    def state(self):
        """{name: masters or moments, ...}, the same for any number of ranks, for the leader; {} for
        the others: all ranks' copies might be more than a machine's memory."""
        found = {"steps": self.steps}
        for name, bank in self.banks.items():
            for kind, own in bank.slices.items():
                whole = own.new_empty(len(bank.master_units), *own.shape[1:])
                self.world.all_gather(own, whole)
                if self.world.leader:
                    found[f"{kind}.{name}"] = whole[:bank.units].cpu()
        return found if self.world.leader else {}

    def load(self, found):
        """Take over what `state` gave to the leader; the other ranks pass None."""
        if found is not None:
            self.steps.copy_(found["steps"])
        self.world.broadcast(self.steps)
        for name, bank in self.banks.items():
            for kind, own in bank.slices.items():
                whole = own.new_zeros(len(bank.master_units), *own.shape[1:])
                if found is not None:
                    whole[:bank.units] = found[f"{kind}.{name}"]
                self.world.broadcast(whole)
                own.copy_(self.world.shard(whole))
            self.world.all_gather(bank.own, bank.master_units)


# Schedule ---------------------------------------------------------------------------------------
# Pure functions of the position: step s of the L steps of cycle c of C. Peaks: see Recipes.

def schedule(s, L, cfg):
    """(lr multiplier, weight decay multiplier) of step s of L: lr falls from 1 to (almost) its
    floor, without warmup, and decay goes from its start to its end; both are linear."""
    done = s / L
    return 1 + (cfg.lr_floor - 1) * done, cfg.wd_start + (cfg.wd_end - cfg.wd_start) * done


def noise_scale(b, C, first, last):
    """Noise at boundary b = 1 .. C-1 in standard deviations: a cosine from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * (b - 1) / max(1, C - 2))) / 2


def cycle_batch_tokens(c, C, cfg):
    """Tokens a step: --batch-tokens in the middle half of the cycles, else --edge-batch-tokens."""
    middle = C == 1 or 0.25 <= c / (C - 1) <= 0.75
    return cfg.batch_tokens if middle else cfg.edge_batch_tokens


@dataclass(frozen=True)
class Cycle:
    """One cycle of one trajectory; it ends in `member`."""
    member: int
    trajectory: int
    index: int  # within the trajectory
    epochs: int
    epochs_before: int  # of the whole budget, trajectories counted one after the other
    steps: int
    steps_before: int  # likewise
    rows: int  # sequences a step
    distilled: bool

    @property
    def place(self):
        return {"member": self.member, "traj": self.trajectory, "cycle": self.index + 1,
                "epochs": self.epochs_before + self.epochs, "distilled": int(self.distilled)}


def plan_cycles(cfg, train_tokens):
    """[trajectory][cycle] -> Cycle: all that a run will do. `train_tokens` are one epoch's."""
    J = cfg.trajectories
    C = cfg.cycles
    each, rest = divmod(cfg.epochs, J * C)  # the rest lengthens the first cycles
    epochs_before = 0
    steps_before = 0
    cycles = []
    for j in range(J):
        cycles.append([])
        for c in range(C):
            epochs = each + int(c * J + j < rest)
            batch = cycle_batch_tokens(c, C, cfg)
            steps = max(1, round(epochs * train_tokens / batch))
            taught = cfg.distill_weight > 0 and (bool(cfg.teacher) or c >= cfg.distill_after)
            cycles[j].append(Cycle(
                member=j * C + c, trajectory=j, index=c, epochs=epochs,
                epochs_before=epochs_before, steps=steps, steps_before=steps_before,
                rows=batch // cfg.seq_len, distilled=taught))
            epochs_before += epochs
            steps_before += steps
    return cycles


# Prior ------------------------------------------------------------------------------------------
# Weights on the simplex that minimise the held-out loss of the mixture, solved to a certificate.

FEW_MEMBERS = 64  # so many are fitted from a cold start with a whole Hessian, as in all records
TOKEN_CHUNK = 4096  # a float64 block of hundreds of members stays at some megabytes


def mixture_losses(P, weights):
    """Nats per token of R mixtures, float64 [R], in one pass over P.

    P [M, N] (or M rows): p(true token) of each member. weights [R, M].
    """
    weights = torch.from_numpy(np.asarray(weights, dtype=np.float64))
    N = len(P[0])
    total = torch.zeros(len(weights), dtype=torch.float64)
    for begin in range(0, N, TOKEN_CHUNK):
        block = np.stack([p[begin:begin + TOKEN_CHUNK] for p in P], dtype=np.float64)
        mixed = weights @ torch.from_numpy(block)
        total -= mixed.log().sum(dim=1)
    return (total / N).numpy()


def fit_prior(P, tolerance=1e-7, start=None):
    """Minimise F(w) = -(1/N) sum_n log(sum_i w_i P_in) over the simplex: (w float64 [M], gap).

    P [M, N] > 0. The certificate: F(w) - min F <= gap = log(max_i g_i), where
    g_i = (1/N) sum_n P_in / (w.P_n). The method is a primal-dual interior point. As
    F(c w) = F(w) - log c, minimising F(w) + sum(w) over w >= 0 ends on the simplex by itself;
    its conditions are 1 - g = z, w z = 0, z >= 0, and each pass over P is one Newton step
    towards w z = mu with mu ever smaller. `start` [M] > 0: weights close to the optimum, which
    save half of the passes; from others the gap may stay above the tolerance.
    """
    M, N = P.shape
    if not ((P > 0) & (P < np.inf)).all():
        raise ValueError("fit_prior: every probability must be positive and finite")
    P = torch.from_numpy(np.ascontiguousarray(P))
    w = torch.full((M,), 1 / M, dtype=torch.float64)
    mu = 0.1 / M
    if start is not None:
        w = torch.from_numpy(start / start.sum())
        mu = 1e-4 / M
    z = mu / w
    best = w
    best_gap = math.inf
    for _ in range(100):
        # where z / w is large it alone decides the step, and no Hessian is needed
        active = (z < 10 * w) | (M <= FEW_MEMBERS)
        g = torch.zeros_like(w)
        hessian = torch.diag((z / w)[active])
        for p in P.split(TOKEN_CHUNK, dim=1):
            p = p.double()
            inverse = 1 / (w @ p)
            g += p @ inverse / N
            ratio = (p[active] * inverse).float()  # it shapes the step, not the certificate
            hessian += (ratio @ ratio.T).double() / N
        gap = max(0.0, float(g.max().log()))
        if gap < best_gap:
            best = w
            best_gap = gap
        if gap <= tolerance:
            break
        mu = 0.1 * float(w @ z) / M
        slope = g - 1 + mu / w
        dw = slope * w / z
        dw[active] = torch.linalg.solve(hessian, slope[active])
        dz = mu / w - z - z / w * dw
        w = keep_positive(w, dw)
        w = w / w.sum()
        z = keep_positive(z, dz)
    return best.numpy(), best_gap


def keep_positive(x, dx):
    """x + dx, or 0.99 of the way to the first zero."""
    nearest = float((-dx / x).max())
    return x + dx * min(1.0, 0.99 / max(1e-300, nearest))


# Training loop ----------------------------------------------------------------------------------

def train(trainer, cycles_by_trajectory):
    """The loop of q0 and of every baseline, over trajectories, cycles and steps; records/ then fits
    the prior over all members. Raises Stopped after a signal."""
    for cycles in trainer.claimed(cycles_by_trajectory):
        at = trainer.start_trajectory(cycles)
        for cycle in cycles[at.cycle:]:
            trainer.start_cycle(cycle)
            for s in range(at.in_cycle, cycle.steps):
                trainer.forward_backward(cycle)
                trainer.optimizer.step(*schedule(s, cycle.steps, trainer.cfg))
                trainer.update_mean(cycle, s)
                trainer.finish_step(cycle, s)
            trainer.finish_cycle(cycle)  # a member; it teaches the next cycle
        trainer.finish_trajectory()


class Trainer:
    """What a launch holds while it trains: the student and its optimizer; the newest member, which
    is evaluated and teaches; and where the trajectory stands."""
    def __init__(self, cfg, corpus, world, run, population=None):
        self.cfg = cfg
        self.corpus = corpus
        self.world = world
        self.run = run
        self.population = population
        self.student = GPT(cfg, corpus.vocab_size).to(world.device).train()
        self.newest = empty_member(cfg, corpus.vocab_size).to(world.device)
        attention, self.student.attend = choose_attention(cfg, world.device)
        self.newest.attend = self.student.attend
        self.optimizer = Optimizer(self.student, cfg, world)
        self.teacher = [(1.0, self.newest)]
        if population:
            self.teacher = list(zip(population.weights, population.models))
        self.mean = {}  # of the weights over a cycle's end, where --average asks for it
        if world.leader and cfg.average:
            self.mean = {n: torch.zeros_like(p) for n, p in self.optimizer.masters.items()}
        device = world.device.type
        triton_used = loss_in_triton(device, cfg.softcap, cfg.distill_temperature)
        if use_triton(device) and not triton_used:
            say("notice: the loss has no Triton kernel for this --softcap and is slower", "stderr")
        self.kernels = {"attention": attention, "triton": triton_used, "compiled": cfg.compile,
                        "graphs": cfg.graphs, "device": device, "processes": world.size}
        self.predictions = Predictions(run.folder, ("heldout", cfg.report))
        self.set_up_micro_batch()
        started = time.perf_counter()
        if cfg.compile:
            self.compile_blocks()
        if cfg.compile or cfg.graphs:
            try:
                self.warm_up()
            except torch._dynamo.exc.TorchDynamoException as e:  # such as: there is no compiler
                say(f"notice: nothing is compiled: {one_line(e)}", "stderr")
                torch.compiler.set_stance("force_eager")
                self.kernels["compiled"] = False
                self.warm_up()
        self.ready_seconds = time.perf_counter() - started

    # A micro-batch: static inputs, so that a CUDA graph can replay it

    def set_up_micro_batch(self):
        cfg = self.cfg
        device = self.world.device
        shape = (cfg.micro_batch, cfg.seq_len + 1)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.share = torch.ones((), device=device)  # of the micro-batch in the step's mean
        self.loss = torch.zeros((), device=device)  # cross-entropy of the step so far
        self.micro_batch = {taught: functools.partial(self.run_micro_batch, taught)
                            for taught in (False, True)}

    def run_micro_batch(self, taught):
        """Forward and backward pass of self.tokens; adds to the gradients and to self.loss."""
        teacher = self.teacher if taught else []
        loss, ce = training_loss(self.student, teacher, self.cfg, self.tokens)
        (loss * self.share).backward()
        self.optimizer.add_gradients()
        self.loss += ce * self.share

    def forward_backward(self, cycle):
        """Gradients of one step: this rank's micro-batches. Dropout depends on the index of a
        micro-batch alone, not on the rank that runs it."""
        cfg = self.cfg
        at = self.at
        self.run.alive(cfg.hang_minutes)
        rows = self.corpus.batch(cfg.seed, at.trajectory, at.sequences, cycle.rows)
        batch = torch.from_numpy(rows)
        # torch.manual_seed takes a millisecond: it asks for every kind of device there may be
        set_seed = torch.default_generator.manual_seed
        if self.world.device.type == "cuda":  # a copy for which the host does not wait
            batch = batch.pin_memory().to(self.world.device, non_blocking=True)
            set_seed = torch.cuda.manual_seed
        elif self.world.device.type == "mps":
            set_seed = torch.mps.manual_seed
        count = cycle.rows // cfg.micro_batch
        self.loss.zero_()
        self.share.fill_(1 / count)
        for m in range(self.world.rank, count, self.world.size):
            self.tokens.copy_(batch[m * cfg.micro_batch:(m + 1) * cfg.micro_batch])
            set_seed(seed_of("dropout", cfg.seed, at.trajectory, at.step, m))
            self.micro_batch[cycle.distilled]()

    def compile_blocks(self):
        """Compile the block, not the model: a graph for each kind of block, whatever the depth."""
        torch._dynamo.config.recompile_limit = 32  # kinds of block x (student, teacher, shapes)
        compiled_block = torch.compile(block, dynamic=False)
        compiled_blend = torch.compile(blend, dynamic=False)
        for model in (self.student, self.newest, *[teacher for _, teacher in self.teacher]):
            model.block = compiled_block
            model.blend = compiled_blend
        if self.world.device.type == "cuda":  # on a CPU an update is an eighth of a step
            self.optimizer.compile()

    def warm_up(self):
        """Compile and capture all that a run will use, before its first step; no trace stays."""
        cfg = self.cfg
        reset_watchdog(cfg.hang_minutes and max(cfg.hang_minutes, WARM_UP_MINUTES))
        kinds = (False, True) if cfg.distill_weight else (False,)
        with beside_the_main_stream() if cfg.graphs else contextlib.nullcontext():
            with torch.no_grad():
                self.newest(self.tokens[:, :-1])
            for taught in kinds:
                self.run_micro_batch(taught)
            self.optimizer.step(1.0, 1.0)
        if cfg.graphs:
            memory = torch.cuda.graph_pool_handle()
            for taught in kinds:
                self.micro_batch[taught] = captured(self.micro_batch[taught], memory)
            if self.world.size == 1:
                self.optimizer.update = captured(self.optimizer.run_update, memory)
        self.optimizer.reset()
        faulthandler.cancel_dump_traceback_later()  # until the first step

    # Trajectories and cycles

    def claimed(self, cycles_by_trajectory):
        """Yield the cycles of each trajectory that is neither done nor held by another launch, also
        of those whose launch ended meanwhile; it is held until the next is asked for."""
        claimed = True
        while claimed:
            claimed = False
            for cycles in cycles_by_trajectory:
                if self.run.claim(cycles[0].trajectory, self.world):
                    claimed = True
                    yield cycles
                    self.run.release()

    def start_trajectory(self, cycles):
        """Progress of the trajectory: of its newest whole state, or none."""
        j = cycles[0].trajectory
        state = self.run.load_state(j) if self.world.leader else None
        self.at, self.resume_from = self.world.broadcast_object(state) or (Progress(j), None)
        self.saved_step = self.at.step
        if self.world.leader:
            self.log = self.run.open_log(j, self.at.log)
            if not self.resume_from:
                ready = f"{self.ready_seconds:.1f}s"
                self.log.event("kernels", traj=j, **self.kernels, ready=ready)
                return self.at
            say(f"resuming trajectory {j} at step {self.at.step}")
            if self.at.kernels != self.kernels:
                self.log.line(f"notice: step {self.at.step} was reached with {self.at.kernels}, "
                              f"now {self.kernels}: rounding differs")
        return self.at

    def start_cycle(self, cycle):
        """Weights at a cycle's start: resumed, fresh, or the last cycle's, perhaps perturbed."""
        cfg = self.cfg
        key = (cfg.seed, cycle.trajectory, cycle.index)
        masters = self.optimizer.masters
        if self.resume_from:
            self.load_tensors(cycle)
        elif cycle.index == 0 or cfg.boundary == "fresh":
            init_weights(self.student.table, masters, *key)
            self.optimizer.reset()
        elif cfg.boundary == "perturb":
            scale = noise_scale(cycle.index, cfg.cycles, cfg.noise_first, cfg.noise_last)
            perturb(self.student.table, masters, scale, *key)
        self.resume_from = None
        self.optimizer.refresh()
        self.counted = time.perf_counter()  # up to here time is counted
        self.counted_step = self.at.step
        self.last_save = self.counted

    def load_tensors(self, cycle):
        """Weights, moments, mean and teacher of the state that the trajectory goes on from."""
        tensors = None
        if self.world.leader:
            with reading(f"state {self.resume_from}"):
                tensors = load_tensor_file(self.resume_from)
        for name, mean in self.mean.items():
            mean.copy_(tensors[f"mean.{name}"])
        self.optimizer.load(tensors)
        if cycle.distilled and self.at.in_cycle < cycle.steps and not self.population:
            self.set_newest(cycle.member - 1, self.at.curve[-1]["config"])

    def set_newest(self, member, sha256=None):
        """Load a member from its folder: it is evaluated, and teaches the next cycle, as saved."""
        if self.world.leader:
            _, weights = read_member(self.run.folder / f"members/{member}", sha256)
            self.newest.load_state_dict(weights)
        self.world.broadcast(*self.newest.parameters())

    def update_mean(self, cycle, s):
        """Average the weights over the last --average of a cycle."""
        # how many weights are in the mean, these included
        averaged = s + 1 - cycle.steps + math.ceil(self.cfg.average * cycle.steps)
        if averaged > 0:
            for name, mean in self.mean.items():
                mean.lerp_(self.optimizer.masters[name], 1 / averaged)

    def finish_step(self, cycle, s):
        """Count the step; log, check, save or stop where it is time to."""
        at = self.at
        at.step += 1
        at.sequences += cycle.rows
        at.in_cycle = s + 1
        last = s == cycle.steps - 1
        logged = last or (cycle.steps_before + s + 1) % self.cfg.log_every == 0
        if logged:
            self.log_step(cycle)
        unsaved = time.perf_counter() - self.last_save
        # 1: to save; 2: to save and stop
        asked = 2 if Stopped.signal else int(unsaved > 60 * self.cfg.save_minutes)
        asked = self.world.largest(asked)  # all ranks do the same at the same step
        if (logged or asked) and self.optimizer.broken:
            raise UserError(
                f"the loss or a gradient is not finite at or before step {at.step} of trajectory "
                f"{at.trajectory}; the last saved state is of step {self.saved_step}: lower "
                "--lr-matrix, or try --precision float32")
        if asked or last:  # before the evaluation, which may be interrupted
            self.save()
        if asked == 2:
            raise Stopped

    def log_step(self, cycle):
        """Log the newest step; the time since the last logged one counts as training."""
        cfg = self.cfg
        at = self.at
        self.world.all_reduce(self.loss)
        loss = float(self.loss)  # waits for the device
        now = time.perf_counter()
        seconds = now - self.counted
        speed = (at.step - self.counted_step) * cycle.rows * cfg.seq_len / seconds
        at.train_seconds += seconds
        self.counted = now
        self.counted_step = at.step
        step = cycle.steps_before + at.in_cycle
        steps = sum(c.steps for c in self.run.cycles)
        a_step = (at.train_seconds + at.eval_seconds) / at.step
        eta = datetime.timedelta(seconds=round(a_step * (steps - step)))
        lr_mult, wd_mult = schedule(at.in_cycle - 1, cycle.steps, cfg)
        if self.world.leader:
            self.log.event(**{
                "step": (step, steps), "traj": at.trajectory,
                "cycle": (cycle.index + 1, cfg.cycles),
                "epoch": cycle.epochs_before + cycle.epochs * at.in_cycle / cycle.steps,
                "loss": loss, "lr": cfg.lr_matrix * lr_mult, "wd": cfg.weight_decay * wd_mult,
                "tok/s": round(speed), "eta": str(eta)})

    def finish_cycle(self, cycle):
        """The cycle's end becomes a member, saved with its p(true token); it teaches next."""
        cfg = self.cfg
        started = time.perf_counter()
        folder = self.run.folder / f"members/{cycle.member}"
        if self.world.leader:
            weights = self.mean or self.optimizer.masters
            save_member(folder, cfg, self.corpus.vocab_size, weights, cycle.place)
        self.set_newest(cycle.member)
        probs = {}
        for split in self.predictions.splits:
            self.run.alive(cfg.hang_minutes)
            sequences = self.corpus.eval_sequences(split)
            probs[split] = true_token_probs(self.newest, sequences, cfg.micro_batch, self.world)
            if not (probs[split] > 0).all():
                raise UserError(f"member {cycle.member} gives some true token probability "
                                f"{probs[split].min()}: lower --lr-matrix or --softcap")
        if self.world.leader:
            self.predictions.write(cycle.member, probs)
            self.at.curve.append(self.curve_entry(cycle))
        self.at.cycle = cycle.index + 1
        self.at.in_cycle = 0
        self.at.eval_seconds += time.perf_counter() - started

    def curve_entry(self, cycle):
        """Log and return the losses of the newest member and of all so far."""
        key = f"{self.cfg.report}_loss"
        so_far = [i for i in range(cycle.member + 1) if self.predictions.path(i).exists()]
        mixed = self.predictions.mixtures(so_far)
        entry = cycle.place | mixed | hashes_of(self.run.folder, cycle.member)
        self.log.event(**cycle.place, **{key: mixed["loss"]})
        for pairs in ensembles(entry, key):
            self.log.event("ensemble", **pairs)
        return entry

    def finish_trajectory(self):
        self.at.done = True
        self.save()
        faulthandler.cancel_dump_traceback_later()

    def save(self):
        """Write the state that --resume goes on from."""
        at = self.at
        started = time.perf_counter()
        self.saved_step = at.step
        tensors = {} if at.done else self.optimizer.state()
        at.kernels = self.kernels
        if self.world.leader:
            at.log = self.log.position()
            if not at.done:
                tensors |= {f"mean.{n}": p.cpu() for n, p in self.mean.items()}
            self.run.save_state(at, tensors)
            # a state inside a cycle needs the newest member, its teacher; the state kept before
            # it may need the member before
            keep = max(self.cfg.keep_members or len(at.curve), 1 if at.done else 2)
            for old in at.curve[:-keep]:
                weights = self.run.folder / f"members/{old['member']}/model.safetensors"
                weights.unlink(missing_ok=True)
        self.last_save = time.perf_counter()
        self.counted += self.last_save - started  # no training time


@contextlib.contextmanager
def beside_the_main_stream():
    """Where work runs once before a CUDA graph captures it, so that libraries set up what they
    need outside the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(function, memory):
    """`function`, which ran once already, as a CUDA graph, where replays cost no launches; as it is
    where that fails. Capture runs nothing. Seeds set before a replay apply, as torch's generator is
    read when it begins. Graphs share `memory`: nothing in it outlives a replay."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            function()
    except Exception as e:  # a kernel that cannot be captured may fail in any way
        say(f"notice: a step is not replayed as a CUDA graph: {one_line(e)}", "stderr")
        return function
    return graph.replay


# Members, predictions, resume state -------------------------------------------------------------
# A run is a folder: members (bf16 weights and configuration), their p(true token), the states that
# --resume goes on from, and locks that say which launch trains what.

FORMAT = 3  # of members and states: 1 had no banks of weights, 2 hashes of weights alone
OWN_SCRIPT = "use the train_q0.py at the head of its run's log"


def write_atomically(path, write):
    """Call write(temporary path), then rename it: a reader sees the old file or the new one."""
    tmp = path.with_name(f"{path.name}.tmp")  # a fixed name: the next try overwrites a leftover
    try:
        write(tmp)
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        mask = os.umask(0)
        os.umask(mask)
        tmp.chmod(0o666 & ~mask)  # safetensors makes files that others cannot read
        os.replace(tmp, path)
    except SafetensorError as e:
        raise OSError(f"cannot write {path}: {e}") from None
    finally:
        tmp.unlink(missing_ok=True)


def save_json(path, value):
    text = f"{json.dumps(value, indent=1)}\n"
    write_atomically(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def load_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_sha256(path, sha256):
    """Raise ValueError where a file is not the recorded one; None: nothing is recorded."""
    if sha256 is not None and sha256_of(path) != sha256:
        raise ValueError(f"the sha256 of {path.name} is not the recorded one")


def check_format(saved):
    if saved.get("format") != FORMAT:
        raise UserError(f"it is of format {saved.get('format', 1)}, this script reads {FORMAT}: "
                        f"{OWN_SCRIPT}")


def save_member(folder, cfg, vocab_size, weights, position):
    """Write `weights` {bank: tensor} in bf16, and all that is needed to load them; `position` says
    where in the run they were taken."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    rounded = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in weights.items()}
    write_atomically(path, lambda tmp: save_tensors(rounded, tmp))
    save_json(folder / "config.json", {"format": FORMAT, "vocab_size": vocab_size, **position,
                                       "sha256": sha256_of(path), "config": method_settings(cfg)})


def empty_member(cfg, vocab_size):
    """A frozen GPT in evaluation mode, in the precision of `cfg`; its weights are not set yet."""
    model = GPT(cfg, vocab_size)
    return model.to(model.dtype).eval().requires_grad_(False)


def read_member(folder, sha256=None):
    """(config.json, {bank: tensor}) of a member. Raises UserError where a file is damaged, or the
    hash of config.json is not `sha256`."""
    with reading(f"member {folder}"):
        about = load_json(folder / "config.json")
        check_format(about)
        check_sha256(folder / "config.json", sha256)
        check_sha256(folder / "model.safetensors", about["sha256"])
        return about, load_tensor_file(folder / "model.safetensors")


@dataclass
class Predictions:
    """p(true token) of a run's members, read from its folder as they appear."""
    run: Path
    splits: tuple
    cached: dict = field(default_factory=dict)

    def path(self, member):
        return self.run / f"predictions/{member}.safetensors"

    def write(self, member, probs):
        write_atomically(self.path(member), lambda tmp: save_file(probs, tmp))
        self.cached[member] = probs

    def of(self, split, members):
        """[float32 [tokens], ...] of `members`. Raises UserError where one's file cannot be read.
        """
        for member in members:
            if member not in self.cached:
                with reading(f"predictions {self.path(member)}"):
                    self.cached[member] = load_file(self.path(member))
        return [self.cached[member][split] for member in members]

    def mixtures(self, members):
        """Losses of the newest of `members`, of all uniformly and under their prior; how many."""
        heldout, scored = (self.of(split, members) for split in self.splits)
        w, gap = fit_prior(np.stack(heldout))
        M = len(w)
        newest = np.eye(M)[-1]
        uniform = np.full(M, 1 / M)
        losses = mixture_losses(scored, [newest, uniform, w]).tolist()
        return {"loss": losses[0], "uniform": losses[1], "learned": losses[2], "gap": gap, "of": M}


def hashes_of(run, member):
    """sha256 of a member's config.json, which has that of its weights, and of its predictions;
    `run` is a folder."""
    return {"config": sha256_of(run / f"members/{member}/config.json"),
            "predictions": sha256_of(run / f"predictions/{member}.safetensors")}


@dataclass
class Progress:
    """Where a trajectory stands: with its tensors, all that a resumed run needs."""
    trajectory: int
    cycle: int = 0  # index of the cycle under way
    in_cycle: int = 0  # steps of it that are done
    step: int = 0  # steps done
    sequences: int = 0  # and read
    done: bool = False
    curve: list = field(default_factory=list)  # an entry a member
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    log: int = 0  # bytes of the log
    kernels: dict = field(default_factory=dict)


SILENT_SECONDS = 900  # until a holder on another machine counts as gone


class Lock:
    """A file that one launch has locked; the system frees it when the process ends. As such locks
    may not reach other machines, the holder also writes its name and renews the time each step."""
    def __init__(self, path):
        self.path = path
        self.file = open(path, "a+", encoding="utf-8")

    def acquire(self):
        """Whether it is ours now."""
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as e:  # some shared file systems have no locks
            say(f"notice: {self.path} cannot be locked ({one_line(e)}): start no second launch "
                  "of this run on this machine", "stderr")
        silent = time.time() - self.path.stat().st_mtime
        holder = self.path.read_text(encoding="utf-8")
        if holder not in ("", platform.node()) and silent < SILENT_SECONDS:
            return False
        self.path.write_text(platform.node(), encoding="utf-8")
        return True

    def renew(self):
        os.utime(self.path)

    def release(self):
        self.path.write_text("", encoding="utf-8")
        self.file.close()


@contextlib.contextmanager
def locked(path):
    """Hold a lock, once no other launch does."""
    lock = Lock(path)
    while not lock.acquire():
        time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


@dataclass
class Run:
    """The folder of a run, for a launch that trains trajectories of it."""
    folder: Path
    identity: dict  # a state of another configuration or other data is refused
    cycles: list  # of all trajectories
    about: dict  # at the head of the log: command, settings, data
    listeners: tuple = ()  # to the events of its logs: records/live.py
    plan: str = ""  # what follows `about` there: lines that say what the run will do
    edited: bool = False  # whether it began with another script
    lock: Lock | None = None

    @property
    def state(self):
        return self.folder / "state"

    def claim(self, trajectory, world):
        """Whether this launch trains the trajectory, which nobody has done and nobody else holds.
        """
        if world.leader:
            lock = Lock(self.state / f"{trajectory}.lock")
            if lock.acquire():
                self.lock = lock
                if self.is_done(trajectory):
                    self.release()
        return world.broadcast_object(self.lock is not None)

    def alive(self, hang_minutes):
        """Tell its own watchdog, and other launches, that this one is at work."""
        reset_watchdog(hang_minutes)
        if self.lock:
            self.lock.renew()

    def release(self):
        if self.lock:
            self.lock.release()
            self.lock = None

    def is_done(self, trajectory):
        named_done = any(self.state.glob(f"{trajectory}-*_done.json"))
        return named_done and self.load_state(trajectory)[0].done  # the newest may be damaged

    def generations(self, trajectory, kind=".json"):
        """Files of a trajectory's states, newest first; each JSON is beside its tensors."""
        return sorted(self.state.glob(f"{trajectory}-{9 * '[0-9]'}*{kind}"), reverse=True)

    def save_state(self, at, tensors):
        """Write a state: its tensors, then the JSON that makes it valid. Then delete all but the
        two newest."""
        done = "_done" if at.done else ""  # sorts behind .json
        path = self.state / f"{at.trajectory}-{at.step:09}{done}.json"
        tensor_file = path.with_suffix(".safetensors")
        write_atomically(tensor_file, lambda tmp: save_tensors(tensors, tmp))
        body = {"format": FORMAT, "at": asdict(at), "identity": self.identity,
                "tensors": sha256_of(tensor_file)}
        save_json(path, {"body": body, "sha256": digest(body)})
        keep = [f.stem for f in self.generations(at.trajectory)[:2]]
        for old in self.generations(at.trajectory, ""):  # also what a kill left half written
            if old.name.partition(".")[0] not in keep:
                old.unlink()

    def load_state(self, trajectory):
        """(Progress, file of its tensors) of a trajectory's newest state that is whole; None if
        there are no states. Raises UserError if none of them is whole."""
        files = self.generations(trajectory)
        for path in files:
            tensors = path.with_suffix(".safetensors")
            try:
                with reading(f"state {path}"):
                    saved = load_json(path)
                    body = saved["body"]
                    if digest(body) != saved["sha256"]:
                        raise ValueError("its sha256 does not match")
                    check_sha256(tensors, body["tensors"])
                    check_format(body)
                    at = Progress(**body["at"])
                    if (body["identity"], at.trajectory) != (self.identity, trajectory):
                        raise ValueError("it is of another run or trajectory")
                return at, tensors
            except UserError as e:
                if path == files[-1]:
                    raise UserError(f"{e}; no other state of trajectory {trajectory} is whole: "
                                    f"start a new run, or delete {self.state}/{trajectory}-* to "
                                    "train it again") from None
                say(f"notice: {e}: going back to the one before", "stderr")
        return None

    def log_file(self, trajectory):
        """Where a trajectory's log goes. The first trajectory's is the run's; the others are
        appended to it at the end."""
        part = f"_trajectory{trajectory}" if trajectory else ""
        return self.folder / f"log{part}.txt"

    def open_log(self, trajectory, size=0):
        """The log of a trajectory, cut to its first `size` bytes: what followed comes again."""
        log = Log(self.log_file(trajectory), size, self.listeners)
        if not size and trajectory == 0:
            line = "=" * 100
            head = json.dumps(self.about, indent=1)
            log.text.write(f"{SOURCE}{line}\n{head}\n{self.plan}\n{line}\n")
        if self.edited:
            log.line("notice: from here on the script is another one (--allow-edited)")
        return log


# Processes --------------------------------------------------------------------------------------
# All ranks of a launch train one trajectory after the other. Trajectories do not communicate, so to
# train them side by side start several launches of one run, on one machine or many: each takes the
# next trajectory that nobody has done or holds, and who finishes the last one writes the result.

@dataclass(frozen=True)
class World:
    """The ranks of a launch. With one rank every exchange is the identity."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def leader(self):
        """Whether this rank writes the files."""
        return self.rank == 0

    def broadcast_object(self, value):
        """The leader's `value`, a small object, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast(self, *tensors):
        """Overwrite `tensors` with the leader's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def all_reduce(self, tensor):
        """Sum `tensor` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def largest(self, value):
        """The ranks' largest int. It is on the CPU: no device is waited for."""
        box = torch.tensor(value)
        if self.size > 1:
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def shard(self, units):
        """This rank's slice of `units` [n, ...], n a multiple of the size."""
        n = len(units) // self.size
        return units[self.rank * n:(self.rank + 1) * n]

    def reduce_scatter(self, units):
        """This rank's slice of the sum of `units` over the ranks."""
        if self.size == 1:
            return units
        out = torch.empty_like(self.shard(units))
        dist.reduce_scatter_single(out, units)
        return out

    def all_gather(self, own, whole):
        """Collect every rank's slice in `whole`, which may hold `own`."""
        if self.size > 1:
            dist.all_gather_single(whole, own.clone())
        elif own.data_ptr() != whole.data_ptr():
            whole.copy_(own)

    def agree(self, about):
        """Raise UserError where a rank's settings (a flat dict) differ from the leader's."""
        abouts = [about] * self.size
        if self.size > 1:
            dist.all_gather_object(abouts, about)
        first = abouts[0]
        for rank, other in enumerate(abouts):
            for key in first | other:
                if other.get(key) != first.get(key):
                    raise UserError(
                        f"rank {rank} differs from rank 0 in {key}: {other.get(key)}, not "
                        f"{first.get(key)}; start every process with the same flags and data")


SIGNALS = [number for number in signal.Signals  # of users, closed terminals and schedulers
           if number.name in "SIGTERM SIGINT SIGHUP SIGUSR1 SIGUSR2 SIGTSTP".split()]


class Stopped(Exception):
    """A signal asked the run to stop after the step; a second one kills."""
    signal = 0  # the one that was heard

    @classmethod
    def heard(cls, number, frame):
        cls.signal = number
        signal.signal(number, signal.SIG_DFL)
        say("stopping after this step; once more to stop at once", "stderr")


def suspend(number, frame):
    """Ctrl-Z: the time until the run continues does not count as hanging."""
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)


def reset_watchdog(minutes):
    """Restart the timer that ends a hanging run and shows the stack of every thread; 0: none."""
    if minutes and sys.__stderr__:
        faulthandler.dump_traceback_later(60 * minutes, exit=True, file=sys.__stderr__)


def check_divides(cfg, size):
    """Raise UserError where the micro-batches of a step do not divide over `size` processes."""
    unit = cfg.seq_len * cfg.micro_batch
    divides = math.gcd(cfg.batch_tokens // unit, cfg.edge_batch_tokens // unit)
    if divides % size:
        raise UserError(f"the micro-batches of a step do not divide over {size} processes: use a "
                        f"number that divides {divides} (1 does), or another --micro-batch")


def set_by_torchrun(name, alone):
    """A number in the environment; `alone` where there is none."""
    value = os.environ.get(name, str(alone))
    if not value.isdecimal():
        raise UserError(f"environment variable {name} is {value!r}, not a number: unset it")
    return int(value)


@contextlib.contextmanager
def set_up_world(cfg):
    """Yield the World of the processes that torchrun started, or of this one alone."""
    size = set_by_torchrun("WORLD_SIZE", 1)
    rank = set_by_torchrun("RANK", 0) if size > 1 else 0
    check_divides(cfg, size)
    device = torch.device(cfg.device)
    if cfg.device == "cuda":
        device = torch.device("cuda", set_by_torchrun("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
        # what a bf16 model multiplies in float32 are bf16 values: TF32's 11 bits hold their 8
        torch.backends.cuda.matmul.allow_tf32 = cfg.precision == "bfloat16"
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # keep freed memory: returning it to the system cost 3-9% of a step of tiny
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation through mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    world = World(rank, size, device)
    if size == 1:
        yield world
        return
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        say(f"rank {rank} waits for {size - 1} more processes: unset WORLD_SIZE if you meant one",
            "stderr")
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIME))
    except (ValueError, dist.DistError) as e:
        raise UserError(f"the other {size - 1} processes are not there: {one_line(e)}") from None
    # torchrun may keep its store over a restart, with the addresses of the processes before
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if cfg.device == "cuda" else "gloo"
    patience = datetime.timedelta(minutes=max(WARM_UP_MINUTES, cfg.hang_minutes))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    yield world
    dist.destroy_process_group()


# Log --------------------------------------------------------------------------------------------

def say(text, to="stdout"):
    """Print `text`; if that output is closed or full, the run goes on without it."""
    try:
        print(text, file=getattr(sys, to), flush=True)
    except (OSError, RuntimeError):  # or a signal came while another line was printed
        setattr(sys, to, open(os.devnull, "w"))


class Log:
    """log.txt of a run or of one of its trajectories, and the terminal."""
    def __init__(self, path, size=0, listeners=()):
        """Go on after the first `size` bytes."""
        self.listeners = listeners
        self.text = open(path, "a", encoding="utf-8", buffering=1)
        self.text.truncate(min(size, self.text.tell()))

    def position(self):
        """Bytes written so far; they are on the disk before the state that holds the number."""
        os.fsync(self.text.fileno())
        return self.text.tell()

    def line(self, text):
        self.text.write(text + "\n")
        say(text)

    def event(self, *flags, **pairs):
        """Write and show key:value pairs, and tell the listeners."""
        self.line(event_line(*flags, **pairs))
        for listener in self.listeners:
            listener.event(*flags, **pairs)


def ensembles(entry, key):
    """The events of a curve's entry: losses of all members so far, mixed in two ways."""
    n = entry["of"]
    yield {"members": n, "k": n, "prior": "uniform", key: entry["uniform"]}
    yield {"members": n, "k": n, "prior": "learned", key: entry["learned"], "gap": entry["gap"]}


def event_line(*flags, **pairs):
    return " ".join([*flags, *(f"{k}:{shown(k, v)}" for k, v in pairs.items())])


def shown(key, value):
    """A value as the log has it: a pair of numbers is a/b."""
    if isinstance(value, float):
        return f"{value:.5f}" if key.endswith(("loss", "gap")) else f"{value:.4g}"
    if isinstance(value, tuple):
        return f"{value[0]}/{value[1]}"
    return value


# Commands ---------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def config_parser(extra, preset):
    """A parser of the flags `extra` {names: options} and of one for each Config field; its help
    shows the defaults of `preset`."""
    p = Parser(prog="train_q0.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    for names, options in extra.items():
        p.add_argument(*names.split(), **options)
    defaults, why = resolve(Config(preset=preset, **PRESETS.get(preset, {})))
    kinds = {t.__name__: dict(type=t, metavar=t.__name__.upper()) for t in (int, float, str)}
    kinds["bool"] = dict(action=argparse.BooleanOptionalAction)
    for f in fields(Config):
        text = f.metadata["why"]
        if f.metadata["choices"]:
            text += f" ({', '.join(f.metadata['choices'])})"
        default = getattr(defaults, f.name)
        if f.name in why:
            default = f"derived: {default}"
        if f.name in GROUPS:
            group = p.add_argument_group(GROUPS[f.name])
        group.add_argument(flag(f.name), help=f"{text} [{default}]", **kinds[f.type.split(" ")[0]])
    return p


def suggestion(word, known):
    """Advice where `word` is nearly one of the `known`."""
    near = difflib.get_close_matches(word, known, 1, cutoff=0.75)
    return f"did you mean {near[0]}? " if near else ""


def parse_config(argv, extra={}):
    """Config from flags, defaults from the preset; `extra` are more flags {names: options}. Returns
    (cfg, reasons, namespace)."""
    words = f"--preset tiny {' '.join(argv)}"
    preset = re.findall(r"--preset[= ](\S+)", words)[-1]
    known, unknown = config_parser(extra, preset).parse_known_args(argv)
    if unknown:
        near = suggestion(unknown[0].split("=")[0], map(flag, vars(known)))
        raise UserError(f"unknown argument {unknown[0]}: {near}see --help")
    given = {k: v for k, v in vars(known).items() if v is not None and hasattr(Config, k)}
    reason = "given"
    if getattr(known, "resume", None) is not None:
        given = saved_config(known.resume) | given
    elif "preset" not in given:
        given["preset"], reason = default_preset(given)
    cfg, why = resolve(Config(**PRESETS.get(given["preset"], {}) | given))
    return cfg, {"preset": reason, **why}, known


def default_preset(given):
    """(preset, reason) of a run that names none; the larger ones need FineWeb."""
    if not torch.cuda.is_available() or given.get("device") in ("cpu", "mps"):
        return "tiny", "no GPU in use"
    if "data" in given:
        return "tiny", "--data is given"
    room = torch.cuda.get_device_properties(0).total_memory / 1e9
    preset = next(name for name, needed in NEEDS.items() if needed <= room)
    if preset != "tiny" and not (ROOT / PUBLISHED["data"] / "manifest.json").exists():
        return "tiny", "no FineWeb for a larger one: python data/prepare.py fineweb"
    return preset, f"the largest that fits the GPU's {room:.0f} GB"


def saved_config(run):
    """Settings of a run that is resumed, for the machine at hand."""
    path = find_run(run) / "run.json"
    machine_bound = {"device": "auto", "compile": None, "graphs": None, "attention": "auto"}
    with reading(path, "; start a new run"):
        return asdict(Config(**load_json(path)["config"] | machine_bound))


def find_data(cfg):
    folder = Path(cfg.data)
    return folder if folder.exists() else ROOT / folder


def find_run(name):
    for folder in (LOGS / name, Path(name)):
        if folder.is_dir():
            return folder
    raise UserError(f"no run {name} under {LOGS}: the command `runs` lists what there is")


def check_plain(option, name):
    """Raise UserError where `name` cannot be the name of a new run."""
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"{option} {name} must be a plain name: the run is written to logs/NAME")


def command_train(argv):
    """Train, or go on with a run, in as many processes as torchrun started."""
    cfg, why, args = parse_config(argv, {
        "--run --name": dict(
            metavar="NAME", help="name of the run under logs/ [the time]; launches of one name and "
            "the same flags share its trajectories; under torchrun say --name"),
        "--resume": dict(
            metavar="RUN", help="go on with a run that was stopped, with its own settings"),
        "--allow-edited": dict(
            action="store_true", help="go on though the script was edited since; the run cannot be "
            "a record"),
        "--track": dict(
            choices=["tensorboard", "wandb", "trackio"], help="draw its curves there, too"),
        "--profile": dict(
            action="store_true", help="time every operation of a few steps: a table, and a trace "
            "in the run's folder")})
    numbers = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores some
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)  # Python hears nothing while the ranks join
    with set_up_world(cfg) as world:
        for number in numbers:
            signal.signal(number, suspend if number.name == "SIGTSTP" else Stopped.heard)
        launch(cfg, why, args, world)


def launch(cfg, why, args, world):
    """Train trajectories of a run until none is left, then report."""
    if args.run is not None:
        check_plain("--run", args.run)
    listeners = ()
    if world.leader:
        try:
            from records import live
            listeners = live.begin(cfg, why, args)
        except ImportError as e:
            if cfg.teacher:
                raise UserError("--teacher needs records/ beside this script") from None
            say(f"notice: without records/ a launch only trains: {one_line(e)}", "stderr")
    now = datetime.datetime.now()
    name = args.resume or args.run or f"{now:%Y-%m-%d_%H-%M-%S_%f}"
    name = world.broadcast_object(name)  # the other ranks also wait for the data
    data = find_data(cfg)
    corpus = load_corpus(data, cfg.seq_len, cfg.train_tokens)
    if cfg.split_tokens:
        halves, corpus.hashes["tokenizer"] = halves_of(data, corpus.vocab_size)
        corpus = replace(
            corpus, split=cfg.split_tokens, halves=halves,
            split_epochs=cfg.epochs // cfg.trajectories // 2)
    population = None
    if cfg.teacher:
        from records.population import load_teacher
        population = load_teacher(cfg, corpus.vocab_size, world.device)
        corpus.hashes["teacher"] = population.digest
    identity = method_settings(cfg) | corpus.hashes
    world.agree(identity | {"train_q0.py": digest(SOURCE)})
    cycles = plan_cycles(cfg, corpus.train_sequences * cfg.seq_len)
    about = {"command": " ".join(sys.argv),
             "time": f"{now:%Y-%m-%dT%H:%M:%S}",
             "config": asdict(cfg), "data": {"name": corpus.name, **corpus.hashes},
             "script": digest(SOURCE)}
    folder = find_run(name) if args.resume else LOGS / name
    run = Run(folder, identity, sum(cycles, []), about, listeners)
    if world.leader:
        open_run(run, args.allow_edited)
    if world.broadcast_object((folder / "result.json").exists()):
        if world.leader:
            say(f"{name} is complete: {folder}")
        return
    for listener in listeners:
        listener.open(run, corpus, world)
    trainer = Trainer(cfg, corpus, world, run, population)
    try:
        for listener in listeners:
            listener.start(trainer)
        train(trainer, cycles)
        for listener in listeners:
            listener.finish(trainer)
    finally:
        run.release()
        for listener in listeners:
            listener.close()


def open_run(run, allow_edited):
    """Make a run's folder, or join the launches that share it. Raises UserError if it holds a run
    of other settings, other data or, without `allow_edited`, another script."""
    path = run.folder / "run.json"
    for part in ("state", "predictions"):
        (run.folder / part).mkdir(parents=True, exist_ok=True)
    with locked(run.state / "setup.lock"):
        if not path.exists():
            save_json(path, run.about)
    with reading(path):
        saved = load_json(path)
        identity = saved["config"] | saved["data"]
    differ = [k for k, v in run.identity.items() if identity.get(k) != v]
    run.edited = saved.get("script") != run.about["script"]
    if run.edited and not allow_edited and not differ:
        differ = ["the script (--allow-edited goes on; then it is no record)"]
    if differ:
        raise UserError(f"{run.folder} exists and differs in {', '.join(differ)}: give another "
                        "--run name, or the settings, data and script it began with")


def find_command(name):
    """The function of a command that does not train."""
    try:
        from records.commands import find
    except ModuleNotFoundError as e:
        raise UserError(f"{name} needs records/ beside this script: {e}") from None
    return find(name)


def main(argv=None):
    """Run the command that argv begins with, or train. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    rank = 0
    try:
        rank = set_by_torchrun("RANK", 0)
        named = argv and not argv[0].startswith("-")
        command = find_command(argv.pop(0)) if named else command_train
        return command(argv) or 0
    except (UserError, OSError) as e:
        if rank:
            time.sleep(2)  # a mistake that all ranks see is told by rank 0, whose end stops all
        whose = f"rank {rank}: " if rank else ""
        say(f"train_q0.py: error: {whose}{e}", "stderr")
        return 2
    except Stopped:
        say("stopped; its state is saved: go on with --resume and the run's name", "stderr")
        return 128 + Stopped.signal
    except Exception as e:
        full = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not full and "allocate memory" not in str(e):
            say(f"rank {rank} failed:", "stderr")  # a bug: let the traceback through
            raise
        say(f"train_q0.py: error: rank {rank} is out of memory: halve --micro-batch (plan shows "
              f"what a run needs): {one_line(e)}", "stderr")
        return 2


if __name__ == "__main__":
    # what lies in records/ imports this script, which may be a copy of another name
    sys.modules["train_q0"] = sys.modules["__main__"]
    sys.exit(main())
