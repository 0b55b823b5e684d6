"""Training strategies: how ranks turn their own gradients into the same new weights.

`base` says what a strategy is and what it is given; `all_reduce` sums the gradients of all ranks in every
step. Whoever adds a strategy adds it to `build_strategy`, and its name to `conf/strategy/`.
"""

from mlx_ring.communication.codecs import build_codec
from mlx_ring.communication.communicator import Communicator
from mlx_ring.training.strategies.all_reduce import AllReduce
from mlx_ring.training.strategies.base import Reduced, Share, Strategy

__all__ = ["Reduced", "Share", "Strategy", "build_strategy"]


def build_strategy(
    name: str,
    *,
    communicator: Communicator,
    codec: str,
    num_tensors: int,
    num_micro_batches: int,
    clip_gradient_norm: float | None,
    compile: bool,
) -> Strategy:
    """The strategy of that name, with the codec of that name, for a model with so many trainable tensors."""
    strategies = {"all_reduce": AllReduce}
    return strategies[name](
        communicator,
        build_codec(codec, num_tensors=num_tensors, num_micro_batches=num_micro_batches),
        num_micro_batches=num_micro_batches,
        clip_gradient_norm=clip_gradient_norm,
        compile=compile,
    )
