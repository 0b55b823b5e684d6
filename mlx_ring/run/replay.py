"""Repeats a step of a run on this machine alone, and compares it with the figures that the run recorded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_ring.checkpoint.manager import parameters_sha256
from mlx_ring.checkpoint.restore import Found
from mlx_ring.cluster.rank.environment import refuse_temporary_folder
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import recorded_run
from mlx_ring.errors import CheckpointError, ConfigError
from mlx_ring.run.builder import Run, build
from mlx_ring.run_directory import checkpoint_files
from mlx_ring.run_directory.sinks.jsonl import read_rows

Figures = dict[str, Any]  # one step's results by name: loss, gradient norm, digests


@dataclass(frozen=True, kw_only=True, eq=False)  # compared by identity
class Repeated:
    """One step that the run recorded: its recorded figures, and the same figures computed here."""

    step: int
    recorded: Figures
    here: Figures

    @property
    def agrees(self) -> bool:
        """Whether every recorded figure was computed again exactly."""
        return self.recorded == self.here


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The steps that a replay compared, and facts for its report."""

    start: str  # the checkpoint that the replay began from, or "the first weights"
    codec: str
    world_size: int  # of the recorded run at that step
    steps: list[Repeated]  # in order; the last one is the step that was asked for


def replay(directory: Path, step: int, overrides: list[str]) -> Replay:
    """Trains from the newest checkpoint before `step`, or the first weights, up to `step`. Writes nothing.

    Args:
        directory: the run's directory.
        step: the number of finished updates after which to compare.
        overrides: Hydra overrides for things that are elsewhere on this machine, such as data.path.

    Returns: every recorded step on the way, with its figures there and here.
    Raises:
        CheckpointError: the directory holds no run that can be read.
        ConfigError: the run did not record the step, the step cannot be reached, or a resumed run would
            refuse these overrides.
    """
    refuse_temporary_folder()
    figures, world_sizes = _recorded_figures(directory)
    if step not in figures:
        _refuse(directory, step, figures)
    found, config_record = _start(directory, step)
    # With steps issued ahead, the compared weights would already be those of a later step.
    alone = (f"run.dir={directory}", "cluster.ranks=null", "memory.issue_ahead=false")
    config = recorded_run(config_record, *alone, *overrides)
    if found is None and config.checkpoint.resume not in ("auto", "never"):
        raise ConfigError(
            f"--step {step}: {directory} began from {config.checkpoint.resume}, and no checkpoint before "
            "this step is left; choose a later step"
        )
    communicator = Communicator.alone()
    run = build(config, communicator, found)
    compared = _repeat(run, step, figures)
    if not compared or compared[-1].step != step:
        raise ConfigError(
            f"--step {step}: the configuration saved with the run ends before this step, at trainer.steps="
            f"{config.trainer.steps}; choose an earlier step"
        )
    later = [size for number, size in sorted(world_sizes.items()) if number >= step]
    return Replay(
        start=found.path.name if found else "the first weights",
        codec=config.communicator.name,
        world_size=[*later, *world_sizes.values(), 1][0],
        steps=compared,
    )


def _repeat(run: Run, step: int, figures: dict[int, Figures]) -> list[Repeated]:
    """Trains up to a step, and puts the figures computed here beside those of every recorded step."""
    compared: list[Repeated] = []
    try:
        for result in run.trainer.steps():
            recorded = {} if result.skipped else figures.get(result.step, {})
            if recorded:
                own = {"loss": result.loss, "gradient_norm": result.gradient_norm}
                here = {name: own[name] if name in own else _weights(run, name) for name in recorded}
                compared.append(Repeated(step=result.step, recorded=recorded, here=here))
            if result.step == step:
                break
    finally:
        run.trainer.close()
    return compared


def _recorded_figures(directory: Path) -> tuple[dict[int, Figures], dict[int, int]]:
    """Reads each step's figures from metrics.jsonl, digests.jsonl and the manifests, and its world size."""
    figures: dict[int, Figures] = {}
    world_sizes: dict[int, int] = {}
    try:
        for row in read_rows(directory / "metrics.jsonl"):
            if row["kind"] == "train":
                row_figures = {name: row[name] for name in ("loss", "gradient_norm")}
                figures.setdefault(row["step"], {}).update(row_figures)
                world_sizes[row["step"]] = row["world_size"]
        if (directory / "digests.jsonl").exists():
            for row in read_rows(directory / "digests.jsonl"):
                figures.setdefault(row["step"], {})["weights_digest"] = row["weights"]
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}; give a run's directory") from None
    for checkpoint in checkpoint_files.scan(directory / "checkpoints"):
        try:
            digest = checkpoint_files.read_manifest(checkpoint).get("parameters_sha256")
        except CheckpointError:
            continue
        figures.setdefault(checkpoint_files.step_of(checkpoint), {})["parameters_sha256"] = digest
    return figures, world_sizes


def _refuse(directory: Path, step: int, figures: dict[int, Figures]) -> None:
    """Raises a ConfigError that names steps that can be replayed."""
    known = sorted(figures)
    near = sorted(known, key=lambda other: abs(other - step))[:2]
    reached = f"steps {known[0]} to {known[-1]}" if known else "no step"
    raise ConfigError(
        f"--step {step}: {directory} has no record of this step (it has {reached}); "
        f"choose {' or '.join(map(str, sorted(near))) or 'another run'}, or log more often "
        "(metrics.log_every_steps)"
    )


def _start(directory: Path, step: int) -> tuple[Found | None, dict[str, Any]]:
    """Finds the newest valid checkpoint before `step`, and the configuration that the step was trained with.

    Returns: the checkpoint, or None to begin from the first weights; and the configuration saved in the first
        checkpoint at or after the step, because a resume may have changed it (else in the newest before).
    Raises: CheckpointError if no checkpoint's manifest can be read.
    """
    present = checkpoint_files.scan(directory / "checkpoints")  # newest first
    before = [path for path in present if checkpoint_files.step_of(path) < step]
    path, manifest, problems = checkpoint_files.newest_valid(before)
    found = None if path is None else Found(path=path, manifest=manifest, problems=problems, own=True)
    for other in [*reversed(present[: len(present) - len(before)]), *before]:
        try:
            return found, checkpoint_files.read_manifest(other)["config"]
        except (CheckpointError, KeyError):
            continue
    raise CheckpointError(f"{directory} has no usable checkpoint to read the configuration from")


def _weights(run: Run, name: str) -> str:
    """Computes a digest of the current weights: that of a check of replicas, or that of a checkpoint."""
    if name == "weights_digest":
        return str(run.verify_replicas())
    return parameters_sha256(run.state.parameters())
