"""A population in use: mixtures, select, evaluate and sample; and tools that read finished runs."""
import gc
import json
import math
import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from pytest import approx
from tiny import (
    END, VOCABULARY, edit_json, fails, loss_of, predictions_of, read_json, read_shard,
    sequences_of, shard_bytes, works)

import train_q0 as q
from records import figures, mixture, plot, pool, population, prior
from records.mixture import load_mixture
from records.population import read_predictions


@pytest.fixture(scope="session")
def encoding(corpus):
    return mixture.load_tokenizer(corpus)["encoding"]


# A mixture --------------------------------------------------------------------------------------

def test_mixture_reproduces_the_run(finished, corpus, encoding):
    """Members give the cached predictions bit for bit, weights are the prior's, log_probs is the
    mixture, and the tokenizer that of the data."""
    mixed = load_mixture(finished)
    table = read_json(finished / "result.json")["table"]
    weights = np.array(table["weights"])
    assert mixed.members == table["ranked"][:sum(weights > 1e-6)]
    assert_allclose(mixed.weights, weights[mixed.members], atol=1e-5)
    assert sum(mixed.weights) == approx(1, abs=1e-12)
    cached = predictions_of(finished)["val"]
    sequences = sequences_of(corpus, "val", 64)[:16]
    for i in mixed.members:
        p = q.true_token_probs(mixed.member(i), sequences, 16, q.World())
        assert np.array_equal(p, cached[i, :p.size])
    tokens = torch.from_numpy(sequences)
    p = mixed.log_probs(tokens[:, :-1]).exp()
    assert p.shape == (16, 64, VOCABULARY) and p.dtype == torch.float32
    found = p.gather(2, tokens[:, 1:, None]).flatten()
    expected = mixed.weights @ cached[mixed.members, :len(found)]
    assert_allclose(found, expected, rtol=1e-5)  # of float32, with logits up to 15
    assert_allclose(p.sum(-1), 1, atol=1e-5)
    text = "an été of <|endoftext|> words"
    tokens = mixed.encode(text)
    assert tokens == [END, *encoding.encode_ordinary(text)]
    assert mixed.encoding.decode(tokens[1:]) == text
    assert mixed.manifest == read_json(corpus / "manifest.json")


MANIFEST = "data/manifest.json"


# evaluate --data --------------------------------------------------------------------------------

COLUMNS = ("loss", "low", "high", "perplexity", "bits", "more", "more_low", "more_high")


def rows_of(out):
    """{name: {column: number or None}} of the table of losses."""
    found = {}
    for line in out.split("   k ")[0].splitlines()[2:]:
        words = re.sub("[()]", " ", line[27:]).split()
        numbers = [float(w) if w != "n/a" else None for w in words]
        name = line[:27].strip()
        found[name] = dict(zip(COLUMNS, numbers, strict=True))
    return found


def weights_compared(run):
    """{name: weights of all members}: the mixtures that evaluate shows."""
    heldout = predictions_of(run)["heldout"]
    best = min(range(4), key=lambda i: loss_of(heldout[i]))
    w = np.array(read_json(run / "result.json")["table"]["weights"])
    used = w > 1e-6
    k = used.sum()
    alone = np.eye(4)
    found = {f"member {i}": alone[i] for i in range(4)}
    found[f"best on held-out: member {best}"] = alone[best]
    found["uniform, all 4"] = np.full(4, 0.25)
    if k < 4:
        found[f"uniform, best {k}"] = used / k
    w[~used] = 0
    found[f"learned, {k}"] = w / w.sum()
    return found


def intervals(corpus, nats, rng):
    """Quantiles of means over documents of the validation text, drawn anew."""
    starts = np.cumsum(read_shard(corpus / "val.bin") == END)
    n = len(starts) // 65
    sequences = starts[:65 * n].reshape(n, 65)
    documents = sequences[:, 1:].flatten()
    groups = [nats[documents == d + 1] for d in range(documents.max())]
    draws = rng.integers(len(groups), size=(400, len(groups)))
    means = []
    for draw in draws:
        drawn = np.concatenate([groups[i] for i in draw])
        means.append(drawn.mean())
    return np.quantile(means, (0.025, 0.975))


