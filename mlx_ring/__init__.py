"""mlx_ring: collective all-reduce training on MLX's native distributed layer."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("mlx-ring")
except PackageNotFoundError:  # run from a copied tree that was never installed
    __version__ = "0.1.0"
