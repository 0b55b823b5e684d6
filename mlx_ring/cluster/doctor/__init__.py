"""`mlx-ring doctor`: looks at hosts, links and ranks before a run does.

`doctor` runs all checks in order. `host_checks` judges the facts that hosts give about themselves,
`link_checks` connects and times every edge of the ring, and `trial_launch` starts real ranks. The result of
each is a list of `Check`s, with a remedy if something is wrong.
"""

from mlx_ring.cluster.doctor.doctor import examine

__all__ = ["examine"]
