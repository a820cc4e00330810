"""data/tasks.py, and a mixture inside EleutherAI's real lm-evaluation-harness. No network.

What the harness gets is compared with sums over p(token) of single members, mixed here, one text at
a time.
"""
import functools
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tasks
import torch
from pytest import approx
from tiny import (
    MINI, fails, flip, learnable_documents, make_data, read_documents, run_in, works)

from records.mixture import load_mixture, load_tokenizer

CONTINUATION = "q0_continuation"
LENGTHS = {"q0_swap": 64, CONTINUATION: 128, "q0_cloze": 80}  # tokens of an item
CHOICES = {"q0_swap": 2, CONTINUATION: 4, "q0_cloze": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder: words that can be learned; in each document a letter of several tokens."""
    texts = [text.replace(" ", f" {chr(0x4E00 + i)} ", 1)
             for i, text in enumerate(learnable_documents(1400, words=80))]
    return make_data(tmp_path_factory.mktemp("data") / "d", texts, val=120_000)


def make(capsys, *argv):
    """(exit status, what data/tasks.py prints)."""
    status = tasks.main([str(a) for a in argv])
    out, error = capsys.readouterr()
    assert (error == "") == (status == 0), error
    return status, out + error


def items_of(folder, name):
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_every_item(data, tmp_path, capsys):
    """One choice is of the text and the others are not; tokens are the same together or apart;
    labels are even, and passages come from many documents."""
    encoding = load_tokenizer(data)["encoding"]
    encode = encoding.encode_ordinary
    documents = read_documents(data, "val", encoding)
    make(capsys, "--data", data, "--out", tmp_path / "t", "--items", 60)
    for name in CHOICES:
        items = items_of(tmp_path / "t", name)
        assert 20 <= len(items) <= 60
        labels = Counter(item["label"] for item in items)
        assert len(labels) == CHOICES[name]
        assert max(labels.values()) - min(labels.values()) <= 1
        assert len({item["document"] for item in items}) > len(items) / 2
        for item in items:
            context, choices = item["context"], item["choices"]
            text = documents[item["document"]]
            assert len(choices) == len(set(choices)) == CHOICES[name]
            there = [i for i, choice in enumerate(choices) if context + choice in text]
            assert there == [item["label"]]
            true = context + choices[item["label"]]
            assert len(encode(true)) == LENGTHS[name] and "\ufffd" not in true
            for choice in choices:
                assert encode(context) + encode(choice) == encode(context + choice)


def test_items_asked_for(data, tmp_path, capsys):
    """Fewer where the documents give no more; none of damaged data or beside foreign files."""
    out = tmp_path / "t"
    argv = ["--data", data, "--out", out, "--items", 400]
    _, told = make(capsys, *argv)
    number = len(items_of(out, CONTINUATION))
    assert f"{CONTINUATION}: {number} items of 400, the documents give no more" in told
    folder = shutil.copytree(data, tmp_path / "d")
    flip(folder / "val.bin")
    status, told = make(capsys, *argv, "--data", folder)
    assert status == 2 and "val.bin is damaged" in told
    (out / "mine.txt").write_text("mine")
    status, told = make(capsys, *argv)
    assert status == 2 and "exists and was not" in told


T = 40  # of the run below; shorter than the items, so their front is cut
TWO = [*MINI, "--seq-len", T, "--batch-tokens", 640, "--train-tokens", 2000, "--epochs", 24,
       "--cycles", 2, "--lr-matrix", 0.04, "--distill-weight", 0, "--log-every", 1000]


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The folder of a run of two members."""
    logs = tmp_path_factory.mktemp("runs")
    run_in(logs, *TWO, "--data", data, "--run", "two")
    return logs / "two"


@functools.cache
def alone(mixture, i):
    return replace(mixture, members=[i], weights=[1.0])


def nats(mixture, context, continuation, weights):
    """log p of the tokens of a continuation in float64: each member alone on one text, mixed here,
    by {member: weight}."""
    ids = [*context, *continuation][-T - 1:]
    p = 0
    for i, weight in weights.items():
        found = alone(mixture, i).log_probs(torch.tensor([ids[:-1]]))[0]
        p = p + weight * found.double().exp()
    targets = torch.tensor(continuation[-T:])
    found = p.log()[-len(targets):]
    return float(found.gather(1, targets[:, None]).sum())


def scored(mixture, item, weights):
    """(whether the likeliest choice is right, and the likeliest by character)"""
    encode = mixture.encoding.encode_ordinary
    context = mixture.encode(item["context"])
    scores = [nats(mixture, context, encode(choice), weights) for choice in item["choices"]]
    by_character = [s / len(c) for s, c in zip(scores, item["choices"])]
    label = item["label"]
    return np.argmax(scores) == label, np.argmax(by_character) == label


def test_evaluate_tasks(data, two, harness, tmp_path, capsys, monkeypatch):
    """From another folder than that of the items; every line again from the members. Greedy text
    up to a stop, of which the empty ones are none."""
    if not harness:
        pytest.skip("lm_eval is not installed")
    from lm_eval.api.instance import Instance
    from records.harness import HarnessModel
    make(capsys, "--data", data, "--out", tmp_path / "t", "--items", 12)
    monkeypatch.chdir(tmp_path)
    argv = ["evaluate", two, "--task-folder", "t", "--tasks"]
    out = works(capsys, *argv, ",".join(CHOICES))
    pattern = r"^task:(\S+) (\S+):([\d.]+) stderr:([\d.]+) (.*)$"
    shown = {}
    for task, metric, value, error, name in re.findall(pattern, out, re.M):
        shown[name, task, metric] = float(value), float(error)
    learned = load_mixture(two)
    weights = dict(zip(learned.members, learned.weights))
    best = min((0, 1), key=lambda i: -np.log(learned.heldout[i]).mean())
    mixtures = {
        f"best on held-out: member {best}": {best: 1.0},
        "uniform, all 2": {0: 0.5, 1: 0.5},
        f"learned, {len(weights)}": weights}
    for name, of in mixtures.items():
        for task in CHOICES:
            items = items_of(tmp_path / "t", task)
            hits = np.array([scored(learned, item, of) for item in items], dtype=float)
            metrics = ["acc", "acc_norm"] if task == CONTINUATION else ["acc"]
            for metric, hit in zip(metrics, hits.T):
                expected = (hit.mean(), hit.std(ddof=1) / 12 ** 0.5)
                assert shown[name, task, metric] == approx(expected, abs=5.1e-5)
    whole = "".join(learned.generate("bale", 24, temperature=0))
    options = {"until": ["", None, whole[6:12], whole[5:12]], "max_gen_toks": 24}
    request = Instance("generate_until", {}, ("bale", options), 0)
    assert HarnessModel(learned).generate_until([request]) == [whole[:5]]
    fails(capsys, "q0_swop", *argv, "q0_swap,q0_swop")
    monkeypatch.setitem(sys.modules, "records.harness", None)
    fails(capsys, "pip install lm_eval", *argv, "hellaswag")
