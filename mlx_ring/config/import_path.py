"""Objects of the user's own, named on the command line by `package.module:name`. No mlx here."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_ring.errors import ConfigError, MlxRingError


def import_callable(key: str, import_path: str) -> Callable[..., Any]:
    """What `import_path` names; modules are also looked up in the folder where the command was typed.

    Raises: ConfigError naming `key` and the path if it cannot be imported, or cannot be called.
    """
    module_name, _, name = import_path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{key}={import_path} cannot be imported from {here}: {reason}") from error
    if not callable(found):
        raise ConfigError(
            f"{key}={import_path} is a {type(found).__name__}; it must be a class or a function"
        )
    return found


def call(group: str, import_path: str, arguments: dict[str, Any], **given: Any) -> Any:
    """What `GROUP.import_path` returns for what we give it and the user's GROUP.arguments.

    Raises: ConfigError naming the path if it cannot be imported, does not take these arguments, or fails.
    """
    key = f"{group}.import_path"
    function, all_arguments = import_callable(key, import_path), {**given, **arguments}
    try:
        inspect.signature(function).bind(**all_arguments)
    except (TypeError, ValueError) as error:
        names = ", ".join(all_arguments) or "none"  # not the values: one may be a secret
        raise ConfigError(
            f"{key}={import_path} does not take the arguments {names}: {error}; correct {group}.arguments"
        ) from error
    try:
        return function(**all_arguments)
    except MlxRingError:
        raise
    except Exception as error:  # the user's own code: its traceback is in the log
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{key}={import_path} failed: {reason}; correct it or {group}.arguments") from error
