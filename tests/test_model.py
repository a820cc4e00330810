"""Model: attention kernels, block, table of parameters, initial weights, noise, FLOPs; against
references in numpy float64. Last, a user's edits."""
import copy
import dataclasses
import functools
import importlib.util
import math
import sys

import numpy as np
import pytest
import models
import torch
from scipy.special import expit, softmax
from models import VOCAB, build, in_float64, random_tokens, resolved, seeded, small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_q0 as q

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------
# Attention kernels

def attention_by_loops(query, key, value, window):
    """[B, T, H, K] each, one query after the other."""
    rows = []
    for t in range(query.size(1)):
        seen = slice(max(0, t - window + 1), t + 1)
        scores = torch.einsum("bhk,bshk->bhs", query[:, t], key[:, seen])
        share = (scores / math.sqrt(query.size(-1))).softmax(-1)
        rows.append(torch.einsum("bhs,bshk->bhk", share, value[:, seen]))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("T, window", [(16, 16), (16, 8), (16, 1), (7, 16), (7, 3)])
@pytest.mark.parametrize("name", ["sdpa", "plain", "matmul"])
def test_attention_kernels(name, T, window):
    """Forward and backward pass in float64."""
    draws = torch.randn(4, 2, T, 2, 32, generator=seeded(0), dtype=torch.float64)
    inputs = [x.requires_grad_() for x in draws[:3].unbind()]
    attend = q.ATTENTION[name](small(), CPU, window)
    passes = []
    for out in (attend(*inputs), attention_by_loops(*inputs, window)):
        passes.append([out, *torch.autograd.grad(out, inputs, draws[3])])
    for found, wanted in zip(*passes):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_flex_attention(monkeypatch):
    """Forward, all that it has on a CPU. Traced only: to compile it takes half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    inputs = torch.randn(3, 2, 16, 2, 32, generator=seeded(0))
    found = q.flex_attention(small(), CPU, 5)(*inputs)
    wanted = attention_by_loops(*inputs, 5)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def broken(cfg, device, window):
    raise OSError("undefined symbol")


def forgets_its_window(cfg, device, window):
    return q.sdpa_attention(cfg, device, cfg.seq_len)


def has_no_backward_pass(cfg, device, window):
    attend = q.sdpa_attention(cfg, device, window)
    return lambda *inputs: attend(*inputs).detach()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The kernels that a GPU would try, on a CPU; sdpa stands in for flex."""
    names = q.attention_names

    def names_on_gpu(cfg, device_type, window):
        return names(cfg, "cuda", window)

    kernels = {"flex": q.sdpa_attention, "sdpa": q.sdpa_attention}
    monkeypatch.setattr(q, "attention_names", names_on_gpu)
    monkeypatch.setattr(q, "ATTENTION", kernels)
    return kernels


@pytest.mark.parametrize("flex, reason", [
    (broken, "OSError: undefined symbol"),
    (forgets_its_window, "disagrees"),
    (has_no_backward_pass, "does not require grad")])
def test_a_window_whose_kernel_fails_gets_the_next(flex, reason, as_on_a_gpu, capsys):
    cfg = small()
    assert q.choose_attention(cfg, CPU)[0] == "flex+sdpa"
    assert capsys.readouterr().err == ""
    as_on_a_gpu["flex"] = flex
    name, attends = q.choose_attention(cfg, CPU)
    assert name == "sdpa"
    assert attends.keys() == {8, 16}
    said = capsys.readouterr().err
    assert said.startswith("notice: attention kernel flex does not work")
    assert reason in said
    assert said.count("\n") == 1


def test_no_kernel_that_works_is_an_error(as_on_a_gpu):
    as_on_a_gpu["sdpa"] = broken
    with pytest.raises(q.UserError, match="sdpa does not work: OSError: undefined symbol"):
        q.choose_attention(small(), CPU)


def test_kernels_of_a_cpu():
    long = resolved(seq_len=2048, micro_batch=1)
    assert q.choose_attention(small(precision="bfloat16"), CPU)[0] == "matmul"
    assert q.choose_attention(small(), CPU)[0] == "sdpa"
    assert q.choose_attention(long, CPU)[0] == "sdpa"
    assert q.choose_attention(small(attention="plain"), CPU)[0] == "plain"


