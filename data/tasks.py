"""Downstream tasks from a data folder's validation documents, for EleutherAI's lm-evaluation-harness, offline.

    python data/tasks.py --data data/wiki --out data/wiki_tasks
    python train_q0.py evaluate RUN --tasks q0_swap,q0_continuation,q0_cloze --task-folder data/wiki_tasks

Each is a .yaml in the harness's format and a .jsonl of multiple-choice items, the same for the same data and seed:
  q0_swap          a passage of 64 tokens, and the same with two adjacent words swapped (chance 1/2)
  q0_continuation  after 96 tokens: the next 32, and such 32 of three other documents (chance 1/4)
  q0_cloze         a word and what follows it, and the same after four words as frequent in training text (chance 1/5)
"""
import argparse
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from prepare import HEADER_BYTES, Fail, Parser, brief, count, file_sha256, load_bpe, new_folder


def load(folder):
    """(tiktoken.Encoding, {split: [tokens of a document, <|endoftext|> first]}) of a data folder.
    Fail: no tokenizer, or files other than the manifest's. OSError: unreadable."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        eot, tokenizer = manifest["eot"], manifest["tokenizer"]
        files = {s: {f["name"]: f["sha256"] for f in manifest["splits"][s]["files"]} for s in ("train", "val")}
        if "file" not in tokenizer:
            raise Fail(f"{folder} has no tokenizer to turn tokens into text: prepare it where GPT-2's can be loaded")
        for name, sha256 in {**files["train"], **files["val"], tokenizer["file"]: tokenizer["sha256"]}.items():
            if file_sha256(folder / name) != sha256:
                raise Fail(f"{folder / name} is damaged (its SHA-256 is not the manifest's): prepare the data again")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Fail(f"{folder}/manifest.json is damaged ({brief(error)}): prepare the data again") from error
    documents = {}
    for split, names in files.items():
        tokens = np.concatenate([np.fromfile(folder / name, dtype="<u2", offset=HEADER_BYTES) for name in names])
        documents[split] = np.split(tokens, np.flatnonzero(tokens == eot))[1:]
    return load_bpe((folder / tokenizer["file"]).read_bytes()), documents


def passages(encoding, documents, rng, *lengths):
    """[(number of a document, its text in parts)], shuffled: disjoint passages, each of parts of exactly `lengths`
    tokens. A part starts and ends where a word does, so that its text, tokenized alone or after the others, gives these
    tokens again: the harness does that, and a choice must not be told by how it was cut."""
    found = []
    for number, document in enumerate(documents):
        pieces, end = encoding.decode_tokens_bytes(tokens := document[1:].tolist()), 0
        places = enumerate(zip(pieces, pieces[1:]), 1)
        edges = {0, len(tokens), *(i for i, (a, b) in places if b[:1] == b" " and not a[-1:].isspace())}
        for start in range(len(tokens) - sum(lengths) + 1):
            cuts = [start + sum(lengths[:i]) for i in range(len(lengths) + 1)]
            if start >= end and edges.issuperset(cuts):
                parts = [tokens[a:b] for a, b in zip(cuts, cuts[1:])]
                texts = [encoding.decode(part) for part in parts]
                if [encoding.encode_ordinary(text) for text in texts] == parts and "\ufffd" not in "".join(texts):
                    found.append((number, texts))
                    end = cuts[-1]
    return rng.sample(found, len(found))


def swap(encoding, documents, rng):
    """Yield (number of a document, context, true choice, false choices), as all tasks do."""
    for number, (text,) in passages(encoding, documents["val"], rng, 64):
        words = text.split(" ")  # those from the third on: a capital letter at the beginning would tell
        places = [i for i in range(2, len(words) - 1)
                  if words[i].isalpha() and words[i + 1].isalpha() and words[i].lower() != words[i + 1].lower()]
        if places:
            i = rng.choice(places)
            yield number, "", text, [" ".join([*words[:i], words[i + 1], words[i], *words[i + 2:]])]


def continuation(encoding, documents, rng):
    found = passages(encoding, documents["val"], rng, 96, 32)
    for number, (context, true) in found:
        others = {other: text for other, (_, text) in rng.sample(found, min(50, len(found)))  # one of a document
                  if other != number and text != true}
        false = list(dict.fromkeys(others.values()))[:3]
        if len(false) == 3:
            yield number, context, true, false


def cloze(encoding, documents, rng):
    """False words are four of the 20 next in frequency; a choice holds the rest of its passage, 12 to 20 tokens."""
    counts = Counter(word for tokens in documents["train"] for word in encoding.decode(tokens[1:].tolist()).split(" "))
    ranked = [word for word, _ in counts.most_common() if len(word) >= 4 and word.isalpha() and word.islower()]
    rank = {word: i for i, word in enumerate(ranked)}
    for number, (text,) in passages(encoding, documents["val"], rng, 80):
        words, places = text.split(" "), []
        for i in range(2, len(words) - 1):
            context, word, rest = " ".join(words[:i]), words[i], " ".join(["", *words[i + 1:]])
            if word in rank and words[i - 1].isalpha() and 12 <= len(encoding.encode_ordinary(rest)) <= 20:
                places.append((context, word, rest))  # isalpha: no full stop before it
        if places and len(ranked) >= 5:
            context, word, rest = rng.choice(places)
            first = max(0, min(rank[word] - 10, len(ranked) - 21))
            others = rng.sample([other for other in ranked[first:first + 21] if other != word], 4)
            yield number, context, f" {word}{rest}", [f" {other}{rest}" for other in others]


TASKS = {swap: ["acc"], continuation: ["acc", "acc_norm"], cloze: ["acc"]}  # and their metrics


def make(data, out, items, seed):
    """Write the folder of tasks and say how many items each has. Fail: bad data, no items, a foreign `out`. OSError."""
    out, ours = out.resolve(), {f"q0_{task.__name__}{end}" for task in TASKS for end in (".yaml", ".jsonl")}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - ours):
        raise Fail(f"{out} exists and was not written by this script: choose another --out")
    encoding, documents = load(data)
    with new_folder(out) as new:
        for task, metrics in TASKS.items():
            name, made = f"q0_{task.__name__}", []
            found = task(encoding, documents, random.Random(f"{name} {seed}"))
            for i, (number, context, true, false) in zip(range(items), found):
                label = i % (len(false) + 1)  # every place is equally often the true one
                choices = [*false[:label], true, *false[label:]]
                made.append({"document": number, "context": context, "choices": choices, "label": label})
            if not made:
                raise Fail(f"the validation documents of {data} are too few or too short: they give 0 items of {name}")
            print(f"{name}: {len(made)} items" + f" of {items}, the documents give no more" * (len(made) < items))
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in made)
            (new / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            config = dict(  # with an absolute path: another would count from where the harness is started
                task=name, dataset_path="json", dataset_kwargs={"data_files": {"test": str(out / f"{name}.jsonl")}},
                test_split="test", output_type="multiple_choice", num_fewshot=0, target_delimiter="",
                doc_to_text="context", doc_to_choice="choices", doc_to_target="label", metadata={"version": 1.0},
                metric_list=[{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics])
            lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items())  # also YAML
            (new / f"{name}.yaml").write_text("".join(lines), encoding="utf-8")


def main(argv=None):
    """Returns the exit status: 0, or 2 after one line about what is wrong."""
    parser = Parser(prog="tasks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder that prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--items", type=count, default=500, help="of each task, at most (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="of passages, words and order (default 0)")
    try:
        make(**vars(parser.parse_args(argv)))
    except (Fail, OSError) as error:
        print(f"tasks.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
