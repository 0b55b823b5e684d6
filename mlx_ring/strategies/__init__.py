"""Training strategies: how ranks turn their own gradients into the same new weights."""

from mlx_ring.communicator import Communicator
from mlx_ring.compression import CODECS
from mlx_ring.strategies.all_reduce import AllReduce
from mlx_ring.strategies.base import Reduced, Strategy

__all__ = ["Reduced", "Strategy", "build_strategy"]


def build_strategy(
    name: str, *, communicator: Communicator, codec: str, clip_gradient_norm: float | None, compile: bool
) -> Strategy:
    """The strategy of that name, with the codec of that name."""
    strategies = {"all_reduce": AllReduce}
    return strategies[name](
        communicator, CODECS[codec](), clip_gradient_norm=clip_gradient_norm, compile=compile
    )
