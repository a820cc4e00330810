"""Loss and p(true token) against numpy and plain_loss in float64.

tests/test_kernels.py runs them again through the Triton kernels, under Triton's interpreter."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, rel_entr, softmax
from tiny import VOCAB, build, in_float64, off, random_tokens, seeded
from torch.utils._pytree import tree_map_only

import train_q0 as q


def capped(z, softcap):
    return softcap * np.tanh(z / softcap) if softcap else z


def probabilities(z, softcap):
    """Of raw logits, a tensor."""
    wide = z.detach().double().numpy()
    return softmax(capped(wide, softcap), axis=1)


def loss_reference(hidden, head, targets, softcap, teacher, weight, temperature):
    """(loss, cross-entropy); targets of -1 do not count; teacher [(share, hidden, head), ...]."""
    logits = capped(hidden @ head.T, softcap)
    kept = np.flatnonzero(targets >= 0)
    log_q = log_softmax(logits, axis=1)
    ce = -log_q[kept, targets[kept]].mean()
    if not teacher:
        return ce, ce
    mixture = 0
    for share, h, w in teacher:
        z = capped(h @ w.T, softcap)
        mixture = mixture + share * softmax(z, axis=1)
    p = softmax(np.log(mixture) / temperature, axis=1)
    student = softmax(logits / temperature, axis=1)
    kl = rel_entr(p, student)[kept]
    hard = (1 - weight) * ce
    soft = weight * temperature ** 2 * kl.sum(axis=1).mean()
    return hard + soft, ce


N = 7
D = 5
V = 11
PADDED = 13
IGNORED = [0, 4]
SHARES = ((), (1.0,), (0.5, 0.3, 0.2))


def problem(shares, softcap, dtype):
    """Arguments of plain_loss; logits reach well into the cap."""
    generator = seeded(0)

    def drawn(*shape):
        return 2 * torch.randn(shape, generator=generator).to(dtype)

    hidden = drawn(N, D)
    head = drawn(PADDED, D)
    teacher = []
    for share in shares:
        states = drawn(N, D + 2)
        teacher.append((share, states, drawn(PADDED, D + 2)))
    targets = torch.arange(N)
    targets[IGNORED] = -1
    return hidden, head, targets, softcap, teacher, 0.45, 1.2


def without_padding(hidden, head, targets, softcap, teacher, weight, temperature):
    """The same in float64."""
    wide = []
    for share, h, w in teacher:
        wide.append((share, h.double(), w[:V].double()))
    hidden = hidden.detach().double()
    head = head.detach()[:V].double()
    return hidden, head, targets, softcap, wide, weight, temperature


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_plain_loss_against_numpy(shares, softcap):
    given = problem(shares, softcap, torch.float64)
    given = without_padding(*given)
    in_numpy = tree_map_only(torch.Tensor, torch.Tensor.numpy, given)
    wanted = loss_reference(*in_numpy)
    found = q.plain_loss(*given)
    assert found == pytest.approx(wanted, rel=1e-12)


# Logits are float32 whatever the dtype of `hidden`; they err by 5 * 6e-8, gradients sum that over
# rows. bf16 rounds logits, up to 5 by 2^-7, and their gradients once more than the reference.
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 5e-6),
    (torch.float64, 5e-6),
    (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_chunked_loss(dtype, tolerance, shares, softcap, rows, monkeypatch):
    """Seven rows one by one, in chunks of 3, 3 and 1, and in one chunk."""
    monkeypatch.setattr(q, "CHUNK_LOGITS", rows * PADDED)
    given = problem(shares, softcap, dtype)
    hidden, head, *rest = given
    hidden.requires_grad_()
    head.requires_grad_()
    found = q.ChunkedLoss.apply(hidden, head, V, *rest)
    (3 * found[0]).backward()
    h, w, *rest = without_padding(*given)
    h.requires_grad_()
    w.requires_grad_()
    wanted = q.plain_loss(h, w, *rest)
    wanted[0].backward()
    for x, y in zip(found, wanted):
        assert off(x, y) < tolerance
    assert off(hidden.grad, 3 * h.grad) < tolerance
    assert off(head.grad[:V], 3 * w.grad) < tolerance
    assert not hidden.grad[IGNORED].any()
    assert not head.grad[V:].any()


@pytest.mark.parametrize("sizes", [
    (1, 5, 200),
    (200, 200, 200)])
@pytest.mark.parametrize("softcap", [15.0, 1000.0, 0.0])
def test_logits_of_many_teachers(softcap, sizes):
    """Their capped softmax is the mixture, also where members are certain and disagree. 1e-6
    clipped off the edge of a small cap moves logits by 2e-5, a cap of 1,000 by 6e-5 and more."""
    generator = seeded(0)
    teacher = []
    mixture = 0
    for share, size in zip((0.7, 0.2999, 0.0001), sizes):
        h = size * torch.randn(50, 8, generator=generator)
        w = torch.randn(304, 8, generator=generator)
        teacher.append((share, h, w))
        z = h[3:40] @ w[:300].T
        mixture = mixture + share * probabilities(z, softcap)
    z = q.teacher_logits(teacher, slice(3, 40), 300, softcap)
    assert z.shape == (37, 304)
    assert z.isfinite().all()
    found = probabilities(z[:, :300], softcap)
    np.testing.assert_allclose(found, mixture, rtol=5e-4, atol=1e-30)


def training_loss_in_float64(model, teacher, tokens):
    """The parts of the loss, each by plain_loss."""
    wide = in_float64(model)
    inputs = tokens[:, :-1]
    targets = tokens[:, 1:]
    after_next = F.pad(tokens[:, 2:], (0, 1), value=-1)
    hidden, ahead = wide(inputs, targets)

    def part(x, target, *rest):
        head = wide.head[:VOCAB]
        loss, _ = q.plain_loss(x.flatten(0, 1), head, target.flatten(), 15.0, *rest)
        return loss

    ce = part(hidden, targets)
    loss = ce
    if ahead is not None:
        loss = loss + 0.3 * part(ahead, after_next)
    if teacher is not None:
        wise = in_float64(teacher)
        taught, _ = wise(inputs)
        member = (1.0, taught.flatten(0, 1), wise.head[:VOCAB])
        kl = part(hidden, targets, [member], 1.0, 1.2)
        loss = 0.55 * loss + 0.45 * kl
    loss.backward()
    return loss, ce, wide


@pytest.mark.parametrize("distilled, mtp", [
    (False, 0.0),
    (False, 0.3),
    (True, 0.3)])
def test_training_loss_is_its_parts(distilled, mtp, monkeypatch):
    """With the gradients of every weight; float32 through ten blocks against float64."""
    monkeypatch.setattr(q, "CHUNK_LOGITS", 7 * 128)  # 64 rows: the last chunk holds one
    model = build(mtp_weight=mtp, distill_weight=0.45, distill_temperature=1.2)
    teacher = build(key=7).eval() if distilled else None
    teachers = [(1.0, teacher)] if distilled else []
    tokens = random_tokens(4, 17)
    loss, ce = q.training_loss(model, teachers, model.cfg, tokens)
    loss.backward()
    wanted_loss, wanted_ce, wide = training_loss_in_float64(model, teacher, tokens)
    assert off(ce, wanted_ce) < 1e-5
    assert off(loss, wanted_loss) < 1e-5
    for name, weight in model.named_parameters():
        wanted = getattr(wide, name).grad
        assert off(weight.grad, wanted) < 1e-4, name
    assert not model.head.grad[VOCAB:].any()
    for _, member in teachers:
        assert all(weight.grad is None for weight in member.parameters())


@pytest.mark.parametrize("softcap", [15.0, 0.0])
def test_true_token_probs_against_numpy(softcap):
    model = build(softcap=softcap).eval()
    sequences = random_tokens(5, 17).numpy().astype(np.uint16)  # the last batch of 2 is short
    found = q.true_token_probs(model, sequences, 2, q.World())
    wide = in_float64(model)
    wanted = []
    for row in sequences.astype(np.int64):
        tokens = torch.from_numpy(row)
        hidden, _ = wide(tokens[None, :-1])
        z = hidden[0] @ wide.head[:VOCAB].T
        p = probabilities(z, softcap)
        wanted.extend(p[range(16), row[1:]])
    np.testing.assert_allclose(found, wanted, rtol=1e-4)  # float32 through ten blocks
