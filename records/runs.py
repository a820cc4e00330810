"""Commands of train_q0.py that make a run of runs: `pool` makes one population of several runs,
`average` one model of a run's members, the mean of their weights, `count` adds members that count.
"""
import contextlib
import math
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import train_q0 as q
from records import counting, gate, neighbours
from records.population import (
    best_members, fetch, find_run, has_weights, load_member, load_population, load_predictions,
    mixture_loss, plain_name, recorded_name, report, title)
from records.use import DEVICE, parser_of, report_split

# Folders of `own_folder` on this machine: locks need not reach others that share the disk
MAKING = re.compile(rf"\.q0-{re.escape(platform.node())}-[a-z0-9_]{{8}}\.making")


@contextlib.contextmanager
def new_run(name, default, command):
    """Yield the folder of a run `name` without a log, or of one named `default` or, where that is
    taken, default2 and so on. It appears under logs/ once all of it is there, else not at all."""
    if q.set_by_torchrun("WORLD_SIZE", 1) > 1:
        raise q.UserError(f"{command} needs no torchrun: one process does it all")
    if name is not None:
        q.check_plain("--name", name)
        if os.path.lexists(q.LOGS / name):
            raise q.UserError(f"{q.LOGS / name} exists: give another --name")
    with own_folder(q.LOGS) as folder:
        (folder / "predictions").mkdir()
        yield folder
        final = publish(folder, [name] if name else free_names(default))
    q.say(f"written to {final}")


def free_names(name):
    yield name
    for i in range(2, 1000):
        yield f"{name}{i}"


def publish(folder, names):
    """Rename a folder to the first of `names` under logs/ that is free; nothing is replaced.
    Returns its path. Raises UserError where none is."""
    for name in names:
        final = q.LOGS / name
        if os.path.lexists(final):
            continue
        try:
            return folder.rename(final)
        except OSError:
            if not os.path.lexists(final):  # else another process took the name just now
                raise
    raise q.UserError(f"{final} exists: give another --name")


@contextlib.contextmanager
def own_folder(parent):
    """A folder of this process alone under `parent`, gone at the end of the block; those that
    killed processes left go first."""
    parent.mkdir(parents=True, exist_ok=True)
    for path in parent.iterdir():
        held = hold(path) if MAKING.fullmatch(path.name) else None
        if held is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(held)
    scratch = Path(tempfile.mkdtemp(prefix=f".q0-{platform.node()}-", dir=parent))
    held = hold(scratch)
    try:
        scratch = scratch.rename(f"{scratch}.making")  # held before others may take it for a rest
        new = scratch / "new"
        new.mkdir()
        yield new
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            os.close(held)


def hold(folder):
    """Lock a folder until this process ends or closes the descriptor that is returned; None where
    it is a link or not one of `own_folder`, where another process holds it, or without locks."""
    if q.fcntl is None:
        return None
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        q.fcntl.flock(held, q.fcntl.LOCK_EX | q.fcntl.LOCK_NB)
        if set(os.listdir(held)) <= {"new"}:
            return held
    except OSError:
        pass
    os.close(held)
    return None


def copy_data(source, folder):
    """What turns tokens into text."""
    (folder / "data").mkdir()
    for name in ("manifest.json", "tokenizer.tiktoken"):
        if (source / "data" / name).exists():
            shutil.copyfile(source / "data" / name, folder / "data" / name)


def check_not_counted(about, run, command):
    """Raise UserError where a run has members that count already."""
    if "counted_of" in about:
        raise q.UserError(f"{title(run)} has members that count already: {command} "
                          f"{about['counted_of']}, which it was made of")


def finish(folder, curve, predictions, about, more=()):
    """Print the table of a new run's members and write run.json and result.json; `more` is for the
    result alone."""
    split = predictions.splits[1]
    table, lines = report(predictions, about["data"]["name"])
    if len(curve) > 1:
        q.say("\n".join(lines))
    q.save_json(folder / "run.json", about)
    result = {f"final_{split}_loss": curve[-1]["learned"], "members": len(curve), "curve": curve,
              "table": table}
    q.save_json(folder / "result.json", {**result, **dict(more), **about})


# pool -------------------------------------------------------------------------------------------

def pool(argv):
    """Make one population of finished runs on one text, such as seeds that several machines
    trained. It becomes a run of its own: their members, and a prior over all of them."""
    parser = q.Parser(prog="train_q0.py pool", description=pool.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="name of a run under logs/, its folder, or hf:USER/NAME[@REVISION] on "
                        "the hub")
    parser.add_argument("--name",
                        help="name of the new run under logs/ [the first RUN's, with _pool, or "
                        "_pool2 and so on]")
    args = parser.parse_args(argv)
    runs = [find_run(run).resolve() for run in args.runs]
    with new_run(args.name, f"{plain_name(runs[0])}_pool", "pool") as folder:
        pool_into(folder, runs)


