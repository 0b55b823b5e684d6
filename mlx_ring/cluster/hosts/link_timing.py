"""Times one connection between two hosts. No mlx here."""

import secrets

from mlx_ring.cluster.hosts.host_probe import TOKEN_BYTES
from mlx_ring.cluster.hosts.probe_link import Answer, Probes

MEASURE_SECONDS = 0.3


async def listen(probes: Probes, host: str, address: str, port: int = 0) -> tuple[Answer, str]:
    """Have a host listen on one of its addresses. Returns: its answer, and what a caller will be shown."""
    token = secrets.token_hex(TOKEN_BYTES)
    return await probes[host].ask("listen", address=address, port=port, token=token), token


def speed(result: Answer) -> str:
    """Of a timed connection, in words."""
    return f"{result['seconds'] * 1000:.2f} ms there and back, {rate(result['bytes_per_second'])}"


def rate(bytes_per_second: float) -> str:
    """A bandwidth in words, in bits a second."""
    bits = bytes_per_second * 8
    return f"{bits / 1e9:.1f} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.0f} Mbit/s"
