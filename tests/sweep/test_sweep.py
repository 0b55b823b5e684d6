"""`python train.py -m …`: every job a run with ranks of its own, and a table of all of them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import sweeps
from ranks import SMALL, SUPPORT, TRAIN, environment, rows, start, status
from refusals import CONFIGURATION, assert_refused
from sweeps import table
from tensorboard_server import Server

from mlx_ring.config.typed_text import quoted

pytestmark = pytest.mark.ranks
EVALUATED = [*SMALL[:-1], "evaluation.every_steps=3", "communicator=exact"]


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return sweeps.sweep(folder, *EVALUATED, "hydra.sweep.dir=sweep", *overrides)


def test_each_job_is_a_whole_run(tmp_path: Path) -> None:
    done = sweep(tmp_path, "optimizer.learning_rate=1e-3,3e-3", "cluster.ranks=1,2")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    found = table(tmp_path)
    assert [row["job"] for row in found] == ["0", "1", "2", "3"]
    assert {row["state"] for row in found} == {"completed"} and {row["exit_status"] for row in found} == {"0"}
    worlds, weights = [], []
    for row in found:
        run = f"sweep/{row['job']}"
        told = status(tmp_path, run)
        worlds.append(told["world_size"])
        weights.append(told["parameters_sha256"])
        *_, last = rows(tmp_path, "evaluation", run)
        assert {key: float(row[key]) for key in ("step", "loss", "accuracy", "samples")} == {
            key: last[key] for key in ("step", "loss", "accuracy", "samples")
        }
    assert worlds == [1, 2, 1, 2]
    assert weights[0] == weights[1] != weights[2] == weights[3]
    assert "learning_rate=0.001" in found[0]["overrides"] and "cluster.ranks=2" in found[1]["overrides"]
    assert "[job 1] [rank 0] " in done.stdout and "sweep.csv" in done.stdout


def test_tensorboard_shows_all_jobs_in_one_view(tmp_path: Path) -> None:
    done = sweep(
        tmp_path, "metrics.tensorboard=true", "optimizer.learning_rate=1e-3,3e-3,1e-2", "data=digits"
    )
    assert done.returncode == 0, done
    with (tmp_path / "server.log").open("w+b") as log, Server(tmp_path / "sweep", log) as server:
        deadline = time.monotonic() + 120
        while len(groups := server.session_groups()) < 3:
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.1)
    rates = {group["hparams"]["optimizer.learning_rate"] for group in groups}
    assert rates == {0.001, 0.003, 0.01}
    shown = [{metric["name"]["tag"] for metric in group["metricValues"]} for group in groups]
    assert all({"evaluation/loss", "evaluation/accuracy"} <= each for each in shown)


def test_a_job_that_fails_ends_no_other_and_is_run_again(tmp_path: Path) -> None:
    choice = "optimizer.learning_rate=1e-3,-1,3e-3"
    done = sweep(tmp_path, choice)
    assert done.returncode == CONFIGURATION and "Traceback" not in done.stderr, done
    found = table(tmp_path)
    assert [row["state"] for row in found] == ["completed", "failed", "completed"]
    assert found[1]["exit_status"] == "2" and "optimizer.learning_rate" in found[1]["message"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "job 1 failed, status 2" in errors[0], errors
    before = [status(tmp_path, f"sweep/{number}")["updated_at"] for number in (0, 2)]
    again = sweep(tmp_path, choice)
    assert again.returncode == CONFIGURATION and "job 1 failed" in again.stderr, again
    assert [status(tmp_path, f"sweep/{number}")["updated_at"] for number in (0, 2)] == before
    assert again.stderr.count("was completed before") == 2 and again.stderr.count(" starts, ") == 1, again
    assert [row["loss"] for row in table(tmp_path)] == [row["loss"] for row in found]
    other = sweep(tmp_path, "optimizer.learning_rate=1e-3,2e-3,3e-3")
    assert other.returncode == CONFIGURATION and "choose another hydra.sweep.dir" in other.stderr, other


def test_jobs_at_once(tmp_path: Path) -> None:
    """Each job waits for a file that is written when both have come that far."""
    waits = (
        "data=custom", "data.import_path=broken_data:build", "hydra.launcher.parallel=2", "seed=1,2",
        "model=mlp",
        "data.arguments={fault: meet, rank: 0, at_call: 3}", "model.hidden_sizes=[16]",
    )  # fmt: skip
    done = sweep(tmp_path, *waits)
    assert done.returncode == 0, done
    assert [row["state"] for row in table(tmp_path)] == ["completed", "completed"]


@pytest.mark.parametrize(
    "how",
    [
        "doubled",
        "killed",
        *(pytest.param(how, marks=pytest.mark.long) for how in ("twice", "terminal closed")),
    ],
)
def test_a_sweep_that_is_stopped_goes_on(tmp_path: Path, how: str) -> None:
    pauses = (
        "data=custom", "data.import_path=broken_data:build", "data.prefetch=1", "seed=1,2",
        "data.arguments={fault: pause, rank: 0, at_call: 30}",
    )  # fmt: skip
    command = [*TRAIN, "-m", *EVALUATED, "hydra.sweep.dir=sweep", *pauses]
    told: list[str] = []

    def read_to(words: str) -> None:
        assert process.stdout is not None
        while not told or words not in told[-1]:
            told.append(process.stdout.readline())
            assert told[-1], told

    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(PYTHONPATH=str(SUPPORT)), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "reached").exists():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
            children = psutil.Process(process.pid).children(recursive=True)
            if how == "killed":
                process.kill()
                log = tmp_path / "sweep/0/logs/rank_0.log"
                while "asked to stop" not in log.read_text():
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
            else:
                process.send_signal(signal.SIGHUP if how == "terminal closed" else signal.SIGINT)
                read_to("[job 0] mlx-ring: asked to stop")
            second = {"twice": signal.SIGTERM, "doubled": signal.SIGINT, "terminal closed": signal.SIGHUP}
            if how in second:
                process.send_signal(second[how])
            if how != "twice":
                (tmp_path / "go").touch()
            told += process.communicate(timeout=90)[:1]
        finally:
            process.kill()
    assert not psutil.wait_procs(children, timeout=30)[1], told
    states = [row["state"] for row in table(tmp_path)]
    expected = dict.fromkeys(("doubled", "terminal closed"), (75, "stopped")) | {"twice": (130, "failed")}
    status_of_sweep, state = expected.get(how, (-signal.SIGKILL, "pending"))
    assert process.returncode == status_of_sweep and states == [state, "pending"], told
    if how != "twice":
        assert status(tmp_path, "sweep/0")["state"] == "stopped"
    (tmp_path / "go").touch()
    done = sweep(tmp_path, *pauses)
    assert done.returncode == 0 and {row["state"] for row in table(tmp_path)} == {"completed"}, done
    assert ("resumed" in [row["event"] for row in rows(tmp_path, "event", "sweep/0")]) == (how != "twice")


def test_secrets_stay_out_of_the_table(tmp_path: Path) -> None:
    done = sweep(
        tmp_path, "data=custom", "data.import_path=broken_data:build", "data.arguments.api_key=abc,xyzzy"
    )
    assert done.returncode == CONFIGURATION, done  # the data takes no such argument
    for path in (tmp_path / "sweep").glob("*.*"):
        assert "xyzzy" not in path.read_text(), path
    assert (tmp_path / "sweep").stat().st_mode & 0o777 == 0o700
    assert "xyzzy" not in done.stdout + done.stderr, done


def test_a_multirun_chosen_in_a_configuration(tmp_path: Path) -> None:
    """The configuration may be in the user's own folder; every job finds it there."""
    folder = tmp_path / "mine/experiment"
    folder.mkdir(parents=True)
    (folder / "search.yaml").write_text(
        "# @package _global_\nseed: 3\nhydra:\n  mode: MULTIRUN\n  sweeper:\n"
        "    params:\n      trainer.steps: 2,3\n"
    )
    command = [*TRAIN, "--config-dir", "mine", "experiment=search", *EVALUATED[1:], "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done
    assert [status(tmp_path, f"sweep/{number}")["step"] for number in (0, 1)] == [2, 3]
    assert "seed: 3" in (tmp_path / "sweep/1/config.yaml").read_text()


def test_hydras_own_launchers_are_refused(tmp_path: Path) -> None:
    done = sweep(tmp_path, "hydra/launcher=basic", "seed=1,2")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == CONFIGURATION and len(lines) == 1, done
    assert "leave hydra/launcher=mlx_ring" in lines[0]


def test_a_job_without_hosts_in_the_file(tmp_path: Path) -> None:
    """This machine has two entries: a job can take one or both, but not three."""
    hosts = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2
    (tmp_path / "two.json").write_text(json.dumps(hosts))
    done = sweep(tmp_path, "cluster.hostfile=two.json", "cluster.ranks=1,2,3")
    assert done.returncode == CONFIGURATION, done
    found = table(tmp_path)
    assert [row["state"] for row in found] == ["completed", "completed", "failed"], done
    assert found[0]["loss"] == found[1]["loss"] and status(tmp_path, "sweep/1")["world_size"] == 2
    assert "cluster.ranks=3, but host file two.json lists 2 ranks" in found[2]["message"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.dir=one", ["run.dir=one cannot be given in a multirun", "hydra.sweep.dir=FOLDER"]),
        ("hydra.run.dir=one", ["hydra.run.dir=one cannot be given"]),
        ("cluster=nccl", ["job 0: cluster.backend=nccl", "auto, ring or mpi"]),
        ("hydra.launcher.parallel=0", ["hydra.launcher.parallel must be 1 or more; got 0"]),
        ("cluster.hostfile=absent.json", ["absent.json"]),
        ("model=nonsense", ["model=nonsense", "mlp"]),
        ("optimizer.learning_rat=1", ["optimizer.learning_rat"]),
        ("hydra.launcher.nonsense=1", ["hydra.launcher.nonsense"]),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    done = sweep(tmp_path, "seed=1,2", override)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == CONFIGURATION and len(lines) == 1 and "Traceback" not in done.stderr, done
    assert all(word in lines[0] for word in words), lines
    assert not (tmp_path / "sweep/0").exists() and not (tmp_path / "one").exists()


def test_under_a_launcher_it_is_refused(tmp_path: Path) -> None:
    ranks = start(["-m", "seed=1,2"], tmp_path, world_size=2).wait()
    assert_refused(ranks, CONFIGURATION, "python train.py -m seed=1,2 cluster.ranks=2", agreed=True)


def test_a_sweep_under_way_is_not_joined(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    program = (
        "import sys, time; from pathlib import Path; from mlx_ring.run_directory.lock import ProcessLock; "
    )
    program += "lock = ProcessLock(Path('sweep/sweep.lock')); print('held', flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
            done = sweep(tmp_path, "seed=1,2")
        finally:
            holder.kill()
    assert done.returncode == CONFIGURATION and f"in use by process {holder.pid}" in done.stderr, done


@pytest.mark.parametrize(
    "value",
    [
        "plain/path",
        "a b",
        "it's",
        "comma,and=equals",
        "back\\slash",
        "end\\",
        "\\'",
        "{x}",
        "ü",
        "1e3",
        "null",
        "a ",
    ],
)
def test_quoting(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([f"run.dir={quoted(value)}"])
    assert override.value() == value
