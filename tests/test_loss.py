"""Loss and p(true token) against plain_loss and numpy in float64; test_frozen.py has the whole
training loss and its gradients.

tests/test_kernels.py runs them again through the Triton kernels, under Triton's interpreter."""
import numpy as np
import pytest
import torch
from scipy.special import softmax
from tiny import VOCAB, build, in_float64, off, plain_loss, random_tokens, seeded

import train_q0 as q


def probabilities(z, softcap):
    """Of raw logits, a tensor."""
    wide = z.detach().double().numpy()
    if softcap:
        wide = softcap * np.tanh(wide / softcap)
    return softmax(wide, axis=1)


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


# Logits are float32 whatever the dtype of `hidden`; they err by 5 * 6e-8, gradients sum that over
# rows. bf16 rounds logits, up to 5 by 2^-7, and their gradients once more than the reference.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("rows", [3, 100])
def test_chunked_loss(dtype, tolerance, shares, softcap, rows, monkeypatch):
    """Seven rows in chunks of 3, 3 and 1, and in one chunk."""
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
    wanted = plain_loss(h, w, *rest)
    wanted[0].backward()
    for x, y in zip(found, wanted):
        assert off(x, y) < tolerance
    assert off(hidden.grad, 3 * h.grad) < tolerance
    assert off(head.grad[:V], 3 * w.grad) < tolerance
    assert not hidden.grad[IGNORED].any()
    assert not head.grad[V:].any()


@pytest.mark.parametrize("sizes", [(1, 5, 200), (200, 200, 200)])
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


@pytest.mark.parametrize("softcap", [15.0, 0.0])
def test_true_token_probs_against_numpy(softcap):
    model = build(softcap=softcap).eval()
    sequences = random_tokens(5, 17).numpy().astype(np.uint16)  # the last batch of 2 is short
    found = q.true_token_probs(model, sequences, 2, q.World())
    wide = in_float64(model)
    tokens = torch.from_numpy(sequences.astype(np.int64))
    hidden, _ = wide(tokens[:, :-1])
    z = hidden.flatten(0, 1) @ wide.head[:VOCAB].T
    wanted = probabilities(z, softcap)[range(5 * 16), tokens[:, 1:].flatten()]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)  # float32 through ten blocks
