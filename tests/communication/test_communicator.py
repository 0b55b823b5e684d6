"""One shared body of checks (communicator_checks.py), run by real groups of each backend."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import ROOT, SUPPORT, mpirun, start

from mlx_ring.communication.buckets import plan_buckets

CHECKS = [sys.executable, str(SUPPORT / "communicator_checks.py")]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ring(tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ranks = start([], tmp_path, world_size=world_size, program=CHECKS).wait().ok()
    for number, rank in enumerate(ranks.members):
        assert f"rank {number} of {world_size}" in rank.stdout and "all checks passed" in rank.stdout


@pytest.mark.ranks
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
        ([("a", "f4", 500)], 100, [["a"]]),
        ([("a", "f2", 60), ("b", "f2", 60), ("n", "f4", 4)], 100, [["b", "a"], ["n"]]),
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


@given(
    st.lists(st.tuples(st.sampled_from(["f4", "f2"]), st.integers(0, 300)), max_size=20),
    st.integers(1, 200),
)
def test_every_array_travels_once_and_full_buckets_alone(
    drawn: list[tuple[str, int]], bucket_bytes: int
) -> None:
    arrays = tuple((str(place), dtype, size) for place, (dtype, size) in enumerate(drawn))
    dtypes, sizes = ({name: each[kind] for name, *each in arrays} for kind in (0, 1))
    buckets = plan_buckets(arrays, bucket_bytes)
    assert sorted(name for names in buckets for name in names) == sorted(dtypes)
    assert all(len({dtypes[name] for name in names}) == 1 for names in buckets)
    unfilled = [names for names in buckets if sum(map(sizes.__getitem__, names)) < bucket_bytes]
    assert len(unfilled) <= len(set(dtypes.values()))
    assert all(sum(map(sizes.__getitem__, names[:-1])) < bucket_bytes for names in buckets)
    assert all(len(names) == 1 for names in buckets if any(sizes[name] >= bucket_bytes for name in names))