def pool_into(folder, runs):
    """Write the members of `runs` and their prior to `folder`. Raises UserError for runs that do
    not mix."""
    finished = [read_finished(run, "pool") for run in runs]
    first = finished[0]
    sources = {}
    hashes = set()
    for run in finished:
        differ = [key for key in first.shared if run.shared.get(key) != first.shared[key]]
        if differ:
            raise q.UserError(f"{title(run.folder)} differs from {title(first.folder)} in "
                              f"{', '.join(differ)}: runs that mix must agree in it")
        add_sources(sources, hashes, run)
    copy_data(first.folder, folder)
    split = first.shared["split"]
    predictions = q.Predictions(folder, ("heldout", split))
    curve = []
    for run in finished:
        for i, entry in enumerate(run.curve):
            n = len(curve)
            copy_member(run.folder, i, folder, n)
            mixed = predictions.mixtures(range(n + 1))
            curve.append({**entry, "member": n, "run": recorded_name(run.folder), **mixed})
        q.say(f"run:{plain_name(run.folder)} members:{len(run.curve)} "
              f"learned_{split}_loss:{run.loss:.5f} "
              f"pooled_{split}_loss:{curve[-1]['learned']:.5f}")
    about = {"config": first.config, "data": first.shared["data"], "pool_of": sources,
             "script": q.digest(q.SOURCE)}
    finish(folder, curve, predictions, about)


def add_sources(sources, hashes, run):
    """Add what a Finished run is made of to sources {name: config}, where a name is taken with a
    number, and its members to hashes {sha256 of predictions}. Raises UserError for a run that is
    there already: its name, settings and members are; another script may share the first two."""
    brought = {entry["predictions"] for entry in run.curve}
    for source, config in run.sources:
        for name in free_names(source):
            if name not in sources:
                break
            if sources[name] == config and brought & hashes:
                raise q.UserError(f"{title(run.folder)} brings the members of {name} a second "
                                  "time: give each run once")
        sources[name] = config
    hashes |= brought


@dataclass(frozen=True)
class Finished:
    """What a pool takes of a finished run."""
    folder: Path
    curve: list
    loss: float  # under its prior
    config: dict
    shared: dict  # what runs have in common whose members mix
    sources: list  # [(name, config), ...] of what it is made of, itself or the runs of a pool


def read_finished(folder, command):
    """A run with whole predictions, as `command` wants it. Raises UserError."""
    path = folder / "result.json"
    if not path.exists():
        raise q.UserError(f"{folder} is not complete: go on with it (--resume), then {command} it")
    split = report_split(load_predictions(folder))
    with q.reading(path):
        about = q.load_json(path)
        config = about["config"]
        shared = {k: config[k] for k in ("seq_len", "softcap", "train_tokens")}
        # a run with a teacher, or with split tokens, scores the same tokens as one without
        free = ("teacher", "tokenizer")
        shared["data"] = {k: v for k, v in about["data"].items() if k not in free}
        shared["corpus"] = about["data"]["name"]
        shared["split"] = split
        loss = float(about[f"final_{split}_loss"])
        if not math.isfinite(loss):
            raise ValueError(f"final_{split}_loss is {loss}")
        made_of = about.get("pool_of", {recorded_name(folder): config})
        sources = [(without_folders(name), theirs) for name, theirs in made_of.items()]
        run = Finished(folder, about["curve"], loss, config, shared, sources)
    check_not_counted(about, folder, command)
    return run


def without_folders(name):
    """The name of a pool's source; it may be a folder, as pools had it until 2026-11-28."""
    return name if name.startswith("hf:") else Path(name).name


def copy_member(source, i, folder, n):
    """Member i of a run becomes member n of another. Its weights get a second name, as no file of a
    member is ever written again."""
    shutil.copyfile(source / f"predictions/{i}.safetensors",
                    folder / f"predictions/{n}.safetensors")
    weights = fetch(source, i)
    if weights.exists():
        with q.reading(f"member {weights}"):
            q.check_format(q.load_json(weights / "config.json"))
        shutil.copytree(weights, folder / f"members/{n}", copy_function=link)


def link(source, target):
    try:
        os.link(os.path.realpath(source), target)  # the hub's cache is made of links
    except OSError:  # on another disk
        shutil.copyfile(source, target)


# average ----------------------------------------------------------------------------------------

