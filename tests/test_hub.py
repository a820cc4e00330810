"""Runs on the hub: what push uploads, what hf:USER/NAME downloads, and each mistake in one line.
The hub is a server on this machine (hub_server.py), from which the real client downloads; what
that would upload goes there as it is."""
import shutil
from types import SimpleNamespace

import hub_server
import numpy as np
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import disable_progress_bars
from tiny import edit_json, fails, flip, read_json, snapshot, works

import train_q0 as q
from records.hub import files_of
from records.mixture import load_mixture
from records.population import read_predictions

SMALL_FILES = {
    "run.json", "result.json", "log.txt", "data/manifest.json", "data/tokenizer.tiktoken"}
PREDICTIONS = {f"predictions/{i}.safetensors" for i in range(4)}


def weights(member):
    return {f"members/{member}/config.json", f"members/{member}/model.safetensors"}


@pytest.fixture
def two_runs(finished, tmp_path, monkeypatch):
    """logs/ with a run twice, once with other predictions of a member."""
    monkeypatch.setattr(q, "LOGS", tmp_path / "logs")
    for name in ("one", "two"):
        shutil.copytree(finished, q.LOGS / name)
    two = q.LOGS / "two"
    path = two / "predictions/0.safetensors"
    other = {split: np.roll(p, 3) for split, p in read_predictions(path).items()}
    q.save_file(other, path)
    curve = read_json(two / "result.json")["curve"]
    curve[0] |= q.hashes_of(two, 0)
    edit_json(two / "result.json", curve=curve)


@pytest.fixture
def empty_hub(two_runs, tmp_path, monkeypatch):
    """And the hub's client, as the environment of a user would set it up."""
    disable_progress_bars()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    with hub_server.running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)

        def create_repo(api, repo, private, exist_ok):
            server.models.setdefault(repo, hub_server.Model(private=bool(private)))

        def create_commit(api, repo, operations, commit_message):
            model = server.models[repo]
            files = files_at(server, repo) if model.commits else {}
            for operation in operations:
                name = operation.path_in_repo
                files.pop(name, None)
                if isinstance(operation, CommitOperationAdd):
                    with operation.as_file() as file:
                        files[name] = file.read()
            return SimpleNamespace(oid=model.commit(files))

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        yield server


@pytest.fixture
def hub(empty_hub):
    """With both runs, as a push leaves them, and a file that nobody asked for."""
    for name in ("one", "two"):
        files = {file: path.read_bytes() for file, path in files_of(q.LOGS / name).items()}
        model = empty_hub.models[f"alice/{name}"] = hub_server.Model()
        model.commit({**files, "pytorch_model.bin": b"a pickle"})
    return empty_hub


def fetched(hub):
    """Files downloaded since the last call."""
    paths = [path.split("/", 5)[5] for method, path in hub.log
             if method == "GET" and "/resolve/" in path]
    hub.log.clear()
    return set(paths)


def files_at(hub, name):
    """Of the newest commit."""
    model = hub.models[name]
    return dict(model.commits[model.newest])


def pinned(hub, name="alice/one"):
    return f"hf:{name}@{hub.models[name].newest}"


def test_push(empty_hub, capsys):
    """All that others need, in one commit, and a card. Of a run that was there before what it alone
    had is gone; what is no run's file stays."""
    out = works(capsys, "push", "one", "alice/one", "--private")
    model = empty_hub.models["alice/one"]
    assert model.private and len(model.commits) == 1
    first = pinned(empty_hub)
    assert first in out
    files = files_at(empty_hub, "alice/one")
    card = files.pop("README.md").decode()
    members = set.union(*map(weights, range(4)))
    assert set(files) == SMALL_FILES | PREDICTIONS | members | {"curve.png"}
    assert files == {name: (q.LOGS / "one" / name).read_bytes() for name in files}
    row = read_json(q.LOGS / "one/result.json")["table"]["rows"][3]
    assert f"| 4 | {row['uniform']:.5f} | {row['learned']:.5f} | {row['pruned']:.5f} |" in card
    (q.LOGS / "two/curve.png").unlink()
    model.commit({**files, "notes.md": b"mine"})
    about = read_json(q.LOGS / "two/run.json")
    edit_json(q.LOGS / "two/run.json", config=about["config"] | {"data": "/home/alice/text"})
    q.main(["push", "two", "alice/one"])
    assert "everyone can read in its settings: /home/alice/text" in capsys.readouterr().err
    files = files_at(empty_hub, "alice/one")
    assert "curve.png" not in files and files["notes.md"] == b"mine"
    assert works(capsys, "select", "hf:alice/one") == works(capsys, "select", "two")
    assert works(capsys, "select", first) == works(capsys, "select", "one")


