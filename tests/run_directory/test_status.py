import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_ring.run_directory import status as run_status
from mlx_ring.run_directory.status import RunStatus

REPOSITORY = Path(__file__).parents[2]
FIELDS = [
    "state",
    "step",
    "world_size",
    "backend",
    "device",
    "hosts",
    "parameters_sha256",
    "message",
    "updated_at",
    "job",
]


def start_job(directory, job="job-1", **reached):
    group = {"world_size": 2, "backend": "ring", "device": "cpu", "hosts": ["a", "b"]}
    return RunStatus(directory, job=job, **group, reached=reached)


def start(program, *arguments, **options):
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, **options)


def test_the_file_has_the_contracts_fields(tmp_path):
    before = time.time()
    start_job(tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert list(status) == FIELDS
    assert before <= status.pop("updated_at") <= time.time()
    assert status == {
        "state": "starting",
        "step": 0,
        "world_size": 2,
        "backend": "ring",
        "device": "cpu",
        "hosts": ["a", "b"],
        "parameters_sha256": None,
        "message": "",
        "job": "job-1",
    }


def test_what_was_reached_before_stays_until_it_is_forgotten(tmp_path):
    start_job(tmp_path).update("completed", step=50, parameters_sha256="ab")
    status = RunStatus(
        tmp_path, job="job-2", world_size=2, backend="ring", device="cpu", hosts=["a", "b"], reached=None
    )
    found = RunStatus.read(tmp_path)
    assert [found[key] for key in ("state", "step", "parameters_sha256", "job")] == [
        "starting",
        50,
        "ab",
        "job-2",
    ]
    assert status.before["state"] == "completed"
    status.forget()
    found = RunStatus.read(tmp_path)
    assert [found[key] for key in ("state", "step", "parameters_sha256")] == ["starting", 0, None]


def test_an_update_changes_what_is_given_only(tmp_path):
    status = start_job(tmp_path)
    first = RunStatus.read(tmp_path)
    status.update("running", step=100, parameters_sha256="ab", message="half way")
    second = RunStatus.read(tmp_path)
    status.update("completed", step=200)
    third = RunStatus.read(tmp_path)
    changed = {"state": "running", "step": 100, "parameters_sha256": "ab", "message": "half way"}
    assert second == first | changed | {"updated_at": second["updated_at"]}
    assert third == second | {"state": "completed", "step": 200, "updated_at": third["updated_at"]}
    assert first["updated_at"] <= second["updated_at"] <= third["updated_at"]
    assert list(third) == FIELDS
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"state": "runn', b"\xff\xfe", b"[1]"])
def test_what_is_no_status_reads_as_none(tmp_path, content):
    if content is not None:
        (tmp_path / "status.json").write_bytes(content)
    assert RunStatus.read(tmp_path) is None
    assert RunStatus.mark_failed(tmp_path, job="job-1", message="lost") is False


@pytest.mark.parametrize(
    ("state", "marked"),
    [("starting", True), ("running", True), ("completed", False), ("stopped", False), ("failed", False)],
)
def test_only_a_job_under_way_is_marked_failed(tmp_path, state, marked):
    start_job(tmp_path).update(state, step=7, message="its own words")
    before = RunStatus.read(tmp_path)
    assert RunStatus.mark_failed(tmp_path, job="another", message="lost") is False
    assert RunStatus.read(tmp_path) == before
    assert RunStatus.mark_failed(tmp_path, job="job-1", message="rank 1: \udcff lost") is marked
    after = RunStatus.read(tmp_path)
    if marked:
        changed = {"state": "failed", "message": "rank 1: \udcff lost", "updated_at": after["updated_at"]}
        assert after == before | changed
        assert list(after) == FIELDS
    else:
        assert after == before


def test_no_update_hides_a_failure_of_the_same_job(tmp_path):
    status = start_job(tmp_path)
    status.update("running", step=10)
    assert RunStatus.mark_failed(tmp_path, job="job-1", message="rank 1: loss is NaN")
    status.update(step=11, parameters_sha256="cd")
    status.update("failed", message="rank 0: a peer was lost")
    status.update("completed")
    shown = RunStatus.read(tmp_path)
    assert (shown["state"], shown["message"]) == ("failed", "rank 1: loss is NaN")
    assert (shown["step"], shown["parameters_sha256"]) == (11, "cd")


def test_the_next_job_starts_from_its_own_checkpoint(tmp_path):
    start_job(tmp_path).update("running", step=50, parameters_sha256="ab")
    assert RunStatus.mark_failed(tmp_path, job="job-1", message="lost")
    (tmp_path / ".status.json.k1ll3d").write_text('{"state": ')
    start_job(tmp_path, "job-2", step=40, parameters_sha256="cd")
    shown = RunStatus.read(tmp_path)
    assert (shown["state"], shown["message"], shown["job"]) == ("starting", "", "job-2")
    assert (shown["step"], shown["parameters_sha256"]) == (40, "cd")
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]
    assert RunStatus.mark_failed(tmp_path, job="job-1", message="too late") is False


