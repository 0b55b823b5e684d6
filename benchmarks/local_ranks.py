"""Starts the ranks of a benchmark on this machine: one process each, on free ports or on a GPU of its own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
from harness import Failed

from mlx_ring.cluster.finding import FOUND

LAST_WORDS_SECONDS = 10.0  # that the other ranks get to print their errors once one has failed


def installed(command: str) -> str:
    """Returns the path of a command of this environment, or else its bare name, to be found on PATH."""
    beside = Path(sys.executable).with_name(command)
    return str(beside) if beside.exists() else command


def environment_of_ranks(**more: str) -> dict[str, str]:
    """Returns this process's environment with the variables `more`, and without those that a launcher set."""
    launched = ("MLX_", "OMPI_COMM", "PMIX_", "PMI_")
    return {key: value for key, value in os.environ.items() if not key.startswith(launched)} | more


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def ring_variables(world_size: int, hostfile: Path) -> list[dict[str, str]]:
    """Returns the variables of each rank of a ring on this machine, as mlx.launch sets them.

    Writes the ranks' addresses to `hostfile`.
    """
    addresses = [[f"127.0.0.1:{port}"] for port in free_ports(world_size)]
    hostfile.write_text(json.dumps(addresses) if world_size > 1 else "")  # empty: one rank
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)} for rank in range(world_size)]


def gpu(place: int) -> dict[str, str]:
    """Returns the variable that shows a process one GPU only: number `place` of those this process sees.

    Raises: Failed if this process sees fewer GPUs.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(number) for number in range(mx.device_count(mx.gpu))]
    if place >= len(names):
        raise Failed(
            f"rank {place} needs a GPU of its own, and this machine shows {len(names)}; lower --ranks"
        )
    return {"CUDA_VISIBLE_DEVICES": names[place]}


def nccl_variables(world_size: int) -> list[dict[str, str]]:
    """Returns the variables of each rank on a GPU of its own, as mlx.launch sets them.

    Raises: Failed if there are fewer GPUs than ranks.
    """
    gpus = [gpu(rank) for rank in range(world_size)]
    (port,) = free_ports(1)
    common = {"MLX_WORLD_SIZE": str(world_size), "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(port)}
    return [common | gpus[rank] | {"MLX_RANK": str(rank)} for rank in range(world_size)]


def start_ranks(
    command: list[str],
    variables: list[dict[str, str]],
    *,
    silent: bool = False,
    stdin: int = subprocess.DEVNULL,
    stdout: IO[str] | int | None = None,
) -> list[subprocess.Popen]:
    """Starts one process of `command` for each rank's variables.

    If one fails, the others are killed a little later, when they have printed their errors: over NCCL they
    would wait for it for ever.
    """
    ranks = [
        subprocess.Popen(
            command,
            env=environment_of_ranks(**own),
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL if silent else None,
            text=True,
        )
        for own in variables
    ]

    def follow(rank: subprocess.Popen) -> None:
        if rank.wait():
            for other in ranks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    other.wait(LAST_WORDS_SECONDS)
                other.kill()

    for rank in ranks:
        threading.Thread(target=follow, args=[rank], daemon=True).start()
    return ranks


def start_ring(
    command: list[str],
    world_size: int,
    hostfile: Path,
    *,
    silent: bool = False,
    stdout: IO[str] | None = None,
) -> list[subprocess.Popen]:
    """Starts the ranks of one ring on free ports of this machine. Each runs `command`."""
    return start_ranks(command, ring_variables(world_size, hostfile), silent=silent, stdout=stdout)


def found_in(text: str) -> Any:
    """Returns the JSON that exactly one of the ranks printed, in one line that begins with FOUND."""
    (line,) = [line for line in text.splitlines() if FOUND in line]
    return json.loads(line.partition(FOUND)[2])


def end(ranks: list[subprocess.Popen], timeout_seconds: float = 900) -> None:
    """Waits until all ranks have ended.

    Raises: Failed if any of them ended with a status other than 0.
    """
    try:
        statuses = [rank.wait(timeout_seconds) for rank in ranks]
        if any(statuses):
            raise Failed(f"ranks ended with statuses {statuses}")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
