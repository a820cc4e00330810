"""Plain code against fast code, on whatever machine this runs: median times, ratios, memory.

    python tests/bench.py                 what a CPU can run, about 9 minutes on 2 idle cores; or some sections by name:
    python tests/bench.py loss prior      of loss optimizer attention compiled step scaling prior model
    python tests/bench.py --gpu           all that needs a GPU, in 8 minutes; or some of
                                          tests small loss products attention evaluation q0
    python tests/bench.py --out bench.md  also to a file, row by row, and to bench.json
    python tests/bench.py --small         miniature sizes, to see that this script runs: the numbers mean nothing.
                                          With --gpu it needs no GPU, but TRITON_INTERPRET=1 for the kernels

Versions take turns (a, b, a, b, ...) and the median of their repeats is shown. Ratios are of times: "plain / x" above 1
says that x is faster. Each section is a process of its own: one that fails, hangs or crashes ends alone.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402: after the path
import torch  # noqa: E402
from torch.profiler import record_function  # noqa: E402

import train_q0 as q  # noqa: E402
from records import cost  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GPU_SECONDS = 470  # for all sections of --gpu
SMALL = False
CPU, GPU = {}, {}  # name: (generator of titles, notes and rows; its most seconds)
OPEN = ("several GPUs (NCCL): whole steps, scaling", "whole runs of the presets small and q0")

def section(seconds):
    def register(f):
        (GPU if f.__name__.startswith("gpu_") else CPU)[f.__name__.removeprefix("gpu_")] = f, seconds
        return f
    return register

def pick(full, small):
    return small if SMALL else full

# ----------------------------------------------------------------------------------------------------------------------
# Measuring

def one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"

def timed(function, calls=1):
    """Seconds a call, the device's work included."""
    wait = torch.cuda.synchronize if CUDA else lambda: None
    wait()
    mark = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter() - mark) / calls

def compare(versions, seconds=2.0, least=3, warm=True):
    """({name: seconds of each repeat}, notes): a note and no repeats where one fails. Calls shorter than 20 ms are
    timed several at a time."""
    calls, repeats, notes, begun = {}, {name: [] for name in versions}, [], time.perf_counter()
    for name, function in versions.items():
        try:
            if warm:
                function()
            first = timed(function)
            calls[name] = max(1, min(100, round(0.02 / first)))
            repeats[name] += [first] * (calls[name] == 1)
        except Exception as e:
            notes.append(f"{name} does not run: {one_line(e)}")
    while calls and (min(len(repeats[n]) for n in calls) < pick(least, 1)
                     or time.perf_counter() < begun + pick(seconds, 0)):
        for name, n in calls.items():
            repeats[name].append(timed(versions[name], n))
    return repeats, notes

def median(xs):
    return statistics.median(xs) if xs else math.nan

def peak_extra(function):
    """(bytes held at the peak above those before the call, less those of the tensors returned; bytes of these).
    CPU: resident memory, so that the process should return freed memory; GPU: of torch's allocator."""
    def resident(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before, out = torch.cuda.memory_allocated(), function()
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        except OSError:  # not Linux, or not permitted
            return math.nan, math.nan
        before, out = resident("VmRSS"), function()
        peak = resident("VmHWM")
    output = sum(x.nbytes for x in out)
    return peak - before - output, output

def versus(about, versions, extra=lambda times: {}, memory=False, **how):
    """A row: `about`, each version's median, the first one's time over each other's, what `extra` makes of the medians;
    with `memory` the peaks of versions that return a sequence of tensors."""
    repeats, notes = compare(versions, **how)
    times = {name: median(xs) for name, xs in repeats.items()}
    peak = lambda name: peak_extra(versions[name])[0] / 1e6 if repeats[name] else math.nan
    plain, *others = times
    yield from notes
    yield {**about, **{f"{name} ms": 1000 * s for name, s in times.items()},
           **{f"{plain} / {name}": times[plain] / times[name] for name in others}, **extra(times),
           **{f"{name} extra MB": peak(name) for name in versions if memory},
           "repeats": min((len(xs) for xs in repeats.values() if xs), default=0)}

def without_kernels(function):
    def plain():
        with mock.patch.multiple(q, use_triton=lambda device_type: False, CHUNK_LOGITS=q.GPU_CHUNK_LOGITS):
            return function()
    return plain

def keep_freed_memory(keep):
    """As training does; or return all of it at once, so that resident memory is memory in use."""
    if sys.platform == "linux":
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1)) if keep else ((-4, 2 ** 16), (-3, 2 ** 16)):
            ctypes.CDLL(None).mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD; M_MMAP_MAX, M_MMAP_THRESHOLD

def settings(preset="tiny", **changes):
    return q.resolve(q.Config(**{**q.PRESETS[preset], "preset": preset, **changes}))[0]

