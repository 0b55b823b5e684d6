"""Where samples come from, in which order they are drawn, and how they reach a rank. NumPy alone; MLX only
in `manager`.

`dataset` is what a data set of your own provides; `sources` opens each `data=` choice; `sampler` gives the
order of samples as a pure function of seed and position; `loader` prepares global batches ahead of the
trainer; `manager` makes every host have the same data. Sources, sampler and loader take `rank` and
`world_size` as integers and know no communicator.
"""

from mlx_ring.data.dataset import Dataset, DataSpec, Split
from mlx_ring.data.loader import GlobalBatch, Loader
from mlx_ring.data.sampler import sample_order

__all__ = ["DataSpec", "Dataset", "GlobalBatch", "Loader", "Split", "sample_order"]
