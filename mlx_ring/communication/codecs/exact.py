"""The codec whose sums do not depend on the order of addition."""

from typing import Any

import mlx.core as mx

from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs.base import Codec, Total, Wire, added
from mlx_ring.communication.codecs.fixed_point import (
    LARGEST_EXPONENT,
    LEAST_EXPONENT,
    NOT_FINITE,
    exponent_above,
    magnitude_bits,
    power_of_two,
)

HEADROOM_BITS = 3  # how much a gradient may grow from one step to the next, as a power of two
PRECISION_BITS = 10  # how much it may shrink before its codes are computed anew, as a power of two


class ExactCodec(Codec):
    """Gradients travel as integers: an integer sum does not depend on its order, as a float sum does.

    Every micro-batch's gradient becomes int32 codes, round(gradient × 2^k), half to even, with one exponent k
    for each tensor. The codes are added, on a rank and between ranks, in as many bytes as float32 takes. Each
    code is small enough that the codes of all micro-batches of a global batch together cannot overflow.

    k comes from the largest |gradient| of any micro-batch in the step before. That guess fails if a
    gradient outgrew the headroom, or shrank so far that its codes became too coarse. Then the batch is
    computed again, with the k of its own maxima. So k depends on the gradients alone, never on the rank that
    computed them.

    `state` is {"exponents": k of each tensor, int32 (num_tensors,), in the model's order}. The wire's maxima
    are {"magnitudes": the bits of the largest |gradient| of each tensor, int32 (num_tensors,)}.
    """

    def __init__(self, num_tensors: int, num_micro_batches: int) -> None:
        """`num_micro_batches`: those of a global batch, over all ranks."""
        super().__init__()
        largest_code = (2**31 - 1) // num_micro_batches
        self._code_bits = largest_code.bit_length() - 1  # 2^code_bits <= largest_code
        self.state["exponents"] = mx.full((num_tensors,), LEAST_EXPONENT, dtype=mx.int32)

    def add(self, total: Total | None, gradients: Arrays) -> Total:
        """Adds the codes, and keeps the largest magnitude of each element, as the bits of a float32.

        One pass over the gradient makes both. A maximum over each tensor here would take two more passes.
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

    def encode(self, total: Total) -> tuple[Wire, Arrays]:
        """The codes, and the largest magnitude of each tensor.

        The codes are made row-major here, as they are after the wire, so that with one rank too a float sum
        over a gradient, such as its norm, runs along memory in the same order.
        """
        codes = {name: mx.contiguous(array) for name, array in total[0].items()}
        magnitudes = mx.stack([bits.max() for bits in total[1].values()])
        return (codes, {"magnitudes": magnitudes}), {}

    def decode(self, sums: Arrays) -> Arrays:
        scaled = zip(sums.items(), self._scales(-1), strict=True)
        return {name: codes.astype(mx.float32) * scale for (name, codes), scale in scaled}

    def _scales(self, sign: int) -> list[mx.array]:
        """2^(sign × k) for each tensor, as float32 scalars."""
        exponents = sign * self.state["exponents"]
        scales: Any = mx.split(power_of_two(exponents), exponents.size)
        return [scale.squeeze() for scale in scales]

    def encode_numbers(self, numbers: mx.array) -> mx.array:
        return numbers.view(mx.int32)

    def decode_numbers(self, sums: mx.array) -> mx.array:
        return sums.view(mx.float32)

    def is_finite(self, maxima: Arrays) -> mx.array:
        return (maxima["magnitudes"] < NOT_FINITE).all()

    def fits(self, maxima: Arrays) -> mx.array:
        """Whether no code overflowed and none is much coarser than it could be.

        True for an infinity or a NaN too: no other exponent would help, so computing again is useless.
        """
        change = self.next_state(maxima)["exponents"] - self.state["exponents"]
        return ((change >= -HEADROOM_BITS) & (change <= PRECISION_BITS)).all() | ~self.is_finite(maxima)

    def next_state(self, maxima: Arrays) -> Arrays:
        """Exponents that leave the headroom above these magnitudes. A tensor of zeros keeps its exponent."""
        magnitudes, exponents = maxima["magnitudes"], self.state["exponents"]
        fitting = self._code_bits - HEADROOM_BITS - exponent_above(magnitudes)
        fitting = mx.clip(fitting, LEAST_EXPONENT, LARGEST_EXPONENT)
        return {"exponents": mx.where(magnitudes == 0, exponents, fitting)}
