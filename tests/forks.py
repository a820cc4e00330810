"""What tests of whole runs need: settings, a corpus on the disk, runs as forks, runs compared.

A run here is a fork of the tests' process, which has imported torch, and takes half a second.
"""
import functools
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

import records.plot
import tiny
import train_q0 as q

# Three cycles of five steps of two micro-batches; dropout, noise at boundaries, a teacher from the
# second cycle on, and members that are the mean of the last four steps of a cycle
RUN = (
    "--layers 1 --width 32 --head-dim 16 --mlp-hidden 64 --seq-len 32 --batch-tokens 512 "
    "--micro-batch 8 --epochs 6 --train-tokens 1300 --cycles 3 --distill-after 1 --average 0.8 "
    "--lr-matrix 0.04 --lr-head 0.01 --weight-decay 1.3 --wd-start 0.7 --wd-end 1 --dropout 0.1 "
    "--precision float32 --device cpu --log-every 1").split()
TWO = ("--trajectories", "2", "--epochs", "12")  # of 15 steps each
EVERY_STEP = ("--save-minutes", "0")  # a state after every step
CYCLE_ENDS = ("--save-minutes", "1000")


@functools.cache
def shards(folder, seed=0):
    """A prepared corpus in `folder`."""
    folder.mkdir(parents=True)
    splits = {}
    documents = tiny.chain(90 + 3 * 12, seed)
    for i, split in enumerate(q.SPLITS):
        first = 90 + 12 * (i - 1) if i else 0
        raw = tiny.shard_bytes(np.concatenate(documents[first:90 + 12 * i]))
        (folder / f"{split}.bin").write_bytes(raw)
        entry = {"name": f"{split}.bin", "sha256": hashlib.sha256(raw).hexdigest()}
        splits[split] = {"files": [entry]}
    manifest = {"name": "chain", "vocab_size": 100, "eot": 0, "tokenizer": None, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


with torch.device("meta"):  # imports what torch imports only when it is first needed
    q.GPT(q.resolve(q.Config())[0], 100)


class Fork:
    """train_q0.main(argv), or call(), in a fork, with runs under `logs`; `plant` is called first.
    `env` is more of its environment."""
    count = 0

    def __init__(self, logs, *argv, plant=None, call=None, **env):
        logs.mkdir(parents=True, exist_ok=True)
        Fork.count += 1
        self.files = [logs.parent / f"{Fork.count:03}.{kind}" for kind in ("out", "err")]
        for file in self.files:
            file.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        self.code = None
        self.pid = os.fork()
        if self.pid == 0:
            self.run(logs, argv, plant, call, env)

    def run(self, logs, argv, plant, call, env):
        """In the fork; does not return."""
        code = 1
        try:
            for fd, file in enumerate(self.files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), fd)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
            os.environ.update({k: str(v) for k, v in env.items()})
            torch.set_num_threads(1)
            q.LOGS = logs
            records.plot.draw_curve = lambda *args: None  # takes longer than the run
            if plant:
                plant()
            code = (call() if call else q.main([str(a) for a in argv])) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            os._exit(code)

    def wait(self, limit=60):
        """The exit status, negative where a signal ended it. It is killed after `limit` seconds."""
        end = time.monotonic() + limit
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        assert time.monotonic() < end, f"no end after {limit} s: {self.out}{self.err}"
        return self.code

    @property
    def out(self):
        return self.files[0].read_text(errors="replace")

    @property
    def err(self):
        return self.files[1].read_text(errors="replace")

    def good(self, limit=60):
        """Wait for success; returns self."""
        assert self.wait(limit) == 0, self.out + self.err
        return self

    def fails(self, pattern, limit=60):
        """Wait for one line, and nothing else on standard error but notices."""
        assert self.wait(limit) == 2, (self.code, self.out, self.err)
        told = re.compile(r"notice: |rank \d+ waits for ")
        line, = [line for line in self.err.splitlines() if not told.match(line)]
        assert line.startswith("train_q0.py: error: ") and re.search(pattern, line), line

    def dies(self, number=signal.SIGKILL):
        """Wait for the signal that ends it; returns self."""
        assert self.wait() == -number, (self.code, self.out, self.err)
        return self

    @property
    def went_on_from(self):
        """{trajectory: step that it went on from}, as the run says."""
        found = re.findall(r"^resuming trajectory (\d+) at step (\d+)$", self.out, re.MULTILINE)
        return {int(j): int(step) for j, step in found}


