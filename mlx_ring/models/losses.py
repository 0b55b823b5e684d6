"""Builds losses: one float32 number per target. A target of -1 does not count."""

import inspect
from collections.abc import Callable

import mlx.core as mx

from mlx_ring.config.import_path import import_callable
from mlx_ring.errors import ConfigError

Loss = Callable[[mx.array, mx.array], mx.array]


def build_loss(name: str) -> Loss:
    """Returns loss(outputs, targets): `cross_entropy`, or a user's function named by an import path.

    A user's function is called with float32 outputs, and with 0 in place of every target of -1. It must
    return one loss per target.

    Returns: a function of outputs (B, …) and targets. It gives float32 losses in the targets' shape, with 0
        for every signed integer target of -1. It raises ConfigError if a user's function returns another
        shape.
    Raises: ConfigError if the function cannot be imported, or does not take two arguments.
    """
    if name == "cross_entropy":
        return _cross_entropy
    function = import_callable("trainer.loss", name)
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer.loss={name} cannot be called with (outputs, targets): {error}") from error

    def loss(outputs: mx.array, targets: mx.array) -> mx.array:
        counted = _counted(targets)
        losses = function(outputs.astype(mx.float32), mx.where(counted, targets, 0))
        if losses.shape != targets.shape:
            raise ConfigError(
                f"trainer.loss={name} returned losses of shape {losses.shape} for targets of shape "
                f"{targets.shape}; it must return one loss per target"
            )
        return mx.where(counted, losses.astype(mx.float32), 0)

    return loss


def sum_of_losses(loss: Loss, outputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Returns the sum of the losses of all targets that count (float32) and the number of them (int32)."""
    return loss(outputs, targets).sum(), _counted(targets).sum().astype(mx.int32)


def _cross_entropy(outputs: mx.array, targets: mx.array) -> mx.array:
    counted = _counted(targets)
    # On a GPU the fused kernel itself computes in float32, so the logits need no float32 copy.
    if mx.default_device() != mx.gpu:
        outputs = outputs.astype(mx.float32)
    return mx.where(counted, mx.fast.cross_entropy(outputs, mx.where(counted, targets, 0)), 0)


def _counted(targets: mx.array) -> mx.array:
    """Returns True for each target that counts. An unsigned type has no -1: its largest value is a class."""
    if mx.issubdtype(targets.dtype, mx.signedinteger):
        return targets != -1
    return mx.ones(targets.shape, dtype=mx.bool_)