def average(argv):
    """Make one model of each trajectory: the mean weights of its newest members. They become a run
    of their own."""
    parser = parser_of(average)
    parser.add_argument("--last", type=int, help="average so many [1, 2, 4, ... or all: the best "
                        "on held-out text]")
    parser.add_argument("--name", help="name of the new run under logs/ [RUN_mean, or "
                        "RUN_mean2 and so on]")
    parser.add_argument("--device", **DEVICE)
    args = parser.parse_args(argv)
    population = load_population(args.run, device=args.device)
    source = population.folder
    with q.reading(source / "run.json"):
        about = q.load_json(source / "run.json")
        cfg, _ = q.resolve(replace(q.Config(**about["config"]), device="cpu"))
        recorded = about["data"]
    check_not_counted(about, source, "average")
    if "average_of" in about:
        raise q.UserError(f"{title(source)} holds averages already: average "
                          f"{about['average_of']}, which they were made of")
    if "pool_of" in about:
        raise q.UserError(f"{title(source)} is a pool: average the runs it was made of: "
                          f"{', '.join(about['pool_of'])}")
    trajectories = members_with_weights(population, cfg.cycles)
    check_last(args.last, trajectories, source)
    corpus = corpus_of(source, cfg, recorded)
    with new_run(args.name, f"{plain_name(source)}_mean", "average") as folder:
        averages = Averages(folder, population, corpus, cfg)
        copy_data(source, folder)
        for j, members in enumerate(trajectories):
            averages.add(j, members, args.last)
        finish(folder, averages.curve, averages.predictions, {
            **about, "average_of": recorded_name(source)})


def corpus_of(run, cfg, recorded):
    """The Corpus that a run was trained on; `recorded` has its hashes. Raises UserError where its
    folder holds other data by now."""
    corpus = q.load_corpus(q.find_data(cfg), cfg.seq_len, cfg.train_tokens)
    if not corpus.hashes.items() <= recorded.items():
        raise q.UserError(f"{q.find_data(cfg)} does not hold the data of {title(run)} any more: "
                          "their hashes differ")
    return corpus


def members_with_weights(population, cycles):
    """[[member, ...], ...] of each trajectory, newest first: --keep-members drops the oldest."""
    M = len(population.heldout)
    trajectories = []
    for first in range(0, M, cycles):
        members = range(first, min(first + cycles, M))
        trajectories.append([i for i in members if has_weights(population.folder, i)][::-1])
    return trajectories


def check_last(last, trajectories, source):
    """Raise UserError where a trajectory has no `last` members, or none at all."""
    fewest = min(len(members) for members in trajectories)
    has = f"{title(source)} has the weights of {fewest} members of a trajectory"
    if not fewest:
        raise q.UserError(has)
    if last is not None and not 1 <= last <= fewest:
        raise q.UserError(f"{has}: --last {last} is out of range")


class Averages:
    """The members of a new run, each the mean of a trajectory's newest ones."""
    def __init__(self, folder, population, corpus, cfg):
        self.folder = folder
        self.population = population
        self.corpus = corpus
        self.cfg = cfg
        self.cached = load_predictions(population.folder)
        self.split = report_split(self.cached)
        self.predictions = q.Predictions(folder, ("heldout", self.split))
        self.curve = []

    def probs(self, model, split):
        """p(true token) of a split, float32 [N]."""
        sequences = self.corpus.eval_sequences(split)
        world = q.World(device=self.population.device)
        return q.true_token_probs(model, sequences, self.cfg.micro_batch, world)

    def add(self, j, members, last):
        """Member j: the mean of the first `last` of `members`, or the best on held-out text."""
        folder = self.folder / f"members/{j}"
        place = {"member": j, "traj": j}
        losses = {}
        for count, model in means(self.population, members):
            tried = count == last if last else is_power_of_two(count) or count == len(members)
            if not tried:
                continue
            losses[count] = mixture_loss([self.probs(model, "heldout")], [1.0])
            q.say(f"traj:{j} last:{count} heldout_loss:{losses[count]:.5f}")
            if losses[count] == min(losses.values()):
                place["last"] = count
                q.save_member(folder, model.cfg, model.vocab_size, dict(model.named_parameters()),
                              place)
        saved = load_member(folder, device=self.population.device)
        self.predictions.write(j, {s: self.probs(saved, s) for s in self.predictions.splits})
        self.curve.append({
            **place, "heldout_loss_by_last": losses, **self.predictions.mixtures(range(j + 1)),
            **q.hashes_of(self.folder, j)})
        newest = mixture_loss(self.cached[self.split][members[:1]], [1.0])
        q.say(f"traj:{j} last:{place['last']} {self.split}_loss:{self.curve[-1]['loss']:.5f} "
              f"newest_{self.split}_loss:{newest:.5f}")


