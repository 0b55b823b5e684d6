"""Tells what this process computes with: the device, the BLAS, and the installed MLX; refuses an old MLX."""

import re
import socket
import sys
from functools import cache

import mlx.core as mx
from threadpoolctl import threadpool_info

from mlx_ring.errors import ConfigError

MLX_VERSION: str = mx.__version__  # pyright: ignore[reportAttributeAccessIssue]
MINIMUM_MLX = "0.32.4"  # earlier versions wait for ever when a peer is lost


def refuse_old_mlx() -> None:
    """Checks MLX's version. Raises: ConfigError if the installed MLX is older than MINIMUM_MLX."""

    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)[:3]]

    if numbers(MLX_VERSION) < numbers(MINIMUM_MLX):
        raise ConfigError(
            f"MLX {MLX_VERSION} on {socket.gethostname()} is older than the {MINIMUM_MLX} that mlx_ring "
            f'needs; install it: pip install "mlx>={MINIMUM_MLX}"'
        )


def device() -> str:
    """Returns the device that computes, for example `gpu NVIDIA H200`."""
    found = mx.default_device()
    name = mx.device_info(found).get("device_name", "")
    return f"{'gpu' if found == mx.gpu else 'cpu'} {name}".strip()


@cache  # cached: every checkpoint names the machine
def describe_machine() -> str:
    """Returns a text of everything that decides how this process rounds: chip, BLAS and its threads, MLX."""
    return f"{device()}, {_blas()}, MLX {MLX_VERSION}"


def _blas() -> str:
    """Returns the BLAS of MLX's matrix products. NumPy's wheel brings another one, which is left out."""
    if mx.default_device() == mx.gpu:
        return "its own kernels"
    if sys.platform == "darwin":
        return "Accelerate"
    found = [library for library in threadpool_info() if "numpy.libs" not in library["filepath"]]
    for library in found:
        if library["user_api"] == "blas":
            name, version = library["internal_api"], library["version"]
            kernels, threads = library.get("architecture", "one kernel"), library["num_threads"]
            return f"{name} {version} ({kernels}, {threads} thread{'s' if threads > 1 else ''})"
    return "the BLAS of MLX's wheel"
