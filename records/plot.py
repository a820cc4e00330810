"""`train_q0.py compare` and what it draws; curve.png.

A row of a comparison is a run, or several, such as seeds: LABEL=PATTERN of runs under logs/, of
folders, of logs, or of what pool.py wrote. The first row is the one to match and to compare with. A
row's curve is the learned prior over the members so far, at the epochs and FLOPs spent so far;
lines are means over the runs of a row, bands one standard deviation.
"""
import glob
import json
import os
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import train_q0 as q
from records.check import read_log, read_table, rule
from records.population import find_run, plain_name

MOST_BYTES = 2 ** 26  # of a file that is read
EVENT = re.compile(  # a member of a log, or a mixture of all so far
    r"^(?:member:(?P<member>\d+) .*epochs:(?P<epochs>\d+) .*|ensemble .*prior:(?P<prior>\w+) )"
    r"\w+_loss:(?P<loss>\S+)(?: .*)?\n", re.M)
PICTURES = (".png", ".svg", ".pdf")  # that --out may have put beside the runs
EPOCHS = 0  # columns of a curve
FLOPS = 1
LOSS = 2


# Curves -----------------------------------------------------------------------------------------

def curve(path, whole=True):
    """[members, 3] of a log: epochs, FLOPs and loss under the learned prior after each member.
    FLOPs of training and of teaching are shared out by epochs; NaN before the run is complete.
    Raises ValueError where it is not, unless it need not be `whole`."""
    text = "\n".join(read_log(Path(path)).lines)
    members = re.findall(r"^member:\d+ .*epochs:(\d+) distilled:(\d)", text, re.M)
    losses = re.findall(r"^ensemble .*prior:learned \w+_loss:(\S+)", text, re.M)
    final = re.search(r"^final_\w+_loss:.* flops:(\S+) teacher_flops:(\S+)", text, re.M)
    if whole and (final is None or len(members) != len(losses)):
        raise ValueError(f"{path}: the run is not complete")
    if not losses:
        raise ValueError(f"{path}: the run has no member yet")
    epochs, distilled = np.array(members[:len(losses)], dtype=float).T
    spent = np.diff(epochs, prepend=0)
    flops = np.full(len(losses), np.nan)
    if final:
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
    cells = f"{len(new)} | {statistics.mean(new):.4f}"
    if len(new) > 1:
        cells += f" ± {statistics.stdev(new):.4f}"
    cells += " | "
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


