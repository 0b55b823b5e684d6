"""The configuration, typed: one dataclass a group, filled from the YAML files under `conf/`.

Defaults live in YAML alone; here are the types, the units and the rules. Only this file (and the launcher)
knows OmegaConf: the rest of the program sees plain dataclasses.
"""

import difflib
import math
import re
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from mlx_ring.errors import ConfigError, MlxRingError

SECRET_WORDS = {"token", "key", "secret", "password", "passwd", "passphrase", "credential", "auth"}

# What a resumed run may change; data.path may move as long as the data's digest stays.
RESUMABLE = (
    "trainer.steps", "trainer.split", "run.", "cluster.", "metrics.", "checkpoint.", "evaluation.", "memory.",
    "communicator.backend", "communicator.overlap", "communicator.bucket_bytes", "data.path",
)  # fmt: skip
CONTAINERS = {ListConfig: (list, "a list: [1,2]"), DictConfig: (dict, "a group of values: {name:value}")}
HOST_KEYS = {"data.path", "data.cache_dir", "cluster.hostfile", "metrics.console", "run.dir"}


def _require(accepted: bool, key: str, value: object, rule: str) -> None:
    if not accepted:
        raise ConfigError(f"{key} must be {rule}; got {value}")


def _positive(key: str, value: float) -> None:
    _require(math.isfinite(value) and value > 0, key, value, "a finite number above 0")


def _fraction(key: str, value: float) -> None:
    _require(0 <= value < 1, key, value, "in [0, 1)")


Split = Enum("Split", ["even"])
DType = Enum("DType", ["float32", "bfloat16"])
Backend = Enum("Backend", ["auto", "ring", "mpi", "nccl", "jaccl"])
Copies = Enum("Copies", ["rank_0"])
Scaling = Enum("Scaling", ["none", "linear", "sqrt"])
Tokenizer = Enum("Tokenizer", ["bytes", "bpe"])
Size = Enum("Size", ["tiny", "small", "gpt2_124m"])
Kind = Enum("Kind", ["classifier", "language"])


@dataclass(kw_only=True)
class RunSection:
    dir: str  # the run's directory, relative to where the command was typed

    def __post_init__(self) -> None:
        name = Path(self.dir).name
        good = "\0" not in self.dir and 0 < len(name) <= 200
        _require(
            good, "run.dir", repr(self.dir[:60]), "a path whose last part has 1 to 200 characters and no NUL"
        )


