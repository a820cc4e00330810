"""data/tasks.py, and the population inside EleutherAI's real lm-evaluation-harness. CPU only, no network.

What the harness gets is compared with sums over p(token) of single members, mixed here, one text at a time.
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
import torch

import train_q0 as q0
import use
from test_data import prepare, random_documents, read_documents, shard_bytes, snapshot
from test_run import MINI, corpus, fails, one_thread  # noqa: F401 (fixtures)

import tasks  # noqa: E402 (test_data puts its folder on the path)

NAMES = ["q0_swap", "q0_continuation", "q0_cloze"]
SIZES = ["--tokenizer", "train", "--vocab", "300", "--val-bytes", "120000"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Before the first import of the harness, which reads these once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        import lm_eval.tasks
        # the harness's own 14,000 task files take 5 s to index, at each call
        manager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
        patch.setattr(lm_eval.tasks, "TaskManager", manager)
        yield


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):  # noqa: F811
    """Data folders: the made-up words of test_run with more validation text; words of several bytes a letter."""
    folder = tmp_path_factory.mktemp("data")
    text = "".join(json.dumps({"text": t}) + "\n" for t in random_documents(600, words=150))
    (folder / "utf8.jsonl").write_text(text, encoding="utf-8")
    for name, file in dict(learnable=corpus.parent / "made-up.jsonl", utf8=folder / "utf8.jsonl").items():
        assert prepare.main(["text", "--input", str(file), "--out", str(folder / name), *SIZES]) == 0
    return folder


def encoding_of(folder):
    return prepare.load_bpe((folder / "tokenizer.tiktoken").read_bytes())


def make(capsys, *argv):
    assert tasks.main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def bad(capsys, message, *argv):
    assert tasks.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tasks.py: error: ") and error.count("\n") == 1 and re.search(message, error), error


def items_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# Items

@pytest.mark.parametrize("name", ["learnable", "utf8"])
def test_items(name, data, tmp_path, capsys):
    told = make(capsys, "--data", data / name, "--out", tmp_path / "t", "--items", "60")
    encoding = encoding_of(data / name)
    encode = encoding.encode_ordinary
    documents = read_documents(data / name, "val", encoding)
    train = Counter(word for text in read_documents(data / name, "train", encoding) for word in text.split(" "))
    if name == "utf8":
        assert any(len(text.encode()) > len(text) + 20 for text in documents)
    for task, options, length in zip(NAMES, (2, 4, 5), (64, 128, 80)):
        items = items_of(tmp_path / "t", task)
        assert f"{task}: {len(items)} items" in told and 20 <= len(items) <= 60
        labels = Counter(item["label"] for item in items)
        assert len(labels) == options and max(labels.values()) - min(labels.values()) <= 1
        for item in items:
            context, choices, text = item["context"], item["choices"], documents[item["document"]]
            true = choices[item["label"]]
            false = [choice for choice in choices if choice != true]
            assert len(choices) == len(set(choices)) == options == len(false) + 1
            assert context + true in text and "\ufffd" not in context + true
            assert not any(context + choice in text for choice in false)
            assert len(encode(context + true)) == length
            for choice in choices:  # the harness may tokenize both together or apart
                assert encode(context) + encode(choice) == encode(context + choice)
            if task == "q0_swap":
                old, new = true.split(" "), false[0].split(" ")
                changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
                assert context == "" and changed == [changed[0], changed[0] + 1] and changed[0] > 0
                assert [new[i] for i in changed] == [old[i] for i in changed[::-1]]
                assert len(encode(false[0])) == length
            elif task == "q0_continuation":
                assert {len(encode(choice)) for choice in choices} == {32}
                assert all(any(choice in other for other in documents) for choice in false)
            else:
                words, rests = zip(*(choice[1:].split(" ", 1) for choice in choices))
                assert len(set(rests)) == 1 and 12 <= len(encode(" " + rests[0])) <= 20
                assert context[-1].isalpha() and all(w.isalpha() and w.islower() and len(w) >= 4 for w in words)
                word, others = words[item["label"]], set(words) - {words[item["label"]]}
                for other in others:  # how many words are more frequent than the one and less than the other
                    low, high = sorted((train[word], train[other]))
                    assert low > 0 and sum(low < n < high for w, n in train.items() if len(w) >= 4 and w.islower()) < 20
        passages = [(item["document"], item["context"] + item["choices"][item["label"]]) for item in items]
        assert any(documents[document].startswith(passage) for document, passage in passages)
        assert len(set(passages)) == len(items) and len({document for document, _ in passages}) > len(items) / 2


def with_val(source, folder, documents):
    """A copy of a data folder with other validation documents, given as tokens."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "val.bin").write_bytes(shard_bytes([t for tokens in documents for t in (manifest["eot"], *tokens)]))
    manifest["splits"]["val"]["files"][0]["sha256"] = prepare.file_sha256(folder / "val.bin")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_documents_cut_anywhere(data, tmp_path, capsys):
    """As FineWeb's last one is: inside a word or a character, where its text would give other tokens."""
    encoding = encoding_of(data / "utf8")
    tokens = [encoding.encode_ordinary(text) for text in read_documents(data / "utf8", "val", encoding)]
    cut = [ids[:n] for ids in tokens for n in (64, 128, 80)]
    assert any(encoding.encode_ordinary(encoding.decode(ids)) != ids for ids in cut)
    make(capsys, "--data", with_val(data / "utf8", tmp_path / "d", cut), "--out", tmp_path / "t")
    for name, length in zip(NAMES, (64, 128, 80)):
        for item in items_of(tmp_path / "t", name):
            text = item["context"] + item["choices"][item["label"]]
            assert len(encoding.encode_ordinary(text)) == length and "\ufffd" not in text


