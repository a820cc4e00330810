"""A population in use: mixtures, select, evaluate, sample and compare; the same under attack, where
a mistake ends in one line and destroys nothing."""
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import Fork, planted
from numpy.testing import assert_allclose
from pytest import approx
from tiny import (
    END, VOCAB, VOCABULARY, build, edit_json, fails, loss_of, make_data, predictions_of,
    random_documents, random_tokens, read_json, sequences_of, shard_bytes, snapshot, works)

import train_q0 as q
from records import generate, plot, runs, use
from records.mixture import Mixture, Text, load_mixture, load_tokenizer


@pytest.fixture(scope="session")
def encoding(corpus):
    return load_tokenizer(corpus)["encoding"]


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
    found = p.gather(2, tokens[:, 1:, None]).flatten()
    expected = mixed.weights @ cached[mixed.members, :len(found)]
    assert_allclose(found, expected, rtol=1e-5)  # of float32, with logits up to 15
    text = "an été of <|endoftext|> words"
    assert mixed.encode(text) == [END, *encoding.encode_ordinary(text)]


COLUMNS = ("loss", "low", "high", "perplexity", "bits", "more", "more_low", "more_high")


def rows_of(out):
    """{name: {column: number}} of the table of losses."""
    _, table = out.split("more than the last row\n")
    table, *_ = table.split("   k ")
    found = {}
    for line in table.splitlines():
        numbers = map(float, re.sub("[()]", " ", line[27:]).replace("n/a", "nan").split())
        found[line[:27].strip()] = dict(zip(COLUMNS, numbers))
    return found


def test_evaluate_against_the_cache(finished, corpus, encoding, capsys):
    """On the run's validation text: losses from its cache, bytes from the decoded text."""
    out = works(capsys, "evaluate", finished, "--data", corpus / "val.bin")
    rows = rows_of(out)
    targets = sequences_of(corpus, "val", 64)[:, 1:].flatten()
    is_text = targets != END
    size = sum(len(encoding.decode_single_token_bytes(t)) for t in targets[is_text])
    assert out.startswith(f"{len(targets)} tokens predicted, {size} bytes, ")
    result = read_json(finished / "result.json")
    learned = np.array(result["table"]["weights"])
    mixtures = {f"learned, {sum(learned > 1e-6)}": learned}
    mixtures["uniform, all 4"] = np.full(4, 0.25)
    for i in range(4):
        mixtures[f"member {i}"] = np.eye(4)[i]
    assert rows.keys() > mixtures.keys()
    P = predictions_of(finished)["val"].astype(np.float64)
    least = loss_of(learned @ P)
    for name, weights in mixtures.items():
        nats = -np.log(weights @ P)
        bits = nats[is_text].sum() / math.log(2) / size
        row = rows[name]
        assert row["loss"] == approx(nats.mean(), abs=1.1e-5)
        assert row["more"] == approx(nats.mean() - least, abs=1e-4)
        assert row["bits"] == approx(bits, abs=1e-4)
    last, = re.findall(r"^   4 .*$", out, re.M)
    uniform = result["uniform_val_loss"]
    assert last.startswith(f"   4   {uniform:.5f}   {result['final_val_loss']:.5f} ")


def test_intervals_are_of_documents(capsys):
    """Each is drawn whole; differences between rows are paired."""
    documents = np.repeat(np.arange(100), 20)
    of_document = np.random.default_rng(0).normal(3, 1, size=100)
    nats = of_document[documents]
    use.print_losses({"a": nats + 0.5, "b": nats}, documents, documents >= 0, 0)
    rows = rows_of(capsys.readouterr().out)
    error = 1.96 * of_document.std() / 10
    low, high = rows["b"]["low"], rows["b"]["high"]
    # single tokens would give a quarter of it
    assert high - nats.mean() == approx(error, rel=0.2)
    assert nats.mean() - low == approx(error, rel=0.2)
    assert rows["a"]["more_low"] == rows["a"]["more_high"] == 0.5


def test_evaluate_without_a_tokenizer(copied, corpus, capsys):
    """Bytes need one; data efficiency, of FineWeb's validation text, does not."""
    edit_json(copied / "data/manifest.json", name="fineweb", tokenizer=None)
    out = works(capsys, "evaluate", copied, "--data", corpus / "val.bin")
    assert " 0 bytes," in out and "\ndata_efficiency:" in out
    assert math.isnan(rows_of(out)["uniform, all 4"]["bits"])


def test_bad_evaluate(finished, tmp_path, capsys):
    shard = tmp_path / "shard.bin"
    for tokens, message in (
            ([END] * 64, "has 64 tokens, fewer than one sequence of 65"),
            ([VOCABULARY] * 650, "beyond the vocabulary of 300")):
        shard.write_bytes(shard_bytes(tokens))
        fails(capsys, message, "evaluate", finished, "--data", shard)


