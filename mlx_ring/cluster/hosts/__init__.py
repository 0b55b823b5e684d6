"""Which machines there are, how a command reaches them, and a small program that looks at a host.

`host_file` reads the host file that `mlx.launch` reads too, and `host_file_edit` changes it; `host_json`
holds what every form of it shares. `ssh` builds the command that reaches a host, and `on_hosts` runs one
command on many hosts. `host_probe` is the program that looks at a host: its text is sent there, so it
imports only the standard library; `probe_link` starts it and asks it, `host_link` is what that shares with
the link to an agent, and `link_timing` times a connection.
`sync`, `thunderbolt` and `address_choice` do the work of `mlx-ring hosts`.
"""

from mlx_ring.cluster.hosts.host_file import Host, HostFile, read_hostfile
from mlx_ring.cluster.hosts.ssh import on_host

__all__ = ["Host", "HostFile", "on_host", "read_hostfile"]
