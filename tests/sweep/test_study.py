"""`hydra/sweeper=optuna`: one study, whose trials are runs."""

import json
import subprocess
from pathlib import Path

import pytest
from ranks import SMALL
from sweeps import sweep, table

pytest.importorskip("optuna")
pytestmark = pytest.mark.ranks
OPTUNA = (
    *SMALL[1:-1], "evaluation.every_steps=3", "trainer.steps=6", "communicator=exact",
    "hydra.sweep.dir=sweep", "hydra/sweeper=optuna", "hydra.sweeper.seed=1",
)  # fmt: skip
WHOLE = "hydra.sweeper.prune=false"
SPACE = ("optimizer.learning_rate=tag(log,interval(1e-4,1e-1))", "model.hidden_sizes=choice([8],[16])")


def study(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return sweep(folder, *OPTUNA, *overrides)


def test_ten_trials_of_which_the_best_is_told_and_more_follow(tmp_path: Path) -> None:
    done = study(tmp_path, *SPACE, "hydra.sweeper.n_trials=10", "hydra.launcher.parallel=2", WHOLE)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done
    found = table(tmp_path)
    assert {row["state"] for row in found} == {"completed"} and len(found) == 10
    assert len({row["overrides"] for row in found}) == 10
    best = min(found, key=lambda row: float(row["loss"]))
    told = json.loads((tmp_path / "sweep/study.json").read_text())
    assert told["job"] == int(best["job"]) and told["loss"] == float(best["loss"])
    assert f"best: job {best['job']} of 10, loss " in done.stdout
    more = study(tmp_path, *SPACE, "hydra.sweeper.n_trials=11", WHOLE)
    assert more.returncode == 0 and more.stderr.count(" starts, ") == 1, more
    assert table(tmp_path)[:10] == found and len(table(tmp_path)) == 11


def test_what_is_worse_than_the_others_is_ended_early(tmp_path: Path) -> None:
    """A batch takes 50 ms and every tenth step is evaluated, so that there is time to end a job."""
    slow = (
        "data=custom", "data.import_path=broken_data:build", "data.prefetch=1", "trainer.steps=80",
        "data.arguments={fault: slow, rank: 0, at_call: 1, repeats: 1000}", "trainer.micro_batch_size=32",
        "evaluation.every_steps=10", "schedule=constant", "optimizer.learning_rate=1e-2,1e-9",
        "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler=random", "hydra.sweeper.prune_after_trials=1",
        "hydra.sweeper.seed=10",
    )  # fmt: skip
    done = study(tmp_path, *slow)
    assert done.returncode == 0, done
    learns, does_not = table(tmp_path)  # in the order that the seed gives
    assert learns["overrides"].endswith("learning_rate=0.01") and learns["state"] == "completed"
    assert does_not["overrides"].endswith("learning_rate=1e-09")
    assert (does_not["state"], does_not["exit_status"]) == ("pruned", "75"), done
    assert 10 <= int(does_not["step"]) < 80
    again = study(tmp_path, *slow)
    assert again.returncode == 0 and " starts, " not in again.stderr, again


def test_its_directory_is_the_sweeps_own(tmp_path: Path) -> None:
    own = [item for item in OPTUNA if not item.startswith("hydra.sweep.dir")]
    done = sweep(tmp_path, *own, *SPACE, "hydra.sweeper.n_trials=1")
    assert done.returncode == 0, done
    (directory,) = (tmp_path / "multirun").iterdir()
    assert {"study.json", "study.journal", "sweep.csv", "0"} <= {path.name for path in directory.iterdir()}


def test_all_trials_fail(tmp_path: Path) -> None:
    """The status is the first failed job's, also when the same command finds all of them ended."""
    huge = ("optimizer=sgd", "optimizer.learning_rate=interval(1e20,1e30)", "trainer.clip_gradient_norm=null")
    for starts in (2, 0):
        done = study(tmp_path, *huge, "trainer.max_skipped_batches=1", "hydra.sweeper.n_trials=2", WHOLE)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == 4 and len(lines) == 1 and "Traceback" not in done.stderr, done
        assert "all 2 jobs failed; job 0 failed, status 4: " in lines[0], lines
        assert done.stderr.count(" starts, ") == starts
    assert {row["exit_status"] for row in table(tmp_path)} == {"4"}
    assert not (tmp_path / "sweep/study.json").exists()


def test_a_failed_trial_beside_a_good_one(tmp_path: Path) -> None:
    """The best is told, and the status is the failed job's at every start."""
    rates = ("optimizer.learning_rate=1e-3,-1", "hydra.sweeper.sampler=random", "hydra.sweeper.n_trials=4")
    for _ in range(2):
        done = study(tmp_path, *rates, WHOLE)
        states = [row["state"] for row in table(tmp_path)]
        assert set(states) == {"completed", "failed"}, states
        assert done.returncode == 2 and f"job {states.index('failed')} failed, status 2" in done.stderr, done
        assert "best: job " in done.stdout


def test_no_trial_has_the_metric(tmp_path: Path) -> None:
    done = study(
        tmp_path, "seed=1", "trainer.steps=5,6", "hydra.sweeper.n_trials=1", "hydra.sweeper.metric=perplexity"
    )
    assert done.returncode == 2 and "no job's last evaluation has perplexity" in done.stderr, done


def test_what_cannot_be_drawn_from(tmp_path: Path) -> None:
    for words, overrides in (
        ("nothing varies", ()),
        ("hydra.sweeper.metric must be one of loss, accuracy", ("hydra.sweeper.metric=speed", "seed=1,2")),
        ("cannot be drawn from", ("optimizer.learning_rate=tag(log,interval(0,1))",)),
    ):
        done = study(tmp_path, *overrides)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done
