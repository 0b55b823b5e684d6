"""A launch of ranks as of a run, to see whether hosts do what they should: `mlx-ring doctor`. No mlx here.

The ranks are `doctor_ranks`. One a line of the host file joins, measures, and the last leaves with FAREWELL.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

from mlx_ring.cluster.finding import Check, fail, found_in, ok, warn
from mlx_ring.cluster.hosts.host_file import Host
from mlx_ring.cluster.hosts.ssh import LOOPBACK
from mlx_ring.cluster.supervisor.attempt import Attempt, Outcome
from mlx_ring.cluster.supervisor.host_pool import HostPool
from mlx_ring.errors import ClusterError, ConfigError

LOCAL_RANKS = 2  # where no host file is given
LAUNCH_SECONDS = 180.0  # for all of it
SLOW_LATENCY_SECONDS = 0.005
FAREWELL = 42  # the status that the last rank leaves with; none of ours
REMEDY = (
    "a run would end the same way; try there: python -m mlx_ring.communication.selftest, "
    "which is one rank alone"
)


class _Lines:
    """What ranks print."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, stream: str, line: str) -> None:
        self.lines.append(line)


async def launch(hostfile: Path | None, python: str) -> list[Check]:
    """On the hosts of a host file, or on this machine. Returns: what was found."""
    output, said = _Lines(), list[str]()
    pool = HostPool(hostfile, LOCAL_RANKS, python, said.append)
    program = [python, "-m", "mlx_ring.communication.selftest"]
    start = time.monotonic()
    try:
        async with asyncio.timeout(LAUNCH_SECONDS):
            hosts = await pool.answering()
            if pool.problems:
                raise ClusterError("; ".join(pool.problems.values()))
            attempt = Attempt(
                hosts, pool.links, pool.reports, program=program, mpirun=None, reached_step=0,
                deadline_seconds=LAUNCH_SECONDS, output=output, say=said.append,
            )  # fmt: skip
            outcome = await attempt.run([])
    except (ClusterError, ConfigError, TimeoutError) as error:
        why = str(error) or f"no end after {LAUNCH_SECONDS:g} s"
        return [fail("launch", LOOPBACK, why, REMEDY)]
    finally:
        await pool.close()
    return _of_launch(outcome, output.lines, hosts, time.monotonic() - start)


def _of_launch(outcome: Outcome, lines: list[str], hosts: list[Host], seconds: float) -> list[Check]:
    found = found_in("\n".join(lines))
    if found is None:
        failure = outcome.failure
        why = failure.message if failure else "; ".join(["the ranks said nothing", *lines[-3:]])
        guilty = failure.host if failure and failure.host else LOOPBACK
        if failure and failure.rank is not None:
            guilty = hosts[failure.rank].ssh
        return [fail("launch", guilty, why, REMEDY)]
    several = f"{len(hosts)} rank{'s' if len(hosts) > 1 else ''}"
    checks = [ok("launch", LOOPBACK, f"{several} joined and left in {seconds:.1f} s")]
    if len(hosts) > 1:
        checks += _of_collectives(found)
    return [*checks, _of_exit(outcome, len(hosts) - 1, hosts[-1].ssh)]


def _of_exit(outcome: Outcome, rank: int, host: str) -> Check:
    failure, left = outcome.failure, f"rank {rank} left with {FAREWELL}"
    if failure is not None and (failure.rank, failure.status) == (rank, FAREWELL):
        return ok("exit status", host, f"{left}, and so it was told")
    came = f"{failure.status} of rank {failure.rank}: {failure.message}" if failure else str(outcome.status)
    remedy = "a shell or a wrapper there changes exit statuses"
    return fail("exit status", host, f"{left}; what came here is {came}", remedy)


def _of_collectives(found: dict[str, Any]) -> list[Check]:
    bits, microseconds = found["bytes_per_second"] * 8, found["latency_seconds"] * 1e6
    size, here = found["bytes"] // 2**20, LOOPBACK
    right = ok("all-reduce", here, "a sum of integers is right on every rank")
    if not found["right"]:
        remedy = "a machine or its memory computes wrongly, or MLX does: do not train on these hosts"
        right = fail("all-reduce", here, "a sum of integers came out wrong", remedy)
    latency = ok("latency", here, f"{microseconds:.0f} µs for an all-reduce of 4 bytes")
    if found["latency_seconds"] > SLOW_LATENCY_SECONDS:
        remedy = "a cable instead of Wi-Fi; more ranks on a machine than cores wait for one another too"
        latency = warn("latency", here, latency.detail, remedy)
    bandwidth = ok("bandwidth", here, f"{bits / 1e9:.2f} Gbit/s of the bus for an all-reduce of {size} MiB")
    return [right, latency, bandwidth]
