"""Starts ranks as a run does, to see whether the hosts can: the last part of `mlx-ring doctor`.

There is a rank for every entry of the host file. The ranks run `mlx_ring.communication.selftest`: they join,
measure, and leave; the last one leaves with the exit status FAREWELL, which must arrive here.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

from mlx_ring.cluster.finding import Check, fail, ok, read_result, warn
from mlx_ring.cluster.hosts.host_file import Host
from mlx_ring.cluster.hosts.ssh import LOOPBACK, own_program
from mlx_ring.cluster.limits import LAUNCH_SECONDS
from mlx_ring.cluster.supervisor.attempt import Attempt, Outcome
from mlx_ring.cluster.supervisor.host_pool import HostPool
from mlx_ring.errors import ClusterError, ConfigError

LOCAL_RANKS = 2  # if no host file is given
SLOW_LATENCY_SECONDS = 0.005
FAREWELL = 42  # the exit status of the last rank; no run ends with it
REMEDY = (
    "a run would end the same way; try there: python -P -m mlx_ring.communication.selftest, "
    "which starts one rank alone"
)


class _Lines:
    """Keeps the lines that ranks print."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, stream: str, line: str) -> None:
        self.lines.append(line)


async def launch(hostfile: Path | None, python: str) -> list[Check]:
    """Starts ranks on the hosts of a host file, or on this machine. Returns: the findings."""
    output = _Lines()
    said: list[str] = []
    pool = HostPool(hostfile, LOCAL_RANKS, python, said.append)
    program = own_program(python, "mlx_ring.communication.selftest")
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
    return _judge_launch(outcome, output.lines, hosts, time.monotonic() - start)


def _judge_launch(outcome: Outcome, lines: list[str], hosts: list[Host], seconds: float) -> list[Check]:
    """Judges how a launch of ranks ended, and what they measured."""
    measured = read_result("\n".join(lines))
    if measured is None:
        failure = outcome.failure
        why = failure.message if failure else "; ".join(["the ranks said nothing", *lines[-3:]])
        guilty = failure.host if failure and failure.host else LOOPBACK
        if failure and failure.rank is not None:
            guilty = hosts[failure.rank].ssh
        return [fail("launch", guilty, why, REMEDY)]
    several = f"{len(hosts)} rank{'s' if len(hosts) > 1 else ''}"
    checks = [ok("launch", LOOPBACK, f"{several} joined and left in {seconds:.1f} s")]
    if len(hosts) > 1:
        checks += _judge_collectives(measured)
    return [*checks, _judge_exit(outcome, len(hosts) - 1, hosts[-1].ssh)]


def _judge_exit(outcome: Outcome, rank: int, host: str) -> Check:
    """Checks that the exit status of the last rank arrived here."""
    failure = outcome.failure
    left = f"rank {rank} left with {FAREWELL}"
    if failure is not None and (failure.rank, failure.status) == (rank, FAREWELL):
        return ok("exit status", host, f"{left}, and that status arrived here")
    came = f"{failure.status} of rank {failure.rank}: {failure.message}" if failure else str(outcome.status)
    remedy = "a shell or a wrapper there changes exit statuses"
    return fail("exit status", host, f"{left}; what arrived here is {came}", remedy)


def _judge_collectives(measured: dict[str, Any]) -> list[Check]:
    """Judges the sum, the latency and the bandwidth that the ranks measured."""
    bits = measured["bytes_per_second"] * 8
    microseconds = measured["latency_seconds"] * 1e6
    size_mib = measured["bytes"] // 2**20
    here = LOOPBACK
    right = ok("all-reduce", here, "a sum of integers is right on every rank")
    if not measured["right"]:
        remedy = "a machine, its memory or MLX computes wrongly: do not train on these hosts"
        right = fail("all-reduce", here, "a sum of integers came out wrong", remedy)
    latency = ok("latency", here, f"{microseconds:.0f} µs for an all-reduce of 4 bytes")
    if measured["latency_seconds"] > SLOW_LATENCY_SECONDS:
        remedy = "use a cable instead of Wi-Fi; more ranks than cores on a machine wait for one another too"
        latency = warn("latency", here, latency.detail, remedy)
    bandwidth = ok(
        "bandwidth", here, f"{bits / 1e9:.2f} Gbit/s of the bus for an all-reduce of {size_mib} MiB"
    )
    return [right, latency, bandwidth]
