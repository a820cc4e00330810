"""Commands that use finished runs, under attack: odd terminals and numbers, hostile folders, lost
weights, two commands at once. A mistake ends in one line, and destroys nothing."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import edit_json, fails, predictions_of, read_json, user, works

import train_q0 as q
from records import mixture
from records.mixture import load_mixture


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


# Terminals and numbers --------------------------------------------------------------------------

def test_a_terminal_without_utf8(repo, run):
    """What its encoding lacks is shown as ?."""
    done = user(repo, "python", "train_q0.py", "sample", "first", "--prompt", "río 夜", "--tokens",
                "30", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("r?o ?")


@pytest.mark.parametrize("argv", [
    ["sample", "first", "--tokens", "50"],
    ["select", "first"]])
def test_a_reader_that_is_gone(argv, repo, run):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "train_q0.py", *argv]
    done = subprocess.run(command, cwd=repo, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("option, values", [
    ("--temperature", ["-1", "nan", "inf", "x"]),
    ("--top-p", ["-0.1", "2", "nan"]),
    ("--seed", ["-1", "1e3", str(2 ** 64)]),
    ("--tokens", ["0", "-5"])])
def test_numbers_that_make_no_sense(option, values, finished, capsys):
    for value in values:
        fails(capsys, f"argument {option}: .*{value}", "sample", finished, option, value)


def test_more_tokens_than_members_see(finished):
    with pytest.raises(q.UserError, match="65 tokens are more than the 64 that members of"):
        load_mixture(finished).log_probs(torch.zeros(1, 65, dtype=torch.long))
