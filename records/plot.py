"""Loss against epochs and against FLOPs from the logs of runs: a figure, a table of differences
with the verdict of the rule (records/README.md), and how many epochs a row needs for what another
one reaches.

    python records/plot.py OUT.png "ensemble=records/wiki_cpu/FOLDER/logs/new_*.txt" "q0=..."

Pooled runs (pool.py) come as "LABEL=FILE.json". The first row is the one to match and to compare
with. A row's curve is the learned prior over the members so far, at the epochs and FLOPs spent so
far; lines are means over the logs of a row, bands one standard deviation.
"""
import glob
import json
import os
import re
import statistics
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run as a file, Python looks for modules in records/ alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from records.check import FAULTS, one_line, read_log, rule

EPOCHS = 0  # columns of a curve
FLOPS = 1
LOSS = 2


# Curves -----------------------------------------------------------------------------------------

def curve(path):
    """[members, 3] of a log: epochs, FLOPs and loss under the learned prior after each member.
    FLOPs of training and of teaching are shared out by epochs. Raises ValueError where the run is
    not complete."""
    text = "\n".join(read_log(Path(path)).lines)
    members = re.findall(r"^member:\d+ .*epochs:(\d+) distilled:(\d)", text, re.M)
    losses = re.findall(r"^ensemble .*prior:learned \w+_loss:(\S+)", text, re.M)
    final = re.search(r"^final_\w+_loss:.* flops:(\S+) teacher_flops:(\S+)", text, re.M)
    if final is None or len(members) != len(losses):
        raise ValueError(f"{path}: the run is not complete")
    epochs, distilled = np.array(members, dtype=float).T
    spent = np.diff(epochs, prepend=0)
    total = float(final[1])
    teacher = float(final[2])
    taught = np.cumsum(spent * distilled)
    flops = (total - teacher) * epochs / epochs[-1] + teacher * taught / max(taught[-1], 1)
    return np.stack([epochs, flops, np.array(losses, dtype=float)], axis=1)


def curves_in(path):
    """The curve of a log, or those that pool.py wrote."""
    if path.endswith(".json"):
        return np.array(json.loads(Path(path).read_text()))
    return [curve(path)]


def reached(curves, target, column):
    """Where each curve first comes down to `target`, by linear interpolation; NaN where it does
    not."""
    found = []
    for at in curves:
        x = at[:, column]
        y = at[:, LOSS]
        i = int((y <= target).argmax())
        if y[i] > target:
            found.append(np.nan)
        elif i == 0:
            found.append(x[0])
        else:
            share = (y[i - 1] - target) / (y[i - 1] - y[i])
            found.append(x[i - 1] + (x[i] - x[i - 1]) * share)
    return np.array(found)


def spread(values):
    return np.std(values, axis=0, ddof=1 if len(values) > 1 else 0)


# Table ------------------------------------------------------------------------------------------

def compared(first, curves):
    """Cells of the table: n, loss, and by how much it is above that of `first`, which the rule
    calls equal or not."""
    old = [float(c[-1, LOSS]) for c in first]
    new = [float(c[-1, LOSS]) for c in curves]
    deviation = f"{statistics.stdev(new):.4f}" if len(new) > 1 else "?"
    cells = f"{len(new)} | {statistics.mean(new):.4f} ± {deviation} | "
    if curves is first:
        return cells + "- | - | -"
    found = rule(old, new)
    above = 0 - found["difference"]
    if "required" not in found:  # one run each
        return cells + f"{above:+.4f} | ? | -"
    required = found["required"]
    if abs(above) < required:
        verdict = "equal"
    else:
        verdict = "worse" if above > 0 else "better"
    if min(len(old), len(new)) < 5:
        verdict += " (n < 5)"
    return cells + f"{above:+.4f} | {required:.4f} | {verdict}"


def print_table(rows):
    first = next(iter(rows.values()))
    print("| row | epochs | FLOPs | n | loss, mean ± standard deviation | difference | required "
          "| verdict |")
    print("|---|---|---|---|---|---|---|---|")
    for label, curves in rows.items():
        end = curves[0][-1]
        cells = compared(first, curves)
        print(f"| {label} | {end[EPOCHS]:.0f} | {end[FLOPS]:.3g} | {cells} |")


