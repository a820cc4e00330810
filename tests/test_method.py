"""train_q0.py against independent references: the method's formulas in numpy float64, torch.optim, scipy. CPU only."""
import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings, strategies
from scipy.special import expit, log_softmax, rel_entr, softmax
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_q0 as q

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(layers=6, width=64, head_dim=16, mlp_hidden=96, seq_len=16, dropout=0.0, precision="float32", device="cpu",
             batch_tokens=64, micro_batch=4)
FEATURES = dict(windows="SSSL", unet=True, x0_mix=True, value_embeds=True, attn_gates=True, head_mixing=True,
                loop_first=3, loop_last=4, loop_passes=3, mtp_weight=0.3, smear=True, induction=True)
VOCAB = 100  # padded to 128


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def config(preset="tiny", **changes):
    return q.Config(**{**q.PRESETS[preset], "preset": preset, **changes})


def resolved(preset="tiny", **changes):
    return q.resolve(config(preset, **changes))[0]


def build(features=True, stir=True, key=0, **changes):
    """A small GPT; `stir` moves gates, mixing and scalars off their initial values and makes logits of order 1."""
    chosen = FEATURES if features else {"value_embeds": False, "smear": False, "induction": False}
    model = q.GPT(resolved(**{**SMALL, **chosen, **changes}), VOCAB).init_weights(key)
    if stir:
        g = seeded(key + 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if kind_of(name) in ("gate", "value_gate", "mixing", "resid_scale", "x0_scale", "skip_scale", "smear"):
                    p.add_(0.3 * torch.randn(p.shape, generator=g))
            model.head.mul_(200)
    return model.train()


def in_float64(model):
    """A float64 copy. Its rotary buffers still hold float32 values."""
    model = copy.deepcopy(model).double()
    model.dtype = torch.float64
    return model


def random_tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=seeded(seed))


def kind_of(name):
    return name.rsplit(".", 1)[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Schedule

@pytest.mark.parametrize("L", [1, 2, 7, 381])
@pytest.mark.parametrize("f, g, h", [(0.08, 0.7, 1), (0.0, 0.0, 1), (0.5, 1.3, 1), (1.0, 0.7, 1), (0.08, 1.2, 0.096)])
def test_learning_rate_and_decay_are_linear(L, f, g, h):
    lr = np.array([q.lr_multiplier(s, L, f) for s in range(L)])
    wd = np.array([q.wd_multiplier(x, f, g, h) for x in lr])
    assert lr == pytest.approx(np.interp(np.arange(L), [0, L], [1, f]), rel=1e-12)
    assert lr[0] == 1 and lr[-1] == pytest.approx(f + (1 - f) / L, rel=1e-12)
    assert wd == pytest.approx(np.interp(lr, [f, 1], [h, g]) if f < 1 else np.full(L, h), rel=1e-12)
    if L > 1 and f < 1:
        assert np.corrcoef(lr, wd)[0, 1] == pytest.approx(-1 if g < h else 1)
    if g == 1.2:
        assert wd == pytest.approx(1.2 * lr)


@pytest.mark.parametrize("C", [2, 3, 4, 9, 96])
def test_noise_follows_a_cosine_from_first_to_last_boundary(C):
    cfg = config()
    noise = [q.noise_scale(b, C, cfg.noise_first, cfg.noise_last) for b in range(1, C)]
    assert noise[0] == pytest.approx(0.25) and (C == 2 or noise[-1] == pytest.approx(0.05))
    phase = np.linspace(0, np.pi, C - 1) if C > 2 else np.zeros(1)
    assert noise == pytest.approx(0.05 + 0.20 * (1 + np.cos(phase)) / 2)


def test_large_batches_in_the_middle_half_of_the_cycles():
    cfg = resolved("q0")
    for C in range(1, 101):
        sizes = [q.cycle_batch_tokens(c, C, cfg) for c in range(C)]
        assert sizes == [524_288 if C == 1 or C - 1 <= 4 * c <= 3 * (C - 1) else 393_216 for c in range(C)]


@pytest.mark.parametrize("epochs, c, C, tokens, steps", [
    (2, 16, 32, 100_000_000, 381), (2, 0, 32, 100_000_000, 509), (2, 31, 32, 100_000_000, 509),
    (2, 0, 1, 100_000_000, 381), (3, 16, 32, 100_000_000, 572), (1, 0, 1, 1000, 1)])
def test_steps_of_a_cycle(epochs, c, C, tokens, steps):
    plan = q.plan_cycles(dataclasses.replace(resolved("q0"), epochs=C * epochs, cycles=C), tokens)
    assert plan[0][c].steps == steps and plan[0][c].epochs == epochs


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer

COEFFICIENTS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]
GROUPS = {  # kind: (peak lr, weight decay, AdamW's betas) of the published run; every other kind is a matrix under Muon
    "embed": (0.0375, 1.3, (0.8, 0.95)), "head": (0.0005, 1.3, (0.8, 0.95)), "resid_scale": (0.00025, 0, (0.8, 0.95)),
    "skip_scale": (0.00025, 0, (0.8, 0.95)), "x0_scale": (0.025, 0, (0.96, 0.95)), "mixing": (0.02, 0, (0.8, 0.95))}
MUON_LR, MUON_DECAY = 0.01, 1.3


def muon_reference(grad, state):
    """The direction of one Muon step of one matrix, float64."""
    rows, cols = grad.shape
    state["momentum"] = 0.95 * state.get("momentum", 0) + 0.05 * grad
    update = 0.05 * grad + 0.95 * state["momentum"]
    update = update / np.linalg.norm(update, axis=1, keepdims=True)
    X = update.T if rows > cols else update
    X = X / (1.02 * np.linalg.norm(X))
    for a, b, c in COEFFICIENTS:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    X = X.T if rows > cols else X
    mean = (X ** 2).mean(axis=1 if rows >= cols else 0, keepdims=True)
    state["second"] = 0.95 * state.get("second", 0) + 0.05 * mean
    scaled = X / np.sqrt(state["second"])
    return scaled * np.linalg.norm(X) / np.linalg.norm(scaled)


# Over singular values of 0.01 to 1 Frobenius norms the five polynomials range over 0.8589 .. 1.1412. float32 adds 1e-6;
# bf16 rounds every factor to 2^-9 = 0.2%, measured 0.3% in all.
@pytest.mark.parametrize("dtype, low, high", [(torch.float32, 0.8588, 1.1413), (torch.bfloat16, 0.85, 1.15)])
@pytest.mark.parametrize("rows, cols", [(64, 64), (128, 48), (48, 128), (4, 12), (12, 4)])
def test_orthogonalize_gives_the_polar_factor(dtype, low, high, rows, cols):
    G = torch.randn(3, rows, cols, generator=seeded(rows))
    result = q.orthogonalize(G, dtype).double().numpy()
    assert result.shape == G.shape
    for g, x in zip(G.double().numpy(), result):
        U, S, Vt = np.linalg.svd(g, full_matrices=False)
        inner = U.T @ x @ Vt.T  # diagonal where x has g's singular vectors
        values, clear = np.diag(inner), S / np.linalg.norm(S) > 0.01
        assert clear.mean() > 0.9 and low < values[clear].min() and values[clear].max() < high
        # rounding (2^-9 in bf16, 2^-24 in float32) grows by the slopes of the five steps: measured 0.03 and 1e-6
        assert np.abs(inner - np.diag(values)).max() < (1e-5 if dtype == torch.float32 else 0.08)


