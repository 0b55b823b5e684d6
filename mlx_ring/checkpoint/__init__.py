"""Saving, restoring, and copies on every host.

`saved_state` says what a checkpoint holds. `manager` writes one in the background, so that a directory of its
name is always complete; `restore` finds the one to continue from and fills model, optimizer and strategy.
`copies` keeps checkpoints and the run's record on every disk: `choose_newest` brings the newest to all disks
at the start, `disk_copy` writes one disk's, `file_transfer` sends files from rank to rank, `shared_disks`
finds out which ranks share a disk.

The files themselves are read and written by `run_directory.checkpoint_files`, which needs no MLX.
"""

from mlx_ring.checkpoint.copies import Copies
from mlx_ring.checkpoint.manager import CheckpointManager
from mlx_ring.checkpoint.restore import Found, fill, find
from mlx_ring.checkpoint.saved_state import SavedArrays, SavedState

__all__ = ["CheckpointManager", "Copies", "Found", "SavedArrays", "SavedState", "fill", "find"]
