"""The same numbers on any number of processes: 1, 2 and 4 ranks on gloo, torchrun, two nodes, failures. CPU only.

Importing torch is most of a process's start, so the ranks of most tests are forks of one process that imported it: this
file, run as a script, with the environment that torchrun sets. torchrun itself starts the runs that a user would start.
"""
import contextlib
import datetime
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

import train_q0 as q0

ROOT = Path(q0.__file__).resolve().parent
SIZES = (1, 2, 4)
VOCAB = 100  # padded to 128
# every feature of the model; one step a cycle, so three steps see the noise of two boundaries and, last, a teacher.
# Little weight decay: it acts where update and weight have one sign, so an update that rounds to the other side of 0
# changes a weight by lr * wd of it, 1e-2 at full decay; now by 5e-4 of one entry among thousands
STEPS = dict(layers=6, width=64, head_dim=16, mlp_hidden=96, seq_len=16, dropout=0.1, windows="SSSL", unet=True,
             x0_mix=True, value_embeds=True, attn_gates=True, head_mixing=True, smear=True, induction=True,
             loop_first=3, loop_last=4, loop_passes=3, mtp_weight=0.3, batch_tokens=256, micro_batch=2, epochs=3,
             cycles=3, lr_matrix=0.02, lr_head=0.01, grad_clip=0.05, weight_decay=0.05, wd_start=0.7, wd_end=1.0,
             distill_after=2, device="cpu")
# a run of a second: four micro-batches a step
RUN = ("--layers 1 --width 32 --head-dim 16 --mlp-hidden 64 --seq-len 32 --batch-tokens 512 --micro-batch 4 --epochs 8 "
       "--train-tokens 2000 --cycles 2 --distill-after 1 --lr-matrix 0.04 --lr-head 0.01 --weight-decay 1.3 "
       "--wd-start 0.7 --wd-end 1 --dropout 0.1 --precision float32 --device cpu --log-every 1 --data shards").split()


# ----------------------------------------------------------------------------------------------------------------------
# What a rank does. A job gets a folder to save in; the words after its name are its arguments

def rank_now():
    return int(os.environ.get("RANK", 0))


