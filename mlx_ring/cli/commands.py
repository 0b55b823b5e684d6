"""The command group `mlx-ring`, and its commands about runs: run, replay, doctor, completion."""

import sys
from pathlib import Path
from typing import NoReturn

import click
from click.shell_completion import get_completion_class

from mlx_ring import __version__
from mlx_ring.cli.checkpoint import checkpoint
from mlx_ring.cli.hosts import hosts, with_python
from mlx_ring.cluster.finding import report
from mlx_ring.errors import ConfigError, MlxRingError, TrainingError
from mlx_ring.standard_streams import refuse_lost_answer, take_standard_streams


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-ring")
def cli() -> None:
    """Tools around mlx_ring's training runs. Training itself is `train.py`.

    Example: mlx-ring run -n 2 -- model=cnn
    """


cli.add_command(checkpoint)
cli.add_command(hosts)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("-n", "ranks", type=click.IntRange(min=1), help="Number of ranks on this machine.")
@click.option(
    "--hostfile", type=click.Path(path_type=Path), help="Start a rank for every entry of this file, over ssh."
)
@click.option(
    "--launcher",
    type=click.Choice(["ssh", "mpirun"]),
    default="ssh",
    help="What starts the ranks; mpirun only on this machine.",
)
@click.option(
    "--min-hosts",
    type=click.IntRange(min=1),
    help="Least number of hosts to train with (all at the first start, then 1).",
)
@click.option(
    "--max-restarts",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Give up after this many restarts.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(min=1),
    default=30.0,
    show_default=True,
    help="Seconds without progress after which a run hangs; ten usual steps, if that is longer.",
)
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=600.0,
    show_default=True,
    help="Seconds for which a run that has begun waits for enough hosts to answer.",
)
@click.option(
    "--openblas",
    type=click.IntRange(min=1),
    metavar="THREADS",
    help="Preload OpenBLAS on Linux CPUs, with this many threads a rank (1 in exact mode).",
)
@click.option(
    "--leash",
    is_flag=True,
    hidden=True,
    help="Stop when stdin ends, that is, when the process that started this one is gone.",
)
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
    """Train under supervision: restart what fails, and exit with the run's own status.

    OVERRIDES are those of train.py. The host file may be edited while the run goes on.

    Example: mlx-ring run -n 4 -- model=cnn trainer.steps=500
    """
    from mlx_ring.cluster.supervisor.elastic_supervisor import supervise
    from mlx_ring.cluster.supervisor.options import options
    from mlx_ring.config.command_line import evaluates_only

    chosen = options(
        list(overrides), ranks=ranks, hostfile=hostfile, mpirun=launcher == "mpirun", min_hosts=min_hosts,
        max_restarts=max_restarts, deadline_seconds=deadline, wait_seconds=wait, leash=leash,
        openblas_threads=openblas, python=python,
    )  # fmt: skip
    if (status := supervise(chosen)) or not evaluates_only():
        sys.exit(status)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=1), required=True, help="The step to repeat.")
@click.argument("overrides", nargs=-1)
def replay(run: Path, step: int, overrides: tuple[str, ...]) -> None:
    """Repeat a step of RUN on this machine, from the nearest checkpoint, and compare it with the record.

    OVERRIDES are KEY=VALUE, for what is elsewhere on this machine (data.path=FOLDER). RUN is only read. Exits
    with 4 if something differs.

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
@click.option(
    "--exact", is_flag=True, help="Check instead that each operation repeats its bits on this machine."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_python
@click.argument("overrides", nargs=-1)
def doctor(
    hostfile: Path | None, exact: bool, as_json: bool, python: str, overrides: tuple[str, ...]
) -> None:
    """Check whether this machine, or the hosts of a host file, can train together.

    Examines each host, connects every link of the ring, and starts ranks. OVERRIDES are those of train.py;
    the data they name is compared. Exits with 3 if a check fails.

    Example: mlx-ring doctor --hostfile hostfiles/lab.json -- data=text data.path=books
    """
    if exact and hostfile:
        raise ConfigError(
            "--exact looks at this machine alone; leave --hostfile out, and compare the digests"
        )
    if exact:
        from mlx_ring.training.exact.doctor_checks import exact_checks  # loads MLX

        return report(exact_checks(), click.echo, as_json=as_json, with_hosts=False)
    from mlx_ring.cluster.doctor.doctor import examine

    found = examine(hostfile, python, list(overrides))
    return report(found, click.echo, as_json=as_json, with_hosts=hostfile is not None)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that makes SHELL complete the words of this command.

    For train.py, see train.py --hydra-help.

    Example: eval "$(mlx-ring completion bash)"
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "mlx-ring", "_MLX_RING_COMPLETE").source())


def main() -> NoReturn:
    """Runs a command and exits. A user's mistake is one line on stderr, with the exit status of its error."""
    take_standard_streams()
    try:
        cli(standalone_mode=False)
        refuse_lost_answer()
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
