"""Checks before the first step that a model, which may be a user's own, can be trained here."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ring.errors import ConfigError


def check_parameters(model: nn.Module) -> None:
    """Checks that all trainable parameters are float32, and that no state would differ between ranks.

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
    # Each rank would have running statistics of its own batches, and only rank 0's would be saved.
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm) and "running_mean" in module:
            raise ConfigError(
                f"the model's {path} is a BatchNorm, whose running statistics differ from rank to rank; "
                "use nn.GroupNorm or nn.LayerNorm"
            )


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
