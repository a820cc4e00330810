"""Learning rate, decay, noise, batches and steps as functions of the position."""
import numpy as np
import pytest
from tiny import resolved

import train_q0 as q


@pytest.mark.parametrize("steps", [1, 2, 7, 381])
@pytest.mark.parametrize("floor, start, end", [
    (0.08, 0.7, 1.0),
    (0.08, 1.2, 0.096),
    (0.0, 0.0, 1.0),
    (0.5, 1.3, 1.0),
    (1.0, 0.7, 0.7)])
def test_learning_rate_and_decay_are_linear(steps, floor, start, end):
    cfg = resolved(lr_floor=floor, wd_start=start, wd_end=end)
    place = np.arange(steps) / steps
    lr = 1 + (floor - 1) * place
    wd = start + (end - start) * place
    for s in range(steps):
        found = q.schedule(s, steps, cfg)
        assert found == pytest.approx((lr[s], wd[s]))


@pytest.mark.parametrize("cycles", [2, 3, 4, 9, 96])
def test_noise_follows_a_cosine_from_first_to_last_boundary(cycles):
    phase = np.linspace(0, np.pi, cycles - 1)
    wanted = 0.15 + 0.10 * np.cos(phase)
    for b in range(1, cycles):
        noise = q.noise_scale(b, cycles, 0.25, 0.05)
        assert noise == pytest.approx(wanted[b - 1])


def test_large_batches_in_the_middle_half_of_the_cycles():
    cfg = resolved("q0")
    for cycles in range(2, 101):
        for c in range(cycles):
            place = c / (cycles - 1)
            wanted = 524_288 if 0.25 <= place <= 0.75 else 393_216
            assert q.cycle_batch_tokens(c, cycles, cfg) == wanted
    assert q.cycle_batch_tokens(0, 1, cfg) == 524_288


@pytest.mark.parametrize("epochs, cycle, cycles, tokens, steps", [
    (2, 16, 32, 100_000_000, 381),
    (2, 0, 32, 100_000_000, 509),
    (2, 31, 32, 100_000_000, 509),
    (2, 0, 1, 100_000_000, 381),
    (3, 16, 32, 100_000_000, 572),
    (1, 0, 1, 1000, 1)])
def test_steps_of_a_cycle(epochs, cycle, cycles, tokens, steps):
    cfg = resolved("q0", epochs=cycles * epochs, trajectories=1, cycles=cycles)
    planned = q.plan_cycles(cfg, tokens)[0][cycle]
    assert planned.steps == steps
    assert planned.epochs == epochs
