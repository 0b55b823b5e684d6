"""Prepares this rank's share of every global batch, in one thread, ahead of the trainer."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np

from mlx_ring.data.dataset import Split
from mlx_ring.data.sampler import sample_order
from mlx_ring.errors import DataError

DRAWN_AT_ONCE = 2048  # positions whose samples are drawn together, if the data set has that many


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's share of a global batch.

    Attributes:
        first_sample: the position of the global batch's first sample, counted from the start of the run.
        micro_batches: for each micro-batch of this rank: its index in the global batch, its inputs and its
            targets. `Split.batch` gives their shapes and dtypes.
    """

    first_sample: int
    micro_batches: list[tuple[int, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class _Drawn:
    """Samples that were drawn together."""

    first_sample: int  # of the first global batch
    micro_batches: range
    indices: np.ndarray  # int64 (global batches, samples of this rank)


class Loader(Iterator[GlobalBatch]):
    """Gives global batches without end, in the sampler's order. Its whole state is the integer `next_sample`.

    A thread makes the arrays. If it fails, `next` raises its error, and raises it again at every further
    call: no batch is ever skipped. Iteration ends when the loader is closed.

    Args:
        split: the samples.
        seed: decides the order.
        global_batch_size: samples in a global batch, over all ranks; a whole number of micro-batches.
        micro_batch_size: samples in a micro-batch.
        micro_batches: indices of the micro-batches, in each global batch, that this rank computes.
        next_sample: the position to start at, counted in samples from the start of the run.
        prefetch: global batches that are prepared ahead.

    Raises: DataError if the split is smaller than one global batch.
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
        self._drawn = _Drawn(0, range(0), np.empty((0, 0), np.int64))  # used by the thread alone
        self._ahead: deque[Future[GlobalBatch]] = deque()
        for batch in range(prefetch):
            self._prepare(next_sample + batch * global_batch_size)

    @property
    def next_sample(self) -> int:
        """The position after the last batch that was taken."""
        return self._next_sample

    def __next__(self) -> GlobalBatch:
        if not self._ahead:
            raise StopIteration
        batch = self._ahead[0].result()
        self._ahead.popleft()
        self._next_sample += self._global_batch_size
        self._prepare(self._next_sample + len(self._ahead) * self._global_batch_size)
        return batch

    def wait_for_first(self) -> None:
        """Waits until the next batch is made. If making it fails, `next` raises the error."""
        if self._ahead:
            self._ahead[0].exception()

    def deal(self, micro_batches: range) -> None:
        """Changes which micro-batches this rank gets, from the next batch on; prepares those batches anew."""
        self._micro_batches = micro_batches
        prepared = self._ahead
        self._ahead = deque()
        for batch, outdated in enumerate(prepared):
            outdated.cancel()
            self._prepare(self._next_sample + batch * self._global_batch_size)

    def close(self) -> None:
        """Ends the thread and drops what it prepared. Can be called again."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _draw(self, first_sample: int, micro_batches: range) -> np.ndarray:
        """Returns this rank's samples of the next global batches, int64, one batch in each row.

        Drawn together, small batches cost a tenth of what they cost one by one.
        """
        own = len(micro_batches) * self._micro_batch_size
        batches = max(1, min(DRAWN_AT_ONCE, len(self._split)) // own)
        firsts = first_sample + np.arange(batches) * self._global_batch_size
        offsets = micro_batches.start * self._micro_batch_size + np.arange(own)
        order = sample_order(self._seed, np.add.outer(firsts, offsets).reshape(-1), len(self._split))
        return order.reshape(batches, own)

    def _prepare(self, first_sample: int) -> None:
        """Has the thread make the global batch that begins at this position."""
        self._ahead.append(self._thread.submit(self._share, first_sample, self._micro_batches))

    def _share(self, first_sample: int, micro_batches: range) -> GlobalBatch:
        """Makes this rank's share of one global batch. Runs in the thread."""
        drawn = self._drawn
        row = (first_sample - drawn.first_sample) // self._global_batch_size
        if micro_batches != drawn.micro_batches or not 0 <= row < len(drawn.indices):
            row = 0
            drawn = _Drawn(first_sample, micro_batches, self._draw(first_sample, micro_batches))
            self._drawn = drawn
        indices = drawn.indices[row].reshape(len(micro_batches), self._micro_batch_size)
        return GlobalBatch(
            first_sample,
            [(index, *self._split.batch(own)) for index, own in zip(micro_batches, indices, strict=True)],
        )
