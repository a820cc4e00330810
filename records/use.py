"""A population in use: `python train_q0.py select` fits its prior again; `evaluate` scores members and mixtures on token
shards, or on downstream tasks through EleutherAI's lm-evaluation-harness; `sample` writes text. Members mix their
probabilities token by token. `average` makes one model of them, the mean of their weights; `pool` makes one population
of several runs."""
import codecs
import contextlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import train_q0 as q


def parser_of(command):
    """Parser with the arguments that the commands share."""
    parser = q.Parser(prog=f"train_q0.py {command.__name__}", description=command.__doc__)
    parser.add_argument("run", help="name of a run under logs/, or its folder")
    parser.add_argument("--k", type=int, help="mix the best K members only, found by pruning [all that have weight]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU where there is one]")
    return parser


def population_of(args, k=None):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise q.UserError("--device cuda, but torch sees no GPU: install a CUDA build of torch or use --device cpu")
    return q.load_population(args.run, k, args.device)


def select(argv):
    """Fit the prior again from the cached predictions of a run."""
    p = q.Parser(prog="train_q0.py select", description=select.__doc__)
    p.add_argument("run", help="name of a run under logs/, or its folder")
    p.add_argument("--k", type=int, help="show the members and weights of this inference budget")
    args = p.parse_args(argv)
    predictions = q.load_predictions(q.find_run(args.run))
    (split,) = set(predictions) - {"heldout"}
    print("\n".join(q.format_table(q.population_table(predictions["heldout"], predictions[split]), split)))
    if args.k is not None:
        members, weights = q.best_members(predictions["heldout"], args.k)
        print(f"k:{len(members)} {split}_loss:{q.mixture_loss(predictions[split][members], weights):.5f} "
              + " ".join(f"member:{i} weight:{w:.4f}" for i, w in zip(members, weights)))


def evaluate(argv):
    """Score a run's members and mixtures on token shards or on downstream tasks."""
    parser = parser_of(evaluate)
    parser.add_argument("--data", nargs="+", metavar="SHARD", help="token shards, such as data/wiki/val.bin")
    parser.add_argument("--tasks", help="tasks of EleutherAI's lm-evaluation-harness, such as hellaswag,arc_easy,piqa")
    parser.add_argument("--task-folder", help="folder with tasks of your own, in the harness's format")
    parser.add_argument("--limit", type=int, help="documents of a task to score [all]")
    args = parser.parse_args(argv)
    if (args.data is None) == (args.tasks is None):
        raise q.UserError("evaluate needs either --data SHARD or --tasks NAMES")
    if args.limit is not None and args.limit < 1:
        raise q.UserError(f"--limit {args.limit} must be at least 1")
    population = population_of(args, args.k)
    M, k, best = len(population.heldout), len(population.members), int(np.log(population.heldout).mean(1).argmax())
    mixtures = {f"best on held-out: member {best}": replace(population, members=[best], weights=[1.0]),
                f"uniform, all {M}": replace(population, members=list(range(M)), weights=[1 / M] * M),
                **({f"uniform, best {k}": replace(population, weights=[1 / k] * k)} if k < M else {}),
                f"learned, {k}": population}
    if args.tasks:
        evaluate_tasks(mixtures, args.tasks.split(","), args.task_folder, args.limit)
    else:
        evaluate_text(population, mixtures, list(map(Path, args.data)))


# ---------------------------------------------------------------------------------------------------------------------
# Text

