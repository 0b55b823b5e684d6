"""Steps issued before the last one's outcome is read: the same bits as where the host waits for each."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from ranks import ROOT, SMALL, SUPPORT, TRAIN, rows, start, status, wait_for

from mlx_ring.communication.codecs.float import NativeCodec
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.data.loader import GlobalBatch
from mlx_ring.run.builder import build
from mlx_ring.training.rank_flags import RankFlags
from mlx_ring.training.strategies import Contribution, Outcome
from mlx_ring.training.strategies.all_reduce import AllReduce

UNWAITED = [sys.executable, str(ROOT / "tests/support/collectives_not_waited_for.py")]
ANY_MODEL = [item for item in SMALL if not item.startswith("model.")]
RUN = [  # in several buckets
    *ANY_MODEL, "data=custom", "data.import_path=broken_data:build", "trainer.compile=true",
    "model.dropout=0",
    "model.hidden_sizes=[64,64]", "communicator.bucket_bytes=4096", "schedule=constant",
]  # fmt: skip
CALM = "data.arguments={fault: none, rank: 1, at_call: 9}"


@pytest.fixture(autouse=True)
def own_data_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{SUPPORT}")


def outcome(folder: Path, name: str) -> tuple[object, list[object]]:
    """The weights and every figure that is no time."""
    steps: list[object] = [
        (row["step"], row["loss"], row["gradient_norm"]) for row in rows(folder, "train", name)
    ]
    return status(folder, name)["parameters_sha256"], steps


@pytest.mark.ranks
@pytest.mark.parametrize("codec", ["native", "exact"])
@pytest.mark.parametrize("arguments", ["{factor: 1e4, rare: 50}", "{factor: nan, rare: 100}"])
def test_what_voids_a_step_voids_the_one_issued_after_it(tmp_path: Path, codec: str, arguments: str) -> None:
    """Samples of ten thousand times the size have exact codes made anew; NaNs have a batch skipped."""
    options = [
        *ANY_MODEL, "data=custom", "data.import_path=exact_parts:points", "model=custom",
        "model.import_path=exact_parts:Classifier", f"data.arguments={arguments}", "trainer.steps=20",
        f"communicator={codec}", "evaluation.every_steps=7", "checkpoint.every_steps=5",
        "trainer.max_skipped_batches=20", "model.arguments={width: 1024}", "communicator.bucket_bytes=4096",
    ]  # fmt: skip
    for name, program in (("waits", TRAIN), ("ahead", UNWAITED)):
        start([*options, f"run.dir={name}"], tmp_path, world_size=2, program=program).wait().ok()
    waits, ahead = outcome(tmp_path, "waits"), outcome(tmp_path, "ahead")
    assert len(waits[1]) == 20 and ahead == waits
    skipped = [row["event"] == "nonfinite_skipped" for row in rows(tmp_path, "event", "ahead")]
    assert any(skipped) == ("nan" in arguments)


@pytest.mark.ranks
def test_a_stop_that_one_rank_asks_for(tmp_path: Path) -> None:
    """The others know of it when the step's sum is there, and have issued the next one by then."""
    told = "data.arguments={fault: tell, rank: 0, at_call: 40}"
    ranks = start(
        [*RUN, told, "run.dir=run", "trainer.steps=100000"], tmp_path, world_size=2, program=UNWAITED
    )
    wait_for(tmp_path / "reached", ranks)
    ranks.members[1].process.terminate()
    assert ranks.wait().statuses == [75, 75], ranks.report()
    step = status(tmp_path)["step"]
    assert isinstance(step, int) and step == rows(tmp_path, "train")[-1]["step"]
    reference = [*RUN, told, "run.dir=reference", f"trainer.steps={step}"]
    start(reference, tmp_path, world_size=2).wait().ok()
    assert outcome(tmp_path, "run") == outcome(tmp_path, "reference")


