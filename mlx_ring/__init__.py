"""mlx_ring: collective all-reduce training on MLX's native distributed layer.

Each folder is one component, and says at its top what it holds. From the top of the house to the ground:

- `train`, `cli`: the two programs, `train.py` and `mlx-ring`.
- `run`: one run from its start to its end, on one rank.
- `checkpoint`: saving, restoring, and copies on every host.
- `training`: the step and the loop around it, strategies, evaluation, exact mode.
- `data`: samples, their order, and how they reach a rank.
- `sweep`: many runs, each a whole distributed run.
- `communication`: the one wire between ranks.
- `cluster`: machines, and the processes on them.
- `models`: networks, their losses, and what a network must be.
- `run_directory`: what a run leaves on disk.
- `config`, `standard_streams`, `errors`: the typed configuration, printing that never fails, and every error.

A room imports from rooms below it, never from above.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("mlx-ring")
except PackageNotFoundError:  # run from a copied tree that was never installed
    __version__ = "0.1.0"
