"""Gradient codecs: how a gradient travels.

`base` says what a codec is; `float` holds those that send floating-point numbers, `exact` the one whose
sums do not depend on the order of addition, `fixed_point` its arithmetic. Whoever adds a codec adds it to
`build_codec`, and its name to `conf/communicator/`.
"""

from mlx_ring.communication.codecs.base import Codec, Total
from mlx_ring.communication.codecs.exact import ExactCodec
from mlx_ring.communication.codecs.float import BF16Codec, NativeCodec

__all__ = ["BF16Codec", "Codec", "ExactCodec", "NativeCodec", "Total", "build_codec"]


def build_codec(name: str, *, num_tensors: int, num_micro_batches: int) -> Codec:
    """The codec of that name, for a model with so many trainable tensors."""
    if name == "exact":
        return ExactCodec(num_tensors, num_micro_batches)
    return {"native": NativeCodec, "bf16": BF16Codec}[name]()
