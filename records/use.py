"""Commands of train_q0.py that use a population: `select` fits its prior again, `evaluate` scores
members and mixtures on token shards or on downstream tasks, `sample` writes text."""
import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train_q0 as q
from records.counting import Counting
from records.gate import load_gate
from records.gate import read as read_gate
from records.mixture import load_mixture
from records.population import (
    FINEWEB, best_members, check_tokenizer, data_efficiency, find_run, format_table,
    load_predictions, mixture_loss, population_table)


def parser_of(command):
    """Parser of a command that takes a run."""
    parser = q.Parser(prog=f"train_q0.py {command.__name__}", description=command.__doc__)
    parser.add_argument("run", help="name of a run under logs/, its folder, or "
                        "hf:USER/NAME[@REVISION] on the hub")
    return parser


def device(name):
    """A device that is there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise q.UserError("--device cuda, but torch sees no GPU: install a CUDA build of torch or "
                          "use --device cpu")
    return name


def number(kind, low, high):
    """Type of an argument: a number of this kind from `low` to `high`; NaN is in no range."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # for "invalid int value"
    return parse


DEVICE = dict(type=device, choices=("cpu", "cuda"), help="[the GPU where there is one]")
K = dict(type=int, help="mix the best K members only, found by pruning [all that have weight]")


def report_split(predictions):
    """The split that a run reports on; `predictions` has it and heldout."""
    split, = set(predictions) - {"heldout"}
    return split


# select -----------------------------------------------------------------------------------------

def select(argv):
    """Fit the prior again from the cached predictions of a run."""
    parser = parser_of(select)
    parser.add_argument(
        "--k", type=int, help="show the members and weights of this inference budget")
    args = parser.parse_args(argv)
    run = find_run(args.run)
    predictions = load_predictions(run)
    heldout = predictions["heldout"]
    split = report_split(predictions)
    scored = predictions[split]
    members, weights = best_members(heldout, args.k)
    print("\n".join(format_table(population_table(heldout, scored), split)))
    if args.k is not None:
        loss = mixture_loss(scored[members], weights)
        shown = [f"member:{i} weight:{w:.4f}" for i, w in zip(members, weights)]
        print(f"k:{len(members)} {split}_loss:{loss:.5f}", *shown)
    found = read_gate(run)
    if found is not None:
        buckets, about = found
        gate = load_gate(run, heldout[members], np.array(weights))
        with q.reading(f"the gate of {run}"):
            loss = -np.log(gate.mix(scored[members], buckets[split])).mean()
        print(f"k:{len(members)} by_context_{split}_loss:{loss:.5f} buckets:{about['buckets']} "
              f"strength:{about['strength']} gap:{gate.gap:.1e}")


# evaluate ---------------------------------------------------------------------------------------

def evaluate(argv):
    """Score a run's members and mixtures on token shards or on downstream tasks."""
    parser = parser_of(evaluate)
    parser.add_argument("--k", **K)
    parser.add_argument("--device", **DEVICE)
    parser.add_argument("--data", nargs="+", type=Path, metavar="SHARD",
                        help="token shards, such as data/wiki/val.bin")
    parser.add_argument("--tasks", help="tasks of EleutherAI's lm-evaluation-harness, such as "
                        "hellaswag,arc_easy,piqa")
    parser.add_argument("--task-folder",
                        help="folder with tasks of your own, in the harness's format")
    parser.add_argument("--limit", type=int, help="documents of a task to score [all]")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.tasks is None):
        both = ", not both: run it once for each" if args.data else ""
        raise q.UserError(f"evaluate needs either --data SHARD or --tasks NAMES{both}")
    if args.limit is not None and args.limit < 1:
        raise q.UserError(f"--limit {args.limit} must be at least 1")
    learned = load_mixture(args.run, args.k, args.device)
    if args.data:
        evaluate_text(learned, args.data)
        return
    try:
        from records.harness import evaluate_tasks
    except ImportError as e:
        raise q.UserError(
            f"--tasks needs EleutherAI's harness: pip install lm_eval ({e})") from None
    evaluate_tasks(compared(learned), args.tasks.split(","), args.task_folder, args.limit)


