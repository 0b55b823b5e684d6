"""How long a sum over ranks takes, from 4 KiB to 256 MiB, and how far from the link's limit it is.

In one run, taking turns on the same buffers, each made anew as a step makes its gradient: MLX's own
collective, raw; the communicator with each codec (to the wire's form, over it, and back);
`nn.average_gradients`; over MPI `mpi4py`'s Allreduce, into memory that stays and in place; and a pair of
plain sockets that carry as many bytes both ways, which is the limit of the link (neither over NCCL, where
each rank has a GPU). `average_gradients` divides too. Bus bandwidth is 2 (n − 1)/n · bytes/time (NCCL tests,
PERFORMANCE.md).
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

KIB, MIB = 2**10, 2**20
SIZES = {True: [4 * KIB, 256 * KIB, 4 * MIB, 16 * MIB], False: [4 * KIB * 4**power for power in range(9)]}
LARGE = MIB  # from here on bandwidth counts, below it latency
PROGRAM = str(Path(__file__).with_name("all_reduce_ranks.py"))
Times = dict[int, dict[str, list[float]]]  # seconds by size and way, a turn after another


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
    """One way's time over another's: the median over turns at each large size, and that of those."""
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
    """The backends that this machine has for so many ranks."""
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
    own.add_argument("--backend", choices=list(OVER), help="only this one, and not all that are here")
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

    largest = f"_{max(SIZES[False]) // MIB}_MiB"  # with the median, that small and large ones must hold
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