@dataclass(kw_only=True)
class TrainerSection:
    steps: int  # updates in all, counted from step 0 also after a resume
    global_batch_size: int  # samples an update is made of, over all ranks
    micro_batch_size: int  # samples a rank computes at once; divides the global batch
    split: Split  # how micro-batches are dealt to ranks
    loss: str  # cross_entropy, or package.module:function
    compute_dtype: DType  # forward and backward; the master weights stay float32
    clip_gradient_norm: float | None  # largest global L2 norm of the mean gradient
    max_skipped_batches: int  # non-finite batches in a row before the run stops
    compile: bool  # mx.compile the step

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "trainer.steps", self.steps, "at least 1")
        for key in ("global_batch_size", "micro_batch_size"):
            _require(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "at least 1 sample")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                "trainer.global_batch_size must be a whole number of micro-batches; got "
                f"{self.global_batch_size} "
                f"samples with trainer.micro_batch_size={self.micro_batch_size}"
            )
        if self.clip_gradient_norm is not None:
            _positive("trainer.clip_gradient_norm", self.clip_gradient_norm)
        _require(
            self.max_skipped_batches >= 1,
            "trainer.max_skipped_batches",
            self.max_skipped_batches,
            "at least 1",
        )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in a global batch, over all ranks."""
        return self.global_batch_size // self.micro_batch_size


@dataclass(kw_only=True)
class MLPModel:
    name: str
    hidden_sizes: list[int]  # widths of the hidden layers
    dropout: float  # probability that an activation is dropped

    def __post_init__(self) -> None:
        _require(
            all(size >= 1 for size in self.hidden_sizes), "model.hidden_sizes", self.hidden_sizes, "positive"
        )
        _fraction("model.dropout", self.dropout)


@dataclass(kw_only=True)
class CNNModel:
    name: str
    channels: list[int]  # output channels of each stage; every stage halves the image
    hidden_size: int  # width of the layer before the classes
    dropout: float

    def __post_init__(self) -> None:
        good = len(self.channels) > 0 and all(size >= 1 for size in self.channels)
        _require(good, "model.channels", self.channels, "one or more positive numbers")
        _require(self.hidden_size >= 1, "model.hidden_size", self.hidden_size, "at least 1")
        _fraction("model.dropout", self.dropout)


TRANSFORMER_SIZES: dict[Size, dict[str, int]] = {
    Size["tiny"]: {
        "layers": 2, "dimensions": 96, "heads": 4, "kv_heads": 2, "hidden_dimensions": 256,
        "max_sequence_length": 64,
    },
    Size["small"]: {
        "layers": 6, "dimensions": 384, "heads": 6, "kv_heads": 6, "hidden_dimensions": 1024,
        "max_sequence_length": 256,
    },
    Size["gpt2_124m"]: {
        "layers": 12, "dimensions": 768, "heads": 12, "kv_heads": 12, "hidden_dimensions": 2048,
        "max_sequence_length": 1024,
    },
}  # fmt: skip


@dataclass(kw_only=True)
class TransformerModel:
    name: str
    size: Size  # fills every dimension left null below
    layers: int | None
    dimensions: int | None  # width of the residual stream
    heads: int | None  # query heads
    kv_heads: int | None  # key and value heads; divides heads
    hidden_dimensions: int | None  # width of the SwiGLU layer
    max_sequence_length: int | None  # positions
    tie_head: bool  # the output head shares the embedding's weights
    dropout: float
    rope_base: float  # base of the rotary frequencies

    def __post_init__(self) -> None:
        for key, preset in TRANSFORMER_SIZES[self.size].items():
            value = getattr(self, key)
            setattr(self, key, preset if value is None else value)
            _require(getattr(self, key) >= 1, f"model.{key}", value, "at least 1")
        assert self.dimensions and self.heads and self.kv_heads
        per_head = self.dimensions // self.heads
        good = self.dimensions % self.heads == 0 and per_head % 2 == 0
        _require(good, "model.dimensions", self.dimensions, f"an even multiple of model.heads={self.heads}")
        _require(
            self.heads % self.kv_heads == 0,
            "model.kv_heads",
            self.kv_heads,
            f"a divisor of heads={self.heads}",
        )
        _fraction("model.dropout", self.dropout)
        _positive("model.rope_base", self.rope_base)


def _import_path(key: str, value: str) -> None:
    good = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value) is not None
    _require(good, key, repr(value), "of the form package.module:name")


@dataclass(kw_only=True)
class CustomModel:
    name: str
    import_path: str  # package.module:name of a callable(arguments…, data_spec=DataSpec) -> nn.Module
    kind: Kind  # what the model reads: feature or image samples, or token sequences
    arguments: dict[str, Any] | None  # keyword arguments of that callable

    def __post_init__(self) -> None:
        _import_path("model.import_path", self.import_path)


@dataclass(kw_only=True)
class BundledData:
    name: str
    prefetch: int  # global batches prepared ahead of the trainer

    def __post_init__(self) -> None:
        _require(self.prefetch >= 1, "data.prefetch", self.prefetch, "at least 1")


@dataclass(kw_only=True)
class FashionMNISTData(BundledData):
    path: str | None  # folder of the four IDX files; null looks for the Debian package
    distribute: bool  # rank 0 sends its files to the hosts that lack them
    cache_dir: str  # where received files are kept


@dataclass(kw_only=True)
class TokensData(BundledData):
    path: str  # a .bin token file with its .json beside it
    sequence_length: int | None  # tokens a sample is made of; null: as many as the model takes
    held_out_fraction: float  # last part of the tokens, kept for evaluation
    distribute: bool
    cache_dir: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length is not None:
            _require(
                self.sequence_length >= 1, "data.sequence_length", self.sequence_length, "at least 1 token"
            )
        good = 0 < self.held_out_fraction < 1
        _require(good, "data.held_out_fraction", self.held_out_fraction, "in (0, 1)")


@dataclass(kw_only=True)
class TextData(TokensData):
    pattern: str  # which files of a folder are read (a glob, ** for any depth)
    exclude: list[str]  # globs of files left out
    tokenizer: Tokenizer  # bytes: 256 tokens; bpe: trained once on this text
    vocabulary_size: int  # of the bpe tokenizer

    def __post_init__(self) -> None:
        super().__post_init__()
        good = 257 <= self.vocabulary_size <= 2**31
        _require(good, "data.vocabulary_size", self.vocabulary_size, "at least 257")


@dataclass(kw_only=True)
class SyntheticData(BundledData):
    samples: int  # training samples
    held_out_samples: int
    features: int  # of one sample, for a classifier
    classes: int
    vocabulary_size: int  # for a language model
    sequence_length: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("samples", "held_out_samples", "features"):
            _require(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "at least 1")
        for key in ("classes", "vocabulary_size"):
            _require(getattr(self, key) >= 2, f"data.{key}", getattr(self, key), "at least 2")
        if self.sequence_length is not None:
            _require(
                self.sequence_length >= 1, "data.sequence_length", self.sequence_length, "at least 1 token"
            )


@dataclass(kw_only=True)
class CustomData(BundledData):
    import_path: str  # package.module:name of a callable(arguments…) -> mlx_ring.data.sources.Dataset
    arguments: dict[str, Any] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _import_path("data.import_path", self.import_path)


@dataclass(kw_only=True)
class OptimizerSection:
    name: str
    learning_rate: float  # peak, at trainer.global_batch_size unless scaled below
    scale_learning_rate: Scaling  # by global_batch_size / reference_batch_size
    reference_batch_size: int  # samples
    weight_decay: float  # on matrices; never on norms and biases

    def __post_init__(self) -> None:
        _positive("optimizer.learning_rate", self.learning_rate)
        good = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        _require(good, "optimizer.weight_decay", self.weight_decay, "a finite number of at least 0")
        good = self.reference_batch_size >= 1
        _require(good, "optimizer.reference_batch_size", self.reference_batch_size, "at least 1 sample")


@dataclass(kw_only=True)
class AdamOptimizer(OptimizerSection):
    betas: list[float]
    eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(good, "optimizer.betas", self.betas, "two numbers in [0, 1)")
        _positive("optimizer.eps", self.eps)


@dataclass(kw_only=True)
class LionOptimizer(OptimizerSection):
    betas: list[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(good, "optimizer.betas", self.betas, "two numbers in [0, 1)")


@dataclass(kw_only=True)
class SGDOptimizer(OptimizerSection):
    momentum: float
    nesterov: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("optimizer.momentum", self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0; got 0")


@dataclass(kw_only=True)
class AdafactorOptimizer(OptimizerSection):
    decay_rate: float
    clip_threshold: float


@dataclass(kw_only=True)
class MuonOptimizer(OptimizerSection):
    momentum: float
    adam_learning_rate: float  # for vectors, embeddings and heads, which AdamW updates

    def __post_init__(self) -> None:
        super().__post_init__()
        _fraction("optimizer.momentum", self.momentum)
        _positive("optimizer.adam_learning_rate", self.adam_learning_rate)


@dataclass(kw_only=True)
class ConstantSchedule:
    name: str
    warmup_steps: int  # from 0 to the peak, linearly

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "at least 0")


@dataclass(kw_only=True)
class DecaySchedule(ConstantSchedule):
    final_fraction: float  # of the peak, reached at trainer.steps

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.final_fraction <= 1, "schedule.final_fraction", self.final_fraction, "in [0, 1]")


@dataclass(kw_only=True)
class WSDSchedule(DecaySchedule):
    decay_steps: (
        int | None
    )  # the last steps of the run, over which the rate falls linearly; null: a fifth of the run

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.decay_steps is None or self.decay_steps >= 1,
            "schedule.decay_steps",
            self.decay_steps,
            "at least 1",
        )


@dataclass(kw_only=True)
class StrategySection:
    name: str


@dataclass(kw_only=True)
class CommunicatorSection:
    name: str  # the codec: how a gradient travels
    backend: Backend
    bucket_bytes: int  # gradients are reduced in buckets of about this size
    overlap: bool  # reduce the last layers while the first are still in the backward pass

    def __post_init__(self) -> None:
        good = 4096 <= self.bucket_bytes <= 2**30
        _require(good, "communicator.bucket_bytes", self.bucket_bytes, "between 4096 and 1073741824 bytes")


@dataclass(kw_only=True)
class MemorySection:
    limit_bytes: int | None  # MLX waits for memory above this
    cache_limit_bytes: int | None  # freed buffers kept for reuse
    wired_limit_bytes: int | None  # kept resident (macOS)
    activation_checkpointing: bool  # recompute each block in the backward pass
    issue_ahead: bool  # one rank: issue a step before the last one has ended; faster, more memory at once

    def __post_init__(self) -> None:
        for key in ("limit_bytes", "cache_limit_bytes", "wired_limit_bytes"):
            value = getattr(self, key)
            _require(value is None or value >= 0, f"memory.{key}", value, "null or at least 0 bytes")


@dataclass(kw_only=True)
class CheckpointSection:
    every_steps: int | None  # null: never by steps; the last step is always saved
    every_seconds: float | None
    keep_last: int  # newest checkpoints kept
    keep_best: int  # besides these, those with the lowest evaluation loss
    resume: str  # auto, never, or the path of a run or a checkpoint
    initialize_from: str | None  # weights only: a run, a checkpoint or a safetensors file
    copies: Copies  # which ranks keep a copy
    max_failures: int  # saves in a row that may fail (a full disk) before the run stops

    def __post_init__(self) -> None:
        for key in ("every_steps", "every_seconds"):
            value = getattr(self, key)
            _require(value is None or value > 0, f"checkpoint.{key}", value, "null or above 0")
        _require(
            self.keep_last >= 1,
            "checkpoint.keep_last",
            self.keep_last,
            "at least 1: resuming needs the newest",
        )
        _require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "at least 0")
        _require(self.max_failures >= 1, "checkpoint.max_failures", self.max_failures, "at least 1")


@dataclass(kw_only=True)
class EvaluationSection:
    every_steps: int | None  # null: only at the end
    micro_batch_size: int | None  # null: the trainer's
    only: bool  # evaluate a checkpoint and leave

    def __post_init__(self) -> None:
        for key in ("every_steps", "micro_batch_size"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"evaluation.{key}", value, "null or at least 1")


@dataclass(kw_only=True)
class MetricsSection:
    log_every_steps: int
    console: bool
    tensorboard: bool

    def __post_init__(self) -> None:
        _require(self.log_every_steps >= 1, "metrics.log_every_steps", self.log_every_steps, "at least 1")


@dataclass(kw_only=True)
class ClusterSection:
    ranks: int | None  # null, or the world size that this run must have
    hostfile: str | None
    backend: Backend
    allow_public_addresses: bool  # the ring's traffic is neither encrypted nor signed

    def __post_init__(self) -> None:
        _require(self.ranks is None or self.ranks >= 1, "cluster.ranks", self.ranks, "null or at least 1")


SECTIONS: dict[str, type] = {
    "run": RunSection, "trainer": TrainerSection, "memory": MemorySection, "checkpoint": CheckpointSection,
    "evaluation": EvaluationSection, "metrics": MetricsSection, "cluster": ClusterSection,
}  # fmt: skip
CHOICES: dict[str, dict[str, type]] = {
    "model": {"mlp": MLPModel, "cnn": CNNModel, "transformer": TransformerModel, "custom": CustomModel},
    "data": {
        "digits": BundledData, "fashion_mnist": FashionMNISTData, "text": TextData, "tokens": TokensData,
        "synthetic": SyntheticData, "custom": CustomData,
    },
    "optimizer": {
        "adamw": AdamOptimizer, "sgd": SGDOptimizer, "lion": LionOptimizer, "adafactor": AdafactorOptimizer,
        "muon": MuonOptimizer,
    },
    "schedule": {
        "constant": ConstantSchedule, "cosine": DecaySchedule, "linear": DecaySchedule, "wsd": WSDSchedule,
    },
    "strategy": {"all_reduce": StrategySection},
    "communicator": {"native": CommunicatorSection, "bf16": CommunicatorSection},
}  # fmt: skip


@dataclass(kw_only=True)
class RunConfig:
    """A whole run. `record` is what goes on disk: look-ups unresolved, secrets redacted."""

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
    record: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """What the model reads: samples with classes, or token sequences."""
        if self.model.name == "custom":
            return self.model.kind
        return Kind["language" if self.model.name == "transformer" else "classifier"]

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key, but for what may differ between hosts. Secrets are not among
        them."""
        plain = asdict(self)
        del plain["record"]
        return {
            key: value.name if isinstance(value, Enum) else value
            for key, value in flatten(plain).items()
            if key not in HOST_KEYS and not _secret(key)
        }

    @staticmethod
    def parse(composed: DictConfig) -> "RunConfig":
        """Check and convert a composed configuration.

        Raises: ConfigError naming the key, the value and the rule.
        """
        _refuse_targets(composed)
        known = {*SECTIONS, *CHOICES, "seed"}
        for key in composed:
            if str(key) not in known:
                raise ConfigError(f"unknown configuration key {key}; {_nearest(str(key), known)}")
        if missing := sorted(known - {str(key) for key in composed}):
            raise ConfigError(f"{missing[0]} is missing from the configuration; it cannot be left out")
        try:
            values = {key: _section(composed, key) for key in known - {"seed"}}
            seed = composed["seed"]
        except OmegaConfBaseException as error:
            raise explain(error) from error
        _require(type(seed) is int and 0 <= seed < 2**32, "seed", seed, "an integer in [0, 2**32)")
        config = RunConfig(seed=seed, record=record(composed), **values)
        if config.schedule.warmup_steps >= config.trainer.steps:
            rule = f"below trainer.steps={config.trainer.steps}"
            _require(False, "schedule.warmup_steps", config.schedule.warmup_steps, rule)
        return config


