"""Plain code against fast code, on whatever machine this runs: median times, ratios, memory.

    python records/bench.py               what a CPU can run, about 9 minutes on 2 idle cores; or some
    python records/bench.py loss prior    of loss optimizer attention compiled step scaling prior text
                                          model
    python records/bench.py --gpu         all that needs a GPU, in 8 minutes; or some of
                                          tests small loss products attention evaluation q0
    python records/bench.py --out b.md    also to a file, row by row, and to b.json
    python records/bench.py --small       miniature sizes, to see that this script runs: the numbers
                                          mean nothing. With --gpu it needs no GPU, but
                                          TRITON_INTERPRET=1 for the kernels

Versions take turns (a, b, a, b, ...) and the median of their repeats is shown. Ratios are of times:
"plain / x" above 1 says that x is faster. Each section is a process of its own: one that fails,
hangs or crashes ends alone.
"""
import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, record_function

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # run as a file, Python looks for modules in records/ alone
    sys.path.insert(0, str(ROOT))
import train_q0 as q
from records import cost, plan
from records.flops import flops_per_token
from records.launch import machine
from records.mixture import Mixture, Text

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GPU_SECONDS = 470  # for all sections of --gpu
SMALL = False
CPU = {}  # name: Section
GPU = {}
OPEN = ("several GPUs (NCCL): whole steps, scaling", "whole runs of the presets small and q0")


@dataclass
class Section:
    """A generator of titles and notes (text) and rows (dicts); how many seconds it may take."""
    function: object
    seconds: float

    @property
    def title(self):
        return self.function.__doc__


def section(seconds):
    def register(function):
        name = function.__name__
        table = GPU if name.startswith("gpu_") else CPU
        table[name.removeprefix("gpu_")] = Section(function, seconds)
        return function
    return register


def pick(full, small):
    return small if SMALL else full


# Measuring --------------------------------------------------------------------------------------

def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def timed(function, calls=1):
    """Seconds a call, the device's work included."""
    synchronize()
    mark = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - mark) / calls


def median(xs):
    return statistics.median(xs) if xs else math.nan


@dataclass
class Comparison:
    """Seconds of each repeat of each version, and notes on those that do not run."""
    repeats: dict
    notes: list

    @property
    def times(self):
        """{version: median seconds}; NaN where it does not run."""
        return {name: median(xs) for name, xs in self.repeats.items()}

    def rows(self, about, more=None):
        """The notes, then a row: what it is about, medians, the first one's over each other's."""
        yield from self.notes
        times = self.times
        plain, *others = times
        row = dict(about)
        for name, seconds in times.items():
            row[f"{name} ms"] = 1000 * seconds
        for name in others:
            row[f"{plain} / {name}"] = times[plain] / times[name]
        row |= more or {}
        row["repeats"] = min((len(xs) for xs in self.repeats.values() if xs), default=0)
        yield row


def compare(versions, seconds=2.0, least=3, warm=True):
    """The Comparison of {name: function}. Calls shorter than 20 ms are timed several at a time."""
    found = Comparison({name: [] for name in versions}, [])
    calls = {}
    end = time.perf_counter() + pick(seconds, 0)
    for name, function in versions.items():
        try:
            if warm:
                function()
            first = timed(function)
        except Exception as e:
            found.notes.append(f"{name} does not run: {q.one_line(e)}")
            continue
        calls[name] = max(1, min(100, round(0.02 / first)))
        if calls[name] == 1:
            found.repeats[name].append(first)
    while calls:
        fewest = min(len(found.repeats[name]) for name in calls)
        if fewest >= pick(least, 1) and time.perf_counter() >= end:
            break
        for name, n in calls.items():
            found.repeats[name].append(timed(versions[name], n))
    return found


def resident(name):
    """Bytes of this process's memory, of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])


@dataclass
class Memory:
    """Bytes: the peak above what was held before, less the tensors returned; and these."""
    extra: float = math.nan
    output: float = math.nan


def peak_memory(function):
    """The Memory of a call that returns tensors. CPU: resident memory, so the process should return
    freed memory; GPU: of torch's allocator."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = function()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        except OSError:  # not Linux, or not permitted
            return Memory()
        before = resident("VmRSS")
        out = function()
        peak = resident("VmHWM")
    output = sum(x.nbytes for x in out)
    return Memory(peak - before - output, output)


def without_kernels(function):
    def plain():
        changed = dict(use_triton=lambda device_type: False, CHUNK_LOGITS=q.GPU_CHUNK_LOGITS)
        with mock.patch.multiple(q, **changed):
            return function()
    return plain


def set_malloc(**options):
    """M_TRIM_THRESHOLD -1, M_MMAP_THRESHOLD -3, M_MMAP_MAX -4 of glibc."""
    numbers = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}
    if sys.platform == "linux":
        for name, value in options.items():
            ctypes.CDLL(None).mallopt(numbers[name], value)


def settings(preset="tiny", **changes):
    cfg, _ = q.resolve(q.Config(**{**q.PRESETS[preset], "preset": preset, **changes}))
    return cfg


# Loss, optimizer, attention ---------------------------------------------------------------------

def plain_loss(hidden, head, targets, softcap, teacher, weight, temperature):
    """(loss, cross-entropy) of whole logits, by autograd."""
    x = q.soft_capped(hidden @ head.T, softcap)
    ce = F.cross_entropy(x, targets)
    loss = ce
    for _, states, of in teacher:  # one or none
        y = q.soft_capped(states @ of.T, softcap)
        log_p = (y / temperature).log_softmax(-1)
        log_q = (x / temperature).log_softmax(-1)
        kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q).mean()
        loss = (1 - weight) * ce + weight * temperature ** 2 * kl
    return loss, ce