def print_reached(rows):
    """How many epochs and FLOPs the other rows need for what the first one reaches."""
    (name, first), *others = rows.items()
    target = np.mean([c[-1, LOSS] for c in first])
    for label, curves in others:
        for column, unit in ((EPOCHS, "epochs"), (FLOPS, "FLOPs")):
            at = reached(curves, target, column)
            missing = np.isnan(at).sum()
            if missing:
                print(f"{label} does not reach {name}'s {target:.4f} within its {unit} "
                      f"(in {missing} runs)")
                continue
            ratio = first[0][-1, column] / at
            print(f"{label} reaches {name}'s {target:.4f} after {at.mean():.4g} {unit} (standard "
                  f"deviation {spread(at):.2g}): {ratio.mean():.2f} times fewer")


# Figures ----------------------------------------------------------------------------------------

def draw(path, rows):
    """Mean curve and standard deviation of each row, by epochs and by FLOPs."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_epochs, by_flops = figure.subplots(1, 2, sharey=True)
    for axis, column, name in ((by_epochs, EPOCHS, "epochs, all members together"),
                               (by_flops, FLOPS, "FLOPs, teachers included")):
        for label, curves in rows.items():
            mean = np.mean(curves, axis=0)
            x = mean[:, column]
            loss = mean[:, LOSS]
            band = spread([c[:, LOSS] for c in curves])
            label = f"{label} (n={len(curves)})"
            line, = axis.plot(x, loss, "o-", markersize=3, label=label)
            axis.fill_between(x, loss - band, loss + band, alpha=0.25, color=line.get_color())
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    ends = [c[-1, LOSS] for curves in rows.values() for c in curves]
    by_epochs.set_ylim(min(ends) - 0.02, max(ends) + 0.25)
    by_epochs.set_ylabel("loss under the learned prior (nats per token)")
    by_epochs.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def entries_of(run):
    """The curve of a run under way as its result will have it: an entry a member, from the metrics
    of all its trajectories. Raises ValueError or KeyError for damaged ones."""
    entries = []
    for path in sorted(run.glob("metrics*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            loss = next((event[key] for key in event if key.endswith("_loss")), None)
            if event["event"] == "member":
                entries.append({**event, "loss": loss})
            elif event["event"] == "ensemble":
                entries[-1][event["prior"]] = loss
    whole = [entry for entry in entries if "learned" in entry]
    return sorted(whole, key=lambda entry: entry["member"])


def draw_losses(axis, rows, x, lines):
    """A line for each of lines {name: (style, label)} through rows {x: ..., name: loss}."""
    for name, (style, label) in lines.items():
        losses = [row[name] for row in rows]
        axis.plot([row[x] for row in rows], losses, style, markersize=4, label=label)


def draw_curve(path, entries, split, table=None):
    """A run's curve.png: loss against epochs of single members, their uniform mixture and the
    prior; at its end also against the number of members (population_table). entries: the `curve`
    of its result. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    panels = 2 if table else 1
    figure = Figure(figsize=(1 + 5.5 * panels, 4.5), layout="constrained")
    by_epochs, *by_members = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    draw_losses(by_epochs, entries, "epochs", {
        "loss": ("o:C0", "newest member alone"),
        "uniform": ("s--C1", "all so far, uniform"),
        "learned": ("D-C2", "all so far, learned prior")})
    by_epochs.set_xlabel("epochs over the training text, all members together")
    by_epochs.set_ylabel(f"{split} loss (nats per token)")
    for axis in by_members:
        draw_losses(axis, table["rows"], "k", {
            "uniform": ("s--C1", "k of largest weight, uniform"),
            "learned": ("D-C2", "k of largest weight, learned prior"),
            "pruned": ("^-C3", "best k, found by pruning")})
        axis.set_xlabel("members k")
        axis.xaxis.get_major_locator().set_params(integer=True)
    best = min(entry["loss"] for entry in entries)
    for axis in (by_epochs, *by_members):
        axis.axhline(best, color="gray", linewidth=1, label=f"best single member: {best:.4f}")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle(path.parent.name)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several launches may draw at once
    figure.savefig(tmp, format="png", dpi=120)
    tmp.replace(path)


def main(argv):
    out, *pairs = argv
    rows = {}
    for row in pairs:
        label, pattern = row.split("=", 1)
        paths = sorted(glob.glob(pattern))
        if not paths:
            sys.exit(f"plot.py: error: no files match {pattern}")
        for path in paths:
            try:
                rows.setdefault(label, []).extend(curves_in(path))
            except FAULTS as e:
                sys.exit(f"plot.py: error: {path} is no finished log: {one_line(e)}")
    draw(Path(out), rows)
    print_table(rows)
    print_reached(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