def test_frequency_is_that_of_training_text(data, tmp_path, capsys):
    """A word of validation text alone is neither asked for nor offered. Each document stands there twice: even then no
    two choices are the same."""
    encoding = encoding_of(data / "learnable")
    documents = read_documents(data / "learnable", "val", encoding)
    word = max(Counter(" ".join(documents).split(" ")).items(), key=lambda pair: pair[1])[0]
    new = [encoding.encode_ordinary(text.replace(word, "unseen")) for text in documents * 2]
    folder = with_val(data / "learnable", tmp_path / "d", new)
    make(capsys, "--data", folder, "--out", tmp_path / "t")
    items = items_of(tmp_path / "t", "q0_cloze")
    asked = Counter(choice.split(" ")[1] for item in items for choice in item["choices"])
    assert "unseen" not in asked and asked[word] > 0 and any("unseen" in item["context"] for item in items)
    items = items_of(tmp_path / "t", "q0_continuation")
    assert len(items) > 20 and all(len(set(item["choices"])) == 4 for item in items)


def test_seeds(data, tmp_path, capsys):
    argv = ["--data", data / "learnable", "--items", 20]
    make(capsys, *argv, "--out", tmp_path / "a")
    first = snapshot(tmp_path / "a")
    make(capsys, *argv, "--out", tmp_path / "a")  # again, in place
    make(capsys, *argv, "--out", tmp_path / "b", "--seed", 1)
    assert snapshot(tmp_path / "a") == first and len(first) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    for name in NAMES:
        assert first.keys() == snapshot(tmp_path / "b").keys()
        assert items_of(tmp_path / "a", name) != items_of(tmp_path / "b", name)


def test_fewer_items_than_asked_for(data, tmp_path, capsys):
    told = make(capsys, "--data", data / "utf8", "--out", tmp_path / "t", "--items", 5000)
    for name in NAMES:
        number = len(items_of(tmp_path / "t", name))
        assert f"{name}: {number} items of 5000, the documents give no more" in told and 0 < number < 5000
    items = items_of(tmp_path / "t", "q0_continuation")
    assert len({item["document"] for item in items}) < len(items)  # several of a document, none against another of it
    documents = read_documents(data / "utf8", "val", encoding_of(data / "utf8"))
    assert all(sum(choice in documents[item["document"]] for choice in item["choices"]) == 1 for item in items)


def no_tokenizer(folder):
    """As prepare.py leaves GPT-2's tokens where the tokenizer could not be loaded."""
    (folder / "tokenizer.tiktoken").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": {"kind": "gpt2", "eot": 50256}}))


DAMAGE = {"no folder": (shutil.rmtree, "No such file.*manifest.json"),
          "no tokenizer": (no_tokenizer, "has no tokenizer"),
          "tokenizer": (lambda f: (f / "tokenizer.tiktoken").write_bytes(b"YQ== 0\n"), "tokenizer.tiktoken is damaged"),
          "shard": (lambda f: (f / "val.bin").write_bytes(b"\0" * 4000), "val.bin is damaged.*SHA-256"),
          "manifest": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged")}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_data(case, data, tmp_path, capsys):
    folder, (damage, message) = shutil.copytree(data / "learnable", tmp_path / "d"), DAMAGE[case]
    damage(folder)
    bad(capsys, message, "--data", folder, "--out", tmp_path / "t")
    assert not (tmp_path / "t").exists() and len(list(tmp_path.iterdir())) == folder.exists()


def test_too_small(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in random_documents(60, words=40)))
    assert prepare.main(["text", "--input", str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "d")]) == 0
    bad(capsys, "give 0 items of q0_continuation", "--data", tmp_path / "d", "--out", tmp_path / "t")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "x.jsonl"]


