"""A process's place among the ranks, from the variables that launchers set."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from mlx_ring.cluster.rank.environment import RankEnvironment, use_bundled_open_mpi
from mlx_ring.errors import ClusterError, ConfigError

TWO = [["127.0.0.1:5000"], ["127.0.0.1:5001"]]


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(TWO))
    return path


def read(hosts: Path, **variables: str) -> RankEnvironment:
    """The environment read from `variables`, HOSTS in them standing for the host file."""
    return RankEnvironment.read(
        {name: value.replace("HOSTS", str(hosts)) for name, value in variables.items()}
    )


@pytest.mark.parametrize(
    ("variables", "rank", "world_size", "backend"),
    [
        ({}, 0, 1, "single"),
        ({"MLX_RANK": "0"}, 0, 1, "single"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": ""}, 0, 1, "single"),
        ({"MLX_HOSTFILE": ""}, 0, 1, "single"),
        ({"MLX_RANK": "1", "MLX_HOSTFILE": "HOSTS"}, 1, 2, "ring"),
        ({"MLX_RANK": "1", "MLX_HOSTFILE": "HOSTS", "MLX_WORLD_SIZE": "2"}, 1, 2, "ring"),
        ({"MLX_RANK": "3", "MLX_WORLD_SIZE": "4"}, 3, 4, "nccl"),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "1"}, 0, 1, "single"),
        (
            {"MLX_RANK": "1", "MLX_JACCL_COORDINATOR": "127.0.0.1:1", "MLX_IBV_DEVICES": "HOSTS"},
            1,
            2,
            "jaccl",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, 2, 4, "mpi"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, 0, 1, "single"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMI_SIZE": "2"}, 1, 2, "mpi"),
        ({"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}, 0, 1, "single"),
        ({"SLURM_STEP_NUM_TASKS": "1(x2)"}, 0, 1, "single"),
    ],
)
def test_what_launchers_set_is_understood(
    hosts: Path, variables: dict[str, str], rank: int, world_size: int, backend: str
) -> None:
    found = read(hosts, **variables)
    assert (found.rank, found.world_size, found.backend) == (rank, world_size, backend)
    assert found.ring_addresses == (
        [[("127.0.0.1", 5000)], [("127.0.0.1", 5001)]] if backend == "ring" else []
    )


def test_an_empty_host_file_is_one_rank(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    found = read(tmp_path / "empty", MLX_RANK="0", MLX_HOSTFILE="HOSTS")
    assert (found.rank, found.world_size, found.backend) == (0, 1, "single")


@pytest.mark.parametrize(
    ("variables", "job"),
    [({"MLX_RING_JOB_ID": "a", "PMIX_NAMESPACE": "b"}, "a"), ({"PMIX_NAMESPACE": "b"}, "b"), ({}, "")],
)
def test_the_job_is_what_the_launcher_shows(hosts: Path, variables: dict[str, str], job: str) -> None:
    assert read(hosts, **variables).job == job


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MLX_RANK": "one", "MLX_HOSTFILE": "HOSTS"}, r"MLX_RANK must be .* from 0 to 1.* got 'one'"),
        ({"MLX_RANK": "", "MLX_HOSTFILE": "HOSTS"}, r"MLX_RANK must be .* got ''"),
        ({"MLX_RANK": "1.0", "MLX_HOSTFILE": "HOSTS"}, r"MLX_RANK must be .* got '1\.0'"),
        ({"MLX_RANK": "²", "MLX_HOSTFILE": "HOSTS"}, r"MLX_RANK must be .* got '²'"),
        ({"MLX_RANK": "-1", "MLX_HOSTFILE": "HOSTS"}, r"MLX_RANK must be .* got '-1'"),
        ({"MLX_RANK": "2", "MLX_HOSTFILE": "HOSTS"}, r"MLX_RANK must be .* the world size is 2; got '2'"),
        ({"MLX_RANK": "1"}, r"MLX_RANK must be .* the world size is 1; got '1'"),
        ({"MLX_HOSTFILE": "HOSTS"}, r"MLX_HOSTFILE=.*hosts\.json is set, but MLX_RANK is not"),
        ({"MLX_WORLD_SIZE": "2"}, r"MLX_WORLD_SIZE=2 is set, but MLX_RANK is not"),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "0"}, r"MLX_WORLD_SIZE must be .* above 0; got '0'"),
        ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "²"}, r"MLX_WORLD_SIZE must be .* above 0; got '²'"),
        ({"MLX_RANK": "2", "MLX_WORLD_SIZE": "2"}, r"MLX_RANK must be .* got '2'"),
        (
            {"MLX_RANK": "0", "MLX_HOSTFILE": "HOSTS", "MLX_WORLD_SIZE": "3"},
            r"MLX_WORLD_SIZE is 3, .* has 2 ranks",
        ),
        ({"MLX_RANK": "0", "MLX_JACCL_COORDINATOR": "127.0.0.1:1"}, r"MLX_IBV_DEVICES must list"),
        (
            {"MLX_RANK": "0", "MLX_IBV_DEVICES": "HOSTS.absent"},
            r"MLX_IBV_DEVICES names .*absent, .*No such file",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "x", "OMPI_COMM_WORLD_RANK": "0"},
            r"OMPI_COMM_WORLD_SIZE must be .* got 'x'",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "0", "OMPI_COMM_WORLD_RANK": "0"},
            r"OMPI_COMM_WORLD_SIZE must be .* got '0'",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"OMPI_COMM_WORLD_RANK must be .* got ''"),
    ],
)
def test_what_no_rank_can_have_is_refused(hosts: Path, variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(hosts, **variables)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "names no hosts"),
        (b"{}", "names no hosts"),
        (b"3", "names no hosts"),
        (b'["127.0.0.1:1"]', "names one host"),
        (b"[[1], [2]]", "1 is not of the form ip:port"),
        (b"[null, null]", 'rank 0: needs a list of "ip:port" addresses; got null'),
        (b'["127.0.0.1:1", "127.0.0.1:2"]', "rank 0: needs a list"),
        (b'[["127.0.0.1:1"], [":2"]]', "rank 1: ':2' is not of the form ip:port"),
        (b'[["127.0.0.1:1"], ["127.0.0.1:65536"]]', "rank 1: the port must be .* got '65536'"),
        ('[["127.0.0.1:1"], ["127.0.0.1:٣"]]'.encode(), "rank 1: the port must be .* got '٣'"),
        (b'[["127.0.0.1:1"], ["127.0.0.256:2"]]', "rank 1: '127.0.0.256' is not an IP address"),
        (b'[["127.0.0.1:1"], ["::1:2"]]', "rank 1: ::1 is IPv6"),
        (b'[["127.0.0.1:1", "127.0.0.1:1"], ["127.0.0.1:2", "127.0.0.1:3"]]', "ranks 0 and 0 both"),
        (b'[["127.0.0.1:1"],\n ["127.0.0.1:2"]', "not JSON at line 2, column"),
        (b"\xff", "cannot be read: .*utf-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_wrong_host_file_is_refused_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "hosts.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"MLX_HOSTFILE .*{re.escape(str(path))}.*{message}"):
        read(path, MLX_RANK="0", MLX_HOSTFILE="HOSTS")


@pytest.mark.parametrize("variable", ["PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_other_launchers_are_refused(hosts: Path, variable: str) -> None:
    with pytest.raises(ClusterError, match=r"started 3 ranks, .* each would train alone"):
        read(hosts, **{variable: "3"})


@pytest.mark.parametrize("backend", ["auto", "ring"])
def test_the_launched_backend_may_be_asked_for(hosts: Path, backend: str) -> None:
    read(hosts, MLX_RANK="0", MLX_HOSTFILE="HOSTS").check_backend("communicator.backend", backend)


def test_another_backend_may_not(hosts: Path) -> None:
    ring = read(hosts, MLX_RANK="0", MLX_HOSTFILE="HOSTS")
    with pytest.raises(
        ConfigError, match=r"cluster\.backend=mpi, .* 2 ranks for ring; launch with --backend mpi"
    ):
        ring.check_backend("cluster.backend", "mpi")
    with pytest.raises(ConfigError, match=r"one rank started by itself; start it with mpirun"):
        read(hosts).check_backend("communicator.backend", "mpi")


@pytest.mark.parametrize(("present", "chosen", "expected"), [
    (False, None, None), (True, None, "bundled"), (True, "own.so", "own.so"),
])  # fmt: skip
def test_the_bundled_open_mpi_is_used_unless_another_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: bool, chosen: str | None, expected: str | None
) -> None:
    library = tmp_path / "lib/libmpi.so.40"
    library.parent.mkdir()
    if present:
        library.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(os, "environ", {} if chosen is None else {"MLX_MPI_LIBNAME": chosen})
    use_bundled_open_mpi()
    assert os.environ.get("MLX_MPI_LIBNAME") == (str(library) if expected == "bundled" else expected)
