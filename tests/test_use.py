"""A population in use: load_population, evaluate --data, sample, average, and a whole run as teacher (`--teacher`)."""
import gc
import json
import math
import re
import shutil
import weakref

import numpy as np
import pytest
import torch

import plot
import pool
import prior
import train_q0 as q0
import use
from test_run import MINI, corpus, logs, one_thread, predictions_of, repo, run, tokens_of  # noqa: F401 (fixtures)

SHORT = ["--epochs", "2", "--cycles", "1"]
TAUGHT = ["--seq-len", "64", "--micro-batch", "8", "--teacher"]  # by the run of test_run, whose prior mixes several members


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return q0.load_tokenizer(corpus)[1]


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run[0], tmp_path / "copied")


# ----------------------------------------------------------------------------------------------------------------------
# load_population

def test_population_reproduces_the_run(run, corpus):
    """Members give the cached predictions bit for bit; weights are the prior's; log_probs is the mixture."""
    folder, _ = run
    population, cached = q0.load_population(folder), predictions_of(folder)
    table = json.loads((folder / "result.json").read_text())["table"]
    assert population.members == [i for i in table["ranked"] if table["weights"][i] > 1e-6]
    np.testing.assert_allclose(population.weights, sorted(table["weights"], reverse=True)[:len(population.weights)],
                               atol=1e-5)
    assert sum(population.weights) == pytest.approx(1, abs=1e-12)
    sequences, mixed = tokens_of(corpus, "val")[:20], 0.0
    for i, w, model in zip(population.members, population.weights, population.models):
        again = q0.true_token_probs(model, sequences, 8, q0.World())
        assert np.array_equal(again, cached[i]["val"][:again.size])
        mixed = mixed + w * again.astype(np.float64)
    tokens = torch.from_numpy(sequences)
    log_p = population.log_probs(tokens[:, :-1])
    assert log_p.shape == (20, 64, 300) and log_p.dtype == torch.float32
    found = log_p.double().gather(2, tokens[:, 1:, None]).exp().flatten().numpy()
    np.testing.assert_allclose(found, mixed, rtol=1e-5)  # float32: an operation errs by 6e-8, logits reach 15
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(20, 64), atol=1e-5)


def test_best_k_is_fitted_again(run):
    population = q0.load_population(str(run[0]), k=2)
    heldout = np.stack([p["heldout"] for p in predictions_of(run[0])])
    assert set(population.members) < set(q0.load_population(run[0], k=3).members)
    w = np.array(population.weights)
    loss = q0.mixture_loss(heldout[population.members], w)
    for step in (-0.01, 0.01):
        assert q0.mixture_loss(heldout[population.members], w + [step, -step]) > loss
    assert q0.load_population(run[0], k=1).weights == [1.0]


def test_run_holds_its_tokenizer(run, corpus, tokenizer):
    population = q0.load_population(run[0])
    text = "an \u00e9t\u00e9 of <|endoftext|> words"
    assert population.encode(text) == [299, *tokenizer.encode_ordinary(text)]
    assert population.encoding.decode(population.encode(text)[1:]) == text
    assert population.manifest == json.loads((corpus / "manifest.json").read_text())


def damage(kind, folder):
    weights = folder / "members/1/model.safetensors"
    if kind == "weights are gone":
        weights.unlink()
    elif kind == "another member's folder":
        shutil.rmtree(folder / "members/1")
        shutil.copytree(folder / "members/0", folder / "members/1")
    elif kind == "a byte":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    elif kind == "no manifest":
        (folder / "data/manifest.json").unlink()
    elif kind == "another tokenizer":
        (folder / "data/tokenizer.tiktoken").write_bytes(b"YQ== 0\n")
    elif kind == "no tokenizer":
        manifest = json.loads((folder / "data/manifest.json").read_text())
        (folder / "data/manifest.json").write_text(json.dumps({**manifest, "tokenizer": None}))
    elif kind == "predictions":
        (folder / "predictions/1.safetensors").unlink()


@pytest.mark.parametrize("kind, message", [
    ("weights are gone", "member .*members/1 is missing or damaged: No such file"),
    ("another member's folder", "member .*members/1 is missing or damaged: .*sha256"),
    ("a byte", "member .*members/1 is missing or damaged: .*sha256"),
    ("no manifest", "tokenizer in .*data is missing or damaged: No such file"),
    ("another tokenizer", "tokenizer in .*data is missing or damaged: .*sha256 of tokenizer.tiktoken"),
    ("no tokenizer", "has no tokenizer"),
    ("predictions", "is not of member 1: the run is not complete")])
