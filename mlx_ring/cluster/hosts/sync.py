"""This folder and its environment on every host of a host file: rsync, then `uv sync` there. No mlx here."""

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

# What the digests of mlx_ring are over: a file of these that is gone here must go there too.
PACKAGES = ("mlx_ring", "hydra_plugins", "conf")
TOKEN = ".mlx_ring_sync-"
IGNORED = ("/.venv", "/outputs", "/multirun", "__pycache__", ".env")  # where git does not say what is
KEPT = r"uv\.lock|[^/]+\.py"  # of what git ignores
UV_PATH = "~/.local/bin:~/.cargo/bin:/opt/homebrew/bin:$PATH"  # where its installers put it
NO_UV = 98  # exit status
UV_REMEDY = "install uv there: pip install --user uv, or as its site says"


def sync(file: HostFile, *, environment: bool, uv_options: list[str]) -> list[Check]:
    """Copy this folder to the folder of the same name on every other host, and make its environment there.

    Newer files there are replaced. What git ignores stays here, but for uv.lock, which makes versions equal,
    and modules in the folder itself, which may be the user's own model. Where this folder is mlx_ring's own
    checkout, files that are gone from its packages go there too; else nothing is removed.

    Raises: ConfigError where this folder is no project's.
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
            *(_one(name, file, token, excluded, uv_options if environment else None) for name in file.names)
        )

    try:
        with tempfile.NamedTemporaryFile(prefix=TOKEN, dir=folder) as token:
            found = asyncio.run(everybody(Path(token.name).name))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    return [check for checks in found for check in checks]


def _excluded(folder: Path) -> list[str]:
    """rsync's patterns for what stays here."""
    always = [".git", f"{TOKEN}*"]
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "-z"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    except OSError:  # no git
        return [*always, *IGNORED]
    if done.returncode:
        return [*always, *IGNORED]
    paths = [path for path in os.fsdecode(done.stdout).split("\0") if path and not re.fullmatch(KEPT, path)]
    return [*always, *(re.sub(r"([*?\[\\])", r"\\\1", f"/{path.rstrip('/')}") for path in paths)]


async def _one(
    name: str, file: HostFile, token: str, excluded: bytes, uv_options: list[str] | None
) -> list[Check]:
    folder = Path.cwd()
    seen = None if name in HERE else await ask(name, ["test", "-e", token], file.envs)
    if seen is None or seen.status == 0:
        return [ok("copy", name, f"{folder} there is this very folder")]
    if seen.status == SSH_FAILED:  # rsync ends with a status of its own where ssh has not quite ended
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
    """Options and sources of each rsync: all; then, of mlx_ring's own checkout, the packages without what is
    gone here."""
    own = folder / "mlx_ring"
    if not (own.is_dir() and own.samefile(Path(mlx_ring.__file__).parent)):
        return [([], ["./"])]
    return [([], ["./"]), (["--delete"], [package for package in PACKAGES if (folder / package).is_dir()])]


def _rsync(name: str, folder: Path, options: list[str], sources: list[str]) -> list[str]:
    """With options that macOS's rsync has too. The folder is entered by the other side's shell, for versions
    differ in whether a path is to be quoted for it."""
    port: list[str] = []
    if name.startswith("ssh://"):
        name, _, number = name.removeprefix("ssh://").rstrip("/").partition(":")
        port = ["-p", number] if number else []
    shell = shlex.join([*SSH[:-1], *port])  # without its last word, --
    there = f"mkdir -p {shlex.quote(str(folder))} && cd {shlex.quote(str(folder))} && rsync"
    return ["rsync", "-az", *options, "-e", shell, "--rsync-path", there, *sources, f"{name}:./"]


def _not_copied(name: str, copied: Answer) -> Check:
    said = " ".join(copied.stderr.split())[-300:]
    if copied.status == NO_PYTHON:
        return fail("copy", name, "there is no rsync here", "install it here and there")
    if why := ssh_problem(copied.status, "rsync", said):
        return fail("copy", name, why, "mlx-ring doctor --hostfile FILE says more of it")
    remedy = "install rsync there" if "not found" in said else "mend that, then sync again"
    return fail("copy", name, f"rsync ended with status {copied.status}: {said}", remedy)


async def _make_environment(name: str, file: HostFile, options: list[str]) -> Check:
    """With the Python version of this one."""
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
