"""What the benchmarks conclude from what they saw, and that CI runs every one of them."""

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import all_reduce
import faults
import growth
import harness
import local_ranks
import numpy as np
import peers
import pytest
import scaling

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
STEPS = np.arange(20_000.0)
NOISE = np.random.default_rng(0)


# All of them run


def run_by_ci() -> set[str]:
    """The programs of benchmarks/ that .ci/run starts, by name or in a loop over names."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").replace("\\\n", " ")
    found = set(re.findall(r"benchmarks/(\w+)\.py", script))
    for names, body in re.findall(r"for name in ([\w ]+); do\n(.*?)\ndone", script, re.DOTALL):
        if "benchmarks/$name.py" in body:
            found |= set(names.split())
    return found


def test_ci_runs_every_benchmark_that_the_documents_name() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    words = {word for path in documents for word in re.findall(r"(\w+)\.py\b", path.read_text("utf-8"))}
    named = words & set(FILES)
    assert "exact_cost" in named
    assert named - run_by_ci() == set()


def test_ci_runs_every_program_that_is_a_benchmark() -> None:
    programs = {name for name, text in FILES.items() if re.search(rf'parse\("{name}"', text)}
    assert len(programs) > 10
    assert programs - run_by_ci() == set()
    assert run_by_ci() <= set(FILES)


OF_THE_SUITE = [trial for _, _, trial in faults.FAULTS if isinstance(trial, faults.SuiteTests)]


@pytest.mark.parametrize("tests", OF_THE_SUITE, ids=lambda tests: tests.files)
def test_faults_that_are_tests_of_the_suite_are_there(tests: faults.SuiteTests) -> None:
    """Each file exists and has a test that pytest's -k selects."""
    words = tests.words.split(" or ")
    for file in tests.files.split():
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        names = [each.name for each in tree.body if isinstance(each, ast.FunctionDef)]
        assert any(word in name for name in names if name.startswith("test_") for word in words), file


# What they conclude


@pytest.mark.parametrize("planted", [0.0, 3e-3])
def test_a_slope_is_told_from_none(planted: float) -> None:
    found, half = growth.slope(STEPS, 100 + planted * STEPS + NOISE.normal(size=STEPS.size))
    assert abs(found - planted) < 2 * half and (abs(found) > half) == (planted > 0)


@pytest.mark.parametrize("leaked", [0, 40])
def test_a_leak_is_told_from_rare_jumps(leaked: int) -> None:
    """Pages of 4096 bytes: two touched at some time, and one after every 500 steps."""
    pages = 2.0 * (STEPS > 14_000) + leaked * (STEPS // 500) / 40
    found, half = growth.drift(STEPS, 4096 * pages)
    assert (found > half) == (leaked > 0)


def test_too_short_a_run_proves_nothing() -> None:
    with pytest.raises(harness.Failed, match="too fast"):
        growth.drift(STEPS[:30], STEPS[:30])


@pytest.mark.parametrize("text", ["", "0,1", "1,1", "two"])
def test_numbers_that_make_no_sense_are_refused(text: str) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--ranks", type=harness.numbers(1))
    assert parser.parse_args(["--ranks", "4,1"]).ranks == [4, 1]
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["--ranks", text])


