"""A user's own model, data and loss by import path: from the command line, never from a checkpoint."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from ranks import ROOT, SMALL, SUPPORT, Ranks, rows, start
from refusals import CONFIGURATION, assert_refused
from safetensors.numpy import load_file

pytestmark = pytest.mark.ranks
OWN = (
    "model=custom", "model.import_path=user_parts:Line", "model.arguments={scale: 2.0}", "data=custom",
    "data.import_path=user_parts:points", "trainer.loss=user_parts:squared", "optimizer.learning_rate=0.1",
    "trainer.steps=40",
)  # fmt: skip


def run(folder: Path, *overrides: str, world_size: int = 1) -> Ranks:
    common = [item for item in SMALL if not item.startswith("model.")]
    return start([*common, "run.dir=run", *overrides], folder, world_size=world_size).wait()


@pytest.fixture(autouse=True)
def own_code_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{SUPPORT}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_own_model_data_and_loss(tmp_path: Path, world_size: int) -> None:
    run(tmp_path, *OWN, world_size=world_size).ok()
    assert rows(tmp_path, "evaluation")[-1]["loss"] < 0.05 * rows(tmp_path, "train")[0]["loss"]


@pytest.mark.parametrize("part", ["model", "data"])
def test_own_code_that_fails(tmp_path: Path, part: str) -> None:
    """One line; where in the user's code is in the log of a model, which is built once the run is open."""
    failing = (f"{part}.import_path=user_parts:failing", f"{part}.arguments={{}}")
    refused = run(tmp_path, *OWN, *failing)
    words = (f"{part}.import_path=user_parts:failing failed: ValueError: no such thing", f"{part}.arguments")
    assert_refused(refused, CONFIGURATION, *words)
    assert "raise ValueError" in (tmp_path / "run/logs/rank_0.log").read_text()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("half", ["blocks.0.weight is of mlx.core.bfloat16", "trainer.compute_dtype=bfloat16"]),
        ("index", ["index is of mlx.core.int32", "freeze(keys=['index']", "underscore"]),
        ("frozen", ["nothing to train"]),
        ("muon", ["optimizer=muon", "`layers`", "optimizer=adamw"]),
    ],
)
def test_a_model_that_cannot_be_trained(tmp_path: Path, what: str, words: list[str]) -> None:
    optimizer = "optimizer=muon" if what == "muon" else "optimizer=sgd"
    own = [item for item in OWN if not item.startswith("model.")]
    odd = ("model.import_path=user_parts:Odd", f"model.arguments={{what: {what}}}", optimizer)
    assert_refused(run(tmp_path, *own, *odd, world_size=2), CONFIGURATION, *words, agreed=True)


def tied(folder: Path, how: str, world_size: int = 1) -> Ranks:
    model = ("model=custom", "model.import_path=user_parts:Tied", f"model.arguments={{how: {how}}}")
    data = ("data=custom", "data.import_path=user_parts:half_labelled")
    return run(folder, *model, *data, "optimizer=sgd", "optimizer.learning_rate=1", world_size=world_size)


@pytest.mark.parametrize(("how", "world_size"), [("weight", 1), ("weight", 2), ("transposed", 1)])
def test_weights_that_are_tied_by_assignment_are_refused(tmp_path: Path, how: str, world_size: int) -> None:
    """MLX would train them as two."""
    words = ("first.weight and second.weight are one array", "embedding.as_linear(x)", "mx.array(weight)")
    assert_refused(tied(tmp_path, how, world_size), CONFIGURATION, *words, agreed=True)


@pytest.mark.parametrize(
    ("how", "stay_one"), [("module", True), ("deepcopy", False), ("frozen", False), ("own", False)]
)
def test_weights_that_are_one_module_or_only_begin_alike_are_trained(
    tmp_path: Path, how: str, stay_one: bool
) -> None:
    tied(tmp_path, how).ok()
    weights = load_file(tmp_path / "run/checkpoints/step_00000006/model.safetensors")
    assert np.array_equal(weights["first.weight"], weights["second.weight"]) == stay_one


