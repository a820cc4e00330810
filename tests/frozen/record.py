"""Recorded core.npz and runs.npz, the frozen reference of test_frozen.py, from commit ef3b0f5.

It speaks to train_q0.py of that commit, in which every layer was a module, and is kept to show
where the numbers come from. To record again, with the default corpus in data/wiki:

    git worktree add ../before ef3b0f5
    cp -r tests/frozen ../before/tests && cp -r data/wiki ../before/data
    cd ../before && OMP_NUM_THREADS=1 python tests/frozen/record.py core small short tiny

Recorded on one thread of an AMD EPYC with AVX2 and without bfloat16 instructions, with torch 2.13.0
and numpy 2.4.6. The parts that are asked for are replaced, the others stay.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train_q0 as q0
from frozen import case

# --------------------------------------------------------------------------------------------------
# What the test asks of the code, for the code of that commit


def build(key):
    """A model of case.MODEL with the initial weights of `key`."""
    cfg, _ = q0.resolve(q0.Config(**case.MODEL))
    model = q0.GPT(cfg, case.VOCAB).init_weights(*key)
    model.attend = q0.ATTENTION[cfg.attention](cfg, torch.device("cpu"))
    return model


def get_weights(model):
    """{name: float32 array}, copies."""
    parameters = model.named_parameters()
    return {name: p.detach().numpy().copy() for name, p in parameters}


def set_weights(model, weights):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(weights[name]))


def hidden_states(model, tokens):
    """Normed hidden states [B, T, D] of trunk and multi-token block in evaluation mode, for tokens
    [B, T + 1]."""
    with torch.no_grad():
        outputs = model.eval()(tokens[:, :-1], tokens[:, 1:])
    return [x.numpy() for x in outputs]


def loss_and_gradients(model, teacher, tokens):
    """([loss, cross-entropy], {name: gradient}) of a micro-batch with dropout; `teacher` is a model
    or None."""
    model.train()
    model.zero_grad(set_to_none=True)
    teachers = [] if teacher is None else [(1.0, teacher.eval())]
    torch.manual_seed(case.DROPOUT_SEED)
    loss, ce = q0.training_loss(model, teachers, model.cfg, tokens)
    loss.backward()
    parameters = model.named_parameters()
    gradients = {name: p.grad.numpy().copy() for name, p in parameters}
    return np.array([loss.item(), ce.item()]), gradients


def optimizer_steps(model, steps):
    """Update the weights; each of `steps` is (gradients, multiplier of lr, multiplier of decay)."""
    optimizer = q0.Optimizer(model, model.cfg)
    for gradients, lr_mult, wd_mult in steps:
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(gradients[name].copy())
        optimizer.step(lr_mult, wd_mult)


def perturb(model, scale, key):
    q0.perturb(model, scale, *key)


def run(flags, logs):
    """Train as the command line does. Returns the folder of the run, under the folder `logs`."""
    q0.LOGS = logs
    q0.draw_curve = lambda *args: None
    assert q0.main(flags) == 0
    return logs / flags[flags.index("--run") + 1]


# --------------------------------------------------------------------------------------------------
# Recording


def changes(model, start):
    """What was added to the weights `start`."""
    weights = get_weights(model)
    return {name: weights[name].astype(np.float64) - start[name] for name in start}


def record_steps(student, start, gradients, kept):
    """Changes of the weights by one and two optimizer steps from `start`, and by one with decay."""
    plain = []
    for gradient, lr_mult in zip(gradients, case.LR_STEPS):
        plain.append((gradient, lr_mult, 0.0))
    decay = (gradients[0], *case.DECAY_STEP)
    plans = {"step_1": plain[:1], "step_2": plain, "decayed": [decay]}
    for name, steps in plans.items():
        set_weights(student, start)
        optimizer_steps(student, steps)
        kept[name] = case.summaries(changes(student, start))


def stirred_model(key):
    model = build(key)
    set_weights(model, case.stirred(get_weights(model), key))
    return model


def record_core():
    """{name: array} for core.npz."""
    tokens = torch.from_numpy(case.random_tokens())
    kept = {}
    initial = get_weights(build(case.STUDENT))
    kept["names"] = np.array(list(initial))
    kept["initial"] = case.summaries(initial)
    student = stirred_model(case.STUDENT)
    teacher = stirred_model(case.TEACHER)
    start = get_weights(student)
    kept["start"] = case.summaries(start)
    kept["hidden"], kept["hidden_ahead"] = hidden_states(student, tokens)

    kept["loss_alone"], alone = loss_and_gradients(student, None, tokens)
    kept["loss_taught"], taught = loss_and_gradients(student, teacher, tokens)
    kept["alone"] = case.summaries(alone)
    kept["taught"] = case.summaries(taught)
    halves = []
    scales = []
    rounded = {}
    for name, gradient in taught.items():
        half, scale = case.in_half(gradient)
        halves.append(half.reshape(-1))
        scales.append(scale)
        rounded[name] = case.from_half(half, scale)
    kept["taught_half"] = np.concatenate(halves)
    kept["taught_scale"] = np.array(scales)
    record_steps(student, start, case.step_gradients(rounded), kept)

    set_weights(student, start)
    perturb(student, case.PERTURB_SCALE, case.PERTURB_KEY)
    kept["noise"] = case.summaries(changes(student, start))
    return kept


def record_runs(kind):
    """{name: array} for runs.npz, of the runs whose names begin with `kind`."""
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = case.write_text(folder / "text")
        for name in case.RUN_FLAGS:
            if name.startswith(kind):
                data = ROOT / "data/wiki" if case.on_default_corpus(name) else text
                flags = case.flags_of(name, data)
                found = case.outcome(run(flags, folder / "logs"))
                for part, values in found.items():
                    kept[f"{name}/{part}"] = values
    return kept


def main(parts):
    torch.set_num_threads(1)
    for part in parts:
        path = case.CORE if part == "core" else case.RUNS
        kept = record_core() if part == "core" else record_runs(part)
        if path.exists():
            with np.load(path) as before:
                kept = {**before, **kept}
        np.savez_compressed(path, **kept)


if __name__ == "__main__":
    main(sys.argv[1:])
