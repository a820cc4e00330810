"""The prior and what is made of it, against scipy, expectation maximisation and plain numpy."""
import math

import numpy as np
import pytest
import scipy.optimize
from pytest import approx
from scipy.special import expit

import train_q0 as q
from records import population


def random_predictions(M, N=400, seed=0, spread=1.5):
    """p(true token) of members that share what is hard: [M, N] float32."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(-2, 2, size=N)
    own = rng.normal(size=(M, N))
    return expit(hard + spread * own).astype(np.float32)


def trajectory(M, N=2000):
    """p(true token) of one trajectory's members: neighbours are alike, and later ones are better,
    so that the prior leaves most of them out."""
    rng = np.random.default_rng(0)
    hard = rng.normal(-2, 2, size=N)
    own = rng.normal(size=N)
    rows = []
    for i in range(M):
        own = 0.8 * own + 0.6 * rng.normal(size=N)
        rows.append(expit(hard + own - math.exp(-i / 6)))
    return np.stack(rows).astype(np.float32)


def mixture(P, w):
    """Nats per token, in plain numpy."""
    wide = np.asarray(P, dtype=np.float64)
    return -np.log(np.asarray(w) @ wide).mean()


def gradient(P, w):
    wide = P.astype(np.float64)
    return (wide / (w @ wide)).mean(axis=1)


def is_certified(P, w, gap, tolerance=1e-7):
    """Whether `gap` is below the tolerance, and what the formula says."""
    formula = max(0, math.log(gradient(P, w).max()))
    return gap <= tolerance and gap == approx(formula, abs=1e-12)


def em(P, passes):
    """Weights after so many steps of expectation maximisation, which never go uphill."""
    w = np.full(len(P), 1 / len(P))
    for _ in range(passes):
        w = w * gradient(P, w)
    return w


def test_losses_in_one_pass():
    """Blocks of tokens and a rest, in float64."""
    P = random_predictions(5, 2 * q.TOKEN_CHUNK + 7)
    weights = np.random.default_rng(1).dirichlet(np.ones(5), size=3)
    weights[0] = [0, 0, 1, 0, 0]
    expected = [mixture(P, w) for w in weights]
    np.testing.assert_allclose(q.mixture_losses(P, weights), expected, rtol=1e-12)


@pytest.mark.parametrize("M, spread", [(1, 1.5), (6, 0.3), (20, 3.0), (90, 1.5)])
def test_prior_against_scipy_and_em(M, spread):
    """Within the certificate of the optimum, which scipy and EM reach to about 1e-9."""
    P = random_predictions(M, seed=M, spread=spread)
    sums_to_1 = {"type": "eq", "fun": lambda w: w.sum() - 1}
    found = scipy.optimize.minimize(
        lambda w: mixture(P, w), np.full(M, 1 / M), jac=lambda w: -gradient(P, w),
        method="SLSQP", bounds=[(0, 1)] * M, constraints=sums_to_1, options={"ftol": 1e-14})
    lowest = min(found.fun, mixture(P, em(P, 2000)))
    for tolerance in (1e-2, 1e-4, 1e-7):
        w, gap = q.fit_prior(P, tolerance=tolerance)
        assert w.min() >= 0 and w.sum() == approx(1, abs=1e-12)
        assert is_certified(P, w, gap, tolerance)
        assert -1e-8 <= mixture(P, w) - lowest <= gap + 1e-8


def test_many_members(monkeypatch):
    """The products cost M^2 a pass; most members have no weight, and most passes skip them. A start
    that is far from the optimum costs no precision: the fit begins anew."""
    solve = q.torch.linalg.solve
    sizes = []

    def counted(matrix, vector):
        sizes.append(len(vector))
        return solve(matrix, vector)

    monkeypatch.setattr(q.torch.linalg, "solve", counted)
    P = trajectory(200)
    w, gap = q.fit_prior(P)
    assert is_certified(P, w, gap)
    assert len(sizes) < 30
    assert sum(size ** 2 for size in sizes) < 0.4 * len(sizes) * 200 ** 2
    oldest_alone = np.full(200, 1e-9)
    oldest_alone[0] = 1
    for start in (w, oldest_alone):
        assert is_certified(P, *population.fit_from(P, start))


def test_what_is_no_probability_is_refused():
    for bad in (0.0, -0.1, math.nan, math.inf):
        P = random_predictions(3)
        P[1, 2] = bad
        with pytest.raises(ValueError, match="positive and finite"):
            q.fit_prior(P)


def test_pruned():
    """Each set is the one before without its least member, under the optimal weights."""
    P = random_predictions(8)
    before = range(8)
    for members, weights in population.pruned(P):
        assert set(members) <= set(before)
        assert weights == sorted(weights, reverse=True)
        assert sum(weights) == approx(1, abs=1e-12)
        slow = em(P[members], 1000)
        assert mixture(P[members], weights) <= mixture(P[members], slow) + 1e-6
        before = members[:-1]
    assert not before
    assert population.best_members(P) == next(population.pruned(P))
    assert population.best_members(P, 1)[1] == [1.0]


def test_pruning_several_members_at_a_time_loses_nothing():
    """Against one at a time, each fit from a cold start."""
    members = np.arange(80)
    right = np.repeat(members, 10 + members // 4)  # each on a part of its own
    P = np.where(right == members[:, None], 0.9, 0.001)
    P *= np.random.default_rng(0).uniform(0.5, 1, size=P.shape)
    singly = {}
    while len(members) > 62:
        w, _ = q.fit_prior(P[members])
        singly[len(members)] = mixture(P[members], w)
        members = np.delete(members, w.argmin())
    path = list(population.pruned(P))
    sizes = [len(members) for members, _ in path]
    assert sizes == [*range(80, 62, -2), *range(62, 0, -1)]
    for members, weights in path[:9]:
        loss = mixture(P[members], weights)
        assert loss == approx(singly[len(members)], abs=1e-5)


@pytest.mark.parametrize("M, sizes", [
    (12, [*range(1, 13)]),
    (35, [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 35])])
def test_population_table(M, sizes):
    heldout = random_predictions(M, seed=1)
    scored = random_predictions(M, seed=2)
    table = population.population_table(heldout, list(scored))
    w, gap = q.fit_prior(heldout)
    ranked = np.argsort(-w)
    assert table["weights"] == w.tolist()
    assert table["ranked"] == ranked.tolist()
    assert table["gap"] == gap
    assert [row["k"] for row in table["rows"]] == sizes
    for row in table["rows"]:
        k = row["k"]
        top = ranked[:k]
        members, weights = population.best_members(heldout, k)
        expected = {
            "uniform": mixture(scored[top], np.full(k, 1 / k)),
            "learned": mixture(scored[top], w[top] / w[top].sum()),
            "pruned": mixture(scored[members], weights)}
        assert {name: row[name] for name in expected} == approx(expected, abs=1e-9)


def test_data_efficiency():
    for loss, shown in (
            (3.048, "9.95x"),
            (3.703, "2.00x"),
            (3.7031, "<2x"),
            (2.892, "20.00x"),
            (2.8919, ">20x")):
        assert population.data_efficiency(loss) == shown
