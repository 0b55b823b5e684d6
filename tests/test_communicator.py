"""One shared body of checks (communicator_checks.py), run by real groups of each backend."""

import sys
from pathlib import Path

import pytest
from ranks import ROOT, mpirun, start

from mlx_ring.buckets import plan_buckets

CHECKS = [sys.executable, str(Path(__file__).parent / "communicator_checks.py")]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ring(tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ranks = start([], tmp_path, world_size=world_size, program=CHECKS).wait().ok()
    for number, rank in enumerate(ranks.members):
        assert f"rank {number} of {world_size}" in rank.stdout and "all checks passed" in rank.stdout


@pytest.mark.parametrize("world_size", [2, 3])
def test_mpi(tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ranks = mpirun(world_size, [], tmp_path, CHECKS).ok()
    assert ranks.members[0].stdout.count("over mpi: all checks passed") == world_size


@pytest.mark.parametrize(
    ("arrays", "bucket_bytes", "expected"),
    [
        ([], 100, []),
        ([("a", "f4", 10)], 100, [["a"]]),
        ([("a", "f4", 60), ("b", "f4", 60), ("c", "f4", 10)], 100, [["c", "b", "a"]]),
        ([("a", "f4", 60), ("b", "f4", 60), ("c", "f4", 60)], 100, [["c", "b"], ["a"]]),
        ([("a", "f4", 500), ("b", "f4", 1)], 100, [["a"], ["b"]]),
        ([("a", "f4", 10), ("b", "f2", 10), ("c", "f4", 10)], 100, [["b"], ["c", "a"]]),
        (
            [("a", "f4", 60), ("b", "f4", 100), ("c", "f4", 10), ("d", "f4", 60)],
            100,
            [["b"], ["d", "c", "a"]],
        ),
        # The first of all goes before as much as hides its way, and not before more.
        ([("a", "f4", 100), ("b", "f2", 100), ("c", "f4", 100)], 100, [["c"], ["a"], ["b"]]),
        (
            [("a", "f4", 1000), ("b", "f4", 120), ("c", "f4", 130), ("d", "f4", 200)],
            100,
            [["d"], ["a"], ["c"], ["b"]],
        ),
    ],
)
def test_plan_buckets(
    arrays: list[tuple[str, str, int]], bucket_bytes: int, expected: list[list[str]]
) -> None:
    assert plan_buckets(tuple(arrays), bucket_bytes) == tuple(map(tuple, expected))
