"""Collects the steps between two rows of metrics."""

import time
from dataclasses import dataclass, field
from typing import Any

from mlx_ring.training import memory_manager
from mlx_ring.training.trainer import StepResult


@dataclass
class Interval:
    """The steps since the last row of metrics. A row's times and rates are means over these steps."""

    results: list[StepResult] = field(default_factory=list[StepResult])
    tokens_before: int = 0

    def row(self, global_batch_size: int, world_size: int) -> dict[str, Any]:
        """Makes a `train` row from the steps and begins the next interval. There must be at least one step.

        Args:
            global_batch_size: samples in one step, over all ranks.
            world_size: the number of ranks.

        Returns: the row's fields. Times are in seconds, sizes in bytes, rates per second.
        """
        last = self.results[-1]
        count = len(self.results)

        def mean(name: str) -> float:
            return sum(getattr(result, name) for result in self.results) / count

        step_seconds = mean("step_seconds")
        tokens = (last.tokens - self.tokens_before) / count
        row = {
            "step": last.step,
            "samples": last.samples,
            "tokens": last.tokens,
            "loss": last.loss,
            "learning_rate": last.learning_rate,
            "gradient_norm": last.gradient_norm,
            "step_seconds": step_seconds,
            "compute_seconds": mean("compute_seconds"),
            "communication_seconds": mean("communication_seconds"),
            "data_seconds": mean("data_seconds"),
            "samples_per_second": global_batch_size / step_seconds,
            "tokens_per_second": tokens / step_seconds,
            "peak_memory_bytes": memory_manager.peak_bytes(),
            "world_size": world_size,
            "wire_bytes": last.wire_bytes,
            "wall_time": time.time(),
        }
        self.results = []
        self.tokens_before = last.tokens
        return row