@dataclass(frozen=True)
class LossCase:
    """Sizes of a loss; `dtype` is that of hidden states, the head's is float32, as in training."""
    tokens: int
    vocab: int
    width: int
    dtype: torch.dtype
    taught: bool

    def versions(self, plain_loss=plain_loss):
        """{name: function that returns the gradients by hidden states and head}."""
        torch.manual_seed(0)

        def draw(n, size, dtype):
            values = size * torch.randn(n, self.width, device=DEVICE)
            return values.to(dtype)

        hidden = draw(self.tokens, 1, self.dtype).requires_grad_()
        head = draw(self.vocab, 0.05, torch.float32).requires_grad_()
        targets = torch.randint(self.vocab, (self.tokens,), device=DEVICE)
        teacher = []
        if self.taught:
            states = draw(self.tokens, 1, self.dtype)
            teacher.append((1.0, states, draw(self.vocab, 0.05, self.dtype)))
        rest = (targets, 15.0, teacher, 0.45 if self.taught else 0.0, 1.2)

        def plain():
            loss, _ = plain_loss(hidden, head.to(self.dtype), *rest)
            return torch.autograd.grad(loss, (hidden, head))

        def chunked():
            loss, _ = q.ChunkedLoss.apply(hidden, head.to(self.dtype), self.vocab, *rest)
            return torch.autograd.grad(loss, (hidden, head))
        return {"plain": plain, "chunked": chunked}


def chunk_sizes(name, exponents, case):
    """The chunked loss with other values of the constant `name`."""
    yield (f"### {name} (now {getattr(q, name):,}): {case.tokens:,} tokens x {case.vocab:,} x "
           f"{case.width}, {case.dtype}, teacher: {case.taught}")
    chunked = case.versions()["chunked"]

    def sized(n):
        with mock.patch.object(q, name, 2 ** n):
            return chunked()

    versions = {n: functools.partial(sized, n) for n in exponents}
    found = compare(versions, seconds=0, least=2)
    yield from found.notes
    for n, seconds in found.times.items():
        rows = max(1, min(case.tokens, 2 ** n // case.vocab))
        row = {name: f"2**{n}", "rows": rows, "ms": 1000 * seconds}
        if CUDA and found.repeats[n]:
            row["extra MB"] = peak_memory(versions[n]).extra / 1e6
        yield row


@section(400)
def loss():
    """Loss: plain_loss + autograd against ChunkedLoss, forward + backward"""
    sizes = pick((4096, 50257, 768), (1024, 8000, 16))
    cases = []
    for dtype in pick((torch.bfloat16, torch.float32), (torch.float32,)):
        for taught in pick((False, True), (True,)):
            cases.append(LossCase(*sizes, dtype, taught))
    set_malloc(mmap_max=2 ** 16, mmap_threshold=2 ** 16)  # resident memory is memory in use
    memory = {}
    for case in cases:
        small = LossCase(64, 1000, 64, case.dtype, case.taught)
        for version in small.versions().values():  # so that the libraries' code is loaded
            version()
    for case in cases:
        memory[case] = {name: peak_memory(f) for name, f in case.versions().items()}
    set_malloc(mmap_max=0, trim_threshold=2 ** 31 - 1)  # freed memory is kept, as in training
    yield "### {:,} tokens x vocabulary {:,} x width {}".format(*sizes)
    for case, found in memory.items():
        plain = found["plain"]
        chunked = found["chunked"]
        measured = {
            "plain extra MB": plain.extra / 1e6,
            "chunked extra MB": chunked.extra / 1e6,
            "chunked / plain memory": chunked.extra / plain.extra,
            "gradients MB": plain.output / 1e6}
        about = {"hidden": str(case.dtype), "teacher": case.taught}
        times = compare(case.versions(), seconds=15, least=1, warm=False)
        yield from times.rows(about, measured)
    yield ("Extra memory: peak of resident memory (VmHWM, reset before the call) above that with "
           "the inputs in place, less the gradients by hidden states and head, which are output; "
           "in a process that returns freed memory. The head is float32, as in training. Plain "
           "takes its softmax in the precision of hidden, ChunkedLoss in float32.")
    tokens, vocab, width = sizes
    case = LossCase(pick(1536, 64), vocab, width, torch.bfloat16, False)
    yield from chunk_sizes("CHUNK_LOGITS", pick(range(20, 27), (12, 22)), case)


def prepared(shape):
    """Random matrices as Muon hands them to polar_express: at most as many rows as columns."""
    X = torch.randn(shape)
    X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True))
    return X.bfloat16()


@section(200)
def optimizer():
    """Optimizer: stacks of matrices against loops over single ones"""
    yield "### polar_express, bfloat16: a call a matrix against a call a bank"
    for shape in pick([(20, 128, 128), (8, 128, 384), (8, 768, 768)], [(3, 16, 32)]):
        X = prepared(shape)

        def single():
            return [q.polar_express(x[None]) for x in X]

        versions = {"single": single, "bank": functools.partial(q.polar_express, X)}
        yield from compare(versions).rows({"X": str(shape)})
    training = Training(tiny(), q.World(), vocab=pick(2048, 128))
    yield "### An update of tiny"
    about = {"banks": len(training.optimizer.banks)}
    yield from compare({"update": training.update}).rows(about)


