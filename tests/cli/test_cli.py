"""The command mlx-ring, run as a process, on the checkpoints of a real run."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import mlx.core as mx
import pytest
import ranks
from ranks import environment, status
from safetensors.numpy import load_file

from mlx_ring import __version__
from mlx_ring.cli.commands import cli

pytestmark = pytest.mark.ranks
STEPS = ["step_00000003", "step_00000006"]


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path


def mlx_ring(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in `folder`."""
    (ended,) = ranks.mlx_ring(folder, *arguments).members
    return subprocess.CompletedProcess(arguments, ended.status, ended.stdout, ended.stderr)


def damage(folder: Path, step: str) -> None:
    path = folder / "run/checkpoints" / step / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def assert_error(ended: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """The last line on stderr is the only error, with this status and these words."""
    assert ended.returncode == status, ended
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), ended.stderr
    assert "Traceback" not in ended.stderr


# list


@pytest.mark.parametrize("path", ["run", "run/checkpoints"])
def test_list_shows_the_oldest_first(folder: Path, path: str) -> None:
    ended = mlx_ring(folder, "checkpoint", "list", path)
    assert (ended.returncode, ended.stderr) == (0, "")
    first, last = ended.stdout.splitlines()
    assert STEPS[0] in first and "step 3" in first
    assert STEPS[1] in last and "step 6" in last and "bytes" in last and "loss" in last
    assert str(status(folder)["parameters_sha256"])[:12] in last


def test_list_as_json(folder: Path) -> None:
    ended = mlx_ring(folder, "checkpoint", "list", f"run/checkpoints/{STEPS[1]}", "--json")
    (row,) = json.loads(ended.stdout)["checkpoints"]
    assert (row["step"], row["samples"], row["world_size"]) == (6, 6 * 32, 1)
    assert row["parameters_sha256"] == status(folder)["parameters_sha256"]
    files = (folder / "run/checkpoints" / STEPS[1]).glob("*.safetensors")
    assert row["bytes"] == sum(path.stat().st_size for path in files)
    assert row["evaluation"]["loss"] > 0


def test_list_shows_what_is_damaged_beside_what_is_not(folder: Path) -> None:
    (folder / "run/checkpoints" / STEPS[1] / "manifest.json").write_text("{")
    ended = mlx_ring(folder, "checkpoint", "list", "run")
    first, last = ended.stdout.splitlines()
    assert ended.returncode == 0 and "damaged" not in first and "damaged: " in last and "not JSON" in last
    rows = json.loads(mlx_ring(folder, "checkpoint", "list", "run", "--json").stdout)["checkpoints"]
    assert [row["step"] for row in rows] == [3, 6] and "not JSON" in rows[1]["error"]


# verify


def test_verify_reads_every_checkpoint(folder: Path) -> None:
    ended = mlx_ring(folder, "checkpoint", "verify", "run")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [line.split()[-1] for line in ended.stdout.splitlines()] == ["ok", "ok"]


def test_verify_names_the_damaged_one(folder: Path) -> None:
    damage(folder, STEPS[0])
    ended = mlx_ring(folder, "checkpoint", "verify", "run")
    assert_error(ended, 5, "1 damaged checkpoint in run", "delete")
    first, last = ended.stdout.splitlines()
    assert STEPS[0] in first and "model.safetensors has" in first and last.endswith("ok")
    assert_error(
        mlx_ring(folder, "checkpoint", "verify", f"run/checkpoints/{STEPS[0]}"), 5, "1 damaged checkpoint"
    )


# export


def test_export_writes_the_weights_under_the_models_own_names(folder: Path) -> None:
    ended = mlx_ring(folder, "checkpoint", "export", "run", "--output", "model.safetensors")
    assert ended.returncode == 0 and STEPS[1] in ended.stdout and "model.safetensors" in ended.stdout
    exported = load_file(folder / "model.safetensors")
    assert set(exported) == {"layers.0.linear.weight", "layers.0.linear.bias", "head.weight", "head.bias"}
    digest = hashlib.sha256()
    for name in sorted(exported):
        digest.update(name.encode() + b"\0" + exported[name].tobytes())
    assert digest.hexdigest() == status(folder)["parameters_sha256"]
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict) and set(loaded) == set(exported)