def test_orthogonalize_keeps_null_directions_small_and_zero_zero():
    g = seeded(0)
    low_rank = torch.randn(1, 32, 5, generator=g) @ torch.randn(1, 5, 48, generator=g)
    S = torch.linalg.svdvals(q.orthogonalize(low_rank, torch.float32)[0].double())
    assert 0.8588 < S[4] and S[0] < 1.1413
    # the five slopes at 0 multiply rounding of 1e-8 by 8.2 * 4.0 * 3.9 * 3.3 * 2.3 = 990
    assert S[5] < 1e-4
    assert not q.orthogonalize(torch.zeros(1, 4, 6), torch.bfloat16).any()


@pytest.mark.parametrize("rows, cols", [(48, 48), (64, 24), (24, 64), (4, 12)])
def test_muon_update_against_numpy(rows, cols):
    g, first, states = seeded(1), torch.zeros(2, rows, cols), [{}, {}]
    second = torch.zeros(2, rows, 1) if rows >= cols else torch.zeros(2, 1, cols)
    for step in range(6):
        grad = torch.randn(2, rows, cols, generator=g) * torch.tensor([1.0, 1e-3])[:, None, None]
        update = q.muon_update(grad, first, second, torch.tensor(True), 0.95, torch.float32).numpy()
        for u, one, s in zip(update, grad.double().numpy(), states):
            # entries are about 1/sqrt(cols) = 0.2; small singular directions amplify float32's 6e-8 by up to 990
            np.testing.assert_allclose(u, muon_reference(one, s), atol=1e-4)


def test_optimizer_step_of_every_parameter():
    """The shrunken q0 preset against torch.optim.AdamW and the reference above, with the published run's constants."""
    cfg = resolved("q0", **SMALL, loop_first=3, loop_last=4, edge_batch_tokens=64)
    model = q.GPT(cfg, VOCAB).init_weights(0)
    optimizer, g = q.Optimizer(model, cfg), seeded(0)
    adamw, muon, seen = {}, {}, Counter()
    for name, p in model.named_parameters():
        if kind_of(name) in GROUPS:
            twin = p.detach().clone().requires_grad_()
            adamw[name] = twin, torch.optim.AdamW([twin], betas=GROUPS[kind_of(name)][2], eps=1e-10)
        else:
            muon[name] = [{} for _ in range(p.numel() // (p.size(-1) * p.size(-2)))]
    for lr_mult, wd_mult, size in ((1.0, 0.7, 1.0), (0.6, 0.85, 1e-3), (0.1, 1.0, 10.0)):
        before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = size * torch.randn(p.shape, generator=g) * 10.0 ** torch.randint(-2, 1, (1,), generator=g)
        length = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        assert (length > 1) == (size >= 1)  # where it is, it is clipped to 1
        grads = {n: p.grad / max(1, length) for n, p in model.named_parameters()}
        optimizer.step(lr_mult, wd_mult)
        for name, p in model.named_parameters():
            seen[kind_of(name)] += 1
            if name in adamw:
                twin, rule = adamw[name]
                lr, decay, _ = GROUPS[kind_of(name)]
                twin.grad, rule.param_groups[0]["lr"] = grads[name], lr * lr_mult
                rule.param_groups[0]["weight_decay"] = decay * wd_mult
                rule.step()
                # the same arithmetic in float32 in another order
                torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-7, msg=lambda m: f"{name}: {m}")
                continue
            rows, cols = p.shape[-2:]
            lr = MUON_LR * lr_mult * math.sqrt(max(1, rows / cols))
            matrices = [x.reshape(-1, rows, cols).double().numpy() for x in (p.detach(), before[name], grads[name])]
            for now, old, grad, state in zip(*matrices, muon[name]):
                u = muon_reference(grad, state)
                decayed = old * (np.sign(u) == np.sign(old))  # cautious: only where update and weight agree
                clear = np.abs(u) > 1e-3  # float32 may give a smaller one the other sign
                assert clear.mean() > 0.9
                np.testing.assert_allclose((now - old)[clear], -lr * (u + MUON_DECAY * wd_mult * decayed)[clear],
                                           atol=lr * 1e-4 + 2e-7, err_msg=name)  # muon's 1e-4, a weight's rounding
    assert set(seen) == set(GROUPS) | {"qkv", "out", "gate", "value", "value_gate", "gate_up", "down", "mtp_proj"}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """Nor does a first step of that kind: then the bias corrections of AdamW would divide by 0."""
    cfg = resolved("q0", **SMALL, loop_first=3, loop_last=4, edge_batch_tokens=64)
    model, g = q.GPT(cfg, VOCAB).init_weights(0), seeded(0)
    optimizer = q.Optimizer(model, cfg)

    def held():
        return [p.detach().clone() for p in model.parameters()] + [x.clone() for *_, state in optimizer.groups
                                                                   for x in state.values()]

    def step(one=None):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        if one is not None:
            model.blocks[2].down.grad[1, 2] = one
        before = held()
        optimizer.step(1.0, 1.0)
        return [torch.equal(a, b) for a, b in zip(before, held())]

    assert all(step(bad))
    assert not any(step())
    assert all(step(bad))
    assert int(optimizer.steps) == 1 and int(optimizer.skipped) == 2


def test_optimizer_state_goes_by_parameter_name():
    """And comes back bit for bit."""
    cfg = resolved("q0", **SMALL, loop_first=3, loop_last=4, edge_batch_tokens=64)
    model, g = q.GPT(cfg, VOCAB).init_weights(0), seeded(0)
    optimizer, twin = q.Optimizer(model, cfg), q.Optimizer(model, cfg)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step(1.0, 1.0)
    state = optimizer.state()
    names = {n for n, _ in model.named_parameters()}
    assert state.keys() == {f"{kind}.{n}" for n in names for kind in ("first", "second")} | {"steps", "skipped"}
    first = next(state[0]["first"] for names, *state in ((g[0], g[-1]) for g in optimizer.groups) if "embed" in names)
    assert torch.equal(state["first.embed"].flatten(), first) and first.std() > 0
    twin.load(state)
    for (*_, a), (*_, b) in zip(optimizer.groups, twin.groups):
        assert all(torch.equal(a[k], b[k]) for k in ("first", "second"))
    assert twin.steps == 2


# ----------------------------------------------------------------------------------------------------------------------
# Attention kernels

@pytest.mark.parametrize("T, window", [(16, 16), (16, 8), (16, 1), (1, 1), (7, 3)])
@pytest.mark.parametrize("name", ["sdpa", "plain", "matmul", "flex"])
def test_attention_kernels(name, T, window):
    """Against plain loops over queries in float64, forward; backward by the chain rule of plain_attention, which the
    first case of every kernel shares."""
    if name == "flex":
        pytest.importorskip("torch.nn.attention.flex_attention")
    cfg = resolved("tiny", seq_len=max(8, T), short_window=window, windows="SL", layers=2, width=64, head_dim=32,
                   batch_tokens=max(8, T), micro_batch=1, precision="float32")
    g = seeded(0)
    x = torch.randn(3, 2, T, 2, 32, generator=g, dtype=torch.float64)
    expected = torch.zeros(2, T, 2, 32, dtype=torch.float64)
    for t in range(T):
        seen = slice(max(0, t - window + 1), t + 1)
        scores = torch.einsum("bhk,bshk->bhs", x[0, :, t], x[1, :, seen]) / math.sqrt(32)
        expected[:, t] = torch.einsum("bhs,bshk->bhk", scores.softmax(-1), x[2, :, seen])
    if name == "flex":
        if T != cfg.seq_len or T == 16 and window == 1:
            pytest.skip("block masks are built for whole sequences; one short window is enough to compile")
        attend, x, atol = q.flex_attention(cfg, torch.device("cpu")), x.float(), 1e-5
        with torch.no_grad():  # FlexAttention has no backward pass on a CPU
            out = attend(*x, window)
    else:
        attend, atol = q.ATTENTION[name](cfg, torch.device("cpu")), 1e-12
        out = attend(*x, window, q.window_mask(T, window))
        inputs = [v.clone().requires_grad_() for v in x]
        d = torch.randn(expected.shape, generator=g, dtype=torch.float64)
        grads = [torch.autograd.grad(f(*inputs, window, q.window_mask(T, window)), inputs, d)
                 for f in (attend, q.plain_attention)]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # float64
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=0, atol=atol)  # float64, or flex's float32


