"""The process on each host that starts ranks there, watches them and ends them: `python -m
mlx_ring.cluster.agent`.

The supervisor starts one agent on every host. An agent that hears nothing from the supervisor ends its
ranks and itself, so nothing is left behind, no matter which process dies. `host_agent` obeys the orders;
`rank_process` is one process that it started.
"""

from mlx_ring.cluster.agent.host_agent import HostAgent
from mlx_ring.cluster.agent.rank_process import RankProcess

__all__ = ["HostAgent", "RankProcess"]