# ----------------------------------------------------------------------------------------------------------------------
# Loss, optimizer, attention

def loss_versions(tokens, vocab, width, dtype, taught):
    """(plain, chunked): functions that return the gradients by hidden states (in `dtype`) and head (float32)."""
    torch.manual_seed(0)
    draw = lambda n, size, to: (size * torch.randn(n, width, device=DEVICE)).to(to)
    hidden, head = draw(tokens, 1, dtype).requires_grad_(), draw(vocab, 0.05, torch.float32).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=DEVICE)
    teacher = [(1.0, draw(tokens, 1, dtype), draw(vocab, 0.05, dtype))] if taught else []
    weight, gradients = 0.45 * taught, lambda found: torch.autograd.grad(found[0], (hidden, head))
    plain = lambda loss=q.plain_loss: gradients(loss(hidden, head.to(dtype), targets, 15.0, teacher, weight, 1.2))
    chunked = lambda: gradients(q.ChunkedLoss.apply(hidden, head.to(dtype), vocab, targets, 15.0, teacher, weight, 1.2))
    return plain, chunked

def chunk_sizes(name, exponents, tokens, vocab, width, dtype, taught):
    yield f"### {name} (now {getattr(q, name):,}): {tokens:,} tokens x {vocab:,} x {width}, {dtype}, teacher: {taught}"
    chunked = loss_versions(tokens, vocab, width, dtype, taught)[1]

    def sized(n):
        with mock.patch.object(q, name, 2 ** n):
            return chunked()

    versions = {n: functools.partial(sized, n) for n in exponents}
    repeats, notes = compare(versions, seconds=0, least=2)
    yield from notes
    for n, xs in repeats.items():
        rows = max(1, min(tokens, 2 ** n // vocab))
        yield {name: f"2**{n}", "rows": rows, "ms": 1000 * median(xs),
               **({"extra MB": peak_extra(versions[n])[0] / 1e6} if CUDA and xs else {})}

@section(400)
def loss():
    """Loss: plain_loss + autograd against ChunkedLoss, forward + backward"""
    tokens, vocab, width = size = pick((4096, 50257, 768), (1024, 8000, 16))
    cells = [(dtype, taught) for dtype in pick((torch.bfloat16, torch.float32), (torch.float32,))
             for taught in pick((False, True), (True,))]
    keep_freed_memory(False)
    for cell in cells:  # once in small, so that the libraries' code is loaded
        for version in loss_versions(64, 1000, 64, *cell):
            version()
    memory = {cell: [peak_extra(version) for version in loss_versions(*size, *cell)] for cell in cells}
    keep_freed_memory(True)
    yield f"### {tokens:,} tokens x vocabulary {vocab:,} x width {width}"
    for dtype, taught in cells:
        (p, output), (c, _) = memory[dtype, taught]
        versions = dict(zip(("plain", "chunked"), loss_versions(*size, dtype, taught)))
        measured = {"plain extra MB": p / 1e6, "chunked extra MB": c / 1e6, "chunked / plain memory": c / p,
                    "gradients MB": output / 1e6}
        yield from versus({"hidden": str(dtype), "teacher": taught}, versions, lambda times: measured, seconds=15,
                          least=1, warm=False)
    yield ("Extra memory: peak of resident memory (VmHWM, reset before the call) above that with the inputs in place, "
           "less the gradients by hidden states and head, which are output; in a process that returns freed memory. "
           "The head is float32, as in training. Plain takes its softmax in the precision of hidden, ChunkedLoss in "
           "float32.")
    yield from chunk_sizes("CHUNK_LOGITS", pick(range(20, 27), (12, 22)), pick(1536, 64), vocab, width, torch.bfloat16,
                           False)

def prepared(shape):
    """Random matrices as Muon hands them to polar_express: at most as many rows as columns."""
    X = torch.randn(shape)
    return (X / (1.02 * X.norm(dim=(-2, -1), keepdim=True))).bfloat16()

@section(200)
def optimizer():
    """Optimizer: stacks of matrices against loops over single ones"""
    yield "### polar_express, bfloat16: a call a matrix against a call a bank"
    for shape in pick([(20, 128, 128), (8, 128, 384), (8, 768, 768)], [(3, 16, 32)]):
        X = prepared(shape)
        yield from versus({"X": str(shape)}, {"single": lambda: [q.polar_express(x[None]) for x in X],
                                              "bank": lambda: q.polar_express(X)})
    training = Training(tiny(), q.World(), vocab=pick(2048, 128))
    yield "### An update of tiny"
    yield from versus({"banks": len(training.optimizer.banks)}, {"update": training.update})

def attention_rows(names, cases, **machine):
    for B, T, H, K in cases:
        yield f"### bfloat16, forward + backward: B {B}, T {T}, heads {H} of {K}"
        cfg = settings(seq_len=T, head_dim=K, width=H * K, windows="SL", batch_tokens=T, micro_batch=1,
                       precision="bfloat16", **machine)
        for window in (T // 2, T):
            kernels = {}
            for name in names:
                try:
                    kernels[name] = q.ATTENTION[name](cfg, DEVICE, window)
                except Exception as e:
                    yield f"{name} does not run: {one_line(e)}"
            *inputs, d = (torch.randn(B, T, H, K, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
            for x in inputs:
                x.requires_grad_()
            run = lambda attend: torch.autograd.grad(attend(*inputs), inputs, d)
            flops = 12 * B * H * K * (window * (window + 1) / 2 + (T - window) * window)  # 3 x forward, visible keys
            best = lambda times: min((s for s in times.values() if s == s), default=math.nan)
            for item in versus({"window": window}, {n: functools.partial(run, f) for n, f in kernels.items()},
                               lambda times: {"best TFLOP/s": flops / 1e12 / best(times)}, seconds=1.0):
                yield item
                if isinstance(item, str):  # once is enough
                    kernels.pop(item.split()[0])

@section(200)
def attention():
    """Attention: plain against sdpa and, where it runs, FlexAttention"""
    yield from attention_rows(("plain", "sdpa", *pick(("flex",), ())),
                              pick([(8, 256, 2, 64), (2, 1024, 2, 64)], [(1, 32, 2, 16)]), device="cpu")

# ----------------------------------------------------------------------------------------------------------------------
# Training steps

MINIATURE = dict(layers=2, width=64, head_dim=32, mlp_hidden=64, seq_len=32, micro_batch=1, batch_tokens=64)

def tiny(**changes):
    return settings(**{**pick({}, MINIATURE), "device": "cpu", **changes})

class Training:
    """A model of random weights, perhaps a teacher, and random tokens, in the training step of train()."""

    def __init__(self, cfg, world, vocab=2048, taught=False):
        self.cfg, self.world, self.taught = cfg, world, taught
        corpus, run = SimpleNamespace(vocab_size=vocab), SimpleNamespace(folder=Path())
        self.trainer = q.Trainer(cfg, corpus, world, run)
        self.model, self.optimizer = self.trainer.student, self.trainer.optimizer
        for weights in (self.optimizer.masters, dict(self.trainer.newest.named_parameters())):
            q.init_weights(self.model.table, weights, "bench")
        self.optimizer.refresh()
        self.count = cfg.batch_tokens // (cfg.seq_len * cfg.micro_batch)
        self.trainer.share.fill_(1 / self.count)
        self.tokens = torch.randint(vocab, (cfg.micro_batch, cfg.seq_len + 1), device=world.device)
        forward_backward, forward = q.flops_per_token(cfg, vocab)
        self.flops = forward_backward + forward * taught  # a token

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
    with (tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
          q.set_up_world(tiny()) as world):
        for taught in (False, True):
            runs = {name: Training(tiny(compile=name == "compiled"), world, taught=taught)
                    for name in ("eager", "compiled")}
            first = {f"first step, {name} s": timed(run.step) for name, run in runs.items()}
            yield from versus({"teacher": taught}, {name: run.step for name, run in runs.items()}, lambda times: first,
                              seconds=8)
    yield "The second row finds in the cache what the first one compiled and both need, such as the optimizer."

def group_of(event):
    """What a profiled operation belongs to: by what it ran for, then by what it is."""
    above, names = event, []
    while above is not None:
        names.append(above.name)
        above = above.cpu_parent
    product = event.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv")
    if event.name == "bench: step":
        return "Python between operations"
    if "bench: batch" in names:
        return "batch preparation"
    if "bench: optimizer" in names:
        return "optimizer: products" if product else "optimizer: the rest"
    if any("ChunkedLoss" in name for name in names):
        return "loss: products" if product else "loss: softmax and other pointwise"
    if any("scaled_dot_product" in name for name in names) or event.name in (
            "aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data"):
        return "attention"
    return "model: products" if product else "model: norms, rotary, other pointwise"

@section(200)
def step():
    """Where a step of tiny spends its time"""
    cfg, rng = tiny(), np.random.default_rng(0)
    documents = tuple(rng.integers(2048, size=n, dtype=np.uint16) for n in rng.integers(50, 500, pick(600, 20)))
    corpus, rows, shares = q.Corpus("random", 2048, {}, {}, documents, cfg.seq_len), cfg.batch_tokens // cfg.seq_len, []
    a = torch.randn(1024, 1024).to(getattr(torch, cfg.precision))
    peak = 2 * 1024 ** 3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=10))
    yield f"### {cfg.batch_tokens:,} tokens, {cfg.precision}; a product of 1024 x 1024 reaches {peak / 1e9:.0f} GFLOP/s"
    with q.set_up_world(cfg) as world:
        for taught in (False, True):
            training, at = Training(cfg, world, taught=taught), iter(range(10 ** 9))

            def whole():
                with record_function("bench: step"):
                    with record_function("bench: batch"):
                        batch = torch.from_numpy(corpus.batch(0, 0, next(at) * rows, rows))
                    training.tokens = batch[:cfg.micro_batch]
                    training.step()

            speed = lambda times: training.flops * cfg.batch_tokens / times["step"]
            yield from versus({"teacher": taught}, {"step": whole}, lambda times: {
                "tokens/s": cfg.batch_tokens / times["step"], "GFLOP/s": speed(times) / 1e9,
                "share of the product's": speed(times) / peak}, seconds=6)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for _ in range(pick(10, 2)):
                    whole()
            shares.append(found := {})
            for event in profile.events():
                found[group_of(event)] = found.get(group_of(event), 0) + event.self_cpu_time_total
    yield "### Its share by operation (torch.profiler, which slows small operations)"
    for group in sorted(shares[1], key=shares[1].get, reverse=True):
        yield {"operation": group, **{f"teacher: {taught}": f"{100 * found.get(group, 0) / sum(found.values()):.1f}%"
                                      for taught, found in zip((False, True), shares)}}

def tokens_per_second(changes):
    """Printed by rank 0, of as many processes as torchrun started."""
    with q.set_up_world(cfg := tiny(**changes)) as world:
        training = Training(cfg, world)
        training.step()
        count = int(world.largest(max(2, round(pick(3, 0) / timed(training.step)))))  # all ranks take as many steps
        s = median([timed(training.step) for _ in range(count)])
        if world.rank == 0:
            print(json.dumps({"tokens/s": cfg.batch_tokens / s}), flush=True)

@section(300)
def scaling(grid=None):
    """Scaling of tiny's step: width, sequence, threads, processes; eager, 2 micro-batches, no teacher"""
    shapes = [(128, 256), (256, 256), (512, 256), (128, 512), (128, 1024)]
    full = [(*shape, 1, min(2, os.cpu_count())) for shape in shapes] + [(128, 256, 1, 1), (128, 256, 2, 1)]
    base, torchrun = None, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for D, T, processes, n in grid or pick(full, [(64, 32, 1, 1), (64, 32, 2, 1)]):
        changes = dict(width=D, mlp_hidden=3 * D, seq_len=T, micro_batch=pick(1024 // T, 1),
                       batch_tokens=pick(2048, 64))
        start = [*torchrun, str(processes)] if processes > 1 else []
        command = [sys.executable, *start, __file__, *pick([], ["--small"]), "--steps", json.dumps(changes)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(n)})
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            yield f"width {D}, sequence {T}, {processes} x {n}: {' '.join(done.stderr.split())[-300:]}"
            continue
        speed = json.loads(lines[0])["tokens/s"]
        base = base or speed
        yield {"width": D, "sequence": T, "processes x threads": f"{processes} x {n}", "tokens/s": speed,
               "it / first row": speed / base, "GFLOP/s": speed * q.flops_per_token(tiny(**changes), 2048)[0] / 1e9}

# ----------------------------------------------------------------------------------------------------------------------
# Prior

def synthetic_members(M, N):
    """p(true token) [M, N], float32: a difficulty that all share, noise that neighbours share in part, noise of their
    own; later members are better."""
    g, P = torch.Generator().manual_seed(0), torch.empty(M, N)
    difficulty, shared = 4 * torch.empty(N).exponential_(generator=g), torch.randn(N, generator=g)
    for m in range(M):
        shared = 0.9 * shared + 0.19 ** 0.5 * torch.randn(N, generator=g)
        nats = difficulty + 0.4 * shared + 0.2 * torch.randn(N, generator=g) + 0.3 * math.exp(-5 * m / M)
        P[m] = nats.clamp_(1e-3, 20).neg_().exp_()
    return P

def certified(P, w):
    """(loss, gap) of weights w in float64: F(w) - min F <= gap = log(max_i g_i)."""
    total, g, w = 0.0, 0.0, w.double()
    for p in P.split(8192, dim=1):
        mix = w @ (p := p.double())
        total, g = total + float(mix.log().sum()), g + p @ mix.reciprocal_()
    return -total / P.size(1), float((g / P.size(1)).max().log())

def expectation_maximisation(P, seconds):
    w, passes, end = torch.full((len(P),), 1 / len(P)), 0, time.perf_counter() + seconds
    while True:
        g, passes = P @ (w @ P).reciprocal_() / P.size(1), passes + 1
        if float(g.max().log()) < 1e-4 or time.perf_counter() > end:
            return w, passes
        w = w * g
        w /= w.sum()

def adamw_on_logits(P, steps):
    logits = torch.zeros(len(P), requires_grad=True)
    adamw = torch.optim.AdamW([logits], lr=0.5, weight_decay=0.0)
    for _ in range(steps):
        adamw.zero_grad()
        (logits.softmax(0) @ P).log().mean().neg().backward()
        adamw.step()
    return logits.detach().softmax(0), steps

@section(300)
def prior():
    """Prior: fit_prior against EM and AdamW on softmax logits"""
    (M, N), cap, best, threads = pick((480, 131_072), (12, 2048)), pick(30, 1), None, torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    P = synthetic_members(M, N)
    yield f"### {M} synthetic members x {N:,} tokens, {min(2, threads)} threads"
    for name, fit in {"fit_prior": lambda: (torch.from_numpy(q.fit_prior(P.numpy())[0]), "-"),
                      f"EM to a gap of 1e-4, at most {cap} s": lambda: expectation_maximisation(P, cap),
                      "AdamW on softmax logits, lr 0.5": lambda: adamw_on_logits(P, pick(300, 30))}.items():
        mark = time.perf_counter()
        w, passes = fit()
        s, (loss, gap) = time.perf_counter() - mark, certified(P, w)
        best = best or loss
        yield {"method": name, "s": s, "passes": passes, "loss": f"{loss:.7f}", "certified gap": gap,
               "loss - fit_prior's": loss - best, "weights >= 0.001": int((w >= 0.001).sum())}
    torch.set_num_threads(threads)

# ----------------------------------------------------------------------------------------------------------------------
# Modelled: what an H100 would take

@dataclass(frozen=True)
class Case:
    """A step to model, and what one H100 measured of it before the core was rewritten."""
    preset: str
    changes: dict
    before: dict = field(default_factory=dict)


CASES = [
    Case("q0", {}, {"micro-batch ms": 323.8, "with teacher ms": 394.6, "update ms": 192.0}),
    Case("q0", dict(micro_batch=4)),
    Case("q0", dict(micro_batch=4, recompute=True)),
    Case("q0", dict(layers=8, loop_first=4, loop_last=5, micro_batch=4),
         {"micro-batch ms": 146.1}),
    Case("small", {}, {"micro-batch ms": 36.85, "update ms": 9.54}),
    Case("tiny", dict(train_tokens=0, layers=6, width=384, mlp_hidden=1024, batch_tokens=16384,
                      micro_batch=64))]


def meta_tensors(*shapes):
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
            for shape in shapes]


def attention_to_model(B, T, H, K, window):
    attend = cost.attention(None, "meta", window)
    *qkv, d = meta_tensors(*4 * [(B, T, H, K)])
    torch.autograd.grad(attend(*qkv), qkv, d)


def orthogonalize_to_model(G):
    """What was measured under this name: casts and a norm, then polar_express."""
    X = G.bfloat16().mT if G.size(-2) > G.size(-1) else G.bfloat16()
    norm = X.float().norm(dim=(-2, -1), keepdim=True)
    return q.polar_express(X / (1.02 * norm + 1e-6).bfloat16())


def measured_kernels():
    """(what, function, milliseconds on an H100): of bench.py --gpu, 2026-11-27."""
    for shape, ms in (((30, 2048, 2048), 11.5), ((60, 5632, 2048), 55.5), ((48, 768, 768), 1.69),
                      ((24, 2048, 768), 1.98)):
        G = torch.empty(shape, device="meta")
        yield f"orthogonalize {shape}", functools.partial(orthogonalize_to_model, G), ms
    for shape, ms in (((4, 2048, 2048), 0.0934), ((30, 2048, 2048), 0.758),
                      ((4, 2048, 5632), 0.26), ((30, 2048, 5632), 1.97), ((12, 768, 768), 0.0215),
                      ((36, 768, 768), 0.0578)):
        X, = meta_tensors(shape)
        yield f"X X^T {shape}", functools.partial(torch.matmul, X.detach(), X.detach().mT), ms
    for shape, window, ms in (
            ((16, 1024, 12, 64), 512, 0.677), ((16, 1024, 12, 64), 1024, 0.437),
            ((4, 2048, 16, 128), 1024, 0.833), ((4, 2048, 16, 128), 2048, 0.652)):
        run = functools.partial(attention_to_model, *shape, window)
        yield f"attention {shape}, window {window}", run, ms


def modelled_rows(case, cfg, vocab, step):
    tokens = cfg.micro_batch * cfg.seq_len
    model, teacher = q.flops_per_token(cfg, vocab)
    count = cfg.batch_tokens // tokens
    parts = {"micro-batch": (step.micro_batch, model), "with teacher": (step.taught, model + teacher),
             "update": (step.update, 0)}
    for name, (part, flops) in parts.items():
        if part is None:
            continue
        share = tokens * flops / q.H100_FLOPS
        yield {"part": name, "modelled ms": 1000 * part.seconds(), "measured before":
               case.before.get(f"{name} ms", "-"), "MFU": share / part.seconds() if flops else "-",
               "CUDA graphs, ms": 1000 * part.seconds(launch=0), "their MFU": share / part.seconds(0) if flops else "-",
               "kernels": len(part.kernels), "GB held": part.held / 1e9, "GB at the peak": part.peak / 1e9}
    whole = [count * step.micro_batch.seconds(launch) + step.update.seconds(launch)
             for launch in (cost.LAUNCH, 0)]
    yield {"micro-batches a step": count, "tokens/s": count * tokens / whole[0],
           "tokens/s with CUDA graphs": count * tokens / whole[1]}


@section(1200)
def model():
    """Modelled on an H100 (records/cost.py): kernels, a micro-batch and an update"""
    yield "### Kernels against bench.py --gpu, without launches"
    for what, function, measured in measured_kernels():
        recorder = cost.Recorder()
        with cost.on_meta(recorder):
            part = cost.record(recorder, function)
        ms = 1000 * part.seconds(launch=0)
        yield {"what": what, "modelled ms": ms, "measured ms": measured,
               "deviation": f"{ms / measured - 1:+.1%}"}
    for case in pick(CASES, [Case("tiny", MINIATURE)]):
        cfg = settings(case.preset, precision="bfloat16", device="cpu", **case.changes)
        vocab = 2048 if case.preset == "tiny" else 50257
        step = cost.step(cfg, vocab, compile=not SMALL)
        yield f"### {case.preset} {case.changes or ''}"
        yield from modelled_rows(case, cfg, vocab, step)
        for name, part in (("micro-batch", step.taught or step.micro_batch), ("update", step.update)):
            for what, times, seconds in part.heaviest()[:10]:
                yield {"ten heaviest of": name, "operation": what, "times": times, "ms": 1000 * seconds}

# ----------------------------------------------------------------------------------------------------------------------
# With a GPU

@section(100)
def gpu_tests():
    """Kernels against the reference (tests/test_kernels.py, what runs on the device)"""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", ROOT / "tests/test_kernels.py", "-k",
               "not interpreter and not sm_90a and not without_triton", *pick([], ["--collect-only"])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
    yield {"pytest tests/test_kernels.py": lines[-1]}
    yield from (f"`{line[:200]}`" for line in lines if line.startswith(("FAILED", "ERROR", "E  ")))
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")

def step_rows(preset, few, seconds, **small):
    """Steps of `few` micro-batches, eager and compiled; speeds as of the preset's batch, from its parts' medians."""
    known = CUDA and any(x in torch.cuda.get_device_name() for x in ("H100", "H200"))
    whole, vocab, training = settings(preset, **pick({}, {**MINIATURE, **small})), pick(50257, 300), None
    size = whole.micro_batch * whole.seq_len
    count = whole.batch_tokens // size
    for compile, taught in ((False, False), (True, False), (True, True)):
        training = None  # frees the last one's memory
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        changes = dict(compile=compile, batch_tokens=pick(few, 2) * size, edge_batch_tokens=None)
        cfg = settings(preset, **{**pick({}, {**MINIATURE, **small}), **changes})
        try:
            with q.set_up_world(cfg) as world:
                training = Training(cfg, world, vocab, taught)
            first, steps, micros, updates = timed(training.step), [], [], []
            end = time.perf_counter() + pick(seconds, 0)
            while len(steps) < pick(3, 1) or time.perf_counter() < end:
                steps.append(timed(training.step))
                training.micro()  # makes the gradients that the next one adds to
                micros.append(timed(training.micro))
                updates.append(timed(training.update))
        except Exception as e:
            yield f"compiled: {compile}, teacher: {taught}: {one_line(e)}"
            continue
        speed = count * size / (count * median(micros) + median(updates))
        yield {"compiled": compile, "teacher": taught, "micro-batch ms": 1000 * median(micros), "optimizer ms":
               1000 * median(updates), f"{training.count} micro-batches + optimizer s": median(steps),
               f"tokens/s of {count} micro-batches + optimizer": speed, "TFLOP/s": speed * training.flops / 1e12,
               "MFU of 989 TFLOP/s": speed * training.flops / q.H100_FLOPS if known else math.nan,
               "peak GB": torch.cuda.max_memory_allocated() / 1e9 if CUDA else math.nan, "first step s": first}

@section(100)
def gpu_small():
    """Training step of preset small, one GPU"""
    yield from step_rows("small", 8, 3)

@section(110)
def gpu_loss():
    """Loss: plain_loss compiled, ChunkedLoss in torch, ChunkedLoss with its kernel, forward + backward"""
    vocab, dtype = pick((50257, torch.bfloat16), (300, torch.float32))
    columns = 64 * math.ceil(vocab / 64)
    rows = pick(q.GPU_CHUNK_LOGITS // columns, 8)
    target, scale = torch.randint(vocab, (rows,), device=DEVICE), torch.full((rows,), 1 / rows, device=DEVICE)
    yield f"### rows_loss on {rows:,} x {columns:,} logits: reads them twice, a teacher's too, and writes them once"
    for taught in (False, True):
        z, t = (torch.randn(rows, columns, device=DEVICE, dtype=dtype) for _ in range(2))
        run = lambda: q.rows_loss(z, t if taught else None, vocab, target, scale, 15.0, 0.45, 1.2)
        yield from versus({"teacher": taught}, {"kernel": run}, lambda times: {
            "GB/s": (5 if taught else 3) * z.nbytes / times["kernel"] / 1e9}, seconds=0.5)
    yield f"### Vocabulary {vocab:,}; extra memory: torch's allocator at its peak, above inputs and gradients"
    cases = [(4096, 2048, False), (8192, 2048, False), (16384, 2048, False), (16384, 2048, True), (4096, 768, False),
             (16384, 768, False), (16384, 768, True)]
    for tokens, width, taught in pick(cases, [(32, 16, True)]):
        torch._dynamo.reset()
        plain, kernel = loss_versions(tokens, vocab, width, dtype, taught)
        fused = functools.partial(plain, torch.compile(q.plain_loss, dynamic=False))
        yield from versus({"tokens x width": f"{tokens} x {width}", "teacher": taught}, {
            "compiled plain": fused, "torch": without_kernels(kernel), "kernel": kernel}, memory=CUDA, seconds=0.5)
    yield from chunk_sizes("GPU_CHUNK_LOGITS", pick(range(24, 31), (12,)), *pick((16384, 50257, 2048), (32, 300, 16)),
                           dtype, True)

@section(50)
def gpu_products():
    """symmetric_product against cuBLAS; orthogonalize without and with it"""
    dtype = pick(torch.bfloat16, torch.float32)
    yield "### symmetric_product; TFLOP/s of the whole product"
    for shape in pick([(4, 2048, 2048), (30, 2048, 2048), (4, 2048, 5632), (30, 2048, 5632), (12, 768, 768),
                       (36, 768, 768)], [(1, 32, 16)]):
        X = torch.randn(shape, device=DEVICE, dtype=dtype)
        A = X @ X.mT
        for name, inner, plain, fast in (
                ("X X^T", shape[2], lambda: X @ X.mT, lambda: q.symmetric_product(X)),
                ("b A + c A A^T", shape[1], lambda: torch.baddbmm(A, A, A, beta=0.5, alpha=0.4),
                 lambda: q.symmetric_product(A, A, 0.4, 0.5))):
            yield from versus({"X": str(shape), "product": name}, {"torch": plain, "kernel": fast}, lambda times: {
                f"{v} TFLOP/s": 2 * shape[0] * shape[1] ** 2 * inner / s / 1e12 for v, s in times.items()}, seconds=0.4)
    yield "### polar_express"
    for shape in pick([(30, 2048, 2048), (60, 2048, 5632), (48, 768, 768), (24, 768, 2048)], [(1, 16, 32)]):
        X = prepared(shape).to(DEVICE, dtype)
        fast = lambda: q.polar_express(X)
        yield from versus({"X": str(shape)}, {"torch": without_kernels(fast), "kernel": fast}, seconds=0.4)

@section(60)
def gpu_attention():
    """Attention kernels"""
    yield from attention_rows(("plain", *pick(("sdpa", "flex"), ("sdpa",))),
                              pick([(16, 1024, 12, 64), (4, 2048, 16, 128)], [(1, 32, 2, 16)]))

@section(40)
def gpu_evaluation():
    """Evaluation pass (true_token_probs), eager"""
    for preset, n in (("small", 128), ("q0", 16)):
        small = {**MINIATURE, "edge_batch_tokens": 64, "loop_passes": 1}
        cfg, vocab = settings(preset, **{**pick({}, small), "compile": False}), pick(50257, 300)
        sequences = np.random.default_rng(0).integers(vocab, size=(pick(n, 1), cfg.seq_len + 1)).astype(np.uint16)
        with q.set_up_world(cfg) as world:
            model, tokens = Training(cfg, world, vocab, taught=True).teacher, len(sequences) * cfg.seq_len
            fast = lambda: q.true_token_probs(model, sequences, cfg.micro_batch, world)
            yield from versus({"preset": preset, "tokens": tokens}, {"torch": without_kernels(fast), "kernel": fast},
                              lambda times: {"tokens/s": tokens / times["kernel"]}, seconds=1.0)

@section(300)
def gpu_q0():
    """Training step of preset q0, one GPU"""
    yield from step_rows("q0", 4, 5, layers=4, loop_first=1, loop_last=2, edge_batch_tokens=64)

# ----------------------------------------------------------------------------------------------------------------------
# Running and reporting

class Output:
    """Markdown to stdout and a file as items come: rows (dicts; new columns begin a new table), titles and notes. The
    items themselves go to a JSON file beside it."""

    def __init__(self, path=None):
        self.path, self.items, self.columns = path and Path(path), [], None
        if self.path:
            self.path.write_text("", encoding="utf-8")

    def add(self, item):
        def shown(x):
            if not isinstance(x, float):
                return str(x)
            return "-" if math.isnan(x) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"

        lines, row = [], isinstance(item, dict)
        if row and list(item) != self.columns:
            lines = ["", f"| {' | '.join(item)} |", "|" + "---|" * len(item)]
        self.columns = list(item) if row else None
        lines += [f"| {' | '.join(map(shown, item.values()))} |"] if row else ["", item]
        print(*lines, sep="\n", flush=True)
        self.items.append(item)
        if self.path:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write("\n".join(lines) + "\n")
            self.path.with_suffix(".json").write_text(json.dumps(self.items, indent=1) + "\n", encoding="utf-8")

def items(function):
    """What a section yields; in miniature nothing is compiled."""
    with torch.compiler.set_stance("force_eager") if SMALL else contextlib.nullcontext():
        yield from function()

def run_section(flags, seconds, add):
    """Run one section in a process of its own and add what it yields. Returns what went wrong, or ""."""
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([sys.executable, __file__, "--child", *flags], stdout=subprocess.PIPE, stderr=errors,
                                 text=True, start_new_session=True)
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), os.killpg(child.pid, signal.SIGKILL)))
        timer.start()
        for line in child.stdout:
            with contextlib.suppress(ValueError):  # anything else that a library prints
                add(json.loads(line))
        code = child.wait()
        timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines() or ["no message"]
    return f"stopped after {seconds:.0f} s" if late.is_set() else code and f"ended with {code}: {said[-1][:300]}"

