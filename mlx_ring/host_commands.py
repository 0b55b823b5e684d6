"""The commands under `mlx-ring hosts`: make, check and change a host file, copy what is here to its hosts."""

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from mlx_ring.address_choice import Address, measure
from mlx_ring.check import Check, fail, ok, tell, warn
from mlx_ring.errors import ClusterError, ConfigError
from mlx_ring.host_file import read_hostfile
from mlx_ring.host_file_edit import HostFileEdit, path_variable
from mlx_ring.host_sync import sync as sync_hosts

WORTH_IT = 1.5  # times as fast: worth another address
FILE = click.argument("file", type=click.Path(path_type=Path))


def with_python(command: Callable[..., None]) -> Callable[..., None]:
    text = "The interpreter, the same path on every host."
    return click.option("--python", default=sys.executable, help=text)(command)


@click.group()
def hosts() -> None:
    """Make, check and change a host file, and bring its hosts to what is here.

    Example: mlx-ring hosts add hostfiles/lab.json studio-1.local studio-2.local
    """


@hosts.command()
@FILE
@click.argument("names", nargs=-1, required=True)
@with_python
def add(file: Path, names: tuple[str, ...], python: str) -> None:
    """Add hosts, by the names that ssh knows them by, each with its fastest address; make FILE where there is
    none.

    Every address of every host is tried and timed. A run under mlx-ring run takes new hosts in by itself.

    Example: mlx-ring hosts add hostfiles/lab.json studio-3.local
    """
    edit = HostFileEdit(file, make=True)
    edit.refuse_listed(list(names))
    edit.set_path(python)
    ring = [*edit.names, *names]
    measured = asyncio.run(measure(ring, python=python, environment=edit.environment))
    for name in names:
        best = _best(name, measured[name])
        edit.add(name, best.ip)
        click.echo(f"{name}: {best}")
        for other in measured[name][1:]:
            click.echo(f"    not {other}")
    edit.save()


@hosts.command()
@FILE
@click.argument("names", nargs=-1, required=True)
def remove(file: Path, names: tuple[str, ...]) -> None:
    """Take hosts out. A run under mlx-ring run saves, and goes on without them.

    Example: mlx-ring hosts remove hostfiles/lab.json studio-3.local
    """
    edit = HostFileEdit(file)
    for name in names:
        edit.remove(name)
        edit.save()
    click.echo(f"{file} has {', '.join(edit.names)}")


@hosts.command()
@FILE
@click.option("--write", is_flag=True, help="Write better addresses into FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_python
def check(file: Path, write: bool, as_json: bool, python: str) -> None:
    """Try every address of every host, and compare FILE's with the fastest. Exit 3 where one does not work.

    For all else that a run needs of its hosts: mlx-ring doctor --hostfile FILE

    Example: mlx-ring hosts check hostfiles/lab.json --write
    """
    edit = HostFileEdit(file)
    assert edit.file is not None
    listed = {host.ssh: host.ips for host in edit.file.hosts}
    if write and any(len(ips) > 1 for ips in listed.values()):
        raise ConfigError(
            f"{file} gives several addresses a host: correct it by hand, --write gives one each"
        )
    measured = asyncio.run(measure(edit.names, python=python, environment=edit.environment))
    findings = [
        _compare(name, ip, measured[name], file, write=write) for name in edit.names for ip in listed[name]
    ]
    if write:
        for name in edit.names:
            if any(finding.host == name and finding.status != "ok" for finding in findings):
                edit.set_address(name, _best(name, measured[name]).ip)
        edit.set_path(python)
        edit.save()
    tell(findings, click.echo, as_json=as_json, with_hosts=True)


@hosts.command(context_settings={"ignore_unknown_options": True})
@FILE
@click.option("--environment/--no-environment", default=True, help="Whether to run uv sync there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("uv_options", nargs=-1)
def sync(file: Path, environment: bool, as_json: bool, uv_options: tuple[str, ...]) -> None:
    """Copy this folder to the same place on every host of FILE, and make its environment there.

    Goes by rsync and uv, which the hosts must have. What git ignores is not copied. UV_OPTIONS are uv sync's.

    Example: mlx-ring hosts sync hostfiles/lab.json -- --extra sweep
    """
    found = sync_hosts(read_hostfile(file), environment=environment, uv_options=list(uv_options))
    tell(found, click.echo, as_json=as_json, with_hosts=True)


@hosts.command()
@FILE
@click.argument("names", nargs=-1)
@click.option("--auto-setup", is_flag=True, help="Configure the Macs too, by sudo without a password.")
@with_python
def thunderbolt(file: Path, names: tuple[str, ...], auto_setup: bool, python: str) -> None:
    """Make FILE for Macs joined by Thunderbolt cables, by MLX's own mlx.distributed_config.

    NAMES default to the hosts of FILE. It finds the cables, orders the ring by them, and gives each end an
    address, which lasts until a Mac starts anew.

    Example: mlx-ring hosts thunderbolt hostfiles/lab.json studio-1.local studio-2.local --auto-setup
    """
    if not auto_setup and not sys.stdin.isatty():
        raise ConfigError(
            "mlx.distributed_config shows each Mac's commands and waits for Enter; type this in a terminal, "
            "or give --auto-setup"
        )
    edit = HostFileEdit(file, make=bool(names))
    environment = dict([path_variable(python).split("=", 1)]) | edit.environment
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "hosts.json"
        command = [
            str(Path(sys.executable).with_name("mlx.distributed_config")), "--over", "thunderbolt",
            "--backend", "ring", "--hosts", ",".join(names or edit.names), "--output-hostfile", str(made),
        ]  # fmt: skip
        for key, value in environment.items():
            command += ["--env", f"{key}={value}"]
        command += ["--auto-setup"] if auto_setup else []
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode or not made.exists():
            *_, last = ["no reason given", *done.stderr.splitlines()]
            raise ClusterError(
                f"mlx.distributed_config ended with status {done.returncode} and made no host file: {last}; "
                "it needs Macs, each with a Thunderbolt cable to the next"
            )
        click.echo(done.stderr, err=True, nl=False)
        read_hostfile(made)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(made.read_text())
    click.echo(f"{file} is written; mlx-ring hosts check {file} times its links")


def _best(name: str, addresses: list[Address]) -> Address:
    """Raises: ClusterError where no address of a host can be used."""
    if not addresses or addresses[0].problem:
        tried = "; ".join(map(str, addresses)) or "it has none but its loopback's"
        raise ClusterError(f"host {name} has no address for the ring: {tried}")
    return addresses[0]


def _compare(name: str, listed: str, addresses: list[Address], file: Path, *, write: bool) -> Check:
    """The listed address of a host with its best one."""
    best = _best(name, addresses)
    own = next((address for address in addresses if address.ip == listed), None)
    remedy = f"{'changed to' if write else f'mlx-ring hosts check {file} --write changes it to'} {best}"
    wrong = warn if write else fail
    if own is None:
        return wrong("address", name, f"{listed} is not an address of it now", remedy)
    if own.problem:
        return wrong("address", name, str(own), remedy)
    if own.bytes_per_second * WORTH_IT < best.bytes_per_second:
        return warn("address", name, f"{own}: not its fastest", remedy)
    return ok("address", name, str(own))