def test_evaluate_against_the_cache(finished, corpus, encoding, capsys):
    """On the run's validation text: losses from its cache, bytes from the decoded text, intervals
    from a bootstrap written anew; differences are paired."""
    out = works(capsys, "evaluate", finished, "--data", corpus / "val.bin")
    rows = rows_of(out)
    mixtures = weights_compared(finished)
    assert list(rows) == list(mixtures)
    targets = sequences_of(corpus, "val", 64)[:, 1:].flatten()
    is_text = targets != END
    size = sum(len(encoding.decode_single_token_bytes(t)) for t in targets[is_text])
    assert out.startswith(f"{len(targets)} tokens predicted, {size} bytes, ")
    P = predictions_of(finished)["val"].astype(np.float64)
    *_, learned = mixtures.values()
    least = -np.log(learned @ P)
    for name, weights in mixtures.items():
        row = rows[name]
        nats = -np.log(weights @ P)
        assert row["loss"] == approx(nats.mean(), abs=1.1e-5)
        assert row["perplexity"] == approx(math.exp(nats.mean()), 1e-3)
        assert row["more"] == approx(nats.mean() - least.mean(), abs=1e-4)
        bits = nats[is_text].sum() / math.log(2) / size
        assert row["bits"] == approx(bits, abs=1e-4)
        for values, shown in (
                (nats, ("low", "high")), (nats - least, ("more_low", "more_high"))):
            ends = intervals(corpus, values, np.random.default_rng(1))
            # 400 draws against 1,000: an end of the interval errs by a tenth of its width
            slack = 0.2 * np.ptp(ends) + 1e-4
            assert [row[x] for x in shown] == approx(ends, abs=slack)
    result = read_json(finished / "result.json")
    last, = re.findall(r"^   4 .*$", out, re.M)
    uniform, learned = result["uniform_val_loss"], result["final_val_loss"]
    assert last.startswith(f"   4   {uniform:.5f}   {learned:.5f} ")


def test_one_member_in_memory(finished, corpus, capsys, monkeypatch):
    """Each member is read once, and is gone when the next one comes."""
    seen = []
    load = population.load_member

    def one_at_a_time(*args, **kwargs):
        gc.collect()
        # the one that told the shapes, and at most one more
        assert sum(ref() is not None for ref in seen) <= 2
        model = load(*args, **kwargs)
        seen.append(weakref.ref(model))
        return model

    monkeypatch.setattr(population, "load_member", one_at_a_time)
    shards = (corpus / "heldout.bin", corpus / "dev.bin")
    out = works(capsys, "evaluate", finished, "--data", *shards)
    assert len(seen) == 5
    n = sum(len(read_shard(file)) for file in shards) // 65
    assert out.startswith(f"{64 * n} tokens predicted")


def test_evaluate_other_data(copied, corpus, capsys):
    """Bytes need a tokenizer; data efficiency is of FineWeb's validation text."""
    edit_json(copied / MANIFEST, name="fineweb")
    assert "\ndata_efficiency:" in works(capsys, "evaluate", copied, "--data", corpus / "val.bin")
    edit_json(copied / MANIFEST, tokenizer=None)
    out = works(capsys, "evaluate", copied, "--data", corpus / "heldout.bin")
    assert ", 0 bytes," in out and "data_efficiency" not in out
    assert rows_of(out)["uniform, all 4"]["bits"] is None


