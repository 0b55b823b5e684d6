"""A wrong configuration or command line ends with one line and status 2, and changes nothing."""

import json
import sys
import threading
from pathlib import Path

import pytest
from ranks import SMALL, TRAIN, free_ports, start, status, train
from refusals import CONFIGURATION, assert_refused, contents

from mlx_ring.run import failure

pytestmark = pytest.mark.ranks
SAVED = {"step": 6, "parameters_sha256": "ab" * 32}
UNKNOWN = [
    (["trainer.stepz=3"], ["unknown configuration key trainer.stepz", "did you mean trainer.steps?"]),
    (["optimizer.lr=3"], ["unknown configuration key optimizer.lr", "known: ", "optimizer.learning_rate"]),
    (
        ["learning_rate=3"],
        ["unknown configuration key learning_rate", "did you mean optimizer.learning_rate?"],
    ),
    (
        ["checkpont.keep_last=3"],
        ["unknown configuration key checkpont.keep_last", "did you mean checkpoint.keep_last?"],
    ),
    (["+trainer.stepz=3"], ["unknown configuration key trainer.stepz", "did you mean trainer.steps?"]),
    (["+extra=1"], ["unknown configuration key extra", "known: ", "trainer"]),
    (["modle=cnn"], ["unknown configuration key modle", "did you mean model?"]),
    (["~trainer"], ["trainer is missing"]),
]
TYPES = [
    (["trainer.steps=ten"], ["trainer.steps", "'ten'", "Integer"]),
    (["trainer.steps=1.5"], ["trainer.steps", "1.5", "Integer"]),
    (["trainer.steps=null"], ["trainer.steps", "None", "int"]),
    (["optimizer.learning_rate=fast"], ["optimizer.learning_rate", "'fast'", "Float"]),
    (["trainer.compile=perhaps"], ["trainer.compile", "perhaps", "bool"]),
    (["model.hidden_sizes=7"], ["model.hidden_sizes must be a list", "got 7"]),
    (
        ["model=custom", "model.import_path=a:b", "model.arguments=[1]"],
        ["model.arguments must be a group", "got [1]"],
    ),
    (["seed=abc"], ["seed must be an integer", "abc"]),
    (["trainer=5"], ["trainer must be a group of values", "5"]),
]
MISSING = [
    (["data=text", "model=transformer"], ["data.path has no value", "data.path=…"]),
    (["model=custom"], ["model.import_path has no value", "model.import_path=…"]),
    (["~trainer.steps"], ["trainer.steps has no value"]),
]
INTERPOLATIONS = [
    (
        ["trainer.steps=${nothing.here}"],
        ["trainer.steps refers to a key that does not exist", "nothing.here"],
    ),
    (["trainer.steps=${trainer.steps}"], ["trainer.steps cannot be resolved", "Recursive"]),
    (["trainer.steps=${oc.env:NO_SUCH_VARIABLE}"], ["trainer.steps cannot be resolved", "NO_SUCH_VARIABLE"]),
    (["trainer.steps=${unheard_of:1}"], ["trainer.steps cannot be resolved", "unheard_of"]),
    (["run.dir=${nothing.here}"], ["run.dir refers to a key that does not exist", "nothing.here"]),
]
CHOICES = [
    (["optimizer=adam"], ["there is no optimizer=adam", "known: ", "adamw", "muon"]),
    (["model=resnet"], ["there is no model=resnet", "cnn", "transformer"]),
    (["data=mnist"], ["there is no data=mnist", "digits", "fashion_mnist"]),
    (["experiment=mine"], ["there is no experiment=mine", "text_small"]),
    (["model.name=resnet"], ["model.name is 'resnet'", "known: ", "transformer"]),
    (["trainer.compute_dtype=float16"], ["trainer.compute_dtype", "'float16'", "float32", "bfloat16"]),
    (["run.dir=null"], ["run.dir cannot be null"]),
    (["run.dir={a: 1}"], ["run.dir cannot be used", "{'a': 1}"]),
    (["communicator.backend=gloo"], ["communicator.backend", "'gloo'", "ring", "mpi", "nccl"]),
    (["trainer.loss=mse"], ["trainer.loss is 'mse'", "cross_entropy"]),
]
TARGETS = [
    (["+model._target_=os.system"], ["model._target_ is refused"]),
    (["+data.nested={_target_:os.system}"], ["data.nested._target_ is refused"]),
    (["model.hidden_sizes=[{_target_:os.system}]"], ["model.hidden_sizes[0]._target_ is refused"]),
]
RANGES = [
    (["optimizer.learning_rate=nan"], ["optimizer.learning_rate must be", "finite", "above 0", "got nan"]),
    (["optimizer.learning_rate=-1"], ["optimizer.learning_rate must be", "above 0", "got -1"]),
    (["optimizer.learning_rate=0"], ["optimizer.learning_rate must be", "above 0", "got 0"]),
    (["trainer.global_batch_size=0"], ["trainer.global_batch_size must be at least 1", "got 0"]),
    (["trainer.micro_batch_size=0"], ["trainer.micro_batch_size must be at least 1", "got 0"]),
    (["trainer.global_batch_size=30"], ["trainer.global_batch_size", "got 30", "trainer.micro_batch_size=4"]),
    (["trainer.steps=-1"], ["trainer.steps must be at least 1", "got -1"]),
    (
        ["checkpoint.keep_last=0"],
        ["checkpoint.keep_last must be at least 1", "resuming needs the newest", "got 0"],
    ),
    (["checkpoint.every_seconds=0"], ["checkpoint.every_seconds must be null or above 0", "got 0"]),
    (["schedule.warmup_steps=6"], ["schedule.warmup_steps must be below trainer.steps=6", "got 6"]),
    (["cluster.ranks=3"], ["cluster.ranks=3", "1 rank was launched", "mlx.launch -n 3"]),
]
COMMAND_LINES = [
    (["trainer.steps"], ["trainer.steps", "missing EQUAL"]),
    (["=3"], ["command line"]),
    (["--nonsense"], ["unrecognized arguments: --nonsense"]),
    (["--config-name"], ["--config-name", "expected one argument"]),
    (["--config-dir=nowhere"], ["nowhere", "not found"]),
    (["hydra.mode=MULTIRUN", "seed=1,2", "run.dir=one"], ["run.dir=one", "hydra.sweep.dir=FOLDER"]),
]
# The time limit is over before the rank hears that its peer did not come: both ways lead to the same words.
IMPATIENT = """
import os, threading
from mlx_ring import train
from mlx_ring.run import failure, process
from mlx_ring.errors import ClusterError

told, leave = threading.Event(), os._exit

def leave_slowly(status):
    told.set()
    threading.main_thread().join(1)
    leave(status)

def meet_nobody(process):
    told.wait()
    raise ClusterError("nobody came")

failure.RING_CONNECT_GRACE_SECONDS = failure.MISTAKE_MEETING_SECONDS = 0
os._exit, process.Process.meet = leave_slowly, meet_nobody
train.main()
"""
ROWS = [*UNKNOWN, *TYPES, *MISSING, *INTERPOLATIONS, *CHOICES, *TARGETS, *RANGES, *COMMAND_LINES]


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A folder whose `run` holds the record of an earlier run."""
    record = tmp_path / "run"
    (record / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/notes"):
        (record / name).write_text(f"an earlier run's {name}")
    (record / "status.json").write_text(json.dumps({"state": "completed", **SAVED}))
    return tmp_path


@pytest.mark.parametrize(("overrides", "words"), ROWS, ids=[" ".join(row[0]) for row in ROWS])
def test_a_wrong_configuration_is_refused(earlier: Path, overrides: list[str], words: list[str]) -> None:
    before = contents(earlier)
    own = {override.partition("=")[0] for override in overrides}
    small = [
        override
        for override in SMALL
        if override.partition("=")[0] not in own and not override.startswith("model.")
    ]
    run = [] if "run.dir" in own else ["run.dir=run"]
    assert_refused(start([*small, *run, *overrides], earlier).wait(), CONFIGURATION, *words)
    assert contents(earlier) == before
    assert SAVED.items() <= status(earlier).items()


@pytest.mark.parametrize(
    ("directory", "words"),
    [
        ("n" * 300, ["run.dir", "File name too long"]),
        ("''", ["run.dir must be", "1 to 200 characters", "''"]),
        (f"new/{'n' * 201}", ["run.dir must be", "1 to 200 characters"]),
        ("file", ["run.dir", "file cannot be written", "File exists"]),
        ("file/below", ["run.dir", "cannot be written", "Not a directory"]),
        ("/proc/nowhere", ["run.dir /proc/nowhere cannot be written"]),
    ],
)
def test_a_run_directory_that_cannot_be(tmp_path: Path, directory: str, words: list[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert_refused(train(tmp_path, run=directory), CONFIGURATION, *words)
    assert contents(tmp_path) == {"file": b"kept"}


@pytest.mark.parametrize("directory", ["null", "[a]", "{a: 1}"])
def test_what_is_no_directory_becomes_none_under_a_launcher(tmp_path: Path, directory: str) -> None:
    ranks = train(tmp_path, run=directory, world_size=2)
    assert_refused(ranks, CONFIGURATION, "run.dir cannot be", agreed=True)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_nul_in_the_run_directory(tmp_path: Path) -> None:
    experiment = tmp_path / "mine/experiment/nul.yaml"
    experiment.parent.mkdir(parents=True)
    experiment.write_text('# @package _global_\nrun:\n  dir: "a\\0b"\n')
    assert_refused(
        start(["--config-dir=mine", "experiment=nul"], tmp_path).wait(), CONFIGURATION, "run.dir", "null"
    )


def test_a_mistake_that_all_ranks_see_is_told_once(tmp_path: Path) -> None:
    ranks = train(tmp_path, "trainer.steps=-1", world_size=2)
    assert_refused(ranks, CONFIGURATION, "trainer.steps must be at least 1", "got -1", agreed=True)


@pytest.mark.parametrize(
    ("override", "words"),
    [("trainer.steps=-1", "trainer.steps must be"), ("trainer.stepz=1", "unknown configuration key")],
)
def test_under_a_launcher_the_status_is_the_verdict(earlier: Path, override: str, words: str) -> None:
    """mlx.launch always exits with 0, so status.json says it; what the earlier run reached stays."""
    before = contents(earlier)
    ranks = train(earlier, override, world_size=2)
    assert ranks.statuses == [2, 2], ranks.report()
    assert before.items() <= contents(earlier).items()
    assert status(earlier)["state"] == "failed" and words in str(status(earlier)["message"])
    assert SAVED.items() <= status(earlier).items()


def rank_whose_peer_never_comes(earlier: Path, program: list[str]) -> None:
    """The rank prints its mistake once and writes it to status.json."""
    (earlier / "ring.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    launched = {"MLX_RANK": "1", "MLX_HOSTFILE": "ring.json"}
    command = [*SMALL, "run.dir=run", "trainer.stepz=1"]
    ranks = start(command, earlier, program=program, variables=[launched]).wait()
    assert_refused(ranks, CONFIGURATION, "rank 1 on ", "unknown configuration key trainer.stepz")
    assert status(earlier)["state"] == "failed" and "trainer.stepz" in str(status(earlier)["message"])
    assert SAVED.items() <= status(earlier).items()


def test_a_mistake_whose_peers_never_come_is_told_alone(earlier: Path) -> None:
    rank_whose_peer_never_comes(earlier, TRAIN)


def test_a_mistake_is_told_once_though_the_peer_fails_to_come_as_the_time_ends(earlier: Path) -> None:
    rank_whose_peer_never_comes(earlier, [sys.executable, "-c", IMPATIENT])


@pytest.mark.parametrize(("grace", "over", "called"), [(60, True, []), (0, False, ["otherwise"])])
def test_a_time_limit(monkeypatch: pytest.MonkeyPatch, grace: float, over: bool, called: list[str]) -> None:
    """What ends within the grace has the last word."""
    monkeypatch.setattr(failure, "RING_CONNECT_GRACE_SECONDS", grace)
    found: list[str] = []
    ended = threading.Event()

    def otherwise() -> None:
        found.append("otherwise")
        ended.set()

    with failure.time_limit(0, otherwise):
        assert over or ended.wait(60)
    assert found == called


def test_a_mistake_leaves_no_empty_directory(tmp_path: Path) -> None:
    assert train(tmp_path, "trainer.steps=-1", run="outputs/new").statuses == [2]
    assert train(tmp_path, "evaluation.only=true", run="outputs/typo").statuses == [5]
    assert not list(tmp_path.glob("outputs/*"))


def test_a_record_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    ranks = train(tmp_path)
    assert_refused(
        ranks, CONFIGURATION, "the run's record cannot be written", "metrics.jsonl", "another run.dir"
    )


def test_more_ranks_than_micro_batches(tmp_path: Path) -> None:
    ranks = train(tmp_path, "trainer.global_batch_size=4", world_size=2)
    words = ["2 ranks cannot share 1 micro-batch", "trainer.global_batch_size=4", "micro_batch_size=4"]
    assert_refused(ranks, CONFIGURATION, *words, agreed=True)


def test_another_number_of_ranks_than_the_configuration_asks_for(tmp_path: Path) -> None:
    ranks = train(tmp_path, "cluster.ranks=3", world_size=2)
    words = ["cluster.ranks=3", "2 ranks were launched", "mlx.launch -n 3"]
    assert_refused(ranks, CONFIGURATION, *words, agreed=True)
