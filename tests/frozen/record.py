"""Recorded runs.npz, the frozen reference of test_frozen.py, from commit ef3b0f5.

It speaks to train_q0.py of that commit, in which every layer was a module, and is kept to show
where the numbers come from. To record again, with the default corpus in data/wiki:

    git worktree add ../before ef3b0f5
    cp -r tests/frozen ../before/tests && cp -r data/wiki ../before/data
    cd ../before && OMP_NUM_THREADS=1 python tests/frozen/record.py small short tiny

Recorded on one thread of an AMD EPYC with AVX2 and without bfloat16 instructions, with torch 2.13.0
and numpy 2.4.6. The parts that are asked for are replaced, the others stay.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train_q0 as q0
from frozen import case


def run(flags, logs):
    """Train as the command line does. Returns the folder of the run, under the folder `logs`."""
    q0.LOGS = logs
    q0.draw_curve = lambda *args: None
    assert q0.main(flags) == 0
    return logs / flags[flags.index("--run") + 1]


def record_runs(kind):
    """{name: array} for runs.npz, of the runs whose names begin with `kind`."""
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = case.write_text(folder / "text")
        for name in case.RUN_FLAGS:
            if name.startswith(kind):
                data = ROOT / "data/wiki" if case.on_default_corpus(name) else text
                flags = case.flags_of(name, data)
                found = case.outcome(run(flags, folder / "logs"))
                for part, values in found.items():
                    kept[f"{name}/{part}"] = values
    return kept


def main(kinds):
    torch.set_num_threads(1)
    kept = {}
    if case.RUNS.exists():
        with np.load(case.RUNS) as before:
            kept = dict(before)
    for kind in kinds:
        kept |= record_runs(kind)
    np.savez_compressed(case.RUNS, **kept)


if __name__ == "__main__":
    main(sys.argv[1:])
