"""A prior that sees where it is: weights for each bucket of contexts, pulled to those that fit all
held-out tokens."""
import math
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load_file, save_file

import train_q0 as q

STRENGTHS = (10, 30, 100, 300, 1000, 3000, 10000)  # of the pull, in tokens
FOLDS = 5
LEAST = 1e-6  # weights below are none: the solver's tolerance
FILE = "gate.safetensors"


def fit_bucket(P, v, strength, tolerance=1e-7, max_passes=100):
    """Minimise F(w) = -(sum_n log(w.P_n) + strength sum_i v_i log w_i) / (N + strength) over the
    simplex: (w float64 [M], gap). P [M, N] > 0, N may be 0; v [M] > 0 sums to 1.

    The pull to v is as so many more tokens, a share v_i of which member i alone can predict. So F
    is convex and has the certificate of train_q0.fit_prior: F(w) - min F <= gap = log(max_i g_i)
    with g = -grad F(w). So has its method: that of a path w z = mu to mu = 0 which here ends at
    w z = pull.
    """
    M, N = P.shape
    total = N + strength
    pull = strength * v / total
    P = P.astype(np.float64)
    w = v
    z = (pull + 0.1 / M) / w
    best = w
    best_gap = math.inf
    for _ in range(max_passes):
        ratio = P / (w @ P)
        g = ratio.sum(axis=1) / total
        gap = max(0.0, math.log((g + pull / w).max()))
        if gap < best_gap:
            best = w
            best_gap = gap
        if gap <= tolerance:
            break
        mu = pull + 0.1 * abs(w @ z - pull.sum()) / M
        hessian = ratio @ ratio.T / total + np.diag(z / w)
        dw = np.linalg.solve(hessian, g - 1 + mu / w)
        dz = mu / w - z - z / w * dw
        w = q.keep_positive(w, dw)
        w = w / w.sum()
        z = q.keep_positive(z, dz)
    return best, best_gap


@dataclass(frozen=True, eq=False)
class Gate:
    """Weights of M members for each of B buckets of contexts."""
    weights: np.ndarray  # float64 [B, M]; each row sums to 1
    gap: float  # the largest certificate of a bucket

    def mix(self, P, buckets):
        """p(true token) of the mixture, float64 [N], of P [M, N] in buckets [N]."""
        mixed = np.zeros(len(buckets))
        for weights, p in zip(self.weights.T, P):
            mixed += weights[buckets] * p
        return mixed


def fit_gate(P, buckets, number, v, strength):
    """The Gate of P [M, N], whose tokens are in buckets [N] of `number`, pulled to v [M]."""
    fits = [fit_bucket(P[:, buckets == b], v, strength) for b in range(number)]
    return Gate(np.stack([w for w, _ in fits]), max(gap for _, gap in fits))


def choose_strength(P, buckets, number, documents):
    """The strength that predicts held-out documents best: each fold of them is scored under a
    prior and a gate that were fitted to the others. documents [N] are numbers."""
    members = np.flatnonzero(q.fit_prior(P)[0] > LEAST)
    P = P[members]
    losses = np.zeros(len(STRENGTHS))
    for fold in range(FOLDS):
        out = documents % FOLDS == fold
        if not 0 < out.sum() < len(out):  # fewer documents than folds
            continue
        seen = np.ascontiguousarray(P[:, ~out])
        v = q.fit_prior(seen)[0].clip(min=LEAST)
        v /= v.sum()
        for i, strength in enumerate(STRENGTHS):
            gate = fit_gate(seen, buckets[~out], number, v, strength)
            losses[i] -= np.log(gate.mix(P[:, out], buckets[out])).sum()
    return STRENGTHS[losses.argmin()]


# Buckets ----------------------------------------------------------------------------------------

def buckets_of(counting, tokens):
    """Bucket [T] of the context that ends at each of tokens [T]: how many of its last tokens the
    training text knows together, up to 3, and how many the document so far. `counting` are the
    members that count."""
    ngrams, _, cache = counting
    return ngrams.depth(tokens) * cache.depths + cache.depth(tokens)


def all_buckets(counting, sequences):
    """Buckets [n * T] of the tokens that sequences [n, T + 1] predict, in file order."""
    return np.concatenate([buckets_of(counting, row[:-1]) for row in sequences])


def number_of_buckets(counting):
    ngrams, _, cache = counting
    return ngrams.depths * cache.depths


def save(run, buckets):
    """Write the buckets {split: [N]} of the tokens whose predictions are cached."""
    small = {split: found.astype(np.uint8) for split, found in buckets.items()}
    q.write_atomically(run / FILE, lambda tmp: save_file(small, tmp))


def read(run):
    """({split: buckets [N]}, what result.json says of the gate) of a run, or None where it has no
    gate. Raises UserError for what is missing or damaged."""
    path = run / "result.json"
    if not path.exists():
        return None
    with q.reading(path):
        about = q.load_json(path).get("gate")
    if about is None:
        return None
    with q.reading(run / FILE):
        if q.sha256_of(run / FILE) != about["sha256"]:
            raise ValueError("the sha256 is not the recorded one")
        buckets = load_file(run / FILE)
        check(buckets, about["buckets"], about["strength"])
        return buckets, about


def check(buckets, number, strength):
    """Raise ValueError or TypeError where {split: buckets [N]} of `number`, or a strength, are not
    of a gate."""
    if not 0 < strength < math.inf:
        raise ValueError(f"a strength of {strength} is not positive")
    for split, found in buckets.items():
        if found.dtype != np.uint8 or not found.max() < number <= 256:
            raise ValueError(f"{split} does not hold buckets below {number}")


def load_gate(run, P, v):
    """The Gate for members of heldout P [M, N] and weights v [M]; None where the run has none."""
    found = read(run)
    if found is None:
        return None
    buckets, about = found
    with q.reading(run / FILE):
        return fit_gate(P, buckets["heldout"], int(about["buckets"]), v, about["strength"])
