"""Every way to start a run, with the real launchers, from the checkout."""

import stat
import sys
from pathlib import Path

import pytest
from ranks import ROOT, TRAIN, command, launch, mpirun, ring_ports, rows, start, status
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.ranks

# The default experiment, shortened.
SHORT = ("trainer.steps=60", "evaluation.every_steps=60", "checkpoint.every_steps=60")
RECORD = {
    "config.yaml",
    "status.json",
    "metrics.jsonl",
    "digests.jsonl",
    "tensorboard",
    "checkpoints",
    "logs",
    ".hydra",
    "run.lock",
}


def check_run(run: Path, world_size: int, backend: str, report: str) -> float:
    """The contract's files, complete. Returns the held-out accuracy."""
    found = status(run.parent, run.name)
    assert (found["state"], found["step"]) == ("completed", 60), report
    assert (found["world_size"], found["backend"]) == (world_size, backend), report
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert {path.name for path in run.iterdir()} == RECORD
    assert {path.name for path in (run / "logs").iterdir()} == {
        f"rank_{rank}.log" for rank in range(world_size)
    }
    assert "trainer:\n  steps: 60\n" in (run / "config.yaml").read_text()
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name == "step_00000060"
    assert {path.name for path in checkpoint.iterdir()} >= {
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
    }
    assert [row["step"] for row in rows(run.parent, "train", run.name)] == [1, 10, 20, 30, 40, 50, 60]
    assert EventAccumulator(str(run / "tensorboard")).Reload().Tags()["tensors"]
    (evaluation,) = rows(run.parent, "evaluation", run.name)
    assert isinstance(evaluation["accuracy"], float)
    return evaluation["accuracy"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The accuracy of `python train.py …`."""
    run = tmp_path_factory.mktemp("alone") / "run"
    ranks = start([*SHORT, f"run.dir={run}"], ROOT).wait().ok()
    return check_run(run, 1, "single", ranks.report())


def test_python_train(alone: float) -> None:
    assert alone > 0.85


@pytest.mark.parametrize(
    ("way", "world_size", "backend"),
    [("-n 2", 2, "ring"), ("-n 1", 1, "single"), ("--hostfile hostfiles/lab.json", 2, "ring")],
)
def test_mlx_launch(alone: float, tmp_path: Path, way: str, world_size: int, backend: str) -> None:
    run = tmp_path / "run"
    ranks = launch(
        [*way.split(), ring_ports(world_size), "train.py", *SHORT, f"run.dir={run}"], tmp_path, ROOT
    )
    accuracy = check_run(run, world_size, backend, ranks.report())
    assert accuracy == pytest.approx(alone, abs=0.006)  # two of the 355 held-out samples


def test_the_very_command_of_the_readme(alone: float, tmp_path: Path) -> None:
    """With mlx.launch's own ports, and nothing between `-n 2` and `train.py`."""
    run = tmp_path / "run"
    ranks = launch(["-n", "2", "train.py", *SHORT, f"run.dir={run}"], tmp_path, ROOT)
    assert check_run(run, 2, "ring", ranks.report()) == pytest.approx(alone, abs=0.006)


def test_mpirun(alone: float, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = mpirun(2, [*SHORT, f"run.dir={run}"], ROOT).ok()
    assert check_run(run, 2, "mpi", ranks.report()) == pytest.approx(alone, abs=0.006)


def test_the_default_directory_is_one_for_all_ranks(tmp_path: Path) -> None:
    mpirun(2, [*SHORT, "trainer.steps=1", "schedule=constant"], tmp_path).ok()
    (run,) = (tmp_path / "outputs").iterdir()
    assert {path.name for path in (run / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}


@pytest.mark.parametrize("look", [["--help"], ["--cfg", "job"], ["--info", "config"]], ids=" ".join)
def test_a_look_at_the_configuration_touches_no_cluster(tmp_path: Path, look: list[str]) -> None:
    """One of two ranks alone: joining the ring would wait for the other."""
    program = [sys.executable, "-X", "importtime", *TRAIN[1:]]
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    folder = tmp_path / "empty"
    folder.mkdir()
    launched = {"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)}
    ranks = start(look, folder, program=program, variables=[launched]).wait(60).ok()
    assert "trainer" in ranks.members[0].stdout
    assert not [
        line for line in ranks.members[0].stderr.splitlines() if line.endswith(("| mlx", " mlx.core"))
    ]
    assert list(folder.iterdir()) == []


def test_a_look_through_the_launcher(tmp_path: Path) -> None:
    """`--` keeps mlx.launch from taking the script's options for its own."""
    before = set((ROOT / "outputs").glob("*"))
    ranks = launch(["-n", "2", "--", "train.py", "--help"], tmp_path, ROOT)
    assert ranks.members[0].stdout.count("== Configuration groups ==") == 2, ranks.report()
    assert set((ROOT / "outputs").glob("*")) == before


def test_version_is_printed(tmp_path: Path) -> None:
    assert "mlx-ring, version" in command(["mlx-ring", "--version"], tmp_path).ok().members[0].stdout
