"""Draws the figures of README.md and of the pages beside it, from the curves in figures/pools.

    python records/figures.py

loss.png          loss against epochs at 1.4M and 12.6M parameters
wiki_cpu_32.png   every population up to 32 epochs at 1.4M, by epochs and by FLOPs
wiki_cpu_128.png  the same up to 128 epochs
ratio.png         how many times fewer epochs q0 and a chain need than the ensemble, at both sizes
method.png        the method in one drawing
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

if __name__ == "__main__":  # run as a file, Python looks for modules in records/ alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from records.plot import curves_in, figure_of, reached

FIGURES = Path(__file__).resolve().parent / "figures"
COLORS = {  # in every figure
    "single": "0.45",
    "ensemble": "tab:blue",
    "ensemble, members of 16": "lightskyblue",
    "snapshots": "tab:green",
    "chain": "tab:orange",
    "q0": "tab:red",
    "q0, one trajectory": "lightcoral",
    "a chain, then q0": "tab:purple",
}
EQUAL = {  # {figure: {population: its pool}}
    "wiki_cpu_32.png": {
        "single": "longer_single",
        "ensemble": "equal_ensemble_32",
        "snapshots": "equal_snapshots_32",
        "chain": "equal_chain_32",
        "q0": "split_q0_32",
        "q0, one trajectory": "equal_q0_32",
    },
    "wiki_cpu_128.png": {
        "ensemble": "equal_ensemble_128",
        "ensemble, members of 16": "longer_ensemble16_128",
        "snapshots": "equal_snapshots_128",
        "chain": "equal_chain_128",
        "q0": "equal_q0_128",
        "a chain, then q0": "equal_mixed_64",
    },
}
SINGLE_16 = 3.8756  # the best single model: 16 epochs, averaged, n=8 (RESULTS.md)
PUBLISHED = {  # times fewer epochs at 1.87B parameters, against 256 epochs of the ensemble
    "any number of members": 4.6,
    "no more members": 3.8,
}
EXTENDED = 256  # epochs of the ensemble there; ours was cut off
SEEDS = (201, 202)  # of the runs on the H100
LARGE = {"chain_201": "o-", "q0_201": "o--", "q0_202": "o-"}  # of them, each with a line's style


def pool(name):
    """[array [members, 3]] of figures/pools/NAME.json: epochs, FLOPs, loss so far."""
    path = FIGURES / f"pools/{name}.json"
    return [np.array(rows) for rows in curves_in(str(path))]


def mean_of(name):
    return np.mean(pool(name), axis=0)


def save(figure, name):
    figure.savefig(FIGURES / name, dpi=130, facecolor="white")
    print(FIGURES / name)


# wiki_cpu_*.png -----------------------------------------------------------------------------
def equal_figures():
    """Populations of one budget, each with its n."""
    for name, rows in EQUAL.items():
        curves = {population: pool(of) for population, of in rows.items()}
        save(figure_of(curves, COLORS), name)


# loss.png -----------------------------------------------------------------------------------
def draw_rows(axis, rows, population, n="", offset=(5, 0)):
    """One line a curve; the population's name and `n` stand at the end of the longest."""
    color = COLORS[population]
    for row in rows:
        epochs = row[:, 0]
        loss = row[:, 2]
        axis.plot(epochs, loss, "o-", color=color, markersize=2.5, linewidth=1.4)
    end = max(rows, key=len)[-1]
    axis.annotate(
        population + n, (end[0], end[2]), offset, textcoords="offset points",
        color=color, va="center", fontweight="bold")


def mark_ratio(axis, ensemble, rows, text, above):
    """An arrow from where the ensemble ends to where q0 was as good."""
    epochs = ensemble[-1, 0]
    loss = ensemble[-1, 2]
    start = reached(rows, loss, 0).mean()
    style = dict(arrowstyle="->", color="0.25", shrinkA=3, shrinkB=3)
    axis.annotate("", (start, loss), (epochs, loss), arrowprops=style)
    middle = (start + epochs) / 2
    axis.text(middle, loss + above, text, ha="center", color="0.25")


def draw_mean(axis, population, name, **style):
    rows = pool(name)
    draw_rows(axis, [np.mean(rows, axis=0)], population, f" (n={len(rows)})", **style)


