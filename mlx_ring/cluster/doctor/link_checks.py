"""Tries the network of a ring: checks that each address belongs to its host, connects and times every edge.

Rank i connects to every address of rank i + 1, as MLX's ring does. `mlx-ring run` takes free ports;
`mlx.launch` counts up from 32323, one port for each rank and address. Both are tried.
"""

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_ring.cluster.finding import Check, fail, failed, ok, warn
from mlx_ring.cluster.hosts.host_file import Host
from mlx_ring.cluster.hosts.link_timing import listen, rate, speed
from mlx_ring.cluster.hosts.probe_link import Answer, Facts, Probes
from mlx_ring.cluster.limits import LINK_MEASURE_SECONDS

LAUNCH_PORT = 32323  # the first port of mlx.launch
LOCAL_NETWORK = (
    "macOS refuses the local network to programs not started from Terminal or over ssh: allow it on {host}, "
    "under System Settings > Privacy & Security > Local Network"
)
SLOW_BYTES_PER_SECOND = 500e6 / 8  # half of what the cheapest cable carries
SLOW_FACTOR = 4.0  # an edge is worth a warning if it is this many times slower than the fastest


@dataclass(frozen=True)
class Edge:
    """One connection of the ring: from a rank to one address of the next rank."""

    rank: int  # that connects
    source: str  # its host
    target: str  # the host of the next rank
    address: str  # of the target
    launch_port: int  # where mlx.launch would listen

    @property
    def name(self) -> str:
        return f"link from rank {self.rank} ({self.address})"


def edges(hosts: tuple[Host, ...]) -> list[Edge]:
    """Returns all connections of the ring; a single rank has none."""
    found: list[Edge] = []
    port = LAUNCH_PORT
    for rank, host in enumerate(hosts):
        for address in host.ips:
            before = (rank - 1) % len(hosts)
            found.append(Edge(before, hosts[before].ssh, host.ssh, address, port))
            port += 1
    return found if len(hosts) > 1 else []


def address_checks(hosts: tuple[Host, ...], found: Mapping[str, Facts]) -> Iterator[Check]:
    """Yields findings about the addresses of the hosts that answered.

    Checks that an address belongs to its host and to no other, and which kind of interface has it.
    """
    named = {name: [ip for host in hosts if host.ssh == name for ip in host.ips] for name in found}
    for name, facts in found.items():
        own: Mapping[str, Any] = facts["addresses"]
        for address in dict.fromkeys(named[name]):
            others = [
                other
                for other, its in found.items()
                if address in its["addresses"] and its["machine"] != facts["machine"]
            ]
            yield _address(name, address, own, others, alone=len(found) == 1)


def _address(host: str, address: str, own: Mapping[str, Any], others: list[str], *, alone: bool) -> Check:
    """Judges one address.

    Args:
        host: the host that the host file gives the address to.
        address: the address.
        own: the links of that host by address.
        others: other hosts that have this address.
        alone: whether no other host answered, so that a loopback will do.
    """
    name = f"address {address}"
    usable = [ip for ip, link in own.items() if link["kind"] != "loopback"]
    if address not in own:
        remedy = (
            f"it has {', '.join(usable) or 'none'} now; mlx-ring hosts check FILE --write corrects the file"
        )
        return fail(name, host, "no interface of this host has it: it is stale, or another host's", remedy)
    link = own[address]
    detail = ", ".join(filter(None, (link["interface"], link["kind"])))
    if link["kind"] == "loopback":
        if alone:
            return ok(name, host, detail)
        remedy = f"give an address that the others reach: {', '.join(usable) or 'it has none'}"
        return fail(name, host, f"{detail}: only the host itself reaches it", remedy)
    if others:
        remedy = "give each machine an address of its own, or name another one in the host file"
        return fail(name, host, f"{detail}; {', '.join(others)} has the same address", remedy)
    if "bridge" in link["kind"].lower():
        remedy = "mlx-ring hosts thunderbolt gives each cable addresses of its own"
        return warn(name, host, f"{detail}: every Mac in a bridge forwards the traffic of the others", remedy)
    if "wi-fi" in link["kind"].lower():
        remedy = "use a cable, and its address: mlx-ring hosts check FILE --write finds the fastest"
        return warn(name, host, f"{detail}: slower than a cable, and it stalls", remedy)
    return ok(name, host, detail)


