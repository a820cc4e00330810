"""A finished population: its predictions and members, read and checked; the best of them for an
inference budget; what each number of them is worth."""
import functools
import hashlib
import stat
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

import train_q0 as q
from records import counting
from records.gate import load_gate, number_of_buckets
from records.neighbours import Neighbours


# A run's folder ---------------------------------------------------------------------------------

REMOTE = {}  # {folder in the hub's cache: hub.Snapshot}: runs that come from there, of this process


def find_run(name):
    """Folder of a run: a name under logs/, a folder, or hf:USER/NAME on the hub. Raises UserError.
    """
    if not name.startswith("hf:"):
        return q.find_run(name)
    from records.hub import snapshot
    return snapshot(name)


def title(run):
    """What the run in a folder is called, wherever one looks for it."""
    return REMOTE[run].name if run in REMOTE else str(run)


def plain_name(run):
    """What a run that is made of it can be named after."""
    return REMOTE[run].plain_name if run in REMOTE else run.resolve().name


def recorded_name(run):
    """What it is called in files that others may read: nothing of this machine's folders."""
    return REMOTE[run].name if run in REMOTE else plain_name(run)


def has_weights(run, member):
    """Whether a member can be used: --keep-members drops the oldest, the hub has all."""
    return run in REMOTE or (run / f"members/{member}/model.safetensors").exists()


def fetch(run, member):
    """Folder of a member, whose files are there by now where the run is on the hub. Raises
    UserError."""
    if run in REMOTE:
        REMOTE[run].fetch_member(member)
    return run / f"members/{member}"


# Predictions ------------------------------------------------------------------------------------

RESULT_BYTES = 20_000  # of result.json, for each member and once more; a member takes about 1,000


def check_files(run):
    """Raise UserError where the folder holds what may never end: it would be read for ever."""
    for path in run.rglob("*"):
        try:
            mode = path.stat().st_mode
        except OSError:  # of a run under way, gone by now
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise q.UserError(f"{path} is a device or a pipe: a run has regular files alone")


def recorded_hashes(run, kind, members):
    """sha256 of each member's "config" or "predictions" as a finished run has them; else None."""
    if not (run / "result.json").exists():
        return [None] * members
    with q.reading(run / "result.json"):
        size = (run / "result.json").stat().st_size
        if size > RESULT_BYTES * (members + 1):  # before it is read
            raise ValueError(f"{size} bytes are too many for the {members} members that have "
                             "predictions")
        found = [entry[kind] for entry in q.load_json(run / "result.json")["curve"]]
    if len(found) != members:
        raise q.UserError(f"{run} has predictions of {members} members, its result has "
                          f"{len(found)}: copy the others from where they were trained")
    return found


def what_is_missing(run, member):
    """What to do about a member that has no predictions while later ones have."""
    if (run / "result.json").exists():
        return f"copy predictions/{member}.safetensors from where it was trained"
    return (f"member {member} of another trajectory is yet to come: wait for the launch that "
            "trains it, or go on with it (--resume)")


def read_predictions(path, sha256=None):
    """{split: float32 [tokens]} of a member. Raises UserError for a missing or damaged file."""
    with q.reading(f"predictions {path}"):
        q.check_sha256(path, sha256)
        found = load_file(path)
        if len(found) != 2 or "heldout" not in found:
            raise ValueError("it must hold heldout and one more split")
        for split, p in found.items():
            one_each = p.dtype == np.float32 and p.ndim == 1 and p.size > 0
            if not one_each or not 0 < p.min() <= p.max() <= 1:
                raise ValueError(f"{split} does not hold one probability per token")
    return found


