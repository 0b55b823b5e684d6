"""Writes a file whole: a reader meets the old content or the new, never a part of either. No mlx here."""

import contextlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path

SUFFIX_BYTES = 4


def whole_file_pattern(name: str) -> str:
    """Returns the glob pattern of what killed processes leave if they were writing a file of this name."""
    return f".{name}." + "[0-9a-f]" * 2 * SUFFIX_BYTES


@contextlib.contextmanager
def whole_file(path: Path, *, mode: int | None = None, sync: bool = False) -> Generator[Path]:
    """Give an empty file beside `path` to fill; after the block, rename it to `path`.

    If the block raises, the file is deleted and `path` stays as it was. A process that is killed in the block
    leaves the file behind: its name is `.NAME.` and eight hexadecimal digits.

    Args:
        path: the file to replace or to make; its folder must exist.
        mode: the new file's permissions; those of any new file if None.
        sync: whether the content must be on the disk before the rename, so that also after a power cut the
            old content or the new is there.

    Raises: OSError if the folder or the disk refuses.
    """
    filled = path.with_name(f".{path.name}.{secrets.token_hex(SUFFIX_BYTES)}")
    filled.touch(mode=0o666 if mode is None else 0o600, exist_ok=False)
    try:
        if mode is not None:
            filled.chmod(mode)
        yield filled
        if sync:
            _sync(filled)
        filled.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            filled.unlink()
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
