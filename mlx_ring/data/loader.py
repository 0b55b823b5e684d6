"""This rank's share of each successive global batch, prepared ahead by one thread."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np

from mlx_ring.data.dataset import Split
from mlx_ring.data.sampler import sample_order
from mlx_ring.errors import DataError

DRAWN_AT_ONCE = 2048  # positions, and not more than an epoch


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's share of a global batch.

    `first_sample` is the global position of the whole batch's first sample. `micro_batches` holds, of each
    micro-batch of this rank, its index in the global batch, its inputs and its targets (see `Split.batch`).
    """

    first_sample: int
    micro_batches: list[tuple[int, np.ndarray, np.ndarray]]


class Loader(Iterator[GlobalBatch]):
    """Draws global batches without end, in the sampler's order; its whole state is the integer `next_sample`.

    The arrays are NumPy's and are made in one thread; an error there is raised in the consumer, again at each
    attempt, so that no batch is ever passed over. Iteration ends once the loader is closed.

    Args:
        split: the samples.
        seed: of the order.
        global_batch_size: samples of a batch, over all ranks; a whole number of micro-batches.
        micro_batch_size: samples of a micro-batch.
        micro_batches: those of the global batch that this rank computes.
        next_sample: the global position to start at.
        prefetch: global batches prepared ahead.

    Raises: DataError when the split is smaller than one global batch.
    """

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        micro_batches: range,
        next_sample: int,
        prefetch: int,
    ) -> None:
        if len(split) < global_batch_size:
            raise DataError(
                f"the data set holds {len(split)} training samples, fewer than one global batch of "
                f"{global_batch_size}; lower trainer.global_batch_size or give more data"
            )
        self._split = split
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._micro_batches = micro_batches
        self._next_sample = next_sample
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data-loader")
        # The thread's own: the first sample, the micro-batches, and this rank's indices of each batch drawn.
        self._drawn = 0, range(0), np.empty((0, 0), np.int64)
        self._ahead: deque[Future[GlobalBatch]] = deque()
        for batch in range(prefetch):
            self._prepare(next_sample + batch * global_batch_size)

    @property
    def next_sample(self) -> int:
        """The global position after the last batch taken."""
        return self._next_sample

    def __next__(self) -> GlobalBatch:
        if not self._ahead:
            raise StopIteration
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._next_sample += self._global_batch_size
        self._prepare(self._next_sample + len(self._ahead) * self._global_batch_size)
        return batch

    def deal(self, micro_batches: range) -> None:
        """From the next batch on give these of each global batch; what was prepared of others is dropped."""
        self._micro_batches = micro_batches
        prepared, self._ahead = self._ahead, deque()
        for batch, old in enumerate(prepared):
            old.cancel()
            self._prepare(self._next_sample + batch * self._global_batch_size)

    def close(self) -> None:
        """Join the thread and drop what it prepared; more than once is fine."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _draw(self, first_sample: int, micro_batches: range) -> np.ndarray:
        """This rank's indices of the next global batches, a row each: drawn at once, a small batch costs a
        tenth of what it costs alone."""
        own = len(micro_batches) * self._micro_batch_size
        batches = max(1, min(DRAWN_AT_ONCE, len(self._split)) // own)
        firsts = first_sample + np.arange(batches) * self._global_batch_size
        offsets = micro_batches.start * self._micro_batch_size + np.arange(own)
        order = sample_order(self._seed, np.add.outer(firsts, offsets).reshape(-1), len(self._split))
        return order.reshape(batches, own)

    def _prepare(self, first_sample: int) -> None:
        self._ahead.append(self._thread.submit(self._share, first_sample, self._micro_batches))

    def _share(self, first_sample: int, micro_batches: range) -> GlobalBatch:
        first, drawn_for, drawn = self._drawn
        number = (first_sample - first) // self._global_batch_size
        if micro_batches != drawn_for or not 0 <= number < len(drawn):
            number, drawn = 0, self._draw(first_sample, micro_batches)
            self._drawn = first_sample, micro_batches, drawn
        rows = drawn[number].reshape(len(micro_batches), self._micro_batch_size)
        shares = zip(micro_batches, rows, strict=True)
        return GlobalBatch(first_sample, [(index, *self._split.batch(indices)) for index, indices in shares])
