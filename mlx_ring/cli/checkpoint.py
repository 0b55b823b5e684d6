"""`mlx-ring checkpoint`: list, verify and export the checkpoints of a run, here or on all hosts of a lab."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_ring.cluster.hosts.host_file import HostFile, read_hostfile
from mlx_ring.cluster.hosts.on_hosts import fetch, on_hosts
from mlx_ring.cluster.hosts.ssh import own_program
from mlx_ring.errors import CheckpointError
from mlx_ring.run_directory import checkpoint_files
from mlx_ring.run_directory.manifest import Lineage
from mlx_ring.run_directory.whole_file import whole_file

# One checkpoint: path and step; also host if hosts were asked, and error if it is damaged.
Row = dict[str, Any]


@click.group()
def checkpoint() -> None:
    """Look at, check and export the checkpoints of a run.

    Example: mlx-ring checkpoint list outputs/2026-11-22_16-28-11_4bdc
    """


def _with_run(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the arguments that all three commands have."""
    for decorate in (
        click.option("--python", default=sys.executable, help="The interpreter on every host."),
        click.option("--hostfile", type=click.Path(path_type=Path), help="Look on every host in this file."),
        click.argument("run", type=click.Path(path_type=Path)),
    ):
        command = decorate(command)
    return command


@checkpoint.command("list")
@_with_run
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_checkpoints(run: Path, hostfile: Path | None, python: str, as_json: bool) -> None:
    """List the checkpoints of RUN, oldest first, without reading their arrays.

    Example: mlx-ring checkpoint list outputs/2026-11-22_16-28-11_4bdc
    """
    rows = _rows("list", run, _hosts(hostfile), python)
    if as_json:
        click.echo(json.dumps({"checkpoints": rows}))
        return
    for row in rows:
        if "error" in row:
            click.echo(f"{_place(row)}  damaged: {row['error']}")
            continue
        evaluation = row["evaluation"] or {}
        loss = f"  loss {evaluation['loss']:.4g}" if "loss" in evaluation else ""
        digest = str(row["parameters_sha256"])[:12]
        click.echo(f"{_place(row)}  step {row['step']}  {row['bytes']:,} bytes  parameters {digest}{loss}")


@checkpoint.command()
@_with_run
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(run: Path, hostfile: Path | None, python: str, as_json: bool) -> None:
    """Read every byte of RUN's checkpoints and compare it with the manifests. Exits with 5 if one is damaged.

    Example: mlx-ring checkpoint verify outputs/2026-11-22_16-28-11_4bdc --hostfile hostfiles/lab.json
    """
    rows = _rows("verify", run, _hosts(hostfile), python)
    if as_json:
        click.echo(json.dumps({"checkpoints": rows}))
    else:
        for row in rows:
            click.echo(f"{_place(row)}  {'damaged: ' + row['error'] if 'error' in row else 'ok'}")
    if damaged := sum("error" in row for row in rows):
        several = "s" if damaged > 1 else ""
        raise CheckpointError(f"{damaged} damaged checkpoint{several} in {run}; delete what is damaged")


@checkpoint.command()
@_with_run
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file to write.")
def export(run: Path, hostfile: Path | None, python: str, output: Path) -> None:
    """Write the model of RUN's newest valid checkpoint, from any host, as one plain safetensors file.

    Example: mlx-ring checkpoint export outputs/2026-11-22_16-28-11_4bdc --output model.safetensors
    """
    hosts = _hosts(hostfile)
    problems: list[str] = []
    rows = _rows("list", run, hosts, python)
    rows.sort(key=lambda row: (row.get("generation", 0), row["step"]), reverse=True)
    for row in rows:
        checked = row if "error" in row else _verify_again(row, hosts, python)
        if "error" in checked:
            problems.append(f"{_place(row)}: {checked['error']}")
            click.echo(f"passed over: {problems[-1]}", err=True)
            continue
        _write(Path(row["path"]) / "model.safetensors", output, hosts, row.get("host"))
        click.echo(f"{_place(row)} → {output}")
        return
    raise CheckpointError(f"no usable checkpoint in {run}: {problems[0]}")


