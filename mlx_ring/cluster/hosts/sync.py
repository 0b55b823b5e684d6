"""Copies this folder to every host of a host file with rsync, and makes its environment with `uv sync`."""

import asyncio
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx_ring
from mlx_ring.cluster.finding import Check, fail, ok
from mlx_ring.cluster.hosts.host_file import HostFile
from mlx_ring.cluster.hosts.on_hosts import Answer, ask, run
from mlx_ring.cluster.hosts.ssh import HERE, NO_PYTHON, SSH, SSH_FAILED, ssh_problem
from mlx_ring.errors import ConfigError

# The digests of mlx_ring cover these folders: a file that is gone from them here must be removed there too.
PACKAGES = ("mlx_ring", "hydra_plugins", "conf")
TOKEN = ".mlx_ring_sync-"
IGNORED = ("/.venv", "/outputs", "/multirun", "__pycache__", ".env")  # not copied if git is not there to ask
COPIED = r"uv\.lock|[^/]+\.py"  # files that are copied although git ignores them
UV_PATH = "~/.local/bin:~/.cargo/bin:/opt/homebrew/bin:$PATH"  # where the installers of uv put it
NO_UV = 98  # exit status
UV_REMEDY = "install uv there: pip install --user uv, or another way that its site names"


def sync(file: HostFile, *, environment: bool, uv_options: list[str]) -> list[Check]:
    """Copies this folder to the folder of the same name on every other host, and makes its environment there.

    Replaces newer files there. Does not copy what git ignores, except uv.lock, which makes versions equal,
    and modules in the folder itself, which may be the user's own model. If this folder is mlx_ring's own
    checkout, removes files there that are gone from its packages here; otherwise removes nothing.

    Args:
        file: the hosts.
        environment: whether to run `uv sync` there.
        uv_options: further options for `uv sync`.

    Returns: a finding for each copy and each environment.

    Raises: ConfigError if this folder is not a project.
    """
    folder = Path.cwd()
    if not (folder / "pyproject.toml").exists() and not (folder / ".git").exists():
        raise ConfigError(
            f"{folder} is no project's folder, without .git and pyproject.toml; go to that of your project"
        )
    if environment and not (folder / "pyproject.toml").exists():
        raise ConfigError(
            f"{folder} has no pyproject.toml to make an environment from; give --no-environment"
        )

    async def everybody(token: str) -> list[list[Check]]:
        excluded = "".join(f"{pattern}\n" for pattern in _excluded(folder)).encode(errors="surrogateescape")
        return await asyncio.gather(
            *(
                _sync_host(name, file, token, excluded, uv_options if environment else None)
                for name in file.names
            )
        )

    try:
        with tempfile.NamedTemporaryFile(prefix=TOKEN, dir=folder) as token:
            found = asyncio.run(everybody(Path(token.name).name))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    return [check for checks in found for check in checks]


def _excluded(folder: Path) -> list[str]:
    """Returns patterns for rsync: what is not copied."""
    always = [".git", f"{TOKEN}*"]
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "-z"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    except OSError:  # no git
        return [*always, *IGNORED]
    if done.returncode:
        return [*always, *IGNORED]
    paths = [path for path in os.fsdecode(done.stdout).split("\0") if path and not re.fullmatch(COPIED, path)]
    return [*always, *(re.sub(r"([*?\[\\])", r"\\\1", f"/{path.rstrip('/')}") for path in paths)]


async def _sync_host(
    name: str, file: HostFile, token: str, excluded: bytes, uv_options: list[str] | None
) -> list[Check]:
    """Copies this folder to one host, and makes its environment unless `uv_options` is None.

    `token` is the name of a file in this folder. A host that sees it shares the folder: nothing is copied.
    """
    folder = Path.cwd()
    seen = None if name in HERE else await ask(name, ["test", "-e", token], file.envs)
    if seen is None or seen.status == 0:
        return [ok("copy", name, f"{folder} there is this very folder")]
    if seen.status == SSH_FAILED:  # ask ssh first: rsync hides the reason behind a status of its own
        return [_not_copied(name, seen)]
    for options, sources in _copies(folder):
        copied = await run(
            name, _rsync(name, folder, [*options, "--exclude-from=-"], sources), os.environ, given=excluded
        )
        if copied.status:
            return [_not_copied(name, copied)]
    checks = [ok("copy", name, f"{folder} there is as it is here")]
    if uv_options is not None:
        checks.append(await _make_environment(name, file, uv_options))
    return checks


def _copies(folder: Path) -> list[tuple[list[str], list[str]]]:
    """Returns the options and sources of each rsync.

    The first copies everything. If this is mlx_ring's own checkout, a second one removes files there that are
    gone from its packages here.
    """
    own = folder / "mlx_ring"
    if not (own.is_dir() and own.samefile(Path(mlx_ring.__file__).parent)):
        return [([], ["./"])]
    return [([], ["./"]), (["--delete"], [package for package in PACKAGES if (folder / package).is_dir()])]


def _rsync(name: str, folder: Path, options: list[str], sources: list[str]) -> list[str]:
    """Returns the command of one rsync, with options that macOS's rsync has too.

    The shell of the other host enters the folder, because versions of rsync differ in how they quote a path.
    """
    port: list[str] = []
    if name.startswith("ssh://"):
        name, _, number = name.removeprefix("ssh://").rstrip("/").partition(":")
        port = ["-p", number] if number else []
    shell = shlex.join([*SSH[:-1], *port])  # without the last word, which is --
    there = f"mkdir -p {shlex.quote(str(folder))} && cd {shlex.quote(str(folder))} && rsync"
    return ["rsync", "-az", *options, "-e", shell, "--rsync-path", there, *sources, f"{name}:./"]


def _not_copied(name: str, copied: Answer) -> Check:
    """Says why a copy failed."""
    said = " ".join(copied.stderr.split())[-300:]
    if copied.status == NO_PYTHON:
        return fail("copy", name, "there is no rsync here", "install it here and there")
    if why := ssh_problem(copied.status, "rsync", said):
        return fail("copy", name, why, "mlx-ring doctor --hostfile FILE says more")
    remedy = "install rsync there" if "not found" in said else "correct that, then sync again"
    return fail("copy", name, f"rsync ended with status {copied.status}: {said}", remedy)


async def _make_environment(name: str, file: HostFile, options: list[str]) -> Check:
    """Runs `uv sync` on a host, for the same version of Python as here."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    line = (
        f"PATH={UV_PATH}; command -v uv >/dev/null || exit {NO_UV}; "
        f"exec uv sync --python {version} {shlex.join(options)}"
    )
    answer = await ask(name, ["sh", "-c", line], file.envs)
    said = " ".join(answer.stderr.split())[-300:]
    if answer.status == NO_UV:
        return fail("environment", name, "there is no uv", UV_REMEDY)
    if answer.status:
        remedy = f"try it there: cd {Path.cwd()} && uv sync"
        return fail("environment", name, f"uv sync ended with status {answer.status}: {said}", remedy)
    return ok("environment", name, f"uv sync, Python {version}")
