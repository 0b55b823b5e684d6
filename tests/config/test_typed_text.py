"""Paths and names stay as they are typed, also those that read as numbers; what needs quotes is told how."""

import subprocess
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from ranks import SMALL, TRAIN, environment, mlx_ring, start, status, train
from refusals import CONFIGURATION, assert_refused
from sweeps import sweep, table

from mlx_ring.config.compose import compose_run, recorded_run
from mlx_ring.config.resume_rules import refuse_changes
from mlx_ring.config.typed_text import TEXTS, as_typed, with_texts, without_quotes
from mlx_ring.errors import ConfigError

NUMBERS = ["20261127", "42", "1e3", "3.10", "true", "False", "nan", "-inf", ".5", "1_000", "+7", "007"]
OTHERS = ["outputs/a", "D/3.10", "2026-11-27", "null", "a,b", "'3.10'", "${seed}", "0x10", "12:30", "a 3"]
QUOTED = "\"run.dir='D/lr=1e-3'\""


@pytest.mark.parametrize("typed", NUMBERS)
def test_a_number_is_a_text_for_hydra(typed: str) -> None:
    parser = OverridesParser.create()
    for key in ("run.dir", "+data.path", "experiment"):
        override = as_typed(f"{key}={typed}")
        assert parser.parse_override(override).value() == typed
        assert as_typed(override) == override and without_quotes(override) == f"{key}={typed}"
    for several in (f"{typed},a,{typed}", f"choice({typed}, a,{typed})"):
        swept = parser.parse_override(as_typed(f"data.path={several}"))
        jobs = [as_typed(f"data.path={each}") for each in swept.sweep_string_iterator()]
        assert [parser.parse_override(job).value() for job in jobs] == [typed, "a", typed]
    assert parser.parse_override(as_typed(f"data.exclude=[{typed},a]")).value() == [typed, "a"]


def test_what_is_no_number_or_no_text_stays_as_it_is() -> None:
    unchanged = [f"run.dir={typed}" for typed in OTHERS]
    unchanged += ["trainer.steps=3", "seed=3", "data.arguments={a:3.10}", "optimizer.learning_rate=1e-3,3e-3"]
    unchanged += ["data.path=range(1,3)", "~data.path", "run.dir=", "data.exclude=[]"]
    assert [as_typed(override) for override in unchanged] == unchanged


def test_which_keys_hold_texts() -> None:
    assert {"run.dir", "data.path", "data.exclude", "checkpoint.resume", "hydra.sweep.dir"} <= TEXTS
    assert not {"trainer.steps", "model.arguments", "data.sequence_length", "run.split"} & TEXTS


def test_a_program_composes_texts_as_typed() -> None:
    config = compose_run(
        "run.dir=1e3", "data=text", "data.path=2026", "data.exclude=[3.10,true]", "cluster.hostfile=007",
        "model=transformer", "data.cache_dir=42", "checkpoint.initialize_from=1.",
    )  # fmt: skip
    assert (config.run.dir, config.data.path, config.data.exclude) == ("1e3", "2026", ["3.10", "true"])
    assert (config.cluster.hostfile, config.data.cache_dir) == ("007", "42")
    assert config.checkpoint.initialize_from == "1."
    for typed in ("3.10", "on", "0x10", "12:30"):
        assert recorded_run(config.redacted, f"data.path={typed}").data.path == typed


def test_a_run_that_recorded_a_number_is_still_read() -> None:
    """By what reads a record, and by a resumed run, which types the same."""
    now = compose_run("run.dir=1e3", "data=text", "model=transformer", "data.path=a", "data.exclude=[2024]")
    before = now.redacted | {"run": {"dir": 1000.0}, "data": now.redacted["data"] | {"exclude": [2024]}}
    read = recorded_run(before)
    assert (read.run.dir, read.data.exclude) == ("1000.0", ["2024"])
    refuse_changes(with_texts(before), now.redacted)