def corpus_in_memory():
    """Documents of 5 to 40 tokens, 16 sequences of 17 an epoch: the 256 tokens of one step."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, n).astype(np.uint16) for n in rng.integers(5, 41, 12)]
    documents.append(rng.integers(0, VOCAB, 16 * 17 + 3 - sum(map(len, documents))).astype(np.uint16))
    splits = {"train": np.concatenate(documents), "heldout": rng.integers(0, VOCAB, 17 * 7).astype(np.uint16),
              "val": rng.integers(0, VOCAB, 17 * 9).astype(np.uint16)}
    return q0.Corpus("made", VOCAB, splits, {}, tuple(documents), 16)


def config(**changes):
    return q0.resolve(q0.Config(**{**STEPS, **changes}))[0]


def three_steps(folder, cfg, world, keep):
    """The training loop itself, three optimizer steps long. Fills `keep` with what this rank fed and what it holds."""
    fed, keys, seed_of, training_loss, Optimizer = {}, [], q0.seed_of, q0.training_loss, q0.Optimizer

    def seeded(*key):
        if key[0] == "dropout":
            keys.append(key[-2:])  # (step, global micro-batch)
        return seed_of(*key)

    def fed_loss(model, teacher, cfg, tokens):
        assert keys[-1] not in fed
        fed[keys[-1]] = (tokens.clone(), bool(teacher))
        return training_loss(model, teacher, cfg, tokens)

    class Kept(Optimizer):
        def __init__(self, *args):
            super().__init__(*args)
            keep["groups"] = self.groups

    q0.seed_of, q0.training_loss, q0.Optimizer = seeded, fed_loss, Kept
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    result = q0.train(cfg, corpus_in_memory(), world, folder, q0.Log())
    q0.seed_of, q0.training_loss, q0.Optimizer = seed_of, training_loss, Optimizer
    groups = keep.pop("groups")
    keep.update(fed=fed, weights={n: p.detach().clone() for names, params, *_ in groups for n, p in zip(names, params)},
                state={names[0]: state for names, *_, state in groups}, result=result,
                units={names[0]: (sum(p.numel() for p in params) // math.prod(unit), unit)
                       for names, params, _, unit, *_ in groups})


def stirred_model(cfg):
    """Gates open, logits of order 1; in evaluation mode."""
    model, g = q0.GPT(cfg, VOCAB).init_weights(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


PROBS = ((13, 4), (9, 4), (1, 4), (5, 1))  # sequences, batch: 4, 3, 1 and 5 batches, the last one short


def some_sequences(n):
    return np.random.default_rng(n).integers(0, VOCAB, (n, 17)).astype(np.uint16)


def save(saved, folder):
    """Arrays become tensors: then the parent reads the file without unpickling code."""
    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return type(x)(map(plain, x)) if type(x) in (list, tuple) else tuple(x)
        return torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    torch.save(plain(saved), folder / f"{rank_now()}.pt")


def job_steps(folder):
    with q0.set_up_world(config()) as world:
        saved = {"probs": [q0.true_token_probs(stirred_model(config(precision="float32")), some_sequences(n), batch,
                                               world) for n, batch in PROBS]}
        for precision in ("float32", "bfloat16"):
            three_steps(folder / precision, config(precision=precision), world, saved.setdefault(precision, {}))
    save(saved, folder)


def exchanges(world, rank):
    """What every exchange gives this rank, as plain numbers; sums of small integers are exact."""
    n = world.size
    flat = torch.arange(4.0 * n) * (rank + 1)
    cube = torch.arange(2.0 * n * 3 * 5).view(2 * n, 3, 5) + rank
    waits = [world.reduce_scatter(x.clone()) for x in (flat, cube)]  # both under way at once
    gathers = [world.all_gather(x) for x in (world.shard(flat), world.shard(cube))]
    total = torch.tensor(rank + 1.0)
    world.sum_(total)
    model = torch.nn.Linear(3, 2).requires_grad_(False).apply(
        lambda m: [p.fill_(rank + i) for i, p in enumerate(m.parameters())])
    world.same_(*model.parameters())
    collected, abouts = world.collect(np.full((2, 3), rank, np.float32), {"rank": rank})
    try:
        world.agree({"seed": 0, "lr": rank})
        refused = None
    except q0.UserError as e:
        refused = str(e)
    world.agree({"seed": 0})
    return {"reduce_scatter": [w() for w in waits], "all_gather": [g() for g in gathers], "sum": float(total),
            "shards": [world.shard(flat), world.shard(cube)], "same": [float(p.mean()) for p in model.parameters()],
            "collect": collected, "abouts": abouts, "largest": world.largest(rank),
            "leader": world.from_first(rank, leader=True), "refused": refused, "first": world.from_first({"rank": rank}),
            "place": (world.rank, world.size, world.index, world.groups, world.leader)}


def job_world(folder, trajectories):
    # 12 micro-batches: they divide over 2, 3 and 4 ranks
    cfg = config(trajectories=int(trajectories), epochs=6, batch_tokens=384)
    with q0.set_up_world(cfg) as world:
        save(exchanges(world, rank_now()), folder)


def job_run(folder, *argv):
    """A whole run through main(); a word `1:...` is for rank 1 alone: a flag, other code or another disk."""
    q0.draw_curve = lambda *args: None  # takes longer than the run
    q0.LOGS = folder / "logs"
    place = folder.parent.parent
    os.chdir(place / "disk0")
    odd = [a[2:] for a in argv if a.startswith("1:")] if rank_now() == 1 else []
    for word in [a for a in odd if a.startswith("other-")]:
        odd.remove(word)
        if word == "other-code":
            q0.SOURCE += "\n"
        else:
            os.chdir(place / word.removeprefix("other-"))
    return q0.main([*RUN, *(a for a in argv if not a.startswith("1:")), *odd, "--run", "x"])


def job_apart(folder, *argv):
    """Two trajectories. Rank 1 takes its first step only after rank 0 has ended its last cycle and waited for longer
    than any process group but the patient one allows."""
    short = dict(timeout=datetime.timedelta(seconds=8))
    for name in ("init_process_group", "new_group"):
        setattr(dist, name, functools.partial(lambda f, *a, **k: f(*a, **{**short, **k}), getattr(dist, name)))
    training_loss, last = q0.training_loss, folder / "logs/x/predictions/1.safetensors"

    def late(*args):
        if not (folder / "late").exists():
            end = time.monotonic() + 60
            while not last.exists():
                assert time.monotonic() < end, "rank 0 waits for rank 1"
                time.sleep(0.05)
            (folder / "late").write_text(" ".join(sorted(p.name for p in (folder / "logs/x/predictions").iterdir())))
            time.sleep(10)
        return training_loss(*args)

    if rank_now() == 1:
        q0.training_loss = late
    return job_run(folder, *argv)


DIFFERENT = {  # what rank 1 does differently: what the line must name
    "lr": (["1:--lr-matrix", "1:0.03"], "lr_matrix: 0.03, not 0.04"),
    "trajectories": (["1:--trajectories", "1:2"], "trajectories: 2, not 1"),
    "features": (["1:--attn-gates"], "attn_gates: True, not False"),
    "folder": (["1:--data", "1:../disk1/shards"], "data: ../disk1/shards, not shards"),
    "disk": (["1:other-disk1"], "train.bin: [0-9a-f]{64}, not [0-9a-f]{64}"),
    "code": (["1:other-code"], "train_q0.py: [0-9a-f]{64}, not [0-9a-f]{64}"),
}
JOBS = {  # name: (function, ranks, words)
    "apart": (job_apart, 2, ["--trajectories", "2"]),
    **{f"different-{name}": (job_run, 2, words) for name, (words, _) in DIFFERENT.items()},
    "missing": (job_run, 2, ["1:other-disk2"]),
    **{f"world-{size}x{j}": (job_world, size, [str(j)]) for size, j in ((2, 1), (2, 2), (4, 2), (3, 2))},
    **{f"steps-{size}": (job_steps, size, []) for size in SIZES},
    **{f"run-{size}x{j}-{seed}": (job_run, size, ["--trajectories", str(j), "--seed", str(seed)])
       for size, j, seed in ((1, 2, 0), (4, 2, 0), (1, 1, 0), (1, 1, 1), (2, 1, 0))},
}
WAITING = ("apart", "different", "missing")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_job(name, out):
    """Fork a job's ranks. Returns {process id: file for its exit status}."""
    function, size, words = JOBS[name]
    folder, pids = out / name, {}
    folder.mkdir()
    port = free_port()
    for rank in range(size):
        if pid := os.fork():
            pids[pid] = folder / f"{rank}.code"
            continue
        code = 1
        try:
            if size > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=str(port))
            for fd, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT), fd)
            code = function(folder, *words) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pids