def attention_row(names, cfg, window, inputs, gradient):
    """Notes and the row of one window."""
    def passes(attend):
        return torch.autograd.grad(attend(*inputs), inputs, gradient)

    versions = {}
    for name in names:
        try:
            kernel = q.ATTENTION[name](cfg, DEVICE, window)
            versions[name] = functools.partial(passes, kernel)
        except Exception as e:
            yield f"{name} does not run: {q.one_line(e)}"
    B, H, T, K = gradient.shape
    visible = window * (window + 1) / 2 + (T - window) * window
    flops = 12 * B * H * K * visible  # 3 x forward
    found = compare(versions, seconds=1.0)
    ran = [seconds for seconds in found.times.values() if seconds == seconds]
    best = min(ran, default=math.nan)
    yield from found.rows({"window": window}, {"best TFLOP/s": flops / 1e12 / best})


def attention_rows(names, shapes, **machine):
    for B, T, H, K in shapes:
        yield f"### bfloat16, forward + backward: B {B}, T {T}, heads {H} of {K}"
        cfg = settings(
            seq_len=T, head_dim=K, width=H * K, windows="SL", batch_tokens=T, micro_batch=1,
            precision="bfloat16", **machine)
        draws = torch.randn(4, B, T, H, K, device=DEVICE, dtype=torch.bfloat16).transpose(2, 3)
        *inputs, gradient = draws.unbind()
        for x in inputs:
            x.requires_grad_()
        for window in (T // 2, T):
            yield from attention_row(names, cfg, window, inputs, gradient)


@section(200)
def attention():
    """Attention: plain against sdpa and, where it runs, FlexAttention"""
    names = pick(("plain", "sdpa", "flex"), ("plain", "sdpa"))
    shapes = pick([(8, 256, 2, 64), (2, 1024, 2, 64)], [(1, 32, 2, 16)])
    yield from attention_rows(names, shapes, device="cpu")


# Training steps ---------------------------------------------------------------------------------

MINIATURE = dict(
    layers=2, width=64, head_dim=32, mlp_hidden=64, seq_len=32, micro_batch=1, batch_tokens=64)


def tiny(**changes):
    return settings(**{**pick({}, MINIATURE), "device": "cpu", **changes})


class Training:
    """A model of random weights, perhaps a teacher, and random tokens, in the training step of
    train()."""
    def __init__(self, cfg, world, vocab=2048, taught=False):
        self.cfg = cfg
        self.world = world
        self.taught = taught
        corpus = SimpleNamespace(vocab_size=vocab)
        run = SimpleNamespace(folder=Path())
        self.trainer = q.Trainer(cfg, corpus, world, run)
        self.optimizer = self.trainer.optimizer
        teacher = dict(self.trainer.newest.named_parameters())
        for weights in (self.optimizer.masters, teacher):
            q.init_weights(self.trainer.student.table, weights, "bench")
        self.optimizer.refresh()
        self.count = cfg.batch_tokens // (cfg.seq_len * cfg.micro_batch)
        self.trainer.share.fill_(1 / self.count)
        shape = (cfg.micro_batch, cfg.seq_len + 1)
        self.tokens = torch.randint(vocab, shape, device=world.device)
        self.flops, teacher = flops_per_token(cfg, vocab)  # a token
        if taught:
            self.flops += teacher

    def micro(self):
        self.trainer.tokens.copy_(self.tokens)
        self.trainer.micro_batch[self.taught]()

    def update(self):
        with record_function("bench: optimizer"):
            self.optimizer.step(0.1, 1.0)

    def step(self):
        for _ in range(self.world.rank, self.count, self.world.size):
            self.micro()
        self.update()


@section(300)
def compiled():
    """Whole step of tiny: eager against torch.compile, from a cold cache"""
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache))
        world = stack.enter_context(q.set_up_world(tiny()))
        for taught in (False, True):
            steps = {}
            first = {}
            for name in ("eager", "compiled"):
                training = Training(tiny(compile=name == "compiled"), world, taught=taught)
                steps[name] = training.step
                first[f"first step, {name} s"] = timed(training.step)
            yield from compare(steps, seconds=8).rows({"teacher": taught}, first)
    yield ("The second row finds in the cache what the first one compiled and both need, such as "
           "the optimizer.")


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv")
OF_ATTENTION = (
    "aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data")


def group_of(event):
    """What a profiled operation belongs to: by what it ran for, then by what it is."""
    names = []
    above = event
    while above is not None:
        names.append(above.name)
        above = above.cpu_parent
    product = event.name in PRODUCTS
    if event.name == "bench: step":
        return "Python between operations"
    if "bench: batch" in names:
        return "batch preparation"
    if "bench: optimizer" in names:
        return "optimizer: products" if product else "optimizer: the rest"
    if any("ChunkedLoss" in name for name in names):
        return "loss: products" if product else "loss: softmax and other pointwise"
    if event.name in OF_ATTENTION or any("scaled_dot_product" in name for name in names):
        return "attention"
    return "model: products" if product else "model: norms, rotary, other pointwise"