def draw_small(axis):
    """1.4M parameters: means of the populations pooled from runs of 32 epochs."""
    draw_mean(axis, "single", "longer_single", offset=(-2, 10))
    axis.plot([16, 128], [SINGLE_16] * 2, ":", color=COLORS["single"])
    axis.text(128, SINGLE_16 - 0.012, "16 epochs, n=8", ha="right", color=COLORS["single"])
    for population in ("ensemble", "chain", "q0"):
        draw_mean(axis, population, f"equal_{population}_128")
    ensemble = mean_of("equal_ensemble_128")
    text = "2.65 times fewer epochs\n(q0: n=5)"
    mark_ratio(axis, ensemble, pool("equal_q0_64"), text, 0.03)
    axis.set_title("1.4M parameters, 150k tokens (means)")
    axis.set(xlim=(0, 185), ylim=(3.63, 3.93))
    axis.set_ylabel("validation loss (nats per token)")


def draw_large(axis):
    """12.6M parameters on the H100: a line a run."""
    for population in ("ensemble", "q0"):
        rows = [pool(f"h100_{population}_{seed}")[0] for seed in SEEDS]
        draw_rows(axis, rows, population)
    draw_rows(axis, pool("h100_chain_201"), "chain")
    ensemble, = pool("h100_ensemble_202")
    mark_ratio(axis, ensemble, pool("h100_q0_202"), "3.3 times fewer epochs", 0.02)
    axis.set_title("12.6M parameters, 1.34M tokens (a line a run)")
    axis.set(xlim=(0, 270), ylim=(2.58, 2.77))


def loss_figure():
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    small, large = figure.subplots(1, 2)
    draw_small(small)
    draw_large(large)
    for axis in (small, large):
        axis.set_xlabel("epochs, all members together")
        axis.grid(alpha=0.3)
    save(figure, "loss.png")


# ratio.png ----------------------------------------------------------------------------------
def ratios(ensembles, rows, epochs):
    """Per curve of q0: `epochs` over the epochs q0 needs for the ensembles' mean loss there."""
    losses = [at[2] for curve in ensembles for at in curve if at[0] == epochs]
    return epochs / reached(rows, np.mean(losses), 0)


def draw_small_ratios(axis):
    matched = {32: "equal_q0_32", 64: "equal_q0_64", 128: "equal_q0_64"}
    means = []
    spreads = []
    numbers = []
    for epochs, name in matched.items():
        ensembles = pool(f"equal_ensemble_{epochs}")
        found = ratios(ensembles, pool(name), epochs)
        means.append(found.mean())
        spreads.append(found.std(ddof=1))
        numbers.append(str(len(found)))
        print(f"1.4M, {epochs} epochs: {means[-1]:.2f} ± {spreads[-1]:.2f}")
    axis.errorbar(
        list(matched), means, spreads, fmt="s:", color=COLORS["q0"], capsize=3,
        label=f"1.4M parameters, q0 (mean and deviation, n={', '.join(numbers)})")


def extended(curve):
    """Loss of the ensemble with EXTENDED epochs: a + c / members, fitted from 8 members on."""
    members = 1 + np.arange(len(curve))
    c, a = np.polyfit(1 / members[7:], curve[7:, 2], 1)
    each = curve[0, 0]
    print(f"12.6M, ensemble: {a:.4f} + {c:.3f} / members")
    return a + c * each / EXTENDED


def draw_large_ratios(axis):
    """A line a run, against the mean of the ensembles that got so far."""
    ensembles = [pool(f"h100_ensemble_{seed}")[0] for seed in SEEDS]
    longest = max(ensembles, key=len)
    epochs = longest[1:, 0].astype(int)
    beyond = extended(longest)
    for run, style in LARGE.items():
        population, seed = run.split("_")
        rows = pool(f"h100_{run}")
        found = [ratios(ensembles, rows, e)[0] for e in epochs]
        last = EXTENDED / reached(rows, beyond, 0)[0]
        color = COLORS[population]
        axis.plot(
            epochs, found, style, color=color, markersize=3,
            label=f"12.6M parameters, {population}, seed {seed}")
        axis.plot(EXTENDED, last, "o", color=color, markersize=6, fillstyle="none")
        for at, ratio in zip((*epochs, EXTENDED), (*found, last)):
            if at in (32, 64, 128, 208, EXTENDED):
                print(f"12.6M, {population}, seed {seed}, {at} epochs: {ratio:.2f}")


