"""Runs that version 0.1.0 began are ended, verified, exported and replayed by today's code.

`written_by_0_1_0/` holds two runs of two ranks: their records, and the checkpoint of step 4 of 8. Version
0.1.0 made each without a stop: `train.py run.dir=NAME communicator=NAME` (exact, native) and OPTIONS below.
Then the checkpoint of step 8, the logs and all that names a machine were deleted.
"""

import shutil
from pathlib import Path

import pytest
from ranks import Ranks, mlx_ring, rows, start, status
from safetensors.numpy import load_file

pytestmark = pytest.mark.ranks
WRITTEN = Path(__file__).parent / "written_by_0_1_0"
OPTIONS = (
    "trainer.steps=8", "trainer.global_batch_size=16", "trainer.micro_batch_size=4", "trainer.compile=false",
    "model.hidden_sizes=[8]", "model.dropout=0.3", "checkpoint.every_steps=4", "checkpoint.keep_last=9",
    "communicator.verify_every_steps=2", "metrics.log_every_steps=1", "metrics.tensorboard=false",
    "evaluation.every_steps=4",
)  # fmt: skip
ENDS = {  # parameters_sha256 of step 8, as version 0.1.0 left it in status.json
    "exact": "5bd2e4dc4805fdbf47fdb203137f57cea6e49b9f5acdcc0851b7f0f00e908bd0",
    "native": "6a79f6c41b3362659e38ea43455de38db0109913aece24b86b51c95359ca75f5",
}
STEP_4 = "checkpoints/step_00000004"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    return tmp_path


def resume(folder: Path, name: str, *more: str) -> Ranks:
    command = [*OPTIONS, f"communicator={name}", f"run.dir={name}", *more]
    return start(command, folder, world_size=2).wait().ok()


@pytest.fixture(scope="module")
def computes_the_same(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether this machine computes the bits of the one that wrote the runs: a resume of `exact` compares."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(WRITTEN / "exact", folder / "exact")
    resume(folder, "exact")
    return "other_machine" not in [row["event"] for row in rows(folder, "event", "exact")]


@pytest.mark.parametrize("name", ENDS)
def test_it_resumes_to_the_same_end(folder: Path, name: str, computes_the_same: bool) -> None:
    before = {row["step"]: (row["loss"], row["gradient_norm"]) for row in rows(folder, "train", name)}
    resume(folder, name)
    (resumed,) = [row for row in rows(folder, "event", name) if row["event"] == "resumed"]
    assert resumed["step"] == 4 and status(folder, name)["state"] == "completed"
    after = {row["step"]: (row["loss"], row["gradient_norm"]) for row in rows(folder, "train", name)}
    assert list(after) == list(before) == list(range(1, 9))
    if not computes_the_same:
        pytest.skip("this machine computes other bits than the one that wrote the runs")
    assert after == before
    assert status(folder, name)["parameters_sha256"] == ENDS[name]


@pytest.mark.parametrize("name", ENDS)
def test_it_is_verified_and_exported(folder: Path, name: str) -> None:
    assert mlx_ring(folder, "checkpoint", "verify", name).ok().members[0].stdout.endswith("ok\n")
    mlx_ring(folder, "checkpoint", "export", name, "--output", "model.safetensors").ok()
    exported = load_file(folder / "model.safetensors")
    assert {key: array.shape for key, array in exported.items()} == {
        "layers.0.linear.weight": (8, 64),
        "layers.0.linear.bias": (8,),
        "head.weight": (10, 8),
        "head.bias": (10,),
    }
    assert (folder / "model.safetensors").read_bytes() == (
        folder / name / STEP_4 / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("step", [3, 6])
def test_its_steps_repeat(folder: Path, step: int, computes_the_same: bool) -> None:
    """Before the checkpoint and after it, from its exact record."""
    ended = mlx_ring(folder, "replay", "exact", "--step", str(step))
    assert f"to step {step}: 2 ranks then, one here" in ended.members[0].stdout, ended.report()
    if not computes_the_same:
        pytest.skip("this machine computes other bits than the one that wrote the runs")
    assert ended.ok().members[0].stdout.count(": agrees") == (2 if step == 3 else 3)