def test_damaged_runs(kind, message, copied, capsys):
    damage(kind, copied)
    assert q0.main(["sample", str(copied), "--k", "4", "--tokens", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err), err


# ----------------------------------------------------------------------------------------------------------------------
# evaluate --data

def evaluated(capsys, *argv):
    assert q0.main(["evaluate", *map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def rows_of(out):
    """{name: [loss, low, high, perplexity, bits per byte, difference, its low, its high]}"""
    found = {}
    for line in out.splitlines()[2:]:
        if line.startswith("   k "):
            return found
        words = line[27:].replace("(", " ").replace(")", " ").split()
        found[line[:27].strip()] = [float(w) if w != "n/a" else None for w in words]
    raise AssertionError(out)


def test_evaluate_against_the_cache(run, corpus, tokenizer, capsys):
    """On the run's own validation text: losses from the cached predictions, bytes from the decoded text, intervals from
    a bootstrap written anew."""
    folder, _ = run
    result = json.loads((folder / "result.json").read_text())
    out = evaluated(capsys, folder, "--data", corpus / "val.bin")
    rows, sequences = rows_of(out), tokens_of(corpus, "val")
    P = np.stack([p["val"] for p in predictions_of(folder)]).astype(np.float64)
    heldout = np.stack([p["heldout"] for p in predictions_of(folder)])
    best = int(np.log(heldout).mean(1).argmax())
    used = sum(w > 1e-6 for w in result["table"]["weights"])
    w = np.where(np.array(result["table"]["weights"]) > 1e-6, result["table"]["weights"], 0)
    mixtures = {**{f"member {i}": np.eye(4)[i] for i in range(4)}, f"best on held-out: member {best}": np.eye(4)[best],
                "uniform, all 4": np.full(4, 0.25), **({f"uniform, best {used}": (w > 0) / used} if used < 4 else {}),
                f"learned, {used}": w / w.sum()}
    assert list(rows) == list(mixtures)
    targets = sequences[:, 1:].flatten()
    text = [tokenizer.decode_single_token_bytes(t) if t != 299 else b"" for t in targets]
    size, starts = sum(map(len, text)), np.cumsum(np.fromfile(corpus / "val.bin", dtype="<u2", offset=1024) == 299)
    documents = starts[:sequences.size].reshape(-1, 65)[:, 1:].flatten()
    assert out.startswith(f"{len(targets)} tokens predicted, {size} bytes, {len(np.unique(documents))} documents;")
    learned = -np.log(list(mixtures.values())[-1] @ P)
    rng, groups = np.random.default_rng(1), [np.flatnonzero(documents == d) for d in np.unique(documents)]
    picked = [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(400)]
    for (name, mixture), row in zip(mixtures.items(), rows.values()):
        nats = -np.log(mixture @ P)
        assert row[0] == pytest.approx(nats.mean(), abs=1.1e-5) and row[3] == pytest.approx(math.exp(nats.mean()), 1e-3)
        assert row[4] == pytest.approx(nats[targets != 299].sum() / math.log(2) / size, abs=1e-4)
        assert row[5] == pytest.approx((nats - learned).mean(), abs=1e-4)
        # 400 draws against 1,000: a quantile of 2.5% errs by a tenth of the interval's width
        for drawn, (low, high) in (([nats[p].mean() for p in picked], row[1:3]),
                                   ([(nats - learned)[p].mean() for p in picked], row[6:8])):
            expected, width = np.quantile(drawn, (0.025, 0.975)), np.ptp(np.quantile(drawn, (0.025, 0.975)))
            assert np.abs(expected - [low, high]).max() <= 0.2 * width + 1e-4, name
    table = [line.split() for line in out.splitlines() if line.split()[0] in "1234"]
    assert [float(x) for x in table[-1][1:3]] == pytest.approx([result["uniform_val_loss"], result["final_val_loss"]],
                                                              abs=1e-5)
    assert "data_efficiency" not in out


def test_evaluate_other_text_and_k(run, corpus, capsys):
    folder, _ = run
    out = evaluated(capsys, folder, "--data", corpus / "dev.bin", corpus / "heldout.bin", "--k", 1)
    rows = rows_of(out)
    assert "learned, 1" in rows and "uniform, best 1" in rows
    assert rows["learned, 1"] == rows[f"member {q0.load_population(folder).members[0]}"]
    heldout = evaluated(capsys, folder, "--data", corpus / "heldout.bin")
    cached = np.stack([p["heldout"] for p in predictions_of(folder)])
    for i in range(4):
        assert rows_of(heldout)[f"member {i}"][0] == pytest.approx(-np.log(cached[i]).mean(), abs=1e-5)


def test_one_member_in_memory(run, corpus, capsys, monkeypatch):
    """Each member is read once, and is gone when the next one comes."""
    seen, load = [], q0.load_member

    def one_at_a_time(*args, **kwargs):
        gc.collect()
        assert sum(ref() is not None for ref in seen) <= 2  # the one that told the shapes, and at most one more
        seen.append(weakref.ref(model := load(*args, **kwargs)))
        return model

    monkeypatch.setattr(q0, "load_member", one_at_a_time)
    evaluated(capsys, run[0], "--data", corpus / "heldout.bin")
    assert len(seen) == 5


def test_evaluate_without_a_tokenizer(copied, corpus, capsys):
    damage("no tokenizer", copied)
    out = evaluated(capsys, copied, "--data", corpus / "heldout.bin")
    assert rows_of(out)["uniform, all 4"][4] is None and ", 0 bytes," in out


def test_data_efficiency_of_fineweb_alone(copied, corpus, capsys):
    manifest = json.loads((copied / "data/manifest.json").read_text())
    (copied / "data/manifest.json").write_text(json.dumps({**manifest, "name": "fineweb"}))
    assert evaluated(capsys, copied, "--data", corpus / "val.bin").splitlines()[-1].startswith("data_efficiency:")
    assert "data_efficiency" not in evaluated(capsys, copied, "--data", corpus / "dev.bin")


@pytest.mark.parametrize("argv, message", [
    ([], "needs either --data SHARD or --tasks NAMES"), (["--data", "x.bin", "--tasks", "piqa"], "needs either"),
    (["--data", "missing.bin"], "shard missing.bin is missing or damaged"), (["--k", "0", "--data", "x"], "--k 0 must be"),
    (["--device", "tpu"], "invalid choice"), (["--what"], "unrecognized arguments: --what")])
def test_bad_evaluate(argv, message, run, capsys):
    assert q0.main(["evaluate", str(run[0]), *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_short_or_foreign_shard(run, tmp_path, capsys):
    def shard(name, tokens):
        head = np.zeros(256, "<i4")
        head[:3] = 20240520, 1, len(tokens)
        (tmp_path / name).write_bytes(head.tobytes() + np.array(tokens, "<u2").tobytes())
        return str(tmp_path / name)

    for path, message in ((shard("short.bin", [299] * 64), "has 64 tokens, fewer than one sequence of 65"),
                          (shard("foreign.bin", [300] * 650), "beyond the vocabulary of 300")):
        assert q0.main(["evaluate", str(run[0]), "--data", path]) == 2
        assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# records/prior.py and records/plot.py

def test_prior_rows(run):
    result, rows = json.loads((run[0] / "result.json").read_text()), prior.rows_of(str(run[0]))
    table = {row["k"]: row for row in result["table"]["rows"]}
    assert rows["learned, all 4"] == pytest.approx(result["final_val_loss"], abs=1e-7)
    assert rows["newest member alone"] == pytest.approx(result["last_member_val_loss"], abs=1e-7)
    assert rows["top 2, renormalised"] == pytest.approx(table[2]["learned"], abs=1e-6)
    assert rows["pruned to 2"] == pytest.approx(table[2]["pruned"], abs=1e-6)
    heldout = np.stack([p["heldout"] for p in predictions_of(run[0])])
    loss = lambda members: q0.mixture_loss(heldout[members], q0.fit_prior(heldout[members])[0])
    first, second = prior.greedy(heldout, 2)
    assert loss([first]) == min(loss([i]) for i in range(4))
    assert loss([first, second]) == min(loss([first, i]) for i in range(4) if i != first)
    assert len({rows[f"held-out text {how}"] for how in ("halved", "quartered", "times 2")}) == 3


def test_plot(run, tmp_path, capsys):
    folder, result = run[0], json.loads((run[0] / "result.json").read_text())
    curve = plot.curve(folder / "log.txt")
    assert curve[:, 0].tolist() == [6, 12, 18, 24] and curve[-1, 1] == pytest.approx(sum(result["flops"].values()), 1e-3)
    np.testing.assert_allclose(curve[:, 2], [p["learned"] for p in result["curve"]], atol=1e-5)
    assert curve[0, 1] == pytest.approx(result["flops"]["model"] / 4, 1e-3)  # the first cycle has no teacher
    down = np.array([[2.0, 0, 5.0], [4, 0, 4.0], [8, 0, 3.0]])
    np.testing.assert_allclose(plot.reached([down], 3.5, 0), [6])
    np.testing.assert_allclose(plot.reached([down, down], 5.5, 0), [2, 2])
    assert np.isnan(plot.reached([down], 2.9, 0)).all()
    plot.main([str(tmp_path / "x.png"), f"a={folder}/log.txt", f"b={folder}/log.txt"])
    assert (tmp_path / "x.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "b reaches a's" in printed and "| +0.0000 | ? | - |" in printed
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps([[[x, y, loss + 1] for x, y, loss in curve.tolist()]]))
    plot.main([str(tmp_path / "x.png"), f"a={folder}/log.txt", f"b={worse}"])
    assert capsys.readouterr().out.count("b does not reach a's") == 2  # epochs, FLOPs


def test_compared():
    """The verdict against two samples whose t-test is worked out by hand: t(0.99, df 8) = 2.896."""
    runs = lambda *losses: [np.array([[2.0, 1e9, loss]]) for loss in losses]
    first = runs(4.00, 4.01, 4.02, 4.03, 4.04)  # standard deviation 0.01581, required 2.896 * 0.01581 * sqrt(2 / 5)
    assert plot.compared(first, first) == "5 | 4.0200 ± 0.0158 | - | - | -"
    shifted = lambda by: plot.compared(first, runs(*(4.00 + by + i / 100 for i in range(5))))
    assert shifted(0.028).endswith("+0.0280 | 0.0290 | equal") and shifted(0.03).endswith("+0.0300 | 0.0290 | worse")
    assert shifted(-0.03).endswith("-0.0300 | 0.0290 | better")
    assert plot.compared(first, runs(4.5, 4.51, 4.52)).endswith("| worse (n < 5)")
    assert plot.compared(first[:1], runs(4.5)).endswith("+0.5000 | ? | -")


def test_pool(run, tmp_path, capsys):
    """Two runs pooled are one population: epochs and FLOPs add up, one prior over all members so far; plot.py reads it."""
    first, second = run[0], shutil.copytree(run[0], tmp_path / "second")
    (second / "result.json").unlink()  # with the hashes of predictions, which become other ones
    about = json.loads((second / "run.json").read_text())
    about["config"]["seed"] += 1
    (second / "run.json").write_text(json.dumps(about))
    for i in range(4):
        path = second / f"predictions/{i}.safetensors"
        q0.save_file({k: np.roll(p, 3) for k, p in q0.read_predictions(path).items()}, path)
    pool.main(["2", str(tmp_path / "pool.json"), str(first), str(second)])
    (rows,), both = plot.curves_in(str(tmp_path / "pool.json")), [predictions_of(f) for f in (first, second)]
    single = plot.curve(first / "log.txt")
    assert rows[:, 0].tolist() == [6, 12, 18, 24, 30, 36, 42, 48]
    np.testing.assert_allclose(rows[:4], single, rtol=1e-4)  # five digits of FLOPs are kept
    np.testing.assert_allclose(rows[4:, 1], single[:, 1] + single[-1, 1], rtol=1e-4)
    heldout, scored = (np.stack([p[split] for found in both for p in found]) for split in ("heldout", "val"))
    assert rows[-1, 2] == pytest.approx(q0.mixture_loss(scored, q0.fit_prior(heldout)[0]), abs=2e-6)
    assert rows[5, 2] == pytest.approx(q0.mixture_loss(scored[:6], q0.fit_prior(heldout[:6])[0]), abs=2e-6)
    assert "48 epochs, 8 members, n=1:" in capsys.readouterr().out
    pool.main(["--k", "1", "1", str(tmp_path / "k1.json"), str(first), str(second)])
    assert [len(rows) for rows in plot.curves_in(str(tmp_path / "k1.json"))] == [4, 4]
    best = json.loads((first / "result.json").read_text())["table"]["rows"][0]["pruned"]
    assert plot.curves_in(str(tmp_path / "k1.json"))[0][-1, 2] == pytest.approx(best, abs=2e-6)
    about["config"]["dropout"] = 0.3
    (second / "run.json").write_text(json.dumps(about))
    third, fourth = (shutil.copytree(f, tmp_path / n) for f, n in ((first, "third"), (second, "fourth")))
    pool.main(["--mixed", "2", str(tmp_path / "mixed.json"), *map(str, (first, second, third, fourth))])
    assert [len(rows) for rows in plot.curves_in(str(tmp_path / "mixed.json"))] == [8, 8]
    for argv, why in (([first, second], "second has other settings or data than .*first"),
                      ([first, first], "1 different runs"),
                      (["--mixed", first, second, fourth, third], "fourth has other settings or data than .*first")):
        with pytest.raises(SystemExit, match=why):
            pool.main(["2", str(tmp_path / "x.json"), *map(str, argv)])
    assert not (tmp_path / "x.json").exists()


# ----------------------------------------------------------------------------------------------------------------------
# sample

def test_sample_command(run, capsys, monkeypatch):
    """The prompt, then pieces as they come; the seed decides."""
    def sampled(*argv):
        assert q0.main(["sample", str(run[0]), "--prompt", "bale", "--tokens", "40", *argv]) == 0
        return capsys.readouterr().out

    texts = [sampled("--seed", seed) for seed in "011"]
    assert texts[1] == texts[2] != texts[0] and all(t.startswith("bale") and t.endswith("\n") for t in texts)
    assert sampled("--temperature", "0", "--seed", "1") == sampled("--temperature", "0") == sampled("--top-p", "0")
    flushed, pieces = [], iter(["a", "b"])

    def spied(*args, end="\n", flush=False):
        flushed.append((args, flush))

    def slowly(*args):
        for piece in pieces:
            flushed.append("asked")
            yield piece

    monkeypatch.setattr(use, "generate", slowly)
    monkeypatch.setattr("builtins.print", spied)
    assert q0.main(["sample", str(run[0]), "--prompt", "p"]) == 0
    assert flushed == [(("p",), True), "asked", (("a",), True), "asked", (("b",), True), ((), False)]


class Fixed(q0.Population):
    """A population whose next token has the distribution `p` whatever came before; `asked` holds the contexts."""
    def log_probs(self, tokens):
        self.asked.append(tokens[0].tolist())
        return torch.tensor(self.p).log().expand(1, tokens.size(1), -1)


def fixed(run, p):
    known = q0.load_population(run[0], k=1)
    made = Fixed(**{f: getattr(known, f) for f in known.__dataclass_fields__})
    vars(made).update(asked=[], p=[0.0] * 300)
    for token, x in p.items():
        made.p[token] = x
    return made


def test_generate(run):
    p = {97: 0.5, 98: 0.25, 99: 0.15, 100: 0.1}  # a b c d
    count = lambda text: np.array([text.count(c) for c in "abcd"]) / len(text)
    drawn = lambda **options: "".join(use.generate(fixed(run, p), "", tokens=2000, **options))
    # a frequency of 2,000 draws has a standard deviation of 1.1% at most
    np.testing.assert_allclose(count(drawn()), [0.5, 0.25, 0.15, 0.1], atol=0.04)
    square = np.array([0.25, 0.0625, 0.0225, 0.01])
    np.testing.assert_allclose(count(drawn(temperature=0.5)), square / square.sum(), atol=0.04)
    np.testing.assert_allclose(count(drawn(top_p=0.75)), [2 / 3, 1 / 3, 0, 0], atol=0.04)  # a and b have it exactly
    np.testing.assert_allclose(count(drawn(top_p=0.76)), np.array([0.5, 0.25, 0.15, 0]) / 0.9, atol=0.04)
    assert set(drawn(temperature=0.0)) == {"a"} and len(drawn()) == 2000
    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)


def test_generate_ends_and_contexts(run):
    ends = fixed(run, {97: 0.9, 299: 0.1})
    text = "".join(use.generate(ends, "ba", tokens=1000))
    assert set(text) == {"a"} and len(text) < 200  # the document's end, and it is not shown
    prompt = ends.encode("ba")
    assert ends.asked[0] == prompt and ends.asked[1] == prompt + [97] and prompt[0] == 299
    assert max(map(len, ends.asked)) <= 64
    long = fixed(run, {97: 1.0})
    "".join(use.generate(long, "b" * 100, tokens=2))
    assert long.asked[1] == (long.encode("b" * 100) + [97])[-64:]
    euro = fixed(run, {0xE2: 1.0})  # half a character is never shown as it stands
    assert "".join(use.generate(euro, "", tokens=1)) == "\ufffd"


# ----------------------------------------------------------------------------------------------------------------------
# average

def weights_of(folder, i):
    return dict(q0.load_member(folder / f"members/{i}").named_parameters())


def averaged(capsys, *argv):
    assert q0.main(["average", *map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("last", [None, 3])
def test_average_is_the_mean_of_weights(last, run, corpus, logs, capsys):
    """One model: weights, predictions and losses are those of the mean worked out here. It is a run like another."""
    out = averaged(capsys, run[0], "--name", "mean", *(["--last", last] if last else []))
    tried = dict(re.findall(r"traj:0 last:(\d+) heldout_loss:(\S+)", out))
    assert list(tried) == ([str(last)] if last else ["1", "2", "4"])
    best = int(min(tried, key=lambda n: float(tried[n])))
    mean, sequences = q0.load_member(run[0] / "members/3"), tokens_of(corpus, "val")
    for n, loss in tried.items():
        members = [weights_of(run[0], i) for i in range(4 - int(n), 4)]
        with torch.no_grad():
            for name, p in mean.named_parameters():  # a sum of float32 in another order: at most one unit of bf16 apart
                p.copy_(torch.stack([m[name] for m in members]).double().mean(0).bfloat16())
        p = q0.true_token_probs(mean, tokens_of(corpus, "heldout"), 8, q0.World())
        assert q0.mixture_loss([p], [1.0]) == pytest.approx(float(loss), abs=1e-4)
        if int(n) == best:
            for name, p in weights_of(logs / "mean", 0).items():
                torch.testing.assert_close(p, dict(mean.named_parameters())[name], rtol=2 ** -7, atol=0)
            val = q0.mixture_loss([q0.true_token_probs(mean, sequences, 8, q0.World())], [1.0])
    result = json.loads((logs / "mean/result.json").read_text())
    assert result["final_val_loss"] == pytest.approx(val, abs=1e-4) and result["curve"][0]["last"] == best
    newest = q0.mixture_loss([predictions_of(run[0])[3]["val"]], [1.0])
    assert f"traj:0 last:{best} val_loss:{result['final_val_loss']:.5f} newest_val_loss:{newest:.5f}" in out
    population = q0.load_population("mean")
    assert population.members == [0] and population.encoding is not None
    again = q0.true_token_probs(population.member(0), sequences, 8, q0.World())
    assert np.array_equal(again, predictions_of(logs / "mean")[0]["val"])
    rows = rows_of(evaluated(capsys, "mean", "--data", corpus / "val.bin"))
    assert rows["learned, 1"][0] == pytest.approx(result["final_val_loss"], abs=1e-5)
    assert [f.name for f in logs.iterdir()] == ["mean"]


def test_average_of_trajectories(corpus, logs, capsys):
    """A mean for each trajectory, of the members whose weights are still there; the prior mixes them."""
    argv = [*MINI, "--data", str(corpus), "--trajectories", "2", "--cycles", "3", "--keep-members", "2", "--run", "two"]
    assert q0.main([*argv, "--report", "dev"]) == 0
    out, by_two = averaged(capsys, "two"), averaged(capsys, "two", "--last", "2", "--name", "by_two")
    assert re.findall(r"traj:(\d) last:(\d) h", by_two) == [("0", "2"), ("1", "2")]
    assert re.findall(r"traj:(\d) last:(\d) h", out) == [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
    result = json.loads((logs / "two_mean/result.json").read_text())
    assert [c["traj"] for c in result["curve"]] == [0, 1] and "dev loss of k members" in out
    assert f"{result['final_dev_loss']:.5f}" == [line.split() for line in out.splitlines() if line[:5] == "   2 "][0][2]
    for j, made in ((j, made) for j in range(2) for made in ("two_mean", "by_two")):
        last = json.loads((logs / made / "result.json").read_text())["curve"][j]["last"]
        members = [weights_of(logs / "two", i) for i in range(3 * j + 3 - last, 3 * j + 3)]
        for name, p in weights_of(logs / made, j).items():
            mean = torch.stack([m[name].float() for m in members]).mean(0)
            torch.testing.assert_close(p.float(), mean, rtol=2 ** -7, atol=0)  # rounded once to bf16
    student = ["--population", "single", "--teacher", "two_mean", "--run", "student"]
    assert q0.main([*MINI, "--data", str(corpus), *student]) == 0
    assert q0.main(["average", "two_mean", "--name", "again"]) == 2
    assert "two_mean holds averages already: average " in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--last", "5"], "has the weights of 4 members of a trajectory: --last 5 is out of range"),
    (["--last", "0"], "has the weights of 4 members of a trajectory: --last 0 is out of range"),
    (["--name", "a/b"], "--name a/b must be a plain name"),
    (["--name", "taken"], "taken exists: give another --name"),
    (["other data"], "does not hold the data of .*copied any more: their hashes differ"),
    (["no settings"], "run.json is missing or damaged"), (["full disk"], "cannot write .*No space left"),
    (["torchrun"], "average needs no torchrun"), (["--device", "cuda"], "torch sees no GPU")])
def test_bad_average(argv, message, copied, logs, monkeypatch, capsys):
    (logs / "taken").mkdir(parents=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if argv == ["full disk"]:
        def full(*args):
            raise q0.SafetensorError("I/O error: No space left on device")
        monkeypatch.setattr(q0, "save_file", full)
    if argv == ["torchrun"]:
        monkeypatch.setenv("WORLD_SIZE", "2")
    if argv[0] in ("other data", "no settings"):
        about = json.loads((copied / "run.json").read_text())
        about["data"]["val.bin"] = "0" * 64
        (copied / "run.json").write_text(json.dumps(about if argv[0] == "other data" else {}))
    argv = argv if argv[0].startswith("--") else []
    assert q0.main(["average", str(copied), *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err), err
    assert [f.name for f in logs.iterdir()] == ["taken"]  # nothing half-written


# ----------------------------------------------------------------------------------------------------------------------
# pool

@pytest.fixture
def trained(corpus, logs):
    """Runs in this process: trained(name, *argv) -> (directory, result)."""
    def made(name, *argv):
        assert q0.main([*MINI, "--data", str(corpus), "--run", name, *map(str, argv)]) == 0
        return logs / name, json.loads((logs / name / "result.json").read_text())
    return made


def pooled(capsys, *argv):
    assert q0.main(["pool", *map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_pooled_runs_are_one_population(trained, corpus, logs, capsys):
    """Members, hashes and predictions of a chain and of q0; one prior over all; every command takes the pool, and a pool
    of pools has the members of all."""
    chain, q0_run, other = (trained(name, "--seed", i, *argv)[0] for i, (name, argv) in enumerate((
        ("chain", ["--population", "chain", "--cycles", "2"]), ("q0", ["--cycles", "4"]), ("other", ["--cycles", "3"]))))
    out = pooled(capsys, "chain", q0_run, "--name", "both")
    result, both = json.loads((logs / "both/result.json").read_text()), predictions_of(logs / "both")
    assert [c["member"] for c in result["curve"]] == [*range(6)] and list(result["pool_of"]) == [str(chain), str(q0_run)]
    assert [c["run"] for c in result["curve"]] == [str(chain)] * 2 + [str(q0_run)] * 4
    for i, (source, own) in enumerate([(chain, 0), (chain, 1), *((q0_run, j) for j in range(4))]):
        mine, theirs = both[i], predictions_of(source)[own]
        assert all(np.array_equal(mine[s], theirs[s]) for s in ("heldout", "val"))
        for name, p in weights_of(logs / "both", i).items():
            assert torch.equal(p, weights_of(source, own)[name])
    heldout, scored = (np.stack([p[s] for p in both]) for s in ("heldout", "val"))
    assert result["final_val_loss"] == pytest.approx(q0.mixture_loss(scored, q0.fit_prior(heldout)[0]), abs=1e-6)
    first = q0.mixture_loss(scored[:2], q0.fit_prior(heldout[:2])[0])
    assert f"run:chain members:2 learned_val_loss:{first:.5f} pooled_val_loss:{first:.5f}" in out
    rows = rows_of(evaluated(capsys, "both", "--data", corpus / "val.bin"))  # members read again, their hashes checked
    learned = [loss for name, (loss, *_) in rows.items() if name.startswith("learned")]
    assert learned == [pytest.approx(result["final_val_loss"], abs=1e-5)]
    assert q0.main(["average", "both"]) == 2
    assert "both is a pool: average the runs it was made of" in capsys.readouterr().err
    assert q0.main(["--resume", "both"]) == 0 and "both is complete" in capsys.readouterr().out
    trained("student", "--population", "single", "--teacher", "both")
    pooled(capsys, "both", "other", "--name", "all")
    assert json.loads((logs / "all/result.json").read_text())["members"] == 9
    assert q0.main(["pool", "both", "chain"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(r"chain brings the members of \S+chain a second time", err), err
    (q0_run / "members/3/model.safetensors").unlink()  # a pool holds its members by itself
    assert q0.load_population("both").member(5)
    assert not (logs / "both_pool").exists() and not list(logs.glob("*.tmp"))


@pytest.mark.parametrize("kind, message", [
    ("other split", "b differs from .*a in data, seq_len"), ("other length", "b differs from .*a in data, seq_len"),
    ("other text", "b differs from .*a in data, seq_len"), ("unfinished", "b is not complete: go on with it"),
    ("damaged", "predictions .*b/predictions/1.safetensors .* damaged"), ("no settings", "b/result.json is missing or damaged"),
    ("taken", "b exists: give another --name"), ("torchrun", "pool needs no torchrun")])
def test_bad_pool(kind, message, trained, logs, monkeypatch, capsys):
    shape = ["--layers", "1", "--cycles", "2"]
    trained("a", *shape)
    argv = {"other split": ["--report", "dev"], "other length": ["--seq-len", "64", "--micro-batch", "8"]}.get(kind, [])
    trained("b", *shape, "--seed", 1, *argv)
    path = logs / "b/result.json"
    about = json.loads(path.read_text())
    if kind == "unfinished":
        path.unlink()
    if kind == "other text":
        path.write_text(json.dumps({**about, "data": {**about["data"], "heldout.bin": "0" * 64}}))
    if kind == "no settings":
        path.write_text(json.dumps({k: v for k, v in about.items() if k != "config"}))
    if kind == "damaged":
        file = logs / "b/predictions/1.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    if kind == "torchrun":
        monkeypatch.setenv("WORLD_SIZE", "2")
    assert q0.main(["pool", "a", "b", *(["--name", "b"] if kind == "taken" else [])]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err), err
    assert sorted(f.name for f in logs.iterdir()) == ["a", "b"]  # nothing half-written


# ----------------------------------------------------------------------------------------------------------------------
# --teacher

def test_population_teaches_one_model(run, trained, corpus, logs, monkeypatch, capsys):
    """The loss of every step is that of the mixture, from the first cycle on; FLOPs count every teacher; the student is
    a member like any other."""
    many, _ = run
    population, checked, training_loss = q0.load_population(many), [], q0.training_loss

    def spied(model, teacher, cfg, tokens):
        loss, ce = training_loss(model, teacher, cfg, tokens)
        with torch.no_grad():
            log_p = population.log_probs(tokens[:, :-1])
            model_, hidden = model.eval(), model(tokens[:, :-1])[0]
            logits = 15 * torch.tanh(hidden.float() @ model.head[:300].to(hidden.dtype).float().T / 15)
            model_.train()
            p, log_q = torch.softmax(log_p / 1.2, -1), torch.log_softmax(logits / 1.2, -1)
            kl = (p * (p.log() - log_q)).sum(-1).mean()
            expected = 0.4 * float(ce) + 0.6 * 1.2 ** 2 * float(kl)
        checked.append((float(loss.detach()), expected))
        return loss, ce

    monkeypatch.setattr(q0, "training_loss", spied)
    student, result = trained("one", "--population", "single", *TAUGHT, many, "--distill-weight", 0.6)
    monkeypatch.undo()
    monkeypatch.setattr(q0, "LOGS", logs)
    found, expected = np.array(checked).T
    assert len(found) == 16  # 8 epochs of 15 or 16 sequences of 64 tokens, 512 a step
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # products of bf16: logits are rounded to 2^-8
    k, (model, teacher) = len(population.members), (result["flops"]["model"], result["flops"]["teacher"])
    assert k > 1 and teacher == pytest.approx(k * model / 3)
    assert [m["distilled"] for m in result["curve"]] == [1]
    assert q0.load_population(student).members == [0]
    data = json.loads((student / "run.json").read_text())["data"]
    assert len(data["teacher"]) == 64
    _, two = trained("two", "--population", "single", *TAUGHT, many, "--teacher-k", 2, *SHORT)
    assert two["flops"]["teacher"] == pytest.approx(2 * two["flops"]["model"] / 3)


def interrupt(monkeypatch):
    """A signal during the ninth micro-batch."""
    training_loss, calls = q0.training_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 9:
            q0.Stopped.signal = 15
        return training_loss(*args)

    monkeypatch.setattr(q0, "training_loss", interrupted)


def test_stopped_student_goes_on(trained, corpus, logs, monkeypatch, capsys):
    trained("many", "--cycles", 4)
    argv = ["--population", "single", "--teacher", "many", "--save-minutes", "0"]
    whole, _ = trained("whole", *argv)
    interrupt(monkeypatch)
    assert q0.main([*MINI, "--data", str(corpus), "--run", "half", *argv]) == 143
    assert q0.main(["--resume", "half"]) == 0
    assert (logs / "half/members/0/model.safetensors").read_bytes() == (whole / "members/0/model.safetensors").read_bytes()


def test_resume_under_another_teacher(trained, corpus, logs, monkeypatch, capsys):
    """A teacher that is no longer the same: the run does not go on as if it were."""
    many, _ = trained("many", "--cycles", 4)
    argv = ["--population", "single", "--teacher", "many"]
    interrupt(monkeypatch)
    assert q0.main([*MINI, "--data", str(corpus), "--run", "half", *argv]) == 143
    shutil.rmtree(many)
    trained("many", "--cycles", 4, "--seed", 5)
    capsys.readouterr()
    assert q0.main(["--resume", "half"]) == 2
    assert "it is of another run" in capsys.readouterr().err


def test_plan_counts_every_teacher(run, corpus, capsys):
    def shown(*argv):
        """FLOPs and the teachers' memory."""
        assert q0.main(["plan", *MINI, "--data", str(corpus), "--population", "single", *TAUGHT, str(run[0]), *argv]) == 0
        out = capsys.readouterr().out
        return [float(re.search(pattern, out)[1]) for pattern in (r"for (\S+) FLOPs", r"teachers (\S+) GB")]

    (one, held), (three, thrice) = shown("--teacher-k", "1"), shown("--teacher-k", "3")
    none, _ = shown("--distill-weight", "0")
    assert (three - none) / (one - none) == pytest.approx(3, rel=0.05)  # shown with three digits
    weights = q0.load_population(run[0], 1).models[0].parameters()
    size = sum(p.numel() * p.element_size() for p in weights) / 1e9
    assert held == pytest.approx(size, rel=0.01) and thrice == pytest.approx(3 * size, rel=0.01)


@pytest.mark.parametrize("argv, message", [
    (["--teacher", "nobody"], "no run nobody under"), (["--teacher", "many", "--softcap", "20"], "is (300, 15.0, 32), this run's (300, 20.0, 32)"),
    (["--teacher", "many", "--seq-len", "64", "--micro-batch", "8"], "this run's (300, 15.0, 64)"), (["--teacher", "many", "--teacher-k", "0"], "--teacher-k 0 is out of range")])
def test_bad_teachers(argv, message, trained, corpus, logs, capsys):
    trained("many", *SHORT)
    capsys.readouterr()
    assert q0.main([*MINI, "--data", str(corpus), "--run", "x", "--population", "single", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
    assert not (logs / "x").exists()