def test_choice_of_an_attention_kernel(monkeypatch, capsys):
    """The first that agrees; each that does not is announced in a line; none at all is an error."""
    cfg, cpu = resolved("tiny", windows="SL"), torch.device("cpu")
    wrong = lambda q_, k, v, window, mask=None: q.sdpa_attention(q_, k, v, window, None)  # forgets the window
    no_backward = lambda *a: q.sdpa_attention(*a).detach()

    def broken(cfg, device):
        raise OSError("undefined symbol")

    assert q.choose_attention(cfg, cpu)[0] == "matmul" and capsys.readouterr().err == ""
    assert q.choose_attention(resolved("tiny", seq_len=2048, micro_batch=1), cpu) == ("sdpa", q.sdpa_attention)
    made = {"flash3": broken, "flex": lambda *a: wrong, "matmul": lambda *a: no_backward,
            "sdpa": lambda *a: q.sdpa_attention}
    monkeypatch.setattr(q, "ATTENTION", made)
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(q, "check_attention", lambda attend, cfg, device, f=q.check_attention: f(attend, cfg, cpu))
    assert q.choose_attention(cfg, gpu)[0] == "sdpa" and q.choose_attention(cfg, cpu)[0] == "sdpa"
    lines = capsys.readouterr().err.splitlines()
    assert [re.match("notice: attention kernel (\\w+) does not work", x)[1] for x in lines] == ["flash3", "flex", "matmul"]
    assert "undefined symbol" in lines[0] and "disagrees with plain attention, window 128" in lines[1]
    del made["sdpa"]
    with pytest.raises(q.UserError, match="sdpa does not work"):
        q.choose_attention(cfg, gpu)

    def fails_inside(attend):
        raise ImportError("no fake backward")

    made |= {"flash3": lambda *a: q.sdpa_attention, "flex": lambda *a: q.sdpa_attention}
    monkeypatch.setattr(torch, "compile", fails_inside)  # a foreign kernel is checked as it will run
    assert q.choose_attention(cfg, gpu)[0] == "flash3"
    assert q.choose_attention(dataclasses.replace(cfg, compile=True), gpu)[0] == "flex"
    assert "flash3 does not work: ImportError: no fake backward" in capsys.readouterr().err


def test_flash_attention_3_is_never_downloaded(monkeypatch):
    """Its package sees HF_HUB_OFFLINE before it is imported, gets a pinned version, and the windows are right."""
    calls = []

    def flash_attn_func(q_, k, v, causal, window_size):
        calls.append((causal, window_size))
        return q_, None

    def get_kernel(repository, version):
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        calls.append((repository, version))
        return SimpleNamespace(flash_attn_func=flash_attn_func)

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    attend, x = q.flash3_attention(resolved("tiny"), torch.device("cpu")), torch.zeros(1, 16, 2, 8)
    assert attend(x, x, x, 16) is x and attend(x, x, x, 8) is x
    assert calls == [("kernels-community/flash-attn3", 1), (True, (-1, -1)), (True, (7, 0))]


# ----------------------------------------------------------------------------------------------------------------------
# Compiled step

@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_nothing_is_compiled_after_the_first_step(tmp_path):
    """Two trajectories, teacher and none, two batch sizes, short last batches of the evaluation, noise; and the
    compiled run gives the eager one's losses."""
    cfg = resolved("tiny", layers=2, width=64, head_dim=32, mlp_hidden=64, seq_len=16, batch_tokens=128, micro_batch=4,
                   edge_batch_tokens=64, epochs=8, trajectories=2, cycles=4, compile=True, report="dev", windows="SL",
                   precision="float32", dropout=0.0, device="cpu", log_every=1)
    g = np.random.default_rng(0)
    documents = tuple(g.integers(0, 100, n).astype(np.uint16) for n in (100, 300, 50, 94))
    splits = {"train": np.concatenate(documents), **{s: g.integers(0, 100, 17 * 7).astype(np.uint16)
                                                     for s in ("heldout", "dev")}}
    data = q.Corpus("made", 100, splits, {}, documents, 16)
    curves, warm_up = [], q.warm_up

    def then_fail(*args):
        warm_up(*args)
        torch.compiler.set_stance("fail_on_recompile")

    for compiled in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(q, "warm_up", then_fail)
            (tmp_path / str(compiled) / "predictions").mkdir(parents=True)
            try:
                result = q.train(dataclasses.replace(cfg, compile=compiled), data, q.World(), tmp_path / str(compiled),
                                 q.Log())
            finally:
                torch.compiler.set_stance("default")
        curves.append([p["learned"] for p in result["curve"]])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 3  # it did compile
    # float32 sums in another order, grown by 40 steps of training
    assert curves[1] == pytest.approx(curves[0], abs=2e-3) and max(curves[0]) - min(curves[0]) > 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Loss

def loss_reference(hidden, head, targets, softcap, teacher=(), weight=0.0, temperature=1.0):
    """(loss, cross-entropy) in float64; targets of -1 do not count; a teacher is [(share, hidden, head), ...]."""
    cap = lambda h, w: softcap * np.tanh(h @ w.T / softcap)
    logits, kept = cap(hidden, head), targets >= 0
    ce = -log_softmax(logits, axis=1)[kept, targets[kept]].mean()
    if not teacher:
        return ce, ce
    mixture = sum(share * softmax(cap(h, w), axis=1) for share, h, w in teacher)
    p = mixture ** (1 / temperature) / (mixture ** (1 / temperature)).sum(1, keepdims=True)
    p_student = softmax(logits / temperature, axis=1)
    return (1 - weight) * ce + weight * temperature ** 2 * rel_entr(p, p_student).sum(1)[kept].mean(), ce


