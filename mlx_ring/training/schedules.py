"""Builds the learning rate's course over a run from MLX's own schedules."""

from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim

from mlx_ring.config.choices import ConstantSchedule, DecaySchedule, WSDSchedule
from mlx_ring.errors import ConfigError

Schedule = Callable[[mx.array], mx.array]


def build_schedule(
    config: ConstantSchedule | DecaySchedule | WSDSchedule, *, peak: float, total_steps: int
) -> Schedule:
    """Returns the learning rate as a function of the optimizer's step, the number of updates already made.

    Update n (the metrics row with `step` n) uses the schedule's value at n. Warm-up reaches `peak` at
    n = warmup_steps, and none of its updates has learning rate 0. A decay reaches its final fraction in the
    run's last update.

    Args:
        config: the `schedule` group.
        peak: the largest learning rate.
        total_steps: the number of updates in the whole run.

    Returns: a function from an integer scalar to a float32 scalar, which works inside mx.compile.
    Raises: ConfigError if warm-up and decay do not fit into the run.
    """
    warmup = config.warmup_steps
    schedules, boundaries = _after_warmup(config, peak, total_steps)
    if warmup > 0:
        schedules = [optim.linear_schedule(0.0, peak, warmup), *schedules]
        boundaries = [warmup, *boundaries]
    joined = optim.join_schedules(schedules, boundaries)
    return lambda step: joined(step + 1)


def _after_warmup(
    config: ConstantSchedule, peak: float, total_steps: int
) -> tuple[list[Schedule], list[int]]:
    """Returns the schedules after the warm-up, and the steps at which all but the first of them begin."""
    remaining = total_steps - config.warmup_steps
    decay_steps = 1
    if isinstance(config, WSDSchedule):
        decay_steps = config.decay_steps or max(1, total_steps // 5)
    if remaining < decay_steps:
        raise ConfigError(
            f"schedule={config.name} needs schedule.warmup_steps={config.warmup_steps} and {decay_steps} "
            f"more steps; trainer.steps={total_steps} is too few"
        )

    def constant(step: mx.array) -> mx.array:
        return mx.array(peak, dtype=mx.float32)

    match config:
        case WSDSchedule():
            decay = optim.linear_schedule(peak, peak * config.final_fraction, decay_steps)
            return [constant, decay], [total_steps - decay_steps]
        case DecaySchedule(name="linear"):
            return [optim.linear_schedule(peak, peak * config.final_fraction, remaining)], []
        case DecaySchedule():
            return [optim.cosine_decay(peak, remaining, peak * config.final_fraction)], []
        case _:
            return [constant], []
