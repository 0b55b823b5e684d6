"""Writes checkpoints and reads them. One rank of each disk writes, in a thread, while training goes on."""

import contextlib
import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_ring.checkpoint.saved_state import SavedArrays
from mlx_ring.communication.arrays import Arrays
from mlx_ring.errors import CheckpointError
from mlx_ring.run_directory import checkpoint_files as disk
from mlx_ring.run_directory.checkpoint_files import HostArray

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One save that ended: committed, if `error` is None. Training stood still for `stall_seconds`."""

    step: int
    path: Path
    bytes: int
    parameters_sha256: str
    stall_seconds: float
    write_seconds: float
    error: str | None


@dataclass(frozen=True, eq=False)  # compared by identity
class Snapshot:
    """One array as it was, safe to be read from another thread once `content` is evaluated.

    On the CPU and on Metal `content` is the array itself: it is immutable, and while it is held its memory is
    not reused. A GPU with its own memory moves a buffer when the host reads it, so there the device makes a
    copy for the reader. bfloat16, which numpy lacks, goes as raw 16-bit words.
    """

    content: mx.array
    dtype: mx.Dtype  # that of the array

    @classmethod
    def of(cls, array: mx.array) -> "Snapshot":
        """Take a snapshot of an array of any shape and dtype."""
        raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        if mx.default_device() == mx.gpu and not mx.metal.is_available():
            raw = mx.where(mx.array(True), raw, raw)
        return cls(raw, array.dtype)

    def to_host(self) -> HostArray:
        """The array's bytes in host memory."""
        name = str(self.dtype).rpartition(".")[2]
        return HostArray(name, tuple(self.content.shape), np.ascontiguousarray(self.content))


Snapshots = dict[str, Snapshot]  # by the array's name


def parameters_sha256(parameters: Arrays) -> str:
    """The digest of all parameters of a model, by dotted path, as status.json and the manifest have it."""
    return disk.parameters_sha256({path: Snapshot.of(array).to_host() for path, array in parameters.items()})


class CheckpointManager:
    """Writes the checkpoints of one run directory in a thread. Each disk's writer has one."""

    def __init__(self, run_directory: Path, *, keep_last: int, keep_best: int) -> None:
        """Start nothing yet.

        Args:
            run_directory: the checkpoints go into its folder `checkpoints`.
            keep_last: how many of the newest checkpoints stay.
            keep_best: how many of those with the lowest evaluation loss stay besides.
        """
        self.directory = run_directory / "checkpoints"
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Saved] | None = None
        self._amending: Future[None] | None = None  # the last one that was asked for

    def save(self, step: int, state: SavedArrays, fields: dict[str, Any], *, since: float) -> None:
        """Start to write a checkpoint. The one before must have ended: call `wait` first.

        The arrays are computed here, and held until they are written; the caller may replace its own.

        Args:
            step: the number of finished updates.
            state: what to save.
            fields: what the manifest says of it, such as progress and configuration.
            since: when training began to stand still, on the clock of time.perf_counter, in seconds.
        """
        assert self._pending is None
        # By identity: a parameter that is in a file is the same array there, and is held once.
        arrays = {
            id(array): array for each in (*state.files.values(), state.parameters) for array in each.values()
        }
        taken = {key: Snapshot.of(array) for key, array in arrays.items()}
        mx.eval([snapshot.content for snapshot in taken.values()])
        files = {
            name: {key: taken[id(array)] for key, array in each.items()}
            for name, each in state.files.items()
            if each
        }
        parameters = {path: taken[id(array)] for path, array in state.parameters.items()}
        stall_seconds = time.perf_counter() - since
        self._pending = self._writer.submit(self._write, step, files, parameters, fields, stall_seconds)

    def amend(self, step: int, fields: dict[str, Any]) -> None:
        """Change fields of a checkpoint's manifest, in the thread, after what is being written.

        If that cannot be done, the checkpoint stays as good as it was, and a warning goes to the log.
        """
        self._amending = self._writer.submit(self._amend, disk.step_directory(self.directory, step), fields)

    def poll(self) -> list[Saved]:
        """The save that has ended since the last call, if one has. Never waits."""
        return self._take() if self._pending is not None and self._pending.done() else []

    def wait(self) -> list[Saved]:
        """Wait for the save that is being written, if one is, and for what is to be amended.

        Returns: the save, or nothing.
        """
        if self._amending is not None:
            self._amending.result()
        return self._take()

    def _take(self) -> list[Saved]:
        pending, self._pending = self._pending, None
        return [] if pending is None else [pending.result()]

    def close(self) -> None:
        """Let the thread finish: what it was writing is on the disk afterwards."""
        self._writer.shutdown(wait=True)

    def _write(
        self,
        step: int,
        files: dict[str, Snapshots],
        parameters: Snapshots,
        fields: dict[str, Any],
        stall_seconds: float,
    ) -> Saved:
        """Write one checkpoint, in the thread."""
        start = time.perf_counter()
        digest = ""
        path = disk.step_directory(self.directory, step)
        size = 0
        error: str | None = None
        try:
            hosted = {
                each: each.to_host() for held in (*files.values(), parameters) for each in held.values()
            }
            digest = disk.parameters_sha256({name: hosted[each] for name, each in parameters.items()})
            host_files = {
                name: {key: hosted[each] for key, each in held.items()} for name, held in files.items()
            }
            path, size = disk.write(self.directory, step, host_files, {"parameters_sha256": digest, **fields})
        except (OSError, CheckpointError) as failure:
            error = str(failure)
        else:
            with contextlib.suppress(OSError):  # it is tried again after the next save
                self._prune()
                for old in self.directory.glob(".old-*"):
                    shutil.rmtree(old, ignore_errors=True)
        return Saved(
            step=step,
            path=path,
            bytes=size,
            parameters_sha256=digest,
            stall_seconds=stall_seconds,
            write_seconds=time.perf_counter() - start,
            error=error,
        )

    def _amend(self, path: Path, fields: dict[str, Any]) -> None:
        try:
            disk.amend(path, fields)
        except (OSError, CheckpointError) as error:
            log.warning("the manifest of %s stays without %s: %s", path, ", ".join(fields), error)
        else:
            with contextlib.suppress(OSError):  # as after a save
                self._prune()

    def _prune(self) -> None:
        """Delete what is not to be kept: the newest and the best stay."""
        present = disk.scan(self.directory)
        kept = set(present[: self._keep_last])
        if self._keep_best:
            scored = [(score, path) for path in present if (score := _evaluation_loss(path)) is not None]
            kept.update(path for _, path in sorted(scored, key=lambda pair: pair[0])[: self._keep_best])
        for path in present:
            if path not in kept:
                disk.remove(path)

    def set_aside(self, after_step: int) -> None:
        """Rename the checkpoints of steps after `after_step`: they are damaged, or this run goes back before
        them and takes another course. They stay on the disk until the next checkpoint is committed.

        Raises: OSError.
        """
        for path in disk.scan(self.directory):
            if disk.step_of(path) > after_step:
                shutil.rmtree(path.with_name(f".old-{path.name}"), ignore_errors=True)
                path.rename(path.with_name(f".old-{path.name}"))


