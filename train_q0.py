"""q0: hyper-epoch pretraining in one file.

Text runs out before compute does, and one model stops gaining after about 16 epochs over it. q0 spends the same epochs
on a population: a cyclic schedule of learning rate and weight decay collects snapshots, each snapshot teaches the
next, and a prior fitted on held-out text mixes their predictions. Method: arXiv 2606.03938.

    python train_q0.py                                    laptop: default corpus, preset tiny
    python train_q0.py --preset small                     one GPU (after: python data/prepare.py fineweb)
    torchrun --nproc_per_node=8 train_q0.py --preset q0   one node, 8 GPUs
    python train_q0.py --resume RUN                       go on with a run that was stopped
    python train_q0.py plan --preset q0 --epochs 256      what a run would do, without running it
    python train_q0.py select RUN --k 4                   fit the prior again from a run's cached predictions
    python train_q0.py evaluate RUN --data SHARD          score a run's members and mixtures on other text, or --tasks
    python train_q0.py sample RUN --prompt "The"          text from the mixture, token by token
    python train_q0.py average RUN                        one model in its place: mean weights of its newest members
    python train_q0.py pool RUN RUN                       one population of several runs

Top to bottom: config, processes, data, model, loss, optimizer, schedule, population, prior, training loop, commands.
"""
from __future__ import annotations

from pathlib import Path
SOURCE = Path(__file__).read_text(encoding="utf-8")  # first: the log must hold the text that ran, not a later edit

import argparse, base64, contextlib, ctypes, datetime, difflib, faulthandler, functools, hashlib, json, math
import os, platform, shutil, signal, subprocess, sys, threading, time, traceback
from dataclasses import asdict, dataclass, field, fields, replace

try:
    import fcntl, resource
except ImportError:  # Windows: nothing keeps two processes from one run, and the peak of memory is not known
    fcntl = resource = None
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensor_file, save_file as save_tensors
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None
INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # asked inside a compiled step it breaks the graph

ROOT = Path(__file__).resolve().parent
LOGS = ROOT / "logs"
SPLITS = ("train", "heldout", "dev", "val")

class UserError(Exception):
    """A mistake the user can mend. Its text is one line: what is wrong, where, and what to do."""

@contextlib.contextmanager
def reading(what, advice=""):
    """Turn all that a missing, damaged or hostile file may raise into one line."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, UserError,
            SafetensorError) as e:
        reason = getattr(e, "strerror", None) or f"{type(e).__name__}: " * (not isinstance(e, UserError)) + str(e)
        raise UserError(f"{what} is missing or damaged: {' '.join(reason.split())[:200]}{advice}") from None

# Config: a knob is one line here; its flag, its check and its help text are made from that line ---
# What nobody ablates has no flag: the log of a run holds the script that ran.
ROTARY_BASE = 10_000
MOMENTUM = 0.95  # Muon's, Nesterov
LR_RESID = 0.00025  # peak lr of residual and skip scalars
LR_X0 = 0.025  # peak lr of x0 scalars
LR_MIXING = 0.02  # peak lr of head mixing and smear
COMPILE_EPOCHS = 22  # on a CPU torch.compile pays from this budget on
LAUNCH_BOUND = 150e6  # parameters in the blocks: a GPU waits for the launches of smaller models

def knob(default, why, low=0, high=1e37, choices=""):
    """A Config field: its default, what it is, inclusive bounds of a number, the words allowed."""
    rule = dict(why=why, low=low, high=high, choices=choices.split())
    return field(default=default, metadata=rule)

@dataclass(frozen=True)
class Config:
    """Every setting of a run, by default of the preset `tiny`. None and "auto": see `resolve`."""
    preset: str = knob("tiny", "settings and data; on a GPU q0", choices="tiny small q0")
    population: str = knob("q0", "kind of population", choices="q0 snapshots chain ensemble single")
    epochs: int = knob(16, "budget: epochs over the training text, all members together", low=1)
    trajectories: int | None = knob(None, "independent runs; they differ by seed alone", low=1)
    cycles: int | None = knob(None, "cycles per trajectory; each ends in one member", low=1)
    epochs_per_cycle: int | None = knob(
        None, "sets how many cycles the budget buys; a rest goes to the first", low=1)
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
        None, "best members of --teacher that teach; None: all that have weight", low=1)
    noise_first: float = knob(
        0.25, "noise at the first boundary, in standard deviations of the tensor")
    noise_last: float = knob(0.05, "noise at the last boundary")
    seed: int = knob(0, "initial weights, order, dropout and noise follow from it")
    # data
    data: str = knob("data/wiki", "folder of token shards with a manifest.json")
    train_tokens: int = knob(
        150_000, "whole training documents up to about this many tokens; 0: all of them")
    seq_len: int = knob(256, "tokens predicted per sequence", low=8, high=2 ** 15)
    batch_tokens: int = knob(2048, "tokens per step in the middle half of the cycles", low=1)
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
    smear: bool = knob(True, "adds a learned share of the token before to each embedding")
    induction: bool = knob(
        True, "half of the heads start out looking for what followed the same token")
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
        None, "of matrices, embedding, head; times lr and place in the cycle")
    lr_floor: float = knob(0.08, "lr multiplier that the cycle falls to", high=1)
    wd_start: float | None = knob(None, "decay multiplier at a cycle's start")
    wd_end: float | None = knob(None, "decay multiplier at a cycle's end")
    grad_clip: float = knob(1.0, "largest global gradient norm; 0: no clipping")
    # machine
    device: str = knob("auto", "auto takes the GPU where there is one", choices="auto cpu cuda")
    precision: str = knob(
        "auto", "of matrix products; weights are float32", choices="auto bfloat16 float32")
    compile: bool | None = knob(None, "torch.compile; derived: on a GPU, on a CPU for long runs")
    graphs: bool | None = knob(
        None, "replay CUDA graphs; derived: on for models that are launch bound, on a GPU")
    recompute: bool = knob(
        False, "recompute looped layers in the backward pass: less memory, more time")
    attention: str = knob("auto", "auto: the fastest", choices="auto flash3 flex matmul sdpa plain")
    save_minutes: float = knob(
        10, "between saves of the state that --resume goes on from; also at cycle ends")
    keep_members: int | None = knob(
        None, "newest members of a trajectory whose weights are kept; None: all", low=1)
    hang_minutes: float = knob(
        15, "a step that takes longer ends the run and shows where it hangs; 0: never")
    skip_nonfinite: bool = knob(
        False, "go on after a loss or gradient that is not finite; its update is left out")
    log_every: int = knob(10, "steps between logged lines (each one waits for the device)", low=1)

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                check_value(f, value)

GROUPS = {  # of --help: the first field of each
    "preset": "population", "data": "data", "layers": "model", "lr_matrix": "optimizer",
    "device": "machine"}
# settings that may change when a run goes on: rounding may, the method does not
MACHINE = ("device compile graphs recompute attention save_minutes keep_members hang_minutes "
           "skip_nonfinite log_every").split()

def check_value(f, value):
    """Raise UserError where `value` is not of the type, the choices or the range of field `f`."""
    said = f"{flag(f.name)} {value}"
    rule = f.metadata
    kind = {"int": int, "float": (int, float), "str": str, "bool": bool}[f.type.split(" ")[0]]
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{flag(f.name)} {value!r} is not of type {f.type}")
    if rule["choices"] and value not in rule["choices"]:
        raise UserError(f"{said} is not one of: {', '.join(rule['choices'])}")
    if kind is not str and not rule["low"] <= value <= rule["high"]:  # NaN is in no range
        raise UserError(f"{said} is out of range: {rule['low']} to {rule['high']:g}")

def flag(name):
    return "--" + name.replace("_", "-")

def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

def method_settings(cfg):
    return {k: v for k, v in asdict(cfg).items() if k not in MACHINE}

PUBLISHED = dict(  # the 1.87B run, in batches of 524,288 tokens: lr x decay sum to 2.2 in a cycle
    data="data/fineweb", train_tokens=0, mlp_hidden=None, lr_matrix=0.01, lr_head=0.0005,
    weight_decay=1.3, wd_start=0.7, wd_end=1.0, dropout=0.1, average=0.0, smear=False,
    induction=False)
PRESETS = {
    "tiny": {},
    "small": dict(
        PUBLISHED, seq_len=1024, batch_tokens=131_072, micro_batch=16, layers=12, width=768,
        value_embeds=False,
        weight_decay=0.325,  # a quarter: a cycle has four times the steps, and keeps its sum
        lr_head=0.0013),  # as 1 / width, which no run has tested
    "q0": dict(
        PUBLISHED, epochs=64, seq_len=2048, batch_tokens=524_288, edge_batch_tokens=393_216,
        micro_batch=2, layers=30, width=2048, head_dim=128, windows="SSSL", short_window=1025,
        unet=True, x0_mix=True, attn_gates=True, head_mixing=True, loop_first=15, loop_last=24,
        loop_passes=5, mtp_weight=0.3)}

# Recipes: of `tiny` measured (records/tuning/2026-11-26_equal_effort.md), of `q0` published
LENGTHS = {  # epochs: of a trajectory, a cycle, a member that starts afresh; before a teacher helps
    "tiny": dict(trajectory=32, cycle=4, member=8, untaught=8),
    "small": dict(trajectory=192, cycle=2, member=16, untaught=8),
    "q0": dict(trajectory=192, cycle=2, member=16, untaught=16)}
COLUMNS = "lr_matrix", "weight_decay", "wd_start", "wd_end", "dropout", "average"
AFRESH = {  # from so many epochs a member on; measured: up to 5, 8 and 16
    1: (0.03, 0.8, 1.2, 0.096, 0.0, 0.0),  # decay falls with lr
    6: (0.04, 1.2, 1.2, 0.096, 0.0, 0.25),
    12: (0.04, 0.8, 0.7, 1.0, 0.1, 0.25)}  # decay rises while lr falls, as published
RESTARTED = {  # from so many epochs in all on
    1: (0.03, 0.8, 1.2, 0.096, 0.0, 0.0),
    32: (0.03, 0.53, 1.2, 0.096, 0.1, 0.0)}
POPULATIONS = {  # weights at a cycle's start, weight of the teacher, settings
    "single": ("fresh", 0.0, AFRESH),
    "ensemble": ("fresh", 0.0, AFRESH),
    "chain": ("fresh", 0.45, AFRESH),
    "snapshots": ("continue", 0.0, RESTARTED),
    "q0": ("perturb", 0.45, RESTARTED)}

def allocate(cfg):
    """(trajectories, cycles) that the budget buys; where one is given, the other gets the rest."""
    length = LENGTHS[cfg.preset]
    per = cfg.epochs_per_cycle
    left = max(1, cfg.epochs // ((cfg.trajectories or 1) * (cfg.cycles or 1)))
    trajectories = 1
    member = length["member"]
    if cfg.population in ("q0", "snapshots"):
        member = length["cycle"]
        if not cfg.trajectories:
            trajectories = max(1, left // max(length["trajectory"], per or 1))
    each = left // trajectories
    many = 1  # below 6 epochs two are worse
    if per:
        many = max(1, each // per)
    elif each >= 6:
        many = max(2, (each + (member - 1) // 2) // member)  # the nearest number
    counts = {"single": (1, 1), "ensemble": (many, 1), "chain": (1, many)}
    wanted = counts.get(cfg.population, (trajectories, many))
    return cfg.trajectories or wanted[0], cfg.cycles or wanted[1]

def derive_budget(cfg):
    """(field, value, reason) of what the epochs buy. Raises UserError as `resolve` does."""
    J, C = allocate(cfg)
    each = cfg.epochs // (J * C)
    per = cfg.epochs_per_cycle or max(1, each)
    others = C if cfg.population == "ensemble" else J  # per * others: what one more would cost
    if each < per or (each > per and cfg.epochs - J * C * per >= per * others):
        raise UserError(f"--epochs {cfg.epochs} is not {J} trajectories x {C} cycles x {per} "
                        f"epochs: give --epochs {J * C * per} or leave one of them out")
    reason = f"population {cfg.population}, {cfg.epochs} epochs"
    yield "trajectories", J, reason
    yield "cycles", C, reason
    yield "epochs_per_cycle", each, "the budget shared evenly"

def derive_recipe(cfg):
    """What is tuned or published for the population."""
    boundary, weight, rows = POPULATIONS[cfg.population]
    yield "boundary", boundary, f"population {cfg.population}"
    yield "distill_weight", 0.45 if cfg.teacher else weight, "0.45 where anything teaches"
    members = cfg.trajectories * cfg.cycles
    untaught = LENGTHS[cfg.preset]["untaught"]
    after = 1 if cfg.population == "chain" else max(1, round(untaught * members / cfg.epochs))
    yield "distill_after", after, f"after {untaught} epochs; in a chain after one member"
    each = cfg.epochs // members
    epochs = each if rows is AFRESH else cfg.epochs
    row = rows[max(n for n in rows if n <= epochs)]
    for name, value in zip(COLUMNS, row):
        yield name, value, f"{cfg.population}, {each} epochs a member, {cfg.epochs} in all"

def derive_sizes(cfg):
    """What follows from other sizes, and the device."""
    yield "edge_batch_tokens", cfg.batch_tokens, "same as --batch-tokens"
    yield "short_window", cfg.seq_len // 2, "half of --seq-len"
    hidden = 256 * math.ceil(8 * cfg.width / 3 / 256)
    yield "mlp_hidden", hidden, "8/3 of the width, rounded up to 256"
    if torch.cuda.is_available():
        yield "device", "cuda", "a GPU is present"
    elif cfg.device == "cuda":
        raise UserError("--device cuda, but torch sees no GPU: install a CUDA build of torch or "
                        "use --device cpu")
    yield "device", "cpu", "no GPU"

def derive_machine(cfg):
    """What suits the device and the model."""
    gpu = cfg.device == "cuda"
    if gpu or torch.cpu._is_avx512_bf16_supported():
        yield "precision", "bfloat16", "supported here"
    yield "precision", "float32", "this CPU lacks bfloat16 instructions: slower"
    pays = gpu or (cfg.epochs >= COMPILE_EPOCHS and shutil.which("g++") is not None)
    yield "compile", pays, f"pays on a GPU; with g++ on a CPU from {COMPILE_EPOCHS} epochs on"
    parameters = cfg.layers * cfg.width * (4 * cfg.width + 3 * cfg.mlp_hidden)
    small = gpu and parameters < LAUNCH_BOUND
    yield "graphs", small, f"on a GPU with fewer than {LAUNCH_BOUND:.3g} parameters in blocks"

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

# Processes: a group of ranks trains each trajectory where they divide; only the prior joins them ----------------------
SUM_SHARDS = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # name of torch 2.13, of 2.11
GATHER_SHARDS = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

@dataclass(frozen=True)
class World:
    """The ranks that train one trajectory together. With size 1 every exchange is the identity."""
    rank: int = 0  # within the group
    size: int = 1
    device: torch.device = torch.device("cpu")
    group: object = None  # its process group
    groups: int = 1  # that train side by side
    index: int = 0  # of this one
    joined: object = None  # a patient process group of all ranks
    host: object = None  # a process group of CPUs, of the same ranks as `group`
    watch: object = None

    leader = property(lambda self: self.rank == 0)  # it writes the group's members and log
    first = property(lambda self: self.rank == 0 and self.index == 0)  # rank 0 of all

    def from_first(self, value, leader=False):
        """Rank 0's `value` (a small object), or the group's leader's, on every rank; waits as long as it takes."""
        box, source, group = [value], *((self.index * self.size, self.host) if leader else (0, self.joined))
        if group is not None:
            dist.broadcast_object_list(box, src=source, group=group)
        return box[0]

    def sum_(self, tensor):
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)

    def largest(self, value):
        """The largest `value` (an int) of the group's ranks; no device is waited for."""
        box = torch.tensor(value)
        if self.size > 1:
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.host)
        return int(box)

    def shard(self, units):
        """This rank's share of `units` [n, ...], n a multiple of the size."""
        n = len(units) // self.size
        return units[self.rank * n:(self.rank + 1) * n]

    def reduce_scatter(self, units):
        """Start to sum `units` over the ranks; the function returned waits and gives this rank's share."""
        if self.size == 1:
            return lambda: units
        out = torch.empty_like(self.shard(units))
        work = SUM_SHARDS(out, units, group=self.group, async_op=True)
        return lambda: (work.wait(), out)[1]

    def all_gather(self, share):
        """Start to collect every rank's share; the function returned waits and gives the whole."""
        if self.size == 1:
            return lambda: share
        out = share.new_empty(self.size * len(share), *share.shape[1:])
        work = GATHER_SHARDS(out, share.contiguous(), group=self.group, async_op=True)
        return lambda: (work.wait(), out)[1]

    def same_(self, *tensors):
        """Overwrite `tensors` with the leader's, on every rank of the group."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, src=self.index * self.size, group=self.group)

    def collect(self, array, about):
        """On rank 0, after the slowest: the leaders' arrays, joined, and all ranks' `about`; elsewhere (None, None)."""
        if self.groups == 1:
            return (array, [about]) if self.leader else (None, None)
        self.watch.word, abouts = "idle", [None] * self.size * self.groups if self.first else None
        dist.gather_object(about, abouts, dst=0, group=self.joined)
        if not self.first:
            if self.leader:
                dist.send(torch.from_numpy(array), dst=0, group=self.joined)
            return None, None
        parts = [torch.from_numpy(array), *(torch.empty(array.shape) for _ in range(1, self.groups))]
        for index, part in enumerate(parts[1:], 1):
            dist.recv(part, src=index * self.size, group=self.joined)
        return torch.cat(parts).numpy(), abouts

    def agree(self, about):
        """Raise UserError where a rank's settings (a flat dict) differ from rank 0's."""
        if self.size * self.groups > 1:
            all_about = [None] * (self.size * self.groups)
            dist.all_gather_object(all_about, about, group=self.joined)
            for rank, other in enumerate(all_about):
                if bad := [k for k in {**about, **other} if other.get(k) != all_about[0].get(k)]:
                    raise UserError(f"rank {rank} differs from rank 0 in {bad[0]}: {other.get(bad[0])}, not "
                                    f"{all_about[0].get(bad[0])}; start every process with the same flags and data")

class Stopped(Exception):
    """SIGTERM or Ctrl-C asked the run to stop at the next step, and its state is saved; a second signal kills."""
    signal = 0  # that was heard

    @classmethod
    def heard(cls, number, frame):
        cls.signal = number
        signal.signal(number, signal.SIG_DFL)
        print("stopping after this step; once more to stop at once", file=sys.stderr)

class Watch(threading.Thread):
    """Trajectories share no collective, so rank 0 hears each rank once a second and answers all: one that fails or is
    silent ends all others within the minute, which show its traceback; one that is asked to stop makes all stop."""
    def __init__(self, rank, size):
        super().__init__(daemon=True)
        # rank 0 gives up on a silent rank before the others give up on rank 0
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=20 if rank == 0 else 45))
        self.rank, self.others = rank, range(1, size)
        self.word = ""  # then "idle": waits for other trajectories, "done", "stopped", or what went wrong
        self.start()

    def send(self, word, to):
        text = np.frombuffer(word.encode()[-4096:].ljust(4096, b"\0"), dtype=np.uint8)  # one size: one message
        with contextlib.suppress(RuntimeError):  # where that rank is gone, which `receive` tells
            dist.send(torch.from_numpy(text.copy()), dst=to, group=self.group)

    def receive(self, rank):
        text = torch.empty(4096, dtype=torch.uint8)
        try:
            dist.recv(text, src=rank, group=self.group)
        except RuntimeError as e:
            return f"rank {rank} ended without a word, or its machine did ({' '.join(str(e).split())[:200]})"
        return text.numpy().tobytes().rstrip(b"\0").decode(errors="replace")

    @staticmethod
    def verdict(words):
        """What rank 0 answers to the words of all ranks: "" and "stop" go on, anything else ends them all."""
        failed = [w for w in words if w not in ("", "idle", "stop", "stopped", "done")]
        if failed or set(words) == {"done"}:
            return (failed or words)[0]
        if {"stop", "stopped"} & set(words):
            return "stop" if {"", "stop"} & set(words) else "stopped"
        return ""

    def run(self):
        answer = ""
        while answer in ("", "stop"):
            word = self.word or "stop" * bool(Stopped.signal)
            if self.rank:
                self.send(word, 0)
                answer = self.receive(0)
            else:
                time.sleep(1)
                answer = self.verdict([word, *map(self.receive, self.others)])
                for rank in self.others:
                    self.send(answer, rank)
            if answer == "stop" and not Stopped.signal:
                Stopped.signal = signal.SIGTERM
        if answer != "done" and self.word in ("", "idle", "done") or answer == "stopped" and self.word == "idle":
            print(answer, file=sys.stderr)
            time.sleep(5)  # its own end comes first, so that torchrun names it as the root cause
            os._exit(1)  # the main thread may wait in a collective that will never end

    def finish(self, word):
        """Say the last word: "done" and "stopped" wait for all ranks, anything else for its delivery."""
        self.word = word
        self.join(None if word in ("done", "stopped") else 60)

@contextlib.contextmanager
def set_up_world(cfg):
    """Context of the processes that torchrun started, or of one; leaving it waits for the slowest trajectory."""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device(cfg.device, local) if cfg.device == "cuda" else torch.device("cpu")
    if cfg.device == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True  # exact for products of bf16 members: 8 bits of mantissa fit in 11
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # keep freed memory: returning it to the system after every tensor cost 3-9% of tiny's step
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation through mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    groups_of = lambda n: cfg.trajectories if n % cfg.trajectories == 0 else 1
    batches = {batch // (cfg.seq_len * cfg.micro_batch) for batch in (cfg.batch_tokens, cfg.edge_batch_tokens)}
    divides = lambda n: all(batch % (n // groups_of(n)) == 0 for batch in batches)
    if not divides(size):
        valid = [n for n in range(1, cfg.trajectories * min(batches) + 1) if divides(n)]
        raise UserError(f"{max(batches)} micro-batches a step do not divide over {size} processes: use "
                        f"{', '.join(map(str, valid))} processes or another --micro-batch")
    if size == 1:
        yield World(device=device)
        return
    # a store that torchrun keeps over a restart still holds the addresses of the processes before
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), next(dist.rendezvous("env://"))[0])
    dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    watch = Watch(rank, size)
    try:
        joined = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))  # trajectories may end far apart
        World(size=size, joined=joined).agree({**method_settings(cfg), "train_q0.py": digest(SOURCE)})
        groups, each = groups_of(size), size // groups_of(size)
        parts, hosts = ([dist.new_group(range(g * each, (g + 1) * each), backend=b) for g in range(groups)]
                        for b in (None, "gloo"))
        index = rank // each
        yield World(rank % each, each, device, parts[index], groups, index, joined, hosts[index], watch)
    except BaseException as e:
        told = str(e) if isinstance(e, UserError) else traceback.format_exc()
        watch.finish("stopped" if isinstance(e, Stopped) else f"rank {rank} failed: {told}")
        raise
    watch.finish("done")
    dist.destroy_process_group()

# Data: shards of uint16 tokens, split by whole documents; order is a pure function of (seed, trajectory, epoch) -------
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256

def seed_of(*key):
    """A 63-bit seed that is a pure function of `key`; all randomness comes from here, so none is ever stored."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1

