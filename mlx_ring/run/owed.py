"""What a run that was stopped or killed left undone at the checkpoint from which it continues."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mlx_ring.run_directory.sinks.jsonl import EVALUATION_FIGURES, read_rows


@dataclass(frozen=True)
class Owed:
    """A checkpoint is saved before its weights are evaluated; the figures are added to its manifest later."""

    evaluation: bool = False  # it was due and was not done
    figures: dict[str, float] = field(default_factory=dict[str, float])  # done, but not added

    @classmethod
    def at(cls, manifest: dict[str, Any], rows: Path) -> Self:
        """Look at a checkpoint of the run whose record has these rows. For rank 0. Raises: OSError."""
        if manifest.get("evaluation") is not None or not manifest.get("evaluation_due"):
            return cls()
        for row in read_rows(rows) if rows.exists() else []:
            if row.get("kind") == "evaluation" and row.get("step") == manifest["step"]:
                figures = {name: row[name] for name in EVALUATION_FIGURES if row.get(name) is not None}
                return cls(figures=figures if math.isfinite(figures.get("loss", math.nan)) else {})
        return cls(evaluation=True)
