"""Which micro-batches of a global batch each rank computes: evenly many, or as many as its speed allows."""

import heapq
import statistics
from itertools import accumulate, pairwise

from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import ConfigError, agreed

WINDOW = 8  # steps that a speed is the median of
LEAST_GAIN = 0.1  # of the time that a step computes; a smaller one is within the noise of the measurement


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Raises: ConfigError, the same on every rank, for another number of ranks than was asked for, or one
    that the micro-batches cannot be dealt to."""
    asked = config.cluster.ranks
    if asked is not None and asked != world_size:
        raise agreed(
            ConfigError(
                f"cluster.ranks={asked}, but {world_size} "
                f"{'rank was' if world_size == 1 else 'ranks were'} launched; "
                f"launch {asked} (mlx.launch -n {asked} train.py …), or leave cluster.ranks=null"
            )
        )
    micro_batches = config.trainer.num_micro_batches
    if world_size > micro_batches:
        raise agreed(
            ConfigError(
                f"{world_size} ranks cannot share {micro_batches} micro-batches "
                f"(trainer.global_batch_size={config.trainer.global_batch_size}, micro_batch_size="
                f"{config.trainer.micro_batch_size}): every rank needs one; lower the micro-batch "
                "or the ranks"
            )
        )


def deal_evenly(num_micro_batches: int, world_size: int) -> list[int]:
    """Micro-batches of each rank, one at least, as even as can be."""
    bounds = [rank * num_micro_batches // world_size for rank in range(world_size + 1)]
    return [stop - start for start, stop in pairwise(bounds)]


def deal_by_speed(num_micro_batches: int, seconds: list[float]) -> list[int]:
    """Micro-batches of each rank, one at least, such that the slowest rank ends as early as can be.

    `seconds` are those a rank takes for one micro-batch. Each micro-batch goes to the rank that would have
    ended it first; for equal jobs on machines of fixed speeds no other way is faster.
    """
    counts = [1] * len(seconds)
    ends = [(2 * each, rank) for rank, each in enumerate(seconds)]
    heapq.heapify(ends)
    for _ in range(num_micro_batches - len(seconds)):
        end, rank = heapq.heappop(ends)
        counts[rank] += 1
        heapq.heappush(ends, (end + seconds[rank], rank))
    return counts


class WorkSplit:
    """The split of one run, the same on every rank. Micro-batches of a rank are contiguous, in rank order.

    A measured split decides on what every rank was told alike, so that all come to the same with no further
    message. With `communicator.overlap` what is computed while buckets travel counts as waiting: the seconds
    come out shorter, alike on all ranks.
    """

    def __init__(self, num_micro_batches: int, world_size: int, *, measured: bool) -> None:
        assert 1 <= world_size <= num_micro_batches, (world_size, num_micro_batches)
        self.counts = deal_evenly(num_micro_batches, world_size)
        self._num_micro_batches, self.measures = num_micro_batches, measured and world_size > 1
        self._window: list[list[float]] = []

    def share(self, rank: int) -> range:
        """The micro-batches of one rank."""
        bounds = [0, *accumulate(self.counts)]
        return range(bounds[rank], bounds[rank + 1])

    def observe(self, seconds: list[float]) -> list[float] | None:
        """Note what each rank took for a micro-batch in one step; 0 where it does not know yet.

        Returns: where the ranks' micro-batches are dealt anew from now on, the seconds that tell why.
        """
        if not self.measures or min(seconds) <= 0:
            return None
        self._window.append(seconds)
        if len(self._window) < WINDOW:
            return None
        typical = [statistics.median(each) for each in zip(*self._window, strict=True)]
        self._window = []
        dealt = deal_by_speed(self._num_micro_batches, typical)
        now, then = (max(map(float.__mul__, typical, map(float, each))) for each in (self.counts, dealt))
        if then > (1 - LEAST_GAIN) * now:
            return None
        self.counts = dealt
        return typical
