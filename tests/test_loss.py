"""Loss and p(true token) against numpy float64 and finite differences."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, rel_entr, softmax
from models import VOCAB, build, in_float64, random_tokens, seeded, small

import train_q0 as q


def capped(z, softcap):
    return softcap * np.tanh(z / softcap) if softcap else z


def loss_reference(hidden, head, targets, softcap, teacher=(), weight=0.0, temperature=1.0):
    """(loss, cross-entropy); targets of -1 do not count; teacher [(share, hidden, head), ...]."""
    logits = capped(hidden @ head.T, softcap)
    kept = targets >= 0
    ce = -log_softmax(logits, axis=1)[kept, targets[kept]].mean()
    if not teacher:
        return ce, ce
    mixture = sum(share * softmax(capped(h @ w.T, softcap), axis=1) for share, h, w in teacher)
    cold = mixture ** (1 / temperature)
    p = cold / cold.sum(axis=1, keepdims=True)
    kl = rel_entr(p, softmax(logits / temperature, axis=1)).sum(axis=1)[kept].mean()
    return (1 - weight) * ce + weight * temperature ** 2 * kl, ce


def differences(function, x, h=1e-5):
    """Central differences of a scalar function at every entry of x; they err by about h^2."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        grad[i] = (function(x + step) - function(x - step)) / (2 * h)
    return grad


