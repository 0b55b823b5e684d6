"""Checkpoints of real runs: kept, damaged, rewound, evaluated, taken as a start."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ranks import SMALL, mlx_ring, rows, start, status, train
from safetensors.numpy import load_file

from mlx_ring.run_directory.manifest import sealed

pytestmark = pytest.mark.ranks
EVERY = ("checkpoint.every_steps=1", "schedule=constant")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of six steps, saved after each; the newest are kept."""
    folder = tmp_path_factory.mktemp("saved")
    train(folder, *EVERY).ok()
    return folder / "run"


def steps(folder: Path, run: str = "run") -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / run / "checkpoints").glob("step_*"))


def newest(folder: Path, run: str = "run") -> Path:
    return folder / run / f"checkpoints/step_{steps(folder, run)[-1]:08d}"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    train(tmp_path, *EVERY, "checkpoint.keep_last=2", "checkpoint.keep_best=0").ok()
    assert steps(tmp_path) == [5, 6]
    assert [row["step"] for row in rows(tmp_path, "checkpoint")] == list(range(1, 7))
    assert not list((tmp_path / "run/checkpoints").glob(".*")), "nothing half written stays"


def test_the_best_is_kept_besides(tmp_path: Path) -> None:
    """The rate grows far beyond what is good, so an early evaluation is the best."""
    rising = ("optimizer=sgd", "optimizer.learning_rate=30", "schedule.warmup_steps=7", "trainer.steps=8")
    options = (*EVERY, *rising, "evaluation.every_steps=1")
    train(tmp_path, *options, "checkpoint.keep_last=1", "checkpoint.keep_best=1").ok()
    losses = {row["step"]: row["loss"] for row in rows(tmp_path, "evaluation")}
    best = min(losses, key=lambda step: losses[step])
    assert best != 8 and steps(tmp_path) == [best, 8]


@pytest.mark.parametrize(
    ("file", "world_size"), [("model.safetensors", 1), ("optimizer.safetensors", 2), ("manifest.json", 1)]
)
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, file: str, world_size: int) -> None:
    train(tmp_path, *EVERY, world_size=world_size).ok()
    whole = status(tmp_path)["parameters_sha256"]
    if file == "manifest.json":
        (newest(tmp_path) / file).write_text("{")
    else:
        flip_a_bit(newest(tmp_path) / file)
    resumed = train(tmp_path, *EVERY, world_size=world_size).ok()
    events = {row["event"]: str(row["message"]) for row in rows(tmp_path, "event")}
    assert file in events["checkpoint_damaged"] and "step_00000005" in events["resumed"]
    assert "fell back to step_00000005" in resumed.members[0].stdout
    assert status(tmp_path)["parameters_sha256"] == whole, "the repeated step gives the same bits"
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 7))


def test_a_rewind_leaves_the_later_steps(tmp_path: Path) -> None:
    train(tmp_path, *EVERY, "checkpoint.keep_last=9").ok()
    back = "checkpoint.resume=run/checkpoints/step_00000002"
    train(tmp_path, *EVERY, back, "trainer.steps=4", "checkpoint.keep_last=9").ok()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2, 3, 4]


