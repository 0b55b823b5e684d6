"""The configuration, typed: one dataclass a group, with units and rules.

Defaults live in the YAML files under `conf/` alone. A dataclass whose values break a rule raises ConfigError
with the key, the rule and the value.
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
    steps: int  # updates in all, counted from step 0 also after a resume
    global_batch_size: int  # samples an update is made of, over all ranks
    micro_batch_size: int  # samples a rank computes at once; divides the global batch
    split: Split  # micro-batches are dealt to ranks evenly, or by the speed that each is measured to have
    loss: str  # cross_entropy, or package.module:function
    compute_dtype: DType  # forward and backward; the master weights stay float32
    clip_gradient_norm: float | None  # largest global L2 norm of the mean gradient
    max_skipped_batches: int  # non-finite batches in a row before the run stops
    compile: bool  # mx.compile the step

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
        """Micro-batches in a global batch, over all ranks."""
        return self.global_batch_size // self.micro_batch_size


@dataclass(kw_only=True)
class MemorySection(Section):
    group = "memory"
    limit_bytes: int | None  # MLX waits for memory above this
    cache_limit_bytes: int | None  # freed buffers kept for reuse
    wired_limit_bytes: int | None  # kept resident (macOS)
    activation_checkpointing: bool  # recompute each block in the backward pass
    issue_ahead: bool  # one rank, NCCL: issue a step before the last has ended; faster, more memory

    def __post_init__(self) -> None:
        self.at_least(0, "limit_bytes", "cache_limit_bytes", "wired_limit_bytes", unit=" bytes", or_null=True)


@dataclass(kw_only=True)
class CheckpointSection(Section):
    group = "checkpoint"
    every_steps: int | None  # null: never by steps; the last step is always saved
    every_seconds: float | None  # by rank 0's clock; null: never by time
    keep_last: int  # newest checkpoints kept
    keep_best: int  # besides these, those with the lowest evaluation loss, where saved at an evaluated step
    resume: str  # auto, never, or the path of a run or a checkpoint
    initialize_from: str | None  # weights only: a run, a checkpoint or a safetensors file
    copies: Copies  # every_host: one rank on each disk keeps checkpoints and record; rank_0: it alone
    max_failures: int  # saves in a row that may fail (a full disk) before the run stops

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
    every_steps: int | None  # null: only at the end
    micro_batch_size: int | None  # null: the trainer's
    only: bool  # evaluate a checkpoint and leave

    def __post_init__(self) -> None:
        self.at_least(1, "every_steps", "micro_batch_size", or_null=True)


@dataclass(kw_only=True)
class MetricsSection(Section):
    group = "metrics"
    log_every_steps: int  # steps between two rows, whose times and rates are means over them
    console: bool  # rows or a live view on standard output
    tensorboard: bool  # the same figures for TensorBoard

    def __post_init__(self) -> None:
        self.at_least(1, "log_every_steps")


@dataclass(kw_only=True)
class ClusterSection(Section):
    group = "cluster"
    ranks: int | None  # null, or the world size that this run must have
    hostfile: str | None  # of mlx-ring run, unless given there, and of a multirun's jobs
    backend: Backend  # of a multirun's jobs; elsewhere what the launcher must have prepared
    allow_public_addresses: bool  # the ring's traffic is neither encrypted nor signed

    def __post_init__(self) -> None:
        self.at_least(1, "ranks", or_null=True)