@pytest.mark.parametrize("argv, message", [
    ([], "needs either --data SHARD or --tasks NAMES"),
    (["--data", "x.bin", "--tasks", "piqa"], "not both: run it once for each"),
    (["--data", "missing.bin"], "shard missing.bin is missing or damaged"),
    (["--data", "."], r"is a folder: name a shard in it \(foreign.bin, short.bin\)"),
    (["--data", "short.bin"], "has 64 tokens, fewer than one sequence of 65"),
    (["--data", "foreign.bin"], "beyond the vocabulary of 300"),
    (["--device", "cuda"], "torch sees no GPU")])
def test_bad_evaluate(argv, message, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.bin").write_bytes(shard_bytes([END] * 64))
    (tmp_path / "foreign.bin").write_bytes(shard_bytes([VOCABULARY] * 650))
    fails(capsys, message, "evaluate", finished, *argv)


# sample -----------------------------------------------------------------------------------------

def test_sample_command(finished, monkeypatch, capsys):
    """The prompt, then what follows, each piece at once; the seed decides."""
    asked = ("sample", finished, "--prompt", "bale", "--tokens", 20)
    first = works(capsys, *asked, "--seed", 1)
    assert first.startswith("bale") and first.endswith("\n")
    assert works(capsys, *asked, "--seed", 1) == first != works(capsys, *asked)
    cold = works(capsys, *asked, "--temperature", 0, "--seed", 1)
    assert cold == works(capsys, *asked, "--temperature", 0)
    assert cold == works(capsys, *asked, "--top-p", 0)
    two = works(capsys, *asked, "--samples", 2, "--stream")
    assert two.startswith(f"--- sample 0\n{works(capsys, *asked)}--- sample 1\nbale")
    printed = []
    monkeypatch.setattr("builtins.print", lambda *args, **how: printed.append((args, how)))
    q.main(["sample", str(finished), "--tokens", "2"])
    assert [how for _, how in printed[:-1]] == [{"end": "", "flush": True}] * 4


class Fixed:
    """A reader: the next token has the distribution `p` whatever came before; `asked` came."""
    seq_len = 64

    def __init__(self, p):
        self.asked = []
        self.p = torch.zeros(VOCABULARY)
        for token, x in p.items():
            self.p[token] = x

    def read(self, tokens):
        self.asked.append(tokens[0].tolist())
        return self.p.log()[None]

    def repeat(self, n):
        assert n == 1


@pytest.fixture
def fixed(finished, monkeypatch):
    """fixed({token: probability}) -> a mixture that reads so."""
    def make(p):
        mixed = load_mixture(finished, k=1)
        reader = Fixed(p)
        monkeypatch.setattr(mixture.Mixture, "reader", lambda self: reader)
        return mixed
    return make


@pytest.mark.parametrize("options, expected", [
    ({}, [50, 25, 15, 10]),
    (dict(temperature=0.5), [72.5, 18.1, 6.5, 2.9]),  # in proportion to the squares
    (dict(top_p=0.75), [66.7, 33.3, 0, 0]),  # a and b have it exactly
    (dict(top_p=0.76), [55.6, 27.8, 16.7, 0]),
    (dict(temperature=0.0), [100, 0, 0, 0])])
def test_frequencies_of_what_is_drawn(options, expected, fixed):
    p = dict(zip(b"abcd", (0.5, 0.25, 0.15, 0.1)))
    pieces = list(fixed(p).generate("", tokens=1000, **options))
    percent = [pieces.count(c) / 10 for c in "abcd"]
    assert_allclose(percent, expected, atol=6)  # deviations are 1.6 at most


def test_generated_text(fixed):
    """It ends with the document, which is not shown; half a character is never shown as it stands;
    of the prompt the last seq_len tokens are read, then each token once."""
    text = "".join(fixed({97: 0.9, END: 0.1}).generate("ba", 1000))
    assert set(text) == {"a"} and len(text) < 200
    assert "".join(fixed({0xE2: 1.0}).generate("", 1)) == "\ufffd"
    for prompt in ("ba", "b" * 100):
        mixed = fixed({97: 1.0})
        list(mixed.generate(prompt, 2))
        assert mixed.reader().asked == [mixed.encode(prompt)[-64:], [97]]


# Tools that read finished runs ------------------------------------------------------------------

def test_prior(finished):
    """records/prior.py: other ways to choose members and weights."""
    result = read_json(finished / "result.json")
    rows = prior.rows_of(str(finished))
    table = {row["k"]: row for row in result["table"]["rows"]}
    assert rows["learned, all 4"] == approx(result["final_val_loss"], abs=1e-7)
    assert rows["newest member alone"] == approx(result["last_member_val_loss"], abs=1e-7)
    assert rows["top 2, renormalised"] == approx(table[2]["learned"], abs=1e-6)
    assert rows["pruned to 2"] == approx(table[2]["pruned"], abs=1e-6)
    heldout = predictions_of(finished)["heldout"]
    best, _ = prior.greedy(heldout, 2)
    assert best == min(range(4), key=lambda i: loss_of(heldout[i]))


def test_plot():
    """Where one curve reaches another's loss."""
    curve = np.array([
        [2, 0, 5.0],
        [4, 0, 4.0],
        [8, 0, 3.0]])
    for loss, reached in ((3.5, 6), (5.5, 2), (2.9, np.nan)):
        assert_allclose(plot.reached([curve, curve], loss, plot.EPOCHS), [reached] * 2)


def test_compare(finished, tmp_path, capsys):
    """Curves of logs, and the best members of a budget."""
    result = read_json(finished / "result.json")
    log = finished / "log.txt"
    epochs, spent, losses = plot.curve(log).T
    assert epochs.tolist() == [6, 12, 18, 24]
    # the first cycle has no teacher
    of_model = result["flops"] - result["teacher_flops"]
    assert spent[0] == approx(of_model / 4, 1e-3)
    assert spent[-1] == approx(result["flops"], 1e-3)
    assert_allclose(losses, [entry["learned"] for entry in result["curve"]], atol=1e-5)
    out = works(capsys, "compare", finished, f"b={log}", "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
    assert "b reaches first's" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["difference", "-", "+0.0000"] in lines
    for row in result["table"]["rows"]:
        assert ["best", str(row["k"]), *2 * [f"{row['pruned']:.4f}"]] in lines
    worse = plot.curve(log) + [0, 0, 1]
    (tmp_path / "worse.json").write_text(json.dumps([worse.tolist()]))
    out = works(capsys, "compare", f"a={log}", f"b={tmp_path}/worse.json", "--out",
                tmp_path / "x.png")
    assert out.count("b does not reach a's") == 2  # epochs, FLOPs


@pytest.mark.parametrize("argv, message", [
    (["a=nothing"], "no runs or files match nothing"),
    (["RUN", "RUN"], "there is a row first already"),
    (["RUN", "--out", "x.doc"], "x.doc is not drawn: .*doc"),
    (["pool"], "made of other runs and has no log: compare those")])
def test_bad_compare(argv, message, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/result.json").touch()
    fails(capsys, message, "compare", *[finished if a == "RUN" else a for a in argv])


def test_compare_settings(trained, logs, capsys):
    """Of a row of two seeds and one under way, on other settings; its picture is under logs/."""
    for seed in (1, 2):
        trained(f"old{seed}", "--seed", seed)
    new = trained("new", "--lr-head", 0.02, "--report", "dev")
    same = trained("same", "--lr-head", 0.02)
    log = same / "log.txt"
    under_way, _, _ = log.read_text(encoding="utf-8").partition("\nfinal_")
    log.write_text(under_way + "\n", encoding="utf-8")
    out = works(capsys, "compare", "old=old*", "same")
    lines = [line.split() for line in out.splitlines()]
    assert lines[:4] == [
        ["old", "same"],
        ["seed", "1", "2", "0"],
        ["lr_head", "0.01", "0.02"],
        ["runs", "2", "1"]]
    assert lines[7][:2] == ["best", "1"]
    assert lines[7][-1] == "-"  # it has no table yet
    assert (logs / "compare.png").stat().st_size > 5000
    fails(capsys, "losses on dev and on val text, .* do not compare", "compare", "same", new)


def test_verdict():
    """A t-test worked out by hand: t(0.99, df 8) = 2.896, times 0.01581 * sqrt(2 / 5)."""
    first = [np.array([[2.0, 1e9, 4 + i / 100]]) for i in range(5)]
    assert plot.compared(first, first) == "5 | 4.0200 ± 0.0158 | - | - | -"
    for difference, verdict in (
            (0.028, "equal"),
            (0.03, "worse"),
            (-0.03, "better")):
        other = [curve + [0, 0, difference] for curve in first]
        assert plot.compared(first, other).endswith(f"{difference:+.4f} | 0.0290 | {verdict}")
    few = [curve + 1 for curve in first[:3]]
    assert plot.compared(first, few).endswith("worse (n < 5)")


def test_figures(monkeypatch, capsys):
    """The pages' figures can be drawn again; the ratios they quote are of committed curves."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, name: drawn.append(name))
    figures.main()
    assert sorted(drawn) == ["loss.png", "method.png", "ratio.png"]
    out = capsys.readouterr().out
    for line in ("1.4M, 32 epochs: 1.15", "1.4M, 128 epochs: 2.65",
                 "q0, seed 202, 208 epochs: 3.34", "chain, seed 201, 208 epochs: 3.44"):
        assert line in out


# records/pool.py: large populations from cached predictions -------------------------------------

@pytest.fixture
def another(finished, tmp_path):
    """A run like `finished` of another seed, with other predictions."""
    folder = shutil.copytree(finished, tmp_path / "another")
    (folder / "result.json").unlink()  # with the hashes of predictions
    config = read_json(folder / "run.json")["config"]
    edit_json(folder / "run.json", config={**config, "seed": 1})
    for file in (folder / "predictions").iterdir():
        found = read_predictions(file)
        moved = {split: np.roll(p, 3) for split, p in found.items()}
        q.save_file(moved, file)
    return folder


def pooled(out, size, *runs, options=()):
    """The curves that records/pool.py writes."""
    pool.main([*options, str(size), str(out), *map(str, runs)])
    return plot.curves_in(str(out))


def test_pooled_curves(finished, another, tmp_path):
    """Epochs and FLOPs add up; one prior over all members so far, or over the best."""
    curve, = pooled(tmp_path / "x.json", 2, finished, another)
    epochs, flops, losses = curve.T
    assert_allclose(epochs, range(6, 49, 6))
    single = plot.curve(finished / "log.txt")
    assert_allclose(curve[:4], single, rtol=1e-4)  # five digits of FLOPs are kept
    spent = single[:, plot.FLOPS]
    assert_allclose(flops[4:], spent + spent[-1], rtol=1e-4)
    both = [predictions_of(run) for run in (finished, another)]
    heldout = np.concatenate([p["heldout"] for p in both])
    weights, _ = q.fit_prior(heldout)
    loss = loss_of(weights @ np.concatenate([p["val"] for p in both]))
    assert losses[-1] == approx(loss, abs=2e-6)
    one, two = pooled(tmp_path / "x.json", 1, finished, another, options=["--k=1"])
    assert len(one) == len(two) == 4
    table = read_json(finished / "result.json")["table"]
    pruned = table["rows"][0]["pruned"]
    assert one[-1, plot.LOSS] == approx(pruned, abs=2e-6)


def test_runs_that_do_not_pool(finished, another, tmp_path):
    config = read_json(another / "run.json")["config"]
    edit_json(another / "run.json", config={**config, "dropout": 0.3})
    out = tmp_path / "x.json"
    for second, message in ((another, "another has other settings or data than .*first"),
                            (finished, "1 different runs")):
        with pytest.raises(SystemExit, match=message):
            pooled(out, 2, finished, second)
    assert not out.exists()
