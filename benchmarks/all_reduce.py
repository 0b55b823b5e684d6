"""Measures how long a sum over ranks takes, from 4 KiB to 256 MiB, and how near the limit of the link it is.

These ways take turns within one run, on equal buffers that are made again each time, as a step makes its
gradient:

    raw                MLX's own collective
    native bf16 exact  the communicator with each codec: to the form on the wire, over the wire, and back
    average_gradients  `nn.average_gradients`, which divides too
    mpi4py[_in_place]  over MPI: mpi4py's Allreduce into other memory that is used again, and in place
    sockets            over a ring: plain sockets that carry as many bytes both ways, the limit of the link

Bus bandwidth is 2 (n − 1)/n · bytes/time (PERFORMANCE.md of NCCL's tests).
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import local_ranks
import mlx.core as mx
from page import Curves

KIB = 2**10
MIB = 2**20
SIZES = {True: [4 * KIB, 4 * MIB, 16 * MIB], False: [4 * KIB * 4**power for power in range(9)]}  # quick, full
LARGE = MIB  # bandwidth counts for buffers of this size and above, latency for smaller ones
PROGRAM = str(Path(__file__).with_name("all_reduce_ranks.py"))
Times = dict[int, dict[str, list[float]]]  # seconds of each turn, by size in bytes and by way


def over_ring(ranks: int, arguments: list[str]) -> Times:
    with tempfile.TemporaryDirectory() as folder:
        return by_ranks(local_ranks.ring_variables(ranks, Path(folder) / "ring.json"), arguments)


def over_nccl(ranks: int, arguments: list[str]) -> Times:
    return by_ranks(local_ranks.nccl_variables(ranks), arguments)


def by_ranks(variables: list[dict[str, str]], arguments: list[str]) -> Times:
    with tempfile.TemporaryFile("w+") as stdout:
        local_ranks.end(
            local_ranks.start_ranks([sys.executable, PROGRAM, *arguments], variables, stdout=stdout)
        )
        stdout.seek(0)
        return by_size(stdout.read())


def over_mpi(ranks: int, arguments: list[str]) -> Times:
    if not has_mpi():
        raise harness.Failed("MPI needs mpi4py and Open MPI's mpirun")
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = [local_ranks.installed("mpirun"), "-n", str(ranks), "--map-by", ":oversubscribe"]
    done = subprocess.run(
        [*command, *as_root, sys.executable, PROGRAM, *arguments],
        env=local_ranks.environment_of_ranks(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise harness.Failed(f"mpirun ended with status {done.returncode}")
    return by_size(done.stdout)


OVER = {"ring": over_ring, "mpi": over_mpi, "nccl": over_nccl}


def by_size(output: str) -> Times:
    return {int(size): times for size, times in local_ranks.found_in(output).items()}


def ratios(name: str, times: Times, way: str, other: str) -> dict[str, float]:
    """Returns one way's time over another's, turn by turn: a median at each large size, and theirs."""
    by_size = {
        f"{name}_{size // MIB}_MiB": statistics.median(
            a / b for a, b in zip(each[way], each[other], strict=True)
        )
        for size, each in times.items()
        if size >= LARGE
    }
    return {name: statistics.median(by_size.values())} | by_size


def figures_of(backend: str, times: Times, ranks: int) -> dict[str, float]:
    smallest, largest = min(times), max(times)
    bus = 2 * (ranks - 1) / ranks * largest
    figures = {
        f"{backend}_latency_seconds": statistics.median(times[smallest]["native"]),
        f"{backend}_raw_latency_seconds": statistics.median(times[smallest]["raw"]),
        f"{backend}_bus_bytes_per_second": bus / statistics.median(times[largest]["native"]),
    }
    compared = {
        "communicator_over_raw": ("native", "raw"),
        "exact_over_raw": ("exact", "raw"),
        "bf16_over_raw": ("bf16", "raw"),
        "average_gradients_over_raw": ("average_gradients", "raw"),
        "bandwidth_over_mpi4py": ("mpi4py", "native"),
        "bandwidth_over_mpi4py_in_place": ("mpi4py_in_place", "native"),
        "bandwidth_over_sockets": ("sockets", "native"),
    }
    for name, (way, other) in compared.items():
        if way in times[smallest]:
            figures |= ratios(f"{backend}_{name}", times, way, other)
    return figures


def curves_of(backend: str, times: Times, ranks: int) -> Curves:
    ways = list(next(iter(times.values())))
    share = 2 * (ranks - 1) / ranks / 1e9
    return Curves(
        title=f"All-reduce of {ranks} ranks, {backend}",
        x_label="buffer, bytes",
        y_label="bus bandwidth, GB/s",
        x=list(times),
        series={
            way: [share * size / statistics.median(each[way]) for size, each in times.items()] for way in ways
        },
        logarithmic=True,
    )


def has_mpi() -> bool:
    return bool(importlib.util.find_spec("mpi4py") and shutil.which(local_ranks.installed("mpirun")))


def available(ranks: int) -> list[str]:
    """Returns the backends that this machine has for this many ranks."""
    found = ["ring"]
    if has_mpi():
        found.append("mpi")
    else:
        print("MPI is left out: it needs mpi4py and Open MPI's mpirun", file=sys.stderr)
    if mx.distributed.is_available("nccl") and mx.device_count(mx.gpu) >= ranks:
        found.append("nccl")
    return found


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--ranks", type=harness.at_least(2), default=2)
    own.add_argument("--backend", choices=list(OVER), help="only this one, not all that this machine has")
    options = harness.parse("all_reduce", own)
    ranks: int = options.ranks
    backends = [options.backend] if options.backend else available(ranks)

    def measure(quick: bool) -> tuple[dict[str, float], list[Curves]]:
        arguments = [json.dumps(SIZES[quick]), "quick" if quick else "full"]
        times = {backend: OVER[backend](ranks, arguments) for backend in backends}
        figures: dict[str, float] = {}
        for backend, each in times.items():
            figures |= figures_of(backend, each, ranks)
        return figures, [curves_of(backend, each, ranks) for backend, each in times.items()]

    largest = f"_{max(SIZES[False]) // MIB}_MiB"  # a goal holds for the median and for the largest size
    goals = {
        f"{backend}_communicator_over_raw{size}": ("<=", 1.05) for backend in OVER for size in ("", largest)
    } | {
        "mpi_bandwidth_over_mpi4py": (">=", 1.0),
        f"mpi_bandwidth_over_mpi4py{largest}": (">=", 1.0),
    }
    quick = {f"{backend}_communicator_over_raw": ("<=", 1.4) for backend in OVER} | {
        "mpi_bandwidth_over_mpi4py": (">=", 0.7),
    }
    harness.run(options, measure, goals, quick, quick_attempts=3)


if __name__ == "__main__":
    main()
