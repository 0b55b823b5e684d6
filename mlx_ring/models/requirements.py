"""Checks before the first step that a model, which may be a user's own, can be trained here."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_ring.errors import ConfigError


def check_parameters(model: nn.Module) -> None:
    """Checks that all trainable parameters are float32 arrays of their own, and no state differs by rank.

    Raises: ConfigError that names the parameter or module at fault, or if all parameters are frozen.
    """
    weights = dict(tree_flatten(model.trainable_parameters()))
    if not weights:
        raise ConfigError("the model has nothing to train: all its parameters are frozen; unfreeze some")
    for path, weight in weights.items():
        if not mx.issubdtype(weight.dtype, mx.floating):
            raise ConfigError(
                f"the model's {path} is of {weight.dtype} and would be trained; freeze it "
                f"(freeze(keys=[{path.rpartition('.')[2]!r}], recurse=False)), or give it a name that begins "
                "with an underscore"
            )
        if weight.dtype != mx.float32:
            raise ConfigError(
                f"the model's {path} is of {weight.dtype}, and master weights are float32; leave the model "
                "in float32, and compute with trainer.compute_dtype=bfloat16"
            )
    _refuse_tied_by_assignment(model, weights)
    # Each rank would have running statistics of its own batches, and only rank 0's would be saved.
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm) and "running_mean" in module:
            raise ConfigError(
                f"the model's {path} is a BatchNorm, whose running statistics differ from rank to rank; "
                "use nn.GroupNorm or nn.LayerNorm"
            )


def _refuse_tied_by_assignment(model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Raises: ConfigError if two weights are one array now: from the first update on they would be two.

    Two names of one module are no such case, for it stays one. Nor is a `copy.deepcopy`, which shares memory
    until then: it is meant to begin alike.
    """
    modules = dict(model.named_modules())
    shares_memory = mx.default_device() == mx.cpu or mx.metal.is_available()  # a host's view costs nothing
    owners: dict[int, tuple[str, Any]] = {}
    for path, weight in weights.items():
        view = np.asarray(weight) if shares_memory and weight.size else None
        other, first = owners.setdefault(id(weight) if view is None else view.ctypes.data, (path, view))
        # A weight that is another one transposed, or a part of it, begins at the same address.
        derived = view is not None and (view.shape, view.strides) != (first.shape, first.strides)
        if (weight is weights[other] or derived) and _place(modules, other) != _place(modules, path):
            raise ConfigError(
                f"the model's {other} and {path} are one array, and would be trained as two: MLX ties no "
                "weights by assignment; use one weight in both places, for example embedding.as_linear(x) "
                "for the head, or give each an array of its own (mx.array(weight))"
            )


def _place(modules: dict[str, nn.Module], path: str) -> tuple[int, str]:
    """Returns: which module holds a parameter, and its path in there."""
    holder = path
    while holder not in modules:
        holder = holder.rpartition(".")[0]
    return id(modules[holder]), path[len(holder) :].lstrip(".")


def check_outputs(
    model: nn.Module, name: str, inputs: mx.array, *, each_position: bool, num_classes: int | None
) -> None:
    """Calls the model once and checks the shape of its outputs. MLX is lazy, so no values are computed.

    Args:
        model: the model to call.
        name: of the model, for the error message.
        inputs: samples of any values, (B, *input_shape), in the data's dtype.
        each_position: whether every position of a sample has logits, as in a language model.
        num_classes: the number of logits that the outputs must have; None if the loss is a user's own.

    Raises: ConfigError if the model raises an error, or its outputs do not fit.
    """
    try:
        outputs = model(inputs)
    except Exception as error:  # a user's code may raise anything
        what = f"model={name} failed on samples of shape {inputs.shape}"
        raise ConfigError(f"{what}: {type(error).__name__}: {error}; correct the model") from error
    positions = inputs.shape if each_position else inputs.shape[:1]
    if num_classes is not None and outputs.shape != (*positions, num_classes):
        raise ConfigError(
            f"model={name} gives outputs of shape {outputs.shape} for samples of shape {inputs.shape}, and "
            f"cross entropy over the data's {num_classes} classes needs {(*positions, num_classes)}; correct "
            "the model, or give a trainer.loss of your own"
        )