def test_sample_command(finished, capsys):
    """The prompt, then what follows; the seed decides."""
    asked = ("sample", finished, "--prompt", "bale", "--tokens", 20)
    plain = works(capsys, *asked)
    first = works(capsys, *asked, "--seed", 1)
    assert first.startswith("bale") and first.endswith("\n")
    assert first != plain
    assert works(capsys, *asked, "--seed", 1) == first
    cold = works(capsys, *asked, "--temperature", 0)
    assert works(capsys, *asked, "--top-p", 0, "--seed", 1) == cold
    two = works(capsys, *asked, "--samples", 2)
    assert two.startswith(f"--- sample 0\n{plain}--- sample 1\nbale")
    fails(capsys, "argument --temperature: .*nan", *asked, "--temperature", "nan")


class Letters:
    """An encoding of bytes."""
    eot_token = VOCAB - 1
    n_vocab = VOCAB

    def encode_ordinary(self, text):
        return [*text.encode()]

    def decode_single_token_bytes(self, token):
        return bytes([token])


@pytest.mark.parametrize("temperature, top_p, expected", [
    (0.5, 1, [72.5, 18.1, 6.5, 2.9]),  # in proportion to the squares
    (1, 0.75, [66.7, 33.3, 0, 0]),  # the first two have it exactly
    (1, 0.76, [55.6, 27.8, 16.7, 0])])
def test_frequencies_of_what_is_drawn(temperature, top_p, expected):
    log_p = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    text = Text(Letters(), 0)
    drawn = [text.draw(log_p, temperature, top_p) for _ in range(1000)]
    percent = np.bincount(drawn, minlength=4) / 10
    assert_allclose(percent, expected, atol=6)  # deviations are 1.6 at most


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """mixed(options) -> a mixture of members with all features, and one of another shape."""
    folder = tmp_path_factory.mktemp("generate")
    every = dict(layers=3, loop_first=1, loop_last=1, loop_passes=2, dropout=0.1)
    fewer = dict(windows="L", unet=False, loop_passes=1, smear=False, induction=False,
                 head_mixing=False, mtp_weight=0.0)
    for i, changes in enumerate((every, every, every | fewer)):
        model = build(i, **changes)
        q.save_member(folder / f"members/{i}", model.cfg, VOCAB, dict(model.named_parameters()), {})

    def make(**options):
        return Mixture(
            folder, members=[2, 0, 1], weights=[0.5, 0.3, 0.2], heldout=np.ones((3, 1)),
            kept=[0, 1, 2], device=torch.device("cpu"), gate=None, manifest={},
            encoding=Letters(), **options)
    return make


def test_log_probs(mixed, monkeypatch):
    """At every position, also beyond the context: there the newer half and what follows count."""
    monkeypatch.setattr(generate, "READ_ROWS", 4)  # a long text is read in parts
    mixture = mixed()
    tokens = random_tokens(2, 27)  # the window moves twice
    tokens[:, :5] = tokens[:1, :5]
    reader = mixture.reader()
    found = [reader.read(tokens[:1, :5]).expand(2, -1)]
    reader.repeat(2)
    for token in tokens[:, 5:].split(1, dim=1):
        found.append(reader.read(token))
    start = 0
    wanted = mixture.log_probs(tokens[:, :16])
    for end, log_p in enumerate(found, start=5):
        if end - start > 16:
            start += 8
            wanted = mixture.log_probs(tokens[:, start:start + 16])
        # float32, products of other shapes
        torch.testing.assert_close(log_p, wanted[:, end - start - 1], atol=2e-5, rtol=0)


def plain_text(mixture, prompt, tokens, number):
    """Sample `number` without caches."""
    text = Text(mixture.encoding, q.seed_of("sample", 7, number))
    context = mixture.encode(prompt)[-16:]
    pieces = ""
    for _ in range(tokens):
        log_p = mixture.log_probs(torch.tensor([context]))[0, -1]
        context.append(text.draw(log_p, 1.0, 0.9))
        pieces += text.piece(context[-1])
        if len(context) > 16:
            context = context[8:]
    return pieces + text.piece(None)


def test_samples(mixed, capsys):
    """Each is what it is without caches, and without the others; also where members are read from
    the disk for every token."""
    one = mixed()
    two = mixed(samples=2, stream=True)
    prompt = "HARE AND HOUND ARE OLD"
    options = dict(tokens=10, top_p=0.9, seed=7)
    texts = ["".join(text) for text in zip(*two.write(prompt, **options))]
    assert texts == [plain_text(one, prompt, 10, i) for i in range(2)]
    assert texts[0] != texts[1]
    assert "read from the disk" in capsys.readouterr().err
    assert "".join(one.generate(prompt, **options)) == texts[0]


def test_place():
    """One device after the other, a tenth of each is left; None where the last is too small."""
    files = [SimpleNamespace(shape="a", bytes_on=lambda device, texts: 40 * texts)] * 4
    found = generate.place(files, [("x", 100), ("y", 30), ("z", 100)], 1)
    sizes = {key: len(group) for key, group in found.items()}
    assert sizes == {("x", "a"): 2, ("z", "a"): 2}
    assert generate.place(files, [("x", 100), ("z", 80)], 1) is None