def _section(composed: DictConfig, key: str) -> Any:
    node = composed[key]
    if not isinstance(node, DictConfig):
        raise ConfigError(f"{key} must be a group of values; got {node!r}")
    schema = SECTIONS.get(key)
    if schema is None:
        name = node["name"] if "name" in node else None  # noqa: SIM401 - get() raises where it is ???
        if name not in CHOICES[key]:
            raise ConfigError(f"{key}.name is {name!r}; known: {', '.join(CHOICES[key])}")
        schema = CHOICES[key][name]
    unknown = sorted(str(field) for field in set(node) - {field.name for field in fields(schema)})
    if unknown:
        names = {f"{key}.{field.name}" for field in fields(schema)}
        raise ConfigError(
            f"unknown configuration key {key}.{unknown[0]}; {_nearest(f'{key}.{unknown[0]}', names)}"
        )
    # A container of the whole, so that error messages and interpolations see full key names.
    whole = OmegaConf.create({})
    whole._set_parent(composed)  # pyright: ignore[reportPrivateUsage]
    resolved: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    typed = OmegaConf.create({key: OmegaConf.structured(schema)})
    for name, value in resolved.items():
        field = typed[key]._get_node(name)
        wanted, what = CONTAINERS.get(type(field), (object, ""))
        accepted = isinstance(value, wanted) or (value is None and field._is_optional())
        _require(accepted, f"{key}.{name}", value, what)
    return OmegaConf.to_object(OmegaConf.merge(typed, {key: resolved}))[key]  # type: ignore[index]


