"""One run from its start to its end, on one rank.

`process` is the program of a rank: it joins the group, parses the configuration, and ends with the right
status. `coordinator` drives the run; `builder` builds its parts, the same on every rank; `recorder` is rank
0's record of it, and `interval` the steps between two rows. `replay` repeats a recorded step; `data_digest`
tells the doctor what a host's data is.

Import `Coordinator`, `build` and `replay` from their modules: they load MLX, which a rank must not do
before it knows that its configuration is right.
"""

from mlx_ring.run.process import Process

__all__ = ["Process"]
