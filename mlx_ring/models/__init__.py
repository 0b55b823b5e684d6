"""The networks, their losses, and the checks that a network can be trained here.

`mlp`, `cnn` and `transformer` are built in; each holds its blocks in a list `layers`, and no state that
depends on the batch. `custom` builds a user's own model. `losses` gives one loss per target, `precision` runs
the forward pass in another dtype, `dropout` makes masks that depend on the micro-batch alone, and
`requirements` refuses a model that cannot be trained.
"""

import mlx.nn as nn

from mlx_ring.config.choices import CNNModel, CustomModel, MLPModel, TransformerModel
from mlx_ring.errors import ConfigError
from mlx_ring.models.cnn import CNN
from mlx_ring.models.custom import build_custom
from mlx_ring.models.mlp import MLP
from mlx_ring.models.transformer import Transformer

__all__ = ["ModelConfig", "build_model"]

ModelConfig = MLPModel | CNNModel | TransformerModel | CustomModel


def build_model(config: ModelConfig, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Builds a model for the data. Its weights are drawn from mx.random's current state, not yet evaluated.

    Args:
        config: the `model` group.
        input_shape: the shape of one sample: (features,), (height, width, channels) or (tokens,).
        num_classes: the number of classes, or of tokens in the vocabulary.

    Returns: a classifier (float32 samples (B, *input_shape) → logits (B, num_classes)) or a language model
        (integer tokens (B, T) → logits (B, T, num_classes)).
    Raises: ConfigError if the data's samples do not fit the model (too long, too small, not images), or a
        custom model cannot be built.
    """
    match config:
        case MLPModel():
            return MLP(config, input_shape, num_classes)
        case CNNModel():
            return CNN(config, input_shape, num_classes)
        case TransformerModel():
            _check_sequence_length(config, input_shape)
            return Transformer(config, num_classes)
        case CustomModel():
            return build_custom(config, input_shape, num_classes)


def _check_sequence_length(config: TransformerModel, input_shape: tuple[int, ...]) -> None:
    positions = config.max_sequence_length
    assert positions
    if input_shape and input_shape[0] > positions:
        raise ConfigError(
            f"the data's sequences have {input_shape[0]} tokens, more than "
            f"model.max_sequence_length={positions}; set data.sequence_length={positions} or less"
        )
