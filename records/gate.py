"""A prior that knows where it stands: one vector of weights for each bucket of contexts, pulled to
the weights that fit all tokens."""
import math

import numpy as np

import train_q0 as q

STRENGTHS = (10, 30, 100, 300, 1000, 3000, 10000)  # of the pull, in tokens
FOLDS = 5


def fit_bucket(P, v, strength, tolerance=1e-7, max_passes=100):
    """Minimise F(w) = -(sum_n log(w.P_n) + strength sum_i v_i log w_i) / (N + strength) over the
    simplex: (w float64 [M], gap). P [M, N] > 0, N may be 0; v [M] > 0 sums to 1.

    The pull is as `strength` more tokens, of which a share v_i is known to member i alone, so
    F is as convex as the prior's and has its certificate (train_q0.fit_prior):
    F(w) - min F <= gap = log(max_i g_i), g = -grad F(w).
    """
    total = P.shape[1] + strength
    pull = strength * v / total
    P = P.astype(np.float64)
    w = v / v.sum()
    best = w
    best_gap = math.inf
    for _ in range(max_passes):
        ratio = P / (w @ P)
        g = ratio.sum(1) / total + pull / w
        gap = max(0.0, math.log(g.max()))
        if gap < best_gap:
            best = w
            best_gap = gap
        if gap <= tolerance:
            break
        hessian = ratio @ ratio.T / total + np.diag(pull / w ** 2)
        dw = np.linalg.solve(hessian, g - 1)  # Newton for F(w) + sum(w), see fit_prior
        decrement = math.sqrt(max(0.0, (g - 1) @ dw) * total)
        w = w + dw / (1 + decrement)  # of self-concordant functions
        w = w / w.sum()
    return best, best_gap
