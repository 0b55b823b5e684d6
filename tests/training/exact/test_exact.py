"""communicator=exact: the same bits on any number of ranks, however uneven, however often they changed."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from ranks import ROOT, SMALL, SUPPORT, Ranks, mpirun, rows, start, status
from refusals import CLUSTER, TRAINING, assert_refused

from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.run.builder import build
from mlx_ring.run_directory.manifest import sealed

pytestmark = pytest.mark.ranks
COMMON = [item for item in SMALL if not item.startswith(("model.", "trainer.compile"))]
EXACT = [*COMMON, "communicator=exact", "trainer.steps=8", "trainer.global_batch_size=28"]
MODELS = {
    "mlp": ("model.hidden_sizes=[16]", "model.dropout=0.2"),
    "cnn": ("model=cnn", "model.channels=[4]", "model.hidden_size=8", "model.dropout=0.2", "optimizer=sgd"),
    "transformer": (
        "model=transformer", "model.dimensions=16", "model.dropout=0.2", "data=synthetic", "optimizer=muon",
        "data.sequence_length=8", "data.vocabulary_size=32",
    ),
}  # fmt: skip
OWN = ("data=custom", "data.import_path=exact_parts:points", "model=custom")


@pytest.fixture(autouse=True)
def own_code_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{SUPPORT}")


def run(folder: Path, name: str, world_size: int, options: Sequence[str], *more: str) -> Ranks:
    return start([*EXACT, *options, f"run.dir={name}", *more], folder, world_size=world_size).wait()


def outcome(folder: Path, name: str) -> tuple[object, ...]:
    """What must not depend on who computed it: the weights, and every figure that is no time."""
    steps = [(row["step"], row["loss"], row["gradient_norm"]) for row in rows(folder, "train", name)]
    evaluations = [(row["loss"], row.get("accuracy")) for row in rows(folder, "evaluation", name)]
    skipped = [row["step"] for row in events(folder, "nonfinite_skipped", name)]
    found = status(folder, name)
    assert found["state"] == "completed" and len(steps) >= 8
    return found["parameters_sha256"], steps, evaluations, skipped


def events(folder: Path, kind: str, name: str) -> list[dict[str, object]]:
    return [row for row in rows(folder, "event", name) if row["event"] == kind]


def own(model: str, factor: float | str = 1.0, rare: int = 50) -> list[str]:
    arguments = f"data.arguments={{factor: {factor}, rare: {rare}}}"
    return [*OWN, f"model.import_path=exact_parts:{model}", arguments]


# One hash


@pytest.mark.parametrize("model", ["mlp", "transformer", pytest.param("cnn", marks=pytest.mark.long)])
def test_one_hash_on_any_number_of_ranks(tmp_path: Path, model: str) -> None:
    """Seven micro-batches on 1, 2 (3 + 4), 3 and 7 ranks; another backend; other buckets, sent early."""
    options = [*MODELS[model], "evaluation.every_steps=4"]
    run(tmp_path, "alone", 1, options).ok()
    early = ("communicator.overlap=true", "communicator.bucket_bytes=4096")
    run(tmp_path, "two", 2, options, *early).ok()
    names = ["two", "mpi"]
    if model == "mlp":
        run(tmp_path, "seven", 7, options).ok()
        names.append("seven")
    mpirun(3, [*EXACT, *options, "run.dir=mpi"], tmp_path).ok()
    expected = outcome(tmp_path, "alone")
    assert len(expected[2]) == 2
    for name in names:
        assert outcome(tmp_path, name) == expected, name


def test_one_hash_in_bfloat16_and_without_compilation(tmp_path: Path) -> None:
    options = [*MODELS["transformer"], "trainer.compute_dtype=bfloat16", "trainer.compile=false"]
    run(tmp_path, "alone", 1, options).ok()
    run(tmp_path, "three", 3, options).ok()
    assert outcome(tmp_path, "three") == outcome(tmp_path, "alone")


def test_augmentation_is_keyed_by_the_micro_batch(tmp_path: Path) -> None:
    run(tmp_path, "alone", 1, own("Augmented")).ok()
    run(tmp_path, "three", 3, own("Augmented")).ok()
    assert outcome(tmp_path, "three") == outcome(tmp_path, "alone")


@pytest.mark.long
def test_jumps_of_the_gradient_change_no_bit(tmp_path: Path) -> None:
    """One sample in fifty is ten thousand times as far away: gradients outgrow their codes, and shrink again.

    What was sent in vain shows in the bytes of a step. A step issued ahead starts from a state that is then
    taken back.
    """
    options = [*own("Classifier", 1e4), "trainer.steps=20", "trainer.clip_gradient_norm=null"]
    run(tmp_path, "alone", 1, options).ok()
    run(tmp_path, "waits", 1, options, "memory.issue_ahead=false").ok()
    run(tmp_path, "two", 2, options).ok()
    run(tmp_path, "three", 3, options).ok()
    expected = outcome(tmp_path, "alone")
    for name in ("waits", "two", "three"):
        assert outcome(tmp_path, name) == expected, name
    sent = [row["wire_bytes"] for row in rows(tmp_path, "train", "two")]
    again = [count == 2 * min(sent) for count in sent]  # pyright: ignore[reportOperatorIssue]
    assert again[0] and sum(again) >= 3 and not all(again)


def test_a_batch_with_a_nan_is_skipped_alike(tmp_path: Path) -> None:
    options = [*own("Classifier", "nan", rare=100), "trainer.max_skipped_batches=20"]
    run(tmp_path, "alone", 1, options).ok()
    run(tmp_path, "three", 3, options).ok()
    expected = outcome(tmp_path, "alone")
    assert expected[3] and outcome(tmp_path, "three") == expected


def test_a_gradient_that_is_not_finite_is_told_beside_a_finite_loss(tmp_path: Path) -> None:
    """Its codes are any integers: the bits of the magnitudes tell."""
    ranks = run(tmp_path, "run", 2, own("Endless"), "trainer.max_skipped_batches=2")
    assert_refused(ranks, TRAINING, "gradient norm nan in 2 batches in a row", agreed=True)
    assert "non-finite loss 1." in ranks.errors[0]


# Who computes what


def test_a_measured_split_follows_the_speeds_and_changes_no_bit(tmp_path: Path) -> None:
    """Rank 0 takes 50 ms longer for a micro-batch than the others."""
    options = [*own("Slow"), "trainer.compile=false", "trainer.steps=24"]
    run(tmp_path, "alone", 1, options).ok()
    run(tmp_path, "three", 3, options, "trainer.split=measured").ok()
    assert outcome(tmp_path, "three") == outcome(tmp_path, "alone")
    changes = events(tmp_path, "split_changed", "three")
    dealt = [change["micro_batches"] for change in changes]
    assert dealt and dealt[0][0] == 1 and sum(dealt[0]) == 7 and min(dealt[0]) == 1 and max(dealt[0]) >= 3
    seconds = changes[0]["seconds_per_micro_batch"]
    assert isinstance(seconds, list) and seconds[0] > 2 * seconds[1]
    assert not events(tmp_path, "split_changed", "alone")


def test_a_run_continues_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """On 4 ranks, then 2, 3 and 1; after each, the checkpoints of the last steps are lost."""
    options = [*MODELS["mlp"], "checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    run(tmp_path, "alone", 1, options).ok()
    for reached, world_size in ((2, 4), (4, 2), (5, 3), (8, 1)):
        run(tmp_path, "parts", world_size, options).ok()
        for step in range(reached + 1, 9):
            (tmp_path / f"parts/checkpoints/step_{step:08d}").rename(tmp_path / f"{world_size}_{step}")
    assert outcome(tmp_path, "parts") == outcome(tmp_path, "alone")
    assert [row["step"] for row in events(tmp_path, "resumed", "parts")] == [2, 4, 5]
    saved = [tmp_path / name / "checkpoints/step_00000008" for name in ("alone", "parts")]
    for file in ("model", "optimizer", "strategy"):
        first, second = (folder / f"{file}.safetensors" for folder in saved)
        assert first.read_bytes() == second.read_bytes()


def test_the_wire_carries_as_much_as_in_float32(tmp_path: Path) -> None:
    run(tmp_path, "exact", 2, MODELS["mlp"]).ok()
    run(tmp_path, "native", 2, MODELS["mlp"], "communicator=native").ok()
    exact, native = (
        [row["wire_bytes"] for row in rows(tmp_path, "train", name)] for name in ("exact", "native")
    )
    assert exact[0] == 2 * exact[1]  # the first step finds its exponents
    assert exact[1:] == [native[1] + 4 * 4] * 7  # pyright: ignore[reportOperatorIssue] - four maxima


# Random numbers


@pytest.mark.parametrize("compiled", [True, False])
def test_every_micro_batch_of_every_step_draws_its_own(tmp_path: Path, compiled: bool) -> None:
    """A random state that `mx.compile` does not capture would freeze the masks, and still give one hash."""
    config = compose_run(
        f"run.dir={tmp_path}", *OWN, "model.import_path=exact_parts:Drawn", "trainer.global_batch_size=12",
        "trainer.micro_batch_size=4", "trainer.steps=8", "communicator=exact", f"trainer.compile={compiled}",
    )  # fmt: skip
    communicator = Communicator.alone()
    built = build(config, communicator, None)
    samples = built.data.dataset.train.batch(np.arange(4))
    trainer = built.trainer

    def drawn(batch: int, micro_batch: int) -> float:
        return float(trainer.gradient(batch, micro_batch, *samples)[0].item())

    losses = {place: drawn(*place) for place in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (7, 2))}
    assert len(set(losses.values())) == len(losses)
    assert {place: drawn(*place) for place in losses} == losses
    trainer.close()


def test_first_weights_come_from_the_seed_alone(tmp_path: Path) -> None:
    digests = {}
    for seed in (0, 1):
        for name in ("first", "second"):
            config = compose_run(f"run.dir={tmp_path}", f"seed={seed}", "communicator=exact")
            mx.random.normal((seed + len(name),))  # whatever was drawn before
            communicator = Communicator.alone()
            built = build(config, communicator, None)
            built.trainer.close()
            weights = tree_flatten(built.model.parameters())
            digests[seed, name] = [np.asarray(array).tobytes() for _, array in weights]
    assert digests[0, "first"] == digests[0, "second"] != digests[1, "first"]


# Machines


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_compute_otherwise_are_refused(tmp_path: Path, world_size: int) -> None:
    ranks = run(tmp_path, "run", world_size, own("Unlike"))
    words = (
        "communicator=exact",
        "on rank 1 (",
        " on rank 0 (",
        "MLX ",
        "machines of one kind",
        "communicator=native",
    )
    assert_refused(ranks, CLUSTER, *words, agreed=True)
    assert status(tmp_path, "run")["state"] == "failed"
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_an_operation_that_does_not_repeat_is_refused(tmp_path: Path) -> None:
    ranks = run(tmp_path, "run", 2, own("Unsteady"), "trainer.compile=false")
    words = ("rank 1 on ", "twice", "not reproducible", "mlx-ring doctor --exact", "communicator=native")
    assert_refused(ranks, CLUSTER, *words, agreed=True)


def test_a_resume_on_another_kind_of_machine_is_told(tmp_path: Path) -> None:
    options = [*MODELS["mlp"], "checkpoint.every_steps=4"]
    run(tmp_path, "run", 2, options).ok()
    manifest = tmp_path / "run/checkpoints/step_00000008/manifest.json"
    content = json.loads(manifest.read_text())
    assert set(content["first_gradient"]) == {"sha256", "machine"}
    content["first_gradient"] = {"sha256": "0" * 64, "machine": "Apple M9, Accelerate, MLX 1.0"}
    manifest.write_text(json.dumps(sealed(content)))
    resumed = run(tmp_path, "run", 1, options, "trainer.steps=10").ok()
    (told,) = events(tmp_path, "other_machine", "run")
    assert "Apple M9" in str(told["message"]) and told["step"] == 8
    assert "warning" in resumed.members[0].stdout
    run(tmp_path, "run", 1, options, "trainer.steps=12").ok()
    assert len(events(tmp_path, "other_machine", "run")) == 1


def test_many_micro_batches_are_told(tmp_path: Path) -> None:
    options = ("trainer.global_batch_size=514", "trainer.micro_batch_size=2", "trainer.steps=2")
    run(tmp_path, "run", 1, [*MODELS["mlp"], *options]).ok()
    (told,) = events(tmp_path, "low_precision", "run")
    assert "257 micro-batches" in str(told["message"]) and "micro_batch_size" in str(told["message"])
