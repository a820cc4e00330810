"""Downstream tasks from a data folder's validation documents, for lm-evaluation-harness, offline.

    python data/tasks.py --data data/wiki --out data/wiki_tasks
    python train_q0.py evaluate RUN --tasks q0_swap,q0_continuation,q0_cloze \\
        --task-folder data/wiki_tasks

Each is a .yaml in the harness's format and a .jsonl of multiple-choice items, the same for the same
data and seed:
  q0_swap          64 tokens, and the same with two adjacent words swapped (chance 1/2)
  q0_continuation  after 96 tokens: the next 32, and such 32 of three other documents (chance 1/4)
  q0_cloze         a word and what follows it, and the same after four words as frequent in training
                   text (chance 1/5)
"""
import argparse
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prepare import (
    HEADER_BYTES, Fail, Parser, brief, check_file, count, explain, file_sha256, listed_files,
    load_bpe, new_folder, sweep)


def load(folder):
    """(tiktoken.Encoding, {split: [tokens of a document, <|endoftext|> first]}) of a data folder.
    Fail: no tokenizer, or files other than the manifest's. OSError: unreadable."""
    check_file(folder / "manifest.json")
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        eot = manifest["eot"]
        tokenizer = manifest["tokenizer"].get("file")
        hashes = listed_files(manifest, ("train", "val"))
        files = {split: manifest["splits"][split]["files"] for split in ("train", "val")}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Fail(f"{folder}/manifest.json is damaged ({brief(error)}): prepare the data again"
                   ) from error
    if tokenizer is None:
        raise Fail(f"{folder} has no tokenizer to turn tokens into text: prepare it where GPT-2's "
                   "can be loaded")
    for name in hashes:
        check_file(folder / name)
    for name, sha256 in hashes.items():
        if file_sha256(folder / name) != sha256:
            raise Fail(f"{folder / name} is damaged (its SHA-256 is not the manifest's): prepare "
                       "the data again")
    documents = {split: read_shards(folder, entries, eot) for split, entries in files.items()}
    return load_bpe((folder / tokenizer).read_bytes()), documents


def read_shards(folder, files, eot):
    paths = [folder / file["name"] for file in files]
    tokens = [np.fromfile(path, dtype="<u2", offset=HEADER_BYTES) for path in paths]
    tokens = np.concatenate(tokens)
    return np.split(tokens, np.flatnonzero(tokens == eot))[1:]


@dataclass
class Item:
    document: int  # its number among the validation documents
    context: str
    true: str
    false: list


def word_edges(encoding, tokens):
    """Places where a word begins, and both ends."""
    edges = {0, len(tokens)}
    pieces = encoding.decode_tokens_bytes(tokens)
    for place, (before, after) in enumerate(zip(pieces, pieces[1:]), 1):
        if after[:1] == b" " and not before[-1:].isspace():
            edges.add(place)
    return edges


def passages(encoding, documents, rng, *lengths):
    """[(number of a document, its text in parts)], shuffled: disjoint passages, each of parts of
    exactly `lengths` tokens. A part starts and ends where a word does, so that its text, tokenized
    alone or after the others, gives these tokens again: the harness does that, and a choice must
    not be told by how it was cut."""
    found = []
    for number, document in enumerate(documents):
        tokens = document[1:].tolist()
        edges = word_edges(encoding, tokens)
        end = 0  # of the passage before
        for start in range(len(tokens) - sum(lengths) + 1):
            cuts = [start + sum(lengths[:i]) for i in range(len(lengths) + 1)]
            if start < end or not edges.issuperset(cuts):
                continue
            parts = [tokens[a:b] for a, b in zip(cuts, cuts[1:])]
            texts = [encoding.decode(part) for part in parts]
            again = [encoding.encode_ordinary(text) for text in texts]
            if again == parts and "\ufffd" not in "".join(texts):
                found.append((number, texts))
                end = cuts[-1]
    return rng.sample(found, len(found))


def swap(encoding, documents, rng):
    """Yield an Item at a time, as all tasks do."""
    for number, (text,) in passages(encoding, documents["val"], rng, 64):
        words = text.split(" ")
        places = []
        for i in range(2, len(words) - 1):  # a capital letter at the beginning would tell
            first = words[i]
            second = words[i + 1]
            if first.isalpha() and second.isalpha() and first.lower() != second.lower():
                places.append(i)
        if places:
            i = rng.choice(places)
            swapped = [*words[:i], words[i + 1], words[i], *words[i + 2:]]
            yield Item(number, "", text, [" ".join(swapped)])


