"""What a log must say, computed again for records/check.py: the plan and the parameters from its
settings, its losses from the predictions of its members.

A packed file holds -log p(true token) of every member on PACKED tokens of the held-out and of the
validation split, evenly spaced over the split (of a smaller split all): float16 [members, tokens],
held-out tokens first, all low bytes before all high bytes, compressed with xz. On all tokens a
folder of ten runs of four members would be 8 MB (records/README.md). In a track whose rows are
scored with members that count, what these say of the same tokens follows from the text.
"""
import ast
import functools
import json
import lzma
import math
import types
from dataclasses import dataclass, fields

import numpy as np

import train_q0 as q
from records import counting, gate, population

DATA = q.ROOT / "data/wiki"  # the text of tracks whose rows are counted
PACKED = 8192  # tokens of a split
MAX_PACKED = 100_000_000  # bytes of a file, unpacked: 3,000 members
# A loss on the packed tokens differs from that on the whole split by chance. Where the difference
# of two losses is compared, most of it cancels; four standard errors remain (1 in 16,000), and
# what rounding and a prior of fewer held-out tokens do (measured: 0.0007).
DEVIATIONS = 4
ROUNDING = 0.002
PRUNED = 0.01  # of the column `pruned`: other members may be kept on fewer tokens
PLANS = ("plan_cycles", "cycle_batch_tokens")
MODELS = ("parameter_table", "block_names", "local_heads")


# Plan and parameters ----------------------------------------------------------------------------

@dataclass
class Work:
    steps: int
    tokens: int
    members: list  # {key: number} of each member's line


def checked(settings):
    """Settings {name: value} as attributes. Raises ValueError for a number out of its range: some
    would take the memory of the machine."""
    for f in fields(q.Config):
        value = settings.get(f.name)
        low = f.metadata["low"]
        high = f.metadata["high"]
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise ValueError(f"{f.name} is out of range")
    return types.SimpleNamespace(**settings)


def plan(cfg, epoch_tokens):
    """The Work that checked settings ask for, `epoch_tokens` an epoch."""
    cycles = sum(q.plan_cycles(cfg, epoch_tokens), [])
    tokens = sum(c.steps * c.rows for c in cycles) * cfg.seq_len
    return Work(sum(c.steps for c in cycles), tokens, [c.place for c in cycles])


def parameters(cfg, vocab_size):
    table = q.parameter_table(cfg, vocab_size)
    return sum(math.prod(row.bank_shape) for row in table.values())


@functools.lru_cache(maxsize=1)
def own_functions():
    """{name: code} of the script beside these records."""
    tree = ast.parse(q.SOURCE).body
    return {x.name: ast.unparse(x) for x in tree if isinstance(x, ast.FunctionDef)}


def differs(functions, names):
    """Whether a script, as {name: code}, has functions of its own under some of `names`."""
    return any(functions.get(name) != own_functions()[name] for name in names)


# Packed predictions -----------------------------------------------------------------------------

def packed_tokens(n):
    """Indices of the tokens that are kept of a split of n."""
    kept = min(n, PACKED)
    return np.arange(kept) * n // kept


def pack(run, path):
    """Write the packed file of a finished run. Raises UserError where its predictions are missing
    or damaged."""
    found = population.load_predictions(run)
    scored, = found.keys() - {"heldout"}
    kept = []
    for split in ("heldout", scored):
        p = found[split]
        kept.append(p[:, packed_tokens(p.shape[1])])
    values = -np.log(np.concatenate(kept, axis=1))
    values = values.astype(np.float16).tobytes()
    by_byte = np.frombuffer(values, np.uint8).reshape(-1, 2)
    path.write_bytes(lzma.compress(by_byte.T.tobytes(), preset=9))


def unpack(path, members, sizes):
    """[-log p of the held-out, of the validation split], float64 [members, tokens] each; `sizes`
    are those of the whole splits. Raises ValueError for a file of another shape."""
    kept = [min(n, PACKED) for n in sizes]
    size = 2 * members * sum(kept)
    if max(size, path.stat().st_size) > MAX_PACKED:
        raise ValueError("it is too large")
    reader = lzma.LZMADecompressor(memlimit=2 ** 28)
    raw = reader.decompress(path.read_bytes(), max_length=size + 1)
    if len(raw) != size:
        raise ValueError(f"it does not hold {sum(kept)} tokens of {members} members")
    by_byte = np.frombuffer(raw, np.uint8).reshape(2, -1)
    values = np.frombuffer(by_byte.T.tobytes(), np.float16)
    values = values.reshape(members, -1)
    if not ((values >= 0) & (values < 100)).all():  # NaN is in no range
        raise ValueError("it does not hold -log p")
    return np.split(values.astype(np.float64), kept[:1], axis=1)


@functools.lru_cache(maxsize=2)  # once for all runs of a track
def count_text(data, seq_len, train_tokens):
    """What members that count say of the packed tokens of a text: (hashes of the text, number of
    buckets, {split: (p(true token) [3, tokens], buckets [tokens])}). None where it is not there."""
    try:
        corpus = q.load_corpus(data, seq_len, train_tokens)
    except q.UserError:
        return None
    eot = corpus.hashes["eot"]
    counts = counting.members_of(corpus.splits["train"], vocab_size=corpus.vocab_size, eot=eot)
    found = {}
    for split in ("heldout", "val"):
        rows = corpus.eval_sequences(split).astype(np.int64)
        kept = packed_tokens(rows[:, 1:].size)
        P = [member.true_token_probs(rows)[kept] for member in counts]
        found[split] = np.stack(P), gate.all_buckets(counts, rows)[kept]
    return corpus.hashes, gate.number_of_buckets(counts), found


