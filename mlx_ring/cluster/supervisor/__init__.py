"""`mlx-ring run`: keeps a run going on the hosts that answer, until it has ended well.

`options` checks what the user asked for; `elastic_supervisor` makes one attempt after another; `attempt` is
one of them, from the start of its ranks to the end of all; `watch` judges from the ranks' reports who makes
progress and who is to blame; `host_pool` knows which hosts answer; `agent_link` talks to one host's agent;
`console_output` prints.
"""

from mlx_ring.cluster.supervisor.elastic_supervisor import supervise
from mlx_ring.cluster.supervisor.options import Options

__all__ = ["Options", "supervise"]
