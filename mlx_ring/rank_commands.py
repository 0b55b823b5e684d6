"""The command lines that start ranks. No mlx here."""

import os
from pathlib import Path

from mlx_ring.host_file import Host


def rank_program(python: str, overrides: list[str]) -> list[str]:
    """A rank's command line: the installed command `train.py` beside that interpreter."""
    return [python, str(Path(python).with_name("train.py")), *overrides]


def mpirun_command(python: str, hosts: list[Host]) -> list[str]:
    """Open MPI's own start of one rank a host entry; its mpirun may be installed beside the interpreter."""
    beside = Path(python).with_name("mpirun")
    command = [str(beside) if beside.exists() else "mpirun", "-n", str(len(hosts))]
    command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    names = list(dict.fromkeys(host.ssh for host in hosts))
    if len(names) > 1:
        slots = ",".join(f"{name}:{sum(host.ssh == name for host in hosts)}" for name in names)
        return [*command, "--host", slots]
    return [*command, "--map-by", ":oversubscribe"]
