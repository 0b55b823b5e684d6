"""A test cannot start ranks or hosts unless its markers say so: see conftest.py."""

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT, start

PYTHON = sys.executable


@pytest.mark.parametrize(
    "command",
    [
        [PYTHON, str(ROOT / "train.py"), "--help"],
        ["mpirun", "-n", "2", "true"],
        ["mlx.launch", "-n", "2", "train.py"],
        [PYTHON, "-c", "from mlx_ring.train import main; main()", "--help"],
        [PYTHON, "-m", "mlx_ring.communication.selftest"],
        [PYTHON, "-m", "mlx_ring.cluster.agent"],
        [PYTHON, str(Path(PYTHON).with_name("mlx-ring")), "run", "--help"],
        [PYTHON, "benchmarks/growth.py", "--help"],
        ["ip", "netns", "list"],
    ],
    ids=lambda command: " ".join(Path(word).name for word in command),
)
def test_an_unmarked_test_starts_none(command: list[str]) -> None:
    with pytest.raises(pytest.fail.Exception, match="is marked neither of"):
        subprocess.run(command, check=True)


def test_a_fork_is_a_start_too(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="is marked neither of"):
        start(["--help"], tmp_path)


def test_a_rank_of_a_ring_is_known_by_its_environment(tmp_path: Path) -> None:
    ring = tmp_path / "ring.json"
    ring.write_text("[]")
    with pytest.raises(pytest.fail.Exception, match="is marked neither of"):
        subprocess.run([PYTHON, "-c", ""], env={"MLX_RANK": "0", "MLX_HOSTFILE": str(ring)}, check=True)


def test_other_programs_may_be_started() -> None:
    subprocess.run([PYTHON, "-c", ""], check=True)


@pytest.mark.ranks
def test_a_marked_test_starts_ranks(tmp_path: Path) -> None:
    start(["--help"], tmp_path).wait().ok()
