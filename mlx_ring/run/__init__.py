"""One run from its start to its end, on one rank.

`process` is the program of a rank: it joins the group, parses the configuration, and drives the run;
`failure` ends a rank that cannot go on. `coordinator` is the run's loop; `builder` builds its parts, the same
on every rank. `storage` keeps the run on disk, on every host; `recorder` is rank 0's part of that, and
`interval` the steps between two rows of metrics. `narrator` tells how far a preparation is. `replay` repeats
a recorded step; `data_digest` tells the doctor which data a host has.

Import `Coordinator`, `build` and `replay` from their modules: they load MLX, which a rank must not do
before it knows that its configuration is right.
"""

from mlx_ring.run.process import Process

__all__ = ["Process"]
