"""What a run would do, without running it: `python train_q0.py plan`, with the flags of a run."""
import datetime
import math
import os
import timeit
from dataclasses import replace

import torch

import train_q0 as q
from records.generate import cache_bytes
from records import recipes
from records.flops import flops_per_token, run_flops
from records.launch import describe
from records.population import load_teacher
from records.use import number

H100_FLOPS = 989e12  # a second, dense bf16
PUBLISHED_MFU = 0.26  # our count for the published run
CPU_MFU = 0.26  # of preset tiny, measured


def activation_bytes(cfg, width_bytes):
    """Bytes that autograd keeps of a micro-batch. Compiled, it keeps fewer: masks of a byte, a
    tensor of each width in the MLP once, as records/cost.py traces it."""
    D = cfg.width
    rows = cfg.micro_batch * cfg.seq_len
    order = q.layer_order(cfg)
    value = 0
    if cfg.value_embeds:
        every_second = range((cfg.layers - 1) % 2, cfg.layers, 2)
        value = sum(i in every_second for i in order) / len(order)
    dropped = 2 if cfg.dropout > 0 else 0
    streams = 4 + dropped + cfg.x0_mix + value + cfg.attn_gates
    token = width_bytes * (D * streams + 5 * cfg.mlp_hidden)
    if cfg.compile:
        streams = 6 + cfg.x0_mix + cfg.attn_gates
        token = D * (width_bytes * streams + dropped) + width_bytes * 3 * cfg.mlp_hidden
    token += 12 * D // cfg.head_dim
    passes = len(order) + bool(cfg.mtp_weight)
    if cfg.recompute:  # of a looped block what enters it is left
        kept = passes - cfg.loop_passes * (cfg.loop_last + 1 - cfg.loop_first)
        passes = max(1, kept if cfg.loop_passes > 1 else 1)
    mixed = 3 * D * D * len(q.block_names(cfg)) * width_bytes if cfg.head_mixing else 0
    return round(passes * rows * token + mixed + rows * D * 6)


def memory_per_device(cfg, vocab_size, ranks=1, population=None):
    """{part: bytes} at the peak of a step; `ranks` share the optimizer's moments. `previous` is the
    member that was evaluated, and teaches where no `population` does. Activations and what an
    update needs never live at the same time."""
    table = q.parameter_table(cfg, vocab_size)
    sizes = {name: math.prod(row.bank_shape) for name, row in table.items()}
    count = sum(sizes.values())
    muon = [sizes[name] for name, row in table.items() if row.rule == "muon"]
    narrow = cfg.precision == "bfloat16"
    width_bytes = 2 if narrow else 4
    teachers = []
    if population:
        teachers = [p for model in population.models for p in model.parameters()]
    logit_bytes = 2 * width_bytes if cfg.distill_weight else width_bytes
    if population and len(population.models) > 1:
        logit_bytes += 12  # a mixture is summed up in float32
    logits = min(q.GPU_CHUNK_LOGITS, cfg.micro_batch * cfg.seq_len * vocab_size)
    copied = sum(muon) + sizes["head"]
    parts = {
        "weights": 4 * count,
        "working copy": 2 * copied if narrow else 0,
        "gradients": 4 * count,
        "optimizer": (8 * count - 4 * sum(muon)) // ranks,
        "average": 4 * count if cfg.average else 0,
        "previous": width_bytes * count,
        "teachers": sum(p.numel() * p.element_size() for p in teachers),
        "logits": logit_bytes * logits,
        "activations": activation_bytes(cfg, width_bytes),
        # a bank's float32 temporaries and its matrices in the precision of products
        "update": max(muon) * (16 + 3 * width_bytes)}
    spared = min(parts["activations"], parts["update"])
    return {**parts, "peak": sum(parts.values()) - spared}


def gb(n):
    return f"{n / 1e9:.3g} GB"


def memory_lines(cfg, vocab_size, ranks, population, room):
    """What a device holds, and a warning with a way out where that is more than `room` bytes."""
    def peak(micro_batch):
        smaller = replace(cfg, micro_batch=micro_batch)
        return memory_per_device(smaller, vocab_size, ranks, population)["peak"]
    parts = memory_per_device(cfg, vocab_size, ranks, population)
    yield "memory per device:"
    for name, size in parts.items():
        yield f"  {name:<12} {size / 1e9:>9.3f} GB"
    if parts["peak"] > 0.95 * room:
        smaller = [m for m in range(1, cfg.micro_batch) if cfg.micro_batch % m == 0]
        fits = [m for m in smaller if peak(m) <= 0.95 * room]
        advice = "nor with --micro-batch 1: use a smaller model"
        if fits:
            advice = f"use --micro-batch {fits[-1]}"
        yield f"warning: that does not fit in {gb(room)}: {advice}"


def disk_line(cfg, vocab_size, eval_tokens):
    parts = memory_per_device(cfg, vocab_size)
    members = cfg.trajectories * cfg.cycles
    state = parts["weights"] + parts["average"] + parts["optimizer"]
    return (f"disk: members {gb(members * parts['weights'] // 2)}, predictions "
            f"{gb(members * 4 * eval_tokens)}, resume state 2 x {gb(state)} a trajectory "
            f"({state / 1e9:.1f} s a save at 1 GB/s)")


def use_line(cfg, vocab_size):
    """What text from all members takes: weights in bf16, keys and values of one text."""
    members = cfg.trajectories * cfg.cycles
    weights = members * memory_per_device(cfg, vocab_size)["weights"] // 2
    kept = members * cache_bytes(cfg, 1)
    return (f"use: {members} members {gb(weights)} in bf16, {gb(kept)} of keys and values for each "
            f"text of {cfg.seq_len} tokens; --k chooses fewer, and what does not fit is streamed "
            "from the disk")


