"""`mlx-ring run` on one machine: whatever dies is named and restarted, and nothing is left behind."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from kernels import share_kernels
from ranks import ROOT, SMALL, SUPPORT, TRAIN, Rank, Ranks, environment, rows, start, status, wait_for

from mlx_ring.cluster.limits import SAME_SIGNAL_SECONDS

pytestmark = pytest.mark.ranks
STEPS = 60
FAULTY = (
    *SMALL, "run.dir=run", "data=custom", "data.import_path=broken_data:build", f"trainer.steps={STEPS}",
    "data.prefetch=1", "checkpoint.every_steps=10", "communicator=exact", "metrics.log_every_steps=20",
)  # fmt: skip
WHOLE = "trainer.micro_batch_size=32"
PROGRAM = [sys.executable, str(Path(sys.executable).with_name("mlx-ring")), "run"]


class Supervised:
    """A started `mlx-ring run`, its output in files."""

    def __init__(self, folder: Path, *command: str) -> None:
        self._files = [folder / "stdout", folder / "stderr"]
        with self._files[0].open("w") as stdout, self._files[1].open("w") as stderr:
            self.process = subprocess.Popen(
                [*PROGRAM, *command], cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=stdout,
                stderr=stderr,
            )  # fmt: skip

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    @property
    def stderr(self) -> str:
        return self._files[1].read_text()

    def wait(self, timeout_seconds: float = 120) -> int:
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still ran after {timeout_seconds} s\n{self.report()}") from None

    def until(self, happened: Callable[[], object], timeout_seconds: float = 60) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not happened():
            assert time.monotonic() < deadline and self.process.poll() is None, self.report()
            time.sleep(0.02)

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, by their command lines."""
        found: list[psutil.Process] = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any(part.endswith("train.py") for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: int(process.environ()["MLX_RANK"]))

    def report(self) -> str:
        return f"status {self.process.poll()}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """A folder for temporary files alone, with a name short enough for a socket in it."""
    folder = Path(tempfile.mkdtemp(prefix="mr-"))
    share_kernels(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def supervise(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Supervised]]:
    """Starts `mlx-ring run`; at the end nothing of it may be left: no process, no file outside the run."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{SUPPORT}")
    monkeypatch.setenv("TMPDIR", str(temporary))
    started: list[Supervised] = []

    def begin(*command: str) -> Supervised:
        started.append(Supervised(tmp_path, *command))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
    deadline = time.monotonic() + 20
    while left := of_folder(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert [path.name for path in temporary.iterdir() if path.name != "mlx"] == []


def of_folder(folder: Path) -> list[psutil.Process]:
    """The processes that work in a folder, other than this one."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def fault(name: str, **arguments: object) -> str:
    given = ", ".join(f"{key}: {value}" for key, value in {"fault": name, **arguments}.items())
    return f"data.arguments={{{given}}}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The weights of the same run on one rank to which nothing happens."""
    folder = tmp_path_factory.mktemp("calm")
    support = str(SUPPORT)
    start([*FAULTY, fault("none")], folder, variables=[{"PYTHONPATH": support}]).wait().ok()
    return status(folder)["parameters_sha256"]


def events(folder: Path) -> list[object]:
    return [row["event"] for row in rows(folder, "event")]


def test_it_runs_to_its_end(
    tmp_path: Path, supervise: Callable[..., Supervised], undisturbed: object
) -> None:
    run = supervise("-n", "2", "--", *FAULTY, fault("none"))
    assert run.wait() == 0, run.report()
    final = status(tmp_path)
    assert (final["state"], final["step"], final["world_size"], final["backend"]) == (
        "completed",
        STEPS,
        2,
        "ring",
    )
    assert final["parameters_sha256"] == undisturbed
    assert events(tmp_path) == []
    lines = run.stdout.splitlines()
    assert lines and all(line.startswith("[rank 0] ") for line in lines)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("kill", r"rank 1 on \S+ was ended by SIGKILL \(step \d+, phase [a-z ]+\)"),
        pytest.param("exit", r"rank 1 on \S+ left with status 0 before the run had", marks=pytest.mark.long),
    ],
)
def test_a_lost_rank_is_named_and_the_run_goes_on(
    tmp_path: Path, supervise: Callable[..., Supervised], undisturbed: object, name: str, told: str
) -> None:
    anew = "checkpoint.resume=never"  # which is done once
    run = supervise("-n", "2", "--", *FAULTY, fault(name, at_call=100, once=True), anew)
    assert run.wait() == 0, run.report()
    assert not (tmp_path / "run/previous_1").exists()
    assert re.search(f"mlx-ring: {told}", run.stderr), run.report()
    assert re.search("mlx-ring: restart 1 of at most 20, from step [12]0", run.stderr), run.report()
    assert status(tmp_path)["parameters_sha256"] == undisturbed
    assert events(tmp_path)[-3:] == ["resumed", "peer_lost", "restart"], events(tmp_path)
    steps = [row["step"] for row in rows(tmp_path, "train")]
    assert steps == [1, *range(20, STEPS + 1, 20)]
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [("stop", "process stopped"), pytest.param("wait", "it is still at computing", marks=pytest.mark.long)],
)
def test_a_hang_is_dumped_named_and_ended(
    tmp_path: Path, supervise: Callable[..., Supervised], undisturbed: object, name: str, told: str
) -> None:
    run = supervise("-n", "2", "--deadline", "4", "--", *FAULTY, fault(name, at_call=100, once=True))
    assert run.wait() == 0, run.report()
    hung = re.search(
        r"mlx-ring: no progress for (\d+) s: rank 1 on \S+ never entered collective \d+: (.*) \(", run.stderr
    )
    assert hung and hung[2] == told and 4 <= int(hung[1]) <= 6, run.report()
    assert "[rank 0] Current thread" in run.stderr or "[rank 0] Thread" in run.stderr, run.report()
    assert "in _call" in run.stderr  # where rank 0 waits
    assert status(tmp_path)["parameters_sha256"] == undisturbed
    assert "hang" in events(tmp_path)


