"""The cost model: its counts against torch's, and what a step must not do."""
import collections
import math

import pytest
import torch
from tiny import FEATURES, resolved
from torch.utils.flop_counter import FlopCounterMode

import train_q0 as q
from records import cost

SETTINGS = dict(
    FEATURES, layers=2, width=128, head_dim=64, mlp_hidden=320, micro_batch=2, seq_len=96,
    batch_tokens=192, precision="bfloat16", device="cpu", dropout=0.1, windows="SL", loop_first=1,
    loop_last=1)
VOCAB = 500


def product_flops(step):
    """Of each part."""
    found = []
    for part in (step.micro_batch, step.taught, step.update):
        products = [kernel for kernel in part.kernels if kernel.name in cost.PRODUCTS]
        found.append(sum(kernel.flops for kernel in products))
    return found


@pytest.fixture(scope="module")
def compiled():
    """The step of a model that has every feature."""
    return cost.step(resolved(**SETTINGS), VOCAB)


def test_flops_are_those_that_torch_counts(compiled):
    with FlopCounterMode(display=False) as counter:
        eager = cost.step(resolved(**SETTINGS), VOCAB, compile=False)
    counted = product_flops(eager)
    assert counter.get_total_flops() == 2 * sum(counted)  # each ran twice
    assert counted == product_flops(compiled)
    assert compiled.micro_batch.seconds() < eager.micro_batch.seconds()
    assert compiled.micro_batch.peak < eager.micro_batch.peak


def test_what_float32_weights_cost():
    w = torch.empty(64, 64, device="meta", requires_grad=True)
    x = torch.empty(8, 64, device="meta", dtype=torch.bfloat16)
    recorder = cost.Recorder()

    def micro_batches():
        for _ in range(3):  # a cast, and an addition but for the first, in each
            (x @ (w * 2).bfloat16()).sum().backward()

    with recorder:
        part = cost.record(recorder, micro_batches, [w])
        float32 = cost.record(recorder, lambda: x.float() @ w, [w])
    assert not cost.float32_products(part.ops)
    assert len(cost.float32_products(float32.ops)) == 1
    assert cost.weight_casts(part.ops, part.masters) == 3 * w.numel()
    assert cost.gradient_additions(part.ops, [w.shape]) == {(64, 64): 2}


def test_what_a_step_must_not_do(compiled):
    """What made the first core twice as slow on a GPU: float32 products, casts of weights in every
    pass, float32 additions of gradients in every pass."""
    table = q.parameter_table(resolved(**SETTINGS), VOCAB)
    copied = [row.bank_shape for row in table.values()
              if row.rule == "muon" or row.tensor == "head"]
    once = collections.Counter(copied)
    once[table["embed"].bank_shape] += 1  # as large as the head
    for part in (compiled.micro_batch, compiled.taught):
        assert not cost.float32_products(part.ops)
        assert cost.weight_casts(part.ops, part.masters) == 0
        assert cost.gradient_additions(part.ops, copied) == once
    update = compiled.update
    casts = cost.weight_casts(update.ops, update.masters)
    assert casts == sum(map(math.prod, copied))
