"""What a run does when a rank dies, a batch is not finite, a signal comes, or the disk is full."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from ranks import ROOT, SMALL, SUPPORT, TRAIN, Rank, Ranks, mpirun, rows, start, status, wait_for
from refusals import CONFIGURATION, assert_refused

pytestmark = pytest.mark.ranks
FAULTY = [
    *SMALL,
    "run.dir=run",
    "data=custom",
    "data.import_path=broken_data:build",
    "trainer.steps=400",
    "data.prefetch=1",
]


@pytest.fixture(autouse=True)
def faulty_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{SUPPORT}")


def faulty(folder: Path, world_size: int, **arguments: object) -> Ranks:
    given = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return start([*FAULTY, f"data.arguments={{{given}}}"], folder, world_size=world_size)


@pytest.mark.parametrize("fault", ["raise", "kill"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_lost_rank_ends_all(tmp_path: Path, fault: str, world_size: int) -> None:
    ranks = faulty(tmp_path, world_size, fault=fault, rank=1, at_call=20).wait(60)
    assert ranks.statuses[1] == (1 if fault == "raise" else -signal.SIGKILL), ranks.report()
    others = [rank for number, rank in enumerate(ranks.members) if number != 1]
    assert all(rank.status == 3 for rank in others), ranks.report()
    assert all("lost a peer" in rank.stderr and "Traceback" not in rank.stderr for rank in others), (
        ranks.report()
    )
    final = status(tmp_path)
    assert final["state"] == "failed"
    assert [row["event"] for row in rows(tmp_path, "event")] == ["peer_lost"]
    if fault == "raise":  # the rank that failed could still write: its own words are the verdict
        assert "the disk caught fire" in str(final["message"])
        assert "the disk caught fire" in (tmp_path / "run/logs/rank_1.log").read_text()
    else:
        assert "lost a peer" in str(final["message"])


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_launchers_sigterm_takes_no_status(tmp_path: Path, fault: str) -> None:
    """mlx.launch sends SIGTERM to the others as soon as one rank has ended: they still tell how it ended."""
    killed = fault == "kill"
    command = [*FAULTY, "trainer.steps=100000"]
    given = "{fault: kill, rank: 1, at_call: 20}" if killed else "{fault: tell, rank: 0, at_call: 40}"
    ranks = start([*command, f"data.arguments={given}"], tmp_path, world_size=2)
    first, other = ranks.members[::-1]
    if not killed:
        wait_for(tmp_path / "reached", ranks)
        first.process.send_signal(signal.SIGTERM)
    first.process.wait(60)
    other.process.send_signal(signal.SIGTERM)
    ranks.wait(60)
    assert other.status == (3 if killed else 75), ranks.report()
    assert status(tmp_path)["state"] == ("failed" if killed else "stopped")


def test_a_failed_rank_0_leaves_a_true_status(tmp_path: Path) -> None:
    ranks = faulty(tmp_path, 2, fault="kill", rank=0, at_call=20).wait(60)
    assert ranks.statuses == [-signal.SIGKILL, 3], ranks.report()
    assert status(tmp_path)["state"] == "failed"


def test_an_exception_under_mpi_ends_the_job(tmp_path: Path) -> None:
    ranks = mpirun(2, [*FAULTY, "data.arguments={fault: raise, rank: 1, at_call: 20}"], tmp_path)
    assert ranks.statuses != [0], ranks.report()
    assert "the disk caught fire" in ranks.report()
    assert status(tmp_path)["state"] == "failed" and "the disk caught fire" in str(
        status(tmp_path)["message"]
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_non_finite_batch_is_skipped_everywhere(tmp_path: Path, world_size: int) -> None:
    """Only rank 1 sees the NaN; all ranks skip, and the next batches train on."""
    rank = world_size - 1
    given = f"data.arguments={{fault: not_finite, rank: {rank}, at_call: 10}}"
    start([*FAULTY, given, "trainer.steps=8"], tmp_path, world_size=world_size).wait().ok()
    skipped = rows(tmp_path, "event")
    assert [row["event"] for row in skipped] == ["nonfinite_skipped"]
    train = rows(tmp_path, "train")
    assert [row["step"] for row in train] == list(range(1, 9))
    assert train[-1]["samples"] == 9 * 32  # one global batch was consumed without an update
    assert all(isinstance(row["loss"], float) for row in train)
    manifest = json.loads((tmp_path / "run/checkpoints/step_00000008/manifest.json").read_text())
    assert manifest["progress"]["skipped"] == 1


def test_a_batch_without_targets_makes_no_update(tmp_path: Path) -> None:
    faulty(tmp_path, 1, fault="unlabelled", rank=0, at_call=9, repeats=8).wait().ok()
    messages = {row["message"] for row in rows(tmp_path, "event")}
    assert messages == {"no target to learn from: no update"}


def test_too_many_non_finite_batches_stop_the_run(tmp_path: Path) -> None:
    ranks = faulty(tmp_path, 2, fault="not_finite", rank=1, at_call=10, repeats=10_000).wait()
    assert ranks.statuses == [4, 4], ranks.report()
    assert len(ranks.errors) == 1 and "trainer.max_skipped_batches=10" in ranks.errors[0], ranks.report()
    assert status(tmp_path)["state"] == "failed"
    assert len(rows(tmp_path, "event")) == 10


@pytest.mark.parametrize(("world_size", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_and_exits_75(tmp_path: Path, world_size: int, number: signal.Signals) -> None:
    """It reaches one rank alone, twice; all stop at the same step, and the run can be continued."""
    command = [*FAULTY, "data.arguments={fault: pause, rank: 0, at_call: 40}", "trainer.steps=100000"]
    ranks = start(command, tmp_path, world_size=world_size)
    wait_for(tmp_path / "reached", ranks)
    ranks.members[-1].process.send_signal(number)
    log = tmp_path / f"run/logs/rank_{world_size - 1}.log"
    while "asked to stop" not in log.read_text():
        time.sleep(0.01)
    ranks.members[-1].process.send_signal(number)
    (tmp_path / "go").touch()
    ranks.wait()
    assert ranks.statuses == [75] * world_size, ranks.report()
    final = status(tmp_path)
    assert final["state"] == "stopped"
    step = final["step"]
    assert (tmp_path / f"run/checkpoints/step_{step:08d}/manifest.json").exists()
    calm = ["data.arguments={fault: pause, rank: 0, at_call: 40}", f"trainer.steps={step + 3}"]
    start([*FAULTY, *calm], tmp_path, world_size=world_size).wait().ok()
    assert rows(tmp_path, "train")[-1]["step"] == step + 3


def test_a_closed_terminal_saves_and_exits_75(tmp_path: Path) -> None:
    """The terminal's end is a SIGHUP, here and often from the shell too, and no more standard output."""
    ours, theirs = os.openpty()
    command = [*FAULTY, "data.arguments={fault: tell, rank: 0, at_call: 40}", "trainer.steps=100000"]
    process = subprocess.Popen(
        [*TRAIN, *command],
        cwd=tmp_path,
        env=os.environ | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: (
            fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            signal.signal(signal.SIGHUP, signal.SIG_DFL),
        ),
    )
    try:
        os.close(theirs)
        wait_for(tmp_path / "reached", Ranks([Rank(process)]))
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 75
    finally:
        process.kill()
    assert status(tmp_path)["state"] == "stopped"
    assert (tmp_path / f"run/checkpoints/step_{status(tmp_path)['step']:08d}/manifest.json").exists()


