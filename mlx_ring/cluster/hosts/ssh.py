"""How a command is run on a host, here or through ssh. No mlx here."""

import os
import shlex
from pathlib import Path

NO_FOLDER, NO_PYTHON, SSH_FAILED = 96, 97, 255  # exit statuses
HERE = ("localhost", "127.0.0.1")
SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5",
    "-o", "ServerAliveCountMax=3", "-o", "ForwardAgent=no", "-o", "ForwardX11=no", "--",
)  # fmt: skip


def on_host(
    host: str, command: list[str], environment: dict[str, str], *, anywhere: bool = False
) -> tuple[list[str], dict[str, str]]:
    """The command that runs `command` on a host with the host file's variables, and its own environment.

    It runs in the folder of this name, or, `anywhere`, in the user's own.
    """
    if host in HERE:
        return command, os.environ | environment
    return [*SSH, host, remote_command(command, environment, anywhere=anywhere)], dict(os.environ)


def remote_command(command: list[str], environment: dict[str, str], *, anywhere: bool = False) -> str:
    """The line that ssh hands to the other host's shell; `environment` is the host file's, shown there."""
    names = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
    go = "" if anywhere else f"cd {shlex.quote(str(Path.cwd()))} || exit {NO_FOLDER}; "
    return (
        f"{go}command -v {shlex.quote(command[0])} >/dev/null || exit {NO_PYTHON}; "
        f"{'export ' + names + '; ' if names else ''}exec {shlex.join(command)}"
    )


def ssh_problem(status: int, python: str, said: str) -> str:
    """Why a `remote_command` could not be run, from the exit status of ssh; nothing where it was."""
    if status == NO_FOLDER:
        return f"it has no folder {Path.cwd()}; mlx_ring works in the folder of the same name on every host"
    if status == NO_PYTHON:
        return f"it has no {python}; install mlx_ring there at the same place, or give --python"
    return f"ssh failed: {said or 'no reason given'}" if status == SSH_FAILED else ""
