"""The command `mlx-ring doctor`: whether hosts can train together, before they are to. No mlx here.

First every host is looked at, all at once, by the Python that would run its ranks (`host_probe`); then their
data is compared; then, where nothing failed, ranks are launched as those of a run are (`trial_launch`).
"""

import asyncio
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_ring.cluster.doctor import host_checks
from mlx_ring.cluster.doctor.link_checks import LOCAL_NETWORK, address_checks, link_checks
from mlx_ring.cluster.doctor.trial_launch import LOCAL_RANKS, launch
from mlx_ring.cluster.finding import Check, fail, failed, found_in, ok, warn
from mlx_ring.cluster.hosts.host_file import Host, HostFile, read_hostfile
from mlx_ring.cluster.hosts.host_link import HostLost
from mlx_ring.cluster.hosts.on_hosts import ask
from mlx_ring.cluster.hosts.probe_link import Facts, ProbeLink, Probes, probes
from mlx_ring.cluster.hosts.ssh import HERE, LOOPBACK
from mlx_ring.config.compose import compose_run
from mlx_ring.errors import ConfigError, MlxRingError

DATA_SECONDS = 600.0  # for opening the data of a run; text is turned into tokens first
REACH = "try by hand: ssh -o BatchMode=yes {host} true must say nothing and ask nothing"
CHANGED_KEY = "its key is another one now: where that is right, ssh-keygen -R {host}, then ssh {host} once"
UNKNOWN_KEY = "its key is unknown here: ssh {host} once, compare the key, and say yes"
FOLDER = "mlx-ring hosts sync FILE copies this folder there"
INTERPRETER = "mlx-ring hosts sync FILE makes the environment there; or give --python"
REMEDIES = (  # by what ssh or the other side says
    ("has changed and you have requested strict checking", CHANGED_KEY),
    ("Host key verification failed", UNKNOWN_KEY),
    ("Permission denied", "it does not take this user's key: ssh-copy-id {host}"),
    ("Could not resolve", "correct its name in the host file, or in ssh's config"),
    ("cannot be run", "give an interpreter that is there, with --python"),
    ("refused", "switch Remote Login (sshd) on there"),
    ("it has no folder", FOLDER),
    ("it has no ", INTERPRETER),
)


@dataclass(frozen=True, kw_only=True)
class Meant:
    """The run that is meant: what its hosts are looked at for."""

    overrides: list[str]
    directory: str
    distributes: bool  # whether rank 0 sends its data to hosts that lack it

    @staticmethod
    def by(overrides: list[str]) -> "Meant":
        """Raises: ConfigError for overrides with a mistake."""
        if not any(item.startswith("run.dir=") for item in overrides):
            overrides = [*overrides, "run.dir=outputs/doctor"]  # which is never made
        config = compose_run(*overrides)
        directory = config.record["run"]["dir"]
        distributes = getattr(config.data, "distribute", False)
        return Meant(overrides=overrides, directory=directory, distributes=distributes)


def examine(hostfile: Path | None, python: str, overrides: list[str]) -> Iterator[Check]:
    """All checks of the hosts of a host file, or of this machine: each group once it is done.

    Raises: ConfigError for overrides with a mistake. Whatever else fails is a finding.
    """
    meant = Meant.by(overrides)
    try:
        file = read_hostfile(hostfile) if hostfile is not None else _this_machine()
    except ConfigError as error:
        yield fail("host file", socket.gethostname(), str(error), "correct it; mlx-ring hosts makes one")
        return
    try:
        yield from map(_named, _examine(file, hostfile, python, meant))
    except MlxRingError as error:
        yield fail("doctor", socket.gethostname(), str(error), "ask again; if it stays, look at that host")


def _this_machine() -> HostFile:
    here = Host(ssh=LOOPBACK, ips=(LOOPBACK,))
    return HostFile(hosts=(here,) * LOCAL_RANKS, envs={}, backend=None)


def _examine(file: HostFile, hostfile: Path | None, python: str, meant: Meant) -> Iterator[Check]:
    checks, able = asyncio.run(_look(file, python, meant))
    yield from checks
    of_data = asyncio.run(_data(file, python, meant, able))
    yield from of_data
    if failed([*checks, *of_data]):
        yield warn("launch", LOOPBACK, "not tried", "mend what failed above, then ask again")
    else:
        yield from asyncio.run(launch(hostfile, python))


