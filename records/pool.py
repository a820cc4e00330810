"""Large populations from the cached predictions of small runs: trajectories differ by seed alone and do not communicate
until the prior is fitted, so runs that differ by seed alone make the population of a run with more trajectories.

    python records/pool.py [--k K] [--mixed] SIZE OUT.json RUN ...

RUNs are cut into groups of SIZE, none of them used twice, so groups are independent samples; a rest is left over. Writes
the curve of every group, which records/plot.py takes in place of logs: epochs, FLOPs, and validation loss under the
prior learned over the members so far, or over the best K of them, found by pruning on held-out text. All runs must have
one configuration, but for the seed, and report on one split. (A population of several runs for use: train_q0.py pool.)
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import numpy as np

import train_q0 as q
from plot import curve


def pooled(runs, k):
    """[members, 3] of finished runs as one population, one trained after the other: epochs, FLOPs, loss of at most k."""
    heldout, scored, rows = [], [], []
    for run in runs:
        found = q.load_predictions(run)
        split = next(s for s in ("val", "dev") if s in found)
        before = rows[-1][:2] if rows else (0, 0)
        for p, s, at in zip(found["heldout"], found[split], curve(run / "log.txt"), strict=True):
            heldout.append(p)
            scored.append(s)
            members, weights = q.best_members(np.stack(heldout), k and min(k, len(heldout)))
            rows.append([at[0] + before[0], at[1] + before[1], q.mixture_loss([scored[i] for i in members], weights)])
    return rows


def settings(run):
    """(configuration, data): what runs of one pool must share."""
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return {k: v for k, v in about["config"].items() if k not in ("seed", *q.MACHINE)}, about["data"]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="pool.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--k", type=int, help="at most so many members; the best ones")
    parser.add_argument("--mixed", action="store_true",
                        help="the runs of a group may differ, those in the same place of all groups may not")
    parser.add_argument("size", type=int, help="runs in a group")
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", type=q.find_run)
    args = parser.parse_args(argv)
    size, runs = args.size, args.runs
    if len(set(runs)) < len(runs) or not 1 <= size <= len(runs):
        sys.exit(f"pool.py: error: {len(set(runs))} different runs for groups of {size}: give each one once")
    for i, run in enumerate(runs):
        like = runs[i % size if args.mixed else 0]
        if settings(run) != settings(like) or settings(run)[1] != settings(runs[0])[1]:  # [1]: the data
            sys.exit(f"pool.py: error: {run} has other settings or data than {like}")
    curves = [pooled(runs[i:i + size], args.k) for i in range(0, len(runs) - size + 1, size)]
    text = json.dumps([[[round(x), float(f"{flops:.5g}"), round(loss, 6)] for x, flops, loss in rows] for rows in curves])
    q.write_atomically(args.out, lambda tmp: tmp.write_text(text + "\n", encoding="utf-8"))
    ends = [rows[-1][2] for rows in curves]
    spread = statistics.stdev(ends) if len(ends) > 1 else float("nan")
    print(f"{curves[0][-1][0]:.0f} epochs, {len(curves[0])} members, n={len(ends)}: {statistics.mean(ends):.4f} "
          f"± {spread:.4f} ({', '.join(f'{x:.4f}' for x in ends)})")


if __name__ == "__main__":
    main()
