"""Codecs that send gradients as floating-point numbers."""

import mlx.core as mx

from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs.base import Codec, Total, Wire


class NativeCodec(Codec):
    """Gradients travel as they were added up: in float32."""

    def encode(self, total: Total) -> tuple[Wire, Arrays]:
        return (dict(total[0]), {}), {}

    def decode(self, sums: Arrays) -> Arrays:
        return sums


class BF16Codec(Codec):
    """Gradients travel as bfloat16: half the bytes, and a relative rounding of 2^-9 at each hop of a ring."""

    def encode(self, total: Total) -> tuple[Wire, Arrays]:
        return ({name: gradient.astype(mx.bfloat16) for name, gradient in total[0].items()}, {}), {}

    def decode(self, sums: Arrays) -> Arrays:
        return {name: gradient.astype(mx.float32) for name, gradient in sums.items()}
