"""`mlx-ring doctor`: looks at hosts, links and ranks before a run does.

`doctor` puts the checks together; `host_checks` judges what hosts tell of themselves; `link_checks`
connects and times every edge of the ring; `trial_launch` starts real ranks. Each gives `Check`s, with a
remedy if something is wrong.
"""

from mlx_ring.cluster.doctor.doctor import examine

__all__ = ["examine"]
