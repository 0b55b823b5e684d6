"""Faults that cannot be planted on the hosts of these tests: those of Macs and their settings."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from mlx_ring.cluster.doctor import host_checks
from mlx_ring.cluster.doctor.link_checks import Edge, address_checks, unreachable
from mlx_ring.cluster.hosts import host_probe
from mlx_ring.cluster.hosts.host_file import Host

IFCONFIG = """lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 0a:00:00:00:00:01
\tinet 192.168.1.11 netmask 0xffffff00 broadcast 192.168.1.255
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 169.254.10.2 netmask 0xffff0000 broadcast 169.254.255.255
"""
PORTS = """
Hardware Port: Wi-Fi
Device: en0
Ethernet Address: 0a:00:00:00:00:01

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 0a:00:00:00:00:02
"""


@pytest.fixture
def a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the commands of the probe answer as those of a Mac do."""
    pmset = "System-wide power settings:\n sleep                1 (sleep prevented by caffeinate)\n"
    said = {"ifconfig": IFCONFIG, "networksetup": PORTS, "pmset": pmset, "sysctl": "Apple M4 Max\n", "ip": ""}
    for name, text in said.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)


def facts(**more: Any) -> dict[str, Any]:
    return {
        "machine": "a", "system": "Darwin", "chip": "Apple M4 Max", "cores": 16, "build": "",
        "addresses": {}, "variables": {}, "sleep": {"minutes": 0, "battery": False},
    } | more  # fmt: skip


@pytest.mark.usefixtures("a_mac")
def test_a_mac_as_its_own_tools_tell_it() -> None:
    assert host_probe.chip() == "Apple M4 Max"
    assert host_probe.addresses() == {
        "127.0.0.1": {"interface": "lo0", "kind": "loopback"},
        "192.168.1.11": {"interface": "en0", "kind": "Wi-Fi"},
        "169.254.10.2": {"interface": "bridge0", "kind": "Thunderbolt Bridge"},
    }
    assert host_probe.sleep() == {"minutes": 1, "battery": False}


@pytest.mark.usefixtures("a_mac")
@pytest.mark.parametrize(
    ("address", "words", "remedy"),
    [
        ("192.168.1.11", "en0, Wi-Fi: slower than a cable", "hosts check FILE --write"),
        ("169.254.10.2", "bridge0, Thunderbolt Bridge", "hosts thunderbolt"),
    ],
)
def test_poor_links_are_named(address: str, words: str, remedy: str) -> None:
    hosts = (Host(ssh="mini", ips=(address,)), Host(ssh="studio", ips=("192.168.1.12",)))
    found = {"mini": facts(addresses=host_probe.addresses())}
    (check,) = address_checks(hosts, found)
    assert (check.status, check.host) == ("warn", "mini")
    assert check.detail.startswith(words) and remedy in check.remedy


def test_a_host_that_falls_asleep() -> None:
    check = host_checks.sleep("mini", facts(sleep={"minutes": 1, "battery": False}))
    assert check.status == "warn" and "sudo pmset -a sleep 0" in check.remedy
    check = host_checks.sleep("book", facts(sleep={"minutes": 0, "battery": True}))
    assert check.status == "warn" and "laptop" in check.detail
    assert host_checks.sleep("mini", facts()).status == "ok"


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_the_local_network_of_a_mac(system: str) -> None:
    """macOS refuses with "no route to host", whose number differs between systems."""
    edge = Edge(0, "studio", "mini", "192.168.1.11", 32323)
    told = json.loads(json.dumps({"error": "No route to host", "errno": "EHOSTUNREACH"}))
    check = unreachable(edge, told, facts(system=system))
    assert ("Local Network" in check.remedy) == (system == "Darwin")
    assert check.host == ("studio" if system == "Darwin" else "mini")


def test_one_variable_is_compared_with_what_most_have() -> None:
    found = {name: facts(variables={"OMP_NUM_THREADS": "1"}) for name in ("a", "b")} | {"c": facts()}
    checks = {name: list(host_checks.variables(name, found, facts())) for name in found}
    assert [check.status for name in found for check in checks[name]] == ["ok", "ok", "warn"]
    assert checks["c"][0].detail == "OMP_NUM_THREADS is unset: a, b has 1"
