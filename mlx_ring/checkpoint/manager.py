"""Saves and restores a run. One rank of each disk writes, in a thread; the loop stalls only for the copy."""

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

from mlx_ring.communication.arrays import Arrays
from mlx_ring.errors import CheckpointError
from mlx_ring.run_directory import checkpoint_files as disk
from mlx_ring.run_directory.checkpoint_files import HostArray, HostArrays

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One save that ended. `error` is None where it was committed."""

    step: int
    path: Path
    bytes: int
    parameters_sha256: str
    stall_seconds: float
    write_seconds: float
    error: str | None


def snapshot(array: mx.array) -> mx.array:
    """The array as it is now, safe to be read from another thread once evaluated.

    On the CPU and on Metal that is the array itself: it is immutable, and while it is held its memory is not
    reused. A GPU with its own memory moves a buffer when the host reads it, so there the device makes a copy
    for the reader. bfloat16, which numpy lacks, goes as raw 16-bit words.
    """
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    if mx.default_device() == mx.gpu and not mx.metal.is_available():
        return mx.where(mx.array(True), raw, raw)
    return raw


def to_host(array: mx.array, dtype: mx.Dtype) -> HostArray:
    """A snapshot's bytes in host memory; `dtype` is that of the array it was made of."""
    return HostArray(str(dtype).rpartition(".")[2], tuple(array.shape), np.ascontiguousarray(array))


class CheckpointManager:
    """The checkpoints of one run directory. Exists where a disk's writer is."""

    def __init__(self, run_directory: Path, *, keep_last: int, keep_best: int) -> None:
        self.directory = run_directory / "checkpoints"
        self._keep_last, self._keep_best = keep_last, keep_best
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Saved] | None = None

    def save(self, step: int, files: dict[str, Arrays], facts: dict[str, Any], *, since: float) -> None:
        """Start writing a checkpoint, once the one before has ended (`wait`); arrays must not be evaluated
        lazily later: they are copied out here.

        `facts` go into the manifest (progress, config, evaluation). `since` is when training began to stand
        still, on the clock of time.perf_counter.
        """
        assert self._pending is None
        dtypes = {name: {key: array.dtype for key, array in arrays.items()} for name, arrays in files.items()}
        held = {
            name: {key: snapshot(array) for key, array in arrays.items()} for name, arrays in files.items()
        }
        mx.eval(held)
        stall_seconds = time.perf_counter() - since
        self._pending = self._writer.submit(self._write, step, held, dtypes, facts, stall_seconds)

    def poll(self) -> list[Saved]:
        """The save that ended since the last call, if any. Never waits."""
        return self.wait() if self._pending is not None and self._pending.done() else []

    def wait(self) -> list[Saved]:
        """Wait for the save that is being written."""
        pending, self._pending = self._pending, None
        return [] if pending is None else [pending.result()]

    def close(self) -> None:
        """Let the writer finish; what it still wrote is on disk afterwards."""
        self._writer.shutdown(wait=True)

    def _write(
        self,
        step: int,
        held: dict[str, Arrays],
        dtypes: dict[str, dict[str, mx.Dtype]],
        facts: dict[str, Any],
        stall_seconds: float,
    ) -> Saved:
        """In the thread."""
        start = time.perf_counter()
        digest, path, size, error = "", disk.step_directory(self.directory, step), 0, None
        try:
            host: dict[str, HostArrays] = {
                name: {key: to_host(array, dtypes[name][key]) for key, array in arrays.items()}
                for name, arrays in held.items()
                if arrays
            }
            digest = disk.parameters_sha256(host["model"])
            path, size = disk.write(self.directory, step, host, {"parameters_sha256": digest, **facts})
        except (OSError, CheckpointError) as failure:
            error = str(failure)
        else:
            with contextlib.suppress(
                OSError
            ):  # what could not be deleted now is tried again after the next save
                self._prune()
        return Saved(
            step=step,
            path=path,
            bytes=size,
            parameters_sha256=digest,
            stall_seconds=stall_seconds,
            write_seconds=time.perf_counter() - start,
            error=error,
        )

    def _prune(self) -> None:
        """After a commit: keep the newest, the best, and nothing that an older future left behind."""
        present = disk.scan(self.directory)
        kept = set(present[: self._keep_last])
        if self._keep_best:
            scored = [(score, path) for path in present if (score := _evaluation_loss(path)) is not None]
            kept.update(path for _, path in sorted(scored, key=lambda pair: pair[0])[: self._keep_best])
        for path in present:
            if path not in kept:
                disk.remove(path)
        for path in self.directory.glob(".old-*"):
            shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, after_step: int) -> None:
        """Rename the checkpoints of a later step: damaged, or of the future that this run now leaves.

        They stay on disk until the next one is committed.
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


def find(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint that `path` names: itself, or the newest valid one of a run.

    Returns its directory, its manifest and what was wrong with newer ones. Raises: CheckpointError.
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
    """The arrays of a verified checkpoint, by file, read at once: MLX's loading is lazy, and files may go."""
    return {name.removesuffix(".safetensors"): load_arrays(path / name) for name in manifest["files"]}


def load_arrays(path: Path) -> Arrays:
    """Every array of one safetensors file. Raises: CheckpointError."""
    disk.check_safetensors(path)
    try:
        arrays = mx.load(str(path), format="safetensors")
    except RuntimeError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from None
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return arrays


def match(loaded: Arrays, expected: Arrays, where: str, remedy: str) -> Arrays:
    """`loaded`, if it has exactly the names, shapes and dtypes of `expected`, in their order.

    Raises: CheckpointError naming the first tensor that is missing, extra or different.
    """
    for name in expected:
        if name not in loaded:
            raise CheckpointError(f"{where} lacks {name}; {remedy}")
    for name, array in loaded.items():
        if name not in expected:
            raise CheckpointError(f"{where} holds {name}, which this run does not have; {remedy}")
        mine, theirs = expected[name], array
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            raise CheckpointError(
                f"{name} is {theirs.dtype} {theirs.shape} in {where} and {mine.dtype} {mine.shape} in this "
                f"run; {remedy}"
            )
    return {name: loaded[name] for name in expected}


def initial_weights(path: Path) -> Arrays:
    """The model's arrays for `checkpoint.initialize_from`: a run, a checkpoint, or a safetensors file."""
    if path.suffix == ".safetensors" and path.is_file():
        return load_arrays(path)
    directory, _, problems = find(path)
    for problem in problems:
        log.warning("passed over a damaged checkpoint: %s", problem)
    return load_arrays(directory / "model.safetensors")