def check_shard(path):
    """Raise UserError for a folder: which of its shards is meant?"""
    if path.is_dir():
        shards = ", ".join(sorted(file.name for file in path.glob("*.bin"))) or "none"
        raise q.UserError(f"--data {path} is a folder: name a shard in it ({shards})")


def compared(learned):
    """{name: Mixture}: what the mixture is compared with, and itself as the last one."""
    everyone = learned.kept
    M = len(everyone)
    k = len(learned.members)
    best = max(everyone, key=lambda i: np.log(learned.heldout[i]).mean())
    plain = replace(learned, gate=None)
    found = {f"best on held-out: member {best}": replace(plain, members=[best], weights=[1.0]),
             f"uniform, all {M}": replace(plain, members=everyone, weights=[1 / M] * M)}
    if k < M:
        found[f"uniform, best {k}"] = replace(plain, weights=[1 / k] * k)
    found[f"learned, {k}"] = plain
    if learned.gate is not None:
        found[f"by context, {k}"] = learned
    return found


def evaluate_text(learned, files):
    """Print loss, perplexity and bits per byte of members and mixtures, with intervals over
    documents. Every member makes one pass over the text, alone in memory; all mixtures come from
    what it gave the true tokens."""
    first = learned.member(learned.kept[0])
    with q.reading("the manifest.json of the run"):
        eot = int(learned.manifest["eot"])
    for file in files:
        check_shard(file)
        check_tokenizer(learned.folder, file.parent)
    tokens = np.concatenate([q.read_shard(f, first.vocab_size) for f in files])
    sequences = q.cut(tokens, first.cfg.seq_len)
    if not len(sequences):
        raise q.UserError(f"{files[0]} has {len(tokens)} tokens, fewer than one sequence of "
                          f"{first.cfg.seq_len + 1}")
    targets = sequences[:, 1:].flatten()
    started = np.cumsum(tokens == eot)  # documents so far
    documents = q.cut(started, first.cfg.seq_len)[:, 1:].flatten()
    P = predictions_on(learned, sequences, first.cfg.micro_batch)
    by_member = dict(zip(learned.kept, P))
    rows = {f"member {i}": -np.log(p.astype(np.float64)) for i, p in by_member.items()}
    for name, mixture in compared(learned).items():
        pairs = zip(mixture.members, mixture.weights)
        if mixture.gate is None:
            mixed = sum(w * by_member[i].astype(np.float64) for i, w in pairs)
        else:
            buckets = learned.buckets(sequences[:, :-1]).flatten()
            mixed = mixture.gate.mix([by_member[i] for i in mixture.members], buckets)
        rows[name] = -np.log(mixed)
    sizes = token_sizes(learned, first.vocab_size)[targets]
    print(f"{len(targets)} tokens predicted, {sizes.sum()} bytes, {len(set(documents))} documents; "
          "intervals of 95%, by drawing documents")
    print_losses(rows, documents, targets != eot, sizes.sum())
    table = population_table(learned.heldout[learned.kept], P)
    print("\n".join(format_table(table, files[0].stem, learned.kept)))
    if is_validation_text(files, learned.manifest):
        last = list(rows.values())[-1]
        print(f"data_efficiency:{data_efficiency(last.mean())}")


def predictions_on(learned, sequences, batch):
    """p(true token) of every member that has weights, float32 [M, N]."""
    world = q.World(device=learned.device)
    batch = min(batch, len(sequences))  # which a member's config may put at any number
    found = []
    for i in learned.kept:
        member = learned.member(i)
        if isinstance(member, Counting):
            found.append(member.true_token_probs(sequences))
        else:
            found.append(q.true_token_probs(member, sequences, batch, world))
    return np.stack(found)