def speed_of(cfg, gpus, on_gpus, mfu):
    """(FLOP/s, share of it that a run reaches, what it is of)."""
    if on_gpus:
        return gpus * H100_FLOPS, mfu or PUBLISHED_MFU, f"{gpus} x H100"
    a = torch.randn(1024, 1024).to(getattr(torch, cfg.precision))
    best = min(timeit.repeat(lambda: a @ a, number=1, repeat=5))
    return 2 * 1024 ** 3 / best, mfu or CPU_MFU, "this CPU, measured"


def modelled_seconds(cfg, vocab_size, gpus, cycles, eval_tokens):
    """Seconds of a run on H100s by the model of their kernels (records/cost.py), which takes up to
    a minute. What GPUs exchange is left out; a --teacher counts as one model like the student."""
    from records import cost
    step = cost.step(cfg, vocab_size)
    micro_batch = step.micro_batch.seconds(cfg.graphs)
    taught = step.taught.seconds(cfg.graphs) if step.taught else micro_batch
    update = step.update.seconds(cfg.graphs) / gpus
    total = 0.0
    for cycle in cycles:
        count = cycle.rows / cfg.micro_batch / gpus
        total += cycle.steps * (count * (taught if cycle.distilled else micro_batch) + update)
    forward = taught - micro_batch if step.taught else micro_batch / 3
    evaluated = len(cycles) * eval_tokens / (cfg.micro_batch * cfg.seq_len)
    return total + evaluated * forward / gpus


def text_of(cfg):
    """(tokens of an epoch, vocabulary, tokens to evaluate a member on); a guess without data."""
    data = q.find_data(cfg)
    if (data / "manifest.json").exists():
        corpus = q.load_corpus(data, cfg.seq_len, cfg.train_tokens)
        evaluated = sum(corpus.eval_sequences(s).size for s in ("heldout", cfg.report))
        return corpus.train_sequences * cfg.seq_len, corpus.vocab_size, evaluated
    small = cfg.data == q.Config.data
    tokens = cfg.train_tokens or 100_000_000
    vocab_size = 2048 if small else 50257
    print(f"{data} is not prepared yet: assuming {tokens} tokens, vocabulary {vocab_size}")
    return tokens, vocab_size, 130_000 if small else 10_132_000


def plan(argv):
    """Print what a run would do: members, steps, FLOPs, memory, disk and time."""
    cfg, why, args = q.parse_config(argv, {
        "--gpus": dict(
            type=number(int, 1, 1_000_000), help="estimate for this many H100s [the device at "
            "hand]"),
        "--mfu": dict(
            type=number(float, 1e-6, 1), help="share of peak FLOP/s "
            f"[{PUBLISHED_MFU} on GPUs, as published; {CPU_MFU} here]"),
        "--modelled": dict(
            action="store_true", help="with --gpus: time by a model of every kernel, which takes "
            "up to a minute, in place of an assumed share of the peak"),
        "--k": dict(
            type=number(int, 1, math.inf), metavar="K", help="models at inference: names the "
            "population to train"),
        "--memory": dict(
            type=number(float, 1e-3, 1e6), help="GB per device [80 with --gpus, else this "
            "machine's]")})
    if args.modelled and not args.gpus:
        raise q.UserError("--modelled is of H100s: give --gpus N")
    if args.gpus:
        q.check_divides(cfg, args.gpus)
        if "device" not in why and cfg.device != "cuda":
            raise q.UserError(f"--gpus is of H100s: leave out --device {cfg.device}")
    on_gpus = bool(args.gpus) or cfg.device == "cuda"
    gpus = args.gpus or 1
    parameters = cfg.layers * cfg.width * (4 * cfg.width + 3 * cfg.mlp_hidden)
    on_h100 = {"device": "cuda", "precision": "bfloat16", "compile": True,
               "graphs": parameters < q.LAUNCH_BOUND}
    for name, value in on_h100.items():
        if args.gpus and name in why:
            cfg = replace(cfg, **{name: value})
            why[name] = "of --gpus"
    epoch_tokens, vocab_size, eval_tokens = text_of(cfg)
    population = load_teacher(cfg, vocab_size, torch.device("cpu")) if cfg.teacher else None
    lines = describe(cfg, why, epoch_tokens, vocab_size)
    room = 80e9 if on_gpus else math.inf
    if args.memory:
        room = 1e9 * args.memory
    elif not on_gpus and hasattr(os, "sysconf"):  # Windows does not say
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines += memory_lines(cfg, vocab_size, gpus, population, room)
    lines.append(disk_line(cfg, vocab_size, eval_tokens))
    lines.append(use_line(cfg, vocab_size))
    cycles = sum(q.plan_cycles(cfg, epoch_tokens), [])
    flops = sum(run_flops(cfg, cycles, vocab_size, population).values())
    flops += flops_per_token(cfg, vocab_size)[1] * len(cycles) * eval_tokens
    speed, mfu, device = speed_of(cfg, gpus, on_gpus, args.mfu)
    if args.modelled:
        seconds = modelled_seconds(cfg, vocab_size, gpus, cycles, eval_tokens)
        mfu = flops / (seconds * speed)
        device += ", modelled without what they exchange"
    time = datetime.timedelta(seconds=round(flops / (speed * mfu)))
    lines.append(f"estimated time: {time} for {flops:.3g} FLOPs at {mfu:.0%} of "
                 f"{speed / 1e12:.3g} TFLOP/s ({device})")
    if args.k is not None:
        lines += recipes.advice(cfg, args.k)
    print("\n".join(lines))
