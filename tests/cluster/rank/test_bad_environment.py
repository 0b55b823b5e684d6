"""A wrong launch, which MLX takes for rank 0, waits for or dies of, is refused before MLX sees it."""

import os
import shutil
import socket
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from ranks import ROOT, command, free_ports, start
from refusals import CLUSTER, CONFIGURATION, assert_refused

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication.communicator import Communicator
from mlx_ring.communication.machine import MINIMUM_MLX
from mlx_ring.errors import ConfigError

pytestmark = pytest.mark.ranks
GOOD = '[["127.0.0.1:5000"], ["127.0.0.1:5001"]]'
PORTS = "the port must be between 1 and 65535"
HOSTFILES = {  # what MLX_HOSTFILE names: its content, and the words of the refusal
    "empty list": ("[]", ["names no hosts"]),
    "an object": ('{"hosts": 2}', ["names no hosts"]),
    "not JSON": ('[["127.0.0.1:5000"],\n  oops]', ["not JSON", "line 2, column 3"]),
    "nested": ("[" * 100_000, ["nested too deeply"]),
    "mlx.launch's own format": (
        '[{"ssh": "a", "ips": []}, {"ssh": "b", "ips": []}]',
        ["rank 0", '"ip:port"', '"ssh"'],
    ),
    "no addresses": ('[["127.0.0.1:5000"], []]', ["rank 1", '"ip:port"', "got []"]),
    "a host name": ('[["127.0.0.1:5000"], ["localhost:5001"]]', ["rank 1", "'localhost'", "no host names"]),
    "IPv6": ('[["127.0.0.1:5000"], ["[::1]:5001"]]', ["rank 1", "[::1]", "IPv6", "IPv4"]),
    "twice": ('[["127.0.0.1:5000"], ["127.0.0.1:5000"]]', ["ranks 0 and 1", "127.0.0.1:5000"]),
    "another host's": (
        '[["10.99.99.99:5000"], ["127.0.0.1:5001"]]',
        ["rank 0 on", "10.99.99.99", "not on this host"],
    ),
    "one host": ('[["127.0.0.1:5000"]]', ["one host", "run python train.py alone"]),
    "unequal": ('[["127.0.0.1:5000", "127.0.0.1:5001"], ["127.0.0.1:5002"]]', ["rank 0: 2, rank 1: 1"]),
    "no port": ('[["127.0.0.1"], ["127.0.0.1:5001"]]', ["rank 0", "'127.0.0.1'", "ip:port"]),
    "port 0": ('[["127.0.0.1:0"], ["127.0.0.1:5001"]]', ["rank 0", PORTS, "'0'"]),
    "port -1": ('[["127.0.0.1:-1"], ["127.0.0.1:5001"]]', ["rank 0", PORTS, "'-1'"]),
    "port 99999": ('[["127.0.0.1:99999"], ["127.0.0.1:5001"]]', ["rank 0", PORTS, "'99999'"]),
    "port abc": ('[["127.0.0.1:abc"], ["127.0.0.1:5001"]]', ["rank 0", PORTS, "'abc'"]),
    "every address": ('[["0.0.0.0:5000"], ["127.0.0.1:5001"]]', ["rank 0", "0.0.0.0", "neither encrypted"]),
    "public": ('[["8.8.8.8:5000"], ["127.0.0.1:5001"]]', ["8.8.8.8", "cluster.allow_public_addresses=true"]),
}
VARIABLES = [
    ({"MLX_RANK": "0", "MLX_HOSTFILE": "absent.json"}, ["MLX_HOSTFILE", "absent.json", "No such file"]),
    ({"MLX_RANK": "abc", "MLX_HOSTFILE": "good.json"}, ["MLX_RANK", "'abc'", "from 0 to 1"]),
    ({"MLX_RANK": "-1", "MLX_HOSTFILE": "good.json"}, ["MLX_RANK", "'-1'", "from 0 to 1"]),
    ({"MLX_RANK": "2", "MLX_HOSTFILE": "good.json"}, ["MLX_RANK", "'2'", "world size is 2"]),
    ({"MLX_RANK": "1"}, ["MLX_RANK", "'1'", "world size is 1"]),
    ({"MLX_HOSTFILE": "good.json"}, ["MLX_HOSTFILE=good.json", "MLX_RANK is not", "alone"]),
    (
        {"MLX_RANK": "0", "MLX_HOSTFILE": "good.json", "MLX_WORLD_SIZE": "3"},
        ["MLX_WORLD_SIZE is 3", "has 2 ranks"],
    ),
    ({"MLX_RANK": "0", "MLX_WORLD_SIZE": "two"}, ["MLX_WORLD_SIZE", "'two'"]),
    ({"OMPI_COMM_WORLD_SIZE": "two", "OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_SIZE", "'two'"]),
    (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "2"},
        ["OMPI_COMM_WORLD_RANK", "'2'", "world size is 2"],
    ),
    (
        {"MLX_RANK": "0", "MLX_JACCL_COORDINATOR": "127.0.0.1:1", "MLX_IBV_DEVICES": "absent.json"},
        ["MLX_IBV_DEVICES", "absent.json"],
    ),
]
SMALLEST = ["trainer.steps=1", "run.dir=run"]


