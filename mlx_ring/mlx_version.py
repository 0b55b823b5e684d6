"""Which MLX is installed here, and which is needed."""

import re
import socket

import mlx.core as mx

from mlx_ring.errors import ConfigError

MLX_VERSION: str = mx.__version__  # pyright: ignore[reportAttributeAccessIssue]
MINIMUM_MLX = "0.32.4"  # earlier ones wait for ever when a peer is lost


def refuse_old_mlx() -> None:
    """Raises: ConfigError where the MLX that is installed is older than what is needed."""

    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)[:3]]

    if numbers(MLX_VERSION) < numbers(MINIMUM_MLX):
        raise ConfigError(
            f"MLX {MLX_VERSION} on {socket.gethostname()} is older than the {MINIMUM_MLX} that mlx_ring "
            f'needs; install it: pip install "mlx>={MINIMUM_MLX}"'
        )