def test_a_stop_and_the_same_command_again_are_no_stop(tmp_path: Path, world_size: int = 2) -> None:
    """A real signal in the middle of training with dropout: not one bit of the final weights is another."""
    pause = f"data.arguments={{fault: pause, rank: 0, at_call: {160 // world_size}}}"
    command = [*FAULTY, pause, "model.dropout=0.3", "checkpoint.every_steps=null"]
    ranks = start(command, tmp_path, world_size=world_size)
    wait_for(tmp_path / "reached", ranks)
    ranks.members[-1].process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    ranks.wait()
    assert ranks.statuses == [75] * world_size and 10 < int(str(status(tmp_path)["step"])) < 400
    start(command, tmp_path, world_size=world_size).wait().ok()
    start([*command, "run.dir=whole"], tmp_path, world_size=world_size).wait().ok()
    ends = [status(tmp_path, run)["parameters_sha256"] for run in ("run", "whole")]
    assert ends[0] == ends[1]
    losses = [[row["loss"] for row in rows(tmp_path, "train", run)] for run in ("run", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step(tmp_path: Path, number: signal.Signals) -> None:
    """While the data is being prepared: nothing to save, one line, a true status."""
    command = [*FAULTY, "data.import_path=broken_data:slow", "data.arguments=null"]
    ranks = start(command, tmp_path)
    wait_for(tmp_path / "reached", ranks)
    ranks.members[0].process.send_signal(number)
    ranks.wait()
    assert ranks.statuses == [130] and len(ranks.errors) == 1 and "Traceback" not in ranks.report()
    assert status(tmp_path)["state"] == "failed" and "before the first step" in str(
        status(tmp_path)["message"]
    )


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_a_killed_peer_with_several_buckets(tmp_path: Path, overlap: str) -> None:
    options = [
        f"communicator.overlap={overlap}",
        "communicator.bucket_bytes=4096",
        "model.hidden_sizes=[64,64]",
    ]
    given = "data.arguments={fault: kill, rank: 1, at_call: 20}"
    ranks = start([*FAULTY, given, *options], tmp_path, world_size=3).wait(60)
    assert ranks.statuses == [3, -signal.SIGKILL, 3], ranks.report()
    assert "Traceback" not in ranks.report() and status(tmp_path)["state"] == "failed"


def test_a_full_disk_costs_no_run_at_once(tmp_path: Path) -> None:
    """A checkpoint that cannot be written is an event; too many in a row end the run with status 5."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    program = [sys.executable, "-c", NO_SPACE]
    every = "checkpoint.every_steps=1"
    ranks = start([*SMALL, "run.dir=run", every], tmp_path, program=program).wait()
    assert ranks.statuses == [5], ranks.report()
    failed = [row for row in rows(tmp_path, "event") if row["event"] == "checkpoint_failed"]
    assert len(failed) == 3 and "free" in str(failed[0]["message"])
    assert status(tmp_path)["state"] == "failed"
    assert "could not be written" in ranks.errors[0]


NO_SPACE = """
import shutil, sys
from collections import namedtuple
shutil.disk_usage = lambda path: namedtuple("usage", "total used free")(10**9, 10**9, 1000)
from mlx_ring.train import main
main()
"""


ODD_REPLICA = """
import dataclasses, os
from mlx_ring.training.strategies.all_reduce import AllReduce

update, updates = AllReduce.update, []

def odd_update(self, reduced):
    updates.append(reduced)
    if os.environ["MLX_RANK"] == "1" and len(updates) == 2:
        reduced = dataclasses.replace(reduced, scale=reduced.scale * 1.5)
    update(self, reduced)

AllReduce.update = odd_update
from mlx_ring.train import main
main()
"""


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        (["checkpoint.every_steps=1"], ["step_00000001"]),
        (["communicator.verify_every_steps=2"], []),
        (["communicator=exact", "communicator.verify_every_steps=1"], []),
    ],
)
def test_replicas_that_differ_stop_the_run(tmp_path: Path, options: list[str], saved: list[str]) -> None:
    """One rank makes another update of its own: found before it is evaluated or saved, or when asked for, and
    named."""
    program = [sys.executable, "-c", ODD_REPLICA]
    command = [*SMALL, "run.dir=run", *options]
    ranks = start(command, tmp_path, world_size=3, program=program).wait()
    assert ranks.statuses == [4, 4, 4] and len(ranks.errors) == 1, ranks.report()
    for words in ("replicas differ after step 2", "head.bias has checksum", " on rank 1 (", " on rank 0 ("):
        assert words in ranks.errors[0], ranks.errors
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["step"] == 2
    found = [path.name for path in (tmp_path / "run").glob("checkpoints/*")]
    assert found == saved  # none of what differed


def test_without_checkpoints_there_is_no_digest(tmp_path: Path) -> None:
    """Somebody deleted them: the digest of what is no more must not stay in the status."""
    faulty(tmp_path, 1, fault="tell", rank=0, at_call=1).wait().ok()
    assert status(tmp_path)["parameters_sha256"]
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert faulty(tmp_path, 1, fault="raise", rank=0, at_call=2).wait().statuses == [1]
    assert status(tmp_path)["state"] == "failed" and status(tmp_path)["parameters_sha256"] is None


def test_a_rank_that_cannot_keep_its_log_names_itself(tmp_path: Path) -> None:
    (tmp_path / "run/logs/rank_1.log").mkdir(parents=True)
    ranks = start([*SMALL, "run.dir=run"], tmp_path, world_size=2).wait()
    assert_refused(ranks, CONFIGURATION, "rank 1 on ", "run.dir", "cannot be written", agreed=True)
    assert "rank 1 on " in str(status(tmp_path)["message"])


def test_a_program_that_dies_before_the_first_step_says_so(tmp_path: Path) -> None:
    ranks = start([*SMALL, "run.dir=run", "model.hidden_sizes=[0]"], tmp_path, world_size=2).wait()
    assert ranks.statuses == [2, 2], ranks.report()