def text_of(track):
    """The same for a track, None where DATA is another text."""
    found = count_text(DATA, track["seq_len"], track["train_tokens"])
    return found if found and found[0] == track["data"] else None


class Packed:
    """The packed predictions of a run; X is -log p of a split, [members, tokens]."""

    def __init__(self, run, track):
        sizes = [track["tokens"][split] for split in ("heldout", "val")]
        path = run.path.with_suffix(".xz")
        members = run.plan.members
        self.heldout, self.X = unpack(path, members, sizes)
        self.run = run
        self.missing = 1 - self.X.shape[1] / sizes[1]  # share of the split that is not packed
        self.losses = np.array([run.losses[i] for i in range(members)])  # as logged
        self.neural = self.mixed(self.prior())
        self.values = self.neural  # what is scored, [tokens]
        self.score = run.loss
        if "counted" in track:
            self.count(track)

    def count(self, track):
        """Score the run with members that count, as its file and, where it is there, the text say.
        """
        with self.run.path.with_suffix(".json").open() as file:
            about = json.loads(file.read(1000))
        self.run.score = float(about["val_loss"])
        strength = about["strength"]
        if not 0 < self.run.score < 100 or strength not in gate.STRENGTHS:
            raise ValueError("it has no loss or no strength of the gate")
        if track["counted"] != counting.SETTINGS:
            raise ValueError("counting.py has other settings than its track")
        text = text_of(track)
        if not text:
            return
        _, number, counts = text
        heldout, buckets = counts["heldout"]
        heldout = np.concatenate([np.exp(-self.heldout), heldout])
        members, weights = population.best_members(heldout)
        found = gate.fit_gate(heldout[members], buckets, number, np.array(weights), strength)
        scored, buckets = counts["val"]
        scored = np.concatenate([np.exp(-self.X), scored])
        self.values = -np.log(found.mix(scored[members], buckets))
        self.score = self.run.score

    def mixed(self, weights):
        """-log of the mixture, [tokens]."""
        return -np.log(weights @ np.exp(-self.X))

    def error(self, values):
        """How far the mean of `values` [tokens] may be from that over the whole split."""
        deviation = values.std() * math.sqrt(self.missing / len(values))
        return ROUNDING + DEVIATIONS * deviation

    def gains(self, weights, logged, slack=0):
        """Whether mixing gains as much over its members as the log says."""
        gain = self.mixed(weights) - weights @ self.X
        difference = gain.mean() - (logged - weights @ self.losses)
        return abs(difference) <= self.error(gain) + slack

    def weights_of(self, members, shares=1):
        """[M] of mixing `members` by their shares, or uniformly; they sum to 1."""
        weights = np.zeros(len(self.X))
        weights[members] = shares
        return weights / weights.sum()

    def prior(self):
        """The printed weights."""
        shares = self.run.weights
        return self.weights_of(list(shares), list(shares.values()))

    def checks(self):
        """(holds, what if not): every loss of the log against the predictions."""
        for i, x in enumerate(self.X):
            off = abs(x.mean() - self.losses[i])
            yield off <= self.error(x), f"member {i} has another val_loss"
        heldout = np.exp(-self.heldout)
        best, _ = q.fit_prior(heldout)
        lost = population.mixture_loss(heldout, self.prior()) - population.mixture_loss(heldout, best)
        yield lost <= ROUNDING, f"its prior is {lost:.4f} worse than the best on held-out text"
        for pairs in self.run.events["members"]:
            n = int(pairs["members"])
            weights = self.weights_of(range(n))
            if pairs["prior"] == "learned":
                weights[:n], _ = q.fit_prior(heldout[:n])
            holds = self.gains(weights, float(pairs["val_loss"]))
            yield holds, f"{pairs['prior']} mixture of {n} members"
        yield from self.table(heldout)
        gain = self.neural - self.values
        off = abs(gain.mean() - (self.run.loss - self.score))
        yield off <= self.error(gain), "members that count gain another amount"

    def table(self, heldout):
        """Rows of the table: the members of largest weight, and those pruned."""
        ranked = list(self.run.weights)
        shares = list(self.run.weights.values())
        path = list(population.pruned(heldout))
        for k, (uniform, learned, pruned) in self.run.table.items():
            top = ranked[:k]
            if k <= len(ranked):
                weights = self.weights_of(top)
                yield self.gains(weights, uniform), f"uniform column at k = {k}"
            weights = self.weights_of(top, shares[:k])
            yield self.gains(weights, learned), f"learned column at k = {k}"
            kept = next(found for found in path if len(found[0]) <= k)
            weights = self.weights_of(*kept)
            yield self.gains(weights, pruned, PRUNED), f"pruned column at k = {k}"


def repeats(a, b):
    """Whether two packed runs hold the predictions of one."""
    return a.X.shape == b.X.shape and np.abs(a.X - b.X).mean() < 0.01


def apart(some, others):
    """How far mean scores of two groups of packed runs may be from what their packed tokens say,
    and are: (allowed, found)."""
    means = []
    logged = []
    for group in (some, others):
        means.append(np.mean([x.values for x in group], axis=0))
        logged.append(np.mean([x.score for x in group]))
    values = means[0] - means[1]
    off = values.mean() - (logged[0] - logged[1])
    return some[0].error(values), abs(off)
