"""Runs a command with OpenBLAS in place of the BLAS in MLX's wheel for Linux CPUs.

`python -m mlx_ring.cluster.rank.openblas THREADS COMMAND …` finds the library of the host on which it
runs. The caller gives the number of threads, because the bits of results depend on it.
"""

import ctypes.util
import os
import socket
import sys
from typing import NoReturn

from mlx_ring.errors import ConfigError


def environment(threads: int) -> dict[str, str]:
    """Gives the environment variables that preload OpenBLAS with this many threads.

    Raises: ConfigError if this host has no OpenBLAS, or is no Linux host.
    """
    if sys.platform != "linux":
        raise ConfigError(
            f"--openblas is for Linux CPUs, and {socket.gethostname()} runs {sys.platform}, where MLX has "
            "Accelerate; leave it out"
        )
    library = ctypes.util.find_library("openblas")
    if library is None:
        raise ConfigError(
            f"--openblas: {socket.gethostname()} has no libopenblas; apt-get install libopenblas0-pthread "
            "there, or leave --openblas out"
        )
    before = os.environ.get("LD_PRELOAD", "")
    number = str(threads)
    return {
        "LD_PRELOAD": f"{library} {before}".strip(),
        "OPENBLAS_NUM_THREADS": number,
        "OMP_NUM_THREADS": number,  # which a build of OpenBLAS with OpenMP reads
    }


def main() -> NoReturn:
    """Becomes the command of the command line."""
    threads, *command = sys.argv[1:]
    try:
        os.execvpe(command[0], command, os.environ | environment(int(threads)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
