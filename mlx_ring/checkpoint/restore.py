"""Where a run starts from: the checkpoint that it continues, or weights from elsewhere, or none."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from mlx_ring.checkpoint import manager as checkpoints
from mlx_ring.cluster.rank.protocol import REACHED_STEP
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.resume_rules import look_ups_sha256, refuse_changes
from mlx_ring.config.run_config import RunConfig
from mlx_ring.errors import CheckpointError, ClusterError, ConfigError, MlxRingError
from mlx_ring.run_directory import checkpoint_files as checkpoint_format
from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.training.parameter_authority import ParameterAuthority
from mlx_ring.training.strategies import Strategy
from mlx_ring.training.trainer import Progress


@dataclass(frozen=True, kw_only=True)
class Found:
    """A verified checkpoint that this run continues from. On rank 0."""

    path: Path
    manifest: dict[str, Any]
    problems: list[str]  # what was wrong with newer ones
    own: bool  # it lies in this run's directory


def find(config: RunConfig, directory: RunDirectory) -> Found | None:
    """The checkpoint that `checkpoint.resume` asks for. Rank 0.

    Raises: CheckpointError where none is usable; ClusterError where a supervisor knows that there was one;
    ConfigError for a change that a resumed run may not make.
    """
    needs_weights = config.evaluation.only and config.checkpoint.initialize_from is None
    if config.checkpoint.resume == "never":
        if needs_weights:
            raise ConfigError(
                "evaluation.only=true with checkpoint.resume=never has no weights; give "
                "checkpoint.initialize_from"
            )
        return None
    source = directory.path
    if config.checkpoint.resume != "auto":
        source = Path(config.checkpoint.resume).expanduser()
    elif not checkpoint_format.scan(directory.path / "checkpoints"):
        if needs_weights:
            raise CheckpointError(
                f"evaluation.only=true found no checkpoint in {source}; give run.dir=RUN or "
                "checkpoint.resume=PATH"
            )
        if reached := os.environ.get(REACHED_STEP):
            raise ClusterError(
                f"none of these hosts has a checkpoint of this run, which had reached step {reached}; bring "
                "back one that has, or start anew with checkpoint.resume=never"
            )
        return None
    if config.evaluation.only and config.checkpoint.initialize_from is not None:
        raise ConfigError(
            f"evaluation.only=true could mean the checkpoints of {source} or checkpoint.initialize_from="
            f"{config.checkpoint.initialize_from}; give checkpoint.resume=never for the latter, or leave "
            "it out"
        )
    path, manifest, problems = checkpoints.find(source)
    own = path.resolve().parent == (directory.path / "checkpoints").resolve()
    if not config.evaluation.only:
        refuse_another_run(config, manifest)
    return Found(path=path, manifest=manifest, problems=problems, own=own)


def refuse_another_run(config: RunConfig, manifest: dict[str, Any]) -> None:
    """Raises: ConfigError for a change that a resumed run may not make."""
    digest = look_ups_sha256(config.record, config.flat())
    alike = manifest.get("look_ups_sha256", digest) == digest
    refuse_changes(manifest.get("config", {}), config.record, resolved_alike=alike)


def replaces_record(config: RunConfig, found: Found | None) -> bool:
    """Whether a record that is in the run's directory is another run's: two never share one. Rank 0."""
    return not found.own if found is not None else config.checkpoint.resume == "never"


def fill(
    config: RunConfig,
    communicator: Communicator,
    authority: ParameterAuthority,
    found: Found | None,
    data_sha256: str,
    model: nn.Module,
    optimizer: Optimizer,
    strategy: Strategy,
) -> Progress:
    """Put rank 0's weights and state on every rank: restored, taken from elsewhere, or just drawn.

    Collective: every rank must call. Raises: ConfigError or CheckpointError, the same on every rank.
    """
    weights, state = dict(tree_flatten(model.parameters())), dict(tree_flatten(optimizer.state))
    kept, progress = strategy.state(), Progress()
    error: MlxRingError | None = None
    if communicator.rank == 0:
        try:
            if found is not None:
                weights, state, kept, progress = _read(config, found, data_sha256, weights, state, kept)
            elif config.checkpoint.initialize_from is not None:
                source = Path(config.checkpoint.initialize_from).expanduser()
                loaded = checkpoints.initial_weights(source)
                weights = checkpoints.match(
                    loaded, weights, str(source), "choose the model that it was made with"
                )
        except MlxRingError as caught:
            error = caught
    communicator.agree_on_error(error)
    progress = Progress(**communicator.broadcast_object(asdict(progress)))
    model.update(tree_unflatten(list(authority.broadcast(weights).items())))
    optimizer.state = tree_unflatten(list(authority.broadcast(state).items()))
    optimizer.init(model.trainable_parameters())
    strategy.load(authority.broadcast(kept) if kept else kept)
    return progress


def _read(
    config: RunConfig, found: Found, data_sha256: str, weights: Arrays, state: Arrays, kept: Arrays
) -> tuple[Arrays, Arrays, Arrays, Progress]:
    """The arrays of a checkpoint, where it is of this run's model; for a resume also of this run's data."""
    where = str(found.path)
    saved = found.manifest.get("data_sha256")
    if saved != data_sha256 and not config.evaluation.only:
        raise ConfigError(
            f"the data's SHA-256 is {data_sha256[:12]} now and was {str(saved)[:12]} in {where}; "
            "resume with the same data, or start a new run with checkpoint.initialize_from"
        )
    files = checkpoints.load(found.path, found.manifest)
    remedy = "resume with the configuration it was saved with"
    weights = checkpoints.match(files["model"], weights, f"{where}/model.safetensors", remedy)
    if config.evaluation.only:
        return weights, state, kept, _progress(found)
    state = checkpoints.match(files.get("optimizer", {}), state, f"{where}/optimizer.safetensors", remedy)
    kept = checkpoints.match(files.get("strategy", {}), kept, f"{where}/strategy.safetensors", remedy)
    return weights, state, kept, _progress(found)


def _progress(found: Found) -> Progress:
    try:
        return Progress(**found.manifest["progress"])
    except TypeError as error:
        where = found.path / "manifest.json"
        raise CheckpointError(f"{where} counts what this version does not: {error}") from None