def main(argv=None):
    global SMALL
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="SECTION", help=f"{' '.join(CPU)}; with --gpu: {' '.join(GPU)} [all]")
    p.add_argument("--gpu", action="store_true", help="all that needs a GPU")
    p.add_argument("--out", metavar="FILE", help="markdown, written as it comes; JSON beside it")
    p.add_argument("--small", action="store_true", help="miniature sizes")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # one section, as JSON lines
    p.add_argument("--steps", type=json.loads, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    SMALL, table = args.small, GPU if args.gpu else CPU
    if args.steps:
        tokens_per_second(args.steps)
        return 0
    if unknown := [name for name in args.names if name not in table]:
        p.error(f"{unknown[0]} is not one of: {' '.join(table)}")
    if args.child:
        for item in items(table[args.names[0]][0]):
            print("\n" + json.dumps(item), flush=True)
        return 0
    if args.gpu and not CUDA and not SMALL:
        print("bench.py: --gpu needs a GPU, and torch sees none here", file=sys.stderr)
        return 2
    output, begun, failed = Output(args.out), time.perf_counter(), {}
    output.add("# bench.py" + " --gpu" * args.gpu + " --small: THESE NUMBERS MEAN NOTHING" * SMALL)
    for name, value in {"date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", **q.machine(q.World(device=DEVICE)),
                        "triton": getattr(q.triton, "__version__", "none"), "cores": os.cpu_count(),
                        "load before": " ".join(f"{x:.1f}" for x in os.getloadavg())}.items():
        output.add({"machine": name, "": value})
    flags = ["--gpu"] * args.gpu + ["--small"] * SMALL
    for name in args.names or table:
        (function, most), mark = table[name], time.perf_counter()
        left = GPU_SECONDS - (mark - begun) if args.gpu and not SMALL else most
        output.add(f"## {function.__doc__}")
        problem = run_section([name, *flags], min(most, left), output.add) if left > 15 else "no time was left for it"
        if problem:
            failed[name] = problem
            output.add(f"**{name} failed: {problem}**")
        output.add(f"({name}: {time.perf_counter() - mark:.0f} s)")
    output.add("## Open: what no GPU has measured" + " in this run" * args.gpu)
    for name, (function, _) in GPU.items():
        if not (args.gpu and CUDA) or name in failed or name not in (args.names or table):
            output.add({"what": function.__doc__, "why": failed.get(name, "needs --gpu on a machine with one")})
    for what in OPEN:
        output.add({"what": what, "why": "not part of this script"})
    return 1 if failed else 0

if __name__ == "__main__":
    sys.exit(main())
