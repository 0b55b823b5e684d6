"""Where a run starts: from the checkpoint that it continues, from weights of another run, or anew."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_ring.checkpoint import manager as checkpoints
from mlx_ring.checkpoint.saved_state import SavedState
from mlx_ring.cluster.rank.progress import working
from mlx_ring.cluster.rank.protocol import REACHED_STEP
from mlx_ring.communication.arrays import Arrays
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.resume_rules import look_ups_sha256, refuse_changes
from mlx_ring.config.rules import expand_home
from mlx_ring.config.run_config import RunConfig
from mlx_ring.config.typed_text import with_texts
from mlx_ring.errors import CheckpointError, ClusterError, ConfigError, MlxRingError
from mlx_ring.run_directory import checkpoint_files
from mlx_ring.run_directory.directory import RunDirectory
from mlx_ring.training.parameter_authority import ParameterAuthority
from mlx_ring.training.trainer import Progress


@dataclass(frozen=True, kw_only=True)
class Found:
    """A verified checkpoint from which this run continues. Only rank 0 has it."""

    path: Path
    manifest: dict[str, Any]
    problems: list[str]  # what was wrong with newer ones
    own: bool  # whether it lies in this run's directory


def find(config: RunConfig, directory: RunDirectory) -> Found | None:
    """Find the checkpoint that `checkpoint.resume` asks for. For rank 0. Returns: None for a new run.

    Raises:
        CheckpointError: there are checkpoints and none is usable, or none is there for an evaluation.
        ClusterError: there is none, but a supervisor knows that there was one.
        ConfigError: the configuration differs from the checkpoint's in what a resumed run cannot change.
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
        source = expand_home("checkpoint.resume", config.checkpoint.resume)
    elif not checkpoint_files.scan(directory.path / "checkpoints"):
        checkpoint_files.refuse_dangling(directory.path / "checkpoints")
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
    path, manifest, problems = checkpoints.checkpoint_at(source)
    own = path.resolve().parent == (directory.path / "checkpoints").resolve()
    if not config.evaluation.only:
        refuse_another_run(config, manifest)
    return Found(path=path, manifest=manifest, problems=problems, own=own)


def refuse_another_run(config: RunConfig, manifest: dict[str, Any]) -> None:
    """Compare the configuration with a checkpoint's.

    Raises: ConfigError for the first difference that a resumed run may not have.
    """
    digest = look_ups_sha256(config.redacted, config.flat())
    alike = manifest.get("look_ups_sha256", digest) == digest
    refuse_changes(with_texts(manifest.get("config", {})), config.redacted, resolved_alike=alike)


def replaces_record(config: RunConfig, found: Found | None) -> bool:
    """Whether a record in the run's directory is another run's, and must make room. For rank 0."""
    return not found.own if found is not None else config.checkpoint.resume == "never"


def fill(
    config: RunConfig,
    communicator: Communicator,
    authority: ParameterAuthority,
    found: Found | None,
    data_sha256: str,
    state: SavedState,
) -> Progress:
    """Put rank 0's weights and state on every rank: restored, taken from elsewhere, or as they were drawn.

    Collective: every rank must call.

    Args:
        found: the checkpoint to restore; None for a new run. Read on rank 0 alone.
        data_sha256: the digest of this run's data, which must be the checkpoint's.
        state: where to put it.

    Returns: how far the run has come, the same on every rank.
    Raises: ConfigError or CheckpointError, the same on every rank, if the checkpoint does not fit this run.
    """
    files = state.arrays().files
    progress = Progress()
    error: MlxRingError | None = None
    if communicator.rank == 0:
        try:
            if found is not None:
                with working("reading the checkpoint"):
                    files |= _read(config, found, data_sha256, state, files)
                progress = _progress(found)
            elif config.checkpoint.initialize_from is not None:
                source = expand_home("checkpoint.initialize_from", config.checkpoint.initialize_from)
                loaded = checkpoints.initial_weights(source)
                remedy = "choose the model that it was made with"
                files["model"] = checkpoints.match(loaded, files["model"], str(source), remedy)
        except MlxRingError as caught:
            error = caught
    communicator.agree_on_error(error)
    progress = Progress(**communicator.broadcast_object(asdict(progress)))
    state.put_back(
        {name: authority.broadcast(arrays) if arrays else arrays for name, arrays in files.items()}
    )
    return progress


def _read(
    config: RunConfig, found: Found, data_sha256: str, state: SavedState, expected: dict[str, Arrays]
) -> dict[str, Arrays]:
    """Read the files of a checkpoint that this run needs: the model alone if it only evaluates.

    Raises: CheckpointError if the checkpoint is of another model; ConfigError if it is of other data.
    """
    where = str(found.path)
    saved = found.manifest.get("data_sha256")
    if saved != data_sha256 and not config.evaluation.only:
        raise ConfigError(
            f"the data's SHA-256 is {data_sha256[:12]} now and was {str(saved)[:12]} in {where}; "
            "resume with the same data, or start a new run with checkpoint.initialize_from"
        )
    loaded = checkpoints.load(found.path, found.manifest)
    remedy = "resume with the configuration it was saved with"
    needed = ["model"] if config.evaluation.only else list(expected)
    files = {
        name: checkpoints.match(loaded.get(name, {}), expected[name], f"{where}/{name}.safetensors", remedy)
        for name in needed
    }
    _check_unsaved(found, state.parameters(), files["model"])
    return files


def _check_unsaved(found: Found, parameters: Arrays, restored: Arrays) -> None:
    """Check that the parameters which the checkpoint does not hold are those that it was saved with.

    Raises: CheckpointError.
    """
    unsaved = parameters.keys() - restored.keys()
    if not unsaved:
        return
    now = checkpoints.parameters_sha256(parameters | restored)
    before = str(found.manifest.get("parameters_sha256"))
    if now != before:
        raise CheckpointError(
            f"{found.path} was saved without {len(unsaved)} of the model's parameters ({min(unsaved)}, …), "
            f"which have changed: the SHA-256 of all is {now[:12]} now and was {before[:12]}; resume with "
            "the model it was saved with"
        )


def _progress(found: Found) -> Progress:
    try:
        return Progress(**found.manifest["progress"])
    except TypeError as error:
        where = found.path / "manifest.json"
        raise CheckpointError(f"{where} has progress that this version does not count: {error}") from None