def _refuse_targets(node: Any, path: str = "") -> None:
    """`_target_` would let a file name any callable; objects are built from short names instead."""
    if isinstance(node, DictConfig):
        for key in node:
            where = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                raise ConfigError(
                    f"{where} is refused: choose a model, data set or loss by its name or import_path"
                )
            _refuse_targets(node._get_node(key), where)  # pyright: ignore[reportPrivateUsage]
    elif isinstance(node, ListConfig) and not node._is_none() and not node._is_missing():  # pyright: ignore[reportPrivateUsage]
        for index, item in enumerate(node._iter_ex(resolve=False)):  # pyright: ignore[reportPrivateUsage]
            _refuse_targets(item, f"{path}[{index}]")


def _nearest(key: str, known: set[str]) -> str:
    """What was meant: the same name in another group, a similar one in this group, a similar whole; else the
    choice."""
    group, _, name = key.rpartition(".")
    siblings = {
        other.rpartition(".")[2]: other for other in sorted(known) if other.rpartition(".")[0] == group
    }
    meant = [other for other in sorted(known) if other.endswith(f".{name}")]
    meant += [siblings[near] for near in difflib.get_close_matches(name, siblings, n=1)]
    if not siblings:
        meant += difflib.get_close_matches(key, known, n=1)
        siblings = {other: other for other in sorted(known) if "." not in other}
    return f"did you mean {meant[0]}?" if meant else f"known: {', '.join(siblings.values())}"


