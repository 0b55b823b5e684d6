"""A checkpoint's manifest: what lies in it, sealed with a SHA-256 of its own. No mlx here."""

import errno
import hashlib
import json
import os
import secrets
import stat
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from mlx_ring.errors import CheckpointError, NewerCheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Lineage:
    """Which course of training a checkpoint belongs to: a first start and everything that continued it.

    Disks may hold checkpoints of several courses in one run directory: a host may have been away when a run
    was started anew. Their steps cannot be compared: the later generation wins, and two courses never mix.
    """

    generation: int = 0  # a run that was started anew over another is of the next generation
    name: str = ""  # drawn at random; earlier versions gave none

    @classmethod
    def new(cls, generation: int) -> "Lineage":
        """The lineage of a run that starts now."""
        return cls(generation, secrets.token_hex(8))

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Lineage":
        """What a manifest that `read_manifest` gave says."""
        return cls(manifest["line"]["generation"], manifest["line"]["line"])

    def as_json(self) -> dict[str, Any]:
        """The manifest's field `line`."""
        return {"generation": self.generation, "line": self.name}


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Add `sha256`: over all other fields, as JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return {**rest, "sha256": digest}


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest in a checkpoint's directory; fields that earlier versions lack get their defaults.

    Raises:
        CheckpointError: it cannot be read or is damaged; the message names the file and the field.
        NewerCheckpointError: a later version wrote it.
    """
    path = directory / MANIFEST
    manifest, is_whole = _read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path} is no manifest: it lists no files")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise (NewerCheckpointError if newer else CheckpointError)(
            f"{path} has format version {version}; this version reads {FORMAT_VERSION}: update mlx_ring"
        )
    if not is_whole:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
    manifest.setdefault("line", Lineage().as_json())
    _check_fields(path, manifest)
    return manifest


def _read_json(path: Path) -> tuple[Any, bool]:
    """Read a file of JSON. Returns: its value, and whether that is an object with the right `sha256`."""
    try:
        with open_file(path) as file:
            value = json.loads(file.read(MANIFEST_LIMIT_BYTES + 1))
        return value, isinstance(value, dict) and value.get("sha256") == sealed(value)["sha256"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None


def _check_fields(path: Path, manifest: dict[str, Any]) -> None:
    """Raises: CheckpointError for the first field that is not what this version reads."""
    step, progress = manifest.get("step"), manifest.get("progress")
    for name, rule, right in (
        ("files", "sizes and SHA-256s by name", all(map(_is_entry, manifest["files"].values()))),
        ("step", "a whole number", _is_count(step)),
        ("progress", "counters, its step the manifest's", _is_progress(progress, step)),
        ("line", "a generation and a name", _is_lineage(manifest["line"])),
        ("config", "a group of values", isinstance(manifest.get("config", {}), dict)),
    ):
        if not right:
            raise CheckpointError(
                f"{path} is damaged: {name} must be {rule}; got {str(manifest.get(name))[:80]}"
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and _is_count(value.get("bytes")) and isinstance(value.get("sha256"), str)


def _is_progress(value: Any, step: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values())) and value.get("step") == step


def _is_lineage(value: Any) -> bool:
    named = isinstance(value, dict) and isinstance(value.get("line"), str)
    return named and _is_count(value.get("generation"))


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading bytes, never through a symbolic link.

    Raises: OSError if the file is a symbolic link (ELOOP), is a folder or a device (EINVAL), is absent or
    cannot be read; its `strerror` says which.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a symbolic link, which is refused", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")
