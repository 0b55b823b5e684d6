"""What a run leaves on disk, read and written without MLX.

`directory` is the folder as a whole and `lock` keeps a second run out of it; `status` is status.json;
`checkpoint_files` and `manifest` are the checkpoints' files; `metrics_tracker` hands rows of metrics to the
`sinks`; `whole_file` writes a file so that no reader meets a part of it. A reader of finished runs needs
nothing but this room.

Import `RunDirectory` from `directory` and the functions for checkpoints from `checkpoint_files`: they load
NumPy, and an agent's start should not wait for that.
"""

from mlx_ring.run_directory.lock import ProcessLock
from mlx_ring.run_directory.status import RunStatus

__all__ = ["ProcessLock", "RunStatus"]