def test_compare(finished, tmp_path, capsys):
    """Curves of logs, where one reaches another's loss, and the best members of a budget."""
    result = read_json(finished / "result.json")
    log = finished / "log.txt"
    found = plot.curve(log)
    epochs, spent, losses = found.T
    assert epochs.tolist() == [6, 12, 18, 24]
    assert spent[-1] == approx(result["flops"], 1e-3)
    assert_allclose(losses, [entry["learned"] for entry in result["curve"]], atol=1e-5)
    between = losses[1:3].mean()
    for loss, at in ((between, 15), (losses.min() - 1, np.nan)):
        assert_allclose(plot.reached([found], loss, plot.EPOCHS), [at])
    for name in ("old", "old_mean"):
        shutil.copytree(finished, tmp_path / name)
    (tmp_path / "old_mean/log.txt").unlink()
    (tmp_path / "old.png").touch()
    row = f"b={tmp_path}/old*"
    plot.compare([str(finished), row, "--out", f"{tmp_path}/x.png"])
    out, said = capsys.readouterr()
    assert said.endswith(": old.png (a picture); old_mean (made of other runs: compare those)\n")
    fails(capsys, "has no curve of training: old_mean .made of", "compare", tmp_path / "old_mean")
    assert (tmp_path / "x.png").stat().st_size > 5000
    lines = [line.split() for line in out.splitlines()]
    pruned = f"{result['table']['rows'][1]['pruned']:.4f}"
    assert ["best", "2", pruned, pruned] in lines


def test_verdict():
    """A t-test worked out by hand: t(0.99, df 8) = 2.896, times 0.01581 * sqrt(2 / 5)."""
    first = [np.array([[2.0, 1e9, 4 + i / 100]]) for i in range(5)]
    assert plot.compared(first, first) == "5 | 4.0200 ± 0.0158 | - | - | -"
    for difference, verdict in ((0.028, "equal"), (0.03, "worse"), (-0.03, "better")):
        other = [curve + [0, 0, difference] for curve in first]
        assert plot.compared(first, other).endswith(f"{difference:+.4f} | 0.0290 | {verdict}")
    assert plot.compared(first, [curve + 1 for curve in first[:3]]).endswith("worse (n < 5)")


def with_tokenizer(**entry):
    """Damage: another entry of the manifest."""
    def damage(run):
        known = read_json(run / "data/manifest.json")["tokenizer"]
        edit_json(run / "data/manifest.json", tokenizer={**known, **entry})
    return damage


def other_member(run):
    shutil.rmtree(run / "members/1")
    shutil.copytree(run / "members/0", run / "members/1")


@pytest.mark.parametrize("damage, message", [
    (other_member, "member .*members/1 is missing or damaged: .*sha256"),
    (with_tokenizer(eot=255), "tokenizer .* is missing or damaged: .*ranks must be distinct")])
def test_hostile_files(damage, message, copied, corpus, capsys):
    damage(copied)
    fails(capsys, message, "evaluate", copied, "--data", corpus / "val.bin")


def test_what_a_mixture_cannot_read(finished, copied, capsys):
    with pytest.raises(q.UserError, match="65 tokens are more than the 64 that members of"):
        load_mixture(finished).log_probs(torch.zeros(1, 65, dtype=torch.long))
    edit_json(copied / "data/manifest.json", tokenizer=None)
    fails(capsys, "has no tokenizer", "sample", copied)


def test_another_tokenizer(finished, tmp_path, capsys):
    """Of as many entries."""
    foreign = make_data(tmp_path / "foreign", random_documents(1400, seed=3))
    fails(capsys, "has another tokenizer than the data of .*first", "evaluate", finished, "--data",
          foreign / "val.bin")


def test_members_without_weights(copied, corpus, capsys):
    """The prior is fitted to the others; every command says so and goes on."""
    for i in (0, 2):
        (copied / f"members/{i}/model.safetensors").unlink()
    mixed = load_mixture(copied)
    assert "copied has no weights of members 0, 2 (--keep-" in capsys.readouterr().err
    weights, _ = q.fit_prior(predictions_of(copied)["heldout"][[1, 3]])
    found = dict(zip(mixed.members, mixed.weights))
    for i, weight in zip((1, 3), weights):
        assert found.get(i, 0) == pytest.approx(weight, abs=1e-5)
    out = works(capsys, "evaluate", copied, "--data", corpus / "heldout.bin")
    names = [line[:27].strip() for line in out.splitlines()[2:4]]
    assert names == ["member 1", "member 3"] and "uniform, all 2" in out


def test_what_a_kill_left_goes_and_nothing_else(finished, tmp_path):
    logs = tmp_path / "logs"
    Fork(logs, "pool", finished, plant=planted(runs, "finish", 1)).dies()
    left, = logs.iterdir()
    assert runs.MAKING.fullmatch(left.name)
    kept = shutil.copytree(finished, logs / "first_pool.tmp")
    run = shutil.copytree(finished, logs / left.name.replace(left.name[-15:-7], "abcdefgh"))
    before = snapshot(kept)
    Fork(logs, "pool", finished).good()
    assert not left.exists()
    assert snapshot(kept) == snapshot(run) == before
    assert (logs / "first_pool/result.json").exists()
