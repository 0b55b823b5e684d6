"""What a data set must provide: a description for the model, and two splits whose samples have an index.

A function that returns a `Dataset` can be used with `data=custom data.import_path=package.module:function`.
Everything is NumPy. In the shapes below, B is the number of samples that are asked for.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from mlx_ring.errors import DataError


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Describes the samples to the model.

    Attributes:
        kind: "classifier" for samples with one target each, "language" for sequences of tokens.
        input_shape: the shape of one sample, without the batch: (features,) or (height, width, channels) for
            a classifier, (sequence_length,) for a language model.
        num_classes: the number of classes, or the size of the vocabulary. Targets are below it.
    """

    kind: str
    input_shape: tuple[int, ...]
    num_classes: int


class Split(Protocol):
    """The samples of one part of a data set. Any class with these two methods will do.

    Samples are asked for by index, in any order and any number of times, from a thread of the loader. The
    answer must depend on the indices alone: a random augmentation would make ranks and repeats differ.
    """

    def __len__(self) -> int:
        """Returns the number of samples."""
        ...

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns samples and their targets.

        Args:
            indices: int64 (B,), each in [0, len(self)); the samples come back in this order.

        Returns: (inputs, targets), depending on the kind of the data set:
            - classifier: inputs float32 (B, *input_shape); targets int32 (B,), or float32 (B,) for a loss of
              your own, such as a regression;
            - language: inputs int32 (B, sequence_length); targets int32 (B, sequence_length), each the token
              after the input at its place.

            A target of −1 is not counted in the loss.

        Raises: DataError, with the file's name, if a stored sample is damaged.
        """
        ...


class CheckedSplit:
    """A split whose integer targets are checked when they are drawn.

    MLX does not check them: it would read memory outside the logits for a target that is not a class.
    """

    def __init__(self, split: Split, num_classes: int) -> None:
        self._split = split
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self._split)

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Does what `Split.batch` does. Raises: DataError if an integer target is num_classes or more."""
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
    """A data set: samples to train on and samples to evaluate with.

    Attributes:
        spec: what both splits give.
        digest: a SHA-256 (hex) of the content and of how it is cut into samples. It must be equal on all
            hosts that hold the same data, wherever the files are: ranks with other digests refuse to train.
        train: the samples to train on; at least one global batch.
        held_out: the samples to evaluate with; at least one.
        bytes_per_target: the mean number of bytes of text that a held-out target stands for; a separator
            between documents counts as one byte. An evaluation needs it to report bits per byte. None if it
            is unknown.
    """

    spec: DataSpec
    digest: str
    train: Split
    held_out: Split
    bytes_per_target: float | None = None

    def checked(self) -> Self:
        """Returns the same data set, but every integer target is checked when it is drawn.

        Its splits raise DataError for a target that is not below the number of classes.
        """
        classes = self.spec.num_classes
        return replace(
            self, train=CheckedSplit(self.train, classes), held_out=CheckedSplit(self.held_out, classes)
        )
