"""What a gradient codec is: how a gradient travels.

One training step uses a codec in this order, on every rank alike:

1. `add`, once for each micro-batch: its gradients go into this rank's total.
2. `encode`: the total becomes the wire, and the codec may say what its state is to be if this step updates
   the model.
3. The strategy sums the first part of the wire over ranks, and takes the largest over ranks of the second.
   From here on every rank holds the same two dictionaries. Only the codec knows what is in them.
4. `decode`, `is_finite` and `fits` read them.
5. If the batch is finite and fits, the model is updated, and `state` takes the entries from `encode` and from
   `next_state`. If it does not fit, `state` takes those from `next_state` alone, and the batch is computed
   again from 1. If it is not finite, `state` stays as it is.

A step that was issued ahead may turn out to be void. The trainer then puts the arrays of `state` back.
"""

from abc import ABC, abstractmethod

import mlx.core as mx

from mlx_ring.communication.arrays import Arrays

Total = tuple[Arrays, Arrays]  # what one rank has added up: for the sums, for the maxima. The codec's own
Wire = tuple[Arrays, Arrays]  # to be summed over ranks; int32, of which the largest over ranks is needed


class Codec(ABC):
    """How gradients are added up on a rank, sent, and read back.

    The methods compute from their arguments and from `state`, and change neither: whoever calls them decides
    when new entries go into `state`. So `mx.compile` can trace each of them with `state` as a captured input.
    All dictionaries of gradients have the trainable parameters' dotted paths as names, in the model's order,
    and arrays of the parameters' shapes.

    Attributes:
        state: what must be saved so that a resumed run sends the same bits; empty if there is nothing. It
            stays the same dictionary, with the same names, from the constructor on: only its arrays are
            replaced.
    """

    def __init__(self) -> None:
        self.state: Arrays = {}

    def add(self, total: Total | None, gradients: Arrays) -> Total:
        """Adds one micro-batch's gradients to a total, in float32.

        Args:
            total: what `add` returned for the micro-batch before; None for the first one.
            gradients: of the sum of the micro-batch's losses, in any floating-point dtype.

        Returns: the new total. The old one need not stay usable.
        """
        gradients = {name: gradient.astype(mx.float32) for name, gradient in gradients.items()}
        return (gradients if total is None else added(total[0], gradients)), {}

    @abstractmethod
    def encode(self, total: Total) -> tuple[Wire, Arrays]:
        """Turns this rank's total into what it sends.

        Returns:
            wire: new dictionaries, which the caller may change. The arrays to be summed have the gradients'
                names and shapes; the codec chooses their dtype. What the sum must not overflow or round is
                the codec's business.
            new state: the entries of `state` that change if this step updates the model, such as what
                rounding kept back on this rank. Empty for a codec that keeps nothing back.
        """

    @abstractmethod
    def decode(self, sums: Arrays) -> Arrays:
        """Float32 gradients of the sum of all losses, from the wire's first part, summed over all ranks."""

    def encode_numbers(self, numbers: mx.array) -> mx.array:
        """Turns float32 numbers into a dtype that can travel with the gradients and keeps every bit.

        Every number is sent by one rank alone, and the others send zeros, so that no sum rounds.
        """
        return numbers

    def decode_numbers(self, sums: mx.array) -> mx.array:
        """The float32 numbers, from the sum over ranks of what `encode_numbers` gave."""
        return sums

    def is_finite(self, maxima: Arrays) -> mx.array:
        """A bool scalar: false if a gradient held an infinity or a NaN that the sums do not show.

        Args:
            maxima: the wire's second part, the largest over all ranks.
        """
        return mx.array(True)

    def fits(self, maxima: Arrays) -> mx.array:
        """A bool scalar: false if `state` was of no use for these gradients.

        Then the result of `decode` is useless, and the batch must be computed again after `state` has
        taken the entries of `next_state`.

        Args:
            maxima: the wire's second part, the largest over all ranks.
        """
        return mx.array(True)

    def next_state(self, maxima: Arrays) -> Arrays:
        """The entries of `state` that follow from what all ranks know. They are the same on every rank.

        Args:
            maxima: the wire's second part, the largest over all ranks.
        """
        return {}


def added(sums: Arrays, more: Arrays) -> Arrays:
    """The sum of two dictionaries with the same names, array by array."""
    return {name: sums[name] + array for name, array in more.items()}
