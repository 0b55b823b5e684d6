"""The codec whose sums do not depend on the order of addition."""

from typing import Any

import mlx.core as mx

from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs.base import Codec, Total, added
from mlx_ring.communication.codecs.fixed_point import (
    LARGEST_EXPONENT,
    LEAST_EXPONENT,
    NOT_FINITE,
    exponent_above,
    magnitude_bits,
    power_of_two,
)

HEADROOM_BITS = 3  # how much a gradient may grow from one step to the next
PRECISION_BITS = 10  # how much it may shrink until its codes are made anew


class ExactCodec(Codec):
    """Gradients travel as integers: unlike a float sum, an integer one does not depend on its order.

    Every micro-batch's gradient becomes int32 codes, round(gradient × 2^k), half to even, with one exponent k
    for each tensor. The codes are added, on a rank and between ranks, in as many bytes as float32 takes; each
    is so small that those of all micro-batches of a global batch together cannot overflow. k comes from the
    largest |gradient| of any micro-batch in the step before. Where that was no good guess, because a gradient
    outgrew the headroom or shrank below the precision wanted, the step is made again with the k of its own
    maxima: so k depends on the gradients alone, never on who computed them.
    """

    def __init__(self, num_tensors: int, num_micro_batches: int) -> None:
        super().__init__()
        largest_code = (2**31 - 1) // num_micro_batches
        self._code_bits = largest_code.bit_length() - 1  # 2^code_bits <= largest_code
        self.state["exponents"] = mx.full(
            (num_tensors,), LEAST_EXPONENT, dtype=mx.int32
        )  # in the model's order

    def add(self, total: Total | None, gradients: Arrays) -> Total:
        """Codes are added, and of each element the largest magnitude is kept, as the bits of a float32.

        One pass over the gradient makes both; a maximum over each tensor here would take two more.
        """
        codes: Arrays = {}
        largest: Arrays = {}
        for (name, gradient), scale in zip(gradients.items(), self._scales(1), strict=True):
            gradient = gradient.astype(mx.float32)
            codes[name] = mx.round(gradient * scale).astype(mx.int32)
            largest[name] = magnitude_bits(gradient)
        if total is None:
            return codes, largest
        return added(total[0], codes), {name: mx.maximum(total[1][name], largest[name]) for name in largest}

    def maxima(self, largest: Arrays) -> Arrays:
        """The bits of the largest magnitude of each tensor."""
        return {"magnitudes": mx.stack([bits.max() for bits in largest.values()])}

    def encode(self, sums: Arrays) -> Arrays:
        """Row-major, as after the wire: a float sum over a gradient, such as its norm, goes along memory."""
        return {name: mx.contiguous(codes) for name, codes in sums.items()}

    def decode(self, reduced: Arrays) -> Arrays:
        scaled = zip(reduced.items(), self._scales(-1), strict=True)
        return {name: codes.astype(mx.float32) * scale for (name, codes), scale in scaled}

    def _scales(self, sign: int) -> list[mx.array]:
        """2^(sign × k) of each tensor, float32 scalars."""
        exponents = sign * self.state["exponents"]
        scales: Any = mx.split(power_of_two(exponents), exponents.size)
        return [scale.squeeze() for scale in scales]

    def encode_bits(self, numbers: mx.array) -> mx.array:
        return numbers.view(mx.int32)

    def decode_bits(self, reduced: mx.array) -> mx.array:
        return reduced.view(mx.float32)

    def is_finite(self, maxima: Arrays) -> mx.array:
        return (maxima["magnitudes"] < NOT_FINITE).all()

    def fits(self, maxima: Arrays) -> mx.array:
        """Whether no code overflowed and none is much coarser than it could be. Infinities fit nowhere: no
        other exponent would help."""
        change = self.next_state(maxima)["exponents"] - self.state["exponents"]
        return ((change >= -HEADROOM_BITS) & (change <= PRECISION_BITS)).all() | ~self.is_finite(maxima)

    def next_state(self, maxima: Arrays) -> Arrays:
        """Exponents that leave the headroom above these magnitudes; a tensor of zeros keeps its own."""
        magnitudes, exponents = maxima["magnitudes"], self.state["exponents"]
        fitting = self._code_bits - HEADROOM_BITS - exponent_above(magnitudes)
        fitting = mx.clip(fitting, LEAST_EXPONENT, LARGEST_EXPONENT)
        return {"exponents": mx.where(magnitudes == 0, exponents, fitting)}
