"""Members that count: n-grams of the training text, smoothed twice, and of the document so far.

They cost no epoch. As every member, each gives a distribution over the vocabulary after every
token, so a prior mixes them with the trained ones. `train_q0.py count RUN` adds them to a run.
"""
from dataclasses import dataclass

import numpy as np
import torch

import train_q0 as q

PULL = 0.3  # of shorter contexts, in tokens
STRENGTHS = (3.0, 0.3, 0.1)  # of the cache after 0, 1 and 2 tokens
FEW = (0, 0.5, 1.0, 1.5)  # discounts of a text so small that none can be estimated


class Counting:
    """What members that count share; `probs` is each one's own."""
    def __init__(self, vocab_size, eot, cfg=None):
        self.vocab_size = vocab_size
        self.eot = eot
        self.cfg = cfg  # of the run: how long its sequences are

    def true_token_probs(self, sequences):
        """p(true token) of sequences [n, T + 1] in file order, float32 [n * T]."""
        place = np.arange(sequences.shape[1] - 1)
        found = [self.probs(row[:-1])[place, row[1:]] for row in sequences.astype(np.int64)]
        return np.concatenate(found)

    def next_probs(self, tokens):
        """p(next token) after all of tokens [T], float32 [V]."""
        return self.probs(tokens)[-1]

    def token_probs(self, tokens):
        """p(next token) after each of tokens [B, T], float32 [B, T, V] on their device."""
        found = [self.probs(row) for row in tokens.cpu().numpy()]
        return torch.from_numpy(np.stack(found)).to(tokens.device)


# n-grams of the training text -------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Counts:
    """The different n-grams of one length in a text, G of them, sorted by context (all tokens but
    the last), then by last token. An n-gram's number is its place here."""
    keys: np.ndarray  # number of the context times V plus the last token [G]
    number: np.ndarray  # how often each is there [G]
    opens: np.ndarray  # whether it is the beginning of a document [G]
    suffix: np.ndarray  # number of the n-gram without its first token [G]


def count_grams(text, vocab_size, eot, order):
    """[Counts] of 2, 3, ..., `order` tokens. No n-gram has an eot but as its first or last token.
    """
    found = []
    gram = text  # number of the n-gram that ends here, or -1
    context = text  # the same, or -1 where nothing follows in the document
    opens = np.arange(vocab_size) == eot
    for _ in range(2, order + 1):
        place = np.flatnonzero(context[:-1] >= 0) + 1
        if not len(place):  # no document is as long
            break
        keys, first, which, number = np.unique(
            context[place - 1] * vocab_size + text[place],
            return_index=True, return_inverse=True, return_counts=True)
        opens = opens[keys // vocab_size]
        found.append(Counts(keys, number, opens, gram[place[first]]))
        gram = np.full(len(text), -1)
        gram[place] = which
        context = np.where(text == eot, -1, gram)
    return found


def discounts(number):
    """[4]: what is taken from things that were counted 0, 1, 2 and 3 or more times."""
    n = np.bincount(number.clip(max=5), minlength=6).astype(np.float64)
    if not n[1:5].all():
        return np.array(FEW)
    y = n[1] / (n[1] + 2 * n[2])
    found = [c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)]
    return np.clip([0, *found], 0, (0, 1, 2, 3))


