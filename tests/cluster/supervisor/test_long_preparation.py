"""A preparation that takes longer than the limit goes on as long as it is at work; a dead one is named."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT, SMALL, SUPPORT, TIMEOUT_SECONDS, environment, status

pytestmark = pytest.mark.ranks
LIMIT_SECONDS = 4
LONG_SECONDS = 11
# `mlx-ring` with another limit.
PROGRAM = f"""
from mlx_ring.cli import main
from mlx_ring.cluster.supervisor import watch
watch.START_SECONDS = {LIMIT_SECONDS}
main()
"""
OWN_DATA = (*SMALL, "run.dir=run", "data=custom", "data.import_path=broken_data:long")


def supervised(folder: Path, ranks: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    options = ["-n", str(ranks), "--deadline", str(LIMIT_SECONDS), "--max-restarts", "0"]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "run", *options, "--", *overrides],
        cwd=folder,
        env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{SUPPORT}"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def long(how: str, rank: int, seconds: float = LONG_SECONDS) -> str:
    return f"data.arguments={json.dumps({'how': how, 'rank': rank, 'seconds': seconds})}".replace('"', "")


@pytest.mark.parametrize(
    ("how", "rank", "ranks", "told"),
    [
        ("works", 1, 2, r"waiting for the other ranks \(all_gather\)"),
        ("reports", 0, 2, r"opening the data \(broken_data:long\), \d+ of 100 shards"),
        ("child works", 0, 1, r"opening the data \(broken_data:long\), for \d s"),
        pytest.param("reads", 1, 2, "waiting", marks=pytest.mark.skipif(sys.platform == "darwin", reason="")),
    ],
)
def test_a_long_preparation_goes_on(tmp_path: Path, how: str, rank: int, ranks: int, told: str) -> None:
    run = supervised(tmp_path, ranks, *OWN_DATA, long(how, rank))
    assert run.returncode == 0, (run.stdout, run.stderr)
    assert "no progress" not in run.stderr
    lines = re.findall(r"^\[rank 0\] preparing: (.*)$", run.stdout, re.MULTILINE)
    assert lines and len(lines) <= 2 and re.match(told, lines[0]), run.stdout
    assert (status(tmp_path)["state"], status(tmp_path)["message"]) == ("completed", "")


@pytest.mark.parametrize(
    ("rank", "ranks", "why"),
    [(1, 2, r"never entered collective \d+"), (0, 1, "does nothing")],
)
def test_a_dead_preparation_is_named_and_ended(tmp_path: Path, rank: int, ranks: int, why: str) -> None:
    run = supervised(tmp_path, ranks, *OWN_DATA, long("sleeps", rank, 1000))
    assert run.returncode == 3, (run.stdout, run.stderr)
    told = rf"no progress for [4-7] s: rank {rank} on \S+ {why}: it is still at opening the data"
    assert re.search(told, run.stderr), run.stderr
    assert "in long" in run.stderr  # its stack
    assert status(tmp_path)["state"] == "failed"
