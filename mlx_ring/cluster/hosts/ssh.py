"""Says how a command is run on a host: as it is on this machine, through ssh on another."""

import os
import shlex
from pathlib import Path

NO_FOLDER, NO_PYTHON, SSH_FAILED = 96, 97, 255  # exit statuses of `remote_command`, and of ssh itself
LOCALHOST = "localhost"
LOOPBACK = "127.0.0.1"
HERE = (LOCALHOST, LOOPBACK)  # the names in a host file that mean this machine, without ssh
SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5",
    "-o", "ServerAliveCountMax=3", "-o", "ForwardAgent=no", "-o", "ForwardX11=no", "--",
)  # fmt: skip


def own_program(python: str, module: str, *arguments: str) -> list[str]:
    """Gives the command that runs a module of mlx_ring, no matter what lies in the folder where it starts.

    Without -P, Python would look there first: a user's `random.py` would stand in for Python's own.
    """
    return [python, "-P", "-m", module, *arguments]


def on_host(
    host: str, command: list[str], environment: dict[str, str], *, anywhere: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Gives the local command that runs `command` on a host.

    Args:
        host: The host as ssh calls it, or one of `HERE`.
        command: The program and its arguments.
        environment: The host file's variables, which the program gets in addition.
        anywhere: Run it in the user's home folder there, not in the folder of the same name as this one.

    Returns: The command to start on this machine, and all of its environment.
    """
    if host in HERE:
        return command, os.environ | environment
    return [*SSH, host, remote_command(command, environment, anywhere=anywhere)], dict(os.environ)


def remote_command(command: list[str], environment: dict[str, str], *, anywhere: bool = False) -> str:
    """Gives the line that ssh hands to the other host's shell; its arguments are those of `on_host`.

    The variables stand in the line, so other users of that host can see them in its list of processes.
    """
    names = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
    enter = "" if anywhere else f"cd {shlex.quote(str(Path.cwd()))} || exit {NO_FOLDER}; "
    return (
        f"{enter}command -v {shlex.quote(command[0])} >/dev/null || exit {NO_PYTHON}; "
        f"{'export ' + names + '; ' if names else ''}exec {shlex.join(command)}"
    )


def ssh_problem(status: int, python: str, said: str) -> str:
    """Says why a host could not run a `remote_command`; empty if it ran.

    Args:
        status: The exit status of ssh.
        python: The program that was to run there.
        said: What ssh printed on stderr.
    """
    if "Unknown option: -P" in said:
        return f"its {python} is older than Python 3.11; install a newer one there, or give --python"
    if status == NO_FOLDER:
        return f"it has no folder {Path.cwd()}; mlx_ring works in the folder of the same name on every host"
    if status == NO_PYTHON:
        return f"it has no {python}; install mlx_ring there at the same place, or give --python"
    return f"ssh failed: {said or 'no reason given'}" if status == SSH_FAILED else ""
