"""Programs whose standard streams are closed, full, or no longer read: a run goes on, a command says so."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import SMALL, TRAIN, Rank, Ranks, environment, rows, status, train
from refusals import CHECKPOINT, CONFIGURATION, assert_refused
from sweeps import table

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full"),
]
MLX_RING = [sys.executable, str(Path(sys.executable).with_name("mlx-ring"))]
ALL_CLOSED = ">&- 2>&- <&-"
ALL_FULL = ">/dev/full 2>/dev/full </dev/null"


def redirected(command: Sequence[str], folder: Path, redirections: str) -> Ranks:
    """Run a command to its end, with a shell's redirections."""
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *command], cwd=folder, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    return Ranks([Rank(process)]).wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(folder).ok()
    return folder


RUNS = {
    "train": [*TRAIN, *SMALL, "run.dir=run"],
    "supervised": [*MLX_RING, "run", "-n", "2", "--", *SMALL, "run.dir=run"],
}


@pytest.mark.parametrize(
    ("how", "redirections"),
    [
        ("train", ">&-"),
        ("train", "2>&-"),
        ("train", ALL_CLOSED),
        ("train", ALL_FULL),
        ("supervised", ALL_CLOSED),
        ("supervised", ALL_FULL),
    ],
)
def test_a_run_goes_on_without_a_console(tmp_path: Path, how: str, redirections: str) -> None:
    redirected(RUNS[how], tmp_path, redirections).ok()
    assert status(tmp_path)["state"] == "completed"
    assert len(rows(tmp_path, "train")) == 6  # no line that was meant for the console is among them


@pytest.mark.parametrize("redirections", [ALL_CLOSED, ALL_FULL])
def test_a_sweep_goes_on_without_a_console(tmp_path: Path, redirections: str) -> None:
    command = [*TRAIN, "-m", *SMALL, "trainer.steps=2", "seed=1,2", "hydra.sweep.dir=sweep"]
    redirected(command, tmp_path, redirections).ok()
    assert [row["state"] for row in table(tmp_path)] == ["completed"] * 2


def test_a_completed_run_stays_as_it_is_without_a_console(finished: Path) -> None:
    redirected(RUNS["train"], finished, ">/dev/full").ok()
    assert status(finished)["state"] == "completed"


EVALUATION = [*SMALL, "run.dir=run", "evaluation.only=true"]


@pytest.mark.parametrize(
    ("redirections", "command"),
    [
        (">&-", [*TRAIN, "--cfg", "job"]),
        (">/dev/full", [*TRAIN, "--cfg", "job"]),
        (">/dev/full", [*TRAIN, "--help"]),
        (">&-", [*TRAIN, *EVALUATION]),
        (">/dev/full", [*MLX_RING, "run", "-n", "1", "--", *EVALUATION]),
        (">&-", [*MLX_RING, "checkpoint", "list", "run"]),
        (">/dev/full", [*MLX_RING, "checkpoint", "list", "run"]),
        (">/dev/full", [*MLX_RING, "checkpoint", "verify", "run", "--json"]),
        (">/dev/full", [*MLX_RING, "replay", "run", "--step", "6"]),
        (">&-", [*MLX_RING, "--help"]),
    ],
    ids=lambda given: (
        " ".join(item for item in given[1:] if item not in SMALL) if isinstance(given, list) else given
    ),
)
def test_a_command_says_that_it_cannot_write_its_answer(
    finished: Path, redirections: str, command: list[str]
) -> None:
    ranks = redirected(command, finished, redirections)
    why = "it is closed" if redirections == ">&-" else "No space left on device"
    assert_refused(ranks, CONFIGURATION, "stdout cannot be written", why, "send the output elsewhere")
    assert status(finished)["state"] == "completed"


@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ([*TRAIN, *SMALL, "run.dir=other", "optimizer.learning_rate=-1"], CONFIGURATION),
        ([*MLX_RING, "checkpoint", "list", "nowhere"], CHECKPOINT),
        ([*MLX_RING, "nocommand"], CONFIGURATION),
    ],
    ids=["value", "checkpoint", "command"],
)
def test_a_refusal_keeps_its_status_without_stderr(
    finished: Path, command: list[str], expected: int, redirections: str
) -> None:
    ranks = redirected(command, finished, redirections)
    assert ranks.statuses == [expected], ranks.report()


@pytest.mark.parametrize("command", [[*TRAIN, "--cfg", "job"], [*MLX_RING, "checkpoint", "list", "run"]])
def test_a_reader_that_has_seen_enough_is_no_error(finished: Path, command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, cwd=finished, env=environment(), stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", [["hosts", "thunderbolt", "h.json", "a"], ["run", "--leash", "-n", "1"]])
def test_a_command_that_needs_stdin_says_so(tmp_path: Path, command: list[str]) -> None:
    assert_refused(redirected([*MLX_RING, *command], tmp_path, "<&-"), CONFIGURATION)
