"""Where samples come from, in which order they are drawn, and how they reach a rank. Everything here is
NumPy; only `manager` loads MLX.

`dataset` says what a data set of your own must provide. `sources` opens the data of every `data=` choice:
`images`, `synthetic`, and `tokens`, which `text` makes with `documents` and `bpe`. `sampler` gives the order
of samples as a pure function of seed and position. `loader` prepares global batches ahead of the trainer.
`manager` makes every host have the same data. Sources, sampler and loader take `rank` and `world_size`, or
what follows from them, as integers; they know no communicator.
"""

from mlx_ring.cluster.rank.progress import report_progress
from mlx_ring.data.dataset import Dataset, DataSpec, Split
from mlx_ring.data.loader import GlobalBatch, Loader
from mlx_ring.data.sampler import sample_order

__all__ = ["DataSpec", "Dataset", "GlobalBatch", "Loader", "Split", "report_progress", "sample_order"]