@pytest.mark.parametrize("name", HOSTFILES)
def test_a_wrong_host_file_is_refused(tmp_path: Path, name: str) -> None:
    content, words = HOSTFILES[name]
    (tmp_path / "hosts.json").write_text(content)
    ranks = start(SMALLEST, tmp_path, variables=[{"MLX_RANK": "0", "MLX_HOSTFILE": "hosts.json"}]).wait()
    assert_refused(ranks, CONFIGURATION, *words)
    assert not list(tmp_path.glob("run/checkpoints"))


@pytest.mark.parametrize(("variables", "words"), VARIABLES, ids=[str(row[0]) for row in VARIABLES])
def test_wrong_variables_are_refused(tmp_path: Path, variables: dict[str, str], words: list[str]) -> None:
    (tmp_path / "good.json").write_text(GOOD)
    assert_refused(start(SMALLEST, tmp_path, variables=[variables]).wait(), CONFIGURATION, *words)


@pytest.mark.parametrize(("variable", "words"), [("PMI_SIZE", ["MPICH"]), ("SLURM_STEP_NUM_TASKS", ["srun"])])
def test_a_launcher_that_mlx_cannot_join_is_refused(tmp_path: Path, variable: str, words: list[str]) -> None:
    ranks = start(SMALLEST, tmp_path, variables=[{variable: "4"}]).wait()
    assert_refused(ranks, CLUSTER, *words, "4 ranks", "each would train alone", "mlx.launch")


@pytest.mark.parametrize("key", ["communicator.backend", "cluster.backend"])
def test_another_backend_than_was_launched_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "hosts.json").write_text(GOOD)
    variables = {"MLX_RANK": "0", "MLX_HOSTFILE": "hosts.json"}
    ranks = start([*SMALLEST, f"{key}=mpi"], tmp_path, variables=[variables]).wait()
    assert_refused(ranks, CONFIGURATION, f"{key}=mpi", "2 ranks for ring", "--backend mpi")


@pytest.mark.parametrize(
    ("backend", "variables"),
    [
        ("nccl", {"MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": "5000"}),
        ("jaccl", {"MLX_JACCL_COORDINATOR": "127.0.0.1:5000", "MLX_IBV_DEVICES": "devices.json"}),
    ],
)
def test_a_backend_that_is_not_built_in_is_refused(
    tmp_path: Path, backend: str, variables: dict[str, str]
) -> None:
    if mx.distributed.is_available(backend):
        pytest.skip(f"this MLX has {backend}")
    (tmp_path / "devices.json").write_text('[[null, "a"], ["b", null]]')
    ranks = start(SMALLEST, tmp_path, variables=[{"MLX_RANK": "0", **variables}]).wait()
    assert_refused(ranks, CLUSTER, f"no {backend} backend", mx.__version__)


def test_a_busy_port_is_refused_and_its_process_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        busy = server.getsockname()[1]
        (tmp_path / "hosts.json").write_text(f'[["127.0.0.1:{busy}"], ["127.0.0.1:{free_ports(1)[0]}"]]')
        ranks = start(SMALLEST, tmp_path, variables=[{"MLX_RANK": "0", "MLX_HOSTFILE": "hosts.json"}]).wait()
    assert_refused(ranks, CLUSTER, f"port {busy}", f"process {os.getpid()}", "--starting-port")


