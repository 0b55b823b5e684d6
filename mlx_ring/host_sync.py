"""This folder and its environment on every host of a host file: rsync, then `uv sync` there. No mlx here."""

import asyncio
import shlex
import subprocess
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from re import fullmatch

from mlx_ring.check import Check, fail, ok
from mlx_ring.errors import ConfigError
from mlx_ring.host_file import HostFile
from mlx_ring.launcher import HERE, SSH, ssh_problem
from mlx_ring.on_hosts import ask

# What a checkout's digest is over, and where a file that is gone here must go there too.
PACKAGES = ("mlx_ring", "hydra_plugins", "conf")
IGNORED = ("/.venv", "/outputs", "/multirun", "__pycache__")  # where no git says what is
UV_PATH = "~/.local/bin:~/.cargo/bin:/opt/homebrew/bin:$PATH"  # where its installers put it
KEPT = r"uv\.lock|[^/]+\.py"  # of what git ignores
NO_UV = 98  # exit status
UV_REMEDY = "install uv there: pip install --user uv, or as its site says"


def sync(file: HostFile, *, environment: bool, uv_options: list[str]) -> list[Check]:
    """Copy this folder to the folder of the same name on every other host, and make its environment there.

    What git ignores stays here, but for uv.lock, which makes versions equal, and modules in the folder, which
    may be the user's own model. Nothing is removed there but
    in the package's own folders. Raises: ConfigError where this folder cannot be copied.
    """
    folder = Path.cwd()
    if folder == Path.home() or folder == Path(folder.anchor):
        raise ConfigError(f"{folder} is no project's folder; go to that of your project, and sync from there")
    if environment and not (folder / "pyproject.toml").exists():
        raise ConfigError(
            f"{folder} has no pyproject.toml to make an environment from; give --no-environment"
        )

    async def everybody() -> list[list[Check]]:
        excluded = _excluded(folder)
        names = [name for name in file.names if name not in HERE]
        return await asyncio.gather(
            *(_one(name, file, folder, excluded, uv_options if environment else None) for name in names)
        )

    return [check for checks in asyncio.run(everybody()) for check in checks]


def _excluded(folder: Path) -> list[str]:
    """rsync's patterns for what stays here."""
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "-z"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    except OSError:  # no git
        return list(IGNORED)
    if done.returncode:
        return list(IGNORED)
    paths = [path for path in done.stdout.decode().split("\0") if path and not fullmatch(KEPT, path)]
    return [".git", *(f"/{path.rstrip('/')}" for path in paths)]


async def _one(
    name: str, file: HostFile, folder: Path, excluded: list[str], uv_options: list[str] | None
) -> list[Check]:
    made = await _run([*SSH, name, f"mkdir -p {shlex.quote(str(folder))}"])
    if made.status:
        why = ssh_problem(made.status, "", made.said) or made.said
        return [fail("copy", name, why, f"mlx-ring doctor --hostfile FILE says more of {name}")]
    for options, sources in _copies(folder, excluded):
        copied = await _run(_rsync(name, folder, options, sources), "\n".join(excluded))
        if copied.status:
            remedy = (
                "install rsync on both sides" if "not found" in copied.said else "mend that, then sync again"
            )
            return [fail("copy", name, f"rsync ended with status {copied.status}: {copied.said}", remedy)]
    checks = [ok("copy", name, f"{folder} there is as it is here")]
    if uv_options is not None:
        checks.append(await _make_environment(name, file, uv_options))
    return checks


def _copies(folder: Path, excluded: list[str]) -> list[tuple[list[str], list[str]]]:
    """Options and sources of each rsync: all; then the package's folders, without what is gone here."""
    packages = [package for package in PACKAGES if (folder / package).is_dir()]
    copies = [(["--exclude-from=-"], ["./"])]
    if packages:
        copies.append((["--exclude=__pycache__", "--delete"], packages))
    return copies


def _rsync(name: str, folder: Path, options: list[str], sources: list[str]) -> list[str]:
    """Only options that every rsync has, also those of macOS. A port in the name is ssh's affair."""
    port: list[str] = []
    if name.startswith("ssh://"):
        name, _, number = name.removeprefix("ssh://").rstrip("/").partition(":")
        port = ["-p", number] if number else []
    shell = shlex.join([*SSH[:-1], *port])  # without its last word, --
    return ["rsync", "-az", *options, "-e", shell, *sources, f"{name}:{shlex.quote(str(folder))}/"]


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


class _Ended:
    def __init__(self, status: int, said: str) -> None:
        self.status, self.said = status, said


async def _run(command: list[str], text: str = "") -> _Ended:
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
        )
    except OSError:
        return _Ended(127, f"{command[0]}: not found here")
    _, said = await process.communicate(text.encode())
    assert process.returncode is not None
    return _Ended(process.returncode, " ".join(said.decode(errors="replace").split()))
