"""Gradient codecs: how a gradient travels.

`base` says what a codec is, and in which order a step uses it. `float` holds the codecs that send
floating-point numbers, `exact` the one whose sums do not depend on the order of addition, and `fixed_point`
the arithmetic of the latter. A new codec is also added to `build_codec`, and its name to
`conf/communicator/`.
"""

from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs.base import Codec, Total, Wire
from mlx_ring.communication.codecs.exact import ExactCodec
from mlx_ring.communication.codecs.float import BF16Codec, NativeCodec

__all__ = ["BF16Codec", "Codec", "ExactCodec", "NativeCodec", "Total", "Wire", "build_codec"]


def build_codec(name: str, *, parameters: Arrays, num_micro_batches: int) -> Codec:
    """The codec of that name.

    Args:
        name: one of `conf/communicator/`.
        parameters: the trainable ones, by dotted path, in the model's order: what gradients look like.
        num_micro_batches: those of a global batch, over all ranks.
    """
    if name == "exact":
        return ExactCodec(len(parameters), num_micro_batches)
    return {"native": NativeCodec, "bf16": BF16Codec}[name]()