def test_pushes_that_are_refused(hub, capsys):
    flip(q.LOGS / "one/members/2/model.safetensors")
    fails(capsys, "members/2 is .*damaged: .*sha256 of model", "push", "one", "alice/new")
    assert "alice/new" not in hub.models
    hub.models["alice/one"].commit({"config.json": b"{}"})
    said = "alice/one is no run, it has config.json: give another name"
    fails(capsys, said, "push", "two", "alice/one")
    fails(capsys, "is there and public", "push", "two", "alice/two", "--private")
    assert len(hub.models["alice/two"].commits) == 1
    (q.LOGS / "two/result.json").unlink()
    fails(capsys, "is not finished: go on with it", "push", "two", "alice/two")


def test_only_what_is_needed_is_downloaded(hub, corpus, capsys, monkeypatch):
    """Once; then it needs no network."""
    known = works(capsys, "select", "one", "--k", 2)
    chosen = load_mixture("one", k=2).members
    assert works(capsys, "select", "hf:alice/one", "--k", 2) == known
    assert fetched(hub) == SMALL_FILES | PREDICTIONS
    sample = ("--k", 2, "--prompt", "ba", "--tokens", 5)
    known = works(capsys, "sample", "one", *sample)
    assert works(capsys, "sample", "hf:alice/one", *sample) == known
    assert fetched(hub) == set.union(*map(weights, chosen))
    out = works(capsys, "evaluate", "hf:alice/one", "--k", 2, "--data", corpus / "val.bin")
    assert [f"member {i} " in out for i in range(4)] == [i in chosen for i in range(4)]
    assert not fetched(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert works(capsys, "sample", "hf:alice/one", *sample) == known
    assert not hub.log


def test_runs_of_runs(hub, capsys):
    """They outlive the cache, and say what they were made of."""
    works(capsys, "pool", "hf:alice/one", "hf:alice/two")
    works(capsys, "average", "hf:alice/two", "--last", 2)
    names = [pinned(hub), pinned(hub, "alice/two")]
    shutil.rmtree(constants.HF_HUB_CACHE)
    pool = q.LOGS / "alice_one_pool"
    result = read_json(pool / "result.json")
    assert list(result["pool_of"]) == names
    assert [entry["run"] for entry in result["curve"]] == 4 * names[:1] + 4 * names[1:]
    assert snapshot(pool / "members/4") == snapshot(q.LOGS / "two/members/0")
    assert read_json(q.LOGS / "alice_two_mean/result.json")["average_of"] == names[1]


def test_models_that_are_no_population(hub, capsys):
    """One that was changed, then half of one."""
    name = "members/3/model.safetensors"
    model = hub.models["alice/two"]
    files = files_at(hub, "alice/two")
    model.commit({**files, name: b"other"})
    said = "members/3 is .*damaged: .*sha256"
    fails(capsys, said, "sample", pinned(hub, "alice/two"), "--tokens", 1)
    del files[name]
    model.commit(files)
    said = f"{name}: it is not there: this is no population that `push`"
    fails(capsys, said, "sample", pinned(hub, "alice/two"), "--tokens", 1)


def test_models_that_are_not_found(hub, capsys, monkeypatch):
    for name, message in (
            ("hf:alice/one@../../x", "is not the name of a run on the hub"),
            ("hf:alice/none", "hf:alice/none: no such model on the hub, or a private one"),
            ("hf:alice/one@v9", "hf:alice/one@v9: it has no such revision")):
        fails(capsys, message, "select", name)
    works(capsys, "select", "hf:alice/two")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    fails(capsys, "hf:alice/one: .*refused .no network", "select", "hf:alice/one")
    load_mixture("hf:alice/two")
    assert "as the cache has it: no network" in capsys.readouterr().err
