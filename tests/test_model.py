"""Model: attention kernels, block, table of parameters, initial weights, FLOPs; against references
in numpy float64. Last, a user's edits."""
import copy
import functools
import importlib.util
import math
import sys

import numpy as np
import pytest
import tiny
import torch
from scipy.special import expit, softmax
from tiny import NEUTRAL, VOCAB, build, in_float64, random_tokens, resolved, seeded, small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_q0 as q
from records import flops

CPU = torch.device("cpu")


def attention_by_loops(query, key, value, window):
    """[B, H, T, K] each, one query after the other."""
    rows = []
    for t in range(query.size(2)):
        seen = slice(max(0, t - window + 1), t + 1)
        scores = torch.einsum("bhk,bhsk->bhs", query[:, :, t], key[:, :, seen])
        scores = scores / math.sqrt(query.size(-1))
        share = scores.softmax(-1)
        rows.append(torch.einsum("bhs,bhsk->bhk", share, value[:, :, seen]))
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("T, window", [(16, 1), (7, 3)])
@pytest.mark.parametrize("name", ["sdpa", "plain"])
def test_attention_kernels(name, T, window):
    """Forward and backward pass in float64."""
    draws = torch.randn(4, 2, 2, T, 32, generator=seeded(0), dtype=torch.float64)
    *inputs, gradient = draws.unbind()
    for x in inputs:
        x.requires_grad_()
    attend = q.ATTENTION[name](small(), CPU, window)
    passes = []
    for out in (attend(*inputs), attention_by_loops(*inputs, window)):
        passes.append([out, *torch.autograd.grad(out, inputs, gradient)])
    for found, wanted in zip(*passes):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_flex_attention(monkeypatch):
    """Forward, all that it has on a CPU. Traced only: to compile it takes half a minute."""
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", traced)
    inputs = torch.randn(3, 2, 2, 16, 32, generator=seeded(0))
    found = q.flex_attention(small(), CPU, 5)(*inputs)
    wanted = attention_by_loops(*inputs, 5)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def broken(cfg, device, window):
    raise OSError("undefined symbol")


def forgets_its_window(cfg, device, window):
    return q.sdpa_attention(cfg, device, cfg.seq_len)


def test_a_window_whose_kernel_fails_gets_the_next(monkeypatch, capsys):
    """As on a GPU; sdpa stands in for flex."""
    names = q.attention_names
    kernels = {"flex": q.sdpa_attention, "sdpa": q.sdpa_attention}
    monkeypatch.setattr(q, "attention_names", lambda cfg, _, window: names(cfg, "cuda", window))
    monkeypatch.setattr(q, "ATTENTION", kernels)
    assert q.choose_attention(small(), CPU)[0] == "flex+sdpa"
    refusals = ((broken, "OSError: undefined symbol"), (forgets_its_window, "disagrees"))
    for kernels["flex"], reason in refusals:
        assert q.choose_attention(small(), CPU)[0] == "sdpa"
        said = capsys.readouterr().err
        assert said.startswith("notice: attention kernel flex does not work")
        assert reason in said and said.count("\n") == 1
    kernels["sdpa"] = broken
    with pytest.raises(q.UserError, match="sdpa does not work: OSError: undefined symbol"):
        q.choose_attention(small(), CPU)


# The model in numpy float64: one sequence, heads and queries one by one --------------------------

def rms(x):
    return x / np.sqrt((x ** 2).mean(axis=-1, keepdims=True))


def before(x):
    first = np.zeros_like(x[:1])
    return np.concatenate([first, x[:-1]])