def ranks(size, logs, *argv, own={}, plants={}, **env):
    """Forks with the environment that torchrun sets; own {rank: flags}, plants {rank: plant}."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env.update(WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=s.getsockname()[1])
    return [Fork(logs, *argv, *own.get(rank, ()), plant=plants.get(rank), RANK=rank,
                 LOCAL_RANK=rank, **env) for rank in range(size)]


def all_good(forks):
    for fork in forks:
        fork.good()
    return forks


def command(base, *more):
    """Flags of run x, on a corpus in the folder `base`."""
    return [*RUN, "--data", shards(base / "shards"), "--run", "x", *more]


def start(base, logs, *more, plant=None):
    """A fork that trains run x, or goes on with it."""
    return Fork(logs, *command(base, *more), plant=plant)


def resume(logs, *more, plant=None):
    return Fork(logs, "--resume", "x", *more, plant=plant)


@functools.cache
def reference(base, *more, size=1):
    """The folder of a run that nothing disturbed, of `size` processes."""
    logs = base / f"reference{Fork.count}/logs"
    all_good(ranks(size, logs, *command(base, *more)))
    return logs / "x"


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def planted(owner, name, n, act=die, where=""):
    """A plant: act before the n-th call of owner.name whose last path argument, if any, matches
    `where`."""
    def plant():
        real = getattr(owner, name)
        calls = []

        def acting(*args, **kwargs):
            paths = [str(a) for a in args if isinstance(a, (str, Path))]
            if re.search(where, paths[-1] if paths else ""):
                calls.append(args)
                if len(calls) == n:
                    act()
            return real(*args, **kwargs)
        setattr(owner, name, acting)
    return plant


def at_step(n, act=die):
    """Plant `act` before the n-th optimizer step."""
    return planted(q.Optimizer, "step", n, act=act)


def wait_for(path, limit=60):
    end = time.monotonic() + limit
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.005)


TIMED = re.compile(r" ?\b(tok/s|eta|ready|tflops|(train|eval)_seconds|peak_memory_mb):\S+")
# of the header: when and how the run was started, settings that change no number, where it ran,
# and what was derived, which a resumed run is given
HEADER = re.compile(
    r'^ *"(?:time|command|processes|save_minutes|keep_members|hang_minutes)": .*\n'
    r"|^\w+: \S+ \(.*\)\n", re.M)


def log_of(run):
    """The log but for times, without the source text that it starts with."""
    text = (run / "log.txt").read_text(encoding="utf-8")
    assert text.startswith(q.SOURCE) and "\0" not in text
    return HEADER.sub("", TIMED.sub("", text.removeprefix(q.SOURCE)))


def losses_of(run):
    """Of every step as logged."""
    return [float(loss) for loss in re.findall(r"^step:.* loss:(\S+)", log_of(run), re.M)]


def numbers_of(curve):
    """Entries without the hash of a member's configuration, which names settings of the machine."""
    return [{k: v for k, v in entry.items() if k != "config"} for entry in curve]


def result_of(run):
    timed = ("seconds", "tflops", "memory_mb", "command", "time", "machine", "config")
    result = json.loads((run / "result.json").read_text())
    result["curve"] = numbers_of(result["curve"])
    return {k: v for k, v in result.items() if not k.endswith(timed)}


def weights_of(run):
    """{path: bytes} of members and predictions."""
    files = [*run.glob("members/*/*.safetensors"), *run.glob("predictions/*.safetensors")]
    assert files
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def states_of(run):
    """{name: (position, hash of the tensors)} of the resume states."""
    found = {}
    for file in (run / "state").glob("*.json"):
        body = json.loads(file.read_text())["body"]
        timed = ("train_seconds", "eval_seconds", "log")
        at = {k: v for k, v in body["at"].items() if k not in timed}
        at["curve"] = numbers_of(at["curve"])
        found[file.stem] = at, body["tensors"]
    return found


KINDS = {"weights": weights_of, "log": log_of, "result": result_of, "states": states_of}


def differences(one, two, kinds=tuple(KINDS)):
    """What differs between two finished runs; [] where they are the same bits but for times."""
    return [kind for kind in kinds if KINDS[kind](one) != KINDS[kind](two)]


def disturbed(base, logs, *more, size=1, kinds=tuple(KINDS)):
    """What differs between run x and one that nothing disturbed."""
    return differences(reference(base, *more, size=size), logs / "x", kinds)
