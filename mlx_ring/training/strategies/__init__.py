"""Training strategies: how ranks turn their own gradients into the same new weights.

`base` says what a strategy is, in which order the trainer calls it, and what it is given. `all_reduce` sums
the gradients of all ranks in every step. A new strategy is also added to `build_strategy`, and its name to
`conf/strategy/`.
"""

from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.codecs import build_codec
from mlx_ring.communication.communicator import Communicator
from mlx_ring.training.strategies.all_reduce import AllReduce
from mlx_ring.training.strategies.base import Contribution, Outcome, Strategy

__all__ = ["Contribution", "Outcome", "Strategy", "build_strategy"]


def build_strategy(
    name: str,
    *,
    communicator: Communicator,
    codec: str,
    parameters: Arrays,
    num_micro_batches: int,
    clip_gradient_norm: float | None,
    compile: bool,
) -> Strategy:
    """The strategy of that name.

    Args:
        name: one of `conf/strategy/`.
        communicator: joins the ranks.
        codec: one of `conf/communicator/`.
        parameters: the trainable ones, by dotted path, in the model's order.
        num_micro_batches: those of a global batch, over all ranks.
        clip_gradient_norm: the largest L2 norm of the mean gradient; None to clip nothing.
        compile: whether to compile what a step computes.
    """
    strategies = {"all_reduce": AllReduce}
    return strategies[name](
        communicator,
        build_codec(codec, parameters=parameters, num_micro_batches=num_micro_batches),
        num_micro_batches=num_micro_batches,
        clip_gradient_norm=clip_gradient_norm,
        compile=compile,
    )