def ratio_figure():
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    draw_large_ratios(axis)
    label = "the same, the ensemble's curve extended"
    axis.plot([], [], "o", color="0.4", fillstyle="none", label=label)
    draw_small_ratios(axis)
    for members, marker in zip(PUBLISHED, "D^"):
        axis.plot(
            EXTENDED, PUBLISHED[members], marker, color=COLORS["q0"], linestyle="none",
            label=f"1.87B parameters, q0, the paper: {members}")
    axis.axhline(1, color="0.6", linewidth=0.8)
    axis.set_xscale("log", base=2)
    ticks = [16, 32, 64, 128, 256]
    axis.set_xticks(ticks, labels=map(str, ticks))
    axis.set_xlabel("epochs of the independent ensemble")
    axis.set_ylabel("times fewer epochs for the same loss")
    axis.set(xlim=(14, 300), ylim=(0.8, 5.5))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", fontsize=8)
    save(figure, "ratio.png")


# method.png ---------------------------------------------------------------------------------
LR = "tab:red"
MEMBER = "tab:blue"
TEACHER = "tab:green"
CYCLES = 4


def draw_arrow(axis, start, end, color, bend=0.0):
    shape = dict(arrowstyle="-|>", connectionstyle=f"arc3,rad={bend}")
    size = dict(mutation_scale=11, shrinkA=7, shrinkB=7)
    axis.add_patch(FancyArrowPatch(start, end, color=color, **shape, **size))


def draw_line(axis, start, end, color="0.4", **style):
    xs, ys = zip(start, end)
    axis.plot(xs, ys, color=color, zorder=0, **style)


def draw_cycles(axis, base, trajectory):
    """The sawtooth of lr above the members of one trajectory, and who teaches whom."""
    member = base + 0.5
    floor = base + 1.1
    low = floor + 0.06
    top = floor + 0.75
    for c in range(CYCLES):
        end = c + 1
        number = trajectory * CYCLES + c
        draw_line(axis, (c, top), (end, low), LR)
        draw_line(axis, (end, floor), (end, base), "0.6", linewidth=1)
        axis.plot(end, member, "o", color=MEMBER, markersize=15)
        axis.text(
            end, member, str(number), color="white", fontweight="bold", fontsize=9,
            ha="center", va="center")
    for c in range(1, CYCLES):
        draw_line(axis, (c, low), (c, top), linestyle=":")
    for c in range(2, CYCLES):
        draw_arrow(axis, (c, member), (c + 0.5, floor + 0.4), TEACHER, bend=0.25)
    draw_line(axis, (0, floor), (CYCLES, floor), "0.6", linewidth=0.8)
    draw_line(axis, (1, base), (CYCLES + 0.6, base), "0.6", linewidth=1)
    axis.text(-0.1, floor + 0.3, f"trajectory {trajectory}", ha="right", va="center")


def draw_prior(axis, x, y):
    box = dict(boxstyle="round,pad=0.6", facecolor="0.95", edgecolor="0.4")
    text = (
        "learned prior\n\n"
        "p = w₀p₀ + w₁p₁ + ... + w₇p₇\n\n"
        "w ≥ 0, sum 1, of least loss\n"
        "on held-out text")
    axis.text(x, y, text, va="center", bbox=box)


def method_figure():
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    high = 2.5
    draw_cycles(axis, high, 0)
    draw_cycles(axis, 0, 1)
    axis.text(0.3, high + 1.75, "lr falls", color=LR)
    restart = "a cycle ends: noise on the weights, lr jumps back"
    axis.text(1.05, high + 1.95, restart, color="0.35")
    axis.text(1.47, high + 0.75, "teaches\nthe next", color=TEACHER, va="center")
    axis.text(0.2, high + 0.5, "member:\na snapshot", color=MEMBER, va="center")
    turn = CYCLES + 0.6
    middle = high / 2
    draw_line(axis, (turn, 0), (turn, high), "0.6", linewidth=1)
    draw_arrow(axis, (turn - 0.06, middle), (turn + 0.6, middle), "0.4")
    draw_prior(axis, turn + 0.75, middle)
    axis.set(xlim=(-0.9, 7.5), ylim=(-0.15, high + 2.2))
    axis.axis("off")
    save(figure, "method.png")


def main():
    loss_figure()
    equal_figures()
    ratio_figure()
    method_figure()


if __name__ == "__main__":
    main()