def _all_keys(node: Any, path: str = "") -> set[str]:
    if not isinstance(node, DictConfig) or node._is_missing() or node._is_none():  # pyright: ignore[reportPrivateUsage]
        return {path} if path else set()
    keys: set[str] = {path} if path else set()
    for key in node:
        keys |= _all_keys(node._get_node(key), f"{path}.{key}" if path else str(key))  # pyright: ignore[reportPrivateUsage]
    return keys


def nearest_key(key: str, composed: DictConfig) -> str:
    """A hint for a mistyped key, from the keys of a composed configuration."""
    return _nearest(key, {name for name in _all_keys(composed) if not name.startswith("hydra")})


def explain(error: BaseException) -> MlxRingError:
    """Turn OmegaConf's error into one line that names the key, or find our own error inside it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MlxRingError):
            return cause
        cause = cause.__cause__ or cause.__context__
    key = str(getattr(error, "full_key", None) or "configuration")
    text = str(getattr(error, "msg", None) or error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{key} has no value; give it on the command line: {key}=…")
    if isinstance(error, InterpolationKeyError):
        return ConfigError(f"{key} refers to a key that does not exist: {first}")
    if isinstance(error, InterpolationResolutionError):
        loop = "; it refers to itself" if "recursion" in text.lower() else ""
        return ConfigError(f"{key} cannot be resolved: {first}{loop}")
    if isinstance(error, ConfigKeyError):
        return ConfigError(f"unknown configuration key {key}: {first}")
    return ConfigError(f"{key}: {first}")


def record(composed: DictConfig | ListConfig) -> Any:
    """The configuration as it goes on disk: interpolations unresolved, secret-like values redacted.

    A list may hold overrides (`key=value`): one that speaks of a secret loses its value.
    """

    def redact(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                str(key): "<redacted>" if _secret(str(key)) and value is not None else redact(value)
                for key, value in node.items()
            }
        if isinstance(node, list):
            return [redact(item) for item in node]
        if isinstance(node, str) and "=" in node and any(map(_secret, re.findall(r"([\w.]+)\s*[:=]", node))):
            return node.partition("=")[0] + "=<redacted>"
        return node

    return redact(OmegaConf.to_container(composed, resolve=False, enum_to_str=True))


def _secret(key: str) -> bool:
    """Whether a word of a key's last part (apiKey, hf_tokens) names a secret; `tokens` alone is data."""
    name = key.rpartition(".")[2]
    words = {word.lower().removesuffix("s") for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}
    return name != "tokens" and not words.isdisjoint(SECRET_WORDS)


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested dictionary by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        flat |= flatten(value, where) if isinstance(value, dict) and value else {where: value}
    return flat


def refuse_changes(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises: ConfigError for the first field that a resumed run may not change, with both values."""
    before, after = flatten(saved), flatten(now)
    for key in sorted(
        {*before, *after}, key=lambda key: (not key.endswith(".name"), key)
    ):  # another model first
        if key.startswith(RESUMABLE) or before.get(key) == after.get(key):
            continue
        raise ConfigError(
            f"{key} is {after.get(key)} now and was {before.get(key)} when the checkpoint was saved; a "
            "resumed run "
            "cannot change it: give the old value, or start a new run with checkpoint.initialize_from"
        )


def to_yaml(recorded: Any) -> str:
    """A record as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(recorded))
