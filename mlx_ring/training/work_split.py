"""Which micro-batches of a global batch each rank computes: equally many, or as many as its speed allows."""

import heapq
import statistics
from itertools import accumulate, pairwise

from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import ConfigError, agreed

WINDOW = 8  # a rank's speed is the median over this many steps
LEAST_GAIN = 0.1  # of the time that a step computes; a smaller gain is within the noise of the measurement


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Refuses a number of ranks that the configuration does not allow.

    Raises:
        ConfigError: the number is not the one asked for, or there are more ranks than micro-batches; the
            same on every rank.
    """
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


def split_evenly(num_micro_batches: int, world_size: int) -> list[int]:
    """The number of micro-batches of each rank: at least one, and as even as possible."""
    bounds = [rank * num_micro_batches // world_size for rank in range(world_size + 1)]
    return [stop - start for start, stop in pairwise(bounds)]


def split_by_speed(num_micro_batches: int, seconds: list[float]) -> list[int]:
    """The number of micro-batches of each rank, at least one: the slowest rank ends as early as possible.

    Each micro-batch goes to the rank that would finish it first. For equal jobs on machines of fixed speeds
    no other split is faster.

    Args:
        num_micro_batches: those of a global batch.
        seconds: how long each rank takes for one micro-batch.
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
    """The split of one run, the same on every rank. A rank's micro-batches are contiguous, in rank order.

    A measured split follows the ranks' speeds. It decides from figures that are the same on every rank, so
    all find the same split with no further message. With `communicator.overlap`, what is computed while
    buckets travel counts as waiting: the seconds are shorter, alike on all ranks.

    Attributes:
        counts: the number of micro-batches of each rank.
        measures: whether the split follows the ranks' speeds.
    """

    def __init__(self, num_micro_batches: int, world_size: int, *, measured: bool) -> None:
        assert 1 <= world_size <= num_micro_batches, (world_size, num_micro_batches)
        self.counts = split_evenly(num_micro_batches, world_size)
        self.measures = measured and world_size > 1
        self._num_micro_batches = num_micro_batches
        self._window: list[list[float]] = []

    def micro_batches_of(self, rank: int) -> range:
        """The indices, in a global batch, of the micro-batches of one rank."""
        bounds = [0, *accumulate(self.counts)]
        return range(bounds[rank], bounds[rank + 1])

    def rebalance(self, seconds: list[float]) -> list[float] | None:
        """Takes the ranks' times of one step. Splits again if several steps show that it pays.

        Args:
            seconds: how long each rank took for one micro-batch; 0 if it does not know yet.

        Returns: if the split has changed, the typical seconds of each rank, which are the reason; else None.
        """
        if not self.measures or min(seconds) <= 0:
            return None
        self._window.append(seconds)
        if len(self._window) < WINDOW:
            return None
        typical = [statistics.median(each) for each in zip(*self._window, strict=True)]
        self._window = []
        new_counts = split_by_speed(self._num_micro_batches, typical)
        if _step_seconds(typical, new_counts) > (1 - LEAST_GAIN) * _step_seconds(typical, self.counts):
            return None
        self.counts = new_counts
        return typical


def _step_seconds(seconds_per_micro_batch: list[float], counts: list[int]) -> float:
    """How long the slowest rank computes."""
    return max(seconds * count for seconds, count in zip(seconds_per_micro_batch, counts, strict=True))
