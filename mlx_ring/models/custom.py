"""Objects of the user's own, named by an import path."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_ring.config import CustomModel
from mlx_ring.errors import ConfigError


def import_callable(option: str, import_path: str) -> Callable[..., Any]:
    """What `package.module:name` names; modules are also looked up in the folder where the command was typed.

    Raises: ConfigError naming `option` and the path if it cannot be imported, or cannot be called.
    """
    module_name, _, name = import_path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{option}={import_path} cannot be imported from {here}: {reason}") from error
    if not callable(found):
        raise ConfigError(
            f"{option}={import_path} is a {type(found).__name__}; it must be a class or a function"
        )
    return found


def build_custom(config: CustomModel, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Call name(input_shape=…, num_classes=…, **config.arguments).

    Raises: ConfigError if the arguments do not fit, or what comes back is not an nn.Module.
    """
    build = import_callable("model.import_path", config.import_path)
    arguments = {"input_shape": input_shape, "num_classes": num_classes, **(config.arguments or {})}
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        names = ", ".join(arguments)
        raise ConfigError(
            f"model.import_path={config.import_path} does not take the arguments {names}: {error}; "
            "see conf/model/custom.yaml"
        ) from error
    model = build(**arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.import_path={config.import_path} returned a {type(model).__name__}; "
            "it must return an mlx.nn.Module"
        )
    return model
