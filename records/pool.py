"""Large populations from the cached predictions of small runs: trajectories differ by seed alone
and do not communicate until the prior is fitted, so runs that differ by seed alone make the
population of a run with more trajectories.

    python records/pool.py [--k K] [--mixed] SIZE OUT.json RUN ...

RUNs are cut into groups of SIZE, none of them used twice, so groups are independent samples; a rest
is left over. Writes the curve of every group, which `train_q0.py compare` takes in place of logs: epochs,
FLOPs, and validation loss under the prior learned over the members so far, or over the best K of
them, found by pruning on held-out text. All runs must have one configuration, but for the seed, and
report on one split. (A population of several runs for use: train_q0.py pool.)
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run as a file, Python looks for modules in records/ alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_q0 as q
from records.plot import EPOCHS, FLOPS, LOSS, curve
from records.population import best_members, find_run, load_predictions, mixture_loss
from records.use import report_split


def pooled(runs, k):
    """[members, 3] of finished runs as one population, one trained after the other: epochs, FLOPs,
    loss of at most k members."""
    heldout = []
    scored = []
    rows = []
    for run in runs:
        found = load_predictions(run)
        split = report_split(found)
        before = rows[-1] if rows else (0, 0)
        members = zip(found["heldout"], found[split], curve(run / "log.txt"), strict=True)
        for its_heldout, its_scored, at in members:
            heldout.append(its_heldout)
            scored.append(its_scored)
            most = min(k or len(heldout), len(heldout))
            best, weights = best_members(np.stack(heldout), most)
            loss = mixture_loss([scored[i] for i in best], weights)
            rows.append((before[EPOCHS] + at[EPOCHS], before[FLOPS] + at[FLOPS], loss))
    return rows


def settings(run):
    """(configuration, data): what runs of one pool must share. Of its data only some name a teacher
    or a tokenizer."""
    about = q.load_json(run / "run.json")
    free = ("seed", *q.MACHINE)
    data = {k: v for k, v in about["data"].items() if k not in ("teacher", "tokenizer")}
    return {k: v for k, v in about["config"].items() if k not in free}, data


def check_alike(runs, size, mixed):
    """Exit where runs do not differ by seed alone; `mixed`: those in one place of the groups."""
    _, data = settings(runs[0])
    for i, run in enumerate(runs):
        like = runs[i % size] if mixed else runs[0]
        found = settings(run)
        if found != settings(like) or found[1] != data:
            sys.exit(f"pool.py: error: {run} has other settings or data than {like}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="pool.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--k", type=int, help="at most so many members; the best ones")
    parser.add_argument("--mixed", action="store_true", help="the runs of a group may differ, "
                        "those in the same place of all groups may not")
    parser.add_argument("size", type=int, help="runs in a group")
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", type=find_run)
    args = parser.parse_args(argv)
    size = args.size
    runs = args.runs
    different = len(set(runs))
    if different < len(runs) or not 1 <= size <= len(runs):
        sys.exit(f"pool.py: error: {different} different runs for groups of {size}: give each one "
                 "once")
    check_alike(runs, size, args.mixed)
    starts = range(0, len(runs) - size + 1, size)
    curves = [pooled(runs[i:i + size], args.k) for i in starts]
    rounded = [[[round(epochs), float(f"{flops:.5g}"), round(loss, 6)]
                for epochs, flops, loss in rows] for rows in curves]
    text = json.dumps(rounded) + "\n"
    q.write_atomically(args.out, lambda tmp: tmp.write_text(text, encoding="utf-8"))
    ends = [rows[-1][LOSS] for rows in curves]
    spread = statistics.stdev(ends) if len(ends) > 1 else float("nan")
    each = ", ".join(f"{x:.4f}" for x in ends)
    print(f"{curves[0][-1][EPOCHS]:.0f} epochs, {len(curves[0])} members, n={len(ends)}: "
          f"{statistics.mean(ends):.4f} ± {spread:.4f} ({each})")


if __name__ == "__main__":
    main()