def load_predictions(run):
    """p(true token) of a run: {split: float32 [members, tokens]}. Raises UserError."""
    files = sorted((run / "predictions").glob("*.safetensors"), key=lambda f: (len(f.stem), f.stem))
    if not files:
        raise q.UserError(f"{run} has no cached predictions: it is not a run, or it ended before "
                          "its first member")
    check_files(run)
    for i, file in enumerate(files):
        if not file.stem.isdecimal():
            raise q.UserError(f"{file} is not of member {i}: move that file elsewhere")
        if file.stem != str(i):
            raise q.UserError(f"{file} is not of member {i}: the run is not complete: "
                              f"{what_is_missing(run, i)}")
    hashes = recorded_hashes(run, "predictions", len(files))
    members = [read_predictions(f, sha256) for f, sha256 in zip(files, hashes)]
    lengths = [{split: len(p) for split, p in member.items()} for member in members]
    for file, found in zip(files, lengths):
        if found != lengths[0]:
            raise q.UserError(f"predictions {file} are damaged: other splits or lengths than "
                              f"those of {files[0].name}")
    return {split: np.stack([m[split] for m in members]) for split in members[0]}


# Selection --------------------------------------------------------------------------------------

TOLERANCE = 1e-7  # of fit_prior


def mixture_loss(P, w):
    """Nats per token of the mixture of P [M, N] (or M rows) with weights w [M]."""
    return float(q.mixture_losses(P, [w])[0])


def fit_from(P, start):
    """The prior of P [M, N] and its gap; weights close to it save passes where members are many."""
    if len(P) > q.FEW_MEMBERS:
        w, gap = q.fit_prior(P, start=start)
        if gap <= TOLERANCE:
            return w, gap
    return q.fit_prior(P)


