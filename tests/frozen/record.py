"""Recorded runs.npz, the frozen reference of test_frozen.py, from commit ef3b0f5.

It speaks to train_q0.py of that commit, in which every layer was a module, and is kept to show
where the numbers come from. To record again:

    git worktree add ../before ef3b0f5
    cp -r tests/frozen ../before/tests
    cd ../before && OMP_NUM_THREADS=1 python tests/frozen/record.py

Recorded on one thread of an AMD EPYC with AVX2 and without bfloat16 instructions, with torch 2.13.0
and numpy 2.4.6.
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


def main():
    torch.set_num_threads(1)
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = case.write_text(folder / "text")
        for name in case.RUN_FLAGS:
            found = case.outcome(run(case.flags_of(name, data), folder / "logs"))
            for part, values in found.items():
                kept[f"{name}/{part}"] = values
    np.savez_compressed(case.RUNS, **kept)


if __name__ == "__main__":
    main()
