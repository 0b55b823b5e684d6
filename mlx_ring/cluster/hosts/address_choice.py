"""Which of a host's addresses is the fastest for a ring: each tried, by the hosts that would use it. No mlx.

Host i of a ring is reached by host i − 1 alone, so its address is timed from there. Whether the others reach
it too matters once a host is lost, and decides between addresses that are about as fast.
"""

import asyncio
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_ring.cluster.hosts.host_link import HostLost
from mlx_ring.cluster.hosts.link_timing import listen, speed
from mlx_ring.cluster.hosts.probe_link import Facts, Probes, probes
from mlx_ring.cluster.limits import LINK_MEASURE_SECONDS
from mlx_ring.errors import ClusterError

ALIKE = 0.8  # of the fastest: as good, where more hosts reach it


@dataclass(kw_only=True)
class Address:
    """One address of a host, and how it was reached."""

    ip: str
    interface: str
    kind: str
    port: int = 0
    token: str = ""
    problem: str = ""  # why the ring cannot use it
    reached_by: list[str] = field(default_factory=list[str])
    seconds: float = 0.0  # a byte there and back, from the host before
    bytes_per_second: float = 0.0

    @property
    def place(self) -> str:
        return f"{self.ip} ({', '.join(filter(None, (self.interface, self.kind)))})"

    def __str__(self) -> str:
        measured = {"seconds": self.seconds, "bytes_per_second": self.bytes_per_second}
        return f"{self.place}: {self.problem or (speed(measured) if self.seconds else 'not timed')}"


Addresses = dict[str, list[Address]]  # by host, the best first


async def measure(
    names: list[str], *, python: str, environment: dict[str, str]
) -> tuple[Addresses, dict[str, str]]:
    """All addresses of these hosts, in the order of a ring. Returns: also why a host could not be asked.

    Raises: ClusterError for one machine by two names, or a host that is lost meanwhile.
    """
    async with probes(names, python=python, environment=environment, anywhere=True) as (links, problems):
        ring = [name for name in names if name in links]
        try:
            told = await asyncio.gather(*(links[name].ask("facts", folder=".") for name in ring))
            facts = dict(zip(ring, told, strict=True))
            _refuse_twins(facts)
            found = {name: candidates(name, facts) for name in ring}
            for name in ring:
                await _open(links, name, found[name])
            for position, name in enumerate(ring):
                await _try(links, ring[position - 1], name, found[name])
        except HostLost as lost:
            raise ClusterError(f"host {lost.host}: {lost}") from None
    return {name: sorted(each, key=_rank(each)) for name, each in found.items()}, problems


def candidates(name: str, facts: Mapping[str, Facts]) -> list[Address]:
    """What other hosts might reach a host by: not its loopback, nothing public, nothing that others have too
    (a bridge of containers has the same address everywhere). A lone host may reach itself by its loopback."""
    found: list[Address] = []
    for ip, link in facts[name]["addresses"].items():
        others = [other for other, its in facts.items() if other != name and ip in its["addresses"]]
        if others or (link["kind"] == "loopback" and len(facts) > 1):
            continue
        address = Address(ip=ip, interface=link["interface"], kind=link["kind"])
        if ipaddress.ip_address(ip).is_global:
            address.problem = "public, and the ring's traffic is neither encrypted nor signed"
        found.append(address)
    return found


def _refuse_twins(facts: Mapping[str, Facts]) -> None:
    seen: dict[str, str] = {}
    for name, its in facts.items():
        if (first := seen.setdefault(its["machine"], name)) != name:
            raise ClusterError(f"{name} is the same machine as {first}; write one name's line twice instead")


async def _open(links: Probes, name: str, addresses: list[Address]) -> None:
    """Listen on each."""
    for address in addresses:
        if not address.problem:
            answer, address.token = await listen(links, name, address.ip)
            address.port, address.problem = answer["port"], answer["error"]


async def _try(links: Probes, before: str, name: str, addresses: list[Address]) -> None:
    """See who reaches a host by which of its addresses, and time those that the host before it reaches."""
    usable = [address for address in addresses if not address.problem]
    others = [other for other in links if other != name]
    targets = [[address.ip, address.port, address.token] for address in usable]
    answers = await asyncio.gather(*(links[other].ask("reach", targets=targets) for other in others))
    for other, answer in zip(others, answers, strict=True):
        for address, error in zip(usable, answer["errors"], strict=True):
            if not error:
                address.reached_by.append(other)
            elif other == before:
                address.problem = f"{before} cannot connect: {error}"
    for address in usable:
        if before in address.reached_by:
            result = await links[before].ask(
                "connect",
                address=address.ip,
                port=address.port,
                token=address.token,
                seconds=LINK_MEASURE_SECONDS,
            )
            address.problem = result["error"]
            address.seconds = result.get("seconds", 0.0)
            address.bytes_per_second = result.get("bytes_per_second", 0.0)


def _rank(addresses: list[Address]) -> Any:
    """A key that sorts the best first. Of a lone host, whose addresses nobody times: a cable before Wi-Fi."""
    fastest = max((address.bytes_per_second for address in addresses if not address.problem), default=0.0)

    def key(address: Address) -> tuple[Any, ...]:
        slow = address.bytes_per_second < ALIKE * fastest
        poor = address.kind.lower() in ("wi-fi", "loopback")
        return bool(address.problem), slow, -len(address.reached_by), poor, -address.bytes_per_second

    return key
