"""Learning rate, decay, noise, batches and steps as functions of the position."""
import numpy as np
import pytest
from tiny import resolved

import train_q0 as q


def test_learning_rate_and_decay_are_linear():
    for floor, start, end in ((0.08, 0.7, 1.0), (0.08, 1.2, 0.096), (0.0, 0.0, 1.0)):
        cfg = resolved(lr_floor=floor, wd_start=start, wd_end=end)
        for steps in (1, 7, 381):
            for s in range(steps):
                lr, wd = q.schedule(s, steps, cfg)
                assert lr == pytest.approx(1 + (floor - 1) * s / steps)
                assert wd == pytest.approx(start + (end - start) * s / steps)


def test_noise_follows_a_cosine_from_first_to_last_boundary():
    for cycles in (2, 3, 4, 96):
        wanted = 0.15 + 0.10 * np.cos(np.linspace(0, np.pi, cycles - 1))
        noise = [q.noise_scale(b, cycles, 0.25, 0.05) for b in range(1, cycles)]
        assert noise == pytest.approx(wanted)


def test_large_batches_in_the_middle_half_of_the_cycles():
    cfg = resolved("q0")
    for cycles in range(2, 101):
        for c in range(cycles):
            place = c / (cycles - 1)
            wanted = 524_288 if 0.25 <= place <= 0.75 else 393_216
            assert q.cycle_batch_tokens(c, cycles, cfg) == wanted
    assert q.cycle_batch_tokens(0, 1, cfg) == 524_288


def test_steps_of_a_cycle():
    for epochs, cycle, cycles, tokens, steps in (
            (2, 16, 32, 100_000_000, 381),
            (2, 0, 32, 100_000_000, 509),
            (2, 31, 32, 100_000_000, 509),
            (2, 0, 1, 100_000_000, 381),
            (3, 16, 32, 100_000_000, 572),
            (1, 0, 1, 1000, 1)):
        cfg = resolved("q0", epochs=cycles * epochs, trajectories=1, cycles=cycles)
        planned = q.plan_cycles(cfg, tokens)[0][cycle]
        assert (planned.steps, planned.epochs) == (steps, epochs)
