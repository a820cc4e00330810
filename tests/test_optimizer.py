"""Optimizer: every rule against numpy float64 and torch.optim; working copies."""
import copy
import functools
import math

import numpy as np
import pytest
import torch
from tiny import SMALL, VOCAB, off, resolved, seeded
from torch._dynamo.utils import counters

import train_q0 as q

ADAMW = {"embed", "head", "resid_scale", "skip_scale", "x0_scale", "mixing"}
PUBLISHED = dict(SMALL, loop_first=3, loop_last=4, edge_batch_tokens=64)


def published(world=q.World(), **changes):
    """The published optimizer at a small size."""
    cfg = resolved("q0", **{**PUBLISHED, **changes})
    model = q.GPT(cfg, VOCAB)
    optimizer = q.Optimizer(model, cfg, world)
    q.init_weights(model.table, optimizer.masters, 0)
    optimizer.refresh()
    return optimizer


def draw_gradients(optimizer, seed, size=1.0):
    generator = seeded(seed)
    for bank in optimizer.banks.values():
        draw = torch.randn(bank.grad.shape, generator=generator)
        scale = 10.0 ** torch.randint(-2, 1, (1,), generator=generator)
        bank.grad.copy_(size * scale * draw)


def gradients(optimizer):
    """{name: a copy of the gradient}, and their norm."""
    found = {name: bank.grad.clone() for name, bank in optimizer.banks.items()}
    square = sum(grad.square().sum().item() for grad in found.values())
    return found, math.sqrt(square)


def muon_reference(grad, state):
    """The direction of one Muon step of one matrix."""
    rows, cols = grad.shape
    state["first"] = 0.95 * state.get("first", 0) + 0.05 * grad
    update = 0.05 * grad + 0.95 * state["first"]
    update = update / np.linalg.norm(update, axis=1, keepdims=True)
    update = update / (1.02 * np.linalg.norm(update))
    wide = torch.from_numpy(update.T if rows > cols else update)
    X = q.polar_express(wide[None])[0].numpy()  # has a test of its own, below
    X = X.T if rows > cols else X
    axis = 1 if rows >= cols else 0
    mean = (X ** 2).mean(axis=axis, keepdims=True)
    state["second"] = 0.95 * state.get("second", 0) + 0.05 * mean
    scaled = X / np.sqrt(state["second"])
    return scaled * np.linalg.norm(X) / np.linalg.norm(scaled)


class AdamWReference:
    def __init__(self, row, master):
        self.row = row
        self.twin = master.clone().requires_grad_()
        self.rule = torch.optim.AdamW([self.twin], betas=row.betas, eps=1e-10)

    def check(self, master, before, grad, lr_mult, wd_mult):
        group = self.rule.param_groups[0]
        group["lr"] = self.row.lr * lr_mult
        group["weight_decay"] = self.row.decay * wd_mult
        self.twin.grad = grad
        self.rule.step()
        wanted = self.twin.data
        torch.testing.assert_close(master, wanted, rtol=1e-5, atol=1e-7)


class MuonReference:
    def __init__(self, row, master):
        self.states = [{} for _ in range(math.prod(master.shape[:-2]))]

    def check(self, master, before, grad, lr_mult, wd_mult):
        """Entries of an update are about 0.2; its small singular directions amplify float32's
        rounding by up to 990."""
        rows, cols = master.shape[-2:]
        lr = 0.01 * lr_mult * math.sqrt(max(1, rows / cols))
        tensors = (master, before, grad)
        matrices = [x.reshape(-1, rows, cols).double().numpy() for x in tensors]
        for state, now, old, g in zip(self.states, *matrices):
            u = muon_reference(g, state)
            agree = np.sign(u) == np.sign(old)
            wanted = -lr * (u + 1.3 * wd_mult * np.where(agree, old, 0))  # cautious decay
            clear = np.abs(u) > 1e-3  # float32 may give a smaller one the other sign
            assert clear.mean() > 0.9
            error = np.abs(now - old - wanted)[clear]
            assert error.max() < 1e-4 * lr + 2e-7


