"""The groups that every run has, such as `trainer`: one dataclass a group, with units and rules.

Default values are in the YAML files under `conf/` alone. A dataclass whose values break a rule raises
ConfigError with the key, the rule and the value. The comment behind a field is its text in the documentation.
"""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mlx_ring.config.choices import Backend
from mlx_ring.config.rules import Section, require
from mlx_ring.errors import ConfigError

Split = Enum("Split", ["even", "measured"])
DType = Enum("DType", ["float32", "bfloat16"])
Copies = Enum("Copies", ["rank_0", "every_host"])


@dataclass(kw_only=True)
class RunSection(Section):
    group = "run"
    dir: str  # the run's directory, relative to where the command was typed

    def __post_init__(self) -> None:
        good = "\0" not in self.dir and 0 < len(Path(self.dir).name) <= 200
        rule = "a path whose last part has 1 to 200 characters and no NUL"
        require(good, "run.dir", repr(self.dir[:60]), rule)


@dataclass(kw_only=True)
class TrainerSection(Section):
    group = "trainer"
    steps: int  # updates in total, counted from step 0 also after a resume
    global_batch_size: int  # samples in one update, over all ranks
    micro_batch_size: int  # samples that a rank computes at once; divides the global batch
    split: Split  # how micro-batches are dealt to ranks: evenly, or by the measured speed of each
    loss: str  # cross_entropy, or package.module:function
    compute_dtype: DType  # of the forward and backward pass; the master weights stay float32
    clip_gradient_norm: float | None  # largest global L2 norm of the mean gradient; null: no limit
    max_skipped_batches: int  # batches in a row with non-finite gradients before the run stops
    compile: bool  # compiles the step with mx.compile

    def __post_init__(self) -> None:
        self.at_least(1, "steps", "max_skipped_batches")
        self.at_least(1, "global_batch_size", "micro_batch_size", unit=" sample")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                "trainer.global_batch_size must be a whole number of micro-batches; got "
                f"{self.global_batch_size} samples with trainer.micro_batch_size={self.micro_batch_size}"
            )
        self.positive("clip_gradient_norm")
        if self.loss != "cross_entropy" and ":" not in self.loss:
            raise ConfigError(
                f"trainer.loss is {self.loss!r}; known: cross_entropy, or package.module:function"
            )

    @property
    def num_micro_batches(self) -> int:
        """The number of micro-batches in a global batch, over all ranks."""
        return self.global_batch_size // self.micro_batch_size


@dataclass(kw_only=True)
class MemorySection(Section):
    group = "memory"
    limit_bytes: int | None  # above this, MLX waits until memory is freed; null: MLX decides
    cache_limit_bytes: int | None  # freed memory that MLX keeps for reuse; null: MLX decides
    wired_limit_bytes: int | None  # memory that macOS keeps resident; null: macOS decides
    activation_checkpointing: bool  # saves memory: computes each block again in the backward pass
    issue_ahead: bool  # one rank or NCCL: starts a step before the last has ended; faster, more memory

    def __post_init__(self) -> None:
        self.at_least(0, "limit_bytes", "cache_limit_bytes", "wired_limit_bytes", unit=" bytes", or_null=True)


@dataclass(kw_only=True)
class CheckpointSection(Section):
    group = "checkpoint"
    every_steps: int | None  # steps between saves; null: no save by steps; the last step is always saved
    every_seconds: float | None  # seconds between saves, by rank 0's clock; null: no save by time
    keep_last: int  # number of newest checkpoints that are kept
    keep_best: int  # number kept besides these: those with the lowest evaluation loss
    resume: str  # auto, never, or the path of a run or of a checkpoint
    initialize_from: str | None  # takes weights only, from a run, a checkpoint or a safetensors file
    copies: Copies  # every_host: one copy on each disk; rank_0: one copy, on its disk
    max_failures: int  # failed saves in a row (a full disk) before the run stops

    def __post_init__(self) -> None:
        for field in ("every_steps", "every_seconds"):
            value = getattr(self, field)
            self.require(value is None or value > 0, field, "null or above 0")
        self.require(self.keep_last >= 1, "keep_last", "at least 1: resuming needs the newest")
        self.at_least(0, "keep_best")
        self.at_least(1, "max_failures")


@dataclass(kw_only=True)
class EvaluationSection(Section):
    group = "evaluation"
    every_steps: int | None  # steps between evaluations; null: only at the end
    micro_batch_size: int | None  # samples that a rank computes at once; null: as the trainer
    only: bool  # evaluates a checkpoint and trains nothing

    def __post_init__(self) -> None:
        self.at_least(1, "every_steps", "micro_batch_size", or_null=True)


@dataclass(kw_only=True)
class MetricsSection(Section):
    group = "metrics"
    log_every_steps: int  # steps between two rows; times and rates in a row are means over these steps
    console: bool  # shows rows or a live view on standard output
    tensorboard: bool  # writes the same figures for TensorBoard

    def __post_init__(self) -> None:
        self.at_least(1, "log_every_steps")


@dataclass(kw_only=True)
class ClusterSection(Section):
    group = "cluster"
    ranks: int | None  # the number of ranks that this run must have; null: any
    hostfile: str | None  # for mlx-ring run if none is given there, and for the jobs of a multirun
    backend: Backend  # for the jobs of a multirun; elsewhere, what the launcher must have prepared
    allow_public_addresses: bool  # lets the ring use them; its traffic is neither encrypted nor signed

    def __post_init__(self) -> None:
        self.at_least(1, "ranks", or_null=True)
