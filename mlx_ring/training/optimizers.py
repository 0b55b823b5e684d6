"""Optimizers: MLX's own, set up so that norms and biases never decay."""

import math
from functools import partial

import mlx.core as mx
import mlx.optimizers as optim

from mlx_ring.config.choices import (
    AdafactorOptimizer,
    AdamOptimizer,
    LionOptimizer,
    MuonOptimizer,
    SGDOptimizer,
)
from mlx_ring.training.schedules import Schedule

OptimizerConfig = AdamOptimizer | SGDOptimizer | LionOptimizer | AdafactorOptimizer | MuonOptimizer


def build_optimizer(
    config: OptimizerConfig, *, schedule: Schedule, global_batch_size: int
) -> optim.MultiOptimizer:
    """Build the optimizer: weight decay for matrices, embeddings among them, and none for vectors.

    Muon updates the matrices of the hidden layers (those in the model's list `layers`), AdamW all else, at
    `adam_learning_rate` and on the same schedule.

    Args:
        config: the `optimizer` group.
        schedule: optimizer step → learning rate, its peak `config.learning_rate`; the scaling by batch size
            is applied here.
        global_batch_size: samples an update is made of.
    """
    scale = learning_rate_scale(config, global_batch_size)
    learning_rate = _scaled(schedule, scale)
    match config:
        case MuonOptimizer():
            muon = optim.Muon(learning_rate, momentum=config.momentum, weight_decay=config.weight_decay)
            learning_rate = _scaled(schedule, scale * config.adam_learning_rate / config.learning_rate)
            make = partial(optim.AdamW, learning_rate, bias_correction=True)
            rest = [make(weight_decay=config.weight_decay), make(weight_decay=0.0)]
            return optim.MultiOptimizer([muon, *rest], [is_hidden_matrix, _is_matrix])
        case AdamOptimizer():
            # MLX leaves the bias correction of the published algorithm out by default.
            make = partial(optim.AdamW, betas=config.betas, eps=config.eps, bias_correction=True)
        case LionOptimizer():
            make = partial(optim.Lion, betas=config.betas)
        case SGDOptimizer():
            make = partial(optim.SGD, momentum=config.momentum, nesterov=config.nesterov)
        case AdafactorOptimizer():
            # The learning rate is the schedule's: neither 1 / sqrt(step) nor relative to the weights' size.
            make = partial(
                optim.Adafactor,
                decay_rate=config.decay_rate,
                clip_threshold=config.clip_threshold,
                relative_step=False,
                scale_parameter=False,
            )
    decayed = make(learning_rate=learning_rate, weight_decay=config.weight_decay)
    return optim.MultiOptimizer([decayed, make(learning_rate=learning_rate, weight_decay=0.0)], [_is_matrix])


def learning_rate_scale(config: OptimizerConfig, global_batch_size: int) -> float:
    """What the learning rate is multiplied by: 1, the batch's ratio to the reference, or its square root."""
    ratio = global_batch_size / config.reference_batch_size
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.scale_learning_rate.name]


def current_learning_rate(optimizer: optim.Optimizer) -> mx.array:
    """The learning rate of the latest update, a float32 scalar (Muon's own, where AdamW has another)."""
    return optimizer.learning_rate


def _scaled(schedule: Schedule, factor: float) -> Schedule:
    return lambda step: schedule(step) * factor


def _is_matrix(path: str, gradient: mx.array) -> bool:
    return gradient.ndim >= 2


def is_hidden_matrix(path: str, gradient: mx.array) -> bool:
    """Whether Muon updates this array."""
    return gradient.ndim >= 2 and "layers" in path.split(".")