def all_jobs(out, limit=150):
    """Run every job: those that mostly wait all at once, the others beside them while one rank or none is busy."""
    end, running, busy = time.monotonic() + limit, {}, set()

    def wait_while(condition):
        while condition():
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                running.pop(pid).write_text(str(os.waitstatus_to_exitcode(status)))
                busy.discard(pid)
            elif time.monotonic() > end:
                for pid, code in running.items():
                    code.write_text("timeout")
                    os.kill(pid, signal.SIGKILL)
                sys.exit(f"no end after {limit} s")
            else:
                time.sleep(0.02)

    for name in JOBS:
        started = start_job(name, out)
        running.update(started)
        busy.update([] if name.startswith(WAITING) else started)
        wait_while(lambda: len(busy) > 1)
    wait_while(lambda: running)


def command_die(how, *argv):
    """A run whose rank 1 fails at its third micro-batch: in step 2 where two ranks share a step of four. Its disk is
    slow: rank 0 must not take for a killed process's what rank 1 is still writing."""
    calls, training_loss, copyfile = [], q0.training_loss, q0.shutil.copyfile

    def slow(*args):
        copyfile(*args)
        time.sleep(rank_now())

    q0.shutil.copyfile = slow

    def dying(*args):
        calls.append(1)
        if rank_now() == 1 and len(calls) == 3:
            if how == "exit":
                os._exit(7)
            if how == "stop":  # as a machine without power: silent, its connections open
                Path("stopped").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            raise RuntimeError("planted")
        return training_loss(*args)

    q0.training_loss = dying
    return q0.main(list(argv))


def command_different(*argv):
    """A run whose rank 1 was started with another flag."""
    return q0.main([*argv, *["--grad-clip", "0.5"] * (rank_now() == 1)])


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    sys.exit({"jobs": lambda out: all_jobs(Path(out)), "die": command_die, "different": command_different
              }[command](*rest))


# ----------------------------------------------------------------------------------------------------------------------
# The tests

