"""What a launch does beside training: it fetches the default corpus, says what it will do and on
what machine, and writes the result of a run once every trajectory is done. Without it train_q0.py
trains, saves, logs and resumes; a later launch that has it writes the result."""
import contextlib
import functools
import math
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import train_q0 as q
from records import plot, population
from records.flops import flops_per_token, run_flops

try:
    import resource
except ImportError:  # Windows does not tell the peak of memory
    resource = None


class Report:
    """Writes the head and the end of a run's log, and its result."""
    def __init__(self, cfg, why):
        self.cfg = cfg
        self.why = why  # {setting: reason}

    def open(self, run, corpus, world):
        epoch_tokens = corpus.train_sequences * self.cfg.seq_len
        run.about["machine"] = machine(world)
        run.plan = "\n".join(describe(self.cfg, self.why, epoch_tokens, corpus.vocab_size))
        q.say(run.plan)
        copy_data(q.find_data(self.cfg), run)

    def finish(self, trainer):
        """Write the result where every trajectory is done."""
        run = trainer.run
        if not all(run.is_done(j) for j in range(self.cfg.trajectories)):
            q.say(f"other launches train {run.folder.name}: the last to finish writes the result; "
                  f"one on another machine counts as gone after {q.SILENT_SECONDS // 60} silent "
                  "minutes")
            return
        with q.locked(run.state / "result.lock"):
            if (run.folder / "result.json").exists():  # another launch ended just now
                return
            write_result(trainer)
        q.say(f"written to {run.folder}")


# At the start -----------------------------------------------------------------------------------

def fetch_default_corpus(cfg):
    """Download the default corpus where it is missing. Exits where that fails."""
    folder = q.find_data(cfg)
    if cfg.data != q.Config.data or (folder / "manifest.json").exists():
        return
    q.say(f"{folder} is missing: preparing the default corpus (python data/prepare.py wiki)")
    done = subprocess.run([sys.executable, q.ROOT / "data/prepare.py", "wiki"])
    if done.returncode:  # it said why
        sys.exit(done.returncode)


def copy_data(data, run):
    """Copy what turns tokens into text to the folder of a run, which several launches may open."""
    (run.folder / "data").mkdir(exist_ok=True)
    with q.locked(run.state / "setup.lock"):
        for file in ("manifest.json", "tokenizer.tiktoken"):
            if (data / file).exists() and not (run.folder / "data" / file).exists():
                copy = functools.partial(shutil.copyfile, data / file)
                q.write_atomically(run.folder / "data" / file, copy)


def describe(cfg, why, epoch_tokens, vocab_size):
    """Lines that say what a run will do, and why."""
    cycles = sum(q.plan_cycles(cfg, epoch_tokens), [])
    table = q.parameter_table(cfg, vocab_size)
    params = sum(math.prod(row.bank_shape) for row in table.values())
    model, teacher = flops_per_token(cfg, vocab_size)
    tokens = sum(c.steps * c.rows for c in cycles) * cfg.seq_len
    lines = [f"{name}: {getattr(cfg, name)} ({reason})" for name, reason in why.items()]
    return lines + [
        f"population: {cfg.trajectories} trajectories x {cfg.cycles} cycles = {len(cycles)} "
        f"members, {cfg.epochs} epochs (first cycle {cycles[0].epochs}, last {cycles[-1].epochs}), "
        f"{sum(c.distilled for c in cycles)} members distilled",
        f"steps: {sum(c.steps for c in cycles)} of {cfg.batch_tokens} tokens "
        f"({cfg.edge_batch_tokens} at the edges), {tokens} tokens in all, {epoch_tokens} an epoch",
        f"parameters: {params}; FLOPs per token: {model:.4g} training, {teacher:.4g} teacher"]


def machine(world):
    """Versions and hardware."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, TypeError):
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    gpu = "none"
    if world.device.type == "cuda":
        gpu = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "system": platform.platform(), "cpu": cpu,
            "threads": torch.get_num_threads(), "gpu": gpu, "processes": world.size}


# At the end -------------------------------------------------------------------------------------

def write_result(trainer):
    """Join the logs, log the final losses and what each number of members is worth, and write
    result.json, which makes the run complete."""
    cfg = trainer.cfg
    run = trainer.run
    states = [run.load_state(j)[0] for j in range(cfg.trajectories)]
    log = run.open_log(0, states[0].log)
    curve = curve_of(trainer, states)
    for at in states[1:]:
        append(log, run.log_file(at.trajectory), at.curve, f"{cfg.report}_loss")
    numbers = summarize(trainer, states, curve)
    log.event(**numbers)
    table, lines = population.report(trainer.predictions, trainer.corpus.name)
    try:
        plot.draw_curve(run.folder / "curve.png", curve, cfg.report, table)
    except ImportError as e:
        q.say(f"notice: curve.png is not made: {q.one_line(e)}", "stderr")
    log.line("\n".join(lines))
    q.save_json(run.folder / "result.json", {
        **numbers, "curve": curve, "kernels": states[-1].kernels, **run.about, "table": table})
    for at in states[1:]:
        run.log_file(at.trajectory).unlink()


def curve_of(trainer, states):
    """An entry a member, of a run whose trajectories are all done."""
    predictions = trainer.predictions
    curve = [entry for at in states for entry in at.curve]
    for n, entry in enumerate(curve, 1):
        i = entry["member"]
        predictions.cached[i] = population.read_predictions(
            predictions.path(i), entry["predictions"])
        if entry["of"] != n:  # fitted before the members of other trajectories were there
            entry |= predictions.mixtures(range(n))
    return curve


def append(log, part, curve, key):
    """Add the log of another trajectory, as if one launch had trained all in turn: its ensembles
    anew, as by now more members may have come before it."""
    for line in part.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.startswith("ensemble "):
            log.text.write(line)
    for entry in curve:
        for pairs in q.ensembles(entry, key):
            log.text.write(q.event_line("ensemble", **pairs) + "\n")


def summarize(trainer, states, curve):
    """{name: number} of the log's last event."""
    cfg = trainer.cfg
    flops = run_flops(cfg, trainer.run.cycles, trainer.corpus.vocab_size, trainer.population)
    total = sum(flops.values())
    seconds = sum(at.train_seconds for at in states)
    return {f"final_{cfg.report}_loss": curve[-1]["learned"], "members": len(curve),
            "k": len(curve), "epochs": cfg.epochs, "flops": total,
            "teacher_flops": flops["teacher"], "tflops": total / seconds / 1e12,
            f"uniform_{cfg.report}_loss": curve[-1]["uniform"],
            f"last_member_{cfg.report}_loss": curve[-1]["loss"],
            "train_seconds": seconds, "eval_seconds": sum(at.eval_seconds for at in states),
            "peak_memory_mb": peak_memory_mb(trainer.world.device)}


def peak_memory_mb(device):
    """Of the GPU's allocator, or of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    unit = 2 ** 20 if sys.platform == "darwin" else 1024
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