def rotary(x):
    """Channels j and j + K/2 are one complex number."""
    T, K = x.shape
    frequency = 10_000.0 ** (-np.arange(0, K, 2) / K)
    angle = np.outer(np.arange(T), frequency)
    z = x[:, :K // 2] + 1j * x[:, K // 2:]
    turned = z * np.exp(-1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def head_reference(query, key, value, window, by_content):
    query, key = rms(query), rms(key)
    if by_content:
        key = before(key)
    else:
        query, key = rotary(query), rotary(key)
    rows = []
    for t in range(len(query)):
        seen = slice(max(0, t - window + 1), t + 1)
        share = softmax(key[seen] @ query[t] / math.sqrt(query.shape[1]))
        rows.append(share @ value[seen])
    return np.stack(rows)


def attention_reference(h, x0, w, window, cfg):
    heads = [slice(i, i + cfg.head_dim) for i in range(0, cfg.width, cfg.head_dim)]
    parts = np.stack([[h @ w["qkv"][s, own].T for own in heads] for s in range(3)])
    if cfg.head_mixing:
        parts = np.einsum("sij,sjtk->sitk", w["mixing"], parts)
    y = np.zeros_like(h)
    for i, own in enumerate(heads):
        query, key, value = parts[:, i]
        if "value" in w:
            gate = expit(h[:, :32] @ w["value_gate"][i])
            value = value + 2 * gate[:, None] * (x0 @ w["value"][own].T)
        by_content = cfg.induction and i >= len(heads) // 2
        y[:, own] = head_reference(query, key, value, window, by_content)
        if cfg.attn_gates:
            y[:, own] *= expit(h[:, :12] @ w["attn_gate"][i])[:, None]
    return y @ w["out"].T


def block_reference(x, x0, w, window, cfg):
    """x, x0 [T, D], w {bank: tensor of the block}."""
    x = x + attention_reference(rms(x), x0, w, window, cfg)
    gate, up = (rms(x) @ matrix.T for matrix in w["gate_up"])
    return x + (gate * expit(gate) * up) @ w["down"].T


OFF = dict(  # no feature
    windows="L", unet=False, x0_mix=False, value_embeds=False, attn_gates=False, head_mixing=False,
    loop_first=0, loop_last=0, loop_passes=1, mtp_weight=0, smear=False, induction=False)


def block_weights(weights, table, name):
    """{bank: tensor} of a block."""
    own = {}
    for bank, weight in weights.items():
        if name in table[bank].blocks:
            own[bank] = weight[table[bank].blocks.index(name)]
    return own


def model_reference(model, tokens):
    """(hidden, hidden of the multi-token block) of tokens [T+1]."""
    cfg = model.cfg
    n = cfg.layers
    w = {}
    for name, weight in model.named_parameters():
        w[name] = weight.detach().double().numpy()
    x = rms(w["embed"][tokens[:-1]])
    if cfg.smear:
        x = rms(x + w["smear"] * before(x))
    x0 = x
    outputs = {}
    for i in q.layer_order(cfg):
        decoder = i - (n - n // 2)
        if cfg.unet and decoder >= 0:
            x = x + w["skip_scale"][decoder] * outputs[n - 1 - i]
        if cfg.x0_mix:
            x = w["resid_scale"][i] * x + w["x0_scale"][i] * x0
        own = block_weights(w, model.table, f"blocks.{i}")
        x = block_reference(x, x0, own, q.layer_windows(cfg)[i], cfg)
        outputs[i] = x
    x = rms(x)
    if not cfg.mtp_weight:
        return x, None
    following = rms(w["embed"][tokens[1:]])
    ahead = np.concatenate([x, following], axis=1)
    own = block_weights(w, model.table, "mtp_block")
    ahead = block_reference(ahead @ w["mtp_proj"].T, x0, own, len(ahead), cfg)
    return x, rms(ahead)


# float64: rotary angles of float32, up to 15, err by 1e-6. float32: 6e-8 a rounding, hundreds in a
# row.
@pytest.mark.parametrize("changes, precision, tolerance", [
    (OFF, in_float64, 2e-6),
    ({}, in_float64, 2e-6),
    (dict(layers=5), copy.deepcopy, 3e-5)])
def test_model_against_numpy(changes, precision, tolerance):
    model = precision(build(**changes))
    tokens = random_tokens(1, 17)
    outputs = model(tokens[:, :-1], tokens[:, 1:])
    for x, wanted in zip(outputs, model_reference(model, tokens[0].numpy())):
        if wanted is None:
            assert x is None
        else:
            found = x[0].detach().double().numpy()
            assert np.abs(found - wanted).max() < tolerance


def test_layers():
    """Order, windows, layers with a value embedding, written out; the size of the published run."""
    model = build()
    assert q.layer_order(model.cfg) == [0, 1, 2, 3, 4, 3, 4, 3, 4, 5]
    assert q.layer_windows(model.cfg) == [8, 8, 8, 16, 8, 16]
    assert model.table["value"].blocks == ("blocks.1", "blocks.3", "blocks.5")
    cfg = resolved("q0")
    assert len(q.layer_order(cfg)) == 70
    table = q.parameter_table(cfg, 50257)
    weights = sum(math.prod(row.bank_shape) for row in table.values())
    assert f"{weights / 1e9:.2f}" == "1.87"


def test_initial_weights_depend_on_key_and_name():
    first = build(stir=False, key=3)
    again = build(stir=False, key=3, layers=5)
    other = build(stir=False, key=4)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, getattr(other, name)) == (name in NEUTRAL)
    assert torch.equal(first.down[:5], again.down[:5])
    assert not torch.equal(first.down[0], first.down[1])


def counted_flops(model, tokens, train):
    """FLOPs that torch counts in a pass over tokens [B, T+1] with the head, per token."""
    targets = tokens[:, 1:]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = model(tokens[:, :-1], targets if train else None)
        total = 0
        for hidden in outputs:
            if hidden is not None:
                logits = hidden.flatten(0, 1) @ model.head[:VOCAB].T
                total = total + logits.sum()
        if train:
            total.backward()
    return counter.get_total_flops() / targets.numel()


def test_flops():
    """As torch counts them, for training and for a teacher, less the scores that are masked, which
    torch counts too: the windows must be whole. Head mixing is off: it costs per micro-batch."""
    model = build(windows="L", head_mixing=False)
    training, teacher = flops.flops_per_token(model.cfg, VOCAB)
    tokens = random_tokens(3, 17)
    masked = 4 * 64 * (16 - 17 / 2)  # FLOPs of a layer; 17 / 2 keys of 16 are seen on average
    assert training == counted_flops(model, tokens, train=True) - 3 * 11 * masked
    with torch.no_grad():
        assert teacher == counted_flops(model, tokens, train=False) - 10 * masked
    whole = flops.flops_per_token(small(windows="L"), VOCAB)
    short = flops.flops_per_token(small(), VOCAB)
    # keys that the six short windows leave out, on average
    unseen = 6 * (17 / 2 - np.mean([min(t + 1, 8) for t in range(16)]))
    assert whole[0] - short[0] == pytest.approx(3 * 4 * 64 * unseen)
    assert whole[1] - short[1] == pytest.approx(4 * 64 * unseen)


# A user's edits of the script: pieces of its text, and what replaces them ------------------------

FIRST_ROW = '"embed": Row('
EDITS = {  # ReLU^2, and a learned gain
    '"gate_up": Row("gate_up", (2, M, D), fan_in, **every)':
    '"up": Row("up", (M, D), fan_in, **every)',
    'gate, up = F.linear(norm(x), w["gate_up"].flatten(0, 1)).chunk(2, dim=-1)':
    'up = F.linear(norm(x), w["up"])',
    'F.linear(F.silu(gate) * up, w["down"])':
    'F.linear(F.relu(up).square(), w["down"])',
    FIRST_ROW:
    '"gain": Row("gain", (D,), constant(1), lr=0.02, blocks=blocks),\n        ' + FIRST_ROW,
    'return x + F.dropout(y, cfg.dropout, training)':
    'return x + w["gain"].to(x.dtype) * F.dropout(y, cfg.dropout, training)'}
WITHOUT_ROW = {
    "self.attend = attention_by_window(":
    "self.bias = nn.Parameter(torch.zeros(3))\n        self.attend = attention_by_window("}
WITHOUT_USE = {FIRST_ROW: '"spare": Row("spare", (D, D), fan_in, **every),\n        ' + FIRST_ROW}


def edited(edit, tmp_path, monkeypatch):
    """The script with an edit, also for tests/tiny.py."""
    text = q.SOURCE
    for old, new in edit.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / "edited.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "edited", module)
    monkeypatch.setattr(tiny, "q", module)
    spec.loader.exec_module(module)
    return module


def test_an_edit_of_the_block_trains(tmp_path, monkeypatch):
    """Every weight starts as its row says and moves in a step; the loss falls; FLOPs follow."""
    module = edited(EDITS, tmp_path, monkeypatch)
    trainer, plan = tiny.trainer(tmp_path / "run", small(batch_tokens=128))
    trainer.start_trajectory(plan[0])
    cycle = plan[0][0]
    trainer.start_cycle(cycle)
    masters = trainer.optimizer.masters
    assert (masters["up"].shape, masters["gain"].shape) == ((7, 96, 64), (7, 64))
    assert masters["up"].std() == pytest.approx(1 / 8, rel=0.02)
    assert (masters["gain"] == 1).all()
    start = {name: master.clone() for name, master in masters.items()}
    losses = []
    for _ in range(3):
        trainer.forward_backward(cycle)
        losses.append(float(trainer.loss))
        trainer.optimizer.step(1.0, 1.0)
        assert not any(torch.equal(master, start[name]) for name, master in masters.items())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1
    monkeypatch.setattr(flops, "q", module)
    whole, _ = flops.flops_per_token(small(), VOCAB)
    monkeypatch.setattr(flops, "q", q)
    assert flops.flops_per_token(small(), VOCAB)[0] - whole == 11 * 6 * 96 * 64  # a product less


@pytest.mark.parametrize("edit, message", [
    (WITHOUT_ROW, "weight bias has no row in parameter_table"),
    (WITHOUT_USE, "weight spare has no gradient")])
def test_half_an_edit_is_one_clear_error(edit, message, tmp_path, monkeypatch):
    module = edited(edit, tmp_path, monkeypatch)
    with pytest.raises(module.UserError, match=message):
        trainer, _ = tiny.trainer(tmp_path / "run", small())
        trainer.run_micro_batch(False)