def differences(function, x, h=1e-5):
    """Central differences of a scalar function at every entry of x: error about h^2 = 1e-10."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        grad[i] = (function(x + step) - function(x - step)) / (2 * h)
    return grad


# Logits are float32 whatever the dtype of `hidden`; the soft-cap errs by 5 * 6e-8, gradients sum that over rows: 5e-6.
# bf16: both sides see inputs already rounded, but logits (up to 5: 2^-7) and their gradient are rounded once more.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.float64, 5e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("teachers", [0, 1, 3])
@pytest.mark.parametrize("ignored", [(), (0, 4)])
@pytest.mark.parametrize("rows", [1, 3, 100])  # 7 rows in chunks of 1, of 3 (the last one of 1), in one chunk
def test_loss_against_numpy(dtype, tolerance, teachers, ignored, rows, monkeypatch):
    N, D, V, cap = 7, 5, 11, 5.0
    monkeypatch.setattr(q, "CHUNK_LOGITS", rows * V)
    draw = np.random.default_rng(0).normal
    rounded = lambda *shape: torch.from_numpy(2 * draw(size=shape)).to(dtype)  # logits reach well into the soft-cap
    hidden, head, targets = rounded(N, D), rounded(V, D), torch.arange(N) % V
    targets[list(ignored)] = -1
    shares = {0: (), 1: (1.0,), 3: (0.5, 0.3, 0.2)}[teachers]
    teacher, weight, T = [(x, rounded(N, D + 2), rounded(V, D + 2)) for x in shares], 0.45 * bool(teachers), 1.2
    master = torch.float32 if dtype == torch.bfloat16 else dtype  # weights are never bf16
    h, w = hidden.clone().requires_grad_(), head.to(master, copy=True).requires_grad_()
    loss, ce = q.ChunkedLoss.apply(h, w, targets, cap, teacher, weight, T)
    (3 * loss).backward()

    numbers, exact = [x.double().numpy() for x in (hidden, head)], [(x, h.double(), w.double()) for x, h, w in teacher]
    rest = (targets.numpy(), cap, [(x, h.numpy(), w.numpy()) for x, h, w in exact], weight, T)
    expected = loss_reference(*numbers, *rest)
    assert (loss.item(), ce.item()) == pytest.approx(expected, rel=tolerance)
    d_hidden = differences(lambda x: loss_reference(x, numbers[1], *rest)[0], numbers[0])
    d_head = differences(lambda x: loss_reference(numbers[0], x, *rest)[0], numbers[1])
    for got, reference in ((h.grad, d_hidden), (w.grad, d_head)):
        np.testing.assert_allclose(got.double().numpy() / 3, reference, atol=tolerance * np.abs(reference).max())
    assert (h.grad[list(ignored)] == 0).all() and h.grad.dtype == dtype and w.grad.dtype == master

    plain = q.plain_loss(hidden.double(), head.double(), targets, cap, exact, weight, T)
    assert [float(x) for x in plain] == pytest.approx(expected, rel=1e-12)


def test_logits_of_many_teachers():
    """Their soft-capped softmax is the mixture, also where members saturate and disagree: float32, and 1e-6 clipped off
    the cap's edge moves no logit by more than 2e-5."""
    torch.manual_seed(0)
    V, cap, shares = 300, 15.0, (0.7, 0.2999, 0.0001)
    teacher = [(share, size * torch.randn(50, 8), torch.randn(V + 4, 8)) for share, size in zip(shares, (1, 5, 200))]
    z = q.teacher_logits(teacher, slice(3, 40), V, cap)
    assert z.shape == (37, V + 4)
    found = torch.softmax(cap * torch.tanh(z[:, :V].double() / cap), dim=-1)
    mixture = sum(share * torch.softmax(cap * torch.tanh((h[3:40] @ w[:V].T).double() / cap), dim=-1)
                  for share, h, w in teacher)
    assert ((found - mixture).abs() <= 5e-5 * mixture).all()


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("mtp", [0.0, 0.3])
def test_training_loss_is_its_parts(distilled, mtp, monkeypatch):
    monkeypatch.setattr(q, "CHUNK_LOGITS", 7 * VOCAB)  # 64 rows: the last chunk holds one
    cfg = resolved(**{**SMALL, **FEATURES, "mtp_weight": mtp}, distill_weight=0.45, distill_temperature=1.2)
    model, teacher = build(mtp_weight=mtp), build(key=7).eval() if distilled else None
    tokens = random_tokens(4, 17)
    loss, ce = q.training_loss(model, [(1.0, teacher)] if distilled else [], cfg, tokens)
    loss.backward()

    wide, x, y = in_float64(model), tokens[:, :-1], tokens[:, 1:]
    hidden, ahead = wide(x, y)
    head = wide.head[:VOCAB]
    part = lambda h, target, *rest: q.plain_loss(h.flatten(0, 1), head, target.flatten(), 15.0, *rest)[0]
    expected = cross_entropy = part(hidden, y)
    if mtp:
        expected = expected + 0.3 * part(ahead[:, :-1], y[:, 1:])
    if distilled:
        wise = in_float64(teacher)
        pair = 1.0, wise(x)[0].flatten(0, 1), wise.head[:VOCAB]
        expected = 0.55 * expected + part(hidden, y, [pair], 0.45, 1.2) - 0.55 * cross_entropy
    # float32 through ten blocks against float64: 1e-7 of each product, sqrt(64) of them in a sum
    assert ce.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for (name, p), reference in zip(model.named_parameters(), wide.parameters()):
        error = (p.grad - reference.grad).abs().max() / reference.grad.abs().max()
        assert error < 1e-4, name  # the same, back through them
    assert not model.head.grad[VOCAB:].any()  # the padding of the vocabulary is outside the softmax
    if teacher is not None:
        assert all(p.grad is None for p in teacher.parameters())


def test_true_token_probs_against_numpy(monkeypatch):
    monkeypatch.setattr(q, "CHUNK_LOGITS", 7 * VOCAB)
    model, sequences = build().eval(), random_tokens(5, 17).numpy().astype(np.uint16)  # 5: the last batch of 2 is short
    got = q.true_token_probs(model, sequences, 2, q.World(0, 1, torch.device("cpu")))
    wide, expected = in_float64(model), []
    for row in torch.from_numpy(sequences.astype(np.int64)):
        logits = wide(row[None, :-1])[0][0] @ wide.head[:VOCAB].T
        p = softmax(15 * np.tanh(logits.detach().numpy() / 15), axis=1)
        expected += p[np.arange(16), row[1:]].tolist()
    np.testing.assert_allclose(got, expected, rtol=1e-4)  # float32 through ten blocks, logits of order 3


# ----------------------------------------------------------------------------------------------------------------------
# Prior

def random_predictions(M, N=400, seed=0, spread=1.5):
    """p(true token) of members that share what is hard: [M, N] float32."""
    rng = np.random.default_rng(seed)
    return expit(rng.normal(-2, 2, size=N) + spread * rng.normal(size=(M, N))).astype(np.float32)


def mixture(P, w):
    return -np.log(np.asarray(w) @ np.asarray(P, dtype=np.float64)).mean()


def gap_of(P, w):
    P = np.asarray(P, dtype=np.float64)
    return math.log(max((P / (w @ P)).mean(axis=1)))


def em(P, passes):
    P, w = np.asarray(P, dtype=np.float64), np.full(len(P), 1 / len(P))
    for _ in range(passes):
        w = w * (P / (w @ P)).mean(axis=1)
    return w