def read_shard(path, vocab_size, sha256=None):
    """Tokens of one shard, uint16 [n]. Raises UserError for a file that is missing, damaged or of another kind."""
    with reading(f"shard {path}", "; prepare the data again (python data/prepare.py)"):
        with open(path, "rb") as f:
            header, size = np.frombuffer(f.read(4 * SHARD_HEADER), dtype="<i4"), os.fstat(f.fileno()).st_size
            if header[:2].tolist() != (kind := [SHARD_MAGIC, SHARD_VERSION]) or len(header) < SHARD_HEADER:
                raise ValueError(f"it is not a token shard: its first numbers are {header[:2].tolist()}, not {kind}")
            if size != 4 * SHARD_HEADER + 2 * int(header[2]):  # before anything is allocated
                raise ValueError(f"{size} bytes are too many or too few for {header[2]} tokens")
            tokens = np.frombuffer(f.read(), dtype="<u2")
        if sha256 is not None and sha256_of(path) != sha256:
            raise ValueError("its sha256 is not the manifest's")
        if len(tokens) and tokens.max() >= vocab_size:
            raise ValueError(f"it holds token {tokens.max()}, beyond the vocabulary of {vocab_size}")
    return tokens

@dataclass(frozen=True, eq=False)
class Corpus:
    """The four splits as token arrays, and the documents of the training part."""
    name: str
    vocab_size: int
    splits: dict  # split -> uint16 [n]
    hashes: dict  # shard file -> sha256
    documents: tuple  # of uint16 arrays: the training documents in file order
    seq_len: int

    @functools.cached_property
    def train_sequences(self):
        """Sequences of seq_len + 1 tokens in one epoch (the same every epoch: the tail is dropped)."""
        return sum(map(len, self.documents)) // (self.seq_len + 1)

    def eval_sequences(self, split):
        """[n, seq_len + 1]: file order, consecutive, non-overlapping, tail dropped."""
        n = len(self.splits[split]) // (self.seq_len + 1)
        return self.splits[split][:n * (self.seq_len + 1)].reshape(n, -1)

    @functools.lru_cache(maxsize=2)  # two: a batch may straddle an epoch's end
    def epoch(self, seed, trajectory, epoch):
        """[train_sequences, seq_len + 1]: documents shuffled, joined, cut into sequences, sequences shuffled."""
        rng = np.random.default_rng(seed_of("order", seed, trajectory, epoch))
        stream = np.concatenate([self.documents[i] for i in rng.permutation(len(self.documents))])
        n = self.train_sequences
        return stream[:n * (self.seq_len + 1)].reshape(n, -1)[rng.permutation(n)]

    def batch(self, seed, trajectory, first, count):
        """Sequences first .. first+count-1 of a trajectory's endless stream of epochs, int64 [count, seq_len + 1]."""
        n = self.train_sequences
        rows = [self.epoch(seed, trajectory, i // n)[i % n] for i in range(first, first + count)]
        return np.stack(rows).astype(np.int64)

def load_corpus(folder, seq_len, train_tokens):
    """Read and check a prepared corpus. Raises UserError for anything missing, damaged or too small."""
    with reading(folder / "manifest.json", "; prepare the data first (python data/prepare.py wiki, or fineweb)"):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        vocab_size, eot, name = int(manifest["vocab_size"]), int(manifest["eot"]), str(manifest["name"])
        files = {s: [(f["name"], f["sha256"]) for f in manifest["splits"][s]["files"]] for s in SPLITS}
        listed = sum(files.values(), [])
        if not all(files.values()) or not all(isinstance(h, str) and Path(f).name == f for f, h in listed):
            raise ValueError("every split must list plain file names in its own folder, with hashes")
    splits = {s: np.concatenate([read_shard(folder / f, vocab_size, h) for f, h in fs]) for s, fs in files.items()}
    train = splits["train"]
    if train_tokens > len(train):
        raise UserError(f"--train-tokens {train_tokens} is more than the {len(train)} training tokens of {folder}")
    documents = [d for d in np.split(train, np.flatnonzero(train == eot)) if len(d)]
    if train_tokens:  # whole documents, up to and including the one that reaches the target
        documents = documents[:np.searchsorted(np.cumsum([len(d) for d in documents]), train_tokens) + 1]
        splits["train"] = train[:sum(map(len, documents))]
    for s, text in splits.items():
        if len(text) < seq_len + 1:
            raise UserError(f"split {s} of {folder} has {len(text)} tokens, fewer than {seq_len + 1}: lower --seq-len")
    return Corpus(name, vocab_size, splits, dict(listed), tuple(documents), seq_len)

# Model: shapes are B batch, T sequence, H heads, K head channels, D width, V vocabulary -------------------------------
ATTN_GATE_CHANNELS, VALUE_GATE_CHANNELS = 12, 32

def param(*shape, when=True):
    """A parameter that `init_weights` fills, or None where its feature is off."""
    return nn.Parameter(torch.empty(shape)) if when else None

norm = lambda x: F.rms_norm(x, (x.size(-1),), eps=1e-6)
linear = lambda x, weight: F.linear(x, weight.to(x.dtype))
shifted = lambda x: F.pad(x[:, :-1], (0, 0) * (x.ndim - 2) + (1, 0))  # x [B, T, ...] of the token before; zeros first

def rotate(x, cos, sin):
    """Rotary position embedding of x [B, T, H, K]; cos, sin [T, 1, K/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

def plain_attention(q, k, v, window, mask=None):
    """Causal attention over the last `window` tokens as one reads it, [B, T, H, K] each; the kernels must agree."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.size(-1) ** -0.5
    seen = torch.ones_like(scores, dtype=torch.bool).tril().triu(1 - window)
    return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~seen, -math.inf).softmax(-1), v)

