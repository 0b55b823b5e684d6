"""Makes a host file for Macs with Thunderbolt cables between them, with MLX's `mlx.distributed_config`."""

import subprocess
import sys
import tempfile
from pathlib import Path

from mlx_ring.cluster.hosts.host_file import HostFile, check_ssh_name, read_hostfile
from mlx_ring.errors import ClusterError, ConfigError

PROGRAM = "mlx.distributed_config"


def configure(names: list[str], *, auto_setup: bool) -> HostFile:
    """Has mlx.distributed_config find the cables, order a ring by them, and give their ends addresses.

    Args:
        names: the Macs as ssh calls them.
        auto_setup: whether it sets the addresses itself; otherwise it shows the commands, one Mac at a time.

    Raises: ConfigError if it cannot be run; ClusterError if it finds no ring.
    """
    for name in names:
        check_ssh_name("mlx-ring hosts thunderbolt", name)
    if not auto_setup and not sys.stdin.isatty():
        raise ConfigError(
            f"{PROGRAM} shows each Mac's commands and waits for Enter; type this in a terminal, or give "
            "--auto-setup"
        )
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "hosts.json"
        command = [
            str(Path(sys.executable).with_name(PROGRAM)), "--over", "thunderbolt", "--backend", "ring",
            "--hosts", ",".join(names), "--output-hostfile", str(made),
            *(["--auto-setup"] if auto_setup else []),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be run: {error.strerror}; it comes with MLX") from None
        if done.returncode or not made.exists():
            *_, last = ["no reason given", *done.stderr.splitlines()]
            raise ClusterError(
                f"{PROGRAM} ended with status {done.returncode} and made no host file: {last}; it needs "
                "Macs, each with a Thunderbolt cable to the next"
            )
        print(done.stderr, file=sys.stderr, end="")
        return read_hostfile(made)
