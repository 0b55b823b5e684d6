"""Where metrics go: plain dictionaries in, files and screens out.

`console` prints rows or draws a live view, `jsonl` appends to metrics.jsonl, `tensorboard` writes event
files. Sinks do not know one another; `MetricsTracker` hands every row to each.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

__all__ = ["Row", "Value", "finished_steps"]

Value: TypeAlias = "float | int | str | bool | Sequence[Value] | Mapping[str, Value] | None"
Row: TypeAlias = Mapping[str, Value]


def finished_steps(row: Row) -> int:
    """The number of finished updates when the row was made; 0 if it does not say."""
    step = row.get("step")
    return step if isinstance(step, int) else 0
