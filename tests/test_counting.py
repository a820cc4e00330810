"""Members that count, and weights that depend on the context."""
import collections
import shutil

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from pytest import approx
from safetensors.numpy import load_file
from tiny import (
    VOCABULARY,
    fails,
    flip,
    predictions_of,
    read_json,
    run_in,
    sequences_of,
    works)

import train_q0 as q
from records import counting, gate, neighbours
from records.mixture import load_mixture
from records.population import load_member

V = 7
EOT = 6


def some_text(length=400, seed=0):
    """Documents of tokens below V, as one array; some are empty."""
    rng = np.random.default_rng(seed)
    p = np.array([8, 4, 2, 2, 1, 1, 3])
    tokens = rng.choice(V, length - 1, p=p / p.sum())
    return np.append(EOT, tokens).astype(np.uint16)


# Members ----------------------------------------------------------------------------------------

def plain_kneser_ney(text, order):
    """p(token after a context), one n-gram at a time."""
    text = [*text.tolist(), EOT]
    occurs = [collections.Counter() for _ in range(order + 1)]
    for end in range(1, len(text)):
        for n in range(1, order + 1):
            gram = tuple(text[max(0, end - n + 1):end + 1])
            if len(gram) == n and EOT not in gram[1:-1]:
                occurs[n][gram] += 1
    counts = [None, *occurs[1:]]
    for n in range(1, order):
        before = collections.Counter(gram[1:] for gram in occurs[n + 1])
        counts[n] = {}
        for gram, times in occurs[n].items():
            opens = n > 1 and gram[0] == EOT
            counts[n][gram] = times if opens else before[gram]

    def discount(n, count):
        times = collections.Counter(counts[n].values())
        if not all(times[i] for i in (1, 2, 3, 4)):
            return counting.FEW[min(count, 3)]
        c = min(count, 3)
        y = times[1] / (times[1] + 2 * times[2])
        found = c - (c + 1) * y * times[c + 1] / times[c]
        return min(max(found, 0), c)

    def p(token, context):
        n = len(context) + 1
        follow = {}
        for gram, count in counts[n].items():
            if gram[:-1] == context:
                follow[gram[-1]] = count
        shorter = p(token, context[1:]) if context else 1 / V
        if not follow:
            return shorter
        total = sum(follow.values())
        left = sum(discount(n, c) for c in follow.values())
        mine = follow.get(token, 0)
        kept = mine - discount(n, mine) if mine else 0
        return (kept + left * shorter) / total
    return p


def context_in_document(tokens, t, longest):
    """The last `longest` tokens up to t, from the beginning of the document on."""
    begin = max((i for i in range(t + 1) if tokens[i] == EOT), default=0)
    return tuple(tokens[max(begin, t + 1 - longest):t + 1])


@pytest.mark.parametrize("length", (12, 400))  # with too few counts for discounts, and enough
def test_kneser_ney_is_the_plain_one(length):
    member = counting.KneserNey(some_text(length), V, EOT, order=3)
    tokens = some_text(40, seed=1)[3:].astype(np.int64)
    p = plain_kneser_ney(some_text(length), 3)
    for t, found in enumerate(member.probs(tokens)):
        context = context_in_document(tokens.tolist(), t, 2)
        expected = [p(v, context) for v in range(V)]
        assert_allclose(found, expected, rtol=1e-5)


def followers(text, context):
    """Counts [V] of what follows a context in a document."""
    found = np.zeros(V)
    for end in range(len(context), len(text)):
        if text[end - len(context):end] == context:
            found[text[end]] += 1
    return found


def test_cache_is_the_plain_one():
    """p pulls what follows longer and longer contexts, in the document so far, to that of the next
    shorter one."""
    tokens = some_text(60, seed=2)[5:].astype(np.int64)
    member = counting.Cache((3, 0.5, 0.25), V, EOT)
    for t, p in enumerate(member.probs(tokens)):
        so_far = context_in_document(tokens.tolist(), t, len(tokens))
        expected = np.full(V, 1 / V)
        for k, strength in enumerate((3, 0.5, 0.25)):
            if len(so_far) >= k:
                context = so_far[len(so_far) - k:]
                counts = followers(so_far, context)
                expected = (counts + strength * expected) / (counts.sum() + strength)
        assert_allclose(p, expected, rtol=1e-5)


def test_distributions_of_what_came_before():
    """They sum to 1 and exclude nothing; what follows changes nothing, and depths neither."""
    tokens = some_text(50, seed=3).astype(np.int64)
    other = tokens.copy()
    other[20:] = some_text(50, seed=4)[20:]
    sequences = np.stack([tokens, other])
    for member in counting.members_of(some_text(), vocab_size=V, eot=EOT):
        P = member.probs(tokens)
        assert P.min() > 0
        assert_allclose(P.sum(axis=1), 1, atol=1e-6)
        assert np.array_equal(member.probs(other)[:20], P[:20])
        depth = member.depth(tokens)
        assert np.array_equal(member.depth(other)[:20], depth[:20])
        batch = member.token_probs(torch.from_numpy(sequences[:, :-1])).numpy()
        picked = np.take_along_axis(batch, sequences[:, 1:, None], axis=2)
        assert np.array_equal(member.true_token_probs(sequences), picked.flatten())


