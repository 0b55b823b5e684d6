"""A model of the user's own, named by an import path."""

import mlx.nn as nn

from mlx_ring.config import import_path
from mlx_ring.config.choices import CustomModel
from mlx_ring.errors import ConfigError


def build_custom(config: CustomModel, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Call name(input_shape=…, num_classes=…, **config.arguments).

    Raises: ConfigError if the arguments do not fit, or what comes back is not an nn.Module.
    """
    arguments = config.arguments or {}
    model = import_path.call(
        "model", config.import_path, arguments, input_shape=input_shape, num_classes=num_classes
    )
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.import_path={config.import_path} returned a {type(model).__name__}; "
            "it must return an mlx.nn.Module"
        )
    return model