def test_foreign_folder_and_failed_write(data, tmp_path, capsys, monkeypatch):
    argv = ["--data", data / "learnable", "--out", tmp_path / "t", "--items", 9]
    make(capsys, *argv)
    before = snapshot(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(tasks, "Counter", full)  # when the first two tasks are written
    bad(capsys, "No space left", *argv, "--seed", 1)
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    (tmp_path / "t/mine.txt").write_text("mine")
    bad(capsys, "exists and was not written by this script", *argv)
    assert len(snapshot(tmp_path)) == 7
    bad(capsys, "exists and was not", "--data", data / "learnable", "--out", tmp_path / "t/mine.txt")
    for argv, message in (([], "required: --data, --out"), ([*argv, "--items", "0"], "--items"), ([*argv, "-x"], "-x")):
        bad(capsys, message, *argv)


# ----------------------------------------------------------------------------------------------------------------------
# The harness

T = 40  # shorter than the items, so their front is cut
TWO = [*MINI, "--seq-len", str(T), "--batch-tokens", "640", "--train-tokens", "2000", "--epochs", "60", "--cycles", "2",
       "--weight-decay", "0.8", "--lr-matrix", "0.04", "--distill-weight", "0", "--precision", "float32",
       "--no-compile", "--log-every", "1000"]


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A run of two members."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q0, "LOGS", tmp_path_factory.mktemp("runs"))
        patch.setattr(q0, "draw_curve", lambda *args: None)
        assert q0.main([*TWO, "--data", str(data / "learnable"), "--run", "two"]) == 0
        return q0.LOGS / "two"


@pytest.fixture(scope="module")
def population(folder):
    loaded = q0.load_population(folder, device="cpu")
    assert len(loaded.members) == 2 and 0.6 < max(loaded.weights) < 0.8  # uniform weights would give other numbers
    return loaded


@pytest.fixture
def model(population):
    return use.harness_model(population)


@functools.cache
def alone(population, i):
    return replace(population, members=[i], weights=[1.0])


def log_p(population, ids, weights=None):
    """log p(ids[1:]) in float64: each member alone on one text, mixed here by the run's prior or by {member: w}."""
    weights = weights or dict(zip(population.members, population.weights))
    tokens = torch.tensor([ids[-T - 1:]])
    return sum(w * alone(population, i).log_probs(tokens[:, :-1])[0].double().exp() for i, w in weights.items()).log()


def nats(population, context, continuation, weights=None):
    """(log p of the continuation, whether it is the likeliest), of tokens."""
    logs = log_p(population, context + continuation, weights)
    targets = torch.tensor(continuation[-T:])
    logs = logs[-len(targets):]
    return float(logs.gather(1, targets[:, None]).sum()), bool((logs.argmax(1) == targets).all())


def ask(model, kind, *arguments):
    from lm_eval.api.instance import Instance
    return getattr(model, kind)([Instance(kind, {}, a, i) for i, a in enumerate(arguments)])


@pytest.fixture(scope="module")
def texts(data):
    return read_documents(data / "learnable", "val", encoding_of(data / "learnable"))


def test_evaluate_tasks(data, folder, population, tmp_path, capsys, monkeypatch):
    """From another folder than that of the items; every line again from the members' probabilities."""
    make(capsys, "--data", data / "learnable", "--out", tmp_path / "t")
    monkeypatch.chdir(tmp_path)
    argv = ["--tasks", ",".join(NAMES), "--task-folder", "t", "--limit", "20", "--device", "cpu"]
    assert q0.main(["evaluate", str(folder), *argv]) == 0
    lines = re.findall(r"^task:(\S+) (\S+):([\d.]+) stderr:([\d.]+) (.*)$", capsys.readouterr().out, re.M)
    found = {(mixture, task, metric): (float(value), float(error)) for task, metric, value, error, mixture in lines}
    best = int(np.log(population.heldout).mean(1).argmax())
    mixtures = {f"best on held-out: member {best}": {best: 1.0}, "uniform, all 2": {0: 0.5, 1: 0.5},
                "learned, 2": dict(zip(population.members, population.weights))}
    assert len(lines) == len(found) == len(mixtures) * 4
    encode = population.encoding.encode_ordinary
    for mixture, weights in mixtures.items():
        for task in NAMES:
            right = {"acc": [], "acc_norm": []}
            for item in items_of(tmp_path / "t", task)[:20]:
                context = [population.encoding.eot_token, *encode(item["context"])]
                scores = np.array([nats(population, context, encode(c), weights)[0] for c in item["choices"]])
                right["acc"].append(scores.argmax() == item["label"])
                right["acc_norm"].append((scores / [len(c) for c in item["choices"]]).argmax() == item["label"])
            for metric in ("acc", "acc_norm") if task == "q0_continuation" else ("acc",):
                hits = np.array(right[metric], dtype=float)
                assert found[mixture, task, metric] == pytest.approx(
                    (hits.mean(), hits.std(ddof=1) / 20 ** 0.5), abs=5.1e-5), (mixture, task, metric)
    assert len({tuple(v for (m, *_), v in found.items() if m == mixture) for mixture in mixtures}) > 2  # they differ


def test_loglikelihood(population, model, texts):
    """More requests than a batch holds, of many lengths in any order; one at a time; the sums computed here."""
    encode, batch = population.encoding.encode_ordinary, population.models[0].cfg.micro_batch
    words = [text.split(" ") for text in texts]
    requests = [(" ".join(w[:a]), " ".join(["", *w[a:a + n]])) for w, a, n in zip(
        words, [3, 1, 9, 2, 12, 30, 5, 40, 4, 7, 1, 1] * 2, [1, 2, 5, 12, 3, 4, 1, 6, 9, 2, 1, 18] * 2)]
    requests += [("", text[:20]) for text in texts[:3]] + [(" ", text[:20]) for text in texts[:3]]
    requests += [(requests[0][0] + " ", requests[0][1][1:])]  # its space goes to the continuation
    assert len(requests) > batch + 10
    together, encoded = ask(model, "loglikelihood", *requests), []
    for request, found in zip(requests, together, strict=True):
        whole, front = (population.encode(text) for text in ("".join(request), request[0].rstrip()))
        assert whole[:len(front)] == front
        encoded.append(whole)
        score, greedy = nats(population, front, whole[len(front):])
        assert found[0] == pytest.approx(score, abs=1e-4) and found[1] is greedy, request
        single = ask(model, "loglikelihood", request)[0]
        assert found[0] == pytest.approx(single[0], abs=1e-4) and found[1] is single[1]
    lengths = {len(ids) for ids in encoded}
    assert max(lengths) > T + 1 and len(lengths) > 10 and together[0] == pytest.approx(together[-1], abs=1e-4)


def greedy_tokens(population, ids, number):
    for _ in range(number):
        ids = [*ids, int(log_p(population, [*ids[-T:], 0])[-1].argmax())]
    return ids[-number:]


@pytest.mark.parametrize("length", [4, T + 20])
def test_is_greedy(length, population, model, texts):
    context = population.encode(texts[0])[:length]
    likeliest = greedy_tokens(population, context, 6)
    for change, greedy in [(None, True), (0, False), (3, False), (5, False)]:
        continuation = list(likeliest)
        if change is not None:
            continuation[change] ^= 1
        score, hit = model._loglikelihood_tokens([(("", ""), context, continuation)])[0]
        assert hit is greedy and score == pytest.approx(nats(population, context, continuation)[0], abs=1e-4)


def test_loglikelihood_rolling(population, model, texts):
    """Each token once, in windows of T; the last one reaches back, so that its tokens see as much as T allows."""
    encoding, long = population.encoding, " ".join(texts[:3])
    cuts = [n for n in range(3 * T, 3 * T + 30) if len(encoding.encode_ordinary(encoding.decode(
        encoding.encode_ordinary(long)[:n]))) == n]
    texts = [encoding.decode(encoding.encode_ordinary(long)[:n]) for n in (7, cuts[0], cuts[-1])] + ["", long]
    expected, lengths = [], []
    for text in texts:
        ids, total = population.encode(text), 0.0
        for start in range(1, len(ids), T):
            end = min(start + T, len(ids))
            total += nats(population, ids[max(0, end - T - 1):start], ids[start:end])[0]
        expected.append(total)
        lengths.append(len(ids) - 1)
    assert lengths[0] < T and 3 * T in lengths and any(n > T and n % T for n in lengths) and 0 in lengths
    assert ask(model, "loglikelihood_rolling", *((text,) for text in texts)) == pytest.approx(expected, abs=1e-3)


def test_generate_until(population, model, texts, monkeypatch):
    """Greedy text token by token, cut before the first stop string, also where that spans tokens."""
    prompts = [" ".join(texts[0].split(" ")[:5]), " ".join(texts[1].split(" ")[:45]), ""]
    assert len(population.encode(prompts[1])) > T
    whole = []
    for prompt in prompts:
        ids = greedy_tokens(population, population.encode(prompt), 30)
        whole.append(population.encoding.decode(ids[:[*ids, population.encoding.eot_token].index(
            population.encoding.eot_token)]))
    assert ask(model, "generate_until", *((p, {"until": [], "max_gen_toks": 30}) for p in prompts)) == whole
    short = ask(model, "generate_until", (prompts[0], {"max_gen_toks": 4, "temperature": 0.0, "do_sample": False}))[0]
    assert whole[0].startswith(short) and 0 < len(short) < len(whole[0])
    text, pieces = whole[0], []
    generate = use.generate

    def count(*args, **options):
        for piece in generate(*args, **options):
            pieces.append(piece)
            yield piece
    monkeypatch.setattr(use, "generate", count)
    across, stops = text[4:12], [text[6:12], text[5:12], "none of it"]  # two end at once: the first to begin cuts
    for until, end in ((across, text.index(across)), (stops, text.index(stops[1])), (["none of it"], len(text))):
        pieces.clear()
        assert ask(model, "generate_until", (prompts[0], {"until": until, "max_gen_toks": 30})) == [text[:end]]
        enough = next((n for n in range(1, 30) if any(s in "".join(pieces[:n]) for s in [*stops[:2], across])), 0)
        assert len(pieces) == enough and not any(across in piece for piece in pieces) or end == len(text)
    sample = dict(until=[], max_gen_toks=30, do_sample=True)
    hot, again, cold, top = (ask(model, "generate_until", (prompts[0], sample | change))[0] for change in (
        {"temperature": 2.0}, {"temperature": 2.0}, {"temperature": 0.0}, {"temperature": 2.0, "top_p": 1e-9}))
    assert hot == again != text and cold == top == text
    repeated = ask(model, "generate_until", *[(prompts[0], sample | {"temperature": 2.0})] * 3)
    assert repeated[0] == hot and len(set(repeated)) == 3
    for name in ("max_new_tokens", "max_tokens"):  # as the harness's other models take them; no stop string is empty
        assert ask(model, "generate_until", (prompts[0], {"until": None, name: 4})) == [short]
    assert ask(model, "generate_until", (prompts[0], {"until": ["", None], "max_gen_toks": 4})) == [short]
    assert ask(model, "generate_until", (prompts[0], {"temperature": 2.0, "max_gen_toks": 30})) == [hot]


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes

def test_no_harness(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    fails(capsys, ["evaluate", folder, "--tasks", "hellaswag", "--device", "cpu"], "pip install lm_eval")


def test_no_tokenizer(folder, data, tmp_path, capsys, monkeypatch):
    """A run on tokens that came without one: its loss can be had, tasks and text cannot."""
    run = shutil.copytree(folder, tmp_path / "run")
    no_tokenizer(run / "data")
    assert q0.main(["evaluate", str(run), "--data", str(data / "learnable/dev.bin"), "--device", "cpu"]) == 0
    assert "n/a" in capsys.readouterr().out
    monkeypatch.setattr("lm_eval.tasks.TaskManager.func.load", lambda *args: None)
    fails(capsys, ["evaluate", run, "--tasks", "x", "--device", "cpu"], "error: .*run has no tokenizer")


def test_a_bug_is_no_bad_task(folder, data, tmp_path, capsys, monkeypatch):
    make(capsys, "--data", data / "learnable", "--out", tmp_path / "t", "--items", 9)

    def broken(*args):
        raise RuntimeError("a bug")
    monkeypatch.setattr(q0.Population, "log_probs", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        q0.main(["evaluate", str(folder), "--device", "cpu", "--task-folder", str(tmp_path / "t"), "--tasks", "q0_swap"])


def test_unknown_task(folder, data, tmp_path, capsys):
    make(capsys, "--data", data / "learnable", "--out", tmp_path / "t", "--items", 9)
    argv = ["evaluate", folder, "--device", "cpu", "--task-folder", tmp_path / "t", "--tasks"]
    fails(capsys, [*argv, "q0_swap,q0_swop"], "q0_swop")
    fails(capsys, [*argv, "q0_swap", "--limit", "0"], "--limit 0 must be at least 1")