def token_sizes(learned, vocab_size):
    """Bytes of each token [V]: 0 for <|endoftext|>, and for all where there is no tokenizer."""
    sizes = np.zeros(vocab_size, dtype=np.int64)
    if learned.encoding:
        for token in range(learned.encoding.eot_token):
            sizes[token] = len(learned.encoding.decode_single_token_bytes(token))
    return sizes


def print_losses(rows, documents, is_text, size):
    """The table of rows {name: nats [N]}. is_text [N] are the tokens that `size` bytes spell."""
    means = bootstrap_means(np.stack(list(rows.values())), documents)
    last = list(rows.values())[-1]
    print(f"{'':>27} {'loss':>8} {'interval':>15} {'perplexity':>10} {'bits/byte':>9}"
          "   more than the last row")
    for (name, nats), drawn in zip(rows.items(), means.T):
        loss = nats.mean()
        low, high = np.quantile(drawn, (0.025, 0.975))
        less, more = np.quantile(drawn - means[:, -1], (0.025, 0.975))
        bits = f"{nats[is_text].sum() / math.log(2) / size:.4f}" if size else "n/a"
        print(f"{name:>27} {loss:8.5f} {low:7.4f} {high:7.4f} {math.exp(loss):10.3f} {bits:>9}   "
              f"{loss - last.mean():+.4f} ({less:+.4f} {more:+.4f})")


def bootstrap_means(nats, documents, draws=1000):
    """[draws, R] means of nats [R, N] over documents (their numbers [N]) drawn with replacement,
    the same for every row, so that differences between rows are paired."""
    _, documents = np.unique(documents, return_inverse=True)
    lengths = np.bincount(documents)
    sums = np.stack([np.bincount(documents, row) for row in nats], axis=1)
    D = len(lengths)
    rng = np.random.default_rng(q.seed_of("bootstrap"))
    often = rng.multinomial(D, np.full(D, 1 / D), size=draws).astype(np.float64)
    return often @ sums / (often @ lengths)[:, None]


def is_validation_text(files, manifest):
    """Whether the files are FineWeb's validation text: data efficiency is of that alone."""
    with q.reading("the manifest.json of the run"):
        if manifest["name"] not in FINEWEB:
            return False
        known = {f["sha256"] for f in manifest["splits"]["val"]["files"]}
    return known == {q.sha256_of(f) for f in files}


# sample -----------------------------------------------------------------------------------------

def sample(argv):
    """Write text token by token, each drawn from the mixture."""
    parser = parser_of(sample)
    parser.add_argument("--k", **K)
    parser.add_argument("--device", **DEVICE)
    parser.add_argument("--prompt", default="", help="beginning of the document")
    parser.add_argument("--tokens", type=number(int, 1, math.inf), default=128,
                        help="at most [128]")
    parser.add_argument("--temperature", type=number(float, 0, 100), default=1.0,
                        help="0 takes the likeliest token [1]")
    parser.add_argument("--top-p", type=number(float, 0, 1), default=1.0,
                        help="draw from the fewest tokens of this probability [1]")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="[0]")
    parser.add_argument("--samples", type=number(int, 1, 10_000), default=1,
                        help="texts written at once, each with a seed of its own [1]")
    parser.add_argument("--stream", action="store_true", help="read each member from the disk for "
                        "every token; without it only where they do not fit into memory")
    args = parser.parse_args(argv)
    mixture = load_mixture(args.run, args.k, args.device, args.samples, args.stream)
    pieces = mixture.write(args.prompt, args.tokens, args.temperature, args.top_p, args.seed)
    if args.samples > 1:
        for i, text in enumerate(zip(*pieces)):
            print(f"--- sample {i}", args.prompt + "".join(text), sep="\n")
        return
    print(args.prompt, end="", flush=True)
    for piece, in pieces:
        print(piece, end="", flush=True)
    print()