def continuation(encoding, documents, rng):
    found = passages(encoding, documents["val"], rng, 96, 32)
    for number, (context, true) in found:
        others = {}  # one of a document
        for other, (_, text) in rng.sample(found, min(50, len(found))):
            if other != number and text != true:
                others[other] = text
        false = list(dict.fromkeys(others.values()))[:3]
        if len(false) == 3:
            yield Item(number, context, true, false)


def rank_words(encoding, documents):
    """Words by their frequency in documents, the most frequent first."""
    counts = Counter()
    for tokens in documents:
        counts.update(encoding.decode(tokens[1:].tolist()).split(" "))
    ranked = [word for word, _ in counts.most_common()]
    return [word for word in ranked if len(word) >= 4 and word.isalpha() and word.islower()]


def cloze(encoding, documents, rng):
    """False words are four of the 20 next in frequency; a choice holds the rest of its passage, 12
    to 20 tokens."""
    ranked = rank_words(encoding, documents["train"])
    rank = {word: i for i, word in enumerate(ranked)}
    for number, (text,) in passages(encoding, documents["val"], rng, 80):
        words = text.split(" ")
        places = []
        for i in range(2, len(words) - 1):
            rest = " ".join(["", *words[i + 1:]])
            if words[i] in rank and words[i - 1].isalpha():  # isalpha: no full stop before it
                if 12 <= len(encoding.encode_ordinary(rest)) <= 20:
                    places.append((i, rest))
        if places and len(ranked) >= 5:
            i, rest = rng.choice(places)
            word = words[i]
            first = max(0, min(rank[word] - 10, len(ranked) - 21))
            near = [other for other in ranked[first:first + 21] if other != word]
            false = [f" {other}{rest}" for other in rng.sample(near, 4)]
            yield Item(number, " ".join(words[:i]), f" {word}{rest}", false)


METRICS = {swap: ["acc"], continuation: ["acc", "acc_norm"], cloze: ["acc"]}


def choices_of(found, number):
    """At most `number` lines of a task's .jsonl."""
    made = []
    for i, item in zip(range(number), found):
        label = i % (len(item.false) + 1)  # every place is equally often the true one
        choices = [*item.false[:label], item.true, *item.false[label:]]
        made.append({
            "document": item.document,
            "context": item.context,
            "choices": choices,
            "label": label})
    return made


def describe(name, items, metrics):
    """A task's .yaml; the path of its items is absolute, as another would count from where the
    harness is started."""
    scores = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "target_delimiter": "",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metadata": {"version": 1.0},
        "metric_list": scores}


def to_json(value):
    return json.dumps(value, ensure_ascii=False)


def make(data, out, items, seed):
    """Write the folder of tasks and say how many items each has. Fail: bad data, no items, a
    foreign `out`. OSError."""
    out = out.resolve()
    sweep(out)
    ours = {f"q0_{task.__name__}{end}" for task in METRICS for end in (".yaml", ".jsonl")}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - ours):
        raise Fail(f"{out} exists and was not written by this script: choose another --out")
    encoding, documents = load(data)
    with new_folder(out, replace=True) as new:
        for task, metrics in METRICS.items():
            name = f"q0_{task.__name__}"
            found = task(encoding, documents, random.Random(f"{name} {seed}"))
            made = choices_of(found, items)
            if not made:
                raise Fail(f"the validation documents of {data} are too few or too short: they "
                           f"give 0 items of {name}; prepare more text, or a larger val split")
            fewer = f" of {items}, the documents give no more" if len(made) < items else ""
            print(f"{name}: {len(made)} items{fewer}")
            lines = [to_json(item) + "\n" for item in made]
            (new / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            config = describe(name, out / f"{name}.jsonl", metrics)
            lines = [f"{key}: {to_json(value)}\n" for key, value in config.items()]  # JSON is YAML
            (new / f"{name}.yaml").write_text("".join(lines), encoding="utf-8")


def main(argv=None):
    """Returns the exit status: 0; 2 after one line about what is wrong; 130 when interrupted."""
    parser = Parser(prog="tasks.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder that prepare.py wrote")
    add("--out", type=Path, required=True, help="folder to write")
    add("--items", type=count, default=500, help="of each task, at most (default 500)")
    add("--seed", type=int, default=0, help="of passages, words and order (default 0)")
    try:
        make(**vars(parser.parse_args(argv)))
    except (Fail, OSError, MemoryError, UnicodeError) as error:
        print(f"tasks.py: error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tasks.py: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
