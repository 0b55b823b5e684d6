"""Gradient codecs: how a gradient travels.

A codec's methods are pure functions of their arguments and of its `state`, so that `mx.compile` can trace
them with that dictionary as an input: `add` collects one micro-batch's gradients into a total, `encode` gives
what goes on the wire, and `decode` turns the sum over ranks back into float32 gradients.
"""

from abc import ABC, abstractmethod
from typing import Any

import mlx.core as mx

from mlx_ring.fixed_point import (
    LARGEST_EXPONENT,
    LEAST_EXPONENT,
    NOT_FINITE,
    exponent_above,
    magnitude_bits,
    power_of_two,
)

Arrays = dict[str, mx.array]
Total = tuple[Arrays, Arrays]  # what is added over ranks; what `maxima` are taken of

HEADROOM_BITS = 3  # how much a gradient may grow from one step to the next
PRECISION_BITS = 10  # how much it may shrink until its codes are made anew


class Codec(ABC):
    """How gradients are added up on a rank, sent, and read back.

    `state` is what must be saved for a resumed run to send the same bits; always the same dictionary.
    """

    def __init__(self) -> None:
        self.state: Arrays = {}

    def add(self, total: Total | None, gradients: Arrays) -> Total:
        """`total` and one micro-batch's gradients, added in float32; `total` is None at first."""
        gradients = {name: gradient.astype(mx.float32) for name, gradient in gradients.items()}
        return (gradients if total is None else _added(total[0], gradients)), {}

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


class NativeCodec(Codec):
    """Gradients travel as they were added up: in float32."""

    def encode(self, sums: Arrays) -> Arrays:
        return sums

    def decode(self, reduced: Arrays) -> Arrays:
        return reduced


class BF16Codec(Codec):
    """Gradients travel as bfloat16: half the bytes, and a relative rounding of 2^-9 at each hop of a ring."""

    def encode(self, sums: Arrays) -> Arrays:
        return {name: gradient.astype(mx.bfloat16) for name, gradient in sums.items()}

    def decode(self, reduced: Arrays) -> Arrays:
        return {name: gradient.astype(mx.float32) for name, gradient in reduced.items()}


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
        return _added(total[0], codes), {name: mx.maximum(total[1][name], largest[name]) for name in largest}

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


def build_codec(name: str, *, num_tensors: int, num_micro_batches: int) -> Codec:
    """The codec of that name, for a model with so many trainable tensors."""
    if name == "exact":
        return ExactCodec(num_tensors, num_micro_batches)
    return {"native": NativeCodec, "bf16": BF16Codec}[name]()


def _added(sums: Arrays, more: Arrays) -> Arrays:
    return {name: sums[name] + array for name, array in more.items()}
