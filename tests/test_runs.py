"""Runs made of runs: average, pool, and a whole run as teacher (`--teacher`)."""
import re
import shutil

import numpy as np
import pytest
import torch
from forks import weights_of
from numpy.testing import assert_allclose
from pytest import approx
from safetensors.torch import load_file
from tiny import (
    MINI, VOCABULARY, edit_json, fails, loss_of, predictions_of, read_json, run_in, sequences_of,
    snapshot, works)

import train_q0 as q
from records import population
from records.mixture import load_mixture
from records.population import load_member


def result_of(run):
    return read_json(run / "result.json")


def assert_mean(run, j, source, members):
    """That member j of a run is the mean of members of another, rounded once to bf16."""
    files = [source / f"members/{i}/model.safetensors" for i in members]
    found = [load_file(file) for file in files]
    for name, weight in load_file(run / f"members/{j}/model.safetensors").items():
        mean = torch.stack([w[name].double() for w in found]).mean(0)
        # a sum of float32 in another order: at most one unit of bf16 apart
        torch.testing.assert_close(weight.double(), mean, rtol=2 ** -7, atol=1e-12)


@pytest.fixture(scope="module")
def trained_once(corpus, tmp_path_factory):
    """A folder with a chain of two members, and a q0 of two trajectories of two members."""
    logs = tmp_path_factory.mktemp("logs")
    for name, flags in (("chain", "--population chain"), ("q0", "--trajectories 2 --seed 1")):
        run_in(logs, *MINI, "--cycles", 2, "--data", corpus, "--run", name, *flags.split())
    return logs


@pytest.fixture
def chain(trained_once, logs):
    return shutil.copytree(trained_once / "chain", logs / "chain")


@pytest.fixture
def four(trained_once, logs):
    return shutil.copytree(trained_once / "q0", logs / "q0")


def test_average_is_the_mean_of_weights(finished, corpus, logs, capsys):
    """Held-out text chooses how many; predictions and losses are those of the mean. It is a run."""
    out = works(capsys, "average", finished, "--name", "mean")
    shown = dict(re.findall(r"traj:0 last:(\d+) heldout_loss:(\S+)", out))
    assert list(shown) == ["1", "2", "4"]
    best = int(min(shown, key=lambda count: float(shown[count])))
    made = logs / "mean"
    assert_mean(made, 0, finished, range(4 - best, 4))
    model = load_member(made / "members/0")
    cached = predictions_of(made)
    for split, p in cached.items():
        sequences = sequences_of(corpus, split, 64)
        assert np.array_equal(p[0], q.true_token_probs(model, sequences, 16, q.World()))
    assert float(shown[str(best)]) == approx(loss_of(cached["heldout"]), abs=1e-5)
    loss = result_of(made)["final_val_loss"]
    assert loss == approx(loss_of(cached["val"]), abs=1e-6)
    newest = loss_of(predictions_of(finished)["val"][3])
    assert f"traj:0 last:{best} val_loss:{loss:.5f} newest_val_loss:{newest:.5f}" in out
    fails(capsys, "holds averages already: average first,", "average", "mean", "--name", "again")


def test_pooled_runs_are_one_population(chain, four, logs, capsys):
    """Members, hashes and predictions of a chain and of q0; one prior over all."""
    out = works(capsys, "pool", "chain", four, "--name", "both")
    both = logs / "both"
    result = result_of(both)
    assert list(result["pool_of"]) == ["chain", "q0"]
    sources = [(entry["member"], entry["run"]) for entry in result["curve"]]
    assert sources == list(enumerate(["chain"] * 2 + ["q0"] * 4))
    assert not any(str(logs).encode() in data for data in snapshot(both).values())
    found = predictions_of(both)
    for split, p in found.items():
        parts = [predictions_of(run)[split] for run in (chain, four)]
        assert np.array_equal(p, np.concatenate(parts))
    for i, source in sources:
        theirs = logs / source / f"members/{i - 2 if i >= 2 else i}"
        assert snapshot(both / f"members/{i}") == snapshot(theirs)
    weights, _ = q.fit_prior(found["heldout"])
    loss = population.mixture_loss(found["val"], weights)
    assert result["final_val_loss"] == approx(loss, abs=1e-6)
    alone = result_of(chain)["final_val_loss"]
    assert f"run:chain members:2 learned_val_loss:{alone:.5f} pooled_val_loss:{alone:.5f}" in out


