"""A stop is heard during an evaluation, which the next start does; what is due is saved before."""

import json
import signal
import time
from pathlib import Path

import pytest
from ranks import SMALL, SUPPORT, rows, start, status, train, wait_for

from mlx_ring.run_directory.checkpoint_files import verify

pytestmark = pytest.mark.ranks
OVERRIDES = (
    *SMALL, "run.dir=run", "communicator=exact", "data=custom",
    "data.import_path=broken_data:long_evaluation", "data.arguments=null",
    "evaluation.every_steps=3", "checkpoint.every_steps=null",
)  # fmt: skip
VARIABLES = {"PYTHONPATH": str(SUPPORT)}
EVALUATION_SECONDS = 26.0  # of one rank, while there is a file `slow`


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run, to which nothing happens."""
    folder = tmp_path_factory.mktemp("calm")
    start(OVERRIDES, folder, variables=[VARIABLES]).wait().ok()
    return folder


def evaluations(folder: Path) -> list[tuple[object, object]]:
    return [(row["step"], row["loss"]) for row in rows(folder, "evaluation")]


def is_continued_as_if_nothing_had_happened(folder: Path, command: list[str], ranks: int, calm: Path) -> None:
    (folder / "slow").unlink()
    start(command, folder, world_size=ranks, variables=[VARIABLES] * ranks).wait().ok()
    assert evaluations(folder) == evaluations(calm)
    assert [row["step"] for row in rows(folder, "train")] == list(range(1, 7))
    assert status(folder)["parameters_sha256"] == status(calm)["parameters_sha256"]
    newest = verify(folder / "run/checkpoints/step_00000006")
    assert newest["evaluation"]["loss"] == evaluations(calm)[-1][1]


@pytest.mark.parametrize(("ranks", "step"), [(1, 3), (2, 3), (2, 6)])
def test_a_stop_leaves_the_evaluation(tmp_path: Path, calm: Path, ranks: int, step: int) -> None:
    """Step 6 is the last one: the run has not completed yet."""
    command = list(OVERRIDES)
    if step == 6:
        command = [*OVERRIDES, "evaluation.every_steps=null"]
    (tmp_path / "slow").touch()
    started = start(command, tmp_path, world_size=ranks, variables=[VARIABLES] * ranks)
    wait_for(tmp_path / "evaluating", started)
    asked = time.monotonic()
    started.members[-1].process.send_signal(signal.SIGTERM)
    started.wait()
    assert time.monotonic() - asked < EVALUATION_SECONDS / ranks / 2, started.report()
    assert started.statuses == [75] * ranks, started.report()
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("stopped", step)
    assert verify(tmp_path / f"run/checkpoints/step_{step:08d}")["evaluation"] is None
    if step == 3:
        is_continued_as_if_nothing_had_happened(tmp_path, command, ranks, calm)
        return
    (tmp_path / "slow").unlink()
    start(command, tmp_path, world_size=ranks, variables=[VARIABLES] * ranks).wait().ok()
    assert evaluations(tmp_path) == evaluations(calm)[-1:] and status(tmp_path)["state"] == "completed"


def test_what_is_due_is_saved_before_a_long_evaluation(tmp_path: Path, calm: Path) -> None:
    """A kill during the evaluation loses no step, and the next start does the evaluation."""
    command = [*OVERRIDES, "checkpoint.every_steps=3", "checkpoint.copies=rank_0"]
    (tmp_path / "slow").touch()
    started = start(command, tmp_path, variables=[VARIABLES])
    wait_for(tmp_path / "run/checkpoints/step_00000003/manifest.json", started)
    wait_for(tmp_path / "evaluating", started)
    started.kill()
    is_continued_as_if_nothing_had_happened(tmp_path, command, 1, calm)
    third = verify(tmp_path / "run/checkpoints/step_00000003")
    assert third["evaluation"]["loss"] == evaluations(calm)[0][1]


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    """Its evaluation comes after it was saved. A learning rate that is too high makes later ones worse."""
    run = train(
        tmp_path, "evaluation.every_steps=1", "checkpoint.every_steps=1", "checkpoint.keep_last=1",
        "checkpoint.keep_best=1", "optimizer.learning_rate=0.5", "schedule=constant",
        "trainer.steps=4",
    )  # fmt: skip
    run.ok()
    losses = {row["step"]: row["loss"] for row in rows(tmp_path, "evaluation")}
    best = min(losses, key=lambda step: losses[step])
    kept = {int(path.name[-8:]): path for path in (tmp_path / "run/checkpoints").glob("step_*")}
    assert set(kept) == {best, 4} and best != 4, losses
    manifests = {step: json.loads((path / "manifest.json").read_text()) for step, path in kept.items()}
    assert {step: each["evaluation"]["loss"] for step, each in manifests.items()} == {
        step: losses[step] for step in kept
    }
