"""Builds MLX's optimizers so that weight decay never applies to norms and biases."""

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
    """Builds the optimizer. Weight decay applies to matrices, embeddings included, but not to vectors.

    With Muon, Muon updates the matrices of the hidden layers (those in the model's list `layers`). AdamW
    updates everything else, at `adam_learning_rate` and on the same schedule.

    Args:
        config: the `optimizer` group.
        schedule: optimizer step → learning rate, with `config.learning_rate` as its peak. This function
            applies the scaling by batch size.
        global_batch_size: the number of samples in one update.

    Returns: the optimizer; its state is not yet initialised.
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
            # MLX omits the published algorithm's bias correction by default.
            make = partial(optim.AdamW, betas=config.betas, eps=config.eps, bias_correction=True)
        case LionOptimizer():
            make = partial(optim.Lion, betas=config.betas)
        case SGDOptimizer():
            make = partial(optim.SGD, momentum=config.momentum, nesterov=config.nesterov)
        case AdafactorOptimizer():
            # The schedule alone sets the learning rate: no 1 / sqrt(step), no scaling by the weights' size.
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
    """Returns the learning rate's factor: 1, the ratio batch / reference batch, or its square root."""
    ratio = global_batch_size / config.reference_batch_size
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.scale_learning_rate.name]


def current_learning_rate(optimizer: optim.Optimizer) -> mx.array:
    """Returns the learning rate of the latest update, a float32 scalar (with Muon: Muon's, not AdamW's)."""
    return optimizer.learning_rate


def _scaled(schedule: Schedule, factor: float) -> Schedule:
    return lambda step: schedule(step) * factor


def _is_matrix(path: str, gradient: mx.array) -> bool:
    return gradient.ndim >= 2


def is_hidden_matrix(path: str, gradient: mx.array) -> bool:
    """Tells whether Muon updates the array at `path`: a matrix in the model's list `layers`."""
    return gradient.ndim >= 2 and "layers" in path.split(".")