def sdpa_attention(q, k, v, window, mask=None):
    """torch's scaled_dot_product_attention; `mask` bool [T, T] where the window is shorter than the sequence."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)

def matmul_attention(cfg, device):
    """Two batched products and a softmax: on a CPU faster than SDPA up to 1,024 tokens, beyond which [T, T] grows."""
    T, dtype = cfg.seq_len, getattr(torch, cfg.precision)  # the masks are made once
    seen = {w: torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - w) for w in {T, *layer_windows(cfg)}}
    biases = {w: torch.zeros(T, T, dtype=dtype, device=device).masked_fill_(~x, -math.inf) for w, x in seen.items()}
    def attend(q, k, v, window, mask=None):
        B, T, H, K = q.shape
        q, k, v = (x.transpose(1, 2).reshape(B * H, T, K) for x in (q, k, v))
        p = torch.baddbmm(biases[window][:T, :T].to(q), q, k.mT, alpha=K ** -0.5).softmax(-1)
        return (p @ v).view(B, H, T, K).transpose(1, 2)
    return attend

def flex_attention(cfg, device):
    """torch's FlexAttention, which skips the blocks outside a window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    T, compiled = cfg.seq_len, torch.compile(flex_attention, dynamic=False)
    visible = lambda window: lambda b, h, q, k: (q >= k) & (q - k < window)
    masks = {w: create_block_mask(visible(w), None, None, T, T, device) for w in {T, *layer_windows(cfg)}}
    def attend(q, k, v, window, mask=None):
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=masks[window]).transpose(1, 2)
    return attend

def flash3_attention(cfg, device):
    """FlashAttention-3 through the `kernels` package, from its cache alone."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: training never downloads
    from kernels import get_kernel
    flash = get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func
    def attend(q, k, v, window, mask=None):
        out = flash(q, k, v, causal=True, window_size=(-1, -1) if window >= q.size(1) else (window - 1, 0))
        return out[0] if isinstance(out, tuple) else out
    return attend

ATTENTION = {"flash3": flash3_attention, "flex": flex_attention, "matmul": matmul_attention,
             "sdpa": lambda cfg, device: sdpa_attention, "plain": lambda cfg, device: plain_attention}

def check_attention(attend, cfg, device):
    """Compare one forward and backward pass with plain_attention. Raises ArithmeticError where they differ."""
    g = torch.Generator().manual_seed(0)
    q, k, v, d = torch.randn(4, 1, cfg.seq_len, 2, cfg.head_dim, generator=g).to(device, getattr(torch, cfg.precision))
    for window in {cfg.seq_len, *layer_windows(cfg)}:
        found = []
        for function, to in ((attend, q.dtype), (plain_attention, torch.float32)):
            inputs = [x.to(to).requires_grad_() for x in (q, k, v)]
            out = function(*inputs, window, window_mask(cfg.seq_len, window, device))
            found.append([out, *torch.autograd.grad(out, inputs, d.to(to))])
        for x, y in zip(*found):  # bfloat16 keeps 8 bits: rounding p and ds gives up to 1%, a wrong window 50% and more
            if not (x.float() - y).norm() <= 0.05 * y.norm():
                raise ArithmeticError(f"it disagrees with plain attention, window {window}")

def attention_names(cfg, device_type):
    """Kernels to try, the fastest first: on a CPU as measured (records/tuning), on a GPU as expected."""
    by_speed = {"cuda": ["flash3", "flex", "sdpa"], "cpu": ["matmul"] * (cfg.seq_len <= 1024) + ["sdpa"]}
    return by_speed[device_type] if cfg.attention == "auto" else [cfg.attention]

def choose_attention(cfg, device):
    """(name, function) of --attention, or of the fastest kernel that works. Says loudly what it falls back from."""
    for name in attention_names(cfg, device.type):
        try:
            attend = ATTENTION[name](cfg, device)
            # flex compiles itself; others run inside the compiled model, where a foreign kernel may fail by itself
            check_attention(torch.compile(attend) if cfg.compile and name == "flash3" else attend, cfg, device)
            return name, attend
        except Exception as e:  # a kernel that does not fit the machine may fail in any way
            problem = f"attention kernel {name} does not work: {type(e).__name__}: {' '.join(str(e).split())[:150]}"
            print(f"notice: {problem}; trying the next", file=sys.stderr)
    raise UserError(f"{problem}; give another --attention")

def window_mask(T, window, device=None):
    """[T, T], True where a query sees a key; None where all earlier tokens are seen."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - window) if window < T else None

def layer_windows(cfg):
    """Attention window of each layer in tokens, the own one included."""
    pattern = [cfg.windows[i % len(cfg.windows)] for i in range(cfg.layers - 1)] + ["L"]
    return [cfg.seq_len if w == "L" else min(cfg.short_window, cfg.seq_len) for w in pattern]

def has_value_embed(cfg, i):
    """Whether layer i adds a value embedding: every second layer, the last one included."""
    return cfg.value_embeds and i % 2 == (cfg.layers - 1) % 2

def layer_order(cfg):
    """Indices of the blocks in the order they run, replays of looped layers included."""
    order, end = list(range(cfg.layers)), cfg.loop_last + 1
    return order[:end] + order[cfg.loop_first:end] * (cfg.loop_passes - 1) + order[end:]