def check_file(path):
    """Raise ValueError for what might never end, or is too large to be read."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} is no regular file, or too large")


def print_columns(rows):
    """Rows of texts below one another; the first column to the left, the others to the right. What
    files say may be anything: a text is cut, and what would steer a terminal is a ?."""
    rows = [["".join(c if c.isprintable() else "?" for c in text[:50]) for text in row]
            for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def print_reached(rows):
    """How many epochs and FLOPs the other rows need for what the first one reaches."""
    (name, first), *others = rows.items()
    target = np.mean([c[-1, LOSS] for c in first])
    for label, curves in others:
        for column, unit in ((EPOCHS, "epochs"), (FLOPS, "FLOPs")):
            if np.isnan([c[-1, column] for c in (*first, *curves)]).any():
                continue  # of a run under way
            at = reached(curves, target, column)
            missing = np.isnan(at).sum()
            if missing:
                print(f"{label} does not reach {name}'s {target:.4f} within its {unit} "
                      f"(in {missing} runs)")
                continue
            ratio = first[0][-1, column] / at
            deviation = f" (standard deviation {spread(at):.2g})" if len(at) > 1 else ""
            print(f"{label} reaches {name}'s {target:.4f} after {at.mean():.4g} {unit}{deviation}: "
                  f"{ratio.mean():.2f} times fewer")


# Figures ----------------------------------------------------------------------------------------

def figure_of(rows, colors={}):
    """Mean curve and standard deviation of each row {label: curves}, by epochs and by FLOPs, in
    colors {label: color}, else each in one of its own."""
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
            line, = axis.plot(
                x, loss, "o-", color=colors.get(label), markersize=3,
                label=f"{label} (n={len(curves)})")
            axis.fill_between(x, loss - band, loss + band, alpha=0.25, color=line.get_color())
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    ends = [c[-1, LOSS] for curves in rows.values() for c in curves]
    by_epochs.set_ylim(min(ends) - 0.02, max(ends) + 0.25)
    by_epochs.set_ylabel("loss under the learned prior (nats per token)")
    by_epochs.legend()
    return figure


def draw(path, rows):
    """Write the figure of rows to a file."""
    figure = figure_of(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix[1:] or "png"  # without one matplotlib writes to another name
    figure.savefig(path, format=kind, dpi=110)


def entries_of(run):
    """The curve of a run under way as its result will have it, to five decimals: an entry a member,
    from the logs of all its trajectories. Raises ValueError for what is no log."""
    entries = []
    for path in sorted(run.glob("log*.txt")):
        check_file(path)
        for found in EVENT.finditer(path.read_text(encoding="utf-8")):
            loss = float(found["loss"])
            if found["member"]:
                entry = {"member": int(found["member"]), "epochs": int(found["epochs"])}
                entries.append({**entry, "loss": loss})
            elif entries:
                entries[-1][found["prior"]] = loss
    whole = [entry for entry in entries if "learned" in entry]
    return sorted(whole, key=lambda entry: entry["member"])


def draw_losses(axis, rows, x, lines):
    """A line for each of lines {name: (style, label)} through rows {x: ..., name: loss}."""
    size = 4 if len(rows) <= 40 else 2
    for name, (style, label) in lines.items():
        losses = [row[name] for row in rows]
        axis.plot([row[x] for row in rows], losses, style, markersize=size, label=label)


def draw_curve(path, entries, split, table=None):
    """A run's curve.png: loss against epochs of single members, their uniform mixture and the
    prior; at its end also against the number of members (population_table). entries: the `curve`
    of its result. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    several = table is not None and len(table["rows"]) > 1
    panels = 2 if several else 1
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
        if len(entries) <= 16:
            axis.xaxis.get_major_locator().set_params(integer=True)
        else:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
    best = min(entry["loss"] for entry in entries)
    for axis in (by_epochs, *by_members):
        axis.axhline(best, color="gray", linewidth=1, label=f"best single member: {best:.4f}")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle(path.parent.name, parse_math=False)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several launches may draw at once
    figure.savefig(tmp, format="png", dpi=120)
    tmp.replace(path)


# compare ----------------------------------------------------------------------------------------

@dataclass
class Row:
    """Runs that a comparison takes as one."""
    curves: list  # of arrays [members, 3]
    configs: list = field(default_factory=list)  # of what has a log
    texts: list = field(default_factory=list)  # what their losses are of: a split and its hashes
    singles: list = field(default_factory=list)  # losses of their best members
    tables: list = field(default_factory=list)  # {k: loss of the best k}


def compare(argv):
    """Put runs side by side, finished or under way: settings that differ, losses, what k members
    are worth, the verdict of the rule (records/README.md), how many epochs a row needs for what the
    first one reaches; and draw their curves in one picture."""
    parser = q.Parser(prog="train_q0.py compare", description=compare.__doc__)
    parser.add_argument("rows", nargs="+", metavar="ROW", help="a run, or LABEL=PATTERN of several, "
                        "such as seeds: of runs, folders, logs, or curves that pool.py wrote")
    parser.add_argument("--out", type=Path, metavar="FILE.png",
                        help="the picture [compare.png under logs/]")
    args = parser.parse_args(argv)
    rows = {}
    for name in args.rows:
        label, paths = paths_of(name)
        if label in rows:
            raise q.UserError(f"{name}: there is a row {label} already")
        rows[label] = read_row(with_curves(name, paths))
    check_texts(rows)
    print_columns(list(side_by_side(rows)))
    curves = {label: row.curves for label, row in rows.items()}
    print_reached(curves)
    out = args.out or q.LOGS / "compare.png"
    try:
        draw(out, curves)
    except (ImportError, ValueError) as e:  # there is no matplotlib, or no such kind of picture
        raise q.UserError(f"{out} is not drawn: {q.one_line(e)}") from None
    print(f"curves: {out}")


def paths_of(name):
    """(label, files) of an argument. Raises UserError where there are none."""
    if "=" in name and not (q.LOGS / name).is_dir():
        label, pattern = name.split("=", 1)
        found = sorted(glob.glob(str(q.LOGS / pattern)) or glob.glob(pattern))
        if not found:
            raise q.UserError(f"no runs or files match {pattern}")
    else:
        found = [find_run(name)]
        label = plain_name(found[0])
    paths = map(Path, found)
    return label, [path / "log.txt" if path.is_dir() else path for path in paths]


