"""The command `mlx-ring doctor`: whether hosts can train together, before they are to. No mlx here.

First every host is looked at, all at once, by the Python that would run its ranks (`host_probe`); then, where
nothing failed, ranks are launched as those of a run are, and what they do is compared with what they should.
"""

import asyncio
import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_ring import host_checks
from mlx_ring.check import Check, fail, failed, ok, warn
from mlx_ring.composition import compose_run
from mlx_ring.errors import ConfigError
from mlx_ring.host_file import Host, HostFile, read_hostfile
from mlx_ring.launcher import HERE
from mlx_ring.link_checks import address_checks, link_checks
from mlx_ring.on_hosts import ask
from mlx_ring.probe_link import HostLost, ProbeLink, Probes, probes
from mlx_ring.trial_launch import LOCAL_RANKS, launch

REACH = "try by hand: ssh -o BatchMode=yes {host} true must say nothing and ask nothing"
REMEDIES = (  # by what ssh or the other side says
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its key is another one now: if that is right, ssh-keygen -R {host}",
    ),
    (
        "Host key verification failed",
        "its key is unknown here: ssh {host} once, compare the key, and say yes",
    ),
    ("Permission denied", "it does not take this user's key: ssh-copy-id {host}"),
    ("Could not resolve", "correct its name in the host file, or in ssh's config"),
    ("cannot be run", "give an interpreter that is there, with --python"),
    ("refused", "switch Remote Login (sshd) on there"),
    ("it has no folder", "mlx-ring hosts sync FILE copies this folder there"),
    ("it has no ", "mlx-ring hosts sync FILE makes the environment there; or give --python"),
)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What is to be looked at: the hosts of a host file, or this machine."""

    hostfile: Path | None
    python: str
    overrides: list[str]  # of the run that is meant; its data is compared
    directory: str  # of that run

    def read(self) -> HostFile:
        """Raises: ConfigError for a host file with a mistake."""
        if self.hostfile is not None:
            return read_hostfile(self.hostfile)
        here = Host(ssh=HERE[1], ips=(HERE[1],))
        return HostFile(hosts=(here,) * LOCAL_RANKS, envs={}, backend=None)


def examination(hostfile: Path | None, python: str, overrides: list[str]) -> Examination:
    """Raises: ConfigError for overrides with a mistake."""
    if not any(item.startswith("run.dir=") for item in overrides):
        overrides = [*overrides, "run.dir=outputs/doctor"]  # where nothing is written
    directory = compose_run(*overrides).record["run"]["dir"]
    return Examination(hostfile=hostfile, python=python, overrides=overrides, directory=directory)


def examine(examination: Examination) -> Iterator[Check]:
    """All checks, as they are done."""
    try:
        file = examination.read()
    except ConfigError as error:
        yield fail("host file", socket.gethostname(), str(error), "correct it; mlx-ring hosts makes one")
        return
    checks = asyncio.run(_look(examination, file))
    yield from map(_named, checks)
    if failed(checks):
        yield warn("launch", socket.gethostname(), "not tried", "mend what failed above, then ask again")
        return
    yield from map(_named, asyncio.run(launch(examination.hostfile, examination.python)))


def _named(check: Check) -> Check:
    """With this machine's own name, where it is meant."""
    if check.host not in HERE:
        return check
    return replace(check, host=socket.gethostname())


async def _look(examination: Examination, file: HostFile) -> list[Check]:
    async with probes([HERE[1]], python=sys.executable, environment={}) as (own, _):
        here = await own[HERE[1]].ask("facts", folder=examination.directory)
    able: list[str] = []
    async with probes(file.names, python=examination.python, environment=file.envs) as (links, problems):
        found = await _facts(links, problems, examination.directory)
        checks = [_reached(name, problems, found) for name in file.names]
        checks += host_checks.judge(found, here)
        checks += address_checks(file.hosts, found)
        reached = {name: links[name] for name in found}
        try:
            checks += await asyncio.gather(*(_clock(link) for link in reached.values()))
            checks += await link_checks(file.hosts, reached, found)
        except HostLost as lost:
            checks.append(fail("reachable", lost.host, str(lost), REACH.format(host=lost.host)))
        version = here["packages"]["mlx-ring"]
        able = [name for name, facts in found.items() if facts["packages"]["mlx-ring"] == version]
    return [*checks, *await _data(examination, file, able)]


async def _facts(links: Probes, problems: dict[str, str], directory: str) -> dict[str, dict[str, Any]]:
    """Of every host that tells them; why another does not goes to `problems`."""

    async def one(link: ProbeLink) -> dict[str, Any]:
        try:
            return await link.ask("facts", folder=directory)
        except HostLost as lost:
            problems[link.host] = str(lost)
            return {}

    told = await asyncio.gather(*map(one, links.values()))
    return {name: facts for name, facts in zip(links, told, strict=True) if facts}


def _reached(name: str, problems: dict[str, str], found: dict[str, Any]) -> Check:
    if why := problems.get(name):
        remedy = next((remedy for words, remedy in REMEDIES if words in why), REACH)
        return fail("reachable", name, why, remedy.format(host=name))
    twin = next((other for other in found if found[other]["machine"] == found[name]["machine"]), name)
    if twin != name:
        remedy = "list one name twice instead, for two ranks there"
        return fail("reachable", name, f"it is the same machine as {twin}", remedy)
    return ok("reachable", name, "this machine" if name in HERE else f"as {found[name]['host']}")


async def _clock(link: ProbeLink) -> Check:
    """Against the middle of the question and its answer; the shortest of three."""
    tries: list[tuple[float, float]] = []
    for _ in range(3):
        start = time.time()
        there = (await link.ask("time"))["time"]
        end = time.time()
        tries.append((end - start, there - (start + end) / 2))
    took, ahead = min(tries)
    return host_checks.skew(link.host, ahead, took / 2)


async def _data(examination: Examination, file: HostFile, names: list[str]) -> list[Check]:
    """Whether all hosts hold the data that the run would draw from. Of hosts with this version."""
    command = [examination.python, "-m", "mlx_ring.data_digest", *examination.overrides]
    answers = await asyncio.gather(*(ask(name, command, file.envs) for name in names))
    found: dict[str, dict[str, str]] = {}
    for answer in answers:
        try:
            found[answer.host] = json.loads(answer.stdout)
        except ValueError:
            found[answer.host] = {
                "error": " ".join(answer.stderr.split())[-300:] or f"status {answer.status}"
            }
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