def _hosts(hostfile: Path | None) -> HostFile | None:
    return read_hostfile(hostfile) if hostfile is not None else None


def _place(row: Row) -> str:
    """Returns where a checkpoint is: its path, after its host if hosts were asked."""
    return f"{row['host']}:{row['path']}" if "host" in row else row["path"]


def _rows(action: str, run: Path, hosts: HostFile | None, python: str, only: str | None = None) -> list[Row]:
    """Returns the checkpoints of a run: here, or on all hosts in the order of the host file.

    Args:
        action: "list", or "verify" to read every byte.
        run: the run's directory, or one checkpoint.
        hosts: the hosts to ask; None looks here.
        python: the interpreter on every host.
        only: the one host to ask.

    Raises: CheckpointError if there is no checkpoint anywhere.
    """
    if hosts is None:
        return [_row(path, READERS[action]) for path in _checkpoints_here(run)]
    command = own_program(python, "mlx_ring.cli", "checkpoint", action, str(run), "--json")
    rows: list[Row] = []
    problems: list[str] = []
    for answer in on_hosts(hosts, command, only):
        found = [line for line in answer.stdout.splitlines() if line.startswith(b'{"checkpoints"')]
        if found:  # a login shell may print other lines
            rows += [{"host": answer.host, **row} for row in json.loads(found[0])["checkpoints"]]
        else:  # the host has none or could not be asked, and says why
            problems.append(f"host {answer.host}: {answer.stderr.removeprefix('error: ')}")
    if not rows:
        raise CheckpointError("; ".join(problems))
    for problem in problems:
        click.echo(problem, err=True)
    return rows


def _verify_again(row: Row, hosts: HostFile | None, python: str) -> Row:
    """Returns the row of the same checkpoint after every byte of it was read."""
    return _rows("verify", Path(row["path"]), hosts, python, row.get("host"))[0]


def _checkpoints_here(run: Path) -> list[Path]:
    """Returns the checkpoints of RUN on this host, oldest first. Raises: CheckpointError if there is none."""
    found = checkpoint_files.named(run)
    if not found:
        raise CheckpointError(f"{run} has no checkpoints/step_… in it")
    return found[::-1]


def _row(path: Path, read: Callable[[Path], Row]) -> Row:
    """Returns one checkpoint with what `read` found in it, or with what is wrong with it."""
    try:
        return {"path": str(path), "step": checkpoint_files.step_of(path), **read(path)}
    except CheckpointError as error:
        return {"path": str(path), "step": checkpoint_files.step_of(path), "error": str(error)}


def _read_manifest(path: Path) -> Row:
    """Returns what a checkpoint's manifest says, without reading its arrays."""
    manifest = checkpoint_files.read_manifest(path)
    return {
        "step": manifest["step"],
        "generation": Lineage.of(manifest).generation,
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "samples": manifest["progress"].get("next_sample"),
        "world_size": manifest.get("world_size"),
        "evaluation": manifest.get("evaluation"),
        "parameters_sha256": manifest.get("parameters_sha256"),
    }


def _read_all(path: Path) -> Row:
    """Raises: CheckpointError unless every byte agrees with the manifest."""
    checkpoint_files.verify(path)
    return {}


READERS: dict[str, Callable[[Path], Row]] = {"list": _read_manifest, "verify": _read_all}


def _write(source: Path, output: Path, hosts: HostFile | None, host: str | None) -> None:
    """Copies the model's file, here or from a host. Leaves no partial file behind."""
    try:
        with whole_file(output) as new:
            if hosts is None or host is None:
                shutil.copyfile(source, new)
            else:
                fetch(hosts, host, source, new)
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written: {error.strerror}") from None
