"""What every source of data gives: a specification for the model, and two indexable splits."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from mlx_ring.errors import DataError


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """What a model must fit.

    `kind` is "classifier" or "language". `input_shape` is of one sample: (height, width, channels),
    (features,), or (sequence_length,). `num_classes` is the number of classes, or the vocabulary's size.
    """

    kind: str
    input_shape: tuple[int, ...]
    num_classes: int


class Split(Protocol):
    """Samples that can be drawn by index, in any order, from any thread."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples at `indices` (B,), in that order.

        Returns (inputs, targets): for a classifier float32 (B, *input_shape) and int32 (B,)
        (or, with a loss of one's own, float32 (B,)); for a language
        model both int32 (B, sequence_length). A target of -1 is not counted. Depends on `indices` alone.

        Raises: DataError naming the file when a stored sample is damaged.
        """
        ...


class CheckedSplit:
    """A split whose integer targets are classes: MLX would read one beyond them as an address."""

    def __init__(self, split: Split, num_classes: int) -> None:
        self._split, self._num_classes = split, num_classes

    def __len__(self) -> int:
        return len(self._split)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Like `Split.batch`. Raises: DataError for a target that is no class."""
        inputs, targets = self._split.batch(indices)
        integers = np.issubdtype(targets.dtype, np.integer)
        if integers and (largest := int(targets.max(initial=0))) >= self._num_classes:
            raise DataError(
                f"the data set has the target {largest}, but {self._num_classes} classes (0 to "
                f"{self._num_classes - 1}); mend its targets, or its number of classes"
            )
        return inputs, targets


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and held-out samples of one specification.

    `digest` is a SHA-256 (hex) of what the data holds and how it is cut into samples: equal on all hosts that
    hold the same data, wherever their files lie. `bytes_per_target` is the mean number of text bytes that a
    held-out target stands for (a separator of documents counts as one); None where that is unknown.
    """

    spec: DataSpec
    digest: str
    train: Split
    held_out: Split
    bytes_per_target: float | None = None

    def checked(self) -> Self:
        """The same, but with every integer target held against the number of classes as it is drawn."""
        classes = self.spec.num_classes
        train, held_out = CheckedSplit(self.train, classes), CheckedSplit(self.held_out, classes)
        return replace(self, train=train, held_out=held_out)
