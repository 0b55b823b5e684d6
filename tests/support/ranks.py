"""Starts real ranks: processes on free ports of this machine, every rank's output shown on failure."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from fork_server import ForkedProcess, can_fork

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent  # where the parts of a user's own are that tests name as import paths
TRAIN = [sys.executable, str(ROOT / "train.py")]
# The smallest run that still learns: a step takes a few milliseconds.
SMALL = (
    "trainer.steps=6", "trainer.global_batch_size=32", "trainer.micro_batch_size=4", "trainer.compile=false",
    "model.hidden_sizes=[16]", "model.dropout=0", "metrics.log_every_steps=1", "metrics.tensorboard=false",
    "evaluation.every_steps=null",
)  # fmt: skip
TIMEOUT_SECONDS = 120
Process = subprocess.Popen[str] | ForkedProcess


@dataclass
class Rank:
    """One started rank."""

    process: Process
    stdout: str = ""
    stderr: str = ""

    @property
    def status(self) -> int:
        return self.process.returncode


@dataclass
class Ranks:
    """A started group of ranks. Use `wait`, or `kill` in a `finally`."""

    members: list[Rank] = field(default_factory=list)

    def wait(self, timeout_seconds: float = TIMEOUT_SECONDS) -> "Ranks":
        """Wait for all of them; a rank that hangs fails the test with everybody's output."""
        deadline = time.monotonic() + timeout_seconds
        try:
            for rank in self.members:
                rank.stdout, rank.stderr = rank.process.communicate(
                    timeout=max(0.1, deadline - time.monotonic())
                )
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"ranks still ran after {timeout_seconds} s\n{self.report()}") from None
        return self

    def kill(self) -> None:
        for rank in self.members:
            if rank.process.poll() is None:
                rank.process.kill()
            if rank.process.stdout and not rank.process.stdout.closed:
                rank.stdout, rank.stderr = rank.process.communicate()

    def ok(self) -> "Ranks":
        """All ended with status 0."""
        assert self.statuses == [0] * len(self.members), self.report()
        return self

    @property
    def statuses(self) -> list[int]:
        return [rank.status for rank in self.members]

    @property
    def errors(self) -> list[str]:
        """Every line that a rank printed as an error."""
        lines = "\n".join(rank.stderr for rank in self.members).splitlines()
        return [line for line in lines if line.startswith("error:")]

    def report(self) -> str:
        parts = [
            f"--- rank {number}: status {rank.process.returncode}\n{rank.stdout}\n{rank.stderr}"
            for number, rank in enumerate(self.members)
        ]
        return "\n".join(parts)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def environment(**more: str) -> dict[str, str]:
    """The test's environment without any launcher's traces."""
    prefixes = ("MLX_", "OMPI_COMM", "PMIX_", "PMI_", "NCCL_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
    return clean | {"PATH": path, "NO_COLOR": "1"} | more


def wait_for(path: Path, ranks: Ranks, timeout_seconds: float = 60) -> None:
    """Until a rank has made this file, while rank 0 runs."""
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        assert time.monotonic() < deadline and ranks.members[0].process.poll() is None, ranks.report()
        time.sleep(0.01)


def start(
    command: Sequence[str], folder: Path, *, world_size: int = 1, program: Sequence[str] = TRAIN,
    hostfile: Path | None = None, variables: Sequence[dict[str, str]] | None = None,
    folders: Sequence[Path] | None = None, programs: Sequence[Sequence[str]] | None = None,
) -> Ranks:  # fmt: skip
    """Start ranks of one ring (or one lone rank) in `folder`; `variables` go to each rank's environment.

    `folders` are each rank's own, as on hosts that share no disk, and `programs` each rank's own command.
    """
    if world_size > 1 and hostfile is None:
        hostfile = folder / f"ring-{time.monotonic_ns()}.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(world_size)]))
    ranks = Ranks()
    for number in range(world_size):
        launched = {"MLX_RANK": str(number), "MLX_HOSTFILE": str(hostfile)} if world_size > 1 else {}
        own = variables[number] if variables else {}
        where, what = folders[number] if folders else folder, programs[number] if programs else program
        ranks.members.append(Rank(process([*what, *command], where, environment(**launched, **own))))
    return ranks


def process(command: Sequence[str], folder: Path, variables: dict[str, str]) -> Process:
    """Start a program in `folder`, its standard input empty."""
    if can_fork(command, variables):
        return ForkedProcess(command, folder, variables)
    return subprocess.Popen(
        command, cwd=folder, env=variables, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def mlx_ring(folder: Path, *arguments: str) -> Ranks:
    """Run the command `mlx-ring` in `folder` to its end."""
    program = [sys.executable, str(Path(sys.executable).with_name("mlx-ring"))]
    return Ranks([Rank(process([*program, *arguments], folder, environment()))]).wait()


def train(folder: Path, *overrides: str, world_size: int = 1, run: str = "run") -> Ranks:
    """Run the small experiment to its end in `folder`/`run`."""
    return start([*SMALL, f"run.dir={run}", *overrides], folder, world_size=world_size).wait()


def command(arguments: Sequence[str], folder: Path, **variables: str) -> Ranks:
    """Run any command of the environment to its end, its standard input an open pipe."""
    executable = shutil.which(arguments[0], path=environment()["PATH"])
    assert executable, f"{arguments[0]} is not installed"
    process = subprocess.Popen(
        [executable, *arguments[1:]], cwd=folder, env=environment(**variables), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    return Ranks([Rank(process)]).wait()


def mpirun(world_size: int, overrides: Sequence[str], folder: Path, program: Sequence[str] = TRAIN) -> Ranks:
    """`mpirun -n N python train.py …`; root and too few cores are Open MPI's own rules."""
    return command(
        ["mpirun", "-n", str(world_size), *program, *overrides], folder,
        OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe",
    )  # fmt: skip


def launch(arguments: Sequence[str], printed: Path, cwd: Path, **variables: str) -> Ranks:
    """Run `mlx.launch …` in `cwd` to its end; what it prints goes through files in `printed`.

    Its standard input stays open: at an end of it, it would spin. Its status is 0 whatever happens.
    """
    files = [printed / "launch.stdout", printed / "launch.stderr"]
    with files[0].open("w") as stdout, files[1].open("w") as stderr:
        settings = environment(**variables)
        executable = shutil.which("mlx.launch", path=settings["PATH"])
        assert executable, "mlx.launch is not installed"
        with subprocess.Popen(
            [executable, *arguments],
            cwd=cwd,
            env=settings,
            text=True,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
        ) as process:
            try:
                process.wait(TIMEOUT_SECONDS)
            finally:
                process.kill()
    return Ranks([Rank(process, *(path.read_text() for path in files))])


def ring_ports(world_size: int) -> str:
    """mlx.launch's option for a block of free ports."""
    for first in free_ports(20):
        with ExitStack() as block:
            try:
                for port in range(first, first + world_size):
                    block.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return f"--starting-port={first}"
    raise AssertionError(f"no {world_size} free ports in a row")


def rows(folder: Path, kind: str, run: str = "run") -> list[dict[str, object]]:
    """The rows of one kind in a run's metrics.jsonl."""
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


def status(folder: Path, run: str = "run") -> dict[str, object]:
    """A run's status.json."""
    return json.loads((folder / run / "status.json").read_text())