class Grams:
    """Smoothed n-grams of one length; those of a context are one slice. p = share of the n-gram
    plus what is left to its context times p in the next shorter one."""
    def __init__(self, keys, share, left, vocab_size):
        self.keys = keys
        self.last = keys % vocab_size  # [G]
        contexts = np.arange(len(left) + 1)
        self.starts = np.searchsorted(keys // vocab_size, contexts)  # and the end [C + 1]
        self.share = share.astype(np.float32)  # [G]
        self.left = left.astype(np.float32)  # [C]


class NGrams(Counting):
    """n-grams of a text of documents, each of which begins with eot. They predict the eot that ends
    a document, and see nothing before it."""
    order = 0  # of the longest

    def __init__(self, text, vocab_size, eot, order=None, cfg=None):
        super().__init__(vocab_size, eot, cfg)
        order = order or self.order
        self.tensors = {"text": text, "order": np.array([order])}
        text = np.append(text, eot).astype(np.int64)
        counts = count_grams(text, vocab_size, eot, order)
        number = np.bincount(counts[0].suffix, minlength=vocab_size)  # of different tokens before
        taken = discounts(number)[number.clip(max=3)]
        unigram = (number - taken + taken.sum() / vocab_size) / number.sum()
        self.unigram = unigram.astype(np.float32)
        self.grams = []
        contexts = vocab_size
        for found, number in zip(counts, self.numbers(counts)):
            whose = found.keys // vocab_size
            total = np.bincount(whose, number, minlength=contexts)
            share, left = self.smoothed(number, total, whose)
            self.grams.append(Grams(found.keys, share, left, vocab_size))
            contexts = len(number)

    def numbers(self, counts):
        """How often each n-gram is taken to be there: [[G], ...] of [Counts]."""
        raise NotImplementedError

    def smoothed(self, number, total, whose):
        """(share [G], left [C]) of n-grams counted `number` times [G], `total` in a context [C];
        `whose` [G] is the context."""
        raise NotImplementedError

    def contexts(self, tokens):
        """Numbers of the contexts of 1, 2, ... tokens that end at each of tokens [T] and are in the
        text, or -1: [n - 1, T]."""
        context = np.where(np.diff(self.grams[0].starts)[tokens] > 0, tokens, -1)
        found = [context]
        for grams in self.grams[:-1]:
            before = np.append(-1, context[:-1])
            key = before * self.vocab_size + tokens
            place = np.searchsorted(grams.keys, key).clip(max=len(grams.keys) - 1)
            known = (grams.keys[place] == key) & (before >= 0) & (tokens != self.eot)
            context = np.where(known, place, -1)
            found.append(context)
        return np.stack(found)

    def probs(self, tokens):
        """p(next token) after each of tokens [T]: float32 [T, V]."""
        P = np.tile(self.unigram, (len(tokens), 1))
        for grams, context in zip(self.grams, self.contexts(tokens)):
            row = np.flatnonzero(context >= 0)
            context = context[row]
            P[row] *= grams.left[context, None]
            first = grams.starts[context]
            number = grams.starts[context + 1] - first
            ends = np.cumsum(number)
            row = np.repeat(row, number)
            gram = np.arange(len(row)) + np.repeat(first - ends + number, number)
            P[row, grams.last[gram]] += grams.share[gram]
        return P

    def next_probs(self, tokens):
        return self.probs(tokens[-len(self.grams):])[-1]

    @property
    def depths(self):
        return len(self.grams) + 1

    def depth(self, tokens):
        """How many tokens of context the text knows at each of tokens [T]."""
        return (self.contexts(tokens) >= 0).sum(axis=0)


class KneserNey(NGrams):
    """Interpolated modified Kneser-Ney (Chen and Goodman 1998)."""
    kind = "kneser_ney"
    order = 4

    def numbers(self, counts):
        """The longest n-grams and beginnings of documents are counted as they are, others by the
        different tokens before them."""
        found = []
        for shorter, longer in zip(counts, counts[1:]):
            different = np.bincount(longer.suffix, minlength=len(shorter.keys))
            found.append(np.where(shorter.opens, shorter.number, different))
        return [*found, counts[-1].number]

    def smoothed(self, number, total, whose):
        taken = discounts(number)[number.clip(max=3)]
        left = np.bincount(whose, taken, minlength=len(total)) / total.clip(min=1)
        return (number - taken) / total[whose], left


class Undiscounted(NGrams):
    """Long n-grams that trust what they count: p_k = (c + PULL p_(k-1)) / (n + PULL)."""
    kind = "undiscounted"
    order = 8

    def numbers(self, counts):
        return [found.number for found in counts]

    def smoothed(self, number, total, whose):
        return number / (total + PULL)[whose], PULL / (total + PULL)


# n-grams of the document so far -----------------------------------------------------------------

class Cache(Counting):
    """n-grams of the document so far, or what of it is in the sequence. Where a context of k tokens
    was seen n times, and c times before a token, that has p_k = (c + s_k p_(k-1)) / (n + s_k);
    `strengths` are the s_k, p_(-1) is uniform."""
    kind = "cache"

    def __init__(self, strengths, vocab_size, eot, cfg=None):
        super().__init__(vocab_size, eot, cfg)
        self.tensors = {"strengths": np.array(strengths, dtype=np.float32)}

    def matches(self, tokens):
        """Yield (t, s) for contexts of 1, 2, ... tokens: those that end at t and at s, earlier in
        its document, are the same."""
        place = np.arange(len(tokens))
        begin = np.maximum.accumulate(np.where(tokens == self.eot, place, 0))
        same = (tokens[:, None] == tokens) & (place < place[:, None])
        same &= place >= begin[:, None]
        pairs = np.nonzero(same)
        for _ in self.tensors["strengths"][1:]:
            yield pairs
            t, s = pairs
            longer = s > 0
            longer[longer] = same[t[longer] - 1, s[longer] - 1]
            pairs = t[longer], s[longer]
            same = np.zeros_like(same)
            same[pairs] = True

    def probs(self, tokens):
        """p(next token) after each of tokens [T]: float32 [T, V]."""
        T = len(tokens)
        seen, column = np.unique(tokens, return_inverse=True)
        U = len(seen)
        place = np.arange(T)
        begin = np.maximum.accumulate(np.where(tokens == self.eot, place, 0))
        so_far = np.cumsum(np.eye(U)[column], axis=0)
        counts = so_far - so_far[begin]
        counts[place, column[begin]] += 1
        strength = self.tensors["strengths"]
        other = strength[0] / self.vocab_size / (place - begin + 1 + strength[0])
        P = counts / (place - begin + 1 + strength[0])[:, None] + other[:, None]  # of tokens seen
        for s_k, (t, s) in zip(strength[1:], self.matches(tokens)):
            n = np.bincount(t, minlength=T)
            counts = np.bincount(t * U + column[s + 1], minlength=T * U).reshape(T, U)
            P = (counts + s_k * P) / (n + s_k)[:, None]
            other = s_k * other / (n + s_k)
        full = np.repeat(other.astype(np.float32)[:, None], self.vocab_size, axis=1)
        full[:, seen] = P
        return full

    @property
    def depths(self):
        return len(self.tensors["strengths"])

    def depth(self, tokens):
        """How many tokens of context were there before in the document, at each of tokens [T]."""
        found = np.zeros(len(tokens), dtype=np.int64)
        for k, (t, _) in enumerate(self.matches(tokens), 1):
            found[t] = k
        return found


KINDS = KneserNey, Undiscounted, Cache  # a counted run has one of each, in this order
SETTINGS = {  # rows of a track share them: tracks.json
    "orders": [KneserNey.order, Undiscounted.order],
    "pull": PULL,
    "strengths": list(STRENGTHS)}


# On the disk ------------------------------------------------------------------------------------

def save(folder, member, place):
    """Write a member as train_q0.save_member does; `place` says where in the run it is."""
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    tensors = {name: torch.as_tensor(x) for name, x in member.tensors.items()}
    q.write_atomically(path, lambda tmp: q.save_tensors(tensors, tmp))
    q.save_json(folder / "config.json", {
        "format": q.FORMAT, "kind": member.kind, "vocab_size": member.vocab_size,
        "eot": member.eot, **place, "sha256": q.sha256_of(path),
        "config": q.method_settings(member.cfg)})


def build(about, tensors, cfg):
    """The member of a config.json and its tensors {name: torch tensor}. Raises KeyError or
    ValueError for others."""
    shared = {"vocab_size": int(about["vocab_size"]), "eot": int(about["eot"]), "cfg": cfg}
    if not 0 <= shared["eot"] < shared["vocab_size"] <= 2 ** 16:  # before anything is allocated
        raise ValueError("its tokens are no 16-bit numbers, or its eot none of them")
    if about["kind"] == Cache.kind:
        strengths = tensors["strengths"].numpy()
        if strengths.ndim != 1 or not 0 < strengths.min() <= strengths.max() < np.inf:
            raise ValueError("its strengths must be positive numbers")
        return Cache(strengths, **shared)
    for kind in KINDS[:-1]:
        if about["kind"] != kind.kind:
            continue
        text = tensors["text"].numpy()
        if text.max() >= shared["vocab_size"]:
            raise ValueError(f"its text has token {text.max()}, beyond the vocabulary")
        return kind(text, order=int(tensors["order"]), **shared)
    raise ValueError(f"this script knows no member of kind {about['kind']}")


def members_of(text, **about):
    """All members that count, for a training text."""
    return (KneserNey(text, **about), Undiscounted(text, **about), Cache(STRENGTHS, **about))