def is_power_of_two(n):
    return n.bit_count() == 1


@torch.no_grad()
def means(population, members):
    """Yield (count, model): the mean weights of the first `count` of `members`, summed in float32,
    rounded to bf16 as a member's are on the disk. It is the same model each time."""
    model = population.member(members[0])
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for count, i in enumerate(members, 1):
        for total, p in zip(totals, population.member(i).parameters()):
            total.add_(p)
        for p, total in zip(model.parameters(), totals):
            p.copy_((total / count).bfloat16())
        yield count, model


# count ------------------------------------------------------------------------------------------

def count(argv):
    """Add members that count to a finished run: n-grams of its training text, and of the document
    so far; and weights that depend on the context. They become a run of its members and these."""
    parser = parser_of(count)
    parser.add_argument("--name", help="name of the new run under logs/ [RUN_counted, or "
                        "RUN_counted2 and so on]")
    parser.add_argument("--neighbours", action="store_true",
                        help="one member more: what came after similar contexts of the training "
                        "text, as the newest member sees them; minutes")
    args = parser.parse_args(argv)
    source = find_run(args.run).resolve()
    finished = read_finished(source, "count")
    with q.reading(source / "result.json"):
        cfg, _ = q.resolve(replace(q.Config(**finished.config), device="cpu"))
    corpus = corpus_of(source, cfg, finished.shared["data"])
    with new_run(args.name, f"{plain_name(source)}_counted", "count") as folder:
        copy_data(source, folder)
        newest = len(finished.curve) - 1 if args.neighbours else None
        count_into(folder, finished, corpus, cfg, newest)


def count_into(folder, run, corpus, cfg, newest):
    """Write the members of a Finished run, those that count, and their Gate to `folder`; and one
    with the neighbours of member `newest`, where it is not None."""
    split = run.shared["split"]
    predictions = q.Predictions(folder, ("heldout", split))
    curve = list(run.curve)
    for i in range(len(curve)):
        copy_member(run.folder, i, folder, i)
    rows = {s: corpus.eval_sequences(s).astype(np.int64) for s in predictions.splits}
    about = {"vocab_size": corpus.vocab_size, "eot": corpus.hashes["eot"], "cfg": cfg}
    members = counts = counting.members_of(corpus.splits["train"], **about)
    if newest is not None:
        model = load_member(fetch(run.folder, newest))
        found = neighbours.neighbours_of(model, corpus.splits["train"], about["eot"])
        members = [found, *counts]
    for member in members:
        n = len(curve)
        counting.save(folder / f"members/{n}", member, {"member": n})
        predictions.write(n, {s: member.true_token_probs(rows[s]) for s in rows})
        mixed = predictions.mixtures(range(n + 1))
        curve.append({"member": n, "kind": member.kind, **mixed, **q.hashes_of(folder, n)})
        q.say(f"member:{n} kind:{member.kind} {split}_loss:{mixed['loss']:.5f} "
              f"learned_{split}_loss:{mixed['learned']:.5f}")
    about_gate, loss = gate_into(folder, counts, rows, predictions)
    made = {"config": run.config, "data": run.shared["data"], "script": q.digest(q.SOURCE),
            "counted_of": recorded_name(run.folder)}
    more = {f"final_{split}_loss": loss, "gate": about_gate, "loss_before": run.loss}
    finish(folder, curve, predictions, made, more)
    q.say(f"final_{split}_loss:{loss:.5f} before:{run.loss:.5f} buckets:{about_gate['buckets']} "
          f"strength:{about_gate['strength']} gap:{about_gate['gap']:.1e}")


def gate_into(folder, counts, rows, predictions):
    """Fit the Gate of all members and write the buckets of `rows` {split: sequences}. Returns what
    the result says of it, and its loss on the second split."""
    buckets = {s: gate.all_buckets(counts, rows[s]) for s in rows}
    gate.save(folder, buckets)
    number = gate.number_of_buckets(counts)
    eot = counts[0].eot
    documents = np.cumsum(rows["heldout"] == eot).reshape(rows["heldout"].shape)[:, 1:].flatten()
    heldout = np.stack(predictions.of("heldout", range(len(predictions.cached))))
    strength = gate.choose_strength(heldout, buckets["heldout"], number, documents)
    members, weights = best_members(heldout)
    found = gate.fit_gate(
        heldout[members], buckets["heldout"], number, np.array(weights), strength)
    split = predictions.splits[1]
    mixed = found.mix(predictions.of(split, members), buckets[split])
    about = {"buckets": number, "strength": strength, "gap": found.gap,
             "sha256": q.sha256_of(folder / gate.FILE)}
    return about, -float(np.log(mixed).mean())
