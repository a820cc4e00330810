"""FLOPs of a run, counted from the table of its weights (train_q0.parameter_table)."""
import collections
import math
from dataclasses import replace

import train_q0 as q


def forward_flops(cfg, vocab_size):
    """FLOPs per token of a forward pass: two for each weight of a product, at every pass of a loop,
    and those of attention to the keys that are seen."""
    T = cfg.seq_len
    order = q.layer_order(cfg)
    passes = collections.Counter(f"blocks.{i}" for i in order)
    windows = [q.layer_windows(cfg)[i] for i in order]
    heads = 1
    if cfg.mtp_weight:
        passes["mtp_block"] = 1
        windows.append(T)
        heads = 2
    products = heads * vocab_size * cfg.width
    for name, row in q.parameter_table(cfg, vocab_size).items():
        uses = sum(passes[block] for block in row.blocks) if row.blocks else 1
        if name == "value":  # one product for all passes of a loop
            uses = len(row.blocks)
        if row.product:
            products += uses * math.prod(row.shape)
    keys = sum(w * (2 * T + 1 - w) for w in windows) / (2 * T)
    return 2 * products + 4 * cfg.width * keys


def flops_per_token(cfg, vocab_size):
    """(training, teacher) FLOPs per token: a backward pass counts as two forward ones; a teacher
    has no multi-token block."""
    teacher = forward_flops(replace(cfg, mtp_weight=0.0), vocab_size)
    return 3 * forward_flops(cfg, vocab_size), teacher


def run_flops(cfg, cycles, vocab_size, population=None):
    """{part: FLOPs} of all training steps; the teacher is one member, or a `population`."""
    teachers = [model.cfg for model in population.models] if population else [cfg]
    model, _ = flops_per_token(cfg, vocab_size)
    teacher = sum(flops_per_token(of, vocab_size)[1] for of in teachers)
    tokens = sum(c.steps * c.rows for c in cycles) * cfg.seq_len
    taught = sum(c.steps * c.rows for c in cycles if c.distilled) * cfg.seq_len
    return {"model": model * tokens, "teacher": teacher * taught}