@pytest.mark.ranks
def test_every_command_takes_a_number_as_a_path(tmp_path: Path) -> None:
    train(tmp_path, run="3.10").ok()
    assert status(tmp_path, "3.10")["state"] == "completed"
    mlx_ring(tmp_path, "run", "--", *SMALL, "++run.dir=20261127", "checkpoint.initialize_from=3.10").ok()
    assert status(tmp_path, "20261127")["state"] == "completed"
    mlx_ring(tmp_path, "replay", "3.10", "--step", "2").ok()
    starts = "checkpoint.initialize_from=choice(20261127,3.10)"
    names = ",".join(item.partition("=")[0] for item in SMALL)
    named = (
        "hydra.sweep.subdir=${hydra.job.override_dirname}",
        f"hydra.job.config.override_dirname.exclude_keys=[{names}]",
    )
    swept = sweep(tmp_path, *SMALL, "hydra.sweep.dir=1e3", starts, *named)
    assert swept.returncode == 0, swept
    (tmp_path / "sweep").symlink_to("1e3")
    expected = ["checkpoint.initialize_from=20261127", "checkpoint.initialize_from=3.10"]
    assert [row["overrides"].split()[-1] for row in table(tmp_path)] == expected
    assert [row["directory"] for row in table(tmp_path)] == [f"1e3/{name}" for name in expected]
    assert {path.name for path in tmp_path.iterdir()} == {"3.10", "20261127", "1e3", "sweep"}


@pytest.mark.ranks
def test_the_doctor_takes_a_number_as_a_path(tmp_path: Path) -> None:
    for name, data in (("true", []), ("42", ["data=text", "model=transformer", "data.path=3.10"])):
        looked = mlx_ring(tmp_path, "doctor", "--json", "--", f"run.dir={name}", *data)
        assert "Error" not in looked.report() and '"disk"' in looked.members[0].stdout, looked.report()
    assert "data.path=3.10 does not exist" in looked.members[0].stdout


@pytest.mark.ranks
def test_numbers_in_a_file_of_the_users(tmp_path: Path) -> None:
    """A choice may be called 2027; the number 3.10 in a file has lost its zero, so it is refused."""
    folder = tmp_path / "conf/experiment"
    folder.mkdir(parents=True)
    (folder / "2027.yaml").write_text("# @package _global_\ntrainer: {steps: 2}\n")
    (folder / "3.10.yaml").write_text("# @package _global_\nrun: {dir: 3.10}\n")
    program = [*TRAIN, "--config-dir", "conf"]
    small = [item for item in SMALL if not item.startswith("trainer.steps")]
    start(["experiment=2027", *small, "run.dir=run"], tmp_path, program=program).wait().ok()
    assert status(tmp_path)["step"] == 2
    refused = start(["experiment=3.10", *SMALL], tmp_path, program=program).wait()
    assert_refused(refused, CONFIGURATION, "run.dir must be a text", "number 3.1", "quotes")
    assert {path.name for path in tmp_path.iterdir()} == {"conf", "run"}


@pytest.mark.ranks
def test_a_value_with_an_equals_sign_is_told_its_quotes(tmp_path: Path) -> None:
    """The line says what to type, and that works in a shell."""
    words = ("run.dir=D/lr=1e-3 cannot be read", f"put its value in quotes: {QUOTED}")
    assert_refused(start([*SMALL, "run.dir=D/lr=1e-3"], tmp_path).wait(), CONFIGURATION, *words)
    for command in ("run", "doctor"):
        refused = mlx_ring(tmp_path, command, "--", *SMALL, "run.dir=D/lr=1e-3")
        assert_refused(refused, CONFIGURATION, *words)
    swept = sweep(tmp_path, "hydra.sweep.dir=D/lr=1e-3", "seed=1,2")
    assert swept.returncode == CONFIGURATION and "\"hydra.sweep.dir='D/lr=1e-3'\"" in swept.stderr, swept
    line = f'"$@" {QUOTED}'
    done = subprocess.run(
        ["sh", "-c", line, "sh", *TRAIN, *SMALL], cwd=tmp_path, env=environment(), capture_output=True
    )
    assert done.returncode == 0 and status(tmp_path, "D/lr=1e-3")["state"] == "completed", done


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("data.path=a=b,c=d", "\"data.path='a=b,c=d'\""),
        ("data.exclude=[a=b,c]", "\"data.exclude=['a=b',c]\""),
        ("data.arguments={path:D/lr=1,n:3}", "\"data.arguments={path:'D/lr=1',n:3}\""),
        ("run.dir=out(1)", "\"run.dir='out(1)'\""),
        ("run.dir=it's=$HOME", "\"run.dir='it\\\\'s=\\$HOME'\""),
        ("trainer.steps=sum(1,2)", "cannot be read: HydraException while evaluating 'sum(1,2)'"),
        ("data.arguments={api_key:a=hunter2}", "data.arguments=<redacted> cannot be read"),
        ("data.arguments={api_key:hunter2!}", "data.arguments=<redacted> cannot be read"),
        ("model={a:1}", "unknown configuration key model.a"),
        ("=3", "the command line cannot be used"),
    ],
)
def test_what_cannot_be_read(typed: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_run("run.dir=run", "data=text", "model=transformer", typed)
    assert words in str(refused.value) and "hunter2" not in str(refused.value)
