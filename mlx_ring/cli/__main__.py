"""`python -m mlx_ring.cli`: the command `mlx-ring` where only the interpreter is known."""

from mlx_ring.cli.commands import main

main()
