"""N ranks with the same global batch are one rank, and a stop with a resume is no stop."""

import os
from pathlib import Path

import numpy as np
import pytest
from ranks import ROOT, SMALL, SUPPORT, mpirun, rows, status, train
from safetensors.numpy import load_file

pytestmark = pytest.mark.ranks
WEIGHTED = ("communicator=native", "trainer.clip_gradient_norm=0.5")  # exact mode has tests of its own


def weights(folder: Path, run: str = "run", step: int = 6) -> dict[str, np.ndarray]:
    return load_file(folder / run / f"checkpoints/step_{step:08d}/model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(folder, *WEIGHTED).ok()
    return folder


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_equal_one_rank(alone: Path, tmp_path: Path, world_size: int) -> None:
    train(tmp_path, *WEIGHTED, world_size=world_size).ok()  # 8 micro-batches: 3 ranks get 3, 3 and 2
    expected, found = weights(alone), weights(tmp_path)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-6, err_msg=name)
    losses = [[row["loss"] for row in rows(folder, "train")] for folder in (alone, tmp_path)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert status(tmp_path)["world_size"] == world_size


@pytest.mark.parametrize("world_size", [2, 3])
def test_unequal_micro_batches_weigh_by_their_targets(
    tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, compiled: a mean of means, or random numbers keyed by rank, would give other weights."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{SUPPORT}")
    options = (
        "data=custom", "data.import_path=user_parts:half_labelled", "model.dropout=0.3",
        "trainer.compile=true",
        "optimizer=sgd", "optimizer.learning_rate=0.1", "trainer.global_batch_size=28", "communicator=native",
    )  # fmt: skip
    train(tmp_path, *options, run="alone").ok()
    train(tmp_path, *options, world_size=world_size, run="shared").ok()  # 7 micro-batches
    expected, found = weights(tmp_path, "alone"), weights(tmp_path, "shared")
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    losses = [[row["loss"] for row in rows(tmp_path, "train", run)] for run in ("alone", "shared")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_mpi_equals_one_rank(alone: Path, tmp_path: Path) -> None:
    mpirun(3, [*SMALL, "run.dir=run", *WEIGHTED], tmp_path).ok()
    expected, found = weights(alone), weights(tmp_path)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-6, err_msg=name)
    assert status(tmp_path)["backend"] == "mpi"


def test_accumulation_equals_one_large_batch(alone: Path, tmp_path: Path) -> None:
    train(tmp_path, *WEIGHTED, "trainer.micro_batch_size=32").ok()
    expected, found = weights(alone), weights(tmp_path)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        ("communicator=bf16",),
        ("communicator=native", "communicator.overlap=true", "communicator.bucket_bytes=4096"),
    ],
)
def test_other_wires_learn_the_same(alone: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    train(tmp_path, *WEIGHTED, *options, world_size=2).ok()
    losses = [[row["loss"] for row in rows(folder, "train")] for folder in (alone, tmp_path)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2 if "bf16" in options[0] else 1e-5)
    sent = [row["wire_bytes"] for row in rows(tmp_path, "train")]
    parameters = sum(array.size for array in weights(tmp_path).values())
    width = 2 if "bf16" in options[0] else 4
    numbers = 2 * 8 + 3 * 2  # a loss and a count of each micro-batch, three flags of each rank
    assert sent == [parameters * width + 4 * numbers] * 6  # 2 (n - 1) / n with two ranks is 1


@pytest.mark.parametrize(
    ("world_size", "optimizer", "communicator"),
    [(1, "adamw", "native"), (2, "muon", "exact")],
)
def test_stop_and_resume_is_no_stop(
    tmp_path: Path, world_size: int, optimizer: str, communicator: str
) -> None:
    options = (
        f"optimizer={optimizer}",
        f"communicator={communicator}",
        "model.dropout=0.3",
        "schedule=linear",
        "checkpoint.every_steps=2",
    )
    train(tmp_path, *options, "trainer.steps=8", world_size=world_size, run="whole").ok()
    # The same schedule needs the same trainer.steps: a run killed at step 4 left its first checkpoints
    # behind.
    train(
        tmp_path, *options, "trainer.steps=8", "checkpoint.keep_last=9", world_size=world_size, run="parts"
    ).ok()
    for step in (6, 8):
        folder = tmp_path / f"parts/checkpoints/step_{step:08d}"
        folder.rename(tmp_path / f"gone_{step}")
    resumed = train(
        tmp_path, *options, "trainer.steps=8", "checkpoint.keep_last=9", world_size=world_size, run="parts"
    ).ok()
    assert "resumed" in resumed.members[0].stdout
    first, second = (tmp_path / run / "checkpoints/step_00000008" for run in ("whole", "parts"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert status(tmp_path, "whole")["parameters_sha256"] == status(tmp_path, "parts")["parameters_sha256"]
    losses = [[row["loss"] for row in rows(tmp_path, "train", run)] for run in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_completed_run_stays_as_it_is(tmp_path: Path) -> None:
    train(tmp_path).ok()
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and path.suffix != ".log" and path.name != "run.lock" and ".hydra" not in path.parts
    }
    train(tmp_path).ok()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_more_steps_continue_a_completed_run(tmp_path: Path) -> None:
    train(tmp_path, "schedule=constant").ok()
    train(tmp_path, "schedule=constant", "trainer.steps=9", world_size=2).ok()
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 10))
    assert status(tmp_path)["step"] == 9
