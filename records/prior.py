"""What the prior is worth, from the cached predictions of finished runs that report on validation
text.

    python records/prior.py RUN ...

A row is a way to choose and weigh members; the prior sees held-out text alone. Numbers are means
over the runs, with the standard deviation of the difference to the learned prior over all members.
More held-out text is taken from the dev split, on which every member makes a pass.
"""
import statistics
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run as a file, Python looks for modules in records/ alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_q0 as q
from records.mixture import load_mixture
from records.population import best_members, find_run, load_predictions, mixture_loss
from records.use import predictions_on


def fit(heldout):
    weights, _ = q.fit_prior(heldout)
    return weights


def greedy(heldout, k):
    """[k] members: each is the one that lowers the held-out loss most once the prior is fitted to
    it and those before."""
    chosen = []
    while len(chosen) < k:
        losses = {}
        for i in range(len(heldout)):
            if i not in chosen:
                P = heldout[[*chosen, i]]
                losses[i] = mixture_loss(P, fit(P))
        chosen.append(min(losses, key=losses.get))
    return chosen


def dev_predictions(run):
    """p(true token) of every member of `run` on the dev split [M, N]."""
    mixture = load_mixture(run)
    first = mixture.member(0)
    cfg = first.cfg
    files = [f["name"] for f in mixture.manifest["splits"]["dev"]["files"]]
    folder = q.find_data(cfg)
    tokens = np.concatenate([q.read_shard(folder / f, first.vocab_size) for f in files])
    return predictions_on(mixture, q.cut(tokens, cfg.seq_len), cfg.micro_batch)


def rows_of(run):
    """{row: validation loss} of one run."""
    found = load_predictions(find_run(run))
    heldout = found["heldout"]
    scored = found["val"]
    M, N = heldout.shape
    w = fit(heldout)
    ranked = np.argsort(-w, kind="stable")
    everyone = np.arange(M)

    def loss(members, weights):
        return mixture_loss(scored[members], weights)

    def uniform(members):
        return loss(members, np.full(len(members), 1 / len(members)))

    def fitted(members):
        return loss(members, fit(heldout[members]))

    rows = {
        f"learned, all {M}": loss(everyone, w),
        f"uniform, all {M}": uniform(everyone),
        "newest member alone": loss([M - 1], [1.0]),
        "half learned, half uniform": loss(everyone, 0.5 * w + 0.5 / M)}
    for k in [k for k in (2, 4, 8) if k < M]:
        top = ranked[:k]
        rows[f"top {k}, uniform"] = uniform(top)
        rows[f"top {k}, renormalised"] = loss(top, w[top] / w[top].sum())
        rows[f"top {k}, refitted"] = fitted(top)
        rows[f"pruned to {k}"] = loss(*best_members(heldout, k))
        rows[f"greedy {k}"] = fitted(greedy(heldout, k))
        rows[f"newest {k}, uniform"] = uniform(everyone[-k:])
        rows[f"newest {k}, fitted"] = fitted(everyone[-k:])
    rows["held-out text halved"] = loss(everyone, fit(heldout[:, :N // 2]))
    rows["held-out text quartered"] = loss(everyone, fit(heldout[:, :N // 4]))
    dev = dev_predictions(run)
    for times in (2, 4):
        more = np.concatenate([heldout, dev[:, :(times - 1) * N]], axis=1)
        rows[f"held-out text times {more.shape[1] / N:.2g}"] = loss(everyone, fit(more))
    return rows


def main(runs):
    rows = [rows_of(run) for run in runs]
    first = next(iter(rows[0]))
    print(f"| prior, n={len(rows)} | validation loss | difference | its standard deviation |")
    print("|---|---|---|---|")
    for name in rows[0]:
        losses = [r[name] for r in rows]
        differences = [r[name] - r[first] for r in rows]
        spread = f"{statistics.stdev(differences):.4f}" if len(rows) > 1 else "-"
        print(f"| {name} | {statistics.mean(losses):.4f} | {statistics.mean(differences):+.4f} | "
              f"{spread} |")


if __name__ == "__main__":
    main(sys.argv[1:])
