"""Sets memory limits, reads the peak, and makes models recompute activations instead of keeping them."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.nn.utils import checkpoint

from mlx_ring.config.sections import MemorySection
from mlx_ring.errors import ConfigError

DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


def apply_limits(config: MemorySection) -> None:
    """Sets the configured limits, in bytes, in MLX; a limit that is null keeps MLX's default.

    Raises: ConfigError if a limit exceeds the device's memory or MLX refuses it, or if a wired limit is set
        on a machine without Metal.
    """
    if config.wired_limit_bytes is not None and not mx.metal.is_available():
        raise ConfigError(
            f"memory.wired_limit_bytes={config.wired_limit_bytes} works on macOS only; set it to null here"
        )
    _apply("limit_bytes", config.limit_bytes, mx.set_memory_limit)
    _apply("cache_limit_bytes", config.cache_limit_bytes, mx.set_cache_limit)
    _apply("wired_limit_bytes", config.wired_limit_bytes, mx.set_wired_limit)


def _apply(key: str, limit_bytes: int | None, apply: Callable[[int], int]) -> None:
    if limit_bytes is None:
        return
    info = mx.device_info()
    # Metal and CUDA name the field differently; for a CPU, the machine's memory counts.
    total_bytes = int(info.get("memory_size") or info.get("total_memory") or psutil.virtual_memory().total)
    if limit_bytes > total_bytes:
        raise ConfigError(
            f"memory.{key}={limit_bytes} is more than the {total_bytes} bytes of {info['device_name']}; "
            "give less"
        )
    try:
        apply(limit_bytes)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"memory.{key}={limit_bytes} was refused by MLX: {reason}; give less") from error


def peak_bytes() -> int:
    """Returns the most bytes that MLX's arrays took at once since the process started."""
    return mx.get_peak_memory()


def checkpoint_activations(model: nn.Module) -> int:
    """Makes every block of `model.layers` recompute its activations in the backward pass, not keep them.

    Each block gets a subclass of its own class; nothing else changes, and parameters keep their paths. A
    block must be a pure function of its parameters and arguments: if it needs random numbers, it takes a key
    as an argument.

    Returns: the number of blocks.
    Raises: ConfigError if the model has no list `layers`, if a block is not an nn.Module, or if a block draws
        its own dropout masks.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers:
        raise ConfigError(
            f"memory.activation_checkpointing=true needs a model with its blocks in a list `layers`; "
            f"{type(model).__name__} has none: set it to false"
        )
    for index, block in enumerate(layers):
        _check_pure(f"layers.{index}", block)
    for block in layers:
        block.__class__ = _recomputed(type(block))
    return len(layers)


def _check_pure(path: str, block: Any) -> None:
    if not isinstance(block, nn.Module):
        raise ConfigError(
            f"memory.activation_checkpointing=true needs blocks that are an mlx.nn.Module; {path} is a "
            f"{type(block).__name__}: set it to false"
        )
    for name, module in block.named_modules():
        if isinstance(module, DROPOUTS) and module._p_1 < 1:  # pyright: ignore[reportPrivateUsage]
            where = f"{path}.{name}" if name else path
            raise ConfigError(
                f"memory.activation_checkpointing=true would recompute the nn.Dropout at {where} with "
                "another mask and give wrong gradients: set it to false, or use mlx_ring.models.dropout, "
                "which takes a key"
            )


@cache
def _recomputed(block_class: type[nn.Module]) -> type[nn.Module]:
    """Returns a subclass of the same name whose calls are checkpointed."""

    def call(block: nn.Module, *arguments: Any, **options: Any) -> Any:
        return checkpoint(block, partial(block_class.__call__, block))(*arguments, **options)

    return type(block_class.__name__, (block_class,), {"__call__": call})
