"""The groups of which one choice is made, such as `model=mlp`: one dataclass a choice, with units and rules.

The comment behind a field is its text in the documentation.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mlx_ring.config.rules import Section
from mlx_ring.errors import ConfigError

Backend = Enum("Backend", ["auto", "ring", "mpi", "nccl", "jaccl"])
Scaling = Enum("Scaling", ["none", "linear", "sqrt"])
Tokenizer = Enum("Tokenizer", ["bytes", "bpe"])
Size = Enum("Size", ["tiny", "small", "gpt2_124m"])
Kind = Enum("Kind", ["classifier", "language"])


class Model(Section):
    """Base of all models."""

    group = "model"


@dataclass(kw_only=True)
class MLPModel(Model):
    name: str
    hidden_sizes: list[int]  # widths of the hidden layers
    dropout: float  # probability that an activation is dropped

    def __post_init__(self) -> None:
        self.require(all(size >= 1 for size in self.hidden_sizes), "hidden_sizes", "positive")
        self.fraction("dropout")


@dataclass(kw_only=True)
class CNNModel(Model):
    name: str
    channels: list[int]  # output channels of each stage; every stage halves the image
    hidden_size: int  # width of the layer before the classes
    dropout: float

    def __post_init__(self) -> None:
        good = len(self.channels) > 0 and all(size >= 1 for size in self.channels)
        self.require(good, "channels", "one or more positive numbers")
        self.at_least(1, "hidden_size")
        self.fraction("dropout")


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
class TransformerModel(Model):
    name: str
    size: Size  # gives a value to every dimension below that is null
    layers: int | None  # number of blocks
    dimensions: int | None  # width of the residual stream
    heads: int | None  # number of query heads
    kv_heads: int | None  # number of key and value heads; divides heads
    hidden_dimensions: int | None  # width of the SwiGLU layer
    max_sequence_length: int | None  # longest sequence, in tokens
    tie_head: bool  # the output head shares the embedding's weights
    dropout: float
    rope_base: float  # base of the rotary frequencies

    def __post_init__(self) -> None:
        for field, preset in TRANSFORMER_SIZES[self.size].items():
            if getattr(self, field) is None:
                setattr(self, field, preset)
            self.at_least(1, field)
        assert self.dimensions and self.heads and self.kv_heads
        good = self.dimensions % (2 * self.heads) == 0
        self.require(good, "dimensions", f"an even multiple of model.heads={self.heads}")
        self.require(self.heads % self.kv_heads == 0, "kv_heads", f"a divisor of heads={self.heads}")
        self.fraction("dropout")
        self.positive("rope_base")


@dataclass(kw_only=True)
class CustomModel(Model):
    name: str
    import_path: str  # package.module:name of a callable(input_shape=, num_classes=, arguments…) -> nn.Module
    kind: Kind  # what the model reads: feature or image samples, or token sequences
    arguments: dict[str, Any] | None  # keyword arguments of that callable

    def __post_init__(self) -> None:
        self.importable("import_path")


@dataclass(kw_only=True)
class BundledData(Section):
    group = "data"
    name: str
    prefetch: int  # global batches that are prepared ahead of the trainer

    def __post_init__(self) -> None:
        self.at_least(1, "prefetch")


@dataclass(kw_only=True)
class FashionMNISTData(BundledData):
    path: str | None  # folder of the four IDX files; null: the folder of the Debian package
    distribute: bool  # rank 0 sends its files to the hosts that lack them
    cache_dir: str  # folder for files that are made or received here


@dataclass(kw_only=True)
class TokensData(BundledData):
    path: str  # a .bin file of tokens, with its .json beside it
    sequence_length: int | None  # tokens in a sample; null: as many as the model takes
    held_out_fraction: float  # part of the tokens, at the end, that is kept for evaluation
    distribute: bool
    cache_dir: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "sequence_length", unit=" token", or_null=True)
        self.require(0 < self.held_out_fraction < 1, "held_out_fraction", "in (0, 1)")


@dataclass(kw_only=True)
class TextData(TokensData):
    pattern: str  # which files of a folder are read (a glob, ** for any depth)
    exclude: list[str]  # files that are left out, as globs
    tokenizer: Tokenizer  # bytes: 256 tokens; bpe: a tokenizer that is trained once on this text
    vocabulary_size: int  # largest number of tokens of the bpe tokenizer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(257 <= self.vocabulary_size <= 2**31, "vocabulary_size", "at least 257")


@dataclass(kw_only=True)
class SyntheticData(BundledData):
    samples: int  # number of training samples
    held_out_samples: int  # number of samples that are kept for evaluation
    features: int  # numbers in a sample, for a classifier
    classes: int  # number of classes, for a classifier
    vocabulary_size: int  # number of different tokens, for a language model
    sequence_length: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "samples", "held_out_samples", "features")
        self.at_least(2, "classes", "vocabulary_size")
        self.at_least(1, "sequence_length", unit=" token", or_null=True)


@dataclass(kw_only=True)
class CustomData(BundledData):
    import_path: str  # package.module:name of a callable(arguments…) -> mlx_ring.data.sources.Dataset
    arguments: dict[str, Any] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.importable("import_path")


@dataclass(kw_only=True)
class OptimizerSection(Section):
    group = "optimizer"
    name: str
    learning_rate: float  # the peak; for reference_batch_size if it is scaled, else for the batch in use
    scale_learning_rate: Scaling  # multiplies by global_batch_size / reference_batch_size, or by its root
    reference_batch_size: int  # samples in the batch that learning_rate is meant for
    weight_decay: float  # acts on matrices only, never on norms and biases

    def __post_init__(self) -> None:
        self.positive("learning_rate")
        good = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        self.require(good, "weight_decay", "a finite number of at least 0")
        self.at_least(1, "reference_batch_size", unit=" sample")

    def betas_in_range(self, betas: list[float]) -> None:
        good = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        self.require(good, "betas", "two numbers in [0, 1)")


@dataclass(kw_only=True)
class AdamOptimizer(OptimizerSection):
    betas: list[float]  # decay of the mean gradient and of the mean square
    eps: float  # added to the denominator

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas_in_range(self.betas)
        self.positive("eps")


@dataclass(kw_only=True)
class LionOptimizer(OptimizerSection):
    betas: list[float]  # decay of the mean that makes the update, and of the mean that is kept

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas_in_range(self.betas)


@dataclass(kw_only=True)
class SGDOptimizer(OptimizerSection):
    momentum: float  # decay of the velocity
    nesterov: bool  # uses Nesterov's form of momentum

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fraction("momentum")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0; got 0")


@dataclass(kw_only=True)
class AdafactorOptimizer(OptimizerSection):
    decay_rate: float  # the mean square keeps 1 − step^decay_rate of its old value
    clip_threshold: float  # largest root mean square of an update, before the learning rate applies


@dataclass(kw_only=True)
class MuonOptimizer(OptimizerSection):
    momentum: float  # decay of the mean gradient
    adam_learning_rate: float  # of vectors, embeddings and heads, which AdamW updates

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fraction("momentum")
        self.positive("adam_learning_rate")


@dataclass(kw_only=True)
class ConstantSchedule(Section):
    group = "schedule"
    name: str
    warmup_steps: int  # steps in which the rate rises from 0 to its peak, in a straight line

    def __post_init__(self) -> None:
        self.at_least(0, "warmup_steps")


@dataclass(kw_only=True)
class DecaySchedule(ConstantSchedule):
    final_fraction: float  # the rate at trainer.steps, as a part of the peak

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.final_fraction <= 1, "final_fraction", "in [0, 1]")


@dataclass(kw_only=True)
class WSDSchedule(DecaySchedule):
    decay_steps: int | None  # last steps, in which the rate falls in a line; null: a fifth of the run

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "decay_steps", or_null=True)


@dataclass(kw_only=True)
class StrategySection:
    name: str


@dataclass(kw_only=True)
class CommunicatorSection(Section):
    group = "communicator"
    name: str  # the codec: in which form gradients travel
    backend: Backend  # what MLX sends with; auto takes what the launcher prepared
    bucket_bytes: int  # gradients are reduced in groups of about this size
    verify_every_steps: int | None  # steps between comparisons of replicas; null: before saves, evaluations
    overlap: bool  # reduces the last layers while the backward pass still computes the first

    def __post_init__(self) -> None:
        self.at_least(1, "verify_every_steps", or_null=True)
        good = 4096 <= self.bucket_bytes <= 2**30
        self.require(good, "bucket_bytes", "between 4096 and 1073741824 bytes")


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
    "communicator": dict.fromkeys(("native", "exact", "bf16"), CommunicatorSection),
}  # fmt: skip
