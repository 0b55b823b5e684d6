"""What a model must be to be trained here; checked before the first step, for users bring their own."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_ring.errors import ConfigError


def check_parameters(model: nn.Module) -> None:
    """Float32 master weights, equal on all ranks.

    Raises: ConfigError naming the parameter or the module that is not fit.
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
    # Running statistics of a batch would be each rank's own, and only rank 0's would be saved.
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm) and "running_mean" in module:
            raise ConfigError(
                f"the model's {path} is a BatchNorm, whose running statistics differ from rank to rank; "
                "use nn.GroupNorm or nn.LayerNorm"
            )


def check_outputs(
    model: nn.Module, name: str, inputs: mx.array, *, each_position: bool, num_classes: int | None
) -> None:
    """Call the model on samples of any values. Nothing is computed: MLX finds the shapes without.

    Args:
        inputs: (B, *input_shape), of the data's shape and dtype.
        each_position: whether every position of a sample has logits, as in a language model.
        num_classes: that the outputs must have; None where the loss is the user's own.

    Raises: ConfigError where the model fails, or its outputs do not fit.
    """
    try:
        outputs = model(inputs)
    except Exception as error:  # whatever a user's code raises
        what = f"model={name} failed on samples of shape {inputs.shape}"
        raise ConfigError(f"{what}: {type(error).__name__}: {error}; correct the model") from error
    positions = inputs.shape if each_position else inputs.shape[:1]
    if num_classes is not None and outputs.shape != (*positions, num_classes):
        raise ConfigError(
            f"model={name} gives outputs of shape {outputs.shape} for samples of shape {inputs.shape}, and "
            f"cross entropy over the data's {num_classes} classes needs {(*positions, num_classes)}; correct "
            "the model, or give a trainer.loss of your own"
        )