def test_a_port_that_needs_privileges_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    ring = [[("127.0.0.1", 81)], [("127.0.0.1", 82)]]
    with pytest.raises(ConfigError, match=r"port 81 .*Permission denied; use one above 1023"):
        Communicator.join(RankEnvironment(rank=0, world_size=2, backend="ring", ring_addresses=ring))


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("errors.py", "# a later commit", ["source is", "a checkout is stale", "same commit"]),
        ("__init__.py", '__version__ = "9.9"', ["mlx_ring is 9.9", "same version on every host"]),
    ],
)
def test_other_code_on_one_rank_is_refused(tmp_path: Path, file: str, line: str, words: list[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(ROOT / "mlx_ring", other / "mlx_ring", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", other / "conf")
    with (other / "mlx_ring" / file).open("a") as code:
        code.write(f"\n{line}\n")
    program = [sys.executable, "-c", "from mlx_ring.train import main; main()"]
    trees = [{"PYTHONPATH": str(tree)} for tree in (ROOT, other)]
    ranks = start(SMALLEST, tmp_path, world_size=2, program=program, variables=trees).wait()
    assert_refused(ranks, CLUSTER, "the ranks do not agree", "on rank 1", "on rank 0", *words, agreed=True)


def test_another_mlx_on_one_rank_is_refused(tmp_path: Path) -> None:
    other = (
        "import os, mlx.core\nif os.environ['MLX_RANK'] == '1': mlx.core.__version__ = '0.32.99'\n"
        "from mlx_ring.train import main; main()"
    )
    ranks = start(SMALLEST, tmp_path, world_size=2, program=[sys.executable, "-c", other]).wait()
    assert_refused(ranks, CLUSTER, "mlx is 0.32.99 on rank 1", mx.__version__, "same version", agreed=True)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("lab", ["cluster.hostfile=hostfiles/lab.json", "mlx.launch --hostfile hostfiles/lab.json"]),
        ("mpi", ["cluster.backend=mpi", "mpirun -n 2 python train.py"]),
        ("nccl", ["cluster.backend=nccl", "mlx.launch --backend nccl"]),
    ],
)
def test_a_cluster_that_nobody_launched_is_refused(tmp_path: Path, choice: str, words: list[str]) -> None:
    ranks = start([*SMALLEST, f"cluster={choice}"], tmp_path).wait()
    assert_refused(ranks, CONFIGURATION, *words, "one rank started by itself")


def test_an_old_mlx_is_refused(tmp_path: Path) -> None:
    old = "import mlx.core; mlx.core.__version__ = '0.31.2'; from mlx_ring.train import main; main()"
    ranks = start(SMALLEST, tmp_path, program=[sys.executable, "-c", old]).wait()
    assert_refused(ranks, CONFIGURATION, "MLX 0.31.2", MINIMUM_MLX, "pip install")


def test_the_oldest_mlx_is_the_one_that_is_declared() -> None:
    assert f'"mlx>={MINIMUM_MLX},' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    "variable", [{"TMPDIR": "a_file"}, {"TMPDIR": "absent"}, {"TMPDIR": ""}, {"TMP": "a_file"}], ids=str
)
@pytest.mark.skipif(sys.platform == "darwin", reason="MLX keeps no kernels there")
def test_a_temporary_folder_that_is_none_is_refused_at_the_start(
    tmp_path: Path, variable: dict[str, str]
) -> None:
    """MLX would end the run with an unexpected error when it compiles its first kernel."""
    (tmp_path / "a_file").touch()
    ((name, value),) = variable.items()
    words = (f"{name}={value} is not a folder that can be written", "unset it")
    assert_refused(start(SMALLEST, tmp_path, variables=[variable]).wait(), CONFIGURATION, *words)
    assert not list(tmp_path.glob("run/metrics.jsonl"))


@pytest.mark.skipif(sys.platform == "darwin", reason="MLX keeps no kernels there")
@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", "-m", *SMALLEST[:1], "hydra.sweep.dir=sweep", "seed=1,2"],
        ["mlx-ring", "run", "-n", "2", "--", *SMALLEST],
        ["mlx-ring", "replay", "run", "--step", "1"],
        ["mlx-ring", "doctor", "--exact"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_every_command_that_computes_refuses_it(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "a_file").touch()
    done = command(arguments, tmp_path, TMPDIR=str(tmp_path / "a_file"))
    assert done.statuses == [CONFIGURATION], done.report()
    told = done.members[0].stderr.splitlines()[-1]
    assert "a_file is not a folder that can be written" in told and "unset it" in told, done.report()
