"""Samples that are computed from (seed, index): nothing is stored, and every machine computes the same bits.

Only integers and correctly rounded float operations are used, because libraries round logarithms and cosines
differently.
"""

import hashlib
from dataclasses import astuple, dataclass

import numpy as np

from mlx_ring.config.choices import SyntheticData
from mlx_ring.data.dataset import Dataset, DataSpec, Split
from mlx_ring.data.sampler import mix

JUMP_PERCENT = 10  # share of the tokens that do not follow the rule


def _random_bits(seed: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Returns uint64 (B, count): a row of random bits for each index."""
    rows = mix(mix(indices.astype(np.uint64)) ^ mix(np.array([seed], np.uint64)))
    return mix(rows[:, np.newaxis] + np.arange(1, count + 1, dtype=np.uint64))


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Returns float32 numbers in [−1, 1), made from the upper 24 of 64 random bits."""
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)


@dataclass(frozen=True, kw_only=True)
class TokenWalks:
    """Walks round the vocabulary: each token is the last plus a fixed stride or, one time in ten, random."""

    seed: int
    first: int  # index of the first sample
    samples: int
    vocabulary_size: int
    sequence_length: int

    def __len__(self) -> int:
        return self.samples

    @property
    def stride(self) -> int:
        """The number that the rule adds to a token, modulo the size of the vocabulary."""
        return 1 + self.seed % (self.vocabulary_size - 1)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and the tokens after them, both int32 (B, sequence_length)."""
        bits = _random_bits(self.seed, indices + self.first, self.sequence_length + 1)
        anywhere = ((bits >> np.uint64(32)) % np.uint64(self.vocabulary_size)).astype(np.int64)
        jumps = bits % np.uint64(100) < JUMP_PERCENT
        jumps[:, 0] = True
        tokens = np.cumsum(np.where(jumps, anywhere, self.stride), axis=1) % self.vocabulary_size
        tokens = tokens.astype(np.int32)
        return tokens[:, :-1], tokens[:, 1:]


@dataclass(frozen=True, kw_only=True)
class NoisyCentres:
    """Samples with features in [−1, 1): the mean of the centre of their class and of noise, both uniform."""

    seed: int
    first: int  # index of the first sample
    samples: int
    features: int
    classes: int

    def __len__(self) -> int:
        return self.samples

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns features, float32 (B, features), and classes, int32 (B,)."""
        bits = _random_bits(self.seed, indices + self.first, self.features + 1)
        labels = ((bits[:, 0] >> np.uint64(32)) % np.uint64(self.classes)).astype(np.int32)
        # A centre is computed like a sample, from another seed, so any number of classes costs no memory.
        centres = _uniform(_random_bits(self.seed ^ (1 << 40), labels, self.features))
        return (centres + _uniform(bits[:, 1:])) / np.float32(2), labels


def open_synthetic(config: SyntheticData, *, seed: int, sequence_length: int | None) -> Dataset:
    """Opens synthetic data: tokens if there is a `sequence_length`, else features with classes.

    The held-out samples have the indices after the training samples.
    """

    def split(first: int, samples: int) -> Split:
        if sequence_length is None:
            return NoisyCentres(
                seed=seed, first=first, samples=samples, features=config.features, classes=config.classes
            )
        return TokenWalks(
            seed=seed,
            first=first,
            samples=samples,
            vocabulary_size=config.vocabulary_size,
            sequence_length=sequence_length,
        )

    if sequence_length is None:
        spec = DataSpec(kind="classifier", input_shape=(config.features,), num_classes=config.classes)
    else:
        spec = DataSpec(kind="language", input_shape=(sequence_length,), num_classes=config.vocabulary_size)
    content = repr((astuple(spec), seed, config.samples, config.held_out_samples))
    return Dataset(
        spec=spec,
        digest=hashlib.sha256(content.encode()).hexdigest(),
        train=split(0, config.samples),
        held_out=split(config.samples, config.held_out_samples),
    )
