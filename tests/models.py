"""What several test files need: small settings, a model, a corpus in memory, a trainer."""
import copy

import numpy as np
import torch

import train_q0 as q

VOCAB = 100  # padded to 128
SMALL = dict(
    layers=6, width=64, head_dim=16, mlp_hidden=96, seq_len=16, batch_tokens=64, micro_batch=2,
    dropout=0.0, precision="float32", device="cpu")
PLAIN = dict(value_embeds=False, smear=False, induction=False)
FEATURES = dict(
    windows="SSSL", unet=True, x0_mix=True, value_embeds=True, attn_gates=True, head_mixing=True,
    loop_first=3, loop_last=4, loop_passes=3, mtp_weight=0.3, smear=True, induction=True)
NEUTRAL = ("attn_gate", "value_gate", "mixing", "resid_scale", "x0_scale", "skip_scale", "smear")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_tokens(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=seeded(seed))


def resolved(preset="tiny", **changes):
    settings = {**q.PRESETS[preset], "preset": preset, **changes}
    return q.resolve(q.Config(**settings))[0]


def small(**changes):
    return resolved(**{**SMALL, **FEATURES, **changes})


def build(key=0, stir=True, **changes):
    """A GPT of all features. `stir` moves what starts neutral, and makes logits of order 1."""
    model = q.GPT(small(**changes), VOCAB).init_weights(key)
    if stir:
        generator = seeded(key + 1)
        with torch.no_grad():
            model.head.mul_(200)
            for name in NEUTRAL:
                if name in model.table:
                    weight = getattr(model, name)
                    weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.train()


def in_float64(model):
    """A float64 copy; its rotary angles still have float32's error."""
    model = copy.deepcopy(model).double()
    model.dtype = torch.float64
    return model


def corpus(module=q):
    """Documents of a chain in which three tokens may follow each token: a loss that can fall."""
    rng = np.random.default_rng(0)
    text = [0]
    for step in rng.integers(1, 4, size=1200):
        text.append((7 * text[-1] + int(step)) % VOCAB)
    tokens = np.array(text, dtype=np.uint16)
    parts = np.split(tokens, [700, 860, 1020])
    splits = dict(zip(module.SPLITS, parts))
    documents = tuple(np.split(parts[0], range(50, 700, 50)))
    return module.Corpus("chain", VOCAB, splits, {}, documents, SMALL["seq_len"])


def trainer(folder, cfg, module=q):
    """A Trainer of one process on the corpus above, and its plan."""
    for part in ("state", "predictions"):
        (folder / part).mkdir(parents=True)
    data = corpus(module)
    plan = module.plan_cycles(cfg, data.train_sequences * cfg.seq_len)
    run = module.Run(folder, module.method_settings(cfg), sum(plan, []), "")
    return module.Trainer(cfg, data, module.World(), run), plan


def train(folder, cfg, module=q):
    """Train a run in this process. Returns its Trainer."""
    found, plan = trainer(folder, cfg, module)
    module.train(found, plan)
    return found