def test_a_step_of_every_bank():
    optimizer = published()
    masters = optimizer.masters
    references = {}
    for name, master in masters.items():
        reference = AdamWReference if name in ADAMW else MuonReference
        references[name] = reference(optimizer.banks[name].row, master)
    multipliers = [(1, 0.7), (0.6, 0.85), (0.1, 1)]
    for seed, size in enumerate((1, 1e-3, 10)):
        draw_gradients(optimizer, seed, size)
        grads, norm = gradients(optimizer)
        assert (norm > 1) == (size >= 1)  # then it is clipped to 1
        before = copy.deepcopy(masters)
        optimizer.step(*multipliers[seed])
        for name, reference in references.items():
            clipped = grads[name] / max(1, norm)
            reference.check(masters[name], before[name], clipped, *multipliers[seed])
    _, left = gradients(optimizer)
    assert left == 0


# Over singular values of 0.01 to 1 Frobenius norms they range over 0.8589 .. 1.1412; bf16
# rounds every factor to 2^-9, measured 0.3% in all. Off the diagonal rounding grows by the slopes
# of the five steps: measured 0.03 and 1e-6.
@pytest.mark.parametrize("dtype, low, high, off_diagonal", [
    (torch.float32, 0.8588, 1.1413, 1e-5),
    (torch.bfloat16, 0.85, 1.15, 0.08)])
@pytest.mark.parametrize("rows, cols", [(64, 64), (48, 128)])
def test_polar_express_gives_the_polar_factor(dtype, low, high, off_diagonal, rows, cols):
    X = torch.randn(rows, cols, generator=seeded(rows))
    X = X / (1.02 * X.norm())
    found = q.polar_express(X.to(dtype)[None])[0]
    U, S, Vt = np.linalg.svd(X.double().numpy(), full_matrices=False)
    inner = U.T @ found.double().numpy() @ Vt.T  # diagonal where it has X's singular vectors
    values = np.diag(inner)
    clear = values[S > 0.01]
    assert len(clear) > 0.9 * rows
    assert low < clear.min()
    assert values.max() < high
    assert np.abs(inner - np.diag(values)).max() < off_diagonal
    assert not q.polar_express(torch.zeros(1, 4, 6)).any()


def test_a_bound_of_zero_does_not_clip():
    optimizer = published(grad_clip=0.0)
    draw_gradients(optimizer, 0, size=100)
    grads, _ = gradients(optimizer)
    optimizer.step(1.0, 1.0)
    assert off(optimizer.banks["head"].first, 0.2 * grads["head"].flatten()) < 1e-5


def test_a_gradient_that_is_not_finite_is_counted():
    optimizer = published()
    for seed, value in enumerate((1.0, math.inf)):
        draw_gradients(optimizer, seed)
        optimizer.banks["down"].grad[2, 1, 2] = value
        optimizer.step(1.0, 1.0)
        assert gradients(optimizer)[1] == 0
        assert int(optimizer.broken) == seed


def test_the_model_reads_masters_rounded_once_a_step():
    optimizer = published(precision="bfloat16")
    for seed in range(2):
        for name, bank in optimizer.banks.items():
            copied = name not in ADAMW or name == "head"
            dtype = torch.bfloat16 if copied else torch.float32
            assert bank.master.dtype == torch.float32
            assert bank.weight.dtype == dtype
            assert torch.equal(bank.weight, bank.master.to(dtype))
        draw_gradients(optimizer, seed)
        optimizer.step(1.0, 1.0)


def two_steps(optimizer):
    for seed in range(2):
        draw_gradients(optimizer, seed)
        optimizer.step(1.0, 1.0)
    return optimizer.masters


def test_compiled_functions_agree(monkeypatch):
    """Traced only, which is quick: a graph for each pair of betas, each orientation of a matrix."""
    few = dict(layers=4, loop_passes=1, mtp_weight=0)
    plain = two_steps(published(**few))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters["stats"].clear()
    optimizer = published(**few)
    optimizer.compile()
    for name, master in two_steps(optimizer).items():  # to float32 rounding
        torch.testing.assert_close(master, plain[name], rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 2 + 2 * 3  # AdamW; Muon's two functions
    torch._dynamo.reset()
