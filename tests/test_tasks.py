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
    MINI, edit_json, fails, flip, learnable_documents, make_data, random_documents, read_documents,
    run_in, snapshot, with_file, works)

from records.mixture import load_mixture, load_tokenizer

SWAP = "q0_swap"
CONTINUATION = "q0_continuation"
CLOZE = "q0_cloze"
NAMES = [SWAP, CONTINUATION, CLOZE]
LENGTHS = {SWAP: 64, CONTINUATION: 128, CLOZE: 80}  # tokens of an item
CHOICES = {SWAP: 2, CONTINUATION: 4, CLOZE: 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data folders: words that can be learned; words of letters that are several tokens."""
    rare = [text.replace("old", chr(0x4E00 + i))
            for i, text in enumerate(random_documents(600, words=150))]
    folder = tmp_path_factory.mktemp("data")
    make_data(folder / "learnable", learnable_documents(1400), val=120_000)
    make_data(folder / "utf8", rare, val=120_000)
    return folder


def encoding_of(folder):
    return load_tokenizer(folder)["encoding"]


def make(capsys, *argv):
    """(exit status, what data/tasks.py prints)."""
    status = tasks.main([str(a) for a in argv])
    out, error = capsys.readouterr()
    assert (error == "") == (status == 0), error
    return status, out + error


def items_of(folder, name):
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# Items ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["learnable", "utf8"])
def made(request, data, tmp_path_factory):
    """(data folder, folder of tasks)"""
    source = data / request.param
    folder = tmp_path_factory.mktemp("made") / "t"
    argv = ["--data", source, "--out", folder, "--items", 60]
    assert tasks.main([str(a) for a in argv]) == 0
    return source, folder


@pytest.mark.parametrize("name", NAMES)
def test_every_item(name, made):
    """One choice is of the text and the others are not; tokens are the same together or apart;
    labels are even, and passages come from many documents."""
    source, folder = made
    encoding = encoding_of(source)
    encode = encoding.encode_ordinary
    documents = read_documents(source, "val", encoding)
    items = items_of(folder, name)
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


def test_swapped_words(made):
    """The false choice is the true one but for two words, never the first, in turn."""
    _, folder = made
    for item in items_of(folder, SWAP):
        old = item["choices"][item["label"]].split(" ")
        new = item["choices"][1 - item["label"]].split(" ")
        first, second = [i for i, word in enumerate(old) if word != new[i]]
        assert 0 < first == second - 1
        assert (old[first], old[second]) == (new[second], new[first])


def test_cloze(made):
    """Words of training text, of like frequency, before one and the same rest."""
    source, folder = made
    training = " ".join(read_documents(source, "train", encoding_of(source))).split(" ")
    count = Counter(word for word in training if len(word) >= 4 and word.islower())
    for item in items_of(folder, CLOZE):
        words, rests = zip(*(choice[1:].split(" ", 1) for choice in item["choices"]))
        assert len(set(rests)) == 1
        for word in words:
            low, high = sorted((count[word], count[words[item["label"]]]))
            assert 0 < low and sum(low < n < high for n in count.values()) < 20


def test_items_asked_for(data, tmp_path, capsys):
    """The same again in place; others of another seed; fewer where the documents give no more;
    nothing where a file is not ours."""
    out = tmp_path / "t"
    argv = ["--data", data / "utf8", "--out", out, "--items", 400]
    _, told = make(capsys, *argv)
    first = snapshot(out)
    number = len(items_of(out, CONTINUATION))
    assert f"{CONTINUATION}: {number} items of 400, the documents give no more" in told
    make(capsys, *argv)
    assert snapshot(out) == first and len(first) == 6
    make(capsys, *argv, "--seed", 1)
    assert snapshot(out) != first
    (out / "mine.txt").write_text("mine")
    status, told = make(capsys, *argv)
    assert status == 2 and "exists and was not" in told


@pytest.mark.parametrize("damage, message", [
    (shutil.rmtree, "No such file.*manifest.json"),
    # as prepare.py leaves GPT-2's tokens where the tokenizer could not be loaded
    (with_file("manifest.json", functools.partial(edit_json, tokenizer={"eot": 50256})),
     "has no tokenizer|not ours"),
    (with_file("val.bin", flip), "val.bin is damaged.*SHA-256")])
def test_bad_data(damage, message, data, tmp_path, capsys):
    folder = shutil.copytree(data / "learnable", tmp_path / "d")
    damage(folder)
    status, told = make(capsys, "--data", folder, "--out", tmp_path / "t")
    assert status == 2 and re.search(f"^tasks.py: error: .*({message})", told, re.M)
    assert set(tmp_path.iterdir()) <= {folder}


# The harness ------------------------------------------------------------------------------------

T = 40  # of the run below; shorter than the items, so their front is cut
TWO = [*MINI, "--seq-len", T, "--batch-tokens", 640, "--train-tokens", 2000, "--epochs", 24,
       "--cycles", 2, "--lr-matrix", 0.04, "--distill-weight", 0, "--log-every", 1000]


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The folder of a run of two members."""
    logs = tmp_path_factory.mktemp("runs")
    run_in(logs, *TWO, "--data", data / "learnable", "--run", "two")
    return logs / "two"


@pytest.fixture(scope="module")
def mixture(two):
    """Of both; uniform weights would give other numbers."""
    return replace(load_mixture(two), members=[0, 1], weights=[0.3, 0.7])


@pytest.fixture
def model(mixture, harness):
    if not harness:
        pytest.skip("lm_eval is not installed")
    from records.harness import HarnessModel
    return HarnessModel(mixture)


@functools.cache
def alone(mixture, i):
    return replace(mixture, members=[i], weights=[1.0])


def nats(mixture, context, continuation, weights=None):
    """(log p of the continuation, whether it is the likeliest), of tokens, in float64: each member
    alone on one text, mixed here, by {member: weight}."""
    weights = weights or dict(zip(mixture.members, mixture.weights))
    ids = [*context, *continuation][-T - 1:]
    p = 0
    for i, weight in weights.items():
        found = alone(mixture, i).log_probs(torch.tensor([ids[:-1]]))[0]
        p = p + weight * found.double().exp()
    targets = torch.tensor(continuation[-T:])
    found = p.log()[-len(targets):]
    score = found.gather(1, targets[:, None]).sum()
    return float(score), torch.equal(found.argmax(1), targets)


def ask(model, kind, *arguments):
    from lm_eval.api.instance import Instance
    requests = [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]
    return getattr(model, kind)(requests)


@pytest.fixture(scope="module")
def texts(data):
    folder = data / "learnable"
    return read_documents(folder, "val", encoding_of(folder))


def scored(mixture, item, weights):
    """(whether the likeliest choice is right, and the likeliest by character)"""
    encode = mixture.encoding.encode_ordinary
    context = mixture.encode(item["context"])
    scores = []
    for choice in item["choices"]:
        score, _ = nats(mixture, context, encode(choice), weights)
        scores.append(score)
    by_character = [s / len(c) for s, c in zip(scores, item["choices"])]
    label = item["label"]
    return np.argmax(scores) == label, np.argmax(by_character) == label


def test_evaluate_tasks(data, two, harness, tmp_path, capsys, monkeypatch):
    """From another folder than that of the items; every line again from the members."""
    if not harness:
        pytest.skip("lm_eval is not installed")
    make(capsys, "--data", data / "learnable", "--out", tmp_path / "t", "--items", 12)
    monkeypatch.chdir(tmp_path)
    argv = ["evaluate", two, "--task-folder", "t", "--tasks"]
    out = works(capsys, *argv, ",".join(NAMES))
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
        for task in NAMES:
            items = items_of(tmp_path / "t", task)
            hits = np.array([scored(learned, item, of) for item in items], dtype=float)
            metrics = ["acc", "acc_norm"] if task == CONTINUATION else ["acc"]
            for metric, hit in zip(metrics, hits.T):
                expected = (hit.mean(), hit.std(ddof=1) / 12 ** 0.5)
                assert shown[name, task, metric] == approx(expected, abs=5.1e-5)
    fails(capsys, "q0_swop", *argv, "q0_swap,q0_swop")
    monkeypatch.setitem(sys.modules, "records.harness", None)
    fails(capsys, "pip install lm_eval", *argv, "hellaswag")


def test_loglikelihood(mixture, model, texts):
    """More requests than a batch holds, of many lengths in any order."""
    rng = np.random.default_rng(0)
    requests = [("", texts[0][:20])]
    for text in texts[:24]:
        words = text.split(" ")
        begin, length = rng.integers(1, [40, 20])
        continuation = "".join(" " + word for word in words[begin:begin + length])
        requests.append((" ".join(words[:begin]), continuation))
    lengths = []
    for request, found in zip(requests, ask(model, "loglikelihood", *requests), strict=True):
        whole = mixture.encode("".join(request))
        front = mixture.encode(request[0])
        assert whole[:len(front)] == front
        score, greedy = nats(mixture, front, whole[len(front):])
        assert found == (approx(score, abs=1e-4), greedy)
        lengths.append(len(whole))
    assert max(lengths) > T + 1


def test_loglikelihood_rolling(mixture, model, texts):
    """Each token once, in windows of T; the last one reaches back, so that its tokens see as much
    as T allows."""
    long = " ".join(texts[:3])
    asked = ["", long[:20], long]
    found = ask(model, "loglikelihood_rolling", *((text,) for text in asked))
    for text, total in zip(asked, found, strict=True):
        ids = mixture.encode(text)
        expected = 0.0
        for start in range(1, len(ids), T):
            end = min(start + T, len(ids))
            context = ids[max(0, end - T - 1):start]
            score, _ = nats(mixture, context, ids[start:end])
            expected += score
        assert total == approx(expected, abs=1e-3)


def test_text(mixture, model, texts):
    """Greedy, after more than fits; stops, also where they span tokens; samples, the same in every
    call."""
    prompt = " ".join(texts[1].split(" ")[:45])

    def write(**options):
        found, = ask(model, "generate_until", (prompt, {"max_gen_toks": 24, **options}))
        return found

    whole = write(until=["", None])  # no stop string is empty
    assert whole == "".join(mixture.generate(prompt, 24, temperature=0))
    assert write(until=[whole[6:12], whole[5:12], "none of it"]) == whole[:5]
    assert whole.startswith(write(until=[], max_gen_toks=4))
    hot = dict(until=[], do_sample=True, temperature=2.0)
    assert write(**hot) == write(**hot) != whole
    assert write(**{**hot, "temperature": 0.0}) == write(**hot, top_p=1e-9) == whole