def test_neighbours_are_the_plain_ones(finished, corpus, monkeypatch):
    """Contexts weigh by the cosine of hidden states, and bring the token that came after them; what
    follows changes nothing."""
    monkeypatch.setattr(neighbours, "CHUNK", 100)
    model = load_member(finished / "members/3")
    tokens = sequences_of(corpus, "train", 64).flatten()[:500]
    member = neighbours.neighbours_of(model, tokens.astype(np.uint16), VOCABULARY - 1)
    rows = torch.from_numpy(q.cut(tokens, 64))
    keys = model(rows[:, :-1])[0].flatten(0, 1).double()
    row = sequences_of(corpus, "val", 64)[0, :-1]
    hidden, = model(torch.from_numpy(row)[None])[0].double()
    cosine = torch.cosine_similarity(hidden[:, None], keys, dim=-1)
    weights = torch.exp(neighbours.SHARPNESS * cosine)
    P = torch.zeros(len(row), VOCABULARY, dtype=torch.float64)
    P.index_add_(1, rows[:, 1:].flatten(), weights / weights.sum(dim=1, keepdim=True))
    u = neighbours.UNIFORM
    found = member.probs(row)
    assert found.dtype == np.float32
    assert_allclose(found, (1 - u) * P + u / VOCABULARY, rtol=0.01)  # keys are float16
    assert_allclose(member.next_probs(row[:20]), found[19], rtol=1e-3)


# The gate ---------------------------------------------------------------------------------------

def some_predictions(N=600, M=4):
    """(P, buckets): in bucket 1 another member is the best; bucket 2 has no token."""
    rng = np.random.default_rng(0)
    P = rng.uniform(0.05, 0.6, (M, N)).astype(np.float32)
    buckets = rng.integers(2, size=N)
    P[0, buckets == 0] += 0.3
    P[1, buckets == 1] += 0.3
    return P, buckets


def test_certificate():
    """No weights are better by more than the gap says, which is small."""
    P, _ = some_predictions()
    v = np.array([0.5, 0.3, 0.2 - 1e-5, 1e-5])

    def loss(w):
        likelihood = np.log(w @ P).sum()
        pull = 30 * (v @ np.log(w))
        return -(likelihood + pull) / (P.shape[1] + 30)

    w, gap = gate.fit_bucket(P, v, 30)
    assert w.sum() == approx(1) and (w > 0).all() and gap <= 1e-7
    rng = np.random.default_rng(1)
    near = rng.dirichlet(1e3 * w + 1e-3, 50)
    far = rng.dirichlet(np.ones(4), 50)
    for other in (*near, *far):
        assert loss(w) <= loss(other.clip(1e-12)) + gap


def test_gate_between_prior_and_bucket():
    """One bucket of all tokens has the prior itself, a bucket without tokens too; without a pull
    each has the prior of its own tokens."""
    P, buckets = some_predictions()
    v, _ = q.fit_prior(P)
    nowhere = np.zeros(P.shape[1], dtype=int)
    one = gate.fit_gate(P, nowhere, 1, v, 100)
    assert_allclose(one.weights[0], v, atol=1e-5)
    found = gate.fit_gate(P, buckets, 3, v, 1e-6)
    assert_allclose(found.weights[2], v, atol=1e-12)
    own, _ = q.fit_prior(np.ascontiguousarray(P[:, buckets == 1]))
    assert_allclose(found.weights[1], own, atol=1e-4)
    each = found.weights[buckets].T * P
    assert_allclose(found.mix(P, buckets), each.sum(axis=0))
    documents = np.arange(P.shape[1]) // 20
    assert gate.choose_strength(P, buckets, 2, documents) == gate.STRENGTHS[0]


@pytest.fixture(scope="module")
def counted(finished, base):
    """A run and its members that count."""
    run_in(base / "counted", "count", finished)
    return base / "counted/first_counted"


def test_counted_run(counted, finished, corpus, logs, capsys):
    """Seven members, of which four are the run's, and weights by context that log_probs gives;
    neighbours come in front of those that count."""
    cached = predictions_of(counted)
    assert np.array_equal(cached["val"][:4], predictions_of(finished)["val"])
    result = read_json(counted / "result.json")
    assert [entry.get("kind") for entry in result["curve"]] == [
        None, None, None, None, "kneser_ney", "undiscounted", "cache"]
    mixed = load_mixture(counted)
    sequences = sequences_of(corpus, "val", 64)
    rows = sequences[:8]
    tokens = torch.from_numpy(rows)
    p = mixed.log_probs(tokens[:, :-1]).exp()
    buckets = load_file(counted / "gate.safetensors")["val"]
    assert np.array_equal(mixed.buckets(sequences[:, :-1]).flatten(), buckets)
    expected = mixed.gate.mix(cached["val"][mixed.members], buckets)
    picked = p.gather(2, tokens[:, 1:, None]).flatten()
    assert_allclose(picked, expected[:len(picked)], rtol=1e-4)
    loss = -np.log(expected).mean()
    assert result["final_val_loss"] == approx(loss, abs=1e-6)
    assert loss < result["curve"][-1]["learned"] < result["curve"][3]["learned"]
    out = works(capsys, "evaluate", counted, "--data", corpus / "val.bin")
    assert f"by context, {len(mixed.members)} {loss:8.5f}" in out
    out = works(capsys, "select", counted, "--k", 7)
    assert f"by_context_val_loss:{loss:.5f}" in out
    assert works(capsys, "sample", counted, "--k", 2, "--tokens", 5)
    works(capsys, "count", finished, "--neighbours", "--name", "near")
    p = load_mixture("near").member(4).true_token_probs(sequences[:2])
    assert_allclose(p, predictions_of(logs / "near")["val"][4][:128], rtol=1e-3)


def test_mistakes(counted, flags, tmp_path, logs, capsys):
    for command in ("count", "average", "pool"):
        said = f"has members that count already: {command} .*first, which"
        fails(capsys, said, command, counted)
    fails(capsys, "members that count, which cannot teach", *flags, "--teacher", counted)
    broken = shutil.copytree(counted, tmp_path / "broken")
    flip(broken / "gate.safetensors", -1)
    fails(capsys, "gate.safetensors is .*damaged: .*sha256", "sample", broken)