def record(folder: Path, losses: list[float]) -> Path:
    """A finished run's: a step a second, of 8 samples each."""
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"state": "completed", "backend": "ring", "message": ""}))
    times = {"step_seconds": 1.0, "communication_seconds": 0.25, "wire_bytes": 100, "peak_memory_bytes": 5}
    rows = [
        {"kind": "train", "loss": loss, "samples": 8 * step, "wall_time": 100.0 + step} | times
        for step, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_what_a_run_showed(tmp_path: Path) -> None:
    """One low loss at the start is no target reached: the mean of five steps must be as low."""
    seen = scaling.Seen.of(record(tmp_path / "run", [1.0, 9.0, 9.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]), 2.0)
    assert (seen.samples_per_second, seen.exposed_communication, seen.seconds_to_target) == (8.0, 0.25, 8.0)


@pytest.mark.parametrize("reached", [0, 1, 2])
def test_a_target_that_was_not_always_reached_is_told(tmp_path: Path, reached: int) -> None:
    seen = [
        scaling.Seen.of(record(tmp_path / str(number), [2.0 if number < reached else 9.0] * 8), 2.0)
        for number in range(2)
    ]
    figures = dict(scaling.Turns(weak=[1.0, 0.9], strong=[1.0, 1.0], seen=seen).figures(target=True))
    assert figures.get("target_reached_share") == (None if reached == 2 else reached / 2)
    assert figures.get("seconds_to_target") == (5.0 if reached == 2 else None)


def test_a_run_that_left_no_record_is_told(tmp_path: Path) -> None:
    with pytest.raises(harness.Failed, match="no record"):
        scaling.Seen.of(tmp_path, None)


def test_ratios_are_taken_turn_by_turn() -> None:
    """A slow moment of the machine meets both ways alike."""
    times = {
        2**20: {"native": [1.1, 11.0, 110.0], "raw": [1.0, 10.0, 100.0]},
        4096: {"native": [9.0], "raw": [1.0]},
    }
    found = all_reduce.ratios("over", times, "native", "raw")
    assert found == {"over": pytest.approx(1.1), "over_1_MiB": pytest.approx(1.1)}


def test_a_peer_whose_rank_dies_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ranks, "LAST_WORDS_SECONDS", 0.1)
    program = "import os, sys; sys.exit(3) if os.environ['RANK'] == '1' else sys.stdin.read()"
    variables = [{"RANK": "0"}, {"RANK": "1"}]
    ranks = local_ranks.start_ranks(
        [sys.executable, "-c", program], variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    peer = peers.Peer("a loop", ranks)
    with pytest.raises(harness.Failed, match=r"a loop: ranks ended with statuses \[-9, 3\]"):
        peer.answers()
    peer.end()


def test_the_other_ranks_have_their_last_word(tmp_path: Path) -> None:
    """Rank 0 tells a mistake that all make, and is not always the first to end."""
    program = (
        "import os, pathlib, sys, time; rank, gone = os.environ['RANK'], pathlib.Path(sys.argv[1])\n"
        "if rank == '1': gone.touch(); sys.exit(2)\n"
        "while not gone.exists(): time.sleep(0.01)\n"
        "time.sleep(0.5); sys.exit(5)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "gone")]
    ranks = local_ranks.start_ranks(command, [{"RANK": "0"}, {"RANK": "1"}])
    with pytest.raises(harness.Failed, match=r"statuses \[5, 2\]"):
        local_ranks.end(ranks)


@pytest.mark.ranks
def test_a_mistake_in_what_peers_are_to_train_is_told() -> None:
    told = subprocess.run(
        [sys.executable, "benchmarks/peers.py", "--quick", "--ranks=1", "--override=data.sequence_length=-1"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert told.returncode == 1 and "Traceback" not in told.stderr, told.stderr
    assert "error: mlx_ring: data.sequence_length must be" in told.stderr
    assert "error: mlx_ring: ranks ended with statuses [1]" in told.stderr


@pytest.mark.parametrize(
    ("quick", "check", "seen", "status", "attempts"),
    [
        (True, True, [0.8, 0.5], 0, 1),
        (True, True, [0.5, 0.8, 0.5], 0, 2),
        (True, True, [0.5, 0.6, 0.7, 0.8], 1, 3),
        (True, False, [0.5, 0.8], 0, 1),
        (False, True, [0.5, 0.8], 1, 1),
    ],
)
def test_a_quick_check_has_attempts(
    quick: bool, check: bool, seen: list[float], status: int, attempts: int, tmp_path: Path
) -> None:
    options = argparse.Namespace(
        benchmark="any", quick=quick, check=check, output=tmp_path / "found.json", page=None
    )
    values = iter(seen)
    found = 0
    try:
        harness.run(
            options,
            lambda _: {"efficiency": next(values)},
            {"efficiency": (">=", 0.9)},
            {"efficiency": (">=", 0.75)},
            quick_attempts=3,
        )
    except SystemExit as end:
        found = end.code
    assert found == status and list(values) == seen[attempts:]
    figures = json.loads(options.output.read_text())["figures"]
    assert figures["efficiency"] == seen[attempts - 1] and figures.get("attempts", 1) == attempts


def test_notes_are_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(
        benchmark="any", quick=True, check=True, output=tmp_path / "found.json", page=None
    )
    harness.run(
        options, lambda _: {"ratio": 1.2}, {"ratio": ("<=", 1.0)}, {"ratio": ("<=", 1.5)}, notes=["A."]
    )
    result = json.loads(options.output.read_text())
    assert {"benchmark", "figures", "goals", "environment"} <= set(result)
    assert result["goals"] == {"ratio": ["<=", 1.5]}
    assert result["notes"][0] == "A." and "looser" in result["notes"][1]
    assert "looser" in capsys.readouterr().out
