"""Which machines there are: the host file, ssh, and a small program that is sent to a host to look at it.

`host_file` reads what `mlx.launch` reads and `host_file_edit` changes it; `ssh` says how a command gets to
a host; `host_probe` is sent to hosts as text, so it imports nothing but the standard library, and
`probe_link` talks to it; `host_link` is what it shares with
the link to an agent; `on_hosts` runs one command on many hosts. `sync`, `thunderbolt` and
`address_choice` are the work behind `mlx-ring hosts`.
"""

from mlx_ring.cluster.hosts.host_file import Host, HostFile, read_hostfile
from mlx_ring.cluster.hosts.ssh import on_host

__all__ = ["Host", "HostFile", "on_host", "read_hostfile"]