def pruned(heldout, weights=None):
    """Yield (members, weights), largest weight first: those that the prior of heldout [M, N]
    (`weights`, where it is known) gives weight, then ever fewer, as the least of them leaves and
    it is fitted again; of 64 and more, 1 in 32 leave at a time.

    A few members pruned to beat the few of largest weight, which are much alike, and match greedy
    selection (records/tuning).
    """
    w = q.fit_prior(heldout)[0] if weights is None else weights
    members = np.arange(len(heldout))
    while True:
        ranked = np.argsort(-w, kind="stable")
        ranked = ranked[w[ranked] > 1e-6]  # below is the solver's tolerance
        members = members[ranked]
        w = w[ranked] / w[ranked].sum()
        yield members.tolist(), w.tolist()
        left = len(members) - max(1, len(members) // 32)
        if not left:
            return
        members = members[:left]
        w, _ = fit_from(heldout[members], w[:left])


def best_members(heldout, k=None):
    """(members, weights) for an inference budget of at most `k` members. Raises UserError for a k
    below 1."""
    if k is not None and k < 1:
        raise q.UserError(f"--k {k} must be at least 1")
    k = k or len(heldout)
    return next(found for found in pruned(heldout) if len(found[0]) <= k)


# Members ----------------------------------------------------------------------------------------
# A population in use: members mix their probabilities token by token.

def load_member(folder, precision=None, sha256=None, device="cpu"):
    """The member in `folder`: a frozen GPT in evaluation mode on `device`, or one that counts or
    has neighbours, on the CPU.
    Raises UserError where a file is damaged, of another model, or its config.json not the one of
    hash `sha256`."""
    about, weights = q.read_member(folder, sha256)
    with q.reading(f"member {folder}"):
        cfg, _ = q.resolve(replace(q.Config(**about["config"]), device="cpu"))
        vocab_size = int(about["vocab_size"])
        store = None
        if about.get("kind") == Neighbours.kind:
            store = weights.pop("keys"), weights.pop("after"), int(about["eot"])
        elif "kind" in about:
            return counting.build(about, weights, cfg)
    cfg = replace(cfg, precision=precision or cfg.precision)
    wanted = {n: row.bank_shape for n, row in q.parameter_table(cfg, vocab_size).items()}
    found = {n: tuple(w.shape) for n, w in weights.items()}
    if found != wanted:  # before anything is allocated
        missing = sorted(wanted.items() - found.items())
        unexpected = sorted(found.items() - wanted.items())
        raise q.UserError(f"member {folder} was made by another model: missing {missing}, "
                          f"unexpected {unexpected}: {q.OWN_SCRIPT}")
    model = q.empty_member(cfg, vocab_size)
    model.load_state_dict(weights)
    if store:
        with q.reading(f"member {folder}"):
            return Neighbours(model, *store)
    return model.to(device)


@dataclass(frozen=True, eq=False)
class Population:
    """Members of a run and their weights: p(token) = sum_i weights_i p_i(token)."""
    folder: Path
    members: list  # numbers of those that take part, the largest weight first
    weights: list  # theirs; they sum to 1
    heldout: np.ndarray  # cached p(true token) of all members of the run [M, N]
    kept: list  # numbers of those whose weights can be used: see has_weights
    device: torch.device
    gate: object  # the Gate of `members` where weights depend on the context, else None

    def member(self, i):
        """Member i of the run, read and checked: a frozen GPT, or one that counts."""
        sha256 = recorded_hashes(self.folder, "config", len(self.heldout))[i]
        return load_member(fetch(self.folder, i), sha256=sha256, device=self.device)

    @functools.cached_property
    def counting(self):
        """The members that count of a counted run, which are its last ones."""
        M = len(self.heldout)
        found = [self.member(i) for i in range(M - len(counting.KINDS), M)]
        with q.reading(f"the gate of {title(self.folder)}"):
            if number_of_buckets(found) != len(self.gate.weights):
                raise ValueError("it has other buckets than the last members make")
        return found

    @property
    def digest(self):
        """Of those that take part: it tells populations apart."""
        return hashlib.sha256(self.heldout[self.members].tobytes()).hexdigest()

    @functools.cached_property
    def models(self):
        found = [self.member(i) for i in self.members]
        self.check_mix(found)
        return found

    def check_mix(self, models):
        """Raise UserError where members differ in what a mixture needs to be one."""
        kinds = {(m.vocab_size, m.cfg.softcap, m.cfg.seq_len) for m in models}
        if len(kinds) > 1:
            raise q.UserError(f"members of {self.folder} do not mix: their (vocabulary, softcap, "
                              f"seq_len) are {sorted(kinds)}")


def kept_members(folder, M):
    """Numbers of the members among M that can be run; says which cannot. Where no weights are left
    it is all of them, and the first to be read is what ends in an error."""
    kept = [i for i in range(M) if has_weights(folder, i)]
    if not 0 < len(kept) < M:
        return list(range(M))
    if q.set_by_torchrun("RANK", 0) == 0:
        gone = ", ".join(str(i) for i in range(M) if i not in kept)
        print(f"notice: {folder} has no weights of members {gone} (--keep-members?): the prior is "
              f"fitted to the other {len(kept)}", file=sys.stderr)
    return kept


def load_population(run, k=None, device=None):
    """The members of `run` (as find_run takes it) that the learned prior gives weight, or the best
    `k`, on `device` (default: the GPU where there is one); of those alone whose weights are there.
    Raises UserError for what is missing or damaged."""
    folder = find_run(str(run))
    heldout = load_predictions(folder)["heldout"]
    kept = kept_members(folder, len(heldout))
    best, weights = best_members(heldout[kept], k)
    members = [kept[i] for i in best]
    if k is not None and folder in REMOTE:
        kept = sorted(members)  # to compare them with all others would download those
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gate = load_gate(folder, heldout[members], np.array(weights))
    return Population(folder, members, weights, heldout, kept, torch.device(device), gate)


def tokenizer_hash(data):
    """sha256 of the tokenizer of a data folder, as its manifest has it; None where it is unknown.
    """
    path = data / "manifest.json"
    if not path.is_file():
        return None
    with q.reading(path):
        return (q.load_json(path).get("tokenizer") or {}).get("sha256")


def check_tokenizer(run, data):
    """Raise UserError where the tokenizer of a run is not that of a data folder; without one, tokens
    may be anything."""
    hashes = {tokenizer_hash(run / "data"), tokenizer_hash(data)} - {None}
    if len(hashes) > 1:
        raise q.UserError(f"{data} has another tokenizer than the data of {run}: its tokens mean "
                          "other text (the sha256 in their manifest.json differ)")


def load_teacher(cfg, vocab_size, device):
    """The Population of --teacher. Raises UserError where it cannot teach this run."""
    population = load_population(cfg.teacher, cfg.teacher_k, device)
    check_tokenizer(population.folder, q.find_data(cfg))
    if population.gate is not None:
        raise q.UserError(f"--teacher {cfg.teacher} has members that count, which cannot teach: "
                          "give the run that it was made of")
    first = population.models[0]
    found = (first.vocab_size, first.cfg.softcap, first.cfg.seq_len)
    needed = (vocab_size, cfg.softcap, cfg.seq_len)
    if found != needed:
        raise q.UserError(f"--teacher {cfg.teacher}: its (vocabulary, softcap, seq_len) is "
                          f"{found}, this run's {needed}")
    for model in population.models:
        _, model.attend = q.choose_attention(replace(model.cfg, attention=cfg.attention), device)
    return population


# Worth ------------------------------------------------------------------------------------------

FINEWEB = ("fineweb", "slowrun")  # corpora whose validation text data efficiency speaks of

def table_sizes(M):
    """Numbers of members worth a row: all up to M, or from 33 members on 1, 2, 3, 4, 6, 8, 11, 16,
    ... and M."""
    if M <= 32:
        return [*range(1, M + 1)]
    return sorted({min(M, round(2 ** (i / 2))) for i in range(2 * M.bit_length() + 1)})


def population_table(heldout, scored):
    """Rows for each K: loss on `scored` (M rows) of the K members of largest weight, uniformly and
    under the prior renormalised (the paper's rule), and of those pruned to K. heldout [M, N] is
    all that a fit sees."""
    w, gap = q.fit_prior(heldout)
    M = len(w)
    ranked = np.argsort(-w, kind="stable")
    path = list(pruned(heldout, w))
    sizes = table_sizes(M)
    weights = np.zeros((len(sizes), 3, M))
    for row, k in zip(weights, sizes):
        top = ranked[:k]
        row[0, top] = 1 / k
        row[1, top] = w[top] / w[top].sum()
        members, least = next(found for found in path if len(found[0]) <= k)
        row[2, members] = least
    losses = q.mixture_losses(scored, weights.reshape(-1, M)).reshape(-1, 3)
    rows = [{"k": k, "uniform": uniform, "learned": learned, "pruned": least}
            for k, (uniform, learned, least) in zip(sizes, losses.tolist())]
    return {"weights": w.tolist(), "gap": gap, "ranked": ranked.tolist(), "rows": rows}


def report(predictions, corpus_name):
    """(population_table, lines of the log) of all members of a train_q0.Predictions."""
    everyone = range(len(predictions.cached))
    split = predictions.splits[1]
    heldout = np.stack(predictions.of("heldout", everyone))
    table = population_table(heldout, predictions.of(split, everyone))
    lines = format_table(table, split)
    if split == "val" and corpus_name in FINEWEB:
        lines.append(f"data_efficiency:{data_efficiency(table['rows'][-1]['learned'])}")
    return table, lines


def format_table(table, split, members=None):
    """A population_table as lines of text; `members` are their numbers, if not 0, 1, 2, ..."""
    lines = [f"{'k':>4} {'uniform':>9} {'learned':>9} {'pruned':>9}   {split} loss of k members"]
    for row in table["rows"]:
        lines.append("{k:>4} {uniform:>9.5f} {learned:>9.5f} {pruned:>9.5f}".format(**row))
    weights = table["weights"]
    members = members or range(len(weights))
    used = [f"{members[i]}:{weights[i]:.3f}" for i in table["ranked"] if weights[i] >= 0.0005]
    lines.append(f"prior gap:{table['gap']:.1e}  weights (member:weight) {' '.join(used)}")
    return lines


def data_efficiency(loss):
    """Tokens at which a standard baseline reaches `loss` on FineWeb, over 100M, as text."""
    times = (2, 4, 6, 8, 10, 20)
    losses = (3.703, 3.370, 3.200, 3.123, 3.046, 2.892)
    if loss > losses[0]:  # no extrapolation
        return "<2x"
    if loss < losses[-1]:
        return ">20x"
    return f"{np.interp(-loss, np.negative(losses), times):.2f}x"
