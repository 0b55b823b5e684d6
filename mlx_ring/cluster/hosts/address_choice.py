"""Chooses the fastest address of each host for a ring: tries every address from the hosts that would use it.

In a ring only host i − 1 connects to host i, so it times the addresses of host i. Whether the other hosts
reach an address matters after a host is lost; it decides between addresses that are about as fast.
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

NEARLY_AS_FAST = 0.8  # of the fastest address: such a one wins if more hosts reach it


@dataclass(kw_only=True)
class Address:
    """One address of a host, and what trying it showed."""

    ip: str
    interface: str
    kind: str
    port: int = 0  # where the host listens while it is tried
    token: str = ""  # what the host shows to who connects
    problem: str = ""  # why the ring cannot use it; empty if it can
    reached_by: list[str] = field(default_factory=list[str])
    seconds: float = 0.0  # for a byte there and back, from the host before it in the ring
    bytes_per_second: float = 0.0

    @property
    def place(self) -> str:
        """The address with its interface and kind, in words."""
        return f"{self.ip} ({', '.join(filter(None, (self.interface, self.kind)))})"

    def __str__(self) -> str:
        measured = {"seconds": self.seconds, "bytes_per_second": self.bytes_per_second}
        return f"{self.place}: {self.problem or (speed(measured) if self.seconds else 'not timed')}"


Addresses = dict[str, list[Address]]  # by host, the best first


async def measure(
    names: list[str], *, python: str, environment: dict[str, str]
) -> tuple[Addresses, dict[str, str]]:
    """Tries and times every address of these hosts.

    Args:
        names: the hosts as ssh calls them, in the order of the ring.
        python: the interpreter on every host.
        environment: what the host file sets on every host.

    Returns: the addresses of each host, the best first; and, by host, why it could not be asked.

    Raises: ClusterError if two names mean one machine, or a host is lost meanwhile.
    """
    async with probes(names, python=python, environment=environment, anywhere=True) as (links, problems):
        ring = [name for name in names if name in links]
        try:
            answers = await asyncio.gather(*(links[name].ask("facts", folder=".") for name in ring))
            facts = dict(zip(ring, answers, strict=True))
            _refuse_two_names(facts)
            found = {name: candidates(name, facts) for name in ring}
            for name in ring:
                await _listen_on(links, name, found[name])
            for position, name in enumerate(ring):
                await _time(links, ring[position - 1], name, found[name])
        except HostLost as lost:
            raise ClusterError(f"host {lost.host}: {lost}") from None
    return {name: sorted(each, key=_best_first(each)) for name, each in found.items()}, problems


def candidates(name: str, facts: Mapping[str, Facts]) -> list[Address]:
    """Returns the addresses by which other hosts might reach a host.

    Leaves out its loopback, unless it is the only host, and addresses that another host has too: a bridge of
    containers has the same address everywhere. A public address is returned with a problem.
    """
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


def _refuse_two_names(facts: Mapping[str, Facts]) -> None:
    """Raises: ClusterError if two names mean one machine."""
    seen: dict[str, str] = {}
    for name, its in facts.items():
        if (first := seen.setdefault(its["machine"], name)) != name:
            raise ClusterError(f"{name} is the same machine as {first}; write one name's line twice instead")


async def _listen_on(links: Probes, name: str, addresses: list[Address]) -> None:
    """Has a host listen on each of its addresses."""
    for address in addresses:
        if not address.problem:
            answer, address.token = await listen(links, name, address.ip)
            address.port = answer["port"]
            address.problem = answer["error"]


async def _time(links: Probes, before: str, name: str, addresses: list[Address]) -> None:
    """Finds out which hosts reach which address, and has the host before this one time those it reaches."""
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


def _best_first(addresses: list[Address]) -> Any:
    """Returns a key that sorts the best address first.

    Nobody times the addresses of a lone host; for it, a cable comes before Wi-Fi.
    """
    fastest = max((address.bytes_per_second for address in addresses if not address.problem), default=0.0)

    def key(address: Address) -> tuple[Any, ...]:
        slow = address.bytes_per_second < NEARLY_AS_FAST * fastest
        poor = address.kind.lower() in ("wi-fi", "loopback")
        return bool(address.problem), slow, -len(address.reached_by), poor, -address.bytes_per_second

    return key