def environment(**more):
    keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**keep, "OMP_NUM_THREADS": "1", **more}


@functools.cache
def make_shards(folder, skip=0):
    """A corpus of ~8,000 tokens that data/prepare.py made, without its first `skip` documents."""
    rng, lines = np.random.default_rng(0), []
    words = ["".join(rng.choice(list("abdeiklmnorstu"), 4)) for _ in range(40)]
    for _ in range(120):
        at, text = rng.integers(40), []
        for _ in range(30):
            text.append(words[at])
            at = (3 * at + rng.integers(3)) % 40
        lines.append(json.dumps({"text": " ".join(text)}))
    folder.mkdir(exist_ok=True)
    (folder / "made-up.jsonl").write_text("\n".join(lines[skip:]) + "\n")
    argv = ["text", "--input", "made-up.jsonl", "--out", "shards", "--tokenizer", "train", "--vocab", "300",
            "--val-bytes", "3000", "--dev-bytes", "1000", "--heldout-bytes", "1000"]
    made = subprocess.run([sys.executable, ROOT / "data/prepare.py", *argv], cwd=folder, capture_output=True,
                          text=True, env=environment())
    assert made.returncode == 0, made.stderr
    return folder / "shards"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with train_q0.py as imported here; its disk0 has a corpus of ~8,000 tokens that data/prepare.py made,
    disk1 another one of that name, disk2 none."""
    place = tmp_path_factory.mktemp("place")
    (place / "train_q0.py").write_text(q0.SOURCE, encoding="utf-8")
    (place / "disk2").mkdir()
    make_shards(place / "disk0")
    make_shards(place / "disk1", 1)
    return place


@pytest.fixture(scope="module")
def jobs(place):
    """The folder with what all jobs saved."""
    out = place / "jobs"
    out.mkdir()
    done = subprocess.run([sys.executable, __file__, "jobs", out], env=environment(PYTHONPATH=str(place)), text=True,
                          capture_output=True, timeout=200)
    assert done.returncode == 0 or "no end after" in done.stderr, done.stderr  # then the tests of those jobs fail
    return out


def finished(jobs, name, codes=None):
    """What a job's ranks saved; each must have ended as `codes` say (0)."""
    size = JOBS[name][1]
    got = [(jobs / name / f"{r}.code").read_text() for r in range(size)]
    assert got == [str(c) for c in codes or [0] * size], [(jobs / name / f"{r}.err").read_text() for r in range(size)]
    return [torch.load(f, weights_only=True) for r in range(size) if (f := jobs / name / f"{r}.pt").exists()]


