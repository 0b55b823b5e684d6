"""A preparation that takes longer than the limit goes on as long as it is at work; a dead one is named."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ROOT, SMALL, SUPPORT, TIMEOUT_SECONDS, environment, status

pytestmark = pytest.mark.ranks
ONLY_LINUX = [pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which bytes are read")]
LIMIT_SECONDS = 6
LONG_SECONDS = 13
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
        ("child works", 0, 1, r"opening the data \(broken_data:long\), for \d+ s"),
        pytest.param("reads", 1, 2, "waiting", marks=[pytest.mark.long, *ONLY_LINUX]),
    ],
)
def test_a_long_preparation_goes_on(tmp_path: Path, how: str, rank: int, ranks: int, told: str) -> None:
    run = supervised(tmp_path, ranks, *OWN_DATA, long(how, rank))
    assert run.returncode == 0, (run.stdout, run.stderr)
    assert "no progress" not in run.stderr
    lines = re.findall(r"^\[rank 0\] preparing: (.*)$", run.stdout, re.MULTILINE)
    assert lines and re.match(told, lines[0]), run.stdout
    assert (status(tmp_path)["state"], status(tmp_path)["message"]) == ("completed", "")


@pytest.mark.parametrize(
    ("rank", "ranks", "why"),
    [(1, 2, r"never entered collective \d+"), pytest.param(0, 1, "does nothing", marks=pytest.mark.long)],
)
def test_a_dead_preparation_is_named_and_ended(tmp_path: Path, rank: int, ranks: int, why: str) -> None:
    run = supervised(tmp_path, ranks, *OWN_DATA, long("sleeps", rank, 1000))
    assert run.returncode == 3, (run.stdout, run.stderr)
    told = rf"no progress for \d+ s: rank {rank} on \S+ {why}: it is still at opening the data"
    assert re.search(told, run.stderr), run.stderr
    assert "in long" in run.stderr  # its stack
    assert status(tmp_path)["state"] == "failed"


PREPARES = """
import sys, time
from pathlib import Path
from mlx_ring.cluster.rank.progress import working
from test_text import Tokenizer, prepare, text_config, text_module
train = text_module.train_bpe
status = Path("run/status.json")
def slowly(*arguments):
    since = time.monotonic()
    with working("training the tokenizer"):  # for longer than the limit, and until the run has told of it
        while time.monotonic() < since + {seconds} or "tokenizer" not in status.read_text():
            pass
    return train(*arguments)
text_module.train_bpe = slowly
prepare(text_config(Path({text!r}), Path({cache!r}), tokenizer=Tokenizer["bpe"]))
"""


def test_a_run_waits_for_another_process_that_prepares_its_text(tmp_path: Path) -> None:
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    text.write_text("the cat sat on the mat\n" * 2000)
    code = PREPARES.format(seconds=LONG_SECONDS, text=str(text), cache=str(cache))
    path = os.pathsep.join(map(str, (ROOT, SUPPORT, ROOT / "tests/data")))
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(PYTHONPATH=path), cwd=tmp_path
    ) as other:
        try:
            while not list(cache.glob("*.preparing")):
                assert other.poll() is None
                time.sleep(0.02)
            words = ("data=text", f"data.path={text}", "data.tokenizer=bpe", "data.vocabulary_size=300")
            model = (
                "model=transformer",
                "model.layers=1",
                "trainer.steps=1",
                "evaluation.every_steps=null",
            )
            run = supervised(tmp_path, 1, "run.dir=run", *words, f"data.cache_dir={cache}", *model)
        finally:
            other.kill()
    assert run.returncode == 0, (run.stdout, run.stderr)
    assert "preparing: another process prepares this text: training the tokenizer" in run.stdout


DIGEST = f"""
from mlx_ring.run import data_digest
data_digest.DATA_SECONDS = {LIMIT_SECONDS}
data_digest.main()
"""


@pytest.mark.parametrize(("how", "told"), [("works", "digest"), ("sleeps", "no progress for 6 s: opening")])
def test_the_doctor_lets_data_that_works_take_its_time(tmp_path: Path, how: str, told: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", DIGEST, *OWN_DATA, long(how, 0)],
        cwd=tmp_path,
        env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{SUPPORT}"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert told in answer.stdout, (answer.stdout, answer.stderr)
