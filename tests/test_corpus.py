"""Order of the training text and cutting into sequences; seeds; an import without side effects."""
import base64
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

import forks
import train_q0 as q
from tiny import user

LENGTHS = (5, 40, 1, 17, 30, 9, 23)  # 125 tokens: 13 sequences of 9, and 8 that are dropped


@pytest.fixture
def corpus():
    """Documents of distinct tokens, each counting up from a multiple of 100."""
    documents = []
    for i, n in enumerate(LENGTHS):
        document = np.arange(n, dtype=np.uint16)
        documents.append(100 * i + document)
    splits = {}
    for i, split in enumerate(q.SPLITS):
        splits[split] = np.arange(100 + 7 * i)
    splits["train"] = np.concatenate(documents)
    return q.Corpus("counting", 1000, splits, {}, tuple(documents), seq_len=8)


def test_seeds_are_pinned_and_distinct():
    assert q.seed_of("order", 0, 1, 2) == 4250261670952940785
    assert q.seed_of("init", "head") == 4471760950963050618
    keys = [("order", 11, 1), ("order", 1, 11), ("order",)]
    keys += product(["order", "noise"], range(5), range(5))
    seeds = {q.seed_of(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert min(seeds) >= 0 and max(seeds) < 2 ** 63


def test_an_epoch_holds_whole_documents_in_another_order(corpus):
    epoch = corpus.epoch(0, 0, 0)
    assert epoch.shape == (13, 9) and corpus.train_sequences == 13
    text = corpus.splits["train"].tolist()
    left_out = Counter(text)
    left_out.subtract(epoch.flatten().tolist())
    assert min(left_out.values()) == 0 and left_out.total() == 8
    starts = {document[0] for document in corpus.documents}
    ends = {document[-1] for document in corpus.documents}
    joints = set()
    for sequence in epoch:
        joints |= {(a, b) for a, b in pairwise(sequence) if b != a + 1}
    assert all(a in ends and b in starts for a, b in joints)
    assert joints - set(pairwise(text))
    neighbours = sum(b[0] == a[-1] + 1 for a, b in pairwise(epoch))
    assert neighbours <= 3  # sequences are permuted too


def test_epochs_are_functions_of_their_key(corpus):
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 7)]
    forward = [corpus.epoch(*key).tobytes() for key in keys]
    backward = [corpus.epoch(*key).tobytes() for key in reversed(keys)]
    assert forward == backward[::-1]
    assert len(set(forward)) == len(keys)


def test_batches_and_evaluation_read_in_order(corpus):
    """Batches straddle epochs."""
    stream = np.concatenate([corpus.epoch(3, 1, e) for e in range(4)])
    for first, count in ((26, 5), (0, 4), (11, 5), (12, 15)):
        batch = corpus.batch(3, 1, first, count)
        assert batch.dtype == np.int64
        assert (batch == stream[first:first + count]).all()
    for split in ("heldout", "dev", "val"):
        tokens = corpus.splits[split]
        sequences = corpus.eval_sequences(split)
        assert sequences.shape == (len(tokens) // 9, 9)
        assert (sequences.flatten() == tokens[:sequences.size]).all()


SPELLED = ["a", "b", "c", "d", "ab", "cd", "abcd", "bc"]  # by rank; 8 is <|endoftext|>


def with_tokenizer(folder):
    lines = [b"%s %d\n" % (base64.b64encode(x.encode()), i) for i, x in enumerate(SPELLED)]
    path = folder / "tokenizer.tiktoken"
    path.write_bytes(b"".join(lines))
    q.save_json(folder / "manifest.json", {"tokenizer": {"sha256": q.sha256_of(path)}})
    return path


def test_tokens_split_into_the_halves_that_were_learned_first(tmp_path):
    path = with_tokenizer(tmp_path)
    halves, sha256 = q.halves_of(tmp_path, 9)
    assert sha256 == q.sha256_of(path)
    assert halves.tolist() == [[-1, -1]] * 4 + [[0, 1], [2, 3], [4, 5], [1, 2], [-1, -1]]
    text = np.tile(np.array([6, 0, 7, 4, 8], np.uint16), 2000)
    split = q.split_tokens(text, halves, 0.3, np.random.default_rng(0))
    more = len(split) - len(text)
    assert abs(more / 6000 - 0.3) < 0.03  # of 6,000 that can be: five standard deviations
    spelled = np.array([*SPELLED, "|"])
    assert "".join(spelled[split]) == "".join(spelled[text])
    all_split = q.split_tokens(text[:5], halves, 1.0, np.random.default_rng(0))
    assert all_split.tolist() == [4, 5, 0, 1, 2, 0, 1, 8]  # once, not down to the bytes
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(q.UserError, match="sha256 .* prepare the data again, or give --split-tok"):
        q.halves_of(tmp_path, 9)


def test_only_early_epochs_split_tokens(corpus):
    """An epoch keeps its size; without a split it is the epoch as it was."""
    halves = np.full((1000, 2), -1)
    halves[400:500] = [900, 901]
    splitting = replace(corpus, split=1.0, split_epochs=2, halves=halves)
    for epoch, has_split in enumerate([True, True, False]):
        found = splitting.epoch(0, 1, epoch)
        plain = corpus.epoch(0, 1, epoch)
        assert found.shape == plain.shape
        assert (found == plain).all() != has_split
        assert (found >= 900).any() == has_split
        assert (found // 100 == 4).any() != has_split
        assert (splitting.epoch(0, 1, epoch) == found).all()


def test_training_text_is_whole_documents_up_to_the_target(tmp_path):
    folder = forks.shards(tmp_path / "shards")  # documents of 31 tokens
    for asked, documents in ((0, 90), (93, 3), (94, 4)):
        found = q.load_corpus(folder, 8, asked)
        assert len(found.documents) == documents
        assert len(found.splits["train"]) == 31 * documents


IMPORTS = """
import os, random, sys, torch
before = sys.argv[:], dict(os.environ), os.listdir("."), random.getstate(), torch.get_rng_state()
import train_q0
after = sys.argv, dict(os.environ), os.listdir("."), random.getstate(), torch.get_rng_state()
assert before[:-1] == after[:-1] and torch.equal(before[-1], after[-1])
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
"""


def test_import_has_no_side_effect(tmp_path):
    # OMP_WAIT_POLICY is the user's; where it is missing the script sets it
    done = user(tmp_path, "python", "-B", "-c", IMPORTS, "--no-such-flag",
                PYTHONPATH=str(q.ROOT), OMP_WAIT_POLICY="ACTIVE")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
