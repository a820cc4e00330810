"""Which population to train for E epochs and K models at inference.

    python records/recipes.py        writes RECIPES.md from recipes.json

recipes.json holds what was measured: {population: {epochs: {members: [loss, seeds]}}}, validation
loss in nats per token of preset `tiny` under the learned prior, of the best members. Its sources
are named in RECIPES.md. Between measured budgets losses are interpolated, and said to be.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # run as a file, Python looks for modules in records/ alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_q0 as q

HERE = Path(__file__).resolve().parent
PAGE = HERE / "RECIPES.md"
START = "<!-- table: made by records/recipes.py -->\n"
NOISE = 0.004  # losses that differ by less are equal (the rule for ten seeds); then q0 is named
BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MEMBERS = (1, 2, 4, 8, None)  # None: all


def measured():
    """{population: {epochs: {members: [loss, seeds]}}}"""
    found = q.load_json(HERE / "recipes.json")
    return {population: {int(epochs): {int(k): entry for k, entry in row.items()}
                         for epochs, row in rows.items()}
            for population, rows in found.items()}


@dataclass(frozen=True)
class Loss:
    """What a population is worth in nats per token, and why one may say so."""
    value: float
    source: str  # measured, interpolated, or beyond what was measured


def loss_of_few(row, k):
    """(loss, whether it was measured) of the best k of a row {members: [loss, seeds]}; None where
    the row does not say."""
    k = min(k or max(row), max(row))
    if k in row:
        return row[k][0], True
    if k < min(row):
        return None
    known = sorted(row)
    losses = [row[n][0] for n in known]
    return float(np.interp(np.log2(k), np.log2(known), losses)), False


def loss_of(rows, epochs, k):
    """Loss of a population {epochs: row} for a budget and the best k members (None: all), linear
    in the logarithm of both; None below the smallest budget that was run."""
    found = {e: loss_of_few(row, k) for e, row in sorted(rows.items())}
    found = {e: loss for e, loss in found.items() if loss}
    if not found or epochs < min(found):
        return None
    if epochs > max(found):
        return Loss(found[max(found)][0], f"as at {max(found)} epochs, the most that was measured")
    if epochs in found and found[epochs][1]:
        return Loss(found[epochs][0], "measured")
    losses = [loss for loss, _ in found.values()]
    return Loss(float(np.interp(np.log2(epochs), np.log2(list(found)), losses)), "interpolated")


def recommend(epochs, k=None):
    """(population, its Loss, q0's Loss) of the best population for a budget and k models at
    inference; of equal ones q0, the default, which was measured from 1 epoch on."""
    losses = {name: loss_of(rows, epochs, k) for name, rows in measured().items()}
    losses = {name: loss for name, loss in losses.items() if loss}
    best = min(losses, key=lambda name: losses[name].value)
    if losses["q0"].value <= losses[best].value + NOISE:
        best = "q0"
    return best, losses[best], losses["q0"]


def commands(population, epochs, k=None):
    """Lines that train a population and fit the prior of its best k members (None: all)."""
    train = f"python train_q0.py --epochs {epochs}"
    run = population.replace("+", "_")
    lines = [f"{train} --population {population} --run {run}"]
    if population == "chain+q0":
        half = f"python train_q0.py --epochs {epochs // 2}"
        long = f"--trajectories {max(1, epochs // 64)} --split-tokens 0"  # as measured
        lines = [f"{half} --population chain --run A", f"{half} {long} --seed 1 --run B",
                 f"python train_q0.py pool A B --name {run}"]
    if k:
        lines.append(f"python train_q0.py select {run} --k {k}")
    return lines


def advice(cfg, k):
    """Lines of `plan` on the population for the epochs of `cfg` and k models at inference."""
    population, best, of_q0 = recommend(cfg.epochs, k)
    loss = f"{best.value:.4f} ({best.source})"
    if population != "q0":
        loss += f", q0 {of_q0.value:.4f} ({of_q0.source}): {best.value - of_q0.value:+.4f}"
    yield f"for {cfg.epochs} epochs and the best {k} members: {population}, loss {loss}"
    if cfg.preset != "tiny":
        yield ("  with preset tiny, that is; of 12.6M parameters chains led up to 64 epochs and q0 "
               "from 96 on")
    for line in commands(population, cfg.epochs, k):
        yield f"  {line}"


def cell(epochs, k):
    """A cell of the page: population, loss, and how far q0 is behind; * where not measured."""
    population, best, of_q0 = recommend(epochs, k)
    mark = "" if best.source == "measured" else "*"
    behind = "" if population == "q0" else f", q0 {of_q0.value - best.value:+.3f}"
    return f"{population} {best.value:.3f}{mark}{behind}"


def table():
    """Markdown rows, a budget each."""
    names = ["all" if k is None else f"K = {k}" for k in MEMBERS]
    lines = [f"| epochs | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for epochs in BUDGETS:
        cells = " | ".join(cell(epochs, k) for k in MEMBERS)
        lines.append(f"| {epochs} | {cells} |")
    return "\n".join(lines) + "\n"


def page(text):
    """The text of RECIPES.md with the table of today's recipes.json."""
    return text[:text.index(START) + len(START)] + table()


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
