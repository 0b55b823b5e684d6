"""Finds and calls the user's own classes and functions, which the command line names as
`package.module:name`. Loads no MLX itself."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_ring.errors import ConfigError, MlxRingError


def import_callable(key: str, import_path: str) -> Callable[..., Any]:
    """Imports what `import_path` names. The folder where the command was typed is searched too: before the
    installed packages, but after Python's own modules, which a file there must not stand in for.

    Args:
        key: the configuration key that holds the path, for the message.
        import_path: `package.module:name`.

    Raises: ConfigError if it cannot be imported, or is neither a class nor a function.
    """
    module_name, _, name = import_path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        installed = [place for place, path in enumerate(sys.path) if path.endswith("-packages")]
        sys.path.insert(installed[0] if installed else len(sys.path), here)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if module_name.partition(".")[0] in sys.stdlib_module_names:
            reason = f"{reason}; Python has a module of this name: give your file another"
        raise ConfigError(f"{key}={import_path} cannot be imported from {here}: {reason}") from error
    if not callable(found):
        raise ConfigError(
            f"{key}={import_path} is a {type(found).__name__}; it must be a class or a function"
        )
    return found


def call(group: str, import_path: str, arguments: dict[str, Any], **given: Any) -> Any:
    """Calls what GROUP.import_path names, and returns its result.

    Args:
        group: the configuration group, such as "model".
        import_path: `package.module:name`.
        arguments: the user's GROUP.arguments; they win over `given` if both have a name.
        given: the keyword arguments that mlx_ring passes.

    Raises: ConfigError if it cannot be imported, does not take these arguments, or fails.
    """
    key = f"{group}.import_path"
    function = import_callable(key, import_path)
    all_arguments = {**given, **arguments}
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
