"""Builds a user's own model, named by an import path."""

import mlx.nn as nn

from mlx_ring.config import import_path
from mlx_ring.config.choices import CustomModel
from mlx_ring.errors import ConfigError


def build_custom(config: CustomModel, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Calls config.import_path as name(input_shape=…, num_classes=…, **config.arguments); returns the model.

    Raises: ConfigError if the import or the call fails, or the result is not an nn.Module.
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
