"""mlx-ring replay: one step of a cluster's run, repeated alone, and whether it comes to the same bits."""

import json
import shutil
from pathlib import Path

import pytest
from ranks import SMALL, Ranks, mlx_ring, rows, start
from refusals import CHECKPOINT, CONFIGURATION, TRAINING, assert_refused, contents

from mlx_ring.run_directory.manifest import sealed

pytestmark = pytest.mark.ranks
EXACT = [*SMALL, "communicator=exact", "model.dropout=0.2", "trainer.steps=9", "checkpoint.every_steps=4",
         "communicator.verify_every_steps=3", "run.dir=run"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps on three ranks, with checkpoints of steps 4, 8 and 9."""
    folder = tmp_path_factory.mktemp("finished")
    start(EXACT, folder, world_size=3).wait().ok()
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def replay(folder: Path, step: int, *overrides: str) -> Ranks:
    return mlx_ring(folder, "replay", "run", "--step", str(step), *overrides)


@pytest.mark.parametrize(
    ("step", "origin", "compared"),
    [
        (2, "the first weights", ["loss", "gradient_norm"]),
        (3, "the first weights", ["loss", "gradient_norm", "weights_digest"]),
        (4, "the first weights", ["loss", "gradient_norm", "weights_digest", "parameters_sha256"]),
        (6, "step_00000004", ["loss", "gradient_norm", "weights_digest"]),
        (9, "step_00000008", ["loss", "gradient_norm", "weights_digest", "parameters_sha256"]),
    ],
)
def test_a_step_repeats(folder: Path, step: int, origin: str, compared: list[str]) -> None:
    before = contents(folder / "run")
    said = replay(folder, step).ok().members[0].stdout
    assert f"from {origin} to step {step}: 3 ranks then, one here" in said
    shown = [line.split()[2] for line in said.splitlines() if line.startswith(f"step {step}  ")]
    assert shown == compared and said.count(": agrees") == len(compared)
    assert f"step {step} agrees" in said
    assert contents(folder / "run") == before


@pytest.mark.parametrize(
    ("file", "key", "name"),
    [
        ("metrics", "loss", "loss"),
        ("metrics", "gradient_norm", "gradient_norm"),
        ("digests", "weights", "weights_digest"),
    ],
)
def test_a_record_that_differs_is_told(folder: Path, file: str, key: str, name: str) -> None:
    """As if the cluster had computed step 6 otherwise."""
    path = folder / f"run/{file}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    changed = [row for row in lines if row["kind"] in ("train", "digest") and row["step"] == 6]
    assert len(changed) == 1
    changed[0][key] = "0" * 64 if file == "digests" else changed[0][key] * (1 + 2**-22)
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    refused = replay(folder, 7)
    assert_refused(refused, TRAINING, "step 6 of run is another one here", "machine")
    said = refused.members[0].stdout
    assert f"step 6  {name}" in said and said.count(": differs") == 1
    replay(folder, 5).ok()


def test_a_checkpoint_of_other_weights_is_told(folder: Path) -> None:
    manifest = folder / "run/checkpoints/step_00000008/manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(sealed(content | {"parameters_sha256": "0" * 64})))
    assert_refused(replay(folder, 8), TRAINING, "step 8 of run is another one here")


def test_a_damaged_checkpoint_is_passed_over(folder: Path) -> None:
    weights = folder / "run/checkpoints/step_00000004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "from the first weights" in replay(folder, 6).ok().members[0].stdout


def test_a_run_that_was_continued_repeats_on_both_sides(tmp_path: Path) -> None:
    """Nine steps on three ranks, then to twelve on two: every step has the schedule of its own command."""
    start(EXACT, tmp_path, world_size=3).wait().ok()
    start([*EXACT, "trainer.steps=12"], tmp_path, world_size=2).wait().ok()
    assert "3 ranks then" in replay(tmp_path, 8).ok().members[0].stdout
    assert "from step_00000009 to step 11: 2 ranks then" in replay(tmp_path, 11).ok().members[0].stdout
    lines = (tmp_path / "run/digests.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4, 6, 8, 9, 12]


def test_a_native_run_of_one_rank_repeats(tmp_path: Path) -> None:
    start([*EXACT, "communicator=native"], tmp_path).wait().ok()
    replay(tmp_path, 9).ok()


def test_what_cannot_be_replayed_is_refused(folder: Path) -> None:
    assert_refused(replay(folder, 10), CONFIGURATION, "--step 10", "steps 1 to 9", "choose 8 or 9")
    assert_refused(replay(folder, 6, "seed"), CONFIGURATION, "seed is not of the form KEY=VALUE")
    assert_refused(
        replay(folder, 6, "data.nowhere=3"), CONFIGURATION, "unknown configuration key data.nowhere"
    )
    assert_refused(replay(folder, 6, "data=synthetic"), CONFIGURATION, "data must be a group of values")
    shutil.rmtree(folder / "run/checkpoints")
    assert_refused(replay(folder, 6), CHECKPOINT, "run has no usable checkpoint")
    assert_refused(
        mlx_ring(folder, "replay", "nowhere", "--step", "1"),
        CHECKPOINT,
        "nowhere",
        "run's directory",
    )
    assert mlx_ring(folder, "replay", "run", "--step", "0").statuses == [2]


def test_replicas_are_compared_as_often_as_asked(finished: Path) -> None:
    lines = (finished / "run/digests.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4, 6, 8, 9]
    assert rows(finished, "event") == []
