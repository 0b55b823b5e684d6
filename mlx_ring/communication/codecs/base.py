"""Gradient codecs: how a gradient travels.

A codec's methods are pure functions of their arguments and of its `state`, so that `mx.compile` can trace
them with that dictionary as an input: `add` collects one micro-batch's gradients into a total, `encode` gives
what goes on the wire, and `decode` turns the sum over ranks back into float32 gradients.
"""

from abc import ABC, abstractmethod

import mlx.core as mx

from mlx_ring.communication.arrays import Arrays

Total = tuple[Arrays, Arrays]  # what is added over ranks; what `maxima` are taken of


class Codec(ABC):
    """How gradients are added up on a rank, sent, and read back.

    `state` is what must be saved for a resumed run to send the same bits; always the same dictionary.
    """

    def __init__(self) -> None:
        self.state: Arrays = {}

    def add(self, total: Total | None, gradients: Arrays) -> Total:
        """`total` and one micro-batch's gradients, added in float32; `total` is None at first."""
        gradients = {name: gradient.astype(mx.float32) for name, gradient in gradients.items()}
        return (gradients if total is None else added(total[0], gradients)), {}

    @abstractmethod
    def encode(self, sums: Arrays) -> Arrays:
        """What this rank sends for its total."""

    @abstractmethod
    def decode(self, reduced: Arrays) -> Arrays:
        """Float32 gradients from the sum of all ranks' encoded totals."""

    def encode_bits(self, numbers: mx.array) -> mx.array:
        """Float32 numbers of which every rank but one sends zeros, so that no sum rounds."""
        return numbers

    def decode_bits(self, reduced: mx.array) -> mx.array:
        """Those numbers again, from the sum over ranks."""
        return reduced

    def maxima(self, largest: Arrays) -> Arrays:
        """Integers of which the largest over ranks is needed, from a total's second part."""
        return {}

    def is_finite(self, maxima: Arrays) -> mx.array:
        """Whether no gradient held an infinity or a NaN, as far as the sums do not show it themselves."""
        return mx.array(True)

    def fits(self, maxima: Arrays) -> mx.array:
        """Whether the state suits these gradients: if not, they must be made again after `next_state`."""
        return mx.array(True)

    def next_state(self, maxima: Arrays) -> Arrays:
        """The state for the next step, from the maxima over all ranks."""
        return {}


def added(sums: Arrays, more: Arrays) -> Arrays:
    """The sum of two dictionaries with the same names, array by array."""
    return {name: sums[name] + array for name, array in more.items()}
