"""What a run would do, without running it: `python train_q0.py plan`, with the flags of a run."""
import datetime
import math
import os
import timeit
from dataclasses import replace

import torch

import train_q0 as q

PUBLISHED_MFU, CPU_MFU = 0.26, 0.26  # our count for the published run; preset tiny, measured


def memory_per_device(cfg, vocab_size, ranks=1, population=None):
    """{part: bytes} at the peak of a step; `ranks` share a trajectory and its optimizer; `previous` is the member that
    was evaluated and teaches where no `population` does. Activations are those of eager autograd (torch.compile keeps
    fewer); `update` and activations never live at the same time."""
    D, h, order, rows = cfg.width, cfg.mlp_hidden, q.layer_order(cfg), cfg.micro_batch * cfg.seq_len
    with torch.device("meta"):
        model = q.GPT(cfg, vocab_size)
    count, groups = sum(p.numel() for p in model.parameters()), q.Optimizer(model, cfg).groups
    muon = [sum(p.numel() for p in params) for _, params, _, _, rule, *_ in groups if rule[0] == "muon"]
    act = 2 if cfg.precision == "bfloat16" else 4  # bytes of an activation; norms keep a float32 copy of their input
    value = sum(q.has_value_embed(cfg, i) for i in order) / len(order)
    token = D * (16 + act * (5 + 2 * (cfg.dropout > 0) + cfg.x0_mix + 2 * value + cfg.attn_gates))
    token += act * 5 * h + 12 * D // cfg.head_dim
    passes, cast = len(order) + bool(cfg.mtp_weight), (act == 2) * act * ((4 + value) * D * D + 3 * D * h)
    teachers = [p for model in population.models for p in model.parameters()] if population else []
    logits = act * (1 + bool(cfg.distill_weight))  # bytes each; a mixture is summed up in float32
    logits += 12 * bool(population and len(population.models) > 1)
    parts = {"weights": 4 * count, "gradients": 4 * count, "optimizer": (8 * count - 4 * sum(muon)) // ranks,
             "average": 4 * count * bool(cfg.average), "previous": act * count,
             "teachers": sum(p.numel() * p.element_size() for p in teachers),
             "logits": logits * min(q.GPU_CHUNK_LOGITS, rows * vocab_size),
             "activations": round(passes * (rows * token + cast) + rows * D * 6 + 8 * D * vocab_size),
             "update": (8 + 12 // ranks) * max(muon)}
    return {**parts, "peak": sum(parts.values()) - min(parts["activations"], parts["update"])}


def plan(argv):
    """Print what a run would do: members, steps, FLOPs, memory, disk and time."""
    cfg, why, args = q.parse_config(
        argv, gpus=dict(type=int, help="estimate for this many H100s [the device at hand]"),
        mfu=dict(type=float, help=f"share of peak FLOP/s [{PUBLISHED_MFU} on GPUs, as published; {CPU_MFU} here]"),
        memory=dict(type=float, help="GB per device, to check against [80 with --gpus, else this machine's]"))
    data, on_gpus = q.find_data(cfg), args.gpus or cfg.device == "cuda"
    if (data / "manifest.json").exists():
        corpus = q.load_corpus(data, cfg.seq_len, cfg.train_tokens)
        tokens, vocab_size = corpus.train_sequences * cfg.seq_len, corpus.vocab_size
        eval_tokens = sum(corpus.eval_sequences(s).size for s in ("heldout", cfg.report))
    else:
        vocab_size, eval_tokens = (2048, 130_000) if cfg.data == q.Config.data else (50257, 10_132_000)
        tokens = cfg.train_tokens or 100_000_000
        print(f"{data} is not prepared yet: assuming {tokens} tokens, vocabulary {vocab_size}")
    population = q.load_teacher(cfg, vocab_size, torch.device("cpu"))
    lines, flops = q.describe(cfg, why, tokens, vocab_size, population)
    gpus, members = args.gpus or 1, cfg.trajectories * cfg.cycles
    ranks = gpus // cfg.trajectories if gpus % cfg.trajectories == 0 else gpus  # that share a trajectory
    gb = lambda n: f"{n / 1e9:.3g} GB"
    parts = memory_per_device(cfg, vocab_size, ranks, population)
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf  # Windows
    room = 1e9 * args.memory if args.memory else 80e9 if on_gpus else here
    lines.append(f"memory per device: {', '.join(f'{k} {gb(v)}' for k, v in parts.items())}")
    if parts["peak"] > 0.95 * room:
        needs = lambda m: memory_per_device(replace(cfg, micro_batch=m), vocab_size, ranks, population)["peak"]
        fits = [m for m in range(1, cfg.micro_batch) if cfg.micro_batch % m == 0 and needs(m) <= 0.95 * room]
        advice = f"use --micro-batch {fits[-1]}" if fits else "nor with --micro-batch 1: use a smaller model"
        lines.append(f"warning: that does not fit in {gb(room)}: {advice}")
    state = parts["weights"] + parts["average"] + memory_per_device(cfg, vocab_size)["optimizer"]
    lines.append(f"disk: members {gb(members * parts['weights'] // 2)}, predictions {gb(members * 4 * eval_tokens)}, "
                 f"resume state 2 x {gb(state)} a trajectory ({state / 1e9:.1f} s a save at 1 GB/s)")
    if on_gpus:
        speed, mfu, of = gpus * q.H100_FLOPS, args.mfu or PUBLISHED_MFU, f"{gpus} x H100"
    else:  # the best of five square matrix products
        a = torch.randn(1024, 1024).to(getattr(torch, cfg.precision))
        speed = 2 * 1024 ** 3 / min(timeit.repeat(lambda: a @ a, number=1, repeat=5))
        mfu, of = args.mfu or CPU_MFU, "this CPU, measured"
    forward = q.flops_per_token(cfg, vocab_size)[1] * members * eval_tokens
    lines.append(f"estimated time: {datetime.timedelta(seconds=round((flops + forward) / (speed * mfu)))} for "
                 f"{flops + forward:.3g} FLOPs at {mfu:.0%} of {speed / 1e12:.3g} TFLOP/s ({of})")
    print("\n".join(lines))