async def link_checks(hosts: tuple[Host, ...], probes: Probes, found: Mapping[str, Facts]) -> list[Check]:
    """Connects all edges whose two hosts answered, all at once; then times them one by one, so that each has
    the network to itself."""
    tried = [edge for edge in edges(hosts) if edge.source in probes and edge.target in probes]
    checks = [
        check
        for pair in await asyncio.gather(*(_connect(edge, probes, found[edge.source]) for edge in tried))
        for check in pair
    ]
    bad = {check.name for check in failed(checks)}
    timed: list[tuple[Edge, Answer]] = []
    for edge in tried:
        if edge.name not in bad:
            _, result = await _try_edge(edge, probes, 0, LINK_MEASURE_SECONDS)
            if result["error"]:
                checks.append(unreachable(edge, result, found[edge.source]))
            else:
                timed.append((edge, result))
    return [*checks, *_speeds(timed)]


async def _connect(edge: Edge, probes: Probes, source: Facts) -> list[Check]:
    """Connects an edge. If that works, checks that mlx.launch's port is free and can be reached too."""
    listening, result = await _try_edge(edge, probes, 0, 0)
    if listening["error"]:
        remedy = "correct its address in the host file: mlx-ring hosts check FILE --write"
        return [fail(edge.name, edge.target, f"it cannot listen there: {listening['error']}", remedy)]
    if result["error"]:
        return [unreachable(edge, result, source)]
    name = f"port {edge.launch_port} of {edge.address}"
    other = "give mlx.launch another --starting-port, or start with mlx-ring run, which takes free ports"
    listening, result = await _try_edge(edge, probes, edge.launch_port, 0)
    if listening["in_use"]:
        return [fail(name, edge.target, "another process listens there", f"end it, {other}")]
    if listening["error"]:
        return [fail(name, edge.target, f"it cannot listen there: {listening['error']}", other)]
    if result["error"]:
        remedy = f"open it in {edge.target}'s firewall, {other}"
        return [fail(name, edge.target, f"{edge.source} cannot connect to it: {result['error']}", remedy)]
    return [ok(name, edge.target, "free, and reached")]


async def _try_edge(edge: Edge, probes: Probes, port: int, seconds: float) -> tuple[Answer, Answer]:
    """Has one end listen and the other connect. Port 0 takes a free one; `seconds` is the time to measure.

    Returns: the answer of the end that listens, and that of the end that connects.
    """
    listening, token = await listen(probes, edge.target, edge.address, port)
    if listening["error"]:
        return listening, listening
    result = await probes[edge.source].ask(
        "connect", address=edge.address, port=listening["port"], token=token, seconds=seconds
    )
    return listening, result


def unreachable(edge: Edge, result: Answer, source: Facts) -> Check:
    """Says why an edge could not be connected.

    Args:
        edge: the connection.
        result: the answer of the host that tried to connect.
        source: the facts of that host.
    """
    detail = f"{edge.source} cannot connect: {result['error']}"
    host = edge.target
    remedy = (
        f"check the cable and {edge.target}'s firewall, or use another address: mlx-ring hosts check FILE"
    )
    if not result["errno"] and "another program" in result["error"]:
        remedy = f"another machine has {edge.address} too: give each its own"
    elif source["system"] == "Darwin" and result["errno"] == "EHOSTUNREACH":
        host = edge.source
        remedy = f"{LOCAL_NETWORK.format(host=edge.source)}; {remedy}"
    return fail(edge.name, host, detail, remedy)


def _speeds(timed: list[tuple[Edge, Answer]]) -> Iterator[Check]:
    """Judges the speed of each edge, also against the fastest."""
    fastest = max((result["bytes_per_second"] for _, result in timed), default=0.0)
    for edge, result in timed:
        detail = speed(result)
        if result["bytes_per_second"] * SLOW_FACTOR < fastest:
            remedy = "the slowest link sets the pace of a ring: use another address, or a cable"
            detail = f"{detail}, where the fastest link has {rate(fastest)}"
            yield warn(edge.name, edge.target, detail, remedy)
        elif result["bytes_per_second"] < SLOW_BYTES_PER_SECOND:
            remedy = "gradients of a large model will take long: use a cable of 1 Gbit/s or more"
            yield warn(edge.name, edge.target, detail, remedy)
        else:
            yield ok(edge.name, edge.target, detail)
