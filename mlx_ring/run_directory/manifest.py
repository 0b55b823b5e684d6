"""A checkpoint's manifest: what lies in it, sealed with a SHA-256 of its own. No mlx here."""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from mlx_ring.errors import CheckpointError, NewerCheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_LIMIT_BYTES = 64 * 2**20


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With `sha256`: over all its other fields, as JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return {**rest, "sha256": digest}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's directory. Raises: CheckpointError naming the file and its mistake;
    NewerCheckpointError."""
    path = directory / MANIFEST
    try:
        with open_file(path) as file:
            text = file.read(MANIFEST_LIMIT_BYTES + 1)
        manifest = json.loads(text)
        whole = isinstance(manifest, dict) and manifest.get("sha256") == sealed(manifest)["sha256"]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path} is no manifest: it lists no files")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise (NewerCheckpointError if newer else CheckpointError)(
            f"{path} has format version {version}; this version reads {FORMAT_VERSION}: update mlx_ring"
        )
    if not whole:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one that it was written with")
    manifest.setdefault("line", {"generation": 0, "line": ""})
    manifest.setdefault("line", {"generation": 0, "line": ""})
    for name, rule, right in (
        ("files", "sizes and SHA-256s by name", all(map(_is_entry, manifest["files"].values()))),
        ("step", "a whole number", _is_count(manifest.get("step"))),
        (
            "progress",
            "counters, its step the manifest's",
            _is_progress(manifest.get("progress"), manifest.get("step")),
        ),
        ("line", "a generation and a name", _is_line(manifest.get("line"))),
        ("config", "a group of values", isinstance(manifest.get("config", {}), dict)),
    ):
        if not right:
            raise CheckpointError(
                f"{path} is damaged: {name} must be {rule}; got {str(manifest.get(name))[:80]}"
            )
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and _is_count(value.get("bytes")) and isinstance(value.get("sha256"), str)


def _is_progress(value: Any, step: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values())) and value.get("step") == step


def _is_line(value: Any) -> bool:
    named = isinstance(value, dict) and isinstance(value.get("line"), str)
    return named and _is_count(value.get("generation"))


def open_file(path: Path) -> Any:
    """Open a regular file for reading, never through a symbolic link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a symbolic link, which is refused", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")