def test_export_passes_over_a_damaged_one_and_says_so(folder: Path) -> None:
    damage(folder, STEPS[1])
    ended = mlx_ring(folder, "checkpoint", "export", "run", "--output", "model.safetensors")
    assert ended.returncode == 0 and STEPS[0] in ended.stdout
    assert "passed over: " in ended.stderr and STEPS[1] in ended.stderr
    exported = (folder / "model.safetensors").read_bytes()
    assert exported == (folder / "run/checkpoints" / STEPS[0] / "model.safetensors").read_bytes()


def test_export_without_a_valid_one_leaves_the_old_file(folder: Path) -> None:
    (folder / "model.safetensors").write_text("kept")
    for step in STEPS:
        damage(folder, step)
    ended = mlx_ring(folder, "checkpoint", "export", "run", "--output", "model.safetensors")
    assert_error(ended, 5, "no usable checkpoint in run", "model.safetensors")
    assert (folder / "model.safetensors").read_text() == "kept"


@pytest.mark.parametrize("output", ["absent/model.safetensors", "run", "/proc/model.safetensors"])
def test_export_to_where_nothing_can_be_written(folder: Path, output: str) -> None:
    before = sorted(folder.rglob("*"))
    assert_error(
        mlx_ring(folder, "checkpoint", "export", "run", "--output", output), 2, output, "cannot be written"
    )
    assert sorted(folder.rglob("*")) == before


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "exit_status", "words"),
    [
        (["checkpoint", "list", "nowhere"], 5, ["nowhere does not exist", "checkpoints/step_…"]),
        (["checkpoint", "verify", "a_file"], 5, ["a_file is a file", "checkpoints/step_…"]),
        (["checkpoint", "export", "empty", "--output", "x"], 5, ["empty has no checkpoints/step_…"]),
        (["checkpoint", "list"], 2, ["Missing argument 'RUN'"]),
        (["checkpoint", "export", "run"], 2, ["Missing option '--output'"]),
        (["checkpoint", "explode"], 2, ["No such command 'explode'"]),
        (["--explode"], 2, ["No such option", "--explode"]),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, arguments: list[str], exit_status: int, words: list[str]
) -> None:
    (folder / "empty").mkdir()
    (folder / "a_file").touch()
    assert_error(mlx_ring(folder, *arguments), exit_status, *words)


@pytest.mark.parametrize("arguments", [[], ["checkpoint"]])
def test_without_a_command_it_shows_its_help(folder: Path, arguments: list[str]) -> None:
    ended = mlx_ring(folder, *arguments)
    assert ended.returncode == 2 and ended.stderr.startswith("Usage:") and "Commands:" in ended.stderr


def test_help_and_version(folder: Path) -> None:
    assert __version__ in mlx_ring(folder, "--version").stdout
    ended = mlx_ring(folder, "checkpoint", "export", "--help")
    assert (ended.returncode, ended.stderr) == (0, "") and "Usage:" in ended.stdout


def commands(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from commands(each, (*path, name))


def test_every_command_shows_an_example_that_can_be_parsed() -> None:
    for path, command in commands(cli):
        with click.Context(command, info_name=" ".join(("mlx-ring", *path))) as context:
            shown = command.get_help(context)
        (example,) = re.findall(r"Example: (.*?)(?:\n\n|$)", " ".join(shown.split("\n  ")), re.DOTALL)
        words = shlex.split(example)
        if words[0] == "eval":
            words = shlex.split(words[1].removeprefix("$(").removesuffix(")"))
        assert words[0] == "mlx-ring" and tuple(words[1 : 1 + len(path)]) == path, example
        context = cli.make_context("mlx-ring", words[1:])  # a mistake raises
        while isinstance(context.command, click.Group):
            name, below, rest = context.command.resolve_command(
                context, [*context._protected_args, *context.args]
            )
            assert name is not None and below is not None
            context = below.make_context(name, rest, parent=context)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(folder: Path, shell: str) -> None:
    ended = mlx_ring(folder, "completion", shell)
    assert ended.returncode == 0 and "_MLX_RING_COMPLETE" in ended.stdout, ended
    if shell == "bash":
        words = {"_MLX_RING_COMPLETE": "bash_complete", "COMP_WORDS": "mlx-ring ch", "COMP_CWORD": "1"}
        program = str(Path(sys.executable).with_name("mlx-ring"))
        ended = subprocess.run([program], env=environment(**words), capture_output=True, text=True)
        assert ended.stdout.strip() == "plain,checkpoint", ended


def test_it_needs_no_mlx(folder: Path) -> None:
    """The command must work at once, also while a run uses all the memory of the machine."""
    program = "import sys; import mlx_ring.cli; print('mlx.core' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "False"