@pytest.mark.parametrize("M, seed", [(2, 0), (3, 1), (6, 2), (12, 3)])
def test_prior_against_scipy_and_em(M, seed):
    P = random_predictions(M, seed=seed)
    w, gap = q.fit_prior(P)
    wide = P.astype(np.float64)
    found = scipy.optimize.minimize(
        lambda w: mixture(wide, w), np.full(M, 1 / M), jac=lambda w: -(wide / (w @ wide)).mean(axis=1), method="SLSQP",
        bounds=[(0, 1)] * M, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, options={"ftol": 1e-14})
    slow = em(P, 20_000)
    assert found.success and w.min() >= 0 and w.sum() == pytest.approx(1, abs=1e-12)
    # within the certificate of the optimum, which scipy and EM reach to about 1e-9
    assert gap <= 1e-7 and mixture(P, w) == pytest.approx(found.fun, abs=1.1e-7)
    assert mixture(P, w) == pytest.approx(mixture(P, slow), abs=1.1e-7)
    # F is curved: F(w) - F* = (w - w*) H (w - w*) / 2 <= 1e-7, and H >= 0.02 here
    np.testing.assert_allclose(w, slow, atol=5e-3)


@pytest.mark.parametrize("tolerance", [1.0, 1e-2, 1e-4, 1e-7, 1e-10])
def test_the_gap_bounds_the_distance_from_the_optimum(tolerance):
    for seed, (M, N, spread) in enumerate([(2, 50, 0.3), (5, 200, 1.0), (9, 60, 3.0), (20, 30, 2.0), (40, 500, 0.1)]):
        P = random_predictions(M, N, seed, spread)
        w, gap = q.fit_prior(P, tolerance=tolerance)
        assert gap <= tolerance and gap == pytest.approx(max(0, gap_of(P, w)), abs=1e-12)
        assert mixture(P, w) - min(mixture(P, em(P, 3000)), mixture(P, q.fit_prior(P, 1e-11)[0])) <= gap + 1e-12


def test_prior_of_members_that_are_each_right_on_a_known_part():
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    right = np.repeat(np.arange(4), (1000 * shares).astype(int))
    P = np.where(right == np.arange(4)[:, None], 0.9, 1e-20)
    w, _ = q.fit_prior(P)
    np.testing.assert_allclose(w, shares, atol=1e-3)  # F(w) - F* = sum (w - w*)^2 / (2 w*) <= 1e-7: 5e-4
    P = np.vstack([P, 0.5 * P[:1]])  # a fifth member, everywhere worse than the first
    assert q.fit_prior(P)[0][4] < 1e-5


@pytest.mark.parametrize("M", [1, 2, 7])
def test_prior_of_identical_members(M):
    P = np.repeat(random_predictions(1), M, axis=0)
    w, gap = q.fit_prior(P)
    assert w == pytest.approx(np.full(M, 1 / M)) and 0 <= gap < 1e-12
    assert mixture(P, w) == pytest.approx(mixture(P[:1], [1.0]), abs=1e-12)


@pytest.mark.parametrize("M, N", [(64, 2000), (150, 40_000)])  # the second is read in several pieces
def test_prior_needs_few_passes(M, N):
    w, gap = q.fit_prior(random_predictions(M, N, spread=0.3), max_passes=25)
    assert gap <= 1e-7


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
def test_prior_refuses_what_is_no_probability(bad):
    P = random_predictions(3)
    P[1, 2] = bad
    with pytest.raises(ValueError, match="positive and finite"):
        q.fit_prior(P)


def test_population_table():
    M = 35
    fit, scored = random_predictions(M, seed=1), random_predictions(M, seed=2)
    table, own = q.population_table(fit, scored), q.population_table(fit, fit)
    w, gap = q.fit_prior(fit)
    assert table["weights"] == pytest.approx(w) and table["gap"] == gap and table["ranked"] == np.argsort(-w).tolist()
    assert own["weights"] == table["weights"]  # the fit sees its own text alone
    assert [row["k"] for row in table["rows"]] == [*range(1, 33), 35]
    for row, mine in zip(table["rows"], own["rows"]):
        top = sorted(range(M), key=lambda i: -w[i])[:row["k"]]
        assert row["uniform"] == pytest.approx(mixture(scored[top], np.full(len(top), 1 / len(top))), abs=1e-9)
        assert row["learned"] == pytest.approx(mixture(scored[top], w[top] / w[top].sum()), abs=1e-9)
        members, weights = q.best_members(fit, row["k"])
        assert row["pruned"] == pytest.approx(mixture(scored[members], np.array(weights)), abs=1e-9)
    assert own["rows"][-1]["learned"] < own["rows"][-1]["uniform"]
    assert table["rows"][-1]["learned"] == q.mixture_loss(scored, w) == pytest.approx(mixture(scored, w), rel=1e-12)


