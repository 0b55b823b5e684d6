"""The commands under `mlx-ring hosts`: make, check and change a host file, copy this folder to its hosts."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import click

from mlx_ring.cluster.finding import Check, fail, ok, report, warn
from mlx_ring.cluster.hosts.address_choice import Address, measure
from mlx_ring.cluster.hosts.host_file import read_hostfile
from mlx_ring.cluster.hosts.host_file_edit import HostFileEdit
from mlx_ring.cluster.hosts.sync import sync as sync_hosts
from mlx_ring.cluster.hosts.thunderbolt import configure
from mlx_ring.errors import ClusterError

WORTH_CHANGING = 1.5  # an address this many times as fast is worth a change
FILE = click.argument("file", type=click.Path(path_type=Path))


def with_python(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the option --python to a command."""
    text = "The interpreter, at the same path on every host."
    return click.option("--python", default=sys.executable, help=text)(command)


@click.group()
def hosts() -> None:
    """Make, check and change a host file, and copy this folder to its hosts.

    Example: mlx-ring hosts add hostfiles/macs.json studio-1.local studio-2.local
    """


@hosts.command()
@FILE
@click.argument("names", nargs=-1, required=True)
@with_python
def add(file: Path, names: tuple[str, ...], python: str) -> None:
    """Add hosts to FILE, by the names that ssh knows them by, each with its fastest address.

    Makes FILE if there is none. Tries and times every address of every host. A run under mlx-ring run takes
    new hosts in by itself.

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
    # The first host of the ring is now reached by another host than before, and may need another address.
    before = [_compare(name, ip, measured[name], file) for name, ips in listed.items() for ip in ips]
    report([check for check in before if check.status != "ok"], click.echo, as_json=False, with_hosts=True)


@hosts.command()
@FILE
@click.argument("names", nargs=-1, required=True)
def remove(file: Path, names: tuple[str, ...]) -> None:
    """Remove hosts from FILE. A run under mlx-ring run saves and goes on without them.

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
    """Try every address of every host, and compare those in FILE with the fastest.

    Exits with 3 if one in FILE does not work. To check everything else that a run needs, use mlx-ring doctor
    --hostfile FILE.

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
        compared = [_compare(name, ip, addresses, file, write=write) for ip in edit.addresses[name]]
        if write and any(finding.status == "warn" for finding in compared):
            edit.set_address(name, addresses[0].ip)
        findings += compared
    if write:
        edit.set_path(python)
        edit.save()
    report(findings, click.echo, as_json=as_json, with_hosts=True)


@hosts.command(context_settings={"ignore_unknown_options": True})
@FILE
@click.option("--environment/--no-environment", default=True, help="Whether to run uv sync there too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("uv_options", nargs=-1)
def sync(file: Path, environment: bool, as_json: bool, uv_options: tuple[str, ...]) -> None:
    """Copy this folder to the same place on every host of FILE, and make its environment there.

    Uses rsync and uv, which the hosts must have. Replaces newer files there. Does not copy what git ignores,
    except uv.lock and modules in this folder. UV_OPTIONS are passed to uv sync.

    Example: mlx-ring hosts sync hostfiles/macs.json -- --extra sweep
    """
    found = sync_hosts(read_hostfile(file), environment=environment, uv_options=list(uv_options))
    report(found, click.echo, as_json=as_json, with_hosts=True)


@hosts.command()
@FILE
@click.argument("names", nargs=-1)
@click.option("--auto-setup", is_flag=True, help="Configure the Macs too, with sudo without a password.")
@with_python
def thunderbolt(file: Path, names: tuple[str, ...], auto_setup: bool, python: str) -> None:
    """Make FILE for Macs with Thunderbolt cables between them, with MLX's own mlx.distributed_config.

    Without NAMES, takes the hosts of FILE. Finds the cables, orders the ring by them, and gives each end an
    address, which lasts until its Mac restarts.

    Example: mlx-ring hosts thunderbolt hostfiles/macs.json studio-1.local studio-2.local --auto-setup
    """
    edit = HostFileEdit(file, make=bool(names))
    edit.set_path(python)
    edit.replace(configure(list(names or edit.names), auto_setup=auto_setup))
    edit.save()
    click.echo(f"{file} is written; mlx-ring hosts check {file} times its links")


def _best(name: str, addresses: list[Address]) -> Address:
    """Returns the best address of a host. Raises: ClusterError if none can be used."""
    if not addresses or addresses[0].problem:
        tried = "; ".join(map(str, addresses)) or "it has only its loopback"
        raise ClusterError(f"host {name} has no address for the ring: {tried}")
    return addresses[0]


def _compare(name: str, listed: str, addresses: list[Address], file: Path, *, write: bool = False) -> Check:
    """Compares an address in the host file with the best one of its host.

    `write` says that the best one will be written to the file; then a bad address is only a warning.
    """
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
    if own.bytes_per_second * WORTH_CHANGING < best.bytes_per_second:
        return warn("address", name, f"{own}: not its fastest", remedy)
    return ok("address", name, detail)
