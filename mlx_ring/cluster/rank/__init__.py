"""What a rank's process knows of its place in the group, and what it says to those who watch over it.

`environment` reads what the launcher set; `ring_ports` keeps other jobs off a rank's ports; `heartbeat`
reports to the host's agent; `progress` holds what this rank prepares, and `effort` tells whether a process is
at work; `stop_signal` turns a signal into an orderly stop; `openblas` runs a rank with a faster BLAS.
`protocol` defines every message between ranks, agents and the supervisor.
"""

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.cluster.rank.heartbeat import Heartbeat
from mlx_ring.cluster.rank.stop_signal import StopSignal

__all__ = ["Heartbeat", "RankEnvironment", "StopSignal"]