def test_pruned():
    """Each set is the one before without its least member, under the optimal weights; of ten alike pairs it keeps one of
    a pair where the largest weights would take both; close to the best pair of all."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(2, 4000))  # two kinds of member, six copies of the first one and two of the other
    P = np.exp(-np.abs(np.repeat(truth, (6, 2), axis=0) + 0.1 * rng.normal(size=(8, 4000))) - 0.1)
    path = list(q.pruned(P))
    assert [len(members) for members, _ in path] == sorted({len(m) for m, _ in path}, reverse=True)
    for (members, weights), (fewer, _) in zip(path, [*path[1:], ([], [])]):
        assert set(fewer) <= set(members[:-1]) and weights == sorted(weights, reverse=True)
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        assert mixture(P[members], np.array(weights)) <= mixture(P[members], em(P[members], 1000)) + 1e-6  # EM is slow
    pair, weights = q.best_members(P, 2)
    assert {i < 6 for i in pair} == {True, False}
    best = min(q.mixture_loss(P[[i, j]], q.fit_prior(P[[i, j]])[0]) for i in range(8) for j in range(i))
    assert mixture(P[pair], np.array(weights)) <= best + 0.01
    assert q.best_members(P) == path[0] == q.best_members(P, 8) and q.best_members(P, 1)[1] == [1.0]


def test_data_efficiency():
    shown = {3.048: "9.95x", 3.003: "12.79x", 2.987: "13.83x", 3.703: "2.00x", 2.892: "20.00x",
             3.7031: "<2x", 9.0: "<2x", 2.8919: ">20x", 0.1: ">20x"}
    assert {loss: q.data_efficiency(loss) for loss in shown} == shown
    for loss in np.linspace(2.892, 3.703, 200):
        tokens = np.interp(-loss, [-3.703, -3.370, -3.200, -3.123, -3.046, -2.892], [2, 4, 6, 8, 10, 20])
        assert float(q.data_efficiency(loss)[:-1]) == pytest.approx(tokens, abs=0.0051)  # two digits are shown


# ----------------------------------------------------------------------------------------------------------------------
# Model

def model_reference(model, tokens, targets, order, windows, value_layers):
    """(hidden, hidden of the multi-token block) of one sequence: numpy float64, heads and queries one by one."""
    cfg, w = model.cfg, {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    n, D, K, T = cfg.layers, cfg.width, cfg.head_dim, len(tokens)
    rms = lambda x: x / np.sqrt((x ** 2).mean(axis=-1, keepdims=True) + 1e-6)
    turn = np.exp(-1j * np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, K, 2) / K))

    def rotary(x):  # channel j and channel j + K/2 are one complex number
        z = (x[:, :K // 2] + 1j * x[:, K // 2:]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    def block(name, x, window, value):
        at = lambda part: w[f"{name}.{part}"]
        h, y = rms(x), np.zeros((T, D))
        heads = [[h @ at("attn.qkv")[s, i:i + K].T for i in range(0, D, K)] for s in range(3)]
        if cfg.head_mixing:
            heads = [np.tensordot(m, np.stack(part), axes=1) for m, part in zip(at("attn.mixing"), heads)]
        for i, (query, key, v) in enumerate(zip(*heads)):
            own = slice(i * K, i * K + K)
            if value:
                v = v + 2 * expit(h[:, :32] @ at("attn.value_gate")[i])[:, None] * (x0 @ at("attn.value")[own].T)
            query, key = rms(query), rms(key)
            if cfg.induction and i >= D // K // 2:
                key = np.concatenate([np.zeros((1, K)), key[:-1]])
            else:
                query, key = rotary(query), rotary(key)
            for t in range(T):
                seen = slice(max(0, t - window + 1), t + 1)
                y[t, own] = softmax(key[seen] @ query[t] / math.sqrt(K)) @ v[seen]
            if cfg.attn_gates:
                y[:, own] *= expit(h[:, :12] @ at("attn.gate")[i])[:, None]
        x = x + y @ at("attn.out").T
        gate, up = (rms(x) @ m.T for m in at("gate_up"))
        return x + (gate * expit(gate) * up) @ at("down").T

    x = x0 = rms(w["embed"][tokens])
    if cfg.smear:
        x = x0 = rms(x + w["smear"] * np.concatenate([np.zeros((1, D)), x[:-1]]))
    outputs = {}
    for i in order:
        if cfg.unet and i >= n - n // 2:  # weights in the order of the layers that receive the skip
            x = x + w["skip_scale"][i - (n - n // 2)] * outputs[n - 1 - i]
        if cfg.x0_mix:
            x = w["resid_scale"][i] * x + w["x0_scale"][i] * x0
        x = outputs[i] = block(f"blocks.{i}", x, windows[i], cfg.value_embeds and i in value_layers)
    x = rms(x)
    if not cfg.mtp_weight:
        return x, None
    ahead = np.concatenate([x, rms(w["embed"][targets])], axis=1) @ w["mtp_proj"].T
    return x, rms(block("mtp_block", ahead, T, False))


# float64: the rotary buffers are float32, so angles up to 15 carry 1e-6. float32: 6e-8 a rounding, hundreds in a row.
# bf16: 2^-9 a rounding of values up to 3, some thirty in a row.
@pytest.mark.parametrize("precision, tolerance", [("float64", 2e-6), ("float32", 3e-5), ("bfloat16", 0.15)])
@pytest.mark.parametrize("features, layers, order, windows, value_layers", [
    (False, 6, range(6), [16] * 6, ()), (True, 6, [0, 1, 2, 3, 4, 3, 4, 3, 4, 5], [8, 8, 8, 16, 8, 16], (1, 3, 5)),
    (True, 5, [0, 1, 2, 3, 4, 3, 4, 3, 4], [8, 8, 8, 16, 16], (0, 2, 4))])
@pytest.mark.parametrize("stir", [False, True])
def test_model_against_numpy(precision, tolerance, features, layers, order, windows, value_layers, stir):
    if precision == "float64":
        model = in_float64(build(features, stir, layers=layers))
    else:
        model = build(features, stir, layers=layers, precision=precision)
    tokens = random_tokens(2, 17)
    hidden, ahead = model(tokens[:, :-1], tokens[:, 1:])
    for b, row in enumerate(tokens.numpy()):
        expected = model_reference(model, row[:-1], row[1:], order, windows, value_layers)
        for got, want in zip((hidden, ahead), expected):
            if want is None:
                assert got is None
            else:
                np.testing.assert_allclose(got[b].detach().double().numpy(), want, atol=tolerance)


def test_gradients_against_finite_differences():
    model, tokens = in_float64(build()), random_tokens(2, 17)

    def loss():
        (hidden, ahead), y = model(tokens[:, :-1], tokens[:, 1:]), tokens[:, 1:]
        part = lambda h, target: q.plain_loss(h.flatten(0, 1), model.head[:VOCAB], target.flatten(), 15.0)[0]
        return part(hidden, y) + 0.3 * part(ahead[:, :-1], y[:, 1:])

    loss().backward()
    rng, names = np.random.default_rng(0), dict(model.named_parameters())
    chosen = [rng.choice([n for n in names if kind_of(n) == kind]) for kind in sorted({kind_of(n) for n in names})]
    assert len(chosen) == 15
    for name in chosen + ["mtp_block.attn.qkv", "mtp_block.down"]:
        p = names[name].data.view(-1)
        grad = names[name].grad.view(-1)
        for i in rng.choice(np.flatnonzero(grad.numpy()), size=3):
            keep, values = p[i].item(), []
            for h in (1e-5, -1e-5):
                p[i] = keep + h
                with torch.no_grad():
                    values.append(loss().item())
            p[i] = keep
            # differences err by 1e-16 / 1e-5 = 1e-11 from rounding and 1e-10 from curvature
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(grad[i].item(), rel=1e-4, abs=1e-8), name


def moved(a, b):
    """Positions [T] at which two float64 results [1, T, D] differ by more than rounding."""
    return torch.nonzero((a - b).abs().amax(dim=(0, 2)) > 1e-12).flatten().tolist()


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("t", [1, 7, 8, 15])
def test_no_token_reaches_an_earlier_position(features, t):
    model, tokens, after = in_float64(build(features)).eval(), random_tokens(1, 16), random_tokens(1, 1, seed=5)
    other = tokens.clone()
    other[0, t] = (other[0, t] + 1) % VOCAB
    with torch.no_grad():
        (hidden, ahead), (hidden_, ahead_) = (model(x, torch.cat((x[:, 1:], after), dim=1)) for x in (tokens, other))
    assert moved(hidden, hidden_) == list(range(t, 16))
    if features:  # the multi-token block at position s sees token s + 1 and no more
        assert moved(ahead, ahead_) == list(range(t - 1, 16))


@pytest.mark.parametrize("induction", [False, True])  # whose keys are of the token before
def test_a_window_limits_the_reach_of_attention(induction):
    model = in_float64(build(induction=induction))
    x, x0 = torch.randn(2, 1, 16, 64, dtype=torch.float64, generator=seeded(0))
    other = x.clone()
    other[0, 3] += 1
    for mask, reached in ((model.short_mask, range(3, 3 + 8 + induction)), (None, range(3, 16))):
        attend = functools.partial(q.sdpa_attention, window=len(reached), mask=mask)
        assert moved(*(model.blocks[0].attn(v, x0, model.cos, model.sin, attend) for v in (x, other))) == list(reached)


def test_layers_of_the_full_scale_run():
    cfg = resolved("q0")
    assert q.layer_windows(cfg) == ([1025] * 3 + [2048]) * 7 + [1025, 2048]
    assert q.layer_order(cfg) == [*range(25), *list(range(15, 25)) * 4, *range(25, 30)]
    with torch.device("meta"):
        model = q.GPT(cfg, 50257)
    assert [i for i, b in enumerate(model.blocks) if b.attn.value is not None] == list(range(1, 30, 2))
    assert model.mtp_block.attn.value is None


def test_features_that_start_as_the_identity():
    """Head mixing at the identity and a smear of zero change nothing; attention gates at zero halve the branch; a value
    projection of zero adds nothing. The shared weights are the same, as the initial ones depend on names alone."""
    tokens = random_tokens(2, 16)
    features = dict(windows="L", unet=False, x0_mix=False, value_embeds=False, attn_gates=False, head_mixing=False,
                    loop_passes=1, loop_last=0, loop_first=0, mtp_weight=0, smear=False, induction=False)
    switched = ({}, {"head_mixing": True}, {"attn_gates": True}, {"value_embeds": True}, {"smear": True})
    plain, mixed, gated, valued, smeared = (build(stir=False, **{**features, **on}) for on in switched)
    with torch.no_grad():
        for p in [b.attn.value for b in valued.blocks if b.attn.value is not None]:
            assert p.std() > 0.1
            p.zero_()
        expected = plain(tokens)[0]
        for model in (mixed, valued, smeared):
            torch.testing.assert_close(model(tokens)[0], expected, rtol=0, atol=1e-5)  # sums in another order
        for b in plain.blocks:
            b.attn.out.mul_(0.5)
        torch.testing.assert_close(gated(tokens)[0], plain(tokens)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("smear", [False, True])
def test_induction_heads_find_what_followed_the_same_token(smear):
    """Before any training, in the first layer: the largest score is that of a token which the present one preceded."""
    model = build(features=False, stir=False, induction=True, smear=smear, layers=1, seq_len=64, head_dim=32,
                  batch_tokens=256)
    calls, model.attend = [], lambda q, k, v, window, mask: (calls.append((q, k)), v)[1]
    once, again = (torch.randperm(32, generator=seeded(i)) for i in (0, 1))  # every token twice, at any distance
    with torch.no_grad():
        model(torch.cat([once, again])[None])
    (query, key), = calls
    scores = torch.einsum("thk,shk->hts", query[0], key[0]).masked_fill(torch.ones(64, 64).triu(1) > 0, -math.inf)
    found, wanted = scores[:, 32:].argmax(-1), once.argsort()[again] + 1
    assert (found[1] == wanted).all() and (found[0] == wanted).float().mean() < 0.5


def test_rotary_is_relative():
    model = q.GPT(resolved(**SMALL), VOCAB)
    pair = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=seeded(0)).expand(2, 1, 16, 1, 16)
    a, b = (q.rotate(x, model.cos.double(), model.sin.double())[0, :, 0] for x in pair)
    scores = (a @ b.T).numpy()  # the same two vectors at every pair of positions
    for offset in range(-15, 16):
        diagonal = np.diagonal(scores, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)  # float32 angles up to 15: 1e-6 each
    assert np.ptp(scores[0]) > 0.5
    angles = np.arange(16)[:, None] * 10_000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(model.cos[:, 0].numpy(), np.cos(angles), atol=2e-6)
    np.testing.assert_allclose(a.norm(dim=-1).numpy(), a[0].norm().item(), rtol=1e-6)  # lengths are kept


def test_initial_weights():
    d = 64
    constant = {"resid_scale": 1.0, "skip_scale": 1.0, "x0_scale": 0.1, "gate": 0.0, "value_gate": 0.0, "smear": 0.0}
    spread = {"embed": 1.0, "head": 0.001, "out": d ** -0.5, "down": d ** -0.5}
    seen = set()
    for name, p in build(stir=False).named_parameters():
        p, kind = p.detach().double(), kind_of(name)
        seen.add(kind)
        if kind in constant:
            assert (p.float() == constant[kind]).all()
        elif kind == "mixing":
            assert (p == torch.eye(p.size(-1))).all()
        else:
            if kind == "qkv":  # induction heads, half of all, start with one matrix for queries and keys
                assert (p[0] == p[1]).all(dim=1).tolist() == [False] * (d // 2) + [True] * (d // 2)
                p = p[[0, 2]]
            std = spread.get(kind, d ** -0.5)  # uniform(+-sqrt(3/d)) has a std of 1/sqrt(d)
            assert p.std() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name  # five standard errors
            assert abs(p.mean()) < 5 * std / math.sqrt(p.numel())
            if kind in spread:
                assert p.abs().max() > 3 * std
            else:
                assert 0.98 * math.sqrt(3 / d) < p.abs().max() <= math.sqrt(3 / d) * (1 + 1e-6)
    assert len(seen) == 15


def test_initial_weights_depend_on_key_and_name_alone():
    torch.manual_seed(1)
    first, rng = build(stir=False, key=3), torch.get_rng_state()
    assert torch.equal(rng, torch.manual_seed(1).get_state())  # the global generator is left alone
    torch.manual_seed(2)
    again, other = build(stir=False, key=3), build(stir=False, key=4)
    smaller = build(False, False, key=3, layers=2, induction=True)
    weights = dict(first.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in [*again.named_parameters(), *smaller.named_parameters()])
    assert not torch.equal(other.embed, first.embed)
    assert not torch.equal(first.blocks[0].down, first.blocks[1].down)
    pair = [q.GPT(first.cfg, VOCAB).init_weights(0, *key).embed for key in ((1, 2), (2, 1))]
    assert not torch.equal(*pair)


def test_perturbation():
    model = build(stir=False, layers=2, loop_first=0, loop_last=0)  # two layers: skip_scale has one element
    with torch.no_grad():
        model.resid_scale.copy_(torch.tensor([1.0, 3.0]))
        model.blocks[0].attn.qkv[1] *= 10
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(1)
    q.perturb(model, 0.25, 0, 1, 2)
    torch.manual_seed(2)
    q.perturb(twin, 0.25, 0, 1, 2)
    q.perturb(other, 0.25, 0, 1, 3)
    for (name, p), same, different in zip(model.named_parameters(), twin.parameters(), other.parameters()):
        change = (p - before[name]).detach()
        assert torch.equal(p, same)
        if kind_of(name) in ("gate", "value_gate", "x0_scale", "skip_scale", "smear"):  # constant, or one element
            assert not change.any(), name
            continue
        assert change.abs().max() > 0 and not torch.equal(p, different), name
        matrices = [(change, before[name])] if p.ndim < 3 else zip(change, before[name])
        for noise, old in matrices:
            ratio = (noise.std() / old.std()).item()
            assert ratio == pytest.approx(0.25, rel=5 / math.sqrt(2 * noise.numel() - 2)), name  # five standard errors


@pytest.mark.filterwarnings("ignore:std")
def test_perturbation_of_a_model_with_one_head():
    model = build(head_dim=64, induction=False)
    q.perturb(model, 0.25, 0)
    assert all(p.isfinite().all() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Scale

def test_parameters_of_the_full_scale_run():
    with torch.device("meta"):
        model = q.GPT(resolved("q0"), 50257)
    d, h, heads, n, vocab = 2048, 5632, 16, 30, 64 * 786  # 50,304
    expected = {
        "embed": vocab * d, "head": vocab * d, "qkv": (n + 1) * 3 * d * d, "out": (n + 1) * d * d,  # + 1: multi-token
        "gate_up": (n + 1) * 2 * h * d, "down": (n + 1) * d * h, "mixing": (n + 1) * 3 * heads ** 2,
        "gate": (n + 1) * heads * 12, "value": n // 2 * d * d, "value_gate": n // 2 * heads * 32,
        "resid_scale": n, "x0_scale": n, "skip_scale": n // 2, "mtp_proj": 2 * d * d}
    counted = Counter()
    for name, p in model.named_parameters():
        counted[kind_of(name)] += p.numel()
    assert counted == expected
    assert f"{sum(counted.values()) / 1e9:.2f}" == "1.87"
    assert q.GPT(resolved(**SMALL), 130).head.shape == (192, 64)  # padded to a multiple of 64


def test_constants_of_the_full_scale_run():
    constants = dict(
        seq_len=2048, layers=30, width=2048, head_dim=128, mlp_hidden=5632, softcap=15, dropout=0.1,
        windows="SSSL", short_window=1025, unet=True, x0_mix=True, value_embeds=True, attn_gates=True, head_mixing=True,
        loop_first=15, loop_last=24, loop_passes=5, mtp_weight=0.3, lr_matrix=0.01, lr_embed=0.0375, lr_head=0.0005,
        weight_decay=1.3, grad_clip=1, lr_floor=0.08,
        wd_start=0.7, wd_end=1.0, batch_tokens=524_288, edge_batch_tokens=393_216, epochs_per_cycle=2,
        boundary="perturb", noise_first=0.25, noise_last=0.05, distill_weight=0.45, distill_temperature=1.2, distill_after=8,
        population="q0", train_tokens=0, smear=False, induction=False)
    cfg = dataclasses.asdict(resolved("q0"))
    assert {name: cfg[name] for name in constants} == constants
    assert (q.LR_RESID, q.LR_X0, q.LR_MIXING, q.MOMENTUM, q.ROTARY_BASE) == (0.00025, 0.025, 0.02, 0.95, 10_000)
    assert list(q.POLAR_EXPRESS) == COEFFICIENTS and (q.VALUE_GATE_CHANNELS, q.ATTN_GATE_CHANNELS) == (32, 12)


@pytest.mark.parametrize("mtp", [0.0, 0.3])
def test_flops_against_torchs_counter(mtp):
    """Windows off, whole score matrices. Head mixing is off: it costs per step and not per token."""
    model = build(windows="L", head_mixing=False, mtp_weight=mtp)
    tokens = random_tokens(3, 17)

    def forward(targets=None):
        hidden, ahead = model(tokens[:, :-1], targets)
        head = model.head[:VOCAB]
        return sum((h.flatten(0, 1) @ head.T).sum() for h in (hidden, ahead) if h is not None)

    def count(run):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # MATH: made of plain products
            run()
        return counter.get_total_flops() / (3 * 16)

    training, teacher = q.flops_per_token(model.cfg, VOCAB, causal=False)
    assert count(lambda: forward(tokens[:, 1:]).backward()) == training
    with torch.no_grad():
        assert count(forward) == teacher


def test_flops_of_causal_attention_count_visible_keys():
    cfg = resolved(**SMALL, **FEATURES)
    short, full = (np.tril(np.ones((16, 16))) - np.tril(np.ones((16, 16)), -w) for w in (8, 16))
    blocks = [short, short, short, full, short, full, *[full, short] * 2]  # replays of layers 3 and 4 last
    missing = [sum(4 * 64 * (16 - m.sum() / 16) for m in masks) for masks in (blocks + [full], blocks)]  # + multi-token
    (training, teacher), (training_, teacher_) = (q.flops_per_token(cfg, VOCAB, causal=c) for c in (False, True))
    assert (training - training_, teacher - teacher_) == pytest.approx((3 * missing[0], missing[1]))
    mask = q.GPT(cfg, VOCAB).short_mask
    assert torch.equal(mask, torch.from_numpy(short).bool())


# ----------------------------------------------------------------------------------------------------------------------
# Data order and randomness

def corpus(lengths=(5, 40, 1, 17, 30, 9, 23), seq_len=8):
    """Documents of distinct tokens, each counting up from a multiple of 100."""
    documents = tuple(np.arange(100 * i, 100 * i + n, dtype=np.uint16) for i, n in enumerate(lengths))
    splits = {"train": np.concatenate(documents), **{s: np.arange(100 + 7 * i) for i, s in enumerate(q.SPLITS[1:])}}
    return q.Corpus(name="t", vocab_size=1000, splits=splits, hashes={}, documents=documents, seq_len=seq_len)


def test_seeds_are_pinned_and_distinct():
    assert q.seed_of("order", 0, 1, 2) == 4250261670952940785 and q.seed_of("init", "head") == 4471760950963050618
    keys = [*itertools.product(["order", "noise"], range(5), range(5)), ("order", 11, 1), ("order", 1, 11), ("order",)]
    seeds = {q.seed_of(*key) for key in keys}
    assert len(seeds) == len(keys) and 0 <= min(seeds) and max(seeds) < 2 ** 63


def test_an_epoch_holds_every_document():
    data = corpus()
    everything = Counter(np.concatenate(data.documents).tolist())
    epoch = data.epoch(0, 0, 0)
    dropped = everything - Counter(epoch.flatten().tolist())
    assert epoch.shape == (data.train_sequences, 9) == (125 // 9, 9)
    assert not Counter(epoch.flatten().tolist()) - everything and dropped.total() == 125 % 9
    # documents are whole and in order: inside a sequence a token is followed by its successor, or it ends its document
    ends, starts = ({int(d[i]) for d in data.documents} for i in (-1, 0))
    pairs = [pair for row in epoch.tolist() for pair in zip(row, row[1:])]
    assert all(b == a + 1 or a in ends and b in starts for a, b in pairs)
    assert any((a, b) not in zip(data.splits["train"].tolist(), data.splits["train"][1:].tolist()) for a, b in pairs)
    # sequences are permuted too: sequences that follow each other in the text are not neighbours in the epoch
    assert sum(b[0] == a[-1] + 1 for a, b in zip(epoch, epoch[1:])) <= 3


def test_epochs_do_not_depend_on_history_and_differ():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 7)]
    one, two = corpus(), corpus()
    forward = {key: one.epoch(*key) for key in keys}
    backward = {key: two.epoch(*key).copy() for key in reversed(keys)}
    assert all((forward[key] == backward[key]).all() and (forward[key] == one.epoch(*key)).all() for key in keys)
    assert len({epoch.tobytes() for epoch in forward.values()}) == len(keys)


def test_batches_straddle_epochs():
    data = corpus()
    n = data.train_sequences
    stream = np.concatenate([data.epoch(3, 1, e) for e in range(4)])
    for first, count in [(2 * n, 5), (0, 4), (n - 2, 5), (n - 1, n + 2), (1, 3)]:
        batch = data.batch(3, 1, first, count)
        assert batch.dtype == np.int64 and (batch == stream[first:first + count]).all()


def test_evaluation_sequences():
    data = corpus()
    for split in q.SPLITS[1:]:
        tokens, sequences = data.splits[split], data.eval_sequences(split)
        assert sequences.shape == (len(tokens) // 9, 9)
        assert sequences.flatten().tolist() == tokens[:sequences.size].tolist()


def test_import_has_no_side_effect(tmp_path):
    program = """
import json, os, random, sys
import numpy, torch
sys.argv = ["other.py", "--no-such-flag"]
state = lambda: [sys.argv[:], dict(os.environ), os.getcwd(), sorted(os.listdir(".")), torch.get_rng_state().tolist(),
                 random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_num_threads(),
                 torch.get_default_dtype() == torch.float32, torch.get_float32_matmul_precision()]
before = state()
import train_q0
print(json.dumps([state() == before, torch.distributed.is_initialized(), torch.cuda.is_initialized()]))
"""
    # a bare environment: this process's own may already hold what its import of train_q0 had left there
    bare = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env={**bare, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [True, False, False]  # json.loads: nothing else was printed


def test_the_script_stays_short():
    lines = (ROOT / "train_q0.py").read_text(encoding="utf-8").splitlines()
    assert not [f"line {i}: {len(line)}" for i, line in enumerate(lines, 1) if len(line) > 120]
