"""`python -m mlx_ring.cli`: the command `mlx-ring`, for callers that know only the interpreter."""

from mlx_ring.cli.commands import main

main()
