"""`mlx-ring run --openblas`: another BLAS under every rank, with one number of threads."""

import json
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
from ranks import SMALL, environment

from mlx_ring.cluster.rank import openblas
from mlx_ring.errors import ConfigError

pytestmark = pytest.mark.ranks
PROGRAM = [sys.executable, str(Path(sys.executable).with_name("mlx-ring")), "run", "-n", "2"]


def run(folder: Path, threads: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, "--openblas", threads, *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(find_library("openblas") is None, reason="needs libopenblas")
def test_every_rank_computes_with_it(tmp_path: Path) -> None:
    """Exact mode, which records what computes, takes one thread."""
    done = run(tmp_path, "1", "--", *SMALL, "communicator=exact", "run.dir=one")
    assert done.returncode == 0, done
    (manifest,) = (tmp_path / "one/checkpoints").glob("*/manifest.json")
    found = json.loads(manifest.read_text())
    assert "openblas" in json.dumps(found) and ", 1 thread)" in json.dumps(found), found
    done = run(tmp_path, "2", "--launcher", "mpirun", "--", *SMALL, "communicator=native", "run.dir=two")
    assert done.returncode == 0, done


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(tmp_path, "2", "--", *SMALL, "communicator=exact")
    assert done.returncode == 2 and "give --openblas 1, or communicator=native" in done.stderr, done
    monkeypatch.setattr(openblas.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(ConfigError, match="has no libopenblas; apt-get install"):
        openblas.environment(1)
    monkeypatch.setattr(openblas.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="is for Linux CPUs"):
        openblas.environment(1)