def test_nobody_reads_what_it_prints(tmp_path: Path, supervise: Callable[..., Supervised]) -> None:
    """A held terminal, and a line that is long and no text, hold up nothing."""
    loud = ("metrics.log_every_steps=1", "trainer.steps=1200")
    command = [*PROGRAM, "-n", "2", "--", *FAULTY, fault("shout", at_call=100), *loud]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "run/status.json").exists() or status(tmp_path)["state"] != "completed":
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        assert events(tmp_path) == []
        told, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and len(told) > 300_000 and b"[rank 0] step 1/1200" in told


def test_a_crash_that_comes_again_ends_the_run(tmp_path: Path, supervise: Callable[..., Supervised]) -> None:
    run = supervise("-n", "1", "--", *FAULTY, fault("raise", rank=0, at_call=5))
    assert run.wait() == 1, run.report()
    last = run.stderr.splitlines()[-1]
    assert re.search(
        r"error: RuntimeError: the disk caught fire.*2 restarts made no progress beyond step 0", last
    ), last
    assert status(tmp_path)["state"] == "failed"


def test_no_restart_is_wanted(tmp_path: Path, supervise: Callable[..., Supervised]) -> None:
    run = supervise("-n", "1", "--max-restarts", "0", "--", *FAULTY, fault("kill", rank=0, at_call=100))
    assert run.wait() == 3, run.report()
    assert "rank 0 on" in run.stderr and "SIGKILL" in run.stderr and "--max-restarts" in run.stderr
    final = status(tmp_path)  # which no rank was left to write
    assert final["state"] == "failed" and "SIGKILL" in str(final["message"])


def test_a_signal_saves_and_the_same_command_continues(
    tmp_path: Path, supervise: Callable[..., Supervised]
) -> None:
    command = ["-n", "2", "--", *FAULTY, fault("tell", rank=0, at_call=100), "trainer.steps=1000000"]
    reached = 0
    for number in (signal.SIGINT, signal.SIGHUP):
        run = supervise(*command)
        run.until((tmp_path / "reached").exists)
        run.process.send_signal(number)
        assert run.wait() == 75, run.report()
        stopped = status(tmp_path)
        assert stopped["state"] == "stopped" and int(str(stopped["step"])) >= reached + 20, run.report()
        reached = int(str(stopped["step"]))
        (tmp_path / "reached").unlink()
    run = supervise(*command[:-1], f"trainer.steps={reached + 10}")
    assert run.wait() == 0, run.report()
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("completed", reached + 10)


def test_a_second_request_leaves_at_once(tmp_path: Path, supervise: Callable[..., Supervised]) -> None:
    """The same signal again within two seconds is none; later, or another signal, it is."""
    command = ["-n", "2", "--", *FAULTY, fault("wait", rank=1, at_call=100), "trainer.steps=4000"]
    for second in (signal.SIGTERM, signal.SIGINT):
        run = supervise(*command)
        run.until((tmp_path / "reached").exists)
        (tmp_path / "reached").unlink()
        run.process.send_signal(signal.SIGINT)
        run.until(lambda run=run: "asked to stop" in run.stderr)
        first = time.monotonic()
        if second == signal.SIGINT:
            run.process.send_signal(second)  # which is none
            run.until(lambda first=first: time.monotonic() > first + SAME_SIGNAL_SECONDS)
        run.process.send_signal(second)
        assert run.wait(20) == 130, run.report()