def without_curve(path):
    """Why a file that an argument stands for has no curve of training; None where it has one."""
    if path.suffix in PICTURES:
        return "a picture"
    if not path.exists():
        made = (path.parent / "result.json").exists()
        return "made of other runs: compare those" if made else "no log"
    if path.suffix == ".json":
        return None
    with q.reading(f"{path}, which should be the log of a run,"):
        check_file(path)
        lines = read_log(path).lines
    return None if any(" prior:learned " in line for line in lines) else "no member yet"


def with_curves(name, paths):
    """Those of the files of argument `name` that have a curve; says which have none. Raises
    UserError where it is all of them."""
    left = []
    out = {}
    for path in paths:
        why = without_curve(path)
        if why is None:
            left.append(path)
            continue
        run = path.parent.name if path.name == "log.txt" else path.name
        out.setdefault(why, []).append(run)
    said = "; ".join(f"{', '.join(runs)} ({why})" for why, runs in out.items())
    if not left:
        raise q.UserError(f"{name} has no curve of training: {said}")
    if out:
        q.say(f"notice: {name} leaves out what has no curve of training: {said}", "stderr")
    return left


def read_row(paths):
    """A Row of logs and pools' curves. Raises UserError for what is neither."""
    row = Row([])
    for path in paths:
        with q.reading(f"{path}, which should be the log of a run,"):
            check_file(path)
            if path.suffix == ".json":
                row.curves.extend(curves_in(str(path)))
                continue
            log = read_log(path)
            row.curves.append(curve(path, whole=False))
            config = log.about["config"]
            split = config.get("report", "val")
            text = "\n".join(log.lines)
            losses = re.findall(rf"^member:\d+ .*{split}_loss:(\S+)", text, re.M)
            row.configs.append({**config, "data": log.about["data"]["name"]})
            row.texts.append((split, log.about["data"][split]))
            row.singles.append(min(map(float, losses)))
            row.tables.append({k: losses[-1] for k, losses in read_table(log.lines).items()})
    if len({len(c) for c in row.curves}) > 1:
        raise q.UserError(f"{paths[0]} and the others of its row have other numbers of members")
    return row


def check_texts(rows):
    """Raise UserError where losses are of different text."""
    texts = [text for row in rows.values() for text in row.texts]
    for split, files in texts:
        if (split, files) != texts[0]:
            raise q.UserError(f"losses on {split} and on {texts[0][0]} text, or on other files, do "
                              "not compare")


def side_by_side(rows):
    """Lines of cells: a column for each Row."""
    first = next(iter(rows.values()))
    yield ["", *rows]
    yield from differing(rows.values())
    cells = [compared(first.curves, row.curves).split(" | ") for row in rows.values()]
    n, loss, *verdict = [list(column) for column in zip(*cells)]
    yield ["runs", *n]
    yield ["epochs so far", *(f"{row.curves[0][-1, EPOCHS]:.0f}" for row in rows.values())]
    flops = [f"{row.curves[0][-1, FLOPS]:.3g}" for row in rows.values()]
    yield ["FLOPs", *("-" if cell == "nan" else cell for cell in flops)]
    yield ["best member", *(mean_of(row.singles) for row in rows.values())]
    for k in sorted({k for row in rows.values() for table in row.tables for k in table}):
        found = [[table[k] for table in row.tables if k in table] for row in rows.values()]
        yield [f"best {k}", *map(mean_of, found)]
    yield ["all members", *loss]
    for name, column in zip(("difference", "required", "verdict"), verdict):
        if set(column) - {"-", "?"}:
            yield [name, *column]


def mean_of(losses):
    return f"{statistics.mean(losses):.4f}" if losses else "-"


def differing(rows):
    """Lines of the settings that are not the same in all rows; those of the machine are left out,
    and seeds within a row."""
    names = dict.fromkeys(name for row in rows for config in row.configs for name in config)
    for name in names:
        if name in q.MACHINE:
            continue
        cells = []
        for row in rows:
            values = dict.fromkeys(str(config.get(name, "-")) for config in row.configs)
            cells.append(" ".join(values) or "-")
        if len(set(cells)) > 1:
            yield [name, *cells]