def classified(*overrides: str) -> list[str]:
    return [
        "model=custom", "model.import_path=user_parts:Classifier", "data=custom",
        "data.import_path=user_parts:half_labelled", *overrides,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("outputs: 2", ["outputs of shape (1, 2)", "3 classes needs (1, 3)", "correct the model"]),
        ("fails: true", ["failed on samples of shape (1, 2)", "ValueError: no such layer"]),
    ],
)
def test_a_model_that_does_not_fit_the_data(tmp_path: Path, arguments: str, words: list[str]) -> None:
    refused = run(tmp_path, *classified(f"model.arguments={{{arguments}}}"), world_size=2)
    assert_refused(refused, CONFIGURATION, *words, agreed=True)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_targets_that_are_no_classes(tmp_path: Path, split: str) -> None:
    refused = run(
        tmp_path, *classified("data.import_path=user_parts:mislabelled", f"data.arguments={{split: {split}}}")
    )
    assert_refused(refused, CONFIGURATION, "the target 500000", "3 classes (0 to 2)")


def test_an_error_in_own_code_while_training(tmp_path: Path) -> None:
    """One line that tells where it arose; the traceback is in the log."""
    ended = run(tmp_path, *classified("model.arguments={fails_at: 9}"))
    assert ended.statuses == [1] and len(ended.errors) == 1 and "Traceback" not in ended.report()
    assert "ValueError: too late" in ended.errors[0] and "user_parts.py, line" in ended.errors[0]
    assert "Traceback" in (tmp_path / "run/logs/rank_0.log").read_text()


def test_a_checkpoint_names_no_code(tmp_path: Path) -> None:
    """Exporting, evaluating or resuming without the import path on the command line runs nothing of it."""
    run(tmp_path, *OWN).ok()
    (tmp_path / "imported").unlink()
    refused = run(tmp_path)
    assert refused.statuses == [2] and len(refused.errors) == 1, refused.report()
    assert not (tmp_path / "imported").exists()


def evaluated(folder: Path, targets: list[int], *overrides: str, world_size: int = 1) -> Ranks:
    """Train on sound targets; evaluate with these, four a micro-batch, every three of six steps."""
    own = ("model=custom", "model.import_path=user_parts:Classifier", "data=custom")
    data = ("data.import_path=user_parts:held_out", f"data.arguments={{targets: {targets}}}")
    every = ("evaluation.every_steps=3", "checkpoint.every_steps=3", "metrics.tensorboard=true")
    return run(folder, *own, *data, *every, *overrides, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_in_which_no_target_counts_has_no_value(tmp_path: Path, world_size: int) -> None:
    evaluated(tmp_path, [-1] * 10, world_size=world_size).ok()
    for row in rows(tmp_path, "evaluation"):
        assert (row["loss"], row["accuracy"], row["samples"]) == (None, None, 10)
    told = [row for row in rows(tmp_path, "event") if row["event"] == "nothing_evaluated"]
    assert [row["step"] for row in told] == [3, 6] and "all held-out targets are -1" in str(
        told[0]["message"]
    )
    manifest = tmp_path / "run/checkpoints/step_00000006/manifest.json"
    assert json.loads(manifest.read_text())["evaluation"] is None, "it is not the best checkpoint"
    again = evaluated(tmp_path, [-1] * 10, "evaluation.only=true").ok()
    printed = again.members[0].stdout
    assert "no value, because all held-out targets are -1" in printed and "loss" not in printed


def test_an_evaluation_counts_the_targets_that_count(tmp_path: Path) -> None:
    evaluated(tmp_path, [-1] * 9 + [0]).ok()
    row = rows(tmp_path, "evaluation")[-1]
    assert row["loss"] is not None and row["accuracy"] in (0, 1)
    assert "nothing_evaluated" not in [each["event"] for each in rows(tmp_path, "event")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_infinite_losses_of_both_signs_are_not_finite(tmp_path: Path, world_size: int) -> None:
    """As a NaN: the row has no loss, and training goes on."""
    loss = "trainer.loss=user_parts:infinite"
    evaluated(tmp_path, [2] * 4 + [3] * 4 + [0] * 4, loss, world_size=world_size).ok()
    assert [row["loss"] for row in rows(tmp_path, "evaluation")] == [None, None]
    assert (
        "loss nan" in evaluated(tmp_path, [2] * 4 + [3] * 4, loss, "evaluation.only=true").members[0].stdout
    )
