"""The command `mlx-ring`: everything around a run that is not the run itself."""

import sys
from pathlib import Path
from typing import NoReturn

import click
from click.shell_completion import get_completion_class

from mlx_ring import __version__
from mlx_ring.cli.checkpoint import checkpoint
from mlx_ring.cli.hosts import hosts, with_python
from mlx_ring.cluster.finding import tell
from mlx_ring.errors import ConfigError, MlxRingError, TrainingError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-ring")
def cli() -> None:
    """Tools around mlx_ring's training runs. Training itself is `train.py`.

    Example: mlx-ring run -n 2 -- model=cnn
    """


cli.add_command(checkpoint)
cli.add_command(hosts)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("-n", "ranks", type=click.IntRange(min=1), help="Ranks on this machine.")
@click.option("--hostfile", type=click.Path(path_type=Path), help="A rank on every host listed, over ssh.")
@click.option(
    "--launcher",
    type=click.Choice(["ssh", "mpirun"]),
    default="ssh",
    help="What starts ranks; mpirun on this machine only.",
)
@click.option(
    "--min-hosts", type=click.IntRange(min=1), help="Go on with so many at least (all at first, then 1)."
)
@click.option("--max-restarts", type=click.IntRange(min=0), default=20, show_default=True)
@click.option(
    "--deadline",
    type=click.FloatRange(min=1),
    default=30.0,
    show_default=True,
    help="Seconds without progress, or ten times the usual step, after which a run hangs.",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    help="Seconds for which a run that has begun waits for enough hosts that answer.",
)
@click.option(
    "--openblas",
    type=click.IntRange(min=1),
    metavar="THREADS",
    help="Preload OpenBLAS on Linux CPUs, with so many threads a rank (1 in exact mode).",
)
@click.option("--leash", is_flag=True, hidden=True, help="Stop where stdin ends: with who started it.")
@with_python
@click.argument("overrides", nargs=-1)
def run(
    ranks: int | None,
    hostfile: Path | None,
    launcher: str,
    min_hosts: int | None,
    max_restarts: int,
    deadline: float,
    wait: float,
    openblas: int | None,
    leash: bool,
    python: str,
    overrides: tuple[str, ...],
) -> None:
    """Train under supervision: what fails is restarted, and the exit status is the run's.

    OVERRIDES are train.py's. A host file may be edited while the run goes on.

    Example: mlx-ring run -n 4 -- model=cnn trainer.steps=500
    """
    from mlx_ring.cluster.supervisor.elastic_supervisor import supervise
    from mlx_ring.cluster.supervisor.options import options

    chosen = options(
        list(overrides), ranks=ranks, hostfile=hostfile, mpirun=launcher == "mpirun", min_hosts=min_hosts,
        max_restarts=max_restarts, deadline_seconds=deadline, wait_seconds=wait, leash=leash,
        openblas_threads=openblas, python=python,
    )  # fmt: skip
    sys.exit(supervise(chosen))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=1), required=True, help="The step to repeat.")
@click.argument("overrides", nargs=-1)
def replay(run: Path, step: int, overrides: tuple[str, ...]) -> None:
    """Repeat a step of RUN on this machine, from the nearest checkpoint, and compare it with the record.

    OVERRIDES are KEY=VALUE, for what lies elsewhere here (data.path=FOLDER). RUN is only read. Exit 4 where
    something differs.

    Example: mlx-ring replay outputs/2026-11-22_16-28-11_4bdc --step 357
    """
    from mlx_ring.run import replay as replays  # loads MLX

    outcome = replays.replay(run, step, list(overrides))
    ranks = f"{outcome.world_size} rank{'s' if outcome.world_size > 1 else ''}"
    click.echo(f"from {outcome.start} to step {step}: {ranks} then, one here")
    differing = [repeated for repeated in outcome.steps if not repeated.agrees]
    for repeated in dict.fromkeys([*differing[:1], outcome.steps[-1]]):
        for name, recorded in repeated.recorded.items():
            here = repeated.here[name]
            verdict = "agrees" if here == recorded else "differs"
            click.echo(f"step {repeated.step}  {name}  {recorded} in the record, {here} here: {verdict}")
    if differing:
        why = "the machines are of different kinds, or one of them is at fault"
        if outcome.codec != "exact" and outcome.world_size > 1:
            why = f"communicator={outcome.codec} rounds by the number of ranks; communicator=exact does not"
        raise TrainingError(f"step {differing[0].step} of {run} is another one here: {why}")
    click.echo(f"step {step} agrees, and so do the {len(outcome.steps) - 1} recorded ones on the way")


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("--hostfile", type=click.Path(path_type=Path), help="Check every host listed, over ssh.")
@click.option("--exact", is_flag=True, help="Check instead whether each operation repeats its bits here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_python
@click.argument("overrides", nargs=-1)
def doctor(
    hostfile: Path | None, exact: bool, as_json: bool, python: str, overrides: tuple[str, ...]
) -> None:
    """Check whether this machine, or the hosts of a host file, can train together.

    Looks at each host, connects every link of the ring, and launches ranks. OVERRIDES are train.py's: the
    data they name is compared. Exit 3 where a check fails.

    Example: mlx-ring doctor --hostfile hostfiles/lab.json -- data=text data.path=books
    """
    if exact and hostfile:
        raise ConfigError(
            "--exact looks at this machine alone; leave --hostfile out, and compare the digests"
        )
    if exact:
        from mlx_ring.training.exact.doctor_checks import exact_checks  # loads MLX

        return tell(exact_checks(), click.echo, as_json=as_json, with_hosts=False)
    from mlx_ring.cluster.doctor.doctor import examine

    found = examine(hostfile, python, list(overrides))
    return tell(found, click.echo, as_json=as_json, with_hosts=hostfile is not None)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete the words of this command. For train.py: train.py --hydra-help.

    Example: eval "$(mlx-ring completion bash)"
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "mlx-ring", "_MLX_RING_COMPLETE").source())


def main() -> NoReturn:
    """Run a command; a mistake is one line on stderr and the contract's exit status."""
    try:
        cli(standalone_mode=False)
    except MlxRingError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_status)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
