"""What the prior is worth, from the cached predictions of finished runs that report on validation text.

    python records/prior.py RUN ...

A row is a way to choose and weigh members; the prior sees held-out text alone. Numbers are means over the runs, with the
standard deviation of the difference to the learned prior over all members. More held-out text is taken from the dev
split, on which every member makes a pass.
"""
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_q0 as q


def greedy(heldout, k):
    """[k] members: each is the one that lowers the held-out loss most once the prior is fitted to it and those before."""
    chosen = []
    while len(chosen) < k:
        others = [i for i in range(len(heldout)) if i not in chosen]
        losses = [q.mixture_loss(heldout[[*chosen, i]], q.fit_prior(heldout[[*chosen, i]])[0]) for i in others]
        chosen.append(others[int(np.argmin(losses))])
    return chosen


def dev_predictions(run):
    """p(true token) of every member of `run` on the dev split [M, N]."""
    population = q.load_population(run)
    cfg, vocab_size = population.member(0).cfg, population.member(0).vocab_size
    files = [f["name"] for f in population.manifest["splits"]["dev"]["files"]]
    tokens = np.concatenate([q.read_shard(q.find_data(cfg) / f, vocab_size) for f in files])
    sequences = tokens[:len(tokens) // (cfg.seq_len + 1) * (cfg.seq_len + 1)].reshape(-1, cfg.seq_len + 1)
    return np.stack([q.true_token_probs(population.member(i), sequences, cfg.micro_batch, q.World())
                     for i in range(len(population.heldout))])


def rows_of(run):
    """{row: validation loss} of one run."""
    found = q.load_predictions(q.find_run(run))
    heldout, scored = found["heldout"], found["val"]
    M, N = heldout.shape
    w, _ = q.fit_prior(heldout)
    ranked = np.argsort(-w, kind="stable")
    loss = lambda members, weights: q.mixture_loss(scored[members], weights)
    fitted = lambda members: loss(members, q.fit_prior(heldout[members])[0])
    budget = lambda k: loss(*q.best_members(heldout, k))
    everyone = np.arange(M)
    rows = {f"learned, all {M}": loss(everyone, w), f"uniform, all {M}": loss(everyone, np.full(M, 1 / M)),
            "newest member alone": loss([M - 1], [1.0]),
            "half learned, half uniform": loss(everyone, 0.5 * w + 0.5 / M)}
    for k in (k for k in (2, 4, 8) if k < M):
        top = ranked[:k]
        rows |= {f"top {k}, uniform": loss(top, np.full(k, 1 / k)), f"top {k}, renormalised": loss(top, w[top] / w[top].sum()),
                 f"top {k}, refitted": fitted(top), f"pruned to {k}": budget(k),
                 f"greedy {k}": fitted(greedy(heldout, k)),
                 f"newest {k}, uniform": loss(everyone[-k:], np.full(k, 1 / k)), f"newest {k}, fitted": fitted(everyone[-k:])}
    half = heldout[:, :N // 2]
    rows["held-out text halved"] = loss(everyone, q.fit_prior(half)[0])
    rows["held-out text quartered"] = loss(everyone, q.fit_prior(heldout[:, :N // 4])[0])
    dev = dev_predictions(run)
    for times in (2, 4):
        more = np.concatenate([heldout, dev[:, :(times - 1) * N]], axis=1)
        rows[f"held-out text times {more.shape[1] / N:.2g}"] = loss(everyone, q.fit_prior(more)[0])
    return rows


if __name__ == "__main__":
    runs = [rows_of(run) for run in sys.argv[1:]]
    first = next(iter(runs[0]))
    print(f"| prior, n={len(runs)} | validation loss | difference | its standard deviation |\n|---|---|---|---|")
    for name in runs[0]:
        losses, differences = [r[name] for r in runs], [r[name] - r[first] for r in runs]
        spread = f"{statistics.stdev(differences):.4f}" if len(runs) > 1 else "-"
        print(f"| {name} | {statistics.mean(losses):.4f} | {statistics.mean(differences):+.4f} | {spread} |")
