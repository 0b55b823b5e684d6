"""The command `mlx-ring`: everything around a run that is not the run itself.

`commands` holds the command group and the commands about runs, `checkpoint` those about saved weights, and
`hosts` those about host files. A command reads its options, calls one function of the room that does the
work, and prints the result. Nothing here trains, and nothing here may load MLX before a command needs it.
"""

from mlx_ring.cli.commands import cli, main

__all__ = ["cli", "main"]
