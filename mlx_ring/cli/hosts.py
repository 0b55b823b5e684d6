"""The commands under `mlx-ring hosts`: make, check and change a host file, copy what is here to its hosts."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import click

from mlx_ring.cluster.finding import Check, fail, ok, tell, warn
from mlx_ring.cluster.hosts.address_choice import Address, measure
from mlx_ring.cluster.hosts.host_file import read_hostfile
from mlx_ring.cluster.hosts.host_file_edit import HostFileEdit
from mlx_ring.cluster.hosts.sync import sync as sync_hosts
from mlx_ring.cluster.hosts.thunderbolt import configure
from mlx_ring.errors import ClusterError

WORTH_IT = 1.5  # times as fast: worth another address
FILE = click.argument("file", type=click.Path(path_type=Path))


def with_python(command: Callable[..., None]) -> Callable[..., None]:
    text = "The interpreter, the same path on every host."
    return click.option("--python", default=sys.executable, help=text)(command)


@click.group()
def hosts() -> None:
    """Make, check and change a host file, and bring its hosts to what is here.

    Example: mlx-ring hosts add hostfiles/macs.json studio-1.local studio-2.local
    """


@hosts.command()
@FILE
@click.argument("names", nargs=-1, required=True)
@with_python
def add(file: Path, names: tuple[str, ...], python: str) -> None:
    """Add hosts, by the names that ssh knows them by, each with its fastest address; make FILE where there is
    none.

    Every address of every host is tried and timed. A run under mlx-ring run takes new hosts in by itself.

    Example: mlx-ring hosts add hostfiles/macs.json studio-3.local
    """
    edit = HostFileEdit(file, make=True)
    edit.refuse_listed(list(names))
    edit.refuse_several_addresses()
    edit.set_path(python)
    listed = edit.addresses
    ring = [*listed, *names]
    measured, problems = asyncio.run(measure(ring, python=python, environment=edit.environment))
    if problems:
        raise ClusterError("; ".join(f"host {name}: {why}" for name, why in problems.items()))
    for name in names:
        best = _best(name, measured[name])
        edit.add(name, best.ip)
        click.echo(f"{name}: {best}")
        for other in measured[name][1:]:
            click.echo(f"    not {other}")
    edit.save()
    # The one that was reached by the last is now reached by another, and may need another address.
    before = [_compare(name, ip, measured[name], file) for name, ips in listed.items() for ip in ips]
    tell([check for check in before if check.status != "ok"], click.echo, as_json=False, with_hosts=True)


@hosts.command()
@FILE
@click.argument("names", nargs=-1, required=True)
def remove(file: Path, names: tuple[str, ...]) -> None:
    """Take hosts out. A run under mlx-ring run saves, and goes on without them.

    Example: mlx-ring hosts remove hostfiles/macs.json studio-3.local
    """
    edit = HostFileEdit(file)
    edit.remove(names)
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

    Example: mlx-ring hosts check hostfiles/macs.json --write
    """
    edit = HostFileEdit(file)
    if write:
        edit.refuse_several_addresses()
    measured, problems = asyncio.run(measure(edit.names, python=python, environment=edit.environment))
    findings = [
        fail("reachable", name, why, f"mlx-ring doctor --hostfile {file}") for name, why in problems.items()
    ]
    for name, addresses in measured.items():
        of_host = [_compare(name, ip, addresses, file, write=write) for ip in edit.addresses[name]]
        if write and any(finding.status == "warn" for finding in of_host):
            edit.set_address(name, addresses[0].ip)
        findings += of_host
    if write:
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

    Goes by rsync and uv, which the hosts must have. Newer files there are replaced. What git ignores is not
    copied, but for uv.lock and modules in this folder. UV_OPTIONS are uv sync's.

    Example: mlx-ring hosts sync hostfiles/macs.json -- --extra sweep
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

    Example: mlx-ring hosts thunderbolt hostfiles/macs.json studio-1.local studio-2.local --auto-setup
    """
    edit = HostFileEdit(file, make=bool(names))
    edit.set_path(python)
    edit.replace(configure(list(names or edit.names), auto_setup=auto_setup))
    edit.save()
    click.echo(f"{file} is written; mlx-ring hosts check {file} times its links")


def _best(name: str, addresses: list[Address]) -> Address:
    """Raises: ClusterError where no address of a host can be used."""
    if not addresses or addresses[0].problem:
        tried = "; ".join(map(str, addresses)) or "it has none but its loopback's"
        raise ClusterError(f"host {name} has no address for the ring: {tried}")
    return addresses[0]


def _compare(name: str, listed: str, addresses: list[Address], file: Path, *, write: bool = False) -> Check:
    """A listed address with the best one of its host, which is written in its place where it can be."""
    best = addresses[0] if addresses else None
    own = next((address for address in addresses if address.ip == listed), None)
    detail = str(own) if own else f"{listed} is not an address of it now"
    if best is None or best.problem:
        return fail(
            "address", name, detail, "none of its addresses can be used: check its cable and firewall"
        )
    wrong = warn if write else fail
    remedy = f"{'changed to' if write else f'mlx-ring hosts check {file} --write changes it to'} {best}"
    if own is None or own.problem:
        return wrong("address", name, detail, remedy)
    if own.bytes_per_second * WORTH_IT < best.bytes_per_second:
        return warn("address", name, f"{own}: not its fastest", remedy)
    return ok("address", name, detail)
