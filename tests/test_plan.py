"""`plan`: its memory formula against tensors that are really kept, its estimates against what a step really does."""
import re

import pytest
import torch

import train_q0 as q
from records import plan

BASE = dict(layers=4, width=256, mlp_hidden=768, head_dim=64, micro_batch=2, seq_len=128, batch_tokens=1024,
            precision="bfloat16", device="cpu")
FEATURES = dict(unet=True, x0_mix=True, value_embeds=True, attn_gates=True, head_mixing=True, mtp_weight=0.3,
                loop_first=2, loop_last=3, loop_passes=3, windows="SSSL", smear=True, induction=True)
VOCAB = 2048


def build(**changes):
    cfg = q.resolve(q.Config(**{**BASE, **changes}))[0]
    return cfg, q.GPT(cfg, VOCAB).init_weights(0)


def kept_by_autograd(cfg, model):
    """Bytes of the distinct tensors, parameters and buffers excepted, that one forward pass saves for backward."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved, alive = {}, []  # a tensor that dies frees its address for the next one: keep all alive

    def pack(tensor):
        alive.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(VOCAB, (cfg.micro_batch, cfg.seq_len + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens[:, :-1], tokens[:, 1:])
    return sum(saved.values())


@pytest.mark.parametrize("changes", [{}, FEATURES, {"dropout": 0.0}, {"precision": "float32"},
                                     {"width": 512, "mlp_hidden": 1024, "micro_batch": 4}], ids=str)
def test_activation_memory(changes):
    cfg, model = build(**changes)
    q.Optimizer(model.train(), cfg, q.World())  # the working copies
    loss_part = cfg.micro_batch * cfg.seq_len * cfg.width * 6  # the loss keeps it
    formula = plan.memory_per_device(cfg, VOCAB)["activations"] - loss_part
    # 10%: the formula drops small terms (gates, rotary, embeddings) and counts float32 norms as
    # an extra copy
    assert formula == pytest.approx(kept_by_autograd(cfg, model), rel=0.10)


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("changes", [{}, FEATURES, {"precision": "float32", "average": 0.5}])
def test_weights_gradients_optimizer_and_member_memory(changes):
    cfg, model = build(**changes)
    banks = q.Optimizer(model, cfg, q.World()).banks.values()
    parts = plan.memory_per_device(cfg, VOCAB)
    assert parts["weights"] == size(bank.master for bank in banks)
    assert parts["gradients"] == size(bank.grad for bank in banks)
    assert parts["working copy"] == size(bank.weight for bank in banks if bank.copied)
    moments = size(x for bank in banks for x in (bank.first, bank.second))
    assert parts["optimizer"] == pytest.approx(moments, rel=0.02)  # left out: Muon's second moments
    assert parts["average"] == (parts["weights"] if cfg.average else 0)
    assert parts["previous"] == size(q.empty_member(cfg, VOCAB).parameters())


def test_plan_names_a_micro_batch_that_fits(capsys):
    assert q.main(["plan", "--preset", "q0", "--gpus", "8", "--micro-batch", "8"]) == 0
    assert "does not fit in 80 GB: use --micro-batch 4" in capsys.readouterr().out
    assert q.main(["plan", "--preset", "q0", "--gpus", "8", "--micro-batch", "4"]) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_plan_states_the_resume_state(capsys):
    """As large as what a state holds, but for Muon's second moments of rows."""
    cfg, model = build()
    optimizer = q.Optimizer(model, cfg, q.World())
    state = [*optimizer.masters.values(), *optimizer.state().values()]
    parts = plan.memory_per_device(cfg, VOCAB)
    assert parts["weights"] + parts["optimizer"] == pytest.approx(size(state), rel=0.02)
    shown = []
    for average in ("0", "0.5"):
        assert q.main(["plan", "--preset", "q0", "--gpus", "8", "--average", average]) == 0
        found = re.search(r"resume state 2 x ([\d.]+) GB a trajectory", capsys.readouterr().out)
        shown.append(float(found[1]))
    assert 1.87 * 8 < shown[0] < 1.87 * 12  # weights and one or two moments in float32
    assert shown[1] - shown[0] == pytest.approx(1.87 * 4, rel=0.02)  # mean weights


def test_plan_time_is_flops_over_speed(capsys):
    argv = ["plan", "--preset", "q0", "--population", "single", "--epochs", "4", "--gpus", "8", "--mfu", "0.5"]
    assert q.main(argv) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("estimated time"))
    cfg = q.resolve(q.Config(**{**q.PRESETS["q0"], "population": "single", "epochs": 4}))[0]
    per_token, forward = q.flops_per_token(cfg, 50257)
    seconds = (4e8 * per_token + 10_132_000 * forward) / (0.5 * 8 * 989e12)
    hours, minutes, rest = line.split()[2].split(":")
    assert 3600 * int(hours) + 60 * int(minutes) + int(rest) == pytest.approx(seconds, rel=0.01)  # steps are rounded


def test_teacher_flops_are_counted_for_distilled_cycles_only():
    cfg = q.resolve(q.Config(epochs=16))[0]
    cycles = sum(q.plan_cycles(cfg, 150_000), [])
    flops = q.run_flops(cfg, cycles, VOCAB)
    train, teacher = q.flops_per_token(cfg, VOCAB)
    # 2 of 4 members have a teacher
    assert flops["teacher"] / flops["model"] == pytest.approx(2 / 4 * teacher / train)