def _named(check: Check) -> Check:
    """With this machine's own name, where it is meant."""
    return replace(check, host=socket.gethostname()) if check.host in HERE else check


async def _look(file: HostFile, python: str, meant: Meant) -> tuple[list[Check], list[str]]:
    """Returns: also the hosts that have what is installed here."""
    async with probes([LOOPBACK], python=sys.executable, environment={}) as (own, _):
        here = await own[LOOPBACK].ask("facts", folder=meant.directory)
    async with probes(file.names, python=python, environment=file.envs) as (links, problems):
        found = await _facts(links, problems, meant.directory)
        checks = [_reached(name, problems, found) for name in file.names]
        checks += host_checks.judge(found, here)
        checks += address_checks(file.hosts, found)
        reached = {name: links[name] for name in found}
        try:
            checks += await asyncio.gather(*(_clock(link) for link in reached.values()))
            checks += await link_checks(file.hosts, reached, found)
        except HostLost as lost:
            checks.append(fail("reachable", lost.host, str(lost), REACH.format(host=lost.host)))
    unfit = {check.host for check in failed(checks) if check.name in ("python", "mlx", "mlx_ring")}
    return checks, [name for name in found if name not in unfit]


async def _facts(links: Probes, problems: dict[str, str], directory: str) -> dict[str, Facts]:
    """Of every host that tells them; why another does not goes to `problems`."""

    async def one(link: ProbeLink) -> dict[str, Any]:
        try:
            return await link.ask("facts", folder=directory)
        except HostLost as lost:
            problems[link.host] = str(lost)
            return {}

    told = await asyncio.gather(*map(one, links.values()))
    return {name: facts for name, facts in zip(links, told, strict=True) if facts}


def _reached(name: str, problems: dict[str, str], found: dict[str, Facts]) -> Check:
    if why := problems.get(name):
        remedy = next((remedy for words, remedy in REMEDIES if words in why), REACH)
        if sys.platform == "darwin" and "No route to host" in why:
            remedy = LOCAL_NETWORK
        return fail("reachable", name, why, remedy.format(host=name))
    twin = next(other for other in found if found[other]["machine"] == found[name]["machine"])
    if twin != name:
        remedy = "list one name twice instead, for two ranks there"
        return fail("reachable", name, f"it is the same machine as {twin}", remedy)
    return ok("reachable", name, "this machine" if name in HERE else f"as {found[name]['host']}")


async def _clock(link: ProbeLink) -> Check:
    """Against the middle of the question and its answer; the shortest of three."""
    tries: list[tuple[float, float]] = []
    for _ in range(3):
        start = time.time()
        there = (await link.ask("clock"))["time"]
        end = time.time()
        tries.append((end - start, there - (start + end) / 2))
    took, ahead = min(tries)
    return host_checks.skew(link.host, ahead, took / 2)


async def _data(file: HostFile, python: str, meant: Meant, names: list[str]) -> list[Check]:
    """Whether all hosts that can tell hold the data that the run would draw from. Where rank 0 sends it, only
    its own host must."""
    if meant.distributes:
        names = [name for name in names if name == file.hosts[0].ssh]
    command = [python, "-m", "mlx_ring.run.data_digest", *meant.overrides]
    answers = await asyncio.gather(*(ask(name, command, file.envs, seconds=DATA_SECONDS) for name in names))
    found: dict[str, dict[str, str]] = {}
    for answer in answers:
        lines = answer.stderr.splitlines() or [f"status {answer.status}"]
        found[answer.host] = found_in(answer.stdout.decode(errors="replace")) or {"error": lines[-1]}
    digests = [each["digest"] for each in found.values() if "digest" in each]
    usual = max(digests, key=digests.count, default="")
    having = [name for name, each in found.items() if each.get("digest") == usual]
    return [_same_data(name, each, usual, having) for name, each in found.items()]


def _same_data(name: str, found: dict[str, str], usual: str, having: list[str]) -> Check:
    if "error" in found:
        return fail("data", name, found["error"], "correct the overrides, or copy the data to that host")
    detail = f"{found['name']}, digest {found['digest'][:8]}"
    if found["digest"] == usual:
        return ok("data", name, detail)
    remedy = "copy the data to that host, or set data.distribute=true where the data has it"
    return fail("data", name, f"{detail}: {', '.join(having[:3])} has {usual[:8]}", remedy)
