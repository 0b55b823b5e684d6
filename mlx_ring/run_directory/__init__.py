"""What a run leaves on disk, read and written without MLX.

`directory` is the folder as a whole and `lock` keeps a second run out of it; `status` is status.json;
`checkpoint_files` and `manifest` are the checkpoints' files; `metrics_tracker` hands rows of metrics to the
`sinks`. A reader of finished runs needs nothing but this room.
"""

from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.run_directory.lock import ProcessLock
from mlx_ring.run_directory.status import RunStatus

__all__ = ["ProcessLock", "RunDirectory", "RunStatus"]