# Logits are float32 whatever the dtype of `hidden`; they err by 5 * 6e-8, gradients sum that over
# rows. bf16 rounds logits, up to 5 by 2^-7, and their gradients once more than the reference.
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 5e-6), (torch.float64, 5e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shares", [(), (1.0,), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("ignored, rows", [([], 100), ([0, 4], 3), ([], 1)])
def test_loss_against_numpy(dtype, tolerance, shares, softcap, ignored, rows, monkeypatch):
    """Seven rows in one chunk, in chunks of 3, 3 and 1, and one by one; a padded head."""
    N, D, V, padded = 7, 5, 11, 13
    monkeypatch.setattr(q, "CHUNK_LOGITS", rows * padded)
    generator = seeded(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    hidden = 2 * drawn(N, D)
    head = 2 * drawn(padded, D)
    teacher = [(share, 2 * drawn(N, D + 2), 2 * drawn(padded, D + 2)) for share in shares]
    targets = torch.arange(N) % V
    targets[ignored] = -1
    hidden.requires_grad_()
    head.requires_grad_()
    settings = (0.45, 1.2) if shares else ()
    loss, ce = q.ChunkedLoss.apply(hidden, head, V, targets, softcap, teacher, *settings)
    (3 * loss).backward()

    h = hidden.detach().double()
    w = head.detach()[:V].double()
    exact = [(share, x.double(), y[:V].double()) for share, x, y in teacher]
    in_numpy = [(share, x.numpy(), y.numpy()) for share, x, y in exact]
    rest = (targets.numpy(), softcap, in_numpy, *settings)
    wanted = loss_reference(h.numpy(), w.numpy(), *rest)
    assert (loss.item(), ce.item()) == pytest.approx(wanted, rel=tolerance)
    plain = q.plain_loss(h, w, targets, softcap, exact, *settings)
    assert [x.item() for x in plain] == pytest.approx(wanted, rel=1e-12)
    d_hidden = differences(lambda x: loss_reference(x, w.numpy(), *rest)[0], h.numpy())
    d_head = differences(lambda x: loss_reference(h.numpy(), x, *rest)[0], w.numpy())
    for found, wanted in ((hidden.grad, d_hidden), (head.grad[:V], d_head)):
        atol = tolerance * np.abs(wanted).max()
        np.testing.assert_allclose(found.double().numpy() / 3, wanted, atol=atol)
    assert not hidden.grad[ignored].any()
    assert not head.grad[V:].any()


@pytest.mark.parametrize("softcap", [15.0, 1000.0, 0.0])
def test_large_and_missing_caps_are_accurate(softcap):
    """Logits of up to 60. A cap of 1,000 leaves float32 logits an error of 6e-5 each."""
    z = 20 * torch.randn(64, 300, generator=seeded(1))
    targets = torch.arange(64)
    scale = torch.full((64,), 1 / 64)
    wide = z.double().requires_grad_()
    wanted, _ = q.plain_loss(wide, torch.eye(300).double(), targets, softcap)
    wanted.backward()
    loss, _, d = q.rows_loss(z, None, 300, targets, scale, softcap, 0.0, 1.0)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-4)
    assert (d - wide.grad).abs().max() < 2e-4 * wide.grad.abs().max()


@pytest.mark.parametrize("sizes", [(1, 5, 200), (200, 200, 200)])
@pytest.mark.parametrize("softcap", [15.0, 1000.0, 0.0])
def test_logits_of_many_teachers(softcap, sizes):
    """Their capped softmax is the mixture, also where members are certain and disagree. 1e-6
    clipped off the edge of a small cap moves logits by 2e-5, a cap of 1,000 by 6e-5 and more."""
    V = 300
    generator = seeded(0)
    teacher = []
    for share, size in zip((0.7, 0.2999, 0.0001), sizes):
        hidden = size * torch.randn(50, 8, generator=generator)
        teacher.append((share, hidden, torch.randn(V + 4, 8, generator=generator)))
    z = q.teacher_logits(teacher, slice(3, 40), V, softcap)
    assert z.shape == (37, V + 4)
    assert z.isfinite().all()
    found = softmax(capped(z[:, :V].double().numpy(), softcap), axis=1)
    mixture = 0
    for share, h, w in teacher:
        logits = (h[3:40] @ w[:V].T).double().numpy()
        mixture = mixture + share * softmax(capped(logits, softcap), axis=1)
    np.testing.assert_allclose(found, mixture, rtol=5e-4, atol=1e-30)


def training_loss_in_float64(model, teacher, tokens):
    """The parts of the loss, each by plain_loss."""
    wide = in_float64(model)
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    after_next = F.pad(tokens[:, 2:], (0, 1), value=-1)
    hidden, ahead = wide(inputs, targets)

    def part(x, target, *rest):
        return q.plain_loss(x.flatten(0, 1), wide.head[:VOCAB], target.flatten(), 15.0, *rest)[0]

    ce = part(hidden, targets)
    loss = ce
    if ahead is not None:
        loss = loss + 0.3 * part(ahead, after_next)
    if teacher is not None:
        wise = in_float64(teacher)
        pair = (1.0, wise(inputs)[0].flatten(0, 1), wise.head[:VOCAB])
        kl = part(hidden, targets, [pair], 1.0, 1.2)
        loss = 0.55 * loss + 0.45 * kl
    loss.backward()
    return loss.item(), ce.item(), wide


@pytest.mark.parametrize("distilled, mtp", [(False, 0.0), (False, 0.3), (True, 0.3)])
def test_training_loss_is_its_parts(distilled, mtp, monkeypatch):
    """With the gradients of every weight; float32 through ten blocks against float64."""
    monkeypatch.setattr(q, "CHUNK_LOGITS", 7 * 128)  # 64 rows: the last chunk holds one
    model = build(mtp_weight=mtp)
    teacher = build(key=7).eval() if distilled else None
    tokens = random_tokens(4, 17)
    cfg = small(mtp_weight=mtp, distill_weight=0.45, distill_temperature=1.2)
    loss, ce = q.training_loss(model, [(1.0, teacher)] if distilled else [], cfg, tokens)
    loss.backward()
    wanted_loss, wanted_ce, wide = training_loss_in_float64(model, teacher, tokens)
    assert ce.item() == pytest.approx(wanted_ce, rel=1e-5)
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-5)
    for name, weight in model.named_parameters():
        wanted = getattr(wide, name).grad
        assert (weight.grad - wanted).abs().max() < 1e-4 * wanted.abs().max(), name
    assert not model.head.grad[VOCAB:].any()
    if distilled:
        assert all(weight.grad is None for weight in teacher.parameters())


@pytest.mark.parametrize("softcap", [15.0, 0.0])
def test_true_token_probs_against_numpy(softcap, monkeypatch):
    monkeypatch.setattr(q, "CHUNK_LOGITS", 7 * 128)
    model = build(softcap=softcap).eval()
    sequences = random_tokens(5, 17).numpy().astype(np.uint16)  # the last batch of 2 is short
    found = q.true_token_probs(model, sequences, 2, q.World())
    wide = in_float64(model)
    wanted = []
    for row in torch.from_numpy(sequences.astype(np.int64)):
        z = wide(row[None, :-1])[0][0] @ wide.head[:VOCAB].T
        p = softmax(capped(z.detach().numpy(), softcap), axis=1)
        wanted.extend(p[np.arange(16), row[1:]])
    np.testing.assert_allclose(found, wanted, rtol=1e-4)  # float32 through ten blocks
