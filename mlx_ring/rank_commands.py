"""The command lines that start ranks. No mlx here."""

import os
from pathlib import Path


def rank_program(python: str, overrides: list[str], openblas_threads: int | None) -> list[str]:
    """A rank's command line: the installed `train.py` beside that interpreter, with OpenBLAS where its
    threads are given."""
    program = [python, str(Path(python).with_name("train.py")), *overrides]
    if openblas_threads is None:
        return program
    return [python, "-m", "mlx_ring.openblas", str(openblas_threads), *program]


def mpirun_command(python: str, ranks: int) -> list[str]:
    """Open MPI's own start of ranks on this machine; its mpirun may be installed beside the interpreter."""
    beside = Path(python).with_name("mpirun")
    command = [str(beside) if beside.exists() else "mpirun", "-n", str(ranks), "--map-by", ":oversubscribe"]
    return [*command, "--allow-run-as-root"] if os.geteuid() == 0 else command