def test_a_refusal_keeps_what_was_reached(tmp_path):
    for reached in ((0, None), (50, "ab")):
        if reached[0]:
            start_job(tmp_path).update("completed", step=50, parameters_sha256="ab")
        RunStatus.record_refusal(tmp_path, world_size=3, backend="mpi", hosts=["c"], message="a mistake")
        shown = RunStatus.read(tmp_path)
        assert list(shown) == FIELDS
        assert (shown["state"], shown["message"], shown["world_size"]) == ("failed", "a mistake", 3)
        assert (shown["step"], shown["parameters_sha256"]) == reached


def test_of_many_failures_at_once_one_is_recorded(tmp_path):
    """Six ranks die together while rank 0 goes on writing; a reader meets a whole file every time."""
    program = """
import sys
from pathlib import Path
from mlx_ring.run_directory.status import RunStatus
print("ready", flush=True)
sys.stdin.read()  # all go when the pipe is closed
wrote = RunStatus.mark_failed(Path(sys.argv[1]), job="job-1", message=f"rank {sys.argv[2]}")
print(wrote)
"""
    status = start_job(tmp_path)
    status.update("running")
    read_end, write_end = os.pipe()
    ranks = [start(program, tmp_path, rank, stdin=read_end) for rank in range(1, 7)]
    os.close(read_end)
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    os.close(write_end)
    step = 0
    while any(rank.poll() is None for rank in ranks):
        step += 1
        status.update(step=step)
        assert list(RunStatus.read(tmp_path)) == FIELDS
    wrote = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert sorted(wrote) == ["False\n"] * 5 + ["True\n"]
    shown = RunStatus.read(tmp_path)
    assert (shown["state"], shown["message"]) == ("failed", f"rank {wrote.index('True' + chr(10)) + 1}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    program = """
import itertools, sys
from pathlib import Path
from mlx_ring.run_directory.status import RunStatus
status = RunStatus(Path(sys.argv[1]), job="job-1", world_size=1, backend="single", device="cpu", hosts=["a"])
for step in itertools.count(1):
    status.update("running", step=step)
    print(step, flush=True)
"""
    with start(program, tmp_path) as process:
        for _ in range(20):
            process.stdout.readline()
        process.kill()
    assert list(RunStatus.read(tmp_path)) == FIELDS
    assert RunStatus.read(tmp_path)["step"] >= 20
    assert RunStatus.mark_failed(tmp_path, job="job-1", message="killed") is True  # its lock died with it


def test_a_full_disk_is_raised_by_an_update_and_swallowed_by_mark_failed(tmp_path):
    start_job(tmp_path).update("running", step=3)
    before = RunStatus.read(tmp_path)
    program = """
import resource, sys
from pathlib import Path
from mlx_ring.run_directory.status import RunStatus
directory = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
print(RunStatus.mark_failed(directory, job="job-1", message="lost"))
try:
    RunStatus(directory, job="job-2", world_size=1, backend="single", device="cpu", hosts=["a"])
except OSError as error:
    print(error.strerror)
"""
    with start(program, tmp_path) as process:
        assert process.communicate(timeout=60)[0] == "False\nFile too large\n"
    assert RunStatus.read(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_host_without_the_run_directory_gets_none(tmp_path):
    assert RunStatus.mark_failed(tmp_path / "elsewhere", job="job-1", message="lost") is False
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_lock_holder_delays_a_dying_rank_but_does_not_hold_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_status, "LOCK_SECONDS", 0.1)
    start_job(tmp_path)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    started = time.monotonic()
    assert RunStatus.mark_failed(tmp_path, job="job-1", message="lost") is True
    assert time.monotonic() - started >= 0.1
    os.close(holder)


def test_mlx_is_not_loaded():
    with start("import sys, mlx_ring.run_directory.status; print('mlx' in sys.modules)") as process:
        assert process.communicate(timeout=60)[0] == "False\n"