def test_another_runs_checkpoint_can_be_continued_elsewhere(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    train(tmp_path, *EVERY, "checkpoint.resume=run", "trainer.steps=8", run="more").ok()
    assert status(tmp_path, "more")["step"] == 8
    assert [row["step"] for row in rows(tmp_path, "train", "more")] == [7, 8]


def test_never_starts_anew_and_loses_nothing(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    before, verdict = (tmp_path / "run/metrics.jsonl").read_text(), status(tmp_path)
    train(tmp_path, *EVERY, "checkpoint.resume=never", "trainer.steps=2").ok()
    assert steps(tmp_path) == [1, 2] and status(tmp_path)["step"] == 2
    assert (tmp_path / "run/previous_1/metrics.jsonl").read_text() == before
    assert status(tmp_path, "run/previous_1") == verdict
    assert (tmp_path / "run/previous_1/checkpoints/step_00000006/manifest.json").exists()


def test_never_keeps_writing_through_links(saved: Path, tmp_path: Path) -> None:
    """What a link leads to is set aside where it is, on its own disk; files of others stay."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    shutil.copytree(saved, run)
    (run / "tensorboard").mkdir()
    (run / "tensorboard/events.out.tfevents.0000000001.rank_0").touch()
    for name in ("checkpoints", "tensorboard"):
        shutil.move(run / name, disk / name)
        (run / name).symlink_to(f"../disk/{name}")
    (disk / "checkpoints/a_file").touch()
    before = steps(tmp_path)
    for number in (1, 2):
        train(tmp_path, *EVERY, "checkpoint.resume=never", "trainer.steps=2").ok()
        assert steps(tmp_path) == [1, 2] and (run / "checkpoints").is_symlink()
        aside = f"run/previous_{number}"
        assert (tmp_path / aside / "checkpoints").resolve() == disk / f"checkpoints/previous_{number}"
        assert steps(tmp_path, aside) == (before if number == 1 else [1, 2])
        assert mlx_ring(tmp_path, "checkpoint", "verify", aside).statuses == [0]
    assert [path.name for path in (run / "previous_1/tensorboard").iterdir()] == [
        "events.out.tfevents.0000000001.rank_0"
    ]
    assert (run / "tensorboard").is_symlink() and (disk / "checkpoints/a_file").exists()
    train(tmp_path, *EVERY, "trainer.steps=3").ok()
    assert steps(tmp_path) == [1, 2, 3], "it resumes through the link"


def test_a_refused_command_moves_no_record(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    verdict = status(tmp_path)
    refused = train(tmp_path, *EVERY, "checkpoint.resume=never", "trainer.global_batch_size=4096")
    assert refused.statuses == [2] and "fewer than one global batch" in refused.errors[0], refused.report()
    assert not (tmp_path / "run/previous_1").exists() and status(tmp_path)["state"] == "failed"
    for key in ("step", "parameters_sha256"):
        assert status(tmp_path)[key] == verdict[key]
    train(tmp_path, *EVERY, "trainer.steps=7").ok()
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 8))


def test_a_new_run_from_the_weights_of_the_one_it_replaces(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    anew = ("checkpoint.resume=never", "checkpoint.initialize_from=run", "optimizer.learning_rate=1e-30")
    train(tmp_path, *anew, "schedule=constant", "trainer.steps=1").ok()
    old, new = newest(tmp_path, "run/previous_1"), newest(tmp_path)
    for name, array in load_file(old / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(new / "model.safetensors")[name], array)


def test_a_newest_of_a_later_version_is_not_passed_over(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    manifest = newest(tmp_path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    before = manifest.read_bytes()
    refused = train(tmp_path, *EVERY, "trainer.steps=7")
    assert refused.statuses == [5] and "format version 9" in refused.errors[0], refused.report()
    assert steps(tmp_path)[-1] == 6 and manifest.read_bytes() == before


def test_a_checkpoint_of_a_version_with_fewer_fields(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    manifest = newest(tmp_path) / "manifest.json"
    facts = json.loads(manifest.read_text())
    del facts["config"]["trainer"]["max_skipped_batches"]
    manifest.write_text(json.dumps(sealed(facts)))
    train(tmp_path, *EVERY, "trainer.steps=7").ok()
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 8))


def test_a_look_up_that_gives_another_value_is_refused(tmp_path: Path) -> None:
    """Its text is the same as before, and its value is on no disk."""
    rate = [*SMALL, *EVERY, "run.dir=run", "optimizer.learning_rate=${oc.env:RATE}"]
    start(rate, tmp_path, variables=[{"RATE": "1e-3"}]).wait().ok()
    longer = [*rate, "trainer.steps=8"]
    refused = start(longer, tmp_path, variables=[{"RATE": "2e-3"}]).wait()
    assert refused.statuses == [2] and "optimizer.learning_rate looks up" in refused.errors[0]
    start(longer, tmp_path, variables=[{"RATE": "1e-3"}]).wait().ok()


@pytest.mark.parametrize("source", ["run", "run/checkpoints/step_00000006", "model.safetensors"])
def test_initialize_from_takes_the_weights_alone(saved: Path, tmp_path: Path, source: str) -> None:
    shutil.copytree(saved, tmp_path / "run")
    weights = newest(tmp_path) / "model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    options = ("optimizer=sgd", "optimizer.learning_rate=1e-30", "trainer.steps=1")
    train(tmp_path, *options, f"checkpoint.initialize_from={source}", run="tuned").ok()
    expected, found = load_file(weights), load_file(newest(tmp_path, "tuned") / "model.safetensors")
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    assert rows(tmp_path, "train", "tuned")[0]["step"] == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_only_changes_nothing(saved: Path, tmp_path: Path, world_size: int) -> None:
    shutil.copytree(saved, tmp_path / "run")
    at_the_end = rows(tmp_path, "evaluation")[-1]
    before = (tmp_path / "run/metrics.jsonl").read_bytes(), (tmp_path / "run/status.json").read_bytes()
    shown = train(tmp_path, "evaluation.only=true", world_size=world_size).ok().members[0].stdout
    assert f"accuracy {at_the_end['accuracy']:.6g}" in shown and f"loss {at_the_end['loss']:.6g}" in shown
    after = (tmp_path / "run/metrics.jsonl").read_bytes(), (tmp_path / "run/status.json").read_bytes()
    assert after == before
    elsewhere = train(tmp_path, "evaluation.only=true", "checkpoint.resume=run", run="other").ok()
    assert f"accuracy {at_the_end['accuracy']:.6g}" in elsewhere.members[0].stdout


def test_evaluation_only_of_weights_from_elsewhere(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    train(tmp_path, *EVERY, "seed=3", run="other").ok()
    both = ("evaluation.only=true", "checkpoint.initialize_from=other", "trainer.global_batch_size=4096")
    refused = train(tmp_path, *both)
    assert refused.statuses == [2] and "checkpoint.resume=never" in refused.errors[0], refused.report()
    shown = train(tmp_path, *both, "checkpoint.resume=never").ok().members[0].stdout
    assert f"loss {rows(tmp_path, 'evaluation', 'other')[-1]['loss']:.6g}" in shown


def test_evaluation_only_never_moves_a_record(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    refused = train(tmp_path, "evaluation.only=true", "checkpoint.resume=never")
    assert refused.statuses == [2] and "checkpoint.initialize_from" in refused.errors[0], refused.report()
    assert steps(tmp_path)[-1] == 6 and not (tmp_path / "run/previous_1").exists()


def test_a_finished_checkpoint_elsewhere_ends_with_its_own(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    train(tmp_path, *EVERY, "checkpoint.resume=run", world_size=2, run="copy").ok()
    assert steps(tmp_path, "copy") == [6] and len(rows(tmp_path, "evaluation", "copy")) == 1
    assert status(tmp_path, "copy")["parameters_sha256"] == status(tmp_path)["parameters_sha256"]


def test_another_runs_checkpoint_never_mixes_with_a_record(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train(tmp_path, *EVERY, "seed=3", run=name).ok()
    back = "checkpoint.resume=two/checkpoints/step_00000004"
    train(tmp_path, *EVERY, "seed=3", back, run="one").ok()
    assert [row["step"] for row in rows(tmp_path, "train", "one")] == [5, 6]
    assert len((tmp_path / "one/previous_1/metrics.jsonl").read_text().splitlines()) > 6
    assert (tmp_path / "one/previous_1/checkpoints/step_00000006/manifest.json").exists()


def test_a_completed_run_gets_its_true_status(tmp_path: Path) -> None:
    """As if it had died between the last commit and the last word."""
    train(tmp_path).ok()
    path = tmp_path / "run/status.json"
    path.write_text(path.read_text().replace("completed", "running"))
    digest = status(tmp_path)["parameters_sha256"]
    train(tmp_path, world_size=2).ok()
    assert status(tmp_path)["state"] == "completed" and status(tmp_path)["parameters_sha256"] == digest


def test_evaluation_is_the_same_in_any_split(tmp_path: Path) -> None:
    """355 held-out digits in micro-batches of 7, on 1, 2 and 4 ranks: one exact mean."""
    train(tmp_path).ok()
    shown = {
        train(tmp_path, "evaluation.only=true", "evaluation.micro_batch_size=7", world_size=world_size)
        .ok()
        .members[0]
        .stdout.split("seconds")[0]
        for world_size in (1, 2, 4)
    }
    assert len(shown) == 1, shown


def test_the_clock_saves_too(tmp_path: Path) -> None:
    train(tmp_path, "checkpoint.every_steps=null", "checkpoint.every_seconds=0.0001", world_size=2).ok()
    assert [row["step"] for row in rows(tmp_path, "checkpoint")] == [1, 2, 3, 4, 5, 6]


def test_the_manifest_holds_the_whole_state(tmp_path: Path) -> None:
    train(tmp_path, world_size=2).ok()
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())
    assert manifest["progress"] == {"step": 6, "next_sample": 6 * 32, "tokens": 0, "skipped": 0}
    assert manifest["random"]["seed"] == 0 and manifest["world_size"] == 2
    assert manifest["parameters_sha256"] == status(tmp_path)["parameters_sha256"]
    moments = load_file(newest(tmp_path) / "optimizer.safetensors")
    assert any(name.endswith(".m") for name in moments) and any(name.endswith("step") for name in moments)
