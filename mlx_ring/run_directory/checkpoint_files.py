"""Checkpoints on disk: one directory for each step, complete or absent, verified by its manifest.

    checkpoints/step_00000100/
      manifest.json          format version, step, progress, configuration, and every file's size and SHA-256
      model.safetensors      the model's own parameter names
      optimizer.safetensors  strategy.safetensors (if the strategy keeps something)

A checkpoint is written to `.tmp-…` beside its place; every file is put on the disk, the manifest last; the
rename commits it. It is safetensors and JSON only: nothing in a checkpoint is ever executed. No mlx here.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from mlx_ring.errors import CheckpointError, NewerCheckpointError
from mlx_ring.run_directory.manifest import FORMAT_VERSION, MANIFEST, open_file, read_manifest, sealed
from mlx_ring.run_directory.whole_file import whole_file, whole_file_pattern

STEP_NAME = re.compile(r"step_(\d{8,})")
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class HostArray:
    """An array in host memory: MLX's name of its dtype, its shape, and its contiguous bytes."""

    dtype: str
    shape: tuple[int, ...]
    content: np.ndarray[Any, Any]


HostArrays = dict[str, HostArray]


def parameters_sha256(parameters: HostArrays) -> str:
    """Compute the SHA-256 of a model's parameters, in hexadecimal.

    It is over, for each parameter in sorted order of its dotted path: the path in UTF-8, one zero byte, and
    the array's raw little-endian bytes, row-major.
    """
    digest = hashlib.sha256()
    for path in sorted(parameters):
        digest.update(path.encode() + b"\0")
        digest.update(parameters[path].content.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def step_directory(checkpoints: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return checkpoints / f"step_{step:08d}"


def write(
    checkpoints: Path, step: int, files: dict[str, HostArrays], fields: dict[str, Any]
) -> tuple[Path, int]:
    """Write one checkpoint and commit it. Nothing that was there before is touched.

    Args:
        checkpoints: the folder of all checkpoints; it is made if it is missing.
        step: the number of finished updates.
        files: the arrays of each file, by the file's name without `.safetensors`.
        fields: what the manifest says beside the version, the step and the files.

    Returns: the checkpoint's directory, and the size of its arrays' files in bytes.
    Raises: OSError from the disk; CheckpointError if there is too little space.
    """
    if not checkpoints.exists():
        refuse_dangling(checkpoints)
        checkpoints.mkdir(mode=0o700)
        sync(checkpoints.parent)
    _check_space(checkpoints, files)
    temporary = checkpoints / f".tmp-{step:08d}-{os.getpid()}"
    temporary.mkdir(mode=0o700)
    try:
        entries = {f"{name}.safetensors": _write_file(temporary, name, files[name]) for name in files}
        manifest = sealed({"format_version": FORMAT_VERSION, "step": step, **fields, "files": entries})
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
        sync(temporary / MANIFEST)
        sync(temporary)
        final = step_directory(checkpoints, step)
        temporary.rename(final)
        sync(checkpoints)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # the library's own word for a failed write
            raise OSError(errno.EIO, str(error), str(temporary)) from error
        raise
    return final, sum(entry["bytes"] for entry in entries.values())


def amend(directory: Path, fields: dict[str, Any]) -> None:
    """Change fields of a checkpoint's manifest, which is replaced whole.

    Raises: CheckpointError if there is no good manifest; OSError from the disk.
    """
    manifest = sealed({**read_manifest(directory), **fields})
    with whole_file(directory / MANIFEST, sync=True) as path:
        path.write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
    sync(directory)


def _check_space(checkpoints: Path, files: dict[str, HostArrays]) -> None:
    size = sum(array.content.nbytes for arrays in files.values() for array in arrays.values())
    free = shutil.disk_usage(checkpoints).free
    if free < 2 * size:
        raise CheckpointError(
            f"{checkpoints} has {free} bytes free, a checkpoint needs {2 * size}; make room"
        )


def _write_file(folder: Path, name: str, arrays: HostArrays) -> dict[str, Any]:
    """Write arrays as one file, onto the disk. Returns: the file's entry in the manifest."""
    path = folder / f"{name}.safetensors"
    specs = {key: _spec(array) for key, array in arrays.items()}
    serialize_file(specs, path, metadata={"format": "mlx"})
    sync(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _spec(array: HostArray) -> TensorSpec:
    return TensorSpec(
        dtype=array.dtype,
        shape=array.shape,
        data_ptr=array.content.ctypes.data,
        data_len=array.content.nbytes,
    )


def sync(path: Path) -> None:
    """Push a file or a directory to the disk; macOS's fsync stops at the drive's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            try:
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
            except OSError:
                pass
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scan(checkpoints: Path) -> list[Path]:
    """List the checkpoints of a run, newest first, verified or not."""
    found = [path for path in checkpoints.glob("step_*") if STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def refuse_dangling(folder: Path) -> None:
    """Raises: CheckpointError if a folder of a run is a link and what it leads to is absent."""
    if folder.is_symlink() and not folder.exists():
        raise CheckpointError(
            f"{folder} is a link to {folder.readlink()}, which does not exist; mount its disk, or "
            "remove the link"
        )


def named(path: Path) -> list[Path]:
    """List the checkpoints that a path names, newest first: itself, or those of a run or of its checkpoints/.

    Raises: CheckpointError if the path does not exist or is a file, or its checkpoints/ is a link to nothing.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; give a run's directory or one of its checkpoints/step_…")
    if (path / MANIFEST).exists() or STEP_NAME.fullmatch(path.name):
        return [path]
    refuse_dangling(path / "checkpoints")
    return scan(path / "checkpoints") or scan(path)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's directory; -1 for another name."""
    match = STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def verify(directory: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and compare it with its manifest. Returns: the manifest.

    Raises: CheckpointError naming the first file that is not as it was written.
    """
    if directory.is_symlink() or not directory.is_dir():
        raise CheckpointError(f"{directory} is no checkpoint: a symbolic link, or not a directory")
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        if not FILE_NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{directory / MANIFEST} names {name!r}: only plain .safetensors names are read"
            )
        path = directory / name
        try:
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry["bytes"]:
                    raise CheckpointError(f"{path} has {size} bytes, its manifest says {entry['bytes']}")
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if digest != entry["sha256"]:
            raise CheckpointError(
                f"{path} has SHA-256 {digest[:12]}…, its manifest says {entry['sha256'][:12]}…"
            )
        check_safetensors(path)
    if "model.safetensors" not in manifest["files"]:
        raise CheckpointError(f"{directory / MANIFEST} lists no model.safetensors")
    return manifest


def check_safetensors(path: Path) -> None:
    """Refuse what MLX's reader accepts: overlapping tensors, trailing bytes, duplicate keys, a huge header.

    Raises: CheckpointError naming the file.
    """
    try:
        with open_file(path), safe_open(path, framework="numpy") as file:
            file.keys()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no valid safetensors file: {error}") from None


def newest_valid(candidates: Iterable[Path]) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Find the first candidate that verifies.

    Returns: its directory and its manifest (None and {} if none verifies), and what was wrong with the others
        before it.
    Raises: NewerCheckpointError for one of a later version: passing it over would mean to overwrite it.
    """
    problems: list[str] = []
    for path in candidates:
        try:
            return path, verify(path), problems
        except NewerCheckpointError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
    return None, {}, problems


def replace(checkpoints: Path, step: int, complete: Path) -> None:
    """Move a complete directory into the place of a step's checkpoint; delete the one that was there.

    Raises: OSError.
    """
    final = step_directory(checkpoints, step)
    sync(complete)
    if final.exists():
        remove(final)
    complete.rename(final)
    sync(checkpoints)


def remove(path: Path) -> None:
    """Delete a checkpoint so that one that is half deleted never has a checkpoint's name."""
    doomed = path.with_name(f".del-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(checkpoints: Path) -> None:
    """Delete what processes that have ended left half written or half deleted."""
    for path in checkpoints.glob(f"step_*/{whole_file_pattern(MANIFEST)}"):
        path.unlink(missing_ok=True)
    for path in [*checkpoints.glob(".tmp-*"), *checkpoints.glob(".del-*")]:
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(path, ignore_errors=True)