def evaluate_text(population, mixtures, files):
    """Print loss, perplexity and bits per byte of members and mixtures, with bootstrap intervals over documents. Every
    member makes one pass over the text, alone in memory; all mixtures come from what it gave the true tokens."""
    first, manifest, M = population.member(0), population.manifest, len(population.heldout)
    tokens, T = np.concatenate([q.read_shard(f, first.vocab_size) for f in files]), first.cfg.seq_len
    cut = lambda x: x[:len(x) // (T + 1) * (T + 1)].reshape(-1, T + 1)
    sequences, documents = cut(tokens), cut(np.cumsum(tokens == manifest["eot"]))[:, 1:].flatten()
    if not len(sequences):
        raise q.UserError(f"{files[0]} has {len(tokens)} tokens, fewer than one sequence of {T + 1}")
    world, batch = q.World(device=population.device), first.cfg.micro_batch
    P = np.stack([q.true_token_probs(population.member(i), sequences, batch, world) for i in range(M)])
    rows = {f"member {i}": ([i], [1.0]) for i in range(M)} | {n: (m.members, m.weights) for n, m in mixtures.items()}
    nats = np.stack([-np.log(sum(x * P[i].astype(np.float64) for i, x in zip(*row))) for row in rows.values()])
    means, targets = bootstrap_means(nats, documents), sequences[:, 1:].flatten()
    text, sizes = targets != manifest["eot"], np.zeros(first.vocab_size)  # <|endoftext|> stays out of bits per byte
    if population.encoding:
        for token in range(manifest["eot"]):
            sizes[token] = len(population.encoding.decode_single_token_bytes(token))
    size = sizes[targets].sum()

    print(f"{len(targets)} tokens predicted, {size:.0f} bytes, {len(set(documents))} documents; intervals of 95%, by "
          f"drawing documents\n{'':>27} {'loss':>8} {'interval':>15} {'perplexity':>10} {'bits/byte':>9}"
          "   more than the last row")
    for name, x, drawn in zip(rows, nats, means.T):
        (low, high), (less, more) = (np.quantile(d, (0.025, 0.975)) for d in (drawn, drawn - means[:, -1]))
        bits = f"{x[text].sum() / math.log(2) / size:.4f}" if size else "n/a"
        print(f"{name:>27} {x.mean():8.5f} {low:7.4f} {high:7.4f} {math.exp(x.mean()):10.3f} {bits:>9}   "
              f"{x.mean() - nats[-1].mean():+.4f} ({less:+.4f} {more:+.4f})")
    print("\n".join(q.format_table(q.population_table(population.heldout, P), files[0].stem)))
    if manifest["name"] in ("fineweb", "slowrun"):
        known = {f["sha256"] for f in manifest["splits"]["val"]["files"]}
        if known == {q.sha256_of(f) for f in files}:  # of other text it would mean nothing
            print(f"data_efficiency:{q.data_efficiency(nats[-1].mean())}")


def bootstrap_means(nats, documents, draws=1000):
    """[draws, R] means of nats [R, N] over documents (their numbers [N]) drawn with replacement, the same for every
    row, so that differences between rows are paired."""
    documents = np.unique(documents, return_inverse=True)[1]
    lengths, sums = np.bincount(documents), np.stack([np.bincount(documents, x) for x in nats], axis=1)
    D, rng = len(lengths), np.random.default_rng(q.seed_of("bootstrap"))
    often = rng.multinomial(D, np.full(D, 1 / D), size=draws).astype(np.float64)
    return often @ sums / (often @ lengths)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Downstream tasks

def evaluate_tasks(mixtures, tasks, folder, limit):
    """Print the harness's scores of every mixture. Raises UserError where the harness or a task is not there."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise q.UserError("--tasks needs EleutherAI's harness: pip install lm_eval") from None
    with q.reading(f"a task of {', '.join(tasks)}"):
        manager = TaskManager(include_path=folder)  # once: the harness reads 14,000 files
        manager.load(tasks)  # a wrong name or file ends here; what goes wrong below is no matter of the tasks
    for name, mixture in mixtures.items():
        found = lm_eval.simple_evaluate(harness_model(replace(mixture)), tasks=tasks, limit=limit, log_samples=False,
                                        task_manager=manager)["results"]  # of a copy, which lets go of its members
        for task, scores in found.items():
            for metric, kind in (key.split(",") for key in scores if "," in key and "_stderr" not in key):
                error = scores[f"{metric}_stderr,{kind}"]
                error = error if isinstance(error, str) else f"{error:.4f}"  # "N/A" where the harness has none
                print(f"task:{task} {metric}:{scores[f'{metric},{kind}']:.4f} stderr:{error} {name}")


def harness_model(population):
    """`population` as a model of the harness. What is longer than a sequence loses its front."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    T, batch = population.models[0].cfg.seq_len, population.models[0].cfg.micro_batch

    class Mixture(TemplateLM):
        eot_token_id = population.encode("")[0]

        def tok_encode(self, string, add_special_tokens=None, **_):
            return population.encode(string)[add_special_tokens is False:]  # a context begins its document

        def _loglikelihood_tokens(self, requests, **_):
            rows = [(context + continuation)[-T - 1:] for _, context, continuation in requests]
            found, by_length = [None] * len(rows), sorted(range(len(rows)), key=lambda i: -len(rows[i]))
            for part in (by_length[i:i + batch] for i in range(0, len(rows), batch)):
                longest = len(rows[part[0]])
                tokens = torch.tensor([rows[i] + [0] * (longest - len(rows[i])) for i in part])  # padding comes last
                tokens = tokens.to(population.device)
                log_p, targets = population.log_probs(tokens[:, :-1]), tokens[:, 1:]
                scores, hits = log_p.gather(2, targets[..., None])[..., 0].double(), log_p.argmax(-1) == targets
                for i, score, hit in zip(part, scores, hits):
                    end = len(rows[i]) - 1
                    where = slice(max(0, end - len(requests[i][2])), end)
                    found[i] = float(score[where].sum()), bool(hit[where].all())
            return found

        def loglikelihood_rolling(self, requests, **_):
            totals = []
            for (text,) in (r.args for r in requests):
                windows = get_rolling_token_windows(self.tok_encode(text, False), self.eot_token_id, T, 1)
                scored = self._loglikelihood_tokens([("", *make_disjoint_window(w)) for w in windows])
                totals.append(sum(score for score, _ in scored))
            return totals

        def generate_until(self, requests, **_):
            texts = []
            for i, request in enumerate(requests):  # a request that is repeated draws another text each time
                prompt, options = request.args[0], normalize_gen_kwargs(request.args[1])
                stops, text = list(filter(None, options["until"])), ""
                temperature = options.get("temperature", 1.0) if options["do_sample"] else 0.0
                for piece in generate(population, prompt, options["max_gen_toks"], temperature,
                                      options.get("top_p", 1.0), seed=i):
                    text += piece
                    if any(stop in text for stop in stops):
                        break
                texts.append(text[:min((text.find(stop) for stop in stops if stop in text), default=None)])
            return texts

    return Mixture()


# ---------------------------------------------------------------------------------------------------------------------
# Text from the mixture

def generate(population, prompt, tokens=128, temperature=1.0, top_p=1.0, seed=0):
    """Yield the pieces of text that follow `prompt`, up to the end of the document or `tokens` of them; temperature 0
    takes the likeliest token, top_p draws from the fewest tokens that have this probability together. Keys and values
    are not cached: a token costs a forward pass of every member."""
    ids, encoding, T = population.encode(prompt), population.encoding, population.models[0].cfg.seq_len
    g, utf8 = torch.Generator().manual_seed(seed), codecs.getincrementaldecoder("utf-8")("replace")
    for _ in range(tokens):
        log_p = population.log_probs(torch.tensor([ids[-T:]], device=population.device))[0, -1].cpu()
        p, order = torch.softmax(log_p / max(temperature, 1e-6), dim=-1).sort(descending=True, stable=True)
        p[1:][p.cumsum(0)[:-1] >= top_p] = 0
        ids.append(int(order[p.multinomial(1, generator=g)]))
        if ids[-1] == encoding.eot_token:
            break
        yield utf8.decode(encoding.decode_single_token_bytes(ids[-1]))
    yield utf8.decode(b"", final=True)


def sample(argv):
    """Write text token by token, each drawn from the mixture."""
    parser = parser_of(sample)
    parser.add_argument("--prompt", default="", help="beginning of the document")
    parser.add_argument("--tokens", type=int, default=128, help="at most [128]")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token [1]")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the fewest tokens of this probability [1]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    args = parser.parse_args(argv)
    population = population_of(args, args.k)
    print(args.prompt, end="", flush=True)
    for piece in generate(population, args.prompt, args.tokens, args.temperature, args.top_p, args.seed):
        print(piece, end="", flush=True)
    print()


# ---------------------------------------------------------------------------------------------------------------------
# Runs made of runs

@contextlib.contextmanager
def new_run(name, command):
    """Yield the folder of a run `name` without a log. It appears under logs/ once all of it is there, else not at all."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise q.UserError(f"{command} needs no torchrun: one process does it all")
    if Path(name).name != name or name in (".", ".."):
        raise q.UserError(f"--name {name} must be a plain name: the run is written to logs/NAME")
    if (q.LOGS / name).exists():
        raise q.UserError(f"{q.LOGS / name} exists: give another --name")
    folder = q.LOGS / f"{name}.tmp"
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    try:
        (folder / "predictions").mkdir(parents=True)
        yield folder
        folder.rename(q.LOGS / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"written to {q.LOGS / name}")


def finish(folder, curve, found, split, about):
    """Print the table of members with predictions `found` {split: [M, N]} and write run.json and result.json."""
    table = q.population_table(np.stack(found["heldout"]), found[split])
    if len(curve) > 1:
        print("\n".join(q.format_table(table, split)))
    q.save_json(folder / "run.json", about)
    q.save_json(folder / "result.json", {f"final_{split}_loss": curve[-1]["learned"], "members": len(curve),
                                         "curve": curve, "table": table, **about})


def pool(argv):
    """Make one population of finished runs on one text, such as seeds that several machines trained. It becomes a run of
    its own: their members, and a prior over all of them."""
    parser = q.Parser(prog="train_q0.py pool", description=pool.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="name of a run under logs/, or its folder")
    parser.add_argument("--name", help="name of the new run under logs/ [the first RUN's, with _pool]")
    args = parser.parse_args(argv)
    runs, curve, found, of, first = [q.find_run(r).resolve() for r in args.runs], [], {}, {}, None
    with new_run(args.name or f"{runs[0].name}_pool", "pool") as folder:
        shutil.copytree(runs[0] / "data", folder / "data")
        for run in runs:
            if not (run / "result.json").exists():
                raise q.UserError(f"{run} is not complete: go on with it (--resume), then pool it")
            cached = q.load_predictions(run)
            with q.reading(run / "result.json"):
                about = json.loads((run / "result.json").read_text(encoding="utf-8"))
                entries, own = about["curve"], about.get("pool_of", {str(run): about["config"]})
                data = {k: v for k, v in about["data"].items() if k != "teacher"}
                mixes = [data, sorted(cached), *(about["config"][k] for k in ("seq_len", "softcap", "train_tokens"))]
            if twice := of.keys() & own.keys():
                raise q.UserError(f"{run} brings the members of {min(twice)} a second time: give each run once")
            if first and mixes != first:
                raise q.UserError(f"{run} differs from {runs[0]} in data, seq_len, softcap, --train-tokens or --report: "
                                  "runs that mix must agree in them")
            first, of = mixes, of | own
            (split,) = set(cached) - {"heldout"}
            for i, entry in enumerate(entries):
                n = len(curve)
                for s, p in cached.items():
                    found.setdefault(s, []).append(p[i])
                shutil.copyfile(run / f"predictions/{i}.safetensors", folder / f"predictions/{n}.safetensors")
                if (run / f"members/{i}").exists():
                    shutil.copytree(run / f"members/{i}", folder / f"members/{n}", copy_function=link)
                curve.append({**entry, "member": n, "run": str(run), **q.mixtures(found["heldout"], found[split])})
            print(f"run:{run.name} members:{len(entries)} learned_{split}_loss:{about[f'final_{split}_loss']:.5f} "
                  f"pooled_{split}_loss:{curve[-1]['learned']:.5f}", flush=True)
        finish(folder, curve, found, split, {"config": about["config"], "data": data, "pool_of": of})


def link(source, target):
    """Give a member's file a second name, as no file of a member is ever written again; on another disk, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def average(argv):
    """Make one model of each trajectory: the mean weights of its newest members. They become a run of their own."""
    parser = q.Parser(prog="train_q0.py average", description=average.__doc__)
    parser.add_argument("run", help="name of a run under logs/, or its folder")
    parser.add_argument("--last", type=int, help="average so many [1, 2, 4, ... or all: the best on held-out text]")
    parser.add_argument("--name", help="name of the new run under logs/ [RUN_mean]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[the GPU where there is one]")
    args = parser.parse_args(argv)
    population = population_of(args)
    source, M = population.folder, len(population.heldout)
    name = args.name or f"{source.name or source.resolve().name}_mean"
    with q.reading(source / "run.json"):
        about = json.loads((source / "run.json").read_text(encoding="utf-8"))
        cfg, hashes = q.Config(**about["config"]), about["data"].items()
    if "average_of" in about:
        raise q.UserError(f"{source} holds averages already: average {about['average_of']}, which they were made of")
    if "pool_of" in about:
        raise q.UserError(f"{source} is a pool: average the runs it was made of: {', '.join(about['pool_of'])}")
    trajectories = [[i for i in reversed(range(first, min(first + cfg.cycles, M)))  # --keep-members drops the oldest
                     if (source / f"members/{i}/model.safetensors").exists()] for first in range(0, M, cfg.cycles)]
    fewest = min(map(len, trajectories))
    if not 1 <= (1 if args.last is None else args.last) <= fewest:
        raise q.UserError(f"{source} has the weights of {fewest} members of a trajectory"
                          + (f": --last {args.last} is out of range" if args.last is not None else ""))
    corpus = q.load_corpus(q.find_data(cfg), cfg.seq_len, cfg.train_tokens)
    if not corpus.hashes.items() <= hashes:
        raise q.UserError(f"{q.find_data(cfg)} does not hold the data of {source} any more: their hashes differ")
    cached = {s: p[:M] for s, p in q.load_predictions(source).items()}  # the run may be under way
    (split,), world = set(cached) - {"heldout"}, q.World(device=population.device)
    probs = lambda model, s: q.true_token_probs(model, corpus.eval_sequences(s), cfg.micro_batch, world)
    found, curve = {s: [] for s in cached}, []

    with new_run(name, "average") as folder:
        shutil.copytree(source / "data", folder / "data")
        for j, members in enumerate(trajectories):
            losses, best = {}, math.inf
            for count, model in means(population, members):
                if count == (args.last or len(members)) or (not args.last and count.bit_count() == 1):
                    p = probs(model, "heldout")
                    losses[count] = q.mixture_loss([p], [1.0])
                    print(f"traj:{j} last:{count} heldout_loss:{losses[count]:.5f}", flush=True)
                    if losses[count] < best:
                        best, last, heldout = losses[count], count, p
                        q.save_member(folder / f"members/{j}", model.cfg, model.vocab_size,
                                      dict(model.named_parameters()), {"member": j, "traj": j, "last": count})
            scored = probs(q.load_member(folder / f"members/{j}", device=population.device), split)
            for s, p in {"heldout": heldout, split: scored}.items():
                found[s].append(p)
            path = folder / f"predictions/{j}.safetensors"
            q.write_atomically(path, lambda tmp: q.save_file({s: p[-1] for s, p in found.items()}, tmp))
            curve.append({"member": j, "traj": j, "last": last, "heldout_loss_by_last": losses,
                          **q.mixtures(found["heldout"], found[split]), "predictions": q.sha256_of(path),
                          "weights": q.sha256_of(folder / f"members/{j}/model.safetensors")})
            print(f"traj:{j} last:{last} {split}_loss:{curve[-1]['loss']:.5f} "
                  f"newest_{split}_loss:{q.mixture_loss(cached[split][members[:1]], [1.0]):.5f}", flush=True)
        finish(folder, curve, found, split, {**about, "average_of": str(source)})


@torch.no_grad()
def means(population, members):
    """Yield (count, model): the mean weights of the first `count` of `members`, summed in float32, rounded to bf16 as a
    member's are on the disk. It is the same model each time."""
    model, sums = population.member(members[0]), None
    for count, i in enumerate(members, 1):
        weights = [p.float() for p in population.member(i).parameters()]
        sums = weights if sums is None else [a.add_(b) for a, b in zip(sums, weights)]
        for p, total in zip(model.parameters(), sums):
            p.copy_((total / count).bfloat16())
        yield count, model