@pytest.mark.ranks
def test_a_save_by_the_clock(tmp_path: Path) -> None:
    """Rank 0's clock alone asks for it, after any step: saved is the state of that step."""
    often = ("checkpoint.every_seconds=0.02", "checkpoint.keep_last=1000", "trainer.steps=60")
    ranks = start([*RUN, CALM, *often, "run.dir=run"], tmp_path, world_size=2, program=UNWAITED)
    ranks.wait().ok()
    by_clock = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))[:-1]
    assert by_clock
    for name in {by_clock[0], by_clock[-1]}:
        options = [f"run.dir={name}", f"checkpoint.resume=run/checkpoints/{name}", "trainer.steps=60"]
        start([*RUN, CALM, *options], tmp_path, world_size=2).wait().ok()
        assert status(tmp_path, name)["parameters_sha256"] == status(tmp_path, "run")["parameters_sha256"]


@pytest.mark.parametrize("codec", ["native", "exact"])
def test_what_is_yielded_with_a_wish_is_the_state_of_that_step(tmp_path: Path, codec: str) -> None:
    """One rank, a wish at each call in turn; in exact mode the first step is made twice."""

    def stopped(name: str, issue_ahead: bool, calls: int) -> tuple[int, str | None]:
        config = compose_run(
            f"run.dir={tmp_path}/{name}", f"communicator={codec}", f"memory.issue_ahead={issue_ahead}",
            "evaluation.every_steps=null", "checkpoint.every_steps=null", "trainer.steps=9",
        )  # fmt: skip
        communicator = Communicator.alone()
        built = build(config, communicator, None)
        asked = [RankFlags()] * calls
        built.authority.flags = lambda: asked.pop() if asked else RankFlags(stop=True)
        result = next(result for result in built.trainer.steps() if result.flags[0].stop)
        built.trainer.close()
        return result.step, built.verify_replicas()

    waits = dict(stopped("waits", False, calls) for calls in range(1, 7))
    for calls in range(1, 5):
        step, digest = stopped("ahead", True, calls)
        assert waits[step] == digest, (calls, step)


def test_one_step_is_issued_ahead_and_no_more(tmp_path: Path) -> None:
    """Also after the first one was made again; none past the last, nor past one that is evaluated."""
    config = compose_run(
        f"run.dir={tmp_path}", "communicator=exact", "evaluation.every_steps=5",
        "checkpoint.every_steps=null", "trainer.steps=9",
    )  # fmt: skip
    built = build(config, Communicator.alone(), None)
    drawn, next_batch = [0], built.trainer._next_batch  # pyright: ignore[reportPrivateUsage]

    def counted() -> tuple[GlobalBatch, float]:
        drawn[0] += 1
        return next_batch()

    built.trainer._next_batch = counted  # pyright: ignore[reportPrivateUsage]
    ahead = [drawn[0] - result.step for result in built.trainer.steps()]
    built.trainer.close()
    assert ahead == [1, 1, 1, 1, 0, 1, 1, 1, 0]


def test_flags_are_read_only_where_there_is_one() -> None:
    """On a GPU reading them waits for all that was issued."""
    alone = Communicator.alone()
    strategy = AllReduce(alone, NativeCodec(), num_micro_batches=1, clip_gradient_norm=None, compile=True)

    def outcome(flags: RankFlags) -> Outcome:
        total, one = strategy.add(None, {"weight": mx.ones((3,))}), mx.array(1)
        return strategy.reduce(
            Contribution(total=total, losses=[one], targets=[one], first_micro_batch=0, flags=flags)
        )[0]

    asked = RankFlags(save=True, micro_batch_seconds=0.25)
    measured = RankFlags(micro_batch_seconds=0.25)
    assert outcome(asked).read_flags() == [asked]
    assert outcome(measured).read_flags() == [measured]
    unread = mx.ones((2, 3))
    assert replace(outcome(RankFlags()), flags=unread).read_flags() == [RankFlags()] * 2
