"""Loss against epochs and against FLOPs from the logs of runs: a figure, a table of differences with the verdict of the
rule (records/README.md), and how many epochs a row needs for what another one reaches.

    python records/plot.py OUT.png "independent ensemble=records/wiki_cpu/FOLDER/logs/new_*.txt" "q0=..."

Pooled runs (pool.py) come as "LABEL=FILE.json". The first row is the one to match and to compare with. A row's curve is
the learned prior over the members so far, at the epochs and FLOPs spent so far; lines are means over the logs of a row,
bands one standard deviation.
"""
import glob
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from check import rule


def curve(path):
    """[members, 3] of a log: epochs, FLOPs and loss under the learned prior after each member. FLOPs of training and of
    teaching are shared out by epochs. Raises ValueError where the run is not complete."""
    text = Path(path).read_text(encoding="utf-8").rsplit("=" * 100, 1)[-1]
    members = re.findall(r"^member:\d+ .*epochs:(\d+) distilled:(\d)", text, re.M)
    losses = re.findall(r"^ensemble .*prior:learned \w+_loss:(\S+)", text, re.M)
    final = re.search(r"^final_\w+_loss:.* flops:(\S+) teacher_flops:(\S+)", text, re.M)
    if final is None or len(members) != len(losses):
        raise ValueError(f"{path}: the run is not complete")
    epochs, distilled = np.array(members, dtype=float).T
    spent = np.diff(epochs, prepend=0)
    total, teacher = map(float, final.groups())
    taught = np.cumsum(spent * distilled)
    flops = (total - teacher) * epochs / epochs[-1] + teacher * taught / max(taught[-1], 1)
    return np.stack([epochs, flops, np.array(losses, dtype=float)], axis=1)


def curves_in(path):
    """The curve of a log, or those that pool.py wrote."""
    return np.array(json.loads(Path(path).read_text())) if path.endswith(".json") else [curve(path)]


def reached(rows, target, column):
    """Where each curve of `rows` first comes down to `target`, by linear interpolation; NaN where it does not."""
    found = []
    for at in (r[:, (column, 2)] for r in rows):
        i = int((at[:, 1] <= target).argmax())
        if at[i, 1] > target:
            found.append(np.nan)
        elif i == 0:
            found.append(at[0, 0])
        else:
            (x0, y0), (x1, y1) = at[i - 1], at[i]
            found.append(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))
    return np.array(found)


def compared(first, curves):
    """Cells of the table: n, loss, and by how much it is above that of `first`, which the rule calls equal or not."""
    old, new = ([float(c[-1, 2]) for c in side] for side in (first, curves))
    spread = f"{statistics.stdev(new):.4f}" if len(new) > 1 else "?"
    cells = f"{len(new)} | {statistics.mean(new):.4f} ± {spread} | "
    if curves is first:
        return cells + "- | - | -"
    found = rule(old, new)
    above, few = 0 - found["difference"], " (n < 5)" * (min(len(old), len(new)) < 5)
    if "required" not in found:  # one run each
        return cells + f"{above:+.4f} | ? | -"
    verdict = "equal" if abs(above) < found["required"] else "worse" if above > 0 else "better"
    return cells + f"{above:+.4f} | {found['required']:.4f} | {verdict}{few}"


def main(argv):
    from matplotlib.figure import Figure
    out, rows = Path(argv[0]), {}
    for row in argv[1:]:
        label, pattern = row.split("=", 1)
        rows[label] = [c for path in sorted(glob.glob(pattern)) for c in curves_in(path)]
        if not rows[label]:
            sys.exit(f"plot.py: error: no files match {pattern}")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for label, curves in rows.items():
        mean, spread = np.mean(curves, axis=0), np.std([c[:, 2] for c in curves], axis=0, ddof=len(curves) > 1)
        for axis, x, name in ((axes[0], mean[:, 0], "epochs, all members together"),
                              (axes[1], mean[:, 1], "FLOPs, teachers included")):
            line, = axis.plot(x, mean[:, 2], "o-", markersize=3, label=f"{label} (n={len(curves)})")
            axis.fill_between(x, mean[:, 2] - spread, mean[:, 2] + spread, alpha=0.25, color=line.get_color())
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
    first = next(iter(rows))
    print("| row | epochs | FLOPs | n | loss, mean ± standard deviation | difference | required | verdict |")
    print("|" + "---|" * 8)
    for label, curves in rows.items():
        print(f"| {label} | {curves[0][-1, 0]:.0f} | {curves[0][-1, 1]:.3g} | {compared(rows[first], curves)} |")
    target = np.mean([c[-1, 2] for c in rows[first]])
    for label in list(rows)[1:]:
        for column, unit in ((0, "epochs"), (1, "FLOPs")):
            at = reached(rows[label], target, column)
            if np.isnan(at).any():
                print(f"{label} does not reach {first}'s {target:.4f} within its {unit} (in {np.isnan(at).sum()} runs)")
                continue
            ratio = rows[first][0][-1, column] / at
            print(f"{label} reaches {first}'s {target:.4f} after {at.mean():.4g} {unit} (standard deviation "
                  f"{at.std(ddof=len(at) > 1):.2g}): {ratio.mean():.2f} times fewer")
    ends = [c[-1, 2] for curves in rows.values() for c in curves]
    axes[0].set_ylim(min(ends) - 0.02, max(ends) + 0.25)
    axes[0].set_ylabel("loss under the learned prior (nats per token)")
    axes[0].legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
