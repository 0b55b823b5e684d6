"""Opens one end of a connection between two hosts, for a probe to time, and puts the result into words."""

import secrets

from mlx_ring.cluster.hosts.host_probe import TOKEN_BYTES
from mlx_ring.cluster.hosts.probe_link import Answer, Probes


async def listen(probes: Probes, host: str, address: str, port: int = 0) -> tuple[Answer, str]:
    """Makes a host listen on one of its addresses; port 0 takes a free one.

    Returns: the probe's answer, and the token by which a caller sees that it reached this host.
    """
    token = secrets.token_hex(TOKEN_BYTES)
    return await probes[host].ask("listen", address=address, port=port, token=token), token


def speed(result: Answer) -> str:
    """Says in words how fast a timed connection is."""
    return f"{result['seconds'] * 1000:.2f} ms there and back, {rate(result['bytes_per_second'])}"


def rate(bytes_per_second: float) -> str:
    """Says a bandwidth in words, in bits a second."""
    bits = bytes_per_second * 8
    return f"{bits / 1e9:.1f} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.0f} Mbit/s"