def test_a_group_is_signalled_through_uv(tmp_path: Path, supervise: Callable[..., Supervised]) -> None:
    """As `timeout`, systemd and schedulers do: `uv run` passes on what its child has got already."""
    if shutil.which("uv") is None:
        pytest.skip("needs uv")
    pause = fault("pause", rank=0, at_call=100)
    for program in (TRAIN, [*PROGRAM, "-n", "2", "--"]):
        command = ["uv", "run", "--no-sync", *program, *FAULTY, pause, "trainer.steps=1000000"]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(UV_PROJECT=str(ROOT), TMPDIR=tempfile.gettempdir()),
            start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            wait_for(tmp_path / "reached", Ranks([Rank(process)]))
            os.killpg(process.pid, signal.SIGTERM)
            (tmp_path / "go").touch()
            told, _ = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 75 and status(tmp_path)["state"] == "stopped", told
        for name in ("reached", "go"):
            (tmp_path / name).unlink()


@pytest.mark.parametrize("stopped", [pytest.param(False, marks=pytest.mark.long), True])
def test_nothing_outlives_a_killed_supervisor(
    tmp_path: Path, supervise: Callable[..., Supervised], stopped: bool
) -> None:
    run = supervise("-n", "2", "--", *FAULTY, fault("tell", rank=0, at_call=100), "trainer.steps=1000000")
    run.until((tmp_path / "reached").exists)
    ranks = run.ranks()
    assert len(ranks) == 2
    if stopped:
        ranks[1].send_signal(signal.SIGSTOP)
    run.process.kill()
    run.process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive, run.report()
    if not stopped:  # they finished their step and saved it
        assert status(tmp_path)["state"] == "stopped"


def test_nothing_outlives_a_killed_agent(tmp_path: Path, supervise: Callable[..., Supervised]) -> None:
    run = supervise(
        "-n",
        "2",
        "--max-restarts",
        "0",
        "--",
        *FAULTY,
        fault("tell", rank=0, at_call=100),
        "trainer.steps=1000000",
    )
    run.until((tmp_path / "reached").exists)
    ranks = run.ranks()
    (agent,) = psutil.Process(run.process.pid).children()
    agent.kill()
    assert run.wait(30) == 3, run.report()
    assert "was lost: its agent ended with status -9" in run.stderr, run.report()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive
    run = supervise("-n", "1", "--", *FAULTY, fault("none"), "checkpoint.resume=never")  # which sweeps
    assert run.wait() == 0, run.report()


def test_mistakes_are_one_line(tmp_path: Path, supervise: Callable[..., Supervised]) -> None:
    for command, words in (
        (["-n", "2", "--", "trainer.stepz=3"], ["trainer.stepz", "steps"]),
        (["-n", "2", "--hostfile", "hosts.json"], ["-n 2", "hosts.json"]),
        (["--hostfile", "absent.json"], ["absent.json"]),
        (["-n", "0"], ["-n"]),
        (["-n", "2", "--", *FAULTY, fault("none"), WHOLE], ["2 ranks cannot share 1 micro-batches"]),
    ):
        run = supervise(*command)
        assert run.wait() == 2, run.report()
        told = [line for line in run.stderr.splitlines() if "error:" in line]
        assert len(told) == 1 and all(word in told[0] for word in words), run.report()
        assert "Traceback" not in run.stderr


def test_mpirun(tmp_path: Path, supervise: Callable[..., Supervised], undisturbed: object) -> None:
    run = supervise("-n", "2", "--launcher", "mpirun", "--", *FAULTY, fault("kill", at_call=100, once=True))
    assert run.wait() == 0, run.report()
    assert "mpirun ended with status" in run.stderr and "restart 1" in run.stderr
    final = status(tmp_path)
    assert final["backend"] == "mpi" and final["parameters_sha256"] == undisturbed
    again = ("run.dir=again", "trainer.steps=1000000")
    run = supervise("-n", "2", "--launcher", "mpirun", "--", *FAULTY, fault("tell", at_call=100), *again)
    run.until((tmp_path / "reached").exists)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, run.report()
    assert status(tmp_path, "again")["state"] == "stopped"


def test_every_process_is_signalled(tmp_path: Path, supervise: Callable[..., Supervised]) -> None:
    """As systemd does: the supervisor, its agent and its ranks, twice."""
    run = supervise("-n", "2", "--", *FAULTY, fault("pause", rank=0, at_call=100), "trainer.steps=1000000")
    run.until((tmp_path / "reached").exists)
    everyone = [run.process.pid, *(each.pid for each in psutil.Process(run.process.pid).children(True))]
    for _ in range(2):
        for pid in everyone:
            os.kill(pid, signal.SIGTERM)
        run.until(lambda: "asked to stop" in run.stderr)
    (tmp_path / "go").touch()
    assert run.wait() == 75, run.report()
    assert status(tmp_path)["state"] == "stopped"