def _evaluation_loss(path: Path) -> float | None:
    try:
        evaluation = disk.read_manifest(path).get("evaluation")
    except CheckpointError:
        return None
    loss = evaluation.get("loss") if isinstance(evaluation, dict) else None
    return loss if isinstance(loss, float) and loss == loss else None  # a NaN is never the best


def checkpoint_at(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Find the checkpoint that a path names: itself, or the newest valid one of a run.

    Returns: its directory, its manifest, and what was wrong with newer ones.
    Raises: CheckpointError if there is none, or if the checkpoint itself was named and is damaged.
    """
    if path.suffix in {".npz", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"}:
        raise CheckpointError(f"{path} is not supported: checkpoints are safetensors and JSON, never pickles")
    candidates = disk.named(path)
    if candidates == [path]:
        try:
            return path, disk.verify(path), []
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; give another checkpoint, or its run for the newest valid one"
            ) from None
    found, manifest, problems = disk.newest_valid(candidates)
    if found is None:
        reason = problems[0] if problems else "it has no checkpoints/step_… in it"
        raise CheckpointError(
            f"no usable checkpoint in {path}: {reason}; give another, or start anew with "
            "checkpoint.resume=never"
        )
    return found, manifest, problems


def load(path: Path, manifest: dict[str, Any]) -> dict[str, Arrays]:
    """Load the arrays of a verified checkpoint, by file (its name without `.safetensors`).

    They are read at once: MLX loads lazily, and a file may be deleted. Raises: CheckpointError.
    """
    return {name.removesuffix(".safetensors"): load_arrays(path / name) for name in manifest["files"]}


def load_arrays(path: Path) -> Arrays:
    """Load every array of one safetensors file. Raises: CheckpointError naming the file."""
    disk.check_safetensors(path)
    try:
        arrays = mx.load(str(path), format="safetensors")
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from None
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return arrays


def match(loaded: Arrays, expected: Arrays, where: str, remedy: str) -> Arrays:
    """Check that arrays are those that this run has.

    Args:
        loaded: what a file holds.
        expected: this run's arrays of that file; their values do not matter.
        where: the file, for the message.
        remedy: what to do about a difference, for the message.

    Returns: `loaded`, in the order of `expected`.
    Raises: CheckpointError naming the first array that is missing, extra, or of another shape or dtype.
    """
    for name in expected:
        if name not in loaded:
            raise CheckpointError(f"{where} lacks {name}; {remedy}")
    for name, theirs in loaded.items():
        if name not in expected:
            raise CheckpointError(f"{where} holds {name}, which this run does not have; {remedy}")
        mine = expected[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise CheckpointError(
                f"{name} is {theirs.dtype} {theirs.shape} in {where} and {mine.dtype} {mine.shape} in this "
                f"run; {remedy}"
            )
    return {name: loaded[name] for name in expected}


def initial_weights(path: Path) -> Arrays:
    """Load the model's arrays for `checkpoint.initialize_from`: of a run, a checkpoint or a safetensors file.

    Raises: CheckpointError if the path names none of these.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return load_arrays(path)
    directory, _, problems = checkpoint_at(path)
    for problem in problems:
        log.warning("passed over a damaged checkpoint: %s", problem)
    return load_arrays(directory / "model.safetensors")