def test_a_pool_is_a_run(chain, four, corpus, logs, capsys):
    """Every command takes it, another pool too, also one that names the folders of its runs."""
    edit_json(four / "result.json", data={**result_of(four)["data"], "tokenizer": "1"})
    works(capsys, "pool", "chain", "--name", "one")
    config, = result_of(logs / "one")["pool_of"].values()
    edit_json(logs / "one/result.json", pool_of={"/a/chain": config, "/b/chain": config})
    works(capsys, "pool", "one", "q0", "--name", "chain_pool")
    pooled = logs / "chain_pool"
    assert list(result_of(pooled)["pool_of"]) == ["chain", "chain2", "q0"]
    loss = result_of(pooled)["final_val_loss"]
    out = works(capsys, "evaluate", pooled, "--data", corpus / "val.bin")
    assert re.search(rf" learned, \d  {loss:.5f} ", out)
    fails(capsys, "pool: average the runs it was made of: chain, chain2", "average", "chain_pool")
    works(capsys, "count", "chain_pool")
    counted = result_of(logs / "chain_pool_counted")
    assert (counted["members"], counted["loss_before"]) == (9, loss)
    fails(capsys, "chain brings the members of chain a second", "pool", "chain_pool", "chain")
    (four / "members/2/model.safetensors").unlink()  # a pool holds its members by itself
    assert load_mixture("chain_pool").member(4)


def test_bad_pool(chain, four, logs, capsys):
    data = result_of(four)["data"]
    edit_json(four / "result.json", data={**data, "heldout": []})
    fails(capsys, "q0 differs from .*chain in .*data.*: runs", "pool", "chain", "q0")
    (four / "result.json").unlink()
    fails(capsys, "q0 is not complete: go on with it", "pool", "chain", "q0")
    fails(capsys, "no run nobody under .*: the command `runs` lists", "pool", "chain", "nobody")
    assert sorted(f.name for f in logs.iterdir()) == ["chain", "q0"]  # nothing half-written


SIZES = ["--seq-len", 64, "--micro-batch", 8]  # of `finished`, whose prior mixes several members
SINGLE = ["--population", "single", "--teacher"]


def test_population_teaches_one_model(finished, trained, monkeypatch):
    """The loss of every step is that of the mixture, from the first cycle on."""
    mixed = load_mixture(finished)
    found = []
    expected = []
    training_loss = q.training_loss

    def spied(model, teacher, cfg, tokens):
        loss, ce = training_loss(model, teacher, cfg, tokens)
        with torch.no_grad():
            log_p = mixed.log_probs(tokens[:, :-1])
            hidden, _ = model.eval()(tokens[:, :-1])
            model.train()
            logits = 15 * torch.tanh(hidden @ model.head[:VOCABULARY].T / 15)
            log_p = (log_p / 1.2).log_softmax(-1)
            log_q = (logits / 1.2).log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            total = 0.4 * ce + 0.6 * 1.2 ** 2 * kl
        found.append(loss.item())
        expected.append(total.item())
        return loss, ce

    monkeypatch.setattr(q, "training_loss", spied)
    student = trained("one", *SIZES, *SINGLE, finished, "--distill-weight", 0.6)
    assert len(found) >= 15  # 8 epochs of 15 or 16 sequences, 8 a step
    assert_allclose(found, expected, rtol=1e-4)
    result = result_of(student)
    # more than one member of the student's size
    assert result["teacher_flops"] > (result["flops"] - result["teacher_flops"]) / 3


def test_stopped_student_goes_on(four, trained, flags, logs, monkeypatch, capsys):
    """Under the same teacher alone."""
    calls = []
    training_loss = q.training_loss

    def heard(*args):
        calls.append(1)
        if len(calls) == 9:
            patch.setattr(q.Stopped, "signal", 15)
        return training_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(q, "training_loss", heard)
        assert q.main([*flags, *SINGLE, "q0"]) == 143
    kept = four.rename(logs / "kept")
    trained("q0", "--cycles", 2)
    fails(capsys, "x exists and differs in teacher", "--resume", "x")
    shutil.rmtree(four)
    kept.rename(four)
    works(capsys, "--resume", "x")
    assert weights_of(logs / "x") == weights_of(trained("whole", *SINGLE, "q0"))