def off(a, b):
    """Difference by norm, relative to `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_feeds_the_same_micro_batches(jobs, size):
    """Exactly equal: they are integers, cut from one order by the global index."""
    corpus, cfg, ranks = corpus_in_memory(), config(), finished(jobs, f"steps-{size}")
    for precision in ("float32", "bfloat16"):
        fed = [rank[precision]["fed"] for rank in ranks]
        assert sum(map(len, fed)) == len({key for f in fed for key in f}) == 24  # 3 steps of 8, each fed once
        assert {len(f) for f in fed} == {24 // size}
        for step in range(3):
            batch = corpus.batch(cfg.seed, 0, 16 * step, 16)
            for m in range(8):
                tokens, taught = next(f[step, m] for f in fed if (step, m) in f)
                assert np.array_equal(tokens.numpy(), batch[2 * m:2 * m + 2]) and taught == (step == 2)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_after_three_steps(jobs, size, precision):
    """float32: gradients are summed in another order (2^-24), which orthogonalisation amplifies in their smallest
    singular values, up to 1,000 times. Gradients that were changed by 2^-24 gave at most 1.7e-5 over six seeds, with and
    without induction heads; other data or dropout changes a weight by 2e-4 and more. bfloat16: such a difference rounds
    some entries of an update to a neighbour, 2^-8 away, amplified in the same way: up to 0.1 of what the steps changed;
    other dropout or data would change most of it."""
    one, ranks = finished(jobs, "steps-1")[0][precision]["weights"], finished(jobs, f"steps-{size}")
    start = dict(q0.GPT(config(precision=precision), VOCAB).init_weights(0, 0, 0).named_parameters())
    for name, weight in one.items():
        several = [rank[precision]["weights"][name] for rank in ranks]
        assert all(torch.equal(w, several[0]) for w in several), name  # gathered, not computed apart
        moved = off(start[name].detach(), weight)
        assert off(several[0], weight) <= (5e-5 if precision == "float32" else 0.25 * moved) and moved > 2e-4, name


@pytest.mark.parametrize("size", SIZES)
def test_optimizer_state_is_sharded(jobs, size):
    """A rank holds ceil(n / size) of the n units of a group, so at most bytes(1) / size and one unit a state tensor."""
    one, ranks = finished(jobs, "steps-1")[0]["float32"], [r["float32"] for r in finished(jobs, f"steps-{size}")]
    count = lambda state: sum(t.numel() * t.element_size() for s in state.values() for t in s.values())
    unit = {(name, key): t[0].numel() * 4 for name, s in one["state"].items() for key, t in s.items()}
    for rank in ranks:
        assert rank["state"].keys() == one["state"].keys() == one["units"].keys()
        assert count(rank["state"]) <= count(one["state"]) / size + sum(unit.values())
        assert sum(unit.values()) < 0.1 * count(one["state"])  # or the bound would say little
        for name, (n, _) in one["units"].items():
            assert {len(t) for t in rank["state"][name].values()} == {-(-n // size)}
    for name, (n, _) in one["units"].items():
        for key, whole in one["state"][name].items():
            parts = torch.cat([rank["state"][name][key] for rank in ranks])
            # side by side the shards are the whole, once; tolerance as for the weights, and twice that for squares
            assert off(parts[:n], whole) <= 1e-4 and not parts[n:].any(), (name, key)


def test_true_token_probs(jobs):
    """Exactly equal for every size: a batch is the same for all sizes, one rank computes it, the others add zeros."""
    model = stirred_model(config(precision="float32"))
    want = finished(jobs, "steps-1")[0]["probs"]
    for i, (n, _) in enumerate(PROBS):
        tokens = torch.from_numpy(some_sequences(n).astype(np.int64))
        with torch.no_grad():
            logits = [15 * torch.tanh(model(x[None, :-1])[0][0] @ model.head[:VOCAB].T / 15) for x in tokens]
        alone = torch.cat([z.softmax(-1).gather(1, x[1:, None]) for z, x in zip(logits, tokens)]).flatten().numpy()
        # a sequence at a time: float32 products of other shapes round differently, ~1e-6 of a logit of order 1
        np.testing.assert_allclose(want[i], alone, rtol=1e-4)
        assert want[i].dtype == torch.float32 and want[i].std() > 1e-3
        for size in SIZES[1:]:
            assert all(np.array_equal(rank["probs"][i], want[i]) for rank in finished(jobs, f"steps-{size}"))


def test_world_of_one_is_the_identity():
    world, x = q0.World(), torch.arange(6.0).view(3, 2)
    assert world.reduce_scatter(x)() is x and world.all_gather(x)() is x and torch.equal(world.shard(x), x)
    array, model, value, total = np.ones(3), torch.nn.Linear(2, 2), object(), torch.tensor(2.0)
    assert world.collect(array, value) == (array, [value]) and world.same_(model.weight) is None
    assert world.from_first(value) is value and world.from_first(value, leader=True) is value and world.largest(3) == 3
    assert world.agree({"a": 1}) is None and world.sum_(total) is None and total == 2 and world.leader


@pytest.mark.parametrize("size, trajectories", [(2, 1), (2, 2), (4, 2), (3, 2)])
def test_world(jobs, size, trajectories):
    """Groups of size / trajectories where that divides (not 3 over 2); exact, for all are sums of small integers."""
    groups = trajectories if size % trajectories == 0 else 1
    each = size // groups
    for rank, got in enumerate(finished(jobs, f"world-{size}x{trajectories}")):
        within, index = rank % each, rank // each
        assert got["place"] == (within, each, index, groups, within == 0)
        members = range(index * each, (index + 1) * each)
        flat = torch.arange(4.0 * each)
        cube = torch.arange(2.0 * each * 15).view(2 * each, 3, 5)
        for i, (units, of) in enumerate(((flat, lambda r: flat * (r + 1)), (cube, lambda r: cube + r))):
            n = len(units) // each
            mine = slice(within * n, (within + 1) * n)
            assert torch.equal(got["shards"][i], of(rank)[mine])
            assert torch.equal(got["reduce_scatter"][i], sum(of(r) for r in members)[mine])
            assert torch.equal(got["all_gather"][i], torch.cat([of(r).split(n)[r % each] for r in members]))
        assert got["sum"] == sum(r + 1 for r in members) and got["same"] == [members[0], members[0] + 1]
        if rank == 0:
            assert np.array_equal(got["collect"][::2, 0], [g * each for g in range(groups)])
            assert got["collect"].shape == (2 * groups, 3)
            assert [a["rank"] for a in got["abouts"]] == (list(range(size)) if groups > 1 else [0])
        else:
            assert got["collect"] is None and got["abouts"] is None
        assert got["largest"] == members[-1] and got["leader"] == members[0]
        assert got["first"] == {"rank": 0}
        assert got["refused"].startswith("rank 1 differs from rank 0 in lr: 1, not 0")


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

def torchrun(place, *argv, disk="disk0", where=("--standalone", "--nproc_per_node=2")):
    """Start `torchrun argv`; a script named train_q0.py is the one of `place`."""
    argv = [place / "train_q0.py" if a == "train_q0.py" else a for a in argv]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *where, *map(str, argv)], cwd=place / disk,
                            env=environment(PYTHONPATH=str(place)), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def node_of_two(port):
    """Options of torchrun for one of two nodes on this machine, a process each."""
    return ("--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=q0", "--local-addr=127.0.0.1")


def ended(*processes, limit=60):
    """(stdout, stderr) of each; what still runs after `limit` seconds is a failure."""
    end = time.monotonic() + limit
    try:
        return [p.communicate(timeout=max(0.1, end - time.monotonic())) for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                p.terminate()  # torchrun passes it on to its ranks
                with contextlib.suppress(subprocess.TimeoutExpired):
                    p.communicate(timeout=40)
                p.kill()


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def artifacts(*folders):
    """{relative path: bytes} of members and predictions."""
    found = {str(p.relative_to(f)): p.read_bytes() for f in folders for kind in ("members", "predictions")
             for p in (f / kind).rglob("*.safetensors")}
    assert len(found) >= 4
    return found


def same_numbers(one, two):
    """Results equal but for times, machine and the command."""
    timed = ("seconds", "per_second", "memory_mb", "command", "time", "machine")
    keep = lambda r: {k: v for k, v in r.items() if not k.endswith(timed)}
    assert keep(one) == keep(two)
    assert len(keep(one)) >= 9 and one["curve"][-1]["learned"] < one["curve"][0]["loss"] - 0.1  # it learned


@pytest.mark.slow
def test_one_process_a_trajectory(jobs, place):
    """Bit for bit, as in the two tests below."""
    finished(jobs, "run-1x2-0")
    run = torchrun(place, "train_q0.py", *RUN, "--trajectories", "2", "--name", "two")
    (out, error), = ended(run)
    assert run.returncode == 0, error
    one, two = jobs / "run-1x2-0/logs/x", place / "logs/two"
    same_numbers(result_of(one), result_of(two))
    assert artifacts(one) == artifacts(two)
    assert sorted(p.name for p in two.glob("*.txt")) == ["log.txt", "log_trajectory1.txt"]
    assert not list(two.rglob("*.tmp")) and result_of(two)["machine"]["processes"] == 2
    final = f"final_val_loss:{result_of(one)['final_val_loss']:.5f} members:4"
    assert out.count(final) == 1 and "processes: 2 groups of 1, one trajectory each" in out
    assert (two / "log.txt").read_text().count(f"\n{final}") == 1


@pytest.mark.parametrize("size, trajectories", [(2, 1), (4, 2)])
def test_shared_trajectory(jobs, size, trajectories):
    """Ranks that share a trajectory add gradients in another order. That gave 1e-6 in the loss; one entry whose decay
    starts or stops by it (see STEPS) may give more, so 1e-3, while another seed changes eight times that."""
    for name in ("run-1x1-0", "run-1x1-1", f"run-1x{trajectories}-0", f"run-{size}x{trajectories}-0"):
        finished(jobs, name)
    seeds = [result_of(jobs / f"run-1x1-{seed}/logs/x")["final_val_loss"] for seed in (0, 1)]
    one, two = (jobs / f"run-{n}x{trajectories}-0/logs/x" for n in (1, size))
    a, b = result_of(one), result_of(two)
    assert [p["learned"] for p in b["curve"]] == pytest.approx([p["learned"] for p in a["curve"]], abs=1e-3)
    assert abs(seeds[0] - seeds[1]) > 0.005
    steps = [[e["loss"] for e in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())
              if e["event"] == "step" and e["traj"] == 0] for f in (one, two)]
    assert len(steps[0]) > 10 and steps[1] == pytest.approx(steps[0], abs=1e-3)  # logged: of all ranks, not of one
    assert [p["member"] for p in b["curve"]] == list(range(2 * trajectories)) and b["machine"]["processes"] == size
    assert artifacts(one).keys() == artifacts(two).keys()
    assert sum(p.name.startswith("log") for p in two.iterdir()) == trajectories
    last = f"predictions/{2 * trajectories - 1}.safetensors"
    for split, p in load_file(one / last).items():
        assert np.abs(load_file(two / last)[split] - p).mean() < 1e-4 and p.std() > 5e-3  # 5e-6, and room as above


def test_trajectories_do_not_wait_for_each_other(jobs):
    """And they end bit for bit as on one process: each is trained on one rank, which sums in the same order, and
    predictions travel unchanged."""
    finished(jobs, "apart")
    assert (jobs / "apart/late").read_text() == "0.safetensors 1.safetensors"  # rank 0's last, before rank 1's first
    finished(jobs, "run-1x2-0")
    one, two = jobs / "run-1x2-0/logs/x", jobs / "apart/logs/x"
    same_numbers(result_of(one), result_of(two))
    assert artifacts(one) == artifacts(two)
    assert sorted(p.name for p in two.glob("*.txt")) == ["log.txt", "log_trajectory1.txt"]


def test_two_nodes(jobs, place, tmp_path):
    """Two torchruns, each with its own disk and one of the two trajectories: bit for bit the run on one process."""
    finished(jobs, "run-1x2-0")
    port, nodes = free_port(), [tmp_path / name for name in "ab"]
    for node in nodes:
        node.mkdir()
        shutil.copy(place / "train_q0.py", node)
        shutil.copytree(place / "disk0/shards", node / "disk0/shards")
    runs = [torchrun(node, "train_q0.py", *RUN, "--trajectories", "2", "--name", "x", where=node_of_two(port))
            for node in nodes]
    outs = ended(*runs)
    assert [run.returncode for run in runs] == [0, 0], outs
    first, second = sorted((node / "logs/x" for node in nodes), key=lambda f: not (f / "result.json").exists())
    one = jobs / "run-1x2-0/logs/x"
    same_numbers(result_of(one), result_of(first))
    assert artifacts(one) == artifacts(first, second)
    assert (first / "log.txt").exists() and [p.name for p in second.glob("*.txt")] == ["log_trajectory1.txt"]
    assert sum("final_val_loss" in out for out, _ in outs) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Failures

LONG = ("--epochs", "20000", "--cycles", "1", "--no-compile", "--log-every", "1000")  # hours, if nobody stops it


@pytest.mark.parametrize("how, trajectories", [
    ("raise", 1), pytest.param("exit", 1, marks=pytest.mark.slow), pytest.param("raise", 2, marks=pytest.mark.slow)])
def test_a_rank_that_dies_takes_the_others_down(place, how, trajectories):
    """With two trajectories nothing but torchrun tells rank 0 of it."""
    run = torchrun(place, __file__, "die", how, *RUN, *LONG, "--trajectories", trajectories, "--name",
                   f"{how}{trajectories}")
    (out, error), = ended(run, limit=60)
    assert run.returncode not in (0, None)
    if how == "raise":
        assert re.search("^rank 1 failed:", error, re.M) and "RuntimeError: planted" in error
        assert re.search(r'Traceback.*in command_train.*in train.*in dying', error, re.S)
    else:
        assert re.search(r"exitcode *: 7", error)
    assert re.search(r"Root Cause.*?rank +: 1 \(local_rank: 1\)", error, re.S)


@pytest.mark.parametrize("how, trajectories", [
    ("raise", 2), pytest.param("exit", 2, marks=pytest.mark.slow), pytest.param("exit", 1, marks=pytest.mark.slow)])
def test_a_rank_that_dies_takes_the_other_node_down(place, how, trajectories):
    """Two nodes, whose launchers do not tell each other. On one trajectory the closed connection does; on two, which
    share no collective, the watch does, with the name and the traceback of the rank that died."""
    port, started = free_port(), time.monotonic()
    runs = [torchrun(place, __file__, "die", how, *RUN, *LONG, "--trajectories", trajectories, "--name",
                     f"node-{how}{trajectories}", where=node_of_two(port)) for _ in range(2)]
    outs = ended(*runs)
    assert time.monotonic() - started < 60
    assert all(run.returncode not in (0, None) for run in runs)
    if how == "raise":
        assert sum(bool(re.search(r"^rank 1 failed:\s+(\[rank1\]: )?Traceback.*in train.*in dying.*: planted",
                                  error, re.S | re.M)) for _, error in outs) == 2, "\n".join(error for _, error in outs)
        return
    assert sum(bool(re.search(r"rank +: 1 .*\n.*exitcode +: 7", error)) for _, error in outs) == 1, outs
    if trajectories == 2:
        assert sum("\nrank 1 ended without a word" in "\n" + error for _, error in outs) == 1, outs


@pytest.mark.slow
def test_a_node_that_falls_silent(place):
    port, started = free_port(), time.monotonic()
    runs = [torchrun(place, __file__, "die", "stop", *RUN, *LONG, "--trajectories", 2, "--name", "silent",
                     where=node_of_two(port)) for _ in range(2)]
    try:
        while all(run.poll() is None for run in runs):
            assert time.monotonic() - started < 75  # 15 to start, and a minute
            time.sleep(0.2)
    finally:
        os.kill(int((place / "disk0/stopped").read_text()), signal.SIGKILL)
    errors = [error for _, error in ended(*runs)]
    assert sum("\nrank 1 ended without a word" in "\n" + error for error in errors) == 1, errors


def test_different_flags_under_torchrun(place):
    run = torchrun(place, __file__, "different", *RUN, "--name", "different")
    (out, error), = ended(run)
    lines = [line for line in error.splitlines() if line.startswith("train_q0.py: error:")]
    assert run.returncode not in (0, None) and len(lines) in (1, 2), error  # rank 1 waits 2 s, which a busy machine uses
    assert not re.search('train_q0.py", line', error)  # no traceback but torchrun's own
    assert lines[0].startswith("train_q0.py: error: rank 1 differs from rank 0 in grad_clip: 0.5, not 1.0; start every")
    assert not (place / "logs/different").exists()


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_ranks(jobs, name):
    finished(jobs, f"different-{name}", [2, 2])
    line = (jobs / f"different-{name}/0.err").read_text()
    assert re.fullmatch(rf"train_q0\.py: error: rank 1 differs from rank 0 in {DIFFERENT[name][1]}; start.*\n", line)
    assert not (jobs / f"different-{name}/logs").exists()


def test_data_missing_on_one_rank(jobs):
    codes = [(jobs / f"missing/{rank}.code").read_text() for rank in (0, 1)]
    line = (jobs / "missing/1.err").read_text()
    assert codes[1] == "2" and re.fullmatch(r"train_q0\.py: error: rank 1: .*shards.manifest\.json.*\n", line)
    assert codes[0] not in ("0", "timeout")


BATCHES = [  # micro-batches a step in the middle and at the edges, trajectories, processes: all counts that divide
    (8, 8, 1, 3, {1, 2, 4, 8}), (8, 8, 2, 6, {1, 2, 4, 8, 16}), (12, 8, 1, 3, {1, 2, 4}), (12, 8, 1, 8, {1, 2, 4}),
    (6, 6, 4, 4 * 4, {1, 2, 3, 4, 6, 8, 12, 24}), (1, 1, 1, 2, {1})]


@pytest.mark.parametrize("middle, edge, trajectories, size, valid", BATCHES)
def test_batch_that_does_not_divide(middle, edge, trajectories, size, valid, monkeypatch, capsys):
    """The counts it names work, all of them, and none is left out."""
    argv = [*RUN, "--batch-tokens", 128 * middle, "--edge-batch-tokens", 128 * edge, "--trajectories", trajectories]
    for name, value in dict(RANK=0, WORLD_SIZE=size, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    assert q0.main([*map(str, argv), "--run", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train_q0.py: error: ") and error.count("\n") == 1 and f" {size} processes" in error
    named = re.search(r"use ([\d, ]+) processes", error)[1]
    assert set(map(int, named.split(", "))) == valid
