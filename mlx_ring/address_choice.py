"""Which of a host's addresses is the fastest for a ring: each tried, by the hosts that would use it. No mlx.

Host i of a ring is reached by host i − 1 alone, so its address is timed from there. Whether the others reach
it too matters once a host is lost, and decides between addresses that are about as fast.
"""

import asyncio
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_ring.errors import ClusterError
from mlx_ring.link_checks import MEASURE_SECONDS, listen, speed
from mlx_ring.probe_link import Probes, probes

ALIKE = 0.8  # of the fastest: as good, where more hosts reach it
Facts = Mapping[str, Any]


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


async def measure(names: list[str], *, python: str, environment: dict[str, str]) -> Addresses:
    """All addresses of these hosts, in the order of a ring. Raises: ClusterError naming a host that does not
    answer, or that the one before it does not reach."""
    async with probes(names, python=python, environment=environment, anywhere=True) as (links, problems):
        if problems:
            raise ClusterError("; ".join(f"host {name}: {why}" for name, why in problems.items()))
        facts = dict(zip(names, await asyncio.gather(*(_facts(links, name) for name in names)), strict=True))
        _refuse_twins(facts)
        found = {name: candidates(name, facts) for name in names}
        for name in names:
            await _open(links, name, found[name])
        for position, name in enumerate(names):
            await _try(links, names[position - 1], name, found[name])
    return {name: sorted(each, key=_rank(each)) for name, each in found.items()}


def candidates(name: str, facts: Mapping[str, Facts]) -> list[Address]:
    """What other hosts might reach a host by: not its loopback, nothing public, nothing that others have too
    (a bridge of containers has the same address everywhere)."""
    found: list[Address] = []
    for ip, link in facts[name]["addresses"].items():
        others = [other for other, its in facts.items() if other != name and ip in its["addresses"]]
        if link["kind"] == "loopback" or others:
            continue
        address = Address(ip=ip, interface=link["interface"], kind=link["kind"])
        if ipaddress.ip_address(ip).is_global:
            address.problem = "public, and the ring's traffic is neither encrypted nor signed"
        found.append(address)
    return found


async def _facts(links: Probes, name: str) -> Facts:
    return await links[name].ask("facts", folder=".")


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
                "connect", address=address.ip, port=address.port, token=address.token, seconds=MEASURE_SECONDS
            )
            address.problem = result["error"]
            address.seconds = result.get("seconds", 0.0)
            address.bytes_per_second = result.get("bytes_per_second", 0.0)


def _rank(addresses: list[Address]) -> Any:
    """A key that sorts the best first. Of a lone host, whose addresses nobody times: a cable before Wi-Fi."""
    fastest = max((address.bytes_per_second for address in addresses if not address.problem), default=0.0)

    def key(address: Address) -> tuple[Any, ...]:
        slow = address.bytes_per_second < ALIKE * fastest
        wireless = "wi-fi" in address.kind.lower()
        return bool(address.problem), slow, -len(address.reached_by), wireless, -address.bytes_per_second

    return key