def profiled(function, count):
    """{group: its share of the time in percent} of so many calls."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
        for _ in range(count):
            function()
    found = {}
    for event in profile.events():
        group = group_of(event)
        found[group] = found.get(group, 0) + event.self_cpu_time_total
    whole = sum(found.values())
    return {group: 100 * part / whole for group, part in found.items()}


class Steps:
    """Whole steps on batches of random documents."""
    def __init__(self, cfg, world, taught):
        rng = np.random.default_rng(0)
        documents = []
        for n in rng.integers(50, 500, pick(600, 20)):
            documents.append(rng.integers(2048, size=n, dtype=np.uint16))
        self.corpus = q.Corpus("random", 2048, {}, {}, tuple(documents), cfg.seq_len)
        self.training = Training(cfg, world, taught=taught)
        self.rows = cfg.batch_tokens // cfg.seq_len
        self.done = 0

    def __call__(self):
        with record_function("bench: step"):
            with record_function("bench: batch"):
                rows = self.corpus.batch(0, 0, self.done * self.rows, self.rows)
                batch = torch.from_numpy(rows)
            self.done += 1
            self.training.tokens = batch[:self.training.cfg.micro_batch]
            self.training.step()


@section(200)
def step():
    """Where a step of tiny spends its time"""
    cfg = tiny()
    a = torch.randn(1024, 1024).to(getattr(torch, cfg.precision))
    peak = 2 * 1024 ** 3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=10))
    yield (f"### {cfg.batch_tokens:,} tokens, {cfg.precision}; a product of 1024 x 1024 reaches "
           f"{peak / 1e9:.0f} GFLOP/s")
    shares = {}
    with q.set_up_world(cfg) as world:
        for taught in (False, True):
            steps = Steps(cfg, world, taught)
            found = compare({"step": steps}, seconds=6)
            seconds = found.times["step"]
            speed = steps.training.flops * cfg.batch_tokens / seconds
            more = {
                "tokens/s": cfg.batch_tokens / seconds,
                "GFLOP/s": speed / 1e9,
                "share of the product's": speed / peak}
            yield from found.rows({"teacher": taught}, more)
            shares[f"teacher: {taught}"] = profiled(steps, pick(10, 2))
    yield "### Its share by operation (torch.profiler, which slows small operations)"
    taught = shares["teacher: True"]
    for group in sorted(taught, key=taught.get, reverse=True):
        row = {"operation": group}
        for name, found in shares.items():
            row[name] = f"{found.get(group, 0):.1f}%"
        yield row


def tokens_per_second(changes):
    """Printed by rank 0, of as many processes as torchrun started."""
    cfg = tiny(**changes)
    with q.set_up_world(cfg) as world:
        training = Training(cfg, world)
        training.step()
        wanted = max(2, round(pick(3, 0) / timed(training.step)))
        count = world.largest(wanted)  # all ranks take as many steps
        seconds = median([timed(training.step) for _ in range(count)])
        if world.rank == 0:
            print(json.dumps({"tokens/s": cfg.batch_tokens / seconds}), flush=True)


@dataclass(frozen=True)
class Shape:
    """A step of tiny, by so many processes of so many threads."""
    width: int = 128
    seq_len: int = 256
    processes: int = 1
    threads: int = min(2, os.cpu_count())


SHAPES = (
    Shape(), Shape(width=256), Shape(width=512), Shape(seq_len=512), Shape(seq_len=1024),
    Shape(threads=1), Shape(processes=2, threads=1))


@section(300)
def scaling(shapes=SHAPES):
    """Scaling of tiny's step: width, sequence, threads, processes; eager, 2 micro-batches"""
    base = None
    for shape in shapes:
        T = shape.seq_len
        changes = dict(
            width=shape.width, mlp_hidden=3 * shape.width, seq_len=T,
            micro_batch=pick(max(1, 1024 // T), 1), batch_tokens=pick(2048, 2 * T))
        command = [sys.executable]
        if shape.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone",
                        f"--nproc_per_node={shape.processes}"]
        command += [__file__, "--steps", json.dumps(changes), *pick([], ["--small"])]
        env = {**os.environ, "OMP_NUM_THREADS": str(shape.threads)}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            yield f"{shape}: {' '.join(done.stderr.split())[-300:]}"
            continue
        speed = json.loads(lines[0])["tokens/s"]
        base = base or speed
        flops, _ = flops_per_token(tiny(**changes), 2048)
        yield {
            "width": shape.width,
            "sequence": T,
            "processes x threads": f"{shape.processes} x {shape.threads}",
            "tokens/s": speed,
            "it / first row": speed / base,
            "GFLOP/s": speed * flops / 1e9}


# Prior ------------------------------------------------------------------------------------------

def synthetic_members(M, N):
    """p(true token) [M, N], float32: a difficulty that all share, noise that neighbours share in
    part, noise of their own; later members are better."""
    generator = torch.Generator().manual_seed(0)
    difficulty = 4 * torch.empty(N).exponential_(generator=generator)
    shared = torch.randn(N, generator=generator)
    P = torch.empty(M, N)
    for m in range(M):
        shared = 0.9 * shared + 0.19 ** 0.5 * torch.randn(N, generator=generator)
        own = 0.2 * torch.randn(N, generator=generator)
        nats = difficulty + 0.4 * shared + own + 0.3 * math.exp(-5 * m / M)
        P[m] = nats.clamp_(1e-3, 20).neg_().exp_()
    return P


def certified(P, w):
    """(loss, gap) of weights w in float64: F(w) - min F <= gap = log(max_i g_i)."""
    w = w.double()
    total = 0.0
    g = 0.0
    for p in P.double().split(8192, dim=1):
        mix = w @ p
        total += float(mix.log().sum())
        g = g + p @ mix.reciprocal_()
    N = P.size(1)
    return -total / N, float((g / N).max().log())


def by_fit_prior(P):
    w, _ = q.fit_prior(P.numpy())
    return torch.from_numpy(w), "-"


def by_em(P, seconds):
    """(weights, passes) of expectation maximisation, up to a gap of 1e-4."""
    w = torch.full((len(P),), 1 / len(P))
    end = time.perf_counter() + seconds
    passes = 0
    while True:
        g = P @ (w @ P).reciprocal_() / P.size(1)
        passes += 1
        if float(g.max().log()) < 1e-4 or time.perf_counter() > end:
            return w, passes
        w = w * g
        w /= w.sum()


def by_adamw(P, steps):
    logits = torch.zeros(len(P), requires_grad=True)
    adamw = torch.optim.AdamW([logits], lr=0.5, weight_decay=0.0)
    for _ in range(steps):
        adamw.zero_grad()
        mixed = logits.softmax(0) @ P
        mixed.log().mean().neg().backward()
        adamw.step()
    return logits.detach().softmax(0), steps


@section(300)
def prior():
    """Prior: fit_prior against EM and AdamW on softmax logits"""
    M, N = pick((480, 131_072), (12, 2048))
    seconds = pick(30, 1)
    before = torch.get_num_threads()
    threads = min(2, before)
    torch.set_num_threads(threads)
    P = synthetic_members(M, N)
    yield f"### {M} synthetic members x {N:,} tokens, {threads} threads"
    methods = {
        "fit_prior": by_fit_prior,
        f"EM to a gap of 1e-4, at most {seconds} s": functools.partial(by_em, seconds=seconds),
        "AdamW on softmax logits, lr 0.5": functools.partial(by_adamw, steps=pick(300, 30))}
    best = None
    for name, method in methods.items():
        mark = time.perf_counter()
        w, passes = method(P)
        spent = time.perf_counter() - mark
        loss, gap = certified(P, w)
        best = best or loss
        yield {
            "method": name,
            "s": spent,
            "passes": passes,
            "loss": f"{loss:.7f}",
            "certified gap": gap,
            "loss - fit_prior's": loss - best,
            "weights >= 0.001": int((w >= 0.001).sum())}
    torch.set_num_threads(before)


# Text -------------------------------------------------------------------------------------------

def mixture_of(folder, K, samples):
    """A Mixture of K members of `tiny` of random weights, whose files go to `folder`."""
    vocab = pick(2048, 128)
    for k in range(K):
        model = q.GPT(tiny(), vocab)
        weights = dict(model.named_parameters())
        q.init_weights(model.table, weights, "bench", k)
        q.save_member(folder / f"members/{k}", model.cfg, vocab, weights, {})
    members = list(range(K))
    return Mixture(
        folder, members, weights=[1 / K] * K, heldout=np.ones((K, 1)), kept=members,
        device=torch.device("cpu"), gate=None, manifest={"vocab_size": vocab}, encoding=None,
        samples=samples)


def text_versions(mixture):
    """{name: function that writes at full context}: one token of each sample, or half a context of
    them, in which the window moves once."""
    T = mixture.models[0].cfg.seq_len
    samples = mixture.samples
    tokens = torch.randint(mixture.models[0].vocab_size, (samples, T))
    texts = [Text(None, i) for i in range(samples)]
    reader = mixture.reader()
    reader.read(tokens[:1])
    reader.repeat(samples)

    def draw(log_p):
        return torch.tensor([[text.draw(row, 1.0, 1.0)] for text, row in zip(texts, log_p)])

    def uncached():
        draw(mixture.log_probs(tokens)[:, -1])

    def cached():
        drawn = tokens[:, :1]
        for _ in range(T // 2):
            drawn = draw(reader.read(drawn))

    return {"uncached": uncached, "cached": cached}


def text_row(mixture):
    """Tokens a second of all samples together."""
    samples = mixture.samples
    half = mixture.models[0].cfg.seq_len // 2
    times = compare(text_versions(mixture), seconds=10).times
    row = {"members": len(mixture.members), "samples": samples}
    row["uncached tokens/s"] = samples / times["uncached"]
    row["cached tokens/s"] = samples * half / times["cached"]
    return row | {"cached / uncached": row["cached tokens/s"] / row["uncached tokens/s"]}


@section(400)
def text():
    """Text of tiny at full context: all of it for each token against cached keys and values"""
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for K, samples in pick(((1, 1), (8, 1), (8, 8)), ((1, 1), (2, 2))):
            with tempfile.TemporaryDirectory() as folder:
                yield {"threads": threads, **text_row(mixture_of(Path(folder), K, samples))}
    torch.set_num_threads(before)


# Modelled: what an H100 would take --------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """A step to model, and what one H100 measured of it, without CUDA graphs."""
    preset: str
    changes: dict
    measured: dict = field(default_factory=dict)


LARGER_TINY = dict(
    train_tokens=0, layers=6, width=384, mlp_hidden=1024, batch_tokens=16384, micro_batch=64)
CASES = [
    Case("q0", {}, {"micro-batch ms": 434.8, "with teacher ms": 564.4, "update ms": 203.3}),
    Case("q0", dict(recompute=True)),
    Case("q0", dict(micro_batch=2), {
        "micro-batch ms": 257.7, "with teacher ms": 312.1, "update ms": 201.4}),
    Case("small", {}, {"micro-batch ms": 35.2, "with teacher ms": 47.8, "update ms": 11.9}),
    Case("tiny", LARGER_TINY, {
        "micro-batch ms": 13.0, "with teacher ms": 17.5, "update ms": 7.8})]
# milliseconds on an H100, of bench.py --gpu, 2026-11-27
ORTHOGONALIZED = {
    (30, 2048, 2048): 11.5,
    (60, 5632, 2048): 55.5,
    (48, 768, 768): 1.69,
    (24, 2048, 768): 1.98}
SQUARED = {
    (4, 2048, 2048): 0.0934,
    (30, 2048, 2048): 0.758,
    (4, 2048, 5632): 0.26,
    (30, 2048, 5632): 1.97,
    (12, 768, 768): 0.0215,
    (36, 768, 768): 0.0578}
ATTENDED = {  # B, T, H, K, window
    (16, 1024, 12, 64, 512): 0.677,
    (16, 1024, 12, 64, 1024): 0.437,
    (4, 2048, 16, 128, 1024): 0.833,
    (4, 2048, 16, 128, 2048): 0.652}


def meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def attend_on_meta(B, T, H, K, window):
    attend = cost.attention(None, "meta", window)
    inputs = [meta(B, T, H, K) for _ in range(3)]
    torch.autograd.grad(attend(*inputs), inputs, meta(B, T, H, K))


def orthogonalize_on_meta(*shape):
    """What was measured under this name: casts and a norm, then polar_express."""
    G = torch.empty(shape, device="meta").bfloat16()
    X = G.mT if G.size(-2) > G.size(-1) else G
    norm = X.float().norm(dim=(-2, -1), keepdim=True)
    return q.polar_express(X / (1.02 * norm + 1e-6).bfloat16())


def square_on_meta(*shape):
    X = meta(*shape).detach()
    return X @ X.mT


def kernel_rows():
    measured = {
        "orthogonalize": (orthogonalize_on_meta, ORTHOGONALIZED),
        "X X^T": (square_on_meta, SQUARED),
        "attention": (attend_on_meta, ATTENDED)}
    for what, (function, sizes) in measured.items():
        for shape, ms in sizes.items():
            recorder = cost.Recorder()
            with cost.on_meta(recorder):
                part = cost.record(recorder, functools.partial(function, *shape))
            modelled = 1000 * part.seconds(graphed=True)
            yield {
                "what": f"{what} {shape}",
                "modelled ms": modelled,
                "measured ms": ms,
                "deviation": f"{modelled / ms - 1:+.1%}"}


def modelled_row(name, part, flops, measured):
    """A part of a step; flops 0: it has no MFU."""
    seconds = part.seconds()
    graphed = part.seconds(graphed=True)
    share = flops / plan.H100_FLOPS
    return {
        "part": name,
        "modelled ms": 1000 * seconds,
        "measured": measured.get(f"{name} ms", "-"),
        "MFU": share / seconds if flops else "-",
        "CUDA graphs, ms": 1000 * graphed,
        "their MFU": share / graphed if flops else "-",
        "kernels": len(part.kernels),
        "GB held": part.held / 1e9,
        "GB at the peak": part.peak / 1e9}


def modelled_rows(case, cfg, vocab, step):
    tokens = cfg.micro_batch * cfg.seq_len
    model, teacher = flops_per_token(cfg, vocab)
    yield modelled_row("micro-batch", step.micro_batch, tokens * model, case.measured)
    if step.taught is not None:
        yield modelled_row("with teacher", step.taught, tokens * (model + teacher), case.measured)
    yield modelled_row("update", step.update, 0, case.measured)
    count = cfg.batch_tokens // tokens
    speeds = []
    for graphed in (False, True):
        whole = count * step.micro_batch.seconds(graphed) + step.update.seconds(graphed)
        speeds.append(count * tokens / whole)
    yield {
        "micro-batches a step": count,
        "tokens/s": speeds[0],
        "tokens/s with CUDA graphs": speeds[1]}


@section(1200)
def model():
    """Modelled on an H100 (records/cost.py): kernels, a micro-batch and an update"""
    yield "### Kernels against bench.py --gpu, without launches"
    yield from kernel_rows()
    for case in pick(CASES, [Case("tiny", MINIATURE)]):
        cfg = settings(case.preset, precision="bfloat16", device="cpu", **case.changes)
        vocab = 2048 if case.preset == "tiny" else 50257
        step = cost.step(cfg, vocab, compile=not SMALL)
        yield f"### {case.preset} {case.changes or ''}"
        yield from modelled_rows(case, cfg, vocab, step)
        parts = {"micro-batch": step.taught or step.micro_batch, "update": step.update}
        for name, part in parts.items():
            for what, times, seconds in part.heaviest()[:10]:
                yield {
                    "ten heaviest of": name,
                    "operation": what,
                    "times": times,
                    "ms": 1000 * seconds}


# With a GPU -------------------------------------------------------------------------------------

@section(100)
def gpu_tests():
    """Kernels against the reference (tests/test_kernels.py, what runs on the device)"""
    chosen = "not interpreter and not sm_90a and not without_triton"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", chosen]
    command += [ROOT / "tests/test_kernels.py", *pick([], ["--collect-only"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    said = done.stdout.strip() or done.stderr.strip() or f"ended with {done.returncode}"
    lines = said.splitlines()
    yield {"pytest tests/test_kernels.py": lines[-1]}
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "E  ")):
            yield f"`{line[:200]}`"
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")


def step_row(cfg, vocab, taught, count, seconds):
    """Medians of a micro-batch and of the update; speeds of a step of `count` micro-batches."""
    with q.set_up_world(cfg) as world:
        training = Training(cfg, world, vocab, taught)
    first = timed(training.step)
    steps = []
    micros = []
    updates = []
    end = time.perf_counter() + pick(seconds, 0)
    while len(steps) < pick(3, 1) or time.perf_counter() < end:
        steps.append(timed(training.step))
        training.micro()  # makes the gradients that the next one adds to
        micros.append(timed(training.micro))
        updates.append(timed(training.update))
    micro = median(micros)
    update = median(updates)
    speed = count * cfg.micro_batch * cfg.seq_len / (count * micro + update)
    flops = speed * training.flops
    name = torch.cuda.get_device_name() if CUDA else ""
    mfu = flops / plan.H100_FLOPS if "H100" in name or "H200" in name else math.nan
    peak = torch.cuda.max_memory_allocated() if CUDA else math.nan
    return {
        "micro-batch ms": 1000 * micro,
        "optimizer ms": 1000 * update,
        f"{training.count} micro-batches + optimizer s": median(steps),
        f"tokens/s of {count} micro-batches + optimizer": speed,
        "TFLOP/s": flops / 1e12,
        "MFU of 989 TFLOP/s": mfu,
        "peak GB": peak / 1e9,
        "first step s": first}


def step_rows(preset, few, seconds, **small):
    """Steps of `few` micro-batches, eager and compiled; speeds as of the preset's batch."""
    sizes = pick({}, {**MINIATURE, **small})
    whole = settings(preset, **sizes)
    size = whole.micro_batch * whole.seq_len
    sizes |= dict(batch_tokens=pick(few, 2) * size, edge_batch_tokens=None)
    for compile, taught in ((False, False), (True, False), (True, True)):
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cfg = settings(preset, **sizes, compile=compile)
        count = whole.batch_tokens // size
        try:
            row = step_row(cfg, pick(50257, 300), taught, count, seconds)
        except Exception as e:
            yield f"compiled: {compile}, teacher: {taught}: {q.one_line(e)}"
            continue
        yield {"compiled": compile, "teacher": taught, **row}


@section(100)
def gpu_small():
    """Training step of preset small, one GPU"""
    yield from step_rows("small", 8, 3)


def rows_loss_rows(vocab, dtype):
    columns = 64 * math.ceil(vocab / 64)
    rows = pick(q.GPU_CHUNK_LOGITS // columns, 8)
    target = torch.randint(vocab, (rows,), device=DEVICE)
    scale = torch.full((rows,), 1 / rows, device=DEVICE)
    yield (f"### rows_loss on {rows:,} x {columns:,} logits: reads them twice, a teacher's too, and "
           "writes them once")
    rows_loss = q.rows_loss_in_triton if q.use_triton(DEVICE.type) else q.rows_loss_in_torch
    for taught in (False, True):
        z = torch.randn(rows, columns, device=DEVICE, dtype=dtype)
        teacher_z = torch.randn_like(z) if taught else None
        run = functools.partial(
            rows_loss, z, teacher_z, vocab, target, scale, 15.0, 0.45, 1.2)
        found = compare({"kernel": run}, seconds=0.5)
        passes = 5 if taught else 3
        speed = passes * z.nbytes / found.times["kernel"] / 1e9
        yield from found.rows({"teacher": taught}, {"GB/s": speed})


LOSS_SIZES = (  # tokens, width, teacher
    (4096, 2048, False), (8192, 2048, False), (16384, 2048, False), (16384, 2048, True),
    (4096, 768, False), (16384, 768, False), (16384, 768, True))


@section(110)
def gpu_loss():
    """Loss: plain_loss compiled, ChunkedLoss in torch, ChunkedLoss with its kernel"""
    vocab = pick(50257, 300)
    dtype = pick(torch.bfloat16, torch.float32)
    yield from rows_loss_rows(vocab, dtype)
    yield f"### Vocabulary {vocab:,}; extra memory: torch's allocator, above inputs and gradients"
    for tokens, width, taught in pick(LOSS_SIZES, [(32, 16, True)]):
        torch._dynamo.reset()
        case = LossCase(tokens, vocab, width, dtype, taught)
        found = case.versions(torch.compile(plain_loss, dynamic=False))
        versions = {
            "compiled plain": found["plain"],
            "torch": without_kernels(found["chunked"]),
            "kernel": found["chunked"]}
        times = compare(versions, seconds=0.5)
        memory = {}
        for name, version in versions.items():
            if CUDA and times.repeats[name]:
                memory[f"{name} extra MB"] = peak_memory(version).extra / 1e6
        about = {"tokens x width": f"{tokens} x {width}", "teacher": taught}
        yield from times.rows(about, memory)
    case = LossCase(pick(16384, 32), vocab, pick(2048, 16), dtype, True)
    yield from chunk_sizes("GPU_CHUNK_LOGITS", pick(range(24, 31), (12,)), case)


POLAR_SHAPES = ((30, 2048, 2048), (60, 2048, 5632), (48, 768, 768), (24, 768, 2048))


@section(50)
def gpu_polar_express():
    """polar_express"""
    for shape in pick(POLAR_SHAPES, [(1, 16, 32)]):
        X = prepared(shape).to(DEVICE, pick(torch.bfloat16, torch.float32))
        run = functools.partial(q.polar_express, X)
        yield from compare({"seconds": run}, seconds=0.4).rows({"X": str(shape)})


@section(60)
def gpu_attention():
    """Attention kernels"""
    names = pick(("plain", "sdpa", "flex"), ("plain", "sdpa"))
    shapes = pick([(16, 1024, 12, 64), (4, 2048, 16, 128)], [(1, 32, 2, 16)])
    yield from attention_rows(names, shapes)


@section(40)
def gpu_evaluation():
    """Evaluation pass (true_token_probs), eager"""
    vocab = pick(50257, 300)
    for preset, n in (("small", 128), ("q0", 16)):
        small = {**MINIATURE, "edge_batch_tokens": 64, "loop_passes": 1}
        cfg = settings(preset, **pick({}, small), compile=False)
        rng = np.random.default_rng(0)
        draws = rng.integers(vocab, size=(pick(n, 1), cfg.seq_len + 1))
        sequences = draws.astype(np.uint16)
        tokens = len(sequences) * cfg.seq_len
        with q.set_up_world(cfg) as world:
            member = Training(cfg, world, vocab, taught=True).trainer.newest
            fast = functools.partial(
                q.true_token_probs, member, sequences, cfg.micro_batch, world)
            found = compare({"torch": without_kernels(fast), "kernel": fast}, seconds=1.0)
            speed = {"tokens/s": tokens / found.times["kernel"]}
            yield from found.rows({"preset": preset, "tokens": tokens}, speed)


@section(300)
def gpu_q0():
    """Training step of preset q0, one GPU"""
    yield from step_rows("q0", 4, 5, layers=4, loop_first=1, loop_last=2, edge_batch_tokens=64)


# Running and reporting --------------------------------------------------------------------------

def shown(x):
    if not isinstance(x, float):
        return str(x)
    if math.isnan(x):
        return "-"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


class Output:
    """Markdown to stdout and a file as items come: rows (dicts; new columns begin a new table),
    titles and notes. The items themselves go to a JSON file beside it."""
    def __init__(self, path=None):
        self.path = Path(path) if path else None
        self.items = []
        self.columns = None
        if self.path:
            self.path.write_text("", encoding="utf-8")

    def add(self, item):
        if isinstance(item, dict):
            lines = []
            if list(item) != self.columns:
                lines = ["", f"| {' | '.join(item)} |", "|" + "---|" * len(item)]
            lines.append(f"| {' | '.join(map(shown, item.values()))} |")
            self.columns = list(item)
        else:
            lines = ["", item]
            self.columns = None
        print(*lines, sep="\n", flush=True)
        self.items.append(item)
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
            text = json.dumps(self.items, indent=1) + "\n"
            self.path.with_suffix(".json").write_text(text, encoding="utf-8")


def items(function):
    """What a section yields; in miniature nothing is compiled."""
    with contextlib.ExitStack() as stack:
        if SMALL:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield from function()


def run_section(flags, seconds, add):
    """Run one section in a process of its own and add what it yields. Returns what went wrong, or
    ""."""
    late = threading.Event()

    def stop():
        late.set()
        os.killpg(child.pid, signal.SIGKILL)

    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, __file__, "--child", *flags], stdout=subprocess.PIPE, stderr=errors,
            text=True, start_new_session=True)
        timer = threading.Timer(seconds, stop)
        timer.start()
        for line in child.stdout:
            with contextlib.suppress(ValueError):  # anything else that a library prints
                add(json.loads(line))
        code = child.wait()
        timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines() or ["no message"]
    if late.is_set():
        return f"stopped after {seconds:.0f} s"
    return f"ended with {code}: {said[-1][:300]}" if code else ""


def report(args, table):
    """Run sections and write what they yield. Returns {name: what went wrong}."""
    begun = time.perf_counter()
    flags = []
    if args.gpu:
        flags.append("--gpu")
    if SMALL:
        flags.append("--small")
    output = Output(args.out)
    output.add(" ".join(["# bench.py", *flags]))
    if SMALL:
        output.add("**These numbers mean nothing.**")
    about = {
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        **machine(q.World(device=DEVICE)),
        "triton": getattr(q.triton, "__version__", "none"),
        "cores": os.cpu_count(),
        "load before": " ".join(f"{x:.1f}" for x in os.getloadavg())}
    for name, value in about.items():
        output.add({"machine": name, "": value})
    failed = {}
    for name in args.names or table:
        mark = time.perf_counter()
        seconds = table[name].seconds
        if args.gpu and not SMALL:
            seconds = min(seconds, GPU_SECONDS - (mark - begun))
        output.add(f"## {table[name].title}")
        problem = "no time was left for it"
        if seconds > 15:
            problem = run_section([name, *flags], seconds, output.add)
        if problem:
            failed[name] = problem
            output.add(f"**{name} failed: {problem}**")
        output.add(f"({name}: {time.perf_counter() - mark:.0f} s)")
    output.add("## Open: what no GPU has measured in this run")
    measured = set()
    if args.gpu and CUDA:
        measured = set(args.names or table) - set(failed)
    for name in sorted(set(GPU) - measured):
        reason = failed.get(name, "needs --gpu on a machine with one")
        output.add({"what": GPU[name].title, "why": reason})
    for what in OPEN:
        output.add({"what": what, "why": "not part of this script"})
    return failed


def main(argv=None):
    global SMALL
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"{' '.join(CPU)}; with --gpu: {' '.join(GPU)} [all]"
    hidden = argparse.SUPPRESS
    parser.add_argument("names", nargs="*", metavar="SECTION", help=names)
    parser.add_argument("--gpu", action="store_true", help="all that needs a GPU")
    parser.add_argument("--out", metavar="FILE", help="markdown, as it comes; JSON beside it")
    parser.add_argument("--small", action="store_true", help="miniature sizes")
    parser.add_argument("--child", action="store_true", help=hidden)  # one, as JSON lines
    parser.add_argument("--steps", type=json.loads, help=hidden)
    args = parser.parse_args(argv)
    SMALL = args.small
    table = GPU if args.gpu else CPU
    unknown = [name for name in args.names if name not in table]
    if unknown:
        parser.error(f"{unknown[0]} is not one of: {' '.join(table)}")
    if args.steps:
        tokens_per_second(args.steps)
        return 0
    if args.child:
        for item in items(table[args.names[0]].function):
            print("\n" + json.dumps(item), flush=True)
        return 0
    if args.gpu and not CUDA and not SMALL:
        print("bench.py: --gpu needs a GPU, and torch sees none here", file=sys.stderr)
        return 2
    return 1 if report(args, table) else 0


if __name__ == "__main__":
    sys.exit(main())
