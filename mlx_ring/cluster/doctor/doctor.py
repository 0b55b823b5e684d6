"""Does the work of `mlx-ring doctor`: finds out whether hosts can train together, before they do.

First every host is examined, all at the same time, by the Python that would run its ranks (`host_probe`).
Then their data is compared. Then, if nothing failed, ranks are started as a run starts them (`trial_launch`).
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
from mlx_ring.cluster.finding import Check, fail, failed, ok, read_result, warn
from mlx_ring.cluster.hosts.host_file import Host, HostFile, read_hostfile
from mlx_ring.cluster.hosts.host_link import HostLost
from mlx_ring.cluster.hosts.on_hosts import ask
from mlx_ring.cluster.hosts.probe_link import Facts, ProbeLink, Probes, probes
from mlx_ring.cluster.hosts.ssh import HERE, LOOPBACK, own_program
from mlx_ring.config.compose import compose_run
from mlx_ring.config.typed_text import sets
from mlx_ring.errors import ClusterError, ConfigError, MlxRingError

REACH = "try by hand: ssh -o BatchMode=yes {host} true must say nothing and ask nothing"
CHANGED_KEY = "its key has changed: if that is right, ssh-keygen -R {host}, then ssh {host} once"
UNKNOWN_KEY = "its key is unknown here: ssh {host} once, compare the key, and say yes"
FOLDER = "mlx-ring hosts sync FILE copies this folder there"
INTERPRETER = "mlx-ring hosts sync FILE makes the environment there; or give --python"
REMEDIES = (  # by words in the message of ssh or of the other side; the first that fits is given
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
class PlannedRun:
    """The run that the hosts are examined for."""

    overrides: list[str]
    directory: str
    distributes: bool  # whether rank 0 sends its data to hosts that lack it

    @staticmethod
    def from_overrides(overrides: list[str]) -> "PlannedRun":
        """Raises: ConfigError if the overrides have a mistake."""
        if not any(sets(item, "run.dir") for item in overrides):
            overrides = [*overrides, "run.dir=outputs/doctor"]  # nothing makes this folder
        config = compose_run(*overrides)
        distributes = getattr(config.data, "distribute", False)
        return PlannedRun(overrides=overrides, directory=config.run.dir, distributes=distributes)


def examine(hostfile: Path | None, python: str, overrides: list[str]) -> Iterator[Check]:
    """Yields the findings about the hosts of a host file, or about this machine, each group when it is done.

    Args:
        hostfile: the host file; None examines this machine.
        python: the interpreter that would run the ranks.
        overrides: those of train.py; the data they name is compared.

    Raises: ConfigError if the overrides have a mistake. Everything else that goes wrong is a finding.
    """
    planned = PlannedRun.from_overrides(overrides)
    try:
        file = read_hostfile(hostfile) if hostfile is not None else _this_machine()
    except ConfigError as error:
        yield fail("host file", socket.gethostname(), str(error), "correct it; mlx-ring hosts makes one")
        return
    try:
        yield from map(_with_own_name, _examine(file, hostfile, python, planned))
    except MlxRingError as error:
        yield fail(
            "doctor", socket.gethostname(), str(error), "run the doctor again; if it stays, look at that host"
        )


def _this_machine() -> HostFile:
    """Returns a host file with the ranks of a trial launch, all on this machine."""
    here = Host(ssh=LOOPBACK, ips=(LOOPBACK,))
    return HostFile(hosts=(here,) * LOCAL_RANKS, envs={}, backend=None)


def _examine(file: HostFile, hostfile: Path | None, python: str, planned: PlannedRun) -> Iterator[Check]:
    """Yields the findings about hosts, then about data, then about a launch."""
    checks, able = asyncio.run(_examine_hosts(file, python, planned))
    yield from checks
    data_checks = asyncio.run(_compare_data(file, python, planned, able))
    yield from data_checks
    if failed([*checks, *data_checks]):
        yield warn("launch", LOOPBACK, "not tried", "mend what failed above, then run the doctor again")
    else:
        yield from asyncio.run(launch(hostfile, python))


def _with_own_name(check: Check) -> Check:
    """Replaces localhost with this machine's own name."""
    return replace(check, host=socket.gethostname()) if check.host in HERE else check


async def _examine_hosts(file: HostFile, python: str, planned: PlannedRun) -> tuple[list[Check], list[str]]:
    """Examines hosts and links. Returns: the findings; and the hosts that have what is installed here."""
    async with probes([LOOPBACK], python=sys.executable, environment={}) as (own, problems):
        if problems:
            raise ClusterError(f"this machine cannot be examined: {problems[LOOPBACK]}")
        here = await own[LOOPBACK].ask("facts", folder=planned.directory)
    async with probes(file.names, python=python, environment=file.envs) as (links, problems):
        found = await _ask_facts(links, problems, planned.directory)
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


async def _ask_facts(links: Probes, problems: dict[str, str], directory: str) -> dict[str, Facts]:
    """Returns the facts of every host that answers; for the others, adds the reason to `problems`."""

    async def ask_host(link: ProbeLink) -> dict[str, Any]:
        try:
            return await link.ask("facts", folder=directory)
        except HostLost as lost:
            problems[link.host] = str(lost)
            return {}

    answers = await asyncio.gather(*map(ask_host, links.values()))
    return {name: facts for name, facts in zip(links, answers, strict=True) if facts}


def _reached(name: str, problems: dict[str, str], found: dict[str, Facts]) -> Check:
    """Says whether a host was reached, and is not a machine that another name means too."""
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
    """Compares a host's clock with the middle of question and answer, in the shortest of three tries."""
    tries: list[tuple[float, float]] = []
    for _ in range(3):
        start = time.time()
        there = (await link.ask("clock"))["time"]
        end = time.time()
        tries.append((end - start, there - (start + end) / 2))
    took, ahead = min(tries)
    return host_checks.skew(link.host, ahead, took / 2)


async def _compare_data(file: HostFile, python: str, planned: PlannedRun, names: list[str]) -> list[Check]:
    """Checks that these hosts hold the data of the run. If rank 0 sends it, only rank 0's host must."""
    if planned.distributes:
        names = [name for name in names if name == file.hosts[0].ssh]
    command = own_program(python, "mlx_ring.run.data_digest", *planned.overrides)
    # No time limit: the program itself gives up if it makes no progress.
    answers = await asyncio.gather(*(ask(name, command, file.envs) for name in names))
    found: dict[str, dict[str, str]] = {}
    for answer in answers:
        lines = answer.stderr.splitlines() or [f"status {answer.status}"]
        found[answer.host] = read_result(answer.stdout.decode(errors="replace")) or {"error": lines[-1]}
    digests = [each["digest"] for each in found.values() if "digest" in each]
    most_common = max(digests, key=digests.count, default="")
    having = [name for name, each in found.items() if each.get("digest") == most_common]
    return [_same_data(name, each, most_common, having) for name, each in found.items()]


def _same_data(name: str, found: dict[str, str], expected: str, having: list[str]) -> Check:
    """Compares the data of one host with the digest that most hosts have; `having` names those hosts."""
    if "error" in found:
        return fail("data", name, found["error"], "correct the overrides, or copy the data to that host")
    detail = f"{found['name']}, digest {found['digest'][:8]}"
    if found["digest"] == expected:
        return ok("data", name, detail)
    remedy = "copy the data to that host, or set data.distribute=true if this kind of data has it"
    return fail("data", name, f"{detail}: {', '.join(having[:3])} has {expected[:8]}", remedy)
