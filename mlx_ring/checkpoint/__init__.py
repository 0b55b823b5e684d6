"""Saving, restoring, and copies on every host.

`manager` writes a checkpoint in the background so that a directory of its name is always complete;
`restore` finds the one to continue from and fills model, optimizer and strategy with it. `copies` keeps
checkpoints and record on every disk, not on rank 0's alone: `choose_newest` brings the newest copy to rank
0 at the start, `disk_copy` writes one disk's, `file_transfer` sends files over the wire, `shared_disks`
finds out which ranks share a disk.

The files themselves are read and written by `run_directory.checkpoint_files`, which needs no MLX.
"""

from mlx_ring.checkpoint.copies import Copies
from mlx_ring.checkpoint.manager import CheckpointManager
from mlx_ring.checkpoint.restore import Found, fill, find

__all__ = ["CheckpointManager", "Copies", "Found", "fill", "find"]
