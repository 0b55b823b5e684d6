"""Makes the CPU kernels cheap that MLX compiles with g++ when a program first needs them, and shares them."""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# The options that MLX gives g++: a header that was compiled with others would not be used.
OPTIONS = ["-std=c++17", "-O3", "-Wall", "-fPIC"]


def _header() -> Path:
    """The header that every kernel includes, in MLX's folder."""
    spec = find_spec("mlx")
    assert spec is not None and spec.submodule_search_locations is not None
    (folder,) = spec.submodule_search_locations
    return Path(folder) / "include/mlx/backend/cpu/compiled_preamble.h"


def precompile_header() -> Path | None:
    """Compiles that header, beside it, where g++ looks for it.

    A kernel then takes a quarter of the time, and is the same to the last bit.

    Returns: the file to delete when the tests end, for g++ would use it with another version of MLX as well.
        None if it was there before, and without g++, which macOS never asks.
    """
    header = _header()
    compiled = header.with_name(f"{header.name}.gch")
    if sys.platform != "linux" or not shutil.which("g++") or not header.exists():
        return None
    if compiled.exists() and compiled.stat().st_mtime > header.stat().st_ctime:
        return None
    new = compiled.with_name(f"{compiled.name}.{os.getpid()}")
    command = ["g++", *OPTIONS, "-x", "c++-header", f"-I{header.parents[3]}", str(header), "-o", str(new)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0:
        return None
    return new.replace(compiled)


def share_kernels(temporary: Path) -> None:
    """Gives programs that keep temporary files in this folder the kernels that MLX has compiled already."""
    usual = Path(tempfile.gettempdir()) / "mlx"
    usual.mkdir(exist_ok=True)
    (temporary / usual.name).symlink_to(usual)


if __name__ == "__main__":
    precompile_header()
