"""The configuration of a whole run, typed."""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from mlx_ring.config.choices import CommunicatorSection, Kind, StrategySection
from mlx_ring.config.redaction import flatten, is_secret
from mlx_ring.config.resume_rules import HOST_KEYS
from mlx_ring.config.sections import (
    CheckpointSection,
    ClusterSection,
    EvaluationSection,
    MemorySection,
    MetricsSection,
    RunSection,
    TrainerSection,
)

SECTIONS: dict[str, type] = {
    "run": RunSection, "trainer": TrainerSection, "memory": MemorySection, "checkpoint": CheckpointSection,
    "evaluation": EvaluationSection, "metrics": MetricsSection, "cluster": ClusterSection,
}  # fmt: skip


@dataclass(kw_only=True)
class RunConfig:
    """The configuration of a whole run.

    `model`, `data`, `optimizer` and `schedule` hold the dataclass of the choice that was made.
    `redacted` is the same configuration as plain dictionaries, as it is written to disk: look-ups are not
    resolved, and secrets are redacted.
    """

    seed: int
    run: RunSection
    trainer: TrainerSection
    model: Any
    data: Any
    optimizer: Any
    schedule: Any
    strategy: StrategySection
    communicator: CommunicatorSection
    memory: MemorySection
    checkpoint: CheckpointSection
    evaluation: EvaluationSection
    metrics: MetricsSection
    cluster: ClusterSection
    redacted: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """What the model reads: samples with classes, or sequences of tokens."""
        if self.model.name == "custom":
            return self.model.kind
        return Kind["language" if self.model.name == "transformer" else "classifier"]

    def flat(self) -> dict[str, Any]:
        """Returns values by dotted key, without secrets and without what may differ between hosts."""
        plain = asdict(self)
        del plain["redacted"]
        return {
            key: value.name if isinstance(value, Enum) else value
            for key, value in flatten(plain).items()
            if key not in HOST_KEYS and not is_secret(key, value)
        }