class Attention(nn.Module):
    def __init__(self, cfg, value_embed):
        super().__init__()
        D, H = cfg.width, cfg.width // cfg.head_dim
        self.heads, self.qkv, self.out = H, param(3, D, D), param(D, D)
        self.local = H // 2 if cfg.induction else H  # the other heads are for induction
        self.mixing = param(3, H, H, when=cfg.head_mixing)
        self.gate = param(H, ATTN_GATE_CHANNELS, when=cfg.attn_gates)
        self.value = param(D, D, when=value_embed)
        self.value_gate = param(H, VALUE_GATE_CHANNELS, when=value_embed)

    def forward(self, x, x0, cos, sin, attend):
        (B, T, D), H, qkv = x.shape, self.heads, self.qkv
        if self.mixing is not None:  # mixing heads of the output = mixing rows of the projection
            qkv = torch.einsum("sgh,shkd->sgkd", self.mixing, qkv.view(3, H, D // H, D))
        q, k, v = linear(x, qkv.reshape(3 * D, D)).view(B, T, 3, H, D // H).unbind(2)
        if self.value is not None:
            gate = 2 * torch.sigmoid(linear(x[..., :VALUE_GATE_CHANNELS], self.value_gate))
            v = v + gate.unsqueeze(-1) * linear(x0, self.value).view(B, T, H, D // H)
        q, k, own = norm(q), norm(k), self.local
        turned = (rotate(z[:, :, :own], cos, sin) for z in (q, k))
        if own < H:  # a key is that of the token before and does not rotate: found by content, at any distance
            turned = (torch.cat(z, dim=2) for z in zip(turned, (q[:, :, own:], shifted(k[:, :, own:]))))
        y = attend(*turned, v)
        if self.gate is not None:
            y = y * torch.sigmoid(linear(x[..., :ATTN_GATE_CHANNELS], self.gate)).unsqueeze(-1)
        return linear(y.reshape(B, T, D), self.out)

class Block(nn.Module):
    def __init__(self, cfg, value_embed=False):
        super().__init__()
        self.attn, self.dropout = Attention(cfg, value_embed), cfg.dropout
        self.gate_up, self.down = param(2, cfg.mlp_hidden, cfg.width), param(cfg.width, cfg.mlp_hidden)

    def forward(self, x, x0, cos, sin, attend):
        x = x + F.dropout(self.attn(norm(x), x0, cos, sin, attend), self.dropout, self.training)
        gate, up = linear(norm(x), self.gate_up.flatten(0, 1)).chunk(2, dim=-1)
        return x + F.dropout(linear(F.silu(gate) * up, self.down), self.dropout, self.training)

class GPT(nn.Module):
    """Maps tokens to normed hidden states; the head is applied inside the loss, in chunks."""
    def __init__(self, cfg, vocab_size):
        super().__init__()
        n, D, padded = cfg.layers, cfg.width, 64 * math.ceil(vocab_size / 64)
        self.cfg, self.vocab_size = cfg, vocab_size
        self.embed, self.head = param(padded, D), param(padded, D)
        self.blocks = nn.ModuleList(Block(cfg, has_value_embed(cfg, i)) for i in range(n))
        self.resid_scale, self.x0_scale = param(n, when=cfg.x0_mix), param(n, when=cfg.x0_mix)
        self.skip_scale, self.mtp_proj = param(n // 2, when=cfg.unet and n > 1), param(D, 2 * D, when=cfg.mtp_weight)
        self.mtp_block, self.smear = Block(cfg) if cfg.mtp_weight else None, param(D, when=cfg.smear)
        self.order, self.windows, self.dtype = layer_order(cfg), layer_windows(cfg), getattr(torch, cfg.precision)
        T = torch.arange(cfg.seq_len)
        angle = T[:, None, None] / ROTARY_BASE ** (torch.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        self.register_buffer("cos", angle.cos().to(self.dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(self.dtype), persistent=False)
        self.register_buffer("short_mask", window_mask(cfg.seq_len, min(self.windows)), persistent=False)
        self.attend = sdpa_attention

    @torch.no_grad()
    def init_weights(self, *key):
        """Fill every parameter; a pure function of `key` and the parameter's name, on any device."""
        bound, small = math.sqrt(3 / self.cfg.width), self.cfg.width ** -0.5
        normal = {"embed": 1.0, "head": 0.001, "out": small, "down": small}
        for name, p in self.named_parameters():
            kind, draw = name.rsplit(".", 1)[-1], torch.empty(p.shape)
            g = torch.Generator().manual_seed(seed_of("init", *key, name))
            if kind in normal:
                draw.normal_(0, normal[kind], generator=g)
            elif kind in ("qkv", "gate_up", "value", "mtp_proj"):
                draw.uniform_(-bound, bound, generator=g)
                if kind == "qkv" and self.cfg.induction:  # the same token matches before anything is learned
                    first = self.blocks[0].attn.local * self.cfg.head_dim
                    draw[1, first:] = draw[0, first:]
            elif kind == "mixing":
                draw.copy_(torch.eye(p.size(-1)).expand_as(draw))
            else:
                draw.fill_({"resid_scale": 1, "skip_scale": 1, "x0_scale": 0.1}.get(kind, 0))  # gates, smear
            p.copy_(draw)
        return self

    def forward(self, tokens, targets=None):
        """tokens [B, T] -> hidden [B, T, D]; with targets (the next tokens) also the multi-token block's, or None."""
        T, n = tokens.size(1), self.cfg.layers
        cos, sin, outputs = self.cos[:T], self.sin[:T], {}
        short = None if self.short_mask is None else self.short_mask[:T, :T]
        attend = {w: functools.partial(self.attend, window=w, mask=None if w == self.cfg.seq_len else short)
                  for w in {self.cfg.seq_len, *self.windows}}
        x = x0 = norm(F.embedding(tokens, self.embed).to(self.dtype))
        if self.smear is not None:
            x = x0 = norm(x + self.smear.to(x.dtype) * shifted(x))
        for i in self.order:
            if self.skip_scale is not None and i >= n - n // 2:
                x = x + self.skip_scale[i - (n - n // 2)].to(x.dtype) * outputs[n - 1 - i]
            if self.resid_scale is not None:
                x = self.resid_scale[i].to(x.dtype) * x + self.x0_scale[i].to(x.dtype) * x0
            x = self.blocks[i](x, x0, cos, sin, attend[self.windows[i]])
            outputs[i] = x
        x = norm(x)
        if targets is None or self.mtp_proj is None:
            return x, None
        ahead = torch.cat((x, norm(F.embedding(targets, self.embed).to(x.dtype))), dim=-1)
        return x, norm(self.mtp_block(linear(ahead, self.mtp_proj), x0, cos, sin, attend[self.cfg.seq_len]))

# Loss: (1 - a) CE + a T^2 KL(teacher || student) on soft-capped logits, never all logits at once ----------------------
CHUNK_LOGITS = 2 ** 24  # logits of a matrix product: each adds once to the gradient of the whole head
PIECE_LOGITS = 2 ** 20  # of these in float32 at a time, near the caches, where there is no kernel
GPU_CHUNK_LOGITS = 2 ** 28  # with the kernel, in place: 512 MB in bf16, as much for a teacher; large products are fast
LOSS_BLOCK = 2048  # logits at a time: 8 in each of 256 threads, so bf16 is loaded 16 bytes at once; no spills

@functools.cache
def use_triton(device_type):
    """Whether tensors there go through the Triton kernels: on a GPU, or on a CPU under Triton's interpreter (tests)."""
    if triton is None and device_type == "cuda":  # never silently
        print("notice: triton is not installed, so loss and Muon are slower: pip install triton", file=sys.stderr)
    return triton is not None and (device_type == "cuda" or INTERPRETED)

if triton is not None:
    @triton.jit
    def capped_block(z, cols, V, width, softcap):
        x = tl.load(z + cols, mask=cols < width, other=0.0).to(tl.float32)  # < V would forbid loads of 16 bytes
        return tl.where(cols < V, softcap * (2 * tl.sigmoid(x * (2 / softcap)) - 1), float("-inf"))

    @triton.jit
    def loss_kernel(z, teacher, targets, scales, out, V, width, softcap, weight, T,
                    TEACHER: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr):
        """One row: (loss, cross-entropy) to `out`; with GRAD its gradient replaces z. Columns from V on are padding."""
        row = tl.program_id(0).to(tl.int64)
        z += row * width
        teacher += row * width
        target, cold = tl.maximum(tl.load(targets + row), 0), 1 / T  # an ignored row has scale 0
        x_target = tl.load(z + target).to(tl.float32)  # here, because below other threads may overwrite it
        top, top_p = float("-inf"), float("-inf")  # running maxima; the sums below are relative to them
        sum_1 = tl.zeros([BLOCK], tl.float32)  # of exp(x): q
        sum_T, sum_p, dot = sum_1, sum_1, sum_1  # of exp(x / T): q^(T); of exp(y / T): p; of p (y - x) / T
        for start in range(0, V, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = capped_block(z, cols, V, width, softcap)
            new = tl.maximum(top, tl.max(x, 0))
            sum_1 = sum_1 * tl.exp(top - new) + tl.exp(x - new)
            if TEACHER:
                sum_T = sum_T * tl.exp((top - new) * cold) + tl.exp((x - new) * cold)
                y = capped_block(teacher, cols, V, width, softcap)
                new_p = tl.maximum(top_p, tl.max(y, 0))
                shrink, p = tl.exp((top_p - new_p) * cold), tl.exp((y - new_p) * cold)
                sum_p = sum_p * shrink + p
                dot = dot * shrink + tl.where(cols < V, p * (y - x) * cold, 0.0)
                top_p = new_p
            top = new
        log_1 = top + tl.log(tl.sum(sum_1, 0))
        ce = log_1 - softcap * (2 * tl.sigmoid(x_target * (2 / softcap)) - 1)
        loss, log_T, log_p = ce, log_1, log_1
        if TEACHER:
            log_T, log_p = top * cold + tl.log(tl.sum(sum_T, 0)), top_p * cold + tl.log(tl.sum(sum_p, 0))
            loss = (1 - weight) * ce + weight * T * T * (tl.sum(dot, 0) / tl.sum(sum_p, 0) - log_p + log_T)
        tl.store(out + 2 * row, loss)
        tl.store(out + 2 * row + 1, ce)
        if GRAD:
            scale = tl.load(scales + row)
            for start in range(0, width, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                x = capped_block(z, cols, V, width, softcap)
                d = tl.exp(x - log_1) - tl.where(cols == target, 1.0, 0.0)
                if TEACHER:
                    y = capped_block(teacher, cols, V, width, softcap)
                    d = (1 - weight) * d + weight * T * (tl.exp(x * cold - log_T) - tl.exp(y * cold - log_p))
                d = tl.where(cols < V, d * (1 - x * x * (1 / (softcap * softcap))) * scale, 0.0)
                tl.store(z + cols, d.to(z.dtype.element_ty), mask=cols < width)

def padded(head):
    """With zero rows for the kernel: where a row of logits starts at an odd place, products and loads are slow."""
    return F.pad(head, (0, 0, 0, -len(head) % 64)) if use_triton(head.device.type) else head

def chunk_rows(head):
    """How many rows of logits are held at a time."""
    return max(1, (GPU_CHUNK_LOGITS if head.is_cuda and use_triton("cuda") else CHUNK_LOGITS) // len(head))

def soft_capped(z, softcap):
    """Raw logits z to soft-capped ones in float32, which overwrite float32 z; by sigmoid, 4x faster on a CPU."""
    return z.float().mul_(2 / softcap).sigmoid_().mul_(2 * softcap).sub_(softcap)

def plain_loss(hidden, head, targets, softcap, teacher=(), weight=0.0, temperature=1.0):
    """The loss as one reads it; ChunkedLoss must agree. hidden [N, D], head [V, D], targets [N] (-1: ignored); teacher
    is the mixture of [(share, hidden [N, D'], head [V, D']), ...]. Returns (loss, cross-entropy) in nats per token."""
    cap = lambda h, w: softcap * torch.tanh(h @ w.T / softcap)
    logits = cap(hidden, head)
    ce = F.cross_entropy(logits, targets, ignore_index=-1)
    if not teacher:
        return ce, ce
    p = sum(share * torch.softmax(cap(h, w), dim=-1) for share, h, w in teacher)
    log_p, log_q = (torch.log_softmax(z / temperature, dim=-1) for z in (p.log(), logits))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[targets >= 0].mean()
    return (1 - weight) * ce + weight * temperature ** 2 * kl, ce

def rows_loss(z, teacher_z, V, target, scale, softcap, weight, temperature):
    """(loss, cross-entropy, gradient by z in its dtype) from raw logits z [R, >= V] and a teacher's or None, target [R]
    (-1: ignored), scale [R] float32 (share of the mean; 0: ignored). z is overwritten; columns V.. are padding."""
    if use_triton(z.device.type):
        out, taught = torch.empty(len(z), 2, device=z.device), teacher_z is not None
        loss_kernel[len(z),](z, teacher_z if taught else z, target, scale, out, V, z.size(1), softcap, weight,
                             temperature, TEACHER=taught, GRAD=True, BLOCK=LOSS_BLOCK, num_warps=8)
        return *out.mul_(scale[:, None]).sum(0), z
    total, ce_total, rows = 0.0, 0.0, max(1, PIECE_LOGITS // z.size(1))
    for part in (slice(i, i + rows) for i in range(0, len(z), rows)):
        x, s, at = soft_capped(z[part], softcap), scale[part, None], target[part, None].clamp_min(0)
        log_q = torch.log_softmax(x, dim=-1)
        ce = loss = -(log_q.gather(1, at) * s).sum()
        d = log_q.exp_()  # gradient by the capped logits: q - onehot, then mixed with q^(T) - p^(T)
        d.scatter_add_(1, at, torch.full_like(s, -1.0))
        if teacher_z is not None:
            log_p = torch.log_softmax(soft_capped(teacher_z[part], softcap).div_(temperature), dim=-1)
            log_q, p = torch.log_softmax(x / temperature, dim=-1), log_p.exp()
            kl = torch.linalg.vecdot(p, log_p.sub_(log_q)) @ s[:, 0]
            loss = (1 - weight) * ce + weight * temperature ** 2 * kl
            d.mul_(1 - weight).add_(log_q.exp_().sub_(p), alpha=weight * temperature)
        z[part] = d.mul_(x.div_(softcap).square_().neg_().add_(1)).mul_(s)  # slope of the soft-cap, mean over targets
        total, ce_total = total + loss, ce_total + ce
    return total, ce_total, z

def mixed_probs(logits, shares, softcap):
    """sum_i share_i softmax_i, float32 [R, V], of members' raw logits, which are taken one at a time."""
    return sum(share * torch.softmax(soft_capped(z, softcap), dim=-1) for share, z in zip(shares, logits))

def teacher_logits(teacher, rows, V, softcap):
    """Raw logits [R, >= V] of a teacher at `rows`. For several, those that soft-capped have the mixture as softmax:
    its log spans at most 2 softcap, as each member's does, so that it fits under the cap once it is centered."""
    logits = (linear(hidden[rows], head) for _, hidden, head in teacher)
    if len(teacher) == 1:
        return next(logits)
    y = mixed_probs((z[:, :V] for z in logits), [share for share, *_ in teacher], softcap).log_()
    y -= (y.amax(-1, keepdim=True) + y.amin(-1, keepdim=True)) / 2
    z = y.div_(softcap).clamp_(-1 + 1e-6, 1 - 1e-6).atanh_().mul_(softcap)
    return F.pad(z, (0, len(teacher[0][2]) - V))

class ChunkedLoss(torch.autograd.Function):
    """plain_loss in chunks of rows. Gradients are formed in the forward pass, while a chunk's logits are at hand."""
    @staticmethod
    def forward(ctx, hidden, head, targets, softcap, teacher=(), weight=0.0, temperature=1.0):
        rows, V, valid = chunk_rows(head), len(head), targets >= 0
        scale = valid / valid.sum()  # [N]: mean over the targets that count
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
        head = padded(head.to(hidden.dtype))  # once, not in every chunk
        teacher, total, ce_total = [(share, h, padded(w)) for share, h, w in teacher], 0.0, 0.0
        for i in range(0, len(hidden), rows):
            part = slice(i, i + rows)
            loss, ce, d = rows_loss(  # which frees the logits: they have no name here
                linear(hidden[part], head), teacher_logits(teacher, part, V, softcap) if teacher else None, V,
                targets[part], scale[part], softcap, weight, temperature)
            d_hidden[part] = d @ head
            d_head += (d.T @ hidden[part])[:V]
            total, ce_total = total + loss, ce_total + ce
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(ce_total)
        return total, ce_total

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * d_loss, d_head * d_loss, *[None] * 5

def training_loss(model, teacher, cfg, tokens):
    """tokens [B, T+1], teacher [(share, model), ...] -> (loss, cross-entropy) in nats per token: (1 - a)(CE + m MTP)
    + a T^2 KL; a is 0 without a teacher."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    hidden, ahead = model(inputs, targets)
    head, weight = model.head[:model.vocab_size], cfg.distill_weight * bool(teacher)
    with torch.no_grad():
        taught = [(share, t(inputs)[0].flatten(0, 1), t.head[:t.vocab_size]) for share, t in teacher]
    loss, ce = ChunkedLoss.apply(hidden.flatten(0, 1), head, targets.flatten(), cfg.softcap, taught, weight,
                                 cfg.distill_temperature)
    if ahead is not None:
        after_next = F.pad(targets[:, 1:], (0, 1), value=-1)  # the last position has no token after next
        mtp, _ = ChunkedLoss.apply(ahead.flatten(0, 1), head, after_next.flatten(), cfg.softcap)
        loss = loss + (1 - weight) * cfg.mtp_weight * mtp
    return loss, ce

def rows_probs(z, V, target, softcap):
    """p(target) of each row of raw logits z [R, >= V], which are overwritten; float32 [R]."""
    if use_triton(z.device.type):
        out = torch.empty(len(z), 2, device=z.device)
        loss_kernel[len(z),](z, z, target, z, out, V, z.size(1), softcap, 0.0, 1.0, TEACHER=False, GRAD=False,
                             BLOCK=LOSS_BLOCK, num_warps=8)
        return out[:, 1].clamp_(min=0).neg_().exp_()  # fused multiply-adds may leave it below 0 by 5e-7
    return torch.log_softmax(soft_capped(z, softcap), dim=-1).gather(1, target[:, None]).squeeze(1).exp()

@torch.no_grad()
def true_token_probs(model, sequences, batch, world):
    """p(true token) of sequences [n, T+1] in file order, float32 [n * T]; ranks share the work."""
    n, V, head = len(sequences), model.vocab_size, model.head[:model.vocab_size].float()
    rows, head, probs = chunk_rows(head), padded(head), torch.zeros(n, sequences.shape[1] - 1, device=world.device)
    for i in range(batch * world.rank, n, batch * world.size):
        part = sequences[i:i + batch].astype(np.int64)  # a short last batch is filled up: one shape, compiled once
        tokens = torch.from_numpy(np.pad(part, ((0, batch - len(part)), (0, 0)))).to(world.device)
        hidden, targets = model(tokens[:, :-1])[0].flatten(0, 1).float(), tokens[:, 1:].flatten()
        for j in range(0, part[:, 1:].size, rows):
            p = rows_probs(linear(hidden[j:j + rows], head), V, targets[j:j + rows], model.cfg.softcap)
            flat = probs[i:i + batch].view(-1)[j:j + rows]
            flat.copy_(p[:len(flat)])
    world.sum_(probs)
    return probs.flatten().cpu().numpy()

# Optimizer: Muon for matrices, AdamW for the rest ---------------------------------------------------------------------
POLAR_EXPRESS = (  # coefficients (a, b, c) of X <- aX + (bA + cA^2)X, A = XX^T; arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
SYMMETRIC_TILE = dict(BLOCK=128, STEP=64, num_warps=8, num_stages=3)  # two programs fit an H100's multiprocessor

if triton is not None:
    @triton.jit
    def symmetric_kernel(X, add, out, r, k, batch_stride, row_stride, col_stride, alpha, beta,
                         ADD: tl.constexpr, WIDEN: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
        """One block on or below the diagonal, and its mirror image above. `out` and `add` [n, r, r] are contiguous."""
        t, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
        i = (tl.sqrt(2.0 * t + 0.5) - 0.5).to(tl.int32)  # t = i (i + 1) / 2 + j; 0.25 more than exact, for rounding
        j = t - i * (i + 1) // 2
        rows, cols, steps = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP)
        X += matrix * batch_stride
        left, right = X + rows[:, None] * row_stride, X + cols[None, :] * row_stride
        total = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, k, STEP):
            at = start + steps
            a = tl.load(left + at[None, :] * col_stride, mask=(rows[:, None] < r) & (at[None, :] < k), other=0.0)
            b = tl.load(right + at[:, None] * col_stride, mask=(cols[None, :] < r) & (at[:, None] < k), other=0.0)
            if WIDEN:  # the interpreter multiplies bf16 as if it were integers
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")  # of float32 inputs; their default is TF32
        total *= alpha
        inside, lower = (rows[:, None] < r) & (cols[None, :] < r), rows[:, None] * r + cols[None, :]
        if ADD:
            total += beta * tl.load(add + matrix * r * r + lower, mask=inside, other=0.0).to(tl.float32)
        total, out = total.to(out.dtype.element_ty), out + matrix * r * r
        tl.store(out + lower, total, mask=inside)
        if i > j:
            tl.store(out + cols[:, None] * r + rows[None, :], tl.trans(total),
                     mask=(cols[:, None] < r) & (rows[None, :] < r))

def symmetric_product(X, add=None, alpha=1.0, beta=0.0):
    """alpha X X^T + beta add, [n, r, r], of X [n, r, k] and a symmetric `add`; half is computed, half mirrored."""
    (n, r, k), tile = X.shape, SYMMETRIC_TILE
    out, blocks = X.new_empty(n, r, r), triton.cdiv(r, tile["BLOCK"])
    symmetric_kernel[blocks * (blocks + 1) // 2, n](
        X, X if add is None else add.contiguous(), out, r, k, *X.stride(), alpha, beta, ADD=add is not None,
        WIDEN=INTERPRETED, **tile)
    return out

def orthogonalize(G, dtype):
    """The nearest semi-orthogonal matrix to each of G [n, rows, cols], by Polar Express in `dtype`."""
    tall = G.size(-2) > G.size(-1)
    X = G.to(dtype).mT if tall else G.to(dtype)
    X = X / (1.02 * X.float().norm(dim=(-2, -1), keepdim=True) + 1e-6).to(dtype)
    # one block of the kernel has nothing to mirror
    halved = dtype == torch.bfloat16 and X.size(-2) >= 2 * SYMMETRIC_TILE["BLOCK"] and use_triton(X.device.type)
    for a, b, c in POLAR_EXPRESS:
        A = symmetric_product(X) if halved else X @ X.mT
        B = symmetric_product(A, A, c, b) if halved else torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X

def muon_update(grad, first, second, ok, momentum, dtype):
    """Direction of a Muon step for grad [n, rows, cols]; the moments (`second`: by row or column) move if `ok` is 1."""
    dim = -1 if grad.size(-2) >= grad.size(-1) else -2
    update = grad.lerp(first.lerp_(grad, ok * (1 - momentum)), momentum)  # Nesterov
    update = update / update.norm(dim=-1, keepdim=True).clamp_min(1e-20)  # rows (MuonEq-R)
    update = orthogonalize(update, dtype).float()
    # divided by the root of its second moment (NorMuon), rescaled so that the update keeps its norm
    second.lerp_(update.square().mean(dim=dim, keepdim=True), ok * 0.05)
    scaled = update * second.clamp_min(1e-10).rsqrt()
    before, after = (x.norm(dim=(-2, -1), keepdim=True) for x in (update, scaled))
    return scaled * (before / after.clamp_min(1e-10))

def updated(weight, grad, first, second, lr, wd, clip, ok, steps, rule):
    """New weights [n, *unit] of one group; the moments move where `ok` is 1. lr, wd, clip, ok and steps are 0-D
    tensors, so that a compiled version serves every step; rule is ("muon", momentum, dtype) or ("adamw", betas)."""
    grad = torch.where(ok, grad * clip, 0.0)
    if rule[0] == "muon":
        update = muon_update(grad, first, second, ok, *rule[1:])
        lr = lr * math.sqrt(max(1, weight.size(-2) / weight.size(-1)))
        decay = weight * (update * weight > 0)  # cautious
    else:
        b1, b2 = rule[1]
        first.lerp_(grad, ok * (1 - b1))
        second.lerp_(grad.square(), ok * (1 - b2))
        update, decay = first / (1 - b1 ** steps) / (second / (1 - b2 ** steps)).sqrt_().add_(1e-10), weight
    return weight - ok * lr * (wd * decay + update)

class Optimizer:
    """Muon and AdamW over a table of groups. The tensors of a group are stacked into equal units (matrices for Muon,
    single weights for AdamW); each rank of `world` receives the summed gradient of its own units, keeps their state and
    updates them, and the new weights are gathered. Where a gradient is not finite the step changes nothing."""
    def __init__(self, model, cfg, world=World()):
        self.cfg, self.world, wd = cfg, world, cfg.weight_decay
        muon, adamw = ("muon", MOMENTUM, getattr(torch, cfg.precision)), ("adamw", (0.8, 0.95))
        table = {  # label: (rule, lr, weight decay)
            "matrix": (muon, cfg.lr_matrix, wd), "embed": (adamw, cfg.lr_embed, wd), "head": (adamw, cfg.lr_head, wd),
            "resid_scale": (adamw, LR_RESID, 0.0), "skip_scale": (adamw, LR_RESID, 0.0),
            "x0_scale": (("adamw", (0.96, 0.95)), LR_X0, 0.0), "mixing": (adamw, LR_MIXING, 0.0),
            "smear": (adamw, LR_MIXING, 0.0)}
        stacks = {}
        for name, p in model.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            label, unit = (kind, ()) if kind in table else ("matrix", p.shape[-2:])
            stacks.setdefault((label, *unit), []).append((name, p))
        device = next(model.parameters()).device
        self.steps, self.skipped = torch.zeros((), device=device), torch.zeros((), device=device)
        self.groups = []  # names, parameters, units of each, unit, table row, {"first": moment, "second": moment}
        for (label, *unit), named in stacks.items():
            counts = [p.numel() // math.prod(unit) for _, p in named]
            n = -(-sum(counts) // world.size)  # units of this rank
            second = unit if label != "matrix" else (unit[0], 1) if unit[0] >= unit[1] else (1, unit[1])
            moments = {k: torch.zeros(n, *shape, device=device) for k, shape in (("first", unit), ("second", second))}
            self.groups.append((*map(list, zip(*named)), counts, unit, *table[label], moments))
        self.updated = torch.compile(updated, dynamic=False) if cfg.compile else updated

    def stack(self, tensors, unit):
        """[n, *unit], n padded with zeros to a multiple of the ranks."""
        units = torch.cat([t.reshape(-1, *unit) for t in tensors])
        missing = -len(units) % self.world.size
        return F.pad(units, (0, 0) * len(unit) + (0, missing)) if missing else units

    def state(self):
        """{"first.NAME", "second.NAME": moments of a parameter, ...}, the same for any number of ranks, for the leader;
        {} for the others, who send him theirs: all ranks' copies might be more than the memory of a machine."""
        found = {"steps": self.steps, "skipped": self.skipped} if self.world.leader else {}
        for names, _, counts, *_, moments in self.groups:
            for kind, units in moments.items():
                whole = self.world.all_gather(units)()[:sum(counts)].split(counts)  # without the padding
                found.update({f"{kind}.{name}": x.cpu() for name, x in zip(names, whole)} if self.world.leader else {})
        return found

    def load(self, found):
        """Take over what `state` gave to the leader; the other ranks of the group pass None."""
        if found is not None:
            self.steps, self.skipped = (found[k].to(self.steps.device) for k in ("steps", "skipped"))
        self.world.same_(self.steps, self.skipped)
        for names, *_, moments in self.groups:
            for kind, units in moments.items():
                whole = units.new_empty(len(units) * self.world.size, *units.shape[1:])
                if found is not None:
                    whole.copy_(self.stack([found[f"{kind}.{name}"] for name in names], units.shape[1:]))
                self.world.same_(whole)
                units.copy_(self.world.shard(whole))

    @torch.no_grad()
    def step(self, lr_mult, wd_mult):
        """Sum the gradients over the ranks, clip them, update every weight; the gradients are consumed."""
        pending = []
        for _, params, _, unit, *_ in self.groups:
            pending.append(self.world.reduce_scatter(self.stack([p.grad for p in params], unit)))
            for p in params:
                p.grad = None
        grads = [wait() for wait in pending]
        square = sum(g.square().sum() for g in grads)
        self.world.sum_(square)
        ok, clip = square.isfinite(), (self.cfg.grad_clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
        self.steps, self.skipped = self.steps + ok, self.skipped + ~ok
        pending = []  # gathers run while the next group is orthogonalised
        for grad, (_, params, _, unit, rule, lr, wd, state) in zip(grads, self.groups):
            lr, wd = (torch.full_like(clip, x) for x in (lr * lr_mult, wd * wd_mult))
            weight = self.world.shard(self.stack(params, unit))
            pending.append(self.world.all_gather(self.updated(weight, grad, **state, lr=lr, wd=wd, clip=clip, ok=ok,
                                                              steps=self.steps.clamp(min=1), rule=rule)))
        for wait, (_, params, counts, *_) in zip(pending, self.groups):
            for p, new in zip(params, wait()[:sum(counts)].split(counts)):
                p.copy_(new.view_as(p))

# Schedule: pure functions of the position, step s of the L in cycle c of C --------------------------------------------
def lr_multiplier(s, L, floor):
    """Linear from 1 to (almost) `floor` within a cycle, no warmup."""
    return floor + (1 - floor) * (1 - s / L)

def wd_multiplier(lr_mult, lr_floor, start, end):
    """Linear in the learning rate: `start` where lr is at its peak, `end` where it is at its floor."""
    return end if lr_floor == 1 else start + (end - start) * (1 - lr_mult) / (1 - lr_floor)

def noise_scale(b, C, first, last):
    """Noise at boundary b = 1 .. C-1 in standard deviations of the tensor: a cosine from `first` to `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * (b - 1) / max(1, C - 2))) / 2

def cycle_batch_tokens(c, C, cfg):
    """Tokens per step: --batch-tokens in the middle half of the cycles, --edge-batch-tokens outside it."""
    return cfg.batch_tokens if C == 1 or 1 - abs(2 * c / (C - 1) - 1) >= 0.5 else cfg.edge_batch_tokens

@dataclass(frozen=True)
class Cycle:
    """One cycle of one trajectory; it ends in `member`."""
    member: int
    trajectory: int
    index: int  # within the trajectory
    epochs: int
    epochs_before: int  # of the whole budget, trajectories counted one after the other
    steps: int
    rows: int  # sequences a step
    distilled: bool

    @property
    def place(self):
        return {"member": self.member, "traj": self.trajectory, "cycle": self.index + 1,
                "epochs": self.epochs_before + self.epochs, "distilled": int(self.distilled)}

def plan_cycles(cfg, train_tokens):
    """[trajectory][cycle] -> Cycle: all that a run will do. `train_tokens` are those of one epoch."""
    plan = []
    before = 0
    members = cfg.trajectories * cfg.cycles
    for j in range(cfg.trajectories):
        plan.append([])
        for c in range(cfg.cycles):
            earlier = c * cfg.trajectories + j  # a rest lengthens the first cycles
            epochs = math.ceil((cfg.epochs - earlier) / members)
            batch = cycle_batch_tokens(c, cfg.cycles, cfg)
            taught = bool(cfg.teacher) or c >= cfg.distill_after
            plan[j].append(Cycle(
                member=j * cfg.cycles + c, trajectory=j, index=c, epochs=epochs,
                epochs_before=before, steps=max(1, round(epochs * train_tokens / batch)),
                rows=batch // cfg.seq_len, distilled=taught and cfg.distill_weight > 0))
            before += epochs
    return plan

def flops_per_token(cfg, vocab_size, causal=True):
    """(training, teacher) FLOPs per token: 3 x and 1 x the forward products, all passes of a loop and visible keys."""
    D, T, H = cfg.width, cfg.seq_len, cfg.width // cfg.head_dim
    def block(window, value):
        keys = (window * (window + 1) / 2 + (T - window) * window) / T if causal else T
        gates = 2 * H * (ATTN_GATE_CHANNELS * cfg.attn_gates + VALUE_GATE_CHANNELS * value)
        return 2 * (4 + value) * D * D + 6 * D * cfg.mlp_hidden + 4 * D * keys + gates
    windows, head = layer_windows(cfg), 2 * D * vocab_size
    trunk = head + sum(block(windows[i], has_value_embed(cfg, i)) for i in layer_order(cfg))
    mtp = 4 * D * D + block(T, False) + head if cfg.mtp_weight else 0
    return 3 * (trunk + mtp), trunk

def run_flops(cfg, plan, vocab_size, population=None):
    """FLOPs of all training steps by part, {"model": n, "teacher": n}; the teacher is one member or a population."""
    (model, teacher), teachers = flops_per_token(cfg, vocab_size), len(population.members) if population else 1
    cycles, tokens = sum(plan, []), lambda cycles: sum(c.steps * c.rows * cfg.seq_len for c in cycles)
    return {"model": model * tokens(cycles), "teacher": teachers * teacher * tokens(c for c in cycles if c.distilled)}

# Population: members on disk (bf16 weights + configuration) and their cached p(true token) ----------------------------
def write_atomically(path, write):
    """Call write(temporary path), then rename it: a reader sees the old file or the new one, whenever all stops."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(tmp)
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except SafetensorError as e:
        raise OSError(f"cannot write {path}: {e}") from None
    finally:
        tmp.unlink(missing_ok=True)

def save_json(path, value):
    write_atomically(path, lambda tmp: tmp.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))

def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def save_member(folder, model, position, mean=None):
    """Write a bf16 snapshot of `model`, or of `mean` weights {name: tensor}, with all that is needed to load it;
    `position` says where in the run it was taken."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in (mean or model.state_dict()).items()}
    write_atomically(folder / "model.safetensors", lambda tmp: save_tensors(weights, tmp))
    save_json(folder / "config.json", {"vocab_size": model.vocab_size, **position, "sha256": sha256_of(
        folder / "model.safetensors"), "config": asdict(model.cfg)})

def empty_member(cfg, vocab_size):
    """A frozen GPT in evaluation mode, its weights in the precision of `cfg` and yet to be filled."""
    model = GPT(cfg, vocab_size)
    return model.to(model.dtype).eval().requires_grad_(False)

def load_member(folder, precision=None, sha256=None, device="cpu"):
    """The member in `folder`, as a frozen GPT in evaluation mode on `device`. Raises UserError where a file is damaged,
    or is not the one of hash `sha256`."""
    with reading(f"member {folder}"):
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if sha256_of(folder / "model.safetensors") != (sha256 or about["sha256"]):
            raise ValueError("the sha256 of model.safetensors is not the recorded one")
        weights = load_tensor_file(folder / "model.safetensors")
        cfg = replace(Config(**about["config"]), **({"precision": precision} if precision else {}))
        with torch.device("meta"):  # raises if they do not fit: a hostile configuration may ask for any size
            empty_member(cfg, about["vocab_size"]).load_state_dict(weights, assign=True)
        model = empty_member(cfg, about["vocab_size"])
        model.load_state_dict(weights)
    plain = cfg.attention in ("matmul", "plain", "sdpa")  # on a CPU as it was evaluated; on a GPU SDPA needs no check
    on_cpu = attention_names(cfg if plain else replace(cfg, attention="auto"), "cpu")[0]
    name = on_cpu if torch.device(device).type == "cpu" else "sdpa"
    model.attend = ATTENTION[name](cfg, torch.device(device))
    return model.to(device)

@dataclass
class Progress:
    """Where a trajectory stands: with its tensors, all that a resumed run needs (randomness is stateless)."""
    trajectory: int
    cycle: int = 0  # index of the cycle under way
    in_cycle: int = 0  # steps of it that are done
    step: int = 0  # steps done
    sequences: int = 0  # and read
    done: bool = False
    curve: list = field(default_factory=list)  # an entry a member
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    log: list = field(default_factory=list)  # name and size of the log, size of the metrics
    kernels: dict = field(default_factory=dict)
    skipped: int = 0  # updates left out because they were not finite

def generations(folder, trajectory):
    """Resume states of a trajectory, newest first: JSON files, each beside its tensors."""
    return sorted(folder.glob(f"{trajectory}-*.json"), key=lambda f: f.stem, reverse=True)

def save_state(folder, at, identity, tensors):
    """Write a state: the tensors first, then the JSON that makes it valid; only then the last but one is deleted."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{at.trajectory}-{at.step:09}{'-done' * at.done}.json"
    write_atomically(path.with_suffix(".safetensors"), lambda tmp: save_tensors(tensors, tmp))
    body = {"at": asdict(at), "identity": identity, "tensors": sha256_of(path.with_suffix(".safetensors"))}
    save_json(path, {"body": body, "sha256": digest(body)})
    keep = {f.stem for f in generations(folder, at.trajectory)[:2]}
    for old in folder.glob(f"{at.trajectory}-*"):
        if old.stem not in keep:  # what a killed process left half-written, too
            old.unlink()

def load_state(folder, trajectory, identity):
    """(Progress, file of its tensors) of the newest whole state of a trajectory, or None where it has none; `identity`
    is what it was saved with. Says so where it falls back; raises UserError where no state is whole."""
    files = generations(folder, trajectory)
    for path in files:
        try:
            with reading(f"state {path}"):
                saved = json.loads(path.read_text(encoding="utf-8"))
                body, tensors = saved["body"], path.with_suffix(".safetensors")
                if digest(body) != saved["sha256"] or sha256_of(tensors) != body["tensors"]:
                    raise ValueError("a sha256 does not match")
                if body["identity"] != identity or body["at"]["trajectory"] != trajectory:
                    raise ValueError("it is of another run or trajectory")
                at, first = Progress(**body["at"]), trajectory * identity["cycles"]
                name, *counts = at.log[0], at.log[1], at.log[2], at.cycle, at.in_cycle, at.step, at.sequences
                if not (all(type(n) is int and n >= 0 for n in counts) and at.cycle <= identity["cycles"]
                        and type(at.done) is bool and Path(name).name == name and len(at.log) == 3
                        and [e["member"] for e in at.curve] == list(range(first, first + at.cycle))
                        and all({"of", "weights", "predictions"} <= e.keys() for e in at.curve)):
                    raise ValueError("it does not say where the trajectory stands")
                return at, tensors
        except UserError as e:
            print(f"notice: {e}" + ": going back to the one before" * (path != files[-1]), file=sys.stderr)
    if files:
        raise UserError(f"no state of trajectory {trajectory} in {folder} is whole: start a new run, or delete "
                        f"{folder / str(trajectory)}-* to train this trajectory again")
    return None

@torch.no_grad()
def perturb(model, scale, *key):
    """Add Gaussian noise of `scale` standard deviations to every matrix (vectors whole); a pure function of `key`."""
    for name, p in model.named_parameters():
        dims = (-2, -1) if p.ndim > 1 else (0,)
        if math.prod(p.shape[-2:]) > 1:
            g = torch.Generator().manual_seed(seed_of("noise", *key, name))
            p.add_(torch.randn(p.shape, generator=g).to(p.device) * p.std(dim=dims, keepdim=True) * scale)

def read_predictions(path, sha256=None):
    """{split: float32 [tokens]} of a member. Raises UserError where the file is missing, damaged or another one."""
    with reading(f"predictions {path}"):
        if sha256 is not None and sha256_of(path) != sha256:
            raise ValueError("the sha256 is not the recorded one")
        found = load_file(path)
        if len(found) != 2 or "heldout" not in found:
            raise ValueError("it must hold heldout and one more split")
        for split, p in found.items():
            if p.dtype != np.float32 or p.ndim != 1 or not len(p) or not (p > 0).all() or not (p <= 1).all():
                raise ValueError(f"{split} does not hold one probability per token")
    return found

def recorded_hashes(run, kind, members):
    """sha256 of each member's "weights" or "predictions" as a finished run recorded them; of others None."""
    if not (run / "result.json").exists():
        return [None] * members
    with reading(run / "result.json"):
        found = [p[kind] for p in json.loads((run / "result.json").read_text(encoding="utf-8"))["curve"]]
    if len(found) != members:  # trajectories on machines that share no disk
        raise UserError(f"{run} has predictions of {members} members, its result has {len(found)}: copy the others "
                        "from the machines that trained them")
    return found

def load_predictions(run):
    """Cached p(true token) of a run: {split: float32 [members, tokens]}. Raises UserError where files are missing."""
    files = sorted((run / "predictions").glob("*.safetensors"), key=lambda f: (len(f.stem), f.stem))
    if not files:
        raise UserError(f"{run} has no cached predictions: it is not a run, or it ended before its first member")
    for i, file in enumerate(files):
        if file.stem != str(i):
            raise UserError(f"{file} is not of member {i}: the run is not complete, or move that file elsewhere")
    members = [read_predictions(f, sha) for f, sha in zip(files, recorded_hashes(run, "predictions", len(files)))]
    for file, member in zip(files, members):
        if {k: len(p) for k, p in member.items()} != {k: len(p) for k, p in members[0].items()}:
            raise UserError(f"predictions {file} are damaged: other splits or lengths than those of {files[0].name}")
    return {split: np.stack([m[split] for m in members]) for split in members[0]}

# Prior: weights on the simplex that minimise the held-out loss of the mixture, solved to a certificate ----------------
def mixture_loss(P, w):
    """Nats per token of the mixture: P [M, N] (or M rows) p(true token) per member, w [M]; float64, a row at a time."""
    return float(-np.log(sum(x * p.astype(np.float64) for x, p in zip(w, P, strict=True))).mean())

def fit_prior(P, tolerance=1e-7, max_passes=100):
    """Minimise F(w) = -(1/N) sum_n log(sum_i w_i P_in) over the simplex by a primal-dual interior-point method.

    P [M, N] > 0. Returns (w float64 [M], gap): F(w) - min F <= gap = log(max_i g_i), g_i = (1/N) sum_n P_in / (w.P_n).
    F(c w) = F(w) - log c, so minimising F(w) + sum(w) over w >= 0 ends on the simplex by itself; its conditions are
    1 - g = z, w z = 0, z >= 0, and each pass over P is one Newton step towards w z = mu with mu ever smaller."""
    M, N = P.shape
    if not np.isfinite(P).all() or (P <= 0).any():
        raise ValueError("fit_prior: every probability must be positive and finite")
    P, w = torch.from_numpy(np.ascontiguousarray(P)), torch.full((M,), 1 / M, dtype=torch.float64)
    z, best, best_gap = torch.full_like(w, 0.1), w, math.inf
    for _ in range(max_passes):
        g, hessian = torch.zeros_like(w), torch.zeros(M, M, dtype=torch.float64)
        for p in P.split(16384, dim=1):
            ratio = p.double()
            ratio /= w @ ratio
            g += ratio.sum(1) / N
            ratio = ratio.float()
            hessian += (ratio @ ratio.T).double() / N  # float32 product: it shapes the step, not the certificate
        gap = max(0.0, float(g.max().log()))
        if gap < best_gap:
            best, best_gap = w, gap
        if gap <= tolerance:
            break
        mu = 0.1 * float(w @ z) / M
        dw = torch.linalg.solve(hessian + torch.diag(z / w), g - 1 + mu / w)
        dz = mu / w - z - z / w * dw
        inside = lambda x, dx: x + dx * min(1.0, 0.99 / max(1e-300, float((-dx / x).max())))  # stay positive
        w, z = inside(w, dw), inside(z, dz)
        w = w / w.sum()
    return best.numpy(), best_gap

def mixtures(heldout, scored):
    """Losses on `scored` (M rows) of the newest member, of all uniformly and under the prior of `heldout` (M rows)."""
    w, gap = fit_prior(np.stack(heldout))
    return {"loss": mixture_loss(scored[-1:], [1.0]), "uniform": mixture_loss(scored, np.full(len(w), 1 / len(w))),
            "learned": mixture_loss(scored, w), "gap": gap}

def pruned(heldout):
    """Yield (members, weights), largest weight first: those that the prior fitted on heldout [M, N] gives weight, then
    ever fewer, as the least of them leaves and it is fitted again. A few members pruned to beat the few of largest
    weight, which are much alike, and match greedy selection (records/tuning)."""
    members = np.arange(len(heldout))
    while len(members):
        w, _ = fit_prior(heldout[members])
        members, w = members[w > 1e-6], w[w > 1e-6]  # below is the solver's tolerance
        order = np.argsort(-w, kind="stable")
        yield members[order].tolist(), (w[order] / w.sum()).tolist()
        members = np.delete(members, w.argmin())

def best_members(heldout, k=None):
    """(members, weights) for an inference budget of at most `k` members. Raises UserError for a k below 1."""
    if k is not None and k < 1:
        raise UserError(f"--k {k} must be at least 1")
    return next(found for found in pruned(heldout) if len(found[0]) <= (k or len(heldout)))

def population_table(heldout, scored):
    """Rows for each K: loss on `scored` (M rows) of the K members of largest weight, uniformly and under the prior
    renormalised (the paper's rule), and of those pruned to K. heldout [M, N] is all that a fit sees."""
    (w, gap), path, rows = fit_prior(heldout), list(pruned(heldout)), []
    loss, ranked = lambda members, x: mixture_loss([scored[i] for i in members], x), np.argsort(-w, kind="stable")
    M = len(w)  # all K up to 32, then doubling, and M; `select --k` shows any other
    for k in sorted({*range(1, min(M, 32) + 1), *(2 ** i for i in range(5, M.bit_length())), M}):
        top = ranked[:k]
        rows.append({"k": k, "uniform": loss(top, np.full(k, 1 / k)), "learned": loss(top, w[top] / w[top].sum()),
                     "pruned": loss(*next(found for found in path if len(found[0]) <= k))})
    return {"weights": w.tolist(), "gap": gap, "ranked": ranked.tolist(), "rows": rows}

def format_table(table, split):
    lines = [f"{'k':>4} {'uniform':>9} {'learned':>9} {'pruned':>9}   {split} loss of k members"]
    lines += [f"{r['k']:>4} {r['uniform']:>9.5f} {r['learned']:>9.5f} {r['pruned']:>9.5f}" for r in table["rows"]]
    used = [f"{i}:{table['weights'][i]:.3f}" for i in table["ranked"] if table["weights"][i] >= 0.0005]
    return lines + [f"prior gap:{table['gap']:.1e}  weights (member:weight) {' '.join(used)}"]

def data_efficiency(loss):
    """Tokens at which a standard baseline reaches `loss` on FineWeb, over 100M, as text; no extrapolation."""
    tokens, losses = (200, 400, 600, 800, 1000, 2000), (3.703, 3.370, 3.200, 3.123, 3.046, 2.892)
    if losses[-1] <= loss <= losses[0]:
        return f"{np.interp(-loss, np.negative(losses), tokens) / 100:.2f}x"
    return ">20x" if loss < losses[-1] else "<2x"

# Mixture: a population in use; it mixes probabilities token by token --------------------------------------------------
@dataclass(frozen=True, eq=False)
class Population:
    """Members of a run and their weights: p(token) = sum_i weights_i p_i(token). `load_population` makes it."""
    folder: Path
    members: list  # numbers of those that take part, the largest weight first
    weights: list  # theirs; they sum to 1
    heldout: np.ndarray  # cached p(true token) of all members of the run [M, N]
    manifest: dict  # of the data they were trained on
    encoding: object  # tiktoken.Encoding, or None where that data came without a tokenizer
    device: torch.device

    def member(self, i):
        """Member i of the run, read and checked, as a frozen GPT."""
        sha256 = recorded_hashes(self.folder, "weights", len(self.heldout))[i]
        return load_member(self.folder / f"members/{i}", sha256=sha256, device=self.device)

    @functools.cached_property
    def models(self):
        return list(map(self.member, self.members))

    @torch.no_grad()
    def log_probs(self, tokens):
        """log p(next token) after each of tokens [B, T] (documents begin with encoding.eot_token), float32 [B, T, V]"""
        logits = (linear(m(tokens)[0].float(), m.head[:m.vocab_size].float()) for m in self.models)
        return mixed_probs(logits, self.weights, self.models[0].cfg.softcap).log_()

    def encode(self, text):
        """Tokens of a document that begins with `text`. Raises UserError where the run has no tokenizer."""
        if self.encoding is None:
            raise UserError(f"{self.folder} has no tokenizer, because its data came without one")
        return [self.encoding.eot_token, *self.encoding.encode_ordinary(text)]

def load_tokenizer(folder):
    """(manifest, tiktoken.Encoding or None) of a data folder. Raises UserError where they are missing or damaged."""
    with reading(f"tokenizer in {folder}"):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if "file" not in (entry := manifest["tokenizer"] or {}):  # prepare.py could not load GPT-2's
            return manifest, None
        if sha256_of(path := folder / entry["file"]) != entry["sha256"]:
            raise ValueError(f"the sha256 of {path.name} is not the manifest's")
        import tiktoken
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}
        return manifest, tiktoken.Encoding(entry["kind"], pat_str=entry["pattern"], mergeable_ranks=ranks,
                                           special_tokens={"<|endoftext|>": entry["eot"]})

def load_population(run, k=None, device=None):
    """The members of `run` (a name under logs/, or a folder) that the learned prior gives weight, or the best `k`, on
    `device` (default: the GPU where there is one). Raises UserError for what is missing or damaged."""
    folder = find_run(str(run))
    heldout = load_predictions(folder)["heldout"]
    return Population(folder, *best_members(heldout, k), heldout, *load_tokenizer(folder / "data"),
                      torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))

def load_teacher(cfg, vocab_size, device):
    """The Population of --teacher, or None. Raises UserError where it cannot teach this run."""
    if not cfg.teacher:
        return None
    population = load_population(cfg.teacher, cfg.teacher_k, device)
    of, its = (lambda c, vocab: (vocab, c.softcap, c.seq_len)), population.models[0].cfg
    if (found := of(its, population.models[0].vocab_size)) != (needed := of(cfg, vocab_size)):
        raise UserError(f"--teacher {cfg.teacher}: its (vocabulary, softcap, seq_len) is {found}, this run's {needed}")
    _, attend = choose_attention(replace(its, attention=cfg.attention), device)
    for model in population.models:
        model.attend = attend
    return population

# Training loop --------------------------------------------------------------------------------------------------------
class Log:
    """log.txt and metrics.jsonl of a run, and the terminal. Each group's leader writes its own."""
    def __init__(self, path=None, show=True):
        """Without a path nothing is written. Raises UserError where another process writes there."""
        self.text = self.metrics = None
        if path is None:
            return
        files = path, path.with_name(path.stem.replace("log", "metrics") + ".jsonl")
        self.text, self.metrics = (open(f, "a", encoding="utf-8", buffering=1) for f in files)
        self.show, self.name = show, path.name
        try:
            if fcntl:
                fcntl.flock(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path.parent} is in use: another process trains this run") from None

    def start(self, header, sizes=None):
        """Begin anew with `header`, or go on where log and metrics had `sizes` bytes: what followed comes again."""
        for file, size in zip((self.text, self.metrics), sizes or (0, 0)):
            file.truncate(min(size, os.fstat(file.fileno()).st_size))
        if not sizes:
            self.text.write(SOURCE + "=" * 100 + "\n" + header + "\n" + "=" * 100 + "\n")

    def position(self):
        """[name, bytes of the log, bytes of the metrics] written so far, on the disk as the state that holds them."""
        files = [f.fileno() for f in (self.text, self.metrics) if f]
        for file in files:
            os.fsync(file)
        return [self.name, *(os.fstat(f).st_size for f in files)] if files else []

    def line(self, text):
        if self.text is not None:
            self.text.write(text + "\n")
            if self.show:
                print(text, flush=True)

    def event(self, *flags, **pairs):
        """A line of key:value pairs, in the metrics too; a pair of numbers is shown as a/b."""
        def shown(k, v):
            if isinstance(v, float):
                return f"{v:.5f}" if k.endswith(("loss", "gap")) else f"{v:.4g}"
            return f"{v[0]}/{v[1]}" if isinstance(v, tuple) else v
        if self.metrics is not None:
            self.metrics.write(json.dumps({"event": flags[0] if flags else next(iter(pairs)), **pairs}) + "\n")
            self.line(" ".join((*flags, *(f"{k}:{shown(k, v)}" for k, v in pairs.items()))))

def machine(world):
    """Versions and hardware, for the log."""
    cpu = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), "") if Path("/proc/cpuinfo").exists() else platform.processor()
    gpu = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})" if world.device.type == "cuda" else "none"
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "system": platform.platform(), "cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu,
            "processes": world.size * world.groups}

def alive(cfg):
    """Wind up the timer that ends a hanging run and shows the stack of every thread."""
    if cfg.hang_minutes:
        faulthandler.dump_traceback_later(60 * cfg.hang_minutes, exit=True, file=sys.__stderr__)

def warm_up(cfg, raw, model, teacher, evaluated, world):
    """Compile both variants of a step, with and without teacher, before the first; nothing of it stays."""
    raw.init_weights("warm-up")
    tokens = torch.zeros(cfg.micro_batch, cfg.seq_len + 1, dtype=torch.long, device=world.device)
    for taught_by in ([], teacher) if cfg.distill_weight else ([],):
        training_loss(model.train(), taught_by, cfg, tokens)[0].backward()
        Optimizer(raw, cfg, world).step(1.0, 1.0)
    with torch.no_grad():
        evaluated(tokens[:, :-1])

def check_finite(cfg, world, at, optimizer, trouble, micro_batches, saved_step, log):
    """Stop, or count where that is asked for, when updates were left out because they were not finite."""
    if lost := int(optimizer.skipped) - at.skipped:
        step, m = divmod(-world.largest(-int(trouble)), micro_batches)
        what = f"the loss is not finite at step {step + 1} of trajectory {at.trajectory}, micro-batch {m}"
        if step >= at.step:
            what = f"a gradient is not finite at or before step {at.step} of trajectory {at.trajectory}"
        if not cfg.skip_nonfinite:
            raise UserError(f"{what}; {lost} updates were left out; the last saved state is of step {saved_step}: "
                            "lower --lr-matrix, try --precision float32, or --resume it with --skip-nonfinite")
        at.skipped += lost
        log.event("skipped", updates=at.skipped, reason=what)

def train(cfg, corpus, world, folder, log, saved=None, population=None):
    """Train the population: the loop of q0 and of every baseline, over trajectories, cycles and steps. `saved`
    {trajectory: (Progress, file of tensors)} is where a resumed run goes on; `population` teaches in place of the
    previous member. Raises Stopped after a signal."""
    plan = plan_cycles(cfg, corpus.train_sequences * cfg.seq_len)
    mine = plan if world.groups == 1 else [plan[world.index]]
    total_steps, begun, started, ran = sum(c.steps for c in sum(mine, [])), [], time.perf_counter(), 0
    splits, key = {s: corpus.eval_sequences(s) for s in ("heldout", cfg.report)}, f"{cfg.report}_loss"
    cached, identity = {s: [] for s in splits}, {**method_settings(cfg), **corpus.hashes}
    raw, previous = GPT(cfg, corpus.vocab_size).to(world.device), empty_member(cfg, corpus.vocab_size).to(world.device)
    name, raw.attend = choose_attention(cfg, world.device)
    previous.attend = raw.attend
    compiled = (lambda m: torch.compile(m, dynamic=False)) if cfg.compile else lambda m: m
    model, evaluated = compiled(raw), compiled(previous)
    taught_by = [*zip(population.weights, map(compiled, population.models))] if population else [(1.0, evaluated)]
    kernels = {"attention": name, "triton": use_triton(world.device.type), "compiled": cfg.compile}
    ranks = {"device": world.device.type, "processes": world.size * world.groups}
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 32  # `updated` has a version for each shape, the preset q0 11 of them
        warm_up(cfg, raw, model, taught_by, evaluated, world)
    if not saved:
        log.event("kernels", **kernels, ready=f"{time.perf_counter() - started:.1f}s")

    def set_previous(member, sha256=None):
        if world.leader:
            previous.load_state_dict(load_member(folder / f"members/{member}", sha256=sha256).state_dict())
        world.same_(*previous.parameters())

    for trajectory in mine:
        j = trajectory[0].trajectory
        at, file = (saved or {}).get(j) or (Progress(j), None)
        before, saved_at, resume = sum(p.step for p in begun), (at.step, at.done), file is not None
        begun.append(at)
        if resume and at.kernels != kernels | ranks:
            log.line(f"notice: step {at.step} was reached with {at.kernels}, now {kernels | ranks}: rounding differs")
        for entry in at.curve if world.leader else ():
            path = folder / f"predictions/{entry['member']}.safetensors"
            for split, p in read_predictions(path, entry["predictions"]).items():
                cached[split].append(p)

        def save():
            nonlocal saved_at
            if (at.step, at.done) != saved_at:
                tensors = {} if at.done else optimizer.state()
                at.log, at.kernels, saved_at = log.position(), kernels | ranks, (at.step, at.done)
                if world.leader:
                    if not at.done:
                        tensors |= {f"model.{n}": p.detach().cpu() for n, p in raw.named_parameters()}
                        tensors |= {f"mean.{n}": p.cpu() for n, p in mean.items()}
                    save_state(folder / "state", at, identity, tensors)
                    # a state inside a cycle is taught by the newest member, the state before it by the one before
                    for old in at.curve[:-max(cfg.keep_members or len(at.curve), 1 if at.done else 2)]:
                        (folder / f"members/{old['member']}/model.safetensors").unlink(missing_ok=True)

        for cycle in trajectory[at.cycle:]:
            mean = {n: torch.zeros_like(p) for n, p in raw.state_dict().items() if world.leader and cfg.average}
            if resume:
                tensors, optimizer = load_tensor_file(file) if world.leader else None, Optimizer(raw, cfg, world)
                if world.leader:
                    raw.load_state_dict({n: tensors[f"model.{n}"] for n, _ in raw.named_parameters()})
                    mean = {n: p.copy_(tensors[f"mean.{n}"]) for n, p in mean.items()}
                world.same_(*(p.data for p in raw.parameters()))
                optimizer.load(tensors)
                if cycle.distilled and at.in_cycle < cycle.steps and not population:
                    set_previous(cycle.member - 1, at.curve[-1]["weights"])
                resume = False
            elif cycle.index == 0 or cfg.boundary == "fresh":
                raw.init_weights(cfg.seed, j, cycle.index)
                optimizer = Optimizer(raw, cfg, world)
                optimizer.skipped += at.skipped
            elif cfg.boundary == "perturb":
                noise = noise_scale(cycle.index, cfg.cycles, cfg.noise_first, cfg.noise_last)
                perturb(raw, noise, cfg.seed, j, cycle.index)
            teacher, micro_batches = taught_by if cycle.distilled else [], cycle.rows // cfg.micro_batch
            model.train()
            mark = last_save = time.perf_counter()
            marked, never = at.step, torch.full((), 2 ** 62, device=world.device)
            trouble = never  # index of the first micro-batch whose loss is not finite
            for s in range(at.in_cycle, cycle.steps):
                alive(cfg)
                lr_mult = lr_multiplier(s, cycle.steps, cfg.lr_floor)
                wd_mult = wd_multiplier(lr_mult, cfg.lr_floor, cfg.wd_start, cfg.wd_end)
                batch = torch.from_numpy(corpus.batch(cfg.seed, j, at.sequences, cycle.rows))
                if world.device.type == "cuda":  # a copy for which the host does not wait
                    batch = batch.pin_memory().to(world.device, non_blocking=True)
                loss_sum = torch.zeros((), device=world.device)
                for m in range(world.rank, micro_batches, world.size):
                    torch.manual_seed(seed_of("dropout", cfg.seed, j, at.step, m))
                    loss, ce = training_loss(model, teacher, cfg, batch[m * cfg.micro_batch:(m + 1) * cfg.micro_batch])
                    (loss / micro_batches).backward()
                    loss_sum += ce / micro_batches
                    trouble = torch.where(loss.isfinite(), trouble, trouble.clamp(max=at.step * micro_batches + m))
                optimizer.step(lr_mult, wd_mult)
                if (averaged := s + 1 - cycle.steps + math.ceil(cfg.average * cycle.steps)) > 0:
                    for n, p in raw.state_dict().items() if mean else ():
                        mean[n].lerp_(p, 1 / averaged)
                at.step, at.sequences, at.in_cycle, ran = at.step + 1, at.sequences + cycle.rows, s + 1, ran + 1
                if (before + at.step) % cfg.log_every == 0 or s == cycle.steps - 1:
                    world.sum_(loss_sum)
                    loss, now, step = float(loss_sum), time.perf_counter(), before + at.step
                    eta = str(datetime.timedelta(seconds=round((now - started) / ran * (total_steps - step))))
                    speed = round((at.step - marked) * cycle.rows * cfg.seq_len / (now - mark))
                    epoch = cycle.epochs_before + cycle.epochs * (s + 1) / cycle.steps
                    log.event(step=(step, total_steps), traj=j, cycle=(cycle.index + 1, cfg.cycles), epoch=epoch,
                              loss=loss, lr=cfg.lr_matrix * lr_mult, wd=cfg.weight_decay * wd_mult,
                              **{"tok/s": speed}, eta=eta)
                    at.train_seconds, mark, marked = at.train_seconds + now - mark, now, at.step
                    check_finite(cfg, world, at, optimizer, trouble, micro_batches, saved_at[0], log)
                    trouble = never
                late = time.perf_counter() - last_save > 60 * cfg.save_minutes
                if asked := world.largest(2 * bool(Stopped.signal) + late):
                    last_save = time.perf_counter()
                    save()
                    mark += time.perf_counter() - last_save
                if asked > 1:
                    raise Stopped
            save()  # before the evaluation, which takes long enough to be interrupted
            mark = time.perf_counter()
            member, path = folder / f"members/{cycle.member}", folder / f"predictions/{cycle.member}.safetensors"
            if world.leader:
                save_member(member, raw, cycle.place, mean)
            set_previous(cycle.member)
            probs = {}
            for split, sequences in splits.items():
                alive(cfg)
                probs[split] = p = true_token_probs(evaluated, sequences, cfg.micro_batch, world)
                if not (p > 0).all():
                    raise UserError(f"member {cycle.member} gives some true token probability {p.min()}: lower "
                                    "--lr-matrix, or --softcap where it was raised")
            if world.leader:
                write_atomically(path, lambda tmp: save_file(probs, tmp))
                for split, p in probs.items():
                    cached[split].append(p)
                mixed, n = mixtures(cached["heldout"], cached[cfg.report]), len(cached["heldout"])
                log.event(**cycle.place, **{key: mixed["loss"]})
                log.event("ensemble", members=n, k=n, prior="uniform", **{key: mixed["uniform"]})
                log.event("ensemble", members=n, k=n, prior="learned", **{key: mixed["learned"]}, gap=mixed["gap"])
                at.curve.append({**cycle.place, **mixed, "of": n, "weights": sha256_of(member / "model.safetensors"),
                                 "predictions": sha256_of(path)})
            at.cycle, at.in_cycle = cycle.index + 1, 0
            at.eval_seconds += time.perf_counter() - mark
        at.done = True
        save()
    faulthandler.cancel_dump_traceback_later()
    heldout, curves = world.collect(np.stack(cached["heldout"]) if world.leader else None, [p.curve for p in begun])
    scored, _ = world.collect(np.stack(cached[cfg.report]) if world.leader else None, None)
    if heldout is None:
        return None
    curve = {entry["member"]: entry for group in curves for trajectory in group for entry in trajectory}
    for n, cycle in enumerate(sum(plan, []), 1):
        if curve[cycle.member]["of"] != n:  # fitted before the other trajectories' members were there
            curve[cycle.member].update(mixtures(heldout[:n], scored[:n]), of=n)
    curve, seconds = [curve[i] for i in sorted(curve)], sum(p.train_seconds for p in begun)
    tokens = sum(c.steps * c.rows for c in sum(mine, [])) * cfg.seq_len
    return {f"final_{key}": curve[-1]["learned"], f"uniform_{key}": curve[-1]["uniform"],
            f"last_member_{key}": curve[-1]["loss"], "members": len(curve), "epochs": cfg.epochs, "curve": curve,
            "table": population_table(heldout, scored), "flops": run_flops(cfg, plan, corpus.vocab_size, population),
            "skipped_updates": sum(p.skipped for p in begun), "kernels": kernels, "train_seconds": seconds,
            "eval_seconds": (evaluated := sum(p.eval_seconds for p in begun)), "total_seconds": seconds + evaluated,
            "tokens_per_second": tokens / seconds, "peak_memory_mb": peak_memory_mb(world.device)}

def peak_memory_mb(device):
    """Of the GPU's allocator, or of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    unit = 2 ** 20 if sys.platform == "darwin" else 1024
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def draw_curve(path, result, split):
    """curve.png: loss against epochs for single members, their uniform mixture and the learned prior."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("curve.png is not drawn: pip install matplotlib")
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis, epochs = figure.subplots(), [p["epochs"] for p in result["curve"]]
    for name, style, label in (("loss", "o:", "newest member alone"), ("uniform", "s--", "all so far, uniform"),
                               ("learned", "D-", "all so far, learned prior")):
        axis.plot(epochs, [p[name] for p in result["curve"]], style, markersize=4, label=label)
    axis.set(xlabel="epochs over the training text, all members together", ylabel=f"{split} loss (nats per token)")
    axis.legend()
    axis.grid(alpha=0.3)
    write_atomically(path, lambda tmp: figure.savefig(tmp, dpi=120, format="png"))

# Commands -------------------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")

def parse_config(argv, **extra):
    """Config from flags, defaults from the preset. Returns (cfg, reasons, namespace)."""
    p = Parser(prog="train_q0.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    for name, options in extra.items():
        p.add_argument(flag(name), *["--name"] * (name == "run"), **options)
    kinds = {"bool": dict(action=argparse.BooleanOptionalAction),
             **{of.__name__: dict(type=of, metavar=of.__name__.upper()) for of in (int, float, str)}}
    for f in fields(Config):
        shown = "derived" if f.default is None else f.default
        of = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        if f.name in GROUPS:
            group = p.add_argument_group(GROUPS[f.name])
        group.add_argument(flag(f.name), help=f"{f.metadata['why']}{of} [{shown}]", **kinds[f.type.split(" ")[0]])
    known, unknown = p.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], map(flag, vars(known)), 1)
        raise UserError(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else " (see --help)"))
    given, reason = {k: v for k, v in vars(known).items() if v is not None and k not in extra}, "given"
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and getattr(known, "run", None):
        known.resume = known.resume or (known.run if (LOGS / known.run / "run.json").exists() else None)
    if getattr(known, "resume", None):
        path = find_run(known.resume) / "run.json"
        with reading(path, ": the run cannot go on"):
            saved = json.loads(path.read_text(encoding="utf-8"))["config"]
            if saved.keys() != {f.name for f in fields(Config)}:
                raise ValueError("settings are missing or unknown")
            base = asdict(Config(**{**saved, "device": "auto", "compile": None, "graphs": None, "attention": "auto"}))
            resolve(Config(**base))  # values of another kind raise here
        if differ := [f"{flag(k)} {v} (not {base[k]})" for k, v in given.items() if k not in MACHINE and v != base[k]]:
            raise UserError(f"--resume {known.resume} has settings of its own: leave out {', '.join(differ)}")
        given = {**base, **given}
    elif "preset" not in given:
        if not torch.cuda.is_available() or given.get("device") == "cpu":
            given["preset"], reason = "tiny", "no GPU in use"
        elif (ROOT / PRESETS["q0"]["data"] / "manifest.json").exists():
            given["preset"], reason = "q0", "a GPU and FineWeb shards are present"
        else:
            raise UserError("a GPU but no FineWeb shards: run python data/prepare.py fineweb, or give --preset tiny")
    cfg, why = resolve(Config(**{**PRESETS.get(given["preset"], {}), **given}))
    return cfg, {"preset": reason, **why}, known

def find_data(cfg):
    folder = Path(cfg.data)
    return folder if folder.is_absolute() or folder.exists() else ROOT / folder

def find_run(name):
    for folder in (LOGS / name, Path(name)):
        if folder.is_dir():
            return folder
    latest = "".join(f"; there is {run.name}" for run in sorted(LOGS.glob("*"))[-3:])
    raise UserError(f"no run {name} under {LOGS}{latest}")

H100_FLOPS = 989e12  # a second, dense bf16
def describe(cfg, why, corpus_tokens, vocab_size, population=None):
    """Lines that say what a run will do and why, and the FLOPs of its training."""
    cycles = sum(plan := plan_cycles(cfg, corpus_tokens), [])
    with torch.device("meta"):
        params = sum(p.numel() for p in GPT(cfg, vocab_size).parameters())
    (model, teacher), tokens = flops_per_token(cfg, vocab_size), sum(c.steps * c.rows for c in cycles) * cfg.seq_len
    return [*(f"{name}: {getattr(cfg, name)} ({reason})" for name, reason in why.items()),
            f"population: {cfg.trajectories} trajectories x {cfg.cycles} cycles = {len(cycles)} members, {cfg.epochs} "
            f"epochs (first cycle {cycles[0].epochs}, last {cycles[-1].epochs}), {sum(c.distilled for c in cycles)} "
            f"members distilled",
            f"steps: {sum(c.steps for c in cycles)} of {cfg.batch_tokens} tokens ({cfg.edge_batch_tokens} at the "
            f"edges), {tokens} tokens in all, {corpus_tokens} an epoch",
            f"parameters: {params}; FLOPs per token: {model:.4g} training, {teacher:.4g} teacher"
            ], sum(run_flops(cfg, plan, vocab_size, population).values())

def command_train(argv):
    """Train, or go on with a run after it was stopped, in as many processes as torchrun started."""
    cfg, why, args = parse_config(
        argv, run=dict(metavar="NAME", help="name of the run under logs/ [a timestamp]; under torchrun say --name"),
        resume=dict(metavar="RUN", help="go on with a run that was stopped, with its own settings"))
    Stopped.signal = 0
    before = {number: signal.signal(number, Stopped.heard) for number in (signal.SIGTERM, signal.SIGINT)
              if signal.getsignal(number) != signal.SIG_IGN}  # as nohup and background jobs leave it
    try:
        with set_up_world(cfg) as world:
            run(cfg, why, args, world)
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in before.items():
            signal.signal(number, handler)

def run(cfg, why, args, world):
    """Train and report, as one of the processes of `world`."""
    name = world.from_first(args.resume or args.run or datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    folder, data = find_run(name) if args.resume else LOGS / name, find_data(cfg)
    if not args.resume and (Path(name).name != name or name in (".", "..")):
        raise UserError(f"--run {name} must be a plain name: the run is written to logs/NAME")
    if world.from_first(bool(args.resume) and (folder / "result.json").exists()):
        print(f"{name} is complete: {folder}\n" * world.first, end="")
        return
    if world.first and not args.resume and folder.exists() and any(f.suffix != ".tmp" for f in folder.iterdir()):
        raise UserError(f"run directory {folder} exists: give another --run name, or --resume {name} to go on with it")
    if world.first and not (data / "manifest.json").exists() and cfg.data == Config.data:
        print(f"{data} is missing: preparing the default corpus (python data/prepare.py wiki)", flush=True)
        done = subprocess.run([sys.executable, ROOT / "data/prepare.py", "wiki"], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            why_not = (done.stderr.strip() or "data/prepare.py failed").splitlines()[-1]
            raise UserError(why_not.removeprefix("prepare.py: error: "))
    world.from_first(None)  # the others wait for the data
    corpus = load_corpus(data, cfg.seq_len, cfg.train_tokens)
    population = load_teacher(cfg, corpus.vocab_size, world.device)
    if population:
        corpus.hashes["teacher"] = hashlib.sha256(population.heldout[population.members].tobytes()).hexdigest()
    world.agree(corpus.hashes)
    lines, _ = describe(cfg, why, corpus.train_sequences * cfg.seq_len, corpus.vocab_size, population)
    if world.size * world.groups > 1:
        lines.append(f"processes: {world.groups} groups of {world.size}, one trajectory each at a time")
    about = {"command": " ".join(sys.argv), "time": datetime.datetime.now().isoformat(timespec="seconds"),
             "machine": machine(world), "config": asdict(cfg), "data": {"name": corpus.name, **corpus.hashes}}
    log, saved, path = Log(), {}, folder / (f"log_trajectory{world.index}.txt" if world.index else "log.txt")
    if world.first or os.environ.get("LOCAL_RANK") == "0":  # a machine of its own may have a disk of its own
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "run.json").exists():
            save_json(folder / "run.json", about)
            (folder / "data").mkdir(exist_ok=True)  # what turns tokens into text, so that the run is of use by itself
            for file in ("manifest.json", "tokenizer.tiktoken"):
                if (data / file).exists():
                    write_atomically(folder / "data" / file, functools.partial(shutil.copyfile, data / file))
    if world.leader:
        (folder / "predictions").mkdir(parents=True, exist_ok=True)
        log = Log(path, show=world.first)
    world.agree({})  # waits for all: what is half-written now is not being written by another machine
    for half_written in folder.rglob("*.tmp") if world.first else ():  # by a process that was killed
        half_written.unlink()
    world.from_first(None)  # from here on all write
    if world.leader:
        identity = {**method_settings(cfg), **corpus.hashes}
        saved, ends = {j: load_state(folder / "state", j, identity) for j in range(cfg.trajectories)}, {}
        for at, _ in filter(None, saved.values()):
            ends[at.log[0]] = max(ends.get(at.log[0], []), at.log[1:])
        log.start(json.dumps(about, indent=1) + "\n" + "\n".join(lines), ends.pop(path.name, None))
        for other, sizes in ends.items() if world.groups == 1 else ():  # of trajectories that had a group of their own
            Log(folder / other).start("", sizes)
    saved = world.from_first({j: state for j, state in saved.items() if state}, leader=True)
    if saved:
        where = {j: "is done" if at.done else f"at step {at.step}" for j, (at, _) in saved.items()}
        lines = [f"resuming {name}: " + ", ".join(f"trajectory {j} {at}" for j, at in where.items())]
    if world.first:
        print("\n".join(lines), flush=True)
    result = train(cfg, corpus, world, folder, log, saved, population)
    if world.first:
        log.line("\n".join(format_table(result["table"], cfg.report)))
        key, flops, gpu = f"final_{cfg.report}_loss", sum(result["flops"].values()), about["machine"]["gpu"]
        speed = flops / result["train_seconds"]
        mfu = {"mfu": speed / (H100_FLOPS * world.size * world.groups)} if "H100" in gpu or "H200" in gpu else {}
        efficiency = data_efficiency(result[key]) if corpus.name in ("fineweb", "slowrun") else "n/a"
        log.event(**{key: result[key]}, members=result["members"], k=result["members"], epochs=cfg.epochs,
                  data_efficiency=efficiency, flops=flops, teacher_flops=result["flops"]["teacher"],
                  tflops=speed / 1e12, **mfu, train_time=f"{result['total_seconds']:.0f}s",
                  peak_memory=f"{result['peak_memory_mb'] or math.nan:.0f}MB")
        draw_curve(folder / "curve.png", result, cfg.report)
        save_json(folder / "result.json", {**result, **about})  # last: it says that the run is complete
        print(f"written to {folder}", flush=True)

def command_beside(module, name, argv):
    """A command that does not train: records/MODULE.py has it, and imports this module. Raises UserError without it."""
    if not (ROOT / f"records/{module}.py").exists():
        raise UserError(f"{name} is in records/{module}.py, which is not beside {Path(__file__).name}: run it there")
    sys.modules.setdefault("train_q0", sys.modules[__name__])
    sys.path.insert(0, str(ROOT / "records"))
    getattr(__import__(module), name)(argv)

COMMANDS = {"train": command_train, "plan": functools.partial(command_beside, "plan", "plan"),
            **{name: functools.partial(command_beside, "use", name) for name in (
                "select", "evaluate", "sample", "average", "pool")}}

def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS[argv.pop(0) if argv and argv[0] in COMMANDS else "train"]
    rank = int(os.environ.get("RANK", 0))
    try:
        command(argv)
    except (UserError, OSError) as e:
        time.sleep(2 * (rank > 0))  # a mistake that all ranks see is told by rank 0, whose end stops the others
        print(f"train_q0.py: error: {'' if not rank else f'rank {rank}: '}{e}", file=sys.stderr)
        return 2
    except Stopped:
        print("stopped; its state is saved: go on with --resume and the run's name", file=sys.stderr)
        return 128 + Stopped.signal
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e):
            print(f"rank {rank} failed:", file=sys.stderr)  # a bug: say whose it is and let the traceback through
            raise
        print(f"train_q0.py: error: rank {rank} is out of memory: halve --micro-batch (plan shows what a run needs): "
              f"{' '.join(str(e).split())[:150]}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.exit(main())