# ------------------------------------------------------------------------------------------------
# The model in numpy float64: one sequence, heads and queries one by one

def rms(x):
    return x / np.sqrt((x ** 2).mean(axis=-1, keepdims=True))


def before(x):
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def rotary(x):
    """Channels j and j + K/2 are one complex number."""
    T, K = x.shape
    angle = np.outer(np.arange(T), 10_000.0 ** (-np.arange(0, K, 2) / K))
    z = (x[:, :K // 2] + 1j * x[:, K // 2:]) * np.exp(-1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


def head_reference(query, key, value, window, by_content):
    query = rms(query)
    key = rms(key)
    if by_content:
        key = before(key)
    else:
        query = rotary(query)
        key = rotary(key)
    rows = []
    for t in range(len(query)):
        seen = slice(max(0, t - window + 1), t + 1)
        share = softmax(key[seen] @ query[t] / math.sqrt(query.shape[1]))
        rows.append(share @ value[seen])
    return np.stack(rows)


def block_reference(x, x0, w, window, cfg):
    """x, x0 [T, D], w {bank: tensor} of the block."""
    heads = [slice(i, i + cfg.head_dim) for i in range(0, cfg.width, cfg.head_dim)]
    h = rms(x)
    parts = [np.stack([h @ part[own].T for own in heads]) for part in w["qkv"]]
    if cfg.head_mixing:
        parts = [np.tensordot(m, part, axes=1) for m, part in zip(w["mixing"], parts)]
    y = np.zeros_like(x)
    for i, own in enumerate(heads):
        query, key, value = (part[i] for part in parts)
        if "value" in w:
            gate = 2 * expit(h[:, :32] @ w["value_gate"][i])
            value = value + gate[:, None] * (x0 @ w["value"][own].T)
        by_content = cfg.induction and i >= len(heads) // 2
        y[:, own] = head_reference(query, key, value, window, by_content)
        if cfg.attn_gates:
            y[:, own] *= expit(h[:, :12] @ w["attn_gate"][i])[:, None]
    x = x + y @ w["out"].T
    gate, up = (rms(x) @ matrix.T for matrix in w["gate_up"])
    return x + (gate * expit(gate) * up) @ w["down"].T


def model_reference(model, tokens, order, windows, with_value):
    """(hidden, hidden of the multi-token block) of tokens [T+1]."""
    cfg = model.cfg
    n = cfg.layers
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    def run(i, x, window):
        own = {}
        for name, bank in w.items():
            blocks = with_value if name in ("value", "value_gate") else range(n + 1)
            if model.table[name].blocks and i in blocks:
                own[name] = bank[blocks.index(i)]
        return block_reference(x, x0, own, window, cfg)

    x = rms(w["embed"][tokens[:-1]])
    if cfg.smear:
        x = rms(x + w["smear"] * before(x))
    x0 = x
    outputs = {}
    for i in order:
        decoder = i - (n - n // 2)
        if cfg.unet and decoder >= 0:
            x = x + w["skip_scale"][decoder] * outputs[n - 1 - i]
        if cfg.x0_mix:
            x = w["resid_scale"][i] * x + w["x0_scale"][i] * x0
        x = run(i, x, windows[i])
        outputs[i] = x
    x = rms(x)
    if not cfg.mtp_weight:
        return x, None
    following = rms(w["embed"][tokens[1:]])
    ahead = np.concatenate([x, following], axis=1) @ w["mtp_proj"].T
    return x, rms(run(n, ahead, len(ahead)))


OFF = dict(
    models.PLAIN, windows="L", unet=False, x0_mix=False, attn_gates=False, head_mixing=False,
    loop_first=0, loop_last=0, loop_passes=1, mtp_weight=0)
SHAPES = {  # settings; order of the layers, their windows, those with a value embedding
    "plain": (OFF, range(6), [16] * 6, []),
    "even": ({}, [0, 1, 2, 3, 4, 3, 4, 3, 4, 5], [8, 8, 8, 16, 8, 16], [1, 3, 5]),
    "odd": (dict(layers=5), [0, 1, 2, 3, 4, 3, 4, 3, 4], [8, 8, 8, 16, 16], [0, 2, 4])}


# float64: rotary angles of float32, up to 15, err by 1e-6. float32: 6e-8 a rounding, hundreds in a
# row. bf16: 2^-9 a rounding of values up to 3, some thirty in a row.
@pytest.mark.parametrize("shape, precision, tolerance", [
    ("plain", "float64", 2e-6), ("even", "float64", 2e-6), ("odd", "float64", 2e-6),
    ("even", "float32", 3e-5), ("even", "bfloat16", 0.15)])
def test_model_against_numpy(shape, precision, tolerance):
    changes, *layout = SHAPES[shape]
    model = build(**changes)
    reference = model
    if precision == "float64":
        model = in_float64(model)
    elif precision == "bfloat16":
        model = q.GPT(dataclasses.replace(model.cfg, precision=precision), VOCAB).bfloat16()
        model.load_state_dict(reference.state_dict())
        reference = model
    tokens = random_tokens(2, 17)
    found = model(tokens[:, :-1], tokens[:, 1:])
    for b in range(2):
        wanted = model_reference(reference, tokens[b].numpy(), *layout)
        for x, y in zip(found, wanted):
            if y is None:
                assert x is None
            else:
                np.testing.assert_allclose(x[b].detach().double(), y, atol=tolerance)


def test_gradients_against_finite_differences():
    """Three weights of every bank; differences of float64 err by 1e-10."""
    model = in_float64(build())
    tokens = random_tokens(2, 17)
    targets = tokens[:, 1:].flatten()
    after_next = torch.nn.functional.pad(tokens[:, 2:], (0, 1), value=-1).flatten()

    def loss():
        hidden, ahead = model(tokens[:, :-1], tokens[:, 1:])
        ce, _ = q.plain_loss(hidden.flatten(0, 1), model.head[:VOCAB], targets, 15.0)
        mtp, _ = q.plain_loss(ahead.flatten(0, 1), model.head[:VOCAB], after_next, 15.0)
        return ce + 0.3 * mtp

    loss().backward()
    rng = np.random.default_rng(0)
    weights = dict(model.named_parameters())
    assert len(weights) == 15
    for name, weight in weights.items():
        flat = weight.data.view(-1)
        grad = weight.grad.view(-1)
        for i in rng.choice(np.flatnonzero(grad.numpy()), size=3).tolist():
            kept = flat[i].item()
            values = []
            for h in (1e-5, -1e-5):
                flat[i] = kept + h
                with torch.no_grad():
                    values.append(loss().item())
            flat[i] = kept
            slope = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(grad[i].item(), rel=1e-4, abs=1e-8), name


def moved(a, b):
    """Positions at which float64 results [1, T, D] differ by more than rounding."""
    return torch.nonzero((a - b).abs().amax(dim=(0, 2)) > 1e-12).flatten().tolist()


@pytest.mark.parametrize("t", [1, 8, 15])
def test_no_token_reaches_an_earlier_position(t):
    model = in_float64(build()).eval()
    tokens = random_tokens(1, 17)
    other = tokens.clone()
    other[0, t] = (other[0, t] + 1) % VOCAB
    with torch.no_grad():
        hidden, ahead = model(tokens[:, :-1], tokens[:, 1:])
        hidden_, ahead_ = model(other[:, :-1], other[:, 1:])
    assert moved(hidden, hidden_) == list(range(t, 16))
    assert moved(ahead, ahead_) == list(range(t - 1, 16))  # it is told the next token


@pytest.mark.parametrize("window, reach", [(8, 9), (16, 16)])  # induction keys are a token old
def test_a_window_limits_the_reach_of_a_block(window, reach):
    model = in_float64(build())
    x, x0 = torch.randn(2, 1, 16, 64, dtype=torch.float64, generator=seeded(0))
    w = model.layers(x0)[0]
    other = x.clone()
    other[0, 3] += 1
    rest = (w, model.cos, model.sin, model.attend[window], model.cfg, True)
    changed = moved(q.block(x, *rest), q.block(other, *rest))
    assert changed == list(range(3, min(16, 3 + reach)))


def test_layers_of_the_published_run():
    cfg = resolved("q0")
    table = q.parameter_table(cfg, 50257)
    assert q.layer_windows(cfg) == ([1025] * 3 + [2048]) * 7 + [1025, 2048]
    assert q.layer_order(cfg) == [*range(25), *list(range(15, 25)) * 4, *range(25, 30)]
    assert table["value"].blocks == tuple(f"blocks.{i}" for i in range(1, 30, 2))


def test_features_that_start_as_the_identity():
    """Head mixing and smear change nothing at first, attention gates halve the branch, a value
    projection of zero adds nothing. Shared weights are the same: they depend on names alone."""
    tokens = random_tokens(2, 16)
    plain = build(stir=False, **OFF)
    valued = build(stir=False, **{**OFF, "value_embeds": True})
    gated = build(stir=False, **{**OFF, "attn_gates": True})
    mixed = build(stir=False, **{**OFF, "head_mixing": True, "smear": True})
    assert valued.value.std() > 0.1
    with torch.no_grad():
        valued.value.zero_()
        wanted, _ = plain(tokens)
        for model in (valued, mixed):
            found, _ = model(tokens)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        plain.out.mul_(0.5)
        torch.testing.assert_close(gated(tokens), plain(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("smear", [False, True])
def test_induction_heads_find_what_followed_the_same_token(smear):
    """Untrained, in the first layer: the largest score is that of a token which the present one
    preceded."""
    changes = dict(induction=True, smear=smear, layers=1, seq_len=64, head_dim=32, batch_tokens=128)
    model = build(stir=False, **{**OFF, **changes})
    calls = []

    def attend(query, key, value):
        calls.append((query[0], key[0]))
        return value

    model.attend = {64: attend}
    once = torch.randperm(32, generator=seeded(0))
    again = torch.randperm(32, generator=seeded(1))  # every token twice, at any distance
    with torch.no_grad():
        model(torch.cat([once, again])[None])
    query, key = calls[0]
    scores = torch.einsum("thk,shk->hts", query, key)
    hidden = torch.ones(64, 64, dtype=torch.bool).triu(1)
    by_position, by_content = scores.masked_fill(hidden, -math.inf)[:, 32:].argmax(-1)
    wanted = once.argsort()[again] + 1
    assert (by_content == wanted).all()
    assert (by_position == wanted).float().mean() < 0.5


# ------------------------------------------------------------------------------------------------
# Initial weights and noise

D = 64
CONSTANT = {"resid_scale": 1.0, "skip_scale": 1.0, "x0_scale": 0.1, "attn_gate": 0.0,
            "value_gate": 0.0, "smear": 0.0}
NORMAL = {"embed": 1.0, "head": 0.001, "out": D ** -0.5, "down": D ** -0.5}
UNIFORM = ("qkv", "gate_up", "value", "mtp_proj")  # of the same spread: 1 / sqrt(D)


def test_initial_weights():
    weights = dict(build(stir=False).named_parameters())
    assert weights.keys() == {*CONSTANT, *NORMAL, *UNIFORM, "mixing"}
    for name, value in CONSTANT.items():
        assert (weights[name] == value).all(), name
    assert (weights["mixing"] == torch.eye(4)).all()
    half = D // 2  # the other heads start with one matrix for queries and keys
    queries, keys, values = weights["qkv"].detach().unbind(1)
    assert torch.equal(queries[:, half:], keys[:, half:])
    assert not (queries[:, :half] == keys[:, :half]).any()
    drawn = {name: weights[name].detach() for name in (*NORMAL, *UNIFORM)}
    drawn["qkv"] = torch.stack((queries, values))
    for name, x in drawn.items():
        x = x.double()
        std = NORMAL.get(name, D ** -0.5)
        bound = math.sqrt(3) * std
        assert x.std() == pytest.approx(std, rel=5 / math.sqrt(2 * x.numel())), name  # 5 errors
        assert abs(x.mean()) < 5 * std / math.sqrt(x.numel()), name
        assert (x.abs().max() <= bound * (1 + 1e-6)) == (name in UNIFORM), name


def test_initial_weights_depend_on_key_and_name_alone():
    state = torch.get_rng_state()
    first = build(stir=False, key=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = build(stir=False, key=3)
    other = build(stir=False, key=4)
    smaller = build(stir=False, key=3, **{**OFF, "induction": True, "layers": 2})
    for name, weight in first.named_parameters():
        assert torch.equal(weight, getattr(again, name))
        assert name in (*CONSTANT, "mixing") or not torch.equal(weight, getattr(other, name))
    for name, weight in smaller.named_parameters():
        shared = getattr(first, name)
        assert torch.equal(weight, shared[:2] if weight.ndim > 2 else shared)
    assert not torch.equal(first.down[0], first.down[1])


def perturbed(model, *key):
    model = copy.deepcopy(model)
    q.perturb(model.table, dict(model.named_parameters()), 0.25, *key)
    return model


def test_perturbation():
    """Noise of a quarter of each matrix's standard deviation; vectors as a whole."""
    model = build(stir=False)
    with torch.no_grad():
        model.resid_scale[::2] = 3.0
        model.qkv[0, 1] *= 10
    one = perturbed(model, 0, 1, 2)
    torch.manual_seed(2)
    same = perturbed(model, 0, 1, 2)
    other = perturbed(model, 0, 1, 3)
    for name, before_ in model.named_parameters():
        after = getattr(one, name)
        assert torch.equal(after, getattr(same, name)), name
        if name in CONSTANT and name != "resid_scale":
            assert torch.equal(after, before_), name
            continue
        assert not torch.equal(after, getattr(other, name)), name
        dims = (-2, -1) if before_.ndim > 1 else (0,)
        size = math.prod(before_.shape[d] for d in dims)
        ratio = (after - before_).std(dim=dims) / before_.std(dim=dims)
        assert (ratio - 0.25).abs().max() < 0.25 * 5 / math.sqrt(2 * size - 2), name  # 5 errors


def test_a_lone_number_is_not_perturbed():
    model = build(head_dim=64, induction=False)
    after = perturbed(model, 0)
    assert torch.equal(after.mixing, model.mixing)
    assert all(weight.isfinite().all() for weight in after.parameters())


# ------------------------------------------------------------------------------------------------
# Scale and FLOPs

def test_parameters_of_the_published_run():
    heads, hidden, n, vocab = 16, 5632, 30, 64 * 786  # 50,304
    matrix = 2048 ** 2
    found = {}
    for name, row in q.parameter_table(resolved("q0"), 50257).items():
        found[name] = math.prod(row.bank_shape)
    assert found == {  # n + 1: the multi-token block
        "embed": vocab * 2048, "head": vocab * 2048, "qkv": (n + 1) * 3 * matrix,
        "out": (n + 1) * matrix, "gate_up": (n + 1) * 2 * hidden * 2048,
        "down": (n + 1) * 2048 * hidden, "mixing": (n + 1) * 3 * heads ** 2,
        "attn_gate": (n + 1) * heads * 12, "value": n // 2 * matrix,
        "value_gate": n // 2 * heads * 32, "resid_scale": n, "x0_scale": n, "skip_scale": n // 2,
        "mtp_proj": 2 * matrix}
    assert f"{sum(found.values()) / 1e9:.2f}" == "1.87"


def test_constants_of_the_published_run():
    cfg = dataclasses.asdict(resolved("q0"))
    published = dict(
        seq_len=2048, batch_tokens=524_288, edge_batch_tokens=393_216, train_tokens=0,
        softcap=15, dropout=0.1, smear=False, induction=False, mtp_weight=0.3,
        lr_matrix=0.01, lr_embed=0.0375, lr_head=0.0005, weight_decay=1.3, grad_clip=1,
        lr_floor=0.08, wd_start=0.7, wd_end=1.0, population="q0", epochs_per_cycle=2,
        boundary="perturb", noise_first=0.25, noise_last=0.05, distill_weight=0.45,
        distill_temperature=1.2, distill_after=8)
    assert {name: cfg[name] for name in published} == published


def counted_flops(model, tokens, train):
    """FLOPs that torch counts in a pass over tokens [B, T+1] with the head, per token."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = model(tokens[:, :-1], tokens[:, 1:] if train else None)
        head = model.head[:VOCAB]
        total = sum((x.flatten(0, 1) @ head.T).sum() for x in outputs if x is not None)
        if train:
            total.backward()
    return counter.get_total_flops() / tokens[:, 1:].numel()


def check_flops(module, model):
    """As counted by torch, for training and for a teacher, with whole score matrices."""
    found = module.flops_per_token(model.cfg, VOCAB, causal=False)
    tokens = random_tokens(3, 17)
    assert found[0] == counted_flops(model, tokens, train=True)
    with torch.no_grad():
        assert found[1] == counted_flops(model, tokens, train=False)


@pytest.mark.parametrize("mtp", [0.0, 0.3])
def test_flops_against_torchs_counter(mtp):
    """Head mixing is off: it costs per micro-batch and not per token."""
    check_flops(q, build(windows="L", head_mixing=False, mtp_weight=mtp))


def test_flops_of_causal_attention_count_visible_keys():
    cfg = small()
    whole = q.flops_per_token(cfg, VOCAB, causal=False)
    causal = q.flops_per_token(cfg, VOCAB, causal=True)
    _, order, windows, _ = SHAPES["even"]
    missing = 0
    for window in [windows[i] for i in order]:
        seen = sum(min(t + 1, window) for t in range(16))
        missing += 4 * 64 * (16 - seen / 16)
    ahead = 4 * 64 * (16 - 17 / 2)  # the multi-token block, which teachers do not run
    assert whole[0] - causal[0] == pytest.approx(3 * (missing + ahead))
    assert whole[1] - causal[1] == pytest.approx(missing)


# ------------------------------------------------------------------------------------------------
# A user's edits of the script

RELU_SQUARED = (
    ('"gate_up": Row("gate_up", (2, M, D), fan_in, **every)', '"up": Row("up", (M, D), fan_in, **every)'),
    ('gate, up = F.linear(norm(x), w["gate_up"].flatten(0, 1)).chunk(2, dim=-1)',
     'up = F.linear(norm(x), w["up"])'),
    ('F.linear(F.silu(gate) * up, w["down"])', 'F.linear(F.relu(up).square(), w["down"])'))
GAIN = (
    ('"smear": Row(', '"gain": Row("gain", (D,), constant(1), lr=0.02, blocks=blocks),\n        "smear": Row('),
    ('return x + F.dropout(y, cfg.dropout, training)',
     'return x + w["gain"].to(x.dtype) * F.dropout(y, cfg.dropout, training)'))
LAST_PRODUCT = (
    ('"smear": Row(', '"last": Row("last", (D, D), fan_in, **matrix),\n        "smear": Row('),
    ('x = norm(x)\n        if not predicts_two', 'x = norm(F.linear(x, self.last))\n        if not predicts_two'))
NO_ROW = (
    ('self.windows = layer_windows(cfg)',
     'self.bias = nn.Parameter(torch.zeros(3))\n        self.windows = layer_windows(cfg)'),)
NOT_USED = (
    ('"smear": Row(', '"spare": Row("spare", (D, D), fan_in, **every),\n        "smear": Row('),)


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Import the script with pieces of its text replaced."""
    def load(edits):
        text = q.SOURCE
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "edited.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited", module)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.mark.parametrize("edits, name, shape", [
    ((), "gate_up", (7, 2, 96, 64)),
    (RELU_SQUARED, "up", (7, 96, 64)),
    (GAIN, "gain", (7, 64)),
    (LAST_PRODUCT, "last", (64, 64))])
def test_an_edit_of_the_block_trains(edits, name, shape, edited, tmp_path):
    module = edited(edits)
    trainer, plan = models.trainer(tmp_path / "run", small(batch_tokens=128), module)
    cycles = plan[0]
    trainer.start_trajectory(cycles)
    trainer.start_cycle(cycles[0])
    masters = trainer.optimizer.masters
    assert masters[name].shape == shape
    if name == "gain":
        assert (masters[name] == 1).all()
    else:
        assert masters[name].std() == pytest.approx(1 / 8, rel=0.02)
    before_ = {n: master.clone() for n, master in masters.items()}
    losses = []
    for _ in range(3):
        trainer.forward_backward(cycles[0])
        losses.append(float(trainer.loss))
        trainer.optimizer.step(1.0, 1.0)
        if len(losses) == 1:
            for n, master in masters.items():
                assert not torch.equal(master, before_[n]), n
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    check_flops(module, module.GPT(small(windows="L", head_mixing=False), VOCAB))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("edits, message", [
    (NO_ROW, "weight bias has no row in parameter_table"),
    (NOT_USED, "weight spare has no gradient")])
def test_an_edit_that_forgets_half_is_one_clear_error(edits, message, precision, edited, tmp_path):
    module = edited(edits)
    with pytest.raises(module.UserError, match=message):
        trainer, plan = models.trainer(tmp_path / "run", small(precision=precision), module)
        trainer.run_micro_batch(False)
