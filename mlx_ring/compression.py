"""Gradient codecs: how a gradient travels.

A codec is three pure functions over dictionaries of arrays, so that they can be traced by `mx.compile`: `add`
collects one micro-batch's gradients into a total, `encode` gives what goes on the wire, and `decode` turns
the sum over ranks back into float32 gradients.
"""

from abc import ABC, abstractmethod

import mlx.core as mx

Arrays = dict[str, mx.array]


class Codec(ABC):
    """How gradients are added up on a rank, sent, and read back."""

    def add(self, total: Arrays | None, gradients: Arrays) -> Arrays:
        """The sum of `total` and one micro-batch's gradients, in float32; `total` is None at first."""
        gradients = {name: gradient.astype(mx.float32) for name, gradient in gradients.items()}
        if total is None:
            return gradients
        return {name: total[name] + gradient for name, gradient in gradients.items()}

    @abstractmethod
    def encode(self, total: Arrays) -> Arrays:
        """What this rank sends for its total."""

    @abstractmethod
    def decode(self, reduced: Arrays) -> Arrays:
        """Float32 gradients from the sum of all ranks' encoded totals."""

    def state(self) -> Arrays:
        """What must be saved for a resumed run to send the same bits."""
        return {}

    def load(self, state: Arrays) -> None:  # noqa: B027 - most codecs keep nothing
        """Take back what `state` gave."""


class NativeCodec(Codec):
    """Gradients travel as they were added up: in float32."""

    def encode(self, total: Arrays) -> Arrays:
        return total

    def decode(self, reduced: Arrays) -> Arrays:
        return reduced


class BF16Codec(Codec):
    """Gradients travel as bfloat16: half the bytes, and a relative rounding of 2^-9 at each hop of a ring."""

    def encode(self, total: Arrays) -> Arrays:
        return {name: gradient.astype(mx.bfloat16) for name, gradient in total.items()}

    def decode(self, reduced: Arrays) -> Arrays:
        return {name: gradient.astype(mx.float32) for name, gradient in reduced.items()}


CODECS: dict[str, type[Codec]] = {"native": NativeCodec, "bf16": BF16Codec}
